"""The patient in 8 bits, as its own draft model.

A token of a small batch costs what it takes to fetch the weights. With a quarter of the bytes the patient says almost
the same, so that nearly all of its drafts stand, and the whole patient then checks several of them for one fetch.
"""

import copy
import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmdoctor.errors import UsageError

INT8 = "int8"
"""The ``draft_model`` that is this copy of the patient."""
FIRST = 4  # tokens that it drafts at first: nine in ten stand


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 [out, in], with one bfloat16 scale s for each output: |w - q s| <= s / 2."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        weight = of.weight.detach().float()
        # rounded first: the greatest weight is then at most 127.25 steps
        scale_O = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12).bfloat16()
        self.weight: Tensor = nn.Buffer((weight / scale_O.float()[:, None]).round().to(torch.int8))
        self.scale: Tensor = nn.Buffer(scale_O)
        self.bias = of.bias

    def forward(self, x: Tensor) -> Tensor:
        """Of [..., in] give [..., out] in the same precision."""
        half_M_I = x.reshape(-1, x.shape[-1]).bfloat16()
        out = torch._weight_int8pack_mm(half_M_I, self.weight, self.scale)
        out = out.view(*x.shape[:-1], self.weight.shape[0]).to(x)
        return out if self.bias is None else out + self.bias


def int8_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with int8 linear layers, for drafts. Everything else, the embeddings too, is the model's own memory.

    Raises UsageError where there is nothing to make smaller: the model is quantised.
    """
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and _fits(module)}
    if not linear:
        raise UsageError(
            "'draft_model' int8 is a copy of the patient, which has no linear layers in floating point (it is "
            "quantised?): leave it out, or give a model"
        )
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied: PreTrainedModel = copy.deepcopy(model, shared)
    for name, layer in linear.items():
        copied.set_submodule(name, Int8Linear(layer))
    return copied


def _fits(layer: nn.Linear) -> bool:
    """Whether torch's product is right: for one row it reads beyond the end of inputs that are no multiple of 16."""
    return layer.in_features % 32 == 0


def draft_of(model: PreTrainedModel) -> PreTrainedModel | None:
    """The int8 copy if it is one to draft with: on a CPU, much like the model, and faster.

    Raises UsageError for a model that is quantised already.
    """
    if model.device.type != "cpu":  # where the weights are fetched faster than they are made whole again
        return None
    copied = int8_copy(model)
    return copied if is_faster(copied, model) and is_like(copied, model) else None


def is_faster(copied: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Whether the weights of the copy are through a token in less than .7 of the model's time, measured now.

    It depends on the instructions of the CPU: without them the copy is ten times slower. Layers that stay as they are
    count as the model's others do.
    """
    pairs: list[tuple[Any, Any]] = [
        (m, model.get_submodule(name)) for name, m in copied.named_modules() if isinstance(m, Int8Linear)
    ]
    inputs = [torch.ones(1, own.in_features, dtype=own.weight.dtype) for _, own in pairs]
    best = [math.inf, math.inf]
    with torch.inference_mode():
        for _ in range(4):  # all layers once, so that each has to be fetched; the least of these times
            for which in (0, 1):
                start = time.perf_counter()
                for layers, x_1_I in zip(pairs, inputs, strict=True):
                    layers[which](x_1_I)
                best[which] = min(best[which], time.perf_counter() - start)
    in_copy = sum(own.weight.nelement() for _, own in pairs)
    as_they_are = [module for module in copied.modules() if not isinstance(module, nn.Embedding)]
    others = sum(w.nelement() for m in as_they_are for w in m.parameters(recurse=False) if w.dim() > 1)
    rest = best[1] * others / in_copy
    return bool(best[0] + rest < 0.7 * (best[1] + rest))


def is_like(copied: PreTrainedModel, model: PreTrainedModel) -> bool:
    """Whether most of its drafts could stand: 1 - TV of the next tokens after some beginnings is above a half."""
    ids_B_L = torch.arange(16).view(4, 4) % copied.config.get_text_config().vocab_size
    with torch.inference_mode():
        here, there = (m(input_ids=ids_B_L).logits.float().softmax(dim=-1) for m in (copied, model))
    return bool(torch.minimum(here, there).sum(dim=-1).mean() > 0.5)  # NaN is not
