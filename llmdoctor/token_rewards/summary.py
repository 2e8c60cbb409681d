"""A rewards folder in numbers: whether its faces work on this patient, and what they reward.

Everything is counted in one pass over streamed pairs, in memory that does not grow with their number.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdoctor.records import Floats, PairScores, TokenRewards
from llmdoctor.token_rewards.formula import gap

HARDLY = 0.15
"""Root mean square gap, in nats per token, below which two faces hardly differ.

Measured: 0.42 and 0.24 for the clinic's two face pairs on its own pairs, 0.094 for `helpful` on a Llama of 260k
parameters that does not follow system prompts, over HH-RLHF pairs; this is the geometric mean of the last two. The
mean absolute gap separates them less well (0.081 and 0.048 against 0.033): faces that work decide a few tokens.
"""

_LADDER = tuple(step * 10.0**power for power in range(-7, 3) for step in (1, 3))  # ends of the bins of |gap|
_SIDE = 5  # bins of the histogram on either side of the middle one
_BEYOND = 1 / 1000  # the histogram goes as far as this share of the tokens
_ENDS = (*(-end for end in reversed(_LADDER)), *_LADDER)
_WORDS_KEPT = 100_000  # distinct spellings remembered; beyond twice as many, those that earned least are forgotten
# How tokenizers write the white space that a token begins with.
_MARKS = ("Ġ", "▁", "Ċ", "ĉ", " ", "\n", "\t", "<0x0A>")


class _GapSums:
    """Running sums over the gaps of pairs, in float64; rates are 0 where nothing was counted."""

    def __init__(self) -> None:
        self.pairs = self.tokens = 0
        self._positive = 0
        self._absolute = self._square = self._agreed = 0.0

    def add(self, chosen_T: Floats, rejected_T: Floats) -> None:
        """Count one pair."""
        sums = []
        for gaps_T in (chosen_T.astype(np.float64), rejected_T.astype(np.float64)):
            sums.append(float(gaps_T.sum()))
            self.tokens += len(gaps_T)
            self._positive += int((gaps_T > 0).sum())
            self._absolute += float(np.abs(gaps_T).sum())
            self._square += float(gaps_T @ gaps_T)
        self.pairs += 1
        self._agreed += float(1 + np.sign(sums[0] - sums[1])) / 2

    @property
    def mean_abs(self) -> float:
        """Mean |gap|, in nats per token."""
        return self._absolute / max(self.tokens, 1)

    @property
    def rms(self) -> float:
        """Root mean square gap, in nats per token."""
        return math.sqrt(self._square / max(self.tokens, 1))

    @property
    def share_positive(self) -> float:
        """The part of the tokens whose gap is above 0."""
        return self._positive / max(self.tokens, 1)

    @property
    def agreement(self) -> float:
        """The part of the pairs whose chosen response has the greater sum of gaps; ties count half."""
        return self._agreed / max(self.pairs, 1)


@dataclass(frozen=True, slots=True)
class FaceDifference:
    """How the two faces of one pair differ on this patient, over ``pairs`` pairs of ``tokens`` response tokens.

    ``rms_gap`` and ``mean_abs_gap`` are in nats per token. ``share_positive`` is the part of the tokens that the
    positive face finds likelier; ``agreement`` the part of the pairs whose chosen response has the greater sum of gaps
    (ties count half).
    """

    name: str
    rms_gap: float
    mean_abs_gap: float
    share_positive: float
    agreement: float
    pairs: int
    tokens: int

    @property
    def hardly(self) -> bool:
        """Whether the faces hardly differ, so that rewards drawn from them are mostly noise."""
        return self.rms_gap < HARDLY

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` says of it: how far the faces are apart."""
        return {
            "name": self.name,
            "rms_gap": self.rms_gap,
            "mean_abs_gap": self.mean_abs_gap,
            "hardly_differ": self.hardly,
        }

    def statistics(self) -> dict[str, float]:
        """What meta.json holds of it."""
        kept = {name: getattr(self, name) for name in ("mean_abs_gap", "share_positive", "agreement")}
        return {name: round(value, 6) for name, value in kept.items()}


