"""Writing and reading files: whatever is written appears complete, by a rename, or not at all."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from llmdoctor.errors import LoadError, StorageError, UsageError

LOCK = ".lock"
_LEFTOVER = re.compile(r"\.(meta\.json|unfinished\.json|tokenizer|rewards-\d+\.\w+)\.[0-9a-f]{8}\.(partial|retired)")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write a file or a folder to; it takes the place of ``path`` on success.

    On any failure the temporary is removed and what stood at ``path`` is as it was. A new folder replaces an existing
    one as a whole; see `ensure_replaceable`. The system's write errors come out as `StorageError`.
    """
    target = Path(os.path.realpath(path))  # through links, so that a linked output stays on the disk it was sent to
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush_to_disk(temporary)
        _rename_over(temporary, target)
    except Exception as error:
        # a file inside a folder: name the folder that was asked for, not its temporary
        cause = error.__cause__ if isinstance(error, StorageError) else error
        reason = _write_error(cause, target)
        if reason is None:
            raise
        raise StorageError(f"cannot write {path}: {reason}") from cause
    finally:
        _remove(temporary)


def _flush_to_disk(path: Path) -> None:
    # Some file systems report a full disk only here, and a rename may reach the disk before the bytes do.
    for file in (item for item in path.rglob("*") if item.is_file()) if path.is_dir() else (path,):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _rename_over(temporary: Path, target: Path) -> None:
    if not (temporary.is_dir() and target.is_dir()):
        temporary.replace(target)
        return
    retired = temporary.with_suffix(".retired")
    target.rename(retired)
    try:
        temporary.rename(target)
    except BaseException:
        retired.rename(target)
        raise
    _remove(retired)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _write_error(error: BaseException | None, target: Path) -> str | None:
    """The reason and the remedy when ``error`` is the system's; None when it is something else."""
    # Rust libraries (safetensors, tokenizers) put the error number into the text of an exception of their own.
    number = re.search(r"\(os error (\d+)\)", str(error))
    if isinstance(error, OSError):
        code = error.errno
    elif number:
        code = int(number[1])
    elif isinstance(error, SafetensorError):
        code = None
    else:
        return None
    reason = os.strerror(code) if code else (str(error) or type(error).__name__).splitlines()[0]
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason} ({_free_space(target)}). Free some space and run again."
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{reason}. Choose a folder that you may write to."
    return f"{reason}. Check the path and run again."


def _free_space(target: Path) -> str:
    try:
        return f"{shutil.disk_usage(target.parent).free / 1e6:,.0f} MB free"
    except OSError:
        return "disk full"


def ensure_replaceable(folder: Path, marker: str) -> None:
    """Refuse to write over a folder that is not one of ours: it must be absent, empty, or hold the file ``marker``."""
    if folder.is_dir():
        if (folder / marker).is_file() or not any(folder.iterdir()):
            return
        raise UsageError(f"{folder} is not empty and has no {marker}: choose another output folder, or empty this one")
    if folder.exists():
        raise UsageError(f"{folder} is a file: the output must be a folder, choose another name")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder``, made if need be, against every other process that asks for it; UsageError when one holds it.

    The lock ends with the process that holds it, however it ends. What a killed writer of a rewards folder left half
    written is removed; a folder that was made here and is empty at the end goes.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _take_lock(folder)
    except OSError as error:
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise UsageError(f"{folder} is not a folder: choose another output folder") from error
        raise StorageError(f"cannot write {folder}: {_write_error(error, folder)}") from error
    try:
        for item in folder.iterdir():
            if _LEFTOVER.fullmatch(item.name):
                _remove(item)
        yield
    finally:
        _remove(folder / LOCK)
        os.close(handle)
        with suppress(OSError):
            for path in made:
                path.rmdir()


def _take_lock(folder: Path) -> int:
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if sys.platform != "win32":
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = path.stat()
        except BlockingIOError:
            os.close(handle)
            raise UsageError(
                f"another extract is writing to {folder}: wait for it to end, or choose another output folder"
            ) from None
        except FileNotFoundError:
            held = None
        if held is not None and held.st_ino == os.fstat(handle).st_ino:
            return handle
        os.close(handle)  # its last holder has just removed it: this lock would guard nothing


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, atomically."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """What the JSON file holds; `LoadError` when it is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise LoadError(f"cannot read {path}: not JSON ({error})") from error


def file_checksum(path: Path) -> str:
    """Sha-256 of a file's bytes; LoadError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or error}") from error
