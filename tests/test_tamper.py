"""tamper and relearn: the rows, the files, what an evaluation may and may not do, and the weights that train."""

import json
import logging
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from tamper_cases import attack, relearn, results, rows_of, said, tamper, without_target, words_on

from llm_unlearn.attacks.attack_state import AttackState
from llm_unlearn.attacks.curve import say_cost
from llm_unlearn.attacks.recovery import recovery
from llm_unlearn.attacks.scoring import DomainScorer
from llm_unlearn.cli import evaluate

pytestmark = pytest.mark.usefixtures("one_cpu_process")


@pytest.fixture(scope="module")
def attacked(tiny_world, tmp_path_factory):
    """An attack behind an evaluation of the same model: {"folder", "record", "known", "forwards"}.

    "known" are the metrics of run_eval.py, "forwards" the (whether answers were looked up, model calls) of each
    evaluation.
    """
    folder, forwards, plain = tmp_path_factory.mktemp("tamper"), [], DomainScorer.__call__
    kept = ["--statistics_dir", str(folder / "kept")]
    scored = ["--model_name_or_path", tiny_world["base"], "--domain", "custom", "--use_cpu", "--max_eval_samples", "4"]
    scored += ["--forget_data", tiny_world["forget"], "--retain_data", tiny_world["retain"], "--max_new_tokens", "1"]

    def spy(self, model, folder=None):
        found = plain(self, model, folder)
        forwards.append((folder is not None, found.counters["model_calls"]))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.accelerator, "is_available", lambda: False)
        assert evaluate.main([*scored, "--output_dir", str(folder / "eval"), *kept]) == 0
        patch.setattr(DomainScorer, "__call__", spy)
        record = attack(tiny_world, folder / "out", "--title", r"two\nlines", *kept)
    known = json.loads((folder / "eval/results.json").read_text())["metrics"]
    return {"folder": folder / "out", "record": record, "known": known, "forwards": forwards}


