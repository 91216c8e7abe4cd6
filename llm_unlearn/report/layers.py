"""What the layers know: logit lens, linear probe and patching, from the embeddings to the last layer."""

from dataclasses import dataclass

from llm_unlearn.report.charts import SQUARE, Chart, Line, draw_chart, numbers_of
from llm_unlearn.report.json_files import is_finite


@dataclass(frozen=True)
class _Panel:
    value: str
    title: str
    how: str
    unit: bool = True


_PANELS = (
    _Panel("lens_probability", "Answer read by the logit lens", "probability of the forgotten answer"),
    _Panel("probe_accuracy", "Answer read by a linear probe", "accuracy on rows held out"),
    _Panel("uds", "Unlearning depth", "1: erased as in gold, 0: intact as in target"),
    _Panel("patched_drop", "Patched into the target", "nats that the answer loses; 0: the layer still knows it", False),
)


def layers_part(comparison, identifier):
    """Draw what the layers of the runs of one domain know.

    The target and the gold model have lines of their own: from their results, or from those of a model that was
    compared with them.

    Args:
        comparison: Comparison.
        identifier: unique on the page.
    Returns:
        {"runs", "panels" [{"title", "how", "svg"}], "tables" [Numbers]}, or None where no result has layers.
    """
    panels, tables, shown, shown_values = [], [], {}, set()
    for panel in _PANELS:
        lines = _lines(comparison, panel.value)
        # The depth is made of the drops, and says more.
        if not lines or (panel.value == "patched_drop" and "uds" in shown_values):
            continue
        shown_values.add(panel.value)
        ticks = {x: "emb." if x < 0 else str(x) for x in sorted({x for _, points in lines for x, _, _ in points})}
        chart = Chart(
            panel.title,
            "layer",
            tuple(Line(str(run.number), run.name, run.look, points) for run, points in lines),
            ticks=ticks,
            unit=panel.unit,
        )
        svg = draw_chart(chart, f"{identifier}-layers-{len(panels)}", SQUARE)
        panels.append({"title": panel.title, "how": panel.how, "svg": svg})
        tables.append(numbers_of(chart, f"{panel.title}: {panel.how}", "layer", ticks.get))
        shown |= {run.number: run for run, _ in lines}
    runs = [run for run in comparison.runs if run.number in shown]
    return {"runs": runs, "panels": panels, "tables": tables} if panels else None


def _lines(comparison, value):
    """Return [(run, points)] in the order of the runs."""
    found = {}
    for run in comparison.runs:
        for attack in comparison.attacks:
            result = run.result(comparison.domain, attack)
            layers = result.payload.get("layers") if result else None
            if layers:
                found.setdefault(run.number, _points(layers, value, ""))
                for role, suffix in (("target", "_target"), ("retrained", "_gold")):
                    _add_reference(found, comparison, layers, value, role, suffix)
    return [(run, found[run.number]) for run in comparison.runs if found.get(run.number)]


def _add_reference(found, comparison, layers, value, role, suffix):
    references = [run for run in comparison.runs if run.role == role]
    points = _points(layers, value, suffix)
    if len(references) == 1 and points and not found.get(references[0].number):
        found[references[0].number] = points


def _points(layers, value, suffix):
    points = []
    for entry in layers:
        y, error = entry.get(f"{value}{suffix}"), entry.get(f"{value}_stderr{suffix}")
        if is_finite(y):
            points.append((entry["layer"], float(y), error if is_finite(error) else None))
    return tuple(sorted(points))
