"""The answers of ``compare`` and ``eval`` while they are made, and the file of ``--output`` that keeps them.

The file has a line of JSON per answer, written when the answer is finished. The same command goes on there.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from llmdoctor.cli import options
from llmdoctor.cli.terminal import Advance, every_ten_seconds, progress, say
from llmdoctor.errors import LoadError, UsageError
from llmdoctor.files import is_stream, locked, no_constant, open_to_append, storage_errors
from llmdoctor.harmless import json_text
from llmdoctor.show.formats import counted

if TYPE_CHECKING:
    from llmdoctor.cli.compare_columns import Plan
    from llmdoctor.comparing import Column, Key, Timed
    from llmdoctor.profile import Profile
    from llmdoctor.records import Question

_LONGEST = 1 << 28  # bytes of a line
_BEGINS = b'{"id": "'  # a line
_NEVER_KEPT = "nothing was kept: with --output FILE every answer is, and the same command goes on there"


class KeptRun:
    """A run whose answers go to ``path``, one by one, and that takes those which are there already.

    All but ``rows`` must be the same as for the answers that are there; where ``seed`` is None it is that of the file.
    ``samples``, ``top`` and ``follow`` are those of `Run`. ``weights`` tell the models of a server from others; by
    default the files of the models do. Without a ``path`` nothing is kept. Raises UsageError for a file of another
    command or another ``seed``, and if another run writes to it. As a context it closes the file and says what is in
    it, also after Ctrl+C.
    """

    def __init__(
        self,
        path: Path | None,
        plans: "Sequence[Plan]",
        questions: "Sequence[Question]",
        seed: int | None,
        *,
        samples: int,
        rows: int,
        top: int = 0,
        follow: bool = False,
        kl_budget: float | None = None,
        weights: Sequence[str] | None = None,
    ) -> None:
        from llmdoctor.comparing import Run

        known: dict[Key, Timed] = {}
        self._command = ""
        with ExitStack() as stack:
            if path is not None:
                told = _weights(plan.profile for plan in plans) if weights is None else list(weights)
                command = {"samples": samples, "top": top, "follow": follow, "kl_budget": kl_budget, "weights": told}
                self._command = _fingerprint(plans, questions, command)
                if not is_stream(path):
                    stack.enter_context(locked(path, beside=True))
                    known, seed = _read(path, self._command, seed)
            self.run = Run(
                questions,
                options.fresh_seed() if seed is None else seed,
                samples=samples,
                rows=rows,
                top=top,
                follow=follow,
                known=known,
                on_token=self._on_token,
                on_answer=self.keep,
            )
            self._lock = stack.pop_all()
        self.answers = 0
        self._path = path
        self._kept = len(known)
        self._told = not known
        self._tokens = self._total = 0
        self._columns: dict[str, Column] = {}
        self._file: TextIO | None = None
        self._advance: Advance | None = None
        self._plain: Callable[[str], None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self._file is not None:
                # the reader of a FIFO waits for this; a failed write fails here again
                with suppress(OSError) if kind is not None or self._path is None else storage_errors(self._path):
                    self._file.close()
        if kind is None:
            if self._file is not None:
                say(f"wrote {self._path}")
        elif self._kept:
            say(f"kept {counted(self._kept, 'answer')} in {self._path}; run the same command again to go on")
        elif kind is KeyboardInterrupt and self._tokens:
            say(_NEVER_KEPT if self._path is None else f"no answer was finished: {self._path} holds none")

    def begin(self, columns: "Sequence[Column]") -> int:
        """The answers that follow are those of these columns; how many of them are missing."""
        self._columns |= {column.name: column for column in columns}
        missing = self.run.missing(columns)
        if not self._told:
            all_of_them = f"all {counted(self._kept, 'answer')}" if self._kept > 1 else "the answer"
            going_on = f"going on after {counted(self._kept, 'answer')}"
            say(f"{self._path}: {going_on if missing else f'holds {all_of_them} already'}")
            self._told = True
        self._total = self.answers + missing
        return missing

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Progress on stderr while answers are made."""
        # it counts its ten seconds from the first answer on, not while models load
        self._plain = self._plain or every_ten_seconds()
        with progress("Asking", self._total, "answer", self._plain) as advance:
            self._advance = advance
            try:
                yield
            finally:
                self._advance = None

    def keep(self, key: "Key", timed: "Timed") -> None:
        """Write the answer, on the disk before the next one is finished."""
        self.answers += 1
        if self._path is None:
            return
        if self._file is None:
            self._file = open_to_append(self._path)
        question, column = self.run.questions[key.question - 1], self._columns[key.column]
        line = {
            "id": question.id,
            **key._asdict(),
            "prompt": question.turns[key.turn - 1],
            "settings": column.settings(column.seed(self.run.seed, key.sample)),
            "answer": timed[0].to_dict(),
            "seconds": timed[1],
            "run_seed": self.run.seed,
            "command": self._command,
        }
        with storage_errors(self._path):
            self._file.write(json_text(line) + "\n")
            self._file.flush()
        self._kept += 1

    def _on_token(self, _column: str, _token: object) -> None:
        self._tokens += 1
        if self._advance:
            self._advance(counted(self._tokens, "token"), done=self.answers)


