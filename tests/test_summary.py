"""What a rewards folder says in numbers, against naive twins, and words put together from tokens."""

import math
import tracemalloc
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest

from llmdoctor.records import PairScores, TokenRewards, TokenScores
from llmdoctor.token_rewards import summary as engine
from llmdoctor.token_rewards.summary import FaceDifferences, RewardCounter, face_differences, margin

SPELLINGS = ["Ġkind", "ly", ".", "<|end|>", "▁Kind", "Hello", "Ġ", "Ċ", None]


def text_of(ids):
    return "".join(
        ("" if i == 3 else SPELLINGS[i] or "").replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n") for i in ids
    )


def item(side, ids, rewards, gaps=None):
    floats = [np.array(values, np.float32) for values in (rewards, gaps if gaps is not None else rewards)]
    zeros = np.zeros(len(ids), np.float32)
    tokens = np.array(ids, np.int32)
    scores = TokenScores("1", side, tokens, tokens, {"f": floats[1]}, {"f": zeros}, tokens, {}, {})
    return TokenRewards(scores, floats[0], floats[1], np.abs(floats[0]))


def random_pairs(count, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        sides = []
        for side in ("chosen", "rejected"):
            length = int(rng.integers(1, 12))
            gaps = rng.normal(size=length) * rng.choice([0.01, 1, 4], size=length)
            rewards = np.tanh(gaps) * (rng.random(length) < 0.5)
            sides.append(item(side, rng.integers(0, len(SPELLINGS), length), rewards, gaps))
        made.append(tuple(sides))
    return made


def test_counts_are_those_of_a_naive_loop():
    pairs = random_pairs(200)
    counter = RewardCounter(SPELLINGS, text_of, [3])
    for pair in pairs:
        counter.add(*pair)
    found = counter.result()
    tokens = [
        (float(r), float(g), 1 if s.scores.side == "chosen" else -1)
        for pair in pairs
        for s in pair
        for r, g in zip(s.rewards, s.gaps, strict=True)
    ]
    paid = [(r, g, label) for r, g, label in tokens if r]
    assert (found.pairs, found.tokens) == (200, len(tokens))
    assert found.share_rewarded == sum(r > 0 for r, _, _ in tokens) / len(tokens)
    assert found.share_punished == sum(r < 0 for r, _, _ in tokens) / len(tokens)
    assert found.mean_abs_gap == pytest.approx(sum(abs(g) for _, g, _ in tokens) / len(tokens))
    assert found.rms_gap == pytest.approx(math.sqrt(sum(g * g for _, g, _ in tokens) / len(tokens)))
    ends = [-math.inf, *found.edges, math.inf]
    assert found.gaps == tuple(sum(low < g <= high for _, g, _ in tokens) for low, high in pairwise(ends))
    assert found.token_agreement == sum(g * label > 0 for _, g, label in paid) / len(paid)
    sums = [sum(map(float, c.gaps)) - sum(map(float, r.gaps)) for c, r in pairs]
    assert found.agreement == sum(s > 0 for s in sums) / 200
    assert [margin(*pair) for pair in pairs] == pytest.approx(sums)


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1.0, 30.0])
def test_the_histogram_goes_as_far_as_the_gaps(scale):
    """At any scale most tokens are neither in the middle bin nor beyond the ends, and none is lost."""
    counter = RewardCounter(SPELLINGS, text_of, [3])
    gaps = (scale * np.linspace(-1, 1, 1001)).astype(np.float32)
    counter.add(*(item(side, [0] * len(gaps), [0.0] * len(gaps), gaps) for side in ("chosen", "rejected")))
    found = counter.result()
    assert list(found.edges) == sorted(found.edges)
    assert len(found.gaps) == len(found.edges) + 1
    assert sum(found.gaps) == 2 * len(gaps)
    assert found.gaps[len(found.gaps) // 2] + found.gaps[0] + found.gaps[-1] < 1.5 * len(gaps)
    assert found.edges[-1] <= scale <= 4 * found.edges[-1]


def test_ties_count_half():
    counter = RewardCounter(SPELLINGS, text_of, [3])
    counter.add(item("chosen", [0], [0.5]), item("rejected", [0], [0.5]))
    assert counter.result().agreement == 0.5


def test_words_are_made_of_their_tokens_and_keep_their_spellings_together():
    """` kind` + `ly` is one word; `.` and a special token are none of its; `Kind` and `kind` are one."""
    counter = RewardCounter(SPELLINGS, text_of, [3])
    chosen = item("chosen", [0, 1, 2, 4, 3], [0.5, 0.25, -0.5, 1.0, 0.0])
    rejected = item("rejected", [1, 0, 2, 5], [-0.25, 0.5, 0.0, -1.0])
    counter.add(chosen, rejected)
    found = counter.result()
    assert [(w.text, w.reward, w.count) for w in found.rewarded] == [("kind", 1.5, 2), ("kindly", 0.75, 1)]
    assert [(w.text, w.reward, w.count) for w in found.punished] == [
        ("hello", -1.0, 1),
        (".", -0.5, 1),
        ("ly", -0.25, 1),
    ]
    assert len(counter.result(words=1).rewarded) == 1


def test_the_words_add_up_to_the_rewards():
    pairs = random_pairs(100, seed=3)
    counter = RewardCounter(SPELLINGS, text_of, [3])
    for pair in pairs:
        counter.add(*pair)
    found = counter.result(words=10_000)
    named = sum(w.reward for w in (*found.rewarded, *found.punished))
    blank = defaultdict(float)  # a token that is only white space is no word
    for pair in pairs:
        for side in pair:
            for i, r in zip(side.scores.response_ids.tolist(), side.rewards.tolist(), strict=True):
                if SPELLINGS[i] in ("Ġ", "Ċ", "<|end|>", None):
                    blank["all"] += r
    assert named + blank["all"] == pytest.approx(sum(float(s.rewards.sum()) for pair in pairs for s in pair), abs=0.1)


def test_memory_does_not_grow_with_the_number_of_words(monkeypatch):
    """The words that matter stay among those remembered."""
    monkeypatch.setattr(engine, "_WORDS_KEPT", 50)
    spellings = [f"Ġword{i}" for i in range(5000)]
    counter = RewardCounter(spellings, lambda ids: " ".join(spellings[i][1:] for i in ids))
    rng = np.random.default_rng(0)
    for _ in range(500):
        ids = [7, *rng.integers(8, 5000, 10)]
        counter.add(item("chosen", ids, [1.0, *[0.1] * 10]), item("rejected", [3], [-1.0]))
        assert len(counter._words) <= 111
    found = counter.result()
    assert (found.rewarded[0].text, found.rewarded[0].count) == ("word7", 500)
    assert (found.punished[0].text, found.punished[0].count) == ("word3", 500)


def test_memory_is_flat_over_many_pairs():
    pairs = random_pairs(300)
    counter, differences = RewardCounter(SPELLINGS, text_of, [3]), FaceDifferences(["f"])

    def add():
        for chosen, rejected in pairs:
            counter.add(chosen, rejected)
            differences.add(PairScores(chosen.scores, rejected.scores))

    add()
    tracemalloc.start()
    add()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(3):
        add()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 64_000


def test_face_differences_by_hand():
    chosen, rejected = item("chosen", [0, 1], [0, 0], [0.3, -0.4]), item("rejected", [0, 1], [0, 0], [0.0, 0.5])
    (found,) = face_differences([PairScores(chosen.scores, rejected.scores)], ["f"])
    assert found.mean_abs_gap == pytest.approx(0.3)
    assert found.rms_gap == pytest.approx(math.sqrt(0.5 / 4))
    assert not found.hardly
    (nothing,) = face_differences([], ["f"])
    assert (nothing.rms_gap, nothing.hardly) == (0, True)
