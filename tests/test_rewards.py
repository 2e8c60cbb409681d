"""The reward formula against values worked by hand."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from llmdoctor.errors import UsageError
from llmdoctor.records import PairScores, Side, TokenScores
from llmdoctor.settings import RewardSettings
from llmdoctor.token_rewards.fit import face_weights
from llmdoctor.token_rewards.formula import alternative_rewards, token_rewards

# tanh of 1/4, 1/2, 1, 2
Q, H, ONE, TWO = 0.2449187, 0.4621172, 0.7615942, 0.9640276
FOUR = [1.0, -2.0, 0.5, -0.5]  # mean |gap| = 1


def scored(side: Side, gaps: Mapping[str, list[float]], others: Mapping[str, list[float]] | None = None) -> TokenScores:
    """A response whose faces differ by ``gaps``, with alternatives that differ by ``others``."""
    others = others or gaps
    length = len(next(iter(gaps.values())))
    negative = np.linspace(-3, -5, length, dtype=np.float32)
    return TokenScores(
        pair_id="1",
        side=side,
        prompt_ids=np.array([1], np.int32),
        response_ids=np.arange(length, dtype=np.int32),
        positive={face: negative + np.array(gap, np.float32) for face, gap in gaps.items()},
        negative=dict.fromkeys(gaps, negative),
        alternative_ids=np.arange(length, dtype=np.int32) + 9,
        alternative_positive={face: negative + np.array(gap, np.float32) for face, gap in others.items()},
        alternative_negative=dict.fromkeys(others, negative),
    )


def settings(**changes: Any) -> RewardSettings:
    return RewardSettings(**{"eps": 1e-9, **changes})


@pytest.mark.parametrize(
    ("side", "direction", "expected"),
    [
        ("chosen", "gap", [ONE, -TWO, 0, 0]),
        ("rejected", "gap", [ONE, -TWO, 0, 0]),
        ("chosen", "label", [ONE, TWO, 0, 0]),
        ("rejected", "label", [-ONE, -TWO, 0, 0]),
        ("chosen", "agree", [ONE, 0, 0, 0]),
        ("rejected", "agree", [0, -TWO, 0, 0]),
        ("chosen", "fitted", [ONE, -TWO, 0, 0]),
    ],
)
def test_directions(side: Side, direction: str, expected: list[float]):
    """Gaps 1, -2, 1/2, -1/2 have mean size 1: S = tanh of 1, 2, 1/2, 1/2; theta 1/2 prunes the last two."""
    found = token_rewards(scored(side, {"a": FOUR}), settings(direction=direction, theta=0.5), {"a": 1.0})
    np.testing.assert_allclose(found.rewards, expected, atol=1e-6)
    np.testing.assert_allclose(found.gaps, FOUR, atol=1e-6)
    np.testing.assert_allclose(found.importance, [ONE, TWO, H, H], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tau": 2.0, "theta": 0.4}, [H, -ONE, 0, 0]),  # S = tanh of 1/2, 1, 1/4, 1/4
        ({"tau": 2.0, "theta": 0.0}, [H, -ONE, Q, -Q]),
        ({"tau": 1.0, "theta": 0.8}, [0, -TWO, 0, 0]),
        ({"eps": 1.0, "theta": 0.0}, [H, -ONE, Q, -Q]),  # the scale is 1 + eps
    ],
)
def test_temperature_pruning_and_eps(changes: dict[str, float], expected: list[float]):
    found = token_rewards(scored("chosen", {"a": FOUR}), settings(**changes), {"a": 1.0})
    np.testing.assert_allclose(found.rewards, expected, atol=1e-6)


def test_faces_that_agree_everywhere_reward_nothing():
    found = token_rewards(scored("chosen", {"a": [0.0, 0.0]}), settings(direction="label", theta=0), {"a": 1.0})
    assert found.rewards.tolist() == [0, 0]
    assert found.importance.tolist() == [0, 0]


def test_several_faces_are_weighted_sums_each_on_its_own_scale():
    """Face b, gaps 100, -100 beside 3, -1 of face a: each is divided by its own mean, 100 and 2.

    S_a = tanh 1.5, tanh .5 and S_b = tanh 1, tanh 1; with weights 2 and -1, r = 2 g_a - g_b.
    """
    scores = scored("chosen", {"a": [3.0, -1.0], "b": [100.0, -100.0]})
    found = token_rewards(scores, settings(direction="fitted", theta=0.0), {"a": 2.0, "b": -1.0})
    a = math.tanh(1.5)
    np.testing.assert_allclose(found.rewards, [2 * a - ONE, -2 * H + ONE], atol=1e-5)
    np.testing.assert_allclose(found.gaps, [6 - 100, -2 + 100], atol=1e-3)
    np.testing.assert_allclose(found.importance, [2 * a + ONE, 2 * H + ONE], atol=1e-5)
    only = token_rewards(scores, settings(direction="agree", theta=0.0), {"a": 0.5, "b": 0.5})
    np.testing.assert_allclose(only.rewards, [(a + ONE) / 2, 0], atol=1e-5)


def test_alternatives_are_rewarded_on_the_scale_of_the_response():
    """The response's mean |gap| is 1 although the alternatives' is not: gaps 2, .1, -1, .5 give tanh 2, tanh .1, ..."""
    scores = scored("rejected", {"a": FOUR, "b": FOUR}, {"a": [2.0, 0.1, -1.0, 0.5], "b": [0.0, 0.0, 0.0, 1.0]})
    weights = {"a": 1.0, "b": -2.0}
    found = alternative_rewards(scores, settings(direction="fitted", theta=0.45), weights)
    np.testing.assert_allclose(found, [TWO, 0, -ONE, H - 2 * ONE], atol=1e-5)
    for direction in ("label", "agree"):
        assert alternative_rewards(scores, settings(direction=direction), weights) is None


def test_weights_are_shared_out_unless_they_are_fitted():
    pair = PairScores(scored("chosen", {"a": [1.0], "b": [1.0]}), scored("rejected", {"a": [-1.0], "b": [1.0]}))
    assert face_weights([pair], ("a", "b"), settings(direction="gap")) == {"a": 0.5, "b": 0.5}
    assert face_weights([pair], ("a", "b"), settings(direction="label", faces=("b",))) == {"b": 1.0}
    with pytest.raises(UsageError, match=r"no face pair 'c'.*a, b"):
        face_weights([pair], ("a", "b"), settings(faces=("a", "c")))
    assert face_weights([], ("a", "b"), settings(direction="fitted")) == {"a": 0.0, "b": 0.0}


def test_fitted_weight_golden():
    """One token a response: g = ±tanh 1. Three pairs of four prefer the positive face, so 2 tanh 1 * w = ln 3.

    The prior, standard deviation 5 for b = w * 2 tanh 1 (all features are that far from 0), bends it to
    3 sigmoid(-b) - sigmoid(b) = b / 25: b = 1.0986 - .0549. Face b is alike in both answers: 0.
    """
    up, down = {"a": [2.0], "b": [1.0]}, {"a": [-7.0], "b": [1.0]}
    pairs = [PairScores(scored("chosen", up), scored("rejected", down))] * 3
    pairs += [PairScores(scored("chosen", down), scored("rejected", up))]
    weights = face_weights(iter(pairs), ("a", "b"), settings(direction="fitted"))
    assert weights["a"] == pytest.approx((1.0986 - 0.0549) / (2 * ONE), abs=1e-4)
    assert weights["b"] == 0
