"""The picture of a diagnosis: a bar with its interval for every face pair, and what held-out pairs say. No tensors.

Bars are weights per standard deviation, so that behaviours compare; blue to the right is rewarded, orange to the left
is punished, as in `llmdoctor.show.colours`. Sign and interval are also text; a weight whose interval covers zero is
grey.
"""

import html
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llmdoctor.show.colours import scale_colour
from llmdoctor.show.text import clean

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmdoctor.token_rewards.diagnosis import Diagnosis, Estimate, Example, FaceDiagnosis

_PLAIN_BAR = 31
_UNICODE = ("█", "├", "─", "┤", "●", "│")
_ASCII = ("=", "[", "-", "]", "o", "|")


def plain_diagnosis(diagnosis: "Diagnosis") -> str:
    """The picture in plain letters, its bars at most 80 columns wide where names are short."""
    rows = _sorted(diagnosis)
    limit = _limit(rows)
    width = max(len(clean(face.name)) for face in rows)
    head = f"{'':<{width}}  {'punished   0   rewarded':^{_PLAIN_BAR}}  per sd (95% interval)"
    lines = [*textwrap.wrap(clean(diagnosis.verdict), 80), "", head.rstrip()]
    for face in rows:
        bar = "".join(cell for cell, _ in _bar(face.standardised, limit, _PLAIN_BAR, _ASCII))
        lines.append(f"{clean(face.name):<{width}}  {bar}  {_interval(face.standardised)}")
    lines += ["", f"{'':<{width}}  {'weight (95% interval)':<28}{'share':>7}{'agreement':>11}"]
    for face in rows:
        weight = f"{_interval(face.weight):<28}{_share(face, diagnosis):>7}{face.agreement:>11.1%}"
        lines.append(f"{clean(face.name):<{width}}  {weight}")
    lines += ["", "held-out pairs predicted (95% interval), chance 50%"]
    lines += [*(f"{name:<18} {_percents(part)}" for name, part in _accuracies(diagnosis)), ""]
    return "\n".join([*lines, *(f"{clean(face.name)}: {_examples(face)}" for face in rows), _settings(diagnosis)])


