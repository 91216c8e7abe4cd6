"""Primal-dual unlearning: flatten the logits of the forget set while the retain loss stays below a bound."""

import math
from dataclasses import dataclass

import torch
from transformers import TrainerCallback

from llm_unlearn.arguments import flag
from llm_unlearn.errors import UserError
from llm_unlearn.head import wide_dtype
from llm_unlearn.objectives.distillation import squared_logit_margin
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RetainArguments


@dataclass
class PDUArguments(RetainArguments):
    """Arguments of `pdu`; defaults as published."""

    retain_bound: float | None = flag(
        None,
        "What the retain term may rise to, nats per token; to be given: somewhat above what it is before unlearning.",
    )
    retain_weight: float = flag(50.0, "What the weight of the retain term begins with; the bound moves it from there.")
    dual_step_size: float = flag(1.0, "By how much that weight moves for each nat beyond the bound, per step, > 0.")
    dual_warmup_epochs: float = flag(5.0, "Epochs in which that weight stays as it is.")

    def __post_init__(self):
        if self.retain_bound is None or not 0 <= self.retain_bound < math.inf:
            raise UserError(
                "pdu needs --retain_bound NATS, what the retain term may rise to: somewhat above what it is before "
                f"unlearning (--do_eval True reports it); it must be >= 0, but is {self.retain_bound}"
            )
        if self.retain_loss == "none" or not self.retain_weight > 0:
            raise UserError("pdu bounds a retain term; pass --retain_loss nll or kl, and a --retain_weight above 0")
        if self.retain_schedule != type(self).__dataclass_fields__["retain_schedule"].default:
            raise UserError("--retain_schedule has no effect with pdu, whose bound moves the weight of the retain term")
        if not 0 < self.dual_step_size < math.inf or not 0 <= self.dual_warmup_epochs < math.inf:
            raise UserError(
                "--dual_step_size must be > 0 and --dual_warmup_epochs >= 0, but they are "
                f"{self.dual_step_size} and {self.dual_warmup_epochs}"
            )
        super().__post_init__()


class PDUTrainer(UnlearnTrainer):
    """Make forget tokens as likely as any others, with a retain weight that rises while its term is above a bound.

        L = forget_weight * mean (max_v z - mean_v z)^2 over forget tokens + lambda * (retain term)
        lambda <- max(0, lambda + dual_step_size * (retain term - retain_bound))   after each optimizer step

    lambda begins as `--retain_weight`; the retain term of its update is the mean over the tokens of the whole step on
    all processes, so that lambda is the same on each of them however the step is cut. It is logged as `dual_weight` and
    comes back with a resumed run.

    Source: Entesari et al. 2025, arXiv:2506.05314. Differs from the code of open-unlearning: there each process has a
    lambda of its own, updated after each of its micro-batches.
    """

    args_class = PDUArguments
    streams = ("forget", "retain")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.dual_weight = torch.tensor(float(self.args.retain_weight), dtype=torch.float64)
        self._retain_sum = 0.0
        self.add_callback(_DualUpdate(self))

    def method_state(self):
        """The weight of the retain term."""
        return {"dual_weight": self.dual_weight}

    def load_method_state(self, state):
        """Take it over."""
        self.dual_weight = state["dual_weight"]

    def weight_of(self, stream, args=None):
        """Of the retain stream lambda; with `args` what it begins with."""
        dual = getattr(self, "dual_weight", None)
        return super().weight_of(stream, args) if stream != "retain" or args or dual is None else float(dual)

    def runs(self, stream):
        """The retain term is measured also while its weight is 0, or that would stay so."""
        return self._only in (None, "retain") if stream == "retain" else super().runs(stream)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        outputs = self.forward(model, inputs, of_logits={"forget": _margin})
        terms = {"forget": outputs["forget"].of_logits, "retain": self.retain_term(outputs, inputs)}
        is_step = num_items_in_batch is not None and self.model.training and not self.is_probing
        if terms["retain"] is not None and is_step:
            self._retain_sum += self.mean_of(terms["retain"].detach(), outputs["retain"], num_items_in_batch["retain"])
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)

    @staticmethod
    def mean_of(values, output, items):
        """Return this process's share of the mean of values (B, T) over the tokens of a step, which items counts."""
        values = values if output.weights is None else values * output.weights
        return values.masked_fill(~output.mask, 0.0).to(wide_dtype(values.device)).sum() / items[1]

    def update_dual_weight(self):
        """Move lambda by what the retain term of the step was, on all processes together."""
        total = torch.as_tensor(self._retain_sum, device=self.args.device, dtype=wide_dtype(self.args.device))
        self._retain_sum = 0.0
        measured = self.accelerator.reduce(total, "sum").double().cpu()
        updates_per_epoch = -(-len(self.plan) // self.args.gradient_accumulation_steps)
        if self.state.global_step > self.args.dual_warmup_epochs * updates_per_epoch:
            moved = self.dual_weight + self.args.dual_step_size * (measured - self.args.retain_bound)
            self.dual_weight = moved.clamp(min=0)

    def log(self, logs, start_time=None):
        """Add lambda to the lines of training."""
        super().log({**logs, "dual_weight": float(self.dual_weight)} if "loss" in logs else logs, start_time)


class _DualUpdate(TrainerCallback):
    """Updates lambda after each optimizer step, before anything is logged or saved."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.update_dual_weight()


def _margin(logits, labels, ref_logits):
    return squared_logit_margin(logits)
