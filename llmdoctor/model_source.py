"""Where a model's files are: a folder, the hub, a GGUF, a file of an installed package, or an adapter and its base."""

import hashlib
import importlib.util
import os
import re
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_kernels_available

from llmdoctor.artefacts import AdapterConfig, Artefact
from llmdoctor.errors import LoadError
from llmdoctor.files import present, read_json, user_path
from llmdoctor.gguf_file import read_header
from llmdoctor.harmless import first_line
from llmdoctor.schema import shown
from llmdoctor.tensors import refuse_pickles, tensor_sizes

_PACKAGE = "package:"
_HUB_GGUF = re.compile(r"([\w.-]+/[\w.-]+):(.+\.gguf)", re.IGNORECASE)
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PATIENCE = 4.0  # seconds in which the hub must be reached
_LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_experts", "num_local_experts"}
_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "paged|eager", "batched_mm", "grouped_mm")  # transformers' own
_MOST_BASES = 10  # adapters on adapters
_EDGE = 1 << 20  # bytes of a weight file, at either end, that its fingerprint covers


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files are.

    ``name`` is what the user wrote. ``place`` is a folder or hub name, ``gguf`` the GGUF file in it, or None for a
    model in the form of transformers.
    """

    name: str
    place: str
    gguf: str | None = None

    @classmethod
    def of(cls, source: "str | Path | ModelSource") -> "ModelSource":
        """What a user may write for a model.

        A folder, a hub name ``org/name``, a GGUF ``folder/file.gguf`` or, on the hub, ``org/name:file.gguf``, or a file
        or folder of an installed Python package, ``package:module/file.gguf``; the package is not imported. A folder or
        hub name may hold a PEFT adapter. Raises LoadError if there is no such file, folder or package.
        """
        if isinstance(source, ModelSource):
            return source
        name = str(source)
        if name.startswith(_PACKAGE):
            return cls._at(name, _in_package(name))
        path = user_path(name) if name.startswith("~") else Path(name)
        if present(path):
            return cls._at(name, path)
        if on_hub := _HUB_GGUF.fullmatch(name):
            return cls(name, on_hub[1], on_hub[2])
        # "outputs/docter" looks like a hub name, but if there is a folder "outputs" it is a misspelt path. The hub
        # would be asked for a path, with retries.
        if not _HUB_NAME.fullmatch(name) or present(path.parent):
            what = "no such file" if path.suffix.lower() == ".gguf" else "expected a folder with config.json"
            raise LoadError(f"there is no model at {name}: {what}, or a hub name like org/name")
        hub_offline()
        return cls(name, name)

    @classmethod
    def _at(cls, name: str, path: Path) -> "ModelSource":
        if path.is_dir():
            return cls(name, str(path))
        if path.suffix.lower() != ".gguf" or not path.is_file():
            raise LoadError(f"cannot load the model {name}: expected a folder with config.json, or a .gguf file")
        return cls(name, str(path.parent), path.name)

    @property
    def is_local(self) -> bool:
        """Whether the files are in a folder, not on the hub."""
        return Path(self.place).is_dir()

    @cached_property
    def base(self) -> "ModelSource | None":
        """The base of a PEFT adapter; None for a whole model. Raises LoadError if the adapter names none."""
        found = behind = self._named_base()
        seen = {self._where()}
        while behind is not None:
            if behind._where() in seen or len(seen) > _MOST_BASES:
                what = "itself" if behind._where() in seen else f"more than {_MOST_BASES} bases, one behind the other,"
                raise LoadError(f"cannot load the model {self.name}: its adapter_config.json names {what} as the base")
            seen.add(behind._where())
            behind = behind._named_base(download=False)
        return found

    def _where(self) -> Path:
        return Path(self.place).resolve() / (self.gguf or "")

    def _named_base(self, *, download: bool = True) -> "ModelSource | None":
        if self.gguf or self.file("config.json", download=download):
            return None
        if not (config := self.file("adapter_config.json", download=download)):
            return None
        base = self._read(config, AdapterConfig).get("base_model_name_or_path")
        if not base:
            raise LoadError(f"cannot load the model {self.name}: its adapter_config.json names no base model")
        if base.startswith("."):  # relative to the adapter, as `save_doctor` writes it, or to the working folder
            base = str(beside) if present(beside := Path(self.place) / base) else base
        return ModelSource.of(base)

    def folder(self) -> Path:
        """Where an adapter's files are, downloaded if need be. Raises LoadError."""
        if self.is_local:
            return Path(self.place)
        config, weights = self.file("adapter_config.json"), self.file("adapter_model.safetensors")
        if config is None or weights is None:
            raise LoadError(
                f"cannot load the adapter {self.name}: it has no adapter_model.safetensors, or the hub is out of reach"
            )
        return config.parent

    def require_plausible(self) -> None:
        """Raise LoadError, before memory is taken, for a folder whose config.json cannot belong to its weights."""
        if self.gguf or not self.is_local:
            return
        folder = Path(self.place)
        for item in folder.iterdir():
            if not (item.is_file() or item.is_dir()):
                raise LoadError(f"cannot load the model {self.name}: {item.name} is no file")
        refuse_pickles(folder, f"the model {self.name}")
        config = self._read(folder / "config.json", Artefact)
        try:
            count = sum(len(tensor_sizes(path)) for path in folder.glob("*.safetensors"))
        except LoadError as error:
            raise LoadError(f"cannot load the model {self.name}: {error}") from error
        for path, value in _leaves(config):
            if not isinstance(value, int | float):
                continue
            key = path.rpartition(".")[2]
            most = count if key in _LAYERS else 1 << 40
            if abs(value) > most:
                expected = f"at most {most:,}" + (", the number of its tensors" if key in _LAYERS else "")
                problem = f"its config.json states {key} {shown(value)}, expected {expected}"
                raise LoadError(f"cannot load the model {self.name}: {problem}")

    def require_own_code(self) -> None:
        """Raise LoadError for a config.json that names a kernel, a program that transformers would get from the hub."""
        config = None if self.gguf else self.file("config.json")
        for path, value in _leaves(self._read(config, Artefact) if config else {}):
            if "_implementation" not in path or not isinstance(value, str) or value in _IMPLEMENTATIONS:
                continue
            if not (value.startswith("flash_attention_") and not is_kernels_available()):
                raise LoadError(
                    f"cannot load the model {self.name}: its config.json states {path} {shown(value)}, a program from "
                    f"the hub: expected one of {', '.join(_IMPLEMENTATIONS)}. Take it out, or trust it with "
                    "--trust-remote-code"
                )

    def _read(self, path: Path, schema: type[Artefact]) -> dict[str, Any]:
        try:
            return cast("dict[str, Any]", read_json(path, schema))
        except LoadError as error:
            raise LoadError(f"cannot load the model {self.name}: {error}") from error

    def file(self, name: str, *, download: bool = True) -> Path | None:
        """One of the model's files, from the hub if need be; None if it has none of that name or cannot be reached.

        Raises LoadError for one that is no file: a FIFO would be waited for.
        """
        if self.is_local:
            path = Path(self.place) / name
            if present(path) and not path.is_file():
                raise LoadError(f"cannot load the model {self.name}: its {name} is no file")
            return path if path.is_file() else None
        try:
            found = cached_file(self.place, name, local_files_only=not download)
        except OSError:
            return None
        return Path(found) if found else None

    def gguf_path(self) -> Path:
        """The GGUF, downloaded if need be. Raises LoadError if it cannot be had."""
        assert self.gguf is not None
        if self.is_local:
            return Path(self.place) / self.gguf
        try:
            return Path(str(cached_file(self.place, self.gguf)))
        except OSError as error:
            raise LoadError(f"cannot load the model {self.name}: {first_line(error)}") from error

    def fingerprint(self) -> str:
        """Sha-256 of what is loaded: of the GGUF, of an adapter and its base, or of config.json and the weight files.

        Of every weight file it covers the name, the size, the first MiB and the last MiB (of a GGUF not the name). That
        is enough to tell checkpoints apart without reading all their weights. Raises LoadError if the model is neither
        a folder nor in the hub's cache.
        """
        if self.gguf:
            file = Path(self.place) / self.gguf if self.is_local else self.file(self.gguf, download=False)
            if file is None:
                raise LoadError(f"{self.name} is not here: expected a GGUF file or a downloaded one")
            return _digest([file], named=False)
        if config := self.file("config.json", download=False):
            files = (
                f for f in config.parent.iterdir() if f.suffix in {".safetensors", ".bin"} or f.name == config.name
            )
            return _digest(files)
        if (config := self.file("adapter_config.json", download=False)) and self.base:
            files = (f for f in config.parent.iterdir() if f.stem.startswith("adapter_"))
            return hashlib.sha256((_digest(files) + self.base.fingerprint()).encode()).hexdigest()
        raise LoadError(
            f"{self.name} is not here: expected a folder with a config.json{self._hint()}, or a downloaded model"
        )

    def parameters(self) -> int | None:
        """How many numbers the weights have, by the headers of their files.

        None for a model on the hub, and for files that cannot be read. Raises LoadError.
        """
        if self.gguf:
            return read_header(self.gguf_path()).parameters
        if self.base:
            return self.base.parameters()
        if not self.is_local:
            return None
        try:
            return sum(sum(tensor_sizes(path)) for path in Path(self.place).glob("*.safetensors"))
        except LoadError:
            return None

    def quantization(self) -> dict[str, Any] | None:
        """How the weights are quantised: ``method``, and ``bits`` where the config states them; None if they are not.

        Of a GGUF, ``method`` is "gguf" and ``type`` llama.cpp's name of the file's type, like Q4_1. Raises LoadError.
        """
        if self.gguf:
            return {"method": "gguf", "type": read_header(self.gguf_path()).file_type}
        if self.base:
            return self.base.quantization()
        config = self.file("config.json")
        how = self._read(config, Artefact).get("quantization_config") if config else None
        if not isinstance(how, dict):
            return None
        bits = _bits(how)
        method = how.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in how else "unknown")
        return {"method": str(method), **({"bits": bits} if bits else {})}

    def _hint(self) -> str:
        """Names a GGUF that lies in the folder."""
        found = sorted(Path(self.place).glob("*.gguf")) if self.is_local else []
        return f" (it holds a GGUF: name the file, {found[0]})" if found else ""

    def require_config(self) -> None:
        """Raise LoadError for a folder that holds no model, naming the GGUF in it if there is one."""
        if self.is_local and not (self.gguf or self.file("config.json") or self.file("adapter_config.json")):
            raise LoadError(f"cannot load the model {self.name}: the folder has no config.json{self._hint()}")
        self.require_reach()

    def require_reach(self) -> None:
        """Raise LoadError for a model on the hub that is not in the cache while the hub cannot be asked."""
        wanted = (self.gguf,) if self.gguf else ("config.json", "adapter_config.json")
        if not self.is_local and hub_offline() and not any(self.file(name, download=False) for name in wanted):
            raise LoadError(
                f"cannot load the model {self.name}: {hub_offline()}, and it is not in the cache. Connect, or give a "
                "folder"
            )


