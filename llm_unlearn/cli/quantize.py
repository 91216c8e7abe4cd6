"""Reload a checkpoint in 8 and 4 bits and score it again: does rounding the weights bring back what was forgotten?

python -m llm_unlearn.cli.quantize --model_name_or_path CHECKPOINT --domain tofu --schemes int8,nf4
"""

import gc
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from llm_unlearn.arguments import flag
from llm_unlearn.attacks.parsing import AttackFlags, parse_attack
from llm_unlearn.cli.scoring import load_model_of, prepare, say_notes, show_results, statistics_folder
from llm_unlearn.errors import UserError, run_script, unknown_name
from llm_unlearn.processes import is_first_process

logger = logging.getLogger("llm_unlearn")

KIND = "quantize"


@dataclass
class QuantizeFlags(AttackFlags):
    """Flags of the attack by quantization."""

    schemes: str = flag(
        "int8,nf4",
        "How weights are rounded, separated by commas: int8, nf4 and fp4 by bitsandbytes, int4 by torchao.",
    )
    generate: bool = flag(False, "Continue prompts as well, for ROUGE and extracted secrets; takes most of the time.")


def main(argv=None):
    """Attack one checkpoint by quantization; returns the exit code, see `run_script`."""
    return run_script(run, argv)


def run(argv):
    """Do what `main` does, errors raised; see there."""
    parsed = parse_attack(argv, QuantizeFlags, "python -m llm_unlearn.cli.quantize")
    if parsed is None:
        return
    say_notes(parsed)
    from llm_unlearn.attacks.records import write_attack
    from llm_unlearn.attacks.scoring import DomainScorer

    started, flags = time.time(), parsed.flags
    schemes = schemes_of(parsed)
    folder, device = prepare(parsed, KIND)
    name = parsed.model.model_name_or_path
    if flags.target_model:
        logger.info("--target_model changes nothing here: the quantized copies are compared with the model itself")
    checkpoint = load_model_of(parsed, name, device)
    if getattr(checkpoint.model.config, "quantization_config", None):
        raise UserError(f"'{name}' is quantized already; pass the checkpoint that it was made of")
    scorer = DomainScorer(parsed, checkpoint.tokenizer, checkpoint.context_length, generates=flags.generate)
    if not flags.do_eval:
        logger.info("--do_eval False: model and data are in order, nothing was scored")
        return
    found = attack(parsed, checkpoint, scorer, schemes, folder, device)
    found.counters["wall_seconds"] = round(time.time() - started, 3)
    record = write_attack(
        folder, KIND, parsed, checkpoint, scorer.parts, found.metrics, found.counters, found.examples,
        schemes=found.schemes, full_precision=found.full_precision,
    )  # fmt: skip
    show_results(record, folder)


def schemes_of(parsed):
    """Return the schemes that --schemes names.

    Raises:
        UserError: an unknown one, none, or quantization flags of TRL beside them.
    """
    from llm_unlearn.attacks.quantize import SCHEMES

    for name in ("load_in_4bit", "load_in_8bit"):
        if getattr(parsed.model, name):
            raise UserError(f"--{name} has no effect here: --schemes says how the weights are quantized")
    schemes = list(dict.fromkeys(word.strip() for word in parsed.flags.schemes.split(",") if word.strip()))
    for word in schemes:
        if word not in SCHEMES:
            raise unknown_name("--schemes", word, SCHEMES)
    if not schemes:
        raise UserError(f"--schemes names nothing; known: {', '.join(SCHEMES)}")
    return schemes


@dataclass
class QuantizeFindings:
    """What an attack by quantization found.

    Attributes:
        metrics: {name: scores.Metric}.
        counters: {what: number}.
        examples: rows of per_example.jsonl.
        schemes: {scheme: {"library", "bits", "quantized_share", "seconds"}, or {"reason"} where it did not run}.
        full_precision: {metric: its JSON form}, what the schemes are compared with.
    """

    metrics: dict
    counters: dict
    examples: list
    schemes: dict
    full_precision: dict


