"""How a token's score looks: a colour on a diverging scale, and a mark that also shows without colour.

The scale runs from orange (low) over grey (0) to blue (high), apart for any colour vision; there is one for dark and
one for bright backgrounds. Marks: bold far above 0, underlined far below 0, from a third of the scale on.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

from rich.style import Style
from rich.text import Text

from llmdoctor.cli.render import LENSES, Lens, lens_scores, scale_colour
from llmdoctor.records import GuidedToken

__all__ = ["LENSES", "Lens", "legend", "score", "style"]

_DARK = ((0xFF, 0x9A, 0x3D), (0xBE, 0xBE, 0xBE), (0x62, 0xB4, 0xFF))
_LIGHT = ((0x9E, 0x46, 0x00), (0x55, 0x55, 0x55), (0x00, 0x59, 0xB8))
_MARKED = 1 / 3
_STEPS = 12


def score(token: GuidedToken, lens: Lens, doctor: str | None) -> float | None:
    """What the lens shows of one token; None is uncoloured."""
    return lens_scores((token,), lens, doctor)[0]


def style(value: float, limit: float, *, dark: bool) -> Style:
    """The style of a score in [-limit, limit]."""
    share = max(-1.0, min(1.0, value / limit)) if limit > 0 and math.isfinite(value) else 0.0
    return _style(round(share * _STEPS), dark)


@lru_cache(maxsize=256)
def _style(step: int, dark: bool) -> Style:
    colour = scale_colour(step / _STEPS, 1.0, _DARK if dark else _LIGHT)
    return Style(color=colour, bold=step > _STEPS * _MARKED or None, underline=step < -_STEPS * _MARKED or None)


def legend(lens: Lens, doctor: str | None, limit: float, *, dark: bool, narrow: bool = False) -> Text:
    """What the colours and marks mean, in one line."""
    names = {
        "value": f"log V of {doctor or 'no doctor'}",
        "ratio": f"log {doctor or 'no doctor'} / patient",
        "kl": "KL to the patient, nats",
        "flips": "flips",
        "off": "no colours",
    }
    text = Text(names[lens], no_wrap=True, overflow="ellipsis")
    if lens == "off":
        return text
    if lens == "flips":
        text.append("  token", style(1, 1, dark=dark))
        return text.append(" bold: not the patient's first choice")
    lows: Sequence[float] = (0.0, 0.5, 1.0) if lens == "kl" else (-1.0, -0.5, 0.0, 0.5, 1.0)
    text.append(f"  {limit * lows[0]:.2g} ")
    for share in lows:
        colour = style(share, 1, dark=dark)
        text.append("━━", Style(color=colour.color))
    text.append(f" {limit:+.2g} ")
    if not narrow:
        text.append(" bold", Style(bold=True)).append(": high")
        if lens != "kl":
            text.append("  ").append("low", Style(underline=True)).append(": underlined")
    return text
