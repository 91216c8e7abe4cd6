"""What an attack recovered, worked out by hand."""

import pytest

from llm_unlearn.attacks.recovery import (
    NO_TARGET,
    mean_over_steps,
    recovered_share,
    recovery,
    steps_to,
    strongest,
    tracked_metrics,
    unmeasurable,
)
from llm_unlearn.evaluation.scores import Metric, absent

CURVE = [(0, 0.1), (10, 0.3), (20, 0.7), (25, 0.8)]
"""With a target of .9 its shares are 0, .25, .75, .875."""


def values(found):
    return {name: metric.value for name, metric in found.items()}


def test_the_share_of_a_loss():
    assert recovered_share(0.1, 0.1, 0.9) == 0
    assert recovered_share(0.5, 0.1, 0.9) == pytest.approx(0.5)
    assert recovered_share(0.9, 0.1, 0.9) == 1
    assert recovered_share(0.98, 0.1, 0.9) == pytest.approx(1.1), "more than the target knew is not clipped"
    assert recovered_share(0.02, 0.1, 0.9) == pytest.approx(-0.1), "nor is a further loss"
    assert recovered_share(0.2, 0.9, 0.9) == recovered_share(0.2, 0.95, 0.9) == 1, "nothing had been lost"


def test_the_mean_over_the_steps():
    """(10 * .2 + 10 * .5 + 5 * .75) / 25 = 10.75 / 25."""
    assert mean_over_steps(CURVE) == pytest.approx(0.43)
    # The step that failed is bridged: (20 * .4 + 5 * .75) / 25.
    assert mean_over_steps([(0, 0.1), (10, None), (20, 0.7), (25, 0.8)]) == pytest.approx(0.47)
    # Held at .8 until 50: (10.75 + 25 * .8) / 50.
    assert mean_over_steps(CURVE, until=50) == pytest.approx(0.615)
    assert mean_over_steps([(0, 0.1)]) is None and mean_over_steps([]) is None
    assert mean_over_steps([(0, 0.4)], until=8) == pytest.approx(0.4)


def test_the_steps_to_a_level_lie_between_two_evaluations():
    assert steps_to(CURVE, 0.5) == pytest.approx(15), "half way from .3 to .7"
    assert steps_to(CURVE, 0.3) == 10 and steps_to(CURVE, 0.05) == 0
    assert steps_to(CURVE, 0.81) is None
    # Over the gap the line runs from (0, .1) to (20, .7): .5 is reached at 20 * .4 / .6.
    assert steps_to([(0, 0.1), (10, None), (20, 0.7)], 0.5) == pytest.approx(40 / 3)
    assert steps_to([(0, 0.6), (5, 0.1), (10, 0.9)], 0.5) == 0, "the first time counts"


def test_recovery_of_a_curve():
    """Shares 0, .25, .75, .875: area (10 * .125 + 10 * .5 + 5 * .8125) / 25 = 10.3125 / 25; half at step 15."""
    found = recovery(CURVE, 0.9, stderr={0: 0.01, 25: 0.02})
    assert values(found) == pytest.approx(
        {"recovery_area": 0.4125, "steps_to_half": 15, "recovered": 0.875, "best": 0.8, "area": 0.43}
    )
    assert found["best"].stderr == 0.02
    directions = {name: metric.direction for name, metric in found.items()}
    assert directions.pop("steps_to_half") == "higher" and set(directions.values()) == {"lower"}
    assert all(metric.n == 4 and metric.reason is None for metric in found.values())


def test_the_last_value_is_held_where_an_attack_could_end_early():
    """(10.3125 + 25 * .875) / 50."""
    assert recovery(CURVE, 0.9, until=50)["recovery_area"].value == pytest.approx(0.64375)


def test_half_was_not_reached():
    found = recovery([(0, 0.1), (10, 0.2), (30, 0.49)], 0.9)
    assert found["steps_to_half"] == absent("not reached in 30 steps", "higher")
    assert found["recovered"].value == pytest.approx(0.4875)


