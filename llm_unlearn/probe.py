"""Transformer probes: small networks that say what the final model's hidden states are from those of an early one."""
# Shapes: B sequences, T tokens, D hidden size.

import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from llm_unlearn.errors import UserError

WIDTH, HEADS, FEED_FORWARD = 64, 4, 4
CONFIG = "config.json"
_KIND = "transformer_probes"


class TransformerProbe(nn.Module):
    """Reads the hidden states of a whole row through a narrow transformer, and says D numbers for each token.

        probe(h) = W_up * encoder(W_down * h + b_down) + b_up

    The encoder is pre-norm, WIDTH wide with HEADS heads and a ReLU layer of FEED_FORWARD times WIDTH; every token sees
    every other one, also those to its right, but no padding. Nothing is dropped out.

    Args:
        hidden_size: D.
        depth: layers of the encoder.
    Source: EleutherAI/unlearn, its transformer probe. Differs from the authors' code: the first token of a row is not
        read (see `head.own_states`).
    """

    def __init__(self, hidden_size, depth):
        super().__init__()
        self.hidden_size, self.depth = hidden_size, depth
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, FEED_FORWARD * WIDTH, dropout=0.0, activation="relu", batch_first=True, norm_first=True
        )
        self.down = nn.Linear(hidden_size, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.up = nn.Linear(WIDTH, hidden_size)

    def forward(self, states, mask):
        """Return (B, T, D), of no meaning where the mask is False.

        Args:
            states: (B, T, D) hidden states.
            mask: (B, T) True where there is a token.
        """
        # A row without any token sees its padding: a softmax over nothing is NaN.
        unseen = ~mask & mask.any(-1, keepdim=True)
        narrow = self.down(states.to(self.down.weight.dtype))
        return self.up(self.encoder(narrow, src_key_padding_mask=unseen))


def probe_depth(num_layers, layer):
    """Return how many layers the encoder of a probe has: as many as the model has above the layer, at least 1.

    With the 32 layers of the published model these are its 24, 20, ..., 4 for the hidden states between blocks.

    Args:
        num_layers: of the model.
        layer: index of the decoder layer whose output is read.
    """
    return max(1, num_layers - 1 - layer)


def save_probes(folder, probes, record):
    """Write a folder of probes: `layer_<L>.safetensors` for each decoder layer, then `config.json`.

    Args:
        folder: path, made where it is missing.
        probes: {layer: TransformerProbe}, all of one hidden size.
        record: dict of what they were trained on; "model" and "early_model" are {"name", "revision", "fingerprint"}.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for layer, probe in probes.items():
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in probe.state_dict().items()}
        save_file(tensors, probe_file(folder, layer))
    (hidden_size,) = {probe.hidden_size for probe in probes.values()}
    shape = {"width": WIDTH, "heads": HEADS, "feed_forward": FEED_FORWARD}
    depths = {str(layer): probe.depth for layer, probe in sorted(probes.items())}
    config = {"kind": _KIND, "schema_version": 1, "hidden_size": hidden_size, **shape, "depths": depths, **record}
    partial = folder / f"{CONFIG}.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / CONFIG)


def load_probes(folder, layers=None, fingerprint=None, hidden_size=None):
    """Load frozen probes in evaluation mode, on the CPU.

    Args:
        folder: what `save_probes` wrote.
        layers: indices of decoder layers; None takes all that are there.
        fingerprint: of the model that they are to be used with, see `models.model_fingerprint`; None does not check.
        hidden_size: D of that model; None does not check.
    Returns:
        {layer: TransformerProbe}.
    Raises:
        UserError: no such folder, a layer without a probe, probes of another model, or a file that is broken.
    """
    folder, config = Path(folder), read_probe_config(folder)
    depths = {int(layer): depth for layer, depth in config["depths"].items()}
    for layer in layers or []:
        if layer not in depths:
            known = " ".join(map(str, depths))
            raise UserError(f"'{folder}' has no probe of layer {layer}; pass --layers out of {known}")
    trained_on = config["model"]
    if fingerprint not in (None, trained_on["fingerprint"]):
        raise UserError(
            f"the probes in '{folder}' were trained on '{trained_on['name']}' ({trained_on['fingerprint'][:12]}), and "
            f"this model is another ({fingerprint[:12]}); train probes of it with utils/train_probe.py"
        )
    if hidden_size not in (None, config["hidden_size"]):
        raise UserError(
            f"the probes in '{folder}' read hidden states of size {config['hidden_size']}, but this model's have "
            f"{hidden_size}"
        )
    return {layer: _load_one(folder, layer, config["hidden_size"], depths[layer]) for layer in layers or depths}


def read_probe_config(folder):
    """Return the `config.json` of a folder of probes.

    Args:
        folder: what `save_probes` wrote.
    Raises:
        UserError: it is not there, or of something else.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"'{folder}' is no folder of probes; make one with utils/train_probe.py") from error
    except ValueError as error:
        raise UserError(f"'{path}' cannot be read: {error}") from error
    shape = {"kind": _KIND, "width": WIDTH, "heads": HEADS, "feed_forward": FEED_FORWARD}
    if not isinstance(config, dict) or any(config.get(name) != value for name, value in shape.items()):
        raise UserError(f"'{folder}' holds no probes of this kind; make some with utils/train_probe.py")
    return config


def _load_one(folder, layer, hidden_size, depth):
    probe = TransformerProbe(hidden_size, depth)
    path = probe_file(folder, layer)
    try:
        probe.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the probe '{path}' cannot be loaded ({reason}); train it again") from error
    return probe.requires_grad_(False).eval()


def probe_file(folder, layer):
    """Return the path of a layer's probe."""
    return Path(folder) / f"layer_{layer}.safetensors"
