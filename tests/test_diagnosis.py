"""The Bradley-Terry fit on worlds whose hidden mix of behaviours is known."""

import numpy as np
import pytest

from llmdoctor.diagnosis import bradley_terry
from llmdoctor.profile import RewardSettings
from llmdoctor.rewards import face_weights, token_rewards
from llmdoctor.types import PairScores, Side, TokenScores

RIDGE = 1e-3


def labelled(features: np.ndarray, mix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """feature(preferred) - feature(rejected), where people prefer with probability sigmoid(x . mix)."""
    prefers_first = rng.random(len(features)) < 1 / (1 + np.exp(-features @ mix))
    return np.where(prefers_first[:, None], features, -features)


def standard_errors(features: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """From the Fisher information at the truth."""
    p = 1 / (1 + np.exp(-features @ mix))
    return np.sqrt(np.diag(np.linalg.inv((features * (p * (1 - p))[:, None]).T @ features)))


@pytest.mark.parametrize("mix", [(1.5, 0, 0), (0.7, 1.2, -0.6), (-1, 1, 0), (0, 0, 0)])
def test_the_hidden_mix_is_found_within_its_standard_error(mix: tuple[float, ...]):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(20_000, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0.3], [0, 0, 1]])
    errors = standard_errors(features, np.array(mix))
    found = bradley_terry(labelled(features, np.array(mix), rng))
    # the ridge is a prior of precision 1e-3 a pair: a bias of at most 1% of the weights here
    assert (np.abs(found - mix) < 4 * errors + 0.01 * np.abs(mix).max()).all(), (found, errors)


def test_shuffled_labels_weigh_nothing():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(20_000, 3)) + 2  # the behaviours differ a lot, the labels do not care
    found = bradley_terry(features * rng.choice([-1, 1], size=(len(features), 1)))
    assert (np.abs(found) < 4 * standard_errors(features, np.zeros(3))).all()


@pytest.mark.parametrize(
    "features",
    [
        np.array([[1.0], [2.0], [0.5]]),  # perfectly separated
        np.array([[300.0, -1], [500, -2], [400, 3]]),  # so far that exp overflows
        np.array([[1e-4, 1e-5]]),
        np.array([[1.0, 2], [-1, -2], [3, 6]]),  # collinear
        np.zeros((4, 2)),
        np.random.default_rng(3).normal(size=(50, 4)),
    ],
    ids=["separated", "far", "near", "collinear", "nothing", "plain"],
)
def test_the_fit_is_the_finite_maximum_of_the_penalised_likelihood(features: np.ndarray):
    found = bradley_terry(features, ridge=RIDGE)
    assert np.isfinite(found).all()
    with np.errstate(over="ignore"):
        score = features.T @ (1 / (1 + np.exp(features @ found))) - len(features) * RIDGE * found
    np.testing.assert_allclose(score, 0, atol=1e-7)


def test_from_token_gaps_to_weights_that_predict_the_labels():
    """The whole chain: gaps of three behaviours a token, labels from a hidden mix of the signals, the fit, the rewards.

    The difference of the summed fitted rewards is the fitted margin itself, and predicts labels as well as the truth.
    """
    mix, faces = np.array([1.2, -0.6, 0.0]), ("kind", "brief", "safe")
    rng = np.random.default_rng(4)
    settings = RewardSettings(direction="fitted", theta=0.3)

    def response(side: Side) -> TokenScores:
        length = rng.integers(4, 9)
        gaps = rng.normal(rng.normal(size=3), 1, size=(length, 3)).astype(np.float32)
        negative = {face: np.full(length, -2, np.float32) for face in faces}
        positive = {face: negative[face] + gaps[:, f] for f, face in enumerate(faces)}
        ids = np.arange(length, dtype=np.int32)
        return TokenScores("1", side, ids, ids, positive, negative, ids, positive, negative)

    def signal(scores: TokenScores) -> np.ndarray:
        gaps = np.stack([scores.positive[face] - scores.negative[face] for face in faces]).astype(np.float64)
        strength = np.tanh(np.abs(gaps) / np.abs(gaps).mean(axis=1, keepdims=True))
        return (np.sign(gaps) * strength * (strength > settings.theta)).sum(axis=1)

    pairs, truth = [], []
    for _ in range(1500):
        a, b = response("chosen"), response("rejected")
        features = signal(a) - signal(b)
        a_wins = rng.random() < 1 / (1 + np.exp(-features @ mix))
        pairs.append(PairScores(a, b) if a_wins else PairScores(b, a))
        truth.append(features if a_wins else -features)
    x = np.array(truth)
    weights = face_weights(pairs, faces, settings)
    assert (np.abs(np.array([weights[face] for face in faces]) - mix) < 4 * standard_errors(x, mix) + 0.01).all()
    margins = np.array(
        [
            token_rewards(pair.chosen, settings, weights).rewards.sum()
            - token_rewards(pair.rejected, settings, weights).rewards.sum()
            for pair in pairs
        ]
    )
    assert (margins > 0).mean() == pytest.approx((x @ mix > 0).mean(), abs=0.01)
    assert (margins > 0).mean() > 0.8
