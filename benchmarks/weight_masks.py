"""What a weight mask costs: a step of training with it beside one without, and making it beside its gradient passes.

python benchmarks/weight_masks.py --tokenizer TOKENIZER.json --data_dir TOFU_FOLDER --output masks.json
"""

import argparse
import dataclasses
import json
import shlex
import statistics
import tempfile
from pathlib import Path

from llm_unlearn.errors import run_script

STEP, MAKING = 1.10, 1.05
RATIOS = ("0.4", "0.8", "0.95")


def main(argv=None):
    """Run the benchmark; returns the exit code."""
    return run_script(_main, argv)


def _main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="A tokenizer.json; default: the demo world's.")
    parser.add_argument("--data_dir", help="TOFU's files, as run_unlearn.py takes them; default: the demo world's.")
    parser.add_argument("--forget_split", default="forget10", help="Split to forget.")
    parser.add_argument("--max_rows", type=int, default=400, help="Only so many rows of each set.")
    parser.add_argument("--hidden_size", type=int, default=256, help="Of the random Llama of 8 layers.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="Where to run.")
    parser.add_argument("--repeats", type=int, default=5, help="Timed rounds, the variants in alternation.")
    parser.add_argument("--output", type=Path, help="Where the numbers go as JSON.")
    args = parser.parse_args(argv)
    from training_report import machine, show

    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        rows = run(args)
    show(rows)
    if args.output:
        command = shlex.join(["python", "benchmarks/weight_masks.py", *argv])
        found = {"command": command, "machine": machine(args.device), "rows": [dataclasses.asdict(row) for row in rows]}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def run(args):
    """Return the rows of masks.

    Args:
        args: the parsed command line, with a `folder` for temporary files.
    """
    from subjects import CONTEXT, load_tokenizer_alone, load_training_rows, random_llama

    from llm_unlearn.data.tokenize import TokenizeOptions, tokenize_rows

    tokenizer = load_tokenizer_alone(args.tokenizer, args.folder)
    given = load_training_rows(args.data_dir, args.forget_split, args.folder)
    options = TokenizeOptions(model_length=CONTEXT)
    data = {name: tokenize_rows(rows[: args.max_rows], tokenizer, options, name) for name, rows in given.items()}

    def make_model():
        return random_llama(tokenizer, args.hidden_size).to(args.device)

    masks, making = time_making(make_model(), data, tokenizer, args)
    file = Path(args.folder) / "mask.safetensors"
    _write(file, masks, RATIOS[1])
    return [making, *time_steps(make_model, data, file, args)]


def time_making(model, data, tokenizer, args):
    """Return (Masks, the row of making three of them beside the two gradient passes alone)."""
    from accelerate import PartialState
    from training_meters import alternate, ratios
    from training_report import Row

    from llm_unlearn.addons.gradient_sums import Blocks, mean_gradients
    from llm_unlearn.addons.mask_making import MaskOptions, counted_tokens, make_masks
    from llm_unlearn.data.streams import pad_id

    state = PartialState(cpu=args.device == "cpu")
    options, found = MaskOptions("wagle", RATIOS, gamma=1e-6), []

    def making():
        found[:] = [make_masks(model, data, tokenizer, options, state)]
        for ratio in RATIOS:
            _write(Path(args.folder) / f"made_{ratio}.safetensors", found[0], ratio)

    def passes():
        model.eval()
        for name, rows in data.items():
            blocks = Blocks(rows, options.batch_size, pad_id(tokenizer), 1, state.device)
            mean_gradients(model, dict(model.named_parameters()), blocks, counted_tokens(rows), name)

    making()
    times = alternate({"making": making, "passes": passes}, args.repeats, args.device)
    size = sum(p.numel() for p in model.parameters())
    tokens = sum(len(row["input_ids"]) for rows in data.values() for row in rows)
    absolute = {name: statistics.median(values) for name, values in times.items()}
    job = f"making masks of {len(RATIOS)} ratios, {size / 1e6:.1f} M weights, {tokens:,} tokens"
    rounds = ratios(times["making"], times["passes"])
    return found[0], Row.timed("M2", job, "time over its two gradient passes", rounds, target=MAKING, absolute=absolute)


def time_steps(make_model, data, file, args):
    """Return the rows of steps with a mask over those without: whole ones, and the clipping and AdamW alone."""
    from training_meters import alternate, ratios
    from training_report import Row

    rows = []
    for batch, decay in ((8, 0.1), (4, 0.1), (4, 0.0), (1, 0.1)):
        variants = {name: _trainer(make_model(), data, args, batch, decay, given) for name, given in _masks(file)}
        times = {name: [] for name in variants}
        for _ in range(args.repeats):
            for name, (trainer, clock) in variants.items():
                trainer.train()
                times[name].append(statistics.median(clock.taken[2:]))
                clock.taken.clear()
        rows_of = f"{batch} row{'s' * (batch > 1)} of each set"
        job = f"GradDiff step with AdamW, weight decay {decay}, {rows_of}"
        absolute = {name: statistics.median(values) for name, values in times.items()}
        rounds = ratios(times["masked"], times["plain"])
        rows.append(Row.timed("M1", job, "time over the same without a mask", rounds, target=STEP, absolute=absolute))
    for decay in (0.1, 0.0):
        steps = {name: _bare_step(make_model(), data, args, decay, given) for name, given in _masks(file)}
        times = alternate(steps, 4 * args.repeats, args.device)
        absolute = {name: statistics.median(values) for name, values in times.items()}
        rounds = ratios(times["masked"], times["plain"])
        job = f"clipping and AdamW alone, weight decay {decay}"
        rows.append(Row.timed("M1", job, "time over the same without a mask", rounds, absolute=absolute))
    return rows


def _masks(file):
    return ("plain", None), ("masked", str(file))


def _trainer(model, data, args, batch, decay, file):
    """Return (a trainer of six steps, what takes the time of each)."""
    from training_steps import make_trainer

    trainer = make_trainer(
        "grad_diff", model, data, args.folder, batch, args.device, weight_mask=file, optim="adamw_torch_fused",
        weight_decay=decay, max_grad_norm=1.0, max_steps=6,
    )  # fmt: skip
    clock = _clock(args.device)
    trainer.add_callback(clock)
    return trainer, clock


def _clock(device):
    from training_meters import Stopwatch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Takes the time of every optimizer step."""

        def __init__(self):
            self.taken, self.watch = [], None

        def on_step_begin(self, *_, **__):
            """Start."""
            self.watch = Stopwatch(device)

        def on_step_end(self, *_, **__):
            """Stop."""
            self.taken.append(self.watch.seconds())

    return Clock()


def _bare_step(model, data, args, decay, file):
    """Return a function that clips given gradients and steps."""
    import contextlib

    import torch

    trainer, _ = _trainer(model, data, args, 4, decay, file)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=decay, fused=True)
    held, accelerator = contextlib.nullcontext(), trainer.accelerator
    if trainer.weight_mask is not None:
        held = trainer.weight_mask.attached()
    held.__enter__()
    _, prepared = accelerator.prepare(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    clip = accelerator.clip_grad_norm_

    def step():
        clip(model.parameters(), 1.0)
        prepared.step()

    # Left when the process ends; dropped, it would be left at once.
    step.held = held
    step()
    return step


def _write(path, masks, ratio):
    from llm_unlearn.addons.mask_files import write_mask

    write_mask(path, masks.bits[ratio], masks.shapes, {"ratio": ratio, "score": "wagle"})


if __name__ == "__main__":
    raise SystemExit(main())
