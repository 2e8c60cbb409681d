"""The doctor: a small causal LM with LoRA and a value head for log V(s): training form, folder, decoding form."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmdoctor.errors import LoadError
from llmdoctor.files import atomic_path, ensure_replaceable, read_json, write_json
from llmdoctor.models import SplitLM, Vocabulary, load_lm, load_tokenizer, token_log_probs
from llmdoctor.settings import TrainSettings

MARKER = "doctor.json"


class DoctorOutput(NamedTuple):
    """What stage 2 needs of a batch, right-padded. Beyond a row's response the entries mean nothing."""

    logprobs_B_T: Tensor
    log_values_R_N: Tensor


class Doctor(nn.Module):
    """A causal LM, LoRA-wrapped or whole, with a linear value head on what the LM head reads, in training form.

    log V(s) = scale * (w . h(s) + b), with w and b zero at the start: V = 1, the reference's own flow. ``scale`` is
    rho, so that the head learns at one speed whatever the strength of the rewards (a departure from the paper, which
    gives no parameterisation). Folded into w and b when saved.
    """

    def __init__(self, lm: PeftModel | PreTrainedModel, vocabulary: Vocabulary, scale: float = 1.0) -> None:
        super().__init__()
        self.lm = lm
        base = cast("PreTrainedModel", lm.get_base_model() if isinstance(lm, PeftModel) else lm)
        self._split = (SplitLM.of(base),)  # a tuple: not a submodule twice
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
    ) -> DoctorOutput:
        """Log-probs of the response tokens of the first ``scored`` rows, and log V of every state of all R rows.

        ``input_ids`` and ``attention_mask`` [R, L], prompt then response, right-padded; the lengths [R].
        """
        (lm,) = self._split
        last = int(response_lengths.max())
        places_R_N = (prompt_lengths[:, None] - 1 + torch.arange(last + 1, device=input_ids.device)).clamp(
            max=input_ids.shape[1] - 1
        )
        hidden_R_L_H = lm.hidden(input_ids, attention_mask)
        states_R_N_H = hidden_R_L_H.gather(1, places_R_N[..., None].expand(-1, -1, hidden_R_L_H.shape[-1]))
        values_R_N = self.scale * self.value_head(states_R_N_H.to(self.value_head.weight.dtype))[..., 0].float()
        targets_B_T = input_ids[:scored].gather(1, places_R_N[:scored, 1:])
        mask_B_T = torch.arange(last, device=input_ids.device) < response_lengths[:scored, None]
        logprobs = self._log_probs(states_R_N_H[:scored, :-1], targets_B_T, mask_B_T)
        return DoctorOutput(logprobs, values_R_N)

    def base_alone(self) -> AbstractContextManager[Any]:
        """While it lasts the doctor is its base. A whole model's base is what it was before its first step."""
        return self.lm.disable_adapter() if isinstance(self.lm, PeftModel) else nullcontext()

    def _log_probs(self, states_B_T_H: Tensor, targets_B_T: Tensor, mask_B_T: Tensor) -> Tensor:
        (lm,) = self._split
        found = token_log_probs(lm, states_B_T_H[mask_B_T], targets_B_T[mask_B_T], self.vocabulary)
        return torch.zeros(mask_B_T.shape, dtype=found.dtype, device=found.device).masked_scatter(mask_B_T, found)


def new_doctor(
    base_model: str | Path, settings: TrainSettings, *, trust_remote_code: bool = False
) -> tuple[Doctor, PreTrainedTokenizerBase]:
    """A fresh doctor on ``base_model``: LoRA (unless whole) and value head at zero. Raises LoadError."""
    tokenizer = load_tokenizer(base_model, trust_remote_code=trust_remote_code)
    full = settings.method == "full"
    dtype = "float32" if full and settings.dtype == "auto" else settings.dtype  # bfloat16 loses small updates
    base = load_lm(base_model, dtype=dtype, device=settings.device, trust_remote_code=trust_remote_code)
    targets = settings.lora_targets
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=settings.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
    )
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    torch.manual_seed(settings.seed)
    lm = base.requires_grad_() if full else cast("PeftModel", get_peft_model(base, config))
    return Doctor(lm, Vocabulary.of(tokenizer), settings.rho), tokenizer


def save_doctor(folder: Path, doctor: Doctor, tokenizer: PreTrainedTokenizerBase, meta: Mapping[str, Any]) -> None:
    """Write the doctor folder, all or nothing: PEFT adapter (or whole model), value head, tokenizer, doctor.json, card.

    ``meta["base_model"]`` is stored relative to the folder when it is a folder itself. Raises StorageError.
    """
    ensure_replaceable(folder, MARKER)
    base = str(meta["base_model"])
    if Path(base).is_dir():
        base = os.path.relpath(Path(base).resolve(), folder.resolve())
        base = base if base.startswith(".") else f"./{base}"
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        if isinstance(doctor.lm, PeftModel):
            doctor.lm.peft_config["default"].base_model_name_or_path = base
            # the embeddings are the base's own: without this PEFT asks the hub whether they are
            doctor.lm.save_pretrained(str(temporary), safe_serialization=True, save_embedding_layers=False)
        else:
            doctor.lm.save_pretrained(str(temporary))
        head = {name: (doctor.scale * p.detach()).float().cpu() for name, p in doctor.value_head.named_parameters()}
        save_file(head, temporary / "value_head.safetensors")
        tokenizer.save_pretrained(str(temporary))
        write_json(temporary / MARKER, {**meta, "base_model": base})
        (temporary / "README.md").write_text(_card(base, meta), encoding="utf-8")


