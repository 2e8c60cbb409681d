"""The engine of the server: one thread that answers all requests together, round by round. It knows no HTTP."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llmdoctor.assistant import LLMdoctor, with_strengths
from llmdoctor.decoding.batch import Batch
from llmdoctor.decoding.prefill import TimedPieces
from llmdoctor.decoding.prefix import SharedPrefixes
from llmdoctor.decoding.rows import Request, Step
from llmdoctor.errors import LLMDoctorError, UsageError
from llmdoctor.harmless import require_unicode
from llmdoctor.records import Alternative, GuidedToken, Message
from llmdoctor.serving.metrics import Metrics
from llmdoctor.settings import Guidance, Sampling, check_guidance

_STRENGTHS = ("beta", "dead_zone")  # one number for all doctors, or by doctor


class QueueFullError(LLMDoctorError):
    """As many requests wait as may."""


class LateError(LLMDoctorError):
    """An answer was not finished in its time."""


class StoppedError(LLMDoctorError):
    """The engine has stopped."""


class TooLongError(UsageError):
    """A prompt has more tokens than are read."""


@dataclass(eq=False)
class Job:
    """One answer: what is asked, and where its tokens go.

    ``emit`` is called in the engine's thread, with every `Step` and, in place of the last one, with the error that
    ended the answer. It must return at once. ``guidance`` may be replaced while the answer is written, from any thread.
    ``deadline`` is a time of `time.monotonic`.
    """

    prompt: Sequence[int]
    guidance: Guidance
    sampling: Sampling
    seed: int
    emit: Callable[[Step | Exception], None]
    top: int = 0
    deadline: float = float("inf")
    first: int | None = None  # the first token, instead of a draw
    begun: int = 0  # tokens at the end of the prompt that are the answer's beginning
    row: int = -1  # in the batch; -1 while it waits
    ended: bool = False
    cancelled: bool = False
    began: float = field(default_factory=time.monotonic)
    drawn: int = 0

    def read_guidance(self) -> Guidance:
        """The guidance of the next token."""
        return self.guidance


class Engine:
    """Answers `Job`s with the models of ``assistant``, at most ``rows`` at a time; at most ``queue`` more may wait.

    Every job is answered as if it were alone. While jobs run, nothing else may use ``assistant``: models are not made
    for several threads. ``longest`` bounds every prompt, in tokens; ``prefix_bytes`` what is kept of prompts and
    answers for those that begin alike.
    """

    def __init__(
        self,
        assistant: LLMdoctor,
        *,
        rows: int = 64,
        queue: int = 256,
        longest: int | None = None,
        prefix_bytes: int = 512 << 20,
    ) -> None:
        self.assistant, self.rows, self.queue, self.metrics = assistant, rows, queue, Metrics()
        self.prefixes, self._pieces = SharedPrefixes(prefix_bytes), TimedPieces()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}  # by row
        self._changed = threading.Condition()
        self._stopping = False
        self._batch = self._open()
        self.longest = min(longest or self._batch.context, self._batch.context - 1)  # a token must fit behind it
        self._known = frozenset(assistant.patient.vocabulary.ids.values())
        self._thread = threading.Thread(target=self._run, name="llmdoctor-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are being answered."""
        return self._thread.is_alive() and not self._stopping

    @property
    def load(self) -> tuple[int, int]:
        """How many answers are being written, and how many wait."""
        return len(self._running), len(self._waiting)

    def guidance(self, given: Mapping[str, Any], base: Guidance | None = None) -> Guidance:
        """``base``, by default the assistant's own guidance, with what is given of alpha, beta, dead_zone, ...

        Raises UsageError for what cannot be.
        """
        base = base or self.assistant.guidance
        names = self.assistant.doctor_names
        strengths = {f"{name}s": given[name] for name in _STRENGTHS if name in given}
        changed = with_strengths(base, names, **strengths).replace(
            **{name: value for name, value in given.items() if name not in _STRENGTHS}
        )
        check_guidance(changed, names)
        if changed.mode == "ratio" and names and not self._batch.with_bases:
            raise UsageError('mode "ratio" needs the doctors\' bases: start the server with --mode ratio')
        return changed

    def prompt_ids(self, prompt: str | Sequence[int] | Sequence[Message]) -> list[int]:
        """The token ids of a conversation, of a text as it stands, or of token ids, checked.

        Raises UsageError and DataError for what cannot be answered, and TooLongError.
        """
        patient = self.assistant.patient
        if isinstance(prompt, str):
            ids = list(patient.tokenizer(require_unicode(prompt, "the prompt")).input_ids)
        elif prompt and isinstance(prompt[0], Mapping):
            ids = self.assistant.prompt_ids(prompt)  # type: ignore[arg-type]
        else:
            ids = list(prompt)  # type: ignore[arg-type]
            if unknown := set(ids) - self._known:
                raise UsageError(f"there is no token with the id {min(unknown)}")
        if not ids:
            raise UsageError("the prompt is empty: it has no token to continue from")
        if len(ids) > self.longest:
            raise TooLongError(f"the prompt is {len(ids)} tokens long, and at most {self.longest} are read: shorten it")
        return ids

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all of these jobs. Raises QueueFullError, and queues none, where they are too many; StoppedError."""
        with self._changed:
            if not self.alive:
                raise StoppedError("the server is stopping")
            free = self.rows - len(self._running)
            if len(self._waiting) + len(jobs) > self.queue + free:
                raise QueueFullError(f"{len(self._waiting)} answers wait already; try again later")
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs before their time; nothing is emitted for them any more. Those that have ended stay as they are."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._changed.notify()

    def stop(self) -> None:
        """End all jobs with StoppedError, and the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    # --- in the engine's thread --------------------------------------------------------------------------------------

    def _open(self) -> Batch:
        return self.assistant.batch(pieces=self._pieces, prefixes=self.prefixes)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        finally:  # also when a mistake of this program's ends the thread: nobody may wait for it
            with self._changed:
                self._stopping = True
                for job in (*self._waiting, *self._running.values()):
                    self._end(job, StoppedError("the server is stopping"))

    def _turn(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or self._running)
            self._drop()
            arriving = self._next_jobs()
        self._join(arriving)
        if self._batch and not self._stopping:
            self._round()

    def _drop(self) -> None:
        """End the jobs that were cancelled, and those whose time is over."""
        now = time.monotonic()
        for job in [job for job in (*self._waiting, *self._running.values()) if job.cancelled or job.deadline < now]:
            self._end(job, LateError("the answer was not finished in the time that the server gives it"))
        self._waiting = deque(job for job in self._waiting if not job.ended)

    def _next_jobs(self) -> list[Job]:
        """The jobs that enter before the next round, in the order in which they came."""
        free = self.rows - len(self._running)
        return [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]

    def _join(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            request = Request(job.prompt, job.read_guidance, job.sampling, job.seed, job.first, job.begun)
            try:
                (job.row,) = self._batch.join([request])
            except LLMDoctorError as error:
                self._end(job, error)
                continue
            self._running[job.row] = job
            self.metrics.prompt_tokens += len(job.prompt)

    def _round(self) -> None:
        self._batch.top = max(job.top for job in self._running.values())
        try:
            for step in self._batch.round():
                self._emit(self._running[step.row], step)
        except Exception as error:  # one that is not expected must not silence the others' clients
            self._recover(error)
        self.metrics.rounds += 1

    def _emit(self, job: Job, step: Step) -> None:
        token = step.token
        if not job.drawn:
            self.metrics.first_token(time.monotonic() - job.began)
        job.drawn += 1
        self.metrics.token(token.kl, token.flip)
        wanted = not job.cancelled
        if step.finish:
            self._end(job)  # before it is told: its receiver may leave at once
        if wanted:
            _tell(job, step._replace(token=replace(token, top=_top(token, job.top))) if token.top else step)

    def _end(self, job: Job, error: Exception | None = None) -> None:
        """Take a job out of the batch, with the error that ends it before its time."""
        if job.ended:
            return
        job.ended = True
        if self._running.pop(job.row, None) and error:
            self._batch.leave(job.row)
        self.metrics.ended["cancelled" if job.cancelled else "failed" if error else "finished"] += 1
        if error and not job.cancelled:
            _tell(job, error)

    def _recover(self, error: Exception) -> None:
        """After a failed round: those that are not in the batch any more failed, or all if nothing can go on."""
        broken = self._batch.broken
        for job in [job for row, job in self._running.items() if broken or row not in self._batch]:
            self._end(job, error)
        if broken:
            self.prefixes.clear()  # they may hold what made it fail
            self._batch = self._open()


def _top(token: GuidedToken, count: int) -> tuple[Alternative, ...]:
    """What a batch gives that was asked for ``count`` alternatives: another job may have asked for more."""
    behind = [one for one in token.top[count:] if one.id in (token.patient_id, token.id)] if count else []
    return (*token.top[:count], *sorted(behind, key=lambda one: one.id != token.patient_id))


def _tell(job: Job, event: Step | Exception) -> None:
    try:
        job.emit(event)
    except Exception:  # the receiver is gone: that must not end the round of the others
        job.cancelled = True
