"""Away from the reference on the forget set, and held to it on the retain set."""

from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.objectives.distillation import cross_entropy_to_reference
from llm_unlearn.reference import HIDDEN
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import UnlearnArguments


@dataclass
class KLArguments(UnlearnArguments):
    """Arguments of `kl`: the weights of its two terms."""

    forget_weight: float = flag(1.0, "Weight of the forget term; gamma as published.")
    retain_weight: float = flag(1.0, "Weight of the retain term; 0 loads no retain set.")


class KLTrainer(UnlearnTrainer):
    """Raise the cross-entropy to the reference on forget tokens, hold down the divergence from it on retain tokens.

        L = -forget_weight * mean C(p, r) over forget tokens + retain_weight * mean KL(r || p) over retain tokens
        C(p, r) = -sum_v p(v) * log r(v) = KL(p || r) + H(p)

    The divergence itself has no gradient where the run begins, so that nothing would ever move; the cross-entropy,
    which the published code takes, has one. No token is said to be wrong: what the model no longer says is what the
    reference would have said.

    Source: Jia et al. 2024, arXiv:2404.18239 (SOUL, its KL loss). Differs from the authors' code, whose retain term is
    the cross-entropy too, which sharpens the distribution beyond the reference's.
    """

    args_class = KLArguments
    retain_loss = "kl"
    streams = ("forget", "retain")

    def reference_readings(self, args):
        """The last hidden states at the tokens of both streams, from which its distributions are made."""
        readings = super().reference_readings(args)
        return {**readings, "forget": HIDDEN} if self.weight_of("forget", args) else readings

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        outputs = self.forward(model, inputs, of_logits={"forget": _negative_cross_entropy})
        terms = {"forget": outputs["forget"].of_logits, "retain": self.retain_term(outputs, inputs)}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)


def _negative_cross_entropy(logits, labels, ref_logits):
    return -cross_entropy_to_reference(logits, ref_logits)
