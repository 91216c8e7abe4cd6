"""Run tasks of lm_eval in these processes: torchrun --nproc_per_node=2 tests/harness_on_two.py CASES.json.

CASES.json is {"model": folder, "calls": [keyword arguments of run_tasks, ...]}; "{rank}" in `data_dir` and `cache_path`
is the number of the process. Each process writes its results to CASES.json.<rank>.
"""

import json
import os
import sys
from pathlib import Path

from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_unlearn.evaluation.harness import run_tasks

if __name__ == "__main__":
    path = Path(sys.argv[1])
    cases = json.loads(path.read_text())
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    model, tokenizer = (kind.from_pretrained(cases["model"]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    results = []
    for call in cases["calls"]:
        texts = {key: value.format(rank=rank) for key, value in call.items() if isinstance(value, str)}
        results.append(run_tasks(model, tokenizer, **{**call, **texts}))
    Path(f"{path}.{rank}").write_text(json.dumps(results))
    distributed.barrier()
    distributed.destroy_process_group()
    # Threads of gloo that outlive the group abort the interpreter's end now and then; everything is written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
