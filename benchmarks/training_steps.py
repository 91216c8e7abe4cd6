"""P4 and P5: whole steps of GradDiff with a divergence and of NPO, through the trainers, against the bare unit."""
# Shapes: B sequences, T tokens.

import contextlib
import copy
import functools
import logging
import os
import statistics
from collections import Counter
from unittest import mock

import torch
import training_peers
from subjects import CONTEXT, HIDDEN, load_tokenizer_alone, load_training_rows, random_llama
from training_meters import UncomputedProducts, alternate, flops, peak_bytes, ratios
from training_report import Row
from transformers import PrinterCallback

from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.data.tokenize import TokenizeOptions
from llm_unlearn.head_reading import HeadReader
from llm_unlearn.methods import trainer_class

EPOCHS, BATCH, FORGET_ROWS = 5, 8, 40
_FULL_LENGTH, _TIMED_BATCH = 512, 4
TOLERANCE = 2e-5
"""Of the largest difference of a gradient beside its largest entry: sums come in another order."""
_MISTRAL = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
_QUICK = {"vocab_size": 90, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
_QUICK |= {"num_attention_heads": 2, "num_key_value_heads": 1}
JOBS = {
    "repeats": ("P4", "grad_diff", "kl", "GradDiff+KL step, as many retain rows as forget rows, 5 epochs", 2.05),
    "fewer": ("P4", "grad_diff", "kl", "GradDiff+KL step, half as many retain rows as forget rows, 5 epochs", 2.05),
    "fresh": ("P4", "grad_diff", "kl", "GradDiff+KL step, retain rows never repeat", 2.34),
    "npo": ("P5", "npo", "nll", "NPO step, 5 epochs", 2.10),
}
"""{name: (id, method, retain term, what is shown, target)}."""
_SHARES = {"repeats": 1 / EPOCHS, "fewer": 1 / (2 * EPOCHS), "fresh": 1.0, "npo": 1 / EPOCHS}
"""How much of the reference's forward falls on each step."""


def run(args, ids=("P4", "P5")):
    """Return the rows of training steps.

    Args:
        args: the parsed command line.
        ids: which of P4, P5.
    """
    jobs = {name: job for name, job in JOBS.items() if job[0] in ids}
    tokenizer = load_tokenizer_alone(args.tokenizer, args.folder)
    streams = dataset_of(args, tokenizer).streams
    make_model = functools.partial(small, tokenizer, args, attn_implementation="eager")
    rows = [*(_data_row(name, streams, make_model, args) for name in jobs), *_full_width_rows(jobs, args)]
    for name in ("fresh", "npo"):
        if name in jobs:
            data = {stream: found[:_TIMED_BATCH] for stream, found in streams.items()}
            rows += time_steps(name, data, "rows of the data", make_model().to(args.device), args)
            rows += time_steps(name, _all_counted(data), "every token counts", make_model().to(args.device), args)
    return rows


def _all_counted(streams):
    return {name: [{**row, "labels": row["input_ids"]} for row in rows] for name, rows in streams.items()}


def small(tokenizer, args, **changes):
    """Return the Llama of 8 layers and hidden size 256 with a head of its own: 25 million weights at V=32,000."""
    return random_llama(tokenizer, 32 if args.quick else HIDDEN, tie_word_embeddings=False, **changes)


def dataset_of(args, tokenizer, forget_split="forget10"):
    """Return the UnlearnDataset of the training rows."""
    rows = load_training_rows(args.data_dir, forget_split, args.folder)
    return UnlearnDataset.from_rows(rows, tokenizer, TokenizeOptions(model_length=CONTEXT))


def make_trainer(method, model, data, folder, batch=BATCH, device="cpu", **flags):
    """Return a trainer as run_unlearn.py makes it; its optimizer is the cheapest, for the steps are what is measured.

    Args:
        method: its id.
        model: causal language model.
        data: {"forget": tokenized rows, "retain": tokenized rows}.
        folder: for its cache.
        batch: rows of each stream in a step.
        device: "cpu" or "cuda".
        **flags: further arguments.
    """
    kind = trainer_class(method)
    given = {
        "output_dir": os.path.join(folder, "run"), "use_cpu": device != "cuda", "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "optim": "sgd", "learning_rate": 1e-6,
        "max_grad_norm": 0.0, "num_train_epochs": EPOCHS, "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": batch, "overwrite_output_dir": True,
    }  # fmt: skip
    args = kind.args_class(**given | flags)
    trainer = kind(model=model, args=args, train_dataset=UnlearnDataset(data), processing_class=None)
    trainer.remove_callback(PrinterCallback)
    return trainer


def count_run(job, data, folder, batch, model, shapes, epochs=EPOCHS):
    """Count a run of a trainer, its reference pass included, beside the bare unit and the peer of its steps.

    Args:
        job: value of JOBS.
        data: see `make_trainer`.
        folder: for temporary files.
        batch: rows of each stream in a step.
        model: causal language model; no product of it is computed.
        shapes: the same on the meta device.
        epochs: how many.
    Returns:
        {"pass", "steps", "peer", "unit"}: FLOPs of the reference pass, and of all steps; the unit is the mean of a
        forget and a retain batch.
    """
    for weight in model.parameters():
        if weight.dim() > 1:  # the trainer looks for a gradient that is not finite, and must find some
            weight.register_post_accumulate_grad_hook(lambda filled: setattr(filled, "grad", None))
    _, method, retain_loss, _, _ = job
    flags = {"num_train_epochs": epochs, "retain_loss": retain_loss}
    trainer = make_trainer(method, model, data, folder, batch, **flags)
    with _quiet(), UncomputedProducts():
        found = Counter({"pass": flops(trainer._frozen_reference.prepare), "steps": flops(trainer.train)})
    trainer.discard_reference_cache()
    count, plan = functools.lru_cache(None)(functools.partial(_count_alone, shapes, job)), trainer.make_plan()
    for epoch in range(epochs):
        for number in range(len(plan)):
            batch = trainer.data_collator([trainer.train_dataset[key] for key in plan.batch(epoch, number, 0)])
            forget, retain = (tuple(batch[name]["input_ids"].shape) for name in ("forget", "retain"))
            # Forget rows alone would flatter us where they are the longer ones.
            found.update(peer=count(forget, retain), unit=(count(forget) + count(retain)) / 2)
    return found


def _count_alone(model, job, forget, retain=None):
    """Count the bare unit of a shape, or with two shapes the peer's step, on the meta device."""
    streams = [_blank(shape) for shape in (forget, retain) if shape]
    if retain is None:
        return flops(lambda: training_peers.bare(model, streams[0]))
    step = training_peers.STEPS[_peer(job)]
    return flops(lambda: step(model, model, dict(zip(("forget", "retain"), streams, strict=True))))


def _blank(shape):
    # With a mask transformers does not look whether rows are packed, which the meta device cannot tell.
    names = ("input_ids", "labels", "attention_mask")
    return {name: torch.zeros(shape, dtype=torch.long, device="meta") for name in names}


def _peer(job):
    return "grad_diff_kl" if job[1] == "grad_diff" else job[1]


def _data_row(name, streams, make_model, args):
    """Count a whole run over rows of the data."""
    forget, retain = _counts(name, _enough(streams, BATCH if args.quick else FORGET_ROWS))
    data = {"forget": streams["forget"][:forget], "retain": streams["retain"][:retain]}
    found = count_run(JOBS[name], data, args.folder, BATCH, make_model(), make_model().to("meta"))
    title = f"rows of the data, {forget} to forget, batch {BATCH}"
    return _flops_row(JOBS[name], found["pass"] + found["steps"], found, title)


def _full_width_rows(jobs, args):
    """Count full rows in which every token counts, at the shapes of Mistral 7B."""
    shape, rows, counted = _QUICK if args.quick else _MISTRAL, [], {}
    length = 16 if args.quick else _FULL_LENGTH
    for name, job in jobs.items():
        if job[1] not in counted:
            counted[job[1]] = count_full_width(job, shape, length, args.folder)
        found, model = counted[job[1]], "tiny Mistral" if args.quick else "Mistral 7B"
        ours = _SHARES[name] * found["pass"] + found["steps"]
        rows.append(_flops_row(job, ours, found, f"every token of {length} counts, {model}"))
    return rows


def count_full_width(job, shape, length, folder):
    """Count a step on one full row a stream, and the reference pass over the retain or the forget row.

    Models of one and two layers run; what the second adds is added for each further one, because FLOPs are exactly
    linear in the number of equal layers.

    Args:
        job: value of JOBS.
        shape: fields of a MistralConfig.
        length: tokens of a row.
        folder: for temporary files.
    Returns:
        see `count_run`.
    """
    ids = torch.randint(shape["vocab_size"], (2, length), generator=torch.Generator().manual_seed(0)).tolist()
    data = {name: [{"input_ids": row, "labels": row}] for name, row in zip(("forget", "retain"), ids, strict=True)}
    models = [hollow_mistral({**shape, "num_hidden_layers": depth}) for depth in (1, 2)]
    # A run first asks a model about eight tokens; beside a run of one row they would count.
    with mock.patch.object(HeadReader, "_probe"):
        one, two = (count_run(job, data, folder, 1, model, copy.deepcopy(model).to("meta"), 1) for model in models)
    return {name: one[name] + (shape["num_hidden_layers"] - 1) * (two[name] - one[name]) for name in one}


def hollow_mistral(shape):
    """Return a Mistral whose weights are one zero each, seen as whole matrices: for counting, whatever its size."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**shape, max_position_embeddings=CONTEXT, sliding_window=None, attn_implementation="eager")
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            zeros = torch.zeros(()).expand(weight.shape) if weight.dim() > 1 else torch.zeros(weight.shape)
            setattr(module, name, torch.nn.Parameter(zeros))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def time_steps(name, data, what, model, args):
    """Time one step of a trainer, the bare unit and the peer's step on the same rows, and take their peaks.

    What is timed as ours is the forward and backward of the step, and the reference's share: its forward on the batch,
    once (`fresh`) or over 5 epochs.
    """
    job = id, method, retain_loss, title, _ = JOBS[name]
    peer = copy.deepcopy(model)
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    trainer = make_trainer(method, model, data, args.folder, _TIMED_BATCH, args.device, retain_loss=retain_loss)
    trainer._frozen_reference.prepare()
    _perturb(model, peer)
    rows = [trainer.train_dataset[key] for key in trainer.make_plan().batch(0, 0, 0)]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    (batch,), counts = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    asked = list(trainer._frozen_reference.readings)
    steps = {
        "unit": lambda: [training_peers.bare(peer, batch[stream]) for stream in ("forget", "retain")],
        "ours": lambda: trainer.training_step(model, batch, counts),
        "peer": lambda: training_peers.STEPS[_peer(job)](peer, reference, batch),
        "pass": lambda: trainer._frozen_reference.read(trainer.reader, model, batch, asked),
    }
    models = {"unit": peer, "ours": model, "peer": peer}
    peaks = {name: peak_bytes(_fresh(steps[name], models[name]), args.device) for name in models}
    _check_gradients(model, peer)
    spent = alternate({name: _fresh(step, models.get(name)) for name, step in steps.items()}, args.repeats, args.device)
    trainer.discard_reference_cache()
    spent["unit"] = [both / 2 for both in spent["unit"]]
    ours = [step + _SHARES[name] * asking for step, asking in zip(spent["ours"], spent["pass"], strict=True)]
    absolute = {f"{name} seconds": statistics.median(found) for name, found in spent.items()}
    absolute |= {f"{name} peak bytes": peak for name, peak in peaks.items()}
    size = sum(weight.numel() for weight in model.parameters()) / 1e6
    job = f"{title}; {what}, {_TIMED_BATCH} a stream, {size:.0f} M weights"
    return [
        Row.timed(
            id, job, "time / bare unit, reference pass included", ratios(ours, spent["unit"]),
            ratios(spent["peer"], spent["unit"]), absolute=absolute,
        ),
        Row(id, job, "peak / peer's peak", peaks["ours"] / peaks["peer"], 1.0),
    ]  # fmt: skip


def _fresh(step, model):
    def run():
        if model is not None:
            model.zero_grad(set_to_none=True)
        step()

    return run


@torch.no_grad()
def _perturb(*models):
    """Move models away from their reference, each by the same noise: at the start a divergence has no gradient."""
    for model in models:
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(noise, alpha=0.1 * parameter.std().item() if parameter.dim() > 1 else 0.0)


def _check_gradients(model, peer):
    expected = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        dense = expected[name].grad
        off = ((parameter.grad - dense).abs().max() / dense.abs().max()).item()
        assert off <= TOLERANCE, f"the gradient of {name} differs from the peer's by {off:.2g}"


def _counts(name, forget):
    """Return (forget rows, retain rows) of a job; fresh rows are enough for all epochs."""
    return forget, {"fewer": max(1, forget // 2), "fresh": EPOCHS * forget}.get(name, forget)


def _enough(streams, forget):
    """Return how many forget rows the data allow, if the retain rows are not to repeat."""
    return min(forget, len(streams["forget"]), len(streams["retain"]) // EPOCHS)


def _flops_row(job, ours, found, data):
    id, _, _, title, target = job
    absolute = {f"{name} FLOPs": value for name, value in found.items()}
    metric, peer = "FLOPs / bare unit", found["peer"] / found["unit"]
    return Row(id, f"{title}; {data}", metric, ours / found["unit"], peer, target, absolute=absolute)


@contextlib.contextmanager
def _quiet():
    """Keep what the trainers log out of the table's way."""
    logger = logging.getLogger("llm_unlearn")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
