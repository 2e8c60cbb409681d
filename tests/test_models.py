"""Loading real (tiny, random) models: the cut before the head, chunked log-probs, vocabulary, fingerprints, errors."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdoctor.errors import LLMDoctorError, LoadError, UsageError, VocabularyError
from llmdoctor.models import (
    SplitLM,
    Vocabulary,
    load_lm,
    load_patient,
    load_tokenizer,
    model_fingerprint,
    spare_threads,
    token_log_probs,
)

HEADS = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 16},  # eager float64 gives NaN where none is in sight
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.0625},
}


@pytest.mark.parametrize("kind", HEADS)
def test_split_lm_gives_the_models_own_logits(kind, tiny_model):
    """Also with right padding, and also when the model's logits grow after the cut was found (as training does).

    While its logits are tiny, a softcapped head gives the same numbers as a plain one.
    """
    model = load_lm(tiny_model(kind, initializer_range=0.02, **HEADS[kind]), dtype="float64")
    split = SplitLM.of(model)
    ids = torch.randint(5, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([12, 7, 1])[:, None]).long()
    with torch.inference_mode():
        for factor in (1.0, 30.0, 30.0):
            model.get_output_embeddings().weight.mul_(factor)
            expected = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            found = split.logits(split.hidden(ids, mask))
            torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-12)
    assert expected.abs().max() > 1


def test_split_lm_refuses_a_head_it_does_not_know(tiny_model, monkeypatch):
    model = load_lm(tiny_model("llama"))
    real = type(model).forward

    def strange(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = real(self, *args, **kwargs)
        out.logits = out.logits**3
        return out

    monkeypatch.setattr(type(model), "forward", strange)
    with pytest.raises(LoadError, match="LlamaForCausalLM"):
        SplitLM.of(model)


@pytest.mark.parametrize("chunk", [0, 1, 3, 11, 100])
def test_token_log_probs_are_the_full_log_softmax(chunk, tiny_model):
    """Over the shared tokens only, in values and in gradients, and with at most ``chunk`` rows of logits at a time."""
    model = load_lm(tiny_model("gemma2", rows=512, **HEADS["gemma2"]), dtype="float64")
    split, size = SplitLM.of(model), 400
    rows: list[int] = []

    def watched(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return split.logits(hidden)

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(11, 16, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, size, (11,), generator=generator)
    pull = torch.randn(11, generator=generator, dtype=torch.float64)
    head = model.get_output_embeddings().weight.requires_grad_()
    found = token_log_probs(SplitLM(split.backbone, watched), hidden, ids, full(size), chunk)
    expected = split.logits(hidden)[:, :size].log_softmax(dim=1)[torch.arange(11), ids]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found_grads = torch.autograd.grad((found * pull).sum(), [hidden, head])
    torch.testing.assert_close(found_grads, torch.autograd.grad((expected * pull).sum(), [hidden, head]))
    assert max(rows) <= (chunk or 11)
    with torch.no_grad():
        torch.testing.assert_close(token_log_probs(split, hidden, ids, full(size), chunk), expected)


def full(size: int) -> Vocabulary:
    """Every id has a token."""
    return Vocabulary({str(i): i for i in range(size)}, size)


def test_token_log_probs_of_nothing_and_in_half_precision(tiny_model):
    model = load_lm(tiny_model("llama"), dtype="bfloat16")
    split = SplitLM.of(model)
    hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = token_log_probs(split, hidden, torch.arange(4), full(400), 2)
    assert found.dtype == torch.float32
    expected = split.logits(hidden)[:, :400].double().log_softmax(dim=1).diagonal()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    assert token_log_probs(split, hidden[:0], torch.arange(0), full(400)).shape == (0,)


def test_padded_embeddings_of_different_heights_share_a_vocabulary(shared, tiny_model):
    """As Qwen2.5-7B (152,064 rows) and 1.5B (151,936) do: 151,646 real tokens here, none unused."""
    qwen = load_tokenizer(shared / "qwen2-tokenizer")
    sizes = {"hidden_size": 2, "num_attention_heads": 1, "head_dim": 2, "num_hidden_layers": 1}
    patient, doctor = (
        load_patient(tiny_model("qwen2", rows=rows, tokenizer=qwen, **sizes)) for rows in (152_064, 151_936)
    )
    assert patient.model.get_output_embeddings().weight.shape[0] == 152_064
    patient.vocabulary.require_same(doctor.vocabulary, "patient", "doctor")
    assert patient.vocabulary.size == doctor.vocabulary.size == 151_646
    assert patient.vocabulary.fingerprint == doctor.vocabulary.fingerprint
    padded = torch.randn(152_064)
    assert torch.equal(patient.vocabulary.mask(padded), padded[:151_646])


@pytest.mark.parametrize(
    ("patient", "doctor", "token", "places"),
    [
        ({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1, "x": 2}, "c", ("2", "none")),
        ({"a": 0, "b": 1, "c": 2}, {"a": 0, "c": 1, "b": 2}, "b", ("1", "2")),
        ({"a": 0, "b": 1}, {"a": 0, "b": 1, "<|extra|>": 2}, "<|extra|>", ("none", "2")),
        ({"a": 0, "b": 1, "line\nbreak": 2}, {"a": 0, "b": 1}, "line\\nbreak", ("2", "none")),
    ],
)
def test_the_first_differing_token_is_named(patient, doctor, token, places):
    mine, theirs = (Vocabulary(ids, max(ids.values()) + 1) for ids in (patient, doctor))
    assert mine.fingerprint != theirs.fingerprint
    with pytest.raises(VocabularyError) as caught:
        mine.require_same(theirs, "the patient P/big", "the doctor ./D")
    message = str(caught.value)
    assert f"'{token}'" in message
    assert f"id {places[0]} in the patient P/big and {places[1]} in the doctor ./D" in message
    assert "\n" not in message


def test_real_tokenizers_that_differ_in_one_added_token(tiny_tokenizer, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path)
    other = load_tokenizer(tmp_path)
    Vocabulary.of(tiny_tokenizer).require_same(Vocabulary.of(other), "a", "b")
    other.add_tokens(["<|tool|>"])
    with pytest.raises(VocabularyError, match=r"<\|tool\|>"):
        Vocabulary.of(tiny_tokenizer).require_same(Vocabulary.of(other), "a", "b")


def test_ids_without_a_token_are_masked_from_any_start():
    gaps = Vocabulary({"a": 0, "b": 3, "also b": 3, "c": 4}, 5)
    logits, least = torch.arange(7, dtype=torch.bfloat16), torch.finfo(torch.float32).min
    assert gaps.mask(logits).tolist() == [0, least, least, 3, 4]
    assert gaps.mask(logits[2:], 2).tolist() == [least, 3, 4]
    assert gaps.mask(logits[2:3], 2).tolist() == [least]
    assert gaps.mask(logits.double()).dtype == torch.float64


def test_fingerprints(tiny_model, copied):
    """Equal wherever the files lie; another for one changed weight, and another for another config."""
    folder = tiny_model("llama", rows=40_000)  # 5 MB: more than is read
    copy = copied(folder)
    original = model_fingerprint(folder)
    assert model_fingerprint(copy) == original
    weights = copy / "model.safetensors"
    untouched = weights.read_bytes()
    for at in (500_000, -5):
        data = bytearray(untouched)
        data[at] ^= 1
        weights.write_bytes(data)
        assert model_fingerprint(copy) != original
    weights.write_bytes(untouched)
    assert model_fingerprint(copy) == original
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert model_fingerprint(copy) != original


def test_patient_reads_context_and_every_end_token(tiny_model, copied):
    folder = copied(tiny_model("llama"))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [3, 4]}))
    patient = load_patient(folder)
    assert patient.context == 256
    assert patient.eos_ids == {3, 4, patient.tokenizer.eos_token_id}
    assert not any(p.requires_grad for p in patient.model.parameters())
    assert not patient.model.training


def test_real_patient_continues_its_story(stories):
    """The continuation that the data's README states, through our loader."""
    patient = load_patient(stories)
    ids = patient.tokenizer("Once upon a time, there was a little dog", return_tensors="pt")
    out = patient.model.generate(**ids, max_new_tokens=40, do_sample=False)
    said = patient.tokenizer.decode(out[0], skip_special_tokens=True)
    assert "named Max. Max loved to play with his toys and run around." in said
    assert (patient.context, patient.vocabulary.size, patient.eos_ids) == (512, 512, {2})


