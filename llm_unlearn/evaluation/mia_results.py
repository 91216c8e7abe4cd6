"""What a membership-inference audit writes: results.json, the scores, the ROC curves, and the ACL 2024 text file."""

import json
import time
from pathlib import Path

import numpy as np

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation import metrics
from llm_unlearn.evaluation.membership import FALSE_POSITIVE_RATES, roc_of, separation, verdict
from llm_unlearn.evaluation.parsing import MIA_SCRIPT
from llm_unlearn.evaluation.results import finite, results_record, write_json, write_text
from llm_unlearn.evaluation.scores import HIGHER, LOWER, NONE, Metric, absent
from llm_unlearn.evaluation.suite import Outcome
from llm_unlearn.records import command_line, package_versions, peak_memory

NAMES = {"tpr_at_1pct_fpr": "TPR@1%FPR", "tpr_at_5pct_fpr": "TPR@5%FPR"}
DRAWN = ("loss", "zlib", "lowercase", "reference", "min_k_20", "min_k_pp_20", "grad_norm", "length")
MAX_ROC_POINTS = 200
_LENGTH_MATTERS = 0.1


def load_mia_reference(path, groups):
    """Read the results of a retrained model.

    Args:
        path: results.json of run_mia.py, or the folder with it.
        groups: Groups that are compared here.
    Returns:
        {attack: {"auc", "interval"}}.
    Raises:
        UserError: no such file, another kind of results, other members or non-members.
    """
    path = Path(path) / "results.json" if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--retain_reference '{path}' cannot be read: {error}") from error
    if not isinstance(found, dict) or found.get("kind") != "mia":
        raise UserError(f"--retain_reference '{path}' is no result of run_mia.py")
    for group, entry in groups.splits.items():
        if found["splits"][group]["sha256"] != entry["sha256"]:
            raise UserError(f"--retain_reference '{path}' compares other {group.replace('_', '-')}; attack it again")
    return found["reference_values"]["aucs"]


def mia_record(parsed, checkpoint, groups, units, scores, counters, reference, started):
    """Return (contents of results.json, {attack: (false-positive rates, true-positive rates)}).

    Args:
        parsed: ParsedEvaluation.
        checkpoint: loading.Checkpoint.
        groups: mia.Groups.
        units: list of mia.Unit.
        scores: list of {attack: float}.
        counters: what it cost.
        reference: of `load_mia_reference`, or None.
        started: seconds since the epoch.
    """
    sides = np.array([unit.group == "members" for unit in units])
    lengths = np.array([len(unit.sequence.scored) for unit in units], dtype=np.float64)
    columns = {"length": lengths} | {
        attack: np.array([score.get(attack, np.nan) for score in scores]) for attack in scores[0]
    }
    found, aucs, curves = {}, {}, {}
    for attack, values in columns.items():
        known = np.isfinite(values)
        pair = values[known & sides], values[known & ~sides]
        if (known.sum() < len(values) and attack != "lowercase") or not all(map(len, pair)):
            found[f"{attack}/auc"] = absent("a score is missing or not finite")
            continue
        measured = separation(*pair, seed=parsed.flags.seed)
        found |= _metrics(attack, measured, sum(map(len, pair)))
        aucs[attack] = {"auc": measured.values["auc"], "interval": measured.intervals["auc"]}
        curves[attack] = roc_of(*pair)
    found |= _against(aucs, reference)
    outcome = Outcome(found, {}, counters, {"aucs": aucs})
    outcome.counters |= {"wall_seconds": round(time.time() - started, 3), "peak_memory_bytes": peak_memory()}
    record = results_record(
        "mia", parsed.data.domain, parsed.model.model_name_or_path, command_line(parsed.words, MIA_SCRIPT),
        package_versions(), checkpoint.fingerprints, [], outcome, False,
    )  # fmt: skip
    record["splits"] = groups.splits
    record["intervals"] = {attack: entry["interval"] for attack, entry in aucs.items()}
    record["roc"] = {attack: thinned_roc(*curve) for attack, curve in curves.items()}
    record["notes"] = list(groups.notes)
    record["verdicts"] = verdicts(aucs, reference, groups)
    return finite(record), curves


def _metrics(attack, measured, count):
    found = {}
    for name, value in measured.values.items():
        direction = NONE if name == "auc" or attack in ("length", "reference_own") else LOWER
        key = f"{attack}/{name}"
        if value is None:
            found[key] = absent(measured.reasons[name], direction)
        else:
            found[key] = Metric(value, measured.stderrs[name], count, direction)
    return found


def _against(aucs, reference):
    """Distance of each attack to the retrained model's, and PrivLeak of Min-K 40%."""
    if reference is None:
        return {"privleak": absent("no --retain_reference was given")}
    found = {}
    for attack in aucs:
        if attack in reference and attack not in ("length", "reference_own"):
            value = abs(aucs[attack]["auc"] - reference[attack]["auc"])
            found[f"{attack}/auc_distance_to_retrained"] = Metric(value, None, 0, LOWER)
            score = metrics.privacy_score(aucs[attack]["auc"], reference[attack]["auc"])
            found[f"{attack}/privacy"] = Metric(score, None, 0, HIGHER)
    if "min_k_40" not in aucs or reference.get("min_k_40", {"auc": 1.0})["auc"] >= 1:
        return found | {"privleak": absent("the retrained model's Min-K AUC is missing or 1")}
    value = metrics.privleak(aucs["min_k_40"]["auc"], reference["min_k_40"]["auc"])
    return found | {"privleak": Metric(value, None, 0, NONE)}


