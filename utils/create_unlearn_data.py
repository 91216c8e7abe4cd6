"""Write the sets of a domain into a folder that replaces the Hub, ready to be copied to a machine without network.

python utils/create_unlearn_data.py --domain wmdp_bio --output_dir DIR
python utils/create_unlearn_data.py --domain wmdp_bio --output_dir DIR --tokenizer_name MODEL --max_length 1024 \
    --min_length 1024 --rewrites rewrites.jsonl --chat_data hub:HuggingFaceH4/ultrachat_200k:train_sft
run_unlearn.py then takes --domain wmdp_bio --data_dir DIR; what was made of demo, or of custom, --domain custom
--data_dir DIR.

Lengths are tokens with --tokenizer_name and characters without. DIR/manifest.json says of every file where its rows
came from, at which revision, what was left out, and its sha256. DIR appears when all of it is written.
"""

import json
import logging
import os
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from llm_unlearn.arguments import TokenizerFlags, flag
from llm_unlearn.cli.script_flags import FORGET_DATA, parse_script
from llm_unlearn.errors import MissingSplitError, UserError, run_cli
from llm_unlearn.processes import set_up_logging

SCRIPT = "utils/create_unlearn_data.py"
DATA = (*FORGET_DATA, "retain_data", "holdout_data", "retain_split", "refusal_data")
logger = logging.getLogger("llm_unlearn.create_unlearn_data")


@dataclass
class CreateFlags(TokenizerFlags):
    """Flags of this script besides those of the data."""

    output_dir: str | None = flag(None, "The folder; it must not hold anything yet.")
    splits: list[str] | None = field(
        default=None, metadata={"help": "Which sets of the domain, as forget retain; default: all that there are."}
    )
    max_length: int | None = flag(None, "Cut texts to so many tokens or characters.")
    min_length: int | None = flag(None, "Leave out texts of fewer tokens or characters, counted after the cut.")
    keywords: str | None = flag(
        None,
        "Leave out forget rows with none of these words and retain rows with any: a file with one on each line, a CSV "
        "file with a column keyword, or a list with commas; capitals do not matter.",
    )
    rewrites: str | None = flag(
        None, "File of rewrites, row n of forget row n; with --tokenizer_name they are aligned for rewritten_transfer."
    )
    question_template: str | None = flag(None, "Template of the alignment, as run_unlearn.py is given it.")
    chat_data: str | None = flag(None, "Chat rows to mix into the retain set: a file or hub:owner/name:split[#column].")
    chat_share: float | None = flag(
        None, "So many chat rows for each retain row (default 0.25), then shuffled and trimmed to as many as before."
    )
    seed: int | None = flag(None, "Of the shuffle of --chat_data; default 42.")


def main(argv=None):
    """Write the folder; returns the exit code."""
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    parsed = parse_script(words, CreateFlags, DATA, SCRIPT)
    if parsed is None:
        return
    flags, data = parsed
    set_up_logging()
    _check(flags)
    folder = Path(flags.output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output_dir '{folder}' is there and not empty; delete it or pass another")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = _write_sets(flags, data, partial)
    _write_manifest(partial, words, data, files)
    os.replace(partial, folder)
    logger.info("%d sets are in %s; pass it as --data_dir", len(files), folder)


def _write_sets(flags, data, folder):
    """Write every set; returns {file: facts} of the manifest."""
    from llm_unlearn.data.sources import HubOptions
    from llm_unlearn.data.splits import load_split, local_path, split_names, subsets
    from llm_unlearn.data.unlearn_data import write_jsonl

    if data.domain == "muse":
        raise UserError("the sets of muse_news and muse_books have the same names; pass one of them as --domain")
    preparation, files = _preparation(flags), {}
    names = {domain: split_names(domain) for domain in subsets(data.domain)}
    unknown = set(flags.splits or ()) - {name for found in names.values() for name in found}
    if unknown:
        raise UserError(f"--splits {min(unknown)}: {data.domain} has {', '.join(next(iter(names.values())))}")
    for domain, found in names.items():
        part = replace(data, domain=domain)
        for name in [name for name in found if name in (flags.splits or found)]:
            try:
                source = load_split(name, part)
            except MissingSplitError as error:
                if name == "forget" or flags.splits:
                    raise
                logger.warning("going on without the %s set: %s", name, error)
                continue
            if source is None:
                continue
            rows, facts = preparation.prepare(name, source, HubOptions(None, data.cache_dir, data.token))
            path = f"{local_path(name, part)}.jsonl"
            facts["sha256"] = write_jsonl(folder / path, rows)
            files[path] = {"set": name, "rows": len(rows), "bytes": (folder / path).stat().st_size, **facts}
            logger.info("%s: %d rows", path, len(rows))
    _require_effect(flags, files)
    return files


def _preparation(flags):
    from llm_unlearn.data.selectors_text import patterns
    from llm_unlearn.data.unlearn_data import Preparation

    tokenizer = None
    if flags.tokenizer_name:
        from llm_unlearn.models import load_tokenizer

        tokenizer = load_tokenizer(flags.tokenizer_name, trust_remote_code=flags.trust_remote_code)
    return Preparation(
        rewrites=flags.rewrites,
        searched=patterns(flags.keywords, None) if flags.keywords else None,
        max_length=flags.max_length,
        min_length=flags.min_length,
        chat_data=flags.chat_data,
        chat_share=0.25 if flags.chat_share is None else flags.chat_share,
        seed=42 if flags.seed is None else flags.seed,
        tokenizer=tokenizer,
        question_template=flags.question_template,
    )


def _write_manifest(folder, words, data, files):
    from llm_unlearn.records import command_line, package_versions

    record = {"schema_version": 1, "kind": "unlearn_data", "domain": data.domain}
    record |= {"command": command_line(words, SCRIPT), "versions": package_versions(), "files": files}
    (folder / "manifest.json").write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")


def _require_effect(flags, files):
    """Refuse flags whose set is not among those that were written."""
    if not files:
        raise UserError("there is nothing to write: the domain has no set that can be read")
    written = {facts["set"] for facts in files.values()}
    needed = {"rewrites": {"forget"}, "chat_data": {"retain"}, "keywords": {"forget", "retain"}}
    for name, sets in needed.items():
        if getattr(flags, name) and not sets & written:
            raise UserError(f"--{name} has no effect: no {' or '.join(sorted(sets))} set is written")


def _check(flags):
    if not flags.output_dir:
        raise UserError("--output_dir is missing")
    for name in ("max_length", "min_length"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(flags, name)}")
    if flags.chat_share is not None and not 0 < flags.chat_share <= 1:
        raise UserError(f"--chat_share must lie in (0, 1], but is {flags.chat_share}")
    for name, needed in (("chat_share", "chat_data"), ("seed", "chat_data"), ("question_template", "rewrites")):
        if getattr(flags, name) is not None and not getattr(flags, needed):
            raise UserError(f"--{name} has no effect without --{needed}")
    lengths = flags.max_length or flags.min_length or flags.rewrites
    if flags.tokenizer_name and not lengths:
        raise UserError("--tokenizer_name has no effect without --max_length, --min_length or --rewrites")
    if flags.question_template and not flags.tokenizer_name:
        raise UserError("--question_template has no effect without --tokenizer_name, which aligns the rewrites")


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
