"""Labels that a model draws from its own distributions, as its head makes them."""
# Shapes: N counted tokens of a stream, C of a chunk, n of a block, D hidden size, V vocabulary.

import torch

from llm_unlearn.chunked_head import token_scores
from llm_unlearn.head import counted_positions
from llm_unlearn.projection import Projection

_BLOCK = 256
"""Tokens of a row whose labels are drawn with one seed; it bounds the random numbers that are held."""


def drawn_labels(logits, seed, count=None, first=0):
    """Draw a label from each token's distribution.

        y = argmax_v (z_v - log e_v),   e_v ~ Exp(1)

    Args:
        logits: (n, V).
        seed: int, of a block of tokens; the same seed and block draw the same on a device, and logits that differ by a
            rounding draw the same label but for one time in very many.
        count: tokens of the block; None: those that there are.
        first: which token of the block the first one is.
    Returns:
        (n,) int64.
    """
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    generator = torch.Generator(scores.device).manual_seed(seed)
    waits = scores.new_empty(len(scores) if count is None else count, scores.shape[-1])
    waits = waits.exponential_(generator=generator)[first : first + len(scores)]
    return (scores - waits.clamp_(min=torch.finfo(scores.dtype).tiny).log_()).argmax(-1)


class LabelDraws:
    """The labels of a stream's counted tokens, row by row, drawn from their logits as these come.

    Args:
        stream: one stream of an UnlearnBatch.
        seed: function of (number of a row, number of a token in it) that returns the seed of a block of tokens.
    """

    def __init__(self, stream, seed):
        self.blocks, place = [], 0
        for index, count in zip(stream["index"].tolist(), counted_positions(stream).sum(1).tolist(), strict=True):
            for start in range(0, count, _BLOCK):
                self.blocks.append((place + start, min(_BLOCK, count - start), seed(index, start)))
            place += count
        self.total, self.device = place, stream["labels"].device

    def blank(self):
        """Return (N,) int64 to write the labels into."""
        return torch.zeros(self.total, dtype=torch.long, device=self.device)

    @torch.no_grad()
    def __call__(self, logits, part):
        """Return (C,) labels for the logits (C, V) of a slice of the tokens."""
        found = []
        for first, count, seed in self.blocks:
            start, stop = max(first, part.start), min(first + count, part.stop)
            if start < stop:
                own = logits[start - part.start : stop - part.start]
                found.append(drawn_labels(own, seed, count, start - first))
        return torch.cat(found)


def scores_of_drawn(head, hidden, labels, factors):
    """Return (N,) log-probabilities of labels that are drawn on the way.

    Args:
        head: head_reading.Head.
        hidden: (N, D) counted states.
        labels: LabelDraws.
        factors: (N,) of the log-probabilities in the loss.
    """
    drawn = labels.blank()
    if not head.is_dense and head.is_plain() and not head.softcap:
        own = Projection(head.module.weight, head.module.bias, head.scale)
        return token_scores(hidden, own, drawn, linear=factors, draw=labels).reshape(-1)
    with torch.no_grad():
        for start in range(0, len(hidden), _BLOCK):
            part = slice(start, min(start + _BLOCK, len(hidden)))
            drawn[part] = labels(head.logits(hidden[part]), part)
    return head.scores(hidden, drawn, linear=factors).reshape(-1)
