"""How the app looks, as text: at 80x24, 120x40 and 200x50, dark, light, ansi and NO_COLOR.

A snapshot is the screen's text, then for every line that has any the attributes of its cells (b bold, u underlined,
i italic, r reversed, d dim), then the colours in use. After a change that is meant: LLMDOCTOR_UPDATE_SNAPSHOTS=1
"""

import os
from pathlib import Path

import pytest

from llmdoctor.settings import Sampling
from llmdoctor.tui import generation
from llmdoctor.tui.config import Config
from llmdoctor.tui.widgets.prompt import Prompt

from .conftest import FakeAssistant

FOLDER = Path(__file__).parent / "snapshots"
UPDATE = bool(os.environ.get("LLMDOCTOR_UPDATE_SNAPSHOTS"))


def grid(strips):
    """Text, attributes and colours of the screen."""
    lines, marks, colours = [], [], set()
    for strip in strips:
        text = mark = ""
        for segment in strip:
            style = segment.style
            flag = "."
            if style is not None:
                for name, letter in (
                    ("reverse", "r"), ("underline", "u"), ("bold", "b"), ("italic", "i"), ("dim", "d"),
                ):  # fmt: skip
                    if getattr(style, name):
                        flag = letter
                        break
                colours |= {str(colour.name) for colour in (style.color, style.bgcolor) if colour is not None}
            text += segment.text
            mark += flag * len(segment.text)
        lines.append(text.rstrip())
        marks.append(mark.rstrip("."))
    attributes = [f"{number:3} {mark}" for number, mark in enumerate(marks) if mark]
    return "\n".join([*lines, "", "attributes", *attributes, "", "colours", *sorted(colours)]) + "\n"


CASES = {
    "80x24-dark": ((80, 24), "textual-dark", ()),
    "80x24-inspector": ((80, 24), "textual-dark", ("f2", "left")),
    "120x40-dark": ((120, 40), "textual-dark", ()),
    "120x40-light-inspector": ((120, 40), "textual-light", ("f2", "left", "left")),
    "120x40-ansi": ((120, 40), "ansi-dark", ()),
    "120x40-no-color": ((120, 40), "textual-dark", ()),
    "200x50-dark-inspector": ((200, 50), "textual-dark", ("f2", "home")),
    "80x40-stacked": ((80, 40), "textual-dark", ()),
}


@pytest.mark.parametrize("name", CASES)
def test_it_looks_as_it_did(name, make_app, drive, monkeypatch):
    size, theme, keys = CASES[name]
    if "no-color" in name:
        monkeypatch.setenv("NO_COLOR", "1")
    ticks = iter(range(10**9))
    monkeypatch.setattr(generation.time, "perf_counter", lambda: next(ticks) / 100)  # 100 tokens per second
    app = make_app(FakeAssistant(shortest=99), config=Config(theme=theme), sampling=Sampling(max_new_tokens=60))
    shown = []

    async def steps(d):
        app.chat.query_one(Prompt).cursor_blink = False
        await d.ask("How is the weather?")
        await d.type("/set safe=1.5")
        app.clear_notifications()
        await d.ask("日本では?")
        await d.press(*keys)
        await d.until(lambda: not app.notices or app.clear_notifications() is None)
        await d.pilot.pause(0.3)
        shown.append(grid(d.strips))

    drive(app, steps, size)
    path = FOLDER / f"{name}.txt"
    if UPDATE or not path.exists():
        assert UPDATE, f"no snapshot {path.name}: run with LLMDOCTOR_UPDATE_SNAPSHOTS=1 and look at it"
        path.write_text(shown[0], encoding="utf-8")
    assert shown[0] == path.read_text(encoding="utf-8")


def test_no_color_has_no_colour_and_the_marks_remain():
    """Textual maps blue and orange to one grey: the marks are what is left to tell high from low."""
    text = (FOLDER / "120x40-no-color.txt").read_text(encoding="utf-8")
    colours = text.split("\ncolours\n")[1].split()
    assert all(len({c[1:3], c[3:5], c[5:7]}) == 1 for c in colours if c.startswith("#"))
    attributes = text.split("\nattributes\n")[1]
    assert "u" in attributes
    assert "b" in attributes
