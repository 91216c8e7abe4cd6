"""TrainingArguments with older names folded in, flags without effect refused, and each method's own contradictions."""

import json
import logging
import types

import pytest
import torch

import llm_unlearn
from llm_unlearn import training_arguments
from llm_unlearn.errors import UserError
from llm_unlearn.methods import METHODS, trainer_class
from llm_unlearn.training_arguments import RetainArguments, UnlearnArguments


@pytest.fixture(autouse=True)
def one_cpu_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def with_fsdp(monkeypatch):
    monkeypatch.setattr(training_arguments, "fsdp_can_run", lambda args: True)


def arguments(of=UnlearnArguments, **kwargs):
    return of(output_dir="out", **kwargs)


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.name == training_arguments.__name__]


# ---- Warm-up ----


def test_warmup_ratio_becomes_warmup_steps_below_one():
    args = arguments(warmup_ratio=0.03)
    assert args.warmup_steps == 0.03
    assert args.get_warmup_steps(200) == 6
    assert arguments(warmup_ratio=0.0).warmup_steps == 0
    assert arguments(warmup_steps=5).warmup_steps == 5


def test_warmup_twice_must_agree():
    assert arguments(warmup_ratio=0.1, warmup_steps=0.1).warmup_steps == 0.1
    with pytest.raises(UserError, match="--warmup_ratio and --warmup_steps contradict each other"):
        arguments(warmup_ratio=0.1, warmup_steps=5)


@pytest.mark.parametrize("ratio", [1.0, -0.1, 30, float("nan")])
def test_warmup_ratio_is_a_share(ratio):
    with pytest.raises(UserError, match=r"--warmup_ratio must lie in \[0, 1\)"):
        arguments(warmup_ratio=ratio)


# ---- What this machine cannot do ----


def test_without_an_accelerator_the_cpu_is_used(caplog):
    with caplog.at_level(logging.WARNING):
        args = arguments(bf16=True, tf32=True)
    assert (args.use_cpu, args.bf16, args.tf32) == (True, True, None)
    bf16, tf32 = warnings(caplog)
    assert bf16.startswith("--bf16: there is no accelerator")
    assert tf32.startswith("--tf32 needs an NVIDIA GPU")


def test_nothing_is_said_where_nothing_is_dropped(caplog):
    with caplog.at_level(logging.WARNING):
        arguments()
        arguments(tf32=False, fsdp="false")
    assert warnings(caplog) == []


def test_only_the_first_process_says_it(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level(logging.WARNING):
        training_arguments._say("something")
    monkeypatch.setenv("RANK", "0")
    assert warnings(caplog) == []
    training_arguments._say("something")
    assert warnings(caplog) == ["something"]


# ---- FSDP ----


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("full_shard auto_wrap", {"reshard_after_forward": True, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}),
        ("shard_grad_op", {"reshard_after_forward": False}),
        ("full_shard offload", {"reshard_after_forward": True, "cpu_offload": True}),
    ],
)
def test_fsdp_words_become_its_config(with_fsdp, words, expected):
    args = arguments(fsdp=words)
    assert args.fsdp is True
    assert {name: args.fsdp_config.get(name) for name in expected} == expected
    assert args.fsdp_plugin_args["reshard_after_forward"] is expected["reshard_after_forward"]


def test_the_published_layer_class_goes_into_the_config(with_fsdp):
    args = arguments(fsdp="full_shard auto_wrap", fsdp_transformer_layer_cls_to_wrap="LlamaDecoderLayer")
    assert args.fsdp_config["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer"]
    assert args.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer"


