"""Preference pairs and prompts from files and hub data sets, whatever common shape they come in.

Shapes are recognised by their columns:

- prompt, chosen, rejected: texts, or message lists;
- chosen, rejected with the prompt inside: HH-RLHF transcripts, or message lists that share all but the last message;
- prompt, response_0, response_1 and a label column that holds the number of the better response (PKU-SafeRLHF).
"""

import gzip
import hashlib
import io
import json
import random
import re
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from llmdoctor.errors import DataError
from llmdoctor.records import Message, PreferencePair, Role, SkippedRecord

DEFAULT_LABEL = "better_response_id"
_NEEDED = f"prompt + chosen + rejected, chosen + rejected, or prompt + response_0 + response_1 + {DEFAULT_LABEL}"
_SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, tokenizers cannot read it
_GIVE_UP_AFTER = 1000  # unusable records at the start: a wrong data set should not be read to its end


class _Unusable(Exception):
    """Why one record cannot be used."""


def read_pairs(
    source: str | Path,
    *,
    split: str = "train",
    label: str | None = None,
    limit: int | None = None,
    strict: bool = False,
    on_skip: Callable[[SkippedRecord], None] | None = None,
) -> Iterator[PreferencePair]:
    """Stream the preference pairs of a file (``.jsonl``, ``.json``, ``.parquet``, plain or ``.gz``) or a hub data set.

    ``label`` names the column that holds 0 or 1, the better of response_0 and response_1 (other shapes ignore it);
    ``limit`` counts usable pairs. A record that cannot be used goes to ``on_skip``, or ends the reading when
    ``strict``. A pair's id is its line number.
    """
    skipped: list[SkippedRecord] = []
    usable = 0
    for line, record in _records(source, split):
        if usable == limit:
            return
        try:
            pair = _to_pair(str(line), record, label)
        except _Unusable as reason:
            skip = SkippedRecord(line, str(reason))
            if strict:
                advice = "Mend or remove the record, or run without --strict"
                raise DataError(f"{source}, line {line}: {reason}. {advice}.") from None
            if usable == 0:  # held back: when nothing is usable, one error says so
                skipped.append(skip)
                if len(skipped) == _GIVE_UP_AFTER:
                    break
            elif on_skip:
                on_skip(skip)
            continue
        if usable == 0 and on_skip:
            for skip in skipped:
                on_skip(skip)
        usable += 1
        yield pair
    if usable == 0:
        raise _nothing_usable(source, skipped)


def shuffled(pairs: Iterable[PreferencePair], seed: int) -> Iterator[PreferencePair]:
    """All of ``pairs`` in an order that ``seed`` decides, each order as likely as any other.

    They are read to their end first and wait in a temporary file; memory holds a few bytes a pair.
    """
    with tempfile.TemporaryFile() as waiting:
        starts = array("Q")
        for pair in pairs:
            starts.append(waiting.tell())
            waiting.write(json.dumps([pair.id, pair.prompt, pair.chosen, pair.rejected]).encode() + b"\n")
        random.Random(seed).shuffle(starts)
        for start in starts:
            waiting.seek(start)
            id, prompt, chosen, rejected = json.loads(waiting.readline())
            yield PreferencePair(id, tuple(prompt), chosen, rejected)


def _nothing_usable(source: str | Path, skipped: list[SkippedRecord]) -> DataError:
    if not skipped:
        return DataError(f"{source} is empty: expected preference pairs ({_NEEDED})")
    reasons = {skip.reason: skip.line for skip in reversed(skipped)}
    first = sorted((line, reason) for reason, line in reasons.items())[:3]
    quoted = "; ".join(f"line {line}: {reason}" for line, reason in first)
    return DataError(f"{source}: none of its first {len(skipped)} records is usable ({quoted}). Expected {_NEEDED}.")


def fingerprint(source: str | Path, *, split: str = "train", label: str | None = None) -> str:
    """A sha256 that changes with the data: of a file's bytes, or of a hub data set's name, split and commit."""
    path = _local_path(source)
    if path is None:
        digest = _digest_of([str(source), split, _hub_commit(str(source))])
    elif path.is_dir():
        files = sorted(item for item in path.rglob("*") if item.is_file())
        digest = _digest_of([[str(file.relative_to(path)), fingerprint(file)] for file in files])
    else:
        with _reading(source), path.open("rb") as handle:
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
    except Exception:  # offline, private, renamed: the name has to do
        return None


