"""What the translations of published command lines share: the words that start a run, read and run them."""

import argparse
import itertools
import math
import subprocess
import sys

from llm_unlearn.errors import UserError


class LauncherParser(argparse.ArgumentParser):
    """A parser of whole option names, with errors of one sentence.

    Args:
        prog: the script's name.
        start: how it is started, for the advice to ask it for --help.
        **kwargs: passed on to argparse.
    """

    def __init__(self, prog, start, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, formatter_class=formatter, allow_abbrev=False, **kwargs)
        self.start = start

    def error(self, message):
        """Raise a UserError instead of leaving the process."""
        raise UserError(f"{message}; {self.start} --help lists the options")


def start_words(environment):
    """Return the words that a command starts with: torchrun where NPROC says several processes, else python.

    Args:
        environment: mapping; NPROC is read, 1 where it is missing.
    Raises:
        UserError: NPROC is no number of processes.
    """
    processes = num_processes(environment)
    return ["torchrun", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]


def num_processes(environment):
    """Return how many processes NPROC asks for; see `start_words`."""
    given = environment.get("NPROC", "1")
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"NPROC must be a number of processes, but is '{given}'")
    return int(given)


def given_flags(words):
    """Return {flag: the word behind it, or ""} of a command line."""
    found = {}
    for word, following in itertools.pairwise([*words, ""]):
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            found[name.replace("-", "_")] = value if sign else following
    return found


def require_number(name, given, least):
    """Refuse a value that is no finite number >= least; None stands for one that was not given.

    Args:
        name: of the option, without dashes.
        given: str or None.
        least: number.
    Raises:
        UserError: naming the option.
    """
    try:
        valid = given is None or least <= float(given) < math.inf
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"--{name} must be a number >= {least}, but is '{given}'")


def run_words(words):
    """Run a command that begins as `start_words` has it with this Python; returns its exit status."""
    start = [sys.executable, *(["-m", "torch.distributed.run"] if words[0] == "torchrun" else [])]
    return subprocess.run([*start, *words[1:]], check=False).returncode
