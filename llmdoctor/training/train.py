"""Stage 2: token rewards -> a doctor, with token-level flow-guided preference optimisation on a Trainer."""

import json
import math
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from llmdoctor import __version__
from llmdoctor.errors import DataError, LoadError, TrainingError, UsageError
from llmdoctor.files import atomic_path, ensure_replaceable, read_json, write_json
from llmdoctor.models import Vocabulary, load_tokenizer, model_fingerprint, pick_device
from llmdoctor.records import PairScores, TokenScores, TrainStep
from llmdoctor.settings import RewardSettings, TrainSettings
from llmdoctor.token_rewards.fit import face_weights
from llmdoctor.token_rewards.folder import RewardsFolder
from llmdoctor.token_rewards.formula import alternative_rewards, token_rewards
from llmdoctor.training.doctor import MARKER, Doctor, DoctorOutput, new_doctor, save_doctor
from llmdoctor.training.losses import anchored, log_flow, state_mask, subtb, value_discrimination

_MIN_ADVANTAGE = 0.5  # how much better the reward of a same-prefix token must be to count as preferred
_EXPLODED = 100.0  # a loss that many times the greatest of the last _RECENT steps (and of 1) will not come back
_RECENT = 50


@dataclass(slots=True)
class _Side:
    """One response as stage 2 uses it; ``others`` are same-prefix rivals: (position, rival's id, rival is better).

    ``reference`` [T] are its log-probs under the doctor's base, once they are known.
    """

    pair_id: str
    prompt: Tensor
    response: Tensor
    rewards: Tensor
    others: list[tuple[int, int, bool]]
    reference: Tensor | None = None


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
    fresh: bool = False,
    on_step: Callable[[TrainStep], None] | None = None,
) -> dict[str, Any]:
    """Train a doctor on ``base_model`` from a rewards folder and write the doctor folder ``output``.

    ``patient``, when given, must be the patient that the rewards were drawn from. ``name`` is what the doctor is called
    (the folder's name by default). Returns what doctor.json holds:
    base model, tokenizer fingerprint, settings, where the rewards come from, metrics.

    Until the doctor is done its checkpoints stand beside it, in ``.NAME.training``; the same call continues a run that
    was stopped and ends, on one device, with the weights of an uninterrupted one. ``fresh`` begins anew. An interrupt
    (Ctrl+C, SIGTERM) finishes the step and keeps it; a second one does not wait. TensorBoard's files are kept beside
    the doctor, in ``NAME.logs``, unless TENSORBOARD_LOGGING_DIR says otherwise.

    Raises LoadError (no such model or rewards, another tokenizer, another patient), DataError (no pair fits the
    doctor's context), UsageError (another run was stopped here, a reporter that is not installed), TrainingError (the
    loss is not finite or explodes), StorageError; the doctor folder is then as it was, and what the last checkpoint
    holds is kept.
    """
    output = Path(output)
    ensure_replaceable(output, MARKER)
    _require_reporters(settings.report_to, output)
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
        sides(pair, reward_settings, weights, settings.ceiling)
        for pair in folder
        if max(_length(pair.chosen), _length(pair.rejected)) <= context
    ]
    if not pairs:
        raise DataError(f"none of the {len(folder)} pairs in {rewards} fits the doctor's context of {context} tokens")
    training, held_out = hold_out(pairs, settings.holdout, settings.seed)
    work = output.with_name(f".{output.name}.training")
    identity = {
        "base_model": model_fingerprint(base_model),
        "rewards": folder.meta["dataset"]["fingerprint"],
        "patient": folder.meta["patient"]["fingerprint"],
        "pairs": len(pairs),
        "reward_settings": reward_settings.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json", exclude={"doctor", "device", "report_to"}),
    }
    made = [path for path in output.parents if not path.exists()]
    started = time.monotonic()
    trainer = TFPOTrainer(doctor, training, settings, str(work), on_step, held_out)
    first = trainer.is_world_process_zero()
    try:
        checkpoint = _resume_point(work, identity, fresh=fresh, first=first)
        trainer.accelerator.wait_for_everyone()  # before any process writes a checkpoint
        with _finishing_the_step(trainer.progress):
            if checkpoint:
                trainer.progress.restore(checkpoint)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.progress.interrupted:
            raise KeyboardInterrupt
        _require_finite(doctor, trainer.state.global_step, settings)
    except TrainingError as error:
        if first:  # its weights are the ones that gave this loss
            shutil.rmtree(work / f"checkpoint-{trainer.state.global_step}", ignore_errors=True)
        kept = last_checkpoint(work)
        where = f"nothing was written, except the checkpoint of step {_step(kept)} in {work}" if kept else ""
        raise TrainingError(f"{error}; {where or 'nothing was written'}") from error
    finally:
        if first and last_checkpoint(work) is None:
            shutil.rmtree(work, ignore_errors=True)
            with suppress(OSError):  # nothing was gained: leave nothing
                for path in made:
                    path.rmdir()
    metrics = {
        **trainer.summary(),
        "pairs": len(pairs),
        "pairs_held_out": len(held_out),
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
            "train": settings.model_dump(exclude={"doctor", "device", "report_to"}),
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
    if first:
        save_doctor(output, doctor, tokenizer, meta)
        with atomic_path(output / "losses.svg") as picture:
            _draw(trainer.progress.history, trainer.progress.evaluations, picture)
        shutil.rmtree(work, ignore_errors=True)
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.wait_for_everyone()  # the doctor stands when any process returns
        trainer.accelerator.end_training()
    return meta


def _require_reporters(names: Sequence[str], output: Path) -> None:
    if "tensorboard" in names:  # it reads no setting but this
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(output.with_name(f"{output.name}.logs")))
    for name in names:
        try:
            for reporter in get_reporting_integration_callbacks([name]):
                reporter()
        except (ImportError, RuntimeError, ValueError) as error:
            raise UsageError(f"cannot report to {name!r}: {str(error).strip()}") from error


