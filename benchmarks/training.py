"""Measure what unlearning steps cost beside one bare forward and backward of the same tokens: FLOPs, time, memory.

python benchmarks/training.py --tokenizer TOKENIZER.json --data_dir TOFU_FOLDER --output training.json
"""

import argparse
import importlib
import json
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from llm_unlearn.errors import UserError, run_script

GROUPS = {
    ("P1", "P2", "P3"): ("training_heads", "run"),
    ("P4", "P5"): ("training_steps", "run"),
    ("P6",): ("training_layers", "run"),
    ("P7",): ("training_memory", "run_reference"),
    ("P16",): ("training_padding", "run"),
    ("P19",): ("training_memory", "run_slopes"),
    ("large",): ("training_large", "run"),
}
"""{ids: (module, function that returns their rows)}; where there are several ids, it is told which."""
IDS = [id for ids in GROUPS for id in ids]


def main(argv=None):
    """Run the benchmark; returns the exit code, 0 also where a target is missed."""
    return run_script(_main, argv)


def parse(argv):
    """Return the parsed command line.

    Raises:
        UserError: an unknown id, no round, or a page of half the rows.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"Ids to run, as P1,P4; known: {', '.join(IDS)}.")
    parser.add_argument("--tokenizer", nargs="+", default=[], help="tokenizer.json; P16 takes further ones as well.")
    parser.add_argument("--data_dir", help="TOFU's files, as run_unlearn.py takes them; default: the demo world's.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="Where to run; cuda in bfloat16.")
    parser.add_argument("--shapes", nargs="+", choices=["tiny", "1B", "8B"], help="Models of `large`.")
    parser.add_argument("--repeats", type=int, default=5, help="Timed rounds, the variants in alternation.")
    parser.add_argument("--quick", action="store_true", help="Tiny sizes: whether all runs, not what it costs.")
    parser.add_argument("--output", type=Path, help="Where the numbers go as JSON.")
    parser.add_argument("--page", type=Path, help="Markdown page whose section on training is written anew.")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError(f"--repeats must be at least 1, but is {args.repeats}")
    default = [id for id in IDS if id != "large" or args.device == "cuda"]
    args.ids = args.only.split(",") if args.only else default
    unknown = [id for id in args.ids if id not in IDS]
    if unknown:
        raise UserError(f"unknown --only '{unknown[0]}'. Known: {', '.join(IDS)}")
    if args.page and set(args.ids) < set(default):
        raise UserError("--page takes every row; leave out --only")
    args.tokenizers, args.tokenizer = args.tokenizer, args.tokenizer[0] if args.tokenizer else None
    args.shapes = args.shapes or (["1B", "8B"] if args.device == "cuda" else ["tiny"])
    return args


def _main(argv):
    args = parse(argv)
    import torch
    import training_report

    from llm_unlearn.records import package_versions

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but this PyTorch sees no CUDA device; pass --device cpu")
    # CPU seconds are those of one thread.
    torch.set_num_threads(1)
    started, rows = time.time(), []
    with tempfile.TemporaryDirectory() as args.folder:
        for ids, (module, function) in GROUPS.items():
            asked = [id for id in ids if id in args.ids]
            if asked:
                run = getattr(importlib.import_module(module), function)
                rows += run(args, asked) if len(ids) > 1 else run(args)
                sys.stderr.write(f"{', '.join(asked)} done after {time.time() - started:.0f} s\n")
    rows.sort(key=lambda row: IDS.index(row.id))
    command = shlex.join(["python", "benchmarks/training.py", *argv])
    found = training_report.record(f"OMP_NUM_THREADS=1 {command}", rows, _setting(args, started), package_versions())
    training_report.show(rows)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if args.page:
        training_report.write_section(args.page, training_report.section(found), args.device)


def _setting(args, started):
    return {
        "device": args.device,
        "quick": args.quick,
        "repeats": args.repeats,
        "data": "TOFU" if args.data_dir else "the demo world",
        "tokenizer": ", ".join(Path(path).stem for path in args.tokenizers) or "of the demo world",
        "minutes": round((time.time() - started) / 60, 2),
    }


if __name__ == "__main__":
    raise SystemExit(main())
