"""Invariance objectives: how far a model is from where fine-tuning on some data has nothing to gain."""
# Shapes: B sequences, T tokens, V vocabulary, E environments.

import torch


def scale_gradient(logps, entropy):
    """Derivative of each token's negative log-likelihood by one factor w on all its logits, at w = 1.

        s_t = d/dw [logsumexp_v(w z_tv) - w z_ty] = sum_v p_tv z_tv - z_ty = -log p_t(y_t) - H(p_t)

    The last step because z_v = log p_v + logsumexp z: the derivative is by how much the token surprises more than the
    distribution expects to be surprised. It is positive where the model is too sure, negative where it is not sure
    enough. Its own gradient by z_tv is p_tv * (1 + z_tv - sum_u p_tu z_tu) - [v = y_t], so that nothing is
    differentiated twice.

    Args:
        logps: (B, T) log-probability of each token, nats; 0 where a token does not count.
        entropy: (B, T) of the distribution at each token, nats; likewise.
    Returns:
        (B, T) nats; 0 where a token does not count.
    Source: the dummy classifier of IRMv1, Arjovsky et al. 2019, arXiv:1907.02893, Section 3.1.
    """
    return -logps - entropy


def irm_penalty(scale_gradients, environments, totals):
    """IRMv1 penalty of an optimizer step: squared mean scale gradients, averaged over the environments that it has.

        P = (1/E) * sum_e r_e^2,   r_e = (1/n_e) * sum of s_t over the n_e tokens of environment e

    A square is not a mean over tokens, so that a token's share takes what the whole step says, as constants:

        L_t = N / (E n_e) * r_e * (2 s_t - stopgrad(s_t))

    The mean of L_t over all N tokens is P, and its gradient is that of P, however the tokens are cut into batches. A
    square of each batch's own mean would add the variance of that mean, and push the model toward distributions that
    never surprise.

    Args:
        scale_gradients: (B, T) `scale_gradient` of each token.
        environments: (B,) int64, the environment of each sequence, from 0.
        totals: (E, 2) sum of s_t and number of tokens of each environment over the whole step; no gradient.
    Returns:
        (B, T) one value per token.
    Source: Arjovsky et al. 2019, arXiv:1907.02893, Eq. IRMv1; as a regularizer of unlearning (ILU) Wang et al. 2025,
        arXiv:2506.01339. Differs from the latter: no code of it is published, and which weights w scales there is left
        open; here it is the logits, as in IRMv1, and the environments are averaged, not summed.
    """
    sums, counts = totals.unbind(-1)
    present = counts > 0
    means = sums / counts.clamp(min=torch.finfo(counts.dtype).tiny)
    factors = means * counts.sum() / (present.sum() * counts).clamp(min=torch.finfo(counts.dtype).tiny)
    factors = torch.where(present, factors, 0.0)[environments].unsqueeze(-1).to(scale_gradients.dtype)
    return factors * (2 * scale_gradients - scale_gradients.detach())
