"""Profiles: one YAML file holds every setting of the three stages. Its schema, its lookup, its error messages.

A value that names a model, a data set or a doctor and begins with ``./`` or ``../`` is relative to the profile's own
file, ``~/`` is the home folder, and anything else (a hub name, a path seen from the working folder) is left alone.
"""

import difflib
import os.path
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from llmdoctor.errors import ProfileError, UsageError
from llmdoctor.types import Direction, FacePair


def _resolve_location(value: str, info: ValidationInfo) -> str:
    if value.startswith("~/"):
        return os.path.expanduser(value)  # noqa: PTH111 (it stays a string: it may as well be a hub name)
    if value.startswith(("./", "../")) and info.context:
        return str(os.path.normpath(info.context["folder"] / value))
    return value


Location = Annotated[str, StringConstraints(min_length=1), AfterValidator(_resolve_location)]
Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PatientSettings(_Settings):
    """The large model that is steered and never changed."""

    model: Location
    dtype: str = "auto"
    device: str = "auto"
    system_prompt: str | None = None


class FaceSettings(_Settings):
    """Two system prompts that ask the patient for a behaviour and for its opposite."""

    positive: str = Field(min_length=1)
    negative: str = Field(min_length=1)

    def pair(self) -> FacePair:
        """The same as the engine's record."""
        return FacePair(self.positive, self.negative)


class DataSettings(_Settings):
    """Preference pairs: a file or a hub data set. ``label`` is the column that says which of two answers is better."""

    source: Location
    split: str = "train"
    label: str | None = None


class RewardSettings(_Settings):
    """How stored log-probs become token rewards. ``faces`` None means every face pair that the folder holds."""

    direction: Direction = "gap"
    tau: Positive = 1.0
    theta: float = Field(default=0.5, ge=0, lt=1)
    eps: Positive = 1e-6
    faces: tuple[str, ...] | None = Field(default=None, min_length=1)


class TrainSettings(_Settings):
    """Stage 2. ``doctor`` is the base model; ``batch_size`` counts preference pairs a step and device.

    ``ceiling`` is the greatest reward of a token that counts, None for no bound: with a low one only the blame is left,
    good tokens are worth the same, and the doctor does not prefer the few of them that the faces tell apart best.
    ``subtb_weight`` 1 weighs every sub-trajectory alike, less the shorter ones more: a token's reward is then credited
    to that token. ``value_weight`` is lambda, ``alternatives`` the further same-prefix token pairs a response that the
    value loss compares. ``method`` full trains every weight of the base.
    ``holdout`` is the share of pairs that is only evaluated on; ``checkpoint_every`` how often to evaluate and to keep
    a checkpoint, in steps (below 1: that share of the run); ``patience`` the evaluations without a better held-out loss
    after which to stop; ``keep_best`` ends with the weights of the best evaluation instead of the last step's.
    ``report_to`` names what else follows the run, as transformers' TrainingArguments has it: tensorboard, wandb, ...
    """

    doctor: Location | None = None
    method: Literal["lora", "full"] = "lora"
    flow: Literal["relative", "absolute"] = "relative"
    anchor: bool = True
    rho: Positive = 10.0
    ceiling: NonNegative | None = None
    subtb_weight: float = Field(default=0.2, gt=0, le=1)
    value_weight: NonNegative = 0.1
    gamma: NonNegative = 1.0
    alternatives: int = Field(default=0, ge=0)
    lora_rank: Count = 16
    lora_alpha: Positive = 32.0
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    learning_rate: Positive = 1e-3
    value_learning_rate: Positive | None = None
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    lr_scheduler: str = "cosine"
    batch_size: Count = 16
    gradient_accumulation: Count = 1
    epochs: Positive = 1.0
    max_steps: Count | None = None
    max_grad_norm: NonNegative = 1.0
    weight_decay: NonNegative = 0.0
    gradient_checkpointing: bool = False
    holdout: float = Field(default=0.0, ge=0, lt=1)
    checkpoint_every: Positive = 0.1
    patience: Count | None = None
    keep_best: bool = True
    report_to: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)
    dtype: str = "auto"
    device: str = "auto"


class DoctorSettings(_Settings):
    """A trained doctor. ``base`` None takes the base model that the doctor's own folder names.

    ``dead_zone``, nats, is for mode "ratio": see `llmdoctor.types.Guidance`.
    """

    checkpoint: Location
    base: Location | None = None
    beta: NonNegative = 0.8
    dead_zone: NonNegative = 0.0


class DecodeSettings(_Settings):
    """Stage 3; the fields mean what they mean in `llmdoctor.types.Guidance` and `llmdoctor.types.Sampling`.

    ``speculation``: a doctor drafts, the patient checks several tokens at a time. The same answers, sooner.
    """

    alpha: NonNegative = 1.0
    mode: Literal["product", "ratio"] = "product"
    plausibility: float = Field(default=0.1, ge=0, le=1)
    temperature: NonNegative = 1.0
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    max_new_tokens: Count = 256
    stop: tuple[str, ...] = ()
    speculation: bool = True


