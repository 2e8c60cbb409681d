"""Every setting, stated once: fields, ranges, defaults and help of the three stages.

The profile, the command's options, ``/set``, the app, saved conversations and what the decoder reads all derive from
these classes: a field added here is known to all of them.
"""

import json
import os.path
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NoReturn

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, ValidationError, ValidationInfo

from llmdoctor.errors import UsageError
from llmdoctor.schema import Settings, complaint, shown

if TYPE_CHECKING:
    from llmdoctor.records import FacePair

GREATEST_SEED = 2**32 - 1  # numpy's limit


def _resolve_location(value: str, info: ValidationInfo) -> str:
    if value.startswith("~/"):
        return os.path.expanduser(value)  # noqa: PTH111 (it stays a string: it may as well be a hub name)
    if value.startswith(("./", "../")) and info.context:
        return str(os.path.normpath(info.context["folder"] / value))
    return value


class Strengths(dict[str, float]):
    """One number per doctor, read-only: a change would reach neither the models nor the checks."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UsageError('these values are read-only: assign a mapping instead, as in doctor.beta = {"helpful": 0.8}')

    __setitem__ = __delitem__ = __ior__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type["Strengths"], tuple[dict[str, float]]]:
        return type(self), (dict(self),)  # copy and pickle would fill an empty one item by item


def _all_linear(value: Any) -> Any:
    """Turn ``--lora-targets all-linear``, which arrives as a list like every repeatable option, into the one word."""
    return "all-linear" if value in (["all-linear"], ("all-linear",)) else value


def _mapping(value: Any) -> Any:
    """Turn the JSON text of a mapping, as an option gives it, into the mapping."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"'device_map' expected a name or a JSON object, got {shown(value)}") from error
    return value


Location = Annotated[str, StringConstraints(min_length=1), AfterValidator(_resolve_location)]
Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]+$")]
Direction = Literal["label", "gap", "agree", "fitted", "probe", "advantage"]
OF_STATES = frozenset({"probe", "advantage"})
"""The directions that reward by a probe of the patient's states."""
Mode = Literal["product", "ratio"]
Dtype = Annotated[str, Field(description="auto, float32, bfloat16 or float16")]
Device = Annotated[str, Field(description="auto, cpu, cuda, cuda:1, mps, ...")]
# beyond 1e4 everything is greedy, and near 1e38 float32 overflows
Beta = Annotated[float, Field(ge=0, le=1e4, description="Weight of a doctor: its exponent in the product")]
DeadZone = Annotated[
    float, Field(ge=0, description='Nats between a doctor and its base up to which it has no say; mode "ratio" only')
]


class PatientSettings(Settings):
    """The large model that is steered and never changed."""

    model: Location = Field(
        description="Patient: folder, hub name, .gguf file (org/name:file.gguf on the hub), or package:module/file.gguf"
    )
    dtype: Dtype = "auto"
    device: Device = "auto"
    attn_implementation: str | None = Field(
        default=None, description="Attention: sdpa, eager, flash_attention_2, ...; by default transformers chooses"
    )
    device_map: Annotated[str | dict[str, str | int] | None, BeforeValidator(_mapping)] = Field(
        default=None, description='Which device holds which weights: auto, balanced, ..., or {"model.layers.0": 1, ...}'
    )
    tp_plan: Literal["auto"] | None = Field(
        default=None, description="Split the weights over the processes of torchrun; by default they are not split"
    )
    system_prompt: str | None = Field(default=None, description="What opens every conversation")

    def loading(self) -> dict[str, Any]:
        """The keywords of `load_patient` beside the model."""
        return self.model_dump(exclude={"model", "system_prompt"})


class WelcomeSettings(Settings):
    """What a newcomer is told about the patient. It changes no answer."""

    knows: str = Field(default="anything you may ask", description="What the patient can be asked about")
    examples: tuple[str, ...] = Field(
        default=(
            "How can I sleep better?",
            "Why is the sky blue?",
            "Write a short letter of thanks to a neighbour.",
        ),
        description="Questions to begin with",
    )
    topics: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Topics of a patient that knows no others, each with words that tell a question about it",
    )
    follow_ups: tuple[str, ...] = Field(
        default=(), description="Words that tell a question about the topic of the one before"
    )

    def covers(self, question: str, *, first: bool = True) -> bool:
        """Whether the question is about one of the topics, or, unless it is the ``first``, goes on with one.

        A word of five letters or more is also told by its beginning: "sleep" is in "sleeping".
        """
        if not self.topics:
            return True
        said = re.findall(r"[^\W_]+", question.lower())
        known = [word for words in self.topics.values() for word in words] + list(() if first else self.follow_ups)
        return any(word == one or (len(one) > 4 and word.startswith(one)) for one in known for word in said)


