"""The search for a strength, on KLs that are known functions of it."""

import math
from collections.abc import Callable

import pytest

from llmdoctor.errors import UsageError
from llmdoctor.kl_budget import find_strength
from llmdoctor.records import Estimate

CURVES: dict[str, Callable[[float], float]] = {
    "square": lambda x: 0.04 * x**2,
    "saturates": lambda x: 0.6 * (1 - math.exp(-x)),
    "slow": lambda x: 0.05 * x**0.4,
    "late": lambda x: max(0.0, x - 0.5) * 0.1,
    "steps": lambda x: math.floor(40 * x) / 200,
}


def estimate(kl: float) -> Estimate:
    return Estimate(kl, kl, kl)


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("curve", CURVES)
def test_the_last_strength_has_the_budget(curve: str, budget: float) -> None:
    asked: list[float] = []

    def measure(strength: float) -> Estimate:
        asked.append(strength)
        return estimate(CURVES[curve](strength))

    tried = find_strength(measure, budget, limit=1e4)
    assert sorted(one.strength for one in tried) == sorted(asked)
    assert len(set(asked)) == len(asked) <= 9
    best = tried[-1]
    assert best.kl.value == CURVES[curve](best.strength)
    assert best.kl.value == pytest.approx(budget, rel=0.02)


def test_a_budget_between_two_steps_is_met_as_nearly_as_can_be() -> None:
    tried = find_strength(lambda x: estimate(0.2 if x < 1.7 else 0.4), 0.27, limit=1e4)
    assert (tried[-1].kl.value, len(tried) <= 12) == (0.2, True)


def test_a_jump_over_the_budget_is_closed_in_on() -> None:
    """Without bisection the line between both sides creeps towards the jump from one of them."""
    jump = 0.7112

    def measure(strength: float) -> Estimate:
        return estimate(0.07 * strength if strength < jump else 0.05 + 0.68 * strength)

    tried = find_strength(measure, 0.4, limit=1e4)
    below, above = ([one.strength for one in tried if (one.strength < jump) == side] for side in (True, False))
    assert min(above) < 1.005 * max(below)
    assert tried[-1].strength == min(above)


def test_a_budget_that_no_strength_has_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"the most that guidance reaches is 0\.6 nats"):
        find_strength(lambda x: estimate(CURVES["saturates"](x)), 0.7, limit=1e4)
    with pytest.raises(UsageError, match="reaches is 0 nats"):
        find_strength(lambda _: estimate(0.0), 0.1, limit=1e4)


def test_a_kl_that_weaker_guidance_keeps_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"hardly speaks still has 0\.18 nats.*lower plausibility, set alpha to 1"):
        find_strength(lambda x: estimate(0.18 + 0.04 * x**2), 0.05, limit=1e4)


@pytest.mark.parametrize("curve", CURVES)
def test_a_budget_of_any_size_is_looked_for_or_refused(curve: str) -> None:
    """The ratio of 1e308 to a KL, to a power, was beyond a float."""
    kls = [0.0]
    with pytest.raises(UsageError, match=r"no beta has a KL of 1e\+308") as refusal:
        find_strength(lambda x: estimate(kls.append(CURVES[curve](x)) or kls[-1]), 1e308, limit=1e4)
    assert f"is {max(kls):.3g} nats" in str(refusal.value)
    assert len(find_strength(lambda x: estimate(CURVES[curve](x)), 5e-324, limit=1e4)) == 12
