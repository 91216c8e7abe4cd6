"""Scores by hand and by autograd, the choice of the highest of them against a sort, and Wanda's rows."""

from fractions import Fraction

import pytest
import torch
from tiny_architectures import make_model

from llm_unlearn.addons import packed_bits
from llm_unlearn.addons.gradient_sums import Blocks, GradientSums, mean_gradients
from llm_unlearn.addons.mask_making import counted_tokens, pools_of
from llm_unlearn.addons.mask_ranking import Scored, coarse_counts, select, share_of
from llm_unlearn.addons.wagle import random_scores, scores_of, snip, wagle
from llm_unlearn.addons.wanda import input_squares, select_rows, wanda
from llm_unlearn.errors import NonFiniteError, UserError

CPU = torch.device("cpu")


# ---- Scores ----


def test_scores_of_two_weights_by_hand():
    """theta (2, -1), g_f (0.5, -3), g_r (0.125, 0.25), gamma 0.125: |(2 - 1) * 0.5| and |(-1 - 2) * -3|."""
    weights, forget, retain = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0]), torch.tensor([0.125, 0.25])
    assert wagle(weights, forget, retain, 0.125).tolist() == [0.5, 9.0]
    assert snip(weights, forget).tolist() == [1.0, 3.0]
    assert scores_of("wagle", weights, forget.clone(), retain, 0.125).tolist() == [0.5, 9.0]
    assert scores_of("snip", weights, forget.clone()).tolist() == [1.0, 3.0]
    assert scores_of("grad_norm", weights, forget.clone()).tolist() == [0.5, 3.0]
    assert scores_of("magnitude", weights).tolist() == [2.0, 1.0] and weights.tolist() == [2.0, -1.0]


def test_gradients_of_a_model_of_two_weights_by_hand():
    """Losses w0 * w1 + w0 of the forget and w1^2 of the retain set at (2, 3): g_f = (4, 2), g_r = (0, 6)."""
    weights = torch.tensor([2.0, 3.0], requires_grad=True)
    (forget,) = torch.autograd.grad(weights[0] * weights[1] + weights[0], weights)
    (retain,) = torch.autograd.grad(weights[1] ** 2, weights)
    # |(2 - 0 / 2) * 4| and |(3 - 6 / 2) * 2|: where the retain loss pulls a weight back, it does not matter.
    assert wagle(weights.detach(), forget, retain, 2.0).tolist() == [8.0, 0.0]


def test_limits_of_gamma():
    """A large one is snip; a small one the product of the gradients, whatever the weight."""
    generator = torch.Generator().manual_seed(0)
    weights, forget, retain = torch.randn(3, 101, generator=generator)
    torch.testing.assert_close(wagle(weights, forget, retain, 1e12), snip(weights, forget))
    torch.testing.assert_close(wagle(weights, forget, retain, 1e-12) * 1e-12, (retain * forget).abs())


def test_random_scores_depend_on_the_seed_and_the_name_alone():
    first = random_scores("a", 1000, 0)
    assert torch.equal(first, random_scores("a", 1000, 0)) and first.min() >= 0 and first.max() < 1
    for other in (random_scores("b", 1000, 0), random_scores("a", 1000, 1)):
        assert (first == other).sum() < 5


# ---- Gradients ----


