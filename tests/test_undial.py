"""UNDIAL and the KL method: the targets by hand, and functions of whole distributions read off any head in chunks."""

import contextlib
import math
from functools import partial

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_chunked_head import Largest
from test_head_reading import ADAPTERS, STREAMS, batch, forward, gradients, make, projection_of, ref_hidden
from test_objectives import PRECISIONS, N, V, check, leaf, log_softmax, numbers
from test_reference import MODES, llama, loss_and_gradients, make_trainer, with_lora
from tiny_world import command, terms

from llm_unlearn import chunked_head
from llm_unlearn.cli.unlearn import main
from llm_unlearn.errors import UserError
from llm_unlearn.head import concatenate, counted_labels, counted_states, split
from llm_unlearn.head_reading import HeadReader, score_streams
from llm_unlearn.methods.kl import KLArguments
from llm_unlearn.methods.undial import UndialArguments
from llm_unlearn.objectives.distillation import adjusted_self_distillation, cross_entropy_to_reference
from llm_unlearn.objectives.likelihood import kl_divergence
from llm_unlearn.reference import HIDDEN

LN2, LN3 = math.log(2), math.log(3)
HEADS = [("llama", None), ("llama_tied", None), ("gemma2_softcap", None), ("gptj_bias", None)]
HEADS += [("recurrent_gemma_own", None), ("llama", "on_head"), ("llama", "head_saved"), ("llama", "off_head")]


# ---- The formulas ----


def test_undial_worked_out_by_hand():
    """z0 = (ln 6, 0, 0) lowered by ln 3 at the first is q = (1/2, 1/4, 1/4); p = (3/4, 1/8, 1/8).

    KL(q || p) = 1/2 ln(2/3) + 1/2 ln 2 = ln 2 - ln(3)/2, and the gradient is p - q.
    """
    logits, reference = leaf([[math.log(6), 0.0, 0.0]]), leaf([[math.log(6), 0.0, 0.0]])
    loss = adjusted_self_distillation(logits, torch.tensor([0]), reference, LN3)
    assert loss.item() == pytest.approx(LN2 - LN3 / 2, rel=1e-12)
    loss.sum().backward()
    assert logits.grad[0].tolist() == pytest.approx([0.25, -0.125, -0.125], rel=1e-12)
    assert reference.grad is None


