"""Choosing the ignorant teacher: the rule on made-up and on published scores, the scoring, and the command line."""

import json

import backends
import numpy as np
import pytest
from mcq_world import load, rows_of, scores, write
from tiny_world import command, terms

from llm_unlearn.arguments import DataFlags
from llm_unlearn.candidates import CandidateScore, forget_questions, latest_ignorant, score, table
from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.rows import check_rows
from llm_unlearn.data.tokenize import TokenizeOptions
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.choices import mcq_prompt

METHOD = "checkpoint_transfer"


def scored(*right, questions=868, chance=0.25):
    """Scores of candidates with so many right answers each."""
    return [CandidateScore(str(n), hits / questions, chance, questions, "A", 0.3) for n, hits in enumerate(right)]


# ---- The rule ----


def test_the_standard_error_worked_out_by_hand():
    """a = 1/2 of n = 5 questions: sqrt(1/4 / 4) = 1/4, so that 1/2 is one standard error above a chance of 1/4."""
    (found,) = scored(2.5, questions=5)
    assert found.stderr == 0.25 and found.is_ignorant
    assert not scored(2.5, questions=6, chance=0.15)[0].is_ignorant


def test_the_published_choice():
    """WMDP-Bio robust, 868 questions, at steps 38144 to 60792: 54832 is the latest viable, 57216 begins to learn."""
    accuracies = [24.19, 25.23, 26.50, 29.03, 30.41]
    found = scored(*(round(percent * 868 / 100) for percent in accuracies))
    assert [one.is_ignorant for one in found] == [True, True, True, False, False]
    assert latest_ignorant(found) == 2


@pytest.mark.parametrize(
    "right, chosen",
    [
        ([217, 300, 217], 2),
        ([300, 280, 290], 1),
        ([100, 150], 1),
        ([217], 0),
        ([868, 868], 0),
    ],
    ids=["a later one that knows less", "none: the nearest", "below chance", "one", "all know all"],
)
def test_the_latest_within_one_standard_error_of_chance(right, chosen):
    assert latest_ignorant(scored(*right)) == chosen


def test_the_table_says_what_each_one_is():
    lines = table(scored(217, 300, 220), 2).splitlines()
    assert lines[0].startswith("868 questions")
    assert [line.split("|")[-2].strip() for line in lines[3:]] == ["ignorant", "knows", "teacher"]
    assert [cell.strip() for cell in lines[4].split("|")[2:6]] == ["0.3456", "0.0162", "0.2500", "0.0956"]


# ---- The scoring ----


def test_accuracy_and_chance_equal_plain_forwards(tiny_world):
    model, tokenizer = load(tiny_world["model"])
    rows = check_rows(rows_of(9), "rows")
    logps = scores(model, tokenizer, rows, mcq_prompt)
    predictions = [int(np.argmax(row)) for row in logps]
    found = score("any", model.eval(), tokenizer, rows, TokenizeOptions(None, None, 512))
    assert found.accuracy == np.mean([p == row["answer_index"] for p, row in zip(predictions, rows, strict=True)])
    # Every other question has five choices.
    assert found.chance == pytest.approx((5 / 4 + 4 / 5) / 9) and found.questions == 9
    counts = np.bincount(predictions)
    assert found.letter == "ABCDE"[int(counts.argmax())] and found.share == counts.max() / 9


def test_questions_of_the_domain_and_what_is_refused(tmp_path):
    rows = rows_of(4)
    write(tmp_path / "wmdp-bio/test.jsonl", rows)
    data = DataFlags(domain="wmdp_bio", data_dir=str(tmp_path), max_eval_samples=3, max_train_samples=1)
    assert [row["answer_index"] for row in forget_questions(None, data)] == [0, 1, 2]
    path = write(tmp_path / "mixed.jsonl", [rows[0], {"question": "Who?", "answer": "Nobody"}])
    with pytest.raises(UserError, match=r"row 2 of the questions .* has no choices.*pass --candidate_questions FILE"):
        forget_questions(str(path), DataFlags(domain="custom"))
    with pytest.raises(UserError, match="at least 2 questions, but there is 1"):
        forget_questions(str(write(tmp_path / "one.jsonl", rows[:1])), DataFlags(domain="custom"))
    with pytest.raises(UserError, match="--domain custom has none; pass --candidate_questions FILE"):
        forget_questions(None, DataFlags(domain="custom"))
    many = [{"question": "Which?", "choices": [str(n) for n in range(30)], "answer": 0}] * 2
    with pytest.raises(UserError, match="row 1 of the questions has more than 26 choices"):
        score("any", None, load_tokenizer_of_bytes(), check_rows(many, "rows"), TokenizeOptions())


