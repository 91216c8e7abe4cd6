"""White-box audits of one model after the other, and what they say side by side, layer by layer."""
# Shapes: R rows, L decoder layers. Layer -1 is what the embeddings hand on, layer l what decoder layer l does.

import logging
from dataclasses import dataclass, field

import numpy as np

from llm_unlearn.attacks.layer_probes import ProbeFit, fit_probes, fold_error, pooled_states, probe_metrics
from llm_unlearn.attacks.logit_lens import LensReading, lens_metrics, own_lens, read_answers
from llm_unlearn.attacks.patching import THRESHOLD, depth_metrics, patching_drops, unlearning_depth
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.scores import HIGHER, LOWER, absent

logger = logging.getLogger(__name__)

AUDITS = ("lens", "probe", "uds")
_NAMES = {
    "lens": ("lens/forget_probability_last", "lens/forget_best_layer_probability", "lens/forget_area"),
    "probe": ("probe/forget_best_accuracy", "probe/forget_mean_accuracy"),
    "uds": ("uds/forget",),
}


@dataclass
class Findings:
    """What the audits found of one model.

    Attributes:
        lens: LensReading, or None.
        fit: ProbeFit, or None.
        drops: (R, L) of `patching_drops` into the target, or None.
        reasons: {audit: why it found nothing}.
    """

    lens: LensReading | None = None
    fit: ProbeFit | None = None
    drops: np.ndarray | None = None
    reasons: dict = field(default_factory=dict)


@dataclass
class Audit:
    """What is asked of every model.

    Attributes:
        audits: names out of `AUDITS`.
        rows: list of AuditedRow.
        task: ProbeTask, or None.
        bounds: answer_states.Bounds.
        task_reason: why there is no task.
        lens: TunedLens that reads every model's states, or None: each model's own logit lens does.
        seed: of the bootstrap.
    """

    audits: tuple
    rows: list
    task: object
    bounds: object
    task_reason: str | None = None
    lens: object = None
    seed: int = 0

    def __call__(self, model, target=None):
        """Return the Findings of a model; all processes call together.

        Args:
            model: a causal language model on its device, unwrapped, in eval mode.
            target: the model that its states are patched into; None patches nothing.
        """
        found = Findings()
        if "lens" in self.audits:
            try:
                found.lens = read_answers(model, self.lens or own_lens(model), self.rows, self.bounds)
            except UserError as error:
                found.reasons["lens"] = str(error)
        if "probe" in self.audits and self.task is not None:
            found.fit = fit_probes(pooled_states(model, self.task, self.bounds), self.task)
        elif "probe" in self.audits:
            found.reasons["probe"] = self.task_reason
        if "uds" in self.audits and target is not None:
            found.drops = patching_drops(target, model, self.rows, self.bounds)
        return found

    def depth(self, found, gold):
        """Return (Depth, None) of a model's Findings against gold's, or (None, why there is none)."""
        if found.drops is None:
            return None, "no model knows the answers and can be patched; pass --target_model, and --gold"
        if gold is None or gold.drops is None:
            return None, "what there was to erase is measured on a model that never saw the forget set; pass --gold"
        return unlearning_depth(found.drops, gold.drops, seed=self.seed), None

    def metrics(self, found, depth=None, depth_reason=None):
        """Return {name: Metric} of a model's Findings.

        Args:
            found: Findings.
            depth, depth_reason: of `depth`; without both the score is left out.
        """
        metrics = {}
        for audit, reason in found.reasons.items():
            metrics |= {name: absent(reason, LOWER) for name in _NAMES[audit]}
        if found.lens is not None:
            metrics |= lens_metrics(found.lens, self.seed)
        if found.fit is not None:
            metrics |= probe_metrics(found.fit)
        if depth is not None:
            metrics |= depth_metrics(depth)
        elif "uds" in self.audits and depth_reason:
            metrics["uds/forget"] = absent(depth_reason, HIGHER)
        return metrics


def by_layer(found, target=None, gold=None, depth=None):
    """Return the rows of "layers" in results.json, from the embeddings (layer -1) to the last decoder layer.

    Args:
        found: Findings of the audited model.
        target, gold: Findings of the others, or None.
        depth: Depth, or None.
    Returns:
        list of {"layer", "<value>", "<value>_target", "<value>_gold", ...}; None where a value is not there.
    """
    columns = {}
    for suffix, findings in (("", found), ("_target", target), ("_gold", gold)):
        columns |= {f"{name}{suffix}": values for name, values in _columns(findings or Findings()).items()}
    # Patched into itself the target loses nothing.
    del columns["patched_drop_target"]
    columns["uds"] = None if depth is None else [None, *map(_number, depth.by_layer)]
    columns["uds_rows"] = None if depth is None else [None, *map(int, depth.counts)]
    length = max((len(values) for values in columns.values() if values is not None), default=0)
    return [
        {"layer": number - 1, **{name: values[number] if values else None for name, values in columns.items()}}
        for number in range(length)
    ]


def _columns(found):
    lens, fit, drops = found.lens, found.fit, found.drops
    error = None if fit is None else fold_error(fit.accuracy)
    probability = None if lens is None else lens.probability
    spread = None if lens is None or len(probability) < 2 else probability.std(0, ddof=1) / len(probability) ** 0.5
    arrays = {
        "lens_probability": None if lens is None else probability.mean(0),
        "lens_probability_stderr": spread,
        "lens_nll": None if lens is None else lens.nll.mean(0),
        "lens_token_accuracy": None if lens is None else lens.accuracy.mean(0),
        "probe_accuracy": None if fit is None else fit.accuracy.mean(1),
        "probe_accuracy_stderr": error,
        "probe_auc": None if fit is None else fit.auc.mean(1),
        "probe_control_accuracy": None if fit is None else fit.control.mean(1),
        "patched_drop": None if drops is None else [np.nan, *drops.mean(0)],
    }
    return {name: None if values is None else [_number(value) for value in values] for name, values in arrays.items()}


def by_row(rows, found, gold=None, depth=None):
    """Return the rows of per_example.jsonl.

    Args:
        rows: list of AuditedRow.
        found, gold: Findings.
        depth: Depth, or None.
    """
    examples = []
    for number, row in enumerate(rows):
        example = {"split": row.split, "index": row.index}
        if found.lens is not None:
            example["lens_probability"] = found.lens.probability[number].tolist()
        if found.drops is not None:
            example["patched_drop"] = found.drops[number].tolist()
        if gold is not None and gold.drops is not None:
            example["patched_drop_gold"] = gold.drops[number].tolist()
        if depth is not None:
            example["uds"] = _number(depth.by_row[number])
        examples.append(example)
    return examples


def settings_record(audit, lens_path):
    """Return what the numbers depend on: the lens, the probe's task and the threshold of the depth score."""
    record = {"audits": list(audit.audits), "lens": lens_path or "logit", "uds_threshold": THRESHOLD}
    if "probe" in audit.audits and audit.task is not None:
        task = audit.task
        record["probe_task"] = {
            "tells": "true from wrong answers" if task.is_matched else "members from holdout rows",
            "rows": len(np.unique(task.groups)),
            "examples": len(task.labels),
        }
    return record


def _number(value):
    return float(value) if np.isfinite(value) else None
