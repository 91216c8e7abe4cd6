"""A run that is killed and resumed equals the unbroken one, and only a complete checkpoint is ever used."""

import json
import shutil

import pytest
import torch
from tiny_world import command, terms, weights

from llm_unlearn.cli.unlearn import main

FLAGS = [
    "--optim",
    "adamw_torch",
    "--learning_rate",
    "1e-3",
    "--num_train_epochs",
    "2",
    "--lr_scheduler_type",
    "linear",
]
SAVING = ["--save_strategy", "steps", "--save_steps", "1"]


def bit_equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "method, extra",
    [
        ("npo", ["--use_peft", "True", "--lora_dropout", "0.1"]),
        ("ascent_plus_kl_divergence", ["--positive_ratio", "2"]),
        ("random_label", []),
        ("finetune", []),
    ],
)
@pytest.mark.parametrize("stop", [2, 3, 4], ids=["mid_epoch_1", "epoch_end", "mid_epoch_2"])
def test_resume_is_bit_equal(method, extra, stop, tiny_world, tmp_path):
    accumulation = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    assert main(command(tiny_world, method, tmp_path / "whole", *FLAGS, *extra, *accumulation, *SAVING)) == 0
    steps = len(terms(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for number in range(stop + 1, steps + 1):
        shutil.rmtree(tmp_path / f"part/checkpoint-{number}")
    resumed = [*FLAGS, *extra, *accumulation, *SAVING, "--resume_from_checkpoint", "auto"]
    assert main(command(tiny_world, method, tmp_path / "part", *resumed)) == 0
    assert bit_equal(weights(tmp_path / "part"), weights(tmp_path / "whole"))
    assert terms(tmp_path / "part") == terms(tmp_path / "whole")


@pytest.fixture
def finished(tiny_world, tmp_path):
    assert main(command(tiny_world, "grad_diff", tmp_path / "out", *FLAGS, *SAVING)) == 0
    return tmp_path / "out"


@pytest.mark.parametrize("lost", ["optimizer.pt", "model.safetensors", "manifest.json", "rng_state.pth"])
def test_a_checkpoint_with_a_lost_file_is_passed_over(lost, finished, tiny_world, caplog):
    whole = weights(finished)
    (finished / "checkpoint-6" / lost).unlink()
    assert main(command(tiny_world, "grad_diff", finished, *FLAGS, *SAVING, "--resume_from_checkpoint", "True")) == 0
    assert any("checkpoint-6" in message and lost in message for message in caplog.messages)
    assert bit_equal(weights(finished), whole)


def test_a_half_written_file_is_passed_over(finished, tiny_world, caplog):
    path = finished / "checkpoint-6/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert main(command(tiny_world, "grad_diff", finished, *FLAGS, *SAVING, "--resume_from_checkpoint", "auto")) == 0
    assert any("model.safetensors is not as it was written" in message for message in caplog.messages)


@pytest.mark.parametrize(
    "changed, field",
    [
        (["--seed", "7"], "seed"),
        (["--gradient_accumulation_steps", "2"], "rows_per_step"),
        (["--retain_weight", "2"], "settings differ in retain_weight"),
        (["--max_length", "100"], "settings differ in max_length"),
        (None, "streams"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(changed, field, finished, tiny_world, capsys):
    world = tiny_world if changed else {**tiny_world, "retain": tiny_world["forget"]}
    words = command(world, "grad_diff", finished, *FLAGS, "--resume_from_checkpoint", "True", *(changed or []))
    assert main(words) == 2
    assert field in capsys.readouterr().err.splitlines()[-1]


def test_nothing_to_resume(tiny_world, tmp_path, capsys):
    assert main(command(tiny_world, "npo", tmp_path / "a", "--resume_from_checkpoint", "True", "--max_steps", 1)) == 2
    assert "pass auto" in capsys.readouterr().err
    assert main(command(tiny_world, "npo", tmp_path / "b", "--resume_from_checkpoint", "auto", "--max_steps", 1)) == 0


def test_old_checkpoints_go_only_after_the_new_one_is_complete(tiny_world, tmp_path):
    words = command(tiny_world, "npo", tmp_path / "out", *FLAGS, *SAVING, "--save_total_limit", "2")
    assert main(words) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    listed = json.loads((tmp_path / "out/checkpoint-6/manifest.json").read_text())["files"]
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= set(listed)


def test_resuming_a_finished_run_trains_no_further(finished, tiny_world):
    whole, logged = weights(finished), terms(finished)
    words = command(tiny_world, "grad_diff", finished, *FLAGS, *SAVING, "--resume_from_checkpoint", "auto")
    assert main([*words, "--lr_scheduler_type", "linear"]) == 0
    assert bit_equal(weights(finished), whole) and terms(finished) == logged


def test_resuming_in_the_middle_of_an_epoch_that_max_steps_ended(tiny_world, tmp_path):
    words = command(tiny_world, "npo", tmp_path / "out", "--max_steps", "2", *SAVING)
    assert main(words) == 0
    whole = weights(tmp_path / "out")
    assert main([*words, "--resume_from_checkpoint", "auto"]) == 0
    assert bit_equal(weights(tmp_path / "out"), whole) and len(terms(tmp_path / "out")) == 2


def test_a_checkpoint_of_another_start_model_is_refused(finished, tiny_world, capsys):
    words = command({**tiny_world, "model": tiny_world["base"]}, "grad_diff", finished, *FLAGS)
    assert main([*words, "--resume_from_checkpoint", "True"]) == 2
    assert "model was" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_without_optimizer_state_is_refused(tiny_world, tmp_path, capsys):
    words = command(tiny_world, "npo", tmp_path / "out", *FLAGS, *SAVING, "--save_only_model", "True")
    assert main(words) == 0
    assert main([*words, "--resume_from_checkpoint", "auto"]) == 2
    assert "--save_only_model" in capsys.readouterr().err.splitlines()[-1]


def test_an_older_runs_checkpoints_go_when_this_one_has_saved(tiny_world, tmp_path):
    assert main(command(tiny_world, "npo", tmp_path / "out", *FLAGS, *SAVING)) == 0
    words = command(tiny_world, "npo", tmp_path / "out", "--max_steps", "2", "--overwrite_output_dir")
    assert main(words) == 0
    assert not list((tmp_path / "out").glob("checkpoint-*"))
