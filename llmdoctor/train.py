"""Stage 2: token rewards -> a doctor, with token-level flow-guided preference optimisation on a Trainer."""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmdoctor import __version__
from llmdoctor.doctor import MARKER, DoctorOutput, new_doctor, save_doctor
from llmdoctor.errors import DataError, LoadError, TrainingError
from llmdoctor.losses import anchored, log_flow, state_mask, subtb, value_discrimination
from llmdoctor.models import Vocabulary, load_tokenizer, model_fingerprint, pick_device
from llmdoctor.profile import RewardSettings, TrainSettings
from llmdoctor.rewards import alternative_rewards, face_weights, token_rewards
from llmdoctor.store import RewardsFolder, ensure_replaceable
from llmdoctor.types import TokenScores, TrainStep

_MIN_ADVANTAGE = 0.5  # how much better the reward of a same-prefix token must be to count as preferred


@dataclass(frozen=True, slots=True)
class _Side:
    """One response as stage 2 uses it; ``others`` are same-prefix rivals: (position, rival's id, rival is better)."""

    prompt: Tensor
    response: Tensor
    rewards: Tensor
    others: list[tuple[int, int, bool]]


def train(
    rewards: Path,
    output: Path,
    *,
    base_model: str,
    reward_settings: RewardSettings,
    settings: TrainSettings,
    patient: str | None = None,
    name: str | None = None,
    trust_remote_code: bool = False,
    on_step: Callable[[TrainStep], None] | None = None,
) -> dict[str, Any]:
    """Train a doctor on ``base_model`` from a rewards folder and write the doctor folder ``output``.

    ``patient``, when given, must be the patient that the rewards were drawn from. ``name`` is what the doctor is called
    (the folder's name by default). Returns what doctor.json holds:
    base model, tokenizer fingerprint, settings, where the rewards come from, metrics.

    Raises LoadError (no such model or rewards, another tokenizer, another patient), DataError (no pair fits the
    doctor's context), TrainingError (the loss is not finite), StorageError; nothing is written then.
    """
    output = Path(output)
    ensure_replaceable(output, MARKER)
    folder = RewardsFolder(rewards)
    _check_patient(folder, patient)
    doctor, tokenizer = new_doctor(base_model, settings, trust_remote_code=trust_remote_code)
    vocabulary = Vocabulary.of(tokenizer)
    if vocabulary.fingerprint != folder.meta["tokenizer"]["fingerprint"]:
        theirs = Vocabulary.of(load_tokenizer(folder.path / "tokenizer"))
        theirs.require_same(vocabulary, f"the patient {folder.meta['patient']['model']}", f"the doctor {base_model}")
    weights = face_weights(folder, folder.faces, reward_settings)
    context = getattr(doctor.lm.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    pairs = [
        (_side(pair.chosen, reward_settings, weights), _side(pair.rejected, reward_settings, weights))
        for pair in folder
        if max(_length(pair.chosen), _length(pair.rejected)) <= context
    ]
    if not pairs:
        raise DataError(f"none of the {len(folder)} pairs in {rewards} fits the doctor's context of {context} tokens")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llmdoctor-train-") as scratch:
        trainer = TFPOTrainer(doctor, pairs, settings, scratch, on_step)
        trainer.train()
    if not all(p.isfinite().all() for p in doctor.parameters() if p.requires_grad):
        raise TrainingError(
            f"the weights are no longer finite numbers after step {trainer.state.global_step}; nothing was written. "
            f"Lower the learning rate (now {settings.learning_rate:g}), or train in float32"
        )
    metrics = {
        **trainer.summary(),
        "pairs": len(pairs),
        "pairs_too_long": len(folder) - len(pairs),
        "seconds": round(time.monotonic() - started, 2),
    }
    meta = {
        "llmdoctor_version": __version__,
        "name": name or output.name,
        "base_model": base_model,
        "tokenizer": {"fingerprint": vocabulary.fingerprint, "size": vocabulary.size},
        "settings": {
            "rewards": reward_settings.model_dump(),
            "train": settings.model_dump(exclude={"doctor", "device"}),
            "face_weights": weights,
        },
        "rewards": {
            "patient": folder.meta["patient"]["model"],
            "patient_fingerprint": folder.meta["patient"]["fingerprint"],
            "dataset_fingerprint": folder.meta["dataset"]["fingerprint"],
            "pairs": len(folder),
        },
        "metrics": metrics,
    }
    if trainer.is_world_process_zero():
        save_doctor(output, doctor, tokenizer, meta)
    return meta


class TFPOTrainer(Trainer):
    """Token-level flow-guided preference optimisation: L = L_SubTB + lambda * L_value (arXiv 2601.10416)."""

    def __init__(
        self,
        doctor: nn.Module,
        pairs: Sequence[tuple[_Side, _Side]],
        settings: TrainSettings,
        scratch: str,
        on_step: Callable[[TrainStep], None] | None,
    ) -> None:
        self.settings = settings
        device = pick_device(settings.device)
        args = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.lr_scheduler,
            warmup_steps=settings.warmup_ratio,
            num_train_epochs=settings.epochs,
            max_steps=settings.max_steps or -1,
            max_grad_norm=settings.max_grad_norm,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
            use_cpu=device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
        )
        super().__init__(
            model=doctor,
            args=args,
            train_dataset=_Pairs(pairs),
            data_collator=_Collator(settings, torch.Generator().manual_seed(settings.seed)),
        )
        self.remove_callback(PrinterCallback)
        self.progress = _Progress(on_step)
        self.add_callback(self.progress)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The library's optimiser, with the value head at its own learning rate when one is set."""
        if self.optimizer is not None or (rate := self.settings.value_learning_rate) is None:
            return super().create_optimizer(*args, **kwargs)
        assert self.model is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        head = {id(p) for n, p in self.model.named_parameters() if "value_head" in n}
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in head]
            group["params"] = [p for p in group["params"] if id(p) not in head]
            optimizer.add_param_group({**group, "params": own, "lr": rate})
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of a batch; TrainingError when it is not finite."""
        s = self.settings
        rewards_B_T, value_pairs_P_4 = inputs.pop("rewards"), inputs.pop("value_pairs")
        scored = len(rewards_B_T)
        out: DoctorOutput = model(**inputs, scored=scored, reference=s.flow == "relative")
        lengths_R = inputs["response_lengths"]
        mask_R_T = torch.arange(int(lengths_R.max()), device=lengths_R.device) < lengths_R[:, None]
        values_R_N = anchored(out.log_values_R_N, mask_R_T) if s.anchor else out.log_values_R_N
        # an alternative's row ends mid-answer: its last state is not the end of a response
        values_R_N = torch.cat([values_R_N[:scored], out.log_values_R_N[scored:]])
        mask_B_T = mask_R_T[:scored]
        flow_B_N = log_flow(
            out.logprobs_B_T,
            rewards_B_T,
            values_R_N[:scored],
            mask_B_T,
            rho=s.rho,
            ref_logprobs_B_T=out.ref_logprobs_B_T,
        )
        flow_loss = subtb(flow_B_N, state_mask(mask_B_T), s.subtb_weight).mean()
        row, state, other_row, other_state = value_pairs_P_4.unbind(dim=1)
        value_loss = value_discrimination(values_R_N[row, state], values_R_N[other_row, other_state], s.gamma)
        loss = flow_loss + s.value_weight * value_loss
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss.item()} at step {self.state.global_step + 1} (SubTB {flow_loss.item():.3g}, "
                f"value {value_loss.item():.3g}); nothing was written. Lower the learning rate (now "
                f"{s.learning_rate:g}) or rho (now {s.rho:g}), or train in float32"
            )
        self.progress.add((loss.item(), flow_loss.item(), value_loss.item()), int(lengths_R[:scored].sum()))
        return loss

    def summary(self) -> dict[str, Any]:
        """Steps, tokens, and both losses averaged over the first and the last tenth of the run."""
        return {"steps": self.state.global_step, **self.progress.summary()}


class _Progress(TrainerCallback):
    """Collects both losses and tells ``on_step`` about each optimiser step."""

    def __init__(self, on_step: Callable[[TrainStep], None] | None) -> None:
        self.on_step = on_step
        self.history: list[tuple[float, ...]] = []  # (loss, SubTB, value) of every optimiser step
        self.pending: list[tuple[float, float, float]] = []
        self.tokens = 0
        self.started = time.monotonic()

    def add(self, losses: tuple[float, float, float], tokens: int) -> None:
        """Note one micro-batch."""
        self.pending.append(losses)
        self.tokens += tokens

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.history.append(tuple(sum(part) / len(self.pending) for part in zip(*self.pending, strict=True)))
        self.pending.clear()
        if self.on_step:
            speed = self.tokens / max(time.monotonic() - self.started, 1e-9)
            loss, flow, value = self.history[-1]
            self.on_step(TrainStep(state.global_step, state.max_steps, loss, flow, value, speed))

    def summary(self) -> dict[str, Any]:
        """Both losses at either end of the run, and the tokens seen."""
        tenth = math.ceil(len(self.history) / 10)

        def mean(rows: list[tuple[float, ...]]) -> dict[str, float]:
            columns = zip(("loss", "subtb", "value"), zip(*rows, strict=True), strict=True)
            return {name: round(sum(column) / len(column), 6) for name, column in columns}

        return {"tokens": self.tokens, "first": mean(self.history[:tenth]), "last": mean(self.history[-tenth:])}


class _Pairs(torch.utils.data.Dataset[tuple[_Side, _Side]]):
    def __init__(self, pairs: Sequence[tuple[_Side, _Side]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[_Side, _Side]:
        return self.pairs[index]


class _Collator:
    """Pads a batch: 2B scored rows (chosen, rejected, ...), then one row for every same-prefix alternative.

    ``value_pairs`` [P, 4] holds (row, state, other row, other state): log V should be greater at the first. At the fork
    of a pair, where its responses first differ, these are the states after either token (the paper). Alternatives cost
    a row each, up to their token, on which nothing but log V is learnt.
    """

    def __init__(self, settings: TrainSettings, generator: torch.Generator) -> None:
        self.alternatives, self.generator = settings.alternatives, generator

    def __call__(self, pairs: list[tuple[_Side, _Side]]) -> dict[str, Tensor]:
        sides = [side for pair in pairs for side in pair]
        rows = [(side.prompt, side.response) for side in sides]
        value_pairs: list[tuple[int, int, int, int]] = []
        for i, (chosen, rejected) in enumerate(pairs):
            fork = _fork(chosen.response, rejected.response)
            if fork is not None and torch.equal(chosen.prompt, rejected.prompt):
                value_pairs.append((2 * i, fork + 1, 2 * i + 1, fork + 1))
        for row, side in enumerate(sides):
            picks = torch.randperm(len(side.others), generator=self.generator)[: self.alternatives]
            for position, rival, better in (side.others[int(k)] for k in picks):
                own, other = (row, position + 1), (len(rows), position + 1)
                value_pairs.append((*other, *own) if better else (*own, *other))
                rows.append((side.prompt, torch.cat([side.response[:position], torch.tensor([rival])])))
        sequences = [torch.cat(parts) for parts in rows]
        lengths = torch.tensor([len(s) for s in sequences])
        input_ids = pad_sequence(sequences, batch_first=True)
        response_lengths = torch.tensor([len(response) for _, response in rows])
        rewards = torch.zeros(len(sides), int(response_lengths.max()))
        for row, side in enumerate(sides):
            rewards[row, : len(side.rewards)] = side.rewards
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "prompt_lengths": torch.tensor([len(prompt) for prompt, _ in rows]),
            "response_lengths": response_lengths,
            "rewards": rewards,
            "value_pairs": torch.tensor(value_pairs, dtype=torch.long).reshape(-1, 4),
        }


def _side(scores: TokenScores, settings: RewardSettings, weights: dict[str, float]) -> _Side:
    rewards = token_rewards(scores, settings, weights).rewards
    rivals = alternative_rewards(scores, settings, weights)
    others = []
    if rivals is not None:
        advantage = rivals - rewards
        others = [
            (t, int(scores.alternative_ids[t]), bool(advantage[t] > 0))
            for t in (abs(advantage) > _MIN_ADVANTAGE).nonzero()[0].tolist()
        ]
    return _Side(
        torch.from_numpy(scores.prompt_ids).long(),
        torch.from_numpy(scores.response_ids).long(),
        torch.from_numpy(rewards),
        others,
    )


def _length(scores: TokenScores) -> int:
    return len(scores.prompt_ids) + len(scores.response_ids)


def _fork(a: Tensor, b: Tensor) -> int | None:
    """The first position at which two responses differ; None when one is the beginning of the other."""
    shared = min(len(a), len(b))
    differs = (a[:shared] != b[:shared]).nonzero()
    return int(differs[0]) if len(differs) else None


def _check_patient(folder: RewardsFolder, patient: str | None) -> None:
    if patient is None:
        return
    held = folder.meta["patient"]
    if model_fingerprint(patient) != held["fingerprint"]:
        raise LoadError(
            f"the rewards in {folder.path} were drawn from the patient {held['model']}, not from {patient}: "
            "run extract with this patient, or train without naming one"
        )
