"""Stage 1 in several processes, as ``accelerate launch`` or ``torchrun`` start them."""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from llmdoctor.errors import LLMDoctorError

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of one run: each scores every ``size``-th shard; the first opens and finishes the folder."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the first, or the only one."""
        return self.rank == 0

    def from_first(self, make: Callable[[], _Result]) -> _Result:
        """What ``make`` returns in the first process, in all of them; so too the LLMDoctorError that it raises."""
        if self.size == 1:
            return make()
        shared: list[Any] = [None, None]
        if self.first:
            try:
                shared[0] = make()
            except LLMDoctorError as error:
                shared[1] = error
        with _explained():
            torch.distributed.broadcast_object_list(shared)
        result, failure = shared
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Return once every process has called this."""
        if self.size > 1:
            with _explained():
                torch.distributed.barrier()


@contextmanager
def team() -> Iterator[Team]:
    """The processes that ``accelerate launch`` or ``torchrun`` started, or this one alone.

    They exchange a few words on the CPU, whatever their devices: so it is gloo, and the timeout is long because one
    process may wait for another's last shard. Their group stays until the process ends: a second one would find the
    addresses of the first in the launcher's store, and wait for them for ever.
    """
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield Team()
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))
        atexit.register(torch.distributed.destroy_process_group)
    yield Team(torch.distributed.get_rank(), size)


@contextmanager
def _explained() -> Iterator[None]:
    """Gloo's error when a process has died, as one that says what to do."""
    try:
        yield
    except RuntimeError as error:
        raise LLMDoctorError(
            "another process of this run has ended: see its message. The same command goes on from here"
        ) from error
