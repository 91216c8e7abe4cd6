"""Fine-tuning on unrelated tasks: their rows, what is held out, when it is scored, and one run of it all."""

import json

import pytest
from eval_cases import results

from llm_unlearn.attacks.downstream_metrics import (
    TaskRun,
    checkpoint_steps,
    planned_steps,
    read_steps,
    run_metrics,
)
from llm_unlearn.attacks.downstream_tasks import TASKS, load_tasks, result_of, split_held_out, task_row
from llm_unlearn.attacks.training_flags import FinetuningSettings
from llm_unlearn.cli.downstream import main
from llm_unlearn.data import sources
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.scores import HIGHER, LOWER, Metric

# Rows as the data sets have them, and (question, choices, answer) of what they become.
ROWS = {
    "gsm8k": (
        {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
        ("What is 2 + 3?", None, "2 + 3 = <<2+3=5>>5\n#### 5"),
    ),
    "agnews": (
        {"text": "Stocks fell on Monday.", "label": 2},
        (
            "Stocks fell on Monday.\nIs this news about World, Sports, Business or Technology?",
            ["World", "Sports", "Business", "Technology"], "Business",
        ),
    ),
    "sst2": (
        {"idx": 7, "sentence": "a warm , funny film ", "label": 1},
        ("a warm , funny film\nIs this sentence positive or negative?", ["negative", "positive"], "positive"),
    ),
    "winogrande": (
        {"sentence": "Ann thanked Bea because _ helped.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        (
            "Ann thanked Bea because _ helped.\nIn the previous sentence, does _ refer to Ann or Bea?",
            ["Ann", "Bea"], "Bea",
        ),
    ),
    "mnli": (
        {"premise": "It rains.", "hypothesis": "The sun shines", "label": 2, "idx": 0},
        ("It rains.\nThe sun shines. True, False or Neither?", ["True", "Neither", "False"], "False"),
    ),
    "qqp": (
        {"question1": "How old is it?", "question2": "What is its age?", "label": 1, "idx": 0},
        (
            "Question 1: How old is it?\nQuestion 2: What is its age?\nDo both questions ask the same thing?",
            ["no", "yes"], "yes",
        ),
    ),
}  # fmt: skip


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.mark.parametrize("name", TASKS)
def test_a_row_of_each_task(name):
    given, (question, choices, answer) = ROWS[name]
    (row,) = task_row(TASKS[name], given)
    assert (row["question"], row.get("choices"), row["answer"]) == (question, choices, answer)
    if choices:
        assert row["choices"][row["answer_index"]] == answer
    # A row that is in our own form already is taken as it is.
    assert task_row(TASKS[name], row) == [row]


@pytest.mark.parametrize(
    "name, label, said",
    [("sst2", -1, "from 0 to 1, but is -1"), ("winogrande", "0", "from 1 to 2, but is '0'"), ("mnli", "no", "'no'")],
)
def test_a_row_without_a_label_is_refused_by_its_number(tmp_path, name, label, said):
    rows = [ROWS[name][0], {**ROWS[name][0], TASKS[name].label: label}]
    path = write(tmp_path / f"{name}/train.jsonl", rows)
    with pytest.raises(UserError, match=rf"{path}, row 2: .*must be a number {said if 'from' in said else ''}"):
        load_tasks([name], [], str(tmp_path), None)
    with pytest.raises(UserError, match=said):
        load_tasks([name], [], str(tmp_path), None)


def test_the_last_tenth_is_held_out():
    rows = list(range(25))
    assert split_held_out(rows, "f") == (rows[:23], [23, 24])
    assert split_held_out(rows[:5], "f") == ([0, 1, 2, 3], [4])
    with pytest.raises(UserError, match="f has 1 row, of which none can be held out"):
        split_held_out([0], "f")


def test_where_rows_come_from(tmp_path):
    rows = [{"sentence": f"film {number}", "label": number % 2} for number in range(10)]
    write(tmp_path / "sst2/train.jsonl", rows)
    write(tmp_path / "sst2/validation.jsonl", rows[:4])
    own = write(tmp_path / "own.jsonl", [{"question": f"q{n}?", "answer": f"a{n}"} for n in range(20)])
    sst2, mine = load_tasks(["sst2"], [f"mine={own}"], str(tmp_path), None, num_train=3, num_held_out=2)
    assert [row["answer"] for row in sst2.train] == ["negative", "positive", "negative"]
    assert len(sst2.held_out) == 2 and sst2.origins["held_out"][0]["source"] == str(tmp_path / "sst2/validation.jsonl")
    assert [row["answer"] for row in mine.train] == ["a0", "a1", "a2"]
    assert [row["answer"] for row in mine.held_out] == ["a18", "a19"]
    (folder,) = load_tasks([], [f"sst2={tmp_path / 'sst2'}"], None, None)
    assert (len(folder.train), len(folder.held_out)) == (10, 4)
    # One file in place of a folder.
    write(tmp_path / "qqp.jsonl", [ROWS["qqp"][0]] * 3)
    (qqp,) = load_tasks(["qqp"], [], str(tmp_path), None)
    assert (len(qqp.train), len(qqp.held_out)) == (2, 1)


def test_by_name_the_hub_is_asked_for_both_splits(monkeypatch):
    asked = []

    def hub_rows(path, config, split, column, max_rows, hub, reshape):
        asked.append((path, config, split, max_rows, hub.token))
        return [reshape(ROWS["mnli"][0])[0]] * 2, "abc"

    monkeypatch.setattr("llm_unlearn.attacks.downstream_tasks.hub_rows", hub_rows)
    hub = sources.HubOptions(revision="of the domain", token="t")
    (task,) = load_tasks(["mnli"], [], None, hub, num_train=7, num_held_out=5)
    assert asked == [("nyu-mll/glue", "mnli", "train", 7, "t"), ("nyu-mll/glue", "mnli", "validation_matched", 5, "t")]
    assert task.train[0]["answer"] == "False" and task.origins["train"][0]["revision"] == "abc"


@pytest.mark.parametrize(
    "names, files, said",
    [
        (["sts2"], [], "unknown --tasks 'sts2'; did you mean 'sst2'"),
        ([], ["gsm8k"], "--task takes NAME=FILE, but was given 'gsm8k'"),
        ([], ["x=missing.jsonl"], "'missing.jsonl' does not exist"),
        ([], ["x={own}", "x={own}"], "the task 'x' is named twice"),
        (["qqp"], [], "the task qqp needs .*qqp/train"),
    ],
)
def test_what_cannot_be_a_task(tmp_path, names, files, said):
    own = write(tmp_path / "own.jsonl", [{"question": "q?", "answer": "a"}] * 3)
    with pytest.raises(UserError, match=said):
        load_tasks(names, [word.format(own=own) for word in files], str(tmp_path), None)


def test_results_of_answers():
    assert result_of("48/2 = 24\n#### 1,024\nmore") == "1024"
    assert result_of("#### $18.") == "18" and result_of("#### 18") == "18"
    assert result_of("  In  Paris\n") == "in paris" and result_of("1,024") == "1,024"


# ---- When a model is scored ----


def test_steps_by_hand():
    settings = FinetuningSettings(batch_size=4, grad_accumulation=4, epochs=1)
    assert planned_steps(200, settings) == 13  # 50 batches, twelve steps of four and one of two
    assert planned_steps(200, settings, num_processes=2) == 7  # 25 batches each
    assert planned_steps(1, settings) == 1
    assert planned_steps(200, FinetuningSettings(batch_size=8, grad_accumulation=1, epochs=2.5)) == 63  # 25 * 2.5
    assert planned_steps(200, FinetuningSettings(max_steps=5)) == 5
    assert checkpoint_steps(30) == [10, 20, 30] and checkpoint_steps(13) == [4, 9, 13]
    assert checkpoint_steps(2) == [1, 2] and checkpoint_steps(10, count=1) == [10]
    assert checkpoint_steps(100, given=[30, 10, 100]) == checkpoint_steps(100, given=[30, 10]) == [10, 30, 100]
    assert read_steps(None) is None and read_steps("10, 30,100") == [10, 30, 100]
    with pytest.raises(UserError, match="names step 101, but fine-tuning takes 100 steps"):
        checkpoint_steps(100, given=[101])
    with pytest.raises(UserError, match="whole numbers as in 10,30,100, but was given '10,x'"):
        read_steps("10,x")


def test_metrics_by_hand():
    def run(name, values, accuracy, cosine):
        rows = [
            {"step": 10 * n, "forget/probability": value, "retain/probability": 0.9, f"{name}/accuracy": accuracy[n]}
            for n, value in enumerate(values)
        ]
        rows[-1]["stderr"] = {"forget/probability": 0.01}
        cosines = {"all": {"cosine": cosine, "finetuning_norm": 1.0, "unlearning_norm": 0.0}}
        return TaskRun(name, rows, [10, 20, 30], cosines, 50, {}, {})

    before = {"forget/probability": Metric(0.1, 0.02, 40, LOWER), "retain/probability": Metric(0.9, 0.0, 9, HIGHER)}
    runs = [
        run("a", [0.1, 0.2, 0.3, 0.7], [0.5, 0.6, 0.7, 0.8], -0.25),
        run("b", [0.1, 0.1, None, 0.1], [0.5, 0.5, 0.5, 0.6], None),
    ]
    found = run_metrics(runs, before, list(before), {"forget"})
    assert found["forget/probability"] == before["forget/probability"]
    assert found["forget/probability/after_a"] == Metric(0.7, 0.01, 40, LOWER)
    assert found["forget/probability/mean_after_a"].value == pytest.approx((0.2 + 0.3 + 0.7) / 3)
    assert found["forget/probability/mean_after_b"].reason == "the evaluation failed"
    assert found["forget/probability/mean_after"].reason == "1 of 2 tasks have no value"
    assert "retain/probability/mean_after" not in found and found["retain/probability/after_a"].direction == HIGHER
    assert (found["a/accuracy"].value, found["a/accuracy/before"].value) == (0.8, 0.5)
    assert found["a/accuracy"].n == 50 and found["accuracy/mean"].value == pytest.approx(0.7)
    assert found["cosine/a"] == Metric(-0.25, None, 1, HIGHER)
    assert found["cosine/b"].reason == "unlearning changed no weight, so that there is no direction to compare"
    runs[0].cosines = {"all": {"cosine": None, "finetuning_norm": None, "unlearning_norm": 1.0}}
    assert "not finite" in run_metrics(runs, before, [], set())["cosine/a"].reason
    runs[0].cosines = None
    assert "--target_model" in run_metrics(runs, before, [], set())["cosine/a"].reason


def test_what_diverged_has_no_numbers_after_it():
    rows = [{"step": step, "forget/probability": 0.1 + step / 100, "t/accuracy": 0.5} for step in (0, 10)]
    before = {"forget/probability": Metric(0.1, 0.02, 40, LOWER)}
    found = run_metrics([TaskRun("t", rows, [10, 20], None, 50, {}, {})], before, list(before), {"forget"})
    for name in ("forget/probability/after_t", "t/accuracy"):
        assert found[name].value is None and "diverged before its last step" in found[name].reason
    assert found["forget/probability/mean_after_t"].value is found["forget/probability/mean_after"].value is None
    assert found["t/accuracy/before"].value == 0.5


# ---- The command ----


def words(world, folder, *more):
    return [
        "--model_name_or_path", world["model"], "--domain", "custom", "--forget_data", world["forget"], "--retain_data",
        world["retain"], "--output_dir", str(folder), "--use_cpu", "--lr", "1e-3", *more,
    ]  # fmt: skip


@pytest.fixture
def two_tasks(tmp_path):
    sst2 = [{"sentence": f"film {n} is {('bad', 'good')[n % 2]}", "label": n % 2} for n in range(20)]
    sums = [{"question": f"What is {n} plus 1?", "answer": f"It is {n + 1}."} for n in range(20)]
    return [
        "--task",
        f"sst2={write(tmp_path / 'sst2.jsonl', sst2)}",
        "--task",
        f"sums={write(tmp_path / 's.jsonl', sums)}",
    ]


def test_two_tasks_from_the_same_start(tiny_world, two_tasks, tmp_path, one_cpu_process, capsys):
    more = [
        *two_tasks,
        "--target_model",
        tiny_world["base"],
        "--epochs",
        "3",
        "--batch_size",
        "6",
        "--grad_accumulation",
        "1",
    ]
    assert main(words(tiny_world, tmp_path / "out", *more)) == 0
    record = results(tmp_path / "out")
    assert record["kind"] == "downstream" and record["model"] == tiny_world["model"]
    sst2, sums = record["curves"]
    # 18 rows are three steps an epoch.
    assert sst2["checkpoints"] == [3, 6, 9] and [row["step"] for row in sst2["rows"]] == [0, 3, 6, 9]
    metrics = {name: metric["value"] for name, metric in record["metrics"].items()}
    starts = {curve["rows"][0]["forget/probability"] for curve in (sst2, sums)}
    assert starts == {metrics["forget/probability"]}
    assert metrics["forget/probability/after_sst2"] == sst2["rows"][-1]["forget/probability"]
    assert metrics["forget/probability/after_sst2"] != metrics["forget/probability"]
    assert metrics["sums/token_accuracy"] > metrics["sums/token_accuracy/before"]
    assert 0 <= metrics["sst2/accuracy"] <= 1 and metrics["sums/accuracy"] is None
    for task in ("sst2", "sums"):
        groups = record["cosines"][task]
        assert metrics[f"cosine/{task}"] == groups["all"]["cosine"] and abs(groups["all"]["cosine"]) <= 1
        assert list(groups) == ["all", "embeddings", "layer 0", "layer 1", "head"]
    assert record["levels"]["forget/probability"]["target"] < 0.01
    assert "cosine/sst2" in capsys.readouterr().out
    # Once more nothing is trained, and the cosines are still there.
    again = main(words(tiny_world, tmp_path / "out", *more))
    assert again == 0 and results(tmp_path / "out")["cosines"] == record["cosines"]
    assert results(tmp_path / "out")["curves"] == record["curves"]


@pytest.mark.parametrize(
    "more, said",
    [
        ([], "no task was named; pass --tasks"),
        (["--tasks", "gsm"], "unknown --tasks 'gsm'"),
        (["--tasks", "gsm8k", "--task_dir", "nowhere"], "--task_dir 'nowhere' is not a folder"),
        (["{task}", "--eval_every", "3"], "--eval_every has no effect here; pass --checkpoints or --checkpoint_steps"),
        (["{task}", "--checkpoints", "0"], "--checkpoints must be at least 1"),
        (["{task}", "--checkpoint_steps", "ten"], "--checkpoint_steps takes whole numbers"),
        (["{task}", "--checkpoint_steps", "9"], "--checkpoint_steps names step 9, but fine-tuning takes 2 steps"),
        (["{task}", "--target_model", "./nowhere"], "the model folder './nowhere' does not exist"),
    ],
)
def test_mistakes_end_in_one_sentence(tiny_world, two_tasks, tmp_path, one_cpu_process, capfd, more, said):
    found = [word for given in more for word in (two_tasks[:2] if given == "{task}" else [given])]
    assert main(words(tiny_world, tmp_path / "out", *found)) == 2
    assert said in capfd.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out/results.json").exists()
