"""What the server counts, in the text format of Prometheus."""

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping

from llmdoctor.decoding.prefix import SharedPrefixes

_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds to the first token
_WINDOW = 10.0  # seconds that tokens a second are taken over


class Metrics:
    """Counters of the engine's thread, which other threads only read, and of answered requests."""

    def __init__(self) -> None:
        self.prompt_tokens = self.tokens = self.flips = self.rounds = 0
        self.kl = 0.0
        self.ended: Counter[str] = Counter(finished=0, cancelled=0, failed=0)
        self.requests: Counter[tuple[str, int]] = Counter()  # (path, status)
        self._first = [0] * (len(_BOUNDS) + 1)
        self._first_sum = 0.0
        self._recent: deque[float] = deque(maxlen=100_000)  # when tokens were drawn

    def first_token(self, seconds: float) -> None:
        """An answer's first token came after so many seconds, waiting included."""
        self._first[sum(seconds > bound for bound in _BOUNDS)] += 1
        self._first_sum += seconds

    def token(self, kl: float, flip: bool) -> None:
        """A token was drawn."""
        now = time.monotonic()
        self.tokens, self.kl, self.flips = self.tokens + 1, self.kl + kl, self.flips + flip
        self._recent.append(now)
        while self._recent[0] < now - _WINDOW:
            self._recent.popleft()

    def text(self, *, running: int, waiting: int, acceptance: float | None, prefixes: SharedPrefixes) -> str:
        """All of it as Prometheus reads it."""
        since = time.monotonic() - _WINDOW
        rate = sum(at > since for at in self._recent.copy()) / _WINDOW
        counts = [sum(self._first[: i + 1]) for i in range(len(self._first))]
        bounds = [*map(str, _BOUNDS), "+Inf"]
        lines = [
            *_metric("requests_total", "counter", "HTTP requests.", _by_request(self.requests)),
            *_metric("answers_running", "gauge", "Answers that are being written.", {"": running}),
            *_metric("answers_waiting", "gauge", "Answers in the queue.", {"": waiting}),
            *_metric("answers_total", "counter", "Answers, by how they ended.", _labelled("end", self.ended)),
            *_metric("prompt_tokens_total", "counter", "Prompt tokens.", {"": self.prompt_tokens}),
            *_metric("prefix_hits_total", "counter", "Prompts whose beginning was known.", {"": prefixes.hits}),
            *_metric("prefix_tokens_total", "counter", "Prompt tokens that were known.", {"": prefixes.reused}),
            *_metric("prefix_bytes", "gauge", "What is kept of prompts and answers.", {"": prefixes.size}),
            *_metric("tokens_total", "counter", "Tokens that were drawn.", {"": self.tokens}),
            *_metric("tokens_per_second", "gauge", f"Over the last {_WINDOW:g} seconds.", {"": rate}),
            *_metric("rounds_total", "counter", "Rounds of the batch.", {"": self.rounds}),
            *_metric("kl_nats_total", "counter", "Sum over tokens of KL(product || patient).", {"": self.kl}),
            *_metric("flips_total", "counter", "Tokens whose likeliest one guidance changed.", {"": self.flips}),
            *_metric(
                "first_token_seconds",
                "histogram",
                "Time to the first token, waiting included.",
                {f'_bucket{{le="{bound}"}}': count for bound, count in zip(bounds, counts, strict=True)}
                | {"_sum": self._first_sum, "_count": counts[-1]},
            ),
        ]
        if acceptance is not None:
            lines += _metric("draft_acceptance", "gauge", "Share of recent drafts that stood.", {"": acceptance})
        return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, what: str, values: Mapping[str, float]) -> Iterable[str]:
    name = f"llmdoctor_{name}"
    return [f"# HELP {name} {what}", f"# TYPE {name} {kind}", *(f"{name}{at} {_number(v)}" for at, v in values.items())]


def _labelled(label: str, counts: Mapping[str, int]) -> dict[str, int]:
    return {f'{{{label}="{value}"}}': count for value, count in counts.items()}


def _by_request(counts: Mapping[tuple[str, int], int]) -> dict[str, int]:
    return {f'{{path="{path}",status="{status}"}}': count for (path, status), count in counts.items()}


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"
