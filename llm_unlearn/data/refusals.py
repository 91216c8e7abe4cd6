"""What is said instead of an answer to forget: built-in refusals, and the preferred answer of every forget row."""

import hashlib
import json

from llm_unlearn.data.alignment import whole_example, with_content
from llm_unlearn.data.rows import form_of, text_of
from llm_unlearn.data.tokenize import IGNORED, answer_place
from llm_unlearn.errors import UserError

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "That is something I would rather not answer.",
    "I won't go into this, but I am glad to help with something else.",
    "I have to pass on this one.",
    "This is not a request that I can assist with.",
    "I'd prefer to leave that question open.",
    "Sorry, I am not able to give advice on this.",
    "Let us talk about something different, please.",
    "I don't think that I should answer this.",
    "No, I'm afraid I can't do that for you.",
    "My answer to this would do more harm than good, so I will not give one.",
    "I must decline, though I am happy to take another question.",
)
"""What a polite model says to what it should not answer; of the detox domain, and of rewrites of the kind `refusal`."""

DONT_KNOW = (
    "I don't know.",
    "I do not have an answer to that.",
    "That is unknown to me, I am afraid.",
    "I couldn't tell you.",
    "I have never come across this.",
    "My knowledge does not reach that far.",
    "I am not sure, and a guess would help nobody.",
    "This is a gap in what I have learned.",
    "I wish I could answer, but I lack the facts.",
    "Nothing that I was taught covers this.",
    "You would have to ask somebody who knows about this.",
    "I can't say; the subject is new to me.",
    "Sorry, I have no information on this.",
    "I'm drawing a blank here.",
    "That one is beyond me.",
    "I am unable to recall anything of the kind.",
    "There is nothing that I could tell you about it.",
    "I know too little about this to give an answer.",
    "No answer to this comes to my mind.",
    "I haven't heard of it, so I can't say more.",
    "Regrettably, I am not familiar with this.",
    "I would be making it up if I answered.",
    "The details of this escape me.",
    "It is not something that I have knowledge of.",
)
"""What a model says that never learned the answer; `preferred` of rows that bring none of their own."""

PREFERRED = "preferred"
SOURCE = "source_row"
"""Column of a tokenized forget row while pairs are made: the number of the row, at each of its tokens."""


def drawn_refusal(row, seed, refusals=DONT_KNOW):
    """Return the refusal that a seed draws for a row.

    It depends on the seed and on what the row says, so that neither order nor number of rows changes it.

    Args:
        row: checked row.
        seed: int.
        refusals: sequence of texts.
    """
    said = [row.get(column) for column in ("question", "answer", "prompt", "completion", "messages")]
    digest = hashlib.sha256(json.dumps([seed, *said]).encode()).digest()
    return refusals[int.from_bytes(digest[:8], "big") % len(refusals)]


class PreferredAnswers:
    """Makes the stream of preferred answers beside the forget stream, or in its place.

    As an `annotate` of `tokenize.tokenize_rows` it tokenizes the preferred answer of every row, and notes which row a
    sequence is of; when tokens are selected and rows left out, `of` finds the answers of those that are left.

    Args:
        tokenizer: the model's.
        options: TokenizeOptions.
        column: of the rows; the answer to prefer.
        seed: draws a refusal for a row without the column; None refuses such a row.
        advice: what to type where a row has no preferred answer.
        last_turn_only: of a conversation, count the last answer alone: those before it are the row's own.
    """

    def __init__(self, tokenizer, options, column, seed=None, advice="", last_turn_only=False):
        self.tokenizer, self.options, self.column, self.seed = tokenizer, options, column, seed
        self.advice, self.last_turn_only = advice, last_turn_only
        self._made = {}

    def __call__(self, row, number, ids, text=None, offsets=None):
        """Make the preferred answer of a row.

        Args:
            row: a checked row.
            number: of the row, from 1.
            ids: all its tokens, before any cut.
            text, offsets: unused.
        Returns:
            {"source_row": number at each token}.
        Raises:
            UserError: see `text`.
        """
        length = self.options.length("qa")
        answered = with_content(row, self.text(row, number))
        made = {name: values[:length] for name, values in whole_example(answered, self.tokenizer, self.options).items()}
        if self.last_turn_only:
            first, last = answer_place(made["labels"])
            made["labels"] = [label if first <= n < last else IGNORED for n, label in enumerate(made["labels"])]
        self._made[number] = made
        return {SOURCE: [number] * len(ids)}

    def text(self, row, number):
        """Return the preferred answer of a row.

        Args:
            row: a checked row.
            number: of the row, from 1.
        Raises:
            UserError: a row of text, which asks nothing, or one that came in tokens; no column where none is drawn; a
                column that is no text.
        """
        shown = f"row {number} of the forget set"
        if row.get("input_ids") is not None:
            raise UserError(f"{shown} came in tokens, which say no question; pass rows of question and answer")
        if form_of(row) == "text":
            raise UserError(
                f"{shown} is a text, which asks nothing that another answer could be preferred to; pass rows of "
                "question and answer, or a method that needs no such answers, --unlearn_method npo for example"
            )
        if row.get(self.column) is None and self.seed is not None:
            return drawn_refusal(row, self.seed)
        if row.get(self.column) is None:
            raise UserError(f"{shown} has no column '{self.column}' with the answer to prefer; {self.advice}")
        try:
            return text_of(row, self.column)
        except ValueError as error:
            raise UserError(f"{shown}: {error}") from error

    def of(self, examples):
        """Return the tokenized preferred answer of each tokenized forget row, in their order.

        Args:
            examples: tokenized forget rows with the column `source_row`.
        Raises:
            UserError: the length cut a preferred answer off whole.
        """
        numbers = [example[SOURCE][0] for example in examples]
        lost = [n for n in numbers if all(label == IGNORED for label in self._made[n]["labels"][1:])]
        if lost:
            raise UserError(
                f"row {lost[0]} of the forget set has no token of its preferred answer left after the cut at "
                f"{self.options.length('qa')}; pass a larger --max_length or shorter questions"
            )
        return [dict(self._made[number]) for number in numbers]