def spoil(folder: Any, how: str) -> None:
    match how:
        case "no config":
            (folder / "config.json").unlink()
        case "config is not JSON":
            (folder / "config.json").write_text('{"model_type": "llama",')
        case "unknown architecture":
            (folder / "config.json").write_text('{"model_type": "martian"}')
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "weights cut short":
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1000])
        case "weights of another shape":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
        case "weights missing":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
        case "no tokenizer":
            (folder / "tokenizer.json").unlink()
            (folder / "tokenizer_config.json").unlink()
        case "tokenizer is not JSON":
            (folder / "tokenizer.json").write_text("{")
        case "empty":
            for file in folder.iterdir():
                file.unlink()


@pytest.mark.parametrize(
    "how",
    [
        "no config",
        "config is not JSON",
        "unknown architecture",
        "no weights",
        "weights cut short",
        "weights of another shape",
        "weights missing",
        "no tokenizer",
        "tokenizer is not JSON",
        "empty",
    ],
)
def test_a_folder_that_cannot_be_loaded_is_one_clear_line(how, tiny_model, copied):
    folder = copied(tiny_model("llama"))
    spoil(folder, how)
    says_so(str(folder))


@pytest.mark.parametrize("name", ["./no/such/model", "/no/such/model", "nosuchmodel", "a/b/c/d", "~/nosuchmodel"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name, asked):
    says_so(name)
    with pytest.raises(LoadError):
        model_fingerprint(name)


def test_a_hub_name_that_is_not_here_offline(monkeypatch, asked):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    says_so("no-such-org/no-such-model")
    with pytest.raises(LoadError):
        model_fingerprint("no-such-org/no-such-model")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The hosts that are looked for while a test runs: there must be none."""
    found: list[Any] = []

    def look(*host: Any, **_: Any) -> None:
        found.append(host)
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", look)
    monkeypatch.setattr("socket.socket.connect", look)
    yield found
    assert found == []


def says_so(source: str) -> None:
    with pytest.raises(LoadError) as caught:
        load_patient(source)
    assert "\n" not in str(caught.value)
    assert source in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("option", "value"), [("dtype", "float33"), ("dtype", "int8"), ("device", "abacus")])
def test_dtype_and_device_that_do_not_exist(option, value, tiny_model):
    with pytest.raises(UsageError, match=f"{option}.*{value}"):
        load_lm(tiny_model("llama"), **{option: value})
    assert issubclass(UsageError, LLMDoctorError)


@pytest.mark.parametrize(("omp", "small", "expected"), [(None, True, 1), (None, False, 2), ("2", True, 2)])
def test_a_small_model_leaves_the_other_cores_alone(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, omp: str | None, small: bool, expected: int
) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    model = load_lm(tiny_model())
    if not small:
        monkeypatch.setattr("llmdoctor.models._SMALL", model.num_parameters())
    try:
        torch.set_num_threads(2)
        spare_threads(model)
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_a_hub_out_of_reach_is_said_within_seconds(monkeypatch):
    from huggingface_hub import constants

    from llmdoctor.model_source import hub_offline

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for proxy in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    hub_offline.cache_clear()
    try:
        with pytest.raises(LoadError, match=r"127.0.0.1 cannot be reached, and it is not in the cache"):
            load_tokenizer("org/name")
    finally:
        hub_offline.cache_clear()
