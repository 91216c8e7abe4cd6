"""What masks, second-order steps and the invariance penalty do to unlearning, on two small worlds, over seeds.

OMP_NUM_THREADS=1 python benchmarks/composition.py --data_dir DIR --parts a b c --worlds demo tofu --seeds 0 1 2

(a) masks of WAGLE, of magnitude and at random, at equal ratios, at one learning rate and each at its own; (b) Sophia
and AdamW at equal steps, each at its own rate, chosen on the first seed; (c) NPO and RMU with and without ILU, right
after unlearning and as the unlearned model is fine-tuned on something else. The worlds are those of
benchmarks/unlearning_tiny.py. DIR holds models/, tofu_small/ and gsm8k/; without it there is the demo world alone, and
its prose stands in for GSM8K.

Seeds vary training and the random mask. Intervals are t intervals of 95%. A run that is finished, and has the same
command, is not repeated; a table of each part and study.json, with the command of every run, go to --output.
"""

import argparse
import functools
import json
import logging
import os
import shlex
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from composition_report import MOMENTS, chosen_rate, invariance_table, masks_table, optimizers_table
from composition_runs import Study
from unlearning_tiny import BOUND, _run, _script, demo_world, tofu_world

from llm_unlearn.data.rows import read_rows
from llm_unlearn.data.synthetic import make_world
from llm_unlearn.errors import UserError, run_cli
from llm_unlearn.records import package_versions

QUIET = "--save_strategy no --logging_strategy no"
SHARED = {
    "demo": f"--lr_scheduler_type constant --max_steps 40 --per_device_train_batch_size 8 {QUIET}",
    "tofu": f"--lr_scheduler_type constant --max_steps 30 --per_device_train_batch_size 4 {QUIET}",
}
METHODS = {
    ("demo", "npo"): ("1e-3", "--unlearn_method npo --retain_loss nll --retain_weight 8"),
    ("demo", "grad_diff"): ("4e-4", "--unlearn_method grad_diff --retain_loss nll --retain_weight 4"),
    ("demo", "rmu"): ("6e-3", "--config recipes/tiny/rmu.demo.yaml"),
    ("tofu", "npo"): ("1e-3", "--unlearn_method npo --retain_loss nll --retain_weight 1"),
    ("tofu", "grad_diff"): ("5e-4", "--unlearn_method grad_diff --retain_loss nll --retain_weight 3"),
    ("tofu", "rmu"): ("3e-3", "--config recipes/tiny/rmu.tofu.yaml"),
}
"""{(world, method): (learning rate with AdamW, flags)}, found on seed 0: without a mask or a penalty the forget set is
clearly forgotten, and the retain set is not."""
MASKS, RATIOS, FACTORS = ("wagle", "random", "magnitude"), ("0.2", "0.5"), (2, 4, 8)
"""Masks, their shares of weights that train, and by what the learning rate is multiplied for each to choose from."""
OPTIMIZERS = {"AdamW": "--optim adamw_torch", "Sophia": "--unlearn_optimizer sophia"}
RATES = ("5e-5", "1e-4", "2e-4", "5e-4", "1e-3", "2e-3", "5e-3")
ILU_WEIGHT = "0.1"
AUTHORS = "other authors"
"""A task close to what is forgotten: authors of the same kind whom the model has never seen."""
FINETUNING_RATES = {"demo": "2e-4", "tofu": "1e-4"}
FINETUNING = (
    "--lr_scheduler_type constant --max_steps 100 --per_device_train_batch_size 4 "
    "--optim adamw_torch --save_strategy steps --save_steps 10 --save_only_model True --logging_strategy no"
)
LONGEST = 320
"""Characters of a row of GSM8K, so that question and answer fit into 512 tokens of either tokenizer."""
NUM_ILU, NUM_MEASURED = 400, 40


# ---- The parts ----


def unlearning(world, method, seed, optimizer="AdamW", rate=None):
    """Return the words of an unlearning run; `rate` None takes that of METHODS."""
    known, flags = METHODS[world.name, method]
    words = shlex.split(f"{flags} {SHARED[world.name]} {OPTIMIZERS[optimizer]} --learning_rate {rate or known}")
    return [*words, "--target_model_name_or_path", world.model, *world.data(), "--seed", str(seed)]


def own_sets(world):
    """Return {name: file} of what is to be forgotten and to be kept."""
    return {"forget": world.forget, "retain": world.retain}


