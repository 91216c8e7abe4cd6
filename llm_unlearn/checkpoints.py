"""Checkpoints that are complete or do not exist: manifests, resuming, and the final folder."""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from transformers import Trainer

from llm_unlearn.errors import UserError

logger = logging.getLogger(__name__)

MANIFEST, RUN_STATE, RECORD = "manifest.json", "unlearning_state.json", "unlearning.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
_STAGING = ".saving"


def write_manifest(folder):
    """List every file of a folder with its size and sha256; written last, it makes the checkpoint exist.

    Args:
        folder: checkpoint folder.
    """
    folder = Path(folder)
    partial = folder / (MANIFEST + ".partial")
    partial.unlink(missing_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    listed = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
    partial.write_text(json.dumps({"files": listed}, indent=1), encoding="utf-8")
    os.replace(partial, folder / MANIFEST)


def incompleteness(folder):
    """Return why a checkpoint cannot be trusted, or None where each listed file is there as it was written.

    Args:
        folder: checkpoint folder.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        facts = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except OSError:
        return f"it has no {MANIFEST}, so that it was never finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not as it was written"
    for name, (size, sha256) in facts.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _sha256(path) != sha256:
            return f"{name} is not as it was written"
    return None


def checkpoints_of(output_dir):
    """Return the checkpoint-N folders below a directory, newest (highest N) first."""
    found = Path(output_dir).glob("checkpoint-*") if Path(output_dir).is_dir() else []
    named = [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)]
    numbered = [(int(path.name.split("-")[1]), path) for path in named]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_complete(output_dir):
    """Return the newest checkpoint whose manifest holds, or None; each one passed over is named in a warning."""
    for path in checkpoints_of(output_dir):
        reason = incompleteness(path)
        if reason is None:
            return path
        logger.warning("passing over %s: %s", path, reason)
    return None


class CheckpointedTrainer(Trainer):
    """A Trainer whose checkpoints carry a manifest, and which resumes only from one whose manifest holds."""

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
        """
        checkpoint = self._resolve(resume_from_checkpoint)
        if checkpoint is not None:
            self._require_same_run(checkpoint)
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def non_finite_message(self, what, happened="the update was not applied"):
        """Return the sentence for a NaN or an infinity: the step and the last good checkpoint."""
        last = newest_complete(self.args.output_dir)
        return (
            f"{what} is not finite at step {self.state.global_step + 1}; {happened}. Last good checkpoint: "
            f"{last or 'none'}. A lower --learning_rate, fewer steps or a bounded method (npo, simnpo) may help"
        )

    def run_state(self):
        """Return what a resumed run must share with the run that wrote the checkpoint."""
        args = self.args
        return {
            "trainer": type(self).__name__,
            "seed": args.data_seed if args.data_seed is not None else args.seed,
            "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "streams": self.train_dataset.fingerprints if self.train_dataset is not None else {},
        }

    def _resolve(self, wanted):
        if wanted in (None, False, "False", "false"):
            return None
        if wanted in (True, "True", "true", "auto"):
            found = newest_complete(self.args.output_dir)
            if found is None and wanted != "auto":
                raise UserError(
                    f"--resume_from_checkpoint True: '{self.args.output_dir}' holds no complete checkpoint; "
                    "pass auto to start anew"
                )
            return None if found is None else str(found)
        reason = incompleteness(wanted)
        if reason is not None:
            raise UserError(f"--resume_from_checkpoint '{wanted}' cannot be used: {reason}")
        return str(wanted)

    def _require_same_run(self, checkpoint):
        path = Path(checkpoint) / RUN_STATE
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for field, value in self.run_state().items():
            if before.get(field) != value:
                shown = "has other contents" if field == "streams" else f"was {before.get(field)} and is {value}"
                raise UserError(f"cannot resume from '{checkpoint}': {field} {shown}; start anew or restore it")

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # A pickle of the arguments, which nothing here reads; unlearning.json says the same in plain text.
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model, trial):
        """Write a checkpoint, then its manifest, and only then rotate older ones away."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (folder / RUN_STATE).write_text(json.dumps(self.run_state(), indent=1), encoding="utf-8")
            write_manifest(folder)
            self._rotate(limit)
        self.accelerator.wait_for_everyone()

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
                shutil.rmtree(path, ignore_errors=True)


def save_final(trainer, texts):
    """Write the finished model into `output_dir`: complete in a staging folder first, then moved into place.

    All processes call it.

    Args:
        trainer: CheckpointedTrainer after training.
        texts: {file name: contents} to write beside the weights.
    Raises:
        RuntimeError: if the backend wrote no weights.
    """
    output_dir = Path(trainer.args.output_dir)
    staging = output_dir / _STAGING
    if trainer.args.should_save:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(staging), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        if not any(staging.glob("*.safetensors")):
            raise RuntimeError(f"{staging} holds no weights after saving; the checkpoints beside it are untouched")
        for name, contents in texts.items():
            (staging / name).write_text(contents, encoding="utf-8")
        trainer.state.save_to_json(str(staging / "trainer_state.json"))
        write_manifest(staging)
        _move_into_place(staging, output_dir)
    trainer.accelerator.wait_for_everyone()


def _move_into_place(staging, output_dir):
    (output_dir / MANIFEST).unlink(missing_ok=True)
    for pattern in _WEIGHTS:
        for stale in output_dir.glob(pattern):
            stale.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name == MANIFEST):
        target = output_dir / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    staging.rmdir()


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