def test_without_a_target_there_is_no_share():
    found = recovery(CURVE)
    assert {name for name, value in values(found).items() if value is None} == {
        "recovery_area", "steps_to_half", "recovered"
    }  # fmt: skip
    assert found["recovered"].reason == NO_TARGET and found["steps_to_half"].direction == "higher"
    assert (found["best"].value, found["area"].value) == (0.8, pytest.approx(0.43))


def test_a_model_that_had_lost_nothing_has_recovered():
    found = recovery([(0, 0.9), (10, 0.7)], 0.9)
    assert (found["recovery_area"].value, found["steps_to_half"].value, found["recovered"].value) == (1, 0, 1)
    assert found["recovered"].reason.startswith("it knew 0.9 before the attack, no less than the target's 0.9")


def test_failed_evaluations():
    found = recovery([(0, 0.1), (10, None), (20, 0.5), (30, None)], 0.9)
    assert found["recovered"] == absent("the last evaluation failed", "lower")
    assert found["recovery_area"].value == pytest.approx(0.25) and found["steps_to_half"].value == 20
    assert found["best"].n == 2
    first = recovery([(0, None), (10, 0.3), (20, 0.5)], 0.9)
    assert first["recovered"].reason == first["recovery_area"].reason == "the evaluation before the attack failed"
    assert first["area"].value == pytest.approx(0.4)
    none = recovery([(0, None), (10, None)], 0.9)
    assert values(none) == dict.fromkeys(none) and none["best"].reason == "every evaluation failed"


def test_noise_is_not_divided_by_noise():
    """Errors of .03 and .04 make one of .05, of which the loss must be more than twice."""
    assert "within two standard errors" in unmeasurable(0.8, 0.9, 0.03, 0.04)
    assert unmeasurable(0.79, 0.9, 0.03, 0.04) is None
    assert unmeasurable(0.9, 0.9, 0.03, 0.04) is None, "nothing was lost, which is no noise"
    assert "does not know it" in unmeasurable(1e-5, 1e-4)
    assert "does not know it" in unmeasurable(0.2, 0.3, 0.0, 0.03, chance=0.25), "two errors above chance are .31"
    assert unmeasurable(0.2, 0.32, 0.0, 0.03, chance=0.25) is None
    found = recovery([(0, 3e-5), (10, 1e-5)], 3.1e-5)
    assert found["recovered"].value is None and "does not know it" in found["recovered"].reason


def test_the_strongest_attack():
    slow, fast = recovery([(0, 0.1), (10, 0.2), (20, 0.9)], 0.9), recovery([(0, 0.1), (10, 0.7), (20, 0.7)], 0.9)
    assert strongest({"slow": slow, "fast": fast}) == "fast", "by the whole attack, not by its end"
    raw = {"slow": recovery([(0, 0.1), (20, 0.3)]), "fast": recovery([(0, 0.1), (20, 0.5)])}
    assert strongest(raw) == "fast"
    failed = recovery([(0, None), (20, None)], 0.9)
    assert strongest({"failed": failed, "slow": slow}) == "slow" and strongest({"failed": failed}) == "failed"
    # Its mean value of .5 is no share, and more than the .42 of the slow one.
    started_late = recovery([(0, None), (10, 0.5), (20, 0.5)], 0.9)
    assert started_late["area"].value == 0.5 > slow["recovery_area"].value
    assert strongest({"late": started_late, "slow": slow}) == "slow"


def test_which_metrics_are_followed():
    metrics = {
        "forget/probability": Metric(0.5, 0.1, 4, "lower"),
        "forget/perplexity": Metric(9.0, 0.1, 4, "higher"),
        "mcq/choice_accuracy": Metric(0.25, 0.1, 4, "lower"),
        "holdout/probability": absent("no holdout set was given"),
    }
    assert tracked_metrics(metrics) == ["forget/probability", "mcq/choice_accuracy"]
