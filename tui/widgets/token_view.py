"""A scrolling text of tokens, each coloured by a score. Only visible lines are drawn, so long texts cost nothing."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from llmdoctor.show.text import clean
from llmdoctor.tui import token_style
from llmdoctor.tui.flow import Flow

Kind = Literal["token", "user", "note", "plain"]
Score = Callable[[Any], float | None]
Test = Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of text. Only those with a ``payload`` (what the piece stands for) can be selected and scored."""

    text: str
    kind: Kind = "token"
    payload: Any = None


class TokenView(ScrollView, can_focus=True):
    """Word-wrapped pieces. The view follows the end until the user scrolls up; arrows and clicks move a cursor."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"token-view--user", "token-view--note"}
    ALLOW_SELECT = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "step(-1)", "Token before", show=False, id="token.previous"),
        Binding("right", "step(1)", "Token after", show=False, id="token.next"),
        Binding("up", "line(-1)", "Line above", show=False, id="token.up"),
        Binding("down", "line(1)", "Line below", show=False, id="token.down"),
        Binding("home,ctrl+home", "edge(0)", "First token", show=False, id="token.first"),
        Binding("end,ctrl+end", "edge(-1)", "Last token", show=False, id="token.last"),
        Binding("full_stop", "change(1)", "Next token that guidance changed", show=False, id="token.next_change"),
        Binding("comma", "change(-1)", "Previous token that guidance changed", show=False, id="token.previous_change"),
    ]

    class Selected(Message):
        """The cursor moved to a token, or (None) away from all."""

        def __init__(self, view: "TokenView", payload: Any) -> None:
            super().__init__()
            self.view, self.payload = view, payload

        @property
        def control(self) -> "TokenView":
            """The view, for ``@on``."""
            return self.view

    def __init__(
        self, *, score: Score = lambda _payload: None, changed: Test = lambda _payload: False, id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self.score = score
        self.changed = changed  # what the keys for the next and the previous change look for
        self.scale: float | None = None  # the score with the strongest colour; None: the greatest there is
        self.limit = 1.0
        self.cursor: int | None = None
        self.following = True
        self._pieces: list[Piece] = []
        self._scores: list[float | None] = []
        self._flow = Flow()
        self._strips: dict[int, Strip] = {}

    # Content

    @property
    def pieces(self) -> Sequence[Piece]:
        """What is shown."""
        return self._pieces

    @property
    def lines(self) -> list[str]:
        """The text as it is wrapped now."""
        return ["".join(text for _, text in line).rstrip("\n") for line in self._flow.lines]

    def append(self, pieces: Iterable[Piece]) -> None:
        """Add pieces; the view stays at the end if it was there."""
        added = list(pieces)
        if not added:
            return
        following = self.following
        scores = [None if piece.payload is None else self.score(piece.payload) for piece in added]
        self._pieces += added
        self._scores += scores
        greatest = max((abs(score) for score in scores if score), default=0.0)
        lines = len(self._flow.lines)
        changed = self._flow.append([clean(piece.text).expandtabs(4) for piece in added])
        if self.scale is None and greatest > self._greatest:  # the scale changes, and with it every colour
            self._greatest = self.limit = greatest
            self._redraw()
        else:
            self._strips.pop(changed, None)
            self.refresh(Region(0, changed - self.scroll_offset.y, self.size.width, len(self._flow.lines) - changed))
        if len(self._flow.lines) != lines:
            # Assigning virtual_size would lay out the whole screen again for every new line.
            size = Size(self._flow.width, len(self._flow.lines))
            self.set_reactive(TokenView.virtual_size, size)
            self._scroll_update(size)
        if following:
            self.to_end()

    _greatest = 0.0

    def clear(self) -> None:
        """Remove everything."""
        self._pieces, self._scores = [], []
        self._flow = Flow(self._flow.width)
        self._greatest, self.limit, self.cursor, self.following = 0.0, self.scale or 1.0, None, True
        self.virtual_size = Size(self._flow.width, 1)
        self._redraw()

    def set_pieces(self, pieces: Iterable[Piece]) -> None:
        """Show these instead, without a cursor; the place is kept if possible."""
        place, following = self.scroll_offset.y, self.following
        self.clear()
        self.following = following
        self.append(pieces)
        if not following:
            self.scroll_to(y=place, animate=False, immediate=True)

    def recolour(self, score: Score) -> None:
        """Colour the tokens by another score."""
        self.score = score
        self._scores = [None if piece.payload is None else score(piece.payload) for piece in self._pieces]
        self._greatest = max((abs(score) for score in self._scores if score), default=0.0)
        self.limit = self.scale or self._greatest or 1.0
        self._redraw()

    def to_end(self) -> None:
        """Scroll to the end and stay there."""
        self.following = True
        self.scroll_end(animate=False, immediate=True, x_axis=False)

    # Cursor

    @property
    def selected(self) -> Any:
        """The payload under the cursor, or None."""
        return None if self.cursor is None else self._pieces[self.cursor].payload

    def select(self, index: int | None) -> None:
        """Move the cursor to a piece and bring it into view."""
        for at in {self.cursor, index} - {None}:
            self._drop_strips(at)  # type: ignore[arg-type]
        self.cursor = index
        self._to_cursor()
        self.refresh()
        self.post_message(self.Selected(self, self.selected))

    def _to_cursor(self) -> None:
        if self.cursor is not None:
            line = self._flow.first_line[self.cursor]
            self.scroll_to_region(Region(0, line, 1, 1), animate=False, force=True, immediate=True)

    def select_first(self, test: Test) -> bool:
        """Move the cursor to the first token that passes; without one leave it where it is and return False."""
        return self._select_next(range(len(self._pieces)), test)

    def select_last(self, test: Test = lambda _payload: True) -> bool:
        """Move the cursor to the last token that passes; without one leave it where it is and return False."""
        return self._select_next(range(len(self._pieces) - 1, -1, -1), test)

    def _select_next(self, order: Iterable[int], test: Test) -> bool:
        found = next((i for i in order if self._selectable(i) and test(self._pieces[i].payload)), None)
        if found is not None:
            self.select(found)
        return found is not None

    def action_step(self, direction: int) -> None:
        """To the token before or after."""
        if self.cursor is None:
            self.select_last()
        else:
            self._select_next(self._from_cursor(direction), lambda _payload: True)

    def action_change(self, direction: int) -> None:
        """To the token before or after that guidance changed; without a cursor, to the first or last one."""
        if not self._select_next(self._from_cursor(direction), self.changed):
            where = "" if self.cursor is None else " after this one" if direction > 0 else " before this one"
            self.notify(f"There is no changed token{where}.")

    def _from_cursor(self, direction: int) -> range:
        """The pieces behind the cursor (1), or those before it, backwards (-1)."""
        if direction > 0:
            return range(-1 if self.cursor is None else self.cursor, len(self._pieces))[1:]
        return range(len(self._pieces) if self.cursor is None else self.cursor)[::-1]

    def action_line(self, direction: int) -> None:
        """To the token above or below; without a cursor, scroll."""
        if self.cursor is None:
            self.scroll_relative(y=direction, animate=False)
            return
        line = self._flow.first_line[self.cursor]
        cell = self._flow.cells_before(line, self.cursor)
        line += direction
        while 0 <= line < len(self._flow.lines):
            found = self._flow.piece_at(line, cell)
            if found is not None and found != self.cursor and self._selectable(found):
                self.select(found)
                return
            line += direction

    def action_edge(self, end: int) -> None:
        """To the first (0) or last (-1) token."""
        if end == 0:
            self.select_first(lambda _payload: True)
        else:
            self.select_last()

    def _selectable(self, index: int) -> bool:
        piece = self._pieces[index]
        return piece.payload is not None and bool(piece.text)

    def on_click(self, event: events.Click) -> None:
        """Move the cursor to the token under the mouse."""
        x, y = event.get_content_offset_capture(self)
        found = self._flow.piece_at(y + self.scroll_offset.y, x - _MARGIN)
        if found is not None and self._selectable(found):
            self.select(found)

    # Drawing

    def render_line(self, y: int) -> Strip:
        """One line of the screen."""
        number = y + self.scroll_offset.y
        width = self.scrollable_content_region.width
        base = self.rich_style
        if number >= len(self._flow.lines):
            return Strip.blank(width, base)
        if (strip := self._strips.get(number)) is None:
            if len(self._strips) > 2000:
                self._strips.clear()
            strip = self._strips[number] = self._draw(self._flow.lines[number], base).adjust_cell_length(width, base)
        return strip

    def _draw(self, line: Sequence[tuple[int, str]], base: Style) -> Strip:
        dark = self.app.current_theme.dark
        runs: list[tuple[list[str], Style]] = [([" " * _MARGIN], base)]
        cells = _MARGIN
        for index, text in line:
            shown = text.rstrip("\n") if text.endswith("\n") else text
            if not shown and index == self.cursor:  # a newline, which would otherwise show no cursor
                shown = "↵"
            if shown:
                cells += cell_len(shown)
                style = self._style(index, base, dark)
                if style == runs[-1][1]:  # fewer segments mean fewer escape sequences
                    runs[-1][0].append(shown)
                else:
                    runs.append(([shown], style))
        return Strip([Segment("".join(texts), style) for texts, style in runs], cells)

    def _style(self, index: int, base: Style, dark: bool) -> Style:
        piece, score = self._pieces[index], self._scores[index]
        if piece.kind in ("user", "note"):
            base = base + self.get_component_rich_style(f"token-view--{piece.kind}", partial=True)
        elif score is not None:
            base = base + token_style.style(score, self.limit, dark=dark)
        return base + _REVERSE if index == self.cursor else base

    def _drop_strips(self, index: int) -> None:
        """Drop the drawn lines of a piece."""
        number = self._flow.first_line[index]
        while number < len(self._flow.lines) and any(owner == index for owner, _ in self._flow.lines[number]):
            self._strips.pop(number, None)
            number += 1

    def _redraw(self) -> None:
        self._strips.clear()
        self.refresh()

    def notify_style_update(self) -> None:
        """The theme has changed: draw every line again."""
        super().notify_style_update()
        self._strips.clear()

    def on_resize(self) -> None:
        """Wrap again, if the width has changed; the cursor, or the end that was in view, stays in view."""
        width = max(1, self.scrollable_content_region.width - 2 * _MARGIN)
        if width != self._flow.width:
            following = self.following
            self._flow.rewrap(width)
            self._strips.clear()
            self.virtual_size = Size(width, len(self._flow.lines))
            self.refresh()
            self.following = following
        if self.following:
            self.to_end()
        self._to_cursor()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Follow the end as long as it is in view."""
        super().watch_scroll_y(old_value, new_value)
        self.following = self.is_vertical_scroll_end


_MARGIN = 1
_REVERSE = Style(reverse=True)
