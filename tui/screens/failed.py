"""The screen for an error after which nothing can be done but quit."""

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import Screen
from textual.widgets import Static

from llmdoctor.errors import LLMDoctorError
from llmdoctor.show.text import clean
from llmdoctor.tui.widgets.hints import Hints
from llmdoctor.tui.widgets.status import StatusLine


class FailedScreen(Screen[None]):
    """Shows the line that the command line would print, and quits with the command line's exit code."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("q,escape,enter", "leave", "Quit")]

    def __init__(self, error: LLMDoctorError) -> None:
        super().__init__()
        self.error = error

    def compose(self) -> ComposeResult:
        """One box."""
        with Vertical(id="failed"):
            yield Static(Text(f"error: {' '.join(clean(str(self.error)).split())}"), id="failed-text")
        yield StatusLine()
        yield Hints([("q", "leave", "screen.leave")])

    def action_leave(self) -> None:
        """Quit."""
        self.app.exit(self.error.exit_code)
