"""From streams to one forward and back: per-token log-probabilities at the positions that count."""
# Shapes: B sequences, T tokens, V vocabulary, N counted positions.

from dataclasses import dataclass

import torch

from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.objectives.likelihood import kl_divergence, token_logps


@dataclass
class StreamOutput:
    """What a forward pass says about one stream.

    Attributes:
        logps: (B, T-1) log-probability of each token but the first, nats, float32 at least; 0 where it does not count.
        mask: (B, T-1) bool, True where the token counts.
        logits: (N, V) at the counted positions, row by row; None unless asked for.
        weights: (B, T-1) token weights, or None where all are 1.
    """

    logps: torch.Tensor
    mask: torch.Tensor
    logits: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def sequence_logps(self):
        """(B,) summed log-probability of each sequence, nats; token weights apply."""
        return (self.logps if self.weights is None else self.logps * self.weights).sum(-1)

    def mean_logps(self):
        """(B,) log-probability of each sequence per counted token, nats; 0 for a filler row."""
        tokens = self.mask.sum(-1) if self.weights is None else (self.mask * self.weights).sum(-1)
        return self.sequence_logps() / torch.where(tokens > 0, tokens, torch.ones_like(tokens))

    def counts(self):
        """(2,) float64: sequences with a counted token, and counted tokens (their weights where given)."""
        return _counts(self.mask, self.weights)

    def kl_from(self, reference):
        """(B, T-1) KL divergence from the reference's distribution to this one at each counted token, nats.

        Args:
            reference: StreamOutput of the same rows with its logits.
        """
        return _scatter(kl_divergence(self.logits, reference.logits), self.mask)


def concatenate(inputs, streams, pad_token_id):
    """Stack streams into one batch, so that every process issues one forward a step.

    Args:
        inputs: UnlearnBatch.
        streams: names, in order.
        pad_token_id: fills the shorter streams on the right.
    Returns:
        (input_ids (B, T), attention_mask (B, T)).
    """
    width = max(inputs[name]["input_ids"].shape[1] for name in streams)

    def stacked(column, value):
        parts = [inputs[name][column] for name in streams]
        return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=value) for part in parts])

    return stacked("input_ids", pad_token_id), stacked("attention_mask", 0)


def split_outputs(logits, inputs, streams, keep_logits=()):
    """Read each stream's log-probabilities off the logits of the stacked batch.

    Args:
        logits: (B, T, V) of `concatenate`'s batch; the logits at t predict the token at t + 1.
        inputs: UnlearnBatch.
        streams: names, in the order of the stack.
        keep_logits: names of the streams whose logits at counted positions are wanted.
    Returns:
        {stream: StreamOutput}.
    """
    outputs, first = {}, 0
    for name in streams:
        labels = inputs[name]["labels"][:, 1:]
        mask = labels != IGNORED
        counted = logits[first : first + len(labels), : labels.shape[1]][mask]
        first += len(labels)
        weights = inputs[name].get("weights")
        outputs[name] = StreamOutput(
            logps=_scatter(token_logps(counted, labels[mask]), mask),
            mask=mask,
            logits=counted if name in keep_logits else None,
            weights=None if weights is None else weights[:, 1:],
        )
    return outputs


def counts(stream):
    """Count what a stream's batch contributes to the global average.

    Args:
        stream: one stream of an UnlearnBatch.
    Returns:
        (2,) float64 tensor: sequences with a counted token, and counted tokens (their weights where given).
    """
    weights = stream["weights"][:, 1:] if "weights" in stream else None
    return _counts(stream["labels"][:, 1:] != IGNORED, weights)


def _counts(mask, weights):
    tokens = mask.sum() if weights is None else (mask * weights).sum()
    return torch.stack([mask.any(-1).sum(), tokens]).to(wide_dtype(mask.device))


def wide_dtype(device):
    """Return float64, or float32 on Apple's GPUs, which have no wider type."""
    return torch.float32 if device.type == "mps" else torch.float64


def _scatter(values, mask):
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
