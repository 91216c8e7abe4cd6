"""Likelihood objectives: ascent, descent, and divergence from a reference."""
# Shapes: B sequences, T tokens, V vocabulary, N counted positions.

import torch


def nll(logps):
    """Negative log-likelihood of each token: gradient descent.

        L_t = -log p(x_t | x_<t)

    Args:
        logps: (B, T) log-probability of each token, nats; 0 where a token does not count.
    Returns:
        (B, T) one loss per token, nats, >= 0; 0 where a token does not count.
    Source: the standard language-model objective.
    """
    return -logps


def ascent(logps):
    """Log-likelihood as a loss, so that descending it ascends the negative log-likelihood.

        L_t = +log p(x_t | x_<t)

    Unbounded below: nothing stops the ascent but the learning rate and the number of steps.

    Args:
        logps: (B, T) log-probability of each token, nats; 0 where a token does not count.
    Returns:
        (B, T) one loss per token, nats, <= 0.
    Source: Yao et al. 2024, arXiv:2402.15159 (gradient ascent); Jang et al. 2022, arXiv:2210.01504.
    """
    return logps


def sequence_mean_nll(logps, mask, weights=None):
    """Mean negative log-likelihood of each sequence, so that long and short sequences weigh the same.

        L_i = -(1 / n_i) * sum_t m_it * log p(x_it | x_i,<t),   n_i = sum_t m_it

    Args:
        logps: (B, T) log-probability of each token, nats; 0 where a token does not count.
        mask: (B, T) bool, True where a token counts. A row without any (a filler row) gives 0, never NaN.
        weights: (B, T) token weights, or None where all are 1.
    Returns:
        (B,) one loss per sequence, nats, >= 0.
    Source: Yao et al. 2024, arXiv:2402.15159, the published trainer of GA + descent.
    """
    if weights is None:
        return -logps.sum(-1) / mask.sum(-1).clamp(min=1)
    total = (mask * weights).sum(-1)
    return -(logps * weights).sum(-1) / torch.where(total > 0, total, torch.ones_like(total))


def kl_divergence(logits, ref_logits):
    """Kullback-Leibler divergence from the reference's next-token distribution to the model's.

        L_n = KL(r || p) = sum_v r(v) * (log r(v) - log p(v))

    Args:
        logits: (N, V) the model's logits at the counted positions.
        ref_logits: (N, V) the reference's logits at the same positions; carries no gradient.
    Returns:
        (N,) nats, >= 0; exactly 0 where both are equal.
    Source: Yao et al. 2024, arXiv:2402.15159 (GA + KL). Differs from the authors' code, whose value is the
        cross-entropy with log(p + 1e-12), averaged over padding too: the gradient is the same where tokens count,
        the value is not.
    """
    logps = _log_softmax(logits)
    ref_logps = _log_softmax(ref_logits.detach())
    return torch.nn.functional.kl_div(logps, ref_logps, reduction="none", log_target=True).sum(-1)


def token_logps(logits, labels):
    """Log-probability of each label under the logits, in float32 at least.

    Args:
        logits: (N, V).
        labels: (N,) int64 in [0, V).
    Returns:
        (N,) nats.
    """
    return _log_softmax(logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def token_entropy(logits):
    """Entropy of each predicted distribution, in float32 at least.

        H_n = -sum_v p(v) * log p(v)

    Args:
        logits: (N, V).
    Returns:
        (N,) nats, between 0 and log V.
    """
    logps = _log_softmax(logits)
    return -(logps.exp() * logps).sum(-1)


def _log_softmax(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
