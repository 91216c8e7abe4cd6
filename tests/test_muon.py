"""Muon beside AdamW in one optimizer: whose weights are whose, torch's own steps, saved, scheduled, sharded."""

import copy
import json
import shutil

import pytest
import torch
from backends import start, train
from peft import LoraConfig, get_peft_model
from test_equivalence import assert_terms_agree
from test_reference import llama, make_trainer
from test_resume import BY_TWO, SAVING, assert_same_checkpoint, bit_equal, history
from test_sophia import DEFAULT_OPTIM
from tiny_world import command, terms, update_distance, weights
from transformers import GPT2Config, GPT2LMHeadModel

from llm_unlearn.addons.muon import MuonWithAdamW
from llm_unlearn.addons.optimizers import stepping_optimizer
from llm_unlearn.cli.unlearn import main
from llm_unlearn.errors import UserError
from llm_unlearn.memory.optimizers import optimizer_memory

MUON = ["--optim", DEFAULT_OPTIM, "--max_grad_norm", "1", "--learning_rate", "1e-4", "--unlearn_optimizer", "muon"]
# The matrices are orthogonalized in bfloat16, which turns a gradient's last digit into its third: measured 2e-3.
TOLERANCE = 1e-2


def model_of(shapes):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]


def gradients(parameters, step):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in parameters]


def run(parameters, optimizers, steps, schedulers=()):
    for number in steps:
        for parameter, gradient in zip(parameters, gradients(parameters, number), strict=True):
            parameter.grad = gradient
        for part in (*optimizers, *schedulers):
            part.step()


def muon_on(parameters, matrix=0):
    """Muon for one matrix; a decay of 0.1 on all but the last."""
    groups = [{"params": parameters[:-1], "weight_decay": 0.1}, {"params": parameters[-1:], "weight_decay": 0.0}]
    optimizer = MuonWithAdamW(groups, lr=0.02, is_matrix=lambda p: p is parameters[matrix])
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