def read_prompts(path: str | Path) -> list[str | list[Message]]:
    """Prompts from a text file, one a line, or from JSON: texts, {"prompt": text or messages}, {"turns": [text, ...]}.

    Of several turns (MT-Bench) the first is taken.
    """
    file = _local_path(path)
    if file is None or file.is_dir():
        raise DataError(f"no file at {path}: expected prompts, one a line, or a .jsonl file")
    prompts: list[str | list[Message]] = []
    if _suffix(file) in _SUFFIXES:
        for line, record in _records(file, split="train"):
            try:
                prompts.append(_to_prompt(record))
            except _Unusable as reason:
                raise DataError(f"{path}, line {line}: {reason}") from None
    else:
        with _reading(path), _open(file) as lines:
            prompts += [text for line in lines if (text := line.decode("utf-8-sig").strip())]
    if not prompts:
        raise DataError(f"{path} is empty: expected at least one prompt")
    return prompts


# --- where records come from -----------------------------------------------------------------------------------------


def _local_path(source: str | Path) -> Path | None:
    """The file or folder that ``source`` means, or None when it reads as the name of a hub data set."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, Path) or source.startswith((".", "~", "/")) or _suffix(path) in (*_SUFFIXES, ".txt"):
        raise DataError(f"no data file at {source}: check the path")
    if not _HUB_NAME.fullmatch(source):
        raise DataError(f"no data file at {source}, and it is not the name of a hub data set (owner/name)")
    return None


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _records(source: str | Path, split: str) -> Iterator[tuple[int, object]]:
    """Number (from 1) and content of every record; a line that is not JSON comes as its `_Unusable` reason."""
    path = _local_path(source)
    if path is None or path.is_dir():
        yield from _hub_records(str(path or source), split)
        return
    with _reading(source), _open(path) as stream:
        head = stream.peek(512)
        if _suffix(path) == ".parquet" or head.startswith(b"PAR1"):
            yield from _parquet_records(stream)
        elif _suffix(path) != ".jsonl" and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from enumerate(_array_records(stream), start=1)
        else:
            yield from ((number, _parse(line)) for number, line in enumerate(stream, start=1) if line.strip())


@contextmanager
def _reading(source: str | Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{source}: the compressed file is damaged ({error}): copy or download it again") from error
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or error})") from error
    except pa.ArrowException as error:
        raise DataError(f"{source}: not a Parquet file ({str(error).splitlines()[0]})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not JSON ({error})") from error


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else path.open("rb")


def _parse(line: bytes) -> object:
    try:
        return json.loads(line.rstrip())
    except json.JSONDecodeError as error:
        return _Unusable(f"not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError:
        return _Unusable("not JSON: not UTF-8")
    except RecursionError:
        return _Unusable("not JSON: nested too deeply")


def _array_records(stream: gzip.GzipFile | io.BufferedReader) -> Iterator[object]:
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
                # as much again each time, so that a long element is not parsed anew for every block of it
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
    """The first element and where what follows it begins, None at the array's end."""
    found = re.match(r"\s*(\[\s*\]|[\[\],])\s*", buffer)
    sign = found[1] if found else ""
    if found is None or (sign[0] != opening and (sign, opening) != ("]", ",")):
        raise json.JSONDecodeError(f"Expecting '{opening}' delimiter", buffer, 0)
    if sign[-1] == "]":
        return None, None
    element, stop = json.JSONDecoder().raw_decode(buffer, found.end())
    following = re.compile(r"\s*[,\]]").match(buffer, stop)
    if following is None:  # at the end of what was read, a number may go on
        raise json.JSONDecodeError("Expecting ',' delimiter", buffer, stop)
    return element, stop


def _parquet_records(stream: gzip.GzipFile | io.BufferedReader) -> Iterator[tuple[int, object]]:
    with tempfile.TemporaryFile() as unpacked:
        compressed = isinstance(stream, gzip.GzipFile)
        if compressed:  # Parquet is read from its end, and gzip cannot jump there
            shutil.copyfileobj(stream, unpacked)
        batches = pq.ParquetFile(unpacked if compressed else stream).iter_batches(256)
        yield from enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), start=1)


def _hub_records(name: str, split: str) -> Iterator[tuple[int, object]]:
    from datasets import load_dataset
    from huggingface_hub import HfApi

    try:
        if not Path(name).is_dir():
            HfApi().dataset_info(name)  # says at once what load_dataset says after half a minute of retries
        yield from enumerate(load_dataset(name, split=split, streaming=True), start=1)
    except Exception as error:  # the hub client has dozens: no network, no such name, no such split, no permission
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        advice = "Check its name, the split and the network, or give the path of a file"
        raise DataError(f"cannot read data set {name!r}, split {split!r}: {reason}. {advice}.") from error


# --- what one record says --------------------------------------------------------------------------------------------


