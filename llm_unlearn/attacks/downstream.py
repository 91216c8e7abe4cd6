"""Fine-tuning on unrelated tasks: what comes back of the forget set while a model learns something else."""

import dataclasses
import gc
import hashlib
import json
import logging
import time
from pathlib import Path

import torch
from accelerate import PartialState

from llm_unlearn.attacks.downstream_metrics import TaskRun, checkpoint_steps, limited, read_steps, run_metrics
from llm_unlearn.attacks.finetuning import finetune_attack
from llm_unlearn.attacks.records import write_attack
from llm_unlearn.attacks.recovery import tracked_metrics
from llm_unlearn.attacks.scoring import KNOWLEDGE, DomainScorer
from llm_unlearn.attacks.task_accuracy import TaskScorer
from llm_unlearn.attacks.task_vectors import ModelTensors, task_vector_cosines
from llm_unlearn.checkpoint_arithmetic import CheckpointFiles
from llm_unlearn.cli.scoring import load_model_of, statistics_folder
from llm_unlearn.data.rows import fingerprint
from llm_unlearn.data.tokenize import tokenize_rows
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.results import write_json
from llm_unlearn.processes import is_first_process

logger = logging.getLogger("llm_unlearn")

COSINES = "cosines.json"


class Downstream:
    """One run of the script: the models, what they are asked, and what each task does to them.

    Args:
        parsed: ParsedEvaluation with DownstreamFlags.
        folder: output directory.
        device: of the models.
        settings: FinetuningSettings.

    Attributes:
        checkpoint: Checkpoint of the unlearned model; its model is None once a task has changed it.
        scorer: scoring.DomainScorer.
        fingerprint: of the target model's weights, or None.
    """

    def __init__(self, parsed, folder, device, settings):
        self.parsed, self.folder, self.device, self.settings = parsed, folder, device, settings
        self.name = parsed.model.model_name_or_path
        self.checkpoint = self.load(self.name)
        checkpoint = self.checkpoint
        self.fingerprint = None
        self.scorer = DomainScorer(parsed, checkpoint.tokenizer, checkpoint.context_length, wanted=KNOWLEDGE)

    def load(self, name, device=None):
        """Return the Checkpoint of a name, its weights in float32."""
        parsed = dataclasses.replace(self.parsed, model=dataclasses.replace(self.parsed.model, dtype="float32"))
        return load_model_of(parsed, name, device or self.device)

    def run(self, tasks, started):
        """Score the models, fine-tune on each task, write everything; returns the contents of results.json."""
        target = self._target()
        before = self.scorer(self.checkpoint.model, statistics_folder(self.parsed, self.checkpoint, self.folder))
        tracked = list(tracked_metrics(before.metrics))
        identity = dataclasses.replace(self.checkpoint, model=None)
        runs = []
        for task in tasks:
            runs.append(self._finetune(task, tracked))
            release(self.checkpoint)
        counters = {}
        for run in runs:
            for key, value in run.counters.items():
                counters[key] = counters.get(key, 0) + value
        counters["wall_seconds"] = round(time.time() - started, 3)
        return write_attack(
            self.folder, "downstream", self.parsed, identity, self.scorer.parts,
            run_metrics(runs, before.metrics, tracked, self._forget_sets()), counters,
            curves=[run.curve() for run in runs],
            levels={name: {"target": target.get(name), "chance": None} for name in tracked},
            cosines={run.name: run.cosines for run in runs if run.cosines is not None},
            tasks={task.name: task.origins for task in tasks},
        )  # fmt: skip

    def _forget_sets(self):
        return {part.name for part in self.scorer.parts if part.role == "forget"}

    def _target(self):
        """Return {metric: value} of the target model, nothing without one."""
        if not self.parsed.flags.target_model:
            return {}
        checkpoint = self.load(self.parsed.flags.target_model)
        outcome = self.scorer(checkpoint.model, statistics_folder(self.parsed, checkpoint, self.folder))
        self.fingerprint = checkpoint.fingerprints["weights"]
        release(checkpoint)
        return {name: metric.value for name, metric in outcome.metrics.items()}

    def _finetune(self, task, tracked):
        """Fine-tune the unlearned model, loaded afresh, on one task; returns its TaskRun."""
        flags = self.parsed.flags
        checkpoint = self._afresh()
        scorer = TaskScorer(self.scorer, task, flags.exact_answers, flags.max_new_tokens)
        options = flags.tokenize_options(checkpoint.context_length)
        count = len(tokenize_rows(task.train, checkpoint.tokenizer, options, task.name))
        settings = limited(self.settings, count, PartialState().num_processes)
        steps = checkpoint_steps(settings.max_steps, flags.checkpoints, read_steps(flags.checkpoint_steps))
        logger.info(
            "%s: %d sequences, %d optimizer steps, scored after %s on %d held-out rows",
            task.name, count, settings.max_steps, ", ".join(map(str, steps)), len(scorer.rows),
        )  # fmt: skip
        # What is asked is in the folder's name, so that other questions never get an earlier run's answers.
        folder = self.folder / "runs" / f"{task.name}-{self._asked(scorer)}"

        def attack(resume):
            return finetune_attack(
                self._afresh(), task.train, settings, scorer, folder, evaluate_at=steps, resume=resume,
                statistics=statistics_folder(self.parsed, self.checkpoint, self.folder),
                tracked=lambda metrics: [*tracked, *scorer.names(metrics)],
            )  # fmt: skip

        run = attack(not flags.overwrite_output_dir)
        cosines = self._cosines(run, folder)
        if cosines is None and flags.target_model:
            run = attack(resume=False)
            cosines = self._cosines(run, folder)
        return TaskRun(task.name, run.rows, steps, cosines, len(scorer.rows), settings.record(), run.counters)

    def _afresh(self):
        """Return the unlearned model as it was before any task."""
        if self.checkpoint.model is None:
            self.checkpoint = self.load(self.name)
        return self.checkpoint

    def _asked(self, scorer):
        told = [scorer.exact, scorer.max_new_tokens, fingerprint(scorer.rows), *(p.sha256 for p in self.scorer.parts)]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]

    def _cosines(self, run, folder):
        """Return the cosines of a run as JSON has them, kept beside it; None where they cannot be had.

        That is without a target model, and where an earlier run, which left no weights, was compared with another one.
        """
        target, path = self.parsed.flags.target_model, Path(folder) / COSINES
        if not target:
            return None
        if run.model is None:
            kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            return kept.get("cosines") if kept.get("target") == self.fingerprint else None
        found = cosines_of(run.model, self.name, target, lambda name: self.load(name, "cpu").model)
        found = {group: alignment.as_dict() for group, alignment in found.items()}
        if is_first_process():
            write_json(path, {"target": self.fingerprint, "cosines": found})
        return found


