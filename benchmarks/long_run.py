"""Whether memory, open handles and speed stay flat: many tokens over many turns, and many loads and unloads.

    python benchmarks/long_run.py [--tokens 50000] [--loads 200]

The first half speaks with the embedded models: conversations of several turns, every third answer cancelled in the
middle, every fifth of several prompts at once. The second half loads models of several architectures, speaks (on a CPU
that records their steps) and drops them, the embedded patient with its doctors among them. A line per tenth of the
way; at the end, growth from the second tenth on, when all that is kept once is there. Speed is per second of this
process's own time on the processor, which other programs touch less than the clock. 0 leaves a half out.
"""

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmdoctor import LLMdoctor
from llmdoctor.profile import load_profile

KINDS = ("llama", "qwen2", "gemma2", "mixtral")
QUESTIONS = ("How can I sleep better?", "How do I clean a keyboard?", "My neighbour is loud. What now?", "And then?")


class Reading(NamedTuple):
    """Of this process: resident memory in MB, open handles, threads; tokens or loads per CPU second."""

    memory: float
    handles: int
    threads: int
    speed: float


def reading(count: int, seconds: float) -> Reading:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    handles, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))  # noqa: PTH208
    return Reading(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, handles, threads, count / seconds)


def readings(
    steps: Iterator[int], total: int, show: Callable[[Reading], None] = lambda _reading: None
) -> list[Reading]:
    """One for each tenth of ``total``; a step says how much of it has been done."""
    found: list[Reading] = []
    done, began = 0, time.process_time()
    for step in steps:
        done += step
        if done >= total / 10:
            found.append(reading(done, time.process_time() - began))
            show(found[-1])
            done, began = 0, time.process_time()
        if len(found) == 10:
            break
    return found


def conversation(length: int = 60, turns: int = 6) -> Iterator[int]:
    """Speak for ever, and yield the tokens of every answer."""
    doctor = LLMdoctor.from_profile("clinic")
    for number in cycle(range(10**9)):
        messages = [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]
        for turn in range(turns):
            stop = length // 2 if (number + turn) % 3 == 0 else length
            stream = doctor.stream(messages, seed=number, max_new_tokens=length, top=10)  # type: ignore[arg-type]
            said = list(islice(stream, stop))
            stream.close()  # type: ignore[attr-defined]
            yield len(said)
            text = "".join(token.text for token in said)
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": QUESTIONS[turn % 4]}]
        if number % 5 == 0:
            answers = doctor.answer_all(list(QUESTIONS), seed=[number] * 4, max_new_tokens=length)
            yield sum(len(answer.tokens) for answer in answers)


def made(folder: Path) -> list[str]:
    """Small models of several architectures with the embedded tokenizer."""
    patient = load_profile("clinic").patient.model
    tokenizer = AutoTokenizer.from_pretrained(patient)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tokenizer), "num_local_experts": 2}
    for kind in KINDS:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **more))
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    return [str(folder / kind) for kind in KINDS]


def loads(folder: Path) -> Iterator[int]:
    """Load, speak and drop for ever; yield 1 for every load."""
    for model in cycle([*made(folder), None]):
        if model is None:
            doctor = LLMdoctor.from_profile("clinic")
        else:
            doctor = LLMdoctor(patient_model=model)
        for _ in range(2):  # the second answer replays recorded steps
            doctor.generate("How?", max_new_tokens=8, seed=1)
        del doctor
        yield 1


def growth(found: list[Reading]) -> str:
    """From the second tenth on: MB, handles, threads, and the speed of the last third relative to the first."""
    first, last = found[1], found[-1]
    speeds = [one.speed for one in found[1:]]
    ratio = statistics.median(speeds[-3:]) / statistics.median(speeds[:3])
    return (
        f"memory {last.memory - first.memory:+.1f} MB, handles {last.handles - first.handles:+d}, "
        f"threads {last.threads - first.threads:+d}, speed x{ratio:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--loads", type=int, default=200)
    given = parser.parse_args()
    torch.set_num_threads(1)

    def show(one: Reading) -> None:
        print(f"  {one.memory:8.1f} MB {one.handles:5} handles {one.threads:4} threads {one.speed:8.1f}/s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for name, steps, total in (
            ("tokens", conversation(), given.tokens),
            ("loads", loads(Path(folder)), given.loads),
        ):
            if not total:
                continue
            print(f"{total} {name}", flush=True)
            print(f"  growth: {growth(readings(steps, total, show))}", flush=True)


if __name__ == "__main__":
    main()
