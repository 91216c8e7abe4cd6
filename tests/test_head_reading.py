"""HeadReader on real models: scores and every gradient are those of the model's own logits, and it leaves no trace."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_chunked_head import Largest
from tiny_architectures import ARCHITECTURES
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from llm_unlearn import chunked_head
from llm_unlearn.chunked_head import Projection
from llm_unlearn.data.streams import UnlearnCollator
from llm_unlearn.data.tokenize import IGNORED
from llm_unlearn.head import concatenate, counted_labels, counted_states, split
from llm_unlearn.head_reading import HeadReader, score_streams
from llm_unlearn.reference import HIDDEN

GROUPED = ARCHITECTURES["llama_tied"] | {"tie_word_embeddings": False, "num_hidden_layers": 2}
HEADED = {**GROUPED, "head_dim": 8}
# {name: (type, configuration)}. Caps and factors are far from 1, so that one left out or taken twice would be seen.
MODELS = {
    "llama": ("llama", GROUPED),
    "llama_tied": ("llama", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("mistral", GROUPED),
    "qwen2": ("qwen2", GROUPED),
    "gemma2_softcap": ("gemma2", {**HEADED, "final_logit_softcapping": 0.5}),
    "gemma3_softcap": ("gemma3_text", {**HEADED, "final_logit_softcapping": 0.5}),
    "cohere_scale": ("cohere", {**GROUPED, "logit_scale": 0.25}),
    "granite_scale": ("granite", {**GROUPED, "logits_scaling": 0.3}),
    "gpt2": ("gpt2", ARCHITECTURES["gpt2"] | {"n_layer": 2}),
    "gptj_bias": ("gptj", ARCHITECTURES["gptj"] | {"n_layer": 2}),
    "gpt_neox": ("gpt_neox", ARCHITECTURES["gpt_neox"] | {"num_hidden_layers": 2}),
    "opt": ("opt", ARCHITECTURES["opt"] | {"num_hidden_layers": 2}),
    "phi_bias": ("phi", ARCHITECTURES["phi"] | {"num_hidden_layers": 2}),
    "falcon": ("falcon", ARCHITECTURES["falcon"] | {"num_hidden_layers": 2}),
    "bloom": ("bloom", ARCHITECTURES["bloom"] | {"n_layer": 2}),
    "mpt": ("mpt", ARCHITECTURES["mpt"] | {"n_layers": 2}),
    "mixtral": ("mixtral", ARCHITECTURES["mixtral"] | {"num_hidden_layers": 2}),
    # It caps its logits by a setting of its own.
    "recurrent_gemma_own": ("recurrent_gemma", {**GROUPED, "logits_soft_cap": 0.5, "lru_width": 32}),
}
ADAPTERS = {
    "off_head": {"target_modules": ["q_proj", "down_proj"]},
    "on_head": {"target_modules": ["q_proj", "lm_head"]},
    "head_saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}
STREAMS = ("forget", "retain")
WANTED = {"entropy": ("forget",), "linear": ("retain",)}


def make(name, noise=0.0):
    torch.manual_seed(0)
    kind, config = MODELS[name]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            # Untrained logits are nearly equal, and biases of heads zero: errors in either would not be seen.
            parameter.add_(0.1 * torch.randn_like(parameter))
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def batch(lengths=((9, 3, 6), (13, 2))):
    generator, collator, found = torch.Generator().manual_seed(1), UnlearnCollator(), {}
    for name, sizes in zip(STREAMS, lengths, strict=True):
        rows = [torch.randint(3, 96, (size,), generator=generator).tolist() for size in sizes]
        found[name] = collator.pad([{"input_ids": ids, "labels": [IGNORED, *ids[1:]]} for ids in rows])
    return found


def loss_of(outputs):
    """A loss that is linear in the retain stream's divergence (as the reader is told), and in nothing else."""
    forget, retain = outputs["forget"], outputs["retain"]
    return (forget.sequence_logps().square().sum() + forget.entropy.square().sum()) / 10 + 0.7 * retain.kl.sum()


