"""Rows that join and leave a running batch get the very tokens that they would have got alone."""

import inspect
import time
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmdoctor.decoding import caches
from llmdoctor.decoding.batch import Batch
from llmdoctor.decoding.caches import static
from llmdoctor.decoding.caches.dynamic import DynamicKV
from llmdoctor.decoding.drafting import FixedLength
from llmdoctor.decoding.ensemble import Ensemble
from llmdoctor.decoding.prefill import FixedPieces, TimedPieces
from llmdoctor.decoding.prefix import PrefixCache, SharedPrefixes
from llmdoctor.decoding.rows import Request, Step
from llmdoctor.errors import UsageError
from llmdoctor.settings import Guidance, Sampling
from tests.test_decode import EOS, SIZE, TINY, bigram, chain, doctor_of, ids_of, patient_of, text_of, tiny
from tests.test_speculative import Erratic, recurrent, same

SETTINGS = [
    (Guidance(1.0, {"a": 0.8}), Sampling(max_new_tokens=30)),
    (Guidance(0.3, {"a": 0.2, "b": 1.4}), Sampling(temperature=0.6, top_k=5, max_new_tokens=17)),
    (Guidance(0.0, {"b": 1.0}), Sampling(temperature=1.4, top_p=0.7, max_new_tokens=40, stop=("ab", "c"))),
    (Guidance(1.2, {}), Sampling(temperature=0.0, max_new_tokens=9)),
    (Guidance(0.8, {"a": 0.5, "b": 0.1}), Sampling(min_p=0.2, max_new_tokens=25)),
]


def requests(mode: Any = "product") -> list[Request]:
    """Five prompts of 1 to 23 tokens, each with settings and a seed of its own."""
    made = []
    for i, (guidance, sampling) in enumerate(SETTINGS):
        prompt = torch.randint(1, SIZE, ((7, 23, 1, 12, 3)[i],), generator=torch.Generator().manual_seed(i)).tolist()
        own = Guidance(guidance.alpha, guidance.betas, mode, 0.02)
        made.append(Request(prompt, lambda own=own: own, sampling, seed=10 * i))
    return made


def alone(patient: Any, doctors: dict[str, Any], request: Request, **more: Any) -> list[Step]:
    batch = Batch(patient, doctors, top=2, **more)
    batch.join([request])
    steps: list[Step] = []
    while batch:
        steps += batch.round()
    return steps


def numbered(steps: list[Step], row: int) -> list[Step]:
    return [step._replace(row=row) for step in steps]


