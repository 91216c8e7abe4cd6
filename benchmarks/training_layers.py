"""P6: a step whose losses end at layer 7 of 32 (RMU), built of llm_unlearn.activations, against the bare unit."""
# Shapes: B sequences, T tokens, D hidden size.

import copy
import functools
import statistics
from dataclasses import dataclass, field

import torch
import training_peers
from training_meters import alternate, flops, peak_bytes, ratios
from training_report import Row

from llm_unlearn.activations import capture, frozen_copies, run_from_layer
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.models import train_only
from llm_unlearn.truncation import Truncation, truncate

LAYER = 7
TRAINED = (5, 6, 7)
_SMALL = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 32,
    "num_attention_heads": 8, "num_key_value_heads": 2,
}  # fmt: skip
"""A head of 1.8% of a forward, as in a model of 7B; with the vocabulary of one, the unit would be a quarter head."""
QUICK = {**_SMALL, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 10, "vocab_size": 64}
LARGE = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
_GPU = {**_SMALL, "hidden_size": 2048, "intermediate_size": 7168, "num_attention_heads": 16, "num_key_value_heads": 4}
TARGETS = {"shared": 0.33, "cached": 0.15, "both": 0.15}
_NAMES = {
    "shared": "RMU step, layer 7 of 32, reference shares the frozen layers",
    "cached": "RMU step, layer 7 of 32, output of layer 4 cached",
    "both": "RMU step, layer 7 of 32, output of layer 4 and the reference's states cached",
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
"""Of the peer's gradients, made in two forwards of other shapes; the whole model's in one have to be bit-equal."""


@dataclass
class Steered:
    """A model with what RMU needs on top.

    Attributes:
        model: causal language model, truncated above LAYER.
        truncation: to undo that.
        copies: the layers of the trained matrices as they were.
        forget, retain: (B, T) ids.
        mask: (2B, T) ones.
        target: (D,) state that forget tokens are steered to.
        prefix: (2B, T, D) output of the last layer below the trained ones, once a step has made it.
        reference: (B, T, D) states of the retain rows before training, likewise.
    """

    model: torch.nn.Module
    truncation: Truncation = field(repr=False)
    copies: torch.nn.ModuleList
    forget: torch.Tensor
    retain: torch.Tensor
    mask: torch.Tensor
    target: torch.Tensor
    prefix: torch.Tensor | None = None
    reference: torch.Tensor | None = None


def run(args):
    """Return the rows of P6: FLOPs and time on a small model, FLOPs at the shapes of Mistral 7B."""
    shape, size = (_GPU, (4, 512)) if args.device == "cuda" else (_SMALL, (2, 64))
    shape, size = (QUICK, (2, 8)) if args.quick else (shape, size)
    model = make_model(shape, args.device, torch.bfloat16 if args.device == "cuda" else torch.float32)
    found = measure(model, _ids(shape, size, args.device), args)
    title = f"d={shape['hidden_size']}, V={shape['vocab_size']}"
    rows = _rows(found, title)
    if not args.quick:
        shapes = make_model(LARGE, "meta")
        ids = _ids(LARGE, (1, 512), "meta")
        counted = count(shapes, shapes, ids)
        rows += [_flops_row(name, counted, "Mistral 7B, T=512") for name in TARGETS]
    return rows


def make_model(shape, device, dtype=torch.float32):
    """Return a Mistral with random weights; a count of every FLOP needs the plain attention."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    fields = {"max_position_embeddings": 1024, "sliding_window": None, "attn_implementation": "eager"}
    with torch.device(device):
        return MistralForCausalLM(MistralConfig(**shape, **fields)).to(dtype)


def steered(model, ids, steering_coef=2.0):
    """Freeze all but the trained matrices, copy these, and take off what is above the layer.

    Args:
        model: causal language model; it is changed in place.
        ids: (forget (B, T), retain (B, T)).
        steering_coef: length of the target.
    """
    train_only(model, [f"model.layers.{layer}.mlp.down_proj.weight" for layer in TRAINED])
    copies = frozen_copies(model, TRAINED[0], LAYER)
    generator = torch.Generator().manual_seed(2)
    target = torch.rand(model.config.hidden_size, generator=generator)
    target = (steering_coef * target / target.norm()).to(ids[0].device, model.dtype)
    mask = torch.ones(2 * len(ids[0]), ids[0].shape[1], dtype=torch.long, device=ids[0].device)
    return Steered(model, truncate(model, LAYER), copies, *ids, mask, target)


def shared_prefix(subject):
    """Run a step: one forward of both streams up to the layer, and the reference from the last shared layer on."""
    layers, rows = decoder_layers(subject.model), len(subject.forget)
    with capture(layers[TRAINED[0] - 1], layers[LAYER]) as found:
        subject.model(
            input_ids=torch.cat([subject.forget, subject.retain]), attention_mask=subject.mask, use_cache=False
        )
    subject.prefix = found[0].detach()
    _backward(subject, found[1], _reference(subject, subject.prefix[rows:]))


def cached_prefix(subject):
    """Run a step on the cached output of the frozen layers."""
    hidden = run_from_layer(subject.model, subject.prefix, TRAINED[0], LAYER, subject.mask)
    _backward(subject, hidden, _reference(subject, subject.prefix[len(subject.forget) :]))


def both_cached(subject):
    """Run a step on the cached output of the frozen layers, beside cached states of the reference."""
    hidden = run_from_layer(subject.model, subject.prefix, TRAINED[0], LAYER, subject.mask)
    _backward(subject, hidden, subject.reference)


STEPS = {"shared": shared_prefix, "cached": cached_prefix, "both": both_cached}


def _reference(subject, prefix):
    mask = subject.mask[: len(prefix)]
    with torch.no_grad():
        subject.reference = run_from_layer(subject.model, prefix, TRAINED[0], LAYER, mask, layers=subject.copies)
    return subject.reference


def _backward(subject, hidden, reference):
    rows = len(subject.forget)
    steered, kept = hidden[:rows], hidden[rows:]
    ((steered - subject.target).square().mean() + (kept - reference).square().mean()).backward()


def whole_forward(subject, reference):
    """Run the same step through the whole model and a whole reference, all their layers and heads; for comparison."""
    both, rows = torch.cat([subject.forget, subject.retain]), len(subject.forget)
    with subject.truncation.whole() as model, capture(decoder_layers(model)[LAYER]) as found:
        model(input_ids=both, attention_mask=subject.mask, use_cache=False)
    with torch.no_grad(), capture(decoder_layers(reference)[LAYER]) as before:
        reference(input_ids=both, attention_mask=subject.mask, use_cache=False)
    _backward(subject, found[0], before[0][rows:])


def count(model, whole, ids):
    """Return the FLOPs of each step.

    Args:
        model: truncated in place, and restored.
        whole: model for the unit and the peer; the same one serves.
        ids: (forget, retain).
    """
    stream = {"input_ids": ids[0], "labels": ids[0], "attention_mask": torch.ones_like(ids[0])}
    target = torch.zeros(model.config.hidden_size, device=ids[0].device)
    found = {"unit": flops(lambda: training_peers.bare(whole, stream))}
    found["peer"] = flops(lambda: training_peers.rmu(whole, whole, LAYER, *ids, target))
    subject = steered(model, ids)
    found |= {name: flops(functools.partial(step, subject)) for name, step in STEPS.items()}
    subject.truncation.restore()
    return found


def measure(model, ids, args):
    """Return {"flops", "seconds", "peaks"} of the unit, the peer and STEPS, after comparing gradients."""
    peer = copy.deepcopy(model)
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    counted = count(copy.deepcopy(model), copy.deepcopy(model), ids)
    subject = steered(model, ids)
    _perturb(model, peer)
    stream = {"input_ids": ids[0], "labels": ids[0], "attention_mask": torch.ones_like(ids[0])}
    steps = {
        "unit": (peer, lambda: training_peers.bare(peer, stream)),
        "peer": (peer, lambda: training_peers.rmu(peer, reference, LAYER, *ids, subject.target)),
        **{name: (model, functools.partial(step, subject)) for name, step in STEPS.items()},
    }
    fresh = {name: _fresh(*step) for name, step in steps.items()}
    peaks = {name: peak_bytes(step, args.device) for name, step in fresh.items()}
    fresh["peer"]()
    _check(subject, fresh, peer, reference)
    return {"flops": counted, "peaks": peaks, "seconds": alternate(fresh, args.repeats, args.device)}


def _fresh(model, step):
    def run():
        model.zero_grad(set_to_none=True)
        step()

    return run


def _perturb(*models):
    """Move the trained matrices of both models by the same noise: at the start the retain term has no gradient."""
    for model in models:
        generator = torch.Generator().manual_seed(1)
        for layer in TRAINED:
            weight = decoder_layers(model)[layer].mlp.down_proj.weight
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.data.add_(noise, alpha=0.1 * weight.std().item())


def _gradients(model):
    return [decoder_layers(model)[layer].mlp.down_proj.weight.grad for layer in TRAINED]


def _check(subject, fresh, peer, reference):
    """Compare gradients: bit for bit with the whole model's, within a tolerance with the peer's.

    Raises:
        AssertionError: they differ.
    """
    _fresh(subject.model, lambda: whole_forward(subject, reference))()
    expected = [gradient.clone() for gradient in _gradients(subject.model)]
    for name in TARGETS:
        fresh[name]()
        found = _gradients(subject.model)
        same = all(torch.equal(ours, whole) for ours, whole in zip(found, expected, strict=True))
        assert same, f"{name}: a gradient is not bit-equal to the whole model's"
    for ours, theirs in zip(expected, _gradients(peer), strict=True):
        off = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        assert off <= TOLERANCE[theirs.dtype], f"a gradient differs from the peer's by {off:.2g}"


def _rows(found, title):
    spent, peaks, rows = found["seconds"], found["peaks"], []
    for name, target in TARGETS.items():
        rows.append(_flops_row(name, found["flops"], title))
        absolute = {f"{what} seconds": statistics.median(spent[what]) for what in ("unit", "peer", name)}
        rounds, peer = ratios(spent[name], spent["unit"]), ratios(spent["peer"], spent["unit"])
        job = f"{_NAMES[name]}; {title}"
        rows.append(Row.timed("P6", job, "time / bare unit", rounds, peer, target, absolute=absolute))
        absolute = {f"{what} peak bytes": peaks[what] for what in ("unit", "peer", name)}
        peak, peer = peaks[name] / peaks["unit"], peaks["peer"] / peaks["unit"]
        rows.append(Row("P6", job, "peak / bare unit's", peak, peer, absolute=absolute))
    return rows


def _flops_row(name, counted, title):
    absolute = {f"{what} FLOPs": counted[what] for what in ("unit", "peer", name)}
    ours, peer = counted[name] / counted["unit"], counted["peer"] / counted["unit"]
    return Row("P6", f"{_NAMES[name]}; {title}", "FLOPs / bare unit", ours, peer, TARGETS[name], absolute=absolute)


def _ids(shape, size, device):
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randint(shape["vocab_size"], size, generator=generator).to(device) for _ in range(2))
