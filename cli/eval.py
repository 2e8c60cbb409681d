"""``llmdoctor eval``: whether a doctor works, on held-out pairs and on prompts."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmdoctor.cli import measures_table, options
from llmdoctor.cli.compare import questions
from llmdoctor.cli.compare_columns import Plan
from llmdoctor.cli.evaluation_report import drawing, subject, tables, text_report
from llmdoctor.cli.every_command import examples
from llmdoctor.cli.kept_run import KeptRun
from llmdoctor.cli.options import option
from llmdoctor.cli.terminal import progress, put, put_json, say, waiting, write_file
from llmdoctor.errors import UsageError
from llmdoctor.files import DOCTOR, read_json, require_doctor
from llmdoctor.show.formats import betas_text

if TYPE_CHECKING:
    from llmdoctor.assistant import LLMdoctor
    from llmdoctor.evaluation.judge import Judge
    from llmdoctor.profile import Profile
    from llmdoctor.records import Comparison, SkippedRecord
    from llmdoctor.settings import DataSettings, Guidance

EXAMPLES = (
    "eval outputs/doctor --data held-out.jsonl",
    "eval outputs/doctor --prompts prompts.txt --judge my_judge:better",
    "eval outputs/doctor --prompts prompts.txt --betas 0,0.5,1,2 --html report.html",
)
"""Shown by ``llmdoctor eval --help``; the tests run them."""
EPILOG = examples(*EXAMPLES, then=measures_table.EPILOG)


_DOCTORS = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="DOCTOR",
        help="Doctor folder, PATH or NAME=PATH; several are applied together (default: those of the profile).",
        show_default=False,
        autocompletion=options.complete_doctor,
    ),
]


@options.derived
def evaluate(
    *,
    guided: Annotated[options.Given, options.GuidedOptions(_DOCTORS)],
    data: Annotated[
        str | None,
        option("--data", "Held-out preference pairs, as extract takes them.", env="EVAL_DATA", metavar="SOURCE"),
    ] = None,
    split: options.Split = None,
    label: options.Label = None,
    columns: options.Columns = None,
    limit: Annotated[int | None, option("--limit", "Use the first N usable pairs.", metavar="N", min=1)] = None,
    prompts: Annotated[
        str | None, option("--prompts", "Prompts to answer, as compare takes them; - reads stdin.", metavar="FILE")
    ] = None,
    judge: Annotated[
        str | None,
        option(
            "--judge",
            "Who says which answer is better: a reward model (folder or hub name), module:function, or a command.",
            metavar="JUDGE",
        ),
    ] = None,
    judge_kind: Annotated[
        str | None,
        option("--judge-kind", "scalar or pairwise: whether it scores one answer or compares two.", metavar="KIND"),
    ] = None,
    betas: Annotated[
        str | None,
        option(
            "--betas", "Try several strengths: 0,0.5,1,2 of every doctor, or NAME=0,0.5,1,2.", metavar="[NAME=]X,X,..."
        ),
    ] = None,
    samples: Annotated[
        int, option("--samples", "Answers per prompt, with seed, seed + 1, ...", metavar="N", min=1)
    ] = 1,
    rows: Annotated[int, option("--rows", "Prompts that are answered together.", metavar="N", min=1)] = 32,
    output: Annotated[
        Path | None,
        option(
            "--output",
            "Keep the answers; a run that was stopped goes on there.",
            short="-o",
            env="EVAL_OUTPUT",
            metavar="FILE",
        ),
    ] = None,
    seed: options.Seed = None,
    batch_tokens: Annotated[
        int | None, option("--batch-tokens", "Tokens per forward over pairs (default: what fits).", metavar="N", min=1)
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
    html: Annotated[Path | None, option("--html", "Write a web page.", metavar="FILE")] = None,
    svg: Annotated[Path | None, option("--svg", "Write a picture.", metavar="FILE")] = None,
) -> None:
    """Does my doctor work? On held-out pairs, on prompts, or both.

    With --data: the share of pairs in which the doctor prefers the chosen answer, beside chance, the longer answer, the
    untrained base and the patient. A doctor prefers the answer to which training gave the greater probability: its
    score is the sum, over the answer's tokens, of log doctor - log base, as in mode "ratio", whatever the mode.

    With --prompts: measures of guided answers beside those of the patient alone and, with --judge, how often the guided
    answer wins.

    A judge is asked {"prompt", "answer"} and replies with a number, or {"prompt", "a", "b"} and replies with "a", "b",
    "tie" or how probably a is better, from 0 to 1. The second kind is asked in both orders, and the mean counts. A
    function gets the values in this order; a command gets the JSON on its stdin and prints JSON.
    """
    if data is None and prompts is None:
        raise UsageError(f"give --data PAIRS, --prompts FILE or both, for example: llmdoctor {EXAMPLES[0]}")
    if prompts is None and (unused := [name for name, given in {"--judge": judge, "--betas": betas}.items() if given]):
        raise UsageError(f"{unused[0]} is about answers to --prompts: give --prompts FILE")
    if judge_kind not in (None, "scalar", "pairwise"):
        raise UsageError(f"--judge-kind must be scalar or pairwise, got {judge_kind!r}")
    settings = options.guided_profile(guided)
    if not settings.doctors:
        raise UsageError("there is no doctor to evaluate: name its folder")
    options.require_outputs((output, html, svg))
    tried = _tried(betas, settings)
    asked = questions(None, prompts, used=()) if prompts is not None else []
    source = _source(data, split=split, label=label, columns=columns) if data else None
    if guided["doctor"] and not guided["patient"] and not guided["profile"]:
        settings = _with_own_patient(settings)
    referee = _judge(judge, judge_kind, guided["device"], trust_remote_code=trust_remote_code) if judge else None
    how = settings.decode.sampling()
    plans = [Plan(name, settings, guidance, how) for name, guidance in {"patient": None, **tried}.items()]
    report: dict[str, Any] = {
        "patient": settings.patient.model,
        "doctors": {name: each.checkpoint for name, each in settings.doctors.items()},
    }
    with KeptRun(output if asked else None, plans, asked, seed, samples=samples, rows=rows) as kept:
        missing = kept.begin([plan.column() for plan in plans])
        assistant = None
        if source or missing:
            assistant = options.load_assistant(
                settings, trust_remote_code=trust_remote_code, with_bases=source is not None
            )
        if source and assistant:
            report["preference"] = _preference(assistant, source, limit, batch_tokens)
        if asked:
            alone, *others = (plan.column(assistant) for plan in plans)
            with kept.asking():
                results = [one for column in others for one in kept.run.compare([alone, column])]
            report["answers"] = _winning(results, referee)
    if as_json:
        put_json(report)
    else:
        put(text_report(report))
    if svg is not None:
        write_file(svg, drawing(report))
    if html is not None:
        from llmdoctor.show.page import evaluation_page

        write_file(html, evaluation_page(subject(report), tables(report), drawing(report, alone=False)))


def _tried(betas: str | None, settings: "Profile") -> "dict[str, Guidance]":
    """The guidances of ``--betas`` by name; without it, that of the settings."""
    guidance = settings.decode.guidance(settings.doctors)
    if betas is None:
        return {"guided": guidance}
    name, _, values = betas.rpartition("=")
    if name and name not in settings.doctors:
        known = ", ".join(settings.doctors)
        raise UsageError(f"--betas: there is no doctor named {name!r} (there are: {known})")
    moved = [name] if name else list(settings.doctors)
    numbers = [options.parse_number("--betas", value) for value in values.split(",")]
    tried = (guidance.replace(betas={**guidance.betas, **dict.fromkeys(moved, beta)}) for beta in numbers)
    return {betas_text(one.betas): one for one in tried}


def _source(data: str, **how: str | None) -> "DataSettings":
    """The pairs, found to be usable before a large patient is loaded for them."""
    from llmdoctor.profile import override
    from llmdoctor.schema import checked
    from llmdoctor.settings import DataSettings
    from llmdoctor.token_rewards.pairs import read_pairs

    source = override(checked(DataSettings, {"source": data}), **how)
    next(iter(read_pairs(**source.model_dump(), limit=1, on_shape=lambda shape: say(str(shape)))), None)
    return source


def _with_own_patient(settings: "Profile") -> "Profile":
    """With the patient that the doctor was trained for, where its folder names another one than the profile's."""
    from llmdoctor.artefacts import DoctorFile
    from llmdoctor.model_source import model_fingerprint
    from llmdoctor.profile import override

    meta = read_json(require_doctor(next(iter(settings.doctors.values())).checkpoint) / DOCTOR, DoctorFile)
    rewards = meta.get("rewards", {})
    if not rewards.get("patient") or rewards.get("patient_fingerprint") == model_fingerprint(settings.patient.model):
        return settings
    say(f"taking the patient that the doctor was trained for: {rewards['patient']} (--patient names another)")
    return settings.model_copy(update={"patient": override(settings.patient, model=rewards["patient"])})


