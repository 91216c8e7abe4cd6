"""Preference objectives: bounded ascent on forget sequences, alone or against answers that are preferred to them."""
# Shapes: B sequences.

import torch.nn.functional as F

from llm_unlearn.errors import UserError


def npo(logps, ref_logps, beta):
    """Negative preference optimization loss over forget sequences.

        L_i = -(2/beta) * log sigmoid(-beta * (logps_i - ref_logps_i))

    The gradient is gradient ascent weighted by 2*sigmoid(beta * (logps - ref_logps)): 1 at the start, fading to 0 as a
    sequence becomes less likely than under the reference; as beta -> 0 the weight stays 1.

    Args:
        logps: (B,) summed log-probability of each sequence under the model, nats.
        ref_logps: (B,) the same under the frozen reference; carries no gradient.
        beta: inverse temperature, > 0.
    Returns:
        (B,) one loss per sequence, >= 0; the trainer averages over the global batch.
    Raises:
        ValueError: if beta <= 0.
    Source: Zhang et al. 2024, arXiv:2404.05868, Eq. 3. Differs from the authors' code: nothing.
    """
    _require_positive(beta)
    return -(2 / beta) * F.logsigmoid(-beta * (logps - ref_logps.detach()))


def simnpo(mean_logps, beta, delta):
    """Simple negative preference optimization: NPO without a reference, normalized by length.

        L_i = -(2/beta) * log sigmoid(-beta * (mean_logps_i + delta))

    Args:
        mean_logps: (B,) log-probability of each sequence divided by its number of counted tokens, nats per token.
        beta: inverse temperature, > 0.
        delta: margin in nats per token, >= 0; it stands inside beta, as in the reference implementations, so it
            corresponds to gamma = beta * delta in the paper.
    Returns:
        (B,) one loss per sequence, >= 0; the trainer averages over the global batch.
    Raises:
        ValueError: if beta <= 0.
    Source: Fan et al. 2024, arXiv:2410.07163, Eq. 4.
    """
    _require_positive(beta)
    return -(2 / beta) * F.logsigmoid(-beta * (mean_logps + delta))


def dpo(logps, ref_logps, preferred_logps, ref_preferred_logps, beta):
    """Direct preference optimization loss: one answer is to become likelier in comparison with another.

        L_i = -(2/beta) * log sigmoid(beta * (m(w_i) - m(l_i))),   m(y) = log p(y) - log r(y)

    w is the answer that is preferred, l the one to forget. The gradient is descent on w and ascent on l, both weighted
    by 2*sigmoid(beta * (m(l) - m(w))): 1 at the start, fading to 0 as w gains on l.

    Args:
        logps: (B,) summed log-probability of each sequence to forget under the model, nats.
        ref_logps: (B,) the same under the frozen reference; carries no gradient.
        preferred_logps: (B,) summed log-probability of the preferred answers under the model, nats.
        ref_preferred_logps: (B,) the same under the frozen reference; carries no gradient.
        beta: inverse temperature, > 0.
    Returns:
        (B,) one loss per pair, >= 0; the trainer averages over the global batch.
    Raises:
        UserError: if beta <= 0.
    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7, times 2/beta as `npo`, of which it is the limit without w:
        Zhang et al. 2024, arXiv:2404.05868.
    """
    _require_positive(beta)
    margin = (preferred_logps - ref_preferred_logps.detach()) - (logps - ref_logps.detach())
    return -(2 / beta) * F.logsigmoid(beta * margin)


def _require_positive(beta):
    if not beta > 0:
        raise UserError(f"beta must be > 0, but is {beta}")
