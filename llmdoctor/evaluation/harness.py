"""The guided patient as a model of lm-evaluation-harness, to measure what guidance costs elsewhere (alignment tax).

In Python, ``lm_eval.simple_evaluate(model=GuidedLM(assistant), tasks=[...])``. The harness's own command knows no
models of other packages. This module is that command with the model "llmdoctor" added:

    python -m llmdoctor.evaluation.harness --model llmdoctor --model_args profile=clinic,beta=0.8 --tasks ...

``beta=0`` is the patient alone, to compare with. The harness comes with the extra: pip install "llmdoctor[lm-eval]".
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from llmdoctor.assistant import LLMdoctor
from llmdoctor.decoding.decode import decode
from llmdoctor.decoding.drafting import AdaptiveLength
from llmdoctor.decoding.product import product
from llmdoctor.errors import DataError, LLMDoctorError, LoadError, UsageError
from llmdoctor.evaluation.reading import Readers, Row
from llmdoctor.models import not_numbers
from llmdoctor.records import Message
from llmdoctor.settings import Sampling
from llmdoctor.text import conversation_text
from llmdoctor.training.folder import LoadedDoctor

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:  # the extra is not installed: `GuidedLM` says so when it is made
    TemplateLM = object

NEEDED = 'lm-evaluation-harness is not installed: pip install "llmdoctor[lm-eval]"'
_ROWS = 32  # prompts that are answered together
_LONGEST = 256  # tokens of an answer, where a task sets no limit: the harness's own default


class GuidedLM(TemplateLM):  # type: ignore[misc]
    """An `LLMdoctor` as lm-evaluation-harness sees a model: log-likelihoods and answers of the guided distribution.

    Give an ``assistant``, or what makes one: a ``profile``, a ``patient``, a ``doctor`` folder, and as ``settings`` any
    other keyword of `LLMdoctor`, such as ``beta``, ``alpha``, ``mode``, ``dtype``. Its guidance is read at each call.

    Log-likelihoods are those of the product at temperature 1. Mode "ratio" gives tokens below its plausibility cut the
    probability 0; one such token would make a text's likelihood 0 and its perplexity infinite. So log-likelihoods are
    those of the product without the cut. Whether a continuation is greedy is said with it, as decoding would have it.

    Contexts are taken as they are; the assistant's system prompt is not added. Scoring reads as many tokens at once as
    fit (``batch_tokens``), so the harness's batch size has no effect. Raises UsageError without the harness, and what
    `LLMdoctor` raises.
    """

    def __init__(
        self,
        assistant: LLMdoctor | None = None,
        *,
        profile: str | None = None,
        patient: str | None = None,
        doctor: str | None = None,
        batch_tokens: int | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        if TemplateLM is object:
            raise UsageError(NEEDED)
        super().__init__()
        if assistant is None:
            if device and device.startswith("cuda") and not torch.cuda.is_available():
                device = None  # the harness's command names cuda:0 where nobody named a device
            named = {"patient_model": patient, "doctor_checkpoint": doctor, "device": device}
            given = {name: value for name, value in {**named, **settings}.items() if value is not None}
            assistant = LLMdoctor.from_profile(profile, **given)
        self.assistant = assistant
        self.tokenizer = assistant.patient.tokenizer
        self._device = assistant.patient.model.device
        self._readers = Readers(assistant, batch_tokens)

    @property
    def max_length(self) -> int:
        """Tokens that all models can attend to."""
        return self._readers.context

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows: the beginning of text if there is such a token, else its end."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else int(self.tokenizer.bos_token_id)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; by default with the special tokens that the tokenizer adds, unless the text has them already."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in the patient's chat template; otherwise the last turn is left open, to be continued."""
        messages = cast("Sequence[Message]", chat_history)
        text = conversation_text(self.tokenizer, messages, answer_next=add_generation_prompt)
        if add_generation_prompt:
            return text
        said = messages[-1]["content"]
        last = said if said in text else said.strip()  # some templates trim
        before, found, _ = text.rpartition(last)
        if not found:
            raise DataError("the model's chat template drops the last turn, which is to be continued")
        return before + last

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts; one longer than the context is read in windows that each predict new tokens."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for i, (text,) in enumerate(request.args for request in requests):
            rolling = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts = [(None, *make_disjoint_window(window)) for window in rolling]
            windows += parts
            owners += [i] * len(parts)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is greedy) of every continuation; contexts lose their beginning to fit."""
        rows: list[Row] = []
        for _, context, continuation in requests:
            room = max(1, self.max_length + 1 - len(continuation))
            rows.append((context[-room:], continuation[-self.max_length :]))
        found: dict[int, tuple[float, bool]] = {}
        for batch in self._readers.batches(rows):
            logprobs_M, greedy_M = self._score([rows[i] for i in batch])
            lengths = [len(rows[i][1]) for i in batch]
            for i, logprobs_T, greedy_T in zip(batch, logprobs_M.split(lengths), greedy_M.split(lengths), strict=True):
                found[i] = (float(logprobs_T.double().sum()), bool(greedy_T.all()))
                if requests[i][0] is not None:  # a window of a rolling text has no request of its own
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return [found[i] for i in range(len(rows))]

    @torch.inference_mode()
    def _score(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """The product's log-prob of every answer token [M], and whether it is the likeliest one [M]."""
        read, ids_M = self._readers.read(rows)
        size = max(1, (1 << 24) // self.assistant.patient.vocabulary.size)  # rows of logits that are held at once
        logprobs, greedy = [ids_M.new_zeros(0, dtype=torch.float32)], [ids_M.new_zeros(0, dtype=torch.bool)]
        for start in range(0, len(ids_M), size):
            part = slice(start, start + size)
            hidden = {model: hidden_M_H[part] for model, hidden_M_H in read.items()}
            ids_C_1 = ids_M[part, None].to(self._device)
            whole_C_V, cut_C_V = self._products(hidden)
            logprobs.append(whole_C_V.gather(1, ids_C_1)[:, 0].float().cpu())
            greedy.append((cut_C_V.argmax(dim=1) == ids_C_1[:, 0]).cpu())
        logprobs_M = torch.cat(logprobs)
        if logprobs_M.isnan().any():
            raise LoadError(not_numbers("the log-probs"))
        return logprobs_M, torch.cat(greedy)

    def _products(self, hidden: Mapping[Any, Tensor]) -> tuple[Tensor, Tensor]:
        """The guided log-probs [C, V] without the plausibility cut of mode "ratio", and with it."""
        guidance, doctors = self.assistant.guidance, self.assistant.doctors
        patient_C_V = self._log_probs(hidden, self.assistant.patient.model)
        said = {name: self._log_probs(hidden, doctor.model, doctor) for name, doctor in doctors.items()}
        bases = None
        if guidance.mode == "ratio":
            bases = {name: self._log_probs(hidden, doctor.base) for name, doctor in doctors.items()}
        uncut = guidance.replace(plausibility=0.0)
        whole_C_V = product(patient_C_V, said, uncut, bases)
        return whole_C_V, whole_C_V if bases is None else product(patient_C_V, said, guidance, bases)

    def _log_probs(self, hidden: Mapping[Any, Tensor], model: Any, doctor: LoadedDoctor | None = None) -> Tensor:
        logits = self._readers.splits[model].logits(hidden[model])
        logits = logits if doctor is None else doctor.logits(logits, hidden[model])
        return self.assistant.patient.vocabulary.mask(logits.to(self._device)).log_softmax(dim=-1)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, greedy unless a task asks for sampling, up to one of its stop strings."""
        texts: list[str] = []
        for start in range(0, len(requests), _ROWS):
            asked = requests[start : start + _ROWS]
            samplings = [_sampling(request.args[1]) for request in asked]
            prompts = [
                self.tok_encode(request.args[0])[-max(1, self.max_length - sampling.max_new_tokens) :]
                for request, sampling in zip(asked, samplings, strict=True)
            ]
            parts = [""] * len(asked)
            steps = decode(
                self.assistant.patient,
                self.assistant.doctors,
                prompts,
                lambda: self.assistant.guidance,
                samplings,
                seed=0,
                drafting=AdaptiveLength() if self.assistant.speculation else None,
            )
            for step in steps:
                parts[step.row] += step.token.text
            for request, text in zip(asked, parts, strict=True):
                self.cache_hook.add_partial("generate_until", request.args, text)
            texts += parts
        return texts


def _sampling(asked: Mapping[str, Any]) -> Sampling:
    """What a task asks of an answer; it may call things as transformers does. Other keys have no effect."""
    how: dict[str, Any] = normalize_gen_kwargs(dict(asked), _LONGEST)
    drawn = {name: how[name] for name in ("top_k", "top_p", "min_p") if how.get(name) is not None}
    return Sampling(
        temperature=how.get("temperature", 1.0) if how["do_sample"] else 0.0,
        max_new_tokens=how["max_gen_toks"],
        stop=tuple(text for text in how["until"] if text),
        **(drawn if how["do_sample"] else {}),
    )


if TemplateLM is not object:
    register_model("llmdoctor")(GuidedLM)


if __name__ == "__main__":
    if TemplateLM is object:
        sys.exit(f"error: {NEEDED}")
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LLMDoctorError as error:
        sys.exit(f"error: {error}")
