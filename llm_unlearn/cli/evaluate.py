"""run_eval.py: parse, load, ask the model once, write every metric."""

import logging
import time
from pathlib import Path

from llm_unlearn.cli.scoring import load_model_of, prepare, say_notes, show_results, statistics_folder
from llm_unlearn.errors import UserError, run_script
from llm_unlearn.evaluation.parsing import SCRIPT, parse_evaluation
from llm_unlearn.processes import is_first_process

logger = logging.getLogger("llm_unlearn")


def main(argv=None):
    """Score one checkpoint; returns the exit code, see `run_script`."""
    return run_script(run, argv)


def run(argv):
    """Do what `main` does, errors raised; see there."""
    parsed = parse_evaluation(argv)
    if parsed is None:
        return
    say_notes(parsed)
    from llm_unlearn.evaluation.results import write_results

    started = time.time()
    folder, device = prepare(parsed, "eval")
    loaded = load_benchmark(parsed)
    reference = find_reference(parsed, loaded, folder, device)
    checkpoint = load_model_of(parsed, parsed.model.model_name_or_path, device)
    if not parsed.flags.do_eval:
        logger.info("--do_eval False: model and data are in order, nothing was scored")
        return
    record, outcome = score(parsed, checkpoint, loaded, reference, folder, started)
    if is_first_process():
        write_results(folder, record, outcome.examples, time.time() - started)
    show_results(record, folder)


def load_benchmark(parsed):
    """Return (parts, missing) of --domain; nothing where only lm_eval is asked."""
    from llm_unlearn.evaluation.benchmarks import load_parts

    return load_parts(parsed.data) if parsed.data.domain else ([], {})


def find_reference(parsed, loaded, folder, device):
    """Return the RetainReference that the flags name, scored here where it is a model; None without one."""
    from llm_unlearn.evaluation.retain_reference import RetainReference, load_reference

    flags = parsed.flags
    if not flags.retain_reference and not flags.reference_model:
        return None
    forget = compared_part(parsed.data.domain, loaded[0])
    if forget is None:
        flag = "--retain_reference" if flags.retain_reference else "--reference_model"
        raise UserError(f"{flag} has no effect: no set of --domain {parsed.data.domain} is compared with it")
    if flags.retain_reference:
        return load_reference(flags.retain_reference, forget, flags.legacy_metrics, flags.tokenize_options(None))
    if not flags.do_eval:
        return None
    logger.info("scoring the retrained model %s first", flags.reference_model)
    checkpoint = load_model_of(parsed, flags.reference_model, device)
    outcome = ask(parsed, checkpoint, loaded, None, folder)
    values = outcome.reference_values
    return RetainReference(flags.reference_model, values["forget/truth_ratio"], values["aucs"])


def compared_part(domain, parts):
    """Return the Part that a retrained model is compared on: the forget set of TOFU or MUSE, or with wrong answers."""
    named = [part for name in ("forget", "forget_text") for part in parts if part.name == name]
    if domain in ("tofu", "demo", "muse_news", "muse_books"):
        return next(iter(named), None)
    return next((part for part in named if any(row.get("perturbed_answer") for row in part.rows)), None)


def score(parsed, checkpoint, loaded, reference, folder, started):
    """Ask the model everything; returns (contents of results.json, Outcome)."""
    from llm_unlearn.evaluation.results import results_record
    from llm_unlearn.evaluation.retain_reference import wording
    from llm_unlearn.evaluation.suite import Outcome
    from llm_unlearn.records import command_line, package_versions, peak_memory

    flags = parsed.flags
    outcome = ask(parsed, checkpoint, loaded, reference, folder) if loaded[0] else Outcome({}, {}, {})
    if flags.lm_eval_tasks:
        outcome.metrics |= harness_metrics(parsed, checkpoint, folder)
    outcome.counters |= {"wall_seconds": round(time.time() - started, 3), "peak_memory_bytes": peak_memory()}
    fingerprints = {**checkpoint.fingerprints, "questions": outcome.asked}
    asked_with = wording(flags.tokenize_options(None))
    record = results_record(
        "eval", parsed.data.domain, parsed.model.model_name_or_path, command_line(parsed.words, SCRIPT),
        package_versions(), fingerprints, loaded[0], outcome, flags.legacy_metrics, asked_with,
    )  # fmt: skip
    return record, outcome


def ask(parsed, checkpoint, loaded, reference, folder):
    """Run the suite of the domain on one checkpoint; returns its Outcome."""
    from llm_unlearn.evaluation.suite import SuiteSettings, run_suite

    flags = parsed.flags
    settings = SuiteSettings(
        options=flags.tokenize_options(checkpoint.context_length),
        folder=statistics_folder(parsed, checkpoint, folder),
        max_tokens=flags.max_tokens_per_batch,
        max_sequences=flags.per_device_eval_batch_size,
        max_new_tokens=flags.max_new_tokens,
        cap_loops=flags.cap_loops,
        legacy=flags.legacy_metrics,
        seed=flags.seed,
        toxicity_model=flags.toxicity_model,
        embedding_model=flags.embedding_model,
        progress=True,
    )
    logger.info("scoring on %s: %s", parsed.data.domain, ", ".join(f"{p.name} {len(p.rows)} rows" for p in loaded[0]))
    return run_suite(checkpoint.model, checkpoint.tokenizer, parsed.data.domain, *loaded, settings, reference)


def harness_metrics(parsed, checkpoint, folder):
    """Run the lm_eval tasks beside the domain; returns {name: Metric}."""
    from llm_unlearn.evaluation.harness import run_tasks
    from llm_unlearn.evaluation.scores import Metric

    flags = parsed.flags
    domain = parsed.data.domain
    is_ours = domain is None or domain.startswith("wmdp")
    data_dir = flags.lm_eval_data_dir or (parsed.data.data_dir if is_ours else None)
    tasks = [task.strip() for task in flags.lm_eval_tasks.split(",") if task.strip()]
    found = run_tasks(
        checkpoint.model, checkpoint.tokenizer, tasks, batch_size=flags.per_device_eval_batch_size or 8,
        include_path=flags.include_path, data_dir=data_dir, limit=flags.lm_eval_limit,
        cache_path=str(Path(statistics_folder(parsed, checkpoint, folder)) / "lm_eval"), seed=flags.seed,
    )  # fmt: skip
    return {name: Metric(**metric) for name, metric in found.items()}
