"""What a mask looks like: its density by layer and kind of module, its overlap with another, the scores' histogram."""

import math
import re
from dataclasses import dataclass

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from llm_unlearn.addons import packed_bits
from llm_unlearn.errors import UserError

_WIDTH, _BAR = 118, 40
_LOW = 16


@dataclass
class Density:
    """Weights that train, and weights in all.

    Attributes:
        trained: how many train.
        size: how many there are.
    """

    trained: int = 0
    size: int = 0

    def add(self, trained, size):
        """Count more of them."""
        self.trained += trained
        self.size += size

    def __str__(self):
        return f"{self.trained / self.size:.4f}" if self.size else ""


def densities(packed, shapes):
    """Return {(layer or None, kind of module): Density}.

    Args:
        packed: {name of a parameter: its bits}.
        shapes: {name: its shape}.
    """
    found = {}
    for name, bits in packed.items():
        cell = found.setdefault(place_of(name), Density())
        cell.add(packed_bits.count(bits), math.prod(shapes[name]))
    return found


def place_of(name):
    """Return (number of the layer or None, kind of module) of a parameter, by its name.

    model.layers.3.mlp.down_proj.weight is (3, "down_proj"); model.norm.weight (None, "norm").
    """
    parts = re.sub(r"\.(weight|bias)$", "", name).split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdecimal()]
    kind = next(part for part in reversed(parts) if not part.isdecimal())
    return (int(parts[numbers[0]]) if numbers else None), kind


def overlaps(packed, other, shapes):
    """Return {kind of module or "all": (trained here, trained there, trained in both, size)}.

    Args:
        packed: {name: bits}.
        other: MaskFile.
        shapes: {name: shape} of `packed`.
    Raises:
        UserError: the other mask is of a model of other parameters.
    """
    if dict(other.shapes) != {name: tuple(shape) for name, shape in shapes.items()}:
        raise UserError(f"--compare '{other.path}' is a mask of a model with other parameters than this one")
    found = {}
    for name, bits in packed.items():
        theirs = other.packed(name)
        counts = [packed_bits.count(part) for part in (bits, theirs, bits & theirs)]
        for key in (place_of(name)[1], "all"):
            before = found.get(key, (0, 0, 0, 0))
            found[key] = tuple(a + b for a, b in zip(before, (*counts, math.prod(shapes[name])), strict=True))
    return found


def decades(counts):
    """Return [(exponent of ten or None for 0, number of scores)], the largest scores first.

    Args:
        counts: (32768,) int64 of `mask_ranking.coarse_counts`: floats by their first sixteen bits, the sign among them.
    """
    occupied = counts.nonzero().flatten()
    values = (occupied.to(torch.int32) << _LOW).view(torch.float32).tolist()
    found = {}
    for value, number in zip(values, counts[occupied].tolist(), strict=True):
        # Nothing but 0 is in the first bin: what else begins with these bits is below 1e-40.
        key = math.floor(math.log10(value)) if value else None
        found[key] = found.get(key, 0) + number
    return sorted(found.items(), key=lambda item: -math.inf if item[0] is None else item[0], reverse=True)


def show(masks, ratio, other=None, file=None):
    """Print the report of one mask.

    Args:
        masks: mask_making.Masks.
        ratio: which of them.
        other: MaskFile to compare it with, or None.
        file: where to print; None is stdout.
    """
    console = Console(file=file, width=_WIDTH, highlight=False, markup=False)
    console.print(f"Share of the weights that train, ratio {ratio}:")
    console.print(_density_table(densities(masks.bits[ratio], masks.shapes)))
    if other is not None:
        console.print(f"Overlap with {other.path}:")
        console.print(_overlap_table(overlaps(masks.bits[ratio], other, masks.shapes)))


def show_scores(masks, file=None):
    """Print the histogram of the scores, or nothing where the weights were not in one ranking.

    Args:
        masks: mask_making.Masks.
        file: where to print; None is stdout.
    """
    if masks.counts is None:
        return
    console = Console(file=file, width=_WIDTH, highlight=False, markup=False)
    rows = decades(masks.counts)
    total, largest = sum(number for _, number in rows), max(number for _, number in rows)
    table = _table("score", "weights", "share", "this and above", "")
    passed = 0
    for exponent, number in rows:
        passed += number
        shown = "0" if exponent is None else f"1e{exponent:+03d}"
        bar = "#" * math.ceil(_BAR * number / largest)
        table.add_row(shown, f"{number:,}", f"{number / total:.4f}", f"{passed / total:.4f}", bar)
    console.print("Scores, from each power of ten up to the next:")
    console.print(table)


def _density_table(found):
    kinds = list(dict.fromkeys(kind for layer, kind in found if layer is not None))
    table = _table("layer", *kinds, "all")
    layers = sorted({layer for layer, _ in found if layer is not None})
    for layer in layers:
        cells = [found.get((layer, kind), Density()) for kind in kinds]
        table.add_row(str(layer), *map(str, cells), str(_total(cells)))
    inside = {
        kind: _total(cell for (layer, own), cell in found.items() if own == kind and layer is not None)
        for kind in kinds
    }
    table.add_section()
    if layers:
        table.add_row("all layers", *(str(inside[kind]) for kind in kinds), str(_total(inside.values())))
    for (layer, kind), cell in found.items():
        if layer is None:
            table.add_row(kind, *[""] * len(kinds), str(cell))
    table.add_row("model", *[""] * len(kinds), str(_total(found.values())))
    return table


def _overlap_table(found):
    table = _table("module", "here", "there", "both", "both if independent", "both / either")
    for kind, (here, there, both, size) in found.items():
        either = here + there - both
        shares = [here / size, there / size, both / size, here * there / size**2, both / either if either else 1.0]
        table.add_row(kind, *(f"{share:.4f}" for share in shares))
    return table


def _table(*columns):
    table = Table(*columns, box=box.MARKDOWN)
    for column in table.columns[1:]:
        column.justify = "right" if column.header else "left"
    for column in table.columns:
        column.overflow = "fold"
    return table


def _total(cells):
    found = Density()
    for cell in cells:
        found.add(cell.trained, cell.size)
    return found
