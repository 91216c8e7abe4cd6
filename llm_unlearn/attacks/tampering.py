"""Attack a checkpoint by fine-tuning, once for every configuration of a sweep, and say what came back."""

import dataclasses
import gc
import logging
from pathlib import Path

from accelerate import PartialState

from llm_unlearn.attacks.attack_data import load_attack_data
from llm_unlearn.attacks.curve_files import curve_path, draw_curves, first_stamp, metric_names, preferred
from llm_unlearn.attacks.finetuning import check_precision, finetune_attack
from llm_unlearn.attacks.records import write_attack
from llm_unlearn.attacks.recovery import recovered_share, recovery, strongest, tracked_metrics
from llm_unlearn.attacks.scoring import KNOWLEDGE, DomainScorer
from llm_unlearn.attacks.sweeps import with_changes
from llm_unlearn.attacks.training_flags import finetuning_settings
from llm_unlearn.cli.scoring import load_model_of, statistics_folder
from llm_unlearn.data.rows import fingerprint
from llm_unlearn.data.sources import HubOptions, load_source
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.questions import Part, fingerprint_of
from llm_unlearn.evaluation.results import finite, write_json
from llm_unlearn.processes import is_first_process

logger = logging.getLogger("llm_unlearn")

UTILITY = "utility"
LEAST_ROWS = 32
"""Rows of a set that are followed whatever they cost: fewer say too little."""


