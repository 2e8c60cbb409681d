"""Which behaviours the preferences reward: the Bradley-Terry fit of the human labels over face pairs, and its doubts.

    P(a is preferred to b) = sigmoid(sum_j w_j x_j),   x_j = sum_t g_{j,t}(a) - sum_t g_{j,t}(b)

with g_{j,t} the signed importance of token t under face pair j (`formula.face_signal`). The paper (arXiv 2601.10416)
has one face pair and no fit; this is direction "fitted" and what can be known about it before training.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdoctor.errors import DataError, UsageError
from llmdoctor.records import PairScores
from llmdoctor.settings import RewardSettings
from llmdoctor.token_rewards.formula import face_names, face_sums

Doubles = NDArray[np.float64]

_PRIOR_PRECISION = 1 / 5**2  # of a weight per standard deviation: a sixth of what one pair tells about it
_CHUNK = 1 << 20  # pairs x resamples held at once: 8 MB a temporary array, which also suits the processor's caches
_Z = 1.959963984540054  # of a two-sided 95% interval
_EXAMPLES = 3
_MOST_FACES = 16  # the shares look at every subset of the face pairs
_FEW_PAIRS = 100
_STEPS = 100
# A Poisson(1) count of each of 65,536 equally likely numbers: eight times as fast as numpy's own draw.
_POISSON = np.searchsorted(
    np.cumsum([1 / math.e / math.factorial(k) for k in range(9)]), (np.arange(1 << 16) + 0.5) / (1 << 16)
).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95% interval."""

    value: float
    low: float
    high: float

    def covers(self, value: float) -> bool:
        """Whether the value lies in the interval, ends included."""
        return self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Example:
    """A pair and what one face pair says about it: w_j x_pj, in log-odds of the answer that people preferred."""

    pair_id: str
    contribution: float


