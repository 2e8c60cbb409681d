"""Every key and flow of the conversation, on models of known distributions."""

import asyncio
import base64
import json
import math
import random
import sqlite3
import threading
from dataclasses import replace

import pytest
from textual import events
from textual.widgets import DataTable

from llmdoctor.errors import LoadError
from llmdoctor.sessions import Session, Turn
from llmdoctor.settings import Guidance, Sampling, WelcomeSettings
from llmdoctor.show.formats import OUTSIDE
from llmdoctor.tui.app import binding_ids
from llmdoctor.tui.commands import COMMANDS
from llmdoctor.tui.config import Config
from llmdoctor.tui.screens.failed import FailedScreen
from llmdoctor.tui.screens.help import HelpScreen
from llmdoctor.tui.screens.sessions import SessionsScreen
from llmdoctor.tui.widgets.curve import Curve
from llmdoctor.tui.widgets.hints import Hints
from llmdoctor.tui.widgets.inspector import Alternatives, Inspector, ranked
from llmdoctor.tui.widgets.prompt import Prompt
from llmdoctor.tui.widgets.slider import Slider

from .conftest import DOCTORS, END, PATIENT, WORDS, FakeAssistant, product


def drawn(seed, guidance, count, start=0):
    """What the fake says: words drawn from the known product, the end not before the sixth."""
    said = []
    for position in range(start, count):
        weights = [math.exp(x) for x in product(guidance)]
        if position < 6:
            weights[END] = 0.0
        said.append(random.Random(f"{seed}:{position}").choices(range(len(WORDS)), weights)[0])
        if said[-1] == END:
            break
    return said


def spoken(words):
    return "".join(WORDS[i] for i in words).strip()


BOTH = Guidance(betas={"helpful": 0.8, "safe": 0.4})


def test_two_panes_answer_turn_after_turn_each_from_its_own_answers(make_app, drive):
    fake = FakeAssistant(shortest=6)
    app = make_app(fake)

    async def steps(d):
        await d.ask("What is up?")
        alone, guided = drawn(1, Guidance(), 24), drawn(1, BOTH, 24)
        turn = app.chat.turns[0]
        assert [t.id for t in turn.patient.tokens] == alone
        assert [t.id for t in turn.guided.tokens] == guided
        assert (turn.patient.end, turn.guided.end) == ("done" if alone[-1] == END else "length", turn.guided.end)
        assert d.words("patient").splitlines()[0] == "❯ What is up?"
        flat = " ".join(d.words("guided").split())
        assert spoken(guided) in flat
        assert "patient alone" in d.text()
        assert "guided by helpful 0.8, safe 0.4" in d.text()
        assert "seed 1" in d.text()
        kl = sum(t.kl for t in turn.guided.tokens)
        assert f"{turn.guided.flips} flips, KL {kl:.1f}" in d.text()
        await d.ask("And then?")
        histories = {how["guided"]: [m["content"] for m in prompt] for prompt, how in fake.asked[2:]}
        assert histories[False] == ["What is up?", spoken(alone), "And then?"]
        assert histories[True] == ["What is up?", spoken(guided), "And then?"]
        assert app.query_one is not None
        assert app.chat.query_one(Curve).count == len(app.chat.turns[1].guided.tokens)

    drive(app, steps)
    assert fake.open_streams == 0
    assert not app.worker.alive


def test_a_slider_moved_in_mid_answer_holds_from_that_token_on_and_is_marked(make_app, drive):
    gate = threading.Semaphore(0)
    fake = FakeAssistant(shortest=99, gate=gate)
    app = make_app(fake)

    async def steps(d):
        await d.type("Go")
        gate.release(10)  # five tokens per side
        await d.until(lambda: len(app.chat.live.sides["guided"].tokens) == 5)
        await d.press("f4", "tab")  # the first doctor's
        assert app.focused.label == "β helpful"
        await d.press("end")
        await d.press("tab", "tab")
        assert app.focused.label == "T temperature"
        await d.press("home")  # greedy
        gate.release(38)
        await d.idle()
        changed = Guidance(betas={"helpful": 3.0, "safe": 0.4})
        tokens = app.chat.turns[0].guided.tokens
        old = [t for t in tokens if t.betas["helpful"] == 0.8]
        assert 5 <= len(old) <= 6  # one may have been under way
        assert all(t.betas == changed.betas for t in tokens[len(old) :])
        greedy = max(range(len(WORDS)), key=lambda i: product(changed)[i])
        assert {t.id for t in tokens[len(old) + 1 :]} == {greedy}
        assert {t.id for t in app.chat.turns[0].patient.tokens[7:]} == {0}
        assert len(tokens) == 24
        assert "⟨helpful 0.8→3" in " ".join(d.words("guided").split())
        assert "temperature 1→0⟩" in " ".join(d.words("guided").split())
        assert "⟨temperature 1→0⟩" in " ".join(d.words("patient").split())
        assert "guided by helpful 0.8→3, safe 0.4 · α 1 · T 1→0" in d.text()

    drive(app, steps)


