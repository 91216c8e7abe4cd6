"""Run several run_unlearn.py command lines one after the other in these processes, because one start costs 8 seconds.

torchrun --nproc_per_node=2 tests/run_cases.py CASES.json, a list of {"name", "argv", "fsdp"}; rank 0 writes the
exit codes to CASES.json.done.
"""

import gc
import json
import os
import sys
from pathlib import Path

import fsdp_on_cpu
from accelerate.state import AcceleratorState, PartialState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llm_unlearn import training_arguments
from llm_unlearn.cli.unlearn import main


def run(case):
    """Run one case from a clean accelerate state; returns its exit code, or what it raised."""
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    gc.collect()
    kept = training_arguments.fsdp_can_run, training_arguments.UnlearnArguments.__post_init__
    if case.get("fsdp"):
        fsdp_on_cpu.make_fsdp_real()
    environment = dict(os.environ)
    try:
        return main(case["argv"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        # Accelerate leaves its switches in the environment, where the next case would find them.
        os.environ.clear()
        os.environ.update(environment)
        training_arguments.fsdp_can_run, training_arguments.UnlearnArguments.__post_init__ = kept
        PartialState().wait_for_everyone()


if __name__ == "__main__":
    path = Path(sys.argv[1])
    codes = {}
    for case in json.loads(path.read_text()):
        codes[case["name"]] = run(case)
        if PartialState().process_index == 0:
            Path(f"{path}.done").write_text(json.dumps(codes))
    if PartialState().num_processes > 1:
        PartialState().destroy_process_group()
