"""The command lines of the attack scripts: their own flags beside those of run_eval.py."""

from dataclasses import dataclass, fields

from llm_unlearn.arguments import EVAL_ACCEPTED, EVAL_REFUSED, EVAL_RENAMED, ScoringFlags, flag
from llm_unlearn.command_line import Folds
from llm_unlearn.data.splits import domain_names
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.parsing import parse_scoring

_REFUSED = {
    **EVAL_REFUSED,
    "fsdp": "every process holds the whole model",
    "deepspeed": "every process holds the whole model",
}


@dataclass
class AttackFlags(ScoringFlags):
    """Flags of every attack script."""

    target_model: str | None = flag(
        None, "The model before it unlearned: what it knows is the level that a recovery is measured against."
    )


def parse_attack(argv, flags_class, script):
    """Parse the command line of an attack script.

    Args:
        argv: list of words; `--config FILE` gives defaults, flags win. `--model_name` stands for --model_name_or_path.
        flags_class: dataclass of the script's flags, an AttackFlags.
        script: its name, for the help.
    Returns:
        ParsedEvaluation whose `flags` are of that class, or None where `--help` was asked for (and printed).
    Raises:
        UserError: no model, no domain, a flag that does not apply, a bad value.
    """
    own = {field.name for field in fields(flags_class)}
    renamed = {**EVAL_RENAMED, "model_name": "model_name_or_path"}
    # What run_eval.py passes over in silence may be a flag of an attack that trains.
    tables = ({name: said for name, said in table.items() if name not in own} for table in (_REFUSED, EVAL_ACCEPTED))
    folds = Folds({name: to for name, to in renamed.items() if name not in own}, *tables)
    parsed = parse_scoring(argv, flags_class, script, folds)
    if parsed is not None and parsed.data.domain is None:
        raise UserError(f"--domain is missing; known: {', '.join(domain_names())}")
    if parsed is not None and parsed.flags.target_model:
        parsed.flags.target_model = parsed.flags.target_model.rstrip("/") or "/"
    return parsed
