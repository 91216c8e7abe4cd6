"""A run that is killed and resumed equals the unbroken one, and only a complete checkpoint is ever used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint_manifest import flip_a_bit, truncate
from tiny_world import command, terms, weights
from transformers.trainer_pt_utils import safe_globals as random_states

from llm_unlearn.checkpoints import incompleteness, write_manifest
from llm_unlearn.cli.unlearn import main
from llm_unlearn.errors import UserError
from llm_unlearn.resuming import METHOD_STATE, find_checkpoint, require_same_run

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


def history(folder):
    """Return every line of the log of a run, without what depends on the clock or on where the run was cut."""
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    clock = ("runtime", "per_second", "train_loss", "total_flos")
    lines = [{key: log[key] for key in log if not any(word in key for word in clock)} for log in state["log_history"]]
    return [line for line in lines if line.keys() - {"epoch", "step"}]


def assert_same_checkpoint(first, second):
    """Weights, optimizer, schedule, random state and log of two checkpoints are equal to the bit."""
    with random_states():
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            assert_same(*(torch.load(folder / name, weights_only=True) for folder in (first, second)))
    assert bit_equal(weights(first), weights(second))
    assert history(first) == history(second)


def assert_same(first, second):
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        first, second = list(first.values()), list(second.values())
    if isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert (first == second) if not hasattr(first, "shape") else (first == second).all()


BY_TWO = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]


@pytest.fixture(scope="module")
def unbroken(tiny_world, tmp_path_factory):
    """Function that trains a method to the end, once, saving each step, and returns where."""
    folder = tmp_path_factory.mktemp("unbroken")

    def train(method, extra):
        if not (folder / method).exists():
            assert main(command(tiny_world, method, folder / method, *FLAGS, *extra, *BY_TWO, *SAVING)) == 0
        return folder / method

    return train


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
def test_resume_is_bit_equal(method, extra, stop, tiny_world, tmp_path, unbroken):
    whole, part = unbroken(method, extra), tmp_path / "part"
    steps = len(terms(whole))
    shutil.copytree(whole, part)
    for number in range(stop + 1, steps + 1):
        shutil.rmtree(part / f"checkpoint-{number}")
    resumed = [*FLAGS, *extra, *BY_TWO, *SAVING, "--resume_from_checkpoint", "auto"]
    assert main(command(tiny_world, method, part, *resumed)) == 0
    assert bit_equal(weights(part), weights(whole))
    assert history(part) == history(whole)
    assert_same_checkpoint(part / f"checkpoint-{steps}", whole / f"checkpoint-{steps}")


@pytest.fixture(scope="module")
def example(tiny_world, tmp_path_factory):
    """A finished run with its checkpoints, to look at."""
    folder = tmp_path_factory.mktemp("example") / "out"
    assert main(command(tiny_world, "grad_diff", folder, *FLAGS, *SAVING)) == 0
    return folder


@pytest.fixture
def finished(example, tmp_path):
    """A copy of it, to resume in."""
    return shutil.copytree(example, tmp_path / "out")


KINDS = [
    "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "unlearning_state.json",
    "manifest.json",
]  # fmt: skip
DAMAGE = {
    "missing": Path.unlink,
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "flipped": flip_a_bit,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_of_each_kind_is_passed_over_by_name_or_refused(kind, damage, example, tmp_path, caplog):
    for number in (5, 6):
        shutil.copytree(example / f"checkpoint-{number}", tmp_path / f"checkpoint-{number}")
    DAMAGE[damage](tmp_path / "checkpoint-6" / kind)
    assert find_checkpoint("auto", tmp_path) == str(tmp_path / "checkpoint-5")
    (message,) = caplog.messages
    assert message.startswith(f"passing over {tmp_path / 'checkpoint-6'}: ") and kind in message
    with pytest.raises(UserError, match=f"checkpoint-6' cannot be used: .*{kind}"):
        find_checkpoint(str(tmp_path / "checkpoint-6"), tmp_path)


def test_a_run_whose_newest_checkpoint_lost_its_optimizer_ends_as_the_unbroken_one(
    example, tiny_world, tmp_path, caplog
):
    """transformers itself resumes without a word, and with a fresh optimizer."""
    shutil.copytree(example, tmp_path / "out")
    (tmp_path / "out/checkpoint-6/optimizer.pt").unlink()
    words = command(tiny_world, "grad_diff", tmp_path / "out", *FLAGS, *SAVING, "--resume_from_checkpoint", "True")
    assert main(words) == 0
    assert any("checkpoint-6" in message and "optimizer.pt is missing" in message for message in caplog.messages)
    assert bit_equal(weights(tmp_path / "out"), weights(example))


@pytest.mark.parametrize(
    "changed, field",
    [
        (["--seed", "7"], "seed"),
        (["--gradient_accumulation_steps", "2"], "rows_per_step"),
        (["--retain_weight", "2"], "settings differ in retain_weight"),
        (["--max_length", "100"], "settings differ in max_length"),
        (["--learning_rate", "1e-4"], "settings differ in learning_rate (was 0.001 and is 0.0001)"),
        (
            ["--optim", "sgd", "--weight_decay", "0.1"],
            "optim (was adamw_torch and is sgd), weight_decay (was 0.0 and is",
        ),
        (["--lr_scheduler_type", "constant"], "settings differ in lr_scheduler_type (was linear and is constant)"),
        (["--warmup_ratio", "0.5"], "warmup_steps (was 0 and is 0.5)"),
        (["--max_grad_norm", "1"], "settings differ in max_grad_norm"),
        (["--train_sampling_strategy", "random"], "settings differ in train_sampling_strategy"),
        (["--bf16", "True"], "settings differ in bf16"),
        (["--use_peft", "True"], "adapters differ in default"),
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


def test_a_longer_run_continues_with_a_warning(finished, tiny_world, caplog):
    words = command(tiny_world, "grad_diff", finished, *FLAGS, "--num_train_epochs", "3")
    assert main([*words, "--resume_from_checkpoint", "True"]) == 0
    warning = "num_train_epochs (was 2.0 and is 3.0): the learning-rate schedule is that of the new length from here on"
    assert any(message.startswith(warning) for message in caplog.messages)
    logged = history(finished)
    assert len(logged) == 9 and [log["learning_rate"] for log in logged[6:]] != [0, 0, 0]


def test_a_constant_schedule_may_be_prolonged_to_what_a_longer_run_would_have_been(tiny_world, tmp_path):
    def train(name, *flags):
        words = command(tiny_world, "grad_diff", tmp_path / name, *FLAGS, *SAVING, "--lr_scheduler_type", "constant")
        # A longer run asks a cached reference in other batches, and so gets other roundings.
        assert main([*words, "--retain_loss", "nll", *flags]) == 0
        return weights(tmp_path / name)

    whole = train("whole")
    train("part", "--max_steps", "2")
    assert bit_equal(train("part", "--resume_from_checkpoint", "auto"), whole)


def test_the_numbers_of_the_command_line_hold_after_a_resume(tiny_world, tmp_path):
    """transformers takes logging_steps, save_steps and eval_steps from the checkpoint."""
    assert main(command(tiny_world, "grad_diff", tmp_path / "out", *FLAGS, *SAVING, "--max_steps", "2")) == 0
    words = command(tiny_world, "grad_diff", tmp_path / "out", *FLAGS, "--save_strategy", "steps", "--save_steps", "3")
    assert main([*words, "--logging_steps", "2", "--resume_from_checkpoint", "auto"]) == 0
    left = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert left == ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-6"]
    assert [log["step"] for log in history(tmp_path / "out")] == [1, 2, 4, 6]


def test_a_random_state_that_is_missing_is_said(finished, tiny_world, caplog):
    """As after a change of the number of processes."""
    (finished / "checkpoint-6/rng_state.pth").unlink()
    write_manifest(finished / "checkpoint-6")
    words = command(tiny_world, "grad_diff", finished, *FLAGS, "--resume_from_checkpoint", "True")
    assert main(words) == 0
    said = [message for message in caplog.messages if "rng_state" in message]
    assert said == [
        f"'{finished / 'checkpoint-6'}' holds no rng_state.pth: what is drawn at random, dropout for example, differs "
        "from the unbroken run"
    ]


def test_under_zero_the_number_of_processes_must_be_the_same(example):
    before = json.loads((example / "checkpoint-6/unlearning_state.json").read_text())
    require_same_run(example / "checkpoint-6", {**before, "processes": 2})
    with pytest.raises(UserError, match="backend was one process or DDP and is ZeRO-2; start anew"):
        require_same_run(example / "checkpoint-6", {**before, "backend": "ZeRO-2", "processes": 2})


# ---- What a method carries ----


DUAL = "dual_method:DualTrainer"


@pytest.fixture(scope="module")
def dual(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual") / "out"
    assert main(command(tiny_world, DUAL, folder, *FLAGS, *SAVING, *BY_TWO)) == 0
    return folder


@pytest.mark.parametrize("stop", [2, 3, 4], ids=["mid_epoch_1", "epoch_end", "mid_epoch_2"])
def test_the_state_of_a_method_is_resumed_bit_for_bit(stop, dual, tiny_world, tmp_path):
    """A dual variable that every step updates and that weighs a term of the loss."""
    variables = [load_file(dual / f"checkpoint-{step}" / METHOD_STATE)["dual"].item() for step in range(1, 7)]
    assert len({1.0, *variables}) == 7
    shutil.copytree(dual, tmp_path / "out")
    for number in range(stop + 1, 7):
        shutil.rmtree(tmp_path / f"out/checkpoint-{number}")
    words = command(tiny_world, DUAL, tmp_path / "out", *FLAGS, *SAVING, *BY_TWO, "--resume_from_checkpoint", "auto")
    assert main(words) == 0
    assert_same_checkpoint(tmp_path / "out/checkpoint-6", dual / "checkpoint-6")
    first, second = (load_file(folder / "checkpoint-6" / METHOD_STATE) for folder in (tmp_path / "out", dual))
    assert bit_equal(first, second) and second["seen"].tolist() == [10, 10]


@pytest.mark.parametrize(
    "name, said",
    [
        ("OtherDualTrainer", "its method_state.safetensors lacks multiplier"),
        ("LongerDualTrainer", "the shape of seen in method_state.safetensors was (2,) and is (4,)"),
        ("StatelessTrainer", "its method_state.safetensors holds dual, seen, which this run does not have"),
    ],
)
def test_the_state_of_another_method_is_refused_by_name(name, said, dual, tiny_world, tmp_path, capsys):
    shutil.copytree(dual, tmp_path / "out")
    words = command(tiny_world, f"dual_method:{name}", tmp_path / "out", *FLAGS, *BY_TWO)
    assert main([*words, "--resume_from_checkpoint", "auto"]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_without_the_state_of_its_method_is_refused_by_name(dual, tiny_world, tmp_path, capsys):
    shutil.copytree(dual, tmp_path / "out")
    (tmp_path / "out/checkpoint-6" / METHOD_STATE).unlink()
    write_manifest(tmp_path / "out/checkpoint-6")
    words = command(tiny_world, DUAL, tmp_path / "out", *FLAGS, *BY_TWO, "--resume_from_checkpoint", "auto")
    assert main(words) == 2
    assert "it has no method_state.safetensors, which holds dual, seen" in capsys.readouterr().err.splitlines()[-1]


def test_a_flipped_bit_in_the_state_of_a_method_is_noticed(dual, tmp_path):
    shutil.copytree(dual, tmp_path / "out")
    path = tmp_path / "out/checkpoint-6" / METHOD_STATE
    state = load_file(path)
    save_file({**state, "dual": state["dual"] + 1e-9}, path)
    assert incompleteness(path.parent) == f"{METHOD_STATE} is not as it was written"


def test_a_method_without_state_writes_no_file(example):
    assert not list(example.rglob(METHOD_STATE))
