"""What ``eval`` found, as text and as a picture."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmdoctor.cli.charts import (
    HEAD,
    INK,
    MARGIN,
    PAPER,
    ROW,
    STYLE,
    TICKS,
    WIDTH,
    panel,
    percents,
    svg_element,
)
from llmdoctor.cli.side_by_side import summary_table
from llmdoctor.show.colours import scale_colour
from llmdoctor.show.formats import betas_text, short_name
from llmdoctor.show.text import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llmdoctor.records import Estimate

Found = Mapping[str, Any]


def text_report(report: Found) -> str:
    """The whole report in plain letters."""
    named = ", ".join(f"{name} ({short_name(folder)})" for name, folder in report["doctors"].items())
    parts = [f"patient {short_name(report['patient'])}; doctors: {named}"]
    if preference := report.get("preference"):
        parts += ["\n".join(_preference(preference)), "\n".join(_verdicts(preference))]
    if answers := report.get("answers"):
        if len(answers["guided"]) > 1:
            parts += _frontier(answers)
        else:
            parts.append(_one_setting(answers))
    return clean("\n\n".join(parts))


def judges(preference: Found) -> "Iterator[tuple[str, Mapping[str, Estimate]]]":
    """Who was asked about the pairs, by the name that is shown; doctors on the same base share its line."""
    yield from ((name, _estimates(found)) for name, found in preference["doctors"].items())
    bases = {str(found): (name, found) for name, found in preference["bases"].items()}
    for name, found in bases.values():
        yield "untrained base" if len(bases) == 1 else f"base of {name}", _estimates(found)
    yield "patient alone", _estimates(preference["patient"])
    yield "the longer answer", _estimates(preference["longer"])


def _preference(preference: Found) -> Iterator[str]:
    yield f"{preference['pairs']} pairs of {preference['data']}"
    yield from (f"skipped {count}: {reason}" for reason, count in preference["skipped"].items())
    shorter = f"where it is the shorter one ({preference['shorter']})"
    yield f"{'':<20}{'prefers the chosen answer':<30}{shorter}"
    for name, found in judges(preference):
        yield f"{name:<20}{percents(found['chosen']):<30}{_percents(found['shorter'])}".rstrip()
    yield f"{'chance':<20}50.0%"


def _verdicts(preference: Found) -> Iterator[str]:
    """A sentence for every doctor: whether its share says that it learnt something."""
    for name, found in preference["doctors"].items():
        chosen = _estimates(found)["chosen"]
        beyond = _estimates(preference["beyond"][name])
        others = {"base": "its untrained base", "longer": "the longer answer"}
        against = ", ".join(f"{_points(beyond[other])} beyond {called}" for other, called in others.items())
        if chosen.low > 0.5:
            verdict = "prefers the chosen answer more often than chance"
        elif chosen.high < 0.5:
            verdict = "prefers the rejected answer more often than chance"
        else:
            verdict = "does no better than chance, as far as these pairs tell"
        yield f"{name} {verdict}: {against}"


def _one_setting(answers: Found) -> str:
    (guided,) = answers["guided"]
    sides = {"patient": answers["patient"]["measures"], "guided": guided["measures"]}
    lines = [summary_table({"prompts": answers["prompts"], "answers": answers["answers"], **sides})]
    if "judge" in guided:
        lines += ["", *_judged(answers, _estimates(guided["judge"]))]
    return "\n".join(lines)


def _judged(answers: Found, found: "Mapping[str, Estimate]") -> Iterator[str]:
    yield f"judge {answers['judge']['name']} ({answers['judge']['kind']})"
    yield f"{'guided wins':<20}{percents(found['win_rate'])}"
    if "agreed" in found:
        yield f"{'same in both orders':<20}{percents(found['agreed'])}"
    if "gain" in found:
        scores = {"patient_score": "score, patient", "guided_score": "score, guided", "gain": "difference"}
        yield from (f"{called:<20}{_number(found[name])}" for name, called in scores.items())


def _frontier(answers: Found) -> Iterator[str]:
    """Two tables with a line for every setting, so that each fits 80 columns."""
    judge = answers.get("judge")
    heads = [f"{answers['prompts']} prompts, {answers['answers']} answers per setting (95% interval)"]
    heads += [f"judge {judge['name']} ({judge['kind']})"] if judge else []
    first, second = [], []
    for setting in answers["guided"]:
        measured = _estimates(setting["measures"])
        said = _estimates(setting.get("judge", {}))
        won = [percents(said["win_rate"])] if said else []
        won += [_spread(said["guided_score"])] if "guided_score" in said else []
        label = setting_label(answers, setting)
        first.append([label, *won, _spread(measured["kl_per_token"]), _spread(measured["kl"])])
        names = ("tokens", "distinct_4", "repeated_sentences", "unfinished", "tokens_per_second")
        second.append([label, *(_spread(measured[name]) for name in names)])
    titles = ["beta", *(["guided wins"] if judge else [])]
    titles += ["score"] if judge and judge["kind"] == "scalar" else []
    yield "\n".join([*heads, *_table([*titles, "KL per token", "KL per answer"], first)])
    yield "\n".join(_table(["beta", "tokens", "distinct-4", "repeated", "unfinished", "tokens/s"], second))


def setting_label(answers: Found, setting: Found) -> str:
    """The betas of a setting: one number where all doctors have the same."""
    betas = setting["betas"]
    return f"{next(iter(betas.values())):g}" if len(set(betas.values())) == 1 else betas_text(betas)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) + 2 for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        yield "".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _estimates(found: Found) -> "dict[str, Estimate]":
    from llmdoctor.records import Estimate

    return {name: Estimate(**value) for name, value in found.items()}


def _percents(part: "Estimate") -> str:
    return "-" if math.isnan(part.value) else percents(part)


def _points(difference: "Estimate") -> str:
    """A difference of shares in percentage points."""
    value, low, high = (100 * x for x in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} points" if math.isnan(low) else f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


def _number(estimate: "Estimate") -> str:
    value, low, high = estimate.value, estimate.low, estimate.high
    return f"{value:.3g}" if math.isnan(low) else f"{value:.3g} ({low:.3g} to {high:.3g})"


def _spread(estimate: "Estimate") -> str:
    half = (estimate.high - estimate.low) / 2
    return f"{estimate.value:.3g}" if math.isnan(half) else f"{estimate.value:.3g} ±{half:.2g}"


# The picture

_FRONTIER = 3.2  # inches


def drawing(report: Found, *, alone: bool = True) -> str:
    """One SVG: the shares as bars, and the guided answers over their KL; ``alone`` with its own background."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = list(judges(report["preference"])) if report.get("preference") else []
    bars = HEAD + len(rows) * ROW + TICKS if rows else 0
    height = MARGIN + bars + (_FRONTIER + HEAD + TICKS if report.get("answers") else 0) + MARGIN
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), facecolor=PAPER if alone else "none")
        if rows:
            shown = [
                (name, found["chosen"], scale_colour(found["chosen"].value - 0.5, 0.5), (percents(found["chosen"]),))
                for name, found in rows
            ]
            axes = panel(figure, "prefers", MARGIN, shown, [("share (95%)", 1.95)], 0.5, 0.5)
            axes.set_title("pairs in which the chosen answer is preferred", fontsize=9.5)
            axes.set_xticks([0, 0.5, 1], ["0%", "chance 50%", "100%"])
        if report.get("answers"):
            _draw_frontier(figure, report["answers"], MARGIN + bars + HEAD)
        return svg_element(figure, "evaluation of the doctors", alone=alone)


