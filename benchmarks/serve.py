"""The server under load: how fast it answers many clients, and whether every answer is that of a lone request.

    python benchmarks/serve.py                              # the clinic; about 10 minutes on two cores
    python benchmarks/serve.py --profile smollm2 --seconds 60
    python benchmarks/serve.py --url http://HOST:PORT/v1 --label vllm   # any other server too, into the same table
    python benchmarks/serve.py --check 60                   # 64 clients for a minute, every answer compared

Each way is a server of its own process, asked by the official client (needs the extra ``serve`` and openai); each
client streams one answer after the other. Servers take turns within a number of clients, so that a busy machine is
unfair to none. Tokens a second are those of all clients; the time to the first token holds the wait in the queue.

- ``patient``: the patient alone, without doctors, served the same way.
- ``guided``: patient and doctors, one batch for all requests.
- ``loop``: the same guided answers, each request decoded by a loop of its own in a thread of its own.

The last table is what a long prompt costs a stream that speaks already: the gaps between its tokens. What was measured
is kept in ``--records``; started again, the program measures only what is missing there.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

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
        # on every connection; else a first token waits 40 ms behind its headers
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        print(listening.getsockname()[1], flush=True)
        config = uvicorn.Config(create_app(engine, name=way), log_config=None, timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listening])


class Server(NamedTuple):
    """Where to ask, for which model, and the process that answers if it is one of ours."""

    address: str
    model: str
    pid: int | None = None

    def cpu(self) -> float:
        """Processor seconds that its process has used; nan where that cannot be known."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except OSError:
            return float("nan")
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def server(args: argparse.Namespace, way: str) -> Iterator[Server]:
    """A server of its own process."""
    command = [sys.executable, __file__, "--profile", args.profile, "--dtype", args.dtype, "--serve", way]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Server(f"http://127.0.0.1:{int(process.stdout.readline())}/v1", way, process.pid)
        process.terminate()


def elsewhere(url: str) -> Server:
    """A server that runs already, of any kind."""
    return Server(url, openai.OpenAI(base_url=url, api_key="none").models.list().data[0].id)


def asked(model: str, question: str, seed: int, tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "seed": seed,
        "max_completion_tokens": tokens,
        "stream": True,
        "logprobs": True,  # which count the tokens of a chunk, whoever sends it
    }


def client(address: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=300)


def tokens_in(chunk: Any) -> int:
    logprobs = chunk.choices[0].logprobs if chunk.choices else None
    return len(logprobs.content or ()) if logprobs else 0


async def measure(server: Server, clients: int, seconds: float, tokens: int) -> dict[str, Any]:
    """So many clients ask for some seconds. Tokens count while the time runs, so no slow end is in it."""
    drawn, answers, first = 0, 0, []
    numbers = itertools.count()
    cpu, began = server.cpu(), time.perf_counter()

    async def ask(api: openai.AsyncOpenAI) -> None:
        nonlocal drawn, answers
        while time.perf_counter() - began < seconds:
            number = next(numbers)
            asked_at, silent = time.perf_counter(), True
            stream = await api.chat.completions.create(
                **asked(server.model, QUESTIONS[number % len(QUESTIONS)], number, tokens)
            )
            async for chunk in stream:
                said = tokens_in(chunk)
                if said and silent:
                    first.append(time.perf_counter() - asked_at)
                    silent = False
                if time.perf_counter() - began >= seconds:
                    await stream.close()
                    break
                drawn += said
            else:
                answers += 1

    async with client(server.address) as api:
        await asyncio.gather(*(ask(api) for _ in range(clients)))
    return {"tokens": drawn, "answers": answers, "seconds": seconds, "cpu": server.cpu() - cpu, "first": first}


async def beside(server: Server, tokens: int, words: int, seed: int) -> dict[str, Any]:
    """The gaps between the tokens of a stream and the time of its answer: calm, and with a long prompt that comes."""
    # another one each time: what was read is known
    long = " ".join(random.Random(seed).choices(("sleep", "water", "pain", "food", "rest", "walk"), k=words))

    async def gaps(api: openai.AsyncOpenAI, disturbed: bool) -> tuple[list[float], float, float]:
        came: list[float] = []
        other: asyncio.Task[float] | None = None

        async def ask_other() -> float:
            began = time.perf_counter()
            await api.chat.completions.create(**{**asked(server.model, long, 1, 2), "stream": False})
            return time.perf_counter() - began

        began = time.perf_counter()
        stream = await api.chat.completions.create(**asked(server.model, QUESTIONS[0], 3, tokens))
        async for chunk in stream:
            came += [time.perf_counter()] * tokens_in(chunk)
            if disturbed and other is None and len(came) >= 5:
                other = asyncio.create_task(ask_other())
        took = time.perf_counter() - began
        waited = await other if other else 0.0
        return [after - before for before, after in itertools.pairwise(came[5:])], took, waited

    async with client(server.address) as api:
        calm, took, _ = await gaps(api, disturbed=False)
        disturbed, longer, waited = await gaps(api, disturbed=True)
    return {"calm": calm, "disturbed": disturbed, "took": took, "longer": longer, "waited": waited}


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


