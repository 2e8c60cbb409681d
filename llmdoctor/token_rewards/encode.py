"""A preference pair as token ids under every face, its prompt cut to what the patient's context holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmdoctor.errors import DataError
from llmdoctor.models import Patient
from llmdoctor.records import FacePair, Message, PreferencePair, Side, SkippedRecord
from llmdoctor.text import end_of_turn, prompt_ids, response_ids, with_system


@dataclass(frozen=True, slots=True)
class EncodedResponse:
    """One response ready to be scored.

    ``prompt`` are the prompt's ids without a face, ``faced`` those under every face: the positive ones of all face
    pairs, then the negative ones. ``response`` ends with the end-of-turn token.
    """

    pair_id: str
    side: Side
    prompt: list[int]
    faced: list[list[int]]
    response: list[int]


EncodedPair = tuple[EncodedResponse, EncodedResponse]


class PairEncoder:
    """Encodes pairs for one patient under ``faces``; ``truncated`` counts the prompts that were cut.

    Raises LoadError when the tokenizer has no end-of-sequence token.
    """

    def __init__(self, patient: Patient, faces: Mapping[str, FacePair]) -> None:
        self.truncated = 0
        self._patient, self._tokenizer = patient, patient.tokenizer
        self._systems = [face.positive for face in faces.values()] + [face.negative for face in faces.values()]
        self._end_id = end_of_turn(patient.tokenizer, patient.eos_ids)

    def encode(self, pair: PreferencePair, on_skip: Callable[[SkippedRecord], None]) -> EncodedPair | None:
        """Token ids of both responses, their prompt cut from the left to fit; None for a pair that is skipped."""
        chosen, rejected = (response_ids(self._tokenizer, text, self._end_id) for text in (pair.chosen, pair.rejected))
        room = self._patient.context - max(len(chosen), len(rejected))
        try:
            fitting = self._fitting(list(pair.prompt), room)
        except DataError as error:  # the chat template refuses this conversation
            on_skip(SkippedRecord(int(pair.id), str(error)))
            return None
        if fitting is None:
            reason = f"no room for its answers and a prompt in the patient's context of {self._patient.context} tokens"
            on_skip(SkippedRecord(int(pair.id), reason))
            return None
        messages, prompt, faced = fitting
        self.truncated += messages != list(pair.prompt)
        return (
            EncodedResponse(pair.id, "chosen", prompt, faced, chosen),
            EncodedResponse(pair.id, "rejected", prompt, faced, rejected),
        )

    def _fitting(
        self, messages: list[Message] | None, room: int
    ) -> tuple[list[Message], list[int], list[list[int]]] | None:
        """The end of the conversation that takes at most ``room`` tokens, and its ids without and under every face.

        Whole turns go first, the oldest first; then the beginning of the last turn. None when nothing is left.
        """
        while messages:
            prompt, *faced = (
                prompt_ids(self._tokenizer, with_system(messages, system)) for system in (None, *self._systems)
            )
            excess = max(map(len, (prompt, *faced))) - room
            if excess <= 0:
                return messages, prompt, faced
            messages = _without_oldest_turn(messages) or self._without_first_tokens(messages, excess)
        return None

    def _without_first_tokens(self, messages: list[Message], count: int) -> list[Message] | None:
        """The conversation without the first ``count`` tokens of its last turn; None when that leaves nothing."""
        *before, last = messages
        content = last["content"]
        offsets = self._tokenizer(content, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
        kept = content[offsets[count][0] :] if count < len(offsets) else ""
        # A character may be several tokens, all of one offset. Then nothing was cut yet: drop the whole character.
        kept = kept if len(kept) < len(content) else kept[1:]
        return [*before, {**last, "content": kept}] if kept.strip() else None


def _without_oldest_turn(messages: list[Message]) -> list[Message] | None:
    """The conversation from its second user turn on, its system prompt kept; None when there is only one."""
    system = [m for m in messages if m["role"] in ("system", "developer")]
    turns = [m for m in messages if m["role"] not in ("system", "developer")]
    later = [i for i, m in enumerate(turns) if m["role"] == "user" and i > 0]
    return [*system, *turns[later[0] :]] if later else None
