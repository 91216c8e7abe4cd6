"""Keeping the gradients of two streams apart, and combining them where they pull the same way."""

import contextlib

import torch
from accelerate.utils import DistributedType

from llm_unlearn.errors import UserError


def same_sign(retain, forget, asymmetric=False):
    """Combine the gradients of two terms, leaving out the elements in which they pull against each other.

        g_i = r_i + f_i   where r_i * f_i > 0
        g_i = 0           elsewhere; with `asymmetric` r_i, so that the forget term alone gives way

    Args:
        retain: r, gradient of the weighed retain term.
        forget: f, gradient of the weighed forget term, of the same shape.
        asymmetric: filter the forget gradient only.
    Returns:
        tensor of that shape.
    Source: EleutherAI/unlearn (sequential unlearning, `same_sign_grads` and `asymmetric_filter`). Differs from the
        authors' code, which filters what one process saw.
    """
    # The product of two small gradients would underflow.
    agree = torch.sign(retain) * torch.sign(forget) > 0
    zero = torch.zeros_like(forget)
    return retain + torch.where(agree, forget, zero) if asymmetric else torch.where(agree, retain + forget, zero)


class GradientFilter:
    """Gives each stream a backward and gradients of its own, and the optimizer what `same_sign` makes of them.

    What a regularizer's own stream says is added as it is.

    A stream's gradient is that of the whole optimizer step, of all micro-batches on all processes, before it meets the
    other's: so accumulation and the number of processes change nothing. It takes the memory of the trained weights
    twice. FSDP2 reduces after every backward, because it keeps what is not reduced out of reach; DDP twice a step.

    Args:
        trainer: StreamTrainer with a model that trains.
        asymmetric: see `same_sign`.
    Raises:
        UserError: a backend that does not let gradients be taken away between two backwards.
    """

    def __init__(self, trainer, asymmetric):
        self.trainer, self.asymmetric, self._held = trainer, asymmetric, {}
        kind = trainer.accelerator.distributed_type
        if kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and not trainer.is_fsdp2()):
            name = "DeepSpeed" if kind == DistributedType.DEEPSPEED else "FSDP version 1"
            raise UserError(
                f"--same_sign_grads and --asymmetric_filter need each term's own gradient, which {name} does not hand "
                "out; pass --fsdp True without a version, or leave the filter out"
            )

    @contextlib.contextmanager
    def turn_of(self, stream, model):
        """Let the backward inside add to a stream's own gradients, those of its earlier micro-batches.

        Args:
            stream: name.
            model: the wrapped model.
        """
        parameters = [p for p in model.parameters() if p.requires_grad]
        held = self._held.pop(stream, {})
        for parameter in parameters:
            parameter.grad = held.get(parameter)
        if self.trainer.is_fsdp2():
            model.set_requires_gradient_sync(True)
        yield
        self._held[stream] = {p: p.grad for p in parameters if p.grad is not None}
        for parameter in parameters:
            parameter.grad = None

    def combine(self):
        """Hand the step's gradients, combined, to the optimizer, after the last micro-batch's last backward."""
        retain, forget = (self._held.pop(name, {}) for name in ("retain", "forget"))
        others, self._held = list(self._held.values()), {}
        for parameter in retain.keys() | forget.keys():
            own, other = retain.pop(parameter, None), forget.pop(parameter, None)
            own = torch.zeros_like(other) if own is None else own
            other = torch.zeros_like(own) if other is None else other
            parameter.grad = same_sign(own, other, self.asymmetric)
        for parameter, gradient in (pair for held in others for pair in held.items()):
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
