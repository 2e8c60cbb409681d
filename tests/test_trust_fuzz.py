"""Every reader against inputs of a machine's imagination: it works, or says in one line why not. Nothing else.

200 cases a format in the usual run. LLMDOCTOR_FUZZ=10000 sets another number, as for a nightly run:

    LLMDOCTOR_FUZZ=10000 python -m pytest tests/test_trust_fuzz.py
"""

import gzip
import json
import os
import re
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from llmdoctor.answers import measures
from llmdoctor.artefacts import AdapterConfig, DoctorFile, ProbeMeta, RewardsMeta
from llmdoctor.chat_template import ChatTemplate
from llmdoctor.comparing import KeptAnswer
from llmdoctor.errors import LLMDoctorError
from llmdoctor.files import no_constant, read_json
from llmdoctor.gguf_file import read_header
from llmdoctor.harmless import json_text
from llmdoctor.models import load_tokenizer
from llmdoctor.profile import load_profile
from llmdoctor.schema import checked
from llmdoctor.settings import DataSettings, GuidanceFields, RewardSettings, Sampling, TrainSettings
from llmdoctor.tensors import read_tensors
from llmdoctor.text import TextStream, prompt_ids, token_texts
from llmdoctor.token_rewards.folder import read_shard
from llmdoctor.token_rewards.pairs import read_pairs, read_questions, shuffled
from llmdoctor.token_rewards.shapes import CHOSEN, RATED, shapes, to_pair, to_question
from llmdoctor.token_rewards.sources import Unusable
from llmdoctor.tui.config import read_config

CASES = int(os.environ.get("LLMDOCTOR_FUZZ", "200"))
fuzz = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=CASES == 200,
    database=None,
    suppress_health_check=list(HealthCheck),
)

TEXT = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["", "\0", "\ud800", "\x1b[2J", "user", "assistant", "text", "[]", "[1]", "nan", "1e999", "model_a"]
    ),
)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(), TEXT)
COLUMNS = sorted({name for shape in (*CHOSEN, *RATED) for name in shape.columns})
KEYS = st.one_of(
    TEXT,
    st.sampled_from([*COLUMNS, "prompt", "system", "messages", "tools", "role", "content", "from", "value", "type",
                     "tool_calls", "name", "function", "arguments", "turns", "score_chosen", "annotations"]),
)  # fmt: skip
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=5
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]) | VALUE, "content": TEXT | VALUE},
    optional={"tool_calls": VALUE, "name": VALUE, "value": VALUE, "from": VALUE},
)
ANSWER = st.one_of(TEXT, VALUE, st.lists(MESSAGE, max_size=4))
RECORD = st.one_of(
    VALUE,
    st.dictionaries(KEYS, ANSWER, max_size=6),
    st.sampled_from([*CHOSEN, *RATED]).flatmap(
        lambda shape: st.fixed_dictionaries(
            dict.fromkeys((*shape.columns, "prompt"), ANSWER), optional={"system": ANSWER, "tools": ANSWER}
        )
    ),
)


def one_line(action: Callable[[], Any]) -> None:
    try:
        action()
    except LLMDoctorError as error:
        text = str(error)
    else:
        return
    assert "\n" not in text
    assert len(text) < 2000


def in_file(data: bytes, suffix: str, *actions: Callable[[Path], Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{suffix}"
        path.write_bytes(data)
        for action in actions:
            one_line(lambda action=action: action(path))


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def read(path: Path) -> None:
    list(shuffled(read_pairs(path), 1))


# --- data ------------------------------------------------------------------------------------------------------------


@fuzz
@given(RECORD)
def test_records(record):
    known = shapes(None, None)
    with suppress(Unusable):
        to_pair("1", record, known)
    with suppress(Unusable):
        to_question(1, record, known)


@fuzz
@given(
    st.sampled_from([".jsonl", ".json", ".jsonl.gz"]),
    st.lists(RECORD.map(as_json) | st.binary(max_size=30), max_size=4),
    st.booleans(),
)
def test_json_files(suffix, lines, array):
    data = b"[" + b",".join(lines) + b"]" if array else b"\n".join(lines)
    in_file(gzip.compress(data, 1) if suffix.endswith("gz") else data, suffix, read, read_questions)


CELL = TEXT | VALUE.map(json.dumps)


@fuzz
@given(
    st.sampled_from([".csv", ".tsv"]),
    st.lists(KEYS, max_size=4),
    st.lists(st.lists(CELL, max_size=4), max_size=3),
    st.binary(max_size=8),
)
def test_tables(suffix, header, rows, noise):
    comma = "," if suffix == ".csv" else "\t"
    lines = [comma.join('"' + part.replace('"', '""') + '"' for part in row) for row in (header, *rows)]
    in_file("\n".join(lines).encode("utf-8", "surrogatepass") + noise, suffix, read, read_questions)


CELLS = [
    (pa.string(), st.text(max_size=5)),
    (pa.int64(), st.integers(-9, 9)),
    (pa.float64(), st.floats()),
    (pa.binary(), st.binary(max_size=4)),
    (pa.timestamp("s"), st.integers(0, 9)),
    (pa.list_(pa.string()), st.lists(st.text(max_size=3), max_size=2)),
    (pa.struct([("a", pa.binary())]), st.fixed_dictionaries({"a": st.binary(max_size=3)})),
    (
        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
        st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=3)}),
            max_size=3,
        ),
    ),
]


