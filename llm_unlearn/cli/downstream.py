"""Fine-tune an unlearned model on tasks that have nothing to do with it, and see whether the forgotten comes back.

python -m llm_unlearn.cli.downstream --model_name_or_path CKPT --domain D --target_model T --tasks gsm8k,sst2 \
    [--task_dir DIR] [--task NAME=FILE] [--num_train_examples 1000]
"""

import dataclasses
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

from llm_unlearn.arguments import flag
from llm_unlearn.attacks.parsing import AttackFlags, parse_attack
from llm_unlearn.attacks.training_flags import FinetuningFlags, finetuning_settings
from llm_unlearn.cli.scoring import prepare, say_notes, show_results
from llm_unlearn.errors import UserError, run_script

SCRIPT = "python -m llm_unlearn.cli.downstream"
logger = logging.getLogger("llm_unlearn")


@dataclass
class DownstreamFlags(FinetuningFlags, AttackFlags):
    """Flags of this script."""

    tasks: str | None = flag(
        None, "Tasks by name, separated by commas: gsm8k, agnews, sst2, winogrande, mnli, qqp; from the Hub."
    )
    task: list[str] = field(
        default_factory=list,
        metadata={
            "help": "NAME=FILE, a task of your own, or one of the names with your rows; NAME=FOLDER takes its train.* "
            "and test.* or validation.*. Give it once with several words, or several times.",
            "action": "extend",
        },
    )
    task_dir: str | None = flag(
        None, "Folder with <name>/train.jsonl, and <name>/test.jsonl or validation.jsonl, in place of the Hub."
    )
    checkpoints: int = flag(3, "How many evaluations on the way, evenly spaced, the last one at the end.")
    checkpoint_steps: str | None = flag(None, "Optimizer steps of these instead, as in 10,30,100; the end is added.")
    max_held_out: int = flag(500, "Held-out rows of each task that are scored, the first ones; 0: all.")
    exact_answers: bool = flag(
        False, "Generate free answers, GSM8K's for example, and compare their result; without it their tokens count."
    )
    max_new_tokens: int = flag(256, "Tokens of a generated answer at most.")


def main(argv=None):
    """Fine-tune one checkpoint on each task; returns the exit code, see `run_script`."""
    return run_script(run, argv)


def run(argv):
    """Do what `main` does, errors raised; see there."""
    parsed = parse_attack(argv, DownstreamFlags, SCRIPT)
    if parsed is None:
        return
    say_notes(parsed)
    from llm_unlearn.attacks.downstream import Downstream
    from llm_unlearn.attacks.downstream_metrics import read_steps

    started, flags = time.time(), parsed.flags
    settings = finetuning_settings(parsed)
    _check(flags, read_steps(flags.checkpoint_steps))
    folder, device = prepare(parsed, "downstream")
    tasks = _load_tasks(parsed)
    attack = Downstream(parsed, folder, device, dataclasses.replace(settings, use_cpu=flags.use_cpu))
    if not flags.do_eval:
        logger.info("--do_eval False: model, data and tasks are in order, nothing was trained")
        return
    record = attack.run(tasks, started)
    show_results(record, folder)


def _check(flags, steps):
    if not flags.tasks and not flags.task:
        raise UserError("no task was named; pass --tasks gsm8k,sst2 or --task NAME=FILE")
    if flags.task_dir and not flags.tasks:
        raise UserError("--task_dir has no effect without --tasks")
    if flags.task_dir and not Path(flags.task_dir).is_dir():
        raise UserError(f"--task_dir '{flags.task_dir}' is not a folder")
    if flags.checkpoints < 1:
        raise UserError(f"--checkpoints must be at least 1, but is {flags.checkpoints}")
    if steps and flags.checkpoints != DownstreamFlags.checkpoints:
        raise UserError("--checkpoints and --checkpoint_steps contradict each other; pass one of them")
    if flags.eval_every != FinetuningFlags.eval_every:
        raise UserError("--eval_every has no effect here; pass --checkpoints or --checkpoint_steps")
    if flags.max_held_out < 0:
        raise UserError(f"--max_held_out must not be negative, but is {flags.max_held_out}")


def _load_tasks(parsed):
    from llm_unlearn.attacks.downstream_tasks import load_tasks
    from llm_unlearn.data.sources import HubOptions

    flags, data = parsed.flags, parsed.data
    names = [name.strip() for name in (flags.tasks or "").split(",") if name.strip()]
    hub = HubOptions(cache_dir=data.cache_dir, token=data.token)
    # --data_dir replaces the Hub for everything; a domain's own folder need not hold tasks.
    folder = flags.task_dir or data.data_dir
    return load_tasks(names, flags.task, folder, hub, flags.num_train_examples, flags.max_held_out or None)


if __name__ == "__main__":
    raise SystemExit(main())
