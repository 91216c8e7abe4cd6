"""Estimates of the curvature: what they are on average, in full on a model of a few weights; what they leave alone."""

import itertools

import pytest
import torch
from test_invariance import make_trainer as regularized
from test_reference import make_trainer
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from llm_unlearn import chunked_head
from llm_unlearn.addons import curvature, label_draws
from llm_unlearn.addons.curvature import GaussNewton, Hutchinson, hessian_streams
from llm_unlearn.addons.label_draws import drawn_labels
from llm_unlearn.errors import NonFiniteError

V = 3
SOPHIA = {"optim": TrainingArguments.__dataclass_fields__["optim"].default, "unlearn_optimizer": "sophia"}
# Two forget tokens, of which one weighs a quarter, and one retain token.
ROWS = {
    "forget": [{"input_ids": [2, 0, 1], "labels": [-100, 0, 1], "weights": [1.0, 1.0, 0.25]}],
    "retain": [{"input_ids": [1, 2, 2], "labels": [-100, -100, 2], "weights": [1.0, 1.0, 1.0]}],
}


def tiny_llama(**changes):
    """A Llama of 3 tokens and 136 weights, in float64."""
    torch.manual_seed(0)
    shape = dict(hidden_size=4, intermediate_size=3, num_hidden_layers=1, num_attention_heads=1, vocab_size=V)
    config = LlamaConfig(**shape, initializer_range=0.5, attn_implementation="eager", **changes)
    return LlamaForCausalLM(config).double()


def ragged(count):
    """Rows of different lengths of the three tokens."""
    generator = torch.Generator().manual_seed(count)
    drawn = [torch.randint(V, (3 + number,), generator=generator).tolist() for number in range(count)]
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in drawn]


def prepared(folder, data=ROWS, shape=(4, 1), model=None, **flags):
    """Return a trainer at its first step, cut as (rows, micro-batches), whose weights all have a gradient."""
    flags = {**SOPHIA, "per_device_train_batch_size": shape[0], "gradient_accumulation_steps": shape[1], **flags}
    return at_first_step(make_trainer("grad_diff", folder, model or tiny_llama(), data, **flags), shape[1])


def at_first_step(trainer, micro_batches):
    """Return a trainer as it is between the last backward of its first step and the step."""
    trainer.create_optimizer()
    plan = trainer.make_plan()
    keys = [plan.batch(0, number, 0) for number in range(micro_batches)]
    batches = [trainer.data_collator([trainer.train_dataset[key] for key in part]) for part in keys]
    trainer.get_batch_samples(iter(batches), micro_batches, trainer.args.device)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    return trainer


def estimated(estimator, draw=0):
    """Return one estimate of all weights, end to end in the model's order."""
    trainer, found = estimator.trainer, {}
    estimator.estimate(trainer.optimizer, lambda p, value: found.__setitem__(p, value.detach().clone()), draw)
    return torch.cat([found[p].flatten() for p in trainer.model.parameters()])


def gradient_of(value, model, **options):
    found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True, **options)
    return torch.cat([part.flatten() for part in found])


def logits_of(model, row):
    """Return [(logits that predict a counted token, the token, its weight)] of a row."""
    logits = model(torch.tensor([row["input_ids"]])).logits[0]
    return [
        (logits[place - 1], label, row["weights"][place])
        for place, label in enumerate(row["labels"])
        if place and label != -100
    ]


# ---- Gauss-Newton-Bartlett ----


def gauss_newton_diagonal(model, names):
    """diag of sum_n w_n J_n^T (diag(p_n) - p_n p_n^T) J_n / sum_n w_n, from the gradient of each logit by itself."""
    total = weight = 0.0
    for name in names:
        for logits, _, w in logits_of(model, ROWS[name][0]):
            p, jacobian = logits.softmax(-1).detach(), torch.stack([gradient_of(z, model) for z in logits])
            centered = jacobian - p @ jacobian
            total, weight = total + w * p @ centered.square(), weight + w
    return total / weight


@pytest.mark.parametrize(
    "data, names", [("forget", ["forget"]), ("retain", ["retain"]), ("both", ["forget", "retain"])]
)
def test_gnb_is_the_gauss_newton_diagonal_on_average(data, names, tmp_path, monkeypatch):
    """The expectation itself: every combination of labels that can be drawn, times its probability."""
    trainer = prepared(tmp_path, hessian_data=data)
    model, estimator = trainer.model, GaussNewton(trainer)
    asked = []

    def noting(logits, *block):
        asked.append(logits.softmax(-1))
        return drawn_labels(logits, *block)

    monkeypatch.setattr(label_draws, "drawn_labels", noting)
    estimated(estimator)
    probabilities, mean = torch.cat(asked), 0.0
    assert len(probabilities) == {"forget": 2, "retain": 1, "both": 3}[data]
    for labels in itertools.product(range(V), repeat=len(probabilities)):
        left = list(labels)
        monkeypatch.setattr(
            label_draws, "drawn_labels", lambda logits, *block, left=left: torch.tensor([left.pop(0) for _ in logits])
        )
        mean = mean + probabilities[range(len(labels)), list(labels)].prod() * estimated(estimator)
    expected = gauss_newton_diagonal(model, names)
    # The norms compute in float32.
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-7)
    assert expected.count_nonzero() > 50


