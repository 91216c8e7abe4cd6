"""The command line: the published commands, one method's flags at a time, configs, folded names, refusals."""

import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llm_unlearn import parsing
from llm_unlearn.arguments import ACCEPTED, REFUSED, RENAMED, SHARED_FLAGS
from llm_unlearn.data.splits import domain_names
from llm_unlearn.errors import UserError
from llm_unlearn.methods import METHODS, describe, trainer_class
from llm_unlearn.parsing import parse

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "launch")
NPO = ["--unlearn_method", "npo", "--target_model_name_or_path", "X"]
# specs: README of yaojin17/Unlearning_LLM at d4b1287, behind `torchrun ... run_unlearn.py`.
PUBLISHED = """--target_model_name_or_path ../../models/Yi-6B --per_device_train_batch_size 1 --do_unlearn
  --output_dir ./output --overwrite_output_dir --num_train_epochs 1 --logging_steps 1 --learning_rate 2e-5 --warmup_ratio 0.03 --overwrite_cache --save_total_limit 1
  --fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' --bf16 True --tf32 True --weight_decay 0. --lr_scheduler_type "cosine"
  --domain {domain} --gradient_accumulation_steps {gas} --unlearn_method {method}"""  # noqa: E501
PUBLISHED_METHODS = {
    "gradient_ascent": {},
    "random_label --completely_random True": {"completely_random": True},
    "random_label --top_k 1 --rm_groundtruth True": {"top_k": 1, "rm_groundtruth": True, "completely_random": False},
    "ascent_plus_descent": {"general": False, "positive_ratio": 1, "retain_weight": 1.0},
    "ascent_plus_descent --general True": {"general": True},
    "ascent_plus_kl_divergence": {"general": False},
    "ascent_plus_kl_divergence --general True": {"general": True},
}


pytestmark = pytest.mark.usefixtures("one_cpu_process")


def refusal(*argv):
    """Return the message with which a command line is refused; one sentence once run_cli joins its lines."""
    with pytest.raises(UserError) as caught:
        parse(list(argv))
    return str(caught.value)


def config(text, name="config.yaml"):
    Path(name).write_text(text, encoding="utf-8")
    return name


# ---- The published commands ----


@pytest.mark.parametrize(("domain", "gas"), [("github", 85), ("arxiv", 60)])
@pytest.mark.parametrize("method", PUBLISHED_METHODS)
def test_published_commands_parse_verbatim(method, domain, gas, caplog):
    with caplog.at_level(logging.WARNING):
        parsed = parse(shlex.split(PUBLISHED.format(method=method, domain=domain, gas=gas)))
    name, args = method.split()[0], parsed.args
    assert parsed.method == name
    assert parsed.trainer is trainer_class(name)
    assert type(args) is parsed.trainer.args_class
    assert (args.warmup_steps, args.weight_decay, args.learning_rate) == (0.03, 0.0, 2e-5)
    assert (args.lr_scheduler_type.value, args.num_train_epochs, args.logging_steps) == ("cosine", 1, 1)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.save_total_limit) == (1, gas, 1)
    assert (args.do_unlearn, args.overwrite_output_dir, parsed.data.overwrite_cache) == (True, True, True)
    assert (parsed.model.target_model_name_or_path, parsed.data.domain) == ("../../models/Yi-6B", domain)
    assert {key: getattr(args, key) for key in PUBLISHED_METHODS[method]} == PUBLISHED_METHODS[method]
    # What this machine cannot do is dropped, each with one warning; bfloat16 runs on the CPU.
    assert (args.tf32, args.bf16, args.use_cpu, args.fsdp, args.fsdp_config) == (None, True, True, None, None)
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("llm_unlearn")]
    for flag, instead in (("--tf32", "float32 runs instead"), ("--bf16", "on the CPU"), ("--fsdp", "one process")):
        (message,) = (message for message in warnings if message.startswith(flag))
        assert instead in message
    assert len(warnings) == 3
    assert parsed.notes == []


def test_defaults_without_a_recipe():
    parsed = parse(NPO)
    args = parsed.args
    assert (args.beta, args.retain_loss, args.forget_weight, args.retain_weight) == (0.1, "nll", 1.0, 1.0)
    assert (args.per_device_train_batch_size, args.report_to, parsed.model.dtype) == (8, [], "float32")
    simnpo = parse(["--unlearn_method=simnpo"]).args
    assert (simnpo.beta, simnpo.delta, simnpo.forget_weight) == (4.5, 0.0, 0.125)


# ---- Refusals ----


