"""Primal-dual unlearning: margin and dual weight by hand, resumed, however a step is cut, the same on every rank."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_objectives import PRECISIONS, N, V, check, leaf, numbers
from test_reference import batch_of, make_trainer
from tiny_world import command, terms, weights

from llm_unlearn.cli.unlearn import main
from llm_unlearn.errors import UserError
from llm_unlearn.methods.pdu import PDUArguments
from llm_unlearn.objectives.distillation import squared_logit_margin

FLAGS = ["--retain_bound", "0.2", "--retain_weight", "1", "--dual_step_size", "0.5"]


def logged(folder):
    """Return [(loss/retain, dual_weight)] of every step."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [(log["loss/retain"], log["dual_weight"]) for log in history if "loss" in log]


# ---- The margin ----


def test_the_margin_worked_out_by_hand():
    """(3, 0, 0): the mean is 1, so L = 4; dL = 2 * 2 * (1 - 1/3, -1/3, -1/3). Equal logits give 0."""
    logits = leaf([[3.0, 0.0, 0.0], [5.0, 5.0, 5.0]])
    loss = squared_logit_margin(logits)
    assert loss.tolist() == [4.0, 0.0]
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient[0].tolist() == pytest.approx([8 / 3, -4 / 3, -4 / 3]) and gradient[1].eq(0).all()


@pytest.mark.parametrize(("dtype", "rel"), PRECISIONS)
def test_the_margin_agrees_with_numpy(dtype, rel):
    logits = leaf(numbers(N, V, seed=1), dtype)
    z = logits.detach().double().numpy()
    margin = z.max(-1) - z.mean(-1)
    gradient = 2 * margin[:, None] * (np.eye(V)[z.argmax(-1)] - 1 / V)
    check(squared_logit_margin(logits), logits, margin**2, gradient, rel)
    shifted = squared_logit_margin(logits.detach() + 3)
    # The shift costs a digit of the difference.
    assert torch.allclose(shifted, squared_logit_margin(logits.detach()), rtol=100 * rel)


# ---- The dual weight ----


def test_the_dual_weight_follows_its_rule_after_the_warm_up(tiny_world, tmp_path):
    """Three steps an epoch and one epoch of warm-up: lambda stays 1, then moves by .5 * (retain term - .2) a step."""
    flags = [*FLAGS, "--num_train_epochs", "3", "--dual_warmup_epochs", "1", "--learning_rate", "0.001"]
    assert main(command(tiny_world, "pdu", tmp_path / "out", *flags)) == 0
    found, dual = logged(tmp_path / "out"), 1.0
    assert len(found) == 9 and max(retain for retain, _ in found) > 0.2
    for step, (retain, weight) in enumerate(found, start=1):
        dual = dual if step <= 3 else max(0.0, dual + 0.5 * (retain - 0.2))
        # The logged term is summed in float32.
        assert weight == pytest.approx(dual, rel=1e-6), step
    assert len({weight for _, weight in found}) == 7


def test_the_loss_is_the_margin_and_the_retain_term_times_lambda(tmp_path):
    trainer = make_trainer("pdu", tmp_path, retain_bound=0.1, retain_weight=2.0, forget_weight=3.0)
    batch = batch_of(trainer)
    trainer.dual_weight = torch.tensor(0.25, dtype=torch.float64)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    stream = batch["forget"]
    logits = trainer.model(input_ids=stream["input_ids"], attention_mask=stream["attention_mask"]).logits
    margins = squared_logit_margin(logits[:, :-1][outputs["forget"].mask])
    retain = -outputs["retain"].logps.sum() / outputs["retain"].mask.sum()
    assert loss.item() == pytest.approx((3 * margins.mean() + 0.25 * retain).item(), rel=1e-5)
    assert trainer.weight_of("retain", trainer.args) == 2.0


def test_a_weight_of_zero_comes_back_when_the_bound_is_broken(tmp_path):
    """The retain stream runs at weight 0 too, and has no gradient then."""
    trainer = make_trainer("pdu", tmp_path, retain_bound=1e-3, retain_weight=1e-9, dual_warmup_epochs=0.0)
    trainer.dual_weight = torch.zeros((), dtype=torch.float64)
    assert trainer.runs("retain")
    trainer.train()
    assert trainer.dual_weight > 1.0
    assert all("loss/retain" in log for log in trainer.state.log_history if "loss" in log)


