"""The client of `llmdoctor serve`: the part of `LLMdoctor` that the app and ``compare`` use, over HTTP.

It needs no torch. What a server sends is not trusted: its size is bounded, its types are checked.
"""

import json
import math
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import SplitResult, urlsplit

from pydantic import TypeAdapter, ValidationError

from llmdoctor import __version__
from llmdoctor.errors import LoadError, UsageError
from llmdoctor.harmless import clean, first_line
from llmdoctor.profile import Profile
from llmdoctor.records import Alternative, Answer, GuidedToken, Message
from llmdoctor.schema import checked, shown
from llmdoctor.serving.info import PROTOCOL, Info
from llmdoctor.settings import Guidance, GuidanceFields, Sampling, check_guidance

_CONNECT_SECONDS, _SILENT_SECONDS = 10.0, 60.0  # a server that lives says so every fifteen seconds
_MOST_BYTES, _MOST_MESSAGE, _MOST_DOCTORS = 1 << 20, 300, 64  # of an event or a whole response, of an error
_AT_ONCE = 32  # requests
_PATIENCE = 120.0  # seconds for which a full server is asked again, where many questions are asked
_STRENGTHS = {"betas": "beta", "dead_zones": "dead_zone"}  # the fields of `Guidance`, and their names in a request
_TOKEN = TypeAdapter(GuidedToken)
_Numbers = TypeVar("_Numbers", Alternative, GuidedToken)


class ServerError(LoadError):
    """A server cannot be reached, is none of llmdoctor's, or gives no answer that can be read."""


