"""Conversations in whichever form data sets write them, as messages.

A conversation is a text (one user turn), an HH-RLHF transcript, a text with the turn marks of HelpSteer2, or a list of
messages: {"role", "content"} or ShareGPT's {"from", "value"}. A content is a text, or parts that are all texts.
"""

import ast
import json
import re
from collections.abc import Collection, Sequence
from typing import Any, cast, get_args

from llmdoctor.records import Message, Role
from llmdoctor.schema import shown
from llmdoctor.token_rewards.sources import Cells, Unusable, json_value

_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
_MARKED_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_MESSAGES_IN_A_CELL = re.compile(
    r"\s*\[?\s*\{\s*([\"'](content|value)[\"']|([^{}\[\]]*,\s*)?[\"'](role|from)[\"'])\s*:"
)
_ROLES = {
    **{role: role for role in get_args(Role)},
    **dict.fromkeys(("human", "Human", "User"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "Assistant"), "assistant"),
    "observation": "tool",
}
NOTHING: tuple[Any, ...] = (None, "", "[]", [], {})
# Names are written as `_plain` makes them.
SYSTEMS = {
    *("system", "systemprompt", "systemmessage", "systeminstruction", "systeminstructions"),
    *("sysprompt", "sysmessage", "developer", "developerprompt", "developermessage", "persona"),
}
_UNREAD = {
    *("tools", "functions", "files", "attachments", "contexts"),
    *(
        kind + more
        for kind in ("image", "audio", "video")
        for more in ("", "s", "path", "paths", "url", "urls", "file")
    ),
    *(kind + more for kind in ("document", "passage", "article") for more in ("", "s")),
}
_TURN = ("role", "from", "content", "value", "text", "tool_calls", "function_call", "tool_call_id", "name")
_ABOUT = {  # what is kept about a turn and was not part of it
    *("id", "messageid", "msgid", "uuid", "parentid", "parentmessageid", "turnid", "conversationid", "userid", "hash"),
    *("timestamp", "createtime", "createdat", "updatetime", "updatedat", "date", "time", "country", "state", "header"),
    *("model", "modelname", "generator", "language", "lang", "source", "hashedip", "status", "recipient", "mimetype"),
    *("score", "rating", "label", "weight", "loss", "finishreason", "stopreason", "logprobs", "usage", "cachecontrol"),
    *("metadata", "meta", "moderation", "openaimoderation", "detoxifymoderation", "toxicity"),
}
_PLAIN_TYPES = (("type", "message"), ("type", "text"))
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
    if _contains(around, within):
        return messages
    if within[-len(around) :] == around:
        return [*outer, answer]
    raise Unusable("the prompt beside the answers differs from the one inside them")


def _contains(around: list[Any], within: list[Any]) -> bool:
    return any(around[i : i + len(within)] == within for i in range(len(around)))


def says_no_more(value: object, prompt: list[Message], *answers: str) -> bool:
    """Whether all that ``value`` says stands in the prompt, in whole lines, or in it and one of its answers."""
    if isinstance(value, str):
        lines = re.compile(rf"^\s*{re.escape(value.strip())}\s*$", re.MULTILINE)
        if any(lines.search(message["content"]) for message in prompt):
            return True
    try:
        within = list(map(_said, prompt_messages(value)))
    except (Unusable, RecursionError):
        return False
    whole = ([*prompt, Message(role="assistant", content=answer)] for answer in answers)
    return any(_contains(list(map(_said, messages)), within) for messages in whole)


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
        names = system_names(prompt, SYSTEMS | {"instructions"})
        if extra := _extra(prompt, ("messages", "tool_choice", *names)):
            raise Unusable(f"a prompt with {shown(extra)}: only its messages and a system prompt are read")
        return opened(message_list(prompt["messages"]), system_text(prompt, names))
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
    for name, value in columns.items():
        if _plain(name) in _UNREAD and not _is_nothing(value):
            raise Unusable(f"{shown(name)} cannot be kept: only texts are read")


