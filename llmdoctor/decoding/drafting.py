"""How many tokens a doctor or a draft model drafts before the patient checks them all at once.

The scheme is exact for any draft: token t of a row is the draw that the reference path would make, from the same
product with the same random key (`product.draw`). The draft is a guess of that draw: it draws with the same key from
the sharpened doctor, doctor^(alpha + beta), or from a draft model. Where guess and draw agree, the token is accepted,
and every model has read it already; at the first disagreement the draw itself is the next token, and the rest of the
draft is taken back. So the length of a draft changes the speed and never the text, and it may follow measured times.

Rejection sampling (accept with min(1, p / q), else draw from (p - q)+) accepts a little more, 1 - TV(p, q), but then
the text depends on the length of the drafts, and a guided answer no longer shares its keys with the unguided one.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
# Share of the rounds that trials may waste, for one row and for several: a batch learns more from each trial.
_BUDGET = (0.006, 0.003)
_CREDIT = 0.8  # rounds that a new batch size may waste at once
_RATIOS = 24  # comparisons of round times that are kept
# What drafting must gain over the reference path, for one row and for several. The rows of a batch accept different
# numbers of tokens, so they end at different rounds, and the last of them pay for a whole round.
_MARGIN = (1.02, 1.15)


class Drafting(Protocol):
    """Chooses the length of every draft."""

    def choose(self, rows: int) -> int:
        """Tokens to draft in the next round of ``rows`` rows; 0 is the plain path."""

    def record(self, rows: int, slots: int, length: int, accepted: int, tested: int, seconds: float) -> None:
        """Learn from a round: of ``tested`` drafted tokens, over all rows, ``accepted`` agreed with the draw.

        ``slots`` is the number of cache slots in use before the round, holes included. ``length`` may be smaller than
        what was chosen (0 too, near the end of an answer). Tokens behind the first disagreement are not tested.
        ``seconds`` of 0: not known.
        """

    def record_reading(self, rows: int, seconds: float) -> None:
        """Learn what a draft model took, before a round, to read what it had not read in the rounds without a draft."""


class FixedLength:
    """Always the same length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def choose(self, rows: int) -> int:
        """See ``Drafting``."""
        del rows
        return self.length

    def record(self, rows: int, slots: int, length: int, accepted: int, tested: int, seconds: float) -> None:
        """See ``Drafting``."""

    def record_reading(self, rows: int, seconds: float) -> None:
        """See ``Drafting``."""


class _Timed(NamedTuple):
    rows: int
    slots: int
    length: int
    seconds: float


