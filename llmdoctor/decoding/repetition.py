"""Which tokens would repeat an n-gram of the answer.

A sentence is nearly repeated when another begins with its first words: n = 2 counts the full stop before the first one.
An answer has none before its first sentence, and no space before its first word, so `Row` adds the one and ignores the
other.

What is forbidden at a place depends on the tokens before it only, drafted ones included: speculation stays exact.
"""

from collections.abc import Collection, Iterable
from contextlib import suppress

import torch
from torch import Tensor

LEAST_REST = 0.02


def repeating(ids: list[int], n: int) -> set[int]:
    """The tokens that, behind ``ids``, would end an n-gram that ``ids`` already holds. None for n = 0."""
    if n < 2 or len(ids) < n:
        return set(ids) if n == 1 else set()
    tail, found = ids[1 - n :], set()
    at, end = n - 2, len(ids) - 1
    with suppress(ValueError):  # no further place
        while True:
            # index runs in C: a loop over every place would be felt in answers of thousands of tokens
            at = ids.index(tail[-1], at, end) + 1
            if ids[at - n + 1 : at] == tail:
                found.add(ids[at])
    return found


def without(logprobs_M_V: Tensor, forbidden: Iterable[Collection[int]]) -> Tensor:
    """The log-probs [M, V] with those of each row's forbidden tokens at -inf.

    A row stays as it is where all other tokens together have less than `LEAST_REST` of the probability: within a word,
    or a sentence that has begun, nothing else can be said, and anything else would be broken text. There
    `no_repeat_ngram_size` of transformers is stricter.
    """
    places = [(row, token) for row, tokens in enumerate(forbidden) for token in tokens]
    if not places:
        return logprobs_M_V
    rows, tokens = torch.tensor(places, device=logprobs_M_V.device).unbind(dim=1)
    cut_M_V = logprobs_M_V.index_put((rows, tokens), logprobs_M_V.new_tensor(-torch.inf))
    possible_M_1 = cut_M_V.exp().sum(dim=-1, keepdim=True) >= LEAST_REST
    return torch.where(possible_M_1, cut_M_V, logprobs_M_V)
