"""Affine maps from a teacher's hidden states to the target model's: where they are kept, and whose they are."""
# Shapes: D hidden size of the target model, E of the teacher.

import json
import logging
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llm_unlearn.errors import UserError
from llm_unlearn.models import model_fingerprint

logger = logging.getLogger(__name__)

WEIGHTS, METADATA = "affine_transforms.safetensors", "metadata.json"
_ADVICE = "fit one with utils/fit_affine_map.py"


class AffineMaps:
    """A map for each of some decoder layers: from what layer l of the teacher hands on to what l of the target does.

    Attributes:
        place: where it was read, for messages; None for one that was just made.
        maps: {layer: (weight (D, E), bias (D,))}, float32.
        metadata: what metadata.json says.
    """

    def __init__(self, maps, metadata, place=None):
        self.maps = {layer: tuple(part.float() for part in pair) for layer, pair in sorted(maps.items())}
        self.metadata, self.place = metadata, place

    @property
    def sizes(self):
        """(E, D)."""
        weight, _ = next(iter(self.maps.values()))
        return weight.shape[1], weight.shape[0]

    def __call__(self, layer, states):
        """Map (..., E) states of the teacher at a layer; returns (..., D)."""
        return torch.nn.functional.linear(states, *self.maps[layer])

    def to(self, device):
        """Return the same maps on a device."""
        maps = {layer: (weight.to(device), bias.to(device)) for layer, (weight, bias) in self.maps.items()}
        return AffineMaps(maps, self.metadata, self.place)

    def only(self, layers):
        """Return the maps of some layers.

        Raises:
            UserError: a layer that has none.
        """
        missing = [layer for layer in layers if layer not in self.maps]
        if missing:
            raise UserError(
                f"the affine map '{self.place}' has none for layer {missing[0]}; pass --layers with some of "
                f"{' '.join(map(str, self.maps))}, or {_ADVICE}"
            )
        return AffineMaps({layer: self.maps[layer] for layer in layers}, self.metadata, self.place)

    def require_models(self, teacher, target):
        """Refuse models that the map was not fitted to; a published map does not say which these were.

        Args:
            teacher: see `identity`.
            target: the same, or None where the model came from nowhere that has a fingerprint.
        Raises:
            UserError: naming both.
        """
        if "teacher" not in self.metadata:
            return
        for role, given in (("teacher", teacher), ("target", target)):
            fitted = self.metadata[role]
            if given is None:
                logger.warning("the affine map '%s' cannot be checked: the model was not loaded by name", self.place)
            elif given["fingerprint"] != fitted["fingerprint"]:
                raise UserError(
                    f"the affine map '{self.place}' was fitted to the {role} {_named(fitted)}, but this run's {role} "
                    f"is {_named(given)}; {_ADVICE}"
                )

    def save(self, folder):
        """Write the maps, and then what makes them known, into a folder.

        Args:
            folder: made where it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # A folder without metadata is no map, so that no two runs are ever mixed.
        (folder / METADATA).unlink(missing_ok=True)
        tensors = {}
        for layer, (weight, bias) in self.maps.items():
            tensors[f"layer_{layer}.weight"], tensors[f"layer_{layer}.bias"] = weight.contiguous(), bias.contiguous()
        save_file(tensors, folder / f"{WEIGHTS}.partial")
        os.replace(folder / f"{WEIGHTS}.partial", folder / WEIGHTS)
        partial = folder / f"{METADATA}.partial"
        partial.write_text(json.dumps(self.metadata, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, folder / METADATA)

    @classmethod
    def load(cls, place, cache_dir=None, token=None):
        """Read maps, our own or published ones.

        Published maps (EleutherAI/affine-checkpoint-transfer) are numbered as hidden_states is, by what layer l gets;
        they are given here to the layer whose output that is, l - 1. They name no model.

        Args:
            place: folder, or name on the Hub.
            cache_dir: where downloads are kept.
            token: access token of the Hub.
        Returns:
            AffineMaps on the CPU.
        Raises:
            UserError: nothing there, or not what it should be.
        """
        weights, described = (_file(place, name, cache_dir, token) for name in (WEIGHTS, METADATA))
        try:
            metadata, tensors = json.loads(described.read_text(encoding="utf-8")), load_file(weights)
            layers = [int(layer) for layer in metadata["layer_indices"]]
            maps = {layer: (tensors[f"layer_{layer}.weight"], tensors[f"layer_{layer}.bias"]) for layer in layers}
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"'{place}' holds no affine map that can be read ({reason}); {_ADVICE}") from error
        _check(place, maps)
        if "teacher" not in metadata:
            logger.warning(
                "the affine map '%s' does not say which models it belongs to, so that nothing can be checked; its map "
                "l, of what layer l gets, is taken for the output of layer l - 1",
                place,
            )
            maps = {layer - 1: pair for layer, pair in maps.items() if layer > 0}
        return cls(maps, metadata, place)


def identity(name, revision=None, **hub):
    """Return what a map remembers of a model: {"name", "revision", "fingerprint"}.

    Args:
        name: folder or name on the Hub.
        revision: branch, tag or commit.
        **hub: cache_dir, token, trust_remote_code.
    """
    fingerprint = model_fingerprint(name, revision=revision, **hub)
    return {"name": str(name), "revision": revision, "fingerprint": fingerprint}


def _named(model):
    revision = f" at {model['revision']}" if model.get("revision") else ""
    return f"'{model['name']}'{revision} ({model['fingerprint'][:12]})"


def _file(place, name, cache_dir, token):
    path = Path(place) / name
    if Path(place).is_dir() or str(place).startswith((".", "/", "~")) or str(place).count("/") != 1:
        if not path.is_file():
            raise UserError(f"the affine map '{place}' has no {name}; {_ADVICE}")
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(place, name, cache_dir=cache_dir, token=token))
    except Exception as error:  # whatever the network raises, the map cannot be had
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"the affine map '{place}' is no folder here, and not on the Hub: {reason}") from error


def _check(place, maps):
    shapes = {(tuple(weight.shape), tuple(bias.shape)) for weight, bias in maps.values()}
    fits = len(shapes) == 1 and all(len(w) == 2 and b == w[:1] for w, b in shapes)
    if not fits:
        raise UserError(f"the weights of the affine map '{place}' do not fit together: {sorted(shapes)}; {_ADVICE}")
    broken = [layer for layer, pair in maps.items() if not all(part.isfinite().all() for part in pair)]
    if broken:
        raise UserError(f"the affine map '{place}' is NaN or infinite at layer {broken[0]}; {_ADVICE}")
