"""SIGTERM, as a cluster sends it before it takes a machine away: save a checkpoint, stop, and say how to go on."""

import contextlib
import logging
import signal
import threading

import torch
from transformers import TrainerCallback

from llm_unlearn.errors import Terminated

logger = logging.getLogger(__name__)


class Interruption(TrainerCallback):
    """Stop a run at the end of the optimizer step during which a SIGTERM reached any of its processes.

    All processes agree on the step, and the checkpoint is a full one whatever `save_strategy` and `save_only_model`
    are. An evaluation that is due at that step is left to the resumed run, because it may last longer than the time
    that is left.

    Attributes:
        stops: whether the processes have agreed to stop.
        evaluation_due: whether an evaluation was left to the resumed run.

    Args:
        trainer: CheckpointedTrainer that is about to train.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.stops = self.evaluation_due = False
        self._was_told = False

    @contextlib.contextmanager
    def listening(self):
        """Handle SIGTERM while the run trains, and give the signal back to its earlier handler afterwards.

        Raises:
            Terminated: at the end, if the run stopped because of the signal.
        """
        args = self.trainer.args
        kept = args.save_only_model, args.load_best_model_at_end, args.save_total_limit
        # Python delivers signals to the main thread alone, and lets no other set a handler.
        handles = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, self._told) if handles else None
        self.trainer.add_callback(self)
        try:
            yield
        finally:
            self.trainer.remove_callback(self)
            args.save_only_model, args.load_best_model_at_end, args.save_total_limit = kept
            if handles:
                signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
        if self.stops:
            step = self.trainer.state.global_step
            raise Terminated(
                f"stopped by SIGTERM after step {step}; everything is in '{self.trainer.checkpoint_folder()}', pass "
                "--resume_from_checkpoint auto to continue"
            )
        if self._was_told:
            logger.warning("SIGTERM came after the last step; the run finishes, because nothing remains but to save")

    def on_step_end(self, args, state, control, **kwargs):
        """Agree whether to stop; with several processes that is one number summed over them."""
        self.stops = self.stops or self._agreed(args)
        if self.stops:
            self.evaluation_due = control.should_evaluate
            control.should_evaluate = control.should_save = False
            control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        """Have the checkpoint written; the Trainer comes by here in the middle of an epoch too when it stops."""
        if not self.stops:
            return
        if float(state.epoch).is_integer():
            self.evaluation_due = self.evaluation_due or control.should_evaluate
        else:
            control.should_log = False
        control.should_evaluate = False
        control.should_save = True
        args.save_only_model = False

    def on_save(self, args, state, control, **kwargs):
        """Keep the Trainer from what it does when training is over: loading the best model, deleting all others."""
        if self.stops:
            args.load_best_model_at_end, args.save_total_limit = False, None

    def _told(self, signum, frame):
        self._was_told = True

    def _agreed(self, args):
        if args.world_size == 1:
            return self._was_told
        told = torch.tensor(float(self._was_told), device=args.device)
        return bool(self.trainer.accelerator.reduce(told, "sum") > 0)
