"""Output: results on stdout, messages and progress on stderr, decorated only on terminals that welcome it."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmdoctor.harmless import json_text
from llmdoctor.show.formats import counted
from llmdoctor.show.text import clean, one_line

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_INTERVAL = 10.0  # seconds between two progress lines where nothing may be animated
_BEGAN = time.monotonic()
_level = 0  # of narration: -1 warnings and errors alone, 1 with times


def narrate(level: int) -> None:
    """How much is said on stderr from here on: -1 warnings and errors alone, 1 also the times, and the libraries."""
    global _level  # noqa: PLW0603 (of the process, as stderr itself is)
    _level = level
    if level > 0:
        import warnings

        os.environ.update(dict.fromkeys(("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"), "info"))
        warnings.filterwarnings("default")


def decorated(stream: IO[str]) -> bool:
    """Whether colour, boxes and animation are welcome on ``stream``: a terminal, not NO_COLOR, not TERM=dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def console(stream: IO[str]) -> "Console":
    """A `CleanConsole` on ``stream``: what it prints may come from a model."""
    from llmdoctor.cli.clean_console import CleanConsole

    colour = {} if decorated(stream) else {"color_system": None, "force_terminal": False}
    return CleanConsole(file=stream, soft_wrap=False, **colour)


def say(message: str) -> None:
    """A message on stderr. Of several processes (RANK) only the first prints."""
    if not _first_process() or (_level < 0 and not message.startswith(("warning:", "interrupted"))):
        return
    when = f"[{time.monotonic() - _BEGAN:6.1f} s] " if _level > 0 else ""
    print(when + clean(message), file=sys.stderr, flush=True)


def put(text: str) -> None:
    """A result on stdout, cleaned."""
    if _first_process():
        print(clean(text), flush=True)


def put_json(data: Any) -> None:
    """One JSON document on one line of stdout."""
    put(json_text(data))


def write_file(path: Path, text: str) -> None:
    """All of it or nothing; then say so."""
    from llmdoctor.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    say(f"wrote {path}")


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def waiting(message: str) -> Iterator[Callable[[str], None]]:
    """A spinner on stderr while something of unknown length runs; gives the function that changes its message."""
    if _level < 0 or not (_first_process() and decorated(sys.stderr)):
        yield lambda _message: None
        return
    from rich.text import Text

    # rich would read markup in a plain string
    with console(sys.stderr).status(Text(one_line(message))) as status:
        yield lambda said: status.update(Text(one_line(said)))


@contextmanager
def progress(
    description: str, total: int | None, unit: str, plain: Callable[[str], None] | None = None
) -> Iterator["Advance"]:
    """Progress on stderr, counted in ``unit`` ("pair"): a bar, or lines to ``plain``, by default every ten seconds."""
    if _level < 0 or not (_first_process() and decorated(sys.stderr)):
        yield Advance(_plain_line(description, plain or every_ten_seconds()), total, unit)
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}  {task.fields[detail]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task(description, total=total, count="", detail="")

        def show(done: int, total: int | None, count: str, detail: str) -> None:
            bar.update(task, completed=done, total=total, count=count, detail=clean(detail))

        yield Advance(show, total, unit)


class Advance:
    """Called after every finished unit, with a detail to show; ``done`` and ``total`` where the caller counts."""

    def __init__(self, show: Callable[[int, int | None, str, str], None], total: int | None, unit: str) -> None:
        self._show, self._total, self._unit, self._done = show, total, unit, 0

    def __call__(self, detail: str = "", *, done: int | None = None, total: int | None = None) -> None:
        """One unit more, or ``done`` of them."""
        self._done = self._done + 1 if done is None else done
        self._total = total or self._total
        of = "" if self._total is None else f"{self._done}/"
        count = of + counted(self._total or self._done, self._unit)
        self._show(self._done, self._total, count, detail)


def every_ten_seconds() -> Callable[[str], None]:
    """A function that says its message if ten seconds have passed since it was made, or since it last spoke."""
    spoken = time.monotonic()

    def show(message: str) -> None:
        nonlocal spoken
        if time.monotonic() - spoken >= _PLAIN_INTERVAL:
            spoken = time.monotonic()
            say(message)

    return show


def _plain_line(description: str, show: Callable[[str], None]) -> Callable[[int, int | None, str, str], None]:
    return lambda _done, _total, count, detail: show(f"{description}: {count}  {detail}".rstrip())


def flat_lines(data: dict[str, Any], prefix: str = "") -> list[str]:
    """Nested statistics as ``a.b: 1`` lines."""
    lines = []
    for key, value in data.items():
        if isinstance(value, dict):
            lines += flat_lines(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {value:.4g}" if isinstance(value, float) else f"{prefix}{key}: {value}")
    return lines
