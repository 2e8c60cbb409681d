"""Stage 3 against naive twins: full forwards in float64, one token at a time, without a cache."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from llmdoctor.decoding.decode import decode
from llmdoctor.decoding.rows import Step
from llmdoctor.errors import LoadError, UsageError
from llmdoctor.models import Patient, Vocabulary, load_patient
from llmdoctor.records import GuidedToken
from llmdoctor.settings import Guidance, Sampling
from llmdoctor.training.folder import LoadedDoctor
from tests.test_guidance import naive_draw

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
EOS, LETTERS = 0, "abcdefghijklmnopqrstuvwxyz ,."
SIZE = 1 + len(LETTERS)
TINY: dict[str, Any] = {
    "vocab_size": SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**TINY),
    "qwen2": lambda: Qwen2Config(**TINY),
    "mistral": lambda: MistralConfig(**TINY, sliding_window=8),
    "gemma2": lambda: Gemma2Config(**{**TINY, "sliding_window": 8, "query_pre_attn_scalar": 8}),
    "gemma3": lambda: Gemma3TextConfig(**{**TINY, "sliding_window": 8, "query_pre_attn_scalar": 8}),
}
PROMPTS = [[5, 9, 2], list(range(1, 22)), [7, 7, 3, 1, 9, 12, 4, 4, 8, 20, 11]]


def char_tokenizer(ids: dict[str, int] | None = None) -> PreTrainedTokenizerFast:
    """One token a letter; 0 is the end of an answer."""
    ids = ids or {"<eos>": EOS, **{letter: i + 1 for i, letter in enumerate(LETTERS)}}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def tiny(arch: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = CONFIGS[arch]()
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).double().eval().requires_grad_(False)


def bigram(logits_V_V: torch.Tensor, context: int = 128) -> PreTrainedModel:
    """A Llama whose next-token logits are exactly ``logits_V_V[last]``: one-hot embeddings, blocks that add nothing."""
    size = len(logits_V_V)
    config = LlamaConfig(**{**TINY, "vocab_size": size, "hidden_size": size, "max_position_embeddings": context})
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(size))
    state = model.model.norm(model.model.embed_tokens.weight)  # a multiple of the identity
    model.lm_head.weight.copy_(logits_V_V.T / state[0, 0])
    return model


def chain(text: str, then: str | int = EOS) -> torch.Tensor:
    """Bigram logits that say ``text`` from its first letter on, and then ``then`` for ever."""
    ids = [LETTERS.index(c) + 1 for c in text] + [LETTERS.index(then) + 1 if isinstance(then, str) else then]
    table = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for here, following in pairwise(ids):
        table[here, following] = 50
    table[ids[-1], ids[-1]] = 50
    return table


def patient_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> Patient:
    return Patient(model, tokenizer or char_tokenizer(), "test")


def doctor_of(model: PreTrainedModel, name: str = "doctor", seed: int = 1, **changes: object) -> LoadedDoctor:
    weight = torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(seed)).double()
    known = {"anchored": False, "vocabulary": Vocabulary.of(char_tokenizer()), "base": None, "meta": {}}
    return LoadedDoctor(name, model, weight, torch.tensor([0.25]).double(), **{**known, **changes})


def run(
    patient: Patient,
    doctors: list[LoadedDoctor],
    prompts: list[list[int]],
    guidance: Guidance,
    seed: int = 0,
    top: int = 0,
    **sampling: object,
) -> list[list[Step]]:
    """All steps of every row."""
    rows: list[list[Step]] = [[] for _ in prompts]
    named = {doctor.name: doctor for doctor in doctors}
    for step in decode(patient, named, prompts, lambda: guidance, Sampling(**sampling), seed=seed, top=top):
        assert not rows[step.row] or rows[step.row][-1].finish is None, "a row goes on after its end"
        assert step.token.position == len(rows[step.row])
        rows[step.row].append(step)
    return rows


def ids_of(steps: list[Step]) -> list[int]:
    return [step.token.id for step in steps]


def text_of(steps: list[Step]) -> str:
    return "".join(step.token.text for step in steps)


def generated(model: PreTrainedModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy `generate` of the library on a left-padded batch, cut after the end token."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[EOS] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    ends = model.generation_config.eos_token_id
    rows = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=EOS)
    answers = rows[:, longest:].tolist()
    return [row[: row.index(ends) + 1] if ends in row else row for row in answers]


def logps(model: PreTrainedModel, ids: list[int], size: int = SIZE) -> torch.Tensor:
    """The naive twin: log-probs [V] after ``ids``, from a full forward in float64."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :size].log_softmax(-1)


