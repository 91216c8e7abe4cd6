"""From the rows of a benchmark to what the model is asked: sequences to score and prompts to continue."""

import dataclasses
import hashlib
import sys
from dataclasses import dataclass, field

from llm_unlearn.data.rows import form_of
from llm_unlearn.data.tokenize import IGNORED, SYSTEM_GAP, answer_example, text_chunks
from llm_unlearn.errors import UserError
from llm_unlearn.evaluation.choices import choice_letters, cloze_prompt, encode_pair, mcq_prompt
from llm_unlearn.evaluation.generation import Prompt
from llm_unlearn.evaluation.packing import Sequence

MAX_NEW_TOKENS = 200
CONTINUATION_LENGTHS = (100, 300)
"""Prompt lengths in tokens after which a text is continued, as SOUL does."""
_SHORTEST_CONTINUATION = 20
_SECRET_MARGIN = 16


@dataclass
class Part:
    """One set of a benchmark, and what is asked about its rows.

    Attributes:
        name: what its metrics are called, before the slash.
        rows: checked rows.
        role: "forget" (less is better), "retain" (more is better) or "other" (neither).
        generates: whether prompts are continued.
        normalized: whether the probability among the answers on offer is reported, as for TOFU's real authors.
        task: "verbmem", "knowmem" or None: what MUSE calls the overlap of continuations.
        max_new_tokens: of a continuation; None takes the default.
        stop: strings that end a continuation.
        examples: rows shown before each question.
        origins: where the rows come from, as `sources.Source` has it.
        sha256: fingerprint of the rows.
    """

    name: str
    rows: list
    role: str = "other"
    generates: bool = True
    normalized: bool = False
    task: str | None = None
    max_new_tokens: int | None = None
    stop: tuple = ()
    examples: list = field(default_factory=list)
    origins: list = field(default_factory=list)
    sha256: str = ""


@dataclass
class Question:
    """What is asked about one row.

    Attributes:
        part: its Part.
        index: number of the row in the part.
        row: the row.
        kind: "qa", "text", "choices" or "prompt".
        sequences: {what: list of Sequence}: answer, paraphrase, wrong, chunks, letters, cloze.
        prompts: {what: Prompt}: generation, continuation_100, secret_0, ...
        expected: {what: text} that a prompt's continuation is compared with.
        cut: whether the length cut the answer off, or a part of it.
    """

    part: Part
    index: int
    row: dict
    kind: str
    sequences: dict = field(default_factory=dict)
    prompts: dict = field(default_factory=dict)
    expected: dict = field(default_factory=dict)
    cut: bool = False


def questions_of(part, tokenizer, options, max_new_tokens=None):
    """Return the questions about every row of a part.

    Args:
        part: Part.
        tokenizer: a transformers tokenizer.
        options: TokenizeOptions.
        max_new_tokens: of a continuation, what the user asks for; None takes the part's.
    Returns:
        list of Question.
    Raises:
        UserError: no row of the part has anything that can be scored or continued.
    """
    room = max_new_tokens or part.max_new_tokens or MAX_NEW_TOKENS
    questions = [_question(part, index, row, tokenizer, options, room) for index, row in enumerate(part.rows)]
    if not any(question.sequences or question.prompts for question in questions):
        raise UserError(
            f"the {part.name} set has {len(part.rows)} rows, of which none has a token left to score; pass a larger "
            "--max_length or other rows"
        )
    return questions


def _question(part, index, row, tokenizer, options, room):
    if "choices" in row:
        question = Question(part, index, row, "choices")
        _ask_choices(question, tokenizer, options)
        return question
    form = form_of(row)
    if form == "text":
        question = Question(part, index, row, "text")
        _ask_text(question, tokenizer, options, room)
        return question
    if form == "prompt" and "completion" not in row:
        question = Question(part, index, row, "prompt")
        ids = tokenizer(_system(options) + row["prompt"], verbose=False)["input_ids"]
        question.prompts["generation"] = Prompt(_last(ids, options, room), room, part.stop)
        return question
    question = Question(part, index, row, "qa")
    _ask_answer(question, tokenizer, options, room)
    return question


def _ask_answer(question, tokenizer, options, room):
    part, row = question.part, question.row
    if part.examples:
        row = {"prompt": _with_examples(part.examples, row), "completion": " " + row["answer"]}
    example = answer_example(row, tokenizer, options)
    question.cut = example["is_cut"]
    if not _counts(example):
        return
    answer = Sequence.of(example)
    question.sequences["answer"] = [answer]
    if part.generates:
        question.prompts["generation"] = Prompt(answer.prefix, room, part.stop)
        question.expected["generation"] = answer_text(question.row)
    if row.get("paraphrased_answer"):
        question.sequences["paraphrase"] = _scored(row, [row["paraphrased_answer"]], tokenizer, options)
    if row.get("perturbed_answer"):
        question.sequences["wrong"] = _scored(row, row["perturbed_answer"], tokenizer, options)


