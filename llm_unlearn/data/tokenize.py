"""Rows to token ids and labels: chunks of text, and answers whose prompt does not count."""

import functools
import logging
from dataclasses import dataclass

from llm_unlearn.data.rows import form_of
from llm_unlearn.errors import UserError

logger = logging.getLogger(__name__)

QUESTION_TEMPLATE = "Question: {question}\nAnswer: {answer}"
TEXT_LENGTH, QA_LENGTH = 4096, 512
SHORTEST_CHUNK = 5
IGNORED = -100
TEMPLATE_DATE = "26 Jul 2024"
SYSTEM_GAP = "\n\n"
LARGEST_CUT_SHARE = 0.01
ROW_COLUMNS = ("topic", "environment")
"""What tokenized rows keep of the rows."""


@dataclass(frozen=True)
class TokenizeOptions:
    """How rows become tokens.

    Attributes:
        max_length: tokens per sequence; None is 4096 for text and 512 for question and answer.
        question_template: with {question} and {answer}; None uses the tokenizer's chat template where it has one, else
            QUESTION_TEMPLATE.
        model_length: the model's context in tokens, or None where unknown.
        chat_template_kwargs: (name, value) pairs for the chat template, `date_string` for example.
        system_prompt: stands before every question and text, and never counts; None: nothing does.
    """

    max_length: int | None = None
    question_template: str | None = None
    model_length: int | None = None
    chat_template_kwargs: tuple = ()
    system_prompt: str | None = None

    def template_kwargs(self):
        """Return what the chat template is rendered with; the date is pinned, so that no two days differ."""
        return {"date_string": TEMPLATE_DATE, **dict(self.chat_template_kwargs)}

    def length(self, kind):
        """Return the sequence length in tokens for "text" or "qa" rows.

        Raises:
            UserError: if a given max_length is beyond the model's context.
        """
        if self.max_length and self.model_length and self.max_length > self.model_length:
            raise UserError(
                f"--max_length {self.max_length} is beyond the model's context of {self.model_length} tokens"
            )
        wanted = self.max_length or (TEXT_LENGTH if kind == "text" else QA_LENGTH)
        return min(wanted, self.model_length) if self.model_length else wanted


def tokenize_rows(rows, tokenizer, options, name="data", annotate=None):
    """Tokenize rows of any canonical form.

    A text becomes non-overlapping chunks (a tail of fewer than 5 tokens is dropped), every token counting. Of a prompt
    with its answer the whole is tokenized at once, and a token counts if its character span ends after the answer's
    first character; the end-of-sequence token counts. Nothing is derived from the length of a separately tokenized
    prompt, which is wrong wherever a token spans the seam.

    Args:
        rows: checked rows, see `rows.canonical_row`.
        tokenizer: a transformers tokenizer.
        options: TokenizeOptions.
        name: of the stream, for messages.
        annotate: function (row, its number from 1, token ids, text, (first, last) characters of each token) that
            returns {column: list with a value for each token}; None adds no column. It sees the whole row, before any
            cut, and text and characters are None for a row that came in tokens.
    Returns:
        list of {"input_ids": list[int], "labels": list[int]} with the columns of `annotate` and those of `ROW_COLUMNS`
        that the row has, labels -100 where a token does not count.
    Raises:
        UserError: no rows; no token left that counts; more than 1% of the answers cut off by the length.
    """
    examples, cut, short, partly = [], 0, 0, 0
    for number, row in enumerate(rows, start=1):
        note = annotate and functools.partial(annotate, row, number)
        if row.get("input_ids") is not None:
            made = [{"input_ids": list(row["input_ids"]), "labels": list(row["labels"])}]
            made[0] |= note(made[0]["input_ids"], None, None) if note else {}
        elif form_of(row) == "text":
            made = text_chunks(row["text"], tokenizer, options, note)
        else:
            made = [answer_example(row, tokenizer, options, note)]
            partly += made[0].pop("is_cut")
        kept = {column: row[column] for column in ROW_COLUMNS if column in row}
        made = [{**example, **kept} for example in made]
        counted = [example for example in made if any(label != IGNORED for label in example["labels"][1:])]
        cut += not counted and row.get("input_ids") is None and form_of(row) != "text"
        short += not counted and row.get("input_ids") is None and form_of(row) == "text"
        examples += counted
    _warn(name, rows, short, partly - cut)
    _report(name, rows, examples, cut, options)
    return examples


