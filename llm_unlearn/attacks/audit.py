"""Runs the stages of an audit one after the other in this process, keeps what is done, and goes on past what fails."""

import contextlib
import gc
import hashlib
import importlib
import io
import json
import logging
import shutil
import time
from dataclasses import fields
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from llm_unlearn.arguments import ScoringFlags
from llm_unlearn.attacks.attack_state import STATE
from llm_unlearn.attacks.audit_plan import GOLD, MODEL, PRESETS, words_of
from llm_unlearn.attacks.verdict import Evidence, findings, verdict
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.results import RESULTS, write_json
from llm_unlearn.processes import is_first_process
from llm_unlearn.records import command_line, package_versions, peak_memory

logger = logging.getLogger(__name__)
AUDIT, PAGE = "audit.json", "audit.html"
DONE, KEPT, NOT_APPLICABLE, FAILED = "done", "kept", "not_applicable", "failed"
WORDS = {MODEL: "audited", "target": "target", GOLD: "gold"}
_SIGNATURE = "stage.json"
_RESUMING = ("relearn", "tamper")
"""Stages that go on where they were killed, if the command has not changed; they train float32, and refuse --dtype."""
_OWN = {"output_dir", "overwrite_output_dir", "do_eval", "statistics_dir", "model_name_or_path"}


