"""The statistics of a rewards folder prepared for showing."""

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from llmdoctor.show.formats import counted

if TYPE_CHECKING:
    from llmdoctor.token_rewards.summary import Statistics


class Bar(NamedTuple):
    """A bin of the histogram of gaps: ``share`` of the tokens, ``sign`` of the gaps, ``length`` in [0, 1]."""

    label: str
    share: float
    sign: int
    length: float

    @property
    def cut(self) -> bool:
        """Whether the bar would be longer, had it room."""
        return self.sign == 0 and self.length == 1


def gap_bars(statistics: "Statistics") -> list[Bar]:
    """The histogram of the gaps, the greatest first."""
    edges = statistics.edges
    labels = [f"below {edges[0]:g}"]
    labels += [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    labels += [f"above {edges[-1]:g}"]
    middle = len(edges) // 2
    # Most tokens have a gap near zero. Were that bin to set the scale, the others would vanish: it is cut off instead.
    most = max(count for i, count in enumerate(statistics.gaps) if i != middle) or statistics.gaps[middle] or 1
    bars = [
        Bar(label, count / max(statistics.tokens, 1), (i > middle) - (i < middle), min(1.0, count / most))
        for i, (label, count) in enumerate(zip(labels, statistics.gaps, strict=True))
    ]
    return bars[::-1]


def overall_facts(statistics: "Statistics") -> list[tuple[str, str]]:
    """Names and texts of the overall numbers."""
    return [
        ("tokens", f"{statistics.tokens} in {counted(statistics.pairs, 'pair')}"),
        ("rewarded", f"{statistics.share_rewarded:.1%} of the tokens"),
        ("punished", f"{statistics.share_punished:.1%} of the tokens"),
        (
            "gap",
            f"mean |gap| {_some(statistics.mean_abs_gap)}, root mean square {_some(statistics.rms_gap)} "
            f"{statistics.unit} per token",
        ),
        (
            "gap and label agree",
            f"in {statistics.agreement:.1%} of the pairs (sum of gaps), at {statistics.token_agreement:.1%} of the "
            "tokens with a reward",
        ),
    ]


def _some(number: float) -> str:
    """Three decimals, or as many as a small number needs."""
    return f"{number:.3f}" if number >= 0.01 else f"{number:.2g}"
