"""The patient's log-probs of encoded pairs under every face, in batches that fit the device.

Beside the letters of `llmdoctor.records`: S are the 2F system prompts, positive then negative ones; R are the rows of a
forward, S of them per unit of the batch; M are the response tokens of the whole batch; L are the columns of a row.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmdoctor.errors import LoadError
from llmdoctor.models import Patient, SplitLM, not_numbers
from llmdoctor.records import FacePair, Floats, PairScores, Side, TokenScores
from llmdoctor.token_rewards.encode import EncodedPair, EncodedResponse
from llmdoctor.token_rewards.head import FaceHead

_LONGEST_SHARED = 4096  # tokens of a row with a mask of its own, whose size is the square of that
_CPU_BATCH, _MIN_BATCH, _MAX_BATCH = 4096, 2048, 65536  # tokens per forward when none are given

_Unit = tuple[EncodedResponse, ...]  # responses that share a row: both of a pair, or one alone


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
    """Runs the patient over batches of responses, every face of one response in the same forward.

    The two responses of a pair share a row, [prompt, chosen, rejected]. The rejected response sees the prompt and
    itself only, at the positions that it would have without the chosen one. So a prompt is computed once per face. A
    model that does not accept such a mask (a probe finds out) gets a row for each response.
    """

    def __init__(self, patient: Patient, faces: Mapping[str, FacePair], batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self._patient, self._names = patient, tuple(faces)
        self._lm = SplitLM.of(patient.model)
        self._head = FaceHead(patient, self._lm, len(faces))
        self._longest_shared = self._find_longest_shared()

    def score(self, pairs: Sequence[EncodedPair]) -> list[PairScores]:
        """Score a window of pairs, in batches of similar length; the result is in the order given.

        A batch that does not fit the device's memory is halved, and so are all later ones. Raises LoadError when the
        log-probs are not numbers.
        """
        units: list[_Unit] = []
        for pair in pairs:
            units += [pair] if _row_length(pair) <= self._longest_shared else [(response,) for response in pair]
        waiting = sorted(units, key=_row_length, reverse=True)
        scores: dict[tuple[str, Side], TokenScores] = {}
        while waiting:
            tokens_per_unit = 2 * len(self._names) * _row_length(waiting[0])
            batch = waiting[: max(1, self.batch_tokens // tokens_per_unit)]
            try:
                results = self._score_batch(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                results = None
            # Outside of the handler: inside, the exception still holds the tensors of the failed forward.
            if results is None:
                self.batch_tokens = tokens_per_unit * (len(batch) // 2)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                continue
            waiting = waiting[len(batch) :]
            scores.update(((result.pair_id, result.side), result) for result in results)
        return [PairScores(*(scores[response.pair_id, response.side] for response in pair)) for pair in pairs]

    @torch.inference_mode()
    def _score_batch(self, batch: Sequence[_Unit]) -> list[TokenScores]:
        device = self._patient.model.device
        responses = [response for unit in batch for response in unit]
        hidden_R_L_H = self._hidden([(faced, unit) for unit in batch for faced in unit[0].faced])
        row_S_M, column_S_M = _places(batch)
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

    def _hidden(self, rows: Sequence[tuple[list[int], _Unit]]) -> Tensor:
        """What the head reads at every position [R, L, H] of rows that are a prompt and one or two responses."""
        device = self._patient.model.device
        sequences = [torch.tensor(prompt + [t for r in unit for t in r.response]) for prompt, unit in rows]
        ids_R_L = pad_sequence(sequences, batch_first=True).to(device)
        if all(len(unit) == 1 for _, unit in rows):
            lengths_R = torch.tensor([len(s) for s in sequences], device=device)
            mask_R_L = torch.arange(ids_R_L.shape[1], device=device) < lengths_R[:, None]
            return self._lm.hidden(ids_R_L, mask_R_L.long())
        prompts_R = torch.tensor([len(prompt) for prompt, _ in rows], device=device)
        # Where the second response begins; in a row of one response that is where the padding begins.
        seconds_R = torch.tensor([len(prompt) + len(unit[0].response) for prompt, unit in rows], device=device)
        mask_R_1_L_L, positions_R_L = _shared_row_mask(
            prompts_R[:, None], seconds_R[:, None], ids_R_L.shape[1], self._patient.model.dtype
        )
        out = self._lm.backbone(
            input_ids=ids_R_L, attention_mask=mask_R_1_L_L, position_ids=positions_R_L, use_cache=False
        )
        return out.last_hidden_state  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _find_longest_shared(self) -> int:
        """The longest row that two responses may share; 0 where the model does not accept the mask that it needs."""
        config = self._patient.model.config.get_text_config()
        if config._attn_implementation not in {"sdpa", "eager"}:
            return 0
        if not set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}:
            return 0
        # The probe: a prompt of three tokens with responses of two and three, in one row and in a row each.
        ids = [i % config.vocab_size for i in range(1, 9)]
        prompt = ids[:3]
        chosen = EncodedResponse("", "chosen", prompt, [prompt], ids[3:5])
        rejected = EncodedResponse("", "rejected", prompt, [prompt], ids[5:8])
        try:
            shared_L_H = self._hidden([(prompt, (chosen, rejected))])[0]
        except (TypeError, ValueError, RuntimeError, IndexError):
            return 0
        alone_R_L_H = self._hidden([(prompt, (chosen,)), (prompt, (rejected,))])
        expected_L_H = torch.cat([alone_R_L_H[0, :5], alone_R_L_H[1, 3:]]).float()
        tolerance = 1e-2 * float(expected_L_H.abs().max())
        if not torch.allclose(shared_L_H.float(), expected_L_H, rtol=1e-2, atol=tolerance):
            return 0
        # Models do not apply their sliding window to a mask that they are given: no row may be longer than it.
        return min(getattr(config, "sliding_window", None) or _LONGEST_SHARED, _LONGEST_SHARED)


def _row_length(unit: _Unit) -> int:
    """Tokens of its longest row."""
    return max(map(len, unit[0].faced)) + sum(len(r.response) for r in unit)


def _places(batch: Sequence[_Unit]) -> tuple[Tensor, Tensor]:
    """Row and column [S, M] of the hidden state before each response token, response after response."""
    rows, columns = [], []
    for i, unit in enumerate(batch):
        before = 0  # response tokens of this row before the current response
        for r in unit:
            prompts_S_1 = torch.tensor([len(faced) for faced in r.faced])[:, None]
            column_S_T = prompts_S_1 - 1 + before + torch.arange(len(r.response))
            # The first token of either response follows the prompt, even if the other response is between them.
            column_S_T[:, :1] = prompts_S_1 - 1
            columns.append(column_S_T)
            rows.append((torch.arange(len(r.faced)) + i * len(r.faced))[:, None].expand_as(column_S_T))
            before += len(r.response)
    return torch.cat(rows, dim=1), torch.cat(columns, dim=1)


def _shared_row_mask(
    prompts_R_1: Tensor, seconds_R_1: Tensor, length: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The additive attention mask [R, 1, L, L] and the position ids [R, L] of rows [prompt, first, second response].

    ``prompts_R_1`` are the lengths of the prompts, ``seconds_R_1`` the columns where the second responses begin.
    """
    index_L = torch.arange(length, device=prompts_R_1.device)
    second_R_L = index_L >= seconds_R_1
    positions_R_L = torch.where(second_R_L, index_L - seconds_R_1 + prompts_R_1, index_L)
    in_prompt_R_1_L = (index_L < prompts_R_1)[:, None, :]
    # A token sees what is before it in the prompt and in its own response.
    same_response_R_L_L = second_R_L[:, :, None] == second_R_L[:, None, :]
    seen_R_L_L = (index_L[:, None] >= index_L) & (in_prompt_R_1_L | same_response_R_L_L)
    mask_R_L_L = torch.zeros(seen_R_L_L.shape, dtype=dtype, device=prompts_R_1.device)
    mask_R_L_L.masked_fill_(~seen_R_L_L, torch.finfo(dtype).min)
    return mask_R_L_L[:, None], positions_R_L