def verdicts(aucs, reference, groups):
    """Say in sentences what the attacks found.

    Args:
        aucs: {attack: {"auc", "interval"}}.
        reference: the same of a retrained model, or None.
        groups: mia.Groups, whose notes come first.
    Returns:
        list of sentences.
    """
    said = list(groups.notes)
    length = aucs.get("length")
    if length and abs(length["auc"] - 0.5) > _LENGTH_MATTERS:
        said.append(
            f"length alone separates members from non-members with an AUC of {length['auc']:.3f}: an attack near that "
            "may see nothing else"
        )
    own = aucs.get("reference_own")
    if own and not own["interval"][0] <= 0.5 <= own["interval"][1]:
        said.append(
            "the sets differ before any training: the reference model, which saw neither, tells them apart with an AUC "
            f"of {own['auc']:.3f}; judge by the reference attack"
        )
    for attack, entry in aucs.items():
        if attack in ("length", "reference_own"):
            continue
        expected = (reference or {}).get(attack)
        values = (expected["auc"], tuple(expected["interval"])) if expected else ()
        word = verdict(entry["auc"], tuple(entry["interval"]), *values)
        against = f"the retrained model's {expected['auc']:.3f}" if expected else ".5"
        low, high = entry["interval"]
        beside = f"; length alone {length['auc']:.3f}" if length else ""
        said.append(
            f"{attack}: {word} (AUC {entry['auc']:.3f}, 95% [{low:.3f}, {high:.3f}], against {against}{beside})"
        )
    if reference is None and own is None and any(entry["interval"][1] < 0.5 for entry in aucs.values()):
        said.append(
            "an AUC below .5 can also mean that the sets differ before any training; --reference_model or "
            "--retain_reference tells which"
        )
    return said


def write_mia(folder, record, units, scores, curves):
    """Write results.json, per_example.jsonl, roc.png and auc.txt.

    Args:
        folder: output directory.
        record: contents of results.json.
        units: list of mia.Unit.
        scores: their scores.
        curves: {attack: (false-positive rates, true-positive rates)}.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"group": unit.group, "index": unit.index, "chunk": unit.chunk, "tokens": len(unit.sequence.scored), **score}
        for unit, score in zip(units, scores, strict=True)
    ]
    write_text(folder / "per_example.jsonl", "".join(json.dumps(finite(row)) + "\n" for row in rows))
    write_text(folder / "auc.txt", acl2024_text(record))
    plot_roc(folder / "roc.png", curves, record)
    write_json(folder / "results.json", record)


def acl2024_text(record):
    """Return auc.txt in the layout of the ACL 2024 script, with the labels that belong to its numbers."""
    values = {name: metric["value"] for name, metric in record["metrics"].items()}
    lines = []
    for attack in dict.fromkeys(name.partition("/")[0] for name in values if name.endswith("/auc")):
        shown = [f"Attack {attack}"]
        shown += [
            f"AUC {_shown(values[f'{attack}/auc'])}, Accuracy {_shown(values.get(f'{attack}/balanced_accuracy'))}"
        ]
        shown += [f"{NAMES[name]} of {_shown(values.get(f'{attack}/{name}'))}" for name in FALSE_POSITIVE_RATES]
        lines.append(", ".join(shown))
    return "\n".join(lines) + "\n"


def _shown(value):
    return "-" if value is None else f"{value:.4f}"


def thinned_roc(false_positives, true_positives):
    """Return a ROC curve in at most `MAX_ROC_POINTS` of its own points, dense where logarithmic axes show it.

    A longer curve keeps its ends, the points that `membership.roc_summary` reads its rates from, and at each
    false-positive rate of two grids, one of equal steps and one of equal ratios, the last point there or before.

    Args:
        false_positives: (G,) rates, ascending from 0 to 1.
        true_positives: (G,) rates.
    Returns:
        {"fpr": list, "tpr": list}.
    """
    kept = np.arange(len(false_positives))
    if len(kept) > MAX_ROC_POINTS:
        smallest = false_positives[false_positives > 0].min()
        half = (MAX_ROC_POINTS - 1 - len(FALSE_POSITIVE_RATES)) // 2
        grid = np.concatenate([np.linspace(0, 1, half), np.geomspace(smallest, 1, half)])
        # The tolerance keeps a rate that is rounded from missing the curve's own.
        last = np.searchsorted(false_positives, grid + 1e-12, side="right") - 1
        reported = np.searchsorted(false_positives, np.array(list(FALSE_POSITIVE_RATES.values())) - 1e-12) - 1
        kept = np.unique(np.concatenate([[0], last, reported]))
    return {"fpr": false_positives[kept].tolist(), "tpr": true_positives[kept].tolist()}


def plot_roc(path, curves, record):
    """Draw the ROC curves of the main attacks, both axes logarithmic.

    Args:
        path: file that ends in .png.
        curves: {attack: (false-positive rates, true-positive rates)}.
        record: contents of results.json.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    smallest = 1 / max(entry["rows"] for entry in record["splits"].values())
    chosen = [
        name for name in ("loss", "zlib", "lowercase", "reference", "min_k_20", "min_k_pp_20", "grad_norm", "length")
    ]
    for name in (name for name in chosen if name in curves):
        false_positives, true_positives = (np.maximum(part, smallest / 2) for part in curves[name])
        auc = record["metrics"][f"{name}/auc"]["value"]
        style = {"linestyle": ":", "color": "gray"} if name == "length" else {}
        axes.plot(false_positives, true_positives, label=f"{name}, AUC {auc:.3f}", linewidth=1.6, **style)
    axes.plot([smallest / 2, 1], [smallest / 2, 1], color="black", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", xlim=(smallest / 2, 1), ylim=(smallest / 2, 1.05))
    axes.set(xlabel="false-positive rate", ylabel="true-positive rate", title=f"Membership in {record['domain']}")
    axes.grid(True, which="both", linewidth=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path)
