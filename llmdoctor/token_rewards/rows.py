"""The patient over rows of a prompt and its responses, in batches that fit the device.

Beside the letters of `llmdoctor.records`: R are the rows of a forward, L the columns of a row.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llmdoctor.models import Patient, SplitLM
from llmdoctor.token_rewards.encode import EncodedPair, EncodedResponse

_LONGEST_SHARED = 4096  # tokens of a row with a mask of its own, whose size is the square of that

Unit = tuple[EncodedResponse, ...]  # responses that share a row: both of a pair, or one alone
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class PatientRows:
    """Runs the patient over responses, those of one prompt in one row where that is possible.

    The two responses of a pair share a row, [prompt, chosen, rejected]. The rejected response sees the prompt and
    itself only, at the positions that it would have without the chosen one. So a prompt is computed once. A model that
    does not accept such a mask (a trial finds out) gets a row for each response.
    """

    def __init__(self, patient: Patient, batch_tokens: int) -> None:
        self.batch_tokens = batch_tokens
        self.lm = SplitLM.of(patient.model)
        self._patient = patient
        self._longest_shared = self._find_longest_shared()

    def in_batches(
        self, pairs: Sequence[EncodedPair], copies: int, run: Callable[[Sequence[Unit]], list[_Result]]
    ) -> list[_Result]:
        """The results of ``run`` over all responses, in batches of similar length; ``copies`` rows for each unit.

        A batch that does not fit the device's memory is halved, and so are all later ones.
        """
        units: list[Unit] = []
        for pair in pairs:
            units += [pair] if row_length(pair) <= self._longest_shared else [(response,) for response in pair]
        waiting = sorted(units, key=row_length, reverse=True)
        done: list[_Result] = []
        while waiting:
            tokens_per_unit = copies * row_length(waiting[0])
            batch = waiting[: max(1, self.batch_tokens // tokens_per_unit)]
            try:
                results = run(batch)
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
            done += results
        return done

    def hidden(self, rows: Sequence[tuple[list[int], Unit]]) -> Tensor:
        """What the head reads at every position [R, L, H] of rows that are a prompt and one or two responses."""
        return self.forward(rows).last_hidden_state  # type: ignore[no-any-return]

    def forward(self, rows: Sequence[tuple[list[int], Unit]], **options: Any) -> Any:
        """The backbone's output over these rows, padded on the right; ``options`` go to its forward."""
        device = self._patient.model.device
        listed = [prompt + [t for r in unit for t in r.response] for prompt, unit in rows]
        self._patient.require_embedded(max(ids, default=0) for ids in listed)
        sequences = [torch.tensor(ids) for ids in listed]
        ids_R_L = pad_sequence(sequences, batch_first=True).to(device)
        if all(len(unit) == 1 for _, unit in rows):
            lengths_R = torch.tensor([len(s) for s in sequences], device=device)
            mask_R_L = torch.arange(ids_R_L.shape[1], device=device) < lengths_R[:, None]
            return self.lm.backbone(input_ids=ids_R_L, attention_mask=mask_R_L.long(), use_cache=False, **options)
        prompts_R = torch.tensor([len(prompt) for prompt, _ in rows], device=device)
        # Where the second response begins; in a row of one response that is where the padding begins.
        seconds_R = torch.tensor([len(prompt) + len(unit[0].response) for prompt, unit in rows], device=device)
        mask_R_1_L_L, positions_R_L = _shared_row_mask(
            prompts_R[:, None], seconds_R[:, None], ids_R_L.shape[1], self._patient.model.dtype
        )
        return self.lm.backbone(
            input_ids=ids_R_L,
            attention_mask=mask_R_1_L_L,
            position_ids=positions_R_L,
            use_cache=False,
            **options,
        )

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
            shared_L_H = self.hidden([(prompt, (chosen, rejected))])[0]
        except (TypeError, ValueError, RuntimeError, IndexError):
            return 0
        alone_R_L_H = self.hidden([(prompt, (chosen,)), (prompt, (rejected,))])
        expected_L_H = torch.cat([alone_R_L_H[0, :5], alone_R_L_H[1, 3:]]).float()
        tolerance = 1e-2 * float(expected_L_H.abs().max())
        if not torch.allclose(shared_L_H.float(), expected_L_H, rtol=1e-2, atol=tolerance):
            return 0
        # Models do not apply their sliding window to a mask that they are given: no row may be longer than it.
        return min(getattr(config, "sliding_window", None) or _LONGEST_SHARED, _LONGEST_SHARED)


def row_length(unit: Unit) -> int:
    """Tokens of its longest row."""
    return max(map(len, unit[0].faced)) + sum(len(r.response) for r in unit)


def places(batch: Sequence[Unit]) -> tuple[Tensor, Tensor]:
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


def chunks(items: Iterator[_Item], size: int) -> Iterator[list[_Item]]:
    """The items in lists of ``size``; the last may be shorter."""
    while chunk := list(islice(items, size)):
        yield chunk
