"""ILU through the real command line: on many methods, cut in many ways, resumed, sharded, and refused."""

import json
import shutil

import backends
import pytest
import torch
from test_equivalence import assert_terms_agree
from test_resume import SAVING, bit_equal
from test_weight_mask import written
from tiny_world import METHOD_FLAGS, command, terms, update_distance, weights

from llm_unlearn.cli.unlearn import main

FIXED = ["--layer", "0", "--retain_weight", "1"]
# Of parameter gradients the change between two nearby points is rounded too.
TOLERANCE = {"logit_scale": 2e-5, "parameter_gradient": 2e-4}


def ilu(sums, *flags, weight=0.1):
    return ["--regularizer", "ilu", "--ilu_weight", weight, "--ilu_data", *sums, *flags]


def run(world, method, folder, *flags):
    assert main(command(world, method, folder, *flags)) == 0
    return folder


# ---- On methods ----


@pytest.mark.parametrize(
    "method, flags",
    [
        ("npo", []),
        ("grad_diff", ["--use_peft", "True"]),
        ("rmu", FIXED),
        pytest.param("rmu", [*FIXED, "--retain_loss", "kl"], marks=pytest.mark.full),
        pytest.param("rmu", [*FIXED, "--retain_loss", "none"], marks=pytest.mark.full),
        pytest.param("npo", ["--ilu_mode", "parameter_gradient", "--use_peft", "True"], marks=pytest.mark.full),
        pytest.param("rmu", [*FIXED, "--ilu_mode", "parameter_gradient"], marks=pytest.mark.full),
        *(pytest.param(method, [], marks=pytest.mark.full) for method in METHOD_FLAGS if method not in ("npo", "rmu")),
    ],
)
def test_it_goes_with_a_method(method, flags, sums, tiny_world, tmp_path):
    """The term is logged beside the method's own, its rows are recorded with their files, and weights move."""
    folder = run(tiny_world, method, tmp_path / "out", *flags, *ilu(sums))
    logged, record = terms(folder), json.loads((folder / "unlearning.json").read_text())
    assert all(term["loss/ilu"] > 0 for term in logged) and any(len(term) > 1 for term in logged)
    assert record["streams"]["invariance"]["rows"] == 13 and record["streams"]["invariance"]["tokens"] > 100
    assert [origin["source"] for origin in record["sources"]["invariance"]] == sums
    assert record["flags"]["ilu_data"] == sums
    if "--use_peft" not in flags:
        start = weights(tiny_world["base" if method in ("finetune", "retrain") else "model"])
        assert not bit_equal(weights(folder), start)


@pytest.mark.parametrize("mode, weight", [("logit_scale", 1), ("parameter_gradient", 0.01)])
def test_the_penalty_falls(mode, weight, sums, tiny_world, tmp_path):
    """The model, which knows its own rows alone, is far too sure of its sums."""
    flags = ["--ilu_mode", mode, "--forget_weight", "0", "--retain_loss", "kl", "--num_train_epochs", "3"]
    flags += ["--optim", "adamw_torch", "--learning_rate", "1e-3", "--per_device_train_batch_size", "10"]
    found = [
        log["loss/ilu"] for log in terms(run(tiny_world, "grad_diff", tmp_path, *flags, *ilu(sums, weight=weight)))
    ]
    assert found[-1] < 0.7 * found[0]


def test_evaluation_leaves_the_unrelated_rows_out(sums, tiny_world, tmp_path):
    flags = ["--do_eval", "True", "--eval_strategy", "epoch"]
    folder = run(tiny_world, "grad_diff", tmp_path, *flags, *ilu(sums))
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    (found,) = ({name for name in log if name.endswith("_nll")} for log in history if "eval_forget_nll" in log)
    assert found == {"eval_forget_nll", "eval_retain_nll"}


# ---- However it is cut ----


