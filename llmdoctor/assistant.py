"""The facade of the library: load the models once, then generate, stream and compare."""

import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, overload

from transformers import PreTrainedModel

from llmdoctor.comparing import Run, both_sides
from llmdoctor.decoding.batch import Batch
from llmdoctor.decoding.decode import decode
from llmdoctor.decoding.drafting import AdaptiveLength, Drafting
from llmdoctor.decoding.int8 import FIRST, INT8, draft_of
from llmdoctor.decoding.prefill import Pieces
from llmdoctor.decoding.prefix import PrefixCache, SharedPrefixes
from llmdoctor.decoding.rows import Step, patient_alone
from llmdoctor.errors import LLMDoctorWarning, UsageError
from llmdoctor.files import require_doctor
from llmdoctor.models import (
    Patient,
    Vocabulary,
    load_lm,
    load_patient,
    load_tokenizer,
    share_weights,
    shared_by_processes,
)
from llmdoctor.profile import Profile, in_place_of, load_profile, own_name
from llmdoctor.records import Answer, Comparison, GuidedToken, Message, Question, Speaker
from llmdoctor.settings import COMBINATION, DoctorSettings, Guidance, GuidanceFields, Sampling, check_guidance
from llmdoctor.text import TextStream, conversation, prompt_ids, with_system
from llmdoctor.training.folder import Base, LoadedDoctor, load_doctor
from llmdoctor.training.shrunk import shrunk_from_another

_Given = TypeVar("_Given")
_BATCH_ROWS = 32
_FOR_THIS_CALL = ("alpha", "beta", "dead_zone", "plausibility")  # guidance that a call takes one by one
_DEFAULTS = {name: DoctorSettings.model_fields[name].default for name in ("beta", "dead_zone")}


