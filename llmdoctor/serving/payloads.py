"""Tokens as OpenAI's objects."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmdoctor.decoding.rows import Finish
from llmdoctor.harmless import finite
from llmdoctor.records import GuidedToken

_LEAST = -9999.0  # what OpenAI writes for the log-prob of the impossible: JSON has no infinity
_FINISHES = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass
class Shape:
    """How the answers to one request are written: whole, or in chunks."""

    id: str
    model: str
    chat: bool
    logprobs: bool
    details: bool  # of llmdoctor's own
    top: int = 0  # alternatives in OpenAI's part; llmdoctor's has those of the patient behind them
    counted: bool = False  # a stream whose last chunk has the usage: the others say that they have none
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answers: Sequence[Sequence[GuidedToken]], finishes: Sequence[Finish], usage: Any) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = [
            self._choice(i, tokens, finish, delta=False, offset=0)
            for i, (tokens, finish) in enumerate(zip(answers, finishes, strict=True))
        ]
        return {**self._head("chat.completion" if self.chat else "text_completion"), "choices": choices, "usage": usage}

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat answer, which says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def token(self, index: int, token: GuidedToken, finish: Finish | None, offset: int) -> dict[str, Any]:
        """A chunk of one token. ``offset`` is the number of characters before it."""
        return self._chunk([self._choice(index, [token], finish, delta=True, offset=offset)])

    def closing(self, usage: Any) -> dict[str, Any]:
        """The last chunk, where usage was asked for."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        none = {"usage": None} if self.counted else {}
        return {**self._head("chat.completion.chunk" if self.chat else "text_completion"), "choices": choices, **none}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(
        self, index: int, tokens: Sequence[GuidedToken], finish: Finish | None, *, delta: bool, offset: int
    ) -> dict[str, Any]:
        text = "".join(token.text for token in tokens)
        # the token that ends an answer is no part of it
        spoken = tokens[:-1] if finish == "eos" else tokens
        choice: dict[str, Any] = {"index": index}
        if not self.chat:
            choice["text"] = text
            choice["logprobs"] = _text_logprobs(spoken, offset, self.top) if self.logprobs else None
        else:
            content = {"content": text} if text or not delta else {}
            choice["delta" if delta else "message"] = (
                content if delta else {"role": "assistant", "refusal": None, **content}
            )
            choice["logprobs"] = None
            if self.logprobs:
                choice["logprobs"] = {"content": [_logprob(token, self.top) for token in spoken], "refusal": None}
        choice["finish_reason"] = _FINISHES[finish] if finish else None
        if self.details:
            choice["llmdoctor"] = {"tokens": [finite(token.to_dict()) for token in tokens]}
        return choice


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Counts of tokens."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _logprob(token: GuidedToken, top: int) -> dict[str, Any]:
    return {**_entry(token), "top_logprobs": [_entry(other) for other in token.top[:top]]}


def _entry(token: Any) -> dict[str, Any]:
    return {"token": token.text, "logprob": max(token.logprob, _LEAST), "bytes": list(token.text.encode())}


def _text_logprobs(tokens: Iterable[GuidedToken], offset: int, top: int) -> dict[str, Any]:
    listed = list(tokens)
    offsets = []
    for token in listed:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in listed],
        "token_logprobs": [max(token.logprob, _LEAST) for token in listed],
        "top_logprobs": [
            {other.text: max(other.logprob, _LEAST) for other in reversed(token.top[:top])} for token in listed
        ],
        "text_offset": offsets,
    }