@dataclass(frozen=True, slots=True)
class FaceDiagnosis:
    """What one behaviour weighs in the labels.

    ``weight`` is w_j: log-odds for one unit more of summed signed importance, what direction "fitted" multiplies it
    with. ``standardised`` is the same for one standard deviation of x_j among these pairs (``scale``; about zero, for
    which answer comes first means nothing), which compares behaviours. ``share`` in [0, 1] is the part of the explained
    preference that falls to this face pair; ``agreement`` the part of the pairs whose preferred answer shows more of
    the behaviour (ties count half). ``best`` and ``worst`` are the pairs that it explains best, and contradicts most.
    """

    name: str
    weight: Estimate
    standardised: Estimate
    scale: float
    share: float
    agreement: float
    best: tuple[Example, ...]
    worst: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Which behaviours a set of preferences rewards, how surely, and whether that predicts pairs not seen.

    ``accuracy``, ``length_accuracy`` and ``combined_accuracy`` are the parts of held-out pairs that are predicted from
    the face pairs, from the lengths of the answers alone, and from both (ties count half; ``chance`` is 0.5).
    ``beyond_length`` is ``accuracy`` - ``length_accuracy``, ``added_to_length`` ``combined_accuracy`` -
    ``length_accuracy``; ``longer_preferred`` is the part of the pairs whose preferred answer has more tokens.
    ``explains`` says whether the face pairs explain anything, ``verdict`` all of it in words.
    """

    pairs: int
    faces: tuple[FaceDiagnosis, ...]
    accuracy: Estimate
    length_accuracy: Estimate
    combined_accuracy: Estimate
    beyond_length: Estimate
    added_to_length: Estimate
    longer_preferred: float
    chance: float
    explains: bool
    verdict: str
    settings: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return asdict(self)


def bradley_terry(features_P_F: Doubles) -> Doubles:
    """Weights w [F] that maximise sum_p log sigmoid(x_p . w) plus a weak prior, by Newton's method.

    ``features_P_F`` [P, F] is feature(preferred) - feature(rejected) of every pair. The prior takes every weight times
    its feature's standard deviation as normal with mean 0 and standard deviation 5. It does not grow with P, so its
    pull on the weights vanishes with more pairs; it keeps them finite where a behaviour separates the labels perfectly,
    and shares them out where two behaviours are the same. [P, F] with P = 0 gives zeros, as does a feature that is 0.

    Raises DataError for features that are not finite numbers.
    """
    if features_P_F.ndim != 2 or len(features_P_F) == 0:
        return np.zeros(features_P_F.shape[-1] if features_P_F.ndim == 2 else 0)
    if not np.isfinite(features_P_F).all():
        raise DataError("the features of the Bradley-Terry fit must be finite numbers: some are nan or infinite")
    scale_F = _scale(features_P_F)
    weights_F: Doubles = _newton(features_P_F / scale_F, np.zeros((1, features_P_F.shape[1])))[0] / scale_F
    return weights_F


def diagnose(
    pairs: Iterable[PairScores],
    faces: Iterable[str],
    settings: RewardSettings,
    *,
    seed: int = 0,
    resamples: int = 1000,
    folds: int = 10,
) -> Diagnosis:
    """Fit the labels of ``pairs`` over ``faces`` (or over ``settings.faces``) and say what that tells, and how surely.

    Pairs are streamed: only their features, lengths and ids are kept. The fit and the weights are those of direction
    "fitted" at the same ``settings``, whatever their own direction. The same arguments give the same diagnosis.

    - Weights: 2.5th to 97.5th percentile of ``resamples`` refits, each to convergence, with every pair's count drawn
      from Poisson(1): the bootstrap over pairs, without its fixed total, which the fit does not feel.
    - Accuracies: ``folds``-fold cross-validation over shuffled pairs; Wilson's interval, that of the paired mean for
      differences. The length feature is log(tokens preferred / tokens rejected).
    - Shares: the Shapley value of each face pair in the gain of log-likelihood over chance, as if in the quadratic form
      that Newton's last step solves (for least squares this is known as LMG): the gain that the face pair brings when
      it joins the others, averaged over all orders of joining. None is negative, and they add up to 1, or are all 0.

    Raises DataError (fewer than 2 pairs, log-probs that are not finite) and UsageError (an unknown face pair, more than
    16 of them, a setting out of range).
    """
    names = face_names(faces, settings)
    if len(names) > _MOST_FACES:
        raise UsageError(
            f"expected at most {_MOST_FACES} face pairs to diagnose, got {len(names)}: choose some of them"
        )
    if resamples < 1 or folds < 2 or seed < 0:
        raise UsageError(
            f"expected resamples >= 1, folds >= 2 and seed >= 0, got {resamples}, {folds} and {seed}: change them"
        )
    x_P_F, lengths_P_2, ids = features(pairs, names, settings)
    if len(ids) < 2:
        raise DataError(f"a diagnosis needs at least 2 pairs (some hundreds to say much), got {len(ids)}: extract more")
    scale_F = _scale(x_P_F)
    z_P_F = x_P_F / scale_F
    weights_F = bradley_terry(x_P_F)
    resampled_R_F = _newton(z_P_F, np.tile(weights_F * scale_F, (resamples, 1)), seed, enough=1e-3)
    low_F, high_F = np.percentile(resampled_R_F, [2.5, 97.5], axis=0)
    shares_F = _shares(z_P_F, weights_F * scale_F)
    diagnosed = tuple(
        FaceDiagnosis(
            name=name,
            weight=Estimate(float(weights_F[j]), float(low_F[j] / scale_F[j]), float(high_F[j] / scale_F[j])),
            standardised=Estimate(float(weights_F[j] * scale_F[j]), float(low_F[j]), float(high_F[j])),
            scale=float(scale_F[j]) if x_P_F[:, j].any() else 0.0,
            share=float(shares_F[j]),
            agreement=float(_correct(x_P_F[:, j]).mean()),
            best=_examples(ids, -weights_F[j] * x_P_F[:, j], -1.0),
            worst=_examples(ids, weights_F[j] * x_P_F[:, j], 1.0),
        )
        for j, name in enumerate(names)
    )
    longer_P = np.log(lengths_P_2[:, 0] / lengths_P_2[:, 1])
    fold_P = np.random.default_rng(seed).permutation(len(ids)) % folds
    by_faces, by_length, by_both = (
        _held_out(x, fold_P) for x in (x_P_F, longer_P[:, None], np.column_stack([x_P_F, longer_P]))
    )
    accuracy = _wilson(by_faces)
    used = {"tau": settings.tau, "theta": settings.theta, "eps": settings.eps}
    used |= {"seed": seed, "resamples": resamples, "folds": min(folds, len(ids))}
    found = Diagnosis(
        pairs=len(ids),
        faces=diagnosed,
        accuracy=accuracy,
        length_accuracy=_wilson(by_length),
        combined_accuracy=_wilson(by_both),
        beyond_length=_paired(by_faces - by_length),
        added_to_length=_paired(by_both - by_length),
        longer_preferred=float(_correct(longer_P).mean()),
        chance=0.5,
        explains=accuracy.low > 0.5 and not all(face.weight.covers(0) for face in diagnosed),
        verdict="",
        settings=used,
    )
    return replace(found, verdict=_verdict(found))


def features(
    pairs: Iterable[PairScores], names: Sequence[str], settings: RewardSettings
) -> tuple[Doubles, Doubles, list[str]]:
    """Of every pair: x_j = sum_t g_{j,t}(preferred) - sum_t g_{j,t}(rejected) [P, F], both lengths [P, 2], and its id.

    Raises DataError naming the first pair whose log-probs are not finite.
    """
    x: list[Doubles] = []
    lengths: list[tuple[int, int]] = []
    ids: list[str] = []
    for pair in pairs:
        row_F = face_sums(pair.chosen, names, settings) - face_sums(pair.rejected, names, settings)
        if not (finite_F := np.isfinite(row_F)).all():
            bad = names[int(finite_F.argmin())]
            raise DataError(
                f"pair {pair.chosen.pair_id}: expected finite log-probs under face pair {bad!r}, got nan or infinity: "
                "run extract again, in float32 or bfloat16 if it ran in float16"
            )
        x.append(row_F)
        lengths.append((max(1, len(pair.chosen.response_ids)), max(1, len(pair.rejected.response_ids))))
        ids.append(pair.chosen.pair_id)
    return np.array(x).reshape(-1, len(names)), np.array(lengths, dtype=np.float64).reshape(-1, 2), ids


def _scale(x_P_F: Doubles) -> Doubles:
    """The standard deviation of each feature about zero [F]; 1 for one that is zero everywhere."""
    largest_F = np.abs(x_P_F).max(axis=0)
    largest_F[largest_F == 0] = 1  # divided out first: squares of the smallest and greatest floats would be lost
    scale_F: Doubles = largest_F * np.sqrt(np.square(x_P_F / largest_F).mean(axis=0))
    scale_F[scale_F == 0] = 1
    return scale_F


def _newton(z_P_F: Doubles, start_R_F: Doubles, seed: int | None = None, enough: float = 1e-6) -> Doubles:
    """The weights [R, F] of R fits on standardised features, from ``start_R_F``, all at once.

    With a ``seed``, each fit has its own Poisson(1) count of every pair, drawn anew in each pass over the pairs from
    the same seeds, so that R x P numbers never exist at once. It ends after a step below ``enough`` in all weights:
    what is then left is of the order of that step's square.
    """
    pairs, faces = z_P_F.shape
    weights = start_R_F.copy()
    upper = np.triu_indices(faces)
    rows = max(1, _CHUNK // len(weights))
    for _ in range(_STEPS):
        gradient = -_PRIOR_PRECISION * weights
        triangle = np.zeros((len(weights), len(upper[0])))
        for first in range(0, pairs, rows):
            z = z_P_F[first : first + rows]
            with np.errstate(over="ignore"):  # 1 / infinity is the 0 that is meant
                wrong = 1 / (1 + np.exp(z @ weights.T))
            spread = wrong * (1 - wrong)
            if seed is not None:
                draw = np.random.default_rng([seed, first]).integers(0, 1 << 16, wrong.shape, dtype=np.uint16)
                counts = _POISSON[draw]
                wrong *= counts
                spread *= counts
            gradient += wrong.T @ z
            triangle += spread.T @ (z[:, upper[0]] * z[:, upper[1]])
        curvature = np.zeros((len(weights), faces, faces))
        curvature[:, upper[0], upper[1]] = triangle
        curvature[:, upper[1], upper[0]] = triangle
        step = np.linalg.solve(curvature + _PRIOR_PRECISION * np.eye(faces), gradient[:, :, None])[:, :, 0]
        size = np.abs(step).max(axis=1, keepdims=True)
        weights += step / np.maximum(size, 1)  # at most 1 a step: no overshoot on separable labels
        if size.max() < enough:
            break
    return weights


def _shares(z_P_F: Doubles, weights_F: Doubles) -> Doubles:
    """Shapley values of the gain 1/2 v_S' A_SS^-1 v_S [F], A the curvature at the fit and v = A w, as parts of 1."""
    faces = len(weights_F)
    right = 0.5 * (1 + np.tanh(z_P_F @ weights_F / 2))
    curvature = (z_P_F * (right * (1 - right))[:, None]).T @ z_P_F + _PRIOR_PRECISION * np.eye(faces)
    pull = curvature @ weights_F
    subsets = (np.arange(1 << faces)[:, None] >> np.arange(faces)) & 1 == 1  # [2^F, F]: bit j of the row's number
    gains = np.zeros(len(subsets))
    for size in range(1, faces + 1):
        rows = np.flatnonzero(subsets.sum(axis=1) == size)
        members = np.nonzero(subsets[rows])[1].reshape(-1, size)
        solved = np.linalg.solve(curvature[members[:, :, None], members[:, None, :]], pull[members][:, :, None])
        gains[rows] = (pull[members] * solved[:, :, 0]).sum(axis=1) / 2
    if gains[-1] <= 0:
        return np.zeros(faces)
    sizes = subsets.sum(axis=1)
    chances = np.array([1 / (faces * math.comb(faces - 1, size)) for size in range(faces)])  # of joining just then
    shares = np.zeros(faces)
    for j in range(faces):
        without = np.flatnonzero(~subsets[:, j])
        shares[j] = chances[sizes[without]] @ (gains[without | 1 << j] - gains[without])
    shares = np.maximum(shares, 0)  # a rounding error below zero
    return np.asarray(shares / shares.sum())


