"""A rank that kills itself with SIGKILL at a chosen moment: at its n-th write while saving, or before a micro-batch.

Writes are counted by an audit hook on what Python does to files below the output directory, whatever their names, and
by wrappers around torch.save and safetensors, which write from native code. They count only inside a save: of a
checkpoint, or of the finished model.
"""

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
PHASES = ("checkpoint", "final", "micro_batch")


@dataclass
class Watch:
    """What `ranks.Ranks(prepare=...)` calls in each rank: count the events of a run, and kill it at one of them.

    Attributes:
        output_dir: of the run.
        record: file that gets a line for each event, `{"rank", "phase", "number", "what"}`, and lies elsewhere.
        rank: which one dies.
        phase: "checkpoint", "final" or "micro_batch"; None kills nobody.
        number: of the event of that phase, from 1.
        torn: leave the file of that event half-written instead of untouched.
    """

    output_dir: str
    record: str
    rank: int = 0
    phase: str | None = None
    number: int = 0
    torn: bool = False

    def __call__(self, rank):
        self.is_ours = rank == self.rank
        self.number_of_rank, self.current, self.is_busy = rank, None, False
        self.counts = dict.fromkeys(PHASES, 0)
        self.lines = os.open(self.record, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._follow_phases()
        self._wrap_native_writers()
        sys.addaudithook(self._on_audit)

    def happen(self, phase, what, path=None, tear=None):
        """Count an event that is about to happen, and die of it where it is the chosen one."""
        self.counts[phase] += 1
        number = self.counts[phase]
        line = {"rank": self.number_of_rank, "phase": phase, "number": number, "what": f"{what} {path or ''}".strip()}
        os.write(self.lines, (json.dumps(line) + "\n").encode())
        if self.is_ours and (phase, number) == (self.phase, self.number):
            if self.torn and tear is not None:
                tear()
            os.kill(os.getpid(), signal.SIGKILL)

    def _follow_phases(self):
        """Know when a checkpoint is written and when the finished model, from the Trainer's own methods."""
        from llm_unlearn.trainer import UnlearnTrainer as trainer

        save, train, step = trainer._save_checkpoint, trainer.train, trainer.training_step

        def saving(*args, **kwargs):
            self.current = "checkpoint"
            try:
                return save(*args, **kwargs)
            finally:
                self.current = None

        def training(*args, **kwargs):
            result = train(*args, **kwargs)
            self.current = "final"
            return result

        def stepping(*args, **kwargs):
            self.happen("micro_batch", "training_step")
            return step(*args, **kwargs)

        trainer._save_checkpoint, trainer.train, trainer.training_step = saving, training, stepping

    def _wrap_native_writers(self):
        import safetensors.torch
        import torch

        self._wrap(torch, "save", 1)
        self._wrap(safetensors.torch, "serialize_file", 1)

    def _wrap(self, module, name, position):
        original = getattr(module, name)

        def write(*args, **kwargs):
            path = args[position] if len(args) > position else kwargs.get("f", kwargs.get("filename"))

            def tear():
                original(*args, **kwargs)
                os.truncate(path, os.path.getsize(path) // 2)

            if self._counts(path):
                self._quietly(lambda: self.happen(self.current, name, path, tear))
            return original(*args, **kwargs)

        setattr(module, name, write)

    def _on_audit(self, event, args):
        if self.current is None or self.is_busy or (event not in CHANGES and event != "open"):
            return
        path, flags = args[0], args[2] if event == "open" else None
        if event == "open" and not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)):
            return
        self._quietly(lambda: self._audited(event, path, args))

    def _audited(self, event, path, args):
        # shutil.rmtree removes by the name within an open folder.
        folder = next((fd for fd in args[1:] if event in ("os.remove", "os.rmdir") and isinstance(fd, int)), -1)
        if folder >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
        if self._counts(path) and not (event == "os.mkdir" and os.path.isdir(path)):
            empty = (lambda: Path(path).write_bytes(b"")) if event == "open" else None
            self.happen(self.current, event, path, empty)

    def _counts(self, path):
        if self.current is None or not isinstance(path, str | bytes | os.PathLike):
            return False
        return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self.output_dir)

    def _quietly(self, function):
        """Call a function whose own use of files is not counted."""
        self.is_busy = True
        try:
            function()
        finally:
            self.is_busy = False


def events(record, rank=0):
    """Return {phase: [event, ...]} of a rank, in order."""
    lines = [json.loads(line) for line in Path(record).read_text().splitlines()] if Path(record).is_file() else []
    return {phase: [line for line in lines if (line["phase"], line["rank"]) == (phase, rank)] for phase in PHASES}
