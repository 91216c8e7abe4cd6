"""Phases: which layer has which optimizer step, at which rate, from which state; worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from llm_unlearn.errors import UserError
from llm_unlearn.phases import (
    LayerSwitch,
    Phases,
    forget_moments,
    layers_back_to_front,
    phase_factors,
    phase_schedule,
    split_groups,
)


def test_steps_are_dealt_out_by_hand():
    """7 steps over 3 phases: floor(3 t / 7) is 0 0 0 1 1 2 2."""
    phases = Phases((31, 27, 23), 7)
    assert [phases.index(step) for step in range(9)] == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert [phases.layer(step) for step in range(7)] == [31, 31, 31, 27, 27, 23, 23]
    assert [(phases.start(p), phases.length(p)) for p in range(3)] == [(0, 3), (3, 2), (5, 2)]
    assert [step for step in range(8) if phases.is_start(step)] == [0, 3, 5]
    assert [phases.progress(step) for step in range(8)] == pytest.approx([0, 1 / 3, 2 / 3, 0, 1 / 2, 0, 1 / 2, 1])


@pytest.mark.parametrize("num_layers, num_steps", [(1, 1), (1, 9), (5, 5), (4, 11), (6, 100), (7, 15)])
def test_every_layer_has_a_phase_and_they_differ_by_one_step_at_most(num_layers, num_steps):
    phases = Phases(tuple(range(num_layers)), num_steps)
    indices = [phases.index(step) for step in range(num_steps)]
    assert indices == sorted(indices) and set(indices) == set(range(num_layers))
    assert [indices.count(p) for p in range(num_layers)] == [phases.length(p) for p in range(num_layers)]
    assert max(map(indices.count, indices)) - min(map(indices.count, indices)) <= 1
    assert all(phases.is_start(indices.index(p)) for p in range(num_layers))


def test_more_phases_than_steps_are_refused():
    with pytest.raises(UserError, match="3 layers, one phase each, do not fit into 2 optimizer steps; pass a larger"):
        Phases((2, 1, 0), 2)


def test_layers_go_from_the_back_to_the_front():
    assert layers_back_to_front(None, None, 4, 32) == (31, 27, 23, 19, 15, 11)
    assert layers_back_to_front(28, 16, 4, 32) == (28, 24, 20, 16)
    assert layers_back_to_front(None, 0, 1, 3) == (2, 1, 0)
    # A quarter of a shallower model's depth.
    assert layers_back_to_front(None, None, 4, 16) == (15, 11, 7) and layers_back_to_front(None, None, 1, 4) == (
        3,
        2,
        1,
    )
    assert layers_back_to_front(None, None, 4, 2) == (1,) and layers_back_to_front(None, None, 4, 80)[-1] == 11


@pytest.mark.parametrize(
    "given, message",
    [
        ((32, None, 4), r"--start_layer 32 does not exist: the model has layers 0 to 31"),
        ((-1, None, 4), r"--start_layer -1 does not exist"),
        ((None, 40, 4), r"--end_layer 40 does not exist"),
        ((None, -1, 4), r"--end_layer -1 does not exist"),
        ((10, 12, 4), r"--end_layer 12 is above --start_layer 10; pass an --end_layer between 0 and 10"),
        ((5, None, 4), r"--end_layer 8 \(its default\) is above --start_layer 5"),
        ((None, None, 0), r"--layer_step must be at least 1, but is 0"),
    ],
)
def test_layers_that_cannot_be_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        layers_back_to_front(*given, 32)


def schedule_arguments(kind="linear", warmup=0):
    return SimpleNamespace(
        lr_scheduler_type=kind, lr_scheduler_kwargs=None, learning_rate=0.5, get_warmup_steps=lambda steps: warmup
    )


def rates(phases, args, trains):
    """Return the learning rates of the groups at each step."""
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in trains]
    optimizer = torch.optim.SGD([{"params": [p]} for p in parameters], lr=args.learning_rate)
    schedule = phase_schedule(optimizer, phases, phase_factors(phases, args), trains)
    found = []
    for _ in range(phases.num_steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


def test_each_phase_has_the_whole_schedule():
    """Linear decay over 4 steps and over 3: factors 1, 3/4, 1/2, 1/4 and 1, 2/3, 1/3, times 0.5."""
    phases = Phases((1, 0), 7)
    assert (phases.length(0), phases.length(1)) == (4, 3)
    found = rates(
        phases, schedule_arguments(), [lambda phase: phase == 0, lambda phase: phase == 1, lambda phase: True]
    )
    decay = [0.5, 0.375, 0.25, 0.125, 0.5, 1 / 3, 1 / 6]
    assert [row[2] for row in found] == pytest.approx(decay)
    assert [row[0] for row in found] == pytest.approx(decay[:4] + [0.0] * 3)
    assert [row[1] for row in found] == pytest.approx([0.0] * 4 + decay[4:])


def test_each_phase_warms_up():
    found = rates(Phases((1, 0), 6), schedule_arguments("constant_with_warmup", 1), [lambda phase: True])
    assert [row[0] for row in found] == [0.0, 0.5, 0.5] * 2


def test_a_schedule_that_watches_a_metric_is_refused():
    args = schedule_arguments("reduce_lr_on_plateau")
    with pytest.raises(UserError, match="--lr_scheduler_type reduce_lr_on_plateau cannot begin anew with each layer"):
        phase_factors(Phases((1, 0), 6), args)


def two_layers():
    torch.manual_seed(0)
    layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))
    layer_of = {id(p): index for index, layer in enumerate(layers) for p in layer.parameters()}
    return layers, layer_of


def test_groups_are_split_by_layer_with_their_settings():
    layers, layer_of = two_layers()
    decayed, plain = [layer.weight for layer in layers], [layer.bias for layer in layers]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}])
    assert split_groups(optimizer, layer_of) == [0, 1, 0, 1]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(p)] for p in (layers[0].weight, layers[1].weight, layers[0].bias, layers[1].bias)
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0, 0.0]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
def test_a_state_that_was_forgotten_steps_as_a_new_one(kind, in_place):
    """Also behind the wrappers of accelerate and DeepSpeed, which keep the optimizer as `optimizer`."""
    gradient = torch.tensor([1.0, -2.0])
    used, new = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer, fresh = kind([used], lr=0.1), kind([new], lr=0.1)
    for value in (5.0, -3.0):
        used.grad = torch.full((2,), value)
        optimizer.step()
    with torch.no_grad():
        used.copy_(new)
    forget_moments(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer)), in_place)
    assert bool(optimizer.state) == in_place
    for _ in range(2):
        used.grad, new.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        fresh.step()
        assert torch.equal(used, new)


@pytest.mark.parametrize("needs_all", [False, True])
def test_the_switch_leaves_gradients_to_the_layers_that_train(needs_all):
    layers, _ = two_layers()
    switch = LayerSwitch(layers, needs_all)
    for trained in ([1], [0], [0, 1]):
        switch.turn_to(trained)
        layers.zero_grad()
        layers[1](layers[0](torch.ones(2, 3))).sum().backward()
        if needs_all:
            # DDP and DeepSpeed wait for one of each.
            assert all(p.grad is not None for p in layers.parameters())
            assert all(bool(p.grad.any()) == (index in trained) for index in (0, 1) for p in layers[index].parameters())
        switch.drop_gradients()
        for index, layer in enumerate(layers):
            assert all((p.grad is not None and p.grad.any()) == (index in trained) for p in layer.parameters())
    switch.turn_to([1])
    switch.release()
    layers.zero_grad()
    layers[1](layers[0](torch.ones(2, 3))).sum().backward()
    assert all(p.grad.any() for p in layers.parameters())


def test_nothing_below_the_trained_layer_takes_part_in_the_backward():
    layers, _ = two_layers()
    LayerSwitch(layers, needs_all=False).turn_to([1])
    inside = layers[0](torch.ones(2, 3))
    assert not inside.requires_grad and layers[1](inside).requires_grad
