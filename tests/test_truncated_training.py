"""A truncated model in training: what gets gradients, what is saved, and the same on two ranks."""

import os

import pytest
import ranks
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_architectures import DEPTH, make_batch, make_model, states
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from llm_unlearn.activations import capture, run_from_layer
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.models import train_only
from llm_unlearn.truncation import truncate


def test_train_only_leaves_no_other_gradient_and_no_other_optimizer_state(tmp_path):
    model = make_model()
    names = train_only(model, ["model.layers.[1-2].mlp.down_proj.weight", "*.3.self_attn.o_proj.weight"])
    assert names == [f"model.layers.{i}.mlp.down_proj.weight" for i in (1, 2)] + [
        "model.layers.3.self_attn.o_proj.weight"
    ]
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    groups = trainer.create_optimizer().param_groups
    held = {id(p) for group in groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if name in names}
    model(**make_batch(), labels=make_batch()["input_ids"]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == names
    below, above = states(model, 0, 1)
    assert not below.requires_grad and above.requires_grad


def test_train_only_knows_tied_weights_and_names_a_near_one():
    model = make_model("llama_tied")
    assert train_only(model, ["lm_head.weight"]) == ["model.embed_tokens.weight"]
    assert train_only(model, ["*"]) == [name for name, _ in model.named_parameters()]
    with pytest.raises(
        UserError, match=r"is named 'model.layer.2.mlp.down_proj.weight'; did you mean 'model.layers.2."
    ):
        train_only(model, ["model.layer.2.mlp.down_proj.weight"])
    with pytest.raises(UserError, match="name at least one"):
        train_only(model, [])
    model.model.norm.weight = torch.nn.Parameter(torch.zeros(32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match=r"'model\.norm\.weight' is quantized"):
        train_only(model, ["model.norm.weight"])


def save(model, truncation, folder, state_dict=None):
    """Save a truncated model as the trainer does."""
    full = truncation.full_state_dict(state_dict)
    with truncation.whole(to_run=False):
        model.save_pretrained(folder, state_dict=full)


def step(model, layer, learning_rate=0.1):
    """One step of SGD on the hidden states of a layer."""
    (hidden,) = states(model, layer)
    hidden.pow(2).mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate).step()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "gpt_neox"])
def test_what_is_saved_is_the_whole_model(name, tmp_path):
    model = make_model(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    truncation = truncate(model, 2)
    step(model, 2)
    save(model, truncation, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config.num_hidden_layers == DEPTH
    after = loaded.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    tied = {"lm_head.weight"} if loaded.config.tie_word_embeddings else set()
    assert tied <= moved <= set(model.state_dict()) | tied
    assert any(".2." in key for key in moved) and not any(".3." in key or ".4." in key for key in moved)
    model.eval()
    with truncation.whole() as whole:
        assert torch.equal(whole(**make_batch()).logits, loaded(**make_batch()).logits)
        assert not any(module.training for module in whole.modules())
    assert len(decoder_layers(model)) == 3 and states(model.train(), 2)[0].requires_grad


def test_adapters_of_every_layer_are_saved(tmp_path):
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["down_proj"]))
    before = {key.replace(".default", ""): p.clone() for key, p in model.state_dict().items() if "lora" in key}
    truncation = truncate(model, 2)
    step(model, 2)
    save(model, truncation, tmp_path)
    after = load_file(tmp_path / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert moved == [f"base_model.model.model.layers.{i}.mlp.down_proj.lora_B.weight" for i in range(3)]


def train_on_two_ranks(words):
    """Train a truncated model under DDP or FSDP2 and save it; a rank's `main`."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.utils import DistributedType

    backend, name, folder = words
    state = PartialState(cpu=True)
    plugin = None
    if backend == "fsdp2":
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    assert accelerator.is_fsdp2 == (backend == "fsdp2") and accelerator.num_processes == 2
    model = make_model(name)
    truncation = truncate(model, 2)
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    rows = slice(None, 2) if accelerator.is_main_process else slice(1, None)
    batch = {key: value[rows] for key, value in make_batch().items()}
    for _ in range(2):
        layers = decoder_layers(wrapped)
        with capture(layers[0], layers[2]) as hidden:
            wrapped(**batch, use_cache=False)
        with torch.no_grad():
            again = run_from_layer(wrapped, hidden[0].detach(), 1, 2, batch["attention_mask"])
        assert torch.equal(again, hidden[1])
        accelerator.backward(hidden[1].pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    state_dict = accelerator.get_state_dict(wrapped)
    if accelerator.is_main_process:
        save(model, truncation, folder, state_dict)
    accelerator.wait_for_everyone()
    return os.EX_OK


@pytest.mark.distributed
@pytest.mark.parametrize(("backend", "name"), [("ddp", "llama"), ("fsdp2", "llama"), ("fsdp2", "gpt2")])
def test_two_ranks_train_the_truncated_model_and_save_the_whole(backend, name, tmp_path):
    outcome = ranks.run(train_on_two_ranks, [backend, name, tmp_path], processes=2)
    assert outcome.codes == [0, 0], outcome
    model = make_model(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        (hidden,) = states(model, 2)
        # Row 1 is in both ranks' batches.
        (hidden[:2].pow(2).mean() / 2 + hidden[1:].pow(2).mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for key, expected in model.state_dict().items():
        # Sums in another order; the steps are of 1e-3 and more.
        torch.testing.assert_close(found[key], expected, rtol=0, atol=1e-7)
        assert torch.equal(found[key], before[key]) or not (".3." in key or ".4." in key)
