"""From a stacked forward back to streams: against a naive loop, indifferent to padding, and what counts."""

import pytest
import torch

from llm_unlearn.data.plan import FILLER
from llm_unlearn.data.streams import UnlearnCollator
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.head import concatenate, counts, split_outputs

# Shapes: B sequences, T tokens, V vocabulary, N counted positions.

V = 31
LENGTHS = {"forget": (9, 3, 6), "retain": (14, 2, 11, 5)}
STREAMS = tuple(LENGTHS)


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


def test_split_outputs_agrees_with_a_naive_loop():
    inputs = batch_of()
    logits = logits_for(inputs)
    outputs = split_outputs(logits, inputs, STREAMS, keep_logits=("retain",))
    expected = {name: torch.zeros(inputs[name]["labels"][:, 1:].shape, dtype=torch.float64) for name in STREAMS}
    masks = {name: torch.zeros(values.shape, dtype=torch.bool) for name, values in expected.items()}
    kept = []
    for name, number, slot, label, predicted in naive(logits, inputs):
        expected[name][number, slot] = predicted[label] - torch.logsumexp(predicted, 0)
        masks[name][number, slot] = True
        kept += [predicted] if name == "retain" else []
    for name in STREAMS:
        # float64: two formulas of the same log-softmax.
        torch.testing.assert_close(outputs[name].logps, expected[name], rtol=1e-12, atol=1e-12)
        assert torch.equal(outputs[name].mask, masks[name])
    assert outputs["forget"].logits is None
    assert torch.equal(outputs["retain"].logits, torch.stack(kept))
    assert outputs["forget"].weights is None
    assert torch.equal(outputs["retain"].weights, inputs["retain"]["weights"][:, 1:])


def test_streams_are_found_in_the_order_of_the_stack():
    inputs = batch_of()
    logits = logits_for(inputs)
    turned = torch.cat([logits[4:], logits[:4]])
    ours, other = split_outputs(logits, inputs, STREAMS), split_outputs(turned, inputs, STREAMS[::-1])
    for name in STREAMS:
        assert torch.equal(ours[name].logps, other[name].logps)


@pytest.mark.parametrize("columns", [1, 60])
def test_padding_changes_nothing(columns):
    inputs = batch_of()
    logits = logits_for(inputs)
    wider, wider_logits = widened(inputs, logits, columns)
    ours = split_outputs(logits, inputs, STREAMS, keep_logits=STREAMS)
    padded = split_outputs(wider_logits, wider, STREAMS, keep_logits=STREAMS)
    for name in STREAMS:
        width = ours[name].logps.shape[1]
        assert torch.equal(padded[name].logps[:, :width], ours[name].logps)
        assert padded[name].logps[:, width:].eq(0).all()
        assert not padded[name].mask[:, width:].any()
        assert torch.equal(padded[name].logits, ours[name].logits)
        # A longer row of zeros is added up in another order: the last bit may differ.
        for method in ("sequence_logps", "mean_logps"):
            torch.testing.assert_close(
                getattr(padded[name], method)(), getattr(ours[name], method)(), rtol=1e-14, atol=0
            )
        # Token weights are float32, and so is their sum.
        torch.testing.assert_close(counts(wider[name]), counts(inputs[name]), rtol=1e-6, atol=0)


def test_a_wider_neighbor_stream_changes_nothing():
    """The forget stream is stacked beside the longer retain stream, or stands alone."""
    inputs = batch_of()
    logits = logits_for(inputs)
    together = split_outputs(logits, inputs, STREAMS)["forget"]
    alone = split_outputs(logits[:4, :9], inputs, ("forget",))["forget"]
    assert torch.equal(together.logps, alone.logps)


def test_sequence_and_mean_logps_by_hand():
    """Uniform logits give -ln V a token, so a sum is -ln V times the weights, and a mean -ln V whatever they are."""
    inputs = batch_of()
    logits = logits_for(inputs) * 0
    outputs = split_outputs(logits, inputs, STREAMS)
    each = -torch.log(torch.tensor(V, dtype=torch.float64))
    for name in STREAMS:
        mask = inputs[name]["labels"][:, 1:] != IGNORED
        size = (mask * inputs[name]["weights"][:, 1:] if "weights" in inputs[name] else mask).sum(-1).double()
        # The weights are float32.
        torch.testing.assert_close(outputs[name].sequence_logps(), each * size, rtol=1e-6, atol=0)
        means = outputs[name].mean_logps()
        torch.testing.assert_close(means[:-1], each.expand(len(means) - 1), rtol=1e-6, atol=0)
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
    assert counts(UnlearnCollator().pad([filler(), filler()])).tolist() == [0, 0]


def test_the_first_token_never_counts():
    """Nothing predicts it: a row whose only label is the first one contributes no sequence and no token."""
    stream = UnlearnCollator().pad([{"input_ids": [4, 5], "labels": [4, IGNORED]}])
    assert counts(stream).tolist() == [0, 0]
    output = split_outputs(torch.randn(1, 2, V), {"forget": stream}, ("forget",))["forget"]
    assert output.logps.tolist() == [[0.0]]
    assert output.mask.tolist() == [[False]]


def test_kl_from_puts_each_divergence_where_its_token_stands():
    inputs = batch_of()
    logits, ref_logits = logits_for(inputs), logits_for(inputs, seed=1)
    ours = split_outputs(logits, inputs, STREAMS, keep_logits=STREAMS)
    reference = split_outputs(ref_logits, inputs, STREAMS, keep_logits=STREAMS)
    expected = {name: torch.zeros(inputs[name]["labels"][:, 1:].shape, dtype=torch.float64) for name in STREAMS}
    rows = zip(naive(logits, inputs), naive(ref_logits, inputs), strict=True)
    for (name, number, slot, _, predicted), (*_, ref_predicted) in rows:
        log_p, log_r = predicted.log_softmax(0), ref_predicted.log_softmax(0)
        expected[name][number, slot] = (log_r.exp() * (log_r - log_p)).sum()
    for name in STREAMS:
        kl = ours[name].kl_from(reference[name])
        torch.testing.assert_close(kl, expected[name], rtol=1e-10, atol=1e-12)
        assert kl[~ours[name].mask].eq(0).all()
        assert kl[ours[name].mask].gt(0).all()
        assert ours[name].kl_from(ours[name]).eq(0).all()


def test_gradients_reach_the_logits_that_predict_a_counted_token_and_no_other():
    inputs = batch_of()
    logits = logits_for(inputs).requires_grad_()
    outputs = split_outputs(logits, inputs, STREAMS)
    sum(outputs[name].logps.sum() for name in STREAMS).backward()
    touched = torch.zeros(logits.shape[:2], dtype=torch.bool)
    first = 0
    for name in STREAMS:
        mask = outputs[name].mask
        touched[first : first + len(mask), : mask.shape[1]] = mask
        first += len(mask)
    assert torch.equal(logits.grad.abs().sum(-1) > 0, touched)


def test_bfloat16_logits_give_float32_logps():
    inputs = batch_of()
    logits = logits_for(inputs, dtype=torch.bfloat16)
    ours = split_outputs(logits, inputs, STREAMS)
    full = split_outputs(logits.float(), inputs, STREAMS)
    for name in STREAMS:
        assert ours[name].logps.dtype == torch.float32
        assert torch.equal(ours[name].logps, full[name].logps)
