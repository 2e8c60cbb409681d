"""F1: keys, commands, marks."""

from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from llmdoctor.tui.commands import COMMANDS

# one line each: the window wraps them
_MARKS = (
    "Colour is the lens' score of a token, on a fixed scale: orange low, grey zero, blue high. bold: above a third of "
    "the scale; underlined: below minus a third.\n"
    "⟨helpful 0.8→1.2⟩: set here, the tokens behind it were made with it. ⟨forced⟩: the next token was chosen by you. "
    "∎: the end-of-answer token.\n"
    "Lenses: kl is KL(guided || patient) in nats, how far guidance moved the next token; ratio is log doctor/patient; "
    "value is log V, the doctor's expectation of what the answer will be worth, after the token; flips are places "
    "where guidance changed the likeliest token.\n"
    "The left side is the patient alone on its own conversation, with the same seed."
)


class HelpScreen(ModalScreen[None]):
    """Marks, keys and commands in one long text."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f1,q", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        """The text in a box that scrolls."""
        with VerticalScroll(id="help"):
            yield Static(self._text())

    def on_mount(self) -> None:
        """Take the focus, so that arrows scroll."""
        box = self.query_one("#help")
        box.border_title = "help"
        box.border_subtitle = "Esc closes"
        box.focus()

    def _text(self) -> Table:
        from llmdoctor.tui.app import binding_ids
        from llmdoctor.tui.config import config_file

        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True, style="bold")
        table.add_column()
        table.add_column(no_wrap=True, style="dim")
        for key, what in (("Enter", "send"), ("Shift+Enter, Ctrl+J", "new line"), ("Up in an empty prompt", "edit")):
            table.add_row(key, what)
        table.add_row("Ctrl+P", "all commands, themes")
        keymap = self.app.config.keys  # type: ignore[attr-defined]
        for name, binding in binding_ids().items():
            keys = keymap.get(name, binding.key).replace(",", ", ")
            table.add_row(keys, binding.description, name)
        table.add_row("")
        for command in COMMANDS:
            table.add_row(f"/{command.name} {command.arguments}".strip(), command.help)
        page = Table.grid()
        page.add_column()
        page.add_row(Text(_MARKS))
        page.add_row("")
        page.add_row(table)
        page.add_row(Text(f"\nOther keys, theme and lens: {config_file()}, with lines such as\n"))
        page.add_row(Text('theme = "nord"\nlens = "kl"\n[keys]\n"chat.rerun" = "ctrl+r"', style="dim"))
        page.add_row(Text("\nA slider that has the focus takes a typed number: 0.35 Enter."))
        return page
