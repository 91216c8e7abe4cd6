"""Which checkpoint a run continues from, and whether it is this run's: what differs is named."""

import json
import logging
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from llm_unlearn.data.plan import WINDOW_STEPS
from llm_unlearn.errors import UserError
from llm_unlearn.manifests import incompleteness, listed_files, newest_complete

logger = logging.getLogger(__name__)

RUN_STATE, METHOD_STATE = "unlearning_state.json", "method_state.safetensors"
_FREE_TO_CHANGE = {"overwrite_output_dir", "do_unlearn", "fsdp_transformer_layer_cls_to_wrap"}
_FREE_TO_CHANGE |= {"eval_suite", "retain_reference", "estimate_memory"}
# What the file says is compared instead.
_FREE_TO_CHANGE |= {"weight_mask", "allow_pickle_mask"}
# Other ways to the same numbers, up to their rounding, as another number of processes is.
_FREE_TO_CHANGE |= {"reference", "reference_cache", "sequential_backward", "selection_cache"}
# The checkpoint's own values of most of these come back with the optimizer, so that another one would change nothing.
_UPDATE = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
_UPDATE += ("max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "neftune_noise_alpha")
_UPDATE += ("bf16", "fp16", "optim_target_modules", "train_sampling_strategy")
_LENGTH = ("num_train_epochs", "max_steps")
_WRITTEN_BY_PEFT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
_READ_BY_TORCH = {".pt", ".pth", ".bin", ".safetensors"}


def asks_to_resume(wanted):
    """Return whether a value of --resume_from_checkpoint asks for a resume at all."""
    return wanted not in (None, False, "False", "false")


def find_checkpoint(wanted, output_dir):
    """Return the checkpoint that a value of --resume_from_checkpoint means.

    Args:
        wanted: None or False for none, True for the newest complete one, "auto" for the same or none, or a path.
        output_dir: directory of the run.
    Returns:
        str path, or None to start anew.
    Raises:
        UserError: there is no complete checkpoint, or the named one is not complete or cannot be continued.
    """
    if not asks_to_resume(wanted):
        return None
    if wanted in (True, "True", "true", "auto"):
        found = newest_complete(output_dir)
        if found is None and wanted != "auto":
            raise UserError(
                f"--resume_from_checkpoint True: '{output_dir}' holds no complete checkpoint; pass auto to start anew"
            )
        return None if found is None else str(_resumable(found))
    reason = incompleteness(wanted)
    if reason is not None:
        raise UserError(f"--resume_from_checkpoint '{wanted}' cannot be used: {reason}")
    return str(_resumable(wanted))


def run_state(trainer):
    """Return what a resumed run is compared in with the run that wrote the checkpoint.

    Args:
        trainer: CheckpointedTrainer.
    Returns:
        dict, JSON-serializable. All of it must be equal except the number of processes (under ZeRO it must be too) and
        the length of the run.
    """
    args, model, mask = trainer.args, trainer.model, getattr(trainer, "weight_mask", None)
    knobs = set(type(args).__dataclass_fields__) - set(TrainingArguments.__dataclass_fields__) - _FREE_TO_CHANGE
    state = {
        "trainer": type(trainer).__name__,
        "model": getattr(model.config, "_name_or_path", None),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}),
        "backend": _backend(trainer.accelerator),
        "processes": args.world_size,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "settings": {name: getattr(args, name) for name in sorted({*knobs, *_UPDATE})},
        "adapters": {name: _adapter(config) for name, config in getattr(model, "peft_config", {}).items()},
        "window_steps": WINDOW_STEPS,
        "weight_mask": mask and mask.file.sha256,
        "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "streams": trainer.train_dataset.fingerprints if trainer.train_dataset is not None else {},
        "length": {name: getattr(args, name) for name in _LENGTH},
    }
    return json.loads(json.dumps(state, default=_plain))


def require_same_run(checkpoint, now):
    """Compare a run with the one that wrote a checkpoint.

    Args:
        checkpoint: its folder.
        now: see `run_state`.
    Raises:
        UserError: naming the first field that differs and must not.
    """
    before = _read(Path(checkpoint) / RUN_STATE)
    for field, value in now.items():
        old = before.get(field)
        if old == value or (field == "processes" and not now["backend"].startswith("ZeRO")):
            continue
        if field == "length":
            logger.warning(
                "%s: the learning-rate schedule is that of the new length from here on, so that the result is not that "
                "of an unbroken run unless the schedule is constant",
                _changes(old, value),
            )
            continue
        shown = f"was {old} and is {value}"
        if field == "streams":
            shown = "has other contents"
        elif isinstance(value, dict):
            shown = f"differ in {_changes(old, value)}"
        elif field == "processes":
            shown += f", and the optimizer state under {now['backend']} is cut by processes"
        raise UserError(f"cannot resume from '{checkpoint}': {field} {shown}; start anew or restore it")


def warn_of_random_state(checkpoint, processes):
    """Say in one warning that some process finds no random state of its own, so that dropout draws other numbers."""
    names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    missing = [name for name in names if not (Path(checkpoint) / name).is_file()]
    if missing:
        logger.warning(
            "'%s' holds no %s: what is drawn at random, dropout for example, differs from the unbroken run",
            checkpoint, " and no ".join(missing),
        )  # fmt: skip


