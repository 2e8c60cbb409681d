"""``llmdoctor compare``: the patient alone beside the guided patient, and beside what else is asked for."""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from llmdoctor.cli import options
from llmdoctor.cli.compare_columns import Models, Plan, another, sides, sweep_points
from llmdoctor.cli.compare_files import EXPORTS, fingerprint, kept_answers, put_answer, weights_of
from llmdoctor.cli.measures_table import markdown_table, summary_table, text_table
from llmdoctor.cli.options import option
from llmdoctor.cli.picture import svg as picture
from llmdoctor.cli.side_by_side import markdown_comparison, plain_comparison, rich_comparison
from llmdoctor.cli.sweep import measured, sweep_heading, sweep_rows
from llmdoctor.cli.terminal import console, decorated, every_ten_seconds, put, put_json, say, waiting
from llmdoctor.errors import UsageError
from llmdoctor.harmless import require_unicode
from llmdoctor.show.comparison import View
from llmdoctor.show.formats import betas_text, counted, short_name
from llmdoctor.show.lens import DEFAULT_LENS, LENSES
from llmdoctor.show.page import comparisons_page, sweep_page

if TYPE_CHECKING:
    from llmdoctor.comparing import Key, Run, Timed
    from llmdoctor.profile import Profile
    from llmdoctor.records import Comparison, Question
    from llmdoctor.tui.launch import Compare, PostComparison

_SVG_COLUMNS = 45  # of a picture's terminal, for each answer


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
    top: Annotated[int, option("--top", "Alternatives of every token in JSON.", metavar="N", min=0)] = 0,
    lens: Annotated[
        str, option("--lens", "Colour tokens by kl (default), ratio, value, flips or off.", metavar="KIND")
    ] = DEFAULT_LENS,
    lens_doctor: Annotated[
        str | None, option("--lens-doctor", "Doctor whose opinion colours the tokens.", metavar="NAME")
    ] = None,
    loading: options.HowLoaded,
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
    pages = {"html": html, "svg": svg, "markdown": markdown}
    exports = {"alpaca_eval": alpaca_eval, "mt_bench": mt_bench}
    shown = not (as_json or jsonl or output or any(pages.values()) or any(exports.values()))
    if tui:
        options.require_screen("--tui", not shown)
        if vs or sweep or kl_budget or follow:
            raise UsageError("--tui shows the patient and one guided answer: it takes no --vs, --sweep and the like")
    if sweep and (vs or kl_budget or follow or diff):
        raise UsageError("--sweep measures answers and shows none: it takes no --vs, --kl-budget, --follow and --diff")
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
    if kl_budget is not None and not (0 < kl_budget < float("inf") and settings.doctors):
        raise UsageError(f"--kl-budget: expected a number above 0, and a doctor, got {kl_budget:g}")

    def load_other(name: str) -> "Profile":
        return options.guided_profile(
            options.load(name),
            named=True,
            patient=loading,
            doctors=None,
            doctor_base=doctor_base,
            betas=None,
            decode=decode,
        )

    further = partial(another, doctor_base=doctor_base, load_profile=load_other)
    others = [further(text, settings, flag="--vs") for text in vs or ()]
    if again := {plan.name for plan in others if sum(other.name == plan.name for other in others) > 1}:
        raise UsageError(f"--vs: {again.pop()} is given twice")
    points = sweep_points(sweep) if sweep else []
    plans = [*sides(settings), *others]
    if sweep:
        named = (" ".join(f"{name}={value}" for name, value in point.items()) for point in points)
        plans = [further(text, settings, flag="--sweep") for text in named]
    asked = questions(prompt, prompts, used=("dataset",) if alpaca_eval else ())
    if tui:
        from llmdoctor.tui.launch import browse_comparisons

        how: dict[str, Any] = {"seed": options.fresh_seed() if seed is None else seed, "top": top or 10}
        how["samples"] = samples
        source = _source(settings, asked, trust_remote_code=trust_remote_code, **how)
        speaking = next((name for name, doctor in settings.doctors.items() if doctor.beta > 0), None)
        chosen = lens_doctor or speaking
        raise typer.Exit(browse_comparisons(source, lens=lens, doctor=chosen, doctors=tuple(settings.doctors)))  # type: ignore[arg-type]

    from llmdoctor.comparing import Run

    command = ""
    if output is not None:
        command = _command(plans, asked, samples=samples, top=top, follow=follow, kl_budget=kl_budget)
    # a command that goes on where it was stopped needs no --seed: it takes the seed of the file
    answers, seed = kept_answers(output, command, seed) if output is not None else ({}, seed)
    asking = _Asking(output, command)
    run = Run(
        asked,
        options.fresh_seed() if seed is None else seed,
        samples=samples,
        rows=rows,
        top=top,
        follow=follow,
        known=answers,
        on_token=asking.on_token,
        on_answer=asking.on_answer,
    )
    asking.begin(run, plans)
    models = Models(plans, trust_remote_code=trust_remote_code)
    if sweep:
        _sweep(points, plans, models, run, asking, pages, as_json=as_json, jsonl=jsonl)
    else:
        budget: dict[str, Any] = {}
        if kl_budget is not None:
            settings, budget = _within(kl_budget, plans[1], models, run, asking)
            plans = [*sides(settings), *(further(plan.name, settings, flag="--vs") for plan in others)]
            asking.begin(run, plans)
        view = partial(View.of, lens=lens, doctor=lens_doctor, diff=diff, follow=follow)
        one = prompts is None and samples == 1
        _compare(plans, models, run, asking, pages, view, budget, as_json=as_json, jsonl=jsonl, shown=shown, one=one)
    for kind, folder in exports.items():
        for name, content in EXPORTS[kind](run, [plan.name for plan in plans]) if folder is not None else ():
            write_file(Path(folder or ".") / name, content)
    asking.end()


