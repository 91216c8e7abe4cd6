"""`--sweep`: several attacks of one command, every combination of the values that it names."""

import dataclasses
import itertools
import re
import typing
from dataclasses import dataclass

from llm_unlearn.errors import UserError, unknown_name

SWEPT = (
    "lr", "lr_scheduler", "warmup_ratio", "warmup_steps", "optimizer", "weight_decay", "lora_r", "precision",
    "batch_size", "grad_accumulation", "epochs", "max_steps", "num_train_examples", "repair_steps", "seed",
)  # fmt: skip
"""Flags that can be swept."""


@dataclass(frozen=True)
class Configuration:
    """One attack of a sweep.

    Attributes:
        name: what it is called, "lr 2e-05, lr_scheduler linear".
        folder: name of its subfolder; "" where there is no sweep.
        changes: {flag: value} on top of the command line.
    """

    name: str
    folder: str
    changes: dict


def configurations(sweep, flags):
    """Return the configurations of a sweep: the product of all its values, the last key varying fastest.

    Args:
        sweep: "lr=1e-5,2e-5;lr_scheduler=linear,cosine"; None or "": one, as the flags say.
        flags: dataclass of the script's flags.
    Returns:
        list of Configuration.
    Raises:
        UserError: an unknown key, a value that is none of the flag's, a key or a value twice.
    """
    axes = _axes(sweep, flags) if sweep else {}
    if not axes:
        return [Configuration(_name({"lr": flags.lr}), "", {})]
    found = []
    for values in itertools.product(*axes.values()):
        changes = dict(zip(axes, values, strict=True))
        name = _name(changes)
        found.append(Configuration(name, re.sub(r"[^\w.+-]+", "_", name.replace(", ", "-")), changes))
    return found


def join_sweeps(words):
    """Return a command line in which several --sweep are one, their axes joined by semicolons.

    Args:
        words: list of str.
    """
    kept, given, iterator = [], [], iter(words)
    for word in iterator:
        if word == "--sweep" or word.startswith("--sweep="):
            given.append(next(iterator, "") if word == "--sweep" else word.partition("=")[2])
        else:
            kept.append(word)
    return [*kept, "--sweep", ";".join(given)] if given else kept


def _axes(sweep, flags):
    axes = {}
    for part in filter(None, (part.strip() for part in sweep.split(";"))):
        key, sign, values = (piece.strip() for piece in part.partition("="))
        if not sign or not values:
            raise UserError(f"--sweep '{part}' is not of the form lr=1e-5,2e-5")
        if key not in SWEPT:
            raise unknown_name("key of --sweep", key, SWEPT)
        if key in axes:
            raise UserError(f"--sweep names {key} twice; separate its values by commas")
        axes[key] = [_value(key, value.strip(), flags) for value in values.split(",")]
        if len(set(axes[key])) < len(axes[key]):
            raise UserError(f"--sweep {part} names a value twice")
    return axes


def _value(key, text, flags):
    field = type(flags).__dataclass_fields__[key]
    kind = next(one for one in (*typing.get_args(field.type), field.type) if one in (int, float, str))
    try:
        value = kind(text)
    except ValueError as error:
        raise UserError(f"--sweep {key}={text}: '{text}' is no {'whole ' * (kind is int)}number") from error
    known = field.metadata.get("choices")
    if known and value not in known:
        raise unknown_name(f"--sweep {key}", text, known)
    return value


def _name(changes):
    return ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in changes.items())  # fmt: skip


def with_changes(parsed, configuration):
    """Return a parsed command line with the flags of one configuration.

    Args:
        parsed: ParsedEvaluation.
        configuration: Configuration.
    """
    return dataclasses.replace(parsed, flags=dataclasses.replace(parsed.flags, **configuration.changes))
