"""The cross-entropy of the uniform distribution, read off a head in chunks: by hand, and against dense logits."""

import itertools
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_chunked_head import FINISHES, SINGLE, TIGHT, Largest, assert_agree, case, drawn, gradients
from test_head_reading import ADAPTERS, batch, forward, make

from llm_unlearn import chunked_head
from llm_unlearn.chunked_head import Projection, token_scores
from llm_unlearn.head import counted_states, split
from llm_unlearn.head_reading import HeadReader, score_streams
from llm_unlearn.memory.live_bytes import LiveBytes
from llm_unlearn.objectives.entropy import uniform_cross_entropy

# Shapes: N positions, D hidden size, V vocabulary.

N, D, V = 47, 31, 123
TOP = {"all": None, "top_5": 5}
NAMES = ("llama", "gemma2_softcap", "cohere_scale", "gptj_bias", "recurrent_gemma_own")
ADAPTED = ("on_head", "head_saved")


@pytest.fixture
def chunked(monkeypatch):
    """Function that sets how many positions make a chunk."""
    return lambda rows, vocabulary=V: monkeypatch.setitem(chunked_head._CHUNK_ELEMENTS, "cpu", rows * vocabulary)


def by_hand(logits, top_k=None):
    """-(1/K) sum log q over the K largest logits, q their own softmax, written without a logsumexp."""
    if top_k is not None:
        logits = logits.sort(-1, descending=True).values[..., :top_k]
    return -(logits.softmax(-1)).log().mean(-1)


def scores_of(scores, finish, reference=False, entropy=False, linear=None, top_k=None):
    """`token_scores` of a `case` with the uniform row; all rows."""
    own = Projection(scores.parts["weight"], scores.parts.get("bias"), **FINISHES[finish])
    given = scores.reference if reference else None
    return token_scores(scores.parts["hidden"], own, scores.labels, given, entropy, linear, True, top_k)


def dense(scores, finish, reference=False, entropy=False, top_k=None):
    """The same rows of whole logits in float64, as autograd differentiates them."""
    parts = {name: part.detach().double().requires_grad_(part.requires_grad) for name, part in scores.parts.items()}

    def finished(hidden, weight, bias):
        logits = FINISHES[finish].get("scale", 1.0) * (hidden @ weight.T + (0 if bias is None else bias))
        cap = FINISHES[finish].get("softcap")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    logits = finished(parts["hidden"], parts["weight"], parts.get("bias"))
    log_p = logits.log_softmax(-1)
    rows = [log_p[torch.arange(len(log_p)), scores.labels]]
    if reference:
        hidden, ref = scores.reference
        log_r = finished(hidden.double(), ref.weight.double(), ref.bias.double()).log_softmax(-1)
        rows.append((log_r.exp() * (log_r - log_p)).sum(-1))
    if entropy:
        rows.append(-(log_p.exp() * log_p).sum(-1))
    return parts, torch.stack([*rows, by_hand(logits, top_k)])


# ---- The number, worked out ----


def test_worked_out_by_hand():
    """p = (1/4, 3/4): -(ln 1/4 + ln 3/4) / 2 = ln 4 - (ln 3) / 2; p = (1/6, 2/6, 3/6): ln 6 - (ln 2 + ln 3) / 3."""
    two = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64, requires_grad=True)
    three = torch.tensor([[0.0, math.log(2), math.log(3)]], dtype=torch.float64, requires_grad=True)
    assert uniform_cross_entropy(two).item() == pytest.approx(math.log(4) - math.log(3) / 2, rel=1e-14)
    assert uniform_cross_entropy(three).item() == pytest.approx(math.log(6) - math.log(6) / 3, rel=1e-14)
    (uniform_cross_entropy(two) + uniform_cross_entropy(three)).sum().backward()
    torch.testing.assert_close(two.grad, torch.tensor([[1 / 4 - 1 / 2, 3 / 4 - 1 / 2]], dtype=torch.float64))
    torch.testing.assert_close(three.grad, torch.tensor([[1 / 6, 2 / 6, 3 / 6]], dtype=torch.float64) - 1 / 3)