@pytest.mark.parametrize("shape", [(4, 3), (3, 7), (5, 5), (1, 6)])
def test_each_part_steps_as_torchs_own_optimizer(shape):
    """A matrix, an embedding and a norm, under a schedule."""
    ours = model_of([shape, (5, 3), (3,)])
    theirs = copy.deepcopy(ours)
    optimizer, schedule = muon_on(ours)
    muon = torch.optim.Muon(theirs[:1], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": [theirs[1]], "weight_decay": 0.1}, {"params": [theirs[2]], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95))
    others = [torch.optim.lr_scheduler.LambdaLR(part, lambda step: 1 / (1 + step)) for part in (muon, adamw)]
    run(ours, [optimizer], range(4), [schedule])
    run(theirs, [muon, adamw], range(4), others)
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-7) for a, b in zip(ours, theirs, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [0.004] * 3


def test_one_matrix_moves_by_its_orthogonal_part():
    """g = diag(3, 1): every singular value becomes about 1, so W moves by 0.2 * sqrt(2) * 0.1 along both axes."""
    (weight,) = model_of([(2, 2)])
    before = weight.detach().clone()
    optimizer = MuonWithAdamW([{"params": [weight]}], lr=0.1, is_matrix=lambda p: True)
    weight.grad = torch.tensor([[3.0, 0.0], [0.0, -1.0]])
    optimizer.step()
    moved = (before - weight.detach()) / (0.2 * 2**0.5 * 0.1)
    # torch's five iterations leave singular values between 0.7 and 1.2.
    assert moved.abs().diagonal().min() > 0.6 and moved.abs().diagonal().max() < 1.3
    assert moved[0, 0] > 0 > moved[1, 1] and moved[0, 1].abs() < 0.02
    assert torch.allclose(optimizer.state[weight]["momentum_buffer"], 0.05 * weight.grad)


def test_a_loaded_state_goes_on_bit_for_bit():
    ours = model_of([(4, 3), (5, 3), (3,)])
    optimizer, schedule = muon_on(ours)
    run(ours, [optimizer], range(2), [schedule])
    other = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    again, other_schedule = muon_on(other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_schedule.load_state_dict(schedule.state_dict())
    run(ours, [optimizer], range(2, 5), [schedule])
    run(other, [again], range(2, 5), [other_schedule])
    assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


def test_what_has_no_gradient_stays():
    ours = model_of([(4, 3), (5, 3), (3,)])
    before = copy.deepcopy(ours)
    optimizer, _ = muon_on(ours)
    ours[2].grad = torch.ones(3)
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(ours, before, strict=True)] == [True, True, False]


# ---- Whose weights ----


def muons(trainer):
    """Return the names of the parameters that are Muon's, and all others that train."""
    optimizer = trainer.create_optimizer()
    own = {id(p) for group in optimizer.param_groups if group["is_muon"] for p in group["params"]}
    assert len({id(p) for group in optimizer.param_groups for p in group["params"]}) == sum(
        p.requires_grad for p in trainer.model.parameters()
    )
    names = [(name, id(p) in own) for name, p in trainer.model.named_parameters() if p.requires_grad]
    return {name for name, is_own in names if is_own}, {name for name, is_own in names if not is_own}


def made(folder, model, **flags):
    return make_trainer("grad_diff", folder, model, optim=DEFAULT_OPTIM, unlearn_optimizer="muon", **flags)


def test_matrices_of_the_layers_are_muons_and_nothing_else(tmp_path):
    own, rest = muons(made(tmp_path, llama(tie_word_embeddings=False)))
    assert len(own) == 2 * 7 and all(name.startswith("model.layers.") and "proj" in name for name in own)
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= rest
    assert {name for name in rest if ".layers." in name} == {
        f"model.layers.{n}.{norm}_layernorm.weight" for n in (0, 1) for norm in ("input", "post_attention")
    }


def test_biases_are_adamws_in_other_architectures(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=64)
    own, rest = muons(made(tmp_path, GPT2LMHeadModel(config)))
    assert own == {
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert "transformer.h.0.attn.c_attn.bias" in rest and "transformer.wpe.weight" in rest


def test_the_factors_of_adapters_are_muons(tmp_path):
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    own, rest = muons(made(tmp_path, model, weight_decay=0.1))
    assert len(own) == 2 * 2 * 2 and not rest


def test_decay_is_that_of_transformers(tmp_path):
    trainer = made(tmp_path, llama(), weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    assert [(group["is_muon"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (True, 0.1, 14), (False, 0.1, 1 + (not trainer.model.config.tie_word_embeddings)), (False, 0.0, 5)
    ]  # fmt: skip


# ---- Runs ----


def test_accumulation_changes_nothing(tiny_world, start_weights, tmp_path):
    found = []
    for shape in ((4, 1), (1, 4)):
        cut = ["--per_device_train_batch_size", shape[0], "--gradient_accumulation_steps", shape[1]]
        found.append(train(command(tiny_world, "grad_diff", tmp_path / str(shape), *MUON, *cut)))
    assert_terms_agree(terms(found[1]), terms(found[0]), 1e-3)
    assert update_distance(weights(found[1]), weights(found[0]), start_weights) <= TOLERANCE


def test_a_resumed_run_is_the_unbroken_one(tiny_world, tmp_path):
    flags = [*MUON, *SAVING, *BY_TWO, "--weight_decay", "0.1", "--lr_scheduler_type", "linear"]
    whole, part = train(command(tiny_world, "grad_diff", tmp_path / "whole", *flags)), tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoint-3")
    assert main(command(tiny_world, "grad_diff", part, *flags, "--resume_from_checkpoint", "auto")) == 0
    assert bit_equal(weights(part), weights(whole)) and history(part) == history(whole)
    assert_same_checkpoint(part / "checkpoint-3", whole / "checkpoint-3")


def test_phases_split_its_groups(tiny_world, tmp_path):
    flags = [*MUON, "--retain_loss", "nll", "--layer_step", "1", *SAVING]
    folder = train(command(tiny_world, "sequential", tmp_path / "out", *flags))
    groups = torch.load(folder / "checkpoint-3/optimizer.pt", weights_only=True)["param_groups"]
    assert [group["is_muon"] for group in groups] == [True, True, False, False]


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("backend", ["fsdp2", "ddp"])
def test_two_processes_equal_one_and_resume(backend, tiny_world, start_weights, tmp_path):
    expected = train(command(tiny_world, "grad_diff", tmp_path / "one", *MUON))
    flags = [*MUON, *SAVING, "--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    found = train(command(tiny_world, "grad_diff", tmp_path / "two", *flags), backend, processes=2)
    assert_terms_agree(terms(found), terms(expected), 1e-3)
    assert update_distance(weights(found), weights(expected), start_weights) <= TOLERANCE
    shutil.copytree(found, tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoint-3")
    words = command(tiny_world, "grad_diff", tmp_path / "part", *flags, "--resume_from_checkpoint", "auto")
    part = train(words, backend, processes=2)
    assert bit_equal(weights(part), weights(found)) and history(part) == history(found)


@pytest.mark.full
@pytest.mark.distributed
def test_deepspeed_is_refused(tiny_world, tmp_path):
    outcome = start(command(tiny_world, "grad_diff", tmp_path / "out", *MUON), "zero2")
    assert outcome.codes == [2]
    assert "muon needs whole matrices, which DeepSpeed flattens" in outcome.said[0].splitlines()[-1]


def test_an_older_torch_is_refused(tmp_path, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"muon needs PyTorch 2\.9 or newer"):
        made(tmp_path, llama())


def test_memory_is_estimated(tmp_path):
    """One momentum for each weight of a matrix of a layer, two for the others."""
    shapes = (((512, 64), torch.float32, True), ((100, 64), torch.float32, False), ((64,), torch.float32, False))
    found = optimizer_memory("muon", None, shapes, "cpu")
    assert (found.is_known, found.state) == (True, 4 * (2 * 512 * 64 + 100 * 64 + 2 * 64))


def test_the_run_records_it(tiny_world, tmp_path):
    trainer = made(tmp_path, llama(), max_steps=1)
    trainer.train()
    assert type(stepping_optimizer(trainer.optimizer)) is MuonWithAdamW
    assert json.loads(json.dumps(trainer.run_state()))["settings"]["unlearn_optimizer"] == "muon"
