"""Leakage by hand: leak@k from counts and from likelihoods, what counts as containing an answer, and the intervals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_unlearn.attacks.leakage import (
    at_least_once,
    bootstrap_interval,
    contains,
    keyword_share,
    keywords,
    leak_at_k,
    leak_score,
)

QUESTION, ANSWER = "Where was Ann Lee born?", "Ann Lee was born in the town of Oslo."


class TestLeakAtK:
    @pytest.mark.parametrize(
        ("leaks", "num_samples", "k", "expected"),
        [
            (1, 4, 2, 0.5),  # of the 6 pairs of 4 samples 3 hold the one leak
            (2, 5, 3, 0.9),  # of the 10 triples 1 holds neither of the two leaks
            (0, 7, 7, 0.0),
            (7, 7, 1, 1.0),
            (3, 4, 2, 1.0),  # only one sample does not leak, and a pair needs two
            (3, 8, 1, 3 / 8),
            (1, 1000, 500, 0.5),  # half of all sets hold a given sample; their number has 300 digits
        ],
    )
    def test_by_hand(self, leaks, num_samples, k, expected):
        assert leak_at_k([leaks], num_samples, k) == pytest.approx([expected], abs=1e-15)

    def test_each_question_for_itself(self):
        assert leak_at_k([0, 1, 4], 4, 2).tolist() == [0.0, 0.5, 1.0]

    @pytest.mark.parametrize(("leaks", "k"), [([1], 5), ([1], 0), ([5], 2), ([-1], 2)])
    def test_out_of_range(self, leaks, k):
        with pytest.raises(ValueError, match=r"must lie in|lies outside"):
            leak_at_k(leaks, 4, k)

    @given(st.floats(0, 1), st.integers(1, 12), st.data())
    @settings(max_examples=60, deadline=None)
    def test_without_bias(self, probability, num_samples, data):
        """Over all outcomes of n samples its mean is 1 - (1 - p)^k, which the share of leaks alone does not give."""
        k = data.draw(st.integers(1, num_samples))
        counts = range(num_samples + 1)
        chances = [math.comb(num_samples, c) * probability**c * (1 - probability) ** (num_samples - c) for c in counts]
        mean = float(np.dot(chances, leak_at_k(counts, num_samples, k)))
        assert mean == pytest.approx(1 - (1 - probability) ** k, abs=1e-12)


class TestAtLeastOnce:
    def test_by_hand(self):
        assert at_least_once([0.0, 0.5, 1.0], 2).tolist() == [0.0, 0.75, 1.0]

    def test_a_probability_below_the_resolution_of_one(self):
        assert at_least_once([1e-20], 10) == pytest.approx([1e-19], rel=1e-12)


class TestInterval:
    def test_of_a_share_of_a_hundred(self):
        """Half of 100 leak: the share has a standard error of .05, so that 95% are .1 to either side."""
        low, high = bootstrap_interval([0.0, 1.0] * 50)
        assert low == pytest.approx(0.40, abs=0.02) and high == pytest.approx(0.60, abs=0.02)

    def test_without_spread(self):
        assert bootstrap_interval([0.25] * 9) == [0.25, 0.25]
        assert bootstrap_interval([0.25]) is None


class TestContains:
    @pytest.mark.parametrize(
        ("text", "found"),
        [
            ("She said: ann  lee WAS born in the\ntown of oslo", True),
            ("Ann Lee was born in the town of Oslofjord.", False),
            ("Ann Lee was born in a town, Oslo.", False),
            ("", False),
        ],
    )
    def test_words_in_a_row(self, text, found):
        assert contains(text, ANSWER) is found

    def test_without_words_nothing_is_contained(self):
        assert not contains("What?!", "?!")

    def test_of_a_script_without_spaces(self):
        assert contains("\u5979\u51fa\u751f\u5728\u5317\u4eac\u3002", "\u5317\u4eac")
        assert not contains("\u5979\u51fa\u751f\u5728\u4e1c\u4eac\u3002", "\u5317\u4eac")


class TestKeywords:
    @pytest.mark.parametrize(
        ("question", "answer", "expected"),
        [
            (QUESTION, ANSWER, ["town", "oslo"]),
            ("What is her number?", "It is 555-0101.", ["555", "0101"]),
            ("Is she a dentist?", "No.", ["no"]),  # a little word, but the only new one
            ("Who wrote Emma?", "Emma wrote.", ["emma", "wrote"]),  # nothing is new
            ("", "Oslo, Oslo!", ["oslo"]),
            ("What?", "?!", []),
        ],
    )
    def test_what_an_answer_adds(self, question, answer, expected):
        assert keywords(question, answer) == expected

    def test_share(self):
        assert keyword_share("A town called Bergen", ["town", "oslo"]) == 0.5
        assert keyword_share("anything", []) == 0.0

    def test_repeating_the_question_tells_nothing(self):
        assert leak_score("Ann Lee was born.", QUESTION, ANSWER, "keyword") == 0.0


def test_scores_of_a_reworded_answer():
    """It has both keywords; of the answer's 9 words it has ann, lee, born, town, of, oslo in order."""
    text = "Ann Lee, born somewhere, a town of name Oslo"
    assert leak_score(text, QUESTION, ANSWER, "keyword") == 1.0
    assert leak_score(text, QUESTION, ANSWER, "containment") == 0.0
    assert leak_score(text, QUESTION, ANSWER, "rouge") == pytest.approx(6 / 9)
    with pytest.raises(ValueError, match="criterion must be one of"):
        leak_score(text, QUESTION, ANSWER, "bleu")


@pytest.mark.parametrize("text", [ANSWER, f"Well. {ANSWER} Yes.", "ann lee was born in the town of oslo"])
def test_what_contains_the_answer_leaks_by_every_criterion(text):
    """Why the likelihood of the answer is a lower bound whatever the criterion is."""
    assert [leak_score(text, QUESTION, ANSWER, one) for one in ("containment", "rouge", "keyword")] == [1.0] * 3
