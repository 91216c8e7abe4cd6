"""Count, without a model, what scoring TOFU forwards: our suite, one pass per metric, and what nobody can avoid.

python benchmarks/evaluation_tokens.py --tokenizer TOKENIZER.json --data_dir TOFU_FOLDER --forget_split forget10
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

from llm_unlearn.errors import run_script


def main(argv=None):
    """Count; returns the exit code."""
    return run_script(_main, argv)


def _main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="A tokenizer.json; default: the demo world's.")
    parser.add_argument("--data_dir", help="TOFU's files, as run_eval.py takes them; default: the demo world's.")
    parser.add_argument("--forget_split", default="forget01", help="Split to forget.")
    parser.add_argument("--holdout_data", help="File of unseen rows, for the membership scores.")
    parser.add_argument("--output", type=Path, help="Where the numbers go as JSON.")
    args = parser.parse_args(argv)
    from subjects import load_tofu, load_tokenizer_alone

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer_alone(args.tokenizer, folder)
        parts, _ = load_tofu(args.data_dir, args.forget_split, args.holdout_data, None, folder)
    record = count(parts, tokenizer)
    record["command"] = shlex.join(["python", "benchmarks/evaluation_tokens.py", *argv])
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(record))


def count(parts, tokenizer):
    """Return {side: {"calls", "tokens", "head_tokens"}} with the ratios and what nobody can avoid.

    Args:
        parts: list of questions.Part of TOFU.
        tokenizer: a transformers tokenizer.
    """
    from pass_per_metric import forwards
    from subjects import CONTEXT

    from llm_unlearn.data.tokenize import TokenizeOptions
    from llm_unlearn.evaluation.packing import distinct_tokens
    from llm_unlearn.evaluation.questions import questions_of

    options = TokenizeOptions(model_length=CONTEXT)
    questions = {part.name: questions_of(part, tokenizer, options) for part in parts}
    asked = [one for group in questions.values() for question in group for one in question.sequences.values()]
    sequences = list(dict.fromkeys(sequence for group in asked for sequence in group))
    scored = sum(len(sequence.scored) for sequence in sequences)
    costs = {"suite": suite_forwards(sequences) | {"head_tokens": scored}}
    for name in ("default", "full"):
        costs[name] = forwards(questions, by_default=name == "default")
    unshared = sum(len(sequence.ids) - 1 for sequence in sequences)
    ideal = {
        "sequences": len(sequences), "tokens": unshared, "distinct_tokens": distinct_tokens(sequences),
        "scored_tokens": scored,
    }  # fmt: skip
    ratios = {
        name: {key: costs[name][key] / costs["suite"][key] for key in costs[name]} for name in ("default", "full")
    }
    over = {name: side["tokens"] / ideal["distinct_tokens"] for name, side in costs.items()}
    return {"rows": {p.name: len(p.rows) for p in parts}, "ideal": ideal, "costs": costs, "ratios": ratios,
            "tokens_over_distinct": over}  # fmt: skip


def suite_forwards(sequences):
    """Return {"calls", "tokens"} of our layout: prompts shared, rows sorted, padding included."""
    from llm_unlearn.evaluation.packing import make_batches, make_rows
    from llm_unlearn.evaluation.statistics import MAX_TOKENS_PER_BATCH

    batches = make_batches(make_rows(sequences), MAX_TOKENS_PER_BATCH)
    return {"calls": len(batches), "tokens": sum(len(batch) * max(len(row.ids) for row in batch) for batch in batches)}


def table(record):
    """Return the counts as text."""
    lines = [f"{'':<8}{'calls':>8}{'tokens':>12}{'over distinct':>15}{'through the head':>18}"]
    for name, side in record["costs"].items():
        over = record["tokens_over_distinct"][name]
        lines.append(f"{name:<8}{side['calls']:>8,}{side['tokens']:>12,}{over:>15.3f}{side['head_tokens']:>18,}")
    return "\n".join([*lines, f"distinct{record['ideal']['distinct_tokens']:>20,}"]) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
