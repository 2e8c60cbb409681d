"""The strength of guidance at which the guided answers are a given KL divergence away from the patient."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmdoctor.errors import UsageError
from llmdoctor.records import Estimate

_FIRST_STEP, _NEAREST = 8.0, 0.1  # greatest step while one side is open; least distance to a known end, as a share
_HARDLY = 0.01  # a strength that hardly speaks


@dataclass(frozen=True, slots=True)
class Spent:
    """A strength that was tried, and the mean KL(guided || patient) per token that it had, in nats."""

    strength: float
    kl: Estimate


def find_strength(
    measure: Callable[[float], Estimate], budget: float, *, limit: float, tolerance: float = 0.02, tries: int = 12
) -> list[Spent]:
    """Try strengths from 1 on until the KL is ``budget`` up to ``tolerance`` (a share of it); the best comes last.

    KL grows with the strength, at first with its square. The next strength is found on the line through two known ones
    in log KL over log strength; between two it is kept away from both, and after two tries on the same side of the
    budget it is halfway between them, so that every second try is bisection at worst.
    Answers change in steps, so some budgets are met only nearly. Raises UsageError where no strength up to ``limit``
    has that KL, or where weaker guidance has no less: a cut of the patient's unlikely tokens has a KL of its own, and
    so has an alpha other than 1.
    """
    tried: list[Spent] = []
    below: Spent | None = None
    above: Spent | None = None
    strength = min(1.0, limit)
    while True:
        spent = Spent(strength, measure(strength))
        tried.append(spent)
        flat = below is not None and above is None and spent.kl.value <= 1.01 * below.kl.value
        if spent.kl.value < budget:
            below = spent
        else:
            above = spent
        best = min(tried, key=lambda one: abs(one.kl.value - budget))
        narrow = below and above and above.strength < 1.002 * below.strength
        if abs(best.kl.value - budget) <= tolerance * budget or narrow or len(tried) == tries:
            return [*(one for one in tried if one is not best), best]
        if below is spent and strength >= limit:
            raise UsageError(
                f"no beta has a KL of {budget:g} per token: the most that guidance reaches is "
                f"{max(one.kl.value for one in tried):.3g} nats"
            )
        if below is None and strength < _HARDLY and len(tried) > 1 and spent.kl.value > 0.97 * tried[-2].kl.value:
            raise UsageError(
                f"no beta has a KL of {budget:g} per token: guidance that hardly speaks still has {spent.kl.value:.3g} "
                "nats. The plausibility cut of mode ratio and an alpha other than 1 have a KL of their own: lower "
                "plausibility, set alpha to 1, or raise the budget"
            )
        strength = limit if flat else _next(tried, below, above, budget, limit)


def _next(tried: list[Spent], below: Spent | None, above: Spent | None, budget: float, limit: float) -> float:
    if below and above:
        low, high = math.log(below.strength), math.log(above.strength)
        share = 0.5
        # twice on the same side of the budget: there the line is a bad guide, as where the KL jumps
        creeps = len(tried) > 1 and (tried[-1].kl.value < budget) == (tried[-2].kl.value < budget)
        if below.kl.value > 0 and not creeps:
            share = math.log(budget / below.kl.value) / math.log(above.kl.value / below.kl.value)
        return math.exp(low + min(1 - _NEAREST, max(_NEAREST, share)) * (high - low))
    last = tried[-1]
    step = _FIRST_STEP
    if last.kl.value > 0:  # by its logarithm: a budget may be any number
        ratio = math.log(budget) - math.log(last.kl.value)
        step = math.exp(min(math.log(_FIRST_STEP), ratio / _steepness(tried)))
    step = min(_FIRST_STEP, max(1.25, step)) if below else max(1 / _FIRST_STEP, min(0.8, step))
    return min(limit, last.strength * step)


def _steepness(tried: list[Spent]) -> float:
    """d log KL / d log strength at the last two strengths; 2, as for weak guidance, where it is not known."""
    kls = [one.kl.value for one in tried[-2:]]
    if len(kls) < 2 or min(kls) <= 0:
        return 2.0
    found = math.log(kls[1] / kls[0]) / math.log(tried[-1].strength / tried[-2].strength)
    return min(2.0, max(0.25, found))
