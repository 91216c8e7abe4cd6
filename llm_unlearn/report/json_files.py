"""Opens the records of a report, and refuses what is no record, by file and reason."""

import json
import math

from llm_unlearn.errors import UserError

SCHEMA_VERSION = 1


def read_object(path):
    """Return the JSON object in a file.

    Args:
        path: the file.
    Raises:
        UserError: it cannot be read as JSON, or holds something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is malformed: it cannot be read as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} is malformed: it must hold a JSON object")
    return raw


def check_version(path, raw):
    """Refuse a record without a schema version, or of a newer schema.

    Raises:
        UserError: naming the file.
    """
    version = raw.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise UserError(f"{path} is malformed: schema_version is {version!r}, and should be {SCHEMA_VERSION}")
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version {version}, and this program reads up to {SCHEMA_VERSION}; update llm_unlearn"
        )


def require(path, condition, what):
    """Refuse a record unless a condition holds.

    Args:
        path: the file.
        condition: whether it is as it should be.
        what: the rest of the sentence "FILE is malformed: ...".
    Raises:
        UserError: the condition does not hold.
    """
    if not condition:
        raise UserError(f"{path} is malformed: {what}")


def is_finite(value):
    """Return whether a value of a record is a number that a plot can show; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
