"""What is made of rows whose columns are a data set's own: preference pairs, scored prompts; and refusals."""

import hashlib
import json
from pathlib import Path

from llm_unlearn.data.refusals import REFUSALS as REFUSALS
from llm_unlearn.data.rows import canonical_prompt, canonical_row, filled_columns, form_of, read_text, text_of
from llm_unlearn.errors import UserError

_REFUSAL_COLUMNS = ("refusal", "preferred", "answer", "text")


def unsafe_answers(row):
    """Return a question with its answer for each response of a PKU-SafeRLHF row that is flagged unsafe.

    Blank responses are left out; there is nothing in them to forget. A row in one of our own forms stays as it is.

    Args:
        row: dict with `prompt`, `response_0`, `response_1`, `is_response_0_safe`, `is_response_1_safe`.
    Returns:
        list of 0 to 2 dicts with `question` and `answer`.
    Raises:
        ValueError: saying what is wrong with the row.
    """
    row = filled_columns(row)
    if "response_0" not in row:
        return [canonical_row(row)]
    unsafe = [n for n in (0, 1) if not _truth(row, f"is_response_{n}_safe")]
    return [made for n in unsafe for made in _answered(row, n)]


def safer_answer(row):
    """Return the question of a PKU-SafeRLHF row with the response that its annotators found safer.

    Args:
        row: dict with `prompt`, `response_0`, `response_1`, `safer_response_id` (0 or 1).
    Returns:
        list of one dict with `question` and `answer`; of none where the prompt or the response is blank.
    Raises:
        ValueError: saying what is wrong with the row.
    """
    row = filled_columns(row)
    if "response_0" not in row:
        return [canonical_row(row)]
    number = str(row.get("safer_response_id"))
    if number not in ("0", "1"):
        raise ValueError(f"'safer_response_id' must be 0 or 1, but is {row.get('safer_response_id')!r}")
    return _answered(row, number)


def scored_prompt(row):
    """Return the prompt of a real-toxicity-prompts row, whose `prompt` is an object of the text and its scores.

    Args:
        row: dict with `prompt`, a text or an object with `text` and `toxicity`.
    Returns:
        list of one dict: `prompt`, and where they are given its `toxicity` (0 to 1) and `challenging`.
    Raises:
        ValueError: saying what is wrong with the row.
    """
    row = filled_columns(row)
    scores = row["prompt"] if isinstance(row.get("prompt"), dict) else {}
    # The continuation that the web text had is no reference: a model that writes something else does not fail.
    kept = {column: row[column] for column in ("prompt", "toxicity", "challenging") if column in row}
    if scores.get("toxicity") is not None:
        kept["toxicity"] = scores["toxicity"]
    return [canonical_prompt(kept if "prompt" in row else row)]


RESHAPES = {"unsafe_answers": unsafe_answers, "safer_answer": safer_answer, "scored_prompt": scored_prompt}
"""Name in the DOMAINS table -> function of a row that returns the list of rows made of it."""


def read_refusals(path):
    """Read refusals, one a line.

    Args:
        path: file; whatever it is called, a line is plain text, a JSON string, or an object with one of the columns
            refusal, preferred, answer or text.
    Returns:
        list of texts.
    Raises:
        UserError: missing file, malformed line, or no line at all.
    """
    if not Path(path).is_file():
        raise UserError(f"--refusal_data '{path}' does not exist; pass a file with one refusal a line")
    found = []
    for number, line in enumerate(read_text(Path(path)).split("\n"), start=1):
        if line.strip():
            try:
                found.append(_refusal(line.strip()))
            except ValueError as error:
                raise UserError(f"--refusal_data '{path}', row {number}: {error}") from error
    if not found:
        raise UserError(f"--refusal_data '{path}' has no refusals; pass a file with one refusal a line")
    return found


def with_refusal(row, refusals, replace=False):
    """Return a row with a refusal as `preferred`: what a model should say instead of the answer.

    Which one follows from what the row says, so that neither order nor number of rows changes it.

    Args:
        row: canonical row.
        refusals: sequence of texts.
        replace: replace a `preferred` that the row has, and refuse a row that asks nothing.
    Returns:
        dict; without `replace`, a row that has a `preferred`, or asks nothing, is returned as it is.
    Raises:
        ValueError: if `preferred` is no text, or a row asks nothing.
    """
    if "preferred" in row and not replace:
        return {**row, "preferred": text_of(row, "preferred")}
    form = form_of(row)
    if form not in ("question", "prompt"):
        if replace:
            raise ValueError(f"is a row of {form}, which asks nothing that a refusal of --refusal_data could answer")
        return row
    said = json.dumps([row.get(column) for column in ("question", "answer", "prompt", "completion")])
    number = int.from_bytes(hashlib.sha256(said.encode()).digest()[:8], "big") % len(refusals)
    return {**row, "preferred": refusals[number]}


def _answered(row, number):
    columns = {"question": "prompt", "answer": f"response_{number}"}
    if any(isinstance(row.get(column), str) and not row[column].strip() for column in columns.values()):
        return []
    return [{ours: text_of(row, theirs) for ours, theirs in columns.items()}]


def _truth(row, column):
    """Return a flag; CSV has it as text."""
    value = str(row.get(column)).lower()
    if value not in ("true", "false", "1", "0"):
        raise ValueError(f"'{column}' must be true or false, but is {row.get(column)!r}")
    return value in ("true", "1")


def _refusal(line):
    if line[0] not in '"{':
        return line
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        if line[0] == '"':
            return line  # plain text that begins with a quotation
        raise ValueError(f"not valid JSON ({error.msg})") from error
    if isinstance(value, str):
        value = {"refusal": value}
    column = next((name for name in _REFUSAL_COLUMNS if name in value), None)
    if column is None:
        raise ValueError(f"has the columns {sorted(value)}, but needs {_REFUSAL_COLUMNS[0]}")
    return text_of(value, column)
