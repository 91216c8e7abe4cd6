"""Sequential (layer-wise) unlearning."""

import contextlib
import math
from dataclasses import dataclass

import torch

from llm_unlearn.adapter_rows import AdapterRows
from llm_unlearn.arguments import flag
from llm_unlearn.errors import UserError
from llm_unlearn.frozen_lens import LOGIT, frozen_lens, lens_entropy
from llm_unlearn.objectives.entropy import max_entropy
from llm_unlearn.objectives.preference import npo
from llm_unlearn.phased_trainer import PhasedTrainer
from llm_unlearn.reference import LOGPS
from llm_unlearn.training_arguments import ActivationArguments


@dataclass
class SequentialArguments(ActivationArguments):
    """Arguments of `sequential`."""

    forget_weight: float = flag(10.0, "Weight of the forget term.")
    retain_weight: float = flag(5.0, "Weight of the retain term; 0 loads no retain set.")
    forget_schedule: str = flag(
        "1:0.75", "How the weight of the forget term goes within each phase: constant, or START:END, factors of it."
    )
    retain_schedule: str = flag(
        "0:1",
        "How the weight of the retain term goes within each phase: constant, or START:END, factors of it; published "
        "with LoRA 0:1, for a whole model 0.25:1.",
    )
    start_layer: int | None = flag(None, "Decoder layer of the first phase, from 0; default: the last one.")
    end_layer: int | None = flag(
        None, "No layer below this one has a phase; default: 8, or a quarter of the model's depth where that is less."
    )
    layer_step: int = flag(4, "How many layers further down the next phase is; published with LoRA 4, else 1.")
    forget_loss: str = flag(
        "entropy",
        "Forget term: entropy flattens the output distribution, top_k its most likely tokens, npo bounds how far "
        "sequences become less likely than under the reference.",
        choices=["entropy", "top_k", "npo"],
    )
    top_k: int | None = flag(None, "Tokens that --forget_loss top_k flattens, at least 2; default 100.")
    beta: float | None = flag(None, "Inverse temperature of --forget_loss npo, > 0; default 0.1.")
    map: str = flag(
        "base",
        "How the phase's layer becomes an output: base, through the layers above without their adapters; lens, through "
        "the tuned lens of --lens_path.",
        choices=["base", "lens"],
    )
    lens_path: str | None = flag(
        None,
        "Folder or Hub name of the lens of --map lens, trained for this model with utils/train_tuned_lens.py, or logit "
        "for the logit lens, which needs no training.",
    )
    allow_pickle_lens: bool = flag(
        False, "Read a published lens that is a pickle (params.pt): its tensors, and nothing else."
    )
    maintain_unlearned: bool = flag(
        False, "Without adapters: layers that had their phase go on training in later ones."
    )
    same_sign_grads: bool = flag(
        False,
        "Update only the elements of weights for which the forget and the retain gradient have the same sign; needs a "
        "backward for each and twice the gradients' memory.",
    )
    asymmetric_filter: bool = flag(
        False, "As --same_sign_grads, but the forget gradient alone gives way where the signs differ."
    )

    def __post_init__(self):
        for name, known in (("forget_loss", ("entropy", "top_k", "npo")), ("map", ("base", "lens"))):
            if getattr(self, name) not in known:
                raise UserError(
                    f"--{name} must be {', '.join(known[:-1])} or {known[-1]}, but is '{getattr(self, name)}'"
                )
        for name, default, loss in (("top_k", 100, "top_k"), ("beta", 0.1, "npo")):
            if self.forget_loss == loss and getattr(self, name) is None:
                setattr(self, name, default)
            elif self.forget_loss != loss and getattr(self, name) is not None:
                raise UserError(f"--{name} has no effect without --forget_loss {loss}")
        if self.top_k is not None and self.top_k < 2:
            raise UserError(f"--top_k must be at least 2, but is {self.top_k}")
        if self.beta is not None and not 0 < self.beta < math.inf:
            raise UserError(f"--beta must be > 0, but is {self.beta}")
        if (self.map == "lens") != (self.lens_path is not None):
            raise UserError("--map lens and --lens_path FOLDER (or logit) go together; pass both or neither")
        if self.allow_pickle_lens and self.lens_path in (None, LOGIT):
            raise UserError("--allow_pickle_lens has no effect without a --lens_path that is read")
        if self.map == "lens" and self.forget_loss == "npo":
            raise UserError("--forget_loss npo compares outputs, which --map lens does not make; pass --map base")
        if "max_entropy" in (self.regularizer or []) and self.forget_loss != "npo":
            raise UserError(
                f"--regularizer max_entropy is what --forget_loss {self.forget_loss} does; pass --forget_weight instead"
            )
        if self.layers is not None and self.retain_loss != "l2":
            raise UserError(f"--layers has no effect with --retain_loss {self.retain_loss}")
        has_both = self.retain_loss != "none" and self.retain_weight and self.forget_weight
        if (self.same_sign_grads or self.asymmetric_filter) and not has_both:
            raise UserError("--same_sign_grads and --asymmetric_filter need a forget and a retain term")
        super().__post_init__()


