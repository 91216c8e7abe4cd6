"""Linear probes on planted states, what they must not see, and the whole script on tiny models."""

import numpy as np
import pytest
import ranks
import torch
from eval_cases import differences, evaluate, examples, results
from white_box_world import BOUNDS, make_lively, random_rows

from llm_unlearn.activations import capture
from llm_unlearn.attacks.answer_states import AuditedRow, Bounds
from llm_unlearn.attacks.layer_probes import (
    ProbeTask,
    ending,
    fit_probes,
    member_task,
    pooled_states,
    probe_metrics,
    task_of,
    truth_task,
)
from llm_unlearn.cli.demo import make_base_model
from llm_unlearn.cli.white_box import main
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.evaluation.packing import Sequence
from llm_unlearn.models import load_model, load_tokenizer

SIZE, ROWS, OFFERED = 24, 60, 4


def truth_case(seed=0, planted=2.0, of_row=5.0):
    """Return states (3, n, D) and their task: a direction of the true answer is planted at depths 1 and 2 alone, and
    all answers to a question share a large part of their states."""
    generator = np.random.default_rng(seed)
    groups = np.repeat(np.arange(ROWS), OFFERED)
    labels = np.tile([1] + [0] * (OFFERED - 1), ROWS)
    states = generator.normal(size=(3, len(labels), SIZE)) + of_row * generator.normal(size=(3, ROWS, SIZE))[:, groups]
    direction = generator.normal(size=SIZE)
    direction *= planted / np.linalg.norm(direction)
    states[1] += labels[:, None] * 2 * direction
    states[2] += labels[:, None] * direction
    return states.astype(np.float32), ProbeTask([], labels, groups, True)


@pytest.fixture(scope="module")
def fit():
    return fit_probes(*truth_case())


def test_a_planted_direction_is_found_where_it_is_and_the_control_is_at_chance(fit):
    """60 rows of 1 true and 3 wrong answers. A distance of 4 standard deviations leaves 2.3% on the wrong side of the
    middle, one of 2 leaves 16%; of nothing, the mean of 5 folds lies within 3 * .5 / sqrt(60) of 1/2."""
    assert fit.accuracy.shape == fit.auc.shape == fit.control.shape == (3, 5)
    accuracy = fit.accuracy.mean(1)
    assert accuracy[1] > 0.93 and 0.75 < accuracy[2] < 0.92
    assert fit.auc.mean(1)[1] > 0.98
    assert abs(accuracy[0] - 0.5) < 0.19 and np.abs(fit.control.mean(1) - 0.5).max() < 0.19
    assert abs(fit.control.mean() - 0.5) < 0.12


def test_the_metrics_are_over_layers_and_their_errors_over_folds(fit):
    metrics = probe_metrics(fit)
    best, mean = metrics["probe/forget_best_accuracy"], metrics["probe/forget_mean_accuracy"]
    assert best.value == fit.accuracy[1].mean() and best.stderr == pytest.approx(fit.accuracy[1].std(ddof=1) / 5**0.5)
    assert mean.value == pytest.approx(fit.accuracy[1:].mean()) and mean.n == ROWS
    assert metrics["probe/input_accuracy"].value == fit.accuracy[0].mean()
    assert metrics["probe/control_accuracy"].value == pytest.approx(fit.control.mean())
    directions = [metrics[f"probe/{name}"].direction for name in ("forget_best_accuracy", "input_accuracy")]
    assert directions == ["lower", "none"]


def test_folds_and_shuffles_are_the_same_each_time(fit):
    again = fit_probes(*truth_case())
    assert np.array_equal(fit.accuracy, again.accuracy) and np.array_equal(fit.control, again.control)


