"""Writing and reading files: a file or folder appears complete, by a rename, or not at all."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from filelock import FileLock, Timeout
from platformdirs import user_config_path
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError

from llmdoctor.errors import LoadError, StorageError, UsageError
from llmdoctor.schema import shown

LOCK = ".lock"
os.umask(_umask := os.umask(0o077))  # it can only be read by setting it, which is not for threads
_MODE = 0o666 & ~_umask
_LEFTOVER = re.compile(
    r"\.(meta\.json|unfinished\.json|tokenizer|(rewards|states|probe)-\d+\.\w+|probe\.\w+)"
    r"\.[0-9a-f]{8}\.(partial|retired)"
)


DOCTOR = "doctor.json"
"""The file that marks a doctor folder."""


def require_doctor(folder: str | Path) -> Path:
    """The doctor folder, its ``~`` expanded. Raises LoadError if it holds no doctor."""
    path = user_path(folder)
    if not present(path / DOCTOR):
        raise LoadError(f"there is no doctor at {folder}: expected a folder with {DOCTOR}, as `llmdoctor train` writes")
    return path


def config_folder() -> Path:
    """The folder of the user's own settings: ``tui.toml`` of the app, and ``profiles``."""
    return user_config_path("llmdoctor")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write a file or a folder to; it takes the place of ``path`` on success.

    On any failure the temporary is removed and ``path`` is as it was. A new folder replaces an existing one as a whole;
    see `ensure_replaceable`. Raises StorageError for the system's write errors.
    """
    target = Path(os.path.realpath(path))  # through links: a linked output stays on the disk that the link points to
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _finish(temporary)
        _rename_over(temporary, target)
    except Exception as error:
        # A file inside a folder: name the folder that was asked for, not its temporary.
        cause = error.__cause__ if isinstance(error, StorageError) else error
        reason = _write_error(cause, target)
        if reason is None:
            raise
        raise StorageError(f"cannot write {path}: {reason}") from cause
    finally:
        _remove(temporary)


def _finish(path: Path) -> None:
    # Some file systems report a full disk only here, and a rename may reach the disk before the bytes do.
    for file in (item for item in path.rglob("*") if item.is_file()) if path.is_dir() else (path,):
        if missing := _MODE & ~file.stat().st_mode:  # safetensors makes files that nobody else may read
            with suppress(OSError):  # some file systems have no modes
                file.chmod(file.stat().st_mode | missing)
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _rename_over(temporary: Path, target: Path) -> None:
    if not (temporary.is_dir() and target.is_dir()):
        temporary.replace(target)
        return
    # No system call replaces a folder that holds something: move the old one aside first.
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
    """The reason and what to do when ``error`` is the system's; None when it is something else."""
    # Rust libraries (safetensors, tokenizers) put the error number into the text of their own exceptions.
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
    """Raise UsageError for a folder that is not ours to replace: it holds something, but not the file ``marker``."""
    if folder.is_dir():
        if (folder / marker).is_file() or not any(folder.iterdir()):
            return
        raise UsageError(f"{folder} is not empty and has no {marker}: choose another output folder, or empty this one")
    if folder.exists():
        raise UsageError(f"{folder} is a file: the output must be a folder, choose another name")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock ``folder``, which is made if it does not exist. Raises UsageError immediately if another process has it.

    The lock ends with the process that holds it, however that ends. Half-written files that a killed writer of a
    rewards folder left behind are removed. Folders made here are removed again if they are empty at the end.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    # One object may be released in another thread than it was taken in: a generator holds it.
    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"another extract is writing to {folder}: wait for it to end, or choose another output folder"
        ) from None
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"{folder} is not a folder: choose another output folder") from error
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {_write_error(error, folder)}") from error
    try:
        for item in folder.iterdir():
            if _LEFTOVER.fullmatch(item.name):
                _remove(item)
        yield
    finally:
        # Remove the file while it is still locked. A process that has already opened it then notices that it is gone,
        # and locks a new one.
        _remove(folder / LOCK)
        lock.release()
        with suppress(OSError):
            for path in made:
                path.rmdir()


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, atomically. Raises StorageError."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def user_path(path: str | Path) -> Path:
    """The path with its ``~`` expanded, where it names a home folder; otherwise as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (that of Path raises for ~nobody)


def present(path: Path) -> bool:
    """Whether anything is there; False for what cannot be a path, as with a NUL or a name that is too long."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def require_regular(path: Path) -> None:
    """Raise OSError unless the path is a file with bytes of its own: a FIFO would never end, nor would /dev/zero."""
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a NUL
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise OSError(errno.EINVAL, f"it is {kind}, expected a file", str(path))


def read_text(path: Path, most: int = 1 << 28) -> str:
    """A text file in UTF-8 of at most ``most`` bytes. Raises OSError; ValueError for other bytes or too many."""
    require_regular(path)
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most:,} bytes")
    return data.decode("utf-8-sig")


def read_json(path: Path, schema: type[BaseModel] | None = None) -> Any:
    """What the JSON file holds; with a ``schema``, an object that fits it (the object itself, without its defaults).

    Raises LoadError when it is missing, unreadable, not JSON (which has no NaN) or does not fit.
    """
    try:
        data = json.loads(read_text(path), parse_constant=_no_constant)
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or error}") from error
    except RecursionError as error:
        raise LoadError(f"cannot read {path}: not JSON (nested too deeply)") from error
    except ValueError as error:
        raise LoadError(f"cannot read {path}: not JSON ({error})") from error
    if schema is None:
        return data
    if not isinstance(data, dict):
        raise LoadError(f"{path}: expected a JSON object, got {shown(data)}")
    try:
        schema.model_validate(data)
    except (ValidationError, RecursionError) as error:
        raise LoadError(f"{path}: {_misfit(error)}") from error
    return data


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it has no {name}")


def _misfit(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))[:80]
    if first["type"] == "missing":
        return f"expected a key {key!r}, there is none"
    return f"{key!r} {first['msg'].removeprefix('Input ')}, got {shown(first['input'])}"


def file_checksum(path: Path) -> str:
    """Sha-256 of a file's bytes. Raises LoadError when it cannot be read."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or error}") from error
