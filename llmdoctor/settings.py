"""Every setting, stated once: fields, ranges, defaults and help of the three stages."""

import os.path
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationInfo

from llmdoctor.records import Direction, FacePair


@dataclass(frozen=True, slots=True)
class Guidance:
    """How strongly each model speaks: pi ∝ patient^alpha · prod doctor_i^beta_i. An immutable snapshot, read per token.

    ``alpha`` and every beta are finite and >= 0, and not all zero. ``mode`` "ratio" uses (doctor / doctor_base)^beta
    among the tokens whose patient probability is at least ``plausibility`` times the patient's greatest; where log
    doctor and log base differ by at most its ``dead_zones`` nats (0 if not named) a doctor has no say.
    """

    alpha: float = 1.0
    betas: Mapping[str, float] = field(default_factory=dict)
    mode: Literal["product", "ratio"] = "product"
    plausibility: float = 0.1
    dead_zones: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain values; ``plausibility`` and ``dead_zones`` only in mode "ratio", where they count."""
        values: dict[str, Any] = {"alpha": self.alpha, "betas": dict(self.betas), "mode": self.mode}
        if self.mode == "ratio":
            values |= {"plausibility": self.plausibility, "dead_zones": dict(self.dead_zones)}
        return values


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn from the product. Temperature, top-k, top-p and min-p apply after the product.

    ``temperature`` >= 0 (0 is greedy), ``top_k`` >= 0 (0 is off), ``top_p`` in (0, 1], ``min_p`` in [0, 1),
    ``max_new_tokens`` >= 1; ``seed`` None draws a fresh one. ``stop`` strings end the answer and are cut from it.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 256
    seed: int | None = None
    stop: tuple[str, ...] = ()


def _resolve_location(value: str, info: ValidationInfo) -> str:
    if value.startswith("~/"):
        return os.path.expanduser(value)  # noqa: PTH111 (it stays a string: it may as well be a hub name)
    if value.startswith(("./", "../")) and info.context:
        return str(os.path.normpath(info.context["folder"] / value))
    return value


Location = Annotated[str, StringConstraints(min_length=1), AfterValidator(_resolve_location)]
Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """A group of settings: frozen, no unknown keys, no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PatientSettings(Settings):
    """The large model that is steered and never changed."""

    model: Location
    dtype: str = "auto"
    device: str = "auto"
    system_prompt: str | None = None


class FaceSettings(Settings):
    """Two system prompts that ask the patient for a behaviour and for its opposite."""

    positive: str = Field(min_length=1)
    negative: str = Field(min_length=1)

    def pair(self) -> FacePair:
        """The same as the engine's record."""
        return FacePair(self.positive, self.negative)


class DataSettings(Settings):
    """Preference pairs: a file or a hub data set. ``label`` is the column that says which of two answers is better."""

    source: Location
    split: str = "train"
    label: str | None = None


class RewardSettings(Settings):
    """How stored log-probs become token rewards. ``faces`` None means every face pair that the folder holds."""

    direction: Direction = "gap"
    tau: Positive = 1.0
    theta: float = Field(default=0.5, ge=0, lt=1)
    eps: Positive = 1e-6
    faces: tuple[str, ...] | None = Field(default=None, min_length=1)


class TrainSettings(Settings):
    """Stage 2. ``doctor`` is the base model; ``batch_size`` counts preference pairs a step and device.

    ``ceiling`` is the greatest reward of a token that counts, None for no bound: with a low one only the blame is left,
    good tokens are worth the same, and the doctor does not prefer the few of them that the faces tell apart best.
    ``subtb_weight`` 1 weighs every sub-trajectory alike, less the shorter ones more: a token's reward is then credited
    to that token. ``value_weight`` is lambda, ``alternatives`` the further same-prefix token pairs a response that the
    value loss compares. ``method`` full trains every weight of the base.
    ``holdout`` is the share of pairs that is only evaluated on; ``checkpoint_every`` how often to evaluate and to keep
    a checkpoint, in steps (below 1: that share of the run); ``patience`` the evaluations without a better held-out loss
    after which to stop; ``keep_best`` ends with the weights of the best evaluation instead of the last step's.
    ``report_to`` names what else follows the run, as transformers' TrainingArguments has it: tensorboard, wandb, ...
    """

    doctor: Location | None = None
    method: Literal["lora", "full"] = "lora"
    flow: Literal["relative", "absolute"] = "relative"
    anchor: bool = True
    rho: Positive = 10.0
    ceiling: NonNegative | None = None
    subtb_weight: float = Field(default=0.2, gt=0, le=1)
    value_weight: NonNegative = 0.1
    gamma: NonNegative = 1.0
    alternatives: int = Field(default=0, ge=0)
    lora_rank: Count = 16
    lora_alpha: Positive = 32.0
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    learning_rate: Positive = 1e-3
    value_learning_rate: Positive | None = None
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    lr_scheduler: str = "cosine"
    batch_size: Count = 16
    gradient_accumulation: Count = 1
    epochs: Positive = 1.0
    max_steps: Count | None = None
    max_grad_norm: NonNegative = 1.0
    weight_decay: NonNegative = 0.0
    gradient_checkpointing: bool = False
    holdout: float = Field(default=0.0, ge=0, lt=1)
    checkpoint_every: Positive = 0.1
    patience: Count | None = None
    keep_best: bool = True
    report_to: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)
    dtype: str = "auto"
    device: str = "auto"


class DoctorSettings(Settings):
    """A trained doctor. ``base`` None takes the base model that the doctor's own folder names.

    ``dead_zone``, nats, is for mode "ratio": see `llmdoctor.records.Guidance`.
    """

    checkpoint: Location
    base: Location | None = None
    beta: NonNegative = 0.8
    dead_zone: NonNegative = 0.0


class DecodeSettings(Settings):
    """Stage 3; the fields mean what they mean in `llmdoctor.records.Guidance` and `llmdoctor.records.Sampling`.

    ``speculation``: a doctor drafts, the patient checks several tokens at a time. The same answers, sooner.
    """

    alpha: NonNegative = 1.0
    mode: Literal["product", "ratio"] = "product"
    plausibility: float = Field(default=0.1, ge=0, le=1)
    temperature: NonNegative = 1.0
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    max_new_tokens: Count = 256
    stop: tuple[str, ...] = ()
    speculation: bool = True
