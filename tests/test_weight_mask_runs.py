"""Weight masks in whole runs: with what else acts on gradients, resumed, on every backend, published, and refused."""

import json
import logging
import shutil

import pytest
import torch
from backends import BACKENDS, distance, train
from test_equivalence import UPDATE_TOLERANCE
from test_parameter_pull import stub
from test_weight_mask import same_bits, written
from tiny_world import command, terms, weights

from llm_unlearn.addons.mask_files import linear_weights
from llm_unlearn.addons.weight_mask import WeightMask
from llm_unlearn.cli.unlearn import main
from llm_unlearn.errors import UserError
from llm_unlearn.models import load_model, model_fingerprint

ADAMW = ["--optim", "adamw_torch", "--learning_rate", "0.003", "--weight_decay", "0.1", "--max_grad_norm", "0.5"]
SGD = ["--optim", "sgd", "--learning_rate", "0.02", "--weight_decay", "0.1", "--max_grad_norm", "0.5"]
OPTIMIZERS = {"adamw": ADAMW, "sgd": SGD}


# ---- In training ----


def mask_of(start_weights, ratio=0.6, seed=0, whole=()):
    """Return {name: bool} that leaves out some weights of each tensor, and none of those in `whole`."""
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.rand(value.shape, generator=generator) < ratio for name, value in start_weights.items()}
    return {**found, **{name: torch.ones_like(found[name]) for name in whole}}


@pytest.fixture(scope="module")
def mask(start_weights):
    return mask_of(start_weights, whole=["model.norm.weight"])


@pytest.fixture
def file(mask, tiny_world, tmp_path):
    return written(
        tmp_path / "mask.safetensors", mask, model_hash=model_fingerprint(tiny_world["model"]), score="random"
    )


def assert_held(folder, start_weights, mask):
    """What is left out has the very bits that it began with; of what trains almost everything moved."""
    found, moved = weights(folder), 0
    assert found.keys() == start_weights.keys()
    for name, value in found.items():
        assert same_bits(value[~mask[name]], start_weights[name][~mask[name]]), name
        moved += int((value != start_weights[name])[mask[name]].sum())
    assert moved > 0.9 * sum(int(bits.sum()) for bits in mask.values())


def assert_forgotten(checkpoint, mask):
    """Every state tensor of a plain checkpoint is 0 where the mask of some parameter of its shape is, and not all 0."""
    masks, count = {}, 0
    for bits in mask.values():
        masks.setdefault(tuple(bits.shape), []).append(bits)
    for moments in torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values():
        for value in (value for value in moments.values() if torch.is_tensor(value) and value.dim()):
            assert any(not value[~bits].any() for bits in masks[tuple(value.shape)]) and value.any()
            count += 1
    assert count >= len(mask)


def test_a_run_holds_what_is_left_out_and_says_so(tiny_world, start_weights, mask, file, tmp_path):
    """The state of a checkpoint is 0 where the mask is; unlearning.json has the mask's record."""
    words = command(tiny_world, "grad_diff", tmp_path / "out", *ADAMW, "--weight_mask", file)
    assert main([*words, "--save_strategy", "steps", "--save_steps", "3"]) == 0
    assert_held(tmp_path / "out", start_weights, mask)
    assert_forgotten(tmp_path / "out/checkpoint-3", mask)
    record = json.loads((tmp_path / "out/unlearning.json").read_text())["weight_mask"]
    kept, size = (sum(int(count(bits)) for bits in mask.values()) for count in (torch.sum, torch.numel))
    assert record["trained_share"] == kept / size and record["score"] == "random" and record["file"] == file


def test_a_mask_that_leaves_out_nothing_changes_nothing(tiny_world, start_weights, tmp_path):
    whole = written(tmp_path / "mask.safetensors", mask_of(start_weights, whole=start_weights))
    for name, flags in (("plain", []), ("masked", ["--weight_mask", whole])):
        assert main(command(tiny_world, "npo", tmp_path / name, *ADAMW, *flags)) == 0
    found, expected = weights(tmp_path / "masked"), weights(tmp_path / "plain")
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert terms(tmp_path / "masked") == terms(tmp_path / "plain")


def test_the_clipped_step_has_the_length_that_was_asked_for(tiny_world, start_weights, file, tmp_path):
    """One step of SGD clipped to 0.01; were the norm that of all gradients, the masked ones would fall short of it."""
    flags = ["--max_steps", "1", "--max_grad_norm", "0.01", "--learning_rate", "1", "--weight_mask", file]
    assert main(command(tiny_world, "gradient_ascent", tmp_path / "out", *flags)) == 0
    found = weights(tmp_path / "out")
    moved = sum((found[name] - value).double().square().sum() for name, value in start_weights.items()) ** 0.5
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


