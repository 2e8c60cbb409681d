"""The rewards browser and the comparison browser."""

import threading
import time

from textual.widgets import OptionList

from llmdoctor.errors import DataError
from llmdoctor.records import Answer, Comparison
from llmdoctor.show.rewards import RewardedText
from llmdoctor.tui.app import BrowserApp
from llmdoctor.tui.config import Config
from llmdoctor.tui.screens.comparisons_browser import ComparisonsScreen, comparison_item
from llmdoctor.tui.screens.failed import FailedScreen
from llmdoctor.tui.screens.rewards_browser import RewardsScreen, rewards_item
from llmdoctor.tui.widgets.inspector import Inspector

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
        await d.press("n", "n")
        assert "Question 2?" in d.text()
        assert screen.view("left").limit == screen.view("right").limit == 2.25
        await d.press("enter", "right", "right")
        assert "chosen, token 3   reward +2.250   gap +4.500 nats   importance 2.250" in d.text()
        view = screen.view("left")
        assert view._style(2, view.rich_style, dark=True).bold
        await d.press("tab", "left")
        assert "rejected, token 1   reward -1.000" in d.text()
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


def test_comparisons_are_browsed_while_they_are_made(drive):
    more = threading.Event()

    def source(post, check):
        post("loading")
        post(comparison_item(compared(1)))
        while not more.wait(0.01):
            check()
        post(comparison_item(compared(2)))
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
