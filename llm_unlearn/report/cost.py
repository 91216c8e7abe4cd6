"""What scoring and training cost, run by run, and in which settings the runs differ."""

import functools
import json

from llm_unlearn.report import formatting, glossary
from llm_unlearn.report.results import ATTACKS, SCORES
from llm_unlearn.report.tables import NOT_ATTACKED, Cell, Group, Row, Table, is_number

_SCORING = (
    ("model_calls", "model calls", formatting.count),
    ("token_forwards", "token forwards", formatting.count),
    ("distinct_tokens", "distinct tokens", formatting.count),
    ("forwards_per_token", "forwards per distinct token", lambda value: f"{value:.2f}"),
    ("decode_steps", "decode steps", formatting.count),
    ("wall_seconds", "wall time", formatting.seconds),
    ("peak_memory_bytes", "peak memory", formatting.size),
)
_ATTACK = (
    ("wall_seconds", "wall time", formatting.seconds),
    ("tokens", "tokens trained on", formatting.count),
    ("token_forwards", "token forwards", formatting.count),
    ("sampled_decode_row_steps", "tokens sampled", formatting.count),
    ("peak_memory_bytes", "peak memory", formatting.size),
)
_TRAINING = (
    ("optimizer_steps", "optimizer steps", formatting.count),
    ("wall_seconds", "wall time", formatting.seconds),
    ("peak_memory_bytes", "peak memory", formatting.size),
)
# Flags that say where a run went and how it was watched, not what it computed.
_NOT_A_SETTING = {
    "output_dir", "output_suffix", "run_name", "overwrite_output_dir", "resume_from_checkpoint", "unlearn_method",
    "report_to", "disable_tqdm", "project", "push_to_hub", "local_rank", "do_eval",
}  # fmt: skip
_NOT_A_SETTING_PREFIXES = ("hub_", "logging_", "log_", "save_", "eval_", "per_device_eval_", "trackio_")
NOT_ITS_FLAG = "not a flag of this run's method"


def cost_table(runs):
    """Build the table of costs: scoring over all scores of a run together, its training, and each attack on it.

    Args:
        runs: Runs.
    Returns:
        Table with the groups "scoring", "training" and one an attack; a row without a number is left out. None without
        rows.
    """
    table = Table("cost", "Cost", runs)
    groups = [("scoring", _SCORING, _scored), ("training", _TRAINING, _trained)]
    attacks = {result.label: result.kind for run in runs for result in run.results if result.kind in ATTACKS}
    for label in sorted(attacks, key=lambda label: ATTACKS.index(attacks[label])):
        groups.append((glossary.attack_title(label), _ATTACK, functools.partial(_attacked, label)))
    for title, measures, look_up in groups:
        rows = []
        for key, label, write in measures:
            values = [look_up(run, key) for run in runs]
            if any(is_number(value) for value, _ in values):
                rows.append(Row(key, label, "none", tuple(_cell(table, write, *value) for value in values)))
        if rows:
            table.groups.append(Group(title, tuple(rows)))
    return table if table.groups else None


def _cell(table, write, value, reason):
    if not is_number(value):
        return Cell(formatting.DASH, title=reason, note=table.note(reason))
    return Cell(write(value), title=f"{value:,.10g}")


def _scored(run, key):
    """Return (sum over the scores of a run, None), or (None, reason); of memory the largest."""
    if not run.results:
        return None, "no results.json was found"
    return _summed(run, [result for result in run.results if result.kind in SCORES], key, "this run was not scored")


def _attacked(label, run, key):
    """Return the same of the attacks of one label."""
    return _summed(run, [result for result in run.results if result.label == label], key, NOT_ATTACKED)


def _summed(run, results, key, absent):
    if not results:
        return None, absent
    if key == "forwards_per_token":
        forwards, distinct = (_scored(run, name)[0] for name in ("token_forwards", "distinct_tokens"))
        return (
            (forwards / distinct, None) if forwards and distinct else (None, "not counted by the command that scored")
        )
    values = [_counter(result, key) for result in results]
    if not all(isinstance(value, (int, float)) and is_number(value) for value in values):
        return None, "not counted by the command that scored"
    return (max if key == "peak_memory_bytes" else sum)(values), None


def _counter(result, key):
    """Return a counter of a result; attacks count seconds, and the tokens of each quantized copy, by other names."""
    counters = result.counters
    if result.kind in SCORES or key not in ("token_forwards", "wall_seconds"):
        return counters.get(key)
    if key == "wall_seconds":
        return counters.get(key, counters.get("seconds"))
    found = [value for name, value in counters.items() if name == key or name.endswith(f"_{key}")]
    return sum(value for value in found if isinstance(value, (int, float))) if found else None


def _trained(run, key):
    """Return (number of the training record, None), or (None, reason)."""
    if run.checkpoint:
        return None, "the record is of the whole training, and this is a checkpoint on its way"
    value = run.training.record.get(key) if run.training else None
    if isinstance(value, (int, float)) and is_number(value):
        return value, None
    return None, "not in unlearning.json" if run.training and run.training.record else "no unlearning.json was found"


def settings_table(runs):
    """Build the table of the flags in which the runs that compete differ.

    Args:
        runs: Runs.
    Returns:
        Table, or None where fewer than two have a training record or where nothing differs.
    """
    runs = [run for run in runs if run.competes and _flags(run)]
    if len(runs) < 2:
        return None
    table = Table("settings", "Settings that differ", runs)
    rows = []
    for name in dict.fromkeys(name for run in runs for name in _flags(run)):
        values = [_flags(run).get(name, NOT_ITS_FLAG) for run in runs]
        if len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1 and not _is_hidden(name):
            rows.append(Row(name, name, "none", tuple(_setting(table, value) for value in values)))
    table.groups.append(Group("", tuple(rows)))
    return table if rows else None


def _flags(run):
    flags = run.training.record.get("flags") if run.training else None
    return flags if isinstance(flags, dict) else {}


def _is_hidden(name):
    return name in _NOT_A_SETTING or name.startswith(_NOT_A_SETTING_PREFIXES) or name.endswith("token")


def _setting(table, value):
    if value is NOT_ITS_FLAG:
        return Cell(formatting.DASH, title=NOT_ITS_FLAG, note=table.note(NOT_ITS_FLAG))
    if value is None:
        return Cell("not set")
    text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
    return Cell(formatting.shortened(text, 40), title=text)