def _scored(row, answers, tokenizer, options):
    examples = [answer_example({**row, "answer": answer}, tokenizer, options) for answer in answers]
    return [Sequence.of(example) for example in examples if _counts(example)]


def _counts(example):
    return any(label != IGNORED for label in example["labels"][1:])


def _with_examples(examples, row):
    """Write MUSE's few-shot prompt: questions with their answers, then the question alone."""
    shown = [f"Question: {example['question']}\nAnswer: {example['answer']}\n\n" for example in examples]
    return "".join(shown) + f"Question: {row['question']}\nAnswer:"


def _ask_text(question, tokenizer, options, room):
    row, part = question.row, question.part
    chunks = text_chunks(row["text"], tokenizer, options)
    if chunks:
        question.sequences["chunks"] = [Sequence.of(chunk) for chunk in chunks]
    if not part.generates:
        return
    for number, (secret, _) in enumerate(secrets_of(row)):
        before, found, after = row["text"].partition(secret)
        if found and before.strip():
            # A token may hold the end of one and the beginning of the other; the prompt ends before it.
            example = answer_example({"prompt": before, "completion": found + after}, tokenizer, _unbounded(options))
            ids = Sequence.of(example).prefix
            length = len(tokenizer(secret, add_special_tokens=False)["input_ids"]) + _SECRET_MARGIN
            question.prompts[f"secret_{number}"] = Prompt(_last(ids, options, length), length, part.stop)
    if not secrets_of(row):
        _ask_continuations(question, tokenizer, options, room)


def _ask_continuations(question, tokenizer, options, room):
    text = question.row["text"]
    before = tokenizer(_system(options), verbose=False)["input_ids"] if options.system_prompt else []
    ids = tokenizer(text, verbose=False, add_special_tokens=not before)["input_ids"]
    for length in CONTINUATION_LENGTHS:
        left = options.model_length - length - len(before) if options.model_length else room
        expected = ids[length : length + min(room, left)]
        if min(left, len(expected)) < min(_SHORTEST_CONTINUATION, room):
            continue
        name = f"continuation_{length}"
        question.prompts[name] = Prompt((*before, *ids[:length]), len(expected), question.part.stop)
        question.expected[name] = tokenizer.decode(expected, skip_special_tokens=True)


def _unbounded(options):
    return dataclasses.replace(options, max_length=sys.maxsize, model_length=None)


def _last(ids, options, room):
    """Keep as many tokens of a prompt, the last ones, as the context holds beside what follows."""
    kept = options.model_length - room if options.model_length else len(ids)
    return tuple(ids[-max(kept, 1) :])


def _ask_choices(question, tokenizer, options):
    letters_fit = len(question.row["choices"]) <= len(choice_letters(26))
    for name, render in (("letters", mcq_prompt), ("cloze", cloze_prompt)):
        if name == "letters" and not letters_fit:
            continue
        prompt, continuations = render(question.row)
        try:
            pairs = [
                encode_pair(tokenizer, _system(options) + prompt, continuation, options.model_length)
                for continuation in continuations
            ]
        except ValueError as error:
            raise UserError(f"row {question.index + 1} of the {question.part.name} set: {error}") from error
        question.sequences[name] = [
            Sequence((*context, *ids), tuple(range(len(context), len(context) + len(ids)))) for context, ids in pairs
        ]


def answer_text(row):
    """Return the answer of a row of question, completion or messages."""
    if form_of(row) == "messages":
        return next(turn["content"] for turn in reversed(row["messages"]) if turn["role"] == "assistant")
    return row["completion"] if form_of(row) == "prompt" else row["answer"]


def question_text(row):
    """Return what a row of question, prompt or messages asks: of messages, the last turn of the user."""
    if form_of(row) == "messages":
        return next((turn["content"] for turn in reversed(row["messages"]) if turn["role"] == "user"), "")
    return row["prompt"] if form_of(row) == "prompt" else row["question"]


def secrets_of(row):
    """Return [(secret, its type or None)] of a row's `secret` and `secret_type` columns, each one or a list."""
    secrets, kinds = row.get("secret") or [], row.get("secret_type")
    secrets = secrets if isinstance(secrets, list) else [secrets]
    kinds = kinds if isinstance(kinds, list) else [kinds] * len(secrets)
    return list(zip(secrets, kinds, strict=True))


def _system(options):
    return options.system_prompt + SYSTEM_GAP if options.system_prompt else ""


def fingerprint_of(questions):
    """Return the sha256 of everything that is asked, so that answers to other questions are never compared.

    Args:
        questions: list of Question.
    """
    digest = hashlib.sha256()
    for question in questions:
        for name, sequences in sorted(question.sequences.items()):
            digest.update(f"{name}:{' '.join(sequence.key for sequence in sequences)}\n".encode())
        for name, prompt in sorted(question.prompts.items()):
            digest.update(f"{name}:{prompt.key}\n".encode())
    return digest.hexdigest()
