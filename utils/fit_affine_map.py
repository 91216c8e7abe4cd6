"""Fit the affine maps of --unlearn_method checkpoint_transfer: from a teacher's hidden states to the target model's.

python utils/fit_affine_map.py --teacher_model_name_or_path EARLY [--teacher_revision BRANCH] \
    --target_model_name_or_path MODEL --domain wmdp_bio --output_dir MAP

A layer l is the decoder layer of index l, counted from 0; its map leads from what it hands on in the teacher to what it
hands on in the target model. It is fitted to the forget and the retain set, or to --fit_data, at the tokens that a loss
on hidden states counts; every tenth row is held out, and the errors there are printed and kept in MAP/metadata.json,
with the fingerprints of both models. Under torchrun each process holds both models whole and takes its share of the
batches; the sums are in float64, so that any number of processes fits the same map.
"""

import logging
import random
import sys
from dataclasses import dataclass, field

from llm_unlearn.arguments import TokenizeFlags, flag
from llm_unlearn.cli.script_flags import check_counts, check_output, parse_script, require_flags
from llm_unlearn.errors import UserError, run_cli
from llm_unlearn.processes import is_first_process, set_up_logging

logger = logging.getLogger("llm_unlearn.fit_affine_map")
SCRIPT, ALPHA, VARIANCE = "utils/fit_affine_map.py", 0.01, 0.99
SETS = ("domain", "data_dir", "forget_data", "retain_data", "forget_split", "retain_split")
DATA = (*SETS, "cache_dir", "token", "dataset_revision", "max_train_samples", "demo_seed")


@dataclass
class FitFlags(TokenizeFlags):
    """Flags of this script besides those of the data."""

    teacher_model_name_or_path: str | None = flag(None, "The model whose hidden states are mapped.")
    teacher_revision: str | None = flag(None, "Its branch, tag or commit on the Hub.")
    target_model_name_or_path: str | None = flag(None, "The model to whose hidden states they are mapped.")
    model_revision: str | None = flag(None, "Its branch, tag or commit on the Hub.")
    output_dir: str | None = flag(None, "Where the maps and metadata.json go.")
    overwrite_output_dir: bool = flag(False, "Write into an output directory that is not empty.")
    layers: list[int] | None = field(
        default=None, metadata={"help": "Decoder layers, counted from 0, that get a map each; default: all."}
    )
    kind: str = flag(
        "ridge",
        "ridge, least squares with a penalty; svcca, by canonical correlations of the main directions of each side.",
        choices=["ridge", "svcca"],
    )
    alpha: float | None = flag(None, f"Penalty of ridge, > 0, on the scatter summed over tokens; default {ALPHA}.")
    svd_variance: float | None = flag(
        None, f"Share of each side's variance that the directions of svcca explain, in (0, 1]; default {VARIANCE}."
    )
    fit_data: str | None = flag(
        None, "Rows to fit to in place of the forget and the retain set, in the forms of --forget_data."
    )
    held_out_share: float = flag(0.1, "Share of the rows that is not fitted to but measured on, in (0, 1).")
    per_device_eval_batch_size: int = flag(8, "Rows of a batch.")
    dtype: str = flag("float32", "Precision of the two models' weights.")
    seed: int = flag(42, "Of which rows are held out.")
    use_cpu: bool = flag(False, "Run on the CPU; implied where there is no accelerator.")


def main(argv=None):
    """Fit and measure the maps; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parsed = parse_script(argv, FitFlags, DATA, SCRIPT)
    if parsed is None:
        return None
    flags, data = parsed
    _check(flags, data)
    set_up_logging()
    import torch
    from accelerate import PartialState

    flags.use_cpu = flags.use_cpu or not torch.accelerator.is_available()
    state = PartialState(cpu=flags.use_cpu)
    check_output(flags)
    maps = _fit(flags, data, state, argv)
    if is_first_process():
        maps.save(flags.output_dir)
        sys.stdout.write(table(maps.metadata))
        sys.stdout.flush()
        logger.info("the affine maps are in %s", flags.output_dir)
    state.wait_for_everyone()
    return None


def table(metadata):
    """Return the errors on the held-out rows as text for a terminal.

    Args:
        metadata: of AffineMaps.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table("layer", "mean square error", "without a map", "R^2", box=box.MARKDOWN)
    for column in shown.columns:
        column.justify = "right"
    for layer, found in metadata["held_out"].items():
        values = (found["mse"], found["identity_mse"], found["r2"])
        shown.add_row(layer, *("" if value is None else f"{value:.4g}" for value in values))
    console = Console(no_color=True, highlight=False, width=100)
    with console.capture() as capture:
        console.print(shown, markup=False)
    tokens = next(iter(metadata["held_out"].values()))["tokens"]
    heading = f"{metadata['kind']} fitted to {metadata['tokens']} tokens, measured on {tokens} others"
    return f"{heading}\n{capture.get().strip()}\n"


