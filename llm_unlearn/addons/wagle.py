"""Scores of how much a weight matters for what is to be forgotten: WAGLE's and those that it is compared with."""
# Shapes: E elements of one parameter.

import hashlib

import torch

_CHUNK = 2**20


def wagle(weights, forget, retain, gamma):
    """Weight attribution: what a weight's removal does to the forget loss where the retain loss is kept at its least.

        S_i = |(theta_i - g_r,i / gamma) * g_f,i|

    From the bi-level problem with the diagonal Hessian gamma * I of the retain loss. As gamma grows the score becomes
    that of `snip`; as it shrinks, |g_r * g_f| / gamma, which does not depend on the weight.

    Args:
        weights: (E,) theta.
        forget: (E,) g_f, gradient of the mean loss per token of the forget set.
        retain: (E,) g_r, the same of the retain set.
        gamma: > 0.
    Returns:
        (E,) float32, not negative.
    Source: Jia et al. 2024, arXiv:2410.17509. Differs from the authors' code: gradients are means over the tokens of a
        set and in float32, theirs are sums over batches in the weights' precision, so that their 1e-6 (`mu`) is divided
        by the number of batches here; each retain row is read once, not one drawn anew for each forget row.
    """
    return ((weights.double() - retain.double() / gamma) * forget.double()).abs().float()


def snip(weights, forget):
    """Sensitivity of the forget loss to a weight's removal: |theta_i * g_f,i|, (E,) float32.

    Source: Lee et al. 2019, arXiv:1810.02340.
    """
    return (weights.double() * forget.double()).abs().float()


def random_scores(name, count, seed):
    """Return (count,) float32 in [0, 1), drawn by the seed and the name of the parameter."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.rand(count, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))


@torch.no_grad()
def scores_of(kind, weights, forget=None, retain=None, gamma=None):
    """Return the scores of one parameter, or of a share of it, some elements at a time.

    Args:
        kind: wagle, snip, grad_norm or magnitude.
        weights: (E,).
        forget: (E,) float32 gradient, overwritten by the scores; None for magnitude.
        retain: (E,) float32 gradient, of wagle alone.
        gamma: of wagle.
    Returns:
        (E,) float32, not negative, on the device of the weights.
    """
    if kind == "magnitude":
        return weights.abs().float()
    found = forget.to(weights.device)
    if kind == "grad_norm":
        return found.abs_()
    for first in range(0, len(found), _CHUNK):
        part = slice(first, first + _CHUNK)
        if kind == "wagle":
            found[part] = wagle(weights[part], found[part], retain[part], gamma)
        else:
            found[part] = snip(weights[part], found[part])
    return found
