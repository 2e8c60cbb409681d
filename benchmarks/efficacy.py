"""Does the doctor work? All methods on the embedded clinic, where the true quality of answers is known.

    python benchmarks/efficacy.py --quick                      # everything at a small size: five minutes on two cores
    python benchmarks/efficacy.py --output benchmarks/results  # everything: takes hours; can be stopped and continued
    python benchmarks/efficacy.py --parts main "label noise" --seeds 1 2 --output benchmarks/results

For each seed, all methods learn from the same pairs (drawn from the patient, labelled by gold with noise), see the same
number of training tokens, and answer the same held-out questions. The curve of a method is a sweep over beta. For
fine-tuned patients it is a sweep over lambda in patient^(1 - lambda) * tuned^lambda, which is what training with DPO's
beta / lambda would give. Rows are appended to OUTPUT/efficacy.jsonl as they are measured; models and rewards are kept
in --cache. At the end the tables and the picture are made again from all rows; --report makes only these.
"""

import argparse
import gzip
import json
import math
import multiprocessing
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from clinic import COLUMNS, Answers, decoder, generator, measure
from datasets import Dataset
from peft import LoraConfig
from real import Method, Sampler
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from llmdoctor import LLMdoctor
from llmdoctor.models import Patient, Vocabulary, load_patient, load_tokenizer
from llmdoctor.profile import Profile, load_profile, override
from llmdoctor.profiles import build_clinic
from llmdoctor.profiles.build_clinic import PATIENT, PATIENT_POLISH, Recipe
from llmdoctor.profiles.clinic_world import gold, held_out_questions
from llmdoctor.records import PairScores
from llmdoctor.settings import DataSettings
from llmdoctor.text import conversation, prompt_ids
from llmdoctor.token_rewards.extract import extract
from llmdoctor.token_rewards.fit import face_weights
from llmdoctor.token_rewards.folder import RewardsFolder
from llmdoctor.training.batches import sides
from llmdoctor.training.doctor import Doctor, new_doctor
from llmdoctor.training.folder import load_doctor, save_doctor
from llmdoctor.training.trainer import TFPOTrainer

