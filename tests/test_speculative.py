"""Drafted decoding against the reference path: the same seed, the same tokens, the same numbers."""

import random
import warnings
from collections.abc import Callable
from itertools import chain as joined
from itertools import islice
from typing import Any, Literal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import StaticLayer

from llmdoctor.decoding.caches import BACKENDS
from llmdoctor.decoding.caches.dynamic import DynamicKV
from llmdoctor.decoding.decode import decode
from llmdoctor.decoding.drafting import FixedLength
from llmdoctor.decoding.prefix import PrefixCache
from llmdoctor.decoding.rows import Step
from llmdoctor.errors import LLMDoctorWarning
from llmdoctor.settings import Guidance, Sampling
from tests.test_decode import EOS, PROMPTS, SIZE, bigram, chain, doctor_of, ids_of, patient_of, text_of, tiny


class Erratic(FixedLength):
    """Drafts of any length, 0 too, in an order of its own; counts what was accepted."""

    def __init__(self, seed: int = 0) -> None:
        self.random, self.accepted, self.tested, self.lengths = random.Random(seed), 0, 0, set()

    def choose(self, rows: int) -> int:
        return self.random.randrange(7)

    def record(self, rows: int, slots: int, length: int, accepted: int, tested: int, seconds: float) -> None:
        assert 0 <= accepted <= tested <= rows * length
        assert seconds >= 0  # 0: not known
        self.accepted, self.tested = self.accepted + accepted, self.tested + tested
        self.lengths.add(length)


def run(
    patient: Any, doctors: list[Any], prompts: list[list[int]], guidance: Any, drafting: Any = None, **how: Any
) -> list[list[Step]]:
    rows: list[list[Step]] = [[] for _ in prompts]
    own = {key: how.pop(key) for key in ("seed", "top", "prefix_cache", "draft_model", "begun") if key in how}
    for step in decode(
        patient,
        {doctor.name: doctor for doctor in doctors},
        prompts,
        (lambda: guidance) if isinstance(guidance, Guidance) else guidance,
        Sampling(**how),
        drafting=drafting,
        **{"seed": 0, **own},
    ):
        rows[step.row].append(step)
    return rows


def same(left: list[list[Step]], right: list[list[Step]]) -> None:
    """Equal in every field; numbers up to the rounding of float64."""
    assert [ids_of(row) for row in left] == [ids_of(row) for row in right]
    for a, b in zip(joined(*left), joined(*right), strict=True):
        mine, other = a.token.to_dict(), b.token.to_dict()
        for key in ("patient_logprob", "doctor_logprobs", "logprob", "values", "kl"):
            assert mine.pop(key) == pytest.approx(other.pop(key), abs=1e-9)
        assert (a.row, a.finish) == (b.row, b.finish)
        for own, others in zip(mine.pop("top"), other.pop("top"), strict=True):
            assert own.pop("doctor_logprobs") == pytest.approx(others.pop("doctor_logprobs"), abs=1e-9)
            assert own == pytest.approx(others, abs=1e-9)
        assert mine == other


@pytest.mark.parametrize("how", [{}, {"temperature": 0.5, "top_p": 0.9}, {"temperature": 1.7, "top_k": 6}], ids=str)
@pytest.mark.parametrize("strengths", [(1.0, 0.8), (0.3, 1.9), (0.0, 0.4)])
def test_a_doctor_equal_to_the_patient_has_every_draft_accepted(
    how: dict[str, Any], strengths: tuple[float, float]
) -> None:
    """Draft and draw are then the same law, patient^(alpha + beta), with the same random keys."""
    model = tiny("llama", seed=3)
    guidance, drafting = Guidance(strengths[0], {"doctor": strengths[1]}), Erratic(3)
    run(patient_of(model), [doctor_of(model)], PROMPTS, guidance, drafting, max_new_tokens=40, **how)
    assert drafting.accepted == drafting.tested > 10


