"""Trainers whose checkpoints are complete or do not exist, which resume from nothing else, and the final folder."""

import contextlib
import logging
import os
import shutil
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from transformers import Trainer

from llm_unlearn.callbacks import Continuation
from llm_unlearn.errors import NonFiniteError, SavingError, UserError
from llm_unlearn.interruption import Interruption
from llm_unlearn.manifests import (
    MANIFEST,
    STAGING,
    checkpoints_of,
    file_sha256,
    incompleteness,
    listed_files,
    newest_complete,
    publish,
    recover,
    remove,
    write_manifest,
)
from llm_unlearn.resuming import (
    RUN_STATE,
    asks_to_resume,
    find_checkpoint,
    load_schedule_of_plain_sgd,
    require_same_run,
    run_state,
    unlogged_sums,
    warn_of_random_state,
    write_state,
)

__all__ = [
    "MANIFEST", "RUN_STATE", "CheckpointedTrainer", "asks_to_resume", "checkpoints_of", "file_sha256", "incompleteness",
    "listed_files", "move_into_place", "newest_complete", "save_final", "write_manifest",
]  # fmt: skip

logger = logging.getLogger(__name__)

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
_CONFIGS = ("config.json", "adapter_config.json", "generation_config.json")


class CheckpointedTrainer(Trainer):
    """A Trainer whose checkpoints appear complete or not at all, and which resumes only from one that still is.

    A SIGTERM while it trains ends the run with a checkpoint (see `interruption`).

    Attributes:
        stale_checkpoints: folders of an earlier run that go when this one has saved something itself.
        interruption: what listens to SIGTERM while `train` runs.
    """

    stale_checkpoints = ()
    interruption = None
    _writes_to = _run_state = None

    def train(self, resume_from_checkpoint=None, **kwargs):
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: None or False starts anew; True takes the newest complete checkpoint; "auto"
                the same, or starts anew where there is none; or a checkpoint's path.
            **kwargs: passed on to transformers.Trainer.train.
        Returns:
            transformers' TrainOutput.
        Raises:
            UserError: no complete checkpoint, or one of another run (the differing field is named).
            Terminated: a SIGTERM stopped the run; the message names the checkpoint.
            SavingError: a checkpoint could not be written; those before it are untouched.
        """
        self._run_state = self.run_state()
        checkpoint = self.on_first_rank(lambda: self._find_checkpoint(resume_from_checkpoint))
        self.interruption = Interruption(self)
        callback = Continuation(self, checkpoint)
        self.add_callback(callback)
        try:
            with self.interruption.listening():
                return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self.remove_callback(callback)

    def run_state(self):
        """Return what a resumed run must share with the run that wrote the checkpoint, see `resuming.run_state`."""
        return run_state(self)

    def method_state(self):
        """Return {name: tensor} that a method changes while it trains, besides the model and the optimizer.

        The tensors are the same on every process (a dual variable, a control vector), and are there with their shapes
        when training begins. Each checkpoint holds them, and `load_method_state` gets them back.
        """
        return {}

    def load_method_state(self, state):
        """Take over {name: tensor}, the names and shapes of `method_state`, before the first step of a resumed run."""
        if state:
            raise NotImplementedError(f"{type(self).__name__} has a method_state, but no load_method_state")

    def checkpoint_folder(self):
        """Return the path of the checkpoint of the present step."""
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def non_finite_message(self, what, happened="the update was not applied"):
        """Return the sentence for a NaN or an infinity: the step and the last good checkpoint."""
        # A checkpoint of this very step holds the weights that gave the NaN; hashing has no place in an error message.
        before = f"checkpoint-{self.state.global_step}"
        finished = [path for path in checkpoints_of(self.args.output_dir) if (path / MANIFEST).is_file()]
        last = next((path for path in finished if path.name != before), None)
        return (
            f"{what} is not finite at step {self.state.global_step + 1}; {happened}. Last good checkpoint: "
            f"{last or 'none'}. A lower --learning_rate, fewer steps or a bounded method (npo, simnpo) may help"
        )

    def name_best_checkpoint(self):
        """Write down the path of the best checkpoint, which is at its place or is being written."""
        step = self.state.best_global_step
        best = Path(self.args.output_dir) / f"checkpoint-{step}"
        if step and (step == self.state.global_step or best.is_dir()):
            self.state.best_model_checkpoint = str(best)

    def _find_checkpoint(self, wanted):
        recover(self.args.output_dir)
        checkpoint = find_checkpoint(wanted, self.args.output_dir)
        if checkpoint is not None:
            require_same_run(checkpoint, self._run_state)
            warn_of_random_state(checkpoint, self.args.world_size)
        return checkpoint

    def on_first_rank(self, function):
        """Call a function on the first process alone, and give its result or its mistake to all."""
        answer = [None, None]
        if self.is_world_process_zero():
            try:
                answer[0] = function()
            except UserError as error:
                answer[1] = str(error)
        answer = broadcast_object_list(answer) if self.args.world_size > 1 else answer
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # A pickle of the arguments, which nothing here reads; unlearning.json says the same in plain text.
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def require_finite_weights(self):
        """Refuse to save weights that are NaN or infinite.

        Raises:
            NonFiniteError: on every process alike.
        """
        parts = [p.detach() for p in self.model_wrapped.parameters()]
        parts = [p.to_local() if hasattr(p, "to_local") else p for p in parts]
        bad = sum((~torch.isfinite(p)).sum() for p in parts if p.is_floating_point() and p.numel())
        bad = self.accelerator.reduce(torch.as_tensor(bad, device=self.args.device).float(), "sum")
        if bad > 0:
            raise NonFiniteError(self.non_finite_message("a weight", "nothing was saved"))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not load_schedule_of_plain_sgd(self, checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _get_output_dir(self, trial):
        return self._writes_to or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint out of sight, give it its name when it is complete, and only then rotate older ones."""
        self.require_finite_weights()
        folder = self.checkpoint_folder()
        with _saving(self, folder):
            self._write_checkpoint(model, trial, folder)
        if self.args.should_save:
            self.stale_checkpoints = tuple(path for path in self.stale_checkpoints if path.name != folder.name)
            self.delete_stale()
            self._rotate(self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, model, trial, folder):
        args, staging = self.args, folder.parent / STAGING / folder.name
        if args.should_save:
            recover(folder.parent)
            staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        limit, args.save_total_limit = args.save_total_limit, None
        self._writes_to = str(staging.parent)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writes_to, args.save_total_limit = None, limit
        self.name_best_checkpoint()
        state = {
            **self._run_state,
            "unlogged": unlogged_sums(self),
            "evaluation_due": self.interruption.evaluation_due,
        }
        method_state = self.method_state()
        self.accelerator.wait_for_everyone()
        if args.should_save:
            # As transformers wrote it, the best checkpoint may be the one in the staging folder.
            self.state.save_to_json(str(staging / "trainer_state.json"))
            write_state(staging, state, method_state)
            write_manifest(staging)
            publish(staging, folder)
        self.accelerator.wait_for_everyone()

    def delete_stale(self):
        """Delete the checkpoints of the run that this one replaces, once it has saved something itself."""
        for path in self.stale_checkpoints:
            remove(path)
        self.stale_checkpoints = ()

    def _rotate(self, limit):
        """Delete what is beyond the limit: the newest finished and the best stay, unfinished ones never count."""
        if not limit or limit < 1:
            return
        every = checkpoints_of(self.args.output_dir)
        finished = [path.name for path in every if (path / MANIFEST).is_file()]
        best = self.state.best_model_checkpoint
        kept = [*finished[:1], *([Path(best).name] if best else [])]
        kept += [name for name in finished if name not in kept][: max(limit - len(set(kept)), 0)]
        for path in every:
            if path.name not in kept:
                remove(path)


