"""Recovery curves: what an attack that trains brings back, by step, in each of the attacked models."""

from dataclasses import dataclass

from llm_unlearn.report import glossary
from llm_unlearn.report.charts import Chart, Line, Numbers, draw_both, numbers_of
from llm_unlearn.report.json_files import is_finite
from llm_unlearn.report.main_numbers import tracked_metric
from llm_unlearn.report.runs import DASHES, MARKERS, NUM_COLORS, Look

_UTILITY = ("model_utility", "retain/probability", "utility/choice_accuracy", "utility/probability")
_UTILITY += ("retain/choice_accuracy", "retain/token_accuracy")
_NOT_A_METRIC = ("step", "timestamp", "stderr", "phase", "loss")
# With more models than this on a page, the weaker configurations of a sweep would hide the strongest.
_MAX_WITH_SWEEPS = 4


_VARIANTS = {"with": "with the retain term", "without": "without the retain term", "gold": "gold model"}


@dataclass(frozen=True)
class Variant:
    """One variant of an ablation, drawn as if it were a run."""

    number: str
    name: str
    look: Look


@dataclass(frozen=True)
class Curve:
    """One configuration of an attack on one model; `owner` is the Run or Variant whose look it has."""

    owner: object
    name: str
    rows: tuple
    strongest: bool


def recovery_parts(comparison, identifier):
    """Draw the attacks of one domain that train the model.

    Args:
        comparison: Comparison.
        identifier: unique on the page.
    Returns:
        list of {"title", "how", "shown", "owners", "panels" [{"title", "wide", "narrow"}], "tables" [Numbers]}, one an
        attack; of downstream fine-tuning one a task.
    """
    found = []
    for attack in comparison.attacks:
        for task, curves in _groups(comparison, attack).items():
            part = _part(comparison, attack, task, curves, f"{identifier}-recovery-{len(found)}")
            if part:
                found.append(part)
    return found


def _groups(comparison, attack):
    """Return {task or "": list of Curve} of an attack."""
    kind, groups = attack.partition("/")[0], {}
    for run in comparison.scored(attack):
        payload = run.result(comparison.domain, attack).payload
        names = [curve["name"] for curve in payload["curves"]]
        strongest = payload["strongest"] if payload["strongest"] in names else _by_area(payload["curves"])
        for number, curve in enumerate(payload["curves"]):
            name, rows = curve["name"], tuple(curve["rows"])
            if kind == "downstream":
                groups.setdefault(name, []).append(Curve(run, name, rows, True))
            elif kind == "ablate":
                groups.setdefault("", []).append(Curve(_variant(run, attack, number, name), name, rows, True))
            else:
                groups.setdefault("", []).append(Curve(run, name, rows, name == strongest))
    return groups


def _variant(run, attack, number, name):
    look = Look(f"run-{number % NUM_COLORS}", MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)], True)
    identifier = "".join(letter if letter.isalnum() else "-" for letter in attack)
    return Variant(f"{identifier}-{run.number}-{number}", _VARIANTS.get(name, name), look)


def _by_area(curves):
    """Return the name of the configuration with the highest mean of its forget metric."""

    def mean(curve):
        metric = tracked_metric(_metrics([curve["rows"]]))
        values = [row[metric] for row in curve["rows"] if is_finite(row.get(metric))] if metric else []
        return sum(values) / len(values) if values else -1.0

    return max(curves, key=mean)["name"] if curves else ""


def _metrics(many_rows):
    names = dict.fromkeys(name for rows in many_rows for row in rows for name in row)
    return [name for name in names if name not in _NOT_A_METRIC and not name.endswith(("_stderr", "/stderr"))]


