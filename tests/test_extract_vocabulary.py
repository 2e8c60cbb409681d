"""Ids that are no token, however loud their rows: every stage says the same of a token, and it is the twin's number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmdoctor import LLMdoctor
from llmdoctor.decoding.decode import decode
from llmdoctor.errors import LoadError
from llmdoctor.files import read_json
from llmdoctor.models import Patient, SplitLM, load_patient, token_log_probs
from llmdoctor.records import FacePair, TokenScores
from llmdoctor.settings import DataSettings, Guidance, Sampling, TrainSettings
from llmdoctor.text import conversation, prompt_ids, with_system
from llmdoctor.token_rewards import head
from llmdoctor.token_rewards.answer import score_answer
from llmdoctor.token_rewards.extract import extract
from llmdoctor.training.doctor import Doctor, new_doctor

LETTERS = "abcdefghijklmnopqrstuvwxyz ,.!"
HOLE, SIZE, ROWS = 13, 32, 40  # an id that no token has; ids below SIZE are tokens; the embedding has more rows
USED = [i for i in range(SIZE) if i != HOLE]
FACES = {"kind": FacePair("be kind", "be rude"), "brief": FacePair("be brief", "go on and on")}
CLOSE = 1e-4


def save_patient(folder: Path, *, eos: bool = True) -> Path:
    """One token per letter, and random weights of which the rows that no token has are loud."""
    ids = {"<eos>": 0, **{letter: USED[i + 1] for i, letter in enumerate(LETTERS)}}
    assert max(ids.values()) + 1 == SIZE
    backend = Tokenizer(models.WordLevel(ids, "<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    special: dict[str, str] = {"eos_token": "<eos>"} if eos else {}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = LlamaConfig(
        **shape,
        vocab_size=ROWS,
        initializer_range=0.4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0 if eos else None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[HOLE] *= 60
    model.lm_head.weight.data[SIZE:] *= 30
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Patient:
    return load_patient(save_patient(tmp_path_factory.mktemp("loud")))


@pytest.fixture(scope="module")
def twin(patient: Patient) -> Callable[[list[int], list[int]], torch.Tensor]:
    """log pi(v | prompt, y_<t) [T, V] in float64, one sequence at a time; -inf where v is no token."""
    model = load_patient(patient.name, dtype="float64").model

    def table(prompt: list[int], response: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        silent = torch.full_like(logits, -torch.inf)
        silent[:, USED] = logits[:, USED]
        return silent.log_softmax(-1)

    return table


@pytest.fixture(params=["blocks", "one block", "whole"])
def way(request: pytest.FixtureRequest, patient: Patient, monkeypatch: pytest.MonkeyPatch) -> str:
    """How stage 1's head goes through the vocabulary: in blocks of 5 ids, as on a CPU, or as on an accelerator."""
    if request.param == "blocks":
        monkeypatch.setattr(head, "_CPU_BLOCK", 5)
    elif request.param == "whole":
        monkeypatch.setattr(patient.model.lm_head, "_hf_hook", None, raising=False)
    return str(request.param)


def faced(patient: Patient, system: str) -> list[int]:
    return prompt_ids(patient.tokenizer, with_system(conversation("hello there"), system))