def generation_prompt(row, tokenizer, options):
    """Return the token ids from which generation starts: the row's tokens up to the first one that counts.

    Args:
        row: a checked row with a prompt and an answer.
        tokenizer: a transformers tokenizer.
        options: TokenizeOptions.
    Returns:
        list[int].
    """
    example = answer_example(row, tokenizer, options)
    first = next((n for n, label in enumerate(example["labels"]) if label != IGNORED), len(example["labels"]))
    return example["input_ids"][:first]


def _warn(name, rows, short, partly):
    if short:
        logger.warning(
            "%d of %d texts of the %s set are shorter than %d tokens and left out",
            short,
            len(rows),
            name,
            SHORTEST_CHUNK,
        )
    if partly > 0:
        logger.warning(
            "%d of %d answers of the %s set are cut at the length; their ends are not trained",
            partly,
            len(rows),
            name,
        )


def _report(name, rows, examples, cut, options):
    if not rows:
        raise UserError(f"the {name} set is empty")
    if cut > LARGEST_CUT_SHARE * len(rows) or not examples:
        raise UserError(
            f"{cut or len(rows)} of {len(rows)} rows of the {name} set have no token left that counts after the cut at "
            f"{options.max_length or 'the default length'}; pass a larger --max_length or shorter rows"
        )
    if cut:
        logger.warning("dropped %d of %d rows of the %s set: their answer lies beyond the length", cut, len(rows), name)


def text_chunks(text, tokenizer, options, note=None):
    """Cut a text into chunks of the model's length, every token counting but those of a system prompt.

    Args:
        text: str.
        tokenizer: a transformers tokenizer.
        options: TokenizeOptions.
        note: function (token ids, text, characters of each token) of {column: values}, cut as the tokens are; of a
            system prompt the values are 0.
    Returns:
        list of {"input_ids", "labels"}; a tail of fewer than 5 tokens is dropped.
    Raises:
        UserError: the system prompt alone fills the length.
    """
    length, before = options.length("text"), []
    if options.system_prompt:
        before = tokenizer(options.system_prompt + SYSTEM_GAP, verbose=False)["input_ids"]
        length -= len(before)
        if length < SHORTEST_CHUNK:
            raise UserError(f"--system_prompt has {len(before)} tokens, which leaves no room for a text")
    if note:
        ids, offsets = _encode(text, tokenizer, add_special_tokens=not before)
    else:
        ids = tokenizer(text, verbose=False, **({"add_special_tokens": False} if before else {}))["input_ids"]
    columns = {"labels": (IGNORED, ids)}
    columns |= {name: (0, values) for name, values in note(ids, text, offsets).items()} if note else {}
    return [
        {"input_ids": before + ids[start : start + length]}
        | {name: [lead] * len(before) + values[start : start + length] for name, (lead, values) in columns.items()}
        for start in range(0, len(ids), length)
        if len(ids) - start >= SHORTEST_CHUNK
    ]


def answer_example(row, tokenizer, options, note=None):
    """Tokenize a prompt with its answer, whose tokens alone count.

    Args:
        row: a checked row that is no text.
        tokenizer: a transformers tokenizer.
        options: TokenizeOptions.
        note: see `text_chunks`; the text is the whole that was rendered, and an appended end of sequence has no
            characters.
    Returns:
        {"input_ids", "labels", "is_cut": whether the length cut something off}.
    """
    text, spans, is_chat = _render(row, tokenizer, options)
    ids, offsets = _encode(text, tokenizer, add_special_tokens=not is_chat)
    counts = [any(end > first and start < last for first, last in spans) for start, end in offsets]
    if not is_chat and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids, counts, offsets = [*ids, tokenizer.eos_token_id], [*counts, True], [*offsets, (len(text), len(text))]
    elif not is_chat and ids[-1:] == [tokenizer.eos_token_id]:
        counts[-1] = True
    labels = [token if counted else IGNORED for token, counted in zip(ids, counts, strict=True)]
    columns = {"input_ids": ids, "labels": labels, **(note(ids, text, offsets) if note else {})}
    length = options.length("qa")
    return {name: values[:length] for name, values in columns.items()} | {"is_cut": len(ids) > length}


