"""Judges of answers that a user names: a reward model, a Python callable, or a shell command."""

import importlib
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llmdoctor.errors import LoadError, UsageError
from llmdoctor.files import present, user_path
from llmdoctor.harmless import first_line
from llmdoctor.model_source import ModelSource
from llmdoctor.models import from_pretrained, load_checked, pick_device
from llmdoctor.records import Message
from llmdoctor.schema import shown
from llmdoctor.text import conversation, conversation_text

Kind = Literal["scalar", "pairwise"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Request = Mapping[str, Any]
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PATIENCE = 600  # seconds that a command may take for one answer
_BETTER = {"a": 1.0, "b": 0.0, "tie": 0.5}


@dataclass(frozen=True)
class Judge:
    """A judge of answers. ``name`` is what the user wrote.

    A "scalar" one is asked {"prompt", "answer"} and replies with a number, the greater the better. A "pairwise" one is
    asked {"prompt", "a", "b"} and replies with "a", "b" or "tie", or with the probability that a is the better one.
    Either may reply with an object that holds this as "score" or "better". ``ask`` yields the replies in order.

    The prompt is a text, or a list of messages if it is a conversation. Where the question has several turns, prompt
    and answers are lists with an item for each turn.
    """

    name: str
    kind: Kind
    ask: Callable[[Sequence[Request]], Iterator[Any]]

    def replies(self, requests: Sequence[Request]) -> Iterator[float]:
        """What the judge says of each request: a score, or the probability in [0, 1] that a is the better answer.

        Raises UsageError for a judge that fails and for a reply that is neither.
        """
        read = self._score if self.kind == "scalar" else self._better
        for reply in self.ask(requests):
            yield read(reply)

    def try_out(self) -> None:
        """Ask about a made-up prompt. Raises UsageError for a judge that fails or replies with something else."""
        answers = {"answer": "Yes."} if self.kind == "scalar" else {"a": "Yes.", "b": "No."}
        list(self.replies([{"prompt": "Is tea good?", **answers}]))

    def _score(self, reply: Any) -> float:
        number = _number(_inside(reply, "score"))
        if number is None or not math.isfinite(number):
            raise UsageError(f'the judge {self.name}: expected a number or {{"score": number}}, got {shown(reply)}')
        return number

    def _better(self, reply: Any) -> float:
        said = _inside(reply, "better")
        known = _BETTER.get(said.strip().lower()) if isinstance(said, str) else _number(said)
        if known is None or not 0 <= known <= 1:
            raise UsageError(
                f'the judge {self.name}: expected "a", "b", "tie", a number from 0 to 1 (how probably a is better) or '
                f'{{"better": one of these}}, got {shown(reply)}'
            )
        return known


def load_judge(name: str, kind: Kind | None = None, *, device: str = "auto", trust_remote_code: bool = False) -> Judge:
    """The judge that ``name`` names.

    - A folder, or a hub name ``org/name``: a reward model, a sequence classifier with one label. It reads the
      conversation in its own chat template, or prompt and answer as a pair of texts if it has none. It is "scalar".
    - ``module:function``, importable from the working folder too: called with the values of a request. By default its
      number of parameters tells its kind: two for "scalar", three for "pairwise".
    - Anything else: a shell command. It runs once per request, with the request as JSON on its stdin, and prints the
      reply as JSON. By default it is "pairwise".

    Raises LoadError for a model or function that cannot be loaded, UsageError for a kind that does not fit.
    """
    if _CALLABLE.fullmatch(name):
        return _callable(name, kind)
    path = user_path(name)  # a command may be too long for a path
    if (present(path) and path.is_dir()) or (_HUB_NAME.fullmatch(name) and not present(path)):
        if kind == "pairwise":
            raise UsageError(f"the judge {name} is a reward model, which scores one answer at a time: kind scalar")
        return Judge(name, "scalar", RewardModel(name, device=device, trust_remote_code=trust_remote_code).ask)
    return Judge(name, kind or "pairwise", _command(name))


class RewardModel:
    """A sequence classifier with one label, which scores conversations. Raises LoadError."""

    def __init__(self, source: str, *, device: str = "auto", trust_remote_code: bool = False) -> None:
        self._source, where = source, ModelSource.of(source)
        where.require_reach()
        placed = pick_device(device)
        how = {"trust_remote_code": trust_remote_code}
        self._tokenizer = from_pretrained(where, AutoTokenizer, "the tokenizer of", where.place, **how)
        loaded = load_checked(
            where,
            AutoModelForSequenceClassification,
            "the reward model",
            dtype="float32" if placed.type == "cpu" else "auto",  # half precision makes ties of small differences
            device_map={"": placed},
            **how,
        )
        if loaded.config.num_labels != 1:
            labels = loaded.config.num_labels
            raise LoadError(f"{source} is no reward model: expected a sequence classifier with 1 label, got {labels}")
        self._model = loaded.eval()

    def ask(self, requests: Sequence[Request]) -> Iterator[float]:
        """The score of every request's conversation."""
        for request in requests:
            try:
                yield self._score(_messages(request["prompt"], request["answer"]))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a template that refuses the conversation, a text beyond the context, ...
                raise UsageError(f"the reward model {self._source} failed: {first_line(error)}") from error

    @torch.inference_mode()
    def _score(self, messages: list[Message]) -> float:
        if self._tokenizer.chat_template is None:
            *before, last = (message["content"] for message in messages)
            inputs = self._tokenizer("\n\n".join(before), last, truncation=True, return_tensors="pt")
        else:
            text = conversation_text(self._tokenizer, messages)
            inputs = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")
        return float(self._model(**inputs.to(self._model.device)).logits[0, 0])


def _messages(prompt: Any, answer: Any) -> list[Message]:
    """Prompt and answer as a conversation; of several turns, each with its answer."""
    several = isinstance(answer, list)
    messages: list[Message] = []
    for asked, said in zip(prompt if several else [prompt], answer if several else [answer], strict=True):
        messages += conversation(asked)
        messages.append(Message(role="assistant", content=said))
    return messages


def _callable(name: str, kind: Kind | None) -> Judge:
    module, _, attribute = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        raise LoadError(f"cannot load the judge {name}: {type(error).__name__}: {first_line(error)}") from error
    if not callable(function):
        raise LoadError(f"cannot load the judge {name}: expected a function, got {shown(function)}")
    kind = kind or _kind_of(name, function)

    def ask(requests: Sequence[Request]) -> Iterator[Any]:
        for request in requests:
            try:
                reply = function(*request.values())
            except (Exception, SystemExit) as error:
                raise UsageError(f"the judge {name} failed: {type(error).__name__}: {first_line(error)}") from error
            yield reply

    return Judge(name, kind, ask)


def _kind_of(name: str, function: Callable[..., Any]) -> Kind:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some functions of C have none
        parameters = {}.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(needed) not in (2, 3):
        raise UsageError(
            f"the judge {name}: expected the parameters (prompt, answer) or (prompt, a, b), got {len(needed)}; "
            "if they are right, name the kind: scalar or pairwise"
        )
    return "scalar" if len(needed) == 2 else "pairwise"


def _command(command: str) -> Callable[[Sequence[Request]], Iterator[Any]]:
    def ask(requests: Sequence[Request]) -> Iterator[Any]:
        shells, pool = _Shells(command), ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        try:
            yield from pool.map(partial(one, shells), requests)
        finally:  # one failed, the caller has enough, or Ctrl+C
            pool.shutdown(wait=False, cancel_futures=True)
            shells.end()
            pool.shutdown()

    def one(shells: _Shells, request: Request) -> Any:
        done = shells.run(json.dumps(request, ensure_ascii=False))
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["it printed no message"])[-1][:300]
            raise UsageError(f"the judge {command!r} ended with exit status {done.returncode}: {said}")
        try:
            return json.loads(done.stdout)
        except (ValueError, RecursionError):
            raise UsageError(f"the judge {command!r}: expected JSON on its stdout, got {shown(done.stdout)}") from None

    return ask


