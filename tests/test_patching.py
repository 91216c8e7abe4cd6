"""Activation patching: depth scores of models known by construction, and the arithmetic worked out by hand."""

import numpy as np
import pytest
import torch
from tiny_architectures import make_model
from white_box_world import BOUNDS, KNOWN, knowing, make_identity, make_lively, own_logps, random_rows, redrawn

from llm_unlearn.activations import capture, run_from_layer
from llm_unlearn.attacks.answer_states import Bounds
from llm_unlearn.attacks.patching import depth_metrics, patching_drops, unlearning_depth
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError


def drops(target, source, bounds=BOUNDS, **rows):
    return patching_drops(target, source, random_rows(**rows), bounds)


class TestKnownModels:
    """Block 1 of the target writes the answer; every other block of every model does nothing."""

    def test_gold_lacks_it_from_the_layer_that_writes_it(self):
        """Below block 1 the target writes it itself; from block 1 on what gold hands on lacks it, all the same way."""
        found = drops(knowing({1: 1}), knowing({}), answer=KNOWN)
        assert np.abs(found[:, 0]).max() == 0
        assert (found[:, 1:] > 0.3).all()
        assert np.allclose(found[:, 1:], found[:, 1:2], rtol=1e-4)

    def test_taken_back_two_layers_later_it_is_half_erased(self):
        """Block 3 takes back what block 1 wrote: layers 1 and 2 still hold it, 3 and 4 do not. Each weighs the same:
        (0 + 0 + 1 + 1) / 4."""
        target, gold = knowing({1: 1}), knowing({})
        found, of_gold = (drops(target, model, answer=KNOWN) for model in (knowing({1: 1, 3: -1}), gold))
        depth = unlearning_depth(found, of_gold)
        assert depth.score == pytest.approx(0.5, abs=1e-3)
        assert depth.by_layer[1:].tolist() == pytest.approx([0, 0, 1, 1], abs=1e-3)
        assert np.isnan(depth.by_layer[0]) and depth.counts.tolist() == [0, 6, 6, 6, 6]

    def test_where_it_was_never_written_all_is_erased(self):
        """The unlearned model writes something else in the other direction: worse than gold counts as gold."""
        target, gold = knowing({1: 1}), knowing({})
        found, of_gold = (drops(target, model, answer=KNOWN) for model in (knowing({1: -1}), gold))
        assert (found[:, 1:] > of_gold[:, 1:]).all()
        assert unlearning_depth(found, of_gold).score == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_the_target_has_0_and_gold_has_1(name):
    target = make_lively(name)
    gold = redrawn(target, 2)
    of_gold, of_target = drops(target, gold), drops(target, target)
    assert np.array_equal(of_target, np.zeros((6, 5)))
    assert np.array_equal(of_gold[:, :2], np.zeros((6, 2))) and np.abs(of_gold[:, 2:]).min() > 0
    assert unlearning_depth(of_target, of_gold, threshold=0).score == 0
    assert unlearning_depth(of_gold, of_gold, threshold=0).score == 1


