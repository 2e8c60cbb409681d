"""How fast guided decoding is: ``patient.generate``, the usual way to guide it, and the two paths of this project.

    python benchmarks/decode.py                                  # the embedded clinic, batches of 1, 8 and 32
    python benchmarks/decode.py --models clinic,stories,qwen --cache outputs/bench-models --train-seconds 150
    python benchmarks/decode.py --models qwen-7b --acceptance 0.6,0.7,0.8,0.9 --tokens 400   # on a GPU

All ways answer the same prompts in one run, alternately, after a warm-up. Figures are medians over the repeats (least,
greatest); every ratio is taken within one repeat. Tokens are counted up to and including the end token. ``--clock cpu``
measures the CPU time of this process instead of wall time: use it with one thread on a machine that others use too.

``stories`` is a real Llama of 260,000 parameters with a one-layer doctor. ``qwen`` is a Qwen2-shaped patient of 61
million parameters with a doctor of 6 million, over Qwen2's real vocabulary. Models that do not exist yet are trained
from scratch for ``--train-seconds`` each and kept in ``--cache``. The stories doctor learns from stories that its
patient generates. Both Qwen2 models learn from the same HH-RLHF text, so they agree as far as two models of the same
text do. Only the 4096 most frequent tokens of that text are trained; all others share one embedding with a low logit.

``smollm2`` is the profile of that name: its doctors are heads on the patient, which nothing but the patient's forward
has to be run for. ``--draft-model`` adds a row in which that model drafts.

``qwen-7b`` has the shapes of Qwen2.5-7B and Qwen2.5-1.5B in bfloat16 with random weights, so doctor and patient never
agree. ``--acceptance`` accepts drafted tokens at random instead, while everything is still computed. On a GPU two more
rows show how close the speed is to the limit: the time to read the patient's weights at the measured bandwidth, and the
prompt's share of the peak (MFU).
"""

import argparse
import gzip
import json
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llmdoctor import Guidance, LLMdoctor, Sampling
from llmdoctor.decoding import batch as loop
from llmdoctor.decoding import drafting as speculative
from llmdoctor.decoding import ensemble
from llmdoctor.decoding.caches import BACKENDS
from llmdoctor.decoding.decode import decode
from llmdoctor.decoding.int8 import FIRST, INT8, int8_copy
from llmdoctor.decoding.product import product
from llmdoctor.decoding.round import Place
from llmdoctor.models import Patient, load_lm, load_patient, pick_device
from llmdoctor.profiles.clinic_world import held_out_questions
from llmdoctor.text import conversation, prompt_ids
from llmdoctor.training.folder import LoadedDoctor

DATA = Path(__file__).parents[2] / "shared" / "data"
PEAK = 989e12  # bfloat16 operations per second of an H200, dense, according to its data sheet
Case = tuple[Patient, dict[str, LoadedDoctor], Guidance, list[list[int]]]
Way = Callable[[list[list[int]], int], int]  # (prompts, seed) -> tokens drawn


