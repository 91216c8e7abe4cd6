"""Puts the page together: everything that was computed goes through one Jinja2 template into one HTML file."""

import base64
import hashlib
import re
from pathlib import Path

import llm_unlearn
from llm_unlearn.errors import UserError
from llm_unlearn.report import formatting, glossary
from llm_unlearn.report.audits import AUDIT
from llm_unlearn.report.comparison import Comparison
from llm_unlearn.report.cost import cost_table, settings_table
from llm_unlearn.report.curves import draw_panel, find_panels
from llm_unlearn.report.generations import answers_part, samples_part
from llm_unlearn.report.layers import layers_part
from llm_unlearn.report.provenance import audit_provenance, provenance
from llm_unlearn.report.recovery import Variant, recovery_parts
from llm_unlearn.report.roc import roc_part
from llm_unlearn.report.runs import ROLES, audited_run, gather_runs
from llm_unlearn.report.scatter import choose_pair, draw_scatter, has_bars
from llm_unlearn.report.summary import outcome, overview
from llm_unlearn.report.svg import key_symbols
from llm_unlearn.report.tables import metric_tables
from llm_unlearn.report.verdict import verdicts

_HERE = Path(__file__).parent


def make_page(folders, title=None):
    """Compare the runs in some folders on one page.

    Args:
        folders: paths that hold results.json, unlearning.json or trainer_state.json, at any depth.
        title: of the page; by default it names the domains.
    Returns:
        (str, HTML that needs no other file and no network; number of runs on it). Equal records give equal bytes.
    Raises:
        UserError: see `runs.gather_runs`.
    """
    runs, audits = gather_runs(folders)
    names = dict.fromkeys(result.domain for run in runs for result in run.results)
    title = title or (f"Unlearning on {formatting.listed(names)}" if names else "Unlearning runs")
    return _render(runs, audits, names, title), len(runs)


def make_audit_page(audit_dir, title=None):
    """Show one audit on a page of its own.

    Args:
        audit_dir: folder with audit.json and, below it, the results of its stages.
        title: of the page; by default it names the audited model.
    Returns:
        str, HTML that needs no other file and no network. Equal records give equal bytes.
    Raises:
        UserError: no audit.json in the folder, or see `runs.gather_runs`.
    """
    path = Path(audit_dir) / AUDIT
    if not path.is_file():
        raise UserError(f"'{path}' does not exist; pass the folder that python -m llm_unlearn.cli.audit wrote into")
    runs, audits = gather_runs([audit_dir])
    audit = next(audit for audit in audits if audit.path == path.resolve())
    names = dict.fromkeys(result.domain for run in runs for result in run.results)
    title = title or f"Is it really gone? {_name_of(audit, runs)}"
    return _render(runs, audits, names, title)


def _section(comparison, identifier):
    pair = choose_pair(comparison)
    tables = metric_tables(comparison)
    return {
        "identifier": identifier,
        "domain": comparison.domain,
        "mismatches": [
            (glossary.purpose(kind), mismatch) for kind, found in comparison.mismatches.items() for mismatch in found
        ],
        "glance": tables[0],
        "rest": tables[1:],
        "ranks": sum(run.competes for run in comparison.runs) > 1,
        "references": not all(run.competes for run in comparison.runs),
        "outcome": outcome(comparison, pair),
        "pair": pair and (glossary.full_label(pair.x), glossary.full_label(pair.y)),
        "plotted": pair.runs if pair else [],
        "bars": bool(pair) and has_bars(comparison, pair),
        "absent": [run.name for run in comparison.runs if pair and run not in pair.runs],
        "scatter": pair and draw_scatter(comparison, pair, f"{identifier}-scatter"),
        "recovery": recovery_parts(comparison, identifier),
        "roc": roc_part(comparison, identifier),
        "layers": layers_part(comparison, identifier),
        "answers": answers_part(comparison),
        "samples": samples_part(comparison),
    }