class FaceSettings(Settings):
    """Two system prompts that ask the patient for a behaviour and for its opposite."""

    positive: str = Field(min_length=1, description="Asks for the behaviour")
    negative: str = Field(min_length=1, description="Asks for its opposite")

    def pair(self) -> "FacePair":
        """The same as the engine's record."""
        from llmdoctor.records import FacePair  # which loads numpy; `--help` needs none

        return FacePair(self.positive, self.negative)


def _column_names(value: Any) -> dict[str, str] | None:
    """``chosen=a,rejected=b``, or the same as a mapping."""
    if value is None:
        return None
    listed = [part.strip().split("=", 1) for part in value.split(",")] if isinstance(value, str) else []
    parts = dict(part for part in listed if len(part) == 2) if listed else value
    if not (
        isinstance(parts, Mapping)
        and len(parts) == (len(listed) or len(parts))
        and {"chosen", "rejected"} <= parts.keys() <= {"chosen", "rejected", "prompt", "system"}
        and all(isinstance(name, str) and name for name in parts.values())
    ):
        expected = "chosen=A,rejected=B[,prompt=C,system=D] with names of columns"
        raise ValueError(f"columns: expected {expected}, got {shown(value)}")
    return dict(parts)


class DataSettings(Settings):
    """Preference pairs: a file or a hub data set."""

    source: Location = Field(
        description="Preference pairs: .jsonl, .json, .parquet, .csv, .tsv (or .gz), or a hub data set"
    )
    split: str = Field(default="train", description="Split of a hub data set")
    label: str | None = Field(default=None, description="Column that says which of two answers is better")
    columns: Annotated[dict[str, str] | None, BeforeValidator(_column_names)] = Field(
        default=None, description="Columns of pairs in no known shape: chosen=A,rejected=B (and prompt=C, system=D)"
    )


class RewardSettings(Settings):
    """How stored log-probs become token rewards."""

    direction: Direction = Field(default="gap", description="What gives a reward its sign")
    tau: float = Field(default=1.0, gt=0, description="Softness of a token's importance S_t")
    theta: float = Field(default=0.5, ge=0, lt=1, description="Importance up to which a token earns nothing")
    eps: float = Field(default=1e-6, gt=0, description="Added to the mean gap that S_t is relative to, nats")
    faces: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Face pairs to use; by default all that the folder holds"
    )


class TrainSettings(Settings):
    """Stage 2: how a doctor is trained on token rewards."""

    doctor: Location | None = Field(default=None, description="Base model of the doctor, named like a patient")
    method: Literal["lora", "head", "full"] = Field(
        default="lora",
        description="Train a LoRA adapter; a change of what the head reads, which costs no forward if the base is the "
        "patient; or every weight of the base",
    )
    flow: Literal["relative", "absolute"] = Field(
        default="relative", description="Flow relative to the doctor's base, or absolute as in the paper"
    )
    anchor: bool = Field(default=True, description="Fix log V at the end of an answer to 0")
    rho: float = Field(default=10.0, gt=0, description="Scale of the rewards in log Q")
    # with a low ceiling only the blame is left: good tokens are worth the same, and the doctor does not prefer the few
    # of them that the faces tell apart best
    ceiling: float | None = Field(
        default=None, ge=0, description="Greatest reward of a token that counts; by default no bound"
    )
    # below 1 short sub-trajectories weigh more, and a token's reward is credited to that token
    subtb_weight: float = Field(
        default=0.2, gt=0, le=1, description="Lambda of SubTB; 1 weighs every sub-trajectory alike"
    )
    subtb: Literal["mean", "sum"] = Field(
        default="mean", description="Average SubTB over the sub-trajectories of an answer, or add them up"
    )
    value_weight: float = Field(default=0.1, ge=0, description="Weight of the value loss")
    hinge: Literal["log", "value"] = Field(default="log", description="Whether the value loss compares log V, or V")
    gamma: float = Field(default=1.0, ge=0, description="Margin of the value loss")
    alternatives: int = Field(
        default=0,
        ge=0,
        description="Further token pairs with the same prefix that the value loss compares, per response",
    )
    lora_rank: int = Field(default=16, ge=1, le=1 << 16, description="Rank of the adapter, or of the change")
    lora_alpha: float = Field(default=32.0, gt=0, le=1e6, description="It is scaled by this over its rank")
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapter (method lora)")
    lora_targets: Annotated[tuple[str, ...] | Literal["all-linear"], BeforeValidator(_all_linear)] = Field(
        default="all-linear", description="Modules that get an adapter (method lora): their names, or all-linear"
    )
    learning_rate: float = Field(default=1e-3, gt=0, description="Peak learning rate")
    value_learning_rate: float | None = Field(
        default=None, gt=0, description="Peak learning rate of the value head; by default that of the rest"
    )
    warmup_ratio: float = Field(
        default=0.03, ge=0, le=1, description="Share of the steps in which the learning rate rises"
    )
    lr_scheduler: str = Field(
        default="cosine", description="Learning rate after the warm-up: linear, cosine, constant, ..."
    )
    batch_size: int = Field(default=16, ge=1, description="Preference pairs per step and device")
    gradient_accumulation: int = Field(default=1, ge=1, description="Batches per step")
    epochs: float = Field(default=1.0, gt=0, description="Passes over the pairs")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after N steps")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Norm that gradients are clipped to; 0 is off")
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW")
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations again instead of keeping them (not for method head)"
    )
    holdout: float = Field(default=0.0, ge=0, lt=1, description="Share of the pairs that is only evaluated on")
    checkpoint_every: float = Field(
        default=0.1, gt=0, description="Evaluate and keep a checkpoint every N steps; below 1, that share of the run"
    )
    patience: int | None = Field(
        default=None, ge=1, description="Stop after N evaluations without a better held-out loss; by default never"
    )
    keep_best: bool = Field(
        default=True, description="End with the weights of the best evaluation, or of the last step"
    )
    report_to: tuple[str, ...] = Field(
        default=(), description="What else follows the run, as in transformers: tensorboard, wandb, ..."
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=GREATEST_SEED,
        description="Seed of new weights, of which pairs are held out, and of the order of the others",
    )
    dtype: Dtype = "auto"
    device: Device = "auto"


