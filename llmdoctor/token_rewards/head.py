"""The LM head as stage 1 needs it: two log-probs per position, never a table of the whole vocabulary.

S are the 2F system prompts of a run, the positive ones of all face pairs before the negative ones; N are positions.
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
        # A quantised, adapted or offloaded head (accelerate's hook) can only be called as a whole.
        plain = type(head) is nn.Linear and not hasattr(head, "_hf_hook")
        self._blocks: list[tuple[int, int, Callable[[Tensor], Tensor]]]  # first id, last id + 1, their logits
        if plain and head.weight.device.type == "cpu":
            spans = [(start, min(start + _CPU_BLOCK, size)) for start in range(0, size, _CPU_BLOCK)]
            self._blocks = [(start, stop, partial(lm.logits_of, head, start, stop)) for start, stop in spans]
            self.positions = max(1, _CPU_POSITIONS // (2 * faces))
        else:
            self._blocks = [(0, size, lm.logits)]
            self.positions = max(1, _LOGITS_HELD // (2 * faces * size))

    def __call__(self, hidden_S_N_H: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the targets [S, N], of the alternatives [S, N], and the alternatives' ids [N].

        A position's alternative is the token other than its target that the positive faces like best: the one of the
        greatest mean log-prob over the face pairs. That is the one of the greatest mean logit, because a face's
        log-probs are its logits minus a norm that all tokens share. Hence one pass over the blocks is enough; the norm
        is a running log-sum-exp, rescaled whenever a block holds a new maximum.
        """
        peak_S_N = hidden_S_N_H.new_full(hidden_S_N_H.shape[:2], -torch.inf, dtype=torch.float32)
        total_S_N, own_S_N, other_S_N = (torch.zeros_like(peak_S_N) for _ in range(3))
        best_N = torch.full_like(peak_S_N[0], -torch.inf)
        other_N = torch.zeros_like(targets_N)
        for start, stop, logits_of in self._blocks:
            # Masked: an id that is no token must be neither an alternative nor part of the norm.
            logits_S_N_V = self._vocabulary.mask(logits_of(hidden_S_N_H), start)
            place_N = (targets_N - start).clamp(0, stop - start - 1)
            here_N = (targets_N >= start) & (targets_N < stop)
            own_S_N = torch.where(here_N, _at(logits_S_N_V, place_N), own_S_N)

            liking_N_V = logits_S_N_V[: self._faces].mean(dim=0)
            kept_N = torch.where(here_N, -torch.inf, _at(liking_N_V[None], place_N)[0])
            liking_N_V.scatter_(1, place_N[:, None], kept_N[:, None])  # the target itself is no alternative
            most_N, where_N = liking_N_V.max(dim=-1)
            better_N = most_N > best_N
            best_N = torch.maximum(best_N, most_N)
            other_N = torch.where(better_N, where_N + start, other_N)
            other_S_N = torch.where(better_N, _at(logits_S_N_V, where_N), other_S_N)

            higher_S_N = torch.maximum(peak_S_N, logits_S_N_V.amax(dim=-1))
            total_S_N *= (peak_S_N - higher_S_N).exp()
            total_S_N += logits_S_N_V.sub_(higher_S_N[..., None]).exp_().sum(dim=-1)
            peak_S_N = higher_S_N
        norm_S_N = peak_S_N + total_S_N.log()
        return own_S_N - norm_S_N, other_S_N - norm_S_N, other_N


def _at(values_S_N_V: Tensor, ids_N: Tensor) -> Tensor:
    """The value of one id per position [S, N]."""
    return values_S_N_V.gather(2, ids_N.expand(len(values_S_N_V), -1)[..., None])[..., 0]
