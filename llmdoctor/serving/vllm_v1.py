"""A logits processor for vLLM's V1 interface.

``vllm serve ... --logits-processors llmdoctor.serving.vllm_v1:Doctors``
"""

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor  # type: ignore[import-not-found]

from llmdoctor.serving.steering import BatchRows, require_valid, steering_of


class Doctors(BatchRows, LogitsProcessor):  # type: ignore[misc]
    """The doctors of `llmdoctor.serving.steering`, beside vLLM's patient."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError, which vLLM answers with status 400, for guidance that cannot be."""
        require_valid(sampling_params.extra_args)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        super().__init__()
        self.steering = steering_of(vllm_config, device)

    def is_argmax_invariant(self) -> bool:
        """False: doctors change the likeliest token too."""
        return False
