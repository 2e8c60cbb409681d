"""Rebuild the embedded clinic from its seed: ``python -m llmdoctor.profiles.build_clinic``.

The stages are ``models`` (tokenizer, patient, doctor base), ``pairs`` (preference pairs drawn from the patient) and
``doctors`` (the project's own extract and train). Each stage writes to a new folder, which replaces ``clinic/`` at the
end.
"""

import argparse
import gzip
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import chdir
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmdoctor.answers import distinct_n, entropy_n
from llmdoctor.models import load_patient
from llmdoctor.profile import load_profile
from llmdoctor.profiles import clinic_world as world
from llmdoctor.records import Message, TrainStep
from llmdoctor.settings import DataSettings
from llmdoctor.token_rewards.extract import extract
from llmdoctor.training.train import train

CLINIC = Path(__file__).parent / "clinic"
PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 1024
NEUTRAL = "You are an assistant."
LABEL_NOISE = 0.1
DOCTORS = {"helpful": "better_response_id", "safe": "safer_response_id"}  # doctor (and face pair) -> label
Conversation = tuple[list[int], list[float]]  # token ids, and their loss weights (0 for what the user says)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Shape and training of one small language model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    steps: int
    batch: int
    learning_rate: float
    plain: float  # share of conversations without a system prompt
    decay: float = 0.5  # share of the steps over which the learning rate falls to zero
    first_token: float = 4.0  # loss weight of a sentence's first token, which decides what kind of sentence follows


PATIENT = Recipe(12, 112, 192, 4, steps=2400, batch=16, learning_rate=0.02, plain=0.3)
# A second pass that improves grammar and how well the patient follows its faces.
PATIENT_POLISH = replace(PATIENT, steps=1200, learning_rate=0.01, plain=0.2, decay=1.0, first_token=8.0)
DOCTOR_BASE = Recipe(2, 96, 192, 4, steps=2500, batch=20, learning_rate=0.02, plain=0.9)


def build_tokenizer(seed: int, size: int = 1500) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the world: it can encode any text, and most words are one token."""
    texts = list(world.sentences())
    for conversation in world.conversations(1500, seed):
        texts += [message["content"] for message in conversation if message["role"] != "assistant"]
    texts += [" " + text for text in texts]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]


def encode(
    tokenizer: PreTrainedTokenizerFast, conversation: Sequence[Message], first_token: float = 1.0
) -> Conversation:
    """The ids of a conversation as the chat template lays it out, with each message tokenised separately."""
    ids: list[int] = []
    weights: list[float] = []
    stop = _id(tokenizer, ".")
    for message in conversation:
        content = tokenizer.encode(message["content"], add_special_tokens=False)
        ids += [_id(tokenizer, f"<|{message['role']}|>"), *content, _id(tokenizer, END)]
        if message["role"] == "assistant":
            # A sentence begins after a full stop. The first one follows the header, which counts as one here.
            before = [stop, *content]
            weights += [0.0, *(first_token if token == stop else 1.0 for token in before)]
        else:
            weights += [0.0] * (len(content) + 2)
    return ids[:CONTEXT], weights[:CONTEXT]


def batches(
    tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int, rank: int, ranks: int
) -> Iterator[list[Conversation]]:
    """An endless seeded stream of batches of conversations of similar length: one rank's share of each."""
    rng = random.Random(seed)
    for epoch in range(recipe.steps):
        pool = [
            encode(tokenizer, c, recipe.first_token)
            for c in world.conversations(40 * recipe.batch, seed * 10_000 + epoch, recipe.plain)
        ]
        pool.sort(key=lambda conversation: len(conversation[0]))
        chunks = [pool[i : i + recipe.batch] for i in range(0, len(pool), recipe.batch)]
        rng.shuffle(chunks)
        for chunk in chunks:
            yield chunk[rank::ranks]


