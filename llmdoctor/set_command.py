"""``/set alpha=1 beta=0.8 ...``: a line of changes to guidance and sampling, for every conversation that takes one."""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from llmdoctor.errors import UsageError
from llmdoctor.schema import help_text
from llmdoctor.settings import DoctorSettings, Guidance, Sampling

# what each doctor has of its own: the name in the line, and the field of `Guidance` that holds it for all doctors
_PER_DOCTOR = {str(field.title): name for name, field in Guidance.model_fields.items() if field.title}
_FIELDS = {
    name: schema for schema in (Guidance, Sampling) for name in schema.model_fields if name not in _PER_DOCTOR.values()
}


def setting_names(doctors: Sequence[str] = ()) -> list[str]:
    """The names allowed before ``=``: ``alpha``, ``beta``, ``beta.helpful``, ``temperature``, ..."""
    per_doctor = [f"{name}{doctor}" for name in _PER_DOCTOR for doctor in ("", *(f".{each}" for each in doctors))]
    return [*(name for name in _FIELDS if _FIELDS[name] is Guidance), *per_doctor, *Sampling.model_fields]


def setting_help() -> Iterator[tuple[str, str]]:
    """Every name with its help text."""
    for name in setting_names():
        yield name, help_text(_FIELDS.get(name, DoctorSettings), name)


def parse_settings(
    text: str | Sequence[str],
    doctors: Sequence[str],
    guidance: Guidance,
    sampling: Sampling,
    *,
    command: str = "/set",
) -> tuple[Guidance, Sampling]:
    r"""``alpha=1 beta=0.8 helpful=1.2 seed=5`` laid over the settings in use. Raises UsageError.

    ``text`` may be in its parts already, as `setting_items` gives them.

    ``beta`` is for every doctor, ``beta.helpful`` or ``helpful`` for one; a later value beats an earlier one. ``off``
    turns off what has no value by default (seed, stop, top_k, min_p, no_repeat_ngram). A value with spaces is quoted,
    ``\n`` is a line break, and several ``stop=...`` in one line are several stop strings. A message begins with
    ``command``.
    """
    try:
        items = setting_items(text) if isinstance(text, str) else text
        return _parsed(items, doctors, guidance, sampling)
    except UsageError as error:
        raise UsageError(f"{command}: {error}") from error


def _parsed(
    items: Sequence[str], doctors: Sequence[str], guidance: Guidance, sampling: Sampling
) -> tuple[Guidance, Sampling]:
    changes: dict[type[Guidance] | type[Sampling], dict[str, Any]] = {Guidance: {}, Sampling: {}}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise UsageError(f"expected name=value, got {item!r}")
        name, _, doctor = key.partition(".")
        name = name.replace("-", "_")
        if key in doctors:
            name, doctor = "beta", key
        if name in _PER_DOCTOR and doctor in ("", *doctors):
            field = _PER_DOCTOR[name]
            values = changes[Guidance].setdefault(field, dict(getattr(guidance, field)))
            values.update(dict.fromkeys([doctor] if doctor else doctors, _number(value)))
        elif name in _FIELDS and not doctor:
            chosen = changes[_FIELDS[name]]
            chosen[name] = _value(name, value, chosen.get(name))
        else:
            raise UsageError(f"there is no setting {key!r} (there are: {', '.join(setting_names(doctors))})")
    return guidance.replace(**changes[Guidance]), sampling.replace(**changes[Sampling])


def setting_items(text: str) -> list[str]:
    """The ``name=value`` parts of a line, without the quotation marks around values. Raises UsageError."""
    lexer = shlex.shlex(text, posix=True)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        items = list(lexer)
    except ValueError:
        raise UsageError(f"a quotation mark is not closed in {text!r}") from None
    if not items:
        raise UsageError("expected name=value, for example: /set alpha=1 beta=0.8")
    return items


def _value(name: str, text: str, before: Any) -> Any:
    default = _FIELDS[name].model_fields[name].get_default()
    if text == "off" and not default:
        return default
    if isinstance(default, tuple):  # several values: each item of the line adds one
        return (*(before or ()), text.replace("\\n", "\n"))
    return _number(text)


def _number(text: str) -> float | str:
    """The number, or the text: the schema says what it expected instead."""
    try:
        return float(text)
    except ValueError:
        return text
