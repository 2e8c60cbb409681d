"""Copying: the terminal's own way (OSC 52, also through tmux and screen), and the desktop's command."""

import base64
import os
import shutil
import subprocess
from collections.abc import Mapping

_COMMANDS = (
    ("pbcopy", (), None),
    ("wl-copy", (), "WAYLAND_DISPLAY"),
    ("xclip", ("-selection", "clipboard"), "DISPLAY"),
    ("xsel", ("--clipboard", "--input"), "DISPLAY"),
    ("clip.exe", (), None),
)


def osc52(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """The escape sequence that puts ``text`` on the clipboard of the terminal in front of the person.

    tmux swallows it unless it is wrapped (its ``allow-passthrough``) or tmux takes it itself (``set-clipboard on``):
    both are sent.
    """
    packed = base64.b64encode(text.encode("utf-8", "replace")).decode()
    plain = f"\x1b]52;c;{packed}\x07"
    if environment.get("TMUX"):
        return plain + "\x1bPtmux;" + plain.replace("\x1b", "\x1b\x1b") + "\x1b\\"
    if environment.get("TERM", "").startswith("screen"):
        return "\x1bP" + plain + "\x1b\\"
    return plain


def to_desktop(text: str) -> bool:
    """Hand the text to the desktop's clipboard command; False where there is none or it fails."""
    for name, arguments, needs in _COMMANDS:
        if (path := shutil.which(name)) and (needs is None or os.environ.get(needs)):
            try:
                done = subprocess.run(
                    [path, *arguments], input=text.encode("utf-8", "replace"), timeout=3, check=False,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired):
                continue
            if done.returncode == 0:
                return True
    return False
