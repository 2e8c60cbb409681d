"""The server, asked by the official client and by rude ones: every answer is that of a lone request."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llmdoctor import Guidance, LLMdoctor
from llmdoctor.cli.serve import _bound
from llmdoctor.decoding.caches.dynamic import DynamicKV
from llmdoctor.decoding.rows import Step
from llmdoctor.errors import LLMDoctorError, LoadError, UsageError

openai = pytest.importorskip("openai", reason="the official client is not here: pip install openai")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not here: pip install 'llmdoctor-guided[serve]'")
types = pytest.importorskip("openai.types", reason="the official client is not here: pip install openai")
pytest.importorskip("starlette", reason="the extra `serve` is not here: pip install 'llmdoctor-guided[serve]'")

from llmdoctor.serving.api import Limits, create_app  # noqa: E402 (only where Starlette is)
from llmdoctor.serving.engine import Engine, Job, QueueFullError  # noqa: E402
from llmdoctor.serving.requests import chat_ask, text_ask  # noqa: E402

QUESTION = "How can I sleep better?"
ASKS: list[tuple[str, dict[str, Any]]] = [
    (QUESTION, {"seed": 5}),
    (QUESTION, {"seed": 5, "beta": 3.0}),
    ("Can I drink coffee in the evening?", {"seed": 1, "temperature": 0.0}),
    ("My back hurts when I sit for long. What helps?", {"seed": 2, "temperature": 1.4, "top_p": 0.8}),
    ("Why?", {"seed": 3, "alpha": 0.6, "beta": {"safe": 2.0}}),
    ("I have a cold and a headache, and I cannot sleep at night.", {"seed": 4, "stop": ["a", "e"]}),
    ("How much water should I drink?", {"seed": 6, "beta": 0.0}),
    ("Is running good for me?", {"seed": 7, "dead_zone": 0.0, "top_k": 5}),
    ("What should I eat?", {"seed": 8, "min_p": 0.1, "plausibility": 0.2}),
]


@pytest.fixture(scope="module")
def assistant() -> LLMdoctor:
    return LLMdoctor.from_profile("clinic", dtype="float32", device="cpu")  # in half precision rounding shows


@contextlib.contextmanager
def served(engine: Engine, room: int | None = None, **how: Any) -> Iterator[int]:
    """A server in a thread; its port. With ``room``, the kernel keeps about as many bytes that wait to be sent."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        if room:  # connections have the buffers of the socket that accepts them
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        app = create_app(engine, name="clinic", **how)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port(assistant: LLMdoctor) -> Iterator[int]:
    with served(Engine(assistant)) as number:
        yield number


@pytest.fixture
def client(port: int) -> Iterator[Any]:
    with client_of(port) as one:
        yield one


def client_of(port: int, **how: Any) -> Any:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", max_retries=0, **{"api_key": "none", **how})


def chat(question: str, asked: dict[str, Any], tokens: int = 16, **more: Any) -> dict[str, Any]:
    """Keywords of the client's ``create``; what OpenAI does not have goes through ``extra_body``."""
    own = {"seed", "temperature", "top_p", "stop"}
    return {
        "model": "clinic",
        "messages": [{"role": "user", "content": question}],
        "max_completion_tokens": tokens,
        **{name: value for name, value in asked.items() if name in own},
        "extra_body": {name: value for name, value in asked.items() if name not in own},
        **more,
    }


def test_64_clients_get_what_each_would_get_alone(assistant: LLMdoctor, port: int) -> None:
    """Streamed and whole, with all kinds of guidance and sampling, while others hang up in the middle."""
    alone = [assistant.generate(question, max_new_tokens=16, **asked) for question, asked in ASKS]

    async def ask(client: Any, i: int) -> str:
        question, asked = ASKS[i % len(ASKS)]
        if i % 7 == 6:  # the rude ones
            stream = await client.chat.completions.create(**chat(question, asked, 300, stream=True))
            await anext(aiter(stream))
            await stream.close()
        if i % 2:
            whole = await client.chat.completions.create(**chat(question, asked))
            return str(whole.choices[0].message.content)
        stream = await client.chat.completions.create(**chat(question, asked, stream=True))
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    answers = asyncio.run(all_at_once())
    assert answers == [alone[i % len(ASKS)] for i in range(64)]
    wait_until_idle(port)
    counted = metrics(port)
    assert counted["llmdoctor_tokens_per_second"] > 0
    assert 0 < counted["llmdoctor_draft_acceptance"] < 1
    assert counted["llmdoctor_answers_running"] == counted["llmdoctor_answers_waiting"] == 0
    assert counted['llmdoctor_answers_total{end="failed"}'] == 0
    assert counted['llmdoctor_answers_total{end="cancelled"}'] == 9
    assert counted["llmdoctor_kl_nats_total"] > 0


