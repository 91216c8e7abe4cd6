"""Look inside an unlearned model: what its layers still say of the forgotten answers.

python -m llm_unlearn.cli.white_box --model_name UNLEARNED --target_model TARGET --gold RETRAINED --domain tofu
"""

import logging
import time
from dataclasses import dataclass

from llm_unlearn.arguments import flag
from llm_unlearn.attacks.parsing import AttackFlags, parse_attack
from llm_unlearn.cli.scoring import load_model_of, prepare, say_notes, show_results
from llm_unlearn.errors import UserError, run_script, unknown_name

logger = logging.getLogger("llm_unlearn")
KIND, SCRIPT = "white_box", "python -m llm_unlearn.cli.white_box"


@dataclass
class WhiteBoxFlags(AttackFlags):
    """Flags of the white-box audits."""

    gold: str | None = flag(
        None, "Model retrained without the forget set: how little a model can know that never saw it. uds needs it."
    )
    audits: str = flag(
        "lens,probe,uds",
        "What is done, separated by commas: lens reads the answers off each layer with the head; probe trains a linear "
        "probe on each layer; uds patches each layer into --target_model (unlearning depth score).",
    )
    lens_path: str | None = flag(
        None,
        "Tuned lens of --target_model, folder or name on the Hub, that reads all models; default: each model's own "
        "head (logit lens).",
    )
    allow_pickle_lens: bool = flag(
        False, "Read a published lens that is a pickle (params.pt): its tensors, and nothing else."
    )


def main(argv=None):
    """Audit one checkpoint; returns the exit code, see `run_script`."""
    return run_script(run, argv)


def run(argv):
    """Do what `main` does, errors raised; see there."""
    parsed = parse_attack(argv, WhiteBoxFlags, SCRIPT)
    if parsed is None:
        return
    say_notes(parsed)

    started, flags = time.time(), parsed.flags
    audits = checked_audits(flags)
    folder, device = prepare(parsed, KIND)
    record = audit(parsed, audits, folder, device, started)
    show_results(record, folder)


def checked_audits(flags):
    """Return the names in --audits.

    Args:
        flags: WhiteBoxFlags.
    Raises:
        UserError: an unknown name, none, or a lens that no audit reads with.
    """
    from llm_unlearn.attacks.white_box import AUDITS

    names = tuple(dict.fromkeys(name.strip() for name in flags.audits.split(",") if name.strip()))
    for name in names:
        if name not in AUDITS:
            raise unknown_name("--audits", name, AUDITS)
    if not names:
        raise UserError(f"--audits names nothing to do; pass one or more of {','.join(AUDITS)}")
    if flags.lens_path and "lens" not in names:
        raise UserError("--lens_path has no effect without the audit lens; add it to --audits")
    if flags.lens_path and not flags.target_model:
        raise UserError("--lens_path is the lens of the model before it unlearned; pass it as --target_model")
    if flags.allow_pickle_lens and not flags.lens_path:
        raise UserError("--allow_pickle_lens has no effect without --lens_path")
    return names


def audit(parsed, audits, folder, device, started):
    """Audit the model, the target and gold, no more than two in memory at once, and write what was found.

    Args:
        parsed: ParsedEvaluation.
        audits: names.
        folder: output directory.
        device: torch.device.
        started: time.time() of the start.
    Returns:
        the contents of results.json; None where --do_eval is False.
    """
    from llm_unlearn.attacks.logit_lens import stored_lens
    from llm_unlearn.attacks.patching import model_shape
    from llm_unlearn.attacks.records import write_attack
    from llm_unlearn.attacks.white_box import by_layer, by_row, settings_record

    flags, found, models = parsed.flags, {}, {}
    checkpoint = load_model_of(parsed, parsed.model.model_name_or_path, device)
    asked, parts = asked_of(parsed, audits, checkpoint)
    if not flags.do_eval:
        logger.info("--do_eval False: model and data are in order, nothing was read")
        return None
    logger.info("looking inside %s: %s", parsed.model.model_name_or_path, ", ".join(audits))
    model, kind = checkpoint.model, (checkpoint.tokenizer.get_vocab(), model_shape(checkpoint.model))
    target = other_model(parsed, "target_model", kind, device)
    if flags.lens_path:
        asked.lens = stored_lens(target.model, flags.lens_path, flags.allow_pickle_lens, parsed.data.token)
    found["model"] = asked(model, target and target.model)
    # The audited model makes room for gold.
    model = checkpoint.model = None
    if target is not None:
        found["target"], models["target"] = asked(target.model), target.fingerprints
    gold = other_model(parsed, "gold", kind, device)
    if gold is not None:
        found["gold"], models["gold"] = asked(gold.model, target and target.model), gold.fingerprints
    depth, reason = asked.depth(found["model"], found.get("gold"))
    compared = {
        role: {"model": flags.target_model if role == "target" else flags.gold, "fingerprints": fingerprints}
        | {"metrics": {name: metric.as_dict() for name, metric in asked.metrics(found[role]).items()}}
        for role, fingerprints in models.items()
    }
    return write_attack(
        folder, KIND, parsed, checkpoint, parts, asked.metrics(found["model"], depth, reason),
        {"rows": len(asked.rows), "wall_seconds": round(time.time() - started, 3)},
        by_row(asked.rows, found["model"], found.get("gold"), depth),
        layers=by_layer(found["model"], found.get("target"), found.get("gold"), depth),
        models=compared, white_box=settings_record(asked, flags.lens_path),
    )  # fmt: skip


def asked_of(parsed, audits, checkpoint):
    """Return (Audit, the parts of the forget set) of a command line."""
    from llm_unlearn.attacks.answer_states import Bounds, audited_rows
    from llm_unlearn.attacks.layer_probes import task_of
    from llm_unlearn.attacks.white_box import Audit
    from llm_unlearn.data.streams import pad_id
    from llm_unlearn.evaluation.benchmarks import load_parts

    flags, tokenizer = parsed.flags, checkpoint.tokenizer
    options = flags.tokenize_options(checkpoint.context_length)
    rows, parts = audited_rows(load_parts(parsed.data)[0], tokenizer, options)
    task, reason = task_of(rows, parsed.data, tokenizer, options) if "probe" in audits else (None, None)
    bounds = Bounds(pad_id(tokenizer), flags.max_tokens_per_batch, flags.per_device_eval_batch_size, progress=True)
    return Audit(audits, rows, task, bounds, reason, seed=flags.seed), parts


def other_model(parsed, flag_name, kind, device):
    """Return the Checkpoint that a flag names, or None where it names none.

    Args:
        parsed: ParsedEvaluation.
        flag_name: "target_model" or "gold".
        kind: (vocabulary, `model_shape`) of the audited model.
        device: torch.device.
    Raises:
        UserError: it has another vocabulary or another shape than the audited model.
    """
    from llm_unlearn.attacks.patching import model_shape, require_same_shape

    name = getattr(parsed.flags, flag_name)
    if not name:
        return None
    loaded = load_model_of(parsed, name, device)
    names = f"--{flag_name} '{name}'", f"'{parsed.model.model_name_or_path}'"
    require_same_shape((model_shape(loaded.model), kind[1]), names)
    if loaded.tokenizer.get_vocab() != kind[0]:
        raise UserError(f"{names[0]} has another vocabulary than {names[1]}, so that their layers cannot be compared")
    return loaded


if __name__ == "__main__":
    from llm_unlearn.processes import end_process

    end_process(main())
