"""The patient's log-probs of encoded pairs under every face, in batches that fit the device.

Beside the letters of `llmdoctor.records`: S are the 2F system prompts, positive then negative ones; R are the rows of a
forward, S of them per unit of the batch; M are the response tokens of the whole batch; L are the columns of a row.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from llmdoctor.errors import LoadError
from llmdoctor.models import Patient, not_numbers
from llmdoctor.records import FacePair, Floats, PairScores, TokenScores
from llmdoctor.token_rewards.encode import EncodedPair, EncodedResponse
from llmdoctor.token_rewards.head import FaceHead
from llmdoctor.token_rewards.rows import PatientRows, Unit, places

_CPU_BATCH, _MIN_BATCH, _MAX_BATCH = 4096, 2048, 65536  # tokens per forward when none are given


def fitting_batch_tokens(patient: Patient) -> int:
    """Padded tokens per forward that should fit: on CUDA what half of the free memory holds, elsewhere 4096.

    A power of two. A layer needs about twelve hidden and four feed-forward widths per token at a time.
    """
    device, config = patient.model.device, patient.model.config.get_text_config()
    if device.type != "cuda":
        return _CPU_BATCH
    free, _ = torch.cuda.mem_get_info(device)
    feed_forward = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    bytes_per_token = (12 * config.hidden_size + 4 * feed_forward) * patient.model.dtype.itemsize
    fitting = max(1, free // 2 // bytes_per_token)
    return min(max(1 << (int(fitting).bit_length() - 1), _MIN_BATCH), _MAX_BATCH)


class Scorer:
    """Runs the patient over batches of responses, every face of one response in the same forward."""

    def __init__(self, patient: Patient, faces: Mapping[str, FacePair], batch_tokens: int) -> None:
        self._patient, self._names = patient, tuple(faces)
        self._rows = PatientRows(patient, batch_tokens)
        self._head = FaceHead(patient, self._rows.lm, max(1, len(faces)))

    def score(self, pairs: Sequence[EncodedPair]) -> list[PairScores]:
        """Score a window of pairs, in batches of similar length; the result is in the order given.

        Raises LoadError when the log-probs are not numbers.
        """
        if not self._names:  # nothing to score: the folder is for a probe
            none_0_0, no_ids = np.zeros((0, 0), dtype=np.float32), np.zeros(0, dtype=np.int32)
            return [PairScores(*self._split(pair, none_0_0, none_0_0, no_ids)) for pair in pairs]
        found = self._rows.in_batches(pairs, 2 * len(self._names), self._score_batch)
        scores = {(result.pair_id, result.side): result for result in found}
        return [PairScores(*(scores[response.pair_id, response.side] for response in pair)) for pair in pairs]

    @torch.inference_mode()
    def _score_batch(self, batch: Sequence[Unit]) -> list[TokenScores]:
        device = self._patient.model.device
        responses = [response for unit in batch for response in unit]
        hidden_R_L_H = self._rows.hidden([(faced, unit) for unit in batch for faced in unit[0].faced])
        row_S_M, column_S_M = places(batch)
        hidden_S_M_H = hidden_R_L_H[row_S_M.to(device), column_S_M.to(device)]
        targets_M = torch.tensor([token for r in responses for token in r.response], device=device)
        step = self._head.positions
        pieces = [
            self._head(hidden, targets)
            for hidden, targets in zip(hidden_S_M_H.split(step, dim=1), targets_M.split(step), strict=True)
        ]
        own_S_M, other_S_M, other_M = (torch.cat(part, dim=-1).cpu().numpy() for part in zip(*pieces, strict=True))
        if np.isnan(own_S_M).any():  # it would silently become a reward of 0
            raise LoadError(not_numbers(f"the log-probs of the patient {self._patient.name}"))
        return self._split(responses, own_S_M, other_S_M, other_M.astype(np.int32))

    def _split(
        self, responses: Sequence[EncodedResponse], own_S_M: Floats, other_S_M: Floats, other_M: np.ndarray
    ) -> list[TokenScores]:
        """The numbers of a batch as records, one per response."""
        results, start = [], 0
        for r in responses:
            span = slice(start, start := start + len(r.response))
            positive, negative = self._by_face(own_S_M[:, span])
            alternative_positive, alternative_negative = self._by_face(other_S_M[:, span])
            results.append(
                TokenScores(
                    pair_id=r.pair_id,
                    side=r.side,
                    prompt_ids=np.array(r.prompt, dtype=np.int32),
                    response_ids=np.array(r.response, dtype=np.int32),
                    positive=positive,
                    negative=negative,
                    alternative_ids=other_M[span],
                    alternative_positive=alternative_positive,
                    alternative_negative=alternative_negative,
                )
            )
        return results

    def _by_face(self, logprobs_S_T: Floats) -> tuple[dict[str, Floats], dict[str, Floats]]:
        rows = np.ascontiguousarray(logprobs_S_T)
        half = len(self._names)
        return dict(zip(self._names, rows[:half], strict=True)), dict(zip(self._names, rows[half:], strict=True))
