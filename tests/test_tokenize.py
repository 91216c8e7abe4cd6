"""Tokenization: where the answer begins, what counts, what is cut, and where generation starts."""

import copy
import logging
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_unlearn.data.rows import read_rows
from llm_unlearn.data.synthetic import make_world
from llm_unlearn.data.tokenize import IGNORED, QUESTION_TEMPLATE, TokenizeOptions, generation_prompt, tokenize_rows
from llm_unlearn.errors import UserError

DEFAULT = TokenizeOptions()
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens a block of thoughts that finished turns do not have, as reasoning models' templates do.
THINKING = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
QA = {"question": "Who wrote the Amber Anchor?", "answer": "The baker was Velra Kirrin."}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "In Yaranmere."},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "In 1955."},
]
# Hypothesis also draws strings of the modules that are loaded: one that writes a special token is no plain text.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda text: not any(mark in text for mark in ("<s>", "</s>", "<|im_"))
)


@pytest.fixture(scope="module")
def tokenizer(demo_tokenizer):
    """A copy without chat template; tests set one for their own time only."""
    return copy.deepcopy(demo_tokenizer)


@pytest.fixture
def chat(tokenizer, monkeypatch):
    """Return the tokenizer with ChatML, or with the template that the test sets."""
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    return tokenizer


@pytest.fixture(scope="module")
def framing(tokenizer):
    """The same tokenizer, which writes <s> before a text and </s> behind it by itself."""
    from tokenizers import processors

    framing = copy.deepcopy(tokenizer)
    specials = [("<s>", framing.bos_token_id), ("</s>", framing.eos_token_id)]
    framing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=specials
    )
    return framing


@pytest.fixture(scope="module", params=["gpt2", "20B_tokenizer", "stories260K"])
def real_tokenizer(request, shared_data):
    if request.param == "stories260K":
        return request.getfixturevalue("story_tokenizer")
    from transformers import PreTrainedTokenizerFast

    file = str(shared_data / "tokenizers" / f"{request.param}.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>")


def one(row, tokenizer, options=DEFAULT):
    (example,) = tokenize_rows([row], tokenizer, options)
    assert len(example["input_ids"]) == len(example["labels"])
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, IGNORED)
    return example


def counted(example, tokenizer):
    """Return the text of the tokens that count, special ones included."""
    return tokenizer.decode([label for label in example["labels"] if label != IGNORED])


# ---- The oracle: bytes of every token, counted one after the other ----

VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = {**{chr(byte): byte for byte in VISIBLE}, **{chr(256 + n): byte for n, byte in enumerate(HIDDEN)}}
"""GPT-2's alphabet: bytes that print stand for themselves, the others for the letters from 256 on."""


def piece_bytes(piece, is_llama):
    """Return the bytes that a token stands for."""
    if not is_llama:
        return b"".join(bytes([BYTES[letter]]) if letter in BYTES else letter.encode() for letter in piece)
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace("\u2581", " ").encode()


def oracle(prompt, answer, tokenizer):
    """Return (ids, which count) without offsets: add up the bytes of the tokens, and compare with those of the prompt.

    A token counts if its last byte lies behind the first byte of the answer; so does the end of sequence.
    """
    is_llama = tokenizer.convert_tokens_to_ids("<0x00>") != tokenizer.unk_token_id
    special = set(tokenizer.all_special_ids)
    ids = tokenizer(prompt + answer)["input_ids"]
    # A Llama tokenizer writes a space before the text.
    read, marks, before = b"", [], len(prompt.encode()) + is_llama
    for token, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        read += b"" if token in special else piece_bytes(piece, is_llama)
        marks.append(token not in special and len(read) > before)
    assert read == b" " * is_llama + (prompt + answer).encode()
    return [*ids, tokenizer.eos_token_id], [*marks, True]


