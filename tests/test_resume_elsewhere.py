"""A checkpoint of one number of processes continues on another, or is refused by the field that forbids it."""

import json
import shutil

import backends
import pytest
from safetensors.torch import load_file
from test_equivalence import UPDATE_TOLERANCE, assert_terms_agree
from tiny_world import command, terms

from llm_unlearn.checkpoints import checkpoints_of, incompleteness
from llm_unlearn.cli.unlearn import main
from llm_unlearn.resuming import METHOD_STATE

pytestmark = pytest.mark.distributed
SAVING = ["--save_strategy", "steps", "--save_steps", "1"]
RESUME = ["--resume_from_checkpoint", "auto"]
SHARDED = ["--fsdp_config", json.dumps({"state_dict_type": "SHARDED_STATE_DICT"})]


def words(world, output_dir, rows, *flags, method="npo"):
    """Three steps of four rows, of which a process takes `rows` at a time."""
    rate = ["--lr_scheduler_type", "linear"]
    return command(world, method, output_dir, *SAVING, *rate, "--per_device_train_batch_size", rows, *flags)


def keep_only_the_first(output_dir):
    for path in checkpoints_of(output_dir)[:-1]:
        shutil.rmtree(path)
    return output_dir


@pytest.fixture(scope="module")
def one(tiny_world, tmp_path_factory):
    """The unbroken run on one process."""
    folder = tmp_path_factory.mktemp("one") / "out"
    assert main(words(tiny_world, folder, 4)) == 0
    return folder


@pytest.fixture(scope="module")
def two(tiny_world, tmp_path_factory):
    """Function that trains on two processes under a backend, once; what is left is the first of three checkpoints."""
    folder = tmp_path_factory.mktemp("two")

    def run(backend):
        if not (folder / backend).exists():
            backends.train(words(tiny_world, folder / backend, 2), backend, processes=2)
            keep_only_the_first(folder / backend)
        return folder / backend

    return run


@pytest.fixture
def copied(tmp_path):
    """Function that copies a run, to resume in."""
    return lambda folder: shutil.copytree(folder, tmp_path / "out")


def assert_continued(found, whole, start_weights):
    assert checkpoints_of(found)[-1].name == "checkpoint-1" and len(terms(found)) == 3
    assert_terms_agree(terms(found), terms(whole), 1e-5)
    assert backends.distance(found, whole, start_weights) <= UPDATE_TOLERANCE


@pytest.mark.parametrize("cut", [["4"], ["2", "--gradient_accumulation_steps", "2"]], ids=["1x4", "1x2x2"])
def test_ddp_on_two_continues_on_one(cut, two, one, copied, tiny_world, start_weights, caplog):
    folder = copied(two("ddp"))
    assert main(words(tiny_world, folder, *cut, *RESUME)) == 0
    assert_continued(folder, one, start_weights)
    said = [message for message in caplog.messages if "rng_state" in message]
    assert len(said) == 1 and "holds no rng_state.pth: what is drawn at random" in said[0]


def test_one_continues_on_ddp_on_two(one, copied, tiny_world, start_weights):
    folder = keep_only_the_first(copied(one))
    outcome = backends.start(words(tiny_world, folder, 2, *RESUME), "ddp", processes=2)
    assert outcome.codes == [0, 0], outcome
    assert_continued(folder, one, start_weights)
    assert outcome.said[0].count("holds no rng_state_0.pth and no rng_state_1.pth: what is drawn") == 1
    assert "rng_state" not in outcome.said[1]


def test_fsdp2_on_two_continues_on_four(two, one, copied, tiny_world, start_weights):
    folder = copied(two("fsdp2"))
    backends.train(words(tiny_world, folder, 1, *RESUME), "fsdp2", processes=4)
    assert_continued(folder, one, start_weights)


def test_the_averages_of_adamw_follow_under_fsdp2(tiny_world, tmp_path):
    adamw = ["--optim", "adamw_torch", "--learning_rate", "1e-4"]
    assert main(words(tiny_world, tmp_path / "whole", 4, *adamw)) == 0
    folder = backends.train(words(tiny_world, tmp_path / "out", 2, *adamw), "fsdp2", processes=2)
    keep_only_the_first(folder)
    backends.train(words(tiny_world, folder, 1, *adamw, *RESUME), "fsdp2", processes=4)
    assert_terms_agree(terms(folder), terms(tmp_path / "whole"), 1e-4)


def test_a_sharded_fsdp2_run_is_stopped_by_sigterm_and_continues_on_four(tiny_world, tmp_path, start_weights):
    """Its checkpoint is written by all ranks, and the signal reached the second one only."""
    folder, whole, method = tmp_path / "out", tmp_path / "whole", "dual_method:SignalledTrainer"
    assert main(words(tiny_world, whole, 4, method=method)) == 0
    started = words(tiny_world, folder, 2, *SHARDED, "--save_strategy", "no", method=method)
    outcome = backends.start(started, "fsdp2", processes=2, environment={"SIGTERM_IN_STEP": "1"})
    assert outcome.codes == [143, 143], outcome
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]
    assert {path.name for path in (folder / "checkpoint-1").iterdir() if path.is_dir()} == {
        "optimizer_0", "pytorch_model_fsdp_0",
    }  # fmt: skip
    assert incompleteness(folder / "checkpoint-1") is None
    backends.train(words(tiny_world, folder, 1, *SHARDED, *RESUME, method=method), "fsdp2", processes=4)
    assert_continued(folder, whole, start_weights)


def test_zero2_refuses_another_number_of_processes(two, copied, tiny_world):
    folder = copied(two("zero2"))
    outcome = backends.start(words(tiny_world, folder, 4, *RESUME), "zero2", processes=1)
    assert outcome.codes == [2], outcome
    said = (
        "processes was 2 and is 1, and the optimizer state under ZeRO-2 is cut by processes; start anew or restore it"
    )
    assert said in outcome.said[0].splitlines()[-1]


@pytest.mark.parametrize(
    "before, now, said",
    [
        ("ddp", "zero2", "backend was one process or DDP and is ZeRO-2"),
        ("fsdp2", "ddp", "backend was FSDP2 with FULL_STATE_DICT and is one process or DDP"),
    ],
)
def test_another_backend_is_refused_by_name(before, now, said, two, copied, tiny_world):
    folder = copied(two(before))
    outcome = backends.start(words(tiny_world, folder, 2, *RESUME), now, processes=2)
    assert outcome.codes == [2, 2], outcome
    assert said in outcome.said[0].splitlines()[-1] and said not in outcome.said[1]


def test_the_state_of_a_method_follows_to_another_number_of_processes(tiny_world, tmp_path, copied, start_weights):
    method = "dual_method:DualTrainer"
    assert main(words(tiny_world, tmp_path / "whole", 4, method=method)) == 0
    folder = keep_only_the_first(copied(tmp_path / "whole"))
    backends.train(words(tiny_world, folder, 2, *RESUME, method=method), "ddp", processes=2)
    first, second = (load_file(path / "checkpoint-3" / METHOD_STATE) for path in (folder, tmp_path / "whole"))
    assert second["dual"].item() not in (0.0, 1.0) and first["seen"].tolist() == second["seen"].tolist() == [3, 3]
