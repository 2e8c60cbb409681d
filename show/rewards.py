"""Token rewards prepared for showing."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from llmdoctor.show.colours import scale_limit
from llmdoctor.show.text import END, clean


@dataclass(frozen=True, slots=True)
class RewardedText:
    """A response: a piece of text per token, rewards, and where known gaps (nats) and importances in [0, 1).

    ``probe`` is what a probe gives every token (log-odds). ``shows`` says which of them is marked: "reward", "gap" or
    "probe".
    """

    title: str
    pieces: tuple[str, ...]
    rewards: tuple[float, ...]
    gaps: tuple[float, ...] = ()
    importance: tuple[float, ...] = ()
    probe: tuple[float, ...] = ()
    shows: str = "reward"

    @property
    def marks(self) -> tuple[float, ...]:
        """What is coloured, 0 where nothing is: of raw numbers, those of at least a tenth of the greatest."""
        if self.shows == "reward":
            return self.rewards
        values = self.gaps if self.shows == "gap" else self.probe
        least = max(map(abs, values), default=0.0) / 10
        return tuple(value if abs(value) >= least else 0.0 for value in values)

    def by(self, shows: str) -> "RewardedText":
        """The same response with another number marked."""
        if shows == "reward":
            return self
        total = sum(self.gaps if shows == "gap" else self.probe)
        unit = "nats" if shows == "gap" else "log-odds"
        return replace(self, shows=shows, title=f"{self.title.partition(',')[0]}, raw {shows} {total:+.2f} {unit}")

    def shown(self) -> list[str]:
        """The cleaned pieces. A token without text, such as the end of the answer, is shown only if it is marked."""
        marked = zip(self.pieces, self.marks, strict=True)
        return [clean(piece) or ("" if mark == 0 else END) for piece, mark in marked]

    def tokens(self) -> Iterator[tuple[str, float, float, float, float]]:
        """Cleaned piece, mark, reward, gap and importance per token. ValueError where the last two are not known."""
        return zip(self.shown(), self.marks, self.rewards, self.gaps, self.importance, strict=True)


@dataclass(frozen=True, slots=True)
class ShownPair:
    """A prompt and its responses with token rewards."""

    name: str
    prompt: str
    sides: tuple[RewardedText, ...]


def limits_of(pairs: Iterable[ShownPair]) -> dict[str, float]:
    """The end of one colour scale for all the pairs, for each number that is shown."""
    marks: dict[str, list[float]] = {}
    for pair in pairs:
        for side in pair.sides:
            marks.setdefault(side.shows, []).extend(side.marks)
    return {shows: scale_limit(values) for shows, values in marks.items()}
