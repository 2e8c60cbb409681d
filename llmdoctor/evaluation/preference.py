"""How often a doctor prefers the answer that people preferred. Nothing is generated."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmdoctor.answers import estimates_to_dict, rate, share, share_difference
from llmdoctor.assistant import LLMdoctor
from llmdoctor.errors import DataError, LoadError, UsageError
from llmdoctor.evaluation.reading import Readers, Row
from llmdoctor.models import not_numbers, token_log_probs
from llmdoctor.records import Estimate, PreferencePair, SkippedRecord
from llmdoctor.text import with_system
from llmdoctor.token_rewards.encode import PairEncoder
from llmdoctor.token_rewards.rows import chunks
from llmdoctor.training.doctor import HeadAdapter

_WINDOW = 512  # pairs that are sorted by length, and read, together


@dataclass(frozen=True, slots=True)
class Preference:
    """What one judge of the pairs prefers.

    ``chosen`` is the share of pairs in which it gives the chosen answer the greater score; a tie counts half.
    ``shorter`` is the same among the pairs whose chosen answer has fewer tokens, where the longer one is the wrong
    guess; nan if there are none. ``margin`` is the mean of score(chosen) - score(rejected).
    """

    chosen: Estimate
    shorter: Estimate
    margin: Estimate

    def to_dict(self) -> dict[str, dict[str, float]]:
        """The record as plain values."""
        return estimates_to_dict({"chosen": self.chosen, "shorter": self.shorter, "margin": self.margin})


@dataclass(frozen=True, slots=True)
class Preferences:
    """What every judge of the same pairs prefers; ``shorter`` pairs have the shorter answer as the chosen one.

    A doctor's score of an answer is sum_t log doctor(y_t) - log base(y_t), over its tokens and its end, in nats: what
    mode "ratio" guides by, and what training moved. The score of the doctor's base before training and of the patient
    is its log-prob, that of ``longer`` the number of tokens. ``beyond`` has for each doctor how much greater its share
    is than that of its base, of the patient and of the longer answer, on the same pairs.
    """

    pairs: int
    shorter: int
    doctors: Mapping[str, Preference]
    bases: Mapping[str, Preference]
    patient: Preference
    longer: Preference
    beyond: Mapping[str, Mapping[str, Estimate]]

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values."""
        return {
            "pairs": self.pairs,
            "shorter": self.shorter,
            "chance": 0.5,
            "doctors": {name: found.to_dict() for name, found in self.doctors.items()},
            "bases": {name: found.to_dict() for name, found in self.bases.items()},
            "patient": self.patient.to_dict(),
            "longer": self.longer.to_dict(),
            "beyond": {name: estimates_to_dict(found) for name, found in self.beyond.items()},
        }


def preferences(
    assistant: LLMdoctor,
    pairs: Iterable[PreferencePair],
    *,
    batch_tokens: int | None = None,
    on_pair: Callable[[], None] = lambda: None,
    on_skip: Callable[[SkippedRecord], None] = lambda _record: None,
) -> Preferences:
    """What the doctors, their bases, the patient and the lengths say of ``pairs``, each with 95% intervals.

    The assistant needs its doctors' bases: load it ``with_bases``. Pairs are tokenised as `extract` does it, after the
    assistant's system prompt; long prompts lose their beginning, and a pair that fits no context goes to ``on_skip``.
    Shares have Wilson's interval, as of one case per prompt. Memory holds some numbers per pair. Raises DataError if no
    pair is left, UsageError without the bases, and LoadError for log-probs that are not numbers.
    """
    readers = Readers(assistant, batch_tokens)
    encoder = PairEncoder(assistant.patient, {})
    prompts: list[int] = []
    tokens: list[tuple[int, int]] = []
    scores: dict[str, list[tuple[float, float]]] = {}  # by role: chosen and rejected of every pair
    for window in chunks(iter(pairs), _WINDOW):
        rows: list[Row] = []
        for pair in window:
            asked = tuple(with_system(pair.prompt, assistant.system_prompt))
            encoded = encoder.encode(PreferencePair(pair.id, asked, pair.chosen, pair.rejected), on_skip)
            if encoded is None:
                continue
            both = [(side.prompt, side.response) for side in encoded]
            if max(len(prompt) + len(answer) for prompt, answer in both) > readers.context:
                reason = f"longer than the context of {readers.context} tokens that all models have"
                on_skip(SkippedRecord(int(pair.id), reason))
                continue
            rows += both
            prompts.append(hash(tuple(both[0][0])))
            tokens.append((len(both[0][1]), len(both[1][1])))
        for role, found in _log_probs(assistant, readers, rows, on_pair).items():
            scores.setdefault(role, []).extend(zip(found[0::2], found[1::2], strict=True))
    if not tokens:
        raise DataError("none of the pairs fits the models' context: nothing to evaluate")
    return _summary(assistant.doctor_names, scores, tokens, prompts)


