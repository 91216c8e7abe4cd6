"""Flags that say how weights move: second-order steps and Muon, on top of any method; declared without torch."""

import math
from dataclasses import dataclass, field

from llm_unlearn.command_line import refuse_unread
from llm_unlearn.errors import UserError, unknown_name

OPTIMIZERS = ("sophia", "soul_legacy", "influence", "muon")
ESTIMATORS = ("gnb", "hutchinson", "empirical_fisher")
DATA = ("forget", "retain", "both")

TAKES = {
    "sophia": ("sophia_rho", "sophia_betas", "hessian_estimator", "hessian_interval", "hessian_data"),
    "soul_legacy": ("sophia_rho", "sophia_betas"),
    "influence": ("hessian_estimator", "hessian_data", "influence_damping", "influence_draws"),
    "muon": (),
}
"""{optimizer: the flags that it reads}"""

_DEFAULTS = {
    "sophia": {
        "sophia_rho": 0.04, "sophia_betas": [0.965, 0.99], "hessian_estimator": "gnb", "hessian_interval": 10,
        "hessian_data": "both",
    },
    "soul_legacy": {"sophia_rho": 0.04, "sophia_betas": [0.9, 0.95]},
    "influence": {
        "hessian_estimator": "gnb", "hessian_data": "both", "influence_damping": 0.1, "influence_draws": 10,
    },
    "muon": {},
}  # fmt: skip
_OTHERS = ("optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon")


def _flag(text, **metadata):
    """Declare a flag that is None unless given."""
    return field(default=None, metadata={"help": text, **metadata})


@dataclass
class OptimizerFlags:
    """Flags of the optimizers that are ours, which go with any method.

    Stands before TrainingArguments in the bases of what inherits it, whose `__post_init__` is called from here.

    Raises:
        UserError: an unknown name, a value out of its range, or a flag that cannot take effect.
    """

    unlearn_optimizer: str | None = _flag(
        "How weights move: sophia, SOUL's second-order step; soul_legacy, the step that SOUL's code takes; influence, "
        "one static Newton step; muon, Muon for the decoder layers' matrices and AdamW for the rest. Default: --optim.",
        choices=list(OPTIMIZERS),
    )
    sophia_rho: float | None = _flag(
        "By how much the curvature is multiplied before a momentum is divided by it: more clips less (default 0.04)."
    )
    sophia_betas: list[float] | None = field(
        default=None,
        metadata={"help": "Decay of momentum and of curvature (default 0.965 0.99; of soul_legacy 0.9 0.95)."},
    )
    hessian_estimator: str | None = _flag(
        "Curvature from: gnb (default), labels that the model samples; hutchinson, differences of the objective's "
        "gradient in a random direction; empirical_fisher, that gradient squared, which takes no pass of its own.",
        choices=list(ESTIMATORS),
    )
    hessian_interval: int | None = _flag("Estimate the curvature every so many optimizer steps (default 10).")
    hessian_data: str | None = _flag(
        "Whose curvature: that of the forget rows of the step, of the retain rows, or of both (default).",
        choices=list(DATA),
    )
    influence_damping: float | None = _flag(
        "Added to the curvature of the influence step, as a share of its mean over all weights (default 0.1)."
    )
    influence_draws: int | None = _flag(
        "How many estimates the curvature of the influence step is the mean of (default 10)."
    )

    def __post_init__(self):
        _resolve(self)
        super().__post_init__()


def _resolve(args):
    """Fill in the defaults of the optimizer that runs, and refuse flags of those that do not."""
    name = args.unlearn_optimizer
    if name is not None and name not in OPTIMIZERS:
        raise unknown_name("--unlearn_optimizer", name, OPTIMIZERS)
    refuse_unread(args, "unlearn_optimizer", TAKES)
    if name is None:
        return
    _refuse_other_optimizers(args)
    of_passes = ("hessian_data", "influence_draws") if args.hessian_estimator == "empirical_fisher" else ()
    for flag in of_passes:
        if getattr(args, flag) is not None:
            raise UserError(
                f"--{flag} has no effect with --hessian_estimator empirical_fisher, which squares the gradient of the "
                "whole objective; pass --hessian_estimator gnb"
            )
    for flag, value in _DEFAULTS[name].items():
        if getattr(args, flag) is None and flag not in of_passes:
            setattr(args, flag, value)
    _check_values(args)
    if name == "influence":
        _prepare_influence(args)


def _refuse_other_optimizers(args):
    fields = type(args).__dataclass_fields__
    for flag in _OTHERS:
        if flag in fields and getattr(args, flag) != fields[flag].default:
            takes_betas = "beta" in flag and "sophia_betas" in TAKES[args.unlearn_optimizer]
            raise UserError(
                f"--{flag} has no effect with --unlearn_optimizer {args.unlearn_optimizer}"
                f"{'; pass --sophia_betas' if takes_betas else ''}"
            )


def _check_values(args):
    for flag, known in (("hessian_estimator", ESTIMATORS), ("hessian_data", DATA)):
        value = getattr(args, flag)
        if value is not None and value not in known:
            raise UserError(f"--{flag} must be {', '.join(known[:-1])} or {known[-1]}, but is '{value}'")
    for flag in ("sophia_rho", "influence_damping"):
        value = getattr(args, flag)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{flag} must be above 0, and finite, but is {value}")
    for flag in ("hessian_interval", "influence_draws"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} must be at least 1, but is {value}")
    betas = args.sophia_betas
    if betas is not None and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
        raise UserError(f"--sophia_betas must be two numbers in [0, 1), as in 0.965 0.99, but is {betas}")


def _prepare_influence(args):
    """One Newton step takes the gradient as it is, and neither decay nor a schedule."""
    clip = type(args).__dataclass_fields__["max_grad_norm"].default
    if args.max_grad_norm not in (0, clip):
        raise UserError("--max_grad_norm has no effect with --unlearn_optimizer influence, whose step is not clipped")
    args.max_grad_norm = 0.0
    if args.weight_decay:
        raise UserError("--weight_decay has no effect with --unlearn_optimizer influence, which takes one Newton step")
