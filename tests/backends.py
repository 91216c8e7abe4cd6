"""The backends that a run can train on, how a test starts one, and how it knows which one really ran."""

import json
from dataclasses import dataclass
from pathlib import Path

import ranks
from tiny_world import update_distance, weights

from llm_unlearn.cli.unlearn import main


@dataclass(frozen=True)
class Backend:
    """Flags that choose a backend, and what unlearning.json then says of it on several processes.

    Attributes:
        flags: of run_unlearn.py.
        distributed_type: accelerate's name.
        zero_stage: 0 without DeepSpeed.
        one_process: accelerate's name on one process, None where the backend needs several.
    """

    flags: tuple
    distributed_type: str
    zero_stage: int = 0
    one_process: str | None = None


WRAP = ("--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer")
ZERO2, ZERO3 = (("--deepspeed", str(ranks.ROOT / f"ds_configs/zero{stage}.json")) for stage in (2, 3))
BACKENDS = {
    "ddp": Backend((), "MULTI_CPU", one_process="NO"),
    "fsdp2": Backend(WRAP, "FSDP"),
    "zero2": Backend(ZERO2, "DEEPSPEED", 2, one_process="DEEPSPEED"),
    "zero3": Backend(ZERO3, "DEEPSPEED", 3, one_process="DEEPSPEED"),
}


def start(words, backend="ddp", processes=1, **options):
    """Run run_unlearn.py on a backend; returns ranks.Outcome.

    Args:
        words: the command line without the backend's flags.
        backend: name of one; "ddp" on one process is the plain run, without torchrun's variables.
        processes: how many.
        **options: of ranks.run.
    """
    plain = backend == "ddp" and processes == 1
    options = {"processes": processes, "launched": not plain, "fsdp": backend == "fsdp2", **options}
    return ranks.run(main, [*words, *BACKENDS[backend].flags], **options)


def train(words, backend="ddp", processes=1, **options):
    """Run a command line that must succeed on the backend that it asks for; returns its output folder."""
    outcome = start(words, backend, processes, **options)
    assert outcome.codes == [0] * processes, outcome
    folder = Path(words[words.index("--output_dir") + 1])
    expected = BACKENDS[backend]
    found = json.loads((folder / "unlearning.json").read_text())["backend"]
    assert found["distributed_type"] == (expected.distributed_type if processes > 1 else expected.one_process)
    assert found["zero_stage"] == expected.zero_stage and found["processes"] == processes
    return folder


def distance(first, second, start_weights=None):
    """||Da - Db|| / ||Db|| of two finished runs; of LoRA's B alone, where the runs trained adapters.

    LoRA's A matrices start at random and dominate the norm, while B starts at zero.
    """
    found = weights(first), weights(second)
    if (Path(first) / "adapter_config.json").is_file():
        only_b = [{key: value for key, value in part.items() if "lora_B" in key} for part in found]
        return update_distance(*only_b)
    assert start_weights is not None
    return update_distance(*found, start_weights)
