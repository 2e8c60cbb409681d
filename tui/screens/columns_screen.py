"""``/compare``: the patient alone beside several settings or doctors, all answering the same questions."""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, Vertical
from textual.screen import Screen
from textual.widgets import Static

from llmdoctor.sessions import End
from llmdoctor.show.lens import LENSES, Lens, following, lens_limit
from llmdoctor.show.text import clean
from llmdoctor.tui import token_style
from llmdoctor.tui.columns import Column, saved
from llmdoctor.tui.conversation import Said, asked, conversation, ending, pieces, side_facts
from llmdoctor.tui.current_settings import other_seed
from llmdoctor.tui.generation import Ended, Event, SideEnded, Spoken
from llmdoctor.tui.pacing import FRAME, Pacing
from llmdoctor.tui.room import fit_height
from llmdoctor.tui.widgets.hints import Hint, Hints
from llmdoctor.tui.widgets.inspector import Alternatives, Inspector
from llmdoctor.tui.widgets.prompt import Prompt
from llmdoctor.tui.widgets.status import StatusLine
from llmdoctor.tui.widgets.token_view import TokenView

if TYPE_CHECKING:
    from llmdoctor.tui.app import ChatApp

_COLUMN = 38  # cells that a column needs to stand beside another
_LEAST = 6  # rows of a column, else the columns scroll
_LOW, _ROOMY = 30, 45  # rows below which the prompt has no margin, and from which the inspector is higher


