"""The status line of a screen, where messages of the app stand too: they cover nothing."""

from typing import TYPE_CHECKING

from rich.text import Text
from textual.timer import Timer
from textual.widgets import Static

from llmdoctor.show.text import clean

if TYPE_CHECKING:
    from llmdoctor.tui.app import DoctorApp

_STYLES = {"information": "bold", "warning": "bold yellow", "error": "bold red"}
_GAP = " · "
_LEFT = 12  # cells that a message must leave for the status, to stand beside it


class StatusLine(Static):
    """The status, behind the app's messages while there are some; long ones take as many lines as they need.

    A click takes the messages away.
    """

    app: "DoctorApp"  # type: ignore[assignment]

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id, classes="status")
        self._status = Text()
        self._timer: Timer | None = None

    def show(self, status: Text) -> None:
        """Show this status."""
        self._status = status
        self._draw(layout=False)  # it keeps its height, so the rest of the screen need not be laid out again

    def show_notices(self) -> None:
        """Show the messages of the app, each until its time is over."""
        if self._timer is not None:
            self._timer.stop()
        self._draw(layout=True)
        if left := [notice.time_left for notice in self.app.notices]:
            self._timer = self.set_timer(max(0.05, min(left)), self.show_notices)

    def _draw(self, *, layout: bool) -> None:
        said = [Text(" ".join(clean(one.message).split()), _STYLES[one.severity]) for one in self.app.notices]
        text = Text(_GAP).join(said)
        width = self.content_size.width
        if text.cell_len <= width - _LEFT:
            text = Text(_GAP).join([part for part in (*said, self._status) if part])
            text.truncate(max(1, width), overflow="ellipsis")
        self.update(text, layout=layout)

    def on_mount(self) -> None:
        """A screen that is opened shows the messages that are there."""
        self.show_notices()

    def on_resize(self) -> None:
        """What stood beside a message may have no room now."""
        self._draw(layout=True)

    def on_click(self) -> None:
        """Read."""
        self.app.clear_notifications()
