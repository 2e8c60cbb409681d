"""Stage 3: guided decoding. Patient and doctors run side by side on their own KV caches, one token at a time.

The loop for every token: combine the log-probs (guidance.py), draw, feed the token to the doctors (which gives log V
after it), hand it out, feed it to the patient.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmdoctor.doctor import LoadedDoctor
from llmdoctor.errors import LoadError, UsageError
from llmdoctor.faces import TextStream, token_texts
from llmdoctor.guidance import check_guidance, check_sampling, draw, kl_divergence, log_probs, product
from llmdoctor.models import Patient, not_numbers
from llmdoctor.types import Alternative, Guidance, GuidedToken, Sampling

Finish = Literal["eos", "stop", "length"]


class Step(NamedTuple):
    """One token of one row of the batch; ``finish`` says why the row ends with it, None when it goes on."""

    row: int
    token: GuidedToken
    finish: Finish | None


class CachedModel:
    """A causal LM and its KV cache over a left-padded batch; ``feed`` gives the logits after the last token fed."""

    def __init__(self, model: PreTrainedModel, *, keeps_hidden: bool = False) -> None:
        self.model, self.keeps_hidden = model, keeps_hidden
        self.cache: Any = None  # of the kind that the model itself makes
        self.hidden_B_H: Tensor | None = None  # what the LM head read last
        accepted = inspect.signature(model.forward).parameters
        self._takes = {name for name in ("position_ids", "logits_to_keep") if name in accepted}

    def feed(self, ids_B_T: Tensor, mask_B_L: Tensor | None) -> Tensor:
        """Extend the cache by ``ids_B_T`` and return logits [B, V]. ``mask_B_L`` covers cache and new ids."""
        extra: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}
        if mask_B_L is not None:
            extra["attention_mask"] = mask_B_L
            if "position_ids" in self._takes:
                extra["position_ids"] = (mask_B_L.cumsum(dim=1) - 1).clamp(min=0)[:, -ids_B_T.shape[1] :]
        ids = ids_B_T.to(self.model.device)
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(self._keep_hidden) if self.keeps_hidden else None
        try:
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **extra)
        finally:
            if hook:
                hook.remove()
        self.cache = out.past_key_values
        return out.logits[:, -1]  # type: ignore[no-any-return]

    def keep(self, rows: Tensor) -> None:
        """Drop all rows of the batch but these."""
        self.cache.batch_select_indices(rows.to(self.model.device))

    def _keep_hidden(self, _module: Any, args: tuple[Tensor, ...]) -> None:
        self.hidden_B_H = args[0][:, -1]


def decode(
    patient: Patient,
    doctors: Mapping[str, LoadedDoctor],
    prompts: Sequence[Sequence[int]],
    guidance: Callable[[], Guidance],
    sampling: Sampling,
    *,
    seed: int,
    top: int = 0,
    first: int | None = None,
) -> Iterator[Step]:
    """Decode all ``prompts`` (token ids) together and yield their tokens as they are drawn, row after row.

    ``guidance`` is read anew for every token. Row i draws from a generator of its own, seeded with ``seed`` + i, so a
    prompt's answer does not depend on its neighbours. ``first`` is said first instead of a
    draw. The reference path: one forward of the patient and one of every
    doctor a token. Raises UsageError for settings out of range and for a prompt that fills the context.
    """
    check_sampling(sampling)
    check_guidance(guidance(), tuple(doctors))
    _check_lengths(patient, doctors, prompts)
    return _run(patient, doctors, prompts, guidance, sampling, seed, top, first)


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
    texts: TextStream
    uniforms: torch.Generator
    budget: int
    held: list[GuidedToken]  # tokens whose text may be the beginning of a stop string
    last: int  # the token before the next one
    position: int = 0


def _run(
    patient: Patient,
    doctors: Mapping[str, LoadedDoctor],
    prompts: Sequence[Sequence[int]],
    guidance: Callable[[], Guidance],
    sampling: Sampling,
    seed: int,
    top: int,
    first: int | None,
) -> Iterator[Step]:
    models = _Models(patient, doctors, prompts, with_bases=guidance().mode == "ratio")
    context = _context(patient, doctors)
    rows = [
        _Row(
            i,
            TextStream(patient.tokenizer),
            torch.Generator().manual_seed(seed + i),
            min(sampling.max_new_tokens, context - len(prompt)),
            [],
            prompt[-1],
        )
        for i, prompt in enumerate(prompts)
    ]
    while rows:
        now = guidance()
        check_guidance(now, tuple(doctors))
        if now.mode == "ratio" and len(models.bases) < len(doctors):
            raise UsageError(
                'the mode cannot become "ratio" in the middle of an answer: set it before the answer begins'
            )
        uniforms_B = torch.stack([torch.rand((), generator=row.uniforms, dtype=torch.float64) for row in rows])
        ids, facts = models.step(now, sampling, uniforms_B, top, forced=first)
        first = None
        if any(map(math.isnan, facts["product"])):
            raise LoadError(not_numbers("the models' log-probs"))
        staying = []
        for i, row in enumerate(rows):
            token = _token(patient, row, ids[i], {key: column[i] for key, column in facts.items()}, now, top)
            row.position += 1
            row.last = token.id
            ended: Finish | None = None
            if token.id in patient.eos_ids:
                ended = "eos"
            elif row.position >= row.budget:
                ended = "length"
            for piece, finish in _release(row, token, sampling.stop, ended):
                yield Step(row.index, piece, finish)
                ended = finish or ended
            if ended is None:
                staying.append(i)
        rows = [rows[i] for i in staying]
        if rows:
            models.advance(staying)


class _Models:
    """The patient, the doctors and (mode "ratio") the doctors' bases, all at the same place in the text."""

    def __init__(
        self,
        patient: Patient,
        doctors: Mapping[str, LoadedDoctor],
        prompts: Sequence[Sequence[int]],
        *,
        with_bases: bool,
    ) -> None:
        self.doctors = doctors
        self.size = patient.vocabulary.size
        self.eos_ids = patient.eos_ids
        self.valid = patient.vocabulary.valid(patient.model.device)
        self.patient = CachedModel(patient.model)
        self.cached = {name: CachedModel(doctor.model, keeps_hidden=True) for name, doctor in doctors.items()}
        self.bases: dict[str, CachedModel] = {}
        if with_bases:
            for name, doctor in doctors.items():
                if doctor.base is None:
                    raise UsageError(f'mode "ratio" needs the base model of doctor {name!r}: load it with mode="ratio"')
                self.bases[name] = CachedModel(doctor.base)
        longest = max(map(len, prompts))
        ids_B_L = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=patient.model.device)
        lengths_B = torch.tensor([len(p) for p in prompts], device=ids_B_L.device)
        self.mask_B_L: Tensor | None = None  # None while no row is padded
        if int(lengths_B.min()) < longest:
            self.mask_B_L = (torch.arange(longest, device=ids_B_L.device) >= longest - lengths_B[:, None]).long()
        self.last_B_1 = ids_B_L
        with torch.inference_mode():
            self._feed_doctors()
            self._feed_patient()

    @torch.inference_mode()
    def step(
        self, guidance: Guidance, sampling: Sampling, uniforms_B: Tensor, top: int, forced: int | None = None
    ) -> tuple[list[int], dict[str, list[Any]]]:
        """Draw one token a row, feed it to the doctors, and return the ids with everything to be told about them."""
        bases = self.base_logps if guidance.mode == "ratio" else None
        product_B_V = product(self.patient_logp, self.doctor_logps, guidance, bases)
        ids_B = draw(product_B_V, sampling, uniforms_B)
        if forced is not None:
            ids_B = torch.full_like(ids_B, forced)
        picked = ids_B[:, None]
        columns = {
            "patient": self.patient_logp.gather(1, picked)[:, 0],
            "product": product_B_V.gather(1, picked)[:, 0],
            "kl": kl_divergence(product_B_V, self.patient_logp),
            "argmax": self.patient_logp.argmax(dim=1).to(product_B_V.dtype),
        }
        for name, logp_B_V in self.doctor_logps.items():
            columns[f"doctor {name}"] = logp_B_V.gather(1, picked)[:, 0]
        facts: dict[str, list[Any]] = {}
        if top:
            best_B_K = product_B_V.topk(min(top, product_B_V.shape[1]), dim=1)
            facts["top ids"] = best_B_K.indices.tolist()
            facts["top product"] = best_B_K.values.tolist()
            facts["top patient"] = self.patient_logp.gather(1, best_B_K.indices).tolist()
            for name, logp_B_V in self.doctor_logps.items():
                facts[f"top doctor {name}"] = logp_B_V.gather(1, best_B_K.indices).tolist()
        self.last_B_1 = picked
        if self.mask_B_L is not None:
            self.mask_B_L = torch.nn.functional.pad(self.mask_B_L, (0, 1), value=1)
        self._feed_doctors()
        for name, doctor in self.doctors.items():
            hidden_B_H = self.cached[name].hidden_B_H
            assert hidden_B_H is not None
            columns[f"value {name}"] = doctor.log_value(hidden_B_H).to(product_B_V)
        table = torch.stack([column.to(product_B_V.dtype) for column in columns.values()]).tolist()
        facts |= dict(zip(columns, table, strict=True))
        ids = ids_B.tolist()
        for name, doctor in self.doctors.items():
            if doctor.anchored:  # log V(s_T) = 0 is part of such a doctor, not something its head has learnt
                facts[f"value {name}"] = [
                    0.0 if i in self.eos_ids else v for i, v in zip(ids, facts[f"value {name}"], strict=True)
                ]
        return ids, facts

    @torch.inference_mode()
    def advance(self, staying: Sequence[int]) -> None:
        """Drop the rows that have ended, and feed the last tokens to the patient."""
        if len(staying) < len(self.last_B_1):
            rows = torch.tensor(staying, device=self.last_B_1.device)
            for model in (self.patient, *self.cached.values(), *self.bases.values()):
                model.keep(rows)
            self.last_B_1 = self.last_B_1[rows]
            self.mask_B_L = None if self.mask_B_L is None else self.mask_B_L[rows]
            for logps in (self.doctor_logps, self.base_logps):
                logps.update({name: logp[rows] for name, logp in logps.items()})
            # the patient has not seen the last token yet: its mask is one longer than its cache, as feed expects
        self._feed_patient()

    def _feed_patient(self) -> None:
        logits_B_V = self.patient.feed(self.last_B_1, self.mask_B_L)
        self.patient_logp = log_probs(logits_B_V, self.valid, self.size)

    def _feed_doctors(self) -> None:
        self.doctor_logps = self._logps(self.cached)
        self.base_logps = self._logps(self.bases)

    def _logps(self, models: Mapping[str, CachedModel]) -> dict[str, Tensor]:
        device = self.last_B_1.device
        logits = {name: model.feed(self.last_B_1, self.mask_B_L) for name, model in models.items()}
        return {name: log_probs(logits_B_V.to(device), self.valid, self.size) for name, logits_B_V in logits.items()}


def _token(
    patient: Patient, row: _Row, token_id: int, facts: Mapping[str, Any], guidance: Guidance, top: int
) -> GuidedToken:
    def by_name(prefix: str) -> dict[str, Any]:
        return {key.removeprefix(prefix): value for key, value in facts.items() if key.startswith(prefix)}

    alternatives: list[Alternative] = []
    if top:
        doctors = by_name("top doctor ")
        alternatives = [
            Alternative(
                id=other,
                text=token_texts(patient.tokenizer, [row.last, other])[
                    1
                ],  # after a token: some pieces begin with a space
                patient_logprob=facts["top patient"][k],
                doctor_logprobs={name: logps[k] for name, logps in doctors.items()},
                logprob=facts["top product"][k],
            )
            for k, other in enumerate(facts["top ids"])
        ]
    return GuidedToken(
        position=row.position,
        id=token_id,
        text=row.texts.push(token_id),
        patient_logprob=facts["patient"],
        doctor_logprobs=by_name("doctor "),
        logprob=facts["product"],
        values=by_name("value "),
        flip=int(facts["argmax"]) != token_id,
        kl=facts["kl"],
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
