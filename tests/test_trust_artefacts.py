"""What is read from a model, a doctor or a rewards folder may be anything: it is used in full or refused in one line.

Each test is an attack that once gave a traceback, or passed in silence.
"""

import copy
import dataclasses
import errno
import io
import json
import os
import shutil
import socket
import struct
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VBLoRAConfig,
    get_peft_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmdoctor import adapters
from llmdoctor.adapters import log_probs, merged_adapter
from llmdoctor.artefacts import AdapterConfig, DoctorFile, RewardsMeta
from llmdoctor.decoding.decode import decode
from llmdoctor.decoding.rows import patient_alone
from llmdoctor.errors import LLMDoctorError, LLMDoctorWarning, LoadError, UsageError, VersionError
from llmdoctor.files import file_checksum, read_json, write_json
from llmdoctor.model_source import ModelSource
from llmdoctor.models import Vocabulary, load_lm, load_patient, load_tokenizer, model_fingerprint
from llmdoctor.profile import load_profile
from llmdoctor.records import FacePair, PairScores, TokenScores
from llmdoctor.settings import DataSettings, RewardSettings, Sampling, TrainSettings
from llmdoctor.tensors import read_tensors
from llmdoctor.text import conversation, prompt_ids
from llmdoctor.token_rewards.extract import extract
from llmdoctor.token_rewards.folder import SCHEMA_VERSION, RewardsFolder, write_shard
from llmdoctor.token_rewards.pairs import read_pairs, read_questions
from llmdoctor.token_rewards.sources import fingerprint
from llmdoctor.training import folder as doctor_folder
from llmdoctor.training.doctor import Doctor, new_doctor
from llmdoctor.training.folder import load_doctor, save_doctor
from llmdoctor.training.train import train

ODD: list[Any] = [None, "", "x\0y", [], [1], {}, {"a": []}, True, -1, 10**400, 1e308, "\ud800", [[]] * 3]
META = {"name": "d", "settings": {"train": {"method": "lora"}}}


def fine_or_refused(action: Any) -> None:
    """It works, or says in one line why not."""
    with suppress(LLMDoctorError):
        action()
        return
    refusal(action)


def refusal(action: Any, kind: type[LLMDoctorError] = LLMDoctorError) -> str:
    with pytest.raises(kind) as refused:
        action()
    text = str(refused.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model("llama", tie_word_embeddings=True)


def adapted(base: Path, config: Any) -> PeftModel:
    """An adapter that does something, on a base."""
    model = get_peft_model(load_lm(base, device="cpu"), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def doctor(base, tmp_path_factory):
    """A saved doctor with LoRA."""
    folder = tmp_path_factory.mktemp("doctor") / "d"
    made, tokenizer = new_doctor(base, TrainSettings(lora_rank=2, lora_targets=("q_proj", "v_proj"), device="cpu"))
    with torch.no_grad():
        for name, parameter in made.lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_doctor(folder, made, tokenizer, {**META, "base_model": str(base)})
    return folder


@pytest.fixture
def spoilt(doctor, tmp_path):
    return Path(shutil.copytree(doctor, tmp_path / "spoilt"))


# --- a saved doctor gives its own log-probs when loaded -------------------------------------------------------------


KINDS = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    "lora on the head": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"]),
    "lora on the embedding": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["embed_tokens", "q_proj"]),
    "dora": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["v_proj"], use_dora=True),
    "a whole head": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]),
    "loha": LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
    "oft": OFTConfig(task_type="CAUSAL_LM", oft_block_size=4, target_modules=["q_proj"]),
    "vblora": VBLoRAConfig(
        task_type="CAUSAL_LM", r=2, num_vectors=8, vector_length=8, topk=2, target_modules=["v_proj"]
    ),
}  # fmt: skip