def _read(path: Path, command: str, seed: int | None) -> "tuple[dict[Key, Timed], int | None]":
    """The answers that are there, and their seed. A line that a stop has cut is removed from the file."""
    from llmdoctor.comparing import KeptAnswer, Key

    if not path.exists():
        return {}, seed
    found: dict[Key, Timed] = {}
    whole = 0
    with storage_errors(path), path.open("rb") as lines:
        while line := lines.readline(_LONGEST):
            complete = line.endswith(b"\n")
            try:
                kept = KeptAnswer.model_validate(json.loads(line, parse_constant=no_constant))
            except (ValueError, RecursionError) as error:
                ours = line.startswith(_BEGINS) or _BEGINS.startswith(line)
                # or within a letter of several bytes
                if ours and not complete and isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                    break
                raise UsageError(
                    f"{path} holds something else than answers of compare or eval: give another --output"
                ) from error
            if kept.command != command:
                raise UsageError(f"{path} holds answers of another command: give another --output, or remove it")
            if seed not in (None, kept.run_seed):
                raise UsageError(
                    f"{path} holds answers of seed {kept.run_seed}, not {seed}: give another --output, or that seed"
                )
            if not complete:
                break
            seed = kept.run_seed
            found[Key(kept.column, kept.question, kept.sample, kept.turn)] = kept.answer, kept.seconds
            whole += len(line)
    if path.stat().st_size > whole:
        with storage_errors(path), path.open("r+b") as file:
            file.truncate(whole)
    return found, seed


def _fingerprint(plans: "Sequence[Plan]", questions: "Sequence[Question]", command: Mapping[str, Any]) -> str:
    """What a run has to have in common with the one that it goes on with."""
    columns = [
        [
            plan.name,
            plan.profile.model_dump(mode="json", include={"patient", "doctors", "decode"}),
            None if plan.guidance is None else plan.guidance.to_dict(),
            plan.sampling.model_dump(mode="json"),
        ]
        for plan in plans
    ]
    turns = [question.turns for question in questions]
    told = {"columns": columns, "prompts": turns, **command}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _weights(profiles: "Iterable[Profile]") -> dict[str, str]:
    """What tells the models at every place from others that were there before; each place is read once."""
    from llmdoctor.model_source import doctor_fingerprint, model_fingerprint

    profiles = list(profiles)
    found = {
        place: doctor_fingerprint(place)
        for place in {str(doctor.checkpoint) for profile in profiles for doctor in profile.doctors.values()}
    }
    for model in {profile.patient.model for profile in profiles}:
        with suppress(LoadError):  # a model of the hub that is not here yet
            found[model] = model_fingerprint(model)
    return found
