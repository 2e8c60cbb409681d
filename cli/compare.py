"""``llmdoctor compare``: the patient alone beside the guided patient."""

import hashlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli import options
from llmdoctor.cli.compare_files import alpaca_eval_files, kept_answers, mt_bench_files, put_answer
from llmdoctor.cli.options import option
from llmdoctor.cli.picture import svg as picture
from llmdoctor.cli.side_by_side import markdown_comparison, plain_comparison, rich_comparison, summary_table
from llmdoctor.cli.terminal import console, decorated, every_ten_seconds, put, put_json, say, waiting
from llmdoctor.errors import UsageError
from llmdoctor.harmless import require_unicode
from llmdoctor.show.comparison import View
from llmdoctor.show.formats import short_name
from llmdoctor.show.lens import DEFAULT_LENS, LENSES
from llmdoctor.show.page import comparisons_page

if TYPE_CHECKING:
    from llmdoctor.assistant import LLMdoctor
    from llmdoctor.profile import Profile
    from llmdoctor.records import Comparison, GuidedToken, Question
    from llmdoctor.tui.launch import Compare, PostComparison


@options.derived
def compare(
    prompt: Annotated[str | None, typer.Argument(help="The question; - reads it from stdin.")] = None,
    *,
    prompts: Annotated[
        str | None,
        option(
            "--prompts",
            "Ask every prompt of a file: text, .jsonl, .json, .csv, ...; MT-Bench, AlpacaEval; - reads stdin.",
            metavar="FILE",
        ),
    ] = None,
    samples: Annotated[
        int, option("--samples", "Answers per prompt, with seed, seed + 1, ...", metavar="N", min=1)
    ] = 1,
    rows: Annotated[int, option("--rows", "Prompts that are answered together.", metavar="N", min=1)] = 32,
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
    diff: Annotated[bool, option("--diff", "Mark the words in which the two answers differ.")] = False,
    as_json: options.Json = False,
    jsonl: Annotated[bool, option("--jsonl", "JSON Lines on stdout: a comparison per line, as they are made.")] = False,
    html: Annotated[Path | None, option("--html", "Write a web page.", metavar="FILE")] = None,
    svg: Annotated[Path | None, option("--svg", "Write a picture.", metavar="FILE")] = None,
    markdown: Annotated[Path | None, option("--markdown", "Write Markdown.", metavar="FILE")] = None,
    output: Annotated[
        Path | None,
        option("--output", "Write answers as JSON Lines; a stopped run goes on there.", short="-o", metavar="FILE"),
    ] = None,
    alpaca_eval: Annotated[
        Path | None, option("--alpaca-eval", "Write AlpacaEval's model_outputs, a file per side.", metavar="FOLDER")
    ] = None,
    mt_bench: Annotated[
        Path | None, option("--mt-bench", "Write MT-Bench's model_answer, a file per side.", metavar="FOLDER")
    ] = None,
    tui: Annotated[bool, option("--tui", "Browse the comparisons in a full screen, as they are made.")] = False,
) -> None:
    """Answer a question without and with the doctors, and show token by token what changed."""
    files = [path for path in (html, svg, markdown, output, alpaca_eval, mt_bench) if path is not None]
    options.require_outputs((html, svg, markdown, output), (alpaca_eval, mt_bench))
    if as_json and jsonl:
        raise UsageError("choose one of --json and --jsonl")
    if tui:
        options.require_screen("--tui", as_json or jsonl or bool(files))
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

        how: dict[str, Any] = {"seed": options.fresh_seed() if seed is None else seed, "top": top or 10}
        how["samples"] = samples
        source = _source(settings, asked, trust_remote_code=trust_remote_code, **how)
        speaking = next((name for name, doctor in settings.doctors.items() if doctor.beta > 0), None)
        chosen = lens_doctor or speaking
        raise typer.Exit(browse_comparisons(source, lens=lens, doctor=chosen, doctors=tuple(settings.doctors)))  # type: ignore[arg-type]
    # a command that goes on where it was stopped needs no --seed: it takes the seed of the file
    command: dict[str, Any] = {
        "profile": settings.model_dump(mode="json", include={"patient", "doctors", "decode"}),
        "prompts": hashlib.sha256(repr([question.turns for question in asked]).encode()).hexdigest()[:16],
        "samples": samples,
        "top": top,
    }
    done = kept_answers(output, command) if output is not None else []
    if done:
        first = done[0].settings["seed"] - done[0].sample + 1
        if seed not in (None, first):
            raise UsageError(f"{output} holds answers of seed {first}, not {seed}: give another --output, or that seed")
        seed = first
    start = options.fresh_seed() if seed is None else seed
    total = samples * sum(len(question.turns) for question in asked)
    results: Iterator[Comparison] = iter(done)
    if len(done) < total:
        assistant = options.load_assistant(settings, trust_remote_code=trust_remote_code)
        how = {"seed": start, "samples": samples, "skip": len(done), "rows": rows, "top": top}
        results = chain(done, _compared(assistant, asked, total, len(done), **how))
    if output is not None:
        results = _written(results, output, command, len(done))
    collected: list[Comparison] = []
    for result in results:
        if jsonl:
            put_json(result.to_dict())
        elif not as_json and not files:
            _print(View.of(result, lens, lens_doctor, diff=diff), first=not collected)  # type: ignore[arg-type]
        collected.append(result)
    summary = _summary(collected) if len(collected) > 1 else {}
    if as_json:
        comparisons = [result.to_dict() for result in collected]
        put_json(comparisons[0] if prompts is None and samples == 1 else {"comparisons": comparisons, **summary})
    elif summary and not jsonl:
        put("\n" + summary_table(summary["summary"]))
    pages = html or svg or markdown
    views = [View.of(result, lens, lens_doctor, diff=diff) for result in collected] if pages else []  # type: ignore[arg-type]
    if html is not None:
        _write(html, comparisons_page(views))
    if svg is not None:
        _write(svg, picture((rich_comparison(view, 110) for view in views), "llmdoctor compare"))
    if markdown is not None:
        text = "\n".join(markdown_comparison(view) for view in views)
        _write(markdown, text + (f"\n```\n{summary_table(summary['summary'])}\n```\n" if summary else ""))
    by_id = {question.id: question for question in asked}
    for folder, make in ((alpaca_eval, alpaca_eval_files), (mt_bench, mt_bench_files)):
        for name, content in make(collected, by_id) if folder is not None else ():
            _write(Path(folder or ".") / name, content)


