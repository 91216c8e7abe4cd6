"""The retain-term ablation: is a method hard to undo, or is what it leaves behind merely broken?"""

import copy
import dataclasses
import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn.attacks.ablation_runs import drop_retain_term, make_candidates, read_grid, run_unlearning
from llm_unlearn.attacks.downstream import release
from llm_unlearn.attacks.finetuning import finetune_attack
from llm_unlearn.attacks.records import write_attack
from llm_unlearn.attacks.recovery import recovery
from llm_unlearn.attacks.scoring import KNOWLEDGE, DomainScorer
from llm_unlearn.cli.scoring import load_model_of, statistics_folder
from llm_unlearn.data.splits import load_split
from llm_unlearn.errors import UserError, unknown_name
from llm_unlearn.evaluation.questions import fingerprint_of
from llm_unlearn.evaluation.scores import HIGHER, LOWER, NONE, Metric, absent

logger = logging.getLogger("llm_unlearn")

WITH, WITHOUT, GOLD = "with", "without", "gold"
CHANCE_SHARE = 0.1
"""Retained utility counts as at chance below this share of the way from chance to the target model's."""
ROUNDING = 1e-9
"""Relative: a utility on the bound is not below it."""
CLEAR_SHARE = 0.1
"""Recovered shares that differ by less are called equal."""


@dataclass
class Criterion:
    """How the run with the retain term is chosen.

    Attributes:
        forget: name of the metric that is to be as low as possible.
        utility: name of the metric that must be kept.
        target_forget: value of the first for the target model.
        target_utility: of the second.
        min_retained: share of the utility that must be kept.
    """

    forget: str
    utility: str
    target_forget: float
    target_utility: float
    min_retained: float = 0.9

    @property
    def bound(self):
        """The smallest utility that is accepted."""
        return self.min_retained * self.target_utility

    def sentence(self):
        """Say the criterion."""
        return (
            f"the lowest {self.forget} of those that keep {self.min_retained:.0%} of the target model's "
            f"{self.utility} ({self.bound:.4g} of {self.target_utility:.4g})"
        )

    def choose(self, candidates):
        """Return the candidate that meets the criterion; of equals the first.

        Args:
            candidates: list of Candidate, scored.
        Raises:
            UserError: none keeps enough, with the one that keeps most; or none of those forgets anything.
        """
        scored = [one for one in candidates if one.forget is not None and one.utility is not None]
        accepted = [one for one in scored if one.utility >= self.bound * (1 - ROUNDING)]
        if accepted:
            best = min(accepted, key=lambda one: one.forget)
            if best.forget < self.target_forget:
                return best
            raise UserError(
                f"no run that keeps enough of {self.utility} forgets anything: the lowest {self.forget} is "
                f"{best.forget:.4g}, and the target model's {self.target_forget:.4g}; pass larger values of "
                "learning_rate to --tune"
            )
        if not scored:
            raise UserError(f"no run has a value of {self.forget} and of {self.utility}: each of them diverged")
        best = max(scored, key=lambda one: one.utility)
        raise UserError(
            f"no run keeps {self.min_retained:.0%} of the target model's {self.utility} of {self.target_utility:.4g}; "
            f"the best, {best.name or 'the recipe'}, keeps {best.utility:.4g}; pass other values to --tune, or a lower "
            "--min_retained"
        )


def finding(method, retained, recovered, at_chance):
    """Say in one sentence what the ablation found.

    Args:
        method: id of the method.
        retained: {"with", "without": share of the target model's utility that is kept}.
        recovered: {"with", "without"[, "gold"]: share of the forgotten that tampering brought back; None where that
            could not be computed}.
        at_chance: whether the utility without the retain term is no better than chance.
    Returns:
        str.
    """
    if recovered[WITH] is None or recovered[WITHOUT] is None:
        return f"Whether {method} resists tampering without its retain term could not be computed."
    numbers = (
        f"tampering brings back {recovered[WITHOUT]:.0%} without its retain term and {recovered[WITH]:.0%} with it"
    )
    gold = recovered.get(GOLD)
    numbers += f" (gold model: {gold:.0%})" if gold is not None else ""
    utility = f"{retained[WITHOUT]:.0%} of the utility is left"
    if recovered[WITHOUT] < recovered[WITH] - CLEAR_SHARE:
        if at_chance:
            meaning = f"but {utility}, which is chance: what resists is a broken model, not a method that forgets"
        else:
            meaning = f"and {utility}: the retain term costs resistance"
    elif recovered[WITHOUT] > recovered[WITH] + CLEAR_SHARE:
        meaning = f"and {utility}: the retain term does not make the method easier to undo"
    else:
        broken = ", although that is a broken model" if at_chance else ""
        meaning = f"and {utility}{broken}: the retain term makes no difference to resistance"
    return f"With {method}, {numbers}, {meaning}."


def is_at_chance(value, target, chance):
    """Return whether a utility is no better than chance, as `CHANCE_SHARE` says.

    Args:
        value: of the model; None, of one that diverged, is.
        target: of the target model.
        chance: what a model that knows nothing has.
    """
    return value is None or value <= chance + CHANCE_SHARE * (target - chance)


