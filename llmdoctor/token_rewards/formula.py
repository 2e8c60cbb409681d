"""Stage 1's formula: from the patient's two log-probabilities of a token to its reward (arXiv 2601.10416, section 3.1).

    gap_t = log pi_pos(y_t) - log pi_neg(y_t)
    S_t   = tanh(|gap_t| / (mean_j |gap_j| + eps) / tau)
    r_t   = direction_t * S_t * 1[S_t > theta]

Departures from the paper: ``direction`` may be the sign of the gap itself, and is by default, where the paper takes the
label of the whole response; docs/method.md shows what that changes. Several face pairs are averaged, or weighted by the
fit (`llmdoctor.token_rewards.fit`). The reward may also come from a probe of the patient's states
(`llmdoctor.token_rewards.probe`), which is used as it is, without S_t and its threshold.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from llmdoctor.errors import UsageError
from llmdoctor.records import Floats, TokenRewards, TokenScores
from llmdoctor.settings import OF_STATES, RewardSettings

PROBE, ADVANTAGE = "probe", "advantage"
"""The names of the probe's two rewards where one stands beside those of the face pairs, or in their place."""


def gap(scores: TokenScores, face: str) -> Floats:
    """Log pi_pos - log pi_neg of every response token under one face pair [T], nats; r_t for a probe, log-odds.

    Raises UsageError where a probe's reward is asked for and there is none.
    """
    if face in OF_STATES:
        found = scores.probe if face == PROBE else scores.advantage
        if found is None:
            raise UsageError(NO_PROBE if scores.probe is None else NO_ADVANTAGE)
        return found
    return scores.positive[face] - scores.negative[face]


NO_PROBE = "these rewards have no probe: run extract again with --probe, which adds one to the same folder"
NO_ADVANTAGE = (
    "the probe of these rewards was fitted by an older version, without --direction advantage: delete probe.json, "
    "probe*.safetensors and states-*.safetensors, and run extract again"
)


def importance(gaps_T: Floats, scale: float | Floats, tau: float) -> Floats:
    """S_t = tanh(|gap_t| / scale / tau) [T], in [0, 1); for ``scale`` see `_scale`."""
    return np.tanh(np.abs(gaps_T) / scale / tau).astype(np.float32)


def face_signal(scores: TokenScores, face: str, settings: RewardSettings, *, alternative: bool = False) -> Floats:
    """The signed, pruned importance g_t = sign(gap_t) S_t 1[S_t > theta] under one face pair [T], in (-1, 1).

    With ``alternative`` it is that of the alternative token at each position, on the scale of the response itself.
    """
    gaps_T = gap(scores, face)
    if face in OF_STATES:
        return gaps_T
    scale = _scale(gaps_T, settings)
    if alternative:
        gaps_T = scores.alternative_positive[face] - scores.alternative_negative[face]
    return _signed(gaps_T, importance(gaps_T, scale, settings.tau), settings.theta)


def _scale(gaps_T: Floats, settings: RewardSettings) -> float:
    """The response's mean |gap| + eps, which makes importance comparable between responses and face pairs."""
    return float(np.abs(gaps_T).mean()) + settings.eps


def _signed(gaps: Floats, strength: Floats, theta: float) -> Floats:
    return np.where(strength > theta, np.sign(gaps) * strength, np.float32(0)).astype(np.float32)


def face_sums(scores: TokenScores, faces: Sequence[str], settings: RewardSettings) -> NDArray[np.float64]:
    """Sum_t g_t under every face pair [F], all at once; nan for one whose log-probs are not all finite."""
    if PROBE in faces:
        others = [face for face in faces if face != PROBE]
        sums = dict(zip(others, face_sums(scores, others, settings) if others else (), strict=True))
        return np.array([sums[f] if f != PROBE else gap(scores, f).sum(dtype=np.float64) for f in faces])
    gaps_F_T = np.stack([gap(scores, face) for face in faces])
    scale_F_1 = np.abs(gaps_F_T).mean(axis=1, keepdims=True) + np.float32(settings.eps)
    with np.errstate(invalid="ignore"):  # infinity / infinity: the nan below
        strength_F_T = importance(gaps_F_T, scale_F_1, settings.tau)
    sums_F = _signed(gaps_F_T, strength_F_T, settings.theta).sum(axis=1, dtype=np.float64)
    return np.where(np.isfinite(scale_F_1[:, 0]), sums_F, np.nan)


def face_names(faces: Iterable[str], settings: RewardSettings) -> tuple[str, ...]:
    """What the rewards are drawn from: the face pairs of ``settings``, or all of ``faces``, or the probe.

    ``faces`` are those that the rewards hold, ``PROBE`` among them if they have a probe. Unless named, it counts only
    in directions "probe" and "advantage", alone, and in direction "fitted", beside the face pairs. Raises UsageError
    for a name that is not there.
    """
    known = tuple(faces)
    if settings.direction in OF_STATES:
        if PROBE not in known:
            raise UsageError(NO_PROBE)
        return (settings.direction,)
    names: tuple[str, ...]
    if settings.faces:
        names = settings.faces
    else:
        names = tuple(name for name in known if name != PROBE or settings.direction == "fitted")
    if PROBE in names and PROBE not in known:
        raise UsageError(NO_PROBE)
    if not names:
        raise UsageError("these rewards hold no face pair, only a probe: choose direction advantage, probe or fitted")
    if missing := [name for name in names if name not in known]:
        raise UsageError(f"no face pair {missing[0]!r} in these rewards: they hold {', '.join(known)}")
    return names


def token_rewards(scores: TokenScores, settings: RewardSettings, weights: Mapping[str, float]) -> TokenRewards:
    """The reward of every token of a response, from the stored log-probs and the weights of ``fit.face_weights``."""
    label = np.float32(1.0 if scores.side == "chosen" else -1.0)
    rewards_T = np.zeros(len(scores.response_ids), dtype=np.float32)
    gaps_T, importance_T = np.zeros_like(rewards_T), np.zeros_like(rewards_T)
    for face, weight in weights.items():
        signal_T = face_signal(scores, face, settings)
        if settings.direction == "label":
            signal_T = label * np.abs(signal_T)
        elif settings.direction == "agree":
            signal_T = np.where(np.sign(signal_T) == label, signal_T, np.float32(0))
        own_T = gap(scores, face)
        rewards_T += np.float32(weight) * signal_T
        gaps_T += np.float32(weight) * own_T
        # A negative weight turns the reward around; it does not make the token less important.
        importance_T += np.float32(abs(weight)) * importance(own_T, _scale(own_T, settings), settings.tau)
    return TokenRewards(scores, rewards_T, gaps_T, importance_T)


def alternative_rewards(scores: TokenScores, settings: RewardSettings, weights: Mapping[str, float]) -> Floats | None:
    """The reward that the alternative token of each position would have had [T].

    None for directions "label" and "agree", where a token that is in neither response has no label, and for a probe,
    which reads a token's state and has none of what was not said.
    """
    if settings.direction in {"label", "agree"} or not OF_STATES.isdisjoint(weights):
        return None
    signals_F_T = [np.float32(w) * face_signal(scores, f, settings, alternative=True) for f, w in weights.items()]
    rewards_T: Floats = np.sum(signals_F_T, axis=0, dtype=np.float32)
    return rewards_T
