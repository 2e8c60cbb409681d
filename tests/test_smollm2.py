"""The doctors that come with the package for a real model: what they prefer, and what they cost."""

import pytest
import torch

from llmdoctor import LLMdoctor
from llmdoctor.profile import load_profile, profile_path

CONTEXTS = [
    "My day at the sea was",
    "The new colleague is",
    "She opened the letter and felt",
    "Our holiday was",
    "He is a",
]
PREFERRED = {
    "cheerful": ([" wonderful", " lovely", " happy", " great"], [" terrible", " awful", " sad", " horrible"]),
    "plain": ([" use", " show", " help", " end"], [" utilization", " demonstrate", " facilitate", " conclusion"]),
}


@pytest.fixture(scope="module")
def assistant(smollm: str) -> LLMdoctor:
    assert load_profile("smollm2").patient.model == smollm
    return LLMdoctor.from_profile("smollm2", device="cpu")


@pytest.mark.parametrize("name", PREFERRED)
def test_a_doctor_prefers_what_it_is_named_for(assistant: LLMdoctor, name: str) -> None:
    tokenizer, model, doctor = assistant.patient.tokenizer, assistant.patient.model, assistant._doctors[name]
    assert doctor.model is model  # no forward of its own
    wanted, other = ([tokenizer(word).input_ids for word in words] for words in PREFERRED[name])
    assert all(len(ids) == 1 for ids in wanted + other)
    for text in CONTEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            hidden = model.base_model(input_ids=ids).last_hidden_state[:, -1]
            change = doctor.logits(torch.zeros(1), hidden)[0]
        assert change[torch.tensor(wanted)].mean() > change[torch.tensor(other)].mean() + 0.1


def test_they_steer_the_answers_of_the_profile(assistant: LLMdoctor) -> None:
    comparison = assistant.compare("Tell me about my new neighbour.", seed=3, max_new_tokens=24)
    assert comparison.guided.text != comparison.patient.text
    assert comparison.metrics["kl"] > 0


def test_a_whisper_of_the_doctors_changes_hardly_anything(assistant: LLMdoctor) -> None:
    """Whatever the profile's settings, KL and colours are the doctors' doing: as they fall silent, both go to 0."""
    guidance = assistant.guidance.replace(betas=dict.fromkeys(assistant.doctor_names, 1e-4))
    comparison = assistant.compare("Tell me about my new neighbour.", guidance=guidance, seed=3, max_new_tokens=16)
    assert abs(comparison.metrics["kl_per_token"]) < 1e-3


def test_the_doctors_are_small() -> None:
    folder = profile_path("smollm2").parent / "smollm2"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(load_profile("smollm2").doctors)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 1_500_000  # with pairs and cards
    assert all(path.stat().st_size < 30_000 for path in folder.rglob("*.safetensors"))
