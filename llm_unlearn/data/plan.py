"""Which rows meet in which batch: a pure function of (seed, epoch, global batch number)."""

import bisect
import itertools
import math
from functools import lru_cache

import torch

FILLER = -1
WINDOW_STEPS = 20
"""Optimizer steps whose rows are ordered by length together: with 8 rows of TOFU's forget10 and 8 of its retain90 in a
step, 1.08 tokens are then forwarded for each of their own."""

_STREAM_SEEDS = 1_000_003


class BatchPlan(torch.utils.data.Sampler):
    """Batch sampler over several streams, cut by rank by itself.

    The anchor stream (forget) is permuted anew in every epoch and sets its length; every other stream runs through its
    own permutations without regard to epochs, `ratio` rows for each anchor row. The rows of an optimizer step are the
    same however it is cut into processes and micro-batches. Where rows do not divide, the batch is filled with
    zero-weight rows (number -1), never with repeated ones. Accelerate must not prepare the loader: the plan has cut
    it already.

    With `lengths`, the rows of every stream are ordered by length inside windows of whole steps, so that long rows meet
    long ones and little is padded; the steps of a window then come in a random order. Which rows are in a window is
    random as before, and neither windows nor steps depend on how a step is cut. A window ends where a stream has been
    run through, so that two copies of a row do not meet because they are of equal length.

    Args:
        sizes: {stream: number of rows}, the anchor first.
        seed: of all permutations.
        batch_size: anchor rows per device and micro-batch.
        world_size: number of processes.
        rank: of this process.
        ratio: {stream: rows per anchor row}; 1 where missing.
        accumulation: micro-batches of an optimizer step on each process.
        lengths: {stream: tokens of each row}, or None to leave rows in random order.
        window_steps: optimizer steps in a window.
        paired: {stream: the one whose row numbers it takes}; both are equally long, and their rows of one number always
            meet.
        turns: topic of each anchor row: steps hold rows of one topic and take turns; None mixes them. Windows are then
            one step long.
    """

    def __init__(
        self, sizes, seed, batch_size, world_size=1, rank=0, ratio=None, accumulation=1, lengths=None,
        window_steps=WINDOW_STEPS, paired=None, turns=None,
    ):  # fmt: skip
        self.sizes, self.seed, self.batch_size = dict(sizes), seed, batch_size
        self.world_size, self.rank = world_size, rank
        self.ratio = {name: (ratio or {}).get(name, 1) for name in self.sizes}
        self.anchor = next(iter(self.sizes))
        self.lengths, self.turns = lengths, turns
        self.window_steps = window_steps if turns is None else 1
        self.paired = {name: leader for name, leader in (paired or {}).items() if name in self.sizes}
        assert all(self.sizes[name] == self.sizes[leader] for name, leader in self.paired.items())
        self.step_rows = batch_size * world_size * accumulation
        self.epoch = 0
        self.is_finished = False
        self._window = lru_cache(maxsize=4 * len(self.sizes))(self._ordered_window)
        self._window_starts = lru_cache(maxsize=4)(self._starts_of_windows)

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

    def visited(self, num_batches):
        """Return {stream: sorted row numbers} that all processes together read in so many micro-batches of each.

        Args:
            num_batches: micro-batches of one process, counted through the epochs.
        """
        found = {stream: set() for stream in self.sizes}
        for batch in self._all_batches(num_batches):
            for stream, row in batch:
                found[stream].add(row)
        return {stream: sorted(rows - {FILLER}) for stream, rows in found.items()}

    def tokens(self, num_batches, lengths_of, multiple=1):
        """Count what all processes forward in so many micro-batches of each, all streams stacked into one batch.

        Args:
            num_batches: as in `visited`.
            lengths_of: {stream: tokens of each row}.
            multiple: widths are padded to a multiple of it.
        Returns:
            (tokens of the rows, tokens forwarded with padding and fillers).
        """
        real = forwarded = 0
        for batch in self._all_batches(num_batches):
            lengths = [lengths_of[stream][row] for stream, row in batch if row != FILLER]
            real += sum(lengths)
            forwarded += len(batch) * -(-max(lengths, default=2) // multiple) * multiple
        return real, forwarded

    def _all_batches(self, num_batches):
        """Yield the micro-batches of all processes, so many of each, counted through the epochs."""
        for count in range(num_batches):
            epoch, number = divmod(count, len(self))
            for rank in range(self.world_size):
                yield self.batch(epoch, number, rank)

    def _rows(self, stream, epoch, slot):
        stream = self.paired.get(stream, stream)
        ratio = self.ratio[stream]
        if slot >= self.sizes[self.anchor]:
            return [FILLER] * ratio
        if self.lengths is None:
            return self._drawn(stream, epoch, range(slot, slot + 1))
        starts = self._window_starts(epoch)
        window = bisect.bisect_right(starts, slot) - 1
        place = slot - starts[window]
        return self._window(stream, epoch, window)[place * ratio : (place + 1) * ratio]

    def _starts_of_windows(self, epoch):
        """Return the first slot of each window of an epoch; the rest that fills no whole step is one of its own."""
        anchor_size, step = self.sizes[self.anchor], self.step_rows
        whole = anchor_size // step * step
        starts, before, length = [], None, 0
        for first in range(0, whole, step):
            cycles = [
                {(epoch * anchor_size + slot) * self.ratio[stream] // size for slot in (first, first + step - 1)}
                for stream, size in self.sizes.items()
                if stream != self.anchor and stream not in self.paired
            ]
            straddles = any(len(found) > 1 for found in cycles)
            if straddles or cycles != before or length == self.window_steps:
                starts.append(first)
                length = 0
            before, length = None if straddles else cycles, length + 1
        return [*starts, whole] if whole < anchor_size or not starts else starts

    def _ordered_window(self, stream, epoch, window):
        """Return the rows of a window, longest first in a step, the steps shuffled."""
        starts = [*self._window_starts(epoch), self.sizes[self.anchor]]
        slots = range(starts[window], starts[window + 1])
        rows = sorted(self._drawn(stream, epoch, slots), key=lambda row: -self.lengths[stream][row])
        step = self.step_rows * self.ratio[stream]
        steps = [rows[first : first + step] for first in range(0, len(rows), step)]
        order = permutation(self.seed, "steps", epoch * self.sizes[self.anchor] + window, len(steps))
        return [row for number in order for row in steps[number]]

    def _drawn(self, stream, epoch, slots):
        """Return the rows that the permutations deal to slots of an epoch."""
        anchor_size, size, ratio = self.sizes[self.anchor], self.sizes[stream], self.ratio[stream]
        if stream == self.anchor:
            order = permutation(self.seed, stream, epoch, size)
            order = order if self.turns is None else self._taking_turns(order)
            return [order[slot] for slot in slots]
        positions = range((epoch * anchor_size + slots.start) * ratio, (epoch * anchor_size + slots.stop) * ratio)
        return [permutation(self.seed, stream, position // size, size)[position % size] for position in positions]

    def _taking_turns(self, order):
        """Return rows so that whole steps are of one topic, each topic in turn; what fills no step comes last."""
        size, topics = self.step_rows, sorted(set(self.turns))
        rows = [[row for row in order if self.turns[row] == topic] for topic in topics]
        steps = [[part[first : first + size] for first in range(0, len(part), size)] for part in rows]
        rounds = [part for turn in itertools.zip_longest(*steps, fillvalue=[]) for part in turn]
        whole = [row for part in rounds if len(part) == size for row in part]
        return whole + [row for part in rounds if len(part) < size for row in part]


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


def drawn_rows(rows, count, seed):
    """Return so many of the rows, drawn without replacement by the seed, in their order."""
    chosen = permutation(seed, "drawn", 0, len(rows))[:count]
    return [rows[number] for number in sorted(chosen)]
