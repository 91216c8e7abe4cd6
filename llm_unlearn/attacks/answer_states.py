"""What a white-box audit reads: hidden states where the tokens of an answer are predicted, at every depth."""
# Shapes: B rows of a batch, T tokens, D hidden size, L decoder layers, N scored tokens of a batch, S its sequences.
# Depth 0 is what the embeddings hand on, depth l + 1 what decoder layer l does: hidden_states of transformers.

import contextlib
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.packing import Sequence, collate, make_batches, make_rows
from llm_unlearn.evaluation.questions import questions_of
from llm_unlearn.evaluation.statistics import MAX_TOKENS_PER_BATCH


@dataclass
class AuditedRow:
    """A row of the forget set, as an audit asks about it.

    Attributes:
        split: name of its set.
        index: number of the row in the set.
        sequences: list of Sequence, the answer; several where a text takes several.
        true: the Sequence that stands beside the wrong answers; None where there are none. It is the paraphrased answer
            where the row has one: TOFU's wrong answers are written as that one is, so that against the answer itself
            their wording alone would tell them apart.
        wrong: list of Sequence.
    """

    split: str
    index: int
    sequences: list
    true: Sequence | None = None
    wrong: list = field(default_factory=list)


def audited_rows(parts, tokenizer, options):
    """Return (rows, the parts that they are of): the forget sets of a domain.

    A question counts with its answer, a text with all of its tokens, and a multiple-choice question with the text of
    the right choice; the other choices are its wrong answers.

    Args:
        parts: list of questions.Part; those called "forget" count, without one all whose role is "forget".
        tokenizer: a transformers tokenizer.
        options: TokenizeOptions.
    Returns:
        (list of AuditedRow, list of Part).
    Raises:
        UserError: no forget set, or none of its rows has an answer.
    """
    chosen = [part for part in parts if part.name == "forget"] or [part for part in parts if part.role == "forget"]
    if not chosen:
        raise UserError("a white-box audit looks for what was to be forgotten, but the domain has no forget set")
    rows = [_audited(question) for part in chosen for question in questions_of(part, tokenizer, options)]
    rows = [row for row in rows if row is not None]
    if not rows:
        raise UserError("no row of the forget set has an answer whose hidden states could be read; pass other rows")
    return rows, chosen


def _audited(question):
    found, place = question.sequences, (question.part.name, question.index)
    if found.get("cloze"):
        right = question.row["answer_index"]
        wrong = [sequence for number, sequence in enumerate(found["cloze"]) if number != right]
        return AuditedRow(*place, [found["cloze"][right]], found["cloze"][right], wrong)
    sequences = found.get("answer") or found.get("chunks")
    if not sequences:
        return None
    wrong = found.get("wrong") or []
    true = (found.get("paraphrase") or found["answer"])[0] if wrong else None
    return AuditedRow(*place, sequences, true, wrong)


@contextlib.contextmanager
def each_depth(model, batch, read):
    """Read the hidden states of every forward that runs while the context is open, where scored tokens are predicted.

    They are handed over layer by layer as the forward goes, so that those of all depths never exist at once.

    Args:
        model: as for `decoder_layers`.
        batch: packing.Batch.
        read: function of (depth, states (N, D) in the model's dtype).
    """
    layers = decoder_layers(model)
    picked = partial(_pick, batch, read)
    hooks = [layers[0].register_forward_pre_hook(partial(_pick_input, picked), with_kwargs=True)]
    hooks += [
        layer.register_forward_hook(partial(_pick_output, picked, depth)) for depth, layer in enumerate(layers, 1)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _pick(batch, read, depth, hidden):
    read(depth, hidden[batch.rows, batch.reads])


def _pick_input(picked, module, args, kwargs):
    picked(0, args[0] if args else kwargs["hidden_states"])


def _pick_output(picked, depth, module, args, output):
    picked(depth, output[0] if isinstance(output, tuple) else output)


@dataclass
class Bounds:
    """How large batches are.

    Attributes:
        pad_id: an id to pad with; its value changes nothing.
        max_tokens: tokens of a batch at most, padding included.
        max_sequences: sequences of a batch at most; None: no bound.
        progress: whether the first process shows a progress bar.
        pad_columns: further columns of padding; changes nothing, which tests show.
    """

    pad_id: int
    max_tokens: int = MAX_TOKENS_PER_BATCH
    max_sequences: int | None = None
    progress: bool = False
    pad_columns: int = 0


@torch.no_grad()
def answer_means(model, sequences, read, bounds, title="reading"):
    """Return what a function reads of each sequence, as means over the sequence's scored tokens.

    Every distinct sequence is read once; the batches are shared out over the processes, and all get all results.

    Args:
        model: a causal language model on its device, unwrapped, in eval mode.
        sequences: list of packing.Sequence, repetitions allowed.
        read: function of a packing.Batch and the number of scored tokens of each of its sequences, (S,) int64, that
            returns (S, ...), see `segment_means`.
        bounds: Bounds.
        title: of the progress bar.
    Returns:
        {sequence key: float32 array (...)}.
    """
    state = PartialState()
    distinct = {sequence.key: sequence for sequence in sequences}
    batches = make_batches(make_rows(list(distinct.values()), share=False), bounds.max_tokens, bounds.max_sequences)
    mine = batches[state.process_index :: state.num_processes]
    found = {}
    for rows in tqdm(mine, title, disable=not (bounds.progress and state.is_main_process), leave=False):
        batch = collate(rows, bounds.pad_id, model.dtype, model.device, bounds.pad_columns)
        counts = torch.tensor([count for row in rows for _, count in row.members], device=model.device)
        means = read(batch, counts).float().cpu().numpy()
        found |= dict(zip((row.members[0][0].key for row in rows), means, strict=True))
    return {key: value for part in gather_object([found]) for key, value in part.items()}


def segment_means(values, counts):
    """Return (S, ...) means of consecutive stretches of values, summed in float32.

    Args:
        values: (N, ...), any dtype.
        counts: (S,) int64, how many values each stretch has; they sum to N.
    """
    sums = torch.zeros(len(counts), *values.shape[1:], dtype=torch.float32, device=values.device)
    segments = torch.arange(len(counts), device=values.device).repeat_interleave(counts)
    sums.index_add_(0, segments, values.float())
    return sums / counts.reshape(-1, *[1] * (values.dim() - 1))


def row_means(means, row_sequences):
    """Return float64 array (rows, ...): the mean over all scored tokens of each row.

    Args:
        means: of `answer_means`.
        row_sequences: for each row a list of Sequence.
    """
    return np.stack(
        [
            np.average(
                [means[sequence.key].astype(np.float64) for sequence in sequences],
                axis=0,
                weights=[len(sequence.scored) for sequence in sequences],
            )
            for sequences in row_sequences
        ]
    )