def state(doctor):
    """All that saving could change: the tensors and what they share, what is trained, and the adapters."""
    weights = [*doctor.named_parameters(remove_duplicate=False), *doctor.named_buffers()]
    held = [(name, id(w), w.data_ptr(), w.requires_grad, w.dtype, w.tolist()) for name, w in weights]
    adapters = [*doctor.lm.peft_config] if isinstance(doctor.lm, PeftModel) else []
    merged = [m.merged for m in doctor.modules() if isinstance(m, BaseTunerLayer)]
    return held, adapters, merged, doctor.training, doctor.lm.config.tie_word_embeddings


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_doctor_is_itself_when_loaded(kind, base, tmp_path, monkeypatch):
    """Also LoRA on a head that is tied to the embedding: merged into both it would be another model."""
    model = adapted(base, copy.deepcopy(KINDS[kind]))
    tokenizer = load_tokenizer(base)
    made = Doctor(model, Vocabulary.of(tokenizer))
    ids = torch.arange(20, 40)[None]
    own = log_probs(model, ids)
    with model.disable_adapter():
        plain = log_probs(model, ids)
    before = state(made)
    with monkeypatch.context() as patch:
        patch.setattr(doctor_folder, "load_lm", lambda *_, **__: pytest.fail("a second base was loaded"))
        save_doctor(tmp_path / "d", made, tokenizer, {**META, "base_model": str(base)})
    assert state(made) == before  # bit for bit
    loaded = load_doctor(tmp_path / "d", dtype="float32", device="cpu")
    torch.testing.assert_close(log_probs(loaded.model, ids), own, atol=1e-4, rtol=1e-4)
    assert (own - plain).abs().max() > 0.01
    (tmp_path / "a").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "d" / file, tmp_path / "a" / file)
    patient = load_lm(tmp_path / "a", dtype="float32", device="cpu")
    torch.testing.assert_close(log_probs(patient, ids), own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("broken", ["tied", "file"])
def test_a_doctor_that_its_file_does_not_give_is_not_saved(broken, base, tmp_path, monkeypatch):
    """A head that stays tied is merged into the embedding too; a file without what was trained is the bare base."""
    model, tokenizer = adapted(base, copy.deepcopy(KINDS["lora on the head"])), load_tokenizer(base)
    made = Doctor(model, Vocabulary.of(tokenizer))
    before = state(made)
    if broken == "tied":
        monkeypatch.setattr(adapters, "_untie", lambda _: None)
    else:
        write = PeftModel.save_pretrained

        def spoil(self, where, **options):
            write(self, where, **options)
            change(
                Path(where) / "adapter_model.safetensors", lambda held: held.update({k: 0 * v for k, v in held.items()})
            )

        monkeypatch.setattr(PeftModel, "save_pretrained", spoil)
    save = lambda: save_doctor(tmp_path / "d", made, tokenizer, {**META, "base_model": str(base)})  # noqa: E731
    assert "other log-probs" in refusal(save, LoadError)
    assert list(tmp_path.iterdir()) == []
    assert state(made) == before


@pytest.mark.parametrize("spoilt", [False, True])
def test_a_whole_doctor_is_compared_with_its_file(spoilt, base, tmp_path, monkeypatch):
    made, tokenizer = new_doctor(base, TrainSettings(method="full", device="cpu"))
    write = type(made.lm).save_pretrained

    def save(self, where, **options):
        write(self, where, **options)
        if spoilt:
            change(Path(where) / "model.safetensors", scaled(1.1))

    monkeypatch.setattr(type(made.lm), "save_pretrained", save)
    monkeypatch.setattr(doctor_folder, "load_lm", lambda *_, **__: pytest.fail("a second one was loaded"))
    action = lambda: save_doctor(tmp_path / "d", made, tokenizer, {**META, "base_model": str(base)})  # noqa: E731
    assert "other log-probs" in refusal(action, LoadError) if spoilt else action() is None


def test_a_doctor_that_cannot_be_checked_without_a_second_one_is_loaded_if_there_is_room(base, tmp_path, monkeypatch):
    """Without room, or where memory ends while it loads, one line says so; any other doctor is still refused."""
    monkeypatch.setattr(doctor_folder, "_is_as_saved", lambda *_: False)
    tokenizer, made = load_tokenizer(base), Doctor(adapted(base, KINDS["lora"]), Vocabulary.of(load_tokenizer(base)))
    save = lambda: save_doctor(tmp_path / "d", made, tokenizer, {**META, "base_model": str(base)})  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error", LLMDoctorWarning)
        save()

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    for name, value in (
        ("training.folder._has_room", lambda _: False),
        ("models.AutoModelForCausalLM.from_pretrained", full),
    ):
        shutil.rmtree(tmp_path / "d")
        with monkeypatch.context() as patch:
            patch.setattr(f"llmdoctor.{name}", value)
            with pytest.warns(LLMDoctorWarning, match="was not checked") as said:
                save()
        assert len(said) == 1
        assert (tmp_path / "d" / "doctor.json").is_file()
    with torch.no_grad():
        made.lm.get_input_embeddings().weight.add_(torch.randn_like(made.lm.get_input_embeddings().weight))
    shutil.rmtree(tmp_path / "d")
    assert "other log-probs" in refusal(save, LoadError)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(config, base, tmp_path):
    adapted(base, config).save_pretrained(tmp_path / "a")
    assert "cannot be merged" in refusal(lambda: load_lm(tmp_path / "a", device="cpu"), LoadError)


def test_a_doctor_that_would_load_as_another_is_not_saved(base, tmp_path):
    """A weight that was trained but is not part of the adapter."""
    model = adapted(base, copy.deepcopy(KINDS["lora"]))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(torch.randn_like(model.get_input_embeddings().weight))
    made, tokenizer = Doctor(model, Vocabulary.of(load_tokenizer(base))), load_tokenizer(base)
    save = lambda: save_doctor(tmp_path / "d", made, tokenizer, {**META, "base_model": str(base)})  # noqa: E731
    assert "other log-probs" in refusal(save, LoadError)
    assert list(tmp_path.iterdir()) == []


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(base, copied):
    """A base whose own program must be trusted."""
    folder = copied(base)
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_a_doctor_on_a_base_with_code_of_its_own_is_saved(method, with_code, tmp_path):
    settings = TrainSettings(method=method, lora_rank=2, device="cpu")
    made, tokenizer = new_doctor(with_code, settings, trust_remote_code=True)
    meta = {**META, "base_model": str(with_code), "settings": {"train": {"method": method}}}
    save_doctor(tmp_path / "d", made, tokenizer, meta, trust_remote_code=True)
    loaded = load_doctor(tmp_path / "d", dtype="float32", device="cpu", trust_remote_code=True)
    ids = torch.arange(20, 40)[None]
    torch.testing.assert_close(log_probs(loaded.model, ids), log_probs(made.lm, ids), atol=1e-4, rtol=1e-4)


def test_rewards_of_another_adapter_are_not_its_own(base, tmp_path):
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = get_peft_model(load_lm(base, device="cpu"), LoraConfig(r=2, target_modules=["q_proj"]))
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    assert len({model_fingerprint(folder) for folder in (*folders, base)}) == 3


# --- tensors ---------------------------------------------------------------------------------------------------------


def change(path: Path, edit: Any) -> None:
    held = load_file(path)
    edit(held)
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, path)