def _draw(history: Sequence[Sequence[float]], evaluations: Sequence[dict[str, float]], path: Path) -> None:
    """Both losses of every step with their running mean over a twentieth of the run, and what the evaluations found."""
    import matplotlib
    from matplotlib.figure import Figure

    window = max(1, len(history) // 20)
    steps = range(1, len(history) + 1)
    held_out = [evaluation["step"] for evaluation in evaluations]
    names = {"subtb": "SubTB", "value": "value loss", "reward_accuracy": "reward accuracy"}
    rows = 3 if evaluations else 2
    figure = Figure(figsize=(7, 2.4 * rows), layout="constrained")
    for column, (axes, (key, name)) in enumerate(
        zip(figure.subplots(rows, sharex=True), names.items(), strict=False), 1
    ):
        if key != "reward_accuracy":
            losses = [row[column] for row in history]
            means = [statistics.fmean(losses[max(0, end - window) : end]) for end in steps]
            axes.plot(steps, losses, color="0.8", linewidth=0.8)
            axes.plot(steps, means, color="tab:blue", label=f"mean of {window} steps")
        if evaluations:
            found = [evaluation[f"eval_{key}"] for evaluation in evaluations]
            axes.plot(held_out, found, "o-", color="tab:orange", markersize=3, label="held out")
        axes.set_ylabel(name)
        axes.legend(frameon=False)
    axes.set_xlabel("step")
    with matplotlib.rc_context({"svg.hashsalt": "llmdoctor", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def hold_out(
    pairs: Sequence[tuple[_Side, _Side]], share: float, seed: int
) -> tuple[list[tuple[_Side, _Side]], list[tuple[_Side, _Side]]]:
    """(training, held-out) pairs: about ``share`` of them, whole prompts at a time, never all of them."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, (chosen, _) in enumerate(pairs):
        groups.setdefault(tuple(chosen.prompt.tolist()), []).append(i)
    shuffled = list(groups.values())
    order = torch.randperm(len(shuffled), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted, held = int(share * len(pairs)), set[int]()
    for k in order:
        if len(held) + len(shuffled[k]) <= wanted:
            held.update(shuffled[k])
    return [pair for i, pair in enumerate(pairs) if i not in held], [pairs[i] for i in sorted(held)]


def last_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint of a run's folder. The state is written last: without it the rest is not whole."""
    whole = []
    for state in work.glob("checkpoint-*/trainer_state.json"):
        try:
            json.loads(state.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        whole.append(state.parent)
    return max(whole, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _resume_point(work: Path, identity: dict[str, Any], *, fresh: bool, first: bool) -> Path | None:
    """Where to go on from, None from the start; UsageError when it is another run that was stopped here."""
    checkpoint = last_checkpoint(work)
    if checkpoint and not fresh:
        held = read_json(work / "run.json")
        if held == identity:
            return checkpoint
        before, now = (run["reward_settings"] | run["settings"] | run for run in (held, identity))
        nested = ("reward_settings", "settings")
        differs = [key for key in now if key not in nested and before.get(key) != now[key]]
        raise UsageError(
            f"{work} holds a run stopped at step {_step(checkpoint)} with another {', '.join(differs)}: "
            "give its settings to continue it, or --fresh to begin anew"
        )
    if first:
        shutil.rmtree(work, ignore_errors=True)
        write_json(work / "run.json", identity)
    return None


@contextmanager
def _finishing_the_step(progress: "_Progress") -> Iterator[None]:
    """The first SIGINT or SIGTERM asks for a checkpoint at the end of the step; the second one is as always."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, _frame: Any) -> None:
        progress.interrupted = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _require_finite(doctor: nn.Module, step: int, settings: TrainSettings) -> None:
    if not all(p.isfinite().all() for p in doctor.parameters() if p.requires_grad):
        raise TrainingError(
            f"the weights are no longer finite numbers after step {step}: "
            f"lower the learning rate (now {settings.learning_rate:g}), or train in float32"
        )


class TFPOTrainer(Trainer):
    """Token-level flow-guided preference optimisation: L = L_SubTB + lambda * L_value (arXiv 2601.10416)."""

    def __init__(
        self,
        doctor: nn.Module,
        pairs: Sequence[tuple[_Side, _Side]],
        settings: TrainSettings,
        scratch: str,
        on_step: Callable[[TrainStep], None] | None,
        held_out: Sequence[tuple[_Side, _Side]] = (),
    ) -> None:
        self.settings, self.held_out = settings, held_out
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
            save_strategy="steps",
            save_steps=(
                every := settings.checkpoint_every if settings.checkpoint_every < 1 else int(settings.checkpoint_every)
            ),
            save_total_limit=2,
            restore_callback_states_from_checkpoint=True,  # the evaluations that early stopping has waited
            eval_strategy="steps" if held_out else "no",
            eval_steps=every,
            load_best_model_at_end=bool(held_out) and settings.keep_best,
            metric_for_best_model="eval_loss" if held_out else None,
            greater_is_better=False,
            ddp_find_unused_parameters=False,
            logging_strategy="steps" if settings.report_to else "no",
            logging_steps=1,
            report_to=list(settings.report_to) or "none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=device.type == "cuda",
        )
        super().__init__(
            model=doctor,
            args=args,
            train_dataset=(dataset := _Pairs(pairs, settings.seed)),
            eval_dataset=_Pairs(held_out, settings.seed) if held_out else None,
            data_collator=_Collator(settings),
        )
        self.remove_callback(PrinterCallback)
        self.progress = _Progress(on_step)
        self.add_callback(_Epochs(dataset))
        self.add_callback(self.progress)
        if held_out and settings.patience:
            self.add_callback(EarlyStoppingCallback(settings.patience))
        relative = pairs if settings.flow == "relative" else ()
        self._refer([side for pair in [*relative, *held_out] for side in pair])

    @torch.no_grad()
    def _refer(self, sides: Sequence[_Side]) -> None:
        """Note every response's log-probs under the doctor's base: once, for the base does not change."""
        doctor, size = self.model, 2 * self.settings.batch_size
        assert isinstance(doctor, Doctor)
        doctor.eval()  # the reference knows no dropout
        waiting = sorted((side for side in sides if side.reference is None), key=lambda side: -len(side.response))
        for start in range(0, len(waiting), size):
            rows = waiting[start : start + size]
            batch = self._prepare_inputs(_padded([(side.prompt, side.response) for side in rows]))
            with doctor.base_alone(), self.compute_loss_context_manager():
                found = doctor(**batch, scored=len(rows)).logprobs_B_T.cpu()
            for row, side in zip(found, rows, strict=True):
                side.reference = row[: len(side.response)].clone()

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
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of a batch; TrainingError when it is not finite or explodes."""
        ids = inputs.pop("pair_ids")
        tokens = int(inputs["response_lengths"][: len(inputs["rewards"])].sum())
        flow_loss, value_loss, _ = self._losses(model, inputs)
        loss = flow_loss + self.settings.value_weight * value_loss
        told = torch.stack([loss.detach(), flow_loss.detach(), value_loss.detach(), loss.new_tensor(tokens)])
        if (processes := self.accelerator.num_processes) > 1:  # the mean that their gradients are of
            told = self.accelerator.reduce(told, "mean")
        means = (told[0].item(), told[1].item(), told[2].item())
        self._require_sane(*means, ids)
        self.progress.add(means, round(told[3].item() * processes))
        return loss

    def _losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """SubTB, the value loss, and, of every scored row [B] with a reference, sum_t log(pi / pi_ref)."""
        s = self.settings
        rewards_B_T, value_pairs_P_4 = inputs.pop("rewards"), inputs.pop("value_pairs")
        reference_B_T = inputs.pop("reference", None)
        scored = len(rewards_B_T)
        out: DoctorOutput = model(**inputs, scored=scored)
        lengths_R = inputs["response_lengths"]
        mask_R_T = torch.arange(int(lengths_R.max()), device=lengths_R.device) < lengths_R[:, None]
        values_R_N = anchored(out.log_values_R_N, mask_R_T) if s.anchor else out.log_values_R_N
        # an alternative's row ends mid-answer: its last state is not the end of a response
        values_R_N = torch.cat([values_R_N[:scored], out.log_values_R_N[scored:]])
        mask_B_T = mask_R_T[:scored]
        relative = reference_B_T if s.flow == "relative" else None
        flow_B_N = log_flow(
            out.logprobs_B_T, rewards_B_T, values_R_N[:scored], mask_B_T, rho=s.rho, ref_logprobs_B_T=relative
        )
        flow_loss = subtb(flow_B_N, state_mask(mask_B_T), s.subtb_weight).mean()
        row, state, other_row, other_state = value_pairs_P_4.unbind(dim=1)
        value_loss = value_discrimination(values_R_N[row, state], values_R_N[other_row, other_state], s.gamma)
        ratio_B_T = torch.zeros_like(out.logprobs_B_T)
        if reference_B_T is not None:
            ratio_B_T = out.logprobs_B_T.detach() - reference_B_T
        return flow_loss, value_loss, (ratio_B_T * mask_B_T).sum(dim=1)

    def _require_sane(self, loss: float, flow: float, value: float, ids: list[str]) -> None:
        s, usual = self.settings, max((row[0] for row in self.progress.history[-_RECENT:]), default=math.inf)
        if math.isfinite(loss) and loss <= _EXPLODED * max(usual, 1.0):
            return
        became = (
            f"became {loss}" if not math.isfinite(loss) else f"exploded to {loss:.3g} (before: at most {usual:.3g})"
        )
        named = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise TrainingError(
            f"the loss {became} at step {self.state.global_step + 1} (SubTB {flow:.3g}, value {value:.3g}) on the "
            f"pairs {named}: lower the learning rate (now {s.learning_rate:g}) or rho (now {s.rho:g}), look at these "
            "pairs, or train in float32"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """To the reporters, with both losses of the step."""
        if "loss" in logs:
            logs |= dict(zip(("loss", "subtb", "value"), self.progress.history[-1], strict=True))
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Both losses on the held-out pairs, and in how many of them pi / pi_ref prefers the chosen answer (ties half).

        Every process evaluates all pairs, so that all of them stop and keep the best at the same step.
        """
        assert self.model is not None
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        collate: Callable[[list[tuple[_Side, _Side]]], dict[str, Any]] = self.data_collator  # type: ignore[assignment]
        dataset, size = _Pairs(self.held_out, self.settings.seed), self.settings.batch_size
        flows, values, right = 0.0, [], 0.0
        for start in range(0, len(dataset), size):
            batch = collate([dataset[i] for i in range(start, min(start + size, len(dataset)))])
            count = len(batch.pop("pair_ids"))
            inputs = self._prepare_inputs(batch)
            forks = len(inputs["value_pairs"])
            with self.compute_loss_context_manager():
                flow, value, ratio_B = self._losses(model, inputs)
            flows += count * flow.item()
            values += [value.item()] * forks
            margins = ratio_B[0::2] - ratio_B[1::2]
            right += (margins > 0).sum().item() + 0.5 * (margins == 0).sum().item()
        model.train(was_training)
        flow_mean, value_mean = flows / len(dataset), statistics.fmean(values) if values else 0.0
        metrics = {
            "eval_loss": flow_mean + self.settings.value_weight * value_mean,
            "eval_subtb": flow_mean,
            "eval_value": value_mean,
            "eval_reward_accuracy": right / len(dataset),
        }
        if not math.isfinite(metrics["eval_loss"]):
            metrics["eval_loss"] = math.inf  # never the best; the next step says what is wrong
        self.progress.evaluations.append({"step": self.state.global_step, **metrics})
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint's weights: what is trained, not the frozen base; never numbers that are not finite."""
        assert self.model is not None
        assert output_dir is not None
        doctor = self.accelerator.unwrap_model(self.model)
        _require_finite(doctor, self.state.global_step, self.settings)
        if self.args.should_save:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            trained = {n: p.detach().cpu().contiguous() for n, p in doctor.named_parameters() if p.requires_grad}
            save_file(trained, folder / "model.safetensors")
            self.progress.save(folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The frozen base is not in a checkpoint, on purpose."""

    def summary(self) -> dict[str, Any]:
        """Steps, tokens, and both losses averaged over the first and the last tenth of the run."""
        summary = {"steps": self.state.global_step, **self.progress.summary()}
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = self.state.best_global_step
            summary["held_out"] = next(e for e in self.progress.evaluations if e["step"] == best)
        return summary


class _Progress(TrainerCallback):
    """Collects both losses and tells ``on_step`` about each optimiser step."""

    def __init__(self, on_step: Callable[[TrainStep], None] | None) -> None:
        self.on_step = on_step
        self.history: list[tuple[float, ...]] = []  # (loss, SubTB, value) of every optimiser step
        self.pending: list[tuple[float, float, float]] = []
        self.tokens = 0
        self.tokens_before = 0  # of the runs that this one continues
        self.evaluations: list[dict[str, float]] = []
        self.interrupted = False
        self.started = time.monotonic()

    def save(self, folder: Path) -> None:
        """Into a checkpoint."""
        write_json(
            folder / "progress.json",
            {"history": self.history, "evaluations": self.evaluations, "tokens": self.tokens},
        )

    def restore(self, folder: Path) -> None:
        """From a checkpoint."""
        held = read_json(folder / "progress.json")
        self.history = [tuple(row) for row in held["history"]]
        self.evaluations = held["evaluations"]
        self.tokens = self.tokens_before = held["tokens"]

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
            speed = (self.tokens - self.tokens_before) / max(time.monotonic() - self.started, 1e-9)
            loss, flow, value = self.history[-1]
            accuracy = self.evaluations[-1]["eval_reward_accuracy"] if self.evaluations else None
            self.on_step(TrainStep(state.global_step, state.max_steps, loss, flow, value, speed, accuracy))
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def summary(self) -> dict[str, Any]:
        """Both losses at either end of the run, and the tokens seen."""
        tenth = math.ceil(len(self.history) / 10)

        def mean(rows: list[tuple[float, ...]]) -> dict[str, float]:
            columns = zip(("loss", "subtb", "value"), zip(*rows, strict=True), strict=True)
            return {name: round(sum(column) / len(column), 6) for name, column in columns}

        held_out = {"held_out": self.evaluations[-1]} if self.evaluations else {}
        ends = {"first": mean(self.history[:tenth]), "last": mean(self.history[-tenth:])}
        return {"tokens": self.tokens, **ends, **held_out}


class _Epochs(TrainerCallback):
    """Tells the pairs their epoch: accelerate's own ``set_epoch`` does not reach them when it skips or shards."""

    def __init__(self, pairs: "_Pairs") -> None:
        self.pairs = pairs

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.pairs.epoch = int(state.epoch or 0)


class _Pairs(torch.utils.data.Dataset[tuple[_Side, _Side]]):
    """Which same-prefix rivals are seen depends on seed, epoch and pair alone: a resumed run draws the same ones."""

    def __init__(self, pairs: Sequence[tuple[_Side, _Side]], seed: int) -> None:
        self.pairs, self.seed, self.epoch = pairs, seed, 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[_Side, _Side]:
        generator = torch.Generator().manual_seed(hash((self.seed, self.epoch, index)) & (2**63 - 1))
        chosen, rejected = (
            replace(
                side, others=[side.others[k] for k in torch.randperm(len(side.others), generator=generator).tolist()]
            )
            for side in self.pairs[index]
        )
        return chosen, rejected


class _Collator:
    """Pads a batch: 2B scored rows (chosen, rejected, ...), then one row for every same-prefix alternative.

    ``value_pairs`` [P, 4] holds (row, state, other row, other state): log V should be greater at the first. At the fork
    of a pair, where its responses first differ, these are the states after either token (the paper). Alternatives cost
    a row each, up to their token, on which nothing but log V is learnt.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.alternatives = settings.alternatives

    def __call__(self, pairs: list[tuple[_Side, _Side]]) -> dict[str, Any]:
        sides = [side for pair in pairs for side in pair]
        rows = [(side.prompt, side.response) for side in sides]
        value_pairs: list[tuple[int, int, int, int]] = []
        for i, (chosen, rejected) in enumerate(pairs):
            fork = _fork(chosen.response, rejected.response)
            if fork is not None and torch.equal(chosen.prompt, rejected.prompt):
                value_pairs.append((2 * i, fork + 1, 2 * i + 1, fork + 1))
        for row, side in enumerate(sides):
            for position, rival, better in side.others[: self.alternatives]:
                own, other = (row, position + 1), (len(rows), position + 1)
                value_pairs.append((*other, *own) if better else (*own, *other))
                rows.append((side.prompt, torch.cat([side.response[:position], torch.tensor([rival])])))
        batch = _padded(rows)
        longest = int(batch["response_lengths"].max())

        def padded(parts: list[Tensor]) -> Tensor:
            return nn.functional.pad(pad_sequence(parts, batch_first=True), (0, longest - max(map(len, parts))))

        references = [side.reference for side in sides if side.reference is not None]
        return {
            **batch,
            "rewards": padded([side.rewards for side in sides]),
            **({"reference": padded(references)} if references else {}),
            "pair_ids": [chosen.pair_id for chosen, _ in pairs],
            "value_pairs": torch.tensor(value_pairs, dtype=torch.long).reshape(-1, 4),
        }


def _padded(rows: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """(prompt, response) rows as the doctor takes them, right-padded."""
    sequences = [torch.cat(parts) for parts in rows]
    lengths = torch.tensor([len(s) for s in sequences])
    input_ids = pad_sequence(sequences, batch_first=True)
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
        "prompt_lengths": torch.tensor([len(prompt) for prompt, _ in rows]),
        "response_lengths": torch.tensor([len(response) for _, response in rows]),
    }


def sides(
    pair: PairScores, settings: RewardSettings, weights: dict[str, float], ceiling: float | None = None
) -> tuple[_Side, _Side]:
    """A scored pair (chosen, rejected) as ``TFPOTrainer`` takes it; ``weights`` are those of ``face_weights``.

    A departure from the paper: rewards above ``ceiling`` count as the ceiling.
    """
    chosen, rejected = (_side(scores, settings, weights, ceiling) for scores in (pair.chosen, pair.rejected))
    return chosen, rejected


def _side(
    scores: TokenScores, settings: RewardSettings, weights: dict[str, float], ceiling: float | None = None
) -> _Side:
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
        scores.pair_id,
        torch.from_numpy(scores.prompt_ids).long(),
        torch.from_numpy(scores.response_ids).long(),
        torch.from_numpy(rewards).clamp(max=math.inf if ceiling is None else ceiling),
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
