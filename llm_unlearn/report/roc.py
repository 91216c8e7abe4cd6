"""ROC curves of the membership attacks, on logarithmic axes, where the few sure accusations are."""

from llm_unlearn.report import formatting, glossary
from llm_unlearn.report.charts import SQUARE, Chart, Line, Numbers, draw_chart

# Of the attacks that run_mia.py knows, those that are drawn; the table of metrics has them all.
_DRAWN = ("loss", "min_k_20", "min_k_pp_20", "zlib", "reference")
_MOST = 3
_RATES = (0.01, 0.05, 0.1, 0.5)


def roc_part(comparison, identifier):
    """Draw the ROC curves of one domain, one panel an attack, one line a run.

    Args:
        comparison: Comparison.
        identifier: unique on the page.
    Returns:
        {"runs", "panels" [{"title", "svg"}], "tables" [Numbers]}, or None where no result has a ROC curve.
    """
    scored = [(run, run.result(comparison.domain, "mia").payload) for run in comparison.scored("mia")]
    scored = [(run, payload) for run, payload in scored if payload.get("roc")]
    there = [attack for attack in _DRAWN if any(attack in payload["roc"] for _, payload in scored)][:_MOST]
    panels, tables = [], []
    for number, attack in enumerate(there):
        curves = [(run, payload["roc"][attack]) for run, payload in scored if payload["roc"].get(attack, {}).get("fpr")]
        lowest = min((rate for _, curve in curves for rate in curve["fpr"] if rate > 0), default=1.0) / 2
        lines = tuple(Line(str(run.number), run.name, run.look, _points(curve, lowest)) for run, curve in curves)
        chart = Chart(glossary.label(attack), "false-positive rate", lines, log=True)
        panels.append({"title": chart.title, "svg": draw_chart(chart, f"{identifier}-roc-{number}", SQUARE)})
        tables.append(_numbers(comparison, attack, scored))
    return {"runs": [run for run, _ in scored], "panels": panels, "tables": tables} if panels else None


def _points(curve, lowest):
    """Return the points of a curve, with rates of 0 at the lower ends of logarithmic axes."""
    pairs = zip(curve["fpr"], curve["tpr"], strict=True)
    return tuple((max(x, lowest), max(y, lowest), None) for x, y in pairs)


def _numbers(comparison, attack, scored):
    rows = []
    for run, payload in scored:
        curve = payload["roc"].get(attack)
        if curve is None:
            continue
        metric = comparison.metric(run, "mia", f"{attack}/auc")
        auc = formatting.DASH if metric is None or metric.value is None else f"{metric.value:.3f}"
        ends = payload["intervals"].get(attack) or ()
        between = f"{ends[0]:.3f} to {ends[1]:.3f}" if ends and None not in ends else formatting.DASH
        rows.append((run.name, (auc, between, *(f"{_found_at(curve, rate):.1%}" for rate in _RATES))))
    heads = ("model", "AUC", "95% interval", *(f"found below {rate:.0%}" for rate in _RATES))
    caption = f"{glossary.label(attack)} attack: members found while fewer than so many others are accused"
    return Numbers(caption, heads, tuple(rows))


def _found_at(curve, rate):
    """Return the highest true-positive rate below a false-positive rate, as run_mia.py reports it."""
    pairs = zip(curve["fpr"], curve["tpr"], strict=True)
    return max((found for accused, found in pairs if accused < rate - 1e-12), default=0.0)
