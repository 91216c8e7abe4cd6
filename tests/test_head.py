"""From one forward of stacked streams back to each: against a naive loop, indifferent to padding, and what counts."""

import types

import pytest
import torch

from llm_unlearn import head
from llm_unlearn.data.plan import FILLER
from llm_unlearn.data.streams import UnlearnCollator
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.head import StreamOutput, concatenate, counts, split
from llm_unlearn.head_reading import HeadReader, score_streams

# Shapes: B sequences, T tokens, V vocabulary, N counted positions.

V = 31
LENGTHS = {"forget": (9, 3, 6), "retain": (14, 2, 11, 5)}
STREAMS = tuple(LENGTHS)
PATHS = pytest.mark.parametrize("has_head", [False, True], ids=["whole_logits", "head"])


class Fixed(torch.nn.Module):
    """A model that returns the logits that it was made with; with a head they are its input, and the head is the
    identity, so that both ways of reading it must give the very same numbers."""

    def __init__(self, states, has_head):
        super().__init__()
        self.states, self.forwards = states, 0
        self.config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace())
        self.lm_head = torch.nn.Linear(V, V, bias=False, dtype=states.dtype) if has_head else None
        if has_head:
            self.lm_head.weight = torch.nn.Parameter(torch.eye(V, dtype=states.dtype))

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask, use_cache):
        self.forwards += 1
        states = self.states[: input_ids.shape[0], : input_ids.shape[1]]
        return types.SimpleNamespace(logits=states if self.lm_head is None else self.lm_head(states))


def row(length, seed, weighted=False):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (length,), generator=generator).tolist()
    labels = [token if (seed + place) % 3 else IGNORED for place, token in enumerate(ids)]
    weights = torch.rand(length, generator=generator).tolist() if weighted else None
    return {"input_ids": ids, "labels": labels} | ({"weights": weights} if weighted else {})


def filler():
    return {"input_ids": [1, 1], "labels": [IGNORED, IGNORED], "index": FILLER}


def batch_of(multiple=1, weighted=("retain",)):
    """Two streams of ragged rows with prompts that do not count, token weights on one, and a filler row in each."""
    collator = UnlearnCollator(pad_token_id=7, multiple=multiple)
    return {
        name: collator.pad([row(n, 10 * k + n, name in weighted) for k, n in enumerate(LENGTHS[name])] + [filler()])
        for name in STREAMS
    }


