"""The launch files: what each script would start parses, the Slurm job survives a signal, and one script runs."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from test_docs import commands
from tiny_world import command, terms
from torch.distributed.run import get_args_parser

from llm_unlearn.checkpoints import checkpoints_of, incompleteness
from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.splits import domain_names
from llm_unlearn.memory.request import split_request
from llm_unlearn.methods import METHODS
from llm_unlearn.parsing import parse

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "recipes/launch"
# Two start something else than run_unlearn.py alone: test_published_launcher.py, test_tamper_launch.py.
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
SCRIPTS = [name for name in SCRIPTS if name not in ("run_unlearn.sh", "tamper.sbatch")]
PAGES = [(ROOT / page).read_text(encoding="utf-8") for page in ("docs/distributed.md", "ds_configs/README.md")]
# What a script would start, written down instead: a file named like the program, a word on each line.
RECORD = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$RECORD/$(basename "$0")"
"""
PROGRAMS = ("torchrun", "accelerate", "deepspeed", "srun", "scancel", "scontrol", "sbatch")
HOSTS = RECORD + '[[ "$1" == show ]] && printf "node0\\nnode1\\n"\nexit 0\n'
# Runs until scancel signals it, as the job's steps do.
SRUN = (
    RECORD + 'trap "exit $AFTER_SIGNAL" TERM\necho $$ > "$RECORD/pid"\nfor _ in {1..400}; do sleep 0.05; done\nexit 9\n'
)
SCANCEL = RECORD + 'kill -TERM "$(cat "$RECORD/pid")"\n'
SLURM = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_JOB_NUM_NODES": "2"}


def headers():
    """Return the commands that the comments at the top of the scripts show."""
    lines = [line for name in SCRIPTS for line in (LAUNCH / name).read_text(encoding="utf-8").splitlines()]
    return [shlex.split(line[1:]) for line in lines if re.match(r"#   \S*=", line)]


def names(words):
    return " ".join(words)[:70]


