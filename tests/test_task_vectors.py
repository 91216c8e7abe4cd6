"""Cosines of task vectors, worked out by hand, in memory and from files."""

import math

import pytest
import torch
from safetensors.torch import save_file

from llm_unlearn.attacks import task_vectors
from llm_unlearn.attacks.downstream import tensors_of
from llm_unlearn.attacks.task_vectors import Alignment, ModelTensors, layer_groups, task_vector_cosines
from llm_unlearn.checkpoint_arithmetic import CheckpointFiles
from llm_unlearn.errors import UserError

NAMES = ("model.embed_tokens.weight", "model.layers.0.mlp.weight", "model.layers.1.mlp.weight", "lm_head.weight")
TARGET = (((0.0, 0.0),), ((1.0, 1.0),), ((0.0, 0.0),), ((2.0, 2.0),))
UNLEARNED = (((1.0, 0.0),), ((1.0, 1.0),), ((0.0, 2.0),), ((2.0, 2.0),))
FINETUNED = (((0.0, 0.0),), ((1.0, 1.0),), ((2.0, 2.0),), ((2.0, 5.0),))
"""Unlearning moves by (1,0), (0,0), (0,2), (0,0), fine-tuning by (-1,0), (0,0), (2,0), (0,3)."""


class Holder:
    """Something with named parameters."""

    def __init__(self, values, dtype=torch.float32):
        self.tensors = {name: torch.tensor(value, dtype=dtype) for name, value in zip(NAMES, values, strict=True)}

    def named_parameters(self):
        return self.tensors.items()

    def save(self, folder):
        folder.mkdir()
        save_file(self.tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder


def in_memory(*values):
    return [ModelTensors(Holder(value), f"model {number}") for number, value in enumerate(values)]


def test_cosines_by_hand():
    found = task_vector_cosines(*in_memory(FINETUNED, UNLEARNED, TARGET))
    # dot = -1 + 0 + 0 + 0; |a|^2 = 1 + 4 + 9 = 14; |b|^2 = 1 + 4 = 5.
    assert found["all"].cosine == pytest.approx(-1 / math.sqrt(14 * 5), rel=1e-12)
    assert list(found) == ["all", "embeddings", "layer 0", "layer 1", "head"]
    assert found["embeddings"].cosine == -1.0
    assert found["layer 1"].cosine == 0.0
    assert found["all"].as_dict() == {
        "cosine": found["all"].cosine, "finetuning_norm": math.sqrt(14), "unlearning_norm": math.sqrt(5)
    }  # fmt: skip


def test_a_vector_of_length_zero_has_no_direction():
    found = task_vector_cosines(*in_memory(FINETUNED, UNLEARNED, TARGET))
    assert found["layer 0"].cosine is None and found["head"].cosine is None
    assert task_vector_cosines(*in_memory(UNLEARNED, UNLEARNED, TARGET))["all"].cosine is None
    assert Alignment().as_dict()["cosine"] is None
    broken = Alignment(math.nan, math.inf, 1.0).as_dict()
    assert broken == {"cosine": None, "finetuning_norm": None, "unlearning_norm": 1.0}
    assert Alignment(math.nan, math.nan, 1.0).cosine is None


def test_fine_tuning_that_goes_straight_back_or_on_is_minus_one_or_one():
    assert task_vector_cosines(*in_memory(TARGET, UNLEARNED, TARGET))["all"].cosine == pytest.approx(-1, abs=1e-12)
    on = [[[2 * u - t for u, t in zip(*rows, strict=True)] for rows in zip(*pair, strict=True)]
          for pair in zip(UNLEARNED, TARGET, strict=True)]  # fmt: skip
    assert task_vector_cosines(*in_memory(on, UNLEARNED, TARGET))["all"].cosine == pytest.approx(1, abs=1e-12)


def test_files_in_parts_say_the_same(tmp_path, monkeypatch):
    memory = in_memory(FINETUNED, UNLEARNED, TARGET)
    expected = task_vector_cosines(*memory)
    unlearned = CheckpointFiles(Holder(UNLEARNED).save(tmp_path / "unlearned"), "unlearned model")
    # All values are exact in bfloat16.
    target = CheckpointFiles(Holder(TARGET, torch.bfloat16).save(tmp_path / "target"), "target model")
    monkeypatch.setattr(task_vectors, "CHUNK_ELEMENTS", 1)
    assert task_vector_cosines(memory[0], unlearned, target) == expected


def test_sums_are_of_float64():
    # In float32, 1e8 + 1 - 1e8 = 0.
    values = torch.tensor([1e4, 1.0, 1e4])
    found = Alignment()
    found.add(values.double(), torch.tensor([1e4, 1.0, -1e4]).double())
    assert found.dot == 1.0


def test_models_of_other_architectures_are_refused():
    models = in_memory(FINETUNED, UNLEARNED, TARGET)
    del models[2]._tensors[NAMES[2]]
    with pytest.raises(UserError, match=rf"other architectures: only one of them has {NAMES[2]}"):
        task_vector_cosines(*models)
    models = in_memory(FINETUNED, UNLEARNED, TARGET)
    models[1]._tensors[NAMES[1]] = torch.zeros(2, 1)
    with pytest.raises(UserError, match=r"has the shape \[1, 2\] in 'model 0' and \[2, 1\] in 'model 1'"):
        task_vector_cosines(*models)


def test_layers_make_three_groups():
    names = [f"gpt_neox.layers.{number}.weight" for number in range(7)]
    groups = layer_groups(["gpt_neox.final_layer_norm.weight", *reversed(names), "gpt_neox.embed_in.weight"])
    assert list(groups.items()) == [
        ("gpt_neox.embed_in.weight", "embeddings"),
        *[(name, "layers 0-2") for name in names[:3]],
        *[(name, "layers 3-4") for name in names[3:5]],
        *[(name, "layers 5-6") for name in names[5:]],
        ("gpt_neox.final_layer_norm.weight", "head"),
    ]
    assert set(layer_groups(["transformer.h.0.w", "transformer.wte.weight"]).values()) == {"embeddings", "layer 0"}


def test_weights_are_read_from_files_where_those_hold_what_the_model_does(tmp_path):
    folder = Holder(UNLEARNED).save(tmp_path / "model")

    def refuse(name):
        raise AssertionError("loaded")

    assert isinstance(tensors_of(str(folder), NAMES, refuse), CheckpointFiles)
    loaded = tensors_of(str(folder), ("other.weight",), lambda name: Holder(TARGET))
    assert isinstance(loaded, ModelTensors) and loaded.folder == str(folder)
    (folder / "model.safetensors").unlink()
    assert isinstance(tensors_of(str(folder), NAMES, lambda name: Holder(TARGET)), ModelTensors)
