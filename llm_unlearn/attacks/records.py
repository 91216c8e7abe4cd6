"""What an attack writes: results.json in the schema of run_eval.py, with a payload of its own, and its examples."""

import json
import logging
from pathlib import Path

from llm_unlearn.evaluation.results import PER_EXAMPLE, RESULTS, finite, results_record, write_json, write_text
from llm_unlearn.evaluation.suite import Outcome
from llm_unlearn.processes import is_first_process
from llm_unlearn.records import command_line, package_versions, peak_memory

logger = logging.getLogger(__name__)
SCRIPTS = {
    "tamper": "tamper",
    "relearn": "relearn",
    "downstream": "downstream",
    "ablate": "ablate",
    "quantize": "quantize",
    "sampling": "leak",
    "white_box": "white_box",
}
"""kind of results.json -> module of llm_unlearn.cli that makes it"""


def write_attack(folder, kind, parsed, checkpoint, parts, metrics, counters, examples=None, **payload):
    """Write what an attack found, on the first process only.

    Args:
        folder: output directory, made where it is missing.
        kind: a key of `SCRIPTS`.
        parsed: ParsedEvaluation.
        checkpoint: loading.Checkpoint of the attacked model.
        parts: list of questions.Part that were asked about.
        metrics: {name: scores.Metric}.
        counters: {what: number}, the cost; the peak memory is added.
        examples: list of rows for per_example.jsonl, or None.
        **payload: JSON-serializable values that the report reads, beside the metrics.
    Returns:
        the contents of results.json; what is not finite is null.
    """
    outcome = Outcome(metrics, {}, {**counters, "peak_memory_bytes": peak_memory()})
    script = f"-m llm_unlearn.cli.{SCRIPTS[kind]}"
    record = results_record(
        kind, parsed.data.domain, parsed.model.model_name_or_path, command_line(parsed.words, script),
        package_versions(), checkpoint.fingerprints, parts, outcome, False,
    )  # fmt: skip
    record = finite({**record, **payload})
    if is_first_process():
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if examples is not None:
            rows = (json.dumps(finite(row), ensure_ascii=False) + "\n" for row in examples)
            write_text(folder / PER_EXAMPLE, "".join(rows))
        write_json(folder / RESULTS, record)
    return record
