"""Causal language models: loading them, comparing their vocabularies, and the log-probs of their tokens."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from llmdoctor.adapters import merged_adapter
from llmdoctor.errors import LLMDoctorError, LoadError, UsageError, VocabularyError
from llmdoctor.gguf_file import cached_copy, discard_if_damaged, read_header
from llmdoctor.harmless import first_line
from llmdoctor.model_source import ModelSource, model_fingerprint
from llmdoctor.schema import shown
from llmdoctor.tensors import require_finite_weights

__all__ = [
    "Patient",
    "SplitLM",
    "Vocabulary",
    "by_chunks",
    "context_of",
    "from_pretrained",
    "load_lm",
    "load_patient",
    "load_tokenizer",
    "model_fingerprint",
    "not_numbers",
    "pick_device",
    "pick_dtype",
    "require_embedded",
    "share_weights",
    "shared_by_processes",
    "spare_threads",
    "token_log_probs",
]

_SMALL = 20_000_000  # models with fewer parameters decode fastest on one CPU thread, and in float32
_COPIED_EXACTLY = 1_000_000_000  # parameters up to which the copy of a GGUF is in float32; beyond, in bfloat16
# what loads the checkpoints of a method of quantisation, where the package has another name or is not the only one
_LOADED_BY = {"awq": "gptqmodel", "gptq": "gptqmodel optimum", "quanto": "optimum-quanto"}


@dataclass(frozen=True, eq=False)
class Patient:
    """The frozen model that is steered, and its tokenizer. ``name`` is what the user wrote to name it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @cached_property
    def context(self) -> int:
        """See `context_of`."""
        return context_of(self.model)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """All ids that end an answer: those of the generation config, and the tokenizer's."""
        listed = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = [
            i
            for i in [*(listed if isinstance(listed, list) else [listed]), self.tokenizer.eos_token_id]
            if i is not None
        ]
        if not all(isinstance(i, int) for i in ids):
            raise LoadError(
                f"the generation config of {self.name} states eos_token_id {shown(listed)}, expected numbers"
            )
        return frozenset(ids)

    def require_embedded(self, ids: Iterable[int]) -> None:
        """Raise LoadError for a token that the tokenizer has and the model has not, naming it."""
        require_embedded(self.model, self.tokenizer, ids, f"the patient {self.name}")

    @cached_property
    def token_names(self) -> dict[int, str]:
        """The special tokens, by id, as the tokenizer writes them; those in ``eos_ids`` say that they end an answer."""
        added = self.tokenizer.added_tokens_decoder
        names = {i: str(token) for i, token in added.items() if token.special}
        ends = {i: f"end of answer {self.tokenizer.convert_ids_to_tokens(i)}" for i in self.eos_ids}
        return names | ends

    @cached_property
    def fingerprint(self) -> str:
        """Equal for the same weights and config, wherever they are stored (see ``ModelSource.fingerprint``)."""
        return model_fingerprint(self.name)

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """How the checkpoint is quantised; None if it is not (see ``ModelSource.quantization``)."""
        return ModelSource.of(self.name).quantization()

    @cached_property
    def vocabulary(self) -> "Vocabulary":
        """The token-to-id map, which every doctor must share."""
        return Vocabulary.of(self.tokenizer)


def require_embedded(model: PreTrainedModel, tokenizer: Any, ids: Iterable[int], name: str) -> None:
    """Raise LoadError for a token without a row in the model's embedding.

    Some tokenizers have more tokens than their model: one that was added for pictures, or by hand without a resize.
    """
    rows = cast("Tensor", model.get_input_embeddings().weight).shape[0]
    if (greatest := max(ids, default=0)) >= rows:
        token = tokenizer.convert_ids_to_tokens(greatest)
        raise LoadError(
            f"{name} has no embedding for token {greatest}, {shown(token)}: expected ids below {rows}. Take it out of "
            "the text, or resize the model's embedding"
        )


