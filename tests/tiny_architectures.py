"""Tiny causal language models of many architectures, drawn at random, and what their layers and gradients are."""

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from llm_unlearn.activations import capture, decoder_layers

_WIDE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4}
_WIDE |= {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0}
_GROUPED = {**_WIDE, "num_key_value_heads": 2}
_OLD = {"vocab_size": 96, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 64, "bos_token_id": 0}
_OLD |= {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "eos_token_id": 0}
_MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}
# Windows of 4 tokens, so that a layer that got its neighbor's mask would give other numbers.
ARCHITECTURES = {
    "llama": _WIDE,
    "llama_tied": {**_GROUPED, "tie_word_embeddings": True},
    "mistral": {**_GROUPED, "sliding_window": 4},
    "qwen2": {**_GROUPED, "use_sliding_window": True, **_MIXED},
    "gemma2": {**_GROUPED, "head_dim": 8, **_MIXED},
    "gemma3_text": {**_GROUPED, "head_dim": 8, **_MIXED},
    "gpt2": _OLD,
    "gpt_neo": {**_WIDE, "num_layers": 5, "num_heads": 4, "attention_types": [[["global", "local"], 2], [["local"], 1]]}
    | {"window_size": 4, "resid_dropout": 0, "embed_dropout": 0, "attention_dropout": 0},
    "gptj": {**_OLD, "rotary_dim": 4},
    "gpt_neox": _WIDE,
    "opt": {**_WIDE, "ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0},
    "phi": _WIDE,
    "falcon": {**_WIDE, "ffn_hidden_size": 48, "bos_token_id": 0, "eos_token_id": 0},
    "bloom": {**_WIDE, "n_layer": 5, "n_head": 4, "hidden_dropout": 0, "attention_dropout": 0},
    "mpt": {"vocab_size": 96, "d_model": 32, "n_layers": 5, "n_heads": 4, "max_seq_len": 64},
    "mixtral": {**_GROUPED, "num_local_experts": 5},
}
DEPTH, LAST = 5, 3


def make_model(name="llama", **changes):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name.removesuffix("_tied")](**{**ARCHITECTURES[name], **changes})
    return AutoModelForCausalLM.from_config(config).train()


def make_batch():
    """Return ids and mask (3, 13), padded on the right."""
    input_ids = torch.randint(3, 96, (3, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    mask[1, 9:] = mask[2, 5:] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def states(model, *indices):
    """Return the hidden states of layers by a forward of the model as it is."""
    layers = decoder_layers(model)
    with capture(*(layers[index] for index in indices)) as hidden:
        model(**make_batch(), use_cache=False)
    return hidden


def gradients(model, hidden):
    """Return {name: gradient} of a loss on hidden states, of the parameters that it reaches."""
    model.zero_grad()
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden.float() * noise * make_batch()["attention_mask"][..., None]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def assert_same(found, expected):
    assert found.keys() == expected.keys() and len(expected) > 0
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
