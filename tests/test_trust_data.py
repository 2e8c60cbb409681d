"""Data that would be read wrongly, or take the machine with it, is told instead."""

import gzip
import json
import lzma
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmdoctor.errors import DataError, LoadError
from llmdoctor.records import SkippedRecord
from llmdoctor.token_rewards import sources
from llmdoctor.token_rewards.folder import read_shard
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
        ({"prompt": {"messages": [USER], "system": "a", "instructions": "b"}} | LISTS, "do not hold one system prompt"),
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


@pytest.mark.parametrize(
    "name",
    [
        *("system", "system_prompt", "system_message", "system_instruction", "System", "system-prompt", "systemPrompt"),
        *("System Prompt", "SYSTEM_MESSAGE", "sys_prompt", "developer", "persona"),
    ],
)
def test_a_system_prompt_in_a_column_opens_the_conversation(name):
    pair, shape = to_pair("1", {name: "Be brief.", "prompt": [USER]} | LISTS, shapes(None, None))
    assert pair.prompt == ({"role": "system", "content": "Be brief."}, USER)
    assert name in shape.columns


def reason_of(record: dict[str, Any]) -> str:
    with pytest.raises(Unusable) as caught:
        to_pair("1", record, shapes(None, None))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("tool_call", {"name": "find"}), ("toolCalls", [CALL]), ("attachments", ["a.pdf"]), ("image_url", "a.png")),
        *(
            ("reasoning_details", [{"text": "Hm."}]),
            ("thought", "Hm."),
            ("reasoning_content", "Hm."),
            ("tools", [CALL]),
        ),
        *(("type", "image"), ("anything else", "that is said")),
    ],
)
def test_a_message_that_says_more_than_is_read_skips_the_record(name, value):
    for record in (
        {"prompt": [USER | {name: value}]} | LISTS,
        {"prompt": "Why?"} | LISTS | {"chosen": [GOOD | {name: value}]},
    ):
        assert reason_of(record) == f"a message with {name!r}: only its content is read"
    part = {"type": "text", "text": "Why?", name: value}
    if name != "type":
        expected = f"a message with a part with {name!r}: only texts are read"
        assert reason_of({"prompt": [{"role": "user", "content": [part]}]} | LISTS) == expected
    for nothing in (None, "", [], {}, {"name": None}):
        if name != "type":
            to_pair("1", {"prompt": [USER | {name: nothing}]} | LISTS, shapes(None, None))


def test_what_is_kept_about_a_message_and_was_not_part_of_it_passes():
    about = {"id": "a", "createdAt": "2024-01-01", "weight": 0, "train": True, "model": "m", "metadata": {"a": "b"}}
    turn = USER | about | {"from": "human", "value": "Why?", "text": "Why?", "type": "message"}
    assert to_pair("1", {"prompt": [turn]} | LISTS, shapes(None, None))[0].prompt == (USER,)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"value": "Who?"}, "a message whose 'content' and 'value' differ"),
        ({"text": "Who?"}, "a message whose 'content' and 'text' differ"),
        ({"from": "gpt"}, "a message whose 'role' and 'from' differ"),
        ({"tool_calls": [CALL], "function_call": OTHER}, "a message whose 'tool_calls' and 'function_call' differ"),
    ],
)
def test_a_message_that_says_two_things_skips_the_record(more, reason):
    assert reason_of({"prompt": [USER | more]} | LISTS) == reason


@pytest.mark.parametrize("call", [CALL["function"], json.dumps(CALL["function"]), [CALL]])
def test_a_function_call_is_kept_however_it_is_written(call):
    turns = [USER, {"role": "assistant", "content": "", "function_call": call}, {"role": "function", "content": "3"}]
    pair, _ = to_pair("1", {"prompt": turns} | LISTS, shapes(None, None))
    assert pair.prompt[1]["tool_calls"] == [CALL]
    answer = {"role": "assistant", "content": "Yes.", "function_call": call}
    assert reason_of({"prompt": "Why?", "chosen": [answer], "rejected": [BAD]}).startswith("an answer calls a tool")


