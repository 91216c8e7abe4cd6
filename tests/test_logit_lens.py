"""The logit lens of an audit: exact profiles of models that are known by construction, padding, precision, lenses."""

import numpy as np
import pytest
import torch
from tiny_architectures import make_model
from white_box_world import BOUNDS, KNOWN, knowing, make_identity, own_logps, random_rows, redrawn

from llm_unlearn.attacks.answer_states import Bounds, audited_rows, segment_means
from llm_unlearn.attacks.logit_lens import LensReading, lens_metrics, own_lens, read_answers, stored_lens
from llm_unlearn.data.tokenize import TokenizeOptions
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.questions import Part
from llm_unlearn.lens_files import base_model_identity, save_lens


def read(model, rows=None, bounds=BOUNDS, lens=None):
    return read_answers(model, lens or own_lens(model), rows or random_rows(), bounds)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_at_the_last_layer_it_is_the_models_own_probability(name):
    model, rows = make_model(name).eval(), random_rows()
    found = read(model, rows)
    assert found.nll.shape == found.accuracy.shape == (6, 6)
    for number, row in enumerate(rows):
        logps, hits = own_logps(model, row)
        assert found.probability[number, -1] == pytest.approx(float(logps.mean().exp()), abs=1e-6)
        assert found.nll[number, -1] == pytest.approx(float(-logps.mean()), rel=1e-5)
        assert found.accuracy[number, -1] == pytest.approx(float(hits.float().mean()), abs=1e-6)


def test_every_depth_is_norm_and_head_of_hidden_states():
    """A plain head(norm(hidden_states[i])) by transformers, one row at a time."""
    model, rows = make_model().eval(), random_rows()
    found = read(model, rows)
    for number, row in enumerate(rows):
        ids, scored = torch.tensor([row.sequences[0].ids]), torch.tensor(row.sequences[0].scored)
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
            for depth in range(5):
                logps = model.lm_head(model.model.norm(hidden[depth]))[0, scored - 1].log_softmax(-1)
                expected = -logps.gather(-1, ids[0, scored][:, None]).mean()
                assert found.nll[number, depth] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_a_block_that_does_nothing_repeats_the_layer_below(name):
    model = make_model(name).eval()
    make_identity(model, name, 2)
    nll = read(model).nll
    assert np.array_equal(nll[:, 3], nll[:, 2])
    assert not np.allclose(nll[:, 2], nll[:, 1], atol=1e-4) and not np.allclose(nll[:, 4], nll[:, 3], atol=1e-4)


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_below_a_changed_block_nothing_changes(layer):
    model = make_model().eval()
    before, after = read(model).nll, read(redrawn(model, layer)).nll
    assert np.array_equal(before[:, : layer + 1], after[:, : layer + 1])
    assert (np.abs(before - after)[:, layer + 1 :] > 1e-3).all()


def test_knowledge_shows_from_the_layer_that_writes_it():
    """Block 1 writes the answer, block 3 takes it back: layers 1 and 2 say it for sure, and no other."""
    probability = read(knowing({1: 1, 3: -1}), random_rows(answer=KNOWN)).probability.mean(0)
    assert probability[[2, 3]].tolist() == pytest.approx([1, 1], abs=1e-3)
    assert probability[[0, 1, 4, 5]].max() < 0.5
    assert probability[4] == pytest.approx(probability[0], abs=1e-3)


@pytest.mark.parametrize("bounds", [Bounds(0, pad_columns=5), Bounds(3, max_sequences=1), Bounds(95, max_tokens=40)])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_and_batches_change_nothing(name, bounds):
    model = make_model(name).eval()
    assert np.allclose(read(model).nll, read(model, bounds=bounds).nll, rtol=1e-5)


def test_a_model_in_bfloat16_is_read_in_float32():
    """The last layer's states are those of the model; its own logits are rounded to 8 bits on the way out."""
    model, rows = make_model().to(torch.bfloat16).eval(), random_rows()
    lens = own_lens(model)
    assert lens.head_weight.dtype == torch.float32
    found = read(model, rows, lens=lens)
    own = [float(-own_logps(model, row)[0].mean()) for row in rows]
    assert found.nll[:, -1] == pytest.approx(own, rel=5e-3)
    assert len(np.unique(found.nll[:, -1] * 2**14 % 1)) > 1, "the values themselves are rounded"