@fuzz
@given(data=st.data())
def test_parquet_files(data):
    columns = {}
    for name in data.draw(st.lists(st.sampled_from([*COLUMNS, "prompt", "tools"]), unique=True, max_size=4)):
        kind, values = data.draw(st.sampled_from(CELLS))
        columns[name] = pa.array(data.draw(st.lists(st.none() | values, min_size=2, max_size=2)), kind)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    whole = sink.getvalue().to_pybytes()
    cut = data.draw(st.integers(0, len(whole)) | st.just(len(whole)))
    in_file(whole[:cut], ".parquet", read, read_questions, lambda path: list(read_shard(path, ["f"])))


# --- profiles and settings -------------------------------------------------------------------------------------------


YAML_ODD = st.sampled_from(
    [
        *[
            "!!timestamp x",
            "!!int ''",
            "!!bool x",
            "!!float x",
            "!!binary x",
            "!!set {a}",
            "!!python/object:os.system x",
        ],
        *["2024-13-45", "190:20:30", "=", "&a [*a]", "*b", "? [1]\n: 2", "<<: 3", ".inf", "0o8", '"\\ud800"', "~"],
    ]
)
SECTIONS = ["patient", "faces", "data", "rewards", "train", "doctors", "decode", "extends", "welcome"]


@fuzz
@given(
    st.one_of(
        st.binary(max_size=40),
        VALUE.map(lambda value: yaml.safe_dump(value).encode("utf-8", "surrogatepass")),
        YAML_ODD.map(lambda odd: f"patient: {{model: x}}\ntrain: {odd}\n".encode()),
        st.dictionaries(st.sampled_from(SECTIONS), VALUE, max_size=3).map(as_json),
    )
)
def test_profiles(data):
    in_file(data, ".yaml", load_profile)


def test_an_alias_bomb_takes_no_memory(tmp_path):
    """Of 2.8 GB, once."""
    lines = [
        "a0: &a0 [x, x, x, x, x, x, x, x, x]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 20)),
    ]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(LLMDoctorError, match="aliases"):
        load_profile(tmp_path / "bomb.yaml")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    with pytest.raises(LLMDoctorError, match="YAML"):
        load_profile(tmp_path / "deep.yaml")
    (tmp_path / "big.yaml").write_text("#" * (1 << 21))
    with pytest.raises(LLMDoctorError, match="bytes"):
        load_profile(tmp_path / "big.yaml")


SCHEMAS = st.sampled_from([TrainSettings, RewardSettings, GuidanceFields, Sampling, DataSettings])


@fuzz
@given(st.data())
def test_settings(data):
    schema = data.draw(SCHEMAS)
    values = data.draw(st.dictionaries(st.sampled_from(sorted(schema.model_fields)) | TEXT, VALUE, max_size=3))
    one_line(lambda: checked(schema, values))


# --- artefacts -------------------------------------------------------------------------------------------------------


@fuzz
@given(st.data())
def test_json_artefacts(data):
    schema = data.draw(st.sampled_from([DoctorFile, AdapterConfig, RewardsMeta, ProbeMeta]))
    known = st.dictionaries(st.sampled_from(sorted(schema.model_fields)), VALUE).map(as_json)
    held = data.draw(st.one_of(st.binary(max_size=30), VALUE.map(as_json), known))
    in_file(held, ".json", lambda path: read_json(path, schema))


TOKEN = {
    "position": 0, "id": 1, "text": "a", "patient_logprob": -1.0, "doctor_logprobs": {"d": -1.0}, "logprob": None,
    "values": {"d": 0.5}, "flip": False, "kl": 0.0, "alpha": 1.0, "betas": {"d": 1.0}, "top": [],
}  # fmt: skip
KEPT = {
    "column": "guided", "question": 1, "sample": 1, "turn": 1, "seconds": 1.0, "run_seed": 1, "command": "c",
    "answer": {"text": "a", "tokens": [TOKEN], "finished": True},
}  # fmt: skip


@fuzz
@given(data=st.data())
def test_kept_answers(data):
    """What passes can be measured and written again."""
    token = data.draw(st.dictionaries(st.sampled_from([*TOKEN]), VALUE, max_size=2).map(lambda odd: {**TOKEN, **odd}))
    answer = {**KEPT["answer"], "tokens": [TOKEN, token]}
    line = {**KEPT, "answer": answer} | data.draw(st.dictionaries(st.sampled_from([*KEPT]), VALUE, max_size=1))
    try:
        kept = KeptAnswer.model_validate(json.loads(json.dumps(line), parse_constant=no_constant))
    except ValueError:
        return
    measures([kept.answer], None, [kept.seconds])
    json_text(kept.answer.to_dict())


