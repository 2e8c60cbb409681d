"""One prompt's answer while it is written: its budget, its random numbers, its text, its stop strings."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch

from llmdoctor.decoding.repetition import repeating
from llmdoctor.decoding.round import Place
from llmdoctor.errors import LoadError
from llmdoctor.models import Patient, not_numbers
from llmdoctor.records import Alternative, GuidedToken
from llmdoctor.settings import Guidance, Sampling
from llmdoctor.text import TextStream, text_behind

Finish = Literal["eos", "stop", "length"]
ReadGuidance = Callable[[], Guidance]


_ALONE = Guidance()


def patient_alone() -> Guidance:
    """No doctor has a say. The same object each time: it is asked for every token."""
    return _ALONE


class Step(NamedTuple):
    """One token of one row; ``finish`` says why the row ends with it, None when it goes on."""

    row: int
    token: GuidedToken
    finish: Finish | None


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt (token ids) to be answered, and how.

    ``guidance`` is called again for every token, so it may change between any two. All randomness comes from ``seed``.
    ``first`` is the first token, instead of a draw. The last ``begun`` tokens of the prompt are the beginning of the
    answer: they too are not repeated, where the sampling says so.
    """

    prompt: Sequence[int]
    guidance: ReadGuidance = patient_alone
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    first: int | None = None
    begun: int = 0


class Row:
    """The state of the answer to one request. ``room`` is the number of tokens that fit into the context."""

    def __init__(self, number: int, request: Request, patient: Patient, room: int) -> None:
        self.number, self.request, self.room = number, request, room
        self.sampling = request.sampling
        self.budget = min(self.sampling.max_new_tokens, room)
        self.position = 0
        self.ended: Finish | Literal["left"] | None = None
        self.guidance = _ALONE  # of the next token
        self.checked: Guidance | None = None  # the latest that was checked
        self._patient = patient
        # a row's own stream: a character may be spread over several tokens
        self._texts = TextStream(patient.tokenizer)
        self._generator = torch.Generator().manual_seed(request.seed)
        self._said: list[int] = []  # the answer's tokens, each without the space before it
        if self.sampling.no_repeat_ngram > 1 and (stop := patient.vocabulary.ids.get(".")) is not None:
            self._said.append(stop)  # an answer begins as its other sentences do
        self._said += self._words(request.prompt[len(request.prompt) - request.begun :])
        self._keys: list[int] = []  # of the next positions, drawn ahead
        self.history = list(request.prompt)  # and the answer behind it
        self.pending: tuple[Place, Mapping[str, float]] | None = None  # drawn, but not every doctor has read it
        self._held: list[GuidedToken] = []  # their text may be the beginning of a stop string

    def ahead(self, count: int) -> list[int]:
        """The random keys of the next ``count`` draws; the same keys until tokens are taken."""
        used = self.drawn - self.position
        # one draw at a time: the keys must not depend on how many are asked for at once
        while len(self._keys) < used + count:
            self._keys.append(int(torch.randint(torch.iinfo(torch.int64).max, (), generator=self._generator)))
        return self._keys[used : used + count]

    def forbidden(self, drafts: Sequence[int]) -> list[set[int]]:
        """The tokens that would repeat, at the next place and behind each of ``drafts``."""
        n = self.sampling.no_repeat_ngram
        if not n:
            return [set() for _ in range(len(drafts) + 1)]
        words = self._words(drafts)
        found = [repeating([*self._said, *words[:k]], n) for k in range(len(words) + 1)]
        return [{token for word in again for token in self._patient.vocabulary.spaced[word]} for again in found]

    def _words(self, ids: Sequence[int]) -> list[int]:
        """The tokens without the space before them: an answer's first word has none, and is the same word."""
        return [self._patient.vocabulary.spaceless[token] for token in ids] if self.sampling.no_repeat_ngram else []

    @property
    def drawn(self) -> int:
        """How many tokens have been drawn: those taken, and the pending one."""
        return self.position + (self.pending is not None)

    @property
    def left(self) -> int:
        """How many tokens may still be drawn."""
        if self.pending is not None and self.pending[0].drawn.id in self._patient.eos_ids:
            return 0
        return self.budget - self.drawn

    def take(self, place: Place, values: Mapping[str, float]) -> list[Step]:
        """Take the token of a place: the steps that may be shown now, and perhaps the end of the row.

        Raises LoadError when its log-prob is not a number.
        """
        token = self._token(place, values)
        self.position += 1
        self.history.append(token.id)
        self._said += self._words([token.id])
        del self._keys[0]
        if token.id in self._patient.eos_ids:
            self.ended = "eos"
        elif self.position >= self.budget:
            self.ended = "length"
        return self._release(token)

    def _token(self, place: Place, values: Mapping[str, float]) -> GuidedToken:
        drawn = place.drawn
        if math.isnan(drawn.logprob):
            raise LoadError(not_numbers("the models' log-probs"))
        last = drawn.id in self._patient.eos_ids or self.position + 1 >= self.budget
        text = self._texts.push(drawn.id, last=last)
        return GuidedToken(
            position=self.position,
            id=drawn.id,
            text=text,
            patient_logprob=drawn.patient_logprob,
            doctor_logprobs=drawn.doctor_logprobs,
            logprob=drawn.logprob,
            values=values,
            flip=place.flip,
            kl=place.kl,
            alpha=self.guidance.alpha,
            betas=dict(self.guidance.betas),
            top=tuple(
                Alternative(
                    id=choice.id,
                    text=self._spelt(choice.id),
                    patient_logprob=choice.patient_logprob,
                    doctor_logprobs=choice.doctor_logprobs,
                    logprob=choice.logprob,
                    rank=choice.rank,
                    patient_rank=choice.patient_rank,
                )
                for choice in place.top
            ),
            patient_id=place.patient_id,
            patient_text=text if place.patient_id == drawn.id else self._spelt(place.patient_id),
        )

    def _spelt(self, token: int) -> str:
        """The text of a token behind the last one: some pieces begin with a space only there."""
        return text_behind(self._patient.tokenizer, self.history[-1], token)

    def _release(self, token: GuidedToken) -> list[Step]:
        """All tokens held and this one, unless their text may be the beginning of a stop string.

        A stop string ends the row and is cut from the text of the tokens that hold it.
        """
        stops = self.sampling.stop
        self._held.append(token)
        text = "".join(held.text for held in self._held)
        cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            self.ended = "stop"
            for i, held in enumerate(self._held):
                self._held[i] = replace(held, text=held.text[: max(0, cut)])
                cut -= len(held.text)
        elif self.ended is None and any(
            text.endswith(stop[:n]) for stop in stops for n in range(1, min(len(stop), len(text) + 1))
        ):
            return []
        shown, self._held = self._held, []
        finish = self.ended if self.ended != "left" else None
        return [Step(self.number, one, finish if one is shown[-1] else None) for one in shown]
