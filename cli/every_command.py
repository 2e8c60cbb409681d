"""What the program itself and every command have. Light: ``llmdoctor --help`` loads this and no command."""

from collections.abc import Callable
from typing import Annotated

import typer

from llmdoctor.cli.terminal import narrate


def _narrate(level: int) -> Callable[[bool], bool]:
    def act(wanted: bool) -> bool:
        if wanted:
            narrate(level)
        return wanted

    return act


Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Only results, warnings and errors.", callback=_narrate(-1), is_eager=True),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Also what the libraries say, and the time.", callback=_narrate(1), is_eager=True
    ),
]


def examples(*lines: str, then: str = "") -> str:
    """The end of a command's ``--help``: command lines without ``llmdoctor``, and what else it says there."""
    return "\n\n".join(filter(None, ["Examples:", *(f"llmdoctor {line}" for line in lines), then]))
