"""From the words of a command line to the table of its memory; nothing is loaded and nothing is written."""

import contextlib
import logging
import tempfile

from llm_unlearn.memory.advice import advise
from llm_unlearn.memory.estimate import estimate
from llm_unlearn.memory.reading import make_case
from llm_unlearn.memory.request import write_config
from llm_unlearn.memory.table import show
from llm_unlearn.parsing import parse
from llm_unlearn.processes import is_first_process


def print_estimate(request, words, config):
    """Print what a run would take on each device, and what to change where that is too much.

    Args:
        request: Request.
        words: the command line without the request.
        config: what is left of its config file.
    Raises:
        UserError: whatever is wrong with the command line or the model's config.
    """
    with tempfile.TemporaryDirectory() as folder, _without_warnings_of_this_machine():
        parsed = parse([*words, *write_config(config, folder)])
    if parsed is None or not is_first_process():
        return
    found = estimate(make_case(parsed, request))
    show(found, None if found.fits else advise(found))


@contextlib.contextmanager
def _without_warnings_of_this_machine():
    """What this machine cannot run does not matter where another one is asked about."""
    logger = logging.getLogger("llm_unlearn.training_arguments")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
