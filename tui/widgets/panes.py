"""Both sides of the conversation beside each other, with the inspector: colours, cursor, and who has room."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.message import Message

from llmdoctor.records import Speaker
from llmdoctor.sessions import Reply
from llmdoctor.show.lens import DEFAULT_LENS, Lens, lens_limit, lens_name
from llmdoctor.tui import token_style
from llmdoctor.tui.answering import Answering
from llmdoctor.tui.conversation import (
    SIDES,
    Live,
    Said,
    asked,
    conversation,
    ending,
    made_with,
    pieces,
    side_facts,
    values_of,
)
from llmdoctor.tui.widgets.curve import Curve
from llmdoctor.tui.widgets.inspector import Inspector
from llmdoctor.tui.widgets.pane import Pane
from llmdoctor.tui.widgets.token_view import TokenView
from llmdoctor.tui.widgets.welcome import Welcome

if TYPE_CHECKING:
    from llmdoctor.tui.app import ChatApp

_SIDE_BY_SIDE = 72  # columns from which the sides are beside each other, else stacked
_INSPECTOR_BESIDE = 160  # columns from which the inspector is beside them too, else below
_ROOM_FOR_TITLES = 96  # columns from which the title of the guided side says so
_LOW = 40  # rows below which an inspector, or a text, below another one takes the curve's room


class Panes(Horizontal):
    """Shows what ``answering`` holds. ``inspected`` is the side whose token is in the inspector, None while closed."""

    class Fitted(Message):
        """Panes and inspector have been placed anew."""

    app: "ChatApp"  # type: ignore[assignment]

    def __init__(self, answering: Answering, doctor: str | None, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.lens: Lens = DEFAULT_LENS
        self.doctor = doctor
        self.inspected: Speaker | None = None
        self._answering = answering
        self._tab: Speaker = "guided"
        self._wanted: tuple[Speaker, tuple[int, int]] | None = None  # a place to be selected once its token is there
        self._curve_turn = -1

    def compose(self) -> ComposeResult:
        """Two sides; the inspector is hidden until somebody inspects."""
        yield Welcome(self.app.start, id="welcome")
        for which in SIDES:
            yield Pane(which, self._score)
        inspector = Inspector(id="inspector")
        inspector.display = False
        yield inspector

    @property
    def shown(self) -> Speaker:
        """The side that a person looks at: the inspected one, else the one that was looked at last."""
        return self.inspected or self._tab

    @property
    def selected(self) -> tuple[Speaker, Said] | None:
        """The token under the cursor, and whose it is."""
        said: Said | None = self.view(self.inspected).selected if self.inspected else None
        return (self.inspected, said) if self.inspected and said is not None else None

    def pane(self, which: Speaker) -> Pane:
        """One side."""
        return self.query_one(f"#{which}", Pane)

    def view(self, which: Speaker) -> TokenView:
        """One side's text."""
        return self.pane(which).view

    @property
    def _curve(self) -> Curve:
        return self.query_one(Curve)

    @property
    def _inspector(self) -> Inspector:
        return self.query_one(Inspector)

    # Text

    def show(self, sides: Iterable[Speaker] = SIDES) -> None:
        """The whole conversation of ``sides`` again."""
        if (selected := self.selected) is not None:
            self._wanted = selected[0], selected[1].place
        for which in sides:
            self.view(which).set_pieces(
                conversation(self._answering.history.turns, which, self._answering.live, self.app.start.welcome)
            )
        if self._wanted is not None and self._wanted[0] in sides:
            self._select_wanted()
        self._curve_turn = -1
        self._load_curve(len(self._answering.history.turns) - 1)
        self.fit()

    def ask(self) -> None:
        """One question more; both sides go to their end."""
        turns = self._answering.history.turns
        for which in SIDES:
            self.view(which).append(asked(turns, len(turns) - 1, self.app.start.welcome))
            self.view(which).to_end()
        self._load_curve(len(turns) - 1)
        self.fit()

    def grow(self, live: Live, starts: Mapping[Speaker, int]) -> None:
        """The new tokens of a running answer."""
        for which, start in starts.items():
            side = live.sides[which]
            self.view(which).append(pieces(live.turn, side, start))
            if which == "guided" and self._curve_turn == live.turn:
                self._curve.extend(values_of(side.tokens[start:], self.doctor))
            if which == self.inspected and self._inspected_turn == live.turn:
                self._inspector.recount(len(side.tokens))
        self._select_wanted()

    def end(self, turn: int, replies: Mapping[Speaker, Reply], error: str) -> None:
        """How these replies ended."""
        for which, reply in replies.items():
            self.view(which).append(ending(turn, reply, error if reply.end == "error" else ""))
        self._select_wanted()
        self._curve.refresh()

    def show_headings(self) -> None:
        """Who speaks, and with which settings the last answer was made."""
        turns = self._answering.history.turns
        made = made_with(turns[-1], self._answering.side("guided", len(turns) - 1)) if turns else ""
        self.pane("patient").show_title("patient alone")
        self.pane("guided").show_title(made if self.app.size.width < _ROOM_FOR_TITLES else f"guided by {made}")

    def show_facts(self) -> None:
        """Counts and speeds, and the curve as far as it is."""
        if self._answering.live is not None:
            self._curve.refresh()
        self.show_headings()
        last = len(self._answering.history.turns) - 1
        for which in SIDES:
            self.pane(which).show_facts(side_facts(self._answering.side(which, last), which) if last >= 0 else "")

    # Colours

    def _score(self, said: Said) -> float | None:
        return token_style.score(said.token, self.lens, self.doctor)

    def recolour(self, lens: Lens, doctor: str | None) -> None:
        """Colour by another score; the curve shows the doctor's value too."""
        self.lens, self.doctor = lens, doctor
        self.view("guided").scale = lens_limit(lens)
        self.view("guided").recolour(self._score)
        turn, self._curve_turn = self._curve_turn, -1
        self._load_curve(turn)

    def legend(self) -> Text:
        """What the colours mean."""
        narrow, dark = self.app.size.width < 72, self.app.current_theme.dark
        return token_style.lens_legend(self.lens, self.doctor, dark=dark, narrow=narrow)

    def _load_curve(self, turn: int) -> None:
        live = self._answering.live
        if turn == self._curve_turn and live is not None and live.turn == turn and turn >= 0:
            return  # it grows with the answer
        self._curve.clear()
        self._curve.title = lens_name("value", self.doctor)
        self._curve_turn = turn
        if 0 <= turn < len(self._answering.history.turns):
            self._curve.extend(values_of(self._answering.side("guided", turn).tokens, self.doctor))
        self._curve.refresh()

    # Inspector

    @property
    def inspecting(self) -> bool:
        """Whether the inspector is open."""
        return bool(self._inspector.display)

    def inspect(self) -> None:
        """Open the inspector on the first change of the last answer, or go to it."""
        which = self.shown
        self._inspector.display = True
        self.fit()
        self.view(which).focus()
        if self.view(which).cursor is None:
            self._inspector.show_none()
            self._to_first_change()

    def peek(self) -> None:
        """Open the inspector on the last answer, unless a token of it is inspected already."""
        self.inspect()
        if self._inspected_turn != len(self._answering.history.turns) - 1:
            self._to_first_change()

    def _to_first_change(self) -> None:
        """To the first token of the last answer that guidance changed; where there is none, to its first token."""
        view, last = self.view(self.shown), len(self._answering.history.turns) - 1
        if not view.select_first(lambda said: said.turn == last and said.changed):
            view.select_first(lambda said: said.turn == last)

    def close_inspector(self) -> None:
        """Close it, and take the cursor off the texts."""
        self._inspector.display = False
        self.inspected = self._wanted = None
        for which in SIDES:
            self.view(which).select(None)
        self._curve.cursor = None
        self.fit()

    def _select_wanted(self) -> None:
        """Select the token that is wanted; once the answer has ended without it, the last one before it."""
        if self._wanted is None:
            return
        which, place = self._wanted
        live = self._answering.live
        over = live is None or which not in live.sides
        view = self.view(which)
        if view.select_first(lambda said: said.place == place) or (
            over and view.select_last(lambda said: said.place < place)
        ):
            self._wanted = None
        else:
            self._inspector.show_none()

    def to_table(self) -> None:
        """From the text to the alternatives."""
        if isinstance(self.screen.focused, TokenView) and self.inspecting:
            self._inspector.focus_table()

    def step(self, direction: int) -> None:
        """To the token before (-1) or after (1)."""
        if self.inspected is not None:
            self.view(self.inspected).action_step(direction)

    def step_change(self, direction: int) -> None:
        """To the token before (-1) or after (1) that guidance changed."""
        if self.inspected is not None:
            self.view(self.inspected).action_change(direction)

    @on(TokenView.Selected)
    def _selected(self, event: TokenView.Selected) -> None:
        event.stop()
        said: Said | None = event.view.selected  # what is there now: the text may have changed since
        if said is None:
            return
        self._wanted = None
        which: Speaker = "patient" if event.view.id == "patient-view" else "guided"
        before, self.inspected = self.inspected, which
        if not self.inspecting or before != which:
            self._inspector.display = True
            self.fit()
            if isinstance(self.screen.focused, TokenView):  # the text that had the focus may be hidden now
                event.view.focus()
        if before not in (None, which):  # one cursor, on one side
            other = self.view(_other(which))
            other.cursor = None
            other.recolour(other.score)
        self._inspect(which, said)

    @property
    def _inspected_turn(self) -> int:
        """The turn of the token under the cursor, -1 without one."""
        selected = self.selected
        return selected[1].turn if selected is not None else -1

    def _inspect(self, which: Speaker, said: Said) -> None:
        side = self._answering.side(which, said.turn)
        previous = side.tokens[said.position - 1] if said.position else None
        self._inspector.border_title = "patient's token" if which == "patient" else "guided token"
        forced = said.position in side.forced
        self._inspector.show(said.token, previous, len(side.tokens), self._answering.token_names, forced=forced)
        if which == "guided":
            self._load_curve(said.turn)
            self._curve.cursor = said.position

    # Room

    def other_pane(self) -> None:
        """To the other side."""
        self._tab = _other(self.shown)
        if self.inspected is not None:
            self.view(self._tab).select_last()  # the rest follows the cursor
            return
        self.view(self._tab).focus()

    def fit(self) -> None:
        """Both sides, beside or above each other, and the inspector beside or below them; before them the welcome."""
        width, height = self.app.size
        self.query_one(Welcome).display = welcome = not self._answering.history.turns
        for which in SIDES:
            self.pane(which).display = not welcome
        below = self.inspecting and width < _INSPECTOR_BESIDE
        stacked = width < _SIDE_BY_SIDE
        self.set_class(stacked, "stacked")
        self.set_class(below, "below")
        self.show_headings()
        self.set_class(sum((below, stacked, height < _LOW)) > 1, "curveless")
        self.post_message(self.Fitted())


def _other(which: Speaker) -> Speaker:
    return "patient" if which == "guided" else "guided"
