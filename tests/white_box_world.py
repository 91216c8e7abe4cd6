"""Tiny models whose knowledge sits in a known layer, and answers to read off them, for the white-box tests."""

import copy

import torch
from tiny_architectures import make_model

from llm_unlearn.attacks.answer_states import AuditedRow, Bounds
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.evaluation.packing import Sequence

BOUNDS = Bounds(pad_id=0)
KNOWN = 7
"""The token that `knowing` models say after everything."""

_OUTPUTS = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


def make_lively(name="llama", **changes):
    """Return a model drawn from a wider range, whose layers hear one another."""
    return make_model(name, initializer_range=0.3, **changes).eval()


@torch.no_grad()
def make_identity(model, name, layer):
    """Zero what a decoder layer adds to the residual stream, so that it hands on what it gets."""
    for path in _OUTPUTS[name]:
        for parameter in decoder_layers(model)[layer].get_submodule(path).parameters():
            parameter.zero_()


@torch.no_grad()
def redrawn(model, layer, seed=5):
    """Return a copy of a model in which the weights of one decoder layer are drawn anew."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in decoder_layers(other)[layer].parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return other


@torch.no_grad()
def knowing(writes):
    """Return a GPT-2 of 5 layers that hand on what they get, except that some add a multiple of one direction.

    With the direction in the stream the model says `KNOWN` for sure, without it the token has some small probability.

    Args:
        writes: {layer: factor}.
    """
    model = make_model("gpt2").eval()
    for layer in range(5):
        make_identity(model, "gpt2", layer)
    model.transformer.ln_f.weight.mul_(100)
    for layer, factor in writes.items():
        model.transformer.h[layer].mlp.c_proj.bias.copy_(factor * 100 * model.lm_head.weight[KNOWN])
    return model


def random_rows(count=6, answer=None):
    """Return AuditedRows of ragged lengths; the answers are random tokens, or all the given one."""
    generator, rows = torch.Generator().manual_seed(1), []
    for index in range(count):
        length = 6 + 3 * index % 13
        ids = torch.randint(3, 96, (length,), generator=generator).tolist()
        first = 2 + index % 3
        if answer is not None:
            ids[first:] = [answer] * (length - first)
        rows.append(AuditedRow("forget", index, [Sequence(tuple(ids), tuple(range(first, length)))]))
    return rows


@torch.no_grad()
def own_logps(model, row):
    """Return (log-probabilities of the answer's tokens, first choices) by a plain forward of one row."""
    (sequence,) = row.sequences
    ids, scored = torch.tensor([sequence.ids]), torch.tensor(sequence.scored)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, scored - 1].float()
    labels = ids[0, scored]
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0], logits.argmax(-1) == labels
