"""The HTTP interface: OpenAI's completions, and PATCH for the guidance of an answer while it is written. No tensors."""

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llmdoctor.assistant import Continuation, continued_seed, seeds_of
from llmdoctor.decoding.rows import Step
from llmdoctor.errors import DataError, LLMDoctorError, UsageError
from llmdoctor.schema import shown
from llmdoctor.serving.engine import Engine, Job, LateError, QueueFullError, StoppedError, TooLongError
from llmdoctor.serving.info import About, info
from llmdoctor.serving.payloads import Shape, usage
from llmdoctor.serving.requests import ChatAsk, TextAsk, UnsupportedError, chat_ask, guidance_change, text_ask
from llmdoctor.settings import Sampling

_BODY_SECONDS = 30.0  # that a body may take to arrive
_PULSE = 15.0  # seconds after which a silent stream says that it lives
_LIVE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # or proxies collect a stream
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Bounds of a request: its body in bytes, its answers in tokens, and the seconds until they are finished."""

    body: int = 4 << 20
    output: int = 4096
    seconds: float = 600.0


class _RefusedError(Exception):
    """An HTTP status with OpenAI's error object."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 and status != 429 else "server_error"
        self.status = status
        self.error = {
            "message": message,
            "type": "rate_limit_error" if status == 429 else kind,
            "param": param,
            "code": code,
        }


def create_app(
    engine: Engine,
    *,
    name: str,
    limits: Limits | None = None,
    api_key: str | None = None,
    about: About | None = None,
) -> Starlette:
    """The server's ASGI application. ``name`` is the model's; with ``api_key`` all but /health needs it as a bearer.

    ``about`` is what /v1/llmdoctor says beside what the engine knows. The engine stops when the application shuts down.
    """
    return _Api(engine, name, limits or Limits(), api_key, about or About()).app()


@dataclass(eq=False)
class _Answering:
    """The answers to one request, while they are written."""

    shape: Shape
    jobs: list[Job]
    events: "asyncio.Queue[tuple[int, Step | Exception]]" = field(default_factory=asyncio.Queue)

    def usage(self, choices: int) -> dict[str, int]:
        """OpenAI counts a prompt once, however many answers it gets."""
        prompts = sum(len(job.prompt) for job in self.jobs[::choices])
        return usage(prompts, sum(job.drawn for job in self.jobs))