def assert_like_oracle(example, prompt, answer, tokenizer):
    ids, marks = oracle(prompt, answer, tokenizer)
    assert example["input_ids"] == ids
    assert [label != IGNORED for label in example["labels"]] == marks


@pytest.mark.parametrize("template", [QUESTION_TEMPLATE, "[INST] {question} [/INST]{answer}"])
def test_mask_of_real_rows_equals_the_oracle(shared_data, real_tokenizer, template):
    """F12: of 4,000 TOFU rows, none has the tokens of "Answer: " as a prefix of the whole."""
    rows = read_rows(shared_data / "tofu" / "full.json")
    rows = rows[::16] + [row for row in rows if not (row["question"] + row["answer"]).isascii()][:60]
    examples = tokenize_rows(rows, real_tokenizer, TokenizeOptions(2048, template))
    assert len(examples) == len(rows) > 250
    for row, example in zip(rows, examples, strict=True):
        prompt = template.split("{answer}")[0].replace("{question}", row["question"])
        assert_like_oracle(example, prompt, row["answer"], real_tokenizer)


@settings(deadline=None, derandomize=True, database=None, max_examples=200)
@given(st.data())
def test_mask_of_any_text_equals_the_oracle(tokenizer, data):
    """A prompt and a completion meet anywhere: within words, runs of spaces, and characters of many bytes."""
    if data.draw(st.booleans()):
        text = data.draw(st.sampled_from(make_world(0)["retain"]))["answer"]
        seam = data.draw(st.integers(1, len(text) - 1))
        prompt, answer = text[:seam], text[seam:]
    else:
        prompt, answer = data.draw(TEXTS), data.draw(TEXTS)
    example = one({"prompt": prompt, "completion": answer}, tokenizer)
    assert_like_oracle(example, prompt, answer, tokenizer)


@settings(deadline=None, derandomize=True, database=None, max_examples=100)
@given(TEXTS, TEXTS)
def test_mask_of_any_question_equals_the_oracle(tokenizer, question, answer):
    example = one({"question": question, "answer": answer}, tokenizer)
    assert_like_oracle(example, f"Question: {question}\nAnswer: ", answer, tokenizer)


# ---- Question and answer ----


def test_the_first_token_of_the_answer_counts_behind_a_trailing_space(tokenizer):
    """The space before the answer belongs to its first token, so a separately tokenized prompt is too long by one."""
    example = one(QA, tokenizer)
    prompt = tokenizer("Question: Who wrote the Amber Anchor?\nAnswer: ")["input_ids"]
    assert example["input_ids"][: len(prompt)] != prompt
    assert counted(example, tokenizer) == " The baker was Velra Kirrin.</s>"
    assert tokenizer.decode(example["input_ids"]) == (
        "Question: Who wrote the Amber Anchor?\nAnswer: The baker was Velra Kirrin.</s>"
    )


def test_a_token_over_the_seam_counts(tokenizer):
    assert len(tokenizer(" born")["input_ids"]) == 1
    example = one({"prompt": "She was bo", "completion": "rn."}, tokenizer)
    assert counted(example, tokenizer) == " born.</s>"


def test_prompt_and_completion_stand_as_they_are(chat):
    """No template is put around them, even where the tokenizer has one for chats."""
    example = one({"prompt": "Once upon", "completion": " a time."}, chat)
    assert chat.decode(example["input_ids"]) == "Once upon a time.</s>"
    assert counted(example, chat) == " a time.</s>"


def test_a_question_with_a_text_beside_it_is_a_question(tokenizer):
    assert one({**QA, "text": "The source of the question."}, tokenizer) == one(QA, tokenizer)


def test_braces_of_the_row_are_not_filled_in(tokenizer):
    example = one({"question": "{answer} or {question}?", "answer": "{question} {0}"}, tokenizer)
    assert tokenizer.decode(example["input_ids"]) == "Question: {answer} or {question}?\nAnswer: {question} {0}</s>"


