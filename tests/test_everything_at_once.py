"""NPO with the invariance penalty, a mask, Sophia and token selection in one run; with LoRA all but the mask."""

import json
import shutil

import pytest
import torch
from backends import distance, train
from test_equivalence import UPDATE_TOLERANCE
from test_ilu_runs import ilu
from test_weight_mask import written
from test_weight_mask_runs import assert_held, mask_of
from tiny_world import command, terms, weights

from llm_unlearn.cli.unlearn import main
from llm_unlearn.models import model_fingerprint

SELECTION = ["--token_selection", "keywords", "--keyword_regex", r"\b(the|of|was|is|in|a)\b|[A-Z]\w+"]
SOPHIA = [
    "--unlearn_optimizer",
    "sophia",
    "--hessian_interval",
    "2",
    "--learning_rate",
    "1e-3",
    "--weight_decay",
    "0.1",
]
LORA = ["--use_peft", "True", "--lora_dropout", "0"]
EXPECTED = {"loss/forget", "loss/retain", "loss/ilu"}


def words_of(world, data, folder, *flags):
    """Return the words of three steps of four rows, without the plain SGD of `command`."""
    words = command(world, "npo", folder, *ilu(data), *SELECTION, *flags)
    place = words.index("--optim")
    return [*words[:place], *words[place + 2 :], *SOPHIA, "--max_grad_norm", "0.5"]


@pytest.fixture
def mask(start_weights):
    return mask_of(start_weights)


@pytest.fixture
def with_mask(mask, tiny_world, tmp_path):
    path = tmp_path / "mask.safetensors"
    written(path, mask, model_hash=model_fingerprint(tiny_world["model"]), score="random")
    return ["--weight_mask", path]


@pytest.mark.full
@pytest.mark.parametrize("lora", [False, True], ids=["mask", "lora"])
def test_it_runs_and_resumes(lora, mask, with_mask, sums, tiny_world, start_weights, tmp_path):
    flags = LORA if lora else with_mask
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    words = words_of(tiny_world, sums, tmp_path / "out", *flags, *saving)
    assert main(words) == 0
    whole, logged = weights(tmp_path / "out"), terms(tmp_path / "out")
    assert len(logged) == 3 and all(set(log) == EXPECTED for log in logged)
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert any(0 < log["optimizer/clipped_share"] <= 1 for log in history if "optimizer/clipped_share" in log)
    record = json.loads((tmp_path / "out/unlearning.json").read_text())
    assert 0 < record["token_selection"]["share"] < 1
    if not lora:
        assert_held(tmp_path / "out", start_weights, mask)
    for step in (2, 3):
        shutil.rmtree(tmp_path / f"out/checkpoint-{step}")
    assert main([*words, "--resume_from_checkpoint", "auto"]) == 0
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "out").items())
    assert terms(tmp_path / "out") == logged


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
@pytest.mark.parametrize("lora", [False, True], ids=["mask", "lora"])
def test_two_processes_equal_one(
    lora,
    backend,
    mask,
    with_mask,
    sums,
    tiny_world,
    start_weights,
    tmp_path,
    record_property,
):
    flags = LORA if lora else with_mask
    one = train(words_of(tiny_world, sums, tmp_path / "one", *flags))
    two = train(words_of(tiny_world, sums, tmp_path / "two", *flags, "--per_device_train_batch_size", "2"), backend, 2)
    found = distance(two, one, start_weights)
    record_property("deviation", [backend, "everything at once", found])
    assert found <= UPDATE_TOLERANCE
    for first, second in zip(terms(two), terms(one), strict=True):
        assert first == pytest.approx(second, rel=1e-4, abs=1e-5)
    if not lora:
        assert_held(two, start_weights, mask)


def test_a_mask_of_adapters_is_refused(with_mask, sums, tiny_world, tmp_path, capsys):
    assert main(words_of(tiny_world, sums, tmp_path / "out", *with_mask, *LORA)) == 2
    assert "with adapters none of them does" in capsys.readouterr().err.splitlines()[-1]
