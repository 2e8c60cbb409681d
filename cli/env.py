"""``llmdoctor env``: what a bug report needs."""

import os
import platform
import sys
from pathlib import Path
from typing import Any

from llmdoctor import __version__
from llmdoctor.cli import options
from llmdoctor.cli.terminal import flat_lines, put, put_json, waiting

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "numpy",
    "typer",
    "textual",
)


def env(as_json: options.Json = False) -> None:
    """Show what a bug report needs: versions, device, precision, folders. No tokens or keys are shown."""
    with waiting("Looking at the machine ..."):
        found = _environment()
    if as_json:
        put_json(found)
    else:
        put("\n".join(flat_lines(found)))


def _environment() -> dict[str, Any]:
    import torch
    from huggingface_hub import constants

    from llmdoctor.models import pick_device, pick_dtype
    from llmdoctor.profile import user_profiles

    device = pick_device("auto")
    return {
        "llmdoctor": __version__,
        "program": str(Path(__file__).parent.parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": {
            "used": str(device),
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "dtype": str(pick_dtype("auto", device)).removeprefix("torch."),
        },
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "folders": {
            "hub_cache": str(constants.HF_HUB_CACHE),
            "profiles": str(user_profiles()),
            "sessions": _sessions(),
        },
        "hub_offline": bool(constants.HF_HUB_OFFLINE),
        "terminal": {
            "stdout": sys.stdout.isatty(),
            **{name: os.environ.get(name) for name in ("TERM", "NO_COLOR", "COLUMNS", "LANG")},
        },
        "variables": sorted(name for name in os.environ if name.startswith("LLMDOCTOR_")),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sessions() -> str:
    from llmdoctor.tui.launch import sessions_file

    return str(sessions_file())
