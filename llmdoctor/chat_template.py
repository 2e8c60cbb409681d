"""Chat templates: the Jinja program of a stranger, compiled once, checked once, and run within bounds of time and size.

transformers' sandbox keeps a template from reaching the machine. It does not keep it from looping or growing.
"""

import ctypes
import functools
import itertools
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from transformers import PreTrainedTokenizerBase

from llmdoctor.errors import DataError, LoadError
from llmdoctor.harmless import first_line
from llmdoctor.records import Message

_SECONDS = 5.0
_LONGEST = 1 << 24  # characters of a text: a context of a million tokens has fewer
_ITEM = 1 << 4  # an item of a list, and a bit of a number, count as so many characters
_SOURCE = 1 << 20  # characters of a template
_WIDE = re.compile(r"\d{5}|\*")  # a field of that width in a format
_WORD = "Xyzzyplugh"  # what no template says by itself


class ChatTemplate:
    """The chat template of one tokenizer. ``parts`` says that it wants a content as a list of parts.

    Raises LoadError for a template that does not compile, fails, or does not hold what a user said exactly once.
    """

    def __init__(self, source: str, special: Mapping[str, Any], name: str) -> None:
        self._special, self.parts = special, False
        if len(source) > _SOURCE:
            raise LoadError(f"the chat template of {name} has {len(source):,} characters: expected at most {_SOURCE:,}")
        try:
            with _in_time():
                self._compiled = _environment().from_string(source)
        except TemplateSyntaxError as error:
            where = f"line {error.lineno}"
            raise LoadError(f"the chat template of {name} is not a Jinja template: {error.message}, {where}") from error
        except Exception as error:
            raise LoadError(f"the chat template of {name} cannot be compiled: {_reason(error)}") from error
        self._require_words(name)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ChatTemplate":
        """The template of a tokenizer that has one."""
        name = str(tokenizer.name_or_path or "this tokenizer")
        held = tokenizer.chat_template
        if isinstance(held, dict) and "default" not in held:
            raise LoadError(
                f"the tokenizer of {name} has the chat templates {', '.join(map(repr, held))[:200]} and no default: "
                'expected one of them to be named "default"'
            )
        source = held.get("default") if isinstance(held, dict) else held
        if not isinstance(source, str):
            raise LoadError(f"the chat template of {name} is not a text, it is a {type(source).__name__}")
        special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        return _compiled(source, tuple(sorted(special.items())), name)

    def render(self, messages: Sequence[Message], *, answer_next: bool = True) -> str:
        """The text of a conversation, with what opens the assistant's turn if ``answer_next``.

        Raises DataError if the template refuses the conversation, fails, or exceeds its bounds.
        """
        try:
            return self._render(messages, answer_next)
        except Exception as error:
            raise DataError(f"the model's chat template refuses this conversation: {_reason(error)}") from error

    def _render(self, messages: Sequence[Message], answer_next: bool) -> str:
        chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} if self.parts else {**m} for m in messages]
        pieces, size = [], 0
        values = {**self._special, "messages": chat, "tools": None, "documents": None}
        with _in_time():
            for piece in self._compiled.generate(**values, add_generation_prompt=answer_next):
                pieces.append(piece)
                _require_room(size := size + len(piece))
        return "".join(pieces)

    def _require_words(self, name: str) -> None:
        """Say a word as a user, as text or else in parts, and look for it. A refusal says nothing of other turns."""
        asked = Message(role="user", content=_WORD)
        failed: Exception | None = None
        counts: list[int] = []
        for self.parts in (False, True):
            for messages in ([asked], [Message(role="system", content="Listen."), asked]):
                try:
                    count = self._render(messages, True).count(_WORD)
                except Exception as error:
                    failed = failed or error
                    continue
                if count == 1:
                    return
                counts.append(count)
        self.parts = False
        if counts:
            raise LoadError(
                f"the chat template of {name} holds what a user says {max(counts, key=bool)} times, expected once: "
                "set another chat_template in its tokenizer_config.json"
            )
        # TemplateError is what raise_exception raises: it may take other turns
        if failed is not None and type(failed) is not TemplateError:
            raise LoadError(f"the chat template of {name} fails: {_reason(failed)}") from failed


@functools.lru_cache(maxsize=64)
def _compiled(source: str, special: tuple[tuple[str, str], ...], name: str) -> ChatTemplate:
    return ChatTemplate(source, dict(special), name)


def _reason(error: Exception) -> str:
    text = first_line(error)[:300]
    known = isinstance(error, TemplateError | _TooMuchError) or text == type(error).__name__
    return text if known else f"{type(error).__name__} {text}"


# --- bounds ----------------------------------------------------------------------------------------------------------


