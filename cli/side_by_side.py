"""Comparisons on stdout: in a table on a terminal, else as plain text."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmdoctor.show.colours import scale_colour
from llmdoctor.show.comparison import Mark, MarkedText, View
from llmdoctor.show.lens import legend_steps, lens_name, scale_end

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_ROOM_FOR_EACH = 40  # columns of the terminal that an answer needs to stand beside others
_WDIFF: Mapping[Mark, str] = {"": "{}", "del": "[-{}-]", "ins": "{{+{}+}}"}
_MARKDOWN: Mapping[Mark, str] = {"": "{}", "del": "~~{}~~", "ins": "**{}**"}
_STYLES: Mapping[Mark, str] = {"": "", "del": "strike", "ins": "underline"}


def plain_comparison(view: View) -> str:
    """The answers one below the other, differing words in wdiff's marks."""
    parts = [f"prompt: {view.prompt}", f"patient alone:\n{_spelt(view.marked_patient(), _WDIFF)}"]
    for column in view.columns:
        parts += [f"{column.heading}:\n{_spelt(column.guided_text(), _WDIFF)}", "\n".join(column.summary())]
    return "\n\n".join(parts)


def markdown_comparison(view: View) -> str:
    """The answers as quotations, which no text of a model can leave."""

    def quoted(parts: MarkedText) -> str:
        escaped = [(re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", text), mark) for text, mark in parts]
        return "\n".join(f"> {line}  " for line in _spelt(escaped, _MARKDOWN).splitlines() or [""])

    parts = [f"## {' '.join(view.prompt.split())}", "", "patient alone:", "", quoted(view.marked_patient()), ""]
    for column in view.columns:
        parts += [f"{column.heading}:", "", quoted(column.guided_text()), ""]
        parts += [*(f"{line}  " for line in column.summary()), ""]
    return "\n".join(parts)


def _spelt(parts: MarkedText, marks: Mapping[Mark, str]) -> str:
    """The text with its marks as signs; these enclose no space at either end, where Markdown knows none."""

    def spelt(text: str, mark: Mark) -> str:
        core = text.strip() if mark else ""
        return text.replace(core, marks[mark].format(core), 1) if core else text

    return "".join(spelt(*part) for part in parts)


def rich_comparison(view: View, width: int, *, colours: bool = True) -> "RenderableType":
    """The answers side by side if ``width`` columns suffice, else stacked; legend and summary below.

    Without ``colours`` differing words have the marks of plain text.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def shown(parts: MarkedText) -> Text:
        if not colours:
            return Text(_spelt(parts, _WDIFF))
        return Text.assemble(*((text, _STYLES[mark]) for text, mark in parts))

    texts = [(Text("patient alone"), shown(view.marked_patient()))]
    for column in view.columns:
        texts.append((Text(column.heading), _guided(column) if colours else shown(column.guided_text())))
    table = Table(box=box.ROUNDED, expand=True, title=Text(view.prompt, style="bold"), title_justify="left")
    if width >= _ROOM_FOR_EACH * len(texts):
        for heading, _ in texts:
            table.add_column(heading, ratio=1)
        table.add_row(*(text for _, text in texts))
    else:
        table.show_header = False
        table.add_column(ratio=1)
        for heading, text in texts:
            heading.stylize("bold")
            table.add_row(Group(heading, text), end_section=True)
    return Group(table, *(_legend(view) if colours else ()), *_summaries(view))


def _guided(view: View) -> "Text":
    """The guided answer, every token in the colour of its score; what is struck was not said and has none."""
    from rich.text import Text

    text = Text()
    for token in view.marked_guided():
        for part, mark in token.text:
            colour = token.colour or ""
            text.append(part, style=f"dim {_STYLES[mark]}" if mark == "del" else f"{_STYLES[mark]} {colour}".strip())
    return text


def _summaries(view: View) -> "list[Text]":
    """What changed and the settings, of every guided answer; of several, under its heading."""
    from rich.text import Text

    if not view.others:
        return [Text(line) for line in view.summary()]
    each = [(Text(column.heading, style="bold"), *map(Text, column.summary())) for column in view.columns]
    return [line for lines in each for line in lines]


def coloured_text(pieces: Sequence[str], scores: Sequence[float | None], limit: float) -> "Text":
    """The pieces joined, each in the colour of its score."""
    from rich.text import Text

    text = Text()
    for piece, score in zip(pieces, scores, strict=False):
        text.append(piece, style=None if score is None else scale_colour(score, limit))
    return text


def _legend(view: View) -> "list[Text]":
    """What marks and colours mean, a line each."""
    from rich.text import Text

    lines = [Text(view.legend(), style="dim")] if view.legend() else []
    if view.lens == "off" or not view.scores:
        return lines
    text = Text(style="dim")
    if view.lens == "flips":
        return [*lines, text.append("guidance changed the likeliest token", style=f"not dim {scale_colour(1, 1)}")]
    steps = legend_steps(view.lens)
    text.append(f"{lens_name(view.lens, view.doctor)}: {view.limit * steps[0]:.2g} ")
    for share in steps:
        text.append("━━", style=f"not dim {scale_colour(share, 1)}")
    return [*lines, text.append(f" {scale_end(view.lens, view.limit)}")]
