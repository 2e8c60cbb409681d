"""The checkpoints of a run that is not done: which one is whole, whose it is, and how an interrupt makes one.

A run writes to the working folder ``.NAME.training`` beside its doctor. ``run.json`` there holds what identifies the
run, ``checkpoint-N`` what it was after step N.
"""

import hashlib
import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llmdoctor.artefacts import Artefact
from llmdoctor.errors import LoadError, UsageError
from llmdoctor.files import read_json, read_text, write_json
from llmdoctor.training.progress import Progress


def last_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint in a working folder; None when there is none."""
    return max(whole_checkpoints(work), key=checkpoint_step, default=None)


def whole_checkpoints(work: Path) -> set[Path]:
    """The complete checkpoints in a working folder."""
    complete = set()
    # The trainer writes the state last: a checkpoint whose state can be read is complete. Not by `read_json`, which
    # refuses infinity: the trainer logs a loss of that value.
    for state in work.glob("checkpoint-*/trainer_state.json"):
        with suppress(OSError, ValueError, RecursionError):
            json.loads(read_text(state))
            complete.add(state.parent)
    return complete


def run_key(identity: Mapping[str, Any]) -> str:
    """A short name for everything that decides what a run makes; a finished folder states it."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def has_weights(folder: Path) -> bool:
    """Whether a folder holds more weights than a value head's: without them it is no doctor."""
    return bool({path.name for path in folder.glob("*.safetensors")} - {"value_head.safetensors"})


def finished(marker: Path, key: str) -> dict[str, Any] | None:
    """What the marker file of a finished folder holds, if the same run made it and its weights are there."""
    if not has_weights(marker.parent):
        return None
    try:
        held: dict[str, Any] = read_json(marker, Artefact)
    except LoadError:
        return None
    return held if held.get("run") == key else None


def require_no_other(
    output: Path,
    marker: str,
    kind: str,
    told: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    described: Mapping[str, Any],
) -> None:
    """Raise UsageError if a finished ``kind`` is there, naming what this run, as ``described``, would change.

    ``told`` gives what such a description, or the ``marker`` file of a finished folder, says of its run.
    """
    if not has_weights(output):
        return
    try:
        before = told(read_json(output / marker, Artefact))
    except (LoadError, AttributeError, TypeError):  # it may be of any types
        before = {}
    now = told(described)
    differs = [key for key in now if before.get(key) != now[key]]
    listed = ", ".join(differs[:5]) + (f" and {len(differs) - 5} more" if len(differs) > 5 else "")
    raise UsageError(
        f"{output} holds a finished {kind} with another {listed or 'run'}: choose another output folder, or give "
        "--fresh to replace it"
    )


def checkpoint_step(checkpoint: Path) -> int:
    """The optimiser step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def resume_point(work: Path, identity: dict[str, Any], *, fresh: bool, first: bool) -> Path | None:
    """The checkpoint to go on from; None to start from scratch, in a working folder that is then empty.

    ``first`` says that this is the process that writes. Raises UsageError when the run that was stopped here is
    another one, unless ``fresh`` discards it.
    """
    checkpoint = last_checkpoint(work)
    if checkpoint and not fresh:
        held = read_json(work / "run.json", Artefact)
        if held == identity:
            return checkpoint
        nested = ("reward_settings", "settings")
        before, now = (_flat(run) for run in (held, identity))
        differs = [key for key in now if key not in nested and before.get(key) != now[key]]
        raise UsageError(
            f"{work} holds a run stopped at step {checkpoint_step(checkpoint)} with another {', '.join(differs)}: "
            "give its settings to continue it, or --fresh to start from scratch"
        )
    if first:
        shutil.rmtree(work, ignore_errors=True)
        write_json(work / "run.json", identity)
    return None


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    groups = [group for name in ("reward_settings", "settings") if isinstance(group := run.get(name), dict)]
    return {key: value for group in (*groups, run) for key, value in group.items()}


@contextmanager
def finishing_the_step(progress: Progress[Any]) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM end the run after the current step; a second one has its usual effect."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def interrupt(number: int, _frame: Any) -> None:
        progress.interrupted = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
