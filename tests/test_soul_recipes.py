"""Published configurations of SOUL and WAGLE: a file and its recipe are the same run; masks; what recipes say."""

import functools
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml
from soul_world import (
    PUBLISHED,
    ROOT,
    configuration,
    flags_of,
    folder,
    key_of,
    plain,
    refused,
    shown,
    value_of,
    write,
)  # fmt: skip

from llm_unlearn.cli.published_soul_tables import CONFIGURATIONS
from llm_unlearn.cli.script_flags import parse_script
from llm_unlearn.evaluation.parsing import parse_evaluation
from llm_unlearn.parsing import parse

__all__ = ["folder", "shown"]

# ---- Every published configuration ----


def test_the_published_configurations_are_these():
    trained = {key for key, known in CONFIGURATIONS.items() if known.recipe}
    assert {key_of(name) for name in PUBLISHED} == trained
    for known in CONFIGURATIONS.values():
        assert known.recipe is None or (ROOT / f"recipes/{known.recipe}.yaml").is_file()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_and_its_recipe_are_the_same_run(name, shown):
    known = CONFIGURATIONS[key_of(name)]
    given = yaml.safe_load((ROOT / f"recipes/{known.recipe}.yaml").read_text(encoding="utf-8"))
    parsed = flags_of(shown("--config_file", write(configuration(name), f"configs/{name}.json")))
    assert parsed.method == given.pop("unlearn_method") and parsed.notes == []
    model, _, _, _, epochs, _, _, _, _ = PUBLISHED[name]
    assert parsed.model.target_model_name_or_path == model and parsed.args.num_train_epochs == epochs
    assert parsed.args.output_dir == f"files/results/x/{key_of(name)[1]}/checkpoints"
    # Theirs logs twenty times a run.
    steps = given.get("max_steps", epochs * (given.get("max_train_samples") or 400) // 4)
    assert given.pop("logging_steps") == steps // 20 and parsed.args.logging_steps == 0.05
    # An argument of ours under another name.
    assert given.pop("warmup_ratio") == parsed.args.warmup_steps
    for flag, value in given.items():
        found = value_of(parsed, flag)
        rounded = flag in ("beta", "forget_weight")
        assert found == (pytest.approx(value, rel=1e-3) if rounded else value), flag


@pytest.mark.parametrize("name", PUBLISHED)
def test_where_the_file_is_not_there_its_recipe_stands_in(name, shown):
    known = CONFIGURATIONS[key_of(name)]
    words = shown("--config_file", f"configs/{name}.json", "--unlearn.lr", "3e-3")
    assert words[2:4] == ["--config", f"recipes/{known.recipe}.yaml"]
    parsed = flags_of(words)
    assert parsed.args.learning_rate == 3e-3 and parsed.model.target_model_name_or_path == PUBLISHED[name][0]
    assert parsed.args.output_dir.startswith("files/results/unlearn_")
    given = yaml.safe_load((ROOT / f"recipes/{known.recipe}.yaml").read_text(encoding="utf-8"))
    assert parsed.args.weight_mask == given.get("weight_mask") and not parsed.args.allow_pickle_mask
    assert set(words[4::2]) <= {"--target_model_name_or_path", "--learning_rate", "--weight_mask", "--output_dir"}


def test_keys_over_a_recipe(shown):
    words = shown("--config-file", "configs/tofu/NPO.json", "--unlearn.NPO+FT.gamma=2", "--unlearn.num_epochs", "3",
                  "--unlearn.max_steps", "-1", "--dataset.forget_dataset_name", "Tofu_forget05",
                  "--dataset.retain_dataset_name", "Tofu_retain95", "--logger.name", "a b",
                  "--overall.model_name", "m")  # fmt: skip
    parsed = flags_of(words)
    assert parsed.method == "npo" and parsed.args.retain_weight == 2 and parsed.args.beta == pytest.approx(0.0025)
    assert (parsed.args.num_train_epochs, parsed.args.max_steps, parsed.args.seed) == (3, -1, 1)
    assert parsed.data.forget_split == "forget05" and parsed.data.retain_split is None
    assert parsed.args.output_dir == "files/results/unlearn_tofu/NPO+WAGLE/a b/checkpoints"
    assert parsed.args.question_template == "### Question: {question}\n### Answer: {answer}"
    words = shown("--config_file", "configs/TOFU/SO_PO.json", "--unlearn.sophia_params.rho", "0.1",
                  "--unlearn.sophia_params.betas_low", "0.8", "--unlearn.sophia", "true")  # fmt: skip
    args = flags_of(words).args
    assert (args.unlearn_optimizer, args.sophia_rho, args.sophia_betas) == ("soul_legacy", 0.1, [0.8, 0.95])


def test_a_typed_key_wins_over_the_file_and_extra_over_both(shown):
    path = write(configuration("TOFU/SO_GradDiff"))
    extra = "--domain custom --forget_data f.jsonl --retain_data r.jsonl --learning_rate=1e-2 --max_steps 3"
    words = shown("--config_file", path, "--unlearn.GA+FT.gamma", "7", "--unlearn.lr", "1", "--extra", extra)
    parsed = flags_of(words)
    assert parsed.args.retain_weight == 7 and parsed.args.learning_rate == 1e-2 and parsed.args.max_steps == 3
    assert parsed.data.domain == "custom" and parsed.data.forget_split is None
    assert words[-len(shlex.split(extra)) :] == shlex.split(extra) and words.count("--domain") == 1
    assert (parsed.args.unlearn_optimizer, parsed.args.sophia_rho) == ("soul_legacy", 0.04)
    args = flags_of(shown("--config_file", path, "--extra", "--unlearn_optimizer sophia --sophia_rho 0.05")).args
    assert (args.unlearn_optimizer, args.sophia_rho, args.sophia_betas) == ("sophia", 0.05, [0.965, 0.99])
    assert flags_of(shown("--config_file", path, "--extra", "--optim sgd")).args.unlearn_optimizer is None
    words = shown(*plain("GA+FT"), "--extra", "--unlearn_optimizer muon")
    assert flags_of(words).args.unlearn_optimizer == "muon" and "--optim" not in words


@pytest.mark.parametrize(
    ("name", "domain"), [("TOFU/origin", "tofu"), ("Toxic/origin_llama", "detox"), ("toxic/origin_opt", "detox")]
)
def test_what_trains_nothing_is_evaluated(name, domain, shown):
    words = shown("--config_file", f"configs/{name}.json")
    assert words[:2] == ["python", "run_eval.py"]
    parsed = parse_evaluation(words[2:])
    assert parsed.data.domain == domain and parsed.flags.max_length == 512
    assert parsed.model.model_name_or_path == CONFIGURATIONS[key_of(name)].settings["overall.model_name"]


def test_resume_path_is_evaluated(shown):
    path = write(configuration("wmdp/NPO+WAGLE"))
    parsed = parse_evaluation(shown("--config_file", path, "--unlearn.resume_path", "a/b")[2:])
    assert parsed.model.model_name_or_path == "a/b" and parsed.data.domain == "wmdp"
    assert parsed.data.forget_data is None and parsed.flags.output_dir == "files/results/x/config"


# ---- Masks ----


@functools.cache
def mask_script():
    spec = importlib.util.spec_from_file_location("make_weight_mask", ROOT / "utils/make_weight_mask.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed_mask(words):
    """Return the flags of a command that makes a mask, checked by the script itself."""
    script = mask_script()
    assert words[:2] == ["python", "utils/make_weight_mask.py"]
    flags, data = parse_script(words[2:], script.MaskFlags, script.DATA, script.SCRIPT)
    script._check(flags, data)
    return flags, data


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "WAGLE" in name])
def test_a_missing_mask_is_refused_with_the_command_of_the_recipe(name, folder, capsys):
    """Whether the file is there or its recipe stands in."""
    recipe = CONFIGURATIONS[key_of(name)].recipe
    mask = PUBLISHED[name][-1]["mask_path"].removeprefix("./")
    ours = mask.replace(".pt", ".safetensors")
    Path(ours).unlink()
    text = (ROOT / f"recipes/{recipe}.yaml").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if "The mask first: " in line)
    expected = parsed_mask(shlex.split(line.partition(" first: ")[2]))
    assert expected[0].output == ours == yaml.safe_load(text)["weight_mask"]
    assert expected[0].ratio == re.search(r"_([\d.]+)\.pt", mask)[1] and expected[0].score == "wagle"
    assert expected[0].forget_loss == ("refusal" if "po_" in recipe.replace("npo_", "") else "nll")
    for path in (f"configs/{name}.json", write(configuration(name))):
        said = refused(capsys, "--config_file", path, "--dry_run")
        assert said.startswith(f"--unlearn.mask_path '{mask}' does not exist, nor does '{ours}'; make it: ")
        assert parsed_mask(shlex.split(said.partition("make it: ")[2])) == expected


