"""A checkpoint is complete or passed over; a push costs nothing when it fails; exit codes say what happened."""

import json
import logging
import os
import shlex
import shutil
import types

import pytest

from llm_unlearn.checkpoints import (
    MANIFEST,
    RUN_STATE,
    CheckpointedTrainer,
    checkpoints_of,
    incompleteness,
    listed_files,
    move_into_place,
    newest_complete,
    write_manifest,
)
from llm_unlearn.errors import NonFiniteError, PushError, Terminated, UserError, run_cli, run_script
from llm_unlearn.hub import push_checkpoint
from llm_unlearn.resuming import find_checkpoint, require_same_run

WEIGHTS = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def first_process(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)


def checkpoint(output_dir, step, finished=True):
    """Make a checkpoint folder by hand, with a folder inside as sharded optimizers have."""
    folder = output_dir / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(WEIGHTS + str(step).encode())
    (folder / "optimizer.pt").write_bytes(WEIGHTS[::-1])
    (folder / "global_step/rank_0.pt").write_bytes(b"shard")
    (folder / "empty.txt").write_bytes(b"")
    if finished:
        write_manifest(folder)
    return folder


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def contents_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


DAMAGE = {
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "it has no manifest.json"),
    "truncated weights": (lambda folder: truncate(folder / "model.safetensors"), "model.safetensors is not as it was"),
    "flipped bit": (lambda folder: flip_a_bit(folder / "model.safetensors"), "model.safetensors is not as it was"),
    # transformers itself resumes without a word, and with a fresh optimizer.
    "missing optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "missing shard": (lambda folder: shutil.rmtree(folder / "global_step"), "global_step/rank_0.pt is missing"),
    "grown file": (lambda folder: (folder / "empty.txt").write_text("x"), "empty.txt is not as it was"),
    "truncated manifest": (lambda folder: truncate(folder / MANIFEST), "manifest.json is not as it was written"),
    "empty manifest": (lambda folder: (folder / MANIFEST).write_text(""), "manifest.json is not as it was written"),
    "foreign manifest": (lambda folder: (folder / MANIFEST).write_text("{}"), "manifest.json is not as it was written"),
    "list as manifest": (lambda folder: (folder / MANIFEST).write_text("[]"), ""),
    "no list of files": (lambda folder: (folder / MANIFEST).write_text('{"files": null}'), ""),
    "flipped bit in a key of the manifest": (
        lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"bytes"', '"cytes"')),
        "",
    ),
    "binary manifest": (
        lambda folder: (folder / MANIFEST).write_bytes(b"\xff\x00"), "manifest.json is not as it was written",
    ),
}  # fmt: skip


# ---- The manifest ----


def test_a_finished_checkpoint_is_complete(tmp_path):
    folder = checkpoint(tmp_path, 3)
    assert incompleteness(folder) is None
    assert incompleteness(str(folder)) is None
    listed = json.loads((folder / MANIFEST).read_text())["files"]
    assert set(listed) == {"model.safetensors", "optimizer.pt", "global_step/rank_0.pt", "empty.txt"}
    assert listed["global_step/rank_0.pt"]["bytes"] == 5
    # sha256 of no bytes at all, a known constant.
    assert listed["empty.txt"]["sha256"] == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_files_that_come_later_do_not_matter(tmp_path):
    folder = checkpoint(tmp_path, 3)
    (folder / "notes.txt").write_text("mine")
    assert incompleteness(folder) is None


def test_writing_a_manifest_twice_changes_nothing(tmp_path):
    folder = checkpoint(tmp_path, 3)
    before = contents_of(folder)
    write_manifest(folder)
    assert contents_of(folder) == before


def test_a_manifest_survives_the_remains_of_an_interrupted_one(tmp_path):
    folder = checkpoint(tmp_path, 3, finished=False)
    (folder / (MANIFEST + ".partial")).write_text('{"fi')
    write_manifest(folder)
    assert incompleteness(folder) is None


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_passed_over_with_its_reason_and_the_older_one_taken(tmp_path, caplog, damage):
    harm, reason = DAMAGE[damage]
    older, newer = checkpoint(tmp_path, 9), checkpoint(tmp_path, 10)
    assert newest_complete(tmp_path) == newer
    harm(newer)
    with caplog.at_level(logging.WARNING):
        assert newest_complete(tmp_path) == older
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith(f"passing over {newer}: ")
    assert reason in message