GREEDY_ALONE = Guidance(1.0, {"doctor": 0.0})


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[1:2]], ids=["ragged", "single"])
def test_beta_0_and_alpha_0_are_the_models_own_generate(arch: str, prompts: list[list[int]]) -> None:
    """Token for token, in a left-padded batch too, and (mistral, gemma) far beyond the sliding window of 8."""
    model, other = tiny(arch, seed=3), tiny(arch, seed=4)
    if arch == "gemma2":  # its attention is float32 inside, and cannot mask a padded row in float64
        model, other = model.float(), other.float()
    patient, doctor = patient_of(model), doctor_of(other)
    alone = run(patient, [doctor], prompts, GREEDY_ALONE, temperature=0, max_new_tokens=24)
    assert [ids_of(row) for row in alone] == generated(model, prompts, 24)
    assert not any(step.token.flip for row in alone for step in row)
    assert all(abs(step.token.kl) < 1e-6 for row in alone for step in row)
    only = run(patient, [doctor], prompts, Guidance(0.0, {"doctor": 1.0}), temperature=0, max_new_tokens=24)
    assert [ids_of(row) for row in only] == generated(other, prompts, 24)


def test_without_guidance_sampling_draws_other_tokens_and_none_is_a_flip() -> None:
    patient, doctor = patient_of(tiny("llama", seed=3)), doctor_of(tiny("llama", seed=4))
    rows = run(patient, [doctor], PROMPTS, GREEDY_ALONE, max_new_tokens=24)
    greedy = run(patient, [doctor], PROMPTS, GREEDY_ALONE, temperature=0, max_new_tokens=24)
    assert list(map(ids_of, rows)) != list(map(ids_of, greedy))
    assert not any(step.token.flip for row in rows for step in row)