def mask_file(world, score, ratio, seed):
    """Return a mask of a world's model, made where it is not there yet; those of gradients have one seed."""
    folder = world.folder / f"masks/{score}{f'-{seed}' if score == 'random' else ''}"
    path = folder / f"custom_{ratio}.safetensors"
    if not path.is_file():
        words = ["--target_model_name_or_path", world.model, *world.data(), "--score", score, "--seed", str(seed)]
        words += ["--ratio", ",".join(RATIOS), "--output", str(folder), "--use_cpu", "True", "--overwrite_output_dir"]
        _run(_script("make_weight_mask"), "utils/make_weight_mask.py", [*words, "True"])
    return str(path)


def masks(study, world, args):
    """Run part a: no mask, and each mask at each ratio, at one rate; and at the smallest ratio each at its own rate."""
    for method in ("npo", "grad_diff"):
        known = METHODS[world.name, method][0]

        def at(mask, ratio, rate, seed, stage, method=method, known=known):
            words = unlearning(world, method, seed, rate=rate)
            if mask != "none":
                words += ["--weight_mask", mask_file(world, mask, ratio, seed if mask == "random" else 0)]
            fields = {"part": "a", "method": method, "mask": mask, "ratio": ratio, "rate": rate, "stage": stage}
            name = f"a-{method}-{mask}-{ratio}{'' if rate == known else f'-{rate}'}-{seed}"
            return study.train(world, name, words, own_sets(world), seed=seed, **fields)

        for mask, ratio in [("none", "1"), *((mask, ratio) for ratio in RATIOS for mask in MASKS)]:
            for seed in args.seeds:
                at(mask, ratio, known, seed, "equal")
        rates = [known, *(f"{float(known) * factor:g}" for factor in FACTORS)]
        for mask in MASKS:
            at_own_rate(study, world, args.seeds, rates, functools.partial(at, mask, RATIOS[0]))


def at_own_rate(study, world, seeds, rates, at):
    """Run a grid of learning rates on the first seed, and the chosen rate on all seeds.

    Args:
        study, world: Study, World.
        seeds, rates: what is run.
        at: function of (rate, seed, stage) that returns a run.
    """
    grid = {rate: at(rate, seeds[0], "grid") for rate in rates}
    chosen = chosen_rate({rate: run["scores"][""] for rate, run in grid.items()}, study.before[world.name], BOUND)
    for rate, run in grid.items():
        run["is_chosen"] = rate == chosen
    for seed in seeds:
        at(chosen, seed, "seeds")


def optimizers(study, world, args):
    """Run part b: each optimizer at its own rate."""

    def at(name, rate, seed, stage):
        words = unlearning(world, "npo", seed, name, rate)
        fields = {"part": "b", "method": "npo", "optimizer": name, "rate": rate, "seed": seed, "stage": stage}
        return study.train(world, f"b-npo-{name}-{rate}-{seed}", words, own_sets(world), **fields)

    for name in OPTIMIZERS:
        at_own_rate(study, world, args.seeds, RATES, functools.partial(at, name))


def invariance(study, world, args):
    """Run part c: unlearning with and without ILU, and fine-tuning of what it leaves on each task."""
    other, tasks = unrelated(world, args.data_dir)
    sets = own_sets(world) | {task: measured for task, (_, measured) in tasks.items()}
    for method in ("npo", "rmu"):
        for ilu in ("none", ILU_WEIGHT):
            for seed in args.seeds:
                fields, name = {"part": "c", "method": method, "ilu": ilu, "seed": seed}, f"c-{method}-ilu-{ilu}-{seed}"
                words = unlearning(world, method, seed)
                if ilu != "none":
                    words += ["--regularizer", "ilu", "--ilu_data", other, "--ilu_weight", ilu]
                study.train(world, name, words, sets, task=None, **fields)
                for task, (rows, measured) in tasks.items():
                    tuning = ["--unlearn_method", "finetune", "--domain", "custom", "--forget_data", rows]
                    tuning += ["--model_name_or_path", str(study.place(world, name)), *shlex.split(FINETUNING)]
                    tuning += ["--learning_rate", FINETUNING_RATES[world.name], "--seed", str(seed)]
                    own, places = own_sets(world) | {task: measured}, tuple(MOMENTS)
                    study.train(
                        world, f"{name}-then-{task.replace(' ', '-')}", tuning, own, places, words, task=task, **fields
                    )


