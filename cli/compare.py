"""``llmdoctor compare``: the patient alone beside the guided patient, and beside what else is asked for."""

import codecs
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli import options, remote
from llmdoctor.cli.compare_budget import budget_text, within
from llmdoctor.cli.compare_columns import Models, Plan, another, sides, sweep_points
from llmdoctor.cli.compare_files import Forms
from llmdoctor.cli.kept_run import KeptRun
from llmdoctor.cli.measures_table import EPILOG as MEASURES
from llmdoctor.cli.measures_table import filled, summary_table
from llmdoctor.cli.options import option
from llmdoctor.cli.picture import svg as picture
from llmdoctor.cli.side_by_side import markdown_comparison, plain_comparison, rich_comparison
from llmdoctor.cli.sweep import sweep as run_sweep
from llmdoctor.cli.terminal import console, decorated, put, put_json, say, write_file
from llmdoctor.errors import UsageError
from llmdoctor.harmless import require_unicode
from llmdoctor.show.comparison import View
from llmdoctor.show.formats import counted, short_name
from llmdoctor.show.lens import DEFAULT_LENS, LENSES
from llmdoctor.show.page import comparisons_page

if TYPE_CHECKING:
    from llmdoctor.comparing import Run
    from llmdoctor.profile import Profile
    from llmdoctor.records import Comparison, Question
    from llmdoctor.tui.launch import PostComparison

_SVG_COLUMNS = 45  # of a picture's terminal, for each answer

