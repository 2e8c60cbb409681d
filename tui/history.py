"""The turns of a conversation, and the way back through what was changed."""

from typing import Literal

from llmdoctor.sessions import Turn

Turns = tuple[Turn, ...]


class History:
    """``turns`` are the conversation; they are never changed in place, so that a step back is a reference."""

    def __init__(self, turns: Turns = ()) -> None:
        self.turns = turns
        self._past: list[Turns] = []
        self._future: list[Turns] = []

    def change(self, turns: Turns) -> None:
        """Go on with these turns; one step back leads to the ones before."""
        self._past.append(self.turns)
        self._future.clear()
        self.turns = turns

    def complete(self, turn: Turn) -> None:
        """The last turn as it is now that it is answered: no step of its own."""
        self.turns = (*self.turns[:-1], turn)

    def step(self, direction: Literal[-1, 1]) -> bool:
        """One step back (-1) or forward again (1); False where there is none."""
        source, target = (self._past, self._future) if direction < 0 else (self._future, self._past)
        if not source:
            return False
        target.append(self.turns)
        self.turns = source.pop()
        return True

    def open(self, turns: Turns) -> None:
        """Another conversation, without steps."""
        self.turns = turns
        self._past.clear()
        self._future.clear()
