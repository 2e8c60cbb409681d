"""The Bradley-Terry fit of the human labels over face pairs: where the weights of direction "fitted" come from.

    P(a is preferred to b) = sigmoid(sum_j w_j x_j),   x_j = sum_t g_{j,t}(a) - sum_t g_{j,t}(b)

with g_{j,t} the signed importance of token t under face pair j (`formula.face_signal`). The paper (arXiv 2601.10416)
has one face pair and no fit.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from llmdoctor.errors import DataError
from llmdoctor.records import PairScores
from llmdoctor.settings import RewardSettings
from llmdoctor.token_rewards.formula import face_names, face_sums

Doubles = NDArray[np.float64]

_PRIOR_PRECISION = 1 / 5**2  # of a weight per standard deviation: a sixth of the information in one pair
_CHUNK = 1 << 20  # pairs x resamples held at once: 8 MB per temporary array, which also suits the processor's caches
_MAX_STEPS = 100
# The Poisson(1) count of each of 65,536 equally likely numbers: a look-up is eight times as fast as numpy's own draw.
_POISSON = np.searchsorted(
    np.cumsum([1 / math.e / math.factorial(k) for k in range(9)]), (np.arange(1 << 16) + 0.5) / (1 << 16)
).astype(np.uint8)


def face_weights(pairs: Iterable[PairScores], faces: Iterable[str], settings: RewardSettings) -> dict[str, float]:
    """The weight of every face pair: its Bradley-Terry coefficient for direction "fitted", otherwise 1 / F.

    Only "fitted" reads ``pairs``. Raises UsageError when ``settings.faces`` names a face pair that is not among
    ``faces``, and DataError when the log-probs to fit are not finite numbers.
    """
    names = face_names(faces, settings)
    if settings.direction != "fitted":
        return dict.fromkeys(names, 1.0 / len(names))
    features_P_F, _, _ = features(pairs, names, settings)
    return dict(zip(names, bradley_terry(features_P_F).tolist(), strict=True))


def features(
    pairs: Iterable[PairScores], names: Sequence[str], settings: RewardSettings
) -> tuple[Doubles, Doubles, list[str]]:
    """What the fit sees of each pair: x_j = sum_t g_{j,t}(chosen) - sum_t g_{j,t}(rejected) [P, F].

    Also the lengths of both responses in tokens [P, 2], and the ids of the pairs. Raises DataError that names the first
    pair whose log-probs are not finite.
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


def bradley_terry(features_P_F: Doubles) -> Doubles:
    """Weights w [F] that maximise sum_p log sigmoid(x_p . w) plus a weak prior, by Newton's method.

    ``features_P_F`` [P, F] is feature(preferred) - feature(rejected) of every pair. Under the prior, every weight times
    its feature's standard deviation is normal with mean 0 and standard deviation 5. The prior does not grow with P, so
    its pull vanishes with more pairs. It keeps the weights finite where a behaviour separates the labels perfectly, and
    splits them evenly between two behaviours that are the same. No pairs (P = 0), or a feature that is always 0, give a
    weight of 0.

    Raises DataError for features that are not finite numbers.
    """
    if features_P_F.ndim != 2 or features_P_F.size == 0:
        return np.zeros(features_P_F.shape[-1] if features_P_F.ndim == 2 else 0)
    if not np.isfinite(features_P_F).all():
        raise DataError("the features of the Bradley-Terry fit must be finite numbers: some are nan or infinite")
    scale_F = deviations(features_P_F)
    weights_F: Doubles = newton(features_P_F / scale_F, np.zeros((1, features_P_F.shape[1])))[0] / scale_F
    return weights_F


def deviations(x_P_F: Doubles) -> Doubles:
    """The standard deviation of each feature about zero [F]; 1 for a feature that is always zero.

    About zero, because which response comes first in a pair means nothing.
    """
    # Divide by the largest first: the squares of very small or very large floats would under- or overflow.
    largest_F = np.abs(x_P_F).max(axis=0)
    largest_F[largest_F == 0] = 1
    scale_F: Doubles = largest_F * np.sqrt(np.square(x_P_F / largest_F).mean(axis=0))
    scale_F[scale_F == 0] = 1
    return scale_F


