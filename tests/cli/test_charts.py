"""The picture of a diagnosis: what it says without colour, that it fits, that nothing in it can run or be fetched."""

import io
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from llmdoctor.cli import charts
from llmdoctor.records import Estimate
from llmdoctor.show.colours import scale_colour
from llmdoctor.show.text import clean
from llmdoctor.token_rewards.diagnosis import Diagnosis, Example, FaceDiagnosis

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


def bars(picture: str) -> dict[str, tuple[float, float, str]]:
    """Left end, right end and colour of every bar of a drawing, in points."""
    shape = r'<g id="((?:face|held-out)-\d+)">\s*<path d="([^"]+)"[^>]*style="[^"]*fill: (#\w+)'
    found = {}
    for name, path, colour in re.findall(shape, picture):
        across = [float(x) for x in re.findall(r"[ML] (-?[\d.]+) ", path)]
        found[name] = (min(across), max(across), colour)
    return found


def intervals(picture: str) -> dict[str, tuple[float, float]]:
    """Both ends of every interval of a drawing, in points."""
    shape = r'<g id="((?:face|held-out)-interval-\d+)">\s*<path d="M (-?[\d.]+) -?[\d.]+ \s*L (-?[\d.]+) '
    return {name: (float(low), float(high)) for name, low, high in re.findall(shape, picture)}


def test_blue_is_rewarded_orange_is_punished_grey_is_unsure(diagnosis):
    red, green, blue = (int(scale_colour(-0.5, 1.25)[i : i + 2], 16) for i in (1, 3, 5))
    drawn = bars(charts.svg_diagnosis(diagnosis))
    fills = [drawn[f"face-{row}"][2] for row in range(3)]
    kind, safe, brief = (tuple(int(fill[i : i + 2], 16) for i in (1, 3, 5)) for fill in fills)
    assert kind[2] > kind[0]
    assert brief[0] > brief[2]
    assert "#" + "".join(f"{c:02x}" for c in safe) == scale_colour(0, 1)
    coloured = shown(diagnosis, 100, force_terminal=True, color_system="truecolor")
    assert f"38;2;{kind[0]};{kind[1]};{kind[2]}" in coloured
    assert red > blue
    assert green < red


def test_the_svg_is_drawn_to_scale_and_fetches_nothing(diagnosis):
    """Half an axis is 126 points, zero at 244.8 and the limit 1.25: kind 1.0 is 100.8 to the right, brief -0.5 50.4
    to the left; 75% of the pairs is half way from 50% to 100%."""
    picture = charts.svg_diagnosis(diagnosis)
    ElementTree.fromstring(picture)
    drawn = {name: ends[:2] for name, ends in bars(picture).items()}
    assert drawn["face-0"] == pytest.approx((244.8, 345.6))
    assert drawn["face-2"] == pytest.approx((194.4, 244.8))
    assert drawn["held-out-0"] == pytest.approx((244.8, 307.8))
    assert len(drawn) == 6
    ends = intervals(picture)
    assert ends["face-interval-0"] == pytest.approx((244.8 + 75.6, 244.8 + 126))
    assert ends["face-interval-2"] == pytest.approx((244.8 - 63, 244.8 - 37.8))
    assert ends["held-out-interval-1"] == pytest.approx((244.8 - 12.6, 244.8 + 12.6))
    assert re.sub(r'xmlns(:xlink)?="http[^"]+"', "", picture).count("http") == 0
    assert all(target.startswith("#") for target in re.findall(r"(?:href=|src=|url\()[\"']?([^\"')]*)", picture))
    assert "These preferences reward kind." in picture


def test_the_svg_says_every_number_as_text(diagnosis):
    """Top to bottom: the most rewarded first, with the same words as the plain form."""
    texts = [
        "".join(text.itertext()).strip()
        for text in ElementTree.fromstring(charts.svg_diagnosis(diagnosis)).iter()
        if text.tag.endswith("}text")
    ]
    names = [text for text in texts if text in {"kind", "safe", "brief"}]
    assert names == ["kind", "safe", "brief"]
    for said in (
        "← punished   rewarded →",
        "+1.00 (+0.75 to +1.25)",
        "+0.50 (+0.38 to +0.62)",
        "25%",
        "62.5%",
        "chance 50%",
        "length alone",
        "50.0% (45.0% to 55.0%)",
        "1500 pairs, tau 1, theta 0.5; 1000 bootstrap resamples, 10 folds, seed 0",
    ):
        assert said in texts


def test_the_command_line_starts_without_matplotlib():
    code = "import sys, llmdoctor.cli.main, llmdoctor.cli.inspect; print([m for m in sys.modules if 'matplotlib' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_same_diagnosis_is_the_same_drawing(diagnosis):
    assert charts.svg_diagnosis(diagnosis) == charts.svg_diagnosis(diagnosis)
    assert charts.html_diagnosis(diagnosis) == charts.html_diagnosis(diagnosis)


def test_the_drawing_on_a_page_takes_the_colour_of_its_text(diagnosis):
    """A page may be dark: nothing but the bars has a colour of its own."""
    page = charts.html_diagnosis(diagnosis)
    own = {colour.lower() for colour in re.findall(r"#[0-9a-fA-F]{6}\b", page)}
    assert own == {colour for _, _, colour in bars(page).values()}
    assert "currentColor" in page


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["costs $1 or $2", "礼貌 👩‍⚕️ مؤدب", "_^{}\\frac"])
def test_any_name_is_drawn_as_it_is(diagnosis, name):
    one = replace(diagnosis, faces=(face(name, 1.0, 0.25),))
    texts = ["".join(text.itertext()) for text in ElementTree.fromstring(charts.svg_diagnosis(one)).iter()]
    assert any(clean(name) in text for text in texts)


def test_the_html_holds_the_same_drawing_with_examples(diagnosis):
    page = charts.html_diagnosis(diagnosis)
    assert bars(page) == bars(charts.svg_diagnosis(diagnosis))
    assert len(bars(page)) == 6
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
