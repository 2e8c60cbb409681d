"""Measures of answers: by hand, and against other ways to the same number."""

import math
import random
import statistics

import pytest

from llmdoctor.answers import (
    distinct_estimate,
    distinct_n,
    entropy_n,
    measures,
    rate,
    repeated_sentences,
    share,
    share_difference,
    wilson,
)
from llmdoctor.profiles import clinic_world as world
from llmdoctor.records import Answer, Estimate, GuidedToken


def test_diversity_measures():
    """'a b c d e' twice: 2 distinct 4-grams of 4, each with probability 1/2, so the entropy is ln 2."""
    assert distinct_n(["a b c d e", "a b c d e"]) == 0.5
    assert entropy_n(["a b c d e", "a b c d e"]) == pytest.approx(0.6931, abs=1e-4)
    assert distinct_n([]) == entropy_n([]) == 0.0
    rng = random.Random(3)
    answers = [world.answer(q, rng, helpful=1.0) for q in world.held_out_questions()]
    assert 0.12 < distinct_n(answers) < 0.4


def test_sentences_that_come_again():
    text = "Go to bed early. Drink less tea!  go  to bed early. Yes. Yes.\nDrink less tea!"
    assert repeated_sentences(text) == (2, 5 - 1)  # "Yes." is too short to count
    assert repeated_sentences("") == (0, 0)
    assert repeated_sentences("One sentence without an end") == (0, 1)


@pytest.mark.parametrize("size", [2, 5, 11, 12, 60])
def test_the_interval_of_a_mean_is_students(size):
    """It holds the mean in 95 of 100 cases, also with two values."""
    rng = random.Random(size)
    covered = sum(rate([rng.gauss(3, 2) for _ in range(size)]).covers(3) for _ in range(2000))
    assert 0.93 < covered / 2000 < 0.97
    values = [rng.random() for _ in range(size)]
    found = rate(values)
    assert found.value == pytest.approx(statistics.fmean(values))
    assert (found.high - found.value) / (statistics.stdev(values) / math.sqrt(size)) == pytest.approx(
        {2: 12.706, 5: 2.776, 11: 2.228, 12: 2.201, 60: 2.001}[size], abs=0.002
    )


def test_a_rate_weighs_by_count_and_answers_to_one_prompt_are_one_group():
    assert rate([1.0, 9.0], [1, 3]).value == 2.5
    values = [1.0, 1.0, 2.0, 2.0, 6.0, 6.0]
    assert rate(values, groups="aabbcc") == rate([1.0, 2.0, 6.0])
    one = rate([1.0, 2.0], groups="aa")
    assert one.value == 1.5
    assert math.isnan(one.low)
    assert math.isnan(rate([]).value)


def test_the_jackknife_of_distinct_n_leaves_out_one_prompt_at_a_time():
    texts = ["a b c d e", "a b c d f", "x y z w", "a b c d e"]
    found = distinct_estimate(texts, groups="aabc")

    def log_odds(x: float) -> float:
        return math.log(x / (1 - x))

    without = [distinct_n(texts[2:]), distinct_n([*texts[:2], texts[3]]), distinct_n(texts[:3])]
    error = math.sqrt(2 / 3 * sum((x - statistics.fmean(without)) ** 2 for x in without))
    assert found.value == distinct_n(texts)
    half = 4.303 * error / (found.value * (1 - found.value))
    assert log_odds(found.high) - log_odds(found.value) == pytest.approx(half)
    assert log_odds(found.value) - log_odds(found.low) == pytest.approx(half)
    all_new = distinct_estimate(["a b c d", "e f g h"])
    assert all_new.value == 1
    assert math.isnan(all_new.low)
    assert math.isnan(distinct_estimate(["a b c", "d"]).value), "there are no 4-grams, so they say nothing"


