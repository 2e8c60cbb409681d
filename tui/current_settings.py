"""The settings that the next token is made with."""

import secrets
from collections.abc import Mapping
from typing import Any

from llmdoctor.errors import LLMDoctorError, UsageError
from llmdoctor.sessions import Session
from llmdoctor.set_command import parse_settings
from llmdoctor.settings import Guidance, Sampling
from llmdoctor.show.formats import settings_text, short_name
from llmdoctor.tui.generation import Assistant, Worker
from llmdoctor.tui.start import Start

_GREATEST_SEED = 99_999  # short enough to type again


class CurrentSettings:
    """Guidance, sampling and seed, handed on to the worker and, once they are loaded, to the models."""

    def __init__(self, start: Start, worker: Worker) -> None:
        self.guidance, self.sampling, self.seed = start.guidance, start.sampling, start.seed
        self.assistant: Assistant | None = None
        self._worker = worker

    def guide(self, guidance: Guidance) -> None:
        """Take effect from the next token on. Raises LLMDoctorError, and changes nothing, where the models refuse."""
        check_speaking(guidance)
        self._worker.guide(guidance)
        self.guidance = guidance

    def draw(self, sampling: Sampling) -> None:
        """Take effect from the next token on."""
        self.sampling = self._worker.sampling = sampling

    def set(self, text: str) -> None:
        """``alpha=1 beta=0.8 ...``: all of it, or, where one value is wrong, nothing. Raises UsageError."""
        names = tuple(self.guidance.betas)
        guidance, sampling = parse_settings(text, names, self.guidance, self.sampling.replace(seed=self.seed))
        self.guide(guidance)
        # Every turn keeps its own seed: in the sampling it would be of all turns to come.
        self.seed = sampling.seed
        self.draw(sampling.replace(seed=None))

    def resume(self, session: Session, profile: Mapping[str, Any]) -> list[str]:
        """Take over the settings of a saved conversation's last turn; returns what cannot be taken over, in sentences.

        ``profile`` is the one of the models that are loaded.
        """
        if not session.turns:
            return []
        last = session.turns[-1]
        then, now = last.guidance.mode, self.guidance.mode
        differences = [] if then == now else [f"It was held in mode {then}; it goes on in mode {now}."]
        try:
            self.guide(_resumed(last.guidance, self.guidance))
        except LLMDoctorError as error:
            differences.append(str(error))
        self.draw(last.sampling.replace(seed=None))
        held, loaded = _models(session.profile), _models(profile)
        return differences if held == loaded else [*differences, f"It was held with {held}; it goes on with {loaded}."]

    def describe(self) -> str:
        """All of them in one line."""
        shown = self.guidance.to_dict() | self.sampling.model_dump() | {"seed": self.seed}
        return f"{settings_text(shown)}, at most {self.sampling.max_new_tokens} tokens"

    def next_seed(self) -> int:
        """The seed that was set, else a fresh one."""
        return secrets.randbelow(_GREATEST_SEED + 1) if self.seed is None else self.seed


def check_speaking(guidance: Guidance) -> None:
    """Raises UsageError if nothing speaks."""
    if not guidance.alpha and not any(guidance.betas.values()):
        raise UsageError("alpha and every beta are 0: nothing is left to decode from")


def other_seed(seed: int) -> int:
    """A seed that is not this one."""
    while (other := secrets.randbelow(_GREATEST_SEED + 1)) == seed:
        pass
    return other


def _resumed(then: Guidance, now: Guidance) -> Guidance:
    """The guidance of a saved conversation, for the doctors that are loaded now.

    alpha and betas always count. Plausibility and dead zones have a meaning in one mode only: they are taken over if
    the mode is the same.
    """
    betas = {name: then.betas.get(name, beta) for name, beta in now.betas.items()}
    guidance = now.replace(alpha=then.alpha, betas=betas)
    if then.mode != now.mode:
        return guidance
    widths = {name: (then if name in then.betas else now).dead_zones.get(name, 0.0) for name in betas}
    zones = {name: width for name, width in widths.items() if width}
    return guidance.replace(plausibility=then.plausibility, dead_zones=zones)


def _models(profile: Mapping[str, Any]) -> str:
    patient = profile.get("patient", {}).get("model", "another patient")
    doctors = ", ".join(profile.get("doctors", {})) or "no doctor"
    return f"{short_name(patient)} and {doctors}"
