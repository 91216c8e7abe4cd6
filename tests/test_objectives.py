"""The loss formulas and the wrong labels: golden numbers, limits, and NumPy oracles with their gradients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_unlearn.errors import UserError
from llm_unlearn.objectives.labels import gumbel_noise, random_labels, sampled_labels
from llm_unlearn.objectives.likelihood import ascent, kl_divergence, nll, sequence_mean_nll, token_logps
from llm_unlearn.objectives.preference import npo, simnpo

# Shapes: B sequences, T tokens, V vocabulary, N counted positions.

# Odd sizes, none a multiple of another, so that a mixed-up axis shows.
B, T, V = 3, 47, 31
N = B * T
LN2 = math.log(2)
# float64: rounding is 1e-16 a step over at most 47 steps; float32: the same at 1e-7.
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def numbers(*shape, seed=0, scale=2.0):
    return np.random.default_rng(seed).normal(0, scale, shape)


def leaf(array, dtype=torch.float64):
    return torch.tensor(array, dtype=dtype, requires_grad=True)


def log_softmax(logits):
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def check(loss, inputs, value, gradient, rel):
    """Compare the values of a loss, and the gradient of its sum, with an oracle; rel is of the largest entry."""
    (found,) = torch.autograd.grad(loss.sum(), [inputs])
    for ours, oracle in ((loss, value), (found, gradient)):
        assert ours.shape == oracle.shape
        np.testing.assert_allclose(ours.detach().double().numpy(), oracle, rtol=rel, atol=rel * np.abs(oracle).max())


# ---- Golden numbers ----


def test_npo_worked_out_by_hand():
    """At beta .5 and logps - ref = 2 ln 3 the sigmoid of -ln 3 is 1/4, so L = 4 ln 4; at -2 ln 3 it is 3/4."""
    ref = torch.tensor([-5.0, -5.0], dtype=torch.float64)
    logps = leaf([-5.0 + 2 * math.log(3), -5.0 - 2 * math.log(3)])
    loss = npo(logps, ref, 0.5)
    assert loss.tolist() == pytest.approx([4 * math.log(4), 4 * math.log(4 / 3)], rel=1e-12)
    # The weight is 2 sigmoid(beta * difference): 2 * 3/4 and 2 * 1/4.
    assert torch.autograd.grad(loss.sum(), logps)[0].tolist() == pytest.approx([1.5, 0.5], rel=1e-12)


def test_simnpo_worked_out_by_hand():
    """At beta 2, delta ln 3 / 2 and mean logp 0 the sigmoid of -ln 3 is 1/4: L = ln 4, dL = 2 * 3/4."""
    mean_logps = leaf([0.0, -math.log(3)])
    loss = simnpo(mean_logps, 2.0, math.log(3) / 2)
    assert loss.tolist() == pytest.approx([math.log(4), math.log(4 / 3)], rel=1e-12)
    assert torch.autograd.grad(loss.sum(), mean_logps)[0].tolist() == pytest.approx([1.5, 0.5], rel=1e-12)


def test_kl_worked_out_by_hand():
    """r = (1/2, 1/2), p = (1/4, 3/4): KL(r || p) = ln 2 - ln(3)/2 = .1438; the other direction would be .1308."""
    logits = leaf([[0.0, math.log(3)]])
    loss = kl_divergence(logits, torch.zeros(1, 2, dtype=torch.float64))
    assert loss.item() == pytest.approx(LN2 - math.log(3) / 2, rel=1e-12)
    # The gradient in the logits is p - r.
    assert torch.autograd.grad(loss.sum(), logits)[0][0].tolist() == pytest.approx([-0.25, 0.25], rel=1e-12)


def test_ascent_descends_the_likelihood_and_nll_the_opposite():
    logps = leaf([[-0.5, -2.0, 0.0]])
    assert ascent(logps).tolist() == [[-0.5, -2.0, 0.0]]
    assert nll(logps).tolist() == [[0.5, 2.0, 0.0]]
    assert torch.autograd.grad(ascent(logps).sum(), logps)[0].tolist() == [[1.0, 1.0, 1.0]]
    assert torch.autograd.grad(nll(logps).sum(), logps)[0].tolist() == [[-1.0, -1.0, -1.0]]


def test_sequence_mean_nll_worked_out_by_hand():
    """Two tokens of 1 and 3 nats average to 2, one of 5 stays 5, and a row without a counted token is 0, not NaN."""
    logps = leaf([[-1.0, -3.0, 0.0], [-5.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    loss = sequence_mean_nll(logps, mask)
    assert loss.tolist() == [2.0, 5.0, 0.0]
    gradient = torch.autograd.grad(loss.sum(), logps)[0]
    assert gradient[:, 0].tolist() == [-0.5, -1.0, -1.0]


def test_token_logps_worked_out_by_hand():
    """Logits (0, ln 3) are the probabilities 1/4 and 3/4."""
    logits = torch.tensor([[0.0, math.log(3)]] * 2, dtype=torch.float64)
    assert token_logps(logits, torch.tensor([0, 1])).tolist() == pytest.approx([-math.log(4), -math.log(4 / 3)])


# ---- Limits ----


@pytest.mark.parametrize("beta", [0.01, 0.1, 4.5])
def test_npo_starts_at_two_over_beta_ln_two_with_the_gradient_of_ascent(beta):
    logps = leaf(numbers(B, seed=1, scale=30))
    loss = npo(logps, logps.detach().clone(), beta)
    assert loss.tolist() == pytest.approx([2 / beta * LN2] * B, rel=1e-12)
    assert torch.autograd.grad(loss.sum(), logps)[0].tolist() == pytest.approx([1.0] * B, rel=1e-12)


def test_npo_becomes_gradient_ascent_as_beta_vanishes():
    """2 sigmoid(beta d) = 1 + beta d / 2 + ..., so at |d| < 100 and beta 1e-9 the weight is 1 within 5e-8."""
    logps, ref = leaf(numbers(B, seed=2, scale=20)), torch.tensor(numbers(B, seed=3, scale=20))
    (gradient,) = torch.autograd.grad(npo(logps, ref, 1e-9).sum(), logps)
    (expected,) = torch.autograd.grad(ascent(logps).sum(), logps)
    assert gradient.tolist() == pytest.approx(expected.tolist(), abs=1e-7)
    # At a beta that matters it does differ.
    (faded,) = torch.autograd.grad(npo(logps, ref, 1.0).sum(), logps)
    assert (faded - expected).abs().max() > 0.1


def test_npo_fades_out_below_the_reference_and_stays_finite():
    """Far below the reference value and gradient are 0; far above the loss is 2 * difference and the weight 2."""
    logps = leaf([-1e5, 1e5])
    loss = npo(logps, torch.zeros(2, dtype=torch.float64), 0.1)
    assert loss.tolist() == pytest.approx([0.0, 2e5])
    assert torch.autograd.grad(loss.sum(), logps)[0].tolist() == pytest.approx([0.0, 2.0])


def test_references_carry_no_gradient():
    logps, ref = leaf(numbers(B)), leaf(numbers(B, seed=1))
    npo(logps, ref, 0.1).sum().backward()
    logits, ref_logits = leaf(numbers(N, V)), leaf(numbers(N, V, seed=1))
    kl_divergence(logits, ref_logits).sum().backward()
    assert ref.grad is None
    assert ref_logits.grad is None
    assert logps.grad.abs().min() > 0
    assert logits.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_kl_of_a_distribution_from_itself_is_exactly_zero(dtype):
    logits = torch.tensor(numbers(N, V)).to(dtype).requires_grad_()
    loss = kl_divergence(logits, logits.detach().clone())
    assert loss.eq(0).all()
    # p - r is 0 up to the rounding of the two softmaxes, here in float32 at worst.
    assert torch.autograd.grad(loss.sum(), logits)[0].abs().max() < 1e-6


rows_of_logits = st.integers(2, 9).flatmap(
    lambda size: st.tuples(*[st.lists(st.floats(-50, 50), min_size=size, max_size=size)] * 2)
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rows_of_logits)
def test_kl_is_never_negative_and_ignores_a_shift_of_the_logits(pair):
    """Terms of up to 100 nats cancel, each rounded at 1e-16, over at most 9 tokens: 1e-12 is ample."""
    logits, ref = (torch.tensor([row], dtype=torch.float64) for row in pair)
    value = kl_divergence(logits, ref).item()
    assert value >= -1e-12
    assert kl_divergence(logits + 7.5, ref - 3.25).item() == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_beta_must_be_positive(beta):
    logps = torch.zeros(B)
    for loss in (lambda: npo(logps, logps, beta), lambda: simnpo(logps, beta, 0.0)):
        with pytest.raises(UserError, match="beta must be > 0"):
            loss()


# ---- Against NumPy on odd shapes ----


@pytest.mark.parametrize(("dtype", "rel"), PRECISIONS)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_npo_agrees_with_numpy(dtype, rel, beta):
    given_logps, given_ref = numbers(T, seed=4, scale=9), numbers(T, seed=5, scale=9)
    logps, ref = leaf(given_logps, dtype), torch.tensor(given_ref, dtype=dtype)
    difference = beta * (logps.detach().double().numpy() - ref.double().numpy())
    value, gradient = 2 / beta * np.logaddexp(0, difference), 2 * sigmoid(difference)
    check(npo(logps, ref, beta), logps, value, gradient, rel)


@pytest.mark.parametrize(("dtype", "rel"), PRECISIONS)
@pytest.mark.parametrize(("beta", "delta"), [(4.5, 0.0), (2.5, 0.75)])
def test_simnpo_agrees_with_numpy(dtype, rel, beta, delta):
    mean_logps = leaf(-np.abs(numbers(T, seed=6)), dtype)
    inside = beta * (mean_logps.detach().double().numpy() + delta)
    value, gradient = 2 / beta * np.logaddexp(0, inside), 2 * sigmoid(inside)
    check(simnpo(mean_logps, beta, delta), mean_logps, value, gradient, rel)


@pytest.mark.parametrize(("dtype", "rel"), PRECISIONS)
def test_kl_agrees_with_numpy(dtype, rel):
    logits = leaf(numbers(B, T, V, seed=7).reshape(N, V), dtype)
    ref_logits = torch.tensor(numbers(B, T, V, seed=8).reshape(N, V), dtype=dtype)
    log_p, log_r = (log_softmax(x.detach().double().numpy()) for x in (logits, ref_logits))
    value, gradient = (np.exp(log_r) * (log_r - log_p)).sum(-1), np.exp(log_p) - np.exp(log_r)
    check(kl_divergence(logits, ref_logits), logits, value, gradient, rel)


@pytest.mark.parametrize(("dtype", "rel"), PRECISIONS)
def test_token_logps_agree_with_numpy(dtype, rel):
    logits = leaf(numbers(B, T, V, seed=9).reshape(N, V), dtype)
    labels = np.random.default_rng(1).integers(0, V, N)
    log_p = log_softmax(logits.detach().double().numpy())
    value, gradient = log_p[np.arange(N), labels], np.eye(V)[labels] - np.exp(log_p)
    check(token_logps(logits, torch.tensor(labels)), logits, value, gradient, rel)


@pytest.mark.parametrize(("dtype", "rel"), PRECISIONS)
def test_sequence_mean_nll_agrees_with_numpy(dtype, rel):
    mask = np.random.default_rng(2).random((B, T)) < 0.6
    mask[1] = False
    logps = leaf(np.where(mask, -np.abs(numbers(B, T, seed=10)), 0), dtype)
    counts = np.maximum(mask.sum(-1), 1)
    value = -logps.detach().double().numpy().sum(-1) / counts
    check(sequence_mean_nll(logps, torch.tensor(mask)), logps, value, np.repeat(-1 / counts, T).reshape(B, T), rel)


def test_gradients_agree_with_finite_differences():
    """gradcheck steps each input by 1e-6 and compares at rel 1e-5."""
    logps, ref = leaf(numbers(B, seed=11)), torch.tensor(numbers(B, seed=12))
    logits, ref_logits = leaf(numbers(5, 7, seed=13)), torch.tensor(numbers(5, 7, seed=14))
    labels = torch.tensor([0, 6, 3, 3, 1])
    functions = [
        (lambda x: npo(x, ref, 0.7), logps),
        (lambda x: simnpo(x, 2.5, 0.3), logps),
        (lambda x: kl_divergence(x, ref_logits), logits),
        (lambda x: token_logps(x, labels), logits),
        (lambda x: sequence_mean_nll(x, torch.ones(5, 7, dtype=torch.bool)), logits),
    ]
    for function, inputs in functions:
        assert torch.autograd.gradcheck(function, (inputs,), eps=1e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_upcast_before_the_softmax(half):
    logits, ref = (torch.tensor(numbers(N, V, seed=seed, scale=4)).to(half) for seed in (15, 16))
    labels = torch.arange(N) % V
    for ours, full, in_half in (
        (
            token_logps(logits, labels),
            token_logps(logits.float(), labels),
            logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0],
        ),
        (
            kl_divergence(logits, ref),
            kl_divergence(logits.float(), ref.float()),
            (ref.softmax(-1) * (ref.log_softmax(-1) - logits.log_softmax(-1))).sum(-1),
        ),
    ):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, full)
        # In half precision the same numbers are visibly off.
        assert (in_half.float() - full).abs().max() > 1e-3


def test_double_precision_is_kept():
    logits = torch.tensor(numbers(N, V))
    assert token_logps(logits, torch.zeros(N, dtype=torch.long)).dtype == torch.float64
    assert kl_divergence(logits, logits).dtype == torch.float64


# ---- Labels ----


def within_five_sigma(drawn, probabilities):
    """Frequencies of N draws scatter by sqrt(p(1-p)/N); 5 sigma of a fixed seed, and what has p = 0 never comes up."""
    frequencies = np.bincount(drawn, minlength=len(probabilities)) / len(drawn)
    sigma = np.sqrt(probabilities * (1 - probabilities) / len(drawn))
    return bool((np.abs(frequencies - probabilities) <= 5 * sigma).all())


def kept_set(logits, forbidden, top_k, top_p):
    """Return (N, V) bool: which tokens can be drawn, asked one by one with noise that favors just that one."""
    columns = []
    for token in range(logits.shape[-1]):
        noise = torch.zeros(logits.shape, dtype=logits.dtype)
        noise[:, token] = 1e6
        columns.append(sampled_labels(logits, forbidden, top_k, top_p, noise) == token)
    return torch.stack(columns, dim=-1)


def brute_force_set(row, forbidden, top_k, top_p):
    """Walk down the likeliest tokens: at most top_k of them, until those before it exceed top_p together."""
    order = [token for token in np.argsort(-row) if token != forbidden][:top_k]
    weights = np.exp(row[order] - row[order[0]])
    kept, before = set(), 0.0
    for token, probability in zip(order, weights / weights.sum(), strict=True):
        if before > top_p:
            break
        kept.add(int(token))
        before += probability
    return kept


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(1, 1.0), (5, 1.0), (31, 1.0), (10**10, 1.0), (10**10, 0.4), (10**10, 0.95), (7, 0.6), (1, 0.2)],
)
@pytest.mark.parametrize("forbids", [True, False])
def test_only_the_top_k_and_top_p_set_can_be_drawn(top_k, top_p, forbids):
    logits = torch.tensor(numbers(T, V, seed=17))
    # The likeliest token is forbidden in half of the rows, where it matters most.
    forbidden = torch.where(torch.arange(T) % 2 == 0, logits.argmax(-1), torch.arange(T) % V)
    kept = kept_set(logits, forbidden if forbids else None, top_k, top_p)
    for row in range(T):
        expected = brute_force_set(logits[row].numpy(), int(forbidden[row]) if forbids else None, top_k, top_p)
        assert set(kept[row].nonzero().squeeze(-1).tolist()) == expected, row


def test_the_nucleus_ends_with_the_token_that_exceeds_it():
    """With (1/2, 1/4, 1/4), exact in binary: 1/4 keeps one; 1/2 is not exceeded by the first, so a second one stays."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64).log()
    assert [int(kept_set(logits, None, 10, top_p).sum()) for top_p in (0.25, 0.5, 0.6, 0.75, 0.8, 1.0)] == [
        1, 2, 2, 3, 3, 4,
    ]  # fmt: skip


