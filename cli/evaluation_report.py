"""What ``eval`` found, as text and as a picture."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    svg_of,
)
from llmdoctor.cli.measures_table import (
    as_estimate,
    by_measure,
    by_setting,
    cell,
    counts_text,
    filled,
    spoken,
    text_table,
)
from llmdoctor.show.colours import scale_colour
from llmdoctor.show.formats import betas_text, counted, short_name, speaking_text
from llmdoctor.show.text import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llmdoctor.records import Estimate

Found = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """A part of the report: a heading, lines of cells below their titles, and sentences about them."""

    heading: str
    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def text_report(report: Found) -> str:
    """The whole report in plain letters."""
    return clean("\n\n".join([subject(report), *("\n".join(_lines(table)) for table in tables(report))]))


def subject(report: Found) -> str:
    """Who was evaluated."""
    named = ", ".join(f"{name} ({short_name(folder)})" for name, folder in report["doctors"].items())
    doctors = "doctor" if len(report["doctors"]) == 1 else "doctors"
    return f"patient {short_name(report['patient'])}; {doctors} {named}"


def tables(report: Found) -> list[Table]:
    """The report in parts."""
    parts = [_preference(report["preference"])] if report.get("preference") else []
    if answers := report.get("answers"):
        parts += _two_sides(answers) if len(answers["guided"]) == 1 else [_frontier(answers)]
    return parts


def judges(preference: Found) -> "Iterator[tuple[str, Mapping[str, Estimate]]]":
    """Who was asked about the pairs, by the name that is shown; doctors on the same base share its line."""
    yield from ((name, _estimates(found)) for name, found in preference["doctors"].items())
    bases = {str(found): (name, found) for name, found in preference["bases"].items()}
    for name, found in bases.values():
        yield "untrained base" if len(bases) == 1 else f"base of {name}", _estimates(found)
    yield "patient alone", _estimates(preference["patient"])
    yield "the longer answer", _estimates(preference["longer"])


def _preference(preference: Found) -> Table:
    rows = [(name, percents(found["chosen"]), percents(found["shorter"])) for name, found in judges(preference)]
    skipped = (f"skipped {count}: {reason}" for reason, count in preference["skipped"].items())
    return Table(
        f"{counted(preference['pairs'], 'pair')} of {preference['data']} (95% intervals)",
        ("", "prefers the chosen answer", f"where it is the shorter one ({preference['shorter']})"),
        (*rows, ("chance", "50.0%", "50.0%")),
        (*skipped, *_verdicts(preference)),
    )


def _verdicts(preference: Found) -> Iterator[str]:
    """A sentence for every doctor: whether its share says that it learnt something."""
    for name, found in preference["doctors"].items():
        chosen = _estimates(found)["chosen"]
        beyond = _estimates(preference["beyond"][name])
        others = {"its base": beyond["base"], "the longer answer": beyond["longer"]}
        yield "; ".join([f"{name} {verdict(chosen)}", *(_against(*other) for other in others.items())])


def verdict(chosen: "Estimate") -> str:
    """What a share of pairs, in which the chosen answer is preferred, says of a doctor; ``train`` says it too."""
    if chosen.low > 0.5:
        return "prefers the chosen answer more often than chance"
    if chosen.high < 0.5:
        return "prefers the rejected answer more often than chance"
    return "does no better than chance, as far as these pairs tell"


def _two_sides(answers: Found) -> Iterator[Table]:
    (guided,) = answers["guided"]
    name = f"guided by {speaking_text(guided['betas'])}"
    titles, rows = by_measure(answers["patient"]["measures"], {name: guided["measures"]})
    yield Table(_heading(answers, "per side"), tuple(titles), tuple(map(tuple, rows)))
    if "judge" in answers:
        said = tuple((spoken(key), cell(key, found)) for key, found in guided["judge"].items())
        yield Table(_judge(answers), ("", ""), said)


def _frontier(answers: Found) -> Table:
    """A line for every setting."""
    settings = [(setting_label(one), {**one.get("judge", {}), **one["measures"]}) for one in answers["guided"]]
    titles, rows = by_setting("beta", settings)
    judge = f"; {_judge(answers)}" if "judge" in answers else ""
    return Table(_heading(answers, "per beta") + judge, tuple(titles), tuple(map(tuple, rows)))


def _heading(answers: Found, each: str) -> str:
    return f"{counts_text(answers['prompts'], answers['answers'], each)} (95% intervals)"


def _judge(answers: Found) -> str:
    return f"judge {answers['judge']['name']} ({answers['judge']['kind']})"


def setting_label(setting: Found) -> str:
    """The betas of a setting: one number where all doctors have the same."""
    betas = setting["betas"]
    return f"{next(iter(betas.values())):g}" if len(set(betas.values())) == 1 else betas_text(betas)


def _lines(table: Table) -> Iterator[str]:
    yield filled(table.heading)
    yield text_table(*((table.titles, table.rows) if any(table.titles) else (table.rows[0], table.rows[1:])))
    yield from map(filled, table.notes)


def _estimates(found: Found) -> "dict[str, Estimate]":
    return {name: as_estimate(value) for name, value in found.items()}


def _against(other: str, difference: "Estimate") -> str:
    clear = "clearly more" if difference.low > 0 else "clearly less" if difference.high < 0 else "not clearly more"
    return f"{clear} often than {other}: {_points(difference)}"


def _points(difference: "Estimate") -> str:
    """A difference of shares in percentage points."""
    value, low, high = (100 * x for x in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} points" if math.isnan(low) else f"{value:+.1f} points ({low:+.1f} to {high:+.1f})"


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
        return svg_of(figure, "evaluation of the doctors", alone=alone)


def _draw_frontier(figure: "Figure", answers: Found, top: float) -> None:
    """A point for every setting: KL per answer, and what the judge says or, without one, distinct-4."""
    height = figure.get_figheight()
    axes = figure.add_axes((0.09, (height - top - _FRONTIER) / height, 0.86, _FRONTIER / height))
    axes.set_facecolor("none")
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(color=INK, alpha=0.12)
    title, start, points = _points_of(answers)
    xs = [_estimates(setting["measures"])["kl"] for setting in answers["guided"]]
    axes.plot([0, *(x.value for x in xs)], [start, *(y.value for y in points)], "-", color=INK, alpha=0.35, linewidth=1)
    axes.plot(0, start, "s", color=INK, markersize=5)
    axes.annotate("patient alone", (0, start), (6, -12), textcoords="offset points")
    for i, (setting, x, y) in enumerate(zip(answers["guided"], xs, points, strict=True)):
        for ends, line in (((x.low, x.high), (y.value, y.value)), ((x.value, x.value), (y.low, y.high))):
            if not any(map(math.isnan, (*ends, *line))):
                axes.plot(ends, line, "-", color=INK, alpha=0.6, linewidth=1)
        axes.plot(x.value, y.value, "o", color=scale_colour(1, 1), markersize=6, gid=f"setting-{i}")
        axes.annotate(
            f"beta {setting_label(setting)}", (x.value, y.value), (0, 9), textcoords="offset points", ha="center"
        )
    axes.set_xlabel(f"{spoken('kl')}, nats")
    axes.set_ylabel(title)
    axes.margins(0.08)


def _points_of(answers: Found) -> "tuple[str, float, list[Estimate]]":
    """What is drawn upwards: its name, the patient's own, and that of every setting."""
    if "judge" not in answers:
        points = [_estimates(setting["measures"])["distinct_4"] for setting in answers["guided"]]
        return spoken("distinct_4"), _estimates(answers["patient"]["measures"])["distinct_4"].value, points
    said = [_estimates(setting["judge"]) for setting in answers["guided"]]
    name = clean(answers["judge"]["name"])
    if answers["judge"]["kind"] == "scalar":
        return f"score by {name}", said[0]["patient_score"].value, [one["guided_score"] for one in said]
    return f"{spoken('win_rate')}, by {name}", 0.5, [one["win_rate"] for one in said]
