"""Relearning: a few rows of the forget set, a few steps, three learning rates. Does the rest come back?

python -m llm_unlearn.cli.relearn --model_name M --domain D --target_model T --output_dir DIR
"""

from dataclasses import dataclass
from typing import ClassVar

from llm_unlearn.arguments import flag
from llm_unlearn.cli.tamper import TamperFlags, attack
from llm_unlearn.errors import run_script
from llm_unlearn.processes import end_process


@dataclass
class RelearnFlags(TamperFlags):
    """Flags of this script: those of tamper, short by default."""

    default_sweep: ClassVar[str | None] = "lr=1e-5,2e-5,8e-5"

    num_train_examples: int = flag(
        64, "Sequences, or chunks of documents, to train on; more than there are go round again. 0: all, once."
    )
    max_steps: int = flag(100, "Optimizer steps; -1 leaves it to --epochs.")
    lr: float = flag(2e-5, "Learning rate; without it and without --sweep all of 1e-5, 2e-5 and 8e-5 are tried.")


def main(argv=None):
    """Relearn on one checkpoint; see `llm_unlearn.cli.tamper.main`."""
    return run_script(run, argv)


def run(argv):
    """Do what `main` does, errors raised; see there."""
    attack(argv, RelearnFlags, "relearn")


if __name__ == "__main__":
    end_process(main())
