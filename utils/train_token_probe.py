"""Train linear probes for --token_selection probe: which tokens are those of the forget set, by their hidden states.

python utils/train_token_probe.py --model_name_or_path MODEL --domain wmdp_bio --layers 3 7 11 15 --output_dir OUT

A layer L is the decoder layer of index L, counted from 0, and its state is what it hands on: hidden_states[L + 1] of
transformers. Every tenth row of both sets is held out; accuracy, precision, recall and F1 on their tokens are printed
and stand in OUT/layer_L/config.json. The folder OUT/layer_L of the best layer is what --selection_probe takes.
"""

import logging
import os
import sys
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path

from llm_unlearn.arguments import DataFlags, TokenizeFlags, flag
from llm_unlearn.command_line import config_words, make_parser, split_config, unknown_option
from llm_unlearn.errors import UserError, run_cli

logger = logging.getLogger("llm_unlearn.train_token_probe")
SCRIPT, LENGTH, PAIRS = "utils/train_token_probe.py", 512, 2048
DATA = (
    "domain", "data_dir", "cache_dir", "token", "dataset_revision", "forget_data", "retain_data", "forget_split",
    "retain_split", "max_train_samples", "demo_seed",
)  # fmt: skip


@dataclass
class TokenProbeFlags(TokenizeFlags):
    """Flags of this script besides those of the data."""

    model_name_or_path: str | None = flag(None, "The model that will be made to forget.")
    model_revision: str | None = flag(None, "Its branch, tag or commit on the Hub.")
    layers: list[int] | None = field(
        default=None,
        metadata={"help": "Decoder layers, from 0, whose outputs get a probe each; default: every fourth."},
    )
    output_dir: str | None = flag(None, "Where a folder layer_<L> for each probe goes.")
    overwrite_output_dir: bool = flag(False, "Write into an output directory that is not empty.")
    learning_rate: float = flag(1e-3, "Of AdamW, constant.")
    weight_decay: float = flag(0.01, "Of AdamW.")
    num_train_epochs: int = flag(3, "Passes over the forget rows; as many retain rows are seen.")
    per_device_train_batch_size: int = flag(4, "Rows of each set in a step.")
    seed: int = flag(42, "Of the order of the rows and of those held out.")
    dtype: str = flag("float32", "Precision of the model's weights; the probes train in float32.")
    use_cpu: bool = flag(False, "Run on the CPU; implied where there is no accelerator.")


def main(argv=None):
    """Train the probes; returns the exit code."""
    flags, data = _parse(sys.argv[1:] if argv is None else list(argv))
    if flags is None:
        return None
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    folder = Path(flags.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not flags.overwrite_output_dir:
        raise UserError(f"--output_dir '{folder}' is there already; pass --overwrite_output_dir or another")
    tokenizer, rows, held_out, record = _read_rows(flags, data)
    for layer, scores in _train(flags, data, tokenizer, rows, held_out, record).items():
        shown = ", ".join(f"{name} {_shown(scores[name])}" for name in ("accuracy", "precision", "recall", "f1"))
        logger.info("layer %d: %s on %d held-out tokens", layer, shown, scores["tokens"])
    logger.info("the probes are in %s; pass one to run_unlearn.py as --selection_probe %s/layer_L", folder, folder)
    return None


def _parse(argv):
    """Return (TokenProbeFlags, DataFlags), or (None, None) where --help was asked for and printed."""
    argv, config = split_config(argv)
    known = DataFlags.__dataclass_fields__
    copied = [
        (name, known[name].type, field(default=known[name].default, metadata=known[name].metadata)) for name in DATA
    ]

    def unknown(name, parser):
        return unknown_option(name, parser, f"{SCRIPT} --help")

    parser = make_parser([TokenProbeFlags, make_dataclass("ProbeData", copied)], SCRIPT, unknown)
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        return None, None
    flags, data = parser.parse([*config_words(config, parser, unknown), *argv])
    for name in ("model_name_or_path", "output_dir"):
        if not getattr(flags, name):
            raise UserError(f"--{name} is missing")
    for name in ("num_train_epochs", "per_device_train_batch_size", "max_length"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(flags, name)}")
    if not (flags.learning_rate > 0 and flags.weight_decay >= 0):
        raise UserError("--learning_rate must be above 0, and --weight_decay at least 0")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{SCRIPT} runs in one process; type python {SCRIPT} without a launcher")
    given = {name: getattr(data, name) for name in DATA}
    return flags, DataFlags(**{**given, "max_train_samples": given["max_train_samples"] or PAIRS})


def _read_rows(flags, data):
    """Return (tokenizer, {set: tokenized rows}, the held-out ones, what config.json says of model and data)."""
    from llm_unlearn.data.splits import check_trainable, load_split
    from llm_unlearn.data.tokenize import tokenize_rows
    from llm_unlearn.models import context_length, load_tokenizer, model_fingerprint
    from llm_unlearn.probe_training import split_rows

    check_trainable(data.domain)
    name, hub = flags.model_name_or_path, _hub(flags, data)
    tokenizer, limit = load_tokenizer(name, **hub), context_length(name, **hub)
    flags.max_length = flags.max_length or min(LENGTH, limit or LENGTH)
    options = flags.tokenize_options(limit)
    rows, held_out, origins = {}, {}, {}
    for part in ("forget", "retain"):
        source = load_split(part, data)
        if source is None:
            raise UserError(f"domain '{data.domain}' was given no {part} set; pass --{part}_data FILE")
        texts = split_rows(source.rows, flags.seed)
        rows[part], held_out[part] = (tokenize_rows(half, tokenizer, options, part) for half in texts)
        origins[part] = source.origins
    model = {"name": name, "revision": flags.model_revision, "fingerprint": model_fingerprint(name, **hub)}
    return tokenizer, rows, held_out, {"model": model, "data": origins, "max_length": flags.max_length}


def _train(flags, data, tokenizer, rows, held_out, record):
    """Train, measure and save; returns {layer: scores on the held-out rows}."""
    import torch

    from llm_unlearn.data.selectors_probe import LayerStates, ProbeOptions, fit_probes, measure_probes
    from llm_unlearn.data.streams import pad_id
    from llm_unlearn.decoder import decoder_layers
    from llm_unlearn.models import checked_layers, load_model

    has_accelerator = torch.accelerator.is_available() and not flags.use_cpu
    device = torch.accelerator.current_accelerator() if has_accelerator else torch.device("cpu")
    model = load_model(flags.model_name_or_path, flags.dtype, **_hub(flags, data))
    depth = len(decoder_layers(model))
    layers = checked_layers(flags.layers or [*range(3, depth, 4)] or [depth - 1], depth)
    options = ProbeOptions(
        flags.learning_rate, flags.weight_decay, flags.num_train_epochs, flags.per_device_train_batch_size, flags.seed
    )
    states = LayerStates(model, layers, device, pad_id(tokenizer))
    logger.info(
        "probes of layers %s of %s: %d forget and %d retain sequences", " ".join(map(str, layers)),
        flags.model_name_or_path, len(rows["forget"]), len(rows["retain"]),
    )  # fmt: skip
    probes, steps = fit_probes(states, rows, options, progress=True)
    scores = measure_probes(states, probes, held_out, flags.per_device_train_batch_size)
    for layer, probe in probes.items():
        probe.record = {**record, "steps": steps, "options": asdict(options), "held_out": scores[layer]}
        probe.save(Path(flags.output_dir) / f"layer_{layer}")
    return scores


def _hub(flags, data):
    return {"revision": flags.model_revision, "cache_dir": data.cache_dir, "token": data.token}


def _shown(value):
    return "undefined" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
