"""Weighted ascent, SatImp, CE-U and L1: numbers by hand, limits, NumPy oracles, and what the trainers make of them."""

import json
import math

import numpy as np
import pytest
import torch
from test_objectives import PRECISIONS, B, N, T, V, check, leaf, log_softmax, numbers
from test_reference import batch_of, llama, make_trainer, rows, with_lora
from tiny_world import command, weights

from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.errors import UserError
from llm_unlearn.methods.l1_sparse import L1SparseArguments
from llm_unlearn.methods.weighted import CEUArguments, SatImpArguments, WGAArguments
from llm_unlearn.objectives.distillation import cross_entropy_unlearning
from llm_unlearn.objectives.likelihood import ascent
from llm_unlearn.objectives.parameters import absolute_sum
from llm_unlearn.objectives.weighted import saturation_importance, weighted_ascent

LN2 = math.log(2)


def log_odds(p):
    """Two logits of which the first has the probability p."""
    return [math.log(p / (1 - p)), 0.0]


# ---- Golden numbers ----


def test_weighted_ascent_worked_out_by_hand():
    """At p = 1/2 and beta 2 the weight is 1/4, so L = -ln(2) / 4; the gradient is the weight, which carries none."""
    logps = leaf([-LN2])
    loss = weighted_ascent(logps, 2.0)
    assert loss.tolist() == pytest.approx([-LN2 / 4], rel=1e-12)
    assert torch.autograd.grad(loss.sum(), logps)[0].tolist() == pytest.approx([0.25], rel=1e-12)


def test_saturation_importance_worked_out_by_hand():
    """At p = 1/4, beta1 2 and beta2 1 the weight is 1/16 * 3/4 = 3/64."""
    logps = leaf([-math.log(4)])
    loss = saturation_importance(logps, 2.0, 1.0)
    assert loss.tolist() == pytest.approx([-math.log(4) * 3 / 64], rel=1e-12)
    assert torch.autograd.grad(loss.sum(), logps)[0].tolist() == pytest.approx([3 / 64], rel=1e-12)


def test_cross_entropy_unlearning_worked_out_by_hand():
    """p = (3/4, 1/8, 1/8), the first is true: L = -ln(1/4); q = (0, 1/2, 1/2) and the gradient p - q."""
    logits = leaf([[math.log(6), 0.0, 0.0]])
    loss = cross_entropy_unlearning(logits, torch.tensor([0]))
    assert loss.item() == pytest.approx(math.log(4), rel=1e-12)
    gradient = torch.autograd.grad(loss.sum(), logits)[0][0]
    assert gradient.tolist() == pytest.approx([0.75, -0.375, -0.375], rel=1e-12)


def test_absolute_sum_worked_out_by_hand():
    value, gradient = absolute_sum(torch.tensor([[-2.0, 0.0], [0.5, -0.25]]))
    assert value == 2.75 and gradient.tolist() == [[-1.0, 0.0], [1.0, -1.0]]


# ---- Limits ----


def test_without_exponents_both_are_plain_ascent_and_satimp_without_its_second_is_wga():
    logps = leaf(-np.abs(numbers(B, T)))
    assert torch.equal(weighted_ascent(logps, 0.0), ascent(logps))
    assert torch.equal(saturation_importance(logps, 0.0, 0.0), ascent(logps))
    assert torch.allclose(saturation_importance(logps, 1.5, 0.0), weighted_ascent(logps, 1.5), rtol=1e-15)


def test_satimp_fades_at_both_ends_and_wga_at_one():
    """p = 1e-6, 1/2 and 1 - 1e-6 at exponents of 1: weights 1e-6, 1/4, 1e-6; WGA's are p."""
    logps = leaf([math.log(1e-6), -LN2, math.log1p(-1e-6)])
    (found,) = torch.autograd.grad(saturation_importance(logps, 1.0, 1.0).sum(), logps)
    assert found.tolist() == pytest.approx([1e-6, 0.25, 1e-6], rel=1e-5)
    (found,) = torch.autograd.grad(weighted_ascent(logps, 1.0).sum(), logps)
    assert found.tolist() == pytest.approx([1e-6, 0.5, 1.0], rel=1e-5)


