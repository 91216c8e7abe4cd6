"""The invariance penalty by hand, against double differentiation and finite differences; its mistakes."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from test_reference import V, llama, rows
from transformers import GPT2Config, GPT2LMHeadModel

from llm_unlearn import trainer_class
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.errors import UserError
from llm_unlearn.gradient_filter import GradientFilter
from llm_unlearn.objectives.invariance import irm_penalty, scale_gradient

# Shapes: N tokens, V vocabulary, E environments.

EXACT = {"rtol": 1e-9, "atol": 1e-12}


def of_logits(logits, labels):
    """(1, N) scale gradients as the trainer has them: from the log-probability and the entropy."""
    logps = logits.log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return scale_gradient(logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy).unsqueeze(0)


def totals_of(scale_gradients, environments, count):
    """(E, 2) sums and numbers of tokens."""
    found = torch.zeros(count, 2, dtype=torch.float64)
    for values, environment in zip(scale_gradients.detach().double(), environments.tolist(), strict=True):
        found[environment] += torch.tensor([values.sum(), len(values)], dtype=torch.float64)
    return found


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cross_entropy(logits, labels):
    return torch.nn.functional.cross_entropy(logits, labels)


# ---- The numbers, worked out ----


def test_worked_out_by_hand():
    """z = (0, ln 3), p = (1/4, 3/4): sum p z = 3/4 ln 3, so that s = 3/4 ln 3 for label 0 and -1/4 ln 3 for label 1.

    The mean over both is 1/4 ln 3. The gradient of s by z is p_v (1 + z_v - 3/4 ln 3) - [v = y]; that of the penalty
    2 * 1/4 ln 3 * 1/2 times it for each token.
    """
    third = math.log(3)
    logits = torch.tensor([[0.0, third], [0.0, third]], dtype=torch.float64, requires_grad=True)
    found = of_logits(logits, torch.tensor([0, 1]))
    assert found.flatten().tolist() == pytest.approx([3 / 4 * third, -1 / 4 * third], rel=1e-14)
    totals = totals_of(found, torch.tensor([0]), 1)
    penalty = irm_penalty(found, torch.tensor([0]), totals).mean()
    assert penalty.item() == pytest.approx((third / 4) ** 2, rel=1e-14)
    penalty.backward()
    first, second = 1 / 4 * (1 - 3 / 4 * third), 3 / 4 * (1 + third - 3 / 4 * third)
    expected = third / 4 * torch.tensor([[first - 1, second], [first, second - 1]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected, **EXACT)


def test_environments_are_averaged_and_not_pooled():
    """Means 2 and -1 over 3 tokens and 1: (4 + 1) / 2; pooled it would be (5/4)^2. A third one has no token here."""
    values = torch.tensor([[1.0, 2, 3], [-1, 0, 0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    totals = torch.tensor([[6.0, 3], [-1, 1], [0, 0]], dtype=torch.float64)
    losses = irm_penalty(values, torch.tensor([0, 1]), totals)[mask]
    assert losses.mean().item() == pytest.approx(2.5, rel=1e-14)
    losses.mean().backward()
    # 1/2 * 2 r / n: 1/2 * 2 * 2 / 3 and 1/2 * 2 * -1 / 1.
    assert values.grad[mask].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, -1], rel=1e-14)


def test_it_is_zero_where_the_model_is_as_sure_as_it_may_be():
    """Labels as often as p = (1/4, 3/4) says, and equal logits whatever the labels: no factor would lower the loss."""
    for logits, labels in (
        (torch.tensor([[0.0, math.log(3)]] * 4, dtype=torch.float64), torch.tensor([0, 1, 1, 1])),
        (torch.full((5, 7), 1.3, dtype=torch.float64), torch.arange(5)),
    ):
        logits.requires_grad_()
        found = of_logits(logits, labels)
        penalty = irm_penalty(found, torch.tensor([0]), totals_of(found, torch.tensor([0]), 1)).mean()
        assert penalty.item() == pytest.approx(0, abs=1e-28)
        penalty.backward()
        assert logits.grad.abs().max() < 1e-14


def test_it_is_positive_where_the_model_is_too_sure():
    logits, labels = 3 * drawn(50, 9), torch.arange(50) % 9
    assert of_logits(logits, labels).mean() > 0
    right = torch.nn.functional.one_hot(labels, 9).double()
    assert of_logits(right, labels).mean() < 0


def test_no_tokens_and_fillers_give_zeros():
    values = torch.zeros(2, 3, requires_grad=True)
    found = irm_penalty(values, torch.tensor([0, 0]), torch.zeros(1, 2, dtype=torch.float64))
    found.sum().backward()
    assert found.eq(0).all() and values.grad.eq(0).all()


# ---- Against double differentiation and finite differences ----


def test_the_scale_gradient_is_the_derivative_by_a_factor_on_the_logits():
    logits, labels, step = drawn(11, 17), torch.arange(11), 1e-6
    for row, label, found in zip(logits, labels, of_logits(logits, labels)[0], strict=True):
        ahead, behind = (cross_entropy((1 + sign * step) * row, label) for sign in (1, -1))
        assert found.item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-7, abs=1e-8)


def by_double_backward(logits, labels):
    """The penalty of one environment as Arjovsky et al. write it: a gradient by w, squared."""
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(cross_entropy(w * logits, labels), w, create_graph=True)
    return gradient.square()


@pytest.mark.parametrize("cuts", [(12,), (5, 7), (1,) * 12])
def test_the_gradient_is_that_of_double_differentiation_however_tokens_are_cut(cuts):
    """Three environments of 12 tokens in turn; a square of each cut's own mean would give other numbers."""
    logits, labels = (2 * drawn(12, 17)).requires_grad_(), torch.arange(12) % 17
    environments = torch.tensor([0, 1, 0, 2, 0, 0, 1, 0, 1, 0, 0, 2])
    penalties = [by_double_backward(logits[environments == e], labels[environments == e]) for e in range(3)]
    expected = torch.stack(penalties).mean()
    (wanted,) = torch.autograd.grad(expected, logits)
    rows_of = of_logits(logits, labels).T
    totals = totals_of(rows_of, environments, 3)
    parts = zip(rows_of.split(cuts), environments.split(cuts), strict=True)
    loss = sum(irm_penalty(part, numbers, totals).sum() for part, numbers in parts) / 12
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, wanted, **EXACT)
    # And one logit by finite differences.
    moved = [logits.detach().clone() for _ in range(2)]
    for change, sign in zip(moved, (1, -1), strict=True):
        change[3, 5] += sign * 1e-6
    values = [torch.stack([by_double_backward(m[environments == e], labels[environments == e]) for e in range(3)])
              for m in moved]  # fmt: skip
    slope = (values[0].mean() - values[1].mean()).item() / 2e-6
    assert found[3, 5].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


