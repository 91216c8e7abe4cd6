"""Recipes of the methods on hidden states: sources, arithmetic of steps and layers, commands; the tiny benchmark."""

import dataclasses
import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import yaml
from probe_world import probe_script

from llm_unlearn.parsing import parse

ROOT = Path(__file__).resolve().parents[1]
UNLEARN = (
    "circuit_breakers", "circuit_breakers_orth", "tuned_lens", "sequential", "sequential_full", "checkpoint_transfer",
    "rewritten_transfer", "max_entropy", "max_update", "probe_unlearn",
)  # fmt: skip
NEW = ("rmu", *UNLEARN)


def text_of(name, folder="wmdp"):
    return (ROOT / f"recipes/{folder}/{name}.yaml").read_text(encoding="utf-8")


def values(name, folder="wmdp"):
    return yaml.safe_load(text_of(name, folder))


@pytest.mark.parametrize("name", NEW)
def test_every_value_says_where_it_stands(name):
    lines = [line for line in text_of(name).splitlines() if not line.startswith("#")]
    marks = ("unlearn", "centerforaisafety/wmdp", "arXiv:", "transformers default", "ours: ")
    for line in lines:
        value, sign, source = line.partition("  # ")
        arithmetic = value.startswith("max_steps") and re.search(r"\d+ rows / 32", source)
        assert sign and (source.startswith(marks) or arithmetic), line


