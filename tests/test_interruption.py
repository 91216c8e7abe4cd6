"""SIGTERM ends a run with a complete checkpoint, an exit code of its own and the words to go on with."""

import json
import os
import shutil
import signal
import threading
import time
import types

import dual_method
import pytest
import ranks
from test_resume import FLAGS, assert_same_checkpoint, bit_equal, history
from tiny_world import command, weights

from llm_unlearn.checkpoints import CheckpointedTrainer, checkpoints_of, incompleteness
from llm_unlearn.cli.unlearn import main
from llm_unlearn.errors import Terminated
from llm_unlearn.interruption import Interruption
from llm_unlearn.methods.grad_diff import GradDiffTrainer

EVALUATING = ["--do_eval", "True", "--eval_strategy"]


def run(world, output_dir, *flags):
    return main(command(world, "dual_method:SignalledTrainer", output_dir, *FLAGS, *flags))


@pytest.fixture(scope="module")
def unbroken(tiny_world, tmp_path_factory):
    """Function that trains with flags to the end, once, and returns where."""
    done = {}

    def train(flags):
        if tuple(flags) not in done:
            done[tuple(flags)] = tmp_path_factory.mktemp("whole") / "out"
            assert run(tiny_world, done[tuple(flags)], *flags) == 0
        return done[tuple(flags)]

    return train


@pytest.fixture
def interrupted(monkeypatch):
    """Function that lets the step of a number get the signal."""
    return lambda step: monkeypatch.setenv("SIGTERM_IN_STEP", str(step))


@pytest.mark.parametrize("step", [1, 2, 3, 6], ids=["first", "mid_epoch", "epoch_end", "last"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--save_strategy", "no"],
        ["--save_strategy", "steps", "--save_steps", "2", *EVALUATING, "steps", "--eval_steps", "1"],
        ["--save_strategy", "epoch", *EVALUATING, "epoch", "--logging_strategy", "epoch", "--save_total_limit", "1"],
        ["--save_strategy", "no", "--logging_steps", "4"],
        ["--save_strategy", "steps", "--save_steps", "1", "--save_only_model", "True"],
    ],
    ids=["no_saving", "evaluating", "by_epochs", "logging_seldom", "only_model"],
)
def test_an_interrupted_run_continues_as_if_nothing_had_happened(
    flags, step, tiny_world, tmp_path, unbroken, interrupted, capsys
):
    whole = unbroken(flags)
    interrupted(step)
    capsys.readouterr()
    assert run(tiny_world, tmp_path / "part", *flags) == 143
    folder = tmp_path / f"part/checkpoint-{step}"
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped by SIGTERM after step {step}; everything is in '{folder}', pass " + (
        "--resume_from_checkpoint auto to continue"
    )
    assert incompleteness(folder) is None and checkpoints_of(tmp_path / "part")[0] == folder
    assert {path.name for path in (tmp_path / "part").iterdir() if not path.name.startswith("checkpoint-")} == set()
    interrupted(0)
    assert run(tiny_world, tmp_path / "part", *flags, "--resume_from_checkpoint", "auto") == 0
    assert bit_equal(weights(tmp_path / "part"), weights(whole))
    assert history(tmp_path / "part") == history(whole)


def test_the_best_checkpoint_survives_an_interruption_and_is_loaded_at_the_end(tiny_world, tmp_path, interrupted):
    """With a limit of one checkpoint the Trainer deletes all but the best when it thinks that training is over."""
    flags = ["--save_strategy", "steps", "--save_steps", "1", *EVALUATING, "steps", "--eval_steps", "1"]
    flags += ["--load_best_model_at_end", "True", "--metric_for_best_model", "forget_nll", "--save_total_limit", "1"]
    flags += ["--greater_is_better", "False"]
    assert run(tiny_world, tmp_path / "whole", *flags) == 0
    interrupted(3)
    assert run(tiny_world, tmp_path / "part", *flags) == 143
    assert [path.name for path in checkpoints_of(tmp_path / "part")] == ["checkpoint-3", "checkpoint-1"]
    interrupted(0)
    assert run(tiny_world, tmp_path / "part", *flags, "--resume_from_checkpoint", "auto") == 0
    assert bit_equal(weights(tmp_path / "part"), weights(tmp_path / "whole"))
    assert [path.name for path in checkpoints_of(tmp_path / "part")] == ["checkpoint-1"]


