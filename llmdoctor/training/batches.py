"""What stage 2 trains on: scored responses, the split into training and held-out pairs, and padded batches.

Shape suffixes beside those of ``llmdoctor.records``: R rows of a padded batch (2B scored responses, then one row for
every alternative), P pairs of states whose values are compared, L positions of a padded sequence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmdoctor.records import PairScores, TokenScores
from llmdoctor.settings import RewardSettings, TrainSettings
from llmdoctor.token_rewards.formula import alternative_rewards, token_rewards

_MIN_ADVANTAGE = 0.5  # two tokens after the same prefix are compared when their rewards differ by more than this


@dataclass(slots=True)
class ScoredResponse:
    """One response with its token rewards, as stage 2 uses it.

    ``prompt`` [L] and ``response`` [T] are token ids; ``rewards`` [T] are the token rewards r_t. ``others`` lists the
    tokens that may be compared with the response's own after the same prefix: (position t, the other token's id,
    whether the other is better). ``reference`` [T] are the response's log-probs (nats) under the doctor's base; None
    until the trainer has computed them. ``states`` [N, H] are what the base's head reads at every state of the
    response, where the doctor has the base's own states and they are kept.

    >>> ScoredResponse(
    ...     pair_id="a",
    ...     prompt=torch.tensor([5, 6]),
    ...     response=torch.tensor([7, 8, 2]),
    ...     rewards=torch.tensor([0.9, -0.1, 0.0]),
    ...     others=[(0, 9, False)],  # instead of 7 it could have said 9, which would have been worse
    ... ).reference is None
    True
    """

    pair_id: str
    prompt: Tensor
    response: Tensor
    rewards: Tensor
    others: list[tuple[int, int, bool]]
    reference: Tensor | None = None
    states: Tensor | None = None


ScoredPair = tuple[ScoredResponse, ScoredResponse]  # chosen, rejected


def sides(
    pair: PairScores, settings: RewardSettings, weights: dict[str, float], ceiling: float | None = None
) -> ScoredPair:
    """The (chosen, rejected) responses of a scored pair; ``weights`` {face: weight} are those of ``face_weights``.

    Departure from the paper: a reward above ``ceiling`` counts as the ceiling. None means no ceiling.
    """
    return _scored(pair.chosen, settings, weights, ceiling), _scored(pair.rejected, settings, weights, ceiling)


def _scored(
    scores: TokenScores, settings: RewardSettings, weights: dict[str, float], ceiling: float | None
) -> ScoredResponse:
    rewards = token_rewards(scores, settings, weights).rewards
    others = []
    # None: this direction of the reward says nothing about tokens that were not said
    if (rivals := alternative_rewards(scores, settings, weights)) is not None:
        advantage = rivals - rewards
        others = [
            (t, int(scores.alternative_ids[t]), bool(advantage[t] > 0))
            for t in (abs(advantage) > _MIN_ADVANTAGE).nonzero()[0].tolist()
        ]
    return ScoredResponse(
        scores.pair_id,
        torch.from_numpy(scores.prompt_ids).long(),
        torch.from_numpy(scores.response_ids).long(),
        torch.from_numpy(rewards).clamp(max=math.inf if ceiling is None else ceiling),
        others,
    )


def hold_out(pairs: Sequence[ScoredPair], share: float, seed: int) -> tuple[list[ScoredPair], list[ScoredPair]]:
    """Split into (training, held-out) pairs. At most ``share`` of them, in [0, 1), is held out.

    All pairs of a prompt go to the same part: a held-out prompt is never trained on.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (chosen, _) in enumerate(pairs):
        groups.setdefault(tuple(chosen.prompt.tolist()), []).append(i)
    prompts = list(groups.values())
    wanted, held = int(share * len(pairs)), set[int]()
    for k in torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(held) + len(prompts[k]) <= wanted:
            held.update(prompts[k])
    return [pair for i, pair in enumerate(pairs) if i not in held], [pairs[i] for i in sorted(held)]


class Pairs(torch.utils.data.Dataset[ScoredPair]):
    """Scored pairs; each access puts the ``others`` of both responses into a random order.

    The collator takes the first few of them. The order depends on seed, epoch and index alone, so that a resumed run
    draws the same ones as an uninterrupted run.
    """

    def __init__(self, pairs: Sequence[ScoredPair], seed: int) -> None:
        self.pairs, self.seed, self.epoch = pairs, seed, 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> ScoredPair:
        # numpy mixes the three numbers with SeedSequence, whose result its compatibility policy fixes. Python's
        # hash of a tuple is an implementation detail, and torch's CPU generator keeps only 32 bits of a seed.
        random = np.random.default_rng((self.seed, self.epoch, index))
        chosen, rejected = (
            replace(side, others=[side.others[k] for k in random.permutation(len(side.others))])
            for side in self.pairs[index]
        )
        return chosen, rejected