def _command(plans: Sequence[Plan], asked: "Sequence[Question]", **options: Any) -> str:
    """What a run has to have in common with the one that it goes on with."""
    columns = [
        [
            plan.name,
            plan.profile.model_dump(mode="json", include={"patient", "doctors", "decode"}),
            weights_of(plan.profile),
            None if plan.guidance is None else plan.guidance.to_dict(),
            plan.sampling.model_dump(mode="json"),
        ]
        for plan in plans
    ]
    turns = [question.turns for question in asked]
    return fingerprint({"columns": columns, "prompts": turns, **options})


class _Asking:
    """What is said while answers are made; each goes to ``output`` when it is finished."""

    def __init__(self, output: Path | None, command: str) -> None:
        self.answers = self.tokens = self._total = 0
        self._output, self._command = output, command
        self._file: TextIO | None = None
        self._plans: dict[str, Plan] = {}
        self._run: Run | None = None
        self._show: Callable[[str], None] = lambda _message: None
        self._plain: Callable[[str], None] | None = None

    def end(self) -> None:
        """No more answers: the reader of a FIFO waits for this."""
        if self._file is not None:
            self._file.close()
            say(f"wrote {self._output}")

    def begin(self, run: "Run", plans: Sequence[Plan]) -> None:
        """The answers that follow are those of these columns."""
        from llmdoctor.comparing import Column

        self._run = run
        self._plans |= {plan.name: plan for plan in plans}
        columns = [Column(plan.name, None, plan.guidance, plan.sampling) for plan in plans]
        missing = run.missing(columns)
        if run.known and self._output is not None and not self.answers:
            known = counted(len(run.known), "answer")
            say(f"{self._output}: {f'going on after {known}' if missing else f'holds all {known} already'}")
        self._total = self.answers + missing

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A spinner, or a line every ten seconds, while answers are made."""
        self._plain = self._plain or every_ten_seconds()  # from the first answer on, not while models load
        with waiting("Asking ...", self._plain) as self._show:
            yield

    def on_token(self, _column: str, _token: object) -> None:
        self.tokens += 1
        of = f"answer {min(self.answers + 1, self._total)} of {self._total}, "
        self._show(f"Asking: {of if self._total > 1 else ''}{counted(self.tokens, 'token')}")

    def on_answer(self, key: "Key", timed: "Timed") -> None:
        self.answers += 1
        if self._output is None:
            return
        from llmdoctor.comparing import Column
        from llmdoctor.files import open_to_append

        assert self._run is not None
        plan = self._plans[key.column]
        column = Column(plan.name, None, plan.guidance, plan.sampling)
        if self._file is None:
            self._file = open_to_append(self._output)
        settings = column.settings(column.seed(self._run.seed, key.sample))
        put_answer(self._output, self._file, self._run, key, timed, settings, self._command)


def _compare(
    plans: Sequence[Plan],
    models: Models,
    run: "Run",
    asking: _Asking,
    pages: dict[str, Path | None],
    view: Callable[["Comparison"], View],
    budget: dict[str, Any],
    *,
    as_json: bool,
    jsonl: bool,
    shown: bool,
    one: bool,
) -> None:
    """Answer in every column, print the comparisons as they are made, and write the pages."""
    results = run.compare(models.columns(plans, run))
    collected: list[Comparison] = []
    for _ in run.keys(""):
        with asking.waiting():
            result = next(results)
        if jsonl:
            put_json(result.to_dict())
        elif shown:
            _print(view(result), first=not collected)
        collected.append(result)
    summary = _summary(collected, run) if len(collected) > 1 else {}
    if as_json:
        comparisons = [result.to_dict() for result in collected]
        found = {"kl_budget": budget} if budget else {}
        put_json((comparisons[0] if one else {"comparisons": comparisons, **summary}) | found)
    tables = [summary_table(summary["summary"])] if summary else []
    tables += [_budget_text(budget)] if budget else []
    if tables and not as_json and not jsonl:
        put("\n" + "\n\n".join(tables))
    views = [view(result) for result in collected] if any(pages.values()) else []
    if pages["html"]:
        write_file(pages["html"], comparisons_page(views, "\n\n".join(tables)))
    if pages["svg"]:
        width = max(110, _SVG_COLUMNS * len(plans))
        write_file(pages["svg"], picture((rich_comparison(v, width) for v in views), "llmdoctor compare", width))
    if pages["markdown"]:
        text = "\n".join(markdown_comparison(v) for v in views)
        write_file(pages["markdown"], text + "".join(f"\n```\n{table}\n```\n" for table in tables))


def _sweep(
    points: Sequence[dict[str, str]],
    plans: Sequence[Plan],
    models: Models,
    run: "Run",
    asking: _Asking,
    pages: dict[str, Path | None],
    *,
    as_json: bool,
    jsonl: bool,
) -> None:
    """Measure the answers at every point, print the table, and write the pages."""
    from llmdoctor.cli.sweep_chart import svg_sweep

    found = []
    for values, column in zip(points, models.columns(plans, run), strict=True):
        with asking.waiting():
            found.append(measured(run, values, column))
        if jsonl:
            put_json(found[-1])
    heading = sweep_heading(run)
    header, rows = sweep_rows(found)
    if as_json:
        numbers = {"prompts": len(run.questions), "answers": sum(1 for _ in run.keys("")), "seed": run.seed}
        put_json({"sweep": list(points[0]), **numbers, "points": found})
    elif not jsonl:
        put(f"{heading}\n{text_table(header, rows)}")
    if pages["html"]:
        write_file(pages["html"], sweep_page(heading, header, rows, svg_sweep(found, heading, alone=False)))
    if pages["svg"]:
        write_file(pages["svg"], svg_sweep(found, heading))
    if pages["markdown"]:
        write_file(pages["markdown"], f"{heading}\n\n{markdown_table(header, rows)}")


def _within(
    budget: float, guided: Plan, models: Models, run: "Run", asking: _Asking
) -> "tuple[Profile, dict[str, Any]]":
    """The profile with the betas whose mean KL per token is the budget, and what is to be said of them.

    All betas have one factor, so what they are to each other stays. The answers found last become the guided ones.
    """
    from llmdoctor.answers import estimates_to_dict, kl_per_token
    from llmdoctor.kl_budget import find_strength

    assert guided.guidance is not None
    own = guided.guidance.betas if any(guided.guidance.betas.values()) else dict.fromkeys(guided.guidance.betas, 1.0)

    def trial(strength: float) -> Plan:
        assert guided.guidance is not None
        betas = {name: float(f"{beta * strength:.4g}") for name, beta in own.items()}
        name = f"kl-budget {betas_text(betas)}"
        return replace(guided, name=name, guidance=guided.guidance.replace(betas=betas))

    def measure(strength: float) -> Any:
        plan = trial(strength)
        asking.begin(run, [plan])
        (column,) = models.columns([plan], run)
        with asking.waiting():
            kl = kl_per_token(run.answers(column), run.groups())
        say(f"beta {betas_text(plan.guidance.betas if plan.guidance else {})}: KL {kl.value:.4g} per token")
        return kl

    tried = find_strength(measure, budget, limit=1e4 / max(own.values()))
    best = trial(tried[-1].strength)
    assert best.guidance is not None
    asking.begin(run, [guided])
    for key in run.keys(best.name):
        if (copy := key._replace(column=guided.name)) not in run.known:
            run.known[copy] = run.known[key]
            asking.on_answer(copy, run.known[key])
    doctors = {
        name: settings.model_copy(update={"beta": best.guidance.betas[name]})
        for name, settings in guided.profile.doctors.items()
    }
    found = {
        "asked": budget,
        "betas": dict(best.guidance.betas),
        **estimates_to_dict({"kl_per_token": tried[-1].kl}),
        "tried": [{"betas": dict(trial(one.strength).guidance.betas), "kl_per_token": one.kl.value} for one in tried],  # type: ignore[union-attr]
        "prompts": len(run.questions),
    }
    return guided.profile.model_copy(update={"doctors": doctors}), found


def _budget_text(found: dict[str, Any]) -> str:
    """Which beta, which KL, how precisely."""
    kl = found["kl_per_token"]
    over = counted(found["prompts"], "prompt")
    interval = f"95% {kl['low']:.3g} to {kl['high']:.3g}, {over}" if kl["low"] == kl["low"] else over
    off = abs(kl["value"] / found["asked"] - 1)
    return (
        f"KL budget {found['asked']:g} nats per token: beta {betas_text(found['betas'])} has {kl['value']:.4g} "
        f"({interval}), {off:.1%} off after {len(found['tried'])} tries"
    )


def _summary(comparisons: "Sequence[Comparison]", run: "Run") -> dict[str, Any]:
    """What all answers of each column have in common, with 95% intervals over the prompts."""
    from llmdoctor.answers import estimates_to_dict, measures

    def of(answers: Any) -> dict[str, dict[str, float]]:
        return estimates_to_dict(measures(list(answers), run.groups()))

    vs = {other.name: of(one.vs[i].answer for one in comparisons) for i, other in enumerate(comparisons[0].vs)}
    found = {"patient": of(one.patient for one in comparisons), "guided": of(one.guided for one in comparisons)}
    counts = {"prompts": len(run.questions), "answers": len(comparisons)}
    return {"summary": {**counts, **found, **({"vs": vs} if vs else {})}}


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
        kind = {b"[": ".json", b"{": ".jsonl", b'"': ".jsonl"}.get(given.lstrip()[:1], ".txt")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / f"stdin{kind}"
            copy.write_bytes(given)
            return read_questions(copy, name="stdin", used=used, on_note=say)
    text = sys.stdin.read().strip() if prompt == "-" else prompt or ""
    if not text.strip():
        raise UsageError("the prompt is empty")
    return [Question("1", (require_unicode(text, "the prompt"),))]


def _source(settings: "Profile", asked: "Sequence[Question]", *, trust_remote_code: bool, **how: Any) -> "Compare":
    """What the browser's thread does: load the models, compare prompt after prompt."""

    def source(post: "PostComparison", check: Callable[[], None]) -> None:
        post(f"loading {short_name(settings.patient.model)} ...")
        assistant = options.assistant(settings, trust_remote_code=trust_remote_code)
        from llmdoctor.comparing import Run, both_sides

        for number, question in enumerate(asked, start=1):
            counts = {"patient": 0, "guided": 0}

            def on_token(column: str, _token: object, number: int = number, counts: dict[str, int] = counts) -> None:
                check()
                counts[column] += 1
                said = f"{counts['patient']} tokens alone, {counts['guided']} guided"
                post(f"asking prompt {number} of {len(asked)}: {said}")

            for result in Run([question], on_token=on_token, **how).compare(both_sides(assistant)):
                post(result)

    return source


def _print(view: View, *, first: bool) -> None:
    if not first:
        put("")
    if sys.stdout.isatty():
        screen = console(sys.stdout)
        screen.print(rich_comparison(view, screen.width, colours=decorated(sys.stdout)))
    else:
        put(plain_comparison(view))


def write_file(path: Path, text: str) -> None:
    """All of it or nothing; then say so."""
    from llmdoctor.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    say(f"wrote {path}")
