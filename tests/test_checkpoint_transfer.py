"""Checkpoint transfer: the formula, which parameters it reaches, the run, its refusals, and two ranks."""

import json

import backends
import pytest
import torch
from test_affine import fit_affine_map, words
from test_equivalence import UPDATE_TOLERANCE, assert_terms_agree
from test_reference import batch_of, llama, make_trainer, with_lora
from test_teacher import states_of
from tiny_world import command, terms, weights

from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.plan import FILLER
from llm_unlearn.errors import UserError
from llm_unlearn.objectives.transfer import activation_transfer

METHOD = "checkpoint_transfer"


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "early"
    llama(seed=7).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def maps(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps") / "map"
    assert fit_affine_map(words(tiny_world, folder)) == 0
    return folder


# ---- The formula ----


def test_activation_transfer_worked_out_by_hand():
    """Two layers, D = 2: (1 + 9) / 2 = 5 and (0 + 4) / 2 = 2, mean 3.5; the gradient is 2 (h - g) / (2 * 2)."""
    hidden = {0: torch.tensor([[[1.0, 2.0]]], requires_grad=True), 3: torch.tensor([[[0.0, 1.0]]], requires_grad=True)}
    taught = {0: torch.tensor([[[2.0, 5.0]]], requires_grad=True), 3: torch.tensor([[[0.0, 3.0]]])}
    loss = activation_transfer({**hidden, 9: torch.ones(1, 1, 2)}, taught)
    loss.sum().backward()
    assert loss.tolist() == [[3.5]]
    assert hidden[0].grad.tolist() == [[[-0.5, -1.5]]] and hidden[3].grad.tolist() == [[[0.0, -1.0]]]
    assert taught[0].grad is None


def test_states_in_bfloat16_are_subtracted_in_float32():
    """256 and 257 are one number in bfloat16; the squares of what is left are not rounded again."""
    hidden = {0: torch.tensor([[[1.0, 3.0]]], dtype=torch.bfloat16)}
    loss = activation_transfer(hidden, {0: torch.tensor([[[257.0, 3.0]]])})
    assert loss.dtype == torch.float32 and loss.item() == 256.0**2 / 2


def test_the_loss_is_the_formula_on_plain_forwards(teacher_folder, tmp_path):
    """Token by token, counted ones alone, with weights and ramps as at step 0: 5 on the forget term, none to retain."""
    trainer = make_trainer(METHOD, tmp_path, teacher_model_name_or_path=teacher_folder, layers=[1, 0])
    batch = batch_of(trainer)
    loss = trainer.compute_loss(trainer.model, batch)
    total = count = 0
    for row, labels in zip(batch["forget"]["input_ids"], batch["forget"]["labels"], strict=True):
        ids = {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
        counted = labels[1:] != -100
        for layer in (0, 1):
            distance = states_of(llama(), ids, layer)[0] - states_of(llama(seed=7), ids, layer)[0]
            total += float(distance[counted].square().mean(-1).sum()) / 2
        count += int(counted.sum())
    assert loss.item() == pytest.approx(5 * total / count, rel=1e-5)
    trainer.state.global_step, trainer.state.max_steps = 1, 2
    assert trainer.weight_of("forget") == 5 * 0.875 and trainer.weight_of("retain") == 2.5


# ---- What it reaches ----


@pytest.mark.parametrize("retain_loss", ["l2", "kl", "nll"])
def test_the_gradient_ends_at_the_highest_layer(retain_loss, teacher_folder, tmp_path):
    """Of the forget term; at step 0 the retain term weighs nothing. With l2 nothing above is in the model at all."""
    flags = {"teacher_model_name_or_path": teacher_folder, "layers": [0], "retain_loss": retain_loss}
    trainer = make_trainer(METHOD, tmp_path, **flags)
    assert trainer.last_layer_for(trainer.args) == (0 if retain_loss == "l2" else None)
    trainer._frozen_reference and trainer._frozen_reference.prepare()
    trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    reached = {name for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.any()}
    expected = {name for name, _ in trainer.model.named_parameters() if "layers.0." in name or "embed" in name}
    # The key's bias-free projection has a gradient too; all of the layer moves.
    assert reached == expected
    assert not any(p.grad is not None for p in trainer.teacher.model.parameters())


def test_a_rank_of_fillers_alone_has_a_loss_of_zero_and_the_same_gradients(teacher_folder, tmp_path):
    """A rank that has run out of rows takes part in the step with zeros, so that no other waits for it."""
    trainer = make_trainer(METHOD, tmp_path, teacher_model_name_or_path=teacher_folder, layers=[0])
    found = []
    for number in (0, FILLER):
        batch = trainer.data_collator([trainer.train_dataset[(name, number)] for name in ("forget", "retain")])
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found.append((loss.item(), {name for name, p in trainer.model.named_parameters() if p.grad is not None}))
        trainer.model.zero_grad()
    assert found[0][0] > 0 and found[1][0] == 0 and found[0][1] == found[1][1]


@pytest.mark.parametrize("lora, retain_loss", [(False, "l2"), (False, "nll"), (True, "kl"), (True, "none")])
def test_training_takes_the_states_to_the_teachers(lora, retain_loss, teacher_folder, tmp_path):
    """A third of the distance in a few steps, whatever holds the retain set."""
    model = with_lora(llama()) if lora else None
    flags = {"layers": [0], "retain_loss": retain_loss, "num_train_epochs": 6, "learning_rate": 0.02}
    flags |= {"optim": "adamw_torch", "forget_weight": 100.0}
    trainer = make_trainer(METHOD, tmp_path, model, teacher_model_name_or_path=teacher_folder, **flags)
    trainer.train()
    logs = [log["loss/forget"] for log in trainer.state.log_history if "loss/forget" in log]
    retain = [log["loss/retain"] for log in trainer.state.log_history if "loss/retain" in log]
    assert logs[-1] < 0.7 * logs[0] and (len(retain) > 0) == (retain_loss != "none")


# ---- Runs ----


def test_a_run_with_a_fitted_map_says_whose_it_was(maps, tiny_world, tmp_path):
    words = command(tiny_world, METHOD, tmp_path / "out", "--affine_map", maps, "--retain_loss", "kl")
    assert main(words) == 0
    found = json.loads((tmp_path / "out/unlearning.json").read_text())["reference"]
    assert found["teacher"]["affine_map"] == str(maps) and found["teacher"]["layers"] == [0, 1]
    assert found["teacher"]["name"] == tiny_world["base"] and found["mode"] == "cached"
    # The map takes the teacher's states to where the model's are, all but what it does not explain.
    mapped = terms(tmp_path / "out")[0]["loss/forget"]
    assert main(command(tiny_world, METHOD, tmp_path / "plain", "--max_steps", 1)) == 0
    assert mapped < terms(tmp_path / "plain")[0]["loss/forget"]


def test_one_stream_after_the_other_gives_the_same_steps(tiny_world, tmp_path):
    for name, flag in (("at_once", "False"), ("in_turn", "True")):
        words = command(tiny_world, METHOD, tmp_path / name, "--sequential_backward", flag, "--learning_rate", "1e-3")
        assert main(words) == 0
    assert_terms_agree(terms(tmp_path / "in_turn"), terms(tmp_path / "at_once"), 1e-5)


def test_without_a_teacher_the_other_method_is_named(tmp_path):
    with pytest.raises(UserError, match=r"needs an ignorant teacher: .*--unlearn_method circuit_breakers"):
        make_trainer(METHOD, tmp_path)


@pytest.mark.parametrize("change", ["tokenizer", "map"])
def test_refusals_of_the_command_line(change, maps, tiny_world, shared_data, tmp_path, capsys):
    flags = {
        "tokenizer": ["--teacher_model_name_or_path", shared_data / "models/stories260K-hf"],
        "map": ["--affine_map", maps, "--teacher_model_name_or_path", tiny_world["model"]],
    }[change]
    assert main(command(tiny_world, METHOD, tmp_path / "out", *flags)) == 2
    message = {"tokenizer": "has another tokenizer", "map": f"fitted to the teacher '{tiny_world['base']}'"}[change]
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*"))


# ---- Two ranks ----


def two_equal_one(backend, flags, world, start_weights, folder):
    given = ["--learning_rate", "1e-3", *map(str, flags)]
    one = backends.train(command(world, METHOD, folder / "one", *given))
    two = backends.train(
        command(world, METHOD, folder / "two", *given, "--per_device_train_batch_size", 2), backend, processes=2
    )
    assert_terms_agree(terms(two), terms(one), 1e-5)
    assert backends.distance(two, one, start_weights) <= UPDATE_TOLERANCE
    if "--use_peft" not in flags:
        found = weights(two)
        assert any(not torch.equal(found[name], value) for name, value in start_weights.items())


@pytest.mark.distributed
def test_two_processes_equal_one_under_fsdp2(maps, tiny_world, start_weights, tmp_path):
    two_equal_one("fsdp2", ["--affine_map", maps], tiny_world, start_weights, tmp_path)


MATRIX = {
    "l2": ["--layers", "0"],
    "kl": ["--retain_loss", "kl", "--gradient_accumulation_steps", "1"],
    "lora": ["--use_peft", "True", "--lora_dropout", "0"],
}


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("kind", MATRIX)
@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_two_processes_equal_one(backend, kind, maps, tiny_world, start_weights, tmp_path):
    flags = [*MATRIX[kind], *(["--affine_map", maps] if kind == "kl" else [])]
    two_equal_one(backend, flags, tiny_world, start_weights, tmp_path)
