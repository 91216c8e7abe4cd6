"""A benchmark from its sets to its metrics: all is asked first, the model answers once, the rest is arithmetic."""

import logging
from dataclasses import dataclass, field

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from llm_unlearn.data.streams import pad_id
from llm_unlearn.data.tokenize import TokenizeOptions
from llm_unlearn.evaluation.aggregates import aggregate
from llm_unlearn.evaluation.examples import example_values
from llm_unlearn.evaluation.generation import Generator
from llm_unlearn.evaluation.questions import fingerprint_of, questions_of
from llm_unlearn.evaluation.retain_reference import reference_values
from llm_unlearn.evaluation.scores import LOWER, NONE, absent, part_metrics
from llm_unlearn.evaluation.statistics import MAX_TOKENS_PER_BATCH, Scorer

logger = logging.getLogger(__name__)

TOXIC_ABOVE = 0.5


@dataclass
class SuiteSettings:
    """How a benchmark is asked.

    Attributes:
        options: TokenizeOptions.
        folder: where results by example are kept for a later run; None keeps nothing.
        max_tokens: of a batch.
        max_sequences: of a batch; None: no bound.
        max_new_tokens: of a continuation; None takes what the benchmark says.
        cap_loops: whether loops are decoded no further.
        legacy: open-unlearning's definitions where ours differ.
        lockstep: the model's weights are sharded over the processes.
        seed: of the bootstrap.
        toxicity_model: classifier, or None.
        embedding_model: encoder, or None.
        progress: whether progress bars are shown.
        aggregates: whether what spans several sets is computed, as model utility and the AUCs, which takes a bootstrap
            each.
    """

    options: TokenizeOptions
    folder: str | None = None
    max_tokens: int = MAX_TOKENS_PER_BATCH
    max_sequences: int | None = None
    max_new_tokens: int | None = None
    cap_loops: bool = True
    legacy: bool = False
    lockstep: bool = False
    seed: int = 42
    toxicity_model: str | None = None
    embedding_model: str | None = None
    progress: bool = False
    aggregates: bool = True


@dataclass
class Outcome:
    """What a suite found.

    Attributes:
        metrics: {name: scores.Metric}.
        examples: {set: rows of `example_values`}.
        counters: what it cost.
        reference_values: what other models can be measured against.
        asked: sha256 of all questions.
    """

    metrics: dict
    examples: dict
    counters: dict
    reference_values: dict = field(default_factory=dict)
    asked: str = ""


@torch.no_grad()
def run_suite(model, tokenizer, domain, parts, missing, settings, reference=None, questions=None):
    """Score a model on a benchmark; all processes call together and all get the outcome.

    Args:
        model: a causal language model on its device, unwrapped.
        tokenizer: its tokenizer.
        domain: --domain.
        parts: list of Part, see `benchmarks.load_parts`.
        missing: {set: why it is not there}.
        settings: SuiteSettings.
        reference: RetainReference or None.
        questions: about the parts, where they were made before; None makes them.
    Returns:
        Outcome.
    """
    if questions is None:
        asked = (questions_of(part, tokenizer, settings.options, settings.max_new_tokens) for part in parts)
        questions = [question for of_part in asked for question in of_part]
    was_training = model.training
    model.eval()
    try:
        return _run(model, tokenizer, domain, parts, missing, settings, reference, questions)
    finally:
        model.train(was_training)


def _run(model, tokenizer, domain, parts, missing, settings, reference, questions):
    pad, legacy = pad_id(tokenizer), settings.legacy
    bounds = (settings.folder, settings.max_tokens, settings.max_sequences, settings.lockstep)
    scorer = Scorer(model, pad, *bounds, hide_pads=legacy, progress=settings.progress)
    generator = Generator(model, tokenizer, pad, *bounds, cap_loops=settings.cap_loops, progress=settings.progress)
    statistics = scorer.score([sequence for question in questions for sequence in _sequences(question)])
    generations = generator.generate([prompt for question in questions for prompt in question.prompts.values()])
    outcome = [None]
    if PartialState().is_main_process:
        examples = _examples(questions, statistics, generations, tokenizer, legacy)
        notes = judge(questions, examples, settings, model.device, toxicity_asked=domain == "detox")
        by_part = [
            [row for asked, row in zip(questions, examples, strict=True) if asked.part is part] for part in parts
        ]
        outcome[0] = _metrics(domain, parts, by_part, missing, notes, settings, reference)
        outcome[0].counters = {**scorer.counters, **generator.counters}
        outcome[0].asked = fingerprint_of(questions)
    return broadcast_object_list(outcome)[0] if PartialState().num_processes > 1 else outcome[0]


