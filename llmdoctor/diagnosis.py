"""Which behaviours the preferences reward: the Bradley-Terry fit of the human labels over face pairs."""

import numpy as np
from numpy.typing import NDArray


def bradley_terry(features_P_F: NDArray[np.float64], ridge: float = 1e-3, steps: int = 50) -> NDArray[np.float64]:
    """Weights w [F] that maximise sum_p log sigmoid(x_p . w) - P * ridge / 2 * |w|^2, by Newton's method.

    ``features_P_F`` [P, F] is feature(preferred) - feature(rejected) of every pair. The small ridge keeps w finite
    where a behaviour separates the labels perfectly. [P, F] with P = 0 gives zeros.
    """
    pairs, faces = features_P_F.shape if features_P_F.ndim == 2 else (0, 0)
    weights = np.zeros(faces)
    for _ in range(steps if pairs else 0):
        # sigmoid(-margin), written so that large margins do not overflow
        wrong = 0.5 * (1 - np.tanh(features_P_F @ weights / 2))
        gradient = features_P_F.T @ wrong - pairs * ridge * weights
        curvature = (features_P_F * (wrong * (1 - wrong))[:, None]).T @ features_P_F
        step = np.linalg.solve(curvature + pairs * ridge * np.eye(faces), gradient)
        weights += step / max(1.0, float(np.abs(step).max()))  # at most 1 a step: no overshoot on separable labels
        if np.abs(step).max() < 1e-10:
            break
    return weights