def write_state(folder, state, method_state):
    """Write into a checkpoint what transformers' own lacks.

    Args:
        folder: checkpoint folder that is being written.
        state: dict, JSON-serializable.
        method_state: {name: tensor}; an empty one writes no file.
    """
    (Path(folder) / RUN_STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    if method_state:
        tensors = {name: value.detach().cpu().clone().contiguous() for name, value in method_state.items()}
        save_file(tensors, Path(folder) / METHOD_STATE)


def read_method_state(checkpoint, expected):
    """Read the tensors of a method from a checkpoint.

    Args:
        checkpoint: its folder.
        expected: {name: tensor} that the method has now.
    Returns:
        {name: tensor} of the same names and shapes, on the same devices.
    Raises:
        UserError: the file is missing, or a name or a shape differs.
    """
    path = Path(checkpoint) / METHOD_STATE
    if not expected and not path.is_file():
        return {}
    if not path.is_file():
        raise UserError(f"cannot resume from '{checkpoint}': it has no {METHOD_STATE}, which holds {_listed(expected)}")
    found = load_file(path)
    if found.keys() != expected.keys():
        missing, unknown = _listed(expected.keys() - found.keys()), _listed(found.keys() - expected.keys())
        shown = f"lacks {missing}" if missing else f"holds {unknown}, which this run does not have"
        raise UserError(f"cannot resume from '{checkpoint}': its {METHOD_STATE} {shown}")
    for name, value in expected.items():
        if found[name].shape != value.shape:
            shapes = f"{tuple(found[name].shape)} and is {tuple(value.shape)}"
            raise UserError(f"cannot resume from '{checkpoint}': the shape of {name} in {METHOD_STATE} was {shapes}")
    return {name: value.to(expected[name].device) for name, value in found.items()}


def load_schedule_of_plain_sgd(trainer, checkpoint):
    """Restore the schedule and its rate under FSDP, where SGD without momentum has no tensors to restore.

    torch 2.13 fails to load a full optimizer state without any ("Expected device to be set").

    Args:
        trainer: CheckpointedTrainer whose optimizer is made.
        checkpoint: folder to resume from.
    Returns:
        whether that was the case; otherwise nothing was done.
    """
    if trainer.accelerator.distributed_type != DistributedType.FSDP:
        return False
    optimizer = trainer.optimizer.optimizer
    if type(optimizer) is not torch.optim.SGD or any(group["momentum"] for group in optimizer.param_groups):
        return False
    trainer.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
    for group, rate in zip(optimizer.param_groups, trainer.lr_scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    return True


def unlogged_sums(trainer):
    """Return what the averages of the next log line hold already, or None just after a log line.

    Args:
        trainer: CheckpointedTrainer in training; all processes call it.
    Returns:
        dict, JSON-serializable, exact: the mean of the loss sums and the sums of the terms over the processes.
    """
    if trainer.state.global_step == trainer._globalstep_last_logged:
        return None
    names, sums = list(trainer._term_sums), list(trainer._term_sums.values())
    sums = trainer.accelerator.reduce(torch.stack(sums), "sum").tolist() if sums else []
    loss = trainer.accelerator.reduce(trainer._tr_loss.detach().clone(), "sum") / trainer.args.world_size
    return {
        "since": trainer._globalstep_last_logged,
        "loss": loss.item(),
        "terms_since": trainer._terms_since,
        "terms": dict(zip(names, sums, strict=True)),
        "dtype": str(next(iter(trainer._term_sums.values())).dtype).removeprefix("torch.") if names else None,
    }


def restore_unlogged_sums(trainer, sums):
    """Continue the averages of the next log line where the checkpoint cut them.

    Args:
        trainer: CheckpointedTrainer that is about to train its first step.
        sums: see `unlogged_sums`.
    """
    device = trainer.args.device
    trainer._globalstep_last_logged, trainer._terms_since = sums["since"], sums["terms_since"]
    trainer._tr_loss = torch.tensor(sums["loss"], device=device)
    # The average loss that the Trainer reports at the end is that of this call's steps alone.
    trainer._total_loss_scalar = -sums["loss"]
    for name, value in sums["terms"].items():
        own = value if trainer.is_world_process_zero() else 0.0
        trainer._term_sums[name] = torch.tensor(own, dtype=getattr(torch, sums["dtype"]), device=device)


def read_state(checkpoint):
    """Return what a checkpoint's `unlearning_state.json` says."""
    return _read(Path(checkpoint) / RUN_STATE)


def _resumable(folder):
    """Return a complete checkpoint, or refuse it for what it lacks or for what was put into it."""
    if not any(Path(folder).glob("optimizer*")) and not any(Path(folder).glob("global_step*")):
        raise UserError(f"'{folder}' holds no optimizer state (--save_only_model), so that no run can continue from it")
    listed = set(listed_files(folder))
    for path in Path(folder).rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix in _READ_BY_TORCH and path.is_file() and name not in listed:
            raise UserError(f"'{folder}' holds {name}, which its manifest does not list; delete it or start anew")
    return folder


def _backend(accelerator):
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.state.deepspeed_plugin.zero_stage}"
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        return f"FSDP{plugin.fsdp_version} with {str(plugin.state_dict_type).rpartition('.')[2]}"
    return "one process or DDP"


def _adapter(config):
    return {name: value for name, value in config.to_dict().items() if name not in _WRITTEN_BY_PEFT}


def _plain(value):
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _changes(old, new):
    old = old if isinstance(old, dict) else {}
    names = [name for name in [*new, *(name for name in old if name not in new)] if old.get(name) != new.get(name)]
    return ", ".join(f"{name} (was {old.get(name)} and is {new.get(name)})" for name in names)


def _listed(names):
    return ", ".join(sorted(names))


def _read(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
