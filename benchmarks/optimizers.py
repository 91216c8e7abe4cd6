"""Measure what ten steps of GradDiff cost with each optimizer beside AdamW: FLOPs, and time.

OMP_NUM_THREADS=1 python benchmarks/optimizers.py --tokenizer TOKENIZER.json --data_dir TOFU --output optimizers.json
"""

import argparse
import copy
import json
import os
import shlex
import statistics
import tempfile
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from llm_unlearn.errors import UserError, run_script

STEPS, BATCH = 10, 4
TARGET = 1.10
"""Of Sophia with an estimate every ten steps, beside AdamW."""
ADAMW = "AdamW"
SOPHIA = {"unlearn_optimizer": "sophia", "hessian_interval": STEPS}
VARIANTS = {
    ADAMW: {},
    "Sophia, gnb": SOPHIA,
    "Sophia, gnb of the forget rows": {**SOPHIA, "hessian_data": "forget"},
    "Sophia, hutchinson": {**SOPHIA, "hessian_estimator": "hutchinson"},
    "Sophia, empirical_fisher": {**SOPHIA, "hessian_estimator": "empirical_fisher"},
    "soul_legacy": {"unlearn_optimizer": "soul_legacy"},
    "muon": {"unlearn_optimizer": "muon"},
}
"""{what is shown: flags}; those of the first two with gnb have a target."""


def main(argv=None):
    """Run the benchmark; returns the exit code, 0 also where a target is missed."""
    return run_script(_main, argv)


def _main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="tokenizer.json; default: of the demo world.")
    parser.add_argument("--data_dir", help="TOFU's files, as run_unlearn.py takes them; default: the demo world's.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="Where to run; cuda in bfloat16.")
    parser.add_argument("--repeats", type=int, default=5, help="Timed rounds, the variants in alternation.")
    parser.add_argument("--quick", action="store_true", help="Tiny sizes: whether all runs, not what it costs.")
    parser.add_argument("--output", type=Path, help="Where the numbers go as JSON.")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError(f"--repeats must be at least 1, but is {args.repeats}")
    import torch
    import training_report

    from llm_unlearn.records import package_versions

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but this PyTorch sees no CUDA device; pass --device cpu")
    # CPU seconds are those of one thread.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as args.folder:
        rows = run(args)
    command = shlex.join(["python", "benchmarks/optimizers.py", *argv])
    setting = {"device": args.device, "quick": args.quick, "repeats": args.repeats}
    found = training_report.record(f"OMP_NUM_THREADS=1 {command}", rows, setting, package_versions())
    training_report.show(rows)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**found, "benchmark": "optimizers"}, indent=2) + "\n", encoding="utf-8")


def run(args):
    """Return the rows: FLOPs and time of each optimizer, over AdamW's.

    The model is the Llama of 25 million weights of benchmarks/training.py; no reference is asked, beside whose share of
    a step the passes of an estimate would look smaller.

    Args:
        args: the parsed command line, with a `folder` for temporary files.
    """
    from subjects import load_tokenizer_alone
    from training_meters import UncomputedProducts, alternate, flops, ratios
    from training_report import Row
    from training_steps import _quiet, dataset_of, small

    tokenizer = load_tokenizer_alone(args.tokenizer, args.folder)
    streams = dataset_of(args, tokenizer).streams
    data = {name: rows[: STEPS * BATCH] for name, rows in streams.items()}
    model, found, trainers = small(tokenizer, args).to(args.device), {}, {}
    with _quiet():
        for name, flags in VARIANTS.items():
            trainers[name] = _trainer(copy.deepcopy(model), data, args, flags)
            with UncomputedProducts():
                found[name] = flops(trainers[name].train)
        spent = alternate({name: part.train for name, part in trainers.items()}, args.repeats, args.device)
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    rows = []
    for name in list(VARIANTS)[1:]:
        job = f"{name}; {STEPS} steps of GradDiff, {BATCH} rows a stream, {size:.0f} M weights"
        target = TARGET if "gnb" in name else None
        absolute = {"FLOPs": found[name], "AdamW's FLOPs": found[ADAMW]}
        rows.append(Row("O1", job, "FLOPs / AdamW's", found[name] / found[ADAMW], None, target, absolute=absolute))
        absolute = {f"{part} seconds": statistics.median(spent[part]) for part in (name, ADAMW)}
        timed = ratios(spent[name], spent[ADAMW])
        rows.append(Row.timed("O1", job, "time / AdamW's", timed, target=target, absolute=absolute))
    return rows


def _trainer(model, data, args, flags):
    from training_steps import make_trainer

    from llm_unlearn.methods import trainer_class

    default = trainer_class("grad_diff").args_class.__dataclass_fields__["optim"].default
    options = {"optim": default, "max_steps": STEPS, "bf16": args.device == "cuda", **flags}
    if flags.get("hessian_estimator") == "hutchinson":
        options["bf16"] = False
    return make_trainer("grad_diff", model, data, args.folder, BATCH, args.device, **options)


if __name__ == "__main__":
    raise SystemExit(main())
