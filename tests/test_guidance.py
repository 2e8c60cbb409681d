"""The product, the filters after it and the draw, against naive float64 arithmetic on probabilities."""

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from llmdoctor.decoding.product import _TopP, draw, exponentials, kl_divergence, product
from llmdoctor.errors import UsageError
from llmdoctor.models import Vocabulary
from llmdoctor.settings import Guidance, Sampling, check_guidance


def splitmix64(state: int) -> Iterator[int]:
    """The numbers of SplitMix64 begun at ``state``, as in its authors' paper."""
    mask = 2**64 - 1
    while True:
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        yield z ^ (z >> 31)


def naive_exponentials(key: int) -> Iterator[float]:
    return (-math.log(((z >> 11) + 0.5) / 2**53) for z in splitmix64(key))


def naive_draw(probs: Sequence[float], key: int) -> int:
    """The token that wins the race: the one with the greatest p / E."""
    race = [p / e for p, e in zip(probs, naive_exponentials(key), strict=False)]
    return race.index(max(race))


def key_for(token: int, probs: Sequence[float]) -> int:
    """The first key that draws this token."""
    return next(key for key in itertools.count() if naive_draw(probs, key) == token)


def keys(count: int, seed: int) -> Tensor:
    return torch.randint(2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def distributions(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).log_softmax(dim=-1).to(dtype)


def naive_product(
    patient: Tensor, doctors: list[Tensor], alpha: float, betas: list[float], bases=None, cut=0.0, dead=0.0
):
    """One row, token by token, on probabilities."""
    weights = []
    for y, p in enumerate(patient.double().exp().tolist()):
        weight = p**alpha if p >= cut * float(patient.double().exp().max()) else 0.0
        for i, (doctor, beta) in enumerate(zip(doctors, betas, strict=True)):
            if bases and abs(float(doctor[y] - bases[i][y])) <= dead:
                continue
            weight *= math.exp(doctor[y]) ** beta
            if bases:
                weight /= math.exp(bases[i][y]) ** beta
        weights.append(weight)
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", ["product", "ratio"])
@pytest.mark.parametrize("strengths", [(1.0, [0.8]), (0.0, [1.7]), (0.37, [0.2, 2.6]), (2.5, [0.0, 0.4, 1.1])])
def test_product_is_the_normalised_product_of_powers(dtype: torch.dtype, mode: str, strengths):
    alpha, betas = strengths
    rows, size = 4, 40
    patient = distributions(rows, size, dtype=dtype)
    doctors = {f"d{i}": distributions(rows, size, seed=10 + i, dtype=dtype) for i in range(len(betas))}
    bases = {name: distributions(rows, size, seed=20 + i, dtype=dtype) for i, name in enumerate(doctors)}
    guidance = Guidance(alpha, dict(zip(doctors, betas, strict=True)), mode, plausibility=0.05)
    found = product(patient, doctors, guidance, bases)
    for row in range(rows):
        ratio = {"bases": [base[row] for base in bases.values()], "cut": 0.05} if mode == "ratio" else {}
        expected = naive_product(patient[row], [d[row] for d in doctors.values()], alpha, betas, **ratio)
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(found[row].double().exp(), expected, rtol=tolerance, atol=1e-15)
    assert mode == "product" or (found == -torch.inf).any()


@pytest.mark.parametrize("betas", [[0.9], [0.2, 1.6]])
def test_a_dead_zone_leaves_the_patient_its_choice(betas: list[float]):
    """Against the twin; and two tokens in the zone keep the patient's own odds, while one beyond it loses its."""
    patient = distributions(3, 40)
    doctors = {f"d{i}": distributions(3, 40, seed=10 + i) for i in range(len(betas))}
    bases = {name: distributions(3, 40, seed=20 + i) for i, name in enumerate(doctors)}
    guidance = Guidance(1.0, dict(zip(doctors, betas, strict=True)), "ratio", 0.01, dict.fromkeys(doctors, 1.5))
    found = product(patient, doctors, guidance, bases)
    for row in range(3):
        rows = [[d[row] for d in models.values()] for models in (doctors, bases)]
        expected = naive_product(patient[row], rows[0], 1.0, betas, rows[1], cut=0.01, dead=1.5)
        torch.testing.assert_close(found[row].exp(), expected, rtol=1e-10, atol=1e-15)

    patient, doctor, base = (torch.tensor([p]).log() for p in ([0.6, 0.2, 0.2], [0.5, 0.4, 0.1], [0.25, 0.25, 0.5]))
    odds = product(patient, {"d": doctor}, Guidance(1.0, {"d": 1.0}, "ratio", 0.0, {"d": 0.8}), {"d": base}).exp()[0]
    assert float(odds[0] / odds[1]) == pytest.approx(3.0)  # both within .8 nats
    assert float(odds[2] / odds[1]) == pytest.approx(0.2)  # log .2 is beyond


@pytest.mark.parametrize("mode", ["product", "ratio"])
def test_beta_0_is_the_patient_and_alpha_0_beta_1_is_the_doctor(mode: str):
    patient, doctor = distributions(3, 30), distributions(3, 30, seed=1)
    alone = product(patient, {"d": doctor}, Guidance(1.0, {"d": 0.0}, mode), {"d": patient})
    assert torch.equal(alone, patient)
    assert torch.equal(product(patient, {"d": doctor}, Guidance(1.0, {})), patient)
    only = product(patient, {"d": doctor, "e": patient}, Guidance(0.0, {"d": 1.0}))
    torch.testing.assert_close(only, doctor)


@pytest.mark.parametrize("sampling", [Sampling(top_k=1), Sampling(top_p=0.5), Sampling(min_p=0.5)])
def test_filters_apply_after_the_product(sampling: Sampling):
    """Patient .5, .1, .4 and doctor .1, .5, .4: the product .05 : .05 : .16 keeps only token 2, neither's favourite."""
    patient, doctor = (torch.tensor([p]).log() for p in ([0.5, 0.1, 0.4], [0.1, 0.5, 0.4]))
    guided = product(patient, {"d": doctor}, Guidance(1.0, {"d": 1.0})).expand(64, -1)
    drawn = draw(guided, sampling, keys(64, seed=9))
    assert drawn.tolist() == [2] * 64


def naive_filter(logps: list[float], s: Sampling) -> Tensor:
    """Temperature, then the k likeliest, then the fewest likeliest that hold top_p of what is left, then min_p."""
    weights = {y: math.exp(logp / s.temperature) for y, logp in enumerate(logps)}

    def normalised(kept: dict[int, float]) -> dict[int, float]:
        return {y: w / sum(kept.values()) for y, w in sorted(kept.items(), key=lambda item: -item[1])}

    kept = normalised(weights)
    if s.top_k:
        kept = normalised(dict(list(kept.items())[: s.top_k]))
    nucleus: dict[int, float] = {}
    for y, p in kept.items():
        if sum(nucleus.values()) < s.top_p:
            nucleus[y] = p
    kept = normalised(nucleus)
    kept = normalised({y: p for y, p in kept.items() if p >= s.min_p * max(kept.values())})
    return torch.tensor([kept.get(y, 0.0) for y in range(len(logps))], dtype=torch.float64)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6),
        Sampling(temperature=1.8, top_k=5),
        Sampling(top_p=0.7),
        Sampling(min_p=0.15),
        Sampling(temperature=1.3, top_k=8, top_p=0.9, min_p=0.05),
        Sampling(top_k=1000),
    ],
    ids=lambda s: ",".join(f"{k}={getattr(s, k)}" for k in ("temperature", "top_k", "top_p", "min_p")),
)
def test_draws_follow_the_filtered_distribution(sampling: Sampling, chi_square_p):
    guided = product(
        distributions(12, seed=3, dtype=torch.float32)[None],
        {"d": distributions(12, seed=4, dtype=torch.float32)[None]},
        Guidance(1.0, {"d": 0.8}),
    )
    counts = draw(guided.expand(40_000, -1), sampling, keys(40_000, seed=6)).bincount(minlength=12)
    expected = naive_filter(guided[0].tolist(), sampling)
    assert chi_square_p(counts, expected) > 0.01