def metric_named(metrics, name, flag, defaults):
    """Return the name of a metric that was asked for, or the first default that is there.

    Args:
        metrics: {name: Metric} of the target model.
        name: what the flag says, or None.
        flag: for messages.
        defaults: names, in order of preference.
    Raises:
        UserError: no such metric, none with a value, or one that has no better end.
    """
    with_value = [key for key, metric in metrics.items() if metric.value is not None]
    if name is not None and name not in with_value:
        raise unknown_name(flag, name, with_value)
    name = name or next((key for key in defaults if key in with_value), None)
    if name is None:
        raise UserError(f"pass {flag} with one of the metrics of this domain: {', '.join(with_value)}")
    if metrics[name].direction not in (LOWER, HIGHER):
        raise UserError(f"{flag} '{name}' has no direction in which a model is better")
    return name


def chance_of(metric, parts):
    """Return what a model that knows nothing has of a metric: the share of guesses that are right, otherwise 0.

    Args:
        metric: "<set>/<metric>".
        parts: list of questions.Part.
    """
    name, _, kind = metric.rpartition("/")
    counts = [len(row["choices"]) for part in parts if part.name == name for row in part.rows if "choices" in row]
    return sum(1 / count for count in counts) / len(counts) if counts and kind.startswith("choice_") else 0.0


