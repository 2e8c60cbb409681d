"""The answer that is being made: from the worker's events to turns of the conversation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from llmdoctor.errors import LLMDoctorError
from llmdoctor.records import Speaker
from llmdoctor.sessions import End, Reply, Turn, messages
from llmdoctor.settings import Sampling
from llmdoctor.tui.conversation import SIDES, Live, LiveReply
from llmdoctor.tui.current_settings import CurrentSettings, other_seed
from llmdoctor.tui.generation import (
    Ended,
    Event,
    Failed,
    Loaded,
    Part,
    Progress,
    SideEnded,
    Spoken,
    Worker,
)
from llmdoctor.tui.history import History, Turns

# Per side that is to answer: how many tokens of its reply are kept, and the token to say next, or None to draw it.
Beginnings = Mapping[Speaker, tuple[int, int | None]]


class Listener(Protocol):
    """What is called, in the screen's thread, when something has happened."""

    def loaded(self) -> None:
        """The models are loaded."""
        ...

    def failed(self, error: LLMDoctorError) -> None:
        """The models cannot be loaded."""
        ...

    def began(self, sides: Sequence[Speaker], *, added: bool) -> None:
        """The texts of these sides have changed; ``added`` if a turn is new and the ones before it are as they were."""
        ...

    def grew(self, live: Live, starts: Mapping[Speaker, int]) -> None:
        """These sides of ``live`` have new tokens, from those positions on."""
        ...

    def settled(self, turn: int, replies: Mapping[Speaker, Reply], error: str) -> None:
        """The answer is over and in the history; ``error`` is empty unless it failed."""
        ...


class Answering:
    """``live`` is the running answer, if any, and ``doing`` what the status line says about it.

    The listener is called within the methods below, never later: after ``stop`` the answer is in the history.
    """

    def __init__(self, worker: Worker, history: History, settings: CurrentSettings, listener: Listener) -> None:
        self.live: Live | None = None
        self.doing = "loading the models ..."
        self.history, self.settings = history, settings
        self._worker, self._listener = worker, listener

    @property
    def idle(self) -> bool:
        """Whether no event is expected."""
        return self.live is None and self.settings.assistant is not None

    # What is answered: each stops an answer that still runs. All but the first need a turn that is there

    def ask(self, prompt: str, *, instead: bool) -> None:
        """A new question, or another one ``instead`` of the last."""
        self.stop()
        before = self.history.turns[:-1] if instead else self.history.turns
        settings = self.settings
        turn = Turn(prompt, settings.next_seed(), settings.sampling, settings.guidance)
        self.begin((*before, turn), dict.fromkeys(SIDES, (0, None)))

    def again(self) -> None:
        """The last answer with the settings of now and the same seed."""
        self.stop()
        *_, turn = turns = self.history.turns
        self.begin(turns, dict.fromkeys(_stale_sides(turn, self.settings.sampling), (0, None)))

    def other(self) -> None:
        """The last answer with another seed."""
        self.stop()
        *before, turn = self.history.turns
        again = replace(turn, seed=other_seed(turn.seed))
        self.begin((*before, again), dict.fromkeys(SIDES, (0, None)))

    def force(self, which: Speaker, number: int, position: int, token_id: int) -> None:
        """A token instead of the one at this position of a turn; what follows is drawn, later turns are dropped."""
        self.stop()
        turns = self.history.turns[: number + 1]
        if position < len(turns[-1].reply(which).tokens):
            self.begin(turns, {which: (position, token_id)})

    def begin(self, turns: Turns, sides: Beginnings) -> None:
        """Let ``sides`` answer the last of ``turns``."""
        sampling = self.settings.sampling
        number = len(turns) - 1
        turn = replace(turns[number], sampling=sampling, guidance=self.settings.guidance)
        added, dropped = turns[:-1] == self.history.turns, len(turns) < len(self.history.turns)
        self.history.change((*turns[:-1], turn))
        self.live = live = Live(0, number, sampling.max_new_tokens)
        parts = []
        for which, (kept, force) in sides.items():
            side = live.sides[which] = LiveReply.after(which, turn.reply(which), kept)
            if force is not None:
                side.forced.append(kept)
            past = messages(turns[:number], which, turn.prompt)
            parts.append(Part(which, past, tuple(token.id for token in side.tokens), force))
        live.job = self._worker.speak(parts, turn.seed, sampling)
        if self.settings.assistant is not None:  # else the line still says what is being loaded
            self.doing = "answering"
        self._listener.began(SIDES if dropped else list(sides), added=added)

    def stop(self) -> None:
        """Stop at once. The tokens so far are kept; one that is being made right now is not."""
        if self.live is None:
            return
        self._worker.cancel()
        self.take()
        self._settle("interrupted")

    def take(self) -> None:
        """Handle the worker's events since the last call."""
        starts: dict[Speaker, int] = {}
        for event in self._worker.drain():
            self._hear(event, starts)
        self._tell_grown(starts)

    def _hear(self, event: Event, starts: dict[Speaker, int]) -> None:
        live = self.live
        match event:
            case Progress(text):
                self.doing = text
            case Loaded(assistant):
                self.settings.assistant = assistant
                self.doing = "answering" if live else ""
                self._listener.loaded()
            case Failed(error):
                self._listener.failed(error)
            case Spoken(job, which, token, seconds, temperature) if live and job == live.job:
                side = live.sides[which]
                starts.setdefault(which, len(side.tokens))
                side.add(token, seconds, temperature)
            case SideEnded(job, which) if live and job == live.job:
                live.sides[which].running = False
            case Ended(job, reason, error) if live and job == live.job:
                self._tell_grown(starts)  # while the answer is still live
                self._settle(reason, error)
            case _:
                pass  # of a job that was stopped

    def _tell_grown(self, starts: dict[Speaker, int]) -> None:
        if self.live is not None and starts:
            self._listener.grew(self.live, starts)
        starts.clear()

    def _settle(self, reason: End, error: str = "") -> None:
        live = self.live
        if live is None:
            return
        replies: dict[Speaker, Reply] = {}
        for which, side in live.sides.items():
            # The other side may have come to its end before the job was stopped or failed.
            over = not side.running or reason == "done"
            cut = len(side.tokens) >= live.max_new_tokens
            replies[which] = side.frozen(("length" if cut else "done") if over else reason)
        self.live = None
        self.history.complete(replace(self.history.turns[live.turn], **replies))  # type: ignore[arg-type]
        self.doing = {"interrupted": "interrupted", "error": "failed: F5 tries again"}.get(reason, "")
        self._listener.settled(live.turn, replies, error)

    # What has been said, running or not

    def side(self, which: Speaker, turn: int) -> LiveReply | Reply:
        """A side's part of a turn, as far as it is."""
        live = self.live
        if live is not None and live.turn == turn and which in live.sides:
            return live.sides[which]
        return self.history.turns[turn].reply(which)

    @property
    def token_names(self) -> Mapping[int, str]:
        """What the tokens without text are, once the models are loaded."""
        return self.settings.assistant.token_names if self.settings.assistant is not None else {}

    def last_text(self, which: Speaker) -> str:
        """A side's last answer, as far as it is; empty where there is none."""
        turns = self.history.turns
        return self.side(which, len(turns) - 1).text if turns else ""


def _stale_sides(turn: Turn, sampling: Sampling) -> list[Speaker]:
    """The sides whose reply a re-run may change. The patient alone does not depend on the guidance."""
    patient = turn.patient
    same = turn.sampling == sampling and len(patient.temperatures) <= 1 and not patient.forced
    complete = patient.end in ("done", "length")
    return ["guided"] if same and complete else list(SIDES)
