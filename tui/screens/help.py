"""F1: keys, commands, marks."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from llmdoctor.set_command import setting_help
from llmdoctor.tui.commands import COMMANDS
from llmdoctor.tui.keys import key_text
from llmdoctor.tui.widgets.hints import Hints

if TYPE_CHECKING:
    from llmdoctor.tui.app import DoctorApp

_TWO_COLUMNS = 56  # cells from which what a key does stands beside it, else behind it
_KEYS = 24  # cells of the left column

_PROMPT = (
    ("Enter", "send"),
    ("Shift+Enter, Ctrl+J", "new line"),
    ("Up", "in the empty field: edit the last message; on the welcome: choose an example"),
    ("Ctrl+P", "search all commands"),
    ("Ctrl+Q", "leave; everything is saved"),
)
# beginnings of the ids of key bindings, and the heading under which they stand
_SECTIONS = {
    "chat.": "In the conversation",
    "token.": "In a text",
    "alternatives.": "In the table of alternatives",
    "slider.": "On a slider",
    "sessions.": "In the saved conversations (F9)",
    "compare.": "In a comparison (/compare)",
    "app.": "Everywhere",
}
_MARKS = (
    ("patient alone", "without guidance, on its own conversation, with the same seed"),
    ("guided by ...", "the same patient with the doctors, and the settings of the last answer"),
    ("colour", "the lens' score of a token, on a fixed scale: orange low, grey zero, blue high"),
    ("bold, underlined", "above a third of the scale, below minus a third"),
    ("flip, changed", "guidance changed the likeliest token; changed are also the tokens that are bold in lens kl"),
    ("∎", "the token that ends an answer"),
    ("⟨helpful 0.8→1.2⟩", "set here: the tokens behind it were made with it"),
    ("⟨forced⟩", "the next token was chosen by you"),
    ("lens kl", "KL(guided || patient) in nats: how far guidance moved this token's probabilities"),
    ("lens ratio", "log doctor/patient: how much more the doctor likes the token than the patient does"),
    ("lens value", "log V: what the doctor expects the answer to be worth, after the token"),
    ("lens flips", "the places where guidance changed the likeliest token"),
)


class Entry(NamedTuple):
    """A key, command or mark, what it does, and the id by which a key can be changed."""

    name: str
    what: str
    id: str = ""


class HelpScreen(ModalScreen[None]):
    """Keys, commands and marks in one long text, wrapped to the window's width."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f1,q", "dismiss", "Close")]
    app: "DoctorApp"  # type: ignore[assignment]

    def compose(self) -> ComposeResult:
        """The text in a box that scrolls."""
        with VerticalScroll(id="help"):
            yield Static(id="help-text")
        yield Hints(
            [("↑↓ PgUp PgDn", "scroll", ""), ("Home End", "first, last line", ""), ("Esc", "close", "screen.dismiss")]
        )

    def on_mount(self) -> None:
        """Take the focus, so that arrows scroll."""
        box = self.query_one("#help")
        box.border_title = "help"
        box.focus()

    def on_resize(self) -> None:
        """Two columns where there is room."""
        wide = self.app.size.width * 0.95 - 8 >= _TWO_COLUMNS
        self.query_one("#help-text", Static).update(Group(*self._page(wide=wide)))

    def _page(self, *, wide: bool) -> Iterator[RenderableType]:
        from llmdoctor.tui.config import config_file

        yield from _section("Asking", [Entry(*entry) for entry in _PROMPT], wide=wide)
        for start, heading in _SECTIONS.items():
            yield from _section(heading, list(self._bindings_of(start)), wide=wide)
        yield Text("A slider that has the focus takes a typed number: 0.35 Enter.\n")
        commands = [Entry(f"/{one.name} {one.arguments}".strip(), one.help) for one in COMMANDS]
        yield from _section("Commands", commands, wide=wide)
        yield from _section("What /set and /compare take", [Entry(*entry) for entry in setting_help()], wide=wide)
        yield from _section("What is shown", [Entry(*entry) for entry in _MARKS], wide=wide)
        yield Text("Other keys, theme and lens", "bold underline")
        yield Text(f"{config_file()} may hold lines such as")
        yield Text('theme = "nord"\nlens = "value"\n[keys]\n"chat.rerun" = "ctrl+r"', "dim")
        yield Text("The names of the keys are the grey ones above.")

    def _bindings_of(self, start: str) -> Iterator[Entry]:
        from llmdoctor.tui.app import binding_ids

        for name, binding in binding_ids().items():
            if name.startswith(start):
                yield Entry(key_text(self.app.config.keys.get(name, binding.key)), binding.description, name)


def _section(heading: str, entries: Sequence[Entry], *, wide: bool) -> Iterator[RenderableType]:
    yield Text(heading, "bold underline")
    if wide:
        table = Table.grid(padding=(0, 2), expand=True)
        table.add_column(style="bold", width=_KEYS, overflow="fold")
        table.add_column(ratio=1, overflow="fold")
        for entry in entries:
            table.add_row(Text(entry.name), _explained(entry))
        yield table
    else:
        for entry in entries:
            yield Text.assemble((entry.name, "bold"), "  ", _explained(entry), overflow="fold")
    yield Text("")


def _explained(entry: Entry) -> Text:
    return Text.assemble(entry.what, (f"  {entry.id}", "dim") if entry.id else "")