def test_cross_entropy_to_the_reference_worked_out_by_hand():
    """p = (1/4, 3/4), r = (1/2, 1/2): C = ln 2 whatever p is, so no gradient; r = (1/4, 3/4): C = ln 4 - 3/4 ln 3."""
    logits = leaf([[0.0, LN3], [0.0, LN3]])
    found = cross_entropy_to_reference(logits, torch.tensor([[0.0, 0.0], [0.0, LN3]], dtype=torch.float64))
    assert found.tolist() == pytest.approx([LN2, math.log(4) - 0.75 * LN3], rel=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    # dC/dz_v = p_v * (-log r_v - C): 1/4 * (ln 4 - C) = 3/16 ln 3 at the first, and its negative at the second.
    assert gradient.flatten().tolist() == pytest.approx([0, 0, 3 / 16 * LN3, -3 / 16 * LN3], abs=1e-12)


def test_where_the_model_is_its_reference_the_divergence_has_no_gradient_and_its_cross_entropy_has():
    logits = leaf(numbers(N, V, seed=1))
    reference = logits.detach().clone()
    for loss in (kl_divergence(logits, reference), kl_divergence(reference, logits)):
        if loss.requires_grad:
            assert torch.autograd.grad(loss.sum(), logits)[0].abs().max() < 1e-12
    (found,) = torch.autograd.grad(cross_entropy_to_reference(logits, reference).sum(), logits)
    assert found.abs().max() > 0.1
    # KL(p || r) is 0, so that what is left is the entropy of p.
    entropy = -(reference.log_softmax(-1) * reference.softmax(-1)).sum(-1)
    assert torch.allclose(cross_entropy_to_reference(logits, reference), entropy, rtol=1e-12)


def test_undial_is_zero_at_its_target_and_gentle_far_from_it():
    """Gradients of p - q never exceed 1, wherever the model is; a strength of 0 would be plain self-distillation."""
    labels, reference = torch.arange(N) % V, torch.tensor(numbers(N, V, seed=2))
    target = reference.clone()
    target[torch.arange(N), labels] -= 10.0
    logits = target.clone().requires_grad_()
    loss = adjusted_self_distillation(logits, labels, reference, 10.0)
    assert loss.detach().abs().max() < 1e-12 and torch.autograd.grad(loss.sum(), logits)[0].abs().max() < 1e-12
    far = (100 * logits.detach()).requires_grad_()
    found = torch.autograd.grad(adjusted_self_distillation(far, labels, reference, 10.0).sum(), far)[0]
    assert 0.5 < found.abs().max() <= 1


@pytest.mark.parametrize(("dtype", "rel"), PRECISIONS)
@pytest.mark.parametrize("beta", [0.5, 10.0])
def test_both_agree_with_numpy(dtype, rel, beta):
    logits, reference = leaf(numbers(N, V, seed=3), dtype), torch.tensor(numbers(N, V, seed=4), dtype=dtype)
    labels = np.random.default_rng(5).integers(0, V, N)
    lowered = reference.double().numpy().copy()
    lowered[np.arange(N), labels] -= beta
    log_p, log_q = log_softmax(logits.detach().double().numpy()), log_softmax(lowered)
    p, q = np.exp(log_p), np.exp(log_q)
    found = adjusted_self_distillation(logits, torch.tensor(labels), reference, beta)
    check(found, logits, (q * (log_q - log_p)).sum(-1), p - q, rel)
    log_r = log_softmax(reference.double().numpy())
    value = -(p * log_r).sum(-1)
    found = cross_entropy_to_reference(logits, reference)
    check(found, logits, value, p * (-log_r - value[:, None]), rel)


# ---- Read off a head, chunk by chunk ----


@pytest.mark.parametrize("name, adapter", HEADS)
def test_a_function_of_the_logits_of_any_head(name, adapter, monkeypatch):
    """Chunks of 5 positions: values and every gradient are those of the model's own logits, beside plain streams."""
    monkeypatch.setitem(chunked_head._CHUNK_ELEMENTS, "cpu", 5 * 96)
    model, inputs = make(name), batch()
    reference = model if adapter else make(name, noise=0.05).eval()
    if adapter:
        model = reference = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **ADAPTERS[adapter]))
    states, projection, ref_logits = of_reference(reference, inputs, adapter)
    function = partial(adjusted_self_distillation, beta=3.0)
    outputs = score_streams(
        HeadReader(model), model, inputs, STREAMS, 0, entropy=("forget",), linear=("retain",), ref_hidden=states,
        ref_projection=projection, of_logits={"forget": function},
    )  # fmt: skip
    forget, retain = outputs["forget"], outputs["retain"]
    assert forget.kl is None and retain.of_logits is None and retain.kl is not None
    found = gradients(model, forget.of_logits.square().sum() + 0.3 * forget.logps.sum() + retain.kl.sum())

    parts, ref_parts = (split(values, inputs, STREAMS) for values in (forward(model, inputs), ref_logits))
    logits, others = ({n: counted_states(part[n], inputs[n]).float() for n in STREAMS} for part in (parts, ref_parts))
    labels = counted_labels(inputs["forget"])
    expected = function(logits["forget"], labels, others["forget"])
    torch.testing.assert_close(forget.of_logits[forget.mask], expected, rtol=1e-5, atol=1e-5)
    assert forget.of_logits[~forget.mask].eq(0).all() and forget.entropy[forget.mask].gt(0).all()
    logps = logits["forget"].log_softmax(-1)[torch.arange(len(labels)), labels]
    loss = expected.square().sum() + 0.3 * logps.sum() + kl_divergence(logits["retain"], others["retain"]).sum()
    wanted = gradients(model, loss)
    whole = torch.stack([value.norm() for value in wanted.values()]).norm()
    assert found.keys() == wanted.keys() and whole > 1e-2
    assert max((found[key] - value).norm() / whole for key, value in wanted.items()) < 1e-5


def of_reference(reference, inputs, adapter):
    """Return (hidden states of both streams, its projection or None, its logits), with adapters off."""
    with torch.no_grad(), reference.disable_adapter() if adapter else contextlib.nullcontext():
        logits, states, reader = forward(reference, inputs), ref_hidden(reference, inputs), HeadReader(reference)

        def read(head, hidden):
            return HIDDEN.read(head, split(hidden, inputs, STREAMS)["forget"], inputs["forget"])

        states["forget"] = reader(reference, read, *concatenate(inputs, STREAMS, 0))
    has_own = not adapter and not reader.head.is_dense
    return states, projection_of(reference) if has_own else None, logits