def records(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All measurements: those of ``--records`` and what is missing there, which is added."""
    path: Path = args.records
    known = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    with ExitStack() as stack:
        servers: dict[str, Server] = {}

        def of(way: str) -> Server:
            if way not in servers:
                servers[way] = elsewhere(args.url) if way == args.label else stack.enter_context(server(args, way))
                asyncio.run(measure(servers[way], 2, 3.0, args.tokens))  # warm
            return servers[way]

        def add(key: dict[str, Any], measured: Callable[[], Coroutine[Any, Any, dict[str, Any]]]) -> None:
            if any(key.items() <= one.items() for one in known):
                return
            known.append({**key, **asyncio.run(measured())})
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[-1]) + "\n")
            print(key, flush=True, file=sys.stderr)

        for repeat in range(args.repeats):  # servers take turns, so that a busy machine is unfair to none
            for clients in args.clients:
                for way in args.ways:
                    key = {"profile": args.profile, "clients": clients, "way": way, "repeat": repeat}
                    add(key, lambda way=way, n=clients: measure(of(way), n, args.seconds, args.tokens))  # type: ignore[misc]
        for repeat in range(args.beside):
            for way in args.ways:
                if way != "loop":
                    key = {"profile": args.profile, "beside": args.long, "way": way, "repeat": repeat}
                    add(key, lambda way=way, n=repeat: beside(of(way), args.tokens, args.long, n))  # type: ignore[misc]
    return known


def table(found: Sequence[dict[str, Any]], profile: str) -> Iterator[str]:
    """The lines of the report."""
    mine = [one for one in found if one["profile"] == profile]
    load: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for one in mine:
        if "clients" in one:
            load.setdefault((one["clients"], one["way"]), []).append(one)
    yield f"### {profile}\n"
    yield "| clients | server | tokens/s | of patient | tokens per CPU second | first token, median | 95% | runs |"
    yield "|---|---|---|---|---|---|---|---|"
    for (clients, way), runs in sorted(load.items(), key=lambda one: one[0][0]):
        rate = statistics.median(one["tokens"] / one["seconds"] for one in runs)
        by_repeat = {one["repeat"]: one["tokens"] / one["seconds"] for one in load.get((clients, "patient"), ())}
        shares = [
            one["tokens"] / one["seconds"] / by_repeat[one["repeat"]] for one in runs if by_repeat.get(one["repeat"])
        ]
        share = statistics.median(shares) if shares else float("nan")
        cpu = sum(one["tokens"] for one in runs) / sum(one["cpu"] for one in runs)
        first = [seconds for one in runs for seconds in one["first"]]
        times = f"{percentile(first, 0.5):.3f} s | {percentile(first, 0.95):.3f} s"
        yield f"| {clients} | {way} | {rate:.1f} | {share:.2f} | {cpu:.1f} | {times} | {len(runs)} |"
    neighbours: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for one in mine:
        if "beside" in one:
            neighbours.setdefault((one["beside"], one["way"]), []).append(one)
    if neighbours:
        yield "\nGaps between a stream's tokens: median, 95%, longest, without and with a long prompt that comes.\n"
        yield "| words of the prompt | server | calm | beside it | answer, times as long | the prompt's answer |"
        yield "|---|---|---|---|---|---|"
    for (words, way), runs in neighbours.items():
        calm, disturbed = (
            ", ".join(
                f"{1000 * statistics.median(percentile(one[name], share) for one in runs):.0f}"
                for share in (0.5, 0.95, 1)
            )
            for name in ("calm", "disturbed")
        )
        longer = statistics.median(one["longer"] / one["took"] for one in runs)
        waited = statistics.median(one["waited"] for one in runs)
        yield f"| {words} | {way} | {calm} ms | {disturbed} ms | {longer:.2f} | {waited:.2f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="clinic")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--long", type=int, default=600, help="words of the long prompt")
    parser.add_argument("--beside", type=int, default=5, help="how often a long prompt comes beside a stream")
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--url", help="measure also the server at this address, http://HOST:PORT/v1")
    parser.add_argument("--label", default="vllm", help="its name in the table")
    parser.add_argument(
        "--records", type=Path, default=Path("serve.jsonl"), help="what was measured; goes on from there"
    )
    parser.add_argument("--check", type=float, metavar="SECONDS")
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.profile, args.serve, args.dtype)
        return
    if args.check:
        with server(args, "guided") as one:
            assistant = load(args.profile, "guided", args.dtype)
            print(asyncio.run(check(one.address, assistant, args.check, args.tokens)))
        return
    if args.url and args.label not in args.ways:
        args.ways.append(args.label)
    print("\n".join(table(records(args), args.profile)))


if __name__ == "__main__":
    main()