@needs_shared
def test_stories_go_on_as_generate_does() -> None:
    patient = load_patient(SHARED / "stories260k", dtype="float64")
    prompts = [list(patient.tokenizer(t).input_ids) for t in ("Once upon a time, there was a little dog", "Tom")]
    doctor = doctor_of(patient.model, vocabulary=patient.vocabulary)
    rows = run(patient, [doctor], prompts, GREEDY_ALONE, temperature=0, max_new_tokens=40)
    patient.model.generation_config.eos_token_id = 2
    assert [ids_of(row) for row in rows] == [
        patient.model.generate(torch.tensor([p]), do_sample=False, max_new_tokens=40)[0, len(p) :].tolist()
        for p in prompts
    ]
    assert "Max loved to play with his toys" in text_of(rows[0])
    assert text_of(rows[0]) == patient.tokenizer.decode(ids_of(rows[0]), skip_special_tokens=True)


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma3"])
def test_every_number_of_every_token_equals_the_uncached_twin(arch: str) -> None:
    """A sampled batch of ragged prompts, two doctors, alpha and the betas changing between any two tokens."""
    patient = patient_of(tiny(arch, seed=5))
    doctors = [doctor_of(tiny("qwen2", seed=6), "a", 2), doctor_of(tiny(arch, seed=7), "b", 3, anchored=True)]
    named = {doctor.name: doctor for doctor in doctors}
    schedule = [Guidance(1.0, {"a": 0.8}), Guidance(0.0, {"a": 0.3, "b": 1.1}), Guidance(0.6, {"b": 0.4, "a": 0.0})]
    shown: list[list[GuidedToken]] = [[] for _ in PROMPTS]

    def guidance_now() -> Guidance:  # the rows go in step: token p of every row is drawn when p tokens have been seen
        return schedule[max(map(len, shown)) % 3]

    for step in decode(patient, named, PROMPTS, guidance_now, Sampling(max_new_tokens=20), seed=11, top=3):
        shown[step.row].append(step.token)
    assert {len(row) for row in shown} & {20}
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, shown, strict=True)):
        generator = torch.Generator().manual_seed(11 + row)
        ids = list(prompt)
        for token in tokens:
            guidance = schedule[token.position % 3]
            own = logps(patient.model, ids)
            each = {name: logps(doctor.model, ids) for name, doctor in named.items()}
            mixed = guidance.alpha * own + sum(guidance.betas.get(n, 0.0) * lp for n, lp in each.items())
            mixed = mixed.log_softmax(-1)
            key = int(torch.randint(2**63 - 1, (), generator=generator))
            drawn = naive_draw(mixed.exp().tolist(), key)
            assert token.id == drawn
            assert (token.alpha, dict(token.betas)) == (guidance.alpha, dict(guidance.betas))
            assert token.patient_logprob == pytest.approx(own[drawn].item(), abs=1e-9)
            assert token.doctor_logprobs == pytest.approx({n: lp[drawn].item() for n, lp in each.items()}, abs=1e-9)
            assert token.logprob == pytest.approx(mixed[drawn].item(), abs=1e-9)
            assert token.kl == pytest.approx((mixed.exp() * (mixed - own)).sum().item(), abs=1e-9)
            assert token.flip == (own.argmax().item() != mixed.argmax().item())
            listed = [*mixed.topk(3).indices.tolist(), own.argmax().item(), drawn]
            assert [a.id for a in token.top] == list(dict.fromkeys(listed))
            for alternative in token.top:
                assert alternative.rank == 1 + (mixed > mixed[alternative.id]).sum().item()
                assert alternative.patient_rank == 1 + (own > own[alternative.id]).sum().item()
                assert alternative.logprob == pytest.approx(mixed[alternative.id].item(), abs=1e-9)
                assert alternative.patient_logprob == pytest.approx(own[alternative.id].item(), abs=1e-9)
                expected = {n: lp[alternative.id].item() for n, lp in each.items()}
                assert alternative.doctor_logprobs == pytest.approx(expected, abs=1e-9)
            ids.append(drawn)
            values = {}
            for name, doctor in named.items():
                state = doctor.model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
                values[name] = (doctor.value_weight[0] @ state + doctor.value_bias[0]).item()
            if drawn == EOS:
                values["b"] = 0.0  # anchored: log V(s_T) = 0
            assert token.values == pytest.approx(values, abs=1e-9)


def test_a_row_of_a_batch_is_the_answer_alone_with_its_own_seed() -> None:
    """Whatever the lengths of its neighbours and however early they end."""
    favours_the_end = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).double()
    favours_the_end[:, EOS] += 2
    for model in (bigram(favours_the_end), tiny("mistral", seed=8)):
        patient, doctor = patient_of(model), doctor_of(tiny("gemma3", seed=9))
        guidance, prompts = Guidance(0.9, {"doctor": 0.5}), [*PROMPTS, [4], [2, 2]]
        together = run(patient, [doctor], prompts, guidance, seed=100, max_new_tokens=16, temperature=0.8, top_p=0.95)
        for row, prompt in enumerate(prompts):
            (alone,) = run(
                patient, [doctor], [prompt], guidance, 100 + row, max_new_tokens=16, temperature=0.8, top_p=0.95
            )
            assert ids_of(together[row]) == ids_of(alone)
            assert [s.finish for s in together[row]] == [s.finish for s in alone]
            for a, b in zip(together[row], alone, strict=True):
                assert a.token.logprob == pytest.approx(b.token.logprob, abs=1e-9)
                assert a.token.values == pytest.approx(b.token.values, abs=1e-9)


