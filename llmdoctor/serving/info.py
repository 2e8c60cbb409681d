"""What a server says of itself, for the terminal of another machine: ``GET /v1/llmdoctor``. Without tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from llmdoctor import __version__
from llmdoctor.artefacts import Artefact, Count, Text
from llmdoctor.settings import GuidanceFields, SamplingFields

if TYPE_CHECKING:
    from llmdoctor.serving.engine import Engine

# Raised when a client of before could no longer read what is said here, or could not ask as it did.
PROTOCOL = 1


@dataclass(frozen=True, slots=True)
class About:
    """What the engine does not know: names to show, and what newcomers are told.

    ``doctors`` are names to show by the doctors' own; ``weights`` tell one set of models from another.
    """

    profile: str = ""
    patient: str = ""
    doctors: Mapping[str, str] = field(default_factory=dict)
    weights: Sequence[str] = ()
    welcome: Mapping[str, Any] = field(default_factory=dict)


def info(engine: "Engine", name: str, longest: int, about: About) -> dict[str, Any]:
    """The answer. ``name`` is the model's for clients, ``longest`` the greatest number of tokens in an answer."""
    assistant = engine.assistant
    guidance, patient = assistant.guidance, about.patient or name
    return {
        "object": "llmdoctor.info",
        "protocol": PROTOCOL,
        "version": __version__,
        "profile": {
            "name": about.profile or name,
            "welcome": dict(about.welcome),
            "patient": {"model": patient},
            "doctors": {
                doctor: {
                    "checkpoint": about.doctors.get(doctor) or doctor,
                    "beta": guidance.betas.get(doctor, 0.0),
                    "dead_zone": guidance.dead_zones.get(doctor, 0.0),
                }
                for doctor in assistant.doctor_names
            },
            "decode": {
                **guidance.model_dump(include=set(GuidanceFields.model_fields)),
                **assistant.sampling.model_dump(include=set(SamplingFields.model_fields)),
            },
        },
        "weights": list(about.weights),
        "token_names": dict(assistant.token_names),
        "vocabulary": assistant.patient.vocabulary.size,
        "longest_answer": longest,
    }


class Info(Artefact):
    """The same, as it comes over the network. ``profile`` is checked by `llmdoctor.profile.Profile`."""

    protocol: Count
    version: Annotated[str, Field(max_length=100)]
    profile: dict[str, Any]
    weights: list[str]
    token_names: dict[Annotated[str, Field(pattern=r"^\d{1,10}$")], Text]
    vocabulary: Annotated[int, Field(ge=1, le=1 << 31)]
    longest_answer: Annotated[int, Field(ge=1, le=1 << 31)]
