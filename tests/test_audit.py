"""The stages of an audit: their order, what each is told, what a second run keeps, and what one does that fails."""

import importlib
import json
import sys
import types
from pathlib import Path

import pytest

from llm_unlearn.attacks.audit import DONE, FAILED, KEPT, NOT_APPLICABLE, Audit
from llm_unlearn.attacks.audit_plan import GOLD, MODEL, PRESETS, TARGET, Job, Stage, jobs_of, words_of
from llm_unlearn.attacks.downstream_tasks import TASKS
from llm_unlearn.attacks.parsing import parse_attack
from llm_unlearn.cli.audit import AuditFlags, _finish, main
from llm_unlearn.errors import UserError

MODELS = {MODEL: "unlearned", TARGET: "target", GOLD: "gold"}


@pytest.mark.parametrize("preset", PRESETS)
def test_results_are_there_before_a_stage_is_told_about_them(preset):
    jobs, seen = jobs_of(preset, MODELS), set()
    for job in jobs:
        seen.add((job.stage.name, job.who))
        assert all((job.stage.name, who) in seen for who, _ in job.stage.references)
    assert len(seen) == len(jobs)
    assert {job.stage.name for job in jobs} >= {"eval", "mia", "relearn", "quantize", "sampling", "white_box"}


def test_the_downstream_stage_names_every_task():
    """The script refuses to run without one, which an audit would take for a stage that does not apply."""
    (stage,) = (stage for stage in PRESETS["full"] if stage.name == "downstream")
    assert stage.words[stage.words.index("--tasks") + 1].split(",") == list(TASKS)


def test_without_gold_model_nothing_is_run_on_it():
    jobs = jobs_of("standard", {MODEL: "unlearned", TARGET: "target"}, skipped=["tamper"])
    assert {job.who for job in jobs} == {MODEL, TARGET}
    assert "tamper" not in {job.stage.name for job in jobs}


def test_words_name_the_other_models_and_their_results(tmp_path):
    stage = Stage(
        "eval", "evaluate", ("--a", "b"), references=((GOLD, "--retain_reference"),), against=((TARGET, "--t"),)
    )
    (tmp_path / "gold/eval").mkdir(parents=True)
    job = Job(stage, MODEL, "unlearned")
    words = words_of(job, MODELS, lambda place: tmp_path / place, ["--domain", "demo"])
    assert "--retain_reference" not in words  # there are no results yet
    (tmp_path / "gold/eval/results.json").write_text("{}")
    words = words_of(job, MODELS, lambda place: tmp_path / place, ["--domain", "demo"])
    assert words[:4] == ["--model_name_or_path", "unlearned", "--domain", "demo"]
    assert words[words.index("--t") + 1] == "target"
    assert words[words.index("--retain_reference") + 1] == str(tmp_path / "gold/eval/results.json")
    assert words[words.index("--output_dir") + 1] == str(tmp_path / "eval")
    own = words_of(Job(stage, GOLD, "gold"), MODELS, lambda place: tmp_path / place, [])
    assert "--retain_reference" not in own and own[own.index("--output_dir") + 1] == str(tmp_path / "gold/eval")