def _correct(margins_P: Doubles) -> Doubles:
    """1 where the margin is on the label's side, 0 where it is not, half for a tie."""
    return np.asarray((1 + np.sign(margins_P)) / 2)


def _held_out(x_P_F: Doubles, fold_P: NDArray[np.int64]) -> Doubles:
    """Whether each pair is predicted by the fit on the other folds [P]."""
    correct = np.empty(len(x_P_F))
    for fold in np.unique(fold_P):
        own = fold_P == fold
        correct[own] = _correct(x_P_F[own] @ bradley_terry(x_P_F[~own]))
    return correct


def _wilson(correct_P: Doubles) -> Estimate:
    """The mean of zeros, halves and ones, with Wilson's interval."""
    n, p = len(correct_P), float(correct_P.mean())
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def _paired(differences_P: Doubles) -> Estimate:
    mean = float(differences_P.mean())
    half = _Z * float(differences_P.std(ddof=1)) / math.sqrt(len(differences_P))
    return Estimate(mean, mean - half, mean + half)


def _examples(ids: Sequence[str], order_P: Doubles, sign: float) -> tuple[Example, ...]:
    """The pairs that come first in ``order_P``, as far as they lie below zero there."""
    first = np.argsort(order_P, kind="stable")[:_EXAMPLES]
    return tuple(Example(ids[p], sign * float(order_P[p])) for p in first if order_P[p] < 0)


