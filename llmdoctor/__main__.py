"""``python -m llmdoctor``, also for ``accelerate launch -m llmdoctor``."""

from llmdoctor.cli.main import run

if __name__ == "__main__":
    run()
