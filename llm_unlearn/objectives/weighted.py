"""Ascent whose step on a token depends on how likely the token still is."""
# Shapes: B sequences, T tokens.

import torch


def weighted_ascent(logps, beta):
    """Ascent whose step on a token fades out as the token becomes unlikely.

        L_t = p_t^beta * log p_t,   p_t = p(x_t | x_<t), no gradient through the weight

    Plain ascent pushes hardest where nothing is left to push, because the gradient of log p by the true token's logit
    is 1 - p; here it is p^beta * (1 - p), which is largest at p = beta / (1 + beta).

    Args:
        logps: (B, T) log-probability of each token, nats; 0 where a token does not count.
        beta: exponent, >= 0; 0 is plain ascent.
    Returns:
        (B, T) one loss per token, nats, <= 0.
    Source: Wang et al. 2025, arXiv:2502.19301 (weighted gradient ascent). Differs from the authors' code: nothing.
    """
    return (beta * logps.detach()).exp() * logps


def saturation_importance(logps, beta1, beta2):
    """Ascent on tokens that are neither forgotten yet nor known so well that they hold the text up by themselves.

        L_t = p_t^beta1 * (1 - p_t)^beta2 * log p_t,   p_t = p(x_t | x_<t), no gradient through the weight

    The first factor is the saturation: small once a token is forgotten. The second is the importance: small on tokens
    that follow from the language alone.

    Args:
        logps: (B, T) log-probability of each token, nats; 0 where a token does not count.
        beta1: exponent of the probability, >= 0.
        beta2: exponent of its complement, >= 0; 0 is `weighted_ascent`.
    Returns:
        (B, T) one loss per token, nats, <= 0.
    Source: Yang et al. 2025, arXiv:2505.11953 (SatImp). Differs from the authors' code: nothing.
    """
    known = logps.detach()
    return (beta1 * known).exp() * (-torch.expm1(known)).pow(beta2) * logps
