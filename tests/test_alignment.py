"""Which token of a rewrite stands where one of the original stood, by hand; and the pairs that are made of it."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_unlearn.data.alignment import align_tokens, aligned_by, aligned_row, original_content, with_content
from llm_unlearn.data.pairs import RewritePairs
from llm_unlearn.data.streams import UnlearnCollator, UnlearnDataset
from llm_unlearn.data.tokenize import IGNORED, TokenizeOptions, tokenize_rows
from llm_unlearn.errors import UserError

WORDS = "Question: Answer: who wrote it the sea a poet of red blue big old lamp? Ada Bo Cy d e f g h i j k".split()


@pytest.fixture(scope="module")
def words():
    """A tokenizer whose tokens are words, in the order of WORDS; </s> is 0."""
    vocabulary = {word: number for number, word in enumerate(["</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


# ---- By hand ----


@pytest.mark.parametrize(
    ("original", "rewrite", "expected"),
    [
        ("abc", "abc", [0, 1, 2]),
        # Insertions: what is new has nobody pointing at it.
        ("abc", "axybc", [0, 3, 4]),
        ("abc", "xabc", [1, 2, 3]),
        ("abc", "abcx", [0, 1, 2]),
        # Deletions: what has nothing left takes the position before, at the beginning the first.
        ("axyb", "ab", [0, 0, 0, 1]),
        ("xab", "ab", [0, 0, 1]),
        ("abx", "ab", [0, 1, 1]),
        # Nothing in common: stretched and squeezed.
        ("ab", "wxyz", [0, 2]),
        ("abcd", "yz", [0, 0, 1, 1]),
        ("abc", "z", [0, 0, 0]),
        ("abc", "vwxyz", [0, 1, 3]),
        # A replacement between two anchors: "pq" over "xyzw".
        ("apqb", "axyzwb", [0, 1, 3, 5]),
        # The longest run is "cde", which leaves "ab" for what is before it; there "b" is an anchor of length 1.
        ("abcde", "bxcde", [0, 0, 2, 3, 4]),
        # Greedy: "bcd" wins over "ab" and "d", though with them more would be kept.
        ("abbcd", "abcd", [0, 0, 1, 2, 3]),
        ("", "ab", []),
    ],
)
def test_alignments_worked_out_by_hand(original, rewrite, expected):
    assert align_tokens(list(original), list(rewrite)) == expected


def test_an_empty_rewrite_aligns_with_nothing():
    with pytest.raises(ValueError, match="empty rewrite"):
        align_tokens([1], [])


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(st.lists(st.integers(0, 4), max_size=12), st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_positions_never_decrease_and_stay_inside(original, rewrite):
    aligned = align_tokens(original, rewrite)
    assert len(aligned) == len(original) and aligned == sorted(aligned)
    assert all(0 <= place < len(rewrite) for place in aligned)
    assert align_tokens(original, original or rewrite) == list(range(len(original)))


# ---- Rows ----

QA = {"question": "who wrote it", "answer": "Ada wrote the sea"}


def test_a_question_stands_for_itself_and_the_answer_is_aligned(words):
    """Question: who wrote it Answer: | Ada wrote the sea </s>  ->  ... | a poet Bo wrote the lamp? </s>"""
    row = aligned_row({**QA, "rewritten": "a poet Bo wrote the lamp?", "author": "Ada"}, words, TokenizeOptions())
    # "wrote the" is the longest run; Ada stretches to the three words before it (a), sea to lamp?.
    assert row["alignment"] == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    assert row["author"] == "Ada" and row["aligned_by"] == aligned_by(words, TokenizeOptions())
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(
    ("row", "content", "changed"),
    [
        ({"text": "x"}, "x", {"text": "new"}),
        ({"question": "q", "answer": "x"}, "x", {"question": "q", "answer": "new"}),
        ({"prompt": "p", "completion": "x"}, "x", {"prompt": "p", "completion": "new"}),
    ],
)
def test_what_is_rewritten_of_a_row(row, content, changed):
    assert original_content(row) == content
    assert with_content({**row, "rewritten": "new", "alignment": [0], "aligned_by": "x"}, "new") == changed


def test_of_messages_the_last_of_the_assistant_is_rewritten():
    roles = ("user", "assistant", "user", "assistant", "user")
    messages = [{"role": role, "content": str(number)} for number, role in enumerate(roles)]
    assert original_content({"messages": messages}) == "3"
    changed = with_content({"messages": messages}, "new")["messages"]
    assert [message["content"] for message in changed] == ["0", "1", "2", "new", "4"]
    assert messages[3]["content"] == "3"


def test_the_key_names_tokenizer_and_template(words, demo_tokenizer):
    plain, length = TokenizeOptions(), TokenizeOptions(max_length=7, model_length=9)
    template = TokenizeOptions(question_template="{question} {answer}")
    assert aligned_by(words, plain) == aligned_by(words, length)
    assert aligned_by(words, plain).split("-")[0] == aligned_by(words, template).split("-")[0]
    assert aligned_by(words, plain).split("-")[1] != aligned_by(words, template).split("-")[1]
    assert aligned_by(words, plain).split("-")[0] != aligned_by(demo_tokenizer, plain).split("-")[0]


def test_a_text_too_short_to_train_on_is_not_aligned(words):
    row = {"text": "the sea a poet of", "rewritten": "the lamp?"}
    assert aligned_row(row, words, TokenizeOptions()) is None
    assert aligned_row({**row, "rewritten": "the sea a poet Bo"}, words, TokenizeOptions())["alignment"] == [
        0,
        1,
        2,
        3,
        4,
    ]


# ---- Pairs ----


def pairs_of(rows, tokenizer, options):
    """Tokenize rows and pair them; returns (originals, rewrites)."""
    pairs = RewritePairs(tokenizer, options)
    return pairs.pair(tokenize_rows(rows, tokenizer, options, "forget", pairs))


def spelled(example, tokenizer, column="input_ids"):
    return " ".join("-" if token == IGNORED else tokenizer.convert_ids_to_tokens(token) for token in example[column])


TEXT = {"text": "the red sea d e f g h i j k", "rewritten": "a the blue sea a d e Bo Cy f g h i j k"}


def test_windows_of_a_text_worked_out_by_hand(words):
    """Anchors: fghijk 5-10 -> 9-14, de 3-4 -> 5-6, the 0 -> 1, sea 2 -> 3; red 1 -> 2 (blue).

    Chunks of 6: the original's 0-5 has the window from 0 to before token 6's 10, of which 6 are kept: 0-5, so that e
    (aligned with 6) and f (with 9) do not count. The chunk 6-10 has the window 10-14.
    """
    options = TokenizeOptions(max_length=6)
    row = aligned_row(TEXT, words, options)
    assert row["alignment"] == [1, 2, 3, 5, 6, 9, 10, 11, 12, 13, 14]
    originals, rewrites = pairs_of([row], words, options)
    assert [spelled(part, words) for part in originals] == ["the red sea d e f", "g h i j k"]
    assert [spelled(part, words) for part in rewrites] == ["a the blue sea a d", "g h i j k"]
    assert [spelled(part, words, "labels") for part in originals] == ["the red sea d - -", "g h i j k"]
    # Token 0 of a sequence is never a target.
    assert [part["alignment"] for part in originals] == [[1, 2, 3, 5, 1, 1], [1, 1, 2, 3, 4]]
    assert all("source" not in part and part["labels"] != [] for part in originals)
    assert rewrites[0]["labels"] == rewrites[0]["input_ids"]


def test_a_rewrite_that_is_as_long_is_seen_whole(words):
    options = TokenizeOptions(max_length=64)
    originals, rewrites = pairs_of([aligned_row(TEXT, words, options)], words, options)
    assert spelled(rewrites[0], words) == TEXT["rewritten"] and spelled(originals[0], words, "labels") == TEXT["text"]


def test_a_system_prompt_stands_before_every_window_and_never_counts(words):
    options = TokenizeOptions(max_length=8, system_prompt="big old")
    row = aligned_row(TEXT, words, options)
    assert row["alignment"] == aligned_row(TEXT, words, TokenizeOptions())["alignment"]
    originals, rewrites = pairs_of([row], words, options)
    assert [spelled(part, words) for part in originals] == ["big old the red sea d e f", "big old g h i j k"]
    assert [spelled(part, words) for part in rewrites] == ["big old a the blue sea a d", "big old g h i j k"]
    assert [spelled(part, words, "labels") for part in rewrites] == ["- - a the blue sea a d", "- - g h i j k"]
    assert [part["alignment"] for part in originals] == [[1, 1, 3, 4, 5, 7, 1, 1], [1, 1, 2, 3, 4, 5, 6]]


def test_of_an_answer_what_lies_beyond_the_length_does_not_count(words):
    """10 tokens, cut at 8: the rewrite keeps "... Answer: a poet Bo", so that only Ada, aligned with a, is left."""
    row = aligned_row({**QA, "rewritten": "a poet Bo wrote the lamp?"}, words, TokenizeOptions())
    originals, rewrites = pairs_of([row], words, TokenizeOptions(max_length=8))
    assert spelled(originals[0], words, "labels") == "- - - - - Ada - -"
    assert spelled(rewrites[0], words, "labels") == "- - - - - a poet Bo"
    assert originals[0]["alignment"] == [1, 1, 2, 3, 4, 5, 1, 1]


def test_rows_that_lose_all_are_left_out_on_both_sides(words, caplog):
    """The second rewrite moves its only common word behind the cut."""
    kept = aligned_row({**QA, "rewritten": "Bo wrote the sea"}, words, TokenizeOptions())
    lost = {**QA, "answer": "Cy", "rewritten": "Ada Bo of d e f Cy"}
    lost = aligned_row(lost, words, TokenizeOptions())
    originals, rewrites = pairs_of([lost, kept, lost], words, TokenizeOptions(max_length=7))
    assert len(originals) == len(rewrites) == 1
    assert spelled(originals[0], words) == "Question: who wrote it Answer: Ada wrote"
    assert "2 of 3 sequences have nothing aligned" in caplog.text
    with pytest.raises(UserError, match="no row of the forget set has a token that counts and is aligned"):
        pairs_of([lost], words, TokenizeOptions(max_length=7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewritten": None}, "row 2 of the forget set has no column 'rewritten'; .*utils/rewrite_forget_set.py"),
        ({"alignment": None}, "row 2 of the forget set has no column 'alignment'"),
        ({"aligned_by": None}, "has no column 'aligned_by'"),
        ({"rewritten": " "}, "row 2 of the forget set: 'rewritten' is empty"),
        ({"rewritten": 3}, "'rewritten' must be text"),
        ({"alignment": [0]}, "does not fit its tokens"),
        ({"alignment": "0 1 2"}, "does not fit its tokens"),
        ({"alignment": [0, 1, 2, 3, 4, 5, 8, 9, 99, 11]}, "does not fit its tokens"),
        ({"answer": "Ada wrote"}, "does not fit its tokens"),
        ({"rewritten": "Bo"}, "does not fit its tokens"),
        ({"aligned_by": "0123456789abcdef-0"}, "was aligned for another tokenizer; .*utils/rewrite_forget_set.py"),
        ({"aligned_by": 7}, "was aligned for another tokenizer"),
    ],
)
def test_rows_that_cannot_be_paired_are_refused(change, message, words):
    good = aligned_row({**QA, "rewritten": "a poet Bo wrote the lamp?"}, words, TokenizeOptions())
    with pytest.raises(UserError, match=message):
        pairs_of([good, {**good, **change}], words, TokenizeOptions())


def test_another_template_is_refused(words):
    row = aligned_row({**QA, "rewritten": "Bo"}, words, TokenizeOptions())
    with pytest.raises(UserError, match="was aligned for another template"):
        pairs_of([row], words, TokenizeOptions(question_template="{question} {answer}"))


def test_the_collator_pads_alignments_and_gives_fillers_one(words):
    options = TokenizeOptions(max_length=6)
    originals, rewrites = pairs_of([aligned_row(TEXT, words, options)], words, options)
    dataset = UnlearnDataset({"forget": originals, "rewritten": rewrites})
    keys = [(stream, row) for stream in ("forget", "rewritten") for row in (1, -1, 0)]
    batch = UnlearnCollator()([dataset[key] for key in keys])
    assert batch["forget"]["alignment"].tolist() == [[1, 1, 2, 3, 4, 1], [1] * 6, [1, 2, 3, 5, 1, 1]]
    assert "alignment" not in batch["rewritten"]
    assert batch["forget"]["index"].tolist() == batch["rewritten"]["index"].tolist() == [1, -1, 0]
    # Every position is one of the rewrite's own tokens.
    lengths = batch["rewritten"]["attention_mask"].sum(-1, keepdim=True)
    assert (batch["forget"]["alignment"] < lengths).all()
