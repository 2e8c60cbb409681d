"""A small model out of the patient's own first layers, for patients that have no small sibling.

It keeps the patient's embeddings, final norm and head. Cut off in the middle, the layers make no sense of their own;
they are healed by distillation: on the patient's own answers, the KL divergence from the patient's next token to the
small model's, in nats per token, is minimised. The result is a model like any other: a base for doctors, and a draft
model. It has the patient's embeddings and head as they are, so beside the patient it shares them in memory.
"""

import copy
import hashlib
import json
import random
import shutil
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from llmdoctor import __version__
from llmdoctor.decoding.caches import open_cache
from llmdoctor.decoding.caches.dynamic import DynamicKV
from llmdoctor.decoding.decode import decode
from llmdoctor.decoding.rows import patient_alone
from llmdoctor.errors import DataError, LLMDoctorWarning, UsageError
from llmdoctor.files import (
    atomic_path,
    ensure_replaceable,
    locked,
    open_to_append,
    present,
    require_regular,
    storage_errors,
    write_json,
)
from llmdoctor.harmless import clean, first_line
from llmdoctor.models import Patient, SplitLM, Vocabulary, by_chunks
from llmdoctor.records import Message
from llmdoctor.settings import Sampling, ShrinkSettings
from llmdoctor.text import conversation, prompt_ids
from llmdoctor.training.batches import pad_rows
from llmdoctor.training.checkpoints import finished, require_no_other, run_key
from llmdoctor.training.doctor import states
from llmdoctor.training.progress import Distance, Progress
from llmdoctor.training.shrunk import MARKER
from llmdoctor.training.trainer import KEPT_NUMBERS, ResumableTrainer

_ROWS = 32  # answers that are drawn together
_MEASURED = 64  # held-out answers of the report


@dataclass
class Spoken:
    """An answer of the patient: token ids of prompt and response [T], and the states that its head reads [T, H]."""

    prompt: list[int]
    response: list[int]
    states: Tensor | None = None


def shrink(
    patient: Patient,
    prompts: Sequence[str | Sequence[Message]],
    output: Path,
    settings: ShrinkSettings,
    *,
    device: str = "auto",
    fresh: bool = False,
    on_answer: Callable[[int, int], None] | None = None,
    on_step: Callable[[int, int, float, float], None] | None = None,
) -> dict[str, Any]:
    """Make a small model of the patient's first layers and write it to the folder ``output``.

    The patient answers ``prompts`` at temperature 1; ``on_answer`` gets how many answers there are and will be, then
    ``on_step`` the step, the last step, the KL and the tokens per second. A model in bfloat16 or float16 is trained in
    float32 beside the patient and saved in the patient's precision. Returns the content of shrunk.json: where the model
    comes from, the settings, and a report on held-out prompts: KL in nats per token, before and after, the share of
    drafted tokens that would stand at beta 0 (see `agreement`), parameters, own and shared, and the time of a step
    relative to the patient's.

    A run that is finished already is not repeated. Only ``fresh`` replaces what another run has finished.

    The same call continues a run that was stopped, from its answers and its last checkpoint; ``fresh`` starts again,
    and keeps only answers that it would draw again as they are.

    Raises UsageError (more layers than the patient has, a patient that cannot be cut, another run that was stopped,
    finished or goes on here), DataError (too few prompts), TrainingError, StorageError. Then ``output`` is unchanged.
    """
    output = Path(output)
    ensure_replaceable(output, MARKER)
    if len({p.device for p in patient.model.parameters()}) > 1:
        raise UsageError(
            "the patient is spread over several devices: to be shrunk it must fit one, as --device names it"
        )
    ids = _fitting(patient, prompts)
    student = first_layers(patient, settings.layers)
    layers = student.config.get_text_config().num_hidden_layers
    settings = settings.replace(layers=layers)
    identity = {
        "patient": patient.fingerprint,
        "prompts": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "settings": settings.model_dump(mode="json"),
    }
    with locked(output, beside=True):
        return _shrink(
            patient, ids, student, output, settings, identity, device, fresh, on_answer=on_answer, on_step=on_step
        )


