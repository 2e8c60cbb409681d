"""Rows that join and leave a running batch get the very tokens that they would have got alone."""

from typing import Any

import pytest
import torch

from llmdoctor.decoding import caches
from llmdoctor.decoding.batch import Batch
from llmdoctor.decoding.caches import static
from llmdoctor.decoding.caches.dynamic import join_layers
from llmdoctor.decoding.drafting import FixedLength
from llmdoctor.decoding.rows import Request, Step
from llmdoctor.errors import LoadError, UsageError
from llmdoctor.settings import Guidance, Sampling
from tests.test_decode import SIZE, bigram, chain, doctor_of, ids_of, patient_of, text_of, tiny
from tests.test_speculative import Erratic, recurrent, same

SETTINGS = [
    (Guidance(1.0, {"a": 0.8}), Sampling(max_new_tokens=30)),
    (Guidance(0.3, {"a": 0.2, "b": 1.4}), Sampling(temperature=0.6, top_k=5, max_new_tokens=17)),
    (Guidance(0.0, {"b": 1.0}), Sampling(temperature=1.4, top_p=0.7, max_new_tokens=40, stop=("ab", "c"))),
    (Guidance(1.2, {}), Sampling(temperature=0.0, max_new_tokens=9)),
    (Guidance(0.8, {"a": 0.5, "b": 0.1}), Sampling(min_p=0.2, max_new_tokens=25)),
]


def requests(mode: Any = "product") -> list[Request]:
    """Five prompts of 1 to 23 tokens, each with settings and a seed of its own."""
    made = []
    for i, (guidance, sampling) in enumerate(SETTINGS):
        prompt = torch.randint(1, SIZE, ((7, 23, 1, 12, 3)[i],), generator=torch.Generator().manual_seed(i)).tolist()
        own = Guidance(guidance.alpha, guidance.betas, mode, 0.02)
        made.append(Request(prompt, lambda own=own: own, sampling, seed=10 * i))
    return made


def alone(patient: Any, doctors: dict[str, Any], request: Request, **more: Any) -> list[Step]:
    batch = Batch(patient, doctors, top=2, **more)
    batch.join([request])
    steps: list[Step] = []
    while batch:
        steps += batch.round()
    return steps


def numbered(steps: list[Step], row: int) -> list[Step]:
    return [step._replace(row=row) for step in steps]


