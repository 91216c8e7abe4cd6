"""The stages of an audit: their order, what each is told, what a second run keeps, and what one does that fails."""

import json
import sys
import types
from pathlib import Path

import pytest

from llm_unlearn.attacks.audit import DONE, FAILED, KEPT, NOT_APPLICABLE, Audit
from llm_unlearn.attacks.audit_plan import GOLD, MODEL, PRESETS, TARGET, Job, Stage, jobs_of, words_of
from llm_unlearn.attacks.parsing import parse_attack
from llm_unlearn.cli.audit import AuditFlags, main
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
    ],
)
def test_mistakes_are_said_before_anything_runs(one_cpu_process, tiny_world, tmp_path, capfd, words, said):
    model = str(tiny_world["model"])
    given = [
        "--model_name",
        model,
        "--output_dir",
        str(tmp_path / "out"),
        *(word.format(model=model) for word in words),
    ]
    assert main(given) == 2
    assert said in capfd.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()
