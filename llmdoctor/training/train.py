"""Stage 2: train a doctor on token rewards."""

import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

from llmdoctor import __version__
from llmdoctor.answers import estimates_to_dict, wilson
from llmdoctor.errors import DataError, LLMDoctorWarning, LoadError, UsageError
from llmdoctor.files import DOCTOR, atomic_path, ensure_replaceable, locked
from llmdoctor.harmless import require_unicode
from llmdoctor.models import Vocabulary, load_tokenizer, model_fingerprint, require_embedded
from llmdoctor.records import TokenScores, TrainStep
from llmdoctor.settings import RewardSettings, TrainSettings
from llmdoctor.token_rewards.fit import face_weights
from llmdoctor.token_rewards.folder import RewardsFolder
from llmdoctor.training.batches import ScoredPair, hold_out, sides
from llmdoctor.training.checkpoints import finished, require_no_other, run_key
from llmdoctor.training.doctor import Doctor, new_doctor
from llmdoctor.training.folder import base_record, require_base_outside, save_doctor
from llmdoctor.training.progress import draw_losses
from llmdoctor.training.shrunk import shrunk_from_another
from llmdoctor.training.trainer import TFPOTrainer

_NOT_RECORDED = {"doctor", "device", "report_to"}  # settings that do not change what is trained, or are said elsewhere


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

    ``patient``, when given, must be the patient whose log-probs the rewards were made from. ``name`` is the doctor's
    name, by default that of its folder. ``on_step`` is called after every optimiser step. Returns the content of
    doctor.json: base model, tokenizer fingerprint, settings, the origin of the rewards, metrics.

    Until the doctor is done, checkpoints are kept beside it in ``.NAME.training``. The same call continues a run that
    was stopped and ends, on one device, with the same weights as an uninterrupted run; ``fresh`` starts from scratch
    instead. A run that is finished already is not repeated: what it wrote is returned. Only ``fresh`` replaces what
    another run has finished.

    An interrupt (Ctrl+C, SIGTERM) lets the current step end and keeps it; a second one stops at once.
    TensorBoard's files go to ``NAME.logs`` beside the doctor, unless TENSORBOARD_LOGGING_DIR names a folder.

    Raises LoadError (no such model or rewards, another tokenizer, another patient), DataError (no pair fits the
    doctor's context), UsageError (another run was stopped, finished or goes on here, a reporter that is not installed),
    TrainingError (the loss is not finite or explodes), StorageError. In each case ``output`` is unchanged and the last
    checkpoint is kept.
    """
    output = Path(output)
    ensure_replaceable(output, DOCTOR)
    require_unicode(name or "", "the name of the doctor")
    require_base_outside(base_model, output)
    _require_reporters(settings.report_to)
    first = os.environ.get("RANK", "0") == "0"  # of several processes it locks for all
    with locked(output, beside=True) if first else nullcontext():
        return _train(
            rewards,
            output,
            base_model=base_model,
            reward_settings=reward_settings,
            settings=settings,
            patient=patient,
            name=name,
            trust_remote_code=trust_remote_code,
            fresh=fresh,
            on_step=on_step,
        )


def _train(
    rewards: Path,
    output: Path,
    *,
    base_model: str,
    reward_settings: RewardSettings,
    settings: TrainSettings,
    patient: str | None,
    name: str | None,
    trust_remote_code: bool,
    fresh: bool,
    on_step: Callable[[TrainStep], None] | None,
) -> dict[str, Any]:
    folder = RewardsFolder(rewards)
    _require_patient(folder, patient)
    held = folder.meta["patient"]
    if problem := shrunk_from_another(base_model, held["fingerprint"], held["model"]):
        if not held.get("quantization"):
            raise LoadError(problem)
        # a quantised patient cannot be shrunk: the model that it was made of is its nearest relative
        warnings.warn(problem, LLMDoctorWarning, stacklevel=2)
    doctor, tokenizer = new_doctor(base_model, settings, trust_remote_code=trust_remote_code)
    _require_tokenizer(folder, doctor.vocabulary, base_model)
    weights = face_weights(folder, folder.signals, reward_settings)
    pairs = _fitting_pairs(folder, doctor, tokenizer, reward_settings, weights, settings.ceiling)
    training, held_out = hold_out(pairs, settings.holdout, settings.seed)

    work = output.with_name(f".{output.name}.training")
    started = time.monotonic()
    identity = _identity(folder, len(pairs), base_model, reward_settings, settings, weights)
    key = run_key({**identity, "name": name or output.name, "version": __version__})
    described = {
        "llmdoctor_version": __version__,
        "name": name or output.name,
        **base_record(base_model, output),
        "tokenizer": {"fingerprint": doctor.vocabulary.fingerprint, "size": doctor.vocabulary.size},
        "settings": {
            "rewards": reward_settings.model_dump(mode="json"),
            "train": settings.model_dump(mode="json", exclude=_NOT_RECORDED),
            "face_weights": weights,
        },
        "rewards": {
            "patient": folder.meta["patient"]["model"],
            "patient_fingerprint": folder.meta["patient"]["fingerprint"],
            "patient_quantization": folder.meta["patient"].get("quantization"),
            "dataset_fingerprint": folder.meta["dataset"]["fingerprint"],
            "pairs": len(folder),
        },
    }
    if not fresh and not work.exists():
        if done := finished(output / DOCTOR, key):
            return done
        require_no_other(output, DOCTOR, "doctor", _told, described)
    trainer = TFPOTrainer(doctor, training, settings, str(work), on_step, held_out)
    _log_beside(output, trainer)
    trainer.run(work, identity, fresh=fresh)

    meta = {
        **described,
        "run": key,
        "metrics": {
            **(summary := trainer.summary()),
            **_preference(summary, held_out),
            "pairs": len(pairs),
            "pairs_held_out": len(held_out),
            "pairs_too_long": len(folder) - len(pairs),
            "seconds": round(time.monotonic() - started, 2),
        },
    }
    if trainer.is_world_process_zero():
        save_doctor(output, doctor, tokenizer, meta, trust_remote_code=trust_remote_code)
        with atomic_path(output / "losses.svg") as picture:
            draw_losses(trainer.progress.history, trainer.progress.evaluations, picture)
        shutil.rmtree(work, ignore_errors=True)
    if trainer.accelerator.num_processes > 1:
        trainer.accelerator.wait_for_everyone()  # no process returns before the doctor is written
        trainer.accelerator.end_training()
    return meta


def _told(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a doctor.json says of its run, but for places, which may differ."""
    settings = meta.get("settings", {})
    told = {key: meta.get(key) for key in ("name", "base_fingerprint", "llmdoctor_version")}
    told |= {**settings.get("train", {}), **settings.get("rewards", {}), "face_weights": settings.get("face_weights")}
    told |= {key: value for key, value in meta.get("rewards", {}).items() if key != "patient"}
    return told


def _require_reporters(names: Sequence[str]) -> None:
    """Raise UsageError for a reporter that cannot be made, before anything is loaded."""
    for name in names:
        try:
            for reporter in get_reporting_integration_callbacks([name]):
                reporter()
        except (ImportError, RuntimeError, ValueError) as error:
            raise UsageError(f"cannot report to {name!r}: {str(error).strip()}") from error


def _require_patient(folder: RewardsFolder, patient: str | None) -> None:
    if patient is None:
        return
    held = folder.meta["patient"]
    if model_fingerprint(patient) != held["fingerprint"]:
        raise LoadError(
            f"the rewards in {folder.path} were drawn from the patient {held['model']}, not from {patient}: "
            "run extract with this patient, or train without naming one"
        )


def _require_tokenizer(folder: RewardsFolder, vocabulary: Vocabulary, base_model: str) -> None:
    if vocabulary.fingerprint != folder.meta["tokenizer"]["fingerprint"]:
        # loaded only now, to name the first token that differs
        theirs = Vocabulary.of(load_tokenizer(folder.path / "tokenizer"))
        theirs.require_same(vocabulary, f"the patient {folder.meta['patient']['model']}", f"the doctor {base_model}")


def _fitting_pairs(
    folder: RewardsFolder,
    doctor: Doctor,
    tokenizer: PreTrainedTokenizerBase,
    settings: RewardSettings,
    weights: dict[str, float],
    ceiling: float | None,
) -> list[ScoredPair]:
    """The pairs of which both sequences fit the doctor's context. Raises DataError when there is none."""
    context = getattr(doctor.lm.config.get_text_config(), "max_position_embeddings", None) or math.inf

    def fits(scores: TokenScores) -> bool:
        if not len(scores.prompt_ids):  # log V of the first state is read behind it
            raise LoadError(f"pair {scores.pair_id} in {folder.path} has an empty prompt: run extract again")
        return len(scores.prompt_ids) + len(scores.response_ids) <= context

    pairs = [sides(pair, settings, weights, ceiling) for pair in folder if fits(pair.chosen) and fits(pair.rejected)]
    model, name = doctor.lm, f"the doctor's base {getattr(doctor.lm.config, 'name_or_path', '')}"
    ids = (int(part.max()) for pair in pairs for side in pair for part in (side.prompt, side.response))
    require_embedded(model, tokenizer, ids, name)  # type: ignore[arg-type]
    if not pairs:
        raise DataError(
            f"none of the {len(folder)} pairs in {folder.path} fits the doctor's context of {context} tokens"
        )
    if not any(side.rewards.any() for pair in pairs for side in pair):
        raise DataError(
            f"no token of the {len(pairs)} pairs in {folder.path} has a reward: tau {settings.tau:g} and theta "
            f"{settings.theta:g} prune every gap. Lower them, or look at the gaps with inspect --show gap"
        )
    return pairs


def _preference(summary: Mapping[str, Any], held_out: Sequence[ScoredPair]) -> dict[str, Any]:
    """The share of held-out pairs in which the doctor prefers the chosen answer, and its 95% interval over prompts."""
    if "held_out" not in summary:
        return {}
    prompts = {tuple(chosen.prompt.tolist()) for chosen, _ in held_out}
    return estimates_to_dict({"prefers_chosen": wilson(summary["held_out"]["eval_reward_accuracy"], len(prompts))})


def _log_beside(output: Path, trainer: TFPOTrainer) -> None:
    """Point TensorBoard at ``NAME.logs``. By default it would write into the working folder, which is removed."""
    for callback in trainer.callback_handler.callbacks:
        # set on this run's own callback: in the environment it would also hold for the process's next run
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(output.with_name(f"{output.name}.logs"))


def _identity(
    folder: RewardsFolder,
    pairs: int,
    base_model: str,
    reward_settings: RewardSettings,
    settings: TrainSettings,
    weights: dict[str, float],
) -> dict[str, Any]:
    """What must be equal for a stopped run to be continued."""
    return {
        "base_model": model_fingerprint(base_model),
        "rewards": folder.meta["dataset"]["fingerprint"],
        "patient": folder.meta["patient"]["fingerprint"],
        "pairs": pairs,
        "face_weights": weights,  # of direction "fitted": a probe that is added to the folder changes them
        "reward_settings": reward_settings.model_dump(mode="json"),
        "settings": settings.model_dump(mode="json", exclude=_NOT_RECORDED),
    }