def test_the_forbidden_token_is_never_drawn():
    """Even where it has nearly all the probability."""
    logits = torch.tensor(numbers(N, V, seed=18))
    forbidden = torch.arange(N) % V
    logits[torch.arange(N), forbidden] += 40
    for seed in range(5):
        drawn = sampled_labels(logits, forbidden, 10**10, 1.0, gumbel_noise(logits.shape, seed))
        assert not (drawn == forbidden).any()
    assert not (sampled_labels(logits, forbidden, 1, 1.0, None) == forbidden).any()
    assert (sampled_labels(logits, None, 1, 1.0, None) == forbidden).all()


def test_top_one_is_the_likeliest_other_token_and_leaves_the_logits_alone():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    before = logits.clone()
    assert sampled_labels(logits, torch.tensor([0, 0]), 1, 1.0, None).tolist() == [1, 2]
    assert torch.equal(logits, before)


def test_bfloat16_logits_can_be_sampled():
    logits = torch.tensor(numbers(N, V, seed=19)).bfloat16()
    noise = gumbel_noise(logits.shape, 3)
    drawn = sampled_labels(logits, None, 10**10, 0.9, noise)
    assert torch.equal(drawn, sampled_labels(logits.float(), None, 10**10, 0.9, noise))


@pytest.mark.parametrize(
    ("forbidden", "top_k", "top_p", "kept"),
    [
        (None, 10**10, 1.0, range(7)),
        (2, 10**10, 1.0, (0, 1, 3, 4, 5, 6)),
        (None, 3, 1.0, (4, 5, 6)),
        (6, 3, 1.0, (3, 4, 5)),
    ],
)
def test_gumbel_draws_have_the_frequencies_of_the_softmax(forbidden, top_k, top_p, kept):
    num_draws = 20_000
    row = np.array([-1.0, -0.5, 0.0, 0.3, 0.6, 0.9, 1.2])
    weights = np.where(np.isin(np.arange(7), list(kept)), np.exp(row), 0)
    logits = torch.tensor(row, dtype=torch.float32).expand(num_draws, 7)
    forbidden = None if forbidden is None else torch.full((num_draws,), forbidden)
    drawn = sampled_labels(logits, forbidden, top_k, top_p, gumbel_noise((num_draws, 7), 123))
    assert within_five_sigma(drawn.numpy(), weights / weights.sum())
    # The check can fail: a distribution 3 points off in two tokens is told apart.
    wrong = weights / weights.sum()
    wrong[list(kept)[:2]] += [0.03, -0.03]
    assert not within_five_sigma(drawn.numpy(), wrong)


