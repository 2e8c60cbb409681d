"""Numbers, settings and names as short texts."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdoctor.show.text import visible

if TYPE_CHECKING:
    from llmdoctor.records import GuidedToken
    from llmdoctor.settings import WelcomeSettings

# of a question that `WelcomeSettings.covers` refuses
OUTSIDE = "none of the topics this model knows: the answer will miss the question"
_WRITTEN_OUT = {"alpha", "mode", "plausibility", "temperature", "max_new_tokens"}  # the rest only where unusual


def short_name(model: str) -> str:
    """A model's name: the last two parts of a folder, a hub name as it is, a GGUF file without place and ending."""
    if model.lower().endswith(".gguf"):
        return Path(model.rpartition(":")[2]).stem
    return "/".join(Path(model).parts[-2:])


def knows_text(welcome: "WelcomeSettings") -> str:
    """What goes behind the model's name: `` can be asked about ...``."""
    topics = f": {', '.join(welcome.topics)}; any other question gets a notice" if welcome.topics else ""
    return f" can be asked about {welcome.knows.rstrip('.')}{topics}."


def counted(count: int, what: str) -> str:
    """``1 token``, ``2 tokens``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def betas_text(betas: Mapping[str, float]) -> str:
    """All doctors, as one types them: ``helpful=0.8 safe=0``."""
    return " ".join(f"{name}={beta:g}" for name, beta in betas.items())


def speaking_text(betas: Mapping[str, float]) -> str:
    """The doctors with a beta above 0: ``helpful 0.8, safe 0.4``; ``no doctor`` where there is none."""
    return ", ".join(f"{name} {beta:g}" for name, beta in betas.items() if beta > 0) or "no doctor"


def settings_text(settings: Mapping[str, Any]) -> str:
    """``alpha 1, beta helpful=0.8 safe=0.4, temperature 1, seed 1`` and what else is not at its default."""
    from llmdoctor.settings import DecodeSettings

    parts = [f"alpha {settings['alpha']:g}"]
    if settings["betas"]:
        parts.append(f"beta {betas_text(settings['betas'])}")
    if settings.get("mode", "product") != "product":
        parts.append(f"mode {settings['mode']}")
        if settings.get("plausibility"):
            parts.append(f"plausibility {settings['plausibility']:g}")
        if zones := {name: width for name, width in settings.get("dead_zones", {}).items() if width}:
            parts.append(f"dead zone {betas_text(zones)}")
    parts.append("greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']:g}")
    for name, field in DecodeSettings.model_fields.items():
        value = settings.get(name, field.default)
        if name not in _WRITTEN_OUT and value != field.default:
            parts.append(f"{name.replace('_', '-')} {_value_text(value)}")
    if settings.get("seed") is not None:
        parts.append(f"seed {settings['seed']}")
    return ", ".join(parts)


def _value_text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(repr, value))
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def token_text(token: "GuidedToken") -> str:
    """A token's log-probs (nats, natural logarithm), KL and values in one line."""
    parts = [f"patient {token.patient_logprob:.2f}"]
    parts += [f"{name} {logprob:.2f}" for name, logprob in token.doctor_logprobs.items()]
    parts += [f"guided {token.logprob:.2f}", f"KL {token.kl:.2f}"]
    parts += [f"log V of {name} {value:.2f}" for name, value in token.values.items()]
    if token.flip:
        parts.append("guidance changed the likeliest token")
    if token.patient_id not in (-1, token.id):
        parts.append(f"the patient would say {visible(token.patient_text)!r}")
    return ", ".join(parts)


def percent(logprob: float) -> str:
    """The probability in at most six characters: ``12.3%``, ``<0.1%``."""
    share = 100 * math.exp(logprob)
    return f"{share:.1f}%" if share >= 0.05 else "<0.1%" if share > 0 else "0%"
