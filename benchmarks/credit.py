"""Do the rewards point at the right tokens? On the clinic, where it is known which sentence of an answer is bad.

    python benchmarks/credit.py --output benchmarks/results     # four minutes on two cores

Scores the embedded pairs (one label in ten is wrong) with the faces and with a probe. Then compares the tokens of
helpful sentences with those of unhelpful ones: the area under the curve is the chance that a token of the first kind
has the greater reward, .5 where the reward says nothing; likewise for whole sentences by the sum of their rewards.
Intervals are 95%, by 200 resamples of the questions. Sentences about safety, about another topic and broken ones do not
count. Writes OUTPUT/credit.md.
"""

import argparse
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmdoctor.models import load_patient, load_tokenizer
from llmdoctor.profile import Profile, load_profile, override
from llmdoctor.profiles.clinic_world import sentences, split_sentences, topic_of
from llmdoctor.records import TokenScores
from llmdoctor.settings import DataSettings, RewardSettings
from llmdoctor.text import token_texts
from llmdoctor.token_rewards.extract import extract
from llmdoctor.token_rewards.folder import RewardsFolder
from llmdoctor.token_rewards.formula import PROBE, token_rewards
from llmdoctor.token_rewards.states import add_probe

FACE = "helpful"
RESAMPLES = 200
Values = NDArray[np.float64]


def signals(profile: Profile) -> dict[str, Callable[[TokenScores], Values]]:
    """Every way to reward a token: [T] from its scores."""

    def formula(settings: RewardSettings) -> Callable[[TokenScores], Values]:
        name = PROBE if settings.direction == "probe" else FACE
        return lambda scores: token_rewards(scores, settings, {name: 1.0}).rewards.astype(np.float64)

    def increments(scores: TokenScores) -> Values:
        assert scores.probe is not None
        return np.diff(scores.probe.astype(np.float64), prepend=0.0)

    own = override(profile.rewards, faces=(FACE,))
    paper = {"tau": 1.0, "theta": 0.1}
    return {
        "the label of the answer": lambda s: np.full(len(s.response_ids), 1.0 if s.side == "chosen" else -1.0),
        "paper: label, S above theta .1": formula(override(own, direction="label", **paper)),
        "gap where it agrees with the label": formula(override(own, direction="agree", **paper)),
        "gap, S above theta .1": formula(override(own, direction="gap", **paper)),
        "gap, the clinic's tau and theta": formula(own),
        "the gap itself, nats": lambda s: (s.positive[FACE] - s.negative[FACE]).astype(np.float64),
        "probe of the states": formula(RewardSettings(direction="probe")),
        "its increments": increments,
    }


def marks(tokenizer: Any, question: str, scores: TokenScores) -> NDArray[np.int64]:
    """The sentence that every token of the response belongs to, from 1 on, below 0 for unhelpful ones [T]; 0: none."""
    texts = token_texts(tokenizer, scores.response_ids.tolist())
    whole, known, topic = "".join(texts), sentences(), topic_of(question)
    spans, at = [], 0
    for number, sentence in enumerate(split_sentences(whole), 1):
        at = whole.index(sentence, at)
        found = known.get(sentence)
        counts = found is not None and found.axis == FACE and found.topic == topic
        spans.append((at, at + len(sentence), number * found.sign if counts and found else 0))
        at += len(sentence)
    ends = np.cumsum([len(text) for text in texts])
    inside = [next((mark for start, end, mark in spans if start < stop <= end), 0) for stop in ends.tolist()]
    inside[-1] = 0  # the end of the turn
    return np.array(inside)


def area(values: Values, good: NDArray[np.bool_], weights: Values) -> float:
    """The weighted chance that a good value is greater than another; a tie counts half."""
    _, rank = np.unique(values, return_inverse=True)
    goods, bads = (np.bincount(rank, weights * side, rank.max() + 1) for side in (good, ~good))
    below = np.cumsum(bads) - bads / 2
    return float((goods * below).sum() / (goods.sum() * bads.sum()))


def interval(values: Values, good: NDArray[np.bool_], groups: NDArray[np.int64]) -> str:
    """The area with its interval, by resampling the ``groups``."""
    random = np.random.default_rng(0)
    found = area(values, good, np.ones(len(values)))
    drawn = [
        area(values, good, random.poisson(1.0, groups.max() + 1).astype(np.float64)[groups]) for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{found:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1500)
    parser.add_argument("--output", type=Path, help="folder for the table")
    options = parser.parse_args()
    profile = load_profile("clinic")
    assert profile.data is not None
    tokenizer = load_tokenizer(profile.patient.model)
    with gzip.open(profile.data.source, "rt", encoding="utf-8") as lines:
        questions = [json.loads(line)["prompt"] for line in lines]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "rewards"
        data, patient = DataSettings(**profile.data.model_dump()), load_patient(profile.patient.model)
        for _ in extract(patient, data, {FACE: profile.faces[FACE].pair()}, folder, limit=options.pairs):
            pass
        for _ in add_probe(patient, folder):
            pass
        ways = signals(profile)
        of_token: dict[str, list[Values]] = {name: [] for name in ways}
        of_sentence: dict[str, list[float]] = {name: [] for name in ways}
        token_marks, token_groups, sentence_marks, sentence_groups = [], [], [], []
        for pair in RewardsFolder(folder):
            question = questions[int(pair.chosen.pair_id) - 1]
            group = questions.index(question)  # pairs of one question are not independent
            for side in (pair.chosen, pair.rejected):
                mark = marks(tokenizer, question, side)
                held = mark != 0
                numbers = [number for number in dict.fromkeys(mark.tolist()) if number]
                token_marks.append(mark[held] > 0)
                token_groups += [group] * int(held.sum())
                sentence_marks += [number > 0 for number in numbers]
                sentence_groups += [group] * len(numbers)
                for name, reward in ways.items():
                    values = reward(side)
                    of_token[name].append(values[held])
                    of_sentence[name] += [float(values[mark == number].sum()) for number in numbers]
    good, groups = np.concatenate(token_marks), np.array(token_groups)
    good_sentence, groups_sentence = np.array(sentence_marks), np.array(sentence_groups)
    lines = [
        "# Do the rewards point at the right tokens?",
        "",
        f"`python benchmarks/credit.py`: {options.pairs} embedded pairs of the clinic, one label in ten wrong; "
        f"{int(good.sum())} tokens in helpful sentences and {int((~good).sum())} in unhelpful ones, "
        f"{int(good_sentence.sum())} and {int((~good_sentence).sum())} sentences. Area under the curve, with 95% "
        "intervals over questions.",
        "",
        "| reward | tokens | sentences |",
        "|---|---|---|",
    ]
    for name in ways:
        tokens = interval(np.concatenate(of_token[name]), good, groups)
        lines.append(f"| {name} | {tokens} | {interval(np.array(of_sentence[name]), good_sentence, groups_sentence)} |")
    print("\n".join(lines))
    if options.output:
        (options.output / "credit.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
