"""Tampering: fine-tune a model that has unlearned, and watch what comes back.

python -m llm_unlearn.cli.tamper --model_name M --domain D --target_model T --output_dir DIR --num_train_examples 512
"""

import logging
import time
from dataclasses import dataclass
from typing import ClassVar

from llm_unlearn.arguments import flag
from llm_unlearn.attacks.curve_files import redraw
from llm_unlearn.attacks.parsing import AttackFlags, parse_attack
from llm_unlearn.attacks.sweeps import configurations, join_sweeps, with_changes
from llm_unlearn.attacks.training_flags import FinetuningFlags, finetuning_settings, require_float32
from llm_unlearn.cli.scoring import prepare, say_notes, show_results
from llm_unlearn.errors import UserError, run_script
from llm_unlearn.processes import end_process, set_up_logging

logger = logging.getLogger("llm_unlearn")


@dataclass
class TamperFlags(FinetuningFlags, AttackFlags):
    """Flags of this script, with the published defaults."""

    default_sweep: ClassVar[str | None] = None

    tamper_data: str = flag(
        "forget",
        "What to train on: forget, the forget set; related, its topic; benign, something else; retain; a file; or a "
        "mixture of these, forget=0.5,benign=0.5, in shares of sequences.",
    )
    benign_data: str | None = flag(
        None, "The rows that 'benign' names: a file or hub:...; default: the retain set of the general domain."
    )
    sweep: str | None = flag(
        None,
        "Several attacks, all combinations: lr=1e-5,2e-5 for one flag, 'lr=1e-5,2e-5;lr_scheduler=linear,cosine' for "
        "two; each goes into its own subfolder. May be given several times.",
    )
    repair_steps: int = flag(
        0,
        "Train on --repair_data so many steps before the attack: a model that is only destroyed comes back with it. "
        "Its rows have negative steps; step 0 is after the repair.",
    )
    repair_data: str = flag("retain", "What the repair trains on: retain, benign, or a file.")
    utility_data: str | None = flag(
        None, "File of question and answer, text or multiple choice that is scored besides, as the set 'utility'."
    )
    stop_at_recovery: float | None = flag(
        None, "End an attack when it has regained this share of what the target model knew; needs --target_model."
    )
    resume_from_checkpoint: str | None = flag(
        None, "auto: go on with an attack that was killed; what is finished is not repeated."
    )
    plot_only: str | None = flag(
        None, "Only draw a tamper_results_*.json, or a results.json, anew; loads neither model nor torch."
    )
    title: str | None = flag(None, "Title of the plot; \\n breaks the line.")
    output_dir: str | None = flag(
        None, "Where everything goes; default: <script>/<domain> in the model's folder, or below eval_results/<model>."
    )
    seed: int = flag(42, "Seed of the order of the rows, of an adapter, and of the bootstrap.")

    @property
    def resume(self):
        """Whether an earlier run is continued."""
        return self.resume_from_checkpoint is not None and self.resume_from_checkpoint.lower() not in ("false", "none")


def main(argv=None):
    """Attack one checkpoint by fine-tuning.

    Args:
        argv: list of words; None takes the process's own.
    Returns:
        int exit code: 0 done, 2 the user's mistake, 143 stopped by SIGTERM with a checkpoint.
    """
    return run_script(run, argv)


def run(argv):
    """Do what `main` does, errors raised; see there."""
    attack(argv, TamperFlags, "tamper")


def attack(words, flags_class, kind):
    """Do what a command line of tamper or relearn asks for.

    Args:
        words: list of str.
        flags_class: TamperFlags or a descendant with other defaults.
        kind: "tamper" or "relearn".
    Raises:
        UserError: the user's mistake.
    """
    words = join_sweeps(words)
    asked = value_of(words, "--plot_only")
    if asked is not None and not {"-h", "--help"} & set(words):
        set_up_logging()
        logger.info("the plot is %s", redraw(asked, value_of(words, "--title")))
        return
    parsed = parse_attack(words, flags_class, f"python -m llm_unlearn.cli.{kind}")
    if parsed is None:
        return
    say_notes(parsed)
    flags = parsed.flags
    says_rate = given(words, "--lr") or flags.lr != flags_class.lr
    if flags.sweep is None and not says_rate:
        flags.sweep = flags.default_sweep
    chosen = configurations(flags.sweep, flags)
    check_flags(parsed, chosen)
    _attack(parsed, chosen, kind)


def _attack(parsed, chosen, kind):
    from llm_unlearn.attacks.tampering import Tampering

    started = time.time()
    folder, device = prepare(parsed, kind)
    attacks = Tampering(parsed, kind, chosen, folder, device)
    if not parsed.flags.do_eval:
        logger.info("--do_eval False: model and data are in order, nothing was attacked")
        return
    attacks.measure_target()
    record = attacks.run()
    if len(chosen) > 1:
        logger.info("strongest of %d attacks: %s", len(chosen), record["strongest"])
    logger.info("%.0f s", time.time() - started)
    show_results(record, folder)


def check_flags(parsed, chosen):
    """Refuse a command line before anything is loaded.

    Args:
        parsed: ParsedEvaluation.
        chosen: list of sweeps.Configuration.
    Raises:
        UserError: naming the flag.
    """
    flags = parsed.flags
    require_float32(parsed)
    for one in chosen:
        own = with_changes(parsed, one)
        finetuning_settings(own)
        if own.flags.repair_steps < 0:
            raise UserError(f"--repair_steps must not be negative, but is {own.flags.repair_steps}")
    if flags.stop_at_recovery is not None and not 0 < flags.stop_at_recovery < float("inf"):
        raise UserError(f"--stop_at_recovery must be above 0, but is {flags.stop_at_recovery}; pass 0.9 for example")
    if flags.stop_at_recovery is not None and not flags.target_model:
        raise UserError("--stop_at_recovery needs the level that is to be regained; pass --target_model FOLDER")
    if flags.resume_from_checkpoint not in (None, "auto", "True", "true", "False", "false"):
        raise UserError(
            f"--resume_from_checkpoint '{flags.resume_from_checkpoint}': an attack resumes from its own folder; pass "
            "auto and the same --output_dir"
        )


def value_of(words, name):
    """Return the value that a command line gives a flag, or None; the last one counts.

    Raises:
        UserError: the flag stands there without a value.
    """
    found = None
    for number, word in enumerate(words):
        if word.startswith(f"{name}="):
            found = word.partition("=")[2]
        elif word == name:
            following = words[number + 1] if number + 1 < len(words) else ""
            if not following or following.startswith("--"):
                raise UserError(f"{name} needs a value")
            found = following
    return found


def given(words, name):
    """Return whether a flag stands on a command line."""
    return any(word == name or word.startswith(f"{name}=") for word in words)


if __name__ == "__main__":
    end_process(main())
