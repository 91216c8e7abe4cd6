"""Make weight masks for --weight_mask: which weights of a model train, and which stay what they are.

python utils/make_weight_mask.py --target_model_name_or_path MODEL --domain tofu --score wagle --ratio 0.4,0.8,0.95 \
    --output mask/

A ratio is the share of all weights, embeddings and norms included, that train. Several ratios take one pass over the
data, and become mask/{domain}_{ratio}.safetensors. --score wagle needs a backward of the forget and of the retain set,
in float32; under torchrun each process holds the model whole and takes its share of the batches, and the file is the
same bit for bit.
"""

import json
import logging
import math
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from llm_unlearn.arguments import TokenizeFlags, flag
from llm_unlearn.cli.script_flags import FORGET_DATA, check_counts, parse_script
from llm_unlearn.errors import UserError, run_cli
from llm_unlearn.processes import is_first_process, set_up_logging
from llm_unlearn.weight_mask_flags import GAMMA, READS

logger = logging.getLogger("llm_unlearn.make_weight_mask")
SCRIPT = "utils/make_weight_mask.py"
DATA = (*FORGET_DATA, "retain_data", "retain_split", "refusal_data")


@dataclass
class MaskFlags(TokenizeFlags):
    """Flags of this script besides those of the data."""

    target_model_name_or_path: str | None = flag(None, "The model that will be made to forget.")
    model_revision: str | None = flag(None, "Its branch, tag or commit on the Hub.")
    score: str = flag(
        "wagle",
        "What makes a weight train: wagle, attribution to the forget loss where the retain loss is kept low; snip, "
        "|weight * forget gradient|; grad_norm, |forget gradient|; magnitude, |weight|; random; wanda, |weight| times "
        "the size of its input, in each row of the linear layers, all other weights training.",
        choices=list(READS),
    )
    ratio: str | None = flag(None, "Share of all weights that train, in (0, 1]; several with commas.")
    gamma: float | None = flag(
        None,
        "Curvature of the retain loss in --score wagle, > 0, which divides the mean retain gradient; default 1e-6. The "
        "published mu divides a sum over batches instead: it is this times the number of batches.",
    )
    scope: str | None = flag(
        None,
        "Which weights are in one ranking: global, all (default); layer, those of each decoder layer, and of each "
        "parameter outside them.",
        choices=["global", "layer"],
    )
    forget_loss: str | None = flag(
        None,
        "Loss whose gradient says what matters for forgetting: nll, of the forget set (default); refusal, of refusals "
        "as the answers to it, for po: from the rows, --refusal_data, or built in and drawn by the seed as po does.",
        choices=["nll", "refusal"],
    )
    output: str | None = flag(None, "FILE.safetensors for one ratio, or a folder for {domain}_{ratio}.safetensors.")
    overwrite_output_dir: bool = flag(False, "Replace mask files that are there.")
    report: bool = flag(False, "Print the masks' density by layer and module, and the histogram of the scores.")
    compare: str | None = flag(None, "Another mask of the same model, whose overlap --report prints.")
    max_retain_rows: int | None = flag(
        None, "Rows of the retain set that are read, drawn by the seed; default: as many as of the forget set."
    )
    per_device_train_batch_size: int = flag(4, "Rows of a batch; it changes the last bits of a sum.")
    seed: int = flag(42, "Of --score random, of the retain rows and of drawn refusals.")
    dtype: str = flag("float32", "Precision of the model's weights; gradients are summed in float32.")
    use_cpu: bool = flag(False, "Run on the CPU; implied where there is no accelerator.")


def main(argv=None):
    """Make the masks; returns the exit code."""
    parsed = parse_script(sys.argv[1:] if argv is None else list(argv), MaskFlags, DATA, SCRIPT)
    if parsed is None:
        return None
    flags, data = parsed
    ratios = _check(flags, data)
    set_up_logging()
    import torch
    from accelerate import PartialState

    flags.use_cpu = flags.use_cpu or not torch.accelerator.is_available()
    state, paths = PartialState(cpu=flags.use_cpu), _paths(flags, data, ratios)
    other = _compared(flags)
    tokenizer, rows, record = _read(flags, data)
    masks = _make(flags, data, ratios, tokenizer, rows, state)
    if is_first_process():
        from llm_unlearn.addons.mask_files import write_mask
        from llm_unlearn.addons.mask_report import show, show_scores

        for ratio, path in paths.items():
            write_mask(path, masks.bits[ratio], masks.shapes, {**record, "ratio": ratio})
            logger.info("the mask is in %s; pass it to run_unlearn.py as --weight_mask", path)
            if flags.report:
                show(masks, ratio, other)
        if flags.report:
            show_scores(masks)
    state.wait_for_everyone()
    return None


