"""What ILU adds to an unlearning step: FLOPs at the shapes of Mistral 7B, CPU time and FLOPs of a small model.

OMP_NUM_THREADS=1 python benchmarks/invariance.py --repeats 5

Every stream has the same number of rows of the same length in a step, so that the third stream alone makes a step half
as long again. A step of several micro-batches measures the penalty first, in a forward without gradients.
"""

import argparse
import os
import statistics
import tempfile
from unittest import mock

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from training_meters import UncomputedProducts, alternate, flops, ratios
from training_report import Row, show
from training_steps import hollow_mistral, make_trainer

from llm_unlearn.errors import run_script
from llm_unlearn.head_reading import HeadReader

TARGET, RADIUS = 1.6, 0.01
_MISTRAL = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
_SMALL = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
"""A head of 2% of a forward, as in a model of 7B."""
_QUICK = {**_SMALL, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
JOBS = {
    "npo, logit_scale": ("npo", "logit_scale"),
    "grad_diff, logit_scale": ("grad_diff", "logit_scale"),
    "npo, parameter_gradient": ("npo", "parameter_gradient"),
}
"""{what is shown: (method, --ilu_mode)}."""
SHAPES = {"4 x 1": (4, 1), "1 x 4": (1, 4)}
"""{rows of a micro-batch x micro-batches of a step: (batch size, accumulation)}."""


def run(repeats=5, is_quick=False):
    """Return the rows of the benchmark.

    Args:
        repeats: timed rounds, with and without ILU in alternation.
        is_quick: tiny sizes: whether all runs, not what it costs.
    """
    with tempfile.TemporaryDirectory() as folder:
        return [
            row
            for name in JOBS
            for row in (*_counted(name, is_quick, folder), *_timed(name, is_quick, folder, repeats))
        ]


def _counted(name, is_quick, folder):
    """Return the rows of a job's FLOPs at the shapes of a large model, one row of each stream in a micro-batch.

    Each further micro-batch costs what the second does.
    """
    (method, mode), (shape, length) = JOBS[name], (_QUICK, 16) if is_quick else (_MISTRAL, 512)
    if mode != "logit_scale":
        return []
    one, two = ([full_width(shape, length, method, chosen, (1, count), folder) for chosen in (None, mode)]
                for count in (1, 2))  # fmt: skip
    rows, size = [], "tiny" if is_quick else "Mistral 7B"
    for count in (1, 2, 4):
        found = [first + (count - 1) * (second - first) for first, second in zip(one, two, strict=True)]
        rows.append(_row(f"{name}; {count} micro-batches a step, {length} tokens a row, {size}", found, TARGET))
    return rows


def _timed(name, is_quick, folder, repeats):
    """Return the rows of a job's FLOPs and CPU time with a small model, four rows of each stream in a step."""
    (method, mode), (shape, length) = JOBS[name], (_QUICK, 16) if is_quick else (_SMALL, 128)
    target, rows = TARGET if mode == "logit_scale" else None, []
    for shown, step in SHAPES.items():
        counted, spent = timed(shape, length, method, mode, step, folder, repeats)
        size = f"{shape['num_hidden_layers']} layers of {shape['hidden_size']}"
        title = f"{name}; {shown} rows of each stream a step, {length} tokens a row, {size}"
        rows.append(_row(title, counted, target))
        absolute = {f"seconds {side}": statistics.median(found) for side, found in spent.items()}
        found = ratios(spent["with"], spent["without"])
        rows.append(Row.timed("ILU", title, "time / step without ILU", found, None, target, absolute))
    return rows


def _row(title, counted, target):
    without, with_ilu = counted
    absolute = {"FLOPs without": without, "FLOPs with": with_ilu}
    return Row("ILU", title, "FLOPs / step without ILU", with_ilu / without, target=target, absolute=absolute)


def data_of(vocabulary, length, count, streams):
    """Return {stream: tokenized rows} of random tokens, all of which count."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in streams:
        ids = torch.randint(vocabulary, (count, length), generator=generator).tolist()
        found[name] = [{"input_ids": row, "labels": row} for row in ids]
    return found


def trainer_of(model, vocabulary, length, method, mode, shape, folder):
    """Return the trainer of one optimizer step; `mode` None trains without ILU."""
    batch, accumulation = shape
    flags = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 1, "retain_loss": "nll"}
    streams = ["forget", "retain"]
    if mode is not None:
        flags |= {"regularizer": ["ilu"], "ilu_mode": mode}
        streams.append("invariance")
    data = data_of(vocabulary, length, batch * accumulation, streams)
    trainer = make_trainer(method, model, data, folder, batch, **flags)
    if trainer._frozen_reference is not None:
        # Its answers are there before the steps.
        trainer._frozen_reference.prepare()
    return trainer


def full_width(shape, length, method, mode, step, folder):
    """Count the FLOPs of a step at the shapes of a large model.

    Models of one and two layers run; what the second adds is added for each further one.
    """
    found = []
    for depth in (1, 2):
        with mock.patch.object(HeadReader, "_probe"), UncomputedProducts():
            model = hollow_mistral({**shape, "num_hidden_layers": depth})
            for weight in model.parameters():
                if weight.dim() > 1:  # gradients of this size would take gigabytes
                    weight.register_post_accumulate_grad_hook(lambda filled: setattr(filled, "grad", None))
            trainer = trainer_of(model, shape["vocab_size"], length, method, mode, step, folder)
            found.append(flops(lambda trainer=trainer: one_step(trainer)))
            _forget(trainer)
    return found[0] + (shape["num_hidden_layers"] - 1) * (found[1] - found[0])


def timed(shape, length, method, mode, step, folder, repeats):
    """Return ([FLOPs without and with ILU], {"without", "with": seconds of each round}) of a small model's step."""
    from transformers import MistralConfig, MistralForCausalLM

    fields = {"max_position_embeddings": 1024, "sliding_window": None, "attn_implementation": "eager"}
    counted, trainers = [], {}
    for side, chosen in (("without", None), ("with", mode)):
        torch.manual_seed(0)
        model = MistralForCausalLM(MistralConfig(**shape, **fields))
        trainers[side] = trainer_of(model, shape["vocab_size"], length, method, chosen, step, folder + f"/{side}")
        one_step(trainers[side])
        counted.append(flops(lambda side=side: one_step(trainers[side])))
    steps = {side: (lambda trainer=trainer: one_step(trainer)) for side, trainer in trainers.items()}
    spent = alternate(steps, repeats, "cpu")
    for trainer in trainers.values():
        _forget(trainer)
    return counted, spent


def one_step(trainer):
    """Run all of an optimizer step but the optimizer: its batches, forwards, backwards, and the gradient's norm."""
    model, args = trainer.model, trainer.args
    model.zero_grad(set_to_none=True)
    plan = trainer.make_plan()
    batches = [trainer.data_collator([trainer.train_dataset[key] for key in keys]) for keys in plan]
    batches, counts = trainer.get_batch_samples(iter(batches), args.gradient_accumulation_steps, args.device)
    for batch in batches:
        trainer.training_step(model, batch, counts)
    with trainer.regularizers[0].attached() if trainer.regularizers else mock.MagicMock():
        if trainer.regularizers and not trainer.regularizers[0].in_loss:
            trainer.regularizers[0].begin_step(batches)
        trainer.accelerator.clip_grad_norm_(model.parameters(), float("inf"))


def _forget(trainer):
    trainer.discard_reference_cache()


def main(argv=None):
    """Print the rows; returns the exit code, 0 also where a target is missed."""
    return run_script(_main, argv)


def _main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="Timed rounds, with and without ILU in alternation.")
    parser.add_argument("--quick", action="store_true", help="Tiny sizes: whether all runs, not what it costs.")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    show(run(args.repeats, args.quick))


if __name__ == "__main__":
    raise SystemExit(main())
