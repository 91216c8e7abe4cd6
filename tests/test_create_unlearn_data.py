"""utils/create_unlearn_data.py: a domain in the layout of --data_dir, cut, filtered, mixed and paired, with hashes."""

import importlib.util
import json
from pathlib import Path

import pytest

from llm_unlearn.arguments import DataFlags
from llm_unlearn.cli.demo import make_base_model
from llm_unlearn.cli.unlearn import main as unlearn
from llm_unlearn.data.splits import DOMAINS, load_split, local_path, split_names
from llm_unlearn.data.synthetic import DEMO_SPLITS, make_world, write_world
from llm_unlearn.data.unlearn_data import Preparation, cut_text, mix, write_jsonl
from llm_unlearn.errors import run_cli
from llm_unlearn.manifests import file_sha256, incompleteness
from llm_unlearn.models import load_tokenizer

SCRIPT = Path(__file__).parents[1] / "utils/create_unlearn_data.py"
_spec = importlib.util.spec_from_file_location("create_unlearn_data", SCRIPT)
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a small untrained model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    make_base_model(str(folder), 0)
    return str(folder)


@pytest.fixture(scope="module")
def arxiv(tmp_path_factory):
    """A folder that holds arxiv/forget, approximate and retain in the layout of --data_dir."""
    folder = tmp_path_factory.mktemp("data")
    world = make_world(0)
    for name in ("forget", "approximate", "retain"):
        write_jsonl(folder / f"arxiv/{name}.jsonl", world[f"arxiv_{name}"])
    return folder


def run(*words):
    """Run the script; returns the exit code."""
    return run_cli(lambda: script.main([str(word) for word in words]))


