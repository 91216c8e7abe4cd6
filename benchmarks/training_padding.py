"""P16: tokens that training forwards beside those that the rows have, with rows ordered by length and without."""
# Shapes: B sequences, T tokens.

from pathlib import Path

import training_steps
from subjects import load_tokenizer_alone
from training_report import Row

from llm_unlearn.data.plan import FILLER, BatchPlan

BATCH, EPOCHS, SEEDS = 8, 5, 3
TARGET, JUDGED_FROM = 1.10, 100
"""More rows than fill a few steps: where an epoch has less, there is little to order."""


def run(args):
    """Return the rows of P16: forget10 with retain90, and forget01, for every tokenizer that is given.

    Args:
        args: the parsed command line.
    """
    rows = []
    for path in args.tokenizers or [args.tokenizer]:
        tokenizer = load_tokenizer_alone(path, args.folder)
        for split in ("forget10", "forget01") if args.data_dir else ("forget01",):
            lengths = training_steps.dataset_of(args, tokenizer, split).lengths
            ours, random = measure(lengths, by_length=True), measure(lengths, by_length=False)
            sizes = " + ".join(str(len(found)) for found in lengths.values())
            target = TARGET if len(lengths["forget"]) >= JUDGED_FROM else None
            name = Path(path).stem if path else "demo"
            job = f"padding, {split} with what is left ({sizes} rows), batch {BATCH}, tokenizer {name}"
            absolute = {"random order in one forward": random["stacked"], "by length, apart": ours["apart"]}
            metric = "forwarded / real tokens"
            rows.append(Row("P16", job, metric, ours["stacked"], random["apart"], target, absolute=absolute))
    return rows


def measure(lengths, by_length):
    """Count tokens over some epochs and seeds.

    Args:
        lengths: {stream: tokens of each row}.
        by_length: whether the plan orders rows, as training does; otherwise they come in random order.
    Returns:
        {"stacked": forwarded / real tokens with both streams in one forward, as our trainers run them, "apart": with a
        forward for each, as open-unlearning runs them}.
    """
    sizes, counts = {name: len(found) for name, found in lengths.items()}, {"real": 0, "stacked": 0, "apart": 0}
    for seed in range(SEEDS):
        plan = BatchPlan(sizes, seed, BATCH, lengths=lengths if by_length else None)
        for epoch in range(EPOCHS):
            for number in range(len(plan)):
                batch = plan.batch(epoch, number, 0)
                parts = [
                    [lengths[name][row] for stream, row in batch if stream == name and row != FILLER] for name in sizes
                ]
                counts["real"] += sum(map(sum, parts))
                counts["apart"] += sum(BATCH * max(part) for part in parts)
                counts["stacked"] += len(batch) * max(map(max, parts))
    return {name: counts[name] / counts["real"] for name in ("stacked", "apart")}
