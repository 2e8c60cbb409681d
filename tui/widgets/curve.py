"""The doctor's value along the answer, as a line of braille dots over a zero line."""

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, Self

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from llmdoctor.show.lens import lens_limit
from llmdoctor.show.text import one_line
from llmdoctor.tui import token_style

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille cell: rows from the top, two columns
_LABEL = 7


class Curve(Widget):
    """Values in the order of the tokens. If there are more values than dots, each dot is the mean of its share.

    Running sums are kept, so that the cost of drawing depends on the width alone, not on the number of values.
    """

    cursor: reactive[int | None] = reactive(None)  # index of a value that a vertical line points at

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.title = ""  # what the values are
        self._sums = [0.0]
        self.low = self.high = 0.0
        self._strips: list[Strip] | None = None

    @property
    def count(self) -> int:
        """How many values there are."""
        return len(self._sums) - 1

    def clear(self) -> None:
        """Remove all values."""
        self._sums, self.low, self.high = [0.0], 0.0, 0.0
        self.cursor = None
        self.refresh()

    def extend(self, values: Iterable[float]) -> None:
        """Add values at the end; they are drawn with the next ``refresh``."""
        for value in values:
            self._sums.append(self._sums[-1] + value)
            self.low, self.high = min(self.low, value), max(self.high, value)

    def means(self, columns: int) -> list[float]:
        """At most ``columns`` means of neighbouring values."""
        columns = min(columns, self.count)
        edges = [round(i * self.count / columns) for i in range(columns + 1)] if columns else []
        return [(self._sums[b] - self._sums[a]) / (b - a) for a, b in itertools.pairwise(edges)]

    def refresh(self, *regions: Region, **how: Any) -> Self:
        """Draw everything again."""
        self._strips = None
        return super().refresh(*regions, **how)

    def render_line(self, y: int) -> Strip:
        """One line; after a change all are drawn together and kept."""
        if self._strips is None:
            self._strips = self._draw()
        return self._strips[y] if y < len(self._strips) else Strip.blank(self.content_size.width, self.rich_style)

    def _level(self, value: float, rows: int) -> int:
        """The row of dots of a value, from the top; a cell has four."""
        span = (self.high - self.low) or 1.0
        return round((self.high - value) / span * (4 * rows - 1))

    def _dots(self, means: Sequence[float], width: int, rows: int) -> list[list[int]]:
        """The dots of every cell, as bits of a braille character."""
        cells = [[0] * width for _ in range(rows)]
        previous = self._level(means[0], rows) if means else 0
        for x, mean in enumerate(means):
            now = self._level(mean, rows)
            # All dots between two neighbours, so that a steep line has no gaps.
            for y in range(min(previous, now), max(previous, now) + 1):
                cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
            previous = now
        return cells

    def _draw(self) -> list[Strip]:
        """Dots, with the greatest and least value on the left."""
        width, rows = self.content_size
        width, rows = width - _LABEL, rows - 1  # the last row is the axis
        if width < 4 or rows < 1:
            return []
        dark = self.app.current_theme.dark
        base = self.rich_style
        dim = base + _DIM
        means = self.means(2 * width)
        cells = self._dots(means, width, rows)
        limit = lens_limit("value")
        zero = self._level(0.0, rows) // 4
        colours = [base + Style(color=token_style.style(mean, limit, dark=dark).color) for mean in means[::2]]
        at = None
        if self.cursor is not None and means:
            edges = [round(i * self.count / len(means)) for i in range(len(means) + 1)]
            at = min(width - 1, (bisect_right(edges, self.cursor) - 1) // 2)
        strips = []
        for row in range(rows):
            label = self.high if row == 0 else self.low if row == rows - 1 else 0.0 if row == zero else None
            shown = "" if label is None or not means else f"{label:+.2f}" if label else "0"
            segments = [Segment(shown.rjust(_LABEL - 1) + " ", dim)]
            for x in range(width):
                dots = cells[row][x]
                if dots:
                    segments.append(Segment(chr(0x2800 + dots), colours[x] + _REVERSE if x == at else colours[x]))
                else:
                    segments.append(Segment("│" if x == at else "┈" if row == zero and means else " ", dim))
            strips.append(Strip(segments, width + _LABEL).simplify())
        return [*strips, self._axis(width, dim)]

    def _axis(self, width: int, style: Style) -> Strip:
        """What lies along it: ``1 ── log V of helpful after each token ── 127``."""
        if not self.count:
            return Strip.blank(width + _LABEL, style)
        last = str(self.count)
        shown = one_line(self.title)
        titles = f" {shown} after each token ", f" {shown} "
        title = next((title for title in titles if cell_len(title) + len(last) < width - 2), "")
        line = title.center(width - len(last) - 3 - cell_len(title) + len(title), "─")
        return Strip([Segment(f"{'':{_LABEL}}1 {line} {last}"[: width + _LABEL], style)], width + _LABEL)


_DIM, _REVERSE = Style(dim=True), Style(reverse=True)
