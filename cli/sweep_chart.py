"""The picture of a sweep: a panel per measure, over the setting that was swept, with 95% intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmdoctor.cli.charts import INK, PAPER, STYLE, svg_of
from llmdoctor.cli.measures_table import spoken
from llmdoctor.cli.sweep import Point, settings_of
from llmdoctor.show.text import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACROSS, _WIDTH, _HEIGHT, _MARGIN = 3, 3.6, 2.1, 0.5  # panels in a row; inches of a panel, and above and below all
_COLOURS = ("#207fea", "#cc5f00", "#7d7d7d", "#009e73", "#b5498f", "#8a7500")  # any colour vision can tell them apart
_LINES = ("-", "--", ":", "-.")
Line = tuple[str, Sequence[float], Sequence[Mapping[str, Any]]]  # what else is set, the swept values, the measures


def svg_sweep(points: Sequence[Point], heading: str, *, alone: bool = True) -> str:
    """One SVG. A point has its ``point`` {setting: value} and its ``measures`` {name: {"value", "low", "high"}}.

    The first setting is the axis; every combination of the others is a line. Without ``alone`` it is part of a page.
    """
    import matplotlib
    from matplotlib.figure import Figure

    axis = next(iter(points[0]["point"]))
    values = list(dict.fromkeys(point["point"][axis] for point in points))
    numbers = all(isinstance(value, int | float) for value in values)
    lines = _lines(points, axis, {value: value if numbers else i for i, value in enumerate(values)})
    names = list(dict.fromkeys(name for point in points for name in point["measures"]))
    rows = math.ceil(len(names) / _ACROSS)
    size = (_WIDTH * _ACROSS, _HEIGHT * rows + 2 * _MARGIN)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, facecolor=PAPER if alone else "none", layout="constrained")
        if alone:
            figure.suptitle(clean(heading), x=0.01, ha="left", fontsize=9.5)
        panels = figure.subplots(rows, _ACROSS, squeeze=False).flatten()
        for panel, name in zip(panels, names, strict=False):
            _panel(panel, name, lines)
            panel.set_xlabel(clean(axis))
            if not numbers:
                panel.set_xticks(range(len(values)), [clean(str(value)) for value in values])
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        if len(lines) > 1:
            shown = panels[0].get_legend_handles_labels()
            figure.legend(*shown, loc="outside lower center", ncols=min(4, len(lines)), frameon=False)
        return svg_of(figure, "measures of the answers over a setting", alone=alone)


def _lines(points: Sequence[Point], axis: str, places: Mapping[Any, float]) -> list[Line]:
    found: dict[str, list[Point]] = {}
    for point in points:
        others = settings_of(point, axis) if len(point["point"]) > 1 else ""
        found.setdefault(others, []).append(point)
    return [
        (others, [places[one["point"][axis]] for one in own], [one["measures"] for one in own])
        for others, own in found.items()
    ]


def _panel(axes: "Axes", name: str, lines: Sequence[Line]) -> None:
    axes.set_title(clean(spoken(name)), fontsize=9.5, loc="left")
    axes.set_facecolor("none")
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(color=INK, alpha=0.12)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    for i, (label, places, measures) in enumerate(lines):
        known = [(x, one[name]) for x, one in zip(places, measures, strict=True) if name in one]
        xs = [x for x, _ in known]
        value, low, high = ([one[key] for _, one in known] for key in ("value", "low", "high"))
        how = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _LINES[i // len(_COLOURS) % len(_LINES)]}
        axes.plot(xs, value, marker="o", markersize=3.5, linewidth=1.4, label=clean(label), gid=f"{name}-{i}", **how)
        axes.fill_between(xs, low, high, color=how["color"], alpha=0.15, linewidth=0)
