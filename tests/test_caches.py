"""KV caches: going back, joining, and models that keep no such cache."""

import gc
import warnings
from itertools import product
from typing import Any
from weakref import ref

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmdoctor.decoding.caches import open_cache
from llmdoctor.decoding.caches.dynamic import DynamicKV
from llmdoctor.decoding.caches.recorded import RecordedKV, step_graph
from llmdoctor.errors import LLMDoctorWarning, LoadError
from tests.test_decode import SIZE, TINY, tiny
from tests.test_speculative import contents, recurrent

WINDOW = 8


@pytest.mark.parametrize("arch", ["mistral", "gemma3"])
def test_every_rewind_around_a_window_is_right(arch: str) -> None:
    """A sweep over what was read, how, and how far back: the next logits are those of one forward of what is left.

    A window of 8 forgets what it has passed, unless it was recorded since the last crop. Going back too far has to
    drop everything; going back as far as it can has to keep it.
    """
    model = tiny(arch, seed=3)
    ids = torch.randint(1, SIZE, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(ids, use_cache=False).logits
        for prompt, steps, crop in product((2, 6, 7, 8, 9, 12), ((), (1, 1), (4,), (1, 6)), (None, 0, 1)):
            fed = prompt + sum(steps)
            if crop and not steps:
                continue
            for length in range(max(0, fed - 10), fed + 1 - (crop or 0)):
                cache = DynamicKV(model)
                cache.feed(ids[:, :1])
                cache.feed(ids[:, 1:7], None, 6)  # an earlier conversation, whose record must not count
                cache.rewind(0)
                cache.feed(ids[:, :prompt])
                for count in steps:
                    cache.feed(ids[:, cache.length : cache.length + count], None, count)
                if crop is not None:
                    cache.take_back(crop)
                before, recorded = cache.length, sum(steps) if crop is None else 0
                cache.rewind(length)
                possible = length == before or before - length <= recorded or before < WINDOW
                assert cache.length == (length if possible else 0), (prompt, steps, crop, length)
                logits, _ = cache.feed(ids[:, cache.length : length + 3], None, 1)
                assert torch.allclose(logits[0, -1], whole[0, length + 2], atol=1e-9), (prompt, steps, crop, length)


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma3"])
def test_a_joined_cache_is_that_of_one_padded_batch(arch: str) -> None:
    """Shorter joins longer and the other way round: keys, values and the next logits of a batch read together."""
    model = tiny(arch, seed=4)
    generator = torch.Generator().manual_seed(1)
    for lengths in ((5, 14), (14, 5), (3, 6), (20, 12), (9, 9)):
        prompts = [torch.randint(1, SIZE, (1, n), generator=generator) for n in lengths]
        longest = max(lengths)
        ids = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts])
        mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])
        with torch.inference_mode():
            one, other = (open_cache(model) for _ in prompts)
            one.feed(prompts[0])
            other.feed(prompts[1])
            one.join(other)
            together = open_cache(model)
            together.feed(ids, mask)
            assert one.length == longest
            for mine, theirs in zip(contents(one, min(lengths)), contents(together, min(lengths)), strict=True):
                assert torch.allclose(mine, theirs, atol=1e-9)
            for _ in range(12):  # beyond the window
                ids = torch.randint(1, SIZE, (2, 1), generator=generator)
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                assert torch.allclose(one.feed(ids, mask)[0], together.feed(ids, mask)[0], atol=1e-9)


def test_a_recorded_model_is_freed() -> None:
    """Recording must not keep the model alive: its graph is kept under the model, and must not refer to it."""
    model = tiny("llama", seed=5)
    cache = RecordedKV(model)
    cache.feed(torch.tensor([[1, 2, 3]]))
    for _ in range(6):
        cache.feed(torch.tensor([[4]]))
    assert step_graph(model, cache.cache.layers) is not None
    held = ref(model)
    del model, cache
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("how", ["missing", "broken", "wrong"])
def test_a_recorder_that_cannot_be_used_says_so_once(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gone from torch, failing, or giving other numbers: a warning that names the model, and the right tokens."""
    if how == "missing":
        monkeypatch.delattr(torch._C, "_create_graph_by_tracing")
    elif how == "broken":
        monkeypatch.setattr(torch._C, "_create_graph_by_tracing", lambda *_args: 1 / 0)
    else:
        made = torch._C._create_function_from_graph

        def wrong(*args: Any) -> Any:
            graph = made(*args)
            return lambda *step: (graph(*step)[0] + 1, *graph(*step)[1:])

        monkeypatch.setattr(torch._C, "_create_function_from_graph", wrong)
    model = tiny("llama", seed=6)
    ids = torch.randint(1, SIZE, (1, 20))
    expected = model(input_ids=ids).logits
    cache = RecordedKV(model)
    cache.feed(ids[:, :4])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for at in range(4, 20):
            assert torch.allclose(cache.feed(ids[:, at : at + 1])[0][0, 0], expected[0, at], atol=1e-12)
    said = [str(w.message) for w in heard if issubclass(w.category, LLMDoctorWarning)]
    assert len(said) == 1
    assert "LlamaForCausalLM cannot be recorded" in said[0]


@pytest.mark.parametrize(
    ("kind", "works", "more"),
    [
        ("falcon_h1", True, {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_n_groups": 1}),
        ("mamba", False, {"state_size": 4, "conv_kernel": 4, "expand": 2, "time_step_rank": 4}),
        ("mamba2", False, {"num_heads": 4, "head_dim": 8, "state_size": 4, "n_groups": 1, "expand": 2}),
        (
            "recurrent_gemma",
            False,
            {"block_types": ["recurrent", "attention"], "lru_width": 16, "attention_window_size": 8},
        ),
    ],
)
def test_models_with_other_states_decode_or_say_why_not(kind: str, works: bool, more: dict[str, Any]) -> None:
    """One line that names the model, or the tokens of the model itself; never an error of the library below."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**TINY, **more})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    ids = torch.randint(1, SIZE, (1, 9))

    def decoded() -> torch.Tensor:
        cache = open_cache(model)
        cache.feed(ids[:, :6])
        return torch.stack([cache.feed(ids[:, at : at + 1])[0][0, -1] for at in range(6, 9)])

    if works:
        assert torch.allclose(decoded(), model(input_ids=ids, use_cache=False).logits[0, 6:], atol=1e-4)
    else:
        with pytest.raises(LoadError, match=rf"^{type(model).__name__} [^\n]*choose another") as caught:
            decoded()
        assert "\n" not in str(caught.value)


def test_a_recurrent_state_is_kept_or_dropped_never_cut() -> None:
    model = recurrent()
    ids = torch.randint(1, SIZE, (1, 9))
    cache = open_cache(model)
    cache.feed(ids)
    assert not cache.can_roll_back
    cache.rewind(9)
    assert cache.length == 9
    cache.rewind(8)
    assert cache.length == 0