def test_padding_rows_and_unused_ids_do_not_exist() -> None:
    """Embeddings padded to 48 and 40 rows, their padding and an id that no token has loud: as if cut and masked."""
    hole = 13
    ids = {token: i for token, i in char_tokenizer().get_vocab().items() if i != hole}
    tokenizer = char_tokenizer(ids)
    loud, quiet = (tiny(seed=s, vocab_size=v) for s, v in ((1, 48), (2, 40)))
    for model in (loud, quiet):
        model.lm_head.weight[SIZE:] *= 30
        model.lm_head.weight[hole] *= 30
    patient = patient_of(loud, tokenizer)
    doctor = doctor_of(quiet, vocabulary=Vocabulary.of(tokenizer))
    prompts = [[4, 9, 3]] * 40
    for guidance in (Guidance(1.0, {"doctor": 0.7}), Guidance(0.0, {"doctor": 1.0}), Guidance(1.0, {"doctor": 0.0})):
        for row in run(patient, [doctor], prompts, guidance, max_new_tokens=6):
            assert set(ids_of(row)) <= set(ids.values())
            first = row[0].token
            masks = [
                logps(m, [4, 9, 3]).index_fill(0, torch.tensor(hole), -math.inf).log_softmax(-1) for m in (loud, quiet)
            ]
            if guidance.alpha and guidance.betas["doctor"]:
                mixed = (guidance.alpha * masks[0] + guidance.betas["doctor"] * masks[1]).log_softmax(-1)
                assert first.logprob == pytest.approx(mixed[first.id].item(), abs=1e-9)
                kl = sum(p.exp() * (p - q) for p, q in zip(mixed, masks[0], strict=True) if p > -math.inf)
                assert first.kl == pytest.approx(kl.item(), abs=1e-9)
            assert first.patient_logprob == pytest.approx(masks[0][first.id].item(), abs=1e-9)


