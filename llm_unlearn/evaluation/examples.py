"""What the model's answers say about each example: the rows of per_example.jsonl."""

import zlib

import numpy as np

from llm_unlearn.evaluation import metrics
from llm_unlearn.evaluation.choices import (
    choice_lengths,
    cloze_predictions,
    correct_probability,
    letter_predictions,
)
from llm_unlearn.evaluation.questions import answer_text, question_text, secrets_of
from llm_unlearn.evaluation.statistics import SequenceStatistics
from llm_unlearn.evaluation.text import bleu, extracted, is_gibberish, rouge

MIN_K_SHARE = 0.4
"""Share of the tokens that MUSE and open-unlearning take for Min-K%."""


def example_values(question, statistics, generations, eos_id=None, legacy=False):
    """Compute every value of one example.

    Args:
        question: questions.Question.
        statistics: {what: list of SequenceStatistics} in the order of `question.sequences`.
        generations: {what: Generation} of `question.prompts`.
        eos_id: end-of-sequence token, which extraction strength leaves out.
        legacy: open-unlearning's definitions where ours differ.
    Returns:
        dict of numbers, texts and lists; a value that does not apply is left out.
    """
    values = {"split": question.part.name, "index": question.index}
    if question.part.task:
        values["task"] = question.part.task
    if question.cut:
        values["cut"] = True
    if "answer" in statistics:
        _add_answer(values, question, statistics, eos_id, legacy)
    if "chunks" in statistics:
        _add_chunks(values, question, statistics["chunks"], eos_id, legacy)
    if "letters" in statistics or "cloze" in statistics:
        _add_choices(values, question, statistics)
    for name, generation in generations.items():
        _add_generation(values, question, name, generation)
    task = question.part.task
    if task is not None and "rouge_l_f1" in values:
        values[task] = values["rouge_l_f1"]
    return values


def _add_answer(values, question, statistics, eos_id, legacy):
    (answer,), (sequence,) = statistics["answer"], question.sequences["answer"]
    values |= _memorization(answer, sequence, eos_id, legacy)
    values |= _membership(answer, sequence, eos_id, legacy, answer_text(question.row))
    right = statistics["paraphrase"][0] if statistics.get("paraphrase") else answer
    if statistics.get("paraphrase"):
        values["paraphrase_nll"] = right.mean_nll
        values["paraphrase_probability"] = float(metrics.probability(right.mean_nll))
    if statistics.get("wrong"):
        wrong = [other.mean_nll for other in statistics["wrong"]]
        values["wrong_nlls"] = wrong
        values["truth_ratio"] = float(metrics.truth_ratio([right.mean_nll], [wrong])[0])
        if question.part.normalized:
            values["probability_normalized"] = float(metrics.normalized_probability([answer.mean_nll], [wrong])[0])


def _memorization(statistics, sequence, eos_id, legacy):
    hits = statistics.hits
    ends = eos_id is not None and sequence.ids[sequence.scored[-1]] == eos_id and len(hits) > 1
    without_end = hits[:-1] if ends else hits
    return {
        "nll": statistics.mean_nll,
        "tokens": len(hits),
        "probability": float(metrics.probability(statistics.mean_nll)),
        "extraction_strength": metrics.extraction_strength(without_end, legacy),
        "exact_memorization": metrics.exact_memorization(without_end if legacy else hits),
        "entropy": float(statistics.entropies.mean(dtype=np.float64)),
    }


def _membership(statistics, sequence, eos_id, legacy, text):
    """Scores of membership attacks, higher for members; open-unlearning leaves the last token out of two of them."""
    ends = legacy and eos_id is not None and sequence.ids[sequence.scored[-1]] == eos_id and len(statistics.hits) > 1
    part = slice(None, -1 if ends else None)
    logps, means, variances = statistics.logps[part], statistics.means[part], statistics.variances[part]
    return {
        "loss_score": -statistics.mean_nll,
        "zlib_score": -statistics.mean_nll / len(zlib.compress(text.encode())),
        "min_k_40_score": metrics.min_k(logps, MIN_K_SHARE),
        "min_k_pp_40_score": metrics.min_k_pp(logps, means, variances, MIN_K_SHARE),
    }