def newton(z_P_F: Doubles, start_Q_F: Doubles, seed: int | None = None, tolerance: float = 1e-6) -> Doubles:
    """The weights [Q, F] of Q fits on standardised features, from ``start_Q_F``, all at once.

    With a ``seed`` the fits are bootstrap resamples: each has its own Poisson(1) count of every pair. The counts are
    drawn again from the same seeds in every pass over the pairs, so that Q x P numbers are never held at once.

    The fit ends after a step below ``tolerance`` in all weights: the error left is of the order of that step's square.
    """
    pairs, faces = z_P_F.shape
    weights_Q_F = start_Q_F.copy()
    # The curvature is symmetric: sum only its upper triangle, U = F (F + 1) / 2 numbers per fit.
    upper = np.triu_indices(faces)
    rows = max(1, _CHUNK // len(weights_Q_F))
    for _ in range(_MAX_STEPS):
        gradient_Q_F = -_PRIOR_PRECISION * weights_Q_F
        triangle_Q_U = np.zeros((len(weights_Q_F), len(upper[0])))
        for first in range(0, pairs, rows):
            z = z_P_F[first : first + rows]
            with np.errstate(over="ignore"):  # 1 / infinity is 0, the right answer
                wrong_P_Q = 1 / (1 + np.exp(z @ weights_Q_F.T))
            spread_P_Q = wrong_P_Q * (1 - wrong_P_Q)
            if seed is not None:
                random = np.random.default_rng([seed, first])
                counts_P_Q = _POISSON[random.integers(0, 1 << 16, wrong_P_Q.shape, dtype=np.uint16)]
                wrong_P_Q *= counts_P_Q
                spread_P_Q *= counts_P_Q
            gradient_Q_F += wrong_P_Q.T @ z
            triangle_Q_U += spread_P_Q.T @ (z[:, upper[0]] * z[:, upper[1]])
        curvature_Q_F_F = np.zeros((len(weights_Q_F), faces, faces))
        curvature_Q_F_F[:, upper[0], upper[1]] = triangle_Q_U
        curvature_Q_F_F[:, upper[1], upper[0]] = triangle_Q_U
        curvature_Q_F_F += _PRIOR_PRECISION * np.eye(faces)
        step_Q_F = np.linalg.solve(curvature_Q_F_F, gradient_Q_F[:, :, None])[:, :, 0]
        size_Q_1 = np.abs(step_Q_F).max(axis=1, keepdims=True)
        # No weight moves by more than 1 per step: a full step would overshoot on separable labels.
        weights_Q_F += step_Q_F / np.maximum(size_Q_1, 1)
        if size_Q_1.max() < tolerance:
            break
    return weights_Q_F


def shares(z_P_F: Doubles, weights_F: Doubles) -> Doubles:
    """How much of the gain of log-likelihood over chance each face pair brings: Shapley values, as parts of 1 [F].

    The gain of a subset S of face pairs is 1/2 v_S' A_SS^-1 v_S, with A the curvature at the fit and v = A w.
    """
    faces = len(weights_F)
    right_P = 0.5 * (1 + np.tanh(z_P_F @ weights_F / 2))
    curvature_F_F = (z_P_F * (right_P * (1 - right_P))[:, None]).T @ z_P_F + _PRIOR_PRECISION * np.eye(faces)
    pull_F = curvature_F_F @ weights_F
    # Row number n of [2^F, F] is the subset whose members are the bits of n.
    subsets = (np.arange(1 << faces)[:, None] >> np.arange(faces)) & 1 == 1
    sizes = subsets.sum(axis=1)
    gains = np.zeros(len(subsets))
    for size in range(1, faces + 1):
        rows = np.flatnonzero(sizes == size)
        members = np.nonzero(subsets[rows])[1].reshape(-1, size)
        solved = np.linalg.solve(curvature_F_F[members[:, :, None], members[:, None, :]], pull_F[members][:, :, None])
        gains[rows] = (pull_F[members] * solved[:, :, 0]).sum(axis=1) / 2
    if gains[-1] <= 0:
        return np.zeros(faces)
    # The probability that, in a random order, exactly the members of a subset of this size come before face pair j.
    chances = np.array([1 / (faces * math.comb(faces - 1, size)) for size in range(faces)])
    shares_F = np.zeros(faces)
    for j in range(faces):
        without = np.flatnonzero(~subsets[:, j])
        shares_F[j] = chances[sizes[without]] @ (gains[without | 1 << j] - gains[without])
    shares_F = np.maximum(shares_F, 0)  # rounding may leave a tiny negative number
    return np.asarray(shares_F / shares_F.sum())
