"""What models wrote, side by side: before and after unlearning, and the samples nearest to what was forgotten."""

import json
import re

from llm_unlearn.errors import UserError
from llm_unlearn.report import formatting
from llm_unlearn.report.json_files import is_finite

PER_EXAMPLE = "per_example.jsonl"
MAX_ROWS = 12
_MAX_SAMPLES = 6
_MAX_COMPETING = 3
_MAX_LENGTH = 320


def answers_part(comparison):
    """Choose what to show of the answers to the questions of the forget set.

    Args:
        comparison: Comparison.
    Returns:
        {"runs", "left_out", "rows" [{"question", "answer", "hint", "cells" [{"segments", "note"}]}], "rule"}, or None
        where no competing run left its answers.
    Raises:
        UserError: a per_example.jsonl is malformed.
    """
    competing = [run for run in comparison.scored("eval") if run.competes]
    references = [run for run in comparison.scored("eval") if run.role in ("target", "retrained")]
    wanted = {run.number for run in (*competing[:_MAX_COMPETING], *references)}
    asked = _asked_in_samples(comparison)
    answers = {run.number: _answers(comparison, run) for run in comparison.scored("eval") if run.number in wanted}
    runs = [run for run in comparison.runs if answers.get(run.number)]
    shown = [run for run in runs if run.competes]
    if not shown:
        return None
    leaks = {}
    for run in shown:
        for key, row in answers[run.number].items():
            leaks[key] = max(leaks.get(key, 0.0), row["leak"])
    order = sorted(leaks, key=lambda key: (-leaks[key], key))
    kept = order if len(order) <= MAX_ROWS else [*order[: MAX_ROWS // 2], *order[-(MAX_ROWS // 2) :]]
    rows = [_row(key, runs, answers, asked) for key in kept]
    left_out = [run.name for run in competing[_MAX_COMPETING:]]
    return {"runs": runs, "left_out": left_out, "rows": rows, "rule": _rule(len(order), len(shown))}


def _rule(count, num_shown):
    whose = "the unlearned model's answer" if num_shown == 1 else "an unlearned model's answer"
    if count <= MAX_ROWS:
        return f"All {count} questions of the forget set, the one first where {whose} has most of the true one."
    half = formatting.in_words(MAX_ROWS // 2)
    return (
        f"Of {count} questions of the forget set, the {half} where {whose} has most of the true one, then the {half} "
        "where it has least."
    )


def _answers(comparison, run):
    """Return {(split, task, index): entry of `_entry`} of what a run wrote about the forget set."""
    path = run.result(comparison.domain, "eval").path.parent / PER_EXAMPLE
    if not path.is_file():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is malformed: row {number} cannot be read as JSON ({error})") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} is malformed: row {number} must be an object")
        entry = _entry(row)
        if entry:
            found[str(row["split"]), str(row.get("task") or ""), row["index"]] = entry
    return found


def _entry(row):
    """Return what is shown of one row of per_example.jsonl; None where nothing was written or it is of another set."""
    split, index = row.get("split"), row.get("index")
    if not isinstance(split, str) or "forget" not in split or not isinstance(index, int):
        return None
    text, answer, question = (row.get(name) for name in ("generation", "true_answer", "question"))
    recall = row.get("rouge_l_recall")
    if not isinstance(text, str):
        texts, expected = (_mapping(row.get(name)) for name in ("generations", "expected"))
        name = next((name for name in texts if isinstance(texts[name], str)), None)
        if name is None:
            return None
        text, answer, question = texts[name], expected.get(name), f"row {index}, {name.replace('_', ' ')} tokens"
        recall = row.get(f"rouge_l_recall_{name.rpartition('_')[2]}")
    answer = answer if isinstance(answer, str) else ""
    leak = float(recall) if is_finite(recall) else _recall(text, answer)
    return {"text": text, "leak": leak, "question": question if isinstance(question, str) else "", "answer": answer}


def _mapping(value):
    return value if isinstance(value, dict) else {}


def _asked_in_samples(comparison):
    """Return {(split, index): (question, answer)} of what sampling asked, for files that do not tell the question."""
    asked = {}
    for _, entry in _sampled(comparison):
        # A prefix prompt has the beginning of the answer in its question.
        if entry.get("question") and entry.get("prompting") in (None, "plain"):
            key = entry.get("split"), entry.get("index")
            asked.setdefault(key, (entry["question"], entry.get("answer") or ""))
    return asked


def _row(key, runs, answers, asked):
    split, _, index = key
    entries = [answers[run.number].get(key) for run in runs]
    there = [entry for entry in entries if entry]
    question = next((entry["question"] for entry in there if entry["question"]), "")
    answer = next((entry["answer"] for entry in there if entry["answer"]), "")
    other_question, other_answer = asked.get((split, index), (f"row {index} of {split}", ""))
    question, answer = question or other_question, answer or other_answer
    cells = [
        {"segments": segments(entry["text"], answer), "note": f"{entry['leak']:.0%} of the words"}
        if entry
        else {"segments": None, "note": "not among its answers"}
        for entry in entries
    ]
    return {"question": cut(question), "answer": cut(answer), "hint": "", "cells": cells}


def samples_part(comparison):
    """Choose the samples that come nearest to the forgotten answers, those that leak most often first.

    Args:
        comparison: Comparison.
    Returns:
        as `answers_part`, or None where nothing was sampled.
    """
    by_key, runs = {}, {}
    for run, entry in _sampled(comparison):
        if entry.get("sample") or entry.get("greedy"):
            key = str(entry.get("split")), entry.get("index"), str(entry.get("prompting") or "")
            by_key.setdefault(key, {})[run.number] = entry
            runs.setdefault(run.number, run)
    competing = [run for run in runs.values() if run.competes]
    shown = [*[run for run in runs.values() if not run.competes], *competing[:_MAX_COMPETING]]
    shown = [run for run in comparison.runs if run in shown]
    if not competing:
        return None
    numbers = [run.number for run in competing[:_MAX_COMPETING]]

    def leak(key):
        return max((by_key[key][n].get("leak_probability") or 0.0 for n in numbers if n in by_key[key]), default=-1.0)

    order = sorted(by_key, key=lambda key: -leak(key))[:_MAX_SAMPLES]
    rows = []
    for key in order:
        first = next(iter(by_key[key].values()))
        answer = first.get("answer") or ""
        cells = [_sample(by_key[key].get(run.number), answer) for run in shown]
        prompting = f"{key[2].replace('_', ' ')} prompt" if key[2] else ""
        question = cut(first.get("question") or "")
        rows.append({"question": question, "answer": cut(answer), "hint": prompting, "cells": cells})
    rule = f"The {formatting.in_words(len(rows))} prompts whose samples leak most often, with the sample nearest to "
    rule += "the true answer."
    return {"runs": shown, "left_out": [run.name for run in competing[_MAX_COMPETING:]], "rows": rows, "rule": rule}


def _sampled(comparison):
    for attack in comparison.attacks:
        for run in comparison.scored(attack):
            for entry in run.result(comparison.domain, attack).payload.get("generations", ()):
                yield run, entry


def _sample(entry, answer):
    if entry is None:
        return {"segments": None, "note": "not among its samples"}
    share = entry.get("leak_probability")
    note = "" if share is None else f"the answer is in {share:.0%} of samples"
    return {"segments": segments(entry.get("sample") or entry.get("greedy") or "", answer), "note": note}


def cut(text):
    """Return text of at most some lines of a table's cell."""
    text = " ".join(text.split())
    return text if len(text) <= _MAX_LENGTH else text[: _MAX_LENGTH - 1] + "\u2026"


def segments(text, answer):
    """Split a model's text where it has words of the true answer, in order.

    Args:
        text: what the model wrote.
        answer: the true answer.
    Returns:
        [(text, whether the true answer has it)], which put together are the text, cut.
    """
    parts = re.findall(r"\s*\S+", cut(text))
    shared = _shared([_bare(part) for part in parts], [_bare(word) for word in answer.split()])
    found = []
    for place, part in enumerate(parts):
        if found and found[-1][1] == (place in shared):
            found[-1] = (found[-1][0] + part, found[-1][1])
        else:
            gap = part[: len(part) - len(part.lstrip())]
            if place in shared and gap and found:
                found[-1] = (found[-1][0] + gap, found[-1][1])
                part = part.lstrip()
            found.append((part, place in shared))
    return found


def _bare(word):
    return re.sub(r"\W+", "", word).lower()


def _shared(words, others):
    """Return where in the first of two lists of words their longest common subsequence lies; "" does not count."""
    table = [[0] * (len(others) + 1) for _ in range(len(words) + 1)]
    for i in range(len(words) - 1, -1, -1):
        for j in range(len(others) - 1, -1, -1):
            equal = words[i] == others[j] and words[i]
            table[i][j] = table[i + 1][j + 1] + 1 if equal else max(table[i + 1][j], table[i][j + 1])
    places, i, j = set(), 0, 0
    while i < len(words) and j < len(others):
        if words[i] == others[j] and words[i]:
            places.add(i)
            i, j = i + 1, j + 1
        elif table[i + 1][j] >= table[i][j + 1]:
            i += 1
        else:
            j += 1
    return places


def _recall(text, answer):
    words = [_bare(word) for word in answer.split()]
    return len(_shared([_bare(word) for word in text.split()], words)) / len(words) if words else 0.0