def test_gamma_is_mu_over_the_batches():
    """mu 1e-6 divides the sum of 400 batches there, gamma their mean here."""
    text = (ROOT / "recipes/tofu/grad_diff_wagle.yaml").read_text(encoding="utf-8")
    assert f"--gamma {1e-6 / 400:g} " in text
    assert f"--gamma {1e-6 / 25453:g} " in (ROOT / "recipes/wmdp/npo_wagle.yaml").read_text(encoding="utf-8")


def test_which_mask_is_taken(shown, capsys):
    path = write(configuration("Tofu/GradDiff+WAGLE"))
    Path("mask/wanda").mkdir()
    Path("mask/wanda/with_0.5.pt").touch()
    args = flags_of(shown("--config_file", path, "--unlearn.mask_path", "mask/wanda/with_0.5.pt")).args
    assert args.weight_mask == "mask/wanda/with_0.5.pt" and args.allow_pickle_mask
    args = flags_of(shown("--config_file", path, "--unlearn.mask_path", "mask/tofu_0.8.safetensors")).args
    assert args.weight_mask == "mask/tofu_0.8.safetensors" and not args.allow_pickle_mask


@pytest.mark.parametrize(
    ("folder_name", "score"), [("gradient", "grad_norm"), ("weight", "magnitude"), ("snip_advanced_CL", "wagle")]
)
def test_the_folder_of_a_missing_mask_names_its_score(folder_name, score, folder, capsys):
    path = write(configuration("Tofu/PO+WAGLE"))
    said = refused(capsys, "--config_file", path, "--unlearn.mask_path", f"mask/{folder_name}/with_0.3.pt")
    flags, _ = parsed_mask(shlex.split(said.partition("make it: ")[2]))
    assert (flags.score, flags.ratio, flags.output) == (score, "0.3", f"mask/{folder_name}/with_0.3.safetensors")