WITH = {
    "l2_sp": ("grad_diff", ["--regularizer", "l2_sp", "--l2sp_coef", "5"]),
    "l1_sparse": ("l1_sparse", []),
    "max_update": ("max_update", []),
    "accumulation": ("npo", ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4"]),
    "one after the other": ("grad_diff", ["--sequential_backward", "True"]),
}
PARTLY = {
    "layers above are out": ("rmu", ["--retain_loss", "none"]),
    "phases": ("sequential", []),
    "filtered": ("sequential", ["--same_sign_grads", "True"]),
}


@pytest.mark.parametrize("name", [*WITH, *PARTLY])
def test_a_mask_goes_with_what_else_acts_on_gradients(name, tiny_world, start_weights, mask, file, tmp_path):
    """Of methods that train some parameters, the others are held anyway."""
    method, flags = {**WITH, **PARTLY}[name]
    assert main(command(tiny_world, method, tmp_path / "out", *ADAMW, *flags, "--weight_mask", file)) == 0
    if name in WITH:
        assert_held(tmp_path / "out", start_weights, mask)
        return
    found, moved = weights(tmp_path / "out"), 0
    for key, value in start_weights.items():
        assert same_bits(found[key][~mask[key]], value[~mask[key]]), key
        moved += int((found[key] != value).sum())
    assert moved > 1000


def keep_two_steps(whole, part):
    """Copy a run that saved every step, without what came after the second."""
    shutil.copytree(whole, part)
    for path in part.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > 2:
            shutil.rmtree(path)


def assert_same_run(part, whole):
    found, expected = weights(part), weights(whole)
    assert terms(part) == terms(whole) and len(terms(whole)) > 2
    assert all(same_bits(found[key], expected[key]) for key in expected)


def test_a_resumed_run_is_the_unbroken_one_and_needs_the_same_mask(
    tiny_world, start_weights, mask, file, tmp_path, capsys
):
    """The same mask in another place will do; another one, or none, will not."""
    flags = [*ADAMW, "--save_strategy", "steps", "--save_steps", "1"]
    assert main(command(tiny_world, "grad_diff", tmp_path / "whole", *flags, "--weight_mask", file)) == 0
    keep_two_steps(tmp_path / "whole", tmp_path / "part")
    flags += ["--resume_from_checkpoint", "auto"]
    other = written(tmp_path / "other.safetensors", mask_of(start_weights, seed=1))
    for given in (["--weight_mask", other], []):
        assert main(command(tiny_world, "grad_diff", tmp_path / "part", *flags, *given)) == 2
        assert "weight_mask was" in capsys.readouterr().err.splitlines()[-1]
    shutil.copy(file, tmp_path / "copy.safetensors")
    given = ["--weight_mask", tmp_path / "copy.safetensors"]
    assert main(command(tiny_world, "grad_diff", tmp_path / "part", *flags, *given)) == 0
    assert_same_run(tmp_path / "part", tmp_path / "whole")


@pytest.mark.full
@pytest.mark.parametrize("optimizer", ["sophia", "soul_legacy", "muon"])
def test_our_own_optimizers_remember_nothing_of_what_is_left_out(
    optimizer, tiny_world, start_weights, mask, file, tmp_path
):
    """Momentum and curvature are 0 there, also where Muon would have mixed them."""
    words = command(tiny_world, "npo", tmp_path / "out", *ADAMW[2:], "--weight_mask", file)
    place = words.index("--optim")
    words = [*words[:place], *words[place + 2 :], "--unlearn_optimizer", optimizer]
    assert main([*words, "--save_strategy", "steps", "--save_steps", "3"]) == 0
    assert_held(tmp_path / "out", start_weights, mask)
    assert_forgotten(tmp_path / "out/checkpoint-3", mask)


# ---- Published masks ----


def test_published_masks_are_taken(tiny_world, start_weights, mask, tmp_path, caplog):
    """WAGLE's {name: bool}, and Wanda's numbers, which leave all but the linear layers to train."""
    torch.save(mask, tmp_path / "tofu_0.8.pt")
    names = [name for name, _ in linear_weights(load_model(tiny_world["model"]))]
    torch.save({number: mask[name] for number, name in enumerate(names)}, tmp_path / "wanda.pt")
    wanda = {name: mask[name] if name in names else torch.ones_like(mask[name]) for name in mask}
    with caplog.at_level(logging.WARNING):
        for path, expected in (("tofu_0.8.pt", mask), ("wanda.pt", wanda)):
            flags = ["--weight_mask", tmp_path / path, "--allow_pickle_mask", "True"]
            assert main(command(tiny_world, "gradient_ascent", tmp_path / f"{path}_out", *ADAMW, *flags)) == 0
            assert_held(tmp_path / f"{path}_out", start_weights, expected)
    assert "nothing tells whether the mask" in caplog.text


# ---- Refusals ----


def bad_masks(mask):
    """{what is wrong: (the mask, its record, what is said)}."""
    nothing = {name: torch.zeros_like(bits) for name, bits in mask.items()}
    without = {name: bits for name, bits in mask.items() if name != "model.norm.weight"}
    turned = {**mask, "model.layers.0.mlp.down_proj.weight": mask["model.layers.0.mlp.down_proj.weight"].T.contiguous()}
    twin = {**mask, "lm_head.weight": ~mask["model.embed_tokens.weight"]}
    return {
        "other model": (
            mask,
            {"model_hash": "abc", "model": "the_other"},
            "for other weights than those of .* those of ",
        ),
        "unknown name": (
            {**mask, "model.norms.weight": mask["model.norm.weight"]},
            {},
            "which the model does not have; near is 'model.norm.weight'",
        ),
        "shape": (turned, {}, r"has the shape .* for 'model.layers.0.mlp.down_proj.weight', but the model \("),
        "missing name": (without, {}, "does not say which weights of 'model.norm.weight' train"),
        "nothing left": (nothing, {}, "leaves no weight to train; pass one of a larger --ratio"),
        "tied": (twin, {}, "tells 'lm_head.weight' and 'model.embed_tokens.weight' apart, which are one in the model"),
    }


@pytest.mark.parametrize("name", ["other model", "unknown name", "shape", "missing name", "nothing left", "tied"])
def test_a_mask_that_does_not_fit_is_refused(name, tiny_world, mask, tmp_path):
    given, record, message = bad_masks(mask)[name]
    trainer = stub(load_model(tiny_world["model"]), on_first_rank=lambda function: function())
    file = written(tmp_path / "mask.safetensors", given, **record)
    trainer.args.weight_mask, trainer.args.allow_pickle_mask = file, False
    with pytest.raises(UserError, match=message):
        WeightMask(trainer)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--weight_mask", "{file}", "--use_peft", "True"], "leave out --use_peft or the mask"),
        (["--allow_pickle_mask", "True"], "--allow_pickle_mask has no effect without --weight_mask FILE"),
        (["--weight_mask", "missing.safetensors"], "make it: python utils/make_weight_mask.py"),
    ],
)
def test_flags_without_effect_are_refused(flags, message, tiny_world, file, tmp_path, capsys):
    given = [flag.format(file=file) for flag in flags]
    assert main(command(tiny_world, "gradient_ascent", tmp_path / "out", *given)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


# ---- On shards ----


def cells():
    """(backend, optimizer, processes): one unmarked; AdamW decays weights and SGD gradients; three cut unevenly."""
    for backend in BACKENDS:
        for optimizer, processes in (("adamw", 2), ("sgd", 3)):
            marks = [pytest.mark.distributed]
            marks += [] if (backend, optimizer) == ("zero2", "adamw") else [pytest.mark.full]
            yield pytest.param(backend, optimizer, processes, marks=marks, id=f"{backend}-{optimizer}-{processes}")


@pytest.mark.parametrize("backend, optimizer, processes", cells())
def test_shards_hold_what_whole_weights_do(
    backend, optimizer, processes, tiny_world, start_weights, mask, file, tmp_path
):
    """Clipped, decayed, pulled to 0 and in two micro-batches; SGD's step has the length of the masked gradient."""
    flags, one = [*OPTIMIZERS[optimizer], "--weight_mask", file], tmp_path / "one"
    method = "grad_diff" if optimizer == "adamw" else "l1_sparse"
    assert main(command(tiny_world, method, one, *flags, "--per_device_train_batch_size", 2 * processes)) == 0
    cut = ["--per_device_train_batch_size", 1, "--gradient_accumulation_steps", 2]
    found = train(command(tiny_world, method, tmp_path / "found", *flags, *cut), backend, processes)
    assert_held(found, start_weights, mask)
    assert distance(found, one, start_weights) < UPDATE_TOLERANCE
    for here, there in zip(terms(found), terms(one), strict=True):
        assert here == pytest.approx(there, rel=1e-3, abs=1e-5)


@pytest.mark.distributed
@pytest.mark.full
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_on_two_processes_is_the_unbroken_one(backend, tiny_world, start_weights, mask, file, tmp_path):
    flags = [*ADAMW, "--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "2"]
    flags += ["--weight_mask", file]
    whole, part = train(command(tiny_world, "grad_diff", tmp_path / "whole", *flags), backend, 2), tmp_path / "part"
    keep_two_steps(whole, part)
    train(command(tiny_world, "grad_diff", part, *flags, "--resume_from_checkpoint", "auto"), backend, 2)
    assert_same_run(part, whole)
    assert_held(part, start_weights, mask)
