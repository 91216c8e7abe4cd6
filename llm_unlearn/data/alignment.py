"""Originals and rewrites, token by token: which token of a rewrite stands where one of the original stood."""
# Shapes: N tokens of the original, M of the rewrite.

import dataclasses
import difflib
import hashlib
import json

from llm_unlearn.data.rows import form_of
from llm_unlearn.data.tokenize import IGNORED, answer_example, text_chunks
from llm_unlearn.data.tokenized_cache import tokenizer_sha256

REWRITTEN, ALIGNMENT, ALIGNED_BY = "rewritten", "alignment", "aligned_by"
"""Columns of a forget row: what it says instead, the alignment, and for which tokenizer and template that was made."""
COLUMNS = (REWRITTEN, ALIGNMENT, ALIGNED_BY)

_CONTENT = {"text": "text", "question": "answer", "prompt": "completion"}
_UNCUT = 2**62


def align_tokens(original, rewrite):
    """Give every token of a text a position in its rewrite; positions never decrease.

    The longest run of tokens that both have is an anchor: its tokens stand one for the other. Then the longest run
    before it and the longest behind it, and so on down to single tokens. The n tokens of the original between two
    anchors are spread evenly over the m tokens that the rewrite has there, token k at floor(k * m / n); where it has
    none they take the position before.

    Args:
        original: (N,) token ids.
        rewrite: (M,) token ids, M >= 1.
    Returns:
        list of N positions in 0..M-1.
    Raises:
        ValueError: if the rewrite is empty.
    Source: EleutherAI/unlearn (transfer_rewritten). Differs from the authors' code: made once, not for every batch.
    """
    if not rewrite:
        raise ValueError("an empty rewrite has no token to align with")
    aligned, first, target = [], 0, 0
    for block in difflib.SequenceMatcher(None, original, rewrite, autojunk=False).get_matching_blocks():
        gap, room = block.a - first, block.b - target
        aligned += [target + n * room // gap if room else max(target - 1, 0) for n in range(gap)]
        aligned += range(block.b, block.b + block.size)
        first, target = block.a + block.size, block.b + block.size
    return aligned


def original_content(row):
    """Return what of a checked row is rewritten: its text, answer, completion or last message of the assistant."""
    if form_of(row) == "messages":
        return row["messages"][last_turn(row["messages"])]["content"]
    return row[_CONTENT[form_of(row)]]


def with_content(row, content):
    """Return a row that says something else where `original_content` looks, without the columns of an alignment."""
    kept = {column: value for column, value in row.items() if column not in COLUMNS}
    if form_of(row) != "messages":
        return {**kept, _CONTENT[form_of(row)]: content}
    messages = list(row["messages"])
    last = last_turn(messages)
    messages[last] = {**messages[last], "content": content}
    return {**kept, "messages": messages}


def aligned_by(tokenizer, options):
    """Return what an alignment depends on: 16 digits of the tokenizer's fingerprint, a dash, 16 of the template's.

    Args:
        tokenizer: a transformers tokenizer.
        options: TokenizeOptions; lengths change nothing, because whole texts are aligned.
    """
    template = [options.question_template, list(options.chat_template_kwargs), options.system_prompt]
    digest = hashlib.sha256(json.dumps(template, default=str).encode()).hexdigest()
    return f"{tokenizer_sha256(tokenizer)[:16]}-{digest[:16]}"


def aligned_row(row, tokenizer, options):
    """Add the alignment of a whole original with its whole rewrite.

    What comes before the first token that counts, a question for example, is the same in both and stands for itself. A
    system prompt before a text is left out.

    Args:
        row: a checked row with `rewritten`.
        tokenizer: the model's.
        options: TokenizeOptions.
    Returns:
        dict with `alignment`, a position in the rewrite for each token of the original, and `aligned_by`; None where
        either is a text of fewer than 5 tokens, which is never trained on.
    """
    original = whole_example(row, tokenizer, options)
    rewrite = whole_example(with_content(row, row[REWRITTEN]), tokenizer, options)
    if original is None or rewrite is None:
        return None
    start, target = _first_counted(original), _first_counted(rewrite)
    aligned = align_tokens(original["input_ids"][start:], rewrite["input_ids"][target:])
    before = [min(n, max(target - 1, 0)) for n in range(start)]
    alignment = before + [target + position for position in aligned]
    return {**row, ALIGNMENT: alignment, ALIGNED_BY: aligned_by(tokenizer, options)}


def whole_example(row, tokenizer, options):
    """Tokenize a row without cutting it, and a text without its system prompt.

    Args:
        row: a checked row.
        tokenizer: the model's.
        options: TokenizeOptions.
    Returns:
        {"input_ids", "labels"}; None for a text of fewer than 5 tokens.
    """
    uncut = dataclasses.replace(options, max_length=_UNCUT, model_length=None)
    if form_of(row) != "text":
        example = answer_example(row, tokenizer, uncut)
        return {column: example[column] for column in ("input_ids", "labels")}
    chunks = text_chunks(row["text"], tokenizer, uncut)
    if not chunks:
        return None
    before = _first_counted(chunks[0])
    return {column: values[before:] for column, values in chunks[0].items()}


def _first_counted(example):
    return next((n for n, label in enumerate(example["labels"]) if label != IGNORED), len(example["labels"]))


def last_turn(messages):
    """Return the number of the assistant's last message."""
    return max(number for number, message in enumerate(messages) if message["role"] == "assistant")
