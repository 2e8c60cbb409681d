"""Stage 2: the loss of a batch against a float64 brute force, and what a training run does and refuses to do.

Then runs that are stopped, continued, blown up, and judged on pairs that they never trained on.
"""

import doctest
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmdoctor.errors import DataError, LoadError, TrainingError, UsageError, VocabularyError
from llmdoctor.models import SplitLM, load_patient
from llmdoctor.records import FacePair, PairScores, TokenScores, TrainStep
from llmdoctor.settings import DataSettings, RewardSettings, TrainSettings
from llmdoctor.token_rewards.extract import extract
from llmdoctor.token_rewards.fit import face_weights
from llmdoctor.token_rewards.folder import RewardsFolder
from llmdoctor.token_rewards.formula import alternative_rewards, token_rewards
from llmdoctor.training import batches
from llmdoctor.training import folder as folder_module
from llmdoctor.training import trainer as trainer_module
from llmdoctor.training.batches import Pairs, ScoredResponse, hold_out, sides
from llmdoctor.training.checkpoints import finished, last_checkpoint
from llmdoctor.training.doctor import Doctor, new_doctor
from llmdoctor.training.folder import HEAD, load_doctor
from llmdoctor.training.train import train
from llmdoctor.training.trainer import TFPOTrainer

LETTERS = "abcdefghijklmnopqrstuvwxyz ."
RECORDS = [
    {"prompt": "how are you", "chosen": "i am fine.", "rejected": "i am not."},
    {"prompt": "hi", "chosen": "hello. nice to see you", "rejected": "go"},
    {"prompt": "a question", "chosen": "a", "rejected": "another answer that is longer"},
    {"prompt": "b", "chosen": "yes.", "rejected": "yes. but"},
    {"prompt": "what now", "chosen": "sleep well", "rejected": "sleep"},
    {"prompt": "c", "chosen": "x", "rejected": "y"},
]
FACES = {"f": FacePair("be good.", "be bad."), "g": FacePair("z", "oh no")}


