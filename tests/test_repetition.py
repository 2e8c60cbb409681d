"""Answers that do not repeat an n-gram: the naive twin, transformers' own, and the same tokens whatever is drafted."""

import random

import pytest
import torch

from llmdoctor.decoding.repetition import repeating, without
from llmdoctor.settings import Guidance
from tests.test_decode import EOS, LETTERS, PROMPTS, SIZE, bigram, char_tokenizer, doctor_of, ids_of, patient_of, tiny
from tests.test_speculative import Erratic, run, same


@pytest.mark.parametrize("n", range(6))
def test_what_would_repeat_an_n_gram(n: int) -> None:
    chance = random.Random(n)
    for _ in range(300):
        ids = [chance.randrange(3) for _ in range(chance.randrange(12))]
        seen = {tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)}
        expected = {token for token in range(3) if n and tuple([*ids, token][-n:]) in seen and len(ids) >= n - 1}
        assert repeating(ids, n) == expected


def test_where_hardly_anything_else_is_possible_the_row_is_left_alone() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.985, 0.01, 0.005], [0.97, 0.02, 0.01], [1.0, 0.0, 0.0]])
    expected = probs.clone()
    expected[0, 0] = expected[3, 0] = 0
    found = without(probs.log(), [{0}, set(), {0}, {0}, {0}])
    torch.testing.assert_close(found, expected.log(), rtol=0, atol=0)


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.9}])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_drafts_change_nothing_and_no_n_gram_comes_twice(n: int, how: dict[str, float]) -> None:
    """Of models that repeat themselves without it; in a batch whose prompts hold the n-grams of others."""
    patient, doctor = patient_of(tiny("llama", seed=3)), doctor_of(tiny("llama", seed=4))
    guidance, drafting = Guidance(0.8, {"doctor": 0.9}), Erratic(n)
    how = {"max_new_tokens": 24, "top": 2, **how}

    def again(rows: list[list[object]]) -> int:
        found = 0
        for row in rows:
            ids = ids_of(row)
            grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
            found += len(grams) - len(set(grams))
        return found

    plain = run(patient, [doctor], PROMPTS, guidance, no_repeat_ngram=n, **how)
    same(run(patient, [doctor], PROMPTS, guidance, drafting, no_repeat_ngram=n, **how), plain)
    assert drafting.tested > 0
    assert again(plain) == 0
    if n < 4:
        assert again(run(patient, [doctor], PROMPTS, guidance, **how)) > 0


@pytest.mark.parametrize("n", [2, 3])
def test_a_space_ahead_makes_no_other_word_and_an_answer_begins_like_a_sentence(n: int) -> None:
    words = [".", *LETTERS[:14]]
    ids = {"<eos>": EOS, **{token: i + 1 for i, token in enumerate([*words, *("Ġ" + word for word in words[1:])])}}
    tokenizer = char_tokenizer(ids)
    word_of = {i: token.removeprefix("Ġ") for token, i in ids.items()}
    patient = patient_of(tiny("llama", seed=3), tokenizer)
    doctor = doctor_of(tiny("llama", seed=4), vocabulary=patient.vocabulary)
    guidance = Guidance(0.8, {"doctor": 0.9})

    def again(rows: list[list[object]]) -> int:
        found = 0
        for row in rows:
            said = [".", *(word_of[i] for i in ids_of(row))]
            grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
            found += len(grams) - len(set(grams))
        return found

    plain = run(patient, [doctor], PROMPTS * 4, guidance, no_repeat_ngram=n, max_new_tokens=24)
    assert again(plain) == 0 < again(run(patient, [doctor], PROMPTS * 4, guidance, max_new_tokens=24))
    same(run(patient, [doctor], PROMPTS * 4, guidance, Erratic(n), no_repeat_ngram=n, max_new_tokens=24), plain)


@pytest.mark.parametrize("n", [2, 3])
def test_greedy_answers_are_those_of_generate(n: int) -> None:
    """generate counts the prompt's n-grams too: here its one token is not said again."""
    model = tiny("llama", seed=3)
    (row,) = run(patient_of(model), [], [[1]], Guidance(), temperature=0, max_new_tokens=20, no_repeat_ngram=n)
    said = model.generate(
        torch.tensor([[1]]), do_sample=False, max_new_tokens=20, no_repeat_ngram_size=n, pad_token_id=0
    )[0].tolist()
    assert 1 not in said[1:]
    assert ids_of(row) == said[1:]


def test_a_repetition_without_an_alternative_is_said() -> None:
    """Only "a" and "b" are plausible behind one another: nothing comes in that the patient would not say."""
    table = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    table[1, 2] = table[2, 1] = 50
    talker = bigram(table)
    doctor = doctor_of(talker, base=talker)
    guidance = Guidance(1, {"doctor": 1}, "ratio", plausibility=0.05)
    (row,) = run(patient_of(talker), [doctor], [[1]], guidance, max_new_tokens=8, no_repeat_ngram=2)
    assert ids_of(row) == 4 * [2, 1]


def test_a_continued_answer_does_not_repeat_its_beginning() -> None:
    """The end of the prompt is the beginning of the answer; what stands before may be said again."""
    patient = patient_of(tiny("llama", seed=3))
    (whole,) = run(patient, [], [[1, 5]], Guidance(), temperature=0, max_new_tokens=20, no_repeat_ngram=1)
    ids = ids_of(whole)
    (rest,) = run(
        patient, [], [[1, 5, *ids[:8]]], Guidance(), temperature=0, max_new_tokens=12, no_repeat_ngram=1, begun=8
    )
    assert ids_of(rest) == ids[8:]
    (other,) = run(patient, [], [[1, 5, *ids[:8]]], Guidance(), temperature=0, max_new_tokens=12, no_repeat_ngram=1)
    assert ids_of(other) != ids[8:]
