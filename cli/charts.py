"""The picture of a diagnosis: a bar with its interval for every face pair, and how well held-out pairs are predicted.

Bars are weights per standard deviation, so that behaviours can be compared. Blue to the right is rewarded, orange to
the left is punished, as in `llmdoctor.show.colours`; a weight whose interval covers zero is grey. Every number is text
too.
"""

import html
import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmdoctor.show.colours import scale_colour
from llmdoctor.show.text import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType

    from llmdoctor.records import Estimate
    from llmdoctor.token_rewards.diagnosis import Diagnosis, Example, FaceDiagnosis

_PLAIN_BAR = 31
_UNICODE = ("█", "├", "─", "┤", "●", "│")
_ASCII = ("=", "[", "-", "]", "o", "|")


def plain_diagnosis(diagnosis: "Diagnosis") -> str:
    """The picture in plain letters, at most 80 columns wide where names are short."""
    rows = _sorted(diagnosis)
    limit = _limit(rows)
    width = max((len(clean(face.name)) for face in rows), default=0)
    lines = textwrap.wrap(clean(diagnosis.verdict), 80)
    if rows:
        head = f"{'':<{width}}  {'punished   0   rewarded':^{_PLAIN_BAR}}  per sd (95% interval)"
        lines += ["", head.rstrip()]
        for face in rows:
            bar = "".join(cell for cell, _ in _bar(face.standardised, limit, _PLAIN_BAR, _ASCII))
            lines.append(f"{clean(face.name):<{width}}  {bar}  {_interval(face.standardised)}")
        lines += ["", f"{'':<{width}}  {'weight (95% interval)':<28}{'share':>7}{'agreement':>11}"]
        for face in rows:
            weight = f"{_interval(face.weight):<28}{_share(face, diagnosis):>7}{face.agreement:>11.1%}"
            lines.append(f"{clean(face.name):<{width}}  {weight}")
    lines += ["", "held-out pairs predicted (95% interval), chance 50%"]
    lines += [*(f"{name:<18} {percents(part)}" for name, part in _accuracies(diagnosis)), ""]
    return "\n".join([*lines, *(f"{clean(face.name)}: {_examples(face)}" for face in rows), _settings(diagnosis)])


