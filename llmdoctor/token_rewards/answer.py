"""Stage 1 for a single answer, without a data set or a folder."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from llmdoctor.errors import LoadError, UsageError
from llmdoctor.models import Patient, SplitLM, not_numbers, token_log_probs
from llmdoctor.records import FacePair, Floats, Message, Side, TokenScores
from llmdoctor.text import conversation, end_of_turn, prompt_ids, response_ids, with_system


def score_answer(
    patient: Patient,
    faces: Mapping[str, FacePair],
    prompt: str | Sequence[Message],
    answer: str,
    *,
    side: Side = "chosen",
) -> TokenScores:
    """The patient's log-probs of every token of ``answer`` to ``prompt`` under every face, the end of turn included.

    They are those that ``extract`` stores; the alternatives are left out (arrays of length 0). Two forwards per face
    pair, one at a time.

    Raises UsageError (no faces, an empty answer, longer than the patient's context), DataError (a chat template that
    refuses), LoadError (a tokenizer without an end-of-sequence token, log-probs that are not numbers).
    """
    if not faces:
        raise UsageError("expected at least one face pair, got none: name one with --face")
    if not answer:
        raise UsageError("expected an answer to look at, got an empty text")
    tokenizer, lm = patient.tokenizer, SplitLM.of(patient.model)
    messages = conversation(prompt)
    response = response_ids(tokenizer, answer, end_of_turn(tokenizer, patient.eos_ids))
    nothing = np.zeros(0, dtype=np.float32)

    def score(system: str) -> Floats:
        return _log_probs(patient, lm, prompt_ids(tokenizer, with_system(messages, system)), response)

    return TokenScores(
        pair_id="",
        side=side,
        prompt_ids=np.array(prompt_ids(tokenizer, messages), dtype=np.int32),
        response_ids=np.array(response, dtype=np.int32),
        positive={name: score(face.positive) for name, face in faces.items()},
        negative={name: score(face.negative) for name, face in faces.items()},
        alternative_ids=np.zeros(0, dtype=np.int32),
        alternative_positive=dict.fromkeys(faces, nothing),
        alternative_negative=dict.fromkeys(faces, nothing),
    )


def _log_probs(patient: Patient, lm: SplitLM, prompt: list[int], response: list[int]) -> Floats:
    """The patient's log-prob of every response token after the prompt [T]."""
    if len(prompt) + len(response) > patient.context:
        raise UsageError(
            f"face, prompt and answer have {len(prompt) + len(response)} tokens, more than the patient's context of "
            f"{patient.context}: shorten them"
        )
    ids_1_L = torch.tensor([prompt + response], device=patient.model.device)
    with torch.inference_mode():
        # The hidden state before each response token: from the prompt's last token to the response's last but one.
        hidden_T_H = lm.hidden(ids_1_L, torch.ones_like(ids_1_L))[0, len(prompt) - 1 : -1]
        logprobs_T = token_log_probs(lm, hidden_T_H, ids_1_L[0, len(prompt) :], patient.vocabulary)
    found: Floats = logprobs_T.float().cpu().numpy()
    if np.isnan(found).any():
        raise LoadError(not_numbers(f"the log-probs of the patient {patient.name}"))
    return found
