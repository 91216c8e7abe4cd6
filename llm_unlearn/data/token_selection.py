"""Which tokens of the forget set count: the labels of all others become -100; what the model sees stays as it was."""
# Shapes: N counted tokens of the forget set, row by row.

import logging
import math

import torch

from llm_unlearn.data.selectors_model import SCORES
from llm_unlearn.data.selectors_text import SELECTED, WEIGHTS, annotated, annotator, counted, joined, require_some
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.errors import UserError
from llm_unlearn.selection_flags import NAMED, TAKES

logger = logging.getLogger(__name__)


def with_selection_columns(data, is_tokenized, tokenizer, options, args, note=None):
    """Tokenize streams, the forget stream with the columns that `select_tokens` will read.

    Args:
        data: {stream: rows}, in any form that a trainer takes.
        is_tokenized: whether they are tokenized rows.
        tokenizer: a transformers tokenizer.
        options: TokenizeOptions.
        args: SelectionFlags.
        note: another `annotate` of `tokenize_rows` for forget rows that are tokenized here, or None.
    Returns:
        {stream: tokenized rows}.
    Raises:
        UserError: see `UnlearnDataset.of`; a row that lacks what the selection reads.
    """
    annotate = annotator(args) if "forget" in data else None
    if not is_tokenized:
        return UnlearnDataset.of(data, tokenizer, options, {"forget": joined(annotate, note)}).streams
    return data if annotate is None else {**data, "forget": annotated(data["forget"], annotate)}


def select_tokens(trainer):
    """Leave only the labels of selected tokens in the forget stream; all processes together.

    Only what counted before can be selected. Attention masks come from the lengths, and no length changes: a token that
    does not count is seen as ever. A row without a selected token is left out. Weights are scaled to a mean of 1 over
    the selected tokens, so that only their ratios matter.

    Args:
        trainer: UnlearnTrainer with its tokenized `train_dataset`, before the method changes the streams.
    Returns:
        ({stream: rows}, what `unlearning.json` says of the selection, or None without `--token_selection`).
    Raises:
        UserError: there is no forget set; no token, or every one, would be selected; what the selection needs is
            missing or broken.
    Source: EleutherAI/unlearn (token masks). Differs from the authors' code, in which some methods hide the other
        tokens from the model, and some ignore the masks.
    """
    args, streams = trainer.args, trainer.train_dataset.streams
    if args.token_selection is None:
        return streams, None
    if "forget" not in streams:
        raise UserError(f"--token_selection has no effect: {type(trainer).__name__} reads no forget set")
    rows = streams["forget"]
    selected, record = _selected(trainer, rows)
    total, kept = len(selected), int(selected.sum())
    # Weights of all tokens may differ from each other.
    require_some(kept, total, args, NAMED[args.token_selection], may_be_all=args.token_weights_use == "weight")
    chosen = _chosen(rows, selected.tolist(), args.token_weights_use == "weight")
    read = {name: getattr(args, name) for name in TAKES[args.token_selection] if name != "selection_cache"}
    record = {
        "kind": args.token_selection,
        "tokens": kept,
        "of": total,
        "share": kept / total,
        "rows_left_out": len(rows) - len(chosen),
        "flags": {name: value for name, value in read.items() if value is not None},
        **record,
    }
    logger.info(
        "--token_selection %s keeps %d of the %d tokens of the forget set (%.2f%%)%s",
        args.token_selection, kept, total, 100 * kept / total,
        f" and leaves out {len(rows) - len(chosen)} of {len(rows)} rows, which have none" * (len(chosen) < len(rows)),
    )  # fmt: skip
    return {**streams, "forget": chosen}, record


def top_fraction(scores, fraction, least=-math.inf):
    """Return which scores are among the highest.

    The bound is the score of rank ceil(fraction * N): an order statistic, not an interpolated quantile. What ties with
    it is kept too, so that the order of the tokens changes nothing.

    Args:
        scores: (N,), N >= 1.
        fraction: in (0, 1).
        least: scores below it are never kept.
    Returns:
        (N,) bool.
    """
    # 0.3 * 10 is above 3 in floating point.
    rank = min(len(scores), max(1, math.ceil(fraction * len(scores) - 1e-6)))
    return scores >= max(float(scores.kthvalue(len(scores) - rank + 1).values), least)


def _selected(trainer, rows):
    """Return ((N,) bool, what a selection that asked a model says of it)."""
    args, kind = trainer.args, trainer.args.token_selection
    if kind == "keywords":
        return torch.tensor(counted(rows, SELECTED)), {}
    if kind == "column":
        weights = torch.tensor(counted(rows, WEIGHTS), dtype=torch.float64)
        return (weights < 0 if args.token_weights_use == "sign_negative" else weights > 0), {}
    scores, record = SCORES[kind](trainer, rows)
    if not torch.isfinite(scores).all():
        raise UserError(f"--token_selection {kind}: some scores are not finite; the model, or what reads it, is broken")
    if kind == "activation":
        return scores >= args.selection_threshold, record
    # A token on which none of the latents fires is not kept, however few others there are.
    return top_fraction(scores, args.selection_fraction, 1.0 if kind == "sae" else -math.inf), record


def _chosen(rows, selected, with_weights):
    """Return the rows that have a selected token, with its labels alone."""
    marks, chosen = iter(selected), []
    for row in rows:
        labels = [
            label if place > 0 and label != IGNORED and next(marks) else IGNORED
            for place, label in enumerate(row["labels"])
        ]
        plain = {name: column for name, column in row.items() if name not in (SELECTED, WEIGHTS)}
        weights = {"weights": row[WEIGHTS]} if with_weights else {}
        if any(label != IGNORED for label in labels):
            chosen.append({**plain, "labels": labels, **weights})
    if with_weights:
        _scale(chosen)
    return chosen


def _scale(rows):
    """Divide the weights by their mean over the tokens that count, in place."""
    kept = [
        weight for row in rows for weight, label in zip(row["weights"], row["labels"], strict=True) if label != IGNORED
    ]
    mean = math.fsum(kept) / len(kept)
    for row in rows:
        row["weights"] = [weight / mean for weight in row["weights"]]