def test_labels_are_drawn_as_often_as_the_model_says():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    labels = drawn_labels(p.log().expand(40_000, 4) + 7, 3)
    shares = torch.bincount(labels, minlength=4) / len(labels)
    # Four standard deviations.
    assert ((shares - p).abs() <= 4 * (p * (1 - p) / len(labels)).sqrt()).all()
    assert torch.equal(labels, drawn_labels(p.log().expand(40_000, 4) + 1e-6, 3))
    assert not torch.equal(labels, drawn_labels(p.log().expand(40_000, 4), 4))


def test_a_token_that_cannot_be_is_never_drawn():
    logits = torch.tensor([0.0, float("-inf"), 0.0]).expand(5000, 3)
    assert set(drawn_labels(logits, 0).tolist()) == {0, 2}


@pytest.mark.parametrize("change", ["chunks", "blocks", "softcap", "dense"])
def test_how_the_logits_come_changes_no_label(change, tmp_path, monkeypatch):
    """In chunks that cut rows and blocks; or before the head is read, if that has a softcap or is not looked into."""
    data = {"forget": ragged(4), "retain": ragged(5)}
    if change == "blocks":
        monkeypatch.setattr(label_draws, "_BLOCK", 2)
    trainer = prepared(tmp_path, data)
    if change == "softcap":
        trainer.reader.head.softcap = 1e6  # which changes nothing
    expected = estimated(GaussNewton(prepared(tmp_path, data)))
    if change == "dense":
        trainer.reader.is_probed = trainer.reader.head.is_dense = True
    else:
        monkeypatch.setitem(chunked_head._CHUNK_ELEMENTS, "cpu", 5 * V)
    torch.testing.assert_close(estimated(GaussNewton(trainer)), expected, rtol=1e-5, atol=1e-8)


# ---- Hutchinson ----


def objective(model):
    """GradDiff by hand: the mean NLL of the retain token less that of the forget tokens."""
    means = {}
    for name in ("forget", "retain"):
        found = [(w * -logits.log_softmax(-1)[label], w) for logits, label, w in logits_of(model, ROWS[name][0])]
        means[name] = sum(value for value, _ in found) / sum(w for _, w in found)
    return means


def hessian(value, model):
    gradient = gradient_of(value, model, create_graph=True)
    return torch.stack([gradient_of(part, model) for part in gradient]).detach()


def direction_of(estimator, draw=0):
    """Return u, end to end in the model's order."""
    order = [p for group in estimator.trainer.optimizer.param_groups for p in group["params"]]
    numbers = [next(n for n, other in enumerate(order) if other is p) for p in estimator.trainer.model.parameters()]
    pairs = zip(estimator.trainer.model.parameters(), numbers, strict=True)
    return torch.cat([estimator.direction(p, number, draw).flatten() for p, number in pairs])


@pytest.mark.parametrize("data", ["both", "forget", "retain"])
def test_hutchinson_is_the_direction_times_the_exact_hessian(data, tmp_path):
    trainer = prepared(tmp_path, hessian_estimator="hutchinson", hessian_data=data)
    model, estimator = trainer.model, Hutchinson(trainer)
    means = objective(model)
    value = {"both": means["retain"] - means["forget"], "forget": -means["forget"], "retain": means["retain"]}[data]
    u = direction_of(estimator)
    expected = u * (hessian(value, model) @ u)
    # Off by the square of the differences' step, and by float32 in the norms; measured 2e-4.
    assert (estimated(estimator) - expected).norm() <= 1e-3 * expected.norm()


def test_the_directions_leave_the_exact_diagonal_on_average(tmp_path):
    """As for independent signs, the mean of n is off by sqrt(sum of squares beside the diagonal / n)."""
    trainer, draws = prepared(tmp_path, hessian_estimator="hutchinson"), 500
    means, estimator = objective(trainer.model), Hutchinson(trainer)
    exact = hessian(means["retain"] - means["forget"], trainer.model)
    u = torch.stack([direction_of(estimator, draw) for draw in range(draws)])
    assert set(u.unique().tolist()) == {-1.0, 1.0}
    diagonal, mean = exact.diagonal(), (u * (u @ exact)).mean(0)
    spread = ((exact - diagonal.diag()).square().sum() / draws).sqrt()
    assert 0.6 * spread <= (mean - diagonal).norm() <= 1.4 * spread < 0.5 * diagonal.norm()


