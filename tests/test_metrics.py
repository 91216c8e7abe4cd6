"""Metrics: published numbers of TOFU, numbers worked out by hand, scipy and scikit-learn, and properties."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_unlearn.errors import UserError
from llm_unlearn.evaluation import metrics
from llm_unlearn.evaluation.aggregates import forget_quality
from llm_unlearn.evaluation.retain_reference import load_reference
from llm_unlearn.evaluation.scores import model_utility

UTILITIES = {"retain90_llama": 0.62034, "retain95_llama": 0.61764, "retain90_phi": 0.52425}
# The published numbers have five digits.
HALF_A_DIGIT = 5e-6
LOG_OF = {
    "retain": "eval_log.json",
    "real_authors": "eval_real_author_wo_options.json",
    "world_facts": "eval_real_world_wo_options.json",
    "forget": "eval_log_forget.json",
}
QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=100)
nlls = st.floats(0, 30)


def log_of(shared_data, name):
    return json.loads((shared_data / "tofu_logs" / f"{name}.json").read_text())


def examples_of(log):
    """Rows as `example_values` makes them, from a log of locuslab/tofu."""
    examples = {}
    for part, file in LOG_OF.items():
        right, wrong = log[file]["avg_gt_loss"], log[file]["average_perturb_loss"]
        columns = {
            "probability": metrics.probability(right),
            "probability_normalized": metrics.normalized_probability(right, wrong),
            "rouge_l_recall": np.array(log[file]["rougeL_recall"]),
            "truth_ratio": metrics.truth_ratio(log[file]["avg_paraphrased_loss"], wrong),
        }
        names = list(columns)
        rows = zip(*(columns[name].tolist() for name in names), strict=True)
        examples[part] = [dict(zip(names, row, strict=True)) for row in rows]
    return examples


class TestPublishedNumbers:
    @pytest.mark.parametrize("name", UTILITIES)
    def test_model_utility(self, shared_data, name):
        found = model_utility(examples_of(log_of(shared_data, name)))
        assert found.value == pytest.approx(UTILITIES[name], abs=HALF_A_DIGIT)
        assert found.n == 300 + 100 + 117 and found.direction == "higher"
        assert 0 < found.stderr < 0.05

    def test_model_utility_is_zero_where_one_of_the_nine_is(self, shared_data):
        examples = examples_of(log_of(shared_data, "retain90_llama"))
        for row in examples["world_facts"]:
            row["rouge_l_recall"] = 0.0
        assert model_utility(examples).value == 0.0

    def test_forget_quality_statistic(self, shared_data):
        ratios = [
            [row["truth_ratio"] for row in examples_of(log_of(shared_data, name))["forget"]]
            for name in ("retain90_llama", "retain90_phi")
        ]
        statistic, p_value = metrics.ks_test(*ratios)
        assert statistic == pytest.approx(0.09667, abs=HALF_A_DIGIT) and 0 < p_value < 1
        assert metrics.ks_test(ratios[0], ratios[0]) == (0.0, 1.0)

    @pytest.mark.parametrize("as_dict", [False, True])
    def test_a_tofu_log_as_reference(self, shared_data, tmp_path, as_dict):
        """Columns are lists in our copies, and {index: value} where the data set was not cut."""
        log = log_of(shared_data, "retain90_phi")
        if as_dict:
            for columns in log.values():
                columns |= {name: {str(n): value for n, value in enumerate(columns[name])} for name in columns}
        path = tmp_path / "log.json"
        path.write_text(json.dumps(log))
        reference = load_reference(path, None)
        assert len(reference.truth_ratios) == 300
        examples = examples_of(log_of(shared_data, "retain90_llama"))
        p_value, statistic = forget_quality(examples, reference)
        assert statistic.value == pytest.approx(0.09667, abs=HALF_A_DIGIT) and statistic.direction == "lower"
        assert 0 < p_value.value < 1 and p_value.direction == "higher" and p_value.n == 300

    def test_a_reference_that_is_none(self, tmp_path):
        path = tmp_path / "log.json"
        path.write_text('{"eval_log.json": {}}')
        with pytest.raises(UserError, match="neither a results"):
            load_reference(path, None)


class TestProbabilities:
    def test_by_hand(self):
        np.testing.assert_allclose(metrics.probability([0.0, math.log(4), math.inf]), [1, 0.25, 0])

    def test_normalized_with_ragged_wrong_answers(self):
        """1/2 among 1/2, 1/4, 1/4; then 1/4 among 1/4, 1/8."""
        two, four, eight = math.log(2), math.log(4), math.log(8)
        found = metrics.normalized_probability([two, four], [[four, four], [eight]])
        np.testing.assert_allclose(found, [0.5, 2 / 3])
        assert metrics.normalized_probability([math.inf], [[math.inf]]).tolist() == [0.0]

    def test_perplexity_weighs_tokens_not_sequences(self):
        """12 nats over 6 tokens; a mean of means would be 2.5/2 + 1/2 = 1.75."""
        assert metrics.perplexity([10.0, 2.0], [4, 2]) == pytest.approx(math.exp(2))
        assert metrics.perplexity([1e6], [10]) == math.inf


class TestTruthRatio:
    def test_the_mean_over_wrong_answers_is_geometric(self):
        """p = 1/2 against 1/8 and 1/2: sqrt(1/16) / (1/2) = 1/2; the arithmetic mean would give 5/8."""
        eight, two = math.log(8), math.log(2)
        assert metrics.truth_ratio([two], [[eight, two]])[0] == pytest.approx(0.5)

    def test_ragged_wrong_answers(self):
        found = metrics.truth_ratio([1.0, 2.0, 0.5], [[1.0, 2.0, 3.0], [2.5], [0.5] * 5])
        np.testing.assert_allclose(found, [math.exp(-1), math.exp(-0.5), 1.0])

    def test_an_example_without_wrong_answers(self):
        with pytest.raises(ValueError, match="no wrong answers"):
            metrics.truth_ratio([1.0, 1.0], [[1.0], []])

    @pytest.mark.parametrize(
        ("how", "expected"),
        [("forget", [0, 0.5, 1, 0.5, 0]), ("utility", [1, 0.5, 0, 0, 0]), ("share", [1, 2 / 3, 0.5, 1 / 3, 0])],
    )
    @pytest.mark.filterwarnings("error")
    def test_limits(self, how, expected):
        np.testing.assert_allclose(metrics.aggregate_truth_ratio([0, 0.5, 1, 2, math.inf], how), expected)

    def test_unknown_form(self):
        with pytest.raises(ValueError, match="forget, utility, share"):
            metrics.aggregate_truth_ratio([1.0], "mean")

    @QUICK
    @given(st.lists(st.tuples(nlls, st.lists(nlls, min_size=1, max_size=5)), min_size=1))
    def test_properties(self, rows):
        """Equal answers have ratio 1, and what exchanges right and wrong leaves the forget form alone."""
        right, wrong = [row[0] for row in rows], [row[1] for row in rows]
        ratios = metrics.truth_ratio(right, wrong)
        np.testing.assert_allclose(metrics.truth_ratio(right, [[value] * 3 for value in right]), 1)
        mirrored = metrics.truth_ratio([np.mean(row) for row in wrong], [[value] for value in right])
        forget = metrics.aggregate_truth_ratio(ratios, "forget")
        np.testing.assert_allclose(forget, metrics.aggregate_truth_ratio(mirrored, "forget"), rtol=1e-9)
        assert ((forget >= 0) & (forget <= 1)).all()


class TestKolmogorovSmirnov:
    def test_by_hand(self):
        """Below 2.5 lie two thirds of one sample and none of the other."""
        assert metrics.ks_test([1, 2, 3], [2.5, 4, 5, 6])[0] == pytest.approx(3 / 4)
        assert metrics.ks_test([1, 2, 3], [4, 5, 6])[0] == 1.0

    @pytest.mark.parametrize("samples", [([], [1.0]), ([1.0], [])])
    def test_an_empty_sample(self, samples):
        with pytest.raises(ValueError, match="non-empty"):
            metrics.ks_test(*samples)


class TestHarmonicMean:
    def test_by_hand(self):
        assert metrics.harmonic_mean([1, 0.5]) == pytest.approx(2 / 3)
        assert metrics.harmonic_mean([0.3]) == pytest.approx(0.3)
        assert metrics.harmonic_mean([1, 1, 0]) == 0.0
        for bad in ([], [1, -0.1]):
            with pytest.raises(ValueError, match="not negative"):
                metrics.harmonic_mean(bad)

    @QUICK
    @given(st.lists(st.floats(1e-6, 1e3), min_size=1))
    def test_is_scipys(self, values):
        from scipy.stats import hmean

        assert metrics.harmonic_mean(values) == pytest.approx(hmean(values), rel=1e-9)


class TestExtractionStrength:
    @pytest.mark.parametrize(
        ("hits", "expected", "legacy"),
        [
            ([1, 1, 1, 1], 1, 1),
            ([0, 0, 0, 0], 0, 1 / 4),
            ([1, 1, 1, 0], 0, 1 / 4),
            ([0, 0, 0, 1], 1 / 4, 1 / 4),
            ([1, 0, 1, 1], 1 / 2, 1 / 2),
            ([0], 0, 1),
            ([1], 1, 1),
            ([], 0, 0),
        ],
    )
    def test_by_hand(self, hits, expected, legacy):
        assert metrics.extraction_strength(np.array(hits, dtype=bool)) == pytest.approx(expected)
        assert metrics.extraction_strength(hits, legacy=True) == pytest.approx(legacy)

    @QUICK
    @given(st.lists(st.booleans(), min_size=1, max_size=40))
    def test_is_what_the_loops_give(self, hits):
        first = next(k for k in range(len(hits) + 1) if all(hits[k:]))
        assert metrics.extraction_strength(hits) == pytest.approx(1 - first / len(hits))
        # open-unlearning tries every k below n and keeps the last one where none fits.
        found = next((k for k in range(len(hits)) if all(hits[k:])), len(hits) - 1)
        assert metrics.extraction_strength(hits, legacy=True) == pytest.approx(1 - found / len(hits))
        assert metrics.extraction_strength(hits) <= metrics.exact_memorization(hits) + 1e-12

    def test_exact_memorization(self):
        assert metrics.exact_memorization([True, False, True, True]) == 0.75


class TestMembershipScores:
    LOGPS = [-1.0, -5.0, -2.0, -4.0, -3.0]

    @pytest.mark.parametrize(("share", "expected"), [(0.4, -4.5), (0.59, -4.5), (0.6, -4), (0.01, -5), (1, -3)])
    def test_min_k_by_hand(self, share, expected):
        assert metrics.min_k(self.LOGPS, share) == pytest.approx(expected)

    def test_min_k_pp_by_hand(self):
        """z = (-1+2)/1, (-5+2)/2, (-2+2)/3, (-4+1)/1, (-3+1)/.5 = 1, -1.5, 0, -3, -4: the two least are -3 and -4."""
        means, variances = [-2, -2, -2, -1, -1], [1, 4, 9, 1, 0.25]
        assert metrics.min_k_pp(self.LOGPS, means, variances, 0.4) == pytest.approx(-3.5)
        assert metrics.min_k_pp(self.LOGPS, means, variances, 1.0) == pytest.approx(-7.5 / 5)

    def test_a_certain_model_has_a_finite_min_k_pp(self):
        """No spread and a wrong token: very unlikely for a member, but a number."""
        found = metrics.min_k_pp([0.0, -200.0], [0.0, 0.0], [0.0, 0.0], 0.5)
        assert math.isfinite(found) and found < -1e6
        assert metrics.min_k_pp([0.0], [0.0], [0.0], 1.0) == 0.0

    @QUICK
    @given(st.lists(st.floats(-50, 0), min_size=1, max_size=60), st.floats(0.01, 1))
    def test_min_k_is_the_mean_of_the_sorted(self, logps, share):
        count = max(1, int(share * len(logps)))
        assert metrics.min_k(logps, share) == pytest.approx(np.mean(sorted(logps)[:count]))


class TestAuc:
    scores = st.lists(st.integers(-3, 3), min_size=1, max_size=30)

    @QUICK
    @given(scores, scores)
    def test_is_scikit_learns_with_ties(self, members, non_members):
        from sklearn.metrics import roc_auc_score

        expected = roc_auc_score([1] * len(members) + [0] * len(non_members), members + non_members)
        assert metrics.auc(members, non_members) == pytest.approx(expected)

    def test_is_signed(self):
        assert metrics.auc([2, 3], [0, 1]) == 1.0
        assert metrics.auc([0, 1], [2, 3]) == 0.0, "folded it would be 1"
        assert metrics.auc([1, 1], [1]) == 0.5

    @pytest.mark.parametrize("sides", [([], [1]), ([1], [])])
    def test_needs_both_sides(self, sides):
        with pytest.raises(ValueError, match="members and non-members"):
            metrics.auc(*sides)

    def test_privleak_by_hand(self):
        """(.1 - .5) / .5 = -80%; (1 - .5) / .5 = 100%; equal is 0."""
        assert metrics.privleak(0.9, 0.5) == pytest.approx(-80)
        assert metrics.privleak(0.0, 0.5) == pytest.approx(100)
        assert metrics.privleak(0.37, 0.37) == 0.0
        assert metrics.privleak(1.0, 0.2) == pytest.approx(-100)
        with pytest.raises(ValueError, match="not defined"):
            metrics.privleak(0.5, 1.0)

    def test_privacy_score_by_hand(self):
        assert metrics.privacy_score(0.9, 0.6) == pytest.approx(1 - 0.3 / 0.6)
        assert metrics.privacy_score(0.0, 0.6) == 0.0 and metrics.privacy_score(1.0, 0.2) == pytest.approx(0.0)
        assert metrics.privacy_score(0.2, 0.2) == 1.0


class TestBootstrap:
    """1,000 resamples know a standard error to 1/sqrt(2000) = 2.2%; 10% is more than four times that."""

    @pytest.mark.parametrize("size", [37, 400, 20_001])
    def test_of_a_mean_is_the_analytic_one(self, size):
        sample = np.random.default_rng(1).normal(3, 2, size)
        expected = sample.std() / math.sqrt(size)
        assert metrics.bootstrap_stderr([sample]) == pytest.approx(expected, rel=0.1)

    def test_of_a_difference_of_two_samples(self):
        generator = np.random.default_rng(2)
        samples = [generator.normal(0, 1, 200), generator.normal(5, 3, 100)]
        expected = math.sqrt(sum(sample.var() / len(sample) for sample in samples))
        found = metrics.bootstrap_stderr(samples, lambda first, second: first.mean() - second.mean())
        assert found == pytest.approx(expected, rel=0.1)

    def test_values_of_one_example_stay_together(self):
        column = np.random.default_rng(3).random(50) + 1
        rows = np.stack([column, 2 * column], axis=1)
        ratio = metrics.bootstrap_stderr([rows], lambda sample: sample[:, 1].sum() / sample[:, 0].sum())
        assert ratio < 1e-12

    def test_is_the_same_for_the_same_seed_only(self):
        sample = np.arange(30.0)
        of = [metrics.bootstrap_stderr([sample], seed=seed) for seed in (0, 0, 1)]
        assert of[0] == of[1] != of[2]
        slow = [metrics.bootstrap_stderr([sample], np.mean, seed=seed) for seed in (0, 0, 1)]
        assert slow[0] == slow[1] != slow[2]

    def test_says_nothing_about_a_single_example(self):
        assert metrics.bootstrap_stderr([[1.0]]) is None
        assert metrics.bootstrap_stderr([[1.0, 2.0], [1.0]], lambda a, b: 0.0) is None


@pytest.mark.parametrize("count", [2, 3, 160])
def test_the_bootstrap_of_sums_draws_what_the_general_one_draws(count):
    rows = np.random.default_rng(5).uniform(1, 30, size=(count, 2))
    general = metrics.bootstrap_stderr([rows], lambda s: metrics.perplexity(s[:, 0], s[:, 1]), seed=3)
    at_once = metrics.bootstrap_stderr_of_sums(rows, lambda sums: np.exp(sums[:, 0] / sums[:, 1]), seed=3)
    assert at_once == pytest.approx(general, rel=1e-12)
    assert metrics.bootstrap_stderr_of_sums(rows[:1], lambda sums: sums[:, 0]) is None
