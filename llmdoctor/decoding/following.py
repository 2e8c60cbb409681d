"""Doctors that follow rows which another program decodes: what they say of its tokens, read as they come."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmdoctor.decoding.caches import KVCache, Read, close_holes, open_cache
from llmdoctor.errors import LoadError
from llmdoctor.models import Vocabulary, not_numbers
from llmdoctor.training.folder import LoadedDoctor

_LINGER = 16  # reads after which the cache of a row that nobody asks for is dropped
_LONGEST = 32  # new tokens that a row reads in a step with the others; more are read like a new prompt


class Ask(NamedTuple):
    """One row of a step: what the doctors say after each of its last ``last`` tokens is wanted.

    ``tail`` are its tokens from ``start`` on, at least ``last`` of them. Those before are the ones that the last ask of
    this ``key`` gave it; ``whole`` gives all of them where they must be read again.
    """

    key: Hashable
    start: int
    tail: Sequence[int]
    last: int
    whole: Callable[[], Sequence[int]]


@dataclass(eq=False)
class _Row:
    key: Hashable
    held: int  # slots that hold its tokens
    idle: int = 0


class Follower:
    """The doctors, and with ``with_bases`` their bases, each with its KV cache over the rows that are asked for.

    A step is one forward for each model, over all rows, whatever their length. Rows come, go and pause as they like; a
    row whose cache is gone, or does not fit, is read again. ``prompt_tokens`` bounds what is read in one forward of new
    rows, padding included, except for a single longer row.

    Raises LoadError for a model whose cache takes no further rows.
    """

    def __init__(
        self,
        doctors: Mapping[str, LoadedDoctor],
        vocabulary: Vocabulary,
        *,
        with_bases: bool = False,
        prompt_tokens: int = 8192,
    ) -> None:
        self._doctors, self._vocabulary, self._prompt_tokens = doctors, vocabulary, prompt_tokens
        self._models: list[PreTrainedModel] = []  # each once, however many doctors share it
        self._model_of = {name: self._number(doctor.model) for name, doctor in doctors.items()}
        self._base_of: dict[str, int] = {}
        if with_bases:
            for name, doctor in doctors.items():
                assert doctor.base is not None
                self._base_of[name] = self._number(doctor.base)
        embedded = [cast("Tensor", model.get_input_embeddings().weight).shape[0] for model in self._models]
        self._greatest = min(embedded) - 1
        self._device = self._models[0].device
        self._rows: list[_Row] = []  # in the order of the caches
        self._caches: list[KVCache] = []  # of each model
        self._mask_B_L = torch.ones(0, 0, dtype=torch.long, device=self._device)
        self._try()

    def _number(self, model: PreTrainedModel) -> int:
        """The place of a model among those that read."""
        for number, other in enumerate(self._models):
            if other is model:
                return number
        self._models.append(model)
        return len(self._models) - 1

    def __contains__(self, key: Hashable) -> bool:
        """Whether the tokens of this row are still held."""
        return any(row.key is key for row in self._rows)

    def forget(self, key: Hashable) -> None:
        """Drop a row with the next read; it need not be there."""
        for row in self._rows:
            if row.key is key:
                row.key, row.idle = None, _LINGER

    @torch.inference_mode()
    def read(self, asks: Sequence[Ask]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Log-probs [M, V] by doctor, and of each doctor's base; M are the places of all asks, one ask after another.

        Every key may be asked for once.
        """
        asked = {ask.key: ask for ask in asks}
        for row in self._rows:
            row.idle = 0 if row.key in asked else row.idle + 1
        staying = [i for i, row in enumerate(self._rows) if self._stays(row, asked.get(row.key))]
        self._keep(staying)
        reads: list[list[Read]] = []
        place: dict[Hashable, tuple[int, int]] = {}  # the read of every key, and its row there
        if known := [asked[row.key] for row in self._rows if row.key in asked]:
            place |= {row.key: (0, i) for i, row in enumerate(self._rows)}
            reads.append(self._step(asked, max(ask.last for ask in known)))
        fresh = [(ask, ask.whole()) for ask in asks if ask.key not in place]
        for group in self._groups(fresh):
            place |= {ask.key: (len(reads), i) for i, (ask, _) in enumerate(group)}
            reads.append(self._begin(group))
        return self._said(reads, [(*place[ask.key], ask.last) for ask in asks])

    def _stays(self, row: _Row, ask: Ask | None) -> bool:
        """Whether the row can go on from what its caches hold."""
        ragged = all(cache.can_have_holes for cache in self._caches)
        if ask is None:
            return ragged and row.idle <= _LINGER
        if not ragged:  # its slots can hold nothing but one token after another
            return row.held == ask.start and len(ask.tail) == 1
        return row.held >= ask.start and len(ask.tail) <= max(_LONGEST, ask.last)

    def _keep(self, staying: Sequence[int]) -> None:
        if len(staying) == len(self._rows):
            return
        self._rows = [self._rows[i] for i in staying]
        rows_B = torch.tensor(staying, dtype=torch.long, device=self._device)
        self._mask_B_L = self._mask_B_L[rows_B]
        for cache in self._caches if staying else ():
            cache.keep(rows_B)

    def _step(self, asked: Mapping[Hashable, Ask], last: int) -> list[Read]:
        """Read the new tokens of all rows that are held, those of the rows that pause being none."""
        new = [asked[row.key].tail if row.key in asked else () for row in self._rows]
        kept = [asked[row.key].start if row.key in asked else row.held for row in self._rows]
        if any(count < row.held for count, row in zip(kept, self._rows, strict=True)):
            # what was taken back stays as an empty slot
            self._mask_B_L = self._mask_B_L * (self._mask_B_L.cumsum(dim=1) <= self._column(kept))
        self._mask_B_L = close_holes(self._caches, self._mask_B_L, max(1, *kept))
        width = max(map(len, new))
        ids_B_T = self._ids(new, width)
        lengths = list(map(len, new))
        for row, count, added in zip(self._rows, kept, lengths, strict=True):
            row.held = count + added
        fresh_B_T = torch.arange(width, device=self._device) >= width - self._column(lengths)
        self._mask_B_L = torch.cat([self._mask_B_L, fresh_B_T.long()], dim=1)
        # without holes and padding no mask is needed, and without one attention is faster
        full = all(row.held == self._mask_B_L.shape[1] for row in self._rows)
        mask_B_L = None if full else self._mask_B_L
        return [cache.feed(ids_B_T, mask_B_L, last) for cache in self._caches]

    def _begin(self, group: Sequence[tuple[Ask, Sequence[int]]]) -> list[Read]:
        """Read rows from their first token on, and add them to the others."""
        lengths = [len(ids) for _, ids in group]
        width = max(lengths)
        ids_B_L = self._ids([ids for _, ids in group], width)
        mask_B_L = (torch.arange(width, device=self._device) >= width - self._column(lengths)).long()
        last = max(ask.last for ask, _ in group)
        caches = [open_cache(model) for model in self._models]
        reads = [cache.feed(ids_B_L, None if min(lengths) == width else mask_B_L, last) for cache in caches]
        if self._rows:
            slots = max(width, self._mask_B_L.shape[1])
            padded = [torch.nn.functional.pad(one, (slots - one.shape[1], 0)) for one in (self._mask_B_L, mask_B_L)]
            self._mask_B_L = torch.cat(padded)
            for cache, other in zip(self._caches, caches, strict=True):
                cache.join(other)
        else:
            self._caches, self._mask_B_L = caches, mask_B_L
        self._rows += [_Row(ask.key, len(ids)) for ask, ids in group]
        return reads

    def _groups(self, fresh: Sequence[tuple[Ask, Sequence[int]]]) -> Iterator[Sequence[tuple[Ask, Sequence[int]]]]:
        """The new rows, the shortest first, in groups that one forward reads."""
        group: list[tuple[Ask, Sequence[int]]] = []
        for one in sorted(fresh, key=lambda pair: len(pair[1])):
            if group and (len(group) + 1) * len(one[1]) > self._prompt_tokens:
                yield group
                group = []
            group.append(one)
        if group:
            yield group

    def _said(
        self, reads: Sequence[Sequence[Read]], places: Sequence[tuple[int, int, int]]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Log-probs at the last places of every ask: the number of its read, its row there, and how many places."""
        shapes = [read[0].logits_B_K_V.shape[:2] for read in reads]
        starts = [0, *accumulate(rows * each for rows, each in shapes)]
        picked = [
            starts[read] + (row + 1) * shapes[read][1] - last + k for read, row, last in places for k in range(last)
        ]
        index_M = None if picked == list(range(starts[-1])) else torch.tensor(picked, device=self._device)

        def of(model: int) -> Read:
            parts = [tuple(part.flatten(0, 1) for part in read[model]) for read in reads]
            whole = parts[0] if len(parts) == 1 else tuple(torch.cat(part) for part in zip(*parts, strict=True))
            return Read(*(whole if index_M is None else (part[index_M] for part in whole)))

        def log_probs(logits: Tensor) -> Tensor:
            return self._vocabulary.mask(logits.to(self._device)).log_softmax(dim=-1)

        said = [of(model) for model in range(len(self._models))]
        doctors = {name: log_probs(one.logits(*said[self._model_of[name]])) for name, one in self._doctors.items()}
        plain = {model: log_probs(said[model].logits_B_K_V) for model in set(self._base_of.values())}
        return doctors, {name: plain[model] for name, model in self._base_of.items()}

    def _ids(self, rows: Sequence[Sequence[int]], width: int) -> Tensor:
        """Token ids [B, width], padded on the left."""
        ids_B_T = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows], device=self._device)
        # An embedding may have fewer rows than the patient's. The tokenizer has none of the ids beyond, but a client
        # may send them as a prompt, and no answer of others may end because of that.
        return ids_B_T.clamp(0, self._greatest)

    def _column(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, device=self._device)[:, None]

    def _try(self) -> None:
        """Read two tokens with every model. Raises LoadError."""
        key = object()
        doctors, bases = self.read([Ask(key, 0, [0, 0], 1, lambda: [0, 0])])
        for cache in self._caches:
            if not cache.can_join:
                raise LoadError(
                    f"the KV cache of {type(cache.model).__name__} takes no further rows, so it cannot follow a batch: "
                    "take a doctor of another architecture"
                )
        for name, said in (*doctors.items(), *bases.items()):
            if bool(said.isnan().any()):
                raise LoadError(not_numbers(f"the log-probs of the doctor {name}"))
        self.forget(key)
