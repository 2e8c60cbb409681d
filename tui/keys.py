"""Keys as one writes them."""

from textual.keys import format_key

_SPOKEN = {"escape": "Esc", "enter": "Enter", "pageup": "PgUp", "pagedown": "PgDn"}


def key_text(keys: str) -> str:
    """``ctrl+l,full_stop`` as ``Ctrl+L, .``."""
    return ", ".join(map(_key, keys.split(",")))


def short_key(keys: str) -> str:
    """The first of them, as short as the last line needs it: ``^T``, ``F5``, ``Esc``."""
    return key_text(keys.split(",", maxsplit=1)[0]).replace("Ctrl+", "^")


def _key(key: str) -> str:
    *modifiers, name = key.strip().split("+")
    plain = len(name) == 1 and not modifiers
    said = _SPOKEN.get(name) or (name if plain else format_key(name).capitalize())
    return "+".join([*map(str.capitalize, modifiers), said])
