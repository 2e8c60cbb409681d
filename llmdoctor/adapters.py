"""PEFT adapters: read in full or refused, and merged into their base without a change of what they say."""

import json
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftModel, PeftType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmdoctor.artefacts import AdapterConfig
from llmdoctor.errors import LLMDoctorError, LoadError
from llmdoctor.files import read_json
from llmdoctor.harmless import first_line
from llmdoctor.schema import shown
from llmdoctor.tensors import read_tensors, refuse_pickles, require_finite_weights

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SECONDS = 10.0  # in which the patterns of an adapter must have been compared with all names of modules
_PROBE = 32  # tokens
_AGAIN = "as_saved"  # the name of a saved adapter beside the one that was trained
_MOST = 1000  # layers that an adapter may replicate, and rounds of what it computes
_WIDTHS = ("r", "init_r", "num_virtual_tokens", "n_frequency", "num_vectors")
_FREE = re.compile("alpha|seed|prng|step|tinit|tfinal|deltaT|warmup|interval")  # numbers that cost nothing
_OF_OTHERS = {"SHADOW", "XLORA"}  # they read models from wherever the config says, the hub too
_PLAIN = re.compile(r"[\w.^$\\-]*")  # a pattern without repetition


def merged_adapter(base: PreTrainedModel, folder: Path, name: str) -> PreTrainedModel:
    """``base`` with the adapter of the folder merged into it. ``base`` itself is changed.

    Raises LoadError, naming them, for tensors that are missing, that the adapter has no place for, or that are not
    finite; for a pickle; for an adapter of a kind that cannot be merged without a change of its log-probs.
    """
    config: dict[str, Any] = {}
    try:
        config, held = _read_adapter(base, folder, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns of what is checked below
            adapted: Any = PeftModel.from_pretrained(base, str(folder)).eval()
            _require_all(adapted, folder, held)
            return _merged(adapted)
    except LLMDoctorError as error:
        raise LoadError(f"cannot load the adapter {name}: {error}") from error
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, AttributeError | KeyError | TypeError | RecursionError):  # which say nothing of the file
            reason = f"PEFT does not take a value in its {_CONFIG}, which sets {_listed(_set_keys(config))} ({reason})"
        raise LoadError(f"cannot load the adapter {name}: {reason}") from error


@contextmanager
def as_loaded(adapted: Any, folder: Path) -> Iterator[None]:
    """A context in which a model speaks as it will once the adapter of the folder is loaded again and merged.

    The saved tensors become a second adapter on the same base, and every layer is merged only while it runs, so that no
    second base is needed. Afterwards all is as before, bit for bit. Raises LoadError as `merged_adapter` does.
    """
    active, needs = adapted.active_adapter, {p: p.requires_grad for p in adapted.parameters()}
    _, held = _read_adapter(adapted, folder, "that was saved")
    with warnings.catch_warnings(), ExitStack() as after:
        warnings.simplefilter("ignore")
        after.callback(_restore_needs, needs)
        after.callback(adapted.set_adapter, active)
        after.callback(_forget, adapted)
        _require_all(adapted, folder, held, _AGAIN)
        adapted.set_adapter(_AGAIN)
        after.enter_context(_untied(adapted))
        users = Counter(id(weight) for _, weight in adapted.named_parameters(remove_duplicate=False))
        for layer in (module for module in adapted.modules() if isinstance(module, BaseTunerLayer)):
            if any(users[id(weight)] > 1 for weight in layer.get_base_layer().parameters()):
                after.enter_context(_merged_layer(layer))  # what shares the weight is changed too
            else:
                after.enter_context(_merged_while_it_runs(layer))
        yield


def _restore_needs(needs: dict[nn.Parameter, bool]) -> None:
    for parameter, needed in needs.items():
        parameter.requires_grad_(needed)


def _forget(adapted: Any) -> None:
    if _AGAIN in adapted.peft_config:
        adapted.delete_adapter(_AGAIN)
    for module in [*adapted.modules()]:  # what all layers share, which PEFT leaves there
        if isinstance(module, nn.ModuleDict | nn.ParameterDict) and _AGAIN in module:
            del module[_AGAIN]


@contextmanager
def _merged_layer(layer: BaseTunerLayer) -> Iterator[None]:
    """The layer with its adapter merged; PEFT's own way back is not exact."""
    inner = layer.get_base_layer()
    kept = [(name, weight, weight.data, weight.data.clone()) for name, weight in inner.named_parameters()]
    layer.merge()
    try:
        yield
    finally:
        layer.unmerge()
        for name, weight, data, before in kept:
            weight.data = data.copy_(before)
            module, _, attribute = name.rpartition(".")
            setattr(inner.get_submodule(module), attribute, weight)


