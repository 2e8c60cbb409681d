"""Stage 1's shared prefixes, its batches, and what becomes of them when memory runs out."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmdoctor.files import read_json
from llmdoctor.models import Patient, load_patient
from llmdoctor.records import FacePair
from llmdoctor.settings import DataSettings
from llmdoctor.text import prompt_ids, with_system
from llmdoctor.token_rewards.extract import extract
from llmdoctor.token_rewards.folder import RewardsFolder
from llmdoctor.token_rewards.scoring import fitting_batch_tokens

FACES = {"kind": FacePair("Be kind.", "Be rude."), "exact": FacePair("Be very exact, always.", "Guess.")}
RECORDS: list[dict[str, Any]] = [
    {"prompt": "Who is there?", "chosen": "It is the doctor.", "rejected": "No."},
    {"prompt": "How can I sleep better? " * 3, "chosen": "Go to bed at the same time.", "rejected": "a"},
    {"prompt": "Why?", "chosen": "b", "rejected": "I do not know what you mean; a rude answer hurts, does it not?"},
    {"prompt": "Same start", "chosen": "A polite answer helps.", "rejected": "A polite answer hurts."},
]


@pytest.fixture
def data(tmp_path: Path) -> DataSettings:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return DataSettings(source=str(tmp_path / "pairs.jsonl"))


@contextmanager
def watched(patient: Patient, most: int = 1 << 30) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the backbone's batches; more than ``most`` tokens do not fit into memory."""
    shapes: list[tuple[int, ...]] = []

    def watch(_module: Any, args: Any, kwargs: Any) -> None:
        ids = args[0] if args else kwargs["input_ids"]
        shapes.append(tuple(ids.shape))
        if ids.numel() > most:
            raise torch.OutOfMemoryError("no room")

    handle = patient.model.base_model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


def faced(patient: Patient, record: dict[str, Any], system: str) -> list[int]:
    return prompt_ids(patient.tokenizer, with_system([{"role": "user", "content": record["prompt"]}], system))


@pytest.mark.parametrize("batch_tokens", [1, 4096])
@pytest.mark.parametrize(
    ("kind", "config", "shares"),
    [
        ("llama", {}, True),
        ("qwen2", {}, True),
        ("gpt2", {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 256}, True),  # learned positions
        ("gemma2", {"query_pre_attn_scalar": 8}, True),  # capped logits
        ("mistral", {"sliding_window": 40}, None),  # rows that are longer than the window are not shared
        ("bloom", {"n_head": 2, "n_layer": 2}, False),  # its positions cannot be chosen
    ],
)
def test_shared_prompts_change_no_score(
    tiny_model: Callable[..., Path],
    data: DataSettings,
    tmp_path: Path,
    kind: str,
    config: dict[str, Any],
    shares: bool | None,
    batch_tokens: int,
) -> None:
    """Against a naive twin: one face, one response, one unpadded sequence, log_softmax in float64."""
    patient = load_patient(tiny_model(kind, **config))
    with watched(patient) as shapes:
        pairs = list(extract(patient, data, FACES, tmp_path / "out", batch_tokens=batch_tokens))
    twin = load_patient(patient.name, dtype="float64").model
    for record, pair in zip(RECORDS, pairs, strict=True):
        for scores in (pair.chosen, pair.rejected):
            response = scores.response_ids.tolist()
            steps = torch.arange(len(response))
            likings = []
            for name, face in FACES.items():
                for system, own, other in (
                    (face.positive, scores.positive[name], scores.alternative_positive[name]),
                    (face.negative, scores.negative[name], scores.alternative_negative[name]),
                ):
                    prompt = faced(patient, record, system)
                    logits = twin(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
                    table = logits.double().log_softmax(-1)
                    np.testing.assert_allclose(own, table[steps, response], atol=5e-5)
                    np.testing.assert_allclose(other, table[steps, scores.alternative_ids], atol=5e-5)
                    if system == face.positive:
                        likings.append(table)
            liking = torch.stack(likings).mean(dim=0)
            best = liking.clone()
            best[steps, response] = -torch.inf
            np.testing.assert_allclose(liking[steps, scores.alternative_ids], best.amax(dim=1), atol=5e-5)
    if batch_tokens == 1 and shares is not None:  # every unit is a batch: a row per face, padded to the longest face
        wanted = []
        for record, pair in zip(RECORDS, pairs, strict=True):
            prompt = max(len(faced(patient, record, s)) for f in FACES.values() for s in (f.positive, f.negative))
            chosen, rejected = (len(scores.response_ids) for scores in (pair.chosen, pair.rejected))
            lengths = [prompt + chosen + rejected] if shares else [prompt + chosen, prompt + rejected]
            wanted += [(4, length) for length in lengths]
        assert sorted(shapes[-len(wanted) :]) == sorted(wanted)


def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    tiny_model: Callable[..., Path], data: DataSettings, tmp_path: Path
) -> None:
    patient = load_patient(tiny_model())
    with watched(patient) as free:
        wanted = list(extract(patient, data, FACES, tmp_path / "free"))
    largest = max(rows * length for rows, length in free)
    with watched(patient, most=largest // 2) as shapes:
        got = list(extract(patient, data, FACES, tmp_path / "narrow"))
    assert [s for s in shapes if s[0] * s[1] > largest // 2] == [max(free)]  # tried once, and never again
    for a, b in zip(wanted, got, strict=True):
        for one, two in ((a.chosen, b.chosen), (a.rejected, b.rejected)):
            assert one.pair_id == two.pair_id
            for face in FACES:
                np.testing.assert_allclose(one.positive[face], two.positive[face], atol=1e-5)
                np.testing.assert_allclose(one.negative[face], two.negative[face], atol=1e-5)
    with watched(patient, most=50), pytest.raises(torch.OutOfMemoryError):
        list(extract(patient, data, FACES, tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_the_batch_size_is_found_once_and_kept_by_a_resumed_run(
    tiny_model: Callable[..., Path], data: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches decide the last bits of a log-prob: another machine's free memory must not change the rest of a run."""
    patient = load_patient(tiny_model())
    assert fitting_batch_tokens(patient) == 4096
    monkeypatch.setattr("llmdoctor.token_rewards.extract.SHARD_PAIRS", 2)
    run = extract(patient, data, FACES, tmp_path / "out")
    for _ in range(3):
        next(run)
    run.close()
    monkeypatch.setattr("llmdoctor.token_rewards.extract.fitting_batch_tokens", lambda _patient: 64)
    list(extract(patient, data, FACES, tmp_path / "out"))
    assert RewardsFolder(tmp_path / "out").meta["batch_tokens"] == 4096
    list(extract(patient, data, FACES, tmp_path / "other"))
    assert read_json(tmp_path / "other" / "meta.json")["batch_tokens"] == 64
