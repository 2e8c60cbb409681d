"""Doctors that are a head on the patient's own states: in training, in their folder, and in decoding."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmdoctor import LLMdoctor
from llmdoctor.decoding.batch import Batch
from llmdoctor.decoding.caches import BACKENDS
from llmdoctor.decoding.caches.dynamic import DynamicKV
from llmdoctor.decoding.drafting import FixedLength
from llmdoctor.decoding.prefix import PrefixCache
from llmdoctor.errors import LoadError, UsageError
from llmdoctor.models import SplitLM, Vocabulary, load_lm, token_log_probs
from llmdoctor.settings import Guidance, TrainSettings
from llmdoctor.training.doctor import HeadAdapter, new_doctor
from llmdoctor.training.folder import HEAD, load_doctor, save_doctor
from tests.test_batch import requests
from tests.test_decode import PROMPTS, doctor_of, patient_of, tiny
from tests.test_speculative import Erratic, run, same

META = {"name": "kind", "settings": {"train": {"anchor": True, "method": "head"}}}


def twins(model: Any, rank: int = 3, seed: int = 2) -> tuple[Any, Any]:
    """A head on the model, and the same doctor as a model of its own: the naive form."""
    generator = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    down = torch.randn(rank, head.in_features, generator=generator).double()
    up = torch.randn(head.out_features, rank, generator=generator).double()
    whole = copy.deepcopy(model)
    whole.lm_head = nn.Linear(head.in_features, head.out_features, bias=False).double()
    whole.lm_head.weight.data = head.weight + up @ down
    shared = doctor_of(model, "kind", base=model, head=HeadAdapter(down, up))
    return shared, doctor_of(whole.eval().requires_grad_(False), "kind", base=copy.deepcopy(model))


@pytest.mark.parametrize(
    ("mode", "drafting", "prompts"),
    [
        ("product", None, PROMPTS[:1]),
        ("ratio", FixedLength(3), PROMPTS[:1]),
        ("ratio", None, PROMPTS),
        ("product", Erratic(), PROMPTS),
    ],
    ids=["one, plain", "one, drafted", "batch, plain", "batch, drafted"],
)
def test_a_head_is_the_doctor_with_these_weights(mode: Any, drafting: Any, prompts: list[list[int]]) -> None:
    """Token for token in float64, values and log-probs too; alone, and beside a doctor that drafts."""
    model, other = tiny("llama"), doctor_of(tiny("llama", seed=1), "safe", base=tiny("llama", seed=4))
    head, whole = twins(model)
    for others in ([], [other]):
        betas = {"kind": 0.7, **({"safe": 0.4} if others else {})}
        guidance = Guidance(betas=betas, mode=mode, plausibility=0.02)
        how = {"max_new_tokens": 14, "top": 3, "seed": 5, "drafting": drafting}
        same(
            run(patient_of(model), [head, *others], prompts, guidance, **how),
            run(patient_of(model), [whole, *others], prompts, guidance, **how),
        )


def test_a_head_alone_costs_no_forward_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "cpu", DynamicKV)  # a recorded step is no call
    model = tiny("llama")
    head, _ = twins(model)
    calls = []
    forward = type(model.base_model).forward
    monkeypatch.setattr(
        type(model.base_model), "forward", lambda *a, **k: calls.append(k["input_ids"].shape[1]) or forward(*a, **k)
    )
    guidance = Guidance(betas={"kind": 0.5}, mode="ratio")
    (steps,) = run(patient_of(model), [head], [PROMPTS[0]], guidance, max_new_tokens=9)
    assert calls == [len(PROMPTS[0]), *[1] * len(steps)]  # the last one for the value of the last token


def test_rows_with_a_head_join_and_are_answered_as_if_alone() -> None:
    model = tiny("llama")
    head, whole = twins(model)
    results = []
    for doctor in (head, whole):
        doctors = {"a": doctor, "b": doctor_of(tiny("llama", seed=1), base=tiny("llama", seed=4))}
        batch = Batch(patient_of(model), doctors, drafting=FixedLength(2), with_bases=True)
        asked, steps = requests("ratio"), []
        batch.join(asked[:2])
        for number in range(40):
            if number == 3:
                batch.join(asked[2:])
            if not batch:
                break
            steps += list(batch.round())
        results.append([[step for step in steps if step.row == row] for row in range(len(asked))])
    same(*results)


def test_a_conversation_with_a_head_goes_on_in_its_caches() -> None:
    model = tiny("llama")
    head, whole = twins(model)
    found = []
    for doctor in (head, whole):
        cache, steps = PrefixCache(), []
        prompt = list(PROMPTS[0])
        for turn in range(3):
            how = {"max_new_tokens": 5, "seed": turn, "prefix_cache": cache}
            rows = run(patient_of(model), [doctor], [prompt], Guidance(betas={"kind": 0.9}), **how)
            steps += rows
            prompt = [*prompt, *[s.token.id for s in rows[0]], 3, 4]
        found.append((steps, cache.prefilled))
    same(found[0][0], found[1][0])
    assert found[0][1] <= found[1][1]  # the patient has read the last token too


@pytest.fixture
def base(tiny_model: Callable[..., Path]) -> Path:
    """Embeddings and head are the same tensor, as in most small models."""
    return tiny_model("llama", tie_word_embeddings=True)


def trained_head(base: Path, folder: Path) -> Any:
    doctor, tokenizer = new_doctor(base, TrainSettings(method="head", lora_rank=3, rho=4.0))
    generator = torch.Generator().manual_seed(5)
    for _, p in sorted((n, p) for n, p in doctor.named_parameters() if p.requires_grad):
        p.data += 0.2 * torch.randn(p.shape, generator=generator)
    save_doctor(folder, doctor, tokenizer, {"base_model": str(base), **META})
    return doctor


def test_a_head_is_loaded_as_it_was_trained(base: Path, tmp_path: Path) -> None:
    """Also where the base's head is tied to its embeddings: they stay what they were."""
    doctor = trained_head(base, tmp_path / "d")
    names = [name for name, p in doctor.named_parameters() if p.requires_grad]
    assert len(names) == 4  # down and up, and the value head's weight and bias
    ids = torch.tensor([[3, 9, 1, 20, 7]])
    with torch.no_grad():
        states = doctor.lm.base_model(input_ids=ids).last_hidden_state
        moved = states + doctor.change.scale * doctor.change.up(doctor.change.down(states))
        expected = doctor.lm.lm_head(moved)
        # training scores with the same logits
        lengths = {"prompt_lengths": torch.tensor([2]), "response_lengths": torch.tensor([3])}
        scored = doctor(ids, torch.ones_like(ids), **lengths, scored=1).logprobs_B_T
        assert doctor.vocabulary.size == expected.shape[-1]
        said = expected[0, 1:4].log_softmax(dim=-1).gather(1, ids[0, 2:, None])[:, 0]
        torch.testing.assert_close(scored[0], said, rtol=1e-5, atol=1e-5)
        with doctor.base_alone():
            plain = doctor(ids, torch.ones_like(ids), **lengths, scored=1).logprobs_B_T
        said = doctor.lm(input_ids=ids).logits[0, 1:4].log_softmax(dim=-1).gather(1, ids[0, 2:, None])[:, 0]
        torch.testing.assert_close(plain[0], said, rtol=1e-5, atol=1e-5)
    loaded = load_doctor(tmp_path / "d")
    out = loaded.model(input_ids=ids, output_hidden_states=True)
    hidden = loaded.model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(loaded.logits(out.logits, hidden), expected, rtol=1e-4, atol=1e-4)
    plain = load_lm(base)
    assert torch.equal(loaded.model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert not torch.allclose(out.logits, expected, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["phi", "granite"])
def test_the_change_goes_through_the_head_as_it_is(tiny_model: Callable[..., Path], kind: str, dtype: Any) -> None:
    """Without the head's bias, with the scale of the logits, and small beside logits in bfloat16: float64 twin."""
    model = load_lm(tiny_model(kind, **({"logits_scaling": 4.0} if kind == "granite" else {})), dtype="float32")
    head = model.get_output_embeddings()
    if head.bias is not None:
        head.bias.data += 5.0
    model, split = model.to(dtype), SplitLM.of(model.to(dtype))
    generator = torch.Generator().manual_seed(3)
    down, up = torch.randn(3, 16, generator=generator), 0.01 * torch.randn(16, 3, generator=generator)
    hidden = torch.randn(5, 16, generator=generator).to(dtype)
    expected = hidden.double() @ down.T.double() @ up.T.double() @ head.weight.T.double()
    expected = expected / (4.0 if kind == "granite" else 1.0)
    adapter = HeadAdapter.of(split, head, down, up)
    change = adapter(torch.zeros(1), hidden)
    atol = (1e-6 if dtype is torch.float32 else 1e-2) * float(expected.abs().max())
    torch.testing.assert_close(change.double(), expected, atol=atol, rtol=0)
    # training scores with the very same logits
    ids = torch.arange(5)
    vocabulary = Vocabulary({str(i): i for i in range(head.out_features)}, head.out_features)
    scored = token_log_probs(split, hidden, ids, vocabulary, change=adapter)
    logits = split.logits(hidden).float() + change
    torch.testing.assert_close(scored, logits.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0])


