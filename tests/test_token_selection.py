"""Which tokens the rows themselves choose: keywords by the characters of each token, and a column of weights."""

import copy
import math

import pytest
from test_tokenize import CHATML, Slow

from llm_unlearn.data.selectors_text import ColumnWeights, KeywordMarks, annotated, patterns
from llm_unlearn.data.streams import UnlearnDataset
from llm_unlearn.data.tokenize import IGNORED, TokenizeOptions, tokenize_rows
from llm_unlearn.errors import UserError

DEFAULT = TokenizeOptions()


@pytest.fixture(scope="module")
def blocks():
    """A tokenizer whose every token is the next three characters, so that offsets can be counted."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"?": 0, "</s>": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]{1,3}"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="?")


def marks(row, tokenizer, keywords=None, regex=None, options=DEFAULT):
    """Return the marks of each example of one row, 1 for True."""
    made = tokenize_rows([row], tokenizer, options, "forget", KeywordMarks(patterns(keywords, regex)))
    assert all(len(example["selected"]) == len(example["input_ids"]) == len(example["labels"]) for example in made)
    return [list(map(int, example["selected"])) for example in made]


# ---- Keywords ----


def test_keywords_by_hand(blocks):
    """the| ba|cte|riu|m x: "act" is characters 5 to 8, inside the second token and the third."""
    assert marks({"text": "the bacterium x"}, blocks, "ACT") == [[0, 1, 1, 0, 0]]
    # From 0 to 3 is the first token exactly: the second one touches it and does not overlap.
    assert marks({"text": "the bacterium x"}, blocks, "The") == [[1, 0, 0, 0, 0]]
    # Two occurrences, and a keyword of one character.
    assert marks({"text": "the bacterium x"}, blocks, "e, x") == [[1, 0, 1, 0, 1]]


def test_keywords_that_overlap_each_other_are_all_found(blocks):
    """inf|lue|nza| vi|rus| st|rai|n: the first keyword ends inside the second, and one begins another."""
    text = {"text": "influenza virus strain"}
    assert marks(text, blocks, "influenza virus,virus strain") == [[1, 1, 1, 1, 1, 1, 1, 1]]
    assert marks(text, blocks, "inf,influenza") == [[1, 1, 1, 0, 0, 0, 0, 0]]
    # A regular expression matches as re.finditer does; with keywords either one counts.
    assert marks(text, blocks, None, r"v\w+") == [[0, 0, 0, 1, 1, 0, 0, 0]]
    assert marks(text, blocks, "rain", r"(flu|v)\w*") == [[1, 1, 1, 1, 1, 0, 1, 1]]


def test_keywords_are_words_and_not_patterns(blocks):
    assert marks({"text": "a.b acb (a.b) x"}, blocks, "a.b") == [[1, 0, 0, 1, 0]]


def test_empty_matches_mark_nothing(blocks):
    assert marks({"text": "the bacterium x"}, blocks, None, "q*|(?=t)") == [[0, 0, 0, 0, 0]]


def test_a_keyword_over_the_seam_of_two_chunks(blocks):
    """Ten tokens in chunks of five; characters 14 to 16 lie in the last of the first and the first of the second."""
    text = "0123456789abcdXYqrstuvwxyz0123"
    assert marks({"text": text}, blocks, "dxyq", options=TokenizeOptions(max_length=5)) == [
        [0, 0, 0, 0, 1],
        [1, 0, 0, 0, 0],
    ]
    # The system prompt is in every chunk, and is not part of what is looked through.
    options = TokenizeOptions(max_length=7, system_prompt="XYq!")
    assert marks({"text": text}, blocks, "dxyq", options=options) == [[0, 0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0]]


def test_only_the_answer_counts_and_the_end_of_sequence_has_no_characters(blocks):
    """ric|e a|nd |ric|e t|oo.|</s>: the keyword stands in the prompt and in the answer, which is the last four."""
    row = {"prompt": "rice and ", "completion": "rice too."}
    (example,) = tokenize_rows([row], blocks, DEFAULT, "forget", KeywordMarks(patterns("rice", None)))
    assert list(map(int, example["selected"])) == [1, 1, 0, 1, 1, 0, 0]
    assert [label != IGNORED for label in example["labels"]] == [False, False, False, True, True, True, True]
    (cut,) = marks(row, blocks, "too", options=TokenizeOptions(max_length=6))
    assert cut == [0, 0, 0, 0, 1, 1]


def test_unicode_in_any_case(blocks, demo_tokenizer):
    """Characters, not bytes, are compared: a byte-level tokenizer gives each byte the characters of its letter."""
    assert marks({"text": "na\u00efve NA\u00cfVE caf\u00e9"}, blocks, "\u00cfv") == [[1, 1, 1, 1, 0, 0]]
    text = "Zo\u00eb wrote \U0001f600 a lot of books"
    (example,) = tokenize_rows(
        [{"text": text}], demo_tokenizer, DEFAULT, "x", KeywordMarks(patterns("\U0001f600", None))
    )
    ids = [token for token, mark in zip(example["input_ids"], example["selected"], strict=True) if mark]
    assert demo_tokenizer.decode(ids).strip() == "\U0001f600" and len(ids) >= 3


def test_real_tokenizers_mark_what_they_decode_to(shared_data, story_tokenizer):
    """The marked tokens hold the keyword, and lose it without the first or the last of them."""
    rows = [{"text": "Once upon a time there was a na\u00efve dragonfly, and the dragonfly flew away."}]
    for tokenizer in (story_tokenizer, Slow(story_tokenizer)):
        (example,) = tokenize_rows(rows, tokenizer, DEFAULT, "x", KeywordMarks(patterns("dragonfly", None)))
        runs, before = [], False
        for token, mark in zip(example["input_ids"], example["selected"], strict=True):
            if mark and not before:
                runs.append([])
            if mark:
                runs[-1].append(token)
            before = mark
        assert len(runs) == 2 and example["selected"][0] is False
        for run in runs:
            assert "dragonfly" in story_tokenizer.decode(run)
            assert "dragonfly" not in story_tokenizer.decode(run[1:])
            assert "dragonfly" not in story_tokenizer.decode(run[:-1])


def test_chat_templates(demo_tokenizer):
    """The text is the whole that was rendered: the answer's keyword is found where the template has put it."""
    chat = copy.deepcopy(demo_tokenizer)
    chat.chat_template = CHATML
    row = {"question": "Which book?", "answer": "The book The Hollow River."}
    (example,) = tokenize_rows([row], chat, DEFAULT, "forget", KeywordMarks(patterns("hollow", None)))
    chosen = [token for token, mark in zip(example["input_ids"], example["selected"], strict=True) if mark]
    assert chat.decode(chosen).strip() == "Hollow"
    (example,) = tokenize_rows([row], chat, DEFAULT, "forget", KeywordMarks(patterns("book,im_start", None)))
    counted = [m for m, label in zip(example["selected"], example["labels"], strict=True) if label != IGNORED]
    # "book" of the question is marked, and cannot be selected; a special token of the template has its characters.
    assert sum(example["selected"]) > sum(counted) > 0


