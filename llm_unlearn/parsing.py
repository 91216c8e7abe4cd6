"""The command line: the method first, then only that method's flags, with the ACL 2024 names folded in."""

import argparse
import json
import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path

from llm_unlearn.arguments import ACCEPTED, REFUSED, RENAMED, SHARED_FLAGS, DataFlags, ModelFlags, RunFlags
from llm_unlearn.data.splits import domain_names
from llm_unlearn.errors import UserError, unknown_name
from llm_unlearn.methods import METHODS, describe, trainer_class

_RIVALS = (("warmup_ratio", "warmup_steps"), ("positive_factor", "retain_weight"))


@dataclass
class Parsed:
    """A parsed command line.

    Attributes:
        method: id of the method.
        trainer: its Trainer subclass.
        args: its arguments.
        model: ModelFlags and TRL's ModelConfig in one object.
        data: DataFlags.
        words: the command line as it was given.
        notes: sentences to log about flags that changed nothing.
        context_length: tokens that the model reads at most; filled in when its config is read.
        fingerprint: function that returns the start model's fingerprint; filled in with it.
    """

    method: str
    trainer: type
    args: object
    model: object
    data: DataFlags
    words: list
    notes: list
    context_length: int | None = None
    fingerprint: object = None


def parse(argv):
    """Parse the command line of run_unlearn.py.

    Args:
        argv: list of words; `--config FILE` (YAML or JSON) or one positional FILE.json gives defaults, flags win.
    Returns:
        Parsed, or None where `--help` was asked for (and printed).
    Raises:
        UserError: unknown method, a flag that does not apply, a bad value, an unreadable config.
    """
    given = list(argv)
    argv, config = _split_config(given)
    notes = []
    config = {name: value for key, value in config.items() for name, value in _fold(key, value, notes)}
    argv = [word for part in argv for word in _fold_word(part, notes)]
    method = _method(argv, config)
    if not method:
        if "-h" in argv or "--help" in argv:
            sys.stdout.write(overview())
            return None
        raise UserError(f"--unlearn_method is missing; known: {', '.join(METHODS)}")
    trainer = trainer_class(method)
    parser = _parser(trainer.args_class, method)
    words = [*_config_words(_without_rivals(config, argv), parser, method), *argv]
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        return None
    try:
        _, data, model, args = parser.parse_args_into_dataclasses(words)
    except UserError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(str(error)) from error
    return Parsed(method, trainer, args, model, data, given, notes)


def overview():
    """Return the help without a method: methods, domains and our own flags; imports no torch."""
    lines = [
        "Make a causal language model forget.",
        "",
        "usage: run_unlearn.py --unlearn_method METHOD --target_model_name_or_path MODEL --domain DOMAIN [flags]",
        "       run_unlearn.py --unlearn_method METHOD --help      every flag that applies to the method",
        "       run_unlearn.py --config recipes/tofu/npo.yaml --target_model_name_or_path MODEL",
        "",
        "methods:",
    ]
    own = {}
    for method in METHODS:
        summary, flags = describe(method)
        lines.append(f"  {method:<26} {summary}")
        for name, text in flags.items():
            own.setdefault((name, text), []).append(method)
    lines += ["", "domains:", "  " + ", ".join(domain_names()), "", "flags of every method:"]
    for group in SHARED_FLAGS:
        lines += [_line(name, field.metadata["help"]) for name, field in group.__dataclass_fields__.items()]
    lines += ["", "flags of single methods:"]
    lines += [_line(name, f"{text} [{', '.join(methods)}]") for (name, text), methods in own.items()]
    lines += [
        _line("retain_loss", "nll, kl or none: what holds the retain set in place. [grad_diff, npo, simnpo]"),
        _line("forget_weight, --retain_weight", "Weights of the two terms. [grad_diff, npo, simnpo, ascent_plus_*]"),
        "",
        "and every flag of transformers' TrainingArguments and of TRL's ModelConfig (--use_peft, --lora_r, ...).",
        "",
    ]
    return "\n".join(lines)


def _line(name, text):
    return f"  --{name:<36} {text}"


def _split_config(argv):
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


