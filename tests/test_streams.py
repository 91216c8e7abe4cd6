"""Streams and their batches: padding that changes nothing, fillers that count for nothing, streams kept apart."""

import pytest

from llm_unlearn.data.plan import FILLER, BatchPlan
from llm_unlearn.data.streams import UnlearnCollator, UnlearnDataset, pad_id
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.errors import UserError

EOS = 2
LONG = {"input_ids": [5, EOS, 7, EOS], "labels": [IGNORED, EOS, 7, EOS]}
SHORT = {"input_ids": [8, EOS], "labels": [IGNORED, EOS]}


def test_padding_by_hand():
    batch = UnlearnCollator(pad_token_id=9).pad([{**SHORT, "index": 4}, {**LONG, "index": 0}])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[8, EOS, 9, 9], [5, EOS, 7, EOS]],
        "attention_mask": [[1, 1, 0, 0], [1, 1, 1, 1]],
        "labels": [[IGNORED, EOS, IGNORED, IGNORED], [IGNORED, EOS, 7, EOS]],
        "index": [4, 0],
    }
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.int64"}


@pytest.mark.parametrize("pad", [0, EOS, 8])
def test_the_attention_mask_comes_from_the_lengths(pad):
    """Also where the pad id occurs in the rows: an end of sequence stays visible and keeps its label."""
    batch = UnlearnCollator(pad).pad([SHORT, LONG])
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, EOS, IGNORED, IGNORED], [IGNORED, EOS, 7, EOS]]
    assert batch["input_ids"][0].tolist() == [8, EOS, pad, pad]


@pytest.mark.parametrize(("multiple", "width"), [(1, 4), (2, 4), (3, 6), (4, 4), (8, 8)])
def test_pad_multiple(multiple, width):
    batch = UnlearnCollator(0, multiple).pad([SHORT, LONG])
    assert all(batch[column].shape == (2, width) for column in ("input_ids", "attention_mask", "labels"))
    assert batch["attention_mask"].sum().item() == 6
    assert (batch["labels"] != IGNORED).sum().item() == 4


def test_weights_are_padded_with_zero_and_default_to_one():
    assert "weights" not in UnlearnCollator().pad([SHORT, LONG])
    batch = UnlearnCollator().pad([{**SHORT, "weights": [0.0, 0.25]}, LONG])
    assert batch["weights"].tolist() == [[0.0, 0.25, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    assert str(batch["weights"].dtype) == "torch.float32"


def test_rows_without_a_number_have_the_filler_number():
    assert UnlearnCollator().pad([SHORT])["index"].tolist() == [FILLER]


def test_streams_are_kept_apart_and_padded_apart():
    dataset = UnlearnDataset({"forget": [SHORT, LONG], "retain": [SHORT]})
    keys = [("forget", 0), ("forget", FILLER), ("retain", 0), ("retain", FILLER), ("forget", 1)]
    batch = UnlearnCollator().__call__([dataset[key] for key in keys])
    assert list(batch) == ["forget", "retain"]
    assert batch["forget"]["index"].tolist() == [0, FILLER, 1]
    assert batch["retain"]["index"].tolist() == [0, FILLER]
    assert batch["forget"]["input_ids"].shape == (3, 4)
    assert batch["retain"]["input_ids"].shape == (2, 2)


def test_fillers_have_no_label_that_counts():
    dataset = UnlearnDataset({"forget": [LONG], "retain": [{**SHORT, "weights": [1.0, 1.0]}]})
    for stream in dataset.streams:
        filler = dataset[stream, FILLER]
        assert filler["index"] == FILLER
        assert filler["stream"] == stream
        assert set(filler["labels"]) == {IGNORED}
        # Two tokens, so that a model has a prediction to make; a token of the vocabulary, so that it can be embedded.
        assert filler["input_ids"] == [dataset.streams[stream][0]["input_ids"][0]] * 2
    batch = UnlearnCollator()([dataset["retain", FILLER], dataset["retain", 0]])["retain"]
    assert (batch["labels"][0] == IGNORED).all()
    assert batch["attention_mask"][0].sum() == 2


def test_rows_carry_stream_and_number_and_keep_their_columns():
    dataset = UnlearnDataset({"forget": [SHORT, {**LONG, "relabeled": True}]})
    assert dataset["forget", 1] == {"stream": "forget", "index": 1, **LONG, "relabeled": True}
    assert dataset["forget", 0] == {"stream": "forget", "index": 0, **SHORT}


def test_sizes_and_tokens_that_count():
    """The first label never counts, because nothing predicts the first token."""
    text = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    dataset = UnlearnDataset({"forget": [SHORT, LONG, text], "retain": [SHORT]})
    assert dataset.sizes == {"forget": 3, "retain": 1}
    assert dataset.num_tokens() == {"forget": 1 + 3 + 2, "retain": 1}
    assert len(dataset) == 3


def test_from_rows_names_the_stream_that_cannot_be_tokenized(demo_tokenizer):
    rows = {"forget": [{"question": "Who?", "answer": "Nobody."}], "retain": [{"text": "A text of some length."}]}
    dataset = UnlearnDataset.from_rows(rows, demo_tokenizer)
    assert dataset.sizes == {"forget": 1, "retain": 1}
    assert dataset.streams["retain"][0]["labels"] == dataset.streams["retain"][0]["input_ids"]
    with pytest.raises(UserError, match="the retain set is empty"):
        UnlearnDataset.from_rows({**rows, "retain": []}, demo_tokenizer)


def test_a_loader_over_the_plan_yields_every_row_once():
    import torch

    rows = [{"input_ids": [n + 1] * (n + 2), "labels": [n + 1] * (n + 2)} for n in range(5)]
    dataset = UnlearnDataset({"forget": rows, "retain": rows[:2]})
    plan = BatchPlan(dataset.sizes, 0, 2)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=plan, collate_fn=UnlearnCollator())
    batches = list(loader)
    numbers = [number for batch in batches for number in batch["forget"]["index"].tolist()]
    assert sorted(numbers) == [FILLER, 0, 1, 2, 3, 4]
    for batch in batches:
        for part in batch.values():
            for number, ids, mask in zip(part["index"], part["input_ids"], part["attention_mask"], strict=True):
                if number != FILLER:
                    assert ids[mask.bool()].tolist() == rows[number]["input_ids"]


@pytest.mark.parametrize(
    ("pad", "eos", "expected"), [(0, EOS, 0), (7, EOS, 7), (None, EOS, EOS), (None, 0, 0), (None, None, 0)]
)
def test_pad_id(pad, eos, expected):
    class Tokenizer:
        pad_token_id, eos_token_id = pad, eos

    assert pad_id(Tokenizer) == expected
