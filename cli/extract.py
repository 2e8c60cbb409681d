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
from llmdoctor.show.formats import counted, short_name

if TYPE_CHECKING:
    from llmdoctor.profile import Profile
    from llmdoctor.records import FacePair, PairShape, SkippedRecord
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
    columns: options.Columns = None,
    face: options.FaceNames = None,
    output: Annotated[
        Path, option("--output", "Rewards folder (default: outputs/rewards).", short="-o", env="EXTRACT_OUTPUT")
    ] = Path("outputs/rewards"),
    limit: Annotated[int | None, option("--limit", "Use the first N usable pairs.", metavar="N", min=1)] = None,
    shuffle: Annotated[bool, option("--shuffle", "Take the pairs in an order that --seed decides.")] = False,
    seed: Annotated[
        int, option("--seed", "Seed of --shuffle (default: 0).", callback=options.require_seed, metavar="N")
    ] = 0,
    probe: Annotated[
        bool | None,
        option(
            "--probe/--no-probe",
            "Also fit a probe of the patient's states to the pairs, for --direction advantage and probe.",
        ),
    ] = None,
    strict: Annotated[bool, option("--strict", "Stop at the first record that cannot be used.")] = False,
    batch_tokens: Annotated[
        int | None, option("--batch-tokens", "Tokens per forward (default: what fits).", metavar="N", min=1)
    ] = None,
    loading: options.HowLoaded,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Score every answer's tokens with the patient's own two faces, or by a probe of its hidden states.

    A run that was stopped continues where it was. The probe reads the answers three times more, without a face; it can
    be added to a finished folder by the same command with --probe.

    How the data hold their pairs is recognised by their columns:

    - chosen and rejected: texts, messages, ShareGPT turns or HH-RLHF transcripts

    - UltraFeedback, Nectar, distilabel: the best against the worst answer

    - HelpSteer2 (rows), HelpSteer2 preferences, HelpSteer3, SHP, PKU-SafeRLHF

    - AlpacaEval, Chatbot Arena conversations, Chatbot Arena responses

    - Argilla responses, OpenAI preferences

    Ties are skipped. Name the columns of all others with --columns.
    """
    from llmdoctor.profile import override
    from llmdoctor.settings import OF_STATES

    settings = options.load(profile)
    model = override(settings.patient, model=patient, **loading)
    source = _data(settings, data, split=split, label=label, columns=columns)
    probe = settings.rewards.direction in OF_STATES if probe is None else probe
    faces = chosen_faces(settings, face, needed=not probe)
    if not data:
        say(f"taking the pairs of the profile {settings.name}: {source.source} (--data names others)")
    shapes = _Shapes()
    _require_usable(source, shapes)

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    with waiting(f"Loading {short_name(model.model)} ..."):
        from llmdoctor.models import load_patient
        from llmdoctor.token_rewards.extract import extract as scored_pairs
        from llmdoctor.token_rewards.folder import RewardsFolder
        from llmdoctor.token_rewards.states import add_probe

        alone = model.device_map is None and model.tp_plan is None
        if processes > 1 and alone and model.device in {"auto", "cuda"}:  # one device per process
            import torch

            if torch.cuda.is_available():
                model = override(model, device=f"cuda:{os.environ['LOCAL_RANK']}")
        loaded = load_patient(model.model, trust_remote_code=trust_remote_code, **model.loading())
    before = _written(output)
    skips = _Skips()
    began = time.monotonic()
    with progress("Scoring", limit if processes == 1 else None, "pair") as advance:
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
            on_shape=shapes,
        )
        for _ in pairs:
            advance()
    skips.close(output)
    if probe:
        total = 3 * len(RewardsFolder(output)) if processes == 1 else None  # every pair is read three times
        with progress("Fitting a probe", total, "reading") as advance:
            for _ in add_probe(loaded, output, batch_tokens=batch_tokens):
                advance()
    folder = RewardsFolder(output)
    report = {**_report(output, folder.meta, time.monotonic() - began), "probe": folder.probe and _told(folder.probe)}
    found = findings.after_extraction(output, options.fitting(settings, profile, loaded.fingerprint).rewards)
    if done := before is not None and before == _written(output):
        say(f"{output} was finished already by the same command: nothing was changed")
    if as_json:
        put_json({**report, **found.as_dict()})
    else:
        put(_summary(report, done=done))
        found.show()


def _written(folder: Path) -> bytes | None:
    """What says that a rewards folder is finished."""
    try:
        return (folder / "meta.json").read_bytes()
    except OSError:
        return None


def _data(profile: "Profile", source: str | None, **how: str | None) -> "DataSettings":
    """The profile's data set, or the one named: it does not inherit the split, label and columns of the other."""
    from llmdoctor.profile import override
    from llmdoctor.schema import checked
    from llmdoctor.settings import DataSettings

    named = checked(DataSettings, {"source": source}) if source else profile.data
    if named is None:
        raise UsageError(f"profile {profile.name} names no preference pairs: give --data FILE")
    return override(named, **how)


def chosen_faces(profile: "Profile", names: Sequence[str] | None, *, needed: bool = True) -> "dict[str, FacePair]":
    """The face pairs named, from the profile or the library; else those that the profile uses.

    Raises UsageError for an unknown one, and for none at all where they are ``needed``.
    """
    from llmdoctor.profile import library_faces

    known = {**library_faces(), **profile.faces}
    ready = ", ".join(name for name in library_faces() if name not in profile.faces)
    chosen = names or profile.rewards.faces or tuple(profile.faces)
    if not chosen and needed:
        raise UsageError(f"profile {profile.name} has no faces: add a 'faces' section, or --face with one of {ready}")
    if unknown := [name for name in chosen if name not in known]:
        own = f"it has: {', '.join(profile.faces)}; " if profile.faces else ""
        raise UsageError(f"--face: profile {profile.name} has no face {unknown[0]!r} ({own}the library has: {ready})")
    return {name: known[name].pair() for name in chosen}


def _require_usable(data: "DataSettings", shapes: "_Shapes") -> None:
    """Say how the data are read, or what is wrong with them, before a large patient is loaded for them."""
    from llmdoctor.token_rewards.pairs import read_pairs

    next(iter(read_pairs(**data.model_dump(), limit=1, on_shape=shapes)), None)


class _Shapes:
    """Says once for each shape of pairs how it is read."""

    def __init__(self) -> None:
        self.said: set[str] = set()

    def __call__(self, shape: "PairShape") -> None:
        if shape.name not in self.said:
            say(str(shape))
        self.said.add(shape.name)


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


def _told(probe: dict[str, Any]) -> dict[str, Any]:
    """What is said of a probe: all but its files."""
    return {key: value for key, value in probe.items() if key != "files"}


def _summary(report: dict[str, Any], *, done: bool) -> str:
    """What a run did; ``done`` if all of it was there already."""
    cut = report["truncated_prompts"]
    held = f"{counted(report['written'], 'pair')}, {counted(report['tokens'], 'token')}"
    output, seconds = report["output"], report["seconds"]
    lines = [
        f"read {counted(report['read'], 'record')} of {report['data']}",
        *(f"skipped {count}: {reason}" for reason, count in report["skipped"].items()),
        *([f"cut {counted(cut, 'prompt')} from the left: the patient's context is short"] if cut else []),
        f"{output} holds {held}" if done else f"wrote {held}, to {output} in {seconds:.1f} s",
        *flat_lines(report["statistics"]),
        *(flat_lines({"probe": report["probe"]}) if report["probe"] else ()),
    ]
    return "\n".join(lines)
