"""Lenses on disk and on the Hub: ours, which say whose they are, and published ones, which do not."""
# Shapes: D hidden size.

import contextlib
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llm_unlearn.decoder import causal_lm
from llm_unlearn.errors import UserError
from llm_unlearn.manifests import MANIFEST, STAGING, incompleteness, write_manifest
from llm_unlearn.models import loaded_fingerprint

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG, KIND = "lens.safetensors", "lens.json", "tuned_lens"
PUBLISHED, PUBLISHED_CONFIG = "params.pt", "config.json"
_TRAIN = "train one with utils/train_tuned_lens.py"
_KEY = re.compile(r"(\d+)\.(weight|bias)")


def base_model_identity(model, gathered=None, with_files=False):
    """Return what tells whether a lens is of this model: {"name", "weights_sha256", "files"}.

    `weights_sha256` is taken over the names and shapes of all parameters and their values in bfloat16, so that it does
    not depend on the precision in which a model was loaded (but for one loaded in float16). Adapters that have not
    trained are left out. It is None for quantized weights, which are known by `files` instead: the commit on the Hub or
    the sha256 of the weights' files, None for a model that came from no files.

    Args:
        model: causal language model, plain or with PEFT adapters.
        gathered: function of a list of parameters that returns a context in which they are whole; all processes call.
        with_files: say `files` also where `weights_sha256` is there.
    """
    language_model = causal_lm(model)
    name, files = getattr(language_model.config, "_name_or_path", ""), None
    found = _weights_sha256(model, gathered or _whole)
    if name and (found is None or with_files):
        with contextlib.suppress(UserError):  # the folder is gone, or the name was never one
            files = loaded_fingerprint(language_model)
    return {"name": name, "weights_sha256": found, "files": files}


def _whole(parameters):
    return contextlib.nullcontext()


def _weights_sha256(model, gathered):
    parameters = {name: p for name, p in model.named_parameters() if "modules_to_save." not in name}
    if not all(p.is_floating_point() for p in parameters.values()):
        return None
    trained = False
    for name, parameter in parameters.items():
        if "lora_B" in name or "lora_embedding_B" in name:
            with gathered([parameter]):
                trained = trained or bool(parameter.detach().any())
    found = hashlib.sha256()
    for name, parameter in parameters.items():
        if "lora_" in name and not trained:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
        with gathered([parameter]):
            found.update(f"{plain}{tuple(parameter.shape)}".encode())
            values = parameter.detach().to(torch.bfloat16).cpu().contiguous()
            found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@dataclass(frozen=True)
class StoredLens:
    """Translators as they were stored.

    Attributes:
        place: folder, or name on the Hub.
        translators: {i: (weight (D, D), bias (D,))}.
        config: what lens.json says; None of a published lens, which says of no model that it is its own.
    """

    place: str
    translators: dict
    config: dict | None = None

    def require_model(self, identity):
        """Refuse a model that the lens was not trained on; warn where the lens does not know.

        Args:
            identity: see `base_model_identity`.
        Raises:
            UserError: naming both models.
        """
        if self.config is None:
            logger.warning(
                "the lens '%s' does not say which model it was trained on; no more than its shapes was checked",
                self.place,
            )
            return
        own = self.config["base_model"]
        field = "files" if identity["weights_sha256"] is None else "weights_sha256"
        if identity[field] is None or own.get(field) != identity[field]:
            described = [f"'{one['name']}' ({str(one.get(field))[:12]})" for one in (own, identity)]
            raise UserError(
                f"the lens '{self.place}' was trained on {described[0]}, but this run's model is {described[1]}; "
                + _TRAIN
            )


def save_lens(folder, lens, record):
    """Write a lens where it is complete or not at all: lens.safetensors, lens.json, README.md, manifest.json.

    Args:
        folder: made where it does not exist; an older lens in it is replaced.
        lens: TunedLens.
        record: dict, JSON-serializable; "base_model" of `base_model_identity`, "training" how it was made.
    """
    folder = Path(folder)
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    tensors = {
        name: tensor.detach().float().cpu().contiguous() for name, tensor in lens.translators.state_dict().items()
    }
    save_file(tensors, staging / WEIGHTS)
    shape = {
        "d_model": lens.hidden_size,
        "num_layers": lens.num_layers,
        "translators": sorted(map(int, lens.translators)),
    }
    config = {"schema_version": 1, "kind": KIND, **shape, **record}
    (staging / CONFIG).write_text(json.dumps(config, indent=1, default=str) + "\n", encoding="utf-8")
    (staging / "README.md").write_text(_card(config), encoding="utf-8")
    write_manifest(staging)
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == MANIFEST):
        os.replace(path, folder / path.name)
    staging.rmdir()


