"""The command line of a script in utils/ that reads the data of run_unlearn.py: its own flags and some of DataFlags."""

import dataclasses
from pathlib import Path

from llm_unlearn.arguments import DataFlags
from llm_unlearn.command_line import config_words, make_parser, split_config, unknown_option
from llm_unlearn.errors import UserError, unknown_name
from llm_unlearn.processes import is_first_process

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

FORGET_DATA = (
    "domain", "data_dir", "cache_dir", "token", "dataset_revision", "forget_data", "forget_split", "max_train_samples",
    "demo_seed",
)  # fmt: skip
"""Flags of DataFlags that say what the forget set is."""


def parse_script(argv, flags_class, data_flags, script):
    """Parse the words of a script.

    Args:
        argv: list of words; `--config FILE` gives defaults.
        flags_class: dataclass of the script's own flags.
        data_flags: names of the flags of DataFlags that it takes besides.
        script: its path, for messages.
    Returns:
        (an instance of flags_class, DataFlags), or None where `--help` was asked for and printed.
    Raises:
        UserError: an unknown flag or a bad value.
    """
    words, config = split_config(argv)
    known = DataFlags.__dataclass_fields__
    copied = [
        (name, known[name].type, dataclasses.field(default=known[name].default, metadata=known[name].metadata))
        for name in data_flags
    ]

    def unknown(name, parser):
        return unknown_option(name, parser, f"{script} --help")

    parser = make_parser([flags_class, dataclasses.make_dataclass("ScriptData", copied)], script, unknown)
    if "-h" in words or "--help" in words:
        parser.print_help()
        return None
    flags, data = parser.parse([*config_words(config, parser, unknown), *words])
    return flags, DataFlags(**{name: getattr(data, name) for name in data_flags})


def require_flags(flags, names):
    """Refuse a command line that leaves out one of these flags.

    Raises:
        UserError: naming the first that is missing.
    """
    for name in names:
        if not getattr(flags, name):
            raise UserError(f"--{name} is missing")


def check_counts(flags, names):
    """Refuse flags that count something, where they are given and below 1.

    Raises:
        UserError: naming the flag.
    """
    for name in names:
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise UserError(f"--{name} must be at least 1, but is {getattr(flags, name)}")


def check_training_flags(flags):
    """Refuse what no script that trains and pushes can take: its learning rate, precision, seed and Hub flags.

    Args:
        flags: with learning_rate (None for a default), dtype, seed, push_to_hub and the flags of the push.
    Raises:
        UserError: a value out of its range, or a flag of the push without it.
    """
    if flags.learning_rate is not None and not 0 < flags.learning_rate < float("inf"):
        raise UserError(f"--learning_rate must be above 0, but is {flags.learning_rate}")
    if flags.dtype not in DTYPES:
        raise unknown_name("--dtype", flags.dtype, DTYPES)
    if flags.seed < 0:
        raise UserError(f"--seed must not be negative, but is {flags.seed}")
    hub = [name for name in ("hub_model_id", "hub_token", "hub_private_repo") if getattr(flags, name)]
    if hub and not flags.push_to_hub:
        raise UserError(f"--{hub[0]} has no effect without --push_to_hub")


def check_output(flags, model=None):
    """Refuse an output directory that holds something; the first process of the run looks.

    Args:
        flags: with output_dir and overwrite_output_dir.
        model: folder or Hub name whose own folder must not be written into, or None.
    Raises:
        UserError: a file, the model's own folder, or not empty without --overwrite_output_dir.
    """
    if not is_first_process():
        return
    folder = Path(flags.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir '{folder}' is a file")
    if model and Path(model).is_dir() and Path(model).resolve() == folder.resolve():
        raise UserError(f"--output_dir '{folder}' is the model's own folder; pass another")
    if folder.is_dir() and any(folder.iterdir()) and not flags.overwrite_output_dir:
        raise UserError(f"--output_dir '{folder}' is not empty; pass --overwrite_output_dir or another")
