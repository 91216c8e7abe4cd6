"""Time run_eval.py's TOFU suite against one pass per metric, on the same model and rows, and compare their values.

python benchmarks/evaluation_passes.py --model MODEL --data_dir TOFU_FOLDER --forget_split forget01 --repeats 3
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from llm_unlearn.errors import UserError, run_script

TOLERANCE = 1e-4
_TIMED = ("cpu_seconds", "scoring_cpu_seconds", "generating_cpu_seconds", "wall_seconds", "device_seconds")
_COUNTED = ("scoring_calls", "scoring_tokens", "head_tokens", "prompt_tokens", "decode_steps", "decode_row_steps")


def main(argv=None):
    """Run the benchmark; returns the exit code."""
    return run_script(_main, argv)


def parse(argv):
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Folder of a model; default: a Llama with random weights, made on the spot.")
    parser.add_argument("--tokenizer", help="tokenizer.json for the random model; default: the demo world's.")
    parser.add_argument("--data_dir", help="TOFU's files, as run_eval.py takes them; default: the demo world's.")
    parser.add_argument("--forget_split", default="forget01", help="Split to forget.")
    parser.add_argument("--holdout_data", help="File of unseen rows, for the membership scores.")
    parser.add_argument("--max_eval_samples", type=int, help="Only the first rows of each set.")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="Tokens generated at most.")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="Where to run.")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bf16 on CUDA.")
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each side, in alternation.")
    parser.add_argument("--output", type=Path, help="Where the numbers go as JSON.")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        raise UserError(f"--repeats must be at least 1, but is {args.repeats}")
    return args


def _main(argv):
    args = parse(argv)
    import torch
    from subjects import first_rows, load_subject, load_tofu

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but this PyTorch sees no CUDA device; pass --device cpu")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device == "cuda" else "float32"
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_subject(args.model, args.tokenizer, folder)
        parts, missing = load_tofu(args.data_dir, args.forget_split, args.holdout_data, args.max_eval_samples, folder)
    model = model.to(device, getattr(torch, dtype)).eval()
    sides = {"suite": run_suite_once, "pass_per_metric": run_passes_once}
    _say(f"{sum(len(part.rows) for part in parts)} rows; a first round on two rows of each set is not timed")
    for run in sides.values():
        run(model, tokenizer, first_rows(parts, 2), missing, args)
    runs = {name: [] for name in sides}
    for number in range(args.repeats):
        for name, run in sides.items():
            runs[name].append(run(model, tokenizer, parts, missing, args))
            _say(f"{number + 1}/{args.repeats} {name}: {runs[name][-1]['full']['cpu_seconds']:.1f} CPU seconds")
    record = report(argv, model, parts, runs)
    record |= {"device": device, "dtype": dtype, "threads": torch.get_num_threads(), "repeats": args.repeats}
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _say(table(record))
    check(record["differences"], dtype)


def check(differences, dtype):
    """Fail where both sides do not give the same numbers; bfloat16 rounds them apart, and they are only shown.

    Args:
        differences: {metric: absolute difference}.
        dtype: of the model.
    Raises:
        AssertionError: a difference beyond the tolerance, or one that is NaN.
    """
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    if dtype == "float32" and wrong:
        raise AssertionError(
            "; ".join(f"the two sides differ by {value:.2g} in {name}" for name, value in wrong.items())
        )


def run_suite_once(model, tokenizer, parts, missing, args):
    """Run our suite; returns {"full": costs, "values": metrics, "ideal": what no evaluation can avoid}."""
    from cost_meter import CostMeter

    from llm_unlearn.evaluation.generation import Generator
    from llm_unlearn.evaluation.statistics import Scorer
    from llm_unlearn.evaluation.suite import SuiteSettings, run_suite

    settings = SuiteSettings(_options(model), max_new_tokens=args.max_new_tokens)
    with CostMeter(model) as meter, contextlib.ExitStack() as stack:
        for owner, method, stage in ((Scorer, "score", "scoring"), (Generator, "generate", "generating")):
            stack.enter_context(_as_stage(meter, owner, method, stage))
        outcome = run_suite(model, tokenizer, "tofu", parts, missing, settings)
    ideal = ideal_of(_questions(model, tokenizer, parts, args))
    values = {name: metric.value for name, metric in outcome.metrics.items()}
    costs = costs_of(meter, ["scoring"], ideal["scored_tokens"])
    return {"full": costs, "values": values, "ideal": ideal, "counters": outcome.counters}


@contextlib.contextmanager
def _as_stage(meter, owner, method, stage):
    """Time a method of a class as one stage while the context lasts."""
    plain = getattr(owner, method)

    def timed(*args, **kwargs):
        with meter.stage(stage):
            return plain(*args, **kwargs)

    setattr(owner, method, timed)
    try:
        yield
    finally:
        setattr(owner, method, plain)


def run_passes_once(model, tokenizer, parts, missing, args):
    """Run one pass per metric; returns {"full": costs, "default": costs, "values": metrics, "lengths": of texts}."""
    import pass_per_metric
    from cost_meter import CostMeter

    with CostMeter(model) as meter:
        questions = _questions(model, tokenizer, parts, args)
        values, lengths = pass_per_metric.evaluate(model, tokenizer, questions, meter)
    made = [one.name for one in pass_per_metric.PASSES if one.name in meter.seconds]
    by_default = [one.name for one in pass_per_metric.PASSES if one.by_default and one.name in made]
    return {
        "full": costs_of(meter, made),
        "default": costs_of(meter, by_default, left_out=[name for name in made if name not in by_default]),
        "values": values,
        "lengths": lengths,
        "passes": {name: {**meter.counts[name], **meter.seconds[name]} for name in made},
    }


def _options(model):
    from llm_unlearn.data.tokenize import TokenizeOptions

    return TokenizeOptions(model_length=model.config.max_position_embeddings)


def _questions(model, tokenizer, parts, args):
    """Return {set: list of Question}."""
    from llm_unlearn.evaluation.questions import questions_of

    return {part.name: questions_of(part, tokenizer, _options(model), args.max_new_tokens) for part in parts}


def ideal_of(questions):
    """Return what no evaluation of these questions can avoid to forward."""
    from llm_unlearn.evaluation.packing import distinct_tokens

    asked = [one for group in questions.values() for question in group for one in question.sequences.values()]
    sequences = list(dict.fromkeys(sequence for group in asked for sequence in group))
    return {
        "distinct_sequences": len(sequences),
        "tokens_of_distinct_sequences": sum(len(sequence.ids) - 1 for sequence in sequences),
        "distinct_tokens": distinct_tokens(sequences),
        "scored_tokens": sum(len(sequence.scored) for sequence in sequences),
    }


def costs_of(meter, scoring, head_tokens=None, left_out=()):
    """Return the costs of one run.

    Args:
        meter: CostMeter after the run.
        scoring: stages that are teacher-forced.
        head_tokens: tokens whose logits were computed; None: all that were forwarded.
        left_out: stages that do not count.
    """
    counts, seconds = meter.counts, meter.seconds
    tokens, generated = sum(counts[stage]["tokens"] for stage in scoring), counts["generating"]
    found = {
        "scoring_calls": sum(counts[stage]["calls"] for stage in scoring),
        "scoring_tokens": tokens,
        "head_tokens": tokens if head_tokens is None else head_tokens,
        **{name: generated[name] for name in ("prompt_tokens", "decode_steps", "decode_row_steps")},
        "scoring_cpu_seconds": sum(seconds[stage]["cpu"] for stage in scoring),
        "generating_cpu_seconds": seconds["generating"]["cpu"],
        "peak_memory_bytes": meter.peak_bytes,
    }
    for clock in seconds["all"]:
        found[f"{clock}_seconds"] = seconds["all"][clock] - sum(seconds[stage][clock] for stage in left_out)
    return found


def report(argv, model, parts, runs):
    """Return the contents of the JSON file."""
    import llm_unlearn
    from llm_unlearn.records import package_versions

    ours, theirs = runs["suite"], runs["pass_per_metric"]
    sides = {"suite": [run["full"] for run in ours]}
    sides |= {name: [run[name] for run in theirs] for name in ("default", "full")}
    costs = {name: {key: _spread([run[key] for run in found]) for key in found[0]} for name, found in sides.items()}
    lengths = theirs[0]["lengths"]
    ideal = ours[0]["ideal"] | {
        "decode_steps": max(lengths) - 1,
        "decode_row_steps": sum(length - 1 for length in lengths),
    }
    shared = [name for name in theirs[0]["values"] if ours[0]["values"].get(name) is not None]
    return {
        "schema_version": 1,
        "kind": "benchmark",
        "benchmark": "evaluation_passes",
        "command": shlex.join(["python", "benchmarks/evaluation_passes.py", *argv]),
        "versions": {"llm_unlearn": llm_unlearn.__version__, **package_versions()},
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "vocabulary": model.config.vocab_size,
        "rows": {part.name: len(part.rows) for part in parts},
        "ideal": ideal,
        "costs": costs,
        "over_ideal": {name: _over_ideal(side, ideal) for name, side in costs.items()},
        "ratios": {name: _ratios(costs[name], costs["suite"]) for name in ("default", "full")},
        "passes": theirs[0]["passes"],
        "counters": ours[0]["counters"],
        "differences": {name: abs(theirs[0]["values"][name] - ours[0]["values"][name]) for name in shared},
    }


def _spread(values):
    """Return a count, the same in every run, as it is, and of measured values the median with the range."""
    if len(set(values)) == 1:
        return values[0]
    if None in values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _middle(value):
    return value["median"] if isinstance(value, dict) else value


def _over_ideal(costs, ideal):
    pairs = {"scoring_tokens": "distinct_tokens", "decode_steps": "decode_steps"}
    pairs |= {"head_tokens": "scored_tokens", "decode_row_steps": "decode_row_steps"}
    return {name: _middle(costs[name]) / max(1, ideal[other]) for name, other in pairs.items()}


def _ratios(theirs, ours):
    """Return {cost: how many times ours one pass per metric pays}."""
    pairs = {name: (_middle(value), _middle(ours[name])) for name, value in theirs.items()}
    return {name: first / second for name, (first, second) in pairs.items() if first is not None and second}


def table(record):
    """Return the numbers as text."""
    costs, ratios = record["costs"], record["ratios"]
    lines = [f"{'':<24}{'suite':>12}{'default':>12}{'full':>12}{'default/suite':>15}{'full/suite':>12}"]
    for name in (*_COUNTED, *_TIMED, "peak_memory_bytes"):
        if costs["suite"].get(name) is None:
            continue
        shown = [f"{_middle(costs[side][name]):,.{1 if 'seconds' in name else 0}f}" for side in costs]
        shown = "".join(f"{text:>12}" for text in shown) if "bytes" not in name else _megabytes(costs, name)
        times = [f"{ratios[side].get(name, float('nan')):.2f}" for side in ("default", "full")]
        lines.append(f"{name:<24}{shown}{times[0]:>15}{times[1]:>12}")
    worst = max(record["differences"].values())
    lines.append(f"tokens over distinct tokens: {record['over_ideal']['suite']['scoring_tokens']:.3f}")
    return "\n".join([*lines, f"largest difference between the metrics of both: {worst:.1e}"])


def _megabytes(costs, name):
    return "".join(f"{_middle(side[name]) / 2**20:>9,.0f} MiB" for side in costs.values())


def _say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