def model_folder(folder: Path, seed: int, letters: str = LETTERS, context: int = 64) -> Path:
    backend = Tokenizer(models.WordLevel({"<eos>": 0, **{c: i + 1 for i, c in enumerate(letters)}}, "<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size = {"vocab_size": len(letters) + 1, "max_position_embeddings": context, "initializer_range": 0.4}
    LlamaForCausalLM(LlamaConfig(**shape, **size, bos_token_id=None, eos_token_id=0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``patient``, ``base`` and the real ``rewards`` of that patient over RECORDS."""
    folder = tmp_path_factory.mktemp("world")
    model_folder(folder / "base", seed=1)
    patient = load_patient(model_folder(folder / "patient", seed=0))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    for _ in extract(patient, DataSettings(source=str(folder / "pairs.jsonl")), FACES, folder / "rewards"):
        pass
    return folder


def run(world: Path, output: Path, reward: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    known = {"device": "cpu", "lora_rank": 4, "batch_size": 3, "max_steps": 3}
    steps: list[TrainStep] = settings.pop("steps", [])
    return train(
        settings.pop("rewards", world / "rewards"),
        output,
        base_model=str(settings.pop("base", world / "base")),
        patient=settings.pop("patient", None),
        reward_settings=RewardSettings(**(reward or {})),
        settings=TrainSettings(**{**known, **settings}),
        on_step=steps.append,
    )


def brute_force(
    doctor: Doctor, base: Any, pairs: list[PairScores], rewards: RewardSettings, s: TrainSettings, faces: Any
) -> tuple[float, float]:
    """(SubTB, value loss) by loops over sequences, states and pairs of states, in float64, with every alternative."""
    size = len(LETTERS) + 1
    weights = face_weights(pairs, faces, rewards)

    def scored(model: Any, prompt: list[int], response: list[int]) -> list[float]:
        with torch.no_grad():
            table = (
                model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :size].double().log_softmax(-1)
            )
        return [table[t, token].item() for t, token in enumerate(response)]

    def log_value(prompt: list[int], response: list[int], *, end: bool) -> float:
        """log V(s) after all of ``response``; ``end`` says that the answer is over."""
        if end and s.anchor:
            return 0.0
        with torch.no_grad():
            state = (
                doctor.lm.get_base_model().model(torch.tensor([prompt + response])).last_hidden_state[0, -1].double()
            )
        head = doctor.value_head
        return s.rho * (head.weight[0].double() @ state + head.bias[0].double()).item()

    def subtb(scores: TokenScores) -> float:
        prompt, response = scores.prompt_ids.tolist(), scores.response_ids.tolist()
        flows, total = [], 0.0
        steps = zip(
            token_rewards(scores, rewards, weights).rewards.tolist(),
            scored(doctor.lm, prompt, response),
            scored(base, prompt, response),
            strict=True,
        )
        flows.append(log_value(prompt, [], end=False))
        for t, (reward, own, reference) in enumerate(steps, start=1):
            counted = reward if s.ceiling is None else min(reward, s.ceiling)
            total += s.rho * counted - own + (reference if s.flow == "relative" else 0.0)
            flows.append(total + log_value(prompt, response[:t], end=t == len(response)))
        n = len(flows)
        apart = [(s.subtb_weight ** (j - i - 1), (flows[j] - flows[i]) ** 2) for i in range(n) for j in range(i + 1, n)]
        return sum(w * square for w, square in apart) / sum(w for w, _ in apart)

    def forks(pair: PairScores) -> list[float]:
        chosen, rejected = pair.chosen.response_ids.tolist(), pair.rejected.response_ids.tolist()
        prompt = pair.chosen.prompt_ids.tolist()
        t = next(t for t in range(len(chosen)) if chosen[t] != rejected[t]) + 1
        better, worse = (log_value(prompt, y[:t], end=t == len(y)) for y in (chosen, rejected))
        margins = [better - worse]
        for scores in (pair.chosen, pair.rejected) if s.alternatives else ():
            rivals = alternative_rewards(scores, rewards, weights)
            own = token_rewards(scores, rewards, weights).rewards
            response = scores.response_ids.tolist()
            for t in range(len(response)) if rivals is not None else ():
                if abs(rivals[t] - own[t]) > 0.5:
                    said = log_value(prompt, response[: t + 1], end=t + 1 == len(response))
                    unsaid = log_value(prompt, [*response[:t], int(scores.alternative_ids[t])], end=False)
                    margins.append((said - unsaid) * (1 if own[t] > rivals[t] else -1))
        return margins

    flow = [subtb(scores) for pair in pairs for scores in (pair.chosen, pair.rejected)]
    value = [max(0.0, s.gamma - margin) for pair in pairs for margin in forks(pair)]
    return sum(flow) / len(flow), sum(value) / len(value)


SWITCHES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"flow": "absolute"}, {}),
    ({"anchor": False}, {}),
    ({"flow": "absolute", "anchor": False}, {"direction": "label", "theta": 0.1}),
    ({"subtb_weight": 0.8, "rho": 3.0}, {}),
    ({"ceiling": 0.2}, {}),
    ({"ceiling": 0.0, "flow": "absolute"}, {}),
    ({"value_weight": 0.0}, {"direction": "agree"}),
    ({"gamma": 30.0, "value_weight": 2.5}, {"faces": ("g",)}),
    ({"alternatives": 99}, {}),
    ({"alternatives": 99, "anchor": False, "gamma": 4.0}, {"direction": "fitted", "theta": 0.2}),
    ({"alternatives": 99}, {"direction": "label"}),
]


@pytest.mark.parametrize(("switches", "reward"), SWITCHES, ids=str)
def test_the_loss_is_the_brute_force(
    world: Path, tmp_path: Path, switches: dict[str, Any], reward: dict[str, Any]
) -> None:
    """With every switch, from a doctor whose adapter and value head are far from their start."""
    settings = TrainSettings(**switches, dtype="float64", device="cpu", lora_rank=4)
    rewards = RewardSettings(**reward)
    doctor, _ = new_doctor(world / "base", settings)
    generator = torch.Generator().manual_seed(3)
    for _, p in sorted((n, p) for n, p in doctor.named_parameters() if p.requires_grad):
        p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
    folder = RewardsFolder(world / "rewards")
    scores = list(folder)
    weights = face_weights(scores, folder.faces, rewards)
    pairs = [sides(pair, rewards, weights, settings.ceiling) for pair in scores]
    trainer = TFPOTrainer(doctor, pairs, settings, str(tmp_path), None)
    loss = trainer.compute_loss(doctor, trainer.data_collator(pairs)).item()
    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float64)
    flow, value = brute_force(doctor, base, scores, rewards, settings, folder.faces)
    assert flow > 0
    assert value > 0
    assert loss == pytest.approx(flow + settings.value_weight * value, rel=1e-5)


@pytest.mark.parametrize("flow", ["absolute", "relative"])
def test_a_run_begins_at_the_brute_forces_loss(world: Path, tmp_path: Path, flow: str) -> None:
    """From the rewards folder to the first step's report: one batch of all pairs, a doctor that is still its base."""
    steps: list[TrainStep] = []
    run(world, tmp_path / "d", flow=flow, batch_size=len(RECORDS), max_steps=1, dtype="float64", steps=steps)
    settings = TrainSettings(flow=flow, dtype="float64", device="cpu")
    doctor, _ = new_doctor(world / "base", settings)
    base = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float64)
    folder = RewardsFolder(world / "rewards")
    expected = brute_force(doctor, base, list(folder), RewardSettings(), settings, folder.faces)
    assert (steps[0].subtb, steps[0].value) == pytest.approx(expected, rel=1e-5)
    assert steps[0].loss == pytest.approx(expected[0] + settings.value_weight * expected[1], rel=1e-5)


def test_training_lowers_the_loss_the_same_way_for_the_same_seed(world: Path, tmp_path: Path) -> None:
    steps: list[TrainStep] = []
    made = run(world, tmp_path / "a", max_steps=40, learning_rate=1e-2, seed=7, alternatives=1, steps=steps)
    again = run(world, tmp_path / "b", max_steps=40, learning_rate=1e-2, seed=7, alternatives=1)
    other = run(world, tmp_path / "c", max_steps=40, learning_rate=1e-2, seed=8, alternatives=1)
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()
    assert [(s.step, s.total) for s in steps] == [(i, 40) for i in range(1, 41)]
    metrics = made["metrics"]
    assert metrics["last"]["loss"] < 0.5 * metrics["first"]["loss"]
    assert metrics["first"]["loss"] == pytest.approx(sum(s.loss for s in steps[:4]) / 4, abs=1e-5)
    assert metrics["last"]["subtb"] == pytest.approx(sum(s.subtb for s in steps[-4:]) / 4, abs=1e-5)
    assert again["metrics"] | {"seconds": 0} == metrics | {"seconds": 0}
    assert other["metrics"]["last"] != metrics["last"]
    stored = json.loads((tmp_path / "a" / "doctor.json").read_text())
    assert stored == {"schema_version": 1, **json.loads(json.dumps(made))}
    assert Path(stored["base_model"]) == (world / "base").resolve()


def test_micro_batches_make_the_step_of_their_batch(world: Path, tmp_path: Path) -> None:
    """3 micro-batches of 2 pairs give the gradient of 6: losses are means over rows, and every pair has one fork."""
    for name, sizes in (("one", (6, 1)), ("three", (2, 3))):
        run(
            world,
            tmp_path / name,
            batch_size=sizes[0],
            gradient_accumulation=sizes[1],
            max_steps=2,
            lr_scheduler="constant",
            warmup_ratio=0.0,
            dtype="float64",
        )
    one, three = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "three"))
    for name, weight in one.items():
        torch.testing.assert_close(three[name], weight, atol=2e-5, rtol=1e-3)


def test_the_example_of_a_batch_is_what_the_collator_returns() -> None:
    assert doctest.testmod(batches).attempted >= 4
    assert doctest.testmod(batches).failed == 0


def drawn(seed: int, epoch: int, index: int, count: int) -> list[int]:
    """The order in which pair ``index`` shows the ``count`` others of its chosen response."""
    ids = torch.tensor([1])
    chosen = ScoredResponse("p", ids, ids, torch.zeros(1), [(0, other, True) for other in range(count)])
    dataset = Pairs([(chosen, chosen)] * (index + 1), seed)
    dataset.epoch = epoch
    return [other for _, other, _ in dataset[index][0].others]


def test_the_alternatives_drawn_depend_on_seed_epoch_and_pair_alone() -> None:
    """Written out, so that another Python, another process and a resumed run are known to draw the same ones."""
    assert drawn(7, 3, 5, 8) == [7, 2, 4, 0, 1, 3, 6, 5]


def test_no_two_small_seeds_epochs_and_pairs_draw_alike() -> None:
    """2,000 orders of 30: two equal ones would be chance in no lifetime, so they would be one seed drawn twice."""
    orders = {tuple(drawn(s, e, i, 30)) for s in range(10) for e in range(10) for i in range(20)}
    assert len(orders) == 10 * 10 * 20


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_value_head_has_its_own_learning_rate(world: Path, tmp_path: Path, decay: float) -> None:
    """And nothing else of the optimiser changes with it: decay, and what is spared from it, stay the library's."""
    groups: list[dict[str, tuple[float, float]]] = []
    for rate in (None, 0.25):
        settings = TrainSettings(learning_rate=0.5, value_learning_rate=rate, weight_decay=decay, device="cpu")
        doctor, _ = new_doctor(world / "base", settings)
        optimiser = TFPOTrainer(doctor, [], settings, str(tmp_path), None).create_optimizer()
        names = {id(p): name for name, p in doctor.named_parameters() if p.requires_grad}
        listed = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in optimiser.param_groups for p in g["params"]]
        assert len(listed) == len(names)
        groups.append(dict(listed))
    plain, split = groups
    assert {lr for lr, _ in plain.values()} == {0.5}
    assert plain["value_head.weight"][1] == decay
    assert split == {name: (0.25 if "value_head" in name else 0.5, d) for name, (_, d) in plain.items()}


