"""The facade of DESIGN section 4, on small local models and on the embedded clinic."""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdoctor import Guidance, GuidedToken, LLMdoctor, Sampling
from llmdoctor.comparing import Column, Key, Run, both_sides
from llmdoctor.decoding.caches.recorded import RecordedKV
from llmdoctor.decoding.drafting import AdaptiveLength
from llmdoctor.decoding.prefix import PrefixCache
from llmdoctor.errors import LoadError, UsageError, VocabularyError
from llmdoctor.profile import load_profile
from llmdoctor.records import Answer, Question
from llmdoctor.settings import TrainSettings
from llmdoctor.training.doctor import new_doctor
from llmdoctor.training.folder import save_doctor
from llmdoctor.tui.start import start_of

SHORT = Sampling(max_new_tokens=14, seed=3)
PROMPTS = ["How are you?", "Hi", "Tell me more about the moon, and the stars."]


@pytest.fixture(scope="module")
def make_doctor(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A doctor folder as training leaves it, with random weights."""

    def make(name: str, seed: int, **model: Any) -> Path:
        base = tiny_model("mistral", seed=seed, **model)
        doctor, tokenizer = new_doctor(base, TrainSettings(lora_rank=2, dtype="float32", device="cpu"))
        for p in doctor.parameters():
            if p.requires_grad:
                p.data += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        folder = tmp_path_factory.mktemp(name) / "doctor"
        save_doctor(folder, doctor, tokenizer, {"name": name, "base_model": str(base)})
        return folder

    return make


@pytest.fixture(scope="module")
def folders(tiny_model: Callable[..., Path], make_doctor: Callable[..., Path]) -> tuple[str, dict[str, Path]]:
    """A patient and two doctors, their embeddings padded to different heights."""
    doctors = {"kind": make_doctor("kind", 2), "safe": make_doctor("safe", 3, rows=416)}
    return str(tiny_model("llama", seed=1, rows=448)), doctors


@pytest.fixture(scope="module")
def loaded(folders: tuple[str, dict[str, Path]]) -> LLMdoctor:
    return LLMdoctor(folders[0], folders[1], beta={"kind": 0.8, "safe": 0.3}, sampling=SHORT)


@pytest.fixture
def assistant(loaded: LLMdoctor) -> LLMdoctor:
    """With settings and drafting of its own on models that are loaded once."""
    own = copy(loaded)
    own._drafting, own._drafting_alone = AdaptiveLength(), AdaptiveLength()
    return own


def ids(tokens: Any) -> list[int]:
    return [token.id for token in tokens]


def same(tokens: Any, others: Any) -> None:
    """Equal tokens; numbers up to the rounding of float32, in which one token at a time differs from several."""
    for token, other in zip(tokens, others, strict=True):
        mine, its = token.to_dict(), other.to_dict()
        assert mine.pop("top") == its.pop("top") == ()
        for key in ("doctor_logprobs", "values"):
            assert mine.pop(key) == pytest.approx(its.pop(key), abs=1e-3)
        assert mine.pop("betas") == its.pop("betas")
        assert mine == pytest.approx(its, abs=1e-3)


def test_the_designs_example(folders: tuple[str, dict[str, Path]]) -> None:
    patient, doctors = folders
    doctor = LLMdoctor(patient_model=patient, doctor_checkpoint=doctors["kind"], alpha=1.0, beta=0.8)
    assert doctor.doctor_names == ("kind",)
    text = doctor.generate("Explain quantum computing to a 5-year-old.", seed=1, max_new_tokens=20)
    tokens = list(doctor.stream("Explain quantum computing to a 5-year-old.", seed=1, max_new_tokens=20))
    assert all(isinstance(token, GuidedToken) for token in tokens)
    assert text == "".join(token.text for token in tokens)
    compared = doctor.compare("Explain quantum computing to a 5-year-old.", seed=1, max_new_tokens=20)
    assert compared.guided.text == text
    same(compared.guided.tokens, tokens)


def test_the_embedded_clinic() -> None:
    """`LLMdoctor.from_profile("clinic")`: English answers, both doctors at work, the patient alone at beta 0."""
    doctor = LLMdoctor.from_profile("clinic")
    assert doctor.doctor_names == ("helpful", "safe")
    assert doctor.guidance == start_of(load_profile("clinic")).guidance
    assert (doctor.guidance.mode, doctor.guidance.dead_zones) == ("ratio", {"helpful": 2.0, "safe": 1.0})
    question = "How can I sleep better?"
    answer = doctor.generate(question, seed=1)
    assert len(answer.split()) > 8
    assert answer.rstrip().endswith((".", "!", "?"))
    compared = doctor.compare(question, seed=1)
    assert compared.guided.text == answer
    assert compared.guided.finished
    assert compared.metrics["kl"] > 0
    doctor.beta = 0.0
    assert doctor.generate(question, seed=1) == compared.patient.text
    sampling = doctor.sampling.model_dump()
    patient_only = LLMdoctor(doctor.patient.name).generate(question, **{**sampling, "seed": 1})
    assert patient_only == compared.patient.text


def test_what_is_laid_over_a_profile() -> None:
    """Mappings change what they name; a doctor that replaces one of a profile that was chosen is as strong as that."""
    own = load_profile("clinic")
    changed = LLMdoctor.from_profile(beta={"safe": 0.1}, dead_zone={"helpful": 0.5}).guidance
    assert (changed.betas, changed.dead_zones) == ({"helpful": 1.0, "safe": 0.1}, {"helpful": 0.5, "safe": 1.0})
    doctors = {"mine": own.doctors["helpful"].checkpoint}
    other = LLMdoctor.from_profile(doctor_checkpoint=doctors)
    assert other.guidance == Guidance(1.0, {"mine": 0.8}, dead_zones={"mine": 0.0})
    assert other.sampling.max_new_tokens == own.decode.max_new_tokens
    chosen = LLMdoctor.from_profile("clinic", doctor_checkpoint=doctors)
    assert chosen.guidance == Guidance(1.0, {"mine": 0.8}, "ratio", own.decode.plausibility, {"mine": 0.0})
    safe = own.doctors["safe"].checkpoint
    replaced = LLMdoctor.from_profile("clinic", doctor_checkpoint=safe).guidance  # its own name is safe
    assert (replaced.betas, replaced.dead_zones, replaced.mode) == ({"safe": 0.6}, {"safe": 1.0}, "ratio")
    both = LLMdoctor.from_profile("clinic", doctor_checkpoint={"safe": safe, **doctors}, beta={"mine": 0.2}).guidance
    assert (both.betas, both.dead_zones) == ({"safe": 0.6, "mine": 0.2}, {"safe": 1.0, "mine": 0.0})
    assert LLMdoctor.from_profile(doctor_checkpoint={"safe": safe}).guidance.betas == {"safe": 0.8}
    assert LLMdoctor.from_profile("clinic", doctor_checkpoint=None).doctor_names == ()
    question = "How can I sleep better?"
    settings = chosen.compare(question, seed=1, max_new_tokens=4).settings
    assert settings["plausibility"] == own.decode.plausibility
    assert settings["dead_zones"] == {"mine": 0.0}
    assert "plausibility" not in other.compare(question, seed=1, max_new_tokens=4).settings


def test_compare_keeps_its_contract(assistant: LLMdoctor) -> None:
    """DESIGN section 4's keys; the patient side is the patient alone; the metrics follow from the tokens."""
    heard: list[tuple[str, int]] = []
    compared = assistant.compare(PROMPTS[0], top=2, on_token=lambda which, token: heard.append((which, token.id)))
    document = compared.to_dict()
    assert list(document) == ["prompt", "settings", "patient", "guided", "metrics", "id", "turn", "sample"]
    settings = document["settings"]
    assert settings["alpha"] == 1.0
    assert settings["betas"] == {"kind": 0.8, "safe": 0.3}
    assert {k: settings[k] for k in ("temperature", "top_k", "top_p", "min_p", "max_new_tokens", "seed")} == {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "max_new_tokens": 14,
        "seed": 3,
    }
    for side in ("patient", "guided"):
        assert document[side]["text"] == "".join(t["text"] for t in document[side]["tokens"])
        for token in document[side]["tokens"]:
            assert list(token) == [
                "position", "id", "text", "patient_logprob", "doctor_logprobs", "logprob", "values", "flip", "kl",
                "alpha", "betas", "top", "patient_id", "patient_text",
            ]  # fmt: skip
            likeliest, listed = token["patient_id"], [other["id"] for other in token["top"]]
            assert {likeliest, token["id"]} <= set(listed)
            assert set(listed[2:]) <= {likeliest, token["id"]}
            assert [other["rank"] for other in token["top"][:2]] == [1, 2]
    alone, guided = compared.patient, compared.guided
    assert heard == [("patient", i) for i in ids(alone.tokens)] + [("guided", i) for i in ids(guided.tokens)]
    assert ids(alone.tokens) == ids(assistant.stream(PROMPTS[0], guidance=Guidance(1.0)))
    assert all((t.kl, t.logprob) == (0.0, t.patient_logprob) for t in alone.tokens)
    assert all(set(t.values) == {"kind", "safe"} == set(t.doctor_logprobs) for t in guided.tokens)
    metrics, tokens = compared.metrics, guided.tokens
    assert metrics["flips"] == sum(t.flip for t in tokens)
    assert metrics["flip_rate"] == pytest.approx(sum(t.flip for t in tokens) / len(tokens))
    assert metrics["kl"] == pytest.approx(sum(t.kl for t in tokens))
    assert metrics["kl_per_token"] == pytest.approx(sum(t.kl for t in tokens) / len(tokens))
    assert metrics["mean_values"] == pytest.approx(
        {name: sum(t.values[name] for t in tokens) / len(tokens) for name in ("kind", "safe")}
    )
    assert (metrics["patient_tokens"], metrics["guided_tokens"]) == (len(alone.tokens), len(tokens))


def test_a_seed_is_an_answer(assistant: LLMdoctor) -> None:
    """The same seed gives the same answer, here, streamed and compared; other seeds and no seed give others."""
    answers = [assistant.generate(PROMPTS[2], seed=seed) for seed in range(6)]
    assert [assistant.generate(PROMPTS[2], seed=seed) for seed in range(6)] == answers
    assert len(set(answers)) == 6
    assert assistant.compare(PROMPTS[2], seed=4).guided.text == answers[4]
    assistant.sampling = SHORT.replace(seed=None)
    assert len({assistant.generate(PROMPTS[2]) for _ in range(4)}) == 4
    compared = assistant.compare(PROMPTS[2])
    assert assistant.generate(PROMPTS[2], seed=compared.settings["seed"]) == compared.guided.text


def test_a_list_of_prompts_is_answered_in_order(assistant: LLMdoctor) -> None:
    """Row i of a list is the answer to its prompt with seed + i, also beyond one batch of 32."""
    assert assistant.generate([]) == []
    prompts = (PROMPTS * 12)[:34]
    answers = assistant.generate(prompts, max_new_tokens=4, seed=50)
    assert len(answers) == 34
    for row in (0, 1, 2, 31, 32, 33):
        assert answers[row] == assistant.generate(prompts[row], max_new_tokens=4, seed=50 + row)


def test_a_conversation_and_a_system_prompt(folders: tuple[str, dict[str, Path]]) -> None:
    """A string is one user turn; the instance's system prompt opens every conversation."""
    plain = LLMdoctor(folders[0], sampling=SHORT)
    led = LLMdoctor(folders[0], sampling=SHORT, system_prompt="Be brief.")
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, ("Hi", "Yes?", "And?"), strict=True)]
    assert plain.generate([{"role": "user", "content": "Hi"}]) == plain.generate("Hi") != led.generate("Hi")
    assert led.generate(turns) == plain.generate([{"role": "system", "content": "Be brief."}, *turns])
    assert plain.compare(turns).prompt == turns


