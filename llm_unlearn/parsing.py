"""The command line: the method first, then only that method's flags, with the ACL 2024 names folded in."""

import sys
from dataclasses import dataclass, make_dataclass

from llm_unlearn.arguments import ACCEPTED, REFUSED, RENAMED, SHARED_FLAGS, DataFlags, ModelFlags, RunFlags
from llm_unlearn.command_line import Folds, config_words, make_parser, split_config, unknown_option
from llm_unlearn.data.splits import domain_names
from llm_unlearn.errors import UserError, unknown_name
from llm_unlearn.methods import METHODS, describe, trainer_class

_FOLDS = Folds(RENAMED, REFUSED, ACCEPTED)
_NAMED_OWNERS = 6
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
    argv, config = split_config(given)
    notes = []
    config = {name: value for key, value in config.items() for name, value in _FOLDS.pairs(key, value, notes)}
    argv = [_FOLDS.word(word, notes) for word in argv]
    method = _method(argv, config)
    if not method:
        if "-h" in argv or "--help" in argv:
            sys.stdout.write(overview())
            return None
        raise UserError(f"--unlearn_method is missing; known: {', '.join(METHODS)}")
    trainer = trainer_class(method)
    parser = _parser(trainer.args_class, method)
    words = [*config_words(_without_rivals(config, argv), parser, _does_not_apply(method)), *argv]
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        return None
    _, data, model, args = parser.parse(words)
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
        _line("retain_loss", "nll, kl or none: what holds the retain set in place. [methods with a retain term]"),
        _line("forget_weight, --retain_weight", "Weights of the two terms. [methods with a retain term]"),
        "",
        "and every flag of transformers' TrainingArguments and of TRL's ModelConfig (--use_peft, --lora_r, ...).",
        "",
    ]
    return "\n".join(lines)


def _line(name, text):
    return f"  --{name:<36} {text}"


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
        from trl import ModelConfig
    except ImportError as error:
        raise UserError(f"run_unlearn.py needs the package trl, which cannot be imported: {error}") from error

    model_class = make_dataclass("ModelArguments", [], bases=(ModelFlags, ModelConfig))
    return make_parser([RunFlags, DataFlags, model_class, args_class], "run_unlearn.py", _does_not_apply(method))


def _does_not_apply(method):
    """Return the function that says which other method a flag belongs to."""

    def unknown_flag(flag, parser):
        name = flag.lstrip("-")
        owners = [other for other in METHODS if other != method and name in _own_flags(other)]
        if owners:
            named, others = owners[:_NAMED_OWNERS], len(owners) - _NAMED_OWNERS
            more = f" and {others} others" if others > 0 else ""
            return UserError(f"{flag} does not apply to {method}; it is a flag of {', '.join(named)}{more}")
        return unknown_option(flag, parser, f"run_unlearn.py --unlearn_method {method} --help")

    return unknown_flag


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
