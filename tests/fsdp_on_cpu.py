"""run_unlearn.py with real FSDP2 on gloo, for tests: on a CPU accelerate would run DDP without a word.

The lines that make it real stand between the arguments and the Trainer, because accelerate shards only on what it takes
for several GPUs; the device stays the CPU and the backend gloo.
"""

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from llm_unlearn import training_arguments
from llm_unlearn.cli.unlearn import main


def make_fsdp_real():
    """Let UnlearnArguments keep FSDP on the CPU, and mark the process state as one that accelerate shards."""
    training_arguments.fsdp_can_run = lambda args: True
    original = training_arguments.UnlearnArguments.__post_init__

    def post_init(self):
        original(self)
        if self.fsdp:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    training_arguments.UnlearnArguments.__post_init__ = post_init


if __name__ == "__main__":
    make_fsdp_real()
    sys.exit(main())