def answer_place(labels):
    """Return where the last answer of a tokenized row begins and where it ends, as [first, last).

    The last run of tokens that count: earlier ones are earlier turns of a conversation.

    Args:
        labels: list of T token ids, -100 where a token does not count.
    Returns:
        (first, last); first is 0 where nothing stands before it, as in a text, or nothing counts.
    """
    last = next((n + 1 for n in range(len(labels) - 1, -1, -1) if labels[n] != IGNORED), 0)
    first = next((n + 1 for n in range(last - 1, -1, -1) if labels[n] == IGNORED), 0)
    return first, last


def _render(row, tokenizer, options):
    """Return (text, character spans that count, whether a chat template made it)."""
    chat = tokenizer.chat_template is not None
    if form_of(row) == "messages":
        if not chat:
            raise UserError(
                "the rows hold messages, but the tokenizer has no chat template; pass question, answer rows"
            )
        return (*_render_chat(_with_system(row["messages"], options), tokenizer, options), True)
    system = options.system_prompt + SYSTEM_GAP if options.system_prompt else ""
    if form_of(row) == "prompt":
        prompt = system + row["prompt"]
        return prompt + row["completion"], [(len(prompt), len(prompt) + len(row["completion"]))], False
    if chat and options.question_template is None:
        turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        return (*_render_chat(_with_system(turns, options), tokenizer, options), True)
    template = options.question_template or QUESTION_TEMPLATE
    before, after = _split_template(template)
    prompt = system + before.replace("{question}", row["question"])
    text = prompt + row["answer"] + after
    return text, [(len(prompt), len(text))], False


def _with_system(messages, options):
    if not options.system_prompt:
        return messages
    if messages[0]["role"] == "system":
        raise UserError("the rows have a system message of their own, which --system_prompt would replace")
    return [{"role": "system", "content": options.system_prompt}, *messages]


def _split_template(template):
    if template.count("{question}") != 1 or template.count("{answer}") != 1:
        raise UserError(f"--question_template must hold {{question}} and {{answer}} once each, but is {template!r}")
    before, after = template.split("{answer}")
    if "{question}" in after:
        raise UserError("--question_template must hold {question} before {answer}")
    return before, after


def _render_chat(messages, tokenizer, options):
    """Render the turns and find each assistant turn in the text, from the growing prefixes of the conversation."""
    text = _rendered(messages, tokenizer, options)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # Templates need not render an empty conversation, nor prefixes alike.
        before = _rendered(messages[:number], tokenizer, options, add_generation_prompt=True)
        through = _rendered(messages[: number + 1], tokenizer, options)
        if before and text.startswith(before) and text.startswith(through):
            spans.append((len(before), len(through)))
        else:
            spans.append(_find_turn(text, messages, number))
    return text, spans


def _rendered(messages, tokenizer, options, **kwargs):
    if not messages:
        return ""
    return tokenizer.apply_chat_template(messages, tokenize=False, **options.template_kwargs(), **kwargs)


def _find_turn(text, messages, number):
    """Locate a turn by its words, behind the words of the turns before it; the turn's end marker is lost."""
    position = 0
    for message in messages[:number]:
        found = text.find(message["content"].strip(), position)
        position = found + len(message["content"].strip()) if found >= 0 else position
    content = messages[number]["content"].strip()
    start = text.find(content, position)
    if start < 0:
        raise UserError("the chat template changes the assistant's words, so that the answer cannot be located")
    return start, start + len(content)


def _encode(text, tokenizer, add_special_tokens):
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False)
        return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    first = next(n for n in range(len(ids) + 1) if ids[n : n + len(plain)] == plain)
    offsets, start = [(0, 0)] * first, 0
    for number in range(len(plain)):
        decoded = tokenizer.decode(plain[: number + 1], clean_up_tokenization_spaces=False)
        offsets.append((start, max(start, len(decoded))))
        # A character of several tokens decodes to a replacement until its last one, and all of them lie on it.
        start = max(start, len(decoded.rstrip("\ufffd")))
    return ids, offsets + [(len(text), len(text))] * (len(ids) - len(offsets))
