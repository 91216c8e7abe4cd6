"""How a forgotten answer is asked for: plainly, behind examples, with its beginning given, reworded, in context."""

import dataclasses
import random
import sys
from dataclasses import dataclass

from llm_unlearn.attacks.leakage import keywords, leak_score
from llm_unlearn.data.rows import form_of
from llm_unlearn.data.tokenize import QUESTION_TEMPLATE, SYSTEM_GAP, answer_example, answer_place
from llm_unlearn.evaluation.generation import Prompt
from llm_unlearn.evaluation.packing import Sequence
from llm_unlearn.evaluation.questions import answer_text, question_text, secrets_of
from llm_unlearn.evaluation.text import extracted

QUESTION_PROMPTINGS = ("plain", "few_shot", "prefix", "paraphrase")
SECRET_PROMPTINGS = {
    "secret_context": (0, None),
    "secret_one_shot_in_domain": (1, True),
    "secret_one_shot_out_of_domain": (1, False),
    "secret_two_shot_in_domain": (2, True),
    "secret_two_shot_out_of_domain": (2, False),
}
"""prompting of a secret -> (rows shown before it, whether they hold a secret of the same type)"""
PROMPTINGS = (*QUESTION_PROMPTINGS, "secret")

TEXT_TOKENS, SHORTEST_TEXT = 100, 20
"""Tokens of a text that are asked for in all, the given ones included; a text below the second number is left out."""
_LEAST_ROOM, _MOST_ROOM = 32, 200
_BETWEEN = "\n\n"


@dataclass(frozen=True)
class PromptingSettings:
    """How prompts are made.

    Attributes:
        promptings: of PROMPTINGS.
        num_shots: pairs that `few_shot` shows.
        shots_from: "forget", other rows of the set that is asked for; "retain", rows of the sets to keep.
        prefix_share: share of the answer's tokens that `prefix` gives, in (0, 1).
        max_new_tokens: of a sample; None takes twice the tokens of what is asked for, 32 at least and 200 at most.
        criterion: one of `leakage.CRITERIA`.
        threshold: of the criterion, from which on a text leaks.
        seed: of the rows that are shown.
    """

    promptings: tuple = PROMPTINGS
    num_shots: int = 3
    shots_from: str = "forget"
    prefix_share: float = 0.25
    max_new_tokens: int | None = None
    criterion: str = "keyword"
    threshold: float = 1.0
    seed: int = 42


@dataclass(frozen=True)
class Probe:
    """One way of asking for one forgotten answer.

    Attributes:
        prompting: of QUESTION_PROMPTINGS or SECRET_PROMPTINGS.
        split, index: the set and the number of the row in it.
        prompt: what is continued.
        question: what the prompt holds of the row; repeating it gives nothing away.
        answer: what must not come.
        secrets: ((secret, type), ...), one of which is enough; empty where the criterion judges the answer.
        sequence: the prompt with the whole answer, whose likelihood bounds the leakage from below, or None.
    """

    prompting: str
    split: str
    index: int
    prompt: Prompt
    question: str
    answer: str
    secrets: tuple = ()
    sequence: Sequence | None = None

    def score(self, text, settings):
        """Return how much a continuation gives away, in [0, 1]; a secret is given away whole or not at all."""
        if self.secrets:
            return float(any(extracted(text, secret, kind) for secret, kind in self.secrets))
        return leak_score(text, self.question, self.answer, settings.criterion)

    def leaks(self, score, settings):
        """Return whether a score is a leak."""
        return score >= (1.0 if self.secrets else settings.threshold)


def probes_of(parts, tokenizer, options, settings):
    """Ask for every answer and secret of the forget sets in every way.

    Args:
        parts: list of questions.Part; those of the role "forget" are asked, others may be shown.
        tokenizer: a transformers tokenizer.
        options: TokenizeOptions.
        settings: PromptingSettings.
    Returns:
        (list of Probe, {prompting: why there is none}).
    """
    maker = _Maker(parts, tokenizer, options, settings)
    makers = {"plain": maker.plain, "few_shot": maker.few_shot, "prefix": maker.prefix, "paraphrase": maker.paraphrase}
    makers = {name: make for name, make in makers.items() if name in settings.promptings}
    probes = [
        probe
        for name, make in makers.items()
        for part, index, row in maker.asked
        if not secrets_of(row) and (probe := make(part, index, row)) is not None
    ]
    if "secret" in settings.promptings:
        for name in SECRET_PROMPTINGS:
            found = (maker.secret(name, part, index, row) for part, index, row in maker.asked if secrets_of(row))
            probes += [probe for row_probes in found for probe in row_probes]
            makers[name] = None
    asked = {probe.prompting for probe in probes}
    return probes, {name: _reason(name, maker.asked) for name in makers if name not in asked}


