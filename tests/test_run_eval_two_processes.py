"""However the rows are cut into batches, processes and runs, every example gets the same values, each asked once."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
from eval_cases import (
    FEW,
    differences,
    edit,
    evaluate,
    examples,
    make_adapter,
    on_demo,
    records,
    results,
    values,
    write_small_tofu,
)

from llm_unlearn.cli.evaluate import main

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
# As published (specs of Unlearning_LLM, section 11), but for torchrun's own flags.
PUBLISHED = "--per_device_eval_batch_size 1 --do_eval --overwrite_output_dir --overwrite_cache --tf32 True"
ACL_KEYS = {
    "eval_loss", "eval_ppl", "eval_acc", "perplexity", "eval_samples", "eval_runtime", "eval_samples_per_second",
}  # fmt: skip


@pytest.fixture(scope="module")
def words(shared_data, tmp_path_factory):
    """A real model that knows half of what it is asked, on a few rows of TOFU."""
    data = write_small_tofu(shared_data, tmp_path_factory.mktemp("data"), forget=6, retain=10, others=3)
    model = shared_data / "models/stories260K-tofu-hf"
    return ["--model_name_or_path", str(model), *data, "--max_new_tokens", "12", "--use_cpu"]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """The folder of one run in one process, as it comes."""
    folder = tmp_path_factory.mktemp("whole")
    assert evaluate(*words, "--output_dir", folder) == 0
    return folder


BATCHES = {
    "one_by_one": ["--per_device_eval_batch_size", "1"],
    "thirty_two": ["--per_device_eval_batch_size", "32"],
    "few_tokens": ["--max_tokens_per_batch", "64"],
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_change_no_value_of_any_example(case, words, whole, tmp_path):
    assert evaluate(*words, *BATCHES[case], "--output_dir", tmp_path) == 0
    assert results(tmp_path)["counters"]["model_calls"] != results(whole)["counters"]["model_calls"]
    assert differences(examples(tmp_path), examples(whole)) == []
    assert results(tmp_path)["fingerprints"] == results(whole)["fingerprints"]


def test_a_second_run_forwards_nothing_and_writes_the_same_bytes(words, whole, tmp_path):
    evaluate(*words, "--output_dir", tmp_path / "first")
    before = (tmp_path / "first/per_example.jsonl").read_bytes()
    files = {path: path.read_bytes() for path in (tmp_path / "first/statistics").rglob("*.jsonl")}
    assert evaluate(*words, "--output_dir", tmp_path / "first") == 0
    counters = results(tmp_path / "first")["counters"]
    assert counters["model_calls"] == counters["token_forwards"] == counters["sequences_scored"] == 0
    assert counters["prompts_decoded"] == counters["decode_steps"] == 0
    assert counters["sequences_reused"] == results(whole)["counters"]["sequences_scored"]
    assert (tmp_path / "first/per_example.jsonl").read_bytes() == before
    assert files == {path: path.read_bytes() for path in (tmp_path / "first/statistics").rglob("*.jsonl")}


def test_the_results_by_example_may_lie_elsewhere(words, whole, tmp_path):
    kept = whole / "statistics"
    assert evaluate(*words, "--output_dir", tmp_path / "out", "--statistics_dir", kept) == 0
    assert results(tmp_path / "out")["counters"]["model_calls"] == 0
    assert not (tmp_path / "out/statistics").exists()
    assert values(tmp_path / "out") == values(whole)


def test_overwrite_cache_asks_again_and_leaves_each_key_once(words, whole, tmp_path):
    few = [*words, "--max_eval_samples", "2", "--output_dir", tmp_path]
    assert evaluate(*few) == 0 and evaluate(*few, "--overwrite_cache") == 0
    counters = results(tmp_path)["counters"]
    assert counters["sequences_reused"] == counters["prompts_reused"] == 0 < counters["model_calls"]
    assert len(records(tmp_path)) == len(set(records(tmp_path))) == counters["sequences_scored"]


def test_overwrite_cache_keeps_what_it_scored_when_lm_eval_runs_too(tiny_world, tmp_path, monkeypatch):
    from llm_unlearn.evaluation import harness

    monkeypatch.setattr(harness, "run_tasks", lambda *_, **__: {})
    words = [*on_demo(tiny_world["base"], tmp_path), "--overwrite_cache", "--lm_eval_tasks", "mmlu"]
    assert evaluate(*words) == 0
    assert len(records(tmp_path)) == results(tmp_path)["counters"]["sequences_scored"]


CHANGES = {
    "config.json": {"rms_norm_eps": 0.5},
    "generation_config.json": {"repetition_penalty": 50.0},
    "adapter_config.json": {"lora_alpha": 800},
}


@pytest.mark.parametrize("file", CHANGES)
def test_answers_of_the_same_weights_under_another_configuration_are_not_reused(file, tiny_world, tmp_path):
    shutil.copytree(tiny_world["base"], tmp_path / "model")
    if file == "adapter_config.json":
        make_adapter(tmp_path / "model", tmp_path / "adapter")
    model = tmp_path / ("adapter" if file == "adapter_config.json" else "model")
    assert evaluate(*on_demo(model, tmp_path / "out")) == 0
    before = examples(tmp_path / "out")
    edit(model / file, **CHANGES[file])
    assert evaluate(*on_demo(model, tmp_path / "fresh")) == 0
    assert examples(tmp_path / "fresh") != before, "the change changes nothing, so that this test cannot fail"
    assert evaluate(*on_demo(model, tmp_path / "out")) == 0
    assert differences(examples(tmp_path / "out"), examples(tmp_path / "fresh")) == []


def test_a_killed_evaluation_goes_on_where_it_stopped(words, whole, tmp_path):
    """SIGKILL in the middle of scoring: the next run asks for the rest alone, and no row twice."""
    words = [*words, "--output_dir", str(tmp_path), "--per_device_eval_batch_size", "1"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_eval.py"), *words], env=ENVIRONMENT, cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.time() + 120
    while len(records(tmp_path)) < 20 and process.poll() is None and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the evaluation ended before it could be killed"
    kept = len(records(tmp_path))
    wanted = results(whole)["counters"]["sequences_scored"]
    assert 20 <= kept < wanted
    assert not (tmp_path / "results.json").exists()
    with next(tmp_path.rglob("statistics-0.jsonl")).open("ab") as file:
        file.write(b'{"key": "half a li')

    assert evaluate(*words) == 0
    counters = results(tmp_path)["counters"]
    assert counters["sequences_reused"] == kept
    assert counters["sequences_scored"] == wanted - kept
    for kind, count in (("statistics", wanted), ("generations", counters["prompts_decoded"])):
        assert len(records(tmp_path, kind)) == len(set(records(tmp_path, kind))) == count
    assert differences(examples(tmp_path), examples(whole)) == []


@pytest.fixture(scope="module")
def two(words, whole, tiny_world, shared_data, tmp_path_factory):
    """Everything that two processes are asked; returns (folder, what was said on stderr)."""
    folder = tmp_path_factory.mktemp("two")
    demo = ["--model_name_or_path", tiny_world["model"], "--domain", "demo", *FEW]
    acl = ["--model_name_or_path", tiny_world["base"], *PUBLISHED.split(), "--domain", "github"]
    cases = {
        "tofu": words,
        "reused": [*words, "--statistics_dir", str(whole / "statistics")],
        "acl": [*acl, "--data_dir", str(shared_data / "text_domains"), *FEW],
        "mistake": ["--model_name_or_path", tiny_world["model"], "--domain", "demo", "--forget_split", "forget01"],
        "late_mistake": [*demo, "--max_length", "8"],
        "demo": [*demo, "--reference_model", tiny_world["base"]],
        "one_row": [*words, "--max_eval_samples", "1", "--max_new_tokens", "1"],
    }
    said = []
    for name, argv in cases.items():
        outcome = ranks.run(main, [*argv, "--output_dir", folder / name], processes=2)
        assert outcome.codes == ([2, 2] if "mistake" in name else [0, 0]), f"{name}: {outcome}"
        said += outcome.said
    return folder, "".join(said)


@pytest.mark.distributed
def test_two_processes_find_what_one_finds(two, whole):
    folder = two[0]
    assert differences(examples(folder / "tofu"), examples(whole)) == []
    assert differences(values(folder / "tofu"), values(whole), rtol=1e-4) == []
    found, expected = (results(path)["counters"] for path in (folder / "tofu", whole))
    assert found["sequences_scored"] == expected["sequences_scored"]
    assert found["prompts_decoded"] == expected["prompts_decoded"]
    files = {path.name for path in (folder / "tofu/statistics").rglob("*.jsonl")}
    assert files >= {"statistics-0.jsonl", "statistics-1.jsonl"}
    for kind in ("statistics", "generations"):
        assert len(records(folder / "tofu", kind)) == len(set(records(folder / "tofu", kind)))


@pytest.mark.distributed
def test_two_processes_reuse_what_one_left(two, whole):
    counters = results(two[0] / "reused")["counters"]
    assert counters["model_calls"] == counters["prompts_decoded"] == 0
    assert (two[0] / "reused/per_example.jsonl").read_bytes() == (whole / "per_example.jsonl").read_bytes()


@pytest.mark.distributed
def test_a_process_may_have_nothing_to_do(two, words, tmp_path):
    assert evaluate(*words, "--max_eval_samples", "1", "--max_new_tokens", "1", "--output_dir", tmp_path) == 0
    assert differences(examples(two[0] / "one_row"), examples(tmp_path)) == []


@pytest.mark.distributed
def test_the_published_command_leaves_the_published_files(two):
    folder = two[0] / "acl"
    forget, general, both = (results(folder, f"{name}_results.json") for name in ("forget_eval", "general_eval", "all"))
    assert set(forget) == set(general) == ACL_KEYS
    assert both == {**forget, **general}
    chunks = [nll for row in examples(folder) if row["split"] == "forget" for nll in row["chunk_nlls"]]
    assert forget["eval_samples"] == len(chunks)
    assert forget["eval_ppl"] == pytest.approx(math.exp(sum(chunks) / len(chunks)))
    assert forget["perplexity"] == pytest.approx(math.exp(forget["eval_loss"]))
    assert forget["perplexity"] == pytest.approx(values(folder)["forget/perplexity"])
    assert 0 <= forget["eval_acc"] <= 100
    assert {row["split"] for row in examples(folder)} == {"forget", "approximate", "retain", "general"}
    assert "forget_to_approximate/perplexity" in values(folder)


@pytest.mark.distributed
def test_a_retrained_model_is_scored_first_in_both_processes(two):
    found = values(two[0] / "demo")
    assert 0 <= found["forget_quality"] <= 1 and found["privleak"] is not None


@pytest.mark.distributed
def test_a_mistake_is_said_once_and_leaves_nothing(two):
    folder, said = two
    assert said.count("--forget_split has no effect with demo") == 1
    assert said.count("of which none has a token left to score") == 1
    assert not (folder / "mistake").exists() and not (folder / "late_mistake/results.json").exists()
    assert "Traceback" not in said
