"""Line charts of the attacks: recovery by step, what layers know, ROC curves; each with its numbers as a table."""

import math
from dataclasses import dataclass, field

from llm_unlearn.report import formatting
from llm_unlearn.report.svg import COLORS, marker_style, new_figure, plot_style, to_svg

# CSS pixels; the narrow ones stand in on a telephone, where 12 pixels must stay 12 pixels.
WIDE, SQUARE, NARROW = (540, 300), (352, 300), (352, 264)
_MAX_MARKERS = 7
_LEVEL_DASHES = (0, (8, 4))


@dataclass(frozen=True)
class Line:
    """One line of a chart: its key (unique in the chart), the name and Look of what it shows, and its points.

    `points` are (x, y, standard error or None); `strong` lines have markers and bands, the others are thin.
    """

    key: str
    name: str
    look: object
    points: tuple
    strong: bool = True


@dataclass(frozen=True)
class Chart:
    """A line chart: `levels` are ((y, words), ...) drawn across, `ticks` {x: words} where x counts something."""

    title: str
    x_label: str
    lines: tuple
    levels: tuple = ()
    ticks: dict = field(default_factory=dict)
    log: bool = False
    unit: bool = False


@dataclass(frozen=True)
class Numbers:
    """The numbers of a chart as a table: caption, heads of the columns, and rows of (head, cells)."""

    caption: str
    heads: tuple
    rows: tuple


def draw_chart(chart, identifier, size):
    """Draw a chart.

    Args:
        chart: Chart.
        identifier: unique on the page.
        size: (width, height), CSS pixels.
    Returns:
        str, <svg> whose strong lines are `<identifier>-line-<key>` and whose levels are `<identifier>-level-<number>`.
    """
    width, height = size
    hints = {}
    with plot_style():
        figure = new_figure(width, height)
        axes = figure.add_axes((46 / width, 40 / height, 1 - 62 / width, 1 - 48 / height))
        axes.spines["left"].set_visible(False)
        for line in chart.lines:
            _draw_line(axes, chart, line, hints)
        _set_axes(axes, chart)
        _draw_levels(axes, chart, hints)
        axes.set_xlabel(chart.x_label, labelpad=3)
        said = "; ".join(hint for name, hint in hints.items() if not name.startswith("thin-"))
        return to_svg(figure, identifier, f"{chart.title} by {chart.x_label}. {said}.", hints)


def draw_both(chart, identifier, size=WIDE):
    """Draw a chart for a screen and for a telephone; returns {"wide": svg, "narrow": svg}."""
    return {
        "wide": draw_chart(chart, f"{identifier}-wide", size),
        "narrow": draw_chart(chart, f"{identifier}-narrow", NARROW),
    }


def _draw_line(axes, chart, line, hints):
    color = COLORS[line.look.color]
    xs, ys, errors = ([point[part] for point in line.points] for part in range(3))
    if not line.strong:
        (drawn,) = axes.plot(xs, ys, color=color, linewidth=0.9, linestyle=line.look.dashes, alpha=0.65)
        drawn.set_gid(f"thin-{line.key}")
        hints[f"thin-{line.key}"] = f"{line.name}: {_span(line)}"
        return
    if any(errors) and len(xs) > 1:
        low, high = ([y + side * (error or 0) for y, error in zip(ys, errors, strict=True)] for side in (-1, 1))
        band = axes.fill_between(xs, low, high, color=color, alpha=0.16, linewidth=0)
        band.set_gid(f"mark-band-{line.key}")
    every = 1 if len(xs) <= 2 * _MAX_MARKERS else math.ceil(len(xs) / _MAX_MARKERS)
    markers = {} if chart.log else {"markersize": 9 if line.look.marker == "*" else 6, "markevery": every}
    style = {**marker_style(line.look), **({"marker": None} if chart.log else {})}
    (drawn,) = axes.plot(xs, ys, linestyle=line.look.dashes, linewidth=2.2, zorder=3, **style, **markers)
    drawn.set_gid(f"line-{line.key}")
    hints[f"line-{line.key}"] = f"{line.name}: {_span(line)}"


def _span(line):
    first, last = line.points[0], line.points[-1]
    return f"{first[1]:.3g} to {last[1]:.3g}" if len(line.points) > 1 else f"{first[1]:.3g}"


def _set_axes(axes, chart):
    values = [y for line in chart.lines for _, y, _ in line.points] + [y for y, _ in chart.levels]
    if chart.log:
        smallest = min((x for line in chart.lines for x, _, _ in line.points if x > 0), default=1e-3)
        bounds = (smallest, 1.15)
        axes.set(xscale="log", yscale="log", xlim=bounds, ylim=bounds)
        axes.plot(bounds, bounds, color=COLORS["muted"], linewidth=1, linestyle=_LEVEL_DASHES, zorder=1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_tick_params(which="minor", size=0)
        return
    if all(0 <= value <= 1 for value in values) and (chart.unit or max(values, default=0) > 0.5):
        # Above a level near 1 there must be room for its words.
        axes.set_ylim(-0.04, 1.12 if chart.levels else 1.05)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    elif min(values, default=0) >= 0:
        axes.set_ylim(bottom=min(0, -0.03 * max(values)))
    axes.margins(x=0.03)
    if chart.ticks:
        shown = list(chart.ticks)[:: max(1, math.ceil(len(chart.ticks) / 9))]
        axes.set_xticks(shown, [chart.ticks[x] for x in shown])
    else:
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    if min((x for line in chart.lines for x, _, _ in line.points), default=0) < 0 and not chart.ticks:
        axes.axvline(0, color=COLORS["muted"], linewidth=0.8, zorder=1)


def _draw_levels(axes, chart, hints):
    for number, (value, words) in enumerate(chart.levels):
        line = axes.axhline(value, color=COLORS["muted"], linewidth=1.2, linestyle=_LEVEL_DASHES, zorder=2)
        line.set_gid(f"level-{number}")
        hints[f"level-{number}"] = f"{words}: {value:.3g}"
        axes.annotate(
            words, (1, value), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
            ha="right", va="bottom", color=COLORS["muted"], fontsize=11, annotation_clip=False,
        )  # fmt: skip


def numbers_of(chart, caption, first, write_x=None, most=24):
    """Return the numbers of a chart's strong lines, one row an x, evenly thinned to `most` rows.

    Args:
        chart: Chart.
        caption: what the table is called.
        first: head of its first column.
        write_x: function of an x that returns its words.
        most: rows.
    Returns:
        Numbers.
    """
    write_x = write_x or (lambda x: f"{x:g}".replace("-", formatting.MINUS))
    lines = [line for line in chart.lines if line.strong]
    columns = [{x: (y, error) for x, y, error in line.points} for line in lines]
    places = sorted({x for column in columns for x in column})
    every = max(1, math.ceil(len(places) / most))
    kept = sorted({*places[::every], *places[-1:]})
    known = [pair for column in columns for pair in column.values()]
    decimals = formatting.decimals_of([y for y, _ in known], [error for _, error in known])
    rows = tuple((write_x(x), tuple(_cell(column.get(x), max(decimals, 3)) for column in columns)) for x in kept)
    thinned = f", every {every}th row" if every > 1 else ""
    return Numbers(caption + thinned, (first, *(line.name for line in lines)), rows)


def _cell(pair, decimals):
    if pair is None:
        return formatting.DASH
    value, error = pair
    text = formatting.number(value, decimals)
    return f"{text} {formatting.error(error, decimals)}" if error else text
