"""Tuned-lens unlearning: its loss by an independent computation, where its gradient goes, refusals, every backend."""

import math
import shutil

import backends
import pytest
import torch
from tiny_world import command, terms, update_distance, weights
from transformers import AutoModelForCausalLM

from llm_unlearn import chunked_head
from llm_unlearn.cli.unlearn import build_trainer, main
from llm_unlearn.errors import UserError, run_cli
from llm_unlearn.lens import TunedLens
from llm_unlearn.lens_files import base_model_identity, save_lens
from llm_unlearn.parsing import parse
from llm_unlearn.projection import Projection

METHOD = "tuned_lens"
CONSTANT = ["--forget_schedule", "constant", "--retain_schedule", "constant"]
LAST = 1


def write_lens(model, folder, indices=(0, 1)):
    """Write a lens with translators drawn at random, small ones; returns {i: (weight, bias)}."""
    generator, lens = torch.Generator().manual_seed(7), TunedLens.of(model)
    size = lens.hidden_size
    values = {
        i: (torch.randn(size, size, generator=generator) / (4 * size), torch.randn(size, generator=generator) / 4)
        for i in indices
    }
    lens.add_translators(indices, values)
    save_lens(folder, lens, {"base_model": base_model_identity(model, with_files=True)})
    return values


@pytest.fixture(scope="module")
def lens_world(tiny_world, tmp_path_factory):
    """The tiny world with a lens of its model: (world, {i: (weight, bias)})."""
    folder = tmp_path_factory.mktemp("lens")
    values = write_lens(AutoModelForCausalLM.from_pretrained(tiny_world["model"]), folder)
    return {**tiny_world, "lens": str(folder)}, values


def words(world, folder, *flags):
    return command(world, METHOD, folder, "--lens_path", world["lens"], "--use_cpu", "True", *flags)


def make_trainer(world, folder, *flags):
    trainer, _ = build_trainer(parse(words(world, folder, *flags)))
    trainer.accelerator.prepare(trainer.model)
    return trainer


def batch_of(trainer, rows=(0, 1, 3)):
    return trainer.data_collator([trainer.train_dataset[("forget", row)] for row in rows])


def plain_values(model, values, batch, layers, loss):
    """Mean over layers of the loss of each token that counts, from logits made one row at a time.

    The output of layer 0 is hidden_states[1], which translator 1 reads; that of the last layer is read by none.
    """
    stream, found = batch["forget"], []
    for ids, mask, labels in zip(stream["input_ids"], stream["attention_mask"], stream["labels"], strict=True):
        length = int(mask.sum())
        with torch.no_grad():
            normed = model(ids[None, :length], output_hidden_states=True)
        states = model(ids[None, :length], output_hidden_states=True).hidden_states
        total = 0.0
        for layer in layers:
            if layer == LAST:
                logits = model.lm_head(states[-1])[0]
                assert torch.allclose(logits, normed.logits[0], atol=1e-5)
            else:
                weight, bias = values[layer + 1]
                logits = model.lm_head(model.model.norm(states[layer + 1] + states[layer + 1] @ weight.T + bias))[0]
            logps = logits.log_softmax(-1)
            if loss == "entropy":
                total = total - logps.mean(-1) / math.log(logits.shape[-1])
            else:
                total = total + torch.cat([logps.new_zeros(2), logps[1:-1].gather(-1, ids[2:length, None])[:, 0]])
        found += [total[position] / len(layers) for position in range(1, length) if labels[position] != -100]
    return torch.stack(found)


@pytest.mark.parametrize("loss", ["entropy", "cross_entropy"])
@pytest.mark.parametrize("layers", [[0], [0, 1]])
def test_the_forget_loss_and_its_gradient_are_the_plain_ones(loss, layers, lens_world, tmp_path):
    world, values = lens_world
    trainer = make_trainer(world, tmp_path, "--lens_loss", loss, "--layers", *map(str, layers), *CONSTANT)
    model = AutoModelForCausalLM.from_pretrained(world["model"])
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    batch = batch_of(trainer)
    expected = 5 * plain_values(model, values, batch, layers, loss).mean()
    found = trainer.compute_loss(trainer.model, batch)
    # By default the forget term weighs 5; float32 in another order.
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    expected.backward()
    for name in ("layers.0.self_attn.q_proj.weight", "layers.0.mlp.down_proj.weight", "embed_tokens.weight"):
        own, plain = (one.model.get_parameter(name).grad for one in (trainer.model, model))
        torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-5)