def test_gumbel_noise_is_standard_and_belongs_to_its_seed():
    """Mean .5772 (Euler's constant) and variance pi^2 / 6; over 1e6 draws sigma of the mean is 1.28e-3."""
    noise = gumbel_noise((1000, 1000), 5)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=5 * 1.28e-3)
    # The kurtosis of the distribution is 5.4, so the variance scatters by 1.645 * sqrt(4.4 / 1e6) = 3.5e-3.
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=5 * 3.5e-3)
    assert torch.equal(noise, gumbel_noise((1000, 1000), 5))
    assert not torch.equal(noise, gumbel_noise((1000, 1000), 6))
    # Seeds beyond 64 bits wrap instead of failing.
    assert torch.equal(gumbel_noise((3,), 2**63 + 5), gumbel_noise((3,), 5))


def test_random_labels_are_uniform_and_the_true_token_is_not_excluded():
    generator = torch.Generator().manual_seed(0)
    drawn = random_labels(torch.full((60_000,), 3), 7, generator)
    assert within_five_sigma(drawn.numpy(), np.full(7, 1 / 7))
    assert not within_five_sigma(drawn.numpy(), np.array([1, 1, 1, 0, 1, 1, 1]) / 6)


def test_random_labels_keep_special_tokens_and_uncounted_positions():
    labels = torch.tensor([-100, -100, 1, *range(2, 40), 1, 2, -100])
    drawn = random_labels(labels, 1000, torch.Generator().manual_seed(1), keep_ids=(0, 1, 2))
    kept = torch.isin(labels, torch.tensor([-100, 0, 1, 2]))
    assert torch.equal(drawn[kept], labels[kept])
    assert torch.equal(drawn == -100, labels == -100)
    # 37 positions of which each stays what it was with probability 1/1000.
    assert (drawn[~kept] != labels[~kept]).sum() >= 35


def test_random_labels_belong_to_the_generator():
    labels = torch.arange(50)
    first, again, other = (random_labels(labels, 1000, torch.Generator().manual_seed(s)) for s in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(labels, torch.arange(50))
