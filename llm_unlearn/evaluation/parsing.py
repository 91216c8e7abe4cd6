"""The command lines of run_eval.py and run_mia.py: our flags, TRL's ModelConfig, and the ACL 2024 names folded in."""

from dataclasses import dataclass, field, fields, make_dataclass

from llm_unlearn.arguments import (
    EVAL_ACCEPTED,
    EVAL_REFUSED,
    EVAL_RENAMED,
    DataFlags,
    EvalFlags,
    MIAFlags,
    ScoringFlags,
    TokenizerFlags,
    flag,
)
from llm_unlearn.command_line import Folds, config_words, make_parser, split_config, unknown_option
from llm_unlearn.data.splits import domain_names
from llm_unlearn.errors import UserError, unknown_name

SCRIPT, MIA_SCRIPT = "run_eval.py", "run_mia.py"
_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass
class ParsedEvaluation:
    """A parsed command line of a script that scores.

    Attributes:
        flags: EvalFlags or MIAFlags.
        data: DataFlags.
        model: TokenizerFlags and TRL's ModelConfig in one object.
        words: the command line as it was given.
        notes: sentences to log about flags that changed nothing.
        cleared: folders of results that were deleted because --overwrite_cache asks for it.
    """

    flags: ScoringFlags
    data: DataFlags
    model: object
    words: list
    notes: list
    cleared: set = field(default_factory=set)


def parse_evaluation(argv):
    """Parse the command line of run_eval.py.

    Args:
        argv: list of words; `--config FILE` or one positional FILE.json gives defaults, flags win.
    Returns:
        ParsedEvaluation, or None where `--help` was asked for (and printed).
    Raises:
        UserError: no model, a flag that does not apply, a bad value, flags that contradict each other.
    """
    parsed = parse_scoring(argv, EvalFlags, SCRIPT)
    if parsed is not None:
        _check_evaluation(parsed.flags, parsed.data)
    return parsed


def parse_mia(argv):
    """Parse the command line of run_mia.py; see `parse_evaluation`."""
    parsed = parse_scoring(argv, MIAFlags, MIA_SCRIPT)
    if parsed is not None and parsed.data.domain is None:
        raise UserError(f"--domain is missing; known: {', '.join(domain_names())}")
    return parsed


def parse_scoring(argv, flags_class, script, folds=None):
    """Parse the command line of a script that scores a checkpoint; see `parse_evaluation`.

    Args:
        argv: list of words.
        flags_class: dataclass of the script's own flags, a ScoringFlags.
        script: its name.
        folds: Folds of older names; None takes those of run_eval.py.
    """
    given, notes = list(argv), []
    folds = folds or Folds(EVAL_RENAMED, EVAL_REFUSED, EVAL_ACCEPTED)
    argv, config = split_config(given)
    config = {name: value for key, value in config.items() for name, value in folds.pairs(key, value, notes)}
    argv = [folds.word(word, notes) for word in argv]

    def unknown(name, parser):
        return unknown_option(name, parser, f"{script} --help")

    parser = _parser(flags_class, script, unknown)
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        return None
    flags, data, model = parser.parse([*config_words(config, parser, unknown), *argv])
    _check(flags, data, model)
    return ParsedEvaluation(flags, data, model, given, notes)


def _parser(flags_class, script, unknown):
    try:
        from trl import ModelConfig
    except ImportError as error:
        raise UserError(f"{script} needs the package trl, which cannot be imported: {error}") from error

    dtype = flag("auto", "Precision of the weights: auto (the checkpoint's), float32, bfloat16, float16, float64.")
    # A script that trains says itself what --lora_r is; the parser passes over a field that no value is given to.
    own = {own.name for own in fields(flags_class)}
    hidden = [(f.name, f.type, field(default=f.default, init=False)) for f in fields(ModelConfig) if f.name in own]
    bases = (TokenizerFlags, ModelConfig)
    model_class = make_dataclass("ModelArguments", [("dtype", str, dtype), *hidden], bases=bases)
    return make_parser([flags_class, DataFlags, model_class], script, unknown)


def _check_evaluation(flags, data):
    if data.domain is None and not flags.lm_eval_tasks:
        raise UserError("there is nothing to score; pass --domain DOMAIN, --lm_eval_tasks TASKS or both")
    if flags.retain_reference and flags.reference_model:
        raise UserError("--retain_reference and --reference_model exclude each other; pass one of them")
    for name in ("include_path", "lm_eval_limit", "lm_eval_data_dir"):
        if getattr(flags, name) is not None and not flags.lm_eval_tasks:
            raise UserError(f"--{name} has no effect without --lm_eval_tasks")


def _check(flags, data, model):
    if not model.model_name_or_path:
        raise UserError("no model was named; pass --model_name_or_path FOLDER_OR_HUB_NAME")
    model.model_name_or_path = model.model_name_or_path.rstrip("/") or "/"
    if model.trust_remote_code and model.model_revision == "main":
        raise UserError("--trust_remote_code True runs code from the Hub; pin it with --model_revision COMMIT")
    if model.use_peft:
        raise UserError("--use_peft trains an adapter; to score one, pass its folder as --model_name_or_path")
    for name in ("per_device_eval_batch_size", "max_new_tokens", "max_tokens_per_batch", "lm_eval_limit", "max_length"):
        value = getattr(flags, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, but is {value}")
    if not 0 <= flags.seed < 2**32:
        raise UserError(f"--seed must lie in [0, 2^32), but is {flags.seed}")
    if model.dtype not in _DTYPES:
        raise unknown_name("--dtype", model.dtype, _DTYPES)
    lora = next((f for f in fields(model) if f.name.startswith("lora_") and getattr(model, f.name) != f.default), None)
    if lora is not None:
        raise UserError(f"--{lora.name} has no effect: an adapter is scored as it was trained")
    if data.max_eval_samples is not None and data.max_eval_samples < 1:
        raise UserError(f"--max_eval_samples must be at least 1, but is {data.max_eval_samples}")