def _fold(name, value, notes):
    """Yield the (name, value) that a flag becomes: renamed, refused, or dropped with a note."""
    if name in REFUSED:
        raise UserError(f"--{name} has no effect here: {REFUSED[name]}")
    if name in ACCEPTED:
        notes.append(f"--{name} changes nothing: {ACCEPTED[name]}")
        return
    if name == "fsdp" and value is True:
        value = "full_shard auto_wrap"
    yield RENAMED.get(name, name), value


def _fold_word(word, notes):
    """Fold one word of the command line; the value of a flag that is dropped or refused is written behind '='."""
    if not word.startswith("--"):
        return [word]
    name, sign, value = word[2:].partition("=")
    folded = list(_fold(name, value, notes))
    return [f"--{folded[0][0]}{sign}{value}"] if folded else [f"--ignored{sign}{value}"]


def _method(argv, config):
    """Return the last --unlearn_method of the command line, else the config's."""
    found = config.get("unlearn_method")
    for number, word in enumerate(argv):
        name, sign, value = word.partition("=")
        if name.replace("-", "_") == "__unlearn_method":
            found = value if sign else (argv[number + 1] if number + 1 < len(argv) else None)
    if found is not None and not isinstance(found, str):
        raise unknown_name("--unlearn_method", found, METHODS)
    return found


def _parser(args_class, method):
    try:
        from trl import ModelConfig, TrlParser
    except ImportError as error:
        raise UserError(f"run_unlearn.py needs the package trl, which cannot be imported: {error}") from error

    class Parser(TrlParser):
        """TRL's parser, whose errors are one sentence."""

        def error(self, message):
            prefix = "unrecognized arguments: "
            if message.startswith(prefix):
                given = [word for word in message[len(prefix) :].split() if word.startswith("-")]
                raise _does_not_apply((given or [message[len(prefix) :]])[0].partition("=")[0], self, method)
            raise UserError(message.replace("argument ", "", 1))

        def parse_args_into_dataclasses(self, args):
            namespace, rest = self.parse_known_args(args)
            if rest:
                self.error("unrecognized arguments: " + " ".join(rest))
            outputs = []
            for kind in self.dataclass_types:
                keys = {field.name for field in kind.__dataclass_fields__.values() if field.init}
                outputs.append(kind(**{key: value for key, value in vars(namespace).items() if key in keys}))
            return tuple(outputs)

    model_class = make_dataclass("ModelArguments", [], bases=(ModelFlags, ModelConfig))
    parser = Parser([RunFlags, DataFlags, model_class, args_class], allow_abbrev=False, prog="run_unlearn.py")
    # Takes the place, and the value, of a published flag that changes nothing.
    parser.add_argument("--ignored", nargs="?", help=argparse.SUPPRESS)
    return parser


def _does_not_apply(flag, parser, method):
    known = {option for action in parser._actions for option in action.option_strings if option.startswith("--")}
    name = flag.lstrip("-")
    owners = [other for other in METHODS if other != method and name in _own_flags(other)]
    if owners:
        return UserError(f"{flag} does not apply to {method}; it is a flag of {', '.join(owners)}")
    error = unknown_name("flag", flag, sorted(known))
    return UserError(str(error).split(" Known:")[0] + f" (run_unlearn.py --unlearn_method {method} --help lists all)")


def _without_rivals(config, argv):
    """Leave out of a config what the command line says under its other name."""
    typed = {word.partition("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    rivals = {name for pair in _RIVALS for name in pair if set(pair) & typed}
    return {name: value for name, value in config.items() if name not in rivals or name in typed}


def _own_flags(method):
    _, flags = describe(method)
    return set(trainer_class(method).args_class.__dataclass_fields__) - set(
        trainer_class("gradient_ascent").args_class.__dataclass_fields__
    ) | set(flags)


def _config_words(config, parser, method):
    """Write a config as words before the command line's own, so that both are checked alike and flags win."""
    known = {action.dest: action for action in parser._actions}
    words = []
    for name, value in config.items():
        if name not in known:
            raise _does_not_apply(f"--{name}", parser, method)
        if value is None:
            continue
        if isinstance(value, list):
            words += [f"--{name}", *[str(item) for item in value]]
        else:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