def _shrink(
    patient: Patient,
    ids: list[list[int]],
    student: PreTrainedModel,
    output: Path,
    settings: ShrinkSettings,
    identity: dict[str, Any],
    device: str,
    fresh: bool,
    *,
    on_answer: Callable[[int, int], None] | None,
    on_step: Callable[[int, int, float, float], None] | None,
) -> dict[str, Any]:
    started = time.monotonic()
    kept = output.with_name(f".{output.name}.answers.jsonl")
    work = output.with_name(f".{output.name}.training")
    key = run_key({**identity, "version": __version__})
    described = {
        "llmdoctor_version": __version__,
        "patient": patient.name,
        "patient_fingerprint": patient.fingerprint,
        "prompts": identity["prompts"],
        "settings": identity["settings"],
    }
    if not fresh:
        if done := finished(output / MARKER, key):
            return done
        if not kept.exists() and not work.exists():
            require_no_other(output, MARKER, "model", _told, described)
    spoken = _answers(patient, ids, settings, identity, kept, fresh=fresh, on_answer=on_answer)
    held_out = spoken[: min(len(ids) - 1, max(1, round(settings.holdout * len(ids)))) * settings.answers]
    before = measure(patient, student, held_out[:_MEASURED])

    training = settings.training(device)
    progress = Progress(Distance, on_step and (lambda step, last, row, speed: on_step(step, last, row.loss, speed)))
    trainer = Distiller(patient, student, spoken[len(held_out) :], training, str(work), progress)
    trainer.run(work, identity, fresh=fresh)

    student.eval().requires_grad_(False)
    for p in student.parameters():  # not the buffers: those of rotary positions are float32 in every model
        p.data = p.data.to(patient.model.dtype)
    meta = {
        **described,
        "run": key,
        "report": {
            "layers": settings.layers,
            "of": patient.model.config.get_text_config().num_hidden_layers,
            **_sizes(student, patient.model),
            "step": _step_time(student) / _step_time(patient.model),
            "before": before,
            "after": measure(patient, student, held_out[:_MEASURED]),
            "answers": len(spoken),
            "tokens": progress.tokens,
            "seconds": round(time.monotonic() - started, 1),
        },
    }
    with atomic_path(output) as temporary:
        student.save_pretrained(str(temporary))
        patient.tokenizer.save_pretrained(str(temporary))
        write_json(temporary / MARKER, meta)
        (temporary / "README.md").write_text(clean(_card(meta)), encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    kept.unlink(missing_ok=True)
    return meta


def _told(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a shrunk.json says of its run, but for places, which may differ."""
    told = {key: meta.get(key) for key in ("patient_fingerprint", "prompts", "llmdoctor_version")}
    return {**told, **meta.get("settings", {})}


def first_layers(patient: Patient, layers: int | None = None) -> PreTrainedModel:
    """A copy in float32 of the patient's first ``layers`` (a fifth), its embeddings, final norm and head.

    Of a patient in float32, embeddings and head are the patient's own. Only layers and norm are to be trained. Raises
    UsageError.
    """
    model = patient.model
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    most = text.num_hidden_layers
    layers = layers or max(1, most // 5)
    if layers >= most:
        raise UsageError(f"the patient {patient.name} has {most} layers: expected fewer than that, got {layers}")
    if getattr(model, "hf_quantizer", None) is not None:
        raise UsageError(
            f"the weights of {patient.name} are quantised and cannot be trained: give the model it was made of"
        )
    try:
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
        type(config).from_dict(config.to_dict())  # it must be one that can be loaded again
        student = type(model)(config)
        held = model.state_dict()
        student.load_state_dict({name: held[name] for name in student.state_dict()})
        student.to(device=model.device, dtype=torch.float32).eval().requires_grad_()  # type: ignore[call-arg]
        with torch.inference_mode():  # that it can decode is seen now, and not after hours of healing
            cache = DynamicKV(student)
            for _ in range(2):
                cache.feed(torch.tensor([[0]], device=model.device))
    except Exception as error:  # of as many kinds as there are architectures
        raise UsageError(
            f"a {type(model).__name__} cannot be cut down to its first layers: {first_line(error)}"
        ) from error
    if model.dtype == torch.float32:
        student.set_input_embeddings(model.get_input_embeddings())
        student.set_output_embeddings(model.get_output_embeddings())
    for part in (student.get_input_embeddings(), student.get_output_embeddings()):
        part.requires_grad_(False)
    student.generation_config = _ends_of(model.generation_config)
    return student


def _ends_of(config: GenerationConfig | None) -> GenerationConfig:
    """What a generation config says of special tokens. The rest may be such that it cannot be saved."""
    named = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(config, name, None) for name in named})


def _fitting(patient: Patient, prompts: Sequence[str | Sequence[Message]]) -> list[list[int]]:
    """The ids of every prompt once, without those that leave no room for an answer, in random order.

    The first are held out: so none of them is learnt from, and they are of all kinds, however the prompts are sorted.
    Raises DataError if fewer than two are left.
    """
    asked = [prompt_ids(patient.tokenizer, conversation(prompt)) for prompt in prompts]
    every = list({tuple(one): one for one in asked}.values())
    ids = [one for one in every if len(one) < patient.context]
    random.Random(0).shuffle(ids)  # not by the seed: runs that differ in it have the same prompts
    if len(ids) < 2:
        raise DataError(
            "expected at least two prompts that differ, one to learn from and one to measure on, got "
            f"{len(ids)} that fit the patient's context of {patient.context} tokens"
        )
    if left_out := len(every) - len(ids):
        warnings.warn(
            f"{left_out} prompts are left out: the patient's context of {patient.context} tokens has no room for an "
            "answer to them",
            LLMDoctorWarning,
            stacklevel=3,
        )
    return ids


def kl_per_token(
    teacher: SplitLM, teacher_M_H: Tensor, student: SplitLM, student_M_H: Tensor, vocabulary: Vocabulary
) -> Tensor:
    """KL(teacher || student) of the next token [M], nats, from the states that the two heads read."""

    def score(teacher_C_H: Tensor, student_C_H: Tensor) -> Tensor:
        with torch.no_grad():
            target_C_V = vocabulary.mask(teacher.logits(teacher_C_H)).log_softmax(dim=-1)
        found_C_V = vocabulary.mask(student.logits(student_C_H)).log_softmax(dim=-1)
        return (target_C_V.exp() * (target_C_V - found_C_V)).sum(dim=-1)

    return by_chunks(score, max(1, (1 << 24) // vocabulary.size), teacher_M_H, student_M_H)


def agreement(one_M_V: Tensor, other_M_V: Tensor) -> Tensor:
    """How likely two distributions p and q [M, V] (log-probs) give the same token from one key [M].

    This is the acceptance of a draft. In the Gumbel-max draw of `product.draw` both give token i with probability
    1 / sum_j max(p_j / p_i, q_j / q_i). The first is the greater where p_j / q_j > p_i / q_i, so in the order of p / q
    the sums are running sums.
    """
    order = (one_M_V - other_M_V).argsort(dim=-1, descending=True)
    p, q = (said.gather(-1, order).double().exp() for said in (one_M_V, other_M_V))
    above, below = p.cumsum(dim=-1), q.flip(-1).cumsum(dim=-1).flip(-1) - q
    return (1 / (above / p + below / q)).nan_to_num().sum(dim=-1)


@torch.no_grad()
def measure(patient: Patient, student: PreTrainedModel, spoken: Sequence[Spoken]) -> dict[str, float]:
    """KL(patient || student) in nats per token, and the mean `agreement` of their next tokens, over these answers."""
    teacher, pupil = SplitLM.of(patient.model), SplitLM.of(student)
    kls: list[float] = []
    agreed: list[float] = []
    for one in spoken:
        batch = pad_rows([(torch.tensor(one.prompt), torch.tensor(one.response))])
        batch = {name: tensor.to(patient.model.device) for name, tensor in batch.items()}
        said = [
            patient.vocabulary.mask(split.logits(_states(split, batch)[0])).log_softmax(dim=-1)
            for split in (teacher, pupil)
        ]
        kls += (said[0].exp() * (said[0] - said[1])).sum(dim=-1).tolist()
        agreed += agreement(*said).tolist()
    return {"kl_per_token": statistics.fmean(kls), "acceptance": statistics.fmean(agreed)}


def _states(split: SplitLM, batch: dict[str, Tensor]) -> Tensor:
    """What the head reads before every response token [B, T, H]; beyond a response's end it means nothing."""
    return states(split, **batch)[:, :-1]


class _Student(nn.Module):
    """The states before every response token; a module of its own so that the Trainer can wrap it."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm, self.split = lm, SplitLM.of(lm)

    def forward(self, **batch: Tensor) -> Tensor:
        return _states(self.split, batch)

    def train(self, mode: bool = True) -> "_Student":
        """Never with dropout: it is to say what the patient says, not to learn from noise."""
        del mode
        return super().train(False)


class Distiller(ResumableTrainer):
    """Minimises the KL divergence from the patient to the student on the patient's answers."""

    def __init__(
        self,
        patient: Patient,
        student: PreTrainedModel,
        spoken: Sequence[Spoken],
        settings: Any,
        scratch: str,
        progress: Progress[Distance],
    ) -> None:
        super().__init__(_Student(student), settings, scratch, progress, train=spoken, collator=_batch)
        self.args._n_gpu = 1  # the patient is on one device, and so is its student
        self._vocabulary, self._teacher = patient.vocabulary, SplitLM.of(patient.model)
        width = patient.model.get_output_embeddings().in_features
        self._keeps = sum(len(one.response) for one in spoken) * width <= KEPT_NUMBERS

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The mean KL of a batch over its tokens."""
        spoken: list[Spoken] = inputs.pop("spoken")
        lengths_B = inputs["response_lengths"]
        mask_B_T = torch.arange(int(lengths_B.max()), device=lengths_B.device) < lengths_B[:, None]
        teacher_M_H = self._teacher_states(spoken, inputs, mask_B_T)
        student: _Student = self.accelerator.unwrap_model(model)
        states_M_H = model(**inputs)[mask_B_T]
        loss = kl_per_token(self._teacher, teacher_M_H, student.split, states_M_H, self._vocabulary).mean()
        self.progress.add(Distance(float(loss.detach())), len(states_M_H))
        return loss

    @torch.no_grad()
    def _teacher_states(self, spoken: Sequence[Spoken], inputs: dict[str, Tensor], mask_B_T: Tensor) -> Tensor:
        """What the patient's head reads [M, H]: read once and kept, if all of it fits."""
        if all(one.states is not None for one in spoken):
            held = torch.cat([one.states for one in spoken if one.states is not None])
            return held.to(mask_B_T.device)
        found_M_H = _states(self._teacher, inputs)[mask_B_T]
        if self._keeps:
            for one, states in zip(spoken, found_M_H.split(mask_B_T.sum(dim=1).tolist()), strict=True):
                one.states = states.cpu()
        return found_M_H


def _batch(spoken: list[Spoken]) -> dict[str, Any]:
    rows = pad_rows([(torch.tensor(one.prompt), torch.tensor(one.response)) for one in spoken])
    return {**rows, "spoken": spoken}


def _answers(
    patient: Patient,
    prompts: Sequence[Sequence[int]],
    settings: ShrinkSettings,
    identity: dict[str, Any],
    path: Path,
    *,
    fresh: bool,
    on_answer: Callable[[int, int], None] | None,
) -> list[Spoken]:
    """The patient's answers at temperature 1, ``settings.answers`` to each prompt. Those at ``path`` are kept."""
    drawn_from = {name: identity[name] for name in ("patient", "prompts")}
    drawn_from |= {name: identity["settings"][name] for name in ("answers", "max_new_tokens", "seed")}
    asked = [prompt for prompt in prompts for _ in range(settings.answers)]
    answers = _kept(path, drawn_from, patient.vocabulary.size, fresh=fresh)[: len(asked)]
    with atomic_path(path) as temporary:  # without the lines that cannot be read
        temporary.write_text("".join(map(_line, (drawn_from, *answers))), encoding="utf-8")
    sampling = Sampling(max_new_tokens=settings.max_new_tokens)
    with storage_errors(path), open_to_append(path) as file:
        while len(answers) < len(asked):
            rows = asked[len(answers) : len(answers) + _ROWS]
            seeds = [settings.seed + len(answers) + i for i in range(len(rows))]
            new: list[list[int]] = [[] for _ in rows]
            for step in decode(patient, {}, rows, patient_alone, sampling, seed=seeds):
                new[step.row].append(step.token.id)
            file.writelines(map(_line, new))
            file.flush()
            answers += new
            if on_answer:
                on_answer(len(answers), len(asked))
    return [Spoken(list(prompt), answer) for prompt, answer in zip(asked, answers, strict=True)]


def _kept(path: Path, drawn_from: dict[str, Any], vocabulary: int, *, fresh: bool) -> list[list[int]]:
    """The answers that are kept at ``path``, up to a line that is cut off or damaged: the others are drawn again.

    Raises UsageError for a file that holds something else, unless ``fresh`` discards it.
    """
    if not present(path):
        return []
    answer: TypeAdapter[list[int]] = TypeAdapter(
        Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=vocabulary)]], Field(min_length=1)]
    )
    answers: list[list[int]] = []
    try:
        require_regular(path)
        with path.open("rb") as lines:
            whole = _line(drawn_from).encode()
            if whole.startswith(lines.readline(len(whole) + 1)):  # it may be cut off itself
                with suppress(ValidationError):
                    for line in lines:
                        answers.append(answer.validate_json(line if line.endswith(b"\n") else b""))
                return answers
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}. Remove it, and start again") from error
    if fresh:
        return []
    raise UsageError(
        f"{path} holds answers of another patient, to other prompts or with other settings: give those to "
        "continue that run, or --fresh to start from scratch"
    )


