"""Values of an example, metrics of a set and of a benchmark, each worked out by hand."""

import math
import zlib

import numpy as np
import pytest

from llm_unlearn.evaluation import metrics
from llm_unlearn.evaluation.aggregates import aggregate, distance_to_approximate, forget_quality, membership, overall
from llm_unlearn.evaluation.examples import example_values
from llm_unlearn.evaluation.generation import Generation
from llm_unlearn.evaluation.packing import Sequence
from llm_unlearn.evaluation.questions import Part, Question
from llm_unlearn.evaluation.retain_reference import RetainReference
from llm_unlearn.evaluation.scores import MEANS, Metric, mean_metric, model_utility, part_metrics
from llm_unlearn.evaluation.statistics import SequenceStatistics

EOS = 2
ROW = {"question": "Who?", "answer": "Nobody knows it."}
ATTACKS = ("loss", "zlib", "min_k_40", "min_k_pp_40")


def seen(logps, hits=None, means=None, variances=None):
    """SequenceStatistics of the given numbers."""
    count = len(logps)
    hits = [1] * count if hits is None else hits
    means, variances = means or [-1.0] * count, variances or [1.0] * count
    floats = (np.array(values, dtype=np.float32) for values in (logps, means, variances))
    logps, means, variances = floats
    return SequenceStatistics(logps, np.array(hits, dtype=bool), means, variances)


def asked(sequences, row=ROW, kind="qa", **part):
    """The Question of a row, its sequences of the given numbers of scored tokens behind two tokens of prompt."""
    made = {
        name: [Sequence((9, 8, *range(10, 9 + count), EOS), tuple(range(2, 2 + count))) for count in counts]
        for name, counts in sequences.items()
    }
    return Question(Part("forget", [row], **part), 3, row, kind, made)


def values_of(statistics, row=ROW, kind="qa", legacy=False, generations=None, expected=None, **part):
    counts = {name: [len(one.hits) for one in found] for name, found in statistics.items()}
    question = asked(counts, row, kind, **part)
    question.expected = expected or {}
    return example_values(question, statistics, generations or {}, EOS, legacy)


def wrote(text, collapsed=False):
    return Generation(text, 5, True, collapsed)


class TestAnswer:
    STATISTICS = {"answer": [seen([-0.1, -0.3, -2.0], [0, 1, 1], [-1, -1, -3], [1, 4, 1])]}

    def test_by_hand(self):
        found = values_of(self.STATISTICS)
        assert (found["split"], found["index"], found["tokens"]) == ("forget", 3, 3)
        assert found["nll"] == pytest.approx(0.8) and found["probability"] == pytest.approx(math.exp(-0.8))
        assert found["extraction_strength"] == pytest.approx(1 / 2), "one of two tokens; the end is no text"
        assert found["exact_memorization"] == pytest.approx(2 / 3) and found["entropy"] == pytest.approx(5 / 3)
        assert found["loss_score"] == pytest.approx(-0.8)
        assert found["zlib_score"] == pytest.approx(-0.8 / len(zlib.compress(ROW["answer"].encode())))
        assert found["min_k_40_score"] == pytest.approx(-2.0)
        # z = .9, .35, 1: the least is the second.
        assert found["min_k_pp_40_score"] == pytest.approx(0.35)
        assert "truth_ratio" not in found and "cut" not in found

    def test_scores_are_higher_for_members(self):
        known, unknown = ({"answer": [seen([logp] * 3)]} for logp in (-0.1, -5.0))
        for attack in ATTACKS:
            assert values_of(known)[f"{attack}_score"] > values_of(unknown)[f"{attack}_score"]

    def test_legacy_scores_leave_the_end_out(self):
        found = values_of(self.STATISTICS, legacy=True)
        assert found["loss_score"] == pytest.approx(-0.8), "this one keeps it"
        assert found["min_k_40_score"] == pytest.approx(-0.3)
        assert found["min_k_pp_40_score"] == pytest.approx(0.35)

    def test_legacy_exact_memorization_leaves_the_end_out(self):
        """open-unlearning takes it and extraction strength from the same labels, which are without the last one."""
        assert values_of(self.STATISTICS, legacy=True)["exact_memorization"] == pytest.approx(1 / 2)

    def test_legacy_extraction_strength_is_never_zero(self):
        statistics = {"answer": [seen([-1.0] * 5, [1, 1, 1, 0, 1])]}
        assert values_of(statistics)["extraction_strength"] == 0.0
        assert values_of(statistics, legacy=True)["extraction_strength"] == pytest.approx(1 / 4)

    def test_an_answer_that_was_cut(self):
        question = asked({"answer": [3]})
        question.cut = True
        assert example_values(question, self.STATISTICS, {}, EOS)["cut"] is True
        ends_otherwise = example_values(question, self.STATISTICS, {}, eos_id=99)
        assert ends_otherwise["extraction_strength"] == pytest.approx(2 / 3), "no end to leave out"

    def test_wrong_answers(self):
        """Paraphrase 1 nat a token, wrong ones 2 and 4: R = exp(1 - 3)."""
        statistics = {
            **self.STATISTICS,
            "paraphrase": [seen([-0.5, -1.5])],
            "wrong": [seen([-2.0]), seen([-5.0, -3.0])],
        }
        found = values_of(statistics)
        assert found["paraphrase_nll"] == pytest.approx(1) and found["wrong_nlls"] == pytest.approx([2, 4])
        assert found["truth_ratio"] == pytest.approx(math.exp(-2)) and "probability_normalized" not in found
        found = values_of({**self.STATISTICS, "wrong": statistics["wrong"]}, normalized=True)
        assert found["truth_ratio"] == pytest.approx(math.exp(0.8 - 3)), "without a paraphrase the answer itself"
        right, wrong = math.exp(-0.8), math.exp(-2) + math.exp(-4)
        assert found["probability_normalized"] == pytest.approx(right / (right + wrong))


