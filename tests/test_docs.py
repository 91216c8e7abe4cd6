"""The documentation: README's commands parse, its Python runs, every method has its section, every flag its help."""

import importlib
import importlib.util
import json
import re
import shlex
import sys
import types
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

import llm_unlearn
from llm_unlearn.arguments import SHARED_FLAGS, DataFlags, EvalFlags, MIAFlags
from llm_unlearn.attacks.audit_plan import PRESETS
from llm_unlearn.attacks.parsing import parse_attack
from llm_unlearn.cli.demo import make_base_model
from llm_unlearn.data.splits import domain_names
from llm_unlearn.evaluation.parsing import parse_evaluation, parse_mia
from llm_unlearn.methods import METHODS, describe, trainer_class
from llm_unlearn.objectives import likelihood
from llm_unlearn.parsing import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
PAGES += [f"docs/{name}.md" for name in ("data", "methods", "evaluation", "membership", "performance")]
PAGES += [f"docs/{name}.md" for name in ("inside", "validation", "weights")]
PAGES += [f"docs/{name}.md" for name in ("distributed", "memory", "attacks")]
OTHER_COMMANDS = ("make ", "pip ", "git ", "cd ")


def blocks(text, language):
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(text):
    """Return the commands of all bash blocks as lists of words, continued lines joined, comments left out."""
    lines = "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def section(page, title):
    """Return one section of a Markdown page, without its title."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL).group(1)


def rows(page):
    """Return the first cells of the tables of a page."""
    return [line.split("|")[1] for line in page.splitlines() if line.startswith("|") and not line.startswith("| ---")]


@pytest.fixture(scope="module")
def base_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "demo_output" / "target"
    make_base_model(folder, 0)
    return folder


@pytest.fixture
def demo_folder(base_model, tmp_path, monkeypatch):
    """A working directory that looks as `make demo` leaves it."""
    (tmp_path / "demo_output").symlink_to(base_model.parent)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- README ----


ON_TOP = "".join((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("inside", "weights"))
RUNS = [words for words in commands(README) + commands(ON_TOP) if "run_unlearn.py" in words]
TOOLS = [words for words in commands(ON_TOP) if any(word.startswith("utils/") for word in words)]
EVALUATION = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
EVALUATIONS = [words for words in commands(README) + commands(EVALUATION) if "run_eval.py" in words]


MEMBERSHIP = (ROOT / "docs/membership.md").read_text(encoding="utf-8")
ATTACKS = [words for words in commands(README) + commands(MEMBERSHIP) if "run_mia.py" in words]


ATTACK_PAGE = (ROOT / "docs/attacks.md").read_text(encoding="utf-8")
SCRIPTS = [words for words in commands(README) + commands(ATTACK_PAGE) if any("llm_unlearn.cli." in w for w in words)]
FLAGS = {
    "audit": "AuditFlags", "tamper": "TamperFlags", "relearn": "RelearnFlags", "downstream": "DownstreamFlags",
    "quantize": "QuantizeFlags", "leak": "LeakFlags", "white_box": "WhiteBoxFlags", "ablate": "AblationFlags",
}  # fmt: skip
"""module of llm_unlearn.cli -> the class of its flags"""


@pytest.mark.parametrize("words", SCRIPTS, ids=lambda words: " ".join(words)[-60:])
def test_commands_of_attacks_parse(words):
    script = words[2].rpartition(".")[2]
    flags = words[3:]
    if script == "report" or "--plot_only" in flags:
        return
    module = importlib.import_module(f"llm_unlearn.cli.{script}")
    if script == "ablate":
        flags, recipe = module.split_words(flags)
        assert parse([*recipe, "--target_model_name_or_path", "model", "--domain", "demo"]) is not None
    if script in ("tamper", "relearn"):
        flags = module.join_sweeps(flags) if script == "tamper" else flags
    parsed = parse_attack(flags, getattr(module, FLAGS[script]), script)
    assert parsed.data.domain in domain_names() and not parsed.notes


def test_every_attack_is_on_the_page():
    assert all(f"llm_unlearn.cli.{script}" in ATTACK_PAGE for script in [*FLAGS, "report"])
    stages = {stage.name for stages in PRESETS.values() for stage in stages}
    assert all(f"| `{stage}` |" in ATTACK_PAGE for stage in stages)


@pytest.mark.parametrize("words", ATTACKS, ids=lambda words: " ".join(words)[:60])
def test_readme_attack_parses(words):
    parsed = parse_mia(words[words.index("run_mia.py") + 1 :])
    assert parsed.data.domain in domain_names() and not parsed.notes


@pytest.mark.parametrize("words", EVALUATIONS, ids=lambda words: " ".join(words)[:60])
def test_readme_evaluation_parses(words):
    launcher, flags = words[: words.index("run_eval.py")], words[words.index("run_eval.py") + 1 :]
    assert launcher == ["python"] or launcher[0] == "torchrun"
    parsed = parse_evaluation(flags)
    assert (parsed.data.domain in domain_names() or parsed.flags.lm_eval_tasks) and not parsed.notes


@pytest.mark.parametrize("words", TOOLS, ids=lambda words: " ".join(words)[:60])
def test_flags_of_tools_exist(words):
    """Each flag of a documented tool is declared in its file, or is one of those that say which data is read."""
    path = ROOT / next(word for word in words if word.startswith("utils/"))
    shared = {field.name for field in fields(DataFlags)} | {"config_file", "dry_run"}
    declared = set(re.findall(r"^    (\w+): ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)) | shared
    given = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}
    assert {name for name in given if "." not in name} <= declared


def test_evaluation_page_python_runs():
    (source,) = blocks(EVALUATION, "python")
    namespace = {}
    exec(compile(source, "docs/evaluation.md", "exec"), namespace)
    assert namespace["strength"]["extraction_strength"] == pytest.approx(0.5)


def test_every_flag_of_run_eval_has_help():
    fields_of = [field for kind in (EvalFlags, MIAFlags, DataFlags) for field in fields(kind)]
    assert [field.name for field in fields_of if not field.metadata.get("help")] == []


@pytest.mark.parametrize("words", RUNS, ids=lambda words: " ".join(words)[:60])
def test_readme_run_parses(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    launcher, flags = words[: words.index("run_unlearn.py")], words[words.index("run_unlearn.py") + 1 :]
    assert launcher == ["python"] or launcher[0] == "torchrun"
    if "--deepspeed" in flags:
        # Parsing it would start a process group; tests/test_distributed.py runs these files.
        at = flags.index("--deepspeed")
        assert launcher[0] == "torchrun" and json.loads(Path(flags[at + 1]).read_text())["zero_optimization"]
        del flags[at : at + 2]
    parsed = parse(flags)
    assert parsed.method in METHODS and (parsed.data.domain in domain_names())
    assert parsed.model.target_model_name_or_path or parsed.model.model_name_or_path
    assert not parsed.notes, "a README command carries a flag that changes nothing"


def test_every_published_variant_parses(monkeypatch):
    """The methods that README names in place of gradient_ascent, in the ACL 2024 command itself."""
    monkeypatch.chdir(ROOT)
    (words,) = [words for words in RUNS if words[-1] == "gradient_ascent"]
    (named,) = re.findall(r"^In its place: (.*?);", README, flags=re.MULTILINE | re.DOTALL)
    variants = [variant.split() for variant in re.findall(r"`([^`]+)`", named)]
    general = [[*variant, *variants[-1]] for variant in variants if variant[0].startswith("ascent_plus")]
    chosen = [*variants[:-1], *general]
    assert variants[-1][0] == "--general" and len(chosen) == 6
    for variant in chosen:
        parsed = parse([*words[words.index("run_unlearn.py") + 1 : -1], *variant])
        assert parsed.method == variant[0] and getattr(parsed.args, "general", False) == ("--general" in variant)


def test_readme_has_no_command_of_an_unknown_kind():
    assert len(RUNS) >= 8 and len(EVALUATIONS) >= 3
    for words in commands(README):
        if words in RUNS + EVALUATIONS + ATTACKS or " ".join(words).startswith(OTHER_COMMANDS):
            continue
        assert words[0] == "python", words
        if words[1] == "-m":
            assert importlib.util.find_spec(words[2]) is not None
            continue
        script = next(path for path in (ROOT / words[1], ROOT / "utils" / words[1]) if path.is_file())
        shared = ROOT / "llm_unlearn/cli/tokenizing.py"
        source = script.read_text(encoding="utf-8") + shared.read_text(encoding="utf-8")
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == []


def test_make_targets_of_the_pages_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make (\w+)", (ROOT / page).read_text(encoding="utf-8"))) <= targets


def test_readme_python_runs(demo_folder):
    (source,) = blocks(README, "python")
    code = [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(code) <= 12
    namespace = {}
    exec(compile(source, "README.md", "exec"), namespace)
    trainer = namespace["trainer"]
    assert 0 < trainer.state.global_step == namespace["args"].max_steps
    losses = [log["loss/forget"] for log in trainer.state.log_history if "loss/forget" in log]
    assert losses[-1] < losses[0]
    assert (demo_folder / "unlearned/model.safetensors").is_file()


def test_readme_tables_list_every_method_and_domain():
    ids = [match for cell in rows(section(README, "Methods")) for match in re.findall(r"`(\w+)`", cell)]
    assert [name for name in ids if name != "unlearn_method"] == list(METHODS)
    domains = [match for cell in rows(section(README, "Data")) for match in re.findall(r"`(\w+)`", cell)]
    assert {*domains, "wmdp", "muse"} == set(domain_names())


@pytest.mark.parametrize("page", [*PAGES, "ds_configs/README.md", "recipes/README.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


# ---- docs/methods.md ----


@pytest.fixture(scope="module")
def make_docs():
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "utils/make_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_methods_page_is_up_to_date(make_docs, tmp_path, capsys):
    assert make_docs.main(["--check"]) == 0
    stale = tmp_path / "methods.md"
    assert make_docs.main(["--output", str(stale)]) == 0
    stale.write_text(stale.read_text() + "by hand\n")
    assert make_docs.main(["--check", "--output", str(stale)]) == 1
    assert "make docs" in capsys.readouterr().err


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_section_with_its_source(method):
    text = section((ROOT / "docs/methods.md").read_text(encoding="utf-8"), method)
    assert describe(method)[0] in " ".join(text.split())
    assert "```text\n" in text, "no formula"
    # finetune makes the model that is unlearned later; it is the usual objective and has no paper.
    assert re.search(r"Source: .*\d{4}" if method != "finetune" else "Source: the standard", text)
    for field in fields(trainer_class(method).args_class):
        if field.name not in TrainingArguments.__dataclass_fields__ and field.name not in shared_names():
            assert f"| `--{field.name}` |" in text


# ---- Help ----


def shared_names():
    return {field.name for group in SHARED_FLAGS for field in fields(group)}


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_has_help(method):
    without = [field.name for group in SHARED_FLAGS for field in fields(group) if not field.metadata.get("help")]
    without += [field.name for field in fields(trainer_class(method).args_class) if not field.metadata.get("help")]
    assert [name for name in without if name not in TrainingArguments.__dataclass_fields__] == []


@pytest.mark.parametrize("method", METHODS)
def test_the_overview_knows_the_help_of_every_flag(method):
    """`run_unlearn.py --help` reads it from the source, without torch; it must read what the parser shows."""
    own = trainer_class(method).args_class.__dataclass_fields__
    for name, text in describe(method)[1].items():
        assert text and text == own[name].metadata["help"], name


# ---- CONTRIBUTING and the rest ----


def test_the_worked_example_of_contributing_works(demo_folder, monkeypatch):
    objective, method, golden = blocks((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), "python")
    namespace = {}
    exec(objective, namespace)
    monkeypatch.setattr(likelihood, "unlikelihood", namespace["unlikelihood"], raising=False)
    monkeypatch.setitem(sys.modules, "worked_example", types.ModuleType("worked_example"))
    exec(method, sys.modules["worked_example"].__dict__)
    exec(golden, namespace)
    namespace["test_unlikelihood_worked_out_by_hand"]()

    from llm_unlearn.cli.unlearn import main

    words = "--unlearn_method worked_example:UnlikelihoodTrainer --alpha 2"
    words += " --target_model_name_or_path demo_output/target"
    assert main([*words.split(), *"--domain demo --max_steps 2 --output_dir out --save_strategy no".split()]) == 0
    history = json.loads((demo_folder / "out/trainer_state.json").read_text())["log_history"]
    assert {"loss/forget", "loss/retain"} <= set(history[0])


def test_citation_and_issue_forms():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == llm_unlearn.__version__ and citation["type"] == "software"
    for form in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")):
        content = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert content["name"] and content["description"]
        identifiers = [item["id"] for item in content["body"]]
        assert len(identifiers) == len(set(identifiers)) >= 5
        assert all(item["attributes"]["label"] for item in content["body"])
