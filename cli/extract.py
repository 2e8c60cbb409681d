"""``llmdoctor extract``: stage 1, preference pairs to token rewards."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmdoctor.cli import findings, options
from llmdoctor.cli.options import option
from llmdoctor.cli.terminal import flat_lines, progress, put, put_json, say, waiting
from llmdoctor.errors import UsageError
from llmdoctor.show.formats import short_name

if TYPE_CHECKING:
    from llmdoctor.profile import Profile
    from llmdoctor.records import FacePair, SkippedRecord
    from llmdoctor.settings import DataSettings

_SKIPS_SHOWN = 20


@options.derived
def extract(
    *,
    profile: options.ProfileName = None,
    patient: options.Patient = None,
    data: options.Data = None,
    split: options.Split = None,
    label: options.Label = None,
    face: options.FaceNames = None,
    output: Annotated[
        Path, option("--output", "Rewards folder (default: outputs/rewards).", short="-o", env="EXTRACT_OUTPUT")
    ] = Path("outputs/rewards"),
    limit: Annotated[int | None, option("--limit", "Use the first N usable pairs.", metavar="N", min=1)] = None,
    shuffle: Annotated[bool, option("--shuffle", "Take the pairs in an order that --seed decides.")] = False,
    seed: Annotated[
        int, option("--seed", "Seed of --shuffle (default: 0).", min=0, max=options.GREATEST_SEED, metavar="N")
    ] = 0,
    strict: Annotated[bool, option("--strict", "Stop at the first record that cannot be used.")] = False,
    batch_tokens: Annotated[
        int | None, option("--batch-tokens", "Tokens per forward (default: what fits).", metavar="N", min=1)
    ] = None,
    loading: options.HowLoaded,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Score every answer's tokens with the patient's own two faces.

    A run that was stopped continues where it was.
    """
    from llmdoctor.profile import override

    settings = options.load(profile)
    model = override(settings.patient, model=patient, **loading)
    source = _data(settings, data, split, label)
    faces = chosen_faces(settings, face)
    _require_usable(source)

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    with waiting(f"Loading {short_name(model.model)} ..."):
        from llmdoctor.models import load_patient
        from llmdoctor.token_rewards.extract import extract as scored_pairs
        from llmdoctor.token_rewards.folder import RewardsFolder

        alone = model.device_map is None and model.tp_plan is None
        if processes > 1 and alone and model.device in {"auto", "cuda"}:  # one device per process
            import torch

            if torch.cuda.is_available():
                model = override(model, device=f"cuda:{os.environ['LOCAL_RANK']}")
        loaded = load_patient(model.model, trust_remote_code=trust_remote_code, **model.loading())
    skips = _Skips()
    began = time.monotonic()
    with progress("Scoring", limit if processes == 1 else None, "pairs") as advance:
        pairs = scored_pairs(
            loaded,
            source,
            faces,
            output,
            limit=limit,
            shuffle=seed if shuffle else None,
            strict=strict,
            batch_tokens=batch_tokens,
            on_skip=skips,
        )
        for _ in pairs:
            advance()
    skips.close(output)
    report = _report(output, RewardsFolder(output).meta, time.monotonic() - began)
    found = findings.after_extraction(output, options.fitting(settings, profile, loaded.fingerprint).rewards)
    if as_json:
        put_json({**report, **found.as_dict()})
    else:
        put(_summary(report))
        found.show()


def _data(profile: "Profile", source: str | None, split: str | None, label: str | None) -> "DataSettings":
    """The profile's data set, or the one named: it does not inherit the split and label of the other."""
    from llmdoctor.profile import override
    from llmdoctor.settings import DataSettings

    named = DataSettings(source=source) if source else profile.data
    if named is None:
        raise UsageError(f"profile {profile.name} names no preference pairs: give --data FILE")
    return override(named, split=split, label=label)


def chosen_faces(profile: "Profile", names: Sequence[str] | None) -> "dict[str, FacePair]":
    """The face pairs named, from the profile or the library; else those that the profile uses."""
    from llmdoctor.profile import library_faces

    known = {**library_faces(), **profile.faces}
    ready = ", ".join(name for name in library_faces() if name not in profile.faces)
    chosen = names or profile.rewards.faces or tuple(profile.faces)
    if not chosen:
        raise UsageError(f"profile {profile.name} has no faces: add a 'faces' section, or --face with one of {ready}")
    if unknown := [name for name in chosen if name not in known]:
        own = f"it has: {', '.join(profile.faces)}; " if profile.faces else ""
        raise UsageError(f"--face: profile {profile.name} has no face {unknown[0]!r} ({own}the library has: {ready})")
    return {name: known[name].pair() for name in chosen}


def _require_usable(data: "DataSettings") -> None:
    """Say what is wrong with the data before a large patient is loaded for it."""
    from llmdoctor.token_rewards.pairs import read_pairs

    next(iter(read_pairs(data.source, split=data.split, label=data.label, limit=1)), None)


class _Skips:
    """Says why records are skipped, the first twenty of them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, record: "SkippedRecord") -> None:
        self.count += 1
        if self.count <= _SKIPS_SHOWN:
            say(f"line {record.line}: {record.reason}")

    def close(self, output: Path) -> None:
        if self.count > _SKIPS_SHOWN:
            say(f"... and {self.count - _SKIPS_SHOWN} more records skipped: skipped_lines in {output / 'meta.json'}")


def _report(output: Path, meta: dict[str, Any], seconds: float) -> dict[str, Any]:
    counts = meta["counts"]
    return {
        "output": str(output),
        "patient": meta["patient"]["model"],
        "data": meta["dataset"]["source"],
        "faces": list(meta["faces"]),
        "read": counts["pairs"] + counts["skipped"],
        "skipped": meta["skipped"],
        "truncated_prompts": counts["truncated_prompts"],
        "written": counts["pairs"],
        "tokens": counts["tokens"],
        "seconds": round(seconds, 2),
        "statistics": meta["statistics"],
    }


def _summary(report: dict[str, Any]) -> str:
    cut = report["truncated_prompts"]
    lines = [
        f"read {report['read']} records of {report['data']}",
        *(f"skipped {count}: {reason}" for reason, count in report["skipped"].items()),
        *([f"cut {cut} prompts from the left: the patient's context is short"] if cut else []),
        f"wrote {report['written']} pairs, {report['tokens']} tokens, to {report['output']}"
        f" in {report['seconds']:.1f} s",
        *flat_lines(report["statistics"]),
    ]
    return "\n".join(lines)
