"""The KV cache that the model itself makes, of any kind that transformers has; it grows with every token."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from llmdoctor.decoding.caches.protocol import KVCache, Layers, Read
from llmdoctor.errors import LoadError


class DynamicKV:
    """See `KVCache`."""

    def __init__(self, model: PreTrainedModel) -> None:
        accepted = inspect.signature(model.forward).parameters
        if "past_key_values" not in accepted:
            raise LoadError(
                f"{type(model).__name__} keeps its state in a form that llmdoctor cannot decode with: expected a model "
                "whose forward takes past_key_values; choose another one"
            )
        self.model = model
        self.length = 0
        self.cache: Any = None  # of the kind that the model makes
        self._takes_positions = "position_ids" in accepted
        self._takes_last = "logits_to_keep" in accepted
        self._head = model.get_output_embeddings()
        if self._head is None:
            raise LoadError(f"{type(model).__name__} has no output head that llmdoctor can find; choose another one")
        config = model.config.get_text_config()
        # gpt_neo's local layers count slots in a cache of full attention
        self._local = "local" in (getattr(config, "attention_layers", None) or ())
        self._in_forward = False
        self._plain = False
        # Layers with a window or a short convolution forget what they have passed. To go back they record it until
        # the next crop; below ``_reach`` slots they have not forgotten anything yet.
        self._records = False
        self._recorded = 0
        self._reach = 0

    def feed(self, ids_B_T: Tensor, mask_B_L: Tensor | None = None, last: int = 1) -> Read:
        """See `KVCache`."""
        extra: dict[str, Any] = {"logits_to_keep": last} if self._takes_last else {}
        if mask_B_L is not None:
            extra["attention_mask"] = mask_B_L
            if self._takes_positions:
                extra["position_ids"] = positions(mask_B_L, ids_B_T.shape[1])
        read: list[Tensor] = []
        hook = self._head.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
        self._in_forward = True  # an interrupt leaves it so: `rewind` then knows that the layers differ in length
        try:
            ids = ids_B_T.to(self.model.device)
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **extra)
        finally:
            hook.remove()
        if self.cache is None:
            self._adopt(getattr(out, "past_key_values", None))
        else:
            self._recorded += ids_B_T.shape[1]
        self.length += ids_B_T.shape[1]
        self._in_forward = False
        return Read(out.logits[:, -last:], read[0][:, -last:])

    def _adopt(self, cache: Any) -> None:
        if not hasattr(cache, "layers"):
            raise LoadError(
                f"{type(self.model).__name__} does not return a KV cache that llmdoctor knows: expected one with "
                f"layers, got {type(cache).__name__}; choose another model"
            )
        self.cache = cache
        self._plain = plain(cache.layers) and self._takes_positions and not self._local
        self._records = self.can_roll_back and not plain(cache.layers)
        if self._records:
            cache.activate_past_recording()
            limits = [getattr(layer, "sliding_window", 0) for layer in cache.layers if type(layer) is not DynamicLayer]
            self._reach = min(limits)

    @property
    def can_roll_back(self) -> bool:
        """See `KVCache`."""
        return bool(getattr(self.cache, "is_croppable", False))

    @property
    def can_have_holes(self) -> bool:
        """See `KVCache`."""
        return self._plain

    @property
    def can_join(self) -> bool:
        """See `KVCache`."""
        return all(
            isinstance(layer, LinearAttentionLayer) or (isinstance(layer, DynamicLayer) and layer.keys is not None)
            for layer in self.cache.layers
        )

    def take_back(self, tokens: int) -> None:
        """See `KVCache`."""
        # what is recorded grows until it is cropped, if only by nothing
        if tokens or self._records:
            self._in_forward = True  # an interrupt between two layers leaves them of different length too
            self.cache.crop(-tokens)
            self._recorded = 0
            self.length -= tokens
            self._in_forward = False

    def rewind(self, length: int) -> None:
        """See `KVCache`."""
        if self._in_forward and self.cache is not None:
            self._mend()
        excess = self.length - length
        kept = self.cache is not None and length > 0 and excess >= 0 and (excess == 0 or self.can_roll_back)
        if kept and excess and self._records:
            kept = excess <= self._recorded or self.length < self._reach
        if not kept:
            self._forget()
        elif excess:
            self.take_back(excess)

    def keep(self, rows_B: Tensor) -> None:
        """See `KVCache`."""
        # unlike batch_select_indices this knows recurrent states
        self.cache.reorder_cache(rows_B.to(self.model.device))

    def pack(self, slots_B_L: Tensor) -> None:
        """See `KVCache`."""
        index = slots_B_L[:, None, :, None].to(self.model.device)
        for layer in self.cache.layers:
            layer.keys = layer.keys.take_along_dim(index, dim=2)
            layer.values = layer.values.take_along_dim(index, dim=2)
        self.length = slots_B_L.shape[1]

    def join(self, other: KVCache) -> None:
        """See `KVCache`."""
        assert isinstance(other, DynamicKV)
        for cache in (self, other):
            cache.take_back(0)  # windows then hold what they see and nothing else
        self.length = max(self.length, other.length)
        join_layers(self.cache.layers, other.cache.layers, self.length)

    def saved(self, row: int, slots_L: Tensor) -> Layers:
        """See `KVCache`."""

        def part(kv: Tensor) -> Tensor:
            return kv[row : row + 1].index_select(2, slots_L.to(kv.device))

        return [(part(layer.keys), part(layer.values)) for layer in self._filled()]

    def load(self, rows: Sequence[Layers], length: int) -> None:
        """See `KVCache`."""
        cache = DynamicCache()
        for parts in zip(*rows, strict=True):
            layer = DynamicLayer()
            layer.keys, layer.values = (_aligned(kvs, length) for kvs in zip(*parts, strict=True))
            layer.dtype, layer.device, layer.is_initialized = layer.keys.dtype, layer.keys.device, True
            cache.layers.append(layer)
        self._adopt(cache)
        self.length = length

    def _filled(self) -> list[Any]:
        """The layers, cut to the rows and slots in use."""
        return list(self.cache.layers)

    def _mend(self) -> None:
        """After an interrupted forward: cut the layers it had reached, or drop everything where that is not certain."""
        layers = self.cache.layers
        whole = plain(layers) and all(
            layer.keys is not None and layer.values is not None and layer.keys.shape == layer.values.shape
            for layer in layers
        )
        if not whole or any(layer.get_seq_length() < self.length for layer in layers):
            self._forget()
        else:
            for layer in layers:
                if excess := layer.get_seq_length() - self.length:
                    layer.crop(-excess)
        self._in_forward = False

    def _forget(self) -> None:
        self.cache, self.length, self._recorded = None, 0, 0
        self._plain = self._records = False


def positions(mask_B_L: Tensor, last: int) -> Tensor:
    """The positions [B, last] of the last slots: how many tokens come before each in its row."""
    return (mask_B_L.cumsum(dim=1) - 1).clamp(min=0)[:, -last:]


def plain(layers: Sequence[Any]) -> bool:
    """Whether all layers are ones of full attention, whose slots can be moved about."""
    return all(type(layer) is DynamicLayer for layer in layers)


def join_layers(layers: Sequence[Any], others: Sequence[Any], length: int) -> None:
    """Add the rows of ``others`` to ``layers``, for ``length`` slots."""
    for mine, theirs in zip(layers, others, strict=True):
        if isinstance(mine, DynamicLayer):
            mine.keys = stacked(mine.keys, theirs.keys)
            mine.values = stacked(mine.values, theirs.values)
        if isinstance(mine, DynamicSlidingWindowLayer):
            mine.cumulative_length = length
        if isinstance(mine, LinearAttentionLayer):  # states have no slots: nothing to pad
            for name in ("conv_states", "recurrent_states"):
                own, other = getattr(mine, name), getattr(theirs, name)
                own |= {i: torch.cat([state, other[i]]) for i, state in own.items() if state is not None}


def stacked(one: Any, other: Any) -> Tensor:
    """Both batches of keys or values [rows, heads, slots, width], right-aligned: the newest slots are the last."""
    return _aligned((one, other), max(one.shape[2], other.shape[2]))


def _aligned(kvs: Sequence[Tensor], slots: int) -> Tensor:
    if len(kvs) == 1 and kvs[0].shape[2] == slots:
        return kvs[0]
    # zeros, not garbage: the attention weight of an empty slot is 0, and 0 times NaN is NaN
    parts = [kv if kv.shape[2] == slots else torch.nn.functional.pad(kv, (0, 0, slots - kv.shape[2], 0)) for kv in kvs]
    return torch.cat(parts)
