"""The browser of token rewards: ``llmdoctor inspect --tui``."""

from collections.abc import Sequence
from typing import NamedTuple

from rich.text import Text

from llmdoctor.show.rewards import RewardedText
from llmdoctor.show.text import END, quoted
from llmdoctor.tui import token_style
from llmdoctor.tui.screens.browser import BrowserScreen, Item
from llmdoctor.tui.widgets.token_view import Piece


class RewardedToken(NamedTuple):
    """A token of a response: its side as the headings name it, its place from 0, its numbers from stage 1."""

    side: str
    position: int
    text: str
    reward: float
    gap: float
    importance: float


class RewardsScreen(BrowserScreen):
    """Token rewards, chosen beside rejected."""

    heading, entry = "pairs", "pair"

    def score(self, payload: RewardedToken) -> float | None:
        """The reward."""
        return payload.reward

    def describe(self, payload: RewardedToken) -> Text:
        """Reward, gap and importance."""
        p = payload
        return Text.assemble(
            (quoted(p.text), "bold"),
            f"   {p.side}, token {p.position + 1}   reward {p.reward:+.3f}   gap {p.gap:+.3f} nats   "
            f"importance {p.importance:.3f}",
        )

    def legend(self) -> Text:
        """Of the scale that both sides share."""
        limit = self.view("left").limit if self.current is not None else 1.0
        # A reward has a sign, like the value lens, and is marked like it.
        return token_style.legend("token reward", "value", limit, dark=self.dark, narrow=self.narrow)


def rewards_item(
    name: str, prompt: str, sides: Sequence[tuple[RewardedText, Sequence[float], Sequence[float]]]
) -> Item:
    """A pair. ``sides`` are both responses, each with gaps [T] (nats) and importances [T] of its tokens."""
    shown = []
    for text, gaps, importance in sides:
        side = text.title.split(",")[0]
        rows = zip(text.pieces, text.rewards, gaps, importance, strict=True)
        tokens = [
            Piece(piece or END, "token", RewardedToken(side, i, piece, float(reward), float(gap), float(weight)))
            for i, (piece, reward, gap, weight) in enumerate(rows)
        ]
        shown.append((text.title, tokens))
    return Item(f"{name}  {prompt}", tuple(shown), prompt)
