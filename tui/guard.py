"""Keeps what native libraries print off the screen while the app has the terminal."""

import codecs
import os
import select
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO


def full_screen(stdin: IO[str], stdout: IO[str]) -> bool:
    """Whether a full-screen app can run: both are terminals, and the terminal can place its cursor."""
    return stdin.isatty() and stdout.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb")


def take_any_bytes() -> bool:
    """Show typed bytes that are not UTF-8 as marks: they would end the thread that reads keys, and so the app.

    False where that cannot be had: on Windows, where there are no bytes, and with a Textual that decodes in another way
    than those that are known. Its own way is then left alone.
    """
    try:
        from textual.drivers import linux_driver
    except ImportError:
        return False
    if getattr(linux_driver, "getincrementaldecoder", None) not in (codecs.getincrementaldecoder, _forgiving_decoder):
        return False
    linux_driver.getincrementaldecoder = _forgiving_decoder  # type: ignore[assignment, attr-defined]
    return True


def _forgiving_decoder(encoding: str) -> Callable[[], codecs.IncrementalDecoder]:
    return partial(codecs.getincrementaldecoder(encoding), errors="replace")


def hung_up(fd: int) -> bool:
    """Whether the terminal behind this file descriptor is gone; False where that cannot be asked (Windows)."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(fd, 0)  # hang-ups and errors are reported whatever is asked for
    return any(events & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0))


@contextmanager
def quiet_terminal() -> Iterator[IO[bytes]]:
    """Send file descriptors 1 and 2 to a file, which is yielded; Textual draws through a duplicate of the terminal.

    Textual catches Python's ``print`` by itself, but not what C libraries write. It draws to ``sys.__stderr__`` and
    asks ``sys.__stdout__`` for the size: both are the terminal that stdout was, also where stderr was sent to a file.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    log = tempfile.TemporaryFile()  # noqa: SIM115 (closed below)
    screen = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace", newline="\n")
    originals = sys.__stdout__, sys.__stderr__
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    sys.__stdout__ = sys.__stderr__ = screen  # type: ignore[misc]
    try:
        yield log
    finally:
        sys.__stdout__, sys.__stderr__ = originals  # type: ignore[misc]
        with suppress(OSError):
            screen.close()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        for number, fd in enumerate(kept, start=1):
            os.dup2(fd, number)
            os.close(fd)
        log.close()


def written(log: IO[bytes], limit: int = 4000) -> str:
    """The last ``limit`` bytes of what was written, as text."""
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - limit))
    return log.read().decode("utf-8", errors="replace").strip()
