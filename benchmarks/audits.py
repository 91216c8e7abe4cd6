"""Audits of many methods on the demo world, with seeds and intervals: what is gone, and what comes back.

    OMP_NUM_THREADS=1 python benchmarks/audits.py --seeds 0 1 2 --output table.md

The demo world is made on the spot: a target model that learned it, and the gold model, retrained without the authors
to forget. Each method unlearns once for each seed, with the flags below or its recipe of recipes/tiny, and the audit
(`python -m llm_unlearn.cli.audit --preset quick`) is run on what it left. What is done is kept: a run that was stopped
goes on. One row a method: means over the seeds with 95% t intervals.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from composition_report import shown as mean_with_interval
from unlearning_tiny import command, demo_world, recipes

from llm_unlearn.attacks.recovery import steps_to
from llm_unlearn.attacks.verdict import curves_of
from llm_unlearn.cli.audit import main as audit
from llm_unlearn.cli.demo import NPO_FLAGS, TARGET_FLAGS
from llm_unlearn.cli.unlearn import main as unlearn
from llm_unlearn.errors import UserError, run_cli

logger = logging.getLogger("llm_unlearn.audits")
NAIVE = {
    "gradient_ascent": "--learning_rate 7e-4 --max_steps 20 --per_device_train_batch_size 8",
    "grad_diff": "--learning_rate 1e-3 --num_train_epochs 8 --retain_weight 3",
    "npo": NPO_FLAGS,
    "retrain": TARGET_FLAGS,
}
"""method -> its flags, where recipes/tiny has none; retrain, by another seed than the gold model's, is the control"""
GOLD_SEED = 42
KNOWLEDGE = "forget/probability"
COLUMNS = {
    "forget prob.": ("eval", KNOWLEDGE),
    "utility": ("eval", "model_utility"),
    "MIA AUC": ("mia", "loss/auc"),
    "leak@16": ("sampling", "leak_at_16"),
    "int8": ("quantize", f"int8/{KNOWLEDGE}"),
    "UDS": ("white_box", "uds/forget"),
    "relearn, mean": ("relearn", "mean"),
    "steps to half": ("relearn", "half"),
    "lead of gold": ("relearn", "lead"),
}
"""heading -> (stage, metric); leak@16 is the largest of the prompting styles, and the last three are of `relearning`"""


def main(argv=None):
    """Unlearn, audit, and write the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="Names of methods or recipes; default: all.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="Of unlearning and of the attacks.")
    parser.add_argument("--preset", default="quick", help="Of the audits.")
    parser.add_argument("--output_dir", type=Path, default=Path("output/audits"), help="For models and audits.")
    parser.add_argument("--output", type=Path, help="Where the table goes; default: to the terminal alone.")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    world = demo_world(args.output_dir / "demo")
    gold = str(retrained(world, world.folder / "gold", GOLD_SEED))
    known = {**NAIVE, **recipes("demo")}
    unknown = [name for name in args.methods or () if name not in known]
    if unknown:
        raise UserError(f"unknown method '{unknown[0]}'; known: {', '.join(known)}")
    table = {}
    for seed in args.seeds:
        for name in args.methods or known:
            folder = unlearned(name, world, seed)
            table.setdefault(name, []).append(audited(folder, world, gold, seed, args))
    text = to_markdown(table)
    sys.stdout.write(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    return 0


def retrained(world, folder, seed):
    """Return the folder of a model retrained without the forget set, made where it is missing."""
    if not (folder / "manifest.json").is_file():
        words = ["--unlearn_method", "retrain", "--model_name_or_path", world.early, "--domain", "custom"]
        words += ["--retain_data", world.retain, *TARGET_FLAGS.split(), "--seed", str(seed)]
        words += ["--output_dir", str(folder), "--save_strategy", "no", "--use_cpu", "True"]
        _run(unlearn, [*words, "--overwrite_output_dir", "--disable_tqdm", "True"])
    return folder


def unlearned(name, world, seed):
    """Return the folder of what a method made of the target with a seed."""
    folder = world.folder / f"{name}-{seed}"
    if name == "retrain":
        return retrained(world, folder, seed)
    if not (folder / "manifest.json").is_file():
        if name in NAIVE:
            words = ["--unlearn_method", name, "--target_model_name_or_path", world.model, *world.data()]
            words += [*NAIVE[name].split(), "--save_strategy", "no", "--seed", str(seed), "--output_dir", str(folder)]
            if name == "gradient_ascent":
                place = words.index("--retain_data")
                del words[place : place + 2]
        else:
            words = command(recipes("demo")[name], world, seed, folder)
        _run(unlearn, [*words, "--use_cpu", "True", "--overwrite_output_dir", "--disable_tqdm", "True"])
    return folder


def audited(folder, world, gold, seed, args):
    """Audit a model; returns its row: {heading: value or None}, with "verdict" and "failed"."""
    place = args.output_dir / args.preset / folder.name
    words = ["--model_name_or_path", str(folder), "--target_model", world.model, "--gold", gold, "--domain", "demo"]
    words += ["--preset", args.preset, "--seed", str(seed), "--output_dir", str(place), "--use_cpu", "True"]
    _run(audit, [*words, "--references_dir", str(args.output_dir / args.preset / f"references-{seed}")])
    return row_of(place)


def row_of(place):
    """Return the numbers of an audit's folder, and of its gold model and target under `gold` and `target`."""
    said = json.loads((place / "audit.json").read_text(encoding="utf-8"))["verdict"]
    failed = [finding["check"] for finding in said["findings"] if finding["status"] == "fail"]
    rows = {who: numbers(place / who) for who in ("target", "gold")}
    own = numbers(place)
    own.update(relearning(place, rows["target"]))
    rows["gold"].update(relearning(place, rows["target"], "gold"))
    return {**own, "verdict": said["status"], "failed": failed, **rows}