@contextmanager
def _merged_while_it_runs(layer: Any) -> Iterator[None]:
    running = ExitStack()
    hooks = [
        layer.register_forward_pre_hook(lambda *_: running.enter_context(_merged_layer(layer))),
        layer.register_forward_hook(lambda *_: running.close(), always_call=True),
    ]
    try:
        yield
    finally:
        running.close()
        for hook in hooks:
            hook.remove()


def _read_adapter(base: nn.Module, folder: Path, name: str) -> tuple[dict[str, Any], set[str]]:
    """An adapter's config, and the names of its tensors, which are safe to load onto ``base``. Raises LoadError."""
    config = read_json(folder / _CONFIG, AdapterConfig)
    _require_types(config)
    _require_mergeable(config)
    refuse_pickles(folder, name)
    held = read_tensors(folder / _WEIGHTS)
    _require_small(config, held)
    _require_quick(config, [key for key, _ in base.named_modules()])
    return config, set(held)


def _set_keys(config: dict[str, Any]) -> list[str]:
    """The keys whose meaning is PEFT's alone, or that are null, and which are not as it sets them."""
    told = {*AdapterConfig.model_fields, "inference_mode"}
    usual = {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(_kind(config))
    }
    return [key for key, value in config.items() if (key not in told or value is None) and value != usual.get(key)]


def _require_types(config: dict[str, Any]) -> None:
    """Raise LoadError for a value that is not what PEFT states for its key. AdapterConfig knows some keys better."""
    stated = config.get("peft_type", "LORA")
    if stated not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise LoadError(f"{_CONFIG} states peft_type {shown(stated)}, which this version of PEFT does not know")
    kind = _kind(config)
    types = get_type_hints(kind)
    for field in fields(kind):
        key, value = field.name, config.get(field.name, field.default)
        if (key in AdapterConfig.model_fields and value is not None) or value == field.default:
            continue
        try:
            TypeAdapter(types[key]).validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            # PEFT reads more words than it states, and says what is wrong with others
            if isinstance(value, str) and any(found["type"] == "literal_error" for found in error.errors()):
                continue
            expected = re.sub(r"\b(\w+\.)+|<class '|'>", "", str(types[key]))
            raise LoadError(f"{_CONFIG}: {key!r} expected {expected[:200]}, got {shown(value)}") from error


def _kind(config: dict[str, Any]) -> Any:
    return PEFT_TYPE_TO_CONFIG_MAPPING[config.get("peft_type", "LORA")]


def _require_mergeable(config: dict[str, Any]) -> None:
    """Raise LoadError for a kind that cannot be merged, or that reads other models which its config names."""
    kind = config.get("peft_type", "LORA")
    if kind in _OF_OTHERS or not hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(kind), "merge_and_unload"):
        raise LoadError(f"PEFT's {kind} cannot be merged into a base model")


