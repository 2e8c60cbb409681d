"""What inspect shows of token rewards: heatmaps side by side, statistics, and a page of its own. No tensors.

The colours are those of `llmdoctor.cli.render`: blue is rewarded, orange punished, both equally light.
"""

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from llmdoctor.cli import render
from llmdoctor.cli.terminal import clean

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmdoctor.token_rewards.summary import Statistics, Word

# A browser that reads this refuses every script and every request, whatever the data holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem }
body { color: #1b1b1b; background: #fdfdfd; overflow-wrap: anywhere }
.sides { display: flex; flex-wrap: wrap; gap: 1rem; margin-bottom: 1rem }
.sides > section { flex: 1 1 20rem; box-sizing: border-box; min-width: 0 }
.sides > section { border: 1px solid #8886; border-radius: .5rem; padding: 0 1rem 1rem }
.answer, .prompt { white-space: pre-wrap } .prompt { max-height: 16rem; overflow: auto }
.up, .down { color: #000; border-radius: .15rem } .down { text-decoration: underline dotted }
.bar { display: inline-block; height: .7rem; background: #7d7d7d } .bar.up { background: #207fea }
.bar.down { background: #cc5f00 }
h2 { font-size: 1.2rem } h3 { font-size: 1rem } .note, .legend { font-size: .9rem } .note { opacity: .75 }
table { border-collapse: collapse } th, td { text-align: left; vertical-align: top; padding: .1rem 1rem .1rem 0 }
@media (prefers-color-scheme: dark) { body { color: #e6e6e6; background: #141414 } }
"""
_SIGNS = ("none", "up", "down")  # by sign: 0, 1 and, from the end, -1


def page(title: str, parts: Iterable[str]) -> str:
    """One self-contained page of ``parts``, which are HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )


@dataclass(frozen=True, slots=True)
class ShownPair:
    """A prompt and what was answered, with token rewards; ``margin`` is the gap's preference for the chosen answer."""

    name: str
    prompt: str
    sides: tuple[render.RewardedText, ...]
    margin: float = 0.0


def limit_of(pairs: Iterable[ShownPair]) -> float:
    """One end of the colour scale for all of them."""
    return render.scale_limit(reward for pair in pairs for side in pair.sides for reward in side.rewards)


# Statistics


def _bars(statistics: "Statistics", edges: Sequence[float]) -> list[tuple[str, float, int, float]]:
    """Label, share of the tokens, sign, and length in [0, 1] of every bin of gaps, the greatest gaps first.

    Most tokens hardly differ: the bin around zero has no say in the scale, and is cut off at its end.
    """
    names = [f"below {edges[0]:g}"]
    names += [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    names += [f"above {edges[-1]:g}"]
    middle = len(edges) // 2
    most = max(count for i, count in enumerate(statistics.gaps) if i != middle) or statistics.gaps[middle] or 1
    rows = [
        (name, count / max(statistics.tokens, 1), (i > middle) - (i < middle), min(1.0, count / most))
        for i, (name, count) in enumerate(zip(names, statistics.gaps, strict=True))
    ]
    return rows[::-1]


def _facts(statistics: "Statistics") -> list[tuple[str, str]]:
    return [
        ("tokens", f"{statistics.tokens} in {statistics.pairs} pairs"),
        ("rewarded", f"{statistics.share_rewarded:.1%} of the tokens"),
        ("punished", f"{statistics.share_punished:.1%} of the tokens"),
        ("gap", f"mean |gap| {statistics.mean_abs_gap:.3f}, root mean square {statistics.rms_gap:.3f} nats a token"),
        (
            "gap and label agree",
            f"in {statistics.agreement:.1%} of the pairs (sum of gaps), at {statistics.token_agreement:.1%} of the "
            "tokens with a reward",
        ),
    ]


def _word(word: "Word") -> str:
    return f"{clean(word.text)} {word.reward:+.1f} in {word.count}"


def plain_statistics(statistics: "Statistics", edges: Sequence[float]) -> str:
    """The statistics in plain letters, at most 80 columns where words are short."""
    lines = [f"{name + ':':<20} {text}" for name, text in _facts(statistics)]
    lines += ["", "gap, nats      share of the tokens"]
    for name, share, sign, length in _bars(statistics, edges):
        cut = " ..." if sign == 0 and length == 1 else ""
        lines.append(f"{name:<14} {share:>6.1%} {'-.+'[sign + 1] * round(40 * length)}{cut}".rstrip())
    for name, words in (("most rewarded", statistics.rewarded), ("most punished", statistics.punished)):
        lines += ["", f"{name} words (sum of rewards in how many places): "]
        lines[-1] += ", ".join(map(_word, words)) or "none"
    return "\n".join(lines)


def rich_statistics(statistics: "Statistics", edges: Sequence[float]) -> "RenderableType":
    """The statistics for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table(box=None, padding=(0, 2, 0, 0), show_header=False, pad_edge=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, text in _facts(statistics):
        facts.add_row(name, text)
    gaps = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    gaps.add_column("gap, nats", no_wrap=True)
    gaps.add_column("tokens", justify="right", no_wrap=True)
    gaps.add_column(no_wrap=True)
    for name, share, sign, length in _bars(statistics, edges):
        bar = Text("█" * round(24 * length) or ("▏" if share else ""), style=render.scale_colour(sign, 1))
        bar.append(" …" if sign == 0 and length == 1 else "")
        gaps.add_row(name, f"{share:.1%}", bar)
    words = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("most rewarded", "most punished"):
        words.add_column(title, max_width=18, no_wrap=True, overflow="ellipsis")
        words.add_column("sum", justify="right", no_wrap=True)
        words.add_column("in", justify="right", no_wrap=True)
    for i in range(max(len(statistics.rewarded), len(statistics.punished))):
        cells: list[Text] = []
        for side, sign in ((statistics.rewarded, 1), (statistics.punished, -1)):
            word = side[i] if i < len(side) else None
            style = render.scale_colour(sign, 1)
            cells.append(Text(clean(word.text) if word else "", style=style))
            cells += [Text(f"{word.reward:+.1f}" if word else ""), Text(str(word.count) if word else "")]
        words.add_row(*cells)
    return Group(facts, Text(), gaps, Text(), words)


# The page


def html_parts(heading: Sequence[str], pairs: Sequence[ShownPair], statistics: "Statistics | None") -> Iterator[str]:
    """Heading, statistics and heatmaps as HTML; every text is escaped. Hovering over a token shows its numbers."""
    yield "<h1>Token rewards</h1>"
    yield f"<p class=note>{'<br>'.join(map(_escape, heading))}</p>"
    if statistics is not None:
        yield from _html_statistics(statistics)
    yield from html_heatmaps(pairs)


def _html_statistics(statistics: "Statistics") -> Iterator[str]:
    from llmdoctor.token_rewards.summary import EDGES

    facts = "".join(
        f"<tr><th scope=row>{_escape(name)}</th><td>{_escape(text)}</td></tr>" for name, text in _facts(statistics)
    )
    yield f"<table>{facts}</table>"
    yield "<div class=sides>"
    bars = "".join(
        f"<tr><th scope=row>{_escape(name)}</th><td>{share:.1%}</td><td><span class='bar {_SIGNS[sign]}' "
        f"style='width:{14 * length:.2f}rem'></span>{' …' if sign == 0 and length == 1 else ''}</td></tr>"
        for name, share, sign, length in _bars(statistics, EDGES)
    )
    yield f"<section><h2>Gap of the tokens, nats</h2><table>{bars}</table></section>"
    for title, words in (("Most rewarded words", statistics.rewarded), ("Most punished words", statistics.punished)):
        rows = "".join(
            f"<tr><th scope=row>{_escape(word.text)}</th><td>{word.reward:+.1f}</td><td>{word.count}</td></tr>"
            for word in words
        )
        head = "<tr><th></th><th>sum of rewards</th><th>places</th></tr>"
        yield f"<section><h2>{title}</h2><table>{head}{rows}</table></section>"
    yield "</div>"


def html_heatmaps(pairs: Sequence[ShownPair]) -> Iterator[str]:
    """The heatmaps, on one scale, with what their colours mean."""
    limit = limit_of(pairs)
    steps = "".join(f"<span{_heat(share, 1)}>&emsp;</span>" for share in (-1.0, -0.6, -0.3, 0.3, 0.6, 1.0))
    yield (
        f"<p class=legend>punished {-limit:.2g} {steps} {limit:+.2g} rewarded; unmarked: no reward. "
        "A punished token is also underlined with dots. Hover over a token for its numbers.</p>"
    )
    for pair in pairs:
        sides = "".join(
            f"<section><h3>{_escape(side.title)}</h3>\n"
            f"<div class=answer>{''.join(_html_tokens(side, limit))}</div></section>"
            for side in pair.sides
        )
        name = f" <span class=note>pair {_escape(pair.name)}</span>" if pair.name else ""
        yield f"<h2 class=prompt>{_escape(pair.prompt)}{name}</h2>\n<div class=sides>{sides}</div>"


def _html_tokens(side: render.RewardedText, limit: float) -> Iterator[str]:
    for piece, reward, gap, weight in zip(side.shown(), side.rewards, side.gaps, side.importance, strict=True):
        numbers = f"reward {reward:+.3f}, gap {gap:+.3f} nats, importance {weight:.3f}"
        yield f'<span{_heat(reward, limit)} title="{numbers}">{_escape(piece)}</span>'


def _heat(reward: float, limit: float) -> str:
    """The attributes of a token with this reward; none without."""
    if not reward:
        return ""
    colour = render.scale_colour(reward, limit)
    return f' class={_SIGNS[1 if reward > 0 else -1]} style="background:{colour}"'


def _escape(text: str) -> str:
    return html.escape(clean(text), quote=True)
