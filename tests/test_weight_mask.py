"""Weight masks on an optimizer: what is left out stays bit for bit, what trains is what the optimizer makes of it."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_parameter_pull import stub

from llm_unlearn.addons import packed_bits
from llm_unlearn.addons.mask_files import write_mask
from llm_unlearn.addons.weight_mask import WeightMask
from llm_unlearn.parameter_pull import PullToZero

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(first, second):
    """Whether two tensors are equal bit for bit; the signs of zeros too."""
    return torch.equal(first.view(INTEGERS[first.element_size()]), second.view(INTEGERS[second.element_size()]))


# ---- Bits ----


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1001])
def test_bits_are_those_of_numpy_and_come_back(count):
    bits = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    packed = packed_bits.pack(bits)
    assert (packed.numpy() == np.packbits(bits.numpy())).all()
    assert torch.equal(packed_bits.unpack(packed, count), bits) and packed_bits.count(packed) == int(bits.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_keep_and_scale_are_exact(dtype):
    """More elements than are taken at a time; the signs of zeros too, and a NaN that is left out."""
    count = 8 * packed_bits._CHUNK_BYTES["cpu"] + 13
    generator = torch.Generator().manual_seed(0)
    bits = torch.rand(count, generator=generator) < 0.5
    tensor = torch.randn(count, generator=generator).to(dtype)
    tensor[:4], bits[:4] = torch.tensor([-0.0, -1.0, float("nan"), -0.0]), torch.tensor([True, False, False, False])
    packed, kept, scaled = packed_bits.pack(bits), tensor.clone(), tensor.clone()
    packed_bits.keep(kept, packed)
    assert same_bits(kept, torch.where(bits, tensor, torch.zeros((), dtype=dtype)))
    packed_bits.scale(scaled, packed, 1 - 3e-3 * 0.1)
    assert same_bits(scaled, torch.where(bits, tensor.clone().mul_(1 - 3e-3 * 0.1), tensor))


# ---- On an optimizer ----


def written(path, mask, **record):
    """Write a mask {name: bool}; returns the path as text."""
    packed = {name: packed_bits.pack(bits.reshape(-1)) for name, bits in mask.items()}
    write_mask(path, packed, {name: tuple(bits.shape) for name, bits in mask.items()}, record)
    return str(path)


def small_model(seed=0):
    """A matrix that is masked in part, one that trains whole, and a bias, with a negative zero among the weights."""
    torch.manual_seed(seed)
    model = torch.nn.ModuleDict({"part": torch.nn.Linear(5, 7), "whole": torch.nn.Linear(3, 4, bias=False)})
    with torch.no_grad():
        model["part"].weight[0, :2] = torch.tensor([-0.0, 0.0])
    model.config = SimpleNamespace(_name_or_path="")
    return model


def small_mask():
    generator = torch.Generator().manual_seed(1)
    mask = {name: torch.rand(p.shape, generator=generator) < 0.6 for name, p in small_model().named_parameters()}
    mask["part.weight"][0, :2] = False
    return {**mask, "whole.weight": torch.ones(4, 3, dtype=torch.bool)}


def mask_on(model, folder, mask=None):
    """Return (a stub of a trainer, the WeightMask that it has)."""
    file = written(Path(folder) / "mask.safetensors", small_mask() if mask is None else mask)
    trainer = stub(model)
    trainer.args.weight_mask, trainer.args.allow_pickle_mask = file, False
    return trainer, WeightMask(trainer)


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


EXACT = {
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw_for_loop": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "foreach": False}),
    "adamw_foreach": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "foreach": True, "amsgrad": True}),
    "adamw_fused": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
    "adamw_no_decay": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.0}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adam_decoupled": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1, "momentum": 0.9, "nesterov": True}),
}
RESTORED = {
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "weight_decay": 0.1}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.01, "weight_decay": 0.1}),
    "rprop": (torch.optim.Rprop, {"lr": 0.01}),
}


def stepped(kind, folder, masked, steps=4):
    """Train the small model, masked by a WeightMask or its gradients by hand; returns (model, optimizer)."""
    made, options = {**EXACT, **RESTORED}[kind]
    model = small_model()
    optimizer = made([{"params": [p]} for p in model.parameters()], **options)
    bits = list(small_mask().values())

    def train(step_with):
        for step in range(steps):
            for parameter, gradient in zip(model.parameters(), gradients(model, step), strict=True):
                parameter.grad = gradient
            for group in optimizer.param_groups:
                group["lr"] = options["lr"] / (1 + step)
            step_with()

    if not masked:

        def plain():
            for parameter, kept in zip(model.parameters(), bits, strict=True):
                parameter.grad = torch.where(kept, parameter.grad, 0.0)
            optimizer.step()

        train(plain)
        return model, optimizer
    trainer, mask = mask_on(model, folder)
    with mask.attached():
        _, prepared = trainer.accelerator.prepare(model, optimizer)

        def stepping():
            trainer.accelerator.clip_grad_norm_(model.parameters(), float("inf"))
            prepared.step()

        train(stepping)
    return model, optimizer


@pytest.mark.parametrize("kind", EXACT)
def test_what_trains_is_bit_for_bit_what_the_plain_optimizer_makes_of_the_same_gradients(kind, tmp_path):
    """Weight decay too, taken out of the optimizer's hands; what is left out is neither moved nor remembered."""
    model, optimizer = stepped(kind, tmp_path, masked=True)
    plain, expected = stepped(kind, tmp_path, masked=False)
    start, mask = dict(small_model().named_parameters()), small_mask()
    for (name, found), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert same_bits(found[mask[name]], other[mask[name]]), name
        assert same_bits(found[~mask[name]], start[name][~mask[name]]), name
        state, of_plain = optimizer.state[found], expected.state[other]
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if state.get(key) is not None:
                assert not state[key][~mask[name]].any() and same_bits(
                    state[key][mask[name]], of_plain[key][mask[name]]
                )
        assert not torch.equal(found[mask[name]], start[name][mask[name]])
    decay = EXACT[kind][1]["weight_decay"]
    assert all(group["weight_decay"] == decay for group in optimizer.param_groups)


