"""Pulling what trains toward where it started, or away from there, by the gradient and shard by shard."""
# Shapes: K parameters, E elements of them that one tensor of an optimizer holds on this process.

import torch

from llm_unlearn.objectives.parameters import absolute_sum, squared_distance
from llm_unlearn.optimizer_steps import OptimizerSteps, local


class ParameterPull(OptimizerSteps):
    """Adds the gradient of a function of theta - theta0 to the gradients, once per optimizer step, after clipping.

    theta0 are the trained weights of the model that `train` was called with, also in a run that goes on from a
    checkpoint. Nothing is gathered: a process holds the start of its own shards, beside them, or on the CPU where it
    has whole tensors; norms of whole tensors are sums over shards. A weight without a gradient does not train in this
    step, and is left alone. The logged `loss` does not contain the term, which is logged by itself, as of before the
    step and without its coefficient.

    Attributes:
        holds_start: whether theta0 is held; without it the function is one of theta.

    Args:
        trainer: UnlearnTrainer.
        name: as logged, `loss/<name>`.
        measure: function of objectives.parameters.
        coefficient: function that returns the term's weight at the present step; negative pushes away.
        flag: what the user typed to get it, for messages.
        needs_norms: whether the gradient depends on the norm of whole tensors.
    Raises:
        UserError: FSDP version 1, whose flat shards do not know their tensors.
    """

    holds_start = True

    def __init__(self, trainer, name, measure, coefficient, flag, needs_norms=True):
        super().__init__(trainer, flag)
        self.name, self.measure, self.coefficient, self.needs_norms = name, measure, coefficient, needs_norms

    def kept(self, part):
        """Return what this process holds of a part at the start, or None."""
        if not self.holds_start:
            return None
        held = local(part.tensor)
        if part.groups:
            return held.clone()
        return torch.empty_like(held, device="cpu", pin_memory=held.is_cuda).copy_(held)

    def before_step(self, optimizer):
        """Add to the gradients of what is about to be stepped."""
        coefficient, total = self.coefficient(), torch.zeros((), device=self.trainer.args.device)
        # torch's gradient scaler leaves the division by its scale to a fused optimizer.
        scale = getattr(optimizer, "grad_scale", None)
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is not None:
                    total += self._pull(self._parts[id(tensor)], coefficient, scale).to(total.device)
        self.trainer._log_term(self.name, total, standalone=False)

    def _pull(self, part, coefficient, scale):
        """Pull one tensor; returns this process's share of its values."""
        difference = _difference(part)
        squares = torch.stack([difference[piece.place].norm().square() for piece in part.pieces])
        squares = part.summed(squares) if self.needs_norms else squares
        sizes = torch.tensor([piece.size for piece in part.pieces], dtype=squares.dtype, device=squares.device)
        values, factors = self.measure(squares, sizes)
        factors = factors * coefficient if scale is None else factors * coefficient * scale.to(factors.device)
        gradient = local(part.tensor.grad)
        for piece, factor in zip(part.pieces, factors, strict=True):
            gradient[piece.place].add_((difference[piece.place] * factor).to(gradient.dtype))
        shares = self.trainer.args.world_size / (1 if self.needs_norms else part.num_shards)
        return values.sum() / shares


class PullToStart(ParameterPull):
    """L2-SP: the trained weights are held to where they started.

        P = coefficient * sum_k ||theta_k - theta0_k||^2

    Args:
        trainer: UnlearnTrainer.
        coefficient: function that returns the coefficient at the present step.
    Source: Li et al. 2018, arXiv:1802.01483; EleutherAI/unlearn (sequential unlearning, `l2sp_coef`). Differs from the
        authors' code, which clips the gradient of the term together with that of the loss.
    """

    def __init__(self, trainer, coefficient):
        super().__init__(trainer, "l2_sp", squared_distance, coefficient, "--regularizer l2_sp", needs_norms=False)


class PullToZero(ParameterPull):
    """L1: the trained weights are pulled to 0, all with the same force.

        P = coefficient * sum_k ||theta_k||_1

    Args:
        trainer: UnlearnTrainer.
        coefficient: function that returns the coefficient at the present step.
    Source: Jia et al. 2023, arXiv:2304.04934 (L1-sparse unlearning). Differs from the authors' code, which clips the
        gradient of the term together with that of the loss.
    """

    holds_start = False

    def __init__(self, trainer, coefficient):
        super().__init__(trainer, "l1", absolute_sum, coefficient, "--unlearn_method l1_sparse", needs_norms=False)

    def _pull(self, part, coefficient, scale):
        weights, gradient, total = local(part.tensor), local(part.tensor.grad), 0.0
        factor = coefficient if scale is None else coefficient * scale.to(gradient.device)
        for piece in part.pieces:
            value, signs = self.measure(weights[piece.place])
            gradient[piece.place].add_((signs * factor).to(gradient.dtype))
            total = total + value
        return total / (self.trainer.args.world_size / part.num_shards)


def _difference(part):
    """Return what a part holds minus what it held at the start."""
    held = local(part.tensor)
    return held - part.kept.to(held.device, non_blocking=True)