@dataclass(frozen=True, eq=False)
class LoadedDoctor:
    """A doctor in decoding form: LoRA merged into its base, so that a step costs no more than the base's.

    ``value_weight`` [1, H] and ``value_bias`` [1] give log V from what the LM head reads. ``base`` is the doctor
    without its adapter, only there when asked for (mode "ratio"). ``anchored`` says that log V(s_T) is 0 by training.
    """

    name: str
    model: PreTrainedModel
    value_weight: Tensor
    value_bias: Tensor
    anchored: bool
    vocabulary: Vocabulary
    base: PreTrainedModel | None
    meta: Mapping[str, Any]

    def log_value(self, hidden_B_H: Tensor) -> Tensor:
        """Log V [...] from what the LM head reads [..., H]."""
        return nn.functional.linear(hidden_B_H.to(self.value_weight), self.value_weight, self.value_bias)[..., 0]


def load_doctor(
    checkpoint: str | Path,
    *,
    name: str | None = None,
    base: str | Path | None = None,
    with_base: bool = False,
    bases: dict[str, PreTrainedModel] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedDoctor:
    """Open a doctor folder for decoding. ``base`` overrides the base model that doctor.json names. Raises LoadError.

    ``with_base`` also loads the base as it was before training: once for all doctors opened with the same ``bases``,
    which must be opened with the same ``dtype`` and ``device`` too.
    """
    folder = Path(checkpoint).expanduser()
    if not (folder / MARKER).is_file():
        raise LoadError(f"there is no doctor at {folder}: expected a folder with {MARKER}, as `llmdoctor train` writes")
    meta = read_json(folder / MARKER)
    if not isinstance(meta, dict) or "base_model" not in meta:
        raise LoadError(f"{folder / MARKER}: expected an object with base_model; train the doctor again")
    source = str(base or meta["base_model"])
    if base is None and source.startswith("."):
        source = str((folder / source).resolve())
    options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(folder)
    plain, bases = None, {} if bases is None else bases
    if with_base:
        key = str(Path(source).resolve()) if Path(source).is_dir() else source
        plain = bases[key] = bases.get(key) or load_lm(source, **options)  # type: ignore[arg-type]
    whole = not (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file()
    lm = load_lm(folder if whole else source, **options)  # type: ignore[arg-type]
    try:
        merged = lm if whole else PeftModel.from_pretrained(lm, str(folder)).merge_and_unload()  # type: ignore[operator]
        head = load_file(folder / "value_head.safetensors", device=str(lm.device))
        weight, bias = head["weight"], head["bias"]
        if weight.shape != (1, width := lm.get_output_embeddings().in_features) or bias.shape != (1,):
            raise ValueError(f"its value head has the shape {list(weight.shape)}; its base needs [1, {width}]")
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoadError(f"cannot load the doctor {folder}: {reason}") from error
    return LoadedDoctor(
        name or str(meta.get("name") or "doctor"),
        merged.eval().requires_grad_(False),
        weight,
        bias,
        bool(meta.get("settings", {}).get("train", {}).get("anchor", False)),
        Vocabulary.of(tokenizer),
        plain,
        meta,
    )


def _card(base: str, meta: Mapping[str, Any]) -> str:
    """A short model card."""
    rewards, metrics = meta.get("rewards", {}), meta.get("metrics", {})
    full = meta.get("settings", {}).get("train", {}).get("method") == "full"
    what = "All weights and a value head" if full else "A LoRA adapter and a value head"
    return (
        f"---\nlibrary_name: {'transformers' if full else 'peft'}\nbase_model: {base}\n"
        f"tags: [llmdoctor, {'full' if full else 'lora'}]\n---\n\n"
        f"# {meta.get('name', 'doctor')}: an llmdoctor doctor\n\n"
        f"{what} on `{base}`, trained with TFPO (arXiv 2601.10416) to steer the patient "
        f"`{rewards.get('patient', '?')}` while it decodes.\n\n"
        f"Trained on {rewards.get('pairs', '?')} preference pairs, {metrics.get('steps', '?')} steps. Settings and "
        f"metrics: `{MARKER}`.\n\n"
        "```python\nfrom llmdoctor import LLMdoctor\n\n"
        'doctor = LLMdoctor(patient_model="…", doctor_checkpoint="this folder", beta=0.8)\n```\n'
    )
