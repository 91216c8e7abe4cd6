"""Gradient difference: ascend on the forget set, descend on the retain set."""

from dataclasses import dataclass

from llm_unlearn.objectives.likelihood import ascent
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RetainArguments


@dataclass
class GradDiffArguments(RetainArguments):
    """Arguments of `grad_diff`: the weights of its two terms."""


class GradDiffTrainer(UnlearnTrainer):
    """Ascend the loss of the forget tokens while descending on the retain tokens.

        L = forget_weight * mean log p(forget) + retain_weight * (retain term)

    Source: Liu et al. 2022, arXiv:2203.12817; as in TOFU, Maini et al. 2024, arXiv:2401.06121.
    """

    args_class = GradDiffArguments
    streams = ("forget", "retain")
    token_terms = ("forget", "retain")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        outputs = self.forward(model, inputs)
        terms = {"forget": ascent(outputs["forget"].logps), "retain": self.retain_term(outputs, inputs)}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)