def test_measures_of_answers_are_per_token():
    def token(kl, flip):
        return GuidedToken(0, 1, "x", -2.0, {"helpful": -1.0}, -1.5, {"helpful": 0.0}, flip, kl, 1.0, {"helpful": 0.8})

    answers = [Answer("x", (token(0.4, True),), True), Answer("xxx", (token(0.0, False),) * 3, False)]
    found = measures(answers)
    assert found["kl_per_token"].value == pytest.approx(0.1)
    assert found["changed"].value == 0.25
    assert (found["patient_logprob"].value, found["helpful_logprob"].value) == (-2.0, -1.0)
    assert (found["tokens"].value, found["words"].value, found["unfinished"].value) == (2.0, 1.0, 0.5)
    assert found["patient_logprob"] == Estimate(-2.0, -2.0, -2.0)
    assert "tokens_per_second" not in found
    assert measures(answers, seconds=[1.0, 3.0])["tokens_per_second"].value == 1.0


@pytest.mark.parametrize("betas", [{}, {"helpful": 0.0}])
def test_without_a_beta_nothing_is_changed_by_definition(betas):
    """With one, a share of 0 is what these answers show: it has an interval."""
    said = {"id": 1, "text": "x", "patient_logprob": -2.0, "doctor_logprobs": dict.fromkeys(betas, -1.0)}
    said |= {"logprob": -2.0, "values": {}, "flip": False, "kl": 0.0, "alpha": 2.0}

    def changed(betas):
        return measures([Answer("x", (GuidedToken(position=0, betas=betas, **said),), True)] * 4)["changed"]

    assert changed(betas) == Estimate(0.0, 0.0, 0.0)
    assert changed({"helpful": 0.1}) == wilson(0.0, 4)


@pytest.mark.parametrize("prompts", [8, 40])
@pytest.mark.parametrize("common", [0.1, 0.5, 0.9])
def test_the_interval_of_a_share_stays_in_0_to_1_and_covers_it(prompts, common):
    """Of tokens that resemble each other within an answer: each answer has a share of its own, Beta(6p, 6(1 - p))."""
    rng = random.Random(prompts)
    covered = 0
    for _ in range(1000):
        counts = [rng.randint(20, 60) for _ in range(prompts)]
        own = [rng.betavariate(6 * common, 6 * (1 - common)) for _ in counts]
        values = [sum(rng.random() < p for _ in range(n)) for p, n in zip(own, counts, strict=True)]
        found = share(values, None, counts)
        assert 0 <= found.low <= found.value <= found.high <= 1
        covered += found.covers(common)
    assert 0.90 < covered / 1000 < 0.99, covered


def test_shares_at_their_ends_have_a_width():
    """Of the 3 answers, not of their 300 tokens, which resemble each other; no more cases than there are tokens."""
    assert share([0, 0, 0], None, [100, 100, 100]) == wilson(0, 3)
    assert share([100, 100, 100], None, [100, 100, 100]) == wilson(1, 3)
    assert share([1, 1], None, [2, 2]) == wilson(0.5, 4)
    assert share([True, False], "aa") == wilson(0.5, 1)
    assert math.isnan(share([3], None, [4]).low)


@pytest.mark.parametrize("both", [0.2, 0.55])
def test_the_interval_of_a_difference_of_shares_of_the_same_cases(both):
    """Right in P(first) = 0.8 and P(second) = 0.6 of the cases, and together in ``both`` + 0.2 of them or so."""
    rng = random.Random(5)
    chances = (both, 0.8 - both, max(0.0, 0.6 - both), max(0.0, both - 0.4))  # both, first, second, neither
    covered = 0
    for _ in range(1000):
        cases = rng.choices([(1, 1), (1, 0), (0, 1), (0, 0)], chances, k=30)
        found = share_difference(*zip(*cases, strict=True))
        assert -1 <= found.low <= found.value <= found.high <= 1
        covered += found.covers((chances[1] - chances[2]) / sum(chances))
    assert 0.92 < covered / 1000 < 0.99, covered
    assert share_difference([1, 1], [0, 0]).value == 1
    assert share_difference([1, 1], [0, 0]).low < 1


def test_few_cases_that_agree_are_not_certain_to():
    """As when an untrained doctor is compared with its base."""
    few, many = (share_difference(cases, cases) for cases in ([1, 1, 0, 0], [1, 1, 0, 0] * 50))
    assert few.value == many.value == 0
    assert few.low == -few.high < many.low == -many.high < 0
