"""The Bradley-Terry fit and its diagnosis on worlds whose hidden mix of behaviours is known."""

import json
import math
from collections.abc import Callable
from itertools import pairwise, permutations

import numpy as np
import pytest

from llmdoctor.errors import DataError, UsageError
from llmdoctor.records import PairScores, Side, TokenScores
from llmdoctor.settings import RewardSettings
from llmdoctor.token_rewards import fit
from llmdoctor.token_rewards.diagnosis import Diagnosis, diagnose
from llmdoctor.token_rewards.fit import bradley_terry, face_weights
from llmdoctor.token_rewards.formula import token_rewards

FACES = ("kind", "brief", "safe")
MIX = np.array([1.2, -0.6, 0.0])
SETTINGS = RewardSettings(theta=0.3)
PRIOR = 1 / 5**2


def labelled(features: np.ndarray, mix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """feature(preferred) - feature(rejected), where people prefer with probability sigmoid(x . mix)."""
    prefers_first = rng.random(len(features)) < 1 / (1 + np.exp(-features @ mix))
    return np.where(prefers_first[:, None], features, -features)


def standard_errors(features: np.ndarray, mix: np.ndarray) -> np.ndarray:
    """From the Fisher information at the truth."""
    p = 1 / (1 + np.exp(-features @ mix))
    return np.sqrt(np.diag(np.linalg.inv((features * (p * (1 - p))[:, None]).T @ features)))


def response(name: str, gaps: np.ndarray, side: Side = "chosen") -> TokenScores:
    """A response of T tokens whose face pairs differ by ``gaps`` [T, F]."""
    ids = np.arange(len(gaps), dtype=np.int32)
    negative = {face: np.full(len(gaps), -2, np.float32) for face in FACES[: gaps.shape[1]]}
    positive = {face: negative[face] + gaps[:, f].astype(np.float32) for f, face in enumerate(negative)}
    return TokenScores(name, side, ids, ids, positive, negative, ids, positive, negative)


def signal(scores: TokenScores, settings: RewardSettings = SETTINGS) -> np.ndarray:
    """The naive float64 twin of a response's features."""
    gaps = np.stack([scores.positive[face] - scores.negative[face] for face in scores.positive]).astype(np.float64)
    strength = np.tanh(np.abs(gaps) / np.abs(gaps).mean(axis=1, keepdims=True))
    return (np.sign(gaps) * strength * (strength > settings.theta)).sum(axis=1)


def world(
    seed: int, pairs: int, log_odds: Callable[[np.ndarray, float], float], tokens: tuple[int, int] = (4, 9)
) -> list[PairScores]:
    """Pairs whose label is drawn with ``log_odds(features [F], log(length a / length b))``."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(pairs):
        sizes = rng.integers(*tokens, size=2)
        a, b = (response(str(number), rng.normal(rng.normal(size=3), 1, size=(size, 3))) for size in sizes)
        odds = log_odds(signal(a) - signal(b), math.log(sizes[0] / sizes[1]))
        made.append(PairScores(a, b) if rng.random() < 1 / (1 + math.exp(-odds)) else PairScores(b, a))
    return made


def hidden_mix(x: np.ndarray, _: float) -> float:
    return float(x @ MIX)


# The fit


@pytest.mark.parametrize("mix", [(1.5, 0, 0), (0.7, 1.2, -0.6), (-1, 1, 0), (0, 0, 0)])
def test_the_hidden_mix_is_found_within_its_standard_error(mix: tuple[float, ...]):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(20_000, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0.3], [0, 0, 1]])
    errors = standard_errors(features, np.array(mix))
    found = bradley_terry(labelled(features, np.array(mix), rng))
    assert (np.abs(found - mix) < 4 * errors).all(), (found, errors)


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
        np.array([[1e-200, 1e200], [1e-200, -1e200]]),
        np.array([[1.0, 2], [-1, -2], [3, 6]]),  # collinear
        np.zeros((4, 2)),
        np.random.default_rng(3).normal(size=(50, 4)),
        np.random.default_rng(3).standard_cauchy(size=(500, 3)),  # a few pairs outweigh all others
        np.random.default_rng(3).standard_cauchy(size=(500, 3)) ** 2,
    ],
    ids=["separated", "far", "near", "extreme", "collinear", "nothing", "plain", "tails", "tails, separated"],
)
def test_the_fit_is_the_finite_maximum_of_the_penalised_likelihood(features: np.ndarray):
    found = bradley_terry(features)
    assert np.isfinite(found).all()
    largest = np.abs(features).max(axis=0)
    largest[largest == 0] = 1
    z = features / largest
    spread = np.where(z.any(axis=0), np.sqrt((z**2).mean(axis=0)), 1)
    z, standardised = z / spread, found * largest * spread
    with np.errstate(over="ignore"):
        score = z.T @ (1 / (1 + np.exp(z @ standardised))) - PRIOR * standardised
    np.testing.assert_allclose(score, 0, atol=1e-6)


def test_the_prior_vanishes_with_more_pairs_and_does_not_know_units():
    """The same pairs over and over: 3 of 4 agree, so w = ln 3 without prior; its pull falls as 1 / P."""
    one = np.array([[1.0], [1], [1], [-1]])
    off = [float(math.log(3) - bradley_terry(np.tile(one, (copies, 1)))[0]) for copies in (1, 10, 100, 1000)]
    assert 0 < off[0] < 0.1
    assert all(later == pytest.approx(earlier / 10, rel=0.25) for earlier, later in pairwise(off))
    assert bradley_terry(1e6 * one)[0] == pytest.approx(1e-6 * bradley_terry(one)[0], rel=1e-12)


def test_separated_labels_give_large_finite_weights_however_many_pairs():
    found = [float(bradley_terry(np.ones((pairs, 1)))[0]) for pairs in (1, 10, 1000, 100_000)]
    assert 0.5 < found[0] < found[1] < found[2] < found[3] < 20


def test_features_that_are_not_numbers_are_refused():
    for bad in (math.nan, math.inf):
        with pytest.raises(DataError, match="finite numbers"):
            bradley_terry(np.array([[1.0], [bad]]))
    assert bradley_terry(np.zeros((0, 3))).tolist() == [0, 0, 0]


# The bootstrap and the shares, against their naive twins


def test_vectorised_bootstrap_is_the_same_as_refitting_each_resample(monkeypatch):
    """Every resample fitted alone, pair by pair, on the same counts; several chunks, so that the seams count too."""
    rng = np.random.default_rng(5)
    z = labelled(rng.normal(size=(90, 3)), MIX, rng)
    monkeypatch.setattr(fit, "_CHUNK", 40 * 20)  # 40 pairs of 20 resamples at once: 40, 40 and 10
    found = fit.newton(z, np.zeros((20, 3)), seed=7)
    counts = np.concatenate(
        [
            fit._POISSON[np.random.default_rng([7, first]).integers(0, 1 << 16, (rows, 20), dtype=np.uint16)]
            for first, rows in ((0, 40), (40, 40), (80, 10))
        ]
    )
    for r in range(20):
        w = np.zeros(3)
        for _ in range(50):
            gradient, curvature = -PRIOR * w, PRIOR * np.eye(3)
            for x, count in zip(z, counts[:, r], strict=True):
                p = 1 / (1 + math.exp(x @ w))
                gradient = gradient + int(count) * p * x
                curvature = curvature + int(count) * p * (1 - p) * np.outer(x, x)
            w = w + np.linalg.solve(curvature, gradient)
            if np.abs(gradient).max() < 1e-12:
                break
        np.testing.assert_allclose(found[r], w, atol=1e-8)
    loose = fit.newton(z, np.tile(fit.newton(z, np.zeros((1, 3))), (20, 1)), seed=7, tolerance=1e-3)
    np.testing.assert_allclose(loose, found, atol=1e-4)  # as diagnose runs it: far below an interval's width


def test_counts_are_poisson():
    shares = np.bincount(fit._POISSON, minlength=9) / len(fit._POISSON)
    np.testing.assert_allclose(shares, [math.exp(-1) / math.factorial(k) for k in range(len(shares))], atol=2e-5)


def test_shares_are_the_average_gain_over_all_orders_of_joining():
    rng = np.random.default_rng(6)
    z = labelled(rng.normal(size=(400, 4)) @ (np.eye(4) + 0.4), np.array([0.5, -0.3, 0.2, 0]), rng)
    w = bradley_terry(z)
    p = 1 / (1 + np.exp(-z @ w))
    a = (z * (p * (1 - p))[:, None]).T @ z + PRIOR * np.eye(4)

    def gain(members: tuple[int, ...]) -> float:
        own = list(members)
        return float((a @ w)[own] @ np.linalg.solve(a[np.ix_(own, own)], (a @ w)[own])) / 2 if own else 0.0

    expected = np.zeros(4)
    for order in permutations(range(4)):
        for place, j in enumerate(order):
            expected[j] += gain(order[: place + 1]) - gain(order[:place])
    np.testing.assert_allclose(fit.shares(z, w), expected / expected.sum(), atol=1e-12)


def test_shares_agree_with_the_exact_likelihood_and_split_between_twins():
    rng = np.random.default_rng(7)
    x = labelled(rng.normal(size=(3000, 3)), np.array([0.8, -0.4, 0.0]), rng)
    single = [np.logaddexp(0, 0) - np.logaddexp(0, -x[:, [j]] @ bradley_terry(x[:, [j]])).mean() for j in range(3)]
    np.testing.assert_allclose(
        fit.shares(x, bradley_terry(x)), np.array(single) / sum(single), atol=0.02
    )  # features are independent here, so that a face's gain is much the same whenever it joins
    twins = x[:, [0, 0, 1]]
    shares = fit.shares(twins, bradley_terry(twins))
    assert shares[0] == pytest.approx(shares[1], abs=1e-9)
    assert shares.sum() == pytest.approx(1)
    assert fit.shares(np.zeros((5, 2)), np.zeros(2)).tolist() == [0, 0]


# The diagnosis


def covered(found: Diagnosis, mix: np.ndarray) -> np.ndarray:
    return np.array([face.weight.covers(truth) for face, truth in zip(found.faces, mix, strict=True)])


@pytest.fixture(scope="module")
def mixed() -> tuple[list[PairScores], Diagnosis]:
    pairs = world(4, 1500, hidden_mix)
    return pairs, diagnose(iter(pairs), FACES, SETTINGS)


def test_a_hidden_mix_is_diagnosed(mixed):
    pairs, found = mixed
    kind, brief, safe = found.faces
    x = np.array([signal(pair.chosen) - signal(pair.rejected) for pair in pairs])
    weights = np.array([face.weight.value for face in found.faces])
    assert (np.abs(weights - MIX) < 4 * standard_errors(x, MIX)).all()  # that intervals cover is tested below
    widths = [(face.weight.high - face.weight.low) / (2 * 1.96) for face in found.faces]
    np.testing.assert_allclose(widths, standard_errors(x, weights), rtol=0.15)
    assert kind.weight.low > 0 > brief.weight.high
    assert kind.share > 0.6 > brief.share > safe.share
    assert sum(face.share for face in found.faces) == pytest.approx(1)
    assert found.explains
    assert found.verdict.startswith("These preferences reward kind (weight +")
    assert "These preferences punish brief (weight -" in found.verdict
    assert found.accuracy.covers(float((x @ MIX > 0).mean()))
    assert kind.agreement == pytest.approx(float((np.sign(x[:, 0]) / 2 + 0.5).mean()), abs=0.002)
    contributions = brief.weight.value * x[:, 1]
    assert [e.pair_id for e in brief.best] == [pairs[p].chosen.pair_id for p in np.argsort(-contributions)[:3]]
    assert brief.worst[0].contribution == pytest.approx(contributions.min(), abs=1e-4)
    assert (kind.standardised.value, kind.scale) == pytest.approx(
        (kind.weight.value * kind.scale, math.sqrt((x[:, 0] ** 2).mean())), rel=1e-4
    )


def test_the_weights_are_those_that_training_uses(mixed):
    pairs, found = mixed
    fitted = face_weights(iter(pairs), FACES, SETTINGS.model_copy(update={"direction": "fitted"}))
    assert {face.name: face.weight.value for face in found.faces} == fitted
    margins = np.array(
        [
            token_rewards(pair.chosen, RewardSettings(direction="fitted", theta=0.3), fitted).rewards.sum()
            - token_rewards(pair.rejected, RewardSettings(direction="fitted", theta=0.3), fitted).rewards.sum()
            for pair in pairs
        ]
    )
    assert (margins > 0).mean() == pytest.approx(found.accuracy.value, abs=0.02)


def test_the_same_arguments_give_the_same_plain_numbers(mixed):
    pairs, found = mixed
    assert diagnose(pairs, FACES, SETTINGS) == found
    assert diagnose(pairs, FACES, SETTINGS, seed=1).faces != found.faces
    document = found.as_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == json.loads(json.dumps(document))
    assert document["faces"][0]["weight"]["value"] == found.faces[0].weight.value
    only = diagnose(pairs, FACES, SETTINGS.model_copy(update={"faces": ("safe",)}), resamples=50)
    assert [face.name for face in only.faces] == ["safe"]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """120 intervals of 40 worlds: 95% is 114, and fewer than 106 or all of them would be far from that."""
    hits = 0
    for seed in range(40):
        found = diagnose(world(100 + seed, 200, hidden_mix), FACES, SETTINGS, seed=seed, resamples=300, folds=2)
        hits += int(covered(found, MIX).sum())
    assert 106 <= hits < 120, hits


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_shuffled_labels_are_not_explained(seed: int):
    pairs = world(seed, 800, lambda _x, _length: 0.0)
    found = diagnose(pairs, FACES, SETTINGS, seed=seed, resamples=500)
    assert covered(found, np.zeros(3)).sum() >= 2
    assert found.accuracy.covers(0.5)
    assert not found.explains
    assert found.verdict.startswith("These faces do not explain the preferences: they predict ")


def test_labels_by_length_alone_are_called_that():
    """Every face says + of most tokens, so that long answers have large sums; the labels know only the length."""
    rng = np.random.default_rng(8)
    pairs = []
    for number in range(600):
        sizes = rng.integers(5, 40, size=2)
        a, b = (response(str(number), rng.normal(1, 1, size=(size, 3))) for size in sizes)
        longer = rng.random() < 1 / (1 + math.exp(-0.2 * (sizes[0] - sizes[1])))
        pairs.append(PairScores(a, b) if longer else PairScores(b, a))
    found = diagnose(pairs, FACES, SETTINGS, resamples=300)
    assert found.explains
    assert found.length_accuracy.low > 0.7
    assert found.longer_preferred > 0.7
    assert found.beyond_length.low <= 0
    assert "response length alone explains as much or more" in found.verdict
    assert "(longer answers are preferred)" in found.verdict
    assert "add nothing certain" in found.verdict


def test_length_that_no_face_sees_is_named_too():
    pairs = world(9, 600, lambda _x, length: -4 * length)
    found = diagnose(pairs, FACES, SETTINGS, resamples=300)
    assert found.verdict.startswith("These faces do not explain the preferences")
    assert "(shorter answers are preferred)" in found.verdict


def test_faces_beside_length_are_credited():
    """Labels follow length and one behaviour: together they predict more than length alone."""
    pairs = world(10, 1000, lambda x, length: 5 * length + x[0])
    found = diagnose(pairs, FACES, SETTINGS, resamples=300)
    assert found.added_to_length.low > 0
    assert found.combined_accuracy.value > max(found.accuracy.value, found.length_accuracy.value)


def test_faces_that_say_the_same_are_called_overlapping():
    """Two nearly equal behaviours, neither of which can be distinguished from zero alone, predict together."""
    rng = np.random.default_rng(11)
    pairs = []
    for number in range(150):
        a, b = (rng.normal(rng.normal(size=(1, 1)), 1, size=(6, 1)) for _ in range(2))
        a, b = (np.hstack([gaps, gaps + rng.normal(0, 0.01, gaps.shape)]) for gaps in (a, b))
        sides = response(str(number), a), response(str(number), b)
        odds = (signal(sides[0]) - signal(sides[1])).sum() * 0.15
        pairs.append(PairScores(*(sides if rng.random() < 1 / (1 + math.exp(-odds)) else sides[::-1])))
    found = diagnose(pairs, FACES[:2], SETTINGS, resamples=300)
    assert all(face.weight.covers(0) for face in found.faces)
    assert found.accuracy.low > 0.5
    assert found.verdict.startswith("No single face is sure to explain the preferences")
    assert not found.explains


# What cannot be diagnosed, or hardly


def test_too_few_pairs_and_wrong_settings_are_refused():
    pair = world(1, 1, hidden_mix)
    for few in ([], pair):
        with pytest.raises(DataError, match=f"needs at least 2 pairs .*, got {len(few)}"):
            diagnose(few, FACES, SETTINGS)
    with pytest.raises(UsageError, match="no face pair 'x' in these rewards: they hold kind, brief, safe"):
        diagnose(pair, FACES, RewardSettings(faces=("x",)))
    with pytest.raises(UsageError, match="at most 16 face pairs to diagnose, got 17"):
        diagnose(pair, [str(n) for n in range(17)], SETTINGS)
    for wrong in ({"resamples": 0}, {"folds": 1}, {"seed": -1}):
        with pytest.raises(UsageError, match="expected resamples >= 1, folds >= 2"):
            diagnose(pair * 3, FACES, SETTINGS, **wrong)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_log_probs_that_are_not_numbers_name_the_pair(bad: float):
    pairs = world(1, 5, hidden_mix)
    pairs[3].rejected.positive["brief"][0] = bad
    with pytest.raises(DataError, match=r"^pair 3: expected finite log-probs under face pair 'brief'"):
        diagnose(pairs, FACES, SETTINGS)
    with pytest.raises(DataError, match=r"^pair 3: "):
        face_weights(pairs, FACES, RewardSettings(direction="fitted"))


def test_two_pairs_are_few_and_ties_explain_nothing():
    found = diagnose(world(1, 2, hidden_mix), FACES, SETTINGS, resamples=20)
    assert found.settings["folds"] == 2
    assert found.verdict.endswith("With only 2 pairs all of this is rough.")
    same = response("1", np.ones((3, 3)))
    tied = diagnose([PairScores(same, same)] * 200, FACES, SETTINGS, resamples=20)
    for face in tied.faces:
        assert (face.weight.value, face.weight.low, face.weight.high) == (0, 0, 0)
        assert (face.share, face.agreement, face.scale, face.best, face.worst) == (0, 0.5, 0, (), ())
    assert (tied.accuracy.value, tied.length_accuracy.value, tied.longer_preferred) == (0.5, 0.5, 0.5)
    assert tied.verdict.startswith("These faces do not explain the preferences")


def test_labels_that_one_face_separates_stay_finite():
    up, down = response("1", np.array([[2.0, 1, 1]])), response("1", np.array([[-2.0, 1, 1]]))
    found = diagnose([PairScores(up, down)] * 300, FACES, SETTINGS, resamples=50)
    kind = found.faces[0]
    assert 0 < kind.weight.low <= kind.weight.value <= kind.weight.high < 20
    assert (kind.share, found.accuracy.value, kind.worst) == (1, 1, ())
    json.dumps(found.as_dict(), allow_nan=False)
