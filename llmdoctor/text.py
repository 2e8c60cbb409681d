"""From a conversation to token ids, with or without a face, and from token ids back to text.

A prompt and its response are tokenised separately and their ids joined, so that no token spans the boundary.
"""

import json
from collections.abc import Iterable, Sequence

from jinja2.exceptions import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from llmdoctor.errors import DataError, LoadError
from llmdoctor.harmless import require_unicode
from llmdoctor.records import Message

_SPEAKERS = {"user": "Human", "assistant": "Assistant"}


def conversation(prompt: str | Sequence[Message]) -> list[Message]:
    """A prompt as messages. A string is one user turn."""
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The conversation with ``system`` as its system prompt; its own system prompt follows after an empty line."""
    if not system:
        return list(messages)
    own = [m["content"] for m in messages if m["role"] == "system"]
    rest = [m for m in messages if m["role"] != "system"]
    return [Message(role="system", content="\n\n".join([system, *own])), *rest]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids [L] of a conversation, up to where the assistant's next turn begins.

    The chat template lays it out. If it refuses or drops the system role, the system prompt becomes the beginning of
    the first user turn.

    A tokenizer without a chat template belongs to a base model. Then a single user turn is its plain text, after the
    system prompt and an empty line if there is one. Several turns become paragraphs "Human: …" and "Assistant: …", and
    the last one is "Assistant:".

    Raises DataError if the conversation is not Unicode, the template refuses it (some require that user and assistant
    alternate) or drops a turn of a developer or tool, or if there is no template for such a turn.
    """
    for message in messages:
        require_unicode(message["content"] or "", f"the {message['role']} turn")
    if tokenizer.chat_template is None:
        return list(tokenizer(_plain_layout(messages)).input_ids)
    return list(tokenizer(_templated(tokenizer, messages), add_special_tokens=False).input_ids)


def response_ids(tokenizer: PreTrainedTokenizerBase, text: str, end_id: int) -> list[int]:
    """Token ids of a response, ending with the end-of-turn token [T]. Raises DataError for text that is not Unicode."""
    return [*tokenizer(require_unicode(text, "the answer"), add_special_tokens=False).input_ids, end_id]


def end_of_turn(tokenizer: PreTrainedTokenizerBase, eos_ids: Iterable[int]) -> int:
    """The id that ends an assistant turn: the one that the chat template puts there if it is in ``eos_ids``, else EOS.

    ``eos_ids`` are all ids that end an answer. Raises LoadError if neither the template nor the tokenizer has one.
    """
    # Many chat models end a turn with a token of their own (<|im_end|>, <|eot_id|>) while the tokenizer's EOS ends a
    # document. Stage 1 must score the one that the patient really says.
    if tokenizer.chat_template is not None:
        turn = [Message(role="user", content="a"), Message(role="assistant", content="@@")]
        rendered = tokenizer.apply_chat_template(turn, tokenize=False)  # type: ignore[arg-type]
        after = str(rendered).rpartition("@@")[2].lstrip()
        for token in tokenizer(after, add_special_tokens=False).input_ids[:1]:
            if token in set(eos_ids):
                return int(token)
    if tokenizer.eos_token_id is None:
        raise LoadError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'} names no end-of-sequence token, which a scored "
            'answer must end with: set "eos_token" in its tokenizer_config.json to the token that ends an answer'
        )
    return int(tokenizer.eos_token_id)  # type: ignore[arg-type]


class TextStream:
    """Decodes token ids one at a time. A piece of text is empty until the bytes of a character are complete."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        """The text that this token adds."""
        return self._stream.step(self._backend, token_id) or ""


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """The text of every token; joined they are the decoded text."""
    stream = TextStream(tokenizer)
    return [stream.push(int(i)) for i in ids]


def _templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    tries = [list(messages)]
    # Without a system role: its prompt as the beginning of the next turn.
    if messages[0]["role"] == "system" and len(messages) > 1:
        opening = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        tries.append([{**messages[1], "content": opening}, *messages[2:]])
    for attempt in tries:
        try:
            text = str(tokenizer.apply_chat_template(attempt, tokenize=False, add_generation_prompt=True))  # type: ignore[arg-type]
        except (TemplateError, TypeError, ValueError) as error:  # the last two from a template that expects other keys
            refusal = str(error)
            continue
        if dropped := _dropped(messages, text):
            refusal = f"it drops the {dropped} turn"
            continue
        # Some templates silently drop a system turn. Both faces would then give the same prompt.
        if attempt is tries[-1] or attempt[0]["content"].strip() in text:
            return text
    raise DataError(f"the model's chat template refuses this conversation: {refusal}")


def _dropped(messages: Sequence[Message], text: str) -> str | None:
    """The role of a turn, of those that not every template knows, that is not in the rendered ``text``."""
    for message in messages:
        said = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if message["role"] not in ("system", "user", "assistant"):
            said.append(message["content"].strip())
        # some templates write a tool's result as JSON
        if not all(part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text for part in said):
            return message["role"] if message["role"] != "assistant" else "tool-calling"
    return None


def _plain_layout(messages: Sequence[Message]) -> str:
    if unknown := [m["role"] for m in messages if m["role"] not in ("system", *_SPEAKERS) or "tool_calls" in m]:
        raise DataError(f"no chat template, and without one there is no layout for turns of {unknown[0]!r} with tools")
    system = [m["content"] for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    if len(turns) == 1:
        return "\n\n".join([*system, turns[0]["content"]])
    written = [f"{_SPEAKERS[m['role']]}: {m['content']}" for m in turns]
    return "\n\n".join([*system, *written, "Assistant:"])
