"""random_label --label_source retain_answers: forget questions with the answers to others, by hand and as trained."""

import json

import pytest
from test_methods import answer_nll
from test_preference_methods import KEEP, QA, TEXT, answers, trainer_of
from tiny_world import METHOD_FLAGS, command, terms

from llm_unlearn import trainer_class
from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.data.tokenize import answer_place
from llm_unlearn.errors import UserError
from llm_unlearn.methods.random_label import RandomLabelArguments, draw_answers
from llm_unlearn.objectives.labels import with_answer_of


def test_a_question_with_another_answer_worked_out_by_hand():
    """Only the last run of counted tokens is the answer; what is pasted counts whole, its end of sequence too."""
    row = {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, -100, 4, 5]}
    other = {"input_ids": [7, 8, 9, 10, 11, 12], "labels": [-100, 8, -100, -100, 11, 12]}
    assert with_answer_of(row, other, 9) == {"input_ids": [1, 2, 3, 11, 12], "labels": [-100, -100, -100, 11, 12]}
    assert with_answer_of(row, other, 4) == {"input_ids": [1, 2, 3, 11], "labels": [-100, -100, -100, 11]}
    assert answer_place([-100, 8, -100, -100, 11, 12]) == (4, 6) and answer_place([4, 5, -100]) == (0, 2)
    assert answer_place([-100, -100]) == (0, 0)


def test_retain_answers_are_drawn_by_the_seed_and_the_row(demo_tokenizer, tmp_path):
    """The published code kept the retain row's label positions, which belong to another question's length."""
    trainer = trainer_of("random_label", demo_tokenizer, tmp_path, QA[:12], label_source="retain_answers")
    streams = trainer.train_dataset.streams
    assert list(streams) == ["forget"] and not trainer.reference_readings(trainer.args)
    found = answers(demo_tokenizer, streams["forget"])
    # Twelve questions take each of the six answers twice.
    assert sorted(found) == sorted(2 * [row["answer"] for row in KEEP]) and found[:6] != found[6:]
    for row, example in zip(QA, streams["forget"], strict=False):
        first, last = answer_place(example["labels"])
        assert example["labels"][first:last] == example["input_ids"][first:] and last == len(example["input_ids"])
        assert demo_tokenizer.decode(example["input_ids"][:first]).rstrip() == f"Question: {row['question']}\nAnswer:"
    again = trainer_of("random_label", demo_tokenizer, tmp_path, QA[:5], label_source="retain_answers")
    assert answers(demo_tokenizer, again.train_dataset.streams["forget"]) == found[:5]
    other = trainer_of("random_label", demo_tokenizer, tmp_path, QA[:12], label_source="retain_answers", seed=1)
    assert answers(demo_tokenizer, other.train_dataset.streams["forget"]) != found


def test_retain_answers_need_questions_and_room(demo_tokenizer, tmp_path):
    flags = {"label_source": "retain_answers"}
    with pytest.raises(UserError, match="row 2 of the retain set is a text"):
        trainer_of("random_label", demo_tokenizer, tmp_path, QA[:2], [KEEP[0], TEXT], **flags)
    with pytest.raises(UserError, match="row 1 of the forget set is a text"):
        trainer_class("random_label").check_rows(
            {"forget": [TEXT], "retain": KEEP}, demo_tokenizer, RandomLabelArguments("x", use_cpu=True, **flags)
        )
    with pytest.raises(UserError, match="needs a retain set"):
        trainer_of("random_label", demo_tokenizer, tmp_path, QA[:2], None, **flags)
    tokenized = UnlearnDataset.from_rows({"forget": QA[:2], "retain": KEEP}, demo_tokenizer).streams
    with pytest.raises(UserError, match="every forget question fills the 5 tokens"):
        draw_answers(tokenized["forget"], tokenized["retain"], 0, 5)


def test_random_label_on_retain_answers_runs_and_forgets(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setitem(METHOD_FLAGS, "random_label", ["--label_source", "retain_answers"])
    flags = ["--optim", "adamw_torch", "--learning_rate", "5e-3", "--num_train_epochs", "6"]
    assert main(command(tiny_world, "random_label", tmp_path / "out", *flags)) == 0
    logged = [step["loss/forget"] for step in terms(tmp_path / "out")]
    assert sum(logged[-3:]) < 0.8 * sum(logged[:3])
    moved = [answer_nll(folder, tiny_world, "forget") for folder in (tmp_path / "out", tiny_world["model"])]
    assert moved[0] > moved[1] + 0.5
    record = json.loads((tmp_path / "out/unlearning.json").read_text())
    assert list(record["streams"]) == ["forget"] and set(record["sources"]) == {"forget", "retain"}