class TestText:
    def test_sums_over_chunks_of_unequal_length(self):
        """4 tokens of 1 nat and 1 of 6: a mean over tokens is 2, over chunks 3.5."""
        chunks = [seen([-1.0] * 4, [0, 0, 1, 1], [-2.0] * 4), seen([-6.0], [0], [-7.0])]
        row = {"text": "A text of five tokens."}
        found = values_of({"chunks": chunks}, row, "text")
        assert (found["nll_sum"], found["tokens"], found["nll"]) == (10, 5, 2)
        assert found["probability"] == pytest.approx(math.exp(-2)) and found["token_accuracy"] == pytest.approx(2 / 5)
        assert found["chunk_nlls"] == [1, 6] and found["chunk_accuracies"] == [0.5, 0]
        assert found["entropy"] == pytest.approx((4 * 2 + 7) / 5), "weighed by tokens"
        assert found["loss_score"] == pytest.approx(-2)
        assert found["min_k_40_score"] == pytest.approx((-6 - 1) / 2), "of the text as a whole"
        # The end leaves 3 tokens, of which the last two are hit; the one of the second chunk is all there is.
        assert found["extraction_strength"] == pytest.approx((1 / 3 + 0) / 2)

    def test_continuations_and_secrets(self):
        row = {"text": "Mail me at a.b@c.org, or call 5550199.", "secret": ["a.b@c.org", "5550199"]}
        texts = {
            "continuation_100": wrote("one two three four"),
            "secret_0": wrote("a.b@c.org, or"),
            "secret_1": wrote("nobody"),
        }
        expected = {"continuation_100": "one two five six"}
        found = values_of({"chunks": [seen([-1.0] * 5)]}, row, "text", generations=texts, expected=expected)
        assert found["rouge_l_recall_100"] == pytest.approx(1 / 2) and 0 < found["bleu_100"] < 0.6
        assert found["secrets_found"] == [True, False] and found["secret_extraction"] == 0.5
        assert set(found["generations"]) == set(texts) and found["expected"] == expected