def scaled(factor: float) -> Any:
    return lambda held: held.update({name: factor * tensor for name, tensor in held.items()})


def drop(held: Any) -> None:
    del held[next(name for name in held if "lora_B" in name)]


def rename(held: Any) -> None:
    for name in [name for name in held if "layers.1" in name]:
        held[name.replace("layers.1", "layers.7")] = held.pop(name)


def replace(held: Any) -> None:
    held.clear()
    held["something.else"] = torch.ones(2, 2)


def nan(held: Any) -> None:
    held[next(iter(held))][0] = float("nan")


def wide(held: Any) -> None:
    name = next(iter(held))
    held[name] = torch.ones(9, 9)


@pytest.mark.parametrize(
    ("edit", "words"),
    [(drop, "lora_B"), (rename, "layers"), (replace, "lora_"), (nan, "not finite"), (wide, "size mismatch")],
)
def test_an_adapter_without_its_tensors_is_refused_and_names_them(edit, words, spoilt, tmp_path):
    """It once loaded as its base, in silence. So does the adapter as a patient."""
    change(spoilt / "adapter_model.safetensors", edit)
    assert words in refusal(lambda: load_doctor(spoilt), LoadError)
    assert words in refusal(lambda: load_lm(spoilt, device="cpu"), LoadError)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(value, base, spoilt, copied):
    change(spoilt / "value_head.safetensors", lambda held: held["bias"].fill_(value))
    assert "'bias'" in refusal(lambda: load_doctor(spoilt), LoadError)
    model = copied(base)
    change(
        model / "model.safetensors", lambda held: held["model.layers.1.mlp.up_proj.weight"].view(-1)[77].fill_(value)
    )
    assert "layers.1.mlp.up_proj" in refusal(lambda: load_patient(model, device="cpu"), LoadError)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 100, struct.pack("<Q", 1 << 60) + b"{}", b"[" * 5000])
