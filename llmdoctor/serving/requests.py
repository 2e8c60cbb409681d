"""What clients may ask: the bodies of OpenAI's completions, checked, with the guidance of llmdoctor beside."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field

from llmdoctor.errors import UsageError
from llmdoctor.records import Message
from llmdoctor.schema import Settings, checked, shown
from llmdoctor.settings import Mode, Sampling

GUIDANCE = ("alpha", "beta", "dead_zone", "mode", "plausibility")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "no_repeat_ngram")
_MOST_STOPS = 16
_MOST_FIELDS = 100  # of a body, or of a field of it
MOST_TOP = 20  # alternatives of every token
# What changes no answer, and is taken without a look: notes for OpenAI's own books.
_IGNORED = {"user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
# Fields of OpenAI's that are not built, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "store": (False,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}

Strength = float | dict[str, float]
_T = TypeVar("_T")
# Of a list of a million wrong items the first is enough: pydantic takes minutes to list them all, and nobody else is
# answered in that time.
_List = Annotated[tuple[_T, ...], Field(fail_fast=True)]


class UnsupportedError(UsageError):
    """A field of OpenAI's that this server does not have; ``param`` is its name."""

    def __init__(self, param: str, value: Any) -> None:
        super().__init__(f"{param!r} is not supported by this server, got {shown(value)}: leave it out")
        self.param = param


class StreamOptions(Settings):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers on OpenAI's own lines


class GuidanceChange(Settings):
    """The body of ``PATCH /v1/streams/{id}``."""

    alpha: float | None = None
    beta: Strength | None = None
    dead_zone: Strength | None = None
    mode: Mode | None = None
    plausibility: float | None = None

    def given(self) -> dict[str, Any]:
        """The fields of the guidance that were given."""
        return {name: value for name in GUIDANCE if (value := getattr(self, name)) is not None}


class _Ask(GuidanceChange):
    """What both completions share."""

    model: str | None = None
    n: int = Field(default=1, ge=1, le=128)
    seed: int | None = None
    stop: str | _List[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    no_repeat_ngram: int | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    llmdoctor: bool = False

    chat: ClassVar[bool]

    def sampling(self, default: Sampling, longest: int) -> Sampling:
        """How the answers are drawn. Raises UsageError for a value out of range."""
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if stops is not None and len(stops) > _MOST_STOPS:
            raise UsageError(f"'stop' expected at most {_MOST_STOPS} strings, got {len(stops)}")
        wanted = self.max_completion_tokens or self.max_tokens or default.max_new_tokens
        given = {name: value for name in _SAMPLING if (value := getattr(self, name)) is not None}
        given |= {"stop": stops} if stops is not None else {}
        given |= {"seed": self.seed} if self.seed is not None else {}
        return default.replace(max_new_tokens=min(wanted, longest), **given)

    @property
    def top(self) -> int:
        """How many alternatives to show."""
        raise NotImplementedError

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probs are shown."""
        raise NotImplementedError


class ChatAsk(_Ask):
    """The body of ``POST /v1/chat/completions``."""

    messages: _List[Any]
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MOST_TOP)
    prefix_ids: _List[int] = ()  # the answer's first tokens, which are not repeated to the client
    force_id: int | None = None  # the next token, instead of a draw

    chat = True

    @property
    def top(self) -> int:
        """See `_Ask`."""
        if self.top_logprobs and not (self.logprobs or self.llmdoctor):
            raise UsageError("'top_logprobs' needs 'logprobs': true, or 'llmdoctor': true")
        return self.top_logprobs

    @property
    def wants_logprobs(self) -> bool:
        """See `_Ask`."""
        return self.logprobs

    def conversation(self) -> list[Message]:
        """The messages as the models' chat templates take them. Raises UsageError for what is no text."""
        if not self.messages:
            raise UsageError("'messages' is empty: expected at least one")
        return [_message(message) for message in self.messages]


class TextAsk(_Ask):
    """The body of ``POST /v1/completions``."""

    prompt: str | _List[str] | _List[int] | _List[_List[int]]
    prefix_ids: ClassVar[tuple[int, ...]] = ()  # a prompt of token ids does the same
    force_id: ClassVar[int | None] = None
    logprobs: int | None = Field(default=None, ge=0, le=MOST_TOP)

    chat = False

    @property
    def top(self) -> int:
        """See `_Ask`."""
        return self.logprobs or 0

    @property
    def wants_logprobs(self) -> bool:
        """See `_Ask`."""
        return self.logprobs is not None

    def prompts(self) -> list[str | Sequence[int]]:
        """Each prompt, as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise UsageError("'prompt' is empty: expected a text, token ids, or a list of these")
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


def chat_ask(body: Mapping[str, Any]) -> ChatAsk:
    """The checked body. Raises UsageError, and UnsupportedError for what this server does not have."""
    return checked(ChatAsk, _known(body))


def text_ask(body: Mapping[str, Any]) -> TextAsk:
    """The checked body. Raises UsageError, and UnsupportedError for what this server does not have."""
    return checked(TextAsk, _known(body))


def guidance_change(body: Mapping[str, Any]) -> dict[str, Any]:
    """What a PATCH changes. Raises UsageError."""
    if not (given := checked(GuidanceChange, _known(body)).given()):
        raise UsageError(f"nothing to change: expected some of {', '.join(GUIDANCE)}")
    return given


def _known(body: Mapping[str, Any]) -> dict[str, Any]:
    known = {}
    for name, value in body.items():
        if value is None or name in _IGNORED:
            continue
        if name not in _NEUTRAL:
            known[name] = value
        elif value not in _NEUTRAL[name]:
            raise UnsupportedError(name, value)
    for fields in (known, *known.values()):
        if isinstance(fields, dict) and len(fields) > _MOST_FIELDS:
            raise UsageError(f"expected at most {_MOST_FIELDS} fields, got {len(fields)}")
    return known


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise UsageError(f"'messages' expected objects with 'role' and 'content', got {shown(message)}")
    role = message.get("role")
    if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
        raise UnsupportedError("tools", message)
    if role not in ("system", "developer", "user", "assistant"):
        raise UsageError(f"'role' expected system, developer, user or assistant, got {shown(role)}")
    # the newer name of the same thing; hardly a chat template knows it
    return Message(role="system" if role == "developer" else role, content=_text(message.get("content")))


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        texts = [part.get("text") for part in content if part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
    raise UsageError(f"'content' expected a text, or parts of type 'text', got {shown(content)}")
