"""The ranks of one run, forked from a process that has imported torch and transformers once, in place of torchrun.

    outcome = run(main, words, processes=2, fsdp=True)
    assert outcome.codes == [0, 0], outcome

A start with torchrun costs 8 seconds of imports and more; here it costs none, so that every run gets fresh processes.
Ranks that are forked share the seed of Python's hashes, which torchrun's do not: one test starts torchrun itself.
"""

import contextlib
import gc
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a run imports. Importing starts no thread of torch's: OMP_NUM_THREADS is 1, and nothing is computed.
PRELOADED = [
    "torch", "torch.distributed.checkpoint", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama",
    "transformers.trainer", "transformers.integrations.deepspeed", "accelerate", "accelerate.utils.fsdp_utils", "peft",
    "peft.tuners.lora", "trl", "trl.scripts", "rich.console", "datasets", "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer", "llm_unlearn.cli.evaluate", "llm_unlearn.cli.unlearn",
    "llm_unlearn.data.training_sets", "llm_unlearn.evaluation.in_training", "llm_unlearn.hub",
    "llm_unlearn.methods.grad_diff", "llm_unlearn.records", "llm_unlearn.trainer",
]  # fmt: skip
# As it is before any test runs: accelerate leaves its switches behind where a test trains in this process.
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore"}


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        codes: exit code of each rank; -9 for one that was killed, by itself or because another one had failed.
        said: the end of what each rank wrote to stderr.
        seconds: from the start to the end of the last rank.
        timed_out: whether the ranks were killed because of the time.
    """

    codes: list
    said: list
    seconds: float
    timed_out: bool = False

    def __str__(self):
        texts = [f"--- rank {rank}, exit code {code} ---\n{text}" for rank, (code, text) in
                 enumerate(zip(self.codes, self.said, strict=True))]  # fmt: skip
        return "\n".join([f"{'timed out' if self.timed_out else 'ended'} after {self.seconds:.1f} s", *texts])


def run(main, words, timeout=120, grace=10, **options):
    """Start the ranks of a run and wait for all of them.

    Args:
        main: function of a list of words that returns an exit code, for example `llm_unlearn.cli.unlearn.main`.
        words: its command line.
        timeout: seconds after which every rank is killed.
        grace: seconds that the others get to end by themselves once a rank has failed, before they are killed.
        **options: of `Ranks`.
    Returns:
        Outcome.
    """
    with Ranks(main, words, **options) as ranks:
        return ranks.wait(timeout, grace)


class Ranks:
    """Started processes of one run; a context that leaves none of them behind.

    Args:
        main: see `run`.
        words: see `run`.
        processes: how many.
        launched: set the variables that torchrun sets; without them only one process can run.
        fsdp: shard for real where the command line asks for FSDP.
        prepare: function that each rank calls with its number before `main`; it must pickle.
        environment: {variable: value} on top of pytest's own.
    """

    def __init__(self, main, words, processes=1, launched=True, fsdp=False, prepare=None, environment=None):
        assert launched or processes == 1
        self.folder = tempfile.TemporaryDirectory(prefix="ranks")
        self.started = time.monotonic()
        self.processes = []
        port = free_port()
        for rank in range(processes):
            variables = {**ENVIRONMENT, **(environment or {})}
            if launched:
                variables |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            job = (main, [str(word) for word in words], rank, variables, self._path(rank), fsdp, prepare)
            self.processes.append(_context().Process(target=_rank, args=job))
        for process in self.processes:
            process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.folder.cleanup()

    def wait(self, timeout=120, grace=10):
        """Wait until every rank has ended; see `run`."""
        running = {process.sentinel: process for process in self.processes}
        end, has_failed = self.started + timeout, False
        while running:
            ready = connection.wait(list(running), max(end - time.monotonic(), 0))
            for sentinel in ready:
                process = running.pop(sentinel)
                process.join()
                if process.exitcode != 0 and not has_failed:
                    has_failed, end = True, min(end, time.monotonic() + grace)
            if not ready:
                self.kill()
                break
        seconds = time.monotonic() - self.started
        codes = [process.exitcode for process in self.processes]
        said = [self._tail(rank) for rank in range(len(self.processes))]
        return Outcome(codes, said, seconds, timed_out=bool(running) and not has_failed)

    def kill(self):
        """End every rank that still runs, with SIGKILL."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()

    def _path(self, rank):
        return os.path.join(self.folder.name, f"stderr-{rank}")

    def _tail(self, rank, characters=6000):
        with contextlib.suppress(OSError):
            return Path(self._path(rank)).read_text(encoding="utf-8", errors="replace")[-characters:]
        return ""


def _context():
    """Return the forkserver, one for each pytest process, which lives as long as that."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def free_port():
    """Return a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _rank(main, words, rank, variables, path, fsdp, prepare):
    """Be one rank: torchrun's environment, stdout and stderr in a file, then the command line."""
    os.environ.clear()
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.chdir(ROOT)
    output = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # What was imported before the fork is never garbage; accelerate collects at every start, 0.3 seconds each.
    gc.freeze()
    if fsdp:
        from fsdp_on_cpu import make_fsdp_real

        make_fsdp_real()
    if prepare is not None:
        prepare(rank)
    sys.exit(main(words))