class _TooMuchError(Exception):
    """A template runs for too long, or makes too much."""


def _require_room(size: float) -> None:
    if size > _LONGEST:
        raise _TooMuchError(f"it makes more than {_LONGEST:,} characters")


class _Watchdog:
    """One thread that raises _TooMuchError in every thread that has been at work for five seconds."""

    def __init__(self) -> None:
        self._changed, self._numbers = threading.Condition(), itertools.count()
        self._watched: dict[int, tuple[float, int]] = {}  # deadline and thread
        self._wakes = math.inf
        self._thread: threading.Thread | None = None

    def watch(self) -> int:
        """Watch this thread; the number is for `leave`."""
        number, deadline = next(self._numbers), time.monotonic() + _SECONDS
        with self._changed:
            self._watched[number] = deadline, threading.get_ident()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="chat template watchdog", daemon=True)
                self._thread.start()
            if deadline < self._wakes:
                self._changed.notify()
        return number

    def leave(self, number: int) -> None:
        with self._changed:
            self._watched.pop(number, None)

    def _run(self) -> None:
        with self._changed:
            while True:
                self._stop_late(time.monotonic())
                # those that left are not taken back: waking for nothing every five seconds costs less
                self._wakes = min((deadline for deadline, _ in self._watched.values()), default=math.inf)
                self._changed.wait(None if self._wakes == math.inf else max(0.0, self._wakes - time.monotonic()))

    def _stop_late(self, now: float) -> None:
        for number, (deadline, thread) in [*self._watched.items()]:
            if deadline <= now:
                del self._watched[number]
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TooMuchError))


_watchdog = _Watchdog()
if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=_watchdog.__init__)  # type: ignore[misc]


@contextmanager
def _in_time() -> Iterator[None]:
    """Raise _TooMuchError inside, in whichever thread, after five seconds."""
    number = _watchdog.watch()
    try:
        try:
            yield
        finally:
            _watchdog.leave(number)
    except _TooMuchError as error:
        raise error if error.args else _TooMuchError(f"it runs for more than {_SECONDS:g} seconds") from None


def _size(value: Any) -> float:
    if isinstance(value, int):
        return value.bit_length() * _ITEM**2
    return len(value) * (1 if isinstance(value, str) else _ITEM) if isinstance(value, str | list | tuple | dict) else 1


class _Code(CodeGenerator):
    """Jinja's, with ``a ~ b`` as a call that can be bounded."""

    def visit_Concat(self, node: Any, frame: Any) -> None:
        self.write("environment.concatenated((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Bounded(ImmutableSandboxedEnvironment):
    code_generator_class = _Code
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def concatenated(self, parts: tuple[Any, ...]) -> str:
        _require_room(sum(map(_size, parts)))
        return "".join(map(str, parts))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        match operator:
            case "+":
                size = _size(left) + _size(right)
            case "*":
                numbers = isinstance(left, int | float) and isinstance(right, int | float)
                size = _size(left) + _size(right) if numbers else _product(left) * _product(right)
            case "**":
                size = _size(left) * abs(right) if isinstance(right, int) else 1
            case _:
                size = _LONGEST + 1 if isinstance(left, str) and _WIDE.search(left) else 1
        _require_room(size)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        _require_bounded(owner if isinstance(owner, str | list | dict) else "", args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        if isinstance(owner := getattr(value, "__self__", None), str) and value.__name__.startswith("format"):
            _require_narrow(owner)
        return super().wrap_str_format(value)


def _product(value: Any) -> float:
    """By how much a factor of ``*`` multiplies."""
    return max(0, value) if isinstance(value, int) else _size(value)


def _require_narrow(text: str) -> None:
    if _WIDE.search(text):
        raise SecurityError("a format with a field that is too wide")


def _require_bounded(owner: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call that could make far more than it is given: of a great number, or of long texts with each other."""
    product = 1.0
    for value in (owner, *args, *kwargs.values()):
        if isinstance(value, int) and abs(value) > _LONGEST:
            _require_room(abs(value))
        if isinstance(value, str | list | tuple | dict):
            product *= max(1, len(value))
    if product > 1 << 36:
        _require_room(product)


def _bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def within(*args: Any, **kwargs: Any) -> Any:
        _require_bounded("", args, kwargs)
        if function.__name__ == "do_format":
            _require_narrow(str(args[0]))
        result = function(*args, **kwargs)
        _require_room(_size(result))
        return result

    return within


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
def _environment() -> _Bounded:
    """The environment that transformers renders templates in, with its filters and functions, bounded."""
    environment = _Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _bounded(function) for name, function in environment.filters.items()}
    del environment.globals["lipsum"]
    own = {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "dict": _Dict(), "namespace": _Namespace}
    environment.globals.update(own)
    return environment
