"""The arithmetic of stage 3 in pure functions: the product of patient and doctors, the filters, and the draw.

pi(y | s) ∝ pi_patient(y | s)^alpha * prod_i pi_doctor_i(y | s)^beta_i        (arXiv 2601.10416, section 3.3)
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmdoctor.settings import Guidance, Sampling

_LIKELIEST = 1024  # tokens: so many are sorted, and get random numbers, sooner than a whole vocabulary


def product(
    patient_B_V: Tensor,
    doctors_B_V: Mapping[str, Tensor],
    guidance: Guidance,
    bases_B_V: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Log-probs of the guided distribution [B, V], normalised, at temperature 1 and before any filter.

    All inputs are log-probs [B, V]. Mode "product" is the paper's. Mode "ratio" departs from it in three ways:

    - Each doctor is divided by its own base (``bases_B_V``), so that the base's habits, of which a small model has
      many, do not count.
    - Only tokens with at least ``plausibility`` times the patient's greatest probability are kept.
    - If |log doctor - log base| is within the doctor's dead zone, it counts as 0. Otherwise errors of the doctor's
      training would decide between tokens that it has no reason to prefer, and answers would be less varied.
    """
    if guidance.is_patient_alone:  # also without the plausibility cut of mode "ratio"
        return patient_B_V
    logits = guidance.alpha * patient_B_V
    for name, doctor_B_V in doctors_B_V.items():
        if beta := guidance.betas.get(name, 0.0):
            term_B_V = doctor_B_V
            if bases_B_V is not None and guidance.mode == "ratio":
                term_B_V = doctor_B_V - bases_B_V[name]
                if dead_zone := guidance.dead_zones.get(name, 0.0):
                    term_B_V = term_B_V.masked_fill(term_B_V.abs() <= dead_zone, 0.0)
            logits = logits.add(term_B_V, alpha=beta)
    if guidance.mode == "ratio":
        # Even without a plausibility cut the unused ids must go. Doctor and base both give them the lowest finite
        # number, so with alpha 0 the difference of about 0 would make them as probable as any other token.
        floor = torch.full_like(patient_B_V[..., :1], torch.finfo(patient_B_V.dtype).min / 2)
        if guidance.plausibility > 0:
            floor = patient_B_V.amax(dim=-1, keepdim=True) + math.log(guidance.plausibility)
        logits = logits.masked_fill(patient_B_V < floor, -torch.inf)
    return logits.log_softmax(dim=-1)


def kl_divergence(product_B_V: Tensor, patient_B_V: Tensor) -> Tensor:
    """KL(product || patient) of every row [B], in nats."""
    # A token that was cut has probability 0 and log-prob -inf, and 0 * -inf is NaN. A finite number makes its term 0.
    excess_B_V = (product_B_V - patient_B_V.clamp(min=-1e30)).clamp(min=-1e30)
    divergence_B: Tensor = torch.linalg.vecdot(product_B_V.exp(), excess_B_V)
    return divergence_B.clamp(min=0)  # rounding may leave a little less


