"""Maximum-entropy objectives: drive every next-token distribution toward the uniform one."""
# Shapes: B sequences, T tokens, N positions, V vocabulary.

import math

import torch


def uniform_cross_entropy(logits, top_k=None):
    """Cross-entropy of the uniform distribution U under the model's, from logits.

        C_n = -(1/V) * sum_v log p_n(v) = logsumexp_v z_nv - mean_v z_nv = log V + KL(U || p_n)

    The gradient by z_nv is p_n(v) - 1/V: likely tokens are pushed down, unlikely ones up, until all are as likely.
    With `top_k` the same over the k largest logits alone, as if the vocabulary held no other tokens; the choice of
    those carries no gradient, and the others' gradient is 0.

    Args:
        logits: (N, V); adding a number to a row changes nothing, so that log-probabilities serve as well.
        top_k: how many of the largest logits are read, in [1, V]; None reads all.
    Returns:
        (N,) nats, >= log V (log k), with equality exactly where all logits that are read are equal.
    Source: EleutherAI/unlearn, its entropy loss for unlearning through a tuned lens.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if top_k is not None:
        wide = wide.topk(top_k, -1).values
    return torch.logsumexp(wide, -1) - wide.mean(-1)


def max_entropy(uniform, choices):
    """Cross-entropy of the uniform distribution in units of its least value, so that 1 means fully unlearned.

        L_t = C_t / log V = 1 + KL(U || p_t) / log V

    It is the expectation of `random_target` over its labels, without their noise, and so is its gradient. The entropy
    of p_t itself is another objective, whose gradient fades where p_t is sure of one token; this one's never does.

    Args:
        uniform: (B, T) `uniform_cross_entropy` of each token, nats; 0 where a token does not count.
        choices: V, or k where it was read off the k largest logits; at least 2.
    Returns:
        (B, T) one loss per token, >= 1, and 0 where a token does not count.
    Source: EleutherAI/unlearn (`max_entropy_kl`, and its top-k entropy). Differs from the authors' code: nothing.
    """
    return uniform / math.log(choices)


def random_target(logps, choices):
    """Negative log-likelihood of labels drawn uniformly from the vocabulary, in units of log V.

        L_t = -log p_t(y_t) / log V,   y_t ~ Uniform{0, ..., V-1}

    Its expectation is `max_entropy`; its gradient by the logits is (p_t - onehot(y_t)) / log V.

    Args:
        logps: (B, T) log-probability of each token's drawn label, nats; 0 where a token does not count.
        choices: V, at least 2.
    Returns:
        (B, T) one loss per token, >= 0; 1 where the distribution is uniform; 0 where a token does not count.
    Source: EleutherAI/unlearn (random-target cross-entropy, its default). Differs from the authors' code: nothing.
    """
    return -logps / math.log(choices)