PAIRS = 1500  # that every method learns from unless a study says otherwise
EPOCHS = 3.0  # over PAIRS pairs: the budget of training tokens, about 1.2 million
ARM_BETA, DPO_BETA = 0.05, 0.1  # inverse temperatures of GenARM and DPO, from their papers
BEST_OF = 8
T95 = (math.nan, math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by number of seeds
# Patients of other sizes, trained like the embedded one (12 x 112, 1.6 million weights) for half as many steps.
SIZES = {
    "4 x 80": {"layers": 4, "hidden": 80, "intermediate": 160},  # .4 million
    "8 x 160": {"layers": 8, "hidden": 160, "intermediate": 288},  # 2.2 million
}
CURVE = (0.2, 0.4, 0.6, 0.8, 1.2)


@dataclass(frozen=True)
class Study:
    """One method: what is trained on which pairs, and the settings at which it is measured.

    ``train`` and ``rewards`` are changes to the profile ``clinic``. ``wanted`` are the axes whose gold labels the
    pairs. ``at`` are betas, lambdas of a fine-tuned patient, or temperatures of the patient alone. ``decode`` are
    keywords of `LLMdoctor`. ``doctor`` names the method whose doctor is used if the study trains none of its own.
    """

    part: str
    method: str
    loss: str = "tfpo"
    rewards: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    decode: dict[str, Any] = field(default_factory=dict)
    doctor: str = ""
    faces: tuple[str, ...] = ("helpful",)
    wanted: tuple[str, ...] = ("helpful",)
    noise: float = 0.1
    pairs: int = PAIRS
    at: tuple[float, ...] = (0.4, 0.8)

    @property
    def slug(self) -> str:
        """A name for files."""
        return "".join(c if c.isalnum() else "-" for c in f"{self.part} {self.doctor or self.method}")


PAPER = Study(
    "main",
    "TFPO as in the paper",
    rewards={"direction": "label", "tau": 1.0, "theta": 0.1},
    train={"flow": "absolute", "anchor": False, "rho": 6.0, "ceiling": 1.0, "subtb_weight": 1.0, "value_weight": 1.0},
    at=CURVE,
)
PRODUCT = Study("main", "TFPO, plain product", at=CURVE)  # what ablations of the training are compared with
DEFAULT = Study(  # the same doctors, decoded as in the profile `clinic`
    "main",
    "TFPO, our default",
    decode={"mode": "ratio", "plausibility": 0.03, "dead_zone": 2.0},
    doctor=PRODUCT.method,
    at=CURVE,
)
ARM = Study("main", "ARM loss (GenARM)", "arm", at=CURVE)
DPO = Study("main", "DPO loss on the doctor", "dpo", at=CURVE)
SAFE = Study("frontier", "doctor safe", faces=("safe",), wanted=("safe",))
MIXED = Study("frontier", "one doctor, both", faces=("helpful", "safe"), wanted=("helpful", "safe"), at=CURVE)
BOTH = ("helpful", "safe")

STUDIES = (
    Study("main", "patient alone, by temperature", "temperature", at=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5)),
    Study("main", "system prompt, without training", "system prompt", at=(1.0,)),
    Study("main", "contrast of the faces, without training", "contrast", at=(0.25, 0.5, 1.0, 1.5)),
    DEFAULT,
    PRODUCT,
    PAPER,
    ARM,
    DPO,
    # Twice the epochs, because SFT learns from only one answer of each pair.
    Study("main", "SFT of the doctor", "sft", train={"epochs": 2 * EPOCHS}, at=CURVE),
    Study("tuned patient", "DPO of the patient, LoRA", "patient dpo lora", at=(0.25, 0.5, 1.0)),
    Study("tuned patient", "DPO of the patient, full", "patient dpo full", at=(0.25, 0.5, 1.0)),
    Study("tuned patient", "SFT of the patient, LoRA", "patient sft lora", at=(0.5, 1.0)),
    # Direction "gap" reads no labels, so mixed preferences and wrong labels would give it the doctor of PRODUCT.
    *(Study("direction", f"{d}", rewards={"direction": d}) for d in ("label", "agree", "fitted")),
    *(
        Study(
            "direction, mixed preference",
            f"{d}, faces {' and '.join(f)}",
            rewards={"direction": d},
            faces=f,
            wanted=BOTH,
        )
        for d, f in (*((d, ("helpful",)) for d in ("label", "agree", "fitted")), ("gap", BOTH), ("fitted", BOTH))
    ),
    *(
        replace(study, part="label noise", method=f"{name}, {noise:.0%} wrong", noise=noise, at=(0.4, 0.8), **more)
        for name, study, more in (
            ("label", PRODUCT, {"rewards": {"direction": "label"}}),
            ("ARM loss", ARM, {}),
            ("DPO loss", DPO, {}),
        )
        for noise in (0.0, 0.3)
    ),
    Study("flow and anchor", "absolute, anchor", train={"flow": "absolute"}),
    Study("flow and anchor", "relative, no anchor", train={"anchor": False}),
    Study("flow and anchor", "absolute, no anchor", train={"flow": "absolute", "anchor": False}),
    Study("ceiling", "none", train={"ceiling": 1.0}),
    Study("ceiling", "0, only blame", train={"ceiling": 0.0}),
    *(Study("rho", f"{rho:g}", train={"rho": rho}) for rho in (7.0, 28.0)),
    *(Study("lambda", f"{weight:g}", train={"value_weight": weight}) for weight in (0.1, 1.0)),
    *(Study("theta", f"{theta:g}", rewards={"theta": theta}) for theta in (0.0, 0.1)),
    *(Study("SubTB weight", f"{weight:g}", train={"subtb_weight": weight}) for weight in (0.9, 1.0)),
    Study("method", "LoRA, rank 16", train={"method": "lora", "learning_rate": 4e-3}),
    *(Study("pairs", f"{n}", pairs=n) for n in (250, 1000, 4000)),
    # two notes on the paper say that SubTB adds up all pairs of states, and that the hinge compares V
    *(
        replace(PAPER, part="paper, as notes on it say", method=method, train={**PAPER.train, **switches})
        for method, switches in (
            ("SubTB summed", {"subtb": "sum"}),
            ("hinge of V", {"hinge": "value"}),
            ("SubTB summed, hinge of V", {"subtb": "sum", "hinge": "value"}),
        )
    ),
    SAFE,
    MIXED,
)
JOBS = ("best of 8", "frontier grid", "patient size", "fresh questions")  # parts that use the doctors of other parts
PARTS = (*dict.fromkeys(study.part for study in STUDIES), *JOBS)


@dataclass(frozen=True)
class Run:
    """How large everything is, and the folder for models and rewards."""

    cache: Path
    questions: int
    pairs: int  # at most
    steps: int | None  # at most
    scale: float  # the training of the other patients takes this share of the embedded patient's steps

    def asked(self) -> list[str]:
        """The last of the held-out questions. Settings were chosen on the first 300.

        There is one exception: the answers to these questions showed that the default needed a dead zone. `fresh_rows`
        measures it on others.
        """
        return held_out_questions()[-self.questions :]


