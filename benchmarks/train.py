"""What a step of stage 2 costs: TFPO and plain cross-entropy, the share of SubTB, and SubTB as a plain double loop.

    python benchmarks/train.py [--rounds 10] [--output benchmarks/results/train.md]

A step is forward, backward and optimiser of the same doctor (LoRA on the embedded doctor base) on the same tokens, the
embedded preference pairs. Rewards are random, because their values do not change the cost. What is compared alternates
within a round. Figures are medians with (quartiles). Takes about two minutes on one busy core.
"""

import argparse
import gzip
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from llmdoctor.models import load_tokenizer, token_log_probs
from llmdoctor.settings import TrainSettings
from llmdoctor.training.batches import ScoredPair, ScoredResponse
from llmdoctor.training.doctor import Doctor, new_doctor
from llmdoctor.training.losses import subtb
from llmdoctor.training.trainer import TFPOTrainer

LENGTH = 4096


def alternate(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round, after one round of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for counted in [False] + [True] * rounds:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if counted:
                times[name].append(time.perf_counter() - start)
    return times


def spread(values: list[float], scale: float = 1.0, digits: int = 2) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles((v * scale for v in values), n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def over(a: list[float], b: list[float]) -> list[float]:
    """The ratio in every round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def clinic_pairs(base: Path, count: int) -> list[ScoredPair]:
    """The first embedded preference pairs, with random rewards from a fixed seed."""
    tokenizer, generator = load_tokenizer(base), torch.Generator().manual_seed(0)
    pairs = []
    with gzip.open(base.parent / "pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        for record, _ in zip(map(json.loads, lines), range(count), strict=False):
            prompt = torch.tensor(tokenizer(record["prompt"])["input_ids"])
            sides = []
            for side in ("response_0", "response_1"):
                ids = tokenizer(record[side], add_special_tokens=False)["input_ids"]
                response = torch.tensor([*ids, tokenizer.eos_token_id])
                rewards = torch.rand(len(response), generator=generator) - 0.5
                sides.append(ScoredResponse(str(record.get("id", len(pairs))), prompt, response, rewards, []))
            pairs.append((sides[0], sides[1]))
    return pairs


def tfpo(doctor: Doctor, settings: TrainSettings, pairs: list[ScoredPair]) -> Callable[[], None]:
    """One TFPO step on ``pairs``, with the trainer's own collator and loss."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = TFPOTrainer(doctor, pairs, settings, scratch, None)
    optimizer = torch.optim.AdamW([p for p in doctor.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        trainer.compute_loss(doctor, trainer.data_collator(pairs)).backward()
        optimizer.step()

    return step


def cross_entropy(doctor: Doctor, pairs: list[ScoredPair]) -> Callable[[], None]:
    """One step of plain cross-entropy on the response tokens of the same rows, with the same log-prob function."""
    optimizer = torch.optim.AdamW([p for p in doctor.lm.parameters() if p.requires_grad], lr=1e-6)
    rows = [side for pair in pairs for side in pair]

    def step() -> None:
        optimizer.zero_grad()
        sequences = [torch.cat([row.prompt, row.response]) for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        places = torch.arange(ids.shape[1])
        lengths = torch.tensor([len(s) for s in sequences])
        prompts = torch.tensor([len(row.prompt) for row in rows])
        hidden = doctor.split.hidden(ids, (places < lengths[:, None]).long())
        wanted = ((places >= prompts[:, None]) & (places < lengths[:, None]))[:, 1:]
        scores = token_log_probs(doctor.split, hidden[:, :-1][wanted], ids[:, 1:][wanted], doctor.vocabulary)
        (-scores.mean()).backward()
        optimizer.step()

    return step


def double_loop(flow_B_N: Tensor) -> Tensor:
    """The mean over state pairs m < n of (f_n - f_m)^2, as the paper writes it."""
    n = flow_B_N.shape[1]
    total = flow_B_N.new_zeros(len(flow_B_N))
    for i in range(n):
        for j in range(i + 1, n):
            total = total + (flow_B_N[:, j] - flow_B_N[:, i]) ** 2
    return total / (n * (n - 1) / 2)


def gradient(loss: Callable[[Tensor], Tensor], rows: int, tokens: int) -> Callable[[], Tensor]:
    """A function that computes the gradient of a loss on ``rows`` random flows of ``tokens`` tokens."""
    flow = torch.randn(rows, tokens + 1, generator=torch.Generator().manual_seed(0)).cumsum(1).requires_grad_()

    def step() -> Tensor:
        flow.grad = None
        loss(flow).sum().backward()
        assert flow.grad is not None
        return flow.grad

    return step


def measure(rounds: int, batch: int) -> list[str]:
    """The three tables."""
    base = Path(str(files("llmdoctor.profiles"))) / "clinic" / "doctor-base"
    relative, absolute = (TrainSettings(flow=flow, device="cpu", batch_size=batch) for flow in ("relative", "absolute"))
    doctor, _ = new_doctor(base, relative)
    pairs = clinic_pairs(base, batch)
    tokens = sum(len(side.response) for pair in pairs for side in pair)
    times = alternate(
        {
            "cross-entropy": cross_entropy(doctor, pairs),
            "TFPO, absolute flow": tfpo(doctor, absolute, pairs),
            "TFPO, relative flow": tfpo(doctor, relative, pairs),
        },
        rounds,
    )
    lines = [
        f"A step of {batch} pairs, {tokens} response tokens:",
        "",
        "| step | ms | times cross-entropy |",
        "|---|---|---|",
        *(
            f"| {name} | {spread(values, 1e3, 1)} | {spread(over(values, times['cross-entropy']))} |"
            for name, values in times.items()
        ),
    ]
    generator = torch.Generator().manual_seed(1)
    long = [
        ScoredResponse(
            "long", pairs[0][0].prompt, torch.randint(doctor.vocabulary.size, (LENGTH,), generator=generator), r, []
        )
        for r in torch.rand(2, LENGTH, generator=generator) - 0.5
    ]
    # Positions are rotary, so no weight depends on the greatest length.
    doctor.lm.config.max_position_embeddings = LENGTH + len(long[0].prompt)
    few = max(3, rounds // 5)
    step = alternate({"step": tfpo(doctor, relative, [(long[0], long[1])])}, few)["step"]
    lines += [
        "",
        f"SubTB with its gradient at T = {LENGTH}, one pair; a TFPO step there takes {spread(step, 1e3, 0)} ms:",
        "",
        "| SubTB | ms | % of the median step |",
        "|---|---|---|",
    ]
    mask = torch.ones(2, LENGTH + 1, dtype=torch.bool)
    weighted = {w: gradient(lambda f, w=w: subtb(f, mask, w), 2, LENGTH) for w in (1.0, 0.9)}  # type: ignore[misc]
    for weight, values in alternate(weighted, rounds).items():  # type: ignore[arg-type]
        share = spread(values, 100 / statistics.median(step), 3)
        lines.append(f"| weight {weight} | {spread(values, 1e3, 3)} | {share} |")
    lines += ["", "The all-pairs double loop over m < n, two rows, with gradient:", ""]
    lines += ["| T | loop, ms | SubTB, ms | ratio | greatest difference of a gradient |", "|---|---|---|---|---|"]
    for t in (128, 256, 512):
        fast = gradient(lambda f, t=t: subtb(f, mask[:, : t + 1]), 2, t)  # type: ignore[misc]
        slow = gradient(double_loop, 2, t)
        apart = (fast().clone() - slow()).abs().max().item()
        # What runs after the loop also pays for freeing its graph: let that be a call that is not measured.
        pair = alternate({"loop": slow, "between": fast, "fast": fast}, few)
        ratio = spread(over(pair["loop"], pair["fast"]), 1, 0)
        lines.append(
            f"| {t} | {spread(pair['loop'], 1e3, 0)} | {spread(pair['fast'], 1e3, 3)} | {ratio} | {apart:.1e} |"
        )
    return lines


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    head = [
        "# What a training step costs",
        "",
        f"`{' '.join(['python', 'benchmarks/train.py', *sys.argv[1:]])}`",
        "",
        f"{platform.machine()}, one thread, torch {torch.__version__}, {options.rounds} rounds.",
        "",
    ]
    text = "\n".join([*head, *measure(options.rounds, options.batch)]) + "\n"
    sys.stdout.write(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
