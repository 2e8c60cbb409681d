"""Measures of answers, as ``compare`` and ``eval`` show them: what each is called, and tables with 95% intervals."""

import math
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmdoctor.cli.charts import percents
from llmdoctor.show.formats import counted

if TYPE_CHECKING:
    from llmdoctor.records import Estimate

_GAP = 2  # columns between two of a table
_PLAIN_WIDTH = 100  # where there is no terminal that has one
Measures = Mapping[str, Mapping[str, float]]  # {"tokens": {"value": 41.0, "low": 38.2, "high": 43.8}}

MEASURES = {
    "tokens": ("tokens", "length of an answer"),
    "words": ("words", "the same in words"),
    "kl_per_token": ("KL per token", "how far guidance moved the patient: KL(guided || patient) of a token, in nats"),
    "kl": ("KL per answer", "its sum over an answer, in nats"),
    "patient_logprob": ("patient log-prob", "log-prob of a token under the patient, in nats"),
    "NAME_logprob": ("NAME log-prob", "the same under the doctor NAME"),
    "changed": ("changed tokens", "share of places where guidance changed the likeliest token"),
    "unfinished": ("unfinished answers", "share of answers that max_new_tokens cut"),
    "repeated_sentences": (
        "repeated sentences",
        "share of sentences that the answer has said before, word for word",
    ),
    "repeating": ("repeating answers", "share of answers with a repeated sentence"),
    "distinct_2": ("distinct-2", "different pairs of words, divided by all pairs of words, of all answers"),
    "distinct_4": ("distinct-4", "the same for four words"),
    "tokens_per_second": (
        "tokens per second",
        "speed of all answers together, the models' first steps included; without an interval",
    ),
    "win_rate": ("guided wins", "share of prompts where the judge prefers the guided answer; a tie counts half"),
    "agreed": ("same in both orders", "share of prompts on which a judge of two answers says the same in both orders"),
    "patient_score": ("score of the patient", "mean score of the patient's answers, by a judge that scores one answer"),
    "guided_score": ("score of the guided", "mean score of the guided answers"),
    "gain": ("gain in score", "the guided answer's score minus the patient's, of the same prompt"),
}
"""By the key in JSON: the name in all tables, and what it means. docs/evaluate.md has them too."""
_SHARES = {"changed", "unfinished", "repeated_sentences", "repeating", "win_rate", "agreed"}
_OF_GUIDANCE = {"kl_per_token", "kl", "changed"}  # the patient alone has none
_BY_A_JUDGE = ("win_rate", "agreed", "patient_score", "guided_score", "gain")

EPILOG = (
    f"Measures: {', '.join(name for key, (name, _) in MEASURES.items() if key not in _BY_A_JUDGE)}; docs/evaluate.md "
    "explains them. All intervals are of 95%, over prompts."
)
"""Of the commands that print them, for ``--help``."""


def spoken(key: str) -> str:
    """The name of a measure in words: ``KL per token``, ``helpful log-prob``."""
    return MEASURES[key][0] if key in MEASURES else re.sub("_logprob$", " log-prob", key)


def cell(key: str, estimate: Mapping[str, float] | None) -> str:
    """``41.2 ±2.6``; shares as ``3.0% (1.1% to 7.9%)``; the value alone where a single prompt gives no interval."""
    if estimate is None or math.isnan(estimate["value"]):
        return "-"
    found = as_estimate(estimate)
    if key in _SHARES:
        return percents(found)
    below, above = found.value - found.low, found.high - found.value
    if math.isnan(below):
        return number(found.value)
    if math.isclose(below, above, rel_tol=0.02, abs_tol=1e-12):
        return f"{number(found.value)} ±{number(above, 2)}"
    return f"{number(found.value)} ({number(found.low)} to {number(found.high)})"


def number(value: float, digits: int = 3) -> str:
    """Three digits that count, without an exponent for the numbers of every day."""
    return f"{float(f'{value:.{digits}g}'):g}"


def as_estimate(found: Mapping[str, float]) -> "Estimate":
    """What `estimates_to_dict` made plain."""
    from llmdoctor.records import Estimate

    return Estimate(**found)


Table = tuple[list[str], list[list[str]]]  # its titles, and its rows of cells


def by_measure(patient: Measures, guided: Mapping[str, Measures]) -> Table:
    """A row per measure: the patient alone beside guided answers of any number of kinds."""
    columns = {"patient alone": {key: each for key, each in patient.items() if key not in _OF_GUIDANCE}, **guided}
    keys = dict.fromkeys(key for measures in guided.values() for key in measures)
    return ["", *columns], [[spoken(key), *(cell(key, one.get(key)) for one in columns.values())] for key in keys]


def by_setting(title: str, settings: Sequence[tuple[str, Measures]]) -> Table:
    """A row per setting, named by the first of its pair; a column per measure."""
    keys = list(dict.fromkeys(key for _, measures in settings for key in measures))
    rows = [[name, *(cell(key, measures.get(key)) for key in keys)] for name, measures in settings]
    return [title, *map(spoken, keys)], rows


def counts_text(prompts: int, answers: int, each: str) -> str:
    """``8 prompts, 16 answers per beta``: what the intervals of a table are over."""
    return f"{counted(prompts, 'prompt')}, {counted(answers, 'answer')} {each}"


def summary_table(summary: Mapping[str, Any]) -> str:
    """The summary of ``compare``: all answers of each column."""
    columns = {"guided": summary["guided"], **summary.get("vs", {})}
    heading = counts_text(summary["prompts"], summary["answers"], "per column")
    return f"{heading} (95% intervals)\n{text_table(*by_measure(summary['patient'], columns))}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """The rows in aligned columns; columns that do not fit follow in a table below, beside the first one again.

    ``width`` is that of the terminal by default, or of COLUMNS.
    """
    width = width or text_width()
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


def text_width() -> int:
    """Of the terminal, or of COLUMNS."""
    return shutil.get_terminal_size((_PLAIN_WIDTH, 24)).columns


def filled(text: str) -> str:
    """The sentence in lines of that width."""
    return textwrap.fill(text, text_width(), break_long_words=False, break_on_hyphens=False)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(each.replace('|', chr(92) + '|') for each in line)} |\n" for line in lines)