@pytest.mark.parametrize("p", [1e-9, 0.2, 0.9])
def test_ceu_is_ascent_weighted_by_the_odds(p):
    """Its gradient by the true logit is p, that of ascent 1 - p: the quotient is p / (1 - p)."""
    logits, labels = leaf([log_odds(p)]), torch.tensor([0])
    (found,) = torch.autograd.grad(cross_entropy_unlearning(logits, labels).sum(), logits)
    (plain,) = torch.autograd.grad(logits.log_softmax(-1)[0, 0], logits)
    assert found[0].tolist() == pytest.approx((p / (1 - p) * plain[0]).tolist(), rel=1e-6)
    assert found[0, 0].item() == pytest.approx(p, rel=1e-6)


def test_ceu_holds_where_the_true_token_is_certain():
    """In float32 p rounds to 1 here, so that -log(1 - p) of the log-probability would be infinite, and 0 * inf."""
    logits = torch.tensor([[60.0, 0.0, 1.0]], requires_grad=True)
    loss = cross_entropy_unlearning(logits, torch.tensor([0]))
    assert logits.log_softmax(-1)[0, 0] == 0 and loss.item() == pytest.approx(60 - math.log(1 + math.e), rel=1e-6)
    (found,) = torch.autograd.grad(loss.sum(), logits)
    assert found[0].tolist() == pytest.approx([1.0, -1 / (1 + math.e), -math.e / (1 + math.e)], rel=1e-6)


# ---- Against NumPy on odd shapes ----


@pytest.mark.parametrize(("dtype", "rel"), PRECISIONS)
@pytest.mark.parametrize("betas", [(1.0,), (0.5,), (5.0, 1.0), (2.0, 0.5)])
def test_weighted_losses_agree_with_numpy(dtype, rel, betas):
    given = -np.abs(numbers(B, T, seed=1)) - 1e-3
    logps = leaf(given, dtype)
    p = np.exp(logps.detach().double().numpy())
    weight = p ** betas[0] * ((1 - p) ** betas[1] if len(betas) == 2 else 1)
    loss = weighted_ascent(logps, *betas) if len(betas) == 1 else saturation_importance(logps, *betas)
    # 1 - p of a p that float32 rounded near 1 is off by 1e-7 of 1e-3.
    check(loss, logps, weight * np.log(p), weight, rel if len(betas) == 1 else 100 * rel)


@pytest.mark.parametrize(("dtype", "rel"), PRECISIONS)
def test_ceu_agrees_with_numpy(dtype, rel):
    logits = leaf(numbers(N, V, seed=2, scale=4), dtype)
    labels = np.random.default_rng(3).integers(0, V, N)
    p = np.exp(log_softmax(logits.detach().double().numpy()))
    q = p.copy()
    q[np.arange(N), labels] = 0
    q /= q.sum(-1, keepdims=True)
    value = -np.log1p(-p[np.arange(N), labels])
    # p is near 0 for most tokens, whose loss is p: what matters is the error beside the largest.
    check(cross_entropy_unlearning(logits, torch.tensor(labels)), logits, value, p - q, rel)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_upcast(half):
    logits, labels = torch.tensor(numbers(N, V, seed=4)).to(half), torch.arange(N) % V
    found = cross_entropy_unlearning(logits, labels)
    assert found.dtype == torch.float32 and torch.equal(found, cross_entropy_unlearning(logits.float(), labels))


# ---- The trainers ----


