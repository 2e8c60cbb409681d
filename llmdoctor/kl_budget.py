"""The strength of guidance at which the guided answers are a given KL divergence away from the patient."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmdoctor.errors import UsageError
from llmdoctor.records import Estimate

_FIRST_STEP, _NEAREST = 8.0, 0.1  # greatest step while one side is open; least distance to a known end, as a share


@dataclass(frozen=True, slots=True)
class Spent:
    """A strength that was tried, and the mean KL(guided || patient) per token that it had, in nats."""

    strength: float
    kl: Estimate


def find_strength(
    measure: Callable[[float], Estimate], budget: float, *, limit: float, tolerance: float = 0.02, tries: int = 12
) -> list[Spent]:
    """Try strengths from 1 on until the KL is ``budget`` up to ``tolerance`` (a share of it); the best comes last.

    KL grows with the strength, at first with its square, so the next one is found on a line through the known ones in
    log KL over log strength, kept away from their ends so that it converges like bisection at worst. Answers change in
    steps, so some budgets are met only nearly. Raises UsageError where no strength up to ``limit`` has that KL.
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
                f"no beta has a KL of {budget:g} per token: the strongest guidance reaches {best.kl.value:.3g} nats"
            )
        strength = limit if flat else _next(below, above, budget, limit)


def _next(below: Spent | None, above: Spent | None, budget: float, limit: float) -> float:
    if below and above:
        low, high = math.log(below.strength), math.log(above.strength)
        share = 0.5
        if below.kl.value > 0:
            share = math.log(budget / below.kl.value) / math.log(above.kl.value / below.kl.value)
        return math.exp(low + min(1 - _NEAREST, max(_NEAREST, share)) * (high - low))
    known = below or above
    assert known is not None
    step = math.sqrt(budget / known.kl.value) if known.kl.value > 0 else _FIRST_STEP
    step = min(_FIRST_STEP, max(1.1, step)) if below else max(1 / _FIRST_STEP, min(1 / 1.1, step))
    return min(limit, known.strength * step)