class ShrinkSettings(Settings):
    """How a small model is made of the patient's first layers."""

    layers: int | None = Field(
        default=None, ge=1, description="Layers of the patient to keep, from the first; by default a fifth of them"
    )
    answers: int = Field(default=4, ge=1, description="Answers of the patient to learn from, per prompt")
    max_new_tokens: int = Field(default=128, ge=1, description="Longest of these answers, in tokens")
    learning_rate: float = Field(default=1e-3, gt=0, description="Peak learning rate")
    batch_size: int = Field(default=8, ge=1, description="Answers per step")
    epochs: float = Field(default=3.0, gt=0, description="Passes over the answers")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after N steps")
    holdout: float = Field(default=0.05, gt=0, lt=1, description="Share of the prompts that is only measured on")
    checkpoint_every: float = Field(
        default=0.1, gt=0, description="Keep a checkpoint every N steps; below 1, that share of the run"
    )
    seed: int = Field(default=0, ge=0, le=GREATEST_SEED, description="Seed of the answers and of their order")

    def training(self, device: str) -> TrainSettings:
        """The same for the trainer."""
        shared = self.model_dump(include=set(TrainSettings.model_fields) - {"holdout"})
        return TrainSettings(method="full", device=device, weight_decay=0.01, **shared)


class DoctorSettings(Settings):
    """A trained doctor."""

    checkpoint: Location = Field(description="Folder of the doctor")
    base: Location | None = Field(default=None, description="Base model, if not the one that the folder names")
    beta: Beta = 0.8
    dead_zone: DeadZone = 0.0


class GuidanceFields(Settings):
    """How strongly each model speaks, except for what each doctor has of its own."""

    alpha: float = Field(default=1.0, ge=0, le=1e4, description="Weight of the patient: its exponent in the product")
    mode: Mode = Field(default="product", description="Multiply by the doctors, or by doctor over base")
    # A cut removes tokens also where the doctors hardly speak: .18 nats of KL per token at .05 on a real model, all of
    # which would count as guidance. Real doctors were measured without it.
    plausibility: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description='Mode "ratio" keeps tokens of at least this share of the patient\'s likeliest (0: all)',
    )


# how doctors are combined with the patient is chosen for particular doctors; alpha suits any
COMBINATION = frozenset(GuidanceFields.model_fields) - {"alpha"}


