"""A domain's rows made ready for a machine without network: cut, filtered, mixed, paired, and written with hashes."""

import hashlib
import json
import os
import random
from dataclasses import dataclass

from llm_unlearn.data.alignment import COLUMNS, REWRITTEN, aligned_row
from llm_unlearn.data.rewrites import read_rewrites
from llm_unlearn.data.rows import form_of
from llm_unlearn.data.selectors_text import KeywordMarks
from llm_unlearn.data.sources import load_source
from llm_unlearn.data.tokenize import TokenizeOptions, text_chunks
from llm_unlearn.errors import UserError

_UNCUT = 2**62


@dataclass(frozen=True)
class Preparation:
    """What is done to a domain's rows, in this order: paired, filtered by keywords, cut, filtered by length, mixed.

    Attributes:
        rewrites: file whose row n is the rewrite of forget row n, or None.
        searched: patterns of `selectors_text.patterns`: forget rows that none of them matches and retain rows that one
            matches are left out; None filters nothing.
        max_length: texts are cut to so many tokens or characters; None: they are not.
        min_length: shorter texts are left out.
        chat_data: source of chat rows, see `sources.load_source`, or None.
        chat_share: how many chat rows for each retain row are mixed in.
        seed: of the order after mixing.
        tokenizer: what lengths are counted with; None counts characters.
        question_template: of the alignment, which is made where there is a tokenizer.
    """

    rewrites: str | None = None
    searched: list | None = None
    max_length: int | None = None
    min_length: int | None = None
    chat_data: str | None = None
    chat_share: float = 0.25
    seed: int = 42
    tokenizer: object = None
    question_template: str | None = None

    def prepare(self, name, source, hub=None):
        """Prepare the rows of one split.

        Args:
            name: of the split; rewrites are for forget, chat for retain, keywords for both.
            source: Source.
            hub: HubOptions for the chat rows.
        Returns:
            (rows, facts: {"origins", and where it applies "cut", "left_out": {reason: rows}, "chat_rows"}).
        Raises:
            UserError: nothing is left; rewrites that do not fit; too few chat rows.
        """
        rows, facts = source.rows, {"origins": list(source.origins)}
        if self.rewrites and name == "forget":
            rewrites = read_rewrites(self.rewrites, rows)
            rows = [{**_unpaired(row), REWRITTEN: text} for row, text in zip(rows, rewrites, strict=True)]
        left_out = {}
        if self.searched is not None and name in ("forget", "retain"):
            kept = [row for row in rows if bool(self._matches(row)) == (name == "forget")]
            left_out["keywords"], rows = len(rows) - len(kept), kept
        rows, facts["cut"] = self._cut(rows)
        kept = [row for row in rows if form_of(row) != "text" or not self._is_short(row["text"])]
        left_out["min_length"], rows = len(rows) - len(kept), kept
        if self.rewrites and self.tokenizer is not None and name == "forget":
            options = TokenizeOptions(question_template=self.question_template)
            aligned = [aligned_row(row, self.tokenizer, options) for row in rows]
            rows = [row for row in aligned if row is not None]
            left_out["too_short_to_align"] = len(aligned) - len(rows)
        if not rows:
            raise UserError(f"no row of the {name} set is left: {_reasons(left_out)}")
        if self.chat_data and name == "retain":
            rows = self._mixed(rows, facts, hub)
        return rows, {**facts, "left_out": {reason: count for reason, count in left_out.items() if count}}

    def _matches(self, row):
        return KeywordMarks(self.searched).spans("\n".join(_strings(row)))

    def _cut(self, rows):
        if self.max_length is None:
            return rows, 0
        cut = cut_rows(rows, self.max_length, self.tokenizer)
        return cut, sum(after != before for after, before in zip(cut, rows, strict=True))

    def _is_short(self, text):
        if self.min_length is None:
            return False
        return (len(text) if self.tokenizer is None else len(_ends(text, self.tokenizer))) < self.min_length

    def _mixed(self, rows, facts, hub):
        count = round(self.chat_share * len(rows))
        if count < 1:
            raise UserError(f"--chat_share {self.chat_share} of {len(rows)} retain rows is no row; pass a larger share")
        chat = load_source(self.chat_data, count, hub)
        if len(chat.rows) < count:
            raise UserError(
                f"--chat_data has {len(chat.rows)} rows, but --chat_share {self.chat_share} of {len(rows)} retain rows "
                f"needs {count}"
            )
        facts["origins"] += chat.origins
        mixed = mix(rows, chat.rows, self.seed)
        facts["chat_rows"] = sum(is_chat for is_chat, _ in mixed)
        return [row for _, row in mixed]


def mix(rows, others, seed):
    """Add other rows, shuffle, and go back to as many as there were, as published for retain sets with chat.

    Args:
        rows, others: lists of rows.
        seed: int.
    Returns:
        list of (whether it is of the others, row), as many as `rows`.
    Source: EleutherAI/unlearn (use_ultrachat, a quarter as many chat rows as retain rows).
    """
    mixed = [(False, row) for row in rows] + [(True, row) for row in others]
    random.Random(seed).shuffle(mixed)
    return mixed[: len(rows)]


def cut_rows(rows, length, tokenizer=None):
    """Cut the texts among rows, and the rewrites of texts, to so many tokens, or characters without a tokenizer.

    Args:
        rows: checked rows; those that are no text stay as they are.
        length: tokens, special ones included, or characters; None cuts nothing.
        tokenizer: a transformers tokenizer, or None.
    Returns:
        list of rows; a cut row loses an alignment that it had.
    """
    if length is None:
        return rows
    found = []
    for row in rows:
        columns = ("text", REWRITTEN) if form_of(row) == "text" else ()
        parts = {name: cut_text(row[name], length, tokenizer) for name in columns if row.get(name) is not None}
        changed = any(row[name] != part for name, part in parts.items())
        found.append({**_unpaired(row), **parts} if changed else row)
    return found


def cut_text(text, length, tokenizer=None):
    """Return the beginning of a text: so many tokens, special ones included, or characters without a tokenizer."""
    if tokenizer is None:
        return text[:length]
    ends = _ends(text, tokenizer)
    return text if len(ends) <= length else text[: ends[length - 1]]


def write_jsonl(path, rows):
    """Write rows as JSON Lines, whole or not at all.

    Args:
        path: pathlib.Path; its folder is made.
        rows: list of dicts; what JSON does not know is written as text.
    Returns:
        sha256 of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, digest = path.with_name(path.name + ".partial"), hashlib.sha256()
    with partial.open("wb") as file:
        for row in rows:
            line = json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
            digest.update(line)
            file.write(line)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return digest.hexdigest()


def _ends(text, tokenizer):
    """Return where each token of a text ends, in characters."""
    found = []

    def note(ids, text, offsets):
        found.extend(end for _, end in offsets)
        return {}

    text_chunks(text, tokenizer, TokenizeOptions(max_length=_UNCUT), note)
    return found


def _strings(row):
    if form_of(row) == "messages":
        return [message["content"] for message in row["messages"]]
    return [
        row[name] for name in ("text", "question", "answer", "prompt", "completion") if isinstance(row.get(name), str)
    ]


def _unpaired(row):
    return {name: value for name, value in row.items() if name not in COLUMNS[1:]}


def _reasons(left_out):
    return (
        ", ".join(f"{count} rows left out by {reason}" for reason, count in left_out.items() if count) or "it is empty"
    )
