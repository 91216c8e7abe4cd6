"""Arithmetic on checkpoints, in parts of tensors: no model is built, and none is held in memory."""

import json
import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llm_unlearn.errors import UserError

logger = logging.getLogger(__name__)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHUNK_ELEMENTS = 2**24
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")
_HEADER_ALIGNMENT = 8


def task_vector_difference(theta, forget, base, alpha):
    """Take a task's direction out of weights.

        theta' = theta - alpha * (theta_forget - theta_base)

    Args:
        theta: tensor of the model that is to forget.
        forget: the same tensor of a model that was trained on what is to be forgotten, starting from `base`.
        base: the same of the model from which that training started.
        alpha: how much of the direction is taken out; below 0 it is put in.
    Returns:
        tensor, float32 at least.
    Source: Ilharco et al. 2023, arXiv:2212.04089 (negated task vectors).
    """
    wide = torch.promote_types(theta.dtype, torch.float32)
    return theta.to(wide) - alpha * (forget.to(wide) - base.to(wide))


class CheckpointFiles:
    """The tensors of a checkpoint folder, found by name and read in parts.

    Attributes:
        folder: where.
        files: {file name: names of its tensors, in order}.

    Args:
        folder: of a model with weights in safetensors.
        what: what to call it in messages.
    Raises:
        UserError: no safetensors, adapters alone, or a file that cannot be read.
    """

    def __init__(self, folder, what):
        self.folder, self.what = Path(folder), what
        if (self.folder / "adapter_config.json").is_file():
            raise UserError(f"the {what} '{folder}' holds adapters, not a whole model; merge them into it first")
        try:
            names = _weight_files(self.folder)
            self._open = {name: safe_open(self.folder / name, framework="pt") for name in names}
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"the {what} '{folder}' cannot be read: {error}") from error
        if not names:
            raise UserError(
                f"the {what} '{folder}' has no weights in safetensors; load it and save it with save_pretrained first"
            )
        self.files = {name: list(file.keys()) for name, file in self._open.items()}
        self._place = {tensor: name for name, tensors in self.files.items() for tensor in tensors}

    def names(self):
        """Return the names of all tensors."""
        return self._place.keys()

    def part(self, name):
        """Return the slice of a tensor, read where it is indexed, with its get_shape() and get_dtype()."""
        return self._open[self._place[name]].get_slice(name)

    def require_like(self, other):
        """Refuse a checkpoint of another architecture.

        Args:
            other: CheckpointFiles, whose tensors must all be here with the same shapes.
        """
        missing = sorted(other.names() - self.names())
        if missing:
            raise UserError(f"the {self.what} '{self.folder}' has no tensor {missing[0]}, which '{other.folder}' has")
        for name in other.names():
            shape, expected = (files.part(name).get_shape() for files in (self, other))
            if shape != expected:
                raise UserError(f"{name} has the shape {shape} in '{self.folder}' and {expected} in '{other.folder}'")


@dataclass
class Change:
    """What arithmetic did to a checkpoint.

    Attributes:
        norm: of theta_forget - theta_base over all tensors.
        changed: elements that were to change.
        swallowed: those of them that stayed the same, because the change is below the resolution of what is written.
    """

    norm: float = 0.0
    changed: int = 0
    swallowed: int = 0


def subtract_task(target, forget, base, alpha, folder, dtype=None):
    """Write theta - alpha * (theta_forget - theta_base) in the files of the target.

    Args:
        target, forget, base: CheckpointFiles of like models.
        alpha: see `task_vector_difference`.
        folder: where the files go, one for each of the target's, of the same name.
        dtype: "F32", "F16" or "BF16" to write all floating-point tensors in; None keeps each one's own.
    Returns:
        Change.
    Raises:
        UserError: models of other architectures, quantized weights, a result that is not finite, or no difference.
    """
    forget.require_like(target)
    base.require_like(target)
    change, squares, sizes = Change(), 0.0, {}
    for file, names in target.files.items():
        with open(Path(folder) / file, "wb") as out:
            for name in _write_header(out, target, names, dtype):
                squares += _write_tensor(out, name, (target, forget, base), alpha, dtype, change)
        sizes[file] = os.path.getsize(Path(folder) / file)
    if squares == 0:
        raise UserError(f"'{forget.folder}' and '{base.folder}' have the same weights: there is nothing to take out")
    if len(sizes) > 1:
        _write_index(target, Path(folder), dtype)
    change.norm = squares**0.5
    return change


def _weight_files(folder):
    """Return the names of the files that hold the weights; others may lie beside them."""
    if (folder / INDEX).is_file():
        return sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    return [SINGLE] if (folder / SINGLE).is_file() else []


def _write_header(out, target, names, dtype):
    """Write the header of a safetensors file; returns the names in the order of their bytes."""
    described, first = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        part = target.part(name)
        kind = _kind(part.get_dtype(), dtype, name, target)
        last = first + _bytes(part.get_shape(), kind)
        described[name] = {"dtype": kind, "shape": part.get_shape(), "data_offsets": [first, last]}
        first = last
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _HEADER_ALIGNMENT)
    out.write(struct.pack("<Q", len(header)) + header)
    return names


def _write_tensor(out, name, models, alpha, dtype, change):
    """Write the result for one tensor; returns the squared norm of the difference."""
    parts = [model.part(name) for model in models]
    kind = _kind(parts[0].get_dtype(), dtype, name, models[0])
    squares = 0.0
    for rows in _chunks(parts[0].get_shape()):
        theta, from_forget, from_base = (part[rows] for part in parts)
        if not theta.is_floating_point():
            if not (torch.equal(theta, from_forget) and torch.equal(theta, from_base)):
                raise UserError(f"{name} holds {theta.dtype} that differ between the models, and cannot be subtracted")
            out.write(_raw(theta))
            continue
        found = task_vector_difference(theta, from_forget, from_base, alpha)
        if not torch.isfinite(found).all():
            raise UserError(f"{name} is NaN or infinite after the subtraction; a model is broken, or --alpha too large")
        difference = from_forget.to(found.dtype) - from_base.to(found.dtype)
        written = found.to(_DTYPES[kind])
        squares += float(difference.double().square().sum())
        moves = difference != 0
        change.changed += int(moves.sum())
        change.swallowed += int((moves & (written.to(found.dtype) == theta.to(found.dtype))).sum())
        out.write(_raw(written))
    return squares


def _chunks(shape):
    """Return what to index a tensor with, so many rows at once that they are not too many elements."""
    if not shape:
        return [...]
    per_row = max(1, _elements(shape[1:]))
    step = max(1, CHUNK_ELEMENTS // per_row)
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


def _kind(found, wanted, name, target):
    if found not in _DTYPES:
        raise UserError(f"{name} of '{target.folder}' is quantized ({found}); take the model before quantization")
    return wanted if wanted and found in _FLOATS else found


def _write_index(target, folder, dtype):
    kinds = {name: _kind(target.part(name).get_dtype(), dtype, name, target) for name in target.names()}
    total = sum(_bytes(target.part(name).get_shape(), kind) for name, kind in kinds.items())
    places = {name: file for file, names in target.files.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _bytes(shape, kind):
    return _elements(shape) * _DTYPES[kind].itemsize


def _elements(shape):
    count = 1
    for size in shape:
        count *= size
    return count


def _raw(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