# ---- Through the trainer, in float64 ----


def sets(environments=2):
    invariance = [{**row, "environment": n % environments} for n, row in enumerate(rows(7, 5))]
    return {"forget": rows(4, 2), "retain": rows(4, 3), "invariance": invariance}


def make_trainer(folder, data=None, method="grad_diff", model=None, **flags):
    """A trainer of one step over four rows of each stream, at rate 1, so that the update is the gradient."""
    kind, data = trainer_class(method), data or sets()
    defaults = dict(
        per_device_train_batch_size=4, max_steps=1, optim="sgd", lr_scheduler_type="constant", learning_rate=1.0,
        max_grad_norm=0, save_strategy="no", disable_tqdm=True, report_to="none", use_cpu=True, regularizer=["ilu"],
    )  # fmt: skip
    args = kind.args_class(output_dir=str(folder), **{**defaults, **flags})
    return kind(model=model or llama().double(), args=args, train_dataset=UnlearnDataset(data))


def gpt2():
    """A model whose every product is in float64; a Llama's norms and angles stay in float32."""
    torch.manual_seed(0)
    size = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=V, n_positions=64, initializer_range=0.3)
    still = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager")
    return GPT2LMHeadModel(GPT2Config(**size, **still)).double()


def update_of(trainer):
    """Return {name: gradient} of the step that a trainer takes."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return {name: before[name] - p.detach() for name, p in trainer.model.named_parameters()}


def step_rows(trainer, stream="invariance"):
    """Return [(ids, labels, environment)] of the rows of the first step."""
    plan = trainer.make_plan()
    keys = [key for number in range(len(plan)) for key in plan.batch(0, number, 0) if key[0] == stream]
    return [trainer.train_dataset[key] for key in keys]


def environment_logits(model, found):
    """Return {environment: (logits (N, V), labels (N,))} of the tokens of rows, dense."""
    parts = {}
    for row in found:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        parts.setdefault(row["environment"], []).append((logits[labels != IGNORED], labels[labels != IGNORED]))
    return {key: tuple(torch.cat(part) for part in zip(*values, strict=True)) for key, values in parts.items()}


@pytest.fixture(scope="module")
def plain_update(tmp_path_factory):
    """The updates without ILU, to be taken off, of the two models."""
    data = {name: part for name, part in sets().items() if name != "invariance"}
    folder = tmp_path_factory.mktemp("plain")
    return {
        name: update_of(make_trainer(folder / name, data, model=model, regularizer=None))
        for name, model in (("llama", llama().double()), ("gpt2", gpt2()))
    }


def assert_same(found, expected, tolerance):
    scale = torch.stack([value.norm() for value in expected]).norm()
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * scale


@pytest.mark.parametrize("shape, ratio", [((4, 1), 1), ((1, 4), 1), ((2, 2), 2)])
def test_a_step_adds_the_gradient_of_double_differentiation(shape, ratio, plain_update, tmp_path):
    """The whole pipeline: rows, environments, chunked head and accumulation, against dense logits and create_graph."""
    flags = {"per_device_train_batch_size": shape[0], "gradient_accumulation_steps": shape[1], "ilu_weight": 0.7}
    trainer = make_trainer(tmp_path, **flags, ilu_ratio=ratio)
    model = llama().double()
    assert len(step_rows(trainer)) == 4 * ratio
    parts = environment_logits(model, step_rows(trainer)).values()
    penalty = torch.stack([by_double_backward(*part) for part in parts]).mean()
    assert len(parts) == 2
    wanted = torch.autograd.grad(0.7 * penalty, list(model.parameters()))
    found, plain = update_of(trainer), plain_update["llama"]
    assert_same([found[name] - plain[name] for name in found], wanted, 1e-9)
    (log,) = (log for log in trainer.state.log_history if "loss/ilu" in log)
    assert log["loss/ilu"] == pytest.approx(penalty.item(), rel=1e-6)
    expected = log["loss/forget"] + log["loss/retain"] + 0.7 * log["loss/ilu"]
    assert log["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_batch_by_itself_is_a_step_of_its_own(tmp_path):
    """compute_loss without counts, as anyone may call it, reads nothing of an earlier step."""
    trainer = make_trainer(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[key] for key in trainer.make_plan().batch(0, 0, 0)])
    before = trainer.compute_loss(trainer.model, batch)
    trainer.regularizers[0]._step = torch.full((2, 2), 5.0, dtype=torch.float64)
    assert torch.equal(trainer.compute_loss(trainer.model, batch), before)


def exact_gradient(model, found):
    """Return (penalty, its gradient by the parameters) of the squared gradient norm, twice differentiated."""
    parameters, norms = list(model.parameters()), []
    for part in environment_logits(model, found).values():
        gradients = torch.autograd.grad(cross_entropy(*part), parameters, create_graph=True)
        norms.append(sum(gradient.square().sum() for gradient in gradients))
    penalty = torch.stack(norms).mean()
    return penalty, torch.autograd.grad(penalty, parameters)


@pytest.mark.parametrize("shape", [(4, 1), (1, 4)], ids=["4x1", "1x4"])
def test_the_parameter_gradient_is_a_finite_difference_of_gradients(shape, plain_update, tmp_path):
    flags = {"per_device_train_batch_size": shape[0], "gradient_accumulation_steps": shape[1], "ilu_weight": 0.01}
    trainer = make_trainer(tmp_path, model=gpt2(), ilu_mode="parameter_gradient", ilu_radius=1e-7, **flags)
    penalty, wanted = exact_gradient(gpt2(), step_rows(trainer))
    found, plain = update_of(trainer), plain_update["gpt2"]
    assert_same([found[name] - plain[name] for name in found], [0.01 * value for value in wanted], 1e-5)
    (log,) = (log for log in trainer.state.log_history if "loss/ilu" in log)
    assert log["loss/ilu"] == pytest.approx(penalty.item(), rel=1e-6)


def test_a_smaller_radius_is_nearer_to_the_derivative(plain_update, tmp_path):
    """The error of a forward difference is of first order in the radius."""
    errors = []
    for radius in (1e-3, 1e-4):
        flags = {"ilu_mode": "parameter_gradient", "ilu_radius": radius, "ilu_weight": 0.01}
        trainer = make_trainer(tmp_path / str(radius), model=gpt2(), **flags)
        _, wanted = exact_gradient(gpt2(), step_rows(trainer))
        found, plain = update_of(trainer), plain_update["gpt2"]
        off = [found[name] - plain[name] - 0.01 * value for name, value in zip(found, wanted, strict=True)]
        errors.append(torch.stack([value.norm() for value in off]).norm().item())
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)


def test_moved_weights_come_back_bit_for_bit_and_frozen_ones_do_not_count(tmp_path):
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    flags = {"ilu_mode": "parameter_gradient", "learning_rate": 0.0, "ilu_radius": 0.3}
    trainer = make_trainer(tmp_path, model=model, **flags)
    moved = update_of(trainer)
    assert all(value.eq(0).all() for value in moved.values())
    assert model.model.embed_tokens.weight.grad is None
    whole = make_trainer(tmp_path / "whole", model=llama(), **flags)
    whole.train()
    found, other = (run.state.log_history[0]["loss/ilu"] for run in (trainer, whole))
    assert 0 < found < 0.99 * other


def test_the_gradient_filter_leaves_its_gradient_as_it_is():
    """Retain (2, 2) and forget (1, -1) agree in the first element; (10, 20) of the regularizer comes on top."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(2))
    accelerator = SimpleNamespace(distributed_type=DistributedType.NO)
    keeper = GradientFilter(SimpleNamespace(accelerator=accelerator, is_fsdp2=lambda: False), asymmetric=False)
    slopes = {"forget": [1.0, -1], "retain": [2.0, 2], "invariance": [10.0, 20]}
    for _ in range(2):  # nothing of a step is left for the next
        for name, slope in slopes.items():
            with keeper.turn_of(name, model):
                (model.weight @ torch.tensor(slope)).backward()
        keeper.combine()
        assert model.weight.grad.tolist() == [13, 20]