def numbers(place):
    """Return {heading: value or None} of the results in a folder."""
    found = {}
    for heading, (stage, name) in COLUMNS.items():
        metrics = _results(place / stage).get("metrics", {})
        if name.startswith("leak_at"):
            values = [entry["value"] for key, entry in metrics.items() if key.endswith(f"/{name}")]
            values = [value for value in values if value is not None]
            found[heading] = max(values, default=None)
        else:
            found[heading] = metrics.get(name, {}).get("value")
    return found


def relearning(place, target, who="."):
    """Return the numbers of the relearning attack of an audit's model or gold model.

    The configuration is that in which the audited model is furthest ahead of the gold model: at a large learning rate
    everybody learns at once. "steps to half" are those to half of the target's level, None where it is not reached.
    """
    model, gold = (curves_of(_results(place / part / "relearn"), KNOWLEDGE) for part in (".", "gold"))
    shared = [key for key in model if key in gold]
    if not shared:
        return {}
    worst = max(shared, key=lambda key: model[key][0] - gold[key][0])
    mean, points = (gold if who == "gold" else model)[worst]
    reached = steps_to(points, target["forget prob."] / 2)
    return {"relearn, mean": mean, "steps to half": reached, "lead of gold": mean - gold[worst][0], "rate": worst}


def _results(folder):
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _run(script, words):
    code = script(words)
    if code != 0:
        raise UserError(f"exit code {code} of: {' '.join(words)}")


def to_markdown(table):
    """Return the rows of `row_of` by method as a Markdown table, target and gold model first.

    Args:
        table: {method: one row a seed}.
    """
    first = next(iter(table.values()))
    rows = {"target": [row["target"] for row in first], "gold (retrained)": [row["gold"] for row in first], **table}
    lines = ["| model | " + " | ".join(COLUMNS) + " | still found by |", "|---|" + "---:|" * len(COLUMNS) + "---|"]
    for name, entries in rows.items():
        cells = [summary([entry.get(heading) for entry in entries]) for heading in COLUMNS]
        failed = [check for entry in entries for check in entry.get("failed", ())]
        said = [f"{check} {failed.count(check)}/{len(entries)}" for check in dict.fromkeys(failed)]
        lines.append("| " + " | ".join([name, *cells, ", ".join(said) or "-"]) + " |")
    return "\n".join(lines) + "\n"


def summary(values):
    """Return a mean with its 95% t interval as text, and how many values are missing.

    Args:
        values: list of floats, None where there is none.
    """
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    missing = f", {len(values) - len(known)} of {len(values)} never" if len(known) < len(values) else ""
    return f"{mean_with_interval(known, digits=2)}{missing}"


if __name__ == "__main__":
    raise SystemExit(run_cli(main))
