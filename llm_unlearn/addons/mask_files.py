"""Weight masks in files: a bit for each weight, with what they were made from; published pickles are read too."""

import json
import math
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from llm_unlearn.addons import packed_bits
from llm_unlearn.checkpoints import file_sha256
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError

FORMAT_VERSION = "1"
PICKLES = (".pt", ".pth", ".bin")
_SHAPES = "shapes"
_MAKE = (
    "python utils/make_weight_mask.py --target_model_name_or_path MODEL --domain DOMAIN --score wagle --ratio 0.8 "
    "--output"
)


@dataclass
class MaskFile:
    """A weight mask that is read: which weights train.

    Attributes:
        path: of the file.
        shapes: {name of a parameter: its shape}, in the model's order.
        record: {name: text}, what the mask was made from; of a pickle only its format.
        sha256: of the file.
        covers_all: whether a trained parameter that it does not name is a mistake; Wanda's masks name linear layers
            alone, and the others train.
    """

    path: str
    shapes: dict
    record: dict
    sha256: str
    covers_all: bool = True
    _packed: object = field(default=None, repr=False)

    def packed(self, name):
        """Return the bits of a parameter, (ceil(elements / 8),) uint8 on the CPU; 1 where a weight trains."""
        return self._packed(name)

    def bits(self, name):
        """Return the mask of a parameter, bool and of its shape."""
        shape = self.shapes[name]
        return packed_bits.unpack(self.packed(name), math.prod(shape)).view(shape)


def write_mask(path, packed, shapes, record):
    """Write a mask: a safetensors file whose bytes are a function of what it says.

    safetensors' own writer puts the metadata in an order that changes from run to run.

    Args:
        path: of the file; its folder is made.
        packed: {name of a parameter: what `packed_bits.pack` made of its flattened mask}, in the model's order.
        shapes: {name: its shape}.
        record: {name: text}, what the mask was made from.
    """
    metadata = {**record, "format_version": FORMAT_VERSION, _SHAPES: json.dumps({n: list(shapes[n]) for n in packed})}
    header, first = {"__metadata__": dict(sorted(metadata.items()))}, 0
    for name, bits in packed.items():
        header[name] = {"dtype": "U8", "shape": [len(bits)], "data_offsets": [first, first + len(bits)]}
        first += len(bits)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for bits in packed.values():
            file.write(bits.cpu().numpy().data)
    os.replace(partial, path)


def read_mask(path, allow_pickle=False, model=None, flag="--weight_mask"):
    """Read a mask of ours, or a published one: {name: bool tensor}, or Wanda's {number: bool tensor}.

    Wanda's numbers count the linear layers inside the decoder layers, in their order; all other parameters train.

    Args:
        path: of the file.
        allow_pickle: whether it may be a pickle, of which tensors and nothing else are loaded.
        model: PreTrainedModel whose linear layers Wanda's numbers mean; None refuses those.
        flag: what the user typed, for messages.
    Returns:
        MaskFile.
    Raises:
        UserError: the file is missing, no mask, or damaged; a pickle without `allow_pickle`.
    """
    path = Path(path)
    if not path.is_file():
        suggested = path if path.suffix == ".safetensors" else path.with_suffix(".safetensors")
        raise UserError(f"{flag} '{path}' does not exist; make it: {_MAKE} {suggested}")
    if path.suffix in PICKLES:
        if not allow_pickle:
            raise UserError(
                f"{flag} '{path}' is a pickle, which can hold code; pass --allow_pickle_mask True to load its tensors "
                f"and nothing else, or make a mask: {_MAKE} {path.with_suffix('.safetensors')}"
            )
        return _read_pickle(path, model)
    if allow_pickle:
        raise UserError(f"--allow_pickle_mask has no effect on '{path}', which is no pickle")
    return _read_safetensors(path)


def _read_safetensors(path):
    try:
        file = safe_open(path, framework="pt")
        record = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"the mask '{path}' cannot be read: {error}") from error
    if record.get("format_version") != FORMAT_VERSION or _SHAPES not in record:
        raise UserError(
            f"'{path}' is no weight mask of format {FORMAT_VERSION}, but of {record.get('format_version')}; make one: "
            f"{_MAKE} {path}"
        )
    shapes = {name: tuple(shape) for name, shape in json.loads(record.pop(_SHAPES)).items()}
    if set(file.keys()) != set(shapes):
        raise UserError(f"the mask '{path}' is damaged: its tensors are not those that it names")
    for name, shape in shapes.items():
        if file.get_slice(name).get_shape() != [-(-math.prod(shape) // 8)]:
            raise UserError(f"the mask '{path}' is damaged: the bits of {name} do not fit its shape {shape}")
    return MaskFile(str(path), shapes, record, file_sha256(path), _packed=file.get_tensor)


def _read_pickle(path, model):
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise UserError(f"the mask '{path}' cannot be read: {first_line}") from error
    kinds = {type(key) for key in found} if isinstance(found, dict) else set()
    bad = [key for key, value in found.items() if getattr(value, "dtype", None) != torch.bool] if kinds else []
    if len(kinds) != 1 or not kinds <= {str, int} or bad:
        raise UserError(f"'{path}' is no mask: it must hold {{name of a parameter: bool tensor}} or Wanda's numbers")
    covers_all = kinds == {str}
    named = found if covers_all else _named(found, path, model)
    shapes = {name: tuple(mask.shape) for name, mask in named.items()}
    packed = {name: packed_bits.pack(mask.reshape(-1)) for name, mask in named.items()}
    record = {"format_version": "pickle" if covers_all else "pickle of numbered layers"}
    return MaskFile(str(path), shapes, record, file_sha256(path), covers_all, packed.__getitem__)


def _named(found, path, model):
    """Return {name of a weight: mask} of Wanda's {number of a linear layer: mask}."""
    if model is None:
        raise UserError(f"the mask '{path}' numbers the linear layers of a model that is not there")
    names = [name for name, _ in linear_weights(model)]
    if sorted(found) != list(range(len(names))):
        raise UserError(
            f"the mask '{path}' numbers {len(found)} linear layers from {min(found)}, but the decoder layers of the "
            f"model have {len(names)}, from 0"
        )
    return {name: found[number] for number, name in enumerate(names)}


def linear_weights(model):
    """Return [(name of its weight, module)] of the linear layers inside the decoder layers, in the model's order.

    Args:
        model: PreTrainedModel.
    """
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    return [
        (f"{name}.weight", module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside
    ]