def dense_outputs(logits, ref_logits, inputs):
    """{stream: (logps (N,), kl (N,), entropy (N,))} of whole logits."""
    found, parts, ref_parts = {}, split(logits, inputs, STREAMS), split(ref_logits, inputs, STREAMS)
    for name in STREAMS:
        log_p = counted_states(parts[name], inputs[name]).float().log_softmax(-1)
        log_r = counted_states(ref_parts[name], inputs[name]).detach().float().log_softmax(-1)
        logps = log_p[torch.arange(len(log_p)), counted_labels(inputs[name])]
        found[name] = logps, (log_r.exp() * (log_r - log_p)).sum(-1), -(log_p.exp() * log_p).sum(-1)
    return found


def dense_loss(found, inputs):
    sizes = (inputs["forget"]["labels"][:, 1:] != IGNORED).sum(-1).tolist()
    sums = torch.stack([part.sum() for part in found["forget"][0].split(sizes)])
    return (sums.square().sum() + found["forget"][2].square().sum()) / 10 + 0.7 * found["retain"][1].sum()


def forward(model, inputs):
    ids, mask = concatenate(inputs, STREAMS, 0)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ref_hidden(model, inputs):
    """The reference's states as Reference reads them, with the adapters of a PEFT model off."""
    reader, states = HeadReader(model), {}

    def read(head, hidden):
        parts = split(hidden, inputs, STREAMS)
        states.update({"retain": HIDDEN.read(head, parts["retain"], inputs["retain"])})
        return states

    with torch.no_grad():
        return reader(model, read, *concatenate(inputs, STREAMS, 0))


def assert_agree(model, outputs, found_gradients, ref_logits, inputs):
    """Compare with the dense computation; float32 sums in another order, over gradients of all sizes."""
    expected = dense_outputs(forward(model, inputs), ref_logits, inputs)
    for place, values in enumerate(("logps", "kl", "entropy")):
        for name in STREAMS:
            found = getattr(outputs[name], values)
            if found is not None:
                torch.testing.assert_close(found[outputs[name].mask], expected[name][place], rtol=1e-5, atol=1e-5)
    wanted = gradients(model, dense_loss(expected, inputs))
    assert found_gradients.keys() == wanted.keys() and len(wanted) > 2
    whole = torch.stack([value.norm() for value in wanted.values()]).norm()
    worst = max(((found_gradients[name] - value).norm() / whole).item() for name, value in wanted.items())
    assert worst < 1e-5 and whole > 1e-2, (worst, whole)


def projection_of(model):
    head = HeadReader(model).head
    return Projection(head.module.weight.detach(), None if head.module.bias is None else head.module.bias.detach())


def check(model, reference, inputs, reader=None):
    """Score streams with a model and the divergence from another, and compare both with whole logits."""
    with torch.no_grad():
        ref_logits = forward(reference, inputs)
    outputs = score_streams(
        reader or HeadReader(model), model, inputs, STREAMS, 0, **WANTED, ref_hidden=ref_hidden(reference, inputs),
        ref_projection=projection_of(reference),
    )  # fmt: skip
    assert_agree(model, outputs, gradients(model, loss_of(outputs)), ref_logits, inputs)
    return outputs


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_all_gradients_are_those_of_the_models_logits(name, caplog):
    model, inputs = make(name), batch()
    reader = HeadReader(model)
    check(model, make(name, noise=0.05).eval(), inputs, reader)
    assert reader.head.is_dense == name.endswith("_own") == ("made whole" in caplog.text)
    assert name.endswith("_own") or (reader.head.is_plain() and reader.head.trains())


def with_adapters(model, kind):
    model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **ADAPTERS[kind]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2_softcap", "cohere_scale"])
