"""Measures with their intervals as tables of plain text."""

import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from llmdoctor.show.formats import counted

_GAP = 2  # columns between two of a table
_PLAIN_WIDTH = 100  # where there is no terminal that has one


def summary_table(summary: Mapping[str, Any]) -> str:
    """Each measure of all answers, a line each, the patient, the guided one and further ones beside each other."""
    columns = {"patient alone": summary["patient"], "guided": summary["guided"], **summary.get("vs", {})}
    names = dict.fromkeys(name for measures in columns.values() for name in measures)
    rows = [[spoken(name), *(cell(measures.get(name)) for measures in columns.values())] for name in names]
    heading = f"{counted(summary['prompts'], 'prompt')}, {counted(summary['answers'], 'answer')} (± 95% interval)"
    return f"{heading}\n{text_table(['', *columns], rows)}"


def cell(estimate: Mapping[str, float] | None) -> str:
    """``0.21 ±0.03``; the value alone where a single prompt gives no interval."""
    if estimate is None or math.isnan(estimate["value"]):
        return "-"
    half = (estimate["high"] - estimate["low"]) / 2
    return f"{estimate['value']:.3g}" + ("" if math.isnan(half) else f" ±{half:.2g}")


def spoken(name: str) -> str:
    """The name of a measure in words: ``KL per token``, ``helpful log-prob``."""
    words = name.replace("_", " ").replace("kl per", "KL per").replace("logprob", "log-prob")
    return "repeating answers" if words == "repeating" else words


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """The rows in aligned columns; columns that do not fit follow in a table below, beside the first one again.

    ``width`` is that of the terminal by default, or of COLUMNS.
    """
    width = width or shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    tables, shown = [], [0]
    for i in range(1, len(header) + 1):
        if i == len(header) or (len(shown) > 1 and sum(widths[j] + _GAP for j in [*shown, i]) - _GAP > width):
            aligned = ("".join(line[j].ljust(widths[j] + _GAP) for j in shown).rstrip() for line in lines)
            tables.append("\n".join(aligned))
            shown = [0]
        shown.append(i)
    return "\n\n".join(tables)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(each.replace('|', chr(92) + '|') for each in line)} |\n" for line in lines)
