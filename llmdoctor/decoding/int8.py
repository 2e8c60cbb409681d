"""The patient in 8 bits, as its own draft model.

A token of a small batch costs what it takes to fetch the weights. With a quarter of the bytes the patient says almost
the same, so that nearly all of its drafts stand, and the whole patient then checks several of them for one fetch.
"""

import copy
import time

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from llmdoctor.errors import UsageError

INT8 = "int8"
"""The ``draft_model`` that is this copy of the patient."""
FIRST = 4  # tokens that it drafts at first: nine in ten stand


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 [out, in], with one scale for each output: |w - q s| <= s / 2."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        weight = of.weight.detach().float()
        scale_O = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12)
        self.weight: Tensor = nn.Buffer((weight / scale_O[:, None]).round().to(torch.int8))
        self.scale: Tensor = nn.Buffer(scale_O.bfloat16())
        self.bias = of.bias

    def forward(self, x: Tensor) -> Tensor:
        """Of [..., in] give [..., out] in the same precision."""
        half_M_I = x.reshape(-1, x.shape[-1]).bfloat16()
        if x.device.type == "cpu":
            out = torch._weight_int8pack_mm(half_M_I, self.weight, self.scale)
        else:
            out = linear(half_M_I, self.weight.bfloat16()) * self.scale
        out = out.view(*x.shape[:-1], -1).to(x)
        return out if self.bias is None else out + self.bias


def int8_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with int8 linear layers, for drafts. Everything else, the embeddings too, is the model's own memory.

    Raises UsageError where there is nothing to make smaller (the model is quantised), and for a model that lies on
    several devices.
    """
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and _fits(module)}
    if spread or not linear:
        why = "lies on several devices" if spread else "has no linear layers in floating point (it is quantised?)"
        raise UsageError(f"'draft_model' int8 makes a copy of the patient, which {why}: leave it out, or give a model")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied: PreTrainedModel = copy.deepcopy(model, shared)
    for name, layer in linear.items():
        copied.set_submodule(name, Int8Linear(layer))
    return copied


def is_faster(copied: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Whether the linear layers of the copy read a token in less than .7 of the model's time, measured now.

    It depends on the instructions of the CPU, and on a GPU on torch. On a machine without them the copy is ten times
    slower.
    """
    layers: dict[torch.Size, list[tuple[nn.Module, nn.Module]]] = {}
    for name, small in copied.named_modules():
        if isinstance(small, Int8Linear):
            layers.setdefault(small.weight.shape, []).append((small, model.get_submodule(name)))
    times = [0.0, 0.0]
    with torch.inference_mode():
        for shape, alike in layers.items():
            x_1_I = torch.ones(1, shape[1], device=model.device, dtype=model.dtype)
            for which, layer in enumerate(alike[0]):
                times[which] += len(alike) * min(_seconds(layer, x_1_I) for _ in range(6))
    return times[0] < 0.7 * times[1]


def _seconds(layer: nn.Module, x: Tensor) -> float:
    start = time.perf_counter()
    layer(x).cpu()  # on a GPU, wait for it
    return time.perf_counter() - start


def _fits(layer: nn.Linear) -> bool:
    """Whether torch's product is right: for one row it reads beyond the end of inputs that are no multiple of 16."""
    return layer.in_features % 32 == 0
