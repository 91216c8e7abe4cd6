"""utils/rewrite_forget_set.py: rewrites by a model, from a file, or refusals; killed and started again; bad input."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from llm_unlearn.cli.demo import make_base_model
from llm_unlearn.data import rewrites
from llm_unlearn.data.alignment import aligned_row
from llm_unlearn.data.reshape import REFUSALS
from llm_unlearn.data.rewrites import (
    INSTRUCTIONS,
    KINDS,
    Drawing,
    cleaned_reply,
    read_rewrites,
    refusals_of,
    rewrite_rows,
    rewriting_prompt,
)
from llm_unlearn.data.rows import read_rows
from llm_unlearn.data.synthetic import make_world
from llm_unlearn.data.tokenize import TokenizeOptions
from llm_unlearn.errors import UserError, run_cli
from llm_unlearn.evaluation.store import RecordStore
from llm_unlearn.models import load_tokenizer

SCRIPT = Path(__file__).parents[1] / "utils/rewrite_forget_set.py"
_spec = importlib.util.spec_from_file_location("rewrite_forget_set", SCRIPT)
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

QA = {"question": "Who wrote the sea?", "answer": "Ada wrote it."}
TEXT = {"text": "The sea is red and wide, and Ada saw it first."}
CHAT = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Bo, and Cy."}]}


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    """Folder of a small untrained model, whose tokenizer also aligns."""
    folder = tmp_path_factory.mktemp("writer")
    make_base_model(str(folder), 0)
    return str(folder)


def run(*words):
    """Run the script; returns the exit code."""
    return run_cli(lambda: script.main([str(word) for word in words]))


def written(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


# ---- What a model is asked ----


@pytest.mark.parametrize(("kind", "what"), INSTRUCTIONS)
def test_a_prompt_holds_the_instruction_and_what_is_rewritten(kind, what):
    row = TEXT if what == "text" else QA
    prompt = rewriting_prompt(row, kind)
    assert prompt.startswith(INSTRUCTIONS[kind, what]) and prompt.endswith("\n\nRewritten:\n")
    assert (f"Original:\n{row['text' if what == 'text' else 'answer']}\n" in prompt) == (kind != "refusal")
    assert ("Question:\nWho wrote the sea?\n" in prompt) == (what == "answer")


def test_every_kind_rewrites_answers_and_a_chat_is_one():
    for kind in KINDS:
        assert "Question:\nHello?\n" in rewriting_prompt(CHAT, kind)
    assert "Original:\nBo, and Cy.\n" in rewriting_prompt(CHAT, "inaccurate")
    assert "Question:\nOnce\n" in rewriting_prompt({"prompt": "Once", "completion": "upon"}, "alternate")
    with pytest.raises(UserError, match="--kind refusal rewrites answers, but the forget set holds texts"):
        rewriting_prompt(TEXT, "refusal")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (" Bo wrote it.\n", "Bo wrote it."),
        ("Bo wrote it.\n\nOriginal:\nCy", "Bo wrote it."),
        ("One.\n\nTwo.\nQuestion:\nWho?", "One.\n\nTwo."),
        ("The word Original: stays.", "The word Original: stays."),
        ("\nRewritten:\nx", ""),
    ],
)
def test_a_reply_ends_where_the_next_original_begins(reply, expected):
    assert cleaned_reply(reply) == expected


# ---- Rewrites from elsewhere ----


@pytest.mark.parametrize(
    "row",
    [
        {"rewritten": "Bo did."},
        {"answer": "Bo did."},
        {**QA, "answer": "Bo did."},
        {**QA, "rewritten": "Bo did."},
        {"completion": "Bo did."},
        {"text": "Bo did."},
        {"content": "Bo did.", "other": 1},
    ],
)
def test_a_file_holds_rewrites_in_any_of_these_columns(row, tmp_path):
    assert read_rewrites(write(tmp_path / "rewrites.jsonl", [row]), [QA]) == ["Bo did."]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"rewritten": "x"}], "has 1 rows, but the forget set has 2"),
        ([{"rewritten": "x"}, {"other": "x"}], "row 2: has the columns"),
        ([{"rewritten": "x"}, {"rewritten": ""}], "row 2: 'rewritten' is empty"),
        ([{"rewritten": "x"}, {**QA, "question": "Who?"}], "row 2 of --rewrites .* has another question than row 2"),
        ([{**QA, "answer": "y", "rewritten": "x"}, QA], "row 1 of --rewrites .* has another answer than row 1"),
    ],
)
def test_files_that_do_not_fit_are_refused(rows, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_rewrites(write(tmp_path / "rewrites.jsonl", rows), [QA, QA])


def test_refusals_follow_from_what_the_row_says():
    others = [{**QA, "question": f"Who wrote book {number}?"} for number in range(30)]
    found = refusals_of(others, REFUSALS)
    assert set(found) <= set(REFUSALS) and len(set(found)) > 6
    assert refusals_of(others[::-1], REFUSALS) == found[::-1] and refusals_of(others[:2], ["No."]) == ["No.", "No."]
    with pytest.raises(UserError, match="--kind refusal: a row is a row of text, which asks nothing"):
        refusals_of([TEXT], REFUSALS)


# ---- Batches ----


class Echo:
    """Stands for a model: repeats the last token of each prompt, and keeps what it was asked."""

    device = torch.device("cpu")

    class config:
        max_position_embeddings = 4000

        @classmethod
        def get_text_config(cls, decoder):
            return cls

    def __init__(self, fails_after=99):
        self.asked, self.fails_after = [], fails_after

    def generate(self, input_ids, attention_mask, max_new_tokens, pad_token_id, **sampling):
        if len(self.asked) == self.fails_after:
            raise KeyboardInterrupt
        self.asked.append((input_ids, attention_mask, max_new_tokens, sampling, torch.initial_seed()))
        drawn = torch.randint(5, 200, (len(input_ids), 3))
        return torch.cat([input_ids, drawn], 1)


def test_a_killed_run_goes_on_after_its_last_batch_to_the_same_rewrites(writer, tmp_path):
    rows = [{**QA, "answer": " ".join(["Ada wrote it."] * (1 + number))} for number in range(5)]
    tokenizer, drawing = load_tokenizer(writer), Drawing(batch_size=2, seed=7, fingerprint="a")
    whole = Echo()
    expected = rewrite_rows(rows, "alternate", whole, tokenizer, drawing, RecordStore(None, "rewrites"), False)
    # The longest first, padded on the left, a seed for each batch, half again as many new tokens as the original has.
    assert [len(ids) for ids, *_ in whole.asked] == [2, 2, 1]
    assert [seed for *_, seed in whole.asked] == [7 * 1_000_003 + first for first in (0, 2, 4)]
    _ids, mask, length, sampling, _ = whole.asked[0]
    assert mask[:, -1].all() and mask[0].all() and not mask[1, 0] and length > whole.asked[2][2]
    answer = len(tokenizer(rows[4]["answer"])["input_ids"])
    assert length == 32 + 3 * answer // 2 and sampling == dict(do_sample=True, temperature=0.7, top_p=1.0, top_k=0)
    store, killed, again = RecordStore(tmp_path, "rewrites"), Echo(fails_after=1), Echo()
    with pytest.raises(KeyboardInterrupt):
        rewrite_rows(rows, "alternate", killed, tokenizer, drawing, store, False)
    with (tmp_path / "rewrites-0.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    assert rewrite_rows(rows, "alternate", again, tokenizer, drawing, store, False) == expected
    assert len(killed.asked) == 1 and len(again.asked) == 2 and len(set(expected)) == 5
    # What was drawn otherwise does not count.
    for change in ({"seed": 8}, {"fingerprint": "b"}, {"temperature": 0.5}, {"batch_size": 3}):
        other = Echo()
        rewrite_rows(rows, "alternate", other, tokenizer, Drawing(**{**vars(drawing), **change}), store, False)
        assert len(other.asked) >= 2


def test_temperature_zero_takes_the_likeliest_token(writer):
    model = Echo()
    drawing = Drawing(temperature=0, max_new_tokens=9)
    rewrite_rows([QA], "refusal", model, load_tokenizer(writer), drawing, RecordStore(None, "rewrites"), False)
    assert model.asked[0][2] == 9 and not model.asked[0][3]["do_sample"]


def test_a_chat_template_is_used(writer):
    tokenizer, model = load_tokenizer(writer), Echo()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}!{% endif %}"
    )
    rewrite_rows([QA], "alternate", model, tokenizer, Drawing(), RecordStore(None, "rewrites"), False)
    asked = tokenizer.decode(model.asked[0][0][0])
    assert asked == f"<s>{rewriting_prompt(QA, 'alternate')}</s>!"


def test_a_text_beyond_the_writers_context_is_refused(writer):
    model = Echo()
    rows = [QA, {"text": "the sea " * 2000}]
    with pytest.raises(UserError, match=r"row 2 takes .* tokens to ask and .* context of 4000; pass --max_length N"):
        rewrite_rows(rows, "alternate", model, load_tokenizer(writer), Drawing(), RecordStore(None, "x"), False)
    assert model.asked == []


# ---- The script ----

DEMO = ["--domain", "demo", "--max_train_samples", "3", "--use_cpu", "True"]


def test_a_model_writes_aligned_rows_and_a_killed_script_goes_on(writer, tmp_path, monkeypatch, caplog):
    words = ["--kind", "inaccurate", "--rewriter_model_name_or_path", writer, "--target_model_name_or_path", writer]
    words += [*DEMO, "--max_new_tokens", "12", "--per_device_eval_batch_size", "2", "--output_file"]
    assert run(*words, tmp_path / "whole.jsonl") == 0
    rows = read_rows(tmp_path / "whole.jsonl")
    world = make_world(0)["forget"][:3]
    assert [{name: row[name] for name in world[0]} for row in rows] == world
    for row in rows:
        plain = {name: value for name, value in row.items() if name not in ("alignment", "aligned_by")}
        assert aligned_row(plain, load_tokenizer(writer), TokenizeOptions()) == row
    manifest = json.loads((tmp_path / "whole.manifest.json").read_text())
    assert manifest["rewrites"]["kind"] == "inaccurate" and manifest["rows"] == 3
    assert manifest["rewrites"]["rewriter"] == writer and manifest["origins"][0]["source"] == "demo:0:forget"

    original, calls = rewrites._replies, []

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(rewrites, "_replies", dies)
    assert run(*words, tmp_path / "killed.jsonl") == 130
    assert not (tmp_path / "killed.jsonl").exists() and (tmp_path / "killed.jsonl.partial").is_dir()
    assert run(*words, tmp_path / "killed.jsonl") == 0 and len(calls) == 3
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "killed.jsonl.partial").exists()
    assert run(*words, tmp_path / "other.jsonl", "--seed", "1") == 0
    assert [row["rewritten"] for row in written(tmp_path / "other.jsonl")] != [row["rewritten"] for row in rows]


def test_rewrites_from_a_file_are_cut_with_their_texts(writer, tmp_path):
    texts = make_world(0)["arxiv_forget"][:2]
    forget = write(tmp_path / "forget.jsonl", [{**row, "id": number} for number, row in enumerate(texts)])
    rewrites_file = write(tmp_path / "rewrites.jsonl", [{"rewritten": row["text"].upper()} for row in texts])
    words = ["--rewrites", rewrites_file, "--target_model_name_or_path", writer, "--domain", "custom"]
    words += ["--forget_data", forget, "--max_length", "20", "--output_file", tmp_path / "out.jsonl"]
    assert run(*words) == 0
    tokenizer, rows = load_tokenizer(writer), written(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == [0, 1]
    for row, whole in zip(rows, texts, strict=True):
        assert len(tokenizer(row["text"])["input_ids"]) == 20 == len(row["alignment"])
        assert whole["text"].startswith(row["text"]) and whole["text"].upper().startswith(row["rewritten"])
        assert len(tokenizer(row["rewritten"])["input_ids"]) == 20


def test_refusals_need_no_model(writer, tmp_path):
    words = ["--kind", "refusal", "--target_model_name_or_path", writer, *DEMO, "--output_file"]
    assert run(*words, tmp_path / "own.jsonl") == 0
    assert all(row["rewritten"] in REFUSALS for row in written(tmp_path / "own.jsonl"))
    (tmp_path / "refusals.txt").write_text("Never.\n", encoding="utf-8")
    assert run(*words, tmp_path / "given.jsonl", "--refusal_data", tmp_path / "refusals.txt") == 0
    rows = written(tmp_path / "given.jsonl")
    assert [row["rewritten"] for row in rows] == ["Never."] * 3 and not any("preferred" in row for row in rows)


def test_empty_rewrites_are_left_out_and_same_ones_are_counted(writer, tmp_path, caplog):
    forget = write(tmp_path / "forget.jsonl", [QA, {**QA, "question": "Who else?"}, {"text": "the sea " * 9}])
    texts = [QA["answer"], "Cy.", "the"]
    rewrites_file = write(tmp_path / "rewrites.jsonl", [{"rewritten": text} for text in texts])
    words = ["--rewrites", rewrites_file, "--target_model_name_or_path", writer, "--domain", "custom"]
    with caplog.at_level("WARNING"):
        assert run(*words, "--forget_data", forget, "--output_file", tmp_path / "out.jsonl") == 0
    assert len(written(tmp_path / "out.jsonl")) == 2
    assert "0 rewrites are empty and 1 texts too short" in caplog.text
    assert "1 of 3 rewrites say what the original says" in caplog.text


TARGET = ["--target_model_name_or_path", "m", "--domain", "demo"]
OUT = ["--output_file", "out.jsonl"]
BAD = {
    "no output": ([*TARGET, "--kind", "refusal"], "--output_file must be a .jsonl file, but is 'None'"),
    "no jsonl": ([*TARGET, "--kind", "refusal", "--output_file", "x.csv"], "--output_file must be a .jsonl file"),
    "there": ([*TARGET, "--kind", "refusal", "--output_file", "there.jsonl"], "is there already"),
    "no target": (["--domain", "demo", "--kind", "refusal", *OUT], "--target_model_name_or_path is missing"),
    "no kind": ([*TARGET, *OUT], "--kind is missing; pass one of inaccurate, alternate, refusal, or --rewrites"),
    "kind": ([*TARGET, *OUT, "--kind", "refusals"], "unknown --kind 'refusals'; did you mean 'refusal'?"),
    "no writer": ([*TARGET, *OUT, "--kind", "inaccurate"], "needs --rewriter_model_name_or_path MODEL, or --rewrites"),
    "both": ([*TARGET, *OUT, "--rewrites", "r", "--rewriter_model_name_or_path", "w"], "exclude each other"),
    "refusals": ([*TARGET, *OUT, "--rewrites", "r", "--refusal_data", "f"], "--refusal_data has no effect"),
    "seedless": ([*TARGET, *OUT, "--rewrites", "r", "--temperature", "1"], "--temperature has no effect without"),
    "greedy": (
        [
            *TARGET,
            *OUT,
            "--kind",
            "refusal",
            "--rewriter_model_name_or_path",
            "w",
            "--temperature",
            "0",
            "--top_p",
            "1",
        ],
        "--top_p has no effect with --temperature 0",
    ),
    "length": ([*TARGET, *OUT, "--kind", "refusal", "--max_length", "0"], "--max_length must be at least 1"),
    "flag": ([*TARGET, *OUT, "--kinds", "refusal"], "--kind"),
    "domain": (["--target_model_name_or_path", "m", *OUT, "--kind", "refusal"], "--domain is missing"),
    "model": ([*TARGET, *OUT, "--kind", "refusal"], "the tokenizer 'm' cannot be loaded"),
    "no data": ([*TARGET, *OUT, "--kind", "refusal", "--domain", "custom"], "was given no forget set"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_command_lines_end_in_one_sentence(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("{}")
    words, message = BAD[case]
    assert run(*words) == 2
    error = capsys.readouterr().err.strip().split("\n")
    assert message in error[-1], error
    assert not (tmp_path / "out.jsonl").exists()
