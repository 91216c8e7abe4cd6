"""Rows from files: what is accepted, what is refused with file, row and reason, and what the fingerprint tells."""

import csv
import json
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_unlearn.data.rows import canonical_row, check_rows, content_of, fingerprint, form_of, read_rows
from llm_unlearn.errors import UserError

QUICK = settings(deadline=None, derandomize=True, database=None, max_examples=100)
TEXT = {"text": "Once upon a time."}
QA = {"question": "Who?", "answer": "Nobody."}
TURNS = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
CHOICES = ["ape", "bee", "cat", "dog"]


def write(path, content):
    """Write text, bytes, or rows as JSON lines, with no translation of line ends; returns the path."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path):
    """Return what read_rows says about a file that it must refuse."""
    with pytest.raises(UserError) as caught:
        read_rows(path)
    return str(caught.value)


# ---- Forms of a row ----


@pytest.mark.parametrize(
    ("row", "added"),
    [
        (TEXT, {}),
        ({"content": "def f(): pass"}, {"text": "def f(): pass"}),
        ({"input": "seen", "label": 1}, {"text": "seen"}),
        (QA, {}),
        ({"prompt": "Once upon", "completion": " a time."}, {}),
        ({"prompt": "Once upon", "gt": " a time."}, {"completion": " a time."}),
        ({"messages": TURNS}, {}),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {"messages": TURNS}),
        ({"question": "Which?", "choices": CHOICES, "answer": 2}, {"answer": "cat", "answer_index": 2}),
        (
            {"question": "Which?", "choice0": "ape", "choice1": "bee", "choice2": "cat", "answer": "0"},
            {"choices": CHOICES[:3], "answer": "ape", "answer_index": 0},
        ),
    ],
    ids=["text", "content", "input", "qa", "prompt", "gt", "messages", "prompt turns", "choices", "choice0..N"],
)
def test_accepted_forms(row, added):
    """Every other column is kept; a canonical row is left as it is; the row that was given is not changed."""
    given_row = {**row, "path": "a/b", "perturbed_answer": ["x", "y"]}
    before = json.dumps(given_row)
    canonical = canonical_row(given_row)
    assert canonical == {**given_row, **added}
    assert canonical_row(canonical) == canonical
    assert json.dumps(given_row) == before


def test_a_column_is_found_by_its_name_and_never_by_its_place():
    assert canonical_row({"path": "x", "content": "y"})["text"] == "y"
    with pytest.raises(ValueError, match=r"has the columns \['body', 'path'\], but needs text"):
        canonical_row({"path": "x", "body": "y"})


def test_columns_of_null_are_as_good_as_absent():
    """A Parquet table of several forms gives every row all columns."""
    assert canonical_row({"messages": None, "text": None, **QA, "note": None}) == QA
    assert canonical_row({"text": "x", "question": None, "answer": None}) == {"text": "x"}
    row = {"question": "Which?", "choice0": "ape", "choice1": "bee", "choice2": None, "answer": 1, "answer_index": None}
    assert canonical_row(row)["choices"] == ["ape", "bee"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": 5}, "'text' must be text, but is int"),
        ({"text": None}, r"has the columns \[\], but needs text"),
        ({"text": float("nan")}, "'text' must be text, but is float"),
        ({"content": " \n\t"}, "'content' is empty"),
        ({"question": "Who?"}, r"has no column 'answer' \(it has \['question'\]\)"),
        ({"question": "Who?", "answer": ""}, "'answer' is empty"),
        ({"question": "Who?", "answer": None}, r"has no column 'answer' \(it has \['question'\]\)"),
        ({"question": None, "answer": "x"}, r"has the columns \['answer'\], but needs text"),
        ({"question": " ", "answer": "x"}, "'question' is empty"),
        ({"prompt": "Once"}, "has no column 'completion'"),
        ({"prompt": "Once", "completion": " "}, "'completion' is empty"),
        ({}, "needs text"),
        ({"question": "?", "choices": CHOICES, "answer": 4}, "'answer' is 4, but there are 4 choices"),
        ({"question": "?", "choices": CHOICES, "answer": -1}, "'answer' is -1, but there are 4 choices"),
        ({"question": "?", "choices": CHOICES, "answer": "B"}, "the number of a choice, but is 'B'"),
        ({"question": "?", "choices": CHOICES, "answer": None}, "the number of a choice, but is None"),
        ({"question": "?", "choices": CHOICES}, "the number of a choice, but is None"),
        ({"question": "", "choices": CHOICES, "answer": 1}, "'question' is empty"),
        ({"question": "?", "choices": ["a", ""], "answer": 0}, "'choices' must be a list of non-empty texts"),
        ({"question": "?", "choices": ["a", 1], "answer": 0}, "'choices' must be a list of non-empty texts"),
        ({"question": "?", "choices": "ab", "answer": 0}, "'choices' must be a list of non-empty texts"),
        ({"question": "?", "choices": [], "answer": 0}, "there are 0 choices"),
        ({"messages": []}, "'messages' must be a non-empty list"),
        ({"messages": "hello"}, "'messages' must be a non-empty list"),
        ({"messages": ["hello"]}, "must hold objects with 'role' and 'content'"),
        ({"messages": [{"content": "x"}]}, "must hold objects with 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "the content of a user message must be text"),
        ({"messages": TURNS[:1]}, "holds no assistant message"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "holds no assistant message"),
        ({"prompt": TURNS[:1], "completion": None}, "'prompt, completion' holds no assistant message"),
        ({"prompt": TURNS[:1], "completion": "x"}, "'prompt, completion' must hold objects"),
        ("a text", "a row must be an object with named columns, but is str"),
        (None, "a row must be an object with named columns, but is NoneType"),
    ],
)
def test_refused_rows(row, reason):
    with pytest.raises(ValueError, match=reason):
        canonical_row(row)


@pytest.mark.parametrize("answer", [0.9, 1.5, float("inf"), float("nan")])
def test_a_fraction_is_no_number_of_a_choice(answer):
    with pytest.raises(ValueError, match="the number of a choice"):
        canonical_row({"question": "?", "choices": CHOICES, "answer": answer})


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=4,
)
COLUMNS = (
    "text content input question answer choices choice0 choice1 answer_index prompt completion gt messages".split()
)


@QUICK
@given(st.dictionaries(st.sampled_from(COLUMNS), JSON_VALUES, max_size=4))
def test_any_row_is_canonical_or_a_value_error(row):
    try:
        canonical = canonical_row(row)
    except ValueError:
        return
    forms = [{"text"}, {"question", "answer"}, {"prompt", "completion"}, {"messages"}]
    assert any(form <= set(canonical) for form in forms)


# ---- Files ----


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize("form", ["array", "pretty array", "lines", "lines with gaps", "crlf", "byte order mark"])
def test_json_and_json_lines_are_told_apart_by_content(tmp_path, name, form):
    rows = [{**TEXT, "n": 1}, {"text": "caf\u00e9 \u2028 [brackets]", "n": 2}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    content = {
        "array": json.dumps(rows),
        "pretty array": "\n " + json.dumps(rows, indent=2) + "\n",
        "lines": "\n".join(lines),
        "lines with gaps": "\n\n" + "\n \n".join(lines) + "\n\n",
        "crlf": "\r\n".join(lines) + "\r\n",
        "byte order mark": "\ufeff" + "\n".join(lines),
    }[form]
    assert read_rows(write(tmp_path / name, content)) == rows


def test_csv(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["question", "answer"], ["Who, then?", 'A "caf\u00e9"\nby the sea'], ["Why?", "0"]])
    expected = [{"question": "Who, then?", "answer": 'A "caf\u00e9"\nby the sea'}, {"question": "Why?", "answer": "0"}]
    assert read_rows(path) == expected


def test_csv_of_multiple_choice(tmp_path):
    path = write(tmp_path / "rows.csv", "question,choice0,choice1,choice2,choice3,answer\nWhich?,ape,bee,cat,dog,3\n")
    row = read_rows(path)[0]
    assert (row["choices"], row["answer"], row["answer_index"]) == (CHOICES, "dog", 3)


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_csv_rows_end_at_line_ends_only(tmp_path, separator):
    """csv.writer leaves these characters unquoted, so a reader that takes them for line ends cuts the row in two."""
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text"], [f"one{separator}row"]])
    assert read_rows(path) == [{"text": f"one{separator}row"}]


def test_csv_cell_of_a_whole_book(tmp_path):
    """The csv module refuses cells above 131,072 characters unless it is told otherwise."""
    book = "It was a dark night. " * 10_000
    assert read_rows(write(tmp_path / "rows.csv", f"text\n{book}\n")) == [{"text": book}]


@pytest.mark.parametrize(("content", "row"), [("text\nfine\nhello, world\n", 2), ("title\nhello, world\n", 1)])
def test_csv_row_of_too_many_cells_is_refused(tmp_path, content, row):
    """An unquoted comma cuts the text short, and csv.DictReader files the rest under None."""
    assert f"rows.csv, row {row}" in refusal(write(tmp_path / "rows.csv", content))


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"question": "Which?", "choices": CHOICES, "answer": 1},
        {"question": "Whom?", "choices": CHOICES, "answer": 0},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row["answer"] for row in read_rows(tmp_path / "rows.parquet")] == ["bee", "ape"]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{**QA, "text": None}, {"text": "x"}]), tmp_path / "both.parquet"
    )
    assert read_rows(tmp_path / "both.parquet") == [QA, {"text": "x"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([QA, {**QA, "answer": None}]), tmp_path / "null.parquet")
    assert "null.parquet, row 2: has no column 'answer'" in refusal(tmp_path / "null.parquet")


# ---- Refused files: file, row, reason ----


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": "y', "a.jsonl, row 2: not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n\n{"text": "y"\n', "a.jsonl, row 3: not valid JSON"),
        ("a.json", '[{"text": "x"},\n{"text": "y"},\n{"text"', "a.json, line 3: not valid JSON"),
        ("a.jsonl", "I do not know.\n", "a.jsonl, row 1: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "a.jsonl, row 2: not valid UTF-8 (byte 24)"),
        ("a.csv", b"text\nx\ny\n\xe9t\xe9\n", "a.csv, row 4: not valid UTF-8"),
        ("a.jsonl", [QA, {"question": 5, "answer": "x"}], "a.jsonl, row 2: 'question' must be text, but is int"),
        ("a.jsonl", [TEXT, {"text": None}], "a.jsonl, row 2: has the columns [], but needs text"),
        ("a.jsonl", [TEXT, TEXT, {"text": 5}], "a.jsonl, row 3: 'text' must be text, but is int"),
        ("a.jsonl", [QA, QA, {**QA, "answer": "  "}], "a.jsonl, row 3: 'answer' is empty"),
        ("a.jsonl", [QA, {"question": "Who?"}], "a.jsonl, row 2: has no column 'answer'"),
        ("a.json", [{"title": "x"}], "a.json, row 1: has the columns ['title'], but needs text (or content) |"),
        ("a.jsonl", '\n\n{"text": 1}\n', "a.jsonl, row 3: 'text' must be text"),
        ("a.jsonl", "null\n", "a.jsonl, row 1: a row must be an object with named columns, but is NoneType"),
        ("a.json", '[["x"]]', "a.json, row 1: a row must be an object with named columns, but is list"),
        ("a.csv", "question,answer\nWho?,Me\nWhy?,\n", "a.csv, row 2: 'answer' is empty"),
        ("a.csv", "question,answer\nWho?,Me\nWhy?\n", "a.csv, row 2: has no column 'answer'"),
        (
            "a.csv",
            "question,choice0,choice1,answer\n?,a,b,1\n?,a,b,2\n",
            "a.csv, row 2: 'answer' is 2, but there are 2",
        ),
        ("a.jsonl", "", "a.jsonl has no rows"),
        ("a.jsonl", "\n \n", "a.jsonl has no rows"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.csv", "", "a.csv has no rows"),
        ("a.csv", "text\n", "a.csv has no rows"),
        ("a.parquet", "text", "a.parquet is not a readable Parquet file"),
        ("a.txt", "text", "ends in '.txt'; a data file ends in one of .jsonl, .json, .csv, .parquet"),
    ],
)
def test_refused_files(tmp_path, name, content, message):
    said = refusal(write(tmp_path / name, content))
    assert message in said
    assert str(tmp_path) in said


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        assert refusal(path) == f"data file '{path}' does not exist"


def test_invalid_utf8_behind_a_byte_order_mark_is_counted_from_the_start_of_the_file(tmp_path):
    content = b'\xef\xbb\xbf{"text": "x"}\n\xff{"text": "y"}\n'
    assert "row 2: not valid UTF-8 (byte 17)" in refusal(write(tmp_path / "a.jsonl", content))


def test_half_a_surrogate_pair_is_refused(tmp_path):
    """JSON can write it, but no tokenizer can read it."""
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n{"text": "a\\ud800b"}\n')
    assert "a.jsonl, row 2" in refusal(path)


def test_check_rows_numbers_from_1_or_as_told():
    with pytest.raises(UserError, match=r"^set, row 2: 'text' is empty"):
        check_rows([TEXT, {"text": ""}], "set")
    with pytest.raises(UserError, match=r"^set, row 9: 'text' is empty"):
        check_rows([(4, TEXT), (9, {"text": ""})], "set")
    with pytest.raises(UserError, match=r"^set has no rows$"):
        check_rows(iter([]), "set")


# ---- What a row is and says ----


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": TURNS, "prompt": TURNS[:1], "text": "x"}, "messages"),
        ({**QA, "prompt": "x", "text": "x"}, "question"),
        ({"prompt": "x", "completion": "y", "text": "x"}, "prompt"),
        (TEXT, "text"),
    ],
)
def test_form_of_a_row(row, form):
    assert form_of(row) == form
    assert form_of(canonical_row(row)) == form


def test_content_of_a_row():
    """Two rows that say the same are found alike whatever else they carry, and no others."""
    rows = [
        QA,
        {**QA, "answer": "Somebody."},
        {"prompt": QA["question"], "completion": QA["answer"]},
        {"messages": TURNS},
        TEXT,
        {"text": QA["question"] + QA["answer"]},
    ]
    contents = [content_of(row) for row in rows]
    assert [content_of({**row, "path": "a/b"}) for row in rows] == contents
    # A question with its answer and a prompt with the same words after it are two spellings of one text.
    assert len(set(contents)) == 5
    assert contents[0] == contents[2]


# ---- Fingerprint ----

ROW_LISTS = st.lists(st.dictionaries(st.text(max_size=3), JSON_VALUES, max_size=3), max_size=3)


def test_fingerprint_is_pinned():
    """Fingerprints stand in published results; this one is sha256('{"a": "\\u00e9", "b": [1, null]}' + newline)."""
    digest = "80603861e3ab1b391aba967e3497e576be5a57dbe2dce9564ca58f131fa5d034"
    assert fingerprint([{"b": [1, None], "a": "\u00e9"}]) == digest


@QUICK
@given(ROW_LISTS)
def test_fingerprint_ignores_the_order_of_columns(rows):
    turned = [dict(reversed(row.items())) for row in rows]
    assert fingerprint(turned) == fingerprint(rows)


@QUICK
@given(ROW_LISTS, ROW_LISTS)
@example([{"a": "1"}], [{"a": 1}])
@example([{"a": ""}], [{"a": None}])
@example([{"a": "b"}], [{"a": "b"}, {}])
@example([{}, {}], [{}])
@example([{"a": "\n"}], [{"a": "\\n"}])
def test_fingerprint_differs_where_rows_differ(first, second):
    same = json.dumps(first, sort_keys=True) == json.dumps(second, sort_keys=True)
    assert (fingerprint(first) == fingerprint(second)) == same


def test_fingerprint_depends_on_the_order_of_rows():
    rows = [{"text": str(number)} for number in range(5)]
    shuffled = random.Random(0).sample(rows, 5)
    assert shuffled != rows
    assert fingerprint(shuffled) != fingerprint(rows)


def test_real_files(shared_data):
    """TOFU's .json files hold lines; MMLU's CSV holds choice0..3; the text domains name their column differently."""
    tofu = read_rows(shared_data / "tofu" / "full.json")
    assert len(tofu) == 4000
    perturbed = read_rows(shared_data / "tofu" / "world_facts_perturbed.json")
    assert {len(row["perturbed_answer"]) for row in perturbed} == {3}
    mmlu = read_rows(shared_data / "mmlu" / "astronomy_test.csv")
    assert mmlu[0]["answer"] == mmlu[0]["choices"][0] == "This type occurs in binary systems."
    for domain in ("arxiv", "github"):
        assert all(row["text"] for row in read_rows(shared_data / "text_domains" / domain / "forget.jsonl"))
    assert "idontknow.jsonl, row 1: not valid JSON" in refusal(shared_data / "tofu" / "idontknow.jsonl")
