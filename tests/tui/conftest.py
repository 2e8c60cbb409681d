"""A fake assistant whose every probability is known, and how a test drives the app."""

import asyncio
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import pytest
from textual import events

from llmdoctor.errors import UsageError
from llmdoctor.records import Alternative, GuidedToken
from llmdoctor.sessions import SessionStore
from llmdoctor.settings import Guidance, Sampling, check_guidance
from llmdoctor.tui.app import ChatApp
from llmdoctor.tui.config import Config
from llmdoctor.tui.start import Start

WORDS = (" sun", " moon", " star", " rain", " wind", " snow", " sky", "")  # the last one ends an answer
END = len(WORDS) - 1
PATIENT = (0.30, 0.20, 0.15, 0.11, 0.09, 0.08, 0.05, 0.02)
DOCTORS = {
    "helpful": (0.02, 0.08, 0.10, 0.10, 0.15, 0.20, 0.33, 0.02),
    "safe": (0.05, 0.40, 0.20, 0.10, 0.10, 0.08, 0.05, 0.02),
}


def product(guidance: Guidance) -> list[float]:
    """pi ∝ patient^alpha · prod doctor^beta, as natural log-probs."""
    logits = [
        guidance.alpha * math.log(p) + sum(b * math.log(DOCTORS[n][i]) for n, b in guidance.betas.items())
        for i, p in enumerate(PATIENT)
    ]
    total = math.log(sum(map(math.exp, logits)))
    return [logit - total for logit in logits]


class FakeAssistant:
    """Draws every token from the same known distributions; a token's randomness depends on seed and position only.

    ``gate`` (a semaphore) makes every token wait for a ``release``. Answers never end by themselves before
    ``shortest`` tokens. "fail" as a question raises UsageError at its fourth token, "crash" something unforeseen.
    """

    doctor_names = tuple(DOCTORS)
    token_names: ClassVar[dict[int, str]] = {END: "end of answer <end>"}

    def __init__(self, shortest: int = 0, gate: threading.Semaphore | None = None, pause: float = 0.0) -> None:
        self._guidance = Guidance(betas={"helpful": 0.8, "safe": 0.4})
        self.shortest, self.gate, self.pause = shortest, gate, pause
        self.asked: list[tuple[list[Any], dict[str, Any]]] = []
        self.open_streams = 0

    @property
    def guidance(self) -> Guidance:
        return self._guidance

    @guidance.setter
    def guidance(self, guidance: Guidance) -> None:
        check_guidance(guidance, self.doctor_names)
        self._guidance = guidance

    def stream(self, prompt: Any, **how: Any) -> Iterator[GuidedToken]:
        self.asked.append((list(prompt), how))
        return self._stream(prompt[-1]["content"], how)

    def _stream(self, question: str, how: Mapping[str, Any]) -> Iterator[GuidedToken]:
        self.open_streams += 1
        try:
            start = len(how["prefix_ids"])
            for position in range(start, how["max_new_tokens"]):
                if self.gate is not None:
                    assert self.gate.acquire(timeout=20)
                if position == 3 and question == "fail":
                    raise UsageError("the prompt is too long")
                if position == 3 and question == "crash":
                    raise ValueError("matrix of the wrong\nshape")
                time.sleep(self.pause)
                forced = how["force_id"] if position == start else None
                token = self._token(position, how, forced)
                yield token
                if token.id == END:
                    return
        finally:
            self.open_streams -= 1

    def _token(self, position: int, how: Mapping[str, Any], forced: int | None) -> GuidedToken:
        guidance = (how.get("guidance") or self._guidance) if how["guided"] else Guidance()
        logps = product(guidance)
        temperature = how["temperature"]
        weights = [math.exp(logp / temperature) if temperature else logp == max(logps) for logp in logps]
        if position < self.shortest:
            weights[END] = 0.0
        drawn = random.Random(f"{how['seed']}:{position}").choices(range(len(WORDS)), weights)[0]
        chosen = drawn if forced is None else forced
        names = self.doctor_names if how["guided"] else ()
        order = sorted(range(len(WORDS)), key=lambda i: -logps[i])
        listed = list(dict.fromkeys([*order[: how["top"]], 0, chosen]))
        return GuidedToken(
            position=position,
            id=chosen,
            text=WORDS[chosen],
            patient_logprob=math.log(PATIENT[chosen]),
            doctor_logprobs={name: math.log(DOCTORS[name][chosen]) for name in names},
            logprob=logps[chosen],
            values={name: math.log(DOCTORS[name][chosen]) + 2.0 for name in names},
            flip=order[0] != 0,
            kl=sum(math.exp(x) * (x - math.log(p)) for x, p in zip(logps, PATIENT, strict=True)),
            alpha=guidance.alpha,
            betas=dict(guidance.betas),
            top=tuple(
                Alternative(
                    i,
                    WORDS[i],
                    math.log(PATIENT[i]),
                    {name: math.log(DOCTORS[name][i]) for name in names},
                    logps[i],
                    rank=order.index(i) + 1,
                    patient_rank=i + 1,
                )
                for i in listed
            ),
        )


