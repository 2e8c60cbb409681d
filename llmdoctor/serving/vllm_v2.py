"""A logits processor for vLLM's newer model runner, also under speculation.

``vllm serve ... --logits-processors llmdoctor.serving.vllm_v2:Doctors``
"""

from typing import Any

from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor  # type: ignore[import-not-found]

from llmdoctor.serving.steering import SlotRows, require_valid, steering_of


class Doctors(SlotRows, LogitsProcessor):  # type: ignore[misc]
    """The doctors of `llmdoctor.serving.steering`, beside vLLM's patient."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError, which vLLM answers with status 400, for guidance that cannot be."""
        require_valid(sampling_params.extra_args)

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        super().__init__()
        self.req_states = req_states
        self.steering = steering_of(vllm_config, req_states.device)
