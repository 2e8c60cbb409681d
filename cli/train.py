"""``llmdoctor train``: stage 2, token rewards to a doctor."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmdoctor.cli import options
from llmdoctor.cli.options import option
from llmdoctor.cli.terminal import flat_lines, progress, put, put_json, say, waiting
from llmdoctor.errors import UsageError
from llmdoctor.show.formats import short_name

if TYPE_CHECKING:
    from llmdoctor.records import TrainStep


def train(
    *,
    profile: options.ProfileName = None,
    rewards: Annotated[Path, option("--rewards", "Rewards folder (default: outputs/rewards).")] = Path(
        "outputs/rewards"
    ),
    doctor: Annotated[
        str | None, option("--doctor", "Base model of the doctor: folder or hub name.", env="TRAIN_DOCTOR")
    ] = None,
    output: Annotated[
        Path, option("--output", "Doctor folder (default: outputs/doctor).", short="-o", env="TRAIN_OUTPUT")
    ] = Path("outputs/doctor"),
    name: Annotated[
        str, option("--name", "What this doctor is called, as in --beta NAME=X (default: doctor).", env="TRAIN_NAME")
    ] = "doctor",
    max_steps: Annotated[int | None, option("--max-steps", "Stop after N steps.", metavar="N")] = None,
    epochs: Annotated[float | None, option("--epochs", "Passes over the pairs.")] = None,
    batch_size: Annotated[int | None, option("--batch-size", "Pairs a step and device.")] = None,
    learning_rate: Annotated[float | None, option("--learning-rate", "Peak learning rate.")] = None,
    direction: options.DirectionName = None,
    tau: options.Tau = None,
    theta: options.Theta = None,
    face: options.FaceNames = None,
    flow: Annotated[str | None, option("--flow", "relative (to the doctor's base) or absolute (the paper).")] = None,
    anchor: Annotated[bool | None, option("--anchor/--no-anchor", "Fix log V at the end of an answer to 0.")] = None,
    rho: Annotated[float | None, option("--rho", "Scale of the rewards in log Q.")] = None,
    ceiling: Annotated[float | None, option("--ceiling", "Greatest reward of a token that counts (>= 0).")] = None,
    subtb_weight: Annotated[float | None, option("--subtb-weight", "Lambda of SubTB, in (0, 1]; 1 is even.")] = None,
    value_weight: Annotated[float | None, option("--value-weight", "Weight of the value loss.")] = None,
    gamma: Annotated[float | None, option("--gamma", "Margin of the value loss.")] = None,
    alternatives: Annotated[int | None, option("--alternatives", "Further same-prefix pairs a response.")] = None,
    method: Annotated[str | None, option("--method", "lora, or full: train every weight.")] = None,
    lora_rank: Annotated[int | None, option("--lora-rank", "Rank of the adapter.")] = None,
    holdout: Annotated[
        float | None, option("--holdout", "Share of the pairs that is only evaluated on, in [0, 1).")
    ] = None,
    checkpoint_every: Annotated[
        float | None,
        option("--checkpoint-every", "Evaluate and keep a checkpoint every N steps (< 1: share of the run)."),
    ] = None,
    patience: Annotated[int | None, option("--patience", "Stop after N evaluations that are no better.")] = None,
    keep_best: Annotated[
        bool | None, option("--keep-best/--keep-last", "End with the best evaluation's weights, or the last step's.")
    ] = None,
    report_to: Annotated[
        list[str] | None, option("--report-to", "Also tell tensorboard, wandb, ...; repeatable.", metavar="NAME")
    ] = None,
    fresh: Annotated[bool, option("--fresh", "Begin anew where a stopped run would be continued.")] = False,
    seed: options.Seed = None,
    patient: options.Patient = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Train a small doctor on a rewards folder.

    The same command again continues a run that was stopped, from its last checkpoint. With --patient, or with a
    profile named, the rewards must come from that patient. With no profile named, rewards of another patient than the
    clinic's are trained on with general settings, not the clinic's own.
    """
    from llmdoctor.profile import override

    settings = options.load(profile)
    asked = {
        "doctor": doctor,
        "max_steps": max_steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "flow": flow,
        "anchor": anchor,
        "rho": rho,
        "ceiling": ceiling,
        "subtb_weight": subtb_weight,
        "value_weight": value_weight,
        "gamma": gamma,
        "alternatives": alternatives,
        "method": method,
        "lora_rank": lora_rank,
        "holdout": holdout,
        "checkpoint_every": checkpoint_every,
        "patience": patience,
        "keep_best": keep_best,
        "report_to": tuple(report_to) if report_to else None,
        "seed": seed,
        "device": device,
        "dtype": dtype,
    }
    override(settings.train, **asked)  # a bad value is said before anything is read
    override(settings.rewards, direction=direction, tau=tau, theta=theta)
    with waiting("Reading the rewards ..."):
        from llmdoctor.token_rewards.folder import RewardsFolder

        folder = RewardsFolder(rewards)
        settings = options.fitting(settings, profile, folder.meta["patient"]["fingerprint"])
        chosen = override(settings.train, **asked)
        reward_settings = options.reward_settings(
            settings, available=folder.faces, faces=face, direction=direction, tau=tau, theta=theta
        )
    if chosen.doctor is None:
        held = short_name(folder.meta["patient"]["model"])
        raise UsageError(f"profile {settings.name} names no base model for a doctor of {held}: give --doctor MODEL")
    used = ", ".join(reward_settings.faces or folder.faces)
    say(f"training {short_name(chosen.doctor)} on {len(folder)} pairs of {rewards} (faces: {used})")

    with waiting(f"Loading {short_name(chosen.doctor)} ..."):
        from llmdoctor.training.train import train as train_doctor
    began = time.monotonic()
    with progress("Training", None, "steps") as advance:

        def on_step(step: "TrainStep") -> None:
            losses = f"loss {step.loss:.4g} (flow {step.subtb:.4g}, value {step.value:.4g})"
            if step.reward_accuracy is not None:
                losses += f", held-out accuracy {step.reward_accuracy:.0%}"
            advance(f"{losses}, {step.tokens_per_second:.0f} tokens/s", done=step.step, total=step.total)

        made = train_doctor(
            rewards,
            output,
            base_model=chosen.doctor,
            reward_settings=reward_settings,
            settings=chosen,
            name=name,
            patient=patient or (settings.patient.model if profile else None),
            trust_remote_code=trust_remote_code,
            fresh=fresh,
            on_step=on_step,
        )
    report: dict[str, Any] = {
        "output": str(output),
        "rewards": str(rewards),
        "read": len(folder),
        "seconds": round(time.monotonic() - began, 2),
        "doctor": made,
    }
    if as_json:
        put_json(report)
        return
    lines = [f"trained {short_name(chosen.doctor)} on {len(folder)} pairs; wrote {output} in {report['seconds']:.1f} s"]
    put("\n".join(lines + flat_lines(made.get("metrics") or {})))
