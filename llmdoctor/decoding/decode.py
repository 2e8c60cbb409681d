"""Stage 3: guided decoding. Patient and doctors run side by side on their own KV caches.

The loop works in rounds. A doctor drafts some tokens (speculative.py); the patient and the other doctors read the whole
draft in one forward each; the log-probs are combined (guidance.py) and the tokens drawn, as far as they agree with the
draft and one further; what was drafted beyond is taken back (caches.py). A draft of nothing is the reference path: one
forward of every model a token.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from llmdoctor.decoding.caches import CachedModel, PrefixCache
from llmdoctor.decoding.drafting import Drafting
from llmdoctor.decoding.product import check_guidance, check_sampling, draw, kl_divergence, product
from llmdoctor.errors import LLMDoctorWarning, LoadError, UsageError
from llmdoctor.models import Patient, not_numbers
from llmdoctor.records import Alternative, GuidedToken
from llmdoctor.settings import Guidance, Sampling
from llmdoctor.text import TextStream, token_texts
from llmdoctor.training.folder import LoadedDoctor

Finish = Literal["eos", "stop", "length"]
_HOLES = 8  # so many, and an eighth of the rest, may stay
Read = Callable[[], Guidance]


class Step(NamedTuple):
    """One token of one row of the batch; ``finish`` says why the row ends with it, None when it goes on."""

    row: int
    token: GuidedToken
    finish: Finish | None


def decode(
    patient: Patient,
    doctors: Mapping[str, LoadedDoctor],
    prompts: Sequence[Sequence[int]],
    guidance: Read | Sequence[Read],
    sampling: Sampling,
    *,
    seed: int | Sequence[int],
    top: int = 0,
    drafting: Drafting | None = None,
    prefix_cache: PrefixCache | None = None,
    first: int | None = None,
) -> Iterator[Step]:
    """Decode all ``prompts`` (token ids) together and yield their tokens as they are drawn, row after row.

    ``guidance``, one function or one for every row, is read anew for every token. Row i draws from a generator of its
    own, seeded with ``seed`` + i or ``seed[i]``, so a prompt's answer does not depend on its neighbours.

    ``drafting`` lets a doctor draft ahead; without it every token costs one forward of every model. Both ways draw the
    same tokens from the same seed, up to the rounding of the models' own arithmetic. Where it cannot be done (a cache
    that cannot take tokens back; a batch over a sliding window) it is not done; the first is told by a warning.
    ``prefix_cache`` keeps the caches of a single prompt for the next one. ``first`` is said first instead of a draw.

    Raises UsageError for settings out of range and for a prompt that fills the context.
    """
    reads = [guidance] * len(prompts) if callable(guidance) else list(guidance)
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if not len(reads) == len(seeds) == len(prompts):
        raise UsageError(f"expected one guidance and one seed for each of {len(prompts)} prompts")
    if prefix_cache is not None and len(prompts) != 1:
        raise UsageError(f"a prefix cache holds one conversation; got {len(prompts)} prompts")
    check_sampling(sampling)
    for read in dict.fromkeys(reads):
        check_guidance(read(), tuple(doctors))
    _check_lengths(patient, doctors, prompts)
    return _run(patient, doctors, prompts, reads, sampling, seeds, top, drafting, prefix_cache or PrefixCache(), first)


def _check_lengths(patient: Patient, doctors: Mapping[str, LoadedDoctor], prompts: Sequence[Sequence[int]]) -> None:
    for prompt in prompts:
        if not prompt:
            raise UsageError("the prompt is empty: it has no token to continue from")
        if len(prompt) >= (room := _context(patient, doctors)):
            raise UsageError(
                f"the prompt is {len(prompt)} tokens long and the models' context holds {room}: shorten it, or reset "
                "the conversation"
            )


def _context(patient: Patient, doctors: Mapping[str, LoadedDoctor]) -> int:
    own = [getattr(d.model.config.get_text_config(), "max_position_embeddings", None) for d in doctors.values()]
    return min([patient.context, *(int(length) for length in own if length)])


@dataclass(slots=True)
class _Row:
    """Where one prompt's answer stands."""

    index: int
    read: Read
    texts: TextStream
    generator: torch.Generator
    budget: int
    last: int  # the token before the next one
    held: list[GuidedToken] = field(default_factory=list)  # their text may be the beginning of a stop string
    uniforms: list[float] = field(default_factory=list)  # of the next positions, drawn ahead
    position: int = 0
    ended: Finish | None = None

    def ahead(self, count: int) -> list[float]:
        """The uniforms of the next ``count`` positions."""
        while len(self.uniforms) < count:
            self.uniforms.append(torch.rand((), generator=self.generator, dtype=torch.float64).item())
        return self.uniforms[:count]


