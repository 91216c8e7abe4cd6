"""A run that SIGKILL ends again and again, mostly in the middle of a save, and that `--resume_from_checkpoint auto`
brings to its end, leaves what the unbroken run leaves, bit for bit."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from backends import start, train
from kill_points import Watch, events
from tiny_world import command, weights

pytestmark = pytest.mark.distributed

ADAMW = ["--optim", "adamw_torch", "--learning_rate", "1e-3", "--lr_scheduler_type", "linear"]
SAVING = ["--save_strategy", "steps", "--save_steps", "1", "--num_train_epochs", "2", *ADAMW]
BEST = ["--do_eval", "True", "--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "True"]
RUNS = {
    "npo": ("npo", []),
    "lora": ("npo", ["--use_peft", "True", "--lora_dropout", "0.1"]),
    "labels": ("random_label", ["--save_total_limit", "1"]),
    "kl": ("ascent_plus_kl_divergence", ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]),
    "best": ("grad_diff", [*BEST, "--metric_for_best_model", "eval_loss", "--save_total_limit", "2"]),
}


class Unbroken:
    """A run that nothing interrupts, and how many events of each phase each of its ranks went through."""

    def __init__(self, world, name, folder, backend="ddp", processes=1, more=()):
        self.world, self.name, self.backend, self.processes, self.more = world, name, backend, processes, more
        self.folder, record = folder / "whole", folder / "whole.events"
        train(self.words(self.folder), backend, processes, prepare=Watch(str(self.folder), str(record)))
        self.counts = [counted(events(record, rank)) for rank in range(processes)]

    def words(self, folder, *flags):
        method, own = RUNS[self.name]
        return command(self.world, method, folder, *SAVING, *own, *self.more, *flags)


def counted(found):
    """Return {phase: number of events}; what the end only cleans up belongs to no save."""
    written = [line["number"] for line in found["final"] if not line["what"].startswith(("os.remove", "os.rmdir"))]
    return {**{phase: len(lines) for phase, lines in found.items()}, "final": max(written, default=0)}


def drawn(unbroken, seed, plan):
    """Draw a kill for each phase of a plan: [(rank, phase, number, torn), ...].

    Each kill finds its event, because those in training together use up no more than the whole run: a plan has at most
    two kills in checkpoints and one before a micro-batch, or three in checkpoints.
    """
    generator, kills = random.Random(seed), []
    for place, (rank, phase) in enumerate(plan):
        count = unbroken.counts[rank][phase] // {"checkpoint": 4, "micro_batch": 2, "final": 1}[phase]
        assert count > 0, f"rank {rank} has no {phase} to be killed in"
        kills.append((rank, phase, generator.randint(1, count), place % 2 == 1))
    return kills


def break_and_resume(unbroken, folder, kills):
    """Kill a run at each point and resume it, then let it end; returns how many kills landed inside a save."""
    output, trained, landed = folder / "killed", 0, 0
    for number, (rank, phase, event, torn) in enumerate([*kills, (0, None, 0, False)]):
        record = folder / f"attempt-{number}.events"
        watch = Watch(str(output), str(record), rank, phase, event, torn)
        words = unbroken.words(output, "--resume_from_checkpoint", "auto")
        outcome = start(words, unbroken.backend, unbroken.processes, prepare=watch, grace=3)
        found = events(record, rank)
        trained += len(found["micro_batch"])
        if phase is None:
            assert outcome.codes == [0] * unbroken.processes, outcome
            break
        assert outcome.codes[rank] == -signal.SIGKILL and 0 not in outcome.codes, (found[phase][-3:], str(outcome))
        assert found[phase][-1]["number"] == event, "it died of something else"
        landed += phase != "micro_batch"
    # A run that always began anew would end in the same weights.
    counts = unbroken.counts[0]["micro_batch"]
    assert trained <= counts + len(kills) * counts // steps(unbroken.folder), "a kill cost more than one step"
    return landed


def steps(folder):
    return json.loads((folder / "trainer_state.json").read_text())["global_step"]


def assert_same(folder, whole):
    """Weights and log history agree bit for bit, but for what the summary says about time."""
    first, second = weights(folder), weights(whole)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

    def history(path):
        logs = json.loads((Path(path) / "trainer_state.json").read_text())["log_history"]
        return [log for log in logs if "train_runtime" not in log]

    assert history(folder) == history(whole) and len(history(folder)) >= 6


def test_three_kills_cost_nothing(tiny_world, tmp_path):
    unbroken = Unbroken(tiny_world, "npo", tmp_path)
    kills = drawn(unbroken, 3, [(0, "checkpoint"), (0, "checkpoint"), (0, "final")])
    assert break_and_resume(unbroken, tmp_path, kills) == 3
    assert_same(tmp_path / "killed", unbroken.folder)


PLAN = [(0, "checkpoint"), (0, "checkpoint"), (0, "micro_batch"), (0, "final")]


@pytest.mark.full
@pytest.mark.parametrize("name", RUNS)
def test_twenty_kills_cost_nothing(name, tiny_world, tmp_path):
    """Five runs with four kills each, three of them inside a save."""
    unbroken = Unbroken(tiny_world, name, tmp_path)
    kills = drawn(unbroken, f"kills of {name}", PLAN)
    assert break_and_resume(unbroken, tmp_path, kills) == 3
    assert_same(tmp_path / "killed", unbroken.folder)


@pytest.mark.full
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero3"])
def test_the_kill_of_one_of_two_ranks_costs_nothing(backend, tiny_world, tmp_path):
    """Either rank, inside a save and between two."""
    two_rows = ["--per_device_train_batch_size", "2"]
    unbroken = Unbroken(tiny_world, "npo", tmp_path, backend, processes=2, more=two_rows)
    kills = drawn(unbroken, backend, [(0, "checkpoint"), (1, "checkpoint"), (1, "micro_batch"), (0, "final")])
    assert break_and_resume(unbroken, tmp_path, kills) == 3
    assert_same(tmp_path / "killed", unbroken.folder)
