"""The conversation: both sides beside each other, sliders, inspector, status, prompt."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Footer, Static

from llmdoctor.errors import LLMDoctorError
from llmdoctor.records import Speaker
from llmdoctor.sessions import Reply, Session
from llmdoctor.settings import Guidance, Sampling
from llmdoctor.show.formats import speaking_text
from llmdoctor.show.lens import Lens
from llmdoctor.tui import commands
from llmdoctor.tui.answering import Answering
from llmdoctor.tui.conversation import SIDES, Live
from llmdoctor.tui.current_settings import CurrentSettings
from llmdoctor.tui.debounce import Debounce
from llmdoctor.tui.generation import Assistant
from llmdoctor.tui.history import History, Turns
from llmdoctor.tui.pacing import FRAME, Pacing
from llmdoctor.tui.widgets.inspector import Alternatives, Inspector
from llmdoctor.tui.widgets.panes import NARROW, Panes
from llmdoctor.tui.widgets.prompt import Prompt
from llmdoctor.tui.widgets.slider import Slider
from llmdoctor.tui.widgets.sliders import Sliders
from llmdoctor.tui.widgets.token_view import TokenView

if TYPE_CHECKING:
    from llmdoctor.tui.app import ChatApp

_STATUS_EVERY = 0.4  # seconds between two updates of the status line while tokens come
_LOW = 30  # rows below which the curve is lower and the prompt has no margin


class ChatScreen(Screen[None]):
    """Two panes stream one conversation: the patient alone and the guided patient.

    The screen joins its parts: `History` and `Answering` hold the conversation, `CurrentSettings` what the next token
    is made with, `Panes` and `Sliders` show both. It is the listener of the running answer.
    """

    COMMANDS: ClassVar[set[Any]] = {commands.Palette}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "stop", "Stop", id="chat.stop"),
        Binding("f1", "help", "Help", priority=True, id="chat.help"),
        Binding("f2", "inspect", "Inspect", priority=True, id="chat.inspect"),
        Binding("f3", "next_lens", "Lens", priority=True, id="chat.lens"),
        Binding("shift+f3,ctrl+l", "next_doctor", "Lens doctor", show=False, priority=True, id="chat.doctor"),
        Binding("f4", "sliders", "Sliders", priority=True, id="chat.sliders"),
        Binding("f5", "rerun", "Re-run", priority=True, id="chat.rerun"),
        Binding("f6", "regenerate", "New seed", priority=True, id="chat.regenerate"),
        Binding("f7", "edit", "Edit", priority=True, id="chat.edit"),
        Binding("f8", "copy", "Copy", priority=True, id="chat.copy"),
        Binding("f9", "sessions", "Sessions", priority=True, id="chat.sessions"),
        Binding("ctrl+t", "other_pane", "Other pane", show=False, priority=True, id="chat.other_pane"),
        Binding("alt+left,ctrl+b", "back", "Back", show=False, priority=True, id="chat.back"),
        Binding("alt+right,ctrl+n", "forward", "Forward", show=False, priority=True, id="chat.forward"),
        Binding("enter", "alternatives", "Alternatives", show=False, id="chat.alternatives"),
    ]
    app: "ChatApp"  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        start, worker = self.app.start, self.app.worker
        self.session = start.session or Session.new(start.profile)
        self.history = History(self.session.turns)
        self.settings = CurrentSettings(start, worker)
        self.answering = Answering(worker, self.history, self.settings, self)
        self.rerun = Debounce(self, self._rerun)
        self.editing = False
        self.auto = False
        betas = start.guidance.betas
        speaking = next((name for name, beta in betas.items() if beta > 0), next(iter(betas), None))
        self.panes = Panes(self.answering, speaking, id="panes")
        self.sliders = Sliders(self.settings, id="sliders")
        self.prompt = Prompt("Ask something; /help lists the commands, Ctrl+P too", id="prompt")
        self._pacing = Pacing()
        self._status_at = 0.0

    def compose(self) -> ComposeResult:
        """Panes, legend, sliders, status, prompt."""
        yield self.panes
        yield Static(id="legend")
        yield self.sliders
        yield Static(id="status")
        yield self.prompt
        yield Footer(compact=True)

    def on_mount(self) -> None:
        """Begin to listen."""
        # The app reads its configuration after it has made this screen.
        self.panes.lens = self.app.config.lens or "value"
        self._frames = self.set_interval(FRAME, self.drain)
        self._show_all()
        self.prompt.focus()

    def on_resize(self) -> None:
        """Panes beside each other, stacked, or one at a time."""
        width, height = self.app.size
        self.set_class(width < NARROW, "narrow")
        self.set_class(height < _LOW, "low")
        self.panes.fit()
        self.sliders.fit(width, narrow=width < NARROW)

    # What the parts hold

    @property
    def turns(self) -> Turns:
        """The conversation."""
        return self.history.turns

    @property
    def live(self) -> Live | None:
        """The running answer."""
        return self.answering.live

    @property
    def assistant(self) -> Assistant | None:
        """The models, once they are loaded."""
        return self.settings.assistant

    @property
    def guidance(self) -> Guidance:
        """What guides the next token."""
        return self.settings.guidance

    @property
    def sampling(self) -> Sampling:
        """How the next token is drawn."""
        return self.settings.sampling

    @property
    def lens(self) -> Lens:
        """What colours the tokens."""
        return self.panes.lens

    @property
    def doctor(self) -> str | None:
        """Whose opinion colours the tokens."""
        return self.panes.doctor

    def view(self, which: Speaker) -> TokenView:
        """One side's text."""
        return self.panes.view(which)

    def describe(self) -> str:
        """The settings in use, in one line."""
        return self.settings.describe()

    # The running answer: once per frame the worker's events are handled, and `Answering` calls back

    def drain(self) -> None:
        """Handle and draw the worker's events since the last frame."""
        if not self._pacing.due():
            return
        self.answering.take()
        if time.monotonic() - self._status_at >= _STATUS_EVERY:
            self._show_status()
        if self.answering.idle:
            self._frames.pause()

    def loaded(self) -> None:
        """The models are loaded."""
        self._show_status()

    def failed(self, error: LLMDoctorError) -> None:
        """The models cannot be loaded."""
        self.app.fail(error)

    def began(self, sides: Sequence[Speaker], *, added: bool) -> None:
        """These sides answer the last turn."""
        if added:
            self.panes.ask(self.turns[-1].prompt)
            self._show_status()
        else:
            self._show_all(sides)
        self._frames.resume()

    def grew(self, live: Live, starts: Mapping[Speaker, int]) -> None:
        """There are new tokens."""
        self.panes.grow(live, starts)

    def settled(self, turn: int, replies: Mapping[Speaker, Reply], error: str) -> None:
        """The answer is over."""
        self.panes.end(turn, replies, error)
        if error:
            self.notify(error, severity="error", markup=False)
        self.save()
        self._show_status()

    # Asking, and asking again

    @on(Prompt.Submitted)
    def _submitted(self, event: Prompt.Submitted) -> None:
        if event.text.startswith("/"):
            self.obey(event.text)
        else:
            self.send(event.text)

    def send(self, text: str) -> None:
        """Ask; while editing, instead of the last question."""
        if self.live:
            self.notify("Still answering: Esc stops.", severity="warning")
            self.prompt.put(text if not self.prompt.text else f"{text}\n{self.prompt.text}")
            return
        instead, self.editing = self.editing, False
        self.answering.ask(text, instead=instead)

    def action_rerun(self) -> None:
        """The last answer again, same seed; while a slider moves, once it rests."""
        if self.turns:
            self.rerun.ask()
        else:
            self.notify("There is no answer to re-run yet.")

    def _rerun(self) -> None:
        if self.turns:  # a new conversation may have been opened while this waited
            self.answering.again()

    def action_regenerate(self) -> None:
        """The last answer again with another seed."""
        if self.turns:
            self.answering.other()
        else:
            self.notify("There is no answer to make again yet.")

    @on(Inspector.Forced)
    def _forced(self, event: Inspector.Forced) -> None:
        selected = self.panes.selected
        if selected is not None:
            which, said = selected
            if self.answering.force(which, said.turn, said.position, event.alternative.id):
                self.panes.select_when_there(which, said.position)
            self.view(which).focus()

    @on(Prompt.Recalled)
    def _recalled(self) -> None:
        if self.turns:
            self.action_edit()

    def action_edit(self) -> None:
        """Put the last message into the prompt; sending it replaces it."""
        if not self.turns:
            self.notify("There is no message to edit yet.")
            return
        self.answering.stop()
        self.editing = True
        self.prompt.put(self.turns[-1].prompt)
        self._show_status()

    def action_back(self) -> None:
        """To the conversation before the last forced token, re-run or message."""
        self._step(-1)

    def action_forward(self) -> None:
        """Undo ``back``."""
        self._step(1)

    def _step(self, direction: Literal[-1, 1]) -> None:
        self.answering.stop()
        if not self.history.step(direction):
            self.notify("There is nothing to step to.")
            return
        self.answering.doing = ""
        self.save()
        self._show_all()

    # Keys

    def action_stop(self) -> None:
        """Escape: stop an answer; without one, leave the edited message, the table, or the inspector."""
        if self.live:
            self.answering.stop()
        elif self.editing:
            self.editing = False
            self.prompt.text = ""
            self._show_status()
        elif isinstance(self.focused, Alternatives):
            self.view(self.panes.inspected or "guided").focus()
        elif self.panes.inspecting:
            self.action_inspect()
        else:
            self.prompt.focus()

    def action_inspect(self) -> None:
        """Open or close the inspector."""
        if self.panes.inspecting:
            self.panes.close_inspector()
            self.prompt.focus()
        else:
            self.panes.inspect()

    def action_alternatives(self) -> None:
        """From the text to the table."""
        self.panes.to_table()

    def action_token(self, direction: int) -> None:
        """To the token before or after, from within the table."""
        self.panes.step(direction)

    def action_other_pane(self) -> None:
        """Where there is room for one pane only: the other one."""
        self.panes.other_pane()

    def action_sliders(self) -> None:
        """To the first slider; from a slider back to the prompt."""
        if isinstance(self.focused, Slider):
            self.prompt.focus()
        else:
            self.query(Slider).first().focus()

    def action_next_lens(self) -> None:
        """The next kind of colour."""
        self.obey("/lens")

    def action_next_doctor(self) -> None:
        """The next doctor's opinion."""
        self.obey("/doctor")

    def action_copy(self) -> None:
        """The answer that is looked at, to the clipboard."""
        which = self.panes.shown
        text = self.answering.last_text(which)
        if not text:
            self.notify("There is no answer to copy yet.")
            return
        self.app.copy_to_clipboard(text)
        self.notify(f"Copied the {'guided' if which == 'guided' else 'patient’s own'} answer.")

    def action_help(self) -> None:
        """Keys, commands, marks."""
        from llmdoctor.tui.screens.help import HelpScreen

        self.app.push_screen(HelpScreen())

    def action_sessions(self) -> None:
        """The saved conversations."""
        from llmdoctor.tui.screens.sessions import SessionsScreen

        def picked(session_id: str | None) -> None:
            if session_id:
                self.obey(f"/resume {session_id}")

        self.app.push_screen(SessionsScreen(self.session.id), picked)

    # Commands

    def obey(self, line: str) -> None:
        """Run a slash command; what is wrong with it is one line."""
        try:
            commands.run(self, line)
        except LLMDoctorError as error:
            self.notify(str(error), severity="error", markup=False)

    def begin_command(self, name: str) -> None:
        """Put a command that needs arguments into the prompt."""
        self.prompt.put(f"/{name} ")

    # Saved conversations

    def save(self) -> None:
        """Write the conversation, in a thread of its own."""
        self.session = replace(self.session, turns=self.turns)
        if self.turns:
            self.app.save(self.session)

    def new_session(self) -> None:
        """An empty conversation."""
        self.open(Session.new(self.app.start.profile))

    def open(self, session: Session) -> None:
        """Go on with this conversation, with the settings of its last turn."""
        self.answering.stop()
        self.session = session
        self.history.open(session.turns)
        self.editing = False
        for difference in self.settings.resume(session, self.app.start.profile):
            self.notify(difference, severity="warning", markup=False)
        self.sliders.show()
        self._show_all()

    # Showing

    @on(Sliders.Moved)
    def _slid(self) -> None:
        self.show_guidance()
        self.rerun.moved()
        if self.auto and self.turns:
            self.rerun.ask()

    def show_settings(self) -> None:
        """Sliders and headings after a change."""
        self.sliders.show()
        self.show_guidance()

    def show_guidance(self) -> None:
        """Who guides, in the heading."""
        self.panes.guided_by = speaking_text(self.guidance.betas)
        self.panes.show_headings()

    def recolour(self, lens: Lens, doctor: str | None) -> None:
        """Colour by this lens and this doctor's opinion."""
        self.panes.recolour(lens, doctor)
        self._show_status()

    def _show_all(self, sides: Sequence[Speaker] = SIDES) -> None:
        self.panes.show(sides)
        self.show_guidance()
        self._show_status()

    def _show_status(self) -> None:
        self._status_at = time.monotonic()
        self.panes.show_facts()
        parts = [self.app.start.models]
        if self.turns:
            parts.append(f"seed {self.turns[-1].seed}")
        acceptance = getattr(self.assistant, "acceptance", None)
        if isinstance(acceptance, float):
            parts.append(f"acceptance {acceptance:.0%}")
        if self.session.title:
            parts.append(self.session.title)
        doing = "editing: Enter sends it again, Esc leaves it" if self.editing else self.answering.doing
        text = Text(no_wrap=True, overflow="ellipsis")
        if doing:
            text.append(f"{doing} · ", "bold")
        # Both lines keep their height, so the rest of the screen need not be laid out again.
        self.query_one("#status", Static).update(text.append(" · ".join(parts)), layout=False)
        self.query_one("#legend", Static).update(self.panes.legend(), layout=False)
