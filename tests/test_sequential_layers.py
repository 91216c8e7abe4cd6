"""`sequential`: one layer trains at a time and the others are really still; what the forget rows see; any backend."""

import contextlib
import math
import shutil

import backends
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_equivalence import UPDATE_TOLERANCE, assert_terms_agree
from test_reference import batch_of, make_trainer, move, rows
from tiny_architectures import make_model
from tiny_world import command, terms, update_distance, weights
from transformers import TrainerCallback

from llm_unlearn.activations import capture, run_from_layer
from llm_unlearn.cli.unlearn import main
from llm_unlearn.decoder import decoder_layers
from llm_unlearn.errors import UserError
from llm_unlearn.head import counted_labels, counted_positions
from llm_unlearn.lens import TunedLens
from llm_unlearn.lens_files import base_model_identity, save_lens
from llm_unlearn.objectives.entropy import uniform_cross_entropy
from llm_unlearn.objectives.likelihood import token_logps

ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.3, "lr_scheduler_type": "linear"}
MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 1e-2, "weight_decay": 0.3}


def three_layers(**changes):
    return make_model(**{"num_hidden_layers": 3, "initializer_range": 0.3, **changes})


def with_lora(model, **changes):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **changes))


class Watch(TrainerCallback):
    """Keeps the weights before each step, and the gradients and the rate that each step is taken with."""

    def __init__(self, trainer):
        self.model, self.weights, self.gradients = trainer.model, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.weights.append({name: p.detach().clone() for name, p in self.model.named_parameters()})

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})

    def on_train_end(self, args, state, control, **kwargs):
        self.on_step_begin(args, state, control)

    def moved(self):
        """Return, for each step, the decoder layers of the parameters that it changed."""
        pairs = zip(self.weights, self.weights[1:], strict=False)
        return [{layer_of(name) for name in old if not torch.equal(old[name], new[name])} for old, new in pairs]


def layer_of(name):
    """Return the index of a parameter's decoder layer, None outside."""
    return int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None


def watched(folder, model=None, **flags):
    """Train with a phase for each of three layers, two steps each; returns (trainer, Watch)."""
    flags = {"layer_step": 1, "end_layer": 0, "max_steps": 6, "retain_schedule": "0.25:1", **flags}
    trainer = make_trainer("sequential", folder, model or three_layers(), **flags)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train()
    return trainer, watch


@pytest.mark.parametrize("flags", [ADAMW, MOMENTUM], ids=["adamw", "momentum"])
def test_one_layer_at_a_time_moves_in_spite_of_momentum_and_decay(flags, tmp_path):
    trainer, watch = watched(tmp_path, **flags)
    assert watch.moved() == [{2}, {2}, {1}, {1}, {0}, {0}]
    assert [{layer_of(name) for name in step} for step in watch.gradients] == [{2}, {2}, {1}, {1}, {0}, {0}]
    assert all(p.requires_grad == (layer_of(name) is not None) for name, p in trainer.model.named_parameters())
    # The last layer's moments alone are in memory.
    held = trainer.optimizer.optimizer.state
    assert 0 < len(held) == len(list(decoder_layers(trainer.model)[0].parameters()))


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_each_phase_is_as_one_that_runs_alone(lora, tmp_path):
    """The second phase equals a run of it alone on what the first one left: schedule, moments, weights of the terms.

    Every step reads all four rows of either set, so that which steps they are makes no difference.
    """
    flags = {"data": {"forget": rows(4, 2), "retain": rows(4, 3)}, "retain_loss": "nll", **MOMENTUM}
    flags |= {"lr_scheduler_type": "linear"}
    model, again = ((with_lora(three_layers()) if lora else three_layers()) for _ in range(2))
    _, all_phases = watched(tmp_path / "all", again, **flags)
    model.load_state_dict(all_phases.weights[2], strict=False)
    _, alone = watched(tmp_path / "alone", model, **flags, start_layer=1, end_layer=1, max_steps=2)
    for name, value in alone.weights[-1].items():
        torch.testing.assert_close(value, all_phases.weights[4][name], rtol=0, atol=1e-6)
    assert alone.moved() == [{0, 1, 2} if lora else {1}] * 2


