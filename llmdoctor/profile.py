"""Profiles: YAML files that hold all settings of the three stages.

The location of a model, data set or doctor that begins with ``./`` or ``../`` is relative to the profile's own file,
and ``~/`` is the home folder. Anything else is kept as it is: a hub name, or a path relative to the working folder.

``extends: OTHER``, a name or a path, takes every setting of another profile that this one does not state.
"""

import os.path
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from llmdoctor.artefacts import DoctorFile
from llmdoctor.errors import LoadError, ProfileError, UsageError
from llmdoctor.files import DOCTOR, config_folder, present, read_json, read_text, user_path
from llmdoctor.schema import Settings, SettingsT, checked, complaint, hint, shown
from llmdoctor.settings import (
    DataSettings,
    DecodeSettings,
    DoctorSettings,
    FaceSettings,
    Name,
    PatientSettings,
    RewardSettings,
    ShrinkSettings,
    TrainSettings,
    WelcomeSettings,
)


class Profile(Settings):
    """All settings of the three stages. ``name`` is the name of the file without its suffix."""

    name: str
    description: str = ""
    welcome: WelcomeSettings = WelcomeSettings()
    patient: PatientSettings
    faces: dict[Name, FaceSettings] = Field(default_factory=dict)
    data: DataSettings | None = None
    rewards: RewardSettings = RewardSettings()
    train: TrainSettings = TrainSettings()
    shrink: ShrinkSettings = ShrinkSettings()
    doctors: dict[Name, DoctorSettings] = Field(default_factory=dict)
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


def override(settings: SettingsT, **changes: Any) -> SettingsT:
    """A copy with those ``changes`` that are not None. Raises UsageError if one is out of range."""
    return settings.replace(**{key: value for key, value in changes.items() if value is not None})


def profile_names() -> list[str]:
    """Names of the profiles that come with the package, then those of the user's own."""
    own = {path.stem for path in user_profiles().glob("*.yaml")} if user_profiles().is_dir() else set()
    return [*_shipped(), *sorted(own - set(_shipped()))]


def user_profiles() -> Path:
    """The folder of the user's own profiles, known by their names like those of the package."""
    return config_folder() / "profiles"


def _shipped() -> list[str]:
    return sorted(path.stem for path in _folder().glob("*.yaml") if path.name != _LIBRARY)


@cache
def library_faces() -> Mapping[str, FaceSettings]:
    """The ready face pairs that come with the package (``profiles/faces.yaml``), by name.

    ``extract --face NAME`` and a profile's ``rewards.faces`` can use them. A face pair of the same name in the profile
    itself takes precedence.
    """
    return {name: FaceSettings.model_validate(face) for name, face in _read_yaml(_folder() / _LIBRARY).items()}


def profile_path(name_or_path: str | Path) -> Path:
    """The file of a profile, given by its name (``clinic``) or path (``./mine.yaml``). Raises ProfileError."""
    text = str(name_or_path)
    if text in _shipped():
        return _folder() / f"{text}.yaml"
    if text in profile_names():
        return user_profiles() / f"{text}.yaml"
    path = user_path(text)
    if present(path):
        return path
    # A path was meant: a list of profile names would not help.
    if path.suffix in (".yaml", ".yml") or "/" in text or os.sep in text:
        raise ProfileError(f"profile {text}: no such file")
    known = profile_names()
    expected = f"expected the path of a YAML file or one of {', '.join(known)}"
    raise ProfileError(f"unknown profile {text!r}{hint(text, known)}: {expected}")


def load_profile(name_or_path: str | Path = "clinic") -> Profile:
    """Read and check a profile. Raises ProfileError, which says in one line what is wrong with it."""
    path = profile_path(name_or_path)
    document = _merged([document for _, document in _chain(path)])
    try:
        return Profile.model_validate({**document, "name": path.stem}, context={"folder": path.parent.absolute()})
    except ValidationError as error:
        raise ProfileError(f"profile {path.name}: {complaint(error, document, Profile)}") from error


def origins(name_or_path: str | Path) -> dict[str, str]:
    """The file that states each setting, by dotted name (``decode.alpha``). What is not in it has its default."""
    found: dict[str, str] = {}

    def note(values: Mapping[str, Any], prefix: str, file: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict) and value:
                note(value, f"{prefix}{key}.", file)
            else:
                found[f"{prefix}{key}"] = file

    for path, document in _chain(profile_path(name_or_path)):
        note(document, "", str(path))
    return found