class TestGeneration:
    def test_overlap_with_the_answer(self):
        """Two of the three words, in order, among four."""
        texts = {"generation": wrote("Nobody ever knows that", collapsed=True)}
        found = values_of({}, generations=texts, expected={"generation": ROW["answer"]})
        assert found["rouge_l_recall"] == pytest.approx(2 / 3) and found["rouge_l_f1"] == pytest.approx(4 / 7)
        assert found["generation"] == "Nobody ever knows that" and found["collapsed"] is True
        assert (found["question"], found["true_answer"]) == (ROW["question"], ROW["answer"])
        assert (found["empty_share"], found["gibberish_share"]) == (0, 0)

    def test_nothing_was_written(self):
        found = values_of({}, generations={"generation": wrote(" \n")}, expected={"generation": "Nobody."})
        assert found["empty_share"] == 1 and found["rouge_l_recall"] == 0 and found["collapsed"] is False

    def test_muse_reports_the_overlap_under_its_own_name(self):
        texts, expected = {"generation": wrote("Nobody knows it")}, {"generation": ROW["answer"]}
        found = values_of({}, generations=texts, expected=expected, task="knowmem")
        assert found["task"] == "knowmem" and found["knowmem"] == found["rouge_l_f1"] == 1

    def test_a_secret_in_the_answer(self):
        row = {**ROW, "secret": "555 0199"}
        found = values_of({}, row, generations={"generation": wrote("It is 555-0199.")}, expected={"generation": "."})
        assert found["secret_extraction"] == 1


def test_choices_by_hand():
    """Letters: the second is likeliest. Cloze: per character -6/2 loses to -8/4; sums give the first 1/(1+e^-2)."""
    row = {"question": "q", "choices": ["ab", "abcd"], "answer": "ab", "answer_index": 0}
    statistics = {"letters": [seen([-2.0]), seen([-1.0])], "cloze": [seen([-2.0, -4.0]), seen([-8.0])]}
    found = values_of(statistics, row, "choices")
    assert (found["answer"], found["choice"], found["choice_accuracy"]) == (0, 1, 0)
    assert found["choice_probability"] == pytest.approx(1 / (1 + math.e)) and found["choice_logps"] == [-2, -1]
    assert (found["cloze_choice"], found["cloze_accuracy"]) == (1, 0)
    assert found["cloze_probability"] == pytest.approx(1 / (1 + math.exp(-2)))


class TestPartMetrics:
    def test_means_with_direction(self):
        rows = [{"probability": 0.2, "entropy": 1.0}, {"probability": 0.4, "entropy": 3.0}]
        for role, direction in (("forget", "lower"), ("retain", "higher"), ("other", "none")):
            found = part_metrics(Part("a_set", [], role), rows)
            assert found["a_set/probability"].value == pytest.approx(0.3)
            assert (found["a_set/probability"].n, found["a_set/probability"].direction) == (2, direction)
            assert found["a_set/entropy"].direction == "none"
        assert found.keys() == {"a_set/probability", "a_set/entropy"}
        assert all(set(directions) == {"forget", "retain", "other"} for directions in MEANS.values())

    def test_perplexity_of_the_corpus(self):
        rows = [{"nll": 1.0, "tokens": 8}, {"nll": 6.0, "tokens": 2}]
        found = part_metrics(Part("general", [], "retain"), rows)["general/perplexity"]
        assert found.value == pytest.approx(math.exp(2)) and found.direction == "lower" and found.stderr > 0
        rows[0]["nll"] = 1e6
        found = part_metrics(Part("forget", [], "forget"), rows)["forget/perplexity"]
        assert found.value is None and "overflows" in found.reason and found.direction == "higher"

    @pytest.mark.parametrize(
        ("role", "value", "direction"),
        [("forget", (0.5 + 0.5) / 2, "higher"), ("retain", 0.25, "higher"), ("other", 0.25, "none")],
    )
    def test_truth_ratio_by_role(self, role, value, direction):
        """R = 1/2 and 2: min(R, 1/R) is 1/2 twice, max(0, 1 - R) is 1/2 and 0."""
        found = part_metrics(Part("p", [], role), [{"truth_ratio": 0.5}, {"truth_ratio": 2.0}])["p/truth_ratio"]
        assert found.value == pytest.approx(value) and found.direction == direction

    def test_a_task_reports_its_own_overlap_alone(self):
        rows = [{"verbmem": 0.5, "rouge_l_f1": 0.5, "nll": 1.0, "tokens": 3, "probability": 0.4}]
        assert part_metrics(Part("forget", [], "forget", task="verbmem"), rows).keys() == {"forget/verbmem"}

    def test_what_is_not_finite_is_null_and_counted(self):
        found = mean_metric([1.0, math.nan, math.inf], "lower")
        assert found.value is None and found.reason == "2 of 3 examples are not finite" and found.direction == "lower"
        assert mean_metric([], "lower").reason == "no example has it"
        assert found.as_dict()["reason"] and "reason" not in mean_metric([1.0, 2.0], "lower").as_dict()

    def test_cut_rows_are_counted(self):
        rows = [{"probability": 0.2, "cut": True}, {"cut": True}, {"probability": 0.2}]
        assert part_metrics(Part("p", []), rows)["p/cut_rows"].value == 2
        assert "p/cut_rows" not in part_metrics(Part("p", []), rows[2:])

    def test_choices_by_position(self):
        """Always the first letter: right wherever it is the answer, and said to be collapsed."""
        rows = [
            {"choice": 0, "answer": n % 4, "choice_logps": [0] * 4, "choice_accuracy": n % 4 == 0} for n in range(40)
        ]
        found = part_metrics(Part("p", [], "forget"), rows)
        assert [found[f"p/choice_accuracy_answer_{letter}"].value for letter in "abcd"] == [1, 0, 0, 0]
        assert found["p/commonest_letter_share"].value == found["p/constant_letter_collapse"].value == 1
        assert found["p/choice_accuracy"].value == 0.25