@torch.inference_mode()
def _log_probs(
    assistant: LLMdoctor, readers: Readers, rows: Sequence[Row], on_pair: Callable[[], None]
) -> dict[str, list[float]]:
    """The log-prob of every row's answer under each model, by role: "patient", "doctor NAME", "base NAME"."""
    voices: dict[str, tuple[PreTrainedModel, HeadAdapter | None]] = {"patient": (assistant.patient.model, None)}
    for name, doctor in assistant.doctors.items():
        if doctor.base is None:
            raise UsageError(f"the base of the doctor {name} is not loaded: load the assistant with_bases=True")
        voices |= {f"doctor {name}": (doctor.model, doctor.head), f"base {name}": (doctor.base, None)}
    found = {role: [0.0] * len(rows) for role in voices}
    read = 0
    for batch in readers.batches(rows):
        hidden, ids_M = readers.read([rows[i] for i in batch])
        lengths = [len(rows[i][1]) for i in batch]
        said: dict[Any, list[float]] = {}  # doctors may share a base
        for role, (model, change) in voices.items():
            if (model, change) not in said:
                logprobs_M = token_log_probs(
                    readers.splits[model],
                    hidden[model],
                    ids_M.to(hidden[model].device),
                    assistant.patient.vocabulary,
                    change=change,
                )
                said[model, change] = _sums(logprobs_M, lengths)
            for i, total in zip(batch, said[model, change], strict=True):
                found[role][i] = total
        read += len(batch)
        while read >= 2:
            on_pair()
            read -= 2
    return found


def _sums(logprobs_M: Tensor, lengths: Sequence[int]) -> list[float]:
    sums = [float(part.double().sum()) for part in logprobs_M.cpu().split(list(lengths))]
    if any(map(math.isnan, sums)):
        raise LoadError(not_numbers("the log-probs"))
    return sums


def _summary(
    names: Sequence[str],
    scores: Mapping[str, Sequence[tuple[float, float]]],
    tokens: Sequence[tuple[int, int]],
    prompts: Sequence[int],
) -> Preferences:
    margins = {role: [chosen - rejected for chosen, rejected in found] for role, found in scores.items()}
    longer = [float(chosen - rejected) for chosen, rejected in tokens]
    ratios = {
        name: [a - b for a, b in zip(margins[f"doctor {name}"], margins[f"base {name}"], strict=True)] for name in names
    }
    few = [i for i, margin in enumerate(longer) if margin < 0]

    def preference(margins: Sequence[float]) -> Preference:
        right = _right(margins)
        shorter = share([right[i] for i in few], [prompts[i] for i in few])
        return Preference(share(right, prompts), shorter, rate(margins, groups=prompts))

    def beyond(name: str) -> dict[str, Estimate]:
        others = {"base": margins[f"base {name}"], "patient": margins["patient"], "longer": longer}
        own = _right(ratios[name])
        return {other: share_difference(own, _right(theirs), prompts) for other, theirs in others.items()}

    return Preferences(
        pairs=len(tokens),
        shorter=len(few),
        doctors={name: preference(ratios[name]) for name in names},
        bases={name: preference(margins[f"base {name}"]) for name in names},
        patient=preference(margins["patient"]),
        longer=preference(longer),
        beyond={name: beyond(name) for name in names},
    )


def _right(margins: Iterable[float]) -> list[float]:
    """1 where the chosen answer has the greater score, 1/2 where both have the same."""
    return [float(margin > 0) + 0.5 * (margin == 0) for margin in margins]