def written(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def write(path, rows):
    write_jsonl(path, rows)
    return path


# ---- The layout ----


@pytest.mark.parametrize("domain", [name for name in DOMAINS if DOMAINS[name]])
def test_every_set_is_written_where_data_dir_looks_first(domain, tmp_path):
    """A row written to `local_path` is the row that `load_split` reads, and no two sets share a file."""
    flags = DataFlags(domain=domain, data_dir=str(tmp_path))
    names = split_names(domain)
    paths = {name: local_path(name, flags) for name in names}
    assert len(set(paths.values())) == len(names)
    for name, path in paths.items():
        kind = DOMAINS[domain][name].kind
        rows = {"mcq": {"question": name, "choices": ["a", "b"], "answer": 0}, "qa": {"question": name, "answer": "a"}}
        write_jsonl(tmp_path / f"{path}.jsonl", [{**rows, "prompts": {"prompt": name}, "text": {"text": name}}[kind]])
    for name in names:
        (row,) = load_split(name, flags).rows
        assert name in (row.get("question"), row.get("prompt"), row.get("text"))


def test_the_demo_is_written_whole_and_trained_on_from_the_folder(model, tmp_path):
    assert run("--domain", "demo", "--output_dir", tmp_path / "demo") == 0
    manifest = manifest_of(tmp_path / "demo")
    assert (
        set(manifest["files"]) == {f"{name}.jsonl" for name in DEMO_SPLITS}
        and incompleteness(tmp_path / "demo") is None
    )
    assert written(tmp_path / "demo/forget.jsonl") == make_world(0)["forget"]
    (tmp_path / "demo").rename(tmp_path / "copied")
    words = ["--unlearn_method", "grad_diff", "--target_model_name_or_path", model, "--domain", "custom"]
    words += ["--data_dir", tmp_path / "copied", "--output_dir", tmp_path / "out", "--max_steps", "1", "--use_cpu"]
    words += ["True", "--do_eval", "True", "--disable_tqdm", "True", "--save_strategy", "no"]
    assert unlearn([str(word) for word in words]) == 0
    record = json.loads((tmp_path / "out/unlearning.json").read_text())
    assert record["sources"]["forget"][0]["source"] == str(tmp_path / "copied/forget.jsonl")
    assert record["streams"]["retain"]["rows"] == len(make_world(0)["retain"])


def test_a_folder_is_made_of_a_folder(arxiv, model, tmp_path):
    """What was cut and paired trains with --domain arxiv --data_dir, rewritten_transfer too."""
    texts = written(arxiv / "arxiv/forget.jsonl")
    rewrites = write(tmp_path / "rewrites.jsonl", [{"rewritten": row["text"].replace("e", "a")} for row in texts])
    words = ["--domain", "arxiv", "--data_dir", arxiv, "--output_dir", tmp_path / "made", "--tokenizer_name", model]
    assert run(*words, "--max_length", "24", "--rewrites", rewrites) == 0
    manifest = manifest_of(tmp_path / "made")
    assert list(manifest["files"]) == ["arxiv/forget.jsonl", "arxiv/approximate.jsonl", "arxiv/retain.jsonl"]
    facts = manifest["files"]["arxiv/forget.jsonl"]
    assert facts["rows"] == facts["cut"] == len(texts) and facts["left_out"] == {}
    assert (
        facts["origins"][0]["source"] == str(arxiv / "arxiv/forget.jsonl") and facts["origins"][0]["revision"] is None
    )
    assert facts["sha256"] == file_sha256(tmp_path / "made/arxiv/forget.jsonl")
    assert "create_unlearn_data.py --domain arxiv" in manifest["command"] and manifest["versions"]["torch"]
    for row, whole in zip(written(tmp_path / "made/arxiv/forget.jsonl"), texts, strict=True):
        assert len(load_tokenizer(model)(row["text"])["input_ids"]) == 24 == len(row["alignment"])
        assert whole["text"].startswith(row["text"]) and row["rewritten"] in whole["text"].replace("e", "a")
    words = ["--unlearn_method", "rewritten_transfer", "--target_model_name_or_path", model, "--domain", "arxiv"]
    words += ["--data_dir", tmp_path / "made", "--output_dir", tmp_path / "out", "--max_steps", "1", "--use_cpu"]
    words += ["True", "--disable_tqdm", "True", "--save_strategy", "no", "--per_device_train_batch_size", "2"]
    assert unlearn([str(word) for word in words]) == 0
    streams = json.loads((tmp_path / "out/unlearning.json").read_text())["streams"]
    assert streams["forget"]["rows"] == streams["rewritten"]["rows"] == len(texts)


def test_several_subsets_go_into_one_folder(tmp_path):
    write_world(tmp_path / "world", 0)
    sets = {
        "wmdp-bio/test": "mcq",
        "bio-forget-corpus/train": "arxiv_forget",
        "bio-retain-corpus/train": "arxiv_retain",
    }
    for path, name in sets.items():
        write_jsonl(tmp_path / f"data/{path}.jsonl", make_world(0)[name])
    words = ["--domain", "wmdp", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out"]
    assert run(*words, "--splits", "forget") == 2
    for topic in ("cyber", "chem"):
        write_jsonl(tmp_path / f"data/{topic}-forget-corpus/train.jsonl", make_world(0)["arxiv_forget"])
    assert run(*words) == 0
    assert set(manifest_of(tmp_path / "out")["files"]) == {f"{path}.jsonl" for path in sets} | {
        f"{topic}-forget-corpus/train.jsonl" for topic in ("cyber", "chem")
    }
    data = DataFlags(domain="wmdp_bio", data_dir=str(tmp_path / "out"))
    assert load_split("mcq", data).rows == load_split("mcq", DataFlags(domain="demo")).rows


# ---- Cut, filtered, mixed ----


def test_lengths_are_characters_without_a_tokenizer(arxiv, tmp_path):
    texts = [row["text"] for row in written(arxiv / "arxiv/forget.jsonl")]
    bound = sorted(map(len, texts))[len(texts) // 2]
    words = ["--domain", "arxiv", "--data_dir", arxiv, "--splits", "forget", "--output_dir"]
    assert run(*words, tmp_path / "cut", "--max_length", "50") == 0
    assert [row["text"] for row in written(tmp_path / "cut/arxiv/forget.jsonl")] == [text[:50] for text in texts]
    assert run(*words, tmp_path / "long", "--min_length", bound) == 0
    kept = [text for text in texts if len(text) >= bound]
    assert [row["text"] for row in written(tmp_path / "long/arxiv/forget.jsonl")] == kept
    facts = manifest_of(tmp_path / "long")["files"]["arxiv/forget.jsonl"]
    assert facts["left_out"] == {"min_length": len(texts) - len(kept)} and 0 < len(kept) < len(texts)


def test_a_cut_by_tokens_ends_where_a_token_ends(model):
    tokenizer = load_tokenizer(model)
    text = make_world(0)["arxiv_forget"][0]["text"]
    ids = tokenizer(text)["input_ids"]
    for length in (1, 7, len(ids) - 1):
        assert tokenizer(cut_text(text, length, tokenizer))["input_ids"] == ids[:length]
    assert cut_text(text, len(ids), tokenizer) == text == cut_text(text, 10**6)


def test_keywords_keep_forget_rows_and_drop_retain_rows(tmp_path):
    rows = [{"text": f"the {word} is here"} for word in ("Lamp", "sea", "LAMPS", "moon")]
    for name in ("forget", "retain", "holdout"):
        write_jsonl(tmp_path / f"data/{name}.jsonl", rows)
    words = ["--domain", "custom", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out"]
    assert run(*words, "--keywords", "lamp,sun") == 0
    found = {name: written(tmp_path / f"out/{name}.jsonl") for name in ("forget", "retain", "holdout")}
    assert found == {"forget": [rows[0], rows[2]], "retain": [rows[1], rows[3]], "holdout": rows}
    assert manifest_of(tmp_path / "out")["files"]["retain.jsonl"]["left_out"] == {"keywords": 2}


def test_a_quarter_of_chat_is_mixed_in_and_trimmed(tmp_path):
    """8 retain rows, 2 chat rows, shuffled, 8 of the 10 kept; by the seed alone."""
    rows = [{"text": str(number)} for number in range(8)]
    chat = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": c}]} for c in "abcdefg"]
    for name, part in (("forget", rows), ("retain", rows), ("chat", chat)):
        write_jsonl(tmp_path / f"data/{name}.jsonl", part)
    words = ["--domain", "custom", "--data_dir", tmp_path / "data", "--chat_data", tmp_path / "data/chat.jsonl"]
    assert run(*words, "--output_dir", tmp_path / "out") == 0
    mixed = mix(rows, chat[:2], 42)
    assert written(tmp_path / "out/retain.jsonl") == [row for _, row in mixed] != rows
    assert written(tmp_path / "out/forget.jsonl") == rows
    facts = manifest_of(tmp_path / "out")["files"]["retain.jsonl"]
    assert facts["rows"] == 8 and facts["chat_rows"] == sum(is_chat for is_chat, _ in mixed) in (0, 1, 2)
    assert [origin["rows"] for origin in facts["origins"]] == [8, 2]
    assert run(*words, "--output_dir", tmp_path / "more", "--chat_share", "0.75", "--seed", "3") == 0
    assert written(tmp_path / "more/retain.jsonl") == [row for _, row in mix(rows, chat[:6], 3)]
    assert {is_chat for is_chat, _ in mix(rows, chat[:6], 3)} == {True, False}


def test_rewrites_are_paired_and_only_aligned_with_a_tokenizer(tmp_path):
    forget = [{"question": "q", "answer": "a", "alignment": [0], "aligned_by": "x"}]
    write_jsonl(tmp_path / "data/forget.jsonl", forget)
    rewrites = write(tmp_path / "rewrites.jsonl", [{"rewritten": "b"}])
    words = ["--domain", "custom", "--data_dir", tmp_path / "data", "--output_dir", tmp_path / "out"]
    assert run(*words, "--rewrites", rewrites) == 0
    assert written(tmp_path / "out/forget.jsonl") == [{"question": "q", "answer": "a", "rewritten": "b"}]


def test_an_interrupted_run_leaves_no_folder(arxiv, tmp_path, monkeypatch):
    original = Preparation.prepare

    def dies(self, name, *arguments):
        if name == "retain":
            raise KeyboardInterrupt
        return original(self, name, *arguments)

    words = ["--domain", "arxiv", "--data_dir", arxiv, "--output_dir", tmp_path / "out"]
    monkeypatch.setattr(Preparation, "prepare", dies)
    assert run(*words) == 130 and not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert run(*words) == 0 and incompleteness(tmp_path / "out") is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


# ---- Bad input ----

BAD = {
    "no folder": (["--domain", "demo"], "--output_dir is missing"),
    "full": (["--domain", "demo", "--output_dir", "full"], "is there and not empty; delete it or pass another"),
    "domain": (["--domain", "dmo", "--output_dir", "out"], "unknown --domain 'dmo'"),
    "no domain": (["--output_dir", "out"], "unknown --domain 'None'"),
    "muse": (["--domain", "muse", "--output_dir", "out"], "muse_news and muse_books have the same names"),
    "split": (["--domain", "demo", "--output_dir", "out", "--splits", "forgot"], "--splits forgot: demo has forget"),
    "length": (["--domain", "demo", "--output_dir", "out", "--max_length", "0"], "--max_length must be at least 1"),
    "too long": (["--domain", "demo", "--output_dir", "out", "--min_length", "9999999"], "is left: "),
    "share": (["--domain", "demo", "--output_dir", "out", "--chat_share", "0.5"], "has no effect without --chat_data"),
    "shares": (
        ["--domain", "demo", "--output_dir", "out", "--chat_data", "x", "--chat_share", "2"],
        "--chat_share must lie in (0, 1], but is 2.0",
    ),
    "few": (
        ["--domain", "demo", "--output_dir", "out", "--chat_data", "few.jsonl"],
        "--chat_data has 1 rows, but --chat_share 0.25 of ",
    ),
    "seed": (["--domain", "demo", "--output_dir", "out", "--seed", "1"], "--seed has no effect without --chat_data"),
    "tokenizer": (
        ["--domain", "demo", "--output_dir", "out", "--tokenizer_name", "m"],
        "--tokenizer_name has no effect",
    ),
    "template": (
        ["--domain", "demo", "--output_dir", "out", "--rewrites", "x", "--question_template", "t"],
        "--question_template has no effect without --tokenizer_name",
    ),
    "rewrites": (
        ["--domain", "demo", "--output_dir", "out", "--rewrites", "few.jsonl"],
        "has 1 rows, but the forget set has",
    ),
    "no forget": (
        ["--domain", "demo", "--output_dir", "out", "--rewrites", "few.jsonl", "--splits", "mcq"],
        "--rewrites has no effect: no forget set is written",
    ),
    "keywords": (
        ["--domain", "demo", "--output_dir", "out", "--keywords", "zzzz"],
        "no row of the forget set is left: ",
    ),
    "missing": (["--domain", "arxiv", "--data_dir", "full", "--output_dir", "out"], "has no arxiv/forget.{jsonl"),
    "own text": (["--domain", "copyright", "--output_dir", "out"], "is your own text"),
    "nothing": (["--domain", "custom", "--output_dir", "out"], "there is nothing to write"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_command_lines_end_in_one_sentence(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    write_jsonl(tmp_path / "few.jsonl", [{"answer": "x", "question": "y"}])
    words, message = BAD[case]
    assert run(*words) == 2
    assert message in capsys.readouterr().err.strip().split("\n")[-1]
    assert not (tmp_path / "out").exists()