def test_a_file_that_is_no_safetensors_is_refused(damage, spoilt, tmp_path):
    for name in ("value_head.safetensors", "adapter_model.safetensors"):
        (spoilt / name).write_bytes(damage)
        refusal(lambda: load_doctor(spoilt), LoadError)
        refusal(lambda name=name: read_tensors(spoilt / name), LoadError)


def test_pickles_are_never_unpickled(base, spoilt, copied, tmp_path):
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (spoilt / "adapter_model.safetensors").unlink()
    torch.save(Bomb(), spoilt / "adapter_model.bin")
    assert "pickle" in refusal(lambda: load_lm(spoilt, device="cpu"), LoadError)
    (spoilt / "value_head.safetensors").unlink()
    assert "pickle" in refusal(lambda: load_doctor(spoilt), LoadError)
    model = copied(base)
    (model / "model.safetensors").unlink()
    torch.save(Bomb(), model / "pytorch_model.bin")
    assert "pickle" in refusal(lambda: load_patient(model, device="cpu"), LoadError)
    assert not (tmp_path / "exploded").exists()


# --- JSON ------------------------------------------------------------------------------------------------------------


def each_odd(path: Path, key: str, schema: Any, load: Any) -> None:
    """Every odd value in place of the key's own; what the schema lets pass is loaded too."""
    whole = path.read_text()
    for value in ODD:
        path.write_text(whole)
        spoil(path, key, value)
        with suppress(LoadError):
            read_json(path, schema)
            fine_or_refused(load)
            continue
        refusal(lambda: read_json(path, schema))


def spoil(path: Path, key: str, value: Any) -> None:
    data = json.loads(path.read_text())
    *parents, last = key.split(".")
    place = data
    for parent in parents:
        place = place[parent]
    place[last] = value
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "key", ["base_model", "name", "tokenizer", "settings", "settings.train", "base_fingerprint", "base_beside",
            "schema_version"]
)  # fmt: skip
def test_a_doctor_json_of_wrong_types_is_one_line(key, spoilt):
    each_odd(spoilt / "doctor.json", key, DoctorFile, lambda: load_doctor(spoilt))


@pytest.mark.parametrize(
    "key", ["base_model_name_or_path", "peft_type", "task_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
            "target_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "auto_mapping", "bias"]
)  # fmt: skip
def test_an_adapter_config_of_wrong_types_is_one_line(key, spoilt):
    each_odd(spoilt / "adapter_config.json", key, AdapterConfig, lambda: load_doctor(spoilt))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("r", 10**9, "no tensor is wider"),
        ("rank_pattern", {"q_proj": 10**9}, "no tensor is wider"),
        ("lora_alpha", 1e308, "lora_alpha"),
        ("lora_alpha", 10**400, "lora_alpha"),
        ("target_modules", r"(([a-z._]+)+)+\d#", "runs away"),
        ("exclude_modules", r"(([a-z._]+)+)+\d#", "runs away"),
        ("rank_pattern", {r"(([a-z._]+)+)+\d#": 1}, "runs away"),
        ("target_modules", "(((", "regular expression"),
        ("init_lora_weights", "pissa_niter_999999999", "at most 999 rounds"),
        ("layer_replication", [[0, 1]] * 2000, "layer_replication of 2000 layers"),
        ("layer_replication", [[0, 10**9]], "at most 1000"),
        ("layer_replication", [5], "'layer_replication' expected"),
    ],
)
def test_an_adapter_config_that_asks_for_too_much_is_refused_first(key, value, words, spoilt, monkeypatch):
    monkeypatch.setattr("llmdoctor.adapters._SECONDS", 0.5)
    spoil(spoilt / "adapter_config.json", key, value)
    text = refusal(lambda: load_doctor(spoilt), LoadError)
    assert words in text
    assert "float16" not in text


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 10**9), ("hidden_size", 10**400), ("rope_theta", 1e308), ("num_hidden_layers", "many")],
)
def test_a_model_config_that_asks_for_too_much_is_refused_first(key, value, base, copied):
    model = copied(base)
    spoil(model / "config.json", key, value)
    refusal(lambda: load_patient(model, device="cpu"), LoadError)


