"""The user's settings for the app: ``tui.toml`` in the configuration folder.

theme = "nord"
lens = "kl"

[keys]            # binding ids as the help screen (F1) lists them
"chat.rerun" = "ctrl+r"
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from platformdirs import user_data_path

from llmdoctor.errors import UsageError
from llmdoctor.files import config_folder, read_text
from llmdoctor.show.lens import LENSES, Lens

_MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of the file; None means the default."""

    theme: str | None = None
    lens: Lens | None = None
    keys: Mapping[str, str] = field(default_factory=dict)


def config_file() -> Path:
    """The path of the settings."""
    return config_folder() / "tui.toml"


def sessions_file() -> Path:
    """The path of the saved conversations: ``LLMDOCTOR_SESSIONS``, or in the user's data folder."""
    named = os.environ.get("LLMDOCTOR_SESSIONS")
    return Path(named) if named else user_data_path("llmdoctor") / "sessions.sqlite3"


def read_config(path: Path, *, themes: Mapping[str, object], bindings: Mapping[str, object]) -> Config:
    """Read the file if there is one. Raises UsageError, naming the file and the key that is wrong."""
    try:
        data = tomllib.loads(read_text(path, _MOST_BYTES))
    except FileNotFoundError:
        return Config()
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}") from error
    if unknown := set(data) - {"theme", "lens", "keys"}:
        raise UsageError(f"{path}: unknown key {min(unknown)!r} (known: theme, lens, keys)")
    theme, lens, keys = data.get("theme"), data.get("lens"), data.get("keys", {})
    if theme is not None and (not isinstance(theme, str) or theme not in themes):
        raise UsageError(f"{path}: there is no theme {theme!r} (there are: {', '.join(sorted(themes))})")
    if lens is not None and lens not in LENSES:
        raise UsageError(f"{path}: lens must be one of {', '.join(LENSES)}, got {lens!r}")
    if not isinstance(keys, dict) or not all(isinstance(key, str) and key for key in keys.values()):
        raise UsageError(f'{path}: [keys] must hold lines like "chat.rerun" = "ctrl+r"')
    if wrong := sorted(set(keys) - set(bindings)):
        raise UsageError(f"{path}: there is no key binding {wrong[0]!r} (F1 lists them)")
    return Config(theme, lens, keys)