def _to_pair(id: str, record: object, label: str | None) -> PreferencePair:
    columns = _columns(record)
    chosen, rejected = _answers(columns, label)
    prompt = columns.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt_chosen, chosen_text = _split_text(prompt, chosen)
        prompt_rejected, rejected_text = _split_text(prompt, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        prompt_chosen, chosen_text = _split_messages(prompt, chosen)
        prompt_rejected, rejected_text = _split_messages(prompt, rejected)
    else:
        raise _Unusable("answers are neither two texts nor two message lists")
    if prompt_chosen != prompt_rejected:
        raise _Unusable("prompts differ")
    if not chosen_text.strip() or not rejected_text.strip():
        raise _Unusable("empty answer")
    if chosen_text == rejected_text:
        raise _Unusable("both answers are the same")
    if any(_LONE_SURROGATE.search(text) for text in (chosen_text, rejected_text, *_contents(prompt_chosen))):
        raise _Unusable("not Unicode: half of a surrogate pair")
    return PreferencePair(id, tuple(_ends_with_user(prompt_chosen)), chosen_text, rejected_text)


def _contents(messages: list[Message]) -> Iterator[str]:
    return (message["content"] for message in messages)


def _columns(record: object) -> dict[str, Any]:
    if isinstance(record, _Unusable):
        raise record
    if not isinstance(record, dict):
        raise _Unusable("not a JSON object")
    return {key: value for key, value in record.items() if value is not None}


def _answers(columns: dict[str, Any], label: str | None) -> tuple[object, object]:
    label = label or DEFAULT_LABEL
    if {"prompt", "response_0", "response_1", label} <= columns.keys():
        better = columns[label]
        if better not in (0, 1):
            raise _Unusable(f"{label} is neither 0 nor 1")
        return columns[f"response_{int(better)}"], columns[f"response_{1 - int(better)}"]
    if {"chosen", "rejected"} <= columns.keys():
        return columns["chosen"], columns["rejected"]
    needed = ("prompt", "response_0", "response_1", label) if "response_0" in columns else ("chosen", "rejected")
    missing = next(column for column in needed if column not in columns)
    raise _Unusable(f"missing column {missing!r} (found {', '.join(map(str, columns)) or 'none'})")


def _split_text(prompt: object, answer: str) -> tuple[list[Message], str]:
    """Prompt and answer, of a prompt beside the answer or of an HH-RLHF transcript that holds both."""
    if prompt is None or _is_transcript(answer):
        return _split_messages(None, _transcript(answer))
    if isinstance(prompt, str) and not _is_transcript(prompt):
        return [{"role": "user", "content": prompt}], answer
    # the answer goes on where a transcript or a message list stopped
    messages = _prompt_messages(prompt)
    return messages, answer.removeprefix(" ").rstrip() if isinstance(prompt, str) else answer


def _split_messages(prompt: object, answer: list[Any]) -> tuple[list[Message], str]:
    """Prompt and answer, of a prompt beside the answer's messages or of a conversation that holds both."""
    messages = _messages(answer)
    if prompt is not None and [message["role"] for message in messages] == ["assistant"]:
        messages = [*_prompt_messages(prompt), *messages]
    if len(messages) == 1:
        raise _Unusable("missing column 'prompt', and no prompt inside the answers")
    if messages[-1]["role"] != "assistant":
        raise _Unusable("the conversation does not end with an answer")
    return messages[:-1], messages[-1]["content"]


def _is_transcript(text: str) -> bool:
    return text.lstrip("\n").startswith("Human:") and "\n\nAssistant:" in text


def _transcript(text: str) -> list[Message]:
    if not _is_transcript(text):
        raise _Unusable("missing column 'prompt', and no prompt inside the answers")
    _, *pieces = _TRANSCRIPT_TURN.split("\n\n" + text.lstrip("\n"))
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": _TRANSCRIPT_ROLES[who], "content": said.removeprefix(" ").rstrip()} for who, said in turns]


def _prompt_messages(prompt: object) -> list[Message]:
    if isinstance(prompt, str):
        if not _is_transcript(prompt):
            return [{"role": "user", "content": prompt}]
        messages = _transcript(prompt)
        return messages if messages[-1]["content"] or messages[-1]["role"] == "user" else messages[:-1]
    return _messages(prompt)


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise _Unusable("neither a text nor a list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise _Unusable("a message without role and content")
        if message.get("role") not in get_args(Role):
            raise _Unusable(f"unknown role {message.get('role')!r}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _ends_with_user(messages: list[Message]) -> list[Message]:
    if messages[-1]["role"] != "user":
        raise _Unusable("the prompt does not end with a user turn")
    if not messages[-1]["content"].strip():
        raise _Unusable("empty prompt")
    return messages


def _to_prompt(record: object) -> str | list[Message]:
    if isinstance(record, _Unusable):
        raise record
    prompt = record
    if isinstance(record, dict):
        turns = record.get("turns")
        prompt = record.get("prompt", turns[0] if isinstance(turns, list) and turns else None)
        if prompt is None:
            raise _Unusable(f"expected a text, 'prompt' or 'turns', found {', '.join(map(str, record)) or 'nothing'}")
    messages = _ends_with_user(_prompt_messages(prompt))
    return prompt if isinstance(prompt, str) else messages
