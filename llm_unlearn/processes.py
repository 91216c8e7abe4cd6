"""Which of the processes of a run this one is, known before any process group exists."""

import atexit
import gc
import logging
import os
import sys


def is_first_process():
    """Return whether this is the process that speaks for the run: rank 0, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_on_node():
    """Return whether this is the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))) == 0


def leave_process_group():
    """Take leave of the other processes; gloo's threads that still run when Python ends abort it now and then."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        # What still refers to the group, an optimizer or a wrapper in a cycle, would keep its threads to the end.
        gc.collect()


def end_process(code):
    """End this process, one of several without Python's own teardown, in which gloo's threads abort it now and then.

    Args:
        code: exit code.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise SystemExit(code)
    # What Python runs at its end, loggers and temporary folders among it, without the destructors that come after.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def set_up_logging():
    """Log to stderr on the first process; the others say errors only."""
    level = logging.INFO if is_first_process() else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("llm_unlearn").setLevel(level)
    # bitsandbytes 0.50 says on every import without a GPU, and for every layer, what costs it speed alone.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
