"""Reads what runs leave on disk: results.json, audit.json, unlearning.json, trainer_state.json, and demo.json."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from llm_unlearn.errors import UserError
from llm_unlearn.report.audits import AUDIT, read_audit
from llm_unlearn.report.json_files import check_version, read_object
from llm_unlearn.report.payloads import read_payload

SCORES = ("eval", "mia")
ATTACKS = ("relearn", "tamper", "downstream", "quantize", "sampling", "white_box", "ablate")
KINDS = (*SCORES, *ATTACKS)
DEMO = "demo.json"
LM_EVAL = "lm_eval"
DIRECTIONS = ("lower", "higher", "none")
_CHECKPOINT = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Metric:
    """One number of a results.json: value and standard error in the metric's own unit, over n examples.

    `direction` is which way a better unlearning goes; a value of None comes with the reason why there is none.
    """

    value: float | None
    stderr: float | None = None
    n: int | None = None
    direction: str = "none"
    reason: str | None = None


@dataclass(frozen=True)
class Result:
    """One results.json; `path` is the file, `model` the checkpoint as the command named it.

    `payload` holds what attacks leave beside their metrics (see `payloads.read_payload`); `variant` tells apart several
    results of one kind of attack on one model.
    """

    path: Path
    kind: str
    domain: str
    model: str
    metrics: dict
    command: str = ""
    versions: dict = field(default_factory=dict)
    fingerprints: dict = field(default_factory=dict)
    definitions: dict = field(default_factory=dict)
    splits: dict = field(default_factory=dict)
    counters: dict = field(default_factory=dict)
    payload: dict = field(default_factory=dict)
    variant: str = ""

    @property
    def label(self):
        """Kind with the variant, as "tamper" or "tamper/benign": what results of several runs are matched by."""
        return f"{self.kind}/{self.variant}" if self.variant else self.kind


@dataclass(frozen=True)
class Records:
    """What was found below some folders, in their order: Results, {resolved folder: Training} and Audits."""

    results: list
    trainings: dict
    audits: list


@dataclass(frozen=True)
class Training:
    """One training run: its folder, unlearning.json ({} where there is none), and the rows of trainer_state.json."""

    folder: Path
    record: dict
    history: tuple


def is_checkpoint(name):
    """Return whether a folder's name is that of a checkpoint in mid-training, as `checkpoint-20`."""
    return _CHECKPOINT.fullmatch(name) is not None


