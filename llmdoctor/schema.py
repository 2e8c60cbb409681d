"""What all settings share: how they are checked, how a mistake is reported, how a field is explained."""

import difflib
import re
import reprlib
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from llmdoctor.errors import UsageError

_GREATEST_INT = 1 << 32


class Settings(BaseModel):
    """A group of settings: frozen, without unknown keys, infinities or NaN."""

    # deferred: `llmdoctor --help` reads the fields of every group and validates none of them
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    @model_validator(mode="after")
    def _no_absurd_numbers(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            # counts are no greater, and float32 ends soon after
            if isinstance(value, int | float) and abs(value) > (_GREATEST_INT if isinstance(value, int) else 1e30):
                raise ValueError(f"{name!r} expected a smaller number, got {shown(value)}")
        return self

    def replace(self, **changes: Any) -> Self:
        """A copy with these changes, checked again. Raises UsageError for a key or value that is not allowed."""
        return checked(type(self), {**dict(self), **changes})

    def __setattr__(self, name: str, value: Any) -> None:
        """Settings are snapshots. Raises UsageError."""
        raise UsageError(f"settings cannot be changed: expected a copy, settings.replace({name}=...)")

    __replace__ = replace  # what copy.replace calls (Python 3.13); pydantic's own checks nothing


SettingsT = TypeVar("SettingsT", bound=Settings)


def checked(schema: type[SettingsT], values: Mapping[str, Any]) -> SettingsT:
    """The settings made of ``values``. Raises UsageError, in one line, for a key or value that is not allowed."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise UsageError(complaint(error, values, schema)) from error


def complaint(invalid: ValidationError, given: Mapping[str, Any], schema: type[Settings]) -> str:
    """One line for one of pydantic's findings: which setting, what was expected, what was got."""
    # a misspelt key comes first: a missing key may only be its consequence
    error = min(invalid.errors(), key=lambda finding: finding["type"] != "extra_forbidden")
    parts = _path_in(given, error["loc"])
    name = _shown_name(parts, schema)
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {name!r}{_key_hint(parts, schema)}"
        case "missing":
            return f"key '{'.'.join(map(str, error['loc']))}' is missing"
        case "value_error":
            return error["msg"].removeprefix("Value error, ")
        case "string_pattern_mismatch" if error["loc"][-1] == "[key]":
            return f"name {name!r} may hold only letters, digits, '_', '.' and '-'"
        case "tuple_type":
            return f"{name!r} should be a list, got {shown(error['input'])}"
        case "model_type" | "dict_type":
            return f"{name!r} expected `key: value` lines under it, got {shown(error['input'])}"
    expected = re.sub("^Input |, (unable|got) .*", "", error["msg"])
    return f"{name!r} {expected}, got {shown(error['input'])}"


class _Shown(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring, self.maxother, self.maxlong, self.maxlevel = 80, 80, 40, 3

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 4000 else "a number of thousands of digits"


def shown(value: Any) -> str:
    """The value as a message shows it, cut to a line: what a stranger wrote may have any size."""
    return _Shown().repr(value)


def help_text(schema: type[Settings], name: str) -> str:
    """What a field means and the values it takes: ``Likeliest tokens to choose from; 0 is all (>= 0).``."""
    field = schema.model_fields[name]
    found = _choices(field.annotation) or " and ".join(filter(None, map(_bound, field.metadata)))
    text = f"{field.description} ({found})" if found else str(field.description)
    return text if text.endswith(".") else f"{text}."


def hint(word: str, known: list[str]) -> str:
    """`` (did you mean 'clinic'?)`` where a known word is close, otherwise nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _choices(annotation: Any) -> str:
    return ", ".join(map(str, get_args(annotation))) if get_origin(annotation) is Literal else ""


def _bound(limit: Any) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return next((f"{sign} {_plain(getattr(limit, key))}" for key, sign in signs.items() if hasattr(limit, key)), "")


def _plain(number: float) -> str:
    """``10000``, not ``10000.0``."""
    return str(int(number) if number == int(number) else number)


def _path_in(given: Any, loc: tuple[int | str, ...]) -> list[str]:
    # pydantic's loc ends with the names of union members and "[key]" marks, which the user never wrote
    parts: list[str] = []
    for part in loc:
        try:
            given = given[part]
        except (KeyError, IndexError, TypeError):
            break
        parts.append(str(part))
    return parts


def _shown_name(parts: list[str], schema: type[Settings]) -> str:
    """``decode.alpha``; a field with a title holds one value per doctor, and is shown as ``beta of helpful``."""
    field = schema.model_fields.get(parts[0]) if len(parts) == 2 else None
    return f"{field.title} of {parts[1]}" if field and field.title else ".".join(parts)


def _key_hint(parts: list[str], schema: type[Settings]) -> str:
    *path, key = parts
    sections = {name: found for name, field in schema.model_fields.items() if (found := _section(field.annotation))}
    siblings = list((sections[path[0]] if path else schema).model_fields)
    if close := difflib.get_close_matches(key, siblings, n=1):
        return f" (did you mean {'.'.join([*path, close[0]])!r}?)"
    if elsewhere := [name for name, section in sections.items() if key in section.model_fields]:
        return f" (did you mean '{elsewhere[0]}.{key}'?)"
    return f" (known here: {', '.join(siblings)})"


def _section(annotation: Any) -> type[Settings] | None:
    """The group of settings that a field of this type holds: itself, or one per name, or one or none."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Settings):
            return part
    return None
