"""The elements go together: a method inside the network, orthogonality, L2-SP, token selection, schedules."""

import json
import shutil

import pytest
import torch
from tiny_world import command, terms, update_distance, weights

from llm_unlearn.cli.unlearn import main

STACK = ["--regularizer", "orthogonality", "l2_sp", "--orth_coef", "0.05", "--l2sp_coef", "0.5"]
STACK += ["--token_selection", "keywords", "--keyword_regex", r"\b(the|of|was|is|in|a)\b", "--optim", "adamw_torch"]
CONSTANT = ["--orth_schedule", "constant"]
METHODS = {
    "rmu": ["--layer", "1", "--steering_coef", "2", "--retain_weight", "1"],
    "tuned_lens": ["--lens_path", "logit", "--layers", "0", "1"],
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_with_orthogonality_and_token_selection(method, tiny_world, tmp_path):
    flags = [*METHODS[method], *STACK, "--learning_rate", "1e-3", "--num_train_epochs", "3"]
    words = command(tiny_world, method, tmp_path / "out", *flags, "--save_strategy", "steps", "--save_steps", "4")
    assert main(words) == 0
    logged = terms(tmp_path / "out")
    expected = {"loss/forget", "loss/retain", "loss/orthogonality", "loss/l2_sp"}
    assert set(logged[-1]) == expected
    # Each element does its own: the forget term falls, and the weights have left the start by a finite distance.
    assert logged[-1]["loss/forget"] < logged[0]["loss/forget"]
    assert 0 < logged[-1]["loss/l2_sp"] < float("inf")
    record = json.loads((tmp_path / "out/unlearning.json").read_text())
    assert 0 < record["token_selection"]["share"] < 1
    whole = weights(tmp_path / "out")
    for name in ("checkpoint-8", "checkpoint-9"):
        shutil.rmtree(tmp_path / "out" / name, ignore_errors=True)
    assert main([*words, "--resume_from_checkpoint", "auto"]) == 0
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "out").items())


@pytest.mark.parametrize("method", METHODS)
def test_each_element_changes_the_update(method, tiny_world, start_weights, tmp_path):
    """What is left out is missed: the same run without one of the elements ends elsewhere."""
    flags = [*METHODS[method], "--learning_rate", "1e-3"]
    whole = [*flags, *STACK, *CONSTANT]
    without = {
        "orthogonality": [word for word in whole if word != "orthogonality"],
        "l2_sp": [word for word in whole if word != "l2_sp"],
        "token selection": [*flags, *STACK[:7], *STACK[-2:], *CONSTANT],
    }
    without["orthogonality"] = _drop(_drop(without["orthogonality"], "--orth_coef"), "--orth_schedule")
    without["l2_sp"] = _drop(without["l2_sp"], "--l2sp_coef")
    assert main(command(tiny_world, method, tmp_path / "whole", *whole)) == 0
    for name, words in without.items():
        assert main(command(tiny_world, method, tmp_path / name, *words)) == 0
        assert update_distance(weights(tmp_path / name), weights(tmp_path / "whole"), start_weights) > 1e-4, name


def _drop(words, flag):
    place = words.index(flag)
    return words[:place] + words[place + 2 :]
