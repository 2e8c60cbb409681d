"""The rewards browser and the comparison browser."""

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from textual.widgets import DataTable, OptionList

from llmdoctor.errors import DataError
from llmdoctor.records import Answer, Comparison, Versus
from llmdoctor.show.rewards import RewardedText
from llmdoctor.tui.app import BrowserApp
from llmdoctor.tui.config import Config
from llmdoctor.tui.screens.browser import Item
from llmdoctor.tui.screens.comparisons_browser import ComparisonsScreen, comparison_items
from llmdoctor.tui.screens.failed import FailedScreen
from llmdoctor.tui.screens.rewards_browser import RewardsScreen, rewards_item
from llmdoctor.tui.screens.sessions import SessionsScreen
from llmdoctor.tui.widgets.inspector import Inspector
from llmdoctor.tui.widgets.search import Search
from llmdoctor.tui.widgets.token_view import Piece

from .conftest import FakeAssistant


def rewarded(side, words, rewards):
    text = RewardedText(f"{side}, reward {sum(rewards):+.2f}", tuple(words), tuple(rewards))
    return text, [2 * r for r in rewards], [abs(r) for r in rewards]


def test_rewards_are_browsed_pair_by_pair_and_token_by_token(drive):
    def source(post, check):
        for number in range(3):
            check()
            chosen = rewarded("chosen", ["Good", " day", "."], [0.5, 0.0, 0.25 + number])
            post(rewards_item(f"pair-{number}", f"Question {number}?", [chosen, rewarded("rejected", ["No"], [-1.0])]))

    app = BrowserApp(lambda: RewardsScreen(source), Config())

    async def steps(d):
        await d.until(lambda: len(getattr(app.screen, "items", ())) == 3)
        screen = app.screen
        await d.until(lambda: screen.current == 0)
        assert "chosen, reward +0.75" in d.text()
        assert "rejected, reward -1.00" in d.text()
        assert "1 of 3   Question 0?" in d.text()
        assert d.strips[-1].text.strip() == "↑↓ choose  Enter its tokens  / search  q leave"
        await d.press("n", "n")
        assert "Question 2?" in d.text()
        assert screen.view("left").limit == screen.view("right").limit == 2.25
        await d.press("enter", "right", "right")
        assert "chosen, token 3   reward +2.250   gap +4.500 nats   importance 2.250" in d.text()
        view = screen.view("left")
        assert view._style(2, view.rich_style, dark=True).bold
        await d.press("tab", "left")
        assert "rejected, token 1   reward -1.000" in d.text()
        assert d.strips[-1].text.strip().startswith("←→↑↓ token  Tab other text  Esc back to the list")
        await d.press("escape", "p")
        assert screen.current == 1
        assert isinstance(app.focused, OptionList)
        await d.press("q")

    drive(app, steps)


def compared(seed):
    fake = FakeAssistant(shortest=6)
    how = {"seed": seed, "temperature": 1.0, "max_new_tokens": 20, "top": 5, "prefix_ids": (), "force_id": None}
    sides = []
    for guided in (False, True):
        tokens = tuple(fake.stream([{"content": "x"}], **how, guided=guided))
        sides.append(Answer("".join(t.text for t in tokens).strip(), tokens, True))
    kl = sum(t.kl for t in sides[1].tokens)
    count = len(sides[1].tokens)
    metrics = {"flips": 3, "guided_tokens": count, "kl": kl, "kl_per_token": kl / count}
    settings = {"alpha": 1.0, "betas": {"helpful": 0.8, "safe": 0.4}, "temperature": 1.0, "seed": seed}
    return Comparison(f"Prompt {seed}", settings, *sides, metrics)


def test_every_guided_answer_has_an_entry_of_its_own():
    one = compared(1)
    further = Versus("beta=2", {**one.settings, "betas": {"helpful": 2.0}}, compared(2).guided, one.metrics)
    first, second = comparison_items(replace(one, vs=(further,)))
    assert (first.title, second.title) == ("Prompt 1", "beta=2: Prompt 1")
    assert [heading for heading, _ in second.sides] == ["patient alone", "beta=2: guided by helpful 2"]
    texts = ["".join(piece.text for piece in shown) for item in (first, second) for _, shown in item.sides]
    assert texts[0] == texts[2]
    assert compared(2).guided.text in texts[3]


