"""From a conversation to token ids, with or without a face, and from token ids back to text.

A prompt and its response are tokenised separately and their ids joined, so that no token spans the boundary.
"""

import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from llmdoctor.chat_template import ChatTemplate
from llmdoctor.errors import DataError, LoadError
from llmdoctor.harmless import require_unicode
from llmdoctor.records import Message

_SPEAKERS = {"user": "Human", "assistant": "Assistant"}
_REASONED = re.compile(r".*(?:</[\w:]*(?:think|thought|reason)\w*>|\[/THINK\])", re.DOTALL | re.IGNORECASE)


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
    alternate) or drops a turn or a part of it, or if there is no template for a turn of a developer or tool. Of an
    answer, what is reasoned before it may be dropped.
    """
    for message in messages:
        require_unicode(message["content"] or "", f"the {message['role']} turn")
    if tokenizer.chat_template is None:
        return list(tokenizer(_plain_layout(messages)).input_ids)
    return list(tokenizer(conversation_text(tokenizer, messages, answer_next=True), add_special_tokens=False).input_ids)


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
        try:
            rendered = ChatTemplate.of(tokenizer).render(turn, answer_next=False)
        except DataError:  # it refuses these turns
            rendered = ""
        after = rendered.rpartition("@@")[2].lstrip()
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
    """Decodes token ids one at a time. Joined, the pieces are what the tokenizer decodes the whole to.

    A piece is empty until it is certain: until the bytes of a character are complete and, where a tokenizer spells
    single bytes as tokens (``<0x0A>``), until the first token that is not one, because one wrong byte spoils the whole
    run of them. An unfinished character at the end is left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._backend = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        added = self._backend.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}
        self._ids: list[int] = []  # the last ones; those before say nothing about what follows
        self._shown = 0  # characters of their text that were shown
        self._open = False  # whether they end with a byte

    def push(self, token_id: int, *, last: bool = False) -> str:
        """The text that this token adds; with the ``last`` one, also what was held back."""
        token = None if token_id in self._special else self._backend.id_to_token(token_id)
        if token is not None:  # decoding leaves the others out
            self._ids.append(token_id)
            self._open = _BYTE.fullmatch(token) is not None
        if self._open and not last:
            return ""
        text = self._backend.decode(self._ids)
        # a character that is not finished shows as one replacement character, or as one for each byte that is a token
        certain = text.rstrip(_UNFINISHED) if self._open else text.removesuffix(_UNFINISHED)
        piece: str = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if len(self._ids) > 2 * _KEPT and not self._open:
            waiting = len(text) - self._shown
            self._ids = self._tail()
            self._shown = len(self._backend.decode(self._ids)) - waiting
        return piece

    def ends_with(self, token_id: int) -> bool:
        """Whether this token, just pushed, is a byte that waits for the end of its run."""
        return self._open and self._ids[-1:] == [token_id]

    def _tail(self) -> list[int]:
        """The last ids, from a token on that begins no later than the bytes it is read with."""
        start = len(self._ids) - _KEPT
        while start and _BYTE.fullmatch(self._backend.id_to_token(self._ids[start])):
            start -= 1
        return self._ids[start:]


_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_UNFINISHED = "\ufffd"
_KEPT = 8  # tokens, of at least a byte each; a character has at most four


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> list[str]:
    """The text of every token; joined they are the decoded text, without an unfinished character at its end."""
    stream, listed = TextStream(tokenizer), list(map(int, ids))
    texts = [""] * len(listed)
    run: list[int] = []  # the bytes that wait for the end of their run: then each gets its part of the text
    for n, token_id in enumerate(listed):
        piece = stream.push(token_id, last=n == len(listed) - 1)
        if stream.ends_with(token_id):
            run.append(n)
        if piece:
            data = bytes(int(tokenizer.backend_tokenizer.id_to_token(listed[i])[1:-1], 16) for i in run)  # type: ignore[attr-defined]
            for i, length in zip(run, _lengths(data), strict=True):
                texts[i], piece = piece[:length], piece[length:]
            texts[n], run = texts[n] + piece, []
    return texts


def _lengths(data: bytes) -> list[int]:
    """How many characters end with each byte; where one byte is wrong, all are read as one character each."""
    decoder = getincrementaldecoder("utf-8")()
    try:
        lengths = [len(decoder.decode(bytes([byte]))) for byte in data]
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return [1] * len(data)
    return lengths


def text_behind(tokenizer: PreTrainedTokenizerBase, before: int, token_id: int) -> str:
    """The text of a token behind another one: some pieces begin with a space only there."""
    decode = tokenizer.backend_tokenizer.decode  # type: ignore[attr-defined]
    return str(decode([before, token_id])[len(decode([before])) :]).rstrip(_UNFINISHED)


def conversation_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, answer_next: bool = False
) -> str:
    """A conversation in the chat template, with what opens the assistant's turn if ``answer_next``.

    If the template refuses or drops the system role, the system prompt becomes the beginning of the first user turn.
    Raises DataError as `prompt_ids` does, LoadError for a template that cannot be used or exceeds its bounds.
    """
    tries = [list(messages)]
    # Without a system role: its prompt as the beginning of the next turn.
    if messages[0]["role"] == "system" and len(messages) > 1:
        opening = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        tries.append([{**messages[1], "content": opening}, *messages[2:]])
    template = ChatTemplate.of(tokenizer)
    for attempt in tries:
        try:
            text = template.render(attempt, answer_next=answer_next)
        except DataError as error:
            refusal = error
            continue
        if dropped := _dropped(messages, text):
            refusal = DataError(
                f"the model's chat template refuses this conversation: it drops the {dropped} turn, or a part of it"
            )
            continue
        # Some templates silently drop a system turn. Both faces would then give the same prompt.
        if attempt is tries[-1] or attempt[0]["content"].strip() in text:
            return text
    raise refusal


def _dropped(messages: Sequence[Message], text: str) -> str | None:
    """The role of a turn that is not, or not whole, in the rendered ``text``."""
    for message in messages:
        said = [call["function"]["name"] for call in message.get("tool_calls", ())]
        if message["role"] != "system":  # which is looked for by the caller
            content = message["content"] or ""
            reasoned = _REASONED.match(content) if message["role"] == "assistant" else None  # which some leave out
            said.append(content[reasoned.end() if reasoned else 0 :].strip())
        # some templates write a tool's result as JSON
        if not all(part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text for part in said):
            return "tool-calling" if message.get("tool_calls") else message["role"]
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
