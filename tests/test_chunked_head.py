"""Scores of tokens without their logits: against a dense float64 computation, for every chunk size, gradients too."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_unlearn import chunked_head
from llm_unlearn.chunked_head import Projection, chunk_rows, compute_dtype, token_scores
from llm_unlearn.memory.live_bytes import LiveBytes

# Shapes: N positions, D hidden size, V vocabulary.

N, D, V = 47, 31, 123
CHUNKS = (1, 7, N, 3 * N)
FINISHES = {"plain": {}, "softcap": {"softcap": 1.5}, "scale": {"scale": 0.3}, "both": {"scale": 3.0, "softcap": 2.0}}
KINDS = {"logps": (False, False), "kl": (True, False), "entropy": (False, True), "all": (True, True)}
# float64 on both sides: sums in another order. float32 against float64: 31 products and 123 exponentials each.
TIGHT, SINGLE = {"rtol": 1e-10, "atol": 1e-11}, {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture
def chunked(monkeypatch):
    """Function that sets how many positions make a chunk."""
    return lambda rows: monkeypatch.setitem(chunked_head._CHUNK_ELEMENTS, "cpu", rows * V)


@pytest.fixture
def made(monkeypatch):
    """List that gets the number of rows whenever logits are made."""
    rows, original = [], Projection.logits

    def counted(self, hidden, dtype, out=None):
        rows.append(len(hidden))
        return original(self, hidden, dtype, out)

    monkeypatch.setattr(Projection, "logits", counted)
    return rows


def drawn(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def case(finish="plain", with_bias=True, dtype=torch.float64, count=N, frozen=()):
    """Return ({name: tensor}, function that scores them), with a reference of weights of its own."""
    parts = {"hidden": drawn(count, D, seed=1, dtype=dtype), "weight": drawn(V, D, seed=2, dtype=dtype, scale=0.3)}
    parts |= {"bias": drawn(V, seed=3, dtype=dtype)} if with_bias else {}
    for name, part in parts.items():
        part.requires_grad_(name not in frozen)
    ref_hidden = drawn(count, D, seed=4, dtype=dtype)
    ref = Projection(drawn(V, D, seed=5, dtype=dtype, scale=0.3), drawn(V, seed=6, dtype=dtype), **FINISHES[finish])
    labels = torch.randint(0, V, (count,), generator=torch.Generator().manual_seed(7))

    def scores(kind="all", linear=None):
        own = Projection(parts["weight"], parts.get("bias"), **FINISHES[finish])
        has_reference, entropy = KINDS[kind]
        reference = (ref_hidden, ref) if has_reference else None
        return token_scores(parts["hidden"], own, labels, reference, entropy, linear)

    scores.reference, scores.labels, scores.parts = (ref_hidden, ref), labels, parts
    return parts, scores


def dense(scores, kind, finish):
    """The formulas of `token_scores` on whole logits in float64, as autograd differentiates them."""
    parts = {name: part.detach().double().requires_grad_(part.requires_grad) for name, part in scores.parts.items()}
    ref_hidden, ref = scores.reference

    def log_softmax(hidden, weight, bias):
        logits = hidden @ weight.T + (0 if bias is None else bias)
        logits = FINISHES[finish].get("scale", 1.0) * logits
        cap = FINISHES[finish].get("softcap")
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    log_p = log_softmax(parts["hidden"], parts["weight"], parts.get("bias"))
    rows = [log_p[torch.arange(len(log_p)), scores.labels]]
    has_reference, entropy = KINDS[kind]
    if has_reference:
        log_r = log_softmax(ref_hidden.double(), ref.weight.double(), ref.bias.double())
        rows.append((log_r.exp() * (log_r - log_p)).sum(-1))
    if entropy:
        rows.append(-(log_p.exp() * log_p).sum(-1))
    return parts, torch.stack(rows)


def gradients(values, parts, upstream):
    values.backward(upstream)
    found = {name: part.grad for name, part in parts.items()}
    for part in parts.values():
        part.grad = None
    return found


def assert_agree(found, expected, tolerance=TIGHT):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name].double(), value, **tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("rows", CHUNKS)
def test_values_and_gradients_are_those_of_dense_logits(rows, finish, kind, chunked):
    """With an upstream gradient of each value of each token, none of which has anything to do with another."""
    chunked(rows)
    parts, scores = case(finish)
    dense_parts, expected = dense(scores, kind, finish)
    found = scores(kind)
    assert found.shape == (sum(KINDS[kind]) + 1, N) and found.dtype == torch.float64
    torch.testing.assert_close(found, expected, **TIGHT)
    upstream = drawn(*found.shape, seed=8)
    assert_agree(gradients(found, parts, upstream), gradients(expected, dense_parts, upstream))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", ["logps", "kl"])
@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("rows", CHUNKS)
def test_a_linear_loss_makes_each_logit_once(rows, finish, kind, with_bias, chunked, made):
    """Weights, among them zeros and negative ones, times one number: the gradient is there when backward is called."""
    chunked(rows)
    parts, scores = case(finish, with_bias)
    weights = drawn(N, seed=9).clamp(min=-0.5).where(torch.arange(N) % 5 > 0, 0)
    upstream = torch.zeros(1 + (kind == "kl"), N, dtype=torch.float64)
    upstream[-1] = -0.37 * weights
    dense_parts, expected = dense(scores, kind, finish)
    values = scores(kind, linear=weights)
    torch.testing.assert_close(values, expected, **TIGHT)
    found = gradients(values, parts, upstream)
    assert sum(made) == N * (1 + (kind == "kl"))
    assert_agree(found, gradients(expected, dense_parts, upstream))


BROKEN = {
    "one token": lambda upstream: upstream[-1].__setitem__(3, upstream[-1, 3] + 1e-3),
    "another value": lambda upstream: upstream[0].add_(1e-9),
    "all of them": lambda upstream: upstream.copy_(drawn(*upstream.shape, seed=10)),
    "signs": lambda upstream: upstream[-1].abs_(),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("rows", [7, N])
def test_a_loss_that_breaks_the_promise_gets_the_right_gradient(broken, rows, chunked, made):
    """It costs the logits a second time, of the policy and of the reference."""
    chunked(rows)
    parts, scores = case()
    weights = drawn(N, seed=9)
    upstream = torch.zeros(2, N, dtype=torch.float64)
    upstream[1] = 2.5 * weights
    BROKEN[broken](upstream)
    dense_parts, expected = dense(scores, "kl", "plain")
    found = gradients(scores("kl", linear=weights), parts, upstream)
    assert sum(made) == 4 * N
    assert_agree(found, gradients(expected, dense_parts, upstream))


def test_token_weights_of_zero_and_a_gradient_of_zero():
    parts, scores = case()
    none = torch.zeros(N, dtype=torch.float64)
    found = gradients(scores("logps", linear=none), parts, none[None])
    assert all(value.eq(0).all() for value in found.values())
    upstream = drawn(1, N, seed=8)
    dense_parts, expected = dense(scores, "logps", "plain")
    assert_agree(gradients(scores("logps", linear=none), parts, upstream), gradients(expected, dense_parts, upstream))


@pytest.mark.parametrize("linear", [False, True])
def test_float32_scores_agree_with_float64(linear, chunked):
    chunked(7)
    parts, scores = case("both", dtype=torch.float32)
    weights = drawn(N, seed=9)
    upstream = torch.stack([torch.zeros(N), weights.float()])
    dense_parts, expected = dense(scores, "kl", "both")
    found = scores("kl", linear=weights.float() if linear else None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, **SINGLE)
    assert_agree(gradients(found, parts, upstream), gradients(expected, dense_parts, upstream.double()), SINGLE)


@pytest.mark.parametrize("finish", ["plain", "both"])
def test_gradcheck(finish, monkeypatch):
    """Against finite differences, on a small head, with chunks that divide nothing."""
    monkeypatch.setitem(chunked_head._CHUNK_ELEMENTS, "cpu", 3 * 7)
    own = [drawn(5, 4, seed=1), drawn(7, 4, seed=2), drawn(7, seed=3)]
    ref = drawn(5, 4, seed=4), Projection(drawn(7, 4, seed=5), None, **FINISHES[finish])
    labels = torch.tensor([0, 6, 3, 3, 1])
    for has_reference, entropy in KINDS.values():
        assert torch.autograd.gradcheck(
            lambda hidden, weight, bias, reference=ref if has_reference else None, entropy=entropy: token_scores(
                hidden, Projection(weight, bias, **FINISHES[finish]), labels, reference, entropy
            ),
            [part.requires_grad_() for part in own],
        )


@pytest.mark.parametrize("finish", FINISHES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_divergence_of_equal_models_is_exactly_zero_and_so_is_its_gradient(dtype, finish, chunked):
    chunked(7)
    hidden = drawn(N, D, seed=1, dtype=dtype).requires_grad_()
    weight, bias = drawn(V, D, seed=2, dtype=dtype).requires_grad_(), drawn(V, seed=3, dtype=dtype)
    own = Projection(weight, bias, **FINISHES[finish])
    reference = hidden.detach(), own
    values = token_scores(hidden, own, torch.arange(N), reference, linear=torch.ones(N))
    assert values[1].eq(0).all()
    values[1].sum().backward()
    # The two softmaxes of the gradient are rounded the same way.
    assert hidden.grad.eq(0).all() and weight.grad.eq(0).all()


@pytest.mark.parametrize("linear", [None, torch.zeros(0)])
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_no_values_and_zero_gradients(kind, linear):
    parts, scores = case(count=0)
    values = scores(kind, linear=linear)
    assert values.shape == (1 + sum(KINDS[kind]), 0)
    values.sum().backward()
    assert all(part.grad.shape == part.shape and part.grad.eq(0).all() for part in parts.values())


@pytest.mark.parametrize("linear", [False, True])
def test_a_retained_graph_can_be_run_backward_again(linear):
    """The gradient that the forward took is spent by the first backward, and made anew by the second."""
    parts, scores = case()
    weights = drawn(N, seed=9)
    values = scores("logps", linear=weights if linear else None)
    upstream = 3 * weights[None]
    values.backward(upstream, retain_graph=True)
    first = {name: part.grad.clone() for name, part in parts.items()}
    values.backward(upstream)
    assert_agree({name: part.grad for name, part in parts.items()}, {name: 2 * part for name, part in first.items()})


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("bias",)])
@pytest.mark.parametrize("linear", [False, True])
def test_what_is_frozen_gets_no_gradient_and_costs_none(linear, frozen, monkeypatch):
    parts, scores = case(frozen=frozen)
    kept, original = [], chunked_head._Gradients.scaled

    def watched(self, factor):
        kept.append({name: getattr(self, name) is not None for name in parts})
        return original(self, factor)

    monkeypatch.setattr(chunked_head._Gradients, "scaled", watched)
    weights = drawn(N, seed=9)
    dense_parts, expected = dense(scores, "logps", "plain")
    found = gradients(scores("logps", linear=weights if linear else None), parts, weights[None])
    assert_agree(found, gradients(expected, dense_parts, weights[None]))
    assert kept == [{name: name not in frozen for name in parts}]


def test_without_gradients_nothing_is_kept_and_no_gradient_is_made(made):
    _, scores = case()
    with torch.no_grad():
        assert not scores("all", linear=torch.ones(N)).requires_grad
    assert sum(made) == 2 * N
    _, frozen = case(frozen=("hidden", "weight", "bias"))
    assert not frozen("logps", linear=torch.ones(N)).requires_grad


@pytest.mark.parametrize("linear", [False, True])
def test_bfloat16_autocast_makes_the_products_of_a_dense_head_under_autocast(linear):
    """Values of the same rounded product, in float32. Gradients are rounded to 8 bits on the way, more than once."""
    parts, scores = case(dtype=torch.float32)
    weights = drawn(N, seed=9, dtype=torch.float32)
    twin = {name: part.detach().clone().requires_grad_() for name, part in parts.items()}
    with torch.autocast("cpu", torch.bfloat16):
        values = scores("logps", linear=weights if linear else None)
        logits = torch.nn.functional.linear(twin["hidden"], twin["weight"], twin["bias"])
        expected = logits.float().log_softmax(-1)[torch.arange(N), scores.labels]
        assert compute_dtype(*[torch.zeros(1, dtype=torch.float64)] * 2) == torch.float64
    assert logits.dtype == torch.bfloat16 and values.dtype == torch.float32
    torch.testing.assert_close(values[0], expected, rtol=1e-6, atol=1e-6)
    found, wanted = gradients(values, parts, weights[None]), gradients(expected, twin, weights)
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).norm() < 2**-7 * value.norm(), name


def test_bfloat16_weights_have_bfloat16_gradients_gathered_in_float32(chunked):
    """Gathered over 47 chunks in bfloat16 the error would be several times the rounding of the result."""
    chunked(1)
    parts, scores = case(dtype=torch.bfloat16)
    (dense_parts, expected), weights = dense(scores, "logps", "plain"), torch.ones(1, N)
    values = scores("logps")
    assert values.dtype == torch.float32
    found, wanted = gradients(values, parts, weights), gradients(expected, dense_parts, weights.double())
    for name, value in wanted.items():
        assert found[name].dtype == torch.bfloat16
        assert (found[name].double() - value).norm() < 2**-7 * value.norm(), name


@pytest.mark.parametrize("linear", [False, True])
def test_a_second_derivative_is_refused_or_right(linear):
    """Logits are made under no graph, so that a gradient of a gradient can only be refused; never come out wrong."""
    parts, scores = case(count=5)
    dense_parts, expected = dense(scores, "logps", "plain")

    def curvature(values, parts):
        (first,) = torch.autograd.grad(values.mean().exp(), parts["hidden"], create_graph=True)
        return torch.autograd.grad(first.square().sum(), list(parts.values()))

    wanted = curvature(expected, dense_parts)
    with contextlib.suppress(RuntimeError):
        found = curvature(scores("logps", torch.ones(5) if linear else None), parts)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=0)


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest result of any operation has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(result) if isinstance(tensor, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("kind, chunks", [("logps", 2), ("kl", 4), ("all", 5)])
@pytest.mark.parametrize("linear", [False, True])
def test_logits_of_all_positions_never_exist(linear, kind, chunks, monkeypatch):
    """4096 positions, 8 at once: memory is the gradients and a few chunks, while dense logits would be 512 of them.

    At once live: the logits and their log-softmax; with a reference its log-softmax and probabilities.
    """
    count, width, vocabulary, rows = 4096, 8, 512, 8
    monkeypatch.setitem(chunked_head._CHUNK_ELEMENTS, "cpu", rows * vocabulary)
    assert chunk_rows(vocabulary, torch.device("cpu")) == rows
    hidden, weight = drawn(count, width, dtype=torch.float32), drawn(vocabulary, width, dtype=torch.float32)
    labels, ones, own = torch.arange(count) % vocabulary, torch.ones(count), Projection(weight.requires_grad_())
    reference = (hidden.clone(), Projection(weight.detach().clone())) if KINDS[kind][0] else None
    hidden.requires_grad_()
    known = [hidden, weight, labels, ones, *(reference[:1] if reference else [])]
    with Largest() as largest, LiveBytes(known) as live:
        values = token_scores(hidden, own, labels, reference, KINDS[kind][1], ones if linear else None)
        values[1 if kind == "kl" else 0].sum().backward()
    assert largest.numel == max(rows * vocabulary, count * width)
    chunk, gradient = 4 * rows * vocabulary, 4 * (count * width + vocabulary * width)
    # Besides: a dozen numbers a position (values, normalizers, their gradients), and two (V, D) in passing.
    assert live.peak <= chunks * chunk + gradient + 4 * (count * 12 + 2 * vocabulary * width)
    assert live.peak < 4 * count * vocabulary / 10
