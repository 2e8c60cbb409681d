"""Running an action once things have come to rest."""

import time
from collections.abc import Callable

from textual.message_pump import MessagePump
from textual.timer import Timer

REST = 0.3  # seconds without a move


class Debounce:
    """Runs ``action`` once, however often it is asked for, when nothing has moved for REST seconds."""

    def __init__(self, owner: MessagePump, action: Callable[[], None]) -> None:
        self._owner, self._action = owner, action
        self._moved_at = 0.0
        self._timer: Timer | None = None

    @property
    def pending(self) -> bool:
        """Whether the action is still to come."""
        return self._timer is not None

    def moved(self) -> None:
        """Something has moved: an action that is still to come waits REST seconds from now."""
        self._moved_at = time.monotonic()
        if self.pending:
            self.ask()

    def ask(self) -> None:
        """Run the action; immediately if nothing has moved recently."""
        if self._timer is not None:
            self._timer.stop()
        wait = REST - (time.monotonic() - self._moved_at)
        if wait > 0:
            self._timer = self._owner.set_timer(wait, self._run)
        else:
            self._run()

    def _run(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer = None
        self._action()
