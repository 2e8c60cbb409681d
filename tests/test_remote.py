"""The client of a server: what it gives is what the models give here; what a server may send is not trusted."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmdoctor import Guidance, GuidedToken, LLMdoctor, LLMDoctorError
from llmdoctor.cli import options
from llmdoctor.cli.chat import _profile_of
from llmdoctor.cli.main import app
from llmdoctor.comparing import Column, Run
from llmdoctor.errors import UsageError
from llmdoctor.records import Message, Question
from llmdoctor.serving import client
from llmdoctor.serving.client import BusyError, RemoteDoctor, ServerError
from llmdoctor.serving.info import About
from llmdoctor.sessions import Session
from llmdoctor.tui import launch
from llmdoctor.tui.generation import Ended, Part, Worker

Served = Callable[..., AbstractContextManager[str]]
TALK: list[Message] = [
    {"role": "user", "content": "How can I sleep better?"},
    {"role": "assistant", "content": "Keep it dark."},
    {"role": "user", "content": "Any more?"},
]
HOW: list[dict[str, Any]] = [
    {"seed": 5},
    {"seed": 5, "guided": False},
    {"seed": 6, "guidance": Guidance(0.7, {"helpful": 3.0, "safe": 0.0}, "ratio", 0.01, {"helpful": 0.5})},
    {"seed": 7, "guidance": Guidance(1.0, {"helpful": 0.5, "safe": 0.5}, "product"), "temperature": 1.4, "top_k": 9},
    {"seed": 8, "temperature": 0.0, "stop": ("e t", "q")},
    {"seed": 9, "min_p": 0.05, "top_p": 0.9, "no_repeat_ngram": 2, "max_new_tokens": 30},
]
KEY = "a-secret"


@pytest.fixture(scope="module")
def here() -> LLMdoctor:
    """The models, with settings that are not the defaults; in half precision rounding would show."""
    loaded = LLMdoctor.from_profile("clinic", dtype="float32", device="cpu")
    loaded.sampling = loaded.sampling.replace(stop=("zzz",), max_new_tokens=16)
    return loaded


@pytest.fixture(scope="module")
def url(here: LLMdoctor, served: Served) -> Iterator[str]:
    about = About(profile="mine", patient="clinic/patient", doctors={"helpful": "clinic/helpful"})
    with served(here, api_key=KEY, about=about) as address:
        yield address


@pytest.fixture
def there(url: str) -> RemoteDoctor:
    return RemoteDoctor(url, KEY)


def same(one: GuidedToken, other: GuidedToken) -> None:
    """Equal, up to the rounding of a batch of several."""
    for field in ("position", "id", "text", "flip", "alpha", "betas", "patient_id", "patient_text"):
        assert getattr(one, field) == getattr(other, field), field
    assert one.values == pytest.approx(other.values, abs=1e-4)
    mine, yours = ({a.id: a for a in token.top if a.logprob > -8} for token in (one, other))  # others may tie
    assert mine.keys() == yours.keys()
    for a, b in ((one, other), *((mine[i], yours[i]) for i in mine)):
        assert a.text == b.text
        assert (a.logprob, a.patient_logprob) == pytest.approx((b.logprob, b.patient_logprob), abs=1e-4)
        assert a.doctor_logprobs == pytest.approx(b.doctor_logprobs, abs=1e-4)
    assert [mine[i].rank for i in mine] == [yours[i].rank for i in mine]
    assert [mine[i].patient_rank for i in mine] == pytest.approx([yours[i].patient_rank for i in mine], rel=0.02)
    assert one.kl == pytest.approx(other.kl, abs=1e-4)


def test_it_knows_the_servers_models_and_settings(here: LLMdoctor, there: RemoteDoctor, url: str) -> None:
    assert there.doctor_names == here.doctor_names
    assert there.token_names == here.token_names
    assert (there.guidance, there.sampling) == (here.guidance, here.sampling)
    assert (there.profile.name, there.profile.patient.model) == ("mine", "clinic/patient")
    assert [doctor.checkpoint for doctor in there.profile.doctors.values()] == ["clinic/helpful", "safe"]
    assert RemoteDoctor(url.removeprefix("http://") + "/v1/", KEY).url == url


@pytest.mark.parametrize("how", HOW, ids=range(len(HOW)))
def test_every_token_is_the_one_of_the_models_here(here: LLMdoctor, there: RemoteDoctor, how: dict[str, Any]) -> None:
    """From the first token, behind a beginning, and behind a forced token."""
    expected = list(here.stream(TALK, top=2, **how))
    for one, other in zip(expected, there.stream(TALK, top=2, **how), strict=True):
        same(one, other)
    begun = {**how, "prefix_ids": [token.id for token in expected[:4]], "force_id": expected[1].id, "top": 10}
    for one, other in zip(here.stream(TALK, **begun), there.stream(TALK, **begun), strict=True):
        same(one, other)


def test_a_stop_string_of_the_server_can_be_taken_away(here: LLMdoctor, served: Served) -> None:
    said = [token.text for token in here.stream("Why?", seed=1)]
    with served(here) as address:
        there = RemoteDoctor(address)
        here.sampling, before = here.sampling.replace(stop=(said[3],)), here.sampling
        try:
            assert len(list(there.stream("Why?", seed=1, stop=(said[3],)))) < len(said)
            assert [token.text for token in there.stream("Why?", seed=1, stop=())] == said
        finally:
            here.sampling = before


def test_a_running_answer_follows_the_guidance(here: LLMdoctor, there: RemoteDoctor) -> None:
    """From the token on that carries the new numbers, the answer is what the models draw with them."""
    before, ids, changed = there.guidance, [], -1
    after = before.replace(alpha=0.7, betas={"helpful": 3.0, "safe": 0.0})
    for token in there.stream(TALK, seed=4, max_new_tokens=200):
        ids.append(token.id)
        if len(ids) == 3:
            with pytest.raises(UsageError, match="no doctor"):
                there.guidance = before.replace(betas={"unknown": 1.0})
            there.guidance = after
        if changed < 0 and token.alpha == 0.7:
            changed = len(ids) - 1
            assert token.betas == {"helpful": 3.0, "safe": 0.0}
    assert changed >= 3
    again: list[int] = []
    for token in here.stream(
        TALK, seed=4, max_new_tokens=200, guidance=lambda: after if len(again) >= changed else before
    ):
        again.append(token.id)
    assert ids == again


def test_a_comparison_is_the_one_of_the_models_here(here: LLMdoctor, there: RemoteDoctor) -> None:
    asked = [Question("a", ("How can I sleep better?", "Why?")), Question("b", ("What should I eat?",))]

    def compared(models: Any) -> list[Any]:
        how = models.sampling.replace(max_new_tokens=8)
        columns = [Column("patient", models, None, how), Column("guided", models, models.guidance, how)]
        heard: list[str] = []
        run = Run(asked, 3, samples=2, rows=3, on_token=lambda column, _token: heard.append(column))
        found = [result.to_dict() for result in run.compare(columns)]
        assert len(heard) == sum(len(one[side]["tokens"]) for one in found for side in ("patient", "guided"))
        return [(one["id"], one["turn"], one["sample"], one[s]["text"], one[s]["finished"], one["settings"])
                for one in found for s in ("patient", "guided")]  # fmt: skip

    assert compared(there) == compared(here)


def running(address: str) -> tuple[int, int]:
    import urllib.request

    with urllib.request.urlopen(f"{address}/health") as answer:
        data = json.load(answer)
    return data["running"], data["waiting"]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_leaves_an_answer_ends_it_on_the_server(here: LLMdoctor, served: Served) -> None:
    """Closed by its reader; hung up from another thread, while the reader waits; by an error between many answers."""
    with served(here, engine={"rows": 2, "queue": 2}) as address:
        there = RemoteDoctor(address)
        stream = there.stream(TALK, max_new_tokens=200, seed=3)
        next(stream)
        stream.close()
        until(lambda: running(address) == (0, 0))

        caught: list[Exception] = []
        told = threading.Event()

        def read() -> None:
            try:
                for _ in there.stream(TALK, max_new_tokens=200, seed=3):
                    told.set()
                    time.sleep(0.01)
            except LLMDoctorError as error:
                caught.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        assert told.wait(10)
        there.hang_up()
        reader.join(10)
        assert isinstance(caught[0], ServerError)
        until(lambda: running(address) == (0, 0))

        def stop(_token: GuidedToken) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            there.answer_all(["Why?"] * 2, seed=[1, 2], max_new_tokens=200, on_token=stop)
        until(lambda: running(address) == (0, 0))


def test_a_full_server_is_told_at_once_and_asked_again_for_many_answers(here: LLMdoctor, served: Served) -> None:
    with served(here, engine={"rows": 1, "queue": 0}) as address:
        there = RemoteDoctor(address)
        stream = there.stream(TALK, max_new_tokens=200, seed=3)
        next(stream)
        with pytest.raises(BusyError, match=r"is full .*try again"):
            next(there.stream("Why?", seed=1))
        stream.close()
        until(lambda: running(address) == (0, 0))
        expected = [answer.text for answer in here.answer_all(["Why?"] * 2, seed=[1, 2])]
        assert [answer.text for answer in there.answer_all(["Why?"] * 2, seed=[1, 2])] == expected


def test_what_cannot_be_asked_is_refused_before_it_is_sent(there: RemoteDoctor) -> None:
    for how, words in (
        ({"temperature": -1}, "temperature"),
        ({"max_new_tokens": 100_000}, "max_new_tokens=4096"),
        ({"guidance": Guidance(0, {"helpful": 0.0})}, "nothing is left"),
    ):
        with pytest.raises(UsageError, match=words):
            there.stream("Why?", **how)
    with pytest.raises(UsageError, match="no token with the id"):  # the server knows the gaps
        next(there.stream("Why?", prefix_ids=[10**6]))
    with pytest.raises(UsageError, match="prefix_ids"):
        next(there.stream("Why?", prefix_ids=[9] * 20))


@pytest.mark.parametrize(
    "address", ["", "ftp://a", "http://", "http://a b", "http://a:x", "http://a/?q=1", "http://a:0"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(UsageError, match="--server: expected an address"):
        RemoteDoctor(address)


def test_secrets_are_never_shown(url: str) -> None:
    for address, key in ((url, "wrong-secret"), (url, None), (url, "new\nline-secret"), ("http://u:secret@host", None)):
        with pytest.raises(LLMDoctorError) as caught:
            RemoteDoctor(address, key)
        assert "secret" not in str(caught.value)
        assert "API" in str(caught.value)
    assert "secret" not in repr(RemoteDoctor(url, KEY))


# --- servers that are none, or are hostile ----------------------------------------------------------------------------


@contextmanager
def answering(*responses: bytes) -> Iterator[str]:
    """A server that answers so, connection by connection, and hangs up; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for response in responses:
                connection, _ = listening.accept()
                with connection, suppress(ConnectionResetError):  # a client that has had enough
                    data = b""
                    while b"\r\n\r\n" not in data:
                        data += connection.recv(1 << 16)
                    connection.sendall(response)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def http(body: Any, status: str = "200 OK", kind: str = "application/json") -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content


