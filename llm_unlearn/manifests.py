"""Folders that are complete or do not count: manifests, and checkpoints that come and go in one rename."""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Below the output directory, so that it is on the same file system; no name that a search for checkpoints finds.
STAGING = ".saving"
_REPLACED, _REMOVED = "replaced-", "removed-"


def file_sha256(path):
    """Return the sha256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder):
    """List every file of a folder with its size and sha256; written last, it makes the checkpoint exist.

    It gets its name when every file has reached the disk: after a power cut it is worth no more than they are.

    Args:
        folder: checkpoint folder.
    """
    folder = Path(folder)
    partial = folder / (MANIFEST + ".partial")
    partial.unlink(missing_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    listed = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files
    }
    partial.write_text(json.dumps({"files": listed}, indent=1), encoding="utf-8")
    for path in folder.rglob("*"):
        _flush(path)
    os.replace(partial, folder / MANIFEST)
    _flush(folder)


def incompleteness(folder):
    """Return why a checkpoint cannot be trusted, or None where each listed file is there as it was written.

    Args:
        folder: checkpoint folder.
    """
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        facts = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except OSError:
        return f"it has no {MANIFEST}, so that it was never finished"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not as it was written"
    for name, (size, sha256) in facts.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or file_sha256(path) != sha256:
            return f"{name} is not as it was written"
    return None


def listed_files(folder):
    """Return the names of the files that a checkpoint's manifest lists."""
    return list(json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))["files"])


def checkpoints_of(output_dir):
    """Return the checkpoint-N folders below a directory, newest (highest N) first."""
    found = Path(output_dir).glob("checkpoint-*") if Path(output_dir).is_dir() else []
    named = [path for path in found if re.fullmatch(r"checkpoint-\d+", path.name)]
    numbered = [(int(path.name.split("-")[1]), path) for path in named]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_complete(output_dir):
    """Return the newest checkpoint whose manifest holds, or None; each one passed over is named in a warning."""
    for path in checkpoints_of(output_dir):
        reason = incompleteness(path)
        if reason is None:
            return path
        logger.warning("passing over %s: %s", path, reason)
    return None


def publish(staging, folder):
    """Give a complete folder its name, in one rename.

    Where the name is taken, the older folder keeps it until then, and goes afterwards. A kill between the two renames
    leaves both below the staging folder, where `recover` finds them.

    Args:
        staging: complete folder below `<output_dir>/.saving`.
        folder: its place in the output directory.
    """
    staging, folder = Path(staging), Path(folder)
    assert staging.parent == folder.parent / STAGING
    if folder.exists():
        os.replace(folder, staging.with_name(_REPLACED + folder.name))
    os.replace(staging, folder)
    _flush(folder.parent)
    shutil.rmtree(staging.parent, ignore_errors=True)


def recover(output_dir):
    """Finish or undo what a killed save left in the staging folder, which is gone afterwards.

    A checkpoint that was complete gets its name where that is free; one that it was about to replace gets its own back
    otherwise; all else is deleted.

    Args:
        output_dir: directory of the run.
    """
    output_dir = Path(output_dir)
    staging = output_dir / STAGING
    whole = [path for path in checkpoints_of(staging) if incompleteness(path) is None]
    replaced = [path for path in staging.glob(f"{_REPLACED}checkpoint-*")]
    for path in [*whole, *replaced]:
        target = output_dir / path.name.removeprefix(_REPLACED)
        try:
            if not target.exists():
                os.replace(path, target)
        except OSError as error:
            logger.warning("'%s' is a complete checkpoint, but could not be moved to '%s': %s", path, target, error)
            return
    shutil.rmtree(staging, ignore_errors=True)


def remove(folder):
    """Delete a checkpoint: it loses its name first, so that a kill leaves no half of one.

    Args:
        folder: checkpoint folder in the output directory.
    """
    folder = Path(folder)
    grave = folder.parent / STAGING / (_REMOVED + folder.name)
    try:
        grave.parent.mkdir(exist_ok=True)
        os.replace(folder, grave)
    except OSError as error:
        logger.warning("'%s' could not be deleted: %s", folder, error)
    shutil.rmtree(grave.parent, ignore_errors=True)


def _flush(path):
    """Wait until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        # Some network file systems know no fsync of folders; their renames are on the server already.
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