class LLMdoctor:
    """A frozen patient, steered token by token by any number of doctors: pi ∝ patient^alpha · prod doctor_i^beta_i.

    ``doctor_checkpoint`` is one doctor folder, or a mapping of names to folders; without one, the patient answers
    alone. ``beta`` and ``dead_zone`` are one number for all doctors, or a mapping of names to numbers. ``guidance`` are
    the other fields of `Guidance`: ``alpha``, ``mode``, ``plausibility``. ``doctor_base`` overrides the base model that
    a doctor folder names. ``system_prompt`` opens every conversation.

    ``alpha``, ``beta``, ``guidance`` and ``sampling`` may be set at any time. A running ``stream`` reads the first
    three before every token.

    With ``speculation`` a doctor drafts tokens and the patient checks several at a time: the same answers, faster.
    ``draft_model``, a small model with the patient's tokens, drafts in its place, for the patient alone too; "int8" is
    the patient itself in 8 bits, a quarter of its float32 size; where that is no faster, and on GPUs, nothing drafts.
    In half precision the results for one token and for several are rounded differently, so now and then a different
    token is drawn.

    ``device`` and ``dtype`` are those of all models; ``attn_implementation``, ``device_map`` and ``tp_plan`` the
    patient's alone (see `load_lm`). ``with_bases`` loads the doctors as they were before training, which mode "ratio"
    always does. With ``tp_plan`` every process of `torchrun` must do the same calls with the same
    seeds; it turns ``speculation`` off.

    Raises LoadError (a model or doctor cannot be loaded), VocabularyError (a doctor with a different tokenizer),
    UsageError (a setting out of range).
    """

    def __init__(
        self,
        patient_model: str | Path,
        doctor_checkpoint: str | Path | Mapping[str, str | Path] | None = None,
        *,
        beta: float | Mapping[str, float] = _DEFAULTS["beta"],
        dead_zone: float | Mapping[str, float] = _DEFAULTS["dead_zone"],
        doctor_base: str | Path | Mapping[str, str | Path] | None = None,
        sampling: Sampling | None = None,
        system_prompt: str | None = None,
        speculation: bool = True,
        draft_model: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        attn_implementation: str | None = None,
        device_map: str | Mapping[str, str | int] | None = None,
        tp_plan: str | None = None,
        trust_remote_code: bool = False,
        with_bases: bool = False,
        **guidance: Any,
    ) -> None:
        self.speculation = speculation
        self._first_draft = 1
        self.sampling = sampling or Sampling()
        self.system_prompt = system_prompt
        self._doctors: dict[str, LoadedDoctor] = {}
        self._guidance = Guidance(**guidance)
        # A dead zone of 0 is the same as none, so it is not listed for every doctor.
        strengths = {"betas": beta} | ({"dead_zones": dead_zone} if dead_zone else {})
        folders = _folders(doctor_checkpoint)
        # Loading the patient may take minutes: say first what can be known before.
        for folder in folders.values():
            require_doctor(folder)
        check_guidance(self._with(tuple(folders), **strengths), tuple(folders))
        self.patient: Patient = load_patient(
            patient_model,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            device_map=device_map,
            tp_plan=tp_plan,
        )
        if shared_by_processes(self.patient.model):
            # the length of drafts follows measured times, so the processes would no longer take the same steps
            self.speculation = False
        # Doctors on the same base share one copy of it; `load_doctor` adds to this. The base may be the patient.
        bases = {self.patient.fingerprint: Base(self.patient.model, self.patient.vocabulary)}
        for name, checkpoint in folders.items():
            doctor = load_doctor(
                checkpoint,
                name=name,
                base=doctor_base.get(name) if isinstance(doctor_base, Mapping) else doctor_base,
                with_base=with_bases or self._guidance.mode == "ratio",
                bases=bases,
                dtype=dtype,
                device=device,
                trust_remote_code=trust_remote_code,
            )
            self.patient.vocabulary.require_same(
                doctor.vocabulary, f"the patient {patient_model}", f"the doctor {checkpoint}"
            )
            if doctor.model is not self.patient.model:
                share_weights(self.patient.model, doctor.model)
            self._doctors[doctor.name] = doctor
        self._draft_model: PreTrainedModel | None = None
        if draft_model == INT8 and self.speculation:
            try:
                self._draft_model = draft_of(self.patient.model)
            except UsageError as error:  # a profile may say int8, and the command line another patient
                warnings.warn(f"{error}; nothing drafts now", LLMDoctorWarning, stacklevel=2)
            self._first_draft = FIRST if self._draft_model is not None else 1
        elif draft_model is not None and self.speculation:
            if problem := shrunk_from_another(draft_model, self.patient.fingerprint, str(patient_model)):
                warnings.warn(f"{problem}; its drafts will seldom stand", LLMDoctorWarning, stacklevel=2)
            self.patient.vocabulary.require_same(
                Vocabulary.of(load_tokenizer(draft_model, trust_remote_code=trust_remote_code)),
                f"the patient {patient_model}",
                f"the draft model {draft_model}",
            )
            # in the patient's precision, so that they can share weights
            kind = str(self.patient.model.dtype).removeprefix("torch.") if dtype == "auto" else dtype
            self._draft_model = load_lm(draft_model, dtype=kind, device=device, trust_remote_code=trust_remote_code)
            share_weights(self.patient.model, self._draft_model)
        self._drafting, self._drafting_alone = (AdaptiveLength(self._first_draft) for _ in range(2))
        self.guidance = self._with(self.doctor_names, **strengths)

    @classmethod
    def from_profile(cls, profile: str | Path | Profile | None = None, **overrides: Any) -> "LLMdoctor":
        """Load the models and settings of a profile, by default the clinic.

        ``overrides`` are keywords of ``LLMdoctor``, which beat the profile. A mapping for ``beta`` or ``dead_zone``
        changes only the doctors it names. ``doctor_checkpoint`` replaces all doctors. With a profile that was given, a
        new doctor has ``beta`` and ``dead_zone`` of the profile's doctor of the same name, or of its only one, and
        ``mode`` and ``plausibility`` stay. All else has the general defaults; so has everything without a profile,
        because the clinic's settings were chosen for its own doctors.

        Raises ProfileError, and what ``LLMdoctor`` raises.
        """
        p = profile if isinstance(profile, Profile) else load_profile(profile or "clinic")
        doctors, combination = p.doctors, p.decode.model_dump(include=set(GuidanceFields.model_fields))
        if "doctor_checkpoint" in overrides:
            doctors = in_place_of(doctors if profile else {}, _folders(overrides.pop("doctor_checkpoint")))
            if not profile:
                combination = {name: value for name, value in combination.items() if name not in COMBINATION}
        settings: dict[str, Any] = {
            "patient_model": p.patient.model,
            "doctor_checkpoint": {name: doctor.checkpoint for name, doctor in doctors.items()},
            "doctor_base": {name: doctor.base for name, doctor in doctors.items() if doctor.base},
            "beta": {name: doctor.beta for name, doctor in doctors.items()},
            "dead_zone": {name: doctor.dead_zone for name, doctor in doctors.items()},
            "system_prompt": p.patient.system_prompt,
            **p.patient.loading(),
            "sampling": p.decode.sampling(),
            "speculation": p.decode.speculation,
            "draft_model": p.decode.draft_model,
            **combination,
        }
        for key in ("beta", "dead_zone"):
            if isinstance(overrides.get(key), Mapping):
                overrides[key] = {**settings[key], **overrides[key]}
        return cls(**{**settings, **overrides})

    @property
    def doctor_names(self) -> tuple[str, ...]:
        """The names of the doctors, in the order they were given."""
        return tuple(self._doctors)

    @property
    def token_names(self) -> Mapping[int, str]:
        """What the special tokens are, which have no text, by id: ``end of answer <|im_end|>``."""
        return self.patient.token_names

    @property
    def doctors(self) -> Mapping[str, LoadedDoctor]:
        """The doctors by name, as they were loaded."""
        return MappingProxyType(self._doctors)

    @property
    def acceptance(self) -> float | None:
        """The share of recently drafted tokens that were accepted, in [0, 1]; None before the first draft."""
        used = self._drafting if self._drafting.tested else self._drafting_alone
        return used.acceptance if self.speculation and used.tested else None

    @property
    def guidance(self) -> Guidance:
        """The guidance that the next token is drawn with."""
        return self._guidance

    @guidance.setter
    def guidance(self, guidance: Guidance) -> None:
        _require(guidance, Guidance, "guidance", "a Guidance, as doctor.guidance.replace(...) makes")
        check_guidance(guidance, self.doctor_names)
        self._guidance = guidance

    @property
    def sampling(self) -> Sampling:
        """How the next answer is drawn."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        _require(sampling, Sampling, "sampling", "a Sampling, as doctor.sampling.replace(...) makes")
        self._sampling = sampling

    @property
    def alpha(self) -> float:
        """The patient's exponent."""
        return self._guidance.alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        self.guidance = self._guidance.replace(alpha=alpha)

    @property
    def beta(self) -> Mapping[str, float]:
        """Every doctor's exponent, read-only. Assign a number for all doctors, or a mapping for those it names."""
        return self._guidance.betas

    @beta.setter
    def beta(self, beta: float | Mapping[str, float]) -> None:
        self.guidance = self._with(self.doctor_names, betas=beta)

    @overload
    def generate(self, prompt: str, **sampling: Any) -> str: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]], **sampling: Any
    ) -> str | list[str]: ...
    def generate(
        self, prompt: str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]], **sampling: Any
    ) -> str | list[str]:
        """The guided answer to a prompt or a conversation; for a list of them, their answers in order.

        ``sampling`` are fields of ``Sampling`` that replace the instance's own. ``alpha``, ``beta``, ``dead_zone`` and
        ``plausibility`` do the same for the guidance of this call; ``beta`` and ``dead_zone`` are a number for every
        doctor or a mapping for those it names. ``guidance`` replaces all of the instance's guidance, including the
        mode. All methods that answer take these. For a list of prompts ``guidance`` may be a list, one for each.
        ``seed`` may be a list as well; otherwise prompt i has seed + i. Raises UsageError for a value out of range and
        for what is no prompt.
        """
        if not isinstance(prompt, str) and isinstance(prompt, Sequence) and not any(map(_is_message, prompt)):
            return [answer.text for answer in self.answer_all(prompt, **sampling)]  # type: ignore[arg-type]
        return "".join(token.text for token in self.stream(prompt, **sampling))  # type: ignore[arg-type]

    def answer_all(
        self,
        prompts: Sequence[str] | Sequence[Sequence[Message]],
        *,
        guided: bool = True,
        guidance: Guidance | Sequence[Guidance] | None = None,
        seed: int | Sequence[int] | None = None,
        top: int = 0,
        follow: bool = False,
        rows: int = _BATCH_ROWS,
        on_token: Callable[[GuidedToken], None] | None = None,
        on_answer: Callable[[int, Answer], None] | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """Answers with all their tokens, decoded ``rows`` at a time. ``guided=False`` is the patient alone.

        With ``follow`` the ``patient_id`` of a token is what the patient alone would draw there with the same random
        numbers. ``on_answer`` gets every answer when it is finished, and the number of its prompt, from 0.

        ``guidance``, ``seed`` and ``sampling`` are as in ``generate``. A prompt's answer does not depend on the other
        prompts. Raises UsageError if the lists differ in length.
        """
        _require_count(rows, "rows", 1)
        guidance = self._of_this_call(guidance, sampling)
        settings = self.sampling.replace(**sampling)
        seeds = seeds_of(settings.seed if seed is None else seed, len(prompts))
        each = guidance if isinstance(guidance, Sequence) else [guidance] * len(prompts)
        if len(each) != len(prompts):
            raise UsageError(f"expected one guidance for each of {len(prompts)} prompts, got {len(each)}")
        if len(seeds) != len(prompts):
            raise UsageError(f"expected one seed for each of {len(prompts)} prompts, got {len(seeds)}")
        reads = [self._read(one) for one in each]
        answers: dict[int, Answer] = {}
        for start in range(0, len(prompts), rows):
            part = slice(start, start + rows)
            steps: list[list[Step]] = [[] for _ in prompts[part]]
            how: dict[str, Any] = {"guided": guided, "read": reads[part], "top": top, "follow": follow}
            for step in self._decode(prompts[part], settings, seeds[part], **how):
                steps[step.row].append(step)
                if on_token:
                    on_token(step.token)
                if step.finish:
                    answers[start + step.row] = _answer(steps[step.row])
                    if on_answer:
                        on_answer(start + step.row, answers[start + step.row])
        return [answers[i] for i in range(len(prompts))]

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        guidance: Guidance | Callable[[], Guidance] | None = None,
        guided: bool = True,
        prefix_ids: Sequence[int] = (),
        force_id: int | None = None,
        top: int = 0,
        prefix_cache: PrefixCache | None = None,
        **sampling: Any,
    ) -> Iterator[GuidedToken]:
        """Guided tokens as they are drawn, each with its numbers and its ``top`` most probable alternatives.

        ``guidance`` is fixed for the whole answer, or a function that is called for every token. By default it is the
        instance's own, and follows its changes. ``guided=False`` is the patient alone. ``sampling`` is as in
        ``generate``.

        Give every turn of a conversation the same ``prefix_cache``: the models then read only what is new.

        ``prefix_ids`` are the first tokens of the answer, which is continued after them. They are not yielded, but
        count towards ``max_new_tokens``. The draws after them depend on the seed and on the number of prefix tokens.
        ``force_id`` is taken as the next token instead of a draw.

        Close the iterator to stop. Settings are checked by this call, not at the first token. Raises UsageError for a
        setting out of range and for an id that is not in the vocabulary.
        """
        guidance = self._of_this_call(guidance, sampling)
        settings = self.sampling.replace(**sampling)
        (seed,) = seeds_of(settings.seed, 1)
        if prefix_ids or force_id is not None:
            known = set(self.patient.vocabulary.ids.values())
            if unknown := [i for i in (*prefix_ids, *([] if force_id is None else [force_id])) if i not in known]:
                raise UsageError(f"there is no token with the id {unknown[0]}")
            if len(prefix_ids) >= settings.max_new_tokens:
                raise UsageError(
                    f"the answer is {len(prefix_ids)} tokens long already and max_new_tokens is "
                    f"{settings.max_new_tokens}: raise it to continue"
                )
            settings = settings.replace(max_new_tokens=settings.max_new_tokens - len(prefix_ids))
            seed = continued_seed(seed, len(prefix_ids))
        steps = self._decode(
            [prompt],
            settings,
            [seed],
            read=[self._read(guidance)],
            guided=guided,
            top=top,
            prefix_cache=prefix_cache,
            prefix=prefix_ids,
            first=force_id,
        )
        continuation = Continuation(self.patient.tokenizer, prefix_ids)
        return (continuation.step(step).token for step in steps)

    def compare(
        self,
        prompt: str | Sequence[Message],
        *,
        guidance: Guidance | None = None,
        top: int = 0,
        on_token: Callable[[Speaker, GuidedToken], None] | None = None,
        **sampling: Any,
    ) -> Comparison:
        """The patient alone, then the guided patient, on the same prompt and with the same random numbers.

        ``guidance`` and ``sampling`` are as in ``generate``: ``alpha``, ``beta`` and the others may be given for this
        call. Raises UsageError for a value out of range and for what is no prompt.
        """
        return next(self.compare_all([prompt], guidance=guidance, top=top, on_token=on_token, **sampling))

    def compare_all(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        guidance: Guidance | None = None,
        top: int = 0,
        on_token: Callable[[Speaker, GuidedToken], None] | None = None,
        **sampling: Any,
    ) -> Iterator[Comparison]:
        """``compare`` for many prompts, decoded in batches; yields in the order of the prompts.

        All prompts have the same seed, so each is answered as if it were compared alone. The seconds of a prompt are
        the time of its batch divided by the number of prompts in it.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise UsageError(f"expected a list of prompts, got {prompts!r}")
        for prompt in prompts:
            _messages(prompt)  # before anything is decoded
        _require_count(top, "top", 0)
        guidance = self._read(self._of_this_call(guidance, sampling))()
        check_guidance(guidance, self.doctor_names)
        settings = self.sampling.replace(**sampling)
        (seed,) = seeds_of(settings.seed, 1)
        questions = [Question(str(i), (p if isinstance(p, str) else list(p),)) for i, p in enumerate(prompts, start=1)]
        sides = both_sides(self, guidance, **settings.model_dump(exclude={"seed"}))
        return Run(questions, seed, top=top, keep=False, on_token=on_token).compare(sides)  # type: ignore[arg-type]

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """The token ids [L] that the models read for a prompt or a conversation, system prompt included.

        Raises UsageError for what is no prompt, and DataError for what the chat template refuses.
        """
        return prompt_ids(self.patient.tokenizer, with_system(_messages(prompt), self.system_prompt))

    def batch(self, *, pieces: Pieces | None = None, prefixes: SharedPrefixes | None = None) -> Batch:
        """A batch of these models, for prompts that join and leave while it runs.

        For ``pieces`` and ``prefixes`` see `Batch`. Mode "ratio" is open to its prompts where it is the instance's
        own mode: the doctors then have their bases.
        """
        return Batch(
            self.patient,
            self._doctors,
            drafting=self._drafts(guided=True),
            draft_model=self._draft_model,
            with_bases=bool(self._doctors) and self._guidance.mode == "ratio",
            pieces=pieces,
            prefixes=prefixes,
        )

    def part(self, doctors: Mapping[str, str], *, system_prompt: str | None) -> "LLMdoctor":
        """The same loaded models with only these doctors: names to have, and the names they have here.

        Guidance is to be given with every call. Raises UsageError for a doctor that is not loaded.
        """
        if unknown := [name for name in doctors.values() if name not in self._doctors]:
            raise UsageError(
                f"there is no doctor {unknown[0]!r}; the doctors are: {', '.join(self._doctors) or 'none'}"
            )
        own = copy(self)
        own._doctors = {name: self._doctors[loaded] for name, loaded in doctors.items()}
        own._drafting, own._drafting_alone = (AdaptiveLength(self._first_draft) for _ in range(2))
        own._guidance, own.system_prompt = Guidance(mode=self._guidance.mode), system_prompt
        return own

    def _decode(
        self,
        prompts: Sequence[str] | Sequence[str | Sequence[Message]],
        sampling: Sampling,
        seeds: Sequence[int],
        *,
        read: Sequence[Callable[[], Guidance]],
        guided: bool = True,
        top: int = 0,
        follow: bool = False,
        prefix_cache: PrefixCache | None = None,
        prefix: Sequence[int] = (),
        first: int | None = None,
    ) -> Iterator[Step]:
        _require_count(top, "top", 0)
        if prefix_cache is not None:
            _require(prefix_cache, PrefixCache, "prefix_cache", "a PrefixCache()")
        return decode(
            self.patient,
            self._doctors if guided else {},
            [[*self.prompt_ids(prompt), *prefix] for prompt in prompts],
            read if guided else patient_alone,
            sampling,
            seed=seeds,
            top=top,
            follow=follow,
            drafting=self._drafts(guided=guided),
            draft_model=self._draft_model,
            prefix_cache=prefix_cache,
            first=first,
            begun=len(prefix),
        )

    def _drafts(self, *, guided: bool) -> Drafting | None:
        if not self.speculation:
            return None
        return self._drafting if guided else self._drafting_alone

    def _read(self, guidance: Guidance | Callable[[], Guidance] | None) -> Callable[[], Guidance]:
        if guidance is None:
            return self._own_guidance
        if callable(guidance):
            return guidance
        _require(guidance, Guidance, "guidance", "a Guidance, as doctor.guidance.replace(...) makes")
        return lambda: guidance

    def _of_this_call(self, guidance: _Given, settings: dict[str, Any]) -> _Given | Guidance:
        """The guidance of a call. Its parts are taken out of ``settings``, which are then those of the sampling."""
        own = {name: settings.pop(name) for name in _FOR_THIS_CALL if name in settings}
        if not own:
            return guidance
        if guidance is not None:
            raise UsageError(f"choose one of guidance and {', '.join(own)}")
        strengths = {f"{name}s": own.pop(name) for name in ("beta", "dead_zone") if name in own}
        changed = self._with(self.doctor_names, **strengths).replace(**own)
        check_guidance(changed, self.doctor_names)
        return changed

    def _own_guidance(self) -> Guidance:
        return self._guidance

    def _with(self, names: Sequence[str], **strengths: float | Mapping[str, float]) -> Guidance:
        """The guidance with ``betas`` or ``dead_zones`` changed for all doctors, or for those that a mapping names."""
        return with_strengths(self._guidance, names, **strengths)


def with_strengths(guidance: Guidance, names: Sequence[str], **strengths: float | Mapping[str, float]) -> Guidance:
    """``guidance`` with ``betas`` or ``dead_zones`` changed for all doctors, or for those that a mapping names."""
    changes = {
        field: {**getattr(guidance, field), **given} if isinstance(given, Mapping) else dict.fromkeys(names, given)
        for field, given in strengths.items()
    }
    return guidance.replace(**changes)


def _folders(checkpoint: str | Path | Mapping[str, str | Path] | None) -> dict[str, str]:
    """``doctor_checkpoint`` as folders by name. Raises UsageError for what is neither a folder nor a mapping."""
    if checkpoint is None:
        return {}
    named = checkpoint if isinstance(checkpoint, Mapping) else {"": checkpoint}
    if not all(isinstance(name, str) and isinstance(folder, str | Path) for name, folder in named.items()):
        raise UsageError(f"doctor_checkpoint: expected a folder, or a mapping of names to folders, got {checkpoint!r}")
    if named is not checkpoint:  # a single one is called as it says itself
        named = {own_name(Path(folder)): folder for folder in named.values()}
    return {name: str(folder) for name, folder in named.items()}


def _require(value: Any, kind: type, name: str, wanted: str) -> None:
    if not isinstance(value, kind):
        raise UsageError(f"{name}: expected {wanted}, got {value!r}")


def _require_count(value: Any, name: str, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name}: expected a whole number, at least {least}, got {value!r}")


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping)


def _messages(prompt: Any) -> list[Message]:
    """The prompt as messages. Raises UsageError for what is neither a text nor a conversation."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise UsageError("the prompt is empty: expected a text, or a list of messages")
        return conversation(prompt)
    if not isinstance(prompt, Sequence) or not prompt:
        raise UsageError(f"expected a prompt: a text, or a list of messages, got {prompt!r}")
    for message in prompt:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UsageError(f'expected messages like {{"role": "user", "content": "..."}}, got {message!r}')
    return conversation(prompt)


