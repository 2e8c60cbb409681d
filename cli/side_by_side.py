"""Comparisons on stdout: in panels on a terminal, else as plain text."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmdoctor.show.colours import scale_colour
from llmdoctor.show.comparison import View
from llmdoctor.show.lens import legend_steps, lens_name
from llmdoctor.show.word_diff import mark_words

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_REMOVED, _ADDED = "strike", "underline"
_ROOM_FOR_TWO = 80  # columns needed to show two answers side by side


def plain_comparison(view: View) -> str:
    """The two answers one below the other, differing words in wdiff's marks."""
    return "\n".join(
        [
            f"prompt: {view.prompt}",
            "",
            "patient alone:",
            mark_words(view.patient, view.diff.removed_spans, "[-", "-]"),
            "",
            f"{view.heading}:",
            mark_words("".join(view.guided), view.diff.added_spans, "{+", "+}"),
            "",
            *view.summary(),
        ]
    )


def markdown_comparison(view: View) -> str:
    """The two answers as quotations, which no text of a model can leave."""

    def quoted(text: str) -> str:
        escaped = re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", text)
        return "\n".join(f"> {line}  " for line in escaped.splitlines() or [""])

    parts = [f"## {' '.join(view.prompt.split())}", "", "patient alone:", "", quoted(view.patient), ""]
    parts += [f"{view.heading}:", "", quoted("".join(view.guided)), ""]
    return "\n".join([*parts, *(f"{line}  " for line in view.summary()), ""])


def summary_table(summary: Mapping[str, Any]) -> str:
    """Each measure of both sides with its 95% interval, a line each."""
    lines = [f"{summary['prompts']} prompts, {summary['answers']} answers (95% interval)"]
    lines.append(f"{'':<20}{'patient alone':<28}guided")
    for name in summary["guided"]:
        cells = [_cell(summary[side].get(name)) for side in ("patient", "guided")]
        lines.append(f"{name.replace('_', ' '):<20}{cells[0]:<28}{cells[1]}".rstrip())
    return "\n".join(lines)


def _cell(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "-"
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    return f"{value:.3g}" if math.isnan(low) else f"{value:.3g} ({low:.3g} to {high:.3g})"


def rich_comparison(view: View, width: int) -> "RenderableType":
    """The two answers, side by side if ``width`` columns suffice, with legend and summary below."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    patient = Text(view.patient)
    for span in view.diff.removed_spans:
        patient.stylize(_REMOVED, *span)
    guided = coloured_text(view.guided, view.scores, view.limit)
    for span in view.diff.added_spans:
        guided.stylize(_ADDED, *span)
    table = Table(box=box.ROUNDED, expand=True, title=Text(view.prompt, style="bold"), title_justify="left")
    if width >= _ROOM_FOR_TWO:
        table.add_column("patient alone", ratio=1)
        table.add_column(Text(view.heading), ratio=1)
        table.add_row(patient, guided)
    else:
        table.show_header = False
        table.add_column(ratio=1)
        table.add_row(Group(Text("patient alone", style="bold"), patient), end_section=True)
        table.add_row(Group(Text(view.heading, style="bold"), guided))
    return Group(table, _legend(view), *(Text(line) for line in view.summary()))


def coloured_text(pieces: Sequence[str], scores: Sequence[float | None], limit: float) -> "Text":
    """The pieces joined, each in the colour of its score."""
    from rich.text import Text

    text = Text()
    for piece, score in zip(pieces, scores, strict=False):
        text.append(piece, style=None if score is None else scale_colour(score, limit))
    return text


def _legend(view: View) -> "Text":
    """What colours and marks mean, in one line."""
    from rich.text import Text

    text = Text(style="dim")
    if view.marked:
        text.append("struck: only on the left", style=_REMOVED)
        text.append("   ")
        text.append("underlined: only on the right", style=_ADDED)
    if view.lens == "off" or not view.scores:
        return text
    if view.lens == "flips":
        return text.append("   ").append("guidance changed the likeliest token", style=f"not dim {scale_colour(1, 1)}")
    steps = legend_steps(view.lens)
    text.append(f"   {lens_name(view.lens, view.doctor)}: {view.limit * steps[0]:.2g} ")
    for share in steps:
        text.append("━━", style=f"not dim {scale_colour(share, 1)}")
    return text.append(f" {view.limit:+.2g}")
