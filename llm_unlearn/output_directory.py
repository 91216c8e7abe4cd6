"""Where a run writes: the directory that was asked for, or the ACL 2024 pattern."""

import os
from pathlib import Path

from llm_unlearn.checkpoints import asks_to_resume
from llm_unlearn.errors import UserError
from llm_unlearn.processes import is_first_process


def output_directory(method, args, model, data):
    """Return the directory of a run.

    Args:
        method: id of the method.
        args: the method's arguments.
        model: ModelFlags with ModelConfig.
        data: DataFlags.
    Returns:
        str: `args.output_dir`; where it was not given, or is the published `./output`, the ACL 2024 pattern
        `./output/{domain}/{model}/{n}_gpu_bs_{bs}_gas_{gas}_lr_{lr}_epoch{E}[general][_rmgt]/unlearn/{prefix}`, in
        which n counts processes.
    """
    if args.output_dir is not None and os.path.normpath(args.output_dir) not in ("trainer_output", "output"):
        return args.output_dir
    name = os.path.basename(os.path.normpath(model.model_name_or_path or model.target_model_name_or_path))
    settings = (
        f"{args.world_size}_gpu_bs_{args.per_device_train_batch_size}_gas_{args.gradient_accumulation_steps}"
        f"_lr_{legacy_learning_rate(args.learning_rate)}_epoch{int(args.num_train_epochs)}"
    )
    settings += "general" if getattr(args, "general", False) else ""
    settings += "_rmgt" if getattr(args, "rm_groundtruth", False) else ""
    return f"./output/{data.domain}/{name}/{settings}/unlearn/{legacy_prefix(method, args)}{model.output_suffix or ''}"


def legacy_learning_rate(learning_rate):
    """Write a learning rate as the ACL 2024 directories do: 2e-5 is `2.0e_5`."""
    mantissa, exponent = f"{learning_rate:.1e}".split("e")
    return f"{mantissa}e{'_' if exponent.startswith('-') else ''}{exponent.lstrip('+-').lstrip('0') or '0'}"


def legacy_prefix(method, args):
    """Return the last part of the ACL 2024 pattern: the method, for random labels with how they are drawn."""
    if method != "random_label":
        return method.replace(":", ".")
    if args.label_source == "retain_answers":
        return "random_label-retain_answers"
    if args.completely_random:
        return "random_label-completely_random"
    if args.top_k == type(args).__dataclass_fields__["top_k"].default:
        return f"random_label-top_p{int(100 * args.top_p)}"
    return f"random_label-top_k{args.top_k}" + ("" if args.top_p == 1 else f"_top_p{args.top_p}")


def check_output_directory(args, start=None):
    """Refuse a directory that holds something, before anything is created; the first process of the run looks.

    Args:
        args: the method's arguments.
        start: folder or Hub name of the model that the run starts from.
    Raises:
        UserError: not a folder, not writable, not empty without --overwrite_output_dir or a resume, or the place of the
            model that the run starts from.
    """
    if not is_first_process():
        return
    path = Path(args.output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir '{path}' is a file")
    model = Path(start).resolve() if start and Path(start).is_dir() else None
    if model and (model == path.resolve() or (model.parent == path.resolve() and model.name.startswith("checkpoint-"))):
        raise UserError(f"--output_dir '{path}' would overwrite the model which the run starts from; pass another")
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output_dir '{path}' cannot be written")
    if (
        path.is_dir()
        and any(path.iterdir())
        and not (args.overwrite_output_dir or asks_to_resume(args.resume_from_checkpoint))
    ):
        raise UserError(
            f"--output_dir '{path}' is not empty; pass --overwrite_output_dir, --resume_from_checkpoint auto or another"
        )
