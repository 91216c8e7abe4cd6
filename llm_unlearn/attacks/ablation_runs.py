"""The unlearning runs of the retain-term ablation: a grid of commands, and the one without its retain term."""

import itertools
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn.errors import UserError

logger = logging.getLogger("llm_unlearn")

MADE_BY = "ablation.json"
"""File beside a model that says which command made it, of which target model and rows."""
_WEIGHT_NAMES = ("--retain_weight", "--positive_factor")


@dataclass
class Candidate:
    """One unlearning run of the ablation.

    Attributes:
        name: what it is called, its settings written out.
        settings: {flag: value} of the grid.
        words: command line of run_unlearn.py.
        folder: its output directory.
        forget: the forget metric of the model that it made, None before it ran or where it could not be computed.
        utility: the same of the utility metric.
        kept: whether an earlier run was kept.
    """

    name: str
    settings: dict
    words: list
    folder: str
    forget: float | None = None
    utility: float | None = None
    kept: bool = False

    def as_dict(self):
        """Return what results.json says of it."""
        from llm_unlearn.records import command_line

        return {
            "name": self.name, "settings": self.settings, "command": command_line(self.words), "folder": self.folder,
            "forget": self.forget, "utility": self.utility,
        }  # fmt: skip


def read_grid(words):
    """Return every combination of the values to tune.

    Args:
        words: list of NAME=VALUE,VALUE,... as `--tune` takes them; empty for the recipe as it is.
    Returns:
        list of {flag: value as text}.
    Raises:
        UserError: a word of another form, or a flag given twice.
    """
    values = {}
    for word in words:
        name, sign, listed = word.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        found = [value.strip() for value in listed.split(",") if value.strip()]
        if not (sign and name and found):
            raise UserError(f"--tune takes NAME=VALUE,VALUE as in learning_rate=1e-4,3e-4, but was given '{word}'")
        if name in values:
            raise UserError(f"--tune names {name} twice; write its values in one list")
        values[name] = found
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def make_candidates(words, grid, folder):
    """Return the Candidates of a grid, none run yet.

    Args:
        words: command line of run_unlearn.py without --output_dir.
        grid: of `read_grid`.
        folder: below which each has its own.
    """
    return [_candidate(words, settings, folder) for settings in grid]


def drop_retain_term(chosen, folder):
    """Return the Candidate that is the chosen one without its retain term, all else equal.

    Args:
        chosen: Candidate.
        folder: below which it lies.
    Raises:
        UserError: see `without_retain`.
    """
    words = without_retain(_without_output(chosen.words))
    return _candidate(words, chosen.settings, folder, prefix="no_retain")


def without_retain(words):
    """Return a command line of run_unlearn.py without its retain term, all else equal.

    Args:
        words: the command line.
    Returns:
        list of words; the weight of the term is 0, so that no retain set is read, and has no schedule.
    Raises:
        UserError: the method has no retain term, this recipe leaves it out, or cannot do without it; by name.
    """
    from llm_unlearn.methods import METHODS, trainer_class
    from llm_unlearn.parsing import parse

    parsed = parse(words)
    trainer, method = parsed.trainer, parsed.method
    fields = trainer.args_class.__dataclass_fields__
    if "retain" not in trainer.streams or "retain_weight" not in fields:
        able = [name for name in METHODS if _has_retain_term(trainer_class(name))]
        raise UserError(f"{method} has no retain term that could be left out; methods with one: {', '.join(able)}")
    if "retain" not in trainer.streams_for(parsed.args):
        raise UserError(f"this recipe of {method} has no retain term already; pass --retain_weight and --retain_loss")
    if not _has_retain_term(trainer):
        raise UserError(f"{method} trains on its retain term alone, so that nothing is left without it")
    dropped = [*_without(words, _WEIGHT_NAMES), "--retain_weight", "0"]
    if "retain_schedule" in fields:
        default = fields["retain_schedule"].default
        dropped = [*_without(dropped, ("--retain_schedule",)), "--retain_schedule", default]
    try:
        parse(dropped)
    except UserError as error:
        raise UserError(f"{method} does not run without its retain term: {error}") from error
    return dropped


def run_unlearning(candidate, basis):
    """Run one command of run_unlearn.py in this process, unless its folder holds what that very command made.

    Args:
        candidate: Candidate; `kept` is set.
        basis: JSON-serializable, what the run depends on besides its command; written beside the model.
    Raises:
        UserError: the command failed.
    """
    from llm_unlearn.cli.unlearn import main
    from llm_unlearn.evaluation.results import write_json
    from llm_unlearn.records import command_line

    told = {"command": command_line(candidate.words), **basis}
    folder = Path(candidate.folder)
    candidate.kept = _read(folder / MADE_BY) == told and (folder / "unlearning.json").is_file()
    if candidate.kept:
        logger.info("kept: %s", told["command"])
        return
    logger.info("$ %s", told["command"])
    (folder / MADE_BY).unlink(missing_ok=True)
    status = main(candidate.words)
    if status != 0:
        raise UserError(f"the run in '{candidate.folder}' ended with status {status}: {told['command']}")
    write_json(folder / MADE_BY, told)


def _read(path):
    """Return what a JSON file holds, None where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _has_retain_term(trainer):
    """Return whether a method has a retain term beside what else it trains on."""
    has_other = any(stream != "retain" for stream in trainer.streams)
    return has_other and "retain" in trainer.streams and "retain_weight" in trainer.args_class.__dataclass_fields__


def _candidate(words, settings, folder, prefix=""):
    name = ", ".join(f"{key}={value}" for key, value in settings.items())
    slug = re.sub(r"[^\w.=-]+", "_", "_".join([prefix or "retain", *(f"{k}={v}" for k, v in settings.items())]))
    place = str(Path(folder) / slug)
    own = [] if prefix else [word for key, value in settings.items() for word in (f"--{key}", value)]
    return Candidate(name, settings, [*words, *own, "--output_dir", place, "--overwrite_output_dir", "True"], place)


def _without_output(words):
    return _without(words, ("--output_dir", "--overwrite_output_dir"))


def _without(words, names):
    """Leave flags and their values out of a command line."""
    kept, skips = [], False
    for word in words:
        if skips and not word.startswith("--"):
            skips = False
            continue
        name, sign, _ = word.partition("=")
        is_named = name.startswith("--") and f"--{name[2:].replace('-', '_')}" in names
        skips = is_named and not sign
        if not is_named:
            kept.append(word)
    return kept
