"""The apps: the conversation, and the base that it shares with the browsers."""

import asyncio
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from textual.app import App
from textual.binding import Binding, BindingType
from textual.command import CommandPalette, Provider
from textual.content import Content
from textual.dom import DOMNode
from textual.filter import LineFilter
from textual.notifications import Notification, Notifications, SeverityLevel
from textual.screen import Screen
from textual.theme import ThemeProvider

from llmdoctor.errors import LLMDoctorError, UsageError
from llmdoctor.sessions import SavedComparison, Session, SessionStore, Summary
from llmdoctor.show.lens import Lens
from llmdoctor.show.text import clean, one_line
from llmdoctor.tui import clipboard, export
from llmdoctor.tui.config import Config, config_file, read_config, sessions_file
from llmdoctor.tui.generation import Worker
from llmdoctor.tui.guard import hung_up, quiet_terminal, take_any_bytes, written
from llmdoctor.tui.keys import short_key
from llmdoctor.tui.start import Start
from llmdoctor.tui.visible import VisibleControls
from llmdoctor.tui.widgets.status import StatusLine

if TYPE_CHECKING:
    from llmdoctor.tui.screens.chat import ChatScreen

_SWITCH = 0.0005  # seconds that drawing may hold the interpreter while the generator waits for it (Python's own: 0.005)
_TOLD = 0.2  # seconds between two looks at what saving has to tell
_TERMINAL = 1.0  # seconds between two looks whether the terminal is still there
_GOODBYE = 10.0  # seconds to leave in when it is gone: what was finished is saved long before
_TWICE = 2.0  # seconds between two presses of Ctrl+C that quit
_NOTICE, _READ = 5.0, 12  # seconds that a message stays at least, and characters read per second