@pytest.mark.parametrize(
    ("arch", "mode", "static_slots"),
    [
        ("llama", "product", False),
        ("llama", "ratio", True),
        ("qwen2", "ratio", False),
        ("mistral", "product", False),
        ("gemma3", "ratio", False),
    ],
)
@pytest.mark.parametrize("drafting", [None, FixedLength(5), Erratic(2)], ids=["plain", "fixed", "erratic"])
def test_rows_that_join_are_answered_as_if_alone(
    arch: str, drafting: Any, mode: str, static_slots: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts enter one by one, two at once, and when only one row is left; shorter and longer than what is there."""
    if static_slots:
        monkeypatch.setitem(caches.BACKENDS, "cpu", static.StaticKV)
        monkeypatch.setattr(static, "_LEAST", 16)
    patient, base = patient_of(tiny(arch, seed=3)), tiny("qwen2", seed=9)
    doctors = {
        "a": doctor_of(tiny(arch, seed=4), "a", 2, base=base),
        "b": doctor_of(tiny("llama", seed=5), "b", 3, base=base, anchored=True),
    }
    made = requests(mode)
    joining = {0: [0], 2: [1, 2], 5: [3], 14: [4]}
    batch = Batch(patient, doctors, top=2, drafting=drafting, with_bases=mode == "ratio")
    steps: dict[int, list[Step]] = {i: [] for i in range(len(made))}
    turn = 0
    while batch or turn <= max(joining):
        for i in joining.get(turn, ()):
            assert batch.join([made[i]]) == [i]
        for step in batch.round():
            steps[step.row].append(step)
        turn += 1
    for i, request in enumerate(made):
        expected = alone(patient, doctors, request, with_bases=mode == "ratio")
        same([steps[i]], [numbered(expected, i)])
        assert steps[i][-1].finish is not None


def test_guidance_of_a_joined_row_may_change_between_any_two_tokens() -> None:
    patient = patient_of(tiny("llama", seed=3))
    doctors = {"a": doctor_of(tiny("llama", seed=4), "a")}
    schedule = [Guidance(1.0, {"a": 0.9}), Guidance(0.2, {"a": 1.5}), Guidance(1.0, {"a": 0.0})]

    def run(drafting: Any, together: bool) -> list[list[Step]]:
        rows: list[list[Step]] = [[], [], []]
        batch = Batch(patient, doctors, drafting=drafting)
        for i, row in enumerate(rows):
            read = lambda row=row, i=i: schedule[(len(row) + i) % 3]  # noqa: E731
            batch.join([Request([3 + i, 5, 2 + i], read, Sampling(max_new_tokens=20, temperature=0.7), seed=i)])
            for _ in range(1 if together else 20):  # one round, then the next prompt enters; or to the end
                for step in batch.round():
                    rows[step.row].append(step)
        while batch:
            for step in batch.round():
                rows[step.row].append(step)
        return rows

    plain = run(None, together=False)
    for drafting in (None, FixedLength(4), Erratic(1)):
        same(run(drafting, together=True), plain)


def test_recurrent_rows_join_too() -> None:
    """A hybrid of state space and attention layers: its states have no slots to pad, and cannot be drafted for."""
    patient, doctors = patient_of(recurrent()), {"a": doctor_of(tiny("llama", seed=4).float(), "a")}
    sampling = Sampling(max_new_tokens=12, temperature=0.0)
    prompts = [[3, 7, 2, 9, 9, 1], [5], [4, 4, 8]]
    made = [Request(prompt, lambda: Guidance(1.0, {"a": 0.5}), sampling) for prompt in prompts]
    batch, steps = Batch(patient, doctors), [[], [], []]
    for request in made:
        batch.join([request])
        for step in batch.round():
            steps[step.row].append(step)
    while batch:
        for step in batch.round():
            steps[step.row].append(step)
    for own, request in zip(steps, made, strict=True):
        expected = alone(patient, doctors, request)
        assert ids_of(own) == ids_of(expected)
        for mine, other in zip(own, expected, strict=True):
            assert mine.token.logprob == pytest.approx(other.token.logprob, abs=1e-4)


@pytest.mark.parametrize("drafting", [None, FixedLength(3)], ids=["plain", "drafted"])
def test_a_row_leaves_at_any_time_and_disturbs_nobody(drafting: Any) -> None:
    """Between two rounds, and from within one while tokens of the same round are still to be shown."""
    patient = patient_of(tiny("llama", seed=3))
    doctors = {"a": doctor_of(tiny("qwen2", seed=4), "a"), "b": doctor_of(tiny("llama", seed=5), "b")}
    made = requests()
    expected = [numbered(alone(patient, doctors, request), i) for i, request in enumerate(made)]
    leaving = sorted(range(5), key=lambda i: len(expected[i]))[-2:]
    for within in (False, True):
        batch = Batch(patient, doctors, top=2, drafting=drafting)
        assert batch.join(made) == [0, 1, 2, 3, 4]
        steps: dict[int, list[Step]] = {i: [] for i in range(5)}
        turn = 0
        while batch:
            for step in batch.round():
                steps[step.row].append(step)
                if within and turn == 1 and step.row == min(leaving):
                    for i in leaving:
                        batch.leave(i)
            turn += 1
            if not within and turn == 2:
                for i in (*leaving, 77):
                    batch.leave(i)
        for i, whole in enumerate(expected):
            if i in leaving:
                assert 2 <= len(steps[i]) < len(whole)
            else:
                assert len(steps[i]) == len(whole)
            same([steps[i]], [whole[: len(steps[i])]])


def test_a_prompt_that_leaves_before_its_first_round_is_never_read() -> None:
    patient = patient_of(bigram(chain("abcd")))
    batch = Batch(patient, {})
    first, second = batch.join([Request([1]), Request([1])])
    batch.leave(first)
    steps: list[Step] = []
    while batch:
        steps += batch.round()
    assert {step.row for step in steps} == {second}
    assert text_of(steps) == "bcd"
    assert batch.join([Request([1])]) == [2]  # numbers are never given twice, and an empty batch starts again
    assert text_of(list(batch.round())) == "bc"  # its first round, and a round beside the others


def test_a_row_that_leaves_while_held_tokens_are_shown_shows_no_more() -> None:
    """ "bcd" is held, for it may be the beginning of the stop string; with "e" all four are shown at once."""
    batch = Batch(patient_of(bigram(chain("abcdefgh"))), {})
    batch.join([Request([1], sampling=Sampling(temperature=0, stop=("bcdx",)))])
    shown = []
    while batch:
        for step in batch.round():
            shown.append(step.token.text)
            if step.token.text == "c":
                batch.leave(step.row)
    assert shown == ["b", "c"]


def test_what_may_not_join() -> None:
    """Said when it asks, and without harm to those who are there."""
    patient, doctor = patient_of(tiny("llama", seed=3)), doctor_of(tiny("llama", seed=4), "a")
    batch = Batch(patient, {"a": doctor})
    batch.join([Request([1, 2, 3], lambda: Guidance(1.0, {"a": 0.5}), Sampling(max_new_tokens=5))])
    steps = list(batch.round())
    for request, message in (
        (Request([]), "empty"),
        (Request([1] * 128), "128 tokens long"),
        (Request([1], lambda: Guidance(1.0, {"nurse": 1.0})), "nurse"),
        (Request([1], lambda: Guidance(1.0, {"a": 1.0}, "ratio")), "ratio"),
    ):
        with pytest.raises(UsageError, match=message):
            batch.join([Request([4]), request])
    while batch:
        steps += batch.round()
    assert {step.row for step in steps} == {0}
    assert len(steps) == 5


def answered(batch: Batch) -> dict[int, list[Step]]:
    """All steps until the batch is empty, by row."""
    steps: dict[int, list[Step]] = {}
    while batch:
        for step in batch.round():
            steps.setdefault(step.row, []).append(step)
    return steps


def test_a_prompt_whose_cache_cannot_join_is_answered_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    patient, doctors = patient_of(tiny("llama", seed=3)), {"a": doctor_of(tiny("llama", seed=4), "a")}
    request = Request(requests()[0].prompt, lambda: Guidance(1.0, {"a": 0.5}), Sampling(max_new_tokens=20))
    monkeypatch.setattr(DynamicKV, "can_join", property(lambda _: False))
    batch = Batch(patient, doctors, top=2)
    batch.join([request])
    steps = list(batch.round())
    other = Request([5, 6], sampling=Sampling(max_new_tokens=5))
    batch.join([other])
    rest = answered(batch)
    same([steps + rest[0]], [alone(patient, doctors, request)])
    same([rest[1]], [numbered(alone(patient, doctors, other), 1)])


def counted(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every forward of a model from now on."""
    read: list[int] = []
    forward = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        read.append(kwargs["input_ids"].numel())
        return forward(*args, **kwargs)

    counting.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(model, "forward", counting)
    return read


def drawn_at(seed: int, count: int) -> list[int]:
    return torch.randint(1, SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "recurrent"])