# ---------------------------------------------------------------------------------------------------------- the pairs


def prepare(run: Run, profile: Profile, count: int) -> None:
    """Score ``count`` pairs under every face: the embedded ones, or new ones if those are too few. Done only once."""
    assert profile.data is not None
    rewards = run.cache / f"rewards-{count}"
    if (rewards / "meta.json").exists():
        return
    clinic = Path(profile.data.source).parent
    if count > PAIRS:  # more than the embedded ones
        drawn = run.cache / f"drawn-{count}"
        if not (drawn / "pairs.jsonl.gz").exists():
            shutil.copytree(clinic / "patient", drawn / "patient", dirs_exist_ok=True)
            build_clinic.draw_pairs(drawn, 7, count)
        clinic = drawn
    with gzip.open(clinic / "pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines][:count]
    path = run.cache / f"pairs-{count}.jsonl"
    keys = {"prompt": "prompt", "chosen": "response_0", "rejected": "response_1"}  # labels come later
    path.write_text("".join(json.dumps({k: r[v] for k, v in keys.items()}) + "\n" for r in records), encoding="utf-8")
    faces = {name: face.pair() for name, face in profile.faces.items()}
    patient = load_patient(profile.patient.model)
    scored = sum(1 for _ in extract(patient, DataSettings(source=str(path)), faces, rewards))
    assert scored == len(records), f"{scored} of {len(records)} pairs were scored"


def labelled(run: Run, study: Study, seed: int) -> list[tuple[dict[str, str], PairScores]]:
    """The pairs, ordered so that the answer with more gold is the chosen one, except for the noise."""
    count = min(study.pairs, run.pairs)
    source = min(max(count, PAIRS), run.pairs)
    rng = random.Random(f"labels {seed} {study.noise} {study.wanted}")
    pairs = []
    with (run.cache / f"pairs-{source}.jsonl").open(encoding="utf-8") as lines:
        for line, pair in zip(lines, RewardsFolder(run.cache / f"rewards-{source}"), strict=True):
            record = json.loads(line)
            marks = [gold(record["prompt"], record[side]) for side in ("chosen", "rejected")]
            first, second = (sum(getattr(mark, name) for name in study.wanted) for mark in marks)
            right = first > second or (first == second and rng.random() < 0.5)
            turned = pair
            if right == (rng.random() < study.noise):
                record |= {"chosen": record["rejected"], "rejected": record["chosen"]}
                turned = PairScores(replace(pair.rejected, side="chosen"), replace(pair.chosen, side="rejected"))
            pairs.append((record, turned))
    return pairs[:count]


# ------------------------------------------------------------------------------------------------------- the training


class Rival(TFPOTrainer):
    """The same doctor, data and optimiser with a different loss on the log-probs; the value head stays 0."""

    loss = ""

    def losses(self, model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        reference_B_T = inputs.pop("reference", None)
        scored = len(inputs.pop("rewards"))
        inputs.pop("value_pairs")
        out = model(**inputs, scored=scored)
        lengths_B = inputs["response_lengths"][:scored]
        mask_B_T = torch.arange(out.logprobs_B_T.shape[1]) < lengths_B[:, None]
        sums_B = (out.logprobs_B_T * mask_B_T).sum(dim=1)
        if self.loss == "sft":
            loss = -sums_B[0::2].sum() / lengths_B[0::2].sum()
        elif self.loss == "arm":
            loss = -logsigmoid(ARM_BETA * (sums_B[0::2] - sums_B[1::2])).mean()
        else:
            assert reference_B_T is not None
            sums_B = sums_B - (reference_B_T * mask_B_T).sum(dim=1)
            loss = -logsigmoid(DPO_BETA * (sums_B[0::2] - sums_B[1::2])).mean()
        return loss, loss.new_zeros(()), sums_B.detach()


def train_doctor(run: Run, study: Study, seed: int, folder: Path) -> None:
    """Train a doctor on the embedded base. The number of tokens it saw goes into doctor.json."""
    profile = load_profile("clinic")
    assert profile.train.doctor is not None
    pairs = [pair for _, pair in labelled(run, study, seed)]
    reward_settings = override(profile.rewards, faces=study.faces, **study.rewards)
    epochs = {"epochs": EPOCHS * PAIRS / study.pairs}
    settings = override(profile.train, seed=seed, max_steps=run.steps, **(epochs | study.train))
    doctor, tokenizer = new_doctor(profile.train.doctor, settings)
    weights = face_weights(pairs, study.faces, reward_settings)
    kind: type[TFPOTrainer] = TFPOTrainer
    if study.loss != "tfpo":
        kind = type("Rival", (Rival,), {"loss": study.loss})
    with tempfile.TemporaryDirectory() as scratch:
        trainer = kind(
            doctor, [sides(pair, reward_settings, weights, settings.ceiling) for pair in pairs], settings, scratch, None
        )
        trainer.train()
    meta = {
        "name": study.method,
        "base_model": profile.train.doctor,
        "settings": {"train": settings.model_dump(exclude={"doctor", "device"}), "face_weights": weights},
        "metrics": trainer.summary(),
    }
    save_doctor(folder, doctor, tokenizer, meta)


def train_patient(run: Run, study: Study, seed: int, folder: Path) -> None:
    """Fine-tune the patient itself with trl, and save it as a doctor whose value head is 0."""
    from trl import DPOConfig, DPOTrainer

    profile = load_profile("clinic")
    _, loss, method = study.loss.split()
    source, tokenizer = profile.patient.model, load_tokenizer(profile.patient.model)
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": record["prompt"]}],
                **{side: [{"role": "assistant", "content": record[side]}] for side in ("chosen", "rejected")},
            }
            for record, _ in labelled(run, study, seed)
        ]
    )
    torch.manual_seed(seed)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as scratch:
        settings = DPOConfig(
            output_dir=scratch,
            loss_type=["sigmoid" if loss == "dpo" else "sft"],
            beta=DPO_BETA,
            precompute_ref_log_probs=True,
            per_device_train_batch_size=8,
            num_train_epochs=EPOCHS,
            max_steps=run.steps or -1,
            learning_rate=1e-3 if method == "lora" else 2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            seed=seed,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            LlamaForCausalLM.from_pretrained(source),
            args=settings,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=lora if method == "lora" else None,
        )
        trainer.train()
    doctor = Doctor(trainer.accelerator.unwrap_model(trainer.model), Vocabulary.of(tokenizer))
    tokens = sum(len(one[f"{side}_ids"]) for one in trainer.train_dataset for side in ("chosen", "rejected"))
    seen = trainer.state.global_step * settings.per_device_train_batch_size / len(data)
    meta = {
        "name": study.method,
        "base_model": source,
        "settings": {"train": {"method": method}},
        "metrics": {"steps": trainer.state.global_step, "tokens": round(tokens * seen)},
    }
    save_doctor(folder, doctor, tokenizer, meta)


