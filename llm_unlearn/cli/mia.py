"""run_mia.py: score members and non-members once, and say what each attack can tell."""

import logging
import time

from llm_unlearn.cli.scoring import load_model_of, prepare, say_notes, show_results, statistics_folder
from llm_unlearn.errors import UserError, run_script
from llm_unlearn.evaluation.parsing import parse_mia
from llm_unlearn.processes import is_first_process

logger = logging.getLogger("llm_unlearn")


def main(argv=None):
    """Attack one checkpoint; returns the exit code, see `run_script`."""
    return run_script(run, argv)


def run(argv):
    """Do what `main` does, errors raised; see there."""
    parsed = parse_mia(argv)
    if parsed is None:
        return
    say_notes(parsed)
    from llm_unlearn.evaluation.mia import load_groups, units_of
    from llm_unlearn.evaluation.mia_results import load_mia_reference, mia_record, write_mia

    started, flags = time.time(), parsed.flags
    folder, device = prepare(parsed, "mia")
    groups = load_groups(parsed.data)
    reference = load_mia_reference(flags.retain_reference, groups) if flags.retain_reference else None
    checkpoint = load_model_of(parsed, parsed.model.model_name_or_path, device)
    units = units_of(groups, checkpoint.tokenizer, flags.tokenize_options(checkpoint.context_length), flags.lowercase)
    if not flags.do_eval:
        logger.info("--do_eval False: model and data are in order, nothing was scored")
        return
    scores, counters = attack(parsed, checkpoint, units, folder, device)
    record, more = None, ""
    if is_first_process():
        record, curves = mia_record(parsed, checkpoint, groups, units, scores, counters, reference, started)
        write_mia(folder, record, units, scores, curves)
        more = "\n".join(record["verdicts"]) + "\n"
    show_results(record, folder, more)


def attack(parsed, checkpoint, units, folder, device):
    """Score every unit with every attack; returns (scores, counters)."""
    from llm_unlearn.data.streams import pad_id
    from llm_unlearn.evaluation.mia import GradientNorms, score_units
    from llm_unlearn.evaluation.statistics import Scorer

    flags = parsed.flags
    bounds = {"max_tokens": flags.max_tokens_per_batch, "max_sequences": flags.per_device_eval_batch_size}
    bounds["progress"] = True

    def scorer_of(loaded):
        return Scorer(loaded.model, pad_id(loaded.tokenizer), statistics_folder(parsed, loaded, folder), **bounds)

    scorer, other = scorer_of(checkpoint), None
    if flags.reference_model:
        loaded = load_model_of(parsed, flags.reference_model, device)
        if loaded.tokenizer.get_vocab() != checkpoint.tokenizer.get_vocab():
            raise UserError(
                f"--reference_model '{flags.reference_model}' has another vocabulary than the model, so that their "
                "likelihoods of a token cannot be compared"
            )
        other = scorer_of(loaded)
    kept = statistics_folder(parsed, checkpoint, folder)
    gradients = GradientNorms(checkpoint.model, kept) if flags.grad_norm else None
    logger.info("attacking with %d sequences", len(units))
    scores = score_units(units, scorer, other, gradients)
    counters = {**scorer.counters}
    if other is not None:
        counters |= {f"reference_{name}": value for name, value in other.counters.items()}
    if gradients is not None:
        counters |= gradients.counters
    return scores, counters
