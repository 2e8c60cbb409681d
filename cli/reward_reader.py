"""A rewards folder as ``inspect`` shows it: pairs to look at, and statistics of all of them, in one pass."""

import heapq
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from llmdoctor.cli.terminal import progress
from llmdoctor.errors import UsageError
from llmdoctor.show.formats import counted
from llmdoctor.show.rewards import RewardedText, ShownPair

if TYPE_CHECKING:
    from llmdoctor.records import PairScores, TokenRewards
    from llmdoctor.settings import RewardSettings
    from llmdoctor.token_rewards.folder import RewardsFolder
    from llmdoctor.token_rewards.summary import FaceDifference, Statistics


class RewardReader:
    """A rewards folder at given reward settings, streamed."""

    def __init__(
        self, rewards: "RewardsFolder", settings: "RewardSettings", weights: Mapping[str, float], tokenizer: Any
    ) -> None:
        self.rewards, self.settings, self.weights, self.tokenizer = rewards, settings, weights, tokenizer

    def all(
        self, *, pair: str | None, contains: str | None, worst: bool, limit: int
    ) -> "tuple[list[tuple[TokenRewards, TokenRewards]], Statistics, tuple[FaceDifference, ...]]":
        """In one pass, holding ``limit`` pairs: those to show, and the statistics of all that match ``contains``."""
        from llmdoctor.settings import OF_STATES
        from llmdoctor.token_rewards.summary import FaceDifferences, RewardCounter, margin

        ids = range(max(len(self.tokenizer), max(self.tokenizer.get_vocab().values()) + 1))
        special = [i for i in self.tokenizer.all_special_ids if i in ids]
        counter = RewardCounter(
            self.tokenizer.convert_ids_to_tokens(list(ids)),
            self.text,
            special,
            "nats" if OF_STATES.isdisjoint(self.weights) else "log-odds",
        )
        differences = FaceDifferences([name for name in self.weights if name in self.rewards.faces])
        first: list[tuple[TokenRewards, TokenRewards]] = []
        least: list[tuple[float, int, tuple[TokenRewards, TokenRewards]]] = []  # a heap, the least contradictory first
        with progress("Counting", len(self.rewards), "pair") as advance:
            for number, scores in enumerate(self.rewards):
                advance()
                if contains is not None and not self._contains(scores, contains):
                    continue
                sides = self.sides(scores)
                counter.add(*sides)
                differences.add(scores)
                if pair is not None:
                    if scores.chosen.pair_id == pair:
                        first.append(sides)
                elif worst:
                    heapq.heappush(least, (-margin(*sides), -number, sides))
                    if len(least) > limit:
                        heapq.heappop(least)
                elif len(first) < limit:
                    first.append(sides)
        statistics = counter.result()
        if contains is not None and statistics.pairs == 0:
            raise UsageError(
                f"--contains: none of the {len(self.rewards)} pairs of {self.rewards.path} has {contains!r}"
            )
        if pair is not None and not first:
            raise self._no_pair(pair)
        chosen = first or [sides for _, _, sides in sorted(least, key=lambda item: item[:2], reverse=True)]
        return chosen, statistics, differences.result()

    def pick(self, pair: str | None, contains: str | None, limit: int) -> "Iterator[PairScores]":
        """The pairs themselves, as they are read."""
        matching = (
            scores
            for scores in self.rewards
            if (pair is None or scores.chosen.pair_id == pair)
            and (contains is None or self._contains(scores, contains))
        )
        return islice(matching, limit)

    def _no_pair(self, pair: str) -> UsageError:
        return UsageError(f"--pair: there is no pair {pair!r} among the {len(self.rewards)} of {self.rewards.path}")

    def _contains(self, scores: "PairScores", text: str) -> bool:
        parts = (scores.chosen.prompt_ids, scores.chosen.response_ids, scores.rejected.response_ids)
        return any(text.casefold() in self.text(ids.tolist()).casefold() for ids in parts)

    def text(self, ids: list[int]) -> str:
        """Token ids as text, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def sides(self, scores: "PairScores") -> "tuple[TokenRewards, TokenRewards]":
        """The token rewards of both responses."""
        from llmdoctor.token_rewards.formula import token_rewards

        made = (token_rewards(side, self.settings, self.weights) for side in (scores.chosen, scores.rejected))
        return next(made), next(made)

    def prompt(self, scores: "TokenRewards") -> str:
        """What was asked."""
        return self.text(scores.scores.prompt_ids.tolist()).strip()

    def shown(self, sides: "Sequence[TokenRewards]") -> ShownPair:
        """A pair as screens show it."""
        responses = tuple(rewarded_text(self.tokenizer, side) for side in sides)
        return ShownPair(sides[0].scores.pair_id, self.prompt(sides[0]), responses)

    def json(self, sides: "Sequence[TokenRewards]") -> dict[str, Any]:
        """A pair as ``--json`` gives it."""
        named: dict[str, Any] = {
            side.scores.side: json_side(side, rewarded_text(self.tokenizer, side)) for side in sides
        }
        return {"id": sides[0].scores.pair_id, "prompt": self.prompt(sides[0]), **named}


def rewarded_text(tokenizer: Any, item: "TokenRewards") -> RewardedText:
    """One response as screens show it."""
    from llmdoctor.text import token_texts

    gap = float(item.gaps.sum())
    reward, tokens = float(item.rewards.sum()), counted(len(item.rewards), "token")
    title = f"{item.scores.side}, reward {reward:+.2f}, gap {gap:+.2f}, {tokens}"
    pieces = token_texts(tokenizer, item.scores.response_ids)
    rewards, gaps, importance = (tuple(map(float, v)) for v in (item.rewards, item.gaps, item.importance))
    probe = item.scores.probe
    return RewardedText(
        title, tuple(pieces), rewards, gaps, importance, () if probe is None else tuple(map(float, probe))
    )


def json_side(item: "TokenRewards", shown: RewardedText) -> dict[str, Any]:
    """One response as ``--json`` gives it."""
    rows = zip(item.scores.response_ids, shown.pieces, shown.rewards, shown.gaps, shown.importance, strict=True)
    tokens = [{"id": int(i), "text": text, "reward": r, "gap": g, "importance": s} for i, text, r, g, s in rows]
    for token, value in zip(tokens, shown.probe, strict=False):  # no probe, no values
        token["probe"] = value
    return {"reward": float(item.rewards.sum()), "gap": float(item.gaps.sum()), "tokens": tokens}
