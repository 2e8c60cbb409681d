"""The decoding loop: rounds over a batch of prompts that may join and leave at any time.

A round drafts some tokens with a doctor, lets every model read them, draws the tokens from the product as far as the
drafts agree, and takes back what was drafted beyond. A round of no drafts is the plain path: one forward per model and
token.

A prompt that joins is read by itself, at once or in pieces between the others' rounds. Then it becomes a row of a lane:
rows whose tokens lie in the same slots. Rows of very different length would read each other's padding, and so form
several lanes, which take turns within a round.
"""

import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmdoctor.decoding.caches import recordings
from llmdoctor.decoding.drafting import LENGTHS, Drafting
from llmdoctor.decoding.ensemble import Ensemble
from llmdoctor.decoding.prefill import Pieces
from llmdoctor.decoding.prefix import WORTH, PrefixCache, SharedPrefixes, common
from llmdoctor.decoding.round import Place, Round, draw_round
from llmdoctor.decoding.rows import Request, Row, Step
from llmdoctor.errors import LLMDoctorWarning, UsageError
from llmdoctor.models import Patient, context_of, require_embedded
from llmdoctor.settings import Guidance, check_guidance
from llmdoctor.training.folder import LoadedDoctor

# A forward of its own costs about as much as reading so many empty slots: rows join a lane that adds no more of them,
# or a quarter of the slots that both need.
_PADDING = 512


@dataclass(eq=False)
class _Lane:
    """Rows whose models move together."""

    models: Ensemble
    rows: list[Row]


