import gzip
import hashlib
import io
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from llmdoctor.errors import DataError
from llmdoctor.records import PreferencePair, SkippedRecord
from llmdoctor.token_rewards.pairs import read_pairs, read_prompts, read_questions, shuffled
from llmdoctor.token_rewards.sources import _array_records, fingerprint

REAL = Path(__file__).parents[2] / "shared" / "data"
HH = REAL / "hh-rlhf" / "harmless-base_test.jsonl.gz"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real inputs are not at {REAL}")

USER = {"role": "user", "content": "Why?"}
TRANSCRIPT = "\n\nHuman: Hi.\n\nAssistant: Hello. \n\nHuman: Why?\n\nAssistant:"
GOOD = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    def write(*lines: Any, name: str = "pairs.jsonl") -> Path:
        path = tmp_path / name
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("".join(f"{text}\n" for text in texts))
        return path

    return write


def read(source: str | Path, **options: Any) -> tuple[list[PreferencePair], list[SkippedRecord]]:
    skipped: list[SkippedRecord] = []
    return list(read_pairs(source, on_skip=skipped.append, **options)), skipped


def complaint(source: str | Path, **options: Any) -> str:
    skipped: list[SkippedRecord] = []
    with pytest.raises(DataError) as caught:
        list(read_pairs(source, on_skip=skipped.append, **options))
    assert "\n" not in str(caught.value)
    assert skipped == [], "the error alone says what is wrong"
    return str(caught.value)


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        GOOD,
        GOOD | {"prompt": [USER]},
        {"prompt": [USER], "chosen": [said("Because.")], "rejected": [said("No.")]},
        {"prompt": "Why?", "chosen": [said("Because.")], "rejected": [said("No.")]},
        {"chosen": [USER, said("Because.")], "rejected": [USER, said("No.")]},
        {"prompt": "Why?", "chosen": [USER, said("Because.")], "rejected": [USER, said("No.")], "score_chosen": 8.5},
        {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No. "},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " Because.", "rejected": " No."},
        {"prompt": "Why?", "response_0": "No.", "response_1": "Because.", "better_response_id": 1},
    ],
)
def test_every_shape_says_the_same(write, record):
    assert read(write(record)) == ([PreferencePair("1", (USER,), "Because.", "No.")], [])


def test_turns_before_the_question_stay_in_the_prompt(write):
    turns = ({"role": "user", "content": "Hi."}, said("Hello."), USER)
    wanted = PreferencePair("1", turns, "Because.", "No.")
    system = {"role": "system", "content": "Be brief."}
    assert read(write({"chosen": TRANSCRIPT + " Because.", "rejected": TRANSCRIPT + " No."})) == ([wanted], [])
    messages = {"prompt": [system, *turns], "chosen": [said("Because.")], "rejected": [said("No.")]}
    assert read(write(messages)) == ([PreferencePair("1", (system, *turns), "Because.", "No.")], [])


def test_the_label_says_which_response_is_better(write):
    record = {"prompt": "?", "response_0": "a", "response_1": "b", "better_response_id": 0, "safer_response_id": 1}
    path = write(record, record | {"safer_response_id": None}, record | {"safer_response_id": 2})
    assert [(pair.chosen, pair.rejected) for pair in read(path)[0]] == [("a", "b")] * 3
    pairs, skipped = read(path, label="safer_response_id")
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("b", "a")]
    assert [skip.line for skip in skipped] == [2, 3]
    assert skipped[0].reason.startswith("missing column 'safer_response_id' (found prompt, response_0, ")
    assert skipped[1].reason == "safer_response_id is neither 0 nor 1"


def test_plain_answers_are_taken_to_the_letter(write):
    """Only HH-RLHF's own layout puts spaces around what was said."""
    assert read(write(GOOD | {"chosen": "  code\n"}))[0][0].chosen == "  code\n"


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.json", "p.json.gz", "p.parquet", "p.parquet.gz", "p.dat"])
def test_every_kind_of_file_holds_the_same_pairs(tmp_path, name):
    records = [GOOD | {"chosen": f"Answer {i}."} for i in range(600)]
    path = tmp_path / name
    if "parquet" in name:
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=250)
    elif "jsonl" in name or name == "p.dat":
        path.write_text("\n".join(json.dumps(record) for record in records))
    else:
        path.write_text(json.dumps(records, indent=1))
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    pairs, skipped = read(path)
    assert [(pair.id, pair.chosen) for pair in pairs] == [(str(i + 1), f"Answer {i}.") for i in range(600)]
    assert skipped == []