class Script:
    """A script that writes down how it was called; `error` is raised in its place."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def run(self, words):
        self.calls.append(words)
        if self.error:
            raise self.error
        folder = Path(words[words.index("--output_dir") + 1])
        folder.mkdir(parents=True, exist_ok=True)
        metrics = {"forget/probability": {"value": 0.5}}
        (folder / "results.json").write_text(json.dumps({"metrics": metrics, "counters": {"token_forwards": 7}}))


@pytest.fixture
def script(monkeypatch):
    """Put a Script in the place of llm_unlearn.cli.invented."""

    def make(error=None):
        made = Script(error)
        monkeypatch.setitem(sys.modules, "llm_unlearn.cli.invented", types.SimpleNamespace(run=made.run))
        return made

    return make


def audited(tmp_path, *words, who=(MODEL,), name="eval"):
    """Return (Audit, jobs) of one invented stage; every model is a folder with one file."""
    models = {key: str(tmp_path / key) for key in MODELS}
    for folder in map(Path, models.values()):
        folder.mkdir(exist_ok=True)
        if not (folder / "weights").exists():
            (folder / "weights").write_text("1")
    given = ["--model_name", models[MODEL], "--target_model", models[TARGET], "--domain", "demo", *words]
    parsed = parse_attack(given, AuditFlags, "audit")
    jobs = [Job(Stage(name, "invented", ("--sweep", "lr=1;x=2"), who), key, models[key]) for key in who]
    return Audit(parsed, models, tmp_path / "out", parsed.flags.references_dir), jobs


def statuses(record):
    """Return the status of each stage."""
    return [stage["status"] for stage in record["stages"]]


def test_flags_of_the_audit_reach_every_script(one_cpu_process, tmp_path, script):
    made = script()
    audit, jobs = audited(
        tmp_path, "--demo_seed", "3", "--max_eval_samples", "5", "--attack_lr", "1e-3", name="relearn"
    )
    record = audit.run(jobs)
    (words,) = made.calls
    assert words[words.index("--demo_seed") + 1] == "3" and words[words.index("--max_eval_samples") + 1] == "5"
    assert words[words.index("--sweep") + 1] == "lr=1e-3;x=2"
    assert "--preset" not in words and "--attack_lr" not in words
    assert statuses(record) == [DONE] and record["counters"]["token_forwards"] == 7
    assert json.loads((tmp_path / "out/audit.json").read_text())["verdict"]["status"] == "unclear"


def test_attacks_that_train_are_not_told_a_dtype_that_they_refuse(one_cpu_process, tmp_path, script):
    made = script()
    for name in ("eval", "relearn"):
        audit, jobs = audited(tmp_path, "--dtype", "bfloat16", name=name)
        audit.run(jobs)
    assert ["--dtype" in words for words in made.calls] == [True, False]


def test_a_second_run_keeps_what_is_done_and_repeats_what_changed(one_cpu_process, tmp_path, script):
    made = script()
    assert statuses(audited(tmp_path)[0].run(audited(tmp_path)[1])) == [DONE]
    audit, jobs = audited(tmp_path)
    assert statuses(audit.run(jobs)) == [KEPT] and len(made.calls) == 1
    audit, jobs = audited(tmp_path, "--seed", "7")
    assert statuses(audit.run(jobs)) == [DONE] and len(made.calls) == 2
    (tmp_path / "model/weights").write_text("other weights")
    audit, jobs = audited(tmp_path, "--seed", "7")
    assert statuses(audit.run(jobs)) == [DONE] and len(made.calls) == 3


def test_results_of_the_gold_model_serve_a_second_audit(one_cpu_process, tmp_path, script):
    made = script()
    words = ("--references_dir", str(tmp_path / "kept"))
    audit, jobs = audited(tmp_path, *words, who=(GOLD, MODEL))
    assert statuses(audit.run(jobs)) == [DONE, DONE]
    assert (tmp_path / "kept/gold/eval/results.json").is_file() and (tmp_path / "out/gold/eval/results.json").is_file()
    (tmp_path / "model/weights").write_text("another model")
    audit, jobs = audited(tmp_path, *words, who=(GOLD, MODEL))
    audit.folder = tmp_path / "second"
    assert statuses(audit.run(jobs)) == [KEPT, DONE] and len(made.calls) == 3
    assert (tmp_path / "second/gold/eval/results.json").is_file()


def test_a_model_whose_name_begins_like_the_folder_still_counts(one_cpu_process, tmp_path, script):
    made, stage = script(), Stage("relearn", "invented", against=((TARGET, "--target_model"),))
    for name in ("first", "second"):
        audit, jobs = audited(tmp_path)
        folder = tmp_path / f"out-{name}"
        folder.mkdir()
        audit.models[TARGET] = str(folder)
        assert statuses(audit.run([Job(stage, MODEL, jobs[0].model)])) == [DONE]
    assert len(made.calls) == 2


def test_results_beside_another_gold_model_are_not_kept(one_cpu_process, tmp_path, script):
    made, stage = script(), Stage("eval", "invented", (), (GOLD, MODEL), references=((GOLD, "--retain_reference"),))

    def run():
        audit, _ = audited(tmp_path)
        return statuses(audit.run([Job(stage, who, audit.models[who]) for who in (GOLD, MODEL)]))

    assert run() == [DONE, DONE] and run() == [KEPT, KEPT]
    (tmp_path / "gold/weights").write_text("trained anew")
    assert run() == [DONE, DONE] and len(made.calls) == 4


def test_what_other_weights_left_is_neither_shown_nor_gone_on_with(one_cpu_process, tmp_path, script):
    made = script()
    audit, jobs = audited(tmp_path, name="relearn")
    audit.run(jobs)
    state = tmp_path / "out/relearn/lr_1/attack.json"
    state.parent.mkdir()
    state.write_text("{}")
    (tmp_path / "model/weights").write_text("other weights")
    made.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        audited(tmp_path, name="relearn")[0].run(jobs)
    assert "--resume_from_checkpoint" not in made.calls[1]
    assert not state.exists() and not (tmp_path / "out/relearn/results.json").exists()
    # What this command left, when it was killed, is gone on with.
    state.write_text("{}")
    made.error = None
    assert statuses(audited(tmp_path, name="relearn")[0].run(jobs)) == [DONE]
    assert made.calls[2][-2:] == ["--resume_from_checkpoint", "auto"] and state.exists()


def test_every_process_does_what_the_first_one_saw(one_cpu_process, tmp_path, script, monkeypatch):
    """By the time that another process reads the signature, the first one may have written its own."""
    made = script()
    audit, jobs = audited(tmp_path, name="relearn")
    place = tmp_path / "out/relearn"
    place.mkdir(parents=True)
    signature = audit._signature(audit._words(jobs[0]), jobs[0])
    (place / "stage.json").write_text(json.dumps({"signature": signature}))
    alone = types.SimpleNamespace(num_processes=2, wait_for_everyone=lambda: None)
    monkeypatch.setattr("llm_unlearn.attacks.audit.PartialState", lambda: alone)
    monkeypatch.setattr("llm_unlearn.attacks.audit.is_first_process", lambda: False)
    monkeypatch.setattr("llm_unlearn.attacks.audit.broadcast_object_list", lambda _: [(False, None)])
    audit.run(jobs)
    assert "--resume_from_checkpoint" not in made.calls[0]


@pytest.mark.parametrize(("error", "expected"), [(UserError("no members"), NOT_APPLICABLE), (OSError("disk"), FAILED)])
def test_a_stage_that_cannot_run_is_said_and_the_audit_goes_on(one_cpu_process, tmp_path, script, error, expected):
    made = script(error)
    audit, jobs = audited(tmp_path, who=(TARGET, MODEL))
    record = audit.run(jobs)
    assert statuses(record) == [expected, expected] and len(made.calls) == 2
    assert str(error) in record["stages"][0]["reason"] and record["verdict"]["findings"] == []
    made.error = None
    assert statuses(audited(tmp_path, who=(TARGET,))[0].run(jobs[:1])) == [DONE]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--domain", "demo"], "--target_model is missing"),
        (["--target_model", "{model}", "--domain", "demo", "--skip", "evl"], "did you mean 'eval'"),
        (["--target_model", "./nowhere", "--domain", "demo"], "does not exist"),
        (["--target_model", "{model}"], "--domain is missing"),
        (["--target_model", "{model}", "--domain", "demo", "--preset", "fast"], "invalid choice"),
        (["--target_model", "{model}", "--domain", "demo", "--attack_lr", "1e-3,fast"], "--attack_lr takes numbers"),
        (["--target_model", "{model}", "--domain", "dmo"], "did you mean 'demo'"),
        (["--target_model", "{model}", "--domain", "custom", "--forget_data", "nowhere.jsonl"], "does not exist"),
        (["--target_model", "{model}", "--domain", "custom", "--forget_data", "{empty}"], "has no rows"),
        (["--target_model", "{mute}", "--domain", "demo"], "holds no tokenizer"),
    ],
)
def test_mistakes_are_said_before_anything_runs(one_cpu_process, tiny_world, tmp_path, capfd, words, said):
    model, mute, empty = str(tiny_world["model"]), tmp_path / "mute", tmp_path / "empty.jsonl"
    empty.write_text("")
    mute.mkdir()
    for name in ("config.json", "model.safetensors"):
        (mute / name).write_bytes(Path(model, name).read_bytes())
    words = [word.format(model=model, mute=mute, empty=empty) for word in words]
    assert main(["--model_name", model, "--output_dir", str(tmp_path / "out"), *words]) == 2
    assert said in capfd.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("place", "held", "said"),
    [
        ("relearn", {"model": "another", "kind": "relearn"}, "holds the results of another on demo"),
        ("relearn", {"kind": "tamper"}, "results of the kind tamper"),
        (".", {"kind": "eval"}, "results of the kind eval"),
    ],
)
def test_a_folder_of_other_results_is_refused(one_cpu_process, tiny_world, tmp_path, capfd, place, held, said):
    model, path = str(tiny_world["model"]), tmp_path / "out" / place / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"model": model, "domain": "demo", **held}))
    given = ["--model_name", model, "--target_model", model, "--domain", "demo", "--output_dir", str(tmp_path / "out")]
    assert main(given) == 2
    assert said in capfd.readouterr().err.splitlines()[-1] and path.is_file()


@pytest.mark.parametrize("script", ["tamper", "leak", "quantize", "white_box", "downstream"])
def test_an_attack_does_not_replace_results_of_another_kind(one_cpu_process, tiny_world, tmp_path, capfd, script):
    model, path = str(tiny_world["model"]), tmp_path / "results.json"
    path.write_text(json.dumps({"model": model, "domain": "demo", "kind": "relearn"}))
    words = ["--tasks", "sst2"] if script == "downstream" else []
    attack = importlib.import_module(f"llm_unlearn.cli.{script}").main
    assert attack(["--model_name", model, "--domain", "demo", "--output_dir", str(tmp_path), *words]) == 2
    assert "holds results of the kind relearn" in capfd.readouterr().err.splitlines()[-1]


def test_a_stage_without_a_result_is_named_at_the_end(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("llm_unlearn.report.page.make_audit_page", lambda *_: "")
    found = [{"check": "answers", "status": "unknown", "sentence": "nothing."}]
    stages = [
        {"name": "eval", "model": "model", "status": "done"},
        {"name": "mia", "model": "model", "status": "not_applicable", "reason": "no non-members"},
        {"name": "relearn", "model": "gold", "status": "failed", "reason": "OSError: disk"},
    ]
    _finish(tmp_path, {"verdict": {"findings": found, "headline": "Unclear."}, "stages": stages}, None)
    said = capfd.readouterr().out.splitlines()
    assert said == [
        "?     answers: nothing.",
        "-     mia of the audited model does not apply: no non-members",
        "-     relearn of the gold model FAILED: OSError: disk",
        "",
        "Unclear.",
    ]


@pytest.mark.parametrize(("row", "is_told"), [({}, False), ({"perturbed_answer": ["red"]}, True)])
def test_an_evaluation_is_told_of_the_gold_model_where_it_can_be_compared(
    one_cpu_process, tiny_world, tmp_path, monkeypatch, row, is_told
):
    """run_eval.py refuses --retain_reference where no set is compared with it, and the audit would have no answers."""
    rows, seen, model = tmp_path / "rows.jsonl", [], str(tiny_world["model"])
    rows.write_text(json.dumps({"question": "Which color?", "answer": "blue", **row}))
    monkeypatch.setattr(Audit, "run", lambda _, jobs: seen.extend(jobs) or {"stages": []})
    monkeypatch.setattr("llm_unlearn.cli.audit._finish", lambda *_: None)
    words = ["--model_name", model, "--target_model", model, "--gold", model, "--domain", "custom"]
    assert main([*words, "--forget_data", str(rows), "--output_dir", str(tmp_path / "out")]) == 0
    told = {job.stage.name: bool(job.stage.references) for job in seen}
    assert told["eval"] == is_told and told["mia"] and not (tmp_path / "out").exists()