@pytest.mark.parametrize("mode", ["logit_scale", pytest.param("parameter_gradient", marks=pytest.mark.full)])
def test_accumulation_and_turns_change_nothing(mode, sums, tiny_world, start_weights, tmp_path):
    flags = ilu(sums, "--ilu_mode", mode, weight=0.01)
    shapes = {
        "4x1": ["--per_device_train_batch_size", "4"],
        "1x4": ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"],
        "2x2": ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"],
        "turns": ["--sequential_backward", "True"],
    }
    found = {name: run(tiny_world, "npo", tmp_path / name, *flags, *shape) for name, shape in shapes.items()}
    for name in ("1x4", "2x2", "turns"):
        assert_terms_agree(terms(found[name]), terms(found["4x1"]), TOLERANCE[mode])
        assert update_distance(weights(found[name]), weights(found["4x1"]), start_weights) <= TOLERANCE[mode]


def test_a_square_of_each_micro_batch_would_be_seen(sums, tiny_world, tmp_path, monkeypatch):
    """The mutation that the test above must catch."""
    from llm_unlearn.addons.invariance import LogitScale

    flags = [*ilu(sums), "--max_steps", "1", "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"]
    right = terms(run(tiny_world, "npo", tmp_path / "right", *flags))
    original = LogitScale.values
    monkeypatch.setattr(LogitScale, "values", lambda self, output, standalone=False: original(self, output, True))
    wrong = terms(run(tiny_world, "npo", tmp_path / "wrong", *flags))
    assert wrong[0]["loss/ilu"] > 1.005 * right[0]["loss/ilu"]
    assert wrong[0]["loss/forget"] == right[0]["loss/forget"]


@pytest.mark.parametrize("mode", ["logit_scale", pytest.param("parameter_gradient", marks=pytest.mark.full)])
def test_a_resumed_run_equals_the_unbroken_one(mode, sums, tiny_world, tmp_path):
    flags = [*ilu(sums, "--ilu_mode", mode), *SAVING, "--optim", "adamw_torch", "--learning_rate", "1e-3"]
    flags += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    run(tiny_world, "npo", tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"part/checkpoint-{step}")
    run(tiny_world, "npo", tmp_path / "part", *flags, "--resume_from_checkpoint", "auto")
    assert bit_equal(weights(tmp_path / "part"), weights(tmp_path / "whole"))
    assert terms(tmp_path / "part") == terms(tmp_path / "whole")


def test_a_resume_with_other_unrelated_rows_is_refused(sums, tiny_world, tmp_path, capsys):
    flags = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "1"]
    run(tiny_world, "npo", tmp_path, *ilu(sums), *flags)
    again = [*ilu(sums[:1]), *flags, "--resume_from_checkpoint", "True"]
    assert main(command(tiny_world, "npo", tmp_path, *again)) == 2
    assert "settings differ in ilu_data" in capsys.readouterr().err.splitlines()[-1]


SHARDED = [("logit_scale", name) for name in backends.BACKENDS]
SHARDED += [("parameter_gradient", name) for name in ("ddp", "fsdp2")]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "mode, backend",
    [pytest.param(*case, marks=[] if case == ("logit_scale", "zero3") else pytest.mark.full) for case in SHARDED],
)
def test_two_processes_equal_one(mode, backend, sums, tiny_world, start_weights, tmp_path):
    """Two micro-batches of one row on each of two processes make the step that four rows on one process make."""
    flags = ilu(sums, "--ilu_mode", mode, weight=0.01)
    one = run(tiny_world, "npo", tmp_path / "one", *flags)
    cut = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    two = backends.train(command(tiny_world, "npo", tmp_path / "two", *flags, *cut), backend, 2)
    assert_terms_agree(terms(two), terms(one), TOLERANCE[mode])
    assert update_distance(weights(two), weights(one), start_weights) <= TOLERANCE[mode]


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_rmu_in_two_processes_equals_one(backend, sums, tiny_world, start_weights, tmp_path):
    flags = [*ilu(sums, weight=0.01), *FIXED]
    one = run(tiny_world, "rmu", tmp_path / "one", *flags)
    cut = ["--per_device_train_batch_size", "2"]
    two = backends.train(command(tiny_world, "rmu", tmp_path / "two", *flags, *cut), backend, 2)
    assert_terms_agree(terms(two), terms(one), 1e-4)
    assert update_distance(weights(two), weights(one), start_weights) <= TOLERANCE["logit_scale"]


