"""Flags that say which weights may move, declared without torch."""

from dataclasses import dataclass, field

from llm_unlearn.errors import UserError

GAMMA = 1e-6
"""What the score `wagle` divides the retain gradient by, unless told otherwise."""

READS = {
    "wagle": ("forget", "retain"),
    "snip": ("forget",),
    "grad_norm": ("forget",),
    "magnitude": (),
    "random": (),
    "wanda": ("forget",),
}
"""{score by which weights are chosen: the sets that it reads}"""


@dataclass
class WeightMaskFlags:
    """Flags of a weight mask, which goes with any method and optimizer.

    Stands before TrainingArguments in the bases of what inherits it, whose `__post_init__` is called from here.

    Raises:
        UserError: a flag that cannot take effect.
    """

    weight_mask: str | None = field(
        default=None,
        metadata={
            "help": "File of utils/make_weight_mask.py that says which weights train; all others stay bit for bit what "
            "they are, also under weight decay, and count neither in the gradient's norm nor in the optimizer's state."
        },
    )
    allow_pickle_mask: bool = field(
        default=False,
        metadata={
            "help": "Read a published --weight_mask that is a pickle (.pt): its tensors, and nothing else. It does not "
            "say which model it is of."
        },
    )

    def __post_init__(self):
        if self.allow_pickle_mask and not self.weight_mask:
            raise UserError("--allow_pickle_mask has no effect without --weight_mask FILE")
        super().__post_init__()