def _verdict(found: Diagnosis) -> str:
    accuracy, length_accuracy, chance = found.accuracy, found.length_accuracy, found.chance
    clear = sorted(
        (face for face in found.faces if not face.weight.covers(0)), key=lambda face: -abs(face.standardised.value)
    )
    length_speaks = length_accuracy.low > chance
    longer = "longer" if found.longer_preferred > 0.5 else "shorter"
    length = f"Length alone predicts {_percent(length_accuracy)} ({longer} answers are preferred)"
    said = []
    if not clear and accuracy.low > chance:
        said.append(
            f"No single face is sure to explain the preferences: every weight's interval covers zero, though together "
            f"they predict {_percent(accuracy)} of held-out pairs, where chance is 50%. They may overlap: try fewer."
        )
    elif not found.explains:
        said.append(
            f"These faces do not explain the preferences: they predict {_percent(accuracy)} of held-out pairs, "
            "where chance is 50%, and " + ("every" if not clear else "not every") + " weight's interval covers zero."
        )
        if clear and accuracy.covers(chance):
            said.append(f"A slight effect of {_listed([face.name for face in clear])} may show with more pairs.")
    else:
        for word, sign in (("reward", 1), ("punish", -1)):
            if behaviours := [face for face in clear if face.weight.value * sign > 0]:
                said.append(f"These preferences {word} {_listed([_weighed(face) for face in behaviours])}.")
        said.append(f"The faces predict {_percent(accuracy)} of held-out pairs, where chance is 50%.")
        if length_speaks and found.beyond_length.low <= 0:
            said.append(f"But response length alone explains as much or more: {length[0].lower()}{length[1:]}.")
            if found.added_to_length.low > 0:
                said.append(f"Beside length the faces still add {100 * found.added_to_length.value:.1f} points.")
            else:
                said.append("Beside length the faces add nothing certain: these weights may be length in disguise.")
        elif length_speaks:
            said.append(f"{length}: the faces explain more than that.")
        else:
            said.append(f"Length alone predicts {_percent(length_accuracy)}, no better than chance.")
    if length_speaks and not found.explains:
        said.append(f"{length}.")
    if found.pairs < _FEW_PAIRS:
        said.append(f"With only {found.pairs} pairs all of this is rough.")
    return " ".join(said)


def _percent(part: Estimate) -> str:
    return f"{100 * part.value:.1f}% ({100 * part.low:.1f} to {100 * part.high:.1f})"


def _weighed(face: FaceDiagnosis) -> str:
    weight = face.weight
    return f"{face.name} (weight {weight.value:+.3g}, {weight.low:+.3g} to {weight.high:+.3g}, share {face.share:.0%})"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
