"""What a newcomer sees in place of the two texts: examples to press, what the screen shows, who speaks."""

from typing import ClassVar

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.message import Message
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from llmdoctor.show.formats import knows_text
from llmdoctor.show.text import clean
from llmdoctor.tui.start import Start


class Examples(OptionList):
    """The questions; a digit asks one as well."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "screen.focus_prompt", show=False)]

    def on_focus(self) -> None:
        """The first one can be asked at once."""
        self.highlighted = 0

    def on_key(self, event: events.Key) -> None:
        """1, 2, 3."""
        if event.character and event.character.isdecimal() and 0 < int(event.character) <= self.option_count:
            event.stop()
            self.highlighted = int(event.character) - 1
            self.action_select()


class Welcome(VerticalScroll, can_focus=False):
    """Posts `Asked` with the question that was pressed."""

    class Asked(Message):
        """One of the examples."""

        def __init__(self, question: str) -> None:
            super().__init__()
            self.question = question

    def __init__(self, start: Start, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._start = start

    def on_mount(self) -> None:
        """From the top, though the examples are the first that can have the focus."""
        self.border_title = "llmdoctor"
        self.call_after_refresh(self.scroll_home, animate=False)

    def compose(self) -> ComposeResult:
        """The examples first: they are never out of view."""
        questions = self._start.welcome.examples
        if questions:
            yield Static("Ask below, or press an example (a click, or its number and Enter):")
            shown = [Text.assemble((f"{i}", "bold"), f"  {clean(question)}") for i, question in enumerate(questions, 1)]
            yield Examples(*map(Option, shown), id="examples", compact=True)
        yield Static(self._sees())
        yield Static(self._knows())

    def _sees(self) -> Text:
        doctors = ", ".join(self._start.doctors)
        by = "a small doctor" if len(self._start.doctors) == 1 else "small doctors"
        guides = f"guided token by token by {by}: {doctors}" if doctors else "guided by nothing: no doctor"
        return Text.assemble(
            ("Patient alone", "bold"), ": a frozen language model. ",
            ("Guided", "bold"), f": the same, {guides}. ",
            ("Colour", "bold"), ": guidance changed something; grey: it did not.",
        )  # fmt: skip

    def _knows(self) -> Text:
        return Text.assemble((clean(self._start.patient), "bold"), clean(knows_text(self._start.welcome)))

    @on(OptionList.OptionSelected)
    def _pressed(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.post_message(self.Asked(self._start.welcome.examples[event.option_index]))