def test_stopping_keeps_what_was_said_and_ctrl_c_quits_only_when_pressed_twice(make_app, drive):
    gate = threading.Semaphore(0)
    fake = FakeAssistant(shortest=99, gate=gate)
    app = make_app(fake)

    async def steps(d):
        for key, count in (("escape", 3), ("ctrl+c", 4)):
            await d.type("Go")
            gate.release(2 * count)
            await d.until(lambda n=count: len(app.chat.live.sides["guided"].tokens) == n)
            await d.press(key)
            assert app.chat.live is None
            gate.release(4)  # whatever was under way ends, and is not heard
            await d.until(lambda: fake.open_streams == 0)
            turn = app.chat.turns[-1]
            assert (turn.guided.end, len(turn.guided.tokens)) == ("interrupted", count)
            assert d.words("guided").endswith("⟨interrupted⟩")
            while gate.acquire(blocking=False):
                pass
        assert app.is_running
        await d.press("ctrl+c")
        assert "once more" in d.notices
        assert app.is_running
        assert app._exit is False
        await d.press("ctrl+c")
        assert app._exit

    drive(app, steps)
    assert app.return_value == 130
    assert not app.worker.alive


def test_quitting_in_mid_answer_ends_the_thread_and_saves(make_app, drive, store):
    app = make_app(FakeAssistant(shortest=10**9, pause=0.005), sampling=Sampling(max_new_tokens=10**8))

    async def steps(d):
        await d.type("Go")
        await d.until(lambda: len(app.chat.live.sides["guided"].tokens) > 5)
        await d.press("ctrl+q")

    drive(app, steps)
    assert not app.worker.alive
    (saved,) = store.list()
    assert store.load(saved.id).turns[0].guided.end == "interrupted"


def test_the_inspector_shows_the_known_probabilities_and_forces_a_branch(make_app, drive):
    fake = FakeAssistant(shortest=99)
    app = make_app(fake)

    async def steps(d):
        await d.ask("Go")
        first = app.chat.turns
        await d.press("f2")
        inspector = app.chat.query_one(Inspector)
        assert inspector.display
        await d.press("home", "right", "right", "right", "left")
        assert app.chat.view("guided").selected.position == 2
        token = first[0].guided.tokens[2]
        assert inspector.token == token
        shown = ranked(token)
        logps = product(BOTH)
        assert [a.id for a in shown] == sorted(range(len(WORDS)), key=lambda i: -logps[i])
        table = inspector.query_one(Alternatives)
        best = shown[0]
        row = [str(cell) for cell in table.get_row_at(0)]
        percents = [math.exp(logps[best.id]), PATIENT[best.id], *(DOCTORS[n][best.id] for n in ("helpful", "safe"))]
        assert row[2:6] == [f"{100 * p:.1f}%" for p in percents]
        assert row[6] == f"{best.id + 1}→1 ▲{best.id}"
        assert "3 of 24" in d.text()
        assert app.chat.query_one(Curve).cursor == 2
        await d.press("enter")
        assert app.focused is table
        await d.press("right")
        assert app.chat.view("guided").selected.position == 3  # the table's arrows move the token too
        await d.press("left")
        other = next(i for i, a in enumerate(ranked(token)) if a.id not in (token.id, END))
        await d.press(*["down"] * other, "enter")
        await d.idle()
        second = app.chat.turns
        chosen = ranked(token)[other]
        assert [t.id for t in second[0].guided.tokens[:3]] == [*(t.id for t in first[0].guided.tokens[:2]), chosen.id]
        assert second[0].guided.forced == (2,)
        assert second[0].patient is first[0].patient
        how = fake.asked[-1][1]
        assert (how["prefix_ids"], how["force_id"]) == (tuple(t.id for t in first[0].guided.tokens[:2]), chosen.id)
        assert how["guided"]
        assert len(fake.asked) == 3  # the patient was not asked again
        assert "⟨forced⟩" in d.words("guided")
        assert inspector.token == second[0].guided.tokens[2]  # the inspector goes with it
        await d.press("alt+left")
        assert app.chat.turns == first
        assert "⟨forced⟩" not in d.words("guided")
        await d.press("alt+right")
        assert app.chat.turns == second
        await d.press("escape")
        assert not inspector.display
        assert isinstance(app.focused, Prompt)

    drive(app, steps)


def test_a_click_chooses_a_token_on_either_side(make_app, drive):
    app = make_app(FakeAssistant(shortest=99))

    async def steps(d):
        await d.ask("Go")
        await d.pilot.click("#guided-view", offset=(2, 1))
        assert app.chat.view("guided").selected.position == 0
        assert app.chat.query_one(Inspector).display
        await d.press("f2")
        await d.pilot.click("#patient-view", offset=(2, 1))
        assert app.chat.view("patient").selected.position == 0
        assert app.chat.query_one(Inspector).token == app.chat.turns[0].patient.tokens[0]
        await d.press("down", "up", "end")
        assert app.chat.view("patient").selected.position == 23

    drive(app, steps)


def test_rerun_regenerate_edit_and_back(make_app, drive):
    fake = FakeAssistant(shortest=6)
    app = make_app(fake)

    async def steps(d):
        await d.press("f5", "f6", "f7", "f8", "alt+left")  # nothing there yet: notices, no crash
        await d.ask("Go")
        first = app.chat.turns[0]
        await d.press("f4", "tab", "home")  # helpful 0
        assert app.chat.guidance.betas == {"helpful": 0.0, "safe": 0.4}
        await d.press("f5")
        await d.idle()
        turn = app.chat.turns[0]
        now = Guidance(betas={"helpful": 0.0, "safe": 0.4})
        assert [t.id for t in turn.guided.tokens] == drawn(1, now, 24)
        assert turn.patient is first.patient  # nothing that it depends on has changed
        assert turn.seed == first.seed
        await d.press("f6")
        await d.idle()
        again = app.chat.turns[0]
        assert again.seed != turn.seed
        assert [t.id for t in again.guided.tokens] == drawn(again.seed, now, 24)
        assert [t.id for t in again.patient.tokens] == drawn(again.seed, Guidance(), 24)
        await d.press("f4", "f7")
        prompt = app.chat.query_one(Prompt)
        assert prompt.text == "Go"
        assert "editing" in d.text()
        await d.press("escape")
        assert prompt.text == ""
        await d.press("up", "!", "enter")
        await d.idle()
        assert [t.prompt for t in app.chat.turns] == ["Go!"]
        assert fake.asked[-1][0] == [{"role": "user", "content": "Go!"}]
        for _ in range(3):
            await d.press("alt+left")
        assert app.chat.turns[0] is first or app.chat.turns == (first,)
        await d.press("alt+left")
        assert app.chat.turns == ()

    drive(app, steps)


