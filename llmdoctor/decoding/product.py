"""Stage 3's arithmetic: the product of patient and doctors, the filters after it, and the draw. Pure functions.

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
    """Raise UsageError for a doctor that does not exist, and where alpha and every beta are 0."""
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

    Mode "product" is the paper's. Mode "ratio" replaces each doctor by doctor / its own base (``bases_B_V``) and keeps
    the tokens whose patient probability is at least ``plausibility`` times the patient's greatest: the base's own
    habits, of which a small doctor has many, are not multiplied in. There a departure from the paper keeps answers
    varied: |log doctor - log base| within a doctor's dead zone counts as 0, so that the errors of its training do not
    choose between tokens that it has no reason to tell apart.
    """
    if guidance.alpha == 1 and not any(guidance.betas.values()):
        return patient_B_V
    logits = guidance.alpha * patient_B_V
    for name, doctor_B_V in doctors_B_V.items():
        if beta := guidance.betas.get(name, 0.0):
            says_B_V = doctor_B_V
            if bases_B_V is not None and guidance.mode == "ratio":
                says_B_V = doctor_B_V - bases_B_V[name]
                if dead_zone := guidance.dead_zones.get(name, 0.0):
                    says_B_V = says_B_V.masked_fill(says_B_V.abs() <= dead_zone, 0.0)
            logits = logits.add(says_B_V, alpha=beta)
    if guidance.mode == "ratio":
        # without a cut still not the ids that no token has: doctor and base agree that those are impossible
        floor = torch.full_like(patient_B_V[..., :1], torch.finfo(patient_B_V.dtype).min / 2)
        if guidance.plausibility > 0:
            floor = patient_B_V.amax(dim=-1, keepdim=True) + math.log(guidance.plausibility)
        logits = logits.masked_fill(patient_B_V < floor, -torch.inf)
    return logits.log_softmax(dim=-1)


def kl_divergence(product_B_V: Tensor, patient_B_V: Tensor) -> Tensor:
    """KL(product || patient) of every row [B], nats."""
    # -inf, of a token that was cut, becomes a number: 0 times it is 0
    excess_B_V = (product_B_V - patient_B_V.clamp(min=-1e30)).clamp(min=-1e30)
    divergence_B: Tensor = torch.linalg.vecdot(product_B_V.exp(), excess_B_V)
    return divergence_B


def draw(product_B_V: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """One token id a row [B]: temperature, top-k, top-p and min-p after the product, then the inverse of the CDF.

    ``uniforms_B`` in [0, 1) is all the randomness: the same seed gives two distributions the same draws (common random
    numbers), so that patient and guided answers differ by guidance and not by luck. Temperature 0 is the argmax.
    """
    if sampling.temperature == 0:
        return product_B_V.argmax(dim=-1)
    scores = _warpers(sampling)(None, product_B_V)  # type: ignore[arg-type]  # these warpers read no input ids
    exact = torch.float32 if scores.device.type == "mps" else torch.float64  # MPS has no float64
    cumulative_B_V = scores.softmax(dim=-1).cumsum(dim=-1, dtype=exact)
    target_B_1 = uniforms_B.to(cumulative_B_V)[:, None] * cumulative_B_V[:, -1:]
    return torch.searchsorted(cumulative_B_V, target_B_1, right=True)[:, 0].clamp(max=product_B_V.shape[-1] - 1)


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """The library's warpers, in the library's order."""
    warpers = LogitsProcessorList()
    if sampling.temperature != 1:
        # below 1e-30 float32 quotients overflow to -inf for every token; there it is as good as greedy
        warpers.append(TemperatureLogitsWarper(max(float(sampling.temperature), 1e-30)))
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopP(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