def test_the_step_of_the_interruption_may_turn_out_the_best(tiny_world, tmp_path, interrupted):
    """Its evaluation is made up for by the resumed run, which must still know where its checkpoint is."""
    flags = ["--save_strategy", "steps", "--save_steps", "100", *EVALUATING, "steps", "--eval_steps", "1"]
    flags += ["--load_best_model_at_end", "True", "--metric_for_best_model", "forget_nll", "--max_steps", "3"]
    flags += ["--greater_is_better", "False"]
    interrupted(1)
    assert run(tiny_world, tmp_path / "out", *flags) == 143
    interrupted(0)
    assert run(tiny_world, tmp_path / "out", *flags, "--resume_from_checkpoint", "auto") == 0
    assert bit_equal(weights(tmp_path / "out"), weights(tmp_path / "out/checkpoint-1"))


def test_a_signal_during_the_save_stops_the_run_after_the_next_step(tiny_world, tmp_path, monkeypatch):
    original = CheckpointedTrainer._write_checkpoint

    def signalled(self, *args):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *args)

    monkeypatch.setattr(CheckpointedTrainer, "_write_checkpoint", signalled)
    assert run(tiny_world, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "1") == 143
    assert [path.name for path in checkpoints_of(tmp_path / "out")] == ["checkpoint-2", "checkpoint-1"]
    assert all(incompleteness(path) is None for path in checkpoints_of(tmp_path / "out"))


