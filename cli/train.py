"""``llmdoctor train``: stage 2, token rewards to a doctor."""

import shlex
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmdoctor.cli import options
from llmdoctor.cli.options import option
from llmdoctor.cli.terminal import flat_lines, progress, put, put_json, say, waiting
from llmdoctor.errors import UsageError
from llmdoctor.show.formats import counted, short_name

if TYPE_CHECKING:
    from llmdoctor.profile import Profile
    from llmdoctor.records import TrainStep


@options.derived
def train(
    *,
    profile: options.ProfileName = None,
    rewards: Annotated[Path, option("--rewards", "Rewards folder (default: outputs/rewards).")] = Path(
        "outputs/rewards"
    ),
    output: Annotated[
        Path, option("--output", "Doctor folder (default: outputs/doctor).", short="-o", env="TRAIN_OUTPUT")
    ] = Path("outputs/doctor"),
    name: Annotated[
        str, option("--name", "What this doctor is called, as in --beta NAME=X (default: doctor).", env="TRAIN_NAME")
    ] = "doctor",
    training: options.Train,
    face: options.FaceNames = None,
    rewarding: options.Rewards,
    fresh: Annotated[bool, option("--fresh", "Start from scratch, and replace what another run made.")] = False,
    patient: options.Patient = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Train a small doctor on a rewards folder.

    The same command again continues a run that was stopped, from its last checkpoint. A finished doctor of other
    settings is only replaced with --fresh. With --patient, or with a
    profile named, the rewards must come from that patient. With no profile named, rewards of another patient than the
    clinic's are trained on with general settings, not the clinic's own.
    """
    from llmdoctor.profile import override

    settings = options.load(profile)
    override(settings.train, **training)  # a bad value is reported before anything is read
    override(settings.rewards, **rewarding)
    with waiting("Reading the rewards ..."):
        from llmdoctor.token_rewards.folder import RewardsFolder
        from llmdoctor.token_rewards.formula import face_names

        folder = RewardsFolder(rewards)
        settings = options.fitting(settings, profile, folder.meta["patient"]["fingerprint"])
        chosen = override(settings.train, **training)
        reward_settings = options.reward_settings(settings, available=folder.signals, faces=face, **rewarding)
    if chosen.method == "head" and not training["doctor"]:  # it is one on the patient's own states
        chosen = override(chosen, doctor=folder.meta["patient"]["model"])
    if chosen.doctor is None:
        held = short_name(folder.meta["patient"]["model"])
        raise UsageError(f"profile {settings.name} names no base model for a doctor of {held}: give --doctor MODEL")
    used = ", ".join(face_names(folder.signals, reward_settings))
    say(f"training {short_name(chosen.doctor)} on {counted(len(folder), 'pair')} of {rewards} (rewards from: {used})")

    with waiting(f"Loading {short_name(chosen.doctor)} ..."):
        from llmdoctor.training.train import train as train_doctor
    began, steps = time.monotonic(), 0
    with progress("Training", None, "step") as advance:

        def on_step(step: "TrainStep") -> None:
            nonlocal steps
            steps += 1
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
    if not steps:
        say(f"{output} holds this very doctor already: nothing was changed. --fresh trains it again")
    if as_json:
        put_json({**report, "changed": bool(steps)})
        return
    metrics = made.get("metrics") or {}
    held = metrics.get("pairs_held_out", 0)
    kept = f", {counted(held, 'pair')} held out (whole prompts)" if held else ""
    learnt = counted(metrics.get("pairs", 0) - held, "pair")
    first = f"trained {short_name(chosen.doctor)} on {learnt}{kept}; wrote {output} in {report['seconds']:.1f} s"
    lines = [first if steps else f"{output} is finished", *flat_lines(metrics), "", _held_out(metrics)]
    put("\n".join([*lines, "", "next:", *_next(output, folder.meta["patient"], settings, profile, chosen.method)]))


def _held_out(metrics: Mapping[str, Any]) -> str:
    """How well the doctor did on pairs that it was not trained on."""
    if not (found := metrics.get("prefers_chosen")):
        return "no pairs were held out: --holdout 0.1 keeps some back and says how well the doctor does on them"
    from llmdoctor.cli.evaluation_report import verdict
    from llmdoctor.cli.measures_table import as_estimate

    chosen = as_estimate(found)
    pairs = counted(metrics["pairs_held_out"], "held-out pair")
    share = f"{chosen.value:.1%} of {pairs} (95%: {chosen.low:.1%} to {chosen.high:.1%}; chance is 50%)"
    return f"the doctor prefers the chosen answer in {share}: it {verdict(chosen)}"


def _next(
    output: Path, patient: Mapping[str, Any], settings: "Profile", profile: str | None, method: str
) -> Iterator[str]:
    """The commands that try the doctor."""
    from llmdoctor.model_source import model_fingerprint

    named = ["--profile", profile] if profile else []
    if patient["fingerprint"] != model_fingerprint(settings.patient.model):
        named = ["--patient", patient["model"]]
    how = [*named, *(["--mode", "ratio"] if method == "head" else [])]
    folder = str(output)
    yield "  " + shlex.join(["llmdoctor", "chat", "--doctor", folder, *how])
    yield "  " + shlex.join(["llmdoctor", "eval", folder, "--data", "PAIRS", "--prompts", "PROMPTS", *how])
