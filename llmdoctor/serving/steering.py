"""What vLLM's two interfaces for logits processors share. It needs no vLLM.

The doctors and the defaults of all requests come from the environment, since vLLM makes the processor in one process,
checks requests in another, and hands its configuration to the first only: ``LLMDOCTOR_PROFILE`` (a profile) or
``LLMDOCTOR_DOCTOR`` (a doctor folder, or ``NAME=FOLDER`` several times, separated by commas), and ``LLMDOCTOR_ALPHA``,
``LLMDOCTOR_BETA`` and so on over them.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmdoctor.decoding.following import Ask, Follower
from llmdoctor.decoding.product import product
from llmdoctor.errors import LLMDoctorError, LLMDoctorWarning, LoadError, UsageError
from llmdoctor.model_source import ModelSource
from llmdoctor.models import Vocabulary, context_of, load_tokenizer
from llmdoctor.profile import in_place_of, load_profile, named_doctors
from llmdoctor.schema import hint
from llmdoctor.serving.requests import GUIDANCE
from llmdoctor.set_command import parse_settings
from llmdoctor.settings import DecodeSettings, DoctorSettings, Guidance, Sampling, check_guidance
from llmdoctor.training.folder import Base, LoadedDoctor, load_doctor

_MOST_KNOWN = 1024  # kinds of guidance that requests asked for


@dataclass(frozen=True)
class Steered:
    """The doctors, and the guidance of requests that say nothing about it."""

    doctors: Mapping[str, DoctorSettings]
    guidance: Guidance
    _known: dict[tuple[str, ...], Guidance] = field(default_factory=dict, repr=False, compare=False)

    def guidance_of(self, extra_args: Mapping[str, Any] | None) -> Guidance:
        """The guidance of a request with these ``vllm_xargs``; those of other processors are not looked at.

        Requests that ask for the same get the same object: their rows are multiplied together.
        Raises UsageError for a value out of range, a doctor that does not exist, and a name that is nearly one of ours.
        """
        items = []
        for key, value in (extra_args or {}).items():
            if key.partition(".")[0] in GUIDANCE:
                items.append(f"{key}={value}")
            elif close := hint(key, list(GUIDANCE)):
                raise UsageError(f"vllm_xargs: there is no setting {key!r}{close}")
        if not items:
            return self.guidance
        if (known := self._known.get(tuple(items))) is not None:
            return known
        guidance, _ = parse_settings(items, tuple(self.doctors), self.guidance, Sampling(), command="vllm_xargs")
        check_guidance(guidance, tuple(self.doctors))
        if guidance.mode == "ratio" and self.guidance.mode != "ratio":
            raise UsageError('mode "ratio" needs the doctors\' bases: start vLLM with LLMDOCTOR_MODE=ratio')
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[tuple(items)] = guidance
        return guidance


@cache
def steered() -> Steered:
    """What the environment says. Raises UsageError, ProfileError and LoadError."""
    profile, folders = os.environ.get("LLMDOCTOR_PROFILE"), os.environ.get("LLMDOCTOR_DOCTOR")
    if not profile and not folders:
        raise UsageError("no doctor is named: set LLMDOCTOR_PROFILE to a profile, or LLMDOCTOR_DOCTOR to a folder")
    settings = load_profile(profile) if profile else None
    decode = settings.decode if settings else DecodeSettings()
    doctors = dict(settings.doctors) if settings else {}
    if folders:
        given = named_doctors([item.strip() for item in folders.split(",")], "LLMDOCTOR_DOCTOR")
        doctors = in_place_of(doctors, given)
    if not doctors:
        raise UsageError(f"the profile {profile} names no doctor: add one, or set LLMDOCTOR_DOCTOR")
    strengths = {name: os.environ.get(f"LLMDOCTOR_{name.upper()}") for name in GUIDANCE}
    items = [f"{name}={value}" for name, value in strengths.items() if value]
    guidance = decode.guidance(doctors)
    if items:
        guidance, _ = parse_settings(items, tuple(doctors), guidance, Sampling(), command="LLMDOCTOR_*")
    check_guidance(guidance, tuple(doctors))
    return Steered(doctors, guidance)


def require_valid(extra_args: Mapping[str, Any] | None) -> None:
    """Raise ValueError, which vLLM turns into status 400 for that request, for ``vllm_xargs`` that cannot be."""
    try:
        steered().guidance_of(extra_args)
    except LLMDoctorError as error:
        raise ValueError(str(error)) from error


class Place(NamedTuple):
    """Rows of the logits that belong to one request, and what the doctors read for them."""

    ask: Ask
    guidance: Guidance
    rows: Sequence[int]


class Steering:
    """The doctors beside a patient that vLLM runs; ``model`` and ``tokenizer`` are the patient's, as vLLM knows them.

    Raises LoadError for a doctor that cannot be loaded, has other tokens than the patient (VocabularyError), or a
    shorter context than ``longest``, the tokens of the longest request.
    """

    def __init__(
        self,
        model: str,
        tokenizer: str,
        device: torch.device,
        *,
        longest: int,
        prompt_tokens: int = 8192,
        trust_remote_code: bool = False,
    ) -> None:
        self.settings = steered()
        with_bases = self.settings.guidance.mode == "ratio"
        self.vocabulary = Vocabulary.of(load_tokenizer(tokenizer, trust_remote_code=trust_remote_code))
        bases: dict[str, Base] = {}
        doctors: dict[str, LoadedDoctor] = {}
        for name, one in self.settings.doctors.items():
            doctor = doctors[name] = load_doctor(
                one.checkpoint,
                name=name,
                base=one.base,
                with_base=with_bases,
                bases=bases,
                device=str(device),
                trust_remote_code=trust_remote_code,
            )
            self.vocabulary.require_same(doctor.vocabulary, f"the patient {model}", f"the doctor {one.checkpoint}")
            if (context := context_of(doctor.model)) < longest:
                raise LoadError(
                    f"the doctor {name} reads at most {context} tokens, and vLLM's requests may have {longest}: start "
                    f"it with --max-model-len {context}"
                )
            _warn_of_another_patient(name, doctor, model)
        self.follower = Follower(doctors, self.vocabulary, with_bases=with_bases, prompt_tokens=prompt_tokens)

    @torch.inference_mode()
    def guide(self, logits_N_V: Tensor, places: Sequence[Place]) -> Tensor:
        """Replace the rows of ``places`` by the log-probs of the guided distribution, in place; the others stay.

        What vLLM has forbidden (-inf, as a grammar does) stays forbidden.
        """
        if not places:
            return logits_N_V
        doctors, bases = self.follower.read([place.ask for place in places])
        rows = torch.tensor([row for place in places for row in place.rows], device=logits_N_V.device)
        logits_M_V = logits_N_V[rows]
        forbidden_M_V = logits_M_V == -torch.inf
        # 0 times -inf would be NaN where alpha is 0
        least = torch.finfo(logits_M_V.dtype).min
        patient_M_V = self.vocabulary.mask(logits_M_V.clamp(min=least)).log_softmax(dim=-1)
        groups: dict[int, tuple[Guidance, list[int]]] = {}
        place_of_row = [place for place in places for _ in place.rows]
        for m, place in enumerate(place_of_row):
            groups.setdefault(id(place.guidance), (place.guidance, []))[1].append(m)
        guided_M_V = torch.full_like(logits_M_V, -torch.inf)
        size = patient_M_V.shape[1]
        for guidance, members in groups.values():
            of = slice(None) if len(groups) == 1 else torch.tensor(members, device=rows.device)
            guided_M_V[of, :size] = product(
                patient_M_V[of],
                {name: said[of] for name, said in doctors.items()},
                guidance,
                {name: said[of] for name, said in bases.items()} or None,
            ).to(guided_M_V)
        logits_N_V[rows] = guided_M_V.masked_fill_(forbidden_M_V, -torch.inf)
        return logits_N_V


def steering_of(vllm_config: Any, device: torch.device) -> Steering:
    """The doctors for this ``VllmConfig``. Raises LoadError."""
    patient = vllm_config.model_config
    if getattr(patient, "enable_prompt_embeds", False):
        raise LoadError("doctors read tokens: start vLLM without --enable-prompt-embeds")
    return Steering(
        patient.model,
        patient.tokenizer,
        device,
        longest=patient.max_model_len,
        prompt_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
        trust_remote_code=patient.trust_remote_code,
    )


def _warn_of_another_patient(name: str, doctor: LoadedDoctor, model: str) -> None:
    trained = doctor.meta.get("rewards", {}).get("patient_fingerprint")
    own = None
    with suppress(LLMDoctorError, OSError):  # on the hub, or in a form that only vLLM reads
        own = ModelSource.of(model).fingerprint()
    if trained and own and trained != own:
        warnings.warn(
            f"the doctor {name} was trained for another patient (fingerprint {trained[:12]}) than {model} ({own[:12]})",
            LLMDoctorWarning,
            stacklevel=2,
        )


# --- the two interfaces, without vLLM's base classes ------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """A guided request. ``prompt`` and ``output`` are vLLM's own lists, which grow with the answer."""

    guidance: Guidance
    prompt: Sequence[int] = ()
    output: list[int] = field(default_factory=list)
    longest: int | None = None  # tokens of the longest answer
    stops: frozenset[int | None] = frozenset()  # tokens that end the answer
    seen: int = 0  # tokens of the last ask that still stand

    @property
    def has_ended(self) -> bool:
        """Whether it has certainly ended; with stop strings, or where its client went, nobody tells."""
        # vLLM may have begun the step after the last one before it knew what was drawn
        return len(self.output) == self.longest or not self.stops.isdisjoint(self.output[-2:])


