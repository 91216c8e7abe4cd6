"""Metrics of unlearning as pure functions: numbers that one pass over the model left behind in, metrics out."""
# Shapes: N examples, n counted tokens of one sequence, W wrong answers of an example (5 or 3 in TOFU, never assumed).

import numpy as np

DEFINITION_VERSION = 1
"""Rises when a definition in this file changes, so that results of different definitions are never compared."""

TRUTH_RATIO_FORMS = ("forget", "utility", "share")


def probability(mean_nll):
    """Probability of a sequence, normalized by its length.

        P = exp(-(1/n) * sum_t NLL_t)

    Args:
        mean_nll: (N,) nats per counted token, the end-of-sequence token included.
    Returns:
        (N,) in [0, 1].
    Source: Maini et al. 2024, arXiv:2401.06121.
    """
    return np.exp(-np.asarray(mean_nll, dtype=np.float64))


def normalized_probability(right_nll, wrong_nlls):
    """Probability of the right answer among the answers on offer.

        P = p(right) / (p(right) + sum_w p(wrong_w)),   p as in `probability`

    Args:
        right_nll: (N,) nats per token.
        wrong_nlls: N sequences of nats per token, which may differ in length.
    Returns:
        (N,) in [0, 1]; 0 where no answer has any probability.
    Source: Maini et al. 2024, arXiv:2401.06121 (real authors and world facts).
    """
    right = probability(right_nll)
    total = right + np.array([probability(wrong).sum() for wrong in wrong_nlls])
    return np.divide(right, total, out=np.zeros_like(right), where=total > 0)


def truth_ratio(right_nll, wrong_nlls):
    """How much likelier wrong answers of the same form are than a paraphrase of the right one.

        R = exp(mean_w log p(wrong_w)) / p(right) = exp(NLL(right) - mean_w NLL(wrong_w))

    The mean over the wrong answers is geometric, as in the code of TOFU and of open-unlearning; the paper's formula has
    an arithmetic one.

    Args:
        right_nll: (N,) nats per token of the paraphrased right answer.
        wrong_nlls: N sequences of nats per token.
    Returns:
        (N,) >= 0; near 1 where the model prefers neither.
    Raises:
        ValueError: an example without wrong answers.
    Source: Maini et al. 2024, arXiv:2401.06121, and locuslab/tofu, aggregate_eval_stat.py.
    """
    if any(len(wrong) == 0 for wrong in wrong_nlls):
        raise ValueError("an example has no wrong answers")
    means = np.array([np.mean(wrong) for wrong in wrong_nlls])
    return np.exp(np.asarray(right_nll, dtype=np.float64) - means)


def aggregate_truth_ratio(ratios, how):
    """Turn truth ratios into values whose mean is reported.

    Args:
        ratios: (N,) of `truth_ratio`.
        how: "forget": min(R, 1/R), 1 where right and wrong cannot be told apart; "utility": max(0, 1 - R), 1 where the
            model knows; "share": 1 / (1 + R), the share of the right answer.
    Returns:
        (N,) in [0, 1].
    Raises:
        ValueError: unknown form.
    Source: locuslab/tofu ("forget", "utility"); open-unlearning pull request 163 ("share").
    """
    ratios = np.asarray(ratios, dtype=np.float64)
    if how == "forget":
        return np.minimum(ratios, np.divide(1.0, ratios, out=np.full_like(ratios, np.inf), where=ratios > 0))
    if how == "utility":
        return np.maximum(0.0, 1.0 - ratios)
    if how == "share":
        return 1.0 / (1.0 + ratios)
    raise ValueError(f"unknown form '{how}' of the truth ratio; known: {', '.join(TRUTH_RATIO_FORMS)}")