@pytest.mark.parametrize("name", ["prompt", "input"])
def test_what_stands_beside_the_messages_of_a_prompt_is_read_or_refused(name):
    answers = LISTS if name == "prompt" else {"preferred_output": [GOOD], "non_preferred_output": [BAD]}
    for key in ("system", "system_prompt", "instructions"):
        record = {name: {"messages": [USER], key: "Be brief.", "parallel_tool_calls": True, "tools": []}} | answers
        assert to_pair("1", record, shapes(None, None))[0].prompt == (
            {"role": "system", "content": "Be brief."},
            USER,
        )
    record = {name: {"messages": [USER], "prefill": "Well,"}} | answers
    assert reason_of(record) == "a prompt with 'prefill': only its messages and a system prompt are read"


ARENA = {"prompt": "Why?", "response_a": "Yes.", "response_b": "No.", "winner": "model_a"}
OPENAI = {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}


@pytest.mark.parametrize("record", [{"prompt": "Why?"} | LISTS, ARENA, OPENAI])
@pytest.mark.parametrize("name", ["tools", "document", "passage", "contexts", "Article", "image_path", "imageUrl"])
def test_what_a_prompt_needs_and_a_pair_cannot_hold_skips_the_record_of_any_shape(record, name):
    assert reason_of(record | {name: ["x"]}) == f"{name!r} cannot be kept: only texts are read"


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"prompt": "Why?", "instruction": "Be brief."} | LISTS, "instruction"),
        ({"prompt": "Why?", "question": "Who?"} | LISTS, "question"),
        ({"prompt": "Why?", "messages": [{"role": "system", "content": "Be brief."}, USER, GOOD]} | LISTS, "messages"),
        ({"prompt": "Why?", "input": {"messages": [BAD, USER]}} | LISTS, "input"),
        (ARENA | {"context": "It rains."}, "context"),
        (OPENAI | {"prompt": "Be brief."}, "prompt"),
    ],
)
def test_another_prompt_is_refused_unless_it_says_the_same(record, name):
    first = "input" if "preferred_output" in record else "prompt"
    assert reason_of(record).startswith(f"{first!r} and {name!r} may both be the prompt (found ")
    for same in ("Why?", [USER], [USER, GOOD], [USER, BAD], {"messages": [USER]}):
        pair, _ = to_pair("1", record | {name: same}, shapes(None, None))
        assert pair.prompt == (USER,)


@pytest.mark.parametrize("more", [{"context": "It rains."}, {"tools": [CALL]}])
def test_rows_that_need_something_else_too_are_not_one_pair(more, tmp_path):
    row = {"prompt": "Why?", "response": "Yes.", "helpfulness": 3}
    rows = [row, row | {"response": "No.", "helpfulness": 1} | more]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match="no usable record in its first 2"):
        list(read_pairs(tmp_path / "rows.jsonl"))


def test_the_note_of_what_was_read_says_once_what_was_not(tmp_path):
    record = {"id": 7, "prompt": "Why?", "score_chosen": 2, "score_rejected": 1, "empty": "", "topic": "x"} | LISTS
    (tmp_path / "p.jsonl").write_text(f"{json.dumps(record)}\n" * 2)
    notes: list[str] = []
    assert len(list(read_pairs(tmp_path / "p.jsonl", on_shape=lambda shape: notes.append(str(shape))))) == 2
    read = "pairs read as chosen and rejected (prompt, chosen, rejected): equal scores are ties"
    assert notes == [f"{read}; not used: id, topic"]


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


