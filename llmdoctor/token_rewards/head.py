"""The LM head as stage 1 needs it: two log-probs per position, never a table of the whole vocabulary.

S are the system prompts of a run, M the positions at which the head is read.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from llmdoctor.models import Patient, SplitLM

_LOGITS_HELD = 1 << 24  # on an accelerator: 64 MiB of float32
_CPU_POSITIONS, _CPU_BLOCK = 256, 4096  # on a CPU: blocks of 4 MiB, which its caches hold


class FaceHead:
    """Log-probs of given tokens, and of each position's alternative, under F face pairs.

    An accelerator takes the whole vocabulary at once; a CPU goes through it in blocks. ``positions`` is how many
    positions one call may have.
    """

    positions: int

    def __init__(self, patient: Patient, lm: SplitLM, faces: int) -> None:
        self._faces, self._vocabulary = faces, patient.vocabulary
        size, head = patient.vocabulary.size, patient.model.get_output_embeddings()
        # A head that is quantised, adapted, offloaded (accelerate's hook) or shared by processes is only called as a
        # whole.
        plain = type(head) is nn.Linear and not hasattr(head, "_hf_hook") and type(head.weight.data) is Tensor
        self._blocks: list[tuple[int, int, Callable[[Tensor], Tensor]]]  # first id, last id + 1, their logits
        if plain and head.weight.device.type == "cpu":
            spans = [(start, min(start + _CPU_BLOCK, size)) for start in range(0, size, _CPU_BLOCK)]
            self._blocks = [(start, stop, partial(lm.logits_of, head, start, stop)) for start, stop in spans]
            self.positions = max(1, _CPU_POSITIONS // (2 * faces))
        else:
            self._blocks = [(0, size, lm.logits)]
            self.positions = max(1, _LOGITS_HELD // (2 * faces * size))

    def __call__(self, hidden_S_M_H: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the targets [S, M], of the alternatives [S, M], and the alternatives' ids [M].

        A position's alternative is the token other than its target that the positive faces like best: the one of the
        greatest mean log-prob over the face pairs. That is the one of the greatest mean logit, because a face's
        log-probs are its logits minus a norm that all tokens share. Hence one pass over the blocks is enough; the norm
        is a running log-sum-exp, rescaled whenever a block holds a new maximum.
        """
        peak_S_M = hidden_S_M_H.new_full(hidden_S_M_H.shape[:2], -torch.inf, dtype=torch.float32)
        total_S_M, own_S_M, other_S_M = (torch.zeros_like(peak_S_M) for _ in range(3))
        best_M = torch.full_like(peak_S_M[0], -torch.inf)
        other_M = torch.zeros_like(targets_M)
        for start, stop, logits_of in self._blocks:
            # Masked: an id that is no token must be neither an alternative nor part of the norm.
            logits_S_M_V = self._vocabulary.mask(logits_of(hidden_S_M_H), start)
            place_M = (targets_M - start).clamp(0, stop - start - 1)
            here_M = (targets_M >= start) & (targets_M < stop)
            own_S_M = torch.where(here_M, _at(logits_S_M_V, place_M), own_S_M)

            liking_M_V = logits_S_M_V[: self._faces].mean(dim=0)
            kept_M = torch.where(here_M, -torch.inf, _at(liking_M_V[None], place_M)[0])
            liking_M_V.scatter_(1, place_M[:, None], kept_M[:, None])  # the target itself is no alternative
            most_M, where_M = liking_M_V.max(dim=-1)
            better_M = most_M > best_M
            best_M = torch.maximum(best_M, most_M)
            other_M = torch.where(better_M, where_M + start, other_M)
            other_S_M = torch.where(better_M, _at(logits_S_M_V, where_M), other_S_M)

            higher_S_M = torch.maximum(peak_S_M, logits_S_M_V.amax(dim=-1))
            # a running log-sum-exp: sums so far are rescaled to the new peak. The logits are overwritten here, after
            # everything else has been read from them.
            total_S_M *= (peak_S_M - higher_S_M).exp()
            total_S_M += logits_S_M_V.sub_(higher_S_M[..., None]).exp_().sum(dim=-1)
            peak_S_M = higher_S_M
        norm_S_M = peak_S_M + total_S_M.log()
        return own_S_M - norm_S_M, other_S_M - norm_S_M, other_M


def _at(values_S_M_V: Tensor, ids_M: Tensor) -> Tensor:
    """The value of one id per position [S, M]."""
    return values_S_M_V.gather(2, ids_M.expand(len(values_S_M_V), -1)[..., None])[..., 0]
