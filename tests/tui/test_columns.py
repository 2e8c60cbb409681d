"""Several settings or doctors beside the patient alone."""

import sqlite3
import threading
from dataclasses import replace

import pytest

from llmdoctor.errors import UsageError
from llmdoctor.sessions import SessionStore
from llmdoctor.settings import Guidance, Sampling
from llmdoctor.tui.columns import columns_of
from llmdoctor.tui.screens.columns_screen import ColumnsScreen
from llmdoctor.tui.screens.help import HelpScreen
from llmdoctor.tui.widgets.inspector import Alternatives, Inspector

from .conftest import FakeAssistant
from .test_chat import BOTH, drawn


async def compared(d, command):
    """The comparison's screen once all columns have answered."""
    await d.type(command)
    await d.until(lambda: isinstance(d.app.screen, ColumnsScreen) and d.app.screen.columns[0].turns)
    await d.until(lambda: not d.app.screen.live)
    return d.app.screen


def said(screen, turn=-1):
    return [[token.id for token in column.turns[turn].reply(column.which).tokens] for column in screen.columns]


def test_all_columns_answer_the_last_question_with_its_seed_and_settings_of_their_own(make_app, drive):
    fake = FakeAssistant(shortest=6)
    app = make_app(fake)

    async def steps(d):
        await d.ask("Before")
        await d.ask("Go")
        kept = app.chat.turns
        asked = len(fake.asked)
        screen = await compared(d, "/compare beta=0.2 helpful=2,safe=0 safe temperature=0")
        settings = [
            Guidance(),
            Guidance(betas={"helpful": 0.2, "safe": 0.2}),
            Guidance(betas={"helpful": 2.0, "safe": 0.0}),
            Guidance(betas={"helpful": 0.0, "safe": 0.4}),
            BOTH,
        ]
        answers = said(screen)
        assert answers[:4] == [drawn(1, guidance, 24) for guidance in settings[:4]]
        assert len(set(answers[4])) == 1  # greedy
        assert fake.guidance == BOTH  # the conversation's own
        past = {how["guided"]: [m["content"] for m in prompt] for prompt, how in fake.asked[asked:]}
        assert past[False] == ["Before", kept[0].patient.text, "Go"]
        assert past[True] == ["Before", kept[0].guided.text, "Go"]
        for title in ("patient alone", "beta=0.2 · helpful 0.2, safe 0.2", "safe alone · beta 0.4"):
            assert title in d.text()
        await d.press("N", "o", "w", "enter")
        await d.until(lambda: len(screen.columns[0].turns) == 3 and not screen.live)
        later = [[m["content"] for m in prompt] for prompt, _ in fake.asked[-5:]]
        for column in screen.columns[1:]:
            assert ["Before", kept[0].guided.text, "Go", column.turns[1].guided.text, "Now"] in later
        await d.press("escape")
        assert app.screen is app.chat
        assert app.chat.turns == kept  # the conversation is as it was
        await d.ask("On")
        assert fake.asked[-1][1]["guidance"] is None

    drive(app, steps, size=(200, 50))


def test_a_single_setting_stands_beside_those_in_use_and_mistakes_are_told():
    columns = columns_of("beta=2", BOTH, Sampling())
    assert [column.title for column in columns] == [
        "patient alone",
        "in use · helpful 0.8, safe 0.4",
        "beta=2 · helpful 2, safe 2",
    ]
    for text, words in (
        ("", "for example /compare beta=0.5 beta=2"),
        ("quack", "expected name=value or one of helpful, safe, got 'quack'"),
        ("beta=x beta=2", "/compare: "),
        ("alpha=0,beta=0", "nothing is left"),
        ("beta=1 " * 7, "at most 6"),
    ):
        with pytest.raises(UsageError, match=words):
            columns_of(text, BOTH, Sampling())
    (_, one, _) = columns_of("helpful safe", Guidance(betas={"helpful": 0.0, "safe": 0.4}), Sampling())
    assert one.guidance.betas == {"helpful": 1.0, "safe": 0.0}  # it is named: it has a say


def test_it_is_stopped_asked_again_inspected_coloured_and_left(make_app, drive):
    gate = threading.Semaphore(0)
    fake = FakeAssistant(shortest=99, gate=gate)
    app = make_app(fake)

    async def steps(d):
        await d.type("/compare beta=0 helpful")  # before anything was asked
        await d.until(lambda: isinstance(app.screen, ColumnsScreen))
        screen = app.screen
        await d.press("f6")
        assert "no answer to make again yet" in d.text()
        await d.press("G", "o", "enter")
        gate.release(9)
        await d.until(lambda: [len(c.live.tokens) for c in screen.columns] == [3, 3, 3])
        await d.press("ctrl+c")
        assert not screen.live
        gate.release(1000)
        await d.until(lambda: fake.open_streams == 0)
        assert [len(ids) for ids in said(screen)] == [3, 3, 3]
        assert d.text().count("⟨interrupted⟩") == 3
        seed = screen.seed
        await d.press("f6")
        await d.until(lambda: not screen.live)
        assert screen.seed != seed
        assert [len(c.turns) for c in screen.columns] == [1, 1, 1]
        assert said(screen)[0] == said(screen)[1]  # beta 0 is the patient alone
        inspector = screen.query_one(Inspector)
        await d.press("ctrl+t")
        assert inspector.token == screen.columns[1].turns[0].guided.tokens[0]  # nothing has changed: the first
        await d.press("ctrl+t", "right", "full_stop")
        assert inspector.token == screen.columns[2].turns[0].guided.tokens[2]
        assert [screen.view(n).cursor is None for n in range(3)] == [True, True, False]
        await d.press("enter")
        assert isinstance(app.focused, Alternatives)
        await d.press("left", "comma")
        assert inspector.token.position == 0
        await d.press("f3")
        assert "log helpful / patient" in d.text()
        await d.press("ctrl+l")
        assert "log safe / patient" in d.text()
        await d.press("f1")
        assert isinstance(app.screen, HelpScreen)
        await d.press("escape", "escape", "escape")
        assert app.screen is screen
        assert not inspector.display
        await d.press("escape")
        assert app.screen is app.chat
        await d.type("/compare beta=0 helpful")
        await d.until(lambda: isinstance(app.screen, ColumnsScreen))
        for key in ("/", "s", "h", "o", "w", "enter"):
            await d.press(key)
        assert app.screen is app.chat
        assert "alpha 1, beta helpful=0.8 safe=0.4" in d.notices

    drive(app, steps)


