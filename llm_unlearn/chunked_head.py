"""Log-probabilities, divergence and entropy of tokens from hidden states, without ever holding the logits of all."""
# Shapes: N positions, D hidden size, V vocabulary, C positions of a chunk.

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from llm_unlearn.head import wide_dtype

_CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}


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


def chunk_rows(vocabulary, device):
    """Return how many positions' logits are held at once: 32 MiB of float32 on a CPU, 256 MiB on an accelerator.

    Args:
        vocabulary: V.
        device: torch.device.
    """
    elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"])
    return max(1, elements // max(vocabulary, 1))


def token_scores(hidden, projection, labels, reference=None, entropy=False, linear=None):
    """Score tokens under the distributions that a head makes of hidden states, chunk by chunk.

        logps_n   = log p_n(y_n)
        kl_n      = sum_v r_n(v) * (log r_n(v) - log p_n(v))        where a reference is given
        entropy_n = -sum_v p_n(v) * log p_n(v)                      where asked for

    Gradients flow to `hidden`, `projection.weight` and its bias; logits are made anew, chunk by chunk, in the backward.

    Args:
        hidden: (N, D) hidden states before the head.
        projection: Projection of the policy.
        labels: (N,) int64.
        reference: (hidden (N, D), Projection) of the frozen reference, without gradients, or None.
        entropy: whether to return the entropy.
        linear: (N,) token weights w if the loss will be c * sum_n w_n * logps_n, or with a reference
            c * sum_n w_n * kl_n, for one number c: the gradient is then taken in the forward, which saves making the
            logits twice. Where the loss turns out otherwise, they are made again, and the gradient is right as well.
    Returns:
        (K, N) float32 at least, nats: logps, then kl, then entropy, as far as asked for.
    Source: chunked heads as in torchtune and Liger-Kernel, Hsu et al. 2024, arXiv:2410.10989.
    """
    ref_hidden, ref_projection = reference or (None, None)
    settings = _Settings(projection, ref_projection, entropy, compute_dtype(hidden, projection.weight))
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenScores.apply(hidden, projection.weight, projection.bias, labels, ref_hidden, linear, settings)


@dataclass(frozen=True)
class _Settings:
    projection: Projection
    reference: Projection | None
    entropy: bool
    dtype: torch.dtype

    def is_plain(self):
        """Return whether log-probabilities alone are asked for, of logits whose gradient needs no second look."""
        return self.reference is None and not self.entropy and not self.projection.softcap


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, ref_hidden, linear, settings):
        ctx.settings, ctx.units = settings, None
        takes_units = linear is not None and any(ctx.needs_input_grad[:3])
        grads = _Gradients(hidden, weight, bias, ctx.needs_input_grad) if takes_units else None
        compute = _narrowed(settings)
        buffer, is_plain = _buffer(compute, len(hidden)), settings.is_plain()
        found, normalizers = [], []
        for part in _chunks(len(hidden), settings):
            if is_plain:
                logits = compute.projection.logits(hidden[part], compute.dtype, buffer)
                values, lse, sums = _exponentiate(logits, labels[part])
                found.append(values)
                normalizers.append(torch.cat([lse, torch.zeros_like(lse)], -1).T)
                if grads is not None:
                    logits.scatter_add_(-1, labels[part].unsqueeze(-1), -sums)
                    grad = compute.projection.finish_backward(logits, None)
                    grads.add(part, (grad, -linear[part].unsqueeze(-1) / sums), hidden[part], compute)
                continue
            chunk = _Chunk(compute, hidden[part], labels[part], None if ref_hidden is None else ref_hidden[part])
            found.append(chunk.values())
            normalizers.append(chunk.normalizers())
            if grads is not None:
                kind = 0 if ref_hidden is None else 1
                unit = [None, None, None]
                unit[kind] = linear[part]
                grads.add(part, chunk.backward(*unit), hidden[part], compute)
            # Otherwise it lives on while the next one is made.
            del chunk
        rows = 1 + (ref_hidden is not None) + settings.entropy
        wide = torch.promote_types(settings.dtype, torch.float32)
        values = torch.cat(found, 1) if found else hidden.new_zeros(rows, 0, dtype=wide)
        if any(ctx.needs_input_grad[:3]):
            ctx.units = grads
            normalizers = torch.cat(normalizers, 1) if normalizers else values.new_zeros(2, 0)
            ctx.save_for_backward(hidden, weight, bias, labels, ref_hidden, linear, normalizers)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, labels, ref_hidden, linear, normalizers = ctx.saved_tensors
        units, ctx.units = ctx.units, None
        if units is not None:
            factor = _common_factor(grad, 0 if ref_hidden is None else 1, linear)
            if factor is not None:
                return *units.scaled(factor), None, None, None, None
            del units
        kinds = [grad[0], None, None]
        kinds[1] = grad[1] if ref_hidden is not None else None
        kinds[2] = grad[-1] if ctx.settings.entropy else None
        grads = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        compute = _narrowed(ctx.settings, weight, bias)
        buffer = _buffer(compute, len(hidden))
        for part in _chunks(len(hidden), ctx.settings):
            chunk = _Chunk(
                compute, hidden[part], labels[part], None if ref_hidden is None else ref_hidden[part],
                normalizers[:, part], buffer,
            )  # fmt: skip
            given = [None if kind is None else kind[part] for kind in kinds]
            grads.add(part, chunk.backward(*given), hidden[part], compute)
            del chunk
        return *grads.scaled(1.0), None, None, None, None


