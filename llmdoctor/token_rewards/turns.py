"""Conversations in whichever form data sets write them, as messages.

A conversation is a text (one user turn), an HH-RLHF transcript, a text with the turn marks of HelpSteer2, or a list of
messages: {"role", "content"} or ShareGPT's {"from", "value"}. A content is a text, or parts that are all texts.
"""

import ast
import json
import re
from collections.abc import Sequence
from typing import Any, cast, get_args

from llmdoctor.records import Message, Role
from llmdoctor.schema import shown
from llmdoctor.token_rewards.sources import Cells, Unusable

_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
_MARKED_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_MESSAGES_IN_A_CELL = re.compile(r"\s*\[?\s*\{\s*[\"'](role|content|from|value)[\"']\s*:")
_ROLES = {
    **{role: role for role in get_args(Role)},
    **dict.fromkeys(("human", "Human", "User"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "Assistant"), "assistant"),
    "observation": "tool",
}
NOTHING: tuple[Any, ...] = (None, "", "[]", [], {})
_UNREAD = ("tools", "functions", *("image", "images", "audio", "audios", "video", "videos"), "documents", "files")
_UNREAD_IN_TURNS = ("reasoning_content", "reasoning", "thinking", "refusal")  # said by the turn, but not its content
_OPENING = ("system", "developer", "user")  # an answer that begins with one of these holds its own prompt
_ANSWERED = ("user", "tool", "function")


def split(prompt: object, answer: object) -> tuple[list[Message], str]:
    """Prompt and answer, where ``answer`` is a text or a conversation that ends with it and may hold the prompt too.

    Raises `Unusable` where there is no prompt, no answer at the end, or where ``prompt`` says something else than the
    prompt inside.
    """
    if isinstance(answer, str) and prompt is not None and not _is_transcript(answer):
        # Only HH-RLHF's own layout puts spaces around what was said.
        spaced = isinstance(prompt, str) and _is_transcript(prompt)
        return prompt_messages(prompt), answer.removeprefix(" ").rstrip() if spaced else answer
    messages = _transcript(answer) if isinstance(answer, str) else message_list(answer)
    if prompt is not None:
        messages = _joined(prompt_messages(prompt), messages)
    if len(messages) == 1:
        raise Unusable("missing column 'prompt', and no prompt inside the answers")
    last = messages[-1]
    if last["role"] != "assistant":
        raise Unusable("the conversation does not end with an answer")
    if "tool_calls" in last:
        raise Unusable("an answer calls a tool, and is no text")
    return messages[:-1], last["content"]


def _joined(outer: list[Message], messages: list[Message]) -> list[Message]:
    """The conversation ``messages`` after or with the prompt ``outer`` that stands beside it; nothing is left out."""
    *inner, answer = messages
    if messages[0]["role"] not in _OPENING or not inner:
        return [*outer, *messages]
    within, around = list(map(_said, outer)), list(map(_said, inner))
    if any(around[i : i + len(within)] == within for i in range(len(around))):
        return messages
    if within[-len(around) :] == around:
        return [*outer, answer]
    raise Unusable("the prompt beside the answers differs from the one inside them")


def _said(message: Message) -> tuple[str, str, str]:
    return (
        message["role"],
        message["content"].strip(),
        json.dumps(message.get("tool_calls"), sort_keys=True, default=str),
    )


def prompt_messages(prompt: object) -> list[Message]:
    """The messages of a prompt; an assistant turn without text at its end, where the answer belongs, is left out."""
    if isinstance(prompt, dict) and "messages" in prompt:  # OpenAI's {"messages": [...], "tools": [...]}
        refuse_unread(prompt)
        if prompt.get("system") not in NOTHING:
            raise Unusable("a system prompt beside the messages of the prompt: put it into them")
        prompt = prompt["messages"]
    if not isinstance(prompt, str):
        return message_list(prompt)
    if _is_transcript(prompt):
        messages = _transcript(prompt)
    else:
        messages = _turns(["User", *_MARKED_TURN.split(prompt)])
    return (
        messages if len(messages) == 1 or messages[-1]["content"] or messages[-1]["role"] == "user" else messages[:-1]
    )


