"""The thread that loads the models and generates. It appends events to a queue, which the screen drains.

Nothing here waits for the screen: a token costs one append. Calling into the screen's thread for each token, and
waiting for it, would cost about a thousand times as much.
"""

import gc
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Literal, Protocol, runtime_checkable

from llmdoctor.errors import LLMDoctorError
from llmdoctor.records import GuidedToken, Message, Speaker
from llmdoctor.settings import Guidance, Sampling

TOP = 10  # alternatives of every token
_JOIN_SECONDS = 5.0


class Assistant(Protocol):
    """What the app needs of `llmdoctor.LLMdoctor`."""

    guidance: Guidance

    @property
    def doctor_names(self) -> tuple[str, ...]:
        """The doctors."""
        ...

    @property
    def token_names(self) -> Mapping[int, str]:
        """What the tokens without text are, by id."""
        ...

    def stream(self, prompt: Sequence[Message], **how: Any) -> Iterator[GuidedToken]:
        """Yield the tokens as they are drawn."""
        ...


@runtime_checkable
class Elsewhere(Protocol):
    """Models of a server: they answer both sides at the same time, and a token may be long in coming."""

    def hang_up(self) -> None:
        """Leave all streams, from any thread."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """One side of an answer: the conversation it answers, the ids it begins with, and an id to say next, if forced.

    ``guidance`` and ``sampling`` are fixed for this part; by default it follows what is set while it is made.
    ``column`` tells several parts of the same side apart.
    """

    which: Speaker
    messages: Sequence[Message]
    prefix: tuple[int, ...] = ()
    force: int | None = None
    column: int = 0
    guidance: Guidance | None = None
    sampling: Sampling | None = None


# Events. ``job`` is the number of the answer: tokens of a stopped one may still arrive after the next has begun.


@dataclass(frozen=True, slots=True)
class Progress:
    """Something is being loaded."""

    text: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """The models are loaded."""

    assistant: Assistant


@dataclass(frozen=True, slots=True)
class Failed:
    """The models could not be loaded."""

    error: LLMDoctorError


@dataclass(frozen=True, slots=True)
class Spoken:
    """A token, the seconds it took, and the temperature it was drawn at."""

    job: int
    which: Speaker
    token: GuidedToken
    seconds: float
    temperature: float
    column: int = 0


@dataclass(frozen=True, slots=True)
class SideEnded:
    """One side has finished."""

    job: int
    which: Speaker
    column: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is over; ``error`` is one line if it failed."""

    job: int
    reason: Literal["done", "interrupted", "error"]
    error: str = ""


Event = Progress | Loaded | Failed | Spoken | SideEnded | Ended


class _Cancelled(Exception):
    pass


