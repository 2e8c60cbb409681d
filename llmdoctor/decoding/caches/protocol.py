"""What the decoder asks of a KV cache, whatever keeps the keys and values."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel

# Keys and values [1, heads, slots, width] of each layer, for one row.
Layers = Sequence[tuple[Tensor, Tensor]]


class Read(NamedTuple):
    """What a model says after the last K of the tokens it was fed."""

    logits_B_K_V: Tensor
    hidden_B_K_H: Tensor  # what its LM head read


class KVCache(Protocol):
    """A causal LM and the keys and values of what it has read, for a batch of rows.

    Every row has ``length`` slots. A slot holds a token, or nothing: padding on the left, a rejected draft. Masks
    [B, slots] are 1 where a slot holds a token.
    """

    model: PreTrainedModel
    length: int

    def feed(self, ids_B_T: Tensor, mask_B_L: Tensor | None = None, last: int = 1) -> Read:
        """Read ``ids_B_T``; what the model says after the last ``last`` of them. The mask covers old and new slots."""
        ...

    def take_back(self, tokens: int) -> None:
        """Drop the last ``tokens`` slots, all of them fed since the last call."""
        ...

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` slots where that is possible; otherwise keep nothing (``length`` becomes 0)."""
        ...

    def keep(self, rows_B: Tensor) -> None:
        """Keep only these rows of the batch."""
        ...

    def pack(self, slots_B_L: Tensor) -> None:
        """Keep only these slots of every row, in this order."""
        ...

    def join(self, other: "KVCache") -> None:
        """Add the rows of another cache of the same model below the own ones.

        The shorter of the two gets empty slots on the left. ``other`` must not be used afterwards. Only where
        ``can_join`` holds for both.
        """
        ...

    def saved(self, row: int, slots_L: Tensor) -> Layers:
        """A copy of the keys and values in these slots of a row. Only where ``can_have_holes`` holds."""
        ...

    def load(self, rows: Sequence[Layers], length: int) -> None:
        """Fill this empty cache with saved rows, each at the end of ``length`` slots."""
        ...

    @property
    def can_roll_back(self) -> bool:
        """Whether tokens can be taken back: recurrent states cannot. Known once something has been fed."""
        ...

    @property
    def can_have_holes(self) -> bool:
        """Whether empty slots may lie between tokens, and tokens be moved together (`pack`).

        Not where a window or a convolution counts slots, nor where a model takes slots for positions.
        """
        ...

    @property
    def can_join(self) -> bool:
        """Whether further rows can be added. Known once something has been fed."""
        ...
