"""Records from files and hub data sets, one at a time, and a fingerprint that changes with the data."""

import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from llmdoctor.errors import DataError
from llmdoctor.files import present, read_text, require_regular, user_path
from llmdoctor.harmless import first_line
from llmdoctor.schema import shown

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONGEST = 1 << 23  # bytes of a record: Python takes up to thirty times as many for the values that they spell
_UNPACKED, _RATIO = 1 << 28, 500
_UNZIPPED = 1 << 23  # less than _UNPACKED: empty lines of so many bytes already take seconds
_BATCH, _ROWS = 1 << 28, 1024  # bytes and rows of Parquet that are unpacked together, at most
_CARD = 1 << 20  # bytes and values of the card of a data set
_ELSEWHERE = re.compile(r"^[\w+.-]+:|://|::|^[/~\\]|(^|[/\\])\.\.([/\\]|$)")
# zip, bzip2, xz, zstd, lz4, 7z, rar: what they unpack to is not bounded here
_OTHER_PACKED = (b"PK\3\4", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\4\x22M\x18", b"7z\xbc\xaf", b"Rar!")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Unusable(Exception):
    """Why one record cannot be used."""


class Cells(dict[str, Any]):
    """A row of a table of texts: lists and numbers come as texts that spell them."""


def fingerprint(source: str | Path, *, split: str = "train", label: str | None = None) -> str:
    """A sha256 that changes with the data: of a file's bytes, or of a hub data set's name, split and commit."""
    path = local_path(source)
    if path is None:
        digest = _digest_of([str(source), split, _hub_commit(str(source))])
    elif path.is_dir():
        _require_regular_folder(path)
        files = sorted(item for item in path.rglob("*") if item.is_file())
        digest = _digest_of([[str(file.relative_to(path)), fingerprint(file)] for file in files])
    else:
        with _reading(source):
            require_regular(path)
            with path.open("rb") as handle:
                digest = hashlib.file_digest(handle, "sha256")
    if label is not None:
        digest.update(label.encode())
    return digest.hexdigest()


def _digest_of(facts: list[Any]) -> "hashlib._Hash":
    return hashlib.sha256(json.dumps(facts).encode())


def _hub_commit(name: str) -> str | None:
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(name).sha
    except Exception:  # offline, private or renamed: the name has to be enough
        return None


def local_path(source: str | Path) -> Path | None:
    """The file or folder that ``source`` means, or None when it reads as the name of a hub data set."""
    path = user_path(source)
    if present(path):
        return path
    if os.path.islink(path):  # noqa: PTH114 (that of Path raises for a name that is too long)
        raise DataError(f"{source} is a link that leads nowhere: check where it should lead")
    if isinstance(source, Path) or source.startswith((".", "~", "/")) or suffix(path) in (*SUFFIXES, ".txt"):
        raise DataError(f"no data file at {source}: check the path")
    if not _HUB_NAME.fullmatch(source):
        raise DataError(f"no data file at {source}, and it is not the name of a hub data set (owner/name)")
    return None


def suffix(path: Path) -> str:
    """The file's suffix in lower case, that of what is inside for a ``.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def records(source: str | Path, split: str) -> Iterator[tuple[int, object]]:
    """Line (or row) from 1 and content of every record; a line that is not JSON comes as an `Unusable` that says why.

    Of a .csv or .tsv file, whose first line names the columns, it is the line on which the record begins.

    Raises DataError for a source that is absent, damaged, or in no known format.
    """
    path = local_path(source)
    if path is not None and path.is_dir():
        _require_regular_folder(path)
    if path is None or path.is_dir():
        yield from _hub_records(str(path or source), split)
        return
    with _reading(source), _open(path) as stream:
        head = stream.peek(512)
        if suffix(path) == ".parquet" or head.startswith(b"PAR1"):
            yield from _parquet_records(stream)
        elif suffix(path) in _DELIMITERS:
            yield from _table_records(stream, _DELIMITERS[suffix(path)])
        elif suffix(path) != ".jsonl" and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from enumerate(_array_records(stream), start=1)
        else:
            yield from ((number, _parse(line)) for number, line in enumerate(_lines(stream), start=1) if line.strip())


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file that are not blank. Raises DataError where it cannot be read."""
    with _reading(path), _open(path) as lines:
        yield from (text for line in _lines(lines) if (text := line.decode("utf-8-sig").strip()))


def _require_regular_folder(folder: Path) -> None:
    """Raise DataError for a folder that holds a FIFO, a device or a socket: reading it would never end."""
    for item in folder.rglob("*"):
        if not (item.is_file() or item.is_dir()):
            raise DataError(f"{item} is no file: take it out of the folder of data")


def _require_own_files(folder: Path) -> None:
    """Raise DataError where the card of a folder names data elsewhere: on a network, or out of the folder."""
    for card in (folder / name for name in ("README.md", ".huggingface.yaml") if present(folder / name)):
        with _reading(card):
            waiting = [(False, _card_values(card))]
        for _ in range(_CARD):
            if not waiting or len(waiting) > _CARD:
                break
            is_place, value = waiting.pop()
            if isinstance(value, dict):
                waiting += [(is_place or key in ("data_files", "data_dir"), held) for key, held in value.items()]
            elif isinstance(value, list):
                waiting += [(is_place, held) for held in value]
            elif is_place and isinstance(value, str) and _ELSEWHERE.search(value):
                raise DataError(
                    f"{card} names data at {shown(value)}: expected files of its folder. Give that place itself as the "
                    "data, or take it out of the card"
                )
        if waiting:
            raise DataError(f"{card}: more than {_CARD:,} values, with its aliases written out")


def _require_unpackable_files(folder: Path) -> None:
    """Raise DataError for a file that unpacks out of all proportion, or in a way that is not bounded here."""
    for item in sorted(item for item in folder.rglob("*") if item.is_file()):
        with _reading(item), _open(item) as stream:
            head = stream.peek(512)
            if head.startswith(_OTHER_PACKED):
                raise ValueError("in a folder of data only gzip may pack a file: unpack it")
            if isinstance(stream.raw, _Unzipped):
                while stream.read(1 << 20):
                    pass
            elif head.startswith(b"PAR1"):
                require_unpackable(pq.ParquetFile(stream))


def _card_values(card: Path) -> Any:
    """What the YAML of a card says, which is the beginning of a README. Raises OSError, ValueError, RecursionError."""
    text = read_text(card, _CARD)
    if card.suffix == ".md":
        from huggingface_hub.repocard import REGEX_YAML_BLOCK  # by which datasets reads cards, too

        front = REGEX_YAML_BLOCK.search(text)
        text = front[2] if front else ""
    try:
        return yaml.safe_load(text)
    # of odd values of a known tag PyYAML raises whatever its code happens to
    except (yaml.YAMLError, RecursionError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"its YAML is damaged: {first_line(error)}") from error


@contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    """What the many libraries below may raise, as one DataError that names the source."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{source}: the compressed file is damaged ({error}): copy or download it again") from error
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error})") from error
    except pa.ArrowException as error:
        raise DataError(f"{source}: not a Parquet file ({first_line(error)})") from error
    except csv.Error as error:
        raise DataError(f"{source}: not a table with a header row ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise DataError(f"{source}: not JSON (nested too deeply)") from error
    except ValueError as error:
        about = "not JSON" if isinstance(error, json.JSONDecodeError) else "cannot be read"
        raise DataError(f"{source}: {about} ({str(error)[:200]})") from error


def _lines(stream: io.BufferedReader) -> Iterator[bytes]:
    """The lines; what is compressed may hold one of any length, so a longer one than a record ends the reading."""
    while line := stream.readline(_LONGEST + 1):
        _require_short(len(line))
        yield line


def _require_short(length: int) -> None:
    if length > _LONGEST:
        raise ValueError(f"a record of more than {_LONGEST >> 20} MiB: split it, or look at what is in it")


class _Unzipped(io.RawIOBase):
    """The bytes that a gzip file unpacks to; ValueError once they are out of all proportion."""

    def __init__(self, path: Path) -> None:
        self._file = gzip.GzipFile(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        _require_packed(self._file.tell(), self._file.fileobj.tell(), _UNZIPPED)  # type: ignore[union-attr]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path) -> io.BufferedReader:
    """The file's bytes, unpacked if it is gzip, whatever its name says. Raises OSError for what is no file."""
    require_regular(path)
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return io.BufferedReader(_Unzipped(path), 1 << 16) if compressed else path.open("rb")


class _Keys:
    """A hook for JSON objects that remembers the first key that one of them has twice."""

    def __init__(self) -> None:
        self.repeated: str | None = None

    def __call__(self, items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(items)
        if len(names) < len(items) and self.repeated is None:
            counts = Counter(name for name, _ in items)
            self.repeated = next(name for name in counts if counts[name] > 1)
        return names

    def checked(self, value: object) -> object:
        """The value, or why it cannot be used: of two values for a key, one would be lost in silence."""
        return value if self.repeated is None else Unusable(f"the key {self.repeated[:40]!r} comes twice")


def json_value(text: str | bytes) -> object:
    """What a text spells in JSON, an `Unusable` where a key comes twice. Raises ValueError or RecursionError."""
    keys = _Keys()
    return keys.checked(json.loads(text, object_pairs_hook=keys))


def _parse(line: bytes) -> object:
    try:
        return json_value(line.rstrip())
    except json.JSONDecodeError as error:
        return Unusable(f"not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError:
        return Unusable("not JSON: not UTF-8")
    except RecursionError:
        return Unusable("not JSON: nested too deeply")
    except ValueError:
        return Unusable("not JSON: a number of thousands of digits")


def _array_records(stream: io.BufferedReader) -> Iterator[object]:
    """The elements of a JSON array, one at a time; ValueError where it is not one."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig")
    buffer, opening, ended = "", "[", False
    try:
        while True:
            try:
                element, stop = _array_element(buffer, opening)
            except json.JSONDecodeError:
                if ended:
                    raise
                # Double what is held: in blocks of one size, a long element would be parsed from its start for each.
                _require_short(len(buffer))
                more = text.read(max(1 << 16, len(buffer)))
                buffer, ended = buffer + more, not more
                continue
            if stop is None:
                break
            yield element
            buffer, opening = buffer[stop:], ","
        if (buffer.partition("]")[2] + text.read()).strip():
            raise ValueError("Extra data after the array")
    finally:
        text.detach()


def _array_element(buffer: str, opening: str) -> tuple[object, int | None]:
    """The first element and the index after it; (None, None) at the end of the array.

    ``opening`` is the sign that must come first, "[" or ",". Raises JSONDecodeError where ``buffer`` is too short.
    """
    found = re.match(r"\s*(\[\s*\]|[\[\],])\s*", buffer)
    sign = found[1] if found else ""
    if found is None or (sign[0] != opening and (sign, opening) != ("]", ",")):
        raise json.JSONDecodeError(f"Expecting '{opening}' delimiter", buffer, 0)
    if sign[-1] == "]":
        return None, None
    keys = _Keys()
    element, stop = json.JSONDecoder(object_pairs_hook=keys).raw_decode(buffer, found.end())
    following = re.compile(r"\s*[,\]]").match(buffer, stop)
    if following is None:  # the element may go on beyond the buffer, as the number 12 may be the start of 123
        raise json.JSONDecodeError("Expecting ',' delimiter", buffer, stop)
    return keys.checked(element), stop


def _table_records(stream: io.BufferedReader, delimiter: str) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(_LONGEST)  # its default of 128 KiB is less than a long conversation
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")

    def lines() -> Iterator[str]:
        while line := text.readline(_LONGEST + 1):
            _require_short(len(line))
            yield line

    try:
        rows = csv.reader(lines(), delimiter=delimiter, strict=True)
        header = next(rows, [])
        if repeated := [name for name in header if header.count(name) > 1]:
            raise csv.Error(f"two columns are named {repeated[0][:40]!r}")
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                yield line, Unusable(f"{len(row)} cells, but the header has {len(header)}")
            elif row:
                yield line, Cells(zip(header, row, strict=True))
            line = rows.line_num + 1
    finally:
        text.detach()


def _require_packed(size: int, packed: int, least: int) -> None:
    """Raise ValueError for more than ``least`` bytes that grow far more by unpacking than text or numbers do."""
    if size > least and size > _RATIO * packed:
        raise ValueError(f"it unpacks to {_RATIO} times its size and more, over {least >> 20} MiB: no data does")


def _parquet_records(stream: io.BufferedReader) -> Iterator[tuple[int, object]]:
    with tempfile.TemporaryFile() as unpacked:
        compressed = isinstance(stream.raw, _Unzipped)
        if compressed:  # Parquet is read from its end, and gzip cannot seek there
            shutil.copyfileobj(stream, unpacked)
        file = pq.ParquetFile(unpacked if compressed else stream)
        yield from enumerate(chain.from_iterable(map(_parquet_rows, _batches(file))), start=1)


def _batches(file: pq.ParquetFile) -> Iterator[pa.RecordBatch]:
    """Some rows at a time: where values repeat, a file may be far smaller than what a batch of it takes."""
    require_unpackable(file)
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        yield from file.iter_batches(_rows_at_once(_columns(group), group.num_rows), [number])


def require_unpackable(file: pq.ParquetFile) -> None:
    """Raise ValueError for a file that unpacks out of all proportion, as its header tells."""
    for group in (file.metadata.row_group(i) for i in range(file.num_row_groups)):
        columns = _columns(group)
        for column in columns:
            _require_packed(column.total_uncompressed_size, column.total_compressed_size, _UNPACKED)
        # in lists, millions of equal values take a few bytes of the file, and eight each once they are read
        listed = [column for column in columns if column.num_values > group.num_rows]
        packed = sum(column.total_compressed_size for column in listed)
        _require_packed(8 * sum(column.num_values for column in listed), packed, _UNPACKED)


def _columns(group: Any) -> list[Any]:
    return [group.column(i) for i in range(group.num_columns)]


def _parquet_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    _require_short(batch.nbytes // max(1, batch.num_rows))
    rows: list[dict[str, Any]] = batch.to_pylist()
    return rows


def _rows_at_once(columns: list[Any], rows: int) -> int:
    """How many of a group's rows to unpack together.

    They have the group's mean size, or that of its dictionaries: a long value that repeats is there once.
    """
    size: int = sum(column.total_uncompressed_size for column in columns)
    widest: int = sum(_dictionary_size(column) for column in columns)
    return max(1, min(_ROWS, _BATCH // max(1, widest, size // max(1, rows))))


def _dictionary_size(column: Any) -> int:
    """About how many bytes the column's dictionary has, which none of its values exceeds; 0 without one."""
    if not any("DICTIONARY" in encoding for encoding in column.encodings):
        return 0
    start, end = column.dictionary_page_offset, column.data_page_offset
    packed = end - start if start is not None and 0 < start < end else column.total_compressed_size
    return int(packed * column.total_uncompressed_size / max(1, column.total_compressed_size))


def _hub_records(name: str, split: str) -> Iterator[tuple[int, object]]:
    from llmdoctor.model_source import hub_offline

    if Path(name).is_dir():
        _require_own_files(Path(name))
        _require_unpackable_files(Path(name))
    else:
        hub_offline()  # before the libraries below read whether they may ask it
    from datasets import load_dataset
    from huggingface_hub import HfApi

    try:
        if not Path(name).is_dir():
            HfApi().dataset_info(name)  # fails at once where load_dataset would try again for half a minute
        found = load_dataset(name, split=split, streaming=True)
        row = Cells if found.info.builder_name == "csv" else dict
        yield from ((number, row(record)) for number, record in enumerate(found, start=1))
    except Exception as error:  # the hub client raises dozens of types: no network, no such name or split, no access
        advice = "Check its name, the split and the network, or give the path of a file"
        raise DataError(f"cannot read data set {name!r}, split {split!r}: {first_line(error)}. {advice}.") from error
