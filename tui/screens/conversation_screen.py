"""The screen of a conversation: its parts, the running answer, the status line, saving."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.screen import Screen
from textual.widgets import Static

from llmdoctor.errors import LLMDoctorError
from llmdoctor.records import Speaker
from llmdoctor.sessions import Reply, SavedComparison, Session
from llmdoctor.settings import Guidance, Sampling
from llmdoctor.show.lens import DEFAULT_LENS, Lens
from llmdoctor.show.text import one_line
from llmdoctor.tui.answering import Answering
from llmdoctor.tui.conversation import SIDES, Live
from llmdoctor.tui.current_settings import CurrentSettings
from llmdoctor.tui.generation import Assistant
from llmdoctor.tui.history import History, Turns
from llmdoctor.tui.pacing import FRAME, Pacing
from llmdoctor.tui.room import fit_height
from llmdoctor.tui.widgets.hints import Hint, Hints
from llmdoctor.tui.widgets.panes import Panes
from llmdoctor.tui.widgets.prompt import Prompt
from llmdoctor.tui.widgets.sliders import Sliders
from llmdoctor.tui.widgets.status import StatusLine
from llmdoctor.tui.widgets.token_view import TokenView

if TYPE_CHECKING:
    from llmdoctor.tui.app import ChatApp

_STATUS_EVERY = 0.4  # seconds between two updates of the status line while tokens come
# Rows below which the curve is lower and the prompt has no margin; rows from which the curve is higher; columns from
# which the inspector opens by itself.
_LOW, _ROOMY, _WIDE = 30, 45, 180
_INSPECTOR = 8  # rows that an inspector below the texts needs


class ConversationScreen(Screen[None]):
    """Two panes stream one conversation: the patient alone and the guided patient. What keys do is `ChatScreen`'s.

    The screen joins its parts: `History` and `Answering` hold the conversation, `CurrentSettings` what the next token
    is made with, `Panes` and `Sliders` show both. It is the listener of the running answer.
    """

    app: "ChatApp"  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        start, worker = self.app.start, self.app.worker
        self.session = start.session or Session.new(start.profile)
        self.history = History(self.session.turns)
        self.settings = CurrentSettings(start, worker)
        self.answering = Answering(worker, self.history, self.settings, self)
        self.compared: SavedComparison | None = None  # the last comparison of this conversation
        self.editing = False  # whether the next message replaces the last one
        self.auto = False  # whether a slider that rests re-runs the answer
        self.peeking = True  # whether the inspector opens by itself where there is room, until somebody closes it
        betas = start.guidance.betas
        speaking = next((name for name, beta in betas.items() if beta > 0), next(iter(betas), None))
        self.panes = Panes(self.answering, speaking, id="panes")
        self.sliders = Sliders(self.settings, id="sliders")
        self.prompt = Prompt("Ask something; /help lists the commands", id="prompt")
        self._pacing = Pacing()
        self._status_at = 0.0

    def compose(self) -> ComposeResult:
        """Models, panes, legend, sliders, status, prompt, keys."""
        yield Static(Text(self.app.start.header, no_wrap=True, overflow="ellipsis"), id="header")
        yield self.panes
        yield Static(id="legend")
        yield self.sliders
        yield StatusLine(id="status")
        yield self.prompt
        yield Hints()

    def on_mount(self) -> None:
        """Begin to listen."""
        # The app reads its configuration after it has made this screen.
        self.panes.recolour(self.app.config.lens or DEFAULT_LENS, self.panes.doctor)
        self._frames = self.set_interval(FRAME, self.drain)
        self._read_comparison()
        self.show_all()
        self.prompt.focus()

    def on_resize(self) -> None:
        """Panes beside each other or stacked; sliders in as many rows as they need."""
        width, height = self.app.size
        self.set_class(height < _LOW, "low")
        self.set_class(height >= _ROOMY, "roomy")
        self.panes.fit()
        self.sliders.fit(width)
        self.fit_height()

    @on(Panes.Fitted)
    def fit_height(self) -> None:
        """Leave out what has no room."""
        height = self.app.size.height
        more = 1 + self.sliders.rows + (_INSPECTOR if self.panes.has_class("below") else 0)
        fit_height(self, height, stacked=2 if self.panes.has_class("stacked") else 1, more=more)

    def hints(self) -> Sequence[Hint]:
        """The keys that do something now, the most important ones first."""
        return ()

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
            self.show_status()
        if self.answering.idle:
            self._frames.pause()

    def loaded(self) -> None:
        """The models are loaded."""
        self.show_status()

    def failed(self, error: LLMDoctorError) -> None:
        """The models cannot be loaded."""
        self.app.fail(error)

    def began(self, sides: Sequence[Speaker], *, added: bool) -> None:
        """These sides answer the last turn."""
        if added:
            self.panes.ask()
            self.show_status()
        else:
            self.show_all(sides)
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
        self.show_status()
        if self.peeking and self.focused is self.prompt and self._roomy:
            self.panes.peek()
            self.prompt.focus()

    @property
    def _roomy(self) -> bool:
        width, height = self.app.size
        return width >= _WIDE and height >= _ROOMY

    # Saved conversations

    def save(self) -> None:
        """Write the conversation, in a thread of its own."""
        self.session = replace(self.session, turns=self.turns)
        if self.turns or self.compared:
            self.app.save(self.session, self.compared)

    def keep(self, compared: SavedComparison) -> None:
        """Write a comparison with the conversation, which may have no turn yet."""
        self.compared = compared
        title = self.session.title or " ".join(compared.columns[0].turns[0].prompt.split())[:60]
        self.session = replace(self.session, turns=self.turns, title=title)
        self.app.save(self.session, compared, anew=True)

    def _read_comparison(self) -> None:
        """The one that is kept with the conversation; a damaged one is told, and left out."""
        try:
            self.compared = self.app.comparison(self.session.id)
        except LLMDoctorError as error:
            self.compared = None
            self.notify(str(error), severity="warning", markup=False)

    def new_session(self) -> None:
        """An empty conversation."""
        self.open(Session.new(self.app.start.profile))

    def open(self, session: Session) -> None:
        """Go on with this conversation, with the settings of its last turn."""
        self.answering.stop()
        self.session = session
        self.history.open(session.turns)
        self.panes.close_inspector()
        self.editing = False
        if differences := self.settings.resume(session, self.app.start.profile):
            self.notify(" ".join(differences), severity="warning", markup=False)
        self._read_comparison()
        self.sliders.show()
        self.show_all()

    # Showing

    def show_settings(self) -> None:
        """Sliders and headings after a change."""
        self.sliders.show()
        self.show_guidance()

    def show_guidance(self) -> None:
        """Whether the answer that is shown was made with the settings in use."""
        self.panes.show_headings()
        self.show_status()

    def recolour(self, lens: Lens, doctor: str | None) -> None:
        """Colour by this lens and this doctor's opinion."""
        self.panes.recolour(lens, doctor)
        self.show_status()

    @property
    def stale(self) -> bool:
        """Whether the last answer was made with other settings than those in use."""
        if not self.turns or self.live is not None:
            return False
        turn = self.turns[-1]
        tokens = turn.guided.tokens
        spoken = {(token.alpha, tuple(token.betas.items())) for token in tokens}
        now = (self.guidance.alpha, tuple(self.guidance.betas.items()))
        return turn.sampling != self.sampling or turn.guidance != self.guidance or not spoken <= {now}

    def show_all(self, sides: Sequence[Speaker] = SIDES) -> None:
        """Everything again, the texts of ``sides``."""
        self.panes.show(sides)
        self.show_guidance()
        self.show_status()

    def show_status(self) -> None:
        """Status line, legend, and the facts below the texts."""
        self._status_at = time.monotonic()
        self.panes.show_facts()
        parts = []
        if self.turns:
            parts.append(f"seed {self.turns[-1].seed}")
        acceptance = getattr(self.assistant, "acceptance", None)
        if isinstance(acceptance, float):
            parts.append(f"acceptance {acceptance:.0%}")
        if self.auto:
            parts.append("auto: sliders apply themselves")
        if self.compared is not None:
            parts.append("/compare: the comparison again")
        if self.session.title:
            parts.append(one_line(self.session.title))
        hint = "F5 applies the new settings to this answer" if self.stale else ""
        if hint and not self.auto:
            hint += "; /auto does so by itself"
        doing = "editing: Enter sends it again, Esc leaves it" if self.editing else self.answering.doing
        said = [(part, "bold") for part in (doing, hint) if part] + [(part, "") for part in parts]
        text = Text(" · ", no_wrap=True, overflow="ellipsis").join(Text(part, style) for part, style in said)
        self.query_one(StatusLine).show(text)
        self.query_one(Hints).show(self.hints())
        self.query_one("#legend", Static).update(self.panes.legend(), layout=False)