def test_keywords_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffalpha beta\n\n  gamma \n", encoding="utf-8")
    (tmp_path / "b.csv").write_text('id,keyword\n1,"x, y"\n2,z\n3,\n', encoding="utf-8")

    def spans(keywords, text):
        return KeywordMarks(patterns(str(keywords), None)).spans(text)

    assert spans(tmp_path / "a.txt", "Alpha  beta, ALPHA BETA gamma") == [(13, 23), (24, 29)]
    assert spans(tmp_path / "b.csv", "a x, y z") == [(2, 6), (7, 8)]
    assert spans("one, two", "two ones") == [(0, 3), (4, 7)]
    # Words of one initial, in either case, one of them the beginning of another, and a letter by itself.
    assert spans("Ab,abc,A,\u00e9t\u00e9,\u00c9cole", "abcd ABx bay \u00c9T\u00c9 \u00e9col") == [
        (0, 3),
        (5, 7),
        (10, 11),
        (13, 16),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no keyword"),
        (" \n\n", "holds no keyword"),
    ],
)
def test_empty_lists(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        patterns(str(tmp_path / "a.txt"), None)


def test_bad_lists(tmp_path):
    (tmp_path / "a.csv").write_text("word\nx\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9\n")
    for keywords, regex, message in (
        (str(tmp_path / "a.csv"), None, r"has no column 'keyword'; it has \['word'\]"),
        (str(tmp_path / "b.txt"), None, "row 1: not valid UTF-8"),
        (str(tmp_path / "none.csv"), None, "--keywords: the file '.*none.csv' does not exist"),
        (" , ,", None, "holds no keyword"),
        (None, "(a", r"--keyword_regex '\(a' is no regular expression"),
    ):
        with pytest.raises(UserError, match=message):
            patterns(keywords, regex)


def test_rows_in_tokens_have_no_text(blocks):
    row = {"input_ids": [0, 0, 0], "labels": [0, 0, 0]}
    with pytest.raises(UserError, match=r"row 1 of the forget set came as tokens without text.*pass the rows as text"):
        marks(row, blocks, "a")
    with pytest.raises(UserError, match="row 1 of the forget set came as tokens"):
        annotated([row], KeywordMarks(patterns("a", None)))


# ---- A column of weights ----


def weights_of(row, tokenizer, options=DEFAULT, allows_negative=False):
    return [ex["token_weights"] for ex in tokenize_rows([row], tokenizer, options, "x", ColumnWeights(allows_negative))]


def test_weights_survive_chunks_and_cuts(blocks):
    ten = [n / 2 for n in range(10)]
    text = {"text": "0123456789" * 3, "token_weights": ten}
    assert weights_of(text, blocks, TokenizeOptions(max_length=5)) == [ten[:5], ten[5:]]
    # Of a system prompt the weights are 0, in every chunk.
    options = TokenizeOptions(max_length=7, system_prompt="XYq!")
    assert weights_of(text, blocks, options) == [[0, 0, *ten[:5]], [0, 0, *ten[5:]]]
    # A tail that is dropped takes its weights along.
    assert weights_of(text, blocks, TokenizeOptions(max_length=8)) == [ten[:8]]
    # Prompt, answer and the end of sequence: six tokens and one, of which the length leaves five.
    answer = {"prompt": "rice and ", "completion": "rice too.", "token_weights": ten[:7]}
    assert weights_of(answer, blocks, TokenizeOptions(max_length=5)) == [ten[:5]]
    tokens = {"input_ids": [0, 0, 0], "labels": [IGNORED, 0, 0], "token_weights": [1, 0, 2]}
    assert weights_of(tokens, blocks) == [[1.0, 0.0, 2.0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "row 2 of the forget set has no column 'token_weights'"),
        ([1.0] * 6, r"row 2 of the forget set has 6 token_weights, but 5 tokens \(of the whole row"),
        ([1.0] * 4, "row 2 of the forget set has 4 token_weights, but 5 tokens"),
        ("[1, 1, 1, 1, 1]", "row 2 of the forget set: 'token_weights' must be a list of finite numbers"),
        ([1, 1, True, 1, 1], "must be a list of finite numbers"),
        ([1, 1, math.nan, 1, 1], "must be a list of finite numbers"),
        ([1, 1, "1", 1, 1], "must be a list of finite numbers"),
        ([1, 1, -0.5, 1, 1], r"has a negative weight \(-0.5\); pass --token_weights_use sign_positive or sign_neg"),
    ],
)
def test_bad_weights_are_refused_by_row(blocks, values, message):
    rows = [{"text": "0123456789abcde", "token_weights": [1, 1, 1, 1, 0]}, {"text": "0123456789abcde"}]
    rows[1] |= {} if values is None else {"token_weights": values}
    with pytest.raises(UserError, match=message):
        tokenize_rows(rows, blocks, DEFAULT, "forget", ColumnWeights(False))


def test_signs_allow_negative_weights(blocks):
    row = {"text": "0123456789abcde", "token_weights": [1, -1, 0, -0.5, 2]}
    assert weights_of(row, blocks, allows_negative=True) == [[1.0, -1.0, 0.0, -0.5, 2.0]]


def test_fingerprints_know_weights():
    """A resume and a cached reference with other weights are refused; rows without any keep their fingerprint."""
    row = {"input_ids": [1, 2], "labels": [1, 2]}
    parts = [row, {**row, "weights": [1.0, 0.5]}, {**row, "weights": [1.0, 0.25]}, {**row, "selected": [True, False]}]
    found = [UnlearnDataset({"forget": [part]}).fingerprints["forget"] for part in parts]
    assert len(set(found[:3])) == 3 and found[3] == found[0]