def _check(flags, data):
    """Refuse what cannot be done, fill in defaults, and return the ratios as written."""
    for name, value in (("target_model_name_or_path", flags.target_model_name_or_path), ("domain", data.domain),
                        ("ratio", flags.ratio), ("output", flags.output)):  # fmt: skip
        if not value:
            raise UserError(f"--{name} is missing")
    for name, scores in _TAKES.items():
        if getattr(flags, name) is not None and flags.score not in scores:
            raise UserError(f"--{name} has no effect with --score {flags.score}")
    flags.scope, flags.forget_loss = flags.scope or "global", flags.forget_loss or "nll"
    if flags.score == "wagle" and flags.gamma is None:
        flags.gamma = GAMMA
    if flags.gamma is not None and not 0 < flags.gamma < math.inf:
        raise UserError(f"--gamma must be above 0, and finite, but is {flags.gamma}")
    if data.refusal_data and flags.forget_loss != "refusal":
        raise UserError("--refusal_data has no effect without --forget_loss refusal")
    if flags.compare and not flags.report:
        raise UserError("--compare has no effect without --report True")
    check_counts(flags, ("per_device_train_batch_size", "max_retain_rows", "max_length"))
    if flags.seed < 0:
        raise UserError(f"--seed must not be negative, but is {flags.seed}")
    return _ratios(flags.ratio)


_TAKES = {
    "gamma": ("wagle",), "scope": ("wagle", "snip", "grad_norm", "magnitude", "random"), "max_retain_rows": ("wagle",),
    "forget_loss": ("wagle", "snip", "grad_norm"),
}  # fmt: skip


def _ratios(text):
    ratios = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for ratio in ratios:
        try:
            is_share = 0 < Fraction(ratio) <= 1
        except (ValueError, ZeroDivisionError):
            is_share = False
        if not is_share or "/" in ratio:
            raise UserError(
                f"--ratio must be numbers above 0 and up to 1, with commas as in 0.4,0.8, but has '{ratio}'"
            )
    return ratios


def _paths(flags, data, ratios):
    """Return {ratio: the file that its mask goes to}."""
    output = Path(flags.output)
    if output.suffix == ".safetensors":
        if len(ratios) > 1:
            raise UserError(f"--output '{output}' is one file for {len(ratios)} ratios; pass a folder, as in mask/")
        paths = {ratios[0]: output}
    elif output.suffix in (".pt", ".pth", ".bin"):
        raise UserError(f"masks are written as safetensors; pass --output {output.with_suffix('.safetensors')}")
    else:
        paths = {ratio: output / f"{data.domain}_{ratio}.safetensors" for ratio in ratios}
    there = [path for path in paths.values() if path.exists()] if is_first_process() else []
    if there and not flags.overwrite_output_dir:
        raise UserError(f"the mask '{there[0]}' is there already; pass --overwrite_output_dir True or another --output")
    return paths


def _compared(flags):
    if not flags.compare or not is_first_process():
        return None
    from llm_unlearn.addons.mask_files import read_mask

    return read_mask(flags.compare, flag="--compare")


def _read(flags, data):
    """Return (tokenizer, {set: tokenized rows}, what the file says of where it comes from)."""
    from llm_unlearn.data.plan import drawn_rows
    from llm_unlearn.data.splits import check_trainable, load_split
    from llm_unlearn.data.streams import UnlearnDataset
    from llm_unlearn.models import context_length, load_tokenizer, model_fingerprint

    check_trainable(data.domain)
    name, hub = flags.target_model_name_or_path, _hub(flags, data)
    tokenizer = load_tokenizer(name, **hub)
    options = flags.tokenize_options(context_length(name, **hub))
    rows = {}
    for part in READS[flags.score]:
        source = load_split(part, data)
        if source is None:
            raise UserError(f"domain '{data.domain}' was given no {part} set; pass --{part}_data FILE")
        rows[part] = _tokenized(flags, part, source.rows, tokenizer, options)
    if "retain" in rows:
        rows["retain"] = drawn_rows(rows["retain"], flags.max_retain_rows or len(rows["forget"]), flags.seed)
    record = {
        "domain": data.domain, "score": flags.score, "seed": str(flags.seed), "model": name,
        "model_hash": model_fingerprint(name, **hub) if is_first_process() else "",
        "data": json.dumps({part: UnlearnDataset({part: found}).fingerprints[part] for part, found in rows.items()}),
    }  # fmt: skip
    for key, scores in _TAKES.items():
        if key != "max_retain_rows" and flags.score in scores:
            record[key] = str(getattr(flags, key))
    return tokenizer, rows, record


def _tokenized(flags, part, rows, tokenizer, options):
    from llm_unlearn.data.refusals import PREFERRED, PreferredAnswers
    from llm_unlearn.data.tokenize import tokenize_rows

    if part == "retain" or flags.forget_loss != "refusal":
        return tokenize_rows(rows, tokenizer, options, part)
    answers = PreferredAnswers(tokenizer, options, PREFERRED, flags.seed, last_turn_only=True)
    return answers.of(tokenize_rows(rows, tokenizer, options, part, answers))


def _make(flags, data, ratios, tokenizer, rows, state):
    from llm_unlearn.addons.mask_making import MaskOptions, make_masks
    from llm_unlearn.models import load_model

    model = load_model(flags.target_model_name_or_path, flags.dtype, **_hub(flags, data))
    options = MaskOptions(flags.score, ratios, flags.scope, flags.gamma, flags.seed, flags.per_device_train_batch_size)
    return make_masks(model, rows, tokenizer, options, state)


def _hub(flags, data):
    return {"revision": flags.model_revision, "cache_dir": data.cache_dir, "token": data.token}


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
