"""Word wrap of a text that grows by pieces: an appended piece rewraps only the last line."""

import re
from collections.abc import Iterator, Sequence

from rich.cells import cell_len, split_graphemes

LinePart = tuple[int, str]  # the index of a piece, and its text on this line
Line = list[LinePart]

_WORDS = re.compile(r"\n|[^\S\n]+|\S+")


def wrap(text: str, width: int) -> list[tuple[int, int]]:
    """Where lines of at most ``width`` cells begin and end in ``text``; together they cover all of it.

    Greedy, at white space and beside characters of two cells; a longer word is cut. White space at the end of a line
    may reach beyond its edge; a newline belongs to the line that it ends, and the empty line after it is a line.
    """
    width = max(1, width)
    lines: list[tuple[int, int]] = []
    begin, used = 0, 0
    for start, stop, cells in _units(text):
        if text[start] == "\n":
            lines.append((begin, stop))
            begin, used = stop, 0
        elif text[start].isspace() or used + cells <= width:
            used += cells
        else:
            if used:  # the unit opens a new line
                lines.append((begin, start))
                begin, used = start, 0
            used = cells
            while used > width:  # longer than a line
                cut, taken = _cut(text[begin:stop], width)
                lines.append((begin, begin + cut))
                begin, used = begin + cut, used - taken
    lines.append((begin, len(text)))
    return lines


def _units(text: str) -> Iterator[tuple[int, int, int]]:
    """Start, stop and cells of what must not be broken: a word, a run of white space, one wide character."""
    for match in _WORDS.finditer(text):
        start, stop = match.span()
        word = match[0]
        if word.isascii():
            yield start, stop, stop - start
            continue
        begin, cells = start, 0
        for a, b, size in split_graphemes(word)[0]:
            if size == 2:
                if cells:
                    yield begin, start + a, cells
                yield start + a, start + b, size
                begin, cells = start + b, 0
            else:
                cells += size
        if begin < stop:
            yield begin, stop, cells


def _cut(text: str, width: int) -> tuple[int, int]:
    """Characters and cells of the longest beginning of ``text`` within ``width`` cells, at least one character."""
    if text.isascii():
        return width, width
    taken = end = 0
    for _, stop, size in split_graphemes(text)[0]:
        if end and taken + size > width:
            break
        end, taken = stop, taken + size
    return end, taken


class Flow:
    """Pieces laid out in lines. ``first_line[i]`` is the line on which piece i begins."""

    def __init__(self, width: int = 80) -> None:
        self.width = width
        self.texts: list[str] = []
        self.lines: list[Line] = [[]]
        self.first_line: list[int] = []

    def append(self, texts: Sequence[str]) -> int:
        """Add pieces; the number of the first line that changed."""
        first = len(self.texts)
        self.texts.extend(texts)
        self.first_line.extend([0] * len(texts))
        changed = len(self.lines) - 1
        self._lay(self.lines.pop() + list(enumerate(texts, start=first)))
        return changed

    def rewrap(self, width: int) -> None:
        """Lay everything out again, for another width."""
        self.width = width
        self.lines = []
        self._lay(list(enumerate(self.texts)))

    def cells_before(self, line: int, piece: int) -> int:
        """The number of cells before the piece on that line."""
        cells = 0
        for owner, text in self.lines[line]:
            if owner == piece:
                break
            cells += cell_len(text)
        return cells

    def piece_at(self, line: int, cell: int) -> int | None:
        """The piece under a cell; past the end of the line the last one on it."""
        if not 0 <= line < len(self.lines):
            return None
        found = None
        for owner, text in self.lines[line]:
            if text:
                found = owner
                cell -= cell_len(text)
                if cell < 0:
                    break
        return found

    def _lay(self, segments: list[LinePart]) -> None:
        spans = iter(wrap("".join(text for _, text in segments), self.width))
        _, stop = next(spans)
        # The last line may begin with the rest of a piece: that piece keeps the first line that it already has.
        continued = self.lines[-1][-1][0] if self.lines and self.lines[-1] else None
        line: Line = []
        at = 0
        for owner, text in segments:
            rest, begun = text, owner == continued
            while rest or not begun:
                if rest and at == stop:
                    self.lines.append(line)
                    line = []
                    _, stop = next(spans)
                if not begun:
                    self.first_line[owner] = len(self.lines)
                    begun = True
                line.append((owner, rest[: stop - at]))
                taken = len(line[-1][1])
                at, rest = at + taken, rest[taken:]
        self.lines.append(line)
        self.lines.extend([] for _ in spans)  # a newline at the very end opens an empty line
