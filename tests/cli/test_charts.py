"""The picture of a diagnosis: what it says without colour, that it fits, that nothing in it can run or be fetched."""

import io
import re
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from llmdoctor.cli import charts
from llmdoctor.show.colours import scale_colour
from llmdoctor.token_rewards.diagnosis import Diagnosis, Estimate, Example, FaceDiagnosis

NASTY = "<script>alert(1)</script>\x1b[31m[bold]&\"'"


def face(name: str, value: float, half: float, **changes: object) -> FaceDiagnosis:
    weight = Estimate(value / 2, (value - half) / 2, (value + half) / 2)
    per_sd = Estimate(value, value - half, value + half)
    best, worst = (Example("12", 2.5), Example("7", 1.25)), (Example("99", -3.0),)
    made = FaceDiagnosis(name, weight, per_sd, 2.0, 0.25, 0.625, best, worst)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def diagnosis() -> Diagnosis:
    return Diagnosis(
        pairs=1500,
        faces=(
            face("brief", -0.5, 0.125),
            face("kind", 1.0, 0.25),
            face("safe", 0.0625, 0.25, weight=Estimate(0.00376, -0.01, 0.02)),
        ),
        accuracy=Estimate(0.75, 0.7, 0.8),
        length_accuracy=Estimate(0.5, 0.45, 0.55),
        combined_accuracy=Estimate(0.76, 0.71, 0.81),
        beyond_length=Estimate(0.25, 0.2, 0.3),
        added_to_length=Estimate(0.26, 0.21, 0.31),
        longer_preferred=0.5,
        chance=0.5,
        explains=True,
        verdict="These preferences reward kind.",
        settings={"tau": 1.0, "theta": 0.5, "eps": 1e-6, "seed": 0, "resamples": 1000, "folds": 10},
    )


@pytest.fixture
def nasty(diagnosis: Diagnosis) -> Diagnosis:
    one = face(NASTY, 1.0, 0.25, best=(Example(NASTY, 1.0),))
    return replace(diagnosis, faces=(one,), verdict=NASTY)


def shown(diagnosis: Diagnosis, width: int, **console: object) -> str:
    screen = Console(width=width, file=io.StringIO(), highlight=False, markup=False, **console)  # type: ignore[arg-type]
    screen.print(charts.rich_diagnosis(diagnosis, width))
    return screen.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_bars_stand_where_the_numbers_say():
    """31 cells, 15 each side of zero for the limit 1.0: 0.4 is 6 cells to the right, its interval 3 to 9."""
    cells = [cell for cell, _ in charts._bar(Estimate(0.4, 0.2, 0.6), 1.0, 31, charts._ASCII)]
    assert "".join(cells) == " " * 15 + "|==[--o--]" + " " * 6
    mirrored = [cell for cell, _ in charts._bar(Estimate(-0.4, -0.6, -0.2), 1.0, 31, charts._ASCII)]
    assert "".join(mirrored) == " " * 6 + "[--o--]==|" + " " * 15
    across = "".join(cell for cell, _ in charts._bar(Estimate(0.2, -0.2, 0.6), 1.0, 31, charts._ASCII))
    assert across == " " * 12 + "[-----o-----]" + " " * 6
    nothing = "".join(cell for cell, _ in charts._bar(Estimate(0, 0, 0), 1.0, 31, charts._ASCII))
    assert nothing == " " * 15 + "o" + " " * 15


