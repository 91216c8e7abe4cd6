"""recipes/launch/run_unlearn.sh: what the published launcher's options become, what is refused, and one run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import terms

from llm_unlearn.cli.published_launcher import ALGORITHMS, main
from llm_unlearn.cli.unlearn import main as unlearn
from llm_unlearn.errors import run_cli
from llm_unlearn.parsing import parse

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "recipes/launch/run_unlearn.sh"
VARIABLES = ("MODEL", "NPROC", "OUTPUT_ROOT", "PYTHON")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shown(capsys, monkeypatch):
    """Function of options and variables that returns the commands of a dry run as lists of words."""

    def show(*options, **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert main([*options, "--dry-run"]) == 0
        return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]

    return show


def flags_of(words):
    """Return the Parsed command line of a command, which must start run_unlearn.py."""
    return parse(words[words.index("run_unlearn.py") + 1 :])


def bash(*options, **variables):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables}
    words = ["bash", SCRIPT, *options]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


# ---- What the options become ----


def test_the_script_prints_a_command_that_parses():
    result = bash("-a", "cb", "--rm", "23", "--ret", "2", "--orth", "5", "--extra", "--run_name 'a name'", "--dry-run")
    assert (result.returncode, result.stderr) == (0, "")
    words = shlex.split(result.stdout)
    assert words[:2] == ["python", "run_unlearn.py"]
    parsed = flags_of(words)
    assert parsed.method == "circuit_breakers" and parsed.args.run_name == "a name"
    assert (parsed.args.forget_weight, parsed.args.retain_weight, parsed.args.orth_coef) == (23.0, 2.0, 5.0)
    assert parsed.args.regularizer == ["orthogonality"] and parsed.args.retain_schedule == "0.1:1"


def test_a_mistake_ends_the_script_in_one_sentence():
    result = bash("-a", "cb", "--rm", "23", "--ret", "2", "--time", "6:00:00")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("--time is not offered") and result.stderr.count("\n") == 1


def test_the_commands_at_the_top_of_the_script_parse(shown):
    lines = re.findall(r"^#   (.*)$", SCRIPT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line)
        place = words.index("recipes/launch/run_unlearn.sh")
        options = [word for word in words[place + 1 :] if word != "--dry-run"]
        for command in shown(*options, **dict(word.split("=", 1) for word in words[:place])):
            assert flags_of(command).model.target_model_name_or_path == "my_model"


# Method, learning rate, rows, steps at a batch of 32, LoRA's alpha at rank 8, retain loss with adapters and without.
PUBLISHED = {
    "cb": ("circuit_breakers", 1e-3, 1, 32, 8, "l2", "l2"),
    "ct": ("checkpoint_transfer", 1e-3, 2, 64, 16, "kl", "nll"),
    "lens": ("tuned_lens", 1e-3, 1, 32, 16, "l2", "kl"),
    "seq": ("sequential", 2e-4, 1, 1024, 8, "l2", "kl"),
    "mu": ("max_update", 2e-4, 1, 32, 16, None, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_defaults_of_every_algorithm(name, shown):
    method, rate, rows, steps, alpha, with_lora, whole = PUBLISHED[name]
    for sft in (False, True):
        (words,) = shown("-a", name, "--rm", "3", "--ret", "7", *(["--sft"] if sft else ["-r", "8"]))
        parsed = flags_of(words)
        args, model = parsed.args, parsed.model
        assert parsed.method == method and parsed.data.domain == "wmdp_bio" and not parsed.notes
        assert parsed.data.retain_data.startswith("hub:EleutherAI/wikitext_document_level")
        assert parsed.data.max_train_samples == (2048 if name == "ct" else 1024) and args.max_length == 2048
        assert args.learning_rate == rate and args.max_steps == steps and args.weight_decay == 0.01
        assert args.per_device_train_batch_size == rows and args.gradient_accumulation_steps == 32 // rows
        assert args.retain_weight == 7 and getattr(args, "update_weight" if name == "mu" else "forget_weight") == 3
        assert getattr(args, "retain_loss", None) == (whole if sft else with_lora)
        assert model.use_peft != sft and args.bf16 and args.optim == "adamw_torch"
        assert sft or (model.lora_r, model.lora_alpha, model.lora_dropout) == (8, alpha, 0.05)
        assert model.lora_target_modules == ("all-linear" if not sft and name in ("cb", "ct") else None)
        expected = f"{name}_{'sft' if sft else 'lora'}_ret7_{'up' if name == 'mu' else 'rm'}3{'' if sft else '_r8'}_lr"
        assert expected in args.output_dir and args.output_dir.startswith("output/deep-ignorance-unfiltered_")
    assert name != "seq" or (args.start_layer, args.end_layer, args.layer_step, args.retain_schedule) == (
        31,
        0,
        1,
        "0.25:1",
    )
    assert name != "ct" or args.teacher_revision == "global_step38144"
    assert name != "lens" or (args.lens_path.endswith("-lens") and args.allow_pickle_lens)


def test_long_names_are_the_short_ones(shown):
    for long, short in (("circuit_breakers", "cb"), ("checkpoint", "ct"), ("sequential", "seq"), ("maxupdate", "mu")):
        assert ALGORITHMS[long] is ALGORITHMS[short]
    long = shown("--algorithm", "cb", "--rm", "1", "--ret", "1", "--rank", "4", "--examples", "64", "--lora")
    assert long == shown("-a", "cb", "--rm", "1", "--ret", "1", "-r", "4", "-n", "64")


def test_processes_share_the_batch_of_32(shown):
    (words,) = shown("-a", "lens", "--rm", "5", "--ret", "5", "--pdbs", "2", "--sft", "-n", "100", NPROC="4")
    assert words[:4] == ["torchrun", "--standalone", "--nproc_per_node=4", "run_unlearn.py"]
    args = flags_of(words).args
    # 2 x 4 x 4 rows a step, of 100: 4 steps.
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_steps) == (2, 4, 4)
    assert words[words.index("--fsdp") + 1] == "full_shard auto_wrap"
    assert "--fsdp" not in shown("-a", "lens", "--rm", "5", "--ret", "5", NPROC="4")[0]


@pytest.mark.parametrize(("processes", "rows"), [("1", 2), ("4", 1)])
def test_orthogonality_gets_a_pair(processes, rows, shown):
    """One row on one process has no partner; with four processes the pairs are gathered across them."""
    (words,) = shown("-a", "cb", "--rm", "23", "--ret", "2", "--orth", "5", NPROC=processes)
    assert flags_of(words).args.per_device_train_batch_size == rows and "_orth5_" in words[-1]
    (plain,) = shown("-a", "cb", "--rm", "23", "--ret", "2", "--orth", "0", NPROC=processes)
    assert flags_of(plain).args.regularizer == [] and flags_of(plain).args.per_device_train_batch_size == 1


def test_a_list_of_learning_rates_is_one_run_each(shown):
    commands = shown(
        "-a", "lens", "--rm", "5", "--ret", "5", "--lr", "1e-3,2e-4", "--tag-suffix", "x", OUTPUT_ROOT="o p"
    )
    assert [flags_of(words).args.learning_rate for words in commands] == [1e-3, 2e-4]
    folders = [flags_of(words).args.output_dir for words in commands]
    assert folders == [f"o p/deep-ignorance-unfiltered_lens_lora_ret5_rm5_r16_lr{lr}_x" for lr in ("1e-3", "2e-4")]


def test_the_other_options(shown):
    (words,) = shown("-a", "lens", "--rm", "5", "--ret", "5", "--dtype", "fp16", "--use_ultrachat", "--wandb")
    parsed = flags_of(words)
    assert parsed.args.fp16 and not parsed.args.bf16 and parsed.args.report_to == ["wandb"]
    assert parsed.data.retain_data.endswith("#page=0.8,hub:HuggingFaceH4/ultrachat_200k:train_sft=0.2")
    assert parsed.args.output_dir.endswith("_fp16_ultrachat")


def test_muon_takes_the_place_of_adamw(shown):
    (words,) = shown("-a", "seq", "--rm", "5", "--ret", "2", "--sft", "--muon")
    args = flags_of(words).args
    assert args.unlearn_optimizer == "muon" and "--optim" not in words and args.weight_decay == 0.01
    assert args.output_dir.endswith("_lr2e-4_muon")
    (words,) = shown("-a", "seq", "--rm", "5", "--ret", "2", "--sft", "--extra", "--unlearn_optimizer sophia")
    assert flags_of(words).args.unlearn_optimizer == "sophia" and "--optim" not in words


def test_without_a_retain_weight_nothing_of_the_retain_term_is_said(shown):
    for name in ("cb", "ct", "lens", "seq"):
        for sft in ([], ["--sft"]):
            (words,) = shown("-a", name, "--rm", "5", "--ret", "0", *sft)
            parsed = flags_of(words)
            assert parsed.trainer.streams_for(parsed.args) == ("forget",) and parsed.data.retain_data is None


def test_extra_flags_win_and_bring_their_companions(shown):
    extra = "--domain custom --forget_data f.jsonl --lens_path logit --retain_schedule constant --max_steps=3"
    (words,) = shown("-a", "lens", "--rm", "5", "--ret", "5", "--extra", extra)
    parsed = flags_of(words)
    assert words[-len(shlex.split(extra)) :] == shlex.split(extra)
    assert parsed.data.domain == "custom" and parsed.data.retain_data is None and parsed.args.max_steps == 3
    assert words.count("--domain") == 1 and "--allow_pickle_lens" not in words and parsed.args.lens_path == "logit"
    (words,) = shown("-a", "ct", "--rm", "5", "--ret", "5", "--extra", "--teacher_model_name_or_path t")
    assert flags_of(words).args.teacher_revision is None
    (words,) = shown("-a", "seq", "--rm", "5", "--ret", "5", "--extra", "--start_layer 11 --layer_step 4")
    assert flags_of(words).args.max_steps == 3 * 32


# ---- What is refused ----

CB = ["-a", "cb", "--rm", "1", "--ret", "1"]
BAD = {
    "module_parallel": (["-a", "module_parallel", "--rm", "1", "--ret", "1"], "applies no gradient to any weight"),
    "mp": (["-a", "mp", "--rm", "1", "--ret", "1"], "-a mp is not offered"),
    "algorithm": (["-a", "lense", "--rm", "1", "--ret", "1"], "unknown -a 'lense'; did you mean 'lens'?"),
    "no rm": (["-a", "cb", "--ret", "1"], "--rm; run_unlearn.sh --help lists the options"),
    "unknown": ([*CB, "--alpha", "1"], "unrecognized arguments: --alpha 1"),
    "nodes": ([*CB, "--nodes", "2"], "--nodes is not offered"),
    "time": ([*CB, "--time", "6:00:00"], "--time is not offered"),
    "rank": ([*CB, "--sft", "-r", "16"], "--rank has no effect with --sft"),
    "orth": (["-a", "lens", "--rm", "1", "--ret", "1", "--orth", "5"], "--orth is an option of -a cb"),
    "no pair": ([*CB, "--orth", "5", "--pdbs", "1"], "--orth has no effect with --pdbs 1 on one process"),
    "number": (["-a", "cb", "--rm", "x", "--ret", "1"], "--rm must be a number >= 0, but is 'x'"),
    "negative": (["-a", "cb", "--rm", "1", "--ret=-1"], "--ret must be a number >= 0, but is '-1'"),
    "rate": ([*CB, "--lr", "1e-3,"], "--lr must be a number >= 0, but is ''"),
    "examples": ([*CB, "-n", "0"], "--examples must be at least 1"),
    "dtype": ([*CB, "--dtype", "fp32"], "invalid choice: 'fp32'"),
    "one folder": ([*CB, "--lr", "1,2", "--extra", "--output_dir x"], "--output_dir in --extra would be the same"),
    "chat": (
        [*CB, "--use_ultrachat", "--extra", "--data_dir d"],
        "--use_ultrachat has no effect: --data_dir in --extra",
    ),
    "no retain": (["-a", "cb", "--rm", "1", "--ret", "0", "--use_ultrachat"], "--ret 0 reads no retain set"),
    "layers": (["-a", "seq", "--rm", "1", "--ret", "1", "--extra", "--layer_step x"], "must be numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_cannot_be_honored_are_refused_by_name(case, capsys):
    words, message = BAD[case]
    ran = []
    assert run_cli(lambda: main(words, ran.append)) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == "" and not ran


def test_processes_must_be_a_number(capsys, monkeypatch):
    monkeypatch.setenv("NPROC", "gpu")
    assert run_cli(lambda: main([*CB, "--dry-run"])) == 2
    assert "NPROC must be a number of processes, but is 'gpu'" in capsys.readouterr().err


# ---- Runs ----


def test_the_first_failure_ends_a_sweep(capsys):
    ran = []
    assert main([*CB, "--lr", "1e-3,1e-4,1e-5"], lambda words: ran.append(words) or len(ran) // 2 * 7) == 7
    assert len(ran) == 2 and [shlex.split(line) for line in capsys.readouterr().out.splitlines()] == ran


def test_a_process_is_started_for_each_kind_of_command(monkeypatch):
    from llm_unlearn.cli import launching

    started = []
    result = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(launching.subprocess, "run", lambda words, check: started.append(words) or result)
    assert main(CB) == 3
    monkeypatch.setenv("NPROC", "2")
    assert main(CB) == 3
    assert started[0][:2] == [sys.executable, "run_unlearn.py"]
    assert started[1][:5] == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_orthogonal_circuit_breakers_run(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL", tiny_world["model"])
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    extra = f"--domain custom --forget_data {tiny_world['forget']} --retain_data {tiny_world['retain']} --use_cpu True"
    extra += " --max_length 512 --disable_tqdm True --bf16 False"
    words = ["-a", "cb", "--rm", "5", "--ret", "2", "--orth", "1", "-n", "10", "--extra", extra]
    assert main(words, lambda command: unlearn(command[2:])) == 0
    logged = terms(tmp_path / "model_cb_lora_ret2_rm5_orth1_r16_lr1e-3")
    assert len(logged) == 1 and {"loss/forget", "loss/retain"} <= set(logged[0])