def seeds_of(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """One seed per prompt: the list itself, or seed, seed + 1, ...; None picks a random seed."""
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
        return [_seed(each) for each in seed]
    first = _seed(seed)
    return [_seed(first + i) for i in range(count)]


def _seed(given: Any) -> int:
    seed = Sampling(seed=given).seed  # checked as anywhere else
    return secrets.randbelow(1 << 31) if seed is None else seed


def continued_seed(seed: int, drawn: int) -> int:
    """The seed of an answer that goes on after ``drawn`` of its tokens.

    With the same seed a continuation would draw the same random numbers as its prefix did. Adding multiples of the
    golden ratio, as in SplitMix, gives each prefix length another seed, and not a neighbouring one: users take those
    (seed + 1, seed + 2, ...) for other answers.
    """
    return (seed + drawn * 0x9E3779B9) % (1 << 63)


class Continuation:
    """The tokens after ``prefix``, with the positions and texts that they have in the whole answer.

    The decoder has read the prefix as part of the prompt, so it starts from position 0 and an empty text. But a token
    may complete a character that the prefix began, and some tokenizers drop the space before an answer's first token.
    """

    def __init__(self, tokenizer: Any, prefix: Sequence[int]) -> None:
        self._begun, self._whole, self._part = len(prefix), TextStream(tokenizer), TextStream(tokenizer)
        for i in prefix:
            self._whole.push(i)

    def step(self, step: Step) -> Step:
        """The decoder's next step, in its place."""
        if not self._begun:
            return step
        token, last = step.token, step.finish is not None
        text, fresh = self._whole.push(token.id, last=last), self._part.push(token.id, last=last)
        # ``_part`` repeats what the decoder did. Where they differ, a stop string cut the text: keep it as it is.
        text = text if fresh == token.text else token.text
        return step._replace(token=replace(token, position=token.position + self._begun, text=text))


def _answer(steps: Sequence[Step]) -> Answer:
    tokens = tuple(step.token for step in steps)
    return Answer("".join(token.text for token in tokens), tokens, steps[-1].finish != "length")