def test_a_signal_after_the_last_step_lets_the_run_finish(tiny_world, tmp_path, monkeypatch, caplog):
    original = GradDiffTrainer._finalize_training

    def signalled(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(GradDiffTrainer, "_finalize_training", signalled)
    assert run(tiny_world, tmp_path / "out", "--max_steps", "1") == 0
    assert incompleteness(tmp_path / "out") is None and "SIGTERM came after the last step" in caplog.text


# ---- The handler ----


def quiet_trainer():
    args = types.SimpleNamespace(save_only_model=True, load_best_model_at_end=True, save_total_limit=1, world_size=1)
    nothing = lambda callback: None  # noqa: E731
    return types.SimpleNamespace(args=args, add_callback=nothing, remove_callback=nothing)


def test_the_earlier_handler_is_back_afterwards_however_training_ends(monkeypatch):
    calls = []
    mine = lambda *_: calls.append(1)  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    try:
        with pytest.raises(ValueError), Interruption(quiet_trainer()).listening():
            os.kill(os.getpid(), signal.SIGTERM)
            raise ValueError
        assert calls == [] and signal.getsignal(signal.SIGTERM) is mine
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_arguments_are_back_after_an_interruption():
    trainer = quiet_trainer()
    trainer.state, trainer.checkpoint_folder = types.SimpleNamespace(global_step=5, epoch=0.5), lambda: "here"
    kept, control = dict(vars(trainer.args)), types.SimpleNamespace(should_evaluate=True, should_log=True)
    interruption = Interruption(trainer)
    with pytest.raises(Terminated, match="after step 5; everything is in 'here'"), interruption.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        interruption.on_step_end(trainer.args, trainer.state, control)
        interruption.on_epoch_end(trainer.args, trainer.state, control)
        assert trainer.args.save_only_model is False and control.should_save and control.should_training_stop
        assert not control.should_evaluate and not control.should_log and interruption.evaluation_due
        interruption.on_save(trainer.args, trainer.state, control)
        assert trainer.args.save_total_limit is None
    assert vars(trainer.args) == kept


def test_no_handler_outside_the_main_thread():
    """Python refuses it there with a ValueError."""
    before, during = signal.getsignal(signal.SIGTERM), []

    def train():
        with Interruption(quiet_trainer()).listening():
            during.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert during == [before] and signal.getsignal(signal.SIGTERM) is before


# ---- Processes ----


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert path.exists()


def test_a_process_that_gets_sigterm_ends_with_its_code_and_kill_9_costs_one_save(tiny_world, tmp_path):
    """From outside, at whatever moment it comes: the run is resumed twice and ends as the unbroken one."""
    flags = [*FLAGS, "--save_strategy", "steps", "--save_steps", "1", "--num_train_epochs", "5"]
    assert main(command(tiny_world, "grad_diff", tmp_path / "whole", *flags)) == 0
    words = command(tiny_world, "grad_diff", tmp_path / "part", *flags, "--resume_from_checkpoint", "auto")
    with ranks.Ranks(main, words, launched=False) as started:
        wait_for(tmp_path / "part/checkpoint-2")
        started.processes[0].terminate()
        outcome = started.wait()
    assert outcome.codes == [143], outcome
    assert outcome.said[0].splitlines()[-1].startswith("stopped by SIGTERM after step")
    stopped = checkpoints_of(tmp_path / "part")[0]
    with ranks.Ranks(main, words, launched=False) as started:
        wait_for(stopped.with_name(f"checkpoint-{int(stopped.name[11:]) + 2}"))
        started.processes[0].kill()
        assert started.wait().codes == [-9]
    assert main(words) == 0
    assert bit_equal(weights(tmp_path / "part"), weights(tmp_path / "whole"))
    assert history(tmp_path / "part") == history(tmp_path / "whole")


def test_the_loaders_workers_live_on_when_the_whole_group_is_told(tiny_world, tmp_path):
    """Launchers signal a process group; a worker that died of it took the run with it, before it could save."""
    import psutil

    flags = [*FLAGS, "--save_strategy", "steps", "--save_steps", "1", "--num_train_epochs", "20"]
    words = command(tiny_world, "grad_diff", tmp_path / "out", *flags, "--dataloader_num_workers", "2")
    with ranks.Ranks(main, words, launched=False) as started:
        wait_for(tmp_path / "out/checkpoint-2")
        children = psutil.Process(started.processes[0].pid).children()
        for process in [*children, started.processes[0]]:
            process.terminate()
        outcome = started.wait()
    assert children and outcome.codes == [143], outcome
    assert incompleteness(checkpoints_of(tmp_path / "out")[0]) is None


@pytest.mark.distributed
def test_a_signal_to_one_process_stops_all_at_the_same_step(tiny_world, tmp_path):
    """Rank 1 gets it alone. Both ranks save, stop and exit alike; rank 0 says it; two ranks resume to the same end."""
    flags = [*FLAGS, "--per_device_train_batch_size", "2"]
    words = command(tiny_world, "dual_method:SignalledTrainer", tmp_path / "whole", *flags)
    assert ranks.run(main, words, processes=2).codes == [0, 0]
    words = command(tiny_world, "dual_method:SignalledTrainer", tmp_path / "part", *flags)
    outcome = ranks.run(main, words, processes=2, environment={"SIGTERM_IN_STEP": "2"})
    assert outcome.codes == [143, 143], outcome
    assert "stopped by SIGTERM after step 2" in outcome.said[0] and "stopped by SIGTERM" not in outcome.said[1]
    assert {path.name for path in (tmp_path / "part").iterdir()} == {"checkpoint-2"}
    outcome = ranks.run(main, [*words, "--resume_from_checkpoint", "auto"], processes=2)
    assert outcome.codes == [0, 0], outcome
    assert bit_equal(weights(tmp_path / "part"), weights(tmp_path / "whole"))


def test_the_state_files_of_an_interrupted_run_are_those_of_an_ordinary_save(tiny_world, tmp_path, interrupted):
    saving = ["--save_strategy", "steps", "--save_steps", "1"]
    assert run(tiny_world, tmp_path / "whole", *saving) == 0
    interrupted(2)
    assert run(tiny_world, tmp_path / "part", "--save_strategy", "no") == 143
    assert_same_checkpoint(tmp_path / "part/checkpoint-2", tmp_path / "whole/checkpoint-2")
    kept = json.loads((tmp_path / "part/checkpoint-2/unlearning_state.json").read_text())
    shutil.rmtree(tmp_path / "part")
    assert kept == json.loads((tmp_path / "whole/checkpoint-2/unlearning_state.json").read_text())
    assert dual_method.SignalledTrainer.__name__ == kept["trainer"]