def test_the_rows_and_the_files(attacked):
    folder, record = attacked["folder"], attacked["record"]
    (path,) = folder.glob("tamper_results_*.json")
    rows = json.loads(path.read_text())
    assert re.fullmatch(r"tamper_results_\d{8}_\d{6}\.json", path.name)
    assert [row["step"] for row in rows] == [0, 2, 4]
    for row in rows:
        assert set(row) == {"step", "forget/probability", "retain/probability", "stderr", "timestamp"}
        assert 0 < row["forget/probability"] < 1 and row["stderr"]["forget/probability"] > 0
        assert datetime.fromisoformat(row["timestamp"]).tzinfo is not None
    assert rows[-1]["forget/probability"] > 2 * rows[0]["forget/probability"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert rows == record["curves"][0]["rows"] and record["kind"] == "tamper"
    assert record["curves"][0]["settings"]["learning_rate"] == 5e-3 and record["strongest"] == "lr 0.005"
    assert not list(folder.glob("**/checkpoint-*"))
    assert record["counters"]["optimizer_steps"] == 4 and record["counters"]["evaluations"] == 3
    assert 0 < record["counters"]["evaluation_seconds"] < record["counters"]["seconds"]


def test_the_metrics_are_those_of_the_curve(attacked):
    record = attacked["record"]
    level = record["levels"]["forget/probability"]
    assert level["target"] > 0.9 and level["chance"] is None
    curve = [(row["step"], row["forget/probability"]) for row in rows_of(record)]
    for name, metric in recovery(curve, level["target"]).items():
        assert record["metrics"][f"forget/probability/{name}"]["value"] == metric.value, name
    assert not any(name.startswith("retain/") for name in record["metrics"])


def test_step_0_is_the_number_of_run_eval_looked_up(attacked):
    first = rows_of(attacked["record"])[0]
    for name in ("forget/probability", "retain/probability"):
        assert first[name] == attacked["known"][name]["value"]
        assert first["stderr"][name] == attacked["known"][name]["stderr"]
    # The target, step 0, steps 2 and 4: weights that change are never looked up.
    forwards = attacked["forwards"]
    assert [looked_up for looked_up, _ in forwards] == [True, True, False, False]
    assert forwards[1][1] == 0 and min(forwards[0][1], forwards[2][1], forwards[3][1]) > 0


def test_a_failed_evaluation_is_null_and_the_attack_goes_on(tiny_world, attacked, tmp_path, monkeypatch, caplog):
    plain, calls = DomainScorer.__call__, []

    def broken(self, model, folder=None):
        calls.append(folder)
        if len(calls) != 2:
            raise RuntimeError("the disk is full")
        return plain(self, model, folder)

    monkeypatch.setattr(DomainScorer, "__call__", broken)
    with caplog.at_level(logging.ERROR):
        assert tamper.main(without_target(words_on(tiny_world, tmp_path / "out"))) == 0
    record = results(tmp_path / "out")
    rows = rows_of(record)
    assert len(calls) == len(rows) == 3, "nothing is tried twice"
    assert rows[0] == {"step": 0, "forget/probability": None, "retain/probability": None}
    assert rows[1] == rows_of(attacked["record"])[1], "what failed changes nothing of the attack"
    assert rows[2] == {"step": 4, "forget/probability": None, "retain/probability": None}
    assert "the evaluation at step 4 failed; its row is null" in caplog.text
    failure = {"error": "RuntimeError: the disk is full"}
    assert record["curves"][0]["failures"] == [{"step": 0, **failure}, {"step": 4, **failure}]
    metrics, best = record["metrics"], rows[1]["forget/probability"]
    assert metrics["forget/probability/recovered"]["reason"].startswith("no --target_model was given")
    assert metrics["forget/probability/best"]["value"] == best and metrics["forget/probability/area"]["value"] is None
    assert record["levels"]["forget/probability"]["target"] is None
    assert record["counters"]["evaluations_failed"] == 2


@pytest.mark.parametrize("seconds, warns", [(2.5, False), (2.6, True)])
def test_an_expensive_evaluation_is_warned_of(caplog, seconds, warns):
    with caplog.at_level(logging.INFO):
        say_cost(AttackState({}, seconds=10.0, evaluation_seconds=seconds))
    assert "the attack took 10.0 s" in caplog.text
    assert ("pass a larger --eval_every, or a smaller --max_eval_samples" in caplog.text) == warns


def test_the_defaults_of_the_two_scripts(tiny_world, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tamper, "_attack", lambda parsed, chosen, kind: seen.append((kind, [c.name for c in chosen])))
    words = words_on(tiny_world, tmp_path / "out")
    place = words.index("--lr")
    assert relearn.main(words[:place] + words[place + 2 :]) == 0
    assert relearn.main(words) == 0 and tamper.main(words) == 0
    assert seen == [
        ("relearn", ["lr 1e-05", "lr 2e-05", "lr 8e-05"]), ("relearn", ["lr 0.005"]), ("tamper", ["lr 0.005"]),
    ]  # fmt: skip
    short, published = relearn.RelearnFlags(), tamper.TamperFlags()
    assert (short.num_train_examples, short.max_steps, short.eval_every) == (64, 100, 10)
    assert (published.num_train_examples, published.max_steps, published.epochs, published.eval_every) == (0, -1, 1, 10)
    assert (published.lr, published.lr_scheduler, published.weight_decay, published.lora_r) == (
        2e-5, "constant", 0.01, 0,
    )  # fmt: skip
    assert published.batch_size * published.grad_accumulation == 16


def test_drawing_anew_loads_no_torch(attacked, tmp_path):
    (path,) = attacked["folder"].glob("tamper_results_*.json")
    shutil.copy(path, tmp_path)
    shutil.copy(path.with_name("results.json"), tmp_path)
    words = ["--plot_only", str(tmp_path / path.name), "--title", r"one\ntwo", "--model_name", "nowhere"]
    code = (
        f"import sys; from llm_unlearn.cli.tamper import main; code = main({words!r}); "
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules), 'torch was loaded'; raise SystemExit(code)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plot = (tmp_path / path.with_suffix(".png").name).read_bytes()
    assert plot.startswith(b"\x89PNG") and plot != path.with_suffix(".png").read_bytes(), "it has another title"
    assert tamper.main(["--plot_only", str(tmp_path / "results.json")]) == 0
    assert (tmp_path / "results.png").is_file()


ROW = {"step": 0, "forget/probability": 0.1}


@pytest.mark.parametrize(
    "contents",
    [
        5, [1], {"curves": [1]}, {"curves": []}, {"curves": [{"rows": [ROW]}]}, [{**ROW, "step": "a"}],
        [{**ROW, "forget/probability": "x"}],
    ],
)  # fmt: skip
def test_what_holds_no_rows_is_refused(tmp_path, capsys, contents):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(contents))
    assert "holds no rows of an attack" in said(capsys, ["--plot_only", str(path)])
    path.write_text(json.dumps([ROW, {**ROW, "step": 5, "forget/probability": None}]))
    assert tamper.main(["--plot_only", str(path)]) == 0


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--plot_only", "nowhere.json"], "--plot_only 'nowhere.json' cannot be read"),
        (["--plot_only"], "--plot_only needs a value"),
        (["--domain", "custom"], "no model was named"),
        (["--model_name", "x"], "--domain is missing; known: arxiv"),
        (["--sweep", "rate=1"], "unknown key of --sweep 'rate'"),
        (["--sweep", "lr"], "--sweep 'lr' is not of the form lr=1e-5,2e-5"),
        (["--sweep", "lr=fast"], "--sweep lr=fast: 'fast' is no number"),
        (["--sweep", "max_steps=1.5"], "--sweep max_steps=1.5: '1.5' is no whole number"),
        (["--sweep", "lr=1,1"], "names a value twice"),
        (["--sweep", "lr=1e-5", "--sweep", "lr=2e-5"], "--sweep names lr twice"),
        (["--sweep", "lr_scheduler=linaer"], "unknown --sweep lr_scheduler 'linaer'; did you mean 'linear'?"),
        (["--sweep", "lr=0"], "--lr must be above 0"),
        (["--dtype", "bfloat16"], "an attack trains float32 weights"),
        (["--load_in_4bit", "True"], "an attack trains float32 weights"),
        (["--stop_at_recovery", "0.5"], "pass --target_model FOLDER"),
        (["--stop_at_recovery", "0"], "--stop_at_recovery must be above 0"),
        (["--resume_from_checkpoint", "there"], "pass auto and the same --output_dir"),
        (["--eval_every", "0"], "--eval_every must be at least 1"),
        (["--lora_target", "q_proj"], "--lora_target has no effect without --lora_r RANK"),
        (["--warmup_ratio", "0.1", "--warmup_steps", "3"], "--warmup_ratio and --warmup_steps contradict"),
        (["--tamper_data", "forget=0.5,benign=0.6"], "must be above 0 and add up to 1"),
        (["--tamper_data", "nowhere.jsonl"], "data file 'nowhere.jsonl' does not exist"),
        (["--precision", "fp16"], "--precision fp16 needs an accelerator"),
        (["--fsdp", "True"], "--fsdp has no effect here: every process holds the whole model"),
    ],
)
def test_mistakes_end_in_one_sentence(tiny_world, tmp_path, capsys, words, sentence):
    alone = words[0] in ("--plot_only", "--domain", "--model_name")
    given = words if alone else without_target(words_on(tiny_world, tmp_path / "out", *words))
    assert sentence in said(capsys, given)
    assert not (tmp_path / "out/results.json").exists()