class SetEpoch(TrainerCallback):
    """Sets ``Pairs.epoch``. Accelerate's own ``set_epoch`` does not reach the data set when it skips or shards."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first batch of an epoch is drawn."""
        self.pairs.epoch = int(state.epoch or 0)


class Collator:
    """Pads B pairs to a batch of R rows: chosen and rejected of every pair in turn, then a row for every alternative.

    Each row is prompt, response, padding. ``rewards`` and ``reference`` [2B, T] go with the first 2B rows, which are
    the scored ones; ``reference`` is absent when the responses have none, as are ``states`` [2B, N, H]. ``value_pairs``
    [P, 4] holds (row, state, other row, other state): log V should be greater at the first of the two states.

    The states compared are those after the first tokens in which chosen and rejected differ (the paper) and, for up to
    ``settings.alternatives`` of the ``others`` of each response, those after its own token and after the other one.
    Only log V is learnt on the row of an alternative, which ends with the other token.

    >>> chosen = ScoredResponse("a", torch.tensor([5, 6]), torch.tensor([7, 2]), torch.tensor([0.5, 0.0]), [])
    >>> rejected = ScoredResponse("a", torch.tensor([5, 6]), torch.tensor([8]), torch.tensor([-0.5]), [(0, 9, True)])
    >>> for name, value in Collator(TrainSettings(alternatives=1))([(chosen, rejected)]).items():
    ...     print(name, value.tolist() if isinstance(value, Tensor) else value)
    input_ids [[5, 6, 7, 2], [5, 6, 8, 0], [5, 6, 9, 0]]
    attention_mask [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]]
    prompt_lengths [2, 2, 2]
    response_lengths [2, 1, 1]
    rewards [[0.5, 0.0], [-0.5, 0.0]]
    pair_ids ['a']
    value_pairs [[0, 1, 1, 1], [2, 1, 1, 1]]
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.alternatives = settings.alternatives

    def __call__(self, pairs: list[ScoredPair]) -> dict[str, Any]:
        """The batch of these pairs, as the class describes it."""
        responses = [side for pair in pairs for side in pair]
        rows = [(side.prompt, side.response) for side in responses]
        value_pairs: list[tuple[int, int, int, int]] = []
        for i, (chosen, rejected) in enumerate(pairs):
            fork = _fork(chosen.response, rejected.response)
            if fork is not None and torch.equal(chosen.prompt, rejected.prompt):
                value_pairs.append((2 * i, fork + 1, 2 * i + 1, fork + 1))
        for row, side in enumerate(responses):
            for position, other_id, better in side.others[: self.alternatives]:
                own, other = (row, position + 1), (len(rows), position + 1)
                value_pairs.append((*other, *own) if better else (*own, *other))
                rows.append((side.prompt, torch.cat([side.response[:position], torch.tensor([other_id])])))
        references = [side.reference for side in responses if side.reference is not None]
        states = [side.states for side in responses if side.states is not None]
        return {
            **pad_rows(rows),
            "rewards": pad_sequence([side.rewards for side in responses], batch_first=True),
            **({"reference": pad_sequence(references, batch_first=True)} if references else {}),
            **({"states": pad_sequence(states, batch_first=True)} if states else {}),
            "pair_ids": [chosen.pair_id for chosen, _ in pairs],
            "value_pairs": torch.tensor(value_pairs, dtype=torch.long).reshape(-1, 4),
        }


def pad_rows(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """(prompt, response) rows, right-padded, as ``Doctor.forward`` takes them."""
    sequences = [torch.cat(parts) for parts in rows]
    lengths = torch.tensor([len(s) for s in sequences])
    input_ids = pad_sequence(sequences, batch_first=True)
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "prompt_lengths": torch.tensor([len(prompt) for prompt, _ in rows]),
        "response_lengths": torch.tensor([len(response) for _, response in rows]),
    }


def _fork(a: Tensor, b: Tensor) -> int | None:
    """The first position at which two responses differ; None when one begins with the other."""
    shared = min(len(a), len(b))
    differs = (a[:shared] != b[:shared]).nonzero()
    return int(differs[0]) if len(differs) else None
