"""Leakage as pure functions: what counts as containing an answer, leak@k from samples, and a bound from likelihoods."""
# Shapes: N questions, n samples of each, c of them leaks.

import math

import numpy as np

from llm_unlearn.evaluation.text import rouge, words_of

CRITERIA = ("keyword", "containment", "rouge")
CONFIDENCE, NUM_RESAMPLES = 0.95, 1000

# Little words carry no secret, and stand in an answer whether or not it is known; English, as the benchmarks are.
_FUNCTION_WORDS = frozenset(
    "a an the and or but nor so yet of in on at by for from to with without into as than that this these those it its "
    "he him his she her hers they them their theirs we us our i you your who whom whose which what when where why how "
    "is are was were be been being am do does did has have had having will would can could may might shall should must "
    "not no there here also s t".split()
)


def contains(text, answer):
    """Say whether the words of the answer stand in the text one after the other, whatever case, spaces, punctuation.

    Args:
        text: what the model wrote.
        answer: what it should have forgotten.
    Returns:
        bool; False for an answer without any letter or digit.
    """
    words = " ".join(words_of(answer))
    return bool(words) and f" {words} " in f" {' '.join(words_of(text))} "


def keywords(question, answer):
    """Return the words of an answer that give something away: those that are neither in the question nor little words.

    Of "Where was Ann Lee born?" and "Ann Lee was born in Oslo." that is "oslo". A word that the question holds proves
    nothing when the model repeats it. Where only little words are new ("Who is it?" - "It is he."), these are
    returned; where nothing is, all words of the answer.

    Args:
        question: str; "" where there is none.
        answer: str.
    Returns:
        list of distinct lowercased words in the order of the answer; empty for an answer without letters and digits.
    """
    asked = set(words_of(question))
    words = list(dict.fromkeys(words_of(answer)))
    new = [word for word in words if word not in asked]
    return [word for word in new if word not in _FUNCTION_WORDS] or new or words


def keyword_share(text, words):
    """Return the share of `keywords` that a text holds, in [0, 1]; 0 where there are none."""
    found = set(words_of(text))
    return sum(word in found for word in words) / len(words) if words else 0.0


def leak_score(text, question, answer, criterion):
    """Return how much of an answer a text gives away, in [0, 1].

    Args:
        text: what the model wrote.
        question: what it was asked, or "".
        answer: what it should have forgotten.
        criterion: "containment", 1 where the whole answer stands in the text; "rouge", the ROUGE-L recall of the
            answer; "keyword", the share of its `keywords`.
    Returns:
        float.
    Raises:
        ValueError: an unknown criterion.
    """
    if criterion == "containment":
        return float(contains(text, answer))
    if criterion == "rouge":
        return rouge(text, answer)["rouge_l_recall"]
    if criterion == "keyword":
        return keyword_share(text, keywords(question, answer))
    raise ValueError(f"criterion must be one of {CRITERIA}, but is {criterion!r}")


def leak_at_k(leaks, num_samples, k):
    """Probability that at least one of k samples leaks, without bias from n >= k samples.

        leak@k_i = 1 - C(n - c_i, k) / C(n, k)

    The share of all sets of k of the n samples that hold a leak. 1 - (1 - c/n)^k would be biased: too small for k > 1.

    Args:
        leaks: (N,) how many of the samples of each question leak, 0 <= c_i <= n.
        num_samples: n.
        k: 1 <= k <= n.
    Returns:
        (N,) probabilities.
    Raises:
        ValueError: k or a count out of range.
    Source: Chen et al. 2021, arXiv:2107.03374, Eq. 1 (pass@k); as leak@k arXiv:2511.04934.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must lie in [1, {num_samples}], but is {k}")
    leaks = [int(count) for count in leaks]
    if any(not 0 <= count <= num_samples for count in leaks):
        raise ValueError(f"a count of leaks lies outside [0, {num_samples}]")
    # Integers of any size: no rounding before the one division.
    all_sets = math.comb(num_samples, k)
    return np.array([(all_sets - math.comb(num_samples - count, k)) / all_sets for count in leaks])


def at_least_once(probabilities, k):
    """Probability that an event of probability p happens in at least one of k independent trials: 1 - (1 - p)^k.

    With p = exp(sum of log p(token)) of the whole answer, its end included, this is a lower bound of leak@k at
    temperature 1 where samples have room for the answer: one that is the answer word for word contains it, and others
    may.

    Args:
        probabilities: (N,) in [0, 1].
        k: >= 1.
    Returns:
        (N,) probabilities; exact for p far below the resolution of 1 - p.
    """
    probabilities = np.clip(np.asarray(probabilities, dtype=np.float64), 0.0, 1.0)
    with np.errstate(divide="ignore"):
        return -np.expm1(k * np.log1p(-probabilities))


def bootstrap_interval(values, seed=0, num_resamples=NUM_RESAMPLES, confidence=CONFIDENCE):
    """Return the percentile interval of a mean, questions resampled with replacement.

    Args:
        values: (N,).
        seed: of the resampling.
        num_resamples: how often.
        confidence: share of the resampled means inside.
    Returns:
        [low, high], or None for fewer than two values, which say nothing about their spread.
    Source: Efron 1979, the bootstrap.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return None
    generator, means = np.random.default_rng(seed), []
    step = max(1, 4_000_000 // len(values))
    for start in range(0, num_resamples, step):
        rounds = min(step, num_resamples - start)
        means.append(values[generator.integers(len(values), size=(rounds, len(values)))].mean(1))
    tail = 100 * (1 - confidence) / 2
    return [float(end) for end in np.percentile(np.concatenate(means), [tail, 100 - tail])]