LORA_KEYS = sorted({field.name for field in dataclasses.fields(LoraConfig)} - {"base_model_name_or_path"})
USELESS = ("NoneType", "object has no", "not supported between", "unsupported operand", "recursion", "not iterable")


@pytest.fixture(scope="module")
def plain_adapter(base, tmp_path_factory):
    """An adapter without a doctor, and its base."""
    folder = tmp_path_factory.mktemp("adapter")
    adapted(base, copy.deepcopy(KINDS["lora"])).save_pretrained(folder)
    return load_lm(base, device="cpu"), folder


@pytest.mark.parametrize("key", LORA_KEYS)
def test_any_key_of_an_adapter_config_is_taken_or_named(key, plain_adapter):
    """Of every type that JSON has. What PEFT itself says is passed on where it says what is wrong."""
    base, folder = plain_adapter
    path = folder / "adapter_config.json"
    whole = path.read_text()
    try:
        for value in (None, "x", 5, -1, 0.5, True, [], [[1]], {}, {"a": {"b": 1}}):
            path.write_text(whole)
            spoil(path, key, value)
            try:
                merged_adapter(copy.deepcopy(base), folder, "it")
            except LoadError as error:
                text = str(error)
                assert "\n" not in text
                assert key in text or not any(words in text for words in USELESS), (value, text)
    finally:
        path.write_text(whole)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("init_lora_weights", 5, "Literal['gaussian'"),
        ("arrow_config", {"a": 1}, "which sets arrow_config"),
        ("arrow_config", 5, "expected Optional[ArrowConfig], got 5"),
        ("use_dora", "yes", "expected bool, got 'yes'"),
        ("r", None, "'r' expected int, got None"),
        ("lora_dropout", 2.0, "'lora_dropout' should be less than or equal to 1, got 2.0"),
        ("peft_type", "MAGIC", "peft_type 'MAGIC', which this version of PEFT does not know"),
    ],
)
def test_a_wrong_key_of_an_adapter_config_says_what_was_expected(key, value, expected, plain_adapter, tmp_path):
    base, folder = plain_adapter
    shutil.copytree(folder, tmp_path / "a")
    spoil(tmp_path / "a" / "adapter_config.json", key, value)
    text = refusal(lambda: merged_adapter(copy.deepcopy(base), tmp_path / "a", "it"), LoadError)
    assert expected in text
    assert key in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "org/kernel"),
        ("_attn_implementation", "org/kernel@main:attention"),
        ("attn_implementation", {"text_config": "org/kernel"}),
        ("attn_implementation", "paged|org/kernel"),
        ("text_config", {"_attn_implementation_internal": "org/kernel"}),
        ("experts_implementation", "sonicmoe"),
    ],
)
def test_a_config_that_names_a_kernel_of_the_hub_is_refused_unless_it_is_trusted(key, value, base, copied, monkeypatch):
    """It is code from the network."""
    model = copied(base)
    spoil(model / "config.json", key, value)
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
        text = refusal(lambda: load_lm(model, device="cpu"), LoadError)
    assert "a program from the hub" in text
    assert "--trust-remote-code" in text
    tried = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: tried.append(1) or {}["loaded"])
    refusal(lambda: load_lm(model, device="cpu", trust_remote_code=True), LoadError)
    assert tried


@pytest.mark.parametrize("value", ["eager", "sdpa"])
def test_a_config_may_name_an_attention_that_transformers_has(value, base, copied):
    model = copied(base)
    spoil(model / "config.json", "attn_implementation", value)
    assert load_lm(model, device="cpu").config._attn_implementation == value


@pytest.mark.parametrize("value", ["", "many", [1], {"a": 1}])
def test_a_tokenizer_with_a_length_that_is_no_number_is_one_line(value, base, copied):
    model = copied(base)
    spoil(model / "tokenizer_config.json", "model_max_length", value)
    assert "model_max_length" in refusal(lambda: load_tokenizer(model), LoadError)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [("generation_config.json", "pad_token_id", "x"), ("tokenizer_config.json", "tokenizer_class", [1])],
)
def test_a_value_that_transformers_does_not_take_is_told_as_such(file, key, value, base, copied):
    model = copied(base)
    spoil(model / file, key, value)
    assert "one of its JSON files" in refusal(lambda: load_patient(model, device="cpu"), LoadError)


