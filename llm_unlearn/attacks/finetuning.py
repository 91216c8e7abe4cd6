"""Fine-tune a model that has unlearned, and watch what comes back."""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from llm_unlearn.attacks.attack_state import AttackState
from llm_unlearn.attacks.curve import Curve, say_cost
from llm_unlearn.attacks.recovery import tracked_metrics
from llm_unlearn.attacks.training_flags import FinetuningSettings
from llm_unlearn.data.rows import fingerprint
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.errors import NonFiniteError, UserError
from llm_unlearn.manifests import checkpoints_of, newest_complete, remove
from llm_unlearn.methods.finetune import FinetuneArguments, FinetuneTrainer
from llm_unlearn.models import with_lora

__all__ = ["AttackRun", "FinetuningSettings", "finetune_attack"]

logger = logging.getLogger("llm_unlearn")


@dataclass
class AttackRun:
    """What an attack found.

    Attributes:
        rows: {"step", "<metric>": value or None, "stderr": {metric: value}, "timestamp"} of each evaluation, in order;
            those of a repair have "phase": "repair" and negative steps, which count up to the attack's step 0.
        model: the attacked model, on its device, in eval mode; None where an earlier run had finished the attack.
        seconds: of training and evaluation together.
        evaluation_seconds: of evaluation alone.
        counters: {"optimizer_steps", "evaluations", "evaluations_failed", "sequences", "tokens"}.
        planned_steps: optimizer steps that were planned.
        ended: why it ended before that, or None.
        stopped: whether that was `stop_when`; otherwise it diverged.
        failures: [{"step", "error"}] of the evaluations that failed.
        stamp: when it began, as in the names of its files.
    """

    rows: list
    model: object
    seconds: float
    evaluation_seconds: float
    counters: dict = field(default_factory=dict)
    planned_steps: int = 0
    ended: str | None = None
    stopped: bool = False
    failures: list = field(default_factory=list)
    stamp: str = ""


