"""The doctor's value along the answer, as a line of braille dots over a zero line."""

import itertools
from bisect import bisect_right
from collections.abc import Iterable

from rich.style import Style
from rich.text import Text
from textual.reactive import reactive
from textual.widget import Widget

from llmdoctor.tui import lens

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille cell: rows from the top, two columns
_LABEL = 7


class Curve(Widget):
    """Values in the order of the tokens; where there are more than dots, each dot is the mean of its share.

    Sums are kept, so that drawing costs what the width costs, whatever the number of values.
    """

    title: reactive[str] = reactive("")
    cursor: reactive[int | None] = reactive(None)  # index of a value to point at

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._sums = [0.0]
        self.low = self.high = 0.0

    @property
    def count(self) -> int:
        """How many values there are."""
        return len(self._sums) - 1

    def clear(self) -> None:
        """Forget all values."""
        self._sums, self.low, self.high = [0.0], 0.0, 0.0
        self.cursor = None
        self.refresh()

    def extend(self, values: Iterable[float]) -> None:
        """Add values at the end."""
        for value in values:
            self._sums.append(self._sums[-1] + value)
            self.low, self.high = min(self.low, value), max(self.high, value)
        self.refresh()

    def means(self, columns: int) -> list[float]:
        """At most ``columns`` means of neighbouring values."""
        columns = min(columns, self.count)
        edges = [round(i * self.count / columns) for i in range(columns + 1)] if columns else []
        return [(self._sums[b] - self._sums[a]) / (b - a) for a, b in itertools.pairwise(edges)]

    def render(self) -> Text:
        """Dots, with the greatest and least value on the left and the title on the right of the first line."""
        width, rows = self.content_size
        width -= _LABEL
        if width < 4 or rows < 1:
            return Text()
        dark = self.app.current_theme.dark
        means = self.means(2 * width)
        levels = 4 * rows - 1
        span = (self.high - self.low) or 1.0

        def level(value: float) -> int:  # from the top
            return round((self.high - value) / span * levels)

        cells = [[0] * width for _ in range(rows)]
        previous = level(means[0]) if means else 0
        for x, mean in enumerate(means):
            now = level(mean)
            for y in range(min(previous, now), max(previous, now) + 1):
                cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
            previous = now
        limit = max(abs(self.low), abs(self.high)) or 1.0
        zero = level(0.0) // 4
        at = None
        if self.cursor is not None and means:
            edges = [round(i * self.count / len(means)) for i in range(len(means) + 1)]
            at = min(width - 1, (bisect_right(edges, self.cursor) - 1) // 2)
        text = Text(no_wrap=True, overflow="crop", end="")
        for row in range(rows):
            label = self.high if row == 0 else self.low if row == rows - 1 else 0.0 if row == zero else None
            text.append(
                ("" if label is None or not means else f"{label:+.2f}" if label else "0").rjust(_LABEL - 1) + " ", "dim"
            )
            for x in range(width):
                dots = cells[row][x]
                if dots:
                    colour = lens.style(means[min(2 * x, len(means) - 1)], limit, dark=dark).color
                    text.append(chr(0x2800 + dots), Style(color=colour, reverse=x == at))
                elif x == at:
                    text.append("│", "dim")
                else:
                    text.append("┈" if row == zero and means else " ", "dim")
            if row < rows - 1:
                text.append("\n")
        return text
