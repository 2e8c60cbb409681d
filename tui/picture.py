"""The picture of docs/terminal.md, on the embedded models: ``python -m llmdoctor.tui.picture FILE [--size 150x32]``."""

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

from llmdoctor.profile import load_profile
from llmdoctor.sessions import SessionStore
from llmdoctor.tui.app import ChatApp
from llmdoctor.tui.config import Config
from llmdoctor.tui.export import without_fonts, write
from llmdoctor.tui.start import start_of

_QUESTION = "How can I sleep better?"


async def picture(path: Path, size: tuple[int, int], theme: str, token: int | None) -> None:
    """Ask one question, open the inspector on one token, and write what the screen shows."""
    with tempfile.TemporaryDirectory() as folder:
        store = SessionStore(Path(folder) / "sessions.sqlite3")
        app = ChatApp(start_of(load_profile("clinic"), seed=2, store=store), Config(theme=theme))
        async with app.run_test(size=size) as pilot:
            await pilot.pause(0.5)
            app.chat.send(_QUESTION)
            while app.chat.live is not None:
                await pilot.pause(0.1)
            if token is None:  # it opens on the first token that guidance changed
                await pilot.press("f2")
            elif token:
                await pilot.press("f2", "home", *["right"] * (token - 1))
            await pilot.pause(0.5)
            write(path, without_fonts(app.export_screenshot(title="llmdoctor chat")))


def main() -> None:
    """Parse the command line."""
    parser: Any = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", default="150x32")
    parser.add_argument("--theme", default="textual-dark")
    parser.add_argument(
        "--token",
        type=int,
        help="the token to inspect; by default the first changed one; 0 leaves the inspector closed",
    )
    given = parser.parse_args()
    width, height = map(int, given.size.split("x"))
    asyncio.run(picture(given.path, (width, height), given.theme, given.token))


if __name__ == "__main__":
    main()
