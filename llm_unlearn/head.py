"""From streams to one forward and back: which positions count, and what a forward pass says about them."""
# Shapes: B sequences, T tokens, D hidden size, N counted positions.

from dataclasses import dataclass, field

import torch

from llm_unlearn.data.tokenize import IGNORED


@dataclass
class StreamOutput:
    """What a forward pass says about one stream.

    Attributes:
        logps: (B, T-1) log-probability of each token but the first, nats, float32 at least; 0 where it does not count.
        mask: (B, T-1) bool, True where the token counts.
        weights: (B, T-1) token weights, or None where all are 1.
        kl: (B, T-1) divergence from the reference's distribution at each counted token, nats; None unless asked for.
        entropy: (B, T-1) of the distribution at each counted token, nats; None unless asked for.
        uniform: (B, T-1) cross-entropy of the uniform distribution under that one, nats; likewise.
        of_logits: (B, T-1) what a function of the logits, given to the forward, says of each counted token; likewise.
        hidden: {decoder layer: (B, T-1, D)} its output at each token but the first itself; empty unless asked for.
        index: (B,) row numbers, -1 for fillers.
    """

    logps: torch.Tensor
    mask: torch.Tensor
    weights: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    uniform: torch.Tensor | None = None
    of_logits: torch.Tensor | None = None
    hidden: dict = field(default_factory=dict)
    index: torch.Tensor | None = None

    @classmethod
    def of(cls, stream, logps, kl=None, entropy=None, uniform=None, of_logits=None):
        """Spread values of counted tokens over a stream's rows.

        Args:
            stream: one stream of an UnlearnBatch.
            logps, kl, entropy, uniform, of_logits: (N,) in the order of `counted_positions`, or None.
        Returns:
            StreamOutput.
        """
        mask, weights = counted_positions(stream), stream.get("weights")
        given = (logps, kl, entropy, uniform, of_logits)
        spread = [None if values is None else scatter(values, mask) for values in given]
        weights = None if weights is None else weights[:, 1:]
        return cls(spread[0], mask, weights, *spread[1:], index=stream.get("index"))

    @classmethod
    def blank(cls, stream):
        """Return the output of a stream that no forward was spent on: zeros without a gradient."""
        mask = counted_positions(stream)
        return cls.of(stream, torch.zeros(int(mask.sum()), device=mask.device))

    def sequence_logps(self):
        """(B,) summed log-probability of each sequence, nats; token weights apply."""
        return (self.logps if self.weights is None else self.logps * self.weights).sum(-1)

    def mean_logps(self):
        """(B,) log-probability of each sequence per counted token, nats; 0 for a filler row."""
        tokens = self.mask.sum(-1) if self.weights is None else (self.mask * self.weights).sum(-1)
        return self.sequence_logps() / torch.where(tokens > 0, tokens, torch.ones_like(tokens))

    def summed(self, values):
        """Sum what counts of values (B,) per sequence or (B, T-1) per token, token weights applied.

        Returns:
            (scalar, 0 for sequences or 1 for tokens: the entry of `counts` to divide by).
        """
        if values.dim() == 1:
            return values.masked_fill(~self.mask.any(-1), 0.0).sum(), 0
        values = values.masked_fill(~self.mask, 0.0)
        return (values if self.weights is None else values * self.weights).sum(), 1

    def counts(self):
        """(2,) float64: sequences with a counted token, and counted tokens (their weights where given)."""
        return _counts(self.mask, self.weights)


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


def split(stacked, inputs, streams):
    """Cut what a forward of `concatenate`'s batch returned into the streams' own rows and columns.

    Args:
        stacked: (B, T, ...) hidden states or logits.
        inputs: UnlearnBatch.
        streams: names, in the order of the stack.
    Returns:
        {stream: its part, (its B, its T, ...)}.
    """
    parts, first = {}, 0
    for name in streams:
        rows, width = inputs[name]["input_ids"].shape
        parts[name] = stacked[first : first + rows, :width]
        first += rows
    return parts


def counted_positions(stream):
    """Return (B, T-1) bool: at [:, t] whether the token at t + 1, which the state at t predicts, counts."""
    return stream["labels"][:, 1:] != IGNORED


def counted_labels(stream):
    """Return (N,) int64: the tokens that count, row by row."""
    return stream["labels"][:, 1:][counted_positions(stream)]


def counted_weights(stream):
    """Return (N,) float32: the weights of the tokens that count, 1 where the stream has none."""
    mask = counted_positions(stream)
    if "weights" in stream:
        return stream["weights"][:, 1:][mask]
    return torch.ones(int(mask.sum()), device=mask.device)


def counted_states(states, stream):
    """Return (N, D): the states (B, T, D) that predict the tokens that count, row by row."""
    return states[:, :-1][counted_positions(stream)]


def own_states(states):
    """Return (B, T-1, D): the states (B, T, D) of the tokens themselves, the first of each row left out.

    It has no likelihood, so that both kinds of losses count the same tokens, and it draws the attention of all others,
    with a state many times as long as theirs.
    """
    return states[:, 1:]


def counts(stream):
    """Count what a stream's batch contributes to the global average.

    Args:
        stream: one stream of an UnlearnBatch.
    Returns:
        (2,) float64 tensor: sequences with a counted token, and counted tokens (their weights where given).
    """
    weights = stream["weights"][:, 1:] if "weights" in stream else None
    return _counts(counted_positions(stream), weights)


def divisors(counted):
    """Return counts to divide by: those of nothing become 1."""
    return torch.where(counted > 0, counted, torch.ones_like(counted))


def scatter(values, mask):
    """Put (N,) values where a (B, T) mask is True, row by row, and 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def wide_dtype(device):
    """Return float64, or float32 on Apple's GPUs, which have no wider type."""
    return torch.float32 if device.type == "mps" else torch.float64


def _counts(mask, weights):
    tokens = mask.sum() if weights is None else (mask * weights).sum()
    return torch.stack([mask.any(-1).sum(), tokens]).to(wide_dtype(mask.device))