def test_columns_stand_beside_each_other_or_are_stacked_and_none_is_lost(make_app, drive):
    app = make_app()

    async def steps(d):
        await d.ask("Go")
        screen = await compared(d, "/compare beta=0 beta=1 beta=2")
        for size, across in (((200, 50), 4), ((120, 36), 2), ((80, 24), 2), ((60, 40), 1), ((30, 12), 1)):
            await d.pilot.resize_terminal(*size)
            await d.pilot.pause(0.1)
            panes = [screen.query_one(f"#column-{number}") for number in range(4)]
            rows = [pane.virtual_region.y for pane in panes]
            assert rows.count(rows[0]) == across, (size, rows)
            assert all(pane.size.height >= 4 and pane.size.width >= 25 for pane in panes), size

    drive(app, steps, size=(200, 50))


def test_a_comparison_is_saved_with_the_conversation_and_goes_on_where_it_was(make_app, drive, store):
    app = make_app()
    kept = []

    async def compare(d):
        await d.ask("Before")
        await d.ask("Go")
        screen = await compared(d, "/compare beta=0.2 safe")
        await d.press("N", "o", "w", "enter")
        await d.until(lambda: len(screen.columns[0].turns) == 3 and not screen.live)
        kept.append(([column.turns for column in screen.columns], d.text()))
        await d.press("escape")
        assert "/compare: the comparison again" in d.text()

    drive(app, compare, size=(160, 40))
    (summary,) = store.list()
    fake = FakeAssistant(shortest=6)
    again = make_app(fake, session=store.load(summary.id))

    async def go_on(d):
        assert "/compare: the comparison again" in d.text()
        await d.type("/compare")
        await d.until(lambda: isinstance(again.screen, ColumnsScreen))
        turns, shown = kept[0]
        assert [column.turns for column in again.screen.columns] == turns
        await d.pilot.pause(0.1)
        body = [line for line in d.text().splitlines() if line.startswith("│")]
        assert body == [line for line in shown.splitlines() if line.startswith("│")]
        assert not fake.asked  # it is shown, not made again
        seed = again.screen.seed
        await d.press("f6")  # its last question, with another seed
        await d.until(lambda: not again.screen.live and again.screen.seed != seed)
        assert [column.turns[:-1] for column in again.screen.columns] == [one[:-1] for one in turns]
        assert [column.turns[-1].prompt for column in again.screen.columns] == ["Now"] * 3
        await d.press("O", "n", "enter")
        await d.until(lambda: len(again.screen.columns[0].turns) == 4 and not again.screen.live)
        await d.press("escape")
        await d.type("/new")
        await d.type("/compare")
        assert "for example /compare beta=0.5 beta=2" in d.notices  # that one was another conversation's

    drive(again, go_on, size=(160, 40))
    last = store.comparison(summary.id)
    assert [column.turns[-1].prompt for column in last.columns] == ["On"] * 3
    assert [turn.prompt for turn in last.past] == ["Before"]


def test_a_comparison_without_a_conversation_is_saved_and_a_damaged_one_is_told(make_app, drive, store):
    async def compare(d):
        await d.type("/compare beta=2")
        await d.until(lambda: isinstance(d.app.screen, ColumnsScreen))
        await d.press("G", "o", "enter")
        await d.until(lambda: d.app.screen.columns[0].turns and not d.app.screen.live)

    drive(make_app(), compare)
    (summary,) = store.list()
    assert (summary.title, summary.turns) == ("Go", 0)
    assert len(store.comparison(summary.id).columns) == 3
    with sqlite3.connect(store.path) as db:
        db.execute("UPDATE comparison SET held = 'x'")
    db.close()

    async def resume(d):
        await d.type(f"/resume {summary.id}")
        assert "is damaged and left out" in d.notices
        assert d.app.chat.session.id == summary.id

    drive(make_app(), resume)


def test_when_the_conversation_is_forked_the_comparison_goes_with_it(make_app, drive, store):
    app = make_app()

    async def steps(d):
        await d.ask("Go")
        await compared(d, "/compare beta=2")
        await d.press("escape")
        first = app.chat.session.id
        other = SessionStore(store.path)
        other.save(replace(other.load(first), turns=()))  # another program goes on with it
        await d.ask("On")
        await d.until(lambda: app.chat.session.id != first)
        assert store.comparison(app.chat.session.id) == app.chat.compared
        assert len(app.chat.compared.columns) == 3

    drive(app, steps)