def test_far_below_the_bound_the_weight_falls_to_zero_and_not_below(tmp_path):
    trainer = make_trainer("pdu", tmp_path, retain_bound=100.0, retain_weight=50.0, dual_warmup_epochs=0.0)
    trainer.train()
    assert trainer.dual_weight == 0


@pytest.mark.parametrize("backward", ["together", "apart"])
def test_accumulation_does_not_change_the_dual_weight(backward, tiny_world, start_weights, tmp_path):
    """The published code moves its weight once for each micro-batch, by a mean of its own."""
    flags = [*FLAGS, "--dual_warmup_epochs", "0"]
    flags += ["--sequential_backward", "True"] if backward == "apart" else []
    assert main(command(tiny_world, "pdu", tmp_path / "whole", *FLAGS, "--dual_warmup_epochs", "0")) == 0
    cut = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"]
    assert main(command(tiny_world, "pdu", tmp_path / "cut", *flags, *cut)) == 0
    for (retain, weight), (expected, expected_weight) in zip(
        logged(tmp_path / "cut"), logged(tmp_path / "whole"), strict=True
    ):
        assert retain == pytest.approx(expected, rel=1e-5) and weight == pytest.approx(expected_weight, rel=1e-5)
    assert any(weight != 1 for _, weight in logged(tmp_path / "cut"))


def test_a_resumed_run_has_the_same_dual_weight_to_the_bit(tiny_world, tmp_path):
    flags = [*FLAGS, "--dual_warmup_epochs", "0", "--num_train_epochs", "2", "--optim", "adamw_torch"]
    flags += ["--save_strategy", "steps", "--save_steps", "1", "--learning_rate", "1e-3"]
    assert main(command(tiny_world, "pdu", tmp_path / "whole", *flags)) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for number in (3, 4, 5, 6):
        shutil.rmtree(tmp_path / f"part/checkpoint-{number}")
    saved = load_file(tmp_path / "part/checkpoint-2/method_state.safetensors")["dual_weight"]
    assert saved.item() == logged(tmp_path / "whole")[1][1] != 1
    assert main(command(tiny_world, "pdu", tmp_path / "part", *flags, "--resume_from_checkpoint", "auto")) == 0
    assert logged(tmp_path / "part") == logged(tmp_path / "whole")
    found, expected = weights(tmp_path / "part"), weights(tmp_path / "whole")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "flags, reason",
    [
        ({}, "pdu needs --retain_bound NATS"),
        ({"retain_bound": -1.0}, "pdu needs --retain_bound NATS"),
        ({"retain_bound": math.nan}, "pdu needs --retain_bound NATS"),
        ({"retain_bound": 1.0, "retain_loss": "none"}, "pdu bounds a retain term"),
        ({"retain_bound": 1.0, "retain_weight": 0.0}, "pdu bounds a retain term"),
        ({"retain_bound": 1.0, "retain_schedule": "0:1"}, "--retain_schedule has no effect with pdu"),
        ({"retain_bound": 1.0, "dual_step_size": 0.0}, "--dual_step_size must be > 0"),
    ],
)
def test_bad_settings_are_refused(flags, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        PDUArguments(output_dir=str(tmp_path), use_cpu=True, **flags)


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero3"])
def test_two_ranks_have_one_dual_weight_and_that_of_one_process(backend, tiny_world, start_weights, tmp_path):
    """Each rank checks the other's by what is gathered; both follow the loss of all rows."""
    import backends

    flags = [*FLAGS, "--dual_warmup_epochs", "0", "--num_train_epochs", "2"]
    one = backends.train(command(tiny_world, "pdu", tmp_path / "one", *flags))
    cut = [*flags, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    two = backends.train(command(tiny_world, "pdu", tmp_path / "two", *cut), backend, 2, prepare=agree)
    assert [step for step, _ in enumerate(terms(two))] == [step for step, _ in enumerate(terms(one))]
    for (retain, weight), (expected, expected_weight) in zip(logged(two), logged(one), strict=True):
        assert retain == pytest.approx(expected, rel=1e-4) and weight == pytest.approx(expected_weight, rel=1e-4)
    assert any(weight != 1 for _, weight in logged(two))
    assert backends.distance(two, one, start_weights) < 5e-4


def agree(rank):
    """Make every rank compare its dual weight with the others' after each update."""
    from accelerate.utils import gather_object

    from llm_unlearn.methods.pdu import PDUTrainer

    original = PDUTrainer.update_dual_weight

    def update(self):
        original(self)
        found = gather_object([float(self.dual_weight)])
        assert len(found) == 2 and len(set(found)) == 1, found

    PDUTrainer.update_dual_weight = update
