"""Objectives on hidden states, against numbers worked out by hand; limits, and gradients."""

import math

import pytest
import torch

from llm_unlearn.objectives.representation import (
    pair_similarity,
    pooled_directions,
    rerouting,
    squared_distance,
    state_distance,
    steering,
)


def wide(values, **options):
    return torch.tensor(values, dtype=torch.float64, **options)


def test_steering_by_hand():
    """h = (1, 2), c u = (3, 4): ((1-3)^2 + (2-4)^2) / 2 = 4; the gradient is 2 (h - c u) / D = (-2, -2)."""
    hidden = wide([[1.0, 2.0]], requires_grad=True)
    target = wide([3.0, 4.0], requires_grad=True)
    loss = steering(hidden, target)
    assert loss.tolist() == [4.0]
    loss.sum().backward()
    assert hidden.grad.tolist() == [[-2.0, -2.0]] and target.grad is None


def test_distances_by_hand():
    """h - h0 = (3, 4): the norm is 5, its gradient the direction (.6, .8); the mean square is 12.5."""
    hidden, held = wide([[3.0, 4.0]], requires_grad=True), wide([[0.0, 0.0]])
    assert squared_distance(hidden, held).tolist() == [12.5]
    loss = state_distance(hidden, held)
    assert loss.tolist() == [5.0]
    loss.sum().backward()
    assert hidden.grad.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)]]


def test_rounding_does_not_become_the_first_step():
    """float32: 1e-7 away from a state of length 5 the norm's gradient would have length 1."""
    held = torch.tensor([[3.0, 4.0]])
    hidden = (held * (1 + 1.2e-7)).requires_grad_()
    assert not torch.equal(hidden, held)
    loss = state_distance(hidden, held)
    loss.sum().backward()
    assert 0 <= loss.item() < 1e-6 and 0 < hidden.grad.norm() < 1e-3
    far = torch.tensor([[3.0, 6.0]], requires_grad=True)
    loss = state_distance(far, held)
    loss.sum().backward()
    assert loss.item() == pytest.approx(2, rel=1e-3) and far.grad.norm().item() == pytest.approx(1, rel=1e-4)


def test_a_state_of_length_zero_has_no_nan():
    hidden = wide([[0.0, 0.0]], requires_grad=True)
    state_distance(hidden, hidden).sum().backward()
    assert hidden.grad.tolist() == [[0.0, 0.0]]


def test_rerouting_by_hand():
    """cos((1, 0), (1, 1)) = 1/sqrt 2; 0 with no gradient at right angles and beyond; length is nothing."""
    hidden = wide([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0], [7.0, 0.0]], requires_grad=True)
    held = wide([[1.0, 1.0], [3.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    loss = rerouting(hidden, held)
    assert loss.tolist() == pytest.approx([math.sqrt(0.5), 0.0, 0.0, math.sqrt(0.5)])
    loss[2].backward()
    assert hidden.grad.abs().sum() == 0


def test_pooled_directions_leave_out_what_does_not_count():
    """Row 0: the mean of (2, 0) and (0, 2) is (1, 1); the third token is padding. Row 1 counts nothing."""
    hidden = wide([[[2.0, 0.0], [0.0, 2.0], [9.0, 9.0]]] * 2)
    mask = torch.tensor([[True, True, False], [False] * 3])
    found = pooled_directions(hidden, mask)
    assert found[0].tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    assert found[1].tolist() == [0.0, 0.0]
    weighted = pooled_directions(hidden, mask, torch.tensor([[1.0, 0.0, 5.0]] * 2))
    assert weighted[0].tolist() == pytest.approx([1.0, 0.0])


def test_pair_similarity_is_the_mean_over_pairs_and_has_its_gradient():
    """Three sequences, one on another process: the mean of the values, and the gradient of all pairs by autograd."""
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    whole = start.clone().requires_grad_()
    pairs = [(whole[i] @ whole[j]).relu() for i in range(3) for j in range(3) if i != j]
    mean = sum(pairs) / 6
    mean.backward()
    values, gradients = [], []
    for rows in ([0, 1], [2]):
        own = start[rows].clone().requires_grad_()
        is_pair = torch.tensor([[row != other for other in range(3)] for row in rows])
        found = pair_similarity(own, start, is_pair)
        (found.sum() / 3).backward()
        values, gradients = [*values, *found.tolist()], [*gradients, *own.grad]
    assert sum(values) / 3 == pytest.approx(mean.item())
    torch.testing.assert_close(torch.stack(gradients), whole.grad)


def test_a_sequence_without_a_pair_adds_nothing():
    own = torch.ones(1, 4, requires_grad=True)
    found = pair_similarity(own, torch.ones(1, 4), torch.tensor([[False]]))
    found.sum().backward()
    assert found.tolist() == [0.0] and own.grad.abs().sum() == 0
