"""Self-distillation with adjusted logits."""

from dataclasses import dataclass
from functools import partial

from llm_unlearn.arguments import flag
from llm_unlearn.errors import UserError
from llm_unlearn.objectives.distillation import adjusted_self_distillation
from llm_unlearn.reference import HIDDEN
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RetainArguments


@dataclass
class UndialArguments(RetainArguments):
    """Arguments of `undial`; defaults as in open-unlearning."""

    beta: float = flag(10.0, "By how much the true token's logit is lowered in the reference's distribution, > 0.")
    retain_weight: float = flag(0.0, "Weight of the retain term; 0, as published, loads no retain set.")

    def __post_init__(self):
        if not self.beta > 0:
            raise UserError(f"--beta must be > 0, but is {self.beta}")
        super().__post_init__()


class UndialTrainer(UnlearnTrainer):
    """Pull forget tokens to the reference's own distribution with the true token made unlikely: a target, no ascent.

    The retain term is left out as published; `--retain_weight 1` takes it in. Logits are made chunk by chunk.

    Source: Dong et al. 2024, arXiv:2402.10052. Differs from the code of open-unlearning, see
    `adjusted_self_distillation`; and the reference is not a second model unless asked for.
    """

    args_class = UndialArguments
    streams = ("forget", "retain")

    def reference_readings(self, args):
        """The last hidden states at the forget tokens, from which its distributions are made."""
        readings = super().reference_readings(args)
        return {**readings, "forget": HIDDEN} if self.weight_of("forget", args) else readings

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        divergence = partial(adjusted_self_distillation, beta=self.args.beta)
        outputs = self.forward(model, inputs, of_logits={"forget": divergence})
        terms = {"forget": outputs["forget"].of_logits, "retain": self.retain_term(outputs, inputs)}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)
