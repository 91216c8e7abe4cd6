"""What an evaluation writes: results.json, the values of every example, and the files of two published layouts."""

import json
import logging
import math
import os
import platform
from pathlib import Path

import llm_unlearn
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.metrics import DEFINITION_VERSION
from llm_unlearn.evaluation.published_layouts import acl2024_layout, open_unlearning_layout
from llm_unlearn.evaluation.scores import Metric

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
RESULTS, PER_EXAMPLE, TOFU_EVAL = "results.json", "per_example.jsonl", "TOFU_EVAL.json"
_ARROWS = {"lower": "lower", "higher": "higher", "none": ""}


def results_record(kind, domain, model, command, versions, fingerprints, parts, outcome, legacy, wording=None):
    """Return the contents of results.json.

    Args:
        kind: "eval" or "mia".
        domain: --domain, or None where only lm_eval ran.
        model: folder or Hub name.
        command: the command line.
        versions: {package: version}.
        fingerprints: of weights, tokenizer and questions.
        parts: list of Part.
        outcome: suite.Outcome.
        legacy: whether open-unlearning's definitions were in force.
        wording: of `retain_reference.wording`.
    Returns:
        dict, JSON-serializable without NaN.
    """
    splits = {}
    for part in parts:
        entry = splits.setdefault(part.name, {"rows": 0, "sha256": part.sha256, "origins": []})
        entry["rows"] += len(part.rows)
        entry["origins"] += part.origins
    own = {"llm_unlearn": llm_unlearn.__version__, "python": platform.python_version()}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "domain": domain,
        "model": model,
        "command": command,
        "definitions": {"version": DEFINITION_VERSION, "legacy": legacy},
        "wording": wording,
        "versions": {**own, **versions},
        "fingerprints": fingerprints,
        "splits": splits,
        "metrics": {name: finite_metric(metric).as_dict() for name, metric in outcome.metrics.items()},
        "counters": outcome.counters,
        "reference_values": finite(outcome.reference_values),
    }


def finite_metric(metric):
    """Return a metric whose value JSON can hold: what is not finite becomes null with the reason."""
    if metric.value is not None and not math.isfinite(metric.value):
        return Metric(None, None, metric.n, metric.direction, f"the value is {metric.value}")
    return metric


def finite(value):
    """Return a value with every number that is not finite replaced by None, however deep."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_output_directory(folder, model, domain, overwrite, kind=None):
    """Refuse a directory that holds the results of something else.

    Args:
        folder: where results are to go.
        model: that is scored.
        domain: that it is scored on.
        overwrite: whether other results may be lost.
        kind: of the results that are to come; None: of any kind.
    Raises:
        UserError: a file, a directory that cannot be written, or one with other results.
    """
    folder = Path(folder)
    check_writable(folder, "--output_dir")
    path = folder / RESULTS
    if not path.is_file() or overwrite:
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return
    found = found if isinstance(found, dict) else {}
    if (found.get("model"), found.get("domain")) != (model, domain):
        raise UserError(
            f"--output_dir '{folder}' holds the results of {found.get('model')} on {found.get('domain')}; pass "
            "--overwrite_output_dir or another"
        )
    if kind and found.get("kind", kind) != kind:
        raise UserError(
            f"--output_dir '{folder}' holds results of the kind {found['kind']}, which those of the kind {kind} would "
            "replace; pass --overwrite_output_dir or another"
        )


def check_writable(folder, flag):
    """Refuse a folder that cannot be made or written into.

    Raises:
        UserError: naming the flag.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise UserError(f"{flag} '{folder}' {'is a file' if place == folder else f'lies below the file {place}'}")
    if not os.access(place, os.W_OK):
        raise UserError(f"{flag} '{folder}' cannot be written")


def write_results(folder, record, examples, seconds):
    """Write every file of an evaluation, each complete before it takes its name.

    Args:
        folder: output directory.
        record: of `results_record`.
        examples: {set: rows of `example_values`}.
        seconds: wall time.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for part in examples.values() for row in part]
    write_text(folder / PER_EXAMPLE, "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))
    if record["domain"] == "tofu":
        write_json(folder / TOFU_EVAL, finite(open_unlearning_layout(record, examples)))
    if record["domain"] in ("arxiv", "github", "books"):
        for name, contents in acl2024_layout(examples, seconds).items():
            write_json(folder / name, finite(contents))
    write_json(folder / RESULTS, record)


def write_json(path, contents):
    """Write JSON without NaN."""
    write_text(path, json.dumps(contents, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path, text):
    """Write a file beside its place first, so that no reader ever sees half of it."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def table(record):
    """Return the metrics as text for a terminal, those without a value behind it by their reason.

    Args:
        record: of `results_record`.
    """
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=None)
    headings = {"metric": "left", "value": "right", "+-": "right", "n": "right", "better": "left"}
    for heading, justify in headings.items():
        shown.add_column(heading, justify=justify, no_wrap=heading != "better")
    absent = {}
    for name, metric in record["metrics"].items():
        if metric["value"] is None:
            absent.setdefault(metric.get("reason", ""), []).append(name)
            continue
        stderr = "" if metric["stderr"] is None else _number(metric["stderr"])
        shown.add_row(name, _number(metric["value"]), stderr, str(metric["n"]), _ARROWS[metric["direction"]])
    console = Console(no_color=True, highlight=False, width=None if os.isatty(1) else 140)
    with console.capture() as capture:
        console.print(shown, markup=False)
    reasons = [f"not computed: {', '.join(names)}\n    ({reason})\n" for reason, names in absent.items()]
    return f"{record['model']} on {record['domain'] or 'lm_eval'}\n{capture.get()}{''.join(reasons)}"


def _number(value):
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"
