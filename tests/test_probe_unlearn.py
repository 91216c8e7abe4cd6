"""Probe unlearning: its loss by an independent computation, where its gradient goes, what is refused, every backend."""

import json
import math
import shutil

import backends
import pytest
import torch
from tiny_world import command, terms, update_distance, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_unlearn.cli.unlearn import build_trainer, main
from llm_unlearn.errors import UserError
from llm_unlearn.parsing import parse
from llm_unlearn.probe import load_probes

METHOD = "probe_unlearn"
CONSTANT = ["--forget_schedule", "constant", "--retain_schedule", "constant"]


def make_trainer(world, folder, *flags):
    trainer, _ = build_trainer(parse(command(world, METHOD, folder, "--use_cpu", "True", *flags)))
    trainer.accelerator.prepare(trainer.model)
    return trainer


def batch_of(trainer, rows=(0, 1, 3)):
    return trainer.data_collator([trainer.train_dataset[("forget", row)] for row in rows])


def plain_forget_loss(model, probes, batch):
    """Mean over layers of (logsumexp - mean) / ln V of each counted token, from logits made one row at a time."""
    stream, found = batch["forget"], []
    for ids, mask, labels in zip(stream["input_ids"], stream["attention_mask"], stream["labels"], strict=True):
        length = int(mask.sum())
        hidden = model(ids[None, :length], output_hidden_states=True).hidden_states
        total = 0.0
        for layer, probe in probes.items():
            # Only an inner layer's entry is what the layer hands on; the last one is normed.
            logits = model.lm_head(model.model.norm(probe(hidden[layer + 1][:, 1:], torch.ones(1, length - 1) > 0)))[0]
            total = total + (logits.logsumexp(-1) - logits.mean(-1)) / math.log(logits.shape[-1])
        found += [total[position - 1] / len(probes) for position in range(1, length) if labels[position] != -100]
    return torch.stack(found)


def test_the_forget_loss_is_the_plain_one(tiny_world, tmp_path):
    trainer = make_trainer(tiny_world, tmp_path, "--layers", "0", *CONSTANT)
    model = AutoModelForCausalLM.from_pretrained(tiny_world["model"])
    batch = batch_of(trainer)
    expected = plain_forget_loss(model, load_probes(tiny_world["probes"], [0]), batch)
    loss = trainer.compute_loss(trainer.model, batch)
    assert len(expected) == int((batch["forget"]["labels"][:, 1:] != -100).sum())
    # By default the forget term weighs 5; float32 in another order.
    assert loss.item() == pytest.approx(5 * expected.mean().item(), rel=1e-5)
    loss.backward()
    (5 * expected.mean()).backward()
    # Not the embedding, to which the plain model's head is tied.
    for name in ("layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight"):
        own, plain = (found.model.get_parameter(name).grad for found in (trainer.model, model))
        torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-6)


def test_the_gradient_reaches_question_tokens_and_no_frozen_part(tiny_world, tmp_path):
    trainer = make_trainer(tiny_world, tmp_path, "--layers", "0", *CONSTANT)
    batch = batch_of(trainer, (3,))
    before = {layer: {n: t.clone() for n, t in p.state_dict().items()} for layer, p in trainer.probes.items()}
    outputs = trainer.forward(trainer.model, batch, layers=[0], scored=("retain",))
    hidden = outputs["forget"].hidden[0]
    hidden.retain_grad()
    trainer.recovered(0, hidden, batch).sum().backward()
    reached = hidden.grad.abs().amax(-1)[0] > 0
    assert not outputs["forget"].mask[0, 0] and reached.all()
    assert not any(p.requires_grad for part in (*trainer.probes.values(), trainer.lens) for p in part.parameters())
    after = {layer: dict(probe.state_dict()) for layer, probe in trainer.probes.items()}
    assert all(
        torch.equal(after[layer][name], tensor) for layer, held in before.items() for name, tensor in held.items()
    )


def test_the_norm_and_the_head_stay_as_they_were_while_the_models_own_train(tiny_world, tmp_path):
    flags = [*CONSTANT, "--retain_loss", "nll", "--learning_rate", "0.05"]
    trainer = make_trainer(tiny_world, tmp_path / "out", *flags)
    held = trainer.lens.head_weight.clone(), trainer.lens.norm.weight.clone()
    trainer.train()
    assert torch.equal(trainer.lens.head_weight, held[0]) and torch.equal(trainer.lens.norm.weight, held[1])
    own = trainer.model.lm_head.weight, trainer.model.model.norm.weight
    assert not torch.equal(own[0], held[0]) and not torch.equal(own[1], held[1])


def test_states_and_readings_end_at_the_highest_layer(tiny_world, tmp_path):
    """With l2 nothing above the highest layer runs; with kl the whole model does. Without --layers all probes count."""
    trainer = make_trainer(tiny_world, tmp_path, "--layers", "0")
    assert trainer.last_layer_for(trainer.args) == 0 and list(trainer.probes) == [0]
    trainer = make_trainer(tiny_world, tmp_path)
    assert trainer.last_layer_for(trainer.args) == 1 and list(trainer.probes) == [0, 1]
    trainer = make_trainer(tiny_world, tmp_path, "--retain_loss", "kl")
    assert trainer.last_layer_for(trainer.args) is None


