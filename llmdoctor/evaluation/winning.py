"""What guided answers are worth beside those of the patient alone: by a judge, and by measures that need none."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmdoctor.answers import estimates_to_dict, measures, rate, share
from llmdoctor.evaluation.judge import Judge, Request
from llmdoctor.records import Answer, Comparison, Estimate, Speaker


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of the two answers to one prompt.

    ``win`` is 1 where the guided one is the better, 0 where the patient's is, and 1/2 for a tie; of a pairwise judge
    the mean of what it says in both orders, which cancels a liking for the first place. ``scores`` are those that a
    scalar judge gives the patient and the guided answer. ``agreed`` says whether a pairwise judge said the same in both
    orders; None where it was not asked, because both answers are the same.
    """

    win: float
    scores: tuple[float, float] | None = None
    agreed: bool | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdicts over all prompts.

    ``agreed`` is the share of different answers on which a pairwise judge said the same in both orders; nan if there
    are none, and None for a scalar judge.
    ``patient_score``, ``guided_score`` and ``gain``, their difference, are those of a scalar judge.
    """

    win_rate: Estimate
    agreed: Estimate | None = None
    patient_score: Estimate | None = None
    guided_score: Estimate | None = None
    gain: Estimate | None = None

    def to_dict(self) -> dict[str, dict[str, float]]:
        """The record as plain values; only what there is."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return estimates_to_dict({name: value for name, value in fields.items() if value is not None})


@dataclass(frozen=True, slots=True)
class Setting:
    """All answers with the same guidance: ``betas``, measures of the guided ones, and what the judge says of them."""

    betas: Mapping[str, float]
    measures: Mapping[str, Estimate]
    judged: Judged | None

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values."""
        said = {"judge": self.judged.to_dict()} if self.judged else {}
        return {"betas": dict(self.betas), **said, "measures": estimates_to_dict(self.measures)}


@dataclass(frozen=True, slots=True)
class Winning:
    """Guided answers beside those of the patient alone, for every guidance that was tried."""

    prompts: int
    answers: int  # of either side, at one setting
    patient: Mapping[str, Estimate]
    settings: tuple[Setting, ...]

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values."""
        return {
            "prompts": self.prompts,
            "answers": self.answers,
            "patient": {"measures": estimates_to_dict(self.patient)},
            "guided": [setting.to_dict() for setting in self.settings],
        }


def summarise(
    comparisons: Sequence[Comparison], judge: Judge | None = None, on_reply: Callable[[int, int], None] | None = None
) -> Winning:
    """The measures and the judge's verdicts of ``comparisons``, of which there is one or more; intervals are of 95%.

    Every guidance among them becomes a setting, in the order of first appearance. Intervals are over prompts, or over
    answers if there is one prompt. ``on_reply`` gets the number of the judge's replies so far and of all it will give.
    Raises UsageError for a judge that fails.
    """
    conversations: dict[tuple[str, str, int], list[Comparison]] = {}
    for one in comparisons:
        conversations.setdefault((json.dumps(one.settings["betas"]), one.id, one.sample), []).append(one)
    said: dict[tuple[str, str, int], Verdict] = {}
    if judge:
        exchanges = [Exchange.of(turns) for turns in conversations.values()]
        said = dict(zip(conversations, verdicts(judge, exchanges, on_reply), strict=True))
    by_betas = {betas: [key for key in conversations if key[0] == betas] for betas, _, _ in conversations}
    settings = []
    for keys in by_betas.values():
        turns = [one for key in keys for one in conversations[key]]
        own = _summary([said[key] for key in keys], [key[1] for key in keys]) if judge else None
        settings.append(Setting(turns[0].settings["betas"], _measures(turns, "guided"), own))
    first = [one for key in next(iter(by_betas.values())) for one in conversations[key]]
    return Winning(len({one.id for one in first}), len(first), _measures(first, "patient"), tuple(settings))


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and both answers to it, as a judge sees them: of several turns, lists with an item for each."""

    prompt: Any
    patient: Any
    guided: Any

    @classmethod
    def of(cls, turns: Sequence[Comparison]) -> "Exchange":
        """The exchange of a conversation's turns."""
        prompts = [one.prompt for one in turns]
        patient, guided = ([getattr(one, side).text.strip() for one in turns] for side in ("patient", "guided"))
        return cls(prompts, patient, guided) if len(turns) > 1 else cls(prompts[0], patient[0], guided[0])

    def requests(self, kind: str) -> list[Request]:
        """What a judge of this kind is asked about it."""
        if kind == "scalar":
            return [{"prompt": self.prompt, "answer": answer} for answer in (self.patient, self.guided)]
        if self.patient == self.guided:
            return []  # a tie
        orders = ((self.guided, self.patient), (self.patient, self.guided))
        return [{"prompt": self.prompt, "a": a, "b": b} for a, b in orders]


def verdicts(
    judge: Judge, exchanges: Sequence[Exchange], on_reply: Callable[[int, int], None] | None = None
) -> list[Verdict]:
    """What the judge says of each exchange. It is asked once about equal things. Raises UsageError if it fails."""
    requests = {json.dumps(request): request for one in exchanges for request in one.requests(judge.kind)}
    replies: dict[str, float] = {}
    for key, reply in zip(requests, judge.replies(list(requests.values())), strict=True):
        replies[key] = reply
        if on_reply:
            on_reply(len(replies), len(requests))
    return [
        _verdict(judge.kind, [replies[json.dumps(request)] for request in one.requests(judge.kind)])
        for one in exchanges
    ]


def _verdict(kind: str, replies: Sequence[float]) -> Verdict:
    if not replies:
        return Verdict(0.5)
    if kind == "scalar":
        patient, guided = replies
        return Verdict(float(guided > patient) + 0.5 * (guided == patient), (patient, guided))
    first, second = replies[0], 1 - replies[1]  # how probably the guided answer is the better one, in both orders
    return Verdict((first + second) / 2, agreed=(first > 0.5, first < 0.5) == (second > 0.5, second < 0.5))


def _summary(verdicts: Sequence[Verdict], ids: Sequence[str]) -> Judged:
    groups = _groups(ids)
    win_rate = share([verdict.win for verdict in verdicts], groups)
    scores = [verdict.scores for verdict in verdicts if verdict.scores]
    if not scores:
        asked = [i for i, verdict in enumerate(verdicts) if verdict.agreed is not None]
        agreed = [float(verdicts[i].agreed or 0) for i in asked]
        return Judged(win_rate, agreed=share(agreed, groups and [groups[i] for i in asked]))
    patient, guided = zip(*scores, strict=True)
    gain = rate([b - a for a, b in scores], groups=groups)
    return Judged(win_rate, None, rate(patient, groups=groups), rate(guided, groups=groups), gain)


def _measures(turns: Sequence[Comparison], side: Speaker) -> dict[str, Estimate]:
    """`measures` of one side's answers."""
    answers: list[Answer] = [getattr(one, side) for one in turns]
    return measures(answers, _groups([one.id for one in turns]), [one.metrics[f"{side}_seconds"] for one in turns])


def _groups(ids: Sequence[str]) -> Sequence[str] | None:
    return ids if len(set(ids)) > 1 else None