def logits_for(inputs, seed=0, dtype=torch.float64):
    input_ids, _ = concatenate(inputs, STREAMS, 7)
    return torch.randn(*input_ids.shape, V, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def score(logits, inputs, streams=STREAMS, has_head=True, reference=None, **wanted):
    """Score streams of a model with these logits; `reference` holds logits (B, T, V) of another."""
    model = Fixed(logits, has_head)
    if reference is not None:
        parts = split(reference, inputs, streams)
        wanted["ref_hidden"] = {name: head.counted_states(parts[name], inputs[name]) for name in streams}
    return score_streams(HeadReader(model), model, inputs, streams, 7, **wanted)


def naive(logits, inputs):
    """Yield (stream, row, slot, label, the V logits that predict it) of each counted token, one by one."""
    first = 0
    for name in STREAMS:
        labels = inputs[name]["labels"]
        for number in range(len(labels)):
            for place in range(1, labels.shape[1]):
                if labels[number, place] != IGNORED:
                    yield name, number, place - 1, int(labels[number, place]), logits[first + number, place - 1]
        first += len(labels)


def zeros(inputs):
    return {name: torch.zeros(inputs[name]["labels"][:, 1:].shape, dtype=torch.float64) for name in STREAMS}


def widened(inputs, logits, columns):
    """Add pad columns to every stream, with garbage behind them."""
    pad = torch.nn.functional.pad
    fill = {"input_ids": 7, "attention_mask": 0, "labels": IGNORED, "weights": 0.0}
    wider = {
        name: {k: v if k == "index" else pad(v, (0, columns), value=fill[k]) for k, v in stream.items()}
        for name, stream in inputs.items()
    }
    garbage = torch.full((logits.shape[0], columns, V), 1e6, dtype=logits.dtype)
    return wider, torch.cat([logits, garbage], dim=1)


def test_concatenate_stacks_the_streams_and_fills_on_the_right():
    inputs = batch_of()
    ids, attention = concatenate(inputs, STREAMS, 7)
    assert ids.shape == attention.shape == (4 + 5, 14)
    assert torch.equal(ids[:4, :9], inputs["forget"]["input_ids"])
    assert torch.equal(ids[4:], inputs["retain"]["input_ids"])
    assert ids[:4, 9:].eq(7).all()
    assert attention[:4, 9:].eq(0).all()
    assert attention.sum(-1).tolist() == [9, 3, 6, 2, 14, 2, 11, 5, 2]
    turned, _ = concatenate(inputs, ("retain", "forget"), 7)
    assert torch.equal(turned, torch.cat([ids[4:], ids[:4]]))


def test_split_takes_apart_what_concatenate_put_together():
    inputs = batch_of()
    for streams in (STREAMS, STREAMS[::-1]):
        ids, _ = concatenate(inputs, streams, 7)
        parts = split(ids, inputs, streams)
        assert list(parts) == list(streams)
        assert all(torch.equal(parts[name], inputs[name]["input_ids"]) for name in streams)


def test_counted_tokens_come_row_by_row_with_the_state_that_predicts_each():
    inputs = batch_of()
    logits = logits_for(inputs)
    parts = split(logits, inputs, STREAMS)
    for name in STREAMS:
        expected = [entry for entry in naive(logits, inputs) if entry[0] == name]
        assert head.counted_positions(inputs[name]).nonzero().tolist() == [[e[1], e[2]] for e in expected]
        assert head.counted_labels(inputs[name]).tolist() == [label for *_, label, _ in expected]
        assert torch.equal(head.counted_states(parts[name], inputs[name]), torch.stack([e[-1] for e in expected]))
        weights = inputs[name].get("weights", torch.ones(inputs[name]["labels"].shape))
        assert head.counted_weights(inputs[name]).tolist() == [float(weights[e[1], e[2] + 1]) for e in expected]


@PATHS
def test_scores_agree_with_a_naive_loop(has_head):
    inputs = batch_of()
    logits, ref_logits = logits_for(inputs), logits_for(inputs, seed=1)
    model = Fixed(logits, has_head)
    reader = HeadReader(model)
    for number in range(2):
        outputs = score_streams(reader, model, inputs, STREAMS, 7, entropy=("retain",))
        # One forward for both streams; before the first one a head is probed by a short one.
        assert model.forwards == 1 + number + has_head
    logps, entropy, kl, masks = zeros(inputs), zeros(inputs), zeros(inputs), zeros(inputs)
    rows = zip(naive(logits, inputs), naive(ref_logits, inputs), strict=True)
    for (name, number, slot, label, predicted), (*_, ref_predicted) in rows:
        log_p, log_r = predicted.log_softmax(0), ref_predicted.log_softmax(0)
        logps[name][number, slot] = predicted[label] - torch.logsumexp(predicted, 0)
        entropy[name][number, slot] = -(log_p.exp() * log_p).sum()
        kl[name][number, slot] = (log_r.exp() * (log_r - log_p)).sum()
        masks[name][number, slot] = 1
    held = score(logits, inputs, has_head=has_head, reference=ref_logits, entropy=STREAMS)
    for name in STREAMS:
        # float64: two formulas of the same log-softmax.
        torch.testing.assert_close(outputs[name].logps, logps[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(held[name].logps, logps[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(held[name].kl, kl[name], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(held[name].entropy, entropy[name], rtol=1e-12, atol=1e-12)
        assert torch.equal(outputs[name].mask, masks[name].bool())
        assert held[name].kl[outputs[name].mask].gt(0).all()
        assert outputs[name].kl is None
    assert outputs["forget"].entropy is None and torch.equal(outputs["retain"].entropy, held["retain"].entropy)
    assert outputs["forget"].weights is None
    assert torch.equal(outputs["retain"].weights, inputs["retain"]["weights"][:, 1:])


@PATHS
def test_the_divergence_from_itself_is_exactly_zero(has_head):
    inputs = batch_of()
    logits = logits_for(inputs, dtype=torch.float32)
    outputs = score(logits, inputs, has_head=has_head, reference=logits)
    assert all(outputs[name].kl.eq(0).all() for name in STREAMS)


@PATHS
def test_streams_are_found_in_the_order_of_the_stack(has_head):
    inputs = batch_of()
    logits = logits_for(inputs)
    turned = torch.cat([logits[4:], logits[:4]])
    ours = score(logits, inputs, has_head=has_head, entropy=("forget",))
    other = score(turned, inputs, STREAMS[::-1], has_head, entropy=("forget",))
    assert list(other) == list(STREAMS[::-1])
    for name in STREAMS:
        assert torch.equal(ours[name].logps, other[name].logps)
    assert torch.equal(ours["forget"].entropy, other["forget"].entropy)


@PATHS
@pytest.mark.parametrize("columns", [1, 60])
def test_padding_changes_nothing(columns, has_head):
    inputs = batch_of()
    logits = logits_for(inputs)
    wider, wider_logits = widened(inputs, logits, columns)
    ours = score(logits, inputs, has_head=has_head, reference=logits + 1e-3 * logits**2, entropy=STREAMS)
    padded = score(
        wider_logits, wider, has_head=has_head, reference=wider_logits + 1e-3 * wider_logits**2, entropy=STREAMS
    )
    for name in STREAMS:
        width = ours[name].logps.shape[1]
        for values in ("logps", "kl", "entropy"):
            assert torch.equal(getattr(padded[name], values)[:, :width], getattr(ours[name], values))
            assert getattr(padded[name], values)[:, width:].eq(0).all()
        assert not padded[name].mask[:, width:].any()
        # A longer row of zeros is added up in another order: the last bit may differ.
        for method in ("sequence_logps", "mean_logps"):
            torch.testing.assert_close(
                getattr(padded[name], method)(), getattr(ours[name], method)(), rtol=1e-14, atol=0
            )
        # Token weights are float32, and so is their sum.
        torch.testing.assert_close(counts(wider[name]), counts(inputs[name]), rtol=1e-6, atol=0)


@PATHS
def test_a_wider_neighbor_stream_changes_nothing(has_head):
    """The forget stream is stacked beside the longer retain stream, or stands alone."""
    inputs = batch_of()
    logits = logits_for(inputs)
    together = score(logits, inputs, has_head=has_head)["forget"]
    alone = score(logits[:4, :9], inputs, ("forget",), has_head)["forget"]
    assert torch.equal(together.logps, alone.logps)


def test_sequence_and_mean_logps_by_hand():
    """Uniform logits give -ln V a token, so a sum is -ln V times the weights, and a mean -ln V whatever they are."""
    inputs = batch_of()
    outputs = score(logits_for(inputs) * 0, inputs, entropy=STREAMS)
    each = -torch.log(torch.tensor(V, dtype=torch.float64))
    for name in STREAMS:
        mask = inputs[name]["labels"][:, 1:] != IGNORED
        size = (mask * inputs[name]["weights"][:, 1:] if "weights" in inputs[name] else mask).sum(-1).double()
        # The weights are float32.
        torch.testing.assert_close(outputs[name].sequence_logps(), each * size, rtol=1e-6, atol=0)
        means = outputs[name].mean_logps()
        torch.testing.assert_close(means[:-1], each.expand(len(means) - 1), rtol=1e-6, atol=0)
        torch.testing.assert_close(outputs[name].entropy, -each * mask)
        assert means[-1] == 0
        assert outputs[name].sequence_logps()[-1] == 0


def test_counts_leave_filler_rows_and_uncounted_tokens_out():
    inputs = batch_of()
    for name in STREAMS:
        labels = inputs[name]["labels"][:, 1:]
        mask = labels != IGNORED
        tokens = sum(
            float(inputs[name]["weights"][number, place + 1]) if "weights" in inputs[name] else 1.0
            for number, place in mask.nonzero().tolist()
        )
        found = counts(inputs[name])
        assert found.dtype == torch.float64
        assert found.tolist() == pytest.approx([len(LENGTHS[name]), tokens], rel=1e-6)
        assert torch.equal(StreamOutput.blank(inputs[name]).counts(), found)
    assert counts(UnlearnCollator().pad([filler(), filler()])).tolist() == [0, 0]


def test_a_blank_output_is_zeros_without_a_gradient_in_the_right_places():
    inputs = batch_of()
    scored = score(logits_for(inputs), inputs)
    for name in STREAMS:
        blank = StreamOutput.blank(inputs[name])
        assert blank.logps.eq(0).all() and not blank.logps.requires_grad and blank.kl is None
        assert torch.equal(blank.mask, scored[name].mask)
        assert blank.logps.shape == scored[name].logps.shape


@PATHS
def test_the_first_token_never_counts(has_head):
    """Nothing predicts it: a row whose only label is the first one contributes no sequence and no token."""
    stream = UnlearnCollator().pad([{"input_ids": [4, 5], "labels": [4, IGNORED]}])
    assert counts(stream).tolist() == [0, 0]
    output = score(torch.randn(1, 2, V), {"forget": stream}, ("forget",), has_head)["forget"]
    assert output.logps.tolist() == [[0.0]]
    assert output.mask.tolist() == [[False]]


@PATHS
def test_a_batch_of_fillers_alone_keeps_the_graph(has_head):
    """A process whose rows are all fillers must have gradients, zeros, like every other: they are averaged."""
    stream = UnlearnCollator().pad([filler(), filler()])
    logits = torch.randn(2, 2, V).requires_grad_()
    output = score(logits, {"forget": stream}, ("forget",), has_head, reference=logits.detach())["forget"]
    (output.logps.sum() + output.kl.sum()).backward()
    assert logits.grad.eq(0).all()


@PATHS
@pytest.mark.parametrize("linear", [(), ("retain",)])
def test_gradients_reach_the_logits_that_predict_a_counted_token_and_no_other(linear, has_head):
    inputs = batch_of()
    logits = logits_for(inputs).requires_grad_()
    outputs = score(logits, inputs, has_head=has_head, linear=linear)
    sum(output.sequence_logps().sum() for output in outputs.values()).backward()
    expected = torch.zeros(logits.shape, dtype=torch.float64)
    places = {"forget": 0, "retain": len(inputs["forget"]["labels"])}
    for name, number, slot, label, predicted in naive(logits.detach(), inputs):
        weight = inputs[name]["weights"][number, slot + 1] if "weights" in inputs[name] else 1.0
        onehot = torch.nn.functional.one_hot(torch.tensor(label), V)
        expected[places[name] + number, slot] = weight * (onehot - predicted.softmax(0))
    # d log p_y / d logits = onehot(y) - p, in float64 by two formulas.
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-12)
    touched = torch.zeros(logits.shape[:2], dtype=torch.bool)
    for name in STREAMS:
        mask = outputs[name].mask
        touched[places[name] : places[name] + len(mask), : mask.shape[1]] = mask
    assert torch.equal(logits.grad.abs().sum(-1) > 0, touched)


@PATHS
def test_bfloat16_logits_give_float32_logps(has_head):
    inputs = batch_of()
    logits = logits_for(inputs, dtype=torch.bfloat16)
    ours = score(logits, inputs, has_head=has_head, entropy=STREAMS)
    full = score(logits.float(), inputs, has_head=has_head, entropy=STREAMS)
    for name in STREAMS:
        assert ours[name].logps.dtype == torch.float32
        assert torch.equal(ours[name].logps, full[name].logps)
        assert torch.equal(ours[name].entropy, full[name].entropy)


def test_scatter_and_wide_dtype():
    mask = torch.tensor([[True, False], [True, True]])
    assert head.scatter(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [[1.0, 0.0], [2.0, 3.0]]
    assert head.wide_dtype(torch.device("cpu")) == torch.float64
    assert head.wide_dtype(torch.device("mps")) == torch.float32
