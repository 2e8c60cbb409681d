"""Transformers' Trainer: as both kinds of training use it, and with the TFPO objective."""

import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerState, TrainingArguments

from llmdoctor.errors import StorageError, TrainingError
from llmdoctor.files import storage_errors
from llmdoctor.models import pick_device
from llmdoctor.records import TrainStep
from llmdoctor.settings import TrainSettings
from llmdoctor.training.batches import Collator, Pairs, ScoredPair, ScoredResponse, SetEpoch, pad_rows
from llmdoctor.training.checkpoints import (
    checkpoint_step,
    finishing_the_step,
    last_checkpoint,
    resume_point,
    whole_checkpoints,
)
from llmdoctor.training.doctor import Doctor, DoctorOutput
from llmdoctor.training.losses import anchored, log_flow, state_mask, subtb, value_discrimination
from llmdoctor.training.progress import Losses, Progress

# A loss has exploded when it is _EXPLODED times the greatest of the last _RECENT steps, and of 1.
_EXPLODED = 100.0
_RECENT = 50
KEPT_NUMBERS = 1 << 29  # states of at most 2 GiB in float32 are kept, in each process


class ResumableTrainer(Trainer):
    """A Trainer that reports every step and whose checkpoints hold what is trained, not the frozen rest.

    ``scratch`` is the folder for checkpoints.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        scratch: str,
        progress: Progress[Any],
        *,
        train: torch.utils.data.Dataset[Any] | Sequence[Any],
        held_out: torch.utils.data.Dataset[Any] | None = None,
        collator: Callable[[list[Any]], dict[str, Any]],
    ) -> None:
        self.settings, self.progress = settings, progress
        super().__init__(
            model=model,
            args=_arguments(settings, scratch, evaluates=held_out is not None),
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=collator,
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(progress)

    def run(self, work: Path, identity: dict[str, Any], *, fresh: bool) -> None:
        """Train to the end, from the last checkpoint in ``work`` if there is one of this ``identity``.

        Raises KeyboardInterrupt after an interrupted step was kept, TrainingError when weights are not finite, and
        StorageError when a checkpoint cannot be written; the last whole one is kept. A failed run without any does not
        leave ``work``.
        """
        assert self.model is not None
        first = self.is_world_process_zero()
        try:
            checkpoint = resume_point(work, identity, fresh=fresh, first=first)
            self.accelerator.wait_for_everyone()  # all have looked before any process writes a checkpoint
            with finishing_the_step(self.progress), storage_errors(work):
                if checkpoint:
                    self.progress.restore(checkpoint)
                if checkpoint is None or not self._ended_with(checkpoint):
                    self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if self.progress.interrupted:
                raise KeyboardInterrupt
            require_finite(self.model, self.state.global_step, self.settings)
        except TrainingError as error:
            if first:  # the checkpoint of this very step holds the weights that gave the bad loss
                shutil.rmtree(work / f"checkpoint-{self.state.global_step}", ignore_errors=True)
            kept = last_checkpoint(work)
            where = f", except the checkpoint of step {checkpoint_step(kept)} in {work}" if kept else ""
            raise TrainingError(f"{error}; nothing was written{where}") from error
        except StorageError as error:
            kept = last_checkpoint(work)
            if first:
                for half in set(work.glob("checkpoint-*")) - whole_checkpoints(work):
                    shutil.rmtree(half, ignore_errors=True)
            where = f" The checkpoint of step {checkpoint_step(kept)} in {work} is kept." if kept else ""
            raise StorageError(f"{error}{where}") from error
        finally:
            if first and last_checkpoint(work) is None:
                shutil.rmtree(work, ignore_errors=True)

    def _ended_with(self, checkpoint: Path) -> bool:
        """Whether a run ended with this checkpoint, and was killed later. Its weights and state are then taken.

        The Trainer would take another step, and would not notice that the run has ended until after it.
        """
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        stopping: Any = state.stateful_callbacks.get("EarlyStoppingCallback", {})
        waited = stopping.get("attributes", {}).get("early_stopping_patience_counter", 0)
        patience = self.settings.patience
        if state.global_step < state.max_steps and (patience is None or waited < patience):
            return False
        best = self.args.load_best_model_at_end and state.best_global_step
        weights = checkpoint.with_name(f"checkpoint-{best}") if best else checkpoint
        self.state = state
        self._load_from_checkpoint(str(weights))
        return True

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write a checkpoint's trained weights, not the frozen base. Raises TrainingError unless all are finite."""
        assert self.model is not None
        assert output_dir is not None
        model = self.accelerator.unwrap_model(self.model)
        require_finite(model, self.state.global_step, self.settings)
        if self.args.should_save:
            folder = Path(output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            trained = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
            save_file(trained, folder / "model.safetensors")
            self.progress.save(folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say nothing: the Trainer would warn that the checkpoint lacks the frozen base, which it does on purpose."""


class TFPOTrainer(ResumableTrainer):
    """Token-level flow-guided preference optimisation: L = L_SubTB + lambda * L_value (arXiv 2601.10416).

    ``scratch`` is the folder for checkpoints. With ``held_out`` pairs the run evaluates on them as often as it writes
    a checkpoint.
    """

    def __init__(
        self,
        doctor: nn.Module,
        pairs: Sequence[ScoredPair],
        settings: TrainSettings,
        scratch: str,
        on_step: Callable[[TrainStep], None] | None,
        held_out: Sequence[ScoredPair] = (),
    ) -> None:
        self.held_out = held_out
        dataset = Pairs(pairs, settings.seed)

        def report(step: int, last: int, losses: Losses, speed: float) -> None:
            evaluations = self.progress.evaluations
            accuracy = evaluations[-1]["eval_reward_accuracy"] if evaluations else None
            if on_step:
                on_step(TrainStep(step, last, *losses, speed, accuracy))

        super().__init__(
            doctor,
            settings,
            scratch,
            Progress(Losses, report),
            train=dataset,
            held_out=Pairs(held_out, settings.seed) if held_out else None,
            collator=Collator(settings),
        )
        self.add_callback(SetEpoch(dataset))
        if held_out and settings.patience:
            self.add_callback(EarlyStoppingCallback(settings.patience))
        # the evaluation reports log(pi / pi_ref), so held-out responses need their reference with either flow
        # where a head keeps its states, they are read in the same pass
        needed = pairs if settings.flow == "relative" or settings.method == "head" else ()
        self._compute_references([side for pair in [*needed, *held_out] for side in pair])

    @torch.no_grad()
    def _compute_references(self, responses: Sequence[ScoredResponse]) -> None:
        """Set every response's log-probs under the doctor's base: once, because the base does not change.

        A doctor that changes only what the head reads has the base's own states. They are kept, if they fit, and the
        layers below the head then run only here.
        """
        doctor, size = self.model, 2 * self.settings.batch_size
        assert isinstance(doctor, Doctor)
        numbers = sum(len(side.response) + 1 for side in responses) * doctor.value_head.in_features
        # the row of an alternative ends with another token, so its states are others
        keep = doctor.change is not None and not self.settings.alternatives and numbers <= KEPT_NUMBERS
        doctor.eval()  # no dropout in the reference
        # longest first, so that rows of like length share a batch and a batch too large fails at once
        waiting = sorted((side for side in responses if side.reference is None), key=lambda side: -len(side.response))
        for start in range(0, len(waiting), size):
            rows = waiting[start : start + size]
            batch = self._prepare_inputs(pad_rows([(side.prompt, side.response) for side in rows]))
            with doctor.base_alone(), self.compute_loss_context_manager():
                states_B_N_H = doctor.states(**batch)
                logprobs_B_T = doctor(**batch, scored=len(rows), states=states_B_N_H).logprobs_B_T.cpu()
            for logprobs_T, states_N_H, side in zip(logprobs_B_T, states_B_N_H, rows, strict=True):
                side.reference = logprobs_T[: len(side.response)].clone()
                if keep:
                    side.states = states_N_H[: len(side.response) + 1].cpu().clone()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with the value head at its own learning rate when the settings give one."""
        if self.optimizer is not None or (rate := self.settings.value_learning_rate) is None:
            return super().create_optimizer(*args, **kwargs)
        assert self.model is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        head = {id(p) for n, p in self.model.named_parameters() if "value_head" in n}
        # split each group in two rather than make new ones: weight decay and what is exempt from it stay as they are
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
        """The mean loss of a batch from the collator. Raises TrainingError when it is not finite or has exploded."""
        ids = inputs.pop("pair_ids")
        tokens = int(inputs["response_lengths"][: len(inputs["rewards"])].sum())
        flow_loss, value_loss, _ = self.losses(model, inputs)
        loss = flow_loss + self.settings.value_weight * value_loss
        report = torch.stack([loss.detach(), flow_loss.detach(), value_loss.detach(), loss.new_tensor(tokens)])
        if (processes := self.accelerator.num_processes) > 1:  # their gradients are averaged as well
            report = self.accelerator.reduce(report, "mean")
        *means, mean_tokens = report.tolist()
        self._require_sane(losses := Losses(*means), ids)
        self.progress.add(losses, round(mean_tokens * processes))
        return loss

    def losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(SubTB, value loss, log-ratio): two scalars and sum_t log(pi / pi_ref) of every scored row [2B].

        ``inputs`` is the collator's batch without its pair_ids. The log-ratio is 0 where there is no reference.
        """
        s = self.settings
        rewards_B_T, value_pairs_P_4 = inputs.pop("rewards"), inputs.pop("value_pairs")
        reference_B_T = inputs.pop("reference", None)
        scored = len(rewards_B_T)
        out: DoctorOutput = model(**inputs, scored=scored)
        lengths_R = inputs["response_lengths"]
        mask_R_T = torch.arange(int(lengths_R.max()), device=lengths_R.device) < lengths_R[:, None]
        values_R_N = anchored(out.log_values_R_N, mask_R_T) if s.anchor else out.log_values_R_N
        # an alternative's row stops in mid-response: its last state is not the end of one and stays free
        values_R_N = torch.cat([values_R_N[:scored], out.log_values_R_N[scored:]])
        mask_B_T = mask_R_T[:scored]
        relative = reference_B_T if s.flow == "relative" else None
        flow_B_N = log_flow(
            out.logprobs_B_T, rewards_B_T, values_R_N[:scored], mask_B_T, rho=s.rho, ref_logprobs_B_T=relative
        )
        flow_loss = subtb(flow_B_N, state_mask(mask_B_T), s.subtb_weight, total=s.subtb == "sum").mean()
        row, state, other_row, other_state = value_pairs_P_4.unbind(dim=1)
        value_loss = value_discrimination(
            values_R_N[row, state], values_R_N[other_row, other_state], s.gamma, log=s.hinge == "log"
        )
        ratio_B_T = torch.zeros_like(out.logprobs_B_T)
        if reference_B_T is not None:
            ratio_B_T = out.logprobs_B_T.detach() - reference_B_T
        return flow_loss, value_loss, (ratio_B_T * mask_B_T).sum(dim=1)

    def _require_sane(self, losses: Losses, ids: list[str]) -> None:
        s, usual = self.settings, max((row.loss for row in self.progress.history[-_RECENT:]), default=math.inf)
        if math.isfinite(losses.loss) and losses.loss <= _EXPLODED * max(usual, 1.0):
            return
        if math.isfinite(losses.loss):
            became = f"exploded to {losses.loss:.3g} (before: at most {usual:.3g})"
        else:
            became = f"became {losses.loss}"
        named = ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise TrainingError(
            f"the loss {became} at step {self.state.global_step + 1} (SubTB {losses.subtb:.3g}, value "
            f"{losses.value:.3g}) on the pairs {named}: lower the learning rate (now {s.learning_rate:g}) or rho (now "
            f"{s.rho:g}), look at these pairs, or train in float32"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add both losses of the step to what the reporters get."""
        if "loss" in logs:
            logs |= self.progress.history[-1]._asdict()
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Both losses on the held-out pairs, and the share of them in which pi / pi_ref prefers the chosen response.

        A tie counts half. Every process evaluates all pairs, so that all of them stop and keep the best at the same
        step.
        """
        assert self.model is not None
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        collate: Callable[[list[ScoredPair]], dict[str, Any]] = self.data_collator  # type: ignore[assignment]
        # epoch 0 always: evaluations compare the same alternatives
        dataset, size = Pairs(self.held_out, self.settings.seed), self.settings.batch_size
        flows, values, right = 0.0, [], 0.0
        for start in range(0, len(dataset), size):
            batch = collate([dataset[i] for i in range(start, min(start + size, len(dataset)))])
            count = len(batch.pop("pair_ids"))
            inputs = self._prepare_inputs(batch)
            compared = len(inputs["value_pairs"])
            with self.compute_loss_context_manager():
                flow, value, ratio_B = self.losses(model, inputs)
            # weigh each batch by what its means are over, so that the figures do not depend on the batch size
            flows += count * flow.item()
            values += [value.item()] * compared
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
            metrics["eval_loss"] = math.inf  # NaN would compare as the best; the next step raises TrainingError
        self.progress.evaluations.append({"step": self.state.global_step, **metrics})
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def summary(self) -> dict[str, Any]:
        """Steps, ``Progress.summary``, and under ``held_out`` the evaluation of the weights that were kept."""
        summary = {"steps": self.state.global_step, **self.progress.summary()}
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = self.state.best_global_step
            summary["held_out"] = next(e for e in self.progress.evaluations if e["step"] == best)
        return summary


def _arguments(settings: TrainSettings, scratch: str, *, evaluates: bool) -> TrainingArguments:
    device = pick_device(settings.device)
    # below 1 both mean a share of the run; from 1 on the Trainer wants an integer
    every = settings.checkpoint_every if settings.checkpoint_every < 1 else int(settings.checkpoint_every)
    return TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        warmup_steps=settings.warmup_ratio,  # below 1: a share of the run
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        max_grad_norm=settings.max_grad_norm,
        weight_decay=settings.weight_decay,
        seed=settings.seed,
        bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
        use_cpu=device.type == "cpu",
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        restore_callback_states_from_checkpoint=True,  # how many evaluations early stopping has waited for
        eval_strategy="steps" if evaluates else "no",
        eval_steps=every,
        load_best_model_at_end=evaluates and settings.keep_best,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False,
        ddp_find_unused_parameters=False,
        logging_strategy="steps" if settings.report_to else "no",
        logging_steps=1,
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )


def require_finite(model: nn.Module, step: int, settings: TrainSettings) -> None:
    """Raise TrainingError unless every trained weight is finite."""
    if not all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
        raise TrainingError(
            f"the weights are no longer finite numbers after step {step}: "
            f"lower the learning rate (now {settings.learning_rate:g}), or train in float32"
        )
