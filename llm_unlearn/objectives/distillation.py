"""Objectives on whole next-token distributions: targets made of the reference's or of the model's own."""
# Shapes: N positions, V vocabulary.

import torch

from llm_unlearn.objectives.likelihood import kl_divergence


def adjusted_self_distillation(logits, labels, ref_logits, beta):
    """Divergence from the reference's distribution after the true token was made less likely there.

        L_n = KL(q_n || p_n),   q_n = softmax(z0_n - beta * onehot(y_n))

    z0 are the reference's logits. The gradient by the logits is p - q: bounded, and 0 once the model says q.

    Args:
        logits: (N, V) the model's.
        labels: (N,) int64, the true tokens.
        ref_logits: (N, V) the reference's; carries no gradient.
        beta: by how much the true token's logit is lowered, > 0.
    Returns:
        (N,) nats, >= 0.
    Source: Dong et al. 2024, arXiv:2402.10052 (UNDIAL). Differs from the code of open-unlearning, whose value is the
        cross-entropy with q, so larger by the entropy of q, which has no gradient; whose mean takes in prompt and
        padding; and which lowers the token V - 100 where a token does not count.
    """
    lowered = _wide(ref_logits.detach())
    lowered = lowered.scatter_add(-1, labels.unsqueeze(-1), lowered.new_full((len(labels), 1), -beta))
    return kl_divergence(logits, lowered)


def cross_entropy_unlearning(logits, labels):
    """Divergence from the model's own distribution over all tokens but the true one.

        L_n = KL(q_n || p_n) = -log(1 - p_n(y_n)),   q_n = softmax(z_n with z_n(y_n) = -inf), no gradient through q

    The gradient by the logits is p - q: p(y) at the true token, where that of ascent is 1 - p(y); it fades out as the
    token becomes unlikely, and is largest where the model is sure of it.

    Args:
        logits: (N, V).
        labels: (N,) int64, the true tokens.
    Returns:
        (N,) nats, >= 0.
    Source: Yang 2025, arXiv:2503.01224 (CE-U). Differs from the authors' code, whose value is the cross-entropy with q,
        so larger by the entropy of q; the gradient is the same.
    """
    logits = _wide(logits)
    others = logits.scatter(-1, labels.unsqueeze(-1), float("-inf"))
    return torch.logsumexp(logits, -1) - torch.logsumexp(others, -1)


def cross_entropy_to_reference(logits, ref_logits):
    """Cross-entropy of the model's own distribution with the reference's.

        C_n = -sum_v p_n(v) * log r_n(v) = KL(p_n || r_n) + H(p_n)

    Where p = r the divergence has no gradient in either direction, so that raising it would never begin; C has one.

    Args:
        logits: (N, V) the model's.
        ref_logits: (N, V) the reference's; carries no gradient.
    Returns:
        (N,) nats, >= 0.
    Source: Jia et al. 2024, arXiv:2404.18239 (SOUL, its KL loss). Differs from the authors' code, which adds 1e-12 to r
        and averages over prompt and padding.
    """
    return -(_wide(logits).softmax(-1) * _wide(ref_logits.detach()).log_softmax(-1)).sum(-1)


def squared_logit_margin(logits):
    """Square of how far the largest logit is above the mean of all.

        L_n = (max_v z_n(v) - mean_v z_n(v))^2

    It is 0 exactly where all tokens are equally likely.

    Args:
        logits: (N, V).
    Returns:
        (N,) >= 0, in the unit of logits squared.
    Source: Entesari et al. 2025, arXiv:2506.05314 (logit-margin flattening).
    """
    logits = _wide(logits)
    return (logits.amax(-1) - logits.mean(-1)).square()


def _wide(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