class Worker:
    """Runs answers, one after the other, in a thread of its own.

    ``load`` gets a function for lines about progress and returns the assistant. ``sampling`` may be set at any time and
    holds from the next token on; so does ``guidance``, by ``guide``.
    """

    def __init__(
        self, load: Callable[[Callable[[str], None]], Assistant], sampling: Sampling, guidance: Guidance | None = None
    ) -> None:
        self.sampling = sampling
        self.guidance = guidance
        self.events: deque[Event] = deque()
        self._load = load
        self._assistant: Assistant | None = None
        self._loading = threading.Lock()  # held to hand the guidance to the assistant
        self._prefix_caches: dict[Speaker, Any] = {}
        self._jobs: SimpleQueue[Callable[[Assistant], None] | None] = SimpleQueue()
        self._number = 0
        self._cancelled_up_to = 0
        self._thread = threading.Thread(target=self._run, name="llmdoctor-generation", daemon=True)

    def start(self) -> None:
        """Start the thread, which loads the models first."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def speak(self, parts: Sequence[Part], seed: int, sampling: Sampling) -> int:
        """Queue an answer and return its number. Both sides take turns, token by token."""
        self.sampling = sampling
        return self._submit(lambda job, assistant: self._speak(job, assistant, parts, seed, self.events))

    def speak_columns(self, parts: Sequence[Part], seed: int, events: deque[Event]) -> int:
        """The same for parts with settings of their own; what happens is appended to ``events``."""
        return self._submit(lambda job, assistant: self._speak(job, assistant, parts, seed, events))

    def guide(self, guidance: Guidance) -> None:
        """Guide the next token so; while the models are loading, the first. Raises LLMDoctorError if they refuse."""
        with self._loading:
            if self._assistant is not None:
                self._assistant.guidance = guidance
            self.guidance = guidance

    def cancel(self) -> None:
        """Stop the running answer and those that wait: at the next token, or at once where a server makes it."""
        self._cancelled_up_to = self._number
        if isinstance(self._assistant, Elsewhere):
            self._assistant.hang_up()

    def close(self) -> None:
        """Stop, and end the thread. While it is still loading it cannot be ended: it then ends with the program."""
        self.cancel()
        self._jobs.put(None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_SECONDS)

    def drain(self) -> list[Event]:
        """All events since the last call."""
        events: list[Event] = []
        with suppress(IndexError):
            while True:
                events.append(self.events.popleft())
        return events

    def _submit(self, job: Callable[[int, Assistant], None]) -> int:
        self._number = number = self._number + 1
        self._jobs.put(lambda assistant: job(number, assistant))
        return number

    def _run(self) -> None:
        try:
            assistant = self._load(lambda text: self.events.append(Progress(text)))
            with self._loading:
                if self.guidance is not None:  # it may have been changed while the models were loading
                    assistant.guidance = self.guidance
                self._assistant = assistant
        except LLMDoctorError as error:
            self.events.append(Failed(error))
            return
        except Exception as error:  # else the thread would die unseen, and the screen wait forever
            self.events.append(Failed(LLMDoctorError(f"{type(error).__name__}: {error}")))
            return
        from llmdoctor.decoding.prefix import PrefixCache

        self._prefix_caches = {"patient": PrefixCache(), "guided": PrefixCache()}
        # A full collection would otherwise walk through all objects of torch and transformers: 0.3 s without a key.
        gc.freeze()
        self.events.append(Loaded(assistant))
        while (job := self._jobs.get()) is not None:
            job(assistant)

    def _guarded(self, number: int, work: Callable[[], None]) -> Ended:
        try:
            self._check(number)
            work()
        except _Cancelled:
            return Ended(number, "interrupted")
        except LLMDoctorError as error:
            cancelled = number <= self._cancelled_up_to  # a server's stream then ends with an error
            return Ended(number, "interrupted") if cancelled else Ended(number, "error", str(error))
        except Exception as error:
            return Ended(number, "error", _reason(error))
        return Ended(number, "done")

    def _check(self, number: int) -> None:
        if number <= self._cancelled_up_to:
            raise _Cancelled

    def _speak(self, job: int, assistant: Assistant, parts: Sequence[Part], seed: int, events: deque[Event]) -> None:
        # Each side has a cache of its own, so that its next question only costs the new tokens.
        caches = self._prefix_caches
        sides = [_Side(assistant, part, seed, caches[part.which] if part.sampling is None else None) for part in parts]

        def work() -> None:
            running = list(sides)
            while running:
                for side in list(running):
                    self._check(job)
                    spoken = side.next(job, self.sampling)
                    if spoken is None:
                        running.remove(side)
                        events.append(SideEnded(job, side.part.which, side.part.column))
                    else:
                        events.append(spoken)

        try:
            events.append(self._guarded(job, work))
        finally:
            for side in sides:
                side.close()


class _Side:
    """One side's stream of tokens. When the sampling settings change, it is opened again after the tokens so far."""

    def __init__(self, assistant: Assistant, part: Part, seed: int, prefix_cache: Any) -> None:
        self.part = part
        self._assistant, self._seed, self._prefix_cache = assistant, seed, prefix_cache
        self._said = list(part.prefix)
        self._force = part.force
        self._sampling: Sampling | None = None
        self._stream: Iterator[GuidedToken] = iter(())
        self._elsewhere = isinstance(assistant, Elsewhere)
        self._since = time.perf_counter()  # when a server last gave a token: it makes the next one meanwhile

    def next(self, job: int, sampling: Sampling) -> Spoken | None:
        started = self._since if self._elsewhere else time.perf_counter()
        sampling = self.part.sampling or sampling
        if sampling != self._sampling:
            self.close()
            changed, self._sampling = self._sampling is not None, sampling
            if changed and len(self._said) >= sampling.max_new_tokens:
                return None
            self._stream = self._assistant.stream(self.part.messages, **self._how(sampling))
        token = next(self._stream, None)
        if token is None:
            return None
        self._said.append(token.id)
        self._force = None
        self._since = time.perf_counter()
        seconds = self._since - started
        return Spoken(job, self.part.which, token, seconds, sampling.temperature, self.part.column)

    def _how(self, sampling: Sampling) -> Mapping[str, Any]:
        return {
            **sampling.model_dump(),
            "seed": self._seed if sampling.seed is None else sampling.seed,
            "guidance": self.part.guidance,
            "guided": self.part.which == "guided",
            "prefix_ids": tuple(self._said),
            "force_id": self._force,
            "top": TOP,
            "prefix_cache": self._prefix_cache,
        }

    def close(self) -> None:
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()
        self._stream = iter(())


def _reason(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "the device ran out of memory: try a shorter conversation, or a smaller model"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