INFO: dict[str, Any] = {
    "object": "llmdoctor.info",
    "protocol": 1,
    "version": "0.1.0",
    "profile": {"name": "p", "patient": {"model": "m"}, "doctors": {"d": {"checkpoint": "c"}}},
    "weights": [],
    "token_names": {"1": "end"},
    "vocabulary": 10,
    "longest_answer": 100,
}


def with_doctors(*names: str) -> bytes:
    return http(INFO | {"profile": {**INFO["profile"], "doctors": {name: {"checkpoint": "c"} for name in names}}})


TOKEN: dict[str, Any] = {
    "position": 0,
    "id": 3,
    "text": "a",
    "patient_logprob": None,
    "doctor_logprobs": {"d": -1.0},
    "logprob": -1,
    "values": {"d": 0.5},
    "flip": False,
    "kl": 0.1,
    "alpha": 1.0,
    "betas": {"d": 0.8},
    "top": [],
    "patient_id": 3,
    "patient_text": "a",
}


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (http({"error": {"message": "Not Found"}}, "404 Not Found"), "not an llmdoctor server"),
        (http(b"<html>hello</html>", kind="text/html"), "not an llmdoctor server"),
        (http([1]), "not an llmdoctor server"),
        (http({"object": "list", "data": []}), "not an llmdoctor server"),
        (http({"error": {"message": "no"}}, "401 Unauthorized"), "needs an API key"),
        (http(b"", "302 Found"), "status 302"),
        (http({"error": {"message": "\x1b[31mboom\n\n" + "x" * 10_000}}, "500 Error"), "boom x"),
        (http(INFO | {"protocol": 2, "version": "9\x1b[2J"}), "update the older"),
        (http(INFO | {"protocol": "1"}), "update the older"),
        (http(INFO | {"vocabulary": "10"}), "vocabulary"),
        (http(INFO | {"vocabulary": 0}), "vocabulary"),
        (http(INFO | {"token_names": {"one": "end"}}), "token_names"),
        (http(INFO | {"profile": {"name": "p"}}), "patient"),
        (http(INFO | {"profile": {**INFO["profile"], "colour": 1}}), "colour"),
        (with_doctors("a\x1b[0m"), "may hold only"),
        (with_doctors(*(f"d{i}" for i in range(99))), "64"),
        (http(b'{"object": "llmdoctor.info", "protocol": NaN}'), "not an llmdoctor server"),
        (http(b"[" * 100_000), "not an llmdoctor server"),
        (http(b" " * (2 << 20)), "bytes"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "hung up"),
        (b"", "hung up"),
        (b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"object', "not an llmdoctor server"),
        (b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n", "hung up"),
    ],
)  # fmt: skip
def test_one_line_says_what_a_server_is_not(response: bytes, words: str) -> None:
    with answering(response) as address, pytest.raises(ServerError) as caught:
        RemoteDoctor(address)
    message = str(caught.value)
    assert words in message
    assert message.isprintable()
    assert len(message) < 600


