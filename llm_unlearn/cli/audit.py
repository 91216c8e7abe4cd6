"""Is it really gone? Evaluation, membership inference and the attacks of a preset on one checkpoint, on one page.

python -m llm_unlearn.cli.audit --model_name_or_path CKPT --target_model T [--gold G] --domain D [--preset quick]
"""

import logging
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from llm_unlearn.arguments import flag
from llm_unlearn.attacks.audit_plan import GOLD, MODEL, PRESETS, TARGET, jobs_of
from llm_unlearn.attacks.parsing import AttackFlags, parse_attack
from llm_unlearn.cli.scoring import default_directory, finish_processes, hub_options, say_notes, start_processes
from llm_unlearn.errors import UserError, run_script, unknown_name
from llm_unlearn.processes import end_process, is_first_process

logger = logging.getLogger("llm_unlearn")

_SPOKEN = {MODEL: "audited", TARGET: "target", GOLD: "gold"}
_BECAME = {"not_applicable": "does not apply", "failed": "FAILED"}


@dataclass
class AuditFlags(AttackFlags):
    """Flags of the audit itself."""

    gold: str | None = flag(
        None, "A model retrained without the forget set: what it knows, learns and leaks is what 'gone' looks like."
    )
    preset: str = flag(
        "quick",
        "quick: minutes on a small model; standard: more samples, tampering on related data, 4 bit; full: thousands of "
        "steps, and downstream tasks.",
        choices=list(PRESETS),
    )
    skip: str | None = flag(None, "Stages to leave out, separated by commas, as downstream,white_box.")
    attack_lr: str | None = flag(
        None, "Learning rates of the attacks that fine-tune, separated by commas, in the place of the preset's."
    )
    references_dir: str | None = flag(
        None, "Folder in which results of the target and the gold model are kept for further audits against them."
    )
    title: str | None = flag(None, "Heading of the page.")


def main(argv=None):
    """Audit one checkpoint.

    Args:
        argv: list of words; None takes the process's own.
    Returns:
        int exit code: 0 done, 1 a stage failed, 2 the user's mistake.
    """
    return run_script(run, argv)


def run(argv):
    """Do what `main` does, errors raised; see there."""
    parsed = parse_attack(argv, AuditFlags, "python -m llm_unlearn.cli.audit")
    if parsed is None:
        return 0
    models, skipped = _check(parsed)
    say_notes(parsed)
    start_processes(parsed.flags)
    from llm_unlearn.attacks.audit import FAILED, Audit
    from llm_unlearn.evaluation.results import check_output_directory, check_writable

    name, domain = models[MODEL], parsed.data.domain
    folder = Path(parsed.flags.output_dir or default_directory(name, "audit", domain))
    references = parsed.flags.references_dir
    jobs = jobs_of(parsed.flags.preset, models, skipped)
    places = {folder: "audit"} | {folder / job.place: job.stage.name for job in jobs if job.who == MODEL}
    for place, kind in places.items():
        check_output_directory(place, name, domain, parsed.flags.overwrite_output_dir, kind)
    if references:
        check_writable(Path(references), "--references_dir")
    if not _check_inputs(parsed, models):
        jobs = [_on_its_own(job) if job.stage.name == "eval" else job for job in jobs]
    record = Audit(parsed, models, folder, references).run(jobs)
    if is_first_process():
        _finish(folder, record, parsed.flags.title)
    finish_processes()
    return int(any(stage["status"] == FAILED for stage in record["stages"]))


def _check(parsed):
    """Return ({who: model}, names of stages to leave out), or refuse before anything is loaded."""
    from llm_unlearn.evaluation.loading import check_name

    flags = parsed.flags
    if not flags.target_model:
        raise UserError("--target_model is missing: the model before it unlearned, which an audit compares with")
    models = {MODEL: parsed.model.model_name_or_path, TARGET: flags.target_model, GOLD: flags.gold}
    models = {who: name.rstrip("/") or "/" for who, name in models.items() if name}
    for name in models.values():
        check_name(name)
    known = dict.fromkeys(stage.name for stages in PRESETS.values() for stage in stages)
    skipped = [name.strip() for name in (flags.skip or "").split(",") if name.strip()]
    for name in skipped:
        if name not in known:
            raise unknown_name("--skip", name, known)
    _check_rates(flags.attack_lr)
    return models, skipped


def _check_rates(given):
    """Refuse learning rates that the attacks would refuse when their turn comes."""
    for word in (given or "1").split(","):
        try:
            is_rate = 0 < float(word) < float("inf")
        except ValueError:
            is_rate = False
        if not is_rate:
            raise UserError(f"--attack_lr takes numbers above 0, separated by commas, but is '{given}'")


def _check_inputs(parsed, models):
    """Refuse data and models that no stage could read; one that is missing would else be said by each stage anew.

    Returns:
        whether the domain has a set on which answers are compared with those of a gold model, example by example.
    """
    from llm_unlearn.cli.evaluate import compared_part
    from llm_unlearn.evaluation.benchmarks import load_parts
    from llm_unlearn.evaluation.loading import load_tokenizer_of

    parts, _ = load_parts(parsed.data)
    for name in models.values():
        load_tokenizer_of(name, parsed.model, hub_options(parsed, name))
    return compared_part(parsed.data.domain, parts) is not None


def _on_its_own(job):
    """Return a job that is told nothing of other models' results, which its script would refuse as of no effect."""
    return replace(job, stage=replace(job.stage, references=()))


def _finish(folder, record, title):
    from llm_unlearn.attacks.audit import AUDIT, DONE, KEPT, PAGE
    from llm_unlearn.evaluation.results import write_text
    from llm_unlearn.report.page import make_audit_page

    write_text(folder / PAGE, make_audit_page(folder, title))
    signs = {"pass": "pass", "fail": "FAIL", "unknown": "?"}
    lines = [
        f"{signs[found['status']]:<5} {found['check']}: {found['sentence']}" for found in record["verdict"]["findings"]
    ]
    # Warnings of an hour ago have scrolled away, and a stage without a result is no check that was passed.
    lines += [
        f"-     {stage['name']} of the {_SPOKEN[stage['model']]} model {_BECAME[stage['status']]}: {stage['reason']}"
        for stage in record["stages"]
        if stage["status"] not in (DONE, KEPT)
    ]
    sys.stdout.write("\n".join([*lines, "", record["verdict"]["headline"], ""]))
    sys.stdout.flush()
    logger.info("the audit is in %s, the page to look at is %s", folder / AUDIT, folder / PAGE)


if __name__ == "__main__":
    end_process(main())