@pytest.mark.parametrize("kind", [pa.int64(), pa.bool_(), pa.string()])
def test_lists_of_equal_values_are_told_by_the_header(kind, tmp_path, monkeypatch):
    """Millions of them take a few bytes of the file, by its own account too; it was once a way to take all memory."""
    monkeypatch.setattr("llmdoctor.token_rewards.sources._UNPACKED", 1 << 20)
    many = pa.ListArray.from_arrays(pa.array([0, 1 << 20, 1 << 20], pa.int32()), pa.nulls(1 << 20, kind))
    texts = {name: [name] * 2 for name in ("prompt", "chosen", "rejected")}
    pq.write_table(pa.table(texts | {"x": many}), tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 1 << 14
    for read in (lambda path: list(read_pairs(path)), lambda path: list(read_shard(path, []))):
        with pytest.raises((DataError, LoadError), match="unpacks to"):
            read(tmp_path / "bomb.parquet")
    same = pa.table({name: [name] * (1 << 18) for name in ("prompt", "chosen", "rejected")})
    pq.write_table(same, tmp_path / "same.parquet", compression="zstd")  # one value a row is no bomb
    assert next(iter(read_pairs(tmp_path / "same.parquet"))).chosen == "chosen"


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


@pytest.mark.parametrize(
    "place",
    [
        *("https://example.org/x.jsonl", "hf://datasets/org/name/x.jsonl", "zip://a.jsonl::https://example.org/x.zip"),
        *("../outside.jsonl", "a/../../outside.jsonl", "/etc/hosts", "~/x.jsonl", "file:/etc/hosts"),
    ],
)
@pytest.mark.parametrize("form", ["data_files: {0}", "data_files: [{{split: train, path: [{0}]}}]", "data_dir: {0}"])
def test_a_folder_of_data_names_nothing_outside_of_it(place, form, tmp_path, monkeypatch):
    """Its README once made the program ask a network, or read any file of the machine."""
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("it was asked for"))
    (tmp_path / "outside.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    entry = "configs:\n- config_name: default\n  " + form.format(json.dumps(place)) + "\n"
    cards = [("README.md", f"---\n{entry}---{end}\n") for end in ("", " ", "\t")]  # blanks end it as well
    for name, text in (*cards, (".huggingface.yaml", entry)):
        (folder / name).write_text(text)
        with pytest.raises(DataError, match="expected files of its folder"):
            list(read_pairs(folder))
        (folder / name).unlink()


@pytest.mark.parametrize(
    "card", ["[" * 5000, "a: !!timestamp x", "a: [", "\0", "&a [" + "*a," * 9 + "]", "#" * (1 << 21)]
)
def test_a_damaged_card_of_a_folder_is_one_line(card, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\n")
    with pytest.raises(DataError) as refused:
        list(read_pairs(tmp_path))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_a_folder_of_data_asks_no_network(tmp_path, monkeypatch):
    """Not even whether the hub could be asked."""
    monkeypatch.setattr("llmdoctor.model_source.hub_offline", lambda: pytest.fail("the hub was asked"))
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a*\n---\n# Of mine\n")
    assert [pair.chosen for pair in read_pairs(tmp_path)] == ["a"]


@pytest.mark.parametrize("kind", ["gzip", "xz"])
def test_what_unpacks_out_of_all_proportion_in_a_folder_is_refused(kind, tmp_path):
    pair = b'{"prompt": "q", "chosen": "a", "rejected": "b"}\n'
    bomb = pair + b"\n" * (1 << 24)
    packed = {"gzip": gzip.compress, "xz": lzma.compress}[kind](bomb)
    (tmp_path / f"a.jsonl.{'gz' if kind == 'gzip' else 'xz'}").write_bytes(packed)
    with pytest.raises(DataError, match=r"unpacks to 500 times its size|only gzip may pack a file"):
        list(read_pairs(tmp_path))


def test_a_link_that_leads_nowhere_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("llmdoctor.model_source.hub_offline", lambda: pytest.fail("the hub was asked"))
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    for read in (read_pairs, sources.fingerprint):
        with pytest.raises(DataError, match="one is a link that leads nowhere"):
            list(read("one"))
