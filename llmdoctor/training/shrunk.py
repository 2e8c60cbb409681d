"""The mark of a model that `llmdoctor.training.shrink` made: whose layers it has."""

from pathlib import Path

from llmdoctor.errors import LoadError
from llmdoctor.files import read_json
from llmdoctor.model_source import ModelSource

MARKER = "shrunk.json"


def require_shrunk_from(base: str | Path, fingerprint: str, patient: str) -> None:
    """Raise LoadError if ``base`` was shrunk from another patient than the one with this ``fingerprint``."""
    marker = ModelSource.of(base).file(MARKER, download=False)
    if marker is None:
        return
    held = read_json(marker)
    found = held.get("patient_fingerprint") if isinstance(held, dict) else None
    if found != fingerprint:
        made_from = held.get("patient", "?") if isinstance(held, dict) else "?"
        raise LoadError(
            f"{base} was shrunk from another patient, {made_from}, and learnt to speak like that one: expected a model "
            f"shrunk from {patient} (llmdoctor shrink)"
        )
