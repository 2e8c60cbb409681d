"""Which answer a doctor prefers: against one forward per answer, against the trainer's own figure, and by hand."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdoctor import LLMdoctor
from llmdoctor.errors import DataError, UsageError
from llmdoctor.evaluation.preference import Preferences, preferences
from llmdoctor.models import load_patient
from llmdoctor.profile import load_profile, profile_path
from llmdoctor.records import PreferencePair, SkippedRecord
from llmdoctor.settings import RewardSettings, TrainSettings
from llmdoctor.text import end_of_turn, prompt_ids, response_ids
from llmdoctor.token_rewards.extract import extract
from llmdoctor.token_rewards.folder import RewardsFolder
from llmdoctor.token_rewards.pairs import read_pairs
from llmdoctor.training.batches import hold_out, sides
from llmdoctor.training.train import train

CLINIC = profile_path("clinic").parent / "clinic"


@pytest.fixture(scope="module")
def clinic() -> LLMdoctor:
    return LLMdoctor.from_profile("clinic", dtype="float32", mode="product", with_bases=True)


@pytest.fixture(scope="module")
def pairs() -> list[PreferencePair]:
    data = load_profile("clinic").data
    assert data is not None
    return list(islice(read_pairs(**data.model_dump()), 6))


def naive(assistant: LLMdoctor, model: Any, pair: PreferencePair, answer: str) -> float:
    """log p(answer) and its end, by one forward of one row."""
    patient = assistant.patient
    prompt = prompt_ids(patient.tokenizer, pair.prompt)
    ids = response_ids(patient.tokenizer, answer, end_of_turn(patient.tokenizer, patient.eos_ids))
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    logprobs = patient.vocabulary.mask(logits).double().log_softmax(dim=-1)
    return float(logprobs.gather(1, torch.tensor(ids)[:, None]).sum())


@pytest.mark.parametrize("batch_tokens", [100, 4096])
def test_scores_are_those_of_single_forwards(
    batch_tokens: int, clinic: LLMdoctor, pairs: Sequence[PreferencePair]
) -> None:
    counted: list[int] = []
    found = preferences(clinic, pairs, batch_tokens=batch_tokens, on_pair=lambda: counted.append(1))
    assert (found.pairs, len(counted)) == (6, 6)
    for name, doctor in clinic.doctors.items():
        margins = [
            naive(clinic, doctor.model, pair, pair.chosen)
            - naive(clinic, doctor.base, pair, pair.chosen)
            - naive(clinic, doctor.model, pair, pair.rejected)
            + naive(clinic, doctor.base, pair, pair.rejected)
            for pair in pairs
        ]
        assert found.doctors[name].chosen.value == sum(margin > 0 for margin in margins) / 6
        assert found.doctors[name].margin.value == pytest.approx(sum(margins) / 6, abs=1e-3)
    alone = [
        naive(clinic, clinic.patient.model, pair, pair.chosen)
        - naive(clinic, clinic.patient.model, pair, pair.rejected)
        for pair in pairs
    ]
    assert found.patient.margin.value == pytest.approx(sum(alone) / 6, abs=1e-3)


def test_length_and_the_pairs_where_it_is_the_wrong_guess(clinic: LLMdoctor) -> None:
    """Three pairs: the chosen answer longer, shorter, and equal, where every score is equal too and counts half."""
    asked = ({"role": "user", "content": "How can I sleep better?"},)
    texts = [("Go to bed early and rest well.", "No."), ("No.", "Go to bed early and rest well."), ("Yes.", "Yes.")]
    pairs = [PreferencePair(str(i), asked, *both) for i, both in enumerate(texts)]  # type: ignore[arg-type]
    found = preferences(clinic, pairs)
    assert (found.pairs, found.shorter) == (3, 1)
    assert (found.longer.chosen.value, found.longer.shorter.value) == (0.5, 0.0)
    assert found.longer.margin.value == pytest.approx(0.0)
    for judge in (*found.doctors.values(), *found.bases.values(), found.patient):
        assert judge.chosen.value == 0.5  # one way round it is right, the other way wrong
        assert judge.shorter.value in (0.0, 1.0)
    assert found.beyond["helpful"]["longer"].value == pytest.approx(0.0)
    assert Preferences.to_dict(found)["doctors"]["helpful"]["chosen"]["value"] == 0.5


def test_pairs_that_fit_no_context_are_told(clinic: LLMdoctor, pairs: Sequence[PreferencePair]) -> None:
    skipped: list[SkippedRecord] = []
    long = PreferencePair("7", pairs[0].prompt, "word " * 5000, "No.")
    assert preferences(clinic, [*pairs, long], on_skip=skipped.append).pairs == 6
    assert [record.line for record in skipped] == [7]
    with pytest.raises(DataError, match="nothing to evaluate"):
        preferences(clinic, [long], on_skip=skipped.append)


def test_without_the_bases_it_says_how_to_load_them(pairs: Sequence[PreferencePair]) -> None:
    with pytest.raises(UsageError, match="with_bases=True"):
        preferences(LLMdoctor.from_profile("clinic", dtype="float32", mode="product"), pairs)


def test_it_is_the_trainers_own_figure(tmp_path: Path) -> None:
    """What train says of its held-out pairs, with their interval, is what eval says of the same pairs."""
    profile = load_profile("clinic")
    assert profile.data is not None
    patient = load_patient(profile.patient.model, dtype="float32")
    faces = {name: face.pair() for name, face in profile.faces.items()}
    list(extract(patient, profile.data, faces, tmp_path / "rewards", limit=8))
    rewards = RewardSettings()
    how: dict[str, Any] = {"max_steps": 1, "warmup_ratio": 0.0, "checkpoint_every": 1, "batch_size": 2, "holdout": 0.5}
    settings = TrainSettings(method="full", learning_rate=1e-2, **how)
    made = train(
        tmp_path / "rewards",
        tmp_path / "doctor",
        base_model=str(CLINIC / "doctor-base"),
        reward_settings=rewards,
        settings=settings,
    )
    scored = [sides(pair, rewards, {"helpful": 0.5, "safe": 0.5}) for pair in RewardsFolder(tmp_path / "rewards")]
    held_out = {chosen.pair_id for chosen, _ in hold_out(scored, settings.holdout, settings.seed)[1]}
    assert made["metrics"]["pairs_held_out"] == len(held_out) > 3
    pairs = [pair for pair in read_pairs(**profile.data.model_dump(), limit=8) if pair.id in held_out]
    assistant = LLMdoctor(profile.patient.model, tmp_path / "doctor", dtype="float32", with_bases=True)
    found = preferences(assistant, pairs).to_dict()["doctors"]["doctor"]["chosen"]
    assert found == pytest.approx(made["metrics"]["prefers_chosen"])