def _draw_frontier(figure: "Figure", answers: Found, top: float) -> None:
    """A point for every setting: KL per answer, and what the judge says or, without one, distinct-4."""
    height = figure.get_figheight()
    axes = figure.add_axes((0.09, (height - top - _FRONTIER) / height, 0.86, _FRONTIER / height))
    axes.set_facecolor("none")
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(color=INK, alpha=0.12)
    title, start, points = _points_of(answers)
    xs, ys = ([_estimates(s["measures"])["kl"] for s in answers["guided"]], points)
    axes.plot([0, *(x.value for x in xs)], [start, *(y.value for y in ys)], "-", color=INK, alpha=0.35, linewidth=1)
    axes.plot(0, start, "s", color=INK, markersize=5)
    axes.annotate("patient alone", (0, start), (6, -11), textcoords="offset points")
    for i, (setting, x, y) in enumerate(zip(answers["guided"], xs, ys, strict=True)):
        for ends, line in (((x.low, x.high), (y.value, y.value)), ((x.value, x.value), (y.low, y.high))):
            if not any(map(math.isnan, (*ends, *line))):
                axes.plot(ends, line, "-", color=INK, alpha=0.6, linewidth=1)
        axes.plot(x.value, y.value, "o", color=scale_colour(1, 1), markersize=6, gid=f"setting-{i}")
        label = f"beta {setting_label(answers, setting)}"
        axes.annotate(label, (x.value, y.value), (6, 5), textcoords="offset points")
    axes.set_xlabel("KL from the patient, nats per answer")
    axes.set_ylabel(title)
    axes.margins(0.08)


def _points_of(answers: Found) -> "tuple[str, float, list[Estimate]]":
    """What is drawn upwards: its name, the patient's own, and that of every setting."""
    if "judge" not in answers:
        points = [_estimates(setting["measures"])["distinct_4"] for setting in answers["guided"]]
        return "distinct-4", _estimates(answers["patient"]["measures"])["distinct_4"].value, points
    said = [_estimates(setting["judge"]) for setting in answers["guided"]]
    name = clean(answers["judge"]["name"])
    if answers["judge"]["kind"] == "scalar":
        return f"score by {name}", said[0]["patient_score"].value, [one["guided_score"] for one in said]
    return f"guided wins, by {name}", 0.5, [one["win_rate"] for one in said]
