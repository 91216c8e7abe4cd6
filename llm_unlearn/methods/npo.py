"""Negative preference optimization."""

from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.errors import UserError
from llm_unlearn.objectives.preference import npo
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RetainArguments


@dataclass
class NPOArguments(RetainArguments):
    """Arguments of `npo`."""

    beta: float = flag(0.1, "Inverse temperature, > 0: the larger, the sooner the forget gradient fades out.")

    def __post_init__(self):
        if not self.beta > 0:
            raise UserError(f"--beta must be > 0, but is {self.beta}")
        super().__post_init__()


class NPOTrainer(UnlearnTrainer):
    """Gradient ascent whose per-sequence step fades out once the sequence is unlearned.

    Source: Zhang et al. 2024, arXiv:2404.05868.
    """

    args_class = NPOArguments
    needs_reference = True
    streams = ("forget", "retain")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average the forget term over sequences, the retain term over tokens."""
        outputs = self.forward(model, inputs)
        logps = outputs["forget"].sequence_logps()
        ref_logps = self.reference(inputs)["forget"].sequence_logps()
        terms = {"forget": npo(logps, ref_logps, self.args.beta), "retain": self.retain_term(outputs, inputs)}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)