@needs_shared
def test_qwen2_tokens_with_two_paddings() -> None:
    """152,064 rows of the patient, 151,936 of the doctor, 151,646 tokens: only those are drawn."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "qwen2-tokenizer")
    size = Vocabulary.of(tokenizer).size
    shape = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "head_dim": 4}
    big, small = (tiny("qwen2", vocab_size=v, **shape) for v in (152064, 151936))
    big.lm_head.weight[size:] += 5
    patient, doctor = patient_of(big, tokenizer), doctor_of(small, vocabulary=Vocabulary.of(tokenizer))
    prompt = tokenizer("What is a cat?").input_ids
    (row,) = run(patient, [doctor], [prompt], Guidance(1.0, {"doctor": 0.5}), max_new_tokens=8)
    ids = list(prompt)
    for step in row:
        assert step.token.id < size
        mixed = (logps(big, ids, size) + 0.5 * logps(small, ids, size)).log_softmax(-1)
        assert step.token.logprob == pytest.approx(mixed[step.token.id].item(), abs=1e-9)
        ids.append(step.token.id)
    texts = tokenizer.decode(ids_of(row), skip_special_tokens=True)
    assert texts.startswith(text_of(row))  # only bytes of an unfinished character are held back


@pytest.mark.parametrize(
    ("stop", "text", "finish"),
    [
        ((), "bcdefgh", "eos"),
        (("def",), "bc", "stop"),
        (("b",), "", "stop"),
        (("bc",), "", "stop"),
        (("h",), "bcdefg", "stop"),
        (("efx", "gha"), "bcdefgh", "eos"),
        (("defx", "fg"), "bcde", "stop"),
        (("fg", "defg"), "bc", "stop"),
        (("cd", "bcde"), "b", "stop"),
    ],
)
def test_stop_strings_end_the_answer_and_are_cut(stop: tuple[str, ...], text: str, finish: str) -> None:
    """The model says "bcdefgh" and ends. No piece that belongs to a stop string is ever handed out."""
    patient = patient_of(bigram(chain("abcdefgh")))
    (row,) = run(patient, [], [[1]], Guidance(), temperature=0, stop=stop)
    assert (text_of(row), row[-1].finish) == (text, finish)


@pytest.mark.parametrize("seed", range(3))
def test_a_stopped_answer_is_the_free_one_cut(seed: int) -> None:
    """Over sampled texts of two letters (which keep beginning stop strings): the first prefix that holds one, cut."""
    table = torch.full((SIZE, SIZE), -60.0, dtype=torch.float64)
    table[:, 1:3] = 0
    patient, stops = patient_of(bigram(table)), ("aabb", "baba", "bbba")
    prompts = [[1]] * 12
    free = run(patient, [], prompts, Guidance(), seed, max_new_tokens=30)
    cut = run(patient, [], prompts, Guidance(), seed, max_new_tokens=30, stop=stops)
    for whole, stopped in zip(free, cut, strict=True):
        text = text_of(whole)
        end = next((n for n in range(31) if any(s in text[:n] for s in stops)), 30)
        expected = min((text[: text[:end].find(s)] for s in stops if s in text[:end]), key=len, default=text)
        assert text_of(stopped) == expected
        assert ids_of(stopped) == ids_of(whole)[:end]


def test_where_an_answer_ends() -> None:
    """At the end token (kept, without text), at max_new_tokens, or where the shortest context of all models is full."""
    patient = patient_of(bigram(chain("abc")))
    (row,) = run(patient, [], [[1]], Guidance(), temperature=0, max_new_tokens=9)
    assert [(s.token.id, s.token.text, s.finish) for s in row] == [(2, "b", None), (3, "c", None), (EOS, "", "eos")]
    talker = bigram(chain("a", "a"), context=20)
    (row,) = run(patient_of(talker), [], [[1]], Guidance(), temperature=0, max_new_tokens=5)
    assert [s.finish for s in row] == [None] * 4 + ["length"]
    doctor = doctor_of(bigram(chain("a", "a"), context=12))
    for doctors, room in (([], 20), ([doctor], 12)):
        guidance = Guidance(1.0, {d.name: 1.0 for d in doctors})
        rows = run(patient_of(talker), doctors, [[1] * 5, [1] * (room - 1)], guidance, temperature=0)
        assert [len(row) for row in rows] == [room - 5, 1]
        assert [row[-1].finish for row in rows] == ["length", "length"]
        for length in (room, room + 7):
            with pytest.raises(UsageError, match=rf"{length} tokens long and the models' context holds {room}"):
                run(patient_of(talker), doctors, [[1], [1] * length], guidance)


def sample_tables() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tables = [torch.full((SIZE, SIZE), -80.0, dtype=torch.float64) for _ in range(2)]
    for table in tables:
        table[:, 1:9] = 0.7 * torch.randn(SIZE, 8, generator=generator, dtype=torch.float64)
    return tables[0], tables[1]


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.6, "top_k": 4}, {"temperature": 1.7, "top_p": 0.8}, {"min_p": 0.3}],
    ids=["plain", "top-k", "top-p", "min-p"],
)
@pytest.mark.parametrize("mode", ["product", "ratio"])
def test_two_sampled_tokens_follow_the_products_distribution(mode: str, sampling: dict[str, float]) -> None:
    """Chi-square of 6000 two-token answers of bigram models, whose product is worked out from the tables alone."""
    patient_table, doctor_table = sample_tables()
    base_table = patient_table.roll(1, dims=0)
    doctor = doctor_of(bigram(doctor_table), base=bigram(base_table))
    guidance = Guidance(0.7, {"doctor": 1.3}, mode=mode, plausibility=0.2)
    patient = patient_of(bigram(patient_table))
    rows = run(patient, [doctor], [[1]] * 6000, guidance, seed=5, max_new_tokens=2, **sampling)
    counts: dict[tuple[int, int], int] = {}
    for row in rows:
        key = (row[0].token.id, row[1].token.id)
        counts[key] = counts.get(key, 0) + 1
    expected = {}
    for first, p in naive(1, patient_table, doctor_table, base_table, guidance, **sampling).items():
        for second, q in naive(first, patient_table, doctor_table, base_table, guidance, **sampling).items():
            expected[first, second] = 6000 * p * q
    assert set(counts) <= {key for key, n in expected.items() if n > 0}
    rare = {key for key, n in expected.items() if n < 5}
    cells = [(counts.get(key, 0), n) for key, n in expected.items() if key not in rare]
    if rare:
        cells.append((sum(counts.get(key, 0) for key in rare), sum(expected[key] for key in rare)))
    chi2 = sum((seen - n) ** 2 / n for seen, n in cells)
    freedom = len(cells) - 1
    assert freedom >= 3
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def naive(
    last: int,
    patient: torch.Tensor,
    doctor: torch.Tensor,
    base: torch.Tensor,
    guidance: Guidance,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> dict[int, float]:
    """{token: probability} from the definition, in plain Python: the product, then temperature and the filters."""

    def normal(weights: dict[int, float]) -> dict[int, float]:
        total = sum(weights.values())
        return {i: w / total for i, w in weights.items() if w / total > 1e-20}

    own, doc, ref = (normal({i: math.exp(x) for i, x in enumerate(t[last].tolist())}) for t in (patient, doctor, base))
    if guidance.mode == "ratio":
        kept = [i for i in own if own[i] >= guidance.plausibility * max(own.values())]
        mixed = normal({i: own[i] ** guidance.alpha * (doc[i] / ref[i]) ** guidance.betas["doctor"] for i in kept})
    else:
        mixed = normal({i: own[i] ** guidance.alpha * doc[i] ** guidance.betas["doctor"] for i in own})
    mixed = normal({i: p ** (1 / temperature) for i, p in mixed.items()})
    best = sorted(mixed, key=lambda i: -mixed[i])
    if top_k:
        mixed = normal({i: mixed[i] for i in best[:top_k]})
    if top_p < 1:
        covered = [sum(mixed[j] for j in best[:n]) for n in range(len(best))]  # mass before each token
        mixed = normal({i: mixed[i] for i, before in zip(best, covered, strict=True) if before < top_p})
    if min_p:
        mixed = normal({i: p for i, p in mixed.items() if p >= min_p * max(mixed.values())})
    return mixed


def test_guidance_is_checked_at_every_token() -> None:
    """A bad setting made while an answer runs, or a mode that the answer was not begun for, is a UsageError."""
    patient, doctor = patient_of(tiny(seed=1)), doctor_of(tiny(seed=2))
    bad: list[Callable[[], Guidance]] = [
        lambda: Guidance(1.0, {"doctor": math.nan}),
        lambda: Guidance(math.inf),
        lambda: Guidance(0.0, {"doctor": 0.0}),
        lambda: Guidance(1.0, {"nurse": 1.0}),
        lambda: Guidance(1.0, {"doctor": 1.0}, mode="ratio"),
        lambda: Guidance(1.0, {"doctor": 1.0}, mode="sum"),  # type: ignore[arg-type]
    ]
    fine = Guidance(1.0, {"doctor": 0.5})
    for changed in bad:
        now: list[Callable[[], Guidance]] = [lambda: fine]
        steps: Iterator[Step] = decode(
            patient, {"doctor": doctor}, [[1, 2]], lambda now=now: now[0](), Sampling(), seed=0
        )
        next(steps)
        now[0] = changed
        with pytest.raises(UsageError):
            next(steps)
        with pytest.raises(UsageError):
            list(decode(patient, {"doctor": doctor}, [[1, 2]], changed, Sampling(), seed=0))


@pytest.mark.parametrize("mode", ["product", "ratio"])
def test_a_guidance_without_the_patient_still_draws_only_tokens(mode: str) -> None:
    """Alpha 0, and in mode "ratio" no plausibility cut either: padding and unused ids stay impossible."""
    hole = 13
    tokenizer = char_tokenizer({token: i for token, i in char_tokenizer().get_vocab().items() if i != hole})
    doctor = doctor_of(tiny(seed=2), vocabulary=Vocabulary.of(tokenizer), base=tiny(seed=3))
    guidance = Guidance(0.0, {"doctor": 0.01}, mode=mode, plausibility=0.0)
    rows = run(patient_of(tiny(seed=1), tokenizer), [doctor], [[1]] * 400, guidance, max_new_tokens=1)
    assert hole not in {row[0].token.id for row in rows}


def test_log_probs_that_are_not_numbers_end_the_answer_with_a_word() -> None:
    """Half precision overflows in some models: better an error than the tokens that NaN happens to give."""
    broken = tiny(seed=1)
    broken.lm_head.weight[7] = math.nan
    with pytest.raises(LoadError, match="not numbers"):
        run(patient_of(tiny(seed=2)), [doctor_of(broken)], [[1]], Guidance(1.0, {"doctor": 0.5}))
    with pytest.raises(LoadError, match="not numbers"):
        run(patient_of(broken), [], [[1]], Guidance(), temperature=0)
