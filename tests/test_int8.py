"""The patient in 8 bits: its numbers, its memory, and that it drafts what the guided patient will say."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmdoctor import LLMdoctor
from llmdoctor.decoding import caches
from llmdoctor.decoding.batch import Batch
from llmdoctor.decoding.caches import static
from llmdoctor.decoding.int8 import Int8Linear, draft_of, int8_copy, is_faster
from llmdoctor.decoding.prefix import PrefixCache, SharedPrefixes
from llmdoctor.decoding.rows import Request
from llmdoctor.errors import UsageError
from llmdoctor.models import load_patient
from llmdoctor.settings import Guidance, Sampling
from tests.test_decode import PROMPTS, doctor_of, ids_of, patient_of, tiny
from tests.test_head import twins
from tests.test_speculative import Erratic, run, same

WIDE = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 32}  # multiples of 32, as in every real model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1, 1), (2, 5)])
def test_the_product_is_that_of_the_rounded_weights(bias: bool, dtype: torch.dtype, rows: tuple[int, int]) -> None:
    """Against float64 with the weights rounded here, and the weights themselves within half a step."""
    torch.manual_seed(0)
    layer = nn.Linear(96, 400, bias=bias).requires_grad_(False)
    layer.weight.data[3] = 0.0  # an output that is always 0
    layer, x = layer.to(dtype), torch.randn(*rows, 96).to(dtype)
    small = Int8Linear(layer)
    step = small.scale.double()[:, None]
    rounded = small.weight.double() * step
    assert ((rounded - layer.weight.double()).abs() <= step / 2).all()
    assert (step <= layer.weight.double().abs().amax(dim=1, keepdim=True) / 125 + 1e-9).all()
    expected = x.bfloat16().double() @ rounded.T + (layer.bias.double() if bias else 0.0)
    found = small(x)
    assert found.dtype == dtype
    tolerance = 2.0**-7 * float(expected.abs().max())  # bfloat16 has 8 bits: inputs, scales and results
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


def test_only_the_linear_layers_are_copied() -> None:
    model = tiny("llama", **WIDE).float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = int8_copy(model)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert sum(isinstance(module, Int8Linear) for module in copied.modules()) == len(linear) > 10
    assert not any(isinstance(module, nn.Linear) for module in copied.modules())
    addresses = {tensor.data_ptr() for tensor in model.parameters()}
    assert all(tensor.data_ptr() in addresses for tensor in copied.parameters())
    own = sum(t.nbytes for t in copied.buffers() if t.dtype == torch.int8)
    assert own == sum(module.weight.nelement() for module in linear)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        difference = (copied(input_ids=ids).logits - expected).abs().max()
    assert 0 < difference < 0.1 * expected.abs().max()


def test_what_cannot_be_copied_is_refused_in_one_line() -> None:
    with pytest.raises(UsageError, match="no linear layers"):
        int8_copy(tiny("llama", hidden_size=24, intermediate_size=40).float())
    model = tiny("llama", **WIDE).float()
    with pytest.raises(UsageError, match="quantised"):
        int8_copy(int8_copy(model))


def test_a_copy_that_says_something_else_does_not_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the reason: here its layers give the opposite."""
    model = tiny("llama", **WIDE).float()
    monkeypatch.setattr("llmdoctor.decoding.int8.is_faster", lambda *_: True)
    assert draft_of(model) is not None
    forward = Int8Linear.forward
    monkeypatch.setattr(Int8Linear, "forward", lambda self, x: -forward(self, x))
    assert draft_of(model) is None


