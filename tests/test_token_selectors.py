"""What chooses tokens by score, by hand: the order statistic, the prototype, probes, autoencoders; and the flags."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_unlearn.data.selectors_probe import scores_of
from llm_unlearn.data.selectors_states import LinearProbe, SparseEncoder, latent_numbers, prototype
from llm_unlearn.data.token_selection import top_fraction
from llm_unlearn.errors import UserError
from llm_unlearn.methods.npo import NPOArguments
from llm_unlearn.training_arguments import UnlearnArguments

# ---- The highest scores ----


def test_top_fraction_by_hand():
    """Of ten scores .3 keeps three; what ties with the last of them stays too."""
    scores = torch.tensor([5.0, 1, 9, 7, 3, 8, 2, 0, 4, 6])
    assert top_fraction(scores, 0.3).nonzero().squeeze(-1).tolist() == [2, 3, 5]
    # 2.1 tokens are three; the least is one.
    assert int(top_fraction(scores, 0.21).sum()) == 3 and int(top_fraction(scores, 0.001).sum()) == 1
    ties = torch.tensor([0.0, 2, 1, 1, 0, 1, 0, 0, 0, 0])
    assert top_fraction(ties, 0.2).tolist() == [False, True, True, True, False, True, False, False, False, False]
    # One latent fires on one token: the other nine tie with the bound, and are below the least count.
    rare = torch.tensor([0.0] * 9 + [1.0])
    assert int(top_fraction(rare, 0.5).sum()) == 10 and int(top_fraction(rare, 0.5, least=1.0).sum()) == 1


def test_top_fraction_of_more_scores_than_torch_quantile_takes():
    scores = torch.arange(2**24 + 10, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(scores, 0.9)
    assert int(top_fraction(scores, 0.25).sum()) == math.ceil((2**24 + 10) / 4)


# ---- Prototype, probe, autoencoder ----


def test_prototype_by_hand():
    """The mean of (3, 0) and (0, 1) points to (3, 1) / sqrt 10; not the mean of directions, which is (1, 1)."""
    direction = prototype(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    assert direction.tolist() == pytest.approx([3 / math.sqrt(10), 1 / math.sqrt(10)], rel=1e-6)
    assert prototype(torch.zeros(1, 2)).tolist() == [0, 0]


def a_probe(weight=(1.0, -2.0), fingerprint="abc"):
    model = {"name": "some/model", "revision": None, "fingerprint": fingerprint}
    return LinearProbe(torch.tensor(weight), torch.tensor(0.5), 3, {"model": model})


def test_a_probe_comes_back(tmp_path):
    """(4, 1) has the logit 4 - 2 + 0.5."""
    a_probe().save(tmp_path / "p")
    probe = LinearProbe.load(tmp_path / "p")
    assert probe(torch.tensor([[4.0, 1.0]])).tolist() == [2.5] and probe.layer == 3
    assert set(load_file(tmp_path / "p/probe.safetensors")) == {"weight", "bias"} and len(probe.sha256) == 64
    probe.require_model("abc", 2)
    probe.require_model(None, 2)
    with pytest.raises(UserError, match=r"was trained on 'some/model' \(abc\), and this model is another \(xyz\)"):
        probe.require_model("xyz", 2)
    with pytest.raises(UserError, match="reads states of size 2, but the model's have 3"):
        probe.require_model("abc", 3)


def test_broken_probes(tmp_path):
    def load(message, **changes):
        a_probe().save(tmp_path / "p")
        config = json.loads((tmp_path / "p/config.json").read_text()) | changes
        (tmp_path / "p/config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=message):
            LinearProbe.load(tmp_path / "p")

    load("holds no linear probe of tokens", kind="transformer_probes")
    load("holds no linear probe of tokens", layer=None)
    with pytest.raises(UserError, match=r"is no folder of a probe; train one with utils/train_token_probe\.py"):
        LinearProbe.load(tmp_path / "nothing")
    a_probe().save(tmp_path / "p")
    save_file({"weight": torch.zeros(2, 2), "bias": torch.zeros(1)}, tmp_path / "p/probe.safetensors")
    with pytest.raises(UserError, match=r"must hold a weight \(D,\) and a bias"):
        LinearProbe.load(tmp_path / "p")
    (tmp_path / "p/probe.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="cannot be loaded"):
        LinearProbe.load(tmp_path / "p")


def test_scores_of_a_probe_by_hand():
    """3 of 4 called are right, 3 of 6 forget tokens are found, 4 of the 8 are right."""
    scores = scores_of(3, 1, 3, 1)
    assert scores == {"tokens": 8, "forget_tokens": 6, "accuracy": 0.5, "precision": 0.75, "recall": 0.5, "f1": 0.6}
    assert scores_of(0, 0, 2, 1)["precision"] is None and scores_of(0, 0, 2, 1)["f1"] == 0
    assert scores_of(0, 0, 0, 3)["recall"] is None and scores_of(0, 0, 0, 3)["f1"] is None


def write_sae(folder, config=None, **tensors):
    """Write an autoencoder of three latents on two dimensions: x, y and -x; returns its folder."""
    folder.mkdir(exist_ok=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    tensors = {"encoder.weight": weight, "encoder.bias": torch.tensor([0.0, -1.0, 0.0]), **tensors}
    save_file({name: part for name, part in tensors.items() if part is not None}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": 1} if config is None else config), encoding="utf-8")
    return folder


def test_latents_by_hand(tmp_path):
    """(3, 2): latents 3, 1, 0. (1, 4): 1, 3, 0. (-2, 0): 0, 0, 2. (0, 0): none above 0."""
    states = torch.tensor([[3.0, 2.0], [1.0, 4.0], [-2.0, 0.0], [0.0, 0.0]])
    top_one = SparseEncoder.load(write_sae(tmp_path / "a"), layer=5)
    assert top_one.layer == 5 and top_one.num_latents == 3
    assert top_one.counts(states, [0]).tolist() == [1, 0, 0, 0]
    assert top_one.counts(states, [0, 1, 2]).tolist() == [1, 1, 1, 0]
    top_two = SparseEncoder.load(write_sae(tmp_path / "b", {"k": 2, "layer": 7}))
    assert top_two.layer == 7
    # A latent at 0 is among the two largest of the third token, and does not fire.
    assert top_two.counts(states, [0, 1]).tolist() == [2, 2, 0, 0]
    assert top_two.counts(states[:0], [0]).shape == (0,)
    shifted = SparseEncoder.load(write_sae(tmp_path / "c", b_dec=torch.tensor([5.0, 0.0])) / "sae.safetensors", 0)
    # Less 5 in x, -x is the largest everywhere: 2, 4, 7 and 5 against 1, 3, 0 and 0.
    assert shifted.counts(states, [2]).tolist() == [1, 1, 1, 1]
    with pytest.raises(UserError, match="reads states of size 2, but the model's have 8"):
        shifted.require_size(8)


def test_latents_in_chunks_are_the_same(tmp_path, monkeypatch):
    encoder = SparseEncoder.load(write_sae(tmp_path / "a"), layer=5)
    states = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    whole = encoder.counts(states, [1, 2])
    monkeypatch.setattr("llm_unlearn.data.selectors_states._CHUNK", 21)
    assert encoder.counts(states, [1, 2]).tolist() == whole.tolist()


def test_broken_autoencoders(tmp_path):
    for number, (config, tensors, layer, message) in enumerate(
        [
            ({"k": 4}, {}, 0, "k must lie between 1 and 3, but is 4"),
            ({}, {}, 0, "k must lie between 1 and 3, but is None"),
            ({"k": 1}, {}, None, "names no layer; pass --selection_layer"),
            ({"k": 1, "layer": 2}, {}, 3, "is of layer 2, but --selection_layer is 3; leave it out"),
            ([], {}, 0, "must hold an object"),
            ({"k": 1}, {"encoder.bias": torch.zeros(2)}, 0, r"must hold encoder.weight \(F, D\) and encoder.bias"),
            ({"k": 1}, {"encoder.weight": None}, 0, r"must hold encoder.weight .* but has \['encoder.bias'\]"),
            ({"k": 1}, {"b_dec": torch.zeros(3)}, 0, "b_dec must have 2 numbers, but has 3"),
        ]
    ):
        with pytest.raises(UserError, match=message):
            SparseEncoder.load(write_sae(tmp_path / str(number), config, **tensors), layer)
    with pytest.raises(UserError, match="cannot be loaded"):
        SparseEncoder.load(tmp_path / "nothing.safetensors", 0)
    (tmp_path / "0/cfg.json").unlink()
    with pytest.raises(UserError, match=r"needs cfg\.json beside it, with k"):
        SparseEncoder.load(tmp_path / "0", 0)


def test_lists_of_latents(tmp_path):
    (tmp_path / "list.txt").write_text("7\n3\n\n7\n")
    assert latent_numbers("5, 2,2", 8) == [2, 5] and latent_numbers(str(tmp_path / "list.txt"), 8) == [3, 7]
    for given, message in (("8", "lists 8"), ("-1", "lists '-1'"), ("a", "lists 'a'"), (",", "lists none")):
        with pytest.raises(UserError, match=f"--selection_latents {message}; the autoencoder has latents 0 to 7"):
            latent_numbers(given, 8)
    with pytest.raises(UserError, match=r"the file 'x\.txt' does not exist"):
        latent_numbers("x.txt", 8)


# ---- Flags ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"token_selection": "keyword"}, "unknown --token_selection 'keyword'; did you mean 'keywords'"),
        ({"keywords": "a"}, "--keywords has no effect without --token_selection keywords or activation"),
        ({"selection_cache": "x"}, "--selection_cache has no effect without --token_selection activation or probe"),
        ({"token_selection": "keywords"}, "--token_selection keywords needs --keywords or --keyword_regex"),
        ({"token_selection": "activation"}, "--token_selection activation needs --keywords or --keyword_regex"),
        ({"token_selection": "probe"}, "--token_selection probe needs --selection_probe"),
        ({"token_selection": "sae", "selection_sae": "x"}, "--token_selection sae needs --selection_latents"),
        ({"token_selection": "sae", "selection_latents": "1"}, "--token_selection sae needs --selection_sae"),
        ({"token_selection": "loss_delta"}, "--token_selection loss_delta needs --selection_reference_model"),
        (
            {"token_selection": "keywords", "keywords": "a", "selection_cache": "x"},
            "--selection_cache has no effect without --token_selection activation or probe or sae or loss_delta",
        ),
        (
            {"token_selection": "keywords", "keywords": "a", "selection_layer": 0},
            "--selection_layer has no effect without --token_selection activation or sae",
        ),
        (
            {"token_selection": "activation", "keywords": "a", "selection_fraction": 0.2},
            "--selection_fraction has no effect without --token_selection probe or sae or loss_delta",
        ),
        (
            {"token_selection": "probe", "selection_probe": "x", "selection_layer": 3},
            "--selection_layer has no effect without --token_selection activation or sae",
        ),
        (
            {"token_selection": "probe", "selection_probe": "x", "selection_fraction": 1.0},
            "--selection_fraction must lie between 0 and 1, but is 1.0",
        ),
        (
            {"token_selection": "activation", "keywords": "a", "selection_threshold": 1.0},
            "--selection_threshold is a cosine between -1 and 1, but is 1.0",
        ),
        (
            {"token_selection": "activation", "keywords": "a", "selection_layer": -1},
            "--selection_layer counts from 0, but is -1",
        ),
        ({"token_selection": "column", "token_weights_use": "sign"}, "unknown --token_weights_use 'sign'"),
        ({"token_selection": "keywords", "keywords": "none.txt"}, "the file 'none.txt' does not exist"),
        ({"token_selection": "keywords", "keyword_regex": "["}, "is no regular expression"),
    ],
)
def test_flags_that_cannot_be(flags, message):
    with pytest.raises(UserError, match=message):
        UnlearnArguments(**flags)


def test_defaults_are_the_published_ones():
    """Threshold .2; fractions .105 and .115; every kind's default is there after parsing, and other kinds' are not."""
    args = NPOArguments(token_selection="activation", keywords="a")
    assert (args.selection_threshold, args.selection_fraction) == (0.2, None)
    assert args.selection_cache == "./token_selection"
    assert NPOArguments(token_selection="probe", selection_probe="x").selection_fraction == 0.105
    assert NPOArguments(token_selection="sae", selection_sae="x", selection_latents="1").selection_fraction == 0.115
    column = NPOArguments(token_selection="column")
    assert column.token_weights_use == "weight" and column.selection_cache is None
    assert NPOArguments().token_selection is None
