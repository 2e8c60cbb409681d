"""Text of any origin on its way to a terminal, a page, a picture or JSON."""

import html
import io
import json
import random
import re
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from textual.color import Color

from llmdoctor.cli.clean_console import CleanConsole
from llmdoctor.cli.picture import svg
from llmdoctor.cli.terminal import console, put, put_json, say, waiting
from llmdoctor.errors import DataError
from llmdoctor.files import _write_error
from llmdoctor.harmless import MARK, clean, first_line, json_text, require_unicode
from llmdoctor.show.page import rewards_page
from llmdoctor.show.rewards import RewardedText, ShownPair
from llmdoctor.token_rewards.folder import _damaged
from llmdoctor.tui.visible import VisibleControls

BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
ATTACKS = (
    "\x1b]0;owned\x07",  # the window's title
    "\x1b[2J\x1b[1;1Hlogin:",
    "\x1b]52;c;ZXZpbA==\x07",  # the clipboard
    "\x9b31m",
    "\x90q\x9c",
    "ab\b\b\x7f",
    "\rerror: all is well",
    f"user{BIDI[4]}txt.exe",
    "\ufffe\uffff\ufdd0\U0001fffe",
    "\ud800 \udcff",
    "[bold red]markup[/bold red][/]",
    "<script>alert(1)</script>&amp;",
)


def harmless(text: str) -> bool:
    """Whether no character of the text can steer, told by other means than the code's own list."""
    return all(
        c in "\n\t"
        or (unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") and c not in BIDI and not ord(c) % 65536 >= 0xFFFE)
        for c in text
    )


def hostile(seed: int, length: int = 60) -> str:
    """Attacks between letters of every plane."""
    rng = random.Random(seed)
    letters = [
        rng.choice((chr(rng.randrange(0x20)), chr(rng.randrange(0x300)), chr(rng.randrange(0x110000))))
        for _ in range(length)
    ]
    return "".join(rng.choice((*ATTACKS, *letters)) for _ in range(length))


def test_every_character_is_shown_or_marked_and_the_text_stays_as_long():
    everything = "".join(map(chr, range(0x110000)))
    shown = clean(everything)
    assert harmless(shown)
    assert all(after in (before, MARK) for before, after in zip(everything, shown, strict=True))
    assert shown.count(MARK) < 2048 + 66 + 65 + 12, "nothing else is marked than surrogates, non-characters, controls"
    kept = "Ärztin 日本 👩‍⚕️ שלום e\u0301 \n\t\u00a0"
    assert clean(kept) == kept
    assert len(clean("".join(ATTACKS))) == len("".join(ATTACKS))


def escapes(written: str) -> set[str]:
    """The kinds of escape sequence that are not colours."""
    return {rest[:3] for rest in written.split("\x1b")[1:] if not re.match(r"\[[0-9;]*m", rest)}


@pytest.mark.parametrize("seed", range(200))
def test_no_text_steers_the_terminal_through_the_console(seed):
    text = hostile(seed)
    screen = CleanConsole(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=40)
    table = Table(title=text)
    table.add_column(Text(text))
    table.add_row(text, style="red")
    for renderable in (text, Text(text, style="bold"), Panel(text, title=Text(text)), table):
        screen.print(renderable)
    written = screen.file.getvalue()
    assert not escapes(written)
    assert harmless(written.replace("\x1b", ""))


@pytest.mark.parametrize("seed", range(50))
def test_no_text_steers_the_terminal_through_the_app_and_lines_keep_their_width(seed):
    rng = random.Random(seed)
    line = [Segment(hostile(rng.randrange(1000), 5).replace("\n", " ")) for _ in range(4)]
    shown = VisibleControls().apply(line, Color(0, 0, 0))
    assert all(harmless(text) for text, _, _ in shown)
    assert Segment.get_line_length(shown) == Segment.get_line_length(line)


def test_nor_by_messages_results_spinners_and_json(capsys, monkeypatch):
    for text in ATTACKS:
        say(text)
        put(text)
        put_json({text: [text]})
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        with waiting(f"Loading {text}") as show:
            show(f"Loaded {text}")
        monkeypatch.undo()
    out, err = capsys.readouterr()
    assert harmless(out)
    # rich hides and shows the cursor and erases its own line
    assert harmless(err.replace("\x1b", "").replace("\r", "")), err
    assert "\x1b]" not in err
    assert "[1;1H" not in err.replace(f"{MARK}[1;1H", "")


@pytest.mark.parametrize("text", ATTACKS)
def test_json_says_the_same_in_characters_that_steer_nothing(text):
    data = {"a": [text, {text: 1.5}]}
    written = json_text(data)
    assert harmless(written)
    assert json.loads(written) == data
    assert json_text({"é": "日本"}) == '{"é": "日本"}'
    assert json_text({"x": [float("nan"), 1.0]}) == '{"x": [null, 1.0]}'


def parsed(document: str) -> None:
    """Raises ParseError unless the document is well-formed XML."""
    ElementTree.fromstring(document.encode())


@pytest.mark.parametrize("text", [*ATTACKS, "".join(map(chr, range(0x20)))])
def test_pictures_are_well_formed_whatever_the_text(text):
    table = Table(title=Text(text))
    table.add_row(Text(text))
    drawn = svg([Text(text), text, table], "title")
    parsed(drawn)
    assert harmless(drawn)


@pytest.mark.parametrize("text", ATTACKS)
def test_pages_hold_marks_and_no_markup_of_others(text):
    side = RewardedText(f"chosen {text}", (text, text), (0.5, -0.5), (0.1, 0.1), (0.2, 0.2))
    page = rewards_page([ShownPair(text, text, (side,))], heading=[text])
    assert harmless(page)
    assert "<script" not in page
    assert clean(html.escape(text, quote=False)).split("&")[0] in page


def test_a_plain_stream_gets_no_escape_at_all():
    stream = io.StringIO()
    console(stream).print(Text("a\x1b[31mb", style="red"))
    assert stream.getvalue() == f"a{MARK}[31mb\n"


def test_text_that_is_not_unicode_is_refused_with_its_place():
    assert require_unicode("日本", "it") == "日本"
    with pytest.raises(DataError, match=r"the prompt is not Unicode: character 3 is '\\udcff'"):
        require_unicode("ab\udcff", "the prompt")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("", "ValueError"),
        (" \n\n", "ValueError"),
        ("\n  why \nmore", "why"),
        ("because:\n\n  of this\nx", "because: of this"),
    ],
)
def test_an_errors_first_line_says_something(message, line):
    assert first_line(ValueError(message)) == line
    assert line in str(_damaged(Path("shard"), ValueError(message)))
    if line != "ValueError":
        assert str(_write_error(SafetensorError(message), Path())).startswith(line)
