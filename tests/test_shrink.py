"""A small model of the patient's first layers: cut, healed by distillation, resumed, shared, and drafting."""

import copy
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmdoctor import LLMdoctor
from llmdoctor.decoding.product import draw
from llmdoctor.errors import DataError, LLMDoctorWarning, LoadError, UsageError
from llmdoctor.models import SplitLM, Vocabulary, load_patient, share_weights
from llmdoctor.records import FacePair
from llmdoctor.settings import DataSettings, Guidance, RewardSettings, Sampling, ShrinkSettings, TrainSettings
from llmdoctor.text import conversation, prompt_ids
from llmdoctor.token_rewards.extract import extract
from llmdoctor.training.doctor import new_doctor
from llmdoctor.training.folder import save_doctor
from llmdoctor.training.shrink import agreement, first_layers, kl_per_token, shrink
from llmdoctor.training.shrunk import MARKER, shrunk_from_another
from llmdoctor.training.train import train
from tests.test_decode import CONFIGS, PROMPTS, doctor_of, patient_of, tiny
from tests.test_guidance import keys
from tests.test_head import twins
from tests.test_speculative import Erratic, run, same

LAYERS = {"num_hidden_layers": 4}
QUESTIONS = ["How can I sleep better?", "What should I do?", "Is the room dark?", "Who listens?", "A polite answer?"]
SHORT = {"layers": 1, "answers": 2, "max_new_tokens": 8, "epochs": 3.0, "batch_size": 4, "checkpoint_every": 1}


