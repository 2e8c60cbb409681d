"""The conversation: both sides beside each other, sliders, inspector, status, prompt."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid, Horizontal, Vertical
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, Static

from llmdoctor.cli.render import Lens, betas_text, settings_text
from llmdoctor.errors import LLMDoctorError, UsageError
from llmdoctor.records import Speaker
from llmdoctor.sessions import End, Session, Turn, messages
from llmdoctor.set_command import parse_settings
from llmdoctor.settings import Guidance
from llmdoctor.tui import commands, lens
from llmdoctor.tui.conversation import SIDES, Live, LiveReply, Said, conversation, ending, pieces
from llmdoctor.tui.generation import Assistant, Ended, Event, Failed, Loaded, Part, Progress, SideEnded, Spoken
from llmdoctor.tui.widgets.curve import Curve
from llmdoctor.tui.widgets.inspector import Alternatives, Inspector
from llmdoctor.tui.widgets.prompt import Prompt
from llmdoctor.tui.widgets.slider import Slider
from llmdoctor.tui.widgets.token_view import Piece, TokenView

if TYPE_CHECKING:
    from llmdoctor.tui.app import ChatApp

_FRAME = 1 / 30
_SHARE = 6  # seconds between frames for every second of the processor that drawing took
_LONGEST_FRAME = 0.2
_STATUS_EVERY = 0.4
_DEBOUNCE = 0.3
_GREATEST_SEED = 99_999
_NARROW, _TALL, _WIDE = 100, 36, 150


class ChatScreen(Screen[None]):
    """Two panes stream one conversation: the patient alone and the guided patient."""

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
        start = self.app.start
        self.guidance, self.sampling, self.seed = start.guidance, start.sampling, start.seed
        self.session = start.session or Session.new(start.profile)
        self.turns = self.session.turns
        self.past: list[tuple[Turn, ...]] = []
        self.future: list[tuple[Turn, ...]] = []
        self.live: Live | None = None
        self.assistant: Assistant | None = None
        self.lens: Lens = "value"
        self.doctor = next((name for name, beta in self.guidance.betas.items() if beta > 0), None)
        self.doctor = self.doctor or next(iter(self.guidance.betas), None)
        self.editing = False
        self.auto = False
        self._doing = "loading the models ..."
        self._moved_at = 0.0
        self._rerun_timer: Timer | None = None
        self._status_at = 0.0
        self._facts: dict[Speaker, str] = {}
        self._drained_at = self._drained_busy = self._owed = 0.0
        self._curve_turn = -1
        self._tab: Speaker = "guided"

    def compose(self) -> ComposeResult:
        """Panes, legend, sliders, status, prompt."""
        with Horizontal(id="panes"):
            with Vertical(id="patient", classes="pane"):
                yield TokenView(id="patient-view")
            with Vertical(id="guided", classes="pane"):
                yield TokenView(id="guided-view", score=self._score)
                yield Curve(id="curve")
            yield Inspector(id="inspector")
        yield Static(id="legend")
        with Grid(id="sliders"):
            yield Slider("alpha", self.guidance.alpha, high=2.0, id="slider-alpha")
            for number, (name, beta) in enumerate(self.guidance.betas.items()):
                yield Slider(name, beta, high=3.0, id=f"slider-beta-{number}")
            yield Slider("temperature", self.sampling.temperature, high=2.0, id="slider-temperature")
        yield Static(id="status")
        yield Prompt("Ask something; /help lists the commands, Ctrl+P too", id="prompt")
        yield Footer(compact=True)

    def on_mount(self) -> None:
        """Begin to listen."""
        if self.app.config.lens in get_args(Lens):
            self.lens = self.app.config.lens  # type: ignore[assignment]
        self.query_one(Inspector).display = False
        self._frames = self.set_interval(_FRAME, self.drain)
        self._show_all()
        self.query_one(Prompt).focus()

    # Events of the worker

    def drain(self) -> None:
        """Take everything that the worker has said since the last frame.

        Where drawing takes long (a slow or busy machine), frames are left out, so that the generator, which needs this
        interpreter too, keeps most of the time.
        """
        now, busy = time.monotonic(), time.thread_time()
        cost, self._drained_busy = busy - self._drained_busy, busy
        self._owed = min(_LONGEST_FRAME, self._owed + cost * _SHARE)
        if now - self._drained_at < self._owed:
            return
        self._owed, self._drained_at = 0.0, now
        self._take()

    def _take(self) -> None:
        grown: dict[Speaker, int] = {}
        for event in self.app.worker.drain():
            self._hear(event, grown)
        self._show_grown(grown)
        now = time.monotonic()
        if now - self._status_at >= _STATUS_EVERY:
            self._show_status()
        if self.live is None and self.assistant is not None:
            self._frames.pause()

    def _hear(self, event: Event, grown: dict[Speaker, int]) -> None:
        live = self.live
        match event:
            case Progress(text):
                self._doing = text
            case Loaded(assistant):
                self.assistant = assistant
                self._doing = "answering" if live else ""
                self._show_status()
            case Failed(error):
                self.app.fail(error)
            case Spoken(job, which, token, seconds, temperature) if live and job == live.job:
                side = live.sides[which]
                grown.setdefault(which, len(side.tokens))
                side.add(token, seconds, temperature)
            case SideEnded(job, which) if live and job == live.job:
                live.sides[which].running = False
            case Ended(job, reason, error) if live and job == live.job:
                self._show_grown(grown)
                grown.clear()
                self._settle(reason, error)
            case _:
                pass  # of a job that was stopped

    def _show_grown(self, grown: Mapping[Speaker, int]) -> None:
        live = self.live
        if live is None:
            return
        for which, start in grown.items():
            side = live.sides[which]
            self.view(which).append(pieces(live.turn, side, start))
            if self._wanted is not None and self._wanted[0] == which and len(side.tokens) > self._wanted[1]:
                position, self._wanted = self._wanted[1], None
                self.view(which).select_payload(Said(live.turn, position, side.tokens[position]))
            if which == "guided" and self._curve_turn == live.turn:
                self.query_one(Curve).extend(self._values(live.sides[which].tokens[start:]))

    def _settle(self, reason: str, error: str = "") -> None:
        """The running answer is over: keep what was said."""
        live = self.live
        if live is None:
            return
        turn = self.turns[live.turn]
        for which, side in live.sides.items():
            end: End = reason  # type: ignore[assignment]
            if not side.running or reason == "done":
                end = "length" if len(side.tokens) >= live.max_new_tokens else "done"
            reply = side.frozen(end)
            turn = replace(turn, **{which: reply})  # type: ignore[arg-type]
            self.view(which).append(ending(live.turn, reply, error if end == "error" else ""))
        self.live = None
        self.turns = (*self.turns[: live.turn], turn)
        self.query_one(Curve).refresh()
        self._doing = {"interrupted": "interrupted", "error": "failed"}.get(reason, "")
        if error:
            self.notify(error, severity="error", markup=False)
        self.save()
        self._show_status()

    # Answers

    def send(self, text: str) -> None:
        """Ask; while editing, ask instead of the last question."""
        if self.live:
            self.notify("Still answering: Esc stops.", severity="warning")
            prompt = self.query_one(Prompt)
            prompt.put(text if not prompt.text else f"{text}\n{prompt.text}")
            return
        before = self.turns[:-1] if self.editing else self.turns
        self.editing = False
        turn = Turn(text, self._next_seed(), self.sampling, self.guidance)
        self._answer((*before, turn), dict.fromkeys(SIDES, (0, None)))

    def _answer(self, turns: tuple[Turn, ...], sides: Mapping[Speaker, tuple[int, int | None]]) -> None:
        """Let ``sides`` answer the last of ``turns``, each after so many of its tokens, with a forced one if named."""
        self._stop_now()
        number = len(turns) - 1
        turn = replace(turns[number], sampling=self.sampling, guidance=self.guidance)
        added = number == len(self.turns) and turns[:-1] == self.turns
        self.past.append(self.turns)
        self.future.clear()
        self.turns = (*turns[:-1], turn)
        live = Live(0, number, self.sampling.max_new_tokens)
        self._wanted = None
        parts = []
        for which, (cut, force) in sides.items():
            side = live.sides[which] = LiveReply.after(which, turn.reply(which), cut)
            if force is not None:
                side.forced.append(cut)
            history = messages(turns[:number], which, turn.prompt)
            parts.append(Part(which, history, tuple(token.id for token in side.tokens), force))
        self.live = live
        live.job = self.app.worker.speak(parts, turn.seed, self.sampling)
        self._doing = "answering" if self.assistant else self._doing
        if added:
            for which in SIDES:
                self.view(which).append([Piece(f"❯ {turn.prompt}\n", "user")])
                self.view(which).to_end()
            self._load_curve(number)
            self._show_status()
        else:
            self._show_all(sides)
        self._frames.resume()

    def _stop_now(self) -> None:
        """Stop at once: what was said is kept, what is still under way is not heard any more."""
        if self.live is None:
            return
        self.app.worker.cancel()
        self._take()
        self._settle("interrupted")

    def _next_seed(self) -> int:
        return secrets.randbelow(_GREATEST_SEED + 1) if self.seed is None else self.seed

    def action_stop(self) -> None:
        """Escape: stop an answer; else leave what one is in."""
        focused = self.focused
        if self.live:
            self._stop_now()
        elif self.editing:
            self.editing = False
            self.query_one(Prompt).text = ""
            self._show_status()
        elif isinstance(focused, Alternatives):
            self.view(self._inspected or "guided").focus()
        elif self.query_one(Inspector).display:
            self.action_inspect()
        else:
            self.query_one(Prompt).focus()

    def action_rerun(self) -> None:
        """The last answer again from its start, same seed; while a slider moves, once it rests."""
        if not self.turns:
            self.notify("There is no answer to re-run yet.")
            return
        wait = _DEBOUNCE - (time.monotonic() - self._moved_at)
        if wait > 0:
            self._rerun_later(wait)
        else:
            self._rerun()

    def _rerun_later(self, wait: float) -> None:
        if self._rerun_timer is not None:
            self._rerun_timer.stop()
        self._rerun_timer = self.set_timer(wait, self._rerun)

    def _rerun(self) -> None:
        if self._rerun_timer is not None:
            self._rerun_timer.stop()
            self._rerun_timer = None
        self._stop_now()
        turn = self.turns[-1]
        stale: bool = (
            turn.sampling != self.sampling or turn.patient.end not in ("done", "length") or bool(turn.patient.forced)
        )
        stale = stale or len(turn.patient.temperatures) > 1
        self._answer(self.turns, {which: (0, None) for which in SIDES if which == "guided" or stale})

    def toggle_auto(self) -> None:
        """Re-run by itself when a slider rests."""
        self.auto = not self.auto
        self.notify(f"Re-run when a slider rests: {'on' if self.auto else 'off'}.")

    def action_regenerate(self) -> None:
        """The last answer again with another seed."""
        if not self.turns:
            self.notify("There is no answer to make again yet.")
            return
        self._stop_now()
        turn = self.turns[-1]
        while (seed := secrets.randbelow(_GREATEST_SEED + 1)) == turn.seed:
            pass
        self._answer((*self.turns[:-1], replace(turn, seed=seed)), dict.fromkeys(SIDES, (0, None)))

    def action_edit(self) -> None:
        """Put the last message into the prompt; sending it replaces it."""
        if not self.turns:
            self.notify("There is no message to edit yet.")
            return
        self._stop_now()
        self.editing = True
        self.query_one(Prompt).put(self.turns[-1].prompt)
        self._show_status()

    def action_back(self) -> None:
        """To the conversation before the last forced token, re-run or message."""
        self._travel(self.past, self.future)

    def action_forward(self) -> None:
        """Undo ``back``."""
        self._travel(self.future, self.past)

    def _travel(self, source: list[tuple[Turn, ...]], target: list[tuple[Turn, ...]]) -> None:
        self._stop_now()
        if not source:
            self.notify("There is nothing to step to.")
            return
        target.append(self.turns)
        self.turns = source.pop()
        self._doing = ""
        self.save()
        self._show_all()

    def force(self, which: Speaker, said: Said, token_id: int) -> None:
        """Say this token instead of what was said, and go on from there."""
        self._stop_now()
        turns = self.turns[: said.turn + 1]
        if said.position < len(turns[-1].reply(which).tokens):
            self._answer(turns, {which: (said.position, token_id)})
            self.query_one(Inspector).show(None, None, 0)
            self._wanted = which, said.position

    # Inspector

    _inspected: Speaker | None = None
    _wanted: tuple[Speaker, int] | None = None  # a forced token, to be selected when it is there

    def action_inspect(self) -> None:
        """Open or close the inspector."""
        inspector = self.query_one(Inspector)
        if inspector.display:
            inspector.display = False
            self._inspected = None
            for which in SIDES:
                self.view(which).select(None)
            self.query_one(Curve).cursor = None
            self._arrange()
            self.query_one(Prompt).focus()
            return
        which = self._tab
        inspector.display = True
        inspector.show(None, None, 0)
        self._arrange()
        self.view(which).focus()
        self.view(which).select_last()

    @on(TokenView.Selected)
    def _selected(self, event: TokenView.Selected) -> None:
        which: Speaker = "patient" if event.view.id == "patient-view" else "guided"
        said: Said | None = event.payload
        inspector = self.query_one(Inspector)
        if said is None:
            return
        before_it, self._inspected = self._inspected, which
        if not inspector.display or before_it != which:
            inspector.display = True
            self._arrange()
            if isinstance(self.focused, TokenView):
                event.view.focus()
        if before_it not in (None, which):
            other = self.view("patient" if which == "guided" else "guided")
            other.cursor = None
            other.recolour(other.score)
        tokens, forced = self._tokens(which, said.turn)
        before = tokens[said.position - 1] if said.position else None
        inspector.border_title = "patient's token" if which == "patient" else "guided token"
        inspector.show(said.token, before, len(tokens), forced=said.position in forced)
        if which == "guided":
            self._load_curve(said.turn)
            self.query_one(Curve).cursor = said.position

    @on(TokenView.Chosen)
    def _chosen(self, event: TokenView.Chosen) -> None:
        self._selected(event)

    def _tokens(self, which: Speaker, turn: int) -> tuple[Any, Any]:
        live = self.live
        if live is not None and live.turn == turn and which in live.sides:
            return live.sides[which].tokens, live.sides[which].forced
        reply = self.turns[turn].reply(which)
        return reply.tokens, reply.forced

    def action_alternatives(self) -> None:
        """From the text to the table."""
        if isinstance(self.focused, TokenView) and self.query_one(Inspector).display:
            self.query_one(Inspector).focus_table()

    def action_token(self, direction: int) -> None:
        """To the token before or after, from within the table."""
        if self._inspected is not None:
            self.view(self._inspected).action_step(direction)

    @on(Inspector.Forced)
    def _forced(self, event: Inspector.Forced) -> None:
        which = self._inspected
        said: Said | None = self.view(which).selected if which else None
        if which is None or said is None:
            return
        self.force(which, said, event.alternative.id)
        self.view(which).focus()

    # Settings

    @on(Slider.Changed)
    def _slid(self, event: Slider.Changed) -> None:
        slider = event.slider
        self._moved_at = time.monotonic()
        if slider.id == "slider-temperature":
            self.sampling = self.app.worker.sampling = self.sampling.replace(temperature=event.value)
        else:
            guidance = self.guidance
            if slider.id == "slider-alpha":
                guidance = guidance.replace(alpha=event.value)
            else:
                guidance = guidance.replace(betas={**guidance.betas, slider.label: event.value})
            if not self._guide(guidance):
                self._show_sliders()
                return
        self._show_headings()
        if self._rerun_timer is not None or (self.auto and self.turns):
            self._rerun_later(_DEBOUNCE)

    def _guide(self, guidance: Guidance) -> bool:
        """Hand the models one new snapshot; False where they refuse it."""
        try:
            if not guidance.alpha and not any(guidance.betas.values()):
                raise UsageError("alpha and every beta are 0: nothing is left to speak")
            if self.assistant is not None:
                self.assistant.guidance = guidance
        except LLMDoctorError as error:
            self.notify(str(error), severity="warning", markup=False)
            return False
        self.guidance = self.app.worker.guidance = guidance
        return True

    def set_settings(self, text: str) -> None:
        """``alpha=1 beta=0.8 ...``: all of it, or, where one value is wrong, nothing."""
        names = tuple(self.guidance.betas)
        guidance, sampling = parse_settings(text, names, self.guidance, self.sampling.replace(seed=self.seed))
        if not self._guide(guidance):
            return
        self.seed = sampling.seed
        self.sampling = self.app.worker.sampling = sampling.replace(seed=None)
        self._show_sliders()
        self._show_headings()
        self.show_settings()

    def show_settings(self) -> None:
        """The settings in use, in a notice."""
        self.notify(self.describe(), markup=False)

    def describe(self) -> str:
        """The settings in use, in one line."""
        shown = self.guidance.to_dict() | self.sampling.model_dump() | {"seed": self.seed}
        return f"{settings_text(shown)}, at most {self.sampling.max_new_tokens} tokens"

    def set_lens(self, text: str) -> None:
        """Colour by another score."""
        if not text:
            self.action_next_lens()
            return
        if text not in lens.LENSES:
            raise UsageError(f"lens: expected one of {', '.join(lens.LENSES)}, got {text!r}")
        self.lens = text  # type: ignore[assignment]
        self._recolour()

    def action_next_lens(self) -> None:
        """The next kind of colour."""
        kinds = lens.LENSES
        self.set_lens(kinds[(kinds.index(self.lens) + 1) % len(kinds)])

    def set_doctor(self, text: str) -> None:
        """Whose opinion colours the tokens and is the curve."""
        names = list(self.guidance.betas)
        if not names:
            raise UsageError("there is no doctor")
        if text and text not in names:
            raise UsageError(f"there is no doctor {text!r} (there are: {', '.join(names)})")
        self.doctor = text or names[(names.index(self.doctor or names[-1]) + 1) % len(names)]
        self._recolour()

    def action_next_doctor(self) -> None:
        """The next doctor's opinion."""
        self.obey("/doctor")

    def set_theme(self, text: str) -> None:
        """Other colours."""
        if not text:
            self.app.search_themes()
            return
        if text not in self.app.available_themes:
            raise UsageError(f"there is no theme {text!r} (there are: {', '.join(sorted(self.app.available_themes))})")
        self.app.theme = text

    def action_sliders(self) -> None:
        """To the first slider; from a slider back to the prompt."""
        if isinstance(self.focused, Slider):
            self.query_one(Prompt).focus()
        else:
            self.query(Slider).first().focus()

    # Prompt and commands

    @on(Prompt.Submitted)
    def _submitted(self, event: Prompt.Submitted) -> None:
        if event.text.startswith("/"):
            self.obey(event.text)
        else:
            self.send(event.text)

    @on(Prompt.Recalled)
    def _recalled(self) -> None:
        if self.turns:
            self.action_edit()

    def obey(self, line: str) -> None:
        """Run a slash command; what is wrong with it is one line."""
        try:
            commands.run(self, line)
        except LLMDoctorError as error:
            self.notify(str(error), severity="error", markup=False)

    def begin_command(self, name: str) -> None:
        """Put a command that needs arguments into the prompt."""
        self.query_one(Prompt).put(f"/{name} ")

    def action_help(self) -> None:
        """Keys, commands, marks."""
        from llmdoctor.tui.screens.help import HelpScreen

        self.app.push_screen(HelpScreen())

    def action_copy(self) -> None:
        """The guided answer, or the inspected side's, to the clipboard."""
        which = self._inspected or self._tab
        text = ""
        if self.live and which in self.live.sides:
            text = "".join(token.text for token in self.live.sides[which].tokens).strip()
        elif self.turns:
            text = self.turns[-1].reply(which).text
        if not text:
            self.notify("There is no answer to copy yet.")
            return
        self.app.copy_to_clipboard(text)
        self.notify(f"Copied the {'guided' if which == 'guided' else 'patient’s own'} answer.")

    # Sessions

    def save(self) -> None:
        """Write the conversation, in a thread of its own."""
        self.session = replace(self.session, turns=self.turns)
        if self.turns:
            self.app.save(self.session)

    def new_session(self) -> None:
        """An empty conversation."""
        self._open(Session.new(self.app.start.profile))

    def resume(self, session_id: str) -> None:
        """Go on with a saved conversation."""
        self._open(self.app.load_session(session_id))

    def _open(self, session: Session) -> None:
        self._stop_now()
        self.session, self.turns = session, session.turns
        self.past.clear()
        self.future.clear()
        self.editing = False
        if session.turns:
            last = session.turns[-1]
            then_g, now_g = last.guidance, self.guidance
            known = {n: then_g.betas.get(n, b) for n, b in now_g.betas.items()}
            restored = now_g.replace(alpha=then_g.alpha, betas=known)
            if then_g.mode == now_g.mode:
                widths = {n: (then_g if n in then_g.betas else now_g).dead_zones.get(n, 0.0) for n in known}
                zones = {n: width for n, width in widths.items() if width}
                restored = restored.replace(plausibility=then_g.plausibility, dead_zones=zones)
            else:
                said = f"It was held in mode {then_g.mode}; it goes on in mode {now_g.mode}."
                self.notify(said, severity="warning")
            self._guide(restored)
            self.sampling = self.app.worker.sampling = last.sampling.replace(seed=None)
            then, now = (_models(s.profile) for s in (session, Session("", profile=self.app.start.profile)))
            if then != now:
                self.notify(f"It was held with {then}; it goes on with {now}.", severity="warning", markup=False)
        self._show_sliders()
        self._show_all()

    def rename(self, title: str) -> None:
        """Name the conversation."""
        if not title:
            raise UsageError("expected a title, for example: /rename Sleep")
        self.session = replace(self.session, title=title)
        self.save()

    def action_sessions(self) -> None:
        """The saved conversations."""
        from llmdoctor.tui.screens.sessions import SessionsScreen

        self.app.push_screen(SessionsScreen(self.session.id), self._picked)

    def _picked(self, session_id: str | None) -> None:
        if session_id:
            self.obey(f"/resume {session_id}")

    def export(self, text: str) -> None:
        """``md``, ``json``, ``html`` or ``svg``, and a file name."""
        kind, _, name = text.partition(" ")
        session = replace(self.session, turns=self.turns)
        self.app.export(session, kind, Path(name.strip()) if name.strip() else None, self.lens, self.doctor)

    # Showing

    def view(self, which: Speaker) -> TokenView:
        """One side's text."""
        return self.query_one(f"#{which}-view", TokenView)

    def _score(self, said: Said) -> float | None:
        return lens.score(said.token, self.lens, self.doctor)

    def _values(self, tokens: Any) -> list[float]:
        return [token.values[self.doctor] for token in tokens if self.doctor in token.values]

    def _recolour(self) -> None:
        self.view("guided").recolour(self._score)
        turn, self._curve_turn = self._curve_turn, -1
        self._load_curve(turn)
        self._show_status()

    def _load_curve(self, turn: int) -> None:
        if turn == self._curve_turn and self.live is not None and self.live.turn == turn and turn >= 0:
            return
        curve = self.query_one(Curve)
        curve.clear()
        self._curve_turn = turn
        if 0 <= turn < len(self.turns):
            curve.extend(self._values(self._tokens("guided", turn)[0]))
        curve.refresh()

    def _show_all(self, sides: Any = SIDES) -> None:
        for which in sides:
            self.view(which).set_pieces(conversation(self.turns, which, self.live))
        self._curve_turn = -1
        self._load_curve(len(self.turns) - 1)
        self._show_headings()
        self._show_status()

    def _show_sliders(self) -> None:
        for slider in self.query(Slider):
            if slider.id == "slider-alpha":
                slider.value = self.guidance.alpha
            elif slider.id == "slider-temperature":
                slider.value = self.sampling.temperature
            else:
                slider.value = self.guidance.betas[slider.label]

    def _show_headings(self) -> None:
        by = betas_text(self.guidance.betas, " ") or "no doctor"
        for which, title, other in (("patient", "patient alone", "guided"), ("guided", f"guided by {by}", "patient")):
            key = self.app.config.keys.get("chat.other_pane", "ctrl+t")
            hint = "" if self.query_one(f"#{other}").display else f" · {key}: {other}"
            self.query_one(f"#{which}").border_title = title + hint

    def _show_status(self) -> None:
        self._status_at = time.monotonic()
        if self.live is not None:
            self.query_one(Curve).refresh()
        facts = {which: self._side_facts(which) for which in SIDES}
        for which, fact in facts.items():
            if fact != self._facts.get(which):  # drawing a frame draws what is in it
                self._facts[which] = self.query_one(f"#{which}").border_subtitle = fact
        parts = [self.app.start.models]
        if self.turns:
            parts.append(f"seed {self.turns[-1].seed}")
        acceptance = getattr(self.assistant, "acceptance", None)
        if isinstance(acceptance, float):
            parts.append(f"acceptance {acceptance:.0%}")
        if self.session.title:
            parts.append(self.session.title)
        doing = "editing: Enter sends it again, Esc leaves it" if self.editing else self._doing
        text = Text(no_wrap=True, overflow="ellipsis")
        if doing:
            text.append(f"{doing} · ", "bold")
        self.query_one("#status", Static).update(text.append(" · ".join(parts)), layout=False)
        guided = self.view("guided")
        drawn = lens.legend(
            self.lens, self.doctor, guided.limit, dark=self.app.current_theme.dark, narrow=self.size.width < 72
        )
        self.query_one("#legend", Static).update(drawn, layout=False)

    def _side_facts(self, which: Speaker) -> str:
        live = self.live.sides.get(which) if self.live else None
        if live is not None:
            count, seconds, flips, kl, all_tokens = (
                live.fresh,
                live.fresh_seconds,
                live.flips,
                live.kl,
                len(live.tokens),
            )
        elif self.turns:
            reply = self.turns[-1].reply(which)
            count = all_tokens = len(reply.tokens)
            seconds, flips, kl = reply.seconds, reply.flips, reply.kl
        else:
            return ""
        parts = [f"{all_tokens} tokens"]
        if seconds > 0 and count:
            parts.append(f"{count / seconds:.0f}/s")
        if which == "guided":
            parts += [f"{flips} flips", f"KL {kl:.1f}"]
        return ", ".join(parts)

    def action_other_pane(self) -> None:
        """Where there is room for one pane only: the other one."""
        self._tab = "patient" if (self._inspected or self._tab) == "guided" else "guided"
        if self._inspected is not None:
            self.view(self._tab).select_last()  # the rest follows the cursor
            return
        self._arrange()
        if isinstance(self.focused, TokenView):
            self.view(self._tab).focus()

    def on_resize(self) -> None:
        """Panes beside each other, stacked, or one at a time."""
        self._arrange()

    def _arrange(self) -> None:
        width, height = self.app.size
        narrow, tall = width < _NARROW, height >= _TALL
        self.set_class(narrow, "narrow")
        self.set_class(height < 30, "low")
        inspecting = self.query_one(Inspector).display
        one = (narrow and not tall) or (inspecting and (width < _WIDE and not (narrow and height >= 50)))
        for which in SIDES:
            self.query_one(f"#{which}").display = not one or which == (self._inspected or self._tab)
        self._show_headings()
        self.query_one(Curve).display = not (inspecting and narrow and height < 30)
        sliders = self.query_one("#sliders", Grid)
        count = len(self.query(Slider))
        columns = max(1, min(count, width // (36 if not narrow else 26)))
        if count > columns:  # rows of equal length
            rows = -(-count // columns)
            columns = -(-count // rows)
        sliders.styles.grid_size_columns = columns
        sliders.styles.grid_size_rows = -(-count // columns)
        sliders.styles.height = -(-count // columns)


def _models(profile: Mapping[str, Any]) -> str:
    patient = profile.get("patient", {}).get("model", "another patient")
    doctors = ", ".join(profile.get("doctors", {})) or "no doctor"
    return f"{'/'.join(Path(patient).parts[-2:])} and {doctors}"