class SamplingFields(Settings):
    """How a token is drawn from the product.

    What would repeat an n-gram goes first, then temperature, top-k, top-p and min-p, in this order; then the draw.
    """

    temperature: float = Field(default=1.0, ge=0, description="Sampling temperature; 0 is greedy")
    top_k: int = Field(default=0, ge=0, description="Keep the k likeliest tokens; 0 is off")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Keep the likeliest tokens that make up p")
    min_p: float = Field(default=0.0, ge=0, lt=1, description="Drop tokens below this share of the likeliest")
    no_repeat_ngram: int = Field(
        default=0,
        ge=0,
        description="Never say so many tokens in a row twice in an answer, unless nothing else is possible; 0 is off",
    )
    max_new_tokens: int = Field(default=256, ge=1, description="Longest answer, in tokens")
    stop: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = Field(
        default=(), description="Strings that end the answer and are cut from it"
    )


class _Snapshot(Settings):
    """What the decoder reads. Users make it in code: values may be positional, and a mistake is a `UsageError`."""

    _first: ClassVar[tuple[str, ...]] = ()

    # hidden from type checkers, which otherwise know every field by its name and type
    if not TYPE_CHECKING:

        def __init__(self, *values: Any, **named: Any) -> None:
            given = {**dict(zip(self._order(), values, strict=False)), **named}
            if len(values) > len(self._order()) or len(given) < len(values) + len(named):
                raise TypeError(f"{type(self).__name__} got too many values, or one of them twice")
            try:
                super().__init__(**given)
            except ValidationError as error:
                raise UsageError(complaint(error, given, type(self))) from error

    @classmethod
    def _order(cls) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*cls._first, *cls.model_fields)))


class Guidance(_Snapshot, GuidanceFields):
    """How strongly each model speaks: pi ∝ patient^alpha · prod doctor_i^beta_i. An immutable snapshot, read per token.

    ``Guidance(alpha, betas, mode, plausibility, dead_zones)``. Alpha and the betas must not all be 0. Mode "ratio" uses
    (doctor / doctor_base)^beta among the tokens whose patient probability is at least ``plausibility`` times the
    patient's greatest; where log doctor and log base differ by at most its dead zone, in nats, a doctor has no say.

    Raises UsageError for a value out of range.
    """

    _first: ClassVar[tuple[str, ...]] = ("alpha", "betas")

    betas: Annotated[Mapping[str, Beta], AfterValidator(Strengths)] = Field(default=Strengths(), title="beta")
    dead_zones: Annotated[Mapping[str, DeadZone], AfterValidator(Strengths)] = Field(
        default=Strengths(), title="dead_zone"
    )

    @property
    def is_patient_alone(self) -> bool:
        """Whether no doctor has a say and alpha is 1: the product is then the patient, bit for bit."""
        return self.alpha == 1 and not any(self.betas.values())

    def to_dict(self) -> dict[str, Any]:
        """As plain values; ``plausibility`` and ``dead_zones`` only in mode "ratio", where they count."""
        values = self.model_dump(exclude=None if self.mode == "ratio" else {"plausibility", "dead_zones"})
        return {name: values[name] for name in self._order() if name in values}


def check_guidance(guidance: Guidance, doctors: Sequence[str]) -> None:
    """Raise UsageError for the name of a doctor that does not exist, and if alpha and every beta are 0."""
    if unknown := [name for name in (*guidance.betas, *guidance.dead_zones) if name not in doctors]:
        known = ", ".join(doctors) or "none"
        raise UsageError(f"there is no doctor {unknown[0]!r}; the doctors are: {known}")
    if guidance.alpha == 0 and not any(guidance.betas.values()):
        raise UsageError("alpha and every beta are 0: nothing is left to decode from; set one of them above 0")


class Sampling(_Snapshot, SamplingFields):
    """How a token is drawn from the product, and the seed of the draws. Raises UsageError for a value out of range."""

    seed: int | None = Field(
        default=None, ge=0, le=GREATEST_SEED, description="Seed of the draws; by default a fresh one"
    )


class DecodeSettings(SamplingFields, GuidanceFields):
    """Stage 3."""

    speculation: bool = Field(
        default=True,
        description="Let a doctor draft tokens that the patient checks together: the same answers, sooner",
    )
    draft_model: Location | None = Field(
        default=None,
        description="Drafts in place of a doctor: int8 (the patient in 8 bits), or a small model of its family",
    )

    def guidance(self, doctors: Mapping[str, DoctorSettings]) -> Guidance:
        """What the decoder reads of these settings and those of the doctors."""
        return Guidance(
            **self.model_dump(include=set(GuidanceFields.model_fields)),
            betas={name: doctor.beta for name, doctor in doctors.items()},
            dead_zones={name: doctor.dead_zone for name, doctor in doctors.items()},
        )

    def sampling(self, seed: int | None = None) -> Sampling:
        """How these settings draw, with that seed."""
        return Sampling(**self.model_dump(include=set(SamplingFields.model_fields)), seed=seed)
