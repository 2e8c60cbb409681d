"""Decoding steps over a static KV cache, replayed as CUDA graphs: on a GPU small steps cost their launches otherwise.

A step reads its tokens, its place and its mask from buffers at fixed addresses, so a graph recorded once serves every
later step of as many tokens. Shapes are rounded up to powers of two, and slots (cache, buffers and graphs) are used
again by the next answer. The record is compared with the model as it is before it is trusted. Without a GPU the same
steps run unrecorded, which is how the tests hold them.
"""

import warnings
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from llmdoctor.decoding.graphs import close, holds
from llmdoctor.errors import LLMDoctorWarning

DEVICES = frozenset({"cuda"})  # where steps are static
LONGEST = 32  # tokens of a recorded step; longer ones are prompts, whose launches do not count
_LEAST = 256  # slots of the smallest cache
_KEPT = 2  # unused caches kept for the next answer

Outputs = tuple[Tensor, Tensor]
Replay = Callable[[], Outputs]


class StaticSteps:
    """The static cache of one batch and the steps over it; ``length`` is its owner's to know.

    It holds no reference to the model, which owns it in ``_slots``.
    """

    is_croppable = True

    def __init__(self, model: PreTrainedModel, like: Sequence[Any], rows: int, size: int) -> None:
        self.rows, self.size, device = rows, size, like[0].keys.device
        self.cache = StaticCache(config=model.config, max_cache_len=size)
        self.layers: list[Any] = self.cache.layers
        if [type(layer) for layer in self.layers] != [StaticLayer] * len(like):
            raise ValueError("expected a full-attention cache layer for every layer of the model")
        self._lengths_N = torch.zeros(len(like), dtype=torch.long, device=device)  # one kernel sets them all
        layer: Any
        for layer, other, length in zip(self.layers, like, self._lengths_N, strict=True):
            layer.lazy_initialization(
                other.keys[:1].expand(rows, -1, -1, -1), other.values[:1].expand(rows, -1, -1, -1)
            )
            layer.cumulative_length = length
        self._start = torch.zeros((), dtype=torch.long, device=device)
        self._slots_C = torch.arange(size, device=device)
        self._holds_R_C = torch.ones(rows, size, dtype=torch.bool, device=device)
        self._masked = False
        self._ids: dict[int, Tensor] = {}
        self._replays: dict[int, Replay | None] = {}
        self.owner: Callable[[], Any] = lambda: None

    def step(
        self,
        model: PreTrainedModel,
        ids_B_T: Tensor,
        mask_B_L: Tensor | None,
        length: int,
        last: int,
        *,
        record: bool = True,
    ) -> Outputs:
        """Put ``ids_B_T`` behind the first ``length`` slots: logits [B, last, V], and what the head read for them."""
        rows, tokens = ids_B_T.shape
        if tokens not in self._ids:
            self._ids[tokens] = torch.zeros(self.rows, tokens, dtype=torch.long, device=self._start.device)
        self._ids[tokens][:rows] = ids_B_T
        self._start.fill_(length)
        if mask_B_L is not None:
            self._holds_R_C[:rows, : mask_B_L.shape[1]] = mask_B_L.bool()
        elif self._masked:
            self._holds_R_C.fill_(True)
        self._masked = mask_B_L is not None
        if not record or tokens > LONGEST or tokens != last:
            logits, hidden = self._forward(model, tokens, last)
            return logits[:rows], hidden[:rows]
        if tokens not in self._replays:
            self._replays[tokens] = _record(model, lambda: self._forward(model, tokens, last))
        replay = self._replays[tokens]
        logits, hidden = replay() if replay else self._forward(model, tokens, last)
        return logits[:rows].clone(), hidden[:rows].clone()  # the next replay overwrites what this one gave

    def _forward(self, model: PreTrainedModel, tokens: int, last: int) -> Outputs:
        """From the buffers; whatever it does is on the device, without a look at a value."""
        self._lengths_N.copy_(self._start.expand_as(self._lengths_N))
        slots_T = self._start + self._slots_C[:tokens]
        seen_R_T_C = (self._slots_C <= slots_T[:, None]) & self._holds_R_C[:, None]
        dtype = self.layers[0].keys.dtype
        mask = torch.zeros(seen_R_T_C.shape, dtype=dtype, device=slots_T.device)
        mask = mask.masked_fill(~seen_R_T_C, torch.finfo(dtype).min)[:, None]
        positions_R_T = (self._holds_R_C.cumsum(dim=1) - 1).clamp(min=0).index_select(1, slots_T)
        extra = {"logits_to_keep": last} if "logits_to_keep" in signature(model.forward).parameters else {}
        head, read = model.get_output_embeddings(), []
        hook = head.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
        try:
            logits: Tensor = model(
                input_ids=self._ids[tokens],
                position_ids=positions_R_T,
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                **extra,
            ).logits
        finally:
            hook.remove()
        return logits[:, -last:], read[0][:, -last:]

    def crop(self, tokens: int) -> None:
        """Nothing to do: what lies behind the length is overwritten before it is read."""

    def take(self, layers: Sequence[Any], length: int, rows: Tensor | slice) -> None:
        """Copy the first ``length`` slots of these rows of another cache, or of this one."""
        for own, other in zip(self.layers, layers, strict=True):
            for mine, theirs in ((own.keys, other.keys), (own.values, other.values)):
                chosen = theirs[rows, :, :length]
                mine[: len(chosen), :, :length] = chosen.clone() if mine is theirs else chosen


