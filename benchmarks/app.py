"""How much the full-screen app slows the generator down, and how fast it responds to keys while tokens stream.

    python benchmarks/app.py [--tokens 5000] [--rounds 3] [--clinic]

Runs the real app in a pseudo-terminal (120x40), types characters while it streams, and measures the time from writing
a key until it is drawn. For comparison, the same worker thread runs in a process without the app. The two alternate.
The generator is a fake one that waits as if for an accelerator (4 ms per token, without the GIL). With --clinic it is
the embedded models, whose arithmetic shares the cores of this machine with the screen.
"""

import argparse
import atexit
import fcntl
import json
import os
import pty
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEYS = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÐÑÒÓÔÕÖØÙÚÛÜÝÞ"  # nothing else that is drawn contains any of these
PACE = 0.004
IDLE = 6.0  # seconds until the app has started
CONTROL = 8  # keys typed before anything streams


class Paced:
    """A fake assistant: one token every ``PACE`` seconds, with all its numbers and ten alternatives."""

    doctor_names = ("helpful", "safe")

    def __init__(self) -> None:
        from llmdoctor.settings import Guidance

        self.guidance = Guidance(betas={"helpful": 0.8, "safe": 0.4})

    def stream(self, _prompt: Any, **how: Any) -> Iterator[Any]:
        from llmdoctor.records import Alternative, GuidedToken

        due = time.perf_counter()
        for position in range(how["max_new_tokens"]):
            due = max(due + PACE, time.perf_counter() - PACE)
            time.sleep(max(0.0, due - time.perf_counter()))
            wave = (position * 37 % 200 - 100) / 50
            doctors = {"helpful": -1.0 + wave / 4, "safe": -1.5}
            top = tuple(Alternative(i, f" word{i}", -1.0 - i, doctors, -1.5 - i) for i in range(10))
            yield GuidedToken(
                position, 1, f" word{position % 97}", -2.0, doctors, -1.2, {"helpful": wave, "safe": -wave},
                position % 9 == 0, 0.1, 1.0, dict(self.guidance.betas), top,
            )  # fmt: skip


def load(clinic: bool) -> Any:
    if not clinic:
        return Paced()
    from llmdoctor import LLMdoctor

    return LLMdoctor.from_profile("clinic")


def settings(tokens: int, clinic: bool) -> Any:
    from llmdoctor.settings import Sampling

    return Sampling(max_new_tokens=tokens if not clinic else 240, temperature=1.0)


def question() -> list[dict[str, str]]:
    return [{"role": "user", "content": "How can I sleep better?"}]


def alone(tokens: int, clinic: bool, out: Path) -> None:
    """The worker thread, drained 30 times per second by a loop that does nothing else."""
    from llmdoctor.tui.generation import Ended, Loaded, Part, Spoken, Worker

    worker = Worker(lambda _progress: load(clinic), settings(tokens, clinic))
    worker.start()
    while not any(isinstance(event, Loaded) for event in worker.drain()):
        time.sleep(0.01)
    counted, started = 0, time.perf_counter()
    for seed in range(1000):
        worker.speak([Part("guided", question())], seed, settings(tokens, clinic))  # type: ignore[list-item, arg-type]
        ended = False
        while not ended:
            time.sleep(1 / 30)
            events = worker.drain()
            counted += sum(isinstance(event, Spoken) for event in events)
            ended = any(isinstance(event, Ended) for event in events)
        if counted >= tokens:
            break
    out.write_text(json.dumps({"speed": counted / (time.perf_counter() - started)}))
    worker.close()