def test_every_token_carries_what_the_library_gives(assistant: LLMdoctor, client: Any) -> None:
    expected = list(assistant.stream(QUESTION, seed=3, max_new_tokens=12, beta=2.0, top=3))
    asked = {"seed": 3, "beta": 2.0, "llmdoctor": True}
    shown = {"logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**chat(QUESTION, asked, 12, **shown)).choices[0]
    stream = client.chat.completions.create(
        **chat(QUESTION, asked, 12, stream=True, stream_options={"include_usage": True}, **shown)
    )
    opening, *chunks, closing = list(stream)
    assert opening.choices[0].delta.role == "assistant"
    assert (closing.choices, closing.usage.completion_tokens) == ([], 12)
    assert [chunk.choices[0].delta.content for chunk in chunks] == [token.text for token in expected]  # one by one
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 11 + ["length"]
    streamed = [logprob for chunk in chunks for logprob in chunk.choices[0].logprobs.content]
    details = [detail for chunk in chunks for detail in chunk.choices[0].llmdoctor["tokens"]]
    assert [one.token for one in streamed] == [one.token for one in whole.logprobs.content]
    assert [one["id"] for one in details] == [one["id"] for one in whole.llmdoctor["tokens"]]
    for token, logprob, detail in zip(expected, streamed, details, strict=True):
        assert (logprob.token, bytes(logprob.bytes).decode()) == (token.text, token.text)
        assert logprob.logprob == pytest.approx(token.logprob, abs=1e-4)
        assert [top.token for top in logprob.top_logprobs] == [top.text for top in token.top]
        assert (detail["id"], detail["flip"], detail["betas"]) == (token.id, token.flip, dict(token.betas))
        for field in ("patient_logprob", "kl", "values", "doctor_logprobs"):
            assert detail[field] == pytest.approx(getattr(token, field), abs=1e-4), field


def without_extras(record: Any, known: frozenset[str] = frozenset({"llmdoctor"})) -> None:
    """Nothing in this object of the client's is unknown to OpenAI, except what is ours."""
    if isinstance(record, openai.BaseModel):
        assert set(record.model_extra or {}) <= known, record
        for name in type(record).model_fields:
            without_extras(getattr(record, name), known)
    elif isinstance(record, list):
        for one in record:
            without_extras(one, known)


@pytest.mark.parametrize("asked", [{}, {"llmdoctor": True, "n": 2}], ids=["plain", "with ours"])
def test_answers_are_what_openais_own_types_demand(port: int, asked: dict[str, Any]) -> None:
    """The client builds its objects of whatever comes; here they are validated, strictly."""
    spoken = {"messages": [{"role": "user", "content": QUESTION}], "logprobs": True, "top_logprobs": 2}
    ask = {"seed": 3, "max_tokens": 4, "stream_options": {"include_usage": True}, **asked}
    for path, body, whole, part in (
        ("chat/completions", {**spoken, **ask}, types.chat.ChatCompletion, types.chat.ChatCompletionChunk),
        ("completions", {"prompt": QUESTION, "logprobs": 2, **ask}, types.Completion, types.Completion),
    ):
        status, answer = call(port, "POST", f"/v1/{path}", body)
        assert status == 200
        without_extras(whole.model_validate_json(json.dumps(answer), strict=True))
        with raw(port, {**body, "stream": True}, path) as stream:
            chunks = events(stream)
        assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1]["usage"] == answer["usage"]
        for chunk in chunks:
            for choice in chunk["choices"]:
                # what OpenAI sends too, although its types for this endpoint do not say so
                if part is whole and choice["finish_reason"] is None:
                    choice["finish_reason"] = "stop"
            without_extras(part.model_validate_json(json.dumps(chunk), strict=True))


