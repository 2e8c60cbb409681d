"""The last thing before the terminal: characters that would steer it are shown as marks, wherever they came from."""

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

from llmdoctor.show.text import clean


class VisibleControls(LineFilter):
    """Cleans every line of every widget; a line keeps its width."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        """The line, cleaned."""
        del background
        if all(text.isprintable() for text, _, _ in segments):
            return segments
        cleaned = [Segment(clean(text), style, control) for text, style, control in segments]
        return Segment.adjust_line_length(cleaned, Segment.get_line_length(segments))