def test_a_key_gives_every_token_its_exponential_number():
    # the first numbers of SplitMix64 from 0, as its reference code prints them
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    assert list(itertools.islice(splitmix64(0), 5)) == known
    some = torch.tensor([0, 1, 2**63 - 1, -1, -(2**63)])
    found = exponentials(some, torch.arange(1000))
    for key, row in zip(some.tolist(), found.tolist(), strict=True):
        assert row == pytest.approx(list(itertools.islice(naive_exponentials(key), 1000)), rel=1e-14)


def test_the_draw_is_the_winner_of_the_race_whatever_else_is_in_the_batch():
    laws = distributions(300, 12, seed=6)
    own = keys(300, seed=2)
    expected = [naive_draw(law, key) for law, key in zip(laws.exp().tolist(), own.tolist(), strict=True)]
    assert len(set(expected)) > 8
    assert draw(laws, Sampling(), own).tolist() == expected
    assert draw(laws[7:8], Sampling(), own[7:8]).tolist() == expected[7:8]


def test_a_sharper_law_keeps_what_it_prefers():
    """With the same key, a token that only gains probability against all others is still drawn."""
    law = distributions(12, seed=3)
    own = keys(2000, seed=4)
    before = draw(law.expand(2000, -1), Sampling(), own)
    raised = law.clone()
    raised[5] += 1.0
    after = draw(raised.log_softmax(-1).expand(2000, -1), Sampling(), own)
    assert bool(((after == before) | (after == 5)).all())
    assert bool((after != before).any())


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-30, 1e-45, 1e-300])
def test_temperature_towards_0_is_greedy(temperature: float):
    rows = distributions(50, 20, seed=7, dtype=torch.float32)
    drawn = draw(rows, Sampling(temperature=temperature), keys(50, seed=0))
    assert torch.equal(drawn, rows.argmax(dim=1))


