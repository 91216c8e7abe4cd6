"""Two processes equal one, under DDP, FSDP2, ZeRO-2 and ZeRO-3: one run for each backend and family of methods."""

import json
import shutil
import subprocess
import sys

import pytest
import ranks
import torch
from backends import BACKENDS, ZERO3, distance, start, train
from test_acl2024 import SEVEN, published
from test_equivalence import UPDATE_TOLERANCE, assert_terms_agree
from tiny_world import command, terms, weights

from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.synthetic import write_world

LORA = ["--use_peft", "True", "--lora_dropout", "0"]
# Rows of a micro-batch on each of two processes: four rows a step.
KINDS = {
    "npo_kl": ("npo", ["--retain_loss", "kl", "--gradient_accumulation_steps", "2"], 1),
    "ascent_kl": ("ascent_plus_kl_divergence", [], 2),
    "lora": ("npo", LORA, 2),
    "adamw": ("grad_diff", ["--optim", "adamw_torch", "--learning_rate", "1e-4"], 2),
}
ONLY_DDP = {"pooled": ("ascent_plus_descent", [], 2), "labels": ("random_label", [], 2), "join": ("finetune", [], 2)}
FULL_SUITE = ["--do_eval", "True", "--eval_strategy", "steps", "--eval_steps", "3", "--eval_suite", "full"]
TWO_ROWS = ["--per_device_train_batch_size", "2"]
pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def one(tiny_world, tmp_path_factory):
    """Function of (name, method, flags) that runs on one process, once, with the whole step in one batch."""
    folder, done = tmp_path_factory.mktemp("one"), set()

    def run(name, method, flags):
        if name not in done:
            flags = [flag for flag in flags if flag not in ("--gradient_accumulation_steps", "2")]
            train(command(tiny_world, method, folder / name, *flags))
            done.add(name)
        return folder / name

    return run


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(backend, kind, tiny_world, one, start_weights, tmp_path):
    folder, reference = check(backend, kind, tiny_world, one, start_weights, tmp_path)
    if kind == "npo_kl":
        the_checkpoint_reloads(folder, reference)


@pytest.mark.parametrize("kind", ONLY_DDP)
def test_other_methods_under_ddp(kind, tiny_world, one, start_weights, tmp_path):
    check("ddp", kind, tiny_world, one, weights(tiny_world["base"]) if kind == "join" else start_weights, tmp_path)


def check(backend, kind, world, one, start_weights, tmp_path):
    """The backend that was asked for ran, and its terms and its update are those of one process."""
    method, flags, batch_size = {**KINDS, **ONLY_DDP}[kind]
    words = command(world, method, tmp_path / kind, *flags, "--per_device_train_batch_size", batch_size)
    found, reference = train(words, backend, processes=2), one(kind, method, flags)
    is_adamw = kind == "adamw"
    assert_terms_agree(terms(found), terms(reference), 1e-4 if is_adamw else 1e-5)
    if not is_adamw:
        assert distance(found, reference, start_weights) <= UPDATE_TOLERANCE
    return found, reference


