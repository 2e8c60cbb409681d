"""Options that commands share, and how they meet the profile: flags beat LLMDOCTOR_* beat the profile beat defaults.

An option that was not given is None. `llmdoctor.profile.override` lays what was given over a section of the profile and
lets the profile's own schema check it, so that a range is stated once.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli.terminal import waiting
from llmdoctor.errors import UsageError
from llmdoctor.show.formats import short_name

if TYPE_CHECKING:
    from llmdoctor.assistant import LLMdoctor
    from llmdoctor.profile import Profile
    from llmdoctor.settings import RewardSettings


GREATEST_SEED = 2**32 - 1  # numpy's limit


def option(name: str, help: str, *, short: str | None = None, env: str | None = None, **more: Any) -> Any:
    """A Typer option that LLMDOCTOR_<NAME> sets too; ``env`` names it where two commands mean different things."""
    names = [name, short] if short else [name]
    variable = env or name.split("/", maxsplit=1)[0].removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        *names, help=help, envvar=f"LLMDOCTOR_{variable}", show_default=False, show_envvar=env is not None, **more
    )


ProfileName = Annotated[str | None, option("--profile", "Profile name or YAML file (default: clinic).", metavar="NAME")]
Json = Annotated[bool, option("--json", "JSON on stdout and nothing else.")]
Patient = Annotated[str | None, option("--patient", "Patient: model folder or hub name.", metavar="MODEL")]
Device = Annotated[str | None, option("--device", "auto, cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[str | None, option("--dtype", "auto, float32, bfloat16, float16.")]
TrustRemoteCode = Annotated[bool, option("--trust-remote-code", "Run code that a model repository ships.")]
Seed = Annotated[
    int | None, option("--seed", "Seed (default: a fresh one, shown).", min=0, max=GREATEST_SEED, metavar="N")
]

FaceNames = Annotated[list[str] | None, option("--face", "Face pair to use; repeatable.", metavar="NAME")]
DirectionName = Annotated[
    str | None, option("--direction", "Sign of the rewards: label, gap, agree or fitted.", metavar="KIND")
]
Tau = Annotated[float | None, option("--tau", "Softness of the importance S_t (> 0).")]
Theta = Annotated[float | None, option("--theta", "Importance below which a token earns nothing, in [0, 1).")]

Doctors = Annotated[
    list[str] | None, option("--doctor", "Trained doctor, PATH or NAME=PATH; repeatable.", metavar="[NAME=]PATH")
]
DoctorBase = Annotated[
    str | None, option("--doctor-base", "Base model of the doctors, if not the one they name.", metavar="MODEL")
]
Alpha = Annotated[float | None, option("--alpha", "Weight of the patient (>= 0).")]
Betas = Annotated[
    list[str] | None, option("--beta", "Weight of the doctors: 0.8, or helpful=0.8; repeatable.", metavar="[NAME=]X")
]
Mode = Annotated[str | None, option("--mode", "product, or ratio: doctors over their bases.", metavar="KIND")]
Temperature = Annotated[float | None, option("--temperature", "0 is greedy.")]
TopK = Annotated[int | None, option("--top-k", "Keep the k likeliest tokens (0: off).")]
TopP = Annotated[float | None, option("--top-p", "Keep the likeliest tokens that make up p, in (0, 1].")]
MinP = Annotated[float | None, option("--min-p", "Drop tokens below this part of the likeliest, in [0, 1).")]
Speculation = Annotated[
    bool | None,
    option("--speculation/--no-speculation", "Let a doctor draft ahead (default); the answers stay the same."),
]
MaxNewTokens = Annotated[int | None, option("--max-new-tokens", "Longest answer.", metavar="N")]


def load(name: str | None) -> "Profile":
    """The named profile, or ``clinic``."""
    from llmdoctor.profile import load_profile

    return load_profile(name or "clinic")


def fitting(profile: "Profile", name: str | None, fingerprint: str) -> "Profile":
    """The profile, for rewards of the patient with this fingerprint.

    Unnamed, it is the clinic's, whose settings of rewards and training suit that small world alone: on another patient
    the general ones of `RewardSettings` and `TrainSettings` stand in for them.
    """
    from llmdoctor.models import model_fingerprint
    from llmdoctor.settings import RewardSettings, TrainSettings

    if name or fingerprint == model_fingerprint(profile.patient.model):
        return profile
    return profile.model_copy(update={"rewards": RewardSettings(), "train": TrainSettings()})


def parse_betas(values: Iterable[str], names: Sequence[str]) -> dict[str, float]:
    """``0.8`` sets every doctor, ``helpful=0.8`` one; a later value beats an earlier one."""
    betas: dict[str, float] = {}
    for value in values:
        name, equals, number = value.rpartition("=")
        if equals and name not in names:
            known = ", ".join(names) or "none"
            raise UsageError(f"--beta: there is no doctor named {name!r} (there are: {known})")
        beta = parse_number("--beta", number)
        betas.update({name: beta} if equals else dict.fromkeys(names, beta))
    return betas


def parse_number(name: str, text: str) -> float:
    """The number, or a usage error that names the option."""
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{name}: expected a number, got {text!r}") from None


def parse_doctors(values: Sequence[str]) -> dict[str, str]:
    """``NAME=PATH`` or ``PATH``; a doctor without a name here is called as its doctor.json says."""
    doctors: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or "/" in name or Path(value).exists():
            name, path = _own_name(Path(value)), value
        if not name or not path:
            raise UsageError(f"--doctor: expected PATH or NAME=PATH, got {value!r}")
        if name in doctors:
            raise UsageError(f"--doctor: two doctors are named {name!r}; tell them apart with NAME=PATH")
        doctors[name] = path
    return doctors


def _own_name(checkpoint: Path) -> str:
    try:
        return str(json.loads((checkpoint / "doctor.json").read_text(encoding="utf-8")).get("name") or "doctor")
    except (OSError, ValueError, AttributeError):
        return "doctor"  # what is wrong with the folder is said, better, by the code that loads it


def guided_profile(
    profile: "Profile",
    *,
    named: bool,
    patient: Mapping[str, Any],
    doctors: Sequence[str] | None,
    doctor_base: str | None,
    betas: Sequence[str] | None,
    decode: Mapping[str, Any],
) -> "Profile":
    """The profile with the options of ``chat`` and ``compare`` laid over it.

    ``named`` False, it is the clinic's because nobody asked for another: its way to combine models suits its own
    doctors, and other ones get the general way of `DecodeSettings`.
    """
    from llmdoctor.profile import override
    from llmdoctor.settings import DecodeSettings, DoctorSettings

    chosen = dict(profile.doctors)
    decoding = profile.decode
    if doctors:
        if not named:
            decoding = override(decoding, **DecodeSettings().model_dump(include={"mode", "plausibility"}))
        chosen = {name: DoctorSettings(checkpoint=path) for name, path in parse_doctors(doctors).items()}
    strengths = parse_betas(betas or (), tuple(chosen))
    return profile.model_copy(
        update={
            "patient": override(profile.patient, **patient),
            "doctors": {
                name: override(settings, base=doctor_base, beta=strengths.get(name))
                for name, settings in chosen.items()
            },
            "decode": override(decoding, **decode),
        }
    )


def load_assistant(profile: "Profile", *, trust_remote_code: bool) -> "LLMdoctor":
    """The patient and its doctors, with a spinner while they load."""
    with waiting(f"Loading {', '.join([short_name(profile.patient.model), *profile.doctors])} ..."):
        return assistant(profile, trust_remote_code=trust_remote_code)


def assistant(profile: "Profile", *, trust_remote_code: bool) -> "LLMdoctor":
    """The patient and its doctors; this process then takes as many threads as pay for models of their size."""
    from llmdoctor.assistant import LLMdoctor
    from llmdoctor.models import spare_threads

    made = LLMdoctor.from_profile(profile, trust_remote_code=trust_remote_code)
    spare_threads(made.patient.model)
    return made


def require_screen(flag: str, writes_elsewhere: bool) -> None:
    """Refuse ``flag`` where there is no terminal for a full screen, or beside an option that prints instead."""
    from llmdoctor.tui.launch import full_screen

    if writes_elsewhere:
        raise UsageError(f"choose one of {flag} and the options that write a result")
    if not full_screen(sys.stdin, sys.stdout):
        raise UsageError(f"{flag} needs a terminal on stdin and stdout that can draw a full screen")


def reward_settings(
    profile: "Profile",
    *,
    available: Sequence[str],
    faces: Sequence[str] | None,
    direction: str | None,
    tau: float | None,
    theta: float | None,
) -> "RewardSettings":
    """How stored scores become rewards; the profile's faces count only where the folder holds them."""
    from llmdoctor.profile import override

    if unknown := sorted(set(faces or ()) - set(available)):
        raise UsageError(f"--face: this folder holds no face {unknown[0]!r} (it holds: {', '.join(available)})")
    named = tuple(faces) if faces else None
    settings = override(profile.rewards, faces=named, direction=direction, tau=tau, theta=theta)
    if settings.faces is not None and not set(settings.faces) <= set(available):
        settings = settings.model_copy(update={"faces": None})
    return settings


def fresh_seed() -> int:
    """A seed short enough to type again."""
    import secrets

    return secrets.randbelow(100_000)