PADDED = Vocabulary({str(i): i for i in (1, 2, 3, 4, 5, 7)} | {"8": 7}, 9)  # ids 0, 6 and 8 have no token


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0), Sampling(temperature=3, top_k=8, top_p=0.99)]
)
@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(1.0, {"d": 0.0}),
        Guidance(1.0, {"d": 0.8}),
        Guidance(0.0, {"d": 3.0}),
        Guidance(3.0, {}),
        Guidance(1.0, {"d": 0.8}, "ratio"),
        Guidance(0.0, {"d": 0.8}, "ratio", plausibility=0.0),
        Guidance(0.5, {"d": 2.0}, "ratio", plausibility=0.0),
    ],
    ids=str,
)
def test_padding_is_never_drawn(guidance: Guidance, sampling: Sampling):
    """Embedding rows beyond the tokens, and ids without one, have the greatest logits here and still no chance."""

    def model(seed: int) -> Tensor:
        logits = distributions(200, 12, seed=seed, dtype=torch.float32)
        logits[:, 9:] = 50
        logits[:, [0, 6, 8]] = 60
        return PADDED.mask(logits).log_softmax(dim=-1)

    patient, doctor, base = model(1), model(2), model(3)
    torch.testing.assert_close(patient.exp().sum(dim=1), torch.ones(200))
    guided = product(patient, {"d": doctor}, guidance, {"d": base})
    drawn = draw(guided, sampling, keys(200, seed=8))
    assert set(drawn.tolist()) <= set(PADDED.ids.values())
    divergence = kl_divergence(guided, patient)
    assert (divergence.isfinite() & (divergence > -1e-6)).all()


def test_log_probs_promote_half_precision_and_keep_float64():
    logits = torch.tensor([[8.0, 1.0, -3.0, 99.0]])
    expected = logits[:, :3].double().softmax(dim=1)
    for dtype, out, tolerance in ((torch.bfloat16, torch.float32, 1e-6), (torch.float64, torch.float64, 1e-14)):
        found = Vocabulary({"a": 0, "b": 1, "c": 2}, 3).mask(logits.to(dtype)).log_softmax(dim=-1)
        assert found.dtype == out
        torch.testing.assert_close(found.double().exp(), expected, rtol=tolerance, atol=0)