def test_both_differences_drop_out_the_same(tmp_path, monkeypatch):
    """Otherwise the difference would grow as its step shrinks."""
    trainer = prepared(tmp_path, model=tiny_llama(attention_dropout=0.5), hessian_estimator="hutchinson")
    long = estimated(Hutchinson(trainer))
    monkeypatch.setattr(curvature, "STEP", curvature.STEP / 10)
    short = estimated(Hutchinson(trainer))
    assert (short - long).norm() <= 1e-3 * long.norm()


# ---- Both ----


ESTIMATORS = {"gnb": GaussNewton, "hutchinson": Hutchinson}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_accumulation_and_turns_change_nothing(name, tmp_path):
    data = {"forget": ragged(4), "retain": ragged(5)}
    found = {}
    for shape in ((4, 1), (2, 2), (1, 4)):
        trainer = prepared(tmp_path, data, shape, hessian_estimator=name)
        found[shape] = estimated(ESTIMATORS[name](trainer))
    trainer = prepared(tmp_path, data, (2, 2), hessian_estimator=name, sequential_backward=True)
    found["turns"] = estimated(ESTIMATORS[name](trainer))
    for value in found.values():
        torch.testing.assert_close(value, found[4, 1], rtol=1e-7, atol=1e-9)


def test_the_objective_has_its_regularizers(tmp_path):
    """The invariance penalty too, of which a micro-batch must know at the moved weights what the others say there."""
    found = []
    for shape, weight in (((4, 1), 100.0), ((2, 2), 100.0), ((4, 1), 1e-6)):
        flags = {"ilu_weight": weight, "per_device_train_batch_size": shape[0], "gradient_accumulation_steps": shape[1]}
        trainer = at_first_step(regularized(tmp_path, **SOPHIA, hessian_estimator="hutchinson", **flags), shape[1])
        found.append(estimated(Hutchinson(trainer)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4 * found[0].abs().max().item())
    assert (found[2] - found[0]).norm() > 0.1 * found[0].norm()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_step_goes_on_as_if_nothing_had_been_estimated(name, tmp_path):
    trainer = prepared(tmp_path, hessian_estimator=name)
    parameters = list(trainer.model.parameters())
    parameters[1].grad = None  # of a layer that does not train in this step
    held, before = [p.grad for p in parameters], [p.detach().clone() for p in parameters]
    trainer._term_sums, state = {"forget": torch.tensor(1.0)}, torch.get_rng_state()
    taken = {}
    ESTIMATORS[name](trainer).estimate(trainer.optimizer, taken.__setitem__)
    assert all(p.grad is gradient for p, gradient in zip(parameters, held, strict=True))
    assert all(gradient is None or gradient.eq(1).all() for gradient in held)
    assert all(torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
    assert torch.equal(torch.get_rng_state(), state) and trainer._term_sums == {"forget": torch.tensor(1.0)}
    assert set(taken) == {p for p in parameters if p is not parameters[1]}
    assert trainer.current_flos > 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_another_step_and_another_seed_draw_anew(name, tmp_path):
    trainer = prepared(tmp_path, hessian_estimator=name)
    first, again = (estimated(ESTIMATORS[name](trainer)) for _ in range(2))
    assert torch.equal(first, again)
    trainer.state.global_step = 10
    later = estimated(ESTIMATORS[name](trainer))
    other = estimated(ESTIMATORS[name](prepared(tmp_path, hessian_estimator=name, seed=5, data_seed=42)))
    assert not torch.equal(later, first) and not torch.equal(other, first)


def test_a_curvature_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    trainer = prepared(tmp_path)
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss: (loss * float("nan")).backward())
    with pytest.raises(NonFiniteError, match="the estimated curvature is not finite at step 1"):
        GaussNewton(trainer).estimate(trainer.optimizer, lambda parameter, estimate: None)
    assert all(p.grad.eq(1).all() for p in trainer.model.parameters())


def test_the_streams_of_a_regularizer_have_no_part():
    streams = ["forget", "preferred", "retain", "invariance"]
    assert hessian_streams(streams, "both") == ["forget", "preferred", "retain"]
    assert hessian_streams(streams, "forget") == ["forget", "preferred"]
    assert hessian_streams(streams, "retain") == ["retain"]
