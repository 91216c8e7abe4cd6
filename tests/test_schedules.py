"""Coefficients by progress: their numbers, what is refused, and the same by step in a run."""

import json

import pytest
from tiny_world import command

from llm_unlearn.cli.unlearn import main
from llm_unlearn.errors import UserError
from llm_unlearn.schedules import parse_schedule, schedule_factor


@pytest.mark.parametrize(
    "schedule, progress, expected",
    [
        ("constant", 0.7, 1),
        ("0:1", 0, 0),
        ("0:1", 0.25, 0.25),
        ("1:0.75", 1, 0.75),
        ("0.1:1", 0.5, 0.55),
        ("2:1", 3, 1),
    ],
)
def test_factors_by_hand(schedule, progress, expected):
    assert schedule_factor(schedule, progress) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "1", "0:0", "-1:1", "0:inf", "1:2:3", "a:b"])
def test_what_is_no_schedule_is_refused(schedule):
    with pytest.raises(UserError, match=r"--x must be constant or START:END.*is '"):
        parse_schedule(schedule, "--x")


def history(folder):
    logs = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [log for log in logs if "loss" in log]


def test_the_weights_follow_the_steps(tiny_world, tmp_path):
    """Three steps: s = 0, 1/3, 2/3. The loss is the weighed sum of the logged terms; a weight of 0 runs nothing."""
    flags = ["--forget_schedule", "1:0.25", "--retain_schedule", "0:3", "--retain_weight", "0.5"]
    assert main(command(tiny_world, "grad_diff", tmp_path / "out", *flags, "--retain_loss", "nll")) == 0
    logs = history(tmp_path / "out")
    assert [set(log) & {"loss/forget", "loss/retain"} for log in logs] == [
        {"loss/forget"}, {"loss/forget", "loss/retain"}, {"loss/forget", "loss/retain"}
    ]  # fmt: skip
    for log, forget, retain in zip(logs, (1, 0.75, 0.5), (0, 0.5, 1), strict=True):
        assert log["loss"] == pytest.approx(forget * log["loss/forget"] + retain * log.get("loss/retain", 0), abs=1e-4)


def test_a_resumed_run_has_the_weights_of_the_unbroken_one(tiny_world, tmp_path):
    import shutil

    flags = ["--retain_schedule", "0:3", "--save_strategy", "steps", "--save_steps", "1"]
    words = command(tiny_world, "grad_diff", tmp_path / "out", *flags)
    assert main(words) == 0
    whole = history(tmp_path / "out")
    shutil.rmtree(tmp_path / "out/checkpoint-3")
    assert main([*words, "--resume_from_checkpoint", "auto"]) == 0
    again = history(tmp_path / "out")
    assert [log["loss"] for log in again] == [log["loss"] for log in whole]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--forget_weight", "0", "--retain_schedule", "0:1"], "start at 0"),
        (["--retain_loss", "none", "--retain_schedule", "0:1"], "--retain_schedule has no effect"),
        (["--forget_schedule", "up"], "--forget_schedule must be constant"),
    ],
)
def test_mistakes(flags, message, tiny_world, tmp_path, capsys):
    assert main(command(tiny_world, "npo", tmp_path / "out", *flags)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