class Tampering:
    """The attacks of one command on one checkpoint.

    Attributes:
        scorer: DomainScorer of the sets that should be forgotten or kept.
        checkpoint: the attacked model, loaded anew for each configuration.
        levels: {metric: {"target", "chance"}}.
        forget: names of the metrics that a better unlearning lowers; utility: of those that it keeps up.

    Args:
        parsed: ParsedEvaluation whose flags are TamperFlags.
        kind: "tamper" or "relearn".
        configurations: list of sweeps.Configuration.
        folder: output directory.
        device: where models go.
    Raises:
        UserError: whatever is wrong with the model, the data or the flags, before any training.
    """

    def __init__(self, parsed, kind, configurations, folder, device):
        self.parsed, self.kind, self.configurations = parsed, kind, configurations
        self.folder, self.device = Path(folder), device
        self.levels, self.forget, self.utility = {}, [], []
        for one in configurations:
            check_precision(finetuning_settings(with_changes(parsed, one)))
        self._is_changed = False
        self.checkpoint = self._load(parsed.model.model_name_or_path)
        self.scorer = self._make_scorer()
        # Every set is read before the first step, so that a missing one costs no attack.
        self.options = parsed.flags.tokenize_options(self.checkpoint.context_length)
        self._data = {one.name: self._sequences(one) for one in configurations}
        self._bound_evaluation()
        flags = parsed.flags
        self._repair = self._named(flags.repair_data, "--repair_data").rows if self._repairs() else None

    def measure_target(self):
        """Find the levels that recovery is measured against, and which metrics there are to follow."""
        name = self.parsed.flags.target_model
        if name is not None:
            logger.info("scoring the target model %s", name)
            self._release()
            target = self._load(name)
            if target.tokenizer.get_vocab() != self.scorer.tokenizer.get_vocab():
                raise UserError(
                    f"--target_model '{name}' has another vocabulary than the model, so that their answers cannot be "
                    "compared"
                )
            found = self.scorer(target.model, statistics_folder(self.parsed, target, self.folder)).metrics
            self._sort(tracked_metrics(found))
            for metric in tracked_metrics(found):
                self.levels[metric] = {"target": found[metric].value, "stderr": found[metric].stderr}
            del target
            gc.collect()

    def run(self):
        """Attack with every configuration, and write all files; returns the contents of results.json."""
        runs = {}
        for number, configuration in enumerate(self.configurations, start=1):
            logger.info("attack %d of %d: %s", number, len(self.configurations), configuration.name)
            run = runs[configuration.name] = self._attack(configuration)
            self._sort(metric_names(run.rows))
            self._write_curve(configuration, run)
        return self._summarize(runs)

    # ---- One attack ----

    def _attack(self, configuration):
        own = with_changes(self.parsed, configuration)
        flags, data = own.flags, self._data[configuration.name]
        checkpoint = self._afresh()
        run = finetune_attack(
            checkpoint, data.rows, finetuning_settings(own), self._score, self.folder / configuration.folder,
            repair_rows=self._repair, repair_steps=flags.repair_steps,
            stop_when=self._enough if flags.stop_at_recovery else None, resume=flags.resume,
            statistics=statistics_folder(self.parsed, checkpoint, self.folder),
            asked=fingerprint_of(self.scorer.questions),
        )  # fmt: skip
        self._is_changed = run.model is not None
        # The weights of one attack make room for the next.
        return dataclasses.replace(run, model=None)

    def _score(self, model, folder=None):
        found = self.scorer(model, folder)
        self._sort(tracked_metrics(found.metrics))
        return found

    def _sort(self, names):
        """Find out once which metrics are of what should be forgotten, and which of what should be kept."""
        if not self.forget:
            roles = {part.name: part.role for part in self.scorer.parts}
            self.forget = [name for name in names if roles.get(name.rpartition("/")[0]) == "forget"]
            self.utility = [name for name in names if roles.get(name.rpartition("/")[0]) == "retain"]

    def _enough(self, rows):
        """Return why the attack can end: the followed metric has regained the wanted share of what was lost."""
        metric, wanted = preferred(self.forget), self.parsed.flags.stop_at_recovery
        start = next((row.get(metric) for row in rows if row["step"] == 0), None)
        value, target = rows[-1].get(metric), (self.levels.get(metric) or {}).get("target")
        if None in (start, value, target):
            return None
        share = recovered_share(value, start, target)
        return f"{metric} had recovered {share:.3f} at step {rows[-1]['step']}" if share >= wanted else None

    # ---- What is written ----

    def _write_curve(self, configuration, run):
        if not is_first_process():
            return
        folder = self.folder / configuration.folder
        write_json(curve_path(folder, run.stamp), finite(run.rows))
        if not metric_names(run.rows):
            logger.error("every evaluation of %s failed, there is nothing to draw", configuration.name)
            return
        self._draw(curve_path(folder, run.stamp).with_suffix(".png"), [self._curve(configuration, run)])

    def _draw(self, path, curves):
        title = (self.parsed.flags.title or "").replace("\\n", "\n") or None
        draw_curves(path, curves, self._all_levels(), preferred(self.forget), self._plotted_utility(), title)
        logger.info("the plot is %s", path)

    def _curve(self, configuration, run):
        own = with_changes(self.parsed, configuration)
        return {
            "name": configuration.name,
            "settings": {**finetuning_settings(own).record(), "num_train_examples": own.flags.num_train_examples},
            "rows": run.rows, "planned_steps": run.planned_steps, "ended": run.ended, "failures": run.failures,
            "counters": run.counters, "seconds": run.seconds, "evaluation_seconds": run.evaluation_seconds,
        }  # fmt: skip

    def _summarize(self, runs):
        curves = [self._curve(one, runs[one.name]) for one in self.configurations]
        found = {name: self._recovery(run) for name, run in runs.items()}
        best = self._strongest(found)
        metrics = {f"{metric}/{what}": value for metric, of in found[best].items() for what, value in of.items()}
        stamp = first_stamp(run.stamp for run in runs.values())
        if len(runs) > 1 and is_first_process() and self.forget:
            self._draw(curve_path(self.folder, stamp).with_suffix(".png"), curves)
        return write_attack(
            self.folder, self.kind, self.parsed, self.checkpoint, self.scorer.parts, metrics, _total(runs.values()),
            curves=curves, levels=self._all_levels(), strongest=best, title=self.parsed.flags.title,
            plotted={"forget": preferred(self.forget), "utility": self._plotted_utility()},
            data={name: {"origins": data.origins, "sequences": len(data.rows), "distinct": data.distinct,
                         "sha256": fingerprint(data.rows)} for name, data in self._data.items()},
            sweep={name: {metric: {what: value.value for what, value in of.items()} for metric, of in parts.items()}
                   for name, parts in found.items()},
        )  # fmt: skip

    def _recovery(self, run):
        """Return {metric of the forget set: what `recovery` says of it}."""
        found, levels = {}, self._all_levels()
        for metric in self.forget:
            rows = [row for row in run.rows if row["step"] >= 0]
            errors = {row["step"]: row.get("stderr", {}).get(metric) for row in rows}
            until, level = run.planned_steps if run.stopped else None, levels[metric]
            curve = [(row["step"], row.get(metric)) for row in rows]
            of_target = level["target"], until, errors, level["stderr"], level["chance"]
            found[metric] = recovery(curve, *of_target)
        return found

    def _strongest(self, found):
        metric = preferred(self.forget)
        if metric is None:
            return next(iter(found))
        return strongest({name: parts[metric] for name, parts in found.items()})

    def _all_levels(self):
        chances = {f"{part.name}/choice_accuracy": chance(part.rows) for part in self.scorer.parts}
        names = [*self.forget, *self.utility]
        return {
            name: {"target": None, "stderr": None, **self.levels.get(name, {}), "chance": chances.get(name)}
            for name in names
        }

    def _plotted_utility(self):
        own = [name for name in self.utility if name.startswith(f"{UTILITY}/")]
        return preferred(own or self.utility) if self.utility else None

    # ---- Models and data ----

    def _load(self, name):
        return load_model_of(self.parsed, name, self.device)

    def _afresh(self):
        """Return the attacked checkpoint as it is on disk."""
        if self._is_changed or self.checkpoint.model is None:
            self._release()
            self.checkpoint = self._load(self.parsed.model.model_name_or_path)
        return self.checkpoint

    def _release(self):
        """Free the attacked model, before another one takes its memory; what identifies it stays."""
        self.checkpoint = dataclasses.replace(self.checkpoint, model=None)
        gc.collect()

    def _make_scorer(self):
        parsed, checkpoint = self.parsed, self.checkpoint
        scorer = DomainScorer(parsed, checkpoint.tokenizer, checkpoint.context_length, wanted=KNOWLEDGE)
        if parsed.flags.utility_data:
            data = parsed.data
            hub = HubOptions(data.dataset_revision, data.cache_dir, data.token)
            source = load_source(parsed.flags.utility_data, data.max_eval_samples, hub)
            scorer.add(
                Part(UTILITY, source.rows, "retain", generates=False, origins=source.origins, sha256=source.sha256)
            )
        # What should neither be forgotten nor kept says nothing about an attack.
        scorer.parts = [part for part in scorer.parts if part.role != "other"]
        scorer.questions = [question for question in scorer.questions if question.part.role != "other"]
        if not any(part.role == "forget" for part in scorer.parts):
            raise UserError(
                f"--domain {parsed.data.domain} has no set that should be forgotten, so that nothing could come back; "
                "pass --forget_data FILE"
            )
        return scorer

    def _bound_evaluation(self):
        """Follow the first rows of each set alone where all would cost more than a quarter of the attack.

        A forward costs a third of what training on the same tokens does, so that as many tokens as are trained on
        between two evaluations are a quarter.
        """
        if self.parsed.data.max_eval_samples:
            return
        between = []
        for one in self.configurations:
            rows, own = self._data[one.name].rows, finetuning_settings(with_changes(self.parsed, one))
            trained = own.eval_every * own.batch_size * own.grad_accumulation * PartialState().num_processes
            between.append(trained * sum(len(row["input_ids"]) for row in rows) / len(rows))
        cut = self.scorer.keep_within(min(between), LEAST_ROWS)
        if cut:
            said = ", ".join(f"{name} {rows}" for name, rows in cut.items())
            logger.info("followed on the first rows alone, for the evaluations' cost: %s (--max_eval_samples)", said)

    def _sequences(self, configuration):
        flags = with_changes(self.parsed, configuration).flags
        return self._named(flags.tamper_data, "--tamper_data", flags.num_train_examples)

    def _named(self, spec, flag, count=0):
        tokenizer, benign = self.scorer.tokenizer, self.parsed.flags.benign_data
        return load_attack_data(spec, self.parsed.data, tokenizer, self.options, count, benign, flag)

    def _repairs(self):
        return any(with_changes(self.parsed, one).flags.repair_steps for one in self.configurations)


def chance(rows):
    """Return the accuracy of guessing on multiple-choice rows, or None where rows have no choices."""
    shares = [1 / len(row["choices"]) for row in rows if row.get("choices")]
    return sum(shares) / len(shares) if shares and len(shares) == len(rows) else None


def _total(runs):
    """Return the counters of all attacks together."""
    total = {"attacks": 0, "seconds": 0.0, "evaluation_seconds": 0.0}
    for run in runs:
        counts = {name: run.counters.get(name, 0) for name in run.counters if name != "sequences"}
        counts |= {"attacks": 1, "seconds": run.seconds, "evaluation_seconds": run.evaluation_seconds}
        for name, value in counts.items():
            total[name] = total.get(name, 0) + value
    return total