def _summary(comparisons: "Sequence[Comparison]") -> dict[str, Any]:
    """What all answers of each side have in common, with 95% intervals over the prompts."""
    from llmdoctor.answers import estimates_to_dict, measures

    groups = [one.id for one in comparisons] if len({one.id for one in comparisons}) > 1 else None
    sides = {"patient": [one.patient for one in comparisons], "guided": [one.guided for one in comparisons]}
    found = {side: estimates_to_dict(measures(answers, groups)) for side, answers in sides.items()}
    return {"summary": {"prompts": len({one.id for one in comparisons}), "answers": len(comparisons), **found}}


def _written(results: "Iterator[Comparison]", path: Path, command: dict[str, Any], kept: int) -> "Iterator[Comparison]":
    from llmdoctor.files import open_to_append

    with open_to_append(path) as file:
        for number, result in enumerate(results):
            if number >= kept:
                put_answer(file, result, command)
            yield result
    say(f"wrote {path}")


def _prompts(prompt: str | None, file: str | None) -> "list[Question]":
    if (prompt is None) == (file is None):
        raise UsageError(
            'give either a prompt or --prompts FILE, for example: llmdoctor compare "How can I sleep better?"'
        )
    from llmdoctor.records import Question

    if file is not None:
        from llmdoctor.token_rewards.pairs import read_questions

        if file != "-":
            return read_questions(Path(file), on_note=say)
        given = sys.stdin.buffer.read()
        kind = {b"[": ".json", b"{": ".jsonl", b'"': ".jsonl"}.get(given.lstrip()[:1], ".txt")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / f"stdin{kind}"
            copy.write_bytes(given)
            return read_questions(copy, name="stdin", on_note=say)
    text = sys.stdin.read().strip() if prompt == "-" else prompt or ""
    if not text.strip():
        raise UsageError("the prompt is empty")
    return [Question("1", (require_unicode(text, "the prompt"),))]


def _compared(
    assistant: "LLMdoctor", questions: "Sequence[Question]", total: int, done: int, **how: Any
) -> "Iterator[Comparison]":
    from llmdoctor.comparing import compared

    counts = {"patient": 0, "guided": 0}
    shown: list[Callable[[str], None]] = []
    plain = every_ten_seconds()

    def on_token(side: str, _token: "GuidedToken") -> None:
        counts[side] += 1
        shown[-1](f"Asking: {asked}{counts['patient']} tokens alone, {counts['guided']} guided")

    results = compared(assistant, questions, on_token=on_token, **how)
    for number in range(done + 1, total + 1):
        asked = f"answer {number} of {total}, " if total > 1 else ""
        with waiting("Asking ...", plain) as show:
            shown.append(show)
            result = next(results)
        yield result


def _source(settings: "Profile", asked: "Sequence[Question]", *, trust_remote_code: bool, **how: Any) -> "Compare":
    """What the browser's thread does: load the models, compare prompt after prompt."""

    def source(post: "PostComparison", check: Callable[[], None]) -> None:
        post(f"loading {short_name(settings.patient.model)} ...")
        assistant = options.assistant(settings, trust_remote_code=trust_remote_code)
        from llmdoctor.comparing import compared

        for number, question in enumerate(asked, start=1):
            counts = {"patient": 0, "guided": 0}

            def on_token(
                side: str, _token: "GuidedToken", number: int = number, counts: dict[str, int] = counts
            ) -> None:
                check()
                counts[side] += 1
                said = f"{counts['patient']} tokens alone, {counts['guided']} guided"
                post(f"asking prompt {number} of {len(asked)}: {said}")

            for result in compared(assistant, [question], on_token=on_token, **how):
                post(result)

    return source


def _print(view: View, *, first: bool) -> None:
    if not first:
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