def test_json_lines_may_be_called_json_and_gzip_needs_no_suffix(write, tmp_path):
    assert len(read(write(GOOD, GOOD, name="pairs.json"))[0]) == 2
    (tmp_path / "odd.jsonl").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert len(read(tmp_path / "odd.jsonl")[0]) == 1


def test_messages_in_parquet_are_read_too(tmp_path):
    record = {"chosen": [USER, said("Because.")], "rejected": [USER, said("No.")]}
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "p.parquet")
    assert read(tmp_path / "p.parquet")[0] == [PreferencePair("1", (USER,), "Because.", "No.")]


@pytest.mark.parametrize(("size", "rows"), [(100, 1024), (1 << 14, 256)])
def test_rows_of_parquet_are_unpacked_together_as_far_as_they_fit(size, rows, tmp_path, monkeypatch):
    """A long text that repeats is in the file once, and in memory once for every row."""
    record = {"chosen": [USER, said("x" * size)], "rejected": [USER, said("No.")]}
    pq.write_table(pa.Table.from_pylist([record] * 400), tmp_path / "p.parquet", row_group_size=200)
    asked = []
    iter_batches = pq.ParquetFile.iter_batches

    def batches(self, rows, *groups):
        asked.append(rows)
        return iter_batches(self, rows, *groups)

    monkeypatch.setattr("pyarrow.parquet.ParquetFile.iter_batches", batches)
    monkeypatch.setattr("llmdoctor.token_rewards.sources._BATCH", 1 << 22)
    assert [pair.id for pair in read(tmp_path / "p.parquet")[0]] == [str(n) for n in range(1, 401)]
    assert len(asked) == 2  # for each group its own
    assert all(0.7 * rows < found < 1.1 * rows for found in asked)  # its size is known to about a tenth


def test_a_folder_is_read_as_a_data_set(write, tmp_path):
    write(GOOD, name="train.jsonl")
    assert read(tmp_path)[0] == [PreferencePair("1", (USER,), "Because.", "No.")]


def test_lines_are_streamed_and_the_limit_counts_usable_pairs(write):
    path = write(GOOD | {"chosen": ""}, GOOD, GOOD, "not reached")
    assert [pair.id for pair in read(path, limit=2)[0]] == ["2", "3"]
    stream = read_pairs(path, strict=False)
    assert next(stream).id == "2"
    path.write_text("")  # what comes later has not been asked for
    stream.close()


@pytest.mark.parametrize("indent", [None, 1, "\t"])
@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_an_array_is_streamed_whatever_the_blocks_it_comes_in(tmp_path, monkeypatch, indent, block):
    """Every element is what json.load gives, of whatever length, and none is read before it is asked for."""
    real = io.TextIOWrapper.read
    monkeypatch.setattr(
        io,
        "TextIOWrapper",
        type("Blocks", (io.TextIOWrapper,), {"read": lambda s, n=-1: real(s, min(n, block) if n > 0 else n)}),
    )
    wanted = [GOOD | {"chosen": 'é]},{[\\" ' * i} for i in range(1, 30)] + [12345, -1.5e3, "text", None, [[]], {}]
    (tmp_path / "p.json").write_text(" " + json.dumps(wanted, indent=indent, ensure_ascii=False) + "\n ")
    with (tmp_path / "p.json").open("rb") as stream:
        assert list(_array_records(stream)) == wanted
        assert not stream.closed


@pytest.mark.parametrize("text", ["[1 2]", "[1,]", "[,1]", "[1", "[", "[1]]", "[1] 2", '["a', "[1,,2]", "[}"])
def test_what_is_not_an_array_is_refused_as_json_does(tmp_path, text):
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    (tmp_path / "p.json").write_text(text)
    with (
        (tmp_path / "p.json").open("rb") as stream,
        pytest.raises(ValueError, match=r"Expecting|Extra|Unterminated|Illegal"),
    ):
        list(_array_records(stream))