class SequentialTrainer(PhasedTrainer):
    """One decoder layer after the other, from the last, unlearned so that what is above it cannot tell.

    One phase for each layer, with a schedule and an optimizer state of its own. A whole model trains that layer alone;
    the others keep their weights bit for bit. The forget term goes through the model as it is. With LoRA all adapters
    train, and the forget term sees those up to the layer only: above it stands the frozen base model. The retain term
    goes through the whole model, adapters and all.

    Source: EleutherAI/unlearn 2026 (sequential unlearning). Differs from the authors' code: frozen layers have no
    momentum and no weight decay; each phase of a whole model has its own learning-rate schedule, as with LoRA; the
    forget term is the exact expectation of their cross-entropy with random targets; the retain divergence is per
    token. With LoRA the forget rows lose the adapters above the layer inside the one forward, so that the base
    layers run with the model's own masks and positions.
    """

    args_class = SequentialArguments
    streams = ("forget", "retain")
    adapter_rows = lens = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        args, self.vocabulary = self.args, self.model.config.get_text_config().vocab_size
        if (args.top_k or 0) > self.vocabulary:
            raise UserError(f"--top_k {args.top_k} is more than the model's {self.vocabulary} tokens")
        if self.has_adapters and args.map == "base":
            self.adapter_rows = AdapterRows(self.model)
        elif not self.has_adapters and args.layers is not None and max(args.layers) < self.phase_layers[0]:
            raise UserError(
                f"--layers {max(args.layers)} is below layer {self.phase_layers[0]}, which trains first and which the "
                "retain term would not see; pass --layers up to it, or a lower --start_layer"
            )
        if args.map == "lens":
            self.lens = frozen_lens(self, self.phase_layers)
        self.token_terms = ("retain",) if args.forget_loss == "npo" else ("forget", "retain")

    def reference_readings(self, args):
        """The retain term's, and the log-probabilities of forget tokens for npo."""
        readings = super().reference_readings(args)
        return {**readings, "forget": LOGPS} if args.forget_loss == "npo" and args.forget_weight else readings

    def last_layer_for(self, args):
        """The output is read, but for a lens with a retain term that reads no output either."""
        if args.map == "base" or self.retain_loss_for(args) in ("kl", "nll"):
            return None
        return max([self.phase_layers_for(args)[0], *(self.layers_for(args) if args.retain_loss == "l2" else ())])

    def run_state(self):
        """What a resumed run must share: the lens too."""
        return super().run_state() | ({"lens": self.lens.sha256()} if self.lens is not None else {})

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train phase by phase; see PhasedTrainer.train."""
        with self.adapter_rows.installed() if self.adapter_rows else contextlib.nullcontext():
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward one micro-batch; every other forward has all adapters."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.adapter_rows is not None:
            self.adapter_rows.leave_out(None, None)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average the forget term over tokens (npo: over sequences), the retain term over tokens."""
        if self.adapter_rows is not None:
            self.adapter_rows.leave_out(self._rows_of("forget", inputs), above=self.target_layer())
        outputs = self.forward(model, inputs, **self._wanted())
        terms = {"forget": self._forget_term(outputs, inputs), "retain": self.retain_term(outputs, inputs)}
        terms = {name: self._anchored(values, outputs[name]) for name, values in terms.items() if values is not None}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)

    def _rows_of(self, stream, inputs):
        """Return (B,) bool over the rows that `forward` stacks: those of one stream."""
        rows = {name: inputs[name]["input_ids"] for name in inputs if self.runs(name)}
        return torch.cat([torch.full((len(ids),), name == stream, device=ids.device) for name, ids in rows.items()])

    def _wanted(self):
        """Return what `forward` is asked for."""
        args, layers = self.args, set(self.layers_for(self.args) if self.args.retain_loss == "l2" else ())
        scored = {"retain"} if args.retain_loss in ("kl", "nll") else set()
        if args.map == "lens":
            return {"layers": layers | {self.target_layer(), self._top_layer()}, "scored": scored}
        uniform = {} if args.forget_loss == "npo" else {"forget": args.top_k}
        return {"layers": layers, "scored": scored | {"forget"}, "uniform": uniform}

    def _forget_term(self, outputs, inputs):
        """Return the forget values, (B, T-1) or for npo (B,); None where another stream has its turn."""
        if not self.runs("forget"):
            return None
        args, output, target = self.args, outputs["forget"], self.target_layer()
        if args.map == "lens":
            return lens_entropy(self, self.lens, target, output.hidden[target], inputs["forget"], args.top_k)
        if args.forget_loss == "npo":
            ref = self.reference(inputs)["forget"].mean_logps()
            # The objective carries the factor 2 / beta of its paper.
            return args.beta / 2 * npo(output.mean_logps(), ref, args.beta)
        return max_entropy(output.uniform, args.top_k or self.vocabulary)

    def _top_layer(self):
        """Return the highest layer that runs, or the target where the model is whole."""
        return self.target_layer() if self.truncation is None else self.truncation.last_layer

    def _anchored(self, values, output):
        """Give every layer of a truncated model a gradient, be it 0, which DDP and DeepSpeed wait for."""
        return values if self.truncation is None else values + 0.0 * output.hidden[self._top_layer()].sum()
