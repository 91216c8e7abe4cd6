"""Simple negative preference optimization: NPO without a reference."""

from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.errors import UserError
from llm_unlearn.objectives.preference import simnpo
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RetainArguments


@dataclass
class SimNPOArguments(RetainArguments):
    """Arguments of `simnpo`; defaults as in open-unlearning."""

    beta: float = flag(4.5, "Inverse temperature, > 0, on the log-probability per token.")
    delta: float = flag(0.0, "Margin in nats per token, >= 0; gamma / beta in the paper's letters.")
    forget_weight: float = flag(0.125, "Weight of the forget term.")

    def __post_init__(self):
        if not self.beta > 0:
            raise UserError(f"--beta must be > 0, but is {self.beta}")
        if self.delta < 0:
            raise UserError(f"--delta must be >= 0, but is {self.delta}")
        super().__post_init__()


class SimNPOTrainer(UnlearnTrainer):
    """NPO normalized by length instead of by a reference, so that short and long answers are forgotten alike.

    Source: Fan et al. 2024, arXiv:2410.07163.
    """

    args_class = SimNPOArguments
    streams = ("forget", "retain")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average the forget term over sequences, the retain term over tokens."""
        outputs = self.forward(model, inputs)
        forget = simnpo(outputs["forget"].mean_logps(), self.args.beta, self.args.delta)
        terms = {"forget": forget, "retain": self.retain_term(outputs, inputs)}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)
