"""Keys as one writes them."""

from textual.keys import format_key

_SPOKEN = {"escape": "Esc", "pageup": "PgUp", "pagedown": "PgDn"}


def key_text(keys: str) -> str:
    """``ctrl+l,full_stop`` as ``Ctrl+L, .``."""
    return ", ".join("+".join(map(_part, key.strip().split("+"))) for key in keys.split(","))


def short_key(keys: str) -> str:
    """The first of them, as short as the last line needs it: ``^T``, ``F5``, ``Esc``."""
    return key_text(keys.split(",")[0]).replace("Ctrl+", "^")


def _part(name: str) -> str:
    return _SPOKEN.get(name) or (name if len(name) == 1 else format_key(name).capitalize())
