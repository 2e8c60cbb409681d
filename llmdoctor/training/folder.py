"""The doctor folder, as ``train`` writes it, and the doctor in decoding form, as it is loaded from there."""

import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import psutil  # type: ignore[import-untyped]
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmdoctor.adapters import alike, as_loaded, merged_adapter, probe_ids
from llmdoctor.artefacts import DOCTOR_VERSION, DoctorFile
from llmdoctor.errors import LLMDoctorWarning, LoadError, UsageError
from llmdoctor.files import DOCTOR, atomic_path, ensure_replaceable, read_json, require_doctor, write_json
from llmdoctor.harmless import clean, first_line
from llmdoctor.model_source import ModelSource
from llmdoctor.models import SplitLM, Vocabulary, load_lm, load_tokenizer, shared_by_processes
from llmdoctor.tensors import read_tensors, same_weights
from llmdoctor.training.doctor import Doctor, HeadAdapter

HEAD = "head.safetensors"
_HEAD_TENSORS = ("down.weight", "up.weight")


def save_doctor(
    folder: Path,
    doctor: Doctor,
    tokenizer: PreTrainedTokenizerBase,
    meta: Mapping[str, Any],
    *,
    trust_remote_code: bool = False,
) -> None:
    """Write the doctor folder, all or nothing: what was trained, value head, doctor.json, model card, and tokenizer.

    ``meta["base_model"]`` is the base, whose fingerprint doctor.json states. A hub name and a file of a package stay as
    they are. Of a path, doctor.json has the absolute form and, as ``base_beside``, the one relative to the folder: they
    are hints of where the base may be. What was written is compared with the doctor: see `_require_itself`.

    Raises StorageError; UsageError if the base lies in ``folder``; LoadError for a doctor that loads as another one.
    """
    ensure_replaceable(folder, DOCTOR)
    base = base_record(str(meta["base_model"]), folder)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        if isinstance(doctor.lm, PeftModel):
            doctor.lm.peft_config["default"].base_model_name_or_path = base["base_model"]
            # the embeddings are the base's own; unless told so, PEFT asks the hub for the base's config to find out
            doctor.lm.save_pretrained(str(temporary), safe_serialization=True, save_embedding_layers=False)
        elif doctor.change is not None:
            held = {"down.weight": doctor.change.down.weight, "up.weight": doctor.change.up_H_R}
            save_file({name: p.detach().float().cpu().contiguous() for name, p in held.items()}, temporary / HEAD)
        else:
            doctor.lm.save_pretrained(str(temporary))
        # the value head's scale goes into its weights: decoding need not know rho
        head = {name: (doctor.scale * p.detach()).float().cpu() for name, p in doctor.value_head.named_parameters()}
        save_file(head, temporary / "value_head.safetensors")
        if doctor.change is None:  # a head uses the tokenizer of its base
            tokenizer.save_pretrained(str(temporary))
        write_json(temporary / DOCTOR, {"schema_version": DOCTOR_VERSION, **meta, **base})
        (temporary / "README.md").write_text(clean(_card(base["base_model"], meta)), encoding="utf-8")
        _require_itself(temporary, doctor, str(meta["base_model"]), base["base_fingerprint"], trust_remote_code)


_OTHER = (
    "the doctor cannot be saved: loaded again it has other log-probs than the trained one. Train another kind of "
    "adapter, or other lora_targets"
)


def _require_itself(
    folder: Path, doctor: Doctor, base_model: str, base_fingerprint: str, trust_remote_code: bool
) -> None:
    """Raise LoadError if what was saved loads as another doctor. The base is there once: two may not fit.

    Only where an adapter or a form of weights cannot be looked at in this way is the doctor loaded beside the trained
    one, if there is room; else a warning says that it was not checked.
    """
    was_training = doctor.training
    doctor.eval()
    try:
        with torch.no_grad():
            if _is_as_saved(folder, doctor, base_model, base_fingerprint):
                return
            if not _has_room(doctor):
                raise MemoryError
            options = {"base": base_model, "device": str(doctor.lm.device), "trust_remote_code": trust_remote_code}
            loaded = load_doctor(folder, dtype=str(_dtype(doctor)).removeprefix("torch."), **options)  # type: ignore[arg-type]
            _require_own(doctor, lambda ids: _loaded_log_probs(loaded, doctor.vocabulary, ids))
    except (RuntimeError, MemoryError, LoadError) as error:
        if not _is_of_memory(error):
            raise
        warnings.warn(
            "the saved doctor was not checked: there is no memory to load a second one beside the trained one",
            LLMDoctorWarning,
            stacklevel=3,
        )
    finally:
        doctor.train(was_training)


