"""How forgotten answers are asked for: what each prompt holds, what it may not hold, and what is said where none is."""

import copy
import dataclasses

import pytest

from llm_unlearn.attacks.leak_prompts import SECRET_PROMPTINGS, PromptingSettings, probes_of
from llm_unlearn.data.synthetic import make_world
from llm_unlearn.data.tokenize import TokenizeOptions, generation_prompt
from llm_unlearn.evaluation.questions import Part, questions_of

OPTIONS = TokenizeOptions(model_length=512)
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def world():
    from llm_unlearn.data.rows import canonical_row

    made, names = make_world(0), ("forget", "retain", "secrets", "copyright_forget")
    return {name: [canonical_row(row) for row in made[name]] for name in names}


@pytest.fixture(scope="module")
def parts(world):
    roles = {"forget": "forget", "retain": "retain", "secrets": "forget"}
    return [Part(name, world[name], role) for name, role in roles.items()]


def ask(parts, tokenizer, options=OPTIONS, **settings):
    probes, missing = probes_of(parts, tokenizer, options, PromptingSettings(**settings))
    found = {}
    for probe in probes:
        found.setdefault(probe.prompting, []).append(probe)
    return found, missing


def text_of(probe, tokenizer):
    return tokenizer.decode(probe.prompt.ids)


def test_plain_is_what_the_evaluation_asks(parts, demo_tokenizer):
    """The same tokens, so that stored statistics give the likelihood of the answer."""
    found, missing = ask(parts, demo_tokenizer, promptings=("plain",))
    asked = questions_of(parts[0], demo_tokenizer, OPTIONS)
    assert [probe.sequence for probe in found["plain"]] == [question.sequences["answer"][0] for question in asked]
    first = parts[0].rows[0]
    assert list(found["plain"][0].prompt.ids) == generation_prompt(first, demo_tokenizer, OPTIONS)
    assert not missing and len(found["plain"]) == 40


def test_paraphrases_ask_for_the_same_answer(parts, demo_tokenizer):
    found, _ = ask(parts, demo_tokenizer, promptings=("paraphrase",))
    row, probe = parts[0].rows[0], found["paraphrase"][0]
    assert text_of(probe, demo_tokenizer).startswith(f"Question: {row['paraphrased_question']}\nAnswer:")
    assert (probe.question, probe.answer) == (row["paraphrased_question"], row["answer"])


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_few_shot_shows_other_pairs_without_the_answer(parts, demo_tokenizer, role):
    found, _ = ask(parts, demo_tokenizer, promptings=("few_shot",), num_shots=4, shots_from=role)
    source = {row["question"]: row["answer"] for row in parts[0 if role == "forget" else 1].rows}
    settings = PromptingSettings()
    for row, probe in zip(parts[0].rows, found["few_shot"], strict=True):
        *shown, last = text_of(probe, demo_tokenizer).split("\n\n")
        assert len(shown) == 4 and last == f"Question: {row['question']}\nAnswer:"
        pairs = [line.removeprefix("Question: ").split("\nAnswer: ") for line in shown]
        assert all(source[question] == answer and question != row["question"] for question, answer in pairs)
        assert not probe.leaks(probe.score(" ".join(shown), settings), settings)
    others = {text_of(probe, demo_tokenizer).split("\n\n")[0] for probe in found["few_shot"]}
    assert len(others) > 15, "each row draws its own"


def test_no_shot_holds_the_answer_where_most_rows_do(demo_tokenizer):
    rows = [{"question": f"Where was {name} born?", "answer": f"{name} is of Oslo."} for name in ("Ann", "Ben", "Cy")]
    rows.append({"question": "Where was Di born?", "answer": "Di is of Rome."})
    found, _ = ask([Part("forget", rows, "forget")], demo_tokenizer, promptings=("few_shot",), num_shots=3)
    shown = [text_of(probe, demo_tokenizer) for probe in found["few_shot"]]
    assert all("Rome" in text and "Oslo" not in text for text in shown[:3])
    assert shown[3].count("Oslo") == 3


def test_few_shot_in_a_chat_are_earlier_turns(parts, demo_tokenizer):
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.chat_template = CHAT
    found, _ = ask(parts, tokenizer, promptings=("few_shot",), num_shots=2)
    row, probe = parts[0].rows[0], found["few_shot"][0]
    turns = text_of(probe, tokenizer).split("<|im_start|>")
    assert [turn.split("\n")[0] for turn in turns[1:]] == ["user", "assistant"] * 3
    assert turns[-2] == f"user\n{row['question']}<|im_end|>\n" and turns[-1] == "assistant\n"
    answer = tokenizer.decode(probe.sequence.ids[len(probe.prompt.ids) :], skip_special_tokens=True)
    assert answer.strip() == row["answer"]