def test_the_patient_is_loaded_once(base: Path, tmp_path: Path) -> None:
    trained_head(base, tmp_path / "d")
    assistant = LLMdoctor(str(base), tmp_path / "d", beta=0.7, mode="ratio", device="cpu")
    (doctor,) = assistant._doctors.values()
    assert doctor.model is assistant.patient.model
    assert doctor.base is assistant.patient.model
    assert (tmp_path / "d" / HEAD).stat().st_size < 4 * 2 * 3 * 16 + 1000
    assert not list((tmp_path / "d").glob("*token*")), "a head uses the tokenizer of its base"
    # at beta 0 it is the patient, token for token
    assert assistant.generate("Hello", seed=1, max_new_tokens=8, guidance=Guidance()) == "".join(
        token.text for token in assistant.stream("Hello", seed=1, max_new_tokens=8, guided=False)
    )


def test_heads_that_do_not_fit_are_refused(base: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    trained_head(base, tmp_path / "d")
    wider = tiny_model("llama", hidden_size=24)
    with pytest.raises(LoadError, match="is not the base of the doctor"):
        load_doctor(tmp_path / "d", base=wider)
    marker = tmp_path / "d" / "doctor.json"
    known = json.loads(marker.read_text())
    del known["base_fingerprint"]  # as in folders of version 0.1.0
    marker.write_text(json.dumps(known))
    with pytest.raises(LoadError, match=r"the shapes \[3, 16\] and \[16, 3\]; the head of its base reads 24"):
        load_doctor(tmp_path / "d", base=wider)
    with pytest.raises(UsageError, match="capped"):
        new_doctor(tiny_model("gemma2", final_logit_softcapping=3.0), TrainSettings(method="head"))
