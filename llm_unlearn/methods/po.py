"""Preference optimization with refusals: the answer to a forget question becomes another one."""

from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.data.refusals import PREFERRED, SOURCE, PreferredAnswers
from llm_unlearn.errors import UserError
from llm_unlearn.objectives.likelihood import nll
from llm_unlearn.trainer import UnlearnTrainer
from llm_unlearn.training_arguments import RetainArguments

_ADVICE = "write it into the rows, or pass --refusal_data FILE with one refusal a line"


@dataclass
class PreferredArguments(RetainArguments):
    """Arguments of a method that is told what to say instead."""

    preferred_column: str = flag(
        PREFERRED,
        "Column of the forget rows with the answer to give instead. --refusal_data fills `preferred`, of which rows "
        "without one get a built-in refusal, drawn by the seed; any other column must be there.",
    )

    draws_refusals = True

    def __post_init__(self):
        if not self.preferred_column:
            raise UserError(f"--preferred_column must name a column, but is '{self.preferred_column}'")
        super().__post_init__()


@dataclass
class POArguments(PreferredArguments):
    """Arguments of `po`."""

    def __post_init__(self):
        if self.token_selection:
            raise UserError(
                "--token_selection has no effect with po: it selects tokens of the answers to forget, which po never "
                "reads; pass idk_dpo, which reads both"
            )
        super().__post_init__()


class PreferredTrainer(UnlearnTrainer):
    """Base of the methods that are told what to say instead: makes the stream of preferred answers.

    Attributes:
        advice: what to type where a row has no preferred answer.
        last_turn_only: see `PreferredAnswers`.
    """

    args_class = PreferredArguments
    advice = _ADVICE
    last_turn_only = False

    @classmethod
    def reads_refusals(cls, args):
        """Whether `--refusal_data` fills the column that the preferred answers come from."""
        return args.preferred_column == PREFERRED

    @classmethod
    def answers(cls, tokenizer, options, args):
        """Return the PreferredAnswers of a run with these arguments."""
        # A column that was named must be there: a misspelt one would silently give refusals.
        draws = args.draws_refusals and args.preferred_column == PREFERRED
        seed = args.seed if draws else None
        return PreferredAnswers(tokenizer, options, args.preferred_column, seed, cls.advice, cls.last_turn_only)

    @classmethod
    def check_rows(cls, rows, tokenizer, args):
        """Refuse forget rows of text, and rows without a preferred answer where none is drawn."""
        answers = cls.answers(tokenizer, args.tokenize_options(None), args)
        for number, row in enumerate(rows["forget"], start=1):
            answers.text(row, number)

    def forget_note(self, tokenizer, args):
        """Tokenize the preferred answer of every forget row, to find it after the cut."""
        self._answers = self.answers(tokenizer, self.tokenize_options, args)
        return self._answers


class POTrainer(PreferredTrainer):
    """Descend on refusals as the answers to forget questions, and on the retain set.

        L = forget_weight * mean nll(refusal | forget question) + retain_weight * (retain term)

    The forget stream holds the refusals; the answers that are to be forgotten are not trained on. Of a conversation the
    last answer alone is replaced, and counts.

    Source: Jia et al. 2024, arXiv:2404.18239 (PO; "CL" in the published command line); Maini et al. 2024,
    arXiv:2401.06121 (IDK). Differs from the authors' code: the refusal has an attention mask of its own length, and is
    drawn by the seed and what the row says, not anew by whatever was drawn before.
    """

    args_class = POArguments
    streams = ("forget", "retain")
    token_terms = ("forget", "retain")
    last_turn_only = True

    def prepare_streams(self, streams, tokenizer, args):
        """Put the refusals in the place of the answers; a data set that came in tokens has them already."""
        rows = streams["forget"]
        return {**streams, "forget": self._answers.of(rows) if any(SOURCE in row for row in rows) else rows}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Average both terms over the tokens of the step."""
        outputs = self.forward(model, inputs)
        terms = {"forget": nll(outputs["forget"].logps), "retain": self.retain_term(outputs, inputs)}
        return self.total_loss(terms, outputs, return_outputs, num_items_in_batch)