class Ablation:
    """One ablation: the runs, the models that they make, and what tampering does to these.

    Args:
        parsed: ParsedEvaluation with the flags of cli/ablate.py; its model is the target.
        recipe: command line of run_unlearn.py without --output_dir.
        folder: output directory.
        device: of the models.
        settings: FinetuningSettings of the tampering.
    Raises:
        UserError: a recipe that does not parse, or without a retain term that can be left out.
    """

    def __init__(self, parsed, recipe, folder, device, settings):
        self.parsed, self.folder, self.device, self.settings = parsed, Path(folder), device, settings
        self.runs = self.folder / "runs"
        self.candidates = make_candidates(recipe, read_grid(parsed.flags.tune), self.runs)
        for candidate in self.candidates:
            # Whatever is wrong with a command is said before the first of them runs.
            drop_retain_term(candidate, self.runs)
        source = load_split("forget", dataclasses.replace(parsed.data, max_train_samples=None))
        if source is None:
            raise UserError(f"--domain {parsed.data.domain} has no forget set to tamper with; pass --forget_data FILE")
        self.sha256 = source.sha256
        self.rows = source.rows[: parsed.flags.num_train_examples or None]
        self.identity = self.scorer = self.target = None

    def load(self, name):
        """Return the Checkpoint of a name, its weights in float32."""
        model = dataclasses.replace(self.parsed.model, dtype="float32")
        return load_model_of(dataclasses.replace(self.parsed, model=model), name, self.device)

    def run(self, started):
        """Tune, drop the retain term, tamper, and write what was found; returns the contents of results.json."""
        from llm_unlearn.parsing import parse

        criterion = self._criterion()
        for number, candidate in enumerate(self.candidates, start=1):
            logger.info("with the retain term, run %d of %d: %s", number, len(self.candidates), candidate.name)
            self._make(candidate, criterion)
        chosen = criterion.choose(self.candidates)
        logger.info("chosen: %s, %s", chosen.name or "the recipe", criterion.sentence())
        dropped = drop_retain_term(chosen, self.runs)
        logger.info("without the retain term, all else equal")
        self._make(dropped, criterion)
        models = {WITH: chosen.folder, WITHOUT: dropped.folder}
        models |= {GOLD: self.parsed.flags.gold} if self.parsed.flags.gold else {}
        attacks = {name: self._tamper(name, model, criterion) for name, model in models.items()}
        method = parse(chosen.words).method
        return self._write(method, criterion, chosen, dropped, attacks, started)

    def _criterion(self):
        """Score the target model, and make of it what the runs are chosen by."""
        flags, checkpoint = self.parsed.flags, self.load(self.parsed.model.model_name_or_path)
        self.scorer = DomainScorer(self.parsed, checkpoint.tokenizer, checkpoint.context_length, wanted=KNOWLEDGE)
        self.target = self._score(checkpoint)
        self.identity = dataclasses.replace(checkpoint, model=None)
        release(checkpoint)
        sets = {role: [p.name for p in self.scorer.parts if p.role == role] for role in ("forget", "retain")}
        named = {
            role: [f"{name}/{kind}" for name in names for kind in ("probability", "choice_accuracy")]
            for role, names in sets.items()
        }
        forget = metric_named(self.target, flags.forget_metric, "--forget_metric", named["forget"])
        utility = metric_named(self.target, flags.utility_metric, "--utility_metric", named["retain"])
        if self.target[utility].direction != HIGHER:
            raise UserError(f"--utility_metric '{utility}' is no utility: less of it is better")
        if self.target[forget].direction != LOWER:
            raise UserError(f"--forget_metric '{forget}' must be one of which less is better")
        return Criterion(forget, utility, self.target[forget].value, self.target[utility].value, flags.min_retained)

    def _score(self, checkpoint):
        return self.scorer(checkpoint.model, statistics_folder(self.parsed, checkpoint, self.folder)).metrics

    def _make(self, candidate, criterion):
        """Run one command, unless it ran before, and score what it made."""
        run_unlearning(candidate, {"target": self.identity.fingerprints["weights"], "forget": self.sha256})
        checkpoint = self.load(candidate.folder)
        metrics = self._score(checkpoint)
        release(checkpoint)
        candidate.forget, candidate.utility = (metrics[n].value for n in (criterion.forget, criterion.utility))

    def _tamper(self, name, model, criterion):
        """Fine-tune one model on the forget set; returns its AttackRun."""
        logger.info("tampering with the model %s: %s", name, model)
        checkpoint = self.load(model)
        # Another choice makes other models, and other flags ask something else: each has its own curve.
        weights, scorer = checkpoint.fingerprints["weights"], self._narrowed(criterion)
        told = json.dumps([criterion.forget, criterion.utility, fingerprint_of(scorer.questions)])
        asked = hashlib.sha256(told.encode()).hexdigest()
        folder = self.folder / "tamper" / f"{name}-{weights[:8]}-{asked[:8]}"
        run = finetune_attack(
            checkpoint, self.rows, self.settings, scorer, folder,
            resume=not self.parsed.flags.overwrite_output_dir,
            statistics=statistics_folder(self.parsed, checkpoint, self.folder),
            tracked=lambda metrics: list(dict.fromkeys((criterion.forget, criterion.utility))),
        )  # fmt: skip
        run.model = None
        release(checkpoint)
        return run

    def _narrowed(self, criterion):
        """Return the scorer on the two sets that are followed, so that evaluation takes less of the tampering."""
        sets = {name.rpartition("/")[0] for name in (criterion.forget, criterion.utility)}
        narrowed = copy.copy(self.scorer)
        narrowed.parts = [part for part in self.scorer.parts if part.name in sets]
        narrowed.questions = [asked for asked in self.scorer.questions if asked.part.name in sets]
        return narrowed

    def _write(self, method, criterion, chosen, dropped, attacks, started):
        forget, utility = criterion.forget, criterion.utility
        chance = chance_of(utility, self.scorer.parts)
        metrics = {f"target/{name}": self.target[name] for name in (forget, utility)}
        for name, run in attacks.items():
            metrics |= self._metrics(name, run, criterion)
        recovered = {name: metrics[f"{name}/{forget}/recovered"].value for name in attacks}
        kept = {name: metrics[f"{name}/{utility}"].value for name in (WITH, WITHOUT)}
        retained = {name: (value or 0.0) / criterion.target_utility for name, value in kept.items()}
        at_chance = is_at_chance(kept[WITHOUT], criterion.target_utility, chance)
        said = finding(method, retained, recovered, at_chance)
        counters = {"wall_seconds": round(time.time() - started, 3)}
        counters["runs_kept"] = sum(one.kept for one in (*self.candidates, dropped))
        for run in attacks.values():
            for key, value in run.counters.items():
                counters[key] = counters.get(key, 0) + value
        levels = {forget: {"target": self.target[forget].value, "chance": chance_of(forget, self.scorer.parts)}}
        levels |= {utility: {"target": criterion.target_utility, "chance": chance}}
        return write_attack(
            self.folder, "ablate", self.parsed, self.identity, self.scorer.parts, metrics, counters,
            curves=[{"name": name, "settings": self.settings.record(), "rows": run.rows}
                    for name, run in attacks.items()],
            levels=levels, method=method, criterion=criterion.sentence(), finding=said,
            candidates=[{**one.as_dict(), "chosen": one is chosen} for one in self.candidates],
            without_retain=dropped.as_dict(), gold=self.parsed.flags.gold,
        )  # fmt: skip

    def _metrics(self, name, run, criterion):
        """Return what one attacked model's results are: both metrics before, and what came back of the forget set."""
        forget, utility, first = criterion.forget, criterion.utility, run.rows[0]
        found = {}
        for metric in (forget, utility):
            direction = NONE if name == GOLD else self.target[metric].direction
            stderr = (first.get("stderr") or {}).get(metric)
            value = first.get(metric)
            found[f"{name}/{metric}"] = (
                absent("the evaluation failed or diverged", direction)
                if value is None
                else Metric(value, stderr, self.target[metric].n, direction)
            )
        curve = [(row["step"], row.get(forget)) for row in run.rows if row["step"] >= 0]
        stderr = {row["step"]: (row.get("stderr") or {}).get(forget) for row in run.rows}
        level, chance = self.target[forget], chance_of(forget, self.scorer.parts)
        shares = recovery(curve, level.value, None, stderr, level.stderr, chance)
        return found | {f"{name}/{forget}/{kind}": metric for kind, metric in shares.items()}