# ---- Mistakes ----


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"regularizer": None, "ilu_weight": 1.0}, "--ilu_weight has no effect without --regularizer ilu"),
        ({"regularizer": None, "ilu_data": ["a.jsonl"]}, "--ilu_data has no effect without --regularizer ilu"),
        ({"regularizer": None, "ilu_mode": "logit_scale"}, "--ilu_mode has no effect without --regularizer ilu"),
        ({"regularizer": ["l2_sp"], "ilu_radius": 0.1}, "--ilu_radius has no effect without --regularizer ilu"),
        ({"ilu_radius": 0.1}, "--ilu_radius has no effect without --ilu_mode parameter_gradient"),
        ({"ilu_mode": "parameter_gradient", "ilu_radius": 0.0}, "--ilu_radius must be above 0"),
        ({"ilu_mode": "scale"}, "--ilu_mode must be logit_scale or parameter_gradient, but is 'scale'"),
        ({"ilu_weight": 0.0}, "--ilu_weight must be above 0"),
        ({"ilu_ratio": 0}, "--ilu_ratio must be at least 1, but is 0"),
        ({"regularizer": None, "ilu_ratio": 2}, "--ilu_ratio has no effect without --regularizer ilu"),
        ({"ilu_data": ["a.jsonl", "a.jsonl"]}, "--ilu_data must name at least one set, and each once"),
    ],
)
def test_flags_that_cannot_be(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, **flags)


def test_a_trainer_without_the_set_is_refused(tmp_path):
    data = {name: part for name, part in sets().items() if name != "invariance"}
    with pytest.raises(UserError, match="needs an invariance set, but was given"):
        make_trainer(tmp_path, data)


def test_fp16_and_parameter_gradients_do_not_go_together(tmp_path, monkeypatch):
    from llm_unlearn.addons import invariance

    trainer = make_trainer(tmp_path)
    trainer.accelerator = SimpleNamespace(distributed_type=DistributedType.NO, mixed_precision="fp16")
    with pytest.raises(UserError, match="pass --bf16 True or --ilu_mode logit_scale"):
        invariance.ParameterGradient(trainer)


def test_the_tiny_vocabulary_is_the_one_that_rows_are_drawn_from():
    assert max(token for part in sets().values() for row in part for token in row["input_ids"]) < V
