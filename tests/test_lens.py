"""The lens by hand and against transformers' hidden_states; how it is stored, and whose lens is refused."""

import json
import logging
import math
import os
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_architectures import DEPTH, make_batch, make_model
from torch import nn

from llm_unlearn.activations import capture
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.lens import TunedLens
from llm_unlearn.lens_files import base_model_identity, read_lens, save_lens
from llm_unlearn.projection import Projection


def random_values(indices, size, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return {
        index: (torch.randn(size, size, generator=generator) / size, torch.randn(size, generator=generator))
        for index in indices
    }


@pytest.fixture
def stored(tmp_path):
    """A lens of translators 1 to 3 of the tiny Llama, as `save_lens` writes it: (folder, model, lens)."""
    model = make_model()
    model.config._name_or_path = "owner/trained-on"
    lens = TunedLens.of(model)
    lens.add_translators([1, 2, 3], random_values([1, 2, 3], 32))
    save_lens(tmp_path / "lens", lens, {"base_model": base_model_identity(model), "training": {"command": "typed"}})
    return tmp_path / "lens", model, lens


class TestByHand:
    """D = V = 2, the norm an identity and the head too: z = h + A h + b."""

    def lens(self):
        lens = TunedLens(3, nn.Identity(), Projection(torch.eye(2)))
        lens.add_translators([1], {1: (torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([math.log(2), 0.0]))})
        return lens

    def test_a_translator_adds_what_the_other_coordinate_holds(self):
        """h = (0, ln 3): A h + b = (ln 3 + ln 2, 0), so z = (ln 6, ln 3) and p = (2/3, 1/3)."""
        logps, uniform = self.lens().scores(1, torch.tensor([[0.0, math.log(3)]]), torch.tensor([0]), uniform=True)
        assert logps.item() == pytest.approx(math.log(2 / 3), rel=1e-6)
        assert uniform.item() == pytest.approx(-(math.log(2 / 3) + math.log(1 / 3)) / 2, rel=1e-6)

    def test_a_depth_without_a_translator_is_the_logit_lens(self):
        """z = h = (0, ln 3): p = (1/4, 3/4)."""
        (logps,) = self.lens().scores(2, torch.tensor([[0.0, math.log(3)]]), torch.tensor([1]))
        assert logps.item() == pytest.approx(math.log(3 / 4), rel=1e-6)

    def test_a_uniform_lens_is_exactly_1(self):
        lens = TunedLens(1, nn.Identity(), Projection(torch.zeros(8, 2)))
        uniform = lens.scores(0, torch.randn(3, 2).double(), torch.zeros(3, dtype=torch.long), uniform=True)[-1]
        assert (uniform / math.log(8)).tolist() == pytest.approx([1.0] * 3, rel=1e-15)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "gemma2"])