def test_a_checkpoint_that_was_never_finished_is_none(tmp_path, caplog):
    checkpoint(tmp_path, 1, finished=False)
    checkpoint(tmp_path, 2, finished=False)
    with caplog.at_level(logging.WARNING):
        assert newest_complete(tmp_path) is None
    assert len(caplog.records) == 2
    assert newest_complete(tmp_path / "absent") is None


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("checkpoint-9", "checkpoint-100", "checkpoint-20", "checkpoint-x", "checkpoint-7-old", "other"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-100", "checkpoint-20", "checkpoint-9"]
    assert checkpoints_of(tmp_path / "absent") == []


# ---- Resuming and rotating ----


def trainer(output_dir, best=None):
    """The part of a trainer that rotating looks at."""
    return types.SimpleNamespace(
        args=types.SimpleNamespace(output_dir=str(output_dir)),
        state=types.SimpleNamespace(best_model_checkpoint=best, global_step=7),
    )


def test_resuming_takes_the_newest_complete_checkpoint(tmp_path):
    older = checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10, finished=False)
    for wanted in (True, "True", "true", "auto", str(older)):
        assert find_checkpoint(wanted, tmp_path) == str(older)
    for wanted in (None, False, "False", "false"):
        assert find_checkpoint(wanted, tmp_path) is None


def test_resuming_without_a_complete_checkpoint(tmp_path):
    partial = checkpoint(tmp_path, 10, finished=False)
    assert find_checkpoint("auto", tmp_path) is None
    with pytest.raises(UserError, match="holds no complete checkpoint; pass auto to start anew"):
        find_checkpoint("True", tmp_path)
    with pytest.raises(UserError, match=r"checkpoint-10' cannot be used: it has no manifest\.json"):
        find_checkpoint(str(partial), tmp_path)


@pytest.mark.parametrize("name", ["scaler.pt", "rng_state_1.pth", "pytorch_model.bin", "global_step/rank_1.pt"])
def test_what_torch_would_read_must_be_in_the_manifest(name, tmp_path):
    """Whoever can add a file to a checkpoint could otherwise have it loaded."""
    folder = checkpoint(tmp_path, 1)
    (folder / name).write_bytes(b"not ours")
    for wanted in ("auto", str(folder)):
        with pytest.raises(UserError, match=f"holds {name}, which its manifest does not list; delete it"):
            find_checkpoint(wanted, tmp_path)


def test_a_checkpoint_of_another_run_is_refused_by_the_field_that_differs(tmp_path):
    folder = checkpoint(tmp_path, 1)
    (folder / RUN_STATE).write_text(json.dumps({"seed": 1, "streams": {"forget": "abc"}}))
    now = {"seed": 1, "streams": {"forget": "abc"}}
    require_same_run(folder, now)
    with pytest.raises(UserError, match="seed was 1 and is 2"):
        require_same_run(folder, {**now, "seed": 2})
    with pytest.raises(UserError, match="streams has other contents"):
        require_same_run(folder, {**now, "streams": {"forget": "abd"}})


def test_a_non_finite_loss_names_the_last_good_checkpoint(tmp_path):
    message = CheckpointedTrainer.non_finite_message(trainer(tmp_path), "the loss")
    assert "the loss is not finite at step 8; the update was not applied. Last good checkpoint: none" in message
    good = checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 6, finished=False)
    message = CheckpointedTrainer.non_finite_message(trainer(tmp_path), "a gradient", "nothing was saved")
    assert f"nothing was saved. Last good checkpoint: {good}." in message


def left(output_dir):
    return sorted(int(path.name.split("-")[1]) for path in checkpoints_of(output_dir))


@pytest.mark.parametrize(("limit", "kept"), [(None, [2, 9, 10]), (0, [2, 9, 10]), (2, [9, 10]), (1, [10])])
def test_rotation_keeps_the_newest(tmp_path, limit, kept):
    for step in (2, 9, 10):
        checkpoint(tmp_path, step)
    CheckpointedTrainer._rotate(trainer(tmp_path), limit)
    assert left(tmp_path) == kept


