"""The mark of a model that `llmdoctor.training.shrink` made: whose layers it has."""

from pathlib import Path

from llmdoctor.artefacts import Artefact
from llmdoctor.files import read_json
from llmdoctor.model_source import ModelSource

MARKER = "shrunk.json"


def shrunk_from_another(base: str | Path, fingerprint: str, patient: str) -> str | None:
    """What is wrong where ``base`` was shrunk from another patient than the one with this ``fingerprint``."""
    where = ModelSource.of(base)
    marker = where.file(MARKER, download=False)
    if marker is None or where.fingerprint() == fingerprint:  # it may be the patient itself
        return None
    held = read_json(marker, Artefact)
    if held.get("patient_fingerprint") == fingerprint:
        return None
    made_from = held.get("patient", "?")
    return (
        f"{base} was shrunk from another patient, {made_from}, and learnt to speak like that one: expected a model "
        f"shrunk from {patient} (llmdoctor shrink)"
    )
