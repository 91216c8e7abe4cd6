"""What says of a hidden state whether its token counts: a prototype, a linear probe, a sparse autoencoder."""
# Shapes: N tokens, D hidden size, F latents.

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from llm_unlearn.checkpoints import file_sha256
from llm_unlearn.errors import UserError

PROBE, PROBE_CONFIG, PROBE_KIND = "probe.safetensors", "config.json", "linear_token_probe"
_SAE, _SAE_CONFIG = "sae.safetensors", "cfg.json"
_CHUNK = 2**26
"""Numbers of a chunk of latents: 256 MB."""


def prototype(states):
    """Return the direction (D,) float32 of the mean of states (N, D), of length 1.

        p = m / ||m||,   m = (1/N) * sum_n h_n

    Args:
        states: (N, D), N >= 1; summed in float64, so that their order changes nothing.
    Source: EleutherAI/unlearn, its activation masks.
    """
    mean = states.double().mean(0)
    return (mean / torch.linalg.vector_norm(mean).clamp(min=1e-12)).float()


class LinearProbe:
    """A linear classifier of hidden states: its logit is above 0 where a token looks like the forget set.

        z_n = w . h_n + b

    Attributes:
        weight, bias: (D,) and () float32.
        layer: index of the decoder layer whose output it reads, from 0.
        record: dict of what it was trained on; "model" is {"name", "revision", "fingerprint"}.
        folder, sha256: where it was loaded from, and of its weights' file; None for one that was not.
    """

    folder = sha256 = None

    def __init__(self, weight, bias, layer, record):
        self.weight, self.bias, self.layer, self.record = weight, bias, layer, record

    def __call__(self, hidden):
        """Return (N,) float32 logits of hidden states (N, D)."""
        return hidden.float() @ self.weight + self.bias

    def to(self, device):
        """Move the weights to a device; returns itself."""
        self.weight, self.bias = self.weight.to(device), self.bias.to(device)
        return self

    def save(self, folder):
        """Write `probe.safetensors`, then `config.json`, into a folder, which is made where it is missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": self.weight, "bias": self.bias.reshape(1)}
        save_file({name: part.detach().cpu().contiguous() for name, part in tensors.items()}, folder / PROBE)
        shape = {"layer": self.layer, "hidden_size": len(self.weight)}
        config = {"kind": PROBE_KIND, "schema_version": 1, **shape, **self.record}
        partial = folder / f"{PROBE_CONFIG}.partial"
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / PROBE_CONFIG)

    @classmethod
    def load(cls, folder):
        """Load a probe from the folder that `save` wrote, on the CPU.

        Raises:
            UserError: no such folder, or a broken one.
        """
        folder = Path(folder)
        config = _read_config(folder / PROBE_CONFIG, f"'{folder}' is no folder of a probe; {_TRAIN_ONE}")
        layer, model = config.get("layer"), config.get("model")
        if config.get("kind") != PROBE_KIND or not isinstance(layer, int) or not isinstance(model, dict):
            raise UserError(f"'{folder}' holds no linear probe of tokens; {_TRAIN_ONE}")
        tensors = _load(folder / PROBE)
        weight, bias = tensors.get("weight"), tensors.get("bias")
        if weight is None or bias is None or weight.dim() != 1 or bias.numel() != 1:
            raise UserError(f"'{folder / PROBE}' must hold a weight (D,) and a bias; {_TRAIN_ONE}")
        found = cls(weight.float(), bias.float().reshape(()), layer, config)
        found.folder, found.sha256 = folder, file_sha256(folder / PROBE)
        return found

    def require_model(self, fingerprint, hidden_size):
        """Refuse to read another model than the one that the probe was trained on.

        Args:
            fingerprint: see `models.model_fingerprint`; None does not check.
            hidden_size: D of the model.
        Raises:
            UserError: it is another.
        """
        if len(self.weight) != hidden_size:
            raise UserError(
                f"the probe '{self.folder}' reads states of size {len(self.weight)}, but the model's have {hidden_size}"
            )
        trained_on = self.record["model"]
        if fingerprint is not None and trained_on.get("fingerprint") != fingerprint:
            raise UserError(
                f"the probe '{self.folder}' was trained on '{trained_on.get('name')}' "
                f"({str(trained_on.get('fingerprint'))[:12]}), and this model is another ({fingerprint[:12]}); "
                f"{_TRAIN_ONE}"
            )


class SparseEncoder:
    """The encoder of a top-k sparse autoencoder.

        a_n = relu(W (h_n - b_dec) + b),   of which the k largest are kept

    Attributes:
        weight, bias, offset: (F, D), (F,) and (D,) float32.
        k: how many latents a token keeps.
        layer: index of the decoder layer whose output it reads, from 0.
        path, sha256: of its file.
    Source: Gao et al. 2024, arXiv:2406.04093; the names in the file are those of EleutherAI's sparsify.
    """

    def __init__(self, weight, bias, offset, k, layer):
        self.weight, self.bias, self.offset, self.k, self.layer = weight, bias, offset, k, layer
        self.path = self.sha256 = None

    @property
    def num_latents(self):
        """F."""
        return len(self.weight)

    @classmethod
    def load(cls, place, layer=None):
        """Load an encoder on the CPU.

        Args:
            place: a safetensors file with `encoder.weight`, `encoder.bias` and, where there is one, `b_dec`, or its
                folder; k and, where it is there, the layer stand in `cfg.json` beside it.
            layer: which layer's output it reads; None takes that of the file.
        Raises:
            UserError: a missing or broken file, or no k, no layer, or two of them.
        """
        path = Path(place) / _SAE if Path(place).is_dir() else Path(place)
        tensors = _load(path)
        weight, bias = tensors.get("encoder.weight"), tensors.get("encoder.bias")
        if weight is None or weight.dim() != 2 or bias is None or bias.shape != weight.shape[:1]:
            raise UserError(
                f"'{path}' must hold encoder.weight (F, D) and encoder.bias (F,), but has {sorted(tensors)}"
            )
        offset = tensors.get("b_dec", torch.zeros(weight.shape[1]))
        if offset.shape != weight.shape[1:]:
            raise UserError(f"'{path}': b_dec must have {weight.shape[1]} numbers, but has {offset.numel()}")
        config = _read_config(path.parent / _SAE_CONFIG, f"'{path}' needs {_SAE_CONFIG} beside it, with k")
        k, own = config.get("k"), config.get("layer")
        if not isinstance(k, int) or not 1 <= k <= len(weight):
            raise UserError(f"'{path.parent / _SAE_CONFIG}': k must lie between 1 and {len(weight)}, but is {k!r}")
        if own is None and layer is None:
            raise UserError(f"'{path.parent / _SAE_CONFIG}' names no layer; pass --selection_layer")
        if None not in (own, layer) and own != layer:
            raise UserError(f"'{path}' is of layer {own}, but --selection_layer is {layer}; leave it out")
        found = cls(weight.float(), bias.float(), offset.float(), k, own if layer is None else layer)
        found.path, found.sha256 = path, file_sha256(path)
        return found

    def require_size(self, hidden_size):
        """Refuse states of another size than the encoder reads.

        Raises:
            UserError: with both sizes.
        """
        if self.weight.shape[1] != hidden_size:
            raise UserError(
                f"the autoencoder '{self.path}' reads states of size {self.weight.shape[1]}, but the model's have "
                f"{hidden_size}"
            )

    def to(self, device):
        """Move the weights to a device; returns itself."""
        self.weight, self.bias, self.offset = (part.to(device) for part in (self.weight, self.bias, self.offset))
        return self

    def counts(self, hidden, latents):
        """Return (N,) how many of the latents are among the k largest of each token, and above 0.

        Args:
            hidden: (N, D).
            latents: list of numbers of latents.
        """
        wanted = torch.zeros(self.num_latents, device=hidden.device)
        wanted[torch.tensor(latents, device=hidden.device)] = 1.0
        found = [hidden.new_zeros(0, dtype=torch.float32)]
        for part in hidden.float().split(max(1, _CHUNK // self.num_latents)):
            kept = torch.relu((part - self.offset) @ self.weight.T + self.bias).topk(self.k, dim=-1)
            found.append((wanted[kept.indices] * (kept.values > 0)).sum(-1))
        return torch.cat(found)


def latent_numbers(given, num_latents):
    """Return the latents that `--selection_latents` lists, in order, each once.

    Args:
        given: numbers with commas, or a file with one on each line.
        num_latents: F.
    Raises:
        UserError: a missing file, something else than a number, or a number that is none of a latent.
    """
    path = Path(given)
    if path.suffix and not path.is_file():
        raise UserError(f"--selection_latents: the file '{given}' does not exist")
    words = path.read_text(encoding="utf-8").split() if path.is_file() else given.split(",")
    numbers = {int(word) if word.strip().isdecimal() else word.strip() for word in words if word.strip()}
    wrong = [number for number in numbers if not isinstance(number, int) or number >= num_latents]
    if wrong or not numbers:
        shown = f"lists {wrong[0]!r}" if wrong else "lists none"
        raise UserError(f"--selection_latents {shown}; the autoencoder has latents 0 to {num_latents - 1}")
    return sorted(numbers)


_TRAIN_ONE = "train one with utils/train_token_probe.py"


def _read_config(path, missing):
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(missing) from error
    except ValueError as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"'{path}' must hold an object")
    return config


def _load(path):
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"'{path}' cannot be loaded: {str(error).splitlines()[0]}") from error
