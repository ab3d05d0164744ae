"""Upload of an exported student to a repository of the Hugging Face hub."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from kd_lightning.reporting.redaction import print_message, redact_text


def check_repository_name(name: str) -> None:
    """Check the name of a repository.

    Raises:
        ValueError: the hub allows no such name.
    """
    try:
        huggingface_hub.utils.validate_repo_id(name)  # type: ignore[attr-defined]  # public, but not in its list
    except HFValidationError as error:
        raise ValueError(
            f"export.push_to_hub must be the name of a repository such as 'me/student', got {name!r}: {_line(error)}"
        ) from None


def create_repository(name: str) -> None:
    """Create a private repository, unless there is one: so it is known before training whether one may write there.

    Raises:
        ValueError: nobody is logged in, or the hub refuses or does not answer.
    """
    if huggingface_hub.get_token() is None:
        raise ValueError(
            f"export.push_to_hub {name} needs a token that may write: run `hf auth login`, or set the environment "
            "variable HF_TOKEN"
        )
    try:
        huggingface_hub.HfApi().create_repo(name, private=True, exist_ok=True)
    except Exception as error:  # of several HTTP libraries
        raise ValueError(f"export.push_to_hub {name}: {_line(error)}") from None


def upload(folder: Path, name: str) -> None:
    """Upload a folder; if that fails, the folder stays and a message says how to upload it later."""
    try:
        where = huggingface_hub.HfApi().upload_folder(
            repo_id=name, folder_path=folder, commit_message="Student distilled with kd_lightning"
        )
    except Exception as error:  # of several HTTP libraries
        again = f"hf upload {shlex.quote(name)} {shlex.quote(str(folder))}"
        print_message(f"export.push_to_hub {name}: {_line(error)}; upload it later: {again}", sys.stderr)
    else:
        print_message(f"uploaded {folder} to {where.repo_url}", sys.stderr)


def _line(error: Exception) -> str:
    """The message of an error in one line, without secrets."""
    return redact_text(" ".join(str(error).split())) or type(error).__name__
