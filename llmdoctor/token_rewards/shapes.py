"""What one record says: a preference pair or a prompt, in whichever common shape it comes.

The shapes are recognised by their columns:

- prompt, chosen, rejected: texts, or message lists;
- chosen, rejected with the prompt inside: HH-RLHF transcripts, or message lists that share all but the last message;
- prompt, response_0, response_1 and a label column that holds the number of the better response (PKU-SafeRLHF).
"""

import re
from collections.abc import Iterator
from typing import Any, get_args

from llmdoctor.records import Message, PreferencePair, Role
from llmdoctor.token_rewards.sources import Unusable

DEFAULT_LABEL = "better_response_id"
NEEDED = f"prompt + chosen + rejected, chosen + rejected, or prompt + response_0 + response_1 + {DEFAULT_LABEL}"
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT_ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell it, tokenizers cannot read it


def to_pair(id: str, record: object, label: str | None) -> PreferencePair:
    """The pair that a record holds; raises `Unusable` where it holds none. For ``label`` see ``read_pairs``."""
    columns = _columns(record)
    chosen, rejected = _answers(columns, label)
    prompt = columns.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt_chosen, chosen_text = _split_text(prompt, chosen)
        prompt_rejected, rejected_text = _split_text(prompt, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        prompt_chosen, chosen_text = _split_messages(prompt, chosen)
        prompt_rejected, rejected_text = _split_messages(prompt, rejected)
    else:
        raise Unusable("answers are neither two texts nor two message lists")
    if prompt_chosen != prompt_rejected:
        raise Unusable("prompts differ")
    if not chosen_text.strip() or not rejected_text.strip():
        raise Unusable("empty answer")
    if chosen_text == rejected_text:
        raise Unusable("both answers are the same")
    if any(_LONE_SURROGATE.search(text) for text in (chosen_text, rejected_text, *_contents(prompt_chosen))):
        raise Unusable("not Unicode: half of a surrogate pair")
    return PreferencePair(id, tuple(_ends_with_user(prompt_chosen)), chosen_text, rejected_text)


def _contents(messages: list[Message]) -> Iterator[str]:
    return (message["content"] for message in messages)


def _columns(record: object) -> dict[str, Any]:
    """The columns of a record that hold something."""
    if isinstance(record, Unusable):
        raise record
    if not isinstance(record, dict):
        raise Unusable("not a JSON object")
    return {key: value for key, value in record.items() if value is not None}


def _answers(columns: dict[str, Any], label: str | None) -> tuple[object, object]:
    """The preferred answer and the other one, in whichever columns they are."""
    label = label or DEFAULT_LABEL
    if {"prompt", "response_0", "response_1", label} <= columns.keys():
        better = columns[label]
        if better not in (0, 1):
            raise Unusable(f"{label} is neither 0 nor 1")
        return columns[f"response_{int(better)}"], columns[f"response_{1 - int(better)}"]
    if {"chosen", "rejected"} <= columns.keys():
        return columns["chosen"], columns["rejected"]
    needed = ("prompt", "response_0", "response_1", label) if "response_0" in columns else ("chosen", "rejected")
    missing = next(column for column in needed if column not in columns)
    raise Unusable(f"missing column {missing!r} (found {', '.join(map(str, columns)) or 'none'})")


def _split_text(prompt: object, answer: str) -> tuple[list[Message], str]:
    """Prompt and answer, from two columns or from an HH-RLHF transcript that holds both."""
    if prompt is None or _is_transcript(answer):
        return _split_messages(None, _transcript(answer))
    if isinstance(prompt, str) and not _is_transcript(prompt):
        return [{"role": "user", "content": prompt}], answer
    # The prompt is a transcript or a message list; the answer continues it.
    messages = _prompt_messages(prompt)
    return messages, answer.removeprefix(" ").rstrip() if isinstance(prompt, str) else answer


def _split_messages(prompt: object, answer: list[Any]) -> tuple[list[Message], str]:
    """Prompt and answer, from two columns or from a conversation that holds both."""
    messages = _messages(answer)
    if prompt is not None and [message["role"] for message in messages] == ["assistant"]:
        messages = [*_prompt_messages(prompt), *messages]
    if len(messages) == 1:
        raise Unusable("missing column 'prompt', and no prompt inside the answers")
    if messages[-1]["role"] != "assistant":
        raise Unusable("the conversation does not end with an answer")
    return messages[:-1], messages[-1]["content"]


def _is_transcript(text: str) -> bool:
    return text.lstrip("\n").startswith("Human:") and "\n\nAssistant:" in text


def _transcript(text: str) -> list[Message]:
    if not _is_transcript(text):
        raise Unusable("missing column 'prompt', and no prompt inside the answers")
    _, *pieces = _TRANSCRIPT_TURN.split("\n\n" + text.lstrip("\n"))
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": _TRANSCRIPT_ROLES[who], "content": said.removeprefix(" ").rstrip()} for who, said in turns]


def _prompt_messages(prompt: object) -> list[Message]:
    if isinstance(prompt, str):
        if not _is_transcript(prompt):
            return [{"role": "user", "content": prompt}]
        messages = _transcript(prompt)
        return messages if messages[-1]["content"] or messages[-1]["role"] == "user" else messages[:-1]
    return _messages(prompt)


def _messages(value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Unusable("neither a text nor a list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise Unusable("a message without role and content")
        if message.get("role") not in get_args(Role):
            raise Unusable(f"unknown role {message.get('role')!r}")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _ends_with_user(messages: list[Message]) -> list[Message]:
    if messages[-1]["role"] != "user":
        raise Unusable("the prompt does not end with a user turn")
    if not messages[-1]["content"].strip():
        raise Unusable("empty prompt")
    return messages


def to_prompt(record: object) -> str | list[Message]:
    """The prompt that a record holds; raises `Unusable` where it holds none."""
    if isinstance(record, Unusable):
        raise record
    prompt = record
    if isinstance(record, dict):
        turns = record.get("turns")
        prompt = record.get("prompt", turns[0] if isinstance(turns, list) and turns else None)
        if prompt is None:
            raise Unusable(f"expected a text, 'prompt' or 'turns', found {', '.join(map(str, record)) or 'nothing'}")
    messages = _ends_with_user(_prompt_messages(prompt))
    return prompt if isinstance(prompt, str) else messages
