"""The inspector: where it opens, that it shows the answer that is there, what its table holds."""

import math
import threading
from dataclasses import replace

import pytest
from textual.widgets import DataTable

from llmdoctor.records import Alternative, GuidedToken
from llmdoctor.settings import Sampling
from llmdoctor.show.lens import DEFAULT_LENS, lens_limit
from llmdoctor.tui import token_style
from llmdoctor.tui.app import BrowserApp
from llmdoctor.tui.config import Config
from llmdoctor.tui.conversation import Said
from llmdoctor.tui.screens.comparisons_browser import ComparisonsScreen, comparison_items
from llmdoctor.tui.widgets.inspector import Alternatives, Inspector, ranked
from llmdoctor.tui.widgets.status import StatusLine

from .conftest import END, FakeAssistant
from .test_browsers import compared


def inspected(app):
    return app.chat.query_one(Inspector).token


async def answer_in_parts(d, gate, betas):
    """An answer with another beta of both doctors after every four tokens or so."""
    app = d.app
    await d.type(f"/set beta={betas[0]}")
    await d.type("Go")
    for count, beta in enumerate(betas[1:], start=1):
        gate.release(8)
        await d.until(lambda n=4 * count: len(app.chat.live.sides["guided"].tokens) >= n)
        await d.type(f"/set beta={beta}")
    gate.release(1000)
    await d.idle()
    return app.chat.turns[-1].guided.tokens


def test_it_opens_on_the_first_change_and_keys_go_from_change_to_change(make_app, drive):
    gate = threading.Semaphore(0)
    app = make_app(FakeAssistant(shortest=99, gate=gate), sampling=Sampling(max_new_tokens=16))

    async def steps(d):
        tokens = await answer_in_parts(d, gate, (0, 1, 0, 1))
        changed = [token.position for token in tokens if token.flip]
        assert 4 <= changed[0] <= 5  # one token may have been under way when beta changed
        assert len(changed) < 12
        view = app.chat.view("guided")
        await d.press("f2")
        assert view.selected.position == changed[0]
        assert inspected(app) == tokens[changed[0]]
        assert ". , changes" in d.text()
        for place in changed[1:]:  # over the unchanged ones between
            await d.press("full_stop")
            assert inspected(app) == tokens[place]
        await d.press("full_stop")
        assert "There is no changed token after this one." in d.text()
        assert inspected(app) == tokens[changed[-1]]
        await d.press("enter", "comma")  # from within the table
        assert isinstance(app.focused, DataTable)
        assert inspected(app) == tokens[changed[-2]]
        await d.press("escape", "home", "comma")
        assert "There is no changed token before this one." in d.text()
        assert view.selected.position == 0
        await d.press("f2", "ctrl+t", "f2")  # nothing has changed the patient alone: its first token
        assert app.chat.view("patient").selected.position == 0

    drive(app, steps)


def test_the_token_stays_in_view_when_the_window_gets_smaller(make_app, drive):
    app = make_app(FakeAssistant(shortest=999), sampling=Sampling(max_new_tokens=200))

    async def steps(d):
        await d.type("Go")
        await d.idle()
        view = app.chat.view("guided")
        assert view.following  # all of it fits
        await d.press("f2", "home", "right", "right")
        for size in ((80, 24), (60, 20), (200, 60), (90, 24)):
            await d.pilot.resize_terminal(*size)
            await d.pilot.pause(0.1)
            assert view.selected.position == 2
            line = view._flow.first_line[view.cursor]
            assert view.scroll_offset.y <= line < view.scroll_offset.y + view.size.height, size

    drive(app, steps, size=(200, 60))


def test_changed_are_flips_and_what_the_default_lens_shows_bold():
    token = replace(FakeAssistant()._token(0, {"guided": False, "temperature": 1, "seed": 1, "top": 1}, 0), flip=False)
    for kl in (0.0, 0.2, 0.33, 0.4, 3.0):
        bold = token_style.style(kl, lens_limit(DEFAULT_LENS), dark=True).bold
        assert Said(0, 0, replace(token, kl=kl)).changed == bool(bold)
    assert Said(0, 0, replace(token, kl=0.0, flip=True)).changed


