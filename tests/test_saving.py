"""A checkpoint is there whole or not at all, whenever the save is killed, broken off or refused by the disk."""

import errno
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from test_resume import FLAGS, SAVING, bit_equal
from tiny_world import command, weights
from transformers.trainer_utils import get_last_checkpoint

from llm_unlearn import manifests
from llm_unlearn.checkpoints import CheckpointedTrainer, _saving, checkpoints_of, incompleteness, write_manifest
from llm_unlearn.cli.unlearn import main
from llm_unlearn.errors import SavingError
from llm_unlearn.manifests import MANIFEST, STAGING, publish, recover, remove

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate", "os.link"}


def staged(output_dir, step, contents=b"new", finished=True):
    """Make a checkpoint folder where a save writes it."""
    folder = output_dir / STAGING / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(contents)
    (folder / "shards/rank_0.pt").write_bytes(contents)
    if finished:
        write_manifest(folder)
    return folder


def published(output_dir, step, contents=b"old"):
    folder = output_dir / f"checkpoint-{step}"
    publish(staged(output_dir, step, contents), folder)
    return folder


def contents_of(folder):
    return (folder / "model.safetensors").read_bytes()


# ---- One rename ----


def test_a_checkpoint_being_written_is_seen_by_nobody(tmp_path):
    staged(tmp_path, 3)
    assert checkpoints_of(tmp_path) == [] and get_last_checkpoint(str(tmp_path)) is None


