"""Pulls by the gradient: by hand, against autograd of the explicit penalty, on shards, and resumed from the start."""

import copy
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from backends import BACKENDS, distance, train
from test_equivalence import UPDATE_TOLERANCE
from test_trainer import ROWS
from tiny_world import command, terms, weights

from llm_unlearn.callbacks import FiniteGradients
from llm_unlearn.cli.unlearn import main
from llm_unlearn.errors import UserError
from llm_unlearn.methods.finetune import FinetuneArguments, FinetuneTrainer
from llm_unlearn.methods.max_update import MaxUpdateArguments, MaxUpdateTrainer
from llm_unlearn.objectives.parameters import FLOOR, element_norm, squared_distance, tensor_norm
from llm_unlearn.parameter_pull import ParameterPull, PullToStart

MEASURES = {"squared_distance": squared_distance, "element_norm": element_norm, "tensor_norm": tensor_norm}
SP = ["--regularizer", "l2_sp", "--l2sp_coef", "5"]
# {name: (method, flags)}. The retain term of grad_diff is a divergence, 0 at the start, as the pull is.
KINDS = {
    "l2_sp": ("grad_diff", SP),
    "element_norm": ("max_update", ["--update_weight", "0.01"]),
    "l2": ("max_update", ["--update_norm", "l2", "--update_weight", "0.5"]),
}
OPTIMIZERS = {
    "sgd": ["--optim", "sgd", "--learning_rate", "0.02", "--max_grad_norm", "0.5"],
    "adamw": ["--optim", "adamw_torch", "--learning_rate", "0.002", "--max_grad_norm", "0.5"],
}


# ---- The measures ----


def test_measures_by_hand():
    """Two tensors: one moved by (3, 4), one of eight elements not at all."""
    squares, sizes = torch.tensor([25.0, 0.0], dtype=torch.float64), torch.tensor([2.0, 8.0], dtype=torch.float64)
    values, factors = squared_distance(squares, sizes)
    assert values.tolist() == [25.0, 0.0] and factors.tolist() == [2.0, 2.0]
    values, factors = element_norm(squares, sizes)
    assert values.tolist() == pytest.approx([2 * math.sqrt(12.5 + 1e-8), 8 * 1e-4], rel=1e-14)
    assert factors.tolist() == pytest.approx([1 / math.sqrt(12.5 + 1e-8), 1e4], rel=1e-14)
    values, factors = tensor_norm(squares, sizes)
    assert values.tolist() == [5.0, 0.0] and factors.tolist() == [0.2, 0.0]


def explicit(name, parameter, start):
    """The measure of one tensor as the papers write it."""
    difference = parameter - start
    if name == "squared_distance":
        return difference.square().sum()
    if name == "element_norm":
        return (difference.square().mean() + FLOOR).sqrt() * difference.numel()
    return difference.norm()