def test_at_the_last_layer_the_target_says_what_the_source_does():
    """They share norm and head, so that the drop is the difference of their own log-probabilities."""
    target = make_lively()
    source, rows = redrawn(target, 1), random_rows()
    found = patching_drops(target, source, rows, BOUNDS)[:, -1]
    own = [float(own_logps(target, row)[0].mean() - own_logps(source, row)[0].mean()) for row in rows]
    assert found == pytest.approx(own, abs=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_block_that_does_nothing_patches_like_the_layer_below(name):
    target = make_lively(name)
    make_identity(target, name, 2)
    found = drops(target, redrawn(target, 0))
    assert np.allclose(found[:, 2], found[:, 1], atol=1e-5) and not np.allclose(found[:, 3], found[:, 2], atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_only_what_predicts_the_answer_is_replaced(name):
    """The same by resuming the target from hidden states that are put together by hand, one row at a time."""
    target = make_lively(name)
    source, rows = redrawn(target, 0), random_rows()
    found = patching_drops(target, source, rows, BOUNDS)
    for number, row in enumerate(rows):
        ids, scored = torch.tensor([row.sequences[0].ids]), torch.tensor(row.sequences[0].scored)
        places, states, head = scored - 1, [], target.get_output_embeddings()
        norm = target.model.norm if name == "llama" else target.gpt_neox.final_layer_norm
        with torch.no_grad():
            for model in (target, source):
                with capture(*decoder_layers(model)) as hidden:
                    model(input_ids=ids, use_cache=False)
                states.append(list(hidden))
            for layer in range(4):
                mixed = states[0][layer].clone()
                mixed[0, places] = states[1][layer][0, places]
                last, elsewhere = (run_from_layer(target, given, layer + 1, 4) for given in (mixed, states[1][layer]))
                # Where it is replaced matters: otherwise this test could not fail.
                assert not torch.allclose(last[0, places], elsewhere[0, places], atol=0.1)
                logps = head(norm(last))[0, places].log_softmax(-1).gather(-1, ids[0, scored][:, None])[:, 0]
                expected = float((own_logps(target, row)[0] - logps).mean())
                assert found[number, layer] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("bounds", [Bounds(0, pad_columns=5), Bounds(95, max_sequences=1)])
def test_padding_and_batches_change_nothing(bounds):
    target = make_lively()
    source = redrawn(target, 1)
    assert np.allclose(drops(target, source), drops(target, source, bounds), atol=1e-5)


def test_a_bfloat16_model_is_patched_into_a_float32_target():
    target = make_lively()
    source = redrawn(target, 1)
    assert np.allclose(drops(target, source), drops(target, source.to(torch.bfloat16)), atol=0.05)


def test_no_hook_is_left_behind():
    target = make_lively()
    patching_drops(target, redrawn(target, 1), random_rows(), BOUNDS)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder_layers(target))


@pytest.mark.parametrize(
    ("source", "named"), [("gpt2", "a gpt2 of 5 layers"), ({"num_hidden_layers": 4}, "a llama of 4 layers of size 32")]
)
def test_models_of_another_shape_are_refused(source, named):
    other = make_model(source) if isinstance(source, str) else make_model(**source)
    with pytest.raises(UserError, match=named):
        drops(make_lively(), other.eval())


class TestArithmetic:
    def test_by_hand(self):
        """tau = .05. Row 0: layers 0 (.04) and 1 (.05) do not exceed it; .2 and .8 do. Of them .1 and .9, clipped to
        .8, are lost: (.1 + .8) / 1. Row 1: layer 3 alone counts, .4 of it; a gain (-1) is no loss: 0 / .4."""
        gold = np.array([[0.04, 0.05, 0.2, 0.8], [0.0, -0.3, 0.01, 0.4]])
        found = np.array([[9.0, 9.0, 0.1, 0.9], [9.0, 9.0, 9.0, -1.0]])
        depth = unlearning_depth(found, gold)
        assert depth.by_row.tolist() == pytest.approx([0.9, 0.0])
        assert depth.score == pytest.approx(0.45)
        assert depth.counts.tolist() == [0, 0, 1, 2]
        assert np.isnan(depth.by_layer[:2]).all()
        assert depth.by_layer[2:].tolist() == pytest.approx([0.5, 0.8 / 1.2])
        metric = depth_metrics(depth)["uds/forget"]
        assert (metric.value, metric.n, metric.direction) == (pytest.approx(0.45), 2, "higher")
        assert metric.stderr == pytest.approx(0.45 / 2**0.5, rel=0.1)

    def test_a_row_of_which_gold_knows_as_much_does_not_count(self):
        depth = unlearning_depth(np.array([[1.0, 1.0], [0.1, 0.1]]), np.array([[0.0, 0.0], [0.1, 0.2]]))
        assert np.isnan(depth.by_row[0]) and depth.score == pytest.approx(0.2 / 0.3)
        assert depth_metrics(depth)["uds/forget"].n == 1 and depth.stderr is None

    def test_where_no_row_counts_it_is_null_with_the_reason(self):
        metric = depth_metrics(unlearning_depth(np.ones((2, 3)), np.zeros((2, 3))))["uds/forget"]
        assert metric.value is None and "0.05 nats" in metric.reason