def natural_key(text):
    """Return a sort key under which checkpoint-20 comes before checkpoint-100."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text)]


def find_records(folders):
    """Read every record in and below some folders; hidden folders and checkpoints in mid-training are passed over.

    Args:
        folders: paths, in the order in which their runs shall appear.
    Returns:
        Records.
    Raises:
        UserError: a folder does not exist, or a record in it is malformed or of a newer schema.
    """
    records, seen = Records([], {}, []), set()
    for top in folders:
        for folder, names in _walk(Path(top)):
            if folder in seen:
                continue
            seen.add(folder)
            if "results.json" in names:
                records.results.append(read_result(folder / "results.json"))
            if "unlearning.json" in names or ("trainer_state.json" in names and not is_checkpoint(folder.name)):
                records.trainings[folder] = read_training(folder)
            if AUDIT in names:
                records.audits.append(read_audit(folder / AUDIT))
            if DEMO in names:
                records.results.extend(_read_demo(folder / DEMO))
    return records


def _walk(top):
    if not top.exists():
        raise UserError(f"'{top}' does not exist; pass folders that hold results.json or unlearning.json")
    if not top.is_dir():
        raise UserError(f"'{top}' is a file; pass the folder that holds it")
    for folder, children, names in os.walk(top.resolve()):
        children[:] = sorted((name for name in children if not name.startswith(".")), key=natural_key)
        yield Path(folder), names


def read_result(path):
    """Read and check one results.json.

    Args:
        path: the file.
    Raises:
        UserError: it is not JSON, lacks what a report needs, or is of a newer schema.
    """
    raw = read_object(path)
    check_version(path, raw)
    if raw.get("kind") not in KINDS:
        raise UserError(f"{path} is malformed: its kind is {raw.get('kind')!r}, known: {', '.join(KINDS)}")
    # run_eval.py that ran lm_eval alone has no domain.
    raw["domain"] = LM_EVAL if raw.get("domain", "") is None else raw.get("domain")
    for name in ("domain", "model"):
        if not isinstance(raw.get(name), str) or not raw[name].strip():
            raise UserError(f"{path} is malformed: '{name}' must be text, and is {raw.get(name)!r}")
    if not isinstance(raw.get("metrics"), dict):
        raise UserError(f"{path} is malformed: 'metrics' must be an object of metrics by name")
    objects = {}
    for name in ("versions", "fingerprints", "definitions", "splits", "counters"):
        objects[name] = {} if raw.get(name) is None else raw[name]
        if not isinstance(objects[name], dict):
            raise UserError(f"{path} is malformed: '{name}' must be an object")
    for name, split in objects["splits"].items():
        if not isinstance(split, dict):
            raise UserError(f"{path} is malformed: the split '{name}' must be an object")
    return Result(
        path=path,
        kind=raw["kind"],
        domain=raw["domain"],
        model=raw["model"],
        command=str(raw.get("command") or ""),
        metrics={name: _metric(path, name, entry) for name, entry in raw["metrics"].items()},
        payload=read_payload(path, raw),
        **objects,
    )


def _metric(path, name, raw):
    if not isinstance(raw, dict) or "value" not in raw:
        raise UserError(f"{path} is malformed: metric '{name}' must be an object with a 'value'")
    for part in ("value", "stderr", "n"):
        entry = raw.get(part)
        if entry is not None and (isinstance(entry, bool) or not isinstance(entry, (int, float))):
            raise UserError(f"{path} is malformed: '{part}' of metric '{name}' is {entry!r}, neither number nor null")
    direction = raw.get("direction", "none")
    if direction not in DIRECTIONS:
        known = ", ".join(DIRECTIONS)
        raise UserError(f"{path} is malformed: metric '{name}' has the direction {direction!r}, known: {known}")
    reason = str(raw["reason"]) if raw.get("reason") else None
    return Metric(raw["value"], raw.get("stderr"), raw.get("n"), direction, reason)


def read_training(folder):
    """Read unlearning.json and trainer_state.json of a training run; either may be missing.

    Args:
        folder: where they lie.
    Raises:
        UserError: one of them is not JSON, has another shape, or is of a newer schema.
    """
    record, history = {}, []
    if (folder / "unlearning.json").is_file():
        record = read_object(folder / "unlearning.json")
        check_version(folder / "unlearning.json", record)
    path = folder / "trainer_state.json"
    if path.is_file():
        history = read_object(path).get("log_history", [])
        if not isinstance(history, list) or not all(isinstance(row, dict) for row in history):
            raise UserError(f"{path} is malformed: 'log_history' must be a list of objects")
    return Training(folder, record, tuple(history))


def _read_demo(path):
    """Return what demo.json says of the target and of the unlearned model beside it; [] where it is another's file."""
    raw = read_object(path)
    results = []
    for moment, folder in (("before", "target"), ("after", "unlearned")):
        values = raw.get(moment)
        if not isinstance(values, dict) or not all(isinstance(value, (int, float)) for value in values.values()):
            return []
        ways = {"forget": "lower", "retain": "higher"}
        metrics = {
            name: Metric(value, direction=ways.get(name.split("/")[0], "none")) for name, value in values.items()
        }
        seed = {"demo_seed": raw.get("demo_seed")}
        results.append(Result(path, "eval", "demo", str(path.parent / folder), metrics, "make demo", fingerprints=seed))
    return results
