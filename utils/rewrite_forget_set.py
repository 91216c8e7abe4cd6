"""Write beside every forget row what it is to say instead, for --unlearn_method rewritten_transfer.

python utils/rewrite_forget_set.py --kind inaccurate --rewriter_model_name_or_path WRITER \
    --target_model_name_or_path MODEL --domain wmdp_bio --output_file forget.jsonl
python utils/rewrite_forget_set.py --rewrites FILE --target_model_name_or_path MODEL --domain wmdp_bio \
    --output_file forget.jsonl
python utils/rewrite_forget_set.py --kind refusal --target_model_name_or_path MODEL --domain tofu --output_file F.jsonl

The kinds: inaccurate says the same with false facts, alternate says something as plausible about other things, refusal
declines to answer. A model writes them (INSTRUCTIONS in llm_unlearn/data/rewrites.py), or they come from a file, row n
being the rewrite of row n; refusals without a model come from --refusal_data or from twelve of our own. The rows keep
their columns and get `rewritten`, `alignment` (for each token of the original, under the model's tokenizer and
template, the position of the token of the rewrite that stands in its place) and `aligned_by`. Killed and started again,
the command goes on after the last batch that was written.
"""

import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn.arguments import TokenizeFlags, TokenizerFlags, flag
from llm_unlearn.cli.script_flags import FORGET_DATA, parse_script
from llm_unlearn.errors import UserError, run_cli, unknown_name
from llm_unlearn.processes import set_up_logging

SCRIPT = "utils/rewrite_forget_set.py"
logger = logging.getLogger("llm_unlearn.rewrite_forget_set")
_OF_WRITER = ("temperature", "top_p", "max_new_tokens", "rewriter_revision")


@dataclass
class RewriteFlags(TokenizerFlags, TokenizeFlags):
    """Flags of this script besides those of the data; --max_length cuts texts before they are rewritten."""

    kind: str | None = flag(None, "What the rewrites say: inaccurate, alternate or refusal.")
    rewriter_model_name_or_path: str | None = flag(
        None, "The model that writes; a chat template is used if it has one."
    )
    rewriter_revision: str | None = flag(None, "Its branch, tag or commit on the Hub.")
    rewrites: str | None = flag(None, "File of finished rewrites; row n belongs to row n of the forget set.")
    target_model_name_or_path: str | None = flag(
        None, "The model that is to forget, or its tokenizer's folder: its tokens are aligned."
    )
    output_file: str | None = flag(None, "Where the rows go, a .jsonl file.")
    temperature: float | None = flag(None, "Of the writer's sampling, default 0.7; 0 takes the likeliest token.")
    top_p: float | None = flag(None, "Share of the probability that sampled tokens hold, in (0, 1]; default 1.")
    max_new_tokens: int | None = flag(None, "Tokens of a rewrite at most; default: half again as many as the original.")
    per_device_eval_batch_size: int = flag(8, "Rows that are rewritten together.")
    seed: int = flag(42, "Of the writer's sampling.")
    dtype: str = flag("auto", "Precision of the writer's weights.")
    use_cpu: bool = flag(False, "Run on the CPU; implied where there is no accelerator.")


def main(argv=None):
    """Write the rows; returns the exit code."""
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    parsed = parse_script(words, RewriteFlags, (*FORGET_DATA, "refusal_data"), SCRIPT)
    if parsed is None:
        return
    flags, data = parsed
    set_up_logging()
    _check(flags, data)
    from llm_unlearn.data.splits import check_trainable, load_split
    from llm_unlearn.models import load_tokenizer

    check_trainable(data.domain)
    refusal_data, data.refusal_data = data.refusal_data, None
    source = load_split("forget", data)
    if source is None:
        raise UserError(f"domain '{data.domain}' was given no forget set; pass --forget_data FILE")
    name = flags.tokenizer_name or flags.target_model_name_or_path
    tokenizer = load_tokenizer(name, trust_remote_code=flags.trust_remote_code, **_hub(data))
    rows, made = _rewritten(flags, data, source.rows, tokenizer, refusal_data)
    rows = _aligned(rows, made["rewrites"], tokenizer, flags)
    _write(flags, words, source, rows, made)


def _rewritten(flags, data, rows, tokenizer, refusal_data):
    """Return (the rows, cut where asked, {"rewrites": list of texts, and how they were made})."""
    from llm_unlearn.data.reshape import REFUSALS, read_refusals
    from llm_unlearn.data.rewrites import read_rewrites, refusals_of
    from llm_unlearn.data.rows import fingerprint
    from llm_unlearn.data.unlearn_data import cut_rows, cut_text

    if flags.rewrites:
        rewrites = read_rewrites(flags.rewrites, rows)
        made = {"rewrites_file": flags.rewrites, "sha256": fingerprint(rewrites)}
        if flags.max_length:
            rewrites = [cut_text(rewrite, flags.max_length, tokenizer) for rewrite in rewrites]
        return cut_rows(rows, flags.max_length, tokenizer), {"rewrites": rewrites, **made}
    rows = cut_rows(rows, flags.max_length, tokenizer)
    if flags.rewriter_model_name_or_path:
        return rows, _written(flags, data, rows)
    refusals = read_refusals(refusal_data) if refusal_data else REFUSALS
    return rows, {"rewrites": refusals_of(rows, refusals), "refusals": refusal_data or "built in"}