def mirror_of(model: Any) -> Any:
    """A draft model that says what the patient says and was made of it, its embeddings' memory too."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})


def guided(mode: Any) -> tuple[Any, list[Any], Guidance]:
    model = tiny("llama")
    head, _ = twins(model)
    return model, [head], Guidance(0.9, {head.name: 0.7}, mode, plausibility=0.02, dead_zones={head.name: 0.3})


@pytest.fixture(params=["recorded", "static"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches as on a CPU, and as on a GPU."""
    if request.param == "static":
        monkeypatch.setitem(caches.BACKENDS, "cpu", static.StaticKV)
        monkeypatch.setattr(static, "_LEAST", 16)


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("mode", ["product", "ratio"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "several"])
def test_a_copy_of_the_patient_drafts_what_its_heads_will_have_drawn(mode: Any, prompts: Any) -> None:
    """Every draft stands, in batches and whatever was drafted before: it has read what the patient has read."""
    model, doctors, guidance = guided(mode)
    drafting = Erratic(1)
    for seed in range(6):
        how = {"max_new_tokens": 40, "seed": 10 * seed, "temperature": 0.8, "top_p": 0.9}
        drafted = run(patient_of(model), doctors, prompts, guidance, drafting, draft_model=mirror_of(model), **how)
        same(drafted, run(patient_of(model), doctors, prompts, guidance, **how))
    assert drafting.accepted == drafting.tested > 10


def test_a_copy_without_the_patients_memory_does_not_know_its_heads() -> None:
    """It might be any model of that shape, for whose states the heads were not made."""
    model, doctors, guidance = guided("product")
    drafting = Erratic(1)
    run(patient_of(model), doctors, PROMPTS, guidance, drafting, draft_model=copy.deepcopy(model), max_new_tokens=40)
    assert 0 < drafting.accepted < drafting.tested


@pytest.mark.usefixtures("_backend")
@pytest.mark.parametrize("seed", range(6))
def test_it_keeps_up_while_rows_come_and_go(seed: int) -> None:
    """Rows of different lengths join and leave, prefixes are kept, a doctor that is no head reads beside it."""
    model, doctors, _ = guided("product")
    plain = doctor_of(tiny("llama", seed=1), "safe")
    guidance = Guidance(1.0, {doctors[0].name: 0.7, "safe": 0.0})
    found: list[dict[int, list[int]]] = []
    drafting = Erratic(seed)
    long = [[3 + (7 * i + k) % 20 for i in range(90)] + [k + 3] for k in range(3)]
    for how in ({}, {"drafting": drafting, "draft_model": mirror_of(model)}):
        prefixes = SharedPrefixes(1 << 30)
        batch = Batch(patient_of(model), {d.name: d for d in (*doctors, plain)}, prefixes=prefixes, **how)
        waiting = [*PROMPTS, *long, [*long[0][:70], 5], *PROMPTS[:2]]
        said: dict[int, list[int]] = {}
        rounds = 0
        while batch or waiting:
            # by what has been said, for drafting changes how many rounds there are
            if (waiting and sum(map(len, said.values())) >= 4 * (11 - len(waiting))) or not batch:
                prompt = waiting.pop(0)
                sampling = Sampling(max_new_tokens=6 + 5 * (len(waiting) % 4))
                batch.join([Request(prompt, lambda: guidance, sampling, seed=len(waiting))])
            for step in batch.round():
                said.setdefault(step.row, []).append(step.token.id)
            rounds += 1
        found.append(said)
    assert found[0] == found[1]
    assert drafting.accepted == drafting.tested > 20


class Late(Erratic):
    """Drafts nothing for a while."""

    def choose(self, rows: int) -> int:
        return 0 if len(self.waited) < 12 else 3

    def record(self, rows: int, slots: int, length: int, accepted: int, tested: int, seconds: float) -> None:
        super().record(rows, slots, length, accepted, tested, seconds)
        self.waited.append(rows)

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[int] = []


@pytest.mark.usefixtures("_backend")
def test_it_begins_again_where_the_others_have_closed_their_holes() -> None:
    """Far behind when the row ends for which the others were padded: it reads what stays."""
    model, doctors, guidance = guided("product")
    said: list[list[int]] = []
    drafting = Late()
    for how in ({}, {"drafting": drafting, "draft_model": mirror_of(model)}):
        batch = Batch(patient_of(model), {d.name: d for d in doctors}, **how)
        long = [3 + i % 20 for i in range(90)]
        asked = [(long, 6), (long[:5], 30), (long[:40], 30), (long[3:9], 30), (long[30:60], 30)]
        batch.join([Request(p, lambda: guidance, Sampling(max_new_tokens=n), seed=i) for i, (p, n) in enumerate(asked)])
        rows: dict[int, list[int]] = {}
        while batch:
            for step in batch.round():
                rows.setdefault(step.row, []).append(step.token.id)
        said.append([rows[row] for row in sorted(rows)])
    assert said[0] == said[1]
    assert drafting.accepted == drafting.tested > 5


