"""Options that commands share, and how they meet the profile: flags beat LLMDOCTOR_* beat the profile beat defaults.

Options of settings derive from their schema: a command that takes a `FieldOptions` group gets an option for every field
of it. An option that was not given is None; `llmdoctor.profile.override` changes a section of the profile by the
others, and checks them.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from llmdoctor.cli.every_command import Quiet, Verbose
from llmdoctor.cli.terminal import waiting
from llmdoctor.errors import LLMDoctorError, UsageError
from llmdoctor.schema import Settings, help_text
from llmdoctor.settings import (
    COMBINATION,
    GREATEST_SEED,
    DataSettings,
    DecodeSettings,
    PatientSettings,
    RewardSettings,
    Sampling,
    TrainSettings,
    WelcomeSettings,
)
from llmdoctor.show.formats import short_name
from llmdoctor.show.text import clean

if TYPE_CHECKING:
    from llmdoctor.assistant import LLMdoctor
    from llmdoctor.profile import Profile


_T = TypeVar("_T")


def option(name: str, help: str, *, short: str | None = None, env: str | None = None, **more: Any) -> Any:
    """A Typer option that LLMDOCTOR_<NAME> sets too; ``env`` names it where two commands mean different things."""
    names = [name, short] if short else [name]
    variable = env or name.split("/", maxsplit=1)[0].removeprefix("--").replace("-", "_").upper()
    return typer.Option(
        *names, help=help, envvar=f"LLMDOCTOR_{variable}", show_default=False, show_envvar=env is not None, **more
    )


def field_option(schema: type[Settings], name: str, flag: str | None = None, **more: Any) -> Any:
    """The option of one field: its name and help are the field's own."""
    return option(flag or f"--{name.replace('_', '-')}", help_text(schema, name), **more)


@dataclass(frozen=True)
class FieldOptions:
    """In a command's signature: an option for every field of ``schema``; the parameter is a mapping of their values.

    ``more`` are keywords of `field_option` for single fields; ``panel`` is their heading in ``--help``.
    """

    schema: type[Settings]
    panel: str
    without: tuple[str, ...] = ()
    more: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def parameters(self) -> list[Parameter]:
        """The parameters that Typer makes options of."""
        names = [name for name in self.schema.model_fields if name not in self.without]
        return [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=self._annotation(name)) for name in names
        ]

    def _annotation(self, name: str) -> Any:
        annotation = self.schema.model_fields[name].annotation
        kind = _option_type(annotation)
        how: dict[str, Any] = dict(self.more.get(name, {}))
        # of all types: the columns of the help must leave room for the names of the options at 80 columns
        panel = f"{self.panel}, on or off" if kind is bool else self.panel
        if kind is bool:
            how.setdefault("flag", "--{0}/--no-{0}".format(name.replace("_", "-")))
        else:
            metavar = {float: "X", int: "N", list[str]: "TEXT ..."}.get(kind, "TEXT")
            if get_origin(annotation) is Literal:
                metavar = "KIND"
                how.setdefault("autocompletion", _beginning_of(get_args(annotation)))
            how.setdefault("metavar", metavar)
        return Annotated[kind | None, field_option(self.schema, name, rich_help_panel=panel, **how)]