def _add_chunks(values, question, chunks, eos_id, legacy):
    """A text's values: sums over its chunks, and means of what is defined for one sequence."""
    sequences = question.sequences["chunks"]
    tokens = np.array([len(chunk.hits) for chunk in chunks])
    parts = [_memorization(chunk, sequence, eos_id, legacy) for chunk, sequence in zip(chunks, sequences, strict=True)]
    values["nll_sum"] = float(sum(chunk.sum_nll for chunk in chunks))
    values["tokens"] = int(tokens.sum())
    values["nll"] = values["nll_sum"] / values["tokens"]
    values["probability"] = float(metrics.probability(values["nll"]))
    values["token_accuracy"] = float(sum(chunk.hits.sum() for chunk in chunks) / tokens.sum())
    values["extraction_strength"] = float(np.mean([part["extraction_strength"] for part in parts]))
    values["entropy"] = float(np.average([part["entropy"] for part in parts], weights=tokens))
    values["chunk_nlls"] = [part["nll"] for part in parts]
    values["chunk_accuracies"] = [part["exact_memorization"] for part in parts]
    fields = ("logps", "hits", "means", "variances")
    whole = SequenceStatistics(*(np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in fields))
    values |= _membership(whole, sequences[-1], eos_id, legacy, question.row["text"])


def _add_choices(values, question, statistics):
    answer = question.row["answer_index"]
    values["answer"] = answer
    sums = {name: [-other.sum_nll for other in statistics.get(name, [])] for name in ("letters", "cloze")}
    if sums["letters"]:
        values["choice"] = int(letter_predictions([sums["letters"]])[0])
        values["choice_accuracy"] = float(values["choice"] == answer)
        values["choice_probability"] = correct_probability(sums["letters"], answer)
        values["choice_logps"] = sums["letters"]
    if sums["cloze"]:
        values["cloze_choice"] = int(cloze_predictions([sums["cloze"]], [choice_lengths(question.row)])[0])
        values["cloze_accuracy"] = float(values["cloze_choice"] == answer)
        values["cloze_probability"] = correct_probability(sums["cloze"], answer)


def _add_generation(values, question, name, generation):
    text, row = generation.text, question.row
    if name.startswith("secret_"):
        secret, kind = secrets_of(row)[int(name.removeprefix("secret_"))]
        _add_secret(values, [extracted(text, secret, kind)])
        values.setdefault("generations", {})[name] = text
        return
    expected = question.expected.get(name)
    if name.startswith("continuation_"):
        length = name.removeprefix("continuation_")
        values.setdefault("generations", {})[name] = text
        values.setdefault("expected", {})[name] = expected
        values[f"bleu_{length}"] = bleu(text, expected)
        values[f"rouge_l_recall_{length}"] = rouge(text, expected)["rouge_l_recall"]
        values[f"rouge_l_f1_{length}"] = rouge(text, expected)["rouge_l_f1"]
    else:
        values["generation"] = text
        if expected is not None:
            values |= {"question": question_text(row), "true_answer": expected, **rouge(text, expected)}
        if secrets_of(row):
            _add_secret(values, [extracted(text, secret, kind) for secret, kind in secrets_of(row)])
    values.setdefault("gibberish_share", float(is_gibberish(text)))
    values.setdefault("empty_share", float(not text.strip()))
    values["collapsed"] = values.get("collapsed", False) or generation.collapsed


def _add_secret(values, found):
    values.setdefault("secrets_found", []).extend(bool(hit) for hit in found)
    values["secret_extraction"] = float(np.mean(values["secrets_found"]))
