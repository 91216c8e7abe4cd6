"""The files of an attack's curve: the published list of rows, and its plot, which needs no torch."""

import json
import logging
from datetime import datetime
from pathlib import Path

from llm_unlearn.errors import UserError

logger = logging.getLogger("llm_unlearn")

_KINDS = ("relearn", "tamper")
_OTHER_KEYS = ("step", "timestamp", "stderr", "phase")
_PREFERRED = ("choice_accuracy", "probability", "token_accuracy", "choice_probability")


def curve_path(folder, stamp):
    """Return the path of the list of rows of an attack; its plot has the same name.

    Args:
        folder: output directory.
        stamp: when the attack began, <YYYYmmdd_HHMMSS>.
    """
    return Path(folder) / f"tamper_results_{stamp}.json"


def metric_names(rows):
    """Return the names of the metrics of the rows of a curve, in order."""
    return list(dict.fromkeys(name for row in rows for name in row if name not in _OTHER_KEYS))


def preferred(names):
    """Return the metric that a plot shows of several: of the first set, choice accuracy before probability.

    Args:
        names: "<set>/<metric>"; None where there is none.
    """
    first = [name for name in names if name.rpartition("/")[0] == names[0].rpartition("/")[0]]
    return min(first, key=lambda name: _rank(name.rpartition("/")[2]), default=None)


def _rank(metric):
    return _PREFERRED.index(metric) if metric in _PREFERRED else len(_PREFERRED)


def redraw(path, title=None):
    """Draw a plot anew from a list of rows, or from the results.json of an attack.

    Args:
        path: tamper_results_*.json, beside whose results.json the levels are looked for, or results.json itself.
        title: of the plot; the two characters \\n break the line.
    Returns:
        path of the plot.
    Raises:
        UserError: no such file, or none with the rows of an attack.
    """
    path = Path(path)
    contents = _read(path)
    results = contents if isinstance(contents, dict) else _results_of(path)
    if isinstance(contents, list):
        curves = [{"name": "", "rows": contents}]
    else:
        curves = contents.get("curves") if isinstance(contents, dict) else None
    if not (isinstance(curves, list) and curves and all(map(_is_curve, curves))):
        raise UserError(
            f"--plot_only '{path}' holds no rows of an attack; pass a tamper_results_*.json, or the results.json beside"
        )
    levels, chosen = results.get("levels") or {}, results.get("plotted") or {}
    given = title.replace("\\n", "\n") if title is not None else results.get("title")
    target = path.with_suffix(".png")
    draw_curves(target, curves, levels, chosen.get("forget"), chosen.get("utility"), given)
    return target


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--plot_only '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--plot_only '{path}' is no JSON: {error}") from error


def _results_of(path):
    """Return the results.json that belongs to a list of rows: beside it, or above it where it is one of a sweep."""
    for place in (path.parent / "results.json", path.parent.parent / "results.json"):
        try:
            found = json.loads(place.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("kind") in _KINDS:
            return found
    return {}


def _is_curve(curve):
    return isinstance(curve, dict) and isinstance(curve.get("name"), str) and _is_rows(curve.get("rows"))


def _is_rows(rows):
    return isinstance(rows, list) and bool(rows) and all(map(_is_row, rows))


def _is_row(row):
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return False
    return all(isinstance(row[name], int | float | None) for name in metric_names([row]))


def draw_curves(path, curves, levels, forget=None, utility=None, title=None):
    """Draw the forget metric and the utility of one or several attacks by step, told apart in greyscale too.

    Args:
        path: of the png.
        curves: list of {"name", "rows"}.
        levels: {metric: {"target", "chance"}}, None where not known.
        forget: metric of the forget set; None takes `preferred`.
        utility: metric of what should be kept; None draws the first that is no other metric of the forget set.
        title: of the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = metric_names(curves[0]["rows"])
    forget = forget or (preferred(names) if names else None)
    rest = [name for name in names if name.rpartition("/")[0] != (forget or "").rpartition("/")[0]]
    utility = utility or next((name for name in rest if name.rpartition("/")[2] in _PREFERRED), None)
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shades = [str(0.55 * number / max(len(curves) - 1, 1)) for number in range(len(curves))]
    for number, (curve, shade) in enumerate(zip(curves, shades, strict=True)):
        label = f"{curve['name']}: " if len(curves) > 1 else ""
        _draw_line(axes, curve["rows"], forget, f"{label}{forget}", shade, "-", "os^Dv*"[number % 6], shade)
        _draw_line(axes, curve["rows"], utility, f"{label}{utility}", shade, (0, (5, 1, 1, 1)), "os^Dv*"[number % 6])
    _draw_levels(axes, levels.get(forget) or {})
    if any(row["step"] < 0 for curve in curves for row in curve["rows"]):
        axes.axvline(0, color="0.7", linewidth=0.8)
        axes.annotate("repair", (0, 0.98), (-4, 0), ("data", "axes fraction"), "offset points", ha="right", va="top")
    axes.text(
        0.98, 0.03, _recovered(curves, forget), transform=axes.transAxes, ha="right", va="bottom", fontsize=9,
        bbox={"boxstyle": "round", "facecolor": "white", "edgecolor": "0.4", "alpha": 0.9},
    )  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="share", ylim=(-0.02, 1.02), title=title or "")
    axes.grid(color="0.9")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    partial = Path(path).with_name(Path(path).name + ".partial")
    figure.savefig(partial, format="png", metadata={"Software": None})
    partial.replace(path)


def _draw_line(axes, rows, name, label, shade, dashes, marker, face="white"):
    """Draw one metric with a band of one standard error; a failed evaluation leaves a gap in the markers alone."""
    points = [(row["step"], row[name], (row.get("stderr") or {}).get(name) or 0.0)
              for row in rows if name and row.get(name) is not None]  # fmt: skip
    if not points:
        return
    steps, values, errors = zip(*points, strict=True)
    axes.plot(
        steps, values, color=shade, linestyle=dashes, marker=marker, markersize=4.5, linewidth=1.5, label=label,
        markerfacecolor=face, markeredgecolor=shade,
    )  # fmt: skip
    if any(errors):
        low = [value - error for value, error in zip(values, errors, strict=True)]
        high = [value + error for value, error in zip(values, errors, strict=True)]
        axes.fill_between(steps, low, high, color=shade, alpha=0.12, linewidth=0)


def _draw_levels(axes, levels):
    for name, dashes, text in (("target", "--", "target model"), ("chance", ":", "chance")):
        if levels.get(name) is not None:
            axes.axhline(levels[name], color="0.3", linestyle=dashes, linewidth=1.2, label=f"{text} {levels[name]:.3g}")


def _recovered(curves, name):
    """Return the text of the box: how far the last value lies above the one at step 0."""
    lines = []
    for curve in curves:
        values = [row.get(name) for row in curve["rows"] if row["step"] >= 0]
        known = [value for value in values if value is not None]
        shown = f"{known[-1] - values[0]:+.3f}" if known and values[0] is not None else "unknown"
        lines.append(f"recovered {shown}" + (f" ({curve['name']})" if len(curves) > 1 else ""))
    return "\n".join(lines)


def first_stamp(stamps):
    """Return the stamp of what covers several attacks: the earliest, or now where there is none."""
    return min(stamps, default=datetime.now().astimezone().strftime("%Y%m%d_%H%M%S"))
