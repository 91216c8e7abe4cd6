"""Real FSDP2 on gloo, for tests: on a CPU accelerate would run DDP without a word.

The lines that make it real stand between the arguments and the Trainer, because accelerate shards only on what it takes
for several GPUs; the device stays the CPU and the backend gloo.
"""

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from llm_unlearn import training_arguments


def make_fsdp_real():
    """Let UnlearnArguments keep FSDP on the CPU, and mark the process state as one that accelerate shards.

    It holds for the rest of the process, which therefore runs one command line only (see ranks.py).
    """
    training_arguments.fsdp_can_run = lambda args: True
    original = training_arguments.UnlearnArguments.__post_init__

    def post_init(self):
        original(self)
        if self.fsdp:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    training_arguments.UnlearnArguments.__post_init__ = post_init