def _check(flags, data):
    require_flags(flags, ("teacher_model_name_or_path", "target_model_name_or_path", "output_dir"))
    other = {"ridge": "svd_variance", "svcca": "alpha"}[flags.kind]
    if getattr(flags, other) is not None:
        raise UserError(f"--{other} has no effect with --kind {flags.kind}")
    if flags.alpha is not None and not flags.alpha > 0:
        raise UserError(f"--alpha must be > 0, but is {flags.alpha}")
    for name in ("svd_variance", "held_out_share"):
        value = getattr(flags, name)
        if value is not None and not (0 < value < 1 or (name == "svd_variance" and value == 1)):
            raise UserError(f"--{name} must lie between 0 and 1, but is {value}")
    check_counts(flags, ("per_device_eval_batch_size", "max_length"))
    given = next((name for name in SETS if getattr(data, name) is not None), None)
    if flags.fit_data and given:
        raise UserError(f"--{given} has no effect with --fit_data")
    if not flags.fit_data and not data.domain:
        raise UserError("there is nothing to fit to; pass --domain DOMAIN or --fit_data FILE")


def _fit(flags, data, state, argv):
    """Return the fitted and measured AffineMaps; all processes call together."""
    from llm_unlearn.affine import AffineMaps, identity
    from llm_unlearn.affine_fitting import Batches, StatePairs, fit, fit_ridge, fit_svcca, measure
    from llm_unlearn.data.streams import pad_id
    from llm_unlearn.models import load_model
    from llm_unlearn.records import command_line

    tokenizer, rows, held_out, origins = _rows(flags, data)
    models = {"teacher": (flags.teacher_model_name_or_path, flags.teacher_revision)}
    models["target"] = (flags.target_model_name_or_path, flags.model_revision)
    hub = _hub(data)
    is_ridge, is_first = flags.kind == "ridge", is_first_process()
    # Hashing the files of a large model takes minutes, and the first process alone writes.
    identities = {role: identity(*place, **hub) for role, place in models.items()} if is_first else {}
    loaded = [load_model(name, flags.dtype, revision=revision, **hub) for name, revision in models.values()]
    pairs = StatePairs(*loaded, flags.layers, state.device)
    sharing = (flags.per_device_eval_batch_size, pad_id(tokenizer), state.process_index, state.num_processes)
    settings = {"alpha": flags.alpha or ALPHA} if is_ridge else {"svd_variance": flags.svd_variance or VARIANCE}
    solver, (setting,) = (fit_ridge if is_ridge else fit_svcca), settings.values()
    logger.info("fitting %s at %d layers to %d sequences", flags.kind, len(pairs.layers), len(rows))
    found, tokens = fit(pairs, Batches(rows, *sharing), lambda sums: solver(sums, setting), not is_ridge, is_first)
    if tokens <= max(pairs.sizes):
        logger.warning("%d tokens are too few for maps of size %d; pass more rows", tokens, max(pairs.sizes))
    metadata = {"kind": flags.kind, **settings, "layer_indices": pairs.layers, "hidden_dim": pairs.sizes[1]}
    metadata |= {"teacher_hidden_dim": pairs.sizes[0], **identities, "data": origins, "tokens": tokens}
    metadata |= {"rows": {"fitted": len(rows), "held_out": len(held_out)}, "dtype": flags.dtype}
    metadata["command"] = command_line(argv, SCRIPT)
    if not is_ridge:
        metadata["svcca"] = {str(layer): {"similarity": float(part[2].mean()), "directions": len(part[2])}
                             for layer, part in found.items()}  # fmt: skip
    maps = AffineMaps({layer: part[:2] for layer, part in found.items()}, metadata, flags.output_dir)
    errors = measure(pairs, Batches(held_out, *sharing), maps.to(state.device), is_first)
    metadata["held_out"] = {str(layer): part for layer, part in errors.items()}
    return maps.to("cpu")


def _rows(flags, data):
    """Return (tokenizer, tokenized rows to fit to, held-out ones, their origins)."""
    from llm_unlearn.data.sources import HubOptions, load_source
    from llm_unlearn.data.splits import check_trainable, load_split
    from llm_unlearn.data.tokenize import tokenize_rows
    from llm_unlearn.models import context_length, load_tokenizer
    from llm_unlearn.teacher import require_same_tokenizer

    hub, teacher, target = _hub(data), flags.teacher_model_name_or_path, flags.target_model_name_or_path
    tokenizer = load_tokenizer(target, revision=flags.model_revision, **hub)
    require_same_tokenizer(load_tokenizer(teacher, revision=flags.teacher_revision, **hub), tokenizer, teacher)
    if flags.fit_data:
        options = HubOptions(data.dataset_revision, data.cache_dir, data.token)
        sources = [load_source(flags.fit_data, data.max_train_samples, options)]
    else:
        check_trainable(data.domain)
        sources = [found for name in ("forget", "retain") if (found := load_split(name, data)) is not None]
    rows = [row for source in sources for row in source.rows]
    if len(rows) < 2:
        raise UserError(f"a map needs at least 2 rows, one of them to measure it on, but was given {len(rows)}")
    random.Random(flags.seed).shuffle(rows)
    count = min(max(1, round(flags.held_out_share * len(rows))), len(rows) - 1)
    lengths = [
        context_length(name, revision=revision, **hub)
        for name, revision in ((teacher, flags.teacher_revision), (target, flags.model_revision))
    ]
    options = flags.tokenize_options(min((length for length in lengths if length), default=None))
    parts = [tokenize_rows(part, tokenizer, options, name) for part, name in
             ((rows[count:], "fitted"), (rows[:count], "held-out"))]  # fmt: skip
    return tokenizer, *parts, [origin for source in sources for origin in source.origins]


def _hub(data):
    return {"cache_dir": data.cache_dir, "token": data.token}


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