def _sequences(question):
    return [sequence for sequences in question.sequences.values() for sequence in sequences]


def _examples(questions, statistics, generations, tokenizer, legacy):
    """Hand the answers back to the questions, in the order in which they were asked."""
    scored, continued, rows = iter(statistics), iter(generations), []
    for question in questions:
        found = {name: [next(scored) for _ in sequences] for name, sequences in question.sequences.items()}
        texts = {name: next(continued) for name in question.prompts}
        rows.append(example_values(question, found, texts, tokenizer.eos_token_id, legacy))
    return rows


def judge(questions, rows, settings, device, toxicity_asked=False):
    """Let other models judge the generations, where the user named such models.

    Args:
        questions: list of Question.
        rows: their values, which are added to.
        settings: SuiteSettings.
        device: where the judges run.
        toxicity_asked: whether a missing classifier leaves a metric of the benchmark out.
    Returns:
        {"<set>/<metric>": why it is not there}.
    """
    generated = [(question.row, row) for question, row in zip(questions, rows, strict=True) if "generation" in row]
    compared = [(asked, row) for asked, row in generated if asked.get("perturbed_answer")]
    notes = {}
    if not settings.toxicity_model and toxicity_asked:
        notes |= {f"{row['split']}/toxicity": "no --toxicity_model was given" for _, row in generated}
    elif settings.toxicity_model and generated:
        _add_toxicity([row for _, row in generated], settings.toxicity_model, device)
    if not settings.embedding_model:
        notes |= {f"{row['split']}/semantic_accuracy": "no --embedding_model was given" for _, row in compared}
    elif compared:
        _add_semantic_accuracy(compared, settings.embedding_model, device)
    return notes


def _add_toxicity(rows, model_name, device):
    from llm_unlearn.evaluation.judges import toxicity

    scores = toxicity([row["generation"] for row in rows], model_name, device)
    for row, score in zip(rows, scores, strict=True):
        row["toxicity"], row["toxic_share"] = float(score), float(score > TOXIC_ABOVE)


def _add_semantic_accuracy(compared, model_name, device):
    from llm_unlearn.evaluation.judges import embed, semantic_accuracy

    nearer = semantic_accuracy(
        [row["generation"] for _, row in compared],
        [asked.get("paraphrased_answer") or asked["answer"] for asked, _ in compared],
        [asked["perturbed_answer"] for asked, _ in compared],
        lambda texts: embed(texts, model_name, device),
    )
    for (_, row), hit in zip(compared, nearer, strict=True):
        row["semantic_accuracy"] = float(hit)


def _metrics(domain, parts, rows_of_parts, missing, notes, settings, reference):
    found, examples = {}, {}
    for part, rows in zip(parts, rows_of_parts, strict=True):
        found |= part_metrics(part, rows, settings.seed)
        examples.setdefault(part.name, []).extend(rows)
    aucs = {}
    if settings.aggregates:
        aggregates, aucs = aggregate(domain, examples, missing, reference, settings.legacy, settings.seed)
        found |= aggregates
    found |= {name: absent(reason, LOWER if "toxic" in name else NONE) for name, reason in notes.items()}
    found |= {f"{name}/probability": absent(reason) for name, reason in missing.items()}
    is_reference = "forget" in examples or "forget_text" in examples
    values = reference_values(examples.get("forget", []), aucs) if is_reference else {}
    return Outcome(found, examples, {}, values)