def test_no_row_is_in_training_and_test():
    """Each row has a state of its own, four times over, and a label at random: it would be known again in the test.
    With a split by example the accuracy is 1."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 4)
    labels = generator.permutation([0, 1] * 20)[groups]
    states = 10 * generator.normal(size=(1, 40, 200))[:, groups] + 0.01 * generator.normal(size=(1, 160, 200))
    assert fit_probes(states.astype(np.float32), ProbeTask([], labels, groups, False)).accuracy.mean() < 0.75


def test_members_are_told_from_others_by_what_is_planted():
    generator = np.random.default_rng(1)
    labels = np.array([1] * 30 + [0] * 50)
    states = generator.normal(size=(2, 80, SIZE)).astype(np.float32)
    states[1, :30, 3] += 8
    fit = fit_probes(states, ProbeTask([], labels, np.arange(80), False))
    assert fit.accuracy.mean(1)[1] > 0.93 and abs(fit.accuracy.mean(1)[0] - 0.5) < 0.2
    assert np.abs(fit.control.mean(1) - 0.5).max() < 0.2


def test_a_row_that_stands_there_twice_is_in_one_fold():
    """Equal rows in training and test would be recognized, whatever they say of members."""
    rows = [[Sequence((4, 5, token), (1, 2))] for token in range(6, 14)]
    task = member_task([*rows[:4], *rows[:4]], [*rows[4:], rows[4]])
    assert task.examples == rows and task.labels.tolist() == [1] * 4 + [0] * 4
    assert member_task([rows[0]] * 9, rows[4:]) is None


class TestTasks:
    def row(self, index, prompt=(4, 5), eos=()):
        answers = [Sequence((*prompt, index, token, *eos), (2, 3)) for token in (10, 11, 12)]
        return AuditedRow("forget", index, [answers[0]], answers[0], answers[1:])

    def test_of_rows_that_ask_the_same_the_first_counts(self):
        rows = [self.row(n, (4, n % 5)) for n in range(10)]
        task = truth_task(rows)
        assert task.is_matched and task.groups.tolist() == [group for group in range(5) for _ in range(3)]
        assert task.labels.tolist() == [1, 0, 0] * 5
        assert truth_task(rows[:3]) is None and truth_task(random_rows()) is None

    def test_an_answer_is_read_at_its_last_token_before_the_end(self):
        """Position 3 holds the last token; a state is read one before what is scored."""
        assert ending(self.row(7).true).scored == (4,) and ending(self.row(7).true).ids[:4] == (4, 5, 7, 10)
        assert ending(self.row(7, eos=(1,)).true, 1) == ending(self.row(7).true, 1)
        assert ending(Sequence((1,), ()), 1).ids == (1, 0)

    def test_members_stand_before_others(self):
        rows = [[Sequence((4, token), (1,))] for token in range(9)]
        task = member_task(rows[:4], rows[4:])
        assert task.labels.tolist() == [1] * 4 + [0] * 5 and not task.is_matched and task.examples == rows
        assert member_task(rows[:3], rows[4:]) is None


@pytest.mark.parametrize("bounds", [BOUNDS, Bounds(95, pad_columns=4), Bounds(0, max_sequences=1)])
def test_states_are_those_of_the_layers(bounds):
    """By a plain forward, one row at a time: the mean over where the answer is predicted, and the last token's own."""
    model, rows = make_lively(), random_rows(8)
    task = member_task([row.sequences for row in rows[:4]], [[ending(row.sequences[0])] for row in rows[4:]])
    found = pooled_states(model, task, bounds)
    assert found.shape == (6, 8, 32)
    for number in (0, 1, 4, 7):
        sequence = rows[number].sequences[0]
        with torch.no_grad(), capture(*decoder_layers(model)) as hidden:
            model(input_ids=torch.tensor([sequence.ids]), use_cache=False)
        states = torch.stack([model.get_input_embeddings()(torch.tensor([sequence.ids])), *hidden])[:, 0]
        expected = states[:, torch.tensor(sequence.scored) - 1].mean(1) if number < 4 else states[:, -1]
        assert np.allclose(found[:, number], expected.detach(), atol=1e-4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of an untrained model and of two like it with other last and first layers."""
    folder = tmp_path_factory.mktemp("models")
    make_base_model(str(folder / "target"), 0)
    for name, layer in (("unlearned", -1), ("gold", 0)):
        model = load_model(str(folder / "target"))
        generator = torch.Generator().manual_seed(3)
        for parameter in decoder_layers(model)[layer].parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(folder / name)
        load_tokenizer(str(folder / "target")).save_pretrained(folder / name)
    return folder


def white_box(models, output, *words, **named):
    flags = {"model_name": "unlearned", "target_model": "target", "gold": "gold", **named}
    given = [word for flag, name in flags.items() if name for word in (f"--{flag}", str(models / name))]
    few = ["--domain", "demo", "--max_eval_samples", "6", "--use_cpu", "--output_dir", str(output)]
    return main([*given, *few, *map(str, words)])


@pytest.fixture
def one_process(one_cpu_process):
    """Nothing but the fixture of that name, for tests that start a script."""


class TestScript:
    def test_everything_side_by_side(self, models, tmp_path, one_process):
        assert white_box(models, tmp_path / "all") == 0
        record = results(tmp_path / "all")
        metrics, layers = record["metrics"], record["layers"]
        assert record["kind"] == "white_box" and [row["layer"] for row in layers] == list(range(-1, len(layers) - 1))
        assert {name for name, metric in metrics.items() if metric["value"] is None} == set()
        names = "lens/forget_probability_last lens/forget_best_layer_probability lens/forget_area uds/forget"
        names += " probe/forget_best_accuracy probe/forget_mean_accuracy probe/input_accuracy probe/control_accuracy"
        assert set(metrics) == set(names.split())
        assert set(record["models"]) == {"target", "gold"}
        assert record["models"]["gold"]["metrics"]["lens/forget_area"]["value"] > 0
        # The unlearned model's last layer alone differs from the target's, gold's first.
        last = len(layers) - 1
        for number, row in enumerate(layers):
            assert (row["lens_nll"] == row["lens_nll_target"]) is (number < last)
            assert (row["lens_nll_gold"] == row["lens_nll_target"]) is (number == 0)
            assert (row["patched_drop"] == 0) is (0 < number < last)
        assert layers[0]["patched_drop"] is None and layers[0]["uds"] is None
        rows = examples(tmp_path / "all")
        assert len(rows) == 6 and len(rows[0]["lens_probability"]) == len(layers)
        assert len(rows[0]["patched_drop_gold"]) == last

        words = ["--domain", "demo", "--max_eval_samples", "6", "--max_new_tokens", "1", "--use_cpu"]
        assert evaluate("--model_name_or_path", models / "unlearned", *words, "--output_dir", tmp_path / "eval") == 0
        expected = results(tmp_path / "eval")["metrics"]["forget/probability"]["value"]
        assert metrics["lens/forget_probability_last"]["value"] == pytest.approx(expected, rel=1e-5)

    def test_without_gold_the_depth_score_is_null_and_the_drops_are_there(self, models, tmp_path, one_process):
        assert white_box(models, tmp_path, "--audits", "uds", gold=None) == 0
        record = results(tmp_path)
        assert (
            record["metrics"]["uds/forget"]["value"] is None and "--gold" in record["metrics"]["uds/forget"]["reason"]
        )
        assert record["layers"][-1]["patched_drop"] != 0 and record["layers"][-1]["uds"] is None

    def test_without_a_target_there_is_nothing_to_patch(self, models, tmp_path, one_process):
        assert white_box(models, tmp_path, "--audits", "uds,lens", target_model=None) == 0
        metrics = results(tmp_path)["metrics"]
        assert "--target_model" in metrics["uds/forget"]["reason"] and metrics["lens/forget_area"]["value"] > 0

    @pytest.mark.parametrize(
        ("words", "named", "said"),
        [
            (["--audits", "lense"], {}, "did you mean 'lens'"),
            (["--audits", ","], {}, "--audits names nothing to do"),
            (["--audits", "uds", "--lens_path", "x"], {}, "--lens_path has no effect without the audit lens"),
            (["--lens_path", "x"], {"target_model": None}, "pass it as --target_model"),
            (["--allow_pickle_lens", "True"], {}, "--allow_pickle_lens has no effect without --lens_path"),
            ([], {"gold": "nowhere"}, "does not exist"),
        ],
    )
    def test_mistakes(self, models, tmp_path, capsys, one_process, words, named, said):
        assert white_box(models, tmp_path / "out", *words, **named) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]

    def test_a_model_of_another_shape_is_refused_by_name(self, models, tmp_path, capsys, one_process):
        folder = models / "shallow"
        model = load_model(str(models / "target"))
        config = type(model.config).from_dict({**model.config.to_dict(), "num_hidden_layers": 1})
        type(model)(config).save_pretrained(folder)
        load_tokenizer(str(models / "target")).save_pretrained(folder)
        assert white_box(models, tmp_path / "out", gold="shallow") == 2
        assert "--gold" in (said := capsys.readouterr().err.splitlines()[-1]) and "a llama of 1 layer of" in said


def test_rows_without_wrong_answers_are_compared_with_a_holdout(demo_tokenizer):
    from llm_unlearn.arguments import DataFlags
    from llm_unlearn.data.tokenize import TokenizeOptions

    task, reason = task_of(random_rows(), DataFlags(domain="arxiv"), demo_tokenizer, TokenizeOptions())
    assert task is None and "fewer than 4 forget rows have wrong answers" in reason
    task, reason = task_of(random_rows(), DataFlags(domain="demo"), demo_tokenizer, TokenizeOptions())
    assert reason is None and not task.is_matched and 0 < task.labels.sum() < len(task.labels)


@pytest.mark.full
def test_two_processes_find_what_one_does(models, tmp_path, one_process):
    assert white_box(models, tmp_path / "one") == 0
    words = [word for flag, name in {"model_name": "unlearned", "target_model": "target", "gold": "gold"}.items()
             for word in (f"--{flag}", models / name)]  # fmt: skip
    words += ["--domain", "demo", "--max_eval_samples", "6", "--use_cpu", "--per_device_eval_batch_size", "2"]
    outcome = ranks.run(main, [*words, "--output_dir", tmp_path / "two"], processes=2)
    assert outcome.codes == [0, 0], outcome
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    for name in ("metrics", "layers", "white_box"):
        assert differences(one[name], two[name], rtol=1e-4, atol=1e-5) == []