def test_a_large_array_is_never_whole_in_memory(tmp_path):
    record = json.dumps(GOOD | {"chosen": "x" * 10_000})
    (tmp_path / "p.json").write_text("[" + ",\n".join([record] * 3000) + "]")  # 30 MB
    tracemalloc.start()
    assert sum(1 for _ in read_pairs(tmp_path / "p.json")) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000


def test_shuffling_is_a_permutation_that_the_seed_decides(write):
    pairs = list(read_pairs(write(*[GOOD | {"chosen": f"Ä {i}"} for i in range(50)])))
    once = list(shuffled(iter(pairs), 1))
    assert once == list(shuffled(iter(pairs), 1)) != list(shuffled(iter(pairs), 2))
    assert once != pairs
    assert sorted(once, key=lambda pair: int(pair.id)) == pairs


def test_every_order_is_as_likely(write, chi_square_p):
    pairs = list(read_pairs(write(*[GOOD | {"chosen": str(i)} for i in range(3)])))
    orders = Counter("".join(pair.id for pair in shuffled(pairs, seed)) for seed in range(1200))
    assert len(orders) == 6
    assert chi_square_p(torch.tensor(list(orders.values())), torch.ones(6)) > 1e-4


# --- records that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"prompt": ', "not JSON: Expecting value at column 11"),
        ("[" * 100_000, "not JSON: nested too deeply"),
        ("3", "not a JSON object"),
        ({"prompt": "Why?", "chosen": "Because."}, "missing column 'rejected' (found prompt, chosen)"),
        (GOOD | {"rejected": None}, "missing column 'rejected' (found prompt, chosen)"),
        ({"chosen": "Because.", "rejected": "No."}, "missing column 'prompt', and no prompt inside the answers"),
        ({"chosen": [said("a")], "rejected": [said("b")]}, "missing column 'prompt', and no prompt inside the answers"),
        (GOOD | {"chosen": " \n"}, "empty answer"),
        (GOOD | {"prompt": " "}, "empty prompt"),
        (GOOD | {"chosen": "No."}, "both answers are the same"),
        (GOOD | {"chosen": 3}, "answers are neither two texts nor two message lists"),
        (GOOD | {"prompt": 3}, "neither a text nor a list of messages"),
        (GOOD | {"chosen": "a\ud800"}, "not Unicode: half of a surrogate pair"),
        ({"chosen": TRANSCRIPT + " a", "rejected": "\n\nHuman: Who?\n\nAssistant: b"}, "prompts differ"),
        ({"chosen": TRANSCRIPT, "rejected": TRANSCRIPT + " b"}, "empty answer"),
        ({"chosen": [USER, USER], "rejected": [USER, said("b")]}, "the conversation does not end with an answer"),
        ({"chosen": [USER, {"role": "assistant"}], "rejected": []}, "a message without role and content"),
        ({"chosen": [USER, said("a") | {"role": "jury"}], "rejected": []}, "unknown role 'jury'"),
        (
            {"prompt": [USER, said("x")], "chosen": [said("a")], "rejected": [said("b")]},
            "the prompt does not end with a user turn",
        ),
    ],
)
def test_a_record_that_cannot_be_used_is_skipped_with_its_line_and_reason(write, record, reason):
    path = write(GOOD, record, "", GOOD)  # an empty line is no record
    pairs, skipped = read(path)
    assert [pair.id for pair in pairs] == ["1", "4"]
    assert skipped == [SkippedRecord(2, reason)]
    with pytest.raises(DataError) as caught:
        list(read_pairs(path, strict=True))
    assert str(caught.value).startswith(f"{path}, line 2: {reason}")


