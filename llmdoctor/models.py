"""Loading causal language models, and the two facts about them the rest needs: vocabulary and fingerprint."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from llmdoctor.errors import LoadError, UsageError, VocabularyError

_SMALL = 20_000_000  # parameters of a model whose decoding steps are too short for several threads


@dataclass(frozen=True, eq=False)
class Patient:
    """The frozen model that is steered, with its tokenizer. ``name`` is what it was loaded from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @cached_property
    def context(self) -> int:
        """Tokens the model can attend to; a very large number where its config states none."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends an answer: those of the generation config, and the tokenizer's."""
        listed = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = listed if isinstance(listed, list) else [listed]
        return frozenset(i for i in [*ids, self.tokenizer.eos_token_id] if i is not None)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for the same weights and config, wherever they lie (see ``model_fingerprint``)."""
        return model_fingerprint(self.name)

    @cached_property
    def vocabulary(self) -> "Vocabulary":
        """The shared token-to-id map that every doctor must have."""
        return Vocabulary.of(self.tokenizer)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """A tokenizer's token-to-id map. ``size`` is one more than the greatest id; ids in between may be unused."""

    ids: dict[str, int]
    size: int

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
        """[size] True where no token has the id; None when every id has one."""
        if len(used := set(self.ids.values())) == self.size:
            return None
        mask = torch.ones(self.size, dtype=torch.bool)
        mask[list(used)] = False
        return mask

    def mask(self, logits: Tensor, start: int = 0) -> Tensor:
        """The logits of the ids that a token has, in float32 or better. All three stages normalise over these.

        ``logits`` [..., R] are those of the ids from ``start`` on. Rows beyond the vocabulary (embeddings are often
        padded) are cut off: [..., min(R, size - start)]. An id in between that no token has gets the lowest finite
        number, not -inf, so that 0 times its log-prob stays 0.
        """
        logits = logits[..., : self.size - start]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self._unused is None:
            return logits
        unused = self._unused[start : start + logits.shape[-1]].to(logits.device)
        return logits.masked_fill(unused, torch.finfo(logits.dtype).min)

    def require_same(self, other: "Vocabulary", name: str, other_name: str) -> None:
        """Raise VocabularyError, naming both models and the first differing token, unless the maps are equal.

        The maps are compared, not the sizes of the embeddings: Qwen2.5-7B pads its to 152,064 rows and the 1.5B to
        151,936, yet their tokens agree.
        """
        if self.ids == other.ids:
            return
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
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or getattr(tokenizer, "backend_tokenizer", None) is None:
        raise LoadError(f"the tokenizer of {source} has no fast (tokenizers) form, which streaming needs")
    return tokenizer


