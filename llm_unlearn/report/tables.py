"""The tables of metrics: rows by split, one column a run, the best value of each row where one can be named."""

import math
from dataclasses import dataclass, field

from llm_unlearn.report import formatting, glossary
from llm_unlearn.report.main_numbers import main_numbers
from llm_unlearn.report.results import SCORES, Metric

BEST, TIED = "best", "tied"
NO_REASON = "no reason was recorded"
ABSENT = "not in this run's results.json"
NOT_SCORED = {"eval": "this run was not evaluated", "mia": "this run was not attacked"}
NOT_ATTACKED = "this run was not attacked in this way"
_AGGREGATES = "aggregates"
_GROUP_ORDER = (_AGGREGATES, "forget", "retain", "holdout", "real_authors", "world_facts")
_HEADLINE_ROWS = 8
# Up to this many rows, one table shows them all.
_SHORT_TABLE = 12
_HEADLINE = (
    ("eval", "forget_quality"),
    ("eval", "model_utility"),
    ("eval", "privleak"),
    ("eval", "forget/probability"),
    ("eval", "retain/probability"),
    ("eval", "forget/rouge_l_recall"),
    ("eval", "retain/rouge_l_recall"),
    ("eval", "forget/verbmem"),
    ("eval", "forget/knowmem"),
    ("eval", "retain/knowmem"),
    ("eval", "forget/extraction_strength"),
    ("mia", "loss/auc"),
    ("eval", "loss/auc"),
    ("eval", "forget/choice_accuracy"),
    ("eval", "retain/choice_accuracy"),
    ("eval", "forget/perplexity"),
    ("eval", "retain/perplexity"),
)


@dataclass(frozen=True)
class Cell:
    """What a table shows of one metric of one run; `note` is the number of the footnote that says why it is missing."""

    text: str
    error: str = ""
    title: str = ""
    mark: str = ""
    note: int | None = None


@dataclass(frozen=True)
class Row:
    """One metric; `direction` is lower, higher or none; one cell a run."""

    name: str
    label: str
    direction: str
    cells: tuple


@dataclass(frozen=True)
class Group:
    """The rows of one split or of one measure; `comparable` is False where the runs were scored differently."""

    title: str
    rows: tuple
    comparable: bool = True
    detail: str = ""


@dataclass
class Table:
    """A table of metrics with its footnotes, numbered from 1."""

    identifier: str
    title: str
    runs: list
    groups: list = field(default_factory=list)
    footnotes: list = field(default_factory=list)

    def note(self, reason):
        """Return the number of a footnote; equal reasons share one."""
        if reason not in self.footnotes:
            self.footnotes.append(reason)
        return self.footnotes.index(reason) + 1


def standings(metrics, direction):
    """Name the best of some values, without claiming a winner that the standard errors do not support.

    A value is tied with the best one if they differ by no more than the standard error of their difference,
    sqrt(a^2 + b^2); a missing standard error counts as 0. Where all values are tied, none stands out.

    Args:
        metrics: Metrics, or None; those without a finite value do not take part.
        direction: "lower", "higher" or "none".
    Returns:
        list of "best", "tied" or "", one for each metric.
    """
    numbers = [metric for metric in metrics if metric is not None and is_number(metric.value)]
    marks = [""] * len(metrics)
    if direction == "none" or len(numbers) < 2:
        return marks
    best = (min if direction == "lower" else max)(numbers, key=lambda metric: metric.value)
    leading = [one for one in numbers if abs(one.value - best.value) <= math.hypot(_error(one), _error(best))]
    if len(leading) == len(numbers):
        return marks
    mark = TIED if len(leading) > 1 else BEST
    return [mark if any(metric is one for one in leading) else "" for metric in metrics]


def is_number(value):
    """Return whether a value is there and finite."""
    return value is not None and math.isfinite(value)


def _error(metric):
    return metric.stderr if is_number(metric.stderr) else 0.0


def metric_tables(comparison):
    """Build the tables of one domain: "At a glance", then in full each kind of results where they are long.

    Args:
        comparison: Comparison.
    Returns:
        list of Table.
    """
    num_rows = sum(len(comparison.names(kind)) for kind in SCORES)
    if num_rows <= _SHORT_TABLE and not comparison.attacks:
        return [_headline_table(comparison, num_rows)]
    scores = [kind for kind in comparison.kinds if kind in SCORES]
    tables = [_headline_table(comparison, _HEADLINE_ROWS), *(_full_table(comparison, kind) for kind in scores)]
    return [*tables, *(_attack_table(comparison, kind) for kind in comparison.attacks)]


def _attack_table(comparison, kind):
    """Build the table of one attack, in the order of its file, grouped by what comes before a name's last slash."""
    title = glossary.attack_title(kind)
    table = Table(kind.replace("/", "-").replace(" ", "-").replace("#", ""), title, comparison.scored(kind))
    by_group = {}
    for name in comparison.names(kind):
        by_group.setdefault(name.rpartition("/")[0], []).append(name)
    for group, names in by_group.items():
        rows = tuple(
            _row(table, comparison, kind, name, glossary.path_label(name.rpartition("/")[2] if group else name))
            for name in names
        )
        is_comparable = all(comparison.is_comparable(kind, name) for name in names)
        table.groups.append(Group(glossary.path_label(group), rows, is_comparable))
    return table


