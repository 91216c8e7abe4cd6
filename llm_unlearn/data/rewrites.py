"""What forget rows are to say instead: written by a model, taken from a file, or a refusal."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from llm_unlearn.data.alignment import REWRITTEN, last_turn, original_content
from llm_unlearn.data.reshape import with_refusal
from llm_unlearn.data.rows import filled_columns, form_of, read_rows, text_of
from llm_unlearn.errors import UserError

KINDS = ("inaccurate", "alternate", "refusal")

_REPLY = "Write nothing but the {what} itself, without a remark before or behind it."
INSTRUCTIONS = {
    ("inaccurate", "text"): "Rewrite the text below so that its facts are wrong. Keep the topic, the style, the order "
    "of the sentences and the length, and leave alone every word that carries no fact; but where the text states what "
    "something is, does, contains or causes, how much, when or by whom, state something false that reads as sure.",
    ("inaccurate", "answer"): "Below are a question and its answer. Write an answer of the same style and length that "
    "is false: change what it states, not how it states it.",
    ("alternate", "text"): "Write a text that could stand in the place of the one below: the same kind of text of the "
    "same style, structure and length about the same kind of subject, but about other people, places, works, numbers "
    "and events, which you invent.",
    ("alternate", "answer"): "Below are a question and its answer. Write another answer to the question that a reader "
    "would find just as plausible, in the same style and of the same length, with other names, numbers and events, "
    "which you invent.",
    ("refusal", "answer"): "Below is a question. Decline to answer it, politely, in one or two sentences that name its "
    "subject, and reveal nothing about it.",
}
"""What the rewriter is told, by kind and by what it rewrites; its words, in the user's turn of a chat where it has one,
are this, then the original under headings, then the heading under which it is to write."""

_ORIGINAL, _REWRITTEN = "Original:", "Rewritten:"
_COLUMNS = (REWRITTEN, "answer", "completion", "text", "content", "gt")


def rewriting_prompt(row, kind):
    """Return what a model is asked so that it rewrites a row.

    Args:
        row: a checked row.
        kind: of KINDS.
    Returns:
        str.
    Raises:
        UserError: a refusal of a text, which asks nothing.
    """
    what = "text" if form_of(row) == "text" else "answer"
    if (kind, what) not in INSTRUCTIONS:
        raise UserError(f"--kind {kind} rewrites answers, but the forget set holds texts, which ask nothing")
    original = original_content(row)
    question = "" if what == "text" else f"Question:\n{_question(row)}\n\n"
    shown = "" if kind == "refusal" else f"{_ORIGINAL}\n{original}\n\n"
    return f"{INSTRUCTIONS[kind, what]} {_REPLY.format(what=what)}\n\n{question}{shown}{_REWRITTEN}\n"


def cleaned_reply(reply):
    """Return a rewriter's reply without what a model that knows no chat goes on with: the next original."""
    for heading in (_ORIGINAL, "Question:", _REWRITTEN):
        reply = reply.split(f"\n{heading}")[0]
    return reply.strip()


def refusals_of(rows, refusals):
    """Return a refusal for each row, chosen by what the row says.

    Raises:
        UserError: a row that asks nothing.
    """
    try:
        return [with_refusal(row, refusals, replace=True)["preferred"] for row in rows]
    except ValueError as error:
        raise UserError(f"--kind refusal: a row {error}") from error


def read_rewrites(path, rows):
    """Read the rewrites of rows from a file of rows, number by number.

    Args:
        path: file of rows; a rewrite stands in the column `rewritten`, else in answer, completion, text or content.
        rows: checked rows, the originals.
    Returns:
        list of texts.
    Raises:
        UserError: another number of rows; a row without a rewrite, or whose other columns say that it belongs to
            another original.
    """
    found = read_rows(path, lambda row: [_rewrite(row)])
    if len(found) != len(rows):
        raise UserError(
            f"--rewrites '{path}' has {len(found)} rows, but the forget set has {len(rows)}; row n of the one must be "
            "the rewrite of row n of the other"
        )
    for number, (rewrite, row) in enumerate(zip(found, rows, strict=True), start=1):
        other = [name for name, value in rewrite["said"].items() if name in row and row[name] != value]
        if other:
            raise UserError(
                f"row {number} of --rewrites '{path}' has another {other[0]} than row {number} of the forget set"
            )
    return [rewrite[REWRITTEN] for rewrite in found]


