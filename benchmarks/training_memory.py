"""P7 and P19: what the reference holds in memory, and how the memory of a step grows with the length of a row."""
# Shapes: B sequences, T tokens, D hidden size, V vocabulary.

import contextlib
import functools

import torch
import training_layers
import training_peers
from peft import LoraConfig, get_peft_model
from subjects import load_tokenizer_alone
from training_meters import UncomputedProducts, peak_bytes
from training_report import Row
from training_steps import BATCH, dataset_of, make_trainer, small

from llm_unlearn.activations import frozen_copies
from llm_unlearn.arguments import REFERENCE_MODES
from llm_unlearn.errors import UserError
from llm_unlearn.methods import METHODS, trainer_class
from llm_unlearn.models import train_only

_LENGTHS = {"cpu": (512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16_384)}
_QUICK = (16, 32)
SHARE = 0.05
SLOPE = 1.5
_SLOPES = {
    "gradient ascent": ("forget", "gradient_ascent", None, {}),
    "NPO": ("forget", "npo", "none", {}),
    "KL": ("retain", "grad_diff", "kl", {"forget_weight": 0.0}),
}
"""{term: (the stream that runs, method, retain term, further flags)}."""


# ---- P7 ----


def run_reference(args):
    """Return the rows of P7: the bytes that references keep in memory over those of the policy, the largest of all.

    Every method runs in every mode that it has; the file of numbers has them all.
    """
    tokenizer = load_tokenizer_alone(args.tokenizer, args.folder)
    streams = {name: rows[:BATCH] for name, rows in dataset_of(args, tokenizer).streams.items()}
    found = {}
    for method in METHODS:
        for retain_loss in _retain_losses(method):
            for mode in REFERENCE_MODES:
                held = _held(method, retain_loss, mode, streams, tokenizer, args)
                if held is not None:
                    keeps_head = mode == "cached" and held["keeps head"]
                    name = " ".join(filter(None, (method, retain_loss)))
                    found.setdefault((mode, keeps_head), {})[name] = held
    return [_reference_row(mode, keeps_head, held) for (mode, keeps_head), held in found.items()] + [_rmu_row(args)]


def _retain_losses(method):
    return ("nll", "kl") if "retain_loss" in trainer_class(method).args_class.__dataclass_fields__ else (None,)


def _held(method, retain_loss, mode, streams, tokenizer, args):
    """Return what the reference of a run holds in memory and on disk, or None where it compares with none."""
    model = small(tokenizer, args)
    policy, head = _bytes(model.parameters()), model.lm_head.weight.nbytes
    if mode == "adapter_off":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    kind = trainer_class(method)
    flags = {"top_k": 1, "rm_groundtruth": True} if method == "random_label" else {}
    flags |= {} if retain_loss is None else {"retain_loss": retain_loss}
    needed = {name: rows for name, rows in streams.items() if name in kind.streams}
    try:
        trainer = make_trainer(method, model, needed, args.folder, reference=mode, **flags)
    except UserError:
        return None
    reference = trainer._frozen_reference
    reference.prepare()
    copies = [] if reference.model is None else list(reference.model.parameters())
    kept = reference.projection
    kept = [] if kept is None else [part for part in (kept.weight, kept.bias) if part is not None]
    disk = reference.cache.num_bytes() if reference.cache else 0
    trainer.discard_reference_cache()
    held = _bytes([*copies, *kept])
    return {"policy": policy, "held": held, "disk": disk, "head": head, "keeps head": bool(kept)}


def _reference_row(mode, keeps_head, held):
    name, worst = max(held.items(), key=lambda item: item[1]["held"])
    # A live copy is what the peers have; here it runs where it is asked for.
    allowed = max(SHARE, worst["head"] / worst["policy"] if keeps_head else 0)
    job = f"reference {mode}{', KL, the head trains' if keeps_head else ''}: {', '.join(sorted(held))}"
    share, target = worst["held"] / worst["policy"], None if mode == "live" else allowed
    return Row("P7", job, "bytes / policy's", share, 1.0, target, absolute={"largest": name, "bytes": held})