def the_checkpoint_reloads(folder, reference):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    logits = model(torch.tensor([[1, 5, 9]])).logits
    other = AutoModelForCausalLM.from_pretrained(reference)(torch.tensor([[1, 5, 9]])).logits
    assert torch.allclose(logits, other, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_full_suite_during_training_scores_sharded_models_alike(backend, tiny_world, one, tmp_path):
    """Probabilities, memorization and generations of the model in mid-training, however its weights are spread."""

    def scores(folder):
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        (log,) = [log for log in history if "eval_loss" in log]
        return {name: value for name, value in log.items() if "/" in name}

    words = command(tiny_world, "grad_diff", tmp_path / "suite", *FULL_SUITE, *TWO_ROWS)
    found, expected = scores(train(words, backend, processes=2)), scores(one("suite", "grad_diff", FULL_SUITE))
    assert {"eval_forget/probability", "eval_retain/rouge_l_recall", "eval_forget/extraction_strength"} <= set(expected)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("method", SEVEN)
def test_the_seven_published_commands_under_fsdp2(method, tiny_world, tmp_path):
    write_world(tmp_path / "data")
    words = published(tiny_world["model"], tmp_path / "data", "github", method, 3)
    words += ["--output_dir", str(tmp_path / "out"), "--tokenized_dataset", "nowhere"]
    outcome = ranks.run(main, words, processes=2, fsdp=True)
    assert outcome.codes == [0, 0], outcome
    record = json.loads((tmp_path / "out/unlearning.json").read_text())
    assert record["backend"]["distributed_type"] == "FSDP" and record["backend"]["processes"] == 2
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_computes_policy_and_reference_alike(backend, tiny_world, tmp_path):
    """NPO starts at 2/beta log 2 and KL at 0 only where both run in the same precision."""
    flags = ["--bf16", "True", "--retain_loss", "kl", "--max_steps", "1"]
    folder = train(command(tiny_world, "npo", tmp_path / "out", *flags), backend, processes=2)
    first = terms(folder)[0]
    assert first["loss/forget"] == pytest.approx(13.8629436, abs=2e-2)
    assert abs(first["loss/retain"]) < 2e-6
    assert {value.dtype for value in weights(folder).values()} == {torch.float32}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_diverging_run_stops_on_every_rank_and_saves_nothing(backend, tiny_world, tmp_path):
    words = command(tiny_world, "gradient_ascent", tmp_path / "out", "--learning_rate", "1e30", *TWO_ROWS)
    outcome = start(words, backend, processes=2)
    assert outcome.codes == [1, 1], outcome
    assert all("NonFiniteError" in said and "is not finite at step 2" in said for said in outcome.said), outcome
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_the_users_mistake_is_said_once_and_loses_nothing(tiny_world, tmp_path):
    """A malformed row on two processes: rank 0 says it, every rank stops with 2."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "a"}\n')
    outcome = start(command({**tiny_world, "forget": str(bad)}, "npo", tmp_path / "out"), processes=2)
    assert outcome.codes == [2, 2], outcome
    assert "bad.jsonl" in outcome.said[0].splitlines()[-1] and "bad.jsonl" not in outcome.said[1]
    assert not (tmp_path / "out").exists()


SAVING = ["--optim", "adamw_torch", "--learning_rate", "1e-3", "--save_strategy", "steps", "--save_steps", "1"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_resume_on_two_processes_is_bit_equal(backend, tiny_world, tmp_path):
    """A whole run of three steps, and its copy that lost the last one and was resumed."""
    words = command(tiny_world, "npo", tmp_path / "whole", *SAVING, *TWO_ROWS)
    whole, part = train(words, backend, processes=2), tmp_path / "part"
    shutil.copytree(whole, part)
    last = max(part.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    words = command(tiny_world, "npo", part, *SAVING, *TWO_ROWS, "--resume_from_checkpoint", "auto")
    assert terms(train(words, backend, processes=2)) == terms(whole)
    assert_bit_equal(part, whole)


def test_torchrun_does_what_forked_ranks_do(tiny_world, tmp_path):
    """The true launcher and the true script; here each rank draws its own seed of Python's hashes."""
    flags = [*TWO_ROWS, *ZERO3]
    words = [str(word) for word in command(tiny_world, "npo", tmp_path / "torchrun", *flags)]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        f"--master_port={ranks.free_port()}",
    ]
    done = subprocess.run(
        [*launcher, str(ranks.ROOT / "run_unlearn.py"), *words], env=ranks.ENVIRONMENT, cwd=ranks.ROOT,
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    forked = train(command(tiny_world, "npo", tmp_path / "forked", *TWO_ROWS), "zero3", processes=2)
    assert terms(tmp_path / "torchrun") == terms(forked)
    assert_bit_equal(tmp_path / "torchrun", forked)


def assert_bit_equal(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
