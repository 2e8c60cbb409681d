"""A recorded step against the model itself."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmdoctor.decoding.caches.recorded import RecordedKV, run_step, step_graph
from tests.test_decode import SIZE, TINY, tiny


def graph_of(model: Any) -> Any:
    layers = model(input_ids=torch.tensor([[1, 2]]), use_cache=True).past_key_values.layers
    for _ in range(4):
        assert step_graph(model, layers) is None  # a model that takes few steps is not recorded
    return step_graph(model, layers)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_recorded_step_is_the_models_own(arch: str) -> None:
    """Any number of rows and tokens after any length, with holes in the mask: logits, hidden and cache to 1e-12."""
    model = tiny(arch, seed=3)
    graph = graph_of(model)
    assert graph is not None
    for rows, length, tokens, holes in ((1, 1, 1, False), (1, 40, 7, False), (3, 9, 4, True), (2, 30, 1, True)):
        ids = torch.randint(1, SIZE, (rows, length + tokens))
        mask = torch.ones_like(ids)
        if holes:
            mask[0, :3] = mask[1, 5:7] = 0
        more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if holes else {}
        first = {key: value[:, :length] for key, value in more.items()}
        caches = [model(input_ids=ids[:, :length], use_cache=True, **first).past_key_values for _ in range(2)]
        if holes:
            more["position_ids"] = more["position_ids"][:, length:]
        expected = model(input_ids=ids[:, length:], past_key_values=caches[0], use_cache=True, **more)
        logits, hidden = run_step(graph, ids[:, length:], mask if holes else None, caches[1].layers)
        assert torch.allclose(logits, expected.logits, atol=1e-12)
        assert torch.allclose(model.lm_head(hidden), logits, atol=1e-12)
        for mine, other in zip(caches[1].layers, caches[0].layers, strict=True):
            assert torch.allclose(mine.keys, other.keys, atol=1e-12)
            assert torch.allclose(mine.values, other.values, atol=1e-12)


def test_a_model_with_a_padding_token_is_recorded_too() -> None:
    """Its embedding has a padding row, whose place torch checks at every call; real tokenizers often have one."""
    model = tiny("llama", seed=3, pad_token_id=2)
    assert model.get_input_embeddings().padding_idx == 2
    assert graph_of(model) is not None
    assert model.get_input_embeddings().padding_idx == 2


def test_a_cached_model_comes_to_use_it() -> None:
    """One token at a time, from the fifth on by the graph: the logits of one forward over all; and it rolls back."""
    model = tiny("llama", seed=4)
    ids = torch.randint(1, SIZE, (1, 24))
    expected = model(input_ids=ids).logits
    cached = RecordedKV(model)
    cached.feed(ids[:, :8])
    for at in range(8, 24):
        assert torch.allclose(cached.feed(ids[:, at : at + 1])[0][0, 0], expected[0, at], atol=1e-12)
    assert step_graph(model, cached.cache.layers) is not None
    cached.take_back(5)
    logits, hidden = cached.feed(ids[:, 19:], None, 5)
    assert torch.allclose(logits, expected[:, 19:], atol=1e-12)
    assert torch.allclose(model.lm_head(hidden), expected[:, 19:], atol=1e-12)
    for layer in cached.cache.layers:
        assert layer.keys.shape[-2] == layer.values.shape[-2] == cached.length == 24


def test_a_step_copies_nothing_and_changes_nothing_that_others_keep() -> None:
    """New tokens are written behind the old ones, where tokens were taken back too; what was saved stays as it was."""
    model = tiny("llama", seed=5)
    cache, other = RecordedKV(model), RecordedKV(model)
    ids = torch.randint(1, SIZE, (1, 40))
    cache.feed(ids[:, :8])
    for at in range(8, 20):
        cache.feed(ids[:, at : at + 1])
    places = [layer.keys.data_ptr() for layer in cache.cache.layers]
    saved = cache.saved(0, torch.arange(20))
    before = [(keys.clone(), values.clone()) for keys, values in saved]
    other.load([[(keys[:, :, :15], values[:, :, :15]) for keys, values in saved]], 15)
    cache.take_back(4)
    for at in range(20, 30):
        cache.feed(ids[:, at : at + 1])
        other.feed(ids[:, at : at + 1])
    assert [layer.keys.data_ptr() for layer in cache.cache.layers] == places
    for pair, kept in zip(saved, before, strict=True):
        assert all(now.equal(then) for now, then in zip(pair, kept, strict=True))
    for used, read in ((cache, [*range(16), *range(20, 30)]), (other, [*range(15), *range(20, 30)])):
        keys = model(input_ids=ids[:, read], use_cache=True).past_key_values.layers[1].keys
        assert torch.allclose(used.cache.layers[1].keys, keys, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": None}),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    ],
    ids=["experts", "dynamic rotary"],
)
def test_a_step_whose_course_depends_on_values_is_right_all_the_same(kind: str, more: dict[str, Any]) -> None:
    """Recorded or not: what a RecordedKV gives equals the model without a cache."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TINY, **more)).eval()
    ids = torch.randint(1, SIZE, (1, 40))
    cached = RecordedKV(model.requires_grad_(False))
    cached.feed(ids[:, :4])
    for at in range(4, 40):
        expected = model(input_ids=ids[:, : at + 1], use_cache=False).logits[0, -1]
        assert torch.allclose(cached.feed(ids[:, at : at + 1])[0][0, 0], expected, atol=1e-3)
