"""The light evaluation during training: plain NLL and probability of each set, exact over all processes."""

import torch

from llm_unlearn.data.plan import FILLER
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.head import wide_dtype
from llm_unlearn.head_reading import score_streams


@torch.no_grad()
def stream_likelihoods(trainer, streams):
    """Score sets under the trainer's model.

    Args:
        trainer: UnlearnTrainer; all processes call together and score a share of the rows each.
        streams: {name: tokenized rows}.
    Returns:
        {"<name>_nll": nats per counted token, "<name>_probability": mean over rows of exp(mean log-probability)}.
    """
    model = trainer.model_wrapped
    was_training = model.training
    model.eval()
    try:
        results = {}
        for name, rows in streams.items():
            nll, tokens, probability, count = _sums(trainer, model, name, rows).tolist()
            results[f"{name}_nll"], results[f"{name}_probability"] = nll / tokens, probability / count
        return results
    finally:
        model.train(was_training)


def _sums(trainer, model, name, rows):
    """Sum (NLL, tokens, probabilities, rows) over all processes."""
    args, dataset = trainer.args, UnlearnDataset({name: rows})
    by_length = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))
    size = args.per_device_eval_batch_size
    step = size * args.world_size
    sums = torch.zeros(4, device=args.device, dtype=wide_dtype(args.device))
    for start in range(0, len(rows), step):
        first = start + args.process_index * size
        mine = by_length[first : first + size]
        # Every process runs the same number of forwards, because sharded weights are gathered together.
        mine += [FILLER] * (size - len(mine)) if args.world_size > 1 else []
        batch = trainer.data_collator([dataset[(name, row)] for row in mine])
        batch = trainer._prepare_inputs(batch)
        output = score_streams(trainer.reader, model, batch, (name,), trainer.data_collator.pad_token_id)[name]
        counted = output.mask.any(-1)
        sums += torch.stack(
            [
                -output.logps.sum(dtype=sums.dtype),
                output.mask.sum(dtype=sums.dtype),
                (output.mean_logps().exp() * counted).sum(dtype=sums.dtype),
                counted.sum(dtype=sums.dtype),
            ]
        )
    return trainer.accelerator.reduce(sums, "sum")