def test_after_forcing_and_stepping_it_shows_the_answer_that_is_there(make_app, drive):
    fake = FakeAssistant(shortest=99)
    app = make_app(fake)

    async def steps(d):
        await d.ask("Go")
        before = app.chat.turns[0].guided.tokens
        await d.press("f2", "home", "right", "right", "enter")
        other = next(i for i, a in enumerate(ranked(before[2])) if a.id not in (before[2].id, END))
        await d.press(*["down"] * other, "enter")
        await d.idle()
        after = app.chat.turns[0].guided.tokens
        assert inspected(app) == after[2] != before[2]
        assert "forced" in str(app.chat.query_one("#token-facts").render())
        for key, tokens in (("alt+left", before), ("alt+right", after), ("alt+left", before)):
            await d.press(key)
            assert inspected(app) == tokens[2]
            assert app.chat.view("guided").selected.token == tokens[2]
        asked = len(fake.asked)
        await d.press("enter", *["down"] * other, "enter")  # the same again, from what is shown after the step back
        await d.idle()
        assert len(fake.asked) == asked + 1
        assert app.chat.turns[0].guided.tokens == after
        await d.press("f6")
        await d.idle()
        assert inspected(app) == app.chat.turns[0].guided.tokens[2]
        await d.press("alt+left", "alt+left", "alt+left", "alt+left", "alt+left", "alt+left")
        assert app.chat.turns == ()
        assert inspected(app) is None

    drive(app, steps)


def test_a_place_that_the_new_answer_does_not_reach_is_its_end(make_app, drive):
    app = make_app(FakeAssistant(shortest=99))

    async def steps(d):
        await d.ask("Go")
        await d.press("f2", "end")
        assert inspected(app).position == 23
        await d.type("/set max_new_tokens=9")
        await d.press("f5")
        await d.idle()
        assert inspected(app) == app.chat.turns[0].guided.tokens[-1]
        assert inspected(app).position == 8
        await d.press("f2", "home", "enter")
        await d.press(*["down"] * 7)
        assert "end of answer <end>" in d.text()
        (last,) = [i for i, a in enumerate(ranked(inspected(app))) if a.id == END]
        app.chat.query_one(DataTable).move_cursor(row=last)
        await d.press("enter")
        await d.idle()
        assert [token.id for token in app.chat.turns[0].guided.tokens] == [END]
        assert inspected(app).id == END
        assert "end of answer <end>  1 of 1" in d.text()

    drive(app, steps)


def test_its_count_grows_with_the_answer(make_app, drive):
    gate = threading.Semaphore(0)
    app = make_app(FakeAssistant(shortest=99, gate=gate))

    async def steps(d):
        await d.type("Go")
        gate.release(10)
        await d.until(lambda: len(app.chat.live.sides["guided"].tokens) == 5)
        await d.press("f2")
        assert "1 of 5" in d.text()
        gate.release(6)
        await d.until(lambda: len(app.chat.live.sides["guided"].tokens) == 8)
        await d.until(lambda: "1 of 8" in d.text())
        gate.release(1000)
        await d.idle()
        assert "1 of 24" in d.text()

    drive(app, steps)


def test_forcing_a_token_of_an_earlier_turn_drops_the_later_ones_on_both_sides(make_app, drive):
    app = make_app(FakeAssistant(shortest=99))

    async def steps(d):
        await d.ask("First")
        await d.ask("Second")
        await d.press("f2", "home", "enter")
        await d.press("down", "enter")
        await d.idle()
        assert [turn.prompt for turn in app.chat.turns] == ["First"]
        for which in ("patient", "guided"):
            assert "Second" not in d.words(which)

    drive(app, steps)


def alternative(number, text, guided, patient):
    return Alternative(number, text, math.log(patient), {"helpful": math.log(0.5)}, math.log(guided))


def test_rare_alternatives_are_folded_and_unfold(make_app, drive):
    """Folded is what neither the patient nor the product says; what guidance took away from the patient stays."""
    top = (
        alternative(1, " sun", 0.9, 0.5),
        alternative(2, "", 0.05, 0.05),
        alternative(3, " moon", 0.0002, 0.4),
        alternative(4, " rain", 0.0003, 0.0004),
        alternative(5, " wind", 0.0001, 0.0001),
        alternative(6, "w" * 60, 0.01, 0.01),
    )
    said = GuidedToken(0, 5, " wind", -9.0, {"helpful": -1.0}, -9.0, {"helpful": 0.0}, False, 0.1, 1.0, {}, top)
    other = GuidedToken(0, 1, " sun", -0.7, {"helpful": -0.7}, -0.1, {"helpful": 0.0}, False, 0.1, 1.0, {}, top)
    app = make_app()

    async def steps(d):
        await d.ask("Go")
        await d.press("f2")
        inspector = app.chat.query_one(Inspector)
        table = inspector.query_one(DataTable)

        def shown():
            return [str(table.get_row_at(row)[1]) for row in range(table.row_count)]

        inspector.show(other, None, 1, {2: "end of answer <|im_end|>"})
        common = ["·sun", "end of answer <|im_end|>", "w" * 25 + "…"]
        assert shown() == [*common, "·moon", "2 more below 0.1%"]
        table.focus()
        await d.press("ctrl+end", "enter")
        assert shown() == [*common, "·rain", "·moon", "·wind", "fold those below 0.1%"]
        await d.press("ctrl+end", "enter")
        assert len(shown()) == 5
        inspector.show(said, None, 1, {})
        assert shown() == ["·sun", "∎", "w" * 25 + "…", "·moon", "·wind", "1 more below 0.1%"]

    drive(app, steps)


