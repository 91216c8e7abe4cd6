"""Flags of what can be added to the loss of any method, declared without torch."""

import math
from dataclasses import dataclass, field

from llm_unlearn.errors import UserError, unknown_name
from llm_unlearn.schedules import CONSTANT, parse_schedule

COEFFICIENTS = {
    "orthogonality": "orth_coef", "max_entropy": "max_entropy_coef", "l2_sp": "l2sp_coef", "ilu": "ilu_weight",
}  # fmt: skip
"""{regularizer: the flag of its coefficient}"""

STREAMS = {"ilu": "invariance"}
"""{regularizer: the stream that is loaded and run for it alone}"""

ILU_MODES = ("logit_scale", "parameter_gradient")
_KNOBS = {"orthogonality": ("orth_layers", "orth_schedule"), "ilu": ("ilu_data", "ilu_ratio", "ilu_mode", "ilu_radius")}


@dataclass
class RegularizerFlags:
    """Flags of the regularizers, which go with any method that reads a forget set."""

    regularizer: list[str] | None = field(
        default=None,
        metadata={
            "help": "What is added to the loss, several allowed: orthogonality, forget rows of a batch represented at "
            "right angles to each other; max_entropy, the forget tokens' output distribution flattened; l2_sp, the "
            "trained weights pulled back to where they started; ilu, the model kept where fine-tuning on unrelated "
            "data has nothing to gain."
        },
    )
    orth_coef: float | None = field(
        default=None,
        metadata={"help": "Weight of orthogonality (default 5), times the mean length of the forget rows in tokens."},
    )
    orth_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Decoder layers that orthogonality reads, from 0; default: those of the method, else all."},
    )
    orth_schedule: str | None = field(
        default=None,
        metadata={"help": "How the weight of orthogonality goes: constant, or START:END as in 0:1 (default)."},
    )
    max_entropy_coef: float | None = field(
        default=None, metadata={"help": "Weight of the regularizer max_entropy (default 1)."}
    )
    l2sp_coef: float | None = field(default=None, metadata={"help": "Weight of the regularizer l2_sp (default 0.01)."})
    ilu_weight: float | None = field(
        default=None, metadata={"help": "Weight of the invariance penalty of ilu (default 0.1)."}
    )
    ilu_data: list[str] | None = field(
        default=None,
        metadata={
            "help": "The unrelated data of ilu: files, hub:owner/name[/config]:split[#column], or gsm8k (default), "
            "which comes from the Hub or from gsm8k/train.jsonl in --data_dir. Several are several environments."
        },
    )
    ilu_ratio: int | None = field(
        default=None,
        metadata={
            "help": "Rows of --ilu_data for each forget row, all sets together (default 1): more cost and less noise."
        },
    )
    ilu_mode: str | None = field(
        default=None,
        metadata={
            "help": "What ilu penalizes: logit_scale (default), the squared derivative of the mean loss by one factor "
            "on all logits; parameter_gradient, its squared gradient by the trained weights, for two more forwards and "
            "backwards of the data and three copies of these weights.",
            "choices": list(ILU_MODES),
        },
    )
    ilu_radius: float | None = field(
        default=None,
        metadata={
            "help": "How far --ilu_mode parameter_gradient moves the weights to see the gradient change (default 0.01)."
        },
    )


_DEFAULTS = {
    "orth_coef": 5.0, "orth_schedule": "0:1", "max_entropy_coef": 1.0, "l2sp_coef": 0.01, "ilu_weight": 0.1,
    "ilu_data": ("gsm8k",), "ilu_ratio": 1, "ilu_mode": "logit_scale",
}  # fmt: skip


def resolve_regularizers(args, own=()):
    """Fill in the defaults of the regularizers that run, and refuse flags of those that do not.

    Args:
        args: RegularizerFlags; changed in place. `regularizer` becomes a list.
        own: regularizers that a method brings: their coefficient alone switches them on.
    Raises:
        UserError: an unknown regularizer, a flag without its regularizer, a coefficient that is not above 0.
    """
    chosen = list(dict.fromkeys(args.regularizer or []))
    for name in chosen:
        if name not in COEFFICIENTS:
            raise unknown_name("--regularizer", name, COEFFICIENTS)
    # 0 switches a method's own one off, as it did for who published it.
    chosen += [name for name in own if name not in chosen and getattr(args, COEFFICIENTS[name])]
    for name, flag in COEFFICIENTS.items():
        value = getattr(args, flag)
        if name not in chosen and value is not None and not (name in own and value == 0):
            raise UserError(f"--{flag} has no effect without --regularizer {name}")
        if name in chosen and value is not None and not 0 < value < math.inf:
            raise UserError(f"--{flag} must be above 0, and finite, but is {value}")
    for name, flags in _KNOBS.items():
        for flag in flags:
            if name not in chosen and getattr(args, flag) is not None:
                raise UserError(f"--{flag} has no effect without --regularizer {name}")
    if "ilu" in chosen:
        _check_ilu(args)
    args.regularizer = chosen
    for name in chosen:
        for flag in (COEFFICIENTS[name], *_KNOBS.get(name, ())):
            if getattr(args, flag) is None and flag in _DEFAULTS:
                default = _DEFAULTS[flag]
                setattr(args, flag, list(default) if isinstance(default, tuple) else default)
    if args.orth_schedule is not None and args.orth_schedule != CONSTANT:
        parse_schedule(args.orth_schedule, "--orth_schedule")


def _check_ilu(args):
    if args.ilu_mode not in (None, *ILU_MODES):
        raise UserError(f"--ilu_mode must be {' or '.join(ILU_MODES)}, but is '{args.ilu_mode}'")
    if args.ilu_radius is not None and args.ilu_mode != "parameter_gradient":
        raise UserError("--ilu_radius has no effect without --ilu_mode parameter_gradient")
    if args.ilu_mode == "parameter_gradient" and args.ilu_radius is None:
        args.ilu_radius = 0.01
    if args.ilu_radius is not None and not 0 < args.ilu_radius < math.inf:
        raise UserError(f"--ilu_radius must be above 0, and finite, but is {args.ilu_radius}")
    if args.ilu_ratio is not None and args.ilu_ratio < 1:
        raise UserError(f"--ilu_ratio must be at least 1, but is {args.ilu_ratio}")
    if args.ilu_data is not None and (not args.ilu_data or len(set(args.ilu_data)) < len(args.ilu_data)):
        raise UserError(f"--ilu_data must name at least one set, and each once, but is {' '.join(args.ilu_data)}")
