"""Circuit breakers, and what stacks on any method: orthogonality over the rows of all processes, a flat output."""

import math

import backends
import pytest
import torch
from layer_reference import first_step, rows_of
from tiny_world import METHOD_FLAGS, command, terms, update_distance, weights

from llm_unlearn.cli.unlearn import main

CONSTANT = ["--retain_schedule", "constant", "--forget_schedule", "constant"]
ORTHOGONAL = ["--regularizer", "orthogonality", "--orth_coef", "0.1", "--orth_schedule", "constant"]


@pytest.fixture(autouse=True)
def nothing_but_what_a_test_says(monkeypatch):
    monkeypatch.setitem(METHOD_FLAGS, "circuit_breakers", [])


def pooled(world, index):
    """Return (directions of the forget rows at one of transformers' hidden_states, their mean length in tokens)."""
    directions, lengths = [], []
    for states, counted in rows_of(world["model"], world["forget"]):
        directions.append(torch.nn.functional.normalize(states[index][1:][counted].mean(0), dim=0))
        lengths.append(int(counted.sum()))
    return torch.stack(directions), sum(lengths) / len(lengths)


def expected_orthogonality(world, index=1):
    directions, length = pooled(world, index)
    cosines = (directions @ directions.T).relu()
    return ((cosines.sum() - cosines.diagonal().sum()) / (len(cosines) * (len(cosines) - 1)) * length).item()


def test_the_first_step_starts_at_cosine_one_and_distance_zero(tiny_world, tmp_path):
    log = first_step(tiny_world, tmp_path / "out", "circuit_breakers", *CONSTANT, "--layers", "0")
    assert log["loss/forget"] == pytest.approx(1, rel=1e-6)
    assert log["loss/retain"] == pytest.approx(0, abs=1e-5)


def test_orthogonality_by_a_plain_loop(tiny_world, tmp_path):
    flags = ["--layers", "0", "--orth_coef", "0.5", "--orth_schedule", "constant"]
    log = first_step(tiny_world, tmp_path / "out", "circuit_breakers", *flags)
    expected = expected_orthogonality(tiny_world)
    assert log["loss/orthogonality"] == pytest.approx(expected, rel=1e-5)
    # The retain weight starts at 0, the forget weight at 5.
    assert log["loss"] == pytest.approx(5 + 0.5 * expected, rel=1e-4)


def test_orthogonality_goes_with_any_method(tiny_world, tmp_path):
    log = first_step(tiny_world, tmp_path / "out", "npo", *ORTHOGONAL, "--orth_layers", "0", "--beta", "0.5")
    assert log["loss/orthogonality"] == pytest.approx(expected_orthogonality(tiny_world), rel=1e-5)
    assert log["loss/forget"] == pytest.approx(4 * math.log(2), rel=1e-6)
    total = log["loss/forget"] + log["loss/retain"] + 0.1 * log["loss/orthogonality"]
    assert log["loss"] == pytest.approx(total, rel=1e-4)


def test_orthogonality_is_lowered(tiny_world, tmp_path):
    flags = [*ORTHOGONAL, "--orth_coef", "3", "--forget_weight", "0", "--num_train_epochs", "5"]
    flags += ["--optim", "adamw_torch", "--learning_rate", "1e-3", "--retain_loss", "kl"]
    assert main(command(tiny_world, "grad_diff", tmp_path / "out", *flags)) == 0
    found = [log["loss/orthogonality"] for log in terms(tmp_path / "out")]
    assert found[-3] < 0.8 * found[0]


def test_a_flat_output_goes_with_any_method(tiny_world, tmp_path):
    flags = ["--regularizer", "max_entropy", "--max_entropy_coef", "0.25"]
    log = first_step(tiny_world, tmp_path / "out", "grad_diff", *flags, "--retain_loss", "nll")
    # The model knows its forget rows, so that their distributions are anything but flat.
    assert log["loss/max_entropy"] > 1.2
    total = log["loss/forget"] + log["loss/retain"] + 0.25 * log["loss/max_entropy"]
    assert log["loss"] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("retain_loss", ["kl", "nll"])
def test_a_retain_term_on_the_output_starts_with_the_schedule(retain_loss, tiny_world, tmp_path):
    """In the first step nothing is read at the head, and yet every weight has a gradient."""
    flags = ["--layers", "0", "--retain_loss", retain_loss]
    assert main(command(tiny_world, "circuit_breakers", tmp_path / "out", *flags)) == 0
    assert [set(log) for log in terms(tmp_path / "out")] == [{"loss/forget"}] + 2 * [{"loss/forget", "loss/retain"}]


@pytest.mark.parametrize(
    "method, flags, message",
    [
        ("circuit_breakers", ["--layers", "0", "2"], "layer 2 does not exist: the model has layers 0 to 1"),
        ("circuit_breakers", ["--layers", "0", "0"], "--layers must name at least one layer, and each once"),
        ("circuit_breakers", ["--orth_coef", "-1"], "--orth_coef must be above 0"),
        ("npo", ["--orth_coef", "1"], "--orth_coef has no effect without --regularizer orthogonality"),
        ("npo", ["--regularizer", "orthogonal"], "did you mean 'orthogonality'?"),
        ("finetune", ["--regularizer", "orthogonality"], "reads a forget set, which this method does not"),
        ("rmu", ["--layer", "0", *ORTHOGONAL, "--orth_layers", "1"], "--orth_layers 1 is above layer 0"),
        (
            "rmu",
            ["--layer", "0", "--regularizer", "max_entropy"],
            "reads the output, but this run's losses end at layer 0",
        ),
        (
            "circuit_breakers",
            ["--orth_coef", "1", "--per_device_train_batch_size", "1"],
            "one row on one process leaves none; pass --per_device_train_batch_size 2",
        ),
    ],
)
def test_mistakes(method, flags, message, tiny_world, tmp_path, capsys):
    assert main(command(tiny_world, method, tmp_path / "out", *flags)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "backend", ["zero3", *(pytest.param(name, marks=pytest.mark.full) for name in ("ddp", "fsdp2", "zero2"))]
)
@pytest.mark.parametrize("retain_loss", ["l2", pytest.param("kl", marks=pytest.mark.full)])
def test_two_processes_with_one_row_each_equal_one_with_two(backend, retain_loss, tiny_world, start_weights, tmp_path):
    """Pairs are over all processes: one row on each makes the pair that two rows on one process make."""
    flags = ["--orth_coef", "0.1", "--orth_schedule", "constant", "--gradient_accumulation_steps", "2", *CONSTANT]
    flags += ["--learning_rate", "1e-3"]
    flags += ["--retain_loss", retain_loss]
    words = command(tiny_world, "circuit_breakers", tmp_path / "one", *flags, "--per_device_train_batch_size", "2")
    one = backends.train(words)
    words = command(tiny_world, "circuit_breakers", tmp_path / "two", *flags, "--per_device_train_batch_size", "1")
    two = backends.train(words, backend, 2)
    for first, second in zip(terms(two), terms(one), strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-4)
    assert terms(one)[1]["loss/orthogonality"] > 0
    assert update_distance(weights(two), weights(one), start_weights) <= 2e-4