def _full_table(comparison, kind):
    title = "All metrics" if kind == "eval" else "Membership inference"
    table = Table(kind, title, comparison.scored(kind))
    by_group = {}
    for name in comparison.names(kind):
        by_group.setdefault(_group_of(name), []).append(name)
    order = (*_GROUP_ORDER, *(group for group in by_group if group not in glossary.ATTACK_MEASURES))
    for group in sorted(by_group, key=lambda group: _position(group, (*order, *glossary.ATTACK_MEASURES))):
        # Attacks stay in the order of their file, which is that of the values of K.
        is_measure = group in glossary.ATTACK_MEASURES
        names = sorted(
            by_group[group], key=lambda name: 0 if is_measure else _position(_metric_of(name), glossary.ORDER)
        )
        rows = tuple(_row(table, comparison, kind, name, glossary.label(_label_part(name))) for name in names)
        is_comparable = all(comparison.is_comparable(kind, name) for name in names)
        prefix = "membership inference, " if is_measure and kind == "eval" else ""
        heading = prefix + glossary.label(group)
        table.groups.append(Group(heading, rows, is_comparable, _num_rows(comparison, kind, group)))
    return table


def _headline_table(comparison, num_rows):
    table = Table("glance", "At a glance", comparison.runs)
    # Under attack, membership inference has its main number in the other group.
    kinds = ("eval",) if comparison.attacks else SCORES
    order = dict.fromkeys([*_HEADLINE, *((kind, name) for kind in SCORES for name in comparison.names(kind))])
    order = [entry for entry in order if entry[0] in kinds]
    with_values = [(kind, name) for kind, name in order if _has_values(comparison, kind, name)]
    without = [
        (kind, name) for kind, name in order if name in comparison.names(kind) and (kind, name) not in with_values
    ]
    chosen = [*with_values, *without][:num_rows]
    rows = tuple(_row(table, comparison, kind, name, glossary.full_label(name)) for kind, name in chosen)
    if rows:
        table.groups.append(Group("", rows, all(comparison.is_comparable(kind, name) for kind, name in chosen)))
    attacked = [entry for entry in main_numbers(comparison) if entry[:2] not in chosen]
    if attacked:
        rows = tuple(_row(table, comparison, kind, name, label) for kind, name, label in attacked)
        is_comparable = all(comparison.is_comparable(kind, name) for kind, name, _ in attacked)
        table.groups.append(Group("under attack", rows, is_comparable))
    return table


def _is_never_reached(name, metrics):
    """Return whether a null means more than any number: recovery that never came is better than one after n steps."""
    return name.endswith("/steps_to_half") and any(metric is not None and metric.value is None for metric in metrics)


def _has_values(comparison, kind, name):
    return any(metric is not None and metric.value is not None for metric in comparison.metrics(kind, name))


def _row(table, comparison, kind, name, label):
    direction = comparison.direction(kind, name)
    metrics = comparison.metrics(kind, name, table.runs)
    competing = [metric if run.competes else None for run, metric in zip(table.runs, metrics, strict=True)]
    is_ranked = comparison.is_comparable(kind, name) and not _is_never_reached(name, competing)
    marks = standings(competing, direction if is_ranked else "none")
    there = [metric for metric in metrics if metric is not None and metric.value is not None]
    decimals = formatting.decimals_of([metric.value for metric in there], [metric.stderr for metric in there])
    cells = []
    for run, metric, mark in zip(table.runs, metrics, marks, strict=True):
        absent = ABSENT if run.result(comparison.domain, kind) else NOT_SCORED.get(kind, NOT_ATTACKED)
        ends = _interval(run.result(comparison.domain, kind), name)
        cells.append(_cell(table, metric or Metric(None, reason=absent), mark, decimals, ends))
    return Row(name, label, direction, tuple(cells))


def _interval(result, name):
    """Return the 95% interval that a result gives a metric, or None; membership inference names it by the attack."""
    intervals = result.payload.get("intervals", {}) if result else {}
    ends = intervals.get(name) or (intervals.get(name.removesuffix("/auc")) if name.endswith("/auc") else None)
    return ends if ends and all(map(is_number, ends)) else None


def _cell(table, metric, mark, decimals, ends=None):
    if metric.value is None:
        reason = metric.reason or NO_REASON
        return Cell(formatting.DASH, title=reason, note=table.note(reason))
    text = formatting.number(metric.value, decimals)
    error, title = "", f"{metric.value:.6g}"
    if metric.stderr is not None:
        error = formatting.error(metric.stderr, decimals, formatting.is_scientific(metric.value, decimals))
        title += f" {formatting.PLUS_MINUS} {metric.stderr:.3g}"
    if ends:
        title += f", 95% {ends[0]:.3g} to {ends[1]:.3g}"
    if metric.n:
        title += f", n = {metric.n:,.0f}"
    # An attack may say with a value what it means, as where there was nothing to recover.
    return Cell(text, error, title, mark, table.note(metric.reason) if metric.reason else None)


def _group_of(name):
    """Return what a metric is grouped by: its split, the measure of an attack, or "aggregates"."""
    first, _, last = name.rpartition("/")
    return last if glossary.is_attack(name) else _AGGREGATES if first in ("", "overall") else first


def _label_part(name):
    """Return what tells a metric from its group: metric, attack, or the whole name of an aggregate."""
    first, _, last = name.rpartition("/")
    return first if glossary.is_attack(name) else name if first == "overall" else last


def _metric_of(name):
    return "overall" if name.startswith("overall/") else name.rpartition("/")[2]


def _num_rows(comparison, kind, split):
    """Return how many rows a split has where all runs agree, in words; "" elsewhere."""
    results = [run.result(comparison.domain, kind) for run in comparison.scored(kind)]
    counts = {result.splits[split].get("rows") for result in results if split in result.splits}
    only = counts.pop() if len(counts) == 1 else None
    return f"{only:,} rows" if isinstance(only, int) else ""


def _position(name, order):
    return order.index(name) if name in order else len(order)
