"""Which words of two texts differ."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Span = tuple[int, int]  # first character and the one after the last


@dataclass(frozen=True, slots=True)
class WordDiff:
    """Spans of the differing words, neighbours joined, and counts of words."""

    removed_spans: tuple[Span, ...]
    added_spans: tuple[Span, ...]
    removed: int
    added: int
    kept: int


def word_diff(before: str, after: str) -> WordDiff:
    """Compare words (runs without white space) in order. Removed spans lie in ``before``, added ones in ``after``."""
    old, new = ([match.span() for match in re.finditer(r"\S+", text)] for text in (before, after))
    old_words, new_words = [before[a:b] for a, b in old], [after[a:b] for a, b in new]
    # Without autojunk=False, difflib ignores frequent words in texts of 200 words or more.
    changes = difflib.SequenceMatcher(None, old_words, new_words, autojunk=False).get_opcodes()
    differing = [change for change in changes if change[0] != "equal"]
    return WordDiff(
        removed_spans=tuple((old[i][0], old[j - 1][1]) for _, i, j, _, _ in differing if j > i),
        added_spans=tuple((new[i][0], new[j - 1][1]) for _, _, _, i, j in differing if j > i),
        removed=sum(j - i for _, i, j, _, _ in differing),
        added=sum(j - i for _, _, _, i, j in differing),
        kept=sum(j - i for kind, i, j, _, _ in changes if kind == "equal"),
    )


def cut_at_spans(text: str, start: int, spans: Sequence[Span]) -> Iterator[tuple[str, bool]]:
    """Parts of the text with whether they lie in a span. ``start`` is where the text begins in the whole."""
    inside = [any(a <= start + i < b for a, b in spans) for i in range(len(text))]
    begin = 0
    for i in range(1, len(text) + 1):
        if i == len(text) or inside[i] != inside[begin]:
            yield text[begin:i], inside[begin]
            begin = i
