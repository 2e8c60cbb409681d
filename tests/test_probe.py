"""The probe of the patient's states: its fits, its three passes over a rewards folder, and the rewards it gives."""

import json
from dataclasses import replace
from functools import reduce
from itertools import islice
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import llmdoctor.token_rewards.extract as stage
from llmdoctor.errors import DataError, LoadError, UsageError
from llmdoctor.models import Patient, load_patient
from llmdoctor.records import FacePair, PairScores
from llmdoctor.settings import DataSettings, RewardSettings
from llmdoctor.token_rewards import states
from llmdoctor.token_rewards.diagnosis import diagnose
from llmdoctor.token_rewards.extract import extract
from llmdoctor.token_rewards.fit import face_weights
from llmdoctor.token_rewards.folder import RewardsFolder
from llmdoctor.token_rewards.formula import alternative_rewards, token_rewards
from llmdoctor.token_rewards.probe import (
    FOLDS,
    Moments,
    Probe,
    advantages,
    bradley_terry_ridge,
    fit,
    fold_of,
)
from llmdoctor.token_rewards.states import StateReader, add_probe, kept_layers, probe_answer

WORDS = ["the", "doctor", "speaks", "patient", "listens", "room", "dark", "polite", "helps", "rude", "bed", "sleep"]
PAIRS = 40


