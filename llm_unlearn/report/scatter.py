"""The plot of forgetting against keeping: one point a run, the good corner marked."""

from dataclasses import dataclass

from llm_unlearn.report import formatting
from llm_unlearn.report.glossary import full_label
from llm_unlearn.report.label_placement import nearest, place_labels
from llm_unlearn.report.main_numbers import FORGET
from llm_unlearn.report.svg import COLORS, marker_style, new_figure, plot_style, to_svg
from llm_unlearn.report.tables import is_number

_KEEP = ("model_utility", "retain/probability", "retain/knowmem", "retain/rouge_l_recall", "retain/choice_accuracy")
_KEEP_SPLITS = ("retain", "general", "real_authors", "world_facts", "lm_eval", "zero_shot", "mcq")
# CSS pixels; the narrow one stands in for the wide one on a telephone, where 12 pixels must stay 12 pixels.
SIZES = {"wide": (760, 440, 26), "narrow": (352, 380, 17)}


@dataclass(frozen=True)
class Pair:
    """The two metrics of the plot with the runs that have both."""

    x: str
    y: str
    runs: list
    x_direction: str
    y_direction: str


def choose_pair(comparison):
    """Choose what to plot: the pair that most runs have, then the better known one.

    Args:
        comparison: Comparison.
    Returns:
        Pair, or None where no two runs have such a pair.
    """
    there = [name for name in comparison.names("eval") if comparison.direction("eval", name) != "none"]
    forget = [name for name in there if name.split("/")[0].endswith("forget") or name.startswith("wmdp")]
    keep = [name for name in there if name == "model_utility" or name.split("/")[0].endswith(_KEEP_SPLITS)]
    forget.sort(key=lambda name: FORGET.index(name) if name in FORGET else len(FORGET))
    keep.sort(key=lambda name: _KEEP.index(name) if name in _KEEP else len(_KEEP))
    pairs = []
    for x in forget:
        for y in keep:
            runs = [run for run in comparison.runs if _has(comparison, run, x) and _has(comparison, run, y)]
            # A metric that is the same for all shows nothing, as a utility that one part has brought to 0.
            num_flat = sum(len({comparison.metric(run, "eval", name).value for run in runs}) == 1 for name in (x, y))
            pairs.append((-len(runs), num_flat, forget.index(x) + keep.index(y), x, y, runs))
    *_, x, y, runs = min(pairs, key=lambda pair: pair[:3], default=("", "", []))
    if len(runs) < 2:
        return None
    return Pair(x, y, runs, comparison.direction("eval", x), comparison.direction("eval", y))


def _has(comparison, run, name):
    metric = comparison.metric(run, "eval", name)
    return metric is not None and is_number(metric.value)


def has_bars(comparison, pair):
    """Return whether any point of the plot has an error bar."""
    return any(_bar(comparison.metric(run, "eval", name)) > 0 for run in pair.runs for name in (pair.x, pair.y))


def draw_scatter(comparison, pair, identifier):
    """Draw the plot in both sizes.

    Args:
        comparison: Comparison.
        pair: Pair of that comparison.
        identifier: unique on the page.
    Returns:
        {"wide": svg, "narrow": svg}.
    """
    return {name: _draw(comparison, pair, f"{identifier}-{name}", *size) for name, size in SIZES.items()}


def _draw(comparison, pair, identifier, width, height, longest):
    points = [[comparison.metric(run, "eval", name) for name in (pair.x, pair.y)] for run in pair.runs]
    hints = {}
    with plot_style():
        figure = new_figure(width, height)
        axes = figure.add_axes((52 / width, 46 / height, 1 - 66 / width, 1 - 82 / height))
        _set_limits(axes, points)
        _mark_corner(axes, pair)
        for run, (x, y) in zip(pair.runs, points, strict=True):
            _draw_point(axes, run, x, y)
            hints[f"point-{run.number}"] = f"{run.name}: {_words(pair.x, x)}; {_words(pair.y, y)}"
        _draw_labels(axes, pair.runs, points, longest)
        axes.set_xlabel(_axis_label(pair.x, pair.x_direction, "\u2190", "\u2192"))
        axes.set_ylabel(_axis_label(pair.y, pair.y_direction, "\u2190", "\u2192"))
        title = f"{full_label(pair.x)} against {full_label(pair.y)}. " + "; ".join(hints.values())
        return to_svg(figure, identifier, title, hints)


def _words(name, metric):
    text = f"{full_label(name)} {metric.value:.4g}"
    return f"{text} {formatting.PLUS_MINUS} {metric.stderr:.2g}" if is_number(metric.stderr) else text