def test_unknown_method_suggests_the_nearest():
    message = refusal("--unlearn_method", "nop")
    assert message.startswith("unknown --unlearn_method 'nop'; did you mean 'npo'? Known: ")
    assert all(method in message for method in METHODS)
    assert "did you mean" not in refusal("--unlearn_method", "zzzzzz")


@pytest.mark.parametrize("argv", [[], ["--unlearn_method"], ["--unlearn_method="], ["--domain", "tofu"]])
def test_missing_method_lists_them(argv):
    message = refusal(*argv)
    assert message.startswith("--unlearn_method is missing; known: gradient_ascent, ")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("no_such_module:Trainer", "cannot be imported"),
        ("llm_unlearn.trainer:NoSuchTrainer", "cannot be imported"),
        ("llm_unlearn.errors:UserError", "is not a subclass of llm_unlearn.UnlearnTrainer"),
        (":Trainer", "cannot be imported"),
    ],
)
def test_methods_from_elsewhere_are_checked(target, reason):
    assert reason in refusal("--unlearn_method", target)


def test_a_method_from_elsewhere_parses_its_own_flags():
    parsed = parse(["--unlearn_method", "llm_unlearn.methods.npo:NPOTrainer", "--beta", "0.3"])
    assert (parsed.trainer, parsed.args.beta) == (trainer_class("npo"), 0.3)


@pytest.mark.parametrize(
    ("method", "flag", "owners"),
    [
        ("gradient_ascent", "--beta", "npo, simnpo, sequential, dpo, idk_dpo, alt_po and 2 others"),
        ("npo", "--delta", "simnpo"),
        ("npo", "--top_k", "random_label, sequential, max_entropy"),
        ("npo", "--general", "ascent_plus_descent, ascent_plus_kl_divergence"),
        (
            "ascent_plus_descent",
            "--retain_loss",
            "grad_diff, npo, simnpo, rmu, circuit_breakers, tuned_lens and 14 others",
        ),
        (
            "random_label",
            "--retain_weight",
            "ascent_plus_descent, ascent_plus_kl_divergence, grad_diff, npo, simnpo, rmu and 19 others",
        ),
    ],
)
@pytest.mark.parametrize("form", ["{flag} 1", "{flag}=1"])
def test_flag_of_another_method_names_its_owners(method, flag, owners, form):
    words = form.format(flag=flag).split()
    expected = f"{flag} does not apply to {method}; it is a flag of {owners}"
    assert refusal("--unlearn_method", method, *words) == expected


def test_retain_flags_exist_only_where_there_is_a_retain_term():
    for method in ("gradient_ascent", "random_label", "finetune", "retrain"):
        fields = trainer_class(method).args_class.__dataclass_fields__
        assert not {"retain_loss", "retain_weight", "forget_weight"} & set(fields)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("--learning_rat", "--learning_rate"), ("--use_pft", "--use_peft"), ("--max_lenght", "--max_length")],
)
def test_unknown_flag_suggests_the_nearest(given, meant):
    message = refusal(*NPO, given, "1")
    assert message.startswith(f"unknown flag '{given}'; did you mean '{meant}")
    assert "run_unlearn.py --unlearn_method npo --help" in message


@pytest.mark.parametrize("given", ["--learning", "--max_len", "--per_device_train", "--lora_dr"])
def test_abbreviations_are_refused(given):
    """A flag that a later version adds must not change what an abbreviation means."""
    assert refusal(*NPO, given, "1").startswith(f"unknown flag '{given}'")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--learning_rate abc", "invalid float value: 'abc'"),
        ("--max_length 12.5", "invalid int value: '12.5'"),
        ("--bf16 maybe", "Truthy value expected"),
        ("--lr_scheduler_type cosin", "invalid choice: 'cosin'"),
        ("--beta", "expected one argument"),
        ("--beta 0", "--beta must be > 0, but is 0.0"),
        ("--beta nan", "--beta must be > 0"),
        ("--learning_rate -1", "--learning_rate must not be negative, but is -1.0"),
        ("--max_steps 0", "--max_steps 0 would train nothing"),
        ("--warmup_ratio 1", "--warmup_ratio must lie in [0, 1), but is 1.0"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor has no effect here"),
        ("--bf16 --fp16", "not both"),
        ("--fsdp sharded", "unknown --fsdp option 'sharded'"),
        ("--deepspeed ds.json", "--deepspeed needs a launcher"),
        ("stray", "'stray'"),
    ],
)
def test_bad_values_are_the_users_mistake(words, reason):
    message = refusal(*NPO, *words.split())
    assert reason in message
    assert "argument --" not in message


