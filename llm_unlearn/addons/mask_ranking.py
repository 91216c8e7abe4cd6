"""Which weights have the highest scores: exact counts from histograms of the scores' bits, without a sort."""
# Shapes: E elements of one parameter that are this process's, S parameters, P pools, W processes, R ratios.

from dataclasses import dataclass
from fractions import Fraction

import torch
import torch.distributed as dist

from llm_unlearn.addons import packed_bits
from llm_unlearn.errors import NonFiniteError

_LOW = 16
_COARSE, _FINE = 2**15, 2**_LOW
_NOT_FINITE = 0x7F80
"""First coarse bin of what is infinite or no number."""
_NONE = 2**31 - 1


@dataclass
class Scored:
    """This process's share of the scores of one parameter.

    Attributes:
        name: of the parameter.
        pool: number of the pool in which it is ranked.
        scores: (E,) float32, not negative.
        size: elements of the whole parameter.
    """

    name: str
    pool: int
    scores: torch.Tensor
    size: int

    @property
    def keys(self):
        """(E,) int32 in the order of the scores: the bits of a float that is not negative."""
        return self.scores.view(torch.int32)


@dataclass(frozen=True)
class _Threshold:
    """What is chosen in a pool: keys above `key`, and the first `ties` of those that are equal to it.

    Attributes:
        is_cut: whether not all that are equal are chosen.
    """

    key: int
    ties: int
    is_cut: bool


def share_of(size, processes, rank):
    """Return (first, count): which elements of a flattened parameter are a process's; whole bytes of bits."""
    length = -(-size // (8 * processes)) * 8
    first = min(rank * length, size)
    return first, min(length, size - first)


def coarse_counts(scored, device):
    """Return (P, 32768) int64: how many scores of each pool share the first sixteen bits, over all processes.

    Args:
        scored: list of Scored, the same parameters on every process.
        device: what collectives run on.
    Raises:
        NonFiniteError: a score is infinite or no number.
    """
    counts = torch.zeros(1 + max(part.pool for part in scored), _COARSE, dtype=torch.int64, device=device)
    for part in scored:
        counts[part.pool] += torch.bincount(part.keys >> _LOW, minlength=_COARSE).to(device)
    _sum(counts)
    if counts[:, _NOT_FINITE:].any():
        raise NonFiniteError(
            "a score is not finite: a gradient is, or --gamma is too small for float32; nothing was written"
        )
    return counts


def select(scored, counts, ratios, device):
    """Choose the weights of the highest scores, floor(ratio * size) of each pool; the earlier one where scores tie.

    Earlier is what comes first in the order of the parameters, and inside one in its flattened order.

    Args:
        scored: list of Scored, the same parameters in the same order on every process.
        counts: of `coarse_counts`.
        ratios: list of R fractions.Fraction.
        device: what collectives run on.
    Returns:
        list of R {name: (ceil(E / 8),) uint8 bits of this process's share}.
    """
    pools, sizes = range(len(counts)), counts.sum(1).tolist()
    wanted = [[int(Fraction(ratio) * size) for size in sizes] for ratio in ratios]
    members = [[part for part in scored if part.pool == pool] for pool in pools]
    found = [_thresholds(members[pool], counts[pool], [row[pool] for row in wanted], device) for pool in pools]
    chosen = []
    for number in range(len(ratios)):
        thresholds = [found[part.pool][number] for part in scored]
        before = _ties_before(scored, thresholds, device)
        chosen.append({part.name: _chosen(part, *rest) for part, *rest in zip(scored, thresholds, before, strict=True)})
    return chosen


def whole(bits, size):
    """Return the bits of a whole parameter from every process's share of them.

    Args:
        bits: (ceil(E / 8),) uint8 of this process.
        size: elements of the whole parameter.
    Returns:
        (ceil(size / 8),) uint8 on the CPU.
    """
    if not dist.is_initialized():
        return bits.cpu()
    world = dist.get_world_size()
    _, length = share_of(size, world, 0)
    padded = torch.nn.functional.pad(bits, (0, -(-length // 8) - len(bits)))
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded)
    return torch.cat(gathered)[: -(-size // 8)].cpu()


def _thresholds(members, coarse, wanted, device):
    """Return the _Threshold of each wanted number of one pool."""
    places = [_place(coarse, number) for number in wanted]
    bins = sorted({place for place, _, _ in places})
    fine = torch.zeros(len(bins), _FINE, dtype=torch.int64, device=device)
    for part in members:
        keys = part.keys
        high = keys >> _LOW
        for row, place in enumerate(bins):
            fine[row] += torch.bincount(keys[high == place] & (_FINE - 1), minlength=_FINE).to(device)
    _sum(fine)
    found = []
    for number, (place, rest, _) in zip(wanted, places, strict=True):
        low, ties, count = _place(fine[bins.index(place)], rest)
        key = (place << _LOW) | low
        found.append(_Threshold(key, ties, ties < count) if number else _Threshold(_NONE, 0, False))
    return found


def _place(counts, number):
    """Return (the bin of the number-th highest, how many of that bin are wanted, how many it has)."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, max(number, 1)))
    count = int(counts[len(counts) - 1 - place])
    return len(counts) - 1 - place, number - (int(from_top[place]) - count), count


def _ties_before(scored, thresholds, device):
    """Return for each parameter how many scores of its pool equal the threshold before this process's share of it."""
    own = [int((part.keys == at.key).sum()) if at.is_cut else 0 for part, at in zip(scored, thresholds, strict=True)]
    if not any(at.is_cut for at in thresholds):
        return own
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    table = torch.zeros(len(scored), world, dtype=torch.int64, device=device)
    table[:, rank] = torch.tensor(own, device=device)
    _sum(table)
    before, passed = [], {}
    for part, row in zip(scored, table.tolist(), strict=True):
        before.append(passed.get(part.pool, 0) + sum(row[:rank]))
        passed[part.pool] = passed.get(part.pool, 0) + sum(row)
    return before


def _chosen(part, threshold, before):
    keys = part.keys
    if not threshold.is_cut:
        # Of _NONE no key is equal, because it is not a finite number.
        return packed_bits.pack(keys >= threshold.key)
    equal = keys == threshold.key
    number = equal.cumsum(0) + before
    return packed_bits.pack((keys > threshold.key) | (equal & (number <= threshold.ties)))


def _sum(tensor):
    if dist.is_initialized():
        dist.all_reduce(tensor)