def test_logits_of_all_positions_never_exist(monkeypatch):
    """400 positions times 96 logits would be 38,400 numbers; the hidden states are 12,800, a chunk of five is 480."""
    monkeypatch.setitem(chunked_head._CHUNK_ELEMENTS, "cpu", 5 * 96)
    model, labels = make("llama"), torch.arange(400) % 96
    ids, states = torch.tensor([[5, 6, 7, 8]]), torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    function = partial(adjusted_self_distillation, beta=3.0)

    def read(head, hidden):
        states_of = hidden.repeat(1, 100, 1)[0]
        return head.scores(states_of, labels, states, projection_of(model), of_logits=function).reshape(-1)

    with Largest() as largest:
        HeadReader(model)(model, read, ids, torch.ones_like(ids)).sum().backward()
    assert largest.numel == 400 * 32


def test_no_tokens_give_no_values_and_zero_gradients():
    model, inputs = make("llama"), batch(((1, 1), (5,)))
    function = partial(adjusted_self_distillation, beta=3.0)
    states = {"forget": torch.zeros(0, 32)}
    outputs = score_streams(
        HeadReader(model), model, inputs, STREAMS, 0, ref_hidden=states, of_logits={"forget": function}
    )
    assert outputs["forget"].of_logits.shape == (2, 0)
    found = gradients(model, outputs["forget"].of_logits.sum() + 0 * outputs["retain"].logps.sum())
    assert found["lm_head.weight"].eq(0).all()


# ---- The trainers ----


@pytest.mark.parametrize("method, flags", [("undial", {"retain_weight": 1.0, "retain_loss": "kl"}), ("kl", {})])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_every_mode_of_the_reference_gives_the_same_loss_and_gradients(lora, method, flags, tmp_path):
    """Float32 forwards in other batches differ in the last bits; a reference that moved along would be off by 1."""
    found = {}
    for mode, for_lora in MODES:
        if for_lora == lora:
            model = with_lora(llama()) if lora else None
            trainer = make_trainer(method, tmp_path, model, reference=mode, num_train_epochs=2, **flags)
            found[mode] = loss_and_gradients(trainer)
    loss, wanted = found.pop("live")
    norm = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert norm > 0.1 and len(found) == 1 + lora
    for other_loss, other in found.values():
        assert other_loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
        assert all((other[name] - wanted[name]).norm() <= 2e-6 * norm for name in wanted)


def test_undial_reads_no_retain_set_unless_asked(tmp_path):
    trainer = make_trainer("undial", tmp_path)
    assert list(trainer.train_dataset.streams) == ["forget"] and list(trainer.reference_readings(trainer.args)) == [
        "forget"
    ]
    with pytest.raises(UserError, match="--beta must be > 0"):
        UndialArguments(output_dir=str(tmp_path), use_cpu=True, beta=0.0)
    with pytest.raises(UserError, match="--forget_weight and --retain_weight are 0"):
        KLArguments(output_dir=str(tmp_path), use_cpu=True, forget_weight=0.0, retain_weight=0.0)


def test_undial_converges_to_its_target_and_kl_leaves_the_reference(tiny_world, tmp_path):
    """The divergence from the target falls; the cross-entropy to the reference rises from the entropy of p."""
    flags = ["--optim", "adamw_torch", "--learning_rate", "3e-3", "--num_train_epochs", "6"]
    assert main(command(tiny_world, "undial", tmp_path / "undial", *flags)) == 0
    logged = [step["loss/forget"] for step in terms(tmp_path / "undial")]
    assert 0 <= logged[-1] < 0.2 * logged[0]
    assert main(command(tiny_world, "kl", tmp_path / "kl", *flags)) == 0
    logged = terms(tmp_path / "kl")
    assert abs(logged[0]["loss/retain"]) < 1e-6 and logged[-1]["loss/forget"] < logged[0]["loss/forget"] - 1 < 0


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_undial_on_two_ranks_is_that_on_one(backend, lora, tiny_world, start_weights, tmp_path):
    import backends

    flags = ["--max_steps", "2", "--retain_weight", "1", "--retain_loss", "kl"]
    flags += ["--use_peft", "True", "--lora_dropout", "0", "--lora_r", "4"] if lora else []
    one = backends.train(command(tiny_world, "undial", tmp_path / "one", *flags))
    cut = [*flags, "--per_device_train_batch_size", "2"]
    two = backends.train(command(tiny_world, "undial", tmp_path / "two", *cut), backend, 2)
    assert backends.distance(two, one, start_weights) < 2e-4
    for found, expected in zip(terms(two), terms(one), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
