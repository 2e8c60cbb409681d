"""The arithmetic of stage 3 in pure functions: the product of patient and doctors, the filters, and the draw.

pi(y | s) ∝ pi_patient(y | s)^alpha * prod_i pi_doctor_i(y | s)^beta_i        (arXiv 2601.10416, section 3.3)
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper
from transformers import TopPLogitsWarper as TopP

from llmdoctor.errors import UsageError
from llmdoctor.settings import Guidance, Sampling


def check_guidance(guidance: Guidance, doctors: Sequence[str]) -> None:
    """Raise UsageError for the name of a doctor that does not exist, and if alpha and every beta are 0."""
    if unknown := [name for name in (*guidance.betas, *guidance.dead_zones) if name not in doctors]:
        known = ", ".join(doctors) or "none"
        raise UsageError(f"there is no doctor {unknown[0]!r}; the doctors are: {known}")
    if guidance.alpha == 0 and not any(guidance.betas.values()):
        raise UsageError("alpha and every beta are 0: nothing is left to decode from; set one of them above 0")


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
    # No doctor has a say: exactly the patient, bit for bit, and without the plausibility cut of mode "ratio".
    if guidance.alpha == 1 and not any(guidance.betas.values()):
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
    return divergence_B


def draw(product_B_V: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """One token id per row [B]: temperature, top-k, top-p and min-p on the product, then the inverse of its CDF.

    ``uniforms_B`` in [0, 1) are the only randomness. With the same seed two distributions are drawn from with the same
    numbers (common random numbers), so patient and guided answers differ by guidance and not by chance. Temperature 0
    is the argmax.
    """
    if sampling.temperature == 0:
        return product_B_V.argmax(dim=-1)
    scores = _warpers(sampling)(None, product_B_V)  # type: ignore[arg-type]  # these warpers read no input ids
    # float64, because in a vocabulary of 150,000 the rounding of a float32 sum exceeds many tokens' probabilities.
    exact = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no float64
    cumulative_B_V = scores.softmax(dim=-1).cumsum(dim=-1, dtype=exact)
    # Scaled by the last entry, which rounding keeps from being exactly 1. With right=True a token of probability 0
    # is never found, even if the uniform is 0.
    target_B_1 = uniforms_B.to(cumulative_B_V)[:, None] * cumulative_B_V[:, -1:]
    return torch.searchsorted(cumulative_B_V, target_B_1, right=True)[:, 0].clamp(max=product_B_V.shape[-1] - 1)


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """The filters of transformers, in the order in which its ``generate`` applies them."""
    warpers = LogitsProcessorList()
    if sampling.temperature != 1:
        # Below about 1e-30 the division would overflow to -inf for every token. At 1e-30 the draw is greedy anyway.
        warpers.append(TemperatureLogitsWarper(max(float(sampling.temperature), 1e-30)))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopP(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