@pytest.mark.parametrize("strong", ["a", "b"])
def test_the_doctor_with_the_greatest_say_drafts(strong: str) -> None:
    """One doctor equals the patient, the other is its opposite: the strong one's drafts must be the accepted ones."""
    table = 2 * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table[:, EOS] = -50
    models = {strong: bigram(table), "ab".replace(strong, ""): bigram(-table)}
    drafting = Erratic(4)
    guidance = Guidance(1.0, {name: 1.0 if name == strong else 0.05 for name in models})
    doctors = [doctor_of(model, name) for name, model in sorted(models.items())]
    run(patient_of(models[strong]), doctors, PROMPTS, guidance, drafting, max_new_tokens=40)
    assert drafting.accepted / drafting.tested > 0.9


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9}], ids=["greedy", "sampled"])
def test_drafted_equals_reference(arch: str, how: dict[str, float]) -> None:
    """Token for token in float64, alone and far beyond the sliding window of 8, and in a ragged batch."""
    patient, doctor = patient_of(tiny(arch, seed=3)), doctor_of(tiny("llama", seed=4))
    guidance = Guidance(0.8, {"doctor": 0.9})
    for prompts in (PROMPTS[1:2], PROMPTS) if arch != "gemma2" else (PROMPTS[1:2],):  # gemma2 in float64 cannot pad
        drafting = Erratic()
        plain = run(patient, [doctor], prompts, guidance, max_new_tokens=24, top=2, **how)
        same(run(patient, [doctor], prompts, guidance, drafting, max_new_tokens=24, top=2, **how), plain)
        if len(prompts) == 1 or arch not in ("mistral", "gemma3"):  # no holes in a window: there a batch is not drafted
            assert drafting.tested > 0