def save_final(trainer, texts):
    """Write the finished model into `output_dir`: complete in a staging folder first, then moved into place.

    All processes call it.

    Args:
        trainer: CheckpointedTrainer after training.
        texts: {file name: contents} to write beside the weights.
    Raises:
        RuntimeError: if the backend wrote no weights.
        SavingError: if the disk is full, or whatever else kept the files from being written.
    """
    trainer.require_finite_weights()
    output_dir = Path(trainer.args.output_dir)
    staging = output_dir / STAGING
    with _saving(trainer, output_dir):
        if trainer.args.should_save:
            recover(output_dir)
            staging.mkdir(parents=True)
        trainer.accelerator.wait_for_everyone()
        if trainer.is_fsdp_enabled:
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        trainer.save_model(str(staging), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            if not any(staging.glob("*.safetensors")):
                raise RuntimeError("the backend wrote no weights")
            for name, contents in texts.items():
                (staging / name).write_text(contents, encoding="utf-8")
            trainer.state.save_to_json(str(staging / "trainer_state.json"))
            write_manifest(staging)
    if trainer.args.should_save:
        move_into_place(staging, output_dir)
        trainer.delete_stale()
    trainer.accelerator.wait_for_everyone()


@contextlib.contextmanager
def _saving(trainer, folder):
    """Leave nothing half-written where a save fails or is broken off, and say what is still there."""
    try:
        yield
    except BaseException as error:
        if trainer.args.should_save:
            recover(trainer.args.output_dir)
        if not isinstance(error, Exception):
            raise
        last = next(iter(checkpoints_of(trainer.args.output_dir)), None)
        raise SavingError(
            f"'{folder}' could not be written ({type(error).__name__}: {str(error).strip()}); nothing of it was left "
            f"behind, and the newest checkpoint is {last or 'none'}"
        ) from error


def move_into_place(staging, output_dir):
    """Move the files of a complete staging folder into the output directory, the manifest last.

    Args:
        staging: folder below it, gone afterwards.
        output_dir: directory of the run; weights and configs of an older model go.
    """
    staging, output_dir = Path(staging), Path(output_dir)
    # Whatever of an older model stayed would be read with the new one, an adapter's configuration for example.
    for pattern in (MANIFEST, *_WEIGHTS, *_CONFIGS):
        for stale in output_dir.glob(pattern):
            stale.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name == MANIFEST):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    staging.rmdir()