def planted(pairs: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """States of two layers in which one direction decides which of two answers is preferred."""
    random = np.random.default_rng(seed)
    a, b = random.normal(size=(2, pairs, 2, 24)).astype(np.float32)
    direction = random.normal(size=(2, 24))
    margins = np.einsum("pdh,dh->p", a - b, direction) + noise * random.normal(size=pairs)
    swap = margins < 0
    a[swap], b[swap] = b[swap], a[swap].copy()
    return a, b, direction


def test_the_fit_is_at_the_maximum() -> None:
    """The gradient of sum log sigmoid(z w) - ridge/2 |w|^2 is zero, also where a direction separates all pairs."""
    z = np.random.default_rng(0).normal(size=(60, 8))
    z[:, 0] = np.abs(z[:, 0]) + 1
    for ridge in (0.01, 1.0, 100.0):
        w = bradley_terry_ridge(z, ridge)
        gradient = z.T @ (1 / (1 + np.exp(z @ w))) - ridge * w
        assert np.abs(gradient).max() < 1e-3 * max(1, ridge * np.abs(w).max())


def test_the_fit_finds_what_decides_the_pairs() -> None:
    a, b, direction = planted(400, noise=1.0)
    probe, margins = fit(a, b, np.arange(400) % FOLDS, (1, 2), 10.0)
    assert (margins > 0).mean() > 0.9
    assert np.corrcoef(probe.whole_D_H.ravel(), direction.ravel())[0, 1] > 0.9
    # calibrated: log-odds of about the size that the noise gives, not merely of the right sign
    assert -np.logaddexp(0, -margins).mean() > -0.3


def test_labels_by_chance_are_predicted_by_chance() -> None:
    """More numbers per state than pairs: a fit that had seen a pair would be right about it."""
    random = np.random.default_rng(1)
    a, b = random.normal(size=(2, 300, 3, 200)).astype(np.float32)
    _, margins = fit(a, b, np.arange(300) % FOLDS, (1, 2, 3), 10.0)
    assert abs((margins > 0).mean() - 0.5) < 0.1


def test_a_pair_is_scored_by_a_fit_without_its_fold() -> None:
    a, b, _ = planted(100, noise=0.5)
    fold = np.arange(100) % FOLDS
    probe, margins = fit(a, b, fold, (1, 2), 10.0)
    for number in range(100):
        own = np.einsum("dh,dh->", a[number] - b[number], probe.without_D_H[fold[number]])
        assert own == pytest.approx(margins[number], rel=1e-3, abs=1e-4)
    a[fold == 3], b[fold == 3] = b[fold == 3], a[fold == 3].copy()
    turned, _ = fit(a, b, fold, (1, 2), 10.0)
    np.testing.assert_allclose(turned.without_D_H[3], probe.without_D_H[3], rtol=1e-3, atol=1e-4)
    assert not np.allclose(turned.without_D_H[4], probe.without_D_H[4], rtol=1e-1)


def test_the_folds_hold_whole_prompts_in_any_order() -> None:
    prompts = [np.array([n // 3, n // 3], dtype=np.int32) for n in range(60)]
    folds = fold_of(prompts)
    assert all(len(set(folds[3 * n : 3 * n + 3])) == 1 for n in range(20))
    assert set(folds) == set(range(FOLDS))
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_array_equal(fold_of([prompts[i] for i in order]), folds[order])
    assert set(fold_of(prompts[:3] * 10)) == set(range(FOLDS))  # one prompt only: by pair


def test_too_few_pairs_and_states_that_are_no_numbers() -> None:
    a, b, _ = planted(19, noise=0)
    with pytest.raises(DataError, match="at least 20 pairs"):
        fit(a, b, np.arange(19) % FOLDS, (1, 2), 1.0)
    a, b, _ = planted(30, noise=0)
    a[4, 0, 0] = np.inf
    with pytest.raises(DataError, match="not finite"):
        fit(a, b, np.arange(30) % FOLDS, (1, 2), 1.0)


def test_a_probe_is_the_same_when_read_again(tmp_path: Path) -> None:
    a, b, _ = planted(50, noise=0.5)
    probe, _ = fit(a, b, np.arange(50) % FOLDS, (3, 7), 12.5)
    probe.save(tmp_path / "probe.safetensors")
    again = Probe.load(tmp_path / "probe.safetensors")
    some = np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32)
    for fold in (None, *range(FOLDS)):
        np.testing.assert_array_equal(again.rewards(some, fold), probe.rewards(some, fold))
    np.testing.assert_array_equal(again.values(some), probe.values(some))
    (tmp_path / "probe.safetensors").write_bytes(b"nothing")
    with pytest.raises(LoadError, match="cannot read the probe"):
        Probe.load(tmp_path / "probe.safetensors")


def test_the_forecast_is_a_ridge_regression_and_the_rewards_add_up() -> None:
    """Against the normal equations written out place by place, for every fit."""
    random = np.random.default_rng(0)
    answers = [random.normal(size=(2, random.integers(4, 9), 6)).astype(np.float32) for _ in range(80)]
    means = np.stack([held[:, 1:].mean(axis=1) for held in answers])
    fold = np.arange(40) % FOLDS
    probe, _ = fit(means[0::2], means[1::2], fold, (3, 7), 5.0)
    found_K_X = reduce(add, [Moments.of(held[1], probe.values(held[:, 1:])) for held in answers]).solve()
    for part in (None, 4):
        x, y, every = [], [], []
        for held in answers:
            values = [float(one) * 5.0 for one in probe.rewards(held[:, 1:], part)]
            count = len(values)
            every.append(values)
            for t in range(count + 1):
                x.append([(count - t) / count * one for one in (*map(float, held[1, t]), 1.0)])
                y.append(sum(values[t:]) / count)
        x_, y_ = np.array(x), np.array(y)
        penalty = 0.1 * (x_[:, -1] ** 2).sum() * np.diag([1.0] * 6 + [0.0])
        expected = np.linalg.solve(x_.T @ x_ + penalty, x_.T @ y_)
        found = found_K_X[0 if part is None else 1 + part]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        for held, values in zip(answers, every, strict=True):
            count = len(values)
            told = [(count - t) / count * float(held[1, t] @ expected[:-1] + expected[-1]) for t in range(count + 1)]
            rewards = advantages(np.array(values, dtype=np.float32), held[1], found)
            by_hand = [values[t] / count + told[t + 1] - told[t] for t in range(count)]
            np.testing.assert_allclose(rewards, by_hand, rtol=1e-3, atol=1e-4)
            assert rewards.sum() == pytest.approx(np.mean(values) - told[0], rel=1e-3, abs=1e-4)


def test_a_state_that_foretells_the_end_is_credited_when_it_comes() -> None:
    """A first token that decides all later values: by its own share it has one part of four, by its advantage most."""
    random = np.random.default_rng(0)
    signs = random.choice([-1.0, 1.0], size=400)
    # the state says which answer it is from the first token on; behind the prompt it says nothing
    states = [np.array([[0.0], *[[sign]] * 4], dtype=np.float32) for sign in signs]
    values = [np.array([[0.0, sign, sign, sign]], dtype=np.float32) for sign in signs]
    forecast_X = reduce(add, map(Moments.of, states, values)).solve()[0]
    rewards = np.array([advantages(v[0], h, forecast_X) for v, h in zip(values, states, strict=True)]) * signs[:, None]
    assert rewards[:, 0].mean() > 0.4  # of .75 in all; the ridge keeps it below
    assert np.abs(rewards[:, 1:]).mean() < 0.2


def test_a_label_does_not_reach_the_rewards_of_its_own_pair() -> None:
    """Turning the labels of one fold changes neither reward of its own pairs."""
    a, b, _ = planted(60, noise=0.5)
    fold = np.arange(60) % FOLDS
    c, d = a.copy(), b.copy()
    c[fold == 4], d[fold == 4] = b[fold == 4], a[fold == 4]
    first, _ = fit(a, b, fold, (3, 7), 5.0)
    second, _ = fit(c, d, fold, (3, 7), 5.0)
    some = np.random.default_rng(0).normal(size=(2, 6, 24)).astype(np.float32)
    np.testing.assert_allclose(second.rewards(some, 4), first.rewards(some, 4), rtol=1e-3, atol=1e-4)

    def forecast(probe: Probe) -> np.ndarray:
        return Moments.of(some[1], probe.values(some[:, 1:])).solve()

    np.testing.assert_allclose(forecast(second)[5], forecast(first)[5], rtol=1e-3, atol=1e-4)
    assert not np.allclose(forecast(second)[0], forecast(first)[0], rtol=1e-3, atol=1e-4)


def test_the_kept_layers_are_at_most_ten_and_end_with_the_last() -> None:
    assert kept_layers(1) == (1,)
    assert kept_layers(12) == (3, 4, 5, 6, 7, 8, 9, 10, 11, 12)
    assert len(kept_layers(80)) == 10
    assert kept_layers(80)[-1] == 80


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs whose preferred answer says "quiet" more often."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w") as file:
        for number in range(PAIRS):
            answers = [" ".join(random.choice(WORDS, size=random.integers(3, 9))) for _ in range(2)]
            chosen = f"{answers[0]} quiet quiet"
            row = {"prompt": f"What do I do {number // 2}?", "chosen": chosen, "rejected": answers[1]}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SHARD_PAIRS", 16)
    monkeypatch.setattr(states, "_WINDOW_PAIRS", 5)


def extracted(patient: Patient, data: Path, output: Path, faces: dict[str, FacePair] | None = None) -> Path:
    list(extract(patient, DataSettings(source=str(data)), faces or {}, output))
    return output


def probed(patient: Patient, data: Path, output: Path) -> RewardsFolder:
    """The rewards of one face pair and of a probe."""
    extracted(patient, data, output, {"f": FacePair("Be kind.", "Be rude.")})
    list(add_probe(patient, output))
    return RewardsFolder(output)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text"])
def test_states_are_those_of_each_response_alone(kind: str, tiny_model: Any, pairs_file: Path, tmp_path: Path) -> None:
    """In float64, each the layer's output behind the token, over its root mean square; shared rows change nothing."""
    patient = load_patient(tiny_model(kind), dtype="float64", device="cpu")
    folder = RewardsFolder(extracted(patient, pairs_file, tmp_path / "r"))
    pairs = list(islice(folder, 6))
    reader = StateReader(patient)
    means = reader.means(pairs)
    random = np.random.default_rng(0)
    depth, width = means.shape[1:]
    direction, centre = random.normal(size=(2, depth, width)).astype(np.float32)
    forecast = random.normal(size=width + 1).astype(np.float32)
    probe = Probe(reader.layers, centre, direction, (2 * direction,) * FOLDS, 4.0, (1.0,))
    moments = reader.moments(pairs, probe)
    rewards = reader.rewards(pairs, probe, np.stack([forecast] * (1 + FOLDS)), [None] * len(pairs))
    gram, right = np.zeros((width + 1, width + 1)), np.zeros(width + 1)
    for number, response in enumerate(side for pair in pairs for side in (pair.chosen, pair.rejected)):
        ids = torch.tensor([[*response.prompt_ids.tolist(), *response.response_ids.tolist()]])
        with torch.inference_mode():
            held = patient.model(ids, output_hidden_states=True).hidden_states
        values = []
        own = np.zeros((depth, len(response.response_ids), width))
        of_middle = []
        for t in range(len(response.response_ids)):
            value = 0.0
            for d, layer in enumerate(reader.layers):
                h = held[layer][0, len(response.prompt_ids) + t].numpy()
                own[d, t] = h / np.sqrt((h**2).mean())
                value += float((own[d, t] - centre[d]) @ direction[d])
            values.append(value / 4.0)
        for place in range(-1, len(response.response_ids)):
            h = held[reader.layers[depth // 2]][0, len(response.prompt_ids) + place].numpy()
            of_middle.append(h / np.sqrt((h**2).mean()))
        left = np.linspace(1, 0, len(of_middle))
        x = np.column_stack([of_middle, np.ones(len(of_middle))]) * left[:, None]
        share = np.array(values) * 4.0 / len(values)
        np.testing.assert_allclose(rewards[number][0], values, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(rewards[number][1], share + np.diff(x @ forecast), rtol=1e-4, atol=1e-3)
        gram += x.T @ x
        right += [sum(share[t:]) for t in range(len(of_middle))] @ x
        np.testing.assert_allclose(means[number], own.mean(axis=1), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(moments.gram_X_X, gram, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(moments.right_K_X[0], right, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(moments.right_K_X[FOLDS], 2 * right, rtol=1e-3, atol=2e-2)


def test_a_stopped_run_goes_on_to_the_same_folder(
    tiny_model: Any, pairs_file: Path, tmp_path: Path, small_shards: None
) -> None:
    patient = load_patient(tiny_model("llama"), device="cpu")
    whole = extracted(patient, pairs_file, tmp_path / "whole")
    steps = sum(1 for _ in add_probe(patient, whole, batch_tokens=400))
    assert steps == 3 * PAIRS
    stopped = extracted(patient, pairs_file, tmp_path / "stopped")
    for stop in (3, 20, 30, 22, 40, 30):  # in the first pass, and in the later ones
        run = add_probe(patient, stopped, batch_tokens=400)
        list(islice(run, stop))
        run.close()
        assert RewardsFolder(stopped).probe is None
    list(add_probe(patient, stopped, batch_tokens=400))
    names, again = (
        sorted(path.name for path in folder.glob("*") if path.suffix == ".safetensors" or path.name == "probe.json")
        for folder in (whole, stopped)
    )
    assert names == again
    assert len(names) == 3 + 3 * 3
    for name in names:
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name
    before = (whole / "probe.json").stat().st_mtime_ns
    assert list(add_probe(patient, whole)) == []  # finished: left as it is
    assert (whole / "probe.json").stat().st_mtime_ns == before


def test_the_folder_gives_every_response_its_own_rewards(
    tiny_model: Any, pairs_file: Path, tmp_path: Path, small_shards: None
) -> None:
    patient = load_patient(tiny_model("llama"), device="cpu")
    folder = probed(patient, pairs_file, path := tmp_path / "r")
    assert folder.signals == ("f", "probe")
    probe = Probe.load(path / "probe.safetensors")
    pairs = list(folder)
    folds = fold_of([pair.chosen.prompt_ids for pair in pairs])
    forecast = load_file(path / "forecast.safetensors")["forecast"]
    again = StateReader(patient, probe.layers).rewards(pairs, probe, forecast, folds.tolist())
    for number, response in enumerate(side for pair in pairs for side in (pair.chosen, pair.rejected)):
        np.testing.assert_allclose(response.probe, again[number][0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(response.advantage, again[number][1], rtol=1e-4, atol=1e-4)
    assert folder.probe is not None
    held = load_file(path / "states-00000.safetensors")["means"]
    assert folder.probe["bytes_per_pair"] == 2 * held[0].nbytes
    # it has learnt what decides these pairs: "quiet"
    sums = [pair.chosen.probe.sum() - pair.rejected.probe.sum() for pair in pairs]  # type: ignore[union-attr]
    assert np.mean(np.array(sums) > 0) > 0.8


def test_direction_probe_takes_the_rewards_as_they_are(
    tiny_model: Any, pairs_file: Path, tmp_path: Path, small_shards: None
) -> None:
    patient = load_patient(tiny_model("llama"), device="cpu")
    path = extracted(patient, pairs_file, tmp_path / "r", {"f": FacePair("Be kind.", "Be rude.")})
    without = RewardsFolder(path)
    settings = RewardSettings(direction="probe")
    for direction in ("probe", "advantage"):
        with pytest.raises(UsageError, match="--probe"):
            face_weights(without, without.signals, RewardSettings(direction=direction))
    list(add_probe(patient, path))
    folder = RewardsFolder(path)
    weights = face_weights(folder, folder.signals, settings)
    assert weights == {"probe": 1.0}
    pair = next(iter(folder))
    np.testing.assert_array_equal(token_rewards(pair.chosen, settings, weights).rewards, pair.chosen.probe)
    assert alternative_rewards(pair.chosen, settings, weights) is None
    of_change = RewardSettings(direction="advantage")
    weights = face_weights(folder, folder.signals, of_change)
    assert weights == {"advantage": 1.0}
    np.testing.assert_array_equal(token_rewards(pair.chosen, of_change, weights).rewards, pair.chosen.advantage)
    assert alternative_rewards(pair.chosen, of_change, weights) is None
    with pytest.raises(UsageError, match="older version"):
        token_rewards(replace(pair.chosen, advantage=None), of_change, weights)
    # unless named, the probe has no say where the direction is not its own
    assert face_weights(folder, folder.signals, RewardSettings()) == {"f": 1.0}
    both = face_weights(folder, folder.signals, RewardSettings(direction="fitted"))
    assert set(both) == {"f", "probe"}
    assert both["probe"] > 0
    summed = token_rewards(pair.chosen, RewardSettings(direction="fitted"), both).rewards
    alone = token_rewards(pair.chosen, RewardSettings(direction="fitted"), {"f": both["f"]}).rewards
    np.testing.assert_allclose(summed, alone + both["probe"] * pair.chosen.probe, rtol=1e-5, atol=1e-6)


def test_the_diagnosis_says_which_signal_to_train_on(
    tiny_model: Any, pairs_file: Path, tmp_path: Path, small_shards: None
) -> None:
    folder = probed(load_patient(tiny_model("llama"), device="cpu"), pairs_file, tmp_path / "r")
    found = diagnose(folder, folder.signals, RewardSettings(), resamples=50)
    assert [face.name for face in found.faces] == ["f"]
    assert found.probe_accuracy is not None
    assert found.probe_accuracy.value > 0.8
    assert found.train_on == "advantage"
    assert "--direction advantage" in found.verdict
    # the same states with labels by chance: nothing to train on
    random = np.random.default_rng(0)
    noise = [_turned(pair) if random.random() < 0.5 else pair for pair in folder]
    nothing = diagnose(noise, folder.signals, RewardSettings(), resamples=50)
    assert nothing.train_on == ""
    assert "Nothing here predicts" in nothing.verdict
    alone = diagnose(folder, ("probe",), RewardSettings(), resamples=50)
    assert alone.faces == ()
    assert alone.probe_accuracy == found.probe_accuracy


def _turned(pair: PairScores) -> PairScores:
    return PairScores(replace(pair.rejected, side="chosen"), replace(pair.chosen, side="rejected"))


def test_one_answer_is_scored_as_the_folder_scores_it(tiny_model: Any, pairs_file: Path, tmp_path: Path) -> None:
    patient = load_patient(tiny_model("llama"), device="cpu")
    path = extracted(patient, pairs_file, tmp_path / "r")
    list(add_probe(patient, path))
    probe = Probe.load(path / "probe.safetensors")
    pair = next(iter(RewardsFolder(path)))
    row = json.loads(pairs_file.read_text().splitlines()[0])
    found = probe_answer(patient, probe, row["prompt"], row["chosen"])
    forecast = load_file(path / "forecast.safetensors")["forecast"]
    expected, _ = StateReader(patient, probe.layers).rewards([pair], probe, forecast, [None])[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="empty"):
        probe_answer(patient, probe, row["prompt"], "")
    wider = load_patient(tiny_model("llama", hidden_size=64), device="cpu")
    shallow = replace(probe, layers=(*probe.layers[:-1], 99))
    for whose, whole in ((wider, probe), (patient, shallow)):
        with pytest.raises(UsageError, match="it was fitted to another"):
            probe_answer(whose, whole, row["prompt"], row["chosen"])


def test_what_cannot_be(tiny_model: Any, pairs_file: Path, tmp_path: Path) -> None:
    patient = load_patient(tiny_model("llama"), device="cpu")
    path = extracted(patient, pairs_file, tmp_path / "r")
    other = load_patient(tiny_model("llama", seed=7), device="cpu")
    with pytest.raises(LoadError, match="another patient"):
        list(add_probe(other, path))
    with pytest.raises(UsageError, match="only a probe"):
        face_weights((), RewardsFolder(path).signals, RewardSettings())
    with pytest.raises(UsageError, match="may be called 'probe'"):
        extracted(patient, pairs_file, tmp_path / "named", {"probe": FacePair("a", "b")})
    list(add_probe(patient, path))
    credit = path / "probe-00000.safetensors"
    damaged = bytearray(credit.read_bytes())
    damaged[-1] ^= 1
    credit.write_bytes(damaged)
    with pytest.raises(LoadError, match="damaged"):
        list(RewardsFolder(path))
    list(add_probe(patient, path))  # the same command makes it again
    damaged[-1] ^= 1
    assert credit.read_bytes() == damaged
    assert len(list(RewardsFolder(path))) == PAIRS
    # a stopped run whose second pass left something else
    forecast = (path / "forecast.safetensors").read_bytes()
    moments = path / "moments-00000.safetensors"
    for name in ("probe.json", "forecast.safetensors", credit.name):
        (path / name).unlink()
    for other in (b"nothing", (path / "probe.safetensors").read_bytes()):
        moments.write_bytes(other)
        with pytest.raises(LoadError, match=r"cannot read .*moments-00000.*Delete it and run again"):
            list(add_probe(patient, path))
    save_file({"gram": np.ones((3, 3)), "right": np.ones((1 + FOLDS, 3))}, moments)
    with pytest.raises(LoadError, match="of another probe"):
        list(add_probe(patient, path))
    moments.unlink()
    list(add_probe(patient, path))
    assert (path / "forecast.safetensors").read_bytes() == forecast
    assert credit.read_bytes() == damaged


def test_a_patient_without_states_is_told(tiny_model: Any, pairs_file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    patient = load_patient(tiny_model("llama"), device="cpu")
    path = extracted(patient, pairs_file, tmp_path / "r")
    forward = type(patient.model.base_model).forward

    def without(self: Any, *args: Any, **options: Any) -> Any:
        out = forward(self, *args, **options)
        out.hidden_states = None
        return out

    monkeypatch.setattr(type(patient.model.base_model), "forward", without)
    with pytest.raises(LoadError, match="gives no hidden states"):
        list(add_probe(patient, path))
    assert not list(path.glob("states-*"))
