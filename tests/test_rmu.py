"""RMU: the right states, the right matrices, nothing above the layer, topics in turn."""

import json
import shutil
import sys
from pathlib import Path

import backends
import pytest
import torch
from layer_reference import first_step, rows_of
from safetensors.torch import load_file
from tiny_architectures import make_model
from tiny_world import command, terms, update_distance, weights

from llm_unlearn.cli.unlearn import main
from llm_unlearn.data.plan import FILLER, BatchPlan
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.errors import UserError
from llm_unlearn.methods import rmu
from llm_unlearn.truncation import truncate

ONE_LAYER = ["--layer", "0"]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("llama", "model.layers.{}.mlp.down_proj.weight"),
        ("mistral", "model.layers.{}.mlp.down_proj.weight"),
        ("qwen2", "model.layers.{}.mlp.down_proj.weight"),
        ("gemma2", "model.layers.{}.mlp.down_proj.weight"),
        ("gpt_neox", "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight"),
        ("gpt2", "transformer.h.{}.mlp.c_proj.weight"),
        ("opt", "model.decoder.layers.{}.fc2.weight"),
    ],
)
def test_the_matrix_of_each_architecture(name, expected):
    assert rmu.trained_names(make_model(name), [1, 3]) == [expected.format(1), expected.format(3)]


def test_other_parameters_by_name_and_what_is_missing():
    model = make_model("mixtral")
    with pytest.raises(UserError, match=r"MixtralForCausalLM has no MLP output matrix.*input_layernorm.weight"):
        rmu.trained_names(model, [0])
    assert rmu.trained_names(model, [0], ["self_attn.o_proj.weight"]) == ["model.layers.0.self_attn.o_proj.weight"]
    with pytest.raises(UserError, match=r"has no mlp.w2.weight; pass --trained_modules with one of"):
        rmu.trained_names(model, [0], ["mlp.w2.weight"])


def test_control_vectors_are_directions_of_the_seed():
    found = rmu.control_vectors(3, 16, 7)
    assert torch.equal(found, rmu.control_vectors(3, 16, 7)) and not torch.equal(found, rmu.control_vectors(3, 16, 8))
    assert (found >= 0).all()
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_first_step_by_a_plain_loop(adaptive, tiny_world, tmp_path):
    flags = ["--layer", "0", "--steering_coef", "3", "--seed", "5", "--adaptive", adaptive]
    log = first_step(tiny_world, tmp_path / "out", "rmu", *flags)
    (vector,) = rmu.control_vectors(1, 128, 5)
    values = []
    for states, counted in rows_of(tiny_world["model"], tiny_world["forget"]):
        own = states[1][1:][counted]
        length = own.norm(dim=-1, keepdim=True) if adaptive else 1.0
        values.append((own - 3 * length * vector).square().mean(-1))
    assert log["loss/forget"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-5)
    assert log["loss/retain"] == pytest.approx(0, abs=1e-9)


def test_without_the_upper_layers_every_bit_is_the_same(tiny_world, start_weights, tmp_path, monkeypatch):
    """Truncated, and with all layers and the head running: the same terms, gradients and weights."""
    assert main(command(tiny_world, "rmu", tmp_path / "cut", *ONE_LAYER)) == 0
    monkeypatch.setattr(rmu.RMUTrainer, "last_layer_for", lambda self, args: None)
    assert main(command(tiny_world, "rmu", tmp_path / "whole", *ONE_LAYER)) == 0
    cut, whole = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(cut[name], whole[name]) for name in whole)
    assert terms(tmp_path / "cut") == terms(tmp_path / "whole")
    moved = [name for name in whole if not torch.equal(whole[name], start_weights[name])]
    assert moved == ["model.layers.0.mlp.down_proj.weight"]


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_a_live_reference_says_what_the_cached_one_says(reference, tiny_world, start_weights, tmp_path):
    flags = [*ONE_LAYER, "--reference", reference, "--learning_rate", "0.05"]
    assert main(command(tiny_world, "rmu", tmp_path / "out", *flags)) == 0
    # By the third step the states have moved; float32 sums over batches of other widths.
    assert terms(tmp_path / "out")[-1]["loss/retain"] > 1e-6
    assert main(command(tiny_world, "rmu", tmp_path / "default", *ONE_LAYER, "--learning_rate", "0.05")) == 0
    assert update_distance(weights(tmp_path / "out"), weights(tmp_path / "default"), start_weights) < 1e-5


