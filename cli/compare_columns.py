"""The columns of ``compare``: what ``--vs`` and ``--sweep`` ask for, and the models that answer."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from llmdoctor.cli import options
from llmdoctor.errors import UsageError
from llmdoctor.set_command import parse_settings, setting_items
from llmdoctor.settings import DoctorSettings, Guidance, Sampling, check_guidance

if TYPE_CHECKING:
    from llmdoctor.assistant import LLMdoctor
    from llmdoctor.cli.kept_run import KeptRun
    from llmdoctor.comparing import Answers, Column
    from llmdoctor.profile import Profile

_MOST_POINTS = 1000
_RANGE = re.compile(r"([^:]+):([^:]+):([^:]+)")


@dataclass(frozen=True, slots=True)
class Plan:
    """A column before its models are loaded: the profile that names them, and how it speaks.

    ``guidance`` None is the patient alone.
    """

    name: str
    profile: "Profile"
    guidance: Guidance | None
    sampling: Sampling

    def column(self, assistant: "Answers | None" = None) -> "Column":
        """As a run takes it; without models where every answer is known."""
        from llmdoctor.comparing import Column

        return Column(self.name, assistant, self.guidance, self.sampling)


def sides(profile: "Profile") -> list[Plan]:
    """The patient alone and the guided patient."""
    sampling = profile.decode.sampling()
    guidance = profile.decode.guidance(profile.doctors)
    return [Plan("patient", profile, None, sampling), Plan("guided", profile, guidance, sampling)]


def another(
    text: str,
    main: "Profile",
    *,
    flag: str,
    doctor_base: str | None,
    load_profile: Callable[[str], "Profile"],
) -> Plan:
    """A column that differs from the guided one by ``text``: settings as in ``/set``, a doctor, a profile.

    ``beta=2 temperature=0.5``, ``doctor=PATH`` or ``doctor=NAME=PATH`` (all of them in place of the others),
    ``profile=NAME``, ``system_prompt="..."``. Raises UsageError, which names ``flag``.
    """
    try:
        items = setting_items(text)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}") from error
    settings: list[str] = []
    profiles: list[str] = []
    doctors: list[str] = []
    prompts: list[str] = []
    kinds = {"profile": profiles, "doctor": doctors, "system_prompt": prompts, "system-prompt": prompts}
    for item in items:
        name, _, value = item.partition("=")
        if name not in kinds:
            settings.append(item)
        elif value:
            kinds[name].append(value)
        else:
            raise UsageError(f"{flag}: expected {name}=..., got {item!r}")
    if len(profiles) > 1 or len(prompts) > 1:
        raise UsageError(f"{flag}: expected one profile and one system prompt, got {text!r}")
    profile = load_profile(profiles[0]) if profiles else main
    if doctors:
        profile = profile.model_copy(update={"doctors": _like(profile.doctors, doctors, doctor_base)})
    if prompts:
        patient = profile.patient.model_copy(update={"system_prompt": prompts[0]})
        profile = profile.model_copy(update={"patient": patient})
    guidance, sampling = profile.decode.guidance(profile.doctors), profile.decode.sampling()
    if settings:
        names = tuple(profile.doctors)
        guidance, sampling = parse_settings(settings, names, guidance, sampling, command=flag)
    return Plan(text.strip(), profile, guidance, sampling)


def _like(
    present: Mapping[str, DoctorSettings], given: Sequence[str], doctor_base: str | None
) -> dict[str, DoctorSettings]:
    """The doctors ``given``, each as strong as the one of its name, or as the only one there is."""
    made = {}
    for name, path in options.parse_doctors(given).items():
        like = present.get(name) or (next(iter(present.values())) if len(present) == 1 else None)
        strength = like.model_dump(include={"beta", "dead_zone"}) if like else {}
        made[name] = DoctorSettings(checkpoint=path, base=doctor_base, **strength)
    return made


def sweep_points(given: Sequence[str]) -> list[dict[str, str]]:
    """The points of a grid, each a value per setting: ``beta=0:2:0.2``, ends included, or ``mode=ratio,product``."""
    values: dict[str, list[str]] = {}
    for text in given:
        name, equals, listed = text.strip().partition("=")
        if not equals or not name or not listed:
            raise UsageError(f"--sweep: expected NAME=FROM:TO:STEP or NAME=A,B,C, got {text!r}")
        if name in values:
            raise UsageError(f"--sweep: {name} is given twice")
        values[name] = _range(text, listed) if _RANGE.fullmatch(listed) else listed.split(",")
    points = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    if len(points) > _MOST_POINTS:
        raise UsageError(f"--sweep: expected at most {_MOST_POINTS} points, got {len(points)}")
    return points


def _range(text: str, listed: str) -> list[str]:
    start, stop, step = (options.parse_number("--sweep", part) for part in listed.split(":"))
    if not step > 0 or not start <= stop or not (stop - start) / step < _MOST_POINTS:
        wanted = f"a step above 0, TO not below FROM, and at most {_MOST_POINTS} points"
        raise UsageError(f"--sweep: expected {wanted}, got {text!r}")
    count = int((stop - start) / step + 1e-6) + 1
    return [f"{round(start + i * step, 10):g}" for i in range(count)]


class Models:
    """The models of all columns, loaded when an answer is missing; columns of one patient share it and its doctors."""

    def __init__(self, plans: Iterable[Plan], *, trust_remote_code: bool) -> None:
        self._plans, self._trust = list(plans), trust_remote_code
        self._loaded: dict[str, LLMdoctor] = {}

    def columns(self, plans: Sequence[Plan], kept: "KeptRun", *, silent: bool = False) -> "list[Column]":
        """The plans with their models, or without where every answer is known; ``silent`` without a spinner."""
        columns = [plan.column() for plan in plans]
        if not kept.begin(columns):
            return columns
        if not self._loaded:
            self._load(options.assistant if silent else options.load_assistant)
        return [plan.column(self._loaded[_models_of(plan.profile)]) for plan in plans]

    def _load(self, load: Callable[..., "LLMdoctor"]) -> None:
        for plan in self._plans:
            check_guidance(plan.guidance or Guidance(), tuple(plan.profile.doctors))
        pools: dict[str, list[Plan]] = {}
        for plan in self._plans:
            pools.setdefault(_patient_of(plan.profile), []).append(plan)
        for pool in pools.values():
            self._load_pool(pool, load)

    def _load_pool(self, pool: Sequence[Plan], load: Callable[..., "LLMdoctor"]) -> None:
        profiles = {_models_of(plan.profile): plan.profile for plan in pool}
        doctors: dict[str, DoctorSettings] = {}
        names = {key: _joined(profile.doctors, doctors) for key, profile in profiles.items()}
        first = pool[0].profile
        if any(plan.guidance is not None and plan.guidance.mode == "ratio" for plan in pool):
            decode = first.decode.model_copy(update={"mode": "ratio"})  # the doctors' bases are needed from the start
            first = first.model_copy(update={"decode": decode})
        loaded = load(first.model_copy(update={"doctors": doctors}), trust_remote_code=self._trust)
        for key, profile in profiles.items():
            self._loaded[key] = loaded.part(names[key], system_prompt=profile.patient.system_prompt)


def _joined(own: Mapping[str, DoctorSettings], doctors: dict[str, DoctorSettings]) -> dict[str, str]:
    """Add a profile's doctors to those that are loaded together; each one's name there."""
    names: dict[str, str] = {}
    before = {(doctor.checkpoint, doctor.base): name for name, doctor in doctors.items()}
    for name, doctor in own.items():
        loaded = before.get((doctor.checkpoint, doctor.base))
        if loaded is None:
            loaded = next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(doctors) + 3))) if n not in doctors)
            doctors[loaded] = doctor
        names[name] = loaded
    return names


def _patient_of(profile: "Profile") -> str:
    """The same for profiles that can share one patient."""
    return repr((profile.patient.model, profile.patient.loading(), profile.decode.draft_model))


def _models_of(profile: "Profile") -> str:
    """The same for profiles that need the same models in the same roles."""
    doctors = [(name, doctor.checkpoint, doctor.base) for name, doctor in profile.doctors.items()]
    return repr((_patient_of(profile), doctors, profile.patient.system_prompt))
