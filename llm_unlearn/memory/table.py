"""The estimate as a table on the terminal."""

from rich import box
from rich.console import Console
from rich.table import Table

from llm_unlearn.memory.estimate import MOMENTS
from llm_unlearn.memory.request import GB

_WIDTH = 118


def show(found, advice, file=None):
    """Print an estimate and what to change.

    Args:
        found: Estimate.
        advice: Advice, or None where the run fits.
        file: where to print; None is stdout.
    """
    console = Console(file=file, width=_WIDTH, highlight=False, markup=False)
    for line in _heading(found):
        console.print(line)
    table = Table("GB on each device", *MOMENTS, box=box.MARKDOWN, caption="1 GB = 10^9 bytes", caption_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in found.rows.items():
        if any(row):
            table.add_row(name, *(f"{value / GB:.2f}" for value in row))
    table.add_section()
    table.add_row("in all", *(f"{value / GB:.2f}" for value in found.totals))
    console.print(table)
    for note in [*found.notes, *_of_host(found)]:
        console.print(f"Note: {note}.")
    if advice is not None:
        _show_advice(console, found, advice)
    console.print(_verdict(found))


def _heading(found):
    case, sizes, backend = found.case, found.sizes, found.case.backend
    by_size = sorted(sizes.by_dtype.items(), key=lambda found: -found[1])
    dtypes = ", ".join(f"{size / GB:.2f} GB {name}" for name, size in by_size)
    streams = " + ".join(f"{rows} {name}" for name, rows in case.streams)
    kind = {"zero": f"ZeRO-{backend.stage}", "single": "", "ddp": "DDP", "fsdp": "FSDP2"}[backend.kind]
    yield (
        f"{case.source.method} on {case.source.config._name_or_path}: {sizes.total:,} weights ({dtypes}), of which "
        f"{sizes.trained:,} train, {sizes.embeddings:,} in embedding and head"
    )
    at_once = "one stream after the other" if case.sequential and len(case.streams) > 1 else "in one forward"
    yield (
        f"a micro-batch: {streams} rows of {case.width} tokens ({case.source.width_from}), {at_once}; "
        f"reference: {case.reference_mode}; optimizer: {case.optim}"
    )
    yield f"{backend.processes} process{'es' if backend.processes > 1 else ''} {kind}".rstrip()


def _of_host(found):
    if found.host:
        yield f"each process keeps {found.host / GB:.2f} GB more in the host's memory"


def _show_advice(console, found, advice):
    table = Table("change", "saves GB", "then needs GB", "computes the same", box=box.MARKDOWN)
    for column in table.columns[1:3]:
        column.justify = "right"
    for change, made in advice.single:
        saved = f"{(found.total - made.total) / GB:.2f}"
        table.add_row(change.flags, saved, f"{made.total / GB:.2f}", "no" if change.cost else "yes")
    console.print(table)
    if advice.fewest is None:
        console.print("No three of these changes are enough; ask for more devices: --estimate_memory 4x80 --fsdp True")
    else:
        changes, made = advice.fewest
        console.print(f"The fewest changes that fit, with {made.total / GB:.2f} GB:")
        console.print(f"  {' '.join(change.flags for change in changes)}")


def _verdict(found):
    word = "fits" if found.fits else "does not fit"
    return f"{word}: {found.total / GB:.2f} of {found.case.device_bytes / GB:.2f} GB"