def app(tokens: int, clinic: bool, out: Path) -> None:
    """The app itself. A timer asks the question again and again until there are enough tokens."""
    from llmdoctor.sessions import SessionStore
    from llmdoctor.settings import Guidance
    from llmdoctor.tui.app import ChatApp, run
    from llmdoctor.tui.config import Config
    from llmdoctor.tui.start import Start

    start = Start(
        load=lambda _progress: load(clinic),
        models="benchmark",
        guidance=Guidance(betas={"helpful": 0.8, "safe": 0.4}),
        sampling=settings(tokens, clinic),
        store=SessionStore(out.with_suffix(".sqlite3")),
    )
    screen = ChatApp(start, Config())
    counted = [0, 0.0, 0.0]

    def again() -> None:
        chat = screen.chat
        if chat.assistant is None or chat.live is not None or not (out.parent / "go").exists():
            return
        if chat.turns:
            counted[0] += len(chat.turns[-1].guided.tokens)
        else:
            counted[1], counted[2] = time.perf_counter(), time.thread_time()
        if counted[0] >= tokens:
            took = time.perf_counter() - counted[1]
            busy = time.thread_time() - counted[2]
            out.write_text(json.dumps({"speed": counted[0] / took, "drawing": busy / took}))
            screen.exit(0)
            return
        from llmdoctor.sessions import Turn

        turns = (*chat.turns, Turn("How can I sleep better?", len(chat.turns)))
        if clinic:  # its context is short: every question is a new conversation
            chat.history.turns, turns = (), turns[-1:]
        chat.answering.begin(turns, {"guided": (0, None)})

    screen.call_later(lambda: screen.set_interval(0.05, again))
    run(screen)


def measured(mode: str, tokens: int, clinic: bool) -> tuple[dict[str, float], list[float], list[float]]:
    """Run one mode in a new process. Returns its speed, and for the app the milliseconds of keys: idle, streaming."""
    out = Path(tempfile.mkdtemp()) / "result.json"
    command = [sys.executable, __file__, "--tokens", str(tokens), "--mode", mode, "--out", str(out)]
    command += ["--clinic"] if clinic else []
    if mode == "alone":
        subprocess.run(command, check=True)
        return json.loads(out.read_text()), [], []
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    child = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    seen: dict[str, float] = {}
    pressed: dict[str, float] = {}
    stop = threading.Event()

    def typist() -> None:
        time.sleep(IDLE)
        for number, key in enumerate(KEYS):
            if stop.wait(0.35):
                return
            if number == CONTROL:  # the first keys are typed while nothing streams
                (out.parent / "go").touch()
                time.sleep(1)
            pressed[key] = time.perf_counter()
            os.write(ours, key.encode())

    typing = threading.Thread(target=typist)
    typing.start()
    tail = b""
    atexit.register(child.kill)
    while child.poll() is None:
        if not select.select([ours], [], [], 0.2)[0]:
            continue
        try:
            tail = tail[-4:] + os.read(ours, 1 << 16)
        except OSError:
            break
        now = time.perf_counter()
        for key in KEYS:
            if key in pressed and key not in seen and key.encode() in tail:
                seen[key] = now
    stop.set()
    typing.join()
    child.wait()
    os.close(ours)
    took = {key: 1000 * (seen[key] - pressed[key]) for key in KEYS if key in seen}
    idle = [took[key] for key in KEYS[:CONTROL] if key in took]
    return json.loads(out.read_text()), idle, [took[key] for key in KEYS[CONTROL:] if key in took]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clinic", action="store_true")
    parser.add_argument("--mode", choices=["alone", "app"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.mode:
        (alone if given.mode == "alone" else app)(given.tokens, given.clinic, given.out)
        return
    ratios, idle_keys, keys = [], [], []
    for number in range(given.rounds):
        without, _, _ = measured("alone", given.tokens, given.clinic)
        within, idle, times = measured("app", given.tokens, given.clinic)
        ratios.append(within["speed"] / without["speed"])
        idle_keys += idle
        keys += times
        print(
            f"round {number + 1}: {without['speed']:.1f} tokens/s without the app, {within['speed']:.1f} in it "
            f"({ratios[-1]:.3f}); {len(times)} keys, median {statistics.median(times):.1f} ms, "
            f"worst {max(times):.1f} ms; drawing took {within['drawing']:.0%} of a core",
            flush=True,
        )
    ordered = sorted(keys)
    print(
        f"speed in the app / without it: median {statistics.median(ratios):.3f} "
        f"(from {min(ratios):.3f} to {max(ratios):.3f}); key to screen: median {statistics.median(keys):.1f} ms, "
        f"(while nothing streams {statistics.median(idle_keys):.1f} ms), "
        f"95% {ordered[int(0.95 * len(ordered))]:.1f} ms, worst {ordered[-1]:.1f} ms of {len(keys)}; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
