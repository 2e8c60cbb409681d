"""``inspect``: filters, heatmaps with and without colour, a page that nothing in the data can run in."""

import io
import json
import re
import weakref
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from llmdoctor.cli.heatmap import rich_heatmap
from llmdoctor.cli.options import fitting, reward_settings
from llmdoctor.cli.reward_reader import RewardReader
from llmdoctor.cli.statistics_table import rich_statistics
from llmdoctor.files import write_json
from llmdoctor.models import load_tokenizer
from llmdoctor.profile import load_profile
from llmdoctor.records import PairScores, TokenScores
from llmdoctor.show.colours import heat_style, scale_colour
from llmdoctor.show.rewards import RewardedText
from llmdoctor.show.statistics import gap_bars
from llmdoctor.show.text import END
from llmdoctor.token_rewards.fit import face_weights
from llmdoctor.token_rewards.folder import RewardsFolder, write_shard
from llmdoctor.token_rewards.formula import token_rewards
from llmdoctor.token_rewards.summary import Statistics

NASTY = (
    "<script>alert(1)</script>",
    "</script><script src=//evil.example/x.js>",
    '" onmouseover="alert(1)" \'',
    '<a href="javascript:alert(1)">x</a><img src=x onerror=alert(1)>',
    "</title></style></div>]]>--><!-- &lt; {0} %s",
    "\x1b[31m\x07[bold]red[/bold]",
)


@pytest.fixture(scope="session")
def texts(tiny_tokenizer, tmp_path_factory):
    """``texts([(prompt, chosen, rejected), ...])``: a rewards folder of those texts, with random gaps."""

    def make(rows):
        folder = tmp_path_factory.mktemp("texts")
        tiny_tokenizer.save_pretrained(folder / "tokenizer")
        rng = np.random.default_rng(0)

        def ids(text):
            return np.array(tiny_tokenizer(text, add_special_tokens=False).input_ids, np.int32)

        def side(number, prompt, name, answer):
            response = np.append(ids(answer), np.int32(tiny_tokenizer.eos_token_id))
            zeros = np.zeros(len(response), np.float32)
            gaps = {"kind": (rng.normal(size=len(response)) * 5 * (rng.random(len(response)) < 0.3)).astype(np.float32)}
            none = {"kind": zeros}
            return TokenScores(str(number), name, ids(prompt), response, gaps, none, response, gaps, none)

        pairs = [
            PairScores(side(i, prompt, "chosen", chosen), side(i, prompt, "rejected", rejected))
            for i, (prompt, chosen, rejected) in enumerate(rows)
        ]
        write_shard(folder, 0, pairs, ("kind",))
        made = {"model": "a patient", "fingerprint": ""}
        meta = {"schema_version": 1, "patient": made, "tokenizer": {"fingerprint": "t"}}
        data = {"dataset": {"source": NASTY[0], "fingerprint": "f"}, "shards": ["rewards-00000.parquet"]}
        faces = {"kind": {"positive": "good", "negative": "bad"}}
        counts = {"pairs": len(pairs), "tokens": 0, "skipped": 0, "truncated_prompts": 0}
        write_json(folder / "meta.json", {**meta, "faces": faces, "counts": counts, **data})
        return folder

    return make


@pytest.fixture(scope="session")
def thirty(texts):
    """Thirty pairs; every third asks about Tea, and number 4 has coffee in a rejected answer."""
    rows = [
        (f"Is {'Tea' if i % 3 == 0 else 'rain'} good, {i}?", "It is good, yes." * (1 + i % 3), "No, go away.")
        for i in range(30)
    ]
    rows[4] = (rows[4][0], rows[4][1], "Have a COFFEE.")
    return texts(rows)


def settings_of(folder):
    rewards = RewardsFolder(folder)
    none = dict.fromkeys(("faces", "direction", "tau", "theta"))
    profile = fitting(load_profile("clinic"), None, rewards.meta["patient"]["fingerprint"])
    settings = reward_settings(profile, available=rewards.faces, **none)
    return rewards, settings, face_weights(rewards, rewards.faces, settings)


