"""A KV cache at fixed addresses, whose steps a GPU replays as CUDA graphs: small steps cost their launches otherwise.

A step reads its tokens, its place and its mask from buffers at fixed addresses, so a graph recorded once serves every
later step of as many tokens. Shapes are rounded up to powers of two, and slots (cache, buffers and graphs) are used
again by the next answer. A recorded graph is compared with the model before it is trusted. Without a GPU the same steps
run unrecorded, which is how the tests hold them.
"""

import warnings
from collections.abc import Callable, Sequence
from inspect import signature
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from llmdoctor.decoding.caches.dynamic import DynamicKV, stacked
from llmdoctor.decoding.caches.protocol import KVCache, Read
from llmdoctor.decoding.caches.recorded import close, holds
from llmdoctor.errors import LLMDoctorWarning
from llmdoctor.harmless import first_line
from llmdoctor.models import shared_by_processes

LONGEST = 32  # tokens of a recorded step; longer ones are prompts, whose launches do not count
_LEAST = 256  # slots of the smallest cache
_KEPT = 2  # unused caches kept for the next answer

Replay = Callable[[], Read]


class StaticKV(DynamicKV):
    """A cache that reads its prompt as `DynamicKV` does and then moves to static slots, where the model has them."""

    slots: "StaticSlots | None" = None

    def feed(self, ids_B_T: Tensor, mask_B_L: Tensor | None = None, last: int = 1) -> Read:
        """See `KVCache`."""
        rows, tokens = ids_B_T.shape
        # a step wants the logits of all its tokens, a prompt only the last: a prompt is read once and stays dynamic
        if self.slots is None and self._plain and tokens == last and possible(self.model):
            self._move(self.cache.layers, slice(rows), rows, tokens)
            self.cache = None
        if self.slots is None:
            return super().feed(ids_B_T, mask_B_L, last)
        if self.length + tokens > self.slots.size:
            self._move(self.slots.layers, slice(rows), rows, tokens)
        read = self.slots.step(self.model, ids_B_T, mask_B_L, self.length, last)
        self.length += tokens
        return read

    def _move(self, layers: Sequence[Any], rows: Tensor | slice, count: int, room: int) -> None:
        """To static slots with ``count`` chosen rows of ``layers`` and room for more tokens."""
        self.slots = static_slots(self, layers, rows, count, self.length, room)

    @property
    def can_roll_back(self) -> bool:
        """See `KVCache`."""
        return self.slots is not None or super().can_roll_back

    @property
    def can_join(self) -> bool:
        """See `KVCache`."""
        return self.slots is not None or super().can_join

    def take_back(self, tokens: int) -> None:
        """See `KVCache`."""
        if self.slots is None:
            super().take_back(tokens)
        else:
            self.length -= tokens  # what lies behind the length is overwritten before it is read

    def rewind(self, length: int) -> None:
        """See `KVCache`."""
        if self.slots is None:
            super().rewind(length)
        elif 0 < length <= self.length:
            self.length = length
        else:
            self._forget()

    def _forget(self) -> None:
        super()._forget()
        self.slots = None

    def keep(self, rows_B: Tensor) -> None:
        """See `KVCache`."""
        if self.slots is None:
            super().keep(rows_B)
        else:
            self._move(self.slots.layers, rows_B.to(self.model.device), len(rows_B), 0)

    def pack(self, slots_B_L: Tensor) -> None:
        """See `KVCache`."""
        if self.slots is None:
            super().pack(slots_B_L)
            return
        index = slots_B_L[:, None, :, None].to(self.model.device)
        for layer in self.slots.layers:
            for kv in (layer.keys, layer.values):
                kv[: len(index), :, : index.shape[2]] = kv[: len(index)].take_along_dim(index, dim=2)
        self.length = slots_B_L.shape[1]

    def join(self, other: KVCache) -> None:
        """See `KVCache`."""
        assert isinstance(other, StaticKV)
        if self.slots is None and other.slots is None:
            super().join(other)
            return
        layers = [
            SimpleNamespace(keys=stacked(mine.keys, theirs.keys), values=stacked(mine.values, theirs.values))
            for mine, theirs in zip(self._filled(), other._filled(), strict=True)
        ]
        self.length, self.cache = max(self.length, other.length), None
        self._move(layers, slice(None), len(layers[0].keys), 0)

    def _filled(self) -> list[Any]:
        """See `DynamicKV`."""
        if self.slots is None:
            return super()._filled()
        rows = self.slots.used
        return [
            SimpleNamespace(keys=layer.keys[:rows, :, : self.length], values=layer.values[:rows, :, : self.length])
            for layer in self.slots.layers
        ]