class Audit:
    """An audit in a folder.

    Attributes:
        stages: list of dicts of audit.json, one a job that was run or kept.

    Args:
        parsed: ParsedEvaluation of AuditFlags.
        models: {who: folder or Hub name}.
        folder: of the audit.
        references: folder in which the results of target and gold model are kept for other audits, or None.
    """

    def __init__(self, parsed, models, folder, references=None):
        self.parsed, self.models = parsed, models
        self.folder, self.references = Path(folder), references and Path(references)
        self.stages = []

    def run(self, jobs):
        """Run what is not there yet; all processes call together.

        Args:
            jobs: list of audit_plan.Job.
        Returns:
            the contents of audit.json.
        """
        if is_first_process():
            self.folder.mkdir(parents=True, exist_ok=True)
        bar = tqdm(jobs, "audit", disable=not is_first_process(), unit="stage")
        for job in bar:
            bar.set_postfix_str(f"{job.who}: {job.stage.name}")
            self.stages.append(self._run(job))
            record = self.record()
            if is_first_process():
                write_json(self.folder / AUDIT, record)
        return self.record()

    def record(self):
        """Return the contents of audit.json as far as the audit has come."""
        found = {}
        for stage in self.stages:
            path = self.folder / stage["folder"] / RESULTS
            if stage["status"] in (DONE, KEPT) and path.is_file():
                found[stage["model"], stage["name"]] = json.loads(path.read_text(encoding="utf-8"))
        preset = self.parsed.flags.preset
        left_out = [stage.name for stage in PRESETS[preset] if (MODEL, stage.name) not in found]
        summed = {"seconds": round(sum(stage["seconds"] for stage in self.stages), 3)}
        for name in ("model_calls", "token_forwards", "decode_steps"):
            summed[name] = sum(record["counters"].get(name) or 0 for record in found.values())
        return {
            "schema_version": 1,
            "kind": "audit",
            "model": self.models[MODEL],
            "target": self.models.get("target"),
            "gold": self.models.get(GOLD),
            "preset": preset,
            "domain": self.parsed.data.domain,
            "command": command_line(self.parsed.words, "-m llm_unlearn.cli.audit"),
            "versions": package_versions(),
            "verdict": verdict(findings(Evidence(found)), preset, left_out),
            "stages": self.stages,
            "counters": {**summed, "peak_memory_bytes": peak_memory()},
        }

    def _place(self, place):
        """Return where the results of a place are made: those of other models where further audits find them."""
        return (self.references if self.references and "/" in place else self.folder) / place

    def _run(self, job):
        words = self._words(job)
        place, started = self._place(job.place), time.monotonic()
        typed = command_line(words, f"-m llm_unlearn.cli.{job.stage.script}")
        entry = {"name": job.stage.name, "model": job.who, "folder": job.place, "command": typed}
        signature = self._signature(words, job)
        begun, kept = _held(place, signature)
        if kept is not None:
            self._copy(place, job.place)
            PartialState().wait_for_everyone()
            return {**entry, "seconds": kept, "status": KEPT}
        if is_first_process():
            place.mkdir(parents=True, exist_ok=True)
            if not begun:
                _discard(place, self.folder / job.place)
            write_json(place / _SIGNATURE, {"signature": signature})
        if begun and job.stage.name in _RESUMING:
            words = [*words[: words.index("--overwrite_output_dir")], "--resume_from_checkpoint", "auto"]
        status, reason = self._call(job, words)
        seconds = round(time.monotonic() - started, 3)
        if status == DONE and is_first_process():
            write_json(place / _SIGNATURE, {"signature": signature, "seconds": seconds})
            self._copy(place, job.place)
        PartialState().wait_for_everyone()
        return {**entry, "seconds": seconds, "status": status, **({"reason": reason} if reason else {})}

    def _call(self, job, words):
        """Run a stage's script; returns (status, why it is not done or None)."""
        module = importlib.import_module(f"llm_unlearn.cli.{job.stage.script}")
        # The tables of the scripts are for somebody who runs one of them.
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                module.run(words)
        except UserError as error:
            logger.warning("%s of the %s model: %s", job.stage.name, WORDS[job.who], error)
            return NOT_APPLICABLE, str(error)
        except Exception as error:
            logger.exception("%s of the %s model failed; the audit goes on", job.stage.name, WORDS[job.who])
            return FAILED, f"{type(error).__name__}: {error}"
        finally:
            gc.collect()
        return DONE, None

    def _words(self, job):
        words = words_of(job, self.models, self._place, [*self._shared(job), *self._kept(job)])
        if job.stage.name in ("relearn", "tamper") and self.parsed.flags.attack_lr:
            place = words.index("--sweep") + 1
            rest = [part for part in words[place].split(";") if not part.startswith("lr=")]
            words[place] = ";".join([f"lr={self.parsed.flags.attack_lr}", *rest])
        return words

    def _kept(self, job):
        """Return the flag of the answers by example, shared by all stages on one model, and by other audits."""
        return ["--statistics_dir", str(self._place("statistics" if job.who == MODEL else f"{job.who}/statistics"))]

    def _shared(self, job):
        """Return the flags of the audit that all its scripts get, where they are not the defaults."""
        parsed, words = self.parsed, []
        own = _OWN | {"dtype"} if job.stage.name in _RESUMING else _OWN
        scoring = [field for field in fields(ScoringFlags) if field.name not in _OWN]
        described = [(parsed.flags, scoring), (parsed.data, fields(parsed.data)), (parsed.model, fields(parsed.model))]
        for holder, declared in described:
            for field in declared:
                value = getattr(holder, field.name)
                is_other = field.name == "model_revision" and job.who != MODEL
                if value is None or value == field.default or isinstance(value, list) or field.name in own or is_other:
                    continue
                words += [f"--{field.name}", str(value)]
        return words

    def _signature(self, words, job):
        """Return what tells whether results are those of the same command on the same weights."""
        others = [who for who, _ in job.stage.references]
        own = [self.folder / place for place in (job.place, "statistics", f"{job.who}/statistics")]
        own += [self.folder / who / job.stage.name / RESULTS for who in others]
        words = [word for word in words if word not in set(map(str, own))]
        known = {job.who, *others}
        weights = {who: _stamp(name) for who, name in self.models.items() if who in known or name in words}
        return hashlib.sha256(json.dumps([words, weights], sort_keys=True).encode()).hexdigest()

    def _copy(self, place, name):
        if is_first_process() and place != self.folder / name:
            shutil.copytree(place, self.folder / name, dirs_exist_ok=True)


def _stamp(name):
    """Return names, sizes and times of a folder's files; a model on the Hub is known by its name."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    return sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()
    )


def _held(place, signature):
    """Return whether a stage was begun with a signature, and its seconds or None: on all processes what the first sees.

    The first one writes the file next, so that another one might read that.
    """
    found = _read(place / _SIGNATURE)
    is_same = found.get("signature") == signature
    answer = [(is_same, found.get("seconds") if is_same else None)]
    return broadcast_object_list(answer)[0] if PartialState().num_processes > 1 else answer[0]


def _discard(place, copied):
    """Delete what another command or other weights left, which a killed attack would go on with, or the page show."""
    for path in {place / RESULTS, copied / RESULTS, *place.rglob(STATE)}:
        path.unlink(missing_ok=True)


def _read(path):
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