class Guided(LogitsProcessor):
    """The usual way to guide ``generate``: a processor that runs the doctors, with KV caches, at every step."""

    def __init__(self, doctors: dict[str, LoadedDoctor], guidance: Guidance, pads: int, vocabulary: int) -> None:
        self.models = {name: doctor.model for name, doctor in doctors.items()}
        self.bases = {name: doctor.base for name, doctor in doctors.items() if guidance.mode == "ratio" and doctor.base}
        self.guidance, self.pads, self.vocabulary = guidance, pads, vocabulary
        self.caches: dict[PreTrainedModel, Any] = {}
        self.mask: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] of the product."""
        if self.mask is None:
            self.mask = (input_ids != self.pads).long()
            fresh = input_ids  # the prompts
        else:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
            fresh = input_ids[:, -1:]
        size = self.vocabulary
        said: dict[PreTrainedModel, Tensor] = {}
        for model in dict.fromkeys([*self.models.values(), *self.bases.values()]):
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
            out = model(
                input_ids=fresh,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.caches.get(model),
                use_cache=True,
                logits_to_keep=1,
            )
            self.caches[model] = out.past_key_values
            said[model] = out.logits[:, -1, :size].log_softmax(-1)
        doctors, bases = ({name: said[m] for name, m in models.items()} for models in (self.models, self.bases))
        mixed = product(scores[:, :size].log_softmax(-1), doctors, self.guidance, bases)
        return torch.nn.functional.pad(mixed, (0, scores.shape[1] - size), value=-torch.inf)


def generator(
    model: PreTrainedModel, patient: Patient, tokens: int, how: Sampling, pad: int, guide: Any = None, **more: Any
) -> Way:
    """``model.generate`` on a left-padded batch."""
    ends = sorted(patient.eos_ids)

    def run(prompts: list[list[int]], seed: int) -> int:
        torch.manual_seed(seed)
        longest = max(map(len, prompts))
        device = model.device
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        sampled = {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k}
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=tokens,
            pad_token_id=pad,
            eos_token_id=ends or None,
            logits_processor=LogitsProcessorList([guide()]) if guide else None,
            **(sampled if how.temperature else {"do_sample": False}),
            **more,
        )
        count = 0
        for row in out[:, longest:].tolist():
            end = next((i for i, token in enumerate(row) if token in patient.eos_ids), len(row) - 1)
            count += end + 1
        return count

    return run


class Counting(speculative.AdaptiveLength):
    """The library's own choice of draft lengths, which also counts totals."""

    def __init__(self, first: int = 1) -> None:
        super().__init__(first)
        self.total_accepted = self.total_tested = self.rounds = 0
        self.lengths: Counter[int] = Counter()

    def record(self, rows: int, slots: int, length: int, accepted: int, tested: int, seconds: float) -> None:
        """See ``Drafting``."""
        super().record(rows, slots, length, accepted, tested, seconds)
        self.total_accepted += accepted
        self.total_tested += tested
        self.rounds += rows
        self.lengths[length] += 1


class Fixed(Counting):
    """A fixed draft length, which also counts totals."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def choose(self, rows: int) -> int:
        """See ``Drafting``."""
        return self.length


def ours(case: Case, how: Sampling, drafting: speculative.Drafting | None, **more: Any) -> Way:
    """The project's own decoder, with all the numbers that it yields for every token."""
    patient, doctors, guidance, _ = case

    def run(prompts: list[list[int]], seed: int) -> int:
        steps = decode(patient, doctors, prompts, lambda: guidance, how, seed=seed, drafting=drafting, **more)
        return sum(1 for _ in steps)

    return run