def attack(parsed, checkpoint, scorer, schemes, folder, device):
    """Score a checkpoint in full precision, then quantized by each scheme.

    Args:
        parsed: ParsedEvaluation with QuantizeFlags.
        checkpoint: loading.Checkpoint; its model is let go, so that never two are in memory.
        scorer: attacks.scoring.DomainScorer.
        schemes: list of keys of `quantize.SCHEMES`.
        folder: output directory.
        device: where models run.
    Returns:
        QuantizeFindings.
    Raises:
        UserError: none of the schemes runs here.
    """
    from llm_unlearn.attacks.quantize import absent_metrics, compared_metrics, example_rows, scheme_metrics, unavailable
    from llm_unlearn.evaluation.results import finite_metric

    kept = statistics_folder(parsed, checkpoint, folder)
    outcomes = {"full": scorer(checkpoint.model, kept)}
    full, dtype = outcomes["full"], checkpoint.model.dtype
    source = quantizable(parsed, checkpoint, folder)
    checkpoint.model = None
    metrics, counters, about = {}, dict(full.counters), {}
    try:
        for scheme in schemes:
            reason = unavailable(scheme)
            if reason is None:
                begun = time.time()
                reason, outcome, facts = score_quantized(parsed, scorer, scheme, source, dtype, kept, device)
            if reason is not None:
                logger.warning("going on without %s: %s", scheme, reason)
                metrics |= absent_metrics(scheme, full, reason)
                about[scheme] = {"reason": reason}
                continue
            outcomes[scheme] = outcome
            metrics |= scheme_metrics(scheme, full, outcome, *facts.pop("weights"), parsed.flags.seed)
            counters |= {f"{scheme}_{name}": value for name, value in outcome.counters.items()}
            about[scheme] = {**facts, "seconds": round(time.time() - begun, 3)}
    finally:
        remove_merged(folder)
    if len(outcomes) == 1:
        reasons = "; ".join(f"{scheme}: {facts['reason']}" for scheme, facts in about.items())
        raise UserError(f"none of --schemes {','.join(schemes)} runs here ({reasons})")
    compared = {name: finite_metric(metric).as_dict() for name, metric in compared_metrics(full.metrics).items()}
    return QuantizeFindings(metrics, counters, example_rows(outcomes), about, compared)


def score_quantized(parsed, scorer, scheme, source, dtype, kept, device):
    """Load a checkpoint quantized and score it.

    Returns:
        (why it does not run here or None, suite.Outcome, {"library", "bits", "weights": (share, number)}).
    """
    from llm_unlearn.attacks.quantize import SCHEMES, quantized_share

    about = SCHEMES[scheme]
    gc.collect()
    logger.info("reloading the model in %d bits, %s by %s", about.bits, scheme, about.version())
    try:
        model = load_model_of(parsed, source, device, about.make(dtype)).model
        weights = quantized_share(model)
        if not weights[0]:
            return f"{about.package} left every weight of this model as it was", None, None
        # Below the folder of the checkpoint, which --overwrite_cache deletes.
        place = str(Path(kept) / f"{scheme}-{about.version().replace(' ', '-')}")
        outcome = scorer(model, place)
    except Exception as error:  # whatever a library does not support on this machine, the others may
        logger.debug("%s failed", scheme, exc_info=True)
        first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
        return f"{about.version()} does not run here: {first_line}", None, None
    facts = {"library": about.version(), "bits": about.bits, "quantized_share": weights[0], "weights": weights}
    return None, outcome, facts


def quantizable(parsed, checkpoint, folder):
    """Return what to load quantized: the checkpoint itself; an adapter merged into its base first.

    An adapter beside a quantized base would keep what unlearning wrote in full precision.
    """
    from accelerate import PartialState

    name = parsed.model.model_name_or_path
    if "base" not in checkpoint.fingerprints or hasattr(checkpoint.model, "peft_config"):
        return name
    place = merged_folder(folder)
    if is_first_process():
        logger.info("merging the adapter into its base, which is quantized as a whole")
        checkpoint.model.save_pretrained(place)
        checkpoint.tokenizer.save_pretrained(place)
    PartialState().wait_for_everyone()
    return str(place)


def merged_folder(folder):
    """Return where a merged adapter lies while it is scored."""
    return Path(folder) / "merged"


def remove_merged(folder):
    """Delete the merged adapter, once every process has read it."""
    from accelerate import PartialState

    PartialState().wait_for_everyone()
    if is_first_process():
        shutil.rmtree(merged_folder(folder), ignore_errors=True)


if __name__ == "__main__":
    from llm_unlearn.processes import end_process

    end_process(main())
