"""From the samples of every probe to leak@k: what each gave away, the means over questions, and what to look at."""
# Shapes: N questions of a prompting.

import math
from dataclasses import dataclass, field

import numpy as np

from llm_unlearn.attacks.leakage import at_least_once, bootstrap_interval, leak_at_k
from llm_unlearn.evaluation.scores import LOWER, absent, mean_metric

MAX_SHOWN = 50
"""Rows of the payload `generations`."""
_TEMPERED = "the likelihood bounds samples at --temperature 1 --top_p 1 alone"


@dataclass
class LeakFindings:
    """What an attack by sampling found.

    Attributes:
        metrics: {name: scores.Metric}.
        intervals: {name: [low, high] of 95%}.
        generations: at most `MAX_SHOWN` rows, the most leaking first, one a question.
        examples: rows of per_example.jsonl.
    """

    metrics: dict = field(default_factory=dict)
    intervals: dict = field(default_factory=dict)
    generations: list = field(default_factory=list)
    examples: list = field(default_factory=list)


def probe_row(probe, samples, greedy, logp, settings):
    """Say what one probe gave away.

    Args:
        probe: leak_prompts.Probe.
        samples: list of generation.Generation.
        greedy: Generation.
        logp: log-probability of the whole answer behind the prompt, nats, or None.
        settings: leak_prompts.PromptingSettings.
    Returns:
        row of per_example.jsonl.
    """
    texts = [sample.text for sample in samples]
    scores = {text: probe.score(text, settings) for text in {*texts, greedy.text}}
    leaks = sum(probe.leaks(scores[text], settings) for text in texts)
    return {
        "prompting": probe.prompting,
        "split": probe.split,
        "index": probe.index,
        "question": probe.question,
        "answer": probe.answer,
        "num_samples": len(texts),
        "leaks": leaks,
        "leak_probability": leaks / len(texts),
        "mean_score": float(np.mean([scores[text] for text in texts])),
        "answer_probability": None if logp is None else math.exp(logp),
        "greedy": greedy.text,
        "greedy_leaks": probe.leaks(scores[greedy.text], settings),
        # Of equally near samples the shorter one says it more plainly.
        "sample": max(texts, key=lambda text: (scores[text], -len(text))),
        "finished_share": float(np.mean([sample.finished for sample in samples])),
    }


def findings_of(rows, missing, ks, num_samples, is_tempered, seed):
    """Compute every metric of an attack by sampling.

    Args:
        rows: of `probe_row`.
        missing: {prompting: why nothing was asked}.
        ks: list of k.
        num_samples: of each question.
        is_tempered: whether temperature or top-p change the distribution, so that the likelihood bounds nothing.
        seed: of the bootstrap.
    Returns:
        LeakFindings.
    """
    found = LeakFindings(examples=rows)
    promptings = list(dict.fromkeys(row["prompting"] for row in rows))
    for prompting in promptings:
        asked = [row for row in rows if row["prompting"] == prompting]
        _add(found, f"{prompting}/greedy_leak", [float(row["greedy_leaks"]) for row in asked], seed)
        leaks = [row["leaks"] for row in asked]
        for k in ks:
            name = f"{prompting}/leak_at_{k}"
            if k > num_samples:
                reason = f"{k} samples of a question are needed, but {num_samples} were drawn; pass --num_samples {k}"
                found.metrics[name] = absent(reason, LOWER)
            else:
                _add(found, name, leak_at_k(leaks, num_samples, k), seed)
        for k in ks:
            _add_bound(found, f"{prompting}/leak_lower_bound_at_{k}", asked, k, is_tempered, seed)
    for prompting, reason in missing.items():
        for k in ks:
            found.metrics[f"{prompting}/leak_at_{k}"] = absent(reason, LOWER)
    found.generations = shown_rows(rows)
    return found


def _add_bound(found, name, rows, k, is_tempered, seed):
    known = [row["answer_probability"] for row in rows]
    if is_tempered or all(probability is None for probability in known):
        reason = _TEMPERED if is_tempered else "a secret within a text has no likelihood that ends with it"
        found.metrics[name] = absent(reason, LOWER)
        return
    # An answer whose likelihood is unknown, because it does not fit the context, is bounded by nothing but zero.
    _add(found, name, at_least_once([probability or 0.0 for probability in known], k), seed)


def _add(found, name, values, seed):
    found.metrics[name] = mean_metric(values, LOWER, seed)
    interval = bootstrap_interval(values, seed)
    if interval is not None:
        found.intervals[name] = interval


def shown_rows(rows):
    """Return what a reader should look at: each question as the prompting that leaks most asked it.

    Args:
        rows: of `probe_row`.
    Returns:
        at most `MAX_SHOWN` rows {"split", "index", "question", "answer", "prompting", "greedy", "sample",
        "leak_probability"}, the most leaking first.
    """

    def rank(row):
        return row["leak_probability"], row["mean_score"]

    worst = {}
    for row in rows:
        key = row["split"], row["index"]
        if key not in worst or rank(row) > rank(worst[key]):
            worst[key] = row
    names = ("split", "index", "question", "answer", "prompting", "greedy", "sample", "leak_probability")
    ordered = sorted(worst.values(), key=rank, reverse=True)
    return [{name: row[name] for name in names} for row in ordered[:MAX_SHOWN]]
