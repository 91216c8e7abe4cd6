"""Max-update unlearning: as far from the start as the retain set lets the weights go."""

import math
from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.errors import UserError
from llm_unlearn.objectives.likelihood import nll
from llm_unlearn.objectives.parameters import element_norm, tensor_norm
from llm_unlearn.parameter_pull import ParameterPull
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import UnlearnArguments

_MEASURES = {"element_norm": element_norm, "l2": tensor_norm}


@dataclass
class MaxUpdateArguments(UnlearnArguments):
    """Arguments of `max_update`; defaults as published."""

    retain_weight: float = flag(1.0, "Weight of the negative log-likelihood of the retain tokens, > 0.")
    update_weight: float = flag(10.0, "Weight of the size of the update, > 0: how hard the weights are pushed away.")
    update_norm: str = flag(
        "element_norm",
        "Size of an update: element_norm, the root mean square of a tensor's elements times their number; l2, its "
        "Euclidean length; summed over the tensors.",
        choices=["element_norm", "l2"],
    )

    def __post_init__(self):
        if self.retain_weight == 0:
            raise UserError(
                "--retain_weight 0 would train nothing: the size of the update has no gradient where it starts, so "
                "the retain term must take the first step; pass a small one, for example --retain_weight 0.001"
            )
        if not 0 < self.update_weight < math.inf:
            raise UserError(f"--update_weight must be above 0, and finite, but is {self.update_weight}")
        if self.update_norm not in _MEASURES:
            raise UserError(f"--update_norm must be element_norm or l2, but is '{self.update_norm}'")
        super().__post_init__()


class MaxUpdateTrainer(UnlearnTrainer):
    """Push the weights as far from their start as the retain set allows; no forget data is read.

        L = retain_weight * mean nll(retain) - update_weight * U(theta)
        U = sum_k n_k * sqrt(mean of (theta_k - theta0_k)^2 + 1e-8)   over the trained tensors k of n_k elements

    U is logged as `loss/update`; it is no part of the logged `loss`. The square of the distance instead would feed on
    itself: its gradient grows with the distance.

    Source: EleutherAI/unlearn 2026 (max-update unlearning). Differs from the authors' code, which clips the
    gradients of both terms together: clipped alone, the retain gradient keeps its size beside that of U, whose
    length is its weight times the root of the number of trained weights.
    """

    args_class = MaxUpdateArguments
    streams = ("retain",)
    retain_loss = "nll"

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train away from what the model is when this is called; see UnlearnTrainer.train."""
        args = self.args
        measure, flag = _MEASURES[args.update_norm], "--unlearn_method max_update"
        with ParameterPull(self, "update", measure, lambda: -args.update_weight, flag).attached():
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average the negative log-likelihood over the retain tokens of the step."""
        outputs = self.forward(model, inputs)
        return self.total_loss({"retain": nll(outputs["retain"].logps)}, outputs, return_outputs, num_items_in_batch)