def finetune_attack(
    checkpoint, rows, settings, scorer, folder, repair_rows=None, repair_steps=0, evaluate_at=None, stop_when=None,
    resume=True, statistics=None, tracked=None, asked=None,
):  # fmt: skip
    """Fine-tune a model on rows, and score it before, every `eval_every` steps and after; all processes call together.

    Args:
        checkpoint: evaluation.loading.Checkpoint loaded in float32; its model is changed.
        rows: list of checked rows (text | question, answer | ... | input_ids, labels).
        settings: FinetuningSettings.
        scorer: function (model, folder) that returns a suite.Outcome, as attacks.scoring.DomainScorer.
        folder: where checkpoints and the rows of the curve are kept.
        repair_rows: rows of a training before the attack.
        repair_steps: optimizer steps of that; 0: none.
        evaluate_at: steps of the evaluations, instead of every `eval_every`; 0 and the last are always among them.
        stop_when: function of the rows of the curve so far, asked after each evaluation, that returns why the attack
            ends here, or None.
        resume: continue what an earlier run left in `folder`; False starts anew.
        statistics: statistics folder of the unchanged checkpoint, from which the first evaluation is read.
        tracked: function of {metric: scores.Metric} that returns the names that the rows hold; None takes
            `recovery.tracked_metrics`.
        asked: what tells the scorer's questions from others, which an attack that is continued must not mix.
    Returns:
        AttackRun.
    Raises:
        UserError: rows or settings that cannot be trained on; an earlier run in `folder` that was another one.
    """
    low = {p.dtype for p in checkpoint.model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    if low:
        raise ValueError("an attack trains float32 weights: load the checkpoint with dtype float32")
    folder, identity = Path(folder), _identity(checkpoint, rows, settings, repair_rows, repair_steps, evaluate_at)
    identity["questions"] = asked
    state = _on_first(lambda: AttackState.open(folder, identity, resume))
    if state.finished:
        logger.info("the attack in %s is finished, nothing is repeated", folder)
        return _run(state, None)
    curve = Curve(state, folder, scorer, settings, evaluate_at, stop_when, statistics, tracked or tracked_metrics)
    set_seed(settings.seed)
    checkpoint.model = _with_adapter(checkpoint.model, settings)
    if repair_steps and not (resume and _on_first(lambda: newest_complete(folder))):
        curve.offset, curve.last = -repair_steps, repair_steps
        _train(checkpoint, repair_rows, settings, folder / "repair", curve, resume, repair_steps)
    curve.offset, curve.last = 0, None
    _train(checkpoint, rows, settings, folder, curve, resume)
    state.finished = True
    curve.write()
    for place in (folder, folder / "repair"):
        _on_first(lambda place=place: _remove_checkpoints(place))
    say_cost(state)
    return _run(state, checkpoint.model.eval())


class AttackTrainer(FinetuneTrainer):
    """Fine-tuning whose evaluations are the points of a curve.

    Attributes:
        curve: Curve.
    """

    curve = None

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Put the present step on the curve, and end the training where that is enough; returns no metrics."""
        self.control.should_evaluate = False
        self.curve.evaluate(self, self.state.global_step)
        if self.curve.stops():
            self.control.should_training_stop = True
        return {}


class DueEvaluations(TrainerCallback):
    """Ask for an evaluation at the steps where the curve wants one, and for what a stopped run had left to do."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        """Evaluate the checkpoint that a run resumes from, where its row is missing."""
        if state.global_step and self.trainer.curve.is_due(state.global_step):
            self.trainer.evaluate()

    def on_step_end(self, args, state, control, **kwargs):
        """Have the Trainer evaluate, before it saves."""
        control.should_evaluate = self.trainer.curve.is_due(state.global_step)


def _train(checkpoint, rows, settings, folder, curve, resume, max_steps=None):
    """Train one phase, the repair or the attack, with its evaluations."""
    trainer = AttackTrainer(
        model=checkpoint.model, args=_arguments(settings, folder, max_steps),
        train_dataset=_dataset(rows), processing_class=checkpoint.tokenizer,
    )  # fmt: skip
    trainer.curve = curve
    trainer.add_callback(DueEvaluations(trainer))
    # What they print at every log line is for somebody who watches a loss.
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    curve.last = trainer.num_updates()
    if not curve.offset:
        curve.state.planned_steps = curve.last
        curve.state.counters = _counters(trainer)
    goes_on = resume and _on_first(lambda: newest_complete(folder)) is not None
    if not resume:
        _on_first(lambda: _remove_checkpoints(folder))
    if not goes_on:
        curve.evaluate(trainer, 0)
    try:
        if not curve.stops():
            trainer.train(resume_from_checkpoint="auto" if resume else None)
    except NonFiniteError as error:
        curve.state.ended = str(error)
        logger.warning("the %s ended: %s", "repair" if curve.offset else "attack", error)
    if not curve.offset:
        curve.state.optimizer_steps = max(curve.state.optimizer_steps, trainer.state.global_step)
    checkpoint.model = trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)


def _arguments(settings, folder, max_steps):
    check_precision(settings)
    # transformers' "constant" knows no warm-up.
    warms_up = settings.warmup and settings.lr_scheduler == "constant"
    return FinetuneArguments(
        output_dir=str(folder), learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if warms_up else settings.lr_scheduler,
        warmup_steps=settings.warmup, num_train_epochs=settings.epochs, max_steps=max_steps or settings.max_steps,
        per_device_train_batch_size=settings.batch_size, gradient_accumulation_steps=settings.grad_accumulation,
        weight_decay=settings.weight_decay, unlearn_optimizer="muon" if settings.optimizer == "muon" else None,
        bf16=settings.autocast == "bf16", fp16=settings.autocast == "fp16", seed=settings.seed,
        save_strategy="steps" if settings.save_steps else "no", save_steps=settings.save_steps or 500,
        save_total_limit=1, use_cpu=settings.use_cpu, logging_strategy="no", report_to="none", disable_tqdm=True,
        **asdict(settings.tokenize),
    )  # fmt: skip


def check_precision(settings):
    """Refuse fp16 without an accelerator.

    Raises:
        UserError: if that is asked for.
    """
    if settings.autocast == "fp16" and (settings.use_cpu or not torch.accelerator.is_available()):
        raise UserError("--precision fp16 needs an accelerator; pass --precision bf16, or leave it out")


def _dataset(rows):
    """Return what a trainer takes of rows, which are tokenized already or are not."""
    is_ready = bool(rows) and all("input_ids" in row and "labels" in row for row in rows)
    return UnlearnDataset({"forget": rows}) if is_ready else {"forget": rows}


def _with_adapter(model, settings):
    """Wrap the model with a LoRA adapter, alpha equal to the rank and no dropout as published, where one is wanted."""
    if not settings.lora_r:
        return model
    from trl import ModelConfig

    targets = list(settings.lora_target) or None
    return with_lora(
        model,
        ModelConfig(
            use_peft=True, lora_r=settings.lora_r, lora_alpha=settings.lora_r, lora_dropout=0.0,
            lora_target_modules=targets,
        ),
    )  # fmt: skip


def _identity(checkpoint, rows, settings, repair_rows, repair_steps, evaluate_at):
    """Return what an attack that is continued must share with the one that was begun."""
    return {
        **settings.record(), "rows": fingerprint(rows), "repair_steps": repair_steps,
        "repair_rows": fingerprint(repair_rows) if repair_steps else None,
        "evaluate_at": sorted(evaluate_at) if evaluate_at is not None else None,
        "weights": checkpoint.fingerprints,
        # Each process adds a batch to every step.
        "processes": PartialState().num_processes if PartialState().num_processes > 1 else None,
    }  # fmt: skip


def _remove_checkpoints(folder):
    for path in checkpoints_of(folder):
        remove(path)


def _counters(trainer):
    return {"sequences": len(trainer.train_dataset), "tokens": trainer.reading_record()["tokens"]}


def _run(state, model):
    failed = {failure["step"] for failure in state.failures}
    counters = {
        "optimizer_steps": state.optimizer_steps, "evaluations": len(state.rows), "evaluations_failed": len(failed),
        **state.counters,
    }  # fmt: skip
    return AttackRun(
        state.full_rows(), model, state.seconds, state.evaluation_seconds, counters, state.planned_steps, state.ended,
        state.stopped, state.failures, state.stamp,
    )  # fmt: skip


def _on_first(function):
    """Call a function on the first process alone, and give its result or its mistake to all."""
    if PartialState().num_processes == 1:
        return function()
    answer = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = function()
        except UserError as error:
            answer[1] = str(error)
    answer = broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]
