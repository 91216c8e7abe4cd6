"""What was asked for on SOUL's, WAGLE's and ILU's command line: keys of a file and typed ones, checked."""

import logging
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn.cli.launching import require_number
from llm_unlearn.cli.published_soul_tables import (
    CONFIGURATIONS,
    DEFAULTS,
    FORGET_SETS,
    LOSSES,
    NO_EFFECT,
    NUMBERS,
    OTHERS,
    REFUSED,
    REFUSED_LOSSES,
    REFUSED_RETAIN_SETS,
    RETAIN_SETS,
    Known,
)
from llm_unlearn.command_line import load_json
from llm_unlearn.errors import UserError, unknown_name

logger = logging.getLogger("llm_unlearn.unlearn_model")

METHOD, MODEL, MASK = "unlearn.unlearn_method", "overall.model_name", "unlearn.mask_path"
FORGET, RETAIN, RATIO = "dataset.forget_dataset_name", "dataset.retain_dataset_name", "dataset.forget_ratio"
SOPHIA, STEPS, EPOCHS = "unlearn.sophia", "unlearn.max_steps", "unlearn.num_epochs"
# Keys that an evaluation reads.
_EVALUATED = (MODEL, FORGET, METHOD, "overall.cache_dir", "unlearn.resume_path", "logger.name", "logger.json.root")


@dataclass
class Request:
    """What is asked for.

    Attributes:
        settings: {key: text}, defaults included.
        keys: those that become flags, besides model, mask and output folder, which always do.
        known: the published configuration whose recipe stands for a file, or None.
        name: of the run.
        extra: flags of run_unlearn.py as words.
    """

    settings: dict
    keys: set
    known: Known | None
    name: str
    extra: list

    @property
    def is_whole(self):
        """Whether everything is said by flags, and nothing by a recipe."""
        return self.known is None or self.known.recipe is None

    @property
    def loss(self):
        """The Loss that is trained on."""
        return LOSSES[self.settings[METHOD]]

    @property
    def forget(self):
        """The ForgetSet."""
        return FORGET_SETS[self.settings[FORGET]]

    def number(self, key):
        """Return the number that a key has."""
        return float(self.settings[key])

    def is_on(self, key):
        """Return whether a switch is on; 1, 0, true and false are taken."""
        given = self.settings[key].lower()
        if given not in ("1", "0", "true", "false"):
            raise UserError(f"--{key} must be true or false, but is '{self.settings[key]}'")
        return given in ("1", "true")


def read_request(path, typed, extra=()):
    """Read a configuration and what was typed over it.

    Args:
        path: of a JSON file, or the name of a published one that is not there; None for none.
        typed: {key: text}.
        extra: flags of run_unlearn.py as words.
    Returns:
        Request.
    Raises:
        UserError: an unknown key, or one that cannot be honored.
    """
    known, file = None, {}
    if path and Path(path).is_file():
        file = _flat(load_json(path))
    elif path:
        known = _published(path)
    given = {**file, **typed}
    settings = {**DEFAULTS, **(known.settings if known else {}), **given}
    for name, names, refused in ((METHOD, (*LOSSES, "origin"), REFUSED_LOSSES), (FORGET, FORGET_SETS, {}),
                                 (RETAIN, (*RETAIN_SETS, *REFUSED_RETAIN_SETS), {})):  # fmt: skip
        if settings[name] in refused:
            raise UserError(f"--{name} {settings[name]} is not offered: {refused[settings[name]]}")
        if settings[name] not in names:
            raise unknown_name(f"--{name}", settings[name], names)
    _check_keys(settings, given, typed, known)
    for key in given:
        if key in NO_EFFECT:
            logger.info("--%s changes nothing: %s", key, NO_EFFECT[key])
    stands_in = known is not None and known.recipe is not None
    keys = set(typed) if stands_in else set(settings)
    return Request(settings, keys, known, Path(path).stem if path else settings[METHOD], list(extra))


def _published(path):
    """Return what stands for a published configuration that is not there."""
    folder, stem = Path(path).parent.name.lower(), Path(path).stem
    found = CONFIGURATIONS.get((folder, stem)) or CONFIGURATIONS.get((folder, f"{stem}+WAGLE"))
    if found is None:
        names = ", ".join(f"configs/{folder}/{stem}.json" for folder, stem in CONFIGURATIONS)
        raise UserError(f"--config_file '{path}' does not exist, and no recipe stands for it; known: {names}")
    return found


def _flat(part, prefix=""):
    """Return {key with dots: text} of nested objects, without what is null."""
    if not isinstance(part, dict):
        raise UserError('--config_file must hold an object of sections, as in {"unlearn": {"lr": 1e-5}}')
    found = {}
    for name, value in part.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = str(value)
    return found


def typed_keys(words):
    """Return {key: text} of words --section.key VALUE or --section.key=VALUE."""
    found, words = {}, iter(words)
    for word in words:
        key, sign, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in key:
            raise UserError(f"unrecognized argument '{word}'; keys are --section.key VALUE, and flags of "
                            "run_unlearn.py go into --extra '...'")  # fmt: skip
        value = value if sign else next(words, None)
        if value is None:
            raise UserError(f"--{key} needs a value")
        found[key] = value
    return found


def _check_keys(settings, given, typed, known):
    sections = {f"unlearn.{name}.{key}": name for name, loss in LOSSES.items() for key in loss.section}
    names = (*NUMBERS, *OTHERS, *NO_EFFECT, *REFUSED, *sections)
    trains = settings[METHOD] != "origin" and "unlearn.resume_path" not in settings
    for key, value in given.items():
        if key in REFUSED and value.lower() not in ("false", "0", "none"):
            raise UserError(f"--{key} {value} is not offered: {REFUSED[key]}")
        if key not in names:
            raise unknown_name("key", f"--{key}", [f"--{name}" for name in names])
        if key in typed and sections.get(key, settings[METHOD]) != settings[METHOD]:
            raise UserError(f"--{key} has no effect with --{METHOD} {settings[METHOD]}")
        if key in typed and not trains and key not in (*_EVALUATED, *NO_EFFECT):
            raise UserError(f"--{key} has no effect where nothing is trained, but evaluated")
    for key in (METHOD, SOPHIA):
        if known and key in typed and typed[key] != known.settings.get(key, DEFAULTS[key]):
            raise UserError(
                f"--{key} {typed[key]} has no effect, because a recipe stands for the configuration; write the JSON "
                "file, or name another published one"
            )
    params = [key for key in typed if key.startswith("unlearn.sophia_params.")]
    if params and settings[SOPHIA].lower() in ("false", "0"):
        raise UserError(f"--{params[0]} has no effect without --{SOPHIA} true")
    if trains and known is None and "unlearn.weight_decay" not in settings:
        raise UserError("--unlearn.weight_decay is missing: 0.1 by default in SOUL and 0.0 in WAGLE; say which")
    numbers = {**{key: least for key, (_, least) in NUMBERS.items()}, STEPS: -1, RATIO: 0, "unlearn.mu": 0}
    numbers |= {f"unlearn.sophia_params.{name}": 0 for name in ("betas_low", "betas_high", "rho")}
    for key, least in numbers.items():
        require_number(key, settings.get(key), least)
