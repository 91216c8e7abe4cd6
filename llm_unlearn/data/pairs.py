"""Forget rows and their rewrites as two streams whose rows meet in every batch."""

import logging

from llm_unlearn.data.alignment import (
    ALIGNED_BY,
    ALIGNMENT,
    COLUMNS,
    REWRITTEN,
    aligned_by,
    whole_example,
    with_content,
)
from llm_unlearn.data.rows import form_of, text_of
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.errors import UserError

logger = logging.getLogger(__name__)

SOURCE = "source"
"""Column of a tokenized example while pairs are made: (row number, position in the row) of each token."""

_ALIGN = "python utils/rewrite_forget_set.py --rewrites FILE --target_model_name_or_path MODEL"


class RewritePairs:
    """Makes the stream of rewrites beside the stream of originals.

    As an `annotate` of `tokenize.tokenize_rows` it notes where every token of the originals comes from; when they are
    tokenized and cut, `pair` makes the rewrite of each of them.

    Args:
        tokenizer: the model's.
        options: TokenizeOptions.
        name: of the stream of originals, for messages.
    """

    def __init__(self, tokenizer, options, name="forget"):
        self.tokenizer, self.options, self.name = tokenizer, options, name
        self._key = aligned_by(tokenizer, options)
        self._rewrites = {}

    def __call__(self, row, number, ids, text=None, offsets=None):
        """Note where the tokens of a row come from.

        Args:
            row: a checked row with the columns `rewritten`, `alignment` and `aligned_by`.
            number: of the row, from 1.
            ids: all its tokens, before any cut.
            text, offsets: unused.
        Returns:
            {"source": (number, position) of each token}.
        Raises:
            UserError: a missing column, or an alignment that was made for other tokens.
        """
        self.check(row, number)
        rewrite = whole_example(with_content(row, row[REWRITTEN]), self.tokenizer, self.options)
        length, alignment = len(rewrite["input_ids"]) if rewrite else 0, row[ALIGNMENT]
        if len(alignment) != len(ids) or not all(isinstance(n, int) and 0 <= n < length for n in alignment):
            raise UserError(f"{self._row(number)} has an alignment that does not fit its tokens; align again: {_ALIGN}")
        self._rewrites[number] = (rewrite, alignment, form_of(row) == "text")
        return {SOURCE: [(number, position) for position in range(len(ids))]}

    def check(self, row, number):
        """Refuse a row that cannot be paired, as far as a look at its columns tells.

        Args:
            row: a checked row.
            number: of the row, from 1.
        Raises:
            UserError: a column is missing, or was made for another tokenizer or template.
        """
        missing = [column for column in COLUMNS if row.get(column) is None]
        if missing:
            raise UserError(f"{self._row(number)} has no column '{missing[0]}'; write rows with rewrites: {_ALIGN}")
        try:
            text_of(row, REWRITTEN)
        except ValueError as error:
            raise UserError(f"{self._row(number)}: {error}") from error
        given, wanted = str(row[ALIGNED_BY]), self._key
        if given != wanted:
            what = "template" if given.partition("-")[0] == wanted.partition("-")[0] else "tokenizer"
            raise UserError(f"{self._row(number)} was aligned for another {what}; align again: {_ALIGN}")

    def pair(self, examples):
        """Make the rewrite of each tokenized original.

        A chunk of a text gets the window of the rewrite that it is aligned with, at most as long as a sequence may be;
        an answer gets the beginning. A token of the original whose aligned token is beyond that does not count.

        Args:
            examples: tokenized originals with the column `source`.
        Returns:
            (originals with the column `alignment`: a position in the rewrite for each token, at least 1; rewrites),
            equally many. An original that has no token left that counts, or whose rewrite has none, is left out.
        Raises:
            UserError: if nothing is left.
        """
        originals, rewrites = [], []
        for example in examples:
            original, rewrite = self._pair(example)
            if _counts(original) and _counts(rewrite):
                originals.append(original)
                rewrites.append(rewrite)
        if not originals:
            raise UserError(f"no row of the {self.name} set has a token that counts and is aligned with its rewrite")
        if len(originals) < len(examples):
            left_out = len(examples) - len(originals)
            logger.warning("%d of %d sequences have nothing aligned and are left out", left_out, len(examples))
        return originals, rewrites

    def _pair(self, example):
        """Return the (original, rewrite) of one tokenized original."""
        # A system prompt stands before every chunk, comes from no row and never counts.
        before = next(place for place, source in enumerate(example[SOURCE]) if source)
        (number, first), (_, last) = example[SOURCE][before], example[SOURCE][-1]
        rewrite, alignment, is_text = self._rewrites[number]
        window = range(min(self.options.length("qa"), len(rewrite["input_ids"])))
        if is_text:
            window = _window(alignment, first, last, len(rewrite["input_ids"]), self.options.length("text") - before)
        targets = alignment[first : last + 1]
        kept = [True] * before + [target in window for target in targets]
        # The first token of a sequence draws the attention of all others, with a state unlike theirs.
        positions = [1] * before + [max(before + target - window.start, 1) for target in targets]
        original = {name: values for name, values in example.items() if name != SOURCE}
        original["labels"] = [label if keeps else IGNORED for label, keeps in zip(example["labels"], kept, strict=True)]
        original[ALIGNMENT] = [place if keeps else 1 for place, keeps in zip(positions, kept, strict=True)]
        part = {name: values[window.start : window.stop] for name, values in rewrite.items()}
        ids, labels = example["input_ids"][:before] + part["input_ids"], [IGNORED] * before + part["labels"]
        return original, {"input_ids": ids, "labels": labels}

    def _row(self, number):
        return f"row {number} of the {self.name} set"


def _window(alignment, first, last, length, size):
    """Return the range of a rewrite, of `length` tokens, that tokens first..last of a text are aligned with."""
    start = 0 if first == 0 else alignment[first]
    stop = length if last + 1 == len(alignment) else max(alignment[last + 1], alignment[last] + 1)
    return range(start, min(stop, start + size))


def _counts(example):
    return any(label != IGNORED for label in example["labels"][1:])