def cosines_of(attacked, unlearned, target, load):
    """Return the cosines of a fine-tuned model in memory; an adapter is merged into it first.

    Args:
        attacked: AttackRun.model.
        unlearned, target: names of the two checkpoints.
        load: see `tensors_of`.
    Returns:
        {"all" or a group of layers: Alignment}.
    Raises:
        UserError: models of other architectures.
    """
    merged = attacked.merge_and_unload() if hasattr(attacked, "merge_and_unload") else attacked
    finetuned = ModelTensors(merged, "the fine-tuned model")
    return task_vector_cosines(finetuned, *(tensors_of(name, finetuned.names(), load) for name in (unlearned, target)))


def tensors_of(name, model_names, load):
    """Return the weights of a checkpoint: read from its files where they hold what the model does, else loaded.

    Args:
        name: folder or Hub name.
        model_names: of the parameters of a like model in memory.
        load: function of a name that returns the model on the CPU.
    Returns:
        CheckpointFiles or ModelTensors.
    """
    if Path(name).is_dir():
        try:
            files = CheckpointFiles(name, "model")
        except UserError as error:
            logger.info("%s; it is loaded instead", error)
        else:
            # Some architectures store their weights under other names than they have in memory.
            if set(files.names()) == set(model_names):
                return files
    return ModelTensors(load(name), name)


def release(checkpoint):
    """Drop the model of a checkpoint, so that the next one finds its memory free."""
    checkpoint.model = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