class FaceDifferences:
    """Adds up, pair by pair, how the faces differ."""

    def __init__(self, faces: Sequence[str]) -> None:
        self._sums = {face: _GapSums() for face in faces}

    def add(self, pair: PairScores) -> None:
        """Count one pair."""
        for face, sums in self._sums.items():
            sums.add(gap(pair.chosen, face), gap(pair.rejected, face))

    def result(self) -> tuple[FaceDifference, ...]:
        """One record per face pair, in the order given; zeros where no pair was counted."""
        return tuple(
            FaceDifference(face, s.rms, s.mean_abs, s.share_positive, s.agreement, s.pairs, s.tokens)
            for face, s in self._sums.items()
        )


def face_differences(pairs: Iterable[PairScores], faces: Sequence[str]) -> tuple[FaceDifference, ...]:
    """How the two faces of every face pair differ over all ``pairs``."""
    counted = FaceDifferences(faces)
    for pair in pairs:
        counted.add(pair)
    return counted.result()


@dataclass(frozen=True, slots=True)
class Word:
    """A word, the sum of its rewards, and how often it had one."""

    text: str
    reward: float
    count: int


@dataclass(frozen=True, slots=True)
class Statistics:
    """Many pairs at given reward settings; gaps are in nats, weighted over the face pairs.

    ``share_rewarded`` is the part of the tokens with a reward above 0, ``share_punished`` below 0. ``gaps`` counts the
    tokens between consecutive ``edges`` (and beyond either end), which are chosen so that about a thousandth of the
    tokens are beyond. ``unit`` is that of the gaps. ``agreement`` is the part of the pairs whose chosen
    response has the greater sum of gaps (ties count half), ``token_agreement`` the part of the tokens with a reward
    whose gap has the sign of their side's label. ``rewarded`` and ``punished`` are the words that earned and lost most
    over all their occurrences.
    """

    pairs: int
    tokens: int
    share_rewarded: float
    share_punished: float
    mean_abs_gap: float
    rms_gap: float
    gaps: tuple[int, ...]
    agreement: float
    token_agreement: float
    rewarded: tuple[Word, ...]
    punished: tuple[Word, ...]
    edges: tuple[float, ...] = (-3.0, -1.0, -0.3, -0.1, -0.03, 0.03, 0.1, 0.3, 1.0, 3.0)
    unit: str = "nats"

    @property
    def measure(self) -> str:
        """What the histogram counts, with its unit."""
        return f"{'probe' if self.unit == 'log-odds' else 'gap'}, {self.unit}"

    def as_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        numbers = asdict(self)
        return {**numbers, "gap_edges": numbers.pop("edges")}


