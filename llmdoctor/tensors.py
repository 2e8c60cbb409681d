"""Tensors from files: whole, finite, and never from a pickle."""

from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from llmdoctor.errors import LoadError
from llmdoctor.files import require_regular
from llmdoctor.harmless import first_line

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def read_tensors(path: Path, names: Iterable[str] = ()) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises LoadError for a file that is missing, damaged or no safetensors file, that lacks one of ``names``, or whose
    numbers are not finite.
    """
    try:
        require_regular(path)
        held: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise LoadError(f"cannot read {path}: {_reason(error)}") from error
    if missing := sorted(set(names) - held.keys()):
        raise LoadError(f"cannot read {path}: it has no tensor {missing[0]!r}")
    for name, tensor in held.items():
        require_finite(tensor, f"tensor {name!r} of {path}")
    return held


def tensor_sizes(path: Path) -> list[int]:
    """How many numbers each tensor of a safetensors file has, by its header. Raises LoadError."""
    try:
        require_regular(path)
        with safe_open(path, "pt") as file:
            return [prod(file.get_slice(key).get_shape()) for key in file.keys()]  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError, ValueError) as error:
        raise LoadError(f"{path.name}: {_reason(error)}") from error


def same_weights(model: nn.Module, folder: Path) -> bool | None:
    """Whether a model has the weights that its folder holds, read one at a time; None if their names do not tell.

    The layers that PEFT puts around a model's own are looked through.
    """
    # PEFT's layer holds the model's own as base_layer, a module that it copies as original_module
    weights = {
        key.replace(".base_layer", "").replace(".original_module", ""): weight.detach()
        for key, weight in model.named_parameters(remove_duplicate=False)
    }
    found: set[int] = set()
    whole = folder / "model.safetensors"
    for path in [whole] if whole.is_file() else sorted(folder.glob("model-*-of-*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                held, weight = file.get_tensor(key), weights.get(key)
                if weight is None or held.shape != weight.shape:  # another name, or another form
                    continue
                if not torch.equal(held.to(weight.dtype), weight.cpu()):
                    return False
                found.add(weight.data_ptr())
    return True if found.issuperset(weight.data_ptr() for weight in weights.values()) else None


def require_finite(tensor: Tensor, what: str) -> None:
    """Raise LoadError for a tensor that holds NaN or infinity."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return
    whole = tensor.float() if tensor.itemsize == 1 else tensor  # float8 can hardly do anything
    if not torch.stack(torch.aminmax(whole)).isfinite().all():  # NaN is both the least and the greatest
        raise LoadError(f"{what} holds numbers that are not finite: the file is damaged, or was made in float16")


def require_finite_weights(model: nn.Module, name: str) -> None:
    """Raise LoadError for a model with a weight that is NaN or infinite, naming the weight."""
    for key, parameter in model.named_parameters():
        if type(parameter) is nn.Parameter:  # not quantised, nor spread over processes
            require_finite(parameter.detach(), f"the weight {key} of {name}")


def refuse_pickles(folder: Path, name: str) -> None:
    """Raise LoadError for a folder whose weights are only there as a pickle, which could run any program."""
    files = [path for path in folder.iterdir() if path.is_file()]
    pickled = sorted(path.name for path in files if path.suffix in PICKLES and path.name != "training_args.bin")
    if pickled and not any(path.suffix == ".safetensors" for path in files):
        raise LoadError(
            f"cannot load {name}: {pickled[0]} is a pickle, which can run any program when it is read: expected "
            "safetensors. Save the model again with safe_serialization"
        )


def _reason(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or first_line(error)[:300]
