"""The picture of a sweep: a panel per measure, over the setting that was swept, with 95% intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmdoctor.cli.charts import INK, PAPER, STYLE, svg_of
from llmdoctor.cli.measures_table import spoken
from llmdoctor.show.text import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACROSS = 3  # panels, or names of the legend, in a row
_WIDTH, _HEIGHT, _MARGIN, _LEGEND = 3.6, 2.1, 0.4, 0.22  # inches: of a panel, above and below all, of a legend's line
_COLOURS = ("#207fea", "#cc5f00", "#7d7d7d", "#009e73", "#b5498f", "#8a7500")  # any colour vision can tell them apart
_LINES = ("-", "--", ":", "-.")
Point = dict[str, Any]
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
    legend = _LEGEND * math.ceil(len(lines) / _ACROSS) if len(lines) > 1 else 0.0
    size = (_WIDTH * _ACROSS, _HEIGHT * rows + 2 * _MARGIN + legend)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, facecolor=PAPER if alone else "none")
        # fixed margins, in inches: matplotlib's own layout would double the time
        edges = {
            "left": 0.6 / size[0],
            "right": 1 - 0.2 / size[0],
            "bottom": (0.6 + legend) / size[1],
            "top": 1 - 0.6 / size[1],
        }
        figure.subplots_adjust(**edges, wspace=0.25, hspace=0.55)
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
            figure.legend(*shown, loc="lower center", ncols=min(_ACROSS, len(lines)), frameon=False)
        return svg_of(figure, "measures of the answers over a setting", alone=alone)


def settings_of(point: Point, *without: str) -> str:
    """``helpful=0.5 safe=1``; the value alone where one setting is swept."""
    shown = {name: value for name, value in point["point"].items() if name not in without}
    texts = {name: value if isinstance(value, str) else f"{value:g}" for name, value in shown.items()}
    return next(iter(texts.values())) if len(point["point"]) == 1 else " ".join(f"{n}={t}" for n, t in texts.items())


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
        colour, stroke = _COLOURS[i % len(_COLOURS)], _LINES[i // len(_COLOURS) % len(_LINES)]
        how: dict[str, Any] = {"color": colour, "linestyle": stroke, "marker": "o", "markersize": 3.5, "linewidth": 1.4}
        axes.plot(xs, value, label=clean(label), gid=f"{name}-{i}", **how)
        axes.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
