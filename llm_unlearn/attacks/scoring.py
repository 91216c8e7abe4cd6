"""Scores a model in memory on the sets of a domain, again and again while an attack changes it."""

import dataclasses

from llm_unlearn.data.rows import fingerprint
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.benchmarks import load_parts
from llm_unlearn.evaluation.questions import questions_of
from llm_unlearn.evaluation.suite import SuiteSettings, run_suite

KNOWLEDGE = ("answer", "chunks", "letters")


class DomainScorer:
    """The sets of `--domain`, tokenized once, as questions to any model with the same tokenizer.

    Attributes:
        parts: list of questions.Part; the sets with something to score.
        missing: {set: why it is not there}.

    Args:
        parsed: ParsedEvaluation.
        tokenizer: of the model.
        context_length: tokens that the model reads at most, or None.
        generates: whether prompts are continued, which takes most of an evaluation's time.
        max_rows: of each set; None takes --max_eval_samples.
        wanted: which sequences of a row are scored, of answer, paraphrase, wrong, chunks, letters and cloze; None takes
            all, `KNOWLEDGE` what the attacked knowledge is measured by while weights change.
    Raises:
        UserError: see `load_parts`; nothing that can be scored.
    """

    def __init__(self, parsed, tokenizer, context_length, generates=False, max_rows=None, wanted=None):
        flags = parsed.flags
        data = dataclasses.replace(parsed.data, max_eval_samples=max_rows or parsed.data.max_eval_samples)
        loaded, self.missing = load_parts(data)
        self.domain, self.tokenizer = data.domain, tokenizer
        self.settings = SuiteSettings(
            options=flags.tokenize_options(context_length),
            max_tokens=flags.max_tokens_per_batch,
            max_sequences=flags.per_device_eval_batch_size,
            seed=flags.seed,
            aggregates=False,
        )
        self.parts, self.questions, self.wanted = [], [], wanted
        for part in loaded:
            self.add(dataclasses.replace(part, generates=part.generates and generates))
        if not self.parts:
            raise UserError(f"--domain {data.domain} has nothing that can be scored without generating")

    def add(self, part):
        """Ask about one more set, unless nothing but continuations could be asked.

        Args:
            part: questions.Part.
        """
        asked = questions_of(part, self.tokenizer, self.settings.options)
        if not part.generates:
            for question in asked:
                question.prompts.clear()
        if self.wanted is not None:
            for question in asked:
                question.sequences = {name: found for name, found in question.sequences.items() if name in self.wanted}
        asked = [question for question in asked if question.sequences or question.prompts]
        if asked:
            self.parts.append(part)
            self.questions.extend(asked)

    def keep_within(self, num_tokens, least):
        """Ask about the first rows of each set alone, as many as a bound on the tokens of all sets admits.

        Args:
            num_tokens: of one scoring, prompts included and counted for each answer.
            least: rows of a set that are kept whatever they cost.
        Returns:
            {set: rows} of those that lost some.
        """
        costs = [
            [sum(len(s.ids) for found in q.sequences.values() for s in found) for q in self._of(part)]
            for part in self.parts
        ]
        longest = max(map(len, costs))
        fits = (size for size in range(longest, 0, -1) if sum(sum(of[:size]) for of in costs) <= num_tokens)
        size = max(next(fits, 0), least)
        cut = {part.name: size for part, of in zip(self.parts, costs, strict=True) if len(of) > size}
        kept = [(part, self._of(part)[:size]) for part in self.parts]
        self.parts, self.questions = [], []
        for part, asked in kept:
            if part.name in cut:
                rows = [question.row for question in asked]
                part = dataclasses.replace(part, rows=rows, sha256=fingerprint([*rows, *part.examples]))
            self.parts.append(part)
            self.questions += [dataclasses.replace(question, part=part) for question in asked]
        return cut

    def _of(self, part):
        return [question for question in self.questions if question.part is part]

    def __call__(self, model, folder=None):
        """Score a model; all processes call together and all get the outcome.

        Args:
            model: unwrapped, on its device.
            folder: of the results by example (`cli.scoring.statistics_folder`), for weights that lie in a checkpoint;
                None for weights that are changing.
        Returns:
            suite.Outcome.
        """
        settings = dataclasses.replace(self.settings, folder=folder)
        return run_suite(
            model, self.tokenizer, self.domain, self.parts, self.missing, settings, questions=self.questions
        )
