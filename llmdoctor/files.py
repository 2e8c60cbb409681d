"""Writing and reading files: a file or folder appears complete, by a rename, or not at all."""

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TextIO

from filelock import FileLock, Timeout
from platformdirs import user_config_path
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError

from llmdoctor.errors import LoadError, StorageError, UsageError, VersionError
from llmdoctor.harmless import first_line, json_text, require_unicode
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
    see `ensure_replaceable`. A device or FIFO, like /dev/stdout, is not replaced: it gets the bytes on success.
    Raises StorageError for the system's write errors, UsageError for what cannot be written to.
    """
    require_file(path, or_folder=True)
    if is_stream(path):
        with storage_errors(path), tempfile.TemporaryDirectory() as folder:
            temporary = Path(folder) / "written"
            yield temporary
            _pour(temporary, path)
        return
    target = Path(os.path.realpath(path))  # through links: a linked output stays on the disk that the link points to
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with storage_errors(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _finish(temporary)
            _rename_over(temporary, target)
    finally:
        _remove(temporary)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn the system's write errors, also those that libraries disguise, into a StorageError that names ``path``."""
    try:
        yield
    except Exception as error:
        # A file inside a folder: name the folder that was asked for, not its temporary.
        cause = error.__cause__ if isinstance(error, StorageError) else error
        reason = _write_error(cause, Path(os.path.realpath(path)))
        if reason is None:
            raise
        raise StorageError(f"cannot write {path}: {reason}") from cause


def is_stream(path: Path) -> bool:
    """Whether bytes can only be sent there: a character device, a FIFO, or a file that this process has open."""
    mode = _mode(path)
    return _descriptor(path) is not None or stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def _descriptor(path: Path) -> int | None:
    """The number of the open file that a name like /dev/stdout stands for, whatever it was sent to."""
    named = {"/dev/stdout": "1", "/dev/stderr": "2"}.get(str(path))
    number = named or (path.name if str(path.parent) in ("/dev/fd", "/proc/self/fd") else "")
    return int(number) if number.isdecimal() and number.isascii() else None


def require_file(path: Path, *, or_folder: bool = False) -> None:
    """Raise UsageError for a folder, a socket, a disk or a link that leads nowhere: no file can be put there."""
    mode = _mode(path)
    if not mode and path.is_symlink():
        raise UsageError(f"{path} is a link that leads nowhere: give the name of a file")
    refused = {"socket": stat.S_ISSOCK, "disk": stat.S_ISBLK} | ({} if or_folder else {"folder": stat.S_ISDIR})
    for name, is_one in refused.items():
        if is_one(mode):
            raise UsageError(f"{path} is a {name}: give the name of a file")


def require_folder(path: Path) -> None:
    """Raise UsageError for something that is there and is no folder."""
    if _mode(path) and not path.is_dir():
        raise UsageError(f"{path} is not a folder: choose another output folder")


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (OSError, ValueError):  # nothing is there, or the name is none
        return 0


def _pour(source: Path, stream: Path) -> None:
    if source.is_dir():
        raise UsageError(f"{stream} is no folder: choose another output folder")
    with source.open("rb") as whole, open_stream(stream) as out:
        shutil.copyfileobj(whole, out)


def open_stream(path: Path) -> BinaryIO:
    """A device or FIFO, to write to; an open file is written to from where it is."""
    number = _descriptor(path)
    return os.fdopen(os.open(path, os.O_WRONLY) if number is None else os.dup(number), "wb")


def open_to_append(path: Path) -> TextIO:
    """A file of text in UTF-8 with its parent folders, or a device or FIFO, to add to. Raises UsageError, OSError."""
    require_file(path)
    if is_stream(path):
        return io.TextIOWrapper(open_stream(path), encoding="utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("a", encoding="utf-8")


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
    if error is None:
        return None
    # Rust libraries (safetensors, tokenizers) put the error number into the text of their own exceptions.
    number = re.search(r"\(os error (\d+)\)", str(error))
    if isinstance(error, OSError):
        code = error.errno
    elif number:
        code = int(number[1])
    elif any(words in str(error) for words in _TORCH_WRITES):
        return f"writing failed in the middle of a file ({_free_space(target)}). Free some space and run again."
    elif isinstance(error, SafetensorError):
        code = None
    else:
        return None
    reason = os.strerror(code) if code else first_line(error)
    if code == errno.ENOSPC and is_stream(target):
        return f"{reason}. It is no file: give the name of one."
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason} ({_free_space(target)}). Free some space and run again."
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{reason}. Choose a folder that you may write to."
    return f"{reason}. Check the path and run again."


