"""The field above a list that leaves only the entries with all its words."""

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Input


class Search(Input):
    """Posts `Sought` with every change, and `Done` when the list is to have the focus again.

    Enter, Down and Tab lead to the list; Escape takes the words away first.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "All of them", show=False),
        Binding("enter,down,tab", "done", "To the list", show=False),
    ]

    class Sought(Message):
        """The words have changed."""

    class Done(Message):
        """The field is left."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(placeholder="/ searches", id=id, compact=True, select_on_focus=False)

    def finds(self, text: str) -> bool:
        """Whether all words are in the text, in any case."""
        text = text.casefold()
        return all(word in text for word in self.value.casefold().split())

    def action_leave(self) -> None:
        """Every entry again."""
        self.value = ""
        self.post_message(self.Done())

    def action_done(self) -> None:
        """To what was found."""
        self.post_message(self.Done())

    def on_input_changed(self, event: Input.Changed) -> None:
        """Each letter searches."""
        event.stop()
        self.post_message(self.Sought())

    def on_focus(self, _event: events.Focus) -> None:
        """What a key does here."""
        self.placeholder = "type to search; Enter: to the list; Esc: all"

    def on_blur(self, _event: events.Blur) -> None:
        """How to come here."""
        self.placeholder = "/ searches"
