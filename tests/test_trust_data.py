"""Data that would be read wrongly, or take the machine with it, is told instead."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmdoctor.errors import DataError
from llmdoctor.records import SkippedRecord
from llmdoctor.token_rewards import sources
from llmdoctor.token_rewards.pairs import read_pairs, read_questions
from llmdoctor.token_rewards.shapes import shapes, to_pair
from llmdoctor.token_rewards.sources import Unusable

USER = {"role": "user", "content": "Why?"}
GOOD, BAD = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}
CALL = {"type": "function", "function": {"name": "find", "arguments": {}}}
OTHER = {"type": "function", "function": {"name": "lose", "arguments": {}}}
LISTS = {"chosen": [GOOD], "rejected": [BAD]}


def tooled(call):
    return [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "5"}]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "Why?", "documents": ["It rains."]} | LISTS, "'documents'"),
        ({"prompt": "Why?", "audio": "a.wav"} | LISTS, "'audio'"),
        ({"prompt": [USER | {"images": ["a.png"]}]} | LISTS, "'images'"),
        ({"prompt": {"messages": [USER], "system": "Be brief."}} | LISTS, "system prompt"),
        ({"prompt": [USER], "chosen": [GOOD | {"reasoning_content": "Hm."}], "rejected": [BAD]}, "'reasoning_content'"),
        ({"prompt": [USER], "chosen": [GOOD | {"refusal": "I will not."}], "rejected": [BAD]}, "'refusal'"),
        ({"prompt": tooled(CALL), "chosen": [*tooled(OTHER), GOOD], "rejected": [*tooled(OTHER), BAD]}, "differs"),
        ({"prompt": [USER | {"role": ["user"]}]} | LISTS, "unknown role"),
        ({"response_1": "a", "response_2": "b", "preference_strength": 10**400, "prompt": "q"}, "no number"),
        ({"response_1": "a", "response_2": "b", "preference_strength": "-1e999", "prompt": "q"}, "no number"),
    ],
)
def test_what_a_pair_cannot_hold_skips_the_record(record, words):
    with pytest.raises(Unusable, match=words):
        to_pair("1", record, shapes(None, None))


@pytest.mark.parametrize("name", ["system", "system_prompt", "system_message", "system_instruction"])
def test_a_system_prompt_in_a_column_opens_the_conversation(name):
    pair, shape = to_pair("1", {name: "Be brief.", "prompt": [USER]} | LISTS, shapes(None, None))
    assert pair.prompt == ({"role": "system", "content": "Be brief."}, USER)
    assert name in shape.columns


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_a_bomb_is_told_before_it_is_unpacked(suffix, tmp_path, monkeypatch):
    """A few kilobytes that hold a record of any size."""
    for name in ("_LONGEST", "_UNPACKED", "_UNZIPPED"):
        monkeypatch.setattr(f"llmdoctor.token_rewards.sources.{name}", 1 << 20)
    start = b'["' if suffix == ".json" else b"PAR1" if suffix == ".parquet" else b""
    path = tmp_path / f"bomb{suffix}.gz"
    path.write_bytes(gzip.compress(start + b"a" * (4 << 20)))
    for read in (lambda: list(read_pairs(path)), lambda: read_questions(path)):
        with pytest.raises(DataError, match="MiB"):
            read()


def test_a_parquet_bomb_is_told_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr("llmdoctor.token_rewards.sources._UNPACKED", 1 << 20)
    table = pa.table({"prompt": ["q"], "chosen": ["x" * (4 << 20)], "rejected": ["n"]})
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd")
    with pytest.raises(DataError, match="unpacks to"):
        list(read_pairs(tmp_path / "bomb.parquet"))


def test_one_value_that_every_row_repeats_is_told_before_it_is_multiplied(tmp_path, monkeypatch):
    """A dictionary of Parquet holds a value once, and its rows refer to it."""
    monkeypatch.setattr("llmdoctor.token_rewards.sources._LONGEST", 1 << 20)
    monkeypatch.setattr("llmdoctor.token_rewards.sources._BATCH", 1 << 22)
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 32, pa.int32()), pa.array(["x" * (4 << 20)]))
    texts = {name: [name] * 32 for name in ("prompt", "chosen", "rejected")}
    pq.write_table(pa.table(texts | {"more": long}), tmp_path / "bomb.parquet", compression="zstd")
    before = pa.total_allocated_bytes()
    sizes: list[int] = []
    real = sources._parquet_rows
    monkeypatch.setattr(sources, "_parquet_rows", lambda batch: sizes.append(batch.nbytes) or real(batch))
    with pytest.raises(DataError, match="a record of more than 1 MiB"):
        list(read_pairs(tmp_path / "bomb.parquet"))
    (size,) = sizes
    assert size < 2 * (4 << 20)
    assert pa.total_allocated_bytes() - before < 1 << 20


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_compressed_empty_lines_are_not_read_to_their_end(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr("llmdoctor.token_rewards.sources._UNZIPPED", 1 << 18)
    path = tmp_path / f"blank{suffix}.gz"
    path.write_bytes(gzip.compress(b"prompt,chosen,rejected\n" * (suffix == ".csv") + b"\n" * (1 << 20)))
    with pytest.raises(DataError, match="unpacks to 500 times its size"):
        list(read_pairs(path))


def test_a_record_of_millions_of_values_is_too_long(tmp_path):
    """Python takes far more memory for short values than their text has bytes."""
    path = tmp_path / "values.jsonl"
    path.write_bytes(b'{"prompt": "q", "chosen": "a", "rejected": "b", "x": [' + b"[]," * (3 << 20) + b"0]}\n")
    with pytest.raises(DataError, match="a record of more than 8 MiB"):
        list(read_pairs(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_key_that_comes_twice_skips_the_record(suffix, tmp_path):
    good = '{"prompt": "q", "chosen": "a", "rejected": "b"}'
    twice = (
        '{"prompt": "q", "chosen": "a", "rejected": "b", "chosen": "c"}',
        '{"prompt": [{"content": 1, "content": 2}]}',
    )
    texts = (good, *twice, good)
    path = tmp_path / f"twice{suffix}"
    path.write_text("\n".join(texts) if suffix == ".jsonl" else f"[{', '.join(texts)}]")
    skipped: list[SkippedRecord] = []
    assert [pair.id for pair in read_pairs(path, on_skip=skipped.append)] == ["1", "4"]
    assert [(skip.line, skip.reason) for skip in skipped] == [
        (2, "the key 'chosen' comes twice"),
        (3, "the key 'content' comes twice"),
    ]


def test_bytes_that_are_no_text_skip_their_line(tmp_path):
    good = json.dumps({"prompt": "q"} | LISTS).encode()
    lines = [
        good,
        good.replace(b"Why", b"\xff").replace(b"q", b"\xff"),
        good.replace(b'"q"', b'"\\ud800"'),
        b"9" * 9999,
    ]
    (tmp_path / "p.jsonl").write_bytes(b"\n".join([*lines, b'{"a":' * 5000, good]))
    skipped = []
    assert [pair.id for pair in read_pairs(tmp_path / "p.jsonl", on_skip=skipped.append)] == ["1", "6"]
    assert [record.line for record in skipped] == [2, 3, 4, 5]