def test_comparisons_are_browsed_while_they_are_made(drive):
    more = threading.Event()

    def source(post, check):
        post("loading")
        post(*comparison_items(compared(1)))
        while not more.wait(0.01):
            check()
        post(*comparison_items(compared(2)))
        while True:  # as a long list of prompts: only leaving ends it
            check()
            time.sleep(0.01)

    app = BrowserApp(lambda: ComparisonsScreen(source, "kl", "helpful", ("helpful", "safe")), Config())

    async def steps(d):
        await d.until(lambda: getattr(app.screen, "current", None) == 0)
        screen = app.screen
        assert "guided by helpful 0.8, safe 0.4" in d.text()
        assert "3 of " in d.text()
        more.set()
        await d.until(lambda: len(screen.items) == 2)
        await d.press("n", "tab", "tab", "end")
        inspector = screen.query_one(Inspector)
        assert inspector.display
        assert inspector.token == compared(2).guided.tokens[-1]
        await d.press("f3")
        assert "log helpful / patient" in d.text()
        await d.press("ctrl+l")
        assert "log safe / patient" in d.text()
        await d.press("escape")
        assert not inspector.display

    drive(app, steps)
    assert "llmdoctor-browser" not in {thread.name for thread in threading.enumerate()}


def test_a_source_that_fails_is_a_readable_screen(drive):
    def source(_post, _check):
        raise DataError("prompts.txt: line 3: expected text")

    app = BrowserApp(lambda: RewardsScreen(source), Config())

    async def steps(d):
        await d.until(lambda: isinstance(app.screen, FailedScreen))
        assert "error: prompts.txt: line 3: expected text" in d.text()
        await d.press("q")

    drive(app, steps)
    assert app.return_value == 2


def test_a_browser_is_searched_by_all_its_words_in_title_and_texts(drive):
    more = threading.Event()

    def source(post, check):
        for number, words in enumerate(("Good day", "good night", "bad night")):
            post(rewards_item(f"pair-{number}", "Q?", [rewarded("chosen", words.split(" "), [0.5, 0.0])] * 2))
        while not more.wait(0.01):
            check()
        post(rewards_item("pair-3", "Q?", [rewarded("chosen", ["GOOD"], [0.5])] * 2))

    app = BrowserApp(lambda: RewardsScreen(source), Config())

    async def steps(d):
        await d.until(lambda: getattr(app.screen, "current", None) == 0 and len(app.screen.items) == 3)
        listed = app.screen.query_one(OptionList)
        await d.press("n", "slash", "g", "O", "o", "d")
        assert listed.option_count == 2
        assert app.screen.current == 1  # the one that was shown is among them
        assert "2 of 3 (2 found)" in d.text()
        more.set()
        await d.until(lambda: listed.option_count == 3)  # what comes later is searched as well
        await d.press("enter", "n")
        assert app.focused is listed
        assert app.screen.current == 3
        await d.press("n")
        assert app.screen.current == 0
        await d.press("slash", "space", "q", "u", "a", "c", "k")
        assert listed.option_count == 0
        await d.press("n", "escape")
        assert listed.option_count == 4
        await d.press("slash", "n", "i", "g", "h", "t", "down")
        assert [app.screen.items[number].title for number in app.screen._listed] == ["pair-1  Q?", "pair-2  Q?"]
        await d.press("slash", "escape")
        await d.typed_ahead("/qu/ack")  # q leaves, but not from within the field
        await d.until(lambda: app.screen.query_one(Search).value == "qu/ack")

    drive(app, steps)


def test_a_search_joins_the_texts_of_an_item_once_and_none_while_nothing_is_sought(drive):
    joined = []

    class Counted(Sequence):
        """The tokens of a text; tells when they are looked through from the first to the last."""

        def __init__(self, pieces):
            self.pieces = pieces

        def __len__(self):
            return len(self.pieces)

        def __getitem__(self, index):
            return self.pieces[index]

        def __iter__(self):
            joined.append(self)
            return iter(self.pieces)

    pieces = [Counted([Piece(word)]) for word in ("STRASSE", "Straße", "Weg")]
    items = [Item(str(number), (("a", shown), ("b", [])), "") for number, shown in enumerate(pieces)]
    app = BrowserApp(lambda: RewardsScreen(lambda post, _check: [post(item) for item in items]), Config())

    async def steps(d):
        await d.until(lambda: getattr(app.screen, "current", None) == 0 and len(app.screen.items) == 3)
        assert not {id(pieces[1]), id(pieces[2])} & set(map(id, joined))  # those not shown
        await d.press("slash", "space", "s", "t", "r", "a", "ß", "e")
        assert app.screen._listed == [0, 1]
        assert joined.count(pieces[2]) == 1  # never shown, sought seven times

    drive(app, steps)