@dataclass
class _Size:
    """What is known of batches of about the same number of rows. Costs are in plain rounds: rounds without a draft."""

    ratios: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_RATIOS))  # (length, cost of a round)
    base: float = 1.0  # the line through them: a round with a draft costs base + slope * length
    slope: float = 0.0
    recent: deque[_Timed] = field(default_factory=lambda: deque(maxlen=32))
    timed: set[int] = field(default_factory=set)  # lengths that have run before
    trial: list[int] = field(default_factory=list)  # rounds that are left of the trial under way, last first
    credit: float = _CREDIT  # what trials may still waste
    reading: float = 0.0  # seconds that the draft model needed to be able to draft in this round
    best: int = 0  # the length in use
    longer: bool = False  # whether the latest trial was of a longer draft than the one in use
    # The best length, the other to try, and what a trial of it would waste; None when something new was learnt. Where
    # drafting does not pay, hardly a round teaches anything, and each would be a percent slower for working it out.
    plan: tuple[int, int, float] | None = None

    def cost(self, length: int) -> float:
        """Time of a round in plain rounds."""
        return self.base + self.slope * length if length else 1.0

    def compare(self, this: _Timed) -> None:
        """Compare a round with those just before it, if they were mostly of another length."""
        near = [r for r in list(self.recent)[-6:] if abs(r.rows - this.rows) <= this.rows // 8]
        near = [r for r in near if abs(r.slots - this.slots) <= 48 + this.slots // 8]
        self.recent.append(this)
        drafted = this.length or next((r.length for r in reversed(near) if r.length), 0)
        same = sum(r.length == this.length for r in near)
        if not drafted or same > 2 or same == len(near):
            return
        # how times grow with the caches: a line again, through what a plain round took at each of the recent rounds
        start, growth = 1.0, 0.0
        if len(self.recent) >= 16:
            start, growth = _line([(r.slots, r.seconds / self.cost(r.length)) for r in self.recent])
        now = start + growth * this.slots
        # What a plain round takes at this moment, by each of the others: the median, and of two the smaller, for
        # hiccups only ever make a round longer.
        by_others = [r.seconds / self.cost(r.length) * now / (start + growth * r.slots) for r in near]
        plain = sorted(by_others)[(len(near) - 1) // 2]
        ratio = this.seconds / plain if this.length else self.cost(drafted) * plain / this.seconds
        if ratio > 0.9:  # a round with a draft does all that a plain one does: quicker, and the plain one had a hiccup
            self.ratios.append((drafted, ratio))
            # a draft of no tokens at the cost of a plain round: while only one length is measured, it gives the slope
            self.base, self.slope = _line([(0, 1.0), *self.ratios])
            self.plan = None


class AdaptiveLength:
    """The length with the most tokens per second, by the acceptance and the round times measured so far.

    With acceptance a, a draft of k gives 1 + a + ... + a^k tokens per round and row. Absolute times say little: rounds
    get slower as the caches grow, and while other programs use the machine. So a round is only compared with the few
    just before it, and the ratio of a round with a draft of k to one without is taken as linear in k.

    Lengths that are not in use are tried now and then, each trial with a plain round beside it. By the current
    estimates, trials waste at most the share ``_BUDGET`` of the rounds. So a hopeless draft is seldom tried and one
    that is nearly worth it often, and a change of the acceptance is noticed soon.

    ``first`` is the length of the first trial: 1, unless most drafts are known to stand. Two or three rows may cost a
    CPU's matrix product more than four do, and then drafts of 1 look hopeless.

    Keep one object as long as the models: it goes on learning. Sizes of batch are learnt apart, by powers of two; a
    new size starts from what the nearest one has measured.
    """

    def __init__(self, first: int = 1) -> None:
        self._first = first
        self._sizes: dict[int, _Size] = {}
        self._accepted, self._tested = 3.0, 4.0  # as if 3 of 4 tokens had been accepted
        self.tested = 0  # drafted tokens compared with a draw since the start

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens accepted, recent rounds counting most."""
        return self._accepted / self._tested

    def choose(self, rows: int) -> int:
        """See ``Drafting``."""
        size = self._size(rows)
        if size.trial:
            return size.trial.pop()
        best, other, waste = size.plan = size.plan or self._plan(rows, size)
        size.best = best
        size.credit += _BUDGET[rows > 1]
        if size.credit < waste:
            return best
        size.credit -= waste
        size.longer = other > best
        size.plan = None
        # the first round of a length also sets up buffers and kernels and is not timed: run it twice
        size.trial = [0, other] if other in size.timed else [0, other, other]
        return size.trial.pop()

    def _plan(self, rows: int, size: _Size) -> tuple[int, int, float]:
        # tokens that a round of each length is expected to give a row; those of drafts count less in a batch
        a, margin = min(self.acceptance, 0.999), _MARGIN[rows > 1]
        tokens = {k: (1 - a ** (k + 1)) / (1 - a) / margin if k else 1.0 for k in LENGTHS}
        # the longest draft to consider is twice what has been timed, for the line is not known far beyond
        reach = max((2 * k for k, _ in size.ratios), default=self._first)
        rates = {k: tokens[k] / size.cost(k) for k in LENGTHS if k <= reach}
        best = max(rates, key=rates.__getitem__) if size.ratios else 0
        other = _other(best, size, rates)
        # A trial is a round of the other length and a plain one. It wastes what the same time with the best length
        # would have given more, in rounds of that length.
        waste = sum(size.cost(k) / size.cost(best) - tokens[k] / tokens[best] for k in (other, 0))
        # Few ratios may be far off: neither may a bad one end all trials, nor a good one start them at no price.
        known = len(size.ratios) / _RATIOS
        return best, other, min(max(waste, 0.1 * known), 0.1 + 0.9 * known)

    def record(self, rows: int, slots: int, length: int, accepted: int, tested: int, seconds: float) -> None:
        """See ``Drafting``."""
        if tested:
            self.tested += tested
            # Old tokens count less with every new one, and with every round at least as if it had tested six: where
            # drafting does not pay only the short drafts of the trials are tested, and a change must show there too.
            keep = 0.995 ** max(tested, 6)
            self._accepted = keep * self._accepted + accepted
            self._tested = keep * self._tested + tested
            for known in self._sizes.values():
                known.plan = None
        size = self._size(rows)
        if seconds > 0 and size.best == 0:  # a trial of drafts that are not in use pays for the reading, too
            waste = size.reading * size.cost(length) / seconds
            # no debt without end: one bad measurement would be the last; of several rows there is much to read
            size.credit = max(size.credit - waste, min(size.credit, -_CREDIT if rows > 1 else 0.0))
        size.reading = 0.0
        if length in size.timed and seconds > 0:
            size.compare(_Timed(rows, slots, length, seconds))
        size.timed.add(length)

    def record_reading(self, rows: int, seconds: float) -> None:
        """See ``Drafting``."""
        self._size(rows).reading += seconds

    def _size(self, rows: int) -> _Size:
        key = rows.bit_length()
        if key not in self._sizes:
            self._sizes[key] = new = _Size()
            if nearest := min(self._sizes.keys() - {key}, key=lambda other: abs(other - key), default=0):
                known = self._sizes[nearest]
                new.ratios.extend(known.ratios)
                new.base, new.slope, new.credit = known.base, known.slope, _CREDIT / 4
        return self._sizes[key]


def _other(best: int, size: _Size, rates: Mapping[int, float]) -> int:
    """What to try next: the most promising draft where none is in use, else a longer and a shorter one in turn."""
    if best == 0:
        return max((k for k in rates if k), key=rates.__getitem__)
    at = LENGTHS.index(best)
    longer = best == 1 or (not size.longer and best < LENGTHS[-1])
    return LENGTHS[at + 1 if longer else at - 1]


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Base and slope, not below 0, of a line through points (x, positive y) that outliers hardly move.

    Least squares, again and again, with weights 1 / (s^2 + error^2) from the last errors (a Cauchy distribution's
    likelihood; s is a tenth of y).
    """
    weights = [1 / y**2 for _, y in points]
    base = slope = 0.0
    for _ in range(6):
        total = sum(weights)
        mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
        mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
        rise = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
        slope = max(0.0, rise / spread) if spread else 0.0
        base = max(0.1 * mean_y, mean_y - slope * mean_x)
        expected = [base + slope * x for x, _ in points]
        weights = [1 / ((0.1 * e) ** 2 + (y - e) ** 2) for e, (_, y) in zip(expected, points, strict=True)]
    return base, slope