def draw(product_B_V: Tensor, sampling: Sampling, keys_B: Tensor) -> Tensor:
    """One token id per row [B]: temperature, top-k, top-p and min-p on the product, then the Gumbel-max draw.

    ``keys_B`` (int64) are the only randomness: a key gives every token its own exponential number E, and the token with
    the greatest probability / E is drawn (Gumbel-max, as -log E is Gumbel noise). Two distributions that are drawn from
    with the same key often give the same token, with a probability of at least (1 - TV) / (1 + TV), TV their total
    variation distance: so most drafts stand, and with the same seed patient and guided answers differ by guidance and
    not by chance. Temperature 0 is the argmax.
    """
    if sampling.temperature == 0:
        return product_B_V.argmax(dim=-1)
    device = product_B_V.device
    if device.type == "mps":  # it has no float64
        product_B_V = product_B_V.cpu()
    keys_B = keys_B.to(product_B_V.device)
    scores = _warpers(sampling)(None, product_B_V)  # type: ignore[arg-type]  # these warpers read no input ids
    probs_B_V = scores.softmax(dim=-1)
    possible = max(1, int((probs_B_V > 0).sum(dim=-1).max()))  # NaN is no number: the caller finds that out
    if possible <= _LIKELIEST:  # the others need no number
        probs_B_K, ids_B_K = probs_B_V.topk(possible)
        winners_B_1 = _winners(probs_B_K, exponentials(keys_B, ids_B_K))[:, None]
        return ids_B_K.gather(1, winners_B_1)[:, 0].to(device)
    # on a CPU few rows at once, because their numbers then fit into its cache
    rows = max(1, (1 << 16) // probs_B_V.shape[-1]) if probs_B_V.device.type == "cpu" else len(probs_B_V)
    ids_V = torch.arange(probs_B_V.shape[-1], device=probs_B_V.device)
    parts = zip(probs_B_V.split(rows), keys_B.split(rows), strict=True)
    return torch.cat([_winners(probs, exponentials(keys, ids_V)) for probs, keys in parts]).to(device)


def _winners(probs_B_K: Tensor, exponentials_B_K: Tensor) -> Tensor:
    return probs_B_K.double().div_(exponentials_B_K).argmax(dim=-1)


def exponentials(keys_B: Tensor, ids: Tensor) -> Tensor:
    """The exponential numbers of the token ``ids`` [K] or [B, K] by key [B, K], float64, from SplitMix64.

    That of id i is made of the (i + 1)-th number that SplitMix64 gives when the key is its state. It depends on key and
    id only, not on the device. Torch's own generators have one state for all rows, and other numbers on every device.
    Steele, Lea and Flood, "Fast splittable pseudorandom number generators".
    """
    mixed = keys_B[:, None] + (ids + 1) * -0x61C8864680B583EB  # int64 wraps, so this is 0x9E3779B97F4A7C15
    # the masks make the signed shift an unsigned one
    mixed.bitwise_xor_((mixed >> 30) & (1 << 34) - 1).mul_(-0x40A7B892E31B1A47)  # 0xBF58476D1CE4E5B9
    mixed.bitwise_xor_((mixed >> 27) & (1 << 37) - 1).mul_(-0x6B2FB644ECCEEE15)  # 0x94D049BB133111EB
    mixed.bitwise_xor_((mixed >> 31) & (1 << 33) - 1)
    # 53 bits, and a half so that no logarithm is of 0
    return ((mixed >> 11) & (1 << 53) - 1).double().add_(0.5).mul_(2.0**-53).log_().neg_()


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """The filters of transformers, in the order in which its ``generate`` applies them."""
    warpers = LogitsProcessorList()
    if sampling.temperature != 1:
        # Below about 1e-30 the division would overflow to -inf for every token. At 1e-30 the draw is greedy anyway.
        warpers.append(TemperatureLogitsWarper(max(float(sampling.temperature), 1e-30)))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(_TopP(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers


class _TopP(TopPLogitsWarper):
    """Top-p without sorting the whole vocabulary, which takes longer than all else of a draw."""

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        few_B_K, ids_B_K = scores.topk(min(_LIKELIEST, scores.shape[-1]))
        probs_B_K = (few_B_K - scores.logsumexp(dim=-1, keepdim=True)).double().exp()
        above_B_K = probs_B_K.cumsum(dim=-1) - probs_B_K
        cut_B_K = above_B_K >= self.top_p
        cut_B_K[:, 0] = False
        cut_B_V = torch.ones_like(scores, dtype=torch.bool).scatter(1, ids_B_K, cut_B_K)
        found_B_V = scores.masked_fill(cut_B_V, -torch.inf)
        # Where more may be left. Row by row, so that what is kept of tokens that tie depends on no neighbour.
        flat_B = above_B_K[:, -1] < self.top_p
        if bool(flat_B.any()):
            found_B_V[flat_B] = super().__call__(input_ids, scores[flat_B])
        return found_B_V
