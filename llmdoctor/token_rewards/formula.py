"""Stage 1's formula: from the patient's two log-probabilities of a token to its reward (arXiv 2601.10416, section 3.1).

    gap_t = log pi_pos(y_t) - log pi_neg(y_t)
    S_t   = tanh(|gap_t| / (mean_j |gap_j| + eps) / tau)
    r_t   = direction_t * S_t * 1[S_t > theta]

Departure from the paper: ``direction`` may be the sign of the gap itself (and is, by default), not only the label of
the whole response; see README for what that changes. Several face pairs are averaged, or weighted by the fit.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llmdoctor.errors import UsageError
from llmdoctor.records import Floats, TokenRewards, TokenScores
from llmdoctor.settings import RewardSettings


def gap(scores: TokenScores, face: str) -> Floats:
    """Log pi_pos - log pi_neg of every response token under one face pair [T], nats."""
    return scores.positive[face] - scores.negative[face]


def importance(gaps: Floats, scale: float | Floats, tau: float) -> Floats:
    """S_t = tanh(|gap_t| / scale / tau) [T], in [0, 1); ``scale`` is the response's mean |gap| + eps."""
    return np.tanh(np.abs(gaps) / scale / tau).astype(np.float32)


def face_signal(scores: TokenScores, face: str, settings: RewardSettings, *, alternative: bool = False) -> Floats:
    """The signed, pruned importance g_t = sign(gap_t) S_t 1[S_t > theta] under one face pair [T], in (-1, 1).

    With ``alternative`` it is that of the alternative token at each position, on the scale of the response itself.
    """
    gaps = gap(scores, face)
    scale = float(np.abs(gaps).mean()) + settings.eps
    if alternative:
        gaps = scores.alternative_positive[face] - scores.alternative_negative[face]
    return _signed(gaps, importance(gaps, scale, settings.tau), settings.theta)


def _signed(gaps: Floats, strength: Floats, theta: float) -> Floats:
    return np.where(strength > theta, np.sign(gaps) * strength, np.float32(0)).astype(np.float32)


def face_sums(scores: TokenScores, faces: Sequence[str], settings: RewardSettings) -> NDArray[np.float64]:
    """Sum_t g_t under every face pair [F], all at once; nan for one whose log-probs are not all finite."""
    gaps_F_T = np.stack([gap(scores, face) for face in faces])
    scale_F_1 = np.abs(gaps_F_T).mean(axis=1, keepdims=True) + np.float32(settings.eps)
    with np.errstate(invalid="ignore"):
        strength_F_T = importance(gaps_F_T, scale_F_1, settings.tau)
    sums_F = _signed(gaps_F_T, strength_F_T, settings.theta).sum(axis=1, dtype=np.float64)
    return np.where(np.isfinite(scale_F_1[:, 0]), sums_F, np.nan)


def face_names(faces: Iterable[str], settings: RewardSettings) -> tuple[str, ...]:
    """The face pairs that count: those of ``settings``, or all of ``faces``; UsageError for one that is not there."""
    known = tuple(faces)
    names = settings.faces or known
    if missing := [name for name in names if name not in known]:
        raise UsageError(f"no face pair {missing[0]!r} in these rewards: they hold {', '.join(known)}")
    return names


def token_rewards(scores: TokenScores, settings: RewardSettings, weights: Mapping[str, float]) -> TokenRewards:
    """The reward of every token of a response, from the stored log-probs and the weights of ``face_weights``."""
    label = np.float32(1.0 if scores.side == "chosen" else -1.0)
    total = np.zeros(len(scores.response_ids), dtype=np.float32)
    gaps, strength = np.zeros_like(total), np.zeros_like(total)
    for face, weight in weights.items():
        signal = face_signal(scores, face, settings)
        if settings.direction == "label":
            signal = label * np.abs(signal)
        elif settings.direction == "agree":
            signal = np.where(np.sign(signal) == label, signal, np.float32(0))
        face_gaps = gap(scores, face)
        total += np.float32(weight) * signal
        gaps += np.float32(weight) * face_gaps
        scale = float(np.abs(face_gaps).mean()) + settings.eps
        strength += np.float32(abs(weight)) * importance(face_gaps, scale, settings.tau)
    return TokenRewards(scores, total, gaps, strength)


def alternative_rewards(scores: TokenScores, settings: RewardSettings, weights: Mapping[str, float]) -> Floats | None:
    """The reward that the alternative token of each position would have had [T].

    None for directions "label" and "agree", where a token that is in neither response has no label.
    """
    if settings.direction in {"label", "agree"}:
        return None
    signals = [np.float32(w) * face_signal(scores, f, settings, alternative=True) for f, w in weights.items()]
    total: Floats = np.sum(signals, axis=0, dtype=np.float32)
    return total
