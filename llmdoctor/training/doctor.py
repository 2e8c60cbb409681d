"""The doctor in training form: a causal LM, with LoRA, whole or with a changed head, and a value head for log V(s)."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmdoctor.errors import UsageError
from llmdoctor.models import SplitLM, Vocabulary, load_lm, load_tokenizer, pick_device, token_log_probs
from llmdoctor.settings import TrainSettings

NO_HEAD = "its logits are capped after the head, so nothing can be added to them: train with method lora"


class DoctorOutput(NamedTuple):
    """Log-probs (nats) of response tokens and log V of states, right-padded; the padding's values are meaningless."""

    logprobs_B_T: Tensor
    log_values_R_N: Tensor


@dataclass(frozen=True, eq=False)
class HeadAdapter:
    """What method "head" trains, as a low-rank addition to the logits: logits + up (down h).

    ``up_V_R`` is the base's head times the ``up`` of `HeadChange`, worked out once: a token then costs 2 R products for
    each token of the vocabulary instead of a second pass through the head. It is never merged: the base's head is often
    tied to its embeddings, and the base goes on being the patient.
    """

    down_R_H: Tensor
    up_V_R: Tensor

    @classmethod
    def of(cls, split: SplitLM, head: nn.Linear, down_R_H: Tensor, up_H_R: Tensor) -> "HeadAdapter":
        """For a base whose ``head`` reads h + up (down h). Raises ValueError for shapes or a base that do not fit."""
        if (tail := split.tail_scale) is None:
            raise ValueError(NO_HEAD)
        expected = (head.in_features, down_R_H.shape[0])
        if down_R_H.ndim != 2 or up_H_R.shape != expected or down_R_H.shape[1] != expected[0]:
            found = f"{list(down_R_H.shape)} and {list(up_H_R.shape)}"
            raise ValueError(
                f"its change has the shapes {found}; the head of its base reads {head.in_features} numbers"
            )
        return cls(down_R_H, (tail * _through(head, up_H_R)).to(down_R_H.device))

    def __call__(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """The doctor's logits [..., V] from the base's and from what its head reads [..., H], in float32 or better."""
        # in bfloat16 most of the change would be lost: it is smaller than the steps between the base's logits
        with torch.autocast(hidden.device.type, enabled=False):
            change = linear(linear(hidden.to(self.down_R_H), self.down_R_H), self.up_V_R)
            return logits.to(change) + change


def _through(head: nn.Module, up_H_R: Tensor) -> Tensor:
    """The head's matrix times ``up_H_R`` [V, R], in the precision of ``up_H_R`` relative to itself."""
    size_R = up_H_R.detach().norm(dim=0).clamp(min=1e-30)  # float16 cannot hold small numbers
    rows_R_H, weight = (up_H_R / size_R).T, getattr(head, "weight", None)
    if isinstance(head, nn.Linear) and type(weight) is nn.Parameter and weight.is_floating_point():
        found_R_V = linear(rows_R_H.to(weight.dtype), weight)
    else:  # quantised, or spread over processes: only the module knows how; without its bias
        dtype = next(head.parameters()).dtype
        rows_R_H = rows_R_H.to(dtype) if dtype.is_floating_point else rows_R_H
        found_R_V = head(rows_R_H) - head(torch.zeros_like(rows_R_H[:1]))
    rows_V_R: Tensor = found_R_V.T.to(up_H_R.dtype) * size_R.to(found_R_V.device)
    return rows_V_R


class HeadChange(nn.Module):
    """What method "head" trains: the base's head reads h + alpha / R * up (down h) in place of h, of low rank R.

    The change of the logits is then W up down h, with W the base's own head: tokens that the base has close to each
    other change alike, so that a few hundred pairs say something about every token. LoRA on the head itself, with a row
    of its own for every token, learnt nothing about the tokens that the pairs do not hold (benchmarks/LOG.md).
    """

    def __init__(self, width: int, rank: int, alpha: float, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False, device=device)
        self.up = nn.Linear(rank, width, bias=False, device=device)
        nn.init.zeros_(self.up.weight)
        self.scale, self.active = alpha / rank, True

    @property
    def up_H_R(self) -> Tensor:
        """The factor behind the rank, scaled."""
        return self.scale * self.up.weight

    @contextmanager
    def off(self) -> Iterator[None]:
        """A context in which nothing is changed."""
        self.active = False
        try:
            yield
        finally:
            self.active = True


class Doctor(nn.Module):
    """A causal LM, LoRA-wrapped, whole or with a change before its head, and a linear value head on its last states.

    log V(s) = scale * (w . h(s) + b), with w = b = 0 at the start, so that V = 1. ``scale`` is rho, so that the head
    learns equally fast at any strength of the rewards; ``save_doctor`` multiplies it into w and b. The paper gives no
    parameterisation of V: this one is ours. Log-probs are normalised over the ids of ``vocabulary`` that a token has.
    """

    def __init__(
        self,
        lm: PeftModel | PreTrainedModel,
        vocabulary: Vocabulary,
        scale: float = 1.0,
        change: HeadChange | None = None,
    ) -> None:
        super().__init__()
        self.lm, self.change = lm, change
        base = cast("PreTrainedModel", lm.get_base_model() if isinstance(lm, PeftModel) else lm)
        self.split = SplitLM.of(base)  # no nn.Module: the same weights are not registered a second time
        self.vocabulary, self.scale = vocabulary, scale
        width = base.get_output_embeddings().in_features
        self.value_head = nn.Linear(width, 1, device=lm.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_lengths: Tensor,
        response_lengths: Tensor,
        scored: int,
        states: Tensor | None = None,
    ) -> DoctorOutput:
        """Log-probs of the first ``scored`` rows' response tokens [B, T]; log V of every state of all rows [R, N].

        ``input_ids`` and ``attention_mask`` [R, L] hold prompt, response, padding on the right; the lengths are [R]. No
        prompt may be empty: s_0 is read at its last token. ``states`` [R, N, H] are what `states` gives, if known.
        """
        last = int(response_lengths.max())
        if states is None:
            states = self.states(input_ids, attention_mask, prompt_lengths, response_lengths)
        values_R_N = self.scale * self.value_head(states.to(self.value_head.weight.dtype))[..., 0].float()
        targets_B_T = input_ids[:scored].gather(1, _places(input_ids, prompt_lengths, last)[:scored, 1:])
        mask_B_T = torch.arange(last, device=input_ids.device) < response_lengths[:scored, None]
        logprobs = self._log_probs(states[:scored, :-1], targets_B_T, mask_B_T)
        return DoctorOutput(logprobs, values_R_N)

    def states(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor, response_lengths: Tensor
    ) -> Tensor:
        """What the head reads at every state of every row [R, N, H]."""
        return states(self.split, input_ids, attention_mask, prompt_lengths, response_lengths)

    def head_adapter(self) -> HeadAdapter | None:
        """What method "head" adds to the base's logits; None for another method, and in `base_alone`."""
        if self.change is None or not self.change.active:
            return None
        head = self.lm.get_output_embeddings()
        return HeadAdapter.of(self.split, head, self.change.down.weight, self.change.up_H_R)

    def base_alone(self) -> AbstractContextManager[Any]:
        """A context in which the doctor is its base. A whole one stays as it is: use it before the first step."""
        if self.change is not None:
            return self.change.off()
        return self.lm.disable_adapter() if isinstance(self.lm, PeftModel) else nullcontext()

    def _log_probs(self, states_B_T_H: Tensor, targets_B_T: Tensor, mask_B_T: Tensor) -> Tensor:
        found = token_log_probs(
            self.split, states_B_T_H[mask_B_T], targets_B_T[mask_B_T], self.vocabulary, change=self.head_adapter()
        )
        return torch.zeros(mask_B_T.shape, dtype=found.dtype, device=found.device).masked_scatter(mask_B_T, found)


def states(
    split: SplitLM, input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor, response_lengths: Tensor
) -> Tensor:
    """What the head of a model reads at every state of every row of `pad_rows` [R, N, H], N = T + 1."""
    hidden_R_L_H = split.hidden(input_ids, attention_mask)
    places_R_N = _places(input_ids, prompt_lengths, int(response_lengths.max()))
    return hidden_R_L_H.gather(1, places_R_N[..., None].expand(-1, -1, hidden_R_L_H.shape[-1]))


def _places(input_ids_R_L: Tensor, prompt_lengths_R: Tensor, last: int) -> Tensor:
    """Where the states are read [R, N]: s_0 at the prompt's last token, s_t at response token t."""
    steps = torch.arange(last + 1, device=input_ids_R_L.device)
    return (prompt_lengths_R[:, None] - 1 + steps).clamp(max=input_ids_R_L.shape[1] - 1)


def new_doctor(
    base_model: str | Path, settings: TrainSettings, *, trust_remote_code: bool = False
) -> tuple[Doctor, PreTrainedTokenizerBase]:
    """A doctor that still equals ``base_model``: LoRA or the change of method "head", and the value head, are zero.

    Method "head" changes only what the head reads: the doctor has the base's own states, and the frozen layers need no
    backward pass.

    Raises LoadError; UsageError if every weight of a quantised base is to be trained, and for method "head" on a base
    whose logits are capped.
    """
    tokenizer = load_tokenizer(base_model, trust_remote_code=trust_remote_code)
    full = settings.method == "full"
    # Small updates of a bfloat16 weight are rounded away; LoRA's own weights are float32 anyway. On a CPU gradients
    # through bfloat16 gain little; a head has none below it, and reads what it will read while decoding.
    exact = full or (settings.method == "lora" and pick_device(settings.device).type == "cpu")
    dtype = "float32" if exact and settings.dtype == "auto" else settings.dtype
    base = load_lm(base_model, dtype=dtype, device=settings.device, trust_remote_code=trust_remote_code)
    if full and getattr(base, "hf_quantizer", None) is not None:
        raise UsageError(f"the weights of {base_model} are quantised and cannot be trained: expected method lora")
    vocabulary = Vocabulary.of(tokenizer)
    if settings.method == "head":
        if SplitLM.of(base).tail_scale is None:
            raise UsageError(f"{base_model}: {NO_HEAD}")
        torch.manual_seed(settings.seed)
        width = base.get_output_embeddings().in_features
        change = HeadChange(width, settings.lora_rank, settings.lora_alpha, base.device)
        return Doctor(base.requires_grad_(False), vocabulary, settings.rho, change), tokenizer
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()  # a frozen embedding's output has no gradient for the checkpoints to carry
    torch.manual_seed(settings.seed)
    if full:
        return Doctor(base.requires_grad_(), vocabulary, settings.rho), tokenizer
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=settings.lora_targets if settings.lora_targets == "all-linear" else list(settings.lora_targets),
    )
    lm = cast("PeftModel", get_peft_model(base, config))
    return Doctor(lm, vocabulary, settings.rho), tokenizer