@pytest.mark.parametrize("change", ["alpha", "beta", "one beta", "guidance"])
def test_settings_are_live(assistant: LLMdoctor, change: str) -> None:
    """A setting made while a stream runs holds from the very next token on, as if set by a function for each token."""
    later = {
        "alpha": Guidance(0.2, {"kind": 0.8, "safe": 0.3}),
        "beta": Guidance(1.0, {"kind": 2.0, "safe": 2.0}),
        "one beta": Guidance(1.0, {"kind": 0.8, "safe": 1.7}),
        "guidance": Guidance(0.0, {"safe": 1.0}),
    }[change]
    before = assistant.guidance
    stream = assistant.stream(PROMPTS[0])
    tokens = [next(stream) for _ in range(4)]
    if change == "alpha":
        assistant.alpha = later.alpha
    elif change == "beta":
        assistant.beta = 2.0
    elif change == "one beta":
        assistant.beta = {"safe": 1.7}
    else:
        assistant.guidance = later
    assert assistant.guidance == later
    tokens += stream
    assert len(tokens) > 4
    assert [(t.alpha, t.betas) for t in tokens[:4]] == [(before.alpha, before.betas)] * 4
    assert [(t.alpha, t.betas) for t in tokens[4:]] == [(later.alpha, later.betas)] * (len(tokens) - 4)
    passed: list[GuidedToken] = []
    for token in assistant.stream(PROMPTS[0], guidance=lambda: before if len(passed) < 4 else later):
        passed.append(token)
    same(passed, tokens)


