"""Token rewards prepared for showing."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from llmdoctor.show.colours import scale_limit
from llmdoctor.show.text import END, clean


@dataclass(frozen=True, slots=True)
class RewardedText:
    """A response: a piece of text per token, rewards, and where known gaps (nats) and importances in [0, 1)."""

    title: str
    pieces: tuple[str, ...]
    rewards: tuple[float, ...]
    gaps: tuple[float, ...] = ()
    importance: tuple[float, ...] = ()

    def shown(self) -> list[str]:
        """The cleaned pieces. A token without text, such as the end of the answer, is shown only if it has a reward."""
        marked = zip(self.pieces, self.rewards, strict=True)
        return [clean(piece) or ("" if reward == 0 else END) for piece, reward in marked]

    def tokens(self) -> Iterator[tuple[str, float, float, float]]:
        """Cleaned piece, reward, gap and importance per token. ValueError where the last two are not known."""
        return zip(self.shown(), self.rewards, self.gaps, self.importance, strict=True)


@dataclass(frozen=True, slots=True)
class ShownPair:
    """A prompt and its responses with token rewards."""

    name: str
    prompt: str
    sides: tuple[RewardedText, ...]


def limit_of(pairs: Iterable[ShownPair]) -> float:
    """The end of one colour scale for all the pairs."""
    return scale_limit(reward for pair in pairs for side in pair.sides for reward in side.rewards)
