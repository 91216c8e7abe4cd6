"""Coefficients that change while a run trains, as a function of how far it has come."""

from llm_unlearn.errors import UserError

CONSTANT = "constant"


def schedule_factor(schedule, progress):
    """Return the factor of a coefficient at a moment of the run.

        START:END    START + (END - START) * s,   s = step / steps, in [0, 1)
        constant     1

    EleutherAI's ramps are 0:1 for a retain coefficient that starts at nothing (0.1:1 with their `retain_warmup`, 0.25:1
    in the phases of `sequential`) and 1:0.75 for the forget coefficient.

    Args:
        schedule: str.
        progress: s, in [0, 1]; a function of the optimizer step alone, so that every process and every resumed run has
            the same.
    Returns:
        float.
    Raises:
        UserError: see `parse_schedule`.
    Source: EleutherAI/unlearn, whose s counts calls of compute_loss and so runs faster with accumulation.
    """
    start, end = parse_schedule(schedule)
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def parse_schedule(schedule, flag="a schedule"):
    """Return (factor at the start, factor at the end).

    Args:
        schedule: "constant" or "START:END", two numbers >= 0 of which one is not 0.
        flag: what to call it in the message.
    Raises:
        UserError: anything else.
    """
    if schedule == CONSTANT:
        return 1.0, 1.0
    try:
        start, end = (float(part) for part in str(schedule).split(":"))
    except ValueError:
        start = end = -1.0
    if not (0 <= start < float("inf") and 0 <= end < float("inf") and start + end > 0):
        raise UserError(f"{flag} must be constant or START:END, two numbers >= 0 as in 0:1, but is '{schedule}'")
    return start, end