class _Shells:
    """Runs of a shell command, each ended with all that it started: in a session of its own, where there are any.

    Ctrl+C does not reach other sessions, so that whoever runs them must `end` them.
    """

    def __init__(self, command: str) -> None:
        self._command, self._running, self._ended = command, set[subprocess.Popen[str]](), False

    def run(self, given: str) -> subprocess.CompletedProcess[str]:
        """Run it once, in any thread. Raises UsageError if it takes too long."""
        pipe = subprocess.PIPE
        with subprocess.Popen(
            self._command, shell=True, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace",
            start_new_session=os.name == "posix",
        ) as process:  # fmt: skip
            self._running.add(process)
            if self._ended:
                _kill(process)
            try:
                out, said = process.communicate(given, timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                _kill(process)
                raise UsageError(
                    f"the judge {self._command!r} took more than {_PATIENCE} seconds for one answer"
                ) from None
            finally:
                self._running.discard(process)
        return subprocess.CompletedProcess(self._command, process.returncode, out, said)

    def end(self) -> None:
        """Kill what still runs, and what is just being started."""
        self._ended = True
        for process in [*self._running]:
            _kill(process)


def _kill(process: "subprocess.Popen[str]") -> None:
    if os.name != "posix":
        process.kill()
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _inside(reply: Any, key: str) -> Any:
    return reply.get(key) if isinstance(reply, Mapping) else reply


def _number(value: Any) -> float | None:
    """The value as a float, also of numpy and torch; None for everything else."""
    if isinstance(value, bool | str | bytes):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None
