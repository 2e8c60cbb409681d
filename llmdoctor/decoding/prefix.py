"""What a conversation keeps between its answers, so that the next turn reads only what is new."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmdoctor.decoding.caches import KVCache


@dataclass(eq=False)
class PrefixCache:
    """The KV caches of one conversation. Give the same object to each of its turns, one after the other.

    ``ids`` are the tokens that the caches hold. A next prompt that begins with some of them goes on from there, however
    the last answer ended: finished, interrupted, or abandoned. ``prefilled`` is the number of prompt tokens that the
    patient had to read for the latest answer.
    """

    ids: list[int] = field(default_factory=list)
    caches: "dict[str, KVCache]" = field(default_factory=dict)  # by role, "patient" or "doctor NAME" or "base NAME"
    prefilled: int = 0

    def shared(self, prompt: list[int]) -> int:
        """How many tokens of ``prompt`` the caches may keep: never its last one, whose logits are needed."""
        most = min(len(self.ids), len(prompt) - 1)
        return next((i for i in range(most) if self.ids[i] != prompt[i]), most)

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
