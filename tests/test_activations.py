"""Hidden states: the right index, and the same bits without the layers above or below."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_architectures import ARCHITECTURES, DEPTH, LAST, assert_same, gradients, make_batch, make_model, states
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5ForConditionalGeneration

from llm_unlearn.activations import capture, frozen_copies, run_from_layer
from llm_unlearn.decoder import decoder_layers, name_decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.models import train_only
from llm_unlearn.truncation import truncate


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_output_of_layer_l_is_hidden_states_l_plus_1(name):
    model = make_model(name)
    expected = model(**make_batch(), use_cache=False, output_hidden_states=True).hidden_states
    found = states(model, *range(DEPTH))
    assert all(torch.equal(found[layer], expected[layer + 1]) for layer in range(DEPTH - 1))
    # The trap: of the last layer transformers gives what the final norm returns (and OPT what is projected after it).
    assert found[-1].shape != expected[-1].shape or not torch.equal(found[-1], expected[-1])
    if name == "llama":
        assert torch.equal(model.model.norm(found[-1]), expected[-1])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_truncation_changes_no_bit(name):
    model = make_model(name)
    keys, parameters = list(model.state_dict()), dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules())
    (hidden,) = states(model, LAST)
    expected = gradients(model, hidden)
    truncation = truncate(model, LAST, offload=True)
    assert len(decoder_layers(model)) == LAST + 1
    assert model(**make_batch(), use_cache=False).logits.shape == (3, 13, 0)
    (found,) = states(model, LAST)
    assert torch.equal(found, hidden)
    assert_same(gradients(model, found), expected)
    assert len(list(model.parameters())) < len(parameters)
    assert list(truncation.full_state_dict()) == keys
    truncation.restore()
    assert list(model.state_dict()) == keys and dict(model.named_modules()) == modules
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[key] is parameter for key, parameter in parameters.items()) and after.keys() == parameters.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_resuming_from_a_layer_changes_no_bit(name):
    model = make_model(name)
    keys, mask = list(model.state_dict()), make_batch()["attention_mask"]
    prefix, hidden = states(model, 1, LAST)
    expected = {key: value for key, value in gradients(model, hidden).items() if f".{2}." in key or f".{3}." in key}
    found = run_from_layer(model, prefix.detach(), 2, LAST, mask)
    assert torch.equal(found, hidden)
    assert_same({k: v for k, v in gradients(model, found).items() if k in expected}, expected)
    (last,) = states(model, DEPTH - 1)
    assert torch.equal(run_from_layer(model, prefix, 2, DEPTH - 1, mask), last)
    assert list(model.state_dict()) == keys and len(decoder_layers(model)) == DEPTH
    window = truncate(model, LAST, first_layer=2)
    assert torch.equal(run_from_layer(model, prefix, 2, LAST, mask), hidden)
    assert not any(".0." in key or ".1." in key for key in model.state_dict())
    assert list(window.full_state_dict()) == keys


@contextlib.contextmanager
def autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        yield model


@contextlib.contextmanager
def checkpointing(model):
    model.activation_checkpointing_enable()
    yield model


@contextlib.contextmanager
def lora(model):
    yield get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "gemma2"])
@pytest.mark.parametrize("setting", [autocast, checkpointing, lora])
def test_the_same_bits_under(setting, name):
    with setting(make_model(name)) as model:
        prefix, hidden = states(model, 1, LAST)
        expected = gradients(model, hidden)
        with torch.no_grad():
            assert torch.equal(run_from_layer(model, prefix, 2, LAST, make_batch()["attention_mask"]), hidden)
        truncate(model, LAST)
        (found,) = states(model, LAST)
        assert torch.equal(found, hidden)
        assert_same(gradients(model, found), expected)


def test_without_padding_no_mask_is_needed():
    model = make_model("gemma2")
    layers = decoder_layers(model)
    with capture(layers[1], layers[3]) as hidden:
        model(input_ids=make_batch()["input_ids"], use_cache=False)
    assert torch.equal(run_from_layer(model, hidden[0], 2, 3), hidden[1])


def test_nothing_stays_behind_when_the_forward_fails():
    model = make_model()
    before = dict(model.named_modules())
    with pytest.raises(RuntimeError):
        run_from_layer(model, torch.zeros(3, 13, 7), 2, LAST)
    assert dict(model.named_modules()) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_frozen_copies_keep_the_answers_of_before_and_share_what_is_frozen():
    model, mask = make_model(), make_batch()["attention_mask"]
    train_only(model, ["model.layers.[23].mlp.down_proj.weight"])
    copies = frozen_copies(model, 2, LAST)
    truncate(model, LAST)
    prefix, before = states(model, 1, LAST)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before.pow(2).mean().backward()
    optimizer.step()
    assert torch.equal(run_from_layer(model, prefix, 2, LAST, mask, layers=copies), before)
    assert not torch.equal(run_from_layer(model, prefix, 2, LAST, mask), before)
    assert not any(p.requires_grad for p in copies.parameters()) and not copies.training
    own = {id(p) for p in decoder_layers(model).parameters()}
    assert [name for name, p in copies.named_parameters() if id(p) not in own] == [
        "0.mlp.down_proj.weight",
        "1.mlp.down_proj.weight",
    ]


def test_layers_are_found_inside_wrappers_and_among_other_lists():
    model = make_model("mixtral")
    layers = decoder_layers(model)
    layers[0].experts_by_topic = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(DEPTH))
    model.probes = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(DEPTH))
    wrapped = torch.nn.Sequential(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    assert decoder_layers(wrapped) is layers and decoder_layers(torch.compile(wrapped)) is layers


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="layer 5 does not exist: the model has layers 0 to 4"):
        truncate(make_model(), 5)
    with pytest.raises(UserError, match="the range of layers 3 to 2 does not exist"):
        run_from_layer(make_model(), torch.zeros(3, 13, 32), 3, 2)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=32, num_layers=2, num_heads=2, d_ff=32))
    with pytest.raises(UserError, match="decoder-only models, but T5ForConditionalGeneration has 2 lists of 2 layers"):
        decoder_layers(t5)
    with pytest.raises(UserError, match="but Linear holds none"):
        decoder_layers(torch.nn.Linear(2, 2))


def flops(step):
    """Return the FLOPs of a call, exact: of the matrix products alone, by their shapes."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def test_flops_of_an_rmu_step():
    """One step on a forget and a retain batch, layer 7 of 32; unit: forward and backward of one batch, all trained."""
    changes = {"hidden_size": 256, "num_hidden_layers": 32, "intermediate_size": 688, "vocab_size": 1000}
    model = make_model(**changes, attn_implementation="eager")
    forget = torch.randint(3, 1000, (2, 64), generator=torch.Generator().manual_seed(3))
    both, mask, retain_mask = forget.repeat(2, 1), torch.ones(4, 64), torch.ones(2, 64)
    unit = flops(lambda: model(input_ids=forget, labels=forget, use_cache=False).loss.backward())
    layers, at = decoder_layers(model), {}
    train_only(model, ["model.layers.[5-7].mlp.down_proj.weight"])
    copies = frozen_copies(model, 5, 7)

    def forward(ids):
        with capture(model.model.embed_tokens, layers[4], layers[7]) as hidden:
            model(input_ids=ids, use_cache=False)
        at["embedding"], at["prefix"], at["output"] = hidden
        return at["output"]

    def backward(hidden, reference):
        (hidden[:2].pow(2).mean() + (hidden[2:] - reference).pow(2).mean()).backward()

    def own_prefix():
        with torch.no_grad():
            reference = forward(both[2:])
        backward(forward(both), reference)

    def shared_prefix():
        hidden = forward(both)
        with torch.no_grad():
            reference = run_from_layer(model, at["prefix"][2:].detach(), 5, 7, retain_mask, layers=copies)
        backward(hidden, reference)

    def cached_prefix():
        hidden = run_from_layer(model, prefix, 5, 7, mask)
        with torch.no_grad():
            reference = run_from_layer(model, prefix[2:], 5, 7, retain_mask, layers=copies)
        backward(hidden, reference)

    assert 1.04 < flops(own_prefix) / unit < 1.07  # nothing truncated, only frozen
    truncate(model, 7)
    assert flops(own_prefix) / unit <= 0.31
    assert flops(shared_prefix) / unit <= 0.26
    assert not at["embedding"].requires_grad and not at["prefix"].requires_grad
    prefix = at["prefix"].detach()
    assert flops(cached_prefix) / unit <= 0.15
    assert flops(lambda: backward(run_from_layer(model, prefix, 5, 7, mask), 0.0)) / unit <= 0.12  # reference cached
    # transformers makes the embedding's output carry gradients where it checkpoints, which all frozen layers pay for.
    model.activation_checkpointing_enable()
    assert flops(shared_prefix) / unit > 0.5
    model.disable_input_require_grads()
    assert flops(shared_prefix) / unit <= 0.31


def test_the_user_names_the_layers_of_an_unknown_architecture():
    """A decoder with a second list of as many modules: nothing tells which one is meant, until somebody says it."""
    model = make_model("gpt2")
    expected = states(model, 2)[0]
    model.transformer.twins = torch.nn.ModuleList(torch.nn.Identity() for _ in range(DEPTH))
    model.config.n_layer = DEPTH + 1
    with pytest.raises(
        UserError, match=r"pass --decoder_layers with the attribute.*transformer\.h, transformer\.twins"
    ):
        decoder_layers(model)
    model.config.n_layer = DEPTH
    with pytest.raises(UserError, match=r"'transformer.layers' is no list of modules.*it has transformer\.h"):
        name_decoder_layers(model, "transformer.layers")
    name_decoder_layers(model, "transformer.h")
    assert decoder_layers(model) is model.transformer.h and torch.equal(states(model, 2)[0], expected)
    assert len(decoder_layers(truncate(model, 2).model)) == 3
