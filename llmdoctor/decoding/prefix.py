"""What is kept of prompts that were read, so that the next one that begins alike reads only what is new."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdoctor.decoding.caches import KVCache, Layers

WORTH = 32  # tokens; fewer are read as fast as they are found


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    least, most = 0, min(len(one), len(other))
    while least < most:  # by halves: comparing slices is much faster than a loop
        middle = (least + most + 1) // 2
        least, most = (middle, most) if one[least:middle] == other[least:middle] else (least, middle - 1)
    return least


@dataclass(eq=False)
class PrefixCache:
    """The KV caches of one conversation. Give the same object to each of its turns, one after the other.

    ``ids`` are the tokens that the caches hold. A next prompt that begins with some of them goes on from there, however
    the last answer ended: finished, interrupted, or abandoned. ``prefilled`` is the number of prompt tokens that the
    patient had to read for the latest answer.
    """

    ids: list[int] = field(default_factory=list)
    caches: "dict[str, KVCache]" = field(default_factory=dict)  # by role, "patient" or "doctor NAME" and so on
    prefilled: int = 0

    def shared(self, prompt: list[int]) -> int:
        """How many tokens of ``prompt`` the caches may keep: never its last one, whose logits are needed."""
        return common(self.ids, prompt[:-1])

    def begin(self, prompt: list[int], models: "dict[str, PreTrainedModel]") -> "dict[str, KVCache]":
        """The caches of ``models`` for an answer to ``prompt``, rewound to what they have already read of it.

        Caches of other models are dropped: they will not see this answer, so ``ids`` would be wrong for them.
        """
        from llmdoctor.decoding.caches import open_cache  # torch, which a terminal without models does not load

        # ``ids`` may be longer than a cache: an answer that was left had shown tokens that not every model had read
        shared, held = self.shared(prompt), self.caches
        self.caches = {}
        for role, model in models.items():
            cache = held.get(role)
            if cache is None or cache.model is not model:
                cache = open_cache(model)
            cache.rewind(min(shared, cache.length))
            self.caches[role] = cache
        self.ids[:] = prompt
        self.prefilled = len(prompt) - self.caches["patient"].length
        return self.caches


@dataclass(frozen=True, eq=False)
class Prefix:
    """The first ``length`` tokens of a row as its models have read them: keys and values by role."""

    length: int
    layers: "Mapping[str, Layers]"

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(kv.nbytes for layers in self.layers.values() for pair in layers for kv in pair)

    def first(self, tokens: int) -> "Prefix":
        """Its first ``tokens``, in the same memory."""
        cut = {
            role: [(keys[:, :, :tokens], values[:, :, :tokens]) for keys, values in layers]
            for role, layers in self.layers.items()
        }
        return Prefix(tokens, cut)


class SharedPrefixes:
    """Prompts and answers that were read, for all rows of a batch: at most ``most`` bytes, the least recently used go.

    Where `PrefixCache` goes on with the caches of one conversation, this gives every row its own copy. ``hits`` counts
    the prompts that found a beginning, ``reused`` its tokens, ``size`` the bytes in use. Prompts that are read
    in one forward are all read from where the least is known.
    """

    def __init__(self, most: int) -> None:
        self.most, self.size, self.hits, self.reused = most, 0, 0, 0
        self._held: dict[tuple[int, ...], Prefix] = {}  # the least recently used first

    def length(self, prompt: Sequence[int]) -> int:
        """How many tokens of ``prompt`` need not be read; never its last one, whose logits are needed."""
        return self._best(tuple(prompt[:-1]))[0]

    def find(self, prompt: Sequence[int]) -> Prefix | None:
        """The longest beginning of ``prompt`` that was read, without its last token."""
        length, ids = self._best(tuple(prompt[:-1]))
        if not length:
            return None
        self._held[ids] = found = self._held.pop(ids)  # the most recently used
        self.hits, self.reused = self.hits + 1, self.reused + length
        return found.first(length)

    def _best(self, prompt: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        # most have another beginning, which is told at a glance
        near = [ids for ids in self._held if ids[:WORTH] == prompt[:WORTH]] if len(prompt) >= WORTH else []
        return max(((common(ids, prompt), ids) for ids in near), key=lambda one: one[0], default=(0, ()))

    def add(self, tokens: Sequence[int], prefix: Prefix) -> None:
        """Keep what was read of ``tokens``, unless it is larger than all that may be kept."""
        ids, size = tuple(tokens[: prefix.length]), prefix.size
        if len(ids) < WORTH or size > self.most:
            return
        for held in list(self._held):
            same = common(ids, held)
            if same == len(ids) < len(held):  # known, and more
                self._held[held] = self._held.pop(held)
                return
            if same == len(held):
                self._drop(held)
        while self.size + size > self.most:
            self._drop(next(iter(self._held)))
        self._held[ids] = prefix
        self.size += size

    def _drop(self, ids: tuple[int, ...]) -> None:
        self.size -= self._held.pop(ids).size

    def clear(self) -> None:
        """Forget all."""
        self._held.clear()
        self.size = 0