@pytest.mark.parametrize("choice", ["nll", "kl", "none"])
def test_retain_loss_choices(choice):
    assert parse([*NPO, "--retain_loss", choice]).args.retain_loss == choice
    assert "choose from 'nll', 'kl', 'none'" in refusal(*NPO, "--retain_loss", choice + "l")


def test_underscores_and_hyphens_are_one():
    """argparse declares both forms of every flag, so that both must say the same."""
    assert parse([*NPO, "--max-length", "77"]).args.max_length == 77
    assert parse(["--unlearn-method", "simnpo"]).method == "simnpo"
    assert parse(["--config", config("unlearn_method: npo"), "--unlearn-method", "simnpo"]).method == "simnpo"


def test_the_last_of_two_methods_wins_as_with_every_flag():
    assert parse([*NPO, "--beta", "1", "--beta", "2"]).args.beta == 2
    assert parse([*NPO, "--unlearn_method", "simnpo"]).method == "simnpo"


# ---- Names of the ACL 2024 command line ----

RENAMED_VALUES = {
    "torch_dtype": ("bfloat16", lambda parsed: parsed.model.dtype),
    "model_max_length": (123, lambda parsed: parsed.args.max_length),
    "block_size": (77, lambda parsed: parsed.args.max_length),
    "output_sufix": ("-a", lambda parsed: parsed.model.output_suffix),
    "use_auth_token": ("hf_secret", lambda parsed: parsed.data.token),
    "use_lora": (True, lambda parsed: parsed.model.use_peft),
    "no_cuda": (True, lambda parsed: parsed.args.use_cpu),
    "evaluation_strategy": ("epoch", lambda parsed: parsed.args.eval_strategy.value),
}


@pytest.mark.parametrize("name", RENAMED)
def test_renamed_flags_reach_their_successor(name):
    value, read = RENAMED_VALUES[name]
    assert read(parse(NPO)) != value or name == "no_cuda"
    assert read(parse([*NPO, f"--{name}={value}"])) == value
    assert read(parse([*NPO, "--config", config(yaml.safe_dump({name: value}))])) == value
    if not str(value).startswith("-"):
        assert read(parse([*NPO, f"--{name}", str(value)])) == value
    if value is True:
        assert read(parse([*NPO, f"--{name}"])) is True


@pytest.mark.parametrize("words", [["--use_auth_token", "True"], ["--use_auth_token=True"], ["--use_auth_token"]])
def test_use_auth_token_was_a_switch(words):
    """It meant: use the token that I logged in with. The word True is no token."""
    assert parse([*NPO, *words]).data.token in (None, True)


@pytest.mark.parametrize("name", REFUSED)
def test_flags_without_effect_are_refused_with_what_to_type_instead(name):
    expected = f"--{name} has no effect here: {REFUSED[name]}"
    assert refusal(*NPO, f"--{name}", "x") == expected
    assert refusal(*NPO, f"--{name}=x") == expected
    assert refusal(*NPO, "--config", config(f"{name}: x")) == expected


@pytest.mark.parametrize("name", ACCEPTED)
def test_flags_that_say_what_happens_anyway_are_noted(name):
    expected = [f"--{name} changes nothing: {ACCEPTED[name]}"]
    for words in ([f"--{name}", "True"], [f"--{name}=4"], [f"--{name}"], ["--config", config(f"{name}: 4")]):
        parsed = parse([*NPO, *words, "--seed", "7"])
        assert (parsed.notes, parsed.args.seed) == (expected, 7)


# ---- Configs ----


def test_config_gives_defaults_and_flags_win():
    path = config("unlearn_method: npo\nbeta: 0.5\nseed: 3\nretain_loss: kl\nbf16: false\n")
    parsed = parse(["--config", path])
    assert (parsed.method, parsed.args.beta, parsed.args.seed, parsed.args.retain_loss) == ("npo", 0.5, 3, "kl")
    for words in (["--config", path, "--beta", "0.7"], ["--beta=0.7", f"--config={path}"]):
        args = parse(words).args
        assert (args.beta, args.seed) == (0.7, 3)


def test_method_of_the_command_line_beats_the_config():
    parsed = parse(["--config", config("unlearn_method: npo\nretain_loss: kl"), "--unlearn_method", "grad_diff"])
    assert (parsed.method, parsed.args.retain_loss) == ("grad_diff", "kl")