def rows(count=5):
    """Ragged rows; the first tokens do not count."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for number in range(count):
        ids = torch.randint(3, 96, (6 + 3 * (number % 3),), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return found


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_mean_over_all_tokens(family, dtype):
    """Against autograd on all rows at once in float64; a tied embedding gets both of its gradients."""
    model = make_model(family).eval()
    twin = make_model(family).double().eval()
    given, model = rows(), model.to(dtype)
    twin.load_state_dict(model.state_dict())
    losses = []
    for row in given:
        ids = torch.tensor([row["input_ids"]])
        logps = twin(input_ids=ids).logits[0, 1:-1].log_softmax(-1)
        losses.append(-logps[torch.arange(len(logps)), ids[0, 2:]])
    loss = torch.cat(losses).mean()
    expected = torch.autograd.grad(loss, list(twin.parameters()))
    parameters = dict(model.named_parameters())
    tokens = counted_tokens(given)
    assert tokens == sum(len(row["input_ids"]) - 2 for row in given)
    found, mean = mean_gradients(model, parameters, Blocks(given, 2, 0, 1, CPU), tokens, "forget")
    exact = dtype == torch.float32
    assert mean == pytest.approx(loss.item(), rel=1e-5 if exact else 3e-2)
    for (name, values), gradient in zip(found.items(), expected, strict=True):
        assert values.dtype == torch.float32 and parameters[name].grad is None
        gap = (values.double() - gradient.flatten()).norm() / gradient.norm().clamp(min=1e-9)
        assert gap < (1e-4 if exact else 0.2), name


def test_bfloat16_gradients_are_summed_in_float32():
    """256 and 600 times 1: in bfloat16 256 + 1 is 256."""
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    sums = GradientSums({"a": parameter})
    for value in [256.0, *[1.0] * 600]:
        parameter.grad = torch.full_like(parameter, value)
        sums.add(1)
    assert sums.take()["a"].tolist() == [856.0, 856.0] and parameter.grad is None


def test_a_parameter_without_a_gradient_counts_as_zero():
    parameters = {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.nn.Parameter(torch.ones(2))}
    sums = GradientSums(parameters)
    parameters["a"].sum().backward()
    sums.add(1)
    assert {name: values.tolist() for name, values in sums.take().items()} == {"a": [1, 1, 1], "b": [0, 0]}


def test_every_row_is_in_one_batch_and_lengths_are_alike():
    given = rows(11)
    parts = Blocks(given, 4, 0, 1, CPU).parts
    assert [len(part) for part in parts] == [4, 4, 3]
    lengths = [len(row["input_ids"]) for part in parts for row in part]
    assert lengths == sorted((len(row["input_ids"]) for row in given), reverse=True)
    assert sorted(map(id, given)) == sorted(id(row) for part in parts for row in part)


# ---- The choice ----


def chosen(scores, ratios, pools=None):
    """Return for each ratio {name: bool} of {name: scores}."""
    scored = [Scored(name, (pools or {}).get(name, 0), values, len(values)) for name, values in scores.items()]
    found = select(scored, coarse_counts(scored, CPU), [Fraction(ratio) for ratio in ratios], CPU)
    return [{name: packed_bits.unpack(bits, len(scores[name])) for name, bits in part.items()} for part in found]


def sorted_choice(scores, ratio, members):
    """The same by a stable sort of all scores of a pool."""
    flat = torch.cat([scores[name] for name in members])
    order = flat.argsort(descending=True, stable=True)[: int(Fraction(ratio) * len(flat))]
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order] = True
    return dict(zip(members, kept.split([len(scores[name]) for name in members]), strict=True))


RATIOS = ["0.001", "0.1", "0.29", "0.5", "0.95", "0.999", "1"]


@pytest.mark.parametrize("kind", ["all different", "many ties", "all zero", "half zero", "tiny and huge"])
def test_the_choice_is_that_of_a_stable_sort(kind):
    """Exactly floor(ratio * size) of each pool; 0.29 * 100 is 28.999... in binary, and 29 here."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"c": 1001, "a": 100, "b": 3, "d": 700}
    scores = {name: torch.rand(size, generator=generator) for name, size in sizes.items()}
    if kind == "many ties":
        scores = {name: (values * 5).floor() / 7 for name, values in scores.items()}
    elif kind == "all zero":
        scores = {name: values * 0 for name, values in scores.items()}
    elif kind == "half zero":
        scores = {name: (values - 0.5).clamp(min=0) for name, values in scores.items()}
    elif kind == "tiny and huge":
        scores = {name: 10 ** (values * 80 - 45) for name, values in scores.items()}
    pools = {"c": 0, "a": 1, "b": 0, "d": 2}
    for ratio, found in zip(RATIOS, chosen(scores, RATIOS), strict=True):
        expected = sorted_choice(scores, ratio, list(sizes))
        assert all(torch.equal(found[name], expected[name]) for name in sizes), ratio
    for ratio, found in zip(RATIOS, chosen(scores, RATIOS, pools), strict=True):
        for members in (["c", "b"], ["a"], ["d"]):
            expected = sorted_choice(scores, ratio, members)
            assert all(torch.equal(found[name], expected[name]) for name in members), ratio