def load_lm(
    source: str | Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A frozen causal LM from a folder or the hub, in eval mode.

    ``dtype`` "auto" is the checkpoint's own on an accelerator and float32 on a CPU, where half precision is slow.
    ``device`` "auto" takes CUDA (spread over all GPUs), then MPS, then the CPU. Raises LoadError.
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
    if missing := sorted(report["missing_keys"]):  # the library would fill them with random numbers
        raise LoadError(f"cannot load the model {source}: it lacks {len(missing)} weights, the first is {missing[0]}")
    if not spread:
        model = model.to(target)
    return cast("PreTrainedModel", model.eval().requires_grad_(False))


def load_patient(
    model: str | Path, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Patient:
    """The patient and its tokenizer. Raises LoadError."""
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    lm = load_lm(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return Patient(lm, tokenizer, str(model))


def pick_device(device: str) -> torch.device:
    """The device named, or the best there is for "auto". Raises UsageError for a name torch does not know."""
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"device {device!r} cannot be used here: {_first_line(error)}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def spare_threads(model: PreTrainedModel) -> None:
    """Leave this process one thread for a small model on a CPU, unless OMP_NUM_THREADS says how many.

    Steps of a few tokens are too short to share: threads that wait for each other then take many times as long when the
    machine has other work (benchmarks/LOG.md).
    """
    if model.device.type == "cpu" and model.num_parameters() < _SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def pick_dtype(dtype: str, device: torch.device) -> str | torch.dtype:
    """The dtype named, for ``from_pretrained``. Raises UsageError for a name that is not a floating dtype."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UsageError(f"dtype must be auto, float32, bfloat16, float16 or float64; got {dtype!r}")
    return found


def model_fingerprint(source: str | Path) -> str:
    """Sha-256 over config.json and, for every weight file, its name, size, first and last MiB.

    Reads a few MiB, not the weights: enough to tell two checkpoints apart. Raises LoadError when the model is neither a
    folder nor in the hub's cache.
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
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class SplitLM:
    """A causal LM cut before its head, so that logits can be made for a few positions at a time.

    ``hidden`` is what the LM head reads (after the last norm); ``logits(hidden)`` equals the model's own logits.
    """

    backbone: nn.Module
    logits: Callable[[Tensor], Tensor]
    tail: Callable[[Tensor], Tensor] = lambda logits: logits  # what the model does after its head, element by element

    @classmethod
    def of(cls, model: PreTrainedModel) -> "SplitLM":
        """Find the cut and prove it on a probe of three tokens. Raises LoadError where it does not fit."""
        backbone, head = model.base_model, model.get_output_embeddings()
        config = model.config.get_text_config()
        cap = getattr(config, "final_logit_softcapping", None)
        tails: list[Callable[[Tensor], Tensor]] = []
        if cap:
            tails.append(lambda x: cap * torch.tanh(x / cap))  # gemma 2
        if scale := getattr(config, "logit_scale", None):
            tails.append(lambda x: x * scale)  # cohere
        if scaling := getattr(config, "logits_scaling", None):
            tails.append(lambda x: x / scaling)  # granite
        tails.append(lambda x: x)  # last: while logits are small a capped head looks like a plain one
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

    def logits_of(self, head: nn.Linear, start: int, stop: int, hidden: Tensor) -> Tensor:
        """The logits of tokens ``start`` to ``stop`` - 1, for a ``head`` that is this model's own plain linear one."""
        bias = None if head.bias is None else head.bias[start:stop]
        return self.tail(nn.functional.linear(hidden, head.weight[start:stop], bias))

    def hidden(self, input_ids_B_L: Tensor, attention_mask_B_L: Tensor) -> Tensor:
        """What the head reads at every position [B, L, H]."""
        out = self.backbone(input_ids=input_ids_B_L, attention_mask=attention_mask_B_L, use_cache=False)
        return out.last_hidden_state  # type: ignore[no-any-return]


def token_log_probs(lm: SplitLM, hidden_M_H: Tensor, ids_M: Tensor, vocabulary: Vocabulary, chunk: int = 0) -> Tensor:
    """log pi(ids) [M] in float32 or better, over the shared vocabulary, holding at most ``chunk`` rows of logits.

    With gradients each chunk's logits are made again in the backward pass instead of being kept. ``chunk`` 0 takes as
    many rows as fit 64 MiB of float32.
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
    """A clear word about a path that does not exist, before the hub is asked for it."""
    text = str(source)
    # a folder beside it is here: a misspelt path, not a hub name, for which the hub would be asked for a long time
    looks_local = text.startswith((".", "/", "~")) or text.count("/") != 1 or Path(text).parent.is_dir()
    if not Path(text).exists() and looks_local:
        raise LoadError(f"there is no model at {text}: expected a folder with config.json, or a hub name like org/name")


def not_numbers(what: str) -> str:
    """What to say about NaN where log-probs should be."""
    return (
        f"{what} are not numbers: float16 may be too narrow, load the model as bfloat16 or float32 (dtype), or "
        "its weights are damaged"
    )


def _first_line(error: BaseException) -> str:
    """The gist of a library's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _head_then(head: nn.Module, tail: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    return tail(head(hidden))