TOML = st.lists(
    st.sampled_from(["theme", "lens", '[keys]\n"chat.rerun"', "odd"]).flatmap(
        lambda key: (VALUE.map(json.dumps) | st.text(max_size=5)).map(lambda value: f"{key} = {value}\n")
    ),
    max_size=3,
).map(lambda lines: "".join(lines).encode("utf-8", "surrogatepass"))


@fuzz
@given(TOML | st.binary(max_size=30))
def test_settings_of_the_app(data):
    in_file(data, ".toml", lambda path: read_config(path, themes={"nord": None}, bindings={"chat.rerun": None}))


@fuzz
@given(st.binary(max_size=60), st.integers(0, 400), st.integers(0, 255))
def test_safetensors(noise, at, byte):
    whole = bytearray(save({"a": torch.ones(2, 3), "b": torch.zeros(1)}))
    whole[at % len(whole)] = byte
    in_file(bytes(whole), ".safetensors", lambda path: read_tensors(path, ("a", "b")))
    in_file(noise, ".safetensors", read_tensors)
    in_file(struct.pack("<Q", at) + noise, ".safetensors", read_tensors)


@fuzz
@given(data=st.data())
def test_gguf(data, tiny_gguf_header):
    whole = bytearray(tiny_gguf_header)
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    in_file(bytes(whole[: data.draw(st.integers(0, len(whole)))]), ".gguf", read_header)


@pytest.fixture(scope="module")
def tiny_gguf_header(tiny_gguf):
    return tiny_gguf().read_bytes()[:3000]


# --- tokens and templates --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(shared, tiny_tokenizer):
    return [
        tiny_tokenizer,
        load_tokenizer(shared / "stories260k"),
        load_tokenizer(shared / "qwen2-tokenizer"),
        load_tokenizer(load_profile("clinic").patient.model),
    ]


@pytest.fixture(scope="module")
def pools(tokenizers):
    """For each tokenizer its ids, and those of single bytes, which are parts of characters."""
    found = []
    for tokenizer in tokenizers:
        names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
        parts = [i for i, token in names.items() if len(token) == 1 or re.fullmatch("<0x..>", token)]
        found.append((sorted(names), parts))
    return found


@fuzz
@given(data=st.data())
def test_any_ids_stream_as_what_decoding_them_gives(data, tokenizers, pools):
    """But for an unfinished character at the end, which is left out. Piece by piece, and all at once."""
    tokenizer, (every, parts) = data.draw(st.sampled_from(list(zip(tokenizers, pools, strict=True))))
    ids = data.draw(st.lists(st.sampled_from(every) | st.sampled_from(parts), max_size=40))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    stream = TextStream(tokenizer)
    pieces = [stream.push(i, last=n == len(ids) - 1) for n, i in enumerate(ids)]
    texts = token_texts(tokenizer, ids)
    assert "".join(pieces) == "".join(texts)
    assert len(texts) == len(ids)
    assert whole.startswith("".join(texts))
    assert not whole[len("".join(texts)) :].strip("\ufffd")


def test_bytes_that_are_no_text_stream(tokenizers):
    llama = tokenizers[1]
    ids = llama.convert_tokens_to_ids(["▁a", "<0x0A>", "<0xE4>", "b"])
    assert token_texts(llama, ids) == ["a", "\ufffd", "\ufffd", "b"]
    ids = llama.convert_tokens_to_ids(["▁a", "<0x0A>", "b"])
    assert token_texts(llama, ids) == ["a", "\n", "b"]
    ids = llama.convert_tokens_to_ids(["<0xE4>", "<0xBD>", "<0xA0>", "<0xE4>", "b"])
    assert "".join(token_texts(llama, ids)) == llama.decode(ids)


PIECES = st.sampled_from(
    [
        *[
            "{% for m in messages %}",
            "{{ m.content }}",
            "{{ m['role'] }}",
            "{% endfor %}",
            "{% if true %}",
            "{% endif %}",
        ],
        *["{{ messages[0].content }}", "{{ x.y.z }}", "{{ 1 // 0 }}", "{{ bos_token }}", "{{ raise_exception('no') }}"],
        *["{{ 'a' * 9 ** 9 ** 9 }}", "{% set a = a ~ 'x' %}", "{{ [1] * 10 ** 12 }}", "{{ '%099999d' % 1 }}"],
        *["{{ 'x'.join(messages) }}", "{{ messages | tojson(indent=10**9) }}", "{% for i in range(10**9) %}"],
        *["{{ strftime_now(3) }}", "{{ messages[0].content.split('') }}", "}}", "{{", "%}"],
    ]
)


@fuzz
@given(st.lists(PIECES | st.text(max_size=4), max_size=8).map("".join), TEXT)
def test_templates(tiny_tokenizer, template, said):
    before = tiny_tokenizer.chat_template
    tiny_tokenizer.chat_template = template
    try:
        said = said.encode("utf-8", "replace").decode()
        one_line(lambda: ChatTemplate.of(tiny_tokenizer))
        one_line(lambda: prompt_ids(tiny_tokenizer, [{"role": "user", "content": said}]))
    finally:
        tiny_tokenizer.chat_template = before