def test_bytes_that_are_no_text_are_skipped(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    pairs, skipped = read(tmp_path / "p.jsonl")
    assert len(pairs) == 1
    assert skipped == [SkippedRecord(2, "not JSON: not UTF-8")]


def test_records_skipped_before_the_first_usable_one_are_reported_too(write):
    assert [skip.line for skip in read(write("no", "no", GOOD, "no"))[1]] == [1, 2, 4]


# --- input that is wrong as a whole ----------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path):
    for source in ("nothing.jsonl", "./nothing", "~/nothing", str(tmp_path / "nothing"), tmp_path / "nothing"):
        assert complaint(source) == f"no data file at {source}: check the path"
    assert "not the name of a hub data set" in complaint("a folder/pairs")


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_an_empty_file_is_said_to_be_empty(write, name):
    assert "is empty: expected preference pairs" in complaint(write(name=name))
    assert "is empty: expected preference pairs" in complaint(write("", "", name=name))


def test_a_file_without_one_usable_record_quotes_its_reasons(write):
    message = complaint(write("hello", {"text": "x", "label": 1}, {"text": "y", "label": 0}))
    assert "no usable record in its first 3" in message
    assert (
        "line 1: not JSON: Expecting value at column 1; line 2: no preference pair in the columns found: text, label)"
        in message
    )
    assert "Expected prompt + chosen + rejected, or the columns of a data set" in message
    assert message.endswith("for other columns, name them with --columns chosen=A,rejected=B[,prompt=C,system=D]")


def test_a_wrong_data_set_is_not_read_to_its_end(write):
    assert "no usable record in its first 1000" in complaint(write(*[{"text": "x"}] * 1500, GOOD))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.jsonl.gz",
            gzip.compress(json.dumps([GOOD] * 99).encode(), mtime=0)[:-20],
            "the compressed file is damaged",
        ),
        ("p.json", b"[1, 2", "not JSON (Expecting"),
        ("p.json", b'["\xff"]', "not UTF-8 text"),
        ("p.parquet", b"hello", "not a Parquet file"),
        ("p.parquet", b"", "not a Parquet file"),
    ],
)
def test_a_damaged_file_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert complaint(tmp_path / name).startswith(f"{tmp_path / name}: {message}")