def test_adapters_on_and_off_the_head(name, kind, monkeypatch):
    """The reference is the model with its adapters off, and its head the one below them; in chunks of 5 positions."""
    monkeypatch.setitem(chunked_head._CHUNK_ELEMENTS, "cpu", 5 * 96)
    model, inputs = with_adapters(make(name), kind), batch()
    reader = HeadReader(model)
    assert reader.head.is_plain() == (kind == "off_head") and not reader.head.trains()
    with torch.no_grad(), model.disable_adapter():
        ref_logits, states = forward(model, inputs), ref_hidden(model, inputs)
    with torch.no_grad():
        assert not torch.allclose(forward(model, inputs), ref_logits, atol=1e-2)
    outputs = score_streams(reader, model, inputs, STREAMS, 0, **WANTED, ref_hidden=states)
    found = gradients(model, loss_of(outputs))
    assert_agree(model, outputs, found, ref_logits, inputs)
    assert not reader.head.is_dense and all("lora_" in key or "modules_to_save" in key for key in found)


@pytest.mark.parametrize("kind", ["on_head", "head_saved"])
def test_an_adapted_head_never_makes_the_logits_of_all_positions(kind, monkeypatch):
    """400 positions times 96 logits would be 38,400 numbers; the hidden states are 12,800, a chunk of five is 480."""
    monkeypatch.setitem(chunked_head._CHUNK_ELEMENTS, "cpu", 5 * 96)
    model = with_adapters(make("llama"), kind)
    ids, labels = torch.tensor([[5, 6, 7, 8]]), torch.arange(400) % 96

    def read(head, hidden):
        states = hidden.repeat(1, 100, 1)[0]
        return head.scores(states, labels, states.detach(), None, True).reshape(-1)

    with Largest() as largest:
        HeadReader(model)(model, read, ids, torch.ones_like(ids)).sum().backward()
    assert largest.numel == 400 * 32


@pytest.mark.parametrize("kind", ["on_head", "head_saved", None])
def test_a_batch_of_fillers_alone_has_gradients_for_the_same_weights(kind):
    """Else a process that has nothing but fillers would wait for the others, or they for it."""
    model = make("llama") if kind is None else with_adapters(make("llama"), kind)
    reader, keys = HeadReader(model), []
    filler = UnlearnCollator().pad([{"input_ids": [4, 4], "labels": [IGNORED] * 2}])
    for inputs in (batch(), {"forget": filler, "retain": filler}):
        outputs = score_streams(reader, model, inputs, STREAMS, 0, entropy=("forget",), linear=("retain",))
        loss = sum(output.logps.sum() for output in outputs.values())
        keys.append(list(gradients(model, loss)))
    assert keys[0] == keys[1] and len(keys[0]) > 2


def test_a_frozen_head_is_the_reference_s_head_as_well():
    model, inputs = make("llama"), batch()
    model.lm_head.requires_grad_(False)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        ref_logits = forward(reference, inputs)
    reader = HeadReader(model)
    assert not reader.head.trains()
    outputs = score_streams(reader, model, inputs, STREAMS, 0, **WANTED, ref_hidden=ref_hidden(reference, inputs))
    assert_agree(model, outputs, gradients(model, loss_of(outputs)), ref_logits, inputs)


class OwnLogits(LlamaForCausalLM):
    """A model from elsewhere that changes its logits by what no setting says."""

    def __init__(self, config):
        super().__init__(config)
        self.shift = torch.nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 1.3 * output.logits + self.shift
        return output


@pytest.mark.parametrize("kind", [None, "off_head"])
def test_a_model_with_logits_of_its_own_is_read_at_its_logits_with_a_warning(kind, caplog):
    torch.manual_seed(0)
    model, inputs = OwnLogits(CONFIG_MAPPING["llama"](**GROUPED)).train(), batch()
    with torch.no_grad():
        model.shift.normal_()
    model = model if kind is None else with_adapters(model, kind)
    reader = HeadReader(model)
    with torch.no_grad():
        ref_logits = forward(make("llama"), inputs)
    states = {"retain": counted_states(split(ref_logits, inputs, STREAMS)["retain"], inputs["retain"])}
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            outputs = score_streams(reader, model, inputs, STREAMS, 0, **WANTED, ref_hidden=states)
    (message,) = caplog.messages
    assert "changes its logits in a way of its own: they are made whole, which takes memory" in message
    assert reader.head.is_dense and not reader.head.trains()
    assert_agree(model, outputs, gradients(model, loss_of(outputs)), ref_logits, inputs)