AFTER_EXAMPLES = MEASURES
"""Ends its ``--help``."""


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
    guided: options.Guided,
    vs: Annotated[
        list[str] | None,
        option(
            "--vs",
            "A further column, by what differs: beta=2, doctor=PATH, profile=NAME, system_prompt=...; repeatable.",
            metavar="SETTINGS",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        option(
            "--sweep",
            "Measure answers over a setting, as table and picture: beta=0:2:0.2, mode=a,b; repeatable: a grid.",
            metavar="NAME=FROM:TO:STEP",
        ),
    ] = None,
    kl_budget: Annotated[
        float | None,
        option("--kl-budget", "Find the beta with this mean KL per token (nats), and answer with it.", metavar="X"),
    ] = None,
    seed: options.Seed = None,
    server: remote.Server = None,
    api_key: remote.ApiKey = None,
    top: Annotated[int, option("--top", "Alternatives of every token in JSON.", metavar="N", min=0)] = 0,
    lens: Annotated[
        str, option("--lens", "Colour tokens by kl (default), ratio, value, flips or off.", metavar="KIND")
    ] = DEFAULT_LENS,
    lens_doctor: Annotated[
        str | None, option("--lens-doctor", "Doctor whose opinion colours the tokens.", metavar="NAME")
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    diff: Annotated[bool, option("--diff", "Mark the words in which the answers differ.")] = False,
    follow: Annotated[
        bool, option("--follow", "Show what the patient would have said instead, wherever guidance changed it.")
    ] = False,
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
    options.require_outputs((html, svg, markdown, output), (alpaca_eval, mt_bench))
    if as_json and jsonl:
        raise UsageError("choose one of --json and --jsonl")
    forms = Forms(as_json, jsonl, html, svg, markdown, {"alpaca_eval": alpaca_eval, "mt_bench": mt_bench})
    if tui:
        unfit: dict[str, Any] = {"--sweep": sweep, "--follow": follow, "--diff": diff}
        _require_none("--tui shows whole answers", unfit, "leave out --tui, or write a page with --html FILE")
        options.require_screen("--tui", bool(output) or not forms.text)
    if sweep:
        unfit = {"--vs": vs, "--kl-budget": kl_budget is not None, "--follow": follow, "--diff": diff}
        _require_none("--sweep measures answers and shows none", unfit, "run compare a second time for them")
    if follow:
        _require_none("--follow shows what the patient would have said instead", {"--diff": diff}, "leave out one")
    if lens not in LENSES:
        raise UsageError(f"--lens must be one of {', '.join(LENSES)}, got {lens!r}")
    there = None
    if server is not None:
        _require_none("--server: a server does not follow answers", {"--follow": follow}, "leave out --follow")
        there = remote.connect(server, api_key, guided, trust_remote_code=trust_remote_code)
    settings = options.guided_profile(guided) if there is None else remote.settings_on(there.profile, guided)
    if lens_doctor is not None and lens_doctor not in settings.doctors:
        known = ", ".join(settings.doctors) or "none"
        raise UsageError(f"--lens-doctor: there is no doctor named {lens_doctor!r} (there are: {known})")
    if kl_budget is not None and not (0 < kl_budget < float("inf") and settings.doctors):
        raise UsageError(f"--kl-budget: expected a number above 0, and a doctor, got {kl_budget:g}")

    others = {"patient": None, "doctor": None, "beta": None}  # are the main column's alone
    further = partial(
        another,
        doctor_base=guided["doctor_base"],
        load_profile=lambda name: options.guided_profile({**guided, **others, "profile": name}),
    )
    points = sweep_points(sweep) if sweep else []
    if points:
        named = (" ".join(f"{name}={value}" for name, value in point.items()) for point in points)
        plans = [further(text, settings, flag="--sweep") for text in named]
    else:
        plans = _columns(settings, vs or (), further)
    asked = questions(prompt, prompts, used=("dataset",) if alpaca_eval else ())
    models = Models(plans, trust_remote_code=trust_remote_code, server=there)
    if there is not None:
        remote.require_its_models(plans, there)
    with KeptRun(
        output,
        plans,
        asked,
        seed,
        samples=samples,
        rows=rows,
        top=top or 10 * tui,
        follow=follow,
        kl_budget=kl_budget,
        weights=None if there is None else there.weights,
    ) as kept:
        if points:
            run_sweep(points, plans, models, kept, forms)
        else:
            budget: dict[str, Any] = {}
            if kl_budget is not None:
                settings, budget = within(kl_budget, plans[1], models, kept)
                plans = _columns(settings, vs or (), further)
            if tui:
                raise typer.Exit(_browse(plans, models, kept, lens, lens_doctor))
            view = partial(View.of, lens=lens, doctor=lens_doctor, diff=diff, follow=follow)
            one = prompts is None and samples == 1
            _compare(plans, models, kept, forms, view, budget, one=one, shown=forms.text and output is None)
        forms.export(kept.run, [plan.name for plan in plans])


def _require_none(why: str, unfit: Mapping[str, object], instead: str) -> None:
    """Raise UsageError if one of these options was given."""
    if given := [name for name, value in unfit.items() if value]:
        raise UsageError(f"{why}: it takes no {' and no '.join(given)} ({instead})")


def _columns(settings: "Profile", vs: Sequence[str], further: Callable[..., Plan]) -> list[Plan]:
    """The patient alone, the guided patient, and those of ``--vs``."""
    others = [further(text, settings, flag="--vs") for text in vs]
    if again := {plan.name for plan in others if sum(other.name == plan.name for other in others) > 1}:
        raise UsageError(f"--vs: {again.pop()} is given twice")
    return [*sides(settings), *others]


def _compare(
    plans: Sequence[Plan],
    models: Models,
    kept: KeptRun,
    forms: Forms,
    view: Callable[["Comparison"], View],
    budget: dict[str, Any],
    *,
    one: bool,
    shown: bool,
) -> None:
    """Answer in every column, print the comparisons as they are made, and write the pages."""
    results = kept.run.compare(models.columns(plans, kept))
    collected: list[Comparison] = []
    for _ in kept.run.keys(""):
        with kept.asking():
            result = next(results)
        if forms.jsonl:
            put_json(result.to_dict())
        elif shown:
            _print(view(result), first=not collected)
        collected.append(result)
    summary = _summary(plans, kept.run) if len(collected) > 1 else {}
    if forms.as_json:
        comparisons = [result.to_dict() for result in collected]
        found = {"kl_budget": budget} if budget else {}
        put_json((comparisons[0] if one else {"comparisons": comparisons, **summary}) | found)
    tables = [summary_table(summary["summary"])] if summary else []
    tables += [filled(budget_text(budget))] if budget else []
    if tables and not forms.as_json and not forms.jsonl:
        put("\n" * shown + "\n\n".join(tables))
    views = [view(result) for result in collected] if forms.pages else []
    if forms.html:
        write_file(forms.html, comparisons_page(views, "\n\n".join(tables)))
    if forms.svg:
        width = max(110, _SVG_COLUMNS * len(plans))
        write_file(forms.svg, picture((rich_comparison(v, width) for v in views), "llmdoctor compare", width))
    if forms.markdown:
        text = "\n".join(markdown_comparison(v) for v in views)
        write_file(forms.markdown, text + "".join(f"\n```\n{table}\n```\n" for table in tables))


def _summary(plans: Sequence[Plan], run: "Run") -> dict[str, Any]:
    """What all answers of each column have in common, with 95% intervals over the prompts."""
    from llmdoctor.answers import estimates_to_dict

    patient, guided, *others = (estimates_to_dict(run.measures(plan.column())) for plan in plans)
    vs = dict(zip((plan.name for plan in plans[2:]), others, strict=True))
    counts = {"prompts": len(run.questions), "answers": sum(1 for _ in run.keys(""))}
    return {"summary": {**counts, "patient": patient, "guided": guided, **({"vs": vs} if vs else {})}}


def questions(prompt: str | None, file: str | None, *, used: Sequence[str]) -> "list[Question]":
    """The one prompt, or those of a file; fields of a record that are ``used`` are not told as left out."""
    if (prompt is None) == (file is None):
        raise UsageError(
            'give either a prompt or --prompts FILE, for example: llmdoctor compare "How can I sleep better?"'
        )
    from llmdoctor.records import Question

    if file is not None:
        from llmdoctor.token_rewards.pairs import read_questions

        if file != "-":
            return read_questions(Path(file), used=used, on_note=say)
        given = sys.stdin.buffer.read()
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / f"stdin{_kind(given)}"
            copy.write_bytes(given)
            return read_questions(copy, name="stdin", used=used, on_note=say)
    text = sys.stdin.read().strip() if prompt == "-" else prompt or ""
    if not text.strip():
        raise UsageError("the prompt is empty")
    return [Question("1", (require_unicode(text, "the prompt"),))]


def _kind(given: bytes) -> str:
    """The ending of a file that holds this: JSON by its first character, a table by its header, else text."""
    from llmdoctor.token_rewards.shapes import QUESTIONS

    given = given.removeprefix(codecs.BOM_UTF8).lstrip()
    header = given.partition(b"\n")[0].decode(errors="replace").lower().strip()
    if {cell.strip('"') for cell in re.split("[,\t]", header)} & {*QUESTIONS}:
        return ".tsv" if "\t" in header else ".csv"
    return {b"[": ".json", b"{": ".jsonl", b'"': ".jsonl"}.get(given[:1], ".txt")


def _browse(plans: Sequence[Plan], models: Models, kept: KeptRun, lens: str, doctor: str | None) -> int:
    """The comparisons in a full screen, whose thread loads the models and asks prompt after prompt; the exit code."""
    from llmdoctor.tui.launch import browse_comparisons

    numbers = {question.id: number for number, question in enumerate(kept.run.questions, start=1)}
    doctors = {name: one.beta for name, one in plans[1].profile.doctors.items()}

    def source(post: "PostComparison", check: Callable[[], None]) -> None:
        post(f"loading {short_name(plans[0].profile.patient.model)} ...")
        number, counts = 1, Counter[str]()

        def on_token(column: str, _token: object) -> None:
            check()
            counts[column] += 1
            said = ", ".join(f"{name} {counted(count, 'token')}" for name, count in counts.items())
            post(f"asking prompt {number} of {len(numbers)}: {said}")

        # all samples of a prompt, then the next prompt
        run = replace(kept.run, rows=kept.run.samples, on_token=on_token, on_answer=None)
        for result in run.compare(models.columns(plans, kept, silent=True)):
            post(result)
            number = numbers[result.id] + 1
            counts.clear()

    speaking = next((name for name, beta in doctors.items() if beta > 0), None)
    return browse_comparisons(source, lens=lens, doctor=doctor or speaking, doctors=tuple(doctors))  # type: ignore[arg-type]


def _print(view: View, *, first: bool) -> None:
    if not first:
        put("")
    if sys.stdout.isatty():
        screen = console(sys.stdout)
        screen.print(rich_comparison(view, screen.width, colours=decorated(sys.stdout)))
    else:
        put(plain_comparison(view))