def read_lens(place, lens, indices, allow_pickle=False, token=None):
    """Read the translators of some depths.

    Args:
        place: folder, or name on the Hub: lens.safetensors with lens.json as `save_lens` writes them; or published
            translators, `<i>.weight` and `<i>.bias` in another .safetensors file or in params.pt, config.json beside.
        lens: TunedLens of the model that it is for, whose shapes are required.
        indices: the i that are wanted, in [0, L); the output of layer l needs l + 1.
        allow_pickle: whether params.pt may be read, with weights_only=True.
        token: access token of the Hub.
    Returns:
        StoredLens, on the CPU.
    Raises:
        UserError: nothing there, a pickle, an i without a translator, or other shapes.
    """
    folder = _folder(place, allow_pickle, token)
    config = _config(folder, place)
    path = _weights_file(folder, place, config, allow_pickle)
    if allow_pickle and path.suffix == ".safetensors":
        raise UserError(f"--allow_pickle_lens has no effect: the lens '{place}' is a safetensors file")
    found = _read_pickle(path, place) if path.suffix == ".pt" else _read_safetensors(path, place)
    there = sorted({int(_KEY.fullmatch(name)[1]) for name in found})
    missing = [index for index in indices if index not in there]
    if missing:
        layers = sorted({lens.num_layers - 1, *(index - 1 for index in there if index)})
        raise UserError(
            f"the lens '{place}' has no translator for the output of layer {missing[0] - 1}, which is {missing[0]}; "
            f"pass --layers out of {' '.join(map(str, layers))}, or {_TRAIN}"
        )
    size = lens.hidden_size
    if there[-1] >= lens.num_layers:
        raise UserError(f"the lens '{place}' has a translator {there[-1]}, but the model has {lens.num_layers} layers")
    translators = {}
    for index in indices:
        weight = found[f"{index}.weight"]()
        bias = found[f"{index}.bias"]() if f"{index}.bias" in found else torch.zeros(len(weight))
        if weight.shape != (size, size) or bias.shape != (size,):
            raise UserError(
                f"translator {index} of the lens '{place}' is {tuple(weight.shape)}, but the model's hidden states "
                f"have {size} numbers; {_TRAIN}"
            )
        translators[index] = weight.float(), bias.float()
    return StoredLens(str(place), translators, config)


def _folder(place, allow_pickle, token):
    place = str(place)
    if Path(place).is_dir():
        return Path(place)
    if place.startswith((".", "/", "~")) or place.count("/") != 1 or Path(place).exists():
        raise UserError(f"the lens folder '{place}' does not exist")
    from huggingface_hub import snapshot_download

    patterns = [WEIGHTS, CONFIG, MANIFEST, PUBLISHED_CONFIG, "*.safetensors", *([PUBLISHED] if allow_pickle else [])]
    try:
        return Path(snapshot_download(place, allow_patterns=patterns, token=token))
    except Exception as error:  # the Hub client raises a dozen types; each means that the lens cannot be had
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise UserError(
            f"the lens '{place}' is no folder here and cannot be had from the Hub ({reason[:200]}); without network, "
            "pass --lens_path FOLDER"
        ) from error


def _config(folder, place):
    """Return what lens.json says, or None where there is none."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    reason = incompleteness(folder) if (folder / MANIFEST).is_file() else None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if reason is None and (config["kind"] != KIND or not isinstance(config["base_model"], dict)):
            reason = f"{CONFIG} is that of something else"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{CONFIG} cannot be read: {error!r}"
    if reason is not None:
        raise UserError(f"the lens '{place}' cannot be used: {reason}")
    return config


def _weights_file(folder, place, config, allow_pickle):
    """Return the file that holds the translators."""
    own, pickled = folder / WEIGHTS, folder / PUBLISHED
    others = sorted(folder.glob("*.safetensors"))
    if config is not None or own.is_file():
        if config is None or not own.is_file():
            raise UserError(f"the lens '{place}' is not complete: it needs {WEIGHTS} and {CONFIG}")
        return own
    if len(others) == 1:
        return others[0]
    if pickled.is_file() and not allow_pickle:
        raise UserError(
            f"the lens '{place}' is a pickle ({PUBLISHED}), which can hold code; pass --allow_pickle_lens True to read "
            "its tensors and nothing else (weights_only), or another lens"
        )
    if pickled.is_file():
        return pickled
    raise UserError(
        f"'{place}' holds no lens: neither {WEIGHTS} nor one other .safetensors file"
        + (f" nor {PUBLISHED}" if allow_pickle else f"; {PUBLISHED} is read with --allow_pickle_lens True alone")
    )


def _read_safetensors(path, place):
    """Return {key: function that reads the tensor}."""
    try:
        file = safe_open(path, framework="pt")
        return {name: lambda name=name: file.get_tensor(name) for name in _checked(file.keys(), place)}
    except (SafetensorError, OSError) as error:
        raise UserError(f"the lens '{place}' cannot be read: {str(error).splitlines()[0]}") from error


def _read_pickle(path, place):
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"the lens '{place}' cannot be read as tensors and nothing else: {first}") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise UserError(f"the lens '{place}' holds other things than tensors")
    return {name: lambda name=name: found[name] for name in _checked(found, place)}


def _checked(names, place):
    names = list(names)
    strange = [name for name in names if not _KEY.fullmatch(str(name))]
    if strange or not any(str(name).endswith(".weight") for name in names):
        raise UserError(
            f"'{place}' holds no lens of affine translators: their tensors are <i>.weight and <i>.bias, but here is "
            f"{strange[0] if strange else 'no weight'}"
        )
    return names


def _card(config):
    """Write the model card of a lens."""
    base, training = config["base_model"], config.get("training", {})
    return f"""---
library_name: llm_unlearn
tags: [tuned-lens, llm_unlearn]
---

# Tuned lens of {base["name"]}

Affine translators (Belrose et al. 2023, arXiv:2303.08112) of the hidden states of `{base["name"]}`, {config["d_model"]}
wide. Translator i reads hidden_states[i] of transformers, the input of decoder layer i: logits = head(norm(h + A_i h +
b_i)). `lens.json` says which weights they were trained on, how, and how far they are from the model's own output.

```
{training.get("command", "")}
```
"""