@dataclass(slots=True)
class _Drawn:
    """The tokens drawn for one row from place ``start`` of the round on: those before ``stop`` agree with the draft."""

    guidance: Guidance
    start: int
    stop: int
    facts: dict[str, list[Any]]


def _run(
    patient: Patient,
    doctors: Mapping[str, LoadedDoctor],
    prompts: Sequence[Sequence[int]],
    reads: Sequence[Read],
    sampling: Sampling,
    seeds: Sequence[int],
    top: int,
    drafting: Drafting | None,
    prefix_cache: PrefixCache,
    first: int | None,
) -> Iterator[Step]:
    names = tuple(doctors)
    models = _Models(
        patient, doctors, prompts, sampling, top, prefix_cache, any(read().mode == "ratio" for read in reads)
    )
    context = _context(patient, doctors)
    rows = [
        _Row(
            i,
            read,
            TextStream(patient.tokenizer),
            torch.Generator().manual_seed(seed),
            min(sampling.max_new_tokens, context - len(prompt)),
            prompt[-1],
        )
        for i, (prompt, read, seed) in enumerate(zip(prompts, reads, seeds, strict=True))
    ]
    checked: Guidance | None = None

    def now(row: _Row) -> Guidance:
        nonlocal checked
        guidance = row.read()
        if guidance is not checked:
            check_guidance(guidance, names)
            if guidance.mode == "ratio" and len(models.base_of) < len(doctors):
                raise UsageError(
                    'the mode cannot become "ratio" in the middle of an answer: set it before the answer begins'
                )
            checked = guidance
        return guidance

    def tell(row: _Row, drawn: _Drawn, place: int) -> Iterator[Step]:
        token = _token(patient, row, drawn, place, names, top)
        row.position += 1
        row.last = token.id
        del row.uniforms[0]
        if len(prompts) == 1:
            prefix_cache.ids.append(token.id)
        if token.id in patient.eos_ids:
            row.ended = "eos"
        elif row.position >= row.budget:
            row.ended = "length"
        for piece, finish in _release(row, token, sampling.stop, row.ended):
            row.ended = finish or row.ended
            yield Step(row.index, piece, finish)

    while rows:
        once = {read: now(row) for read, row in {row.read: row for row in rows}.items()}
        guidances = [once[row.read] for row in rows]
        length, drafts = 0, drafting if models.can_draft and first is None else None
        if drafts is not None:
            # as far as any row may go: a row whose budget ends within the draft ends there
            room = min(context - len(prompts[row.index]) - row.position for row in rows)
            room = min(room, max(row.budget - row.position for row in rows))
            length = min(drafts.choose(len(rows)), room - 1) if room > 1 else 0
        began = time.perf_counter()
        uniforms = [row.ahead(length + 1) for row in rows]
        models.propose(length, guidances, uniforms)
        round_ = models.settle(guidances, uniforms, forced=first)
        first = None
        seconds = time.perf_counter() - began
        accepted = [drawn.stop for drawn in round_]
        for i, row in enumerate(rows):
            place = 0
            while not row.ended:
                if place:  # the guidance may have changed since the last token was shown
                    guidance = now(row)
                    if guidance is not round_[i].guidance and guidance != round_[i].guidance:
                        (round_[i],) = models.settle([guidance], [row.ahead(length + 1 - place)], i, place)
                if place == round_[i].stop:
                    break
                yield from tell(row, round_[i], place)
                place += 1
        staying = [i for i, row in enumerate(rows) if not row.ended]
        count, tested = len(rows), sum(min(stop + 1, length) for stop in accepted)
        rows, round_ = [rows[i] for i in staying], [round_[i] for i in staying]
        if rows:
            began = time.perf_counter()
            values = models.conclude(
                staying, [d.stop for d in round_], [d.facts["id"][d.stop - d.start] for d in round_]
            )
            seconds += time.perf_counter() - began
            for i, (row, drawn) in enumerate(zip(rows, round_, strict=True)):
                for name, column in values.items():
                    drawn.facts[f"value {name}"][drawn.stop - drawn.start] = column[i]
                yield from tell(row, drawn, drawn.stop)
            staying = [i for i, row in enumerate(rows) if not row.ended]
            rows = [rows[i] for i in staying]
            if rows:
                models.keep(staying)
        if drafts is not None:
            drafts.record(count, length, sum(accepted), tested, seconds)