def dense_logits(trainer, batch, name="forget"):
    stream = batch[name]
    logits = trainer.model(input_ids=stream["input_ids"], attention_mask=stream["attention_mask"]).logits
    mask = stream["labels"][:, 1:] != IGNORED
    return logits[:, :-1][mask], stream["labels"][:, 1:][mask]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_ceu_trainer_averages_over_tokens_but_the_first_of_each_answer(lora, tmp_path):
    """The same numbers and gradients as from whole logits of the model; two of the six rows have one answer token."""
    data = {"forget": rows(6, 2, shortest=3), "retain": rows(9, 3)}
    model = with_lora(llama(), init_lora_weights=False) if lora else llama()
    trainer = make_trainer("ceu", tmp_path, model, data)
    assert trainer.args.skip_answer_tokens == 1 and trainer.args.retain_loss == "none"
    kept = [row for row in trainer.train_dataset.streams["forget"]]
    assert len(kept) == 5, "the row with a single answer token has none left"
    assert all(sum(label != IGNORED for label in row["labels"]) == len(row["input_ids"]) - 3 for row in kept)
    batch = batch_of(trainer, (0, 2, 4))
    loss = trainer.compute_loss(trainer.model.eval(), batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    expected = cross_entropy_unlearning(*dense_logits(trainer, batch)).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and len(wanted) > 2
    norm = torch.stack([value.norm() for value in wanted.values()]).norm()
    assert norm > 1e-3 and all((found[name] - wanted[name]).norm() <= 1e-5 * norm for name in wanted)


def test_ceu_skips_nothing_of_texts_and_refuses_to_skip_all(tmp_path):
    texts = {"forget": [{**row, "labels": list(row["input_ids"])} for row in rows(4, 2)], "retain": rows(4, 3)}
    trainer = make_trainer("ceu", tmp_path, data=texts, skip_answer_tokens=3)
    assert trainer.train_dataset.streams["forget"] == texts["forget"]
    with pytest.raises(UserError, match="--skip_answer_tokens 99 leaves no token of the forget set"):
        make_trainer("ceu", tmp_path, skip_answer_tokens=99)


@pytest.mark.parametrize(
    "kind, flags, reason",
    [
        (WGAArguments, {"beta": -1.0}, "--beta must be >= 0"),
        (SatImpArguments, {"beta2": math.nan}, "--beta2 must be >= 0"),
        (CEUArguments, {"skip_answer_tokens": -1}, "--skip_answer_tokens must be >= 0"),
        (
            CEUArguments,
            {"skip_answer_tokens": 2, "token_selection": "keywords", "keywords": "a"},
            "--skip_answer_tokens has no effect with --token_selection",
        ),
        (L1SparseArguments, {}, "l1_sparse needs --l1_coef NUMBER above 0"),
        (L1SparseArguments, {"l1_coef": 0.0}, "l1_sparse needs --l1_coef NUMBER above 0"),
    ],
)
def test_bad_settings_are_refused(kind, flags, reason, tmp_path):
    with pytest.raises(UserError, match=reason):
        kind(output_dir=str(tmp_path), use_cpu=True, **flags)


def test_one_step_of_l1_sparse_is_that_of_the_sum_of_both_gradients(tiny_world, start_weights, tmp_path):
    """SGD at rate .01: theta - .01 * (g + l1 * sign theta), so that a penalty of .5 adds .005 up to rounding."""
    found = {}
    for coef in (1e-12, 0.5):
        flags = ["--l1_coef", coef, "--max_steps", "1"]
        assert main(command(tiny_world, "l1_sparse", tmp_path / str(coef), *flags)) == 0
        found[coef] = weights(tmp_path / str(coef))
    for name, start in start_weights.items():
        added = found[0.5][name] - found[1e-12][name]
        # theta is rounded to float32 after each of two subtractions.
        assert torch.allclose(added, -0.005 * start.sign(), atol=float(2e-7 * (1 + start.abs().max()))), name
    history = json.loads((tmp_path / "0.5/trainer_state.json").read_text())["log_history"]
    total = sum(float(value.double().abs().sum()) for value in start_weights.values())
    assert history[0]["loss/l1"] == pytest.approx(total, rel=1e-5)


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero2", "zero3"])
def test_l1_on_two_ranks_is_that_on_one(backend, tiny_world, start_weights, tmp_path):
    import backends

    flags = ["--l1_coef", "0.1", "--max_steps", "2"]
    one = backends.train(command(tiny_world, "l1_sparse", tmp_path / "one", *flags))
    cut = [*flags, "--per_device_train_batch_size", "2"]
    two = backends.train(command(tiny_world, "l1_sparse", tmp_path / "two", *cut), backend, 2)
    assert backends.distance(two, one, start_weights) < 2e-4
    logs = [json.loads((run / "trainer_state.json").read_text())["log_history"][0] for run in (one, two)]
    assert logs[1]["loss/l1"] == pytest.approx(logs[0]["loss/l1"], rel=1e-5)
