"""Word wrap: a text appended piece by piece is wrapped like the whole text."""

import random

import pytest
from rich.cells import cell_len

from llmdoctor.tui.flow import Flow, wrap


def naive(text, width):
    """Greedy wrap of text without wide characters, a character at a time."""
    lines, line = [], ""
    for word in _split(text):
        if word == "\n":
            lines.append(line + word)
            line = ""
        elif word.isspace() or len(line) + len(word) <= width:
            line += word
        else:
            if line:
                lines.append(line)
            line = word
            while len(line) > width:
                lines.append(line[:width])
                line = line[width:]
    return [*lines, line]


def _split(text):
    words = []
    for character in text:
        kind = character if character == "\n" else character == " "
        if words and kind != "\n" and words[-1][1] == kind:
            words[-1][0] += character
        else:
            words.append([character, kind])
    return [word for word, _ in words]


def test_lines_are_the_naive_ones():
    rng = random.Random(1)
    for _ in range(400):
        text = "".join(rng.choice("ab  cdef\n") for _ in range(rng.randint(0, 60)))
        width = rng.randint(1, 12)
        assert [text[a:b] for a, b in wrap(text, width)] == naive(text, width)


@pytest.mark.parametrize("alphabet", ["ab  cdef\n", "a 日本é🎉\n-", "x"])
def test_appending_piece_by_piece_is_laying_out_at_once(alphabet):
    """Any pieces, any grouping, any width; every piece begins on the line where it is found first."""
    rng = random.Random(2)
    for _ in range(300):
        width = rng.randint(2, 14)
        pieces = ["".join(rng.choice(alphabet) for _ in range(rng.randint(0, 5))) for _ in range(rng.randint(0, 25))]
        text = "".join(pieces)
        flow, at = Flow(width), 0
        while at < len(pieces):
            count = rng.randint(1, 4)
            flow.append(pieces[at : at + count])
            at += count
        lines = ["".join(part for _, part in line) for line in flow.lines]
        assert lines == [text[a:b] for a, b in wrap(text, width)]
        assert all(cell_len(line.rstrip()) <= width for line in lines)
        whole = Flow(99)
        whole.append(pieces)
        whole.rewrap(width)
        for index, piece in enumerate(pieces):
            first = flow.first_line[index]
            assert "".join(part for line in flow.lines for owner, part in line if owner == index) == piece
            assert first == next(n for n, line in enumerate(flow.lines) if any(owner == index for owner, _ in line))
            assert not piece or whole.first_line[index] == first


def test_cells_and_pieces_find_each_other():
    flow = Flow(11)
    flow.append(["one", " 日本", " two", " three"])
    assert ["".join(part for _, part in line) for line in flow.lines] == ["one 日本 ", "two three"]
    for index in range(4):
        line = flow.first_line[index]
        assert flow.piece_at(line, flow.cells_before(line, index)) == index
    assert [flow.piece_at(0, cell) for cell in (0, 2, 3, 5, 7, 99)] == [0, 0, 1, 1, 1, 2]
    assert flow.piece_at(5, 0) is None