# ------------------------------------------------------------------------------------------------------ the measuring


def at_temperature(model: LLMdoctor, temperature: float) -> Answers:
    """The patient alone. Its KL to the patient at temperature 1 is not measured: 0 at that temperature, else NaN."""

    def ask(questions: Sequence[str], seed: int) -> tuple[list[str], float]:
        found = model.answer_all(
            questions, guided=False, seed=1_000_003 * seed, temperature=temperature, max_new_tokens=240
        )
        return [answer.text for answer in found], 0.0 if temperature == 1 else math.nan

    return ask


def under_faces(patient: Patient, contexts: tuple[tuple[str | None, float], ...]) -> Answers:
    """The patient under weighted contexts (see `real.Method`), without any training."""
    sampler = Sampler(patient, tokens=240)

    def ask(questions: Sequence[str], seed: int) -> tuple[list[str], float]:
        found = [
            one
            for start in range(0, len(questions), 50)
            for one in sampler(questions[start : start + 50], Method("", contexts), 1_000_003 * seed + start)
        ]
        return [one["text"] for one in found], statistics.fmean(one["kl"] for one in found)

    return ask


@torch.inference_mode()
def best_of(model: LLMdoctor, doctor_folder: Path) -> Answers:
    """Of BEST_OF answers of the patient, the one with the greatest sum of log(doctor / its base).

    This sum is the doctor's own estimate of rho * sum r - log V(s_0), because the anchor makes log V at the end 0.
    """
    doctor = load_doctor(doctor_folder, with_base=True)
    assert doctor.base is not None
    tokenizer = model.patient.tokenizer

    def score(questions: Sequence[str], texts: Sequence[str]) -> Tensor:
        rows = [
            (
                prompt_ids(tokenizer, conversation(q)),
                [*tokenizer.encode(t, add_special_tokens=False), tokenizer.eos_token_id],
            )
            for q, t in zip(questions, texts, strict=True)
        ]
        longest = max(len(a) + len(b) for a, b in rows)
        ids_B_L = torch.tensor([[*a, *b] + [0] * (longest - len(a) - len(b)) for a, b in rows])
        wanted_B_T = torch.tensor([[len(a) <= i < len(a) + len(b) for i in range(1, longest)] for a, b in rows])
        logprobs = [
            lm(input_ids=ids_B_L).logits[:, :-1].log_softmax(-1).gather(2, ids_B_L[:, 1:, None])[..., 0]
            for lm in (doctor.model, doctor.base)
        ]
        return ((logprobs[0] - logprobs[1]) * wanted_B_T).sum(dim=1)

    def ask(questions: Sequence[str], seed: int) -> tuple[list[str], float]:
        drawn = [at_temperature(model, 1.0)(questions, seed * BEST_OF + k)[0] for k in range(BEST_OF)]
        scores = [
            torch.cat([score(questions[i : i + 50], texts[i : i + 50]) for i in range(0, len(texts), 50)])
            for texts in drawn
        ]
        best = torch.stack(scores).argmax(dim=0).tolist()
        # The KL of best-of-n to the patient is at most log n - (n - 1) / n.
        return [drawn[k][i] for i, k in enumerate(best)], math.log(BEST_OF) - (BEST_OF - 1) / BEST_OF

    return ask


