"""The head of an audit's page: is it gone, and what says so."""

from llm_unlearn.report import formatting
from llm_unlearn.report.provenance import WHO
from llm_unlearn.report.runs import audited_run

WORDS = {"gone": "Gone", "not_gone": "Not gone", "unclear": "Unclear"}
# Shapes differ as the words do, so that neither color nor reading is needed to tell them apart.
SHAPES = {"gone": "pass", "not_gone": "fail", "unclear": "unknown"}
OUTCOMES = {"fail": "failed", "pass": "passed", "unknown": "could not be judged"}
# The one check that the headline does not count: what is left of the rest tells nothing about what was to go.
UTILITY = "utility"
ORDER = ("answers", "membership", "relearning", "tampering", "quantization", "sampling", "depth", UTILITY)


def verdicts(audits, runs):
    """Put together what audits concluded.

    Args:
        audits: Audits.
        runs: Runs.
    Returns:
        {"audits" [{"audit", "run", "name", "word", "headline", "shape", ...}], "checks" [(check, [status])]};
        None where no audit has a verdict.
    """
    shown = []
    for audit in audits:
        if audit.status:
            run = audited_run(runs, audit)
            name = run.name if run else audit.model
            shown.append(
                {
                    "audit": audit,
                    "run": run,
                    "name": name,
                    "word": WORDS[audit.status],
                    "headline": _headline(audit),
                    "shape": SHAPES[audit.status],
                    "counts": _counts(audit),
                    "gaps": _gaps(audit),
                }
            )
    if not shown:
        return None
    order = list(runs)
    shown.sort(key=lambda entry: order.index(entry["run"]) if entry["run"] in order else len(order))
    names = [entry["name"] for entry in shown]
    for entry in shown:
        if names.count(entry["name"]) > 1 and len({audit.domain for audit in audits}) > 1:
            entry["name"] = f"{entry['name']} on {entry['audit'].domain}"
    found = dict.fromkeys(finding.check for entry in shown for finding in entry["audit"].findings)
    checks = sorted(found, key=lambda check: ORDER.index(check) if check in ORDER else len(ORDER))
    by_check = [(check, [_status(entry["audit"], check) for entry in shown]) for check in checks]
    return {"audits": shown, "checks": by_check}


def _headline(audit):
    """Return the headline without the word that stands before it on the page."""
    rest = audit.headline.removeprefix(f"{WORDS[audit.status]}: ")
    return rest[:1].upper() + rest[1:] if rest != audit.headline else rest


def _status(audit, check):
    return next((finding.status for finding in audit.findings if finding.check == check), "")


def _gaps(audit):
    """Name the stages that left no result, so that nobody takes them for passed: relearn of the gold model (failed)."""
    done = ("done", "kept", "")
    return formatting.listed(
        f"{stage.name} of the {WHO.get(stage.model, stage.model)} ({stage.status.replace('_', ' ')})"
        for stage in audit.stages
        if stage.status not in done
    )


def _counts(audit):
    """Say how the checks came out: of 6 checks of forgetting, 2 failed, 3 passed and 1 could not be judged."""
    about = [finding for finding in audit.findings if finding.check != UTILITY]
    statuses = [finding.status for finding in about]
    if not about:
        return ""
    came_out = formatting.listed(
        f"{statuses.count(name)} {word}" for name, word in OUTCOMES.items() if name in statuses
    )
    beside = [f"; {UTILITY} {OUTCOMES[finding.status]}" for finding in audit.findings if finding.check == UTILITY]
    return f"of {len(about)} checks of forgetting, {came_out}{''.join(beside)}"
