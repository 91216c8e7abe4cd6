"""What a fine-tuning attack leaves on disk as it goes, so that a killed one goes on, and no evaluation is repeated."""

import json
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.results import finite_metric, write_json
from llm_unlearn.processes import is_first_process

STATE = "attack.json"
STAMP = "%Y%m%d_%H%M%S"
START_ANEW = (
    "to start anew, leave --resume_from_checkpoint out (tamper, relearn), or pass --overwrite_output_dir (others)"
)


@dataclass
class AttackState:
    """An attack so far.

    Attributes:
        identity: what makes it this attack: settings, rows and model; another one is never continued.
        stamp: when it began, as in the names of its files.
        names: metrics of its rows, in order; [] before the first evaluation that succeeded.
        rows: of the curve.
        failures: [{"step", "error"}] of the evaluations that failed.
        seconds: spent so far, training and evaluation together.
        evaluation_seconds: of these, evaluation.
        optimizer_steps: of the attack that were done.
        planned_steps: optimizer steps of the attack that were planned.
        counters: {"sequences", "tokens"} of its training.
        ended: why it ended before its plan, or None.
        stopped: whether that was asked for, by `stop_when`.
        finished: whether nothing is left to do.
    """

    identity: dict
    stamp: str = ""
    names: list = field(default_factory=list)
    rows: list = field(default_factory=list)
    failures: list = field(default_factory=list)
    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    optimizer_steps: int = 0
    planned_steps: int = 0
    counters: dict = field(default_factory=dict)
    ended: str | None = None
    stopped: bool = False
    finished: bool = False

    @classmethod
    def open(cls, folder, identity, resume):
        """Return the state that an earlier run left in a folder, or a new one.

        Args:
            folder: of the attack.
            identity: JSON-serializable dict.
            resume: whether an earlier run is continued.
        Raises:
            UserError: the folder holds another attack.
        """
        path = Path(folder) / STATE
        fresh = cls(json.loads(json.dumps(identity)), datetime.now().astimezone().strftime(STAMP))
        if not resume or not path.is_file():
            return fresh
        try:
            found = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"'{path}' is not as it was written; {START_ANEW}") from error
        for name in fresh.identity:
            before, now = found.identity.get(name), fresh.identity[name]
            if before != now:
                shown = (
                    "are others"
                    if name in ("rows", "repair_rows", "weights", "questions")
                    else f"was {before} and is {now}"
                )
                raise UserError(
                    f"'{folder}' holds an attack that differs: {name} {shown}; {START_ANEW}, or pass another "
                    "--output_dir"
                )
        return found

    def write(self, folder):
        """Write the state on the first process, complete before it takes its name."""
        if is_first_process():
            Path(folder).mkdir(parents=True, exist_ok=True)
            write_json(Path(folder) / STATE, asdict(self))

    def has(self, step):
        """Return whether the row of a step is there, and did not fail."""
        failed = {failure["step"] for failure in self.failures}
        return step not in failed and any(row["step"] == step for row in self.rows)

    def add(self, step, metrics, error, phase=None):
        """Put the row of an evaluation in its place.

        Args:
            step: negative before the attack, in the repair.
            metrics: {name: scores.Metric}; None where the evaluation failed.
            error: why, or None.
            phase: "repair", or None.
        """
        metrics = metrics and {name: finite_metric(metric) for name, metric in metrics.items()}
        if metrics is not None and not self.names:
            self.names = list(metrics)
        row = {"step": step, **{name: metrics[name].value if metrics else None for name in self.names}}
        if metrics is not None:
            row["stderr"] = {name: metrics[name].stderr for name in self.names if metrics[name].stderr is not None}
        row |= {"phase": phase} if phase else {}
        row["timestamp"] = datetime.now().astimezone().isoformat(timespec="seconds")
        self.rows = sorted([*(old for old in self.rows if old["step"] != step), row], key=lambda one: one["step"])
        self.failures = [failure for failure in self.failures if failure["step"] != step]
        self.failures += [{"step": step, "error": error}] if error else []

    def full_rows(self):
        """Return the rows with a null for every metric that one has not, a failed evaluation's before the first."""
        return [{"step": row["step"], **dict.fromkeys(self.names), **row} for row in self.rows]
