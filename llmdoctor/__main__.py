"""The command ``llmdoctor``, also as ``python -m llmdoctor`` and for ``accelerate launch -m llmdoctor``."""

import os
import sys
from typing import NoReturn


def run() -> NoReturn:
    """Entry point of the ``llmdoctor`` script. Ctrl+C is one line from the first import on."""
    # torch's threads (GNU OpenMP's) wait for each other by spinning, 300,000 rounds long: where another program holds
    # a core, an answer took 3 to 12 times as long because of it. It is read once, when torch is imported.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        from llmdoctor.cli.main import run as command_line

        command_line()
    except KeyboardInterrupt:  # within a command it is handled there
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