def test_translator_i_reads_hidden_states_i_which_layer_i_minus_1_hands_on(name):
    """The logits of depth i are a plain head(norm(h + A h + b)) of hidden_states[i] by transformers; at the last
    layer, whose hidden state transformers gives normed, they are the model's own."""
    model, batch = make_model(name).eval(), make_batch()
    lens, values = TunedLens.of(model), random_values(range(DEPTH), 32)
    lens.add_translators(range(DEPTH), values)
    norm = {"gpt_neox": lambda m: m.gpt_neox.final_layer_norm, "gpt2": lambda m: m.transformer.ln_f}
    norm = norm.get(name, lambda m: m.model.norm)(model)
    with torch.no_grad(), capture(*decoder_layers(model)) as outputs:
        found = model(**batch, output_hidden_states=True, use_cache=False)
    for index, states in enumerate(found.hidden_states[:-1]):
        weight, bias = values[index]
        with torch.no_grad():
            logits = model.lm_head(norm(states + states @ weight.T + bias))
            if name == "gemma2":
                logits = 30 * torch.tanh(logits / 30)
            (logps,) = lens.scores(index, states.flatten(0, 1), batch["input_ids"].flatten())
        expected = logits.log_softmax(-1).gather(-1, batch["input_ids"][..., None]).flatten()
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
        if index:
            assert torch.equal(states, outputs[index - 1])
    assert not torch.equal(found.hidden_states[-1], outputs[-1])
    states = lens.hidden(DEPTH, outputs[-1])
    torch.testing.assert_close(states, found.hidden_states[-1], rtol=1e-5, atol=1e-6)
    (logps,) = lens.scores(DEPTH, outputs[-1].flatten(0, 1), batch["input_ids"].flatten())
    expected = found.logits.log_softmax(-1).gather(-1, batch["input_ids"][..., None]).flatten()
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scores_and_their_gradient_are_the_plain_ones(name):
    """Gradients of the states, through the recomputed norm, and of the translator; none of norm and head."""
    model = make_model(name)
    lens, values = TunedLens.of(model), random_values([1], 32)
    lens.add_translators([1], values)
    states = torch.randn(37, 32, generator=torch.Generator().manual_seed(5))
    labels, weights = torch.arange(37), torch.linspace(0.1, 2, 37)
    own, plain = states.clone().requires_grad_(), states.clone().requires_grad_()
    weight, bias = (value.clone().requires_grad_() for value in values[1])
    (weights * lens.scores(1, own, labels, uniform=True, linear=weights)[-1]).sum().backward()
    logits = model.lm_head(model.model.norm(plain + plain @ weight.T + bias))
    logits = 30 * torch.tanh(logits / 30) if name == "gemma2" else logits
    (weights * (logits.logsumexp(-1) - logits.mean(-1))).sum().backward()
    translator = lens.translators["1"]
    for found, expected in ((own, plain), (translator.weight, weight), (translator.bias, bias)):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-5)
    assert {name for name, p in lens.named_parameters() if p.requires_grad} == {
        "translators.1.weight",
        "translators.1.bias",
    }


def test_the_lens_is_of_the_model_as_it_was():
    model = make_model("llama_tied")
    lens = TunedLens.of(model)
    before = lens.head_weight.clone(), lens.norm.weight.clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(lens.head_weight, before[0]) and torch.equal(lens.norm.weight, before[1])
    assert not {id(p) for p in lens.parameters()} & {id(p) for p in model.parameters()}


def test_a_narrow_lens_keeps_its_norm_wide_and_says_nearly_the_same():
    lens = TunedLens.of(make_model())
    lens.add_translators([1], random_values([1], 32))
    states, labels = torch.randn(9, 32, generator=torch.Generator().manual_seed(5)), torch.arange(9)
    wide = lens.scores(1, states, labels)
    lens.narrow(torch.bfloat16)
    assert lens.norm.weight.dtype == torch.float32 and lens.head_weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        found = lens.scores(1, states, labels)
    # Rounding to 8 bits of logits around 1.
    torch.testing.assert_close(found, wide, rtol=0, atol=0.05)
    assert found.dtype == torch.float32 and lens.hidden(1, states.bfloat16()).dtype == torch.bfloat16


class TestModelsWithoutALens:
    def test_more_than_a_norm_and_a_matrix(self):
        model = make_model()
        TunedLens.of(model).require_agreement(model)
        model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
        with pytest.raises(UserError, match="no lens can be had of a LlamaForCausalLM: between its last layer"):
            TunedLens.of(model).require_agreement(model)

    def test_a_head_of_another_width(self):
        with pytest.raises(UserError, match="a OPTForCausalLM: its head is no matrix of numbers that takes the 32"):
            TunedLens.of(make_model("opt"))