def traces(model):
    """Everything that reading might leave behind: hooks, and methods set on a module alone."""
    return {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("kind", [None, *ADAPTERS])
def test_the_model_is_unharmed_afterwards(kind):
    model = make("gemma2_softcap") if kind is None else with_adapters(make("gemma2_softcap"), kind)
    inputs, reader, before = batch(), HeadReader(model), traces(model)
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    said = model.eval().generate(**prompt, max_new_tokens=6, do_sample=False)
    logits = forward(model, inputs)
    model.train()
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            score_streams(reader, model, inputs, STREAMS, 0)
    with pytest.raises(ZeroDivisionError):
        reader(model, lambda head, hidden: 1 / 0, *concatenate(inputs, STREAMS, 0))
    assert traces(model) == before and model.training and reader.is_probed
    model.eval()
    assert torch.equal(forward(model, inputs), logits)
    assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False), said)


def test_a_forward_that_was_replaced_already_is_put_back():
    """Accelerate and quantizers set `forward` on modules themselves."""
    model, inputs = make("llama"), batch()
    original, calls = model.lm_head.forward, []
    model.lm_head.forward = replaced = lambda hidden: (calls.append(1), original(hidden))[1]
    score_streams(HeadReader(model), model, inputs, STREAMS, 0)
    assert model.lm_head.forward is replaced


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model, inputs = make("llama"), batch()
    reference = make("llama", noise=0.05).eval()
    plain = check(model, reference, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    outputs = check(model, reference, inputs)
    assert all(torch.equal(outputs[name].logps, plain[name].logps) for name in STREAMS)


@pytest.mark.parametrize("kind", [None, "on_head"])
def test_without_gradients_the_numbers_are_the_same(kind):
    model, inputs = make("llama") if kind is None else with_adapters(make("llama"), kind), batch()
    reader = HeadReader(model)
    outputs = score_streams(reader, model, inputs, STREAMS, 0, entropy=STREAMS)
    with torch.no_grad():
        bare = score_streams(reader, model.eval(), inputs, STREAMS, 0, entropy=STREAMS)
    for name in STREAMS:
        assert torch.equal(bare[name].logps, outputs[name].logps) and not bare[name].logps.requires_grad
        assert torch.equal(bare[name].entropy, outputs[name].entropy) and outputs[name].logps.requires_grad


def test_the_probe_draws_no_random_number_and_leaves_the_mode():
    """With dropout, the first step is that of a trainer that probed long ago; else a resumed run would differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"](**MODELS["gpt2"][1] | {"resid_pdrop": 0.3}))
    model, inputs, found = model.train(), batch(), []
    probed, fresh = HeadReader(model), HeadReader(model)
    score_streams(probed, model, inputs, STREAMS, 0)
    for reader in (probed, fresh):
        torch.manual_seed(1)
        found.append(score_streams(reader, model, inputs, STREAMS, 0)["forget"].logps)
        assert model.training
    assert torch.equal(*found)
    assert not torch.equal(score_streams(probed, model, inputs, STREAMS, 0)["forget"].logps, found[0])


@pytest.mark.parametrize("kind", [None, "on_head"])
def test_bfloat16_autocast(kind):
    """The products are rounded to 8 bits as autocast rounds them, the log-softmax is made in float32."""
    model, inputs = make("llama") if kind is None else with_adapters(make("llama"), kind), batch()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = score_streams(HeadReader(model), model, inputs, STREAMS, 0)
        logits = forward(model, inputs)
    expected = dense_outputs(logits, logits, inputs)
    for name in STREAMS:
        assert outputs[name].logps.dtype == torch.float32
        torch.testing.assert_close(outputs[name].logps[outputs[name].mask], expected[name][0], rtol=1e-6, atol=1e-6)