@pytest.mark.usefixtures("_backend")
def test_it_keeps_up_in_a_conversation() -> None:
    """Turns of which the next begins with the last, also one that was left in the middle."""
    model, doctors, guidance = guided("product")
    turns: list[list[list[int]]] = []
    drafting = Erratic(2)
    for how in ({}, {"drafting": drafting, "draft_model": mirror_of(model)}):
        cache, prompt, said = PrefixCache(), [3, 9, 4, 11], []
        for turn in range(4):
            rows = run(
                patient_of(model), doctors, [prompt], guidance, prefix_cache=cache, seed=turn, max_new_tokens=9, **how
            )
            said.append(ids_of(rows[0]))
            prompt = prompt + said[-1][: 9 - 3 * (turn % 2)] + [6, 7]
        turns.append(said)
    assert turns[0] == turns[1]
    assert drafting.accepted == drafting.tested > 5


def test_a_copy_that_is_no_faster_does_not_draft(monkeypatch: pytest.MonkeyPatch, tiny_model: Any) -> None:
    """A product that takes its time stands for a CPU that has no instructions for it."""
    forward = Int8Linear.forward
    patient = load_patient(tiny_model("llama", **WIDE), device="cpu", dtype="float32").model
    for linear, slow in ((0.002, 0.0), (0.0, 0.002)):
        with monkeypatch.context() as patch:
            patch.setattr(Int8Linear, "forward", lambda self, x, slow=slow: time.sleep(slow) or forward(self, x))
            patch.setattr(
                nn.Linear,
                "forward",
                lambda self, x, linear=linear: time.sleep(linear) or nn.functional.linear(x, self.weight, self.bias),
            )
            assert is_faster(int8_copy(patient), patient) == (linear > slow)
    monkeypatch.setattr(Int8Linear, "forward", lambda self, x: time.sleep(0.002) or forward(self, x))
    assert (
        LLMdoctor(tiny_model("llama", **WIDE), device="cpu", dtype="float32", draft_model="int8")._draft_model is None
    )


def test_the_word_int8_in_place_of_a_model(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same answers in float32; nothing is copied where there is no speculation."""
    folder = tiny_model("llama", **WIDE)
    plain = LLMdoctor(folder, device="cpu", dtype="float32", speculation=False, draft_model="int8")
    assert plain._draft_model is None
    monkeypatch.setattr("llmdoctor.assistant.draft_of", int8_copy)  # of layers as small as these it is not
    drafted = LLMdoctor(folder, device="cpu", dtype="float32", draft_model="int8")
    assert any(isinstance(module, Int8Linear) for module in drafted._draft_model.modules())
    drafted._drafting = drafted._drafting_alone = drafting = Erratic(1)
    for seed in range(12):
        how = {"seed": seed, "max_new_tokens": 60}
        assert drafted.generate("How can I sleep?", **how) == plain.generate("How can I sleep?", **how)
    assert drafting.accepted > 0.8 * drafting.tested > 10


def test_a_real_patient_in_8_bits_drafts_well(smollm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2 under both heads, in float32: the tokens of no drafts, and four drafts in five stand."""
    monkeypatch.setattr("llmdoctor.assistant.draft_of", int8_copy)
    drafting = Erratic(0)
    assistant = LLMdoctor.from_profile("smollm2", device="cpu", dtype="float32", draft_model="int8")
    assistant._drafting = drafting
    how = {"seed": 5, "max_new_tokens": 48}
    drafted = assistant.generate("How can I sleep better?", **how)
    assistant.speculation = False
    assert assistant.generate("How can I sleep better?", **how) == drafted
    assert drafting.accepted > 0.75 * drafting.tested > 10
