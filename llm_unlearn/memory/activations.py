"""What a forward and a backward hold besides weights and gradients, measured on tensors that have shapes alone."""
# Shapes: B sequences, T tokens, D hidden size, V vocabulary, N positions.

import contextlib
import functools
import logging
import warnings
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llm_unlearn.chunked_head import Projection, chunk_rows, token_scores
from llm_unlearn.errors import UserError
from llm_unlearn.memory.live_bytes import LiveBytes
from llm_unlearn.memory.shell import as_fake, build, causal_model, sizes_of

_FEW, _ONE_MORE = 2, 3  # layers: the first may differ from the rest, because its input needs no gradient


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch on one device, gradients of weights left out.

    Attributes:
        kept: alive when the decoder's forward ends: what the backward needs, and what autocast cached.
        forward: at most while it runs.
        backward: at most while the backward runs.
        last_layer: at most in the backward of few layers, which is what is left when the gradients are whole.
        reference: at most in a forward without gradients.
        head, head_backward: at most in the head's forward, and in its backward.
    """

    kept: float
    forward: float
    backward: float
    last_layer: float
    reference: float
    head: float
    head_backward: float


def activations(case):
    """Measure a micro-batch.

    Args:
        case: Case.
    Returns:
        Activations. Where all decoder layers are alike, models of two and of three are run and the rest is their
        difference times the layers that are left.
    """
    sizes, key = sizes_of(case), case.of_micro_batch()
    few = _decoder(key, min(_FEW, sizes.num_layers))
    if not sizes.is_uniform or sizes.num_layers <= _ONE_MORE:
        found = _decoder(key, sizes.num_layers)
    else:
        more = _decoder(key, _ONE_MORE)
        found = [low + (high - low) * (sizes.num_layers - _FEW) for low, high in zip(few, more, strict=True)]
    kept, forward, backward, reference = found
    return Activations(kept, forward, backward, few[2], reference, *_head(case, sizes))


@functools.lru_cache(maxsize=256)
def _decoder(case, num_layers):
    """Return (kept, forward, backward, reference) of a model of some layers, see Activations."""
    try:
        return _run_decoder(case, num_layers)
    except (RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
        # Routing among experts, for example, looks at values, and there are none.
        name = case.source.config.model_type
        first_line = str(error).strip().split("\n")[0]
        raise UserError(f"a '{name}' cannot be run without its weights to see what it keeps: {first_line}") from error


def _run_decoder(case, num_layers):
    model = _as_gathered(build(case, num_layers), case)
    with _fake(case) as autocast:
        as_fake(model)
        decoder = _prepared(model, case).base_model
        batch = {"input_ids": torch.zeros(case.rows, case.width, dtype=torch.long)}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["use_cache"] = False
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            # With gradients in place, what is made for them is added to them and freed.
            parameter.grad = torch.empty_like(parameter)
        known = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in trained)]
        with LiveBytes(known) as live:
            with autocast():
                hidden = decoder(**batch)[0]
            kept, forward = live.live, live.peak
            gradient = torch.empty_like(hidden)
            live.restart()
            hidden.backward(gradient)
            backward = live.peak
            del hidden, gradient
        with LiveBytes(known) as live, torch.no_grad(), autocast():
            decoder(**batch)
        return kept, forward, backward, live.peak


def _as_gathered(model, case):
    """Cast to the compute dtype what FSDP2 gathers in it."""
    if case.backend.kind == "fsdp" and case.autocast is not None:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(case.autocast)
    return model


def _prepared(model, case):
    inner = causal_model(model)
    if case.checkpointing:
        with warnings.catch_warnings():
            # transformers 5.23 has a newer name, which 5.10 lacks.
            warnings.simplefilter("ignore", FutureWarning)
            inner.gradient_checkpointing_enable()
        if case.use_peft:
            inner.enable_input_require_grads()
    return inner


def _head(case, sizes):
    """Return the bytes of (forward, backward) at most of the chunked head, its weight's gradient left out.

    The head's own function is run on few and on more positions of one chunk; what grows with them is the chunk's.
    """
    vocabulary, hidden_size = sizes.head_shape
    tokens = max(case.width - 1, 1)
    # Each stream is scored by itself.
    positions = max(rows for _, rows in case.streams) * tokens
    chunk = min(positions, chunk_rows(vocabulary, torch.device(case.device_type)))
    few, more = 1, 1 + min(chunk, chunk_rows(vocabulary, torch.device("cpu")))
    # Of several chunks the last may still be alive while the next is made.
    asked = more if positions == chunk else 2 * more
    low, high = _run_head(case.of_model(), few), _run_head(case.of_model(), asked)
    # The states of the tokens that count are taken out of all; their gradients gather over all chunks.
    states = case.rows * tokens * hidden_size * case.dtype.itemsize * (2 if case.source.is_kl else 1)
    beyond = (positions - chunk) * hidden_size * case.dtype.itemsize
    grown = [a + (b - a) / (more - few) * (chunk - few) for a, b in zip(low, high, strict=True)]
    # A gradient that was taken in the forward waits for the backward.
    waiting = 4 * vocabulary * hidden_size if case.source.is_linear and sizes.head_gradient_bytes else 0
    return grown[0] + states, grown[1] + states + beyond + waiting


@functools.lru_cache(maxsize=64)
def _run_head(case, positions):
    head = causal_model(_as_gathered(build(case, 1), case)).get_output_embeddings()
    with _fake(case) as autocast:
        weight = as_fake(head).weight
        projection = Projection(weight)
        hidden = torch.empty(positions, weight.shape[1], dtype=weight.dtype, requires_grad=True)
        labels = torch.zeros(positions, dtype=torch.long)
        reference = (hidden.detach(), Projection(weight.detach())) if case.source.is_kl else None
        if weight.requires_grad:
            weight.grad = torch.empty_like(weight)
        with LiveBytes([weight, hidden, labels, *([weight.grad] if weight.requires_grad else [])]) as live:
            with autocast():
                if case.source.is_linear:
                    token_scores(hidden, projection, labels, reference, linear=torch.ones(positions))
                # The backward is asked of the other way, which looks at no values.
                values = token_scores(hidden, projection, labels, reference)
            forward = live.peak
            live.restart()
            values.backward(torch.empty_like(values))
            return forward, live.peak


@contextlib.contextmanager
def _fake(case):
    """Run on fake tensors; yields a function that opens the forward's autocast."""

    def autocast():
        return torch.autocast("cpu", case.autocast, enabled=case.autocast is not None)

    # It logs with a traceback what is raised, and told in one sentence, anyway.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    with FakeTensorMode():
        yield autocast
