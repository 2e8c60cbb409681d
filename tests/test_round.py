"""Drawing from a round whose tensors are written by hand: what is drafted, what is accepted, what is said of it."""

import math
from typing import Any

import pytest
import torch

from llmdoctor.decoding.round import Round, draw_round
from llmdoctor.settings import Guidance, Sampling
from tests.test_guidance import key_for, keys

HALF = math.log(0.5)


def log(*rows: list[float]) -> torch.Tensor:
    """Places of one row [1, J, V] as log-probs, in float64."""
    return torch.tensor([rows], dtype=torch.float64).clamp(min=1e-300).log()


def test_golden() -> None:
    """Three places over three tokens, the drafts 0 and 2; patient alone; worked by hand.

    Place 0: the patient has (1/2, 1/4, 1/4), and the key draws token 0, as drafted. Place 1: (1/4, 1/2, 1/4), and the
    key draws token 1, where 2 was drafted. It is drawn all the same and ends the row's part of the round; place 2 is
    not drawn.
    """
    patient = log([0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [1.0, 0.0, 0.0])
    doctor = log([0.25, 0.25, 0.5], [0.5, 0.25, 0.25], [0.0, 1.0, 0.0])
    values = torch.tensor([[1.5, -2.5]], dtype=torch.float64)
    round_ = Round(torch.tensor([[0, 2]]), patient, {"d": doctor}, {}, {"d": values})
    own = torch.tensor([[key_for(0, [0.5, 0.25, 0.25]), key_for(1, [0.25, 0.5, 0.25]), 0]])
    ((first, second),) = draw_round(round_, [Guidance(1.0, {"d": 0.0})], [Sampling()], own, top=2)
    assert (first.drawn.id, first.drafted, first.flip, first.values) == (0, True, False, {"d": 1.5})
    assert (second.drawn.id, second.drafted, second.flip, second.values) == (1, False, False, {})
    assert first.drawn.logprob == first.drawn.patient_logprob == pytest.approx(HALF)
    assert first.drawn.doctor_logprobs == {"d": pytest.approx(2 * HALF)}
    assert first.kl == pytest.approx(0.0)
    assert (first.top[0].id, second.top[0].id) == (0, 1)
    assert second.top[0].logprob == pytest.approx(HALF)
    # equally likely tokens share the lowest rank; in the vocabulary, not among the two that are listed
    assert [(c.id, c.rank, c.patient_rank) for c in first.top] == [(0, 1, 1), (1, 2, 2)]
    # all drafts accepted: the place behind them is drawn too
    accepted = Round(torch.tensor([[0, 1]]), patient, {"d": doctor}, {}, {"d": values})
    (places,) = draw_round(accepted, [Guidance(1.0, {"d": 0.0})], [Sampling()], own)
    assert [place.drawn.id for place in places] == [0, 1, 0]
    assert [place.drafted for place in places] == [True, True, False]


def test_the_alternatives_end_with_the_patients_likeliest_and_the_drawn_token() -> None:
    """The product is the doctor: token 3 first, then 2; the patient's first is token 0, and token 1 is forced."""
    patient, doctor = log([0.4, 0.3, 0.2, 0.1]), log([0.1, 0.15, 0.25, 0.5])
    round_ = Round(torch.empty(1, 0, dtype=torch.long), patient, {"d": doctor})
    for forced, listed in ((1, [3, 0, 1]), (0, [3, 0]), (3, [3, 0])):
        how = [Guidance(0.0, {"d": 1.0})], [Sampling()], torch.zeros(1, 1, dtype=torch.long)
        ((place,),) = draw_round(round_, *how, top=1, forced=[forced])
        assert [c.id for c in place.top] == listed
        assert all((c.rank, c.patient_rank) == (4 - c.id, c.id + 1) for c in place.top)


def test_the_product_under_each_rows_own_guidance_and_sampling() -> None:
    """Two rows of the same numbers: one listens to the patient, greedily; the other to the doctor's inverse law.

    patient (1/2, 1/4, 1/4), doctor (1/8, 1/8, 3/4). alpha 1, beta 1: (1/16, 1/32, 6/32) = (2, 1, 6) / 9; the key draws
    token 1, and KL = sum p log(p / patient).
    """
    patient = log([0.5, 0.25, 0.25]).expand(2, 1, 3)
    doctor = log([0.125, 0.125, 0.75]).expand(2, 1, 3)
    round_ = Round(torch.empty(2, 0, dtype=torch.long), patient, {"d": doctor})
    guidances = [Guidance(1.0, {"d": 0.0}), Guidance(1.0, {"d": 1.0})]
    samplings = [Sampling(temperature=0.0), Sampling()]
    own_keys = torch.tensor([[key_for(2, [0.5, 0.25, 0.25])], [key_for(1, [2 / 9, 1 / 9, 6 / 9])]])
    (greedy,), (drawn,) = draw_round(round_, guidances, samplings, own_keys)
    assert (greedy.drawn.id, drawn.drawn.id, drawn.flip) == (0, 1, True)
    assert drawn.drawn.logprob == pytest.approx(math.log(1 / 9))
    law, own = (2 / 9, 1 / 9, 6 / 9), (0.5, 0.25, 0.25)
    assert drawn.kl == pytest.approx(sum(p * math.log(p / q) for p, q in zip(law, own, strict=True)))


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_a_row_is_drawn_as_if_alone_and_a_place_as_if_first(how: dict[str, Any]) -> None:
    """Random tensors, every row with its own guidance and sampling: each row, from each place on, by itself."""
    generator = torch.Generator().manual_seed(0)
    drafts = torch.randint(0, 9, (4, 3), generator=generator)

    def law() -> torch.Tensor:
        return torch.randn(4, 4, 9, generator=generator, dtype=torch.float64).log_softmax(-1)

    round_ = Round(drafts, law(), {"a": law(), "b": law()}, {"a": law(), "b": law()}, {"a": law()[..., 0, :3]})
    modes: Any = ("product", "ratio", "product", "ratio")
    guidances = [Guidance(0.5 * i, {"a": 1.0, "b": 0.3 * i}, modes[i], 0.01) for i in range(4)]
    samplings = [Sampling(**how), Sampling(temperature=0.0), Sampling(**how), Sampling(temperature=1.3)]
    each = keys(16, seed=1).view(4, 4)
    together = draw_round(round_, guidances, samplings, each, top=2)
    for row, places in enumerate(together):
        for start in range(len(places)):
            part = round_.of_row(row, start)
            (alone,) = draw_round(part, [guidances[row]], [samplings[row]], each[row : row + 1, start:], top=2)
            assert [place.drawn.id for place in alone] == [place.drawn.id for place in places[start:]]
            for mine, other in zip(alone, places[start:], strict=True):
                assert mine.drawn.logprob == pytest.approx(other.drawn.logprob, abs=1e-12)
                assert (mine.drafted, mine.values, mine.flip) == (other.drafted, other.values, other.flip)
        assert [place.drafted for place in places] == [True] * (len(places) - 1) + [False]


def test_a_forced_token_is_said_with_the_numbers_of_any_other() -> None:
    patient = log([0.5, 0.25, 0.25]).expand(2, 1, 3)
    round_ = Round(torch.empty(2, 0, dtype=torch.long), patient)
    same = torch.full((2, 1), key_for(2, [0.5, 0.25, 0.25]))
    (forced,), (drawn,) = draw_round(round_, [Guidance()] * 2, [Sampling()] * 2, same, forced=[1, None])
    assert (forced.drawn.id, drawn.drawn.id) == (1, 2)
    assert forced.drawn.logprob == pytest.approx(math.log(0.25))
    assert not forced.flip


def test_a_flip_is_a_likeliest_token_that_guidance_changed_not_one_that_was_drawn() -> None:
    """patient (1/2, 1/4, 1/4), doctor (1/8, 1/8, 3/4): their product likes token 2 best, whatever the key draws."""
    patient = log([0.5, 0.25, 0.25]).expand(4, 1, 3)
    round_ = Round(torch.empty(4, 0, dtype=torch.long), patient, {"d": log([0.125, 0.125, 0.75]).expand(4, 1, 3)})
    alone, guided = Guidance(1.0, {"d": 0.0}), Guidance(1.0, {"d": 1.0})
    law, own = [2 / 9, 1 / 9, 6 / 9], [0.5, 0.25, 0.25]
    own_keys = torch.tensor([[key_for(1, own)], [key_for(1, own)], [key_for(0, law)], [key_for(2, law)]])
    ties = Guidance(0.5, {"d": 0.0})  # alpha alone changes no order, and tokens that tie are as likely as each other
    rows = draw_round(round_, [alone, ties, guided, guided], [Sampling()] * 4, own_keys)
    assert [place.flip for (place,) in rows] == [False, False, True, True]
    assert [place.drawn.id for (place,) in rows][2:] == [0, 2]
