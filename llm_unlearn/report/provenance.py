"""Where each run comes from: commands, versions, fingerprints, data; what it takes to repeat it."""

import json

from llm_unlearn.report import formatting, glossary
from llm_unlearn.report.comparison import flatten
from llm_unlearn.report.json_files import is_finite

WHO = {"model": "audited model", "target": "target model", "gold": "gold model"}
_COUNTERS = (
    ("seconds", "Time, all stages", formatting.seconds),
    ("token_forwards", "Token forwards", formatting.count),
    ("decode_steps", "Decode steps", formatting.count),
    ("peak_memory_bytes", "Peak memory", formatting.size),
)


def provenance(run):
    """Collect what is known of a run's origin.

    Args:
        run: Run.
    Returns:
        dict with "facts" [(what, text)], "commands" [(what, command)] and "lists" [(title, [(name, text)])].
    """
    record = run.training.record if run.training else {}
    commands = [("training", str(record["command"]))] if record.get("command") else []
    commands += [(_purpose(result), result.command) for result in run.results if result.command]
    lists = [("Versions, training", flatten(_mapping(record, "versions")))]
    lists.append(("Sets trained on", _streams(_mapping(record, "streams"))))
    for what, values_of in _LISTS:
        lists += _merged(what, [(_purpose(result), values_of(result)) for result in run.results])
    return {
        "facts": [(name, text) for name, text in _facts(run, record) if text],
        "commands": commands,
        "lists": [(title, list(values.items())) for title, values in lists if values],
    }


def audit_provenance(audit, name):
    """Collect how an audit was made, in the form of `provenance`, with the command of every stage.

    Args:
        audit: Audit.
        name: of the audited run.
    """
    facts = [("Audited", audit.model), ("Target model", audit.target), ("Gold model", audit.gold)]
    facts += [("Preset", audit.preset), ("Domain", audit.domain), ("Record", str(audit.path))]
    counters = [(what, audit.counters.get(key), write) for key, what, write in _COUNTERS]
    facts += [(what, write(value)) for what, value, write in counters if is_finite(value)]
    commands = [("audit", audit.command)] if audit.command else []
    for stage in audit.stages:
        words = [WHO.get(stage.model, stage.model), stage.status.replace("_", " ")]
        words += [formatting.seconds(stage.seconds)] if stage.seconds is not None else []
        said = f"{stage.name} ({', '.join(filter(None, words))}{f': {stage.reason}' if stage.reason else ''})"
        commands.append((said, stage.command))
    return {"name": name, "facts": [(what, text) for what, text in facts if text], "commands": commands, "lists": []}


def _merged(what, entries):
    """Return [("<what>, evaluation on demo and sampling on demo", values)]; equal values have one list together."""
    by_values = {}
    for purpose, values in entries:
        by_values.setdefault(json.dumps(values, sort_keys=True), (values, []))[1].append(purpose)
    return [(f"{what}, {formatting.listed(purposes)}", values) for values, purposes in by_values.values()]


def _facts(run, record):
    yield "Model", run.model
    yield "Method", run.method
    yield "Started from", str(record.get("start_model") or "")
    yield "Trained in", str(run.training.folder) if run.training else ""
    backend = _mapping(record, "backend")
    yield "Backend", ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in backend.items())
    for result in run.results:
        yield f"Results, {_purpose(result)}", str(result.path)


def _purpose(result):
    return f"{glossary.purpose(result.label)} on {result.domain}"


def _mapping(record, name):
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _streams(streams):
    return {name: _counted(facts, ("rows", "tokens")) for name, facts in streams.items() if isinstance(facts, dict)}


def _splits(splits):
    return {name: _counted(facts, ("rows",)) for name, facts in splits.items()}


def _counted(facts, counts):
    """Return {"rows": 40, "sha256": ..., ...} as words: 40 rows, sha256 ..."""
    words = [f"{formatting.count(facts[name])} {name}" for name in counts if isinstance(facts.get(name), int)]
    origins = facts.get("origins") if isinstance(facts.get("origins"), list) else []
    sources = [str(origin.get("source")) for origin in origins if isinstance(origin, dict)]
    words += [f"from {' and '.join(sources)}"] if sources else []
    rest = {name: value for name, value in facts.items() if name not in (*counts, "origins") and value is not None}
    return ", ".join([*words, *(f"{name} {value}" for name, value in rest.items())])


_LISTS = (
    ("Versions", lambda result: flatten(result.versions)),
    ("Fingerprints", lambda result: flatten(result.fingerprints)),
    ("Splits", lambda result: _splits(result.splits)),
    ("Definitions", lambda result: flatten(result.definitions)),
)