def _beginning_of(words: Sequence[str]) -> Callable[[str], list[str]]:
    """Completes to those ``words`` that begin with what was typed."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def _option_type(annotation: Any) -> Any:
    """What Typer parses for a field: bool, int or float, several strings for a tuple, one for everything else."""
    for part in (annotation, *get_args(annotation)):
        if part in (bool, int, float):
            return part
        if get_origin(part) is tuple:
            return list[str]
    return str


def derived(command: Callable[..., None]) -> Callable[..., None]:
    """The command as Typer needs it: every group of options in its signature replaced by these options."""
    parameters: list[Parameter] = []
    groups: dict[str, list[str]] = {}
    for parameter in signature(command).parameters.values():
        group = next(
            (mark for mark in get_args(parameter.annotation) if isinstance(mark, FieldOptions | GuidedOptions)), None
        )
        own = group.parameters() if group else [parameter]
        parameters += own
        if group:
            groups[parameter.name] = [one.name for one in own]

    @wraps(command)
    def run(**given: Any) -> None:
        del given["quiet"], given["verbose"]  # their callbacks have acted
        sections = {name: {key: given.pop(key) for key in keys} for name, keys in groups.items()}
        command(**given, **sections)

    parameters += [
        Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
        Parameter("verbose", Parameter.KEYWORD_ONLY, default=False, annotation=Verbose),
    ]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    # help would break the lines where the docstring does
    run.__doc__ = re.sub(r"(?<=\S)\n *(?=\S)", " ", command.__doc__ or "")
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def require_outputs(files: Iterable[Path | None], folders: Iterable[Path | None] = ()) -> None:
    """Raise UsageError for an output that cannot be one, before anything is loaded."""
    from llmdoctor.files import require_file, require_folder

    for path in filter(None, files):
        require_file(path)
    for path in filter(None, folders):
        require_folder(path)


def complete_profile(incomplete: str) -> list[str]:
    """The profiles whose names begin so, for the shell."""
    from llmdoctor.profile import profile_names

    return _harmless(name for name in profile_names() if name.startswith(incomplete))


def complete_doctor(incomplete: str) -> list[str]:
    """Doctor folders below what was typed so far, for the shell."""
    typed = Path(incomplete)
    start = typed if incomplete.endswith("/") else typed.parent
    below = [*start.glob("*/doctor.json"), *start.glob("*/*/doctor.json"), *start.glob("*/*/*/doctor.json")]
    found = sorted(str(marker.parent) for marker in below if str(marker.parent).startswith(incomplete))
    return _harmless(found or sorted(f"{p}/" for p in start.glob("*/") if str(p).startswith(incomplete)))


def _harmless(names: Iterable[str]) -> list[str]:
    """Those that a terminal may show as they are: what the shell completes must be the name itself."""
    return [name for name in names if name == clean(name)]


def complete_beta(context: typer.Context, incomplete: str) -> list[str]:
    """``helpful=``, for the doctors of the profile or the options typed so far."""
    doctors = context.params.get("doctor")
    try:
        names = parse_doctors(doctors) if doctors else load(context.params.get("profile")).doctors
    except LLMDoctorError:
        return []
    return [f"{name}=" for name in names if name.startswith(incomplete)]


def require_seed(seed: int | None) -> int | None:
    """The seed, if it is one; ``min`` and ``max`` would take the room of the help for a long number."""
    if seed is not None and not 0 <= seed <= GREATEST_SEED:
        raise typer.BadParameter(f"expected a whole number from 0 to {GREATEST_SEED}, got {seed}")
    return seed


ProfileName = Annotated[
    str | None,
    option(
        "--profile",
        "Profile name or YAML file (default: clinic).",
        metavar="NAME",
        autocompletion=complete_profile,
    ),
]
Json = Annotated[bool, option("--json", "JSON on stdout and nothing else.")]
Patient = Annotated[str | None, field_option(PatientSettings, "model", "--patient", metavar="MODEL")]
TrustRemoteCode = Annotated[bool, option("--trust-remote-code", "Run code that a model repository ships.")]
Data = Annotated[str | None, field_option(DataSettings, "source", "--data")]
Split = Annotated[str | None, field_option(DataSettings, "split")]
Label = Annotated[str | None, field_option(DataSettings, "label")]
Columns = Annotated[str | None, field_option(DataSettings, "columns", metavar="NAMES")]
Seed = Annotated[
    int | None,
    option("--seed", f"{Sampling.model_fields['seed'].description}.", callback=require_seed, metavar="N"),
]
FaceNames = Annotated[list[str] | None, option("--face", "Face pair to use; repeatable.", metavar="NAME")]
Doctors = Annotated[
    list[str] | None,
    option(
        "--doctor",
        "Trained doctor in place of the profile's, PATH or NAME=PATH; repeatable.",
        metavar="[NAME=]PATH",
        autocompletion=complete_doctor,
    ),
]
DoctorBase = Annotated[
    str | None, option("--doctor-base", "Base model of the doctors, if not the one they name.", metavar="MODEL")
]
Betas = Annotated[
    list[str] | None,
    option(
        "--beta",
        "Weight of the doctors: 0.8, or helpful=0.8; repeatable.",
        metavar="[NAME=]X",
        autocompletion=complete_beta,
    ),
]

Given = dict[str, Any]
_LOADING = FieldOptions(PatientSettings, "How the patient is loaded", without=("model", "system_prompt"))
_DECODING = FieldOptions(DecodeSettings, "Guidance and sampling")
HowLoaded = Annotated[Given, _LOADING]


@dataclass(frozen=True)
class GuidedOptions:
    """The same for all that `guided_profile` takes. ``doctor`` is the option or argument that names the doctors."""

    doctor: Any = Doctors

    def parameters(self) -> list[Parameter]:
        """The parameters that Typer makes options of."""
        own = {
            "profile": ProfileName,
            "patient": Patient,
            "doctor": self.doctor,
            "doctor_base": DoctorBase,
            "beta": Betas,
        }
        named = [
            Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in own.items()
        ]
        return [*named, *_DECODING.parameters(), *_LOADING.parameters()]


Guided = Annotated[Given, GuidedOptions()]
Rewards = Annotated[Given, FieldOptions(RewardSettings, "Rewards", without=("faces",))]
Train = Annotated[
    Given,
    FieldOptions(
        TrainSettings,
        "Training",
        more={"doctor": {"env": "TRAIN_DOCTOR"}, "keep_best": {"flag": "--keep-best/--keep-last"}},
    ),
]


def load(name: str | None) -> "Profile":
    """The named profile, or ``clinic``."""
    from llmdoctor.profile import load_profile

    return load_profile(name or "clinic")


def fitting(profile: "Profile", name: str | None, fingerprint: str) -> "Profile":
    """The profile, for rewards of the patient with this fingerprint.

    Without a ``name`` it is the clinic's, whose settings of rewards and training suit its own small patient alone:
    another patient gets the defaults of `RewardSettings` and `TrainSettings`.
    """
    from llmdoctor.models import model_fingerprint

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
    """``NAME=PATH`` or ``PATH``; see `named_doctors`."""
    from llmdoctor.profile import named_doctors

    return named_doctors(values, "--doctor")


def guided_profile(given: Mapping[str, Any], profile: "Profile | None" = None) -> "Profile":
    """The profile named by the options of a `GuidedOptions` group, else ``profile``, overridden by the other options.

    Where nobody chose a profile it is the clinic's, whose mode and plausibility are chosen for its own doctors; doctors
    given as options get the defaults of `DecodeSettings`.
    """
    from llmdoctor.files import require_doctor
    from llmdoctor.profile import in_place_of, override

    if profile is None or given["profile"]:
        profile = load(given["profile"])
    chosen = dict(profile.doctors)
    decoding = profile.decode
    if given["doctor"]:
        if not given["profile"]:
            decoding = override(decoding, **DecodeSettings().model_dump(include=set(COMBINATION)))
        chosen = in_place_of(chosen if given["profile"] else {}, parse_doctors(given["doctor"]))
    strengths = parse_betas(given["beta"] or (), tuple(chosen))
    for one in chosen.values():  # before a screen opens, and before the hub is asked for a patient
        require_doctor(one.checkpoint)
    return profile.model_copy(
        update={
            "patient": override(profile.patient, model=given["patient"], **_of(PatientSettings, given)),
            # what the profile says of its own patient says nothing of another
            "welcome": WelcomeSettings() if given["patient"] else profile.welcome,
            "doctors": {
                name: override(settings, base=given["doctor_base"], beta=strengths.get(name))
                for name, settings in chosen.items()
            },
            "decode": override(decoding, **_of(DecodeSettings, given)),
        }
    )


def _of(schema: type[Settings], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in schema.model_fields}


def load_assistant(profile: "Profile", *, trust_remote_code: bool, with_bases: bool = False) -> "LLMdoctor":
    """The patient and its doctors, with a spinner while they load; ``with_bases`` as in `LLMdoctor`."""
    with waiting(f"Loading {', '.join([short_name(profile.patient.model), *profile.doctors])} ..."):
        return assistant(profile, trust_remote_code=trust_remote_code, with_bases=with_bases)


def assistant(profile: "Profile", *, trust_remote_code: bool, with_bases: bool = False) -> "LLMdoctor":
    """The patient and its doctors; torch gets as many threads as models of their size can use."""
    from llmdoctor.assistant import LLMdoctor
    from llmdoctor.models import spare_threads

    made = LLMdoctor.from_profile(profile, trust_remote_code=trust_remote_code, with_bases=with_bases)
    spare_threads(made.patient.model)
    return made


def require_screen(flag: str, writes_elsewhere: bool) -> None:
    """Refuse ``flag`` without a terminal for a full screen, or together with an option that prints instead."""
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
    **given: Any,
) -> RewardSettings:
    """How stored scores become rewards, with the options ``given`` for them; ``available`` faces are in the folder.

    The profile's own faces count only where the folder holds them.
    """
    from llmdoctor.profile import override

    if unknown := sorted(set(faces or ()) - set(available)):
        raise UsageError(f"--face: this folder holds no face {unknown[0]!r} (it holds: {', '.join(available)})")
    named = tuple(faces) if faces else None
    settings = override(profile.rewards, faces=named, **given)
    if settings.faces is not None and not set(settings.faces) <= set(available):
        settings = settings.model_copy(update={"faces": None})
    return settings


def fresh_seed() -> int:
    """A seed short enough to type again, the same in all processes."""
    import secrets

    return of_first_process(lambda: secrets.randbelow(100_000))


def of_first_process(make: Callable[[], _T]) -> _T:
    """What ``make`` returns in the first process of `torchrun`, in all of them: they must take the same steps."""
    if "RANK" not in os.environ:
        return make()
    from llmdoctor.token_rewards.processes import team

    with team() as processes:
        return processes.from_first(make)