def test_a_stream_can_be_left_and_checks_at_once(assistant: LLMdoctor) -> None:
    stream = assistant.stream(PROMPTS[0], guidance=Guidance(0.0, {"kind": 1.0}))
    assert next(stream).alpha == 0.0
    stream.close()
    assert list(stream) == []
    for bad in ({"temperature": -1}, {"top_p": 0.0}, {"heat": 1.0}, {"guidance": Guidance(1.0, {"nurse": 1.0})}):
        with pytest.raises(UsageError):
            assistant.stream(PROMPTS[0], **bad)
    with pytest.raises(UsageError, match="beta of kind"):
        assistant.stream(PROMPTS[0], guidance=Guidance(1.0, {"kind": math.nan}))
    with pytest.raises(UsageError, match="context holds 256"):
        assistant.stream("word " * 300)


def test_what_cannot_be_set(assistant: LLMdoctor) -> None:
    """A wrong setting is refused with its name, and leaves all settings as they were."""
    before = assistant.guidance
    with pytest.raises(UsageError, match=r"nurse.*kind, safe"):
        assistant.beta = {"nurse": 1.0}
    for wrong in (math.nan, math.inf, -0.1):
        with pytest.raises(UsageError, match="beta"):
            assistant.beta = wrong
        with pytest.raises(UsageError, match="alpha"):
            assistant.alpha = wrong
    with pytest.raises(UsageError, match="ratio"):
        list(assistant.stream(PROMPTS[0], guidance=before.replace(mode="ratio")))
    assistant.alpha = 0.0
    with pytest.raises(UsageError, match="nothing is left"):
        assistant.beta = 0.0
    assistant.alpha = 1.0
    assert assistant.guidance == before