class DoctorApp(App[int]):
    """What all apps share: theme, keys, Ctrl+C, copying, pictures, and a worker thread that ends with the app."""

    CSS_PATH: ClassVar[Any] = Path(__file__).with_name("app.tcss")
    TITLE = "llmdoctor"
    ENABLE_COMMAND_PALETTE = False  # Textual's own commands are not ours; the conversation has a palette of its own
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(
            "ctrl+c",
            "interrupt",
            "Stop the answer; pressed twice, leave",
            show=False,
            priority=True,
            id="app.interrupt",
        ),
        Binding("f12", "picture", "Write the screen as a picture (SVG)", show=False, priority=True, id="app.picture"),
    ]
    worker: Worker | None = None
    last_words: Sequence[str] = ()  # what could not be shown any more: printed once the terminal is as before
    _visible = VisibleControls()

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self._own_config = config
        self.config = config or Config()
        self._interrupted_at = 0.0
        self.notices = Notifications()

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Textual's own, and the one that keeps control characters from the terminal."""
        return [*super().get_line_filters(), self._visible]

    def on_mount(self) -> None:
        """Apply the configuration file."""
        if self._own_config is None:
            try:
                self.config = read_config(config_file(), themes=self.available_themes, bindings=dict(binding_ids()))
            except UsageError as error:
                self.notify(str(error), severity="warning", markup=False, timeout=15)
        if self.config.theme:
            self.theme = self.config.theme
        if self.config.keys:
            self.set_keymap(dict(self.config.keys))
        if self.worker is not None:
            self.worker.start()
        if not self.is_headless:
            loop = asyncio.get_running_loop()
            threading.Thread(target=self._leave_when_hung_up, args=(loop,), daemon=True).start()

    def _leave_when_hung_up(self, loop: asyncio.AbstractEventLoop) -> None:
        """Leave when the terminal is gone without a signal: Textual would read its end of file for ever.

        In a thread: while an answer is drawn, Textual waits for ever for a terminal that takes nothing any more.
        """
        if sys.__stdin__ is None:
            return
        while not hung_up(sys.__stdin__.fileno()):
            time.sleep(_TERMINAL)
        try:
            loop.call_soon_threadsafe(self.exit, 128 + signal.SIGHUP)
        except RuntimeError:  # the app has ended by itself
            return
        time.sleep(_GOODBYE)
        os._exit(128 + signal.SIGHUP)

    def on_unmount(self) -> None:
        """End the worker."""
        if self.worker is not None:
            self.worker.close()

    def handle_bindings_clash(self, clashed_bindings: set[Binding], node: DOMNode) -> None:
        """Say which actions the user's configuration gives the same key."""
        names = ", ".join(sorted(str(binding.id) for binding in clashed_bindings))
        self.notify(f"tui.toml gives one key to several actions: {names}", severity="warning", markup=False)

    def notify(
        self,
        message: str,
        *,
        title: str = "",
        severity: SeverityLevel = "information",
        timeout: float | None = None,
        markup: bool = True,
    ) -> None:
        """Say it in the status line, long enough to be read, in place of the message before; a warning stays.

        Textual's own toasts would cover the text. To be called in the app's thread.
        """
        plain = Content.from_markup(message).plain if markup else message
        warnings = [notice for notice in self.notices if notice.severity == "warning"]
        self.notices.clear()
        for notice in warnings:
            self.notices.add(notice)
        seconds = timeout or max(_NOTICE, len(plain) / _READ)
        self.notices.add(Notification(plain, title, severity, seconds, markup=False))
        self._show_notices()

    def clear_notifications(self) -> None:
        """Take all messages away."""
        self.notices.clear()
        self._show_notices()

    def _show_notices(self) -> None:
        for screen in self.screen_stack:  # a dialog has no status line, but the screen under it has
            for line in screen.query(StatusLine):
                line.show_notices()

    def stop(self) -> bool:
        """Stop what runs; False when nothing does."""
        return False

    def action_interrupt(self) -> None:
        """Ctrl+C: stop an answer; pressed twice with none running, quit."""
        if self.stop():
            return
        now = time.monotonic()
        if now - self._interrupted_at < _TWICE:
            self.exit(130)
        else:
            self._interrupted_at = now
            self.notify("Press Ctrl+C once more to quit.", timeout=_TWICE)

    def copy_to_clipboard(self, text: str) -> None:
        """Copy through the terminal (OSC 52, also inside tmux) and through the desktop's clipboard command."""
        self._clipboard = text
        if self._driver is not None:
            self._driver.write(clipboard.osc52(text))
        self.run_worker(lambda: clipboard.to_desktop(text), thread=True, group="clipboard")

    def action_picture(self) -> None:
        """Write the screen as SVG."""
        self.write_picture(Path(f"llmdoctor-{time.strftime('%Y%m%d-%H%M%S')}.svg"))

    def write_picture(self, path: Path) -> None:
        """Write the screen as SVG, without fonts from the network."""
        try:
            written_to = export.write(path, export.without_fonts(self.export_screenshot()))
        except LLMDoctorError as error:
            self.notify(str(error), severity="error", markup=False)
        else:
            self.notify(f"wrote {written_to}", markup=False)

    def key(self, name: str) -> str:
        """The key of the binding with this id, as short as the last line needs it: ``F5``, ``Esc``, ``^T``."""
        return short_key(self.config.keys.get(name, binding_ids()[name].key))

    def fail(self, error: LLMDoctorError) -> None:
        """Show the error that leaves nothing to do but quit."""
        from llmdoctor.tui.screens.failed import FailedScreen

        self.use_command_palette = False
        self.push_screen(FailedScreen(error))


def _commands() -> type[Provider]:
    from llmdoctor.tui.commands import Commands

    return Commands