def test_ties_go_to_the_earlier_weight():
    """Two of four 1s beside one 2: the first two in the order of the parameters, not of their names."""
    (found,) = chosen({"b": torch.tensor([0.0, 1.0]), "a": torch.tensor([1.0, 2.0, 1.0, 1.0])}, ["0.5"])
    assert {name: bits.tolist() for name, bits in found.items()} == {
        "b": [False, True],
        "a": [True, True, False, False],
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_is_not_finite_is_refused(value):
    with pytest.raises(NonFiniteError, match=r"not finite.*--gamma"):
        chosen({"a": torch.tensor([1.0, value])}, ["0.5"])


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 100, 1001])
def test_shares_are_whole_bytes_and_cover_everything(size, processes):
    shares = [share_of(size, processes, rank) for rank in range(processes)]
    assert sum(count for _, count in shares) == size
    assert all(first % 8 == 0 or first == size for first, _ in shares)
    assert [first for first, _ in shares] == [sum(count for _, count in shares[:rank]) for rank in range(processes)]


def test_pools_of_layers():
    model = make_model("llama")
    assert set(pools_of(model, "global").values()) == {0}
    pools = pools_of(model, "layer")
    layers = {name.split(".")[2]: number for name, number in pools.items() if ".layers." in name}
    assert len(layers) == 5 and all(layers[name.split(".")[2]] == pools[name] for name in pools if ".layers." in name)
    outside = [number for name, number in pools.items() if ".layers." not in name]
    assert sorted([*layers.values(), *outside]) == list(range(5 + 3))


# ---- Wanda ----


def test_wanda_by_hand():
    """Inputs of mean square 4 and 0.25: |W| * (2, 0.5)."""
    found = wanda(torch.tensor([[1.0, -3.0], [-2.0, 8.0]]), torch.tensor([4.0, 0.25], dtype=torch.float64))
    assert found.tolist() == [[2.0, 1.5], [4.0, 4.0]]


def test_input_squares_are_means_over_tokens_without_padding():
    """Of the first layer's q_proj: the normed embeddings of each row alone, in batches of rows of other lengths."""
    model, given = make_model("llama").eval(), rows()
    tokens = sum(len(row["input_ids"]) for row in given)
    found = input_squares(model, Blocks(given, 2, 0, 1, CPU), tokens)
    inputs = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0]))
    with torch.no_grad():
        for row in given:
            model(input_ids=torch.tensor([row["input_ids"]]))
    expected = torch.cat(inputs).double().square().mean(0)
    torch.testing.assert_close(found["model.layers.0.self_attn.q_proj.weight"], expected, rtol=1e-5, atol=1e-9)
    assert len(found) == 5 * 7


def test_wanda_keeps_the_same_share_of_every_row_and_the_asked_one_of_the_model():
    model = make_model("llama")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    linears = [name for name in shapes if name.endswith("proj.weight")]
    squares = {name: torch.rand(shapes[name][1], generator=generator, dtype=torch.float64) for name in linears}
    squares[linears[0]][:] = 1.0
    ratio = Fraction("0.7")
    found = select_rows(model, squares, ratio, shapes)
    bits = {name: packed_bits.unpack(packed, torch.Size(shapes[name]).numel()) for name, packed in found.items()}
    total = sum(len(part) for part in bits.values())
    assert list(bits) == list(shapes) and sum(int(part.sum()) for part in bits.values()) == int(ratio * total)
    assert all(part.all() for name, part in bits.items() if name not in linears)
    for name in linears:
        kept = bits[name].view(shapes[name]).sum(1)
        assert kept.max() - kept.min() <= 1
        scores = wanda(model.get_parameter(name).detach(), squares[name])
        for row, score, number in zip(bits[name].view(shapes[name]), scores, kept, strict=True):
            assert set(row.nonzero().flatten().tolist()) == set(score.topk(int(number)).indices.tolist())


def test_wanda_cannot_leave_out_what_it_does_not_rank():
    model = make_model("llama")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    squares = {name: torch.ones(shapes[name][1]) for name in shapes if name.endswith("proj.weight")}
    with pytest.raises(UserError, match=r"ranks the linear layers alone, and 0\.\d+ of the weights are in others"):
        select_rows(model, squares, Fraction("0.01"), shapes)
    with pytest.raises(UserError, match="have none of torch's"):
        input_squares(make_model("gpt2"), None, 1)