def context_of(model: PreTrainedModel) -> int:
    """Tokens the model can attend to; 2^30 if its config sets no limit."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer's token-to-id map. ``size`` is the greatest id plus one; some ids below it may be unused."""

    ids: dict[str, int]
    size: int
    _unused_on: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Vocabulary":
        """The map of one tokenizer, added tokens included."""
        ids = tokenizer.get_vocab()
        return cls(ids, max(ids.values()) + 1)

    @cached_property
    def fingerprint(self) -> str:
        """Sha-256 of the map."""
        return hashlib.sha256(json.dumps(sorted(self.ids.items())).encode()).hexdigest()

    @cached_property
    def spaceless(self) -> list[int]:
        """[size] The id of each token's text without a space before it; its own where no token has that text."""
        found = list(range(self.size))
        for token, i in self.ids.items():
            found[i] = self.ids.get(token.lstrip("Ġ▁"), i)  # what stands for a space in byte-level BPE and in Llama's
        return found

    @cached_property
    def spaced(self) -> dict[int, set[int]]:
        """The ids that `spaceless` maps to an id."""
        found: dict[int, set[int]] = {}
        for i, word in enumerate(self.spaceless):
            found.setdefault(word, set()).add(i)
        return found

    @cached_property
    def _unused(self) -> Tensor | None:
        """[size] True for the ids that no token uses; None if there are none."""
        if len(used := set(self.ids.values())) == self.size:
            return None
        mask = torch.ones(self.size, dtype=torch.bool)
        mask[list(used)] = False
        return mask

    def mask(self, logits: Tensor, start: int = 0) -> Tensor:
        """Logits over the ids in use, in float32 or better. All three stages normalise over these.

        ``logits`` [..., V] are those of the ids from ``start`` on. Ids beyond the vocabulary are cut off:
        [..., min(V, size - start)]. An unused id below ``size`` gets the lowest finite number instead of -inf, so that
        0 times its log-prob is 0 and not NaN.
        """
        # Embeddings are often padded to a round number of rows, and the padding has logits too.
        logits = logits[..., : self.size - start]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._unused is None:
            return logits
        if logits.device not in self._unused_on:  # copied once per device: this runs for every token
            self._unused_on[logits.device] = self._unused.to(logits.device)
        unused = self._unused_on[logits.device][start : start + logits.shape[-1]]
        return logits.masked_fill(unused, torch.finfo(logits.dtype).min)

    def require_same(self, other: "Vocabulary", name: str, other_name: str) -> None:
        """Raise VocabularyError, naming both models and the first token that differs, unless the maps are equal.

        The maps are compared, not the sizes of the embeddings: Qwen2.5-7B pads them to 152,064 rows and Qwen2.5-1.5B
        to 151,936, yet their tokens are the same.
        """
        if self.ids == other.ids:
            return
        # By id, then by token: the message does not depend on the order of a set.
        difference = set(self.ids.items()) ^ set(other.ids.items())
        token, _ = min(difference, key=lambda item: (item[1], item[0]))
        raise VocabularyError(
            f"{other_name} has another tokenizer than {name}: the first differing token is {token!r}, "
            f"id {self.ids.get(token, 'none')} in {name} and {other.ids.get(token, 'none')} in {other_name}. "
            "Patient and doctor must share one token-to-id map: take a doctor of the patient's family"
        )


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, wherever it is (see `ModelSource.of`). Raises LoadError."""
    where = ModelSource.of(source)
    where.require_reach()
    if not where.gguf and not where.file("tokenizer_config.json") and where.base:  # an adapter without one of its own
        return load_tokenizer(where.base.name, trust_remote_code=trust_remote_code)
    tokenizer = _loaded(where, AutoTokenizer, "the tokenizer of", trust_remote_code=trust_remote_code)
    # TextStream needs the Rust tokenizer; those written in Python only have none.
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or getattr(tokenizer, "backend_tokenizer", None) is None:
        raise LoadError(f"the tokenizer of {source} has no fast (tokenizers) form, which streaming needs")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise LoadError(
            f"the tokenizer of {source} states model_max_length {shown(tokenizer.model_max_length)}, expected a number"
        )
    return tokenizer


def load_lm(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    tp_plan: str | None = None,
) -> PreTrainedModel:
    """A frozen causal LM, in eval mode, wherever it is (see `ModelSource.of`). An adapter is merged into its base.

    ``dtype`` "auto" is the checkpoint's own on an accelerator. On a CPU it is float32, or bfloat16 if the CPU has
    instructions for it and the model more than 20 million parameters. ``device`` "auto" is CUDA (spread over all GPUs)
    if available, else MPS, else the CPU. ``attn_implementation``, ``device_map`` and ``tp_plan`` are those of
    transformers; with ``tp_plan`` the processes of `torchrun` hold a part of every weight each. At most one of
    ``device``, ``device_map`` and ``tp_plan`` may be given.

    Raises LoadError; UsageError for a dtype or device that does not exist here, and a ``tp_plan`` without `torchrun`.
    """
    where = ModelSource.of(source)
    where.require_reach()
    placed = _placement(device, device_map, tp_plan)
    if attn_implementation:
        placed["attn_implementation"] = attn_implementation
    target = pick_device(device if device_map is None else _device_of(device_map))
    weights = pick_dtype(dtype, target)
    guessed = dtype == "auto" and weights == torch.bfloat16
    if guessed and 0 < (where.parameters() or 0) <= _SMALL:
        weights = torch.float32
    model = _load_lm(where, weights, trust_remote_code, placed)
    if guessed and weights == torch.bfloat16 and model.num_parameters() <= _SMALL:  # what the files do not tell
        model = _load_lm(where, torch.float32, trust_remote_code, placed)
    if tp_plan is not None:
        _require_shares(where, model)
    return cast("PreTrainedModel", model.eval().requires_grad_(False))


def _load_lm(
    where: ModelSource, dtype: str | torch.dtype, trust_remote_code: bool, placed: dict[str, Any]
) -> PreTrainedModel:
    if where.base:
        base = _load_lm(where.base, dtype, trust_remote_code, placed)
        return merged_adapter(base, where.folder(), where.name)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code, **placed}
    return cast("PreTrainedModel", load_checked(where, AutoModelForCausalLM, "the model", **options))


def load_checked(where: ModelSource, kind: Any, what: str, **options: Any) -> Any:
    """A model of transformers' class ``kind``, whole, finite and never from a pickle. Raises LoadError.

    ``what`` the model is called in messages; ``options`` are those of ``from_pretrained``.
    """
    where.require_plausible()
    if not options.get("trust_remote_code"):
        where.require_own_code()
    safe = {} if where.gguf else {"use_safetensors": True}
    model, report = _loaded(where, kind, what, output_loading_info=True, **safe, **options)
    require_finite_weights(model, f"{what} {where.name}")
    # transformers only warns about these, and initialises them at random.
    if missing := sorted(report["missing_keys"]):
        raise LoadError(f"cannot load {what} {where.name}: it lacks {len(missing)} weights, the first is {missing[0]}")
    return model


def _loaded(where: ModelSource, kind: Any, what: str, **options: Any) -> Any:
    """``kind.from_pretrained``; a GGUF from its copy if one can be kept. Raises LoadError."""
    if where.gguf is None:
        return from_pretrained(where, kind, what, where.place, **options)
    read_header(where.gguf_path())  # says what is wrong with the file
    for _ in range(2):
        copy = cached_copy(where.gguf_path(), where.fingerprint(), partial(_convert, where))
        if copy is None:
            break
        try:
            return from_pretrained(where, kind, what, str(copy), **options)
        except LoadError:  # damaged in a way that sizes and times do not show, or it cannot be loaded as asked
            if not discard_if_damaged(copy):
                raise
    return _from_gguf(where, kind, what, **options)


def _convert(where: ModelSource, folder: Path) -> None:
    """Write a GGUF's tokenizer and weights to ``folder``, as transformers reads them."""
    exact = read_header(where.gguf_path()).parameters <= _COPIED_EXACTLY
    _from_gguf(where, AutoTokenizer, "the tokenizer of").save_pretrained(folder)
    dtype = torch.float32 if exact else torch.bfloat16
    _from_gguf(where, AutoModelForCausalLM, "the model", dtype=dtype).save_pretrained(folder)


