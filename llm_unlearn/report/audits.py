"""Reads audit.json: which models an audit compared, what it concluded, and the stages that it ran."""

from dataclasses import dataclass, field
from pathlib import Path

from llm_unlearn.report.json_files import check_version, is_finite, read_object, require

AUDIT = "audit.json"
STATUSES = ("gone", "not_gone", "unclear")
FINDINGS = ("pass", "fail", "unknown")


@dataclass(frozen=True)
class Finding:
    """One check of an audit: its name, "pass", "fail" or "unknown", and the sentence that says why."""

    check: str
    status: str
    sentence: str


@dataclass(frozen=True)
class Stage:
    """One command of an audit; `status` and `reason` say what became of it, `seconds` is None where unknown."""

    name: str
    model: str
    folder: str
    command: str
    seconds: float | None
    status: str
    reason: str = ""


@dataclass(frozen=True)
class Audit:
    """One audit.json; `target` and `gold` are "" where none was given, `status` is one of `STATUSES`, or ""."""

    path: Path
    model: str
    target: str = ""
    gold: str = ""
    preset: str = ""
    domain: str = ""
    command: str = ""
    headline: str = ""
    status: str = ""
    findings: tuple = ()
    stages: tuple = ()
    counters: dict = field(default_factory=dict)

    @property
    def folder(self):
        """The folder of the audit, below which its stages left their results."""
        return self.path.parent

    def contains(self, path):
        """Return whether a file lies in this audit's folder."""
        return self.folder in path.parents


def read_audit(path):
    """Read and check one audit.json.

    Args:
        path: the file.
    Raises:
        UserError: it is not JSON, is of a newer schema, or has another shape.
    """
    raw = read_object(path)
    check_version(path, raw)
    require(path, raw.get("kind") == "audit", f"its kind is {raw.get('kind')!r}, and should be 'audit'")
    model = raw.get("model")
    require(path, isinstance(model, str) and model.strip(), f"'model' must be text, and is {model!r}")
    texts = {name: _text(path, raw, name) for name in ("target", "gold", "preset", "domain", "command")}
    verdict = raw.get("verdict") or {}
    require(path, isinstance(verdict, dict), "'verdict' must be an object")
    status = verdict.get("status") or ""
    require(path, not verdict or status in STATUSES, f"the verdict is {status!r}, known: {', '.join(STATUSES)}")
    counters = raw.get("counters") or {}
    require(path, isinstance(counters, dict), "'counters' must be an object")
    return Audit(
        path=path,
        model=model,
        **texts,
        headline=_text(path, verdict, "headline"),
        status=status,
        findings=tuple(_finding(path, entry) for entry in _objects(path, verdict, "findings")),
        stages=tuple(_stage(path, entry) for entry in _objects(path, raw, "stages")),
        counters=counters,
    )


def _text(path, raw, name):
    value = raw.get(name)
    require(path, value is None or isinstance(value, str), f"'{name}' must be text or null, and is {value!r}")
    return value or ""


def _objects(path, raw, name):
    entries = raw.get(name) or []
    is_list = isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)
    require(path, is_list, f"'{name}' must be a list of objects")
    return entries


def _finding(path, entry):
    status = entry.get("status")
    require(path, status in FINDINGS, f"a finding has the status {status!r}, known: {', '.join(FINDINGS)}")
    return Finding(_text(path, entry, "check"), status, _text(path, entry, "sentence"))


def _stage(path, entry):
    seconds = entry.get("seconds")
    require(path, seconds is None or is_finite(seconds), f"a stage took {seconds!r} seconds, neither number nor null")
    texts = {name: _text(path, entry, name) for name in ("name", "model", "folder", "command", "status", "reason")}
    return Stage(seconds=seconds, **texts)