@pytest.mark.parametrize("tokens", [1, 7, 64])
@pytest.mark.parametrize("drafting", [None, FixedLength(3)], ids=["plain", "drafted"])
def test_prompts_read_in_pieces_are_answered_as_if_alone(
    arch: str, tokens: int, drafting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In lanes of their own too: rows of 5 and of 90 tokens are not padded to each other."""
    monkeypatch.setattr("llmdoctor.decoding.batch._PADDING", 30)
    patient = patient_of(recurrent() if arch == "recurrent" else tiny(arch, seed=3))
    base = tiny("qwen2", seed=9)
    doctors = {"a": doctor_of(tiny("llama", seed=4), "a", 2, base=base)}
    own = Guidance(1.0, {"a": 0.8}, "ratio", 0.02)
    greedy = 0.0 if arch == "recurrent" else 0.8  # its arithmetic is single
    made = [
        Request(drawn_at(n, n), lambda: own, Sampling(max_new_tokens=12, temperature=greedy), seed=n)
        for n in (5, 90, 6, 33, 88)
    ]
    batch = Batch(patient, doctors, top=2, drafting=drafting, with_bases=True, pieces=FixedPieces(tokens))
    steps: dict[int, list[Step]] = {i: [] for i in range(len(made))}
    lanes = 0
    for request in made:
        batch.join([request])
        for step in batch.round():
            steps[step.row].append(step)
    while batch:
        for step in batch.round():
            steps[step.row].append(step)
        lanes = max(lanes, len(batch._lanes))
    assert lanes > 1 or tokens == 1  # token by token the first answers end before the others are read
    for i, request in enumerate(made):
        expected = numbered(alone(patient, doctors, request, with_bases=True), i)
        if arch == "recurrent":
            assert ids_of(steps[i]) == ids_of(expected)
        else:
            same([steps[i]], [expected])


def test_a_long_prompt_lets_others_speak_and_short_ones_pass() -> None:
    table = torch.zeros(SIZE, SIZE)
    table[:, EOS] = -50
    patient = patient_of(bigram(table.double()))
    batch = Batch(patient, {}, pieces=FixedPieces(10))
    batch.join([Request([1], sampling=Sampling(max_new_tokens=40, temperature=0))])
    list(batch.round())
    batch.join([Request([1] * 100, sampling=Sampling(max_new_tokens=1)), Request([1] * 10)])
    spoke = [{step.row for step in batch.round()} for _ in range(12)]
    assert all(0 in rows for rows in spoke)
    first = [next(at for at, rows in enumerate(spoke) if row in rows) for row in (1, 2)]
    assert first[1] <= 1  # at the first or the second turn
    assert first[0] == 10  # after ten pieces and the short one's
    batch.join([Request([1] * 100)])
    batch.leave(3)
    list(batch.round())
    batch.join([Request([1] * 100)])
    list(batch.round())
    batch.leave(4)  # in the middle of its prompt
    assert 4 not in batch
    assert not batch._arriving


@pytest.mark.parametrize("backend", [DynamicKV, static.StaticKV], ids=["dynamic", "static"])
@pytest.mark.parametrize("drafting", [None, FixedLength(3)], ids=["plain", "drafted"])
@pytest.mark.parametrize("tokens", [16, 1000])
def test_what_prompts_begin_with_is_read_once(
    backend: Any, drafting: Any, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every model: prompts of 40 equal tokens that come together, one that comes later, and a second turn."""
    monkeypatch.setitem(caches.BACKENDS, "cpu", backend)  # a recorded step is no forward that could be counted
    monkeypatch.setattr(static, "_LEAST", 16)
    patient, base = patient_of(tiny("llama", seed=3)), tiny("qwen2", seed=9)
    doctors = {"a": doctor_of(tiny("qwen2", seed=4), "a", 2, base=base)}
    own = Guidance(1.0, {"a": 0.8}, "ratio", 0.02)
    sampling = Sampling(max_new_tokens=6)
    start = drawn_at(1, 40)

    def ask(*more: int, seed: int = 1) -> Request:
        return Request([*start, *more], lambda: own, sampling, seed=seed)

    first = [ask(3, 4, 5), ask(7, 7), ask(9), ask(8, 2, 6, 6)]
    expected = [ids_of(alone(patient, doctors, one, with_bases=True)) for one in (*first, ask(5, 5))]
    second = Request([*first[0].prompt, *expected[0], 2, 3], lambda: own, sampling, seed=5)
    later = ids_of(alone(patient, doctors, second, with_bases=True))
    prefixes = SharedPrefixes(1 << 30)
    how = {"drafting": drafting, "with_bases": True, "pieces": FixedPieces(tokens), "prefixes": prefixes}
    batch = Batch(patient, doctors, **how)
    models = {"patient": patient.model, "doctor": doctors["a"].model, "base": base}
    reads = {name: counted(model, monkeypatch) for name, model in models.items()}
    batch.join(first)
    steps: dict[int, list[Step]] = {}
    while len(steps) < 4:
        for step in batch.round():
            steps.setdefault(step.row, []).append(step)
    assert prefixes.hits == 3
    assert prefixes.reused == 3 * 40
    for row, more in answered(batch).items():
        steps[row] += more
    batch.join([ask(5, 5)])
    batch.join([second])
    before = {name: sum(read) for name, read in reads.items()}
    for row, more in answered(batch).items():
        steps[row] = more
    assert [ids_of(steps[i]) for i in range(6)] == [*expected, later]
    assert prefixes.hits == 5
    # all but the last token of the first answer was read with it
    assert prefixes.reused == 4 * 40 + 43 + len(expected[0]) - 1
    if drafting is None and backend is DynamicKV:  # no drafts that are read in vain, no rows that nobody uses
        spoken = {name: sum(read) - before[name] for name, read in reads.items()}
        # two rows of 3 fresh tokens, one of them read again because they are read together; then the answers
        whole = 2 * 3 + len(expected[4]) + len(later)
        assert spoken == {"patient": whole - 2, "doctor": whole, "base": whole - 2}
    assert prefixes.size == sum(held.size for held in prefixes._held.values())


@pytest.mark.parametrize("tokens", [5, 6, 7, 8])
def test_what_was_drafted_beyond_the_end_of_an_answer_is_not_kept(tokens: int) -> None:
    """The doctor is the patient, so that all drafts stand and the answer ends in the middle of one."""
    model = tiny("llama", seed=3)
    patient, doctors = patient_of(model), {"a": doctor_of(model, "a")}
    own, prefixes = Guidance(1.0, {"a": 0.5}), SharedPrefixes(1 << 30)

    def ask(prompt: list[int]) -> Request:
        return Request(prompt, lambda: own, Sampling(max_new_tokens=tokens), seed=2)

    batch = Batch(patient, doctors, drafting=FixedLength(3), pieces=FixedPieces(50), prefixes=prefixes)
    batch.join([ask(drawn_at(1, 40))])
    first = ids_of(answered(batch)[0])
    second = ask([*drawn_at(1, 40), *first, 7, 8])
    batch.join([second])
    assert ids_of(answered(batch)[1]) == ids_of(alone(patient, doctors, second))
    assert all(len(ids) == held.length for ids, held in prefixes._held.items())
    assert prefixes.reused >= 40 + len(first) - 5


def test_what_is_kept_of_prompts_is_bounded_and_the_least_used_goes() -> None:
    patient = patient_of(tiny("llama", seed=3))

    def run(prefixes: SharedPrefixes, seed: int) -> int:
        before = prefixes.reused
        batch = Batch(patient, {}, pieces=FixedPieces(50), prefixes=prefixes)
        batch.join([Request(drawn_at(seed, 60), sampling=Sampling(max_new_tokens=3))])
        answered(batch)
        assert prefixes.size <= prefixes.most
        return prefixes.reused - before

    prefixes = SharedPrefixes(1 << 30)
    assert run(prefixes, 1) == 0
    one = prefixes.size
    assert one > 60 * 2
    prefixes = SharedPrefixes(2 * one)
    assert [run(prefixes, seed) for seed in (1, 2, 1, 3, 1, 2)] == [0, 0, 59, 0, 59, 0]
    prefixes = SharedPrefixes(one // 2)
    assert [run(prefixes, 1), run(prefixes, 1), prefixes.size <= one // 2] == [0, 0, True]


def test_a_piece_takes_about_as_long_as_a_round() -> None:
    """On a machine where T tokens take .02 + .001 T seconds, and on one where a forward alone takes two rounds."""
    pieces = TimedPieces()
    assert pieces.choose(speaking=False) > 0
    for base, round_ in ((0.02, 0.1), (0.04, 0.02)):
        spent = 0.0
        for turn in range(60):
            tokens = pieces.choose(speaking=True)
            seconds = base + 0.001 * tokens if tokens else 0.0
            if tokens:
                pieces.record(tokens, seconds)
            if turn >= 10:
                spent += seconds
                assert seconds <= max(1.2 * round_, base + 0.016 + 1e-9)
            pieces.record_round(round_)
        assert 0.7 < spent / (50 * round_) < 1.1


@pytest.mark.parametrize("drafting", [None, FixedLength(4)], ids=["plain", "drafted"])
@pytest.mark.parametrize("calls", [2, 3, 5])
def test_a_row_whose_guidance_fails_leaves_and_the_others_go_on(drafting: Any, calls: int) -> None:
    """In its first round, in a later one, within a draft: the error is raised at the end of that round."""
    table = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).double()
    table[:, EOS] = -50
    model = bigram(table)  # its own doctor: all drafts are accepted
    patient, doctors = patient_of(model), {"a": doctor_of(model, "a"), "b": doctor_of(tiny("llama", seed=5), "b")}
    good, asked = requests()[0], 0

    def failing() -> Guidance:
        nonlocal asked
        asked += 1
        return Guidance(1.0, {"nurse" if asked >= calls else "a": 1.0})

    batch = Batch(patient, doctors, top=2, drafting=drafting)
    batch.join([Request([3, 4, 5], failing, Sampling(max_new_tokens=20)), good])
    steps: dict[int, list[Step]] = {0: [], 1: []}
    failed = 0
    while batch:
        try:
            for step in batch.round():
                steps[step.row].append(step)
        except UsageError as error:
            failed += "nurse" in str(error)
    assert failed == 1
    assert len(steps[0]) == calls - 2  # it is asked once when it joins, and then before every token
    same([steps[1]], [numbered(alone(patient, doctors, good), 1)])


def test_a_row_may_leave_within_its_first_round_and_a_batch_gives_its_caches_back() -> None:
    patient = patient_of(bigram(chain("abcdefgh")))
    batch = Batch(patient, {})
    batch.join([Request([1]), Request([1])])
    shown: list[int] = []
    for step in batch.round():
        assert batch
        shown.append(step.row)
        batch.leave(0)
    assert shown[0] == 0
    assert set(shown[1:]) == {1}
    answered(batch)
    assert not batch._lanes
    batch.join([Request([1])])
    next(batch.round())  # and leave the round there
    with pytest.raises(UsageError, match="not run to its end"):
        next(batch.round())


def test_a_prefix_cache_takes_the_next_prompt_when_the_last_one_has_left() -> None:
    patient = patient_of(bigram(chain("abcd")))
    batch = Batch(patient, {}, prefix_cache=PrefixCache())
    batch.join([Request([1])])
    with pytest.raises(UsageError, match="one conversation"):
        batch.join([Request([1])])
    list(batch.round())
    batch.leave(0)
    batch.join([Request([1])])
    assert text_of(answered(batch)[1]) == "bcd"


def test_a_batch_with_bases_needs_every_base() -> None:
    patient, doctor = patient_of(tiny("llama", seed=3)), doctor_of(tiny("llama", seed=4), "a")
    with pytest.raises(UsageError, match="base model of doctor 'a'"):
        Batch(patient, {"a": doctor}, with_bases=True)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 8}),
    ],
)
def test_what_counts_slots_is_not_drafted_for_in_a_batch(kind: str, more: dict[str, Any]) -> None:
    """Convolutions, and windows over a cache of full attention: holes would move what they see."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TINY, **more})).double().eval()
    patient, doctors = patient_of(model.requires_grad_(False)), {"a": doctor_of(tiny("llama", seed=4), "a")}
    made = [
        Request(torch.arange(1, 1 + n).tolist(), lambda: Guidance(1.0, {"a": 0.8}), Sampling(max_new_tokens=25), seed=n)
        for n in (3, 14, 1, 6)
    ]
    batch = Batch(patient, doctors, top=2, drafting=FixedLength(4))
    batch.join(made)
    steps = answered(batch)
    for i, request in enumerate(made):
        expected = alone(patient, doctors, request)
        assert ids_of(steps[i]) == ids_of(expected)
        for mine, other in zip(steps[i], expected, strict=True):  # gpt_neo's attention is in float32
            assert mine.token.logprob == pytest.approx(other.token.logprob, abs=1e-5)


def test_rows_that_nobody_uses_have_no_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rows take four of a static cache: the fourth must not run beyond a table of 128 positions."""
    monkeypatch.setitem(caches.BACKENDS, "cpu", static.StaticKV)
    monkeypatch.setattr(static, "_LEAST", 16)
    torch.manual_seed(3)
    config = AutoConfig.for_model("opt", **{**TINY, "ffn_dim": 24, "word_embed_proj_dim": 16})
    patient = patient_of(AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False))
    doctors = {"a": doctor_of(tiny("llama", seed=4), "a")}
    made = [
        Request([i + 1] * 90, lambda: Guidance(1.0, {"a": 0.8}), Sampling(max_new_tokens=38), seed=i) for i in range(3)
    ]
    for seed in range(6):
        batch = Batch(patient, doctors, drafting=Erratic(seed))
        batch.join(made)
        assert len(answered(batch)) == 3