def _from_gguf(where: ModelSource, kind: Any, what: str, **options: Any) -> Any:
    """What transformers reads from a GGUF, without what it adds."""
    path = where.gguf_path()
    loaded = from_pretrained(where, kind, what, str(path.parent), gguf_file=path.name, **options)
    if kind is AutoTokenizer:
        # The class that it takes has an unknown token of its own: with that in the map no doctor's tokenizer would fit.
        state = json.loads(loaded.backend_tokenizer.to_str())
        known = [token for token in state["added_tokens"] if token["id"] < read_header(path).tokens]
        if len(known) < len(state["added_tokens"]):
            loaded._tokenizer = Tokenizer.from_str(json.dumps({**state, "added_tokens": known}))
        return loaded
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    # its weights are no longer quantised: else it could not be saved
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return loaded


def from_pretrained(where: ModelSource, kind: Any, what: str, place: str, **options: Any) -> Any:
    """``kind.from_pretrained(place)``; ``what`` the model is called in the message. Raises LoadError."""
    try:
        with _without_bars():
            return kind.from_pretrained(place, **options)
    except LLMDoctorError:
        raise
    except ImportError as error:
        if how := where.quantization():
            method = how["method"]
            package = _LOADED_BY.get(method, method)
            raise LoadError(
                f"cannot load {what} {where.name}: it is quantised by {method}, whose package is not installed or "
                f"too old: pip install {package} ({first_line(error)})"
            ) from error
        raise LoadError(f"cannot load {what} {where.name}: {first_line(error)}") from error
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, AttributeError | TypeError):  # which name no key, and mostly no file
            reason = f"a value in one of its JSON files is not what transformers expects ({reason})"
        raise LoadError(f"cannot load {what} {where.name}: {reason}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """No loading bars on stderr, unless LLMDOCTOR_BARS asks for them."""
    if os.environ.get("LLMDOCTOR_BARS"):
        yield
        return
    gguf: Any = modeling_gguf_pytorch_utils
    shown, bar = transformers_logging.is_progress_bar_enabled(), gguf.tqdm
    # transformers draws this one without asking its own switch
    gguf.tqdm = partial(bar, disable=True)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        gguf.tqdm = bar
        if shown:
            transformers_logging.enable_progress_bar()


def _placement(device: str, device_map: str | Mapping[str, str | int] | None, tp_plan: str | None) -> dict[str, Any]:
    """Where transformers puts the weights. Nothing is moved afterwards: quantised or spread weights must not be."""
    if (device != "auto") + (device_map is not None) + (tp_plan is not None) > 1:
        raise UsageError("device, device_map and tp_plan each say where the weights go: give one of them")
    if tp_plan is not None:
        if "RANK" not in os.environ:
            raise UsageError("tp_plan needs several processes: torchrun --nproc-per-node N -m llmdoctor ...")
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan=tp_plan)}  # type: ignore[arg-type]
    if device_map is not None:
        return {"device_map": device_map if isinstance(device_map, str) else dict(device_map)}
    # one of several processes takes one GPU
    if device == "auto" and torch.cuda.device_count() > 1 and "RANK" not in os.environ:
        return {"device_map": "auto"}
    return {"device_map": {"": pick_device(device)}}


def _require_shares(where: ModelSource, model: PreTrainedModel) -> None:
    """Raise LoadError if the processes cannot have equal shares of the attention, which transformers does not check."""
    config, processes = model.config.get_text_config(), torch.distributed.get_world_size()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if heads % processes:
        raise LoadError(
            f"cannot split the model {where.name} over {processes} processes: expected a number that divides its "
            f"{heads} key-value heads"
        )


def _device_of(device_map: str | Mapping[str, str | int]) -> str:
    """A device that the map puts weights on, which decides their dtype."""
    if isinstance(device_map, str):
        return "auto" if device_map in {"auto", "balanced", "balanced_low_0", "sequential"} else device_map
    places = {f"cuda:{place}" if isinstance(place, int) else place for place in device_map.values()}
    return min(places - {"cpu", "disk"}, default="cpu")


def shared_by_processes(model: nn.Module) -> bool:
    """Whether the processes of `torchrun` hold a part of every weight each (``tp_plan``)."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def load_patient(model: str | Path, *, trust_remote_code: bool = False, **how: Any) -> Patient:
    """Load the patient and its tokenizer; arguments and errors as in `load_lm`."""
    ModelSource.of(model).require_config()
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    lm = load_lm(model, trust_remote_code=trust_remote_code, **how)
    return Patient(lm, tokenizer, str(model))


def pick_device(device: str) -> torch.device:
    """The device with this name; for "auto" the best available one. Raises UsageError if it cannot be used."""
    if device != "auto":
        # `torch.device` accepts "cuda" on a machine without a GPU; only an allocation shows that it works.
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device {device!r} cannot be used here: {first_line(error)}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 by instructions of its own: without them it is slower than float32."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def spare_threads(model: PreTrainedModel) -> None:
    """Limit torch to one thread if the model is small and on a CPU, unless OMP_NUM_THREADS is set.

    A step of a few tokens is too short to split: on a busy machine the threads' waiting for each other makes it many
    times slower (benchmarks/LOG.md).
    """
    if model.device.type == "cpu" and model.num_parameters() < _SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def pick_dtype(dtype: str, device: torch.device) -> str | torch.dtype:
    """The dtype to pass to ``from_pretrained``. Raises UsageError for a name that is not a floating-point dtype."""
    if dtype == "auto":
        if device.type != "cpu":
            return "auto"
        return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype must be auto, float32, bfloat16, float16 or float64; got {dtype!r}")
    return found


@dataclass(frozen=True, eq=False)
class SplitLM:
    """A causal LM split before its head, so that logits can be computed for a few positions at a time.

    ``hidden`` is the input of the LM head, after the last norm; ``logits(hidden)`` equals the model's own logits.
    """

    backbone: nn.Module
    logits: Callable[[Tensor], Tensor]
    tail: Callable[[Tensor], Tensor] = lambda logits: (
        logits
    )  # elementwise function that the model applies after its head

    @classmethod
    def of(cls, model: PreTrainedModel) -> "SplitLM":
        """Split a model, and check on three tokens that the parts give its logits. Raises LoadError if they do not."""
        backbone, head = model.base_model, model.get_output_embeddings()
        config = model.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)
        # A config may have one of these keys although the model does not use it, so each is tried on the probe.
        tails: list[Callable[[Tensor], Tensor]] = []
        if cap:
            tails.append(lambda x: cap * torch.tanh(x / cap))  # gemma 2
        if scale := getattr(config, "logit_scale", None):
            tails.append(lambda x: x * scale)  # cohere
        if scaling := getattr(config, "logits_scaling", None):
            tails.append(lambda x: x / scaling)  # granite
        # The identity comes last: x and cap * tanh(x / cap) agree for small x, so it could pass for a capped head.
        tails.append(lambda x: x)
        probe = torch.arange(3, device=model.device)[None] % config.vocab_size
        with torch.inference_mode():
            expected = model(input_ids=probe, use_cache=False).logits.float()
            if expected.isnan().any():
                raise LoadError(not_numbers(f"the logits of {type(model).__name__}"))
            hidden = backbone(input_ids=probe, use_cache=False).last_hidden_state
            for tail in tails:
                if head is not None and torch.allclose(tail(head(hidden)).float(), expected, rtol=1e-3, atol=1e-3):
                    return cls(backbone, partial(_head_then, head, tail), tail)
        name = type(model).__name__
        raise LoadError(f"{name} does something after its LM head that llmdoctor does not know; please report it")

    @property
    def tail_scale(self) -> float | None:
        """What a linear tail multiplies by; None for one that is not linear (gemma 2's soft cap)."""
        one, two = self.tail(torch.tensor([1.0, 2.0], dtype=torch.float64)).tolist()
        return float(one) if abs(two - 2 * one) < 1e-9 else None

    def logits_of(self, head: nn.Linear, start: int, stop: int, hidden: Tensor) -> Tensor:
        """Logits of the ids ``start`` to ``stop`` - 1; ``head`` must be the model's own head, a plain linear layer."""
        bias = None if head.bias is None else head.bias[start:stop]
        return self.tail(nn.functional.linear(hidden, head.weight[start:stop], bias))

    def hidden(self, input_ids_B_L: Tensor, attention_mask_B_L: Tensor) -> Tensor:
        """The input of the head at every position [B, L, H]."""
        out = self.backbone(input_ids=input_ids_B_L, attention_mask=attention_mask_B_L, use_cache=False)
        return out.last_hidden_state  # type: ignore[no-any-return]


