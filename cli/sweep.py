"""``llmdoctor compare --sweep``: measures of the guided answers, which need no judge, over settings."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmdoctor.cli.measures_table import cell, spoken
from llmdoctor.show.formats import counted

if TYPE_CHECKING:
    from llmdoctor.comparing import Column, Run

Point = dict[str, Any]


def measured(run: "Run", values: Mapping[str, str], column: "Column") -> Point:
    """Answer all questions at one point; what is measured there.

    The point is {"point": {setting: value}, "settings", "measures": {name: {"value", "low", "high"}}}.
    """
    from llmdoctor.answers import estimates_to_dict, measures

    return {
        "point": {name: _number(value) for name, value in values.items()},
        "settings": column.settings(column.seed(run.seed, 1)),
        "measures": estimates_to_dict(measures(run.answers(column), run.groups())),
    }


def sweep_heading(run: "Run") -> str:
    """What every point is measured on."""
    answers = sum(1 for _ in run.keys(""))
    per_point = f"{counted(len(run.questions), 'prompt')}, {counted(answers, 'answer')} per point"
    return f"{per_point}, seed {run.seed} (± 95% interval over prompts)"


def sweep_rows(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """The head and the rows of the table: a row per point, a column per setting and measure."""
    settings = list(points[0]["point"])
    names = list(dict.fromkeys(name for point in points for name in point["measures"]))
    rows = [[settings_of(point), *(cell(point["measures"].get(name)) for name in names)] for point in points]
    return [settings[0] if len(settings) == 1 else "", *map(spoken, names)], rows


def settings_of(point: Point, *without: str) -> str:
    """``helpful=0.5 safe=1``; the value alone where one setting is swept."""
    shown = {name: value for name, value in point["point"].items() if name not in without}
    texts = {name: value if isinstance(value, str) else f"{value:g}" for name, value in shown.items()}
    return next(iter(texts.values())) if len(point["point"]) == 1 else " ".join(f"{n}={t}" for n, t in texts.items())


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