def test_conversations_are_searched_previewed_and_renamed_where_one_is(make_app, drive):
    app = make_app()

    async def steps(d):
        await d.press("f9")
        assert "No saved conversation yet." in d.text()
        await d.press("r", "d", "e", "enter", "slash", "x", "escape", "escape")  # nothing there: no crash
        await d.ask("How is the sun?")
        await d.press("f9")
        assert "1 conversation in " in d.text()
        await d.press("escape")
        for question in ("A dark night", "The moon"):
            await d.type("/new")
            await d.ask(question)
        await d.ask("And the SUN?")
        await d.press("f9")
        assert "3 conversations in " in d.text()
        preview = app.screen.query_one("#preview-view")
        await d.until(lambda: "❯ And the SUN?" in " ".join(preview.lines))
        assert app.chat.turns[1].guided.text in " ".join(" ".join(preview.lines).split())
        await d.press("slash", "s", "u", "n")
        assert [one.title for one in app.screen._rows] == ["The moon", "How is the sun?"]  # one by its second question
        assert "2 of 3 conversations" in d.text()
        await d.press("down", "down")
        await d.until(lambda: "❯ How is the sun?" in " ".join(preview.lines))
        await d.press("r", *["backspace"] * 15, "o", "n", "e", "enter")
        table = app.screen.query_one(DataTable)
        await d.until(lambda: "one" in [one.title for one in app.screen._rows])
        assert app.focused is table
        assert app.screen._chosen().title == "one"
        await d.press("tab")
        assert app.focused is preview
        await d.press("tab", "up", "d", "down", "enter")
        await d.until(lambda: "1 of 2 conversations" in d.text())
        await d.press("slash", "escape")
        await d.typed_ahead("/dark")  # d deletes, but not from within the field
        await d.until(lambda: [one.title for one in app.screen._rows] == ["A dark night"])
        await d.press("down", "slash", "escape", "down")
        assert [one.title for one in app.screen._rows] == ["A dark night", "one"]
        assert app.screen._chosen().title == "one"
        await d.press("enter")
        assert app.chat.turns[0].prompt == "How is the sun?"

    drive(app, steps)


def test_a_conversation_read_while_its_screen_closes_ends_nothing(make_app, drive, monkeypatch):
    app = make_app()
    asked, read = [], Future()

    async def steps(d):
        await d.ask("Go")
        session = app.read_session(app.saved_sessions()[0].id).result()
        monkeypatch.setattr(app, "read_session", lambda name: asked.append(name) or read)
        await d.press("f9")
        await d.until(lambda: asked)

        async def without_its_widgets(screen):
            if not read.done():
                read.set_result(session)
            await asyncio.sleep(0.05)

        monkeypatch.setattr(SessionsScreen, "on_unmount", without_its_widgets, raising=False)
        await d.press("escape")
        await d.until(lambda: read.done() and app.focused is app.chat.prompt)
        await d.ask("On")

    drive(app, steps)


def test_messages_cover_nothing_at_any_length(make_app, drive):
    app = make_app()

    async def steps(d):
        await d.ask("Go")
        lines = d.text().splitlines()
        app.notify("Copied.")
        await d.pilot.pause()
        changed = [(a, b) for a, b in zip(lines, d.text().splitlines(), strict=True) if a != b]
        assert len(changed) == 1  # the status line
        assert changed[0][1].startswith(" Copied. · seed 1")
        long = " ".join(f"word{number}" for number in range(60))
        app.notify(long, severity="error", markup=False)
        await d.pilot.pause(0.1)
        assert " ".join(d.text().split()).count("word59") == 1
        assert all(f"word{number}" in d.text() for number in range(60))
        regions = [widget.region for widget in app.screen.query("*") if not widget.children and widget.display]
        regions = [region for region in regions if region.area]
        assert sum(a.overlaps(b) for a in regions for b in regions if a is not b) == 0
        await d.pilot.click("#status")
        assert "word1" not in d.text()
        app.notify("[soon]gone", timeout=0.2, markup=False)
        await d.until(lambda: "[soon]gone" in d.text())
        await d.until(lambda: "[soon]gone" not in d.text())

    drive(app, steps, size=(80, 24))