@contextmanager
def parts(patient: Patient, now: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds of each part while the context is open: the forwards of patient and doctors, and combining log-probs."""
    # One part may call another. ``inside`` adds up the time of finished parts, so that none is counted twice.
    spent: dict[str, float] = Counter()
    inside = 0.0
    backend = BACKENDS[patient.model.device.type]
    feed, draw_round, draw_rows = backend.feed, loop.draw_round, ensemble.draw_rows

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            nonlocal inside
            began, before = now(), inside
            result = call(*args, **more)
            own = now() - began - (inside - before)
            inside += own
            key = name or ("patient" if args[0].model is patient.model else "doctors")
            spent[key] += own
            return result

        return run

    backend.feed = timed("", feed)  # type: ignore[method-assign]
    loop.draw_round = timed("combining", draw_round)
    ensemble.draw_rows = timed("combining", draw_rows)
    began = now()
    try:
        yield spent
    finally:
        backend.feed, loop.draw_round, ensemble.draw_rows = feed, draw_round, draw_rows  # type: ignore[method-assign]
        spent["Python"] = now() - began - sum(spent.values())


def clinic(device: str, names: Sequence[str]) -> Case:
    loaded = LLMdoctor.from_profile("clinic", device=device)
    doctors = {name: loaded._doctors[name] for name in names}
    prompts = [prompt_ids(loaded.patient.tokenizer, conversation(q)) for q in held_out_questions(64)]
    zones = {name: loaded.guidance.dead_zones[name] for name in names}
    guidance = loaded.guidance.replace(betas={name: loaded.beta[name] for name in names}, dead_zones=zones)
    return loaded.patient, doctors, guidance, prompts


def smollm2(device: str, dtype: str) -> Case:
    loaded = LLMdoctor.from_profile("smollm2", device=device, dtype=dtype, draft_model=None)
    questions = [
        "How can I sleep better?",
        "What is a good first job?",
        "Tell me about the sea.",
        "How do I save money?",
    ]
    prompts = [prompt_ids(loaded.patient.tokenizer, conversation(q)) for q in questions]
    return loaded.patient, loaded._doctors, loaded.guidance, prompts


def small_doctor(model: PreTrainedModel, patient: Patient) -> LoadedDoctor:
    """A plain model as a doctor whose value head is zero."""
    width = model.get_output_embeddings().in_features
    zeros = torch.zeros(1, width, device=model.device, dtype=model.dtype)
    return LoadedDoctor("doctor", model, zeros, zeros[0, :1], False, patient.vocabulary, None, {})


def trained(model: PreTrainedModel, ids: Tensor, seconds: float, rate: float) -> None:
    """Train on random windows of ``ids`` for this many seconds."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01)
    window, rows = 128, 8
    began, step, loss = time.monotonic(), 0, torch.zeros(())
    while (spent := time.monotonic() - began) < seconds:
        starts = torch.randint(len(ids) - window, (rows,)).tolist()
        batch = torch.stack([ids[start : start + window] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * max(0.1, 1 - spent / seconds)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
    print(f"  trained {step} steps of {rows * window} tokens, loss {loss.item():.2f}", file=sys.stderr)


def widened(small: PreTrainedModel, full: PreTrainedModel, kept: Tensor, ids: Tensor) -> PreTrainedModel:
    """The weights of ``small``, whose tokens are ``kept``, in a model with the vocabulary of ``full``.

    All other tokens share one embedding that gives them a logit of -12 in the mean state: they are hardly ever drawn.
    """
    with torch.no_grad():
        mean_H = small.base_model(input_ids=ids[None, :512]).last_hidden_state[0].mean(dim=0)
        table = full.get_input_embeddings().weight
        table[:] = -12 * mean_H / mean_H.dot(mean_H)
        table[kept] = small.get_input_embeddings().weight
        own = full.state_dict()
        own.update({k: v for k, v in small.state_dict().items() if v.shape == own[k].shape})
        full.load_state_dict(own)
    return full


def made(folder: Path, make: Callable[[], PreTrainedModel]) -> Path:
    """The folder of a model, made first if it does not exist."""
    if not (folder / "config.json").is_file():
        print(f"making {folder}", file=sys.stderr)
        model = make()
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
    return folder


def stories(device: str, cache: Path, seconds: float) -> Case:
    patient = load_patient(DATA / "stories260k", device=device)

    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        opening = torch.tensor([patient.tokenizer("Once upon a time").input_ids] * 64, device=patient.model.device)
        generated = patient.model.generate(opening, do_sample=True, max_new_tokens=250, pad_token_id=0).cpu()
        config = patient.model.config.to_dict() | {"num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(**config))
        trained(model, generated.flatten(), seconds, 3e-3)
        return model

    doctor = load_lm(made(cache / "stories-doctor", make), device=device)
    openings = (
        "Once upon a time, there was a little dog",
        "Lily and Tom went to the park",
        "The sun was",
        "One day, a boy",
    )
    prompts = [list(patient.tokenizer(text).input_ids) for text in openings]
    return patient, {"doctor": small_doctor(doctor, patient)}, Guidance(1.0, {"doctor": 0.8}), prompts


def qwen(device: str, cache: Path, seconds: float) -> Case:
    tokenizer = AutoTokenizer.from_pretrained(DATA / "qwen2-tokenizer")
    with gzip.open(DATA / "hh-rlhf" / "harmless-base_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["chosen"].strip() for line in lines]
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    answers = [[*tokenizer(text).input_ids, end] for text in texts]
    often = Counter(i for answer in answers for i in answer).most_common(4096)
    kept = torch.tensor(sorted(i for i, _ in often))
    place = {i: at for at, i in enumerate(kept.tolist())}
    ids = torch.tensor([place[i] for answer in answers for i in answer if i in place])

    def make(hidden: int, layers: int, heads: int) -> Callable[[], PreTrainedModel]:
        def shape(vocabulary: int) -> Qwen2Config:
            return Qwen2Config(
                vocab_size=vocabulary,
                hidden_size=hidden,
                intermediate_size=4 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=1,
                max_position_embeddings=2048,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )

        def build() -> PreTrainedModel:
            torch.manual_seed(0)
            small, full = Qwen2ForCausalLM(shape(len(kept))), Qwen2ForCausalLM(shape(151936))
            trained(small, ids, seconds, 2e-3)
            return widened(small, full, kept, ids)

        return build

    lms = [
        load_lm(made(cache / f"qwen-{name}", make(*shape)), device=device)
        for name, shape in (("patient", (320, 8, 5)), ("doctor", (40, 2, 2)))
    ]
    patient = Patient(lms[0], tokenizer, "qwen-shaped 61M")
    assert patient.vocabulary.size <= 151936
    prompts = [tokenizer(text[: text.index("Assistant:") + 10]).input_ids for text in texts[:64]]
    prompts = [[i for i in prompt if i in place][-96:] for prompt in prompts]
    return patient, {"doctor": small_doctor(lms[1], patient)}, Guidance(1.0, {"doctor": 0.8}), prompts


def qwen_7b(device: str) -> Case:
    where = pick_device(device)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "qwen2-tokenizer")

    def shaped(rows: int, hidden: int, inner: int, heads: int, groups: int, *, tied: bool) -> PreTrainedModel:
        config = Qwen2Config(
            vocab_size=rows,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=28,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            max_position_embeddings=32768,
            rope_theta=1e6,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        with torch.device(where):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)

    patient = Patient(shaped(152064, 3584, 18944, 28, 4, tied=False), tokenizer, "Qwen2.5-7B's shapes")
    doctor = small_doctor(shaped(151936, 1536, 8960, 12, 2, tied=True), patient)
    prompts = [[(7919 * i + 31 * j) % 100_000 for j in range(200)] for i in range(64)]
    return patient, {"doctor": doctor}, Guidance(1.0, {"doctor": 0.8}), prompts


@contextmanager
def accepting(share: float | None) -> Iterator[None]:
    """While the context is open, a drafted token is accepted with this probability; everything is still computed."""
    draw_round, luck = loop.draw_round, random.Random(0)

    def at_random(round_: Any, *args: Any, **more: Any) -> list[list[Place]]:
        rows = []
        for drafts, places in zip(round_.drafts_B_K.tolist(), draw_round(round_, *args, **more), strict=True):
            count = next((i for i in range(len(drafts)) if luck.random() >= share), len(drafts))
            # All places get the numbers of the first: only the ids and how many are accepted are made up.
            numbers = places[0]
            values = dict.fromkeys(round_.values_B_K, 0.0)
            ids = [*drafts[:count], places[-1].drawn.id]
            made = [replace(numbers, drawn=replace(numbers.drawn, id=i), drafted=True, values=values) for i in ids]
            rows.append([*made[:-1], replace(made[-1], drafted=False)])
        return rows

    if share is not None:
        loop.draw_round = at_random
    try:
        yield
    finally:
        loop.draw_round = draw_round


def limits(name: str, case: Case, rates: dict[str, list[float]]) -> Iterator[str]:
    """How close a GPU is to its limits: reading the patient's weights once per token, and ``PEAK`` for the prompt."""
    patient, device = case[0], case[0].model.device
    block = torch.empty(1 << 32, dtype=torch.uint8, device=device)

    def seconds(call: Callable[[], Any]) -> float:
        times = []
        for _ in range(6):
            torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    bandwidth = 2 * len(block) / seconds(block.clone)
    table = patient.model.get_input_embeddings().weight
    head = patient.model.get_output_embeddings().weight
    read = sum(p.numel() * p.element_size() for p in patient.model.parameters())
    read -= 0 if head is table else table.numel() * table.element_size()
    limit = bandwidth / read
    shares = ", ".join(f"{way} {statistics.median(rate) / limit:.2f}" for way, rate in rates.items())
    bound = f"limit: {read / 1e9:.2f} GB at {bandwidth / 1e12:.2f} TB/s"
    yield f"| {name} | 1 | {bound} | {limit:.1f} | | of it: {shares} |"
    ids = torch.randint(0, 100_000, (1, 4096), device=device)
    with torch.inference_mode():
        spent = seconds(lambda: patient.model(input_ids=ids, logits_to_keep=1))
    flops = 2 * 4096 * sum(p.numel() for p in patient.model.base_model.layers.parameters())
    share = f"MFU {flops / spent / PEAK:.2f} (attention not counted)"
    yield f"| {name} | 1 | prompt of 4096 tokens | {4096 / spent:.0f} | | {share} |"


def measure(name: str, case: Case, how: Sampling, args: argparse.Namespace) -> Iterator[str]:
    """Markdown rows of one patient and its doctors."""
    patient, doctors, guidance, prompts = case
    device = patient.model.device
    pad = patient.tokenizer.pad_token_id
    if pad is None:
        pad = 0
    tokens = how.max_new_tokens

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if args.clock == "cpu" else time.perf_counter()

    def guide() -> Guided:
        return Guided(doctors, guidance, pad, patient.vocabulary.size)

    for size in args.batch:
        first = next(iter(doctors.values())).model
        ways: dict[str, Way] = {
            "patient.generate": generator(patient.model, patient, tokens, how, pad),
            "patient.generate, static cache": generator(
                patient.model,
                patient,
                tokens,
                how,
                pad,
                cache_implementation="static",
                disable_compile=device.type != "cuda",
            ),
            "doctor.generate": generator(first, patient, tokens, how, pad),
            "generate + LogitsProcessor": generator(patient.model, patient, tokens, how, pad, guide),
            "reference path": ours(case, how, None),
        }
        heads = all(doctor.model is patient.model for doctor in doctors.values())
        if heads:  # no model of their own, and the processor knows no heads
            del ways["doctor.generate"], ways["generate + LogitsProcessor"]
        own = args.draft_model == INT8
        drafting = {"speculative path": Counting(FIRST if own else 1) if args.length is None else Fixed(args.length)}
        more: dict[str, Any] = {}
        if args.draft_model:
            more["draft_model"] = int8_copy(patient.model) if own else load_lm(args.draft_model, device=args.device)
        elif heads:
            drafting = {}
        shares: list[float | None] = [None]
        if args.acceptance:
            shares = [float(share) for share in args.acceptance.split(",")] if drafting else []
            drafting = {f"speculative path, {share:g} accepted at random": Counting() for share in shares}
        for (way, counting), share in zip(drafting.items(), shares[: len(drafting)], strict=True):
            ways[way] = accepting(share)(ours(case, how, counting, **more))
        asked = [[prompts[(r * size + i) % len(prompts)] for i in range(size)] for r in range(args.repeats + 1)]
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for repeat, batch in enumerate(asked):
            for way, run in list(ways.items()):
                began = now()
                try:
                    count = run(batch, repeat)
                except Exception as error:
                    if "static" not in way:
                        raise
                    print(f"{name}: no static cache: {error}", file=sys.stderr)
                    del ways[way], rates[way]
                    continue
                if repeat:  # the first is the warm-up
                    rates[way].append(count / (now() - began))
            print(f"{name}, batch {size}: {repeat} of {args.repeats}", file=sys.stderr, end="\r")
        print(file=sys.stderr)
        for way, rate in rates.items():
            ratio = [own / alone for own, alone in zip(rate, rates["patient.generate"], strict=True)]
            note = ""
            if way == "reference path" and not heads:
                bases = {doctor.base for doctor in doctors.values()} if guidance.mode == "ratio" else set()
                # The limit of the plain path: all models one after another, each as fast as it generates by itself.
                small = len(doctors) + len(bases)  # a base is as large as its doctor
                sums = [
                    1 / (1 / p + small / d)
                    for p, d in zip(rates["patient.generate"], rates["doctor.generate"], strict=True)
                ]
                of_sum = statistics.median(own / both for own, both in zip(rate, sums, strict=True))
                usual = rates["generate + LogitsProcessor"]
                of_usual = statistics.median(own / other for own, other in zip(rate, usual, strict=True))
                note = f"{of_sum:.2f} of 1 / (1/patient + {small}/doctor), {of_usual:.2f} of the processor's speed"
            if (speculating := drafting.get(way)) and speculating.rounds:
                drawn = 1 + speculating.total_accepted / speculating.rounds
                often = ", ".join(str(k) for k, _ in speculating.lengths.most_common(2))
                accepted = speculating.total_accepted / max(1, speculating.total_tested)
                note = f"acceptance {accepted:.3f}, {drawn:.2f} tokens per patient forward, drafts mostly of {often}"
            yield f"| {name} | {size} | {way} | {spread(rate, '.1f')} | {spread(ratio, '.2f')} | {note} |"
        for way in ("reference path", *drafting):
            with parts(patient, now) as spent:
                count = sum(ways[way](batch, 100 + r) for r, batch in enumerate(asked[1:]))
            total = sum(spent.values())
            times = ", ".join(f"{part} {1e3 * s / count:.2f} ms ({s / total:.0%})" for part, s in spent.items())
            yield f"| {name} | {size} | {way}, time per token | | | {times} |"
        if device.type == "cuda" and size == 1:
            yield from limits(name, case, rates)


def spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    return (
        f"{name}, {torch.get_num_threads()} of {os.cpu_count()} CPU threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="clinic", help="of clinic, clinic-one, stories, qwen, qwen-7b, smollm2")
    parser.add_argument("--batch", default="1,8,32", help="batch sizes, with commas")
    parser.add_argument("--tokens", type=int, default=120, help="longest answer")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--length", type=int, help="always draft this many tokens (default: adaptive)")
    parser.add_argument("--acceptance", help="accept these shares of the drafted tokens, at random; with commas")
    parser.add_argument("--draft-model", help="drafts in place of a doctor: int8, or a model")
    parser.add_argument("--dtype", default="auto", help="of smollm2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument(
        "--cache", type=Path, default=Path("outputs/bench-models"), help="where trained models are kept"
    )
    parser.add_argument("--train-seconds", type=float, default=150.0, help="for each model that is trained")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    args.batch = [int(size) for size in args.batch.split(",")]
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    how = Sampling(temperature=args.temperature, top_p=args.top_p, max_new_tokens=args.tokens)
    makers: dict[str, Callable[[], Case]] = {
        "clinic": lambda: clinic(args.device, ("helpful", "safe")),
        "clinic-one": lambda: clinic(args.device, ("helpful",)),
        "stories": lambda: stories(args.device, args.cache, args.train_seconds),
        "qwen": lambda: qwen(args.device, args.cache, args.train_seconds),
        "qwen-7b": lambda: qwen_7b(args.device),
        "smollm2": lambda: smollm2(args.device, args.dtype),
    }
    clock = "this process's CPU time" if args.clock == "cpu" else "wall time"
    lines = [
        f"`python {' '.join(sys.argv)}`",
        "",
        f"{machine(pick_device(args.device))}; {clock}; medians of {args.repeats} (least–greatest).",
        "",
        "| models | batch | way | tokens/s | times patient.generate | |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name in args.models.split(","):
        for line in measure(name, makers[name](), how, args):
            lines.append(line)
            print(line, flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