@pytest.mark.parametrize("arch", list(CONFIGS))
def test_the_first_layers_are_the_patients_own(arch: str) -> None:
    """Their logits are the final norm and the head on what the patient's layer gives, worked out by a hook."""
    model = tiny(arch).float()
    split, seen = SplitLM.of(model), {}
    model.base_model.layers[0].register_forward_hook(
        lambda _m, _a, out: seen.update(h=out[0] if isinstance(out, tuple) else out)
    )
    ids = torch.tensor([[3, 9, 1, 20, 7]])
    with torch.no_grad():
        model(input_ids=ids)
        expected = split.logits(model.base_model.norm(seen["h"]))
        student = first_layers(patient_of(model), 1)
        found = student(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
    assert student.config.get_text_config().num_hidden_layers == len(student.base_model.layers) == 1
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert all("layers." in name or "norm" in name for name in trained)
    # the patient's layers must not learn
    student.base_model.layers[0].mlp.down_proj.weight.data.zero_()
    assert model.base_model.layers[0].mlp.down_proj.weight.any()


def test_more_layers_than_there_are() -> None:
    with pytest.raises(UsageError, match="has 2 layers: expected fewer than that, got 2"):
        first_layers(patient_of(tiny("llama", num_hidden_layers=2)), 2)


def test_the_kl_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 by hand, and with the gradient of one chunk for many."""
    teacher, student = tiny("llama"), tiny("llama", seed=5)
    vocabulary = Vocabulary.of(patient_of(teacher).tokenizer)
    states = [torch.randn(9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    p = (teacher.lm_head(states[0])[:, : vocabulary.size]).softmax(-1)
    q = (student.lm_head(states[1])[:, : vocabulary.size]).softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    gradients = []
    for size in (vocabulary.size, 1 << 23):  # all rows at once; then two at a time
        monkeypatch.setattr(Vocabulary, "size", property(lambda _self, s=size: s), raising=False)
        own = states[1].clone().requires_grad_()
        found = kl_per_token(SplitLM.of(teacher), states[0], SplitLM.of(student), own, vocabulary)
        torch.testing.assert_close(found, expected)
        found.sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients)


def test_agreement_is_the_share_of_keys_that_draw_the_same() -> None:
    generator = torch.Generator().manual_seed(3)
    one, other = (2 * torch.randn(2, 3, 12, generator=generator)).log_softmax(-1)
    own = keys(40_000, seed=5)
    for a, b, found in zip(one, other, agreement(one, other), strict=True):
        tokens = [draw(side.expand(len(own), -1), Sampling(), own) for side in (a, b)]
        assert float((tokens[0] == tokens[1]).double().mean()) == pytest.approx(float(found), abs=0.01)  # 4 sigma
    assert torch.allclose(agreement(one, one), torch.ones(3, dtype=torch.float64))
    overlap = torch.minimum(one.exp(), other.exp()).sum(-1)  # 1 - TV
    assert bool((agreement(one, other) <= overlap + 1e-6).all())
    assert bool((agreement(one, other) >= overlap / (2 - overlap) - 1e-6).all())
    cut = one.masked_fill(one < -2, -torch.inf).log_softmax(-1)  # tokens of probability 0
    assert torch.allclose(agreement(cut, cut), torch.ones(3, dtype=torch.float64))


@pytest.fixture
def patient(tiny_model: Callable[..., Path]) -> Any:
    return load_patient(tiny_model("llama", seed=2, **LAYERS), device="cpu")


def settings(**changes: Any) -> ShrinkSettings:
    return ShrinkSettings(**{**SHORT, **changes})


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_it_heals_and_reports(patient: Any, tmp_path: Path) -> None:
    steps: list[tuple[int, int, float]] = []
    answers: list[tuple[int, int]] = []
    meta = shrink(
        patient,
        QUESTIONS,
        tmp_path / "small",
        settings(epochs=40.0, learning_rate=1e-2, checkpoint_every=0.5),
        device="cpu",
        on_answer=lambda *seen: answers.append(seen),
        on_step=lambda step, last, kl, _speed: steps.append((step, last, kl)),
    )
    report = meta["report"]
    assert json.loads((tmp_path / "small" / MARKER).read_text()) == meta
    assert answers == [(10, 10)]
    assert [step for step, *_ in steps] == list(range(1, steps[0][1] + 1))
    assert steps[-1][2] < 0.5 * steps[0][2]
    assert (report["layers"], report["of"], report["answers"]) == (1, 4, 10)
    assert report["own_parameters"] + report["shared_parameters"] < report["patient_parameters"]
    assert report["step"] > 0
    assert 0 < report["before"]["acceptance"] < 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]
    # what the report says is what the saved model does
    again = load_patient(tmp_path / "small", device="cpu")
    assert again.vocabulary.ids == patient.vocabulary.ids
    for name, own in again.model.named_parameters():
        if "layers." not in name and "norm" not in name:
            assert torch.equal(own, dict(patient.model.named_parameters())[name])


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """With several, sums are added up in an order of their own, and equal runs have weights that differ by rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("where", ["answers", "training", "interrupt"])
def test_a_stopped_run_ends_with_the_model_of_an_uninterrupted_one(
    patient: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr("llmdoctor.training.shrink._ROWS", 3)
    shrink(patient, QUESTIONS, tmp_path / "whole", settings(), device="cpu")
    output, drawn = tmp_path / "cut", []

    def stop(step: int, *_: Any) -> None:
        if step == 3 and where == "training":
            raise Stopped
        if step == 3 and where == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)

    def answered(done: int, _total: int) -> None:
        drawn.append(done)
        if where == "answers" and done == 6:
            raise Stopped

    with pytest.raises((Stopped, KeyboardInterrupt)):
        shrink(patient, QUESTIONS, output, settings(), device="cpu", on_step=stop, on_answer=answered)
    assert not output.exists()
    kept = tmp_path / ".cut.answers.jsonl"
    if where == "answers":
        kept.write_text(kept.read_text() + "[1, 2")  # a line that was being written
    with pytest.raises(UsageError, match="--fresh"):
        shrink(patient, QUESTIONS, output, settings(seed=9), device="cpu")
    again: list[int] = []
    seen: list[int] = []
    shrink(
        patient,
        QUESTIONS,
        output,
        settings(),
        device="cpu",
        on_answer=lambda done, _: again.append(done),
        on_step=lambda step, *_: seen.append(step),
    )
    assert weights(output) == weights(tmp_path / "whole")
    assert again == ([9, 10] if where == "answers" else [])
    assert seen[0] == (1 if where == "answers" else 3 if where == "training" else 4)
    assert not kept.exists()


def test_other_training_settings_keep_the_answers(patient: Any, tmp_path: Path) -> None:
    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise Stopped

    drawn: list[int] = []
    how: Any = {"device": "cpu", "on_answer": lambda done, _: drawn.append(done)}
    with pytest.raises(Stopped):
        shrink(patient, QUESTIONS, tmp_path / "small", settings(), on_step=stop, **how)
    longer = settings(epochs=4.0)
    with pytest.raises(UsageError, match="with another epochs"):
        shrink(patient, QUESTIONS, tmp_path / "small", longer, **how)
    shrink(patient, QUESTIONS, tmp_path / "small", longer, fresh=True, **how)
    assert drawn == [10]
    shrink(patient, QUESTIONS, tmp_path / "whole", longer, device="cpu")
    assert weights(tmp_path / "small") == weights(tmp_path / "whole")


def test_a_finished_model_of_another_run_is_only_replaced_when_asked(patient: Any, tmp_path: Path) -> None:
    """As train does; it was once replaced in silence."""
    output = tmp_path / "small"
    shrink(patient, QUESTIONS, output, settings(max_steps=1), device="cpu")
    made = weights(output), (output / MARKER).read_bytes()
    for prompts, other, differs in (
        (QUESTIONS, settings(max_steps=2, seed=9), "seed, max_steps|max_steps, seed"),
        (QUESTIONS[1:], settings(max_steps=1), "prompts"),
    ):
        with pytest.raises(UsageError, match=f"finished model with another ({differs}): .*--fresh to replace it"):
            shrink(patient, prompts, output, other, device="cpu")
    for content in ("{}", "[]", '{"settings": [1]}', "{"):  # it may be of any types
        (output / MARKER).write_text(content)
        with pytest.raises(UsageError, match="--fresh to replace it"):
            shrink(patient, QUESTIONS, output, settings(max_steps=1), device="cpu")
    (output / MARKER).write_bytes(made[1])
    steps: list[Any] = []
    shrink(patient, QUESTIONS, output, settings(max_steps=1), device="cpu", on_step=lambda *_: steps.append(1))
    assert not steps
    assert (weights(output), (output / MARKER).read_bytes()) == made
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    shrink(patient, QUESTIONS, output, settings(max_steps=2), device="cpu", fresh=True)
    assert json.loads((output / MARKER).read_text())["settings"]["max_steps"] == 2


def test_damaged_answers_are_drawn_again(patient: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was a traceback, or an answer that the patient never gave."""
    monkeypatch.setattr("llmdoctor.training.shrink._ROWS", 2)
    kept = tmp_path / ".small.answers.jsonl"

    def stop(step: int, *_: Any) -> None:
        raise Stopped

    def start(**how: Any) -> list[int]:
        drawn: list[int] = []
        with pytest.raises(Stopped):
            shrink(
                patient, QUESTIONS[:3], tmp_path / "small", settings(), device="cpu", on_step=stop,
                on_answer=lambda done, _: drawn.append(done), **how,
            )  # fmt: skip
        shutil.rmtree(tmp_path / ".small.training", ignore_errors=True)
        return drawn

    start()
    whole = kept.read_text()
    head, *answers = whole.splitlines(keepends=True)
    deep = "[" * 5000
    for damaged in (
        *("{\n", "[1, 2\n", f"{deep}\n", '["a"]\n', "[1.5]\n", "[-1]\n", "[99999]\n", "[]\n", "null\n", "\0\n", "[1]"),
        "[1" + "0" * 9999 + "]\n",
    ):
        kept.write_text("".join((head, *answers[:2], damaged, *answers[3:])))
        assert start() == [4, 6], damaged
        assert kept.read_text() == whole
    for cut in ("", head[:9]):
        kept.write_text(cut)
        assert start() == [2, 4, 6]
        assert kept.read_text() == whole
    kept.write_text(whole + "[1]\n[1]\n")  # more than were asked for
    assert start() == []
    for other in (f"{deep}\n", "years of work", "\n" + whole):
        kept.write_text(other)
        with pytest.raises(UsageError, match="--fresh"):
            shrink(patient, QUESTIONS[:3], tmp_path / "small", settings(), device="cpu")
        assert kept.read_text() == other
    start(fresh=True)
    assert kept.read_text() == whole
    kept.unlink()
    os.mkfifo(kept)
    with pytest.raises(UsageError, match=r"cannot read .*it is a FIFO"):
        shrink(patient, QUESTIONS[:3], tmp_path / "small", settings(), device="cpu")


def test_prompts_that_do_not_fit(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    short = load_patient(tiny_model("llama", seed=2, max_position_embeddings=40, **LAYERS), device="cpu")
    long = "rain " * 60
    with pytest.raises(DataError, match=r"at least two prompts.*got 1 that fit"):
        shrink(short, [QUESTIONS[3], long], tmp_path / "small", settings(), device="cpu")
    with pytest.warns(LLMDoctorWarning, match="1 prompts are left out"):
        # a share that would hold out every prompt leaves one to learn from
        meta = shrink(short, [*QUESTIONS[3:], long], tmp_path / "small", settings(holdout=0.95), device="cpu")
    assert meta["report"]["answers"] == 4


def test_held_out_prompts_are_not_learnt_from_and_of_all_kinds(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt that came twice was held out and learnt from; those held out were the first of the file."""
    patient = load_patient(tiny_model("llama", **LAYERS), device="cpu")
    asked: list[list[int]] = []

    def told(_: Any, ids: list[list[int]], *__: Any, **___: Any) -> None:
        asked.extend(ids)
        raise KeyboardInterrupt

    monkeypatch.setattr("llmdoctor.training.shrink._answers", told)
    prompts = [f"What is {number}?" for number in range(30)]
    with pytest.raises(KeyboardInterrupt):
        shrink(patient, [*prompts, *prompts], tmp_path / "small", settings(), device="cpu")
    given = [prompt_ids(patient.tokenizer, conversation(prompt)) for prompt in prompts]
    assert sorted(asked) == sorted(given)
    assert asked != given


def test_dropout_and_a_generation_config_that_cannot_be_saved(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    patient = load_patient(tiny_model("llama", attention_dropout=0.9, **LAYERS), device="cpu")
    patient.model.generation_config.temperature, patient.model.generation_config.top_p = 0.9, 0.6
    twice = [tmp_path / name for name in ("one", "two")]
    for output in twice:
        torch.manual_seed(len(output.name))
        shrink(patient, QUESTIONS, output, settings(max_steps=2), device="cpu")
    assert weights(twice[0]) == weights(twice[1])
    assert load_patient(twice[0], device="cpu").eos_ids == patient.eos_ids


def test_what_is_measured_is_what_is_saved_in_half_precision(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    patient = load_patient(tiny_model("llama", **LAYERS), dtype="bfloat16", device="cpu")
    meta = shrink(patient, QUESTIONS, tmp_path / "small", settings(max_steps=3), device="cpu")
    again = load_patient(tmp_path / "small", dtype="bfloat16", device="cpu")
    student = first_layers(patient, 1)
    assert again.model.dtype == torch.bfloat16
    assert student.dtype == torch.float32
    for (name, own), (_, theirs) in zip(again.model.named_buffers(), patient.model.named_buffers(), strict=True):
        assert torch.equal(own, theirs), name
    assert 0 < meta["report"]["after"]["acceptance"] < 1


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("mamba", {"num_hidden_layers": 2}),
        ("gpt_neo", {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}),
    ],
)
def test_an_architecture_that_cannot_be_cut_is_one_line(kind: str, shape: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=30, hidden_size=16, **shape))
    with pytest.raises(UsageError, match="cannot be cut down to its first layers"):
        first_layers(patient_of(model), 1)


@pytest.mark.parametrize("mode", ["product", "ratio"])
@pytest.mark.parametrize("drafting", [Erratic(1), Erratic(2)], ids=["one", "other"])
def test_a_draft_model_changes_no_token(mode: Any, drafting: Any) -> None:
    """Whatever it says, for one row and for several, for the patient alone and beside doctors of either kind."""
    model, draft_model = tiny("llama"), tiny("llama", seed=8)
    head, _ = twins(model)
    other = doctor_of(tiny("llama", seed=1), "safe", base=tiny("llama", seed=4))
    accepted = 0
    for doctors in ([], [head], [head, other]):
        betas = {doctor.name: 0.6 for doctor in doctors}
        guidance = Guidance(betas=betas, mode=mode, plausibility=0.02)
        for prompts in (PROMPTS[:1], PROMPTS):
            how = {"max_new_tokens": 14, "top": 2, "seed": 5}
            drafted = run(patient_of(model), doctors, prompts, guidance, drafting, draft_model=draft_model, **how)
            same(drafted, run(patient_of(model), doctors, prompts, guidance, **how))
    # the patient itself drafts what it will say
    mirror = Erratic(3)
    run(patient_of(model), [], PROMPTS[:1], Guidance(), mirror, draft_model=copy.deepcopy(model), max_new_tokens=40)
    accepted += mirror.accepted
    assert accepted == mirror.tested > 0


def test_guidance_that_changes_reaches_the_next_token_of_a_head_with_drafts() -> None:
    """A head knows log V a round late; guidance is still asked for after every token that is shown."""
    model, draft_model = tiny("llama"), tiny("llama", seed=8)
    head, _ = twins(model)
    results = []
    for how in ({}, {"drafting": Erratic(4), "draft_model": draft_model}):
        count = 0

        def changing() -> Guidance:
            nonlocal count
            count += 1
            return Guidance(betas={"kind": 0.1 * (count % 7)})

        results.append(run(patient_of(model), [head], PROMPTS[:1], changing, max_new_tokens=20, seed=3, **how))
    assert [s.token.betas for s in results[0][0]] == [s.token.betas for s in results[1][0]]
    same(*results)


def test_equal_weights_are_in_memory_once() -> None:
    model = tiny("llama", num_hidden_layers=3)
    student = first_layers(patient_of(model), 1).double()
    student.base_model.norm.weight.data += 1
    twin = copy.deepcopy(student)
    share_weights(model, student)
    shared = {n for n, p in student.named_parameters() if p.data_ptr() == dict(model.named_parameters())[n].data_ptr()}
    assert shared == {n for n, _ in student.named_parameters()} - {"model.norm.weight"}
    ids = torch.tensor([[3, 9, 1]])
    assert torch.equal(student(input_ids=ids).logits, twin(input_ids=ids).logits)


@pytest.fixture
def small(patient: Any, tmp_path: Path) -> Path:
    shrink(patient, QUESTIONS, tmp_path / "small", settings(max_steps=2), device="cpu")
    return tmp_path / "small"


def test_it_is_a_base_for_doctors_and_drafts_beside_the_patient(patient: Any, small: Path, tmp_path: Path) -> None:
    doctor, tokenizer = new_doctor(small, TrainSettings(lora_rank=2))
    save_doctor(tmp_path / "d", doctor, tokenizer, {"base_model": str(small), "name": "kind"})
    plain = LLMdoctor(patient.name, tmp_path / "d", beta=0.5, device="cpu")
    drafted = LLMdoctor(patient.name, tmp_path / "d", beta=0.5, draft_model=small, device="cpu")
    for guided in (True, False):
        how = {"seed": 3, "max_new_tokens": 24, "guided": guided}
        said = [[t.id for t in one.stream(QUESTIONS[0], **how)] for one in (plain, drafted)]
        assert said[0] == said[1]
    assert drafted._drafting_alone.tested > 0  # the patient alone has a draft, too
    embeddings = drafted.patient.model.get_input_embeddings().weight.data_ptr()
    assert drafted._draft_model is not None
    assert drafted._draft_model.get_input_embeddings().weight.data_ptr() == embeddings
    assert drafted._doctors["kind"].model.get_input_embeddings().weight.data_ptr() == embeddings


def test_another_patients_model_is_no_base_and_a_poor_draft(
    patient: Any, small: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    other = load_patient(tiny_model("llama", seed=4, **LAYERS), device="cpu")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "Hi", "chosen": "Sleep.", "rejected": "Rain."}) + "\n")
    faces = {"kind": FacePair("Be kind.", "Be rude.")}
    list(extract(other, DataSettings(source=str(tmp_path / "pairs.jsonl")), faces, tmp_path / "rewards"))
    with pytest.raises(LoadError, match="shrunk from another patient"):
        train(
            tmp_path / "rewards",
            tmp_path / "d",
            base_model=str(small),
            reward_settings=RewardSettings(),
            settings=TrainSettings(max_steps=1),
        )
    with pytest.warns(LLMDoctorWarning, match=r"shrunk from another patient.*seldom stand"):
        LLMdoctor(other.name, draft_model=small, device="cpu")
    assert LLMdoctor(small, draft_model=small, device="cpu").generate("Hi", max_new_tokens=3, seed=1) is not None
    shutil.copytree(small, tmp_path / "odd")
    for content in ("{}", '{"patient_fingerprint": 3}'):
        (tmp_path / "odd" / MARKER).write_text(content)
        assert "another patient" in (shrunk_from_another(tmp_path / "odd", patient.fingerprint, "mine") or "")
    for content, words in (("{", "cannot read"), ("[]", "expected a JSON object")):
        (tmp_path / "odd" / MARKER).write_text(content)
        with pytest.raises(LoadError, match=words):
            shrunk_from_another(tmp_path / "odd", patient.fingerprint, "mine")


def test_a_draft_model_of_a_short_context_leaves_the_answer_its_length() -> None:
    """It stops drafting before its context ends, also where one of several prompts is beyond it."""
    model, draft_model = tiny("llama"), tiny("llama", seed=8, max_position_embeddings=32)
    for prompts, tokens in ((PROMPTS[:1], 60), ([PROMPTS[0], [3] * 30], 20)):
        how = {"max_new_tokens": tokens, "seed": 4}
        drafting = Erratic(5)
        drafted = run(patient_of(model), [], prompts, Guidance(), drafting, draft_model=draft_model, **how)
        same(drafted, run(patient_of(model), [], prompts, Guidance(), **how))
        assert (drafting.tested > 0) == (len(prompts) == 1)