@pytest.mark.parametrize("name", NEW)
def test_the_command_of_the_first_line_parses(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = text_of(name).splitlines()[0].partition(": ")[2]
    words = shlex.split(command)
    parsed = parse(words[words.index("run_unlearn.py") + 1 :])
    assert parsed.args.output_dir == f"output/wmdp-{name}" and words[words.index("--config") + 1].endswith(
        f"{name}.yaml"
    )
    assert f"wmdp/{name}" in command


@pytest.mark.parametrize("name", [name for name in UNLEARN if name != "rewritten_transfer"])
def test_an_update_is_of_32_rows_and_the_steps_go_over_the_published_ones_once(name):
    given = values(name)
    assert 4 * given["per_device_train_batch_size"] * given["gradient_accumulation_steps"] == 32
    phases = 1
    if name.startswith("sequential"):
        phases = len(range(given["start_layer"], given["end_layer"] - 1, -given["layer_step"]))
    assert given["max_steps"] == phases * given["max_train_samples"] / 32


def test_published_weights_rates_and_layers():
    """Of the table of trainers in EleutherAI/unlearn and of its logs: (forget, retain, learning rate)."""
    expected = {
        "circuit_breakers": (5, 5, 1e-3), "circuit_breakers_orth": (23, 2, 1e-3), "tuned_lens": (5, 5, 1e-3),
        "sequential": (50, 5, 1e-3), "sequential_full": (5, 20, 1e-4), "checkpoint_transfer": (5, 5, 1e-3),
        "probe_unlearn": (5, 5, 1e-3), "max_update": (None, 1, 2e-4), "rewritten_transfer": (1, 1, 5e-5),
        "rmu": (None, 1200, 5e-5),
    }  # fmt: skip
    for name, weights in expected.items():
        given = values(name)
        assert (given.get("forget_weight"), given["retain_weight"], given["learning_rate"]) == weights, name
    # States before block i there are those that layer i - 1 hands on.
    assert [layer + 1 for layer in values("probe_unlearn")["layers"]] == [8, 12, 16, 20, 24, 28]
    assert [layer + 1 for layer in values("tuned_lens")["layers"]] == [5, 10, 15, 20, 25, 30]
    assert values("circuit_breakers_orth")["orth_coef"] == 10
    assert values("circuit_breakers_orth")["per_device_train_batch_size"] >= 2


def test_what_is_made_first_lies_where_the_recipe_looks(monkeypatch):
    """The command in a recipe's comment writes what one of its flags reads, with flags that the script has."""
    from llm_unlearn.cli.script_flags import FORGET_DATA, parse_script

    for name, flag in (("tuned_lens", "lens_path"), ("probe_unlearn", "probe_dir"),
                       ("checkpoint_transfer", "affine_map"), ("rewritten_transfer", "forget_data")):  # fmt: skip
        (line,) = (line for line in text_of(name).splitlines() if " first: " in line)
        words = shlex.split(line.partition(" first: ")[2])
        place = next(words[n + 1] for n, word in enumerate(words) if word in ("--output_dir", "--output_file"))
        assert values(name)[flag] == place
        script = next(word for word in words if word.startswith("utils/"))
        assert (ROOT / script).is_file()
        if name == "probe_unlearn":
            flags, data = parse_script(words[words.index(script) + 1 :], probe_script().ProbeFlags, FORGET_DATA, script)
            assert flags.layers == values(name)["layers"] and data.max_train_samples == 5000
            assert flags.early_revision == values("checkpoint_transfer")["teacher_revision"]


# ---- recipes/tiny and benchmarks/unlearning_tiny.py ----


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import unlearning_tiny

    return unlearning_tiny


def test_every_new_recipe_has_a_tiny_one_of_60_steps_at_most(tiny):
    for world in ("demo", "tofu"):
        found = tiny.recipes(world)
        assert {*found} >= {*NEW}, world
        for name, path in found.items():
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
            assert given["max_steps"] <= 60, path
            assert given["unlearn_method"] == values(name)["unlearn_method"], path


def place(flag, world):
    return f"{world.folder}/{flag}"


def test_the_commands_of_the_tiny_recipes_name_what_the_world_has(tiny, tmp_path, monkeypatch):
    places = {flag: partial(place, flag) for flag in tiny.NEEDS}
    monkeypatch.setattr(tiny, "NEEDS", places)
    monkeypatch.chdir(ROOT)
    world = tiny.World("demo", "MODEL", "EARLY", "forget.jsonl", "retain.jsonl", tmp_path)
    for name, path in tiny.recipes("demo").items():
        parsed = parse(tiny.command(path, world, 3, tmp_path / name))
        assert parsed.args.seed == 3 and parsed.model.target_model_name_or_path == "MODEL"
        assert parsed.data.retain_data == "retain.jsonl"
        if name == "probe_unlearn":
            assert parsed.args.probe_dir == f"{tmp_path}/probe_dir"
        rewritten = f"{tmp_path}/forget_data" if name == "rewritten_transfer" else "forget.jsonl"
        assert parsed.data.forget_data == rewritten


def test_a_row_is_met_by_likelihood_or_entropy_and_by_what_is_kept(tiny):
    before = {"forget_nll": 0.1, "forget_entropy": 0.2, "retain_nll": 0.1}
    for forget, entropy, retain, expected in (
        (1.2, 0.2, 0.3, True), (0.1, 1.3, 0.3, True), (0.9, 1.1, 0.1, False), (5.0, 3.0, 0.5, False),
    ):  # fmt: skip
        after = {"forget_nll": forget, "forget_entropy": entropy, "retain_nll": retain}
        assert tiny.is_met(before, after) is expected


def test_measuring_and_the_table(tiny, tiny_world, tmp_path):
    """The NLL is that of a plain loop over rows; the table shows it before and after, with the command."""
    from test_methods import answer_nll

    paths = (tiny_world[name] for name in ("model", "base", "forget", "retain"))
    world = tiny.World("demo", *paths, tmp_path)
    found = tiny.measure(world.model, world)
    for name in ("forget", "retain"):
        assert found[f"{name}_nll"] == pytest.approx(answer_nll(world.model, tiny_world, name), rel=1e-5)
    assert 0 < found["forget_entropy"] < 8
    untrained = tiny.measure(world.early, world)
    assert untrained["forget_entropy"] == pytest.approx(7, abs=1) and not tiny.is_met(untrained, untrained)
    line = {"recipe": "npo", "world": "demo", "seed": 0, "steps": 3, "seconds": 1.25, "before": found,
            "after": untrained, "met": False, "command": ["--a", "b c"]}  # fmt: skip
    shown = tiny.table([line]).splitlines()
    assert shown[2].startswith(f"| npo | demo | 0 | 3 | {found['forget_nll']:.3f} to ") and shown[2].endswith("| NO |")
    assert shown[5] == "python run_unlearn.py --a 'b c'"


@pytest.mark.full
def test_every_tiny_recipe_does_what_the_table_says(tiny, shared_data, tmp_path):
    output = tmp_path / "table.md"
    assert tiny.main(["--output_dir", str(tmp_path), "--tofu_dir", str(shared_data), "--output", str(output)]) == 0
    assert output.read_text().count("| yes |") == 2 * len(tiny.recipes("demo"))


def test_the_worlds_are_asked_for_by_what_there_is(tiny, tmp_path):
    assert [field.name for field in dataclasses.fields(tiny.World)][:3] == ["name", "model", "early"]
    assert tiny.run_cli(lambda: tiny.main(["--worlds", "tofu"])) == 2
    (tmp_path / "models/stories260K-tofu-hf").mkdir(parents=True)
    with pytest.raises(tiny.UserError, match="has no models/stories260K-hf"):
        tiny.tofu_world(tmp_path, tmp_path / "out")
    assert json.dumps(tiny.BOUND) == "0.3"
