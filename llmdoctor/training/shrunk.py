"""The mark of a model that `llmdoctor.training.shrink` made: whose layers it has."""

from pathlib import Path

from llmdoctor.errors import LoadError
from llmdoctor.files import read_json
from llmdoctor.model_source import ModelSource, first_line

MARKER = "shrunk.json"


def shrunk_from_another(base: str | Path, fingerprint: str, patient: str) -> str | None:
    """What is wrong where ``base`` was shrunk from another patient than the one with this ``fingerprint``."""
    where = ModelSource.of(base)
    marker = where.file(MARKER, download=False)
    if marker is None or where.fingerprint() == fingerprint:  # it may be the patient itself
        return None
    try:
        held = read_json(marker)
    except (OSError, ValueError) as error:
        raise LoadError(f"cannot read {marker}: {first_line(error)}") from error
    found = held.get("patient_fingerprint") if isinstance(held, dict) else None
    if found == fingerprint:
        return None
    made_from = held.get("patient", "?") if isinstance(held, dict) else "?"
    return (
        f"{base} was shrunk from another patient, {made_from}, and learnt to speak like that one: expected a model "
        f"shrunk from {patient} (llmdoctor shrink)"
    )
