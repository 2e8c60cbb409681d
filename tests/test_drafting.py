"""The controller of the drafts' lengths, on simulated rounds of known acceptance and cost. No real clock."""

import random
from collections.abc import Callable
from functools import cache

import pytest

from llmdoctor.decoding.drafting import LENGTHS, AdaptiveLength, Drafting, FixedLength

Cost = Callable[[int, int, int], float]  # (rows, filled, length) -> seconds
HICCUPS = (1.0, 1.05, 1.1, 6.0)  # factors of the times that the controller sees, all equally frequent


@cache
def cost(draft: float, rows: int = 1, growth: float = 0.004) -> Cost:
    """Rounds in which a draft of one token takes ``draft`` of a patient's forward; one more token for it to read, 2%.

    Every cached token adds the share ``growth`` to a round's time. In a batch the arithmetic of the rows counts too.
    """
    verify, each = (0.02, 0.0) if rows == 1 else (0.1, 0.04)

    def seconds(rows: int, filled: int, length: int) -> float:
        forwards = 1 + each * rows + (verify * length + draft * (length + 1)) * (1 + each * rows)
        return 1e-3 * forwards * (1 + growth * filled)

    return seconds


def spent(
    drafting: Drafting,
    acceptance: float,
    seconds: Cost,
    rows: int = 1,
    *,
    rounds: int = 3000,
    answer: int = 280,
    seed: int = 0,
    noise: tuple[float, ...] = (1.0,),
) -> float:
    """Seconds per token of answers that begin at 20 cached tokens again and again, for at least so many rounds.

    Every row accepts on its own and leaves the batch with its last token.
    """
    dice, clock = random.Random(seed), random.Random(seed + 1)
    total, count, said = 0.0, 0, 0
    while count < rounds:
        done = [0] * rows
        while done:
            filled = 20 + max(done)
            length = min(drafting.choose(len(done)), answer - min(done) - 1)
            accepted = [next((i for i in range(length) if dice.random() > acceptance), length) for _ in done]
            took = seconds(len(done), filled, length)
            tested = sum(min(a + 1, length) for a in accepted)
            drafting.record(len(done), filled, length, sum(accepted), tested, took * clock.choice(noise))
            total, count = total + took, count + 1
            done = [d for d in (before + a + 1 for before, a in zip(done, accepted, strict=True)) if d < answer]
        said += rows * answer
    return total / said


@cache
def spent_at(length: int, acceptance: float, seconds: Cost, rows: int, **how: int) -> float:
    """Seconds per token with drafts of one length, simulated once for all tests: no noise changes it."""
    return spent(FixedLength(length), acceptance, seconds, rows, **how)  # type: ignore[arg-type]


