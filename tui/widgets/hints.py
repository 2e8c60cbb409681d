"""The last line: the keys that do something now, as many as fit."""

from collections.abc import Sequence

from rich.cells import cell_len
from textual.content import Content
from textual.widget import Widget

Hint = tuple[str, str, str]  # key, what it does, and the action that a click runs ("" for none)
_GAP = "  "


class Hints(Widget):
    """The first hints are the most important ones: what does not fit is left out whole, never cut.

    Where the screen has ``hints()``, they follow its focus.
    """

    def __init__(self, hints: Sequence[Hint] = ()) -> None:
        super().__init__(id="hints")
        self.hints = hints

    def on_mount(self) -> None:
        """Those of the screen, again with every move of its focus."""
        if hints := getattr(self.screen, "hints", None):
            self.watch(self.screen, "focused", lambda: self.show(hints()))

    def show(self, hints: Sequence[Hint]) -> None:
        """Show these instead."""
        if hints != self.hints:
            self.hints = hints
            self.refresh()

    def render(self) -> Content:
        """Keys bold, what they do dim."""
        line, room = Content(), self.content_size.width
        for key, what, action in self.hints:
            gap = _GAP if line.plain else ""
            markup = "[bold $text-accent]$key[/] $what"
            hint = Content.from_markup(f"[@click={action}]{markup}[/]" if action else markup, key=key, what=what)
            if cell_len(line.plain + gap + hint.plain) > room:
                break
            line += Content(gap) + hint
        return line