def test_a_published_checkpoint_leaves_no_staging_folder(tmp_path):
    folder = published(tmp_path, 3)
    assert incompleteness(folder) is None and contents_of(folder) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_checkpoint_replaces_one_of_the_same_name(tmp_path):
    folder = published(tmp_path, 3)
    publish(staged(tmp_path, 3), folder)
    assert contents_of(folder) == b"new" and [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_everything_has_reached_the_disk_before_the_name(tmp_path, monkeypatch):
    happened = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (happened.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (happened.append("renamed"), replace(*paths)))
    folder = staged(tmp_path, 3, finished=False)
    files = {str(path) for path in folder.rglob("*")}
    write_manifest(folder)
    manifest = str(folder / MANIFEST)
    assert set(happened) == {*files, f"{manifest}.partial", "renamed", str(folder)}
    assert happened[-2:] == ["renamed", str(folder)]
    happened.clear()
    publish(folder, tmp_path / "checkpoint-3")
    assert happened == ["renamed", str(tmp_path)]


def die_in_a_fork(function, operation):
    """Call a function in a forked process that kill -9 ends before its n-th change to the file system."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = [0]

    def count_changes(event, args):
        writes = event == "open" and isinstance(args[0], (str, Path)) and (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            count[0] += 1
            if count[0] == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(count_changes)
        function()
    finally:
        os._exit(0)


def test_kill_9_while_a_checkpoint_is_replaced_leaves_the_old_or_the_new_one(tmp_path):
    seen, operation, code = set(), 0, -9
    while code == -9:
        operation += 1
        output_dir = tmp_path / str(operation)
        folder = published(output_dir, 3)
        new = staged(output_dir, 3)
        code = die_in_a_fork(lambda new=new, folder=folder: publish(new, folder), operation)
        recover(output_dir)
        assert incompleteness(folder) is None
        assert [path.name for path in output_dir.iterdir()] == ["checkpoint-3"]
        seen.add(contents_of(folder))
    assert code == 0 and operation > 4
    assert seen == {b"old", b"new"}


def test_kill_9_while_a_checkpoint_is_deleted_leaves_all_or_nothing_of_it(tmp_path):
    operation, code = 0, -9
    while code == -9:
        operation += 1
        output_dir = tmp_path / str(operation)
        folder = published(output_dir, 3)
        code = die_in_a_fork(lambda folder=folder: remove(folder), operation)
        assert not folder.exists() or incompleteness(folder) is None
        recover(output_dir)
        assert not (output_dir / STAGING).exists() and len(checkpoints_of(output_dir)) <= 1
    assert code == 0 and operation > 3


def test_a_checkpoint_that_only_lacked_its_name_gets_it(tmp_path):
    staged(tmp_path, 4)
    staged(tmp_path, 5, finished=False)
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_complete_checkpoint_that_cannot_be_moved_is_kept_and_named(tmp_path, monkeypatch, caplog):
    folder = staged(tmp_path, 4)

    def refuse(*paths):
        raise OSError(errno.EACCES, "no")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        recover(tmp_path)
    assert incompleteness(folder) is None
    assert str(folder) in caplog.text


def test_a_checkpoint_that_cannot_be_deleted_stops_nothing(tmp_path, monkeypatch, caplog):
    folder = published(tmp_path, 4)
    monkeypatch.setattr(manifests.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(errno.EACCES, "no")))
    remove(folder)
    assert incompleteness(folder) is None and f"'{folder}' could not be deleted" in caplog.text


# ---- A real run that is killed ----


def run(world, output_dir, *flags):
    return main(command(world, "grad_diff", output_dir, *FLAGS, *SAVING, "--retain_loss", "nll", *flags))


@pytest.fixture(scope="module")
def whole(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert run(tiny_world, folder) == 0
    return folder


@pytest.mark.full
def test_kill_9_at_every_change_that_a_save_makes(tiny_world, whole, tmp_path, monkeypatch):
    """The run of step 4 is forked at the beginning of the save, once for every operation of it."""
    original, states = CheckpointedTrainer._save_checkpoint, {}

    def killed_again_and_again(self, model, trial):
        if self.state.global_step == 4:
            output_dir, operation, code = Path(self.args.output_dir), 0, -9
            shutil.copytree(output_dir, tmp_path / "before")
            while code == -9:
                operation += 1
                code = die_in_a_fork(lambda: original(self, model, trial), operation)
                recover(output_dir)
                steps = {path.name: incompleteness(path) for path in checkpoints_of(output_dir)}
                assert set(steps.values()) == {None} and not (output_dir / STAGING).exists()
                left = tuple(sorted(steps))
                if left not in states:
                    states[left] = shutil.copytree(output_dir, tmp_path / f"left{len(states)}")
                shutil.rmtree(output_dir)
                shutil.copytree(tmp_path / "before", output_dir)
            states["operations"] = operation
        original(self, model, trial)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointedTrainer, "_save_checkpoint", killed_again_and_again)
        assert run(tiny_world, tmp_path / "out", "--save_total_limit", "2") == 0
    assert states.pop("operations") > 20
    two = {("checkpoint-2", "checkpoint-3"), ("checkpoint-3", "checkpoint-4")}
    assert set(states) == {*two, ("checkpoint-2", "checkpoint-3", "checkpoint-4")}
    for left in states.values():
        assert run(tiny_world, left, "--save_total_limit", "2", "--resume_from_checkpoint", "True") == 0
        assert bit_equal(weights(left), weights(whole))


def test_what_a_killed_run_left_goes_when_the_next_one_starts(tiny_world, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    staged(tmp_path / "out", 7, finished=False)
    assert run(tiny_world, tmp_path / "out", "--resume_from_checkpoint", "auto") == 0
    assert not (tmp_path / "out" / STAGING).exists() and bit_equal(weights(tmp_path / "out"), weights(whole))


# ---- Writing fails ----


def fails_at(number, error, function):
    """Return a function that raises at its n-th call."""
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) >= number:
            raise error
        return function(*args, **kwargs)

    return call


def full_disk():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where, name",
    [(torch, "save"), (manifests, "file_sha256"), (manifests.os, "fsync"), (os, "replace"), (json, "dumps")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_full_disk_costs_no_older_checkpoint(where, name, tiny_world, tmp_path, monkeypatch):
    """The second save fails in every phase; the limit of one checkpoint must not have deleted the first before."""
    original = CheckpointedTrainer._write_checkpoint

    def second_fails(self, *args):
        if self.state.global_step == 2:
            monkeypatch.setattr(where, name, fails_at(1, full_disk(), getattr(where, name)))
        original(self, *args)

    monkeypatch.setattr(CheckpointedTrainer, "_write_checkpoint", second_fails)
    with pytest.raises(SavingError, match=r"checkpoint-2' could not be written \(OSError: .*No space left") as caught:
        run(tiny_world, tmp_path / "out", "--save_total_limit", "1")
    assert str(caught.value).endswith(f"the newest checkpoint is {tmp_path / 'out/checkpoint-1'}")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-1"]
    assert incompleteness(tmp_path / "out/checkpoint-1") is None


def test_a_limit_of_the_file_system_itself(tiny_world, tmp_path):
    """No file may grow beyond 100 kB: what Rust writes (safetensors) fails too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SavingError, match=r"checkpoint-1' could not be written .* the newest checkpoint is none"):
            run(tiny_world, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_at_the_very_end_leaves_the_checkpoints(tiny_world, tmp_path, monkeypatch):
    original = CheckpointedTrainer.save_model

    def last_fails(self, output_dir, *args, **kwargs):
        if output_dir.endswith(STAGING):
            raise full_disk()
        original(self, output_dir, *args, **kwargs)

    monkeypatch.setattr(CheckpointedTrainer, "save_model", last_fails)
    with pytest.raises(SavingError, match=r"the newest checkpoint is .*checkpoint-6"):
        run(tiny_world, tmp_path / "out", "--save_total_limit", "1")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-6"]
    monkeypatch.undo()
    assert run(tiny_world, tmp_path / "out", "--resume_from_checkpoint", "auto") == 0


@pytest.mark.parametrize("number", [1, 2, 3])
def test_ctrl_c_during_a_save_leaves_nothing_half_written(number, tiny_world, tmp_path, monkeypatch, capsys):
    """torch.save writes the optimizer, the schedule and the random state of step 1, then those of step 2."""
    monkeypatch.setattr(torch, "save", fails_at(4 + number, KeyboardInterrupt(), torch.save))
    assert run(tiny_world, tmp_path / "out") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing half-written was left behind"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-1"]
    assert incompleteness(tmp_path / "out/checkpoint-1") is None


