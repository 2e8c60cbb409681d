"""KV caches: one protocol, one file for each way to keep keys and values.

- ``dynamic``: the cache that the model itself makes, of any kind;
- ``recorded``: the same, with steps replayed from a recorded graph, for CPUs;
- ``static``: fixed addresses and CUDA graphs, for GPUs.
"""

from collections.abc import Collection

from torch import Tensor
from transformers import PreTrainedModel

from llmdoctor.decoding.caches.dynamic import DynamicKV
from llmdoctor.decoding.caches.protocol import KVCache, Layers, Read
from llmdoctor.decoding.caches.recorded import RecordedKV, recordings
from llmdoctor.decoding.caches.static import StaticKV

__all__ = ["KVCache", "Layers", "Read", "close_holes", "open_cache", "recordings", "tokens_last"]

_FEW_HOLES = 8  # so many empty slots, or an eighth of the rest, are cheaper to read than to close

BACKENDS: dict[str, type[DynamicKV]] = {"cpu": RecordedKV, "cuda": StaticKV}


def open_cache(model: PreTrainedModel) -> KVCache:
    """An empty cache of the kind that suits the model's device. Raises LoadError for a model without a KV cache."""
    return BACKENDS.get(model.device.type, DynamicKV)(model)


def tokens_last(mask_B_L: Tensor, needed: int) -> Tensor:
    """The last ``needed`` slots [B, needed] of every row with its tokens behind its empty slots."""
    # a stable sort puts a row's empty slots first and leaves its tokens in their order
    return mask_B_L.argsort(dim=1, stable=True)[:, -needed:]


def close_holes(caches: Collection[KVCache], mask_B_L: Tensor, needed: int) -> Tensor:
    """Move the tokens of all caches together when many slots are empty: every step reads and copies them.

    ``mask_B_L`` tells which slots of the caches hold a token, ``needed`` how many of the longest row do. Returns the
    new mask, or the same where nothing was moved.
    """
    if mask_B_L.shape[1] - needed <= max(_FEW_HOLES, needed // 8):
        return mask_B_L
    if not all(cache.can_have_holes for cache in caches):
        return mask_B_L
    kept_B_L = tokens_last(mask_B_L, needed)
    for cache in caches:
        cache.pack(kept_B_L)
    return mask_B_L.gather(1, kept_B_L)