OTHER = {"id": 1, "text": "", "patient_logprob": 0, "doctor_logprobs": {"d": 0}, "logprob": 0}


def events(*data: Any, end: bytes = b"data: [DONE]\n\n") -> bytes:
    lines = [b"data: " + (one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n\n" for one in data]
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + b": still here\n\n" + b"".join(lines) + end


def nested(depth: int) -> list[Any]:
    return [nested(depth - 1)] if depth else []


def chunk(finish: str | None = None, **token: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish, "llmdoctor": {"tokens": [TOKEN | token]}}
    return {"id": "chatcmpl-1", "choices": [choice]}


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (events(chunk()), "without an end"),
        (events(chunk(), end=b""), "hung up before"),
        (events(chunk(id="3")), "id"),
        (events(chunk(id=10)), "vocabulary"),
        (events(chunk(id=-1)), "vocabulary"),
        (events(chunk(text=["a"])), "text"),
        (events(chunk(position=1)), "position 1"),
        (events(chunk(flip=1)), "flip"),
        (events(chunk(values={})), "every doctor"),
        (events(chunk(values={"d": "much"})), "values"),
        (events(chunk(betas={"\x1b": 1.0})), "every doctor"),
        (events(chunk(top=[{"id": 1}])), "top"),
        (events(chunk(top=[OTHER] * 3)), "many"),
        (events(chunk(top=nested(500))), "cannot be read"),
        (events(b"{"), "not a JSON object"),
        (events(b'{"a": ' + b"9" * 5000 + b"}"), "not a JSON object"),
        (events(b"x" * (2 << 20)), "bytes"),
        (events({"error": {"message": "the answer was \x1b[31mnot finished"}}), "not finished"),
        (events(*[chunk(position=i) for i in range(9)]), "position 8"),
        (events(*[chunk()] * 0), "without an end"),
    ],
)  # fmt: skip
def test_what_a_hostile_server_streams_is_refused_in_one_line(response: bytes, words: str) -> None:
    with answering(http(INFO), response) as address, pytest.raises(ServerError) as caught:
        list(RemoteDoctor(address).stream("Why?", max_new_tokens=8))
    message = str(caught.value)
    assert words in message
    assert message.isprintable()
    assert len(message) < 600