_slots: WeakKeyDictionary[PreTrainedModel, list[StaticSteps]] = WeakKeyDictionary()
_possible: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def possible(model: PreTrainedModel) -> bool:
    """Whether the model's steps are to be static, and then do as the model does: tried once, a failure is told."""
    if model not in _possible:
        one_device = len({*getattr(model, "hf_device_map", {"": 0}).values()}) == 1
        does = one_device and model.device.type in DEVICES
        if does:
            try:
                if not holds(model, lambda *step: _tried(model, *step)):
                    raise ValueError("over a static cache they give other logits")
            except Exception as error:  # whatever a model does that has no static form: it then runs as it is
                _refuse(model, error)
                does = False
        _possible[model] = does
    return _possible[model]


def static_steps(
    owner: Any, layers: Sequence[Any], rows: Tensor | slice, count: int, length: int, room: int
) -> StaticSteps:
    """A static cache for ``owner`` (a CachedModel) with the ``count`` chosen rows of ``layers`` and room for more."""
    model: PreTrainedModel = owner.model
    shape = 1 << (count - 1).bit_length(), max(_LEAST, 1 << (length + room - 1).bit_length())
    kept = _slots.setdefault(model, [])
    users = [slot.owner() for slot in kept]
    unused = [
        slot
        for slot, user in zip(kept, users, strict=True)
        if user is owner or getattr(user, "cache", None) is not slot
    ]
    found = next((slot for slot in unused if (slot.rows, slot.size) == shape), None)
    if found is None:
        for slot in unused[: max(0, len(unused) - _KEPT + 1)]:
            kept.remove(slot)
        found = StaticSteps(model, layers, *shape)
        kept.append(found)
    found.owner = ref(owner)
    found.take(layers, length, rows)
    return found


def _tried(model: PreTrainedModel, ids_B_T: Tensor, mask_B_L: Tensor | None, layers: Sequence[Any]) -> Tensor:
    """Logits of one unrecorded step behind these layers."""
    length = layers[0].keys.shape[-2]
    steps = StaticSteps(model, layers, len(ids_B_T), _LEAST)
    steps.take(layers, length, slice(None))
    return steps.step(model, ids_B_T, mask_B_L, length, ids_B_T.shape[1], record=False)[0]


def _record(model: PreTrainedModel, forward: Callable[[], Outputs]) -> Replay | None:
    """The forward as a CUDA graph that gives what the forward gives; None, with a warning, where there is none."""
    if model.device.type != "cuda":
        return None
    try:
        with torch.cuda.device(model.device):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):  # twice: the first call may set things up
                expected = [forward() for _ in range(2)][-1]
            here.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = forward()
            graph.replay()
        if not all(close(got, wanted) for got, wanted in zip(outputs, expected, strict=True)):
            raise ValueError("their replay gives other logits")
    except Exception as error:
        _refuse(model, error)
        return None

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


def _refuse(model: PreTrainedModel, error: Exception) -> None:
    name, reason = type(model).__name__, str(error).splitlines()[0] if str(error) else type(error).__name__
    _possible[model] = False
    warnings.warn(
        f"the decoding steps of {name} are not recorded as CUDA graphs ({reason}): every step costs its launches",
        LLMDoctorWarning,
        stacklevel=2,
    )