class ChatApp(DoctorApp):
    """``llmdoctor chat``."""

    ENABLE_COMMAND_PALETTE = True
    COMMANDS: ClassVar[set[type[Provider] | Callable[[], type[Provider]]]] = {_commands}
    worker: Worker

    def __init__(self, start: Start, config: Config | None = None) -> None:
        super().__init__(config)
        self.start = start
        self.store = start.store or SessionStore(sessions_file())
        self.worker = Worker(start.load, start.sampling, start.guidance)
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="llmdoctor-sessions")
        self._saved: deque[tuple[Session, Future[Session]]] = deque()

    def on_mount(self) -> None:
        """Show the conversation at once; the worker loads the models in the background."""
        from llmdoctor.tui.screens.chat import ChatScreen

        self.push_screen(ChatScreen())
        self.set_interval(_TOLD, self._tell)

    def on_unmount(self) -> None:
        """End the saving thread, after it has written what is pending."""
        self._saver.shutdown(wait=True)
        self.last_words = list(dict.fromkeys(filter(None, (_outcome(*self._saved.popleft()) for _ in [*self._saved]))))

    @property
    def chat(self) -> "ChatScreen":
        """The conversation, also while another screen covers it."""
        from llmdoctor.tui.screens.chat import ChatScreen

        return next(screen for screen in self.screen_stack if isinstance(screen, ChatScreen))

    def action_command_palette(self) -> None:
        """Ctrl+P."""
        if self.use_command_palette and not CommandPalette.is_open(self):  # type: ignore[arg-type]
            self._open_palette()

    def search_themes(self) -> None:
        """Other colours to choose from."""
        self._open_palette(providers=[ThemeProvider], placeholder="Search for themes…")

    def _open_palette(self, **how: Any) -> None:
        from llmdoctor.tui.screens.palette import Palette

        self.push_screen(Palette(**how))

    def obey(self, line: str) -> None:
        """Run a slash command, on whatever screen: the conversation comes to the front first."""
        self._to_chat()
        self.chat.obey(line)

    def begin_command(self, name: str) -> None:
        """Put a command that needs arguments into the conversation's prompt."""
        self._to_chat()
        self.chat.begin_command(name)

    def _to_chat(self) -> None:
        from llmdoctor.tui.screens.columns_screen import ColumnsScreen

        while (screen := self.screen) is not self.chat:
            if isinstance(screen, ColumnsScreen):
                screen.stop()
            self.pop_screen()

    @property
    def _has_chat(self) -> bool:
        from llmdoctor.tui.screens.chat import ChatScreen

        return any(isinstance(screen, ChatScreen) for screen in self.screen_stack)

    def exit(self, *args: Any, **how: Any) -> None:
        """Leave; a running answer is stopped and kept first."""
        self.stop()
        super().exit(*args, **how)

    def stop(self) -> bool:
        """Stop the answer, in a comparison the answers."""
        from llmdoctor.tui.screens.columns_screen import ColumnsScreen

        if any(screen.stop() for screen in self.screen_stack if isinstance(screen, ColumnsScreen)):
            return True
        if not self._has_chat or self.chat.live is None:
            return False
        self.chat.action_stop()
        return True

    def save(self, session: Session, compared: SavedComparison | None = None, *, anew: bool = False) -> None:
        """Write the session, in the background; with it its comparison, if that is new or the session gets a new id."""
        # kept in a queue: the saving thread must never wait for the screen, which waits for it at the end
        saving = self._saver.submit(self._write, session, compared, anew=anew)
        saving.add_done_callback(lambda saved: self._saved.append((session, saved)))

    def _write(self, session: Session, compared: SavedComparison | None, *, anew: bool) -> Session:
        saved = self.store.save(session)
        if compared is not None and (anew or saved.id != session.id):
            self.store.save_comparison(saved.id, compared)
        return saved

    def _tell(self) -> None:
        """Say what went wrong with saving; a conversation that was forked is from here on the one that is open."""
        while self._saved and self._has_chat:
            session, saved = self._saved.popleft()
            if not (outcome := _outcome(session, saved)):
                continue
            if saved.exception() is not None:
                self.notify(outcome, severity="error", markup=False)
            elif self.chat.session.id == session.id:
                self.chat.session = replace(self.chat.session, id=saved.result().id)
                self.notify(outcome, severity="warning", markup=False, timeout=15)

    # These go through the same thread as saving: they see the latest state of the conversation.

    def load_session(self, session_id: str) -> Session:
        """A saved session to go on with. A running answer is stopped, and saved first: it may be the same session's."""
        self.chat.answering.stop()
        session = self._saver.submit(self.store.load, session_id).result()
        self._tell()  # while the conversation is open that it is about
        return session

    def comparison(self, session_id: str) -> SavedComparison | None:
        """The comparison that is kept with a session."""
        return self._saver.submit(self.store.comparison, session_id).result()

    def read_session(self, session_id: str) -> Future[Session]:
        """A saved session to look at, once it has been read."""
        return self._saver.submit(self.store.read, session_id)

    def saved_sessions(self) -> list[Summary]:
        """All saved sessions."""
        return self._saver.submit(self.store.list).result()

    def rename_session(self, session_id: str, title: str) -> None:
        """Give it another title; the open conversation changes too."""
        self._saver.submit(self.store.rename, session_id, title).result()
        if session_id == self.chat.session.id:
            self.chat.session = replace(self.chat.session, title=title)

    def delete_session(self, session_id: str) -> None:
        """Delete it; if it is the open conversation, a new one replaces it."""
        if session_id == self.chat.session.id:
            self.chat.answering.stop()  # which saves it
        self._saver.submit(self.store.delete, session_id).result()
        if session_id == self.chat.session.id:
            self.chat.new_session()

    def export(self, session: Session, kind: str, path: Path | None, lens: Lens, doctor: str | None) -> None:
        """Write a session (or, as svg, the screen) to a file, by default in the working folder."""
        session = session if session.title or not session.turns else replace(session, title=session.turns[0].prompt)
        path = path or Path(export.file_name(session, kind))
        if kind == "svg":
            self.write_picture(path)
            return
        self.notify(f"wrote {export.write(path, export.render(session, kind, lens, doctor))}", markup=False)


