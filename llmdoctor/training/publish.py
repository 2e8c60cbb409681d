"""A doctor folder to the Hugging Face hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from llmdoctor.artefacts import DoctorFile
from llmdoctor.errors import LLMDoctorError, LoadError, UsageError
from llmdoctor.files import DOCTOR, read_json, require_doctor, user_path
from llmdoctor.harmless import first_line


def files_of(folder: str | Path) -> dict[str, int]:
    """The files of a doctor folder that are sent, with their sizes in bytes.

    Raises LoadError if it holds no doctor, or a damaged one.
    """
    path = require_doctor(folder)
    read_json(path / DOCTOR, DoctorFile)
    if not (path / "README.md").is_file():
        raise LoadError(f"{folder} has no model card: expected README.md, as `llmdoctor train` writes")
    found = (file for file in sorted(path.rglob("*")) if file.is_file())
    names = {file.relative_to(path).as_posix(): file.stat().st_size for file in found}
    return {name: size for name, size in names.items() if not any(part.startswith(".") for part in name.split("/"))}


def require_name(repository: str) -> None:
    """Raises UsageError for what is no name on the hub."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository):
        raise UsageError(f"expected a name on the hub like org/name, got {repository!r}")


def push_to_hub(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Send a doctor folder to ``org/name`` on the hub, which is made if need be; returns its address.

    Raises LoadError (no doctor there), UsageError (no name for a repository), LLMDoctorError (the hub refuses or
    cannot be reached).
    """
    files = files_of(folder)
    require_name(repository)
    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=user_path(folder),
            allow_patterns=list(files),
            commit_message="Upload a doctor made with llmdoctor",
        )
    except (HfHubHTTPError, OSError) as error:
        raise LLMDoctorError(f"cannot send {folder} to {repository}: {first_line(error)}") from error
    return str(made)