def _require_small(config: dict[str, Any], held: dict[str, Tensor]) -> None:
    """Memory and time are taken for the numbers that the config states, before the tensors are compared with it."""
    widest = max((size for tensor in held.values() for size in tensor.shape), default=0)
    named = {key: config.get(key) for key in _WIDTHS}
    named |= {f"rank_pattern of {key[:40]}": rank for key, rank in (config.get("rank_pattern") or {}).items()}
    for key, rank in named.items():
        size = len(rank) if isinstance(rank, list) else rank
        if isinstance(size, int) and size > widest:
            raise LoadError(f"{_CONFIG} states {key} {shown(size)}, but no tensor is wider than {widest}")
    for key, value in ((field.name, config.get(field.name)) for field in fields(_kind(config))):
        most = len(held) if key.endswith("depth") else max(widest, _MOST)
        if type(value) is int and value > most and not _FREE.search(key):
            raise LoadError(f"{_CONFIG} states {key} {shown(value)}: expected at most {most}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and (rounds := re.fullmatch(r"pissa_niter_(\d+)", start)) and len(rounds[1]) > 3:
        raise LoadError(f"{_CONFIG} states init_lora_weights {start[:40]!r}: expected at most 999 rounds")
    if copies := config.get("layer_replication"):
        layers = sum(max(0, end - begin) for begin, end in copies)
        if len(copies) > _MOST or layers > _MOST:
            raise LoadError(f"{_CONFIG} states layer_replication of {layers} layers: expected at most {_MOST}")


def _require_quick(config: dict[str, Any], names: list[str]) -> None:
    """Raise LoadError for a regular expression that does not compile, or that runs away on the names of the modules.

    Python's cannot be stopped from inside, so they are tried in another process.
    """
    patterns: list[str] = []
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(key)
        patterns += [value] if isinstance(value, str) else value or []
    patterns += [*(config.get("rank_pattern") or ()), *(config.get("alpha_pattern") or ())]
    suspects = [pattern for pattern in patterns if not _PLAIN.fullmatch(pattern)]
    for pattern in suspects:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise LoadError(f"{_CONFIG}: {pattern[:60]!r} is not a regular expression ({error})") from error
    if not suspects:
        return
    program = (
        "import re, sys, json\n"
        "patterns, names = json.load(sys.stdin)\n"
        "for p in patterns:\n"
        "    for n in names: re.fullmatch(p, n); re.match(rf'(.*\\.)?({p})$', n)"
    )
    try:
        text = json.dumps([suspects, names]).encode()
        command = [sys.executable, "-I", "-c", program]
        subprocess.run(command, input=text, timeout=_SECONDS, capture_output=True, check=False)
    except subprocess.TimeoutExpired as error:
        raise LoadError(
            f"{_CONFIG}: a regular expression runs away on the names of the modules: {suspects[0][:60]!r}"
        ) from error


def _require_all(adapted: Any, folder: Path, held: set[str], adapter: str = "default") -> None:
    # of "default" once more: the first time it does not say what it found
    if (loaded := adapted.peft_config.get(adapter)) is not None and loaded.peft_type == PeftType.ADALORA:
        loaded.rank_pattern = None  # its layers have the rank that is left
    report = adapted.load_adapter(str(folder), adapter)
    expected = get_peft_model_state_dict(adapted, adapter_name=adapter, save_embedding_layers=False).keys()
    prefix = getattr(adapted.base_model, "prefix", "") or "\0"
    # PEFT knows its own names, old ones too, but counts no whole modules
    weights = dict(adapted.named_parameters(remove_duplicate=False))
    shared = {weight.data_ptr() for key, weight in weights.items() if key not in report.missing_keys}
    # a weight that several modules share is in the file once
    unread = [key for key in report.missing_keys if key not in weights or weights[key].data_ptr() not in shared]
    missing = [key.replace(f".{adapter}", "") for key in unread] + [
        k for k in expected if k not in held and prefix not in k
    ]
    for what, names in (("lacks", missing), ("has no place for", report.unexpected_keys)):
        if names:
            raise LoadError(f"{folder / _WEIGHTS} does not fit its config: it {what} {_listed(names)}")


def _listed(names: Iterable[str]) -> str:
    every = sorted(names)
    return ", ".join(name[:120] for name in every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")


@torch.no_grad()
def _merged(adapted: Any) -> PreTrainedModel:
    probe = probe_ids(adapted.config.get_text_config().vocab_size).to(adapted.device)
    own = log_probs(adapted, probe)
    with adapted.disable_adapter():
        base = log_probs(adapted, probe)
    _untie(adapted)
    merged = cast("PreTrainedModel", adapted.merge_and_unload())
    require_finite_weights(merged, "the merged model (is lora_alpha far too great?)")
    if not alike(log_probs(merged, probe), own, base, merged.dtype):
        raise LoadError("merged into its base it has other log-probs than before: train another kind of adapter")
    return merged


def probe_ids(size: int) -> Tensor:
    """Tokens [1, 32] on which two models are compared, from all over a vocabulary of ``size``.

    The first ids are special tokens, behind which a real model in bfloat16 is a nat off by rounding alone.
    """
    return torch.randint(size, (1, _PROBE), generator=torch.Generator().manual_seed(0))


def log_probs(model: nn.Module, ids_B_L: Tensor) -> Tensor:
    """Log-probs of every token behind every prefix [B, L, V], float32."""
    logits: Tensor = model(input_ids=ids_B_L, use_cache=False).logits
    return logits.float().log_softmax(-1)


def alike(one: Tensor, other: Tensor, base: Tensor, dtype: torch.dtype) -> bool:
    """Whether two models' log-probs are equal but for rounding in ``dtype``, beside how far ``other`` is from its base.

    The mean difference may be 0.001 in float32 and 0.2 in half precision (SmolLM2 in bfloat16: 0.07 to 0.09), and a
    tenth of the change.
    """
    rounding = 1e-3 if torch.finfo(dtype).eps < 1e-5 else 0.2
    return bool((one - other).abs().mean() <= rounding + 0.1 * (other - base).abs().mean())


def _untie(adapted: Any) -> None:
    """Give the head weights of its own, where one of head and embedding is adapted and the weights are the same.

    Merged into shared weights, a change of the head would change the embedding too.
    """
    if head := _tied_head(adapted):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        adapted.get_base_model().config.tie_word_embeddings = False


@contextmanager
def _untied(adapted: Any) -> Iterator[None]:
    """As `_untie`, for a while."""
    head, config = _tied_head(adapted), adapted.get_base_model().config
    weight, tied = getattr(head, "weight", None), config.tie_word_embeddings
    _untie(adapted)
    try:
        yield
    finally:
        if head is not None:
            head.weight, config.tie_word_embeddings = weight, tied


def _tied_head(adapted: Any) -> Any:
    model = adapted.get_base_model()
    pair = model.get_input_embeddings(), model.get_output_embeddings()
    if not any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in pair):
        return None
    inner, head = (_innermost(module) for module in pair)
    return head if inner is not None and head is not None and inner.weight is head.weight else None


def _innermost(module: Any) -> Any:
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    return module