def test_the_first_counted_token_of_an_answer_is_scored_from_the_state_before_it(lens_world, tmp_path):
    """Row 3 begins with a question, so that each of its answer's tokens has a value under cross_entropy."""
    trainer = make_trainer(lens_world[0], tmp_path, "--lens_loss", "cross_entropy", *CONSTANT)
    batch = batch_of(trainer, (3,))
    outputs = trainer.forward(trainer.model, batch, layers=[0], scored=("retain",))
    found = trainer.lens_values(batch["forget"])(0, outputs["forget"].hidden[0])
    assert not outputs["forget"].mask[0, 0] and torch.equal(found != 0, outputs["forget"].mask)


def test_the_gradient_ends_at_the_layer_and_the_lens_is_no_part_of_the_model(lens_world, tmp_path):
    trainer = make_trainer(lens_world[0], tmp_path, "--layers", "0", "--retain_loss", "kl", *CONSTANT)
    assert trainer.last_layer_for(trainer.args) is None
    trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    reached = {name for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("layers.0." in name for name in reached) and not any("layers.1." in name for name in reached)
    # The head, to which the embedding is tied, and the norm that the lens reads through are copies.
    assert "model.norm.weight" not in reached
    held = {id(p) for p in trainer.model.parameters()}
    assert not any(p.requires_grad or id(p) in held for p in (*trainer.lens.parameters(), *trainer.lens.buffers()))
    assert make_trainer(lens_world[0], tmp_path, "--layers", "0").last_layer_for(trainer.args) is None


@pytest.mark.parametrize("loss", ["entropy", "random_target", "cross_entropy"])
def test_the_vocabulary_is_held_for_a_few_tokens_of_one_layer_at_a_time(loss, lens_world, tmp_path, monkeypatch):
    trainer = make_trainer(lens_world[0], tmp_path, "--lens_loss", loss, *CONSTANT)
    batch, gradients, rows = batch_of(trainer), [], []
    original = Projection.logits

    def counting(self, hidden, *rest):
        rows.append(len(hidden))
        return original(self, hidden, *rest)

    monkeypatch.setattr(Projection, "logits", counting)
    for elements in (2**23, 4 * len(trainer.lens.head_weight)):
        monkeypatch.setitem(chunked_head._CHUNK_ELEMENTS, "cpu", elements)
        trainer.model.zero_grad()
        rows.clear()
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append(trainer.model.model.layers[0].mlp.down_proj.weight.grad.clone())
    assert max(rows) == 4 and len(rows) > 2 * len(trainer.layers)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


def test_only_the_layers_that_are_read_run_where_the_retain_term_reads_states(lens_world, tmp_path):
    trainer = make_trainer(lens_world[0], tmp_path, "--layers", "0")
    assert trainer.last_layer_for(trainer.args) == 0 and {*trainer.lens.translators} == {"1"}
    assert make_trainer(lens_world[0], tmp_path).last_layer_for(trainer.args) == 0


def test_the_lens_stays_as_it_was_while_the_models_own_norm_and_head_train(lens_world, tmp_path):
    trainer = make_trainer(
        lens_world[0], tmp_path / "out", *CONSTANT, "--retain_loss", "nll", "--learning_rate", "0.05"
    )
    held = {name: tensor.clone() for name, tensor in trainer.lens.state_dict().items()}
    trainer.train()
    assert all(torch.equal(tensor, held[name]) for name, tensor in trainer.lens.state_dict().items())
    own = trainer.model.lm_head.weight, trainer.model.model.norm.weight
    assert not torch.equal(own[0], held["head_weight"]) and not torch.equal(own[1], held["norm.weight"])


def test_random_targets_are_drawn_by_seed_row_and_step_and_have_the_entropy_form_as_mean(lens_world, tmp_path):
    trainer = make_trainer(lens_world[0], tmp_path, "--lens_loss", "random_target", *CONSTANT)
    batch, one = batch_of(trainer), batch_of(trainer, (1,))
    with torch.no_grad():
        outputs = trainer.forward(trainer.model, batch, layers=[0], scored=("retain",))
        hidden, mask = outputs["forget"].hidden[0], outputs["forget"].mask
        first = trainer.lens_values(batch["forget"])(0, hidden)
        assert torch.equal(first, trainer.lens_values(batch["forget"])(0, hidden))
        width = one["forget"]["labels"].shape[1] - 1
        alone = trainer.lens_values(one["forget"])(0, hidden[1:2, :width])
        torch.testing.assert_close(alone[0], first[1, :width])
        total = 0.0
        for trainer.state.global_step in range(300):
            total = total + trainer.lens_values(batch["forget"])(0, hidden)
        assert not torch.equal(total / 300, first)
        trainer.args.lens_loss = "entropy"
        expected = trainer.lens_values(batch["forget"])(0, hidden)[mask].mean()
    # 300 draws at some 40 tokens; the spread of a draw is about a third of its mean.
    assert (total / 300)[mask].mean() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize(("loss", "retain_loss"), [("entropy", "l2"), ("random_target", "kl"), ("entropy", "nll")])
def test_what_the_lens_reads_becomes_uniform(loss, retain_loss, lens_world, tmp_path):
    """1 is uniform: a third of what is above it goes within ten steps."""
    flags = ["--lens_loss", loss, "--retain_loss", retain_loss]
    flags += ["--optim", "adamw_torch", "--learning_rate", "5e-3", "--max_steps", "10"]
    assert main(words(lens_world[0], tmp_path / "out", *flags)) == 0
    logged = [log["loss/forget"] for log in terms(tmp_path / "out")]
    assert logged[0] > 1.1 and logged[-1] < 1 + 2 / 3 * (logged[0] - 1)
    assert loss != "entropy" or logged[-1] > 1


def test_cross_entropy_makes_the_true_token_unlikely_to_the_lens(lens_world, tmp_path):
    flags = ["--lens_loss", "cross_entropy", "--optim", "adamw_torch", "--learning_rate", "5e-3", "--max_steps", "6"]
    assert main(words(lens_world[0], tmp_path / "out", *flags)) == 0
    logged = [log["loss/forget"] for log in terms(tmp_path / "out")]
    assert logged[-1] < logged[0] - 0.5


def test_defaults_are_the_published_ones():
    given = ["--unlearn_method", METHOD, "--lens_path", "logit", "--model_name_or_path", "M", "--domain", "demo"]
    args = parse(given).args
    assert (args.forget_weight, args.retain_weight, args.retain_loss, args.lens_loss) == (5, 5, "l2", "entropy")
    assert (args.forget_schedule, args.retain_schedule) == ("1:0.75", "0:1")


class TestRefusals:
    @pytest.mark.parametrize(
        ("flags", "expected"),
        [
            ([], "--lens_path is missing; train a lens with utils/train_tuned_lens"),
            (["--lens_path", "logit", "--lens_loss", "ce"], "invalid choice: 'ce'"),
            (["--lens_path", "logit", "--allow_pickle_lens", "True"], "--allow_pickle_lens has no effect"),
            (["--lens_path", "logit", "--layers", "0", "0"], "--layers must name at least one layer, and each once"),
        ],
    )
    def test_flags_that_cannot_be(self, flags, expected):
        with pytest.raises(UserError, match=expected):
            parse(["--unlearn_method", METHOD, "--model_name_or_path", "M", "--domain", "demo", *flags])

    def test_an_unknown_loss_of_the_python_interface(self):
        from llm_unlearn.methods.tuned_lens import TunedLensArguments

        with pytest.raises(UserError, match="--lens_loss must be entropy, random_target or cross_entropy, but is 'ce'"):
            TunedLensArguments("out", lens_path="logit", lens_loss="ce", use_cpu=True)

    def test_the_lens_of_another_model_is_one_sentence(self, lens_world, tmp_path, capsys):
        world = {**lens_world[0], "model": lens_world[0]["base"]}
        assert run_cli(lambda: main(words(world, tmp_path / "out"))) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"was trained on '{lens_world[0]['model']}'" in said and f"this run's model is '{world['base']}'" in said

    def test_a_layer_that_is_not_there_or_has_no_translator(self, lens_world, tmp_path):
        with pytest.raises(UserError, match="layer 2 does not exist: the model has layers 0 to 1"):
            make_trainer(lens_world[0], tmp_path, "--layers", "2")
        write_lens(AutoModelForCausalLM.from_pretrained(lens_world[0]["model"]), tmp_path / "lens", [0])
        world = {**lens_world[0], "lens": str(tmp_path / "lens")}
        with pytest.raises(
            UserError, match="no translator for the output of layer 0, which is 1; pass --layers out of 1"
        ):
            make_trainer(world, tmp_path)
        # The last layer's output needs none.
        assert not make_trainer(world, tmp_path, "--layers", "1").lens.translators

    def test_a_resumed_run_with_another_lens(self, lens_world, tmp_path, capsys):
        folder = tmp_path / "lens"
        shutil.copytree(lens_world[0]["lens"], folder)
        world = {**lens_world[0], "lens": str(folder)}
        given = words(world, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "2")
        assert main(given) == 0
        shutil.rmtree(folder)
        write_lens(AutoModelForCausalLM.from_pretrained(world["model"]), folder, [1])
        assert main([*given, "--resume_from_checkpoint", "True"]) == 2
        assert "lens was" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("backend", "flags"),
    [
        ("zero3", ()),
        pytest.param("fsdp2", ("--retain_loss", "kl"), marks=pytest.mark.full),
        pytest.param("fsdp2", ("--lens_loss", "random_target"), marks=pytest.mark.full),
        pytest.param("zero3", ("--retain_loss", "kl", "--layers", "0"), marks=pytest.mark.full),
        pytest.param("ddp", ("--layers", "0", "--retain_loss", "nll"), marks=pytest.mark.full),
        pytest.param("ddp", ("--use_peft", "True", "--lora_r", "8", "--lora_dropout", "0"), marks=pytest.mark.full),
        pytest.param("zero2", ("--lens_loss", "cross_entropy"), marks=pytest.mark.full),
    ],
)
def test_two_processes_equal_one(backend, flags, lens_world, start_weights, tmp_path):
    world = lens_world[0]
    one = backends.train(words(world, tmp_path / "one", *flags))
    two = backends.train(words(world, tmp_path / "two", *flags, "--per_device_train_batch_size", "2"), backend, 2)
    if "--use_peft" in flags:
        assert backends.distance(two, one) <= 2e-3
    else:
        assert update_distance(weights(two), weights(one), start_weights) <= 2e-4
    for first, second in zip(terms(two), terms(one), strict=True):
        # The gradient of a distance that begins at 0 has length 1 and a direction made of rounding.
        assert first == pytest.approx(second, rel=1e-4, abs=1e-5)


