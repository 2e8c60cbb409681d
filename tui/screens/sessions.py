"""The saved conversations: find, read, resume, rename, delete or export one."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import DataTable
from textual.worker import WorkType

from llmdoctor.errors import LLMDoctorError
from llmdoctor.sessions import Session, Summary
from llmdoctor.show.formats import counted, short_name
from llmdoctor.show.lens import lens_limit
from llmdoctor.show.text import clean, one_line
from llmdoctor.tui import token_style
from llmdoctor.tui.conversation import Said, conversation
from llmdoctor.tui.export import KINDS
from llmdoctor.tui.screens.dialogs import Ask, Choose
from llmdoctor.tui.widgets.hints import Hint, Hints
from llmdoctor.tui.widgets.search import SEARCH, SEARCHING, Search
from llmdoctor.tui.widgets.status import StatusLine
from llmdoctor.tui.widgets.token_view import TokenView

if TYPE_CHECKING:
    from llmdoctor.tui.app import ChatApp

_NARROW = 110  # columns below which the preview is under the list
_WIDTHS = {"": 1, "title": 0, "turns": 5, "last used": 11, "id": 8}  # cells of the columns
_LEAST = 12  # cells of a title
_REST = 0.1  # seconds that the cursor rests on a conversation before it is read


class SessionsScreen(Screen[str | None]):
    """A list with a preview; dismissed with the id of the session to resume, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f9", "dismiss(None)", "Close", id="sessions.close"),
        replace(SEARCH, id="sessions.search"),
        Binding("r", "rename", "Rename", id="sessions.rename"),
        Binding("d,delete", "delete", "Delete", id="sessions.delete"),
        Binding("e", "export", "Export", id="sessions.export"),
        Binding("tab", "other", "Preview", id="sessions.preview"),
    ]
    app: "ChatApp"  # type: ignore[assignment]

    def __init__(self, current: str) -> None:
        super().__init__()
        self._current = current
        self._all: list[Summary] = []
        self._rows: list[Summary] = []

    def compose(self) -> ComposeResult:
        """Field, table, preview."""
        yield Search(id="search")
        with Horizontal(id="panes"):
            yield DataTable(id="sessions", cursor_type="row")
            with Vertical(id="preview", classes="pane"):
                yield TokenView(id="preview-view", score=self._score)
        yield StatusLine(id="status")
        yield Hints()

    def on_mount(self) -> None:
        """Fill the table."""
        self.query_one(TokenView).scale = lens_limit(self.app.chat.lens)
        self._read()
        self.query_one(DataTable).focus()

    def on_resize(self) -> None:
        """The preview beside the list or under it."""
        self.set_class(self.app.size.width < _NARROW, "narrow")
        self.call_after_refresh(self._fill)

    def _score(self, said: Said) -> float | None:
        return token_style.score(said.token, self.app.chat.lens, self.app.chat.doctor)

    def hints(self) -> Sequence[Hint]:
        """The keys that do something now."""
        key = self.app.key
        close = (key("sessions.close"), "close", "screen.dismiss(None)")
        match self.focused:
            case Search():
                return SEARCHING
            case TokenView():
                return [("↑↓", "scroll", ""), (key("sessions.preview"), "back to the list", "screen.other"), close]
        search = (key("sessions.search"), "search", "screen.search")
        if not self._rows:
            return [search, close] if self._all else [close]
        return [("Enter", "open", "screen.open"), search, (key("sessions.preview"), "read", "screen.other"),
                (key("sessions.rename"), "rename", "screen.rename"),
                (key("sessions.delete"), "delete", "screen.delete"),
                (key("sessions.export"), "export", "screen.export"), close]  # fmt: skip

    # The list

    def _read(self) -> None:
        """Take the list from the store."""
        try:
            self._all = self.app.saved_sessions()
        except LLMDoctorError as error:
            self._all = []
            self.notify(str(error), severity="error", markup=False)
        self._fill()

    @on(Search.Sought)
    def _fill(self) -> None:
        """Show those that the search finds; the cursor stays on its conversation if that is among them."""
        table, search = self.query_one(DataTable), self.query_one(Search)
        chosen, row = self._chosen(), table.cursor_row
        self._rows = search.found(self._all, lambda one: f"{one.title} {one.id} {one.questions}".casefold())
        table.clear(columns=True)
        room = table.size.width - sum(width + 2 * table.cell_padding for width in _WIDTHS.values())
        for name, width in _WIDTHS.items():  # the title takes the room that the others leave
            table.add_column(name, width=width or max(_LEAST, room - table.styles.scrollbar_size_vertical))
        for one in self._rows:
            mark = "●" if one.id == self._current else " "
            title = Text(one_line(one.title), no_wrap=True, overflow="ellipsis")
            turns = Text(str(one.turns), justify="right")
            table.add_row(Text(mark), title, turns, Text(_when(one.updated)), Text(one.id))
        ids = [one.id for one in self._rows]
        there = chosen is not None and chosen.id in ids
        table.move_cursor(row=ids.index(chosen.id) if chosen and there else max(0, min(row, len(ids) - 1)))
        self.query_one(StatusLine).show(Text(self._count(), style="dim"))
        self.query_one(Hints).show(self.hints())
        if not self._rows:
            self._preview(None)

    def _count(self) -> str:
        if not self._all:
            return "No saved conversation yet."
        found = f"{len(self._rows)} of " if len(self._rows) != len(self._all) else ""
        return f"{found}{counted(len(self._all), 'conversation')} in {self.app.store.path}"

    def _chosen(self) -> Summary | None:
        row = self.query_one(DataTable).cursor_row
        return self._rows[row] if 0 <= row < len(self._rows) else None

    @on(Search.Done)
    def _found(self) -> None:
        self.query_one(DataTable).focus()

    def action_search(self) -> None:
        """To the field."""
        self.set_focus(self.query_one(Search))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool:
        """A slash in the field is one."""
        del parameters
        return action != "search" or not isinstance(self.focused, Search)

    def action_other(self) -> None:
        """From the list to the preview, and back."""
        view = self.query_one(TokenView)
        (self.query_one(DataTable) if view.has_focus else view).focus()

    # The preview

    @on(DataTable.RowHighlighted)
    def _highlighted(self) -> None:
        if one := self._chosen():
            load: WorkType[None] = partial(self._load, one)
            # the preview's own worker: it ends before the preview does
            self.query_one(TokenView).run_worker(load, group="preview", exclusive=True)

    async def _load(self, one: Summary) -> None:
        """Read a conversation, once the cursor rests on it."""
        await asyncio.sleep(_REST)
        try:
            session = await asyncio.wrap_future(self.app.read_session(one.id))
        except LLMDoctorError as error:
            self._preview(None)
            self.notify(str(error), severity="error", markup=False)
        else:
            self._preview(session)

    def _preview(self, session: Session | None) -> None:
        """The guided side of a conversation, from its beginning."""
        pane, view = self.query_one("#preview"), self.query_one(TokenView)
        pane.border_title = clean(session.title).replace("\n", " ") if session is not None else ""
        model = str(session.profile.get("patient", {}).get("model", "")) if session is not None else ""
        pane.border_subtitle = clean(short_name(model))
        view.clear()
        view.following = False
        if session is not None:
            view.append(conversation(session.turns, "guided", None, self.app.start.welcome))
        view.scroll_home(animate=False, immediate=True)

    # What is done with one

    @on(DataTable.RowSelected)
    def action_open(self) -> None:
        """Go on with it."""
        if one := self._chosen():
            self.dismiss(one.id)

    def action_rename(self) -> None:
        """Another title."""
        if one := self._chosen():
            self.app.push_screen(Ask("Title:", one.title), partial(self._rename, one))

    def _rename(self, one: Summary, title: str | None) -> None:
        if title:
            self._change(lambda: self.app.rename_session(one.id, title))

    def action_delete(self) -> None:
        """Ask, then delete it."""
        if one := self._chosen():
            options = {"no": "Keep it", "yes": f"Delete “{one_line(one.title)}”"}
            self.app.push_screen(Choose("Delete this conversation for good?", options), partial(self._delete, one))

    def _delete(self, one: Summary, answer: str | None) -> None:
        if answer == "yes":
            self._change(lambda: self.app.delete_session(one.id))

    def action_export(self) -> None:
        """Ask for the kind, then write it to the working folder."""
        if one := self._chosen():
            kinds = {kind: f"{name} (.{kind})" for kind, name in KINDS.items()}
            self.app.push_screen(Choose("Export as", kinds), partial(self._export, one))

    def _export(self, one: Summary, kind: str | None) -> None:
        if kind is None:
            return
        chat = self.app.chat
        if kind == "svg":  # a picture of the conversation, not of this list
            self.dismiss(one.id)
            self.app.call_after_refresh(self.app.set_timer, 0.3, lambda: chat.obey("/export svg"))
            return
        read = self.app.read_session(one.id)
        self._change(lambda: self.app.export(read.result(), kind, None, chat.lens, chat.doctor))

    def _change(self, action: Callable[[], None]) -> None:
        try:
            action()
        except LLMDoctorError as error:
            self.notify(str(error), severity="error", markup=False)
        self._read()


def _when(seconds: float) -> str:
    """``today 09:38``, or a date."""
    then, now = time.localtime(seconds), time.localtime()
    return time.strftime("today %H:%M" if then[:3] == now[:3] else "%Y-%m-%d", then)