def _is_of_memory(error: BaseException | None) -> bool:
    """Whether there was no memory: on a CPU torch says so in a plain RuntimeError. What loads wraps either."""
    if error is None or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return error is not None
    return bool(re.search("out of memory|alloc", str(error), re.IGNORECASE)) or _is_of_memory(error.__cause__)


def _is_as_saved(folder: Path, doctor: Doctor, base_model: str, base_fingerprint: str) -> bool:
    """Whether the saved doctor could be compared without a second base. Raises LoadError if it is another one."""
    lm = doctor.lm
    if doctor.change is not None:
        bases = {base_fingerprint: Base(cast("PreTrainedModel", lm), doctor.vocabulary)}
        loaded = load_doctor(folder, bases=bases)
        _require_own(doctor, lambda ids: _loaded_log_probs(loaded, doctor.vocabulary, ids))
        return True
    if not isinstance(lm, PeftModel):
        same = same_weights(lm, folder)
        if same is False:
            raise LoadError(_OTHER)
        return bool(same)
    base = lm.get_base_model()
    if getattr(base, "hf_quantizer", None) is not None or shared_by_processes(base):
        return False
    where = ModelSource.of(base_model)
    files = None if where.gguf else where.file("config.json", download=False)
    if files is not None and same_weights(base, files.parent) is False:
        raise LoadError(_OTHER)
    try:
        with as_loaded(lm, folder):
            found = _doctor_log_probs(doctor, _probe(doctor))
    except LoadError as error:
        raise LoadError(f"the doctor cannot be saved: {error}") from error
    except Exception as error:  # PEFT can have no second adapter of some kinds
        if _is_of_memory(error):
            raise
        return False
    _require_own(doctor, lambda _: found)
    return True


def _require_own(doctor: Doctor, log_probs: Callable[[Tensor], Tensor]) -> None:
    """Raise LoadError unless ``log_probs`` are those of the trained doctor."""
    ids = _probe(doctor)
    own = _doctor_log_probs(doctor, ids)
    with doctor.base_alone():
        base = _doctor_log_probs(doctor, ids)
    if not alike(log_probs(ids), own, base, _dtype(doctor)):
        raise LoadError(_OTHER)


def _probe(doctor: Doctor) -> Tensor:
    return probe_ids(doctor.vocabulary.size).to(doctor.lm.device)


def _dtype(doctor: Doctor) -> torch.dtype:
    return cast("torch.dtype", getattr(doctor.split.backbone, "dtype", torch.float32))


def _has_room(doctor: Doctor) -> bool:
    """Whether a second doctor fits beside this one, as far as can be told."""
    needed = sum(p.numel() * p.element_size() for p in doctor.lm.parameters())
    if doctor.lm.device.type == "cuda":
        return torch.cuda.mem_get_info(doctor.lm.device)[0] > needed
    return int(psutil.virtual_memory().available) > needed


def _loaded_log_probs(loaded: "LoadedDoctor", vocabulary: Vocabulary, ids_B_L: Tensor) -> Tensor:
    split = SplitLM.of(loaded.model)
    hidden = split.hidden(ids_B_L, torch.ones_like(ids_B_L))
    return vocabulary.mask(loaded.logits(split.logits(hidden), hidden)).log_softmax(-1)


def _doctor_log_probs(doctor: Doctor, ids_B_L: Tensor) -> Tensor:
    """Log-probs behind every token [B, L, V] of the trained doctor."""
    hidden = doctor.split.hidden(ids_B_L, torch.ones_like(ids_B_L))
    logits = doctor.split.logits(hidden)
    if (adapter := doctor.head_adapter()) is not None:
        logits = adapter(logits, hidden)
    return doctor.vocabulary.mask(logits).log_softmax(-1)


def require_base_outside(base: str | Path, folder: Path) -> None:
    """Raise UsageError if the base lies in the doctor folder, which is replaced as a whole."""
    where = ModelSource.of(base)
    if where.is_local and Path(where.place).resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"the base {base} lies in the doctor folder {folder}, which would replace it: choose another")


def base_record(base: str, folder: Path) -> dict[str, str]:
    """What doctor.json says of the base."""
    require_base_outside(base, folder)
    where = ModelSource.of(base)
    record = {"base_model": base, "base_fingerprint": where.fingerprint()}
    if base.startswith("package:") or not where.is_local:
        return record
    path = str(Path(where.place, where.gguf or "").resolve())
    return {**record, "base_model": path, "base_beside": os.path.relpath(path, folder.resolve())}


class Base(NamedTuple):
    """A model before training, which doctors may share."""

    model: PreTrainedModel
    vocabulary: Vocabulary


