"""How many tokens the doctor drafts before the patient checks them all at once.

The scheme is exact for any draft: token t of a row is the draw that the reference path would make, from the same
product with the same uniform number u_t (`guidance.draw`). The draft is a guess of that draw: it puts the same u_t
through the sharpened doctor, doctor^(alpha + beta). Where guess and draw agree, the models already stand behind the
token; at the first disagreement the draw itself is the next token, and the rest of the draft is taken back. So the
length of a draft, which follows measured times, changes nothing about the text.

Rejection sampling (accept with min(1, p / q), else draw from (p - q)+) accepts a little more, 1 - TV(p, q), but ties
the text to the length of the drafts, and the guided answer's luck is then no longer the patient's.
"""

from collections import defaultdict, deque
from collections.abc import Collection
from typing import Protocol

LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
_FIRST = (4, 0, 8, 4, 0, 8, 4, 0, 8)  # tried before anything is known
_PROBE_EVERY = 48
# what a draft must gain over none, of one row and of several: less is within the estimates' error, and a batch pays
# later for what it rejects, by holes in its caches
_WORTH = (1.1, 1.25)


class Drafting(Protocol):
    """Chooses the length of every draft."""

    def choose(self, rows: int, filled: int) -> int:
        """Tokens to draft in the next round of ``rows`` rows; 0 is the reference path."""

    def record(self, rows: int, filled: int, length: int, accepted: int, tested: int, seconds: float) -> None:
        """What a round came to: of ``tested`` drafted tokens, over all rows, the draw agreed with ``accepted``."""


class FixedLength:
    """Always the same length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def choose(self, rows: int, filled: int) -> int:
        """See ``Drafting``."""
        del rows, filled
        return self.length

    def record(self, rows: int, filled: int, length: int, accepted: int, tested: int, seconds: float) -> None:
        """See ``Drafting``."""


class AdaptiveLength:
    """The length with the most tokens a second, by the acceptance and the round times measured so far.

    With acceptance a, a draft of k gives 1 + a + ... + a^k tokens a round. A round's time is taken as linear in k from
    1 on (the shortest but one of nine recent rounds, the shortest of few: hiccups of the machine do not count, nor does
    it favour the lengths measured most often); 0, the reference path, has its own.
    Keep one object as long as the models: it goes on learning, and every size of batch is learnt apart.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, dict[int, deque[float]]] = defaultdict(lambda: defaultdict(lambda: deque(maxlen=9)))
        self._rounds: dict[int, int] = defaultdict(int)
        self._accepted, self._tested = 6.8, 8.0  # as if 85% of 8 tokens had been accepted
        self.tested = 0  # drafted tokens that a draw was compared with, all in all

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens accepted of late."""
        return self._accepted / self._tested

    def choose(self, rows: int, filled: int) -> int:
        """See ``Drafting``."""
        size = rows.bit_length()
        count = self._rounds[size]
        self._rounds[size] += 1
        if count < len(_FIRST):
            return _FIRST[count]
        best = self._best(self._seconds[size], rows > 1)
        if count % _PROBE_EVERY > 2:
            return best
        # what is not used is not measured: look, now and then, at what lies beside the best
        at = LENGTHS.index(best)
        if best == 0:
            return 4
        return (0, LENGTHS[max(0, at - 1)], LENGTHS[min(at + 1, len(LENGTHS) - 1)])[count // _PROBE_EVERY % 3]

    def _best(self, seconds: dict[int, deque[float]], several: bool) -> int:
        points = [(k, _undisturbed(times)) for k, times in seconds.items() if k and len(times) > 2]
        if not points or len(seconds[0]) < 3:
            return _FIRST[0]
        # least squares of time over length, a line that does not fall
        n = len(points)
        mean_k, mean_t = (sum(column) / n for column in zip(*points, strict=True))
        spread = sum((k - mean_k) ** 2 for k, _ in points)
        slope = max(0.0, sum((k - mean_k) * (t - mean_t) for k, t in points) / spread if spread else mean_t / 16)
        best, rate, expected = 0, _WORTH[several] / _undisturbed(seconds[0]), 1.0
        for k in range(1, LENGTHS[-1] + 1):
            expected += self.acceptance**k
            time = mean_t + slope * (k - mean_k)
            if k in LENGTHS and time > 0 and expected / time > rate:
                best, rate = k, expected / time
        return best

    def record(self, rows: int, filled: int, length: int, accepted: int, tested: int, seconds: float) -> None:
        """See ``Drafting``."""
        self._seconds[rows.bit_length()][length].append(seconds)
        self.tested += tested
        keep = 0.985**tested
        self._accepted = keep * self._accepted + accepted
        self._tested = keep * self._tested + tested


def _undisturbed(times: Collection[float]) -> float:
    return sorted(times)[len(times) // 6]