# torch.save gives no error number
_TORCH_WRITES = ("PytorchStreamWriter failed writing", "basic_ios::clear", "unexpected pos", "inline_container.cc")


def _free_space(target: Path) -> str:
    try:
        return f"{shutil.disk_usage(target.parent).free / 1e6:,.0f} MB free"
    except OSError:
        return "disk full"


def ensure_replaceable(folder: Path, marker: str) -> None:
    """Raise UsageError for a folder that is not ours to replace: it holds something, but not the file ``marker``.

    Raises DataError for a name that is not Unicode, which the libraries that write into it do not take.
    """
    require_unicode(str(folder), "the name of the output folder")
    if folder.is_dir():
        if (folder / marker).is_file() or not any(folder.iterdir()):
            return
        raise UsageError(f"{folder} is not empty and has no {marker}: choose another output folder, or empty this one")
    if folder.exists():
        raise UsageError(f"{folder} is a file: the output must be a folder, choose another name")


@contextmanager
def locked(folder: Path, *, beside: bool = False) -> Iterator[None]:
    """Lock an output folder. Raises UsageError immediately if another process has it.

    The lock is a file in the folder, which is made if it does not exist; or ``beside`` it, for a folder that is written
    by `atomic_path`. It ends with the process that holds it, however that ends. What a killed writer left half-written
    there is removed. Folders made here are removed again if they are empty at the end.
    """
    target = Path(os.path.realpath(folder))
    file = target.with_name(f".{target.name}{LOCK}") if beside else folder / LOCK
    made = [path for path in (file.parent, *file.parent.parents) if not path.exists()]
    # One object may be released in another thread than it was taken in: a generator holds it.
    lock = FileLock(file, timeout=0, thread_local=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UsageError(f"another run is writing to {folder}: wait for it to end, or choose another output") from None
    except (FileExistsError, NotADirectoryError) as error:
        where = folder.parent if beside else folder
        raise UsageError(f"{where} is not a folder: choose another output") from error
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {_write_error(error, folder)}") from error
    except NotImplementedError as error:
        raise StorageError(f"cannot lock {folder}: its file system has no locks. Choose another folder") from error
    try:
        if beside:
            _clear_beside(target)
        else:
            _clear_within(folder)
        yield
    finally:
        # Remove the file while it is still locked. A process that has already opened it then notices that it is gone,
        # and locks a new one.
        _remove(file)
        lock.release()
        with suppress(OSError):
            for path in made:
                path.rmdir()


def _clear_within(folder: Path) -> None:
    for item in folder.iterdir():
        if _LEFTOVER.fullmatch(item.name):
            _remove(item)


def _clear_beside(target: Path) -> None:
    """Remove the temporary folders of `atomic_path` that a killed process left; an old folder moved aside comes back.

    Only for a target that is locked: those of a process that is alive look the same.
    """
    pattern = re.compile(re.escape(f".{target.name}.") + r"[0-9a-f]{8}\.(partial|retired)")
    for left in [item for item in target.parent.iterdir() if pattern.fullmatch(item.name)]:
        if left.suffix == ".retired" and not target.exists():
            left.rename(target)
        else:
            _remove(left)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, atomically. Raises StorageError."""
    text = json_text(data, indent=2) + "\n"
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

    Raises LoadError when it is missing, unreadable, not JSON (which has no NaN) or does not fit; VersionError when a
    later version wrote it.
    """
    try:
        data = json.loads(read_text(path), parse_constant=no_constant)
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
    except RecursionError as error:
        raise LoadError(f"{path}: nested too deeply") from error
    except ValidationError as error:
        raise _misfit(path, error) from error
    return data


def no_constant(name: str) -> NoReturn:
    """For `json.loads`: raises ValueError for NaN and infinity, which JSON does not have."""
    raise ValueError(f"it has no {name}")


def _misfit(path: Path, error: ValidationError) -> LoadError:
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))[:80]
    if key == "schema_version" and first["type"] == "less_than_equal":
        expected = f"expected schema_version {first['ctx']['le']} or less, got {shown(first['input'])}"
        return VersionError(f"{path}: it was written by a later llmdoctor, {expected}: update llmdoctor")
    if first["type"] == "missing":
        return LoadError(f"{path}: expected a key {key!r}, there is none")
    return LoadError(f"{path}: {key!r} {first['msg'].removeprefix('Input ')}, got {shown(first['input'])}")


def file_checksum(path: Path) -> str:
    """Sha-256 of a file's bytes. Raises LoadError when it cannot be read."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or error}") from error