def test_steps_take_turns_with_the_topics():
    """Topics of 9 and 6 rows, steps of 4: whole steps alternate, each row comes once, the rest comes last."""
    turns = [0] * 9 + [1] * 6
    lengths = {"forget": list(range(15))}
    plan = BatchPlan({"forget": 15}, 3, 2, accumulation=2, lengths=lengths, turns=turns)
    rows = [row for number in range(len(plan)) for _, row in plan.batch(0, number, 0)]
    steps = [rows[first : first + 4] for first in range(0, 16, 4)]
    assert sorted(row for row in rows if row != FILLER) == list(range(15))
    assert [{turns[row] for row in step} for step in steps[:3]] == [{0}, {1}, {0}]
    cut = BatchPlan({"forget": 15}, 3, 1, world_size=4, lengths=lengths, turns=turns)
    assert [sorted(row for rank in range(4) for _, row in cut.batch(0, n, rank)) for n in range(4)] == [
        sorted(step) for step in steps
    ]


def test_each_topic_has_a_vector_that_is_kept_in_checkpoints(tiny_world, tmp_path):
    path = tmp_path / "topics.jsonl"
    rows = [json.loads(line) for line in Path(tiny_world["forget"]).read_text().splitlines()]
    path.write_text("\n".join(json.dumps({**row, "topic": ("bio", "cyber")[n % 2]}) for n, row in enumerate(rows)))
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "2"]
    words = command({**tiny_world, "forget": str(path)}, "rmu", tmp_path / "out", *ONE_LAYER, *saving)
    assert main(words) == 0
    kept = load_file(tmp_path / "out/checkpoint-1/method_state.safetensors")["control_vectors"]
    assert torch.equal(kept, rmu.control_vectors(2, 128, 42))
    whole = weights(tmp_path / "out")
    for path in (tmp_path / "out").glob("checkpoint-[345]"):
        shutil.rmtree(path)
    assert main([*words, "--resume_from_checkpoint", "auto"]) == 0
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "out").items())


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--layer", "9"], "layer 9 does not exist: the model has layers 0 to 1"),
        (["--layer", "0", "--trained_layers", "1"], "--trained_layers 1 is above --layer 0"),
        (["--layer", "1", "--steering_coef", "0"], "--steering_coef must be > 0"),
        (["--layer", "1", "--use_peft", "True", "--trained_layers", "1"], "no effect with --use_peft"),
        (["--layer", "1", "--trained_modules", "mlp.w2.weight"], "pass --trained_modules with one of"),
        (["--layer", "1", "--retain_loss", "l2"], "--retain_loss"),
    ],
)
def test_mistakes(flags, message, tiny_world, tmp_path, capsys):
    assert main(command(tiny_world, "rmu", tmp_path / "out", *flags)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_step_costs_a_third_of_a_bare_one():
    """32 layers, --layer 7: FLOPs of one training step and its share of the reference, over forward and backward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    from training_meters import flops

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=512, num_hidden_layers=32, max_position_embeddings=64, **shape)
    model = LlamaForCausalLM(config)
    ids = torch.randint(3, 512, (4, 48), generator=torch.Generator().manual_seed(1)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    batch = torch.tensor(ids)
    bare = flops(lambda: model(batch, labels=batch).loss.backward())
    args = rmu.RMUArguments(output_dir="unused", use_cpu=True, per_device_train_batch_size=2, reference="live")
    trainer = rmu.RMUTrainer(model, args, UnlearnDataset({"forget": rows[:2], "retain": rows[2:]}))
    inputs = trainer.data_collator([trainer.train_dataset[(name, n)] for name in ("forget", "retain") for n in (0, 1)])
    trainer.truncation = truncate(model, 7)
    share = flops(lambda: trainer.training_step(model, inputs)) / bare
    trainer.truncation.restore()
    assert 0.15 < share <= 0.33, share


@pytest.mark.distributed
@pytest.mark.parametrize(
    "backend", ["fsdp2", *(pytest.param(name, marks=pytest.mark.full) for name in ("ddp", "zero2", "zero3"))]
)
@pytest.mark.parametrize("reference", ["cached", pytest.param("live", marks=pytest.mark.full)])
def test_two_processes_equal_one(backend, reference, tiny_world, start_weights, tmp_path):
    flags = [*ONE_LAYER, "--reference", reference, "--learning_rate", "0.05"]
    one = backends.train(command(tiny_world, "rmu", tmp_path / "one", *flags))
    words = command(tiny_world, "rmu", tmp_path / "two", *flags, "--per_device_train_batch_size", "2")
    two = backends.train(words, backend, 2)
    assert update_distance(weights(two), weights(one), start_weights) <= 2e-4
    for first, second in zip(terms(two), terms(one), strict=True):
        assert first == pytest.approx(second, rel=1e-5, abs=1e-6)