def test_rotation_keeps_the_best(tmp_path):
    for step in (2, 9, 10):
        checkpoint(tmp_path, step)
    CheckpointedTrainer._rotate(trainer(tmp_path, best=str(tmp_path / "checkpoint-2")), 2)
    assert left(tmp_path) == [2, 10]


def test_rotation_to_one_keeps_the_newest_beside_the_best(tmp_path):
    """As transformers documents save_total_limit=1: the last and the best are both kept where they differ."""
    for step in (2, 9, 10):
        checkpoint(tmp_path, step)
    CheckpointedTrainer._rotate(trainer(tmp_path, best=str(tmp_path / "checkpoint-2")), 1)
    assert left(tmp_path) == [2, 10]


def test_rotation_never_gives_up_a_complete_checkpoint_for_a_partial_one(tmp_path):
    """Killed while it wrote step 20, resumed from 10 with another --save_steps, and step 15 was just saved."""
    complete = checkpoint(tmp_path, 15)
    checkpoint(tmp_path, 20, finished=False)
    CheckpointedTrainer._rotate(trainer(tmp_path), 1)
    assert newest_complete(tmp_path) == complete


def test_the_final_folder_replaces_older_weights_and_leaves_the_rest(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin", MANIFEST):
        (tmp_path / name).write_text("stale")
    (tmp_path / "notes.txt").write_text("mine")
    kept = checkpoint(tmp_path, 4)
    staging = tmp_path / ".saving"
    checkpoint(tmp_path, 5, finished=False).rename(staging)
    write_manifest(staging)
    move_into_place(staging, tmp_path)
    assert not staging.exists()
    assert incompleteness(tmp_path) is None
    assert incompleteness(kept) is None
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.safetensors", "optimizer.pt", "global_step", "empty.txt", MANIFEST, "notes.txt", "checkpoint-4",
    }  # fmt: skip


# ---- Pushing ----


class FakeHub:
    """What push_checkpoint uses of HfApi, written down; `fails` names the call that raises."""

    calls, fails, error = [], None, ConnectionError("no route\nto host")

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def _called(self, name, kwargs):
        self.calls.append((name, kwargs))
        if name == self.fails:
            raise self.error

    def create_repo(self, repo_id, **kwargs):
        self._called("create_repo", {"repo_id": repo_id, **kwargs})
        return types.SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id, **kwargs):
        self._called("create_branch", {"repo_id": repo_id, **kwargs})

    def upload_folder(self, **kwargs):
        self._called("upload_folder", kwargs)
        return "https://hub/commit/1"


@pytest.fixture
def hub(monkeypatch):
    fake = type("Hub", (FakeHub,), {"calls": []})
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    return fake


def test_a_finished_checkpoint_is_pushed_without_its_intermediate_ones(hub, tmp_path):
    folder = checkpoint(tmp_path, 3)
    url = push_checkpoint(str(folder), "name", token="hf_x", private=True, revision="dev")
    assert url == "https://hub/commit/1"
    calls = dict(hub.calls)
    assert calls["token"] == "hf_x"
    assert calls["create_repo"] == {"repo_id": "name", "private": True, "exist_ok": True}
    assert calls["create_branch"] == {"repo_id": "me/name", "branch": "dev", "exist_ok": True}
    upload = calls["upload_folder"]
    assert (upload["repo_id"], upload["folder_path"], upload["revision"]) == ("me/name", str(folder), "dev")
    assert set(upload["allow_patterns"]) == {MANIFEST, *listed_files(folder)}


def test_the_folder_names_the_repository_where_none_is_given(hub, tmp_path):
    push_checkpoint(str(checkpoint(tmp_path, 3)) + "/")
    assert dict(hub.calls)["create_repo"]["repo_id"] == "checkpoint-3"
    assert "create_branch" not in dict(hub.calls)


@pytest.mark.parametrize("fails", ["create_repo", "create_branch", "upload_folder"])
def test_a_failed_push_says_how_to_retry_and_leaves_the_folder_alone(hub, tmp_path, fails):
    folder = checkpoint(tmp_path, 3)
    before = contents_of(folder)
    hub.fails = fails
    with pytest.raises(PushError) as caught:
        push_checkpoint(str(folder), "me/name", token="hf_secret", revision="dev")
    message = str(caught.value)
    assert f"the checkpoint is complete in '{folder}'" in message
    assert "ConnectionError: no route" in message
    assert f"python utils/push_checkpoint.py --output_dir {folder} --hub_model_id me/name" in message
    assert "hf_secret" not in message
    assert "\n" not in message
    assert contents_of(folder) == before


