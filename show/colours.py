"""Colours of scores: from orange (low) over grey (0) to blue (high), which any colour vision can tell apart.

All colours on the scale are equally light, so that text in them reads on dark and on bright terminals.
"""

import math
from collections.abc import Iterable, Sequence

Colour = tuple[int, int, int]

_LOW, _MIDDLE, _HIGH = (0xCC, 0x5F, 0x00), (0x7D, 0x7D, 0x7D), (0x20, 0x7F, 0xEA)
_GAMMA = 2.2


def scale_limit(scores: Iterable[float | None]) -> float:
    """The end of the colour scale: the greatest absolute score, 1 where there is none."""
    return max((abs(score) for score in scores if score), default=1.0)


def scale_colour(score: float, limit: float, colours: Sequence[Colour] = (_LOW, _MIDDLE, _HIGH)) -> str:
    """The colour of a score in [-limit, limit] as #rrggbb; scores beyond the limit get the colour at the end.

    ``colours`` are those of the low end, of 0 and of the high end.
    """
    low, middle, high = colours
    share = min(1.0, abs(score) / limit) if limit > 0 and math.isfinite(score) else 0.0
    end = high if score > 0 else low
    # Channels are mixed as linear light, not as sRGB numbers: two colours of equal luminance then mix to the same one.
    mixed = [(a**_GAMMA * (1 - share) + b**_GAMMA * share) ** (1 / _GAMMA) for a, b in zip(middle, end, strict=True)]
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def heat_style(reward: float, limit: float) -> str:
    """The rich style of a token with this reward, empty for reward 0.

    Black on a colour of medium lightness: both are given, so the terminal's own colours do not matter.
    """
    return f"#000000 on {scale_colour(reward, limit)}" if reward else ""
