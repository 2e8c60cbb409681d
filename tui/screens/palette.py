"""Textual's palette, with the last line that all screens have."""

from textual.app import ComposeResult
from textual.command import CommandPalette

from llmdoctor.tui.widgets.hints import Hints


class Palette(CommandPalette):
    """A list to search and to choose from."""

    def compose(self) -> ComposeResult:
        """Field, list, keys."""
        yield from super().compose()
        yield Hints([("type", "to search", ""), ("↑↓", "choose", ""), ("Enter", "take it", ""), ("Esc", "close", "")])