def _axis_label(name, direction, low, high):
    label = full_label(name)
    return f"{low} {label}, lower is better" if direction == "lower" else f"{label}, higher is better {high}"


def _set_limits(axes, points):
    """Fit the axes to points and error bars, but never zoom in on less than a tenth; shares stay within 0 and 1."""
    for which, set_limits in enumerate((axes.set_xlim, axes.set_ylim)):
        metrics = [point[which] for point in points]
        low = min(metric.value - _bar(metric) for metric in metrics)
        high = max(metric.value + _bar(metric) for metric in metrics)
        are_shares = all(0 <= metric.value <= 1 for metric in metrics)
        span = max(high - low, 0.1 if are_shares else 0.1 * max(abs(low), abs(high)), 1e-9)
        low, high = (low + high - 1.2 * span) / 2, (low + high + 1.2 * span) / 2
        if are_shares:
            margin = 0.06 * span
            shift = min(0, 1 + margin - high) or max(0, -margin - low)
            low, high = max(-margin, low + shift), min(1 + margin, high + shift)
        set_limits(low, high)


def _bar(metric):
    return metric.stderr if is_number(metric.stderr) else 0.0


def _mark_corner(axes, pair):
    """Shade the corner where forgetting and keeping are both good, and say so outside, where no point can lie."""
    from matplotlib.patches import Wedge

    is_left, is_top = pair.x_direction == "lower", pair.y_direction == "higher"
    corner = (0 if is_left else 1, 1 if is_top else 0)
    at = axes.transAxes.transform(corner)
    start = {(True, True): 270, (False, True): 180, (True, False): 0, (False, False): 90}[is_left, is_top]
    for radius in (60, 120):
        wedge = Wedge(at, radius, start, start + 90, transform=None, color=COLORS["good"], alpha=0.1, linewidth=0)
        wedge.set_gid(f"mark-corner-{radius}")
        axes.add_patch(wedge)
    arrow = {(True, True): "\u2196", (False, True): "\u2197", (True, False): "\u2199", (False, False): "\u2198"}
    words = f"{arrow[is_left, is_top]} better" if is_left else f"better {arrow[is_left, is_top]}"
    axes.annotate(
        words, corner, xycoords="axes fraction", xytext=(0, 8 if is_top else -38), textcoords="offset points",
        ha="left" if is_left else "right", color=COLORS["good"], fontweight="bold", annotation_clip=False,
    )  # fmt: skip


def _draw_point(axes, run, x, y):
    bars = {"xerr": _bar(x) or None, "yerr": _bar(y) or None}
    if any(bars.values()):
        axes.errorbar(x.value, y.value, fmt="none", ecolor=COLORS[run.look.color], elinewidth=1.2, alpha=0.7, **bars)
    (line,) = axes.plot(
        [x.value], [y.value], linestyle="none", clip_on=False, zorder=4, markeredgewidth=1.4,
        markersize=13 if run.look.marker == "*" else 9, **marker_style(run.look),
    )  # fmt: skip
    line.set_gid(f"point-{run.number}")


def _draw_labels(axes, runs, points, longest):
    figure = axes.figure
    labels = formatting.short_labels([run.name for run in runs], longest)
    colors = [COLORS[run.look.color] for run in runs]
    texts = [
        axes.text(0, 0, label, transform=None, va="bottom", zorder=5, color=color)
        for label, color in zip(labels, colors, strict=True)
    ]
    renderer = figure.canvas.get_renderer()
    sizes = [(box.width, box.height) for box in (text.get_window_extent(renderer) for text in texts)]
    places = [tuple(axes.transData.transform((x.value, y.value))) for x, y in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    for x, y in points:
        for ends in (
            ((x.value - _bar(x), y.value), (x.value + _bar(x), y.value)),
            ((x.value, y.value - _bar(y)), (x.value, y.value + _bar(y))),
        ):
            (left, bottom), (right, top) = axes.transData.transform(ends)
            taken.append((left - 1, bottom - 1, right + 1, top + 1))
    frame = axes.get_window_extent().padded(-3).extents
    boxes = place_labels(places, sizes, taken, frame)
    for text, color, place, box in zip(texts, colors, places, boxes, strict=True):
        text.set_position(box[:2])
        end = nearest(box, place)
        if abs(end[0] - place[0]) + abs(end[1] - place[1]) > 16:
            axes.plot(*zip(place, end, strict=True), transform=None, color=color, linewidth=0.7, zorder=3)