def _training(runs):
    """Return the panels of the training curves, drawn, and the references whose training is left out of them."""
    # A second score of one model is a run of its own, but not a second training.
    by_folder = {}
    for run in runs:
        if run.history():
            by_folder.setdefault(run.training.folder, run)
    trained = list(by_folder.values())
    drawn = [run for run in trained if run.competes] or trained
    panels = [
        {"panel": panel, "svg": draw_panel(panel, f"curve-{number}")} for number, panel in enumerate(find_panels(drawn))
    ]
    left_out = [run.name for run in trained if run not in drawn]
    return {
        "panels": panels,
        "runs": drawn,
        "left_out": left_out,
        "dropped": sum(p["panel"].num_dropped for p in panels),
    }


def _meanings(comparisons):
    """Return [(label, meaning)] of the metrics that appear, in the order of the glossary."""
    names = {name for comparison in comparisons for kind in comparison.kinds for name in comparison.names(kind)}
    there = {part for name in names for part in name.split("/")}
    there |= {"leak@k"} if any(part.startswith("leak_at_") for part in there) else set()
    return [(glossary.label(name), meaning) for name, meaning in glossary.MEANINGS.items() if name in there]


def _breakable(name):
    """Return a name as markup that may break after the signs that join its words, and within very long words."""
    from markupsafe import Markup, escape

    parts = re.findall(r"[^_/\\.=,-]{1,14}[_/\\.=,-]*|[_/\\.=,-]+", name)
    return Markup("<wbr>").join(escape(part) for part in parts)


def _contents(parts):
    """Return [(id of a section, its heading)] of a page, for who wants to jump.

    Args:
        parts: what `page.html.j2` is given: verdict, sections, training, cost, meanings.
    """
    found = [("verdict", "Verdict")] if parts["verdict"] else []
    for section in parts["sections"]:
        where = f" on {section['domain']}" if len(parts["sections"]) > 1 else ""
        there = {
            "summary": "At a glance",
            "recovery": "What attacks bring back" if section["recovery"] else "",
            "pareto": "Forgetting against keeping" if section["scatter"] else "",
            "roc": "Who was in the forget set" if section["roc"] else "",
            "layers": "What the layers know" if section["layers"] else "",
            "texts": "What the models write" if section["answers"] or section["samples"] else "",
        }
        found += [(f"{section['identifier']}-{name}", words + where) for name, words in there.items() if words]
    found += [("training", "Training")] if parts["training"]["panels"] else []
    for section in parts["sections"]:
        if section["rest"]:
            found.append((f"{section['identifier']}-{section['rest'][0].identifier}-table", "All metrics"))
    found += [("cost-table", "Cost")] if parts["cost"] else []
    found += [("meanings", "What the numbers mean")] if parts["meanings"] else []
    return [*found, ("origins", "Where the runs come from")]


def _name_of(audit, runs):
    run = audited_run(runs, audit)
    return run.name if run else audit.model


def _keyed(runs, sections):
    """Return what has a line and a marker of its own: the runs, and the variants of ablations."""
    parts = [part for section in sections for part in section["recovery"]]
    variants = {owner.number: owner for part in parts for owner in part["owners"] if isinstance(owner, Variant)}
    return [*runs, *variants.values()]


def _render(runs, audits, domains, title):
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    comparisons = [
        Comparison(name, [run for run in runs if any(result.domain == name for result in run.results)])
        for name in domains
    ]
    sections = [_section(comparison, f"domain-{number}") for number, comparison in enumerate(comparisons)]
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    # SVG, style and script are made here from escaped or own text; everything else is escaped by the template.
    environment.filters["markup"] = Markup
    environment.filters["breakable"] = _breakable
    environment.filters["listed"] = formatting.listed
    parts = {
        "verdict": verdicts(audits, runs),
        "sections": sections,
        "training": _training(runs),
        "cost": cost_table(runs),
        "meanings": _meanings(comparisons),
    }
    return environment.get_template("page.html.j2").render(
        title=title,
        runs=runs,
        roles=ROLES,
        overview=overview(runs, comparisons),
        contents=_contents(parts),
        **parts,
        settings=settings_table(runs),
        provenance=[(run, provenance(run)) for run in runs],
        audits=[audit_provenance(audit, _name_of(audit, runs)) for audit in audits],
        keys=key_symbols(_keyed(runs, sections)),
        version=llm_unlearn.__version__,
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