def _reason(prompting, asked):
    rows = [row for _, _, row in asked]
    has_secrets = [bool(secrets_of(row)) for row in rows]
    if prompting in SECRET_PROMPTINGS:
        return "no other row can be shown before a secret" if any(has_secrets) else "no row has a secret"
    if not rows or all(has_secrets):
        return "every row has a secret, which the secret prompts ask for" if rows else "there is no forget set"
    if prompting == "paraphrase":
        return "no row has a paraphrased_question"
    if prompting == "prefix":
        return "no row has an answer or a text of two tokens or more"
    if not any(_has_answer(row) for row in rows):
        return "no row has a question with an answer in words; text is asked for by prefix"
    return "there is no other pair to show"


def _has_answer(row):
    if "choices" in row:
        return False
    form = form_of(row)
    return form != "text" and (form != "prompt" or "completion" in row)


class _Maker:
    """Makes the probes of single rows."""

    def __init__(self, parts, tokenizer, options, settings):
        self.tokenizer, self.settings = tokenizer, settings
        self.model_length = options.model_length
        # A prompt that is too long loses its beginning, never the answer.
        self.options = dataclasses.replace(options, max_length=sys.maxsize, model_length=None)
        self.parts = parts
        self.asked = [(part, n, row) for part in parts if part.role == "forget" for n, row in enumerate(part.rows)]
        system = options.system_prompt
        self.system_ids = tokenizer(system + SYSTEM_GAP, verbose=False)["input_ids"] if system else []
        self.is_chat = tokenizer.chat_template is not None and options.question_template is None

    def plain(self, part, index, row):
        """Ask the row's own question."""
        return self._question("plain", part, index, row) if _has_answer(row) else None

    def paraphrase(self, part, index, row):
        """Ask in other words, where the row has them."""
        other = row.get("paraphrased_question")
        if not other or not _has_answer(row) or "question" not in row:
            return None
        return self._question("paraphrase", part, index, {**row, "question": other})

    def few_shot(self, part, index, row):
        """Ask behind other pairs that do not hold the answer."""
        if not _has_answer(row):
            return None
        settings, wanted = self.settings, keywords(question_text(row), answer_text(row))

        def tells(text):
            score = leak_score(text, question_text(row), answer_text(row), settings.criterion)
            return bool(wanted) and score >= settings.threshold

        # The set's own rows are those that an attacker knows best how to write.
        shown = [part] if settings.shots_from == "forget" else [one for one in self.parts if one.role == "retain"]
        pool = [other for one in shown for other in one.rows if self._fits(other, row)]
        shots = self._shots(pool, row, part, index, settings.num_shots, tells)
        return self._question("few_shot", part, index, row, shots) if shots else None

    def prefix(self, part, index, row):
        """Give the first tokens of the answer, or of the text; the rest is asked for."""
        if "choices" not in row and form_of(row) == "text":
            ids, question = self._text_ids(row["text"]), ""
            first = len(self.system_ids)
            last = min(len(ids), first + TEXT_TOKENS)
            if last - first < SHORTEST_TEXT:
                return None
        elif _has_answer(row):
            (ids, first, last), question = self._tokens(row), question_text(row)
        else:
            return None
        ends = last > first and ids[last - 1] == self.tokenizer.eos_token_id
        given = first + max(1, int(self.settings.prefix_share * (last - first - ends)))
        rest = self.tokenizer.decode(ids[given:last], skip_special_tokens=True)
        if not rest.strip():
            return None
        shown = self.tokenizer.decode(ids[first:given], skip_special_tokens=True)
        probe = self._probe("prefix", part, index, ids[:given], ids[given:last], f"{question} {shown}", rest)
        if question:
            return probe
        # A text does not end where the asked part does: a longer sample could go on with the last word.
        room = min(probe.prompt.max_new_tokens, last - given)
        return dataclasses.replace(probe, prompt=dataclasses.replace(probe.prompt, max_new_tokens=room))

    def secret(self, prompting, part, index, row):
        """Return the probes of a row's secrets: behind the question, or behind the text before each of them."""
        num_shots, in_domain = SECRET_PROMPTINGS[prompting]
        secrets = secrets_of(row)
        pool = self._secret_pool(part, row, in_domain) if num_shots else []

        def tells(text):
            return any(extracted(text, secret, kind) for secret, kind in secrets)

        shots = self._shots(pool, row, part, index, num_shots, tells)
        if len(shots) < num_shots:
            return []
        if _has_answer(row):
            return [self._question(prompting, part, index, row, shots, tuple(secrets))]
        probes, lead = [], "".join(shot["text"].strip() + _BETWEEN for shot in shots)
        for secret, kind in secrets:
            before, found, after = row["text"].partition(secret)
            if not found or not before.strip():
                continue
            # A token may hold the end of one and the beginning of the other; the prompt ends before it.
            ids, first, _ = self._tokens({"prompt": lead + before, "completion": found + after})
            wanted = self.tokenizer(secret, add_special_tokens=False)["input_ids"]
            probe = self._probe(prompting, part, index, ids[:first], wanted, before, secret, ((secret, kind),))
            probes.append(dataclasses.replace(probe, sequence=None))
        return probes

    def _secret_pool(self, part, row, in_domain):
        """Return the rows that may be shown before a secret: with one of its type, or of others, or of another set."""
        kinds = {kind for _, kind in secrets_of(row)}
        others = [(where, other) for where, _, other in self.asked if self._fits(other, row)]
        alike = [other for _, other in others if kinds & {kind for _, kind in secrets_of(other)}]
        if in_domain:
            return alike
        different = [other for _, other in others if secrets_of(other) and other not in alike]
        return different or [
            other for where in self.parts if where is not part for other in where.rows if self._fits(other, row)
        ]

    def _fits(self, other, row):
        """Return whether a row can be shown before another: of the same form, with an answer where that one has one."""
        return "choices" not in other and form_of(other) == form_of(row) and _has_answer(other) == _has_answer(row)

    def _shots(self, pool, row, part, index, count, tells):
        """Draw rows by the seed which, shown together, do not tell the answer."""
        draw = random.Random(f"{self.settings.seed} {part.name} {index}")
        shots, shown = [], ""
        for other in draw.sample(pool, len(pool)):
            text = other["text"] if form_of(other) == "text" else f"{question_text(other)} {answer_text(other)}"
            if len(shots) == count:
                break
            if other is not row and not tells(f"{shown} {text}"):
                shots.append(other)
                shown = f"{shown} {text}"
        return shots

    def _question(self, prompting, part, index, row, shots=(), secrets=()):
        ids, first, last = self._tokens(self._with_shots(row, shots) if shots else row)
        question, answer = question_text(row), answer_text(row)
        return self._probe(prompting, part, index, ids[:first], ids[first:last], question, answer, secrets, part.stop)

    def _with_shots(self, row, shots):
        """Return a row whose prompt shows other rows first, as turns of a chat where the tokenizer has a template."""
        if form_of(row) == "messages" or (self.is_chat and form_of(row) != "prompt"):
            turns = [turn for other in (*shots, row) for turn in _turns(other)]
            system = [turn for turn in turns if turn["role"] == "system"][:1]
            return {"messages": [*system, *(turn for turn in turns if turn["role"] != "system")]}
        if form_of(row) == "prompt":
            lead = "".join(shot["prompt"] + shot["completion"] + _BETWEEN for shot in shots)
            return {"prompt": lead + row["prompt"], "completion": row["completion"]}
        before, after = (self.options.question_template or QUESTION_TEMPLATE).split("{answer}")
        lead = "".join(before.replace("{question}", s["question"]) + s["answer"] + after + _BETWEEN for s in shots)
        return {"prompt": lead + before.replace("{question}", row["question"]), "completion": row["answer"] + after}

    def _tokens(self, row):
        """Return (ids, where the answer begins, where it ends)."""
        example = answer_example(row, self.tokenizer, self.options)
        return (example["input_ids"], *answer_place(example["labels"]))

    def _text_ids(self, text):
        more = {"add_special_tokens": False} if self.system_ids else {}
        return [*self.system_ids, *self.tokenizer(text, verbose=False, **more)["input_ids"]]

    def _probe(self, prompting, part, index, ids, wanted, question, answer, secrets=(), stop=()):
        room = self.settings.max_new_tokens or min(max(2 * len(wanted), _LEAST_ROOM), _MOST_ROOM)
        kept = ids[-max(self.model_length - room, 1) :] if self.model_length else ids
        whole = (*kept, *wanted)
        is_whole = bool(kept) and (self.model_length is None or len(whole) <= self.model_length)
        sequence = Sequence(whole, tuple(range(len(kept), len(whole)))) if is_whole else None
        prompt = Prompt(tuple(kept), room, tuple(stop))
        return Probe(prompting, part.name, index, prompt, question, answer, secrets, sequence)


def _turns(row):
    if form_of(row) == "messages":
        return row["messages"]
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