class ColumnsScreen(Screen[str | None]):
    """Every column has its own conversation, which goes on after its first ``past`` turns.

    What they answer is kept with the conversation (`ConversationScreen.keep`). Dismissed with a command to run there,
    or None.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Stop the answers; close what is open; leave", id="compare.leave"),
        Binding("f1", "help", "Help", priority=True, show=False),
        Binding("f3", "next_lens", "Colour by the next lens", priority=True, id="compare.lens"),
        Binding("shift+f3,ctrl+l", "next_doctor", "Colour by the next doctor", priority=True, id="compare.doctor"),
        Binding("f6", "again", "The last question again with another seed", priority=True, id="compare.again"),
        Binding("ctrl+t", "other", "To the next column", priority=True, id="compare.other"),
        Binding("enter", "alternatives", "Alternatives", show=False),
    ]
    app: "ChatApp"  # type: ignore[assignment]

    def __init__(
        self, columns: Sequence[Column], past: int, question: str, seed: int, lens: Lens, doctor: str | None
    ) -> None:
        super().__init__()
        self.columns, self.question, self.seed = list(columns), question, seed
        self._past = past
        self.lens, self.doctor = lens, doctor
        self._events: deque[Event] = deque()
        self._job = 0
        self._pacing = Pacing()

    def compose(self) -> ComposeResult:
        """Columns, inspector, legend, status, prompt, keys."""
        yield Static(Text(f"comparing · {self.app.start.header}", no_wrap=True, overflow="ellipsis"), id="header")
        with Vertical(id="panes"):
            with Grid(id="columns"):
                for number, column in enumerate(self.columns):
                    with Vertical(id=f"column-{number}", classes="pane") as pane:
                        pane.border_title = Text(clean(column.title))  # type: ignore[assignment]
                        yield TokenView(
                            id=f"column-{number}-view", score=self._score, changed=lambda said: said.changed
                        )
            inspector = Inspector(can_force=False, id="inspector")
            inspector.display = False
            yield inspector
        yield Static(id="legend")
        yield StatusLine(id="status")
        yield Prompt("Ask all of them; Esc leaves the comparison", id="prompt")
        yield Hints()

    def on_mount(self) -> None:
        """Show what was said before, and ask the last question."""
        for number, column in enumerate(self.columns):
            self.view(number).set_pieces(conversation(column.turns, column.which, None, self.app.start.welcome))
        self._inspected_view = self.view(0)
        self._recolour()
        self._frames = self.set_interval(FRAME, self.drain)
        self.set_focus(self.query_one(Prompt))
        if self.question and len(self.columns[0].turns) == self._past:
            self.ask(self.question)

    def view(self, number: int) -> TokenView:
        """A column's text."""
        return self.query_one(f"#column-{number}-view", TokenView)

    @property
    def live(self) -> bool:
        """Whether an answer is being made."""
        return any(column.live is not None for column in self.columns)

    # Asking

    def ask(self, question: str) -> None:
        """All columns answer, with one seed."""
        self.question = question
        parts = [column.ask(number, question, self.seed) for number, column in enumerate(self.columns)]
        self._job = self.app.worker.speak_columns(parts, self.seed, self._events)
        for number, column in enumerate(self.columns):
            self.view(number).append(asked(column.turns, len(column.turns) - 1, self.app.start.welcome))
            self.view(number).to_end()
        self._frames.resume()
        self.show_status()

    @on(Prompt.Submitted)
    def _submitted(self, event: Prompt.Submitted) -> None:
        if event.text.startswith("/"):
            self.stop()
            self.dismiss(event.text)
        elif self.live:
            self.notify("Still answering: Esc stops.", severity="warning")
            self.query_one(Prompt).put(event.text)
        else:
            self.ask(event.text)

    @on(Prompt.Recalled)
    def _recalled(self) -> None:
        self.query_one(Prompt).put(self.question)

    def action_again(self) -> None:
        """The last question again, with another seed."""
        self.stop()
        if not self.question:
            self.notify("There is no answer to make again yet.")
            return
        self.seed = other_seed(self.seed)
        for number, column in enumerate(self.columns):
            column.turns = column.turns[:-1]
            self.view(number).set_pieces(conversation(column.turns, column.which, None, self.app.start.welcome))
        self._inspect(None, None)
        self.ask(self.question)

    def drain(self) -> None:
        """Draw what the worker has said since the last frame."""
        if not self._pacing.due():
            return
        starts: dict[int, int] = {}
        while self._events:
            event = self._events.popleft()
            match event:
                case Spoken(job, _, token, seconds, temperature, number) if job == self._job:
                    if (live := self.columns[number].live) is not None:
                        starts.setdefault(number, len(live.tokens))
                        live.add(token, seconds, temperature)
                case SideEnded(job, _, number) if job == self._job:
                    if (live := self.columns[number].live) is not None:
                        live.running = False
                case Ended(job, reason, error) if job == self._job:
                    self._grow(starts)
                    self._settle(reason, error)
        self._grow(starts)

    def _grow(self, starts: dict[int, int]) -> None:
        for number, start in starts.items():
            column = self.columns[number]
            turn = len(column.turns) - 1
            self.view(number).append(pieces(turn, column.side(turn), start))
        if starts:
            self.show_status()
        starts.clear()

    def _settle(self, reason: End, error: str = "") -> None:
        for number, column in enumerate(self.columns):
            if (reply := column.settle(reason)) is not None:
                self.view(number).append(ending(len(column.turns) - 1, reply, error))
        if error:
            self.notify(error, severity="error", markup=False)
        self._frames.pause()
        self.app.chat.keep(saved(self.columns, self._past, self.seed))
        self.show_status()

    def stop(self) -> bool:
        """Stop the answers, whose tokens stay; False if there are none."""
        if not self.live:
            return False
        self.app.worker.cancel()
        self._settle("interrupted")
        return True

    # Keys

    def action_leave(self) -> None:
        """Stop the answers; without any, leave the table, the inspector, a text, and at last the comparison."""
        if self.stop():
            return
        if isinstance(self.focused, Alternatives):
            self._inspected_view.focus()
        elif self.query_one(Inspector).display:
            self._inspect(None, None)
            self.set_focus(self.query_one(Prompt))
        elif self.focused is not self.query_one(Prompt):
            self.set_focus(self.query_one(Prompt))
        else:
            self.dismiss(None)

    def action_help(self) -> None:
        """Keys, commands, marks."""
        from llmdoctor.tui.screens.help import HelpScreen

        self.app.push_screen(HelpScreen())

    def action_other(self) -> None:
        """To the first change in the next column; from elsewhere to the first guided one."""
        views = [self.view(number) for number in range(len(self.columns))]
        at = next((i for i, view in enumerate(views) if view.has_focus), 0)
        view, last = views[(at + 1) % len(views)], len(self.columns[0].turns) - 1
        view.focus()
        if not view.select_first(lambda said: said.turn == last and said.changed):
            view.select_first(lambda said: said.turn == last)

    def action_alternatives(self) -> None:
        """From a text to the table."""
        if isinstance(self.focused, TokenView) and self.query_one(Inspector).display:
            self.query_one(Inspector).focus_table()

    def action_token(self, direction: int) -> None:
        """To the token before or after, from within the table."""
        self._inspected_view.action_step(direction)

    def action_change(self, direction: int) -> None:
        """To the changed token before or after, from within the table."""
        self._inspected_view.action_change(direction)

    def action_next_lens(self) -> None:
        """The next kind of colour."""
        self.lens = following(LENSES, self.lens)
        self._recolour()

    def action_next_doctor(self) -> None:
        """The next doctor's opinion."""
        if names := list(self.columns[0].guidance.betas):
            self.doctor = following(names, self.doctor)
            self._recolour()

    # Colours and the inspector

    def _score(self, said: Said) -> float | None:
        return token_style.score(said.token, self.lens, self.doctor) if said.token.values else None

    def _recolour(self) -> None:
        for number in range(len(self.columns)):
            self.view(number).scale = lens_limit(self.lens)
            self.view(number).recolour(self._score)
        self.show_status()

    @on(TokenView.Selected)
    def _selected(self, event: TokenView.Selected) -> None:
        if event.view.selected is not None:
            self._inspect(event.view, event.view.selected)

    def _inspect(self, view: TokenView | None, said: Said | None) -> None:
        """Show the token under this cursor, the only one; None closes the inspector."""
        inspector = self.query_one(Inspector)
        inspector.display = said is not None
        for number, column in enumerate(self.columns):
            if self.view(number) is not view and self.view(number).cursor is not None:
                self.view(number).select(None)
            elif said is not None and self.view(number) is view:
                side = column.side(said.turn)
                before = side.tokens[said.position - 1] if said.position else None
                assistant = self.app.chat.assistant
                names = assistant.token_names if assistant is not None else {}
                inspector.show(said.token, before, len(side.tokens), names)
                inspector.border_title = Text(clean(column.title))  # type: ignore[assignment]
        self._inspected_view = view or self.view(0)
        self.fit()

    # Layout

    def on_resize(self) -> None:
        """As many columns beside each other as there is room for."""
        height = self.app.size.height
        self.set_class(height < _LOW, "low")
        self.set_class(height >= _ROOMY, "roomy")
        fit_height(self, height, stacked=1)
        self.fit()
        self.show_status()

    def fit(self) -> None:
        """Rows of equal length, as few as the width allows; lower ones than a few lines scroll."""
        grid, count = self.query_one("#columns", Grid), len(self.columns)
        most = max(1, min(count, self.app.size.width // _COLUMN))
        rows = -(-count // most)
        across = grid.styles.grid_size_columns = -(-count // rows)
        for number in range(count):  # the last one takes the room of those that its row lacks
            spare = across * rows - count if number == count - 1 else 0
            self.query_one(f"#column-{number}").styles.column_span = 1 + spare
        grid.styles.grid_size_rows = rows
        grid.styles.grid_rows = "1fr" if grid.size.height >= rows * _LEAST else str(_LEAST)

    def hints(self) -> Sequence[Hint]:
        """The keys that do something now."""
        key = self.app.key
        leave, other = key("compare.leave"), key("compare.other")
        common = [("F1", "help", "screen.help"), (key("compare.lens"), f"colour: {self.lens}", "screen.next_lens")]
        if isinstance(self.focused, TokenView):
            return [("←→↑↓", "token", ""), (". ,", "changes", ""), (other, "next column", "screen.other"),
                    ("Enter", "alternatives", "screen.alternatives"),
                    (leave, "stop" if self.live else "back", "screen.leave"), *common]  # fmt: skip
        if isinstance(self.focused, Alternatives):
            return [("←→", "token", ""), (". ,", "changes", ""), (leave, "back", "screen.leave"), *common]
        return [(leave, "stop" if self.live else "leave the comparison", "screen.leave"), ("Enter", "ask all", ""),
                (other, "tokens", "screen.other"), *common,
                (key("compare.again"), "new seed", "screen.again")]  # fmt: skip

    def show_status(self) -> None:
        """Facts below the texts, status, legend, keys."""
        for number, column in enumerate(self.columns):
            facts = side_facts(column.side(len(column.turns) - 1), column.which) if column.turns else ""
            self.query_one(f"#column-{number}").border_subtitle = facts
        loading = self.live and self.app.chat.assistant is None
        doing = self.app.chat.answering.doing if loading else "answering" if self.live else ""
        said = [(doing, "bold"), (f"seed {self.seed}", ""), ("kept with the conversation; Esc leads back to it", "")]
        parts = [Text(part, style) for part, style in said if part]
        self.query_one(StatusLine).show(Text(" · ", no_wrap=True, overflow="ellipsis").join(parts))
        narrow, dark = self.app.size.width < 72, self.app.current_theme.dark
        legend = token_style.lens_legend(self.lens, self.doctor, dark=dark, narrow=narrow)
        self.query_one("#legend", Static).update(legend, layout=False)
        self.query_one(Hints).show(self.hints())
