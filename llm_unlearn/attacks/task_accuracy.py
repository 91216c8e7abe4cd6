"""How well a model does an unrelated task: choices by their log-probability, answers by their tokens or exactly."""

import dataclasses

import numpy as np

from llm_unlearn.attacks.downstream_tasks import result_of
from llm_unlearn.data.rows import form_of
from llm_unlearn.data.streams import pad_id
from llm_unlearn.data.tokenize import answer_example, text_chunks
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.choices import letter_predictions
from llm_unlearn.evaluation.generation import Generator, Prompt
from llm_unlearn.evaluation.packing import Sequence
from llm_unlearn.evaluation.questions import answer_text
from llm_unlearn.evaluation.scores import HIGHER, LOWER, absent, mean_metric
from llm_unlearn.evaluation.statistics import Scorer

NOT_GENERATED = "the answers are free text, which is generated only with --exact_answers True"
"""Why a task has no accuracy."""


class TaskScorer:
    """Scores a model on a domain's sets and on the held-out rows of one unrelated task.

    A choice is scored in the words of the row, in the same template as in fine-tuning, as the log-probability of the
    whole answer with its end; the likeliest one is the model's.

    Args:
        scorer: scoring.DomainScorer.
        task: downstream_tasks.TaskRows.
        exact: whether free answers are generated and compared (`downstream_tasks.result_of`), besides the likelihood
            of the right one.
        max_new_tokens: of a generated answer.
    Raises:
        UserError: no row has anything that can be scored.
    """

    def __init__(self, scorer, task, exact=False, max_new_tokens=256):
        self.scorer, self.name = scorer, task.name
        self.tokenizer, self.settings = scorer.tokenizer, scorer.settings
        self.max_new_tokens = max_new_tokens
        self.rows, self.sequences = [], []
        for row in task.held_out:
            sequences = self._sequences(row)
            if sequences:
                self.rows.append(row)
                self.sequences.append(sequences)
        if not self.rows:
            raise UserError(
                f"none of the {len(task.held_out)} held-out rows of {task.name} has a token left to score; pass a "
                "larger --max_length or other rows"
            )
        self.exact = exact and not all("choices" in row for row in self.rows)

    def __call__(self, model, folder=None):
        """Return the Outcome of the domain with this task's metrics added; see DomainScorer."""
        outcome = self.scorer(model, folder)
        was_training = model.training
        model.eval()
        try:
            metrics, counters = self.score(model, folder)
        finally:
            model.train(was_training)
        added = {name: outcome.counters.get(name, 0) + value for name, value in counters.items()}
        return dataclasses.replace(
            outcome, metrics={**outcome.metrics, **metrics}, counters={**outcome.counters, **added}
        )

    def score(self, model, folder=None):
        """Score the held-out rows alone; all processes call together.

        Args:
            model: in eval mode, on its device.
            folder: where answers are kept for a later run, or None.
        Returns:
            ({"<task>/<metric>": Metric}, counters).
        """
        bounds = (folder, self.settings.max_tokens, self.settings.max_sequences)
        scorer = Scorer(model, pad_id(self.tokenizer), *bounds)
        statistics = iter(scorer.score([one for sequences in self.sequences for one in sequences]))
        scored = [[next(statistics) for _ in sequences] for sequences in self.sequences]
        values, counters = {}, {name: n for name, n in scorer.counters.items() if name != "shared_prompts"}
        for row, found in zip(self.rows, scored, strict=True):
            for name, value in _values(row, found).items():
                values.setdefault(name, []).append(value)
        if self.exact:
            generator = Generator(model, self.tokenizer, pad_id(self.tokenizer), *bounds)
            values.setdefault("accuracy", []).extend(self._exact_hits(generator))
            counters |= generator.counters
        return self._metrics(values), counters

    def names(self, metrics):
        """Return the names of this task's metrics that have a value.

        Args:
            metrics: {name: Metric} of an Outcome.
        """
        return [key for key, found in metrics.items() if key.startswith(f"{self.name}/") and found.value is not None]

    def _metrics(self, values):
        directions = {"nll": LOWER}
        found = {
            f"{self.name}/{name}": mean_metric(these, directions.get(name, HIGHER), self.settings.seed)
            for name, these in values.items()
        }
        if f"{self.name}/accuracy" not in found:
            found[f"{self.name}/accuracy"] = absent(NOT_GENERATED, HIGHER)
        return found

    def _exact_hits(self, generator):
        """Return 1.0 for each generated answer that is the row's, 0.0 for the others; rows of choices are left out."""
        asked = [
            (row, sequences[0])
            for row, sequences in zip(self.rows, self.sequences, strict=True)
            if "choices" not in row and form_of(row) != "text"
        ]
        answers = generator.generate([Prompt(sequence.prefix, self.max_new_tokens) for _, sequence in asked])
        return [
            float(result_of(given.text) == result_of(answer_text(row)))
            for (row, _), given in zip(asked, answers, strict=True)
        ]

    def _sequences(self, row):
        """Return the sequences of a row: one a choice, the answer, or the chunks of a text; none that cannot count."""
        options = self.settings.options
        if form_of(row) == "text":
            examples = text_chunks(row["text"], self.tokenizer, options)
        else:
            texts = [{"answer": choice} for choice in row["choices"]] if "choices" in row else [{}]
            examples = [answer_example({**row, **text}, self.tokenizer, options) for text in texts]
            # A choice that the length cuts cannot be compared with one that it does not.
            if "choices" in row and any(example["is_cut"] for example in examples):
                return []
        found = [Sequence.of(example) for example in examples]
        return found if all(sequence.scored for sequence in found) else []


def _values(row, statistics):
    """Return the values of one row: whether the likeliest choice is right, or how likely the tokens of the answer."""
    if "choices" in row:
        predicted = letter_predictions([[-found.sum_nll for found in statistics]])[0]
        return {"accuracy": float(predicted == row["answer_index"])}
    hits = np.concatenate([found.hits for found in statistics])
    return {"token_accuracy": float(hits.mean()), "nll": sum(found.sum_nll for found in statistics) / len(hits)}