def token_log_probs(
    lm: SplitLM,
    hidden_M_H: Tensor,
    ids_M: Tensor,
    vocabulary: Vocabulary,
    chunk: int = 0,
    change: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """log pi(ids) [M] in float32 or better, over the shared vocabulary; ``change`` makes logits of logits and hidden.

    At most ``chunk`` rows of logits are in memory at a time; the backward pass computes them again instead of keeping
    them. ``chunk`` 0 is as many rows as fit into 64 MiB of float32.
    """

    def score(hidden: Tensor, ids: Tensor) -> Tensor:
        logits = lm.logits(hidden)
        logits = vocabulary.mask(logits if change is None else change(logits, hidden))
        return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(dim=1)

    return by_chunks(score, chunk or max(1, (1 << 24) // vocabulary.size), hidden_M_H, ids_M)


def by_chunks(score: Callable[[Tensor, Tensor], Tensor], chunk: int, one_M: Tensor, other_M: Tensor) -> Tensor:
    """``score`` [M] of ``chunk`` rows at a time; the backward pass computes its inner results again."""
    pieces = []
    for one, other in zip(one_M.split(chunk), other_M.split(chunk), strict=True):
        if torch.is_grad_enabled() and len(one_M) > chunk:
            pieces.append(torch.utils.checkpoint.checkpoint(score, one, other, use_reentrant=False))
        else:
            pieces.append(score(one, other))
    return torch.cat(pieces) if pieces else one_M.new_zeros(0)


def share_weights(owner: PreTrainedModel, model: PreTrainedModel) -> None:
    """Let ``model`` use the weights of ``owner`` that are its own too, by name and value, so that memory has them once.

    For frozen models: a base that `llmdoctor.training.shrink` made has its patient's embeddings and head.
    """
    theirs = dict(owner.named_parameters())
    for name, own in model.named_parameters():
        other = theirs.get(name)
        if other is None or type(other) is not nn.Parameter or type(own) is not nn.Parameter:
            continue  # quantised, or spread over processes
        alike = (own.shape, own.dtype, own.device) == (other.shape, other.dtype, other.device)
        # most weights differ in their first numbers already; those of a meta device have none
        if not alike or own.is_meta or not torch.equal(own.reshape(-1)[:64], other.reshape(-1)[:64]):
            continue
        if torch.equal(own, other):
            own.data = other.data


def not_numbers(what: str) -> str:
    """The error message for NaN in place of logits or log-probs."""
    return (
        f"{what} are not numbers: float16 may be too narrow, load the model as bfloat16 or float32 (dtype), or "
        "its weights are damaged"
    )


def _head_then(head: nn.Module, tail: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return tail(head(hidden))
