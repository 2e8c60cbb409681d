"""How fast stage 1 is: a bare forward (the limit), a plain implementation, and ``extract``, on the same human pairs.

    python benchmarks/extract.py                               # about three minutes on two cores
    python benchmarks/extract.py --pairs 64 --hidden 512 --layers 12 --intermediate 2816

Everything runs in one process on the first usable HH-RLHF pairs under the ``helpful`` faces. The patient is
Qwen2-shaped with random weights, Qwen2's real tokenizer and a vocabulary of 151,936 rows:

(a) bare     the backbone alone, without the head, over the tokens of four full sequences per pair (two faces, two
             responses), in batches of similar length with the same token budget;
(b) plain    tokenisation, four full forwards per pair in batches of 1, log_softmax of all logits, gather;
(c) extract  what the command does, from the file of pairs to the finished rewards folder.

The three alternate after a warm-up. Figures are medians over the rounds (least, greatest); ratios are taken within one
round. For all three, tokens are those of the four full sequences, so what (c) saves on shared prompts counts as speed.
The parts of (c) are timed by wrapping its steps. Peak memory is measured in a new process, for one pair of answers of
the given length: what it needs beyond the loaded patient, including a few MiB of libraries that are loaded lazily.
``--clock cpu`` measures the CPU time of this process; use it with OMP_NUM_THREADS=1 on a machine that others use too.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from llmdoctor.models import Patient, SplitLM, load_patient
from llmdoctor.profile import library_faces
from llmdoctor.records import PreferencePair
from llmdoctor.settings import DataSettings
from llmdoctor.text import end_of_turn, prompt_ids, response_ids, with_system
from llmdoctor.token_rewards.encode import PairEncoder
from llmdoctor.token_rewards.extract import extract
from llmdoctor.token_rewards.head import FaceHead
from llmdoctor.token_rewards.pairs import read_pairs
from llmdoctor.token_rewards.scoring import Scorer, fitting_batch_tokens
from llmdoctor.token_rewards.writer import RewardsWriter

DATA = Path(__file__).parents[2] / "shared" / "data"
HH = DATA / "hh-rlhf" / "harmless-base_test.jsonl.gz"
FACES = {"helpful": library_faces()["helpful"].pair()}
SYSTEMS = (FACES["helpful"].positive, FACES["helpful"].negative)


now = time.perf_counter


def build(folder: Path, tokenizer: Path, rows: int, shape: argparse.Namespace) -> Patient:
    """A Qwen2-shaped patient with random weights."""
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 32,
        num_key_value_heads=max(1, shape.hidden // 64),
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return load_patient(folder, device=shape.device)


def sequences(patient: Patient, pair: PreferencePair) -> list[tuple[list[int], list[int]]]:
    """The four full sequences of a pair as (prompt, response)."""
    end = end_of_turn(patient.tokenizer, patient.eos_ids)
    answers = [response_ids(patient.tokenizer, text, end) for text in (pair.chosen, pair.rejected)]
    prompts = [prompt_ids(patient.tokenizer, with_system(list(pair.prompt), system)) for system in SYSTEMS]
    return [(prompt, answer) for prompt in prompts for answer in answers]


def batches(rows: list[list[int]], budget: int) -> list[torch.Tensor]:
    """The padded batches, of rows of similar length, that (a) runs through the backbone."""
    rows = sorted(rows, key=len, reverse=True)
    made = []
    while rows:
        count = max(1, budget // len(rows[0]))
        made.append(pad_sequence([torch.tensor(row) for row in rows[:count]], batch_first=True))
        rows = rows[count:]
    return made


@torch.inference_mode()
def bare(lm: SplitLM, made: list[torch.Tensor], device: torch.device) -> None:
    for ids in made:
        lm.hidden(ids.to(device), torch.ones_like(ids, device=device))
    settle(device)


@torch.inference_mode()
def plain(patient: Patient, pairs: list[PreferencePair]) -> None:
    device = patient.model.device
    for pair in pairs:
        for prompt, response in sequences(patient, pair):
            logits = patient.model(torch.tensor([prompt + response], device=device), use_cache=False).logits
            table = logits.float().log_softmax(-1)[0, len(prompt) - 1 : -1]
            table.gather(1, torch.tensor(response, device=device)[:, None]).cpu()


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_parts(device: torch.device) -> dict[str, float]:
    """Wrap the steps of `extract`. The result is updated with the total seconds of each."""
    seconds: dict[str, float] = defaultdict(float)

    def wrap(owner: Any, name: str, part: str) -> None:
        step = getattr(owner, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            settle(device)
            began = now()
            try:
                return step(*args, **kwargs)
            finally:
                settle(device)
                seconds[part] += now() - began

        setattr(owner, name, run)

    wrap(PairEncoder, "encode", "tokenising")
    wrap(Scorer, "_hidden", "backbone")
    wrap(FaceHead, "__call__", "head")
    for name in ("begin", "write", "finish"):
        wrap(RewardsWriter, name, "writing and statistics")
    return seconds


def spread(values: list[float], form: str = "{:.0f}") -> str:
    least, middle, most = (form.format(f(values)) for f in (min, statistics.median, max))
    return f"{middle} ({least}, {most})"


def measure_speed(options: argparse.Namespace) -> list[str]:
    with tempfile.TemporaryDirectory() as scratch:
        patient = build(Path(scratch) / "patient", DATA / "qwen2-tokenizer", 151936, options)
        device, budget = patient.model.device, options.batch_tokens or fitting_batch_tokens(patient)
        pairs = list(islice(read_pairs(HH), options.pairs))
        rows = [prompt + response for pair in pairs for prompt, response in sequences(patient, pair)]
        full = sum(map(len, rows))
        split = [sequences(patient, pair) for pair in pairs]
        shared = sum(len(p[0][0]) + len(p[2][0]) + sum(len(response) for _, response in p) for p in split)
        scored = sum(len(response) for p in split for _, response in p)
        lm, made, source = SplitLM.of(patient.model), batches(rows, budget), DataSettings(source=str(HH))
        parts = timed_parts(device)

        def whole(count: int) -> None:
            with tempfile.TemporaryDirectory() as folder:
                for _ in extract(patient, source, FACES, Path(folder), limit=count, batch_tokens=budget):
                    pass

        ways: dict[str, Callable[[], None]] = {
            "(a) bare": partial(bare, lm, made, device),
            "(b) plain": partial(plain, patient, pairs),
            "(c) extract": partial(whole, options.pairs),
        }
        _ = patient.fingerprint, patient.vocabulary.fingerprint
        bare(lm, made[-1:], device)
        plain(patient, pairs[:1])
        whole(2)
        parts.clear()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds):
            for name, way in ways.items():
                began = now()
                way()
                seconds[name].append(now() - began)
                print(f"round {number + 1} {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
        parameters = sum(p.numel() for p in patient.model.parameters())
        embedding = patient.model.get_input_embeddings().weight.numel()
        a, b, c = seconds.values()
        lines = [
            f"Patient: {parameters / 1e6:.1f} M parameters ({embedding / 1e6:.1f} M of them embedding), hidden "
            f"{options.hidden}, {options.layers} layers, 151,936 rows, {patient.model.dtype}. {len(pairs)} pairs, "
            f"{full / len(pairs):.0f} tokens per pair in four full sequences, {shared / len(pairs):.0f} with prompts "
            f"read once per face, {scored / len(pairs):.0f} positions through the head. Budget {budget} tokens; "
            f"{options.rounds} rounds.",
            "",
            "| way | tokens/s | pairs/s | time of (a) / its time | times (b) |",
            "|---|---|---|---|---|",
        ]
        for name, own in seconds.items():
            lines.append(
                f"| {name} | {spread([full / s for s in own])} | {spread([len(pairs) / s for s in own], '{:.2f}')} "
                f"| {spread([x / y for x, y in zip(a, own, strict=True)], '{:.2f}')} "
                f"| {spread([x / y for x, y in zip(b, own, strict=True)], '{:.2f}')} |"
            )
        total = sum(c)
        parts["the rest"] = total - sum(parts.values())
        lines += [
            "",
            "Where the time of (c) goes: " + ", ".join(f"{k} {v / total:.0%}" for k, v in parts.items()) + ".",
        ]
        return lines


MEMORY = """
import json, sys
from argparse import Namespace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from extract import peak
print(json.dumps(peak(**json.loads(sys.argv[2]))))
"""


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(key))) / 1024


def peak(folder: str, length: int, way: str, device: str) -> float:
    """Peak memory in MiB, beyond the weights, of scoring one pair with answers of ``length`` tokens."""
    patient = load_patient(folder, device=device)
    cuda = patient.model.device.type == "cuda"
    words = patient.tokenizer("once upon a time there was a dog and a cat who went to the sea " * length).input_ids
    text = patient.tokenizer.decode(words[: length - 1], skip_special_tokens=True)
    pair = PreferencePair("1", ({"role": "user", "content": "Tell me a story."},), text, f"A{text}")
    encoder, scorer = PairEncoder(patient, FACES), Scorer(patient, FACES, 4096)

    def run() -> None:
        if way == "plain":
            plain(patient, [pair])
        elif encoded := encoder.encode(pair, lambda _record: None):
            scorer.score([encoded])

    # Weights are mapped from their file and take memory only once they have been read.
    for weight in patient.model.parameters():
        weight.sum()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak (VmHWM)
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def measure_memory(options: argparse.Namespace) -> list[str]:
    lengths = [int(length) for length in options.lengths.split(",")]
    vocabularies = {"qwen2-tokenizer": 151936, "stories260k": 512}
    lines = [
        "| peak beyond the weights, MiB | " + " | ".join(f"answers of {n} tokens" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for name, rows in vocabularies.items():
            build(Path(scratch) / name, DATA / name, rows, options)
            for way in ("extract", "plain"):
                found = []
                for length in lengths:
                    asked = {
                        "folder": str(Path(scratch) / name),
                        "length": length,
                        "way": way,
                        "device": options.device,
                    }
                    command = [sys.executable, "-c", MEMORY, str(Path(__file__).parent), json.dumps(asked)]
                    ran = subprocess.run(command, capture_output=True, text=True, check=False)
                    found.append(f"{json.loads(ran.stdout):.0f}" if ran.returncode == 0 else "does not fit")
                    print(f"{way}, {rows} rows, {length} tokens: {found[-1]} MiB", file=sys.stderr, flush=True)
                lines.append(f"| {way}, {rows:,} rows | " + " | ".join(found) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, help="default: what extract chooses")
    parser.add_argument("--lengths", default="256,1024", help="answer lengths at which memory is measured")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: if others use the machine")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    if options.clock == "cpu":
        global now  # noqa: PLW0603
        now = time.process_time
    if not DATA.is_dir():
        sys.exit(f"there is no folder {DATA}: this benchmark needs its HH-RLHF pairs and Qwen2 tokenizer")
    transformers.utils.logging.disable_progress_bar()
    lines = [f"`python benchmarks/extract.py {' '.join(sys.argv[1:])}`, {time.strftime('%Y-%m-%d')}: "]
    lines[0] += f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.machine()}, "
    lines[0] += f"torch {torch.__version__}, transformers {transformers.__version__}."
    lines += ["", *measure_speed(options)]
    if not options.no_memory:
        lines += ["", *measure_memory(options)]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
