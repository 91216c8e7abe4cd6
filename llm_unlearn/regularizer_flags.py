"""Flags of what can be added to the loss of any method, declared without torch."""

import math
from dataclasses import dataclass, field

from llm_unlearn.errors import UserError, unknown_name
from llm_unlearn.schedules import CONSTANT, parse_schedule

COEFFICIENTS = {"orthogonality": "orth_coef", "max_entropy": "max_entropy_coef", "l2_sp": "l2sp_coef"}
"""{regularizer: the flag of its coefficient}"""


@dataclass
class RegularizerFlags:
    """Flags of the regularizers, which go with any method that reads a forget set."""

    regularizer: list[str] | None = field(
        default=None,
        metadata={
            "help": "What is added to the loss, several allowed: orthogonality, forget rows of a batch represented at "
            "right angles to each other; max_entropy, the forget tokens' output distribution flattened; l2_sp, the "
            "trained weights pulled back to where they started."
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


_DEFAULTS = {"orth_coef": 5.0, "orth_schedule": "0:1", "max_entropy_coef": 1.0, "l2sp_coef": 0.01}


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
    for flag in ("orth_layers", "orth_schedule"):
        if "orthogonality" not in chosen and getattr(args, flag) is not None:
            raise UserError(f"--{flag} has no effect without --regularizer orthogonality")
    args.regularizer = chosen
    for name in chosen:
        for flag in (COEFFICIENTS[name], *(("orth_schedule",) if name == "orthogonality" else ())):
            if getattr(args, flag) is None:
                setattr(args, flag, _DEFAULTS[flag])
    if args.orth_schedule is not None and args.orth_schedule != CONSTANT:
        parse_schedule(args.orth_schedule, "--orth_schedule")