class _Models:
    """The patient, the doctors and (mode "ratio") the doctors' bases, over one batch.

    Between two rounds the doctors stand behind the last token, the patient and the bases before ``pending``, what they
    have still to read. All caches give every token the same slot, so one mask serves them all.
    """

    def __init__(
        self,
        patient: Patient,
        doctors: Mapping[str, LoadedDoctor],
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        top: int,
        prefix_cache: PrefixCache,
        with_bases: bool,
    ) -> None:
        self.doctors, self.sampling, self.top = doctors, sampling, top
        self.vocabulary = patient.vocabulary
        self.size = patient.vocabulary.size
        self.eos_ids = patient.eos_ids
        self.device = patient.model.device
        shared = prefix_cache.shared(list(prompts[0]))
        before, prefix_cache.models = (
            prefix_cache.models,
            {},
        )  # whoever is not of this answer does not know what it will say

        def cached(role: str, model: Any, keeps_hidden: bool = False) -> CachedModel:
            held = before.get(role)
            if held is None or held.model is not model:
                held = CachedModel(model, keeps_hidden=keeps_hidden, rolls_back=True)
            prefix_cache.models[role] = held
            held.rewind(min(shared, held.length))
            return held

        self.patient = cached("patient", patient.model)
        self.cached = {name: cached(f"doctor {name}", d.model, keeps_hidden=True) for name, d in doctors.items()}
        self.bases: dict[str, CachedModel] = {}  # one that several doctors share is read once
        self.base_of: dict[str, str] = {}
        if with_bases:
            for name, doctor in doctors.items():
                if doctor.base is None:
                    raise UsageError(f'mode "ratio" needs the base model of doctor {name!r}: load it with mode="ratio"')
                self.base_of[name] = next((n for n, base in self.bases.items() if base.model is doctor.base), name)
                if self.base_of[name] == name:
                    self.bases[name] = cached(f"base {name}", doctor.base)
        longest = max(map(len, prompts))
        ids_B_L = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        lengths_B = torch.tensor([len(p) for p in prompts], device=self.device)
        self.mask_B_L: Tensor | None = None  # None while every slot of every row holds a token
        if int(lengths_B.min()) < longest:
            self.mask_B_L = (torch.arange(longest, device=self.device) >= longest - lengths_B[:, None]).long()
        self.filled = [len(prompt) for prompt in prompts]  # slots of each row that hold a token
        self.pending_B_T = ids_B_L[:, self.patient.length :]
        prefix_cache.prefilled = self.pending_B_T.shape[1]
        prefix_cache.ids[:] = prompts[0]
        self._told = False
        self.next_logps: dict[str, Tensor] = {}
        with torch.inference_mode():
            for base in self.bases.values():  # beside the patient, whatever it has missed
                base.rewind(min(base.length, self.patient.length))
                if base.length < self.patient.length:
                    base.feed(ids_B_L[:, base.length : self.patient.length])
            self._feed_last(ids_B_L, whole=True)

    @property
    def can_draft(self) -> bool:
        """Whether a draft can be taken back, from the caches of this batch. Tells, once, if never."""
        if not self.cached or self.patient.cache is None:  # the first round fills the patient's cache
            return False
        everyone = [self.patient, *self.cached.values(), *self.bases.values()]
        if stuck := [model for model in everyone if not model.can_roll_back]:
            if not self._told:
                name = type(stuck[0].model).__name__
                warnings.warn(
                    f"the state of {name} cannot take tokens back: decoding without speculation",
                    LLMDoctorWarning,
                    stacklevel=2,
                )
                self._told = True
            return False
        return len(self.pending_B_T) == 1 or all(model.may_have_holes for model in everyone)

    @torch.inference_mode()
    def propose(self, length: int, guidances: Sequence[Guidance], uniforms: Sequence[Sequence[float]]) -> None:
        """Draft ``length`` tokens with one doctor, and let everyone read them."""
        rows = len(self.pending_B_T)
        mask_B_L = self.mask_B_L
        if mask_B_L is not None and length:
            mask_B_L = torch.cat([mask_B_L, mask_B_L.new_ones(rows, length)], dim=1)
        self.values_B_K: dict[str, Tensor] = {}
        ids_B_T = self.pending_B_T
        self.doctor_logps = self.next_logps
        if length:
            drafter = max(self.cached, key=lambda name: sum(g.betas.get(name, 0.0) for g in guidances))
            self.drafts_B_K, logps_B_K_V, self.values_B_K[drafter] = self._draft(
                drafter, length, guidances, uniforms, mask_B_L
            )
            self.doctor_logps = {drafter: torch.cat([self.next_logps[drafter], logps_B_K_V], dim=1)}
            for name, model in self.cached.items():
                if name != drafter:
                    read = self._read(model, self.drafts_B_K, mask_B_L, length)
                    self.doctor_logps[name] = torch.cat([self.next_logps[name], read], dim=1)
                    self.values_B_K[name] = self._value(name)
            ids_B_T = torch.cat([self.pending_B_T, self.drafts_B_K], dim=1)
        self.length = length
        self.patient_logp = self._read(self.patient, ids_B_T, mask_B_L, length + 1)
        self.base_logps = {name: self._read(base, ids_B_T, mask_B_L, length + 1) for name, base in self.bases.items()}

    def _draft(
        self,
        drafter: str,
        length: int,
        guidances: Sequence[Guidance],
        uniforms: Sequence[Sequence[float]],
        mask_B_L: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [B, K], and the doctor's log-probs [B, K, V] and log V [B, K] after each of them."""
        model, logits_B_V = self.cached[drafter], self.next_logps[drafter][:, 0]
        powers = [g.alpha + g.betas.get(drafter, 0.0) for g in guidances]
        power: Any = powers[0]
        if any(other != power for other in powers):
            power = logits_B_V.new_tensor(powers)[:, None]
        uniforms_B_K = torch.tensor(uniforms, dtype=torch.float64)
        drafts: list[Tensor] = []
        logits: list[Tensor] = []
        hidden: list[Tensor] = []
        slots = 0 if mask_B_L is None else mask_B_L.shape[1] - length
        for k in range(length):
            ids_B_1 = draw(power * logits_B_V, self.sampling, uniforms_B_K[:, k])[:, None]
            read_B_1_V = model.feed(ids_B_1, None if mask_B_L is None else mask_B_L[:, : slots + k + 1])
            drafts.append(ids_B_1)
            logits.append(read_B_1_V)
            assert model.hidden_B_K_H is not None
            hidden.append(model.hidden_B_K_H)
            logits_B_V = read_B_1_V[:, 0, : self.size].to(
                logits_B_V
            )  # good enough for a guess; the rest is done at once
        logps_B_K_V = self.vocabulary.mask(torch.cat(logits, dim=1).to(self.device)).log_softmax(dim=-1)
        return torch.cat(drafts, dim=1), logps_B_K_V, self._value(drafter, torch.cat(hidden, dim=1))

    @torch.inference_mode()
    def settle(
        self,
        guidances: Sequence[Guidance],
        uniforms: Sequence[Sequence[float]],
        row: int | None = None,
        start: int = 0,
        forced: int | None = None,
    ) -> list[_Drawn]:
        """Draw the tokens of all rows, or of one from place ``start`` of the round on, with everything told of them.

        ``forced`` is said instead of a draw.
        """
        rows = slice(None) if row is None else slice(row, row + 1)
        patient_B_K_V = self.patient_logp[rows, start:]
        doctors = {name: logp[rows, start:] for name, logp in self.doctor_logps.items()}
        bases = {name: self.base_logps[base][rows, start:] for name, base in self.base_of.items()}
        product_B_K_V = _products(patient_B_K_V, doctors, guidances, bases)
        b, k, v = product_B_K_V.shape
        flat = torch.tensor(uniforms, dtype=torch.float64).flatten()
        ids_B_K = draw(product_B_K_V.reshape(b * k, v), self.sampling, flat).view(b, k)
        if forced is not None:
            ids_B_K = torch.full_like(ids_B_K, forced)
        picked = ids_B_K[..., None]
        columns = {
            "id": ids_B_K,
            "patient": patient_B_K_V.gather(2, picked)[..., 0],
            "product": product_B_K_V.gather(2, picked)[..., 0],
            "kl": kl_divergence(product_B_K_V, patient_B_K_V),
            "argmax": patient_B_K_V.argmax(dim=-1),
        }
        for name, logp_B_K_V in doctors.items():
            columns[f"doctor {name}"] = logp_B_K_V.gather(2, picked)[..., 0]
        if self.length:
            columns["draft"] = torch.nn.functional.pad(self.drafts_B_K[rows, start:], (0, 1), value=-1)
        for name in self.doctors:  # of the last token it is not known yet
            told = self.values_B_K[name][rows, start:] if self.length else ids_B_K[:, :0]
            columns[f"value {name}"] = torch.nn.functional.pad(told, (0, 1))
        # one transfer; ids up to 2^24 are exact in float32
        table = torch.stack([column.to(product_B_K_V.dtype) for column in columns.values()]).transpose(0, 1).tolist()
        best: list[dict[str, list[Any]]] = [{} for _ in range(b)]
        if self.top:
            highest = product_B_K_V.topk(min(self.top, v), dim=-1)
            told_B = {
                "top ids": highest.indices,
                "top product": highest.values,
                "top patient": patient_B_K_V.gather(2, highest.indices),
                **{f"top doctor {name}": logp.gather(2, highest.indices) for name, logp in doctors.items()},
            }
            lists = {key: tensor.tolist() for key, tensor in told_B.items()}
            best = [{key: column[i] for key, column in lists.items()} for i in range(b)]
        result = []
        for guidance, own, alternatives in zip(guidances, table, best, strict=True):
            facts = dict(zip(columns, own, strict=True))
            ids = facts["id"] = list(map(int, facts["id"]))
            drafted = facts.get("draft", ())
            agree = next((at for at, draft in enumerate(drafted) if ids[at] != draft), 0)
            for name, doctor in self.doctors.items():
                if doctor.anchored:  # log V(s_T) = 0 is part of such a doctor, not something its head has learnt
                    values = facts[f"value {name}"]
                    facts[f"value {name}"] = [0.0 if i in self.eos_ids else x for i, x in zip(ids, values, strict=True)]
            result.append(_Drawn(guidance, start, start + agree, facts | alternatives))
        return result

    @torch.inference_mode()
    def conclude(self, staying: Sequence[int], accepted: Sequence[int], last: Sequence[int]) -> dict[str, list[float]]:
        """Drop the rows that have ended, take back what was rejected, feed the last tokens: log V after them [B]."""
        self.keep(staying)
        rejected = [self.length - count for count in accepted]
        common = min(rejected)
        for model in (self.patient, *self.cached.values(), *self.bases.values()):
            model.take_back(common)
        slots = self.length - common
        if self.mask_B_L is not None or max(rejected) > common:
            mask_B_L = self.mask_B_L
            if mask_B_L is None:
                mask_B_L = torch.ones(len(last), self.patient.length - slots, dtype=torch.long, device=self.device)
            holds = [[int(slot < count) for slot in range(slots)] + [1] for count in accepted]
            self.mask_B_L = torch.cat([mask_B_L, mask_B_L.new_tensor(holds)], dim=1)
        self.filled = [filled + count for filled, count in zip(self.filled, accepted, strict=True)]
        self._pack(max(self.filled))
        self.filled = [filled + 1 for filled in self.filled]
        self.pending_B_T = torch.tensor(last, device=self.device)[:, None]
        self._feed_last(self.pending_B_T)
        values = {name: self._value(name)[:, 0].tolist() for name in self.doctors}
        for name, doctor in self.doctors.items():
            if doctor.anchored:
                values[name] = [0.0 if i in self.eos_ids else x for i, x in zip(last, values[name], strict=True)]
        return values

    @torch.inference_mode()
    def keep(self, staying: Sequence[int]) -> None:
        """Drop the rows that have ended."""
        if len(staying) == len(self.pending_B_T):
            return
        rows = torch.tensor(staying, device=self.device)
        for model in (self.patient, *self.cached.values(), *self.bases.values()):
            model.keep(rows)
        self.filled = [self.filled[i] for i in staying]
        self.pending_B_T = self.pending_B_T[rows]
        self.mask_B_L = None if self.mask_B_L is None else self.mask_B_L[rows]
        self.next_logps = {name: logp[rows] for name, logp in self.next_logps.items()}

    def _pack(self, needed: int) -> None:
        """Close the holes of the caches when they have become many: every step reads them, and copies them."""
        everyone = [self.patient, *self.cached.values(), *self.bases.values()]
        if self.patient.length - needed <= max(_HOLES, needed // 8) or not all(m.can_pack for m in everyone):
            return
        assert self.mask_B_L is not None
        held_B_L, last_B_1 = self.mask_B_L[:, :-1], self.mask_B_L[:, -1:]
        kept_B_L = held_B_L.argsort(dim=1, stable=True)[:, -needed:]
        self.mask_B_L = torch.cat([held_B_L.gather(1, kept_B_L), last_B_1], dim=1)
        for model in everyone:
            model.pack(kept_B_L)

    def _feed_last(self, ids_B_L: Tensor, *, whole: bool = False) -> None:
        """Bring the doctors behind the last of these tokens: log-probs of its successor [B, 1, V].

        Of a whole prompt each reads what its cache does not hold yet.
        """

        def read(model: CachedModel) -> Tensor:
            return self._read(model, ids_B_L[:, model.length :] if whole else ids_B_L, self.mask_B_L, 1)

        self.next_logps = {name: read(model) for name, model in self.cached.items()}

    def _read(self, model: CachedModel, ids_B_T: Tensor, mask_B_L: Tensor | None, last: int) -> Tensor:
        logits_B_K_V = model.feed(ids_B_T, mask_B_L, last)
        return self.vocabulary.mask(logits_B_K_V.to(self.device)).log_softmax(dim=-1)

    def _value(self, name: str, hidden_B_K_H: Tensor | None = None) -> Tensor:
        """Log V [B, K] from what the doctor's LM head read, at the latest feed if not given."""
        hidden_B_K_H = self.cached[name].hidden_B_K_H if hidden_B_K_H is None else hidden_B_K_H
        assert hidden_B_K_H is not None
        return self.doctors[name].log_value(hidden_B_K_H).to(self.device)


def _products(
    patient_B_K_V: Tensor, doctors: Mapping[str, Tensor], guidances: Sequence[Guidance], bases: Mapping[str, Tensor]
) -> Tensor:
    """The guided log-probs [B, K, V], every row under its own guidance."""
    first = guidances[0]
    if all(guidance is first or guidance == first for guidance in guidances):
        return product(patient_B_K_V, doctors, first, bases)
    rows = [
        product(patient_B_K_V[i], {n: x[i] for n, x in doctors.items()}, guidance, {n: x[i] for n, x in bases.items()})
        for i, guidance in enumerate(guidances)
    ]
    return torch.stack(rows)


def _token(patient: Patient, row: _Row, drawn: _Drawn, place: int, names: Sequence[str], top: int) -> GuidedToken:
    at, facts, guidance = place - drawn.start, drawn.facts, drawn.guidance
    token_id = facts["id"][at]
    if math.isnan(facts["product"][at]):
        raise LoadError(not_numbers("the models' log-probs"))
    alternatives: list[Alternative] = []
    if top:
        alternatives = [
            Alternative(
                id=other,
                # after a token: some pieces begin with a space
                text=token_texts(patient.tokenizer, [row.last, other])[1],
                patient_logprob=facts["top patient"][at][k],
                doctor_logprobs={name: facts[f"top doctor {name}"][at][k] for name in names},
                logprob=facts["top product"][at][k],
            )
            for k, other in enumerate(facts["top ids"][at])
        ]
    return GuidedToken(
        position=row.position,
        id=token_id,
        text=row.texts.push(token_id),
        patient_logprob=facts["patient"][at],
        doctor_logprobs={name: facts[f"doctor {name}"][at] for name in names},
        logprob=facts["product"][at],
        values={name: facts[f"value {name}"][at] for name in names},
        flip=facts["argmax"][at] != token_id,
        kl=facts["kl"][at],
        alpha=guidance.alpha,
        betas=dict(guidance.betas),
        top=tuple(alternatives),
    )


def _release(
    row: _Row, token: GuidedToken, stops: Sequence[str], ended: Finish | None
) -> list[tuple[GuidedToken, Finish | None]]:
    """The tokens that may be shown now: all of them, unless their text may be the beginning of a stop string.

    A stop string ends the row and is cut from the text of the tokens that hold it.
    """
    row.held.append(token)
    text = "".join(held.text for held in row.held)
    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
    if cut is not None:
        released: list[tuple[GuidedToken, Finish | None]] = []
        for held in row.held:
            kept = held.text[: max(0, cut)]
            cut -= len(held.text)
            released.append((replace(held, text=kept), None))
        released[-1] = (released[-1][0], "stop")
        row.held.clear()
        return released
    if ended is None and any(text.endswith(stop[:n]) for stop in stops for n in range(1, len(stop))):
        return []
    released = [(held, None) for held in row.held]
    released[-1] = (token, ended)
    row.held.clear()
    return released