def test_static_slots_are_given_back_when_rows_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(caches.BACKENDS, "cpu", static.StaticKV)
    monkeypatch.setattr(static, "_LEAST", 16)
    model = tiny("llama", seed=3)
    batch = Batch(patient_of(model), {})
    for i in range(12):
        batch.join([Request([1 + i], sampling=Sampling(max_new_tokens=4), seed=i)])
        list(batch.round())
    held = [slots for slots in static._slots[model] if getattr(slots.owner(), "slots", None) is slots]
    assert len(held) <= 1  # those of the batch


def test_the_time_of_a_round_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of who looks at the tokens, nor, on a CPU, the time that the processor works for others."""

    class Seconds(FixedLength):
        total = 0.0

        def record(self, rows: int, slots: int, length: int, accepted: int, tested: int, seconds: float) -> None:
            self.total += seconds

    patient, drafting = patient_of(tiny("llama", seed=3)), Seconds(2)
    propose = Ensemble.propose
    monkeypatch.setattr(Ensemble, "propose", lambda *args: (time.sleep(0.05), propose(*args))[1])
    batch = Batch(patient, {"a": doctor_of(tiny("llama", seed=4), "a")}, drafting=drafting)
    batch.join([Request([1, 2, 3], lambda: Guidance(1.0, {"a": 1.0}), Sampling(max_new_tokens=12))])
    began, rounds, slept = time.perf_counter(), 0, 0.0
    while batch:
        for _ in batch.round():
            time.sleep(0.01)
            slept += 0.01
        slept += 0.05
        rounds += 1
    assert rounds > 3
    assert 0 < drafting.total < time.perf_counter() - began - slept + 0.05  # with all the sleep it would be .15 more


@pytest.mark.parametrize(("kind", "most"), [("llama", 0), ("gemma3", 1 << 30)])
def test_where_nothing_can_be_kept_no_prompt_waits_for_another(kind: str, most: int) -> None:
    """A store without room, and layers that see a window only."""
    patient = patient_of(tiny(kind, seed=3))
    start = drawn_at(1, 40)

    def ask(last: int) -> Request:
        return Request([*start, last], Guidance, Sampling(max_new_tokens=2), seed=last)

    batch = Batch(patient, {}, pieces=FixedPieces(1000), prefixes=SharedPrefixes(most))
    batch.join([ask(1)])
    answered(batch)
    batch.join([ask(last) for last in range(2, 8)])
    assert len({step.row for step in batch.round()}) == 6
