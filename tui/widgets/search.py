"""The field above a list that leaves only the entries with all its words."""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, TypeVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import Input

from llmdoctor.tui.widgets.hints import Hint

_Entry = TypeVar("_Entry")
# a priority binding and no other: what is typed behind the slash would reach the list before the list has handled it
SEARCH = Binding("slash,ctrl+f", "search", "Search", priority=True)
SEARCHING: Sequence[Hint] = (("type", "to search", ""), ("Enter", "to the list", ""), ("Esc", "all of them", ""))


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

    def found(self, entries: Iterable[_Entry], words: Callable[[_Entry], str]) -> list[_Entry]:
        """The entries with all words that are sought. ``words`` gives the casefolded text of one, if it is needed."""
        sought = self.value.casefold().split()
        if not sought:
            return list(entries)
        texts = ((entry, words(entry)) for entry in entries)
        return [entry for entry, text in texts if all(word in text for word in sought)]

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
        self.placeholder = "words to search for"

    def on_blur(self, _event: events.Blur) -> None:
        """How to come here."""
        self.placeholder = "/ searches"
