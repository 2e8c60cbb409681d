"""The tables of settings in docs/profiles.md: ``python tests/setting_rows.py`` prints them, the tests look for them."""

from collections.abc import Iterator
from typing import get_args

from llmdoctor.profile import Profile
from llmdoctor.schema import Settings


def setting_rows() -> Iterator[tuple[str, str]]:
    """Every section of a profile, and a Markdown row for each of its settings: name, default, meaning."""
    for section, field in Profile.model_fields.items():
        kinds = [*get_args(field.annotation), field.annotation]
        for schema in (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)):
            for name, setting in schema.model_fields.items():
                default = "needed" if setting.is_required() else f"`{_yaml(setting.get_default(call_default_factory=True))}`"
                yield section, f"| `{name}` | {default} | {setting.description} |"


def _yaml(value: object) -> str:
    """The default as one writes it in a profile."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:g}"
        case tuple() if value:
            return f"[{', '.join(map(str, value))}]"
        case tuple():
            return "[]"
    return str(value)


if __name__ == "__main__":
    shown = ""
    for section, row in setting_rows():
        if section != shown:
            print(f"\n### {section}\n\n| key | default | what it is |\n|---|---|---|")
        shown = section
        print(row)
