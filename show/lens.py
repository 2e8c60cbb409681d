"""Lenses: which number of a token its colour shows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from llmdoctor.records import GuidedToken

Lens = Literal["value", "ratio", "kl", "flips", "off"]
LENSES: tuple[Lens, ...] = get_args(Lens)


def lens_scores(tokens: Sequence["GuidedToken"], lens: Lens, doctor: str | None) -> list[float | None]:
    """Per token log V, log(doctor / patient) or KL (all in nats), or 1 for a flip; None leaves it uncoloured."""
    match lens:
        case "value":
            return [token.values.get(doctor or "") for token in tokens]
        case "ratio":
            return [_ratio(token, doctor or "") for token in tokens]
        case "kl":
            return [token.kl for token in tokens]
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
        "value": f"log V of {doctor}",
        "ratio": f"log {doctor} / patient",
        "kl": "KL to the patient, nats",
        "flips": "flips",
        "off": "no colours",
    }[lens]


def legend_steps(lens: Lens) -> tuple[float, ...]:
    """The shares of the scale's limit that a legend shows; KL is never negative."""
    return (0.0, 0.5, 1.0) if lens == "kl" else (-1.0, -0.5, 0.0, 0.5, 1.0)