def test_several_answers_have_the_seeds_that_follow(assistant: LLMdoctor, client: Any) -> None:
    expected = [assistant.generate(QUESTION, seed=7 + i, max_new_tokens=10) for i in range(3)]
    answers = client.chat.completions.create(**chat(QUESTION, {"seed": 7}, 10, n=3))
    assert [choice.message.content for choice in answers.choices] == expected
    assert answers.usage.completion_tokens == 30
    assert answers.usage.prompt_tokens == len(assistant.prompt_ids(QUESTION))
    stream = client.chat.completions.create(**chat(QUESTION, {"seed": 7}, 10, n=3, stream=True))
    texts = ["", "", ""]
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == expected


def test_a_long_beginning_is_read_once_and_counted(assistant: LLMdoctor, port: int, client: Any) -> None:
    """Of clients that come together, and of a conversation's next turn."""
    system = {"role": "system", "content": "You are a careful nurse. " * 20}
    asks = [[system, {"role": "user", "content": text}] for text in ("Why?", "What should I eat?", QUESTION)]
    before = metrics(port)

    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as one:
            how = {"model": "clinic", "seed": 1, "max_tokens": 8}
            return await asyncio.gather(*(one.chat.completions.create(messages=ask, **how) for ask in asks))

    answers = [answer.choices[0].message.content for answer in asyncio.run(ask_all())]
    assert answers == [assistant.generate(ask, seed=1, max_new_tokens=8) for ask in asks]
    after = metrics(port)
    assert after["llmdoctor_prefix_hits_total"] - before["llmdoctor_prefix_hits_total"] == 2
    shared = after["llmdoctor_prefix_tokens_total"] - before["llmdoctor_prefix_tokens_total"]
    assert shared > 2 * len(assistant.patient.tokenizer(system["content"]).input_ids)
    assert after["llmdoctor_prefix_bytes"] > 0
    turn = [*asks[0], {"role": "assistant", "content": answers[0]}, {"role": "user", "content": "And then?"}]
    client.chat.completions.create(model="clinic", messages=turn, seed=1, max_tokens=2)
    assert metrics(port)["llmdoctor_prefix_tokens_total"] - after["llmdoctor_prefix_tokens_total"] >= len(
        assistant.prompt_ids(asks[0])
    )


