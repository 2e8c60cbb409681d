"""Stage 2's pure losses: token-level flow-guided preference optimisation (TFPO, arXiv 2601.10416, section "TFPO").

States s_0 .. s_T of a response have N = T + 1 flows F(s_t) = Q(s_t) V(s_t). Everything here works on log F in float32
(or float64 when given it), on right-padded rows: ``mask_B_T`` is True on the first T_b tokens of row b.
"""

import torch
from torch import Tensor


def state_mask(mask_B_T: Tensor) -> Tensor:
    """[B, N] mask of the states of each row: s_0 always exists, s_t exists where token t does."""
    return torch.cat([torch.ones_like(mask_B_T[:, :1]), mask_B_T], dim=1)


def anchored(log_value_B_N: Tensor, mask_B_T: Tensor) -> Tensor:
    """Log V with log V(s_T) = 0 at the last state of each row [B, N].

    Departure from the paper, which leaves V(s_T) free: then sub-trajectory balance is zero for any policy, because V
    can absorb it all, and only L_value and the optimiser's path carry the reward.
    """
    states = torch.arange(log_value_B_N.shape[1], device=mask_B_T.device)
    return log_value_B_N.masked_fill(states == mask_B_T.sum(dim=1, keepdim=True), 0.0)


def log_flow(
    logprobs_B_T: Tensor,
    rewards_B_T: Tensor,
    log_value_B_N: Tensor,
    mask_B_T: Tensor,
    *,
    rho: float,
    ref_logprobs_B_T: Tensor | None = None,
) -> Tensor:
    """f_t = log Q(s_t) + log V(s_t) - sum_{k<=t} log p(y_k | s_{k-1}), with log Q(s_t) = rho sum_{k<=t} r_k [B, N].

    Without ``ref_logprobs_B_T`` p is the doctor (absolute flow, the paper); with it p is doctor / reference (relative
    flow). Departure from the paper: the cumulative reward is the *logarithm* of Q. Used as Q directly it goes negative
    on rejected responses.
    """
    steps = rho * rewards_B_T - logprobs_B_T
    if ref_logprobs_B_T is not None:
        steps = steps + ref_logprobs_B_T
    total = torch.nn.functional.pad(steps.masked_fill(~mask_B_T, 0.0).cumsum(dim=1), (1, 0))
    return total + log_value_B_N


def subtb(flow_B_N: Tensor, mask_B_N: Tensor, weight: float = 1.0, *, total: bool = False) -> Tensor:
    """Sub-trajectory balance of every row: the weighted mean over state pairs m < n of (f_n - f_m)^2 [B].

    With ``total`` it is their weighted sum, as second-hand accounts of the paper have it: an answer then weighs more
    the longer it is, at weight 1 by the square of its length. The mean is ours.

    Pair (m, n) weighs ``weight`` ** (n - m - 1), 0 < weight <= 1. With weight 1 all pairs count alike (the paper's
    L_SubTB) and the double sum is 2 / (N - 1) * sum_t (f_t - mean f)^2, exact in O(N) time and memory. Below 1, with
    d = f_{n+1} - f_n, A_n = sum_{m<n} w^(n-m-1), and E, D the same sums of (f_n - f_m) and (f_n - f_m)^2,

        E_{n+1} = w E_n + A_{n+1} d          D_{n+1} = w D_n + 2 w d E_n + A_{n+1} d^2

    which are first-order filters of differences, so nothing cancels. Rows with one state score 0.
    """
    mask = mask_B_N.to(flow_B_N.dtype)
    count = mask.sum(dim=1)
    if weight == 1.0:
        mean = (flow_B_N * mask).sum(dim=1, keepdim=True) / count[:, None]
        squares = (((flow_B_N - mean) * mask) ** 2).sum(dim=1)
        return count * squares if total else 2.0 / (count - 1).clamp(min=1) * squares
    ones = torch.ones_like(flow_B_N[:1])
    pairs = torch.nn.functional.pad(_decaying_sum(ones, weight)[:, :-1], (1, 0))  # A_n; its closed form cancels near 1
    steps = torch.nn.functional.pad(flow_B_N.diff(dim=1) * mask[:, 1:], (1, 0))
    first = _decaying_sum(pairs * steps, weight)  # E_n
    before = torch.nn.functional.pad(first[:, :-1], (1, 0))
    second = _decaying_sum(2 * weight * steps * before + pairs * steps**2, weight)  # D_n
    summed = (second * mask).sum(dim=1)
    return summed if total else summed / (pairs * mask).sum(dim=1).clamp(min=1)


def _decaying_sum(x_B_N: Tensor, weight: float) -> Tensor:
    """y_n = weight * y_{n-1} + x_n along the last axis, by doubling: log2(N) vector steps instead of N."""
    shift = 1
    while shift < x_B_N.shape[1]:
        x_B_N = x_B_N + weight**shift * torch.nn.functional.pad(x_B_N[:, :-shift], (shift, 0))
        shift *= 2
    return x_B_N


_GREATEST_LOG_V = 20.0  # V itself grows as the exponential: beyond this it only stands for "much"


def value_discrimination(
    log_value_preferred_P: Tensor, log_value_other_P: Tensor, gamma: float, *, log: bool = True
) -> Tensor:
    """L_value = mean over pairs of max(0, gamma - (log V(s, y_preferred) - log V(s, y_other))); 0 without pairs.

    Without ``log`` it compares V itself, as second-hand accounts of the paper have it; log V above 20 counts as 20.
    """
    if log_value_preferred_P.numel() == 0:
        return log_value_preferred_P.sum()
    preferred_P, other_P = log_value_preferred_P, log_value_other_P
    if not log:
        preferred_P, other_P = (x_P.clamp(max=_GREATEST_LOG_V).exp() for x_P in (preferred_P, other_P))
    return (gamma - (preferred_P - other_P)).clamp(min=0).mean()