LONG = "The file that holds the profile cannot be read. " * 40


def rows(view) -> int:
    """The rows of a text; Textual says 1 where there is none."""
    return view.parent.outer_size.height - 2


async def told(d, length: int) -> None:
    """After an error of so many characters."""
    line = d.app.screen.query_one(StatusLine)
    d.app.notify(LONG[:length], severity="error", markup=False)
    await d.until(lambda: line.outer_size.height >= 5)
    assert line.outer_size.height <= d.app.size.height / 3


@pytest.mark.parametrize(("length", "least"), [(370, 3), (len(LONG), 2)])
def test_a_long_error_leaves_rows_to_the_texts_beside_the_inspector(make_app, drive, length, least):
    app = make_app()

    async def steps(d):
        await d.ask("Go")
        await d.press("f2")
        await told(d, length)
        assert app.chat.panes.inspecting
        assert min(rows(app.chat.view(which)) for which in ("patient", "guided")) >= least
        assert app.screen.query_one(Alternatives).region.height > 0
        app.clear_notifications()
        await d.type("/compare alpha=0.5")
        await d.until(lambda: app.screen is not app.chat and not app.screen.live)
        await d.press("tab", "right", "right")
        assert app.screen.query_one(Inspector).display
        await told(d, length)
        columns = [rows(app.screen.view(number)) for number in range(len(app.screen.columns))]
        assert min(columns) >= least - 1  # in two rows

    drive(app, steps, size=(80, 24))


def test_a_long_error_leaves_rows_to_the_texts_in_a_narrow_browser(drive):
    def source(post, _check):
        post(*comparison_items(compared(1)))

    app = BrowserApp(lambda: ComparisonsScreen(source, "kl", "helpful", ("helpful", "safe")), Config())

    async def steps(d):
        await d.until(lambda: getattr(app.screen, "current", None) == 0)
        await d.press("tab", "tab", "end")
        assert app.screen.query_one(Inspector).display
        assert min(map(rows, app.screen.views)) >= 2
        await told(d, len(LONG))
        assert min(map(rows, app.screen.views)) >= 1

    drive(app, steps, size=(80, 24))


def test_ranks_are_those_of_the_vocabulary_and_the_patients_first_token_stays(make_app, drive):
    """Flat laws: all are rare, but what was said and what the patient would have said are shown."""
    flat = math.log(0.0005)
    top = tuple(
        Alternative(number, f" w{number}", flat, {"helpful": flat}, flat, rank, patient_rank)
        for number, rank, patient_rank in ((1, 1, 57), (2, 2, 40), (3, 3000, 1))
    )
    said = GuidedToken(0, 1, " w1", flat, {"helpful": flat}, flat, {"helpful": 0.0}, True, 0.1, 1.0, {}, top)
    older = replace(said, top=tuple(replace(other, rank=0, patient_rank=0) for other in top))
    app = make_app()

    async def steps(d):
        await d.ask("Go")
        await d.press("f2")
        inspector = app.chat.query_one(Inspector)
        table = inspector.query_one(DataTable)

        def rows():
            return [[str(cell) for cell in table.get_row_at(row)] for row in range(table.row_count - 1)]

        inspector.show(said, None, 1, {})
        assert [(row[1], row[-1]) for row in rows()] == [("·w1", "57→1 ▲56"), ("·w3", "1→3000 ▼2999")]
        inspector.show(older, None, 1, {})
        assert [(row[1], row[-1]) for row in rows()] == [("·w1", "")]

    drive(app, steps)


def test_columns_are_as_wide_as_the_rows_that_are_there(make_app, drive):
    """Also between two rows drawn at once, and after wider or narrower ones: no cell is cut."""
    app = make_app(FakeAssistant(shortest=99))

    async def steps(d):
        await d.ask("Go")
        await d.press("f2", "enter", "down", "enter")
        await d.idle()
        inspector = app.chat.query_one(Inspector)
        table = inspector.query_one(DataTable)
        for top in (inspector.token.top, inspector.token.top[:1], inspector.token.top):
            inspector.show(replace(inspector.token, top=top), None, 24, {})
            for at, column in enumerate(table.ordered_columns):  # at once: a frame may be drawn any time
                cells = [table.get_row_at(row)[at] for row in range(table.row_count)]
                assert column.get_render_width(table) - 2 * table.cell_padding >= max(cell.cell_len for cell in cells)
        assert "●" in d.text()
        assert "▲" in d.text()

    drive(app, steps, size=(80, 24))