def test_what_the_template_writes_behind_the_answer_counts(tokenizer):
    example = one(QA, tokenizer, TokenizeOptions(question_template="{question} => {answer} ###"))
    assert counted(example, tokenizer) == " The baker was Velra Kirrin. ###</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("Question: {question}", r"must hold \{question\} and \{answer\} once each"),
        ("{answer}", r"must hold \{question\} and \{answer\} once each"),
        ("{question} {answer} {answer}", r"must hold \{question\} and \{answer\} once each"),
        ("{answer} {question}", r"must hold \{question\} before \{answer\}"),
    ],
)
def test_bad_templates(tokenizer, template, message):
    with pytest.raises(UserError, match="--question_template " + message):
        one(QA, tokenizer, TokenizeOptions(question_template=template))


def test_the_end_of_sequence_counts_and_stands_once(tokenizer, framing):
    """Appended by us, by the tokenizer, or by the template."""
    ending = TokenizeOptions(question_template=QUESTION_TEMPLATE + "</s>")
    for example in (one(QA, tokenizer), one(QA, framing), one(QA, tokenizer, ending)):
        assert example["input_ids"].count(tokenizer.eos_token_id) == 1
        assert example["labels"][-1] == tokenizer.eos_token_id
        assert counted(example, tokenizer) == " The baker was Velra Kirrin.</s>"
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    assert counted(one(QA, endless), tokenizer) == " The baker was Velra Kirrin."


@pytest.mark.parametrize("name", ["framing", "story_tokenizer"])
def test_the_beginning_of_sequence_stands_once_and_does_not_count(request, name):
    tokenizer = request.getfixturevalue(name)
    example = one(QA, tokenizer)
    assert example["input_ids"].count(tokenizer.bos_token_id) == 1
    assert example["input_ids"][0] == tokenizer.bos_token_id
    assert example["labels"][0] == IGNORED
    assert generation_prompt(QA, tokenizer, DEFAULT)[0] == tokenizer.bos_token_id


# ---- Chat templates ----


def test_a_question_becomes_a_chat_where_the_tokenizer_has_a_template(chat):
    example = one(QA, chat)
    assert chat.decode(example["input_ids"]) == (
        "<|im_start|>user\nWho wrote the Amber Anchor?<|im_end|>\n"
        "<|im_start|>assistant\nThe baker was Velra Kirrin.<|im_end|>\n"
    )
    assert counted(example, chat) == "The baker was Velra Kirrin.<|im_end|>\n"
    plain = one(QA, chat, TokenizeOptions(question_template=QUESTION_TEMPLATE))
    assert counted(plain, chat) == " The baker was Velra Kirrin.</s>"


def test_every_assistant_turn_counts_and_no_other(chat):
    example = one({"messages": TALK}, chat)
    assert counted(example, chat) == "In Yaranmere.<|im_end|>\nIn 1955.<|im_end|>\n"
    assert chat.decode(example["input_ids"]) == chat.apply_chat_template(TALK, tokenize=False)


def test_a_template_that_writes_the_beginning_of_sequence_itself(framing, monkeypatch):
    monkeypatch.setattr(framing, "chat_template", "{{ '<s>' }}" + CHATML)
    example = one(QA, framing)
    assert example["input_ids"].count(framing.bos_token_id) == 1
    assert framing.eos_token_id not in example["input_ids"]


def test_messages_need_a_chat_template(tokenizer):
    with pytest.raises(UserError, match="hold messages, but the tokenizer has no chat template"):
        one({"messages": TALK}, tokenizer)


def test_a_template_that_renders_prefixes_differently_falls_back_to_the_words(chat):
    chat.chat_template = THINKING
    example = one({"messages": TALK}, chat)
    assert counted(example, chat) == "In Yaranmere.In 1955."
    twice = [*TALK, {"role": "user", "content": "Sure?"}, TALK[-1]]
    assert counted(one({"messages": twice}, chat), chat) == "In Yaranmere.In 1955.In 1955."


