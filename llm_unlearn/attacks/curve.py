"""The evaluations of an attack while it trains: when they are due, what they say, and what they cost."""

import logging
import time

logger = logging.getLogger("llm_unlearn")

LARGEST_EVALUATION_SHARE = 0.25
"""Of an attack's time; above it a warning says how to evaluate less."""


class Curve:
    """The evaluations of an attack: when they are due, what they say, and what they cost.

    Attributes:
        state: AttackState.
        offset: added to the optimizer step of the phase that runs; negative in the repair.
        last: last step of that phase.

    Args:
        state: AttackState.
        folder: of the attack.
        scorer: see `finetuning.finetune_attack`, as are all others.
    """

    def __init__(self, state, folder, scorer, settings, evaluate_at, stop_when, statistics, tracked):
        self.state, self.folder, self.scorer, self.settings = state, folder, scorer, settings
        self.evaluate_at, self.stop_when, self.tracked = evaluate_at, stop_when, tracked
        # Under autocast the evaluator's answers in float32 would be the one point that is not comparable.
        self.statistics = None if settings.autocast else statistics
        self.offset, self.last = 0, None
        self._since = time.monotonic()

    def is_due(self, step):
        """Return whether the phase that runs is evaluated at an optimizer step of it."""
        if step in (0, self.last):
            return True
        if self.evaluate_at is not None and not self.offset:
            return step in self.evaluate_at
        return step % self.settings.eval_every == 0

    def evaluate(self, trainer, step):
        """Score the model at a step, unless its row is there already; all processes call together.

        What an evaluation raises becomes nulls; the attack goes on.
        """
        place = step + self.offset
        # The repair ends where the attack begins, which evaluates there.
        if self.state.has(place) or (self.offset and place == 0):
            return
        started, metrics, error = time.monotonic(), None, None
        unchanged = step == 0 and (self.offset or not any(row["step"] < 0 for row in self.state.rows))
        try:
            model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
            with trainer.accelerator.autocast():
                found = self.scorer(model, self.statistics if unchanged else None).metrics
            metrics = {name: found[name] for name in self.state.names or self.tracked(found)}
        except Exception as failure:  # whatever went wrong, the attack is worth more than one of its points
            error = f"{type(failure).__name__}: {failure}"
            logger.exception("the evaluation at step %d failed; its row is null, and the attack goes on", place)
        self.state.add(place, metrics, error, "repair" if self.offset else None)
        self.state.evaluation_seconds += time.monotonic() - started
        self.state.optimizer_steps = max(0, place)
        self.write()
        self._say(place, metrics or {})

    def stops(self):
        """Return whether the attack ends here, and write down why."""
        if not self.offset and self.stop_when is not None and not self.state.ended:
            self.state.ended = self.stop_when(self.state.full_rows())
            self.state.stopped = bool(self.state.ended)
        return bool(self.state.ended)

    def write(self):
        """Write the state, with the seconds until now."""
        now = time.monotonic()
        self.state.seconds, self._since = self.state.seconds + now - self._since, now
        self.state.write(self.folder)

    def _say(self, place, metrics):
        shown = ", ".join(f"{name} {metric.value:.4g}" for name, metric in metrics.items() if metric.value is not None)
        logger.info("%sstep %d: %s", "repair, " if self.offset else "", place, shown or "not evaluated")


def say_cost(state):
    """Log what an attack cost, and warn where its evaluations took too much of that."""
    share = state.evaluation_seconds / max(state.seconds, 1e-9)
    logger.info(
        "the attack took %.1f s, %.1f s (%.0f%%) of it evaluation",
        state.seconds, state.evaluation_seconds, 100 * share,
    )  # fmt: skip
    if share > LARGEST_EVALUATION_SHARE:
        logger.warning(
            "evaluation took %.0f%% of the attack's time, more than %.0f%%; pass a larger --eval_every, or a smaller "
            "--max_eval_samples", 100 * share, 100 * LARGEST_EVALUATION_SHARE,
        )  # fmt: skip
