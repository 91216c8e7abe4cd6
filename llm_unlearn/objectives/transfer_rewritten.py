"""Objective of rewritten transfer: hidden states of a text like those of its rewrite."""
# Shapes: B sequences, T tokens of the originals, U of the rewrites, D size of a module's output.

import torch


def aligned_transfer(hidden, rewritten_hidden, alignment):
    """Mean square distance of each token's states from those of the token that stands in its place in the rewrite.

        L_t = (1/|modules|) * sum_m (1/D) * || h_{m,t} - g_{m,a(t)} ||^2

    h are a module's states of the original and g, without a gradient, those of the rewrite under the same model; a(t)
    is the aligned token.

    Args:
        hidden: list of (B, T, D), one for each module.
        rewritten_hidden: list of (B, U, D), the same modules.
        alignment: (B, T) int64, a(t) in 0..U-1.
    Returns:
        (B, T) one loss per token, >= 0, in the unit of states squared, float32 at least.
    Source: EleutherAI/unlearn (transfer_rewritten), L_transfer without its cross-entropy.
    """
    total = 0.0
    for states, others in zip(hidden, rewritten_hidden, strict=True):
        index = alignment.unsqueeze(-1).expand(-1, -1, others.shape[-1])
        total = total + (_wide(states) - _wide(others.detach().gather(1, index))).square().mean(-1)
    return total / len(hidden)


def _wide(states):
    return states.to(torch.promote_types(states.dtype, torch.float32))
