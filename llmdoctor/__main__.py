"""The command ``llmdoctor``, also as ``python -m llmdoctor`` and for ``accelerate launch -m llmdoctor``."""

import sys
from typing import NoReturn


def run() -> NoReturn:
    """Entry point of the ``llmdoctor`` script. Ctrl+C is one line from the first import on."""
    try:
        from llmdoctor.cli.main import run as command_line

        command_line()
    except KeyboardInterrupt:  # within a command it is handled there
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
