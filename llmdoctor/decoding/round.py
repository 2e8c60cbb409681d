"""One round of decoding as a value, and the tokens that are drawn from it: pure functions of tensors.

A round holds what the models say about the next J = K + 1 places of every row: K drafted tokens and what follows each.
The token at a place is drawn from the product of the models with that place's random key. As long as it is the
drafted one, the models have already read what comes before the next place, so the next token can be drawn too. The
first token that differs from its draft is still a proper draw; everything behind it has to be read again.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmdoctor.decoding.product import draw, kl_divergence, product
from llmdoctor.decoding.repetition import without
from llmdoctor.settings import Guidance, Sampling


@dataclass(frozen=True, eq=False, slots=True)
class Round:
    """K drafted tokens for each of B rows, and log-probs at the J = K + 1 places (the last one is behind all drafts).

    ``drafts_B_K`` are token ids, K may be 0; ``patient_B_J_V`` and, by name, ``doctors_B_J_V`` are natural log-probs.
    ``bases_B_J_V`` are those of each doctor's base, in mode "ratio". ``values_B_K`` is log V after every drafted token.
    """

    drafts_B_K: Tensor
    patient_B_J_V: Tensor
    doctors_B_J_V: Mapping[str, Tensor] = field(default_factory=dict)
    bases_B_J_V: Mapping[str, Tensor] = field(default_factory=dict)
    values_B_K: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """K, the number of drafted tokens."""
        return self.drafts_B_K.shape[1]

    def of_row(self, row: int, start: int = 0) -> "Round":
        """The round of one row, from place ``start`` on."""

        def part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor[row : row + 1, start:] for name, tensor in tensors.items()}

        return Round(
            self.drafts_B_K[row : row + 1, start:],
            self.patient_B_J_V[row : row + 1, start:],
            part(self.doctors_B_J_V),
            part(self.bases_B_J_V),
            part(self.values_B_K),
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """A possible token at a place, with its log-probs: the product's, the patient's and each doctor's.

    ``rank`` and ``patient_rank`` are those of `Alternative`; 0 where no alternatives were asked for.
    """

    id: int
    logprob: float
    patient_logprob: float
    doctor_logprobs: Mapping[str, float]
    rank: int = 0
    patient_rank: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """The token drawn at one place of a row, as plain numbers.

    ``drafted`` says that it is the drafted token, so that the next place can be drawn from the same round. ``values``
    is log V after it, empty where it is not drafted: the doctors have not read it yet. ``flip``, ``kl`` and
    ``patient_id`` and ``top`` are those of `GuidedToken`.
    """

    drawn: Choice
    drafted: bool
    values: Mapping[str, float]
    flip: bool
    kl: float
    patient_id: int
    top: tuple[Choice, ...] = ()


@torch.inference_mode()  # thirty small operations, each cheaper without autograd's bookkeeping
def draw_round(
    round_: Round,
    guidances: Sequence[Guidance],
    samplings: Sequence[Sampling],
    keys_B_J: Tensor,
    *,
    top: int = 0,
    forced: Sequence[int | None] = (),
    forbidden: Sequence[Sequence[Collection[int]]] = (),
    follow: bool = False,
) -> list[list[Place]]:
    """Draw the tokens of every row: its drafted tokens as far as they agree with the draw, and one further token.

    ``guidances`` and ``samplings`` hold one for each row. ``keys_B_J`` (int64) are all the randomness: the token of
    a place depends on its own key only, whatever was drafted. ``top`` asks for that many likeliest tokens.
    ``forced`` ids, one for each row or none at all, take the first place instead of a draw (None: draw). ``forbidden``
    ids, by row and place or none at all, are not drawn while there are others (`repetition.without`). With ``follow``
    the ``patient_id`` of a place is what the patient alone would draw there with its key, else its likeliest token.
    """
    product_B_J_V = products(round_, guidances)
    ids_B_J = _draws(product_B_J_V, samplings, keys_B_J, forbidden)
    if follow:
        patient_ids_B_J = _draws(round_.patient_B_J_V, samplings, keys_B_J, forbidden)
    else:
        patient_ids_B_J = round_.patient_B_J_V.argmax(dim=-1)
    for row, token in enumerate(forced):
        if token is not None:
            ids_B_J[row, 0] = token
    # everything is worked out on the device first, for all places: it costs less than a look at each token
    numbers = _Numbers.of(round_, product_B_J_V, ids_B_J, patient_ids_B_J)
    best = _tops(round_, product_B_J_V, top, ids_B_J) if top else None
    rows = []
    for row, ids in enumerate(numbers.ids):
        drafts = numbers.drafts[row]
        places = []
        for at, token in enumerate(ids):
            drafted = at < len(drafts) and drafts[at] == token
            places.append(
                Place(
                    Choice(
                        token,
                        numbers.product[row][at],
                        numbers.patient[row][at],
                        {name: column[row][at] for name, column in numbers.doctors.items()},
                    ),
                    drafted,
                    {name: column[row][at] for name, column in numbers.values.items()} if drafted else {},
                    bool(numbers.flip[row][at]),
                    numbers.kl[row][at],
                    numbers.patient_ids[row][at],
                    best[row][at] if best else (),
                )
            )
            if not drafted:
                break
        rows.append(places)
    return rows


def products(round_: Round, guidances: Sequence[Guidance]) -> Tensor:
    """The guided log-probs [B, J, V], every row under its own guidance."""
    first = guidances[0]
    if all(guidance is first or guidance == first for guidance in guidances):
        return product(round_.patient_B_J_V, round_.doctors_B_J_V, first, round_.bases_B_J_V)
    rows = [round_.of_row(i) for i in range(len(guidances))]
    return torch.cat(
        [
            product(row.patient_B_J_V, row.doctors_B_J_V, guidance, row.bases_B_J_V)
            for row, guidance in zip(rows, guidances, strict=True)
        ]
    )


def _draws(
    logprobs_B_J_V: Tensor,
    samplings: Sequence[Sampling],
    keys_B_J: Tensor,
    forbidden: Sequence[Sequence[Collection[int]]],
) -> Tensor:
    """Token ids [B, J]."""
    places, size = logprobs_B_J_V.shape[1:]
    flat_M_V = without(logprobs_B_J_V.reshape(-1, size), (tokens for row in forbidden for tokens in row))
    each = [sampling for sampling in samplings for _ in range(places)]
    return draw_rows(flat_M_V, each, keys_B_J.flatten()).view(-1, places)


def draw_rows(logprobs_B_V: Tensor, samplings: Sequence[Sampling], keys_B: Tensor) -> Tensor:
    """One token id per row [B], every row with its own sampling; rows that draw alike are drawn together."""
    first = samplings[0]
    groups: dict[tuple[float, ...], list[int]] = {}
    if not all(how is first for how in samplings):
        for row, how in enumerate(samplings):
            groups.setdefault((how.temperature, how.top_k, how.top_p, how.min_p), []).append(row)
    if len(groups) < 2:
        return draw(logprobs_B_V, first, keys_B)
    ids_B = torch.empty(len(logprobs_B_V), dtype=torch.long, device=logprobs_B_V.device)
    for rows in groups.values():
        ids_B[rows] = draw(logprobs_B_V[rows], samplings[rows[0]], keys_B[rows])
    return ids_B


@dataclass(frozen=True, slots=True)
class _Numbers:
    """Plain numbers of the drawn tokens: [row][place] lists, by doctor where they are many."""

    ids: list[list[int]]
    drafts: list[list[int]]
    patient_ids: list[list[int]]
    product: list[list[float]]
    patient: list[list[float]]
    kl: list[list[float]]
    flip: list[list[float]]
    doctors: dict[str, list[list[float]]]
    values: dict[str, list[list[float]]]

    @classmethod
    def of(cls, round_: Round, product_B_J_V: Tensor, ids_B_J: Tensor, patient_ids_B_J: Tensor) -> "_Numbers":
        picked_B_J_1 = ids_B_J[..., None]

        def of_drawn(logprobs_B_J_V: Tensor) -> Tensor:
            return logprobs_B_J_V.gather(2, picked_B_J_1)[..., 0]

        columns = [
            ids_B_J,
            torch.nn.functional.pad(round_.drafts_B_K, (0, 1), value=-1),
            of_drawn(product_B_J_V),
            of_drawn(round_.patient_B_J_V),
            kl_divergence(product_B_J_V, round_.patient_B_J_V),
            patient_ids_B_J,
            _flips(product_B_J_V, round_.patient_B_J_V),
            *map(of_drawn, round_.doctors_B_J_V.values()),
            *(torch.nn.functional.pad(values_B_K, (0, 1)) for values_B_K in round_.values_B_K.values()),
        ]
        # one transfer from the device instead of one for each column; ids up to 2^24 are exact in float32
        table = torch.stack([column.to(product_B_J_V.dtype) for column in columns]).tolist()
        ids, drafts, drawn, patient, kl, patient_ids, flip, *rest = table
        names = list(round_.doctors_B_J_V)
        return cls(
            ids=[[int(i) for i in row] for row in ids],
            drafts=[row[:-1] for row in drafts],
            patient_ids=[[int(i) for i in row] for row in patient_ids],
            product=drawn,
            patient=patient,
            kl=kl,
            flip=flip,
            doctors=dict(zip(names, rest, strict=False)),
            values=dict(zip(round_.values_B_K, rest[len(names) :], strict=True)),
        )


def _flips(product_B_J_V: Tensor, patient_B_J_V: Tensor) -> Tensor:
    """1 where the product's likeliest token is not the patient's [B, J]. Whatever ties is as likely: no flip."""
    best_B_J_1 = product_B_J_V.argmax(dim=-1, keepdim=True)
    return patient_B_J_V.gather(-1, best_B_J_1)[..., 0] < patient_B_J_V.amax(dim=-1)


def _tops(round_: Round, product_B_J_V: Tensor, top: int, ids_B_J: Tensor) -> list[list[tuple[Choice, ...]]]:
    """The alternatives at every place of every row: the product's likeliest, the patient's likeliest, and the drawn."""
    count = min(top, product_B_J_V.shape[-1])
    further = [round_.patient_B_J_V.argmax(dim=-1, keepdim=True), ids_B_J[..., None]]
    picked_B_J_K = torch.cat([product_B_J_V.topk(count, dim=-1).indices, *further], dim=-1)

    def of_picked(logprobs_B_J_V: Tensor) -> list[list[list[float]]]:
        found: list[list[list[float]]] = logprobs_B_J_V.gather(2, picked_B_J_K).tolist()
        return found

    ids, logprobs, patient = picked_B_J_K.tolist(), of_picked(product_B_J_V), of_picked(round_.patient_B_J_V)
    doctors = {name: of_picked(logprobs_B_J_V) for name, logprobs_B_J_V in round_.doctors_B_J_V.items()}
    ranks, patient_ranks = (_ranks(each, picked_B_J_K) for each in (product_B_J_V, round_.patient_B_J_V))

    def choice(b: int, p: int, k: int) -> Choice:
        own = {name: logprobs[b][p][k] for name, logprobs in doctors.items()}
        return Choice(ids[b][p][k], logprobs[b][p][k], patient[b][p][k], own, ranks[b][p][k], patient_ranks[b][p][k])

    def of_place(b: int, p: int) -> tuple[Choice, ...]:
        seen = ids[b][p]
        return tuple(choice(b, p, k) for k in range(len(seen)) if seen[k] not in seen[:k])

    return [[of_place(b, p) for p in range(len(ids[b]))] for b in range(len(ids))]


def _ranks(logprobs_B_J_V: Tensor, picked_B_J_K: Tensor) -> list[list[list[int]]]:
    """The places of the picked tokens in the whole vocabulary, from 1."""
    values_B_J_K = logprobs_B_J_V.gather(2, picked_B_J_K)
    # one token at a time: all at once would take K times the memory of the log-probs
    above = [
        (logprobs_B_J_V > value_B_J[..., None]).sum(dim=-1, dtype=torch.int32)
        for value_B_J in values_B_J_K.unbind(dim=-1)
    ]
    ranks: list[list[list[int]]] = (torch.stack(above, dim=-1) + 1).tolist()
    return ranks
