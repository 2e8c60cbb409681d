"""A decoding step recorded as one graph: on a CPU a small model's time goes into Python and launches, not arithmetic.

The recorded step runs the same operations on the same weights without the Python between them; on the 12-layer clinic
patient it is 2.7 times as fast, with bit-equal logits. The recorder is that of ``torch.jit.trace``, which torch has
deprecated. It is used in this file only: ``torch.compile`` and ``torch.export`` take longer to start than a short
answer takes. Where it is missing or fails, steps run as the model has them, and a warning says so.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from llmdoctor.decoding.caches.dynamic import DynamicKV, positions
from llmdoctor.decoding.caches.protocol import Read
from llmdoctor.errors import LLMDoctorWarning
from llmdoctor.harmless import first_line
from llmdoctor.models import shared_by_processes

Graph = Callable[..., tuple[Tensor, ...]]
_STEPS_BEFORE_RECORDING = 4  # recording costs about as much
_ROOM = 64  # least number of empty slots that a cache which is full gets
_steps: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()
# A graph must not refer to its model: a value that holds its key keeps both for ever.
_graphs: WeakKeyDictionary[PreTrainedModel, Graph | None] = WeakKeyDictionary()


def recordings() -> int:
    """Of how many models a step was recorded, or tried to be: a round in which this grows takes longer than others."""
    return len(_graphs)


class RecordedKV(DynamicKV):
    """A dynamic cache whose steps are replayed from the model's recorded graph, once there is one."""

    def feed(self, ids_B_T: Tensor, mask_B_L: Tensor | None = None, last: int = 1) -> Read:
        """See `KVCache`."""
        # a prompt, of which only the last logits are wanted, is long enough to run as it is
        graph = step_graph(self.model, self.cache.layers) if self._plain and ids_B_T.shape[1] == last else None
        if graph is None:
            for layer in self.cache.layers if self._plain else ():
                layer.rooms = []  # the model makes new tensors: the old ones need not stay beside them
            return super().feed(ids_B_T, mask_B_L, last)
        self._in_forward = True
        read = run_step(graph, ids_B_T, mask_B_L, self.cache.layers)
        self.length += last
        self._in_forward = False
        return read


def step_graph(model: PreTrainedModel, layers: Sequence[Any]) -> Graph | None:
    """The recorded step of a model with plain full-attention layers; None while, or where, there is none.

    Recorded once per model, on a CPU, after its first few steps. A step that depends on values (mixtures of experts,
    some rotary scalings) shows in the recorder's warnings, anything else in a comparison with the model.
    """
    if model not in _graphs:
        _steps[model] = _steps.get(model, 0) + 1
        if _steps[model] <= _STEPS_BEFORE_RECORDING:
            return None
        possible = model.device.type == "cpu" and layers and not shared_by_processes(model)
        _graphs[model] = _tried(model) if possible else None
    return _graphs[model]


def _tried(model: PreTrainedModel) -> Graph | None:
    try:
        graph = _record(model)
        if not holds(model, lambda *step: run_step(graph, *step).logits_B_K_V):
            raise ValueError("the recorded step gives other logits than the model")
    except Exception as error:  # whatever a model does that cannot be recorded
        warnings.warn(
            f"the decoding steps of {type(model).__name__} cannot be recorded ({first_line(error)}): they run step "
            "by step, correct but slower",
            LLMDoctorWarning,
            stacklevel=2,
        )
        return None
    return graph


def run_step(graph: Graph, ids_B_T: Tensor, mask_B_L: Tensor | None, layers: Sequence[Any]) -> Read:
    """What the model says after each of the tokens; the layers' keys and values grow by T."""
    length, dtype = layers[0].keys.shape[-2], layers[0].keys.dtype
    slots = length + ids_B_T.shape[1]
    grown = [kv for layer in layers for kv in _longer(layer, slots)]
    jit: Any = torch.jit  # its stubs leave out names that its documentation gives
    with jit.optimized_execution(False):  # every step has another shape: there is nothing to specialise on
        logits, hidden = graph(ids_B_T, *_places(ids_B_T, mask_B_L, length, dtype), *grown)
    for layer, keys, values in zip(layers, grown[::2], grown[1::2], strict=True):
        layer.keys, layer.values = keys, values
    return Read(logits, hidden)


