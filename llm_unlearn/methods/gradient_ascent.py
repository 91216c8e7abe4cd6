"""Gradient ascent on the forget set."""

from llm_unlearn.objectives.likelihood import ascent
from llm_unlearn.trainer import UnlearnTrainer


class GradientAscentTrainer(UnlearnTrainer):
    """Ascend the loss of the forget set; nothing holds the rest of the model in place.

    Source: Yao et al. 2024, arXiv:2402.15159; Jang et al. 2022, arXiv:2210.01504.
    """

    token_terms = ("forget",)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average the log-likelihood over the forget tokens of the step."""
        outputs = self.forward(model, inputs)
        return self.total_loss({"forget": ascent(outputs["forget"].logps)}, outputs, return_outputs, num_items_in_batch)
