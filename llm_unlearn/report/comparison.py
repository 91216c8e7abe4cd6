"""The runs of one domain beside each other, and which of their numbers do not compare.

Numbers do not compare that were scored on other rows, under other fingerprints, or by other metric definitions.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property

from llm_unlearn.report.results import KINDS, SCORES
from llm_unlearn.report.runs import attack_settings

# First words of the fingerprints that tell the scored model itself; they differ from run to run by design.
_OF_THE_MODEL = ("model", "weights", "base", "checkpoint", "adapter")


@dataclass(frozen=True)
class Mismatch:
    """One disagreement: what differs, ((words, runs), ...), and the split it touches (None: all metrics)."""

    what: str
    sides: tuple
    split: str | None = None


@dataclass
class Comparison:
    """The runs that have results of one domain."""

    domain: str
    runs: list

    @cached_property
    def kinds(self):
        """Labels of the results that any run has ("eval", "mia", "tamper", ...), scores before attacks."""
        found = [result for run in self.runs for result in run.results if result.domain == self.domain]
        there = {result.label: result.kind for result in found}
        return sorted(there, key=lambda label: KINDS.index(there[label]))

    @property
    def attacks(self):
        """Labels of the attacks that any run has; membership inference counts as a score."""
        return [label for label in self.kinds if label not in SCORES]

    @cached_property
    def mismatches(self):
        """{label: list of Mismatch}."""
        return {kind: find_mismatches(self.runs, self.domain, kind) for kind in self.kinds}

    def scored(self, kind):
        """Return the runs that have results of a label; the methods below take the same labels."""
        return [run for run in self.runs if run.result(self.domain, kind)]

    def names(self, kind):
        """Return the names of the metrics that any run has, in the order of their files."""
        results = [run.result(self.domain, kind) for run in self.scored(kind)]
        return list(dict.fromkeys(name for result in results for name in result.metrics))

    def metric(self, run, kind, name):
        """Return the Metric of a run, or None where its results do not have it."""
        result = run.result(self.domain, kind)
        return result.metrics.get(name) if result else None

    def metrics(self, kind, name, runs=None):
        """Return the Metric of each run, None where there is none."""
        return [self.metric(run, kind, name) for run in (self.runs if runs is None else runs)]

    def direction(self, kind, name):
        """Return the direction that all runs give a metric, "none" where they disagree."""
        directions = {metric.direction for metric in self.metrics(kind, name) if metric is not None}
        return directions.pop() if len(directions) == 1 else "none"

    def is_comparable(self, kind, name):
        """Return whether a metric means the same for all runs.

        Other rows in a split touch the metrics of that split, and those of no single split (aggregates, attacks); other
        definitions or fingerprints touch all.
        """
        touched = {mismatch.split for mismatch in self.mismatches.get(kind, ())}
        split = name.rpartition("/")[0]
        is_of_one_split = any(split in run.result(self.domain, kind).splits for run in self.scored(kind))
        return not touched & {None, split} if is_of_one_split else not touched


def find_mismatches(runs, domain, kind):
    """Compare how the runs of one domain and kind were scored.

    Args:
        runs: Runs.
        domain: domain of the results.
        kind: label of the results, as "eval" or "tamper".
    Returns:
        list of Mismatch: definitions, settings of the attack, splits, fingerprints; empty where all agree.
    """
    scored = [(run, run.result(domain, kind)) for run in runs]
    scored = [(run, result) for run, result in scored if result is not None]
    found = [_mismatch("metric definitions", [(run, _definitions(result)) for run, result in scored])]
    found.append(_mismatch("settings of the attack", [(run, _settings(result)) for run, result in scored]))
    for name in _names(result.splits for _, result in scored):
        sides = [(run, _rows(result.splits[name])) for run, result in scored if name in result.splits]
        found.append(_mismatch(f"split '{name}'", sides, name))
    explained = any(found) or len({frozenset(result.splits) for _, result in scored}) > 1
    prints = [(run, flatten(result.fingerprints)) for run, result in scored]
    for name in _names(values for _, values in prints):
        # The questions are made of the splits: where those differ, this says it once more.
        if re.split(r"[._]", name)[0] not in _OF_THE_MODEL and not (explained and name == "questions"):
            sides = [(run, shorten(values[name])) for run, values in prints if name in values]
            found.append(_mismatch(f"fingerprint '{name}'", sides))
    return [mismatch for mismatch in found if mismatch]


def _mismatch(what, sides, split=None):
    """Return the Mismatch of [(run, words)], or None where all words are alike."""
    by_words = {}
    for run, words in sides:
        by_words.setdefault(words, []).append(run)
    if len(by_words) < 2:
        return None
    sides = sorted(by_words.items(), key=lambda side: len(side[1]))
    return Mismatch(what, tuple((words, tuple(members)) for words, members in sides), split)


def _definitions(result):
    version = result.definitions.get("version")
    words = "no version recorded" if version is None else f"version {version}"
    return f"{words}, legacy" if result.definitions.get("legacy") else words


def _settings(result):
    """Return how a model was attacked, as text; the names of the settings where runs share them."""
    curves = [f"{name}: {flat}" if (flat := _flat(settings)) else name for name, settings in attack_settings(result)]
    return "; ".join(curves) or "not recorded"


def _flat(settings):
    return ", ".join(
        f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in settings.items()
    )


def _rows(split):
    words = [f"{split['rows']} rows"] if split.get("rows") is not None else []
    words += [f"from {split['source']}"] if split.get("source") and not split.get("sha256") else []
    words += [f"sha256 {shorten(split['sha256'])}"] if split.get("sha256") else []
    return ", ".join(words) or "rows not recorded"


def _names(dicts):
    return list(dict.fromkeys(name for values in dicts for name in values))


def flatten(values, prefix=""):
    """Return a nested dict as {"outer.inner": text}."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat


def shorten(text):
    """Return a hash cut to 12 characters; any other text as it is."""
    text = str(text)
    is_hash = len(text) >= 32 and all(character in "0123456789abcdef" for character in text.lower())
    return f"{text[:12]}\u2026" if is_hash else text
