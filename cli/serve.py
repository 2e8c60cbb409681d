"""``llmdoctor serve``: the guided patient behind OpenAI's HTTP interface."""

import importlib.util
import logging
import signal
import socket
import sys
from typing import TYPE_CHECKING, Annotated

from llmdoctor.cli import options
from llmdoctor.cli.options import option
from llmdoctor.cli.terminal import say
from llmdoctor.errors import UsageError
from llmdoctor.show.formats import short_name

if TYPE_CHECKING:
    from types import FrameType

    from llmdoctor.profile import Profile
    from llmdoctor.serving.info import About

_LAST_WORDS = 5  # seconds that clients get to read the error that ends their streams
_LOCAL = ("127.0.0.1", "::1", "localhost")


@options.derived
def serve(
    *,
    host: Annotated[str, option("--host", "Address to listen on (default: this machine alone).", metavar="HOST")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, option("--port", "Port (default: 8000); 0 is any.", metavar="N", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, option("--api-key", "Key that clients must send; better set as LLMDOCTOR_API_KEY.", metavar="KEY")
    ] = None,
    name: Annotated[
        str | None, option("--name", "The model's name for clients (default: the patient's).", metavar="NAME")
    ] = None,
    guided: options.Guided,
    seed: options.Seed = None,
    rows: Annotated[
        int, option("--rows", "Answers that are written together (default: 64).", metavar="N", min=1, max=4096)
    ] = 64,
    queue: Annotated[
        int, option("--queue", "Answers that may wait; more get status 429 (default: 256).", metavar="N", min=0)
    ] = 256,
    prefix_memory: Annotated[
        int,
        option("--prefix-memory", "MiB of prompts kept for those that begin alike (default: 512).", metavar="N", min=0),
    ] = 512,
    max_prompt: Annotated[
        int | None, option("--max-prompt", "Longest prompt, in tokens (default: the context).", metavar="N", min=1)
    ] = None,
    max_output: Annotated[
        int, option("--max-output", "Longest answer, whatever is asked, in tokens (default: 4096).", metavar="N", min=1)
    ] = 4096,
    max_body: Annotated[
        int, option("--max-body", "Largest request, in bytes (default: 4194304).", metavar="N", min=1)
    ] = 4 << 20,
    timeout: Annotated[
        float, option("--timeout", "Seconds after which an answer is given up (default: 600).", metavar="X", min=0.001)
    ] = 600.0,
    grace: Annotated[
        int, option("--grace", "Seconds that running answers get at the end (default: 30).", metavar="N", min=0)
    ] = 30,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Serve the guided patient to many clients at once, as OpenAI's API does; alpha and beta per request.

    Clients use the address http://HOST:PORT/v1. SIGTERM or Ctrl+C lets running answers end first.
    """
    if lacking := [module for module in ("starlette", "uvicorn") if importlib.util.find_spec(module) is None]:
        raise UsageError(f"serving needs {lacking[0]}: pip install 'llmdoctor-guided[serve]'")
    signal.signal(signal.SIGTERM, _end)
    settings = options.guided_profile(guided)
    with _bound(host, port) as listening:  # a port in use is told before the models load
        import asyncio

        import uvicorn

        assistant = options.load_assistant(settings, trust_remote_code=trust_remote_code)
        from llmdoctor.serving.api import Limits, create_app
        from llmdoctor.serving.engine import Engine

        assistant.sampling = settings.decode.sampling(seed)
        called = name or short_name(settings.patient.model)
        engine = Engine(assistant, rows=rows, queue=queue, longest=max_prompt, prefix_bytes=prefix_memory << 20)
        limits = Limits(body=max_body, output=max_output, seconds=timeout)
        app = create_app(engine, name=called, limits=limits, api_key=api_key, about=_about(settings))
        logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every client that hangs up
        where = f"[{host}]" if ":" in host else host
        listening.listen()  # from now on nobody is refused, though the server itself takes a moment yet
        say(f"Serving {called} at http://{where}:{listening.getsockname()[1]}/v1. Ctrl+C ends it.")
        if not api_key and host not in _LOCAL:
            say("warning: everyone who reaches this address can use it: set --api-key")
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=grace + _LAST_WORDS,
            limit_concurrency=2 * (rows + queue) + 64,  # connections, those that say nothing included
        )

        class Server(uvicorn.Server):
            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                """End what still runs after the grace period with an error, before its connections are closed."""

                async def cut() -> None:
                    await asyncio.sleep(grace)
                    await asyncio.to_thread(engine.stop)

                cutting = asyncio.create_task(cut())
                await super().shutdown(sockets)
                cutting.cancel()

        Server(config).run(sockets=[listening])


def _about(settings: "Profile") -> "About":
    """What a terminal elsewhere is told of the models: names, and no paths."""
    from llmdoctor.model_source import doctor_fingerprint, model_fingerprint
    from llmdoctor.serving.info import About

    weights = [model_fingerprint(settings.patient.model)]
    weights += [doctor_fingerprint(doctor.checkpoint) for doctor in settings.doctors.values()]

    return About(
        profile=settings.name,
        patient=short_name(settings.patient.model),
        doctors={name: short_name(doctor.checkpoint) for name, doctor in settings.doctors.items()},
        weights=weights,
        welcome=settings.welcome.model_dump(),
    )


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sends at once only where it sees that this is TCP; else a first token waits 40 ms behind its headers
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise UsageError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
    return listening


def _end(_signal: int, _frame: "FrameType | None") -> None:
    raise SystemExit(0)  # not an Exception: one that comes while a library is imported would be taken for its failure