class Profile(_Settings):
    """Every setting of the three stages. ``name`` is the file's name without its suffix."""

    name: str
    description: str = ""
    patient: PatientSettings
    faces: dict[Name, FaceSettings] = {}
    data: DataSettings | None = None
    rewards: RewardSettings = RewardSettings()
    train: TrainSettings = TrainSettings()
    doctors: dict[Name, DoctorSettings] = {}
    decode: DecodeSettings = DecodeSettings()

    @model_validator(mode="after")
    def _rewards_use_known_faces(self) -> "Profile":
        for face in self.rewards.faces or ():
            if self.faces and face not in self.faces and face not in library_faces():
                raise ValueError(
                    f"'rewards.faces' names {face!r}, but 'faces' has only {', '.join(self.faces)} "
                    f"and the library {', '.join(library_faces())}"
                )
        return self


_LIBRARY = "faces.yaml"
_SECTIONS: dict[str, type[_Settings]] = {
    "patient": PatientSettings,
    "data": DataSettings,
    "rewards": RewardSettings,
    "train": TrainSettings,
    "decode": DecodeSettings,
    "faces": FaceSettings,
    "doctors": DoctorSettings,
}

SettingsT = TypeVar("SettingsT", bound=_Settings)


def override(settings: SettingsT, **changes: Any) -> SettingsT:
    """A copy with those ``changes`` that are not None, checked as in a profile; `UsageError` if one is out of range."""
    given = {key: value for key, value in changes.items() if value is not None}
    try:
        return type(settings).model_validate({**settings.model_dump(), **given})
    except ValidationError as error:
        raise UsageError(_complaint(error, given)) from error


def profile_names() -> list[str]:
    """The names of the profiles that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml") if path.name != _LIBRARY)


@cache
def library_faces() -> Mapping[str, FaceSettings]:
    """The ready face pairs that come with the package (``profiles/faces.yaml``), by name.

    ``extract --face NAME`` and a profile's ``rewards.faces`` may name them; a profile's own face of that name wins.
    """
    return {name: FaceSettings.model_validate(face) for name, face in _read_yaml(_folder() / _LIBRARY).items()}


def profile_path(name_or_path: str | Path) -> Path:
    """The file of a profile, which is named (``clinic``) or given by its path (``./mine.yaml``)."""
    text = str(name_or_path)
    if text in profile_names():
        return _folder() / f"{text}.yaml"
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml") or "/" in text or os.sep in text:
        raise ProfileError(f"profile {text}: no such file")
    known = ", ".join(profile_names())
    hint = _hint(text, profile_names())
    raise ProfileError(f"unknown profile {text!r}{hint}: expected the path of a YAML file or one of {known}")


def load_profile(name_or_path: str | Path = "clinic") -> Profile:
    """Read and check a profile; `ProfileError` says in one line what is wrong with it."""
    path = profile_path(name_or_path)
    document = _read_yaml(path)
    try:
        return Profile.model_validate({**document, "name": path.stem}, context={"folder": path.parent.absolute()})
    except ValidationError as error:
        raise ProfileError(f"profile {path.name}: {_complaint(error, document)}") from error


def _folder() -> Path:
    return Path(str(files("llmdoctor.profiles")))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProfileError(f"profile {path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ProfileError(f"profile {path.name}: not YAML{where}: {problem}") from error
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        got = "nothing" if document is None else f"a {type(document).__name__}"
        raise ProfileError(f"profile {path.name}: expected settings as `key: value` lines, got {got}")
    return document


def _complaint(invalid: ValidationError, document: Mapping[str, Any]) -> str:
    """One line for one of pydantic's findings: a misspelt key before the key that is missing because of it."""
    error = min(invalid.errors(), key=lambda finding: finding["type"] != "extra_forbidden")
    parts = _path_in_document(error["loc"], document)
    dotted = ".".join(map(str, parts))
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {dotted!r}{_key_hint([str(part) for part in parts])}"
        case "missing":
            return f"key '{'.'.join(map(str, error['loc']))}' is missing"
        case "value_error":
            return error["msg"].removeprefix("Value error, ")
        case "string_pattern_mismatch" if error["loc"][-1] == "[key]":
            return f"name {dotted!r} may hold only letters, digits, '_', '.' and '-'"
        case "model_type" | "dict_type":
            return f"{dotted!r} expected `key: value` lines under it, got {error['input']!r}"
    return f"{dotted!r} {error['msg'].removeprefix('Input ')}, got {error['input']!r}"


def _path_in_document(loc: tuple[int | str, ...], document: Any) -> list[int | str]:
    # pydantic's loc ends with the names of union members and "[key]" marks, which the user never wrote
    parts: list[int | str] = []
    for part in loc:
        try:
            document = document[part]
        except (KeyError, IndexError, TypeError):
            break
        parts.append(part)
    return parts


def _key_hint(parts: list[str]) -> str:
    *sections, key = parts
    schema = _SECTIONS[sections[0]] if sections else Profile
    siblings = list(schema.model_fields)
    close = difflib.get_close_matches(key, siblings, n=1)
    if close:
        return f" (did you mean {'.'.join([*sections, close[0]])!r}?)"
    elsewhere = [section for section, other in _SECTIONS.items() if key in other.model_fields]
    if elsewhere:
        return f" (did you mean '{elsewhere[0]}.{key}'?)"
    return f" (known here: {', '.join(siblings)})"


def _hint(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