def rich_diagnosis(diagnosis: "Diagnosis", width: int) -> "RenderableType":
    """The picture for a terminal of ``width`` columns (80 or more look best): bars, accuracies, examples, verdict."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = _sorted(diagnosis)
    limit = _limit(rows)
    name_width = min(max((len(clean(face.name)) for face in rows), default=0), 16)
    bar_width = max(21, min(61, width - name_width - 45))
    bar_width -= 1 - bar_width % 2  # odd, so that zero has a column of its own
    bars = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    bars.add_column(max_width=name_width, overflow="ellipsis", no_wrap=True)
    bars.add_column(Text("punished 0 rewarded".center(bar_width)), no_wrap=True, width=bar_width)
    bars.add_column("per sd (95% interval)", no_wrap=True)
    for title in ("weight", "share", "agree"):
        bars.add_column(title, justify="right", no_wrap=True)
    for face in rows:
        colour = _colour(face, limit)
        bar = Text()
        for cell, whisker in _bar(face.standardised, limit, bar_width, _UNICODE):
            bar.append(cell, style="" if whisker else colour)
        style = "dim" if face.weight.covers(0) else ""
        numbers = (_interval(face.standardised), f"{face.weight.value:+.2g}", _share(face, diagnosis))
        cells = [Text(text, style=style) for text in (*numbers, f"{face.agreement:.0%}")]
        bars.add_row(Text(clean(face.name), style="bold"), bar, *cells)
    predicted = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    predicted.add_column(no_wrap=True)
    predicted.add_column(Text("0%       chance        100%"), no_wrap=True, width=27)
    predicted.add_column("of held-out pairs predicted (95%)", no_wrap=True)
    for name, part in _accuracies(diagnosis):
        line = Text()
        for cell, whisker in _bar(part, 0.5, 27, _UNICODE, zero=0.5):
            line.append(cell, style="" if whisker else scale_colour(part.value - 0.5, 0.5))
        predicted.add_row(name, line, percents(part))
    examples = [Text.assemble((clean(face.name), "bold"), f": {_examples(face)}") for face in rows]
    verdict = Text(clean(diagnosis.verdict), style="bold")
    shown = (bars, Text()) if rows else ()
    return Group(verdict, Text(), *shown, predicted, Text(), *examples, Text(_settings(diagnosis), style="dim"))


def svg_diagnosis(diagnosis: "Diagnosis") -> str:
    """The picture as an SVG file: the same bytes for the same diagnosis; nothing in it is fetched."""
    return _drawing(diagnosis, alone=True)


def html_diagnosis(diagnosis: "Diagnosis") -> str:
    """The picture as a part of a page: verdict, drawing and examples. Every text is escaped, nothing is fetched."""
    rows = "".join(
        f"<tr><th scope=row>{_escape(face.name)}</th><td>{_escape(_pairs(face.best))}</td>"
        f"<td>{_escape(_pairs(face.worst))}</td></tr>"
        for face in _sorted(diagnosis)
    )
    return (
        f'<section class="diagnosis">\n<h2>Which behaviours the preferences reward</h2>\n'
        f"<p>{_escape(diagnosis.verdict)}</p>\n{_drawing(diagnosis, alone=False)}\n"
        "<details><summary>Pairs that each face pair explains best, and contradicts most (log-odds)</summary>\n"
        f"<table><tr><th></th><th>explained best</th><th>contradicted most</th></tr>{rows}</table></details>\n"
        f'<p class="note">{_escape(_settings(diagnosis))}</p>\n</section>'
    )


# What all forms show


def _sorted(diagnosis: "Diagnosis") -> list["FaceDiagnosis"]:
    return sorted(diagnosis.faces, key=lambda face: -face.standardised.value)


def _limit(faces: Sequence["FaceDiagnosis"]) -> float:
    """The end of the scale: the farthest end of an interval or bar, 1 where there is none."""
    ends = (max(abs(e.low), abs(e.high), abs(e.value)) for e in (face.standardised for face in faces))
    return max(ends, default=1.0) or 1.0


def _colour(face: "FaceDiagnosis", limit: float) -> str:
    clear = not face.weight.covers(0)
    return scale_colour(face.standardised.value if clear else 0.0, min(abs(face.standardised.value), limit) or 1.0)


def _accuracies(diagnosis: "Diagnosis") -> list[tuple[str, "Estimate"]]:
    found = [("length alone", diagnosis.length_accuracy)]
    if diagnosis.faces:
        found = [("these faces", diagnosis.accuracy), *found, ("faces and length", diagnosis.combined_accuracy)]
    if diagnosis.probe_accuracy is not None:
        found.append(("the probe", diagnosis.probe_accuracy))
    if diagnosis.joint_accuracy is not None and diagnosis.faces:
        found.append(("faces and probe", diagnosis.joint_accuracy))
    return found


def _interval(estimate: "Estimate") -> str:
    return f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"


def percents(part: "Estimate") -> str:
    """``71.7% (59.2% to 81.5%)``; the value alone where no interval is known or needed, ``-`` without a value."""
    if math.isnan(part.low) or part.low == part.high:
        return "-" if math.isnan(part.value) else f"{part.value:.1%}"
    return f"{part.value:.1%} ({part.low:.1%} to {part.high:.1%})"


def _share(face: "FaceDiagnosis", diagnosis: "Diagnosis") -> str:
    return f"{face.share:.0%}" if diagnosis.explains else "-"  # a share of nothing is noise


def _pairs(examples: Sequence["Example"]) -> str:
    return ", ".join(f"{clean(example.pair_id)} ({example.contribution:+.2g})" for example in examples) or "none"


def _examples(face: "FaceDiagnosis") -> str:
    return f"explains best {_pairs(face.best)}; contradicts {_pairs(face.worst)}"


def _settings(diagnosis: "Diagnosis") -> str:
    used = diagnosis.settings
    return (
        f"{diagnosis.pairs} pairs, tau {used['tau']:g}, theta {used['theta']:g}; "
        f"{used['resamples']} bootstrap resamples, {used['folds']} folds, seed {used['seed']}"
    )


def _bar(
    estimate: "Estimate", limit: float, width: int, marks: tuple[str, ...], zero: float = 0.0
) -> Iterator[tuple[str, bool]]:
    """The cells of a bar from ``zero``, in the middle, to the value; for each, whether it is part of the interval."""
    fill, left, line, right, value, axis = marks
    middle = width // 2

    def column(x: float) -> int:
        return min(width - 1, max(0, middle + round((x - zero) / limit * middle)))

    low, at, high = (column(x) for x in (estimate.low, estimate.value, estimate.high))
    for cell in range(width):
        if cell == at:
            yield value, True
        elif low <= cell <= high:
            yield (left if cell == low else right if cell == high else line), True
        elif cell == middle:
            yield axis, True
        elif min(middle, at) < cell < max(middle, at):
            yield fill, False
        else:
            yield " ", True


# The drawing

INK, PAPER = "#1b1b1b", "#fdfdfd"
# Inches: the figure's width, a row of bars, a line of text; where bars begin, and how wide they are.
WIDTH, ROW, LINE, MARGIN, _LEFT, _BARS = 10.8, 0.3, 0.2, 0.18, 1.65, 3.5
HEAD, TICKS = 0.34, 0.34  # inches above and below the rows of a panel
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "llmdoctor",  # the same numbers give the same file
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; a viewer without it takes its own
    "font.size": 9.5,
    **dict.fromkeys(("text.color", "axes.edgecolor", "xtick.color", "xtick.labelcolor"), INK),
}
_Row = tuple[str, "Estimate", str, tuple[str, ...]]  # name, estimate, colour of its bar, texts of the columns
_Column = tuple[str, float]  # title, and its right edge in inches beside the bars


def _drawing(diagnosis: "Diagnosis", *, alone: bool) -> str:
    """One SVG; ``alone`` with its own background, verdict and settings, else in the colours of the page around it."""
    import matplotlib
    from matplotlib.figure import Figure

    faces = _sorted(diagnosis)
    limit = _limit(faces)
    verdict = textwrap.wrap(clean(diagnosis.verdict), 135) if alone else []
    top = MARGIN + (len(verdict) * LINE + MARGIN if alone else 0)
    parts = _accuracies(diagnosis)
    middle = top + (HEAD + len(faces) * ROW + TICKS if faces else 0)
    height = middle + HEAD + len(parts) * ROW + TICKS + (LINE if alone else 0) + MARGIN / 2
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), facecolor=PAPER if alone else "none")
        left = MARGIN / WIDTH
        for number, line in enumerate(verdict):
            figure.text(left, 1 - (MARGIN + number * LINE) / height, line, va="top")
        if alone:
            figure.text(left, MARGIN / 2 / height, _settings(diagnosis), va="bottom", alpha=0.7)
        rows = [(face.name, face.standardised, _colour(face, limit), _numbers(face, diagnosis)) for face in faces]
        columns = [("per sd (95%)", 1.95), ("weight (95%)", 3.75), ("share", 4.4), ("agreement", 5.3)]
        if faces:
            axes = panel(figure, "face", top, rows, columns, 0.0, limit)
            axes.set_title("← punished   rewarded →", fontsize=9.5)
            axes.locator_params(axis="x", nbins=6)
        rows = [(name, part, scale_colour(part.value - 0.5, 0.5), (percents(part),)) for name, part in parts]
        axes = panel(figure, "held-out", middle, rows, [("predicted (95%)", 1.95)], 0.5, 0.5)
        axes.set_title("held-out pairs", fontsize=9.5)
        axes.set_xticks([0, 0.5, 1], ["0%", "chance 50%", "100%"])
        return svg_of(figure, "diagnosis of the preferences", alone=alone)


def _numbers(face: "FaceDiagnosis", diagnosis: "Diagnosis") -> tuple[str, ...]:
    return _interval(face.standardised), _interval(face.weight), _share(face, diagnosis), f"{face.agreement:.1%}"


def panel(
    figure: "Figure",
    kind: str,
    top: float,
    rows: Sequence[_Row],
    columns: Sequence[_Column],
    zero: float,
    limit: float,
) -> "Axes":
    """Bars from ``zero`` with their intervals, a row each, over zero - limit to zero + limit; columns beside them.

    ``top`` is in inches from the top of the figure. Bar number i has the id "KIND-i", its interval "KIND-interval-i".
    """
    height = figure.get_figheight()
    bottom = height - top - HEAD - len(rows) * ROW
    axes = figure.add_axes((_LEFT / WIDTH, bottom / height, _BARS / WIDTH, len(rows) * ROW / height))
    axes.set(xlim=(zero - limit, zero + limit), ylim=(len(rows) - 0.5, -0.5), yticks=[], facecolor="none")
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.grid(axis="x", color=INK, alpha=0.12)
    axes.set_axisbelow(True)
    axes.axvline(zero, color=INK, alpha=0.5, linewidth=1)
    beside = axes.get_yaxis_transform()  # x as a part of the axes' width, y in rows
    for title, edge in columns:
        axes.text(1 + edge / _BARS, -0.6, title, transform=beside, ha="right", va="bottom", alpha=0.7)
    for i, (name, estimate, colour, numbers) in enumerate(rows):
        axes.text(-0.04, i, _short(clean(name)), transform=beside, ha="right", va="center")
        axes.barh(i, estimate.value - zero, left=zero, height=0.55, color=colour)[0].set_gid(f"{kind}-{i}")
        (line,) = axes.plot([estimate.low, estimate.high], [i, i], "|-", color=INK, linewidth=1.4, markersize=8)
        line.set(gid=f"{kind}-interval-{i}", clip_on=False)
        axes.plot(estimate.value, i, "o", color=INK, markersize=4.5, clip_on=False)
        for (_, edge), text in zip(columns, numbers, strict=True):
            axes.text(1 + edge / _BARS, i, text, transform=beside, ha="right", va="center")
    return axes


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def svg_of(figure: "Figure", label: str, *, alone: bool) -> str:
    """The figure's ``<svg>`` element, which names no address; in a page it takes the page's colour and width."""
    written = io.StringIO()
    with warnings.catch_warnings():
        # Names may be in any script: the text is drawn by the viewer, with the viewer's fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support .* natively")
        figure.savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = written.getvalue()
    attributes = f'role="img" aria-label="{label}"'
    if not alone:
        attributes += ' style="max-width:100%;height:auto"'
        text = text.replace(INK, "currentColor")
    # Without the XML declaration and the document type, so that the element can be part of a page.
    return text[text.index("<svg") :].replace("<svg", f"<svg {attributes}", 1)


def _escape(text: str) -> str:
    return html.escape(clean(text), quote=True)