@pytest.mark.parametrize("retain_loss", ["l2", "kl"])
def test_what_the_probes_recover_becomes_uniform(retain_loss, tiny_world, tmp_path):
    flags = ["--retain_loss", retain_loss, "--optim", "adamw_torch", "--learning_rate", "3e-3", "--max_steps", "10"]
    assert main(command(tiny_world, METHOD, tmp_path / "out", *flags)) == 0
    logged = [log["loss/forget"] for log in terms(tmp_path / "out")]
    assert logged[0] > 1.1 and 1 < logged[-1] < 1 + 0.5 * (logged[0] - 1)
    # The ramp of the retain term begins at 0, where nothing is computed of it.
    assert "loss/retain" not in terms(tmp_path / "out")[0] or terms(tmp_path / "out")[0]["loss/retain"] == 0


def test_defaults_are_the_published_ones(tmp_path):
    args = parse(["--unlearn_method", METHOD, "--probe_dir", "P", "--model_name_or_path", "M", "--domain", "demo"]).args
    assert (args.forget_weight, args.retain_weight, args.retain_loss) == (5, 5, "l2")
    assert (args.forget_schedule, args.retain_schedule) == ("1:0.75", "0:1")


class TestRefusals:
    def test_no_folder(self):
        with pytest.raises(UserError, match=r"--probe_dir is missing; train probes with utils/train_probe\.py"):
            parse(["--unlearn_method", METHOD, "--model_name_or_path", "M", "--domain", "demo"])

    def test_a_layer_without_a_probe(self, tiny_world, tmp_path):
        shutil.copytree(tiny_world["probes"], tmp_path / "probes")
        config = json.loads((tmp_path / "probes/config.json").read_text())
        config["depths"].pop("0")
        (tmp_path / "probes/config.json").write_text(json.dumps(config))
        world = {**tiny_world, "probes": str(tmp_path / "probes")}
        with pytest.raises(UserError, match="has no probe of layer 0; pass --layers out of 1"):
            make_trainer(world, tmp_path / "out", "--layers", "0")

    def test_probes_of_another_model(self, tiny_world, tmp_path):
        with pytest.raises(UserError, match="and this model is another"):
            make_trainer({**tiny_world, "model": tiny_world["base"]}, tmp_path)

    def test_other_probes_in_a_resumed_run(self, tiny_world, tmp_path, capsys):
        shutil.copytree(tiny_world["probes"], tmp_path / "probes")
        world = {**tiny_world, "probes": str(tmp_path / "probes")}
        words = command(world, METHOD, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "1")
        assert main([*words, "--max_steps", "2"]) == 0
        shutil.copy(tmp_path / "probes/layer_0.safetensors", tmp_path / "probes/layer_1.safetensors")
        shutil.rmtree(tmp_path / "out/checkpoint-2")
        assert main([*words, "--max_steps", "2", "--resume_from_checkpoint", "auto"]) == 2
        assert "probes" in capsys.readouterr().err.splitlines()[-1]

    def test_a_model_of_no_files(self, tiny_world, tmp_path):
        from llm_unlearn.methods.probe_unlearn import ProbeUnlearnArguments, ProbeUnlearnTrainer

        model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tiny_world["model"]).config)
        model.config._name_or_path = ""
        args = ProbeUnlearnArguments(str(tmp_path), probe_dir=tiny_world["probes"], retain_loss="none", use_cpu=True)
        tokenizer = AutoTokenizer.from_pretrained(tiny_world["model"])
        with pytest.raises(UserError, match="belong to a model by its files"):
            ProbeUnlearnTrainer(model, args, tiny_world["forget"], processing_class=tokenizer)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("backend", "flags"),
    [
        ("fsdp2", ()),
        pytest.param("zero3", (), marks=pytest.mark.full),
        pytest.param("ddp", ("--use_peft", "True", "--lora_r", "8", "--lora_dropout", "0"), marks=pytest.mark.full),
        pytest.param("fsdp2", ("--retain_loss", "kl"), marks=pytest.mark.full),
        pytest.param("zero3", ("--retain_loss", "kl"), marks=pytest.mark.full),
        pytest.param("zero2", ("--retain_loss", "nll"), marks=pytest.mark.full),
    ],
)
def test_two_processes_equal_one(backend, flags, tiny_world, start_weights, tmp_path):
    one = backends.train(command(tiny_world, METHOD, tmp_path / "one", *flags))
    words = command(tiny_world, METHOD, tmp_path / "two", *flags, "--per_device_train_batch_size", "2")
    two = backends.train(words, backend, 2)
    if "--use_peft" in flags:
        assert backends.distance(two, one) <= 2e-3
    else:
        assert update_distance(weights(two), weights(one), start_weights) <= 2e-4
    for first, second in zip(terms(two), terms(one), strict=True):
        # The gradient of a distance that begins at 0 has length 1 and a direction made of rounding.
        assert first == pytest.approx(second, rel=1e-4, abs=1e-5)


@pytest.mark.full
def test_four_micro_batches_equal_one(tiny_world, start_weights, tmp_path):
    for name, flags in (("one", []), ("four", ["--gradient_accumulation_steps", "4"])):
        size = "1" if flags else "4"
        words = command(tiny_world, METHOD, tmp_path / name, "--per_device_train_batch_size", size, *flags)
        assert main(words) == 0
    first, second = weights(tmp_path / "four"), weights(tmp_path / "one")
    assert update_distance(first, second, start_weights) <= 2e-4
