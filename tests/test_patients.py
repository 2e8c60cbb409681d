"""Patients of every other kind: adapters, quantised checkpoints, where the weights go and in which dtype."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import llmdoctor.models as loading
from llmdoctor.adapters import merged_adapter
from llmdoctor.cli.main import app
from llmdoctor.errors import LoadError, UsageError
from llmdoctor.model_source import ModelSource
from llmdoctor.models import load_lm, load_patient, model_fingerprint
from llmdoctor.records import FacePair
from llmdoctor.settings import DataSettings, PatientSettings, TrainSettings
from llmdoctor.token_rewards.extract import extract
from llmdoctor.training.doctor import new_doctor
from llmdoctor.training.folder import base_record, load_doctor, save_doctor

IDS = torch.arange(5, 45)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@pytest.fixture
def adapter(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A LoRA adapter that changes the model, and its base beside it."""
    shutil.copytree(tiny_model("llama"), tmp_path / "base")
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_its_base_with_the_adapter_merged_in(adapter: Path) -> None:
    """With the base's tokenizer, for it has none of its own."""
    base = adapter.parent / "base"
    patient = load_patient(adapter)
    expected = PeftModel.from_pretrained(load_lm(base), str(adapter)).merge_and_unload()
    assert torch.equal(logits(patient.model), logits(expected))
    assert not torch.equal(logits(patient.model), logits(load_lm(base)))
    assert not isinstance(patient.model, PeftModel)
    assert not any(p.requires_grad for p in patient.model.parameters())
    assert patient.vocabulary.ids == load_patient(base).vocabulary.ids
    assert patient.name == str(adapter)


def test_an_adapters_fingerprint_is_that_of_both(adapter: Path) -> None:
    base = adapter.parent / "base"
    found = model_fingerprint(adapter)
    assert found not in {model_fingerprint(base), ""}
    shutil.copytree(adapter, adapter.parent / "copy")
    assert model_fingerprint(adapter.parent / "copy") == found
    for file in (base / "model.safetensors", adapter / "adapter_model.safetensors"):
        untouched = file.read_bytes()
        file.write_bytes(untouched[:-1] + bytes([untouched[-1] ^ 1]))
        assert model_fingerprint(adapter) != found
        file.write_bytes(untouched)
    assert model_fingerprint(adapter) == found


@pytest.mark.parametrize(("length", "says"), [(2, "names itself"), (3, "names itself"), (40, "more than 10 bases")])
def test_adapters_that_name_each_other_as_their_base_are_one_clear_line(
    adapter: Path, length: int, says: str, tmp_path: Path
) -> None:
    """Each is the base of the one before; a ring of them was followed until Python's stack ended."""
    ring = [Path(shutil.copytree(adapter, tmp_path / f"ring{number}")) for number in range(length)]
    for one, behind in zip(ring, [*ring[1:], ring[0]], strict=True):
        config = json.loads((one / "adapter_config.json").read_text())
        (one / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(behind)}))
    for action in (load_patient, model_fingerprint):
        with pytest.raises(LoadError, match=says) as refused:
            action(str(ring[0]))
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("base", "says"),
    [(None, "names no base"), ("/no/such/base", "no model at"), ("itself", "names itself"), ("another shape", "size")],
)
def test_an_adapter_without_its_base_is_one_clear_line(
    adapter: Path, base: str | None, says: str, tiny_model: Callable[..., Path]
) -> None:
    places = {"itself": str(adapter), "another shape": str(tiny_model("llama", hidden_size=32))}
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": places.get(str(base), base)}))
    with pytest.raises(LoadError, match=says) as caught:
        load_patient(adapter)
    assert "\n" not in str(caught.value)