def _part(comparison, attack, task, curves, identifier):
    metrics = _metrics([curve.rows for curve in curves])
    forget, panels, tables = tracked_metric(metrics), [], []
    kind, title = attack.partition("/")[0], glossary.attack_title(attack)
    many = len({curve.owner.number for curve in curves}) > _MAX_WITH_SWEEPS
    shown = [curve for curve in curves if curve.strongest or not many]
    for metric in filter(None, (forget, _utility(curves, metrics, task))):
        lines = tuple(line for place, curve in enumerate(shown) if (line := _line(curve, metric, place)))
        if lines:
            chart = Chart(glossary.path_label(metric), "step of the attack", lines, _levels(comparison, attack, metric))
            panels.append({"title": chart.title, **draw_both(chart, f"{identifier}-{len(panels)}")})
            caption = f"{title}{f' on {task}' if task else ''}: {chart.title}"
            tables.append(numbers_of(chart, caption, "step"))
    if not panels:
        return None
    owners = {curve.owner.number: curve.owner for curve in curves}
    sweep = _sweep(comparison, attack, curves, forget) if kind not in ("downstream", "ablate") else None
    return {
        "title": f"{title}: {task}" if task else title,
        "how": glossary.ATTACKS[kind][1] if kind in glossary.ATTACKS else "",
        "owners": list(owners.values()),
        "shown": _shown_of(curves, many) if sweep else "",
        "panels": panels,
        "tables": [*tables, *([sweep] if sweep else [])],
    }


def _shown_of(curves, many):
    """Say which configurations of a sweep are drawn, and which is the strongest of each model."""
    strongest = {curve.owner.name: curve.name for curve in curves if curve.strongest}
    said = "Each model's strongest configuration is shown" if many else "Bold is each model's strongest configuration"
    if len(set(strongest.values())) == 1:
        which = f"{next(iter(strongest.values()))} in {'all' if len(strongest) > 1 else 'this one'}"
    else:
        which = "; ".join(f"{name} in {owner}" for owner, name in strongest.items())
    return f"{said}: {which}.{'' if many else ' Thin are the others.'}"


def _utility(curves, metrics, task):
    """Return the metric beside the forget metric: the accuracy on the task, or what best tells what was kept."""
    wanted = [f"{task}/accuracy", f"{task}/token_accuracy"] if task else []
    there = [name for name in (*wanted, *_UTILITY) if name in metrics]
    return next((name for name in there if any(is_finite(row.get(name)) for c in curves for row in c.rows)), "")


def _line(curve, metric, place):
    points = []
    for row in curve.rows:
        value = row.get(metric)
        if is_finite(value):
            errors = row.get("stderr") if isinstance(row.get("stderr"), dict) else {}
            error = next((e for e in (errors.get(metric), row.get(f"{metric}_stderr")) if is_finite(e)), None)
            points.append((row["step"], float(value), error))
    if not points:
        return None
    number = curve.owner.number
    key = f"{number}" if curve.strongest else f"{number}-{place}"
    name = curve.owner.name if curve.strongest else f"{curve.owner.name}, {curve.name}"
    return Line(key, name, curve.owner.look, tuple(points), curve.strongest)


def _levels(comparison, attack, metric):
    """Return ((level, words), ...): what the target model has, where all attacked runs agree on it."""
    results = [run.result(comparison.domain, attack) for run in comparison.scored(attack)]
    levels = {result.payload["levels"].get(metric, {}).get("target") for result in results} - {None}
    if not levels:
        targets = [run for run in comparison.runs if run.role == "target"]
        found = [comparison.metric(run, "eval", metric) for run in targets]
        levels = {one.value for one in found if one is not None and is_finite(one.value)}
    return ((max(levels), "target model"),) if levels and max(levels) - min(levels) < 0.02 else ()


def _sweep(comparison, attack, curves, forget):
    """Return the table of a sweep: what each configuration recovered in each model; None without a sweep."""
    names = list(dict.fromkeys(curve.name for curve in curves))
    if len(names) < 2:
        return None
    owners = list({curve.owner.number: curve.owner for curve in curves}.values())
    highest = {(curve.owner.number, curve.name): (_highest(curve, forget), curve.strongest) for curve in curves}
    rows = []
    for name in names:
        found = [highest.get((owner.number, name)) for owner in owners]
        rows.append((name, tuple(_shown(*one) if one else "\u2013" for one in found)))
    caption = (
        f"{glossary.attack_title(attack)}: highest {glossary.path_label(forget)} by configuration, * the strongest"
    )
    return Numbers(caption, ("configuration", *(owner.name for owner in owners)), tuple(rows))


def _highest(curve, metric):
    return max((row[metric] for row in curve.rows if is_finite(row.get(metric))), default=None)


def _shown(value, is_strongest):
    return "\u2013" if value is None else f"{value:.3f}{' *' if is_strongest else ''}"