def test_holes_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch with half of its drafts rejected: the caches stay near the longest row's length, the tokens the same."""
    model = tiny("llama", seed=3)
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.add_(0.1 * weight.std() * torch.randn_like(weight))
    patient, doctor, guidance = patient_of(tiny("llama", seed=3)), doctor_of(model), Guidance(0.8, {"doctor": 0.9})
    lengths: list[int] = []
    backend = BACKENDS["cpu"]
    feed = backend.feed

    def watched(model: Any, *args: Any) -> Any:
        lengths.append(model.length)
        return feed(model, *args)

    plain = run(patient, [doctor], 3 * PROMPTS, guidance, max_new_tokens=90)
    monkeypatch.setattr(backend, "feed", watched)
    same(run(patient, [doctor], 3 * PROMPTS, guidance, FixedLength(6), max_new_tokens=90), plain)
    longest = max(len(prompt) + len(steps) for prompt, steps in zip(3 * PROMPTS, plain, strict=True))
    assert max(lengths) <= longest + max(8, longest // 8) + 7


@pytest.mark.parametrize(("mode", "zones"), [("product", {}), ("ratio", {}), ("ratio", {"a": 0.5, "b": 0.3})])
def test_guidance_that_changes_within_a_draft(mode: Literal["product", "ratio"], zones: dict[str, float]) -> None:
    """Two doctors, alpha and betas another for every token: all fields as if each token had been drawn alone.

    With dead zones they share a base, as the clinic's do.
    """
    patient = patient_of(tiny("llama", seed=5))
    base = tiny("llama", seed=8)
    doctors = [
        doctor_of(tiny("qwen2", seed=6), "a", 2, base=base),
        doctor_of(tiny("llama", seed=7), "b", 3, anchored=True, base=base if zones else tiny("llama", seed=9)),
    ]
    schedule = [
        Guidance(1.0, {"a": 0.8}, mode, dead_zones=zones),
        Guidance(0.0, {"a": 0.3, "b": 1.1}, mode, dead_zones=zones),
        Guidance(0.6, {"b": 2.0}, mode, dead_zones=zones),
    ]
    schedule.insert(1, schedule[0])
    schedule.insert(3, schedule[2])

    def answers(drafting: Any) -> list[list[Step]]:
        rows: list[list[Step]] = [[] for _ in PROMPTS]
        reads = [lambda row=row, i=i: schedule[(len(row) + i) % 5] for i, row in enumerate(rows)]
        named = {doctor.name: doctor for doctor in doctors}
        how = Sampling(max_new_tokens=20, temperature=0.7)
        for step in decode(patient, named, PROMPTS, reads, how, seed=[7, 3, 11], top=2, drafting=drafting):
            rows[step.row].append(step)
        return rows

    drafting = Erratic(1)
    plain = answers(None)
    same(answers(drafting), plain)
    assert drafting.accepted > 0
    for i, (prompt, seed) in enumerate(zip(PROMPTS, (7, 3, 11), strict=True)):  # each row as if alone, by its own law
        alone: list[Step] = []
        named = {doctor.name: doctor for doctor in doctors}
        for step in decode(
            patient,
            named,
            [prompt],
            lambda i=i, alone=alone: schedule[(len(alone) + i) % 5],
            Sampling(max_new_tokens=20, temperature=0.7),
            seed=seed,
            drafting=FixedLength(4),
        ):
            alone.append(step)
        assert ids_of(alone) == ids_of(plain[i])


@pytest.mark.parametrize(
    ("alpha", "betas", "how", "length"),
    [
        (1.0, (0.8,), {}, 3),
        (0.6, (1.3,), {"temperature": 0.6, "top_k": 4}, 2),
        (1.0, (0.5, 0.9), {"temperature": 1.7, "top_p": 0.8}, 4),
        (0.0, (0.7, 0.2), {"min_p": 0.3}, 1),
        (1.3, (0.0,), {"top_p": 0.9, "min_p": 0.05}, 2),
    ],
)
def test_the_drafted_distribution(
    alpha: float,
    betas: tuple[float, ...],
    how: dict[str, float],
    length: int,
    chi_square_p: Callable[[torch.Tensor, torch.Tensor], float],
) -> None:
    """Pairs of neighbouring tokens of long answers over 8 words, against the product worked out from the tables."""
    generator = torch.Generator().manual_seed(3)
    tables = [torch.full((SIZE, SIZE), -80.0, dtype=torch.float64) for _ in range(1 + len(betas))]
    for table in tables:
        table[:, 1:9] = 1.2 * torch.randn(SIZE, 8, generator=generator, dtype=torch.float64)
    names = "ab"[: len(betas)]
    doctors = [doctor_of(bigram(table), name) for name, table in zip(names, tables[1:], strict=True)]
    guidance = Guidance(alpha, dict(zip(names, betas, strict=True)))
    rows = run(
        patient_of(bigram(tables[0])), doctors, [[1]] * 40, guidance, FixedLength(length), max_new_tokens=100, **how
    )
    counts = torch.zeros(SIZE, SIZE)
    for row in rows:
        ids = [1, *ids_of(row)]
        counts.index_put_((torch.tensor(ids[:-1]), torch.tensor(ids[1:])), torch.ones(len(row)), accumulate=True)
    logps = [table.log_softmax(-1) for table in tables]
    mixed = alpha * logps[0] + sum(beta * logp for beta, logp in zip(betas, logps[1:], strict=True))
    for here in range(1, 9):
        if counts[here].sum() < 40:
            continue
        p = (mixed[here] / how.get("temperature", 1.0)).softmax(-1)
        best = p.argsort(descending=True)
        if k := how.get("top_k"):
            p[best[int(k) :]] = 0
        p /= p.sum()
        if top_p := how.get("top_p"):
            before = p[best].cumsum(-1) - p[best]
            p[best[before >= top_p]] = 0
            p /= p.sum()
        p[p < how.get("min_p", 0.0) * p.max()] = 0
        p[p < 1e-20] = 0
        assert chi_square_p(counts[here], p) > 1e-4


@pytest.mark.parametrize(
    ("stop", "text", "finish"),
    [((), "bcdefgh", "eos"), (("def",), "bc", "stop"), (("b",), "", "stop"), (("efx", "gha"), "bcdefgh", "eos")],
)
@pytest.mark.parametrize("length", [1, 3, 6, 16])
def test_an_answer_that_ends_inside_a_draft(stop: tuple[str, ...], text: str, finish: str, length: int) -> None:
    """The models say "bcdefgh" and end; the draft goes on behind the end, and none of that is shown."""
    patient, doctor = patient_of(bigram(chain("abcdefgh"))), doctor_of(bigram(chain("abcdefgh")), anchored=True)
    (row,) = run(patient, [doctor], [[1]], Guidance(1, {"doctor": 1}), FixedLength(length), temperature=0, stop=stop)
    assert (text_of(row), row[-1].finish) == (text, finish)
    same([row], run(patient, [doctor], [[1]], Guidance(1, {"doctor": 1}), temperature=0, stop=stop))
    talker = bigram(chain("a", "a"), context=12)  # drafts stay within the budget and the context
    (row,) = run(patient_of(talker), [doctor_of(talker)], [[1] * 5], Guidance(1, {"doctor": 1}), FixedLength(length))
    assert (len(row), row[-1].finish) == (7, "length")


def layers_of(cache: Any) -> list[Any]:
    """The layers that hold the keys and values, wherever they are now."""
    return (getattr(cache, "slots", None) or cache.cache).layers


def contents(model: Any, length: int) -> list[torch.Tensor]:
    """Keys and values of the last ``length`` slots of every layer, of a sliding one as far as its window of 8 goes."""
    held = [torch.cat([layer.keys, layer.values]) for layer in layers_of(model)]
    sizes = [min(length, 7) if layer.is_sliding else length for layer in layers_of(model)]
    ends = [min(model.length, kv.shape[-2]) for kv in held]  # a static cache has free slots behind them
    return [kv[..., end - size : end, :] for kv, end, size in zip(held, ends, sizes, strict=True)]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral", "gemma3"])
def test_caches_after_rejection_equal_fresh_ones(arch: str) -> None:
    """Left after any token, and rewound to what was shown: every key and value as from one forward of those tokens."""
    patient, doctor = patient_of(tiny(arch, seed=3)), doctor_of(tiny(arch, seed=4), base=tiny(arch, seed=5))
    prompt, guidance = PROMPTS[1], Guidance(0.8, {"doctor": 0.9}, "ratio", 0.0)
    for shown in (1, 2, 3, 5, 6, 8):
        session, ids = PrefixCache(), list(prompt)
        steps = decode(
            patient,
            {"doctor": doctor},
            [prompt],
            lambda: guidance,
            Sampling(),
            seed=1,
            drafting=FixedLength(5),
            prefix_cache=session,
        )
        ids.extend(step.token.id for step in islice(steps, shown))
        steps.close()
        assert session.ids == ids
        assert list(session.caches) == ["patient", "doctor doctor", "base doctor"]
        for role, model in session.caches.items():
            least = min(model.length, len(ids))
            assert least >= len(ids) - 1
            model.rewind(least)
            assert model.length == least, role
            fresh = DynamicKV(model.model)
            fresh.feed(torch.tensor([ids[:least]]))
            for mine, other in zip(contents(model, least), contents(fresh, least), strict=True):
                assert torch.allclose(mine, other, atol=1e-9)


@pytest.mark.parametrize("arch", ["llama", "mistral"])
@pytest.mark.parametrize("drafting", [None, FixedLength(4)], ids=["reference", "drafted"])
def test_the_next_turn_reads_only_what_is_new(arch: str, drafting: Any) -> None:
    """Interrupted after any token, the conversation goes on from the caches, as one decoded from nothing does."""
    patient, doctor = patient_of(tiny(arch, seed=3)), doctor_of(tiny("llama", seed=4), base=tiny("llama", seed=5))
    named, guidance = {"doctor": doctor}, Guidance(0.8, {"doctor": 0.9}, "ratio", 0.0)
    for shown in (1, 2, 4, 7):
        session, prompt = PrefixCache(), list(PROMPTS[1])
        steps = decode(
            patient, named, [prompt], lambda: guidance, Sampling(), seed=1, drafting=drafting, prefix_cache=session
        )
        said = [step.token.id for step in islice(steps, shown)]
        steps.close()
        turn = [*prompt, *said, 4, 5, 6]
        how: dict[str, Any] = {"max_new_tokens": 8, "seed": 2, "drafting": drafting}
        continued = run(patient, [doctor], [turn], guidance, prefix_cache=session, **how)
        assert session.prefilled <= 5
        same(continued, run(patient, [doctor], [turn], guidance, **how))
        # Another conversation shares nothing, a shorter one shares a part, and a window that has moved is read again.
        for other in ([9, *turn], turn[:6], turn[:-1]):
            again = run(patient, [doctor], [other], guidance, prefix_cache=session, **how)
            same(again, run(patient, [doctor], [other], guidance, **how))


@pytest.mark.parametrize("who", ["patient", "doctor doctor", "base doctor"])
def test_an_interrupt_within_a_forward(who: str) -> None:
    """Ctrl+C lands in the middle of a model more often than between two: the layers that had gone on are cut back."""
    patient, doctor = patient_of(tiny("llama", seed=3)), doctor_of(tiny("llama", seed=4), base=tiny("llama", seed=5))
    guidance, session, prompt = Guidance(0.8, {"doctor": 0.9}, "ratio", 0.0), PrefixCache(), PROMPTS[1]
    named, drafting = {"doctor": doctor}, FixedLength(1)
    steps = decode(
        patient, named, [prompt], lambda: guidance, Sampling(), seed=1, drafting=drafting, prefix_cache=session
    )
    said = [next(steps).token.id for _ in range(2)]  # by then every model has taken a step

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = session.caches[who].model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        said.extend(step.token.id for step in steps)
    hook.remove()
    layers = layers_of(session.caches[who])
    assert type(layers[0]) is StaticLayer or layers[0].keys.shape[-2] > layers[1].keys.shape[-2]
    assert session.ids == prompt + said
    turn = [*prompt, *said, 4, 5]
    again = run(patient, [doctor], [turn], guidance, prefix_cache=session, max_new_tokens=8)
    assert session.prefilled <= 3
    same(again, run(patient, [doctor], [turn], guidance, max_new_tokens=8))


def recurrent() -> Any:
    torch.manual_seed(2)
    config = AutoConfig.for_model(
        "falcon_h1",
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        mamba_d_ssm=16,
        mamba_n_heads=2,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("who", ["doctor", "base"])
def test_a_state_that_cannot_go_back_is_not_drafted_for(who: str) -> None:
    """A recurrent model: the reference path by itself, said once; the answers are those of the reference path."""
    patient, plain = patient_of(tiny("llama", seed=3).float()), tiny("llama", seed=4).float()
    doctor = doctor_of(recurrent()) if who == "doctor" else doctor_of(plain, base=recurrent())
    guidance, drafting = Guidance(0.8, {"doctor": 0.9}, "product" if who == "doctor" else "ratio", 0.0), Erratic()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        rows = run(patient, [doctor], PROMPTS, guidance, drafting, max_new_tokens=8)
    assert [str(w.message) for w in heard if issubclass(w.category, LLMDoctorWarning)] == [
        "the state of FalconH1ForCausalLM cannot take tokens back: decoding without speculation"
    ]
    assert not drafting.lengths
    assert [ids_of(row) for row in rows] == [
        ids_of(row) for row in run(patient, [doctor], PROMPTS, guidance, max_new_tokens=8)
    ]