def test_plain_says_everything_in_ascii_within_80_columns(diagnosis):
    text = charts.plain_diagnosis(diagnosis)
    assert text.isascii()
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split()[0] for line in text.splitlines() if "[" in line]
    assert rows == ["kind", "safe", "brief"], "the most rewarded first"
    for said in (
        diagnosis.verdict,
        "+1.00 (+0.75 to +1.25)",
        "-0.50 (-0.62 to -0.38)",
        "+0.50 (+0.38 to +0.62)",
        "25%      62.5%",
        "length alone       50.0% (45.0% to 55.0%)",
        "kind: explains best 12 (+2.5), 7 (+1.2); contradicts 99 (-3)",
        "1500 pairs, tau 1, theta 0.5; 1000 bootstrap resamples, 10 folds, seed 0",
    ):
        assert said in text


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_terminal_shows_sign_and_interval_without_colour(diagnosis, width):
    text = shown(diagnosis, width, color_system=None)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    kind, safe, brief = (next(line for line in lines if line.startswith(name)) for name in ("kind", "safe", "brief"))
    assert "+1.00 (+0.75 to +1.25)" in kind
    assert "-0.50 (-0.62 to -0.38)" in brief
    axis = kind.index("│")
    assert axis < kind.index("├") < kind.index("●") < kind.index("┤")
    assert brief.index("├") < brief.index("●") < brief.index("┤") < axis == brief.index("│")
    assert safe.index("├") < axis < safe.index("┤")
    assert "…" not in text
    assert "faces and length" in text


def test_blue_is_rewarded_orange_is_punished_grey_is_unsure(diagnosis):
    red, green, blue = (int(scale_colour(-0.5, 1.25)[i : i + 2], 16) for i in (1, 3, 5))
    picture = charts.svg_diagnosis(diagnosis)
    fills = re.findall(r'<rect x=[^>]*fill="(#\w+)"', picture)
    kind, safe, brief = (tuple(int(fill[i : i + 2], 16) for i in (1, 3, 5)) for fill in fills[:3])
    assert kind[2] > kind[0]
    assert brief[0] > brief[2]
    assert "#" + "".join(f"{c:02x}" for c in safe) == scale_colour(0, 1)
    coloured = shown(diagnosis, 100, force_terminal=True, color_system="truecolor")
    assert f"38;2;{kind[0]};{kind[1]};{kind[2]}" in coloured
    assert red > blue
    assert green < red


def bars(picture: str) -> list[tuple[float, float]]:
    return [(float(x), float(w)) for x, w in re.findall(r'<rect x="([\d.]+)" y="\d+" width="([\d.]+)"', picture)]


def test_the_svg_is_drawn_to_scale_and_fetches_nothing(diagnosis):
    """The limit 1.25 is 210 units: kind 1.0 is 168 to the right of 390, brief -0.5 is 84 to the left."""
    picture = charts.svg_diagnosis(diagnosis)
    ElementTree.fromstring(picture)
    assert bars(picture)[0] == (390.0, 168.0)
    assert bars(picture)[2] == (306.0, 84.0)
    assert bars(picture)[3] == (390.0, 105.0)  # 75% of the pairs: half way from 50% to 100%
    assert re.sub(r'xmlns="http://www.w3.org/2000/svg"', "", picture).count("http") == 0
    assert "These preferences reward kind." in picture


def test_the_html_holds_the_same_drawing_with_examples(diagnosis):
    page = charts.html_diagnosis(diagnosis)
    assert bars(page) == bars(charts.svg_diagnosis(diagnosis))
    assert page.count("<svg") == page.count("</svg>") == 1
    assert "<td>12 (+2.5), 7 (+1.2)</td><td>99 (-3)</td>" in page
    assert "<p>These preferences reward kind.</p>" in page
    ElementTree.fromstring(re.sub(r"scope=row", 'scope="row"', page))


@pytest.mark.parametrize("draw", [charts.svg_diagnosis, charts.html_diagnosis])
def test_nothing_in_it_can_run(nasty, draw: Callable[[Diagnosis], str]):
    text = draw(nasty)
    assert "<script" not in text
    assert "\x1b" not in text
    assert "&lt;script&gt;" in text
    ElementTree.fromstring(re.sub(r"scope=row", 'scope="row"', text))


def test_nothing_in_it_steers_the_terminal(nasty):
    for text in (charts.plain_diagnosis(nasty), shown(nasty, 100, color_system=None)):
        assert "\x1b" not in text
        assert "[bold]" in text


def test_a_diagnosis_of_nothing_is_drawn(diagnosis):
    nothing = replace(diagnosis, faces=(face("kind", 0.0, 0.0, share=0.0, best=(), worst=()),), explains=False)
    assert "explains best none; contradicts none" in charts.plain_diagnosis(nothing)
    assert "kind" in shown(nothing, 80)
    ElementTree.fromstring(charts.svg_diagnosis(nothing))
