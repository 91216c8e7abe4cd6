"""Bytes on each device by what they are for, in the three moments of a step that can be the fullest."""

import functools
import math
from dataclasses import dataclass

from llm_unlearn.memory.activations import activations
from llm_unlearn.memory.optimizers import optimizer_memory
from llm_unlearn.memory.shell import sizes_of

MOMENTS = ("forward", "backward", "update")
CONTEXT = {"cuda": 0.8e9, "cpu": 0.5e9}
"""Assumed bytes of the CUDA context with its libraries' workspaces, and of Python with torch on a CPU."""
MARGIN = 0.05
"""Assumed share of what comes and goes in a step that the allocator loses between its blocks."""


@dataclass(frozen=True)
class Estimate:
    """What a case takes.

    Attributes:
        case: Case.
        sizes: Sizes of its model.
        rows: {what: (bytes in the forward, in the backward, in the update)}.
        host: bytes that each process offloads to the host's memory.
        notes: sentences on what was assumed.
    """

    case: object
    sizes: object
    rows: dict
    host: float
    notes: tuple

    @functools.cached_property
    def totals(self):
        """Bytes in each moment."""
        return tuple(map(sum, zip(*self.rows.values(), strict=True)))

    @property
    def total(self):
        """Bytes in the fullest moment."""
        return max(self.totals)

    @property
    def fits(self):
        """Whether that is within the device's memory."""
        return self.total <= self.case.device_bytes


def estimate(case):
    """Estimate the memory of each process's device.

    Args:
        case: Case.
    Returns:
        Estimate.
    Raises:
        UserError: no model can be made of the config.
    """
    sizes, backend = sizes_of(case), case.backend
    optimizer = optimizer_memory(case.optim, case.source.args, sizes.trained_shapes, case.device_type)
    weights = sizes.weight_bytes / (backend.processes if backend.shards_weights else 1)
    gradients = sizes.gradient_bytes / (backend.processes if backend.shards_gradients else 1)
    states, update = _optimizer_bytes(sizes, optimizer, backend)
    host = 0
    if backend.offloads_weights:
        host, weights = host + weights, 0
    if backend.offloads_optimizer:
        host, gradients, states, update = host + gradients + states, 0, 0, 0
    early = gradients if case.accumulation > 1 or (case.sequential and len(case.streams) > 1) else 0
    forward, head, backward = _activation_bytes(case, sizes, gradients, early)
    gathered = _gathered_bytes(case, sizes)
    context = "CUDA context" if case.device_type == "cuda" else "Python and torch"
    rows = {
        "weights": (weights,) * 3,
        "gradients": (early, gradients, gradients),
        "optimizer": (states,) * 3,
        "reference": (_reference_bytes(case, sizes),) * 3,
        "activations": (forward, backward, 0),
        "logits, in chunks": (head, 0, 0),
        "gathered, buffers": gathered,
        "update, temporary": (0, 0, update),
        context: (CONTEXT[case.device_type],) * 3,
        "fragmentation": tuple(MARGIN * passing for passing in (forward + head, backward, update)),
    }
    return Estimate(case, sizes, rows, host, _notes(case, optimizer))


def _optimizer_bytes(sizes, optimizer, backend):
    """Return (bytes between steps, bytes that a step makes besides) of one process."""
    if backend.kind == "zero":
        # Each process keeps a float32 copy of its part of the trained weights, and flattens their gradients to update.
        part = sum(math.prod(shape) * 4 for shape, _, _ in sizes.trained_shapes) / backend.processes
        return optimizer.state / backend.processes + part, optimizer.step / backend.processes + part
    parts = backend.processes if backend.kind == "fsdp" else 1
    return optimizer.state / parts, optimizer.step / parts


def _activation_bytes(case, sizes, gradients, early):
    """Return (activations in the forward, logits in the forward, both in the backward) beside the gradients."""
    found = activations(case)
    reference = found.reference if case.reference_mode in ("live", "adapter_off") else 0
    forward = max(found.forward, found.kept + found.head, found.kept + reference) - found.head
    if early or case.backend.shards_gradients:
        return forward, found.head, max(found.kept + found.head_backward, found.backward)
    # Gradients come as activations go: the fullest moment is the backward's beginning, with the head's gradient alone,
    # or its end.
    beginning = max(found.kept + found.head_backward, found.backward + sizes.head_gradient_bytes)
    return forward, found.head, max(beginning - gradients, found.last_layer)


def _reference_bytes(case, sizes):
    """Return the bytes of what the frozen reference keeps on the device."""
    held, is_sharded = 0, case.backend.shards_weights
    if case.reference_mode == "live":
        held = sizes.weight_bytes / (case.backend.processes if is_sharded else 1)
    lends_its_head = case.reference_mode in ("none", "adapter_off") or (held and not is_sharded)
    if case.source.is_kl and sizes.head_gradient_bytes and not lends_its_head:
        held += math.prod(sizes.head_shape) * (case.autocast or case.dtype).itemsize
    return held


def _gathered_bytes(case, sizes):
    """Return, for each moment, the bytes of gathered weights and of the buffers that gradients are reduced in."""
    backend = case.backend
    if backend.kind == "ddp":
        return (sizes.gradient_bytes,) * 3
    if backend.kind == "fsdp":
        share = 1 if case.autocast is None else case.autocast.itemsize / case.dtype.itemsize
        # The root holds embeddings and head throughout; one layer computes while the next is fetched.
        held = (sizes.root_bytes + 2 * sizes.layer_bytes) if backend.reshards else sizes.weight_bytes
        held = min(held, sizes.weight_bytes) * share
        reduced = min(sizes.root_gradient_bytes + 2 * sizes.layer_gradient_bytes, sizes.gradient_bytes) * share
        return held, held + reduced, 0
    if backend.kind == "zero":
        buckets = backend.bucket_elements * 4
        if backend.stage < 3:
            return 0, buckets, 0
        held = min(sizes.weight_bytes, backend.live_elements * case.dtype.itemsize + sizes.layer_bytes)
        return held + buckets, held + buckets, buckets
    return 0, 0, 0


def _notes(case, optimizer):
    notes = []
    if not optimizer.is_known:
        notes.append(f"the optimizer '{case.optim}' is not known here: 8 bytes for each trained weight are assumed")
    if optimizer.is_paged:
        notes.append("a paged optimizer's state moves to the host's memory when the device is full; it is counted here")
    if case.load_in_4bit or case.load_in_8bit or "bnb" in case.optim or "8bit" in case.optim:
        notes.append("8-bit optimizers and quantized weights need bitsandbytes: pip install bitsandbytes")
    return tuple(notes)