def test_other_processes_than_the_one_that_saves_clean_nothing_up(tmp_path):
    class Other:
        class args:
            should_save, output_dir = False, str(tmp_path)

    staged(tmp_path, 1, finished=False)
    with pytest.raises(KeyboardInterrupt), _saving(Other, "checkpoint-1"):
        raise KeyboardInterrupt
    assert (tmp_path / STAGING).exists()


# ---- The best checkpoint ----


@pytest.mark.parametrize("best", ["first", "last"])
def test_the_best_checkpoint_is_named_at_its_final_place_and_loaded(best, tiny_world, tmp_path):
    """The likelihood of the retain set falls step by step, or rises; the run ends with the weights of its best step."""
    flags = ["--do_eval", "True", "--eval_strategy", "steps", "--eval_steps", "1", "--load_best_model_at_end", "True"]
    flags += ["--metric_for_best_model", "forget_nll", "--greater_is_better", str(best == "last")]
    assert run(tiny_world, tmp_path / "out", *flags) == 0
    step = 1 if best == "first" else 6
    expected = tmp_path / f"out/checkpoint-{step}"
    assert bit_equal(weights(tmp_path / "out"), weights(expected))
    for path in (tmp_path / f"out/checkpoint-{step}", tmp_path / "out/checkpoint-6", tmp_path / "out"):
        state = json.loads((path / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(expected)
    assert incompleteness(expected) is None


def test_a_stale_checkpoint_of_the_same_number_is_replaced(tiny_world, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    other = ["--overwrite_output_dir", "--seed", "7", "--max_steps", "2"]
    assert run(tiny_world, tmp_path / "out", *other) == 0
    assert [path.name for path in checkpoints_of(tmp_path / "out")] == ["checkpoint-2", "checkpoint-1"]
    assert not bit_equal(weights(tmp_path / "out/checkpoint-2"), weights(whole / "checkpoint-2"))
