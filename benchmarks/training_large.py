"""P4 and P5 at the shapes of Llama 1B and 8B with random weights, through the real command line: time and memory.

Meant for a GPU, in bfloat16; with the shape `tiny` it runs anywhere.
"""
# Shapes: B sequences, T tokens.

import gc
import json
import os
import statistics
from dataclasses import dataclass

import torch
import training_peers
from subjects import load_tokenizer_alone
from training_meters import Stopwatch, clear_gradients, peak_bytes, seconds
from training_report import Row
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from llm_unlearn.cli.unlearn import build_trainer
from llm_unlearn.memory.estimate import CONTEXT, estimate
from llm_unlearn.memory.reading import make_case
from llm_unlearn.memory.request import split_request
from llm_unlearn.parsing import parse

SHAPES = {
    "tiny": {
        "vocab_size": 2100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "1B": {
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    },
    "8B": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
TUNING = {
    "full": [],
    "LoRA": ["--use_peft", "True", "--dtype", "bfloat16"],
    "QLoRA": ["--use_peft", "True", "--dtype", "bfloat16", "--load_in_4bit", "True"],
}
JOBS = {
    "P4": ("GradDiff+KL", ["--unlearn_method", "grad_diff", "--retain_loss", "kl"]),
    "P5": ("NPO", ["--unlearn_method", "npo"]),
}
RUNS = {"tiny": ("full", "LoRA"), "1B": ("full", "LoRA"), "8B": ("LoRA", "QLoRA")}
STEPS, BATCH = 6, 4


@dataclass(frozen=True)
class Place:
    """Where a model and its rows lie.

    Attributes:
        model: folder of the model with a tokenizer.
        rows: {stream: file}.
        length: tokens of every row.
    """

    model: str
    rows: dict
    length: int


def run(args):
    """Return the rows of all shapes that were asked for, with each way of tuning and both ways to go backward."""
    rows = []
    for name in args.shapes:
        place = write(name, args)
        for tuning in RUNS[name]:
            for id in JOBS:
                for sequential in (False, True):
                    rows += measure(id, name, tuning, sequential, place, args)
    return rows


def write(name, args):
    """Write a model with random weights, and rows that are longer than it may read.

    Args:
        name: of a shape.
        args: the parsed command line.
    Returns:
        Place.
    """
    folder, length = os.path.join(args.folder, name), 32 if name == "tiny" else 512
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(0)
    with torch.device(args.device):
        config = LlamaConfig(**SHAPES[name], max_position_embeddings=2048, dtype=torch.bfloat16)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    load_tokenizer_alone(None, os.path.join(args.folder, "demo")).save_pretrained(folder)
    rows = {}
    for stream in ("forget", "retain"):
        rows[stream] = os.path.join(folder, f"{stream}.jsonl")
        text = [{"text": f"{stream} {number} " * length} for number in range(2 * BATCH)]
        with open(rows[stream], "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in text)
    return Place(folder, rows, length)


def command(id, tuning, sequential, place, args):
    """Return the words of run_unlearn.py for a run of a few steps."""
    words = [*JOBS[id][1], *TUNING[tuning], "--target_model_name_or_path", place.model, "--domain", "custom"]
    words += ["--forget_data", place.rows["forget"], "--retain_data", place.rows["retain"]]
    words += ["--max_length", str(place.length), "--max_steps", str(STEPS), "--optim", "adamw_torch"]
    words += ["--per_device_train_batch_size", str(BATCH), "--sequential_backward", str(sequential)]
    words += ["--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "True", "--logging_strategy", "no"]
    words += ["--output_dir", os.path.join(args.folder, "run"), "--overwrite_output_dir", "True", "--bf16", "True"]
    return [*words, "--use_cpu", "True"] if args.device == "cpu" else words


def measure(id, name, tuning, sequential, place, args):
    """Run one job; returns its rows: time over the bare unit, and peak over what --estimate_memory says before."""
    words = command(id, tuning, sequential, place, args)
    trainer, _ = build_trainer(parse(words))
    clock = _Clock(args.device)
    trainer.add_callback(clock)
    tensors = [*trainer.model.parameters(), *trainer.model.buffers()]
    held = sum(tensor.nbytes for tensor in tensors) if args.device == "cpu" else torch.cuda.memory_allocated()
    peak = held + peak_bytes(trainer.train, args.device) + CONTEXT[args.device]
    unit = _unit(trainer, args.device)
    trainer.discard_reference_cache()
    rounds = [spent / unit for spent in clock.spent[1:]]
    expected = _estimate(words)
    del trainer, clock
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    job = f"{JOBS[id][0]}, Llama {name}, {tuning}, {BATCH} rows of {place.length} a stream, "
    job += "one stream backward after the other" if sequential else "both streams at once"
    absolute = {"unit seconds": unit, "peak bytes": peak, "estimated bytes": expected}
    return [
        Row.timed(id, job, "time / bare unit", rounds, absolute=absolute),
        Row(id, job, "peak / --estimate_memory", peak / expected, absolute=absolute),
    ]


def _estimate(words):
    gigabytes = "141"
    request, rest, _ = split_request([*words, "--estimate_memory", gigabytes])
    return estimate(make_case(parse(rest), request)).total


def _unit(trainer, device, rounds=3):
    """Return the seconds of the bare unit on a batch of the run: the same model, weights that train, and precision."""
    rows = [trainer.train_dataset[key] for key in trainer.make_plan().batch(0, 0, 0)]
    stream, model = trainer._prepare_inputs(trainer.data_collator(rows))["forget"], trainer.model
    found = []
    for _ in range(rounds + 1):
        clear_gradients(*model.parameters())
        with torch.autocast(device, torch.bfloat16):
            found.append(seconds(lambda: training_peers.bare(model, stream), device))
    return statistics.median(found[1:])


class _Clock(TrainerCallback):
    """Times every step: forward, backward and update."""

    def __init__(self, device):
        self.device, self.spent = device, []

    def on_step_begin(self, args, state, control, **kwargs):
        """Begin."""
        self._since = Stopwatch(self.device)

    def on_step_end(self, args, state, control, **kwargs):
        """End; the step is queued to its end."""
        self.spent.append(self._since.seconds())
