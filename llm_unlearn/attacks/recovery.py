"""How much of what was unlearned an attack brings back, read off the curve of a metric over its steps."""
# A curve is a list of (step, value or None), by step from 0; None is an evaluation that failed.

import itertools
import math

from llm_unlearn.evaluation.scores import HIGHER, LOWER, Metric, absent

TRACKED = ("probability", "token_accuracy", "choice_accuracy", "choice_probability")
"""Metrics of a set that an attack is followed by: 1 is full knowledge, and one forward of each row gives them."""
LEAST_KNOWN = 0.01
"""By how much a target must lie above chance to know something."""
NO_TARGET = "no --target_model was given, so that there is no level to measure the recovery against"


def tracked_metrics(metrics):
    """Return the names of the metrics that an attack is followed by.

    Args:
        metrics: {"<set>/<metric>": scores.Metric} of a model.
    """
    return [name for name, metric in metrics.items() if name.rpartition("/")[2] in TRACKED and metric.value is not None]


def recovered_share(value, start, target):
    """Return which share of what was lost is back: 0 as after unlearning, 1 as in the target model.

        (value - start) / (target - start)

    It is not clipped: an attack can take more away, or teach more than the target knew. Where nothing had been lost
    (start >= target) all of it is there already, whatever comes after: 1.

    Args:
        value: of the metric now.
        start: before the attack.
        target: of the model before it unlearned.
    """
    return 1.0 if start >= target else (value - start) / (target - start)


def mean_over_steps(curve, until=None):
    """Return the area under a curve divided by its steps: trapezoids between the evaluations that succeeded.

    Args:
        curve: [(step, value or None)].
        until: step up to which the last value is held, for an attack that ended before its plan; None: the last one.
    Returns:
        float; None where fewer than two points are there, which span no step.
    """
    points = _known(curve)
    if points and until is not None and until > points[-1][0]:
        points.append((until, points[-1][1]))
    if len(points) < 2:
        return None
    pairs = itertools.pairwise(points)
    area = sum((after - before) * (low + high) / 2 for (before, low), (after, high) in pairs)
    return area / (points[-1][0] - points[0][0])


def steps_to(curve, level):
    """Return the step at which a curve first reaches a level, on the line between two evaluations; None if it does not.

    Args:
        curve: [(step, value or None)].
        level: value to reach.
    """
    before = None
    for step, value in _known(curve):
        if value >= level:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (level - before[1]) / (value - before[1])
        before = step, value
    return None


def unmeasurable(start, target, start_stderr=None, target_stderr=None, chance=None):
    """Return why no share of a loss can be told, or None where it can.

    A loss as large as its own noise divides noise by noise, and what the target never knew cannot come back. A model
    that knew no less than a target which knows something is neither: nothing was lost, see `recovered_share`.

    Args:
        start: value before the attack; None where that evaluation failed.
        target: of the target model; None where there is none.
        start_stderr: standard error, or None.
        target_stderr: the same of the target.
        chance: value of guessing; None: 0.
    """
    if target is None or start is None:
        return NO_TARGET if target is None else "the evaluation before the attack failed"
    floor = (chance or 0.0) + max(LEAST_KNOWN, 2 * (target_stderr or 0.0) if chance else 0.0)
    if target <= floor:
        return f"the target model does not know it ({target:.3g}), so that nothing could come back"
    noise = 2 * math.hypot(start_stderr or 0.0, target_stderr or 0.0)
    if 0 < target - start <= noise:
        return f"too little was lost to tell ({target:.4g} before, {start:.4g} after: within two standard errors)"
    return None


def recovery(curve, target=None, until=None, stderr=None, target_stderr=None, chance=None):
    """Return what an attack recovered of one metric of the forget set.

    Args:
        curve: [(step, value or None)], the first at step 0, before the attack.
        target: value of the target model; None where it is not known.
        until: planned last step of an attack that ended early because it had recovered enough.
        stderr: {step: standard error of the value}.
        target_stderr: of the target's value, or None.
        chance: value of guessing, or None.
    Returns:
        {"recovery_area", "steps_to_half", "recovered", "best", "area": Metric}: mean recovered share over the attack;
        steps until half was back; share at its end; highest value; mean value over the attack, which needs no target.
    """
    points, start = _known(curve), curve[0][1] if curve else None
    best = max(points, key=lambda point: point[1], default=None)
    raw, reason = mean_over_steps(curve, until), "the attack has no two evaluations that succeeded"
    found = {
        "best": absent("every evaluation failed", LOWER)
        if best is None
        else Metric(best[1], (stderr or {}).get(best[0]), len(points), LOWER),
        "area": absent(reason, LOWER) if raw is None else Metric(raw, None, len(points), LOWER),
    }
    reason = unmeasurable(start, target, (stderr or {}).get(0), target_stderr, chance)
    if reason is not None:
        shares = {"recovery_area": LOWER, "steps_to_half": HIGHER, "recovered": LOWER}
        return {**{name: absent(reason, direction) for name, direction in shares.items()}, **found}
    return {**_shares(curve, start, target, until), **found}


def _shares(curve, start, target, until):
    shares = [(step, None if value is None else recovered_share(value, start, target)) for step, value in curve]
    mean, half = mean_over_steps(shares, until), steps_to(shares, 0.5)
    count, last = len(_known(curve)), shares[-1]
    known = f"it knew {start:.4g} before the attack, no less than the target's {target:.4g}: nothing had been lost"
    note = known if start >= target else None
    return {
        "recovery_area": absent("the attack has no two evaluations that succeeded", LOWER)
        if mean is None
        else Metric(mean, None, count, LOWER, note),
        "steps_to_half": absent(f"not reached in {last[0]} steps", HIGHER)
        if half is None
        else Metric(half, None, count, HIGHER, note),
        "recovered": absent("the last evaluation failed", LOWER)
        if last[1] is None
        else Metric(last[1], None, count, LOWER, note),
    }


def strongest(found):
    """Return which attack of several recovers most: by its mean recovered share, without a target by its mean value.

    Args:
        found: {name: what `recovery` returned for the same metric}.
    Returns:
        name, the first of those that tie; one whose numbers are null is taken only where there is no other.
    """

    for what in ("recovery_area", "area", "best"):
        known = {name: parts[what].value for name, parts in found.items() if parts[what].value is not None}
        if known:
            return max(known, key=known.get)
    return next(iter(found))


def _known(curve):
    return [(step, value) for step, value in curve if value is not None]