def test_kl_golden():
    """Product 1/2, 1/2, 0 against patient 1/4, 1/2, 1/4: 1/2 ln 2. The impossible token adds nothing."""
    guided = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]]).log()
    patient = torch.tensor([[0.25, 0.5, 0.25]] * 2).log()
    torch.testing.assert_close(kl_divergence(guided, patient), torch.tensor([0.5 * math.log(2), 0.0]))
    impossible = torch.tensor([[math.log(0.5), math.log(0.5), -INF]])  # also for the patient
    assert kl_divergence(impossible, impossible).item() == 0


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": NAN}, "alpha.*nan"),
        ({"alpha": -0.1}, "alpha.*-0.1"),
        ({"alpha": INF}, "alpha.*inf"),
        ({"betas": {"helpful": NAN}}, "beta of helpful.*nan"),
        ({"betas": {"helpful": -1.0}}, "beta of helpful.*-1"),
        ({"betas": {"helpfull": 0.5}}, "no doctor 'helpfull'.*helpful, safe"),
        ({"alpha": 0.0, "betas": {"helpful": 0.0, "safe": 0.0}}, "nothing is left"),
        ({"plausibility": 1.5}, "plausibility.*1.5"),
        ({"plausibility": NAN}, "plausibility.*nan"),
        ({"dead_zones": {"safe": -1.0}}, "dead_zone of safe.*-1"),
        ({"dead_zones": {"safe": INF}}, "dead_zone.*inf"),
        ({"dead_zones": {"saef": 1.0}}, "no doctor 'saef'"),
    ],
)
def test_guidance_out_of_range(change, said: str):
    fine = Guidance(0.0, {"helpful": 0.8, "safe": 0.0})
    check_guidance(fine, ("helpful", "safe"))
    with pytest.raises(UsageError, match=said):
        check_guidance(fine.replace(**change), ("helpful", "safe"))


@pytest.mark.parametrize(
    ("setting", "legal", "illegal"),
    [
        ("temperature", [0.0, 5.0], [-1.0, NAN, INF]),
        ("top_k", [0, 1, 10**6], [-1]),
        ("top_p", [1e-6, 1.0], [0.0, 1.01, NAN]),
        ("min_p", [0.0, 0.99], [-0.1, 1.0, NAN]),
        ("max_new_tokens", [1], [0, -5]),
    ],
)
def test_sampling_out_of_range(setting: str, legal: list[float], illegal: list[float]):
    rows = distributions(2, 6, seed=8)
    for value in legal:
        sampling = Sampling(**{setting: value})
        assert (draw(rows, sampling, torch.tensor([3, 9])) < 6).all()
    for value in illegal:
        with pytest.raises(UsageError, match=f"{setting}.*{value}"):
            Sampling(**{setting: value})


@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 30.0])
def test_top_p_of_a_large_vocabulary_is_that_of_transformers(temperature: float, top_p: float):
    """Where few tokens hold the mass and where thousands do, one row of each kind too; some tokens are out already."""
    generator = torch.Generator().manual_seed(0)
    widths = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0], [0.1]]).double()
    scores = torch.randn(6, 20_000, generator=generator).double() * widths / temperature
    scores[:, ::7] = -torch.inf
    expected = TopPLogitsWarper(top_p)(None, scores)
    assert torch.equal(_TopP(top_p)(None, scores), expected)


def test_what_top_p_keeps_of_tokens_that_tie_depends_on_no_neighbour():
    """In half precision many tie; one row has few likely tokens, the other thousands."""
    generator = torch.Generator().manual_seed(1)
    peaked = (4 * torch.randn(1, 5000, generator=generator)).bfloat16().float()
    flat = torch.zeros(1, 5000)
    for top_p in (0.5, 0.9, 0.99):
        alone = _TopP(top_p)(None, peaked)
        assert torch.equal(_TopP(top_p)(None, torch.cat([peaked, flat]))[:1], alone)