def test_no_answer_is_longer_than_the_server_allows_and_no_body_takes_for_ever(
    assistant: LLMdoctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmdoctor.serving.api._BODY_SECONDS", 0.2)
    with served(Engine(assistant), limits=Limits(output=5)) as port, client_of(port) as client:
        answer = client.chat.completions.create(**chat(QUESTION, {"seed": 5}, 60))
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (5, "length")
        with socket.create_connection(("127.0.0.1", port), timeout=10) as half:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            half.sendall(f"{head}Content-Length: 9\r\n\r\n{{".encode())
            assert half.recv(1000).startswith(b"HTTP/1.1 408")


def test_a_reader_that_never_reads_is_left(
    assistant: LLMdoctor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the kernel's buffers are: some grow to many times the whole answer."""
    monkeypatch.setattr("llmdoctor.serving.api._PULSE", 0.5)
    with served(Engine(assistant), room=4096, limits=Limits(seconds=1.5)) as port:
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 300, "n": 32, "seed": 1}
        body |= {"stream": True, "llmdoctor": True, "logprobs": True, "top_logprobs": 20}
        with raw(port, body, room=4096):
            until = time.monotonic() + 120
            while "a reader was too slow" not in caplog.text:
                assert time.monotonic() < until
                time.sleep(0.05)
            wait_until_idle(port)


def test_plain_completions_continue_text_and_ids(assistant: LLMdoctor, client: Any) -> None:
    ids = assistant.prompt_ids(QUESTION)
    expected = [token.text for token in assistant.stream(QUESTION, seed=2, max_new_tokens=8)]
    done = client.completions.create(model="clinic", prompt=ids, seed=2, max_tokens=8, logprobs=2)
    assert done.choices[0].text == "".join(expected)
    assert done.choices[0].logprobs.tokens == expected
    assert done.choices[0].logprobs.text_offset == [len("".join(expected[:i])) for i in range(8)]
    one, two, alone = (
        client.completions.create(model="clinic", prompt=prompt, seed=seed, max_tokens=8).choices
        for prompt, seed in (("Sleep", 2), (["To", "Sleep"], 1), ([ids[:3], ids], 1))
    )
    assert one[0].text == two[1].text
    assert alone[1].text == "".join(expected)


def test_the_guidance_of_a_running_stream_changes(assistant: LLMdoctor, port: int, client: Any) -> None:
    """From the token on that carries the new numbers, the answer is what the library draws with them."""
    stream = client.chat.completions.create(**chat(QUESTION, {"seed": 4, "llmdoctor": True}, 60, stream=True))
    details: list[dict[str, Any]] = []
    patched: dict[str, Any] = {}
    for chunk in stream:
        details += getattr(chunk.choices[0], "llmdoctor", {"tokens": []})["tokens"]
        if len(details) == 3 and not patched:
            path = f"/v1/streams/{chunk.id}"
            assert call(port, "PATCH", path, {"beta": {"unknown": 1.0}})[0] == 400
            status, patched = call(port, "PATCH", path, {"alpha": 0.7, "beta": {"helpful": 3.0}})
            assert (status, patched["alpha"], patched["beta"]) == (200, 0.7, {"helpful": 3.0, "safe": 0.6})
            assert call(port, "GET", path) == (200, patched)
    changed = [detail["alpha"] for detail in details].index(0.7)
    assert 3 <= changed < len(details)
    before = assistant.guidance
    after = before.replace(alpha=0.7, betas={**before.betas, "helpful": 3.0})
    again: list[int] = []
    read = lambda: after if len(again) >= changed else before  # noqa: E731
    for token in assistant.stream(QUESTION, seed=4, max_new_tokens=60, guidance=read):
        again.append(token.id)
    assert [detail["id"] for detail in details] == again
    assert call(port, "PATCH", f"/v1/streams/{chunk.id}", {"alpha": 1.0})[0] == 404


BAD: list[tuple[Any, int, str]] = [
    (b"", 400, "JSON"),
    (b"{", 400, "JSON"),
    (b"[" * 100_000, 400, "JSON"),
    (b"\xff\xfe", 400, "JSON"),
    (b'{"messages": NaN}', 400, "NaN"),
    (b"[]", 400, "object"),
    ({}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "hi"}, 400, "messages"),
    ({"messages": [1, 2]}, 400, "'role' and 'content', got 1"),
    ({"messages": [{"role": "user"}]}, 400, "content"),
    ({"messages": [{"role": "owner", "content": "hi"}]}, 400, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "text"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "Unicode"),
    ({"model": "gpt-9"}, 404, "gpt-9"),
    ({"tools": [{"type": "function"}]}, 400, "tools"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ({"temprature": 1}, 400, "temperature"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"n": 0}, 400, "n"),
    ({"n": 65}, 400, "64"),
    ({"seed": -1}, 400, "seed"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"stop": ["x"] * 17}, 400, "stop"),
    ({"stop": ""}, 400, "stop"),
    ({"top_logprobs": 2}, 400, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"alpha": -1}, 400, "alpha"),
    ({"alpha": 0, "beta": 0}, 400, "nothing is left"),
    ({"beta": {"nobody": 1}}, 400, "nobody"),
    ({"beta": 1e9}, 400, "beta"),
    ({"mode": "sum"}, 400, "mode"),
    ({"messages": [{"role": "user", "content": "sleep " * 3000}]}, 400, "tokens long"),
    ({"messages": [{"role": "user", "content": "x" * (5 << 20)}]}, 413, "bytes"),
]


@pytest.mark.parametrize(("body", "status", "word"), BAD, ids=lambda value: str(value)[:50])
def test_a_bad_body_is_refused_in_openais_shape(port: int, body: Any, status: int, word: str) -> None:
    if isinstance(body, dict):
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **body} if body else body
    got, answer = call(port, "POST", "/v1/chat/completions", body)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert word in answer["error"]["message"]
    assert "Traceback" not in str(answer)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": ["a", 1] * 1000},
        {"prompt": [{}] * 1000},
        {"prompt": [[{}]] * 1000},
        {"prompt": [[1, {}] * 1000]},
        {"messages": [1] * 1000},
        {"stop": [1] * 1000},
        {"prefix_ids": [{}] * 1000},
        {"beta": {f"doctor {i}": "x" for i in range(1000)}},
        {f"field {i}": 1 for i in range(1000)},
    ],
    ids=lambda wrong: str(wrong)[:20],
)
def test_of_many_mistakes_the_first_is_enough(wrong: dict[str, Any]) -> None:
    """To list a million of them takes minutes, and the event loop answers nobody in that time."""
    asked = {"messages": [{"role": "user", "content": "Hi"}], **wrong}
    with pytest.raises(UsageError) as refused:
        text_ask(wrong) if "prompt" in wrong else chat_ask(asked).conversation()
    found = refused.value.__cause__
    assert found is None or found.error_count() < 9  # type: ignore[attr-defined]


