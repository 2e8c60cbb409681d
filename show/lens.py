"""Lenses: which number of a token its colour shows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

if TYPE_CHECKING:
    from llmdoctor.records import GuidedToken

T = TypeVar("T")
Lens = Literal["kl", "ratio", "value", "flips", "off"]
LENSES: tuple[Lens, ...] = get_args(Lens)
DEFAULT_LENS: Lens = "kl"  # it alone is 0 wherever guidance changes nothing

# The ends of the colour scales, in nats. They are fixed: stretched to the answer's greatest score, a doctor that finds
# hardly anything to object to would colour good answers like bad ones. KL is small where it is spread over many tokens:
# SmolLM2's doctors change nine tokens in ten by less than 0.12, and hardly one by more than 0.3.
_LIMITS: dict[Lens, float] = {"kl": 0.3, "ratio": 2.0, "value": 1.0, "flips": 1.0, "off": 1.0}


def lens_limit(lens: Lens) -> float:
    """The score with the strongest colour; whatever lies beyond it has the same."""
    return _LIMITS[lens]


def lens_scores(tokens: Sequence["GuidedToken"], lens: Lens, doctor: str | None) -> list[float | None]:
    """Per token KL, log(doctor / patient) or log V (all in nats), or 1 for a flip; None leaves it uncoloured."""
    match lens:
        case "kl":
            return [token.kl for token in tokens]
        case "ratio":
            return [_ratio(token, doctor or "") for token in tokens]
        case "value":
            return [token.values.get(doctor or "") for token in tokens]
        case "flips":
            return [1.0 if token.flip else None for token in tokens]
        case "off":
            return [None] * len(tokens)


def _ratio(token: "GuidedToken", doctor: str) -> float | None:
    own = token.doctor_logprobs.get(doctor)
    return None if own is None else own - token.patient_logprob


def lens_name(lens: Lens, doctor: str | None) -> str:
    """What the colours are, for a legend."""
    doctor = doctor or "no doctor"
    return {
        "kl": "changed by guidance (KL, nats)",
        "ratio": f"log {doctor} / patient",
        "value": f"log V of {doctor}",
        "flips": "flips",
        "off": "no colours",
    }[lens]


def following(items: Sequence[T], current: T | None) -> T:
    """The item behind the current one; behind the last, and if the current one is none of them, the first."""
    return items[(items.index(current) + 1) % len(items)] if current in items else items[0]


def scale_end(lens: Lens, limit: float) -> str:
    """The scale's high end: with a sign where the scale has a negative end too."""
    return f"{limit:.2g}" if lens == "kl" else f"{limit:+.2g}"


def legend_steps(lens: Lens) -> tuple[float, ...]:
    """The shares of the scale's limit that a legend shows; KL is never negative."""
    return (0.0, 0.5, 1.0) if lens == "kl" else (-1.0, -0.5, 0.0, 0.5, 1.0)