def gain(drafting: Drafting | int, acceptance: float, seconds: Cost, rows: int = 1, **how: object) -> float:
    """How much faster than the reference path; a number is drafts of that length."""
    plain = spent_at(0, acceptance, seconds, rows, rounds=280)
    if isinstance(drafting, int):
        return plain / spent_at(drafting, acceptance, seconds, rows, **how)  # type: ignore[arg-type]
    return plain / spent(drafting, acceptance, seconds, rows, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", [(1.0,), HICCUPS], ids=["calm", "hiccups"])
@pytest.mark.parametrize(("acceptance", "draft"), [(0.3, 0.5), (0.3, 0.9), (0.6, 2.0), (0.8, 4.0)])
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_where_drafting_loses_little_is_lost(
    rows: int, acceptance: float, draft: float, noise: tuple[float, ...]
) -> None:
    """At most 2% behind the reference path, with all that a fresh controller tries."""
    seconds = cost(draft, rows)
    assert all(gain(k, acceptance, seconds, rows, rounds=280) < 1 for k in LENGTHS[1:])
    for seed in range(2):
        assert gain(AdaptiveLength(), acceptance, seconds, rows, seed=seed, noise=noise) > 1 / 1.02


@pytest.mark.parametrize(("noise", "share"), [((1.0,), 0.93), (HICCUPS, 0.88)], ids=["calm", "hiccups"])
@pytest.mark.parametrize(
    ("acceptance", "draft"), [(0.6, 0.05), (0.8, 0.05), (0.6, 0.2), (0.8, 0.2), (0.95, 0.2), (0.95, 0.5)]
)
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_where_drafting_gains_it_gains_what_the_best_length_does(
    rows: int, acceptance: float, draft: float, noise: tuple[float, ...], share: float
) -> None:
    seconds = cost(draft, rows)
    best = max(gain(k, acceptance, seconds, rows, rounds=600) for k in LENGTHS)
    assert best > 1.15
    assert gain(AdaptiveLength(), acceptance, seconds, rows, noise=noise) > share * best


@pytest.mark.parametrize(("acceptance", "draft"), [(0.5, 0.5), (0.8, 0.5)])
def test_growing_caches_do_not_look_like_expensive_drafts(acceptance: float, draft: float) -> None:
    """A round of a long answer takes four times as long as one of a short: lengths are not compared across them."""
    seconds = cost(draft, growth=0.02)
    best = max(gain(k, acceptance, seconds, rounds=600) for k in LENGTHS)
    assert gain(AdaptiveLength(), acceptance, seconds) > 0.93 * best


def test_a_fresh_controller_learns_within_an_answer() -> None:
    """The first 280 tokens: 4% lost at most where drafting does not pay, four fifths of the gain where it does."""
    for seed in range(4):
        assert gain(AdaptiveLength(), 0.3, cost(0.9), rounds=1, seed=seed) > 0.96
        best = gain(8, 0.95, cost(0.2), rounds=1, seed=seed)
        assert gain(AdaptiveLength(), 0.95, cost(0.2), rounds=1, seed=seed) > 0.8 * best


@pytest.mark.parametrize("rows", [1, 8])
def test_the_length_follows_a_change_of_the_acceptance(rows: int) -> None:
    """As when the guidance is changed: after a thousand rounds of the old acceptance the new one is soon used."""
    seconds, drafting = cost(0.2, rows), AdaptiveLength()
    for acceptance in (0.2, 0.95, 0.2):
        best = max(gain(k, acceptance, seconds, rows, rounds=280) for k in LENGTHS)
        spent(drafting, acceptance, seconds, rows, rounds=400)  # may still be learning
        assert gain(drafting, acceptance, seconds, rows, rounds=600) > 0.93 * best
        assert drafting.acceptance == pytest.approx(acceptance, abs=0.2)


def simulated(acceptance: float, patient: float, verify: float, draft: float, rounds: int = 400) -> AdaptiveLength:
    """A controller after rounds of these costs (seconds of a patient's forward, a token more of it, a draft)."""
    lengths, dice = AdaptiveLength(), random.Random(0)
    for _ in range(rounds):
        k = lengths.choose(1)
        accepted = next((i for i in range(k) if dice.random() > acceptance), k)
        seconds = (patient + verify * k + draft * (k + 1)) * dice.choice(HICCUPS)
        lengths.record(1, 100, k, accepted, min(accepted + 1, k), seconds)
    return lengths


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("draft", [0.05, 0.2, 0.9])
def test_the_length_follows_acceptance_and_cost(acceptance: float, draft: float) -> None:
    """Close to the best length of the cost model, also when a quarter of the times are hiccups; 0 where none gains."""

    def rate(k: int) -> float:
        return sum(acceptance**j for j in range(k + 1)) / (1 + 0.02 * k + draft * (k + 1))

    lengths = simulated(acceptance, 1.0, 0.02, draft)
    assert lengths.acceptance == pytest.approx(acceptance, abs=0.15)
    chosen = [lengths.choose(1) for _ in range(31)][-1]
    assert rate(chosen) > 0.9 * max(map(rate, LENGTHS))


@pytest.mark.parametrize("prompt", [30, 1000])
def test_what_a_draft_model_has_to_read_first_does_not_end_drafting(prompt: int) -> None:
    """It has read nothing since it last drafted, the prompts included; its first timed draft has a hiccup."""
    drafting, drafted, behind, filled, hiccup = AdaptiveLength(4), 0, prompt, 0, True
    for _ in range(6000):
        length = drafting.choose(1)
        if length and behind > 1:
            drafting.record_reading(1, 0.004 * behind)
        took = 0.040 * (1 + 0.25 * length)
        if drafted == 1 and length and hiccup:
            took, hiccup = 4 * took, False
        accepted = next((i for i in range(length) if random.Random(filled + i).random() > 0.95), length)
        drafting.record(1, 100, length, accepted, min(accepted + 1, length), took)
        drafted += length > 0
        filled += accepted + 1
        behind = 0 if length else behind + 1
        if filled > 200:
            filled, behind = 0, prompt
    assert drafted > 4500


def test_a_length_is_not_compared_with_itself() -> None:
    """Two rounds of 4 drafts in a row say nothing of what a draft costs; a plain one beside them does."""
    drafting = AdaptiveLength(4)
    for length, seconds in ((4, 0.0), (4, 0.18), (4, 0.18), (0, 0.0), (0, 0.04)):
        drafting.record(1, 100, length, length, length, seconds)
        ratios = [ratio for _, ratio in drafting._size(1).ratios]
        assert all(ratio > 4 for ratio in ratios)
    assert ratios