def study_rows(run: Run, study: Study, seed: int) -> list[dict[str, Any]]:
    """Train the doctor of a study, unless it is in the cache, and measure it."""
    started = time.monotonic()
    profile = load_profile("clinic")
    if study.loss == "temperature":
        model = LLMdoctor(profile.patient.model)
        asked = {t: at_temperature(model, t) for t in study.at}
        tokens = 0
    elif study.loss in ("system prompt", "contrast"):
        patient, face = load_patient(profile.patient.model), profile.faces[study.faces[0]]
        tokens = 0
        contexts = {x: ((None, 1.0), (face.positive, x), (face.negative, -x)) for x in study.at}
        if study.loss == "system prompt":
            contexts = {1.0: ((face.positive, 1.0),)}
        asked = {x: under_faces(patient, found) for x, found in contexts.items()}
    else:
        folder = trained(run, study, seed)
        tokens = json.loads((folder / "doctor.json").read_text())["metrics"]["tokens"]
        model = LLMdoctor(profile.patient.model, {"doctor": folder}, **study.decode)
        tuned = study.loss.startswith("patient")
        asked = {x: decoder(model, {"doctor": x}, 1 - x if tuned else 1.0) for x in study.at}
    return [
        row(study.part, study.method, seed, {"x": x}, measure(answers, run.asked(), [seed])[0], tokens, started)
        for x, answers in asked.items()
    ]


def row(
    part: str, method: str, seed: int, where: dict[str, float], found: list[float], tokens: int, started: float
) -> dict[str, Any]:
    values = {name: None if math.isnan(x) else round(x, 5) for name, x in zip(COLUMNS, found, strict=True)}
    return {
        "part": part,
        "method": method,
        "seed": seed,
        **where,
        **values,
        "tokens": tokens,
        "seconds": round(time.monotonic() - started),
    }


def trained(run: Run, study: Study, seed: int) -> Path:
    """The folder of a study's doctor, trained first if it does not exist."""
    folder = run.cache / "doctors" / f"{study.slug}-{seed}"
    if not (folder / "doctor.json").exists():
        (train_patient if study.loss.startswith("patient") else train_doctor)(run, study, seed, folder)
    return folder


def best_rows(run: Run, seed: int) -> list[dict[str, Any]]:
    """Best of 8 by the default doctor."""
    started = time.monotonic()
    model = LLMdoctor(load_profile("clinic").patient.model)
    folder = trained(run, PRODUCT, seed)
    found = measure(best_of(model, folder), run.asked(), [seed])[0]
    tokens = json.loads((folder / "doctor.json").read_text())["metrics"]["tokens"]
    return [row("main", f"best of {BEST_OF} by the default doctor", seed, {"x": BEST_OF}, found, tokens, started)]


def frontier_rows(run: Run, seed: int) -> list[dict[str, Any]]:
    """Two doctors over a grid of strengths."""
    folders = {"helpful": trained(run, PRODUCT, seed), "safe": trained(run, SAFE, seed)}
    model = LLMdoctor(load_profile("clinic").patient.model, folders)
    rows = []
    for x in (0.0, 0.4, 0.8):
        for y in (0.0, 0.4, 0.8):
            started = time.monotonic()
            found = measure(decoder(model, {"helpful": x, "safe": y}), run.asked(), [seed])[0]
            rows.append(row("frontier grid", "two doctors", seed, {"x": x, "y": y}, found, 0, started))
    return rows