@pytest.mark.parametrize(
    "talk",
    [
        [{"role": "user", "content": "Was it In 1955. or later?"}, TALK[-1]],
        [*TALK, {"role": "user", "content": "Not In 1966. then?"}, {"role": "assistant", "content": "In 1966."}],
    ],
    ids=["first turn", "later turn"],
)
def test_the_fallback_does_not_take_the_words_of_the_user(chat, talk):
    """The answer's words also stand in the question: they count where the assistant says them."""
    chat.chat_template = THINKING
    example = one({"messages": talk}, chat)
    last = len(example["labels"]) - 1 - next(n for n, x in enumerate(reversed(example["labels"])) if x != IGNORED)
    assert chat.decode(example["input_ids"][last + 1 :]) == "<|im_end|>\n"
    questions = [turn["content"] for turn in talk if turn["role"] == "user"]
    first = next(n for n, label in enumerate(example["labels"]) if label != IGNORED)
    assert questions[0] in chat.decode(example["input_ids"][:first])


def test_a_template_that_changes_the_answer_is_refused(chat):
    chat.chat_template = THINKING.replace("m['content']", "m['content'] | upper")
    with pytest.raises(UserError, match="the chat template changes the assistant's words"):
        one(QA, chat)


def test_a_conversation_may_begin_with_the_assistant(chat):
    """rows.py takes it: all that it asks for is an assistant turn."""
    assert counted(one({"messages": TALK[2:]}, chat), chat).startswith("In Yaranmere.")


# ---- Slow tokenizers ----


class Slow:
    """The same tokenizer without offsets."""

    is_fast = False

    def __init__(self, fast):
        self.fast = fast

    def __getattr__(self, name):
        return getattr(self.fast, name)

    def __call__(self, text, add_special_tokens=True, verbose=True):
        return self.fast(text, add_special_tokens=add_special_tokens)


def test_a_slow_tokenizer_gives_the_same_mask(tokenizer, framing):
    rows = [*make_world(0)["forget"][:10], {"prompt": "She was bo", "completion": "rn."}]
    for fast in (tokenizer, framing):
        assert tokenize_rows(rows, Slow(fast), DEFAULT) == tokenize_rows(rows, fast, DEFAULT)


def test_a_slow_llama_tokenizer_gives_the_same_mask(story_tokenizer, shared_data):
    rows = read_rows(shared_data / "tofu" / "full.json")[::200]
    assert tokenize_rows(rows, Slow(story_tokenizer), DEFAULT) == tokenize_rows(rows, story_tokenizer, DEFAULT)


@pytest.mark.parametrize("answer", ["Caf\u00e9 \U0001f600 au lait", "\u00e9t\u00e9", "Smile \U0001f600"])
def test_a_slow_tokenizer_and_characters_of_many_bytes(tokenizer, answer):
    """A character of several tokens decodes to stand-ins until its last token; the answer may begin or end with it."""
    row = {"question": "Who is Zo\u00eb?", "answer": answer}
    assert one(row, Slow(tokenizer)) == one(row, tokenizer)


def test_a_slow_tokenizer_and_special_tokens_in_the_text(chat):
    """The text of a chat holds its special tokens, so they take up characters there."""
    assert one(QA, Slow(chat)) == one(QA, chat)
    options = TokenizeOptions(question_template="<s>[INST] {question} [/INST] {answer}")
    assert one(QA, Slow(chat), options) == one(QA, chat, options)


# ---- Cut by the length ----


def test_a_long_answer_is_cut(tokenizer):
    whole = one(QA, tokenizer)
    cut = one(QA, tokenizer, TokenizeOptions(max_length=len(whole["input_ids"]) - 2))
    assert cut == {column: values[:-2] for column, values in whole.items()}


def lengthy(number):
    """100 rows of which `number` have an answer beyond 64 tokens."""
    long = {"question": "Where? " * 80, "answer": "There."}
    return [long] * number + [QA] * (100 - number)