def test_worst_are_the_pairs_whose_gap_contradicts_the_label_most(run, thirty):
    rewards, settings, weights = settings_of(thirty)
    margins = {}
    for pair in rewards:
        chosen, rejected = (float(token_rewards(s, settings, weights).gaps.sum()) for s in (pair.chosen, pair.rejected))
        margins[pair.chosen.pair_id] = chosen - rejected
    shown = json.loads(run("inspect", thirty, "--worst", 7, "--json").stdout)["pairs"]
    assert [pair["id"] for pair in shown] == sorted(margins, key=margins.get)[:7]
    everything = json.loads(run("inspect", thirty, "--worst", 99, "--json").stdout)["pairs"]
    assert [pair["id"] for pair in everything] == sorted(margins, key=margins.get)


def test_contains_looks_in_prompt_and_both_answers_without_case(run, thirty):
    tea = json.loads(run("inspect", thirty, "--contains", "tea good", "--limit", 99, "--json").stdout)
    assert [pair["id"] for pair in tea["pairs"]] == [str(i) for i in range(0, 30, 3)]
    assert tea["statistics"]["pairs"] == 10
    coffee = run("inspect", thirty, "--contains", "coffee").stdout
    assert "[pair 4]" in coffee
    assert "1 of 30 pairs" in coffee
    both = json.loads(run("inspect", thirty, "--contains", "coffee", "--pair", 4, "--json").stdout)
    assert [pair["id"] for pair in both["pairs"]] == ["4"]


def test_filters_that_match_nothing(fails, thirty):
    fails(2, ["--contains", "'whisky'"], "inspect", thirty, "--contains", "whisky")
    fails(2, ["--pair", "'4'"], "inspect", thirty, "--contains", "tea", "--pair", 4)
    fails(2, ["--pair", "--worst"], "inspect", thirty, "--worst", 1, "--pair", 4)
    fails(2, ["--json", "--html"], "inspect", thirty, "--json", "--html", "a.html")


def test_no_more_pairs_are_held_than_shown(thirty, monkeypatch):
    """Whatever the folder's size: every pair that is not shown is free again when the next is read."""
    rewards, settings, weights = settings_of(thirty)
    look = RewardReader(rewards, settings, weights, load_tokenizer(thirty / "tokenizer"))
    made, most, sides_of = [], 0, look.sides

    def counted(scores):
        nonlocal most
        sides = sides_of(scores)
        made.append(weakref.ref(sides[0].rewards))
        most = max(most, sum(held() is not None for held in made))
        return sides

    monkeypatch.setattr(look, "sides", counted)
    for worst in (True, False):
        shown, statistics, _ = look.all(pair=None, contains=None, limit=3, worst=worst)
        assert (len(shown), statistics.pairs) == (3, 30)
        del shown
    assert len(made) == 60
    assert most <= 3 + 2, "those to show, the last one and the new one"


def test_the_sign_shows_without_colour(run, thirty):
    document = json.loads(run("inspect", thirty, "--pair", 5, "--tau", 1, "--json").stdout)["pairs"][0]
    text = run("inspect", thirty, "--pair", 5, "--tau", 1, env={"NO_COLOR": "1"}).stdout
    assert "\x1b" not in text
    for side in ("chosen", "rejected"):
        tokens = document[side]["tokens"]
        body = text.split(f"\n{side}, ")[1].split("\n")[1]
        expected = "".join(
            (t["text"] or ("∎" if t["reward"] else "")).rstrip()
            + ("+" if t["reward"] > 0 else "-" if t["reward"] < 0 else "")
            + t["text"][len(t["text"].rstrip()) :]
            for t in tokens
        )
        assert body == expected.strip()
        assert {np.sign(t["reward"]) for t in tokens} == {-1, 0, 1}


