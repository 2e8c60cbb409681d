"""Chat templates: the Jinja programs of strangers, checked once, and run in a process of their own within bounds."""

import atexit
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmdoctor import template_process
from llmdoctor.errors import DataError, LoadError
from llmdoctor.records import Message

_SECONDS = 5.0  # for one conversation
_SOURCE = 1 << 20  # characters of a template
_WORD = "Xyzzyplugh"  # what no template says by itself


class ChatTemplate:
    """The chat template of one tokenizer. ``parts`` says that it wants a content as a list of parts.

    Raises LoadError for a template that does not compile, fails, exceeds its bounds, or does not hold what a user said
    exactly once.
    """

    def __init__(self, source: str, special: Mapping[str, Any], name: str) -> None:
        self._source, self._special, self._name, self.parts = source, special, name, False
        if len(source) > _SOURCE:
            raise LoadError(f"the chat template of {name} has {len(source):,} characters: expected at most {_SOURCE:,}")
        self._require_words()

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
        found = _checked(source, tuple(sorted(special.items())), name)
        if isinstance(found, str):
            raise LoadError(found)
        return found

    def render(self, messages: Sequence[Message], *, answer_next: bool = True) -> str:
        """The text of a conversation, with what opens the assistant's turn if ``answer_next``.

        Raises DataError if the template refuses the conversation or fails; LoadError if it exceeds its bounds.
        """
        try:
            return self._render(messages, answer_next)
        except _FailedError as error:
            raise DataError(f"the model's chat template refuses this conversation: {error}") from error

    def _render(self, messages: Sequence[Message], answer_next: bool) -> str:
        chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} if self.parts else {**m} for m in messages]
        values = {**self._special, "messages": chat, "tools": None, "documents": None}
        kind, text = _process.ask(self._source, {**values, "add_generation_prompt": answer_next})
        match kind:
            case "text":
                return text
            case "syntax":
                raise LoadError(f"the chat template of {self._name} is not a Jinja template: {text}")
            case "compiling":
                raise LoadError(f"the chat template of {self._name} cannot be compiled: {text}")
            case "stopped":
                raise LoadError(f"the chat template of {self._name} was stopped: {text}")
            case _:
                raise _FailedError(kind, text)

    def _require_words(self) -> None:
        """Say a word as a user, as text or else in parts, and look for it. A refusal says nothing of other turns."""
        asked = Message(role="user", content=_WORD)
        failed: _FailedError | None = None
        counts: list[int] = []
        for self.parts in (False, True):
            for messages in ([asked], [Message(role="system", content="Listen."), asked]):
                try:
                    count = self._render(messages, True).count(_WORD)
                except _FailedError as error:
                    failed = failed or error
                    continue
                if count == 1:
                    return
                counts.append(count)
        self.parts = False
        if counts:
            raise LoadError(
                f"the chat template of {self._name} holds what a user says {max(counts, key=bool)} times, expected "
                "once: set another chat_template in its tokenizer_config.json"
            )
        # one that refuses this may take other turns
        if failed is not None and failed.kind != "refused":
            raise LoadError(f"the chat template of {self._name} fails: {failed}") from failed


class _NotStartedError(LoadError):
    """The process in which templates run cannot be started."""


class _FailedError(Exception):
    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@functools.lru_cache(maxsize=64)
def _checked(source: str, special: tuple[tuple[str, str], ...], name: str) -> ChatTemplate | str:
    """The template, or why it cannot be used: that is found out once, since it may take seconds."""
    try:
        return ChatTemplate(source, dict(special), name)
    except _NotStartedError:
        raise  # that may change
    except LoadError as error:
        return str(error)


class _Process:
    """The process in which all templates run, one conversation at a time; see `template_process`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None

    def ask(self, source: str, values: Mapping[str, Any]) -> tuple[str, str]:
        """The kind and the text of its answer; "stopped" and the reason if it exceeded its bounds."""
        try:
            request = template_process.encoded({"source": source, "values": values, "seconds": _SECONDS})
        except (TypeError, ValueError, RecursionError) as error:
            return "failed", f"it is no JSON ({error})"
        with self._lock:
            if self._running is None or self._running.poll() is not None:
                self._running = _start()
            process, began = self._running, time.monotonic()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with suppress(OSError):  # it is gone: there will be no answer
                    process.stdin.write(request + b"\n")
                    process.stdin.flush()
                answer = process.stdout.readline()
            except BaseException:  # Ctrl+C: its answer is not waited for, nor must it be taken for the next one
                self._end()
                raise
            if not answer.endswith(b"\n"):
                self._end()
                late = time.monotonic() - began >= _SECONDS
                bounds = f"more than {template_process.MEMORY >> 20} MiB of memory, or broke its interpreter"
                return "stopped", f"it ran for more than {_SECONDS:g} seconds" if late else f"it took {bounds}"
        kind, text = json.loads(answer)
        return kind, text

    def kill(self) -> None:
        """End it without waiting for a conversation that another thread has given it."""
        if (running := self._running) is not None:
            running.kill()

    def _end(self) -> None:
        self.kill()
        if self._running is not None:
            # closes its pipes and waits for it; what it did not read cannot be written any more
            with suppress(OSError), self._running:
                pass
            self._running = None


def _start() -> subprocess.Popen[bytes]:
    # the first line is for -I and -S, which start it quickly and without what the user's environment adds
    program = "import runpy, sys; file, *sys.path[len(sys.path):] = sys.argv[1:]; runpy.run_path(file, {}, '__main__')"
    command = [sys.executable, "-I", "-S", "-c", program, str(template_process.__file__), *sys.path]
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, cwd=os.sep)
    except OSError as error:
        raise _NotStartedError(f"the process for chat templates cannot be started: {error}. Try again") from error
    assert process.stdout is not None
    if process.stdout.readline() != template_process.READY:
        with process:
            process.kill()
        raise _NotStartedError("the process for chat templates ended as it started: is memory short? Try again")
    return process


_process = _Process()
atexit.register(_process.kill)
if hasattr(os, "register_at_fork"):  # a child's answers are not its parent's
    os.register_at_fork(after_in_child=_process.__init__)  # type: ignore[misc]