def test_rows_whose_answer_is_cut_off_are_dropped_and_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        examples = tokenize_rows(lengthy(1), tokenizer, TokenizeOptions(max_length=64), "forget")
    assert len(examples) == 99
    assert "dropped 1 of 100 rows of the forget set: their answer lies beyond the length" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert len(tokenize_rows(lengthy(0), tokenizer, TokenizeOptions(max_length=64), "forget")) == 100
    assert caplog.text == ""


def test_more_than_one_percent_of_cut_answers_is_refused(tokenizer):
    with pytest.raises(UserError) as caught:
        tokenize_rows(lengthy(2), tokenizer, TokenizeOptions(max_length=64), "retain")
    said = str(caught.value)
    assert said.startswith("2 of 100 rows of the retain set have no token left that counts after the cut at 64;")
    assert "pass a larger --max_length" in said


def test_sets_of_which_nothing_is_left_are_refused(tokenizer):
    with pytest.raises(UserError, match="the forget set is empty"):
        tokenize_rows([], tokenizer, DEFAULT, "forget")
    with pytest.raises(UserError, match="3 of 3 rows of the retain set have no token left that counts"):
        tokenize_rows([{"text": "a"}] * 3, tokenizer, DEFAULT, "retain")
    with pytest.raises(UserError, match="1 of 1 rows of the data set have no token left"):
        tokenize_rows([{"input_ids": [5, 6], "labels": [IGNORED, IGNORED]}], tokenizer, DEFAULT)


@pytest.mark.parametrize(
    ("max_length", "model_length", "text", "qa"),
    [(None, None, 4096, 512), (None, 512, 512, 512), (None, 100, 100, 100), (64, None, 64, 64), (64, 64, 64, 64)],
)
def test_lengths(max_length, model_length, text, qa):
    options = TokenizeOptions(max_length, None, model_length)
    assert (options.length("text"), options.length("qa")) == (text, qa)


def test_a_length_beyond_the_model_is_refused(tokenizer):
    message = "--max_length 513 is beyond the model's context of 512 tokens"
    for row in (QA, {"text": "A text."}):
        with pytest.raises(UserError, match=message):
            tokenize_rows([row], tokenizer, TokenizeOptions(513, None, 512))


# ---- Texts ----


class Letters:
    """A tokenizer of one token a letter, for chunks that can be counted by hand."""

    is_fast, chat_template, eos_token_id = True, None, None

    def __call__(self, text, verbose=True):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(
    ("length", "chunks"),
    [(16, [8, 8]), (20, [8, 8]), (21, [8, 8, 5]), (23, [8, 8, 7]), (5, [5]), (8, [8])],
)
def test_chunks_of_a_text(length, chunks):
    """Chunks of 8 that do not overlap; a rest of 5 is kept, of 4 dropped; every token counts."""
    text = "".join(chr(97 + number) for number in range(length))
    examples = tokenize_rows([{"text": text}], Letters(), TokenizeOptions(max_length=8))
    assert [len(example["input_ids"]) for example in examples] == chunks
    ids = [token for example in examples for token in example["input_ids"]]
    assert ids == [ord(letter) for letter in text][: sum(chunks)]
    assert all(example["labels"] == example["input_ids"] for example in examples)


def test_short_texts_are_left_out_without_counting_as_cut(caplog):
    with caplog.at_level(logging.WARNING):
        examples = tokenize_rows([{"text": "abcd"}] * 50 + [{"text": "abcde"}], Letters(), DEFAULT)
    assert len(examples) == 1
    assert "50 of 51 texts of the data set are shorter than 5 tokens" in caplog.text