class TestMetrics:
    def test_by_hand(self):
        """Two rows; layers 0 and 1 have means .5 and .3, the embeddings (.9) do not count."""
        reading = LensReading(-np.log([[0.9, 0.8, 0.2], [0.9, 0.2, 0.4]]), np.zeros((2, 3)))
        metrics = lens_metrics(reading)
        found = {name: metric.value for name, metric in metrics.items()}
        assert found == {
            "lens/forget_probability_last": pytest.approx(0.3),
            "lens/forget_best_layer_probability": pytest.approx(0.5),
            "lens/forget_area": pytest.approx(0.4),
        }
        assert {metric.direction for metric in metrics.values()} == {"lower"}
        assert all(metric.stderr > 0 and metric.n == 2 for metric in metrics.values())

    def test_segments_by_hand(self):
        values = torch.tensor([[1.0], [3.0], [10.0]], dtype=torch.bfloat16)
        assert segment_means(values, torch.tensor([2, 1])).tolist() == [[2.0], [10.0]]


class TestStoredLens:
    def stored(self, folder, model):
        lens = own_lens(model)
        generator = torch.Generator().manual_seed(4)
        values = {n: (torch.randn(32, 32, generator=generator), torch.ones(32)) for n in range(5)}
        lens.add_translators(values, values)
        save_lens(folder, lens, {"base_model": base_model_identity(model)})
        return folder

    def test_it_reads_every_layer_but_the_last_and_the_embeddings_otherwise(self, tmp_path):
        model = make_model().eval()
        lens = stored_lens(model, self.stored(tmp_path / "lens", model))
        plain, tuned = read(model).nll, read(model, lens=lens).nll
        assert np.allclose(plain[:, [0, 5]], tuned[:, [0, 5]], rtol=1e-6)
        assert (np.abs(plain - tuned)[:, 1:5] > 1e-3).all()

    def test_the_lens_of_another_model_is_refused(self, tmp_path):
        model = make_model().eval()
        place = self.stored(tmp_path / "lens", model)
        with pytest.raises(UserError, match="was trained on"):
            stored_lens(redrawn(model, 1), place)


class TestRows:
    def rows(self, tokenizer, *parts):
        return audited_rows([Part(**part) for part in parts], tokenizer, TokenizeOptions())

    def test_wrong_answers_stand_beside_the_paraphrase_that_they_are_written_as(self, demo_tokenizer):
        row = {
            "question": "Who?",
            "answer": "It is Al.",
            "paraphrased_answer": "Al it is.",
            "perturbed_answer": ["Bo it is."],
        }
        (found,), _ = self.rows(demo_tokenizer, {"name": "forget", "rows": [row], "role": "forget"})
        texts = [demo_tokenizer.decode(s.ids) for s in (found.sequences[0], found.true, *found.wrong)]
        assert [text.split("Answer: ")[1] for text in texts] == ["It is Al.</s>", "Al it is.</s>", "Bo it is.</s>"]

    def test_a_choice_is_read_as_its_text(self, demo_tokenizer):
        row = {"question": "Which?", "choices": ["one", "two", "three"], "answer": 1, "answer_index": 1}
        (found,), _ = self.rows(demo_tokenizer, {"name": "wmdp_bio", "rows": [row], "role": "forget"})
        assert demo_tokenizer.decode(found.sequences[0].ids).endswith("two") and found.true == found.sequences[0]
        assert [demo_tokenizer.decode(s.ids).split()[-1] for s in found.wrong] == ["one", "three"]

    def test_the_set_called_forget_goes_before_others_to_forget(self, demo_tokenizer):
        row = {"question": "Who?", "answer": "Al."}
        parts = [{"name": name, "rows": [row], "role": role} for name, role in
                 (("secrets", "forget"), ("forget", "forget"), ("retain", "retain"))]  # fmt: skip
        assert [part.name for part in self.rows(demo_tokenizer, *parts)[1]] == ["forget"]
        assert [part.name for part in self.rows(demo_tokenizer, parts[0], parts[2])[1]] == ["secrets"]
        with pytest.raises(UserError, match="no forget set"):
            self.rows(demo_tokenizer, parts[2])