def test_settings_that_prune_all_that_is_shown_are_told(run, thirty):
    pruned = run("inspect", thirty, "--pair", 5, "--tau", 1000, "--theta", 0.9)
    assert "note: tau 1000 and theta 0.9 prune every token of the pairs shown, the greatest importance" in pruned.stderr
    assert "note: " not in run("inspect", thirty, "--pair", 5, "--tau", 1).stderr
    raw = run("inspect", thirty, "--pair", 5, "--tau", 1000, "--theta", 0.9, "--show", "gap").stdout
    body = raw.split("\nchosen, raw gap")[1].split("\n")[1]
    assert {"+", "-"} <= set(body)


SIDES = [
    RewardedText("chosen", ("Go", " to", " bed", ""), (0.0, 1.0, 0.25, 1.0)),
    RewardedText("rejected", ("Go", " away", ""), (0.0, -1.0, 0.0)),
]


@pytest.mark.parametrize("width", [40, 80, 160])
def test_the_heatmap_fits_and_stands_side_by_side_where_there_is_room(width, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # of a dumb terminal rich takes no width
    screen = Console(width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    screen.print(rich_heatmap("How? " * 200, SIDES, width))
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line) for line in screen.file.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    assert any("bed" in line and "away" in line for line in lines) is (width >= 80)


def luminance(colour):
    linear = [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_mark_is_readable_on_any_terminal_and_for_any_colour_vision():
    """Text and ground are both given, 4.5 : 1 apart at least; the sign is orange or blue, both equally light."""
    for reward in (-1, -0.6, -0.3, 0.3, 0.6, 1):
        text, ground = heat_style(reward, 1).split(" on ")
        assert (luminance(ground) + 0.05) / (luminance(text) + 0.05) >= 4.5
        red, blue = int(ground[1:3], 16), int(ground[5:7], 16)
        assert (blue > red) is (reward > 0)
    assert luminance(scale_colour(1, 1)) == pytest.approx(luminance(scale_colour(-1, 1)), abs=0.02)
    assert heat_style(0.0, 1) == ""


def test_a_reward_at_a_token_without_text_shows():
    assert SIDES[0].shown() == ["Go", " to", " bed", END]
    assert SIDES[1].shown() == ["Go", " away", ""]


class Page(HTMLParser):
    """What a browser would make of a page: tags, attributes, and the text outside of <style> and <title>."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.inside = set(), [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.inside.append(tag)

    def handle_endtag(self, tag):
        self.inside.append(f"/{tag}")

    def handle_data(self, data):
        if not self.inside or self.inside[-1] not in ("style", "title"):
            self.text += data


@pytest.fixture(scope="module")
def nasty(texts):
    return texts([(text, f"{text} yes", f"no {text}") for text in NASTY])


@pytest.mark.parametrize("more", [(), ("--diagnose",)])
def test_nothing_in_the_data_can_run_in_the_page(run, nasty, tmp_path, more):
    done = run("inspect", nasty, "--html", tmp_path / "page.html", *more)
    assert (done.exit_code, done.stdout) == (0, ""), done.output + repr(done.exception)
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(source)
    assert not page.tags & {"script", "a", "img", "iframe", "object", "embed", "link", "base", "form", "input"}
    assert {name for name, _ in page.attributes} <= {
        *("class", "style", "title", "lang", "charset", "name", "content", "http-equiv", "scope"),
        *("xmlns", "xmlns:xlink", "xlink:href", "viewbox", "version", "type", "width", "height", "role", "aria-label"),
        *("id", "x", "y", "d", "transform", "clip-path"),
    }
    drawn = r"(fill|stroke|font|text|opacity)(-[a-z]+)?: [-\w#.,' %]+"
    for name, value in page.attributes:
        if name == "style":
            assert re.fullmatch(
                r"(background:#[0-9a-f]{6}|width:[\d.]+rem|max-width:100%;height:auto)" + f"|{drawn}(; {drawn})*", value
            )
        elif name in ("xlink:href", "clip-path"):
            assert re.fullmatch(r"#\w+|url\(#\w+\)", value), "only what the drawing itself defines"
    namespaces = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
    assert "//" not in re.sub("|".join(namespaces), "", source).replace("//evil.example", "")
    assert "default-src 'none'" in source
    assert "\x1b" not in source
    if not more:
        for text in NASTY[:-1]:
            assert page.text.count(text) == 3 + (text == NASTY[0]), "as it is: in prompt, answers, and as a data set"


def test_hovering_shows_the_numbers_of_every_token(run, nasty, tmp_path):
    run("inspect", nasty, "--html", tmp_path / "page.html", "--pair", 2)
    document = json.loads(run("inspect", nasty, "--json", "--pair", 2).stdout)["pairs"][0]
    titles = [value for name, value in Page((tmp_path / "page.html").read_text()).attributes if name == "title"]
    tokens = document["chosen"]["tokens"] + document["rejected"]["tokens"]
    assert titles == [
        f"reward {t['reward']:+.3f}, gap {t['gap']:+.3f} nats, importance {t['importance']:.3f}" for t in tokens
    ]


def test_nothing_in_the_data_can_steer_the_terminal_or_the_picture(run, nasty, tmp_path):
    text = run("inspect", nasty, "--limit", 99).stdout
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[bold]red[/bold]" in re.sub(r"[+-]", "", text)
    assert run("inspect", nasty, "--limit", 99, "--svg", tmp_path / "a.svg").exit_code == 0
    picture = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "<script" not in picture
    assert "\x1b" not in picture
    assert "http" not in picture.replace("http://www.w3.org/2000/svg", "").replace("https://www.textualize.io", "")


def test_statistics_say_the_same_everywhere(run, thirty, tmp_path):
    found = json.loads(run("inspect", thirty, "--json").stdout)["statistics"]
    assert sum(found["gaps"]) == found["tokens"]
    text = run("inspect", thirty).stdout
    run("inspect", thirty, "--html", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text()).text
    word = found["rewarded"][0]
    for form in (text, page):
        assert f"{found['share_rewarded']:.1%} of the tokens" in form
        assert f"in {found['agreement']:.1%} of the pairs" in form
        assert word["text"] in form
        assert f"{word['reward']:+.1f}" in form


def test_a_folder_of_faces_that_hardly_differ_is_named(texts, run, monkeypatch):
    monkeypatch.setattr("llmdoctor.token_rewards.summary.HARDLY", 1e9)
    done = run("inspect", texts([("Hi", "Yes, I do.", "No, I do not.")]))
    assert "'kind' hardly differ on this patient" in done.stderr


def test_bars_leave_the_tokens_around_zero_out_of_the_scale():
    statistics = Statistics(1, 1000, 0, 0, 0, 0, (0, 0, 0, 0, 50, 900, 25, 25, 0, 0, 0), 1, 1, (), ())
    rows = {name: (share, sign, length) for name, share, sign, length in gap_bars(statistics)}
    assert rows["-0.03 to 0.03"] == (0.9, 0, 1.0)
    assert rows["0.03 to 0.1"] == (0.025, 1, 0.5)
    assert rows["-0.1 to -0.03"] == (0.05, -1, 1.0)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_labels_and_shares_of_the_histogram_stay_whole_on_one_line(width):
    statistics = Statistics(1, 1000, 0, 0, 0, 0, (0, 0, 0, 0, 50, 900, 25, 25, 0, 0, 0), 1, 1, (), ())
    screen = Console(width=width, file=io.StringIO())
    screen.print(rich_statistics(statistics))
    lines = screen.file.getvalue().splitlines()
    for label, share in (("-0.03 to 0.03", "90.0%"), ("-0.1 to -0.03", "5.0%"), ("above 3", "0.0%")):
        assert any(re.match(rf"{label} +{share}", line) for line in lines), label