def test_one_beta_is_not_silently_lost(assistant: LLMdoctor) -> None:
    """Strengths are read-only; the error says what to assign, and that works."""
    with pytest.raises(UsageError, match=r"doctor\.beta = \{"):
        assistant.beta["kind"] = 99  # type: ignore[index]
    assert assistant.beta == {"kind": 0.8, "safe": 0.3}
    assistant.beta = {"kind": 99}
    assert assistant.beta == {"kind": 99, "safe": 0.3}
    with pytest.raises(UsageError, match=r"beta of kind.*-1"):
        assistant.beta = {"kind": -1}
    with pytest.raises(UsageError, match="did you mean 'alpha'"):
        LLMdoctor("/absent", alhpa=1.0)


def test_ratio_mode_loads_the_bases(folders: tuple[str, dict[str, Path]]) -> None:
    """At plausibility 1 only the patient's own favourite is left; the doctors' bases are there to divide by."""
    ratio = LLMdoctor(*folders, mode="ratio", plausibility=1.0, sampling=SHORT)
    greedy = LLMdoctor(folders[0], sampling=SHORT.replace(temperature=0.0))
    assert ids(ratio.stream(PROMPTS[0])) == ids(greedy.stream(PROMPTS[0]))
    ratio.guidance = ratio.guidance.replace(plausibility=0.0, betas={"kind": 3.0, "safe": 0.0})
    assert ids(ratio.stream(PROMPTS[0])) != ids(greedy.stream(PROMPTS[0]))


