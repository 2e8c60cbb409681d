"""The models' KV caches: feeding, rolling back, and what a conversation keeps of them between two answers."""

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from llmdoctor.decoding.graphs import run_step, step_graph
from llmdoctor.decoding.static import StaticSteps, possible, static_steps


class CachedModel:
    """A causal LM and its KV cache over a batch; ``length`` slots are filled, the same number in every row.

    Masks [B, slots] say which slots hold a token of the row: not the padding on the left, not rejected drafts.
    """

    def __init__(self, model: PreTrainedModel, *, keeps_hidden: bool = False, rolls_back: bool = False) -> None:
        self.model, self.keeps_hidden, self.rolls_back = model, keeps_hidden, rolls_back
        self.cache: Any = None  # of the kind that the model itself makes
        self.length = 0
        self.hidden_B_K_H: Tensor | None = None  # what the LM head read last
        accepted = inspect.signature(model.forward).parameters
        self._takes = {name for name in ("position_ids", "logits_to_keep") if name in accepted}
        self._head = model.get_output_embeddings()
        self._slides = self._plain = self._busy = False
        self._recorded = 0  # tokens fed since a sliding layer last let go of what its window has passed

    def feed(self, ids_B_T: Tensor, mask_B_L: Tensor | None = None, last: int = 1) -> Tensor:
        """Extend the cache by ``ids_B_T``; logits [B, last, V] after the last tokens. The mask covers both."""
        if self._static(ids_B_T, last):
            logits_B_K_V: Tensor
            logits_B_K_V, self.hidden_B_K_H = self.cache.step(self.model, ids_B_T, mask_B_L, self.length, last)
            self.length += ids_B_T.shape[1]
            return logits_B_K_V
        if (
            ids_B_T.shape[1] == last
            and self.cache is not None
            and self._plain
            and (graph := step_graph(self.model, self.cache.layers))
        ):
            self._busy = True
            logits_B_K_V, self.hidden_B_K_H = run_step(graph, ids_B_T, mask_B_L, self.cache.layers)
            self.length += last
            self._busy = False
            return logits_B_K_V
        extra: dict[str, Any] = {"logits_to_keep": last} if "logits_to_keep" in self._takes else {}
        if mask_B_L is not None:
            extra["attention_mask"] = mask_B_L
            if "position_ids" in self._takes:
                extra["position_ids"] = (mask_B_L.cumsum(dim=1) - 1).clamp(min=0)[:, -ids_B_T.shape[1] :]
        hook = self._head.register_forward_pre_hook(self._keep_hidden) if self.keeps_hidden else None
        self._busy = True  # stays so when the forward is interrupted: the layers then differ in length
        try:
            ids = ids_B_T.to(self.model.device)
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **extra)
        finally:
            if hook:
                hook.remove()
        if self.cache is None:
            self.cache = out.past_key_values
            self._slides = any(getattr(self.cache, "is_sliding", ()))
            layers = getattr(self.cache, "layers", ())
            self._plain = all(type(layer) is DynamicLayer for layer in layers) and "position_ids" in self._takes
            if self.rolls_back and self.can_roll_back and hasattr(self.cache, "activate_past_recording"):
                self.cache.activate_past_recording()
        else:
            self._recorded += ids_B_T.shape[1]
        self.length += ids_B_T.shape[1]
        self._busy = False
        if self.hidden_B_K_H is not None:
            self.hidden_B_K_H = self.hidden_B_K_H[:, -last:]
        return out.logits[:, -last:]  # type: ignore[no-any-return]

    def _static(self, ids_B_T: Tensor, last: int) -> bool:
        """Whether the cache is static, with room; where steps are to be static, the first one makes it so."""
        rows, tokens = ids_B_T.shape
        held = isinstance(self.cache, StaticSteps)
        if not held and (self.cache is None or not self._plain or tokens != last or not possible(self.model)):
            return False
        if not held or self.length + tokens > self.cache.size:
            self.cache = static_steps(self, self.cache.layers, slice(rows), rows, self.length, tokens)
        return True

    @property
    def can_roll_back(self) -> bool:
        """Whether tokens can be taken back; recurrent states cannot. Only known once something has been fed."""
        return bool(getattr(self.cache, "is_croppable", False))

    @property
    def may_have_holes(self) -> bool:
        """Whether slots may be masked between others: not in a window, nor where positions are counted by slot."""
        return not self._slides and "position_ids" in self._takes

    def take_back(self, tokens: int) -> None:
        """Drop the last ``tokens`` slots, of those fed since the last call."""
        if tokens or (self._slides and self.rolls_back):  # a recording window grows until it is cropped, if by nothing
            self._busy = True
            self.cache.crop(-tokens)
            self._recorded = 0
            self.length -= tokens
            self._busy = False

    def rewind(self, length: int) -> None:
        """Go back to the first ``length`` tokens where the cache allows it, and to nothing where it does not."""
        if self._busy and self.cache is not None:
            self._mend()
        excess = self.length - length
        kept = self.cache is not None and excess >= 0 and (excess == 0 or self.can_roll_back)
        if kept and excess and self._slides:  # what a window has passed is gone
            windows = [layer.sliding_window for layer in self.cache.layers if getattr(layer, "is_sliding", False)]
            kept = self.rolls_back and (excess <= self._recorded or self.length < min(windows))
        if not kept or length == 0:
            self.cache, self.length, self._recorded = None, 0, 0
        elif excess:
            self.take_back(excess)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows of the batch but these."""
        if isinstance(self.cache, StaticSteps):
            self.cache = static_steps(self, self.cache.layers, rows.to(self.model.device), len(rows), self.length, 0)
            return
        self.cache.reorder_cache(rows.to(self.model.device))  # unlike batch_select_indices it knows recurrent states

    @property
    def can_pack(self) -> bool:
        """Whether slots can be moved: in plain layers, whose tokens know their positions."""
        return self._plain

    def pack(self, slots_B_L: Tensor) -> None:
        """Keep only these slots of every row, in this order."""
        index = slots_B_L[:, None, :, None].to(self.model.device)
        for layer in self.cache.layers:
            keys, values = (kv[: len(index)].take_along_dim(index, dim=2) for kv in (layer.keys, layer.values))
            if isinstance(self.cache, StaticSteps):
                layer.keys[: len(index), :, : index.shape[2]] = keys
                layer.values[: len(index), :, : index.shape[2]] = values
            else:
                layer.keys, layer.values = keys, values
        self.length = slots_B_L.shape[1]

    def _mend(self) -> None:
        """After an interrupted forward: cut the layers that it had reached, or, where that is not certain, all."""
        layers = self.cache.layers
        if isinstance(self.cache, StaticSteps):  # nothing behind the length is ever read
            self._busy = False
            return
        plain = all(
            type(layer) is DynamicLayer
            and layer.keys is not None
            and layer.values is not None
            and layer.keys.shape == layer.values.shape
            for layer in layers
        )
        if not plain or any(layer.get_seq_length() < self.length for layer in layers):
            self.cache, self.length = None, 0
        else:
            for layer in layers:
                if excess := layer.get_seq_length() - self.length:
                    layer.crop(-excess)
        self._busy = False

    def _keep_hidden(self, _module: Any, args: tuple[Tensor, ...]) -> None:
        self.hidden_B_K_H = args[0]


@dataclass(eq=False)
class PrefixCache:
    """What one conversation keeps between its answers, so that the next turn reads only what is new.

    Give the same object to every turn. ``ids`` are the tokens that the caches hold; a next prompt that begins with some
    of them goes on from there, whatever the last answer's end: stopped, interrupted, or left. ``prefilled`` is the
    number of prompt tokens that the patient had to read for the latest answer.
    """

    ids: list[int] = field(default_factory=list)
    models: dict[str, CachedModel] = field(default_factory=dict)
    prefilled: int = 0

    def shared(self, prompt: list[int]) -> int:
        """How many tokens of ``prompt`` the caches may keep: never its last one, whose logits are needed."""
        most = min(len(self.ids), len(prompt) - 1)
        return next((i for i in range(most) if self.ids[i] != prompt[i]), most)