class BusyError(ServerError):
    """The server's queue is full. ``seconds`` is when it wants to be asked again."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class _NotFoundError(ServerError):
    pass


class _Said(NamedTuple):
    token: GuidedToken
    finish: str | None  # "stop" or "length" behind the last token


class RemoteDoctor:
    """The models of the server at ``url``, as `LLMdoctor` has them here: ``stream``, ``answer_all``, ``guidance``.

    ``guidance`` and ``sampling`` may be set at any time; running streams follow the guidance. ``api_key`` is sent with
    every request. ``profile`` is what the server says of its models and settings.

    Raises UsageError for what is no address, and ServerError where no llmdoctor server answers there.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = _parsed(url)
        self.url = self._url.geturl()
        self._headers = {"Content-Type": "application/json", "User-Agent": f"llmdoctor/{__version__}"}
        if api_key:
            # http.client would show the key in its complaint
            if not re.fullmatch(r"[\x21-\x7e]+", api_key):
                raise UsageError("the API key: expected letters, digits and signs of ASCII, without spaces")
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._hang_ups = 0
        info = self._info()
        self.profile = self._profile(info)
        self.weights = tuple(info.weights)
        self.token_names: Mapping[int, str] = {int(i): clean(name) for i, name in info.token_names.items()}
        self._vocabulary, self.longest_answer = info.vocabulary, info.longest_answer
        self.sampling = self.profile.decode.sampling()
        self._guidance = self.profile.decode.guidance(self.profile.doctors)

    @property
    def doctor_names(self) -> tuple[str, ...]:
        """The names of the server's doctors."""
        return tuple(self.profile.doctors)

    @property
    def guidance(self) -> Guidance:
        """The guidance that the next token is drawn with."""
        return self._guidance

    @guidance.setter
    def guidance(self, guidance: Guidance) -> None:
        self._check(guidance)
        self._guidance = guidance

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        guidance: Guidance | None = None,
        guided: bool = True,
        prefix_ids: Sequence[int] = (),
        force_id: int | None = None,
        top: int = 0,
        prefix_cache: object = None,
        **sampling: Any,
    ) -> Iterator[GuidedToken]:
        """As `LLMdoctor.stream`. The server has caches of its own: ``prefix_cache`` is not used.

        Raises UsageError for settings that cannot be; while it runs also ServerError.
        """
        del prefix_cache
        how = self.sampling.replace(**sampling)
        beginning = {"prefix_ids": list(prefix_ids), "force_id": force_id}
        ask = self._ask(prompt, guidance, how, top=top, guided=guided, **beginning)
        return (said.token for said in ask())

    def answer_all(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        seed: Sequence[int],
        guided: bool = True,
        guidance: Guidance | None = None,
        top: int = 0,
        follow: bool = False,
        rows: int = _AT_ONCE,
        on_token: Callable[[GuidedToken], None] | None = None,
        on_answer: Callable[[int, Answer], None] | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """As `LLMdoctor.answer_all`, at most ``rows`` (and 32) at once. A server that is full is asked again.

        Raises what ``stream`` raises, and UsageError for ``follow``, which servers do not do.
        """
        if follow:
            raise UsageError("a server does not follow answers: ask without --follow")
        how = self.sampling.replace(**sampling)
        asks = [
            self._ask(prompt, guidance or self._guidance, how.replace(seed=own), top=top, guided=guided)
            for prompt, own in zip(prompts, seed, strict=True)
        ]
        events: SimpleQueue[tuple[int, GuidedToken | Answer | BaseException]] = SimpleQueue()
        over = threading.Event()

        def answer(row: int) -> None:
            try:
                tokens, finish = [], None
                for said in self._patiently(asks[row], over):
                    tokens.append(said.token)
                    finish = said.finish
                    events.put((row, said.token))
                text = "".join(token.text for token in tokens)
                events.put((row, Answer(text, tuple(tokens), finish != "length")))
            except BaseException as error:  # else the reader of the queue would wait for ever
                events.put((row, error))

        answers: dict[int, Answer] = {}
        pool = ThreadPoolExecutor(max(1, min(rows, len(asks), _AT_ONCE)), thread_name_prefix="llmdoctor-client")
        try:
            for row in range(len(asks)):
                pool.submit(answer, row)
            while len(answers) < len(asks):
                row, event = events.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, Answer):
                    answers[row] = event
                    if on_answer:
                        on_answer(row, event)
                elif on_token:
                    on_token(event)
        finally:  # an error or Ctrl+C too: the server then stops
            over.set()
            whole = len(answers) == len(asks)
            pool.shutdown(wait=whole, cancel_futures=True)
            if not whole:
                self.hang_up()
        return [answers[row] for row in range(len(asks))]

    def hang_up(self) -> None:
        """End all running streams, from any thread: the one who waits for a token gets ServerError."""
        with self._lock:
            self._hang_ups += 1
            for one in self._sockets:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    # --- asking ------------------------------------------------------------------------------------------------------

    def _check(self, guidance: Guidance) -> None:
        check_guidance(guidance, self.doctor_names)
        if guidance.mode == "ratio" and self.profile.decode.mode != "ratio" and self.doctor_names:
            raise UsageError('mode "ratio" needs the doctors\' bases: the server was not started with --mode ratio')

    def _ask(
        self,
        prompt: str | Sequence[Message],
        guidance: Guidance | None,
        sampling: Sampling,
        *,
        top: int,
        guided: bool,
        **beginning: Any,
    ) -> Callable[[], Iterator[_Said]]:
        """A question whose settings are checked. Every call asks it.

        ``guidance`` None follows the instance's own: what changes while the answer is written is sent to its stream.
        """
        if guidance is not None:
            self._check(guidance)
        if sampling.max_new_tokens > self.longest_answer:
            raise UsageError(
                f"the server's answers have at most {self.longest_answer} tokens, got max_new_tokens="
                f"{sampling.max_new_tokens}: set max_new_tokens={self.longest_answer}"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        how = sampling.model_dump()
        body = {
            "messages": messages,
            "stream": True,
            "llmdoctor": True,
            "top_logprobs": top,
            "max_completion_tokens": how.pop("max_new_tokens"),
            **how,
            **beginning,
        }
        return lambda: self._said(body, guidance, guided=guided)

    def _said(self, body: Mapping[str, Any], fixed: Guidance | None, *, guided: bool) -> Iterator[_Said]:
        guidance = fixed or self._guidance
        count, finish = len(body.get("prefix_ids", ())), None
        with self._opened(
            "POST", "/v1/chat/completions", {**body, **self._strengths(guidance, guided=guided)}
        ) as response:
            for event in self._events(response):
                for data, finish in _choice(event):
                    token = self._token(data, body["top_logprobs"], guided=guided)
                    if token.position != count or count >= body["max_completion_tokens"]:
                        self._unreadable(f"a token with the position {token.position}, where {count} was expected")
                    count += 1
                    yield _Said(token, finish)
                if guided and fixed is None and not finish and self._guidance is not guidance:
                    wanted = self._guidance
                    with suppress(BusyError):  # the next token asks again
                        self._change(event.get("id"), wanted)
                        guidance = wanted
        if not finish:
            self._unreadable("an answer without an end")

    @staticmethod
    def _patiently(ask: Callable[[], Iterator[_Said]], over: threading.Event) -> Iterator[_Said]:
        """The answer; while the server is full, ask again."""
        patient_until = time.monotonic() + _PATIENCE
        while not over.is_set():
            try:
                for said in ask():
                    yield said
                    if over.is_set():
                        return
                return
            except BusyError as error:
                if time.monotonic() > patient_until:
                    raise
                over.wait(error.seconds)

    def _strengths(self, guidance: Guidance, *, guided: bool) -> dict[str, Any]:
        """The guidance as a request states it, for every doctor; the patient alone is that no doctor has a say."""
        guidance = guidance if guided else Guidance()
        stated = guidance.model_dump(include=set(GuidanceFields.model_fields))
        for field, name in _STRENGTHS.items():
            held: Mapping[str, float] = getattr(guidance, field)
            stated[name] = {doctor: held.get(doctor, 0.0) for doctor in self.doctor_names}
        return stated

    # --- what the server says ----------------------------------------------------------------------------------------

    def _info(self) -> Info:
        try:
            with self._opened("GET", "/v1/llmdoctor", None, _CONNECT_SECONDS) as response:
                data = self._json(self._whole(response))
        except (_NotFoundError, UsageError):
            self._stranger()
        if not isinstance(data, dict) or data.get("object") != "llmdoctor.info":
            self._stranger()
        if (spoken := data.get("protocol")) != PROTOCOL:
            raise ServerError(
                f"{self.url} is llmdoctor {clean(str(data.get('version'))[:20])} and speaks version {shown(spoken)} of "
                f"its protocol, this is llmdoctor {__version__} with version {PROTOCOL}: update the older one"
            )
        try:
            return Info.model_validate(data)
        except ValidationError as error:
            self._unreadable(_finding(error))

    def _profile(self, info: Info) -> Profile:
        try:
            profile = checked(Profile, info.profile)
        except UsageError as error:
            self._unreadable(f"{error} (llmdoctor {info.version} there, {__version__} here)")
        if len(profile.doctors) > _MOST_DOCTORS:
            self._unreadable(f"more than {_MOST_DOCTORS} doctors")
        return profile

    def _stranger(self) -> NoReturn:
        raise ServerError(
            f"{self.url} is not an llmdoctor server, or an older one: expected the address that `llmdoctor serve` says"
        )

    def _unreadable(self, why: str) -> NoReturn:
        raise ServerError(f"{self.url} sent what cannot be read: {_line(why)}")

    def _token(self, data: Any, top: int, *, guided: bool) -> GuidedToken:
        """The record that the server's detail describes; of the patient alone without the doctors' numbers."""
        try:
            token = _TOKEN.validate_json(json.dumps(_filled(data)), strict=True)
        except ValidationError as error:
            self._unreadable(_finding(error))
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            self._unreadable(f"a token: {error}")
        names = set(self.doctor_names)
        numbers = [token.values, token.betas, token.doctor_logprobs, *(one.doctor_logprobs for one in token.top)]
        ids = [token.id, *(one.id for one in token.top)]
        if not all(set(one) == names for one in numbers):
            self._unreadable("a token without the numbers of every doctor")
        if not all(0 <= i < self._vocabulary for i in ids) or len(token.top) > top + 2:
            self._unreadable("a token that is not in the vocabulary, or too many alternatives")
        if guided:
            return token
        alternatives = tuple(_without_doctors(one) for one in token.top)
        return _without_doctors(token, values={}, betas={}, top=alternatives)

    # --- HTTP --------------------------------------------------------------------------------------------------------

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    @contextmanager
    def _opened(
        self, method: str, path: str, body: Mapping[str, Any] | None, silent: float = _SILENT_SECONDS
    ) -> Iterator[HTTPResponse]:
        """A response with status 200. Raises UsageError for what the server finds wrong with the request."""
        host, port, hang_ups = str(self._url.hostname), self._url.port, self._hang_ups
        if self._url.scheme == "https":
            connection: HTTPConnection = HTTPSConnection(host, port, timeout=_CONNECT_SECONDS, context=self._tls)
        else:
            connection = HTTPConnection(host, port, timeout=_CONNECT_SECONDS)
        try:
            connection.connect()
        except (OSError, ValueError) as error:
            connection.close()
            reason = "no answer" if isinstance(error, TimeoutError) else _reason(error)
            raise ServerError(
                f"{self.url} cannot be reached ({reason}): expected a running `llmdoctor serve`; check the address"
            ) from error
        held = connection.sock
        with self._lock:
            self._sockets.add(held)
        response = None
        try:
            if self._hang_ups != hang_ups:  # while it was connecting
                raise ConnectionAbortedError("this side hung up")
            held.settimeout(silent)
            connection.request(method, self._url.path + path, None if body is None else json.dumps(body), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                self._refused(response)
            yield response
        except TimeoutError as error:
            raise ServerError(f"{self.url} has said nothing for {silent:g} seconds: try again") from error
        except (OSError, HTTPException, ValueError) as error:
            raise ServerError(f"{self.url} hung up ({_reason(error)}): is it still running? Try again") from error
        finally:
            with self._lock:
                self._sockets.discard(held)
            if response is not None:
                response.close()
            connection.close()

    def _whole(self, response: HTTPResponse) -> bytes:
        data = response.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            self._unreadable(f"more than {_MOST_BYTES:,} bytes")
        return data

    def _json(self, data: bytes) -> Any:
        try:
            return json.loads(data, parse_constant=_no_number)
        except (ValueError, RecursionError):
            return None

    def _refused(self, response: HTTPResponse) -> NoReturn:
        said = self._json(self._whole(response))
        message = _error_message(said)
        match response.status:
            case 401 | 403:
                wrong = "refuses this API key" if "Authorization" in self._headers else "needs an API key"
                raise ServerError(f"{self.url} {wrong}: set LLMDOCTOR_API_KEY (or --api-key) to the server's")
            case 429:
                raise self._busy(message, response)
            case 503 if not message:  # of uvicorn, which has as many connections as it takes
                raise self._busy("too many connections", response)
            case 404 | 405 | 501:
                raise _NotFoundError(f"{self.url}: {message or 'no such page'}; check the address")
            case 400 | 413 if message:
                raise UsageError(f"the server: {message}")
            case status:
                raise ServerError(f"{self.url} answers with status {status}: {message or 'it does not say why'}")

    def _busy(self, message: str, response: HTTPResponse) -> BusyError:
        after = response.headers.get("Retry-After", "")
        seconds = float(after) if re.fullmatch(r"\d{1,4}", after) else 1.0
        return BusyError(f"{self.url} is full ({message}): try again in a moment", min(max(seconds, 0.5), 10.0))

    def _change(self, stream: Any, guidance: Guidance) -> None:
        """Guide a running answer so from its next token on. One that has just ended needs nothing."""
        if not isinstance(stream, str) or not re.fullmatch(r"[\w-]{1,100}", stream):
            self._unreadable(f"the id {shown(stream)} of an answer")
        try:
            with self._opened("PATCH", f"/v1/streams/{stream}", self._strengths(guidance, guided=True)) as response:
                self._whole(response)
        except _NotFoundError:
            pass

    def _events(self, response: HTTPResponse) -> Iterator[Mapping[str, Any]]:
        """The server-sent events of a response. Raises what the server says went wrong."""
        while line := response.readline(_MOST_BYTES + 1):
            if len(line) > _MOST_BYTES:
                self._unreadable(f"an event of more than {_MOST_BYTES:,} bytes")
            if not line.startswith(b"data:"):
                continue  # an empty line, or a sign of life
            if (data := line[5:].strip()) == b"[DONE]":
                return
            event = self._json(data)
            if not isinstance(event, dict):
                self._unreadable("an event that is not a JSON object")
            if message := _error_message(event):
                raise ServerError(f"the server: {message}; try again")
            yield event
        raise ServerError(f"{self.url} hung up before the answer was finished: is it still running? Try again")


def _parsed(url: str) -> SplitResult:
    """``http://HOST:PORT``, from what a user types: also HOST:PORT, and the address that OpenAI's clients take."""
    wrong = UsageError(f"--server: expected an address like http://HOST:8000, got {shown(_without_user(url))}")
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError:
        raise wrong from None
    if "@" in parts.netloc:
        raise UsageError("--server: an address holds no user or password here: set LLMDOCTOR_API_KEY to the API key")
    if not re.fullmatch(r"[\x21-\x7e]+", url) or parts.scheme not in ("http", "https") or not parts.hostname:
        raise wrong
    if parts.query or parts.fragment or port == 0:
        raise wrong
    return parts._replace(path=parts.path.rstrip("/").removesuffix("/v1"))


def _without_user(url: str) -> str:
    return re.sub("[^/]*@", "", url)


def _choice(event: Mapping[str, Any]) -> list[tuple[Any, str | None]]:
    """The tokens of a chunk; behind the last one why the answer ends with it."""
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    detail = choice.get("llmdoctor") if isinstance(choice, dict) else None
    tokens = detail.get("tokens") if isinstance(detail, dict) else None
    if not isinstance(choice, dict) or not isinstance(tokens, list):
        return []  # the first chunk says who speaks
    finish = choice.get("finish_reason")
    ends = [None] * (len(tokens) - 1) + [finish if finish in ("stop", "length") else None]
    return list(zip(tokens, ends, strict=False))


def _filled(data: Any) -> Any:
    """A token with the numbers that JSON does not have: no log-prob is impossible, no KL infinite, no value unknown."""
    if not isinstance(data, dict):
        raise TypeError(f"expected an object, got {shown(data)}")
    unknown = {"kl": math.inf}

    def fill(key: str, value: Any, missing: float = -math.inf) -> Any:
        if isinstance(value, dict):
            return {name: fill(name, one, math.nan if key == "values" else missing) for name, one in value.items()}
        if isinstance(value, list):
            return [fill(key, one) for one in value]
        return unknown.get(key, missing) if value is None else value

    return {key: fill(key, value) for key, value in data.items()}


def _without_doctors(record: _Numbers, **changes: Any) -> _Numbers:
    return replace(record, doctor_logprobs={}, **changes)


def _error_message(said: Any) -> str:
    """What OpenAI's error object says, in one line; empty where it is none."""
    error = said.get("error") if isinstance(said, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return _line(message) if isinstance(message, str) else ""


def _line(text: str) -> str:
    return " ".join(clean(text[: 2 * _MOST_MESSAGE]).split())[:_MOST_MESSAGE]


def _reason(error: Exception) -> str:
    said = getattr(error, "verify_message", "") or getattr(error, "strerror", "") or first_line(error)
    return _line(str(said))


def _finding(error: ValidationError) -> str:
    """The first of pydantic's findings, in a line."""
    first = error.errors(include_url=False, include_context=False)[0]
    return f"{'.'.join(map(str, first['loc']))[:80]}: {first['msg']}, got {shown(first['input'])}"


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