QUANTISED = {
    "bitsandbytes": ({"load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"}, 4, "bitsandbytes"),
    "gptq": ({"bits": 4, "group_size": 128, "desc_act": False}, 4, "gptqmodel"),
    "awq": ({"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}, 4, "gptqmodel"),
    "torchao": (
        {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}}},
        8,
        "torchao",
    ),
    "compressed-tensors": (
        {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}}}},
        8,
        "compressed-tensors",
    ),
}


@pytest.mark.parametrize("method", QUANTISED)
def test_a_missing_package_is_named(method: str, tiny_model: Callable[..., Path], copied: Callable[..., Path]) -> None:
    """And what the checkpoint says of its quantisation can be read without it."""
    settings, bits, package = QUANTISED[method]
    if importlib.util.find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    folder = copied(tiny_model("llama"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": method, **settings}})
    )
    assert ModelSource.of(folder).quantization() == {"method": method, "bits": bits}
    with pytest.raises(LoadError, match=f"pip install {package}") as caught:
        load_patient(folder)
    assert "\n" not in str(caught.value)


def torchao_int8(source: Path, folder: Path) -> None:
    """All linear layers and the head hold 8-bit integers."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    how = TorchAoConfig(Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=how).save_pretrained(folder)


def compressed_int8(source: Path, folder: Path) -> None:
    """All linear layers but the head are packed 8-bit integers."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = QuantizationArgs(num_bits=8, symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            module.weight_scale.data = module.weight.detach().abs().amax(dim=1, keepdim=True) / 127
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


@pytest.mark.parametrize(("package", "quantise"), [("torchao", torchao_int8), ("compressed_tensors", compressed_int8)])
def test_a_quantised_patient_is_scored(
    package: str, quantise: Callable[[Path, Path], None], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Its log-probs are near those of the model before, and are those of its plain forward."""
    pytest.importorskip(package, reason=f"not installed: pip install {package.replace('_', '-')}")
    source = tiny_model("llama")
    before = load_patient(source)
    quantise(source, tmp_path / "quantised")
    before.tokenizer.save_pretrained(tmp_path / "quantised")
    patient = load_patient(tmp_path / "quantised")
    assert patient.quantization == {"method": package.replace("_", "-"), "bits": 8}
    assert before.quantization is None
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "How?", "chosen": "Go to bed.", "rejected": "No."}))
    faces = {"f": FacePair("Be kind.", "Be rude.")}
    data = DataSettings(source=str(tmp_path / "pairs.jsonl"))
    (found,), (expected,) = (
        list(extract(one, data, faces, tmp_path / name)) for one, name in ((patient, "a"), (before, "b"))
    )
    difference = abs(found.chosen.positive["f"] - expected.chosen.positive["f"])
    assert 0 < difference.mean() < 0.2
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How?"}]
    prompt = patient.tokenizer.apply_chat_template(system, add_generation_prompt=True)["input_ids"]
    answer = found.chosen.response_ids.tolist()
    with torch.inference_mode():
        scored = patient.model(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    plain = [float(scored[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)]
    assert found.chosen.positive["f"].tolist() == pytest.approx(plain, abs=1e-4)
    with pytest.raises(UsageError, match="quantised"):
        new_doctor(tmp_path / "quantised", TrainSettings(method="full"))


def test_the_rewards_and_the_doctor_say_how_the_patient_is_quantised(
    tiny_gguf: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmdoctor.settings import RewardSettings
    from llmdoctor.training.train import train

    pytest.importorskip("gguf")
    monkeypatch.setenv("LLMDOCTOR_CACHE", str(tmp_path / "cache"))
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Q{i}", "chosen": "Go to bed.", "rejected": "No."}) + "\n" for i in range(4))
    )
    faces, data = {"f": FacePair("Be kind.", "Be rude.")}, DataSettings(source=str(tmp_path / "pairs.jsonl"))
    for patient, expected in ((tiny_gguf(), {"method": "gguf", "type": "F32"}), (tiny_model("llama"), None)):
        rewards, doctor = (tmp_path / f"{stage}-{patient.stem}" for stage in ("rewards", "doctor"))
        list(extract(load_patient(patient), data, faces, rewards))
        settings = TrainSettings(max_steps=1, batch_size=2, lora_rank=1)
        train(rewards, doctor, base_model=str(tiny_gguf()), reward_settings=RewardSettings(), settings=settings)
        stored = json.loads((doctor / "doctor.json").read_text())
        assert stored["rewards"]["patient_quantization"] == expected
        assert stored["rewards"]["patient_fingerprint"] == model_fingerprint(patient)
    # a doctor whose base is a GGUF
    assert stored["base_model"] == str(tiny_gguf())
    assert torch.isfinite(logits(load_doctor(doctor, with_base=True).model)).all()


def test_a_cpu_with_bfloat16_keeps_small_models_and_training_in_float32(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model("llama")
    monkeypatch.setattr(loading, "_cpu_has_bfloat16", lambda: True)
    assert load_lm(folder, device="cpu").dtype == torch.float32
    monkeypatch.setattr(loading, "_SMALL", 100)
    assert load_lm(folder, device="cpu").dtype == torch.bfloat16
    assert load_lm(folder, device="cpu", dtype="float32").dtype == torch.float32
    for method in ("lora", "full"):
        doctor, _ = new_doctor(folder, TrainSettings(method=method, device="cpu"))
        assert {p.dtype for p in doctor.parameters()} == {torch.float32}
    monkeypatch.setattr(loading, "_cpu_has_bfloat16", lambda: False)
    assert load_lm(folder, device="cpu").dtype == torch.float32


def test_the_files_tell_the_number_of_parameters_so_a_small_model_is_loaded_once(
    adapter: Path, tiny_gguf: Callable[..., Path], tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_cpu_has_bfloat16", lambda: True)
    loaded: list[torch.dtype] = []
    whole = loading.load_checked
    monkeypatch.setattr(
        loading, "load_checked", lambda *args, **how: (loaded.append(how["dtype"]), whole(*args, **how))[1]
    )
    for model in (tiny_model("llama"), tiny_model("gemma3_text"), adapter, tiny_gguf()):
        assert load_lm(model, device="cpu").num_parameters() == ModelSource.of(model).parameters(), model
    assert loaded == [torch.float32] * 4


def test_attention_and_places_reach_the_model(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    plain = load_lm(folder, device="cpu")
    for how in (
        {"attn_implementation": "eager"},
        {"device_map": "cpu"},
        {"device_map": {"model": "cpu", "lm_head": "cpu"}},
    ):
        placed = load_patient(folder, **PatientSettings(model=str(folder), **how).loading()).model
        torch.testing.assert_close(logits(placed), logits(plain), rtol=1e-5, atol=1e-5)
        assert placed.config._attn_implementation == how.get("attn_implementation", "sdpa")
    with pytest.raises(LoadError, match="no_such_attention"):
        load_lm(folder, attn_implementation="no_such_attention")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"device": "cpu", "device_map": "auto"}, "give one of them"),
        ({"device_map": "cpu", "tp_plan": "auto"}, "give one of them"),
        ({"tp_plan": "auto"}, "torchrun"),
        ({"device_map": {"model": "abacus"}}, "abacus"),
    ],
)
def test_places_that_cannot_be(how: dict[str, object], says: str, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises((UsageError, LoadError), match=says) as caught:
        load_lm(tiny_model("llama"), **how)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [
        ("--attn-implementation", "eager", 0),
        ("--device-map", '{"": "cpu"}', 0),
        ("--device-map", '{"": ', 2),
        ("--device-map", "nowhere", 2),
        ("--tp-plan", "auto", 2),  # no torchrun
        ("--tp-plan", "some", 2),
    ],
)
def test_the_options_of_the_commands(option: str, value: str, code: int) -> None:
    asked = ["compare", "How can I sleep better?", "--json", "--max-new-tokens", "2", "--seed", "1"]
    result = CliRunner().invoke(app, [*asked, option, value])
    assert getattr(result.exception, "exit_code", result.exit_code) == code, (result.output, result.exception)


def saved(base: str | Path, folder: Path) -> Path:
    doctor, tokenizer = new_doctor(base, TrainSettings(lora_rank=2))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in doctor.lm.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_doctor(folder, doctor, tokenizer, {"name": "kind", "base_model": str(base)})
    return folder


def test_a_doctor_finds_its_base_or_says_which_one(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Where it was; where it lies beside the doctor; where the user says; by its fingerprint everywhere."""
    shutil.copytree(tiny_model("llama"), tmp_path / "here" / "base")
    folder = saved(tmp_path / "here" / "base", tmp_path / "here" / "out" / "doctor")
    stored = json.loads((folder / "doctor.json").read_text())
    fingerprint = model_fingerprint(tiny_model("llama"))
    assert (stored["base_model"], stored["base_fingerprint"]) == (str(tmp_path / "here" / "base"), fingerprint)
    expected = logits(load_doctor(folder).model)
    shutil.copytree(folder, tmp_path / "published")  # the base stays where it was
    assert torch.equal(logits(load_doctor(tmp_path / "published").model), expected)
    (tmp_path / "here").rename(tmp_path / "there")  # both have moved
    folder = tmp_path / "there" / "out" / "doctor"
    assert torch.equal(logits(load_doctor(folder, with_base=True).model), expected)
    with pytest.raises(LoadError) as caught:
        load_doctor(tmp_path / "published")
    for part in ("--doctor-base", fingerprint[:12], str(tmp_path / "here" / "base")):
        assert part in str(caught.value)
    given = load_doctor(tmp_path / "published", base=tiny_model("llama"), with_base=True)
    assert torch.equal(logits(given.model), expected)


def test_another_model_is_not_taken_for_the_base(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Neither where the base was, nor where the user says."""
    shutil.copytree(tiny_model("llama"), tmp_path / "base")
    folder, other = saved(tmp_path / "base", tmp_path / "doctor"), tiny_model("llama", seed=5)
    with pytest.raises(LoadError, match="is not the base of the doctor"):
        load_doctor(folder, base=other)
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(other, tmp_path / "base")
    with pytest.raises(LoadError, match="--doctor-base"):
        load_doctor(folder)
    load_doctor(folder, base=tiny_model("llama"))


def test_a_base_in_the_doctor_folder(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Put there afterwards it is found, wherever the folder goes; a new doctor does not overwrite it."""
    folder = saved(tiny_model("llama"), tmp_path / "doctor")
    expected = logits(load_doctor(folder).model)
    stored = json.loads((folder / "doctor.json").read_text())
    shutil.copytree(tiny_model("llama"), folder / "base")
    (folder / "doctor.json").write_text(json.dumps({**stored, "base_model": "./base", "base_beside": ""}))
    moved = folder.rename(tmp_path / "moved")
    assert torch.equal(logits(load_doctor(moved).model), expected)
    with pytest.raises(UsageError, match="lies in the doctor folder"):
        saved(moved / "base", moved)
    assert (moved / "base" / "config.json").is_file()


def test_a_package_stays_the_reference(smollm: str, tmp_path: Path) -> None:
    """Of a base in a package, doctor.json holds no path of this machine."""
    record = base_record(smollm, tmp_path / "doctor")
    assert record == {"base_model": smollm, "base_fingerprint": model_fingerprint(smollm)}


def test_an_adapter_of_a_real_model_is_merged_in_bfloat16(smollm: str, tmp_path: Path) -> None:
    """Rounding is not taken for another adapter."""
    base = load_lm(smollm, dtype="bfloat16")
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.005)
    adapted.save_pretrained(tmp_path / "adapter")
    merged_adapter(adapted.unload(), tmp_path / "adapter", "kind")