def _exponentiate(logits, labels):
    """Turn logits (C, V) into exp(logits - their largest), in place, in the fewest passes over them.

    Returns:
        ((1, C) log-probabilities of the labels, (C, 1) logarithms of the normalizers, (C, 1) sums of what is left).
    """
    label_logits, largest = logits.gather(-1, labels.unsqueeze(-1)), logits.amax(-1, keepdim=True)
    sums = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    lse = largest + sums.log()
    return (label_logits - lse).T, lse, sums


class _Chunk:
    """The log-probabilities of some positions over the vocabulary, and what is read off them."""

    def __init__(self, settings, hidden, labels, ref_hidden, normalizers=None, buffer=None):
        self.settings, self.labels = settings, labels.unsqueeze(-1)
        logits = settings.projection.logits(hidden, settings.dtype, buffer)
        if normalizers is None:
            self.logps = logits.log_softmax(-1)
            self.lse = logits.gather(-1, self.labels) - self.logps.gather(-1, self.labels)
            self.own_entropy = None
        else:
            self.lse, self.own_entropy = normalizers[0].unsqueeze(-1), normalizers[1].unsqueeze(-1)
            self.logps = logits.sub_(self.lse)
        self.ref_probs = None
        if ref_hidden is not None:
            self.ref_logps = settings.reference.logits(ref_hidden, settings.dtype).log_softmax(-1)
            self.ref_probs = self.ref_logps.exp()

    def values(self):
        """Return the (K, C) rows of `token_scores`."""
        rows = [self.logps.gather(-1, self.labels).squeeze(-1)]
        if self.ref_probs is not None:
            # Where both models are equal each difference is exactly 0, and so is the divergence.
            rows.append(_row_products(self.ref_probs, self.ref_logps.sub_(self.logps)))
        if self.settings.entropy:
            found = -_row_products(self.logps.exp(), self.logps)
            self.own_entropy = found.unsqueeze(-1)
            rows.append(found)
        return torch.stack(rows)

    def normalizers(self):
        """Return (2, C): the logarithm of the normalizer and the entropy (0 where not asked for)."""
        entropy = torch.zeros_like(self.lse) if self.own_entropy is None else self.own_entropy
        return torch.cat([self.lse, entropy], -1).T

    def backward(self, logp, kl, entropy):
        """Return the gradient of the head's product for gradients (C,) of each value; uses the chunk up.

        Returns:
            ((C, V), (C, 1) factors of its rows or None).
        """
        projection = self.settings.projection
        logits = self.logps + self.lse if projection.softcap else None
        if entropy is None and (logp is None) != (kl is None):
            # One value alone: its gradient scales rows, which is cheaper done to what the rows are multiplied with.
            grad = self.logps.exp_()
            if kl is None:
                grad.scatter_add_(-1, self.labels, grad.new_full(self.labels.shape, -1.0))
            else:
                grad.sub_(self.ref_probs)
            return projection.finish_backward(grad, logits), (kl if logp is None else -logp).unsqueeze(-1)
        return projection.finish_backward(self._mixed(logp, kl, entropy), logits), None

    def _mixed(self, logp, kl, entropy):
        logp = torch.zeros_like(self.lse) if logp is None else logp.unsqueeze(-1)
        kl = torch.zeros_like(self.lse) if kl is None else kl.unsqueeze(-1)
        spread = 0.0 if entropy is None else (self.logps + self.own_entropy).mul_(-entropy.unsqueeze(-1))
        grad = self.logps.exp_().mul_(spread + (kl - logp))
        grad.scatter_add_(-1, self.labels, logp.to(grad.dtype))
        return grad if self.ref_probs is None else grad.addcmul_(self.ref_probs, kl.to(grad.dtype), value=-1)


