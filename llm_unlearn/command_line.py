"""Words of a command line to dataclasses, for every script: config files, older names, errors of one sentence."""

import argparse
import json
from pathlib import Path

from llm_unlearn.errors import UserError, unknown_name


class Folds:
    """Flags that became others, were refused, or change nothing.

    Args:
        renamed: {older name: name}.
        refused: {name: what to type instead}.
        accepted: {name: why it changes nothing}.
    """

    def __init__(self, renamed, refused, accepted):
        self.renamed, self.refused, self.accepted = renamed, refused, accepted

    def pairs(self, name, value, notes):
        """Yield the (name, value) that a flag becomes; one that changes nothing leaves a note instead."""
        refused = next((given for given in (name, self.renamed.get(name)) if given in self.refused), None)
        if refused:
            raise UserError(f"--{name} has no effect here: {self.refused[refused]}")
        if name in self.accepted:
            notes.append(f"--{name} changes nothing: {self.accepted[name]}")
            return
        if name == "fsdp" and value is True:
            value = "full_shard auto_wrap"
        yield self.renamed.get(name, name), value

    def word(self, word, notes):
        """Fold one word of the command line; the flag that is dropped leaves `--ignored` to take its value."""
        if not word.startswith("--"):
            return word
        name, sign, value = word[2:].partition("=")
        folded = list(self.pairs(name, value, notes))
        return f"--{folded[0][0]}{sign}{value}" if folded else f"--ignored{sign}{value}"


def split_config(argv):
    """Take `--config F`, `--config=F` or one positional FILE.json out of the words; returns (words, config)."""
    words, config, paths = [], {}, []
    if argv and argv[0].endswith(".json") and not argv[0].startswith("-"):
        paths, argv = [argv[0]], argv[1:]
    iterator = iter(argv)
    for word in iterator:
        if word == "--config":
            paths.append(next(iterator, None))
        elif word.startswith("--config="):
            paths.append(word.partition("=")[2])
        else:
            words.append(word)
    for path in paths:
        if not path:
            raise UserError("--config needs a file")
        config.update(_read_config(path))
    return words, config


def _read_config(path):
    import yaml

    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file '{path}' does not exist")
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"config file '{path}' cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"config file '{path}' must be a mapping of flags to values")
    if "env" in config:
        raise UserError(f"config file '{path}' has an 'env' block; set environment variables in the shell instead")
    return config


def load_json(given):
    """Return what a flag holds that takes JSON: an object written out, or the name of a file with one.

    Args:
        given: str, or anything else, which is returned as it is.
    Raises:
        UserError: a missing file, or no valid JSON.
    """
    if not isinstance(given, str):
        return given
    is_inline = given.lstrip().startswith("{")
    if not is_inline and not Path(given).is_file():
        raise UserError(f"configuration file '{given}' does not exist")
    try:
        return json.loads(given if is_inline else Path(given).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"the configuration '{given}' is not valid JSON: {error}") from error


def refuse_unread(args, choice, takes):
    """Refuse flags that belong to another choice than the one that was made.

    Args:
        args: dataclass of flags; None where one was not given.
        choice: the flag that chooses, which may be None too.
        takes: {what can be chosen: the flags that it reads}.
    Raises:
        UserError: naming the flag, and what reads it.
    """
    read = takes.get(getattr(args, choice), ())
    for flag in dict.fromkeys(flag for flags in takes.values() for flag in flags):
        if flag not in read and getattr(args, flag) is not None:
            readers = " or ".join(reader for reader, flags in takes.items() if flag in flags)
            raise UserError(f"--{flag} has no effect without --{choice} {readers}")


def make_parser(dataclass_types, script, unknown_flag):
    """Return TRL's parser over dataclasses, with errors of one sentence.

    Args:
        dataclass_types: whose fields are the flags.
        script: its name, for the help.
        unknown_flag: function (flag, parser) that returns the UserError for a flag which does not apply.
    Returns:
        a parser whose `parse(words)` returns one instance of each dataclass.
    Raises:
        UserError: trl cannot be imported.
    """
    try:
        from trl import TrlParser
    except ImportError as error:
        raise UserError(f"{script} needs the package trl, which cannot be imported: {error}") from error

    class Parser(TrlParser):
        """TRL's parser, whose errors are one sentence."""

        def error(self, message):
            prefix = "unrecognized arguments: "
            if message.startswith(prefix):
                given = [word for word in message[len(prefix) :].split() if word.startswith("-")]
                raise unknown_flag((given or [message[len(prefix) :]])[0].partition("=")[0], self)
            raise UserError(message.replace("argument ", "", 1))

        def parse(self, words):
            """Return one instance of each dataclass."""
            try:
                namespace, rest = self.parse_known_args(words)
                if rest:
                    self.error("unrecognized arguments: " + " ".join(rest))
                outputs = []
                for kind in self.dataclass_types:
                    keys = {field.name for field in kind.__dataclass_fields__.values() if field.init}
                    outputs.append(kind(**{key: value for key, value in vars(namespace).items() if key in keys}))
                return tuple(outputs)
            except UserError:
                raise
            except (ValueError, TypeError, ImportError) as error:
                raise UserError(str(error)) from error

    parser = Parser(dataclass_types, allow_abbrev=False, prog=script)
    # Takes the place, and the value, of a published flag that changes nothing.
    parser.add_argument("--ignored", nargs="?", help=argparse.SUPPRESS)
    return parser


def unknown_option(flag, parser, advice):
    """Return the UserError for a flag that a parser does not have, with the nearest one and where to look."""
    known = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    error = unknown_name("flag", flag, sorted(known))
    return UserError(str(error).split(" Known:")[0] + f" ({advice} lists all)")


def config_words(config, parser, unknown_flag):
    """Write a config as words before the command line's own, so that both are checked alike and flags win."""
    known = {action.dest: action for action in parser._actions}
    words = []
    for name, value in config.items():
        if name not in known:
            raise unknown_flag(f"--{name}", parser)
        if value is None:
            continue
        if isinstance(value, list):
            words += [f"--{name}", *[str(item) for item in value]]
        else:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