@pytest.mark.parametrize("name", MEASURES)
def test_factors_are_the_gradient_that_autograd_finds(name):
    for shape in [(3,), (7, 5), (2, 3, 4), ()]:
        start = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        moved = (start + 0.3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
        value = explicit(name, moved, start)
        value.backward()
        squares, size = (moved - start).detach().square().sum(), torch.tensor(float(moved.numel()))
        found, factor = (part[0] for part in MEASURES[name](squares[None], size[None]))
        torch.testing.assert_close(found, value.detach())
        torch.testing.assert_close(factor * (moved.detach() - start), moved.grad)


@pytest.mark.parametrize("name", ["element_norm", "tensor_norm"])
def test_an_update_s_pull_does_not_grow_with_it(name):
    """At a thousand times the distance the squared distance pulls a thousand times as hard, these two as before."""
    squares, size = torch.tensor([1.0, 1e6], dtype=torch.float64), torch.tensor(4.0)
    length = MEASURES[name](squares, size)[1] * squares.sqrt()
    assert length[1].item() == pytest.approx(length[0].item(), rel=1e-7)
    squared = squared_distance(squares, size)[1] * squares.sqrt()
    assert squared.tolist() == [2.0, 2000.0]


# ---- On an optimizer ----


def stub(model, **options):
    """What a pull asks of a trainer, around a real accelerator."""
    from accelerate import Accelerator

    logged = []
    trainer = SimpleNamespace(
        model=model, accelerator=Accelerator(cpu=True), is_fsdp_enabled=False, is_deepspeed_enabled=False,
        args=SimpleNamespace(device=torch.device("cpu"), world_size=1),
        _log_term=lambda name, value, standalone: logged.append((name, value.item(), standalone)),
    )  # fmt: skip
    trainer.logged = logged
    vars(trainer).update(options)
    return trainer


def test_one_step_by_hand_and_none_after_the_context():
    """theta0 (1, 2), theta (2, 4), coefficient 0.5, rate 0.1: theta - 0.1 * (grad + 2 * 0.5 * (1, 2))."""
    layer = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
    trainer, optimizer = stub(layer), torch.optim.SGD(layer.parameters(), lr=0.1)
    original = trainer.accelerator.prepare
    with PullToStart(trainer, lambda: 0.5).attached():
        _, prepared = trainer.accelerator.prepare(layer, optimizer)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[2.0, 4.0]]))
        layer.weight.grad = torch.tensor([[10.0, -10.0]])
        prepared.step()
        torch.testing.assert_close(layer.weight.detach(), torch.tensor([[2.0 - 1.1, 4.0 + 0.8]]))
        assert trainer.logged == [("l2_sp", 5.0, False)]
    assert trainer.accelerator.prepare == original
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.zeros_like(layer.weight)
    prepared.step()
    assert torch.equal(layer.weight, before) and len(trainer.logged) == 1


def test_a_weight_without_a_gradient_is_left_alone():
    """It does not train in this step, and the others are pulled all the same."""
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False) for _ in range(2)])
    trainer, optimizer = stub(model), torch.optim.SGD(model.parameters(), lr=0.1)
    with PullToStart(trainer, lambda: 0.5).attached():
        _, prepared = trainer.accelerator.prepare(model, optimizer)
        start = [layer.weight.detach().clone() for layer in model]
        with torch.no_grad():
            for layer in model:
                layer.weight.add_(1.0)
        model[1].weight.grad = torch.zeros(2, 2)
        prepared.step()
    torch.testing.assert_close(model[0].weight.detach(), start[0] + 1.0)
    torch.testing.assert_close(model[1].weight.detach(), start[1] + 0.9)
    assert trainer.logged == [("l2_sp", pytest.approx(4.0), False)]


def test_gradients_that_a_scaler_left_scaled_get_a_scaled_pull():
    """theta0 + 1 with gradient 3 and coefficient 0.5: a fused step divides by the scale of 8."""
    layer = torch.nn.Linear(3, 2, bias=False)
    trainer, optimizer = stub(layer), torch.optim.SGD(layer.parameters(), lr=1.0, fused=True)
    with PullToStart(trainer, lambda: 0.5).attached():
        trainer.accelerator.prepare(layer, optimizer)
        start = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight.add_(1.0)
        layer.weight.grad = torch.full((2, 3), 24.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), start + 1 - (3 + 1))


def test_half_gradients_stay_half():
    layer = torch.nn.Linear(3, 2, bias=False).to(torch.bfloat16)
    trainer, optimizer = stub(layer), torch.optim.SGD(layer.parameters(), lr=1.0)
    with PullToStart(trainer, lambda: 0.5).attached():
        _, prepared = trainer.accelerator.prepare(layer, optimizer)
        layer.weight.grad = torch.ones_like(layer.weight)
        prepared.step()
    assert layer.weight.grad.dtype == torch.bfloat16 and layer.weight.grad.eq(1).all()


def test_fsdp_1_is_refused():
    from accelerate.utils import DistributedType

    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP)
    trainer = SimpleNamespace(accelerator=accelerator, is_fsdp2=lambda: False)
    with pytest.raises(
        UserError, match=r"--regularizer l2_sp needs to know which weights a shard holds.*--fsdp_config"
    ):
        PullToStart(trainer, lambda: 1.0)


