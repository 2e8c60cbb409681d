"""The statistics of a rewards folder on stdout: tables on a terminal, else plain text."""

from itertools import zip_longest
from typing import TYPE_CHECKING

from llmdoctor.show.colours import scale_colour
from llmdoctor.show.statistics import gap_bars, overall_facts
from llmdoctor.show.text import clean

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from llmdoctor.token_rewards.summary import Statistics, Word


def _word(word: "Word") -> str:
    return f"{clean(word.text)} {word.reward:+.1f} in {word.count}"


def plain_statistics(statistics: "Statistics") -> str:
    """The statistics in plain letters, at most 80 columns where words are short."""
    lines = [f"{name + ':':<20} {text}" for name, text in overall_facts(statistics)]
    lines += ["", f"{statistics.measure:<18} share of the tokens"]
    for bar in gap_bars(statistics):
        cut = " ..." if bar.cut else ""
        lines.append(f"{bar.label:<18} {bar.share:>6.1%} {'-.+'[bar.sign + 1] * round(40 * bar.length)}{cut}".rstrip())
    for name, words in (("most rewarded", statistics.rewarded), ("most punished", statistics.punished)):
        lines += ["", f"{name} words (sum of rewards in how many places): "]
        lines[-1] += ", ".join(map(_word, words)) or "none"
    return "\n".join(lines)


def rich_statistics(statistics: "Statistics") -> "RenderableType":
    """The statistics for a terminal."""
    from rich.console import Group
    from rich.text import Text

    return Group(_facts(statistics), Text(), _gaps(statistics), Text(), _words(statistics))


def _facts(statistics: "Statistics") -> "Table":
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in overall_facts(statistics):
        table.add_row(name, text)
    return table


def _gaps(statistics: "Statistics") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    bars = gap_bars(statistics)
    # where there is little room the bars are cut, never the numbers
    table.add_column(statistics.measure, no_wrap=True, min_width=max(len(bar.label) for bar in bars))
    table.add_column("tokens", justify="right", no_wrap=True, min_width=len("tokens"))
    table.add_column(no_wrap=True)
    for bar in bars:
        # A share too small for a full cell still gets a thin one: it is not zero.
        drawn = Text("█" * round(24 * bar.length) or ("▏" if bar.share else ""), style=scale_colour(bar.sign, 1))
        drawn.append(" …" if bar.cut else "")
        table.add_row(bar.label, f"{bar.share:.1%}", drawn)
    return table


def _words(statistics: "Statistics") -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("most rewarded", "most punished"):
        table.add_column(title, max_width=18, no_wrap=True, overflow="ellipsis")
        table.add_column("sum", justify="right", no_wrap=True)
        table.add_column("in", justify="right", no_wrap=True)
    for pair in zip_longest(statistics.rewarded, statistics.punished):
        cells: list[Text] = []
        for word, sign in zip(pair, (1, -1), strict=True):
            cells.append(Text(clean(word.text) if word else "", style=scale_colour(sign, 1)))
            cells += [Text(f"{word.reward:+.1f}" if word else ""), Text(str(word.count) if word else "")]
        table.add_row(*cells)
    return table
