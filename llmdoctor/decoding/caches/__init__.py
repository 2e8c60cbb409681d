"""KV caches: one protocol, one file for each way to keep keys and values.

- ``dynamic``: the cache that the model itself makes, of any kind;
- ``recorded``: the same, with steps replayed from a recorded graph, for CPUs;
- ``static``: fixed addresses and CUDA graphs, for GPUs.
"""

from transformers import PreTrainedModel

from llmdoctor.decoding.caches.dynamic import DynamicKV
from llmdoctor.decoding.caches.protocol import KVCache, Layers, Read
from llmdoctor.decoding.caches.recorded import RecordedKV
from llmdoctor.decoding.caches.static import StaticKV

__all__ = ["KVCache", "Layers", "Read", "open_cache"]

BACKENDS: dict[str, type[DynamicKV]] = {"cpu": RecordedKV, "cuda": StaticKV}


def open_cache(model: PreTrainedModel) -> KVCache:
    """An empty cache of the kind that suits the model's device. Raises LoadError for a model without a KV cache."""
    return BACKENDS.get(model.device.type, DynamicKV)(model)