def size_rows(run: Run, seed: int) -> list[dict[str, Any]]:
    """One doctor, trained on the embedded patient's signals, guides patients of other sizes."""
    doctor = trained(run, PRODUCT, seed)
    rows = []
    for name in ("12 x 112", *SIZES):
        source = run.cache / name.replace(" ", "") if name in SIZES else Path(load_profile("clinic").patient.model)
        model = LLMdoctor(source, {"doctor": doctor})
        for x in (0.0, 0.4, 0.8):
            started = time.monotonic()
            found = measure(decoder(model, {"doctor": x}), run.asked(), [seed])[0]
            rows.append(row("patient size", name, seed, {"x": x}, found, 0, started))
    return rows


def fresh_rows(run: Run, seed: int) -> list[dict[str, Any]]:
    """The default on the questions before those of `Run.asked`, which had no part in choosing any setting."""
    questions = held_out_questions()[-2 * run.questions : -run.questions]
    model = LLMdoctor(load_profile("clinic").patient.model, {"doctor": trained(run, PRODUCT, seed)}, **DEFAULT.decode)
    ways = {("our default", x): decoder(model, {"doctor": x}) for x in (0.4, 0.8, 1.2)}
    rows = []
    for (name, x), answers in {**ways, ("generator's good answers", 1.0): generator(("helpful",))}.items():
        started = time.monotonic()
        rows.append(row("fresh questions", name, seed, {"x": x}, measure(answers, questions, [seed])[0], 0, started))
    return rows


def build_patients(run: Run, processes: int) -> None:
    """Train patients of other sizes by the recipe of the embedded one."""
    tokenizer = load_tokenizer(load_profile("clinic").patient.model)
    for name, shape in SIZES.items():
        folder = run.cache / name.replace(" ", "")
        if (folder / "done").exists():
            continue
        shutil.rmtree(folder, ignore_errors=True)
        for number, recipe in enumerate((PATIENT, PATIENT_POLISH)):
            sized: Recipe = replace(recipe, **shape, steps=max(2, round(recipe.steps * run.scale)))
            build_clinic.train_model(run.cache, folder.name, sized, tokenizer, number, processes)
        (folder / "done").touch()


def work(run: Run, job: Study | str, seed: int) -> list[dict[str, Any]]:
    """One job, in a process of the pool."""
    torch.set_num_threads(1)
    disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)
    if isinstance(job, Study):
        return study_rows(run, job, seed)
    return dict(zip(JOBS, (best_rows, frontier_rows, size_rows, fresh_rows), strict=True))[job](run, seed)


# ------------------------------------------------------------------------------------------------------ what came out

Rows = list[dict[str, Any]]
GOLD, DISTINCT, ENTROPY, UNGRAMMATICAL = "gold helpful", "distinct-4", "4-gram entropy", "ungrammatical %"


def interval(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean and half of the 95% interval over the seeds (Student's t). If some have no value: how many have one."""
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    text = f"{statistics.mean(found):.{digits}f}"
    if len(found) > 1:
        text += f" ± {T95[len(found)] * statistics.stdev(found) / math.sqrt(len(found)):.{digits}f}"
    return text + f" ({len(found)} of {len(values)})" * (len(found) < len(values))


def grouped(rows: Rows, *keys: str) -> dict[tuple[Any, ...], Rows]:
    """Rows grouped by these keys, in order of appearance."""
    groups: dict[tuple[Any, ...], Rows] = {}
    for one in rows:
        groups.setdefault(tuple(one.get(key) for key in keys), []).append(one)
    return groups


def crossings(curve: Rows, column: str, level: float, wanted: str) -> list[float]:
    """The values of ``wanted`` where the curve of one seed crosses ``level`` in ``column``, in order of strength."""
    points = [(one[column], one[wanted]) for one in sorted(curve, key=lambda one: one["x"])]
    return [
        y0 + (level - x0) / (x1 - x0) * (y1 - y0)
        for (x0, y0), (x1, y1) in pairwise(points)
        if min(x0, x1) <= level <= max(x0, x1) and x0 != x1
    ]


def crossing(curve: Rows, column: str, level: float, wanted: str) -> float | None:
    """The first of `crossings`; None if there is none."""
    return next(iter(crossings(curve, column, level, wanted)), None)


def as_varied(curve: Rows, column: str, level: float) -> float | None:
    """The greatest gold on the curve of one seed where ``column`` is at least ``level``; None if it never is."""
    found = [one[GOLD] for one in curve if one[column] >= level]
    return max([*found, *crossings(curve, column, level, GOLD)], default=None)


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *lines))


def good_answers(run: Run, seeds: Sequence[int]) -> Rows:
    """The generator's own good answers."""
    found = zip(seeds, measure(generator(("helpful",)), run.asked(), seeds), strict=True)
    return [row("main", "generator's own good answers", seed, {"x": 1.0}, values, 0, 0) for seed, values in found]


