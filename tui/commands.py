"""The slash commands: one list for the prompt, the command palette and the help screen."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from textual.command import DiscoveryHit, Hit, Hits, Provider

from llmdoctor.errors import UsageError
from llmdoctor.set_command import setting_names

if TYPE_CHECKING:
    from llmdoctor.tui.screens.chat import ChatScreen


@dataclass(frozen=True, slots=True)
class Command:
    """``/name arguments``. ``run`` gets the screen and the text behind the name; UsageError is shown in one line."""

    name: str
    arguments: str
    help: str
    run: Callable[["ChatScreen", str], None]


def _without(action: Callable[["ChatScreen"], None]) -> Callable[["ChatScreen", str], None]:
    def run(screen: "ChatScreen", text: str) -> None:
        if text:
            raise UsageError(f"expected nothing behind the command, got {text!r}")
        action(screen)

    return run


COMMANDS = (
    Command("help", "", "keys, commands, marks", _without(lambda s: s.action_help())),
    Command("set", "NAME=X ...", f"{', '.join(setting_names())}; a doctor's name sets its beta",
            lambda s, text: s.set_settings(text)),
    Command("show", "", "the settings in use", _without(lambda s: s.show_settings())),
    Command("lens", "[KIND]", "colour by value, ratio, kl, flips or off", lambda s, text: s.set_lens(text)),
    Command("doctor", "[NAME]", "whose opinion colours the tokens", lambda s, text: s.set_doctor(text)),
    Command("rerun", "", "the last answer again, same seed, settings of now", _without(lambda s: s.action_rerun())),
    Command("auto", "", "re-run by itself when a slider rests: on or off", _without(lambda s: s.toggle_auto())),
    Command("regenerate", "", "the last answer again with another seed", _without(lambda s: s.action_regenerate())),
    Command("edit", "", "change the last message and send it again", _without(lambda s: s.action_edit())),
    Command("back", "", "before the last forced token, re-run or message", _without(lambda s: s.action_back())),
    Command("forward", "", "undo back", _without(lambda s: s.action_forward())),
    Command("inspect", "", "token by token: alternatives, ranks, forcing", _without(lambda s: s.action_inspect())),
    Command("copy", "", "the guided answer to the clipboard", _without(lambda s: s.action_copy())),
    Command("new", "", "a new conversation (this one is saved)", _without(lambda s: s.new_session())),
    Command("sessions", "", "browse, rename, delete, export", _without(lambda s: s.action_sessions())),
    Command("resume", "ID", "go on with a saved conversation", lambda s, text: s.resume(text)),
    Command("rename", "TITLE", "name this conversation", lambda s, text: s.rename(text)),
    Command("export", "md|json|html|svg [FILE]", "write this conversation", lambda s, text: s.export(text)),
    Command("theme", "[NAME]", "other colours; without a name, choose from a list", lambda s, text: s.set_theme(text)),
    Command("quit", "", "leave", _without(lambda s: s.app.exit())),
)  # fmt: skip


def run(screen: "ChatScreen", line: str) -> None:
    """Obey ``/name arguments``; UsageError for a name that is none."""
    name, _, rest = line.removeprefix("/").partition(" ")
    for command in COMMANDS:
        if command.name == name:
            command.run(screen, rest.strip())
            return
    raise UsageError(f"unknown command /{name}; F1 lists them")


class Palette(Provider):
    """The same commands in the palette; one that needs arguments is put into the prompt."""

    async def discover(self) -> Hits:
        """All of them."""
        for text, act, help_text in self._all():
            yield DiscoveryHit(text, act, help=help_text)

    async def search(self, query: str) -> Hits:
        """Those that match."""
        matcher = self.matcher(query)
        for text, act, help_text in self._all():
            if (score := matcher.match(f"{text} {help_text}")) > 0:
                yield Hit(score, matcher.highlight(text), act, help=help_text)

    def _all(self) -> Iterator[tuple[str, Callable[[], None], str]]:
        screen: ChatScreen = self.screen  # type: ignore[assignment]
        for command in COMMANDS:
            needs = command.arguments and not command.arguments.startswith("[")
            act = partial(screen.begin_command, command.name) if needs else partial(screen.obey, f"/{command.name}")
            yield f"/{command.name} {command.arguments}".strip(), act, command.help