class _Api:
    def __init__(self, engine: Engine, name: str, limits: Limits, api_key: str | None, about: About) -> None:
        self.engine, self.name, self.limits, self.about = engine, name, limits, about
        self._key = api_key.encode() if api_key else None
        self._running: dict[str, _Answering] = {}
        self._began = int(time.time())
        # tokenizers may take long over a long text, and are not made for several threads
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="llmdoctor-reader")

    def app(self) -> Starlette:
        stream = "/v1/streams/{id}"
        return Starlette(
            routes=[
                self._route("POST", "/v1/chat/completions", self.chat),
                self._route("POST", "/v1/completions", self.text),
                self._route("GET", "/v1/llmdoctor", self.info),
                self._route("GET", "/v1/models", self.models),
                self._route("GET", "/v1/models/{id:path}", self.model),
                self._route("GET", stream, self.stream),
                self._route("PATCH", stream, self.change),
                self._route("GET", "/metrics", self.metrics),
                self._route("GET", "/health", self.health, public=True),
            ],
            exception_handlers={HTTPException: _unrouted},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(self.engine.stop)
        self._reader.shutdown(wait=False)

    def _route(
        self, method: str, path: str, endpoint: Callable[[Request], Awaitable[Response]], *, public: bool = False
    ) -> Route:
        async def handle(request: Request) -> Response:
            try:
                if not public:
                    self._require_key(request)
                response = await endpoint(request)
            except ClientDisconnect:
                response = Response(status_code=499)
            except Exception as error:  # every mistake is answered in OpenAI's shape
                response = _error(_refusal(error))
            self.engine.metrics.requests[path, response.status_code] += 1
            return response

        return Route(path, handle, methods=[method])

    def _require_key(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")  # as it was sent
        if self._key is not None and not hmac.compare_digest(given, self._key):
            raise _RefusedError(401, "expected this server's API key as a bearer token", code="invalid_api_key")

    # --- endpoints ---------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        ask = chat_ask(await self._body(request))
        return await self._answer(request, ask, [ask.conversation()])

    async def text(self, request: Request) -> Response:
        ask = text_ask(await self._body(request))
        return await self._answer(request, ask, ask.prompts())

    async def info(self, _request: Request) -> Response:
        return _json(info(self.engine, self.name, self.limits.output, self.about))

    async def models(self, _request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        self._require_model(request.path_params["id"])
        return _json(self._model())

    async def stream(self, request: Request) -> Response:
        return _json(_guidance(self._found(request)))

    async def change(self, request: Request) -> Response:
        """Change the guidance of all answers of a running request, from their next token on."""
        answering = self._found(request)
        given = guidance_change(await self._body(request))
        guidance = self.engine.guidance(given, answering.jobs[0].guidance)
        for job in answering.jobs:
            job.guidance = guidance
        return _json(_guidance(answering))

    async def metrics(self, _request: Request) -> Response:
        running, waiting = self.engine.load
        text = self.engine.metrics.text(
            running=running,
            waiting=waiting,
            acceptance=self.engine.assistant.acceptance,
            prefixes=self.engine.prefixes,
        )
        return Response(text, media_type="text/plain; version=0.0.4")

    async def health(self, _request: Request) -> Response:
        running, waiting = self.engine.load
        alive = self.engine.alive
        status = {"status": "ok" if alive else "stopped", "running": running, "waiting": waiting}
        return _json(status, 200 if alive else 503)

    # --- their parts -------------------------------------------------------------------------------------------------

    async def _body(self, request: Request) -> Mapping[str, Any]:
        # a page of another origin can send any other type without asking the browser first
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise _RefusedError(415, "expected the header Content-Type: application/json")
        data = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self.limits.body:
                        raise _RefusedError(413, f"the body is too large: expected at most {self.limits.body:,} bytes")
        except TimeoutError:
            raise _RefusedError(408, f"the body did not arrive within {_BODY_SECONDS:g} seconds") from None
        try:
            body = json.loads(data, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise _RefusedError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
        if not isinstance(body, dict):
            raise _RefusedError(400, f"expected a JSON object as the body, got {shown(body)}")
        return body

    def _model(self) -> dict[str, Any]:
        doctors = list(self.engine.assistant.doctor_names)
        return {
            "id": self.name,
            "object": "model",
            "created": self._began,
            "owned_by": "llmdoctor",
            "max_model_len": self.engine.longest + 1,
            "llmdoctor": {"doctors": doctors, **self.engine.assistant.guidance.to_dict()},
        }

    def _require_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            message = f"there is no model {shown(name)}: this server has {self.name!r}"
            raise _RefusedError(404, message, code="model_not_found", param="model")

    def _found(self, request: Request) -> _Answering:
        if (answering := self._running.get(request.path_params["id"])) is None:
            raise _RefusedError(404, f"no answer with the id {shown(request.path_params['id'])} is being written")
        return answering

    async def _answer(self, request: Request, ask: ChatAsk | TextAsk, prompts: Sequence[Any]) -> Response:
        self._require_model(ask.model)
        answering = await self._submit(ask, prompts)
        if ask.stream:
            return _Events(self._chunks(answering, ask), self.limits.seconds, lambda: self._close(answering))
        try:
            return _json(await _unless_gone(request, self._whole(answering, ask.n)))
        finally:
            self._close(answering)

    async def _submit(self, ask: ChatAsk | TextAsk, prompts: Sequence[Any]) -> _Answering:
        count = len(prompts) * ask.n
        if not 0 < count <= self.engine.rows:
            raise UsageError(f"expected 1 to {self.engine.rows} answers in a request, got {count}")
        sampling = ask.sampling(self.engine.assistant.sampling, self.limits.output)
        guidance = self.engine.guidance(ask.given())
        seeds = seeds_of(sampling.seed, count)
        top = ask.top
        loop = asyncio.get_running_loop()
        read = [await loop.run_in_executor(self._reader, self.engine.prompt_ids, prompt) for prompt in prompts]
        if ask.force_id is not None:
            self.engine.prompt_ids([ask.force_id])  # which knows what a token is
        if begun := len(ask.prefix_ids):
            read = [self.engine.prompt_ids([*ids, *ask.prefix_ids]) for ids in read]
            sampling = _rest(sampling, begun)
        kind = "chatcmpl" if ask.chat else "cmpl"
        shape = Shape(
            f"{kind}-{uuid.uuid4().hex}",
            self.name,
            ask.chat,
            ask.wants_logprobs,
            ask.llmdoctor,
            top,
            counted=ask.stream_options.include_usage,
        )
        answering = _Answering(shape, [])

        tokenizer = self.engine.assistant.patient.tokenizer
        texts = [await loop.run_in_executor(self._reader, Continuation, tokenizer, ask.prefix_ids) for _ in seeds]

        def emit_of(index: int) -> Callable[[Step | Exception], None]:
            def emit(event: Step | Exception) -> None:
                event = event if isinstance(event, Exception) else texts[index].step(event)
                _put(loop, answering.events, (index, event))

            return emit

        answering.jobs += [
            Job(
                read[index // ask.n],
                guidance,
                sampling,
                continued_seed(seed, begun),
                emit_of(index),
                top=top,
                deadline=time.monotonic() + self.limits.seconds,
                first=ask.force_id,
                begun=begun,
            )
            for index, seed in enumerate(seeds)
        ]
        self.engine.submit(answering.jobs)
        self._running[shape.id] = answering
        return answering

    def _close(self, answering: _Answering) -> None:
        self._running.pop(answering.shape.id, None)
        self.engine.cancel(answering.jobs)  # those that have ended stay as they are

    async def _whole(self, answering: _Answering, choices: int) -> dict[str, Any]:
        steps: list[list[Step]] = [[] for _ in answering.jobs]
        async for index, step in _steps(answering):
            if step is not None:
                steps[index].append(step)
        tokens = [[step.token for step in each] for each in steps]
        finishes = [each[-1].finish for each in steps]
        return answering.shape.whole(tokens, finishes, answering.usage(choices))  # type: ignore[arg-type]

    async def _chunks(self, answering: _Answering, ask: ChatAsk | TextAsk) -> AsyncIterator[str]:
        shape, offsets = answering.shape, [0] * len(answering.jobs)
        if ask.chat:
            for index in range(len(answering.jobs)):
                yield _event(shape.opening(index))
        try:
            async for index, step in _steps(answering):
                if step is None:
                    yield ": still here\n\n"
                elif step.token.text or step.finish or ask.llmdoctor or ask.wants_logprobs:
                    yield _event(shape.token(index, step.token, step.finish, offsets[index]))
                    offsets[index] += len(step.token.text)
        except Exception as error:  # the status is sent already
            yield _event({"error": _refusal(error).error})
        else:
            if shape.counted:
                yield _event(shape.closing(answering.usage(ask.n)))
        yield "data: [DONE]\n\n"


async def _steps(answering: _Answering) -> AsyncIterator[tuple[int, Step | None]]:
    """The tokens as they come; None after a silence. Raises the error that an answer ends with."""
    left = len(answering.jobs)
    while left:
        try:
            async with asyncio.timeout(_PULSE):
                index, event = await answering.events.get()
        except TimeoutError:
            yield 0, None
            continue
        if isinstance(event, Exception):
            raise event
        left -= event.finish is not None
        yield index, event


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of ``work``. Raises ClientDisconnect as soon as the client hangs up."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Events(StreamingResponse):
    """Server-sent events. ``close`` is called however the stream ends: finished, left by its reader, or too slow."""

    def __init__(self, events: AsyncIterator[str], seconds: float, close: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=_LIVE)
        self._seconds, self._close = seconds, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds + _PULSE):  # the engine's own limit comes first, and says so
                await super().__call__(scope, receive, send)
        except TimeoutError:
            _log.warning("a reader was too slow and was left")
        finally:
            self._close()


def _rest(sampling: Sampling, begun: int) -> Sampling:
    """The sampling of an answer of which so many tokens are there."""
    if begun >= sampling.max_new_tokens:
        raise UsageError(f"expected fewer than {sampling.max_new_tokens} 'prefix_ids' ('max_tokens'), got {begun}")
    return sampling.replace(max_new_tokens=sampling.max_new_tokens - begun)


def _put(loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[Any]", item: Any) -> None:
    loop.call_soon_threadsafe(queue.put_nowait, item)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _json(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # in ASCII: a client may have sent half a surrogate pair, which UTF-8 does not have
    return Response(json.dumps(data, allow_nan=False), status, headers, media_type="application/json")


def _event(data: Any) -> str:
    return f"data: {json.dumps(data, allow_nan=False)}\n\n"


def _error(refused: _RefusedError, headers: Mapping[str, str] | None = None) -> Response:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(refused.status, headers)
    return _json({"error": refused.error}, refused.status, headers)


async def _unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {shown(request.url.path)}: {error.detail}"
    return _error(_RefusedError(error.status_code, what), error.headers)


def _refusal(error: Exception) -> _RefusedError:
    message = str(error)
    match error:
        case _RefusedError():
            return error
        case UnsupportedError():
            return _RefusedError(400, message, code="unsupported_parameter", param=error.param)
        case TooLongError():
            return _RefusedError(400, message, code="context_length_exceeded")
        case UsageError() | DataError():
            return _RefusedError(400, message)
        case QueueFullError():
            return _RefusedError(429, message, code="queue_full")
        case LateError():
            return _RefusedError(504, message, code="timeout")
        case StoppedError():
            return _RefusedError(503, message, code="stopping")
        case LLMDoctorError():
            return _RefusedError(500, message)
    _log.error("a request failed", exc_info=error)
    return _RefusedError(500, "the server failed; its log says why")


def _guidance(answering: _Answering) -> dict[str, Any]:
    values = answering.jobs[0].guidance.to_dict()
    return {
        "id": answering.shape.id,
        "object": "llmdoctor.stream",
        **{
            "beta" if name == "betas" else "dead_zone" if name == "dead_zones" else name: v
            for name, v in values.items()
        },
    }