def test_a_stop_string_longer_than_any_answer_costs_nothing(assistant: LLMdoctor) -> None:
    """Compared beginning by beginning for every token, two megabytes would keep all others waiting for hours."""
    expected = assistant.generate(QUESTION, seed=5, max_new_tokens=16)
    body = {"messages": [{"role": "user", "content": QUESTION}], "seed": 5, "max_tokens": 16}
    with served(Engine(assistant), limits=Limits(seconds=60)) as port:
        status, answer = call(port, "POST", "/v1/chat/completions", {**body, "stop": ["x" * (2 << 20), expected + "!"]})
    assert (status, answer["choices"][0]["message"]["content"]) == (200, expected)


def test_the_client_raises_its_own_errors(client: Any, port: int) -> None:
    with pytest.raises(openai.BadRequestError, match="tools") as refused:
        client.chat.completions.create(**chat("Hi", {}), tools=[{"type": "function", "function": {"name": "f"}}])
    assert (refused.value.param, refused.value.code) == ("tools", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert [model.id for model in client.models.list()] == ["clinic"]
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # what another site's page could send
    assert call(port, "POST", "/v1/chat/completions", b"{}", headers=form)[0] == 415
    assert call(port, "GET", "/nowhere")[0] == 404
    assert len(str(call(port, "GET", "/" + "x" * 10_000))) < 500
    assert call(port, "GET", "/v1/completions")[0] == 405


def test_all_but_health_needs_the_key(assistant: LLMdoctor) -> None:
    with served(Engine(assistant), api_key="sesame") as port:
        for path in ("/v1/models", "/metrics", "/v1/streams/x"):
            assert call(port, "GET", path)[0] == 401, path
        assert call(port, "POST", "/v1/chat/completions", {})[0] == 401
        assert call(port, "GET", "/health")[0] == 200
        with client_of(port, api_key="Sesame") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with client_of(port, api_key="sesame") as client:
            assert client.models.list().data
    with served(Engine(assistant), api_key="Schlüssel") as port:
        for sent, status in (("Schlüssel".encode(), 200), ("Schlüssel".encode("latin-1"), 401)):
            assert call(port, "GET", "/v1/models", headers={"Authorization": b"Bearer " + sent})[0] == status


def test_more_than_the_queue_holds_is_refused_and_time_is_limited(assistant: LLMdoctor) -> None:
    engine = Engine(assistant, rows=1, queue=1)
    with served(engine, limits=Limits(seconds=1.5)) as port, client_of(port) as client:
        with client.chat.completions.create(**chat(QUESTION, {"stop": ["~~"], "seed": 1}, 900, stream=True)) as running:
            next(iter(running))
            waiting = client.chat.completions.create(**chat(QUESTION, {}, 2, stream=True))
            with pytest.raises(openai.RateLimitError) as refused:
                client.chat.completions.create(**chat(QUESTION, {}, 2))
            assert refused.value.response.headers["retry-after"] == "1"
        with waiting:  # the first has left, so it is its turn
            assert "".join(chunk.choices[0].delta.content or "" for chunk in waiting)
    with served(Engine(assistant, rows=1), limits=Limits(seconds=0.01)) as port, client_of(port) as client:
        with pytest.raises(openai.InternalServerError, match="time") as late:
            client.chat.completions.create(**chat(QUESTION, {}, 900))
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="time"):
            list(client.chat.completions.create(**chat(QUESTION, {}, 900, stream=True)))


def test_dropped_and_slow_readers_hold_nobody_up(assistant: LLMdoctor, port: int, client: Any) -> None:
    expected = assistant.generate(QUESTION, seed=5, max_new_tokens=16)
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 900, "llmdoctor": True, "seed": 1}
    slow, dropped, whole = (raw(port, {**body, "stream": stream}) for stream in (True, True, False))
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    dropped.recv(100)
    dropped.close()
    whole.close()
    half = socket.create_connection(("127.0.0.1", port))  # a body that never comes
    half.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
    )
    answer = client.chat.completions.create(**chat(QUESTION, {"seed": 5}))
    assert answer.choices[0].message.content == expected
    half.close()
    wait_until_idle(port)
    read = b""
    while not read.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
        read += slow.recv(1 << 20) or pytest.fail("the slow reader's stream broke off")
    slow.close()