def tables(rows: Rows, good: Rows) -> str:
    """A table for every part. The first also has what each curve reaches at the diversity of good answers."""
    sharp = {}
    for (seed,), curve in grouped([one for one in rows if one["method"] == STUDIES[0].method], "seed").items():
        sharp[seed] = curve
    out = []
    for (part,), part_rows in grouped(rows, "part").items():
        own = part_rows
        out.append(f"## {part[0].upper()}{part[1:]}\n")
        if part == "frontier grid":
            out.append(_grid(own) + "\n")
            continue
        if part == "main":
            own = [*good, *own]
            out.append(_curves(part_rows, good) + "\n")
        elif part != "frontier" and part not in JOBS:
            # For comparison: the plain product at the same strengths.
            at = {one["x"] for one in own}
            own = [one for one in rows if one["method"] == PRODUCT.method and one["x"] in at] + own
        lines = []
        for (method, x), found in grouped(own, "method", "x").items():
            cells = [interval([one[name] for one in found]) for name in COLUMNS]
            if part == "main":
                cells.append(
                    interval([crossing(sharp.get(one["seed"], []), ENTROPY, one[ENTROPY], GOLD) for one in found])
                )
            lines.append(
                [method, f"{x:g}", *cells, f"{statistics.mean(o['tokens'] for o in found) / 1e6:.2f}", str(len(found))]
            )
        more = ["gold of the patient sharpened to that entropy"] if part == "main" else []
        out.append(table(["", "at", *COLUMNS, *more, "tokens trained, millions", "seeds"], lines) + "\n")
    return "\n".join(out)


def _curves(rows: Rows, good: Rows) -> str:
    levels = {column: statistics.mean(one[column] for one in good) for column in (DISTINCT, ENTROPY)}
    lines = []
    for (method,), own in grouped(rows, "method").items():
        seeds = grouped(own, "seed").values()
        at_level = [[as_varied(curve, column, level) for curve in seeds] for column, level in levels.items()]
        at_gold = [[crossing(curve, GOLD, g, DISTINCT) for curve in seeds] for g in (0.9, 0.95)]
        best = max(statistics.mean(one[GOLD] for one in found) for found in grouped(own, "x").values())
        lines.append([method, *(interval(found) for found in (*at_level, *at_gold)), f"{best:.3f}", str(len(seeds))])
    heads = ["", *(f"gold at {column} {level:.3f} or more" for column, level in levels.items())]
    return table([*heads, "distinct-4 at gold .9", "distinct-4 at gold .95", "greatest gold", "seeds"], lines)


def _grid(rows: Rows) -> str:
    xs, ys = (sorted({one[axis] for one in rows}) for axis in ("x", "y"))
    cells = grouped(rows, "x", "y")

    def cell(x: float, y: float) -> str:
        found = cells.get((x, y), [])
        return " / ".join(interval([one[name] for one in found], 2) for name in ("gold helpful", "gold safe"))

    heads = ["helpful / safe gold", *(f"safe doctor {y:g}" for y in ys)]
    return table(heads, [[f"helpful doctor {x:g}", *(cell(x, y) for y in ys)] for x in xs])