class BatchRows:
    """The V1 interface: rows are added, removed, moved; what a request has said is a list that vLLM extends."""

    steering: Steering

    def __init__(self) -> None:
        self._rows: dict[int, Request] = {}  # by their place in vLLM's batch; guided ones only
        self._gone: dict[int, Request] = {}  # that may come back, by the identity of their output

    def update_state(self, batch_update: Any) -> None:
        """See vLLM's ``LogitsProcessor``. ``batch_update`` is a ``BatchUpdate`` or None."""
        if batch_update is not None:
            for index in batch_update.removed:
                self._leave(index)
            for index, params, prompt, output in batch_update.added:
                self._leave(index)
                self._enter(index, params, prompt, output)
            for source, target, how in batch_update.moved:
                moved, other = self._rows.pop(source, None), self._rows.get(target)
                if how.name != "SWAP" or other is None:
                    self._leave(target)
                else:
                    self._rows[source] = other
                    del self._rows[target]
                if moved is not None:
                    self._rows[target] = moved
            self._gone = {key: one for key, one in self._gone.items() if one in self.steering.follower}

    def _leave(self, index: int) -> None:
        if (one := self._rows.pop(index, None)) is None:
            return
        if one.has_ended:
            self.steering.follower.forget(one)
        else:
            self._gone[id(one.output)] = one

    def _enter(self, index: int, params: Any, prompt: Sequence[int] | None, output: list[int]) -> None:
        # vLLM takes a request that pauses out of its batch, and puts it in again with the same list
        known = self._gone.pop(id(output), None)
        if known is not None and known.output is output:
            self._rows[index] = known
            return
        guidance = self.steering.settings.guidance_of(params.extra_args)
        if not guidance.is_patient_alone:
            stops = frozenset([params.eos_token_id, *(params.stop_token_ids or ())])
            self._rows[index] = Request(guidance, prompt or (), output, params.max_tokens, stops)

    def apply(self, logits: Tensor) -> Tensor:
        """See vLLM's ``LogitsProcessor``: logits [N, V], one row for each request of the batch."""
        places = []
        for index, one in self._rows.items():
            length = len(one.prompt) + len(one.output)
            # A prompt that vLLM reads in parts has a row for each part, although no token is drawn: the doctors have
            # read all of it with the first and read its last token again. So it is with tokens that were taken back.
            start = min(one.seen, length - 1)
            prompt, output = one.prompt, one.output
            tail = [*prompt[start:], *output] if start < len(prompt) else output[start - len(prompt) :]
            ask = Ask(one, start, tail, 1, _whole(prompt, output))
            places.append(Place(ask, one.guidance, (index,)))
            one.seen = length
        return self.steering.guide(logits, places)