def _line(data: Any) -> str:
    return json.dumps(data) + "\n"


def _sizes(student: PreTrainedModel, patient: PreTrainedModel) -> dict[str, int]:
    ends = (student.get_input_embeddings(), student.get_output_embeddings())
    shared = sum(p.numel() for p in {p for part in ends for p in part.parameters()})  # once where they are tied
    own = student.num_parameters() - shared
    return {"own_parameters": own, "shared_parameters": shared, "patient_parameters": patient.num_parameters()}


@torch.inference_mode()
def _step_time(model: PreTrainedModel) -> float:
    """Seconds for one token after 64 others: the median of eleven, after three to warm up."""
    cache = open_cache(model)
    ids = torch.arange(65, device=model.device)[None] % model.config.get_text_config().vocab_size
    cache.feed(ids[:, :64])
    times = []
    for _ in range(14):
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        cache.feed(ids[:, 64:])[0].sum().item()
        times.append(time.perf_counter() - began)
        if cache.can_roll_back:
            cache.take_back(1)
    return statistics.median(times[3:])


def _card(meta: dict[str, Any]) -> str:
    report = meta["report"]
    return (
        f"---\nlibrary_name: transformers\ntags: [llmdoctor]\n---\n\n"
        f"# The first {report['layers']} of {report['of']} layers of {Path(meta['patient']).name}\n\n"
        "Healed by distillation on the patient's own answers (`llmdoctor shrink`). A base for doctors "
        "(`llmdoctor train --doctor`), or a draft model (`--draft-model`). It has its patient's licence.\n\n"
        f"KL to the patient {report['after']['kl_per_token']:.3f} nats per token on held-out prompts "
        f"({report['before']['kl_per_token']:.3f} before healing); {report['after']['acceptance']:.0%} of the tokens "
        f"that it drafts stand; a step takes {report['step']:.2f} of the patient's.\n"
    )
