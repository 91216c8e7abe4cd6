"""The command line of a script in utils/ that reads the data of run_unlearn.py: its own flags and some of DataFlags."""

import dataclasses

from llm_unlearn.arguments import DataFlags
from llm_unlearn.command_line import config_words, make_parser, split_config, unknown_option

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