@pytest.mark.parametrize("as_text", [False, True])
def test_a_config_of_ones_own_wins_over_the_words(with_fsdp, as_text, tmp_path):
    given = {"reshard_after_forward": False, "activation_checkpointing": True}
    path = tmp_path / "fsdp.json"
    path.write_text(json.dumps(given))
    args = arguments(fsdp="full_shard auto_wrap", fsdp_config=str(path) if as_text else given)
    assert args.fsdp_config["reshard_after_forward"] is False
    assert args.fsdp_config["activation_checkpointing"] is True
    assert args.fsdp_config["auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    # What the caller holds is not written to.
    assert given == {"reshard_after_forward": False, "activation_checkpointing": True}


@pytest.mark.parametrize("fsdp", [True, "true", "True"])
def test_bare_fsdp_leaves_the_config_alone(with_fsdp, fsdp):
    args = arguments(fsdp=fsdp)
    assert args.fsdp is True
    assert "auto_wrap_policy" not in args.fsdp_config


@pytest.mark.parametrize("fsdp", [None, False, "False", "false", ""])
def test_no_fsdp(with_fsdp, fsdp):
    assert arguments(fsdp=fsdp).fsdp is None
    with pytest.raises(UserError, match="has no effect without --fsdp"):
        arguments(fsdp=fsdp, fsdp_transformer_layer_cls_to_wrap="LlamaDecoderLayer")


def test_unknown_fsdp_word_lists_the_known_ones():
    with pytest.raises(UserError, match=r"unknown --fsdp option 'hybrid'\. Known: full_shard, shard_grad_op, off"):
        arguments(fsdp="full_shard hybrid")


def test_missing_fsdp_config_is_named(with_fsdp):
    with pytest.raises(UserError, match=r"configuration file 'absent\.json' does not exist"):
        arguments(fsdp="full_shard", fsdp_config="absent.json")


def test_fsdp_is_dropped_on_one_process(caplog):
    with caplog.at_level(logging.WARNING):
        args = arguments(fsdp="full_shard auto_wrap", fsdp_transformer_layer_cls_to_wrap="LlamaDecoderLayer")
    assert (args.fsdp, args.fsdp_config, args.fsdp_plugin_args) == (None, None, None)
    assert warnings(caplog) == ["--fsdp: one process runs without it"]


def test_fsdp_is_dropped_without_an_accelerator(caplog, monkeypatch):
    """Of eight processes; alone, because arguments made whole would look for the other seven."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    args = types.SimpleNamespace(
        fsdp="full_shard", fsdp_config=None, fsdp_transformer_layer_cls_to_wrap=None, use_cpu=True, deepspeed=None
    )
    with caplog.at_level(logging.WARNING):
        UnlearnArguments._fold_fsdp(args)
    assert args.fsdp is None
    assert warnings(caplog) == ["--fsdp: no accelerator, DDP runs instead"]


@pytest.mark.parametrize(
    ("processes", "use_cpu", "runs"), [("8", False, True), ("8", True, False), ("1", False, False)]
)
def test_fsdp_needs_processes_and_an_accelerator(processes, use_cpu, runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert training_arguments.fsdp_can_run(types.SimpleNamespace(use_cpu=use_cpu)) is runs


# ---- Refusals ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("dataloader_drop_last", True),
        ("auto_find_batch_size", True),
        ("ignore_data_skip", True),
        ("hub_strategy", "end"),
        ("hub_always_push", True),
    ],
)
def test_flags_that_cannot_take_effect_are_refused(name, value):
    with pytest.raises(UserError, match=f"--{name} has no effect here: "):
        arguments(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("learning_rate", -1e-5), ("max_steps", 0)])
def test_values_that_would_train_backwards_or_not_at_all(name, value):
    with pytest.raises(UserError, match=f"--{name}"):
        arguments(**{name: value})


def test_deepspeed_needs_a_launcher():
    with pytest.raises(UserError, match=r"--deepspeed needs a launcher; type torchrun"):
        arguments(deepspeed={"zero_optimization": {"stage": 2}})


def test_fsdp_and_deepspeed_exclude_each_other():
    with pytest.raises(UserError, match="--fsdp and --deepspeed exclude each other"):
        arguments(fsdp="full_shard", deepspeed={"zero_optimization": {"stage": 2}})


def under_deepspeed(config, bf16=False, max_grad_norm=0.5):
    """Fold a DeepSpeed config without starting DeepSpeed; returns (arguments, whether bfloat16 compute is ours)."""
    args = types.SimpleNamespace(deepspeed=config, use_cpu=False, bf16=bf16, max_grad_norm=max_grad_norm)
    return args, UnlearnArguments._prepare_deepspeed(args)


def test_deepspeed_clips_as_the_flag_says(monkeypatch):
    """Where its file says nothing DeepSpeed clips at 1.0, whatever --max_grad_norm is."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    given = {"zero_optimization": {"stage": 2}}
    assert under_deepspeed(given)[0].deepspeed == {**given, "gradient_clipping": 0.5}
    assert under_deepspeed(given, max_grad_norm=0)[0].deepspeed["gradient_clipping"] == 0.0
    assert under_deepspeed({"gradient_clipping": 2.0})[0].deepspeed["gradient_clipping"] == 2.0
    assert given == {"zero_optimization": {"stage": 2}}


def test_zero_3_gathers_the_weights_that_it_saves(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    args, _ = under_deepspeed({"zero_optimization": {"stage": 3, "overlap_comm": True}})
    assert args.deepspeed["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "stage3_gather_16bit_weights_on_model_save": True,
    }


@pytest.mark.parametrize(
    ("config", "bf16", "ours"),
    [
        ({"zero_optimization": {}}, False, False),
        ({"zero_optimization": {}}, True, True),
        ({"bf16": {"enabled": "auto"}}, True, True),
        ({"bf16": {"enabled": True}}, True, False),
    ],
)
def test_bfloat16_under_deepspeed_keeps_float32_weights(monkeypatch, config, bf16, ours):
    monkeypatch.setenv("WORLD_SIZE", "1")
    args, is_ours = under_deepspeed(config, bf16)
    assert is_ours is ours
    # The engine runs its own bfloat16 mode only where its file asks for it.
    assert args.bf16 is (bf16 and not ours)


def test_missing_deepspeed_config_is_named(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match=r"configuration file 'absent\.json' does not exist"):
        under_deepspeed("absent.json")


def test_what_the_trainer_relies_on_is_set():
    args = arguments()
    assert args.remove_unused_columns is False
    assert args.ddp_find_unused_parameters is False
    assert args.autocast_in_forward is False
    assert args.logging_steps == 1
    assert arguments(ddp_find_unused_parameters=True).ddp_find_unused_parameters is True


# ---- Methods ----


NEEDED = {
    "random_label": {"completely_random": True},
    "tuned_lens": {"lens_path": "logit"},
    "checkpoint_transfer": {"teacher_model_name_or_path": "early"},
    "probe_unlearn": {"probe_dir": "probes"},
    "pdu": {"retain_bound": 0.5},
    "l1_sparse": {"l1_coef": 1e-6},
}
"""What a method has no sensible default for."""


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_arguments_have_defaults_and_are_public(method):
    kind = trainer_class(method).args_class
    args = arguments(kind, **NEEDED.get(method, {}))
    assert isinstance(args, UnlearnArguments)
    own = kind.__name__ != "UnlearnArguments"
    assert not own or getattr(llm_unlearn, kind.__name__) is kind


def test_retain_loss_is_checked_without_a_parser_too():
    for choice in ("nll", "kl", "none"):
        assert arguments(RetainArguments, retain_loss=choice).retain_loss == choice
    with pytest.raises(UserError, match="--retain_loss must be nll, kl or none, but is 'NLL'"):
        arguments(RetainArguments, retain_loss="NLL")


@pytest.mark.parametrize("method", ["npo", "simnpo"])
@pytest.mark.parametrize("beta", [0, -1, float("nan")])
def test_beta_must_be_positive(method, beta):
    with pytest.raises(UserError, match="--beta must be > 0"):
        arguments(trainer_class(method).args_class, beta=beta)


@pytest.mark.parametrize("method", ["ascent_plus_descent", "ascent_plus_kl_divergence"])
def test_positive_factor_is_the_retain_weight(method):
    kind = trainer_class(method).args_class
    assert arguments(kind).retain_weight == 1
    assert arguments(kind, positive_factor=2.5).retain_weight == 2.5
    assert arguments(kind, positive_factor=0.0).retain_weight == 0
    assert arguments(kind, positive_factor=2.5, retain_weight=2.5).retain_weight == 2.5
    assert arguments(kind, retain_weight=3.0).retain_weight == 3
    with pytest.raises(UserError, match="name the same weight"):
        arguments(kind, positive_factor=2.5, retain_weight=3.0)
    with pytest.raises(UserError, match="--positive_ratio must be at least 1, but is 0"):
        arguments(kind, positive_ratio=0)


def test_random_label_needs_to_be_told_how():
    kind = trainer_class("random_label").args_class
    with pytest.raises(
        UserError, match="needs --completely_random True, --top_k K --rm_groundtruth True, or --label_source"
    ):
        arguments(kind)
    for chosen in ({"top_k": 1}, {"top_p": 0.9}, {"rm_groundtruth": True}, {"legacy_shift": True, "top_k": 1}):
        args = arguments(kind, **chosen)
        assert {name: getattr(args, name) for name in chosen} == chosen


@pytest.mark.parametrize("chosen", [{"top_k": 1}, {"top_p": 0.9}, {"rm_groundtruth": True}, {"legacy_shift": True}])
def test_completely_random_excludes_sampling(chosen):
    with pytest.raises(UserError, match="--completely_random draws from the whole vocabulary"):
        arguments(trainer_class("random_label").args_class, completely_random=True, **chosen)


@pytest.mark.parametrize("chosen", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": float("nan")}])
def test_top_k_and_top_p_have_ranges(chosen):
    with pytest.raises(UserError, match=r"--top_k must be >= 1 and --top_p in \(0, 1\]"):
        arguments(trainer_class("random_label").args_class, **chosen)


@pytest.mark.parametrize("backend", ["fsdp", "deepspeed"])
def test_a_backend_that_the_launcher_chose_behind_our_flags_is_refused(backend, monkeypatch, tmp_path):
    monkeypatch.setenv(f"ACCELERATE_USE_{backend.upper()}", "true")
    with pytest.raises(UserError, match=f"the launcher switched {backend} on .* pass --{backend}"):
        UnlearnArguments(output_dir=str(tmp_path))