def _written(flags, data, rows):
    """Let the model write; returns {"rewrites", "rewriter", ...}."""
    import torch

    from llm_unlearn.data.rewrites import Drawing, rewrite_rows
    from llm_unlearn.evaluation.store import RecordStore
    from llm_unlearn.models import load_model, load_tokenizer, model_fingerprint

    name = flags.rewriter_model_name_or_path
    hub = {**_hub(data), "revision": flags.rewriter_revision, "trust_remote_code": flags.trust_remote_code}
    on_cpu = flags.use_cpu or not torch.accelerator.is_available()
    device = "cpu" if on_cpu else torch.accelerator.current_accelerator()
    drawing = Drawing(
        0.7 if flags.temperature is None else flags.temperature, flags.top_p or 1.0, flags.max_new_tokens, flags.seed,
        flags.per_device_eval_batch_size, model_fingerprint(name, **hub),
    )  # fmt: skip
    model, tokenizer = load_model(name, flags.dtype, **hub).to(device).eval(), load_tokenizer(name, **hub)
    store = RecordStore(_partial(flags), "rewrites")
    rewrites = rewrite_rows(rows, flags.kind, model, tokenizer, drawing, store)
    return {"rewrites": rewrites, "rewriter": name, "drawing": vars(drawing)}


def _aligned(rows, rewrites, tokenizer, flags):
    """Return the rows with their rewrites and alignments; what cannot be trained on is left out."""
    from tqdm.auto import tqdm

    from llm_unlearn.data.alignment import REWRITTEN, aligned_row, original_content

    options, aligned, empty, same = flags.tokenize_options(None), [], 0, 0
    for row, rewrite in tqdm(list(zip(rows, rewrites, strict=True)), "aligning", leave=False):
        empty += not rewrite.strip()
        same += rewrite == original_content(row)
        found = aligned_row({**row, REWRITTEN: rewrite}, tokenizer, options) if rewrite.strip() else None
        aligned += [found] if found else []
    if empty or len(aligned) < len(rows):
        short = len(rows) - len(aligned) - empty
        logger.warning("%d rewrites are empty and %d texts too short; these rows are left out", empty, short)
    if same:
        logger.warning("%d of %d rewrites say what the original says", same, len(rows))
    if not aligned:
        raise UserError(
            "no row is left: every rewrite is empty or too short; pass another writer or a larger --max_new_tokens"
        )
    return aligned


def _write(flags, words, source, rows, made):
    """Write the manifest and then the rows, each whole or not at all, and forget what was kept for a restart."""
    from llm_unlearn.data.unlearn_data import write_jsonl
    from llm_unlearn.records import command_line, package_versions

    path, partial = Path(flags.output_file), _partial(flags)
    partial.mkdir(parents=True, exist_ok=True)
    made = {name: value for name, value in made.items() if name != "rewrites"}
    record = {"schema_version": 1, "kind": "rewritten_forget_set", "rewrites": {"kind": flags.kind, **made}}
    record |= {"origins": source.origins, "rows": len(rows), "sha256": write_jsonl(partial / path.name, rows)}
    record |= {"command": command_line(words, SCRIPT), "versions": package_versions()}
    manifest = path.with_suffix(".manifest.json")
    (partial / manifest.name).write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(partial / manifest.name, manifest)
    os.replace(partial / path.name, path)
    shutil.rmtree(partial, ignore_errors=True)
    logger.info("%d rows with rewrites are in %s; pass it as --forget_data", len(rows), path)


def _partial(flags):
    """Return the folder beside the output file where finished batches lie until all are there."""
    path = Path(flags.output_file)
    return path.with_name(path.name + ".partial")


def _hub(data):
    return {"cache_dir": data.cache_dir, "token": data.token}


def _check(flags, data):
    from llm_unlearn.data.rewrites import KINDS

    if not flags.output_file or not flags.output_file.endswith(".jsonl"):
        raise UserError(f"--output_file must be a .jsonl file, but is '{flags.output_file}'")
    if Path(flags.output_file).exists():
        raise UserError(f"--output_file '{flags.output_file}' is there already; delete it or pass another")
    if not (flags.target_model_name_or_path or flags.tokenizer_name):
        raise UserError("--target_model_name_or_path is missing: its tokens are aligned")
    if flags.kind is not None and flags.kind not in KINDS:
        raise unknown_name("--kind", flags.kind, KINDS)
    writer = flags.rewriter_model_name_or_path
    if flags.rewrites and writer:
        raise UserError("--rewrites and --rewriter_model_name_or_path exclude each other; pass one of them")
    if not flags.rewrites and flags.kind is None:
        raise UserError(f"--kind is missing; pass one of {', '.join(KINDS)}, or --rewrites FILE")
    if not flags.rewrites and not writer and flags.kind != "refusal":
        raise UserError(f"--kind {flags.kind} needs --rewriter_model_name_or_path MODEL, or --rewrites FILE")
    if data.refusal_data and (flags.kind != "refusal" or flags.rewrites or writer):
        raise UserError("--refusal_data has no effect without --kind refusal, or beside rewrites from elsewhere")
    given = next((name for name in _OF_WRITER if getattr(flags, name) is not None), None)
    if given and not writer:
        raise UserError(f"--{given} has no effect without --rewriter_model_name_or_path")
    _check_numbers(flags)


def _check_numbers(flags):
    for name in ("max_length", "max_new_tokens", "per_device_eval_batch_size"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(flags, name)}")
    if flags.temperature is not None and not 0 <= flags.temperature < float("inf"):
        raise UserError(f"--temperature must be at least 0, and finite, but is {flags.temperature}")
    if flags.top_p is not None and not 0 < flags.top_p <= 1:
        raise UserError(f"--top_p must lie in (0, 1], but is {flags.top_p}")
    if flags.top_p is not None and flags.temperature == 0:
        raise UserError("--top_p has no effect with --temperature 0")
    if flags.seed < 0:
        raise UserError(f"--seed must not be negative, but is {flags.seed}")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