def test_numbers_that_json_does_not_have_come_back(there: RemoteDoctor) -> None:
    with answering(http(INFO), events(chunk("stop", kl=None, values={"d": None}))) as address:
        (token,) = RemoteDoctor(address).stream("Why?", max_new_tokens=8)
    assert (token.patient_logprob, token.kl) == (float("-inf"), float("inf"))
    assert token.values["d"] != token.values["d"]


def test_who_hangs_up_while_a_stream_connects_is_heard(there: RemoteDoctor, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = HTTPConnection.connect

    def slowly(connection: HTTPConnection) -> None:
        connect(connection)
        there.hang_up()  # as another thread does meanwhile

    monkeypatch.setattr(HTTPConnection, "connect", slowly)
    with pytest.raises(ServerError, match="hung up"):
        next(there.stream("Why?", seed=1))


def test_a_silent_server_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerError, match=r"said nothing for 0\.3 seconds"):
            RemoteDoctor(address)
    with pytest.raises(ServerError, match="cannot be reached"):
        RemoteDoctor(address)


# --- the commands -----------------------------------------------------------------------------------------------------


def command(*arguments: str, question: str = "") -> subprocess.CompletedProcess[str]:
    """A command of a process of its own, and whether it has loaded torch."""
    code = (
        f"import sys; sys.argv = ['llmdoctor', *{arguments!r}]\nfrom llmdoctor.cli.main import run\n"
        "try: run()\nfinally: print([m for m in ('torch', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    own = {name: value for name, value in os.environ.items() if not name.startswith("LLMDOCTOR_")}
    env = {**own, "LLMDOCTOR_API_KEY": KEY}
    return subprocess.run(
        [sys.executable, "-c", code], input=question, text=True, capture_output=True, env=env, timeout=300, check=False
    )


def test_a_plain_conversation_needs_no_models(here: LLMdoctor, url: str) -> None:
    lines = "How can I sleep better?\n/set helpful=2 max_new_tokens=12\nWhy?\n"
    done = command("chat", "--server", url, "--seed", "2", "--beta", "safe=0", question=lines)
    guidance = here.guidance.replace(betas={"helpful": 1.0, "safe": 0.0})
    first = "".join(token.text for token in here.stream("How can I sleep better?", seed=2, guidance=guidance)).strip()
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, first)
    assert done.stderr.splitlines()[-1] == "[]"
    assert "helpful=2 safe=0" in done.stderr
    assert KEY not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--doctor", "d", "--device", "cpu", "--no-speculation"), "leave out --doctor, --speculation, --device"),
        (("--beta", "other=1"), "no doctor named 'other'"),
        (("--api-key", "wrong"), "refuses this API key"),
    ],
)
def test_a_mistake_is_one_line(options: tuple[str, ...], words: str, url: str) -> None:
    done = command("chat", "--server", url, *options)
    assert done.returncode in (2, 3)
    assert len(done.stderr.splitlines()) == 2
    assert words in done.stderr


