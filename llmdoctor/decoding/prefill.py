"""How much of a long prompt is read between two rounds, so that those who speak already do not fall silent."""

import statistics
from collections import deque
from typing import Protocol

_IDLE = 0.1  # seconds a piece may take while nobody speaks: so long the next prompt waits
_FIRST = 64  # tokens, before anything was measured
_LEAST = 16  # tokens: a forward costs about as much for fewer
_LEAST_IDLE = 128  # tokens
_MOST = 1024  # tokens
_OVERHEAD = 32  # a piece of T tokens takes about as long as T + _OVERHEAD tokens of a long one


class Pieces(Protocol):
    """Chooses how many prompt tokens are read before the next round, over all rows that are read together."""

    def choose(self, speaking: bool) -> int:
        """Tokens; 0 to read nothing now. ``speaking`` says whether rows are beyond their prompts."""

    def record(self, tokens: int, seconds: float) -> None:
        """Learn from a piece."""

    def record_round(self, seconds: float) -> None:
        """Learn from a round, the piece before it not included."""


class FixedPieces:
    """Always the same number of tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def choose(self, speaking: bool) -> int:
        """See ``Pieces``."""
        del speaking
        return self.tokens

    def record(self, tokens: int, seconds: float) -> None:
        """See ``Pieces``."""

    def record_round(self, seconds: float) -> None:
        """See ``Pieces``."""


class TimedPieces:
    """A piece takes about as long as a round. So prompts get at most half of the time, and a gap is at most doubled.

    Where even the smallest piece takes longer than a round, some rounds go without one.
    """

    def __init__(self) -> None:
        self._rounds: deque[float] = deque(maxlen=5)
        self._per_token: float | None = None
        self._owed = 0.0  # seconds that rounds have yet to get before the next piece

    def choose(self, speaking: bool) -> int:
        """See ``Pieces``."""
        round_ = statistics.median(self._rounds) if speaking and self._rounds else _IDLE
        if not speaking:
            self._owed = 0.0
        elif self._owed > round_ / 2:
            return 0
        if self._per_token is None:
            return _FIRST
        return min(max(int(round_ / self._per_token) - _OVERHEAD, _LEAST if speaking else _LEAST_IDLE), _MOST)

    def record(self, tokens: int, seconds: float) -> None:
        """See ``Pieces``."""
        self._owed += seconds
        now = seconds / (tokens + _OVERHEAD)
        self._per_token = now if self._per_token is None else (self._per_token + now) / 2

    def record_round(self, seconds: float) -> None:
        """See ``Pieces``."""
        self._rounds.append(seconds)
        self._owed = max(0.0, self._owed - seconds)