@pytest.mark.full
def test_in_a_gradient_filter_and_layer_by_layer(sums, tiny_world, start_weights, tmp_path):
    flags = ["--layer_step", "1", "--retain_loss", "nll", "--retain_schedule", "constant", *ilu(sums)]
    for name, more in (("filter", ["--same_sign_grads", "True"]), ("gradient", ["--ilu_mode", "parameter_gradient"])):
        folder = run(tiny_world, "sequential", tmp_path / name, *flags, *more)
        found = weights(folder)
        changed = {key for key in start_weights if not start_weights[key].equal(found[key])}
        assert changed and all(".layers." in key for key in changed)
        assert all("loss/ilu" in term for term in terms(folder))


@pytest.mark.full
@pytest.mark.parametrize("mode", TOLERANCE)
def test_weights_that_a_mask_leaves_out_stay_and_do_not_count(mode, sums, tiny_world, start_weights, tmp_path):
    """Half of one matrix is left out; by parameter gradients the penalty is then that of the others."""
    name = "model.layers.0.mlp.up_proj.weight"
    drawn = torch.rand(start_weights[name].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = {key: torch.ones(value.shape, dtype=torch.bool) for key, value in start_weights.items()} | {name: drawn}
    flags = [*ilu(sums, "--ilu_mode", mode, weight=0.01), "--optim", "adamw_torch", "--weight_decay", "0.1"]
    masked = run(
        tiny_world, "npo", tmp_path / "masked", *flags, "--weight_mask", written(tmp_path / "m.safetensors", mask)
    )
    whole = run(tiny_world, "npo", tmp_path / "whole", *flags)
    found, before = weights(masked)[name], start_weights[name]
    assert torch.equal(found[~drawn], before[~drawn]) and not torch.equal(found[drawn], before[drawn])
    ratio = terms(masked)[0]["loss/ilu"] / terms(whole)[0]["loss/ilu"]
    assert ratio == pytest.approx(1, rel=1e-6) if mode == "logit_scale" else 0.5 < ratio < 0.999


# ---- Mistakes ----


@pytest.mark.parametrize(
    "method, flags, message",
    [
        ("npo", ["--ilu_data", "gsm8k"], "--ilu_data has no effect without --regularizer ilu"),
        ("npo", ["--regularizer", "ilu", "--ilu_data", "gsm"], "unknown --ilu_data 'gsm'; did you mean 'gsm8k'?"),
        (
            "npo",
            ["--regularizer", "ilu", "--data_dir", "."],
            "--ilu_data FILE takes rows of your own in place of gsm8k",
        ),
        ("npo", ["--regularizer", "ilv"], "did you mean 'ilu'?"),
        (
            "sequential",
            [
                "--regularizer",
                "ilu",
                "--ilu_data",
                "{sums}",
                "--map",
                "lens",
                "--lens_path",
                "logit",
                "--retain_loss",
                "l2",
            ],
            "--regularizer ilu reads the output, but this run's losses end at layer 1; pass --retain_loss kl",
        ),
    ],
)
def test_mistakes(method, flags, message, sums, tiny_world, tmp_path, capsys):
    flags = [flag.format(sums=sums[0]) for flag in flags]
    assert main(command(tiny_world, method, tmp_path / "out", *flags)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.full
@pytest.mark.distributed
def test_parameter_gradients_under_deepspeed_are_refused(sums, tiny_world, tmp_path):
    words = command(tiny_world, "npo", tmp_path / "out", *ilu(sums, "--ilu_mode", "parameter_gradient"))
    outcome = backends.start(words, "zero2", 1)
    assert outcome.codes == [2]
    assert "which DeepSpeed does not hand out; pass --ilu_mode logit_scale" in outcome.said[0]