@dataclass(frozen=True)
class Drawing:
    """How a rewriter's replies are drawn.

    Attributes:
        temperature: of the sampling; 0 takes the likeliest token each time.
        top_p: share of the probability that the sampled tokens hold.
        max_new_tokens: tokens of a reply at most; None: half again as many as the original has, and 32.
        seed: of all draws.
        batch_size: prompts that are continued together.
        fingerprint: of the rewriter.
    """

    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int | None = None
    seed: int = 42
    batch_size: int = 8
    fingerprint: str = ""


def rewrite_rows(rows, kind, model, tokenizer, drawing, store, progress=True):
    """Rewrite rows with a model, batch by batch; what is in the store already is not written again.

    A batch is drawn with a seed of its own, so that a run that was killed goes on to the same rewrites.

    Args:
        rows: checked rows.
        kind: of KINDS.
        model: causal language model on its device, in eval mode.
        tokenizer: its tokenizer.
        drawing: Drawing.
        store: evaluation.store.RecordStore, which every finished batch goes to.
        progress: whether to show a progress bar.
    Returns:
        list of texts, "" where the model wrote nothing.
    Raises:
        UserError: a prompt with its reply is longer than the rewriter's context.
    """
    from tqdm.auto import tqdm

    prompts = [_encoded(rewriting_prompt(row, kind), tokenizer) for row in rows]
    lengths = [_reply_length(row, kind, tokenizer, drawing.max_new_tokens) for row in rows]
    _check_context(model, prompts, lengths)
    keys = [_key(number, prompts[number], lengths[number], drawing) for number in range(len(rows))]
    order = sorted(range(len(rows)), key=lambda number: -len(prompts[number]) - lengths[number])
    known = store.read()
    for first in tqdm(range(0, len(order), drawing.batch_size), "rewriting", disable=not progress, leave=False):
        batch = order[first : first + drawing.batch_size]
        if all(keys[number] in known for number in batch):
            continue
        longest = max(lengths[number] for number in batch)
        replies = _replies(model, tokenizer, [prompts[number] for number in batch], longest, first, drawing)
        found = {keys[number]: cleaned_reply(reply) for number, reply in zip(batch, replies, strict=True)}
        records = [{"key": key, REWRITTEN: reply} for key, reply in found.items()]
        store.append(records)
        known |= {record["key"]: record for record in records}
    return [known[key][REWRITTEN] for key in keys]


def _replies(model, tokenizer, prompts, max_new_tokens, first, drawing):
    """Continue a batch of prompts, (B, T) padded on the left."""
    import torch

    from llm_unlearn.data.streams import pad_id

    width, pad = max(map(len, prompts)), pad_id(tokenizer)
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if drawing.temperature > 0:
        sampling = {"do_sample": True, "temperature": drawing.temperature, "top_p": drawing.top_p, "top_k": 0}
    torch.manual_seed((drawing.seed * 1_000_003 + first) % 2**63)
    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling
        )
    return tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


def _encoded(prompt, tokenizer):
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _reply_length(row, kind, tokenizer, given):
    """Return how many tokens a reply may have: half again as many as the original, and some."""
    if given is not None or kind == "refusal":
        return given or 96
    return 32 + 3 * len(tokenizer(original_content(row), add_special_tokens=False, verbose=False)["input_ids"]) // 2


def _check_context(model, prompts, lengths):
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True), start=1):
        if context is not None and len(prompt) + length > context:
            raise UserError(
                f"row {number} takes {len(prompt)} tokens to ask and {length} to answer, more than the rewriter's "
                f"context of {context}; pass --max_length N to cut texts, or --max_new_tokens N"
            )


def _key(number, prompt, length, drawing):
    settings = [number, prompt, length, *dataclasses.astuple(drawing)]
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]


def _question(row):
    if form_of(row) == "messages":
        return "\n".join(message["content"] for message in row["messages"][: last_turn(row["messages"])])
    return row["question" if form_of(row) == "question" else "prompt"]


def _rewrite(row):
    """Return the rewrite in a row of a file, and what the row says of its original."""
    row = filled_columns(row)
    column = next((name for name in _COLUMNS if name in row), None)
    if column is None:
        raise ValueError(f"has the columns {sorted(row)}, but a rewrite stands in one of {', '.join(_COLUMNS)}")
    said = ("question", "prompt") if column != REWRITTEN else ("question", "prompt", "answer", "completion", "text")
    return {REWRITTEN: text_of(row, column), "said": {name: row[name] for name in said if name in row}}