def test_the_app_leaves_a_silent_server_at_once() -> None:
    """The next answer need not wait for it."""
    with answering(http(INFO)) as address:  # the next connection stands, and nobody takes it
        there = RemoteDoctor(address)
        there.sampling = there.sampling.replace(max_new_tokens=9)
        worker = Worker(lambda _progress: there, there.sampling)
        worker.start()
        worker.speak([Part("patient", TALK), Part("guided", TALK)], 1, there.sampling)
        until(lambda: bool(there._sockets))
        worker.cancel()
        until(lambda: any(isinstance(event, Ended) for event in worker.events))
        assert worker.events[-1] == Ended(1, "interrupted")
        worker.close()
        assert not worker.alive


def test_compare_on_a_server_is_compare_here(here: LLMdoctor, url: str, tmp_path: Path) -> None:
    question, file = "What should I eat?", tmp_path / "answers.jsonl"
    asked = ("compare", question, "--server", url, "--seed", "4", "--vs", "helpful=3", "--output", str(file))
    done = command(*asked, "--json")
    found = json.loads(done.stdout)
    expected = here.compare(question, seed=4)
    strong = here.guidance.replace(betas={**here.guidance.betas, "helpful": 3.0})
    assert found["patient"]["text"] == expected.patient.text
    assert found["guided"]["text"] == expected.guided.text
    assert found["vs"][0]["answer"]["text"] == here.generate(question, seed=4, guidance=strong)
    assert found["settings"] == json.loads(json.dumps(dict(expected.settings)))
    assert "[]" in done.stderr.splitlines()
    pages = [tmp_path / f"answers.{kind}" for kind in ("html", "svg", "markdown")]
    again = command(*asked, *(part for page in pages for part in (f"--{page.suffix[1:]}", str(page))))
    assert (again.returncode, again.stdout) == (0, "")
    assert "holds all 3 answers" in again.stderr
    assert "[]" in again.stderr.splitlines()
    for page in pages:
        words = re.sub(r"<[^>]+>|&#160;|\s", "", page.read_text())
        assert expected.guided.text.split()[0] in words, page


