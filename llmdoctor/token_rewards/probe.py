"""A linear probe of the patient's hidden states that predicts which answers people prefer, and its reward per token.

    P(a is preferred to b) = sigmoid(R(a) - R(b)),   R(y) = 1/T sum_t v_t,   v_t = sum_d w_d . (h_{d,t} - m_d)

with h_{d,t} the state of kept layer d behind token y_t, divided by its root mean square, m_d its mean, and w the
Bradley-Terry fit with a ridge penalty. Nothing in the paper (arXiv 2601.10416) is like it. It draws the rewards from
the frozen patient all the same.

The token reward of direction "probe" is r_t = v_t / (mean T): over an answer of usual length it adds up to the log-odds
of that answer, so that rho is the inverse KL coefficient of RLHF.

That credits a token with its own state alone. The token reward of direction "advantage" also credits it with what it
changes in what the rest of the answer is expected to bring, as the advantage of reinforcement learning does:

    r_t = v_t / T + V_t - V_{t-1},   V_t = (T - t) / T (f . h_t + c)

with h_t the state of the middle kept layer behind y_t (h_0 behind the prompt), and f, c the ridge regression of what
the rest brings, sum_{s > t} v_s / T, at all places. V_T = 0, so these rewards add up to R(y) - V_0 exactly.

Every pair is scored by a probe that has not seen its prompt: the pairs are split by prompt into ``FOLDS`` parts, and
the rewards of each come from a fit on the others (V from the values that this fit gives). All kept layers are fitted
together, so that none has to be chosen.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from llmdoctor.errors import DataError, LoadError
from llmdoctor.files import atomic_path
from llmdoctor.records import Floats
from llmdoctor.tensors import read_tensors
from llmdoctor.token_rewards.fit import Doubles

FOLDS = 10
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_RANK = 256  # principal coordinates in which the fit is made: with fewer pairs than that it loses nothing
_INNER = 3  # parts of the other folds, by which a fold's ridge is chosen
_LEAST = 20
_TENSORS = ("layers", "centre", "whole", "without", "tokens", "ridges")
_STIFF = 0.1  # ridge of the forecast, times the sum of ((T - t) / T)^2 over all places


@dataclass(frozen=True, slots=True)
class Probe:
    """Directions on the states of ``layers`` (0 is the embedding), and how well they predict held-out pairs.

    ``whole_D_H`` is fitted on all pairs, ``without_D_H[k]`` on all but those of fold k; ``centre_D_H`` is the mean
    state. ``tokens`` is the mean length of a response, ``ridges`` are the penalties chosen: of all pairs, then by fold.
    """

    layers: tuple[int, ...]
    centre_D_H: Floats
    whole_D_H: Floats
    without_D_H: tuple[Floats, ...]
    tokens: float
    ridges: tuple[float, ...]

    def rewards(self, states_D_T_H: Floats, fold: int | None = None) -> Floats:
        """r_t of the tokens behind which these states are [T]; by the fit without ``fold``, or the whole one."""
        direction_D_H = self.whole_D_H if fold is None else self.without_D_H[fold]
        values_T = np.einsum("dth,dh->t", states_D_T_H - self.centre_D_H[:, None], direction_D_H)
        return np.asarray(values_T / self.tokens, dtype=np.float32)

    def values(self, states_D_T_H: Floats) -> Floats:
        """v_t of these tokens by every fit, log-odds [K = 1 + FOLDS, T]: the whole one, then that without each fold."""
        directions_K_D_H = np.stack([self.whole_D_H, *self.without_D_H])
        return np.tensordot(directions_K_D_H, states_D_T_H - self.centre_D_H[:, None], axes=([1, 2], [0, 2]))

    def save(self, path: Path) -> None:
        """Write it as a safetensors file, atomically. Raises StorageError."""
        tensors = {
            "centre": self.centre_D_H,
            "whole": self.whole_D_H,
            "without": np.stack(self.without_D_H),
            "layers": np.array(self.layers, dtype=np.int64),
            "tokens": np.array([self.tokens]),
            "ridges": np.array(self.ridges),
        }
        with atomic_path(path) as temporary:
            save_file({name: torch.from_numpy(np.ascontiguousarray(t)) for name, t in tensors.items()}, temporary)

    @classmethod
    def load(cls, path: Path) -> "Probe":
        """Read what `save` wrote. Raises LoadError."""
        try:
            held = {name: tensor.numpy() for name, tensor in read_tensors(path, _TENSORS).items()}
            depth, width = held["whole"].shape
            shapes = [held["centre"].shape, *(one.shape for one in held["without"])]
            if len(held["layers"]) != depth or any(shape != (depth, width) for shape in shapes):
                raise ValueError("its directions have different shapes")
            return cls(
                tuple(held["layers"].tolist()),
                held["centre"],
                held["whole"],
                tuple(held["without"]),
                float(held["tokens"][0]),
                tuple(held["ridges"].tolist()),
            )
        except (LoadError, ValueError, IndexError, TypeError) as error:
            raise LoadError(f"cannot read the probe {path}: {error}. Delete it and run extract again") from error


def middle(layers: Sequence[int]) -> int:
    """The place among the kept layers of the one whose states forecast what the rest of an answer brings."""
    return len(layers) // 2


def require_pairs(count: int) -> None:
    """Raise DataError for too few pairs to fit a probe to."""
    if count < _LEAST:
        raise DataError(
            f"a probe needs at least {_LEAST} pairs (some hundreds to be of use), got {count}: extract more"
        )


def fold_of(prompts: Sequence[NDArray[np.int32]]) -> NDArray[np.int64]:
    """The fold of every pair [P], from 0 to ``FOLDS`` - 1, all pairs of a prompt in one.

    It depends on the prompts alone, whatever their order. Fewer prompts than folds cannot be kept apart: then the pairs
    go to the folds in turn, and the held-out accuracy is too high.
    """
    keys = [prompt.tobytes() for prompt in prompts]
    distinct = sorted(set(keys), key=lambda key: hashlib.sha256(key).digest())
    if len(distinct) < FOLDS:
        return np.arange(len(keys)) % FOLDS
    fold = {key: i % FOLDS for i, key in enumerate(distinct)}
    return np.array([fold[key] for key in keys])


@dataclass(frozen=True, slots=True)
class Moments:
    """What the regression of the forecast needs, summed over the places of some responses.

    x_t = (T - t) / T (h_t, 1) [X = H + 1] at the places 0 (behind the prompt) to T. ``gram_X_X`` is the sum of their
    outer products, ``right_K_X`` that of x_t sum_{s > t} v_s / T, with the values v of each of K fits.
    """

    gram_X_X: NDArray[Any]
    right_K_X: NDArray[Any]

    @classmethod
    def of(cls, states_S_H: Floats, values_K_T: Floats) -> "Moments":
        """Those of one response: its states behind the prompt and each of its T tokens, S = T + 1."""
        x_S_X, count = _left(states_S_H), values_K_T.shape[1]
        before_K_S = np.pad(values_K_T.cumsum(axis=1), ((0, 0), (1, 0)))
        return cls(x_S_X.T @ x_S_X, (before_K_S[:, -1:] - before_K_S) / count @ x_S_X)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.gram_X_X + other.gram_X_X, self.right_K_X + other.right_K_X)

    def solve(self) -> Floats:
        """f and c for the values of each fit [K, X]: the ridge regression, with c free."""
        penalty_X = np.full(len(self.gram_X_X), _STIFF * float(self.gram_X_X[-1, -1]))
        penalty_X[-1] = 0
        found_X_K = np.linalg.solve(self.gram_X_X.astype(np.float64) + np.diag(penalty_X), self.right_K_X.T)
        return np.ascontiguousarray(found_X_K.T, dtype=np.float32)  # safetensors writes another order without a word


def advantages(values_T: Floats, states_S_H: Floats, forecast_X: Floats) -> Floats:
    """r_t of direction "advantage" [T]: from v_t, log-odds, and the states behind the prompt and every token [S]."""
    return np.asarray(values_T / len(values_T) + np.diff(_left(states_S_H) @ forecast_X), dtype=np.float32)


def _left(states_S_H: Floats) -> Floats:
    """The states, with a 1 behind each, times the share of the answer that is still to come [S, X]."""
    count = len(states_S_H) - 1
    share_S_1 = ((count - np.arange(count + 1)) / count).astype(states_S_H.dtype)[:, None]
    return np.concatenate([states_S_H, np.ones_like(share_S_1)], axis=1) * share_S_1


def fit(
    chosen_P_D_H: NDArray[Any],
    rejected_P_D_H: NDArray[Any],
    fold_P: NDArray[np.int64],
    layers: Sequence[int],
    tokens: float,
) -> tuple[Probe, Doubles]:
    """The probe of these mean states, and its margin R(chosen) - R(rejected) for every pair, seen by no fit of it [P].

    Margins are in log-odds. Raises DataError for fewer than 20 pairs, or states that are not finite.
    """
    pairs, depth, width = chosen_P_D_H.shape
    require_pairs(pairs)
    centre_D_H = (chosen_P_D_H.mean(axis=0, dtype=np.float64) + rejected_P_D_H.mean(axis=0, dtype=np.float64)) / 2
    difference_P_D_H = chosen_P_D_H.astype(np.float32) - rejected_P_D_H.astype(np.float32)
    if not np.isfinite(difference_P_D_H).all():
        raise DataError("the patient's states are not finite numbers: run extract again, in float32 or bfloat16")
    # every layer with the same weight: later states are no larger than others, but differ more
    scale_D = np.sqrt(np.square(difference_P_D_H).sum(axis=2).mean(axis=0)) * np.sqrt(depth)
    scale_D[scale_D == 0] = 1
    x_P_X = (difference_P_D_H / scale_D[:, None]).reshape(pairs, depth * width)
    z_P_Z, basis_X_Z = _principal(x_P_X)

    def direction(weights_Z: Doubles) -> Floats:
        return np.asarray((basis_X_Z @ weights_Z).reshape(depth, width) / scale_D[:, None], dtype=np.float32)

    margins_P, without, ridges = np.zeros(pairs), [], []
    for fold in range(FOLDS):
        other_P = fold_P != fold
        ridge = _best_ridge(z_P_Z[other_P], fold_P[other_P])
        weights_Z = bradley_terry_ridge(z_P_Z[other_P], ridge)
        margins_P[~other_P] = z_P_Z[~other_P] @ weights_Z
        without.append(direction(weights_Z))
        ridges.append(ridge)
    ridge = _best_ridge(z_P_Z, fold_P)
    whole_D_H = direction(bradley_terry_ridge(z_P_Z, ridge))
    probe = Probe(
        tuple(layers),
        centre_D_H.astype(np.float32),
        whole_D_H,
        tuple(without),
        tokens,
        (ridge, *ridges),
    )
    return probe, margins_P


def _principal(x_P_X: Floats) -> tuple[Doubles, Doubles]:
    """Principal coordinates of the rows about zero [P, Z], and the basis [X, Z] that gives them.

    The fit with a ridge is the same in any orthonormal basis that spans the rows. With more than ``_RANK`` pairs the
    directions of least spread, which a ridge shrinks most, are left out.
    """
    # a generator of its own: the draws of svd_lowrank must neither vary nor move the caller's
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, basis = torch.svd_lowrank(torch.from_numpy(x_P_X).double(), q=min(_RANK, *x_P_X.shape), niter=4)
    basis_X_Z: Doubles = basis.numpy()
    return x_P_X @ basis_X_Z, basis_X_Z


def bradley_terry_ridge(z_P_Z: Doubles, ridge: float) -> Doubles:
    """Weights [Z] that maximise sum_p log sigmoid(z_p . w) - ridge/2 |w|^2, by Newton's method."""
    weights_Z = np.zeros(z_P_Z.shape[1])
    for _ in range(50):
        wrong_P = 0.5 * (1 - np.tanh(z_P_Z @ weights_Z / 2))
        gradient_Z = z_P_Z.T @ wrong_P - ridge * weights_Z
        curvature_Z_Z = (z_P_Z * (wrong_P * (1 - wrong_P))[:, None]).T @ z_P_Z
        curvature_Z_Z[np.diag_indices_from(curvature_Z_Z)] += ridge
        step_Z = np.linalg.solve(curvature_Z_Z, gradient_Z)
        # the margins of no pair move by more than 5 at once: a full step may overshoot on separable labels
        weights_Z += step_Z / max(1.0, np.abs(z_P_Z @ step_Z).max(initial=0.0) / 5)
        if np.abs(z_P_Z @ step_Z).max(initial=0.0) < 1e-5:
            break
    return weights_Z


def _best_ridge(z_P_Z: Doubles, fold_P: NDArray[np.int64]) -> float:
    """The ridge of the greatest held-out log-likelihood; the parts held out are made of whole folds."""
    part_P = fold_P % _INNER
    gained = []
    for ridge in RIDGES:
        total = 0.0
        for part in range(_INNER):
            own_P = part_P == part
            margins_P = z_P_Z[own_P] @ bradley_terry_ridge(z_P_Z[~own_P], ridge)
            total -= float(np.logaddexp(0, -margins_P).sum())
        gained.append(total)
    return RIDGES[int(np.argmax(gained))]
