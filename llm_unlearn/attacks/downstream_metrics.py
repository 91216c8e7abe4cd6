"""What fine-tuning on unrelated tasks did: where its checkpoints lie, and the curves of all tasks as metrics."""

import dataclasses
import math
import statistics as means
from dataclasses import dataclass

from llm_unlearn.attacks.task_accuracy import NOT_GENERATED
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.scores import HIGHER, LOWER, NONE, Metric, absent


@dataclass
class TaskRun:
    """What fine-tuning on one task did.

    Attributes:
        name: of the task.
        rows: of the curve, one an evaluation, as `finetuning.AttackRun` has them.
        checkpoints: steps whose evaluations count as checkpoints.
        cosines: {"all" or a group of layers: what `task_vectors.Alignment.as_dict` says}, or None without a target.
        num_held_out: rows on which the accuracy rests.
        settings: of the fine-tuning, for results.json.
        counters: what it cost.
    """

    name: str
    rows: list
    checkpoints: list
    cosines: dict | None
    num_held_out: int
    settings: dict
    counters: dict

    def curve(self):
        """Return the curve as the report reads it."""
        return {"name": self.name, "settings": self.settings, "rows": self.rows, "checkpoints": self.checkpoints}

    def last(self):
        """Return the row of the last step, None where fine-tuning diverged before it."""
        return next((row for row in self.rows if row["step"] == self.checkpoints[-1]), None)


def planned_steps(num_sequences, settings, num_processes=1):
    """Return how many optimizer steps a fine-tuning takes, the last of an epoch counted although it is not full.

    Args:
        num_sequences: that are trained on.
        settings: FinetuningSettings.
        num_processes: that share them.
    """
    if settings.max_steps > 0:
        return settings.max_steps
    per_epoch = math.ceil(math.ceil(num_sequences / (settings.batch_size * num_processes)) / settings.grad_accumulation)
    return max(1, math.ceil(per_epoch * settings.epochs))


def checkpoint_steps(num_steps, count=3, given=None):
    """Return the steps after which a model counts as a checkpoint.

    Args:
        num_steps: of the fine-tuning.
        count: how many, evenly spaced, the last step among them; fewer where there are fewer steps.
        given: steps that the user named instead, to which the last is added, or None.
    Returns:
        ascending list of int.
    Raises:
        UserError: a named step that the run does not reach.
    """
    if given:
        beyond = next((step for step in given if not 1 <= step <= num_steps), None)
        if beyond is not None:
            raise UserError(
                f"--checkpoint_steps names step {beyond}, but fine-tuning takes {num_steps} steps; pass steps up to "
                "that, or more --epochs"
            )
        return sorted({*given, num_steps})
    return sorted({max(1, round(num_steps * number / count)) for number in range(1, count + 1)})


def read_steps(text):
    """Return the steps that `--checkpoint_steps 10,30,100` names, or None without it.

    Raises:
        UserError: a word that is no whole number.
    """
    if not text:
        return None
    words = [word.strip() for word in str(text).split(",") if word.strip()]
    wrong = next((word for word in words if not word.isdigit()), None)
    if wrong is not None or not words:
        raise UserError(f"--checkpoint_steps takes whole numbers as in 10,30,100, but was given '{text}'")
    return [int(word) for word in words]


def run_metrics(runs, before, tracked, forget_sets):
    """Return the metrics of all tasks together.

    Args:
        runs: list of TaskRun.
        before: {name: Metric} of the unlearned model on the domain.
        tracked: names of the metrics that the curves hold.
        forget_sets: names of the sets that were to be forgotten.
    Returns:
        {name: Metric}: each tracked metric before; `<metric>/after_<task>` at the end; for forget sets also
        `<metric>/mean_after_<task>` over the checkpoints and `<metric>/mean_after` over those of all tasks; what the
        task is measured by, after and before, and `accuracy/mean` over the tasks; `cosine/<task>`.
    """
    found = {name: before[name] for name in tracked}
    forget = [name for name in tracked if name.rpartition("/")[0] in forget_sets]
    for run in runs:
        for name in tracked:
            direction, count = before[name].direction, before[name].n
            found[f"{name}/after_{run.name}"] = _at_the_end(run.last(), name, direction, count)
            if name in forget:
                mean = _mean_over_checkpoints(run, name)
                found[f"{name}/mean_after_{run.name}"] = _metric(mean, direction, count)
        found |= _accuracies(run)
        found[f"cosine/{run.name}"] = _cosine(run.cosines)
    for name in forget:
        values = [_mean_over_checkpoints(run, name) for run in runs]
        found[f"{name}/mean_after"] = _mean(values, before[name].direction)
    found["accuracy/mean"] = _mean([found[f"{run.name}/accuracy"].value for run in runs], HIGHER)
    return found


def limited(settings, num_sequences, num_processes=1):
    """Return FinetuningSettings with the number of steps written out, so that checkpoints can be placed in it."""
    return dataclasses.replace(settings, max_steps=planned_steps(num_sequences, settings, num_processes))


def _mean_over_checkpoints(run, name):
    """Return the mean of a metric over the checkpoints, or None where one of them is missing."""
    values = [row.get(name) for row in run.rows if row["step"] in run.checkpoints]
    return None if None in values or len(values) < len(run.checkpoints) else means.fmean(values)


def _accuracies(run):
    first, last, found, count = run.rows[0], run.last(), {}, run.num_held_out
    names = [name for name in {**first, **(last or {})} if name.startswith(f"{run.name}/")]
    for name in dict.fromkeys([*names, f"{run.name}/accuracy"]):
        direction = LOWER if name.endswith("/nll") else HIGHER
        if name not in first:
            found[name] = absent(NOT_GENERATED, direction)
            continue
        before = (first.get("stderr") or {}).get(name)
        found[name] = _at_the_end(last, name, direction, count)
        found[f"{name}/before"] = _metric(first.get(name), NONE, count, before)
    return found


def _cosine(cosines):
    if cosines is None:
        return absent("there is no unlearning vector without --target_model", HIGHER)
    value = cosines["all"]["cosine"]
    if value is None:
        length = cosines["all"]["finetuning_norm"]
        if length is None:
            return absent("fine-tuning left weights that are not finite", HIGHER)
        which = "fine-tuning" if not length else "unlearning"
        return absent(f"{which} changed no weight, so that there is no direction to compare", HIGHER)
    return Metric(value, None, 1, HIGHER)


def _at_the_end(row, name, direction, num_rows):
    if row is None:
        return absent("fine-tuning diverged before its last step", direction)
    return _metric(row.get(name), direction, num_rows, (row.get("stderr") or {}).get(name))


def _metric(value, direction, num_rows, stderr=None):
    return absent("the evaluation failed", direction) if value is None else Metric(value, stderr, num_rows, direction)


def _mean(values, direction):
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return absent(f"{len(values) - len(known)} of {len(values)} tasks have no value", direction)
    return Metric(means.fmean(known), None, len(known), direction)
