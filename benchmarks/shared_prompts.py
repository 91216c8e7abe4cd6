"""Time scoring with the answers of a prompt in one row and with a row for each, on random Llamas of growing width.

python benchmarks/shared_prompts.py --tokenizer TOKENIZER.json --data_dir TOFU_FOLDER --max_eval_samples 10
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

from llm_unlearn.errors import run_script


def main(argv=None):
    """Run the benchmark; returns the exit code."""
    return run_script(_main, argv)


def _main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="A tokenizer.json; default: the demo world's.")
    parser.add_argument("--data_dir", help="TOFU's files, as run_eval.py takes them; default: the demo world's.")
    parser.add_argument("--forget_split", default="forget01", help="Split to forget.")
    parser.add_argument("--max_eval_samples", type=int, help="Only the first rows of each set.")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512], help="Hidden sizes.")
    parser.add_argument("--repeats", type=int, default=3, help="Runs of each, in alternation.")
    parser.add_argument("--output", type=Path, help="Where the numbers go as JSON.")
    args = parser.parse_args(argv)
    from subjects import load_tofu, load_tokenizer_alone

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer_alone(args.tokenizer, folder)
        parts, _ = load_tofu(args.data_dir, args.forget_split, None, args.max_eval_samples, folder)
    sequences = sequences_of(parts, tokenizer)
    record = {"command": shlex.join(["python", "benchmarks/shared_prompts.py", *argv]), "widths": {}}
    _say(f"{len(sequences)} answers\n{'hidden':>8}{'parameters':>12}{'shared':>10}{'unshared':>10}  CPU seconds")
    for width in args.widths:
        found = record["widths"][width] = measure(width, sequences, tokenizer, args.repeats)
        middle = [statistics.median(found[side]) for side in ("shared", "unshared")]
        _say(f"{width:>8}{found['parameters'] / 1e6:>10.1f} M{middle[0]:>10.2f}{middle[1]:>10.2f}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def sequences_of(parts, tokenizer):
    """Return the distinct answers that TOFU is scored on, as packing.Sequence."""
    from subjects import CONTEXT

    from llm_unlearn.data.tokenize import TokenizeOptions
    from llm_unlearn.evaluation.questions import questions_of

    options = TokenizeOptions(model_length=CONTEXT)
    asked = [question for part in parts for question in questions_of(part, tokenizer, options)]
    return list(dict.fromkeys(one for question in asked for group in question.sequences.values() for one in group))


def measure(width, sequences, tokenizer, repeats):
    """Return {"parameters", "shared", "unshared"}: CPU seconds of each run, the check at the start included."""
    from subjects import random_llama

    from llm_unlearn.data.streams import pad_id
    from llm_unlearn.evaluation.statistics import Scorer

    model = random_llama(tokenizer, width).eval()
    found = {"parameters": sum(weight.numel() for weight in model.parameters()), "shared": [], "unshared": []}
    for _ in range(repeats):
        for name in ("shared", "unshared"):
            scorer = Scorer(model, pad_id(tokenizer), share=name == "shared")
            started = time.process_time()
            scorer.score(sequences)
            found[name].append(time.process_time() - started)
    return found


def _say(text):
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