def test_dragging_reruns_once_when_it_rests(make_app, drive, monkeypatch):
    monkeypatch.setattr("llmdoctor.tui.debounce.REST", 2.0)  # a busy machine is slow between two keys
    fake = FakeAssistant(shortest=6)
    app = make_app(fake)

    async def steps(d):
        await d.ask("Go")
        count = len(fake.asked)
        await d.type("/auto")
        await d.press("f4")
        for _ in range(12):
            await d.press("right")
        await d.idle()
        assert len(fake.asked) == count + 1  # the guided side, once
        assert app.chat.turns[0].guidance.alpha == pytest.approx(1.6)
        await d.press("right", "f5")
        assert app.chat.live is None  # waits for the slider to rest
        await d.idle()
        assert len(fake.asked) == count + 2
        await d.type("/auto")
        await d.press("f4", "right")
        assert "F5 applies the new settings to this answer; /auto does so by itself" in d.text()
        await d.type("/auto")  # a slider that rests already is applied at once
        await d.until(lambda: "by itself" not in d.text())
        await d.idle()
        assert len(fake.asked) == count + 3
        assert app.chat.turns[0].guidance == app.chat.guidance

    drive(app, steps)


def test_sliders_obey_keys_numbers_and_mouse(make_app, drive):
    app = make_app()

    async def steps(d):
        slider = app.chat.query_one("#slider-alpha", Slider)
        slider.focus()
        for keys, value in (
            (["right"], 1.05),
            (["left", "left"], 0.95),
            (["shift+right"], 1.45),
            (["shift+left"], 0.95),
            (["home"], 0.0),
            (["end"], 2.0),
            (["right"], 2.0),
            (["1", ".", "3", "5"], 2.0),
            (["enter"], 1.35),
            (["7", "backspace", "3", "enter"], 3.0),
            (["right"], 3.0),
            (["5", "escape"], 3.0),
            (["r"], 1.0),
        ):
            await d.press(*keys)
            assert slider.value == pytest.approx(value), keys
            assert app.chat.guidance.alpha == pytest.approx(value)
        start, width = slider._track()
        await d.pilot.mouse_down("#slider-alpha", offset=(start, 0))
        await d.pilot.hover("#slider-alpha", offset=(start + width // 2, 0))
        await d.pilot.mouse_up("#slider-alpha", offset=(start + width // 2, 0))
        assert slider.value == pytest.approx(1.0, abs=0.06)
        await d.pilot.click("#slider-alpha", offset=(start + width - 1, 0))
        assert slider.value == 2.0
        await d.pilot.click("#slider-alpha", offset=(start + 2, 0), times=2)
        assert slider.value == 1.0
        await d.type("/set alpha=0.5 beta=0")
        assert app.chat.guidance == Guidance(0.5, {"helpful": 0.0, "safe": 0.0})
        slider.focus()
        await d.press("home")  # nothing would be left to speak
        assert (slider.value, app.chat.guidance.alpha) == (0.5, 0.5)
        assert "nothing is left" in d.notices

    drive(app, steps)


def test_commands_and_their_mistakes(make_app, drive):
    fake = FakeAssistant(shortest=6)
    app = make_app(fake)

    async def steps(d):
        await d.type("/set beta=0.2 safe=1 temperature=0.5 top_p=0.9 seed=7 max_new_tokens=9")
        assert app.chat.guidance.betas == {"helpful": 0.2, "safe": 1.0}
        await d.until(lambda: app.chat.assistant is not None)
        assert fake.guidance == app.chat.guidance
        await d.ask("Go")
        how = fake.asked[-1][1]
        assert (how["temperature"], how["top_p"], how["seed"], how["max_new_tokens"]) == (0.5, 0.9, 7, 9)
        assert app.chat.query_one("#slider-temperature", Slider).value == 0.5
        for line, word in (
            ("/set alpha=x", "alpha"),
            ("/set quack=1", "quack"),
            ("/set alpha=0 beta=0", "nothing is left"),
            ("/dance", "/dance"),
            ("/lens pink", "pink"),
            ("/doctor who", "who"),
            ("/theme none-such", "none-such"),
            ("/resume zzz", "zzz"),
            ("/rename", "title"),
            ("/export doc", "doc"),
            ("/export md /proc/nowhere/x.md", "/proc/nowhere"),
            ("/back 3", "3"),
        ):
            app.clear_notifications()
            await d.type(line)
            assert word in d.notices, line
        assert app.chat.guidance.betas == {"helpful": 0.2, "safe": 1.0}
        app.clear_notifications()
        await d.type("/show")
        assert "beta helpful=0.2 safe=1, temperature 0.5, top-p 0.9, seed 7, at most 9 tokens" in d.notices
        await d.press("ctrl+p")
        await d.until(lambda: "/regenerate" in d.text() or "/rerun" in d.text())
        for key in "regener":
            await d.press(key)
        await d.until(lambda: "/regenerate" in d.text())
        asked = len(fake.asked)
        await d.press("enter")
        await d.until(lambda: len(fake.asked) > asked)
        await d.idle()
        await d.press("f1")
        assert isinstance(app.screen, HelpScreen)
        assert "chat.rerun" in d.text()
        await d.press("escape")

    drive(app, steps)


def test_what_is_typed_ahead_of_a_busy_screen_is_not_run_together(make_app, drive):
    """Keys that wait in the queue together are two messages if Enter is between them."""
    fake = FakeAssistant(shortest=6)
    app = make_app(fake)

    async def steps(d):
        prompt = app.chat.query_one(Prompt)
        for line in ("/lens kl", "Go", "next"):
            for character in line:
                prompt.post_message(events.Key("space" if character == " " else character, character))
            if line != "next":
                prompt.post_message(events.Key("enter", None))
        await d.until(lambda: fake.asked and app.chat.live is None)
        assert app.chat.lens == "kl"
        assert [turn.prompt for turn in app.chat.turns] == ["Go"]
        assert prompt.text == "next"

    drive(app, steps)


def test_a_question_during_an_answer_stays_in_the_prompt(make_app, drive):
    gate = threading.Semaphore(0)
    app = make_app(FakeAssistant(shortest=6, gate=gate))

    async def steps(d):
        await d.type("Go")
        await d.until(lambda: app.chat.live is not None)
        await d.type("And then?")
        assert "Still answering" in d.notices
        assert app.chat.query_one(Prompt).text == "And then?"
        gate.release(1000)
        await d.idle()
        assert [turn.prompt for turn in app.chat.turns] == ["Go"]

    drive(app, steps)


def test_the_status_tells_how_many_drafts_are_accepted_where_a_doctor_drafts(make_app, drive):
    fake = FakeAssistant(shortest=6)
    fake.acceptance = None
    app = make_app(fake)

    async def steps(d):
        await d.ask("Go")
        assert "acceptance" not in d.text()
        fake.acceptance = 0.94
        await d.ask("On")
        assert "acceptance 94%" in d.text()

    drive(app, steps)


def test_both_sides_are_there_at_every_size_with_and_without_the_inspector(make_app, drive):
    app = make_app()

    async def steps(d):
        await d.ask("Go")
        both = [app.chat.panes.pane(which) for which in ("patient", "guided")]
        for size in ((60, 50), (60, 30), (60, 20), (90, 30), (80, 24)):
            await d.pilot.resize_terminal(*size)
            for keys in ([], ["f2"]):
                await d.press(*keys)
                for pane in both:
                    assert pane.view.size.height >= (3 if size != (60, 20) or not keys else 1), (size, keys)
                    assert pane.view.size.width >= 30, (size, keys)
                    assert pane.region.right <= size[0], (size, keys)
            await d.press("f2")
        await d.press("f2", "ctrl+t")
        assert "patient's token" in d.text()
        assert app.focused is app.chat.view("patient")
        await d.press("ctrl+t")
        assert app.focused is app.chat.view("guided")

    drive(app, steps, size=(80, 24))


def test_it_opens_on_a_welcome_whose_examples_are_asked_by_key_number_and_click(make_app, drive):
    knows = WelcomeSettings(knows="two things", examples=("Sun?", "Moon?"), topics={"light": ("sun", "moonlight")})
    app = make_app(welcome=knows)

    async def steps(d):
        assert "tiny can be asked about two things: light; any other question gets a notice" in d.text()
        assert "patient tiny · doctors helpful, safe" in d.text()
        for press in (["up", "2"], ["up", "down", "enter"], None):
            if press:
                await d.press(*press)
            else:
                await d.pilot.click("#examples", offset=(5, 1))
            await d.until(lambda: app.chat.turns and app.chat.live is None)
            assert [turn.prompt for turn in app.chat.turns] == ["Moon?"]
            assert not app.chat.query_one("#welcome").display
            assert app.focused is app.chat.prompt
            await d.type("/new")
            assert app.chat.query_one("#welcome").display
        await d.ask("1")
        assert [turn.prompt for turn in app.chat.turns] == ["Sun?"]
        assert OUTSIDE not in d.words("guided")
        await d.ask("2")  # a number is an example on the welcome only
        assert app.chat.turns[-1].prompt == "2"
        for which in ("patient", "guided"):
            assert " ".join(d.words(which).split()).count(OUTSIDE) == 1

    drive(app, steps)


def test_the_title_is_of_the_answer_and_f5_is_offered_once_the_settings_differ(make_app, drive):
    app = make_app()

    async def steps(d):
        await d.ask("Go")
        assert "guided by helpful 0.8, safe 0.4 · α 1 · T 1" in d.text()
        assert "F5 applies" not in d.text()
        await d.press("f4", "tab", "end")
        assert "guided by helpful 0.8, safe 0.4 · α 1 · T 1" in d.text()
        assert "F5 applies the new settings to this answer; /auto does so by itself" in d.text()
        await d.press("f5")
        await d.idle()
        assert "guided by helpful 3, safe 0.4 · α 1 · T 1" in d.text()
        assert "F5 applies" not in d.text()
        assert [slider.label for slider in app.chat.query(Slider)] == [
            "α patient",
            "β helpful",
            "β safe",
            "T temperature",
        ]

    drive(app, steps)


def test_the_last_line_follows_what_is_done_and_cuts_no_word(make_app, drive):
    gate = threading.Semaphore(0)
    app = make_app(FakeAssistant(shortest=99, gate=gate))
    whole = {}

    def last():
        line = d_.strips[-1].text.strip()
        whole.setdefault(line.split("  ")[0], set()).update(line.split("  "))
        return line

    async def steps(d):
        nonlocal d_
        d_ = d
        assert last().startswith("Enter ask  1-3 Enter an example")
        await d.type("Go")
        assert last().startswith("Esc stop")
        gate.release(99)
        await d.idle()
        assert last().startswith("F1 help  F2 tokens")
        await d.press("f4")
        assert last().startswith("←→ change")
        await d.press("f2")
        assert last().startswith("←→↑↓ token")
        await d.press("enter")
        assert last().startswith("↑↓ choose")
        await d.press("escape", "escape", "f7")
        assert last().startswith("Enter send it again")
        await d.press("escape", "f4", "right", "f4")
        assert "F5 apply the sliders" in last()
        await d.press("f7")
        await d.press("escape")
        long = {tuple(hint[:2]) for hint in app.chat.hints()}
        for width in (90, 80, 60, 30):
            await d.pilot.resize_terminal(width, 24)
            await d.until(lambda w=width: app.size.width == w)
            await d.pilot.pause(0.05)
            shown = last().split("  ")
            assert {tuple(hint.split(" ", 1)) for hint in shown} <= long
            assert "F1 help" in shown

    d_ = None
    drive(app, steps)


def test_resizing_in_mid_answer_loses_nothing(make_app, drive):
    gate = threading.Semaphore(0)
    app = make_app(FakeAssistant(shortest=99, gate=gate))

    async def steps(d):
        await d.type("Go")
        for size in ((80, 24), (200, 50), (30, 8), (120, 40)):
            gate.release(10)
            await d.pilot.resize_terminal(*size)
            await d.pilot.pause(0.05)
            assert app.size == size
        gate.release(1000)
        await d.idle()
        for which in ("patient", "guided"):
            reply = app.chat.turns[0].reply(which)
            assert len(reply.tokens) == 24
            assert " ".join(d.words(which).split()) == f"❯ Go {reply.text} ⟨length limit⟩"

    drive(app, steps)


def test_nonsense_is_shown_as_it_is(make_app, drive):
    """Markup, control characters, wide and endless words: text like any other."""
    app = make_app(FakeAssistant(shortest=3))
    questions = [
        "[red]x[/] [/nothing]",
        "a\x1b[31m\x07b",
        "日本" * 400,
        "w" * 5000,
        "\u202eabc \U0001f469\u200d\U0001f680",
        "{}$%\\",
    ]

    async def steps(d):
        for question in questions:
            await d.ask(question)
        await d.press("f2", "left", "f2")
        assert [turn.prompt for turn in app.chat.turns] == questions
        assert not any(ord(c) < 0x20 or c == "\x7f" for piece in d.strips for c in piece.text)

    drive(app, steps)


def test_lenses_colour_mark_and_explain(make_app, drive):
    app = make_app(FakeAssistant(shortest=999), sampling=Sampling(max_new_tokens=140))

    def styles():
        view = app.chat.view("guided")
        base = view.rich_style
        found = {}
        for index, piece in enumerate(view.pieces):
            if piece.payload is not None:
                found.setdefault(piece.payload.token.id, view._style(index, base, dark=True))
        return found

    async def steps(d):
        await d.ask("Go")
        assert "changed by guidance (KL, nats)  0 ━━━━━━ 0.3  bold" in d.text()
        assert len({s.color.name for s in styles().values()}) == 1  # the fake doctors change every place alike
        await d.press("ctrl+l")
        assert app.chat.query_one(Curve).high == pytest.approx(math.log(0.4) + 2)
        await d.type("/set helpful=0 safe=0")
        await d.press("f5")
        await d.idle()
        assert len({(s.color.name, s.bold) for s in styles().values()}) == 1
        assert not app.chat.view("guided")._style(1, app.chat.view("guided").rich_style, dark=True).bold  # all grey
        assert "0 flips, KL 0.0" in d.text()
        await d.type("/set helpful=0.8 safe=0.4")
        await d.press("f5")
        await d.idle()
        for words in ("log safe / patient", "log V of safe", "flips", "no colours", "changed by guidance"):
            await d.press("f3")
            assert words in d.text()
            if words == "log safe / patient":
                assert "-2 ━━" in d.text()
                ratio = styles()
                assert ratio[0].underline  # .05 / .30
                assert ratio[1].color.triplet.blue > ratio[1].color.triplet.red  # .40 / .20
            if words == "log V of safe":
                value = styles()
                assert set(value) == set(range(END))
                assert value[1].bold  # log .40 + 2, the highest
                assert value[0].underline  # log .05 + 2, the lowest
                assert len({s.color.name for s in value.values()}) > 4
            if words == "flips":
                flips = styles()
                assert all(style.bold for style in flips.values())  # they prefer another token everywhere
            if words == "no colours":
                assert len({(s.color, s.bold) for s in styles().values()}) == 1

    drive(app, steps)


def test_a_question_while_loading_waits_for_the_models_and_errors_are_one_line(make_app, drive):
    ready = threading.Event()
    fake = FakeAssistant(shortest=6)

    def load(progress):
        progress("loading tiny ...")
        assert ready.wait(20)
        return fake

    app = make_app(load=load)

    async def steps(d):
        await d.until(lambda: "loading tiny" in d.text())
        await d.press("f4", "end")
        await d.press("f4")
        await d.type("Go")
        assert app.chat.live is not None
        await asyncio.sleep(0.1)
        assert app.chat.turns[0].guided.tokens == ()
        ready.set()
        await d.idle()
        assert fake.guidance.alpha == 2.0  # moved while loading
        assert {t.alpha for t in app.chat.turns[0].guided.tokens} == {2.0}
        for question, words in (("fail", "the prompt is too long"), ("crash", "ValueError: matrix of the wrong shape")):
            await d.ask(question)
            assert words in d.notices
            assert words in " ".join(d.words("guided").split())
            assert app.chat.turns[-1].guided.end in ("error", "done")
        await d.ask("Go on")
        assert app.chat.turns[-1].guided.end in ("done", "length")

    drive(app, steps)


def test_a_failed_load_is_a_readable_screen_with_the_command_lines_text(make_app, drive):
    def load(_progress):
        raise LoadError("cannot load the patient ./nowhere: no such folder")

    app = make_app(load=load)

    async def steps(d):
        await d.until(lambda: isinstance(app.screen, FailedScreen))
        assert "error: cannot load the patient ./nowhere: no such folder" in d.text()
        await d.press("q")

    drive(app, steps)
    assert app.return_value == 3


def test_copying_goes_to_the_terminal_and_to_the_desktop(make_app, drive, monkeypatch):
    app = make_app()
    desktop = []
    monkeypatch.setattr("llmdoctor.tui.clipboard.to_desktop", desktop.append)

    async def steps(d):
        await d.ask("Go")
        written = []
        monkeypatch.setattr(app._driver, "write", written.append)
        await d.press("f8")
        await d.until(lambda: desktop)
        text = app.chat.turns[0].guided.text
        assert desktop == [text]
        assert f"\x1b]52;c;{base64.b64encode(text.encode()).decode()}\x07" in "".join(written)

    drive(app, steps)


def test_sessions_save_themselves_and_can_be_browsed(make_app, drive, store, tmp_path):
    app = make_app()

    async def steps(d):
        await d.ask("First question")
        first = app.chat.session.id
        await d.ask("More of it")
        held = app.chat.turns
        await d.type("/new")
        assert app.chat.turns == ()
        assert d.words("guided") == ""
        await d.ask("Second question")
        await d.press("f9")
        await d.until(lambda: isinstance(app.screen, SessionsScreen))
        assert [one.title for one in app.screen._rows] == ["Second question", "First question"]
        await d.press("down", "r")
        await d.press(*["backspace"] * 20, "N", "e", "w", "enter")
        await d.until(lambda: "New" in d.text())
        row = next(i for i, one in enumerate(app.screen._rows) if one.title == "New")
        app.screen.query_one(DataTable).move_cursor(row=row)
        await d.press("e", "enter")  # Markdown
        await d.until(lambda: list(tmp_path.glob("*.md")))
        await d.press("enter")
        await d.until(lambda: app.screen is app.chat)
        assert (app.chat.session.id, app.chat.session.title) == (first, "New")
        assert app.chat.turns == held  # token for token, with every number
        assert "❯ More of it" in d.words("guided")
        await d.press("f9")
        await d.until(lambda: isinstance(app.screen, SessionsScreen))
        row = next(i for i, one in enumerate(app.screen._rows) if one.title == "Second question")
        app.screen.query_one(DataTable).move_cursor(row=row)
        await d.press("d", "enter")  # keep
        assert len(app.screen._rows) == 2
        await d.press("d", "down", "enter")
        await d.until(lambda: len(app.screen._rows) == 1)
        await d.press("escape")
        for kind in ("md", "json", "html", "svg"):
            await d.type(f"/export {kind} out.{kind}")
            await d.until(lambda k=kind: (tmp_path / f"out.{k}").exists())
        kept.append(app.chat.turns[0])

    kept = []
    drive(app, steps)
    texts = {kind: (tmp_path / f"out.{kind}").read_text() for kind in ("md", "json", "html", "svg")}
    (turn,) = kept
    assert turn.guided.text in texts["md"]
    assert turn.patient.text in texts["md"]
    assert json.loads(texts["json"])["turns"][1]["prompt"] == "More of it"
    assert len(json.loads(texts["json"])["turns"][0]["guided"]["tokens"][0]["top"]) == 8
    assert texts["html"].count("<section>") == 4
    assert 'style="color:#' in texts["html"]
    assert "<svg" in texts["svg"]
    assert "url(http" not in texts["svg"]


def test_a_resumed_session_goes_on_with_its_settings(make_app, drive, store):
    app = make_app()

    async def hold(d):
        await d.type("/set alpha=0.7 helpful=1.1 temperature=0.6")
        await d.ask("Go")

    drive(app, hold)
    (saved,) = store.list()
    session = store.load(saved.id)
    fake = FakeAssistant(shortest=6)
    later = make_app(fake, session=session)

    async def go_on(d):
        assert "❯ Go" in d.words("guided")
        await d.type(f"/resume {saved.id[:4]}")
        assert later.chat.guidance == Guidance(0.7, {"helpful": 1.1, "safe": 0.4})
        assert later.chat.sampling.temperature == 0.6
        await d.ask("And?")
        assert len(fake.asked[0][0]) == 3
        assert later.chat.turns[1].guided.tokens[0].alpha == 0.7

    drive(later, go_on)
    assert len(store.load(saved.id).turns) == 2


@pytest.mark.parametrize("mode", ["ratio", "product"])
def test_a_resumed_session_keeps_its_dead_zones_in_the_mode_it_was_held_in(mode, make_app, drive, store):
    betas = {"helpful": 0.8, "safe": 0.4}
    then = Guidance(1.0, {"helpful": 0.8, "gone": 1.0}, "ratio", 0.3, {"helpful": 2.0, "gone": 1.0})
    saved = store.save(replace(Session.new({}), turns=(Turn("Go", 1, guidance=then),)))
    now = Guidance(1.0, betas, mode, 0.1, {"helpful": 0.5, "safe": 1.0})
    app = make_app(guidance=now)

    async def steps(d):
        await d.type(f"/resume {saved.id}")
        if mode == "ratio":
            assert app.chat.guidance == then.replace(betas=betas, dead_zones={"helpful": 2.0, "safe": 1.0})
            assert "plausibility 0.3, dead zone helpful=2" in app.chat.describe()
        else:
            assert app.chat.guidance == now
            await d.until(lambda: "held in mode ratio; it goes on in mode product" in d.notices)

    drive(app, steps)


def test_a_store_that_cannot_be_written_is_told_and_the_conversation_goes_on(make_app, drive, store, tmp_path):
    app = make_app()

    async def steps(d):
        await d.ask("Go")
        await d.until(lambda: store.path.exists() and app.saved_sessions())  # else it is still being written
        sqlite3.connect(store.path).close()
        store.path.write_text("this is no database, whatever its name says")
        await d.ask("On")
        await d.until(lambda: "cannot be read or written" in d.notices)
        await d.ask("And on")

    drive(app, steps)


def test_it_follows_the_end_until_one_scrolls_up(make_app, drive):
    gate = threading.Semaphore(0)
    app = make_app(FakeAssistant(shortest=10**6, gate=gate), sampling=Sampling(max_new_tokens=4000))

    async def steps(d):
        view = app.chat.view("guided")
        await d.type("Go")
        gate.release(1000)
        await d.until(lambda: len(app.chat.live.sides["guided"].tokens) >= 499)
        await d.until(lambda: view.max_scroll_y > 0 and view.is_vertical_scroll_end)
        view.focus()
        await d.press("pageup")
        await d.until(lambda: not view.following)
        place = view.scroll_offset.y
        gate.release(200)
        await d.until(lambda: len(app.chat.live.sides["guided"].tokens) >= 599)
        await d.pilot.pause(0.1)
        assert view.scroll_offset.y == place
        view.scroll_end(animate=False)
        gate.release(200)
        await d.until(lambda: len(app.chat.live.sides["guided"].tokens) >= 699)
        await d.until(lambda: view.is_vertical_scroll_end)
        assert "".join(view.lines).count(" ") >= 699
        await d.press("escape")
        gate.release(4)

    drive(app, steps)


def test_a_storm_of_resizes_down_to_one_cell_breaks_no_screen(make_app, drive):
    """Every screen, any size, in any order: an exception anywhere in the app would end the run with it."""
    app = make_app(FakeAssistant(shortest=99))
    rng = random.Random(7)
    sizes = [(1, 1), (1, 50), (200, 1), (3, 3), (rng.randint(1, 200), rng.randint(1, 50))]

    async def steps(d):
        async def storm():
            for size in sizes:
                await d.pilot.resize_terminal(*size)
                await d.pilot.pause()
                assert app.size == size
                assert len(d.strips) <= size[1]
            await d.pilot.resize_terminal(120, 40)

        await storm()  # the welcome
        await d.ask("Go 日本")
        await storm()
        await d.press("f2", "enter")
        await storm()
        app.notify("a long message " * 20, severity="error")
        await d.press("f1")
        await storm()
        await d.press("escape", "f9")
        await storm()
        await d.press("slash", "g")
        await d.press("escape", "escape")
        await d.type("/compare beta=0 beta=1")
        await d.until(lambda: app.screen is not app.chat and not app.screen.live)
        await d.press("ctrl+t")
        await storm()

    drive(app, steps)


def test_help_holds_every_command_and_key_and_is_wrapped_once(make_app, drive):
    app = make_app()

    async def steps(d):
        for width in (120, 80, 25):
            await d.pilot.resize_terminal(width, 500)
            await d.press("f1")
            await d.pilot.pause(0.1)
            lines = [line.strip(" │╭╰╮╯") for line in d.text().splitlines()]
            words = " ".join(" ".join(lines).split())
            for command in COMMANDS:
                assert f"/{command.name}" in words, (width, command.name)
                assert command.help.split()[-1] in words
            if width > 25:  # there an id longer than the line is cut in two
                assert all(name in words for name in binding_ids()), width
                assert "…" not in words
            # Wrapped once: a line that is followed by another of its paragraph could not have held its next word.
            box = app.screen.query_one("#help-text").size.width
            prose = [line for line in lines if line.startswith("A slider")]
            assert prose
            assert len(prose[0]) <= box
            assert width < 80 or prose[0].endswith("0.35 Enter.")
            await d.press("escape")

    drive(app, steps)


@pytest.mark.parametrize("size", [(80, 24), (80, 14), (80, 10), (80, 8), (60, 14), (40, 12), (40, 10)])
def test_a_low_window_shows_the_prompt_and_two_lines_of_each_text(size, make_app, drive):
    app = make_app(FakeAssistant(shortest=99), sampling=Sampling(max_new_tokens=140))

    async def steps(d):
        await d.ask("Go")
        await d.pilot.resize_terminal(*size)
        await d.pilot.pause(0.05)
        assert "▌ Ask" in d.text()
        rooms = [app.chat.view(which) for which in ("patient", "guided")]
        for view in rooms:
            shown = [view.render_line(y).text.strip() for y in range(view.size.height)]
            assert len(shown) >= 2
            assert all(shown[-2:]), shown  # no empty lines at the end, while there is text above them
        assert ("changed by guidance" in d.text()) == (size[1] > 16)
        assert ("α patient" in d.text()) == (size[1] > 16)

    drive(app, steps)


def test_the_prompt_is_the_last_to_go(make_app, drive):
    app = make_app()

    async def steps(d):
        await d.ask("Go")
        for height in range(9, 0, -1):
            await d.pilot.resize_terminal(30, height)
            await d.pilot.pause(0.05)
            assert "▌ Ask" in d.text(), height

    drive(app, steps)


@pytest.mark.parametrize("size", [(80, 24), (120, 36), (200, 50)])
def test_every_screen_and_dialog_has_the_same_last_line_with_keys_of_its_own(size, make_app, drive):
    app = make_app(config=Config(keys={"sessions.export": "x"}))

    async def steps(d):
        async def last(begins):
            await d.pilot.pause(0.05)
            line = d.strips[-1].text.strip()
            assert line.startswith(begins), line
            assert not any(word in line for word in ("palette", "…"))  # Textual's own; nothing is cut

        await d.ask("Go")
        await d.press("f1")
        await last("↑↓ PgUp PgDn scroll")
        await d.press("escape", "f9")
        await last("Enter open  / search  Tab read  r rename  d delete  x export  Esc close")
        await d.press("tab")
        await last("↑↓ scroll  Tab back to the list  Esc close")
        await d.press("tab", "slash")
        await last("type to search  Enter to the list  Esc all of them")
        await d.press("z")
        await d.press("enter")
        await last("/ search  Esc close")  # nothing is found
        await d.press("slash", "escape", "r")
        await last("Enter take it  Esc leave it as it is")
        await d.press("escape", "d")
        await last("↑↓ choose  Enter take it  Esc leave")
        await d.press("escape", "escape")
        await d.press("ctrl+p")
        await last("type to search  ↑↓ choose")
        await d.press("escape")
        await d.type("/theme")
        await last("type to search  ↑↓ choose")
        await d.press("escape")
        await d.type("/compare beta=0")
        await d.until(lambda: app.screen is not app.chat and not app.screen.live)
        await last("Esc leave the comparison  Enter ask all  ^T tokens  F1 help")
        await d.press("ctrl+t")
        await last("←→↑↓ token")
        assert app.screen.query_one(Hints).size.width <= size[0]

    drive(app, steps, size)


def test_the_same_commands_are_in_the_palette_of_every_screen(make_app, drive):
    app = make_app()

    async def steps(d):
        await d.ask("Go")

        def first_hit():
            below = d.text().partition("🔎")[2].splitlines()[1:]
            return next((line.strip() for line in below if line.strip().startswith("/")), "")

        async def choose(command, shown):
            await d.press("ctrl+p")
            await d.until(lambda: first_hit() == "/help")
            assert "Screenshot" not in d.text()
            await d.press(*command)
            await d.until(lambda: first_hit() == shown)
            await d.press("enter")

        for opening in (["f1"], ["f9"], []):
            before = app.chat.lens
            await d.press(*opening)
            await choose("/lens", "/lens [KIND]")
            await d.until(lambda before=before: app.screen is app.chat and app.chat.lens != before)
        await d.type("/compare beta=0 beta=1")
        await d.until(lambda: app.screen is not app.chat)
        await choose("/rename", "/rename TITLE")
        await d.until(lambda: app.screen is app.chat and app.chat.prompt.text == "/rename ")
        assert app.chat.prompt.has_focus

    drive(app, steps)


def test_one_message_at_a_time_until_the_next_command(make_app, drive):
    app = make_app()

    async def steps(d):
        await d.type("/dance")
        await d.type("/lens pink")
        assert "/dance" not in d.notices
        assert "/lens: expected one of kl, ratio" in d.notices
        app.notify("Copied.")
        assert d.notices == "Copied."
        await d.type("/lens off")
        assert d.notices == ""

    drive(app, steps)


def test_mistakes_name_the_command_and_what_it_takes(make_app, drive, tmp_path):
    app = make_app()

    async def steps(d):
        for line, said in (
            ("/compare foo", "/compare: expected name=value or one of helpful, safe, got 'foo'"),
            ("/export doc", "/export: expected one of md, json, html, svg, got 'doc'"),
            ("/show 3", "/show: expected nothing behind it, got '3'"),
        ):
            await d.type(line)
            assert d.notices == said
        await d.ask("Go")
        await d.type("/export")
        assert d.notices.startswith("wrote ")
        assert [path.suffix for path in tmp_path.glob("llmdoctor-*")] == [".md"]

    drive(app, steps)


def test_one_doctor_is_spoken_of_in_the_singular(make_app, drive):
    profile = {"patient": {"model": "tiny"}, "doctors": {"doctor": {"checkpoint": "/runs/calm"}}}
    app = make_app(profile=profile)

    async def steps(d):
        assert "patient tiny · doctor runs/calm" in d.text()
        assert "by a small doctor: runs/calm" in " ".join(d.text().replace("│", " ").split())

    drive(app, steps)
