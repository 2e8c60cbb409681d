"""The server under load: how fast it answers many clients, and whether every answer is that of a lone request.

    python benchmarks/serve.py                              # the clinic; about 10 minutes on two cores
    python benchmarks/serve.py --profile smollm2 --seconds 60
    python benchmarks/serve.py --check 60                   # 64 clients for a minute, every answer compared

Each way is a server of its own process, asked by the official client (needs the extra ``serve`` and openai); each
client streams one answer after the other. Servers take turns within a number of clients, so that a busy machine is
unfair to none. Tokens a second are those of all clients; the time to the first token holds the wait in the queue.

- ``patient``: the patient alone, without doctors, served the same way.
- ``guided``: patient and doctors, one batch for all requests.
- ``loop``: the same guided answers, each request decoded by a loop of its own in a thread of its own.

The last table is what a long prompt costs a stream that speaks already: its longest silence, in tokens of its own pace.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from llmdoctor import LLMdoctor
from llmdoctor.decoding.batch import Batch
from llmdoctor.decoding.drafting import AdaptiveLength
from llmdoctor.decoding.rows import Request
from llmdoctor.models import spare_threads
from llmdoctor.serving.engine import Engine, Job

QUESTIONS = (
    "How can I sleep better?",
    "Can I drink coffee in the evening?",
    "My back hurts when I sit for long. What helps?",
    "What should I eat before a run?",
    "I have a cold and a headache. What can I do?",
    "How much water should I drink?",
)
WAYS = ("patient", "guided", "loop")


class Loop(Engine):
    """Every request in a thread and a batch of its own. The models are shared, so the threads take turns."""

    turns = threading.Lock()

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            threading.Thread(target=self._loop, args=(job,), daemon=True).start()

    def _loop(self, job: Job) -> None:
        assistant = self.assistant
        bases = assistant.guidance.mode == "ratio"
        batch = Batch(assistant.patient, assistant.doctors, drafting=AdaptiveLength(), with_bases=bases)
        batch.join([Request(job.prompt, lambda: job.guidance, job.sampling, seed=job.seed)])
        while batch and not job.cancelled:
            with self.turns:
                steps = list(batch.round())
            for step in steps:
                job.drawn += 1
                job.emit(step)


def load(profile: str, way: str, dtype: str) -> LLMdoctor:
    # doctors that are replaced by none leave their mode and strengths behind
    only = {"doctor_checkpoint": None, "mode": "product"} if way == "patient" else {}
    assistant = LLMdoctor.from_profile(profile, dtype=dtype, **only)
    spare_threads(assistant.patient.model)
    return assistant


def serve(profile: str, way: str, dtype: str) -> None:
    """A server on a free port, which it prints."""
    import socket

    import uvicorn

    from llmdoctor.serving.api import create_app

    engine = (Loop if way == "loop" else Engine)(load(profile, way, dtype))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        config = uvicorn.Config(create_app(engine, name=way), log_config=None, timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listening])


@contextmanager
def server(args: argparse.Namespace, way: str) -> Iterator[str]:
    """A server of its own process; its address."""
    command = [sys.executable, __file__, "--profile", args.profile, "--dtype", args.dtype, "--serve", way]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        process.terminate()


@dataclass
class Measured:
    """What clients saw."""

    tokens: int = 0
    answers: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)

    def __iadd__(self, other: "Measured") -> "Measured":
        self.tokens, self.answers = self.tokens + other.tokens, self.answers + other.answers
        self.seconds, self.first = self.seconds + other.seconds, self.first + other.first
        return self


def asked(way: str, question: str, seed: int, tokens: int) -> dict[str, Any]:
    return {
        "model": way,
        "messages": [{"role": "user", "content": question}],
        "seed": seed,
        "max_completion_tokens": tokens,
        "stream": True,
    }


def client(address: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=300)


async def measure(address: str, way: str, clients: int, seconds: float, tokens: int) -> Measured:
    """So many clients ask for some seconds. Tokens count while the time runs, so no slow end is in it."""
    found, began = Measured(seconds=seconds), time.perf_counter()
    numbers = itertools.count()

    async def ask(api: openai.AsyncOpenAI) -> None:
        while time.perf_counter() - began < seconds:
            number = next(numbers)
            asked_at, first = time.perf_counter(), True
            body = asked(way, QUESTIONS[number % len(QUESTIONS)], number, tokens)
            stream = await api.chat.completions.create(**body, extra_body={"llmdoctor": True})
            async for chunk in stream:
                said = getattr(chunk.choices[0], "llmdoctor", None)
                if said and first:
                    found.first.append(time.perf_counter() - asked_at)
                    first = False
                if time.perf_counter() - began >= seconds:
                    await stream.close()
                    break
                found.tokens += len(said["tokens"]) if said else 0
            else:
                found.answers += 1

    async with client(address) as api:
        await asyncio.gather(*(ask(api) for _ in range(clients)))
    return found


async def silences(address: str, way: str, tokens: int, long: str) -> tuple[float, float]:
    """The longest silence within a stream, without and with a long prompt that comes; in mean gaps between tokens."""

    async def gaps(api: openai.AsyncOpenAI, disturbed: bool) -> list[float]:
        came: list[float] = []
        other: asyncio.Task[Any] | None = None
        stream = await api.chat.completions.create(**asked(way, QUESTIONS[0], 1, tokens))
        async for _ in stream:
            came.append(time.perf_counter())
            if disturbed and other is None and len(came) > tokens // 3:
                other = asyncio.create_task(api.chat.completions.create(**{**asked(way, long, 1, 4), "stream": False}))
        if other:
            await other
        return [after - before for before, after in itertools.pairwise(came[1:])]

    async with client(address) as api:
        await gaps(api, disturbed=False)
        calm, disturbed = await gaps(api, disturbed=False), await gaps(api, disturbed=True)
    return max(calm) / statistics.mean(calm), max(disturbed) / statistics.mean(calm)


async def check(address: str, assistant: LLMdoctor, seconds: float, tokens: int) -> str:
    """64 clients, one in ten of whose answers is left in the middle; every other answer is compared with a lone one."""
    seeds, began = range(4), time.perf_counter()
    alone = {
        (question, seed): assistant.generate(question, seed=seed, max_new_tokens=tokens)
        for question in QUESTIONS
        for seed in seeds
    }
    began = time.perf_counter()
    same, different, left = 0, 0, 0

    async def ask(api: openai.AsyncOpenAI, chance: random.Random) -> None:
        nonlocal same, different, left
        while time.perf_counter() - began < seconds:
            question, seed = chance.choice(QUESTIONS), chance.choice(seeds)
            stream = await api.chat.completions.create(**asked("guided", question, seed, tokens))
            if chance.random() < 0.1:
                await anext(aiter(stream))
                await stream.close()
                left += 1
                continue
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            same, different = same + (text == alone[question, seed]), different + (text != alone[question, seed])

    async with client(address) as api:
        await asyncio.gather(*(ask(api, random.Random(i)) for i in range(64)))
    return f"64 clients, {seconds:g} s: {same} answers as alone, {different} others, {left} left by their client"


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def table(args: argparse.Namespace) -> Iterator[str]:
    """The lines of the report."""
    yield f"### {args.profile}, answers of {args.tokens} tokens, {args.repeats} x {args.seconds:g} s each\n"
    yield "| clients | server | tokens/s | of patient | first token, median | 95% |"
    yield "|---|---|---|---|---|---|"
    with ExitStack() as stack:
        addresses = {way: stack.enter_context(server(args, way)) for way in WAYS}
        for way, address in addresses.items():
            asyncio.run(measure(address, way, 2, 3.0, args.tokens))  # warm
        for clients in args.clients:
            found = {way: Measured() for way in WAYS}
            for _ in range(args.repeats):
                for way, address in addresses.items():
                    found[way] += asyncio.run(measure(address, way, clients, args.seconds, args.tokens))
            rates = {way: one.tokens / one.seconds for way, one in found.items()}
            for way, one in found.items():
                share, first = rates[way] / rates["patient"], one.first
                times = f"{percentile(first, 0.5):.3f} s | {percentile(first, 0.95):.3f} s"
                yield f"| {clients} | {way} | {rates[way]:.1f} | {share:.2f} | {times} |"
        yield "\n| server | longest silence, calm | with a long prompt beside |"
        yield "|---|---|---|"
        for way in ("patient", "guided"):
            calm, disturbed = asyncio.run(silences(addresses[way], way, args.tokens, "sleep well " * args.long))
            yield f"| {way} | {calm:.1f} tokens | {disturbed:.1f} tokens |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="clinic")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--long", type=int, default=400, help="words of the long prompt, halved")
    parser.add_argument("--check", type=float, metavar="SECONDS")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.profile, args.serve, args.dtype)
        return
    if args.check:
        with server(args, "guided") as address:
            assistant = load(args.profile, "guided", args.dtype)
            print(asyncio.run(check(address, assistant, args.check, args.tokens)))
        return
    lines = []
    for line in table(args):
        print(line, flush=True)
        lines.append(line)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