def test_json_config_as_flag_and_as_the_only_word():
    path = config(json.dumps({"unlearn_method": "npo", "beta": 0.3, "domain": "tofu"}), "run.json")
    for words in ([path], ["--config", path], [f"--config={path}", "--seed", "1"]):
        parsed = parse(words)
        assert (parsed.method, parsed.args.beta, parsed.data.domain) == ("npo", 0.3, "tofu")


def test_json_config_behind_an_equals_sign_as_the_only_word():
    path = config(json.dumps({"unlearn_method": "npo", "beta": 0.3}), "run.json")
    assert parse([f"--config={path}"]).args.beta == 0.3


def test_flags_win_over_a_positional_json():
    path = config(json.dumps({"unlearn_method": "npo", "beta": 0.3}), "run.json")
    assert parse([path, "--beta", "0.7"]).args.beta == 0.7


def test_a_later_config_wins_over_an_earlier_one():
    first, second = config("unlearn_method: npo\nbeta: 0.3\nseed: 5", "a.yaml"), config("beta: 0.4", "b.yaml")
    args = parse(["--config", first, "--config", second]).args
    assert (args.beta, args.seed) == (0.4, 5)


def test_lists_and_mappings_in_a_config():
    path = config(
        "unlearn_method: npo\nlora_target_modules: [q_proj, v_proj]\nuse_peft: true\n"
        "lr_scheduler_kwargs: {num_cycles: 2}\nmax_length: null\nquestion_template: 'Q: {question} A: {answer}'\n"
    )
    parsed = parse(["--config", path])
    assert parsed.model.lora_target_modules == ["q_proj", "v_proj"]
    assert parsed.args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert parsed.args.max_length is None
    assert parsed.args.question_template == "Q: {question} A: {answer}"
    # A flag after a list does not become part of it.
    assert parse(["--config", path, "--lora_target_modules", "o_proj", "--seed", "9"]).args.seed == 9


def test_numbers_that_yaml_reads_as_text():
    """YAML 1.1 takes 1e-5 for a string, since it has no point."""
    assert parse(["--config", config("unlearn_method: npo\nlearning_rate: 1e-5")]).args.learning_rate == 1e-5


def test_negative_numbers_in_a_config():
    assert (
        parse(["--config", config("unlearn_method: npo\nmax_steps: -1\nlr_scheduler_type: linear")]).args.max_steps
        == -1
    )


def test_fsdp_true_in_a_config_is_the_published_pair_of_words(monkeypatch):
    monkeypatch.setattr("llm_unlearn.training_arguments.fsdp_can_run", lambda args: True)
    args = parse(["--config", config("unlearn_method: npo\nfsdp: true")]).args
    assert args.fsdp_config["reshard_after_forward"] is True
    assert args.fsdp_config["auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("unlearn_method: gradient_ascent\nbeta: 1", "--beta does not apply to gradient_ascent; it is a flag of npo"),
        ("unlearn_method: npo\nlearning_rat: 1", "unknown flag '--learning_rat'; did you mean '--learning_rate'?"),
        ("unlearn_method: npo\nbeta: high", "invalid float value: 'high'"),
        ("unlearn_method: npo\nenv: {A: 1}", "has an 'env' block; set environment variables in the shell"),
        ("unlearn_method: npo\nconfig: other.yaml", "unknown flag '--config'"),
        ("unlearn_method: npo\nsave_strategy: no", "invalid choice: 'False'"),
        ("beta: 1", "--unlearn_method is missing"),
        ("unlearn_method: nop", "did you mean 'npo'?"),
        ("unlearn_method: 5", "unknown --unlearn_method '5'"),
        ("unlearn_method: [npo]", "--unlearn_method"),
        ("- npo", "must be a mapping of flags to values"),
        ("", "must be a mapping of flags to values"),
        ("beta: [", "cannot be read"),
    ],
)
def test_bad_configs_are_refused(text, reason):
    assert reason in refusal("--config", config(text))


def test_unreadable_configs_are_refused(tmp_path):
    assert refusal("--config") == "--config needs a file"
    assert refusal("--config", "absent.yaml") == "config file 'absent.yaml' does not exist"
    assert "does not exist" in refusal("--config", str(tmp_path))
    assert "cannot be read" in refusal("--config", config("{", "broken.json"))


