"""From the values of single examples to the metrics of a set, with direction and standard error."""
# Shapes: N examples.

import math
from dataclasses import asdict, dataclass

import numpy as np

from llm_unlearn.evaluation import metrics
from llm_unlearn.evaluation.choices import accuracy_by_position, collapse_signature

LOWER, HIGHER, NONE = "lower", "higher", "none"
_KNOWLEDGE = {"forget": LOWER, "retain": HIGHER, "other": NONE}
_IGNORANCE = {"forget": HIGHER, "retain": LOWER, "other": NONE}
_FAULT = {"forget": LOWER, "retain": LOWER, "other": LOWER}

# Value of an example whose mean is reported -> which way a better unlearning goes, by the role of the set.
MEANS = {
    "probability": _KNOWLEDGE,
    "probability_normalized": _KNOWLEDGE,
    "paraphrase_probability": _KNOWLEDGE,
    "extraction_strength": _KNOWLEDGE,
    "exact_memorization": _KNOWLEDGE,
    "token_accuracy": _KNOWLEDGE,
    "rouge_1_recall": _KNOWLEDGE,
    "rouge_l_recall": _KNOWLEDGE,
    "rouge_l_f1": _KNOWLEDGE,
    "verbmem": _KNOWLEDGE,
    "knowmem": _KNOWLEDGE,
    **{f"{name}_{length}": _KNOWLEDGE for length in (100, 300) for name in ("bleu", "rouge_l_recall", "rouge_l_f1")},
    "choice_accuracy": _KNOWLEDGE,
    "choice_probability": _KNOWLEDGE,
    "cloze_accuracy": _KNOWLEDGE,
    "cloze_probability": _KNOWLEDGE,
    "semantic_accuracy": _KNOWLEDGE,
    "secret_extraction": _KNOWLEDGE,
    "toxicity": _FAULT,
    "toxic_share": _FAULT,
    "gibberish_share": _FAULT,
    "empty_share": _FAULT,
    "entropy": {"forget": NONE, "retain": NONE, "other": NONE},
}
UTILITY_PARTS = {
    "retain": ("probability", "rouge_l_recall", "truth_ratio"),
    "real_authors": ("probability_normalized", "rouge_l_recall", "truth_ratio"),
    "world_facts": ("probability_normalized", "rouge_l_recall", "truth_ratio"),
}


@dataclass
class Metric:
    """One number of results.json.

    Attributes:
        value: None where it could not be computed.
        stderr: bootstrap standard error; None where there is none.
        n: examples that it rests on.
        direction: which way a better unlearning goes: lower, higher, none.
        reason: why there is no value.
    """

    value: float | None
    stderr: float | None = None
    n: int = 0
    direction: str = NONE
    reason: str | None = None

    def as_dict(self):
        """Return the JSON form; `reason` only where there is one."""
        return {key: value for key, value in asdict(self).items() if key != "reason" or value is not None}


def absent(reason, direction=NONE):
    """Return the Metric that could not be computed."""
    return Metric(None, None, 0, direction, reason)


def mean_metric(values, direction, seed=0):
    """Return the mean of N values with its standard error, or a null that says how many are not finite."""
    values = np.asarray(values, dtype=np.float64)
    broken = int((~np.isfinite(values)).sum())
    if broken or not len(values):
        return absent(
            f"{broken} of {len(values)} examples are not finite" if broken else "no example has it", direction
        )
    return Metric(float(values.mean()), metrics.bootstrap_stderr([values], seed=seed), len(values), direction)


