"""Bytes of an optimizer's state, by its name."""

import copy
import dataclasses
import inspect
import math
from dataclasses import dataclass

import torch
from transformers import Trainer

from llm_unlearn.addons.influence import InfluenceStep
from llm_unlearn.addons.shards import PIECE
from llm_unlearn.addons.sophia import LegacySophia, Sophia
from llm_unlearn.memory.live_bytes import LiveBytes

_STATES = {"adamw": 2, "lion": 1, "rmsprop": 1, "ademamix": 3}
_BLOCK, _SMALLEST = 256, 4096  # bitsandbytes: numbers that share a scale; smaller tensors keep 32 bits
_OTHERS = {
    "schedule_free_adamw": 8, "schedule_free_radam": 8, "schedule_free_sgd": 4, "stable_adamw": 8, "lomo": 0,
}  # fmt: skip
_UNKNOWN = 8
_OURS = {"sophia": Sophia, "soul_legacy": LegacySophia, "influence": InfluenceStep}
_HELD = {"gnb": 1, "hutchinson": 3}
"""Copies of the trained weights that the passes of an estimate of the curvature hold, gradients and weights."""
_PIECE_BYTES = 8
_SAMPLE, _COUNTS = (128, 512), (2, 6)


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes of an optimizer.

    Attributes:
        state: between steps.
        step: what a step makes besides, for a moment.
        is_known: False where the name is unknown and AdamW's 8 bytes for each weight are assumed.
        is_paged: whether the state moves to the host's memory when the device is full.
    """

    state: float
    step: float
    is_known: bool = True
    is_paged: bool = False


def optimizer_memory(name, args, trained_shapes, device_type):
    """Return what an optimizer holds for some weights.

    Args:
        name: of --optim or --unlearn_optimizer.
        args: TrainingArguments, for --optim_args and the rest.
        trained_shapes: ((shape, dtype, whether of an embedding), ...).
        device_type: "cuda" or "cpu"; on CUDA torch's optimizers work on all weights at once.
    Returns:
        OptimizerMemory.
    """
    numel = sum(math.prod(shape) for shape, _, _ in trained_shapes)
    if name == "muon":
        # Beside what is gathered: a matrix, its step, and the three of its iterations in bfloat16.
        matrices = [part for part in trained_shapes if len(part[0]) == 2 and not part[2]]
        saved = sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in matrices)
        every = sum(2 * math.prod(shape) * dtype.itemsize for shape, dtype, _ in trained_shapes)
        return OptimizerMemory(every - saved, _largest(matrices) * (2 * 4 + 3 * 2))
    if name == "adafactor":
        return OptimizerMemory(sum(_factored(shape) for shape, _, _ in trained_shapes), _largest(trained_shapes) * 8)
    torchao = {"adamw_torch_8bit": 1 + 4 / _BLOCK, "adamw_torch_4bit": 0.5 + 4 / 128}
    if name in torchao:
        return OptimizerMemory(sum(_torchao(shape, torchao[name]) for shape, _, _ in trained_shapes), 0)
    family = next((known for known in _STATES if known in name), None)
    is_bitsandbytes = family and (name.endswith(("bit", "_bnb")) or name == "ademamix")
    if is_bitsandbytes and not name.startswith("galore"):
        eight = "8bit" in name
        state = sum(_bitsandbytes(shape, _STATES[family], eight and not emb) for shape, _, emb in trained_shapes)
        return OptimizerMemory(state, 0, is_paged="paged" in name)
    sampled = _sampled(name, args, trained_shapes, device_type)
    if sampled:
        copies = _HELD.get(args.hessian_estimator, 0) if name in _OURS else 0
        held = copies * sum(math.prod(shape) * dtype.itemsize for shape, dtype, _ in trained_shapes)
        # Ours work on pieces of a weight.
        step = min(sampled.step, _PIECE_BYTES * PIECE[device_type]) if name in _OURS else sampled.step
        return dataclasses.replace(sampled, state=sampled.state + held, step=step)
    return OptimizerMemory(numel * _OTHERS.get(name, _UNKNOWN), 0, is_known=name in _OTHERS)


def _sampled(name, args, trained_shapes, device_type):
    """Step torch's own optimizer, or one of ours, on a small weight of each dtype, and count; None for any other."""
    kind, kwargs = _OURS.get(name), {}
    if kind is None:
        args = copy.copy(args)
        args.optim = name
        try:
            kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        except (ValueError, ImportError):
            return None
        if not (isinstance(kind, type) and kind.__module__.startswith("torch.optim")):
            return None
    if device_type == "cuda" and not kwargs.get("fused") and "foreach" in inspect.signature(kind).parameters:
        kwargs = {**kwargs, "foreach": True}
    state = step = 0.0
    by_dtype = {}
    for shape, dtype, _ in trained_shapes:
        by_dtype[dtype] = by_dtype.get(dtype, 0) + math.prod(shape)
    for dtype, numel in by_dtype.items():
        few, many = (_stepped(kind, kwargs, dtype, count) for count in _COUNTS)
        sample = math.prod(_SAMPLE)
        # What grows with the number of weights is made of all of them, the rest of one after the other.
        of_all = (many[1] - few[1]) / (_COUNTS[1] - _COUNTS[0])
        of_one = few[1] - _COUNTS[0] * of_all
        state += few[0] / (_COUNTS[0] * sample) * numel
        step += of_all / sample * numel + of_one / sample * min(_largest(trained_shapes), numel)
    return OptimizerMemory(state, step)


def _stepped(kind, kwargs, dtype, count):
    """Return (bytes of the state, bytes that a step makes besides) of some small weights."""
    weights = [torch.nn.Parameter(torch.zeros(_SAMPLE, dtype=dtype)) for _ in range(count)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer = kind(weights, **kwargs)
    optimizer.step()
    held = [value for kept in optimizer.state.values() for value in kept.values() if torch.is_tensor(value)]
    with LiveBytes([*weights, *(weight.grad for weight in weights), *held]) as live:
        optimizer.step()
    return sum(value.numel() * value.element_size() for value in held if value.dim()), live.peak


def _factored(shape):
    if len(shape) < 2:
        return 4 * math.prod(shape)
    return 4 * math.prod(shape[:-2]) * (shape[-2] + shape[-1])


def _torchao(shape, each):
    numel = math.prod(shape)
    return 2 * numel * (each if numel >= _SMALLEST and numel % _BLOCK == 0 else 4)


def _bitsandbytes(shape, states, eight):
    numel = math.prod(shape)
    if not eight or numel < _SMALLEST:
        return states * numel * 4
    return states * (numel + 4 * -(-numel // _BLOCK))


def _largest(trained_shapes):
    return max((math.prod(shape) for shape, _, _ in trained_shapes), default=0)