def test_a_config_that_is_not_utf8_is_refused():
    Path("latin.yaml").write_bytes("unlearn_method: npo # für".encode("latin-1"))
    assert "latin.yaml" in refusal("--config", "latin.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_parses_to_the_values_that_it_states(path):
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    parsed = parse(["--config", str(path), "--target_model_name_or_path", "X"])
    assert parsed.method == given.pop("unlearn_method")
    assert parsed.notes == []
    # TF32 is dropped without a GPU.
    given.pop("tf32", None)
    for name, value in given.items():
        (holder,) = (part for part in (parsed.args, parsed.data, parsed.model) if hasattr(part, name))
        found = getattr(holder, name)
        assert getattr(found, "value", found) == value, name


def test_there_are_recipes():
    assert len(RECIPES) >= 20


# ---- Help ----


def test_help_without_a_method_is_the_overview(capsys):
    assert parse(["--help"]) is None
    assert capsys.readouterr().out == parsing.overview()
    assert parse(["-h"]) is None


def test_overview_names_every_method_domain_and_flag_of_ours():
    lines = parsing.overview().splitlines()
    for method in METHODS:
        summary, _ = describe(method)
        assert summary.endswith(".")
        assert [line.split() for line in lines].count([method, *summary.split()]) == 1
    assert f"  {', '.join(domain_names())}" in lines
    flags = {line.split()[0].rstrip(",") for line in lines if line.startswith("  --")}
    assert {f"--{name}" for group in SHARED_FLAGS for name in group.__dataclass_fields__} <= flags
    assert {"--beta", "--top_k", "--positive_ratio", "--retain_loss", "--forget_weight"} <= flags


@pytest.mark.parametrize("method", METHODS)
def test_overview_says_what_each_methods_own_flags_do(method):
    """The help is read from the source text; it must be what the parser's own help says."""
    _, flags = describe(method)
    fields = trainer_class(method).args_class.__dataclass_fields__
    assert flags == {name: fields[name].metadata["help"] for name in flags}
    assert all(flags.values())


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_of_every_method_has_help(method, capsys):
    assert parse(["--unlearn_method", method, "--help"]) is None
    printed = capsys.readouterr().out
    parser = parsing._parser(trainer_class(method).args_class, method)
    assert [action.option_strings for action in parser._actions if not (action.help or "").strip()] == []
    own = {f"--{name}" for name in trainer_class(method).args_class.__dataclass_fields__}
    options = {option for action in parser._actions for option in action.option_strings} - {"--ignored"}
    assert {option for option in options if option.startswith("--")} <= set(printed.replace(",", " ").split()) | {
        word.strip("[],") for word in printed.split()
    }
    assert {"--learning_rate", "--lora_r", "--domain", "--max_length"} <= options
    with_beta = ("npo", "simnpo", "sequential", "dpo", "idk_dpo", "alt_po", "undial", "wga")
    assert ("--beta" in options) == (method in with_beta) == ("--beta" in own)


def test_help_is_quick_and_imports_no_torch():
    """Best of two runs, because the first may read cold files."""
    program = """if True:
        import io, json, runpy, sys, time
        start, printed, sys.stdout = time.perf_counter(), sys.stdout, io.StringIO()
        import llm_unlearn, llm_unlearn.parsing
        sys.argv = ["run_unlearn.py", "--help"]
        try:
            runpy.run_path("run_unlearn.py", run_name="__main__")
        except SystemExit as finished:
            code = finished.code
        seconds, modules = time.perf_counter() - start, sorted(sys.modules)
        print(json.dumps([code, seconds, modules, sys.stdout.getvalue()]), file=printed)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    fastest = float("inf")
    for _ in range(2):
        output = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, capture_output=True, text=True
        ).stdout
        code, seconds, modules, printed = json.loads(output)
        assert code == 0
        assert "llm_unlearn.parsing" in modules
        assert not {"torch", "transformers", "trl", "datasets"} & set(modules)
        assert all(f"  {name} " in printed for name in METHODS)
        assert all(name in printed for name in domain_names())
        fastest = min(fastest, seconds)
        if fastest < 2:
            break
    assert fastest < 2


@pytest.mark.parametrize(
    ("recipe", "typed", "expected"),
    [
        ("warmup_ratio: 0.03", ["--warmup_steps", "3"], {"warmup_steps": 3}),
        ("warmup_steps: 7", ["--warmup_ratio", "0"], {"warmup_steps": 0}),
        ("positive_factor: 0.5", ["--retain_weight", "1.0"], {"retain_weight": 1.0}),
        ("positive_factor: 0.5", ["--retain-weight", "5"], {"retain_weight": 5.0}),
        ("retain_weight: 5", ["--positive_factor", "2"], {"retain_weight": 2.0}),
    ],
)
def test_what_is_typed_wins_over_its_other_name_in_a_config(recipe, typed, expected):
    args = parse(["--unlearn_method", "ascent_plus_descent", "--config", config(recipe), *typed]).args
    assert {name: getattr(args, name) for name in expected} == expected