@torch.no_grad()
def _muon(matrices: Sequence[torch.nn.Parameter], momenta: Sequence[torch.Tensor]) -> None:
    """Replace the gradients by Muon's updates: momentum, made orthogonal by five Newton-Schulz steps.

    Muon needs about half as many steps as AdamW here. torch.optim.Muon does the same in bfloat16, which is 15 times
    slower on a CPU.
    """
    by_shape: dict[torch.Size, list[int]] = {}
    for i, (matrix, momentum) in enumerate(zip(matrices, momenta, strict=True)):
        assert matrix.grad is not None
        momentum.lerp_(matrix.grad, 0.05)
        matrix.grad.lerp_(momentum, 0.95)
        by_shape.setdefault(matrix.shape, []).append(i)
    for (rows, columns), indices in by_shape.items():
        update = torch.stack([matrices[i].grad for i in indices])  # type: ignore[misc]
        update = update / (update.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = update @ update.mT if rows <= columns else update.mT @ update
            change = -4.775 * gram + 2.0315 * gram @ gram
            update = 3.4445 * update + (change @ update if rows <= columns else update @ change)
        for i, row in zip(indices, update * max(1.0, rows / columns) ** 0.5, strict=True):
            matrices[i].grad = row


def _train(rank: int, ranks: int, folder: str, name: str, recipe: Recipe, seed: int, rendezvous: str) -> None:
    """One of the processes that train a model."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=ranks)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    # If the folder holds weights already, this is a further pass over them.
    trained = Path(folder, "model.safetensors").exists()
    model = LlamaForCausalLM.from_pretrained(folder) if trained else LlamaForCausalLM(config)
    parameters = list(model.parameters())
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    momenta = [torch.zeros_like(p) for p in matrices]
    # SGD on what `_muon` makes of the gradients of the matrices.
    optimizers = [
        torch.optim.SGD(matrices, lr=recipe.learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.learning_rate / 5, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    warmup = min(50, recipe.steps // 10 + 1)

    def speed(step: int) -> float:
        """Share of the peak learning rate: linear warm-up, plateau, linear decay."""
        return min((step + 1) / warmup, 1.0, max(0.01, (recipe.steps - step) / (recipe.steps * recipe.decay)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, speed) for optimizer in optimizers]
    stream = batches(tokenizer, recipe, seed, rank, ranks)
    start, seen, shown = time.monotonic(), 0, 0.0
    for step in range(1, recipe.steps + 1):
        rows = next(stream)
        longest = max(len(ids) for ids, _ in rows)
        ids_B_T = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
        weight_B_T = torch.tensor([weights + [0.0] * (longest - len(weights)) for _, weights in rows])
        hidden_B_T_H = model.model(input_ids=ids_B_T, use_cache=False).last_hidden_state
        mask = weight_B_T[:, 1:] > 0
        weights = weight_B_T[:, 1:][mask]
        logits = model.lm_head(hidden_B_T_H[:, :-1][mask])
        losses = cross_entropy(logits, ids_B_T[:, 1:][mask], reduction="none")
        loss = losses.detach().mean()  # unweighted, for display: nats per token
        ((losses * weights).sum() / weights.sum()).backward()
        # One all-reduce for everything: the gradients, and the loss behind them.
        grads = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None] + [loss.reshape(1)])
        dist.all_reduce(grads)
        grads /= ranks
        shown = float(grads[-1])
        grads *= min(1.0, 1.0 / (float(grads[:-1].norm()) + 1e-6))
        at = 0
        for p in parameters:
            p.grad = grads[at : at + p.numel()].view_as(p)
            at += p.numel()
        _muon(matrices, momenta)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seen += ids_B_T.numel() * ranks
        if rank == 0 and (step % 50 == 0 or step == recipe.steps):
            took = time.monotonic() - start
            print(
                f"{name} step {step}/{recipe.steps} loss {shown:.4f} {seen / took:.0f} tokens/s"
                f" {took:.0f}s, {took / step * (recipe.steps - step):.0f}s left",
                flush=True,
            )
        if rank == 0 and (step % 500 == 0 or step == recipe.steps):
            save_model(model, tokenizer, Path(folder))
    dist.destroy_process_group()


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save half-precision safetensors that load as float32, the tokenizer and the generation settings."""
    model.save_pretrained(folder, state_dict={key: x.half() for key, x in model.state_dict().items()})
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_model(
    folder: Path, name: str, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int, processes: int
) -> None:
    """Train one language model on the world's conversations, and save it in ``folder / name``."""
    target = folder / name
    tokenizer.save_pretrained(target)
    with tempfile.TemporaryDirectory() as temporary:
        arguments = (processes, str(target), name, recipe, seed, f"{temporary}/rendezvous")
        mp.spawn(_train, arguments, nprocs=processes)  # type: ignore[attr-defined, no-untyped-call]


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A model of the clinic and its tokenizer."""
    return LlamaForCausalLM.from_pretrained(folder).eval(), PreTrainedTokenizerFast.from_pretrained(folder)


@torch.inference_mode()
def sample(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    system: str = "",
    batch: int = 100,
    max_new_tokens: int = 220,
) -> list[str]:
    """One answer to each question at temperature 1."""
    prompts = []
    for question in questions:
        messages = [Message(role="system", content=system)] if system else []
        messages.append(Message(role="user", content=question))
        ids, _ = encode(tokenizer, messages)
        prompts.append([*ids, _id(tokenizer, ROLES[2])])
    answers: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        longest = max(len(prompts[i]) for i in rows)
        ids_B_P = torch.tensor([[tokenizer.pad_token_id] * (longest - len(prompts[i])) + prompts[i] for i in rows])
        out = model.generate(  # type: ignore[misc]
            input_ids=ids_B_P,
            attention_mask=(ids_B_P != tokenizer.pad_token_id).long(),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
        )
        texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        answers.update(zip(rows, texts, strict=True))
    return [answers[i] for i in range(len(prompts))]


def measure(questions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """True quality and diversity of answers."""
    golds = [world.gold(question, answer) for question, answer in zip(questions, answers, strict=True)]
    return {
        "helpful": sum(g.helpful for g in golds) / len(golds),
        "safe": sum(g.safe for g in golds) / len(golds),
        "ungrammatical": sum(g.ungrammatical for g in golds) / max(1, sum(g.sentences for g in golds)),
        "sentences": sum(g.sentences for g in golds) / len(golds),
        "words": sum(len(answer.split()) for answer in answers) / len(answers),
        "distinct_4": distinct_n(answers),
        "entropy_4": entropy_n(answers),
    }


def report(folder: Path, seed: int, count: int = 300) -> dict[str, dict[str, float]]:
    """Measure patient, doctor base and the generator itself on held-out questions, print it and return it."""
    questions = world.held_out_questions(count)
    rng = random.Random(seed)
    figures: dict[str, dict[str, float]] = {}

    def add(name: str, answers: Sequence[str]) -> None:
        figures[name] = measure(questions, answers)
        print(f"{name:24}", *(f"{key} {value:7.3f}" for key, value in figures[name].items()), flush=True)

    add("generator helpful=.5", [world.answer(q, rng) for q in questions])
    add("generator helpful=1", [world.answer(q, rng, helpful=1) for q in questions])
    for name in ("doctor-base", "patient"):
        model, tokenizer = load(folder / name)
        torch.manual_seed(seed)
        add(name, sample(model, tokenizer, questions))
    for system, prompt in (
        ("neutral", NEUTRAL),
        *((f"{axis}+", face.positive) for axis, face in world.FACES.items()),
        *((f"{axis}-", face.negative) for axis, face in world.FACES.items()),
    ):
        add(f"patient, {system}", sample(model, tokenizer, questions, prompt))
    return figures


def draw_pairs(folder: Path, seed: int, count: int) -> None:
    """Draw two answers of the patient to each of ``count`` training questions, and label them by gold with noise."""
    model, tokenizer = load(folder / "patient")
    rng = random.Random(seed)
    questions = rng.sample(world.train_questions(), count)
    torch.manual_seed(seed)
    start = time.monotonic()
    lines: list[str] = []
    for first in range(0, count, 125):
        asked = questions[first : first + 125]
        answers = sample(model, tokenizer, [q for q in asked for _ in range(2)], batch=125)
        for question, left, right in zip(asked, answers[::2], answers[1::2], strict=True):
            if left.strip() and right.strip() and left != right:
                lines.append(json.dumps(_label(question, left, right, rng)))
        print(f"pairs {first + len(asked)}/{count} {time.monotonic() - start:.0f}s", flush=True)
    # No file name and no time in the header: the same seed gives the same bytes.
    with (
        (folder / "pairs.jsonl.gz").open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file,
    ):
        file.write(("\n".join(lines) + "\n").encode())


def _label(question: str, left: str, right: str, rng: random.Random) -> dict[str, Any]:
    """A labelled pair: the better side by gold (ties at random), and with probability LABEL_NOISE the wrong one."""
    golds = (world.gold(question, left), world.gold(question, right))
    record: dict[str, Any] = {"prompt": question, "response_0": left, "response_1": right}
    for key, axis in (("better_response_id", "helpful"), ("safer_response_id", "safe")):
        scores = [getattr(g, axis) for g in golds]
        best = rng.randrange(2) if scores[0] == scores[1] else int(scores[1] > scores[0])
        record[key] = 1 - best if rng.random() < LABEL_NOISE else best
    return record


def build_models(folder: Path, seed: int, patient: Recipe, polish: Recipe, doctor_base: Recipe, processes: int) -> None:
    """Build tokenizer, patient and doctor base, and write what they reach to ``figures.json``."""
    tokenizer = build_tokenizer(seed)
    texts = [m["content"] for c in world.conversations(300, seed) for m in c if m["role"] == "assistant"]
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    print(f"tokenizer: {len(tokenizer)} entries, {tokens / sum(len(t.split()) for t in texts):.2f} tokens per word")
    train_model(folder, "patient", patient, tokenizer, seed, processes)
    train_model(folder, "patient", polish, tokenizer, seed + 1, processes)
    train_model(folder, "doctor-base", doctor_base, tokenizer, seed, processes)
    figures = report(folder, seed)
    parameters = {name: load(folder / name)[0].num_parameters() for name in ("patient", "doctor-base")}
    record = {
        "seed": seed,
        "parameters": parameters,
        "recipes": {"patient": asdict(patient), "polish": asdict(polish), "doctor-base": asdict(doctor_base)},
        "held_out": {name: {key: round(x, 4) for key, x in row.items()} for name, row in figures.items()},
    }
    (folder / "figures.json").write_text(json.dumps(record, indent=2) + "\n")


def build_doctors(folder: Path) -> None:
    """Train the doctors ``helpful`` and ``safe`` in ``folder`` with the project's own extract and train.

    The settings are those of the profile ``clinic``; each doctor has its own label and face pair.
    """
    profile = load_profile("clinic")
    # Run inside the folder, so that artefacts refer to each other by relative paths.
    with chdir(folder), tempfile.TemporaryDirectory() as scratch:
        patient = load_patient("./patient")
        for name, label in DOCTORS.items():
            started = time.monotonic()
            rewards = Path(scratch, name)
            data = DataSettings(source="./pairs.jsonl.gz", label=label)
            pairs = sum(1 for _ in extract(patient, data, {name: profile.faces[name].pair()}, rewards))
            print(f"{name}: {pairs} pairs scored, {time.monotonic() - started:.0f}s", flush=True)

            def show(step: TrainStep, name: str = name) -> None:
                if step.step % 50 == 0 or step.step == step.total:
                    print(
                        f"{name} step {step.step}/{step.total} SubTB {step.subtb:.3f} value {step.value:.3f}",
                        flush=True,
                    )

            train(
                rewards,
                Path(name),
                base_model="./doctor-base",
                reward_settings=profile.rewards.model_copy(update={"faces": (name,)}),
                settings=profile.train,
                on_step=show,
            )


def _swap(new: Path, old: Path) -> None:
    """Replace the folder ``old`` by ``new``."""
    past = old.with_name(old.name + ".old")
    shutil.rmtree(past, ignore_errors=True)
    if old.exists():
        old.rename(past)
    new.rename(old)
    shutil.rmtree(past, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages that were asked for. After each, ``clinic/`` holds its result."""
    parser = argparse.ArgumentParser(description="Rebuild the embedded clinic from its seed.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=("models", "pairs", "doctors", "all"), default="all")
    parser.add_argument("--steps", type=int, default=PATIENT.steps, help="steps of the patient; half as many polish it")
    parser.add_argument("--base-steps", type=int, default=DOCTOR_BASE.steps, help="training steps of the doctor base")
    parser.add_argument("--pairs", type=int, default=1500, help="preference pairs to draw")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="training processes")
    parser.add_argument("--output", type=Path, default=CLINIC)
    options = parser.parse_args(argv)
    patient = replace(PATIENT, steps=options.steps)
    polish = replace(PATIENT_POLISH, steps=options.steps // 2)
    doctor_base = replace(DOCTOR_BASE, steps=options.base_steps)
    for stage in ("models", "pairs", "doctors"):
        if options.stage not in (stage, "all"):
            continue
        start = time.monotonic()
        new = options.output.with_name(options.output.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        if options.output.exists():
            shutil.copytree(options.output, new)
        new.mkdir(exist_ok=True)
        if stage == "models":
            build_models(new, options.seed, patient, polish, doctor_base, options.processes)
        elif stage == "pairs":
            draw_pairs(new, options.seed, options.pairs)
        else:
            build_doctors(new)
        _swap(new, options.output)
        print(f"{stage}: done in {time.monotonic() - start:.0f}s, {options.output}", flush=True)


if __name__ == "__main__":
    main()