def test_of_the_two_largest_of_three_logits_by_hand():
    """The largest two of (1/6, 2/6, 3/6) are (2/5, 3/5) among themselves; the third logit has no gradient."""
    logits = torch.tensor([[0.0, math.log(2), math.log(3)]], dtype=torch.float64, requires_grad=True)
    found = uniform_cross_entropy(logits, top_k=2)
    assert found.item() == pytest.approx(-(math.log(2 / 5) + math.log(3 / 5)) / 2, rel=1e-14)
    found.sum().backward()
    expected = torch.tensor([[0.0, 2 / 5 - 1 / 2, 3 / 5 - 1 / 2]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("size", [2, 3, 96])
def test_equal_logits_give_the_least_value_and_no_gradient(size):
    logits = torch.full((4, size), 1.7, requires_grad=True)
    found = uniform_cross_entropy(logits)
    torch.testing.assert_close(found, torch.full((4,), math.log(size)), rtol=2e-7, atol=0)
    found.sum().backward()
    assert logits.grad.abs().max() < 1e-7
    assert (uniform_cross_entropy(drawn(4, size, seed=1)) > math.log(size)).all()


def test_it_is_the_mean_loss_over_all_labels_and_ln_v_plus_a_divergence():
    logits = drawn(5, V, seed=1)
    over_labels = torch.stack([-logits.log_softmax(-1)[:, label] for label in range(V)]).mean(0)
    torch.testing.assert_close(uniform_cross_entropy(logits), over_labels, **TIGHT)
    divergence = (1 / V * (-math.log(V) - logits.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(uniform_cross_entropy(logits), math.log(V) + divergence, **TIGHT)
    torch.testing.assert_close(uniform_cross_entropy(logits + 3.0), uniform_cross_entropy(logits), **TIGHT)


def test_likely_tokens_go_down_and_unlikely_ones_up():
    logits = drawn(9, V, seed=1, scale=3.0).requires_grad_()
    uniform_cross_entropy(logits).sum().backward()
    probabilities = logits.detach().softmax(-1)
    assert torch.equal(logits.grad > 0, probabilities > 1 / V)
    torch.testing.assert_close(logits.grad, probabilities - 1 / V, **TIGHT)


# ---- In chunks ----


@pytest.mark.parametrize("top", TOP)
@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("rows", [7, N])
def test_values_and_gradients_are_those_of_dense_logits(rows, finish, top, chunked):
    """Beside each of the other values, with an upstream gradient of each value of each token."""
    chunked(rows)
    for reference, entropy, with_bias in itertools.product([False, True], repeat=3):
        parts, scores = case(finish, with_bias)
        dense_parts, expected = dense(scores, finish, reference, entropy, TOP[top])
        found = scores_of(scores, finish, reference, entropy, top_k=TOP[top])
        assert found.shape == (2 + reference + entropy, N) and found.dtype == torch.float64
        torch.testing.assert_close(found, expected, **TIGHT)
        upstream = drawn(*found.shape, seed=8)
        assert_agree(gradients(found, parts, upstream), gradients(expected, dense_parts, upstream))


@pytest.mark.parametrize("top", TOP)
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("finish", FINISHES)
def test_a_linear_loss_makes_each_logit_once(finish, reference, top, chunked, monkeypatch):
    chunked(7)
    made, original = [], Projection.logits
    monkeypatch.setattr(
        Projection, "logits", lambda self, hidden, *rest: (made.append(len(hidden)), original(self, hidden, *rest))[1]
    )
    parts, scores = case(finish)
    weights = drawn(N, seed=9).clamp(min=-0.5).where(torch.arange(N) % 5 > 0, 0)
    dense_parts, expected = dense(scores, finish, reference, top_k=TOP[top])
    upstream = torch.zeros_like(expected)
    upstream[-1] = -0.37 * weights
    values = scores_of(scores, finish, reference, linear=weights, top_k=TOP[top])
    torch.testing.assert_close(values, expected, **TIGHT)
    found = gradients(values, parts, upstream)
    assert sum(made) == N * (1 + reference)
    assert_agree(found, gradients(expected, dense_parts, upstream))


@pytest.mark.parametrize("row", [0, 1])
def test_a_loss_that_breaks_the_promise_gets_the_right_gradient(row):
    """`linear` speaks of the uniform row; a loss of another one, or of both, costs the logits a second time."""
    parts, scores = case()
    weights = drawn(N, seed=9)
    dense_parts, expected = dense(scores, "plain")
    upstream = torch.zeros_like(expected)
    upstream[1] = 2.0 * weights
    upstream[row, 3] += 0.25
    found = gradients(scores_of(scores, "plain", linear=weights), parts, upstream)
    assert_agree(found, gradients(expected, dense_parts, upstream))


def test_the_other_values_are_what_they_are_without_it():
    _, scores = case("both")
    whole = scores_of(scores, "both", reference=True, entropy=True)
    assert torch.equal(whole[:-1], scores("all"))


@pytest.mark.parametrize("finish", ["plain", "both"])
@pytest.mark.parametrize("top_k", [None, 3])
def test_gradcheck(top_k, finish, chunked):
    """Against finite differences, on a small head, with chunks that divide nothing."""
    chunked(3, 7)
    own = [drawn(5, 4, seed=1), drawn(7, 4, seed=2), drawn(7, seed=3)]
    ref = drawn(5, 4, seed=4), Projection(drawn(7, 4, seed=5), None, **FINISHES[finish])
    labels = torch.tensor([0, 6, 3, 3, 1])
    for reference, entropy in itertools.product([None, ref], [False, True]):
        assert torch.autograd.gradcheck(
            lambda hidden, weight, bias, reference=reference, entropy=entropy: token_scores(
                hidden, Projection(weight, bias, **FINISHES[finish]), labels, reference, entropy, None, True, top_k
            ),
            [part.requires_grad_() for part in own],
        )


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("top", TOP)
def test_float32_scores_agree_with_float64(top, linear, chunked):
    chunked(7)
    parts, scores = case("both", dtype=torch.float32)
    weights = drawn(N, seed=9).float()
    dense_parts, expected = dense(scores, "both", top_k=TOP[top])
    upstream = torch.stack([torch.zeros(N), weights])
    values = scores_of(scores, "both", linear=weights if linear else None, top_k=TOP[top])
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, **SINGLE)
    assert_agree(gradients(values, parts, upstream), gradients(expected, dense_parts, upstream.double()), SINGLE)


@pytest.mark.parametrize("linear", [None, torch.zeros(0)])
def test_no_tokens_give_no_values_and_zero_gradients(linear):
    parts, scores = case(count=0)
    values = scores_of(scores, "plain", linear=linear)
    assert values.shape == (2, 0)
    values.sum().backward()
    assert all(part.grad.shape == part.shape and part.grad.eq(0).all() for part in parts.values())


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("linear", [False, True])
def test_logits_of_all_positions_never_exist(linear, top_k, chunked):
    """1024 positions, 8 at once. Live together: a chunk's logits and its log-softmax, or that and its gradient."""
    count, width, vocabulary, rows = 1024, 8, 512, 8
    chunked(rows, vocabulary)
    hidden, weight = drawn(count, width, dtype=torch.float32), drawn(vocabulary, width, dtype=torch.float32)
    labels, ones, own = torch.arange(count) % vocabulary, torch.ones(count), Projection(weight.requires_grad_())
    hidden.requires_grad_()
    with Largest() as largest, LiveBytes([hidden, weight, labels, ones]) as live:
        values = token_scores(hidden, own, labels, None, False, ones if linear else None, True, top_k)
        values[1].sum().backward()
    assert largest.numel == max(rows * vocabulary, count * width)
    chunk, gradient = 4 * rows * vocabulary, 4 * (count * width + vocabulary * width)
    assert live.peak <= 3 * chunk + gradient + 4 * (count * 14 + 2 * vocabulary * width)


# ---- On real models ----


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("name, adapter", [*((name, None) for name in NAMES), *itertools.product(NAMES[:2], ADAPTED)])
def test_of_a_model_with_any_head(name, adapter, top_k, chunked):
    """Plain, adapted and dense heads, in chunks of 5: values and gradients are those of the model's own logits."""
    chunked(5, 96)
    model, inputs = make(name), batch()
    if adapter is not None:
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **ADAPTERS[adapter]))
    uniform = ("forget",) if top_k is None else {"forget": top_k}
    outputs = score_streams(HeadReader(model), model, inputs, ("forget", "retain"), 0, ("retain",), uniform=uniform)
    forget, retain = outputs["forget"], outputs["retain"]
    assert retain.uniform is None and forget.entropy is None and retain.entropy is not None
    loss = forget.uniform.square().sum() + 0.3 * forget.logps.sum()
    found = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    logits = split(forward(model, inputs), inputs, ("forget", "retain"))["forget"]
    expected = by_hand(counted_states(logits, inputs["forget"]).float(), top_k)
    torch.testing.assert_close(forget.uniform[forget.mask], expected, rtol=1e-5, atol=1e-5)
    assert forget.uniform[~forget.mask].eq(0).all() and (~forget.mask).any()
    logps = counted_states(logits, inputs["forget"]).float().log_softmax(-1)
    labels = inputs["forget"]["labels"][:, 1:][forget.mask]
    dense_loss = expected.square().sum() + 0.3 * logps[torch.arange(len(logps)), labels].sum()
    wanted = torch.autograd.grad(dense_loss, [p for p in model.parameters() if p.requires_grad])
    whole = torch.stack([value.norm() for value in wanted]).norm()
    assert max((a - b).norm() / whole for a, b in zip(found, wanted, strict=True)) < 1e-5


def test_more_logits_than_there_are_cannot_be_read():
    model, ids = make("llama"), torch.tensor([[5, 6, 7, 8]])

    def read(head, hidden):
        return head.scores(hidden[0], ids[0], uniform=True, top_k=97)

    with pytest.raises(RuntimeError, match="out of range"):
        HeadReader(model)(model, read, ids, torch.ones_like(ids))


def test_an_adapted_head_never_makes_the_logits_of_all_positions(chunked):
    chunked(5, 96)
    model = get_peft_model(make("llama"), LoraConfig(r=2, init_lora_weights=False, **ADAPTERS["on_head"]))
    ids, labels = torch.tensor([[5, 6, 7, 8]]), torch.arange(400) % 96

    def read(head, hidden):
        return head.scores(hidden.repeat(1, 100, 1)[0], labels, uniform=True, top_k=7).reshape(-1)

    with Largest() as largest:
        HeadReader(model)(model, read, ids, torch.ones_like(ids)).sum().backward()
    assert largest.numel == 400 * 32