def rich_diagnosis(diagnosis: "Diagnosis", width: int) -> "RenderableType":
    """The picture for a terminal of ``width`` columns (80 or more look best): bars, accuracies, examples, verdict."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows = _sorted(diagnosis)
    limit = _limit(rows)
    name_width = min(max(len(clean(face.name)) for face in rows), 16)
    bar_width = max(21, min(61, width - name_width - 45))
    bar_width -= 1 - bar_width % 2  # odd: zero has a column of its own
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
        predicted.add_row(name, line, _percents(part))
    examples = [Text.assemble((clean(face.name), "bold"), f": {_examples(face)}") for face in rows]
    verdict = Text(clean(diagnosis.verdict), style="bold")
    return Group(verdict, Text(), bars, Text(), predicted, Text(), *examples, Text(_settings(diagnosis), style="dim"))


def svg_diagnosis(diagnosis: "Diagnosis") -> str:
    """The picture as a file of its own: scalable, no font or script fetched."""
    return _drawing(diagnosis, alone=True)


def html_diagnosis(diagnosis: "Diagnosis") -> str:
    """The picture as a part of a page: verdict, drawing and examples; every text is escaped, nothing is fetched."""
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


# What all of them show


def _sorted(diagnosis: "Diagnosis") -> list["FaceDiagnosis"]:
    return sorted(diagnosis.faces, key=lambda face: -face.standardised.value)


def _limit(faces: Sequence["FaceDiagnosis"]) -> float:
    """The end of the scale: the farthest end of an interval or bar, 1 where there is none."""
    return max(max(abs(e.low), abs(e.high), abs(e.value)) for e in (face.standardised for face in faces)) or 1.0


def _colour(face: "FaceDiagnosis", limit: float) -> str:
    clear = not face.weight.covers(0)
    return scale_colour(face.standardised.value if clear else 0.0, min(abs(face.standardised.value), limit) or 1.0)


def _accuracies(diagnosis: "Diagnosis") -> list[tuple[str, "Estimate"]]:
    return [
        ("these faces", diagnosis.accuracy),
        ("length alone", diagnosis.length_accuracy),
        ("faces and length", diagnosis.combined_accuracy),
    ]


def _interval(estimate: "Estimate") -> str:
    return f"{estimate.value:+.2f} ({estimate.low:+.2f} to {estimate.high:+.2f})"


def _percents(part: "Estimate") -> str:
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
    """The cells of a bar from ``zero``, in the middle, to the value, and whether each belongs to the interval on it."""
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

# Names end at _LEFT, bars are _BAR wide, numbers begin at _NUMBERS.
_WIDTH, _ROW, _LEFT, _BAR, _NUMBERS, _SHARE = 940, 26, 180, 420, 632, 850


def _drawing(diagnosis: "Diagnosis", *, alone: bool) -> str:
    """One SVG; ``alone`` with its own background, title and verdict, else in the colours of the page around it."""
    faces = _sorted(diagnosis)
    limit = _limit(faces)
    middle = _LEFT + _BAR / 2
    body: list[str] = []
    y = 8
    if alone:
        for line in textwrap.wrap(diagnosis.verdict, 125):
            y += 20
            body.append(_text(16, y, line))
        y += 16
    y += 18
    head = y
    body += [
        _text(middle - 8, y, "punished", "end", note=True),
        _text(middle + 8, y, "rewarded", note=True),
        _text(_NUMBERS, y, "per sd (95%)", note=True),
        _text(_SHARE, y, "share", "end", note=True),
        _text(_WIDTH - 16, y, "agreement", "end", note=True),
    ]
    for face in faces:
        y += _ROW
        e, name = face.standardised, clean(face.name)
        weight = f"{face.name}: weight {_interval(face.weight)} for each unit of summed reward"
        body += [
            f"<g><title>{_escape(weight)}</title>",
            _text(_LEFT - 12, y + 5, name if len(name) <= 18 else f"{name[:17]}…", "end"),
            *_whisker(e, middle, _BAR / 2 / limit, y, _colour(face, limit)),
            _text(_NUMBERS, y + 5, _interval(e)),
            _text(_SHARE, y + 5, _share(face, diagnosis), "end"),
            _text(_WIDTH - 16, y + 5, f"{face.agreement:.1%}", "end"),
            "</g>",
        ]
    body.append(_axis(middle, head + 8, y + 13))
    y += 44
    head = y
    body += [
        _text(_LEFT, y, "0%", "middle", note=True),
        _text(middle, y, "chance 50%", "middle", note=True),
        _text(_LEFT + _BAR, y, "100%", "middle", note=True),
        _text(_NUMBERS, y, "of held-out pairs predicted (95%)", note=True),
    ]
    for name, part in _accuracies(diagnosis):
        y += _ROW
        body += [
            _text(_LEFT - 12, y + 5, name, "end"),
            *_whisker(part, middle, _BAR, y, scale_colour(part.value - 0.5, 0.5), zero=0.5),
            _text(_NUMBERS, y + 5, f"{part.value:.1%} ({part.low:.1%} to {part.high:.1%})"),
        ]
    body.append(_axis(middle, head + 8, y + 13))
    y += 38
    if alone:
        body.append(_text(16, y, _settings(diagnosis), note=True))
        y += 18
    page = '<rect width="100%" height="100%" fill="#fdfdfd"/>' if alone else ""
    colour = ' color="#1b1b1b"' if alone else ' style="max-width:100%;height:auto"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" height="{y}"{colour} '
        f'font-family="system-ui, sans-serif" font-size="14" role="img" aria-label="diagnosis of the preferences">'
        f"{page}\n" + "\n".join(body) + "\n</svg>"
    )


def _whisker(e: "Estimate", middle: float, unit: float, y: int, colour: str, zero: float = 0.0) -> Iterator[str]:
    """A bar from the axis to the value, and its interval as a line with ends."""
    low, at, high = (middle + (x - zero) * unit for x in (e.low, e.value, e.high))
    yield f'<rect x="{min(at, middle):.1f}" y="{y - 7}" width="{abs(at - middle):.1f}" height="14" fill="{colour}"/>'
    path = f"M{low:.1f} {y - 5}v10M{low:.1f} {y}H{high:.1f}M{high:.1f} {y - 5}v10"
    yield f'<path d="{path}" stroke="currentColor" stroke-width="1.5" fill="none"/>'
    yield f'<circle cx="{at:.1f}" cy="{y}" r="3" fill="currentColor"/>'


def _axis(x: float, top: float, bottom: float) -> str:
    return f'<path d="M{x:.1f} {top:.1f}V{bottom:.1f}" stroke="currentColor" stroke-opacity=".45"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", *, note: bool = False) -> str:
    faint = ' font-size="12" opacity=".7"' if note else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="currentColor"{faint}>{_escape(text)}</text>'


def _escape(text: str) -> str:
    return html.escape(clean(text), quote=True)