class StaticSlots:
    """The static cache of one batch and the steps over it. How many slots are filled is its owner's to know.

    It holds no reference to the model, which owns it in ``_slots``. ``used`` counts the rows that are in use.
    """

    def __init__(self, model: PreTrainedModel, like: Sequence[Any], rows: int, size: int) -> None:
        self.rows, self.size, device = rows, size, like[0].keys.device
        self.used = 0
        self.cache = StaticCache(config=model.config, max_cache_len=size)
        self.layers: list[Any] = self.cache.layers
        if [type(layer) for layer in self.layers] != [StaticLayer] * len(like):
            raise ValueError("expected a full-attention cache layer for every layer of the model")
        self._lengths = torch.zeros(len(like), dtype=torch.long, device=device)  # one kernel sets them all
        layer: Any
        for layer, other, length in zip(self.layers, like, self._lengths, strict=True):
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
    ) -> Read:
        """Put ``ids_B_T`` behind the first ``length`` slots; what the model says after the last ``last`` tokens."""
        rows, tokens = ids_B_T.shape
        if tokens not in self._ids:
            self._ids[tokens] = torch.zeros(self.rows, tokens, dtype=torch.long, device=self._start.device)
        self._ids[tokens][:rows] = ids_B_T
        self._start.fill_(length)
        if mask_B_L is not None:
            self._holds_R_C[:rows, : mask_B_L.shape[1]] = mask_B_L.bool()
            # the rows that nobody uses hold nothing: else their positions could run beyond the model's table
            self._holds_R_C[rows:] = False
        elif self._masked:
            self._holds_R_C.fill_(True)
        self._masked = mask_B_L is not None
        if not record or tokens > LONGEST or tokens != last:
            read = self._forward(model, tokens, last)
            return Read(read.logits_B_K_V[:rows], read.hidden_B_K_H[:rows])
        if tokens not in self._replays:
            self._replays[tokens] = _record(model, lambda: self._forward(model, tokens, last))
        replay = self._replays[tokens]
        read = replay() if replay else self._forward(model, tokens, last)
        # copies: the next replay overwrites what this one gave
        return Read(read.logits_B_K_V[:rows].clone(), read.hidden_B_K_H[:rows].clone())

    def _forward(self, model: PreTrainedModel, tokens: int, last: int) -> Read:
        """From the buffers. Everything it does is on the device, without a look at a value: a graph could not."""
        self._lengths.copy_(self._start.expand_as(self._lengths))
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
        return Read(logits[:, -last:], read[0][:, -last:])

    def take(self, layers: Sequence[Any], length: int, rows: Tensor | slice) -> None:
        """Copy the first ``length`` slots of these rows of another cache, or of this one."""
        for own, other in zip(self.layers, layers, strict=True):
            for mine, theirs in ((own.keys, other.keys), (own.values, other.values)):
                # of this one too: rows that are chosen by number are a copy, and a slice stays where it is
                chosen = theirs[rows, :, :length]
                mine[: len(chosen), :, :length] = chosen


_slots: WeakKeyDictionary[PreTrainedModel, list[StaticSlots]] = WeakKeyDictionary()
_possible: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def possible(model: PreTrainedModel) -> bool:
    """Whether the model's steps over a static cache do as the model does. Tried once; a failure is a warning."""
    if model not in _possible:
        # layers on several devices or in several processes cannot be one graph
        devices = {*getattr(model, "hf_device_map", {"": 0}).values()}
        _possible[model] = len(devices) == 1 and not shared_by_processes(model)
        if _possible[model]:
            try:
                if not holds(model, lambda *step: _tried(model, *step)):
                    raise ValueError("over a static cache they give other logits")
            except Exception as error:  # whatever a model does that has no static form
                _refuse(model, error)
    return _possible[model]


def static_slots(
    owner: Any, layers: Sequence[Any], rows: Tensor | slice, count: int, length: int, room: int
) -> StaticSlots:
    """Static slots for ``owner`` (a `StaticKV`) with the ``count`` chosen rows of ``layers`` and room for more."""
    model: PreTrainedModel = owner.model
    shape = 1 << (count - 1).bit_length(), max(_LEAST, 1 << (length + room - 1).bit_length())
    kept = _slots.setdefault(model, [])
    # slots are in use as long as a living cache says that they are its own; the owner's may be filled again in place
    users = [slots.owner() for slots in kept]
    unused = [
        slots
        for slots, user in zip(kept, users, strict=True)
        if user is owner or getattr(user, "slots", None) is not slots
    ]
    found = next((slots for slots in unused if (slots.rows, slots.size) == shape), None)
    if found is None:
        for slots in unused[: max(0, len(unused) - _KEPT + 1)]:
            kept.remove(slots)
        found = StaticSlots(model, layers, *shape)
        kept.append(found)
    found.owner, found.used = ref(owner), count
    found.take(layers, length, rows)
    return found


def _tried(model: PreTrainedModel, ids_B_T: Tensor, mask_B_L: Tensor | None, layers: Sequence[Any]) -> Tensor:
    """Logits of one unrecorded step behind these layers."""
    length = layers[0].keys.shape[-2]
    slots = StaticSlots(model, layers, len(ids_B_T), _LEAST)
    slots.take(layers, length, slice(None))
    return slots.step(model, ids_B_T, mask_B_L, length, ids_B_T.shape[1], record=False).logits_B_K_V


def _record(model: PreTrainedModel, forward: Callable[[], Read]) -> Replay | None:
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

    def replay() -> Read:
        graph.replay()
        return outputs

    return replay


def _refuse(model: PreTrainedModel, error: Exception) -> None:
    _possible[model] = False
    warnings.warn(
        f"the decoding steps of {type(model).__name__} are not recorded as CUDA graphs ({first_line(error)}): "
        "every step costs its launches",
        LLMDoctorWarning,
        stacklevel=2,
    )
