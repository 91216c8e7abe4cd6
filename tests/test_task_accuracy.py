"""How well a model does an unrelated task: choices against plain forwards, answers by tokens and generated."""

import json
from pathlib import Path

import pytest
import torch

from llm_unlearn.attacks.downstream_tasks import TaskRows
from llm_unlearn.attacks.task_accuracy import NOT_GENERATED, TaskScorer
from llm_unlearn.data.rows import canonical_row
from llm_unlearn.data.tokenize import TokenizeOptions
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.scores import LOWER, Metric
from llm_unlearn.evaluation.suite import Outcome, SuiteSettings


class NoDomain:
    """Stands for a DomainScorer with nothing to score."""

    def __init__(self, tokenizer):
        self.tokenizer, self.settings = tokenizer, SuiteSettings(TokenizeOptions(model_length=512))

    def __call__(self, model, folder=None):
        return Outcome({"forget/probability": Metric(0.5)}, {}, {"model_calls": 2})


@pytest.fixture(scope="module")
def loaded(tiny_world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_world["model"]), AutoTokenizer.from_pretrained(tiny_world["model"])


def plain_choice(model, tokenizer, row):
    """The likeliest choice by plain forwards over template, answer and end, one choice at a time."""
    sums = []
    for choice in row["choices"]:
        prompt = f"Question: {row['question']}\nAnswer: "
        encoded = tokenizer(prompt + choice, return_offsets_mapping=True)
        ids = [*encoded["input_ids"], tokenizer.eos_token_id]
        counts = [end > len(prompt) for _, end in encoded["offset_mapping"]] + [True]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        sums.append(sum(float(logps[n - 1, ids[n]]) for n in range(1, len(ids)) if counts[n]))
    return sums.index(max(sums))


def test_choices_are_scored_as_they_are_trained(loaded):
    model, tokenizer = loaded
    rows = [
        canonical_row({"question": f"Is number {n} odd?", "choices": ["no", "yes", "maybe so"], "answer": n % 3})
        for n in range(12)
    ]
    scorer = TaskScorer(NoDomain(tokenizer), TaskRows("odd", [], rows, {}))
    outcome = scorer(model)
    expected = sum(plain_choice(model, tokenizer, row) == row["answer_index"] for row in rows) / len(rows)
    assert outcome.metrics["odd/accuracy"].value == pytest.approx(expected)
    assert outcome.metrics["odd/accuracy"].n == 12 and outcome.metrics["forget/probability"].value == 0.5
    assert outcome.counters["model_calls"] > 2 and scorer.names(outcome.metrics) == ["odd/accuracy"]


def test_answers_are_scored_by_their_tokens_or_generated(loaded, tiny_world):
    model, tokenizer = loaded
    rows = [json.loads(line) for line in Path(tiny_world["forget"]).read_text().splitlines()]
    # Three answers that the model knows, and one to another question.
    rows = [*rows[:3], {**rows[0], "answer": rows[1]["answer"]}]
    task = TaskRows("known", [], rows, {})
    plain = TaskScorer(NoDomain(tokenizer), task)(model).metrics
    assert plain["known/accuracy"].value is None and plain["known/accuracy"].reason == NOT_GENERATED
    assert plain["known/token_accuracy"].value > 0.75 and plain["known/nll"].direction == LOWER
    exact = TaskScorer(NoDomain(tokenizer), task, exact=True, max_new_tokens=80)(model).metrics
    assert exact["known/accuracy"].value == 0.75
    assert exact["known/nll"] == plain["known/nll"]


def test_a_row_beyond_the_length_is_left_out_and_none_is_an_error(loaded):
    _, tokenizer = loaded
    long = canonical_row({"question": "Why? " * 400, "choices": ["no", "yes"], "answer": 0})
    short = canonical_row({"question": "Why?", "choices": ["no", "yes"], "answer": 0})
    assert len(TaskScorer(NoDomain(tokenizer), TaskRows("w", [], [long, short], {})).rows) == 1
    with pytest.raises(UserError, match="none of the 1 held-out rows of w has a token left"):
        TaskScorer(NoDomain(tokenizer), TaskRows("w", [], [long], {}))
