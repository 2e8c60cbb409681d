"""How often the screen draws, so that the generator keeps most of the interpreter's time."""

import time

FRAME = 1 / 30  # seconds between frames where drawing is cheap
_SHARE = 6  # seconds without drawing for every second of the processor that drawing took
_LONGEST_FRAME = 0.2


class Pacing:
    """Leaves out frames where drawing takes long, as on a slow or busy machine.

    Drawing and generating share one interpreter: every millisecond of drawing is taken from the generator.
    """

    def __init__(self) -> None:
        self._drawn_at = self._busy = self._owed = 0.0

    def due(self) -> bool:
        """Whether to draw now. To be asked once every FRAME, by the thread that draws."""
        # What this thread has computed since the last call is what the last frame cost.
        now, busy = time.monotonic(), time.thread_time()
        cost, self._busy = busy - self._busy, busy
        self._owed = min(_LONGEST_FRAME, self._owed + cost * _SHARE)
        if now - self._drawn_at < self._owed:
            return False
        self._owed, self._drawn_at = 0.0, now
        return True
