"""How a token's score looks in the app: a colour, and a mark that also shows without colour.

The scale runs from orange (low) over grey (0) to blue (high), which any colour vision can tell apart; there is one for
dark and one for bright themes. Marks: bold far above 0, underlined far below 0, from a third of the scale on.
"""

import math
from functools import lru_cache

from rich.style import Style
from rich.text import Text

from llmdoctor.records import GuidedToken
from llmdoctor.show.colours import scale_colour
from llmdoctor.show.lens import Lens, legend_steps, lens_limit, lens_name, lens_scores, scale_end

_DARK = ((0xFF, 0x9A, 0x3D), (0xBE, 0xBE, 0xBE), (0x62, 0xB4, 0xFF))
_LIGHT = ((0x9E, 0x46, 0x00), (0x55, 0x55, 0x55), (0x00, 0x59, 0xB8))
_MARKED = 1 / 3
_STEPS = 12  # on each side of 0: few enough styles to cache, so that drawing a long answer stays cheap


def score(token: GuidedToken, lens: Lens, doctor: str | None) -> float | None:
    """The lens' score of one token; None leaves it uncoloured."""
    return lens_scores((token,), lens, doctor)[0]


def style(value: float, limit: float, *, dark: bool) -> Style:
    """The style of a score in [-limit, limit]."""
    return _style(_step(value, limit), dark)


def is_high(value: float, limit: float) -> bool:
    """Whether the style of this score is bold."""
    return _step(value, limit) > _STEPS * _MARKED


def _step(value: float, limit: float) -> int:
    share = max(-1.0, min(1.0, value / limit)) if limit > 0 and math.isfinite(value) else 0.0
    return round(share * _STEPS)


@lru_cache(maxsize=256)
def _style(step: int, dark: bool) -> Style:
    colour = scale_colour(step / _STEPS, 1.0, _DARK if dark else _LIGHT)
    return Style(color=colour, bold=step > _STEPS * _MARKED or None, underline=step < -_STEPS * _MARKED or None)


def legend(name: str, lens: Lens, limit: float, *, dark: bool, narrow: bool) -> Text:
    """What colours and marks mean, in one line, a shorter one if ``narrow``. ``name`` is the number that is shown."""
    text = Text(name, no_wrap=True, overflow="ellipsis")
    if lens == "off":
        return text
    if lens == "flips":
        text.append("  token", style(1, 1, dark=dark))
        return text.append(" bold: guidance changed the likeliest token")
    steps = legend_steps(lens)
    text.append(f"  {limit * steps[0]:.2g} ")
    for share in steps:
        text.append("━━", Style(color=style(share, 1, dark=dark).color))
    text.append(f" {scale_end(lens, limit)} ")
    if not narrow:
        text.append(" bold", Style(bold=True)).append(": high")
        if lens != "kl":
            text.append("  ").append("low", Style(underline=True)).append(": underlined")
    return text


def lens_legend(lens: Lens, doctor: str | None, *, dark: bool, narrow: bool) -> Text:
    """The legend of a lens and the doctor whose opinion it shows."""
    return legend(lens_name(lens, doctor), lens, lens_limit(lens), dark=dark, narrow=narrow)
