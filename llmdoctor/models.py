"""Causal language models: loading them, comparing their vocabularies, and the log-probs of their tokens."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from llmdoctor.errors import LoadError, UsageError, VocabularyError

_SMALL = 20_000_000  # models with fewer parameters decode fastest on one CPU thread


@dataclass(frozen=True, eq=False)
class Patient:
    """The frozen model that is steered, and its tokenizer. ``name`` is the folder or hub name it was loaded from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @cached_property
    def context(self) -> int:
        """Tokens the model can attend to; 2^30 if its config sets no limit."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """All ids that end an answer: those of the generation config, and the tokenizer's."""
        listed = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = listed if isinstance(listed, list) else [listed]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for the same weights and config, wherever they are stored (see ``model_fingerprint``)."""
        return model_fingerprint(self.name)

    @cached_property
    def vocabulary(self) -> "Vocabulary":
        """The token-to-id map, which every doctor must share."""
        return Vocabulary.of(self.tokenizer)


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
    """The tokenizer in a folder or on the hub. Raises LoadError."""
    _require_folder(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise LoadError(f"cannot load the tokenizer of {source}: {_first_line(error)}") from error
    # TextStream needs the Rust tokenizer; those written in Python only have none.
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or getattr(tokenizer, "backend_tokenizer", None) is None:
        raise LoadError(f"the tokenizer of {source} has no fast (tokenizers) form, which streaming needs")
    return tokenizer


def load_lm(
    source: str | Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A frozen causal LM from a folder or the hub, in eval mode.

    ``dtype`` "auto" is the checkpoint's own on an accelerator, and float32 on a CPU, where half precision is slow.
    ``device`` "auto" is CUDA (spread over all GPUs) if available, else MPS, else the CPU. Raises LoadError; UsageError
    for a dtype or device that does not exist here.
    """
    _require_folder(source)
    target = pick_device(device)
    weights = pick_dtype(dtype, target)
    spread = {"device_map": "auto"} if device == "auto" and torch.cuda.device_count() > 1 else {}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(source), dtype=weights, trust_remote_code=trust_remote_code, output_loading_info=True, **spread
        )
    except Exception as error:
        raise LoadError(f"cannot load the model {source}: {_first_line(error)}") from error
    model, report = loaded
    # transformers only warns about these, and initialises them at random.
    if missing := sorted(report["missing_keys"]):
        raise LoadError(f"cannot load the model {source}: it lacks {len(missing)} weights, the first is {missing[0]}")
    # A model spread over several GPUs is already in place and must not be moved.
    if not spread:
        model = model.to(target)
    return cast("PreTrainedModel", model.eval().requires_grad_(False))


def load_patient(
    model: str | Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Patient:
    """Load the patient and its tokenizer; arguments and errors as in `load_lm`."""
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    lm = load_lm(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return Patient(lm, tokenizer, str(model))


def pick_device(device: str) -> torch.device:
    """The device with this name; for "auto" the best available one. Raises UsageError if it cannot be used."""
    if device != "auto":
        # `torch.device` accepts "cuda" on a machine without a GPU; only an allocation shows that it works.
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device {device!r} cannot be used here: {_first_line(error)}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


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
        return torch.float32 if device.type == "cpu" else "auto"
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype must be auto, float32, bfloat16, float16 or float64; got {dtype!r}")
    return found


def model_fingerprint(source: str | Path) -> str:
    """Sha-256 over config.json and, for every weight file, its name, size, first MiB and last MiB.

    That is enough to tell checkpoints apart without reading all their weights. Raises LoadError if the model is neither
    a folder nor in the hub's cache.
    """
    _require_folder(source)
    try:
        config = cached_file(str(source), "config.json", local_files_only=not Path(source).is_dir())
    except OSError as error:
        raise LoadError(f"{source} is not here: expected a folder with a config.json or a downloaded model") from error
    digest = hashlib.sha256()
    folder = Path(config or source).parent
    for file in sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", ".bin"} or p.name == "config.json"):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            # max: a file shorter than 1 MiB is simply read twice.
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()


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


def token_log_probs(lm: SplitLM, hidden_M_H: Tensor, ids_M: Tensor, vocabulary: Vocabulary, chunk: int = 0) -> Tensor:
    """log pi(ids) [M] in float32 or better, over the shared vocabulary.

    At most ``chunk`` rows of logits are in memory at a time; the backward pass computes them again instead of keeping
    them. ``chunk`` 0 is as many rows as fit into 64 MiB of float32.
    """
    chunk = chunk or max(1, (1 << 24) // vocabulary.size)

    def score(hidden: Tensor, ids: Tensor) -> Tensor:
        logits = vocabulary.mask(lm.logits(hidden))
        return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(dim=1)

    pieces = []
    for hidden, ids in zip(hidden_M_H.split(chunk), ids_M.split(chunk), strict=True):
        if torch.is_grad_enabled() and len(ids_M) > chunk:
            pieces.append(torch.utils.checkpoint.checkpoint(score, hidden, ids, use_reentrant=False))
        else:
            pieces.append(score(hidden, ids))
    return torch.cat(pieces) if pieces else hidden_M_H.new_zeros(0)


def _require_folder(source: str | Path) -> None:
    """Raise LoadError for a path that does not exist. Otherwise the hub would be asked for it, with retries."""
    text = str(source)
    # "outputs/docter" looks like a hub name, but if there is a folder "outputs" it is a misspelt path.
    looks_local = text.startswith((".", "/", "~")) or text.count("/") != 1 or Path(text).parent.is_dir()
    if not Path(text).exists() and looks_local:
        raise LoadError(f"there is no model at {text}: expected a folder with config.json, or a hub name like org/name")


def not_numbers(what: str) -> str:
    """The error message for NaN in place of logits or log-probs."""
    return (
        f"{what} are not numbers: float16 may be too narrow, load the model as bfloat16 or float32 (dtype), or "
        "its weights are damaged"
    )


def _first_line(error: BaseException) -> str:
    """The first line of a library's message that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _head_then(head: nn.Module, tail: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return tail(head(hidden))
