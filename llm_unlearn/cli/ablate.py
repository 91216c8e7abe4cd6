"""The retain-term ablation as one command: tune a method, drop its retain term, tamper with both models.

python -m llm_unlearn.cli.ablate --target_model T --domain D --config recipe.yaml --tune learning_rate=1e-4,3e-4 \
    [--gold G] [--max_steps 100 --lr 2e-5] -- [flags of run_unlearn.py]
"""

import dataclasses
import logging
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

from llm_unlearn.arguments import DataFlags, flag
from llm_unlearn.attacks.parsing import AttackFlags, parse_attack
from llm_unlearn.attacks.training_flags import FinetuningFlags, finetuning_settings
from llm_unlearn.cli.scoring import finish_processes, say_notes, start_processes
from llm_unlearn.errors import UserError, run_script

SCRIPT = "python -m llm_unlearn.cli.ablate"
logger = logging.getLogger("llm_unlearn")


@dataclass
class AblationFlags(FinetuningFlags, AttackFlags):
    """Flags of this script; what follows -- goes to run_unlearn.py, and so does --config."""

    tune: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME=VALUE,VALUE: values of a flag of run_unlearn.py to choose from, learning_rate=1e-4,3e-4 for "
            "example; several words, or the flag several times, make every combination.",
            "action": "extend",
        },
    )
    gold: str | None = flag(None, "The model retrained without the forget set, which is tampered with as well.")
    min_retained: float = flag(0.9, "Share of the target model's utility that a run must keep to be chosen, in (0, 1].")
    forget_metric: str | None = flag(
        None, "What the chosen run has least of; default: probability, or choice_accuracy, of the forget set."
    )
    utility_metric: str | None = flag(
        None, "What a run must keep; default: probability, or choice_accuracy, of the first set to keep."
    )


def main(argv=None):
    """Run one ablation; returns the exit code, see `run_script`."""
    return run_script(_main, argv)


def _main(argv):
    own, recipe = split_words(argv)
    parsed = parse_attack(own, AblationFlags, SCRIPT)
    if parsed is None:
        return
    parsed = dataclasses.replace(parsed, words=argv)
    say_notes(parsed)
    from accelerate import PartialState

    from llm_unlearn.attacks.ablation import Ablation
    from llm_unlearn.evaluation.loading import check_name
    from llm_unlearn.evaluation.results import check_output_directory, table

    started, flags = time.time(), parsed.flags
    settings = finetuning_settings(parsed)
    _check(flags, recipe)
    target, domain = parsed.model.model_name_or_path, parsed.data.domain
    folder = Path(flags.output_dir)
    check_output_directory(folder, target, domain, flags.overwrite_output_dir, "ablate")
    for model in filter(None, (target, flags.gold)):
        check_name(model)
    words = unlearning_words(parsed, recipe)
    device = start_processes(flags)
    if PartialState().num_processes > 1:
        raise UserError(f"{SCRIPT} runs in one process, and starts every run itself; leave out torchrun")
    ablation = Ablation(parsed, words, folder, device, dataclasses.replace(settings, use_cpu=flags.use_cpu))
    if not flags.do_eval:
        logger.info("--do_eval False: every command is in order, nothing was trained")
        return
    record = ablation.run(started)
    sys.stdout.write(f"{table(record)}{record['finding']}\n")
    sys.stdout.flush()
    logger.info("the results are in %s", folder / "results.json")
    finish_processes()


def split_words(argv):
    """Split a command line into this script's flags and those of run_unlearn.py.

    Args:
        argv: list of words; what follows `--`, and `--config FILE`, belong to run_unlearn.py.
    Returns:
        (own words, words of the recipe); --target_model stands for the model too.
    Raises:
        UserError: --config without a file.
    """
    place = argv.index("--") if "--" in argv else len(argv)
    own, recipe, iterator = [], [], iter(argv[:place])
    for word in iterator:
        if word == "--config":
            path = next(iterator, None)
            if path is None:
                raise UserError("--config needs a file")
            recipe += [word, path]
        elif word.startswith("--config="):
            recipe.append(word)
        else:
            own.append(word)
    target = next((own[n + 1] for n, word in enumerate(own[:-1]) if word == "--target_model"), None)
    target = target or next((word.partition("=")[2] for word in own if word.startswith("--target_model=")), None)
    names = {word.partition("=")[0] for word in own}
    if target and not names & {"--model_name_or_path", "--model_name"}:
        own += ["--model_name_or_path", target]
    return own, [*recipe, *argv[place + 1 :]]


def unlearning_words(parsed, recipe):
    """Return the command line that every run of run_unlearn.py shares.

    Args:
        parsed: ParsedEvaluation; its data flags say what every run forgets and keeps.
        recipe: words of the recipe, whose flags win.
    """
    data = [
        f"--{known.name}={getattr(parsed.data, known.name)}"
        for known in fields(DataFlags)
        if getattr(parsed.data, known.name) != known.default
    ]
    own = ["--use_cpu", "True"] if parsed.flags.use_cpu else []
    return [*data, *own, *recipe, "--target_model_name_or_path", parsed.model.model_name_or_path]


def _check(flags, recipe):
    if not recipe:
        raise UserError("there is no recipe; pass --config recipe.yaml, or the flags of run_unlearn.py after --")
    if not flags.output_dir:
        raise UserError("--output_dir is missing: the runs of the ablation go there, and are found there again")
    if not 0 < flags.min_retained <= 1:
        raise UserError(f"--min_retained must lie in (0, 1], but is {flags.min_retained}")


if __name__ == "__main__":
    raise SystemExit(main())
