"""A recorded step against the model itself."""

import random
from functools import cache
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


def test_whatever_is_done_to_a_cache_changes_no_other() -> None:
    """Steps, drafts, crops, holes, joins, chosen rows, saved beginnings and copies of them, in any order.

    After each, every cache and all that was saved hold the keys of their own tokens, read alone.
    """
    model, rng = tiny("llama", seed=5), random.Random(0)
    caches: list[tuple[RecordedKV, list[list[int]]]] = []  # with the tokens of every row, 0 for an empty slot
    saved: list[tuple[list[int], Any]] = []

    @cache
    def alone(*ids: int) -> torch.Tensor:
        keys: torch.Tensor = model(input_ids=torch.tensor([ids])).past_key_values.layers[1].keys
        return keys

    def fresh(rows: int, tokens: int) -> list[list[int]]:
        return [[rng.randrange(1, SIZE) for _ in range(tokens)] for _ in range(rows)]

    def change(kv: RecordedKV, rows: list[list[int]]) -> None:
        what = rng.choice(["step", "step", "step", "draft", "prompt", "crop", "hole", "keep", "pack", "join", "save"])
        mask = torch.tensor(rows).ne(0).long()
        if what in ("step", "draft", "prompt"):
            new = fresh(len(rows), 1 if what == "step" else 3)
            for row, more in zip(rows, new, strict=True):
                row.extend(more)
            kv.feed(torch.tensor(new), torch.tensor(rows).ne(0).long(), 1 if what == "prompt" else len(new[0]))
        elif what == "crop" and all(any(row[:-2]) for row in rows):
            kv.take_back(2)
            for row in rows:
                del row[-2:]
        elif what == "hole" and sum(map(bool, rows[0])) > 2:
            rows[0][-1] = 0
        elif what == "keep":
            chosen = rng.sample(range(len(rows)), rng.randint(1, len(rows)))
            kv.keep(torch.tensor(chosen))
            rows[:] = [[*rows[i]] for i in chosen]
        elif what == "pack":
            slots = mask.argsort(dim=1, stable=True)[:, -int(mask.sum(dim=1).max()) :]
            kv.pack(slots)
            rows[:] = [[row[i] for i in kept] for row, kept in zip(rows, slots.tolist(), strict=True)]
        elif what == "join" and len(rows) < 4:
            other, more = next((one for one in caches if one[0] is not kv), (None, []))
            if other is not None:
                kv.join(other)
                caches[:] = [one for one in caches if one[0] is not other]
                rows[:] = [[0] * (kv.length - len(row)) + row for row in rows + more]
        elif what == "save":
            slots = mask[-1].nonzero()[:, 0]
            saved.append(([rows[-1][i] for i in slots], kv.saved(len(rows) - 1, slots)))

    with torch.inference_mode():
        for _ in range(150):
            if len(caches) < 3:
                ids, layers = rng.choice(saved) if saved else ([], [])
                kv, rows = RecordedKV(model), [ids[: rng.randint(1, len(ids))]] if ids else fresh(2, 6)
                if ids:
                    length = len(rows[0])
                    kv.load([[(keys[:, :, :length], values[:, :, :length]) for keys, values in layers]], length)
                else:
                    kv.feed(torch.tensor(rows))
                caches.append((kv, rows))
            change(*rng.choice(caches))
            for kv, rows in caches:
                for keys, row in zip(kv.cache.layers[1].keys, rows, strict=True):
                    held = [i for i, token in enumerate(row) if token]
                    assert torch.allclose(keys[None, :, held], alone(*(row[i] for i in held)), atol=1e-9)
            for ids, layers in saved:
                assert torch.allclose(layers[1][0], alone(*ids), atol=1e-9)
        assert step_graph(model, caches[0][0].cache.layers) is not None


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