def model_fingerprint(source: str | Path) -> str:
    """Equal for the same weights and config, wherever they are stored: see `ModelSource.fingerprint`."""
    return ModelSource.of(source).fingerprint()


def doctor_fingerprint(folder: str | Path) -> str:
    """Equal for the same doctor: its doctor.json and, as in `ModelSource.fingerprint`, its weight files."""
    return _digest(file for file in user_path(folder).rglob("*") if file.suffix in {".safetensors", ".json"})


@cache
def hub_offline() -> str:
    """Why the hub cannot be asked; empty if it can. Asked once: without a network every look-up would wait and retry.

    From then on the libraries below are offline too, and find what is in the cache at once.
    """
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    host = urlsplit(constants.ENDPOINT)
    if getproxies().get(host.scheme):
        return ""  # it is the proxy's to connect
    connected: list[bool] = []

    def connect() -> None:
        with (
            suppress(OSError),
            socket.create_connection(
                (host.hostname or "", host.port or (80 if host.scheme == "http" else 443)), timeout=_PATIENCE
            ),
        ):
            connected.append(True)

    # in a thread: a name server that does not answer would be waited for much longer
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(_PATIENCE)
    if connected:
        return ""
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    return f"{host.hostname} cannot be reached"


def _in_package(name: str) -> Path:
    """The file or folder that ``package:module/path`` names."""
    module, _, inside = name.removeprefix(_PACKAGE).partition("/")
    top, *below = module.split(".")
    try:
        # of the top-level package only: to find a module inside of it would import it
        spec = importlib.util.find_spec(top) if top else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not inside:
        missing = f"the package {top} is not installed (try: pip install {top.replace('_', '-')})"
        raise LoadError(
            f"cannot load the model {name}: {missing if top and inside else 'expected package:module/file'}"
        )
    folders = [Path(folder, *below) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        if (path := folder / inside).exists():
            return path
    held = sorted(f.name for folder in folders if folder.is_dir() for f in folder.glob("*.gguf"))
    holds = f"it holds {', '.join(held)}" if held else "it holds no .gguf file there"
    raise LoadError(f"cannot load the model {name}: the package {module} has no {inside} ({holds})")


def _digest(files: Iterable[Path], *, named: bool = True) -> str:
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name if named else ''}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_EDGE))
            stream.seek(max(0, size - _EDGE))  # a file shorter than 1 MiB is simply read twice
            digest.update(stream.read())
    return digest.hexdigest()


def _leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a config that is no object and no list, behind the names that lead there: ``rope.theta``, 1e6."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield from _leaves(value, f"{path}.{key}".removeprefix("."))
    elif isinstance(config, list):
        for value in config:
            yield from _leaves(value, path)
    else:
        yield path, config


def _bits(how: Any, depth: int = 9) -> int | None:
    """Bits per weight, wherever a quantization config states them, down to so many levels."""
    if isinstance(how, dict) and depth:
        for flag, bits in (("load_in_4bit", 4), ("load_in_8bit", 8), ("_load_in_4bit", 4), ("_load_in_8bit", 8)):
            if how.get(flag) is True:
                return bits
        for key in ("bits", "num_bits", "w_bit"):
            if isinstance(how.get(key), int):
                return int(how[key])
        # torchao names its kinds, like Int4WeightOnlyConfig or int8_weight_only
        kind = how.get("_type") or how.get("quant_type")
        if isinstance(kind, str) and (digits := re.search(r"(\d+)_?weight", kind, re.IGNORECASE)):
            return int(digits[1])
        return next((found for value in how.values() if (found := _bits(value, depth - 1))), None)
    return None