DOCUMENTED = headers() + [words for page in PAGES for words in commands(page)]
TYPED = [words for words in DOCUMENTED if "run_unlearn.py" in words]
SCRIPTED = [words for words in DOCUMENTED if "run_unlearn.py" not in words]


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Function that writes programs which record what they are given; returns the environment that finds them."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(**programs):
        for name, text in {**dict.fromkeys(PROGRAMS, RECORD), "scontrol": HOSTS, **programs}.items():
            (folder / name).write_text(text, encoding="utf-8")
            (folder / name).chmod(0o755)
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        return {**inherited, "PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(tmp_path)}

    return write


def started(folder, program):
    """Return the words that a stand-in was given."""
    return (folder / program).read_text(encoding="utf-8").splitlines()


def check_flags(words, monkeypatch):
    """Parse what stands behind run_unlearn.py; a DeepSpeed file must be there, because parsing it starts processes."""
    monkeypatch.chdir(ROOT)
    flags = list(words)
    if "--deepspeed" in flags:
        at = flags.index("--deepspeed")
        assert json.loads((ROOT / flags[at + 1]).read_text(encoding="utf-8"))["zero_optimization"]
        assert "--fsdp" not in flags
        del flags[at : at + 2]
    split_request(flags)
    parsed = parse(flags)
    assert parsed.method in METHODS and parsed.data.domain in domain_names()
    assert parsed.model.target_model_name_or_path and parsed.args.output_dir and not parsed.notes
    return parsed


def check_launcher(program, words):
    """Parse what stands before run_unlearn.py with the launcher's own parser."""
    if program == "torchrun":
        return get_args_parser().parse_args(words)
    if program == "accelerate":
        assert words[0] == "launch" and (ROOT / words[words.index("--config_file") + 1]).is_file()
        return launch_command_parser().parse_args(words[1:])
    return {"python": [], "deepspeed": ["--no_local_rank", "--num_gpus"]}[program] == words[:2] or pytest.fail(program)


def split(words):
    at = words.index("run_unlearn.py")
    return words[: at + 1], words[at + 1 :]


# ---- The files ----


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound_bash(name):
    text = (LAUNCH / name).read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", LAUNCH / name], check=False).returncode == 0
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text and text.isascii()
    assert os.access(LAUNCH / name, os.X_OK) or name.endswith(".sbatch")


def test_the_yaml_is_a_launcher_and_nothing_more():
    """Its own FSDP and DeepSpeed reach the Trainer behind the back of our arguments."""
    config = load_config_from_file(str(LAUNCH / "accelerate.yaml"))
    assert config.distributed_type == "MULTI_GPU" and config.mixed_precision == "no"
    assert not config.fsdp_config and not config.deepspeed_config and not config.dynamo_config


def test_torchrun_kills_before_slurm_does():
    text = (LAUNCH / "slurm.sbatch").read_text(encoding="utf-8")
    (before,) = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", text, flags=re.MULTILINE)
    (grace,) = re.findall(r"SHUTDOWN_TIMEOUT:-(\d+)", text)
    assert 10 <= int(before) - int(grace)


# ---- The commands ----


@pytest.mark.parametrize("words", TYPED, ids=names)
def test_typed_commands_parse(words, monkeypatch):
    launcher, flags = split(words)
    if launcher != ["python", "run_unlearn.py"]:
        check_launcher(launcher[0], launcher[1:])
    check_flags(flags, monkeypatch)


@pytest.mark.parametrize("words", SCRIPTED, ids=names)
def test_scripts_start_what_parses(words, stand_ins, tmp_path, monkeypatch):
    environment = stand_ins()
    number = next(place for place, word in enumerate(words) if "=" not in word)
    given, typed = dict(word.split("=", 1) for word in words[:number]), words[number:]
    if typed[0] == "sbatch":
        typed = [word for word in typed[1:] if not word.startswith("--nodes")]
        environment |= SLURM
    script, rest = typed[0], typed[1:]
    assert script.startswith("recipes/launch/")
    subprocess.run(["bash", script, *rest], cwd=ROOT, env={**environment, **given}, check=True, timeout=30)
    program = "srun" if "slurm" in script else script.rpartition("/")[2].partition(".")[0].partition("_")[0]
    launcher, flags = split(started(tmp_path, program))
    if program == "srun":
        program, launcher = launcher[0], launcher[1:]
    check_launcher(program, launcher)
    parsed = check_flags(flags, monkeypatch)
    assert parsed.model.target_model_name_or_path == given["MODEL"]
    assert flags[len(flags) - len(rest) :] == rest, "what is typed must come last, because it wins"


@pytest.mark.parametrize("given", [{}, {"MODEL": "my model", "OUTPUT_DIR": "out put/$1"}], ids=["none", "spaces"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_variables_have_defaults_and_stay_one_word(name, given, stand_ins, tmp_path, monkeypatch):
    environment = {**stand_ins(), **(SLURM if name == "slurm.sbatch" else {}), "HEAD": "node0"}
    for variable in ("MODEL", "RECIPE", "OUTPUT_DIR", "PROCESSES"):
        environment.pop(variable, None)
    command = ["bash", LAUNCH / name, "--run_name", "a name"]
    subprocess.run(command, cwd=ROOT, env={**environment, **given}, check=True, timeout=30)
    program = "srun" if name == "slurm.sbatch" else re.split(r"[._]", name)[0]
    parsed = check_flags(split(started(tmp_path, program))[1], monkeypatch)
    assert parsed.args.run_name == "a name"
    assert parsed.model.target_model_name_or_path == given.get("MODEL", parsed.model.target_model_name_or_path)
    assert parsed.args.output_dir == given.get("OUTPUT_DIR", "output/tofu-npo")


def test_every_script_is_documented():
    shown = {word for words in SCRIPTED for word in words}
    assert {f"recipes/launch/{name}" for name in SCRIPTS} <= shown


# ---- Slurm ----


def run_job(environment, folder, told):
    """Run the job's shell, tell it as Slurm does, and return its exit status."""
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch"], cwd=ROOT, env={**environment, **SLURM})
    try:
        while told and not (folder / "pid").is_file():
            assert job.poll() is None
            time.sleep(0.02)
        if told:
            job.send_signal(signal.SIGTERM)
        return job.wait(timeout=30)
    finally:
        job.kill()


@pytest.mark.parametrize("after_signal, requeued", [(1, True), (0, False)], ids=["saved", "finished"])
def test_a_job_that_is_told_waits_and_goes_back_into_the_queue(after_signal, requeued, stand_ins, tmp_path):
    environment = stand_ins(srun=SRUN, scancel=SCANCEL)
    assert run_job({**environment, "AFTER_SIGNAL": str(after_signal)}, tmp_path, told=True) == after_signal
    assert started(tmp_path, "scancel") == ["--signal=TERM", "123"]
    assert (started(tmp_path, "scontrol") == ["requeue", "123"]) == requeued


@pytest.mark.parametrize("status", [0, 1])
def test_a_job_that_is_not_told_stays_out_of_the_queue(status, stand_ins, tmp_path):
    environment = stand_ins(srun=f"{RECORD}exit {status}\n")
    assert run_job(environment, tmp_path, told=False) == status
    assert started(tmp_path, "scontrol")[0] == "show"
    words = started(tmp_path, "srun")
    assert {"--nnodes=2", "--rdzv_endpoint=node0:20123", "--rdzv_id=123.0"} <= set(words)


# ---- One script for real ----


@pytest.mark.full
@pytest.mark.distributed
def test_one_node_is_stopped_by_sigterm_and_continues(tiny_world, tmp_path):
    """torchrun hands the signal on and waits; its own status is 1, as docs/distributed.md says."""
    words = command(tiny_world, "npo", tmp_path / "out", "--per_device_train_batch_size", "2")
    at = words.index("--model_name_or_path")
    flags = [*words[:at], *words[at + 2 :]]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("unlearn_method: npo\n", encoding="utf-8")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PROCESSES": "2"}
    environment |= {"MODEL": tiny_world["model"], "RECIPE": str(recipe), "OUTPUT_DIR": str(tmp_path / "out")}
    log = tmp_path / "log"
    with log.open("wb") as output:
        script = [LAUNCH / "torchrun_one_node.sh", *flags, "--max_steps", "20000"]
        run = subprocess.Popen(script, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + 150
            while "'loss'" not in log.read_text(encoding="utf-8", errors="replace"):
                assert run.poll() is None and time.monotonic() < end, log.read_text(errors="replace")[-4000:]
                time.sleep(0.1)
            run.send_signal(signal.SIGTERM)
            assert run.wait(timeout=60) == 1
        finally:
            run.kill()
    assert "stopped by SIGTERM after step" in log.read_text(encoding="utf-8", errors="replace")
    (checkpoint,) = checkpoints_of(tmp_path / "out")
    assert incompleteness(checkpoint) is None
    steps = int(checkpoint.name.partition("-")[2]) + 2
    resume = [*words, "--max_steps", steps, "--resume_from_checkpoint", "auto"]
    outcome = ranks.run(main, resume, processes=2)
    assert outcome.codes == [0, 0], outcome
    assert len(terms(tmp_path / "out")) == steps
    assert json.loads((tmp_path / "out/unlearning.json").read_text())["backend"]["processes"] == 2
