"""ILU's unrelated data: files, names, environments, sets tokenized before; its recipes and its benchmark."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from llm_unlearn.arguments import DataFlags
from llm_unlearn.data import splits, training_sets
from llm_unlearn.data.environments import are_at_hand, load_environments
from llm_unlearn.errors import UserError
from llm_unlearn.parsing import parse

ROOT = Path(__file__).resolve().parents[1]


def write(path, count, word):
    found = [{"question": f"What is {n} {word}?", "answer": f"{n}."} for n in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, found)))
    return str(path)


def test_each_set_is_an_environment(tmp_path):
    names = [write(tmp_path / "a.jsonl", 3, "plus one"), write(tmp_path / "b.jsonl", 5, "times two")]
    source = load_environments(names, DataFlags(domain="custom", max_train_samples=4))
    assert [row["environment"] for row in source.rows] == [0, 0, 0, 1, 1, 1, 1]
    assert [origin["source"] for origin in source.origins] == names
    assert are_at_hand(names, DataFlags()) and not are_at_hand(["gsm8k"], DataFlags())


@pytest.mark.parametrize("place", ["gsm8k/train", "gsm8k"])
def test_gsm8k_by_name_from_a_folder(place, tmp_path):
    path = write(tmp_path / f"{place}.jsonl", 3, "plus one")
    source = load_environments(["gsm8k"], DataFlags(domain="tofu", data_dir=str(tmp_path)))
    assert len(source.rows) == 3 and source.origins[0]["source"] == path


def test_gsm8k_by_name_from_the_hub(monkeypatch):
    """Also where a revision is given, which is one of the domain's sets."""
    asked = []

    def hub_rows(path, config, split, column, limit, options, reshape):
        asked.append((path, config, split, limit, options.revision))
        return [{"question": "1 + 1?", "answer": "2"}], "a commit"

    monkeypatch.setattr(splits, "hub_rows", hub_rows)
    source = load_environments(["gsm8k"], DataFlags(domain="tofu", dataset_revision="v9", max_train_samples=10))
    assert asked == [("openai/gsm8k", "main", "train", 10, None)]
    assert source.origins[0]["revision"] == "a commit" and source.rows[0]["environment"] == 0


def test_gsm8k_as_it_is(shared_data):
    source = load_environments(["gsm8k"], DataFlags(domain="tofu", data_dir=str(shared_data)))
    assert len(source.rows) == 7473 and "####" in source.rows[0]["answer"]


def test_sets_that_were_tokenized_before_are_joined_by_it(demo_tokenizer, tmp_path, monkeypatch):
    """What lies on disk has no unrelated rows, and its key does not know of them."""
    found, asked = {name: [{"input_ids": [5, 6], "labels": [5, 6]}] for name in ("forget", "retain")}, []
    monkeypatch.setattr(training_sets, "find_cached", lambda *given: (asked.append(sorted(given[2])), found)[1])
    names = [write(tmp_path / "a.jsonl", 2, "plus one"), write(tmp_path / "b.jsonl", 1, "times two")]
    words = ["--unlearn_method", "npo", "--domain", "demo", "--regularizer", "ilu", "--do_eval", "True", "--ilu_data"]
    parsed = parse([*words, *names, "--output_dir", str(tmp_path)])
    sources, train, evaluation = training_sets.training_sets(parsed, demo_tokenizer)
    assert asked == [["forget", "retain"]] and sorted(sources) == ["forget", "invariance", "retain"]
    assert list(train.streams) == ["forget", "retain", "invariance"] and train.streams["forget"] == found["forget"]
    assert [row["environment"] for row in train.streams["invariance"]] == [0, 0, 1]
    assert "invariance" not in evaluation


@pytest.mark.parametrize(
    "specs, data, message",
    [
        (["gsm9k"], {}, "unknown --ilu_data 'gsm9k'; did you mean 'gsm8k'?"),
        (["nowhere.jsonl"], {}, "data file 'nowhere.jsonl' does not exist"),
        (["{folder}/empty.jsonl"], {}, "empty.jsonl has no rows"),
        (
            ["gsm8k"],
            {"data_dir": "{folder}"},
            "has no gsm8k/train.{{jsonl,json,csv,parquet}} or gsm8k.{{jsonl,json,csv,parquet}}; --ilu_data FILE takes",
        ),
    ],
)
def test_data_that_is_not_there(specs, data, message, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    specs = [spec.format(folder=tmp_path) for spec in specs]
    data = {key: value.format(folder=tmp_path) for key, value in data.items()}
    with pytest.raises(UserError) as caught:
        load_environments(specs, DataFlags(domain="custom", **data))
    assert message.replace("{{", "{").replace("}}", "}") in str(caught.value)


# ---- Recipes ----


@pytest.mark.parametrize("name", ["tofu/npo_ilu", "muse/npo_ilu", "wmdp/npo_ilu", "wmdp/rmu_ilu"])
def test_recipes_say_where_each_value_stands_and_their_commands_parse(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = Path(f"recipes/{name}.yaml").read_text(encoding="utf-8").splitlines()
    for line in lines:
        assert line.startswith("# ") or "  # " in line, line
    assert any(line.startswith("ilu_weight:") and "not found" in line for line in lines)
    words = shlex.split(lines[0].partition(": ")[2])
    parsed = parse(words[words.index("run_unlearn.py") + 1 :])
    args = parsed.args
    assert (
        args.regularizer == ["ilu"] and args.ilu_data == ["gsm8k"] and args.output_dir.endswith(name.replace("/", "-"))
    )
    if name.startswith("wmdp"):
        given = yaml.safe_load("\n".join(lines))
        rows = given["per_device_train_batch_size"] * given.get("gradient_accumulation_steps", 1)
        assert rows * args.ilu_ratio == 48


@pytest.mark.full
def test_the_benchmark_runs_in_small(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import invariance

    rows = invariance.run(repeats=1, is_quick=True)
    found = {row.job: row.ours for row in rows if row.metric.startswith("FLOPs")}
    # A third stream; then the forwards of three micro-batches of four on top; a head twice as often as NPO has it.
    for micro_batches, expected in ((1, 1.5), (4, 1.5 + 3 / 4 / 6)):
        (job,) = (job for job in found if job.startswith(f"npo, logit_scale; {micro_batches} micro-batches"))
        assert expected <= found[job] <= expected + 0.02
    assert len([row for row in rows if row.metric.startswith("time")]) == 6
