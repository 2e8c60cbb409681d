"""The parts of benchmarks/efficacy.py that its claims rest on: labels, the rivals' losses, what is read off curves."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdoctor.models import load_tokenizer
from llmdoctor.profile import load_profile, override
from llmdoctor.profiles.clinic_world import gold
from llmdoctor.token_rewards.fit import face_weights
from llmdoctor.training.batches import sides
from llmdoctor.training.doctor import new_doctor

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        import efficacy
    finally:
        sys.path.remove(str(FOLDER))
    return efficacy


@pytest.fixture(scope="module")
def run(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    run = bench.Run(tmp_path_factory.mktemp("efficacy"), questions=4, pairs=6, steps=1, scale=0.001)
    bench.prepare(run, load_profile("clinic"), 6)
    return run


@pytest.mark.parametrize("wanted", [("helpful",), ("helpful", "safe")])
def test_without_noise_the_better_answer_is_chosen_and_with_full_noise_the_worse(
    bench: Any, run: Any, wanted: tuple[str, ...]
):
    tokenizer = load_tokenizer(load_profile("clinic").patient.model)
    for noise, sign in ((0.0, 1), (1.0, -1)):
        found = bench.labelled(run, bench.Study("", "", wanted=wanted, noise=noise), seed=1)
        assert len(found) == 6
        margins = []
        for record, pair in found:
            for side, scores in (("chosen", pair.chosen), ("rejected", pair.rejected)):
                assert scores.side == side
                assert tokenizer.decode(scores.response_ids, skip_special_tokens=True) == record[side]
            chosen, rejected = (gold(record["prompt"], record[side]) for side in ("chosen", "rejected"))
            margins.append(sum(getattr(chosen, name) - getattr(rejected, name) for name in wanted))
        assert all(sign * margin >= 0 for margin in margins)
        assert any(margins)


def test_the_rivals_losses_are_their_formulas(bench: Any, run: Any, tmp_path: Path):
    """Each on padded batches, from a doctor away from its base, against its formula on one response at a time."""
    profile = load_profile("clinic")
    pairs = [pair for _, pair in bench.labelled(run, bench.Study("", ""), seed=1)]
    settings = override(profile.train, method="lora", device="cpu", dtype="float64")
    doctor, _ = new_doctor(profile.train.doctor, settings)
    weights = face_weights(pairs, ("helpful",), profile.rewards)
    generator = torch.Generator().manual_seed(0)
    for name, p in sorted(doctor.named_parameters()):
        if "lora_B" in name:
            p.data = 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype)

    def log_prob(scores: Any) -> tuple[float, int]:
        prompt, response = scores.prompt_ids.tolist(), scores.response_ids.tolist()
        with torch.no_grad():
            logits = doctor.lm(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        picked = logits.double().log_softmax(-1)[range(len(response)), response]
        return picked.sum().item(), len(response)

    now = [[log_prob(scores) for scores in (pair.chosen, pair.rejected)] for pair in pairs]
    with doctor.base_alone():
        base = [[log_prob(scores) for scores in (pair.chosen, pair.rejected)] for pair in pairs]

    def logistic(beta: float, margins: list[float]) -> float:
        return sum(math.log1p(math.exp(-beta * margin)) for margin in margins) / len(margins)

    plain = [chosen - rejected for (chosen, _), (rejected, _) in now]
    relative = [margin - old for margin, old in zip(plain, [w - v for (w, _), (v, _) in base], strict=True)]
    expected = {
        "sft": -sum(w for (w, _), _ in now) / sum(n for (_, n), _ in now),
        "arm": logistic(bench.ARM_BETA, plain),
        "dpo": logistic(bench.DPO_BETA, relative),
    }
    for loss, value in expected.items():
        kind = type("Rival", (bench.Rival,), {"loss": loss})
        trainer = kind(doctor, [sides(p, profile.rewards, weights) for p in pairs], settings, str(tmp_path), None)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(pairs))])
        assert trainer.compute_loss(doctor, batch).item() == pytest.approx(value, rel=1e-6), loss
    assert abs(expected["dpo"] - math.log(2)) > 1e-3


def test_a_curve_is_read_between_its_points(bench: Any):
    curve = [{"x": 0.8, "gold": 0.9, "d": 0.3}, {"x": 0.4, "gold": 0.5, "d": 0.4}]
    assert bench.crossing(curve, "d", 0.35, "gold") == pytest.approx(0.7)
    assert bench.crossing(curve, "gold", 0.6, "d") == pytest.approx(0.375)
    assert bench.crossing(curve, "d", 0.2, "gold") is None


def test_the_greatest_gold_at_a_variety_is_looked_for_on_the_whole_curve(bench: Any):
    def best(level: float, *points: tuple[float, float]) -> float | None:
        curve = [{"x": x, "d": d, bench.GOLD: gold} for x, (d, gold) in enumerate(points)]
        return bench.as_varied(curve[::-1], "d", level)  # type: ignore[no-any-return]

    assert best(0.5, (0.4, 0.1), (0.3, 0.9)) is None
    assert best(0.35, (0.4, 0.1), (0.3, 0.9)) == pytest.approx(0.5)
    assert best(0.35, (0.4, 0.9), (0.3, 0.1)) == pytest.approx(0.9)
    assert best(0.35, (0.4, 0.1), (0.3, 0.3), (0.4, 0.5), (0.3, 0.9)) == pytest.approx(0.7)  # down, up and down again
    assert best(0.35, (0.4, -0.5), (0.3, 0.5)) == pytest.approx(0.0)


def test_intervals_are_students(bench: Any):
    """1, 2, 3 have mean 2 and standard deviation 1: half of the interval is 4.303 / sqrt(3)."""
    assert bench.interval([1.0, 2.0, 3.0]) == "2.000 ± 2.484"
    assert bench.interval([None, 2.0]) == "2.000 (1 of 2)"
    assert bench.interval([None, 1.0, 2.0, 3.0]) == "2.000 ± 2.484 (3 of 4)"
    assert bench.interval([None]) == "-"