# ---- Recipes ----


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_says_where_its_values_stand_and_its_command_parses(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = CONFIGURATIONS[key_of(name)].recipe
    first, *lines = (ROOT / f"recipes/{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    marks = ("SOUL ", "WAGLE ", "ours: ", "transformers default", "locuslab/tofu (read in")
    for line in lines:
        assert line.startswith("# ") or line.partition("  # ")[2].startswith(marks), line
    words = shlex.split(first.partition(": ")[2])
    parsed = parse(words[words.index("run_unlearn.py") + 1 :])
    assert parsed.model.target_model_name_or_path == PUBLISHED[name][0]
    assert parsed.args.output_dir == f"output/{recipe.replace('/', '-')}"
    rows = 4 if words[0] == "torchrun" else 1
    assert rows * parsed.args.per_device_train_batch_size * parsed.args.gradient_accumulation_steps == 4


def test_the_commands_of_the_page_parse(shown):
    page = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    commands = [line for line in page.splitlines() if line.startswith("python utils/unlearn_model.py")]
    assert len(commands) == 2
    for command in commands:
        flags_of(shown(*[word for word in shlex.split(command)[2:] if word != "--dry_run"]))
    for known in CONFIGURATIONS.values():
        assert known.recipe is None or f"`{known.recipe}`" in page