@pytest.mark.parametrize("kind", RESTORED)
def test_any_other_optimizer_gets_back_what_is_left_out(kind, tmp_path):
    model, _ = stepped(kind, tmp_path, masked=True)
    plain, _ = stepped(kind, tmp_path, masked=False)
    start, mask = dict(small_model().named_parameters()), small_mask()
    for (name, found), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert same_bits(found[~mask[name]], start[name][~mask[name]]), name
        assert same_bits(found[mask[name]], other[mask[name]]), name


def test_an_optimizer_that_mixes_the_elements_of_a_matrix_gets_them_back_too(tmp_path):
    """Muon makes a momentum orthogonal, so that an element without a gradient would move."""
    model = torch.nn.ModuleDict({"part": torch.nn.Linear(5, 7, bias=False)})
    model.config, start = SimpleNamespace(_name_or_path=""), model["part"].weight.detach().clone()
    kept = small_mask()["part.weight"]
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1, weight_decay=0.1)
    trainer, mask = mask_on(model, tmp_path, {"part.weight": kept})
    with mask.attached():
        _, prepared = trainer.accelerator.prepare(model, optimizer)
        for step in range(2):
            model["part"].weight.grad = gradients(model, step)[0]
            trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
            prepared.step()
    found = model["part"].weight.detach()
    assert same_bits(found[~kept], start[~kept]) and (found != start)[kept].all()


def test_the_norm_is_taken_of_masked_gradients(tmp_path):
    """Of ones: the root of how many weights train."""
    model = small_model()
    trainer, mask = mask_on(model, tmp_path)
    count = sum(int(bits.sum()) for bits in small_mask().values())
    original = trainer.accelerator.clip_grad_norm_
    with mask.attached():
        trainer.accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        norm = trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
    assert norm.item() == pytest.approx(count**0.5) and trainer.accelerator.clip_grad_norm_ == original
    assert sum(p.grad.square().sum().item() for p in model.parameters()) == pytest.approx(1.0)


def test_a_pull_is_masked_as_well(tmp_path):
    """The pull to 0 has the size of its weight in every element, after the clipping."""
    model, start, bits = small_model(), small_model(), small_mask()
    trainer, mask = mask_on(model, tmp_path)
    with PullToZero(trainer, lambda: 0.5).attached(), mask.attached():
        _, prepared = trainer.accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        prepared.step()
    for (name, found), first in zip(model.named_parameters(), start.parameters(), strict=True):
        expected = torch.where(bits[name], first - 0.5 * first.sign(), first)
        assert same_bits(found.detach(), expected.detach()), name


def test_a_step_that_a_fused_optimizer_skips_decays_nothing(tmp_path):
    model, start = small_model(), small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5, fused=True)
    trainer, mask = mask_on(model, tmp_path)
    with mask.attached():
        trainer.accelerator.prepare(model, optimizer)
        for found_inf in (1.0, 0.0):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            mask.mask_gradients()
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found_inf)
            optimizer.step()
            is_same = [torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)]
            assert is_same == [bool(found_inf)] * 3


def test_a_weight_without_a_gradient_does_not_decay(tmp_path):
    model, start = small_model(), small_model()
    trainer, mask = mask_on(model, tmp_path)
    with mask.attached():
        _, prepared = trainer.accelerator.prepare(
            model, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        )
        model["whole"].weight.grad = torch.ones_like(model["whole"].weight)
        trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        prepared.step()
    assert torch.equal(model["part"].weight, start["part"].weight)
    assert not torch.equal(model["whole"].weight, start["whole"].weight)


def test_a_mask_takes_one_bit_for_each_weight(tmp_path):
    model = small_model()
    _, mask = mask_on(model, tmp_path)
    with mask.attached():
        held = {id(part.tensor): part.kept for part in mask._parts.values()}
    sizes = [None if held[id(p)] is None else held[id(p)].nbytes for p in model.parameters()]
    assert sizes == [5, 1, None]
