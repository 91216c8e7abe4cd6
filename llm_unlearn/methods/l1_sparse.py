"""Fine-tuning on the retain set with an L1 penalty on the weights."""

import math
from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.errors import UserError
from llm_unlearn.objectives.likelihood import nll
from llm_unlearn.parameter_pull import PullToZero
from llm_unlearn.reference import is_peft
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import UnlearnArguments


@dataclass
class L1SparseArguments(UnlearnArguments):
    """Arguments of `l1_sparse`."""

    retain_weight: float = flag(1.0, "Weight of the negative log-likelihood of the retain tokens.")
    l1_coef: float | None = flag(
        None,
        "Weight of the sum of the absolute trained weights, > 0; to be given: their number is in it, so that 1e-6 "
        "is much for a large model (alpha in the published command line).",
    )

    def __post_init__(self):
        if self.l1_coef is None or not 0 < self.l1_coef < math.inf:
            raise UserError(f"l1_sparse needs --l1_coef NUMBER above 0, 1e-7 for example, but it is {self.l1_coef}")
        super().__post_init__()


class L1SparseTrainer(UnlearnTrainer):
    """Fine-tune on the retain set while every trained weight is pulled toward 0; no forget data is read.

        L = retain_weight * mean nll(retain) + l1_coef * sum_i |theta_i|   over the trained weights i

    What the retain set does not hold in place fades. The penalty is logged as `loss/l1`; it is no part of the logged
    `loss`, and its gradient, l1_coef * sign(theta), joins that of the loss once per optimizer step.

    Source: Jia et al. 2023, arXiv:2304.04934 (L1-sparse unlearning); in SOUL, Jia et al. 2024, arXiv:2404.18239.
    Differs from the authors' code, which clips the gradients of both together; SOUL's cannot be chosen, because it goes
    by one name on the command line and by another one behind it.
    """

    args_class = L1SparseArguments
    streams = ("retain",)
    token_terms = ("retain",)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if is_peft(self.model):
            raise UserError(
                "l1_sparse pulls the trained weights to 0, and adapters that are 0 are the model as it was; leave out "
                "--use_peft"
            )

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train with every weight pulled toward 0; see UnlearnTrainer.train."""
        with PullToZero(self, lambda: self.args.l1_coef).attached():
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average the negative log-likelihood over the retain tokens of the step."""
        outputs = self.forward(model, inputs)
        return self.total_loss({"retain": nll(outputs["retain"].logps)}, outputs, return_outputs, num_items_in_batch)