def test_nothing_waits_in_the_kernel_for_what_was_sent_before() -> None:
    """Else headers go first, and a first token or a whole answer 40 ms behind them, when the client has confirmed."""

    async def connect() -> int:
        arrived = asyncio.get_running_loop().create_future()

        class Peer(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                arrived.set_result(transport.get_extra_info("socket"))

        with _bound("127.0.0.1", 0) as listening:
            async with await asyncio.get_running_loop().create_server(Peer, sock=listening):
                with socket.create_connection(listening.getsockname()):
                    accepted = await arrived
                    return int(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    assert asyncio.run(connect()) == 1


def test_sigterm_lets_running_streams_end() -> None:
    command = [sys.executable, "-m", "llmdoctor", "serve", "--port", "0", "--grace", "120", "--name", "clinic"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as server:
        assert server.stderr is not None
        said = server.stderr.readline()
        port = int(said.partition("/v1")[0].rpartition(":")[2])
        with client_of(port) as client:
            stream = client.chat.completions.create(**chat(QUESTION, {"seed": 5}, 60, stream=True))
            chunks = [next(iter(stream))]
            server.send_signal(signal.SIGTERM)
            chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason is not None
        assert server.wait(120) == 0
        assert server.stderr.read() == ""


def test_a_stream_that_is_cut_at_the_end_of_the_grace_period_says_so() -> None:
    command = [sys.executable, "-m", "llmdoctor", "serve", "--port", "0", "--grace", "0", "--name", "clinic"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as server:
        assert server.stderr is not None
        port = int(server.stderr.readline().partition("/v1")[0].rpartition(":")[2])
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 900, "n": 16, "stream": True}
        stream = raw(port, body)
        read = stream.recv(100)
        server.send_signal(signal.SIGTERM)
        while got := stream.recv(1 << 20):
            read += got
        stream.close()
        assert server.wait(120) == 0
        assert server.stderr.read() == ""
    *_, error, done = [line for line in read.decode().splitlines() if line.startswith("data: ")]
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"] == {
        "message": "the server is stopping",
        "type": "server_error",
        "param": None,
        "code": "stopping",
    }


class Heard(list[Step | Exception]):
    """What a job emitted; ``end`` is set with the last of it."""

    def __init__(self) -> None:
        super().__init__()
        self.end = threading.Event()

    def __call__(self, event: Step | Exception) -> None:
        self.append(event)
        if isinstance(event, Exception) or event.finish:
            self.end.set()

    def ids(self) -> list[int]:
        return [step.token.id for step in self if isinstance(step, Step)]


def job_of(assistant: LLMdoctor, emit: Any, *, seed: int = 1, tokens: int = 12, top: int = 0) -> Job:
    sampling = assistant.sampling.replace(max_new_tokens=tokens)
    return Job(assistant.prompt_ids(QUESTION), assistant.guidance, sampling, seed, emit, top=top)


def test_everyone_gets_as_many_alternatives_as_asked_for(assistant: LLMdoctor) -> None:
    engine, heard = Engine(assistant), [Heard(), Heard(), Heard()]
    engine.submit([job_of(assistant, one, top=top) for top, one in enumerate(heard)])
    assert all(one.end.wait(20) for one in heard)
    for top, one in enumerate(heard):
        alone = assistant.stream(QUESTION, seed=1, max_new_tokens=12, top=top)
        assert [[a.id for a in step.token.top] for step in one] == [[a.id for a in token.top] for token in alone]
    engine.stop()


def test_a_receiver_that_fails_ends_its_own_answer_only(assistant: LLMdoctor) -> None:
    def fail(_event: Any) -> None:
        raise RuntimeError("gone")

    expected = [token.id for token in assistant.stream(QUESTION, seed=1, max_new_tokens=12)]
    engine, heard = Engine(assistant), Heard()
    engine.submit([job_of(assistant, fail, tokens=100), job_of(assistant, heard)])
    assert heard.end.wait(20)
    assert heard.ids() == expected
    engine.stop()
    with pytest.raises(LLMDoctorError, match="stopping"):
        engine.submit([job_of(assistant, heard)])


def test_a_failed_round_is_told_and_the_next_prompt_is_answered(assistant: LLMdoctor, monkeypatch: Any) -> None:
    """One weight that is not a number makes every log-prob so; when it is mended, the engine goes on."""
    engine, heard, again = Engine(assistant), Heard(), Heard()
    weight = assistant.patient.model.get_output_embeddings().weight
    before = weight[0, 0].item()
    expected = [token.id for token in assistant.stream(QUESTION, seed=1, max_new_tokens=12)]
    weight.data[0, 0] = float("nan")
    engine.submit([job_of(assistant, heard)])
    assert heard.end.wait(20)
    weight.data[0, 0] = before
    assert isinstance(heard[-1], LoadError)
    engine.submit([job_of(assistant, again)])
    assert again.end.wait(20)
    assert again.ids() == expected
    engine.stop()


def test_a_prompt_that_cannot_enter_a_running_batch_waits_for_its_end(assistant: LLMdoctor, monkeypatch: Any) -> None:
    """As behind a cache of an unknown kind: nothing is lost, and the answers are the same."""
    expected = [[token.id for token in assistant.stream(QUESTION, seed=seed, max_new_tokens=12)] for seed in range(3)]
    monkeypatch.setattr(DynamicKV, "can_join", property(lambda _: False))
    engine, heard = Engine(assistant), [Heard(), Heard(), Heard()]
    for seed, one in enumerate(heard):
        engine.submit([job_of(assistant, one, seed=seed)])
        while not heard[0]:  # the first speaks before the others come
            time.sleep(0.001)
    assert all(one.end.wait(20) for one in heard)
    assert [one.ids() for one in heard] == expected
    engine.stop()


def test_stopping_ends_what_runs_and_what_waits(assistant: LLMdoctor) -> None:
    engine, first, second = Engine(assistant, rows=1, queue=1), Heard(), Heard()
    engine.submit([job_of(assistant, first, tokens=900)])
    engine.submit([job_of(assistant, second)])
    with pytest.raises(QueueFullError):
        engine.submit([job_of(assistant, Heard())])
    engine.stop()
    assert [type(heard[-1]).__name__ for heard in (first, second)] == ["StoppedError"] * 2
    assert not engine.alive


def test_guidance_given_by_request_is_checked_as_anywhere(assistant: LLMdoctor) -> None:
    engine = Engine(assistant)
    made = engine.guidance({"alpha": 0.5, "beta": {"safe": 2.0}, "dead_zone": 0.0})
    assert made == Guidance(
        0.5, {"helpful": assistant.beta["helpful"], "safe": 2.0}, "ratio", assistant.guidance.plausibility,
        dead_zones={"helpful": 0.0, "safe": 0.0},
    )  # fmt: skip
    engine.stop()


# --- plain HTTP ------------------------------------------------------------------------------------------------------


def call(port: int, method: str, path: str, body: Any = None, headers: Any = None) -> tuple[int, Any]:
    """The status and the JSON of a request."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before it was read
        connection.request(method, path, data, headers or {"Content-Type": "application/json"})
    answer = connection.getresponse()
    status, text = answer.status, answer.read()
    connection.close()
    return status, json.loads(text)


def raw(port: int, body: dict[str, Any], path: str = "chat/completions", room: int | None = None) -> socket.socket:
    """A connection that has sent a request. With ``room``, the kernel keeps about as many unread bytes."""
    data = json.dumps(body).encode()
    head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection = socket.socket()
    if room:  # has to be said before it connects
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", port))
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def events(stream: socket.socket) -> list[dict[str, Any]]:
    """The server-sent events of a response until it is done."""
    read = b""
    while b"data: [DONE]\n\n" not in read:
        read += stream.recv(1 << 20) or pytest.fail("the stream broke off")
    return [json.loads(line[6:]) for line in read.split(b"\n") if line.startswith(b"data: {")]


def metrics(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    pairs = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    return {name: float(value) for name, _, value in pairs}


def wait_until_idle(port: int, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while (health := call(port, "GET", "/health")[1])["running"] + health["waiting"]:
        assert time.monotonic() < until, health
        time.sleep(0.02)