class Unknown:
    """An optimizer of DeepSpeed that steps what nobody can map to weights."""

    def __init__(self, inner):
        self.optimizer = inner


@pytest.mark.parametrize("swaps", [False, True])
def test_what_deepspeed_steps_out_of_sight_is_refused(swaps):
    from accelerate.optimizer import AcceleratedOptimizer

    layer = torch.nn.Linear(2, 2)
    trainer = stub(layer, is_deepspeed_enabled=True)
    inner = Unknown(torch.optim.SGD(layer.parameters()))
    if swaps:
        inner.fp32_partitioned_groups_flat, inner.swap_optimizer = [], True
    wrapped = AcceleratedOptimizer.__new__(AcceleratedOptimizer)
    wrapped.optimizer = inner
    trainer.accelerator.prepare = lambda *given: wrapped
    pull = ParameterPull(trainer, "update", element_norm, lambda: -1.0, "--unlearn_method max_update")
    with pull.attached(), pytest.raises(UserError, match=r"max_update cannot follow DeepSpeed's Unknown.*zero3.json"):
        trainer.accelerator.prepare(layer)


# ---- In training, on one process ----


@pytest.fixture
def parts(tiny_world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_world["model"]), AutoTokenizer.from_pretrained(tiny_world["model"])


def explicit_training(model, batch, optimizer, penalty, steps, clip):
    """Train on one batch by plain autograd: the mean loss, clipped, and the penalty's gradient, which is not."""
    start = [parameter.detach().clone() for parameter in model.parameters()]
    labels = batch["labels"][:, 1:]
    for _ in range(steps):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        added = torch.autograd.grad(penalty(model.parameters(), start), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), added, strict=True):
            parameter.grad += torch.nan_to_num(gradient)
        optimizer.step()
    return start


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", MEASURES)
def test_training_is_that_of_the_explicit_penalty(name, optimizer, parts, tmp_path, monkeypatch):
    """Four steps of one batch. float32: the clipped gradients of two ways to the same loss differ in the last bits."""
    monkeypatch.setattr(FiniteGradients, "on_pre_optimizer_step", lambda *_, **__: None)
    model, tokenizer = parts
    twin, clip = copy.deepcopy(model), 0.1
    options = {
        "output_dir": str(tmp_path), "max_steps": 4, "save_strategy": "no", "disable_tqdm": True,
        "per_device_train_batch_size": len(ROWS), "max_grad_norm": clip, "lr_scheduler_type": "constant",
        "optim": "sgd" if optimizer == "sgd" else "adamw_torch", "learning_rate": 0.1 if optimizer == "sgd" else 0.001,
    }  # fmt: skip
    if name == "squared_distance":
        args = FinetuneArguments(regularizer=["l2_sp"], l2sp_coef=0.7, **options)
        trainer = FinetuneTrainer(model, args, {"forget": ROWS}, processing_class=tokenizer)
        coefficient = 0.7
    else:
        norm = "l2" if name == "tensor_norm" else name
        args = MaxUpdateArguments(update_norm=norm, update_weight=0.003, **options)
        trainer = MaxUpdateTrainer(model, args, {"retain": ROWS}, processing_class=tokenizer)
        coefficient = -0.003
    (stream,) = trainer.train_dataset.streams
    batch = trainer.data_collator([trainer.train_dataset[stream, row] for row in range(len(ROWS))])[stream]
    trainer.train()

    def penalty(parameters, start):
        return coefficient * sum(explicit(name, *pair) for pair in zip(parameters, start, strict=True))

    made = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    made = made(twin.parameters(), lr=options["learning_rate"], weight_decay=0.0)
    start = explicit_training(twin, batch, made, penalty, 4, clip)
    gap = sum((a - b).double().square().sum() for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    moved = sum((a - b).double().square().sum() for a, b in zip(twin.parameters(), start, strict=True))
    # AdamW divides by the root of a small second moment, which makes the difference of two roundings larger.
    assert (gap / moved).sqrt() < (1e-5 if optimizer == "sgd" else 1e-3)
    history = [log for log in trainer.state.log_history if "loss" in log]
    term = "loss/l2_sp" if name == "squared_distance" else "loss/update"
    assert history[0][term] == pytest.approx({"element_norm": 1e-4 * model.num_parameters()}.get(name, 0.0))
    assert history[1][term] > history[0][term]


@pytest.mark.parametrize("kind", ["l2_sp", "element_norm", "lora"])
def test_a_resumed_run_is_pulled_to_the_start_bit_for_bit(kind, tiny_world, tmp_path):
    """Pulled to the checkpoint instead, the term would be at its least again after the stop."""
    method, flags = KINDS["l2_sp" if kind == "lora" else kind]
    flags = [*flags, *OPTIMIZERS["adamw"], "--save_strategy", "steps", "--save_steps", "1"]
    flags += ["--use_peft", "True", "--lora_dropout", "0"] if kind == "lora" else []
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert main(command(tiny_world, method, whole, *flags)) == 0
    keep_two_steps(whole, part)
    assert main(command(tiny_world, method, part, *flags, "--resume_from_checkpoint", "auto")) == 0
    assert_same_run(part, whole)


def keep_two_steps(whole, part):
    """Copy a run that saved every step, without what came after the second."""
    shutil.copytree(whole, part)
    for path in part.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 2:
            shutil.rmtree(path)


def assert_same_run(part, whole):
    assert terms(part) == terms(whole) and len(terms(whole)) > 2
    found, expected = weights(part), weights(whole)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    name = next(key for key in ("loss/l2_sp", "loss/update") if key in terms(part)[0])
    assert terms(part)[2][name] > 1.01 * terms(part)[0][name]


# ---- On shards ----


def cells():
    """(kind, backend, optimizer, processes): one unmarked run of each kind of shard; three processes cut unevenly."""
    for kind in KINDS:
        for backend in BACKENDS:
            for optimizer, processes in (("adamw", 2), ("sgd", 3)):
                cell = (kind, backend, optimizer, processes)
                is_spared = optimizer == "adamw" and (kind, backend) in {("element_norm", "zero3"), ("l2_sp", "fsdp2")}
                marks = [pytest.mark.distributed, *([] if is_spared else [pytest.mark.full])]
                yield pytest.param(*cell, marks=marks, id="-".join(map(str, cell)))


@pytest.mark.parametrize("kind, backend, optimizer, processes", cells())
def test_shards_are_pulled_as_whole_weights_are(
    kind, backend, optimizer, processes, tiny_world, start_weights, tmp_path
):
    """Clipped and in two micro-batches: the pull comes once per step, after the clipping."""
    method, flags = KINDS[kind]
    flags, one = [*flags, *OPTIMIZERS[optimizer]], tmp_path / "one"
    assert main(command(tiny_world, method, one, *flags, "--per_device_train_batch_size", 2 * processes)) == 0
    cut = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2]
    found = train(command(tiny_world, method, tmp_path / "found", *flags, *cut), backend, processes)
    for here, there in zip(terms(found), terms(one), strict=True):
        assert here == pytest.approx(there, rel=1e-3 if optimizer == "adamw" else 1e-5, abs=1e-5)
    # A push away from the start widens the difference of two roundings, and AdamW divides by a small root. Norms of one
    # process's shards alone would be seen in the terms already.
    assert distance(found, one, start_weights) < 5 * UPDATE_TOLERANCE


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.parametrize("kind", ["l2_sp", "element_norm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_on_two_processes_is_pulled_to_the_start(backend, kind, tiny_world, tmp_path):
    method, flags = KINDS[kind]
    flags = [*flags, *OPTIMIZERS["adamw"], "--save_strategy", "steps", "--save_steps", "1"]
    flags += ["--per_device_train_batch_size", "2"]
    whole, part = train(command(tiny_world, method, tmp_path / "whole", *flags), backend, 2), tmp_path / "part"
    keep_two_steps(whole, part)
    train(command(tiny_world, method, part, *flags, "--resume_from_checkpoint", "auto"), backend, 2)
    assert_same_run(part, whole)
