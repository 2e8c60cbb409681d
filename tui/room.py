"""What a low window leaves out: legend and sliders first, then header and keys; the prompt stays to the last."""

from typing import Any

from textual.screen import Screen

_AROUND = 4  # rows of header, status, prompt and keys
_FRAME = 2  # rows of the frame around a text
_LINES = 2  # of every text that stay before header and keys do


def fit_height(screen: "Screen[Any]", height: int, *, stacked: int, more: int = 0) -> None:
    """Set the classes of a window of ``height`` rows with ``stacked`` texts above each other.

    ``more`` rows are wanted for what else there is: legend, sliders, inspector.
    """
    least = stacked * (_LINES + _FRAME)
    screen.set_class(height - _AROUND - more < least + 4, "tight")  # no legend, sliders or curve
    screen.set_class(height - _AROUND < least, "tiny")  # no header or keys either
    screen.set_class(height - _AROUND + 2 < least, "bare")  # of the frames, the headings only
    screen.set_class(height < 4, "sliver")  # status and prompt
    screen.set_class(height < 2, "line")  # the prompt
