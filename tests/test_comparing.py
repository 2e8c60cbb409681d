"""Runs of several columns: whose time it is, and what is kept."""

from types import SimpleNamespace
from typing import Any

import pytest

from llmdoctor import comparing
from llmdoctor.comparing import Column, Run
from llmdoctor.records import Answer, GuidedToken, Question
from llmdoctor.settings import Guidance, Sampling

TOKEN = GuidedToken(0, 1, "a", -1.0, {}, -1.0, {}, flip=False, kl=0.0, alpha=1.0, betas={})


class Timed:
    """Finishes its answers, last row first, at given times of a clock of its own."""

    def __init__(self, times: list[float], clock: SimpleNamespace) -> None:
        self._times, self._clock = times, clock

    def answer_all(self, prompts: Any, *, on_answer: Any, **_how: Any) -> None:
        for row, at in zip(reversed(range(len(prompts))), self._times, strict=True):
            self._clock.now = at
            on_answer(row, Answer("a", (TOKEN,), finished=True))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> tuple[Run, list[Column]]:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(comparing.time, "perf_counter", lambda: clock.now)
    questions = [Question(name, (name,)) for name in "abc"]
    sides: list[Any] = [Timed([1.0, 3.0, 9.0], clock), Timed([10.0, 10.0, 12.0], clock)]
    guidances = (None, Guidance())
    columns = [Column(f"{i}", side, guidances[i], Sampling()) for i, side in enumerate(sides)]
    return Run(questions, seed=1), columns


def test_the_answers_of_a_batch_share_its_time_while_they_are_made(run: tuple[Run, list[Column]]) -> None:
    """Alone: three for 1 s, two for 2 s, one for 6 s. The shares make up the batch's 9 s, and then 3 s."""
    found = list(run[0].compare(run[1]))
    alone = [one.metrics["patient_seconds"] for one in found]
    assert alone == pytest.approx([1 / 3 + 1 + 6, 1 / 3 + 1, 1 / 3])
    assert sum(one.metrics["guided_seconds"] for one in found) == pytest.approx(3.0)


@pytest.mark.parametrize("keep", [True, False])
def test_what_has_been_compared_may_be_forgotten(run: tuple[Run, list[Column]], keep: bool) -> None:
    forgetful = Run(run[0].questions, seed=1, keep=keep)
    assert len(list(forgetful.compare(run[1]))) == 3
    assert len(forgetful.known) == (6 if keep else 0)