@pytest.mark.parametrize("name", ["doctor.json", "adapter_config.json"])
@pytest.mark.parametrize(
    "text", ["[" * 9999, '{"a":' * 9999, "", "null", "[]", "{", '"x"', "\ud800", '{"r": NaN}', "1" * 9999, "\xff\xfe"]
)
def test_what_is_no_json_is_one_line(name, text, spoilt):
    (spoilt / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    refusal(lambda: load_doctor(spoilt), LoadError)


def test_a_doctor_of_a_later_version_says_so(spoilt):
    spoil(spoilt / "doctor.json", "schema_version", 2)
    assert "update llmdoctor" in refusal(lambda: load_doctor(spoilt), VersionError)


# --- the rewards folder ----------------------------------------------------------------------------------------------


FACES = ("f",)


def side(pair: str, which: Any, length: int = 3) -> TokenScores:
    ids = np.arange(1, length + 1, dtype=np.int32)
    logs = {"f": np.full(length, -1.0, dtype=np.float32)}
    return TokenScores(pair, which, ids, ids, logs, logs, ids, logs, logs)


@pytest.fixture
def rewards(tmp_path):
    folder = tmp_path / "rewards"
    pairs = [PairScores(side(str(i), "chosen"), side(str(i), "rejected", 4)) for i in range(3)]
    shard = write_shard(folder, 0, pairs, FACES)
    meta = {
        "schema_version": SCHEMA_VERSION,
        "patient": {"model": "m", "fingerprint": "f"},
        "tokenizer": {"fingerprint": "t", "size": 10},
        "faces": {"f": {"positive": "+", "negative": "-"}},
        "dataset": {"source": "s", "fingerprint": "f"},
        "shards": {shard.name: file_checksum(shard)},
    }
    write_json(folder / "meta.json", meta)
    assert len(list(RewardsFolder(folder))) == 3
    return folder


def with_column(folder: Path, name: str, column: Any) -> None:
    """Another column under a right checksum."""
    shard = folder / "rewards-00000.parquet"
    table = pq.read_table(shard)
    at = table.schema.get_field_index(name)
    table = table.drop_columns([name]) if column is None else table.set_column(at, name, column(table[name]))
    pq.write_table(table, shard)
    spoil(folder / "meta.json", "shards", {shard.name: file_checksum(shard)})


def of(values: Any, kind: Any = None) -> Any:
    return lambda _: pa.array([values] * 6, kind)


LOGS, IDS = pa.list_(pa.float32()), pa.list_(pa.int32())


@pytest.mark.parametrize(
    ("name", "column", "words"),
    [
        ("positive.f", of([-1.0], LOGS), "1 values"),  # one element was broadcast
        ("positive.f", of([-1.0] * 9, LOGS), "9 values"),
        ("negative.f", of([float("nan")] * 3, LOGS), "not finite"),
        ("alternative_negative.f", of([float("-inf")] * 3, LOGS), "not finite"),
        ("negative.f", of([-1.0] * 3, pa.list_(pa.float64())), "expected lists of float"),
        ("negative.f", of("x"), "expected lists of float"),
        ("negative.f", of(None, LOGS), "expected lists of float"),
        ("negative.f", of([None] * 3, LOGS), "expected lists of float"),
        ("negative.f", None, "face pair 'f'"),
        ("alternative_positive.f", None, "alternative_positive.f"),
        ("response_ids", of([1, 2, 10], IDS), "beyond the 10 tokens"),
        ("prompt_ids", of([-1], IDS), "beyond the 10 tokens"),
        ("response_ids", of([], IDS), "empty response"),
        ("alternative_ids", of([1.0] * 3, LOGS), "expected lists of int32"),
        ("side", of(1), "expected texts"),
        ("pair_id", of(None, pa.string()), "expected texts"),
        ("side", of("chosen"), "not together"),
    ],
)
def test_a_shard_that_no_patient_made_is_refused_and_named(name, column, words, rewards):
    with_column(rewards, name, column)
    text = refusal(lambda: list(RewardsFolder(rewards)), LoadError)
    assert words in text
    assert "rewards-00000.parquet" in text


@pytest.mark.parametrize(
    "key", ["schema_version", "patient", "patient.fingerprint", "tokenizer", "tokenizer.size", "faces", "faces.f",
            "faces.f.positive", "dataset", "dataset.source", "shards", "counts", "skipped", "statistics"]
)  # fmt: skip
def test_a_meta_json_of_wrong_types_is_one_line(key, rewards):
    each_odd(rewards / "meta.json", key, RewardsMeta, lambda: list(RewardsFolder(rewards)))


@pytest.mark.parametrize("key", ["dataset", "dataset.source", "dataset.fingerprint", "tokenizer.fingerprint", "faces"])
def test_a_meta_json_without_a_key_that_is_read_is_one_line(key, rewards):
    """Each was a traceback of inspect or train."""
    data = json.loads((rewards / "meta.json").read_text())
    *parents, last = key.split(".")
    del (data[parents[0]] if parents else data)[last]
    write_json(rewards / "meta.json", data)
    text = refusal(lambda: RewardsFolder(rewards), LoadError)
    assert key in text
    assert "run extract again" in text


def test_a_shard_outside_of_the_folder_is_not_opened(rewards):
    spoil(rewards / "meta.json", "shards", ["../rewards/rewards-00000.parquet"])
    assert "shards" in refusal(lambda: RewardsFolder(rewards), LoadError)


def test_a_folder_of_a_later_version_says_so(rewards):
    spoil(rewards / "meta.json", "schema_version", 2)
    assert "run extract again" not in refusal(lambda: RewardsFolder(rewards), VersionError)


def test_a_probe_of_other_tokens_is_refused(rewards):
    odd = (torch.ones(21, 1), torch.ones(21, 21), torch.ones(21).bfloat16(), torch.ones(21).long(), torch.ones(()))
    for numbers in (torch.ones(5), torch.ones(22), torch.full((21,), float("nan")), *odd):
        save_file({"rewards": numbers}, rewards / "probe-00000.safetensors")
        files = {"probe-00000.safetensors": file_checksum(rewards / "probe-00000.safetensors")}
        write_json(rewards / "probe.json", {"files": files})
        refusal(lambda: list(RewardsFolder(rewards)), LoadError)
    save_file({"rewards": torch.ones(21)}, rewards / "probe-00000.safetensors")
    files = {"probe-00000.safetensors": file_checksum(rewards / "probe-00000.safetensors")}
    write_json(rewards / "probe.json", {"files": files})
    assert len(list(RewardsFolder(rewards))) == 3


def test_an_empty_prompt_is_refused_by_what_reads_behind_it(rewards, base, tmp_path):
    with_column(rewards, "prompt_ids", of([], IDS))
    known = load_tokenizer(base)
    spoil(rewards / "meta.json", "tokenizer", {"fingerprint": Vocabulary.of(known).fingerprint})
    start = lambda: train(  # noqa: E731
        rewards, tmp_path / "d", base_model=str(base), reward_settings=RewardSettings(), settings=TrainSettings()
    )
    assert "empty prompt" in refusal(start, LoadError)


# --- what is no file -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["FIFO", "socket", "device", "folder"])
def no_file(request, tmp_path, monkeypatch):
    path = tmp_path / "x"
    match request.param:
        case "FIFO":
            os.mkfifo(path)
        case "socket":
            monkeypatch.chdir(tmp_path)  # the path of a socket is short
            socket.socket(socket.AF_UNIX).bind("x")
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            path.mkdir()
    return path


def test_what_is_no_file_is_refused_at_once(no_file, doctor, spoilt, rewards, tmp_path):
    """A FIFO would be waited for, and /dev/zero has no end."""
    for name in ("data.jsonl", "p.yaml", "m.gguf"):
        (tmp_path / name).symlink_to(no_file)
    actions: list[Any] = [
        lambda: list(read_pairs(tmp_path / "data.jsonl")),
        lambda: read_questions(tmp_path / "data.jsonl"),
        lambda: load_profile(tmp_path / "p.yaml"),
        lambda: load_lm(tmp_path / "m.gguf"),
        lambda: read_json(no_file),
        lambda: read_tensors(no_file),
        lambda: load_patient(no_file),
    ]
    if not no_file.is_dir():
        actions.append(lambda: fingerprint(no_file))
    for action in actions:
        refusal(action)
    for folder, load in ((spoilt, load_doctor), (rewards, lambda folder: list(RewardsFolder(folder)))):
        for file in sorted(folder.iterdir()):
            if file.suffix in (".md", ".jinja"):
                continue
            kept = file.rename(tmp_path / "kept")
            file.symlink_to(no_file)
            refusal(lambda load=load, folder=folder: load(folder), LoadError)
            file.unlink()
            kept.rename(file)


@pytest.mark.parametrize(
    "name", ["~nobody/x", "~nobody/x.jsonl", "./" + "x" * 300, "./a\0b", "/proc/1/mem", "./\udcff"]
)
def test_a_path_that_cannot_be_is_one_line(name):
    for action in (load_patient, load_doctor, RewardsFolder, load_profile, lambda path: list(read_pairs(path))):
        refusal(lambda action=action: action(name))


def test_a_quantization_config_that_is_nested_deeply_says_nothing_of_bits(base, copied):
    model = copied(base)
    config = model / "config.json"
    config.write_text(
        config.read_text().replace("{", '{"quantization_config": ' + '{"a":' * 600 + "1" + "}" * 600 + ",", 1)
    )
    assert ModelSource.of(model).quantization() == {"method": "unknown"}


def test_a_file_that_may_not_be_read_is_one_line(spoilt, rewards, tmp_path, monkeypatch):
    for name in ("p.jsonl", "p.yaml"):
        (tmp_path / name).write_text("{}")
    real = io.open

    def refuse(path: Any, *rest: Any, **how: Any) -> Any:
        if str(path).startswith(str(tmp_path)):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *rest, **how)

    monkeypatch.setattr(io, "open", refuse)
    for action in (
        lambda: list(read_pairs(tmp_path / "p.jsonl")),
        lambda: read_questions(tmp_path / "p.jsonl"),
        lambda: load_profile(tmp_path / "p.yaml"),
        lambda: load_doctor(spoilt),
        lambda: RewardsFolder(rewards),
    ):
        assert "Permission denied" in refusal(action)


