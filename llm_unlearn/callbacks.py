"""What happens around a step: where a resumed run goes on, the epoch of the plan, the gradients, the warm-up."""

import logging

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from llm_unlearn.errors import NonFiniteError
from llm_unlearn.resuming import read_method_state, read_state, restore_unlogged_sums

logger = logging.getLogger(__name__)


class Continuation(TrainerCallback):
    """Give a resumed run, before its first step, what transformers does not bring back.

    Args:
        trainer: CheckpointedTrainer that is about to train.
        checkpoint: folder that it resumes from, or None.
    """

    def __init__(self, trainer, checkpoint):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **kwargs):
        """Restore the method's tensors and the averages since the last log line; evaluate if that was left to do.

        Raises:
            UserError: the checkpoint holds other tensors than the method has.
        """
        if self.checkpoint is None:
            return
        trainer, saved = self.trainer, read_state(self.checkpoint)
        # transformers takes these from the checkpoint, so that another --save_steps would go unheard.
        state.compute_steps(args, state.max_steps)
        trainer.load_method_state(read_method_state(self.checkpoint, trainer.method_state()))
        if saved.get("unlogged"):
            restore_unlogged_sums(trainer, saved["unlogged"])
        if saved.get("evaluation_due") and args.eval_strategy != "no":
            trainer._determine_best_metric(trainer._evaluate(None, None), None)
            trainer.name_best_checkpoint()


class PlanEpoch(TrainerCallback):
    """Set the epoch on the plan of batches itself; the Trainer's own way reaches it on one process only."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the averages of the logged terms at the step where training starts, which a resume moves."""
        self.trainer.reset_terms(state.global_step)
        if self.trainer.truncation is not None and args.gradient_checkpointing:
            # It makes the embedding's output require gradients, which takes the backward through every frozen layer.
            self.trainer.reader.language_model.disable_input_require_grads()

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Derive the epoch from the step, so that a resumed run continues in the epoch where it stopped."""
        plan = self.trainer.plan
        updates_per_epoch = -(-len(plan) // args.gradient_accumulation_steps)
        plan.set_epoch(state.global_step // updates_per_epoch)
        # Resuming at the last step, transformers 5 would train one step more.
        plan.is_finished = state.global_step >= state.max_steps


class FiniteGradients(TrainerCallback):
    """Stop before the step when a gradient is NaN or infinite.

    DeepSpeed steps inside its backward: there the norm is checked after the step, and the run stops unsaved. With fp16
    the gradient scaler skips such steps itself.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Sum the norms of all gradients over all processes, and look at the sum.

        Raises:
            NonFiniteError: naming the step and the last good checkpoint.
        """
        trainer = self.trainer
        if args.fp16:
            return
        if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
            norm = torch.as_tensor(float(trainer.model_wrapped.get_global_grad_norm() or 0.0))
            happened = "the update of this step was applied in memory, nothing was saved after it"
        else:
            gradients = [p.grad for p in trainer.model_wrapped.parameters() if p.grad is not None]
            gradients = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
            if not gradients:
                raise RuntimeError("no parameter has a gradient after the backward: nothing would be trained")
            held = [g for g in gradients if g.numel()]
            norm = torch.stack(torch._foreach_norm(held)).sum() if held else torch.zeros((), device=args.device)
            # With offloading the gradients are on the CPU, which has no collectives beside a GPU's.
            norm = trainer.accelerator.reduce(norm.to(args.device), "sum")
            happened = "the update was not applied"
        if not torch.isfinite(norm):
            raise NonFiniteError(trainer.non_finite_message("a gradient", happened))


class WarmupWarning(TrainerCallback):
    """Warn when warm-up leaves no step, or no full step, with the learning rate that was asked for."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Compare the warm-up steps with all steps."""
        warmup = args.get_warmup_steps(state.max_steps)
        if warmup >= state.max_steps and state.is_world_process_zero:
            lost = (
                "the only step has learning rate 0: the model will not change"
                if state.max_steps == 1
                else ("the learning rate never reaches its full value")
            )
            logger.warning(
                "warm-up takes %d of %d steps, so that %s; pass --warmup_ratio 0, fewer "
                "--gradient_accumulation_steps or more --num_train_epochs",
                warmup, state.max_steps, lost,
            )  # fmt: skip