def _longer(layer: Any, slots: int) -> list[Tensor]:
    """The layer's keys and values with empty slots behind them, ``slots`` together.

    They are the beginning of longer tensors that the layer keeps, so that a step does not copy all that was read
    before. Only these are written into: what lies in other memory may belong to others.
    """
    rooms: list[Tensor] = getattr(layer, "rooms", [])
    if not rooms or _does_not_fit(layer.keys, rooms[0], slots):  # whatever replaces the keys replaces the values
        now = [layer.keys, layer.values]
        more = slots + max(_ROOM, slots // 8)
        rooms = [kv.new_empty(*kv.shape[:2], more, kv.shape[3]) for kv in now]
        for kv, room in zip(now, rooms, strict=True):
            room[:, :, : kv.shape[2]] = kv
        layer.rooms = rooms
    return [room[:, :, :slots] for room in rooms]


def _does_not_fit(kv: Tensor, room: Tensor, slots: int) -> bool:
    return room.data_ptr() != kv.data_ptr() or room.shape[:2] != kv.shape[:2] or room.shape[2] < slots


class _Filled(DynamicLayer):
    """A layer whose new slots are there already."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_more: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        for kv, new in ((self.keys, key_states), (self.values, value_states)):
            kv[:, :, -new.shape[2] :] = new
        return self.keys, self.values


def _places(ids_B_T: Tensor, mask_B_L: Tensor | None, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Position ids [B, T] and the additive attention mask [B or 1, 1, T, length + T]."""
    rows, tokens = ids_B_T.shape
    least = torch.finfo(dtype).min
    if mask_B_L is None:
        positions_B_T = torch.arange(length, length + tokens).expand(rows, -1)
        return positions_B_T, torch.full((1, 1, tokens, length + tokens), least, dtype=dtype).triu(length + 1)
    seen = torch.ones(tokens, length + tokens, dtype=torch.bool).tril(length) & mask_B_L[:, None, None].bool()
    return positions(mask_B_L, tokens), torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, least)


def _record(model: PreTrainedModel) -> Graph:
    """The step as a graph. Raises whatever the recorder raises, and ValueError where the step depends on values."""
    owner, head = ref(model), ref(model.get_output_embeddings())

    def step(ids_B_T: Tensor, positions_B_T: Tensor, mask: Tensor, *grown: Tensor) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for keys, values in zip(grown[::2], grown[1::2], strict=True):
            layer = _Filled()  # type: ignore[no-untyped-call]
            layer.keys, layer.values, layer.dtype, layer.device = keys, values, keys.dtype, keys.device
            layer.is_initialized = True
            cache.layers.append(layer)
        here, its_head = owner(), head()
        assert here is not None
        assert its_head is not None
        read: list[Tensor] = []
        hook = its_head.register_forward_pre_hook(lambda _module, args: read.append(args[0]))
        try:
            out = here(
                input_ids=ids_B_T,
                position_ids=positions_B_T,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            hook.remove()
        return out.logits, read[0]

    with torch.no_grad(), _without_padding_row(model), warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        ids_B_T = torch.tensor([[0, 1]])
        layers: list[Any] = model(input_ids=ids_B_T[:, :1], use_cache=True).past_key_values.layers
        grown = [kv for layer in layers for kv in _longer(layer, 3)]
        example = (ids_B_T, *_places(ids_B_T, None, 1, layers[0].keys.dtype), *grown)
        # torch.jit.trace does the same, but keeps what it has made, and with it the weights, as long as the process
        traced, _ = torch._C._create_graph_by_tracing(step, example, lambda _value: "", True, False)
        graph: Graph = torch._C._create_function_from_graph("step", traced)
    doubts = [
        warning
        for warning in heard
        if issubclass(warning.category, torch.jit.TracerWarning)  # type: ignore[attr-defined]
        # the one place known to ask for a shape, with the same answer whenever there is a mask
        and "sdpa_attention" not in warning.filename
    ]
    if doubts:
        raise ValueError("it depends on values, not only on shapes")
    return graph


@contextmanager
def _without_padding_row(model: PreTrainedModel) -> Iterator[None]:
    """Hide the embedding's padding row: it matters to gradients only, and torch's check of its place is no graph."""
    embedding: Any = model.get_input_embeddings()
    row = getattr(embedding, "padding_idx", None)
    if row is not None:
        embedding.padding_idx = None
    try:
        yield
    finally:
        if row is not None:
            embedding.padding_idx = row


def holds(model: PreTrainedModel, step: Callable[[Tensor, Tensor | None, Sequence[Any]], Tensor]) -> bool:
    """Whether ``step`` (ids [B, T], mask [B, L] or None, layers: logits [B, T, V]) does as the model does.

    Tried on other lengths, rows and tokens than it was made from, with padding and a hole.
    """
    generator = torch.Generator().manual_seed(0)
    ids_B_L = torch.randint(0, model.config.get_text_config().vocab_size, (2, 10), generator=generator)
    ids_B_L = ids_B_L.to(model.device)
    mask_B_L = torch.ones_like(ids_B_L)
    mask_B_L[0, :2] = mask_B_L[1, 4] = 0
    positions_B_L = positions(mask_B_L, mask_B_L.shape[1])

    def start(rows: slice, masked: bool) -> Any:
        extra = {"attention_mask": mask_B_L[rows, :7], "position_ids": positions_B_L[rows, :7]} if masked else {}
        return model(input_ids=ids_B_L[rows, :7], use_cache=True, **extra).past_key_values

    with torch.no_grad():
        for rows, masked, until in ((slice(2), True, 10), (slice(1), False, 8)):
            cache, fresh = start(rows, masked), ids_B_L[rows, 7:until]
            mask = mask_B_L[rows, :until] if masked else None
            logits = step(fresh, mask, start(rows, masked).layers)
            extra = {"attention_mask": mask, "position_ids": positions_B_L[rows, 7:until]} if masked else {}
            if not close(logits, model(input_ids=fresh, past_key_values=cache, use_cache=True, **extra).logits):
                return False
    return True


def close(got: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding: 1e-4 of the greatest number, in half precision a few of its own steps."""
    tolerance = max(1e-4, 8 * torch.finfo(expected.dtype).eps)
    return torch.allclose(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
