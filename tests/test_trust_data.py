"""Data that would be read wrongly, or take the machine with it, is told instead."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmdoctor.errors import DataError
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
    for name, value in {"_LONGEST": 1 << 20, "_UNPACKED": 1 << 20}.items():
        monkeypatch.setattr(f"llmdoctor.token_rewards.sources.{name}", value)
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