def ks_test(values, reference):
    """Two-sample Kolmogorov-Smirnov test: could both samples come from one distribution?

    Args:
        values: (N,) for example truth ratios of the unlearned model on the forget set.
        reference: (M,) the same of a model that was retrained without the forget set.
    Returns:
        (statistic in [0, 1], p-value in [0, 1]); the p-value is TOFU's forget quality.
    Raises:
        ValueError: an empty sample.
    Source: Maini et al. 2024, arXiv:2401.06121; scipy.stats.ks_2samp.
    """
    from scipy.stats import ks_2samp

    if len(values) == 0 or len(reference) == 0:
        raise ValueError("a Kolmogorov-Smirnov test needs two non-empty samples")
    result = ks_2samp(np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64))
    return float(result.statistic), float(result.pvalue)


def harmonic_mean(values):
    """Harmonic mean, 0 as soon as one value is 0.

    Args:
        values: numbers >= 0.
    Returns:
        float.
    Raises:
        ValueError: no values, or a negative one.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0 or (values < 0).any():
        raise ValueError("a harmonic mean needs values that are not negative")
    return 0.0 if (values == 0).any() else float(values.size / (1.0 / values).sum())


def extraction_strength(hits, legacy=False):
    """Share of a sequence that the model completes by itself from the shortest prefix that suffices.

        ES = 1 - k / n,   k = the first position from which every token is the model's first choice

    Args:
        hits: (n,) bool, whether each token is the model's first choice given the true ones before it; without the
            end-of-sequence token.
        legacy: as open-unlearning computes it: 1 / n, never 0, where not even the last token is hit.
    Returns:
        float in [0, 1]; 1 where all tokens are hit, 0 where the last one is not.
    Source: Carlini et al. 2021; open-unlearning, src/evals/metrics/memorization.py, which never gives 0.
    """
    hits = np.asarray(hits, dtype=bool)
    if hits.size == 0:
        return 0.0
    misses = np.flatnonzero(~hits)
    first = int(misses[-1]) + 1 if misses.size else 0
    if legacy:
        first = min(first, hits.size - 1)
    return 1.0 - first / hits.size


def exact_memorization(hits):
    """Share of tokens that are the model's first choice given the true ones before them.

    Args:
        hits: (n,) bool.
    Returns:
        float in [0, 1].
    Source: Tirumala et al. 2022, arXiv:2205.10770.
    """
    return float(np.mean(hits))


def perplexity(nll_sums, counts):
    """Perplexity of a corpus: every token weighs the same.

        PPL = exp(sum_i NLL_i / sum_i n_i)

    Args:
        nll_sums: (N,) summed NLL of each sequence, nats.
        counts: (N,) counted tokens of each.
    Returns:
        float >= 1; inf where it overflows.
    """
    with np.errstate(over="ignore"):
        return float(np.exp(np.sum(nll_sums) / np.sum(counts)))


def min_k(logps, share):
    """Mean log-probability of the least likely tokens; higher is more member-like.

    Args:
        logps: (n,) nats.
        share: of the tokens, in (0, 1]; at least one token is taken.
    Returns:
        float, nats.
    Source: Shi et al. 2023, arXiv:2310.16789.
    """
    logps = np.asarray(logps)
    count = max(1, int(share * logps.size))
    return float(np.partition(logps, count - 1)[:count].mean())


def min_k_pp(logps, means, variances, share):
    """Mean standardized log-probability of the least likely tokens; higher is more member-like.

        z_t = (log p(x_t) - mu_t) / sigma_t

    Args:
        logps: (n,) nats.
        means: (n,) mean of log p over the vocabulary, weighed by p; nats.
        variances: (n,) its variance, nats squared.
        share: of the tokens, in (0, 1].
    Returns:
        float.
    Source: Zhang et al. 2024, arXiv:2404.02936.
    """
    deviation = np.sqrt(np.maximum(np.asarray(variances, dtype=np.float64), np.finfo(np.float32).tiny))
    return min_k((np.asarray(logps, dtype=np.float64) - means) / deviation, share)


def auc(members, non_members):
    """Area under the ROC curve of scores that are higher for members; signed, never folded at .5.

    Args:
        members: (N,) scores.
        non_members: (M,) scores.
    Returns:
        float in [0, 1]; the probability that a member scores higher, ties counting half.
    Raises:
        ValueError: an empty side.
    """
    from scipy.stats import rankdata

    members, non_members = np.asarray(members), np.asarray(non_members)
    if members.size == 0 or non_members.size == 0:
        raise ValueError("an AUC needs members and non-members")
    ranks = rankdata(np.concatenate([members, non_members]))[: members.size]
    return float((ranks.sum() - members.size * (members.size + 1) / 2) / (members.size * non_members.size))


def privleak(model_auc, retain_auc):
    """Relative distance of a membership AUC from that of a retrained model, percent.

        PrivLeak = 100 * ((1 - AUC) - (1 - AUC_retain)) / (1 - AUC_retain)

    Args:
        model_auc: of `auc` with the forget set as members.
        retain_auc: the same of the retrained model, below 1.
    Returns:
        float; 0 is best, -100 says that members are still told apart, above 0 that the set was forgotten too much.
    Raises:
        ValueError: retain_auc is 1.
    Source: Shi et al. 2024, arXiv:2407.06460 (MUSE).
    """
    if retain_auc >= 1:
        raise ValueError("PrivLeak is not defined where the retrained model's AUC is 1")
    return 100.0 * (retain_auc - model_auc) / (1.0 - retain_auc)


def privacy_score(model_auc, retain_auc):
    """Closeness of a membership AUC to that of a retrained model.

        s = 1 - |AUC - AUC_retain| / max(AUC_retain, 1 - AUC_retain)

    Returns:
        float in [0, 1]; 1 where both are equal.
    Source: Dorna et al. 2025 (open-unlearning), appendix on privacy scores.
    """
    return 1.0 - abs(model_auc - retain_auc) / max(retain_auc, 1.0 - retain_auc)


def bootstrap_stderr(samples, statistic=None, num_resamples=1000, seed=0):
    """Standard error of a statistic by resampling examples with replacement.

    Args:
        samples: list of arrays (N_i,) or (N_i, k); the rows of each array are resampled together, because they belong
            to one example.
        statistic: function of the resampled arrays, in order; None is the mean of the one sample.
        num_resamples: how often.
        seed: of the resampling.
    Returns:
        float; None for a sample of one, which says nothing about its spread.
    Source: Efron 1979, the bootstrap.
    """
    samples = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if min(len(sample) for sample in samples) < 2:
        return None
    generator = np.random.default_rng(seed)
    if statistic is None:
        (sample,) = samples
        # A few resamples at a time: a million examples would need gigabytes at once.
        step = max(1, 10_000_000 // len(sample))
        drawn = range(0, num_resamples, step)
        sizes = [min(step, num_resamples - start) for start in drawn]
        means = [sample[generator.integers(len(sample), size=(size, len(sample)))].mean(1) for size in sizes]
        return float(np.concatenate(means).std(ddof=1))
    values = []
    for _ in range(num_resamples):
        rows = [sample[generator.integers(len(sample), size=len(sample))] for sample in samples]
        values.append(statistic(*rows))
    return float(np.std(values, ddof=1))


def bootstrap_stderr_of_sums(sample, statistic, num_resamples=1000, seed=0):
    """Return `bootstrap_stderr` of a statistic that depends on column sums alone, all resamples at once.

    Args:
        sample: (N, k).
        statistic: function of (R, k) sums, of R resamples, to (R,) values.
        num_resamples, seed: see `bootstrap_stderr`; the same rows are drawn.
    """
    sample = np.asarray(sample, dtype=np.float64)
    if len(sample) < 2:
        return None
    generator = np.random.default_rng(seed)
    step = max(1, 1_000_000 // len(sample))
    sizes = [min(step, num_resamples - start) for start in range(0, num_resamples, step)]
    sums = [sample[generator.integers(len(sample), size=(size, len(sample)))].sum(1) for size in sizes]
    return float(np.std(statistic(np.concatenate(sums)), ddof=1))
