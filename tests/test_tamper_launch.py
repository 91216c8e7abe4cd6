"""recipes/launch/tamper.sbatch: what it would start parses, and a job that is told goes back into the queue."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from llm_unlearn.attacks.parsing import parse_attack
from llm_unlearn.attacks.sweeps import configurations
from llm_unlearn.cli.relearn import RelearnFlags
from llm_unlearn.cli.tamper import TamperFlags, check_flags

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "recipes/launch/tamper.sbatch"
TEXT = SCRIPT.read_text(encoding="utf-8")
HEADERS = [shlex.split(line[1:]) for line in TEXT.splitlines() if re.match(r"#   \S*=", line)]
RECORD = '#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$RECORD/$(basename "$0")"\n'
# Runs until scancel signals it, as the job's steps do.
WAITS = 'trap "exit 1" TERM\necho $$ > "$RECORD/pid"\nfor _ in {1..400}; do sleep 0.05; done\nexit 9\n'
CANCEL = 'kill -TERM "$(cat "$RECORD/pid")"\n'


@pytest.fixture
def environment(tmp_path):
    """Variables under which programs of Slurm only write down what they are given; srun waits for a signal if asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"srun": '[[ -z "${WAITS:-}" ]] && exit 0\n' + WAITS, "scancel": CANCEL, "scontrol": ""}.items():
        (folder / name).write_text(RECORD + text, encoding="utf-8")
        (folder / name).chmod(0o755)
    names = ("SLURM", "MODEL", "TARGET", "SCRIPT", "OUTPUT_DIR", "PROCESSES", "SWEEP", "MAX_STEPS")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(names)}
    return {
        **inherited, "PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(tmp_path), "SLURM_JOB_ID": "123",
    }  # fmt: skip


def test_it_is_sound_bash_without_a_clusters_paths():
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
    assert TEXT.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in TEXT and TEXT.isascii()
    paths = re.findall(r"(?<![\w.}])/\w[\w/]+", TEXT.replace("#!/usr/bin/env bash", "").replace("2>/dev/null", ""))
    assert not paths
    (before,) = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)$", TEXT, flags=re.MULTILINE)
    (grace,) = re.findall(r"SHUTDOWN_TIMEOUT:-(\d+)", TEXT)
    assert 10 <= int(before) - int(grace)


@pytest.mark.parametrize("typed", HEADERS, ids=lambda words: " ".join(words)[:60])
def test_what_it_starts_parses(typed, environment, tmp_path):
    number = typed.index("sbatch")
    given, rest = dict(word.split("=", 1) for word in typed[:number]), typed[number + 2 :]
    assert typed[number + 1] == "recipes/launch/tamper.sbatch"
    given |= {"MODEL": "my model", "OUTPUT_DIR": "out put/$1"}
    subprocess.run(["bash", SCRIPT, *rest], cwd=ROOT, env={**environment, **given}, check=True, timeout=30)
    words = (tmp_path / "srun").read_text(encoding="utf-8").splitlines()
    kind = given.get("SCRIPT", "tamper")
    at = words.index(f"llm_unlearn.cli.{kind}")
    assert words[0] == "torchrun" and get_args_parser().parse_args([*words[1 : at + 1], *words[at + 1 :]]).standalone
    flags = words[at + 1 :]
    parsed = parse_attack(flags, RelearnFlags if kind == "relearn" else TamperFlags, kind)
    chosen = configurations(parsed.flags.sweep, parsed.flags)
    check_flags(parsed, chosen)
    assert len(chosen) == 6 and parsed.flags.resume and parsed.flags.save_steps == 100
    assert parsed.model.model_name_or_path == "my model" and parsed.flags.output_dir == "out put/$1"
    assert parsed.flags.target_model == given.get("TARGET")
    assert flags[len(flags) - len(rest) :] == rest, "what is typed must come last, because it wins"


def test_a_job_that_is_told_goes_back_into_the_queue(environment, tmp_path):
    job = subprocess.Popen(["bash", SCRIPT, "--domain", "demo"], cwd=ROOT, env={**environment, "WAITS": "1"})
    try:
        while not (tmp_path / "pid").is_file():
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=30) == 1
    finally:
        job.kill()
    assert (tmp_path / "scancel").read_text().splitlines() == ["--signal=TERM", "123"]
    assert (tmp_path / "scontrol").read_text().splitlines() == ["requeue", "123"]