def _plain(name: object) -> str:
    """The name without what tells system_prompt, system-prompt and systemPrompt apart."""
    return re.sub(r"[\s_-]", "", str(name)).lower()


def _is_nothing(value: object) -> bool:
    """Whether nothing is said; Parquet fills the objects of a column with the keys of all others."""
    return value in NOTHING or (isinstance(value, dict) and all(one in NOTHING for one in value.values()))


def _extra(fields: dict[str, Any], known: Collection[str]) -> str | None:
    """The first other field that says something: not one about the turn, and no number or truth value."""
    for name, value in fields.items():
        about = _plain(name) in _ABOUT or (name, value) in _PLAIN_TYPES or isinstance(value, bool | int | float)
        if name not in known and not about and not _is_nothing(value):
            return name
    return None


def system_names(columns: dict[str, Any], names: Collection[str] = SYSTEMS) -> list[str]:
    """The columns that hold a system prompt, in whatever way ``names`` are spelt."""
    return [name for name, value in columns.items() if _plain(name) in names and value not in NOTHING]


def system_text(columns: dict[str, Any], names: list[str]) -> str | None:
    """The one text of these columns, None without any. Raises `Unusable` unless they say the same."""
    texts = {columns[name] if isinstance(columns[name], str) else None for name in names}
    if len(texts) > 1 or None in texts:
        raise Unusable(f"{' and '.join(map(shown, names))} do not hold one system prompt")
    return texts.pop() if texts else None


def opened(messages: list[Message], system: str | None) -> list[Message]:
    """The conversation with the system prompt that stands beside it."""
    own = [message["content"] for message in messages if message["role"] == "system"]
    if not system or own == [system]:
        return messages
    if own:
        raise Unusable("the system prompt beside the conversation differs from the one inside it")
    return [{"role": "system", "content": system}, *messages]


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
    if extra := _extra(turn, _TURN):
        raise Unusable(f"a message with {shown(extra)}: only its content is read")
    roles = {name: turn.get(name) for name in ("role", "from")}
    role = _one({name: _ROLES.get(who, who) if isinstance(who, str) else who for name, who in roles.items()})
    content = _one({name: turn.get(name) for name in ("content", "value", "text")})
    calls = _one({name: _calls(turn.get(name)) for name in ("tool_calls", "function_call")})
    if role == "function_call" and not calls:  # a role of ShareGPT, whose text is the call
        role, content, calls = "assistant", None, _calls(content)
    if role is None or (not isinstance(content, str | list) and not (content is None and calls)):
        raise Unusable("a message without role and content")
    if not isinstance(role, str) or role not in _ROLES:
        raise Unusable(f"unknown role {shown(role)}")
    message = Message(role=cast(Role, _ROLES[role]), content=_text(content or ""))
    if calls:
        message["tool_calls"] = [_call(call) for call in calls]
    if turn.get("tool_call_id"):
        message["tool_call_id"] = turn["tool_call_id"]
    if turn.get("name"):
        message["name"] = turn["name"]
    return message


def _one(values: dict[str, Any]) -> Any:
    """What one or several keys of a message say. Raises `Unusable` where they say different things."""
    said = {name: value for name, value in values.items() if value not in (None, "", [])}
    first, *others = said or values
    if differing := [name for name in others if said and said[name] != said[first]]:
        raise Unusable(f"a message whose {first!r} and {differing[0]!r} differ")
    return values[first] if said else next((value for value in values.values() if value is not None), None)


def _calls(value: Any) -> list[Any]:
    calls = parsed(value)
    if _is_nothing(calls):
        return []
    return calls if isinstance(calls, list) else [calls]


def _text(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type") or "text" if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            raise Unusable(f"a message with a part of type {shown(kind)}: only texts are read")
        if extra := _extra(part, ("type", "text")) if isinstance(part, dict) else None:
            raise Unusable(f"a message with a part with {shown(extra)}: only texts are read")
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
        spelt = json_value(value)
    except (ValueError, RecursionError):
        try:
            return ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise Unusable("a list in a text that is not JSON") from None
    if isinstance(spelt, Unusable):
        raise spelt
    return spelt
