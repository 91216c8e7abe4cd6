"""The errors that users see, the suggestion of a near name, and the exit codes of every script."""

import difflib
import logging
import sys

from llm_unlearn.processes import is_first_on_node, leave_process_group

EXIT_OK, EXIT_FAILURE, EXIT_USER_ERROR, EXIT_PUSH_FAILED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130
# 128 + SIGTERM, as a shell reports a process that the signal ended.
EXIT_TERMINATED = 143

logger = logging.getLogger(__name__)


class UserError(ValueError):
    """The user's mistake, told in one sentence: what was given, what is allowed, what to type."""


class MissingSplitError(UserError):
    """A split of a domain is not where it was looked for; a run that can do without it goes on."""


class NonFiniteError(FloatingPointError):
    """A loss or a gradient became NaN or infinite; the update was not applied and nothing was saved after it."""


class PushError(RuntimeError):
    """The upload to the Hub failed after everything was saved on disk; the message holds the command to retry."""


class SavingError(RuntimeError):
    """A checkpoint could not be written; what was saved before is untouched."""


class Terminated(RuntimeError):
    """A SIGTERM stopped the run after a step; the message names the checkpoint that was saved, and how to go on."""


_EXIT_CODES = {UserError: EXIT_USER_ERROR, PushError: EXIT_PUSH_FAILED, Terminated: EXIT_TERMINATED}


def unknown_name(flag, given, known):
    """Return the UserError for an unknown name, with the nearest known one and the whole list."""
    known = list(known)
    near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else "."
    return UserError(f"unknown {flag} '{given}'{hint} Known: {', '.join(known)}")


def run_cli(command):
    """Run `command()` and turn what it raises into an exit code.

    A UserError ends in one sentence on stderr without a traceback (rank 0 says it, the others exit silently); a failed
    push, and a run that a SIGTERM stopped, in a sentence and an exit code of their own. Any other exception keeps its
    traceback.

    Args:
        command: function without arguments; returns an exit code or None.
    Returns:
        int exit code: 0 done, 2 the user's mistake, 3 saved but not pushed, 130 interrupted, 143 stopped by SIGTERM
        with a checkpoint to continue from.
    """
    try:
        code = command() or EXIT_OK
        leave_process_group()
        return code
    except tuple(_EXIT_CODES) as error:
        # One line a node: the mistake may lie on one machine only.
        if is_first_on_node():
            print(" ".join(str(error).split()), file=sys.stderr, flush=True)
        return next(code for kind, code in _EXIT_CODES.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left behind", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


def run_script(run, argv=None):
    """Run a script on its words as `run_cli` runs a command; what most scripts' `main` does.

    Args:
        run: function of a list of words; returns an exit code or None.
        argv: list of words; None takes the process's own.
    Returns:
        int exit code, as `run_cli` has it.
    """
    return run_cli(lambda: run(sys.argv[1:] if argv is None else list(argv)))
