"""What the JSON files of models, doctors and rewards folders may hold; each is checked as a whole when it is read.

Keys that are not named here are kept and may hold anything.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

DOCTOR_VERSION = REWARDS_VERSION = 1
"""Of doctor.json and of meta.json, as this version writes them; later ones are refused."""
_GREATEST = 1 << 31
Count = Annotated[int, Field(ge=0, le=_GREATEST)]
Number = Annotated[float, Field(ge=-1e9, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
ShardName = Annotated[str, Field(pattern=r"^rewards-\d+\.parquet$")]
FileName = Annotated[str, Field(pattern=r"^[\w.-]+$")]


class Artefact(BaseModel):
    """The content of one file."""

    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, defer_build=True, protected_namespaces=()
    )


class _Tokenizer(Artefact):
    fingerprint: str = ""
    size: Count = 0


class _PatientTokenizer(_Tokenizer):
    fingerprint: str


class _Training(Artefact):
    method: str = ""
    anchor: bool = False


class _DoctorSettings(Artefact):
    train: _Training = _Training()
    rewards: dict[str, Any] = {}
    face_weights: dict[str, Number] = {}


class DoctorFile(Artefact):
    """doctor.json."""

    schema_version: Annotated[int, Field(ge=1, le=DOCTOR_VERSION)] = 1  # first: it is the first that is told of
    base_model: Text
    name: Text = "doctor"
    run: str = ""
    base_fingerprint: str = ""
    base_beside: str = ""
    llmdoctor_version: str = ""
    tokenizer: _Tokenizer = _Tokenizer()
    settings: _DoctorSettings = _DoctorSettings()
    rewards: dict[str, Any] = {}
    metrics: dict[str, Any] = {}


class _Patient(Artefact):
    model: Text
    fingerprint: str
    quantization: dict[str, Any] | None = None


class _Face(Artefact):
    positive: str
    negative: str


class _Dataset(Artefact):
    source: str
    fingerprint: str


class _Counts(Artefact):
    pairs: Count
    tokens: Count
    skipped: Count
    truncated_prompts: Count


class RewardsMeta(Artefact):
    """meta.json of a rewards folder."""

    schema_version: Annotated[int, Field(ge=1, le=REWARDS_VERSION)]
    patient: _Patient
    tokenizer: _PatientTokenizer
    faces: dict[str, _Face]
    shards: dict[ShardName, str] | list[ShardName]
    dataset: _Dataset
    counts: _Counts | None = None
    skipped: dict[str, Count] = {}
    skipped_lines: dict[str, list[Count]] = {}
    statistics: dict[str, Any] = {}
    batch_tokens: Count = 0
    dtype: str = ""
    llmdoctor_version: str = ""


class ProbeMeta(Artefact):
    """probe.json of a rewards folder."""

    files: dict[FileName, str]
    layers: list[Count] = []
    ridge: Number = 0.0
    held_out_accuracy: Number = 0.0
    bytes_per_pair: Count = 0


class AdapterConfig(Artefact):
    """adapter_config.json, as PEFT writes it."""

    peft_type: str = "LORA"
    peft_version: str = ""
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    r: Count | None = None
    lora_alpha: Number | None = None
    lora_dropout: Share = 0.0
    rank_pattern: dict[str, Count | Share | list[bool]] | None = None  # what is left of a rank in AdaLoRA, by place
    alpha_pattern: dict[str, Number] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    bias: str = "none"
    auto_mapping: dict[str, Any] | None = None


class ProgressFile(Artefact):
    """progress.json of a checkpoint."""

    history: list[list[float | None]]
    evaluations: list[dict[str, Any]]
    tokens: Count


class CopyFile(Artefact):
    """copy.json of a GGUF's copy."""

    checksums: dict[FileName, str]