def test_a_dead_zone_as_wide_as_all_opinions_leaves_the_patient_alone(
    folders: tuple[str, dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base that both doctors share is loaded once, and read once per token."""
    twice = dict.fromkeys(("kind", "same"), folders[1]["kind"])
    loaded = LLMdoctor(folders[0], twice, beta=3.0, mode="ratio", plausibility=0.0, dead_zone=1e9, sampling=SHORT)
    alone = LLMdoctor(folders[0], sampling=SHORT)
    assert ids(loaded.stream(PROMPTS[0], seed=4)) == ids(alone.stream(PROMPTS[0], seed=4))
    base, other = (doctor.base for doctor in loaded._doctors.values())
    assert base is other
    reads: list[object] = []
    feed = RecordedKV.feed
    monkeypatch.setattr(RecordedKV, "feed", lambda self, *a, **k: (reads.append(self.model), feed(self, *a, **k))[1])
    loaded.speculation = False
    tokens = ids(loaded.stream(PROMPTS[0], seed=4))
    assert reads.count(base) == reads.count(loaded.patient.model) == len(tokens)

    loaded.guidance = loaded.guidance.replace(dead_zones={"same": 1e9})
    assert ids(loaded.stream(PROMPTS[0], seed=4)) != tokens
    with pytest.raises(UsageError, match=r"dead_zone of kind.*-1"):
        LLMdoctor(*folders, mode="ratio", dead_zone={"kind": -1.0})
    for width in (0.0, 1.0):  # before anything is loaded
        with pytest.raises(UsageError, match="no doctor 'kidn'"):
            LLMdoctor("/absent", folders[1], mode="ratio", dead_zone={"kidn": width})
    with pytest.raises(UsageError, match=r"dead_zone of kind.*nan"):
        LLMdoctor("/absent", folders[1], mode="ratio", dead_zone=math.nan)


def test_a_session_whose_mode_changes_between_answers(folders: tuple[str, dict[str, Path]]) -> None:
    """A base that joins later, or comes back, reads what it has missed."""
    loaded = LLMdoctor(*folders, mode="ratio", beta=2.0, sampling=SHORT)
    session, messages, read = PrefixCache(), [], 0
    for turn, mode in enumerate(("product", "ratio", "product", "ratio")):
        loaded.guidance = loaded.guidance.replace(mode=mode)  # type: ignore[arg-type]
        messages.append({"role": "user", "content": PROMPTS[0]})
        alone = list(loaded.stream(messages, seed=turn))
        same(list(loaded.stream(messages, seed=turn, prefix_cache=session)), alone)
        prompt = len(session.ids) - len(alone)
        assert session.prefilled <= prompt - read + 1  # the patient reads what is new, though a base has to catch up
        read = prompt
        messages.append({"role": "assistant", "content": "".join(token.text for token in alone)})


def test_what_cannot_be_loaded(folders: tuple[str, dict[str, Path]], tmp_path: Path) -> None:
    patient, doctors = folders
    with pytest.raises(UsageError, match="nurse"):
        LLMdoctor(tmp_path / "absent", doctors, beta={"nurse": 1.0})  # said before anything is loaded
    with pytest.raises(UsageError, match="nurse"):
        LLMdoctor(patient, doctors["kind"], beta={"nurse": 1.0})
    with pytest.raises(UsageError, match="temperature"):
        LLMdoctor(patient, sampling=Sampling(temperature=-1.0))
    with pytest.raises(LoadError, match="absent"):
        LLMdoctor(tmp_path / "absent")
    with pytest.raises(LoadError, match="no doctor at"):
        LLMdoctor("org/never-asked-for", tmp_path / "absent", beta={"helpful": 1})
    for nonsense in (3, [doctors["kind"]], {"kind": None}):
        with pytest.raises(UsageError, match="expected a folder, or a mapping of names to folders"):
            LLMdoctor("org/never-asked-for", nonsense)  # type: ignore[arg-type]


def test_a_doctor_for_another_tokenizer_is_refused(stories: Path, folders: tuple[str, dict[str, Path]]) -> None:
    with pytest.raises(VocabularyError, match="first differing token") as caught:
        LLMdoctor(stories, folders[1]["kind"])
    assert str(stories) in str(caught.value)
    assert str(folders[1]["kind"]) in str(caught.value)


def test_speculation_changes_nothing_but_the_time(folders: tuple[str, dict[str, Path]]) -> None:
    """One prompt, a list with a strength and a seed of its own for each, and compared: as on the reference path."""
    fast, plain = (LLMdoctor(*folders, beta=0.8, sampling=SHORT, speculation=on) for on in (True, False))
    assert fast._drafting._sizes == {}
    each = [Guidance(1.0, {"kind": 0.2 * i, "safe": 0.3}) for i in range(len(PROMPTS))]
    for _ in range(3):
        same(fast.stream(PROMPTS[0]), plain.stream(PROMPTS[0]))
    answers = fast.generate(PROMPTS, guidance=each, seed=[5, 9, 5])
    assert answers == plain.generate(PROMPTS, guidance=each, seed=[5, 9, 5])
    assert answers == [
        plain.generate(prompt, guidance=own, seed=seed)
        for prompt, own, seed in zip(PROMPTS, each, (5, 9, 5), strict=True)
    ]
    assert set(fast._drafting._sizes) == {1}  # drafted for one row; these doctors have windows, which no batch may cut
    assert plain._drafting._sizes == {}
    together = [compared.to_dict() for compared in fast.compare_all(PROMPTS)]
    for prompt, compared in zip(PROMPTS, together, strict=True):
        alone = plain.compare(prompt).to_dict()
        assert alone["settings"] == compared["settings"]
        assert [alone[side]["text"] for side in ("patient", "guided")] == [
            compared[side]["text"] for side in ("patient", "guided")
        ]
    for wrong in ({"guidance": each[:2]}, {"seed": [1]}):
        with pytest.raises(UsageError, match="each of 3 prompts"):
            fast.generate(PROMPTS, **wrong)


def test_a_session_reads_only_what_is_new(assistant: LLMdoctor) -> None:
    """The second turn of a conversation, after a first that was left in its middle."""
    session, turns = PrefixCache(), [{"role": "user", "content": PROMPTS[2]}]
    stream = assistant.stream(turns, prefix_cache=session)
    said = "".join(next(stream).text for _ in range(9))
    stream.close()
    read = session.prefilled
    turns += [{"role": "assistant", "content": said}, {"role": "user", "content": "And?"}]
    continued = list(assistant.stream(turns, prefix_cache=session))
    assert session.prefilled < read
    same(continued, assistant.stream(turns))


def test_a_continued_answer_goes_on_where_its_tokens_end(assistant: LLMdoctor) -> None:
    """Greedy: any beginning of an answer is continued by its rest, number for number, whichever side speaks."""
    for guided in (True, False):
        how = {"guided": guided, "temperature": 0.0, "top": 3}
        whole = list(assistant.stream(PROMPTS[0], **how))
        for cut in (1, 5, len(whole) - 1):
            rest = list(assistant.stream(PROMPTS[0], prefix_ids=ids(whole[:cut]), **how))
            assert [(t.position, t.id, t.text) for t in rest] == [(t.position, t.id, t.text) for t in whole[cut:]]
            for token, twin in zip(rest, whole[cut:], strict=True):
                assert token.logprob == pytest.approx(twin.logprob, abs=1e-4)
                assert token.values == pytest.approx(twin.values, abs=1e-4)
                assert [a.id for a in token.top] == [a.id for a in twin.top]


def test_draws_behind_a_prefix_are_new_ones(folders: tuple[str, dict[str, Path]]) -> None:
    """They depend on the seed and on the prefix's length alone, and no two of these share them.

    The patient here likes all tokens alike whatever came before, so that the tokens are the random numbers.
    """
    assistant = LLMdoctor(folders[0])
    assistant.patient.model.get_output_embeddings().weight.data.zero_()

    def drawn(seed: int, prefix: list[int]) -> tuple[int, ...]:
        stream = assistant.stream("Hi", seed=seed, prefix_ids=prefix, guided=False, max_new_tokens=len(prefix) + 6)
        return tuple(ids(stream))

    answers = {(seed, length): drawn(seed, [7] * length) for seed in range(5) for length in range(5)}
    assert all(len(answer) == 6 for answer in answers.values())
    assert answers == {(seed, length): drawn(seed, [8] * length) for seed, length in answers}
    assert len(set(answers.values())) == len(answers)


def test_a_forced_token_is_said_with_its_own_numbers(assistant: LLMdoctor) -> None:
    """What an alternative promised is what the forced token has; forcing what was said changes nothing (greedy)."""
    whole = list(assistant.stream(PROMPTS[0], temperature=0.0, top=4))
    at = 4
    other = whole[at].top[2]
    branch = list(assistant.stream(PROMPTS[0], prefix_ids=ids(whole[:at]), force_id=other.id, temperature=0.0, top=4))
    forced = branch[0]
    assert (forced.id, forced.position, forced.flip) == (other.id, at, forced.flip)
    assert forced.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert forced.patient_logprob == pytest.approx(other.patient_logprob, abs=1e-4)
    assert forced.doctor_logprobs == pytest.approx(other.doctor_logprobs, abs=1e-4)
    assert forced.kl == pytest.approx(whole[at].kl, abs=1e-4)
    assert len(branch) <= SHORT.max_new_tokens - at
    twin = list(assistant.stream(PROMPTS[0], prefix_ids=[*ids(whole[:at]), other.id], temperature=0.0))
    assert ids(twin) == ids(branch[1:])
    same = assistant.stream(PROMPTS[0], prefix_ids=ids(whole[:at]), force_id=whole[at].id, temperature=0.0)
    assert ids(same) == ids(whole[at:])
    assert next(assistant.stream(PROMPTS[0], force_id=other.id)).id == other.id


def test_a_beginning_that_is_no_text_is_refused(assistant: LLMdoctor) -> None:
    with pytest.raises(UsageError, match="no token with the id 99999"):
        assistant.stream("Hi", prefix_ids=[1, 99999])
    with pytest.raises(UsageError, match="no token with the id -1"):
        assistant.stream("Hi", force_id=-1)
    with pytest.raises(UsageError, match="14 tokens long already"):
        assistant.stream("Hi", prefix_ids=[7] * 14)


def test_a_character_that_the_beginning_opened_is_completed(assistant: LLMdoctor) -> None:
    """Three bytes of one character in two prefix tokens and one forced: the text is the character."""
    tokenizer = assistant.patient.tokenizer
    spelt = tokenizer("日", add_special_tokens=False).input_ids
    assert len(spelt) == 3
    token = next(assistant.stream("Hi", prefix_ids=spelt[:2], force_id=spelt[2], stop=("never",)))
    assert token.text == "日"


def test_guidance_for_one_call_and_lists_of_conversations(assistant: LLMdoctor) -> None:
    """As if the instance had that guidance; which it has not afterwards."""
    before, name = assistant.guidance, assistant.doctor_names[0]
    stronger = before.replace(alpha=0.5, betas={**before.betas, name: 2.0})
    said = assistant.generate("Hi", alpha=0.5, beta={name: 2.0})
    assert said == assistant.generate("Hi", guidance=stronger)
    assert assistant.guidance == before
    assert said == "".join(token.text for token in assistant.stream("Hi", alpha=0.5, beta={name: 2.0}))
    with pytest.raises(UsageError, match="choose one of guidance and beta"):
        assistant.stream("Hi", beta=1.0, guidance=before)
    compared = assistant.compare("Hi", seed=5, alpha=0.5, beta={name: 2.0}, temperature=0.9)
    again = assistant.compare("Hi", seed=5, guidance=stronger, temperature=0.9)
    assert compared.guided.text == again.guided.text != assistant.compare("Hi", seed=5, temperature=0.9).guided.text
    assert (compared.settings["alpha"], compared.settings["betas"][name]) == (0.5, 2.0)
    assert compared.patient.text == assistant.compare("Hi", seed=5, temperature=0.9).patient.text
    for method in (assistant.generate, assistant.compare, lambda *asked, **how: assistant.compare_all([*asked], **how)):
        for wrong in ({"alpha": -1.0}, {"beta": {"nurse": 1.0}}, {"temperature": -1.0}, {"guidance": 5}):
            with pytest.raises(UsageError) as refused:
                method("Hi", **wrong)
            with pytest.raises(UsageError) as told:
                assistant.answer_all(["Hi"], **wrong)
            assert str(refused.value) == str(told.value)
    one = [{"role": "user", "content": "Hi"}]
    assert assistant.generate([one, one], seed=[3, 3], alpha=0.5, beta={name: 2.0}) == [said, said]


@pytest.mark.parametrize(
    "prompt", [5, "", " \n", [5], [{"role": "user"}], [{"content": "Hi"}], [[{"role": "user"}]], [[]]]
)
def test_what_is_no_prompt_is_one_line(assistant: LLMdoctor, prompt: Any) -> None:
    with pytest.raises(UsageError, match="expected"):
        assistant.generate(prompt)


@pytest.mark.parametrize("wrong", [{"alpha": -1}, {"beta": {"quack": 1}}, {"beta": "much"}, {"guidance": {"alpha": 1}}])
def test_a_wrong_strength_is_a_usage_error(assistant: LLMdoctor, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        assistant.generate("Hi", **wrong)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: d.generate([PROMPTS[0]], seed=1.5), "seed"),
        (lambda d: d.generate([PROMPTS[0]], seed={}), "seed"),
        (lambda d: d.generate([PROMPTS[0]], seed="x"), "seed"),
        (lambda d: d.generate([PROMPTS[0]], seed=[{}]), "seed"),
        (lambda d: d.answer_all([PROMPTS[0]], rows=0), "rows: expected a whole number, at least 1, got 0"),
        (lambda d: d.stream(PROMPTS[0], top=-1), "top: expected a whole number, at least 0, got -1"),
        (lambda d: d.compare(PROMPTS[0], top="x"), "top: expected a whole number"),
        (lambda d: d.compare(PROMPTS[0], top=True), "top: expected a whole number"),
        (lambda d: d.stream(PROMPTS[0], prefix_cache={}), "prefix_cache: expected a PrefixCache"),
        (lambda d: setattr(d, "sampling", {"temperature": 1}), "sampling: expected a Sampling"),
        (lambda d: setattr(d, "guidance", 3), "guidance: expected a Guidance"),
        (lambda d: d.compare(""), "the prompt is empty"),
        (lambda d: d.compare(None), "expected a prompt"),
        (lambda d: d.compare_all(PROMPTS[0]), "expected a list of prompts"),
        (lambda d: d.compare_all(None), "expected a list of prompts"),
    ],
)
def test_a_wrong_kind_of_value_is_a_usage_error(
    assistant: LLMdoctor, call: Callable[[LLMdoctor], object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        call(assistant)


def test_loading_draws_no_bars(folders: tuple[str, dict[str, Path]], capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    LLMdoctor(folders[0])
    assert capfd.readouterr().err == ""


def test_a_sample_is_what_its_own_seed_says_and_states_it(assistant: LLMdoctor) -> None:
    run = Run([Question("q", (PROMPTS[0],))], seed=7, samples=2)
    made = list(run.compare(both_sides(assistant)))
    assert [(one.sample, one.settings["seed"]) for one in made] == [(1, 7), (2, 8)]
    for one in made:
        alone = assistant.compare(PROMPTS[0], seed=one.settings["seed"])
        assert (ids(one.patient.tokens), ids(one.guided.tokens)) == (
            ids(alone.patient.tokens),
            ids(alone.guided.tokens),
        )
    assert ids(made[0].patient.tokens) != ids(made[1].patient.tokens)


QUESTIONS = [Question(str(i), turns) for i, turns in enumerate([(PROMPTS[0], "Why?"), (PROMPTS[1],), (PROMPTS[2],)])]


def test_a_run_that_was_stopped_within_a_batch_goes_on_with_the_same_answers(assistant: LLMdoctor) -> None:
    """Answers are kept when they finish, not when their batch does; those that are known are not asked for again."""
    whole = [one.to_dict() for one in Run(QUESTIONS, seed=7).compare(both_sides(assistant))]
    kept: dict[Key, tuple[Answer, float]] = {}

    def stop_soon(key: Key, timed: tuple[Answer, float]) -> None:
        kept[key] = timed
        if len(kept) == 5:  # of 8: one of the guided side's first batch of three
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Run(QUESTIONS, seed=7, on_answer=stop_soon).compare(both_sides(assistant)))
    before, asked = dict(kept), []
    later = Run(QUESTIONS, seed=7, known=kept, on_answer=lambda key, _: asked.append(key))
    rest = [one.to_dict() for one in later.compare(both_sides(assistant))]
    assert len(asked) == 3
    assert not set(asked) & set(before)
    for mine, other in zip(rest, whole, strict=True):
        for side in ("patient", "guided"):
            assert mine[side]["text"] == other[side]["text"]
            assert ids_of(mine[side]) == ids_of(other[side])
    assert later.missing(both_sides(assistant)) == 0


def ids_of(answer: dict[str, Any]) -> list[int]:
    return [token["id"] for token in answer["tokens"]]


@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9, "no_repeat_ngram": 2}])
@pytest.mark.parametrize("speculation", [True, False])
def test_a_followed_answer_tells_what_the_patient_alone_would_say(
    assistant: LLMdoctor, how: dict[str, Any], speculation: bool
) -> None:
    """After the same text it is the patient's own draw: so the first place that differs is where the answers part."""
    assistant.speculation = speculation
    for seed in (1, 2):
        (alone,), (guided,) = (
            assistant.answer_all([PROMPTS[0]], guided=guided, seed=seed, follow=True, **how) for guided in (False, True)
        )
        assert all(t.patient_id == t.id and t.patient_text == t.text for t in alone.tokens)
        away = next((i for i, t in enumerate(guided.tokens) if t.patient_id != t.id), len(guided.tokens))
        assert ids(guided.tokens[:away]) == ids(alone.tokens[:away])
        if away < len(guided.tokens):
            assert guided.tokens[away].patient_id == alone.tokens[away].id != guided.tokens[away].id
    (same_,) = assistant.answer_all([PROMPTS[0]], guidance=Guidance(), seed=1, follow=True, **how)
    assert all(t.patient_id == t.id for t in same_.tokens)


def test_without_following_it_is_the_patients_likeliest_token(assistant: LLMdoctor) -> None:
    (answer,) = assistant.answer_all([PROMPTS[0]], guidance=Guidance(1.0, {"kind": 0.0, "safe": 0.0}), seed=3, top=1)
    assert any(token.patient_id != token.id for token in answer.tokens)
    for token in answer.tokens:
        best = token.top[0]
        # what was said may also hold the rest of a character that the token before began
        assert (token.patient_id, token.patient_text) == (best.id, token.text if best.id == token.id else best.text)


def test_columns_of_one_loaded_assistant_say_what_each_says_by_itself(
    folders: tuple[str, dict[str, Path]], assistant: LLMdoctor
) -> None:
    single = LLMdoctor(folders[0], {"mine": folders[1]["safe"]}, beta=0.3, sampling=SHORT)
    part = assistant.part({"mine": "safe"}, system_prompt=None)
    guidance = Guidance(betas={"mine": 0.3})
    for prompt in PROMPTS:
        (mine,), (its,) = (one.answer_all([prompt], guidance=guidance, seed=5) for one in (part, single))
        assert ids(mine.tokens) == ids(its.tokens)
        same(mine.tokens, its.tokens)
    columns = [*both_sides(assistant), Column("other", part, guidance, SHORT), Column("seed=9", part, guidance, SHORT)]
    columns[3] = replace(columns[3], sampling=SHORT.replace(seed=9))
    columns[2] = replace(columns[2], sampling=SHORT.replace(seed=None))
    (compared,) = Run([Question("q", (PROMPTS[0],))], seed=5).compare(columns)
    assert [one.name for one in compared.vs] == ["other", "seed=9"]
    assert [one.settings["seed"] for one in compared.vs] == [5, 9]
    assert compared.vs[0].settings["betas"] == {"mine": 0.3}
    assert ids(compared.vs[0].answer.tokens) == ids(single.answer_all([PROMPTS[0]], seed=5)[0].tokens)
    assert compared.vs[0].metrics["kl"] == pytest.approx(sum(t.kl for t in compared.vs[0].answer.tokens))
    with pytest.raises(UsageError, match="no doctor 'x'"):
        assistant.part({"mine": "x"}, system_prompt=None)
