"""One forward and backward for each stream of a micro-batch, in place of one for all of them."""

import contextlib

from torch.nn.parallel import DistributedDataParallel


def in_turns(trainer, step, streams, model, inputs, num_items_in_batch):
    """Run a training step once for each stream: the same gradients, summed, or kept apart for the gradient filter.

    Args:
        trainer: StreamTrainer; `runs` is True of one stream at a time meanwhile.
        step: transformers' own training_step of that trainer.
        streams: names in the order of their turns.
        model: the wrapped model.
        inputs: UnlearnBatch.
        num_items_in_batch: see `total_loss`.
    Returns:
        scalar loss of all turns together.
    """
    state, keeper, loss = trainer.accelerator.gradient_state, trainer.gradient_filter, 0.0
    is_last_micro_batch = state.sync_gradients
    try:
        for name in streams:
            trainer.take_turns(name)
            is_last = name == streams[-1]
            if keeper is None:
                # DeepSpeed would step, and DDP would reduce, after each of the backwards.
                state._set_sync_gradients(is_last_micro_batch and is_last)
            waits = keeper is None and isinstance(model, DistributedDataParallel) and not is_last
            apart = contextlib.nullcontext() if keeper is None else keeper.turn_of(name, model)
            with apart, model.no_sync() if waits else contextlib.nullcontext():
                loss = loss + step(model, inputs, num_items_in_batch)
    finally:
        trainer.take_turns(None)
        state._set_sync_gradients(is_last_micro_batch)
    if keeper is not None and is_last_micro_batch:
        keeper.combine()
    return loss
