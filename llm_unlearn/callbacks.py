"""What happens around a step: the epoch of the plan, the check of the gradients, the warning about warm-up."""

import logging

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from llm_unlearn.errors import NonFiniteError

logger = logging.getLogger(__name__)


class PlanEpoch(TrainerCallback):
    """Set the epoch on the plan of batches itself; the Trainer's own way reaches it on one process only."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the averages of the logged terms at the step where training starts, which a resume moves."""
        self.trainer.reset_terms(state.global_step)

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
            norms = torch._foreach_norm([g for g in gradients if g.numel()])
            norm = torch.stack(norms).sum() if norms else torch.zeros((), device=args.device)
            norm = trainer.accelerator.reduce(norm, "sum")
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