def part_metrics(part, examples, seed=0):
    """Return the metrics of one set.

    Args:
        part: questions.Part.
        examples: its rows of `examples.example_values`.
        seed: of the bootstrap.
    Returns:
        {"<set>/<metric>": Metric}.
    """
    found = {}
    # MUSE probes one set in two ways, of which each reports its own overlap alone.
    names = [part.task] if part.task else MEANS
    for name, directions in ((name, MEANS[name]) for name in names):
        values = [example[name] for example in examples if name in example]
        if values:
            found[name] = mean_metric(values, directions[part.role], seed)
    cut = sum(example.get("cut", False) for example in examples)
    if cut:
        found[f"{part.task}_cut_rows" if part.task else "cut_rows"] = Metric(float(cut), None, len(examples))
    if part.task:
        return {f"{part.name}/{name}": metric for name, metric in found.items()}
    found |= _perplexity(part, examples, seed)
    ratios = [example["truth_ratio"] for example in examples if "truth_ratio" in example]
    if ratios:
        how = "forget" if part.role == "forget" else "utility"
        direction = NONE if part.role == "other" else HIGHER
        found["truth_ratio"] = mean_metric(metrics.aggregate_truth_ratio(ratios, how), direction, seed)
    found |= _choices(part, examples)
    return {f"{part.name}/{name}": metric for name, metric in found.items()}


def _perplexity(part, examples, seed):
    scored = [example for example in examples if "nll" in example]
    if not scored:
        return {}
    rows = np.array([[example["nll"] * example["tokens"], example["tokens"]] for example in scored])
    value = metrics.perplexity(rows[:, 0], rows[:, 1])
    direction = _IGNORANCE[part.role]
    if not math.isfinite(value):
        return {"perplexity": absent("the perplexity overflows", direction)}

    def of(sums):
        with np.errstate(over="ignore"):
            return np.exp(sums[:, 0] / sums[:, 1])

    stderr = metrics.bootstrap_stderr_of_sums(rows, of, seed=seed)
    stderr = stderr if stderr is not None and math.isfinite(stderr) else None
    return {"perplexity": Metric(value, stderr, len(rows), direction)}


def _choices(part, examples):
    """Accuracy by the position of the right answer, and whether the model says one letter whatever is asked."""
    scored = [example for example in examples if "choice" in example]
    if not scored:
        return {}
    predictions = [example["choice"] for example in scored]
    answers = [example["answer"] for example in scored]
    counts = [len(example["choice_logps"]) for example in scored]
    found = {}
    for letter, facts in accuracy_by_position(predictions, answers, max(counts)).items():
        if facts["n"]:
            name = f"choice_accuracy_answer_{letter.lower()}"
            found[name] = Metric(facts["accuracy"], None, facts["n"], _KNOWLEDGE[part.role])
    signature = collapse_signature(predictions, min(counts))
    found["commonest_letter_share"] = Metric(signature["share"], None, len(scored), LOWER)
    found["constant_letter_collapse"] = Metric(float(signature["collapsed"]), None, len(scored), LOWER)
    return found


def model_utility(examples, seed=0):
    """Harmonic mean of nine: probability, ROUGE-L recall and truth ratio of what should be kept.

    Args:
        examples: {set: rows of `example_values`}.
        seed: of the bootstrap.
    Returns:
        Metric; null where one of the nine is missing.
    Source: Maini et al. 2024, arXiv:2401.06121.
    """
    samples = []
    for part, names in UTILITY_PARTS.items():
        rows = [[_utility_value(row, name) for name in names] for row in examples.get(part, [])]
        rows = [row for row in rows if None not in row]
        if not rows:
            return absent(f"the {part} set gave no {', '.join(names)}", HIGHER)
        samples.append(np.array(rows, dtype=np.float64))
    if not all(np.isfinite(sample).all() for sample in samples):
        return absent("an example of the sets to keep is not finite", HIGHER)

    def of(*resampled):
        return metrics.harmonic_mean(np.concatenate([sample.mean(0) for sample in resampled]))

    stderr = metrics.bootstrap_stderr(samples, of, seed=seed)
    return Metric(of(*samples), stderr, sum(map(len, samples)), HIGHER)


def _utility_value(row, name):
    value = row.get(name)
    if value is None or name != "truth_ratio":
        return value
    return float(metrics.aggregate_truth_ratio([value], "utility")[0])
