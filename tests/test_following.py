"""What a `Follower` reads and keeps, without vLLM: few empty slots, and no more tokens in a forward than it may."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from llmdoctor.assistant import LLMdoctor
from llmdoctor.decoding.following import Ask, Follower


@pytest.fixture(scope="module")
def own() -> LLMdoctor:
    return LLMdoctor.from_profile("clinic", dtype="float32", device="cpu")


@contextmanager
def forwards(own: LLMdoctor) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of every forward of the first doctor."""
    seen: list[tuple[int, int]] = []

    def note(_model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape if "input_ids" in kwargs else args[0].shape))

    hook = next(iter(own.doctors.values())).model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


def ask(key: object, ids: list[int], start: int) -> Ask:
    return Ask(key, start, ids[start:], 1, lambda: ids)


@pytest.fixture
def alone(own: LLMdoctor) -> Callable[[list[int]], torch.Tensor]:
    """What the first doctor says after these tokens, read by themselves."""
    name, doctor = next(iter(own.doctors.items()))

    def says(ids: list[int]) -> torch.Tensor:
        follower = Follower({name: doctor}, own.patient.vocabulary)
        return follower.read([ask(object(), ids, 0)])[0][name][0]

    return says


def test_what_is_taken_back_leaves_few_empty_slots(own: LLMdoctor, alone: Callable[[list[int]], torch.Tensor]) -> None:
    """One row keeps all of its tokens, the other takes back most: without closing it would have a hole for each."""
    name = next(iter(own.doctors))
    follower = Follower(own.doctors, own.patient.vocabulary)
    steady, rejected = [5, 6, 7], [9]
    one, other = object(), object()
    follower.read([ask(one, steady, 0), ask(other, rejected, 0)])
    slots = []
    for step in range(12):
        before = len(steady)
        steady = [*steady, 10 + step]
        # four drafts are read, of which the next step keeps one
        rejected = [*rejected[: 1 + step], *range(20, 24)]
        said, _ = follower.read([ask(one, steady, before), ask(other, rejected, min(1 + step, len(rejected) - 1))])
        slots.append(follower._caches[0].length)
    torch.testing.assert_close(said[name][0], alone(steady), rtol=0, atol=1e-4)
    torch.testing.assert_close(said[name][1], alone(rejected), rtol=0, atol=1e-4)
    # each step adds four slots; the longest row holds at most 16 tokens
    assert max(slots) < 16 + 8 + 4 + 1 < 3 + 12 * 4


@pytest.mark.parametrize("most", [24, 64, 8192])
def test_no_forward_of_new_rows_reads_more_tokens_than_it_may(
    own: LLMdoctor, alone: Callable[[list[int]], torch.Tensor], most: int
) -> None:
    """Padding included; a prompt that is longer by itself is read alone."""
    name = next(iter(own.doctors))
    follower = Follower(own.doctors, own.patient.vocabulary, prompt_tokens=most)
    prompts = [list(range(4, 4 + length)) for length in (3, 30, 11, 12, 5, 2)]
    with forwards(own) as seen:
        said, _ = follower.read([ask(object(), ids, 0) for ids in prompts])
    assert all(rows * tokens <= most or rows == 1 for rows, tokens in seen)
    assert sum(rows for rows, _ in seen) == len(prompts)
    assert len(seen) == {24: 3, 64: 2, 8192: 1}[most]
    for got, ids in zip(said[name], prompts, strict=True):
        torch.testing.assert_close(got, alone(ids), rtol=0, atol=1e-4)