def test_a_sweep_and_a_budget_on_a_server(here: LLMdoctor, url: str, tmp_path: Path) -> None:
    page = tmp_path / "sweep.svg"
    how = ["compare", "Why?", "--server", url, "--api-key", KEY, "--seed", "4", "--json"]
    swept = CliRunner().invoke(app, [*how, "--sweep", "beta=0,1", "--svg", str(page)])
    first, last = (point["measures"]["kl_per_token"]["value"] for point in json.loads(swept.stdout)["points"])
    ones = dict.fromkeys(here.guidance.betas, 1.0)
    expected = here.compare("Why?", seed=4, guidance=here.guidance.replace(betas=ones))
    assert (first, last) == (0, pytest.approx(expected.metrics["kl_per_token"], abs=1e-4))
    assert "KL per token" in page.read_text()
    found = CliRunner().invoke(app, [*how, "--kl-budget", "0.2", "--max-new-tokens", "4"])
    budget = json.loads(found.stdout)["kl_budget"]
    tried = [one["kl_per_token"] for one in budget["tried"]]
    assert budget["kl_per_token"]["value"] == min(tried, key=lambda kl: abs(kl - 0.2)) > 0


def test_comparisons_of_a_server_are_browsed(here: LLMdoctor, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the screen is given, without the screen."""
    posted: list[Any] = []

    def browse(source: Callable[..., None], **_how: Any) -> int:
        source(posted.append, lambda: None)
        return 0

    monkeypatch.setattr(launch, "browse_comparisons", browse)
    monkeypatch.setattr(options, "require_screen", lambda *_: None)
    asked = ["compare", "Why?", "--server", url, "--api-key", KEY, "--seed", "4", "--tui"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    (found,) = (one for one in posted if not isinstance(one, str))
    assert found.guided.text == here.compare("Why?", seed=4).guided.text
    assert len(found.guided.tokens[0].top) >= 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--vs", "doctor=x"), "--vs: a server has its own models"),
        (("--vs", "system_prompt=x"), "--vs: a server has its own models"),
        (("--follow",), "leave out --follow"),
        (("--top", "21", "--json"), "less than or equal to 20"),
    ],
)
def test_what_a_server_cannot_compare_is_one_line(options: tuple[str, ...], words: str, url: str) -> None:
    done = command("compare", "Why?", "--server", url, *options)
    assert (done.returncode, done.stdout) == (2, "")
    line, *rest = done.stderr.splitlines()
    assert words in line
    assert rest in (["[]"], [])  # while requests run the process ends at once


def test_a_conversation_held_on_a_server_says_where_to_go_on() -> None:
    session = Session.new({"name": "p", "server": "http://host:8000"})
    with pytest.raises(UsageError, match="add --server http://host:8000"):
        _profile_of(session)
