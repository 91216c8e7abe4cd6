"""Transformer probes: the network by an independent computation, what it does not see, and folders that do not fit."""

import json
import math

import pytest
import torch

from llm_unlearn.errors import UserError
from llm_unlearn.probe import TransformerProbe, load_probes, probe_depth, read_probe_config, save_probes

RECORD = {"model": {"name": "final", "revision": None, "fingerprint": "f" * 64}}


@pytest.fixture
def probe():
    torch.manual_seed(0)
    made = TransformerProbe(5, 2).double()
    # Every layer begins as a copy of the first; a test of two equal layers could not tell their order.
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def by_hand(probe, states):
    """One row through down-projection, pre-norm blocks of four heads with a ReLU layer, and up-projection."""

    def norm(x, module):
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias

    x = states @ probe.down.weight.T + probe.down.bias
    for block in probe.encoder.layers:
        attention, normed, heads = block.self_attn, norm(x, block.norm1), []
        query, key, value = (normed @ attention.in_proj_weight.T + attention.in_proj_bias).split(64, -1)
        for first in range(0, 64, 16):
            part = slice(first, first + 16)
            weights = (query[:, part] @ key[:, part].T / math.sqrt(16)).softmax(-1)
            heads.append(weights @ value[:, part])
        x = x + torch.cat(heads, -1) @ attention.out_proj.weight.T + attention.out_proj.bias
        inner = (norm(x, block.norm2) @ block.linear1.weight.T + block.linear1.bias).relu()
        assert inner.shape[-1] == 256
        x = x + inner @ block.linear2.weight.T + block.linear2.bias
    return x @ probe.up.weight.T + probe.up.bias


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_the_one_that_is_described(probe, training):
    states = torch.randn(1, 7, 5, dtype=torch.float64)
    probe.train(training)
    found = probe(states, torch.ones(1, 7, dtype=torch.bool))
    torch.testing.assert_close(found[0], by_hand(probe, states[0]), rtol=0, atol=1e-12)


def test_padding_is_not_seen_and_later_tokens_are(probe):
    states = torch.randn(2, 6, 5, dtype=torch.float64)
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    found = probe(states, mask)
    # A row of four tokens is what it is alone, whatever the two padded places hold.
    torch.testing.assert_close(found[0, :4], by_hand(probe, states[0, :4]), rtol=0, atol=1e-12)
    changed = states.clone()
    changed[0, 4:] = 1e6
    assert torch.equal(probe(changed, mask)[0, :4], found[0, :4])
    changed = states.clone()
    changed[1, 5] += 1
    assert (probe(changed, mask)[1, 0] - found[1, 0]).abs().max() > 1e-3


def test_a_row_without_tokens_has_numbers_and_gradients_of_zero(probe):
    states = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False], [False] * 3])
    found = probe(states, mask)
    assert found.isfinite().all()
    found[mask].sum().backward()
    assert states.grad.isfinite().all() and not states.grad[1].any() and not states.grad[0, 2].any()
    assert all(parameter.grad.isfinite().all() for parameter in probe.parameters())


def test_depth_is_how_many_layers_are_above():
    """Published for 32 layers: 24 at hidden_states[8], which layer 7 hands on, ..., 4 at [28]; and 1 at [32]."""
    assert [probe_depth(32, layer) for layer in (7, 11, 15, 19, 23, 27, 30, 31)] == [24, 20, 16, 12, 8, 4, 1, 1]
    assert len(TransformerProbe(8, 3).encoder.layers) == 3


def test_what_is_saved_is_what_is_loaded_frozen(tmp_path, probe):
    other = TransformerProbe(5, 1)
    save_probes(tmp_path, {7: other, 3: probe.float()}, RECORD)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "layer_3.safetensors", "layer_7.safetensors"
    ]  # fmt: skip
    found = load_probes(tmp_path)
    assert list(found) == [3, 7] and [probe.depth for probe in found.values()] == [2, 1]
    for layer, expected in ((3, probe), (7, other)):
        assert not found[layer].training and not any(p.requires_grad for p in found[layer].parameters())
        weights = found[layer].state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.state_dict().items())
    assert list(load_probes(tmp_path, [7], "f" * 64, 5)) == [7]


def test_a_folder_that_does_not_fit_is_refused(tmp_path):
    folder = tmp_path / "probes"
    with pytest.raises(UserError, match=r"is no folder of probes; make one with utils/train_probe\.py"):
        load_probes(folder)
    save_probes(folder, {0: TransformerProbe(5, 1), 2: TransformerProbe(5, 1)}, RECORD)
    with pytest.raises(UserError, match="has no probe of layer 1; pass --layers out of 0 2"):
        load_probes(folder, [0, 1])
    with pytest.raises(
        UserError, match=r"trained on 'final' \(ffffffffffff\), and this model is another \(aaaaaaaaaaaa"
    ):
        load_probes(folder, [0], "a" * 64)
    with pytest.raises(UserError, match="read hidden states of size 5, but this model's have 6"):
        load_probes(folder, [0], "f" * 64, 6)
    save_probes(folder, {0: TransformerProbe(6, 1)}, RECORD)
    (folder / "layer_0.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"layer_0\.safetensors' cannot be loaded"):
        load_probes(folder)


def test_a_probe_of_another_shape_is_refused(tmp_path):
    save_probes(tmp_path, {0: TransformerProbe(5, 1)}, RECORD)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["depths"] == {"0": 1} and (config["width"], config["heads"], config["feed_forward"]) == (64, 4, 4)
    for change in ({"heads": 8}, {"kind": "tuned_lens"}):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match="holds no probes of this kind"):
            read_probe_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "depths": {"0": 2}}))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_probes(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_probe_config(tmp_path)