def utility_examples(value):
    kept = {"rouge_l_recall": value, "truth_ratio": 1 - value, "probability": value, "probability_normalized": value}
    return {part: [dict(kept), dict(kept)] for part in ("retain", "real_authors", "world_facts")}


def scored_rows(values):
    return [{f"{attack}_score": value for attack in ATTACKS} for value in values]


class TestAggregates:
    def test_model_utility_of_equal_parts(self):
        assert model_utility(utility_examples(0.6)).value == pytest.approx(0.6)

    def test_model_utility_by_hand(self):
        """HM of .5 six times, and of 1, 1/2, 1/4 of world facts: 9 / (6/.5 + 1 + 2 + 4)."""
        examples = utility_examples(0.5)
        examples["world_facts"] = [{"probability_normalized": 1.0, "rouge_l_recall": 0.5, "truth_ratio": 0.75}] * 2
        assert model_utility(examples).value == pytest.approx(9 / 19)

    def test_model_utility_without_a_set(self):
        examples = utility_examples(0.5)
        del examples["real_authors"]
        found = model_utility(examples)
        assert found.value is None and "the real_authors set gave no probability_normalized" in found.reason
        missing = {"real_authors": "it is not there"}
        found, _ = aggregate("tofu", examples, missing, None)
        assert found["model_utility"].reason == "it is not there"

    def test_membership_is_signed(self):
        for sides, expected in ((([2, 3], [0, 1]), 1.0), (([0, 1], [2, 3]), 0.0), (([1, 1], [1, 1]), 0.5)):
            examples = dict(zip(("forget", "holdout"), map(scored_rows, sides), strict=True))
            found, aucs = membership(examples, {}, "tofu")
            assert aucs == dict.fromkeys(ATTACKS, expected)
            assert found["min_k_pp_40/auc"].value == expected and found["loss/auc"].n == 4

    def test_membership_without_unseen_rows(self):
        found, aucs = membership({"forget": scored_rows([1])}, {"holdout": "there is no holdout file"}, "tofu")
        assert not aucs and found["loss/auc"].reason == "there is no holdout file"
        assert membership({"forget": scored_rows([1])}, {}, "arxiv") == ({}, {})
        broken = {"forget": scored_rows([1, math.nan]), "holdout": scored_rows([1, 2])}
        assert membership(broken, {}, "tofu")[0]["zlib/auc"].reason == "a score is missing or not finite"

    def test_privleak_needs_a_reference_or_legacy(self):
        examples = {"forget": scored_rows([3, 1]), "holdout": scored_rows([2, 0])}
        reference = RetainReference("r", aucs={"min_k_40": 0.6})
        assert aggregate("tofu", examples, {}, reference)[0]["privleak"].value == pytest.approx(
            100 * (0.6 - 0.75) / 0.4
        )
        assert aggregate("tofu", examples, {}, None)[0]["privleak"].value is None
        legacy, _ = aggregate("tofu", examples, {}, None, legacy=True)
        assert legacy["privleak"].value == pytest.approx(-50), "against .5, as open-unlearning falls back"
        certain = RetainReference("r", aucs={"min_k_40": 1.0})
        assert "is 1" in aggregate("tofu", examples, {}, certain)[0]["privleak"].reason

    def test_forget_quality_says_what_is_missing(self):
        examples, reference = {"forget": [{"truth_ratio": 1.0}, {"truth_ratio": 2.0}]}, RetainReference("r", [1.0, 2.0])
        assert forget_quality(examples, reference)[0].value == 1.0
        assert "--retain_reference" in forget_quality(examples, None)[0].reason
        assert "no paraphrased" in forget_quality({"forget": [{}]}, reference)[1].reason
        assert "r has no truth ratios" in forget_quality(examples, RetainReference("r"))[0].reason
        assert "not finite" in forget_quality({"forget": [{"truth_ratio": math.inf}]}, reference)[0].reason

    def test_a_reference_of_which_a_ratio_is_null(self):
        """results.json holds null where a number was not finite."""
        quality, statistic = forget_quality({"forget": [{"truth_ratio": 1.0}] * 3}, RetainReference("r", [1.0, None]))
        assert quality.value is statistic.value is None and "not finite" in quality.reason

    def test_overall_by_hand(self):
        """Memorization HM(.5, .75, .5, .5), privacy HM(1 - .2/.6 four times), utility HM(.6, 1)."""
        row = {
            "extraction_strength": 0.5,
            "exact_memorization": 0.25,
            "paraphrase_probability": 0.5,
            "truth_ratio": 1.0,
        }
        examples = {"forget": [{**row, "gibberish_share": 0.0}] * 2}
        found = {"model_utility": Metric(0.6, None, 9), "loss/auc": Metric(0.8, None, 4)}
        reference = RetainReference("r", aucs=dict.fromkeys(ATTACKS, 0.6))
        made = overall(found, examples, dict.fromkeys(ATTACKS, 0.8), reference)
        parts = [4 / (3 / 0.5 + 1 / 0.75), 1 - 0.2 / 0.6, 2 / (1 / 0.6 + 1)]
        assert [made[f"overall/{name}"].value for name in ("memorization", "privacy", "utility")] == pytest.approx(
            parts
        )
        assert made["overall"].value == pytest.approx(metrics.harmonic_mean(parts))
        without = overall(found, examples, dict.fromkeys(ATTACKS, 0.8), None)
        assert without["overall"].value is None and without["overall"].reason.startswith(
            "privacy: no --retain_reference"
        )

    def test_distance_to_approximate_weighs_tokens(self):
        forget = [{"nll": 1.0, "tokens": 3, "token_accuracy": 0.5}, {"nll": 3.0, "tokens": 1, "token_accuracy": 0.1}]
        examples = {"forget": forget, "approximate": [{"nll": 2.0, "tokens": 9, "token_accuracy": 0.3}]}
        found = distance_to_approximate(examples, {})
        assert found["forget_to_approximate/nll"].value == pytest.approx(0.5)
        assert found["forget_to_approximate/token_accuracy"].value == pytest.approx(0.1)
        assert found["forget_to_approximate/perplexity"].value == pytest.approx(math.exp(2) - math.exp(1.5))
        missing = distance_to_approximate({"forget": forget}, {"approximate": "gone"})
        assert {metric.reason for metric in missing.values()} == {"gone"}