def _row_products(first, second):
    """Return the (C,) inner products of the rows of two (C, V) tensors."""
    if first.device.type != "cpu":  # where a product of matrices may run in TF32
        return (first * second).sum(-1)
    return torch.bmm(first.unsqueeze(1), second.unsqueeze(2)).reshape(-1)


class _Gradients:
    """Gradients of hidden states, weight and bias, gathered chunk by chunk."""

    def __init__(self, hidden, weight, bias, needed):
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = weight.new_zeros(weight.shape, dtype=_wide(weight)) if needed[1] else None
        self.bias = bias.new_zeros(bias.shape, dtype=_wide(bias)) if bias is not None and needed[2] else None
        self.dtypes = weight.dtype, None if bias is None else bias.dtype

    def add(self, part, grad, hidden, settings):
        """Add the gradient of a chunk's product, (C, V) with the factors (C, 1) of its rows."""
        grad, factors = grad
        one = grad.new_ones(len(grad), 1) if factors is None else factors.to(grad.dtype)
        if self.bias is not None:
            self.bias += (grad.T @ one).squeeze(-1)
        grad = grad.to(settings.dtype)
        if self.hidden is not None:
            found = grad @ settings.projection.weight
            self.hidden[part] = found if factors is None else found.to(one.dtype).mul_(one)
        if self.weight is None:
            return
        hidden = hidden.to(settings.dtype) if factors is None else (hidden * one).to(settings.dtype)
        if self.weight.dtype == settings.dtype:
            self.weight.addmm_(grad.T, hidden)
        else:
            self.weight += grad.T @ hidden

    def scaled(self, factor):
        """Return (hidden, weight, bias) gradients times a number; they are not to be used again."""
        parts = (self.hidden, self.weight, self.bias)
        if factor != 1:
            parts = [None if part is None else part.mul_(factor) for part in parts]
        hidden, weight, bias = parts
        return (
            hidden,
            None if weight is None else weight.to(self.dtypes[0]),
            None if bias is None else bias.to(self.dtypes[1]),
        )


def _common_factor(grad, kind, linear):
    """Return c where the gradient of one kind is c times the token weights, and every other is 0; else None."""
    others = [row for number, row in enumerate(grad) if number != kind]
    dtype = wide_dtype(grad.device)
    wide, weights = grad[kind].to(dtype), linear.to(dtype)
    square = (weights * weights).sum()
    factor = (wide * weights).sum() / square.clamp(min=torch.finfo(dtype).tiny)
    largest = wide.abs().amax() if len(wide) else square
    misses = (wide - factor * weights).abs().amax() if len(wide) else square
    fits = misses <= 1e-6 * largest
    for row in others:
        fits = fits & (row == 0).all()
    # A Python number: as a tensor it would be rounded to the dtype of what it scales.
    return float(factor) if bool(fits) else None


def _buffer(settings, count):
    """Return memory for one chunk's product after the other, which is not faulted in again; None where it cannot be."""
    is_reusable = settings.projection.weight.device.type == "cpu" and settings.dtype in (torch.float32, torch.float64)
    if not is_reusable or settings.projection.bias is not None or not count:
        return None
    vocabulary = len(settings.projection.weight)
    rows = min(chunk_rows(vocabulary, settings.projection.weight.device), count)
    return settings.projection.weight.new_empty(rows, vocabulary)


def _chunks(count, settings):
    rows = chunk_rows(len(settings.projection.weight), settings.projection.weight.device)
    return [slice(first, min(first + rows, count)) for first in range(0, count, rows)]


def _narrowed(settings, weight=None, bias=None):
    """Return the settings with weights cast to the compute dtype, once for all chunks."""

    def cast(projection, weight, bias):
        if projection is None:
            return None
        weight = (projection.weight if weight is None else weight).detach().to(settings.dtype)
        bias = projection.bias if bias is None else bias
        return Projection(weight, None if bias is None else bias.detach(), projection.scale, projection.softcap)

    projection = cast(settings.projection, weight, bias)
    return _Settings(projection, cast(settings.reference, None, None), settings.entropy, settings.dtype)


def compute_dtype(hidden, weight):
    """Return the dtype that the head's product runs in: autocast's where it is on, else the operands'."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _wide(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)
