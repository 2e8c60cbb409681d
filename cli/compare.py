"""``llmdoctor compare``: the patient alone beside the guided patient."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli import options
from llmdoctor.cli.options import option
from llmdoctor.cli.picture import svg as picture
from llmdoctor.cli.side_by_side import plain_comparison, rich_comparison
from llmdoctor.cli.terminal import console, decorated, put, put_json, say, waiting
from llmdoctor.errors import UsageError
from llmdoctor.show.comparison import View
from llmdoctor.show.formats import short_name
from llmdoctor.show.lens import DEFAULT_LENS, LENSES
from llmdoctor.show.page import comparisons_page

if TYPE_CHECKING:
    from llmdoctor.assistant import LLMdoctor
    from llmdoctor.profile import Profile
    from llmdoctor.records import Comparison, GuidedToken, Message
    from llmdoctor.tui.launch import Compare, PostComparison

    Prompt = str | Sequence[Message]


@options.derived
def compare(
    prompt: Annotated[str | None, typer.Argument(help="The question; - reads it from stdin.")] = None,
    *,
    prompts: Annotated[
        Path | None, option("--prompts", "Ask every prompt of a .txt, .json or .jsonl file.", metavar="FILE")
    ] = None,
    profile: options.ProfileName = None,
    patient: options.Patient = None,
    doctor: options.Doctors = None,
    doctor_base: options.DoctorBase = None,
    beta: options.Betas = None,
    decode: options.Decode,
    seed: options.Seed = None,
    top: Annotated[int, option("--top", "Alternatives of every token in JSON.", metavar="N", min=0)] = 0,
    lens: Annotated[
        str, option("--lens", "Colour tokens by kl (default), ratio, value, flips or off.", metavar="KIND")
    ] = DEFAULT_LENS,
    lens_doctor: Annotated[
        str | None, option("--lens-doctor", "Doctor whose opinion colours the tokens.", metavar="NAME")
    ] = None,
    loading: options.HowLoaded,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    html: Annotated[Path | None, option("--html", "Write a web page instead.", metavar="FILE")] = None,
    svg: Annotated[Path | None, option("--svg", "Write a picture instead.", metavar="FILE")] = None,
    tui: Annotated[bool, option("--tui", "Browse the comparisons in a full screen, as they are made.")] = False,
) -> None:
    """Answer a question without and with the doctors, and show token by token what changed."""
    if sum((as_json, html is not None, svg is not None)) > 1:
        raise UsageError("choose one of --json, --html and --svg")
    if tui:
        options.require_screen("--tui", as_json or html is not None or svg is not None)
    if lens not in LENSES:
        raise UsageError(f"--lens must be one of {', '.join(LENSES)}, got {lens!r}")
    settings = options.guided_profile(
        options.load(profile),
        named=profile is not None,
        patient={"model": patient, **loading},
        doctors=doctor,
        doctor_base=doctor_base,
        betas=beta,
        decode=decode,
    )
    if lens_doctor is not None and lens_doctor not in settings.doctors:
        known = ", ".join(settings.doctors) or "none"
        raise UsageError(f"--lens-doctor: there is no doctor named {lens_doctor!r} (there are: {known})")
    asked = _prompts(prompt, prompts)
    if tui:
        from llmdoctor.tui.launch import browse_comparisons

        how = {"seed": options.fresh_seed() if seed is None else seed, "top": top or 10}
        source = _source(settings, asked, trust_remote_code=trust_remote_code, **how)
        speaking = next((name for name, doctor in settings.doctors.items() if doctor.beta > 0), None)
        chosen = lens_doctor or speaking
        raise typer.Exit(browse_comparisons(source, lens=lens, doctor=chosen, doctors=tuple(settings.doctors)))  # type: ignore[arg-type]
    assistant = options.load_assistant(settings, trust_remote_code=trust_remote_code)
    results = _compared(assistant, asked, seed=options.fresh_seed() if seed is None else seed, top=top)
    if as_json:
        for result in results:
            put_json(result.to_dict())
        return
    views = (View.of(result, lens, lens_doctor) for result in results)  # type: ignore[arg-type]
    if html is not None:
        _write(html, comparisons_page(views))
    elif svg is not None:
        _write(svg, picture((rich_comparison(view, 110) for view in views), "llmdoctor compare"))
    else:
        _print(views)


def _prompts(prompt: str | None, file: Path | None) -> "list[Prompt]":
    if (prompt is None) == (file is None):
        raise UsageError(
            'give either a prompt or --prompts FILE, for example: llmdoctor compare "How can I sleep better?"'
        )
    if file is not None:
        from llmdoctor.token_rewards.pairs import read_prompts

        return list(read_prompts(file))
    text = sys.stdin.read().strip() if prompt == "-" else prompt or ""
    if not text.strip():
        raise UsageError("the prompt is empty")
    return [text]


def _compared(assistant: "LLMdoctor", prompts: "Sequence[Prompt]", **how: Any) -> "Iterator[Comparison]":
    counts = {"patient": 0, "guided": 0}
    shown: list[Callable[[str], None]] = []

    def on_token(side: str, _token: "GuidedToken") -> None:
        counts[side] += 1
        shown[-1](f"Asking: {asked}{counts['patient']} tokens alone, {counts['guided']} guided")

    results = assistant.compare_all(prompts, on_token=on_token, **how)
    for number in range(1, len(prompts) + 1):
        asked = f"prompt {number} of {len(prompts)}, " if len(prompts) > 1 else ""
        with waiting("Asking ...") as show:
            shown.append(show)
            result = next(results)
        yield result


def _source(settings: "Profile", asked: "Sequence[Prompt]", *, trust_remote_code: bool, **how: Any) -> "Compare":
    """What the browser's thread does: load the models, compare prompt after prompt."""

    def source(post: "PostComparison", check: Callable[[], None]) -> None:
        post(f"loading {short_name(settings.patient.model)} ...")
        assistant = options.assistant(settings, trust_remote_code=trust_remote_code)
        for number, prompt in enumerate(asked, start=1):
            counts = {"patient": 0, "guided": 0}

            def on_token(
                side: str, _token: "GuidedToken", number: int = number, counts: dict[str, int] = counts
            ) -> None:
                check()
                counts[side] += 1
                said = f"{counts['patient']} tokens alone, {counts['guided']} guided"
                post(f"asking prompt {number} of {len(asked)}: {said}")

            post(assistant.compare(prompt, on_token=on_token, **how))

    return source


def _print(views: "Iterator[View]") -> None:
    for number, view in enumerate(views):
        if number:
            put("")
        if decorated(sys.stdout):
            screen = console(sys.stdout)
            screen.print(rich_comparison(view, screen.width))
        else:
            put(plain_comparison(view))


def _write(path: Path, text: str) -> None:
    from llmdoctor.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    say(f"wrote {path}")