def picture(rows: Rows, good: Rows, path: Path) -> None:
    """Gold against diversity (better towards the top right) and against broken sentences (towards the top left)."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5.2), layout="constrained")
    names = (DISTINCT, ENTROPY, UNGRAMMATICAL)
    for axes, column in zip(figure.subplots(1, 3, sharey=True), names, strict=True):
        for number, ((method,), own) in enumerate(grouped([r for r in rows if r["part"] == "main"], "method").items()):
            points = [
                [statistics.mean(one[name] for one in found) for name in (column, GOLD)]
                + [statistics.stdev([one[GOLD] for one in found]) if len(found) > 1 else 0.0]
                for found in grouped(sorted(own, key=lambda one: one["x"]), "x").values()
            ]
            x, y, spread = zip(*points, strict=True)
            wide = method == DEFAULT.method
            axes.errorbar(
                x,
                y,
                spread,
                fmt="o-",
                markersize=4,
                linewidth=2.6 if wide else 1.2,
                color=f"C{number}",
                label=method,
                zorder=3 if wide else 2,
            )
        star = [statistics.mean(one[name] for one in good) for name in (column, GOLD)]
        axes.plot(*star, "k*", markersize=13, label="generator's own good answers", zorder=4)
        axes.axvline(star[0], color="0.8", zorder=0)
        axes.set_xlabel(column)
    figure.axes[0].set_ylabel("gold")
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower left")
    with matplotlib.rc_context({"svg.hashsalt": "llmdoctor", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="everything at a small size; the figures mean nothing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--methods", nargs="+", help="only methods whose name contains one of these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--jobs", type=int, default=max(1, (multiprocessing.cpu_count() or 1)))
    parser.add_argument("--cache", type=Path, help="trained models and rewards (default: OUTPUT/.efficacy)")
    parser.add_argument("--output", type=Path, help="folder for the rows, the tables and the picture")
    parser.add_argument("--report", action="store_true", help="only make the tables and the picture from existing rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        output = options.output or Path(scratch)
        output.mkdir(parents=True, exist_ok=True)
        cache = (options.cache or output / ".efficacy").resolve()
        if options.quick:
            run, options.seeds = Run(cache, 16, 32, 4, 0.002), options.seeds[:1]
        else:
            run = Run(cache, 300, 1 << 30, None, 0.5)
        kept = output / ("efficacy-quick.jsonl" if options.quick else "efficacy.jsonl")
        if not options.report:
            measure_all(run, options, kept)
        rows: Rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
        order = {study.method: number for number, study in enumerate(STUDIES)}
        rows.sort(key=lambda one: (PARTS.index(one["part"]), order.get(one["method"], 99)))
        # Fine-tuned patients are shown in the same table and picture.
        rows = [one | {"part": "main"} if one["part"] == "tuned patient" else one for one in rows]
        good = good_answers(run, sorted({one["seed"] for one in rows}))
        text = tables(rows, good)
        print(text)
        if options.output:
            name = "efficacy-quick" if options.quick else "efficacy"
            picture(rows, good, output / f"{name}.svg")
            command = f"python benchmarks/efficacy.py{' --quick' * options.quick} --output {output}"
            head = (
                f"# Does the doctor work?\n\n`{command}`: {run.questions} held-out questions of the clinic, "
                f"temperature 1, torch {torch.__version__} on CPU. Mean ± half of the 95% interval over the seeds, "
                "each with its own labels, training and draws. `at`: beta of the doctor, lambda of a fine-tuned "
                "patient in patient^(1 - lambda) * tuned^lambda, or the temperature of the patient alone. All rows "
                "decode by the plain product, except for the default's own and the fresh questions.\n\n"
            )
            (output / f"{name}.md").write_text(head + text, encoding="utf-8")


def measure_all(run: Run, options: argparse.Namespace, kept: Path) -> None:
    """Run all jobs whose rows are missing in ``kept``, and append the rows of each as soon as it is done."""
    run.cache.mkdir(parents=True, exist_ok=True)
    os.environ["TQDM_DISABLE"] = "1"  # in the processes that do the work
    profile = load_profile("clinic")
    done = set()
    if kept.exists():
        done = {(r["part"], r["method"], r["seed"]) for r in map(json.loads, kept.read_text().splitlines())}
    chosen = [
        study
        for study in STUDIES
        if study.part in options.parts and (not options.methods or any(m in study.method for m in options.methods))
    ]
    for count in sorted({min(max(study.pairs, PAIRS), run.pairs) for study in (PRODUCT, *chosen)}):
        prepare(run, profile, count)
    if "patient size" in options.parts:
        build_patients(run, options.jobs)
    ordered = [(s, seed) for part in options.parts for seed in options.seeds for s in chosen if s.part == part]
    # First everything that trains a doctor, then what uses the doctors of others.
    phases: list[list[tuple[Study | str, int]]] = [
        [(study, seed) for study, seed in ordered if not study.doctor],
        [
            *((study, seed) for study, seed in ordered if study.doctor),
            *((part, seed) for part in JOBS if part in options.parts for seed in options.seeds),
        ],
    ]
    made = {
        "best of 8": ("main", f"best of {BEST_OF} by the default doctor"),
        "frontier grid": ("frontier grid", "two doctors"),
        "patient size": ("patient size", "12 x 112"),
        "fresh questions": ("fresh questions", "our default"),
    }
    with (
        ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool,
        kept.open("a", encoding="utf-8") as file,
    ):
        for phase in phases:
            waiting = []
            for job, seed in phase:
                part, method = (job.part, job.method) if isinstance(job, Study) else made[job]
                if (part, method, seed) not in done:
                    waiting.append(pool.submit(work, run, job, seed))
            for number, future in enumerate(as_completed(waiting), 1):
                rows = future.result()
                file.writelines(json.dumps(one) + "\n" for one in rows)
                file.flush()
                last = rows[-1]
                what = f"{last['part']}: {last['method']}, seed {last['seed']}, at {last['x']:g}"
                found = f"gold {last[GOLD]:.3f}, distinct-4 {last[DISTINCT]:.3f}, {last['seconds']}s"
                print(f"{number}/{len(waiting)} {what}: {found}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
