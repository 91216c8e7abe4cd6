"""Objectives on hidden states: steering, rerouting, distance from the reference, rows at right angles to each other."""
# Shapes: B sequences, T tokens, D hidden size; a state is a vector of size D.

import torch
import torch.nn.functional as F


def steering(hidden, target):
    """Mean square distance of each state from the state that it is steered to.

        L_t = (1/D) * || h_t - c * u ||^2

    Args:
        hidden: (..., D).
        target: (..., D) that broadcasts against it: the control vector u of length 1 times the coefficient c, or times
            c * ||h0_t|| in the adaptive form; carries no gradient.
    Returns:
        (...) one loss per state, >= 0, in the unit of states squared.
    Source: Li et al. 2024, arXiv:2403.03218 (RMU), L_forget; the adaptive coefficient is of Dang et al. 2024,
        arXiv:2408.06223. Differs from the authors' code, whose mean takes in padding.
    """
    return (hidden - target.detach()).square().mean(-1)


def squared_distance(hidden, ref_hidden):
    """Mean square distance of each state from the reference's.

        L_t = (1/D) * || h_t - h0_t ||^2

    Args:
        hidden: (..., D).
        ref_hidden: (..., D) of the frozen reference; carries no gradient.
    Returns:
        (...) one loss per state, >= 0.
    Source: Li et al. 2024, arXiv:2403.03218 (RMU), L_retain.
    """
    return (hidden - ref_hidden.detach()).square().mean(-1)


def state_distance(hidden, ref_hidden):
    """Euclidean distance of each state from the reference's, not squared.

        L_t = sqrt(|| h_t - h0_t ||^2 + e^2) - e,   e = sqrt(machine epsilon) * || h0_t ||

    The norm itself has a gradient of length 1 however near the states are, and training begins where they differ by
    rounding alone: e keeps that from becoming the first step. Beyond it L is the norm.

    Args:
        hidden: (..., D).
        ref_hidden: (..., D) of the frozen reference; carries no gradient.
    Returns:
        (...) one loss per state, >= 0.
    Source: Zou et al. 2024, arXiv:2406.04313 (circuit breakers), the retain loss. Differs from the authors' code, whose
        mean counts masked positions as zeros, and which takes the norm itself.
    """
    ref_hidden = ref_hidden.detach()
    small = torch.linalg.vector_norm(ref_hidden, dim=-1, keepdim=True) * torch.finfo(hidden.dtype).eps ** 0.5
    longer = torch.cat([hidden - ref_hidden, small.to(hidden.dtype)], -1)
    return torch.linalg.vector_norm(longer, dim=-1) - small.squeeze(-1)


STATE_DISTANCES = {"l2": state_distance, "mse": squared_distance}
"""{retain term: how far a state is from the reference's}"""


def rerouting(hidden, ref_hidden):
    """Cosine of each state with the reference's, where it is positive: a state is rerouted once it is orthogonal.

        L_t = max(0, cos(h_t, h0_t))

    Args:
        hidden: (..., D).
        ref_hidden: (..., D) of the frozen reference; carries no gradient.
    Returns:
        (...) one loss per state, between 0 and 1.
    Source: Zou et al. 2024, arXiv:2406.04313 (circuit breakers), the rerouting loss.
    """
    return F.cosine_similarity(hidden, ref_hidden.detach(), dim=-1).relu()


def pooled_directions(hidden, mask, weights=None):
    """Direction of each sequence's mean state.

        u_i = p_i / (||p_i|| + 1e-8),   p_i = sum_t w_it * h_it / sum_t w_it

    Args:
        hidden: (B, T, D).
        mask: (B, T) bool, True where a token counts; a row without any has the direction 0.
        weights: (B, T) token weights, or None where all are 1.
    Returns:
        (B, D), of length 1 or 0.
    """
    counted = mask.to(hidden.dtype) if weights is None else (mask * weights).to(hidden.dtype)
    total = counted.sum(-1, keepdim=True)
    pooled = (counted.unsqueeze(-1) * hidden).sum(-2) / torch.where(total > 0, total, torch.ones_like(total))
    return pooled / (torch.linalg.vector_norm(pooled, dim=-1, keepdim=True) + 1e-8)


def pair_similarity(directions, others, is_pair):
    """Mean positive cosine of each sequence with the others of its batch, wherever these are.

        L_i = (1 / n_i) * sum_{j != i} max(0, u_i . u_j)

    The mean of L over all sequences is the mean over ordered pairs. Each pair stands in it twice, once for either
    sequence, and the other's part of the gradient is taken here: it is the same number, so that L_i is doubled where
    only u_i carries a gradient. No collective has to carry one.

    Args:
        directions: (B, D) of this process's sequences, with gradient.
        others: (M, D) of all processes' sequences; carries no gradient.
        is_pair: (B, M) bool, False where both are the same sequence, or one of them is a filler.
    Returns:
        (B,) between 0 and 1; 0 for a sequence without a pair.
    Source: EleutherAI/unlearn (orthogonal circuit breakers). Differs from the authors' code, which pairs sequences of
        one process alone, so that one sequence on each has no pair and the term is 0 without a word.
    """
    cosines = (directions @ others.detach().T).relu().masked_fill(~is_pair, 0.0)
    means = cosines.sum(-1) / is_pair.sum(-1).clamp(min=1)
    return 2 * means - means.detach()