@pytest.mark.parametrize(
    ("arch", "mode", "static_slots"),
    [
        ("llama", "product", False),
        ("llama", "ratio", True),
        ("qwen2", "ratio", False),
        ("mistral", "product", False),
        ("gemma3", "ratio", False),
    ],
)
@pytest.mark.parametrize("drafting", [None, FixedLength(5), Erratic(2)], ids=["plain", "fixed", "erratic"])
def test_rows_that_join_are_answered_as_if_alone(
    arch: str, drafting: Any, mode: str, static_slots: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts enter one by one, two at once, and when only one row is left; shorter and longer than what is there."""
    if static_slots:
        monkeypatch.setitem(caches.BACKENDS, "cpu", static.StaticKV)
        monkeypatch.setattr(static, "_LEAST", 16)
    patient, base = patient_of(tiny(arch, seed=3)), tiny("qwen2", seed=9)
    doctors = {
        "a": doctor_of(tiny(arch, seed=4), "a", 2, base=base),
        "b": doctor_of(tiny("llama", seed=5), "b", 3, base=base, anchored=True),
    }
    made = requests(mode)
    joining = {0: [0], 2: [1, 2], 5: [3], 14: [4]}
    batch = Batch(patient, doctors, top=2, drafting=drafting, with_bases=mode == "ratio")
    steps: dict[int, list[Step]] = {i: [] for i in range(len(made))}
    turn = 0
    while batch or turn <= max(joining):
        for i in joining.get(turn, ()):
            assert batch.join([made[i]]) == [i]
        for step in batch.round():
            steps[step.row].append(step)
        turn += 1
    for i, request in enumerate(made):
        expected = alone(patient, doctors, request, with_bases=mode == "ratio")
        same([steps[i]], [numbered(expected, i)])
        assert steps[i][-1].finish is not None


def test_guidance_of_a_joined_row_may_change_between_any_two_tokens() -> None:
    patient = patient_of(tiny("llama", seed=3))
    doctors = {"a": doctor_of(tiny("llama", seed=4), "a")}
    schedule = [Guidance(1.0, {"a": 0.9}), Guidance(0.2, {"a": 1.5}), Guidance(1.0, {"a": 0.0})]

    def run(drafting: Any, together: bool) -> list[list[Step]]:
        rows: list[list[Step]] = [[], [], []]
        batch = Batch(patient, doctors, drafting=drafting)
        for i, row in enumerate(rows):
            read = lambda row=row, i=i: schedule[(len(row) + i) % 3]  # noqa: E731
            batch.join([Request([3 + i, 5, 2 + i], read, Sampling(max_new_tokens=20, temperature=0.7), seed=i)])
            for _ in range(1 if together else 20):  # one round, then the next prompt enters; or to the end
                for step in batch.round():
                    rows[step.row].append(step)
        while batch:
            for step in batch.round():
                rows[step.row].append(step)
        return rows

    plain = run(None, together=False)
    for drafting in (None, FixedLength(4), Erratic(1)):
        same(run(drafting, together=True), plain)


def test_recurrent_rows_join_too() -> None:
    """A hybrid of state space and attention layers: its states have no slots to pad, and cannot be drafted for."""
    patient, doctors = patient_of(recurrent()), {"a": doctor_of(tiny("llama", seed=4).float(), "a")}
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    prompts = [[3, 7, 2, 9, 9, 1], [5], [4, 4, 8]]
    made = [Request(prompt, lambda: Guidance(1.0, {"a": 0.5}), sampling) for prompt in prompts]
    batch, steps = Batch(patient, doctors), [[], [], []]
    for request in made:
        batch.join([request])
        for step in batch.round():
            steps[step.row].append(step)
    while batch:
        for step in batch.round():
            steps[step.row].append(step)
    for own, request in zip(steps, made, strict=True):
        expected = alone(patient, doctors, request)
        assert ids_of(own) == ids_of(expected)
        for mine, other in zip(own, expected, strict=True):
            assert mine.token.logprob == pytest.approx(other.token.logprob, abs=1e-4)


@pytest.mark.parametrize("drafting", [None, FixedLength(3)], ids=["plain", "drafted"])
def test_a_row_leaves_at_any_time_and_disturbs_nobody(drafting: Any) -> None:
    """Between two rounds, and from within one while tokens of the same round are still to be shown."""
    patient = patient_of(tiny("llama", seed=3))
    doctors = {"a": doctor_of(tiny("qwen2", seed=4), "a"), "b": doctor_of(tiny("llama", seed=5), "b")}
    made = requests()
    expected = [numbered(alone(patient, doctors, request), i) for i, request in enumerate(made)]
    leaving = sorted(range(5), key=lambda i: len(expected[i]))[-2:]
    for within in (False, True):
        batch = Batch(patient, doctors, top=2, drafting=drafting)
        assert batch.join(made) == [0, 1, 2, 3, 4]
        steps: dict[int, list[Step]] = {i: [] for i in range(5)}
        turn = 0
        while batch:
            for step in batch.round():
                steps[step.row].append(step)
                if within and turn == 1 and step.row == min(leaving):
                    for i in leaving:
                        batch.leave(i)
            turn += 1
            if not within and turn == 2:
                for i in (*leaving, 77):
                    batch.leave(i)
        for i, whole in enumerate(expected):
            if i in leaving:
                assert 2 <= len(steps[i]) < len(whole)
            else:
                assert len(steps[i]) == len(whole)
            same([steps[i]], [whole[: len(steps[i])]])


def test_a_prompt_that_leaves_before_its_first_round_is_never_read() -> None:
    patient = patient_of(bigram(chain("abcd")))
    batch = Batch(patient, {})
    first, second = batch.join([Request([1]), Request([1])])
    batch.leave(first)
    steps: list[Step] = []
    while batch:
        steps += batch.round()
    assert {step.row for step in steps} == {second}
    assert text_of(steps) == "bcd"
    assert batch.join([Request([1])]) == [2]  # numbers are never given twice, and an empty batch starts again
    assert text_of(list(batch.round())) == "bc"  # its first round, and a round beside the others


def test_a_row_that_leaves_while_held_tokens_are_shown_shows_no_more() -> None:
    """ "bcd" is held, for it may be the beginning of the stop string; with "e" all four are shown at once."""
    batch = Batch(patient_of(bigram(chain("abcdefgh"))), {})
    batch.join([Request([1], sampling=Sampling(temperature=0, stop=("bcdx",)))])
    shown = []
    while batch:
        for step in batch.round():
            shown.append(step.token.text)
            if step.token.text == "c":
                batch.leave(step.row)
    assert shown == ["b", "c"]


def test_what_may_not_join() -> None:
    """Said when it asks, and without harm to those who are there."""
    patient, doctor = patient_of(tiny("llama", seed=3)), doctor_of(tiny("llama", seed=4), "a")
    batch = Batch(patient, {"a": doctor})
    batch.join([Request([1, 2, 3], lambda: Guidance(1.0, {"a": 0.5}), Sampling(max_new_tokens=5))])
    steps = list(batch.round())
    for request, message in (
        (Request([]), "empty"),
        (Request([1] * 128), "128 tokens long"),
        (Request([1], lambda: Guidance(1.0, {"nurse": 1.0})), "nurse"),
        (Request([1], lambda: Guidance(1.0, {"a": 1.0}, "ratio")), "ratio"),
    ):
        with pytest.raises(UsageError, match=message):
            batch.join([Request([4]), request])
    while batch:
        steps += batch.round()
    assert {step.row for step in steps} == {0}
    assert len(steps) == 5


def test_a_cache_whose_rows_cannot_be_moved_says_so() -> None:
    class Odd:
        """A layer of a kind that nobody knows."""

    with pytest.raises(LoadError, match="cannot join others in a Odd"):
        join_layers([Odd()], [Odd()], 3)
