"""Tokens chosen by what stands in the rows: keywords, by the characters of each token, and a column of weights."""

import bisect
import csv
import io
import math
import re
from pathlib import Path

from llm_unlearn.data.rows import read_text
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.errors import UserError

SELECTED, WEIGHTS = "selected", "token_weights"
"""Columns of tokenized rows, a value for each token, that `annotator` adds and `select_tokens` takes off."""


def annotator(args):
    """Return the function of `tokenize_rows` that adds what a selection reads of the rows, or None.

    Args:
        args: SelectionFlags.
    """
    if args.token_selection in ("keywords", "activation"):
        return KeywordMarks(patterns(args.keywords, args.keyword_regex))
    return ColumnWeights(args.token_weights_use != "weight") if args.token_selection == "column" else None


def joined(*annotates):
    """Return the function of `tokenize_rows` that adds the columns of several, or None where all of them are None."""
    given = [annotate for annotate in annotates if annotate is not None]
    return (lambda *row: {name: column for part in given for name, column in part(*row).items()}) if given else None


def annotated(rows, annotate):
    """Return tokenized rows with the columns that a function of `tokenize_rows` adds to what came in tokens."""
    return [{**row, **annotate(row, number, row["input_ids"], None, None)} for number, row in enumerate(rows, start=1)]


def counted(rows, column):
    """Return a list of N: a column of tokenized rows at the tokens that count, row by row; the first never does."""
    found = []
    for row in rows:
        found += [value for value, label in zip(row[column][1:], row["labels"][1:], strict=True) if label != IGNORED]
    return found


def require_some(kept, total, args, names, may_be_all=False):
    """Refuse a selection of no token, and one of every token.

    Args:
        kept: how many tokens it selects.
        total: of so many that count.
        args: SelectionFlags.
        names: of the flags that the message names.
        may_be_all: whether every token may be selected.
    Raises:
        UserError: saying which of the two.
    """
    if 0 < kept < total or (kept == total > 0 and may_be_all):
        return
    shown = " with ".join(f"--{name} '{getattr(args, name)}'" for name in names if getattr(args, name) is not None)
    what = "none of" if kept == 0 else "all, and so changes nothing, of"
    raise UserError(
        f"{shown} selects {what} the {total} tokens of the forget set that count; pass another, or leave out "
        "--token_selection"
    )


class KeywordMarks:
    """Marks the tokens of a row that overlap a match, as a column `selected` of bools.

    Matches are looked for in the text that was tokenized, and compared with the characters of each token in the same
    tokenization; nothing is decoded. A token that lies on a part of a keyword only is marked, a token without
    characters (a special one) never.

    Args:
        searched: compiled patterns, see `patterns`.
    Source: the regex mask of EleutherAI/unlearn. Differs from the authors' code: the text is not decoded from the
        tokens and encoded again, which need not give the same tokens; and keywords that overlap each other are all
        found.
    """

    def __init__(self, searched):
        self.searched = searched

    def __call__(self, row, number, ids, text, offsets):
        """Mark one row; see `tokenize_rows`.

        Raises:
            UserError: the row has no text.
        """
        if text is None:
            raise UserError(
                f"row {number} of the forget set came as tokens without text, in which no keyword can be found; pass "
                "the rows as text"
            )
        spans = self.spans(text)
        ends = [end for _, end in spans]

        def overlaps(first, last):
            place = bisect.bisect_right(ends, first)
            return first < last and place < len(spans) and spans[place][0] < last

        return {SELECTED: [overlaps(first, last) for first, last in offsets]}

    def spans(self, text):
        """Return the (first, last) characters of all matches, in order, those that touch or overlap joined."""
        joined = []
        for first, last in sorted(match.span(group) for part, group in self.searched for match in part.finditer(text)):
            if joined and first <= joined[-1][1]:
                joined[-1] = joined[-1][0], max(last, joined[-1][1])
            elif first < last:
                joined.append((first, last))
        return joined


def patterns(keywords, regex):
    """Compile what is looked for.

    Args:
        keywords: a text file with a keyword on each line, a CSV file with a column `keyword`, a list with commas, or
            None.
        regex: a regular expression, or None.
    Returns:
        list of (pattern, number of the group that is the match); both ignore case.
    Raises:
        UserError: a missing file, no keyword in it, no column `keyword`, or no regular expression.
    """
    compiled = []
    if keywords is not None:
        # A lookahead takes nothing away from the next place, so that keywords which overlap are all found.
        compiled.append((re.compile(f"(?=({_alternation(_words(keywords))}))", re.IGNORECASE), 1))
    if regex is not None:
        try:
            compiled.append((re.compile(regex, re.IGNORECASE), 0))
        except re.error as error:
            raise UserError(f"--keyword_regex '{regex}' is no regular expression: {error}") from error
    return compiled


class ColumnWeights:
    """Takes the weights of a row's tokens from its column `token_weights`.

    Args:
        allows_negative: whether only their signs matter.
    """

    def __init__(self, allows_negative):
        self.allows_negative = allows_negative

    def __call__(self, row, number, ids, text, offsets):
        """Return the weights of one row; see `tokenize_rows`.

        Raises:
            UserError: the row has none, not a finite number for each token, or a negative one that has no meaning.
        """
        values, where = row.get(WEIGHTS), f"row {number} of the forget set"
        if values is None:
            raise UserError(f"{where} has no column '{WEIGHTS}', which --token_selection column reads")
        if not isinstance(values, (list, tuple)) or not all(map(_is_number, values)):
            raise UserError(f"{where}: '{WEIGHTS}' must be a list of finite numbers")
        if len(values) != len(ids):
            raise UserError(
                f"{where} has {len(values)} {WEIGHTS}, but {len(ids)} tokens (of the whole row, special ones included, "
                "before it is cut)"
            )
        if not self.allows_negative and min(values, default=0) < 0:
            raise UserError(
                f"{where} has a negative weight ({min(values):g}); pass --token_weights_use sign_positive or "
                "sign_negative to keep the tokens of one sign"
            )
        return {WEIGHTS: [float(value) for value in values]}


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _alternation(words):
    """Return a pattern that matches the longest of some words; grouped by initial, which makes it ten times as fast."""
    groups = {}
    for word in sorted(set(words), key=lambda word: (-len(word), word)):
        groups.setdefault(word[0].lower(), []).append(word)
    return "|".join(
        f"{re.escape(group[0][0])}(?:{'|'.join(re.escape(word[1:]) for word in group)})" for group in groups.values()
    )


def _words(given):
    path = Path(given)
    try:
        is_file = path.is_file()
    except OSError:  # too long for a name: a list
        is_file = False
    if not is_file and path.suffix in (".txt", ".csv"):
        raise UserError(f"--keywords: the file '{given}' does not exist")
    if is_file and path.suffix == ".csv":
        table = csv.DictReader(io.StringIO(read_text(path), newline=""))
        if "keyword" not in (table.fieldnames or []):
            raise UserError(f"--keywords '{given}' has no column 'keyword'; it has {table.fieldnames or 'none'}")
        found = [row["keyword"] or "" for row in table]
    else:
        found = read_text(path).splitlines() if is_file else given.split(",")
    words = [word.strip() for word in found if word.strip()]
    if not words:
        raise UserError(f"--keywords '{given}' holds no keyword")
    return words