def _chain(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The profile and what it extends, the most general first. Raises ProfileError."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    seen: list[Path] = []
    while True:
        if path.resolve() in seen:
            raise ProfileError(f"profile {path.name}: extends itself: {' -> '.join(p.name for p in [*seen, path])}")
        seen.append(path.resolve())
        document = _read_yaml(path)
        other = document.pop("extends", None)
        # of every file but the first: relative to itself, not to the one that extends it
        chain.append((path, _placed(document, path.parent.absolute()) if chain else document))
        if other is None:
            return chain[::-1]
        if not isinstance(other, str) or not other:
            raise ProfileError(
                f"profile {path.name}: 'extends' expected the name or path of a profile, got {shown(other)}"
            )
        path = profile_path(path.parent / other if other.startswith(("./", "../")) else other)


LOCATIONS = frozenset({"model", "source", "doctor", "checkpoint", "base", "draft_model"})
"""The settings that say where a model, data set or doctor is, in whatever section."""


def _placed(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The settings with relative locations made absolute."""

    def place(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _placed(value, folder)
        near = key in LOCATIONS and isinstance(value, str) and value.startswith(("./", "../"))
        return str(folder / value) if near else value

    return {key: place(key, value) for key, value in values.items()}


def _merged(documents: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Later documents over earlier ones, section by section."""
    merged: dict[str, Any] = {}
    for document in documents:
        for key, value in document.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = _merged([merged[key], value]) if both else value
    return merged


def _folder() -> Path:
    return Path(str(files("llmdoctor.profiles")))


_MOST_BYTES, _MOST_NODES = 1 << 20, 20_000


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        document = _load_yaml(read_text(path, _MOST_BYTES))
    except OSError as error:
        raise ProfileError(f"profile {path}: cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise ProfileError(f"profile {path.name}: not YAML: nested too deeply") from error
    # of odd values of a known tag, like !!timestamp x, PyYAML raises whatever its code happens to
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        # the message of a Python error says nothing of YAML
        said = str(error) if isinstance(error, yaml.YAMLError | ValueError) else "a value that its !!tag does not fit"
        problem = " ".join((getattr(error, "problem", None) or said)[:200].split())
        raise ProfileError(f"profile {path.name}: not YAML{where}: {problem}") from error
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        got = "nothing" if document is None else f"a {type(document).__name__}"
        raise ProfileError(f"profile {path.name}: expected settings as `key: value` lines, got {got}")
    return document


def _load_yaml(text: str) -> Any:
    """What the YAML says. An alias counts as often as it is used: a few lines of them can stand for any size."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _nodes(node, {}) > _MOST_NODES:
            raise ValueError(f"more than {_MOST_NODES:,} values, with its aliases written out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _nodes(node: yaml.Node, counted: dict[int, int]) -> int:
    """How many values the node stands for. Raises ValueError for one that holds itself, or half a surrogate pair."""
    if id(node) in counted:
        if counted[id(node)] == 0:
            raise ValueError("a value that holds itself")
        return counted[id(node)]
    if isinstance(node, yaml.ScalarNode):
        node.value.encode()  # "\ud800" is YAML, but no text
        return 1
    counted[id(node)] = 0
    parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    counted[id(node)] = 1 + sum(_nodes(part, counted) for part in parts)
    return counted[id(node)]


def named_doctors(values: Iterable[str], option: str) -> dict[str, str]:
    """Folders by name, of ``NAME=PATH`` or ``PATH``: without a name here, a doctor has the one in its doctor.json.

    Raises UsageError, which names the ``option``, for a value without a path and for a name that comes twice.
    """
    doctors: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or "/" in name or present(Path(value)):
            name, path = own_name(Path(value)), value
        if not name or not path:
            raise UsageError(f"{option}: expected PATH or NAME=PATH, got {value!r}")
        if name in doctors:
            raise UsageError(f"{option}: two doctors are named {name!r}; tell them apart with NAME=PATH")
        doctors[name] = path
    return doctors


def in_place_of(before: Mapping[str, DoctorSettings], folders: Mapping[str, str]) -> dict[str, DoctorSettings]:
    """Settings of other doctors, in ``folders`` by name, each as strong as the one of its name ``before``.

    If only one was there, it is the one that they all replace. A doctor that replaces none has the defaults. The bases
    are those that the folders themselves name.
    """
    made = {}
    for name, folder in folders.items():
        like = before.get(name) or (next(iter(before.values())) if len(before) == 1 else None)
        strength = like.model_dump(include={"beta", "dead_zone"}) if like else {}
        made[name] = checked(DoctorSettings, {"checkpoint": folder, **strength})
    return made


def own_name(checkpoint: Path) -> str:
    """What the doctor in this folder is called, by its doctor.json."""
    try:
        return str(read_json(user_path(checkpoint) / DOCTOR, DoctorFile).get("name") or "doctor")
    except LoadError:
        return "doctor"  # loading the doctor reports what is wrong with its folder