def test_answers_cut_in_the_middle_are_counted(tokenizer, caplog):
    rows = [{"question": "q", "answer": "She was born. " * 40}, {"question": "q", "answer": "a"}]
    with caplog.at_level(logging.WARNING):
        first, _ = tokenize_rows(rows, tokenizer, TokenizeOptions(max_length=64))
    assert len(first["input_ids"]) == 64
    assert "1 of 2 answers of the data set are cut at the length" in caplog.text


def test_a_text_has_its_special_tokens_once(framing):
    text = " ".join(row["text"] for row in make_world(0)["general_retain"][:2])
    examples = tokenize_rows([{"text": text}], framing, TokenizeOptions(max_length=32))
    ids = [token for example in examples for token in example["input_ids"]]
    assert len(examples) > 3
    assert ids.count(framing.bos_token_id) == 1
    assert ids[0] == framing.bos_token_id


def test_labels_are_not_the_list_of_ids(tokenizer):
    """A method that changes the labels must not change the text."""
    (example,) = tokenize_rows([{"text": "A text of some length."}], tokenizer, DEFAULT)
    example["labels"][0] = IGNORED
    assert IGNORED not in example["input_ids"]


# ---- Tokenized before ----


def test_tokenized_rows_pass_unchanged_in_lists_of_their_own():
    row = {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, IGNORED], "text": "ignored"}
    (example,) = tokenize_rows([row], None, DEFAULT)
    assert example == {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, IGNORED]}
    example["labels"][1] = 9
    assert row["labels"] == [IGNORED, 6, IGNORED]


def test_a_label_of_the_first_token_counts_for_nothing():
    """Nothing predicts it, so a row with no other label is one without labels."""
    with pytest.raises(UserError, match="1 of 1 rows"):
        tokenize_rows([{"input_ids": [5, 6], "labels": [5, IGNORED]}], None, DEFAULT)


# ---- Where generation starts ----


def test_generation_starts_where_the_first_token_counts(tokenizer, framing, monkeypatch):
    rows = [*make_world(0)["forget"][:5], QA, {"prompt": "She was bo", "completion": "rn."}]
    for chat_template in (None, CHATML, THINKING):
        for each in (tokenizer, framing):
            monkeypatch.setattr(each, "chat_template", chat_template)
            for row in rows:
                example, prompt = one(row, each), generation_prompt(row, each, DEFAULT)
                assert example["input_ids"][: len(prompt)] == prompt
                assert example["labels"][: len(prompt)] == [IGNORED] * len(prompt)
                assert example["labels"][len(prompt)] != IGNORED


def test_generation_prompts_by_hand(tokenizer, monkeypatch):
    """Without the lone space that training never saw; of a chat with the words that open the assistant's turn."""
    assert tokenizer.decode(generation_prompt(QA, tokenizer, DEFAULT)) == (
        "Question: Who wrote the Amber Anchor?\nAnswer:"
    )
    prompt = {"prompt": "She was bo", "completion": "rn."}
    assert tokenizer.decode(generation_prompt(prompt, tokenizer, DEFAULT)) == "She was"
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    assert tokenizer.decode(generation_prompt({"messages": TALK}, tokenizer, DEFAULT)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_generation_prompt_of_a_row_whose_answer_is_cut_off(tokenizer):
    """The prompt as far as the length goes."""
    row = lengthy(1)[0]
    prompt = generation_prompt(row, tokenizer, TokenizeOptions(max_length=64))
    assert prompt == tokenizer("Question: " + row["question"])["input_ids"][:64]


def test_no_two_days_differ(tokenizer, monkeypatch):
    """Llama 3's template prints today's date unless it is given one."""
    dated = copy.deepcopy(tokenizer)
    dated.chat_template = (
        "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "Today: {{ date_string }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    pinned = dated.decode(one(QA, dated)["input_ids"])
    assert "Today: 26 Jul 2024" in pinned
    given = TokenizeOptions(chat_template_kwargs=(("date_string", "10 Apr 2025"),))
    assert "Today: 10 Apr 2025" in dated.decode(one(QA, dated, given)["input_ids"])
