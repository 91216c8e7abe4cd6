"""Objectives of the weights alone: how far they have come from where they started, and how large they are."""
# Shapes: K parameter tensors.

import torch

FLOOR = 1e-8


def squared_distance(squares, sizes):
    """Squared distance from the start, the penalty that L2-SP puts on the weights.

        P_k = ||theta_k - theta0_k||^2,   dP_k/dtheta_k = 2 * (theta_k - theta0_k)

    Args:
        squares: (K,) ||theta_k - theta0_k||^2 of each tensor, or of a part of it.
        sizes: (K,) how many elements each tensor has; unused.
    Returns:
        (values (K,), factors (K,)): the gradient of a value by its tensor is factor * (theta - theta0).
    Source: Li et al. 2018, arXiv:1802.01483 (L2-SP, without its term on new layers), with alpha/2 written as one
        coefficient.
    """
    return squares, torch.full_like(squares, 2.0)


def element_norm(squares, sizes):
    """Size of an update as max-update unlearning measures it: the root mean square of its elements, times their number.

        U_k = n_k * sqrt(||theta_k - theta0_k||^2 / n_k + 1e-8)
        dU_k/dtheta_k = (theta_k - theta0_k) / sqrt(||theta_k - theta0_k||^2 / n_k + 1e-8)

    Every element of every tensor weighs the same, and the gradient's mean square stays below 1 however large the update
    is. It is 0 at the start.

    Args:
        squares: (K,) ||theta_k - theta0_k||^2 of each whole tensor.
        sizes: (K,) n_k, how many elements each has.
    Returns:
        (values (K,), factors (K,)): the gradient of a value by its tensor is factor * (theta - theta0).
    Source: EleutherAI/unlearn (max-update unlearning, `element_norm`).
    """
    roots = (squares / sizes + FLOOR).sqrt()
    return sizes * roots, 1 / roots


def tensor_norm(squares, sizes):
    """Euclidean length of an update, tensor by tensor.

        U_k = ||theta_k - theta0_k||,   dU_k/dtheta_k = (theta_k - theta0_k) / ||theta_k - theta0_k||, and 0 at 0

    A gradient of length 1 for each tensor: elements of large tensors are moved less than those of small ones.

    Args:
        squares: (K,) ||theta_k - theta0_k||^2 of each whole tensor.
        sizes: (K,) how many elements each has; unused.
    Returns:
        (values (K,), factors (K,)): the gradient of a value by its tensor is factor * (theta - theta0).
    Source: EleutherAI/unlearn (max-update unlearning, without `element_norm`).
    """
    norms = squares.sqrt()
    return norms, torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))


def absolute_sum(weights):
    """Sum of the absolute weights, which pulls all of them toward 0 with the same force.

        P = sum_i |theta_i|,   dP/dtheta_i = sign(theta_i), and 0 at 0

    Args:
        weights: tensor, or a part of one.
    Returns:
        (value of no dimension, gradient of the weights' shape).
    Source: Jia et al. 2023, arXiv:2304.04934 (L1-sparse unlearning).
    """
    return weights.abs().sum(), weights.sign()