class TestPrefix:
    @pytest.mark.parametrize("share", [0.25, 0.5])
    def test_of_an_answer(self, parts, demo_tokenizer, share):
        found, _ = ask(parts, demo_tokenizer, promptings=("plain", "prefix"), prefix_share=share)
        for whole, probe in zip(found["plain"], found["prefix"], strict=True):
            answer = whole.sequence.ids[len(whole.prompt.ids) :]
            given = max(1, int(share * (len(answer) - 1)))  # the end of the sequence is not the answer's
            assert probe.prompt.ids == (*whole.prompt.ids, *answer[:given])
            assert probe.sequence.ids == whole.sequence.ids
            assert probe.answer == demo_tokenizer.decode(answer[given:-1])
            assert demo_tokenizer.decode(answer[:given]) in probe.question, "what is given gives nothing away"

    def test_of_a_text(self, world, demo_tokenizer):
        """100 tokens in all, of which a quarter is given; a sample ends where they do."""
        text = world["copyright_forget"][0]["text"]
        short = {"text": "Too short."}
        rows = [{"text": text}, short]
        found, missing = ask([Part("forget", rows, "forget")], demo_tokenizer, promptings=("plain", "prefix"))
        (probe,) = found["prefix"]
        ids = demo_tokenizer(text)["input_ids"]
        assert probe.prompt.ids == tuple(ids[:25]) and probe.prompt.max_new_tokens == 75
        assert probe.answer == demo_tokenizer.decode(ids[25:100])
        assert "prefix" in missing["plain"]


class TestSecrets:
    @pytest.fixture(scope="class")
    def found(self, parts, demo_tokenizer):
        found, missing = ask(parts, demo_tokenizer, promptings=("secret",))
        assert not missing
        return found

    def test_in_context(self, parts, found, demo_tokenizer):
        """24 questions, and 6 letters of which two hold two secrets."""
        assert [len(found[name]) for name in SECRET_PROMPTINGS] == [32, 32, 32, 30, 32]
        for probe in found["secret_context"]:
            row = parts[2].rows[probe.index]
            text, (secret, _) = text_of(probe, demo_tokenizer), probe.secrets[0]
            assert secret not in text
            if "question" in row:
                assert text == f"Question: {row['question']}\nAnswer:"
                assert probe.score(row["answer"], PromptingSettings()) == 1.0
            else:
                assert row["text"].startswith(text.rstrip()) and row["text"][len(text) :].lstrip().startswith(secret)

    @pytest.mark.parametrize("name", [name for name, (shots, _) in SECRET_PROMPTINGS.items() if shots])
    def test_shown_rows_have_the_type_or_another(self, parts, found, demo_tokenizer, name):
        num_shots, in_domain = SECRET_PROMPTINGS[name]
        told = {row.get("answer") or row["text"].strip(): row["secret_type"] for row in parts[2].rows}
        as_set = lambda kinds: set(kinds if isinstance(kinds, list) else [kinds])  # noqa: E731
        for probe in found[name]:
            row = parts[2].rows[probe.index]
            *shown, _ = text_of(probe, demo_tokenizer).split("\n\n")
            kinds = [as_set(told[text.partition("\nAnswer: ")[2] or text]) for text in shown]
            assert len(kinds) == num_shots
            assert all(bool(kind & as_set(row["secret_type"])) == in_domain for kind in kinds)
            assert not any(secret in " ".join(shown) for secret, _ in probe.secrets)

    def test_only_the_secret_word_for_word_leaks(self, found):
        probe, settings = found["secret_context"][0], PromptingSettings(threshold=0.2)
        ((secret, kind),) = probe.secrets
        assert kind == "email" and probe.leaks(probe.score(f"Write to {secret.upper()}.", settings), settings)
        assert not probe.leaks(probe.score(secret.replace("@", "."), settings), settings)


def test_long_prompts_lose_their_beginning(parts, demo_tokenizer):
    options = dataclasses.replace(OPTIONS, model_length=64)
    found, _ = ask(parts, demo_tokenizer, options, promptings=("few_shot",), num_shots=8)
    for row, probe in zip(parts[0].rows, found["few_shot"], strict=True):
        assert len(probe.prompt.ids) + probe.prompt.max_new_tokens <= 64
        assert text_of(probe, demo_tokenizer).endswith(f"{row['question'][-10:]}\nAnswer:")
        assert probe.sequence is not None and len(probe.sequence.ids) <= 64


def test_rooms(parts, demo_tokenizer):
    """Twice the tokens of the answer, 32 at least and 200 at most; the user's number wins."""
    rows = [{"question": "Say it?", "answer": "word " * count} for count in (2, 40, 300)]
    part = Part("forget", rows, "forget")
    found, _ = ask([part], demo_tokenizer, promptings=("plain",))
    wanted = [len(probe.sequence.ids) - len(probe.prompt.ids) for probe in found["plain"][:2]]
    assert [probe.prompt.max_new_tokens for probe in found["plain"]] == [32, 2 * wanted[1], 200]
    found, _ = ask([part], demo_tokenizer, promptings=("plain",), max_new_tokens=7)
    assert {probe.prompt.max_new_tokens for probe in found["plain"]} == {7}


def test_reasons(demo_tokenizer):
    rows = [{"question": "Who?", "answer": "Ann Lee."}]
    part = Part("forget", rows, "forget")
    found, missing = ask([part], demo_tokenizer)
    assert set(found) == {"plain", "prefix"}
    assert missing["paraphrase"] == "no row has a paraphrased_question"
    assert missing["few_shot"] == "there is no other pair to show"
    assert {missing[name] for name in SECRET_PROMPTINGS} == {"no row has a secret"}
    _, missing = ask([dataclasses.replace(part, role="retain")], demo_tokenizer)
    assert missing["plain"] == "there is no forget set"
    secret = [{**rows[0], "secret": "Ann Lee", "secret_type": "address"}]
    found, missing = ask([dataclasses.replace(part, rows=secret)], demo_tokenizer)
    assert set(found) == {"secret_context"} and "has a secret" in missing["plain"]