class Driver:
    """An app under test: keys, waiting, and what it shows."""

    def __init__(self, app: Any, pilot: Any) -> None:
        self.app, self.pilot = app, pilot

    async def until(self, condition: Callable[[], Any], what: str = "") -> None:
        """Wait until it holds; fail after ten seconds."""
        for _ in range(1000):
            if condition():
                await self.pilot.pause()
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"never happened: {what or condition}\n{self.text()}")

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    async def type(self, text: str) -> None:
        """Text into the prompt, as a paste, and Enter."""
        prompt = self.app.chat.query_one("#prompt")
        prompt.focus()
        prompt.text = text
        await self.press("enter")

    async def typed_ahead(self, text: str) -> None:
        """Letters that all wait in the queue before the first one is handled, as from a slow line."""
        for letter in text:
            self.app.post_message(events.Key("slash" if letter == "/" else letter, letter))

    async def ask(self, text: str) -> None:
        """A question, until it is answered."""
        before = len(self.app.chat.turns)
        await self.type(text)
        await self.until(lambda: self.app.chat.live is None and len(self.app.chat.turns) > before, "an answer")

    async def idle(self) -> None:
        """Until nothing is generated or waiting to be."""
        chat = self.app.chat
        await self.until(lambda: chat.live is None and not chat.rerun.pending, "the end of the answer")

    @property
    def strips(self) -> list[Any]:
        return list(self.app.screen._compositor.render_strips())

    def text(self) -> str:
        """The screen as text."""
        return "\n".join(strip.text.rstrip() for strip in self.strips)

    def words(self, which: str) -> str:
        """One side's whole text."""
        return "\n".join(self.app.chat.view(which).lines).strip()

    @property
    def notices(self) -> str:
        return "\n".join(str(notice.message) for notice in self.app.notices)


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    for name in [name for name in os.environ if name.startswith("LLMDOCTOR_")]:
        monkeypatch.delenv(name, raising=False)
    for name in ("NO_COLOR", "TMUX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TEXTUAL_ANIMATIONS", "none")
    monkeypatch.setenv("LLMDOCTOR_SESSIONS", str(tmp_path / "sessions.sqlite3"))
    monkeypatch.setattr("llmdoctor.tui.clipboard.to_desktop", lambda _text: False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def store(tmp_path: Any) -> SessionStore:
    return SessionStore(tmp_path / "sessions.sqlite3")


@pytest.fixture
def make_app(store: SessionStore) -> Callable[..., ChatApp]:
    """``make_app(assistant, config=..., **start)``."""

    def make(assistant: Any = None, *, config: Config | None = None, **start: Any) -> ChatApp:
        speaker = assistant or FakeAssistant(shortest=6)
        how = {
            "load": lambda _progress: speaker,
            "models": "tiny + helpful, safe",
            "guidance": Guidance(betas={"helpful": 0.8, "safe": 0.4}),
            "sampling": Sampling(max_new_tokens=24),
            "seed": 1,
            "profile": {"patient": {"model": "tiny"}, "doctors": {"helpful": {}, "safe": {}}},
            "store": store,
        }
        return ChatApp(Start(**{**how, **start}), config or Config())

    return make


@pytest.fixture
def drive() -> Callable[..., None]:
    """``drive(app, steps, size=(120, 40))``: run the app and the coroutine function on a `Driver` of it."""

    def run(app: Any, steps: Any, size: tuple[int, int] = (120, 40)) -> None:
        async def inside() -> None:
            async with app.run_test(size=size, notifications=True) as pilot:
                driver = Driver(app, pilot)
                if isinstance(app, ChatApp):
                    await driver.until(lambda: len(app.screen_stack) > 1 and app.screen.is_mounted, "the screen")
                await steps(driver)

        asyncio.run(inside())

    return run
