"""How a head makes logits of hidden states, and in which dtype."""
# Shapes: D hidden size, V vocabulary, C positions of a chunk.

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Projection:
    """How hidden states become logits: logits = softcap * tanh(scale * (hidden W^T + b) / softcap).

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        scale: factor on the logits, as Cohere's and Granite's models have it.
        softcap: bound of the logits, as Gemma 2 has it, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden, dtype, out=None):
        """Return (C, V) logits in float32 at least of (C, D) hidden states multiplied in `dtype`, in `out` if given."""
        if out is not None and self.bias is None:
            return self.finish(torch.mm(hidden.to(dtype), self.weight.T, out=out[: len(hidden)]))
        bias = None if self.bias is None else self.bias.to(dtype)
        if hidden.device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
            # Sums are float32 inside the product: here they leave it so, and are not rounded to 8 bits first.
            wide = torch.mm(hidden.to(dtype), self.weight.to(dtype).T, out_dtype=torch.float32)
            return self.finish(wide if bias is None else wide.add_(bias))
        raw = torch.nn.functional.linear(hidden.to(dtype), self.weight.to(dtype), bias)
        return self.finish(raw.to(torch.promote_types(dtype, torch.float32)))

    def finish(self, logits):
        """Apply scale and softcap, in place."""
        if self.scale != 1:
            logits = logits.mul_(self.scale)
        if self.softcap:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def finish_backward(self, grad, logits):
        """Turn the gradient of finished logits into that of the product, in place."""
        if self.softcap:
            grad = grad.mul_(1 - (logits / self.softcap).square_())
        return grad.mul_(self.scale) if self.scale != 1 else grad


def compute_dtype(hidden, weight):
    """Return the dtype that the head's product runs in: autocast's where it is on, else the operands'."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)