def test_a_hub_name_that_cannot_be_reached_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code = (
        "from llmdoctor.token_rewards.pairs import read_pairs\nfrom llmdoctor.errors import DataError\n"
        "try:\n    next(read_pairs('nobody/nothing', split='test'))\nexcept DataError as error:\n    print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("cannot read data set 'nobody/nothing', split 'test': ")
    assert ran.stdout.count("\n") == 1


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_follows_the_content_and_the_label_not_the_name(write):
    path = write(GOOD)
    first = fingerprint(path)
    assert first == hashlib.sha256(path.read_bytes()).hexdigest() == fingerprint(write(GOOD, name="other.jsonl"))
    assert fingerprint(path, label="safer_response_id") != first
    path.write_text(path.read_text() + " ")
    assert fingerprint(path) != first
    assert fingerprint(path.parent) != fingerprint(path)


def test_a_missing_file_has_no_fingerprint(tmp_path):
    with pytest.raises(DataError, match="no data file at"):
        fingerprint(tmp_path / "nothing.jsonl")


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_come_from_text_and_from_json(write):
    wanted = ["How are you?", "Why?"]
    assert read_prompts(write("How are you?", "", "  Why? ", name="prompts.txt")) == wanted
    assert read_prompts(write('"How are you?"', '"Why?"')) == wanted
    assert read_prompts(write([*wanted], name="prompts.json")) == wanted
    assert read_prompts(write({"prompt": "How are you?"}, {"turns": ["Why?", "And then?"]})) == wanted
    assert read_prompts(write({"prompt": [said("Hi."), USER]})) == [[said("Hi."), USER]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "line 2: not JSON: Expecting property name"),
        ({"text": "x"}, "line 2: expected a text, or a column such as 'prompt', 'turns' or 'instruction', found text"),
        ({"turns": []}, "line 2: expected a text, or a column such as 'prompt', 'turns' or 'instruction', found turns"),
        ({"prompt": [said("Hi.")]}, "line 2: the prompt does not end with a user turn"),
        ('""', "line 2: empty prompt"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_skipped_and_named(write, record, message):
    notes: list[str] = []
    path = write('"fine"', record, {"turns": []}, '"good"')
    assert [question.id for question in read_questions(path, on_note=notes.append)] == ["1", "4"]
    (note,) = notes
    assert note.startswith(f"{path}: skipped 2 of 4 records ({message}")
    path = write(record, record)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}: no usable record among its 2 ({message.replace('2', '1', 1)}")


def test_ids_that_come_again_are_told_apart(write):
    records = ({"id": "3", "prompt": "a"}, {"id": "3", "prompt": "b"}, "c", {"id": "3#2", "prompt": "d"}, "e")
    asked = read_questions(write(*[r if isinstance(r, dict) else f'"{r}"' for r in records]))
    assert [question.id for question in asked] == ["3", "3#2", "3#3", "3#2#2", "5"]
    assert [question.fields.get("id") for question in asked] == ["3", "3", None, "3#2", None]


def test_questions_come_in_every_common_form_and_what_is_not_used_is_said(write):
    notes: list[str] = []
    alpaca = {"instruction": "Sum up.", "input": "Tea is hot.", "output": "Hot tea."}
    talk = [USER, said("Fine."), USER, said("Still fine.")]
    path = write(
        {"question_id": 7, "category": "x", "turns": ["Why?", "And then?"]},
        alpaca,
        {"system": "Be brief.", "messages": talk},
        {"chosen": [USER, said("Good.")], "rejected": [USER, said("Bad.")]},
    )
    asked = read_questions(path, on_note=notes.append)
    assert [question.id for question in asked] == ["7", "2", "3", "4"]
    assert [question.turns for question in asked] == [
        ("Why?", "And then?"),
        ("Sum up.\n\nTea is hot.",),
        ([{"role": "system", "content": "Be brief."}, *talk[:-1]],),
        ([USER],),
    ]
    assert notes == [
        f"{path}: 4 prompts with 5 turns in all; not used: category, output, the answer at the end, chosen, rejected"
    ]
    one_column = write("anything", "Why?", '"So, how?"', name="table.csv")
    assert [question.turns for question in read_questions(one_column)] == [("Why?",), ("So, how?",)]


def test_prompt_files_that_are_missing_or_empty_are_refused(write, tmp_path):
    for path in (tmp_path / "nothing.txt", "nothing", tmp_path):
        with pytest.raises(DataError, match=r"no (data )?file at"):
            read_prompts(path)
    for name in ("empty.txt", "empty.jsonl"):
        with pytest.raises(DataError, match="is empty: expected at least one prompt"):
            read_prompts(write(name=name))


# --- real data -------------------------------------------------------------------------------------------------------


@needs_real_data
def test_hh_rlhf_gives_what_its_readme_says():
    pairs, skipped = read(HH)
    assert len(pairs) == 2303
    assert [skip.line for skip in skipped if skip.reason == "empty answer"] == [87, 517, 926, 1104]
    assert [skip.line for skip in skipped if skip.reason == "prompts differ"] == [1255, 1689, 1951, 1953, 2037]
    assert len(skipped) == 9


@needs_real_data
def test_hh_rlhf_transcripts_come_apart_without_loss():
    """Put together again in the data set's own layout, every pair is the transcript it came from, spaces aside."""
    with gzip.open(HH) as lines:
        records = {str(number): json.loads(line) for number, line in enumerate(lines, start=1)}
    who = {"user": "Human", "assistant": "Assistant"}
    for pair in read(HH)[0]:
        for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            turns = [*pair.prompt, said(answer)]
            together = "".join(f"\n\n{who[turn['role']]}: {turn['content']}" for turn in turns)
            assert together.split() == records[pair.id][side].split()
            assert answer == answer.rstrip()
        assert pair.prompt[-1]["role"] == "user"


@needs_real_data
def test_mt_bench_gives_the_first_turn_of_its_80_questions():
    assert {len(question.turns) for question in read_questions(REAL / "mt-bench" / "question.jsonl")} == {2}
    prompts = read_prompts(REAL / "mt-bench" / "question.jsonl")
    assert len(prompts) == 80
    assert str(prompts[0]).startswith("Compose an engaging travel blog post about a recent trip to Hawaii")
