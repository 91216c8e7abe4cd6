"""Which rows meet in which batch: a pure function of (seed, epoch, global batch number)."""

import math
from functools import lru_cache

import torch

FILLER = -1
_STREAM_SEEDS = 1_000_003


class BatchPlan(torch.utils.data.Sampler):
    """Batch sampler over several streams, cut by rank by itself.

    The anchor stream (forget) is permuted anew in every epoch and sets its length; every other stream runs through its
    own permutations without regard to epochs, `ratio` rows for each anchor row. The rows of an optimizer step are the
    same however it is cut into processes and micro-batches. Where rows do not divide, the batch is filled with
    zero-weight rows (number -1), never with repeated ones. Accelerate must not prepare the loader: the plan has cut
    it already.

    Args:
        sizes: {stream: number of rows}, the anchor first.
        seed: of all permutations.
        batch_size: anchor rows per device and micro-batch.
        world_size: number of processes.
        rank: of this process.
        ratio: {stream: rows per anchor row}; 1 where missing.
    """

    def __init__(self, sizes, seed, batch_size, world_size=1, rank=0, ratio=None):
        self.sizes, self.seed, self.batch_size = dict(sizes), seed, batch_size
        self.world_size, self.rank = world_size, rank
        self.ratio = {name: (ratio or {}).get(name, 1) for name in self.sizes}
        self.anchor = next(iter(self.sizes))
        self.epoch = 0
        self.is_finished = False

    def set_epoch(self, epoch):
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    def __len__(self):
        return math.ceil(self.sizes[self.anchor] / (self.batch_size * self.world_size))

    def __iter__(self):
        for number in range(0 if self.is_finished else len(self)):
            yield self.batch(self.epoch, number, self.rank)

    def batch(self, epoch, number, rank):
        """Return the rows of one micro-batch of one rank.

        Args:
            epoch: from 0.
            number: of the micro-batch in the epoch, from 0.
            rank: of the process.
        Returns:
            list of (stream, row number), anchor rows first; row -1 is a zero-weight filler.
        """
        first = (number * self.world_size + rank) * self.batch_size
        slots = range(first, first + self.batch_size)
        rows = []
        for stream in self.sizes:
            for slot in slots:
                rows += [(stream, row) for row in self._rows(stream, epoch, slot)]
        return rows

    def _rows(self, stream, epoch, slot):
        anchor_size, size, ratio = self.sizes[self.anchor], self.sizes[stream], self.ratio[stream]
        if slot >= anchor_size:
            return [FILLER] * ratio
        if stream == self.anchor:
            return [permutation(self.seed, stream, epoch, size)[slot]]
        positions = range((epoch * anchor_size + slot) * ratio, (epoch * anchor_size + slot + 1) * ratio)
        return [permutation(self.seed, stream, position // size, size)[position % size] for position in positions]


@lru_cache(maxsize=16)
def permutation(seed, stream, cycle, size):
    """Return the order in which a stream's rows come in one cycle.

    Args:
        seed: int.
        stream: its name; streams of equal size get different orders.
        cycle: how many times the stream has been run through.
        size: number of rows.
    Returns:
        list of row numbers, each once.
    """
    mixed = seed
    for byte in f"{stream}:{cycle}".encode():
        mixed = (mixed * _STREAM_SEEDS + byte) % 2**63
    return torch.randperm(size, generator=torch.Generator().manual_seed(mixed)).tolist()