def _rmu_row(args):
    model = training_layers.make_model(training_layers.QUICK if args.quick else training_layers.LARGE, "meta")
    policy = _bytes(model.parameters())
    train_only(model, [f"model.layers.{layer}.mlp.down_proj.weight" for layer in training_layers.TRAINED])
    copies = frozen_copies(model, training_layers.TRAINED[0], training_layers.LAYER)
    own = {id(parameter) for parameter in model.parameters()}
    held = _bytes(parameter for parameter in copies.parameters() if id(parameter) not in own)
    job = f"reference of RMU: frozen copies of three matrices, {'tiny' if args.quick else '7B'} Mistral"
    return Row("P7", job, "bytes / policy's", held / policy, 1.0, SHARE, absolute={"bytes": held, "policy": policy})


def _bytes(tensors):
    """Return the bytes of tensors, each once: a live copy lends its head."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


# ---- P19 ----


def run_slopes(args):
    """Return the rows of P19: bytes that a step takes for each further token, over those of the hidden states alone."""
    tokenizer = load_tokenizer_alone(args.tokenizer, args.folder)
    lengths = _QUICK if args.quick else _LENGTHS[args.device]
    peaks = {name: [] for name in ("hidden", "dense", *_SLOPES)}
    for length in lengths:
        model = small(tokenizer, args, max_position_embeddings=length).to(args.device)
        ids = torch.randint(len(tokenizer), (1, length), generator=torch.Generator().manual_seed(0))
        stream = {"input_ids": ids.to(args.device), "labels": ids.to(args.device)}
        # On the CPU the long rows would take minutes, and bytes do not depend on values.
        quickly = UncomputedProducts(with_memory=True) if args.device == "cpu" else contextlib.nullcontext()
        with quickly:
            for name, step in _steps(model, stream, ids[0].tolist(), args):
                model.zero_grad(set_to_none=True)
                peaks[name].append(peak_bytes(step, args.device))
    slopes = {name: _slope(lengths, found) for name, found in peaks.items()}
    title = f"memory of a step, T={lengths[0]}-{lengths[-1]}, V={len(tokenizer)}"
    rows = []
    for name in _SLOPES:
        absolute = {"lengths": lengths, "peak bytes": peaks[name], "hidden": peaks["hidden"], "dense": peaks["dense"]}
        ours, peer = slopes[name] / slopes["hidden"], slopes["dense"] / slopes["hidden"]
        rows.append(Row("P19", f"{title}, {name}", "slope / hidden states'", ours, peer, SLOPE, absolute=absolute))
    return rows


def _steps(model, stream, ids, args):
    """Yield (name, function) of each step on one full row; "hidden" has no head, "dense" the bare unit's."""
    yield "hidden", lambda: model.model(input_ids=stream["input_ids"]).last_hidden_state.mean().backward()
    yield "dense", lambda: training_peers.bare(model, stream)
    for name, (runs, method, retain_loss, flags) in _SLOPES.items():
        flags = flags if retain_loss is None else {"retain_loss": retain_loss, **flags}
        streams = {"forget": [{"input_ids": ids, "labels": ids}], "retain": [{"input_ids": ids, "labels": ids}]}
        streams = streams if runs == "retain" else {"forget": streams["forget"]}
        trainer = make_trainer(method, model, streams, args.folder, 1, args.device, **flags)
        if trainer._frozen_reference is not None:
            trainer._frozen_reference.prepare()
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[name, 0] for name in streams]))
        _, counts = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        trainer.reader.is_probed = True
        yield name, functools.partial(trainer.training_step, model, batch, counts)
        trainer.discard_reference_cache()


def _slope(lengths, peaks):
    """Return the bytes for each further token, by least squares."""
    middle, mean = sum(lengths) / len(lengths), sum(peaks) / len(peaks)
    shared = sum((length - middle) * (peak - mean) for length, peak in zip(lengths, peaks, strict=True))
    return shared / sum((length - middle) ** 2 for length in lengths)
