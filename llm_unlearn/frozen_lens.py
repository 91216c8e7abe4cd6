"""The lens of a training run: made of the model as it starts, frozen, read at hidden states that carry gradients."""
# Shapes: B sequences, T tokens, D hidden size, N counted positions.

import torch

from llm_unlearn.head import counted_positions, counted_weights, scatter
from llm_unlearn.lens import TunedLens, gathered, whole_copies
from llm_unlearn.lens_files import base_model_identity, read_lens
from llm_unlearn.objectives.entropy import max_entropy

LOGIT = "logit"


def frozen_lens(trainer, layers):
    """Return the lens that `--lens_path` names, checked against the trainer's model; all processes together.

    Args:
        trainer: UnlearnTrainer whose model has not trained yet, with the flags lens_path and allow_pickle_lens.
        layers: decoder layers whose output it will read.
    Returns:
        TunedLens without gradients of its own, narrowed where the run computes in bfloat16.
    Raises:
        UserError: a model that no lens can be had of, or the lens of another one.
    """
    args, is_partitioned = trainer.args, trainer.zero_stage() == 3
    lens = TunedLens.of(trainer.model, copies=lambda parts: whole_copies(parts, trainer))
    if not is_partitioned:
        trainer.on_first_rank(lambda: lens.require_agreement(trainer.model))
    if args.lens_path != LOGIT:
        # The last layer's output goes to the model's own norm and head.
        indices = [layer + 1 for layer in layers if layer + 1 < lens.num_layers]
        stored = read_lens(args.lens_path, lens, indices, args.allow_pickle_lens, args.hub_token)
        if is_partitioned:
            stored.require_model(base_model_identity(trainer.model, lambda parts: gathered(parts, 3)))
        else:
            # A loader that spares the host's memory fills the weights of the first process only.
            trainer.on_first_rank(lambda: stored.require_model(base_model_identity(trainer.model)))
        lens.add_translators(indices, stored.translators)
    if args.autocast_in_forward or trainer.accelerator.mixed_precision == "bf16":
        lens.narrow(torch.bfloat16)
    return lens.requires_grad_(False)


def lens_entropy(trainer, lens, layer, hidden, stream, top_k=None):
    """Return (B, T-1) `max_entropy` of each token's own state through a lens; 0 where a token does not count.

    Args:
        trainer: UnlearnTrainer.
        lens: TunedLens.
        layer: index of a decoder layer, from 0.
        hidden: (B, T-1, D) what it hands on at every token but the first.
        stream: one stream of an UnlearnBatch.
        top_k: how many of the largest logits are read; None reads all.
    """
    counted = counted_positions(stream)
    states, labels = hidden[counted], stream["labels"][:, 1:][counted]
    with trainer.reference_autocast(is_plain_module=True):
        wanted = {"uniform": True, "top_k": top_k, "linear": counted_weights(stream)}
        values = lens.scores(layer + 1, states, labels, **wanted)[-1]
    return max_entropy(scatter(values, counted), top_k or len(lens.head_weight))