class BrowserApp(DoctorApp):
    """``llmdoctor inspect --tui`` and ``llmdoctor compare --tui``: one screen."""

    def __init__(self, screen: Callable[[], Screen[None]], config: Config | None = None) -> None:
        super().__init__(config)
        self._screen = screen

    def on_mount(self) -> None:
        """Show the screen."""
        self.push_screen(self._screen())


def _outcome(session: Session, saved: Future[Session]) -> str:
    """What there is to say of saving this session; empty where all went well."""
    if (error := saved.exception()) is not None:
        return str(error) if isinstance(error, LLMDoctorError) else f"not saved: {type(error).__name__}: {error}"
    if (own := saved.result().id) == session.id:
        return ""
    return f"Somebody else has gone on with this conversation ({session.id}): yours is kept beside it, as {own}."


@cache
def binding_ids() -> dict[str, Binding]:
    """Every key binding that can be given another key, by its id."""
    from llmdoctor.tui.screens.chat import ChatScreen
    from llmdoctor.tui.screens.columns_screen import ColumnsScreen
    from llmdoctor.tui.screens.sessions import SessionsScreen
    from llmdoctor.tui.widgets.inspector import Alternatives
    from llmdoctor.tui.widgets.slider import Slider
    from llmdoctor.tui.widgets.token_view import TokenView

    owners = (DoctorApp, ChatScreen, TokenView, Alternatives, Slider, SessionsScreen, ColumnsScreen)
    bindings = (binding for owner in owners for binding in owner.BINDINGS)
    return {binding.id: binding for binding in bindings if isinstance(binding, Binding) and binding.id}


def run(app: App[int]) -> int:
    """Run an app on the terminal and return its exit code.

    What other code wrote to the terminal meanwhile is hidden, and printed at the end if the app failed.
    """
    sys.setswitchinterval(_SWITCH)
    take_any_bytes()
    with quiet_terminal() as log:
        result = app.run()
        noise = written(log) if app.return_code else ""
    if noise:
        print(clean(noise), file=sys.stderr)
    for words in getattr(app, "last_words", ()):
        print(f"warning: {one_line(words)}", file=sys.stderr)
    return result if result is not None else app.return_code or 0
