"""Two backwards in a step and what the filter makes of them: by hand, and the same however the step is cut."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from backends import start, train
from test_equivalence import assert_terms_agree
from test_reference import make_trainer
from tiny_world import command, terms, update_distance, weights

from llm_unlearn.errors import UserError
from llm_unlearn.gradient_filter import GradientFilter, same_sign

# One phase of one layer, and a retain gradient that is not 0 at the start, where rounding would decide about signs.
ONE_LAYER = ["--start_layer", "1", "--end_layer", "1", "--retain_loss", "nll", "--retain_schedule", "constant"]
# Where a gradient is 0 up to rounding, rounding decides whether the other one counts: a few elements of 1e5 may differ.
# Signs that each micro-batch sees for itself give a distance of 0.7.
FILTERED_TOLERANCE = 0.02


def test_same_sign_worked_out_by_hand():
    """Products 6, -2, 0, 0, 8: elements 0 and 4 agree."""
    retain, forget = torch.tensor([3.0, 1.0, 0.0, 5.0, -4.0]), torch.tensor([2.0, -2.0, 7.0, 0.0, -2.0])
    assert same_sign(retain, forget).tolist() == [5, 0, 0, 0, -6]
    assert same_sign(retain, forget, asymmetric=True).tolist() == [5, 1, 0, 5, -6]


def test_gradients_whose_product_underflows_still_agree():
    retain, forget = torch.tensor([1e-30, 1e-30]), torch.tensor([2e-30, -2e-30])
    assert (retain * forget).tolist() == [0, 0]
    assert same_sign(retain, forget).tolist() == pytest.approx([3e-30, 0], abs=1e-37)


@pytest.mark.parametrize("asymmetric, expected", [(False, [6.0, 0.0]), (True, [6.0, -2.0])])
@pytest.mark.parametrize("shape", ["1x4", "2x2", "4x1"])
def test_the_step_is_filtered_as_a_whole(shape, asymmetric, expected):
    """Four rows, the loss of each linear in the weights, so that its slopes are the gradient.

        forget  (1, -2) + (1, 3) + (2, 0) + (0, 0) = (4, 1)
        retain  (3, -1) + (-1, -1) + (0, 0) + (0, 0) = (2, -2)

    The first element agrees and is 4 + 2, the second does not. Row by row the first would be 1 + 3 + 0 + 0.
    """
    rows = {
        "forget": torch.tensor([[1.0, -2], [1, 3], [2, 0], [0, 0]]),
        "retain": torch.tensor([[3.0, -1], [-1, -1], [0, 0], [0, 0]]),
    }
    model = torch.nn.Module()
    model.first, model.second = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    accelerator = SimpleNamespace(distributed_type=DistributedType.NO)
    keeper = GradientFilter(SimpleNamespace(accelerator=accelerator, is_fsdp2=lambda: False), asymmetric)
    for _ in range(2):  # nothing of a step is left for the next
        for part in torch.arange(4).chunk({"1x4": 1, "2x2": 2, "4x1": 4}[shape]):
            for stream, slopes in rows.items():
                with keeper.turn_of(stream, model):
                    (slopes[part] @ torch.cat([model.first, model.second])).sum().backward()
        assert model.first.grad is None and model.second.grad is None
        keeper.combine()
        assert [model.first.grad.item(), model.second.grad.item()] == expected
        model.zero_grad()


def update_of(tmp_path, name, **flags):
    """Return {name: gradient} that one step of plain SGD at rate 1 took."""
    flags = {
        "start_layer": 1, "end_layer": 1, "retain_loss": "nll", "retain_schedule": "constant", "max_steps": 1,
        "learning_rate": 1.0, "forget_weight": 1.0, "retain_weight": 1.0, **flags,
    }  # fmt: skip
    trainer = make_trainer("sequential", tmp_path / name, **flags)
    start_values = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
    trainer.train()
    return {key: start_values[key] - p.detach() for key, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("flag, asymmetric", [("same_sign_grads", False), ("asymmetric_filter", True)])
def test_the_update_is_that_of_the_two_terms_filtered(flag, asymmetric, tmp_path):
    """The gradients of the terms are those of two runs, each with one of them alone."""
    forget = update_of(tmp_path, "forget", retain_loss="none", retain_schedule="0:1")
    retain = update_of(tmp_path, "retain", forget_weight=0.0)
    found = update_of(tmp_path, "both", **{flag: True})
    agreeing = 0
    for name, value in found.items():
        expected = same_sign(retain[name], forget[name], asymmetric)
        # Each was read off weights of size 1, which resolve 1e-7: below that a sign is not to be trusted.
        sure = (retain[name].abs() > 1e-6) & (forget[name].abs() > 1e-6)
        agreeing += int((expected != 0)[sure].sum()) / max(int(sure.sum()), 1) if ".1." in name else 0
        torch.testing.assert_close(value[sure], expected[sure], rtol=0, atol=1e-6)
        assert value.any() == (".1." in name)
    # Both kinds of elements are there.
    assert agreeing > 0


@pytest.mark.parametrize("flag", ["same_sign_grads", "asymmetric_filter"])
def test_accumulation_changes_nothing(flag, tmp_path):
    whole = update_of(tmp_path, "1x4", **{flag: True})
    parts = update_of(tmp_path, "4x1", **{flag: True}, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert update_distance(parts, whole, {name: 0.0 for name in whole}) <= FILTERED_TOLERANCE


@pytest.mark.distributed
@pytest.mark.parametrize(
    "backend, accumulation",
    [
        ("fsdp2", 2),
        pytest.param("ddp", 2, marks=pytest.mark.full),
        pytest.param("fsdp2", 1, marks=pytest.mark.full),
    ],
)
def test_two_processes_equal_one(backend, accumulation, tiny_world, start_weights, tmp_path):
    flags = [*ONE_LAYER, "--same_sign_grads", "True", "--optim", "adamw_torch", "--learning_rate", "1e-3"]
    expected = train(command(tiny_world, "sequential", tmp_path / "one", *flags))
    shape = ["--per_device_train_batch_size", 2 // accumulation, "--gradient_accumulation_steps", accumulation]
    found = train(command(tiny_world, "sequential", tmp_path / "two", *flags, *shape), backend, processes=2)
    assert_terms_agree(terms(found), terms(expected), 1e-4)
    assert update_distance(weights(found), weights(expected), start_weights) <= FILTERED_TOLERANCE


@pytest.mark.distributed
def test_deepspeed_is_refused(tiny_world, tmp_path):
    outcome = start(
        command(tiny_world, "sequential", tmp_path / "out", *ONE_LAYER, "--same_sign_grads", "True"), "zero2"
    )
    assert outcome.codes == [2]
    assert "which DeepSpeed does not hand out; pass --fsdp True" in outcome.said[0].splitlines()[-1]


@pytest.mark.parametrize("flags", [{"retain_loss": "none", "retain_schedule": "0:1"}, {"forget_weight": 0.0}])
def test_a_filter_with_one_term_is_refused(flags, tmp_path):
    with pytest.raises(UserError, match="need a forget and a retain term"):
        make_trainer("sequential", tmp_path, same_sign_grads=True, **flags)
