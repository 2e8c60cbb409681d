"""The process in which chat templates run: the Jinja programs of strangers, within bounds of time, memory and size.

transformers' sandbox keeps a template from reaching the machine. It does not keep it from looping or growing, and much
of that happens in C, which nothing in the same process can stop. `llmdoctor.chat_template` starts this file with the
standard library and Jinja alone, and ends it by closing its stdin.

A request is a line of JSON: ``source``, ``values``, ``seconds``. The answer is another: a kind and a text. Of the kind
"text" that is what the template gives, of "syntax", "compiling", "stopped", "refused" and "failed" the reason why there
is none.
"""

import faulthandler
import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

LONGEST = 1 << 24
"""Characters of a conversation: a context of a million tokens has fewer."""
MEMORY = 1 << 29
"""Bytes that the process may take, on Linux."""
READY = b"ready\n"
"""Its first line."""
_TOO_MUCH = "stopped", f"it took more than {MEMORY >> 20} MiB of memory"


def serve() -> None:
    """Answer requests until stdin ends. The process ends itself if one takes too long, even inside C code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the parent, which closes stdin if it ends
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        for line in sys.stdin.buffer:
            request = json.loads(line)
            faulthandler.dump_traceback_later(request["seconds"], exit=True, file=nowhere)
            answer = encoded(_answer(request["source"], request["values"]))
            faulthandler.cancel_dump_traceback_later()
            sys.stdout.buffer.write(answer + b"\n")
            sys.stdout.buffer.flush()


def encoded(data: Any) -> bytes:
    """JSON in one line, in UTF-8, that may hold half a surrogate pair."""
    return json.dumps(data, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _answer(source: str, values: dict[str, Any]) -> tuple[str, str]:
    try:
        template = _compiled(source)
    except TemplateSyntaxError as error:
        return "syntax", f"{error.message}, line {error.lineno}"
    except MemoryError:
        return _TOO_MUCH
    except Exception as error:
        return "compiling", _reason(error)
    pieces, size = [], 0
    try:
        for piece in template.generate(**values):
            pieces.append(piece)
            if (size := size + len(piece)) > LONGEST:
                return "failed", f"it makes more than {LONGEST:,} characters"
        return "text", "".join(pieces)
    except MemoryError:
        return _TOO_MUCH
    except Exception as error:
        # TemplateError itself is what raise_exception raises
        return "refused" if type(error) is TemplateError else "failed", _reason(error)


def _reason(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return text if isinstance(error, TemplateError) and text else f"{type(error).__name__} {text}".strip()


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


# --- what transformers gives to templates ----------------------------------------------------------------------------


class _Generation(Extension):
    """``{% generation %}``, which marks what the assistant says: here its text alone."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("said"), [], [], body).set_lineno(line)

    def said(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's, without names that lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a name may be `self`
        self, *given = args
        Namespace.__init__(self)
        for name, value in dict(*given, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace with the name {name[:40]!r}")
        super().__setitem__(name, value)


class _Dict:
    """``dict`` without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes what HTML would read
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers renders templates in, with its filters and functions."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    own = {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "dict": _Dict(), "namespace": _Namespace}
    environment.globals.update(own)
    return environment


if __name__ == "__main__":
    serve()
