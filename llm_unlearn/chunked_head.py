"""Log-probabilities and what else is read off the logits of tokens, without ever holding the logits of all."""
# Shapes: N positions, D hidden size, V vocabulary, C positions of a chunk.

from dataclasses import dataclass, replace

import torch
from torch.autograd.function import once_differentiable

from llm_unlearn.head import wide_dtype
from llm_unlearn.objectives.entropy import uniform_cross_entropy
from llm_unlearn.projection import Projection, compute_dtype

_CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}


def chunk_rows(vocabulary, device):
    """Return how many positions' logits are held at once: 32 MiB of float32 on a CPU, 256 MiB on an accelerator.

    Args:
        vocabulary: V.
        device: torch.device.
    """
    elements = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"])
    return max(1, elements // max(vocabulary, 1))


def token_scores(
    hidden, projection, labels, reference=None, entropy=False, linear=None, uniform=False, top_k=None, draw=None
):
    """Score tokens under the distributions that a head makes of hidden states, chunk by chunk.

        logps_n   = log p_n(y_n)
        kl_n      = sum_v r_n(v) * (log r_n(v) - log p_n(v))        where a reference is given
        entropy_n = -sum_v p_n(v) * log p_n(v)                      where asked for
        uniform_n = -(1/V) * sum_v log p_n(v)                       where asked for

    Gradients flow to `hidden`, `projection.weight` and its bias; logits are made anew, chunk by chunk, in the backward.

    Args:
        hidden: (N, D) hidden states before the head.
        projection: Projection of the policy.
        labels: (N,) int64.
        reference: (hidden (N, D), Projection) of the frozen reference, without gradients, or None.
        entropy: whether to return the entropy.
        linear: (N,) token weights w if the loss will be c * sum_n w_n * v_n for one number c, where v is `uniform` if
            asked for, else `kl` if there is a reference, else `logps`: the gradient is then taken in the forward, which
            saves making the logits twice. Where the loss turns out otherwise, they are made again, and the gradient is
            right as well.
        uniform: whether to return the cross-entropy of the uniform distribution under p.
        top_k: read `uniform` off the k largest logits alone, as if there were no others; None takes all V.
        draw: function of (logits (C, V), the slice of positions that they are of) that returns (C,) labels, which are
            written into `labels`; with `linear`, a projection without softcap, and nothing else asked for.
    Returns:
        (K, N) float32 at least, nats: logps, then kl, entropy and uniform, as far as asked for.
    Source: chunked heads as in torchtune and Liger-Kernel, Hsu et al. 2024, arXiv:2410.10989.
    """
    ref_hidden, ref_projection = reference or (None, None)
    dtype = compute_dtype(hidden, projection.weight)
    settings = _Settings(projection, ref_projection, entropy, uniform, top_k, dtype, draw)
    assert draw is None or (settings.is_plain() and linear is not None)
    with torch.autocast(hidden.device.type, enabled=False):
        return _TokenScores.apply(hidden, projection.weight, projection.bias, labels, ref_hidden, linear, settings)


@dataclass(frozen=True)
class _Settings:
    projection: Projection
    reference: Projection | None
    entropy: bool
    uniform: bool
    top_k: int | None
    dtype: torch.dtype
    draw: object = None

    def kinds(self):
        """Return the names of the values that are asked for, row by row."""
        wanted = {"logp": True, "kl": self.reference is not None, "entropy": self.entropy, "uniform": self.uniform}
        return [kind for kind, is_wanted in wanted.items() if is_wanted]

    def linear_kind(self):
        """Return which of them `linear` speaks of."""
        return "uniform" if self.uniform else "kl" if self.reference is not None else "logp"

    def is_plain(self):
        """Return whether log-probabilities alone are asked for, of logits whose gradient needs no second look."""
        return self.kinds() == ["logp"] and not self.projection.softcap


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
                if settings.draw is not None:
                    labels[part] = settings.draw(logits, part)
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
                grads.add(part, chunk.backward(**{settings.linear_kind(): linear[part]}), hidden[part], compute)
            # Otherwise it lives on while the next one is made.
            del chunk
        wide = torch.promote_types(settings.dtype, torch.float32)
        values = torch.cat(found, 1) if found else hidden.new_zeros(len(settings.kinds()), 0, dtype=wide)
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
        kinds = ctx.settings.kinds()
        if units is not None:
            factor = _common_factor(grad, kinds.index(ctx.settings.linear_kind()), linear)
            if factor is not None:
                return *units.scaled(factor), None, None, None, None
            del units
        grads = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        compute = _narrowed(ctx.settings, weight, bias)
        buffer = _buffer(compute, len(hidden))
        for part in _chunks(len(hidden), ctx.settings):
            chunk = _Chunk(
                compute, hidden[part], labels[part], None if ref_hidden is None else ref_hidden[part],
                normalizers[:, part], buffer,
            )  # fmt: skip
            given = dict(zip(kinds, grad[:, part], strict=True))
            grads.add(part, chunk.backward(**given), hidden[part], compute)
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
        if self.settings.uniform:
            rows.append(self._uniform())
        return torch.stack(rows)

    def _uniform(self):
        if self.settings.top_k is None:
            return -self.logps.mean(-1)
        return uniform_cross_entropy(self.logps, self.settings.top_k)

    def normalizers(self):
        """Return (2, C): the logarithm of the normalizer and the entropy (0 where not asked for)."""
        entropy = torch.zeros_like(self.lse) if self.own_entropy is None else self.own_entropy
        return torch.cat([self.lse, entropy], -1).T

    def backward(self, logp=None, kl=None, entropy=None, uniform=None):
        """Return the gradient of the head's product for gradients (C,) of each value; uses the chunk up.

        Returns:
            ((C, V), (C, 1) factors of its rows or None).
        """
        projection = self.settings.projection
        logits = self.logps + self.lse if projection.softcap else None
        given = [value for value in (logp, kl, uniform) if value is not None]
        if entropy is not None or len(given) != 1:
            return projection.finish_backward(self._mixed(logp, kl, entropy, uniform), logits), None
        # One value alone: its gradient scales rows, which is cheaper done to what the rows are multiplied with.
        if uniform is not None:
            grad = self._uniform_gradient()
        elif kl is not None:
            grad = self.logps.exp_().sub_(self.ref_probs)
        else:
            grad = self.logps.exp_()
            grad.scatter_add_(-1, self.labels, grad.new_full(self.labels.shape, -1.0))
        return projection.finish_backward(grad, logits), (given[0] if logp is None else -logp).unsqueeze(-1)

    def _mixed(self, logp, kl, entropy, uniform):
        zero = torch.zeros_like(self.lse)
        logp, kl, flat = (zero if value is None else value.unsqueeze(-1) for value in (logp, kl, uniform))
        top = None if uniform is None or self.settings.top_k is None else self._uniform_gradient().mul_(flat)
        spread = 0.0 if entropy is None else (self.logps + self.own_entropy).mul_(-entropy.unsqueeze(-1))
        grad = self.logps.exp_().mul_(spread + (kl - logp + (flat if top is None else zero)))
        grad.scatter_add_(-1, self.labels, logp.to(grad.dtype))
        if self.ref_probs is not None:
            grad = grad.addcmul_(self.ref_probs, kl.to(grad.dtype), value=-1)
        if uniform is None:
            return grad
        return grad.sub_(flat / grad.shape[-1]) if top is None else grad.add_(top)

    def _uniform_gradient(self):
        """Return (C, V): p - 1/V, or q - 1/k at the k largest logits with q their own softmax, and 0 elsewhere."""
        if self.settings.top_k is None:
            return self.logps.exp_().sub_(1 / self.logps.shape[-1])
        largest, places = self.logps.topk(self.settings.top_k, -1)
        return torch.zeros_like(self.logps).scatter_(-1, places, largest.softmax(-1) - 1 / self.settings.top_k)


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
    return replace(settings, projection=projection, reference=cast(settings.reference, None, None))


def _wide(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)
