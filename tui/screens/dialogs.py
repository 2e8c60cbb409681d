"""Dialogs that ask for one thing."""

from collections.abc import Mapping
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from llmdoctor.tui.widgets.hints import Hints


class Ask(ModalScreen[str | None]):
    """Asks for a line of text; dismissed with None on Escape."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Leave")]

    def __init__(self, question: str, value: str = "") -> None:
        super().__init__()
        self._question, self._value = question, value

    def compose(self) -> ComposeResult:
        """Question and field."""
        with Vertical(classes="dialog"):
            yield Static(Text(self._question))
            yield Input(self._value, compact=True)
        yield Hints([("Enter", "take it", ""), ("Esc", "leave it as it is", "screen.dismiss(None)")])

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter."""
        self.dismiss(event.value.strip() or None)


class Choose(ModalScreen[str | None]):
    """Asks for one of ``options`` (key: text); dismissed with the key, or None on Escape."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Leave")]

    def __init__(self, question: str, options: Mapping[str, str]) -> None:
        super().__init__()
        self._question, self._options = question, options

    def compose(self) -> ComposeResult:
        """Question and list."""
        with Vertical(classes="dialog"):
            yield Static(Text(self._question))
            yield OptionList(*(Option(Text(text), id=key) for key, text in self._options.items()), compact=True)
        yield Hints([("↑↓", "choose", ""), ("Enter", "take it", ""), ("Esc", "leave", "screen.dismiss(None)")])

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Enter or a click."""
        self.dismiss(event.option_id)
