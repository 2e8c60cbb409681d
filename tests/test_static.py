"""Static caches, whose steps a GPU replays as graphs: here on the CPU, with a recorder that keeps a replay's contract.

The decoder's own tests run again over them. What only a GPU can show is the recording itself.
"""

import warnings
from typing import Any

import pytest
import torch

from llmdoctor.decoding import caches
from llmdoctor.decoding.caches import Read, static
from llmdoctor.decoding.caches.static import StaticKV
from llmdoctor.errors import LLMDoctorWarning
from tests.test_decode import SIZE, tiny
from tests.test_speculative import (  # noqa: F401  # collected here once more
    test_an_answer_that_ends_inside_a_draft,
    test_an_interrupt_within_a_forward,
    test_caches_after_rejection_equal_fresh_ones,
    test_drafted_equals_reference,
    test_guidance_that_changes_within_a_draft,
    test_holes_are_closed,
    test_the_next_turn_reads_only_what_is_new,
)

recorded: list[int] = []


def replayed(_model: Any, forward: Any) -> Any:
    """As a CUDA graph does: one run fixes where the outputs lie; every replay reads the buffers and overwrites them."""
    outputs = forward()
    recorded.append(outputs[0].shape[1])

    def replay() -> Any:
        for kept, fresh in zip(outputs, forward(), strict=True):
            kept.copy_(fresh)
        return outputs

    return replay


@pytest.fixture(autouse=True)
def _static(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(caches.BACKENDS, "cpu", StaticKV)
    monkeypatch.setattr(static, "_LEAST", 16)  # so that caches grow within a test
    monkeypatch.setattr(static, "_record", replayed)
    recorded.clear()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3"])
def test_steps_are_the_models_own(arch: str) -> None:
    """Steps of one and of several tokens, rows that leave, tokens taken back, growth: the logits of a whole forward."""
    model = tiny(arch, seed=5)
    ids = torch.randint(1, SIZE, (5, 40))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[2, :1] = mask[1, 6] = mask[3, 9:11] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    cached = StaticKV(model)
    with torch.inference_mode():
        cached.feed(ids[:, :5], mask[:, :5])
        at, rows = 5, torch.arange(5)
        for tokens, back, staying in (
            (1, 0, None),
            (4, 2, None),
            (1, 0, [0, 2, 3, 4]),
            (7, 1, [3, 1]),
            (1, 0, None),
            (20, 0, [1]),
        ):
            logits, hidden = cached.feed(ids[rows, at : at + tokens], mask[rows, : at + tokens], tokens)
            valid = mask[rows, at : at + tokens].bool()
            assert torch.allclose(logits[valid], expected[rows, at : at + tokens][valid], atol=1e-10)
            assert torch.allclose(model.lm_head(hidden), logits, atol=1e-10) or arch == "gemma3"
            cached.take_back(back)
            at += tokens - back
            if staying is not None:
                cached.keep(torch.tensor(staying))
                rows = rows[staying]
    used = cached.slots is not None
    assert used == (arch != "gemma3")  # a sliding window has no static form here
    assert set(recorded) == ({1, 4, 7, 20} if used else set())


def test_a_slot_is_used_again_with_its_graphs_but_never_by_two() -> None:
    model = tiny("llama", seed=6)
    ids = torch.randint(1, SIZE, (1, 12))

    def begun() -> StaticKV:
        cached = StaticKV(model)
        with torch.inference_mode():
            cached.feed(ids[:, :4])
            cached.feed(ids[:, 4:5])
        return cached

    first, second = begun(), begun()
    assert first.slots is not second.slots
    assert len(recorded) == 2
    with torch.inference_mode():  # neither disturbs the other
        assert torch.equal(first.feed(ids[:, 5:6])[0], second.feed(ids[:, 5:6])[0])
    was = first.slots
    first.rewind(0)
    third = begun()
    assert third.slots is was
    assert len(recorded) == 2


def test_a_model_whose_steps_come_out_otherwise_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning says why, and the tokens are still right."""
    monkeypatch.setattr(static.StaticSlots, "_forward", lambda *_: Read(torch.zeros(2, 3, SIZE), torch.zeros(2, 3, 1)))
    model = tiny("llama", seed=7)
    ids = torch.randint(1, SIZE, (1, 12))
    cached = StaticKV(model)
    cached.feed(ids[:, :4])
    with pytest.warns(LLMDoctorWarning, match="not recorded as CUDA graphs"):
        cached.feed(ids[:, 4:5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is only one warning
        logits, _ = cached.feed(ids[:, 5:], None, 7)
    assert torch.allclose(logits[0, -1], model(input_ids=ids).logits[0, -1], atol=1e-12)


def test_without_a_gpu_nothing_is_static(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not isinstance(caches.open_cache(tiny("llama", seed=8)), StaticKV)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="recording a CUDA graph needs a GPU")
def test_graphs_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = tiny("llama", seed=9).to("cuda")
    ids = torch.randint(1, SIZE, (1, 60), device="cuda")
    expected = model(input_ids=ids).logits
    cached = StaticKV(model)
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        cached.feed(ids[:, :8])
        for at in range(8, 56, 4):
            for begin, tokens, back in ((at, 1, 0), (at + 1, 6, 3)):
                logits, _ = cached.feed(ids[:, begin : begin + tokens], None, tokens)
                assert torch.allclose(logits, expected[:, begin : begin + tokens], atol=1e-8)
                cached.take_back(back)
    assert all(cached.slots._replays.values())