def load_tokenizer_of_bytes():
    """A tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(["</s>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


# ---- The command line ----


@pytest.fixture(scope="module")
def world(tiny_world, tmp_path_factory):
    """Also a model that `knows`, one that says the opposite, and `questions` which the first always gets right."""
    folder = tmp_path_factory.mktemp("candidates")
    model, tokenizer = load(tiny_world["base"])
    rows = rows_of(24)
    for row, logps in zip(rows, scores(model, tokenizer, rows, mcq_prompt), strict=True):
        row["answer"] = int(np.argmax(logps))
    model.model.norm.weight.data.neg_()
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "ignorant")
    paths = {"questions": str(write(folder / "questions.jsonl", rows)), "ignorant": str(folder / "ignorant")}
    return {**tiny_world, **paths, "knows": tiny_world["base"]}


def words(world, folder, *flags):
    """A run whose candidates are a checkpoint that is ignorant of the questions, and then one that is not."""
    candidates = f"{world['ignorant']},{world['knows']}"
    flags = ["--candidate_revisions", candidates, "--candidate_questions", world["questions"], *flags]
    return without_teacher(command(world, METHOD, folder, *flags))


def without_teacher(given):
    place = given.index("--teacher_model_name_or_path")
    return [*given[:place], *given[place + 2 :]]


def check(folder, world):
    """What was chosen, as unlearning.json has it."""
    found = json.loads((folder / "unlearning.json").read_text())["reference"]
    assert found["teacher"]["name"] == world["ignorant"] and len(found["teacher"]["fingerprint"]) == 64
    first, last = found["candidates"]
    assert last["candidate"] == world["knows"] and last["accuracy"] == 1.0 and not last["is_chosen"]
    assert first["is_chosen"] and first["questions"] == 24 and first["accuracy"] < 0.25
    return found["candidates"]


def test_candidates_are_scored_and_the_choice_is_recorded(world, tmp_path, capsys, caplog):
    assert main(words(world, tmp_path / "out", "--max_steps", 1)) == 0
    check(tmp_path / "out", world)
    said = capsys.readouterr().out
    assert "24 questions about what is to be forgotten" in said and "| knows " in said
    assert "no candidate is within one standard error" not in caplog.text
    assert f"{world['knows']} answers" in caplog.text and "the key's own balance" in caplog.text


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["ddp", "zero3"])
def test_candidates_are_whole_on_every_process(backend, world, tmp_path):
    """from_pretrained partitions under ZeRO-3, and the teacher is partitioned again."""
    flags = ["--max_steps", 1, "--per_device_train_batch_size", 2]
    folder = backends.train(words(world, tmp_path / "two", *flags), backend, 2)
    assert main(words(world, tmp_path / "one", "--max_steps", 1)) == 0
    assert check(folder, world) == check(tmp_path / "one", world)
    assert terms(folder)[0] == pytest.approx(terms(tmp_path / "one")[0], rel=1e-5)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--candidate_revisions", "a,b"], "'a' is no folder; pass --teacher_model_name_or_path"),
        (["--candidate_revisions", "a,,b", "--teacher_model_name_or_path", "x/y"], "each once, separated by commas"),
        (["--candidate_revisions", "a,a", "--teacher_model_name_or_path", "x/y"], "each once, separated by commas"),
        (
            ["--candidate_revisions", "a", "--teacher_model_name_or_path", "x/y", "--teacher_revision", "b"],
            "--teacher_revision and --candidate_revisions exclude each other",
        ),
        (["--candidate_questions", "q", "--teacher_model_name_or_path", "x"], "no effect without --candidate_rev"),
        (["--candidate_revisions", "{base}", "--teacher_model_name_or_path", "x"], "are folders"),
    ],
)
def test_candidates_that_cannot_be(flags, message, tiny_world, tmp_path, capsys):
    flags = [flag.replace("{base}", tiny_world["base"]) for flag in flags]
    assert main([*without_teacher(command(tiny_world, METHOD, tmp_path / "out")), *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_candidates_that_nobody_scored_are_refused(tiny_world, tmp_path):
    from llm_unlearn.methods.checkpoint_transfer import CheckpointTransferArguments, CheckpointTransferTrainer

    args = CheckpointTransferArguments(
        str(tmp_path), candidate_revisions="step1,step2", teacher_model_name_or_path="x/y"
    )
    with pytest.raises(UserError, match=r"call llm_unlearn\.candidates\.choose_teacher first"):
        CheckpointTransferTrainer(None, args)
