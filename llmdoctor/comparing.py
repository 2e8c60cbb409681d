"""Comparisons of many questions: any number of columns, several turns, several samples, in batches.

A column is one way to answer. Its answers can be had as they finish, and those that are known already are not asked for
again: so a run that was stopped goes on where it was.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from llmdoctor.answers import measures
from llmdoctor.errors import UsageError
from llmdoctor.records import Answer, Comparison, Estimate, GuidedToken, Message, Question, Versus
from llmdoctor.settings import GREATEST_SEED, Guidance, Sampling

if TYPE_CHECKING:
    from llmdoctor.assistant import LLMdoctor


class Key(NamedTuple):
    """Which answer: the column's name, and the numbers of the question, the sample and the turn, all from 1."""

    column: str
    question: int
    sample: int
    turn: int


Timed = tuple[Answer, float]  # an answer and its seconds
_MOST_ANSWERS = 10_000_000


def _with_infinity(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _with_infinity(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_with_infinity(value) for value in data]
    return -math.inf if data is None else data


class KeptAnswer(BaseModel):
    """A line of a file of answers, as far as it is read again. JSON has no infinity: null stands for -inf."""

    model_config = ConfigDict(defer_build=True)  # only who goes on with a file of answers needs it

    column: str
    question: int = Field(ge=1)
    sample: int = Field(ge=1)
    turn: int = Field(ge=1)
    answer: Annotated[Answer, BeforeValidator(_with_infinity)]
    seconds: float = Field(ge=0, allow_inf_nan=False)
    run_seed: int = Field(ge=0, le=GREATEST_SEED)
    command: str

    @field_validator("answer")
    @classmethod
    def _of_one_kind(cls, answer: Answer) -> Answer:
        if len({(*token.doctor_logprobs, None, *token.values) for token in answer.tokens}) != 1:
            raise ValueError("expected tokens, all with the same doctors")
        return answer


class Answers(Protocol):
    """What a column needs of `LLMdoctor`, or of the models of a server."""

    def answer_all(
        self,
        prompts: Sequence[list[Message]],
        *,
        guided: bool,
        guidance: Guidance | None,
        seed: Sequence[int],
        top: int,
        follow: bool,
        rows: int,
        on_token: Callable[[GuidedToken], None] | None,
        on_answer: Callable[[int, Answer], None] | None,
        **sampling: Any,
    ) -> list[Answer]:
        """Answer all prompts."""
        ...


@dataclass(frozen=True, slots=True)
class Column:
    """One way to answer. ``guidance`` None is the patient alone; a seed in ``sampling`` replaces that of the run.

    ``assistant`` may be None where every answer is known.
    """

    name: str
    assistant: Answers | None
    guidance: Guidance | None
    sampling: Sampling

    def seed(self, seed: int, sample: int) -> int:
        """Of this sample, in a run with this seed."""
        return (seed if self.sampling.seed is None else self.sampling.seed) + sample - 1

    def settings(self, seed: int) -> dict[str, Any]:
        """What `Comparison.settings` states."""
        return (self.guidance or Guidance()).to_dict() | self.sampling.replace(seed=seed).model_dump()


def both_sides(assistant: "LLMdoctor", guidance: Guidance | None = None, **sampling: Any) -> list[Column]:
    """The patient alone and the guided patient, where nothing else is given with the assistant's settings of now."""
    how = assistant.sampling.replace(**sampling, seed=None)
    return [Column("patient", assistant, None, how), Column("guided", assistant, guidance or assistant.guidance, how)]


@dataclass(frozen=True, slots=True)
class Run:
    """Questions to be answered in every column. Sample i of a question has ``seed`` + i - 1.

    Each column has a conversation of its own: its second turn follows its own first answer. ``rows`` conversations are
    decoded together; what is said does not depend on it. Answers that are in ``known`` are not asked for; the others
    are added to it, and go to ``on_answer`` as they are finished. ``on_token`` gets the column's name and the token.
    ``top`` and ``follow`` are those of `LLMdoctor.answer_all`. ``keep`` False forgets answers
    once they have been compared. An answer's seconds are its share of those of its batch: at every moment, the answers
    that are still being made share the time equally.
    """

    questions: Sequence[Question]
    seed: int
    samples: int = 1
    rows: int = 32
    top: int = 0
    follow: bool = False
    known: dict[Key, Timed] = field(default_factory=dict)
    keep: bool = True
    on_token: Callable[[str, GuidedToken], None] | None = None
    on_answer: Callable[[Key, Timed], None] | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for more answers than anyone can wait for: the list of them would take all memory."""
        count = self.samples * sum(len(question.turns) for question in self.questions)
        if count > _MOST_ANSWERS:
            raise UsageError(f"expected at most {_MOST_ANSWERS:,} answers in all, got {count:,}: take fewer samples")

    def compare(self, columns: Sequence[Column]) -> Iterator[Comparison]:
        """The columns beside each other: a comparison per turn of every question and sample, in this order.

        The first column is the patient alone, the second one guided; further ones become `Comparison.vs`.
        """
        keys = list(self.keys(""))
        for chunk in self._chunks(keys):
            for column in columns:
                self._answer(column, chunk)
            for key in chunk:
                yield self._comparison(columns, key)
            for key in () if self.keep else (key._replace(column=one.name) for key in chunk for one in columns):
                del self.known[key]

    def answers(self, column: Column) -> list[Answer]:
        """All answers of one column, by question, sample and turn."""
        keys = list(self.keys(column.name))
        for chunk in self._chunks(keys):
            self._answer(column, chunk)
        return [self.known[key][0] for key in keys]

    def measures(self, column: Column) -> dict[str, Estimate]:
        """`answers.measures` of all answers of one column."""
        answers = self.answers(column)
        return measures(answers, self.groups(), [self.known[key][1] for key in self.keys(column.name)])

    def keys(self, column: str) -> Iterator[Key]:
        """All answers of a column, by question, sample and turn."""
        for number, question in enumerate(self.questions, start=1):
            for sample in range(1, self.samples + 1):
                yield from (Key(column, number, sample, turn) for turn in range(1, len(question.turns) + 1))

    def groups(self) -> list[int] | None:
        """The question of every answer of a column: what the intervals of its measures are over.

        None for a single question, whose answers then stand for themselves.
        """
        return [key.question for key in self.keys("")] if len(self.questions) > 1 else None

    def missing(self, columns: Iterable[Column]) -> int:
        """How many answers are not known yet."""
        return sum(key not in self.known for column in columns for key in self.keys(column.name))

    def _chunks(self, keys: Sequence[Key]) -> Iterator[list[Key]]:
        """The keys of ``rows`` conversations at a time."""
        begins = [i for i, key in enumerate(keys) if key.turn == 1]
        for first in range(0, len(begins), self.rows):
            after = first + self.rows
            yield list(keys[begins[first] : begins[after] if after < len(begins) else len(keys)])

    def _answer(self, column: Column, chunk: Sequence[Key]) -> None:
        """Add what the column says to ``known``, turn after turn."""
        keys = [key._replace(column=column.name) for key in chunk]
        for turn in range(1, max(key.turn for key in keys) + 1):
            if asked := [key for key in keys if key.turn == turn and key not in self.known]:
                self._answer_batch(column, asked)

    def _answer_batch(self, column: Column, keys: Sequence[Key]) -> None:
        assert column.assistant is not None
        on_token = self.on_token
        last, share, left = time.perf_counter(), 0.0, len(keys)

        def keep(row: int, answer: Answer) -> None:
            nonlocal last, share, left
            now = time.perf_counter()
            last, share, left = now, share + (now - last) / left, left - 1
            self.known[keys[row]] = answer, share
            if self.on_answer:
                self.on_answer(keys[row], self.known[keys[row]])

        column.assistant.answer_all(
            [self._history(key) for key in keys],
            guided=column.guidance is not None,
            guidance=column.guidance,
            seed=[column.seed(self.seed, key.sample) for key in keys],
            top=self.top,
            follow=self.follow,
            rows=len(keys),
            on_token=on_token and (lambda token: on_token(column.name, token)),
            on_answer=keep,
            **column.sampling.model_dump(exclude={"seed"}),
        )

    def _history(self, key: Key) -> list[Message]:
        """The conversation that ends with this turn's question; the answers in it are the column's own."""
        messages: list[Message] = []
        for turn, asked in enumerate(self.questions[key.question - 1].turns[: key.turn], start=1):
            messages += [Message(role="user", content=asked)] if isinstance(asked, str) else asked
            if turn < key.turn:
                said = self.known[key._replace(turn=turn)][0].text
                messages.append(Message(role="assistant", content=said))
        return messages

    def _comparison(self, columns: Sequence[Column], key: Key) -> Comparison:
        question = self.questions[key.question - 1]
        asked = question.turns[key.turn - 1]
        alone, *others = (self.known[key._replace(column=column.name)] for column in columns)
        guided, *vs = (
            Versus(column.name, column.settings(column.seed(self.seed, key.sample)), said[0], _metrics(alone, said))
            for column, said in zip(columns[1:], others, strict=True)
        )
        return Comparison(
            prompt=asked if isinstance(asked, str) else list(asked),
            settings=guided.settings,
            patient=alone[0],
            guided=guided.answer,
            metrics=guided.metrics,
            id=question.id,
            turn=key.turn,
            sample=key.sample,
            vs=tuple(vs),
        )


def _metrics(alone: Timed, guided: Timed) -> Mapping[str, Any]:
    tokens = guided[0].tokens
    flips, kl, length = sum(t.flip for t in tokens), sum(t.kl for t in tokens), len(tokens)
    return {
        "flips": flips,
        "flip_rate": flips / length,
        "kl": kl,
        "kl_per_token": kl / length,
        "mean_values": {name: sum(t.values[name] for t in tokens) / length for name in tokens[0].values},
        "patient_tokens": len(alone[0].tokens),
        "guided_tokens": length,
        "patient_seconds": alone[1],
        "guided_seconds": guided[1],
    }
