"""``llmdoctor shrink``: a small model out of the patient's first layers, for doctors and drafts."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from llmdoctor.cli import options
from llmdoctor.cli.options import FieldOptions, option
from llmdoctor.cli.terminal import flat_lines, progress, put, put_json, say, waiting
from llmdoctor.errors import UsageError
from llmdoctor.settings import ShrinkSettings
from llmdoctor.show.formats import counted, short_name

if TYPE_CHECKING:
    from llmdoctor.records import Message


@options.derived
def shrink(
    *,
    profile: options.ProfileName = None,
    patient: options.Patient = None,
    prompts: Annotated[
        Path | None,
        option(
            "--prompts",
            "File of prompts to learn from, one per line or .jsonl; - is stdin (default: those of the profile).",
        ),
    ] = None,
    output: Annotated[
        Path,
        option("--output", "Folder of the small model (default: outputs/shrunk).", short="-o", env="SHRINK_OUTPUT"),
    ] = Path("outputs/shrunk"),
    shrinking: Annotated[dict[str, Any], FieldOptions(ShrinkSettings, "Training")],
    fresh: Annotated[bool, option("--fresh", "Start from scratch, and replace what another run made.")] = False,
    loading: options.HowLoaded,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Make a small model of the patient's first layers, for a patient that has no small sibling.

    It is healed on answers that the patient gives to the prompts, and shares the patient's embeddings and head. Use it
    as the base of doctors (train --doctor) or to draft for the patient (chat --draft-model). The same command again
    continues a run that was stopped. How well it drafts is in the report: with few answers, or few layers, too badly to
    be of use.
    """
    from llmdoctor.profile import override

    settings = options.load(profile)
    model = override(settings.patient, model=patient, **loading)
    chosen = override(settings.shrink, **shrinking)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("shrink runs in one process: start it without torchrun or accelerate")
    if prompts is None and settings.data is None:
        raise UsageError(f"profile {settings.name} names no data to take prompts from: give --prompts FILE")
    with waiting("Reading the prompts ..."):
        from llmdoctor.token_rewards.pairs import read_pairs, read_prompts

        if prompts is not None:
            asked = _typed() if str(prompts) == "-" else read_prompts(prompts, on_note=say)
        else:
            assert settings.data is not None
            pairs = read_pairs(**settings.data.model_dump())
            # one line for prompts that several pairs share
            asked = list({str(pair.prompt): list(pair.prompt) for pair in pairs}.values())
    with waiting(f"Loading {short_name(model.model)} ..."):
        from llmdoctor.models import load_patient, pick_device
        from llmdoctor.training.shrink import shrink as shrunk

        if model.device_map is None and model.tp_plan is None:
            model = override(model, device=str(pick_device(model.device)))  # one, not spread over all
        if model.dtype == "auto" and pick_device(model.device).type == "cpu":
            model = override(model, dtype="float32")  # gradients through bfloat16 gain little there
        loaded = load_patient(model.model, trust_remote_code=trust_remote_code, **model.loading())
    say(f"shrinking {short_name(model.model)} on its answers to {counted(len(asked), 'prompt')}")
    began, worked = time.monotonic(), False

    def on_answer(done: int, total: int) -> None:
        nonlocal worked
        worked = True
        answered(done=done, total=total)

    def on_step(step: int, last: int, kl: float, speed: float) -> None:
        nonlocal worked
        worked = True
        advance(f"KL {kl:.3f} nats per token, {speed:.0f} tokens/s", done=step, total=last)

    with _goes_on(), progress("Answering", None, "answer") as answered, progress("Healing", None, "step") as advance:
        made = shrunk(
            loaded,
            asked,
            output,
            chosen,
            device=model.device,
            fresh=fresh,
            on_answer=on_answer,
            on_step=on_step,
        )
    if not worked:
        say(f"{output} holds this very model already: nothing was changed. --fresh makes it again")
    if as_json:
        put_json({"output": str(output), "seconds": round(time.monotonic() - began, 2), **made})
        return
    report = made["report"]
    what = f"wrote {output} in {time.monotonic() - began:.1f} s" if worked else f"{output} is finished"
    put("\n".join([what, *flat_lines(report)]))


def _typed() -> "list[str | list[Message]]":
    """The lines of stdin."""
    lines = [line.strip() for line in sys.stdin if line.strip()]
    if not lines:
        raise UsageError("--prompts -: stdin is empty, expected one prompt per line")
    return [*lines]


@contextmanager
def _goes_on() -> Iterator[None]:
    """Say after an interrupt what becomes of the work that was done."""
    try:
        yield
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here, with the answers and steps that it has")
        raise