class TestFiles:
    def test_what_is_stored_comes_back_bit_for_bit(self, stored):
        folder, model, lens = stored
        assert sorted(path.name for path in folder.iterdir()) == [
            "README.md", "lens.json", "lens.safetensors", "manifest.json"
        ]  # fmt: skip
        config = json.loads((folder / "lens.json").read_text())
        assert config["kind"] == "tuned_lens" and config["translators"] == [1, 2, 3]
        assert (config["d_model"], config["num_layers"]) == (32, 5) and "typed" in (folder / "README.md").read_text()
        found = read_lens(folder, TunedLens.of(model), [3, 1])
        again = TunedLens.of(model)
        again.add_translators([1, 3], found.translators)
        assert torch.equal(again.translators["3"].weight, lens.translators["3"].weight)
        assert torch.equal(again.translators["1"].bias, lens.translators["1"].bias)
        found.require_model(base_model_identity(model))
        assert again.sha256() != lens.sha256()
        again.add_translators([2], read_lens(folder, again, [2]).translators)
        assert {*again.translators} == {"1", "2", "3"}

    def test_the_lens_of_another_model_is_refused_and_both_are_named(self, stored):
        folder, _, lens = stored
        other = make_model()
        other.config._name_or_path = "owner/another"
        with torch.no_grad():
            other.model.layers[2].mlp.down_proj.weight[0, 0] += 0.1
        with pytest.raises(
            UserError, match=r"trained on 'owner/trained-on' \(\w{12}\), but .* 'owner/another' \(\w{12}"
        ):
            read_lens(folder, lens, [1]).require_model(base_model_identity(other))

    def test_precision_and_new_adapters_make_no_other_model(self, stored):
        folder, _, lens = stored
        found = read_lens(folder, lens, [1])
        same = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["down_proj", "lm_head"]))
        found.require_model(base_model_identity(same))
        found.require_model(base_model_identity(make_model().to(torch.bfloat16)))
        with torch.no_grad():
            same.get_parameter("base_model.model.lm_head.lora_B.default.weight")[0, 0] = 0.5
        with pytest.raises(UserError, match="was trained on"):
            found.require_model(base_model_identity(same))

    def test_quantized_weights_are_known_by_their_files(self, tmp_path):
        make_model().save_pretrained(tmp_path / "base")
        model = type(make_model()).from_pretrained(tmp_path / "base")
        lens, identity = TunedLens.of(model), base_model_identity(model, with_files=True)
        lens.add_translators([1])
        save_lens(tmp_path / "lens", lens, {"base_model": identity})
        model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), False)
        now = base_model_identity(model)
        assert now["weights_sha256"] is None and now["files"] == identity["files"] is not None
        found = read_lens(tmp_path / "lens", lens, [1])
        found.require_model(now)
        with pytest.raises(UserError, match="was trained on"):
            found.require_model({**now, "files": "0" * 64})
        with pytest.raises(UserError, match="was trained on"):
            found.require_model({**now, "files": None})

    def test_a_layer_without_a_translator(self, stored):
        folder, _, lens = stored
        with pytest.raises(
            UserError, match="no translator for the output of layer 3, which is 4; pass --layers out of 0 1 2 4"
        ):
            read_lens(folder, lens, [1, 4])

    def test_a_lens_of_other_shapes(self, stored):
        folder, *_ = stored
        with pytest.raises(UserError, match=r"translator 1 of the lens .* is \(32, 32\), but .* 24 numbers"):
            read_lens(folder, TunedLens.of(make_model(hidden_size=24)), [1])
        with pytest.raises(UserError, match="has a translator 3, but the model has 2 layers"):
            read_lens(folder, TunedLens.of(make_model(num_hidden_layers=2)), [1])

    def test_a_folder_that_is_not_whole(self, stored, tmp_path):
        folder, _, lens = stored
        with pytest.raises(UserError, match=r"the lens folder './absent' does not exist"):
            read_lens("./absent", lens, [1])
        (tmp_path / "empty").mkdir()
        with pytest.raises(UserError, match=r"holds no lens: neither lens.safetensors"):
            read_lens(tmp_path / "empty", lens, [1])
        (folder / "lens.json").write_text("{}")
        with pytest.raises(UserError, match=r"cannot be used: lens.json is not as it was written"):
            read_lens(folder, lens, [1])
        (folder / "manifest.json").unlink()
        with pytest.raises(UserError, match=r"cannot be used: lens.json cannot be read: KeyError"):
            read_lens(folder, lens, [1])
        (folder / "lens.json").unlink()
        with pytest.raises(UserError, match=r"is not complete: it needs lens.safetensors and lens.json"):
            read_lens(folder, lens, [1])

    def test_a_name_on_the_hub_without_network_is_one_sentence(self, stored):
        with pytest.raises(UserError, match="is no folder here and cannot be had from the Hub") as caught:
            read_lens("owner/lens-that-is-nowhere", stored[2], [1])
        assert "\n" not in str(caught.value) and "pass --lens_path FOLDER" in str(caught.value)


