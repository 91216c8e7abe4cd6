"""Pushing a finished checkpoint to the Hub, after everything is on disk."""

import logging
import shlex
from pathlib import Path

from llm_unlearn.checkpoints import MANIFEST, incompleteness, listed_files
from llm_unlearn.errors import PushError, UserError

logger = logging.getLogger(__name__)


def push_checkpoint(folder, hub_model_id=None, token=None, private=None, revision=None):
    """Upload a finished checkpoint; a failure costs nothing, the folder stays as it is.

    Only the files of the manifest go, never what else lies in the folder.

    Args:
        folder: checkpoint folder with its manifest.
        hub_model_id: repository, `owner/name` or `name`; None takes the folder's name.
        token: access token; None takes the one that you logged in with.
        private: make the repository private where it is new.
        revision: branch to push to; None is main.
    Returns:
        URL of the commit.
    Raises:
        UserError: the folder holds no finished checkpoint.
        PushError: the upload failed; the message holds the command to retry.
    """
    from huggingface_hub import HfApi

    reason = incompleteness(folder)
    if reason is not None:
        raise UserError(f"'{folder}' is not a finished checkpoint: {reason}")
    name = hub_model_id or Path(folder).resolve().name
    api = HfApi(token=token)
    try:
        repository = api.create_repo(name, private=private, exist_ok=True).repo_id
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository, folder_path=folder, revision=revision, allow_patterns=[MANIFEST, *listed_files(folder)],
            commit_message="Upload unlearned model",
        )  # fmt: skip
    except Exception as error:  # whatever the network raises, the checkpoint is safe and the user can retry
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise PushError(
            f"the checkpoint is complete in '{folder}', but the push failed ({reason[:200]}); "
            f"retry with: {_retry_command(folder, name, private, revision)}"
        ) from error
    logger.info("pushed to %s", commit)
    return str(commit)


def _retry_command(folder, name, private, revision):
    words = ["python", "utils/push_checkpoint.py", "--output_dir", str(folder), "--hub_model_id", name]
    words += ["--hub_private_repo"] if private else []
    words += ["--hub_revision", revision] if revision else []
    return shlex.join(words)
