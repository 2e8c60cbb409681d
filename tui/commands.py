"""The slash commands: one list for the prompt, the command palette and the help screen."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text  # in a str the palette would read [KIND] as markup
from textual.command import DiscoveryHit, Hit, Hits, Provider

from llmdoctor.errors import UsageError
from llmdoctor.set_command import setting_names
from llmdoctor.show.lens import LENSES, following
from llmdoctor.tui.columns import EXAMPLES, columns_of, restored
from llmdoctor.tui.export import KINDS
from llmdoctor.tui.screens.columns_screen import ColumnsScreen

if TYPE_CHECKING:
    from llmdoctor.tui.app import ChatApp
    from llmdoctor.tui.screens.chat import ChatScreen


@dataclass(frozen=True, slots=True)
class Command:
    """``/name arguments``. ``run`` gets the screen and the text after the name, and may raise UsageError."""

    name: str
    arguments: str
    help: str
    run: Callable[["ChatScreen", str], None]


def _without(action: Callable[["ChatScreen"], None]) -> Callable[["ChatScreen", str], None]:
    return lambda screen, _text: action(screen)


def _set(screen: "ChatScreen", text: str) -> None:
    screen.settings.set(text)
    screen.show_settings()
    _show(screen)


def _show(screen: "ChatScreen") -> None:
    screen.notify(screen.describe(), markup=False)


def _lens(screen: "ChatScreen", text: str) -> None:
    if text and text not in LENSES:
        raise UsageError(f"/lens: expected one of {', '.join(LENSES)}, got {text!r}")
    screen.recolour(next((lens for lens in LENSES if lens == text), following(LENSES, screen.lens)), screen.doctor)


def _doctor(screen: "ChatScreen", text: str) -> None:
    names = list(screen.guidance.betas)
    if not names:
        raise UsageError("/doctor: there is no doctor")
    if text and text not in names:
        raise UsageError(f"/doctor: there is no doctor {text!r} (there are: {', '.join(names)})")
    screen.recolour(screen.lens, text or following(names, screen.doctor))


def _auto(screen: "ChatScreen") -> None:
    screen.auto = not screen.auto
    screen.notify(f"Re-run when a slider rests: {'on' if screen.auto else 'off'}.")
    if screen.auto and screen.stale:  # a slider rests already
        screen.rerun.ask()


def _compare(screen: "ChatScreen", text: str) -> None:
    screen.answering.stop()
    if not text and (kept := screen.compared) is not None:
        columns, past, seed = restored(kept), len(kept.past), kept.seed
        question = columns[0].turns[-1].prompt
    else:
        columns = columns_of(text, screen.guidance, screen.sampling, screen.turns[:-1])
        past = len(screen.turns[:-1])
        question, seed = next(((t.prompt, t.seed) for t in screen.turns[-1:]), ("", screen.settings.next_seed()))
    shown = ColumnsScreen(columns, past, question, seed, screen.lens, screen.doctor)
    screen.app.push_screen(shown, screen.leave_columns)


def _rename(screen: "ChatScreen", title: str) -> None:
    if not title:
        raise UsageError("/rename: expected a title, for example: /rename Sleep")
    screen.session = replace(screen.session, title=title)
    screen.save()


def _export(screen: "ChatScreen", text: str) -> None:
    kind, _, name = (text or "md").partition(" ")
    if kind not in KINDS:
        raise UsageError(f"/export: expected one of {', '.join(KINDS)}, got {kind!r}")
    path = Path(name.strip()) if name.strip() else None
    screen.app.export(replace(screen.session, turns=screen.turns), kind, path, screen.lens, screen.doctor)


def _theme(screen: "ChatScreen", text: str) -> None:
    if not text:
        screen.app.search_themes()
    elif text in screen.app.available_themes:
        screen.app.theme = text
    else:
        known = ", ".join(sorted(screen.app.available_themes))
        raise UsageError(f"/theme: there is no theme {text!r} (there are: {known})")


COMMANDS = (
    Command("help", "", "keys, commands, marks", _without(lambda s: s.action_help())),
    Command("set", "NAME=X ...", f"{', '.join(setting_names())}; a doctor's name sets its beta",
            _set),
    Command("show", "", "the settings in use", _without(_show)),
    Command("lens", "[KIND]", "colour by kl, ratio, value, flips or off", _lens),
    Command("doctor", "[NAME]", "whose opinion colours the tokens", _doctor),
    Command("rerun", "", "the last answer again, same seed, the settings in use", _without(lambda s: s.action_rerun())),
    Command("auto", "", "re-run by itself when a slider rests: on or off", _without(_auto)),
    Command("regenerate", "", "the last answer again with another seed", _without(lambda s: s.action_regenerate())),
    Command("edit", "", "change the last message and send it again", _without(lambda s: s.action_edit())),
    Command("back", "", "before the last forced token, re-run or message", _without(lambda s: s.action_back())),
    Command("forward", "", "undo back", _without(lambda s: s.action_forward())),
    Command("inspect", "", "token by token: alternatives, ranks, forcing", _without(lambda s: s.action_inspect())),
    Command("copy", "", "the guided answer to the clipboard", _without(lambda s: s.action_copy())),
    Command("compare", "[SETTING|DOCTOR ...]", "several settings or doctors beside the patient alone, for example "
            f"{EXAMPLES}; commas join what belongs to one: helpful=2,safe=0; without any, the last comparison again",
            _compare),
    Command("new", "", "a new conversation (this one is saved)", _without(lambda s: s.new_session())),
    Command("sessions", "", "browse, rename, delete, export", _without(lambda s: s.action_sessions())),
    Command("resume", "ID", "go on with a saved conversation", lambda s, text: s.open(s.app.load_session(text))),
    Command("rename", "TITLE", "name this conversation", _rename),
    Command("export", "[md|json|html|svg] [FILE]", "write this conversation, by default as md", _export),
    Command("theme", "[NAME]", "other colours; without a name, choose from a list", _theme),
    Command("quit", "", "leave", _without(lambda s: s.app.exit())),
)  # fmt: skip


def run(screen: "ChatScreen", line: str) -> None:
    """Obey ``/name arguments``; UsageError for a name that is none."""
    name, _, rest = line.removeprefix("/").partition(" ")
    for command in COMMANDS:
        if command.name == name:
            if rest.strip() and not command.arguments:
                raise UsageError(f"/{name}: expected nothing behind it, got {rest.strip()!r}")
            command.run(screen, rest.strip())
            return
    raise UsageError(f"unknown command /{name}; F1 lists them")


class Commands(Provider):
    """The same commands in the palette; one that needs arguments is put into the prompt."""

    async def discover(self) -> Hits:
        """All of them."""
        for text, act, help_text in self._all():
            yield DiscoveryHit(Text(text), act, text=text, help=help_text)

    async def search(self, query: str) -> Hits:
        """Those that match."""
        matcher = self.matcher(query)
        for text, act, help_text in self._all():
            if (score := matcher.match(f"{text} {help_text}")) > 0:
                yield Hit(score, Text(text), act, text=text, help=help_text)

    def _all(self) -> Iterator[tuple[str, Callable[[], None], str]]:
        app: ChatApp = self.app  # type: ignore[assignment]
        for command in COMMANDS:
            needs = command.arguments and not command.arguments.startswith("[")
            act = partial(app.begin_command, command.name) if needs else partial(app.obey, f"/{command.name}")
            yield f"/{command.name} {command.arguments}".strip(), act, command.help