class Batch:
    """Prompts that are answered together, each as if it were alone.

    Every row has its own guidance, sampling, budget, stop strings and seed. ``top`` asks for that many alternatives to
    every token, ``follow`` for what the patient alone would draw in its place. ``drafting`` lets a doctor draft ahead;
    the tokens stay the same, up to the rounding of the models' own arithmetic. ``draft_model``, with the patient's
    tokens, drafts in place of a doctor. ``with_bases`` is needed for mode "ratio". ``prefix_cache`` keeps the caches of
    one prompt for the next; such a batch holds one row at a time. ``pieces`` bounds what is read of prompts before each
    round; without it all of them are read at once. ``prefixes`` keeps what was read for the prompts that begin alike;
    it serves the models of this batch alone. Raises UsageError for ``with_bases`` where a doctor has no base.

        batch = Batch(patient, doctors)
        batch.join([Request(prompt, lambda: guidance, sampling, seed=1)])
        while batch:
            for step in batch.round():
                ...                              # batch.join(...) and batch.leave(...) at any time
    """

    def __init__(
        self,
        patient: Patient,
        doctors: Mapping[str, LoadedDoctor],
        *,
        top: int = 0,
        follow: bool = False,
        drafting: Drafting | None = None,
        draft_model: PreTrainedModel | None = None,
        with_bases: bool = False,
        prefix_cache: PrefixCache | None = None,
        pieces: Pieces | None = None,
        prefixes: SharedPrefixes | None = None,
    ) -> None:
        if with_bases and (lacking := [name for name, doctor in doctors.items() if doctor.base is None]):
            raise UsageError(f'mode "ratio" needs the base model of doctor {lacking[0]!r}: load it with mode="ratio"')
        self.patient, self.doctors, self.top, self.drafting = patient, doctors, top, drafting
        self.follow = follow
        self.with_bases, self.prefix_cache = with_bases, prefix_cache
        self.pieces = pieces
        # a store without room would only make prompts wait for each other
        self.prefixes = prefixes if prefixes is not None and prefixes.most else None
        self.draft_model = draft_model if drafting is not None else None
        self.context = min([patient.context, *(context_of(doctor.model) for doctor in doctors.values())])
        # On a CPU, this thread's own time: it holds the busy waiting for torch's threads, but not the time that other
        # programs take. Elsewhere the models run outside the thread, and on Windows its clock is too coarse.
        own_time = patient.model.device.type == "cpu" and sys.platform != "win32"
        self._now: Callable[[], float] = time.thread_time if own_time else time.perf_counter
        if drafting is None and pieces is None:  # nobody asks how long a round takes: float() is 0.0
            self._now = float
        self._lanes: list[_Lane] = []  # beyond their prompts
        self._arriving: list[_Lane] = []  # whose prompts are being read
        self._waiting: list[Row] = []  # whose prompts nobody has begun to read
        self._oldest_next = False
        self._joined = 0
        self._in_round = False
        self._failure: Exception | None = None
        self._warned = False

    def __bool__(self) -> bool:
        return bool(self._unfinished())

    def __contains__(self, number: int) -> bool:
        """Whether the row of this number is still being answered."""
        return any(row.number == number for row in self._unfinished())

    @property
    def broken(self) -> bool:
        """Whether a round has failed, or was left, before its end: then nothing can go on."""
        return self._in_round

    def _unfinished(self) -> list[Row]:
        lanes = [row for lane in (*self._lanes, *self._arriving) for row in lane.rows]
        return [row for row in (*lanes, *self._waiting) if not row.ended]

    def join(self, requests: Sequence[Request]) -> list[int]:
        """Add prompts, which start with the next round; the numbers of their rows.

        Raises UsageError, and adds none, for guidance that names no doctor of this batch or needs bases that it was
        opened without, for a prompt that is empty or fills the context, and for a ``first`` that is no token.
        """
        if self.prefix_cache is not None and len(requests) + len(self._unfinished()) > 1:
            raise UsageError("a prefix cache holds one conversation; got several prompts")
        rows: list[Row] = []
        for request in requests:
            if not request.prompt:
                raise UsageError("the prompt is empty: it has no token to continue from")
            self.patient.require_embedded(request.prompt)
            for name, doctor in self.doctors.items():
                require_embedded(doctor.model, self.patient.tokenizer, request.prompt, f"the doctor {name}")
            if (room := self.context - len(request.prompt)) <= 0:
                raise UsageError(
                    f"the prompt is {len(request.prompt)} tokens long and the models' context holds {self.context}: "
                    "shorten it, or reset the conversation"
                )
            if request.first is not None and not 0 <= request.first < self.patient.vocabulary.size:
                raise UsageError(f"there is no token {request.first}: expected an id of the patient's vocabulary")
            rows.append(Row(self._joined + len(rows), request, self.patient, room))
            self._guidance(rows[-1])
        self._joined += len(rows)
        self._waiting += rows
        return [row.number for row in rows]

    def leave(self, number: int) -> None:
        """End a row before its time; nothing more of it is yielded. No such row: nothing happens."""
        for row in self._unfinished():
            if row.number == number:
                row.ended = "left"
        if not self._in_round:
            self._drop_ended()

    def round(self) -> Iterator[Step]:
        """The next tokens of every row, as they are drawn, row after row. Run it to its end before the next round.

        A row whose prompt is being read in pieces has none. A row whose guidance raises, or has become wrong, leaves;
        its error is raised at the end of the round, and the others can go on. Raises LoadError at once for a model
        without a KV cache and for log-probs that are not numbers, and UsageError when the last round was not run to its
        end.
        """
        if self._in_round:
            raise UsageError("the last round of this batch was not run to its end: open a new batch")
        self._in_round = True
        yield from self._first_round()
        clock = _Clock(self._now)
        for lane in list(self._lanes):
            yield from self._next_round(lane, clock)
        if self.pieces is not None and clock.seconds:
            self.pieces.record_round(clock.seconds)
        self._in_round = False
        self._drop_ended()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _first_round(self) -> Iterator[Step]:
        """Read waiting prompts, or a piece of one. Draw the first token of those read to the end; add their rows."""
        self._drop_ended()
        if not self._arriving and not self._waiting:
            return
        in_pieces = self.pieces is not None and self.prefix_cache is None
        tokens = self.pieces.choose(bool(self._lanes)) if self.pieces is not None and in_pieces else None
        if tokens == 0:
            return
        clock = _Clock(self._now)
        with clock:
            lane = self._next_to_read(tokens)
            unread = lane.models.unread
            round_ = lane.models.prefill(tokens)
        if self.pieces is not None:
            self.pieces.record(unread if round_ else unread - lane.models.unread, clock.seconds)
        for i, row in enumerate(lane.rows):
            self._remember(lane, i, row)
        if round_ is None:
            return
        self._ask(lane.rows)
        yield from self._emit(lane, round_, _keys(lane.rows, 1), _Clock(self._now))
        self._arriving.remove(lane)
        if lane.rows:
            self._add(lane)

    def _next_to_read(self, tokens: int | None) -> _Lane:
        """Whose prompt is read now: the one that came first and the one with the least left, in turns.

        So a short prompt does not wait for the end of a long one, nor a long one for ever. Prompts that are short
        enough together are read together.
        """
        left = {lane.rows[0].number: lane.models.unread for lane in self._arriving}
        fresh: list[Row] = []
        for row in self._waiting:
            if (unread := self._unread(row, fresh)) is not None:
                fresh.append(row)
                left[row.number] = unread
        number = min(left) if self._oldest_next else min(left, key=lambda one: (left[one], one))
        self._oldest_next = not self._oldest_next
        for lane in self._arriving:
            if lane.rows[0].number == number:
                return lane
        rows: list[Row] = []
        longest = 0
        for row in sorted(fresh, key=lambda row: (row.number != number, row.number)):
            longest = max(longest, left[row.number])
            if rows and tokens is not None and longest * (len(rows) + 1) > tokens:
                break
            rows.append(row)
        return self._open(rows)

    def _unread(self, row: Row, before: Sequence[Row]) -> int | None:
        """How many tokens of a waiting prompt are to be read; None while another reads much of it."""
        prompt = row.request.prompt
        if self.prefixes is None:
            return len(prompt)
        known, own = self.prefixes.length(prompt), tuple(prompt[:-1])
        others = {lane.rows[0]: max(known, lane.models.slots - 1) + 1 for lane in self._arriving}
        others |= dict.fromkeys(before, known + WORTH)  # for less it would miss being read together with them
        for other, worth in others.items():
            ids = other.request.prompt
            # most begin otherwise, which is told at a glance
            if tuple(ids[:WORTH]) == own[:WORTH] and common(tuple(ids), own) >= max(worth, WORTH):
                return None
        return len(prompt) - known

    def _open(self, rows: list[Row]) -> _Lane:
        """A lane for prompts that nobody has begun to read."""
        prompts = [row.request.prompt for row in rows]
        models = Ensemble(
            self.patient,
            self.doctors,
            prompts,
            draft_model=self.draft_model if self._in_reach(max(map(len, prompts))) else None,
            with_bases=self.with_bases,
            prefix_cache=self.prefix_cache,
            prefixes=[self.prefixes.find(prompt) for prompt in prompts] if self.prefixes is not None else (),
        )
        self._waiting = [row for row in self._waiting if row not in rows]
        self._arriving.append(_Lane(models, rows))
        return self._arriving[-1]

    def _add(self, lane: _Lane) -> None:
        """Add the rows of a lane to the one that they fit best, or keep it as one of its own."""
        found = [(*other.models.padding(lane.models), other) for other in self._lanes]
        empty, needed, other = min(found, key=lambda one: one[0], default=(0, 0, lane))
        fits = empty <= max(_PADDING, needed // 4) and lane.models.can_join and other.models.can_join
        if other is not lane and fits:
            other.models.join(lane.models)
            other.rows += lane.rows
        else:
            self._lanes.append(lane)

    def _remember(self, lane: _Lane, at: int, row: Row, drafted: int = 0) -> None:
        """Keep what the models have read of a row for the prompts that begin with it."""
        if self.prefixes is None or row.ended == "left" or len(row.history) < WORTH:
            return
        if (prefix := lane.models.prefix(at, drafted)) is not None:
            self.prefixes.add(row.history, prefix)
        else:
            self.prefixes = None  # of these models nothing can be kept: no prompt is to wait for another

    def _next_round(self, lane: _Lane, all_lanes: "_Clock") -> Iterator[Step]:
        """Draft, let every model read the drafts, draw, and take back what was rejected."""
        rows, models, clock = lane.rows, lane.models, _Clock(self._now)
        if not models.knows_late:
            self._ask(rows)
        self._drop_ended()
        if not rows:
            return
        if models.has_draft_model and not self._in_reach(models.slots):
            models.drop_draft_model()
        drafting = self._drafting_now(models)
        length = self._draft_length(drafting, rows) if drafting else 0
        count, slots, recorded = len(rows), models.slots, recordings()
        if drafting and length:
            reading = _Clock(self._now)
            with reading:
                models.catch_up()
            drafting.record_reading(count, reading.seconds)
            all_lanes.seconds += reading.seconds
        with clock:
            guidances, samplings = [row.guidance for row in rows], [row.sampling for row in rows]
            keys_B_J = _keys(rows, length + 1)
            round_, late = models.propose(length, guidances, samplings, keys_B_J)
        if models.knows_late:  # only now can the last token be shown, and the guidance of the next one be asked for
            for row, values in zip(rows, late, strict=True):
                yield from self._show_pending(row, values)
            self._ask(rows)
        accepted = yield from self._emit(lane, round_, keys_B_J, clock)
        if drafting:
            tested = sum(min(own + 1, length) for own in accepted)
            seconds = clock.seconds if recordings() == recorded else 0.0  # no time that says anything
            drafting.record(count, slots, length, sum(accepted), tested, seconds)
        all_lanes.seconds += clock.seconds

    def _show_pending(self, row: Row, late: Mapping[str, float]) -> Iterator[Step]:
        """Yield a row's pending token with its log V."""
        if row.pending is None or row.ended:
            return
        (place, values), row.pending = row.pending, None
        yield from self._steps(row, place, {**values, **late})

    def _emit(
        self, lane: _Lane, round_: Round, keys_B_J: torch.Tensor, clock: "_Clock"
    ) -> Generator[Step, None, list[int]]:
        """Draw and yield the tokens of a round, and bring the models behind them. Rows that end leave the lane.

        Returns how many drafts were accepted of each row that had not ended, before any guidance changed.
        """
        models, rows = lane.models, lane.rows
        if all(row.ended for row in rows):
            self._remember_ended(lane, range(len(rows)), round_.length)
            rows.clear()
            return []
        with clock:
            drawn = self._draw(round_, rows, keys_B_J)
        found = [len(places) - 1 for row, places in zip(rows, drawn, strict=True) if not row.ended]
        for i, row in enumerate(rows):
            place = 0
            while not row.ended:
                used = row.guidance
                if place and self._ask([row]) and row.guidance is not used and row.guidance != used:
                    # it changed since the last token was shown: draw the rest of the round again under the new one
                    rest = round_.of_row(i, place)
                    drawn[i][place:] = self._draw(rest, [row], _keys([row], rest.length + 1))[0]
                if row.ended or place == len(drawn[i]) - 1:
                    break  # the last token was not drafted: the doctors have to read it before it is shown
                yield from self._steps(row, drawn[i][place], drawn[i][place].values)
                place += 1
        # The token behind the accepted drafts is shown only after the doctors have read it, with their log V: those
        # that are heads on the patient do so in the next round.
        self._remember_ended(lane, range(len(rows)), round_.length)
        staying = [i for i, row in enumerate(rows) if not row.ended]
        if staying:
            accepted = [len(drawn[i]) - 1 for i in staying]
            last = [drawn[i][-1].drawn.id for i in staying]
            with clock:
                values = models.settle(round_, staying, accepted, last)
            for i, own in zip(staying, values, strict=True):
                if models.knows_late:
                    rows[i].pending = drawn[i][-1], own
                elif not rows[i].ended:  # it may have left while the others' tokens were shown
                    yield from self._steps(rows[i], drawn[i][-1], own)
            self._remember_ended(lane, staying)
            left = [at for at, i in enumerate(staying) if not rows[i].ended]
            if 0 < len(left) < len(staying):
                models.keep(left)
        rows[:] = [row for row in rows if not row.ended]
        return found

    def _remember_ended(self, lane: _Lane, rows: Sequence[int], drafted: int = 0) -> None:
        """Of these rows of the lane, which are all that its models hold, keep those that have ended."""
        for at, i in enumerate(rows):
            if lane.rows[i].ended:
                self._remember(lane, at, lane.rows[i], drafted)

    def _draw(self, round_: Round, rows: Sequence[Row], keys_B_J: torch.Tensor) -> list[list[Place]]:
        forced = [row.request.first if row.position == 0 else None for row in rows]
        guidances, samplings = [row.guidance for row in rows], [row.sampling for row in rows]
        forbidden: list[list[set[int]]] = []
        if any(sampling.no_repeat_ngram for sampling in samplings):
            forbidden = [row.forbidden(drafts) for row, drafts in zip(rows, round_.drafts_B_K.tolist(), strict=True)]
        return draw_round(
            round_, guidances, samplings, keys_B_J, top=self.top, forced=forced, forbidden=forbidden, follow=self.follow
        )

    def _steps(self, row: Row, place: Place, values: Mapping[str, float]) -> Iterator[Step]:
        """Take a place's token: the steps that may be shown now."""
        if place.drawn.id in self.patient.eos_ids:
            # log V(s_T) = 0 is part of how an anchored doctor is trained, not something that its head has learnt
            values = {name: 0.0 if self.doctors[name].anchored else value for name, value in values.items()}
        if self.prefix_cache is not None:
            self.prefix_cache.ids.append(place.drawn.id)
        for step in row.take(place, values):
            if row.ended != "left":
                yield step

    def _ask(self, rows: Sequence[Row]) -> bool:
        """Ask for the guidance of every row's next token. A row whose guidance fails leaves; False when any did."""
        now: dict[int, Guidance | Exception] = {}  # by function: rows that share one share what it returns
        for row in rows:
            if row.ended:
                continue
            key = id(row.request.guidance)
            if key not in now:
                try:
                    now[key] = self._guidance(row)
                except Exception as error:  # the function is the caller's, and may raise anything
                    now[key] = error
            answer = now[key]
            if isinstance(answer, Exception):
                self._fail(row, answer)
            else:
                row.guidance = answer
        return not any(isinstance(answer, Exception) for answer in now.values())

    def _guidance(self, row: Row) -> Guidance:
        guidance = row.request.guidance()
        if guidance is not row.checked:
            check_guidance(guidance, tuple(self.doctors))
            if guidance.mode == "ratio" and self.doctors and not self.with_bases:
                raise UsageError(
                    'mode "ratio" needs the doctors\' bases from the start: set it before the answer begins '
                    "(a Batch: with_bases=True)"
                )
            row.checked = guidance
        return guidance

    def _fail(self, row: Row, error: Exception) -> None:
        row.ended = "left"
        self._failure = self._failure or error

    def _drafting_now(self, models: Ensemble) -> Drafting | None:
        """What chooses the length of drafts, where the models can take drafts back. A warning where they never can."""
        if self.drafting is None or models.can_draft:
            return self.drafting
        if (name := models.rigid) and (self.doctors or models.has_draft_model) and not self._warned:
            warnings.warn(
                f"the state of {name} cannot take tokens back: decoding without speculation",
                LLMDoctorWarning,
                stacklevel=2,
            )
            self._warned = True
        return None

    def _in_reach(self, slots: int) -> bool:
        """Whether the draft model's own context, if there is one, holds so many tokens and the longest draft."""
        return self.draft_model is None or slots + LENGTHS[-1] + 1 <= context_of(self.draft_model)

    def _draft_length(self, drafting: Drafting, rows: Sequence[Row]) -> int:
        """How many tokens to draft: never beyond a row's context, nor beyond the greatest budget that is left."""
        # a row whose own budget ends within the draft simply ends there
        context = min(row.room - row.drawn for row in rows)
        room = min(context, max(row.left for row in rows))
        return min(drafting.choose(len(rows)), room - 1) if room > 1 else 0

    def _drop_ended(self) -> None:
        """Free the rows that have ended, and the models' caches with the last of a lane."""
        for lane in self._lanes:
            staying = [i for i, row in enumerate(lane.rows) if not row.ended]
            if 0 < len(staying) < len(lane.rows):
                lane.models.keep(staying)
            lane.rows[:] = [lane.rows[i] for i in staying]
        self._lanes = [lane for lane in self._lanes if lane.rows]
        self._arriving = [lane for lane in self._arriving if not all(row.ended for row in lane.rows)]
        self._waiting = [row for row in self._waiting if not row.ended]


class _Clock:
    """Adds up the time that the models take, without what happens to their tokens in between."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.seconds, self._began, self._now = 0.0, 0.0, now

    def __enter__(self) -> None:
        self._began = self._now()

    def __exit__(self, *_: object) -> None:
        self.seconds += self._now() - self._began


def _keys(rows: Sequence[Row], count: int) -> torch.Tensor:
    return torch.tensor([row.ahead(count) for row in rows])