def _judge(name: str, kind: str | None, device: str | None, *, trust_remote_code: bool) -> "Judge":
    with waiting(f"Loading the judge {name} ..."):
        from llmdoctor.evaluation.judge import load_judge

        made = load_judge(name, kind, device=device or "auto", trust_remote_code=trust_remote_code)  # type: ignore[arg-type]
        # asked once before anything is answered, so that a judge that cannot judge costs no answers
        made.try_out()
        return made


def _preference(
    assistant: "LLMdoctor", source: "DataSettings", limit: int | None, batch_tokens: int | None
) -> dict[str, Any]:
    from llmdoctor.evaluation.preference import preferences
    from llmdoctor.token_rewards.pairs import read_pairs
    from llmdoctor.token_rewards.sources import fingerprint

    own = fingerprint(source.source, split=source.split, label=source.label)
    for name, doctor in assistant.doctors.items():
        if doctor.meta.get("rewards", {}).get("dataset_fingerprint") == own:
            say(f"warning: {name} was trained on these very pairs: the share says little of pairs that it has not seen")
    skipped: Counter[str] = Counter()

    def on_skip(record: "SkippedRecord") -> None:
        skipped[record.reason] += 1

    with progress("Reading", limit, "pair") as advance:
        pairs = read_pairs(**source.model_dump(), limit=limit, on_skip=on_skip)
        found = preferences(assistant, pairs, batch_tokens=batch_tokens, on_pair=advance, on_skip=on_skip)
    return {"data": source.source, **found.to_dict(), "skipped": dict(skipped)}


def _winning(comparisons: "Sequence[Comparison]", judge: "Judge | None") -> dict[str, Any]:
    from llmdoctor.evaluation.winning import summarise

    with progress("Judging", None, "judgement") as advance:
        found = summarise(comparisons, judge, lambda done, total: advance(done=done, total=total))
    settings = {name: value for name, value in comparisons[0].settings.items() if name != "betas"}
    named = {"judge": {"name": judge.name, "kind": judge.kind}} if judge else {}
    return {**named, "settings": settings, **found.to_dict()}
