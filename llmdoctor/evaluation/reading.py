"""Whole answers, read by every model of an assistant at once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmdoctor.assistant import LLMdoctor
from llmdoctor.models import SplitLM, context_of
from llmdoctor.token_rewards.scoring import fitting_batch_tokens
from llmdoctor.training.batches import pad_rows
from llmdoctor.training.doctor import states

Row = tuple[Sequence[int], Sequence[int]]  # token ids of a prompt, which is not empty, and of the answer to it


class Readers:
    """The patient, the doctors and, where they are loaded, the doctors' bases. A model with two roles reads once."""

    def __init__(self, assistant: LLMdoctor, batch_tokens: int | None = None) -> None:
        doctors = assistant.doctors.values()
        models = [
            assistant.patient.model,
            *(d.model for d in doctors),
            *(d.base for d in doctors if d.base is not None),
        ]
        self.splits = {model: SplitLM.of(model) for model in dict.fromkeys(models)}
        self.context = min(context_of(model) for model in self.splits)
        self.batch_tokens = batch_tokens or fitting_batch_tokens(assistant.patient)

    def batches(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """The numbers of rows that are read together: of like length, ``batch_tokens`` of them with their padding."""
        lengths = [len(prompt) + len(answer) for prompt, answer in rows]
        waiting = sorted(range(len(rows)), key=lambda i: -lengths[i])
        while waiting:
            count = max(1, self.batch_tokens // max(1, lengths[waiting[0]]))
            yield waiting[:count]
            waiting = waiting[count:]

    @torch.inference_mode()
    def read(self, rows: Sequence[Row]) -> tuple[dict[PreTrainedModel, Tensor], Tensor]:
        """What each model's head reads before every answer token [M, H], and the ids of these tokens [M]."""
        # the last token is not read: nothing comes after it
        batch = pad_rows(
            [(torch.tensor(prompt), torch.tensor(answer[:-1], dtype=torch.long)) for prompt, answer in rows]
        )
        lengths_B = torch.tensor([len(answer) for _, answer in rows])
        read = {}
        for model, split in self.splits.items():
            placed = {name: values.to(model.device) for name, values in batch.items()}
            states_B_T_H = states(split, **placed)
            mask_B_T = torch.arange(states_B_T_H.shape[1]) < lengths_B[:, None]
            read[model] = states_B_T_H[mask_B_T.to(states_B_T_H.device)]
        return read, torch.tensor([token for _, answer in rows for token in answer], dtype=torch.long)
