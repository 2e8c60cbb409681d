"""GGUF files: their header, and the copy in transformers' form that is kept so that they load quickly.

transformers converts a GGUF whenever it loads one: for 135 million parameters that takes 20 seconds, for the copy one.
"""

import importlib.util
import os
import shutil
import struct
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import transformers
from filelock import FileLock
from platformdirs import user_cache_path

from llmdoctor.artefacts import CopyFile
from llmdoctor.errors import LLMDoctorError, LLMDoctorWarning, LoadError, StorageError
from llmdoctor.files import atomic_path, file_checksum, read_json, require_regular, user_path, write_json

_MARKER = "copy.json"
_VERSION = 1  # of the copies: raise it when their content changes
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_ALIGNMENT = 32


@dataclass(frozen=True)
class GGUFHeader:
    """What a GGUF says of itself: llama.cpp's name of its type, like Q4_1; the number of parameters and of tokens."""

    file_type: str
    parameters: int
    tokens: int


def read_header(path: Path) -> GGUFHeader:
    """Read the header and check that the file is whole. Raises LoadError, also if the package gguf is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise LoadError(f"cannot read {path}: GGUF files need the package gguf (pip install gguf)")
    try:
        require_regular(path)
        return _read_header(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or error}") from error


@lru_cache(maxsize=8)
def _read_header(path: Path, _changed: int) -> GGUFHeader:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            values, tensors, end = _parse(_Cursor(data))
            size = len(data)
        needed = end
        for shape, kind, offset in tensors:
            block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            needed = max(needed, end + offset + prod(shape) // block * width)
        tokens = int(values.get("tokenizer.ggml.tokens", 0))
        if needed > size:
            raise EOFError(f"its tensors end at byte {needed:,} and the file at {size:,}")
    except (EOFError, struct.error) as error:
        raise LoadError(f"{path} is cut short ({error}): fetch it again") from error
    except (ValueError, KeyError, ArithmeticError, RecursionError) as error:
        reason = "an unknown kind of value" if isinstance(error, KeyError) else error
        raise LoadError(f"cannot read {path}: {reason}") from error
    number: Any = values.get("general.file_type")
    try:
        file_type = LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        file_type = str(number)
    parameters = sum(prod(shape) for shape, _, _ in tensors)
    return GGUFHeader(file_type, parameters, tokens)


class _Cursor:
    """Reads little-endian values one after another. Raises EOFError behind the end."""

    def __init__(self, data: mmap) -> None:
        self.data, self.at = data, 0

    def take(self, code: str) -> Any:
        value = struct.unpack_from(f"<{code}", self.data, self.at)[0]
        self.skip(struct.calcsize(f"<{code}"))
        return value

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise EOFError("the header goes on behind its end")

    def text(self) -> str:
        start = self.at + 8
        self.skip(8 + self.length(self.at))
        return self.data[start : self.at].decode(errors="replace")

    def length(self, at: int) -> int:
        return int(struct.unpack_from("<Q", self.data, at)[0])


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], list[tuple[tuple[int, ...], int, int]], int]:
    """The values, of arrays only the length; shape, type and offset of every tensor; where the tensors begin."""
    if cursor.data[:4] != b"GGUF":
        raise ValueError("not a GGUF file: it does not begin with GGUF")
    cursor.skip(4)
    version, count, keys = cursor.take("I"), cursor.take("Q"), cursor.take("Q")
    if version not in (2, 3):
        raise ValueError(f"expected version 2 or 3 of GGUF, got {version}")
    values: dict[str, Any] = {}
    for _ in range(keys):
        key, kind = cursor.text(), cursor.take("I")
        values[key] = _value(cursor, kind)
    tensors = []
    for _ in range(count):
        cursor.text()
        shape = tuple(cursor.take("Q") for _ in range(cursor.take("I")))
        tensors.append((shape, cursor.take("I"), cursor.take("Q")))
    alignment = int(values.get("general.alignment", _ALIGNMENT))
    return values, tensors, -(-cursor.at // alignment) * alignment


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind == _TEXT:
        return cursor.text()
    if kind != _ARRAY:
        return cursor.take(_NUMBERS[kind])
    inner, length = cursor.take("I"), cursor.take("Q")
    if inner in _NUMBERS:
        cursor.skip(length * struct.calcsize(f"<{_NUMBERS[inner]}"))
    else:
        for _ in range(length):
            _value(cursor, inner)
    return length


def cached_copy(source: Path, fingerprint: str, convert: Callable[[Path], None]) -> Path | None:
    """The folder with the copy of the GGUF ``source``, which ``convert(folder)`` writes if there is none.

    A fingerprint is of a file's two ends; the copy knows all its bytes. They are read only where the file is not the
    one that was converted, or has changed since.

    Copies are in ``$LLMDOCTOR_CACHE``, by default the user's cache folder (XDG_CACHE_HOME). A copy whose files are not
    those that were written, or that another version of transformers made, is made again. Another process that makes
    the same copy is waited for. None, with a warning, if no copy can be written.
    """
    root = user_path(os.environ.get("LLMDOCTOR_CACHE") or user_cache_path("llmdoctor")) / "gguf"
    folder = root / fingerprint[:32]
    if _is_whole(folder, source):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f".{folder.name}.lock")
        with lock:
            if not _is_whole(folder, source):  # else another process has made it meanwhile
                for left in root.glob(f".{folder.name}.*.partial"):  # by a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                with atomic_path(folder) as temporary:
                    made_of = {"stamp": _stamp(source), "checksum": file_checksum(source)}  # as it is before
                    temporary.mkdir()
                    convert(temporary)
                    sums = {file.name: file_checksum(file) for file in temporary.iterdir()}
                    write_json(temporary / _MARKER, {**_marker(temporary), "checksums": sums, "source": made_of})
    # no room, no permission, no locks on this file system
    except (OSError, NotImplementedError, StorageError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        warnings.warn(
            f"no copy of the GGUF can be kept in {root}, so that it loads slowly every time: {reason}. "
            "LLMDOCTOR_CACHE names another folder",
            LLMDoctorWarning,
            stacklevel=2,
        )
        return None
    return folder


def discard_if_damaged(folder: Path) -> bool:
    """Whether the copy's bytes are not those that were written; it is then made again when it is asked for next."""
    try:
        sums = read_json(folder / _MARKER, CopyFile)["checksums"]
        damaged = any(file_checksum(folder / name) != checksum for name, checksum in sums.items())
    except (LLMDoctorError, KeyError):
        damaged = True
    if damaged:
        with suppress(OSError):
            (folder / _MARKER).unlink()
    return damaged


def _is_whole(folder: Path, source: Path) -> bool:
    try:
        marker = read_json(folder / _MARKER, CopyFile)
        if {**marker, **_marker(folder)} != marker:
            return False
        made_of, stamp = marker["source"], _stamp(source)
        if made_of["stamp"] == stamp:
            return True
        if made_of["checksum"] != file_checksum(source):
            return False
        with suppress(OSError, StorageError):  # so that a file that was moved is read once
            write_json(folder / _MARKER, {**marker, "source": {**made_of, "stamp": stamp}})
        return True
    except (LLMDoctorError, OSError, TypeError, KeyError):
        return False


def _stamp(file: Path) -> list[int]:
    """Size and last change."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _marker(folder: Path) -> dict[str, Any]:
    """What made the copy, and every file's size and last change: enough to notice damage without reading weights."""
    files = sorted(file for file in folder.iterdir() if file.name != _MARKER)
    stamps = {file.name: _stamp(file) for file in files}
    return {"version": _VERSION, "transformers": transformers.__version__, "files": stamps}