class RewardCounter:
    """Adds up `Statistics`, pair by pair, in constant memory.

    ``spellings`` [V] is how the tokenizer writes every token id (see `word_starts`), ``text_of`` turns ids into text,
    ``special`` are the ids that have no text. ``unit`` is that of the gaps: "nats", or "log-odds" for a probe.
    """

    def __init__(
        self,
        spellings: Sequence[str | None],
        text_of: Callable[[list[int]], str],
        special: Iterable[int] = (),
        unit: str = "nats",
    ) -> None:
        self._begins_V, self._alone_V = word_starts(spellings, special)
        self._text_of, self._unit = text_of, unit
        self._words: dict[bytes, list[float]] = {}
        self._sums = _GapSums()
        self._gaps = np.zeros(len(_ENDS) + 1, dtype=np.int64)
        self._rewarded = self._punished = self._alike = 0

    def add(self, chosen: TokenRewards, rejected: TokenRewards) -> None:
        """Count one pair."""
        self._sums.add(chosen.gaps, rejected.gaps)
        for item, label in ((chosen, 1), (rejected, -1)):
            self._gaps += np.bincount(np.searchsorted(_ENDS, item.gaps), minlength=len(self._gaps))
            self._rewarded += int((item.rewards > 0).sum())
            self._punished += int((item.rewards < 0).sum())
            self._alike += int((item.gaps[item.rewards != 0] * label > 0).sum())
            self._count_words(item)

    def _count_words(self, item: TokenRewards) -> None:
        """Add the reward of every word of a response to its spelling's sum."""
        ids = item.scores.response_ids
        if not item.rewards.any():
            return
        alone = self._alone_V[ids]
        starts = self._begins_V[ids] | alone
        starts[0] = True
        starts[1:] |= alone[:-1]  # after a word of its own another begins, whatever its spelling
        firsts = np.flatnonzero(starts)
        sums = np.add.reduceat(item.rewards.astype(np.float64), firsts)
        ends = [*firsts[1:].tolist(), len(ids)]
        for word in np.flatnonzero(sums).tolist():
            entry = self._words.setdefault(ids[firsts[word] : ends[word]].tobytes(), [0.0, 0])
            entry[0] += float(sums[word])
            entry[1] += 1
        if len(self._words) > 2 * _WORDS_KEPT:
            kept = heapq.nlargest(_WORDS_KEPT, self._words.items(), key=lambda item: abs(item[1][0]))
            self._words = dict(kept)

    def result(self, words: int = 12) -> Statistics:
        """What was counted so far, with the ``words`` most rewarded and most punished words."""
        sums, tokens, paid = self._sums, max(self._sums.tokens, 1), max(self._rewarded + self._punished, 1)
        spelt: dict[str, list[float]] = {}
        for key, (reward, count) in self._words.items():
            # Spellings of one word are added up: with and without the space before it, upper and lower case.
            entry = spelt.setdefault(self._text_of(np.frombuffer(key, np.int32).tolist()).strip().lower(), [0.0, 0])
            entry[0] += reward
            entry[1] += count
        spelt.pop("", None)
        gaps, edges = self._histogram()
        made = [Word(text, round(reward, 4), int(count)) for text, (reward, count) in spelt.items()]
        return Statistics(
            pairs=sums.pairs,
            tokens=sums.tokens,
            share_rewarded=self._rewarded / tokens,
            share_punished=self._punished / tokens,
            mean_abs_gap=sums.mean_abs,
            rms_gap=sums.rms,
            gaps=gaps,
            agreement=sums.agreement,
            token_agreement=self._alike / paid,
            rewarded=tuple(sorted((w for w in made if w.reward > 0), key=lambda w: (-w.reward, w.text))[:words]),
            punished=tuple(sorted((w for w in made if w.reward < 0), key=lambda w: (w.reward, w.text))[:words]),
            edges=edges,
            unit=self._unit,
        )

    def _histogram(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """The counts of the bins that the gaps fill, and the edges of these bins."""
        middle = len(_LADDER)  # bin of the gaps next to zero
        beyond_L = np.array(
            [self._gaps[: middle - i].sum() + self._gaps[middle + i + 1 :].sum() for i in range(middle)]
        )
        last = max(int((beyond_L > _BEYOND * self._gaps.sum()).sum()), _SIDE) - 1
        first = last - _SIDE + 1
        left = self._gaps[middle - last : middle - first].tolist()
        right = self._gaps[middle + first + 1 : middle + last + 1].tolist()
        counts = (
            int(self._gaps[: middle - last].sum()),
            *left,
            int(self._gaps[middle - first : middle + first + 1].sum()),
            *right,
            int(self._gaps[middle + last + 1 :].sum()),
        )
        ends = _LADDER[first : last + 1]
        return counts, (*(-end for end in reversed(ends)), *ends)


def word_starts(
    spellings: Sequence[str | None], special: Iterable[int] = ()
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """For every token id [V]: whether a word begins with it, and whether it is a word of its own.

    Punctuation and special tokens are words of their own.

    ``spellings`` are the tokenizer's own, in which a leading white space shows as Ġ, ▁ or itself.
    """
    begins = np.array([spelling is None or spelling.startswith(_MARKS) for spelling in spellings], dtype=np.bool_)
    alone = np.array([not any(map(str.isalnum, _bare(spelling))) for spelling in spellings], dtype=np.bool_)
    alone[list(special)] = True
    return begins, alone


def _bare(spelling: str | None) -> str:
    """A spelling without its marks of white space."""
    return (spelling or "").lstrip("Ġ▁Ċĉ \n\t").replace("Ċ", "").removeprefix("<0x0A>")


def margin(chosen: TokenRewards, rejected: TokenRewards) -> float:
    """Sum of gaps of the chosen response minus that of the rejected, in nats: below 0 the gap contradicts the label."""
    return float(chosen.gaps.sum(dtype=np.float64) - rejected.gaps.sum(dtype=np.float64))