class TestPublished:
    """Translators without lens.json: EleutherAI's pickles, and the same as safetensors."""

    def tensors(self, size=32):
        values = random_values(range(DEPTH), size)
        return {
            f"{i}.{name}": tensor for i in values for name, tensor in zip(("weight", "bias"), values[i], strict=True)
        }

    def test_a_pickle_is_read_with_the_flag_alone(self, tmp_path, caplog):
        lens, tensors = TunedLens.of(make_model()), self.tensors()
        torch.save(tensors, tmp_path / "params.pt")
        (tmp_path / "config.json").write_text('{"d_model": 32}')
        with pytest.raises(UserError, match=r"is a pickle .* pass --allow_pickle_lens True"):
            read_lens(tmp_path, lens, [2])
        found = read_lens(tmp_path, lens, [2], allow_pickle=True)
        assert torch.equal(found.translators[2][0], tensors["2.weight"])
        with caplog.at_level(logging.WARNING, "llm_unlearn"):
            found.require_model({"name": "any", "weights_sha256": "0", "files": None})
        assert "does not say which model it was trained on" in caplog.text

    def test_a_pickle_that_holds_code_is_refused(self, tmp_path):
        class Code:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "ran"),))

        (tmp_path / "params.pt").write_bytes(pickle.dumps({"0.weight": Code()}, protocol=2))
        with pytest.raises(UserError, match="cannot be read as tensors and nothing else"):
            read_lens(tmp_path, TunedLens.of(make_model()), [0], allow_pickle=True)
        assert not (tmp_path / "ran").exists()

    def test_safetensors_need_no_flag_and_a_bias_may_be_missing(self, tmp_path):
        lens, tensors = TunedLens.of(make_model()), self.tensors()
        save_file(
            {name: tensor for name, tensor in tensors.items() if "weight" in name}, tmp_path / "model.safetensors"
        )
        weight, bias = read_lens(tmp_path, lens, [4]).translators[4]
        assert torch.equal(weight, tensors["4.weight"]) and torch.equal(bias, torch.zeros(32))
        with pytest.raises(UserError, match="--allow_pickle_lens has no effect"):
            read_lens(tmp_path, lens, [4], allow_pickle=True)

    def test_other_tensors_are_no_lens(self, tmp_path):
        lens = TunedLens.of(make_model())
        save_file({"layer_0.weight": torch.zeros(32, 32)}, tmp_path / "maps.safetensors")
        with pytest.raises(UserError, match=r"holds no lens of affine translators.* here is layer_0.weight"):
            read_lens(tmp_path, lens, [0])
        (tmp_path / "maps.safetensors").write_bytes(b"torn")
        with pytest.raises(UserError, match="cannot be read"):
            read_lens(tmp_path, lens, [0])


def test_a_lens_replaces_an_older_one(stored):
    folder, model, _ = stored
    lens = TunedLens.of(model)
    lens.add_translators([4])
    save_lens(folder, lens, {"base_model": base_model_identity(model)})
    assert {*load_file(folder / "lens.safetensors")} == {"4.weight", "4.bias"}
    assert read_lens(folder, lens, [4]).config["translators"] == [4]