def refuse_unread(columns: dict[str, Any]) -> None:
    """Raise `Unusable` where something stands beside the prompt that it needs and that a pair cannot hold."""
    for name in _UNREAD:
        if columns.get(name) not in NOTHING:
            raise Unusable(f"{name!r} cannot be kept: only texts are read")


def ends_with_user(messages: list[Message]) -> list[Message]:
    """The same messages; raises `Unusable` unless they end with what an assistant answers."""
    if messages[-1]["role"] not in _ANSWERED:
        raise Unusable("the prompt does not end with a user turn")
    if not messages[-1]["content"].strip():
        raise Unusable("empty prompt")
    return messages


def _is_transcript(text: str) -> bool:
    return text.lstrip("\n").startswith("Human:") and "\n\nAssistant:" in text


def _transcript(text: str) -> list[Message]:
    if not _is_transcript(text):
        raise Unusable("missing column 'prompt', and no prompt inside the answers")
    messages = _turns(_TRANSCRIPT_TURN.split("\n\n" + text.lstrip("\n"))[1:])
    return [{**message, "content": message["content"].removeprefix(" ").rstrip()} for message in messages]


def _turns(pieces: Sequence[str]) -> list[Message]:
    """Messages from speaker, text, speaker, text, ..."""
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": cast(Role, _ROLES[who]), "content": said} for who, said in turns]


def message_list(value: object) -> list[Message]:
    """The messages of a list, or of a single message. Raises `Unusable` for anything else."""
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise Unusable("neither a text nor a list of messages")
    return [_message(turn) for turn in value]


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise Unusable("a message without role and content")
    refuse_unread(turn)
    if unread := [name for name in _UNREAD_IN_TURNS if turn.get(name) not in NOTHING]:
        raise Unusable(f"a message with {unread[0]!r}: only its content is read")
    role = turn.get("role") or turn.get("from")
    content = turn["value"] if turn.get("content") is None and "value" in turn else turn.get("content")
    calls = parsed(turn.get("tool_calls")) or []
    if isinstance(turn.get("function_call"), dict):
        calls = [turn["function_call"]]
    if role == "function_call":  # a role of ShareGPT, whose text is the call
        role, content, calls = "assistant", None, parsed(content)
    if not isinstance(content, str | list) and not (content is None and calls):
        raise Unusable("a message without role and content")
    if not isinstance(role, str) or role not in _ROLES:
        raise Unusable(f"unknown role {shown(role)}")
    message = Message(role=cast(Role, _ROLES[role]), content=_text(content or ""))
    if calls:
        message["tool_calls"] = [_call(call) for call in (calls if isinstance(calls, list) else [calls])]
    if turn.get("tool_call_id"):
        message["tool_call_id"] = turn["tool_call_id"]
    if turn.get("name"):
        message["name"] = turn["name"]
    return message


def _text(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type") or "text" if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            raise Unusable(f"a message with a part of type {shown(kind)}: only texts are read")
        texts.append(text)
    return "".join(texts)


def _call(call: Any) -> dict[str, Any]:
    """A tool call as chat templates take it: its arguments are a mapping, which OpenAI spells as JSON."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable("a tool call without the name of a function")
    function = {**function, "arguments": parsed(function.get("arguments"))}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def from_cells(record: dict[str, Any]) -> dict[str, Any]:
    """The record; of a table of texts, the cells that spell messages are read as such."""
    if not isinstance(record, Cells):
        return record
    return {
        key: parsed(cell) if isinstance(cell, str) and _MESSAGES_IN_A_CELL.match(cell) else cell
        for key, cell in record.items()
    }


def parsed(value: Any) -> Any:
    """What a text spells in JSON, or as Python writes it (pandas does); anything but a text as it is."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise Unusable("a list in a text that is not JSON") from None