def extracted(patient: Patient, answers: list[str], folder: Path) -> list[TokenScores]:
    """What extract says of two answers to one prompt."""
    record = {"prompt": "hello there", "chosen": answers[0], "rejected": answers[1]}
    (folder / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    (pair,) = extract(patient, DataSettings(source=str(folder / "pairs.jsonl")), FACES, folder / "out")
    return [pair.chosen, pair.rejected]


ANSWERS = ["yes, of course. what a day!", "no. go away, all of you"]


def test_extract_normalises_over_tokens_alone(patient: Patient, twin: Any, way: str, tmp_path: Path) -> None:
    for scores in extracted(patient, ANSWERS, tmp_path):
        response = scores.response_ids.tolist()
        steps = torch.arange(len(response))
        for name, face in FACES.items():
            for system, own, other in (
                (face.positive, scores.positive, scores.alternative_positive),
                (face.negative, scores.negative, scores.alternative_negative),
            ):
                table = twin(faced(patient, system), response)
                np.testing.assert_allclose(own[name], table[steps, response], atol=CLOSE)
                np.testing.assert_allclose(other[name], table[steps, scores.alternative_ids], atol=CLOSE)


def test_an_alternative_is_the_best_other_token(patient: Patient, twin: Any, way: str, tmp_path: Path) -> None:
    """Never an unused id, a padding row or the target itself, each of which is somewhere the favourite of all rows."""
    loudest, plain = set(), load_patient(patient.name, dtype="float64").model
    for scores in extracted(patient, ANSWERS, tmp_path):
        response = scores.response_ids.tolist()
        steps = torch.arange(len(response))
        liking, raw = torch.zeros(len(response), ROWS), torch.zeros(len(response), ROWS)
        for face in FACES.values():
            prompt = faced(patient, face.positive)
            liking = liking + twin(prompt, response) / len(FACES)
            raw = raw + plain(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        favourite = raw.argmax(dim=-1)
        loudest |= {"hole" if i == HOLE else "padding" if i >= SIZE else "token" for i in favourite.tolist()}
        loudest |= {"target"} if (liking.argmax(dim=-1) == torch.tensor(response)).any() else set()
        best = liking.clone()
        best[steps, response] = -torch.inf
        assert set(scores.alternative_ids.tolist()) <= set(USED)
        assert (scores.alternative_ids != scores.response_ids).all()
        np.testing.assert_allclose(liking[steps, scores.alternative_ids], best.amax(dim=-1), atol=CLOSE)
    assert {"hole", "padding", "target"} <= loudest, "the test would show nothing"


def test_all_three_stages_give_a_token_one_log_prob(patient: Patient, twin: Any, way: str, tmp_path: Path) -> None:
    """An answer that stage 3 draws under a face, scored by stage 1, by score_answer, and by stage 2's doctor."""
    system = FACES["kind"].positive
    prompt = faced(patient, system)
    steps = list(decode(patient, {}, [prompt], Guidance, Sampling(max_new_tokens=24), seed=3, top=5))
    tokens = [step.token for step in steps if step.token.id not in patient.eos_ids]
    text, ids = "".join(token.text for token in tokens), [token.id for token in tokens]
    response = [*ids, 0]
    table = twin(prompt, response)
    wanted = table[torch.arange(len(response)), response]
    with torch.no_grad():
        unmasked = patient.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert len(ids) > 10
    assert (unmasked[torch.arange(len(response)), response] - wanted).abs().max() > 5, "the test would show nothing"

    decoded = [token.patient_logprob for token in tokens]
    np.testing.assert_allclose(decoded, wanted[:-1], atol=CLOSE)
    for row, token in zip(table, tokens, strict=False):
        for other in token.top:
            assert other.id in USED
            assert other.patient_logprob == pytest.approx(row[other.id].item(), abs=CLOSE)

    scores, _ = extracted(patient, [text, "no"], tmp_path)
    assert scores.response_ids.tolist() == response
    np.testing.assert_allclose(scores.positive["kind"], wanted, atol=CLOSE)
    np.testing.assert_allclose(score_answer(patient, FACES, "hello there", text).positive["kind"], wanted, atol=CLOSE)

    ids_1_L, lm = torch.tensor([prompt + response]), SplitLM.of(patient.model)
    hidden = lm.hidden(ids_1_L, torch.ones_like(ids_1_L))[0, len(prompt) - 1 : -1]
    for chunk in (0, 3):
        found = token_log_probs(lm, hidden, torch.tensor(response), patient.vocabulary, chunk)
        np.testing.assert_allclose(found, wanted, atol=CLOSE)
    doctor: Doctor = new_doctor(patient.name, TrainSettings(lora_rank=2))[0].eval()
    lengths = (torch.tensor([len(prompt)]), torch.tensor([len(response)]))
    with torch.no_grad():
        found = doctor(ids_1_L, torch.ones_like(ids_1_L), *lengths, scored=1).logprobs_B_T[0]
    np.testing.assert_allclose(found, wanted, atol=CLOSE)


def test_the_statistics_in_meta_are_those_of_a_naive_loop(patient: Patient, tmp_path: Path) -> None:
    """The faces of ``same`` are one: every pair is a tie, which counts half."""
    faces = {**FACES, "same": FacePair("be there", "be there")}
    (tmp_path / "pairs.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"{i}", "chosen": "abcdefgh"[i:] + "y", "rejected": "no" * (i + 1)}) + "\n"
            for i in range(7)
        )
    )
    pairs = list(extract(patient, DataSettings(source=str(tmp_path / "pairs.jsonl")), faces, tmp_path / "out"))
    found = read_json(tmp_path / "out" / "meta.json")["statistics"]["faces"]
    rates = []
    for name in FACES:
        gaps = [
            [[float(p) - float(n) for p, n in zip(s.positive[name], s.negative[name], strict=True)] for s in sides]
            for sides in ((pair.chosen, pair.rejected) for pair in pairs)
        ]
        every = [gap for sides in gaps for side in sides for gap in side]
        rates.append(sum(sum(chosen) > sum(rejected) for chosen, rejected in gaps) / len(gaps))
        assert found[name]["agreement"] == pytest.approx(rates[-1], abs=1e-6)
        assert found[name]["share_positive"] == pytest.approx(sum(gap > 0 for gap in every) / len(every), abs=1e-6)
        assert found[name]["mean_abs_gap"] == pytest.approx(sum(map(abs, every)) / len(every), abs=1e-5)
    assert any(abs(rate - 0.5) > 0.1 for rate in rates), "the test would show nothing"
    assert found["same"] == {"mean_abs_gap": 0, "share_positive": 0, "agreement": 0.5}


def test_a_tokenizer_without_eos_cannot_be_scored_and_says_what_to_do(tmp_path: Path) -> None:
    """Stage 1 needs the end of an answer; stage 3 does not, and goes on to its limit."""
    patient = load_patient(save_patient(tmp_path / "patient", eos=False))
    assert patient.eos_ids == frozenset()
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "hi", "chosen": "yes", "rejected": "no"}) + "\n")
    for run in (
        lambda: list(extract(patient, DataSettings(source=str(data)), FACES, tmp_path / "out")),
        lambda: score_answer(patient, FACES, "hi", "yes"),
    ):
        with pytest.raises(LoadError, match=r'names no end-of-sequence token.*set "eos_token" in its tokenizer_config'):
            run()
    assert not (tmp_path / "out").exists()
    assert len(list(LLMdoctor(patient_model=patient.name).stream("hi", max_new_tokens=40, seed=0))) == 40


def test_the_end_of_turn_of_the_chat_template_is_enough(tmp_path: Path) -> None:
    """A tokenizer may name no EOS where the model's generation config and the template agree on one."""
    patient = load_patient(save_patient(tmp_path / "patient", eos=False))
    patient.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}.{% endfor %}"
    patient.model.generation_config.eos_token_id = patient.tokenizer.convert_tokens_to_ids(".")
    scores = score_answer(patient, FACES, "hi", "yes")
    assert patient.tokenizer.decode(scores.response_ids.tolist()) == "yes."