@pytest.mark.full
def test_four_micro_batches_equal_one_and_one_stream_after_the_other_too(lens_world, start_weights, tmp_path):
    runs = {
        "one": ["4"],
        "four": ["1", "--gradient_accumulation_steps", "4"],
        "each": ["4", "--sequential_backward", "True"],
    }
    for name, (size, *flags) in runs.items():
        given = words(lens_world[0], tmp_path / name, "--per_device_train_batch_size", size, *flags)
        assert main(given) == 0
    for name in ("four", "each"):
        found = update_distance(weights(tmp_path / name), weights(tmp_path / "one"), start_weights)
        assert found <= 2e-4, name


@pytest.mark.full
def test_a_real_model_forgets_through_its_lens(shared_data, tmp_path):
    """stories260K-tofu-hf, a lens of 60 steps, then 12 steps: a third of what the forget term has above 1 goes, and the
    NLL of the forget answers rises by more than 1 nat, that of the retain answers by less than half of one."""
    from test_methods import answer_nll
    from test_train_tuned_lens import run

    model, rows = shared_data / "models/stories260K-tofu-hf", shared_data / "tofu_small"
    train = ["--model_name_or_path", model, "--domain", "custom", "--forget_data", rows / "forget.jsonl"]
    assert run([*train, "--output_dir", tmp_path / "lens", "--max_steps", 60, "--learning_rate", 0.01]) == 0
    given = [
        "--unlearn_method",
        METHOD,
        "--lens_path",
        tmp_path / "lens",
        *train,
        "--retain_data",
        rows / "retain.jsonl",
    ]
    given += ["--output_dir", tmp_path / "out", "--optim", "adamw_torch", "--learning_rate", "1e-3", "--max_steps", 12]
    given += ["--per_device_train_batch_size", 8, "--retain_loss", "kl", "--save_strategy", "no", "--use_cpu", "True"]
    assert main([str(word) for word in given]) == 0
    world = {"forget": rows / "forget.jsonl", "retain": rows / "retain.jsonl"}
    rise = {name: answer_nll(tmp_path / "out", world, name) - answer_nll(model, world, name) for name in world}
    logged = [log["loss/forget"] for log in terms(tmp_path / "out")]
    assert logged[-1] < 1 + 2 / 3 * (logged[0] - 1) and rise["forget"] > 1 > 2 * rise["retain"], (logged, rise)
