"""The saved conversations: resume, rename, delete or export one."""

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import DataTable, Footer, Static

from llmdoctor.errors import LLMDoctorError
from llmdoctor.sessions import Summary
from llmdoctor.show.text import one_line
from llmdoctor.tui.export import KINDS
from llmdoctor.tui.screens.dialogs import Ask, Choose

if TYPE_CHECKING:
    from llmdoctor.tui.app import ChatApp


class SessionsScreen(Screen[str | None]):
    """A list; dismissed with the id of the session to resume, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f9", "dismiss(None)", "Close", id="sessions.close"),
        Binding("r", "rename", "Rename", id="sessions.rename"),
        Binding("d,delete", "delete", "Delete", id="sessions.delete"),
        Binding("e", "export", "Export", id="sessions.export"),
    ]
    app: "ChatApp"  # type: ignore[assignment]

    def __init__(self, current: str) -> None:
        super().__init__()
        self._current = current
        self._rows: list[Summary] = []

    def compose(self) -> ComposeResult:
        """The table."""
        yield Static(id="sessions-title")
        yield DataTable(id="sessions", cursor_type="row")
        yield Footer(compact=True)

    def on_mount(self) -> None:
        """Fill the table."""
        table = self.query_one(DataTable)
        table.add_columns("", "title", "turns", "last used", "id")
        self._fill()
        table.focus()

    def _fill(self) -> None:
        table = self.query_one(DataTable)
        row = table.cursor_row
        table.clear()
        try:
            self._rows = self.app.saved_sessions()
        except LLMDoctorError as error:
            self._rows = []
            self.notify(str(error), severity="error", markup=False)
        for one in self._rows:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.updated))
            mark = "●" if one.id == self._current else " "
            title = one_line(one.title)
            table.add_row(Text(mark), Text(title), Text(str(one.turns), justify="right"), Text(when), Text(one.id))
        table.move_cursor(row=max(0, min(row, len(self._rows) - 1)))
        what = (
            f"{len(self._rows)} conversations in {self.app.store.path}" if self._rows else "No saved conversation yet."
        )
        self.query_one("#sessions-title", Static).update(Text(what, style="dim"))

    def _chosen(self) -> Summary | None:
        row = self.query_one(DataTable).cursor_row
        return self._rows[row] if 0 <= row < len(self._rows) else None

    @on(DataTable.RowSelected)
    def _open(self) -> None:
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
        self._change(lambda: self.app.export(self.app.load_session(one.id), kind, None, chat.lens, chat.doctor))

    def _change(self, action: Callable[[], None]) -> None:
        try:
            action()
        except LLMDoctorError as error:
            self.notify(str(error), severity="error", markup=False)
        self._fill()