@dataclass(frozen=True, eq=False)
class LoadedDoctor:
    """A doctor in decoding form: LoRA is merged into its base, so that a step costs no more than one of the base.

    A doctor that only adds to the head of its base (``head``) leaves ``model``, the base, as it is; where that is the
    patient, the doctor costs no forward of its own.

    ``value_weight`` [1, H] and ``value_bias`` [1] give log V from what the LM head reads. ``base`` is the base before
    training, loaded only on request (mode "ratio" needs it). ``anchored``: training defined log V(s_T) as 0.
    """

    name: str
    model: PreTrainedModel
    value_weight: Tensor
    value_bias: Tensor
    anchored: bool
    vocabulary: Vocabulary
    base: PreTrainedModel | None
    meta: Mapping[str, Any]
    head: HeadAdapter | None = None

    def logits(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """The doctor's logits [..., V], from what its ``model`` says and what that model's head reads [..., H]."""
        return logits if self.head is None else self.head(logits, hidden)

    def log_value(self, hidden_B_H: Tensor) -> Tensor:
        """Log V [...] from what the LM head reads [..., H]."""
        return linear(hidden_B_H.to(self.value_weight), self.value_weight, self.value_bias)[..., 0]


def load_doctor(
    checkpoint: str | Path,
    *,
    name: str | None = None,
    base: str | Path | None = None,
    with_base: bool = False,
    bases: dict[str, Base] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> LoadedDoctor:
    """Load a doctor folder for decoding. Raises LoadError.

    ``base`` is where its base model is, if not where doctor.json says. Either must have the fingerprint that
    doctor.json states (folders of version 0.1.0 state none).

    ``with_base`` also loads the base as it was before training. Doctors that share a base load it once when they are
    given the same ``bases``; their ``dtype`` and ``device`` must then be the same too. A patient that is one of
    ``bases`` is shared in the same way by the doctors trained on itself.
    """
    folder = require_doctor(checkpoint)
    meta = read_json(folder / DOCTOR, DoctorFile)
    whole = not (folder / "adapter_config.json").is_file() and (folder / "config.json").is_file()
    only_head = (folder / HEAD).is_file() or meta.get("settings", {}).get("train", {}).get("method") == "head"
    bases = {} if bases is None else bases
    options = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    # a base that is loaded already, as the patient may be, need not be found again
    plain = bases.get(str(meta.get("base_fingerprint"))) if base is None and (with_base or only_head) else None
    source = ""
    if (not whole and not (only_head and plain)) or (with_base and plain is None):
        source = _find_base(folder, meta, base)
    vocabulary = None if only_head else Vocabulary.of(load_tokenizer(folder, trust_remote_code=trust_remote_code))
    if plain is None and (with_base or only_head):
        key = _fingerprint(source)
        plain = bases[key] = bases.get(key) or Base(
            load_lm(source, **options),  # type: ignore[arg-type]
            vocabulary or Vocabulary.of(load_tokenizer(source, trust_remote_code=trust_remote_code)),
        )
    # otherwise never the shared plain base: merging an adapter changes the model's weights in place
    lm = plain.model if only_head and plain else load_lm(folder if whole else source, **options)  # type: ignore[arg-type]
    if vocabulary is None:
        _require_tokenizer(folder, meta, plain)
    if source:  # once more: before it was loaded, a base from the hub may not have been here
        _require_base(folder, meta, source)
    adapter = None
    try:
        if only_head:
            adapter = _head_adapter(folder, lm)
        elif not whole:
            lm = merged_adapter(lm, folder, str(folder)).eval().requires_grad_(False)
        head = read_tensors(folder / "value_head.safetensors", ("weight", "bias"))
        weight, bias = head["weight"].to(lm.device), head["bias"].to(lm.device)
        if weight.shape != (1, width := lm.get_output_embeddings().in_features) or bias.shape != (1,):
            raise ValueError(f"its value head has the shape {list(weight.shape)}; its base needs [1, {width}]")
    except (LoadError, ValueError, RuntimeError, AttributeError) as error:
        raise LoadError(f"cannot load the doctor {folder}: {first_line(error)}") from error
    return LoadedDoctor(
        name or str(meta.get("name") or "doctor"),
        lm,
        weight,
        bias,
        bool(meta.get("settings", {}).get("train", {}).get("anchor", False)),
        vocabulary or plain.vocabulary,  # type: ignore[union-attr]
        plain.model if plain else None,
        meta,
        adapter,
    )


def _require_tokenizer(folder: Path, meta: Mapping[str, Any], base: "Base | None") -> None:
    """A head has no tokenizer of its own: that of its base must be the one it was trained with. Raises LoadError."""
    trained = meta.get("tokenizer", {}).get("fingerprint")
    if base is not None and trained not in (None, base.vocabulary.fingerprint):
        raise LoadError(
            f"the tokenizer of the base of the doctor {folder} has other tokens than the one it was trained with: use "
            "the base's own tokenizer"
        )


def _fingerprint(source: str) -> str:
    """The key of a model in ``bases``: its fingerprint, so that one model is loaded once whatever it is called."""
    try:
        return ModelSource.of(source).fingerprint()
    except LoadError:
        return source  # not downloaded yet


def _head_adapter(folder: Path, lm: PreTrainedModel) -> HeadAdapter:
    """The change of method "head". Raises LoadError or ValueError for one that is none."""
    held = {name: tensor.to(lm.device) for name, tensor in read_tensors(folder / HEAD, _HEAD_TENSORS).items()}
    exact = torch.promote_types(lm.dtype, torch.float32)
    with torch.inference_mode():
        return HeadAdapter.of(
            SplitLM.of(lm), lm.get_output_embeddings(), held["down.weight"].to(exact), held["up.weight"].to(exact)
        )


def _find_base(folder: Path, meta: Mapping[str, Any], given: str | Path | None) -> str:
    """The base ``given``, or the one that doctor.json names, where it still is. Raises LoadError."""
    if given is not None:
        _require_base(folder, meta, str(given))
        return str(given)
    named = str(meta["base_model"])
    try:
        places = [str((folder / named).resolve()) if named.startswith(".") else named]
        if beside := meta.get("base_beside"):
            places.append(str((folder / str(beside)).resolve()))
    except (OSError, ValueError) as error:  # a NUL, or links in a ring
        raise LoadError(f"{folder / DOCTOR}: base_model or base_beside is no path ({first_line(error)})") from error
    for place in places:
        try:
            if _is_base(meta, place) is not False:
                return place
        except LoadError as error:
            missing = error
    if "base_fingerprint" not in meta:
        raise missing
    raise LoadError(
        f"the base of the doctor {folder} is not here: expected {_base_name(meta)}; give that model as --doctor-base, "
        "or as `base` of the doctor in the profile"
    )


def _require_base(folder: Path, meta: Mapping[str, Any], source: str) -> None:
    if _is_base(meta, source) is False:
        found = ModelSource.of(source).fingerprint()[:12]
        raise LoadError(
            f"{source} (fingerprint {found}) is not the base of the doctor {folder}: expected {_base_name(meta)}"
        )


def _is_base(meta: Mapping[str, Any], source: str) -> bool | None:
    """Whether the model has the fingerprint of the base; None if that cannot be told yet. Raises LoadError."""
    where = ModelSource.of(source)
    if "base_fingerprint" not in meta:
        return None
    try:
        return where.fingerprint() == str(meta["base_fingerprint"])
    except LoadError:
        if where.is_local:
            raise
        return None  # not downloaded yet


def _base_name(meta: Mapping[str, Any]) -> str:
    return f"{meta['base_model']} (fingerprint {str(meta['base_fingerprint'])[:12]})"


def _card(base: str, meta: Mapping[str, Any]) -> str:
    """The model card, README.md."""
    rewards, metrics = meta.get("rewards", {}), meta.get("metrics", {})
    method = meta.get("settings", {}).get("train", {}).get("method")
    what = {
        "full": "All weights and a value head",
        "head": "A change of low rank to what the head reads and a value head",
    }.get(method, "A LoRA adapter and a value head")
    library = {"full": "transformers", "head": "llmdoctor"}.get(method, "peft")
    mode = ', mode="ratio"' if method == "head" else ""
    on_hub = "" if base.startswith(("/", ".", "package:")) else f"base_model: {base}\n"  # the hub knows no others
    named, base = base, Path(base).name
    return (
        f"---\nlibrary_name: {library}\n{on_hub}"
        f"tags: [llmdoctor, {method or 'lora'}]\n---\n\n"
        f"# {meta.get('name', 'doctor')}: an llmdoctor doctor\n\n"
        f"{what} on `{base}`, trained with TFPO (arXiv 2601.10416) to steer the patient "
        f"`{base if rewards.get('patient') == named else rewards.get('patient', '?')}` while it decodes.\n\n"
        f"Trained on {rewards.get('pairs', '?')} preference pairs, {metrics.get('steps', '?')} steps. Settings and "
        f"metrics: `{DOCTOR}`.\n\n"
        "```python\nfrom llmdoctor import LLMdoctor\n\n"
        f'doctor = LLMdoctor(patient_model="…", doctor_checkpoint="this folder", beta=0.8{mode})\n```\n'
    )