def test_a_run_that_explodes_says_at_which_step_and_writes_nothing(world: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step \d") as caught:
        run(world, tmp_path / "doctor", learning_rate=1e30, max_steps=6, warmup_ratio=0.0)
    assert "\n" not in str(caught.value)
    assert "nothing was written" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_other_tokens_another_patient_or_no_room_are_refused(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "doctor"
    swapped = model_folder(tmp_path / "swapped", 1, LETTERS[:3] + "ed" + LETTERS[5:])
    with pytest.raises(VocabularyError, match=r"'[de]'.*id 4|'[de]'.*id 5") as caught:
        run(world, out, base=swapped)
    assert str(world / "patient") in str(caught.value)
    assert str(swapped) in str(caught.value)
    with pytest.raises(LoadError, match="drawn from the patient") as other:
        run(world, out, patient=str(world / "base"))
    assert str(world / "patient") in str(other.value)
    assert str(world / "base") in str(other.value)
    with pytest.raises(LoadError, match="no model"):
        run(world, out, base=tmp_path / "absent")
    with pytest.raises(LoadError, match="run `llmdoctor extract"):
        run(world, out, rewards=tmp_path / "absent")
    with pytest.raises(UsageError, match="'h'"):
        run(world, out, {"faces": ("h",)})
    with pytest.raises(DataError, match=r"no token of .* has a reward: tau 1000 and theta 0.9 prune every gap"):
        run(world, out, {"tau": 1000.0, "theta": 0.9})
    with pytest.raises(DataError, match="context of 2 tokens"):
        run(world, out, base=model_folder(tmp_path / "tiny", 1, context=2))
    assert not out.exists()
    made = run(world, out, base=model_folder(tmp_path / "narrow", 1, context=20), patient=str(world / "patient"))
    lengths = [len(r["prompt"]) + max(len(r["chosen"]), len(r["rejected"])) + 1 for r in RECORDS]
    assert made["metrics"]["pairs_too_long"] == sum(length > 20 for length in lengths)
    assert made["metrics"]["pairs"] == sum(length <= 20 for length in lengths)
    assert math.isfinite(made["metrics"]["last"]["loss"])


def test_a_prompt_without_tokens_trains_or_is_refused_by_name(tmp_path: Path) -> None:
    """A tokenizer that adds no begin token makes nothing of an empty prompt: there is no state s_0 to score from."""
    patient = load_patient(model_folder(tmp_path / "patient", seed=0))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "", "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(DataError, match="prompt"):
        list(extract(patient, DataSettings(source=str(tmp_path / "pairs.jsonl")), FACES, tmp_path / "rewards"))


WEIGHTS = ("adapter_model.safetensors", "value_head.safetensors")
# 6 pairs in batches of 2: an epoch is three steps, so nearly every stop is inside one; dropout and rivals are drawn
LONG: dict[str, Any] = {
    "batch_size": 2,
    "max_steps": 8,
    "learning_rate": 1e-2,
    "lora_dropout": 0.2,
    "alternatives": 1,
    "checkpoint_every": 1,
    "weight_decay": 0.01,
}


class Killed(Exception):
    """In place of a process that ends without a message."""


def stopped_at(stop: int, how: str) -> Any:
    def on_step(step: TrainStep) -> None:
        if step.step == stop:
            if how == "killed":
                raise Killed
            os.kill(os.getpid(), signal.SIGINT if how == "interrupted" else signal.SIGTERM)

    return on_step


def start(world: Path, output: Path, on_step: Any = None, *, fresh: bool = False, **settings: Any) -> dict[str, Any]:
    return train(
        world / "rewards",
        output,
        base_model=str(world / "base"),
        reward_settings=RewardSettings(),
        settings=TrainSettings(**{"device": "cpu", "lora_rank": 4, **settings}),
        on_step=on_step,
        fresh=fresh,
    )


def same_weights(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in WEIGHTS)


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The uninterrupted run of LONG."""
    output = tmp_path_factory.mktemp("whole") / "doctor"
    return output, start(world, output, **LONG)


@pytest.mark.parametrize(
    ("stops", "how"),
    [((1,), "interrupted"), ((3,), "terminated"), ((5,), "interrupted"), ((2, 4, 7), "killed")],
    ids=str,
)
def test_a_run_stopped_and_continued_ends_with_the_same_weights(
    world: Path,
    tmp_path: Path,
    whole: tuple[Path, dict[str, Any]],
    stops: tuple[int, ...],
    how: str,
) -> None:
    """Byte for byte, with its losses; stopped inside an epoch and between two; no doctor folder before the end.

    A run that is killed at step n goes on from n - 1, the last checkpoint; one that is interrupted keeps n.
    """
    output, work = tmp_path / "doctor", tmp_path / ".doctor.training"
    expected: Any = {"killed": Killed, "interrupted": KeyboardInterrupt, "terminated": KeyboardInterrupt}[how]
    every = LONG if how == "killed" else {**LONG, "checkpoint_every": 100}
    for stop in stops:
        with pytest.raises(expected):
            start(world, output, stopped_at(stop, how), **every)
        assert not output.exists()
        kept = last_checkpoint(work)
        assert kept is not None
        assert kept.name == f"checkpoint-{stop if how != 'killed' else stop - 1}"
    seen: list[int] = []
    made = start(world, output, lambda step: seen.append(step.step), **every)
    assert seen == list(range(stops[-1] + (how != "killed"), 9))
    assert same_weights(output, whole[0])
    for key in ("steps", "tokens", "first", "last"):
        assert made["metrics"][key] == whole[1]["metrics"][key]
    assert [p.name for p in tmp_path.iterdir()] == ["doctor"]


def test_the_signal_handlers_are_as_before(world: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        start(world, tmp_path / "d", stopped_at(1, "interrupted"), **LONG)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_checkpoint_that_is_not_whole_is_passed_over(
    world: Path,
    tmp_path: Path,
    whole: tuple[Path, dict[str, Any]],
) -> None:
    """The state is written last: a write that ended before, or in the middle of it, leaves the one before to go on."""
    output = tmp_path / "doctor"
    with pytest.raises(Killed):
        start(world, output, stopped_at(5, "killed"), **LONG)
    state = tmp_path / ".doctor.training" / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:40])
    seen: list[int] = []
    start(world, output, lambda step: seen.append(step.step), **LONG)
    assert seen == [4, 5, 6, 7, 8]
    assert same_weights(output, whole[0])


def test_another_run_is_not_continued_unless_anew(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "doctor"
    with pytest.raises(KeyboardInterrupt):
        start(world, output, stopped_at(2, "interrupted"), **LONG)
    with pytest.raises(UsageError, match=r"stopped at step 2 with another rho, seed: .*--fresh"):
        start(world, output, **{**LONG, "seed": 5, "rho": 3.0})
    assert last_checkpoint(tmp_path / ".doctor.training") is not None
    seen: list[int] = []
    start(world, output, lambda step: seen.append(step.step), fresh=True, **{**LONG, "seed": 5, "rho": 3.0})
    assert seen[0] == 1


def test_a_loss_that_is_no_number_names_the_step_and_the_pairs_of_its_batch(world: Path, tmp_path: Path) -> None:
    settings = TrainSettings(device="cpu", lora_rank=4, batch_size=1, max_steps=6)
    doctor, _ = new_doctor(world / "base", settings)
    folder = RewardsFolder(world / "rewards")
    weights = face_weights(folder, folder.faces, RewardSettings())
    pairs = [sides(pair, RewardSettings(), weights) for pair in folder]
    chosen, rejected = pairs[2]
    pairs[2] = (replace(chosen, rewards=torch.full_like(chosen.rewards, math.nan)), rejected)
    seen: list[TrainStep] = []
    with pytest.raises(TrainingError) as caught:
        TFPOTrainer(doctor, pairs, settings, str(tmp_path), seen.append).train()
    message = str(caught.value)
    assert f"became nan at step {len(seen) + 1} " in message
    assert f"on the pairs {chosen.pair_id}:" in message
    assert "lower the learning rate (now 0.001) or rho (now 10)" in message


def test_the_last_good_checkpoint_is_kept_and_the_bad_one_is_not(world: Path, tmp_path: Path) -> None:
    """Warm-up: step 1 has no rate and changes nothing, step 2 ruins the weights, step 3 finds out."""
    output, work = tmp_path / "doctor", tmp_path / ".doctor.training"
    with pytest.raises(TrainingError, match=r"at step 3 .*except the checkpoint of step 1 in ") as caught:
        run(world, output, learning_rate=1e30, warmup_ratio=1.0, max_steps=6, checkpoint_every=1)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [work]
    assert [p.name for p in work.glob("checkpoint-*")] == ["checkpoint-1"]
    held = load_file(work / "checkpoint-1" / "model.safetensors")
    assert held
    assert all(w.isfinite().all() and w.abs().max() < 10 for w in held.values())


def test_a_loss_that_explodes_stops_before_it_is_no_number(world: Path, tmp_path: Path) -> None:
    seen: list[TrainStep] = []
    with pytest.raises(TrainingError, match=r"exploded to \S+ \(before: at most .*at step \d+ .*nothing was written"):
        run(world, tmp_path / "doctor", learning_rate=30.0, max_steps=20, warmup_ratio=0.0, steps=seen)
    assert not (tmp_path / "doctor").exists()
    assert all(math.isfinite(step.loss) for step in seen)


def test_held_out_pairs_are_whole_prompts_and_are_not_trained_on(world: Path) -> None:
    folder = RewardsFolder(world / "rewards")
    weights = face_weights(folder, folder.faces, RewardSettings())
    pairs = [sides(pair, RewardSettings(), weights) for pair in folder] * 3
    for share, most in ((0.0, 0), (0.2, 3), (0.5, 9), (0.99, 17)):
        training, held = hold_out(pairs, share, seed=1)
        assert len(held) <= most
        assert len(training) + len(held) == len(pairs)
        assert not {p[0].prompt.numpy().tobytes() for p in training} & {p[0].prompt.numpy().tobytes() for p in held}
    assert len(hold_out(pairs, 0.5, seed=1)[1]) == 9
    assert hold_out(pairs, 0.5, seed=1) != hold_out(pairs, 0.5, seed=2)


def test_evaluation_is_the_loss_of_the_held_out_pairs(world: Path, tmp_path: Path) -> None:
    """In batches, the figures of one batch; reward accuracy by the whole models' log-probs, one pair at a time."""
    settings = TrainSettings(dtype="float64", device="cpu", lora_rank=4, batch_size=4, flow="absolute")
    doctor, _ = new_doctor(world / "base", settings)
    generator = torch.Generator().manual_seed(3)
    for _, p in sorted((n, p) for n, p in doctor.named_parameters() if p.requires_grad):
        p.data += 0.1 * torch.randn(p.shape, generator=generator).to(p.dtype)
    folder = RewardsFolder(world / "rewards")
    weights = face_weights(folder, folder.faces, RewardSettings())
    pairs = [sides(pair, RewardSettings(), weights) for pair in folder]
    trainer = TFPOTrainer(doctor, pairs, settings, str(tmp_path), None, pairs)
    found = trainer.evaluate()
    loss = trainer.compute_loss(doctor, trainer.data_collator(pairs)).item()
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-6)

    def ratio(side: Any) -> float:
        def total() -> float:
            ids = torch.cat([side.prompt, side.response])[None]
            table = doctor.lm(ids).logits[0, len(side.prompt) - 1 : -1].log_softmax(-1)
            return float(table.gather(1, side.response[:, None]).sum())

        with torch.no_grad():
            own = total()
            with doctor.lm.disable_adapter():
                return own - total()

    right = [ratio(chosen) > ratio(rejected) for chosen, rejected in pairs]
    assert found["eval_reward_accuracy"] == pytest.approx(sum(right) / len(RECORDS))
    assert 0 < sum(right) < len(right)  # else the figure would say nothing


def test_the_best_checkpoint_is_kept_and_a_run_without_progress_ends_early(world: Path, tmp_path: Path) -> None:
    """What is written is the checkpoint with the least held-out loss, also when the run was continued."""
    settings = {**LONG, "max_steps": 30, "holdout": 0.4, "patience": 3, "learning_rate": 0.1, "lora_dropout": 0.0}
    settings |= {"lr_scheduler": "constant"}
    steps: list[TrainStep] = []
    made = start(world, tmp_path / "best", steps.append, **settings)
    metrics = made["metrics"]
    assert metrics["pairs_held_out"] == 2
    assert metrics["steps"] == metrics["held_out"]["step"] + 3 < 30
    assert steps[0].reward_accuracy is None
    assert steps[-1].reward_accuracy in (0.0, 0.25, 0.5, 0.75, 1.0)
    best = metrics["held_out"]["step"]
    short = {**settings, "keep_best": False}
    with pytest.raises(KeyboardInterrupt):
        start(world, tmp_path / "cut", stopped_at(best, "interrupted"), **short)
    held = load_file(tmp_path / ".cut.training" / f"checkpoint-{best}" / "model.safetensors")
    written = load_file(tmp_path / "best" / "adapter_model.safetensors")
    names = {name: key for key in held for name in written if name == key.removeprefix("lm.").replace(".default.", ".")}
    assert len(names) == len(written)
    for name, key in names.items():
        assert torch.equal(written[name], held[key])
    with pytest.raises(KeyboardInterrupt):
        start(world, tmp_path / "again", stopped_at(best + 1, "interrupted"), **settings)
    start(world, tmp_path / "again", **settings)
    assert same_weights(tmp_path / "again", tmp_path / "best")
    assert json.loads((tmp_path / "again" / "doctor.json").read_text())["metrics"]["held_out"] == metrics["held_out"]


def test_a_whole_doctor_resumes_and_decodes_without_its_base(world: Path, tmp_path: Path) -> None:
    settings = {**LONG, "method": "full"}
    start(world, tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        start(world, tmp_path / "cut", stopped_at(5, "killed"), **settings)
    start(world, tmp_path / "cut", **settings)
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    loaded = load_doctor(tmp_path / "cut", with_base=True)
    assert loaded.base is not None
    ids = torch.tensor([[3, 4, 5]])
    assert not torch.allclose(loaded.model(ids).logits, loaded.base(ids).logits, atol=1e-3)
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    assert torch.equal(loaded.model.state_dict()["model.norm.weight"], weights["model.norm.weight"])


def test_a_head_resumes(world: Path, tmp_path: Path) -> None:
    """It keeps the states that its base has read, which a run that goes on reads again."""
    settings = {**LONG, "method": "head", "lora_rank": 2, "alternatives": 0}
    start(world, tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        start(world, tmp_path / "cut", stopped_at(5, "killed"), **settings)
    start(world, tmp_path / "cut", **settings)
    for name in (HEAD, "value_head.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("adapted", [False, True])
def test_the_reference_is_computed_once_and_is_the_base(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapted: bool
) -> None:
    """Also for a doctor that has moved away from it, with dropout, padded in other batches than those of training."""
    settings = TrainSettings(dtype="float64", device="cpu", batch_size=2, epochs=3, lora_dropout=0.5)
    doctor, _ = new_doctor(world / "base", settings)
    if adapted:
        for p in doctor.lm.parameters():
            p.data += 0.1 * p.requires_grad
    folder = RewardsFolder(world / "rewards")
    weights = face_weights(folder, folder.faces, RewardSettings())
    pairs = [sides(pair, RewardSettings(), weights) for pair in folder]
    forwards: list[bool] = []
    forward = Doctor.forward

    def counted(self: Doctor, *args: Any, **kwargs: Any) -> Any:
        forwards.append(torch.is_grad_enabled())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Doctor, "forward", counted)
    trainer = TFPOTrainer(doctor, pairs, settings, str(tmp_path), None)
    before = math.ceil(len(pairs) / settings.batch_size)
    assert forwards == [False] * before
    plain = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float64)
    for side in (side for pair in pairs for side in pair):
        ids = torch.cat([side.prompt, side.response])[None]
        with torch.no_grad():
            table = plain(ids).logits[0, len(side.prompt) - 1 : -1, : doctor.vocabulary.size].log_softmax(-1)
        expected = table.gather(1, side.response[:, None])[:, 0]
        assert side.reference is not None
        torch.testing.assert_close(side.reference, expected, atol=1e-9, rtol=0)
    trainer.train()
    assert forwards == [False] * before + [True] * 3 * before  # never again in three epochs


def test_a_head_reads_the_states_of_its_base_once(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the states kept or read again at every step, with alternatives or held-out pairs: the same head."""
    forwards: list[int] = []
    hidden = SplitLM.hidden

    def counted(self: SplitLM, *args: Any) -> Any:
        forwards.append(1)
        return hidden(self, *args)

    monkeypatch.setattr(SplitLM, "hidden", counted)
    monkeypatch.setattr(folder_module, "_require_itself", lambda *_args: None)  # it reads states too
    how: dict[str, Any] = {"method": "head", "dtype": "float64", "max_steps": None, "epochs": 3, "holdout": 0.4}
    for extra, kept in (({}, True), ({"alternatives": 1}, False)):
        heads = []
        for limit in (trainer_module.KEPT_NUMBERS, 0):
            forwards.clear()
            folder = tmp_path / f"{kept} {limit}"
            with monkeypatch.context() as patch:
                patch.setattr(trainer_module, "KEPT_NUMBERS", limit)
                run(world, folder, **how, **extra)
            heads.append(load_file(folder / HEAD))
            before = 2  # batches of the references: twelve responses in batches of six
            assert (len(forwards) == before) == (kept and limit > 0)
        assert heads[0]["up.weight"].abs().max() > 1e-4
        for name, tensor in heads[0].items():
            torch.testing.assert_close(tensor, heads[1][name], rtol=1e-5, atol=1e-7)


def test_the_losses_are_drawn_and_told_to_tensorboard(world: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps: list[TrainStep] = []
    settings = {**LONG, "holdout": 0.4, "keep_best": False, "report_to": ("tensorboard",)}
    made = start(world, tmp_path / "doctor", steps.append, **settings)
    assert "report_to" not in made["settings"]["train"]
    picture = (tmp_path / "doctor" / "losses.svg").read_text(encoding="utf-8")
    ElementTree.fromstring(picture)
    for words in ("SubTB", "value loss", "reward accuracy", "held out", "step"):
        assert f">{words}<" in picture
    (events,) = (tmp_path / "doctor.logs").iterdir()
    logged = EventAccumulator(str(events)).Reload()
    for key in ("loss", "subtb", "value"):
        found = [(event.step, event.value) for event in logged.Scalars(f"train/{key}")]
        assert found == [(step.step, pytest.approx(getattr(step, key), rel=1e-6)) for step in steps]
    assert [event.step for event in logged.Scalars("eval/reward_accuracy")] == list(range(1, 9))


def test_each_run_of_a_process_has_its_own_tensorboard_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    short = {"max_steps": 1, "report_to": ("tensorboard",)}
    for name in ("first", "second"):
        start(world, tmp_path / name, **short)
        assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    assert [len(list((tmp_path / f"{name}.logs").iterdir())) for name in ("first", "second")] == [1, 1]
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "elsewhere"))
    start(world, tmp_path / "third", **short)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1
    assert not (tmp_path / "third.logs").exists()


def test_a_reporter_that_is_not_there_is_said_before_anything_else(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot report to 'nobody'"):
        start(world, tmp_path / "doctor", report_to=("nobody",))
    assert not list(tmp_path.iterdir())


def test_two_processes_take_the_steps_of_one(world: Path, tmp_path: Path) -> None:
    """The same global batch, the same losses, the same weights; one doctor, and one report of it."""
    how = {"max_steps": 6, "learning_rate": 1e-2, "lora_rank": 4}
    one = start(world, tmp_path / "one", batch_size=2, **how)["metrics"]
    face = {"positive": "Be kind.", "negative": "Be rude."}
    profile = {"patient": {"model": str(world / "patient")}, "faces": {"f": face}, "train": {**how, "device": "cpu"}}
    (tmp_path / "p.yaml").write_text(json.dumps(profile))
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    launch += " --dynamo_backend no --main_process_port 0 -m llmdoctor train"
    given = {"profile": tmp_path / "p.yaml", "rewards": world / "rewards", "doctor": world / "base", "batch-size": 1}
    flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
    command = [sys.executable, "-m", *launch.split(), *flags, "--output", str(tmp_path / "two"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)["doctor"]["metrics"]  # one object: of two processes only the first prints
    assert two["tokens"] == one["tokens"]
    for part in ("first", "last"):
        assert two[part] == pytest.approx(one[part], abs=1e-4)
    for name in WEIGHTS:
        theirs = load_file(tmp_path / "two" / name)
        for key, weights in load_file(tmp_path / "one" / name).items():
            torch.testing.assert_close(theirs[key], weights, atol=1e-4, rtol=1e-4)


def test_a_finished_doctor_of_another_run_is_only_replaced_when_asked(world: Path, tmp_path: Path) -> None:
    """It says what differs, before anything is trained; the same run again changes nothing."""
    output, seen = tmp_path / "doctor", []
    made = start(world, output, max_steps=1, rho=2.0)
    held = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert start(world, output, seen.append, max_steps=1, rho=2.0)["run"] == made["run"]
    with pytest.raises(UsageError, match=r"finished doctor with another rho, seed: .*--fresh to replace it") as refused:
        start(world, output, seen.append, max_steps=1, rho=3.0, seed=9)
    assert "\n" not in str(refused.value)
    assert not seen
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == held
    assert [path.name for path in tmp_path.iterdir() if "logs" not in path.name] == ["doctor"]
    (output / "doctor.json").write_text("{")
    with pytest.raises(UsageError, match="finished doctor with another name"):
        start(world, output, seen.append, max_steps=1, rho=3.0)
    start(world, output, max_steps=1, rho=3.0, fresh=True)
    assert json.loads((output / "doctor.json").read_text())["settings"]["train"]["rho"] == 3.0


def test_a_folder_without_its_weights_is_not_finished(tmp_path: Path) -> None:
    marker = tmp_path / "doctor.json"
    marker.write_text('{"run": "a"}')
    (tmp_path / "value_head.safetensors").touch()
    assert finished(marker, "a") is None
    (tmp_path / "adapter_model.safetensors").touch()
    assert finished(marker, "a") == {"run": "a"}
    assert finished(marker, "b") is None


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 3, "method": "head"},
        {"max_steps": 20, "holdout": 0.4, "checkpoint_every": 1, "patience": 1, "learning_rate": 0.3},
    ],
)
def test_a_run_killed_while_it_saves_only_saves(world: Path, tmp_path: Path, monkeypatch: Any, settings: Any) -> None:
    """A finished run takes no further step: same weights, same report as that of a run that was let through."""
    whole = run(world, tmp_path / "whole" / "doctor", **settings)

    def killed(*_: Any, **__: Any) -> None:
        raise SystemExit(137)

    with monkeypatch.context() as patched:
        patched.setattr("llmdoctor.training.train.save_doctor", killed)
        with pytest.raises(SystemExit):
            run(world, tmp_path / "doctor", **settings)
    steps: list[TrainStep] = []
    again = run(world, tmp_path / "doctor", steps=steps, **settings)
    assert steps == []
    own = ("seconds", "tokens_per_second")
    assert {k: v for k, v in again["metrics"].items() if k not in own} == {
        k: v for k, v in whole["metrics"].items() if k not in own
    }
    files = [path.name for path in (tmp_path / "whole" / "doctor").glob("*.safetensors")]
    for name in files:
        one, other = (load_file(folder / name) for folder in (tmp_path / "whole" / "doctor", tmp_path / "doctor"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert not (tmp_path / ".doctor.training").exists()