PARTS = {
    "a": ("Masks", masks, masks_table),
    "b": ("Second order", optimizers, optimizers_table),
    "c": ("Invariance", invariance, invariance_table),
}
"""{part: (what it is about, what runs it on a world, what shows it)}."""


# ---- Data and the command line ----


def unrelated(world, data_dir):
    """Return (file of rows for ILU, {task: (file of rows to fine-tune on, file of rows to measure on)}).

    The authors that nobody has heard of are measured on what is trained: their facts follow from nothing.

    Args:
        world: World.
        data_dir: folder with gsm8k/, and tofu_small/ for the world of TOFU; None takes the prose of the demo world in
            place of GSM8K.
    """
    made, task = make_world(0), "gsm8k" if data_dir else "prose"
    if data_dir:
        train, test = (_short(Path(data_dir) / f"gsm8k/{split}.jsonl") for split in ("train", "test"))
        found = {"ilu": train[:NUM_ILU], "tuning": train[NUM_ILU:], "measured": test[:NUM_MEASURED]}
    else:
        found = {"ilu": made["general_retain"][::2], "tuning": made["general_retain"][1::2]}
        found["measured"] = made["general_evaluation"]
    if world.name == "demo":
        found["authors"] = made["holdout"]
    else:
        found["authors"] = read_rows(Path(data_dir) / "tofu_small/holdout.jsonl")
    paths = {name: str(world.folder / f"unrelated_{name}.jsonl") for name in found}
    for name, rows in found.items():
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = {task: (paths["tuning"], paths["measured"]), AUTHORS: (paths["authors"], paths["authors"])}
    return paths["ilu"], tasks


def _short(path):
    """Return the rows of GSM8K that fit."""
    if not path.is_file():
        raise UserError(f"--data_dir has no {path}; download GSM8K's train.jsonl and test.jsonl to there")
    return [row for row in read_rows(path) if len(row["question"] + row["answer"]) <= LONGEST]


def page(study, parts, command):
    """Return the Markdown of the parts that have runs.

    Args:
        study: Study.
        parts: names of PARTS.
        command: as it was typed.
    """
    texts = []
    for part in parts:
        title, _, show = PARTS[part]
        runs = [run for run in study.runs if run["part"] == part]
        texts.append(f"### {title}\n\n{show(runs, study.before)}")
    seeds = sorted({run["seed"] for run in study.runs})
    note = f"Means with 95% t intervals over seeds {', '.join(map(str, seeds))}; NLL in nats per answer token."
    return "\n".join([f"```bash\n{command}\n```\n\n{note}\n", *texts])


def parse(argv):
    """Return the command line's flags, with the worlds that are asked for checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="Default: all.")
    parser.add_argument(
        "--worlds", nargs="+", choices=["demo", "tofu"], help="Default: demo, and tofu with --data_dir."
    )
    parser.add_argument("--data_dir", help="Folder with models/, tofu_small/ and gsm8k/.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="Of training and of random masks.")
    parser.add_argument("--output_dir", type=Path, default=Path("output/composition"), help="For models and masks.")
    parser.add_argument("--output", type=Path, help="Folder of the tables and study.json; default: --output_dir.")
    args = parser.parse_args(argv)
    args.worlds = args.worlds or ["demo", *(["tofu"] if args.data_dir else [])]
    if "tofu" in args.worlds and not args.data_dir:
        raise UserError("--worlds tofu needs --data_dir, the folder with models/, tofu_small/ and gsm8k/")
    return args


def main(argv=None):
    """Run the parts; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args, study = parse(argv), Study()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    command = f"OMP_NUM_THREADS=1 python {shlex.join(['benchmarks/composition.py', *argv])}"
    output = args.output or args.output_dir
    output.mkdir(parents=True, exist_ok=True)
    for name in args.worlds:
        folder = args.output_dir / name
        world = demo_world(folder) if name == "demo" else tofu_world(args.data_dir, folder)
        (folder / "study").mkdir(exist_ok=True)
        measured = {task: files[1] for task, files in unrelated(world, args.data_dir)[1].items()}
        study.before[name] = study.measure(world.model, world, own_sets(world) | measured)
        for part in args.parts:
            PARTS[part][1](study, world, args)
    found = page(study, args.parts, command)
    (output / "study.md").write_text(found, encoding="utf-8")
    record = {"command": command, "versions": package_versions(), "before": study.before, "runs": study.runs}
    (output / "study.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(found)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