def test_l2_sp_holds_the_layer_that_trains(tmp_path):
    def distance(watch):
        return sum((watch.weights[-1][name] - value).square().sum() for name, value in watch.weights[0].items())

    _, free = watched(tmp_path / "free", **MOMENTUM)
    trainer, held = watched(tmp_path / "held", regularizer=["l2_sp"], l2sp_coef=10.0, **MOMENTUM)
    assert held.moved() == [{2}, {2}, {1}, {1}, {0}, {0}] and distance(held) < distance(free)
    assert all("loss/l2_sp" in log for log in trainer.state.log_history if "loss" in log)


def test_the_clip_is_over_the_layer_that_trains(tmp_path):
    trainer, watch = watched(tmp_path, max_grad_norm=0.5, **ADAMW)
    logged = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    norms = [torch.stack([g.norm() for g in step.values()]).norm().item() for step in watch.gradients]
    # As of after the clip, which is of the layer's own norm.
    assert len(logged) == 6 and all(norm > 0.5 for norm in logged)
    assert norms == pytest.approx([0.5] * 6, rel=1e-4)


def test_the_rate_that_is_logged_starts_anew_with_each_layer(tmp_path):
    trainer, _ = watched(tmp_path, **ADAMW)
    logged = [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
    assert logged == pytest.approx([1e-2, 5e-3] * 3)


def test_the_weights_of_the_terms_go_through_their_range_in_each_phase(tmp_path):
    """Factors 1 and 0.875 of the forget weight 10, 0.25 and 0.625 of the retain weight 5."""
    trainer = make_trainer("sequential", tmp_path, three_layers(), layer_step=1, retain_schedule="0.25:1")
    assert (trainer.weight_of("forget"), trainer.weight_of("retain")) == (10, 1.25)
    trainer.state.max_steps, found = 6, []
    for trainer.state.global_step in range(6):
        found.append((trainer.target_layer(), trainer.weight_of("forget"), trainer.weight_of("retain")))
    assert [layer for layer, *_ in found] == [2, 2, 1, 1, 0, 0]
    assert [pair for _, *pair in found] == [[10, 1.25], [8.75, 3.125]] * 3


def test_unlearned_layers_can_go_on_training(tmp_path):
    _, watch = watched(tmp_path, maintain_unlearned=True, **ADAMW)
    assert watch.moved() == [{2}, {2}, {2, 1}, {2, 1}, {2, 1, 0}, {2, 1, 0}]


def test_the_backward_ends_at_the_layer_that_trains(tmp_path, monkeypatch):
    """Also with gradient checkpointing, for which transformers lets the embedding's output require gradients."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    required, original = [], LlamaDecoderLayer.forward

    def forward(self, hidden_states, *args, **kwargs):
        if torch.is_grad_enabled():
            required.append(hidden_states.requires_grad)
        return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    watched(tmp_path, retain_loss="nll")
    assert required[:3] == [False, False, False] and required[-3:] == [False, True, True]


# ---- Resuming ----

SAVING = ["--save_strategy", "steps", "--save_steps", "1", "--num_train_epochs", "2", "--warmup_ratio", "0.3"]
SAVING += [
    "--optim",
    "adamw_torch",
    "--learning_rate",
    "1e-3",
    "--weight_decay",
    "0.1",
    "--lr_scheduler_type",
    "cosine",
]


def resumed(words, folder, step, run):
    """Return the weights of a run that goes on from one of its checkpoints."""
    part = folder.with_name(f"part{step}")
    shutil.copytree(folder, part)
    for path in part.glob("checkpoint-*"):
        if int(path.name.split("-")[1]) > step:
            shutil.rmtree(path)
    words = [str(part) if word == str(folder) else word for word in words]
    run([*words, "--resume_from_checkpoint", "auto"])
    return weights(part)


LORA = ["--use_peft", "True", "--lora_r", "2"]


@pytest.mark.parametrize("extra, steps", [([], (2, 3)), (LORA, (4,))], ids=["whole", "lora"])
def test_a_resumed_run_equals_the_unbroken_one(extra, steps, tiny_world, tmp_path):
    """From the middle of the first phase, from its last step, and from the middle of the second phase."""
    words = command(tiny_world, "sequential", tmp_path / "whole", *SAVING, *extra)
    assert main(words) == 0
    expected = weights(tmp_path / "whole")
    for step in steps:
        found = resumed(words, tmp_path / "whole", step, lambda line: main(line) and pytest.fail("it ended otherwise"))
        assert all(torch.equal(found[name], expected[name]) for name in expected), step


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_a_resumed_run_equals_the_unbroken_one_on_two_processes(backend, tiny_world, tmp_path):
    words = command(tiny_world, "sequential", tmp_path / "whole", *SAVING, "--per_device_train_batch_size", "2")
    expected = weights(backends.train(words, backend, 2))
    for step in (2, 3):
        found = resumed(words, tmp_path / "whole", step, lambda line: backends.train(line, backend, 2))
        assert all(torch.equal(found[name], expected[name]) for name in expected), step


# ---- Several processes ----


@pytest.mark.distributed
@pytest.mark.parametrize(
    "backend",
    ["fsdp2", "zero3", *(pytest.param(name, marks=pytest.mark.full) for name in ("ddp", "zero2"))],
)
def test_two_processes_equal_one_and_hold_the_other_layers_still(backend, tiny_world, start_weights, tmp_path):
    """Six steps: the first three train layer 1, the others layer 0."""
    flags = [*SAVING, "--save_steps", "3", "--max_grad_norm", "1"]
    one = backends.train(command(tiny_world, "sequential", tmp_path / "one", *flags))
    shape = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    two = backends.train(command(tiny_world, "sequential", tmp_path / "two", *flags, *shape), backend, processes=2)
    # AdamW makes steps of equal size of gradients that are 0 up to rounding.
    assert update_distance(weights(two), weights(one), start_weights) <= 2 * UPDATE_TOLERANCE
    assert_terms_agree(terms(two), terms(one), 1e-4)
    half, end = weights(two / "checkpoint-3"), weights(two)
    for before, after, layer in ((start_weights, half, 1), (half, end, 0)):
        assert {layer_of(name) for name in before if not torch.equal(before[name], after[name])} == {layer}


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize("extra", [[], ["--map", "lens", "--lens_path", "logit"]], ids=["base", "lens"])
def test_two_processes_equal_one_with_adapters(backend, extra, tiny_world, tmp_path):
    """Without a retain term nothing but the anchor gives the adapters above the layer a gradient."""
    flags = [*LORA, "--lora_dropout", "0", "--num_train_epochs", "2", *extra]
    flags += ["--retain_loss", "none", "--retain_schedule", "0:1"]
    one = backends.train(command(tiny_world, "sequential", tmp_path / "one", *flags))
    words = command(tiny_world, "sequential", tmp_path / "two", *flags, "--per_device_train_batch_size", "2")
    two = backends.train(words, backend, processes=2)
    assert backends.distance(two, one) <= UPDATE_TOLERANCE


# ---- The terms ----


def forget_alone(trainer, layer, inputs):
    """Return (loss, {name: gradient}) of the forget term at the start of a layer's phase."""
    trainer._only = "forget"
    trainer.state.max_steps = len(trainer.phase_layers)
    trainer.state.global_step = trainer.phase_layers.index(layer)
    with trainer.adapter_rows.installed():
        loss = trainer.compute_loss(trainer.model.train(), inputs)
        loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return loss.item(), gradients


def entropy_through_base(model, stream, layer):
    """Return the mean max-entropy loss of a stream: adapters up to a layer, base layers above, by two forwards."""
    layers, depth = decoder_layers(model), len(decoder_layers(model))
    inputs = {name: stream[name] for name in ("input_ids", "attention_mask")}
    with capture(layers[layer]) as found:
        model(**inputs, use_cache=False)
    hidden = found[0]
    with model.disable_adapter() if layer + 1 < depth else contextlib.nullcontext():
        if layer + 1 < depth:
            hidden = run_from_layer(model, hidden, layer + 1, depth - 1, inputs["attention_mask"])
    base = model.get_base_model()
    logits = base.lm_head(base.model.norm(hidden))[:, :-1][counted_positions(stream)]
    return uniform_cross_entropy(logits).mean() / math.log(logits.shape[-1])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layer", [2, 1, 0])
def test_the_forget_rows_see_the_base_model_above_the_layer(layer, checkpointing, tmp_path):
    flags = {"layer_step": 1, "end_layer": 0, "forget_weight": 1.0, "gradient_checkpointing": checkpointing}
    trainer = make_trainer("sequential", tmp_path, with_lora(three_layers()), **flags)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    move(trainer.model)
    inputs = batch_of(trainer)
    loss, gradients = forget_alone(trainer, layer, inputs)
    trainer.model.gradient_checkpointing_disable()
    expected = entropy_through_base(trainer.model, inputs["forget"], layer)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            continue
        if layer_of(name) > layer:
            assert name in gradients and not gradients[name].any()
        else:
            assert gradients[name].any()
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_retain_rows_of_the_same_forward_have_all_adapters(tmp_path):
    flags = {"layer_step": 1, "end_layer": 0, "retain_schedule": "constant"}
    trainer = make_trainer("sequential", tmp_path, with_lora(three_layers()), **flags)
    move(trainer.model)
    inputs, found = batch_of(trainer), {}
    trainer.state.max_steps, trainer.state.global_step = 3, 2
    original = trainer._forget_term
    trainer._forget_term = lambda outputs, inputs: (found.update(outputs), original(outputs, inputs))[1]
    with trainer.adapter_rows.installed():
        trainer.compute_loss(trainer.model.eval(), inputs)
    assert trainer.target_layer() == 0
    for name, expected in (("retain", True), ("forget", False)):
        stream = inputs[name]
        with capture(decoder_layers(trainer.model)[2]) as own:
            trainer.model(input_ids=stream["input_ids"], attention_mask=stream["attention_mask"], use_cache=False)
        close = torch.allclose(found[name].hidden[2], own[0][:, 1:], atol=1e-5)
        assert close == expected


def test_adapters_train_in_every_phase(tmp_path):
    _, watch = watched(tmp_path, with_lora(three_layers()), retain_loss="nll", **ADAMW)
    assert watch.moved() == [{0, 1, 2}] * 6


def test_npo_worked_out_by_hand(tmp_path):
    """-log sigmoid(-beta * (mean logp - mean reference logp)): log 2 before anything moved, without a factor 2/beta."""
    flags = {"forget_loss": "npo", "beta": 0.5, "forget_weight": 1.0, "retain_loss": "none", "retain_schedule": "0:1"}
    trainer = make_trainer("sequential", tmp_path, three_layers(), **flags)
    trainer._frozen_reference.prepare()
    inputs = batch_of(trainer)
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(math.log(2), rel=1e-6)

    def mean_logps():
        stream = inputs["forget"]
        logits = trainer.model(input_ids=stream["input_ids"], attention_mask=stream["attention_mask"]).logits
        mask = counted_positions(stream)
        found = token_logps(logits[:, :-1][mask], counted_labels(stream)).split(mask.sum(-1).tolist())
        return torch.stack([row.mean() for row in found])

    with torch.no_grad():
        before = mean_logps()
        move(trainer.model)
        ratio = mean_logps() - before
    expected = (1 + (0.5 * ratio).exp()).log().mean()
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("flags, choices", [({"forget_loss": "top_k", "top_k": 5}, 5), ({}, 96)])
@pytest.mark.parametrize("mapped", ["base", "lens"])
def test_the_entropy_of_the_last_layer_worked_out_from_logits(mapped, flags, choices, tmp_path):
    """Through the base model a state predicts the next token; through a lens each forget token's own state is read."""
    flags = {**flags, "forget_weight": 1.0, "retain_loss": "none", "retain_schedule": "0:1"}
    flags |= {"map": "lens", "lens_path": "logit"} if mapped == "lens" else {}
    trainer = make_trainer("sequential", tmp_path, three_layers(), **flags)
    inputs = batch_of(trainer)
    stream = inputs["forget"]
    logits = trainer.model(input_ids=stream["input_ids"], attention_mask=stream["attention_mask"]).logits
    mask = counted_positions(stream)
    read = logits[:, :-1][mask] if mapped == "base" else logits[:, 1:][mask]
    largest = read.double().sort(-1).values[:, -choices:]
    expected = (largest.exp().sum(-1).log() - largest.mean(-1)).mean() / math.log(choices)
    assert trainer.compute_loss(trainer.model, inputs).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("layer", [2, 1, 0])
def test_a_layer_is_read_through_the_translator_of_what_it_hands_on(layer, tmp_path):
    """The output of layer 0 is hidden_states[1], which is translator 1's; the last layer's goes through none."""
    model = three_layers()
    lens = TunedLens.of(model, [1, 2])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lens.translators.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_lens(tmp_path / "lens", lens, {"base_model": base_model_identity(model)})
    flags = {"map": "lens", "lens_path": str(tmp_path / "lens"), "layer_step": 1, "end_layer": 0, "forget_weight": 1.0}
    trainer = make_trainer("sequential", tmp_path, model, **flags, retain_loss="none")
    inputs = batch_of(trainer)
    trainer.state.max_steps, trainer.state.global_step = 3, 2 - layer
    stream, translators = inputs["forget"], lens.translators
    with torch.no_grad():
        output = model(
            input_ids=stream["input_ids"], attention_mask=stream["attention_mask"], output_hidden_states=True
        )
        states = output.hidden_states[layer + 1]
        corrected = states if layer == 2 else model.model.norm(states + translators[str(layer + 1)](states))
        read = model.lm_head(corrected)[:, 1:][counted_positions(stream)]
        found = trainer.compute_loss(model, inputs)
    expected = uniform_cross_entropy(read).mean() / math.log(96)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_lens_of_another_model_is_refused(tmp_path):
    model = three_layers()
    save_lens(tmp_path / "lens", TunedLens.of(model, [1, 2]), {"base_model": base_model_identity(model)})
    move(model)
    with pytest.raises(UserError, match=r"the lens '.*' was trained on"):
        make_trainer("sequential", tmp_path, model, map="lens", lens_path=str(tmp_path / "lens"), layer_step=1)


def test_no_layer_above_runs_with_a_lens(tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    ran, original = [], LlamaDecoderLayer.forward

    def forward(self, *args, **kwargs):
        ran.append(self.self_attn.layer_idx)
        return original(self, *args, **kwargs)

    flags = {"map": "lens", "lens_path": "logit", "start_layer": 1, "retain_loss": "none", "retain_schedule": "0:1"}
    trainer = make_trainer("sequential", tmp_path, three_layers(num_hidden_layers=4), max_steps=1, **flags)
    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    trainer.train()
    assert ran == [0, 1]


# ---- Bad input ----


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"start_layer": 3}, r"--start_layer 3 does not exist: the model has layers 0 to 2"),
        ({"start_layer": 0, "end_layer": 1}, r"--end_layer 1 is above --start_layer 0"),
        ({"layer_step": 0}, r"--layer_step must be at least 1"),
        ({"layers": [0]}, r"--layers 0 is below layer 2, which trains first"),
        ({"layers": [2], "retain_loss": "nll"}, r"--layers has no effect with --retain_loss nll"),
        ({"forget_loss": "ascent"}, r"--forget_loss must be entropy, top_k or npo, but is 'ascent'"),
        ({"top_k": 5}, r"--top_k has no effect without --forget_loss top_k"),
        ({"forget_loss": "top_k", "top_k": 1}, r"--top_k must be at least 2, but is 1"),
        ({"forget_loss": "top_k"}, r"--top_k 100 is more than the model's 96 tokens"),
        ({"beta": 0.1}, r"--beta has no effect without --forget_loss npo"),
        ({"forget_loss": "npo", "beta": 0.0}, r"--beta must be > 0"),
        ({"map": "lens"}, r"--map lens and --lens_path FOLDER \(or logit\) go together"),
        ({"lens_path": "somewhere"}, r"--map lens and --lens_path FOLDER \(or logit\) go together"),
        ({"map": "lens", "lens_path": "/nowhere"}, r"the lens folder '/nowhere' does not exist"),
        ({"map": "lens", "lens_path": "logit", "forget_loss": "npo"}, r"pass --map base"),
        ({"allow_pickle_lens": True}, r"--allow_pickle_lens has no effect"),
        ({"regularizer": ["max_entropy"]}, r"--regularizer max_entropy is what --forget_loss entropy does"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        make_trainer("sequential", tmp_path, three_layers(), **flags)


def test_more_layers_than_steps_are_refused_before_training(tmp_path):
    trainer = make_trainer("sequential", tmp_path, three_layers(), layer_step=1, end_layer=0, max_steps=2)
    with pytest.raises(UserError, match="3 layers, one phase each, do not fit into 2 optimizer steps"):
        trainer.train()


@pytest.mark.parametrize(
    "changes, flags, message",
    [
        ({}, {"maintain_unlearned": True}, "--maintain_unlearned has no effect with adapters"),
        ({"use_dora": True}, {}, "only plain LoRA adapters can be left out of single rows"),
        (
            {"modules_to_save": ["lm_head"]},
            {},
            "only plain LoRA adapters can be left out of single rows, but 'base_model",
        ),
        ({"target_parameters": ["q_proj.weight"], "target_modules": []}, {}, "leave --use_dora, "),
        ({"target_modules": ["q_proj", "lm_head"]}, {}, "is outside the decoder layers"),
    ],
)
def test_adapters_that_cannot_be_left_out_are_refused(changes, flags, message, tmp_path):
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **changes})
    with pytest.raises(UserError, match=message):
        make_trainer("sequential", tmp_path, get_peft_model(three_layers(), config), **flags)


@pytest.mark.parametrize("part", ["optimizer", "scheduler"])
def test_a_deepspeed_file_that_brings_its_own_is_refused(part, tmp_path):
    trainer = make_trainer("sequential", tmp_path, three_layers())
    trainer.args.deepspeed = {part: {"type": "auto"}}
    with pytest.raises(UserError, match=f"leave '{part}' out of --deepspeed"):
        trainer._refuse_backends()


def test_a_phase_too_short_for_a_term_is_said(tmp_path, caplog):
    watched(tmp_path, retain_schedule="0:1", max_steps=4)
    assert "a phase of 1 optimizer step has no retain term" in caplog.text and "no forget term" not in caplog.text


def test_a_warm_up_that_takes_a_whole_phase_is_said(tmp_path, caplog):
    watched(tmp_path, warmup_steps=2)
    assert "warm-up takes all of a phase of 2 optimizer steps" in caplog.text