def _whole(prompt: Sequence[int], output: Sequence[int]) -> Callable[[], list[int]]:
    return lambda: [*prompt, *output]


class SlotRows:
    """The newer interface: a request keeps its slot; the tokens are on the device, drafts among them."""

    steering: Steering
    req_states: Any

    def __init__(self) -> None:
        self._slots: dict[int, Request] = {}  # guided ones only

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """See vLLM's ``LogitsProcessor``."""
        if (before := self._slots.pop(req_idx, None)) is not None:
            self.steering.follower.forget(before)
        guidance = self.steering.settings.guidance_of(sampling_params.extra_args)
        if guidance.is_patient_alone:
            return False
        self._slots[req_idx] = Request(guidance)
        return True

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """See vLLM's ``LogitsProcessor``: logits [N, V], a row for each token that is drawn or checked."""
        if not any(int(slot) in self._slots for slot in ctx.idx_mapping_np):
            return logits
        # one transfer from the device
        table = torch.stack([ctx.expanded_idx_mapping.long(), ctx.pos.long(), ctx.input_ids.long()]).tolist()
        rows_of: dict[int, list[int]] = {}
        for row, slot in enumerate(table[0]):
            if slot in self._slots:
                rows_of.setdefault(slot, []).append(row)
        places = []
        for slot, rows in rows_of.items():
            one, start, tail = self._slots[slot], table[1][rows[0]], [table[2][row] for row in rows]
            if start + 1 < int(self.req_states.prefill_len.np[slot]):
                continue  # a part of a prompt: no token is drawn, and the doctors read it with the last part
            # before ``start`` stand the tokens that were read by then: accepted drafts, and what was drawn
            ask = Ask(one, start, tail, len(rows), self._whole(slot, start, tail))
            places.append(Place(ask, one.guidance, rows))
        return self.steering.guide(logits, places)

    def _whole(self, slot: int, start: int, tail: Sequence[int]) -> Callable[[], list[int]]:
        return lambda: [*self.req_states.all_token_ids.gpu[slot, :start].tolist(), *tail]
