"""Mask files: what is written is read, byte for byte the same each time; damaged, foreign and pickled ones."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_architectures import make_model

from llm_unlearn.addons import packed_bits
from llm_unlearn.addons.mask_files import linear_weights, read_mask, write_mask
from llm_unlearn.errors import UserError

MASK = {
    "b.weight": torch.tensor([[True, False, True], [False, False, True], [True, True, True]]),
    "a.bias": torch.tensor([False, True]),
}
RECORD = {"domain": "tofu", "ratio": "0.6", "score": "wagle", "gamma": "1e-06", "scope": "global", "model_hash": "abc"}


def write(path, mask=None, **record):
    """Write {name: bool} as a mask; returns the path."""
    mask = MASK if mask is None else mask
    packed = {name: packed_bits.pack(bits.reshape(-1)) for name, bits in mask.items()}
    write_mask(path, packed, {name: tuple(bits.shape) for name, bits in mask.items()}, {**RECORD, **record})
    return path


def test_what_is_written_is_read(tmp_path):
    """Nine bits are two bytes: 10100111 1; two bits 01."""
    found = read_mask(write(tmp_path / "deep" / "mask.safetensors"))
    assert list(found.shapes) == list(MASK) and found.shapes["b.weight"] == (3, 3)
    assert found.packed("b.weight").tolist() == [0b10100111, 0b10000000] and found.packed("a.bias").tolist() == [64]
    assert all(torch.equal(found.bits(name), bits) for name, bits in MASK.items())
    assert found.record == {**RECORD, "format_version": "1"} and found.covers_all
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["mask.safetensors"]


def test_the_file_is_safetensors_with_its_record_in_plain_text(tmp_path):
    with safe_open(write(tmp_path / "mask.safetensors"), framework="pt") as file:
        assert set(file.keys()) == set(MASK) and file.get_tensor("a.bias").dtype == torch.uint8
        metadata = file.metadata()
    assert {key: metadata[key] for key in RECORD} == RECORD and metadata["format_version"] == "1"
    assert json.loads(metadata["shapes"]) == {"b.weight": [3, 3], "a.bias": [2]}


def test_the_same_mask_is_the_same_bytes(tmp_path):
    first, second = write(tmp_path / "1.safetensors"), write(tmp_path / "2.safetensors")
    assert first.read_bytes() == second.read_bytes()
    assert write(tmp_path / "3.safetensors", ratio="0.7").read_bytes() != first.read_bytes()
    size = first.stat().st_size
    bits = sum(bits.numel() for bits in MASK.values())
    header = int.from_bytes(first.read_bytes()[:8], "little")
    assert header % 8 == 0 and size - 8 - header == 3 and bits == 11


# ---- What is no mask ----


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        read_mask(path, **options)
    return str(caught.value)


def test_a_missing_mask_is_refused_with_the_command_that_makes_it(tmp_path):
    message = refusal(tmp_path / "tofu_0.8.pt")
    assert "does not exist; make it: python utils/make_weight_mask.py" in message
    assert message.endswith(f"--output {tmp_path / 'tofu_0.8.safetensors'}")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("a mask, honestly")
    assert "cannot be read" in refusal(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "weights.safetensors")
    assert "is no weight mask of format 1, but of None" in refusal(tmp_path / "weights.safetensors")
    save_file({"a": torch.zeros(3)}, tmp_path / "newer.safetensors", metadata={"format_version": "2", "shapes": "{}"})
    assert "of format 1, but of 2" in refusal(tmp_path / "newer.safetensors")


def test_damaged_masks_are_refused(tmp_path):
    for name, shapes, message in (
        ("short", {"a": [9]}, "the bits of a do not fit its shape (9,)"),
        ("other", {"b": [8]}, "its tensors are not those that it names"),
    ):
        path = tmp_path / f"{name}.safetensors"
        metadata = {"format_version": "1", "shapes": json.dumps(shapes)}
        save_file({"a": torch.zeros(1, dtype=torch.uint8)}, path, metadata=metadata)
        assert message in refusal(path)
    path = write(tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert "cannot be read" in refusal(path)


# ---- Pickles ----


def test_a_pickle_is_read_only_where_that_is_asked_for(tmp_path):
    path = tmp_path / "tofu_0.8.pt"
    torch.save(MASK, path)
    assert "pass --allow_pickle_mask True" in refusal(path)
    found = read_mask(path, allow_pickle=True)
    assert all(torch.equal(found.bits(name), bits) for name, bits in MASK.items()) and found.covers_all
    assert "has no effect" in refusal(write(tmp_path / "mask.safetensors"), allow_pickle=True)


class Evil:
    def __reduce__(self):
        return (print, ("loaded",))


def test_a_pickle_that_holds_more_than_tensors_is_refused_unread(tmp_path, capsys):
    path = tmp_path / "mask.pt"
    path.write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    assert "cannot be read" in refusal(path, allow_pickle=True)
    torch.save({"a": Evil()}, path)
    assert "cannot be read" in refusal(path, allow_pickle=True)
    assert "loaded" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "contents", [{}, {"a": torch.ones(2)}, {"a": [True]}, {"a": MASK["a.bias"], 0: MASK["a.bias"]}]
)
def test_a_pickle_of_something_else_is_refused(contents, tmp_path):
    torch.save(contents, tmp_path / "mask.pt")
    assert "is no mask: it must hold" in refusal(tmp_path / "mask.pt", allow_pickle=True)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_wanda_s_numbers_are_the_linear_layers_of_the_decoder_in_order(family, tmp_path):
    """As Wanda goes through a model: layer by layer, in each its modules in their order; the head is none of them."""
    model = make_model(family)
    names = [name for name, _ in linear_weights(model)]
    assert len(names) == len(set(names)) > 4
    masks = {number: torch.rand(model.get_parameter(name).shape) < 0.5 for number, name in enumerate(names)}
    torch.save(masks, tmp_path / "mask.pt")
    found = read_mask(tmp_path / "mask.pt", True, model)
    assert list(found.shapes) == names and not found.covers_all
    assert all(torch.equal(found.bits(name), masks[number]) for number, name in enumerate(names))
    head = model.get_output_embeddings().weight
    assert all(model.get_parameter(name) is not head for name in names)
    depth = [int(next(part for part in name.split(".") if part.isdecimal())) for name in names]
    assert depth == sorted(depth) and names[0].split(".")[-2] == ("q_proj" if family == "llama" else "query_key_value")


def test_wanda_s_numbers_of_another_model_are_refused(tmp_path):
    model = make_model("llama")
    torch.save({0: torch.ones(2, 2, dtype=torch.bool), 1: torch.ones(2, 2, dtype=torch.bool)}, tmp_path / "mask.pt")
    assert "numbers 2 linear layers from 0, but the decoder layers" in refusal(
        tmp_path / "mask.pt", allow_pickle=True, model=model
    )
    assert "numbers the linear layers of a model that is not there" in refusal(tmp_path / "mask.pt", allow_pickle=True)
