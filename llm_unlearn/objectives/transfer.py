"""Objective of checkpoint transfer: hidden states like those of a model that does not know yet."""
# Shapes: B sequences, T tokens, D hidden size.

import torch


def activation_transfer(hidden, teacher_hidden):
    """Mean square distance of each token's states from an ignorant teacher's, averaged over layers.

        L_t = (1/|layers|) * sum_l (1/D) * || T_l(g_{l,t}) - h_{l,t} ||^2

    g are the teacher's states and T_l its map to the model's coordinates, affine or the identity. The regression is on
    the states of the model in training, not on those that it began with.

    Args:
        hidden: {decoder layer: (B, T, D)} of the model, those of the teacher at least.
        teacher_hidden: {decoder layer: (B, T, D)}, mapped already; carries no gradient.
    Returns:
        (B, T) one loss per token, >= 0, in the unit of states squared, float32 at least.
    Source: EleutherAI/unlearn (checkpoint transfer).
    """
    terms = [
        (_wide(hidden[layer]) - _wide(states.detach())).square().mean(-1) for layer, states in teacher_hidden.items()
    ]
    return sum(terms) / len(terms)


def _wide(states):
    return states.to(torch.promote_types(states.dtype, torch.float32))