# --- numbers, tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    ["rho", "gamma", "lora_rank", "lora_alpha", "batch_size", "epochs", "max_steps", "learning_rate", "alternatives"],
)
@pytest.mark.parametrize("value", [1e308, 10**400, float("inf"), float("nan"), -(10**400)])
def test_numbers_that_no_run_has_are_refused_by_name(field, value):
    assert field in refusal(lambda: TrainSettings().replace(**{field: value}), UsageError)


def test_a_token_beyond_the_embedding_is_one_line(base, copied, tmp_path):
    model = copied(base)
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["<|picture|>"])
    tokenizer.save_pretrained(model)
    patient = load_patient(model, device="cpu")
    room = Sampling(max_new_tokens=2)
    assert (
        len(list(decode(patient, {}, [prompt_ids(tokenizer, conversation("hi"))], patient_alone, room, seed=[1]))) == 2
    )
    ids = prompt_ids(tokenizer, conversation("a <|picture|>"))
    assert "<|picture|>" in refusal(lambda: list(decode(patient, {}, [ids], patient_alone, room, seed=[1])), LoadError)
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "a <|picture|>", "chosen": "b", "rejected": "c"}))
    faces = {"f": FacePair("+", "-")}
    run = lambda: list(extract(patient, DataSettings(source=str(data)), faces, tmp_path / "r"))  # noqa: E731
    assert "<|picture|>" in refusal(run, LoadError)


def test_a_tokenizer_without_an_end_decodes_and_says_so_when_it_scores(base, copied, tmp_path):
    model = copied(base)
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        spoil(model / name, "eos_token" if "tok" in name else "eos_token_id", None)
    patient = load_patient(model, device="cpu")
    ids = prompt_ids(patient.tokenizer, conversation("hi"))
    assert len(list(decode(patient, {}, [ids], patient_alone, Sampling(max_new_tokens=3), seed=[1]))) == 3
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
    faces = {"f": FacePair("+", "-")}
    run = lambda: list(extract(patient, DataSettings(source=str(data)), faces, tmp_path / "r"))  # noqa: E731
    assert "end-of-sequence" in refusal(run, LoadError)