def retry_words(tmp_path, hub, folder, **kwargs):
    hub.fails = "upload_folder"
    with pytest.raises(PushError) as caught:
        push_checkpoint(str(folder), **kwargs)
    return shlex.split(str(caught.value).partition("retry with: ")[2])


def test_the_retry_pushes_to_the_same_branch(hub, tmp_path):
    """Otherwise it writes to main."""
    words = retry_words(tmp_path, hub, checkpoint(tmp_path, 3), revision="dev")
    assert words[words.index("--hub_revision") + 1] == "dev"


def test_the_retry_stays_private(hub, tmp_path):
    """Otherwise it publishes what was meant to be private."""
    assert "--hub_private_repo" in retry_words(tmp_path, hub, checkpoint(tmp_path, 3), private=True)


def test_the_retry_can_be_typed_where_the_folder_has_spaces(hub, tmp_path):
    words = retry_words(tmp_path, hub, checkpoint(tmp_path / "my models", 3))
    assert words[words.index("--output_dir") + 1] == str(tmp_path / "my models/checkpoint-3")


@pytest.mark.parametrize("error", [RuntimeError(), OSError("\n"), KeyError("x" * 1000)])
def test_whatever_the_network_raises_becomes_one_short_sentence(hub, tmp_path, error):
    hub.fails, hub.error = "upload_folder", error
    with pytest.raises(PushError) as caught:
        push_checkpoint(str(checkpoint(tmp_path, 3)))
    assert type(error).__name__ in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(tmp_path)) * 2


def test_an_unfinished_folder_is_refused_before_anything_is_sent(hub, tmp_path):
    folder = checkpoint(tmp_path, 3)
    truncate(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"is not a finished checkpoint: model\.safetensors is not as it was written"):
        push_checkpoint(str(folder))
    with pytest.raises(UserError, match=r"it has no manifest\.json"):
        push_checkpoint(str(tmp_path))
    assert hub.calls == []


# ---- Exit codes ----


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("two\n  lines"), 2, "two lines\n"),
        (PushError("saved, not pushed"), 3, "saved, not pushed\n"),
        (Terminated("stopped by SIGTERM"), 143, "stopped by SIGTERM\n"),
        (KeyboardInterrupt(), 130, "interrupted; nothing half-written was left behind\n"),
    ],
)
def test_exit_codes_and_the_sentence_on_stderr(capsys, error, code, said):
    assert run_cli(raising(error)) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", said)


def test_exit_code_of_success():
    assert run_cli(lambda: None) == 0
    assert run_cli(lambda: 0) == 0
    assert run_cli(lambda: 3) == 3


@pytest.mark.parametrize("error", [NonFiniteError("NaN"), ValueError("a bug"), RuntimeError("a bug")])
def test_any_other_error_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_cli(raising(error))


def test_only_the_first_process_says_it(capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert run_cli(raising(UserError("wrong"))) == 2
    assert capsys.readouterr().err == ""


def test_a_real_command_line_ends_in_two(capsys):
    from llm_unlearn.cli.unlearn import main

    assert main(["--unlearn_method", "nop"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("unknown --unlearn_method 'nop'; did you mean 'npo'?")


def test_a_failed_push_of_the_tool_ends_in_three(hub, tmp_path, capsys):
    hub.fails = "upload_folder"
    assert run_cli(lambda: push_checkpoint(str(checkpoint(tmp_path, 3)))) == 3
    assert "retry with: python utils/push_checkpoint.py" in capsys.readouterr().err.splitlines()[-1]


def test_a_script_runs_on_the_words_that_it_is_given_or_on_the_processs_own(monkeypatch):
    monkeypatch.setattr("sys.argv", ["script.py", "--own"])
    seen = []
    assert run_script(seen.append, ("--given",)) == 0 and run_script(seen.append) == 0
    assert seen == [["--given"], ["--own"]]
