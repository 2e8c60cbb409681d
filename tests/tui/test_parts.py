"""The parts without a screen: sessions, clipboard, configuration, exports, colours, the worker thread, the guard."""

import base64
import io
import math
import os
import pty
import random
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from textual.theme import BUILTIN_THEMES

from llmdoctor.errors import StorageError, UsageError
from llmdoctor.records import Alternative, GuidedToken
from llmdoctor.sessions import Reply, Session, SessionStore, Turn, messages
from llmdoctor.settings import Guidance, Sampling
from llmdoctor.tui import clipboard, pacing, token_style
from llmdoctor.tui.config import Config, read_config
from llmdoctor.tui.export import file_name, render
from llmdoctor.tui.generation import Ended, Part, Spoken, Worker
from llmdoctor.tui.guard import full_screen, hung_up
from llmdoctor.tui.history import History

from .conftest import FakeAssistant


def token(position=0, text=" word", **changes):
    facts = {
        "position": position,
        "id": 5,
        "text": text,
        "patient_logprob": -2.0,
        "doctor_logprobs": {"helpful": -1.0},
        "logprob": -1.5,
        "values": {"helpful": 0.5},
        "flip": True,
        "kl": 0.25,
        "alpha": 1.0,
        "betas": {"helpful": 0.8},
        "top": (Alternative(5, text, -2.0, {"helpful": -1.0}, -1.5),),
    }
    return GuidedToken(**{**facts, **changes})


def turn(prompt="How?", words=3):
    reply = Reply(tuple(token(i) for i in range(words)), "done", 0.5, (1,), ((0, 1.0), (2, 0.5)))
    return Turn(prompt, 7, Sampling(stop=("x",)), Guidance(betas={"helpful": 0.8}), reply, reply)


# Sessions


def test_what_is_saved_is_what_is_loaded(tmp_path):
    store = SessionStore(tmp_path / "deep" / "sessions.sqlite3")
    assert store.list() == []
    session = store.save(Session.new({"patient": {"model": "m"}}))
    session = store.save(
        Session(session.id, "", session.created, 0, session.profile, (turn("Hé? 日本"), turn("Then?")))
    )
    again = SessionStore(store.path).load(session.id)
    assert again == session
    assert again.title == "Hé? 日本"
    assert (store.path.stat().st_mode & 0o777) == 0o600
    shorter = Session(session.id, "Named", session.created, 0, session.profile, (again.turns[0],))
    store.save(shorter)
    assert store.load(session.id[:5]).turns == (again.turns[0],)
    other = SessionStore(store.path)  # of another program: it has not seen what is there
    other.save(Session(session.id, "Named", session.created, 0, {}, (turn("A"), turn("B"), turn("C"))))
    store.save(shorter)
    assert [t.prompt for t in other.load(session.id).turns] == ["Hé? 日本"]


def test_only_changed_turns_are_written_anew(tmp_path, monkeypatch):
    store = SessionStore(tmp_path / "s.sqlite3")
    written = []
    real = __import__("llmdoctor.sessions", fromlist=["_row"])._row
    monkeypatch.setattr("llmdoctor.sessions._row", lambda t: written.append(t.prompt) or real(t))
    first, second = turn("1"), turn("2")
    store.save(Session("abc", turns=(first,)))
    store.save(Session("abc", turns=(first, second)))
    store.save(Session("abc", turns=(first, turn("3"))))
    assert written == ["1", "2", "3"]


def test_sessions_are_listed_renamed_deleted_and_mistakes_are_told(tmp_path):
    store = SessionStore(tmp_path / "s.sqlite3")
    for name in ("aa11", "aa22"):
        store.save(Session(name, turns=(turn(name),)))
    assert [one.id for one in store.list()] == ["aa22", "aa11"]
    assert store.list()[0].turns == 1
    store.rename("aa11", "Better")
    assert store.load("aa1").title == "Better"
    for name, words in (("aa", "2 sessions"), ("zz", "no session"), ("", "2 sessions"), ("%", "no session")):
        with pytest.raises(UsageError, match=words):
            store.load(name)
    store.delete("aa22")
    assert [one.id for one in store.list()] == ["aa11"]
    store.path.write_bytes(b"no database at all, but long enough to be taken for one" * 40)
    with pytest.raises(StorageError, match="cannot be read or written"):
        store.list()
    with pytest.raises(StorageError, match="cannot be read or written"):
        SessionStore(tmp_path / "s.sqlite3" / "in-a-file").list()


def test_every_side_goes_on_from_its_own_answers():
    said = Turn("Q", 1, patient=Reply((token(text=" mine"),)), guided=Reply((token(text=" ours"),)))
    assert [m["content"] for m in messages((said,), "patient", "R")] == ["Q", "mine", "R"]
    assert [m["content"] for m in messages((said,), "guided", "R")] == ["Q", "ours", "R"]


def test_exports_hold_the_conversation_and_no_markup_of_a_model():
    session = Session("abc", "A <b>title", turns=(turn("<script>?", 2), turn("More", 0)))
    page = render(session, "html", "value", "helpful")
    assert "<script>?" not in page
    assert "&lt;script&gt;" in page
    text = render(session, "md", "value", None)
    assert "> <script>?" in text
    assert "guidance changed the likeliest token at 2 of 2 places, KL 0.5 nats" in text
    assert file_name(session, "md") == "llmdoctor-a-b-title-abc.md"
    with pytest.raises(UsageError, match="docx"):
        render(session, "docx", "value", None)


# History, pace


def test_steps_back_and_forward_are_those_over_a_list_of_all_states():
    """The naive twin keeps every state and a place among them; a change drops the states after that place."""
    rng = random.Random(5)
    history, states, place = History(()), [()], 0
    for number in range(300):
        match rng.choice(["change", "complete", "back", "forward"]):
            case "change":
                history.change((*history.turns, Turn(str(number), 0)))
                states = [*states[: place + 1], (*states[place], Turn(str(number), 0))]
                place += 1
            case "complete" if history.turns:
                history.complete(Turn(f"answered {number}", 0))
                states[place] = (*states[place][:-1], Turn(f"answered {number}", 0))
            case "back":
                assert history.step(-1) == (place > 0)
                place = max(0, place - 1)
            case "forward":
                assert history.step(1) == (place < len(states) - 1)
                place = min(len(states) - 1, place + 1)
        assert history.turns == states[place]
    history.open(())
    assert (history.step(-1), history.step(1), history.turns) == (False, False, ())


@pytest.mark.parametrize(("cost", "frames"), [(0.0, 29), (0.001, 28), (0.01, 12), (0.5, 1.8)])
def test_drawing_takes_at_most_a_seventh_of_the_time_and_never_stops(cost, frames, monkeypatch):
    """On a clock of the test's, every frame costs ``cost`` seconds; at least ``frames`` are drawn per second."""
    now = busy = 100.0
    monkeypatch.setattr(pacing.time, "monotonic", lambda: now)
    monkeypatch.setattr(pacing.time, "thread_time", lambda: busy)
    pace, drawn = pacing.Pacing(), 0
    pace.due()
    start = now
    while now < start + 10:
        if pace.due():
            drawn += 1
            now, busy = now + cost, busy + cost
        now += pacing.FRAME
    assert drawn / 10 >= frames
    if 7 * cost <= 0.2:  # frames are not left out for longer than that
        assert drawn * cost <= 10 / 7


# Clipboard, configuration, terminal


def test_osc_52_passes_through_tmux_and_screen():
    plain = f"\x1b]52;c;{base64.b64encode('é'.encode()).decode()}\x07"
    assert clipboard.osc52("é", {}) == plain
    wrapped = clipboard.osc52("é", {"TMUX": "/tmp/tmux"})
    assert wrapped == f"{plain}\x1bPtmux;\x1b{plain}\x1b\\"
    assert clipboard.osc52("é", {"TERM": "screen-256color"}) == f"\x1bP{plain}\x1b\\"


def test_the_desktops_clipboard_gets_the_text(tmp_path, monkeypatch):
    monkeypatch.undo()
    fake = tmp_path / "pbcopy"
    fake.write_text(f"#!/bin/sh\ncat > {tmp_path}/got\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert clipboard.to_desktop("some text")
    assert (tmp_path / "got").read_text() == "some text"
    fake.write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setattr(clipboard, "_COMMANDS", clipboard._COMMANDS[:1])
    assert not clipboard.to_desktop("some text")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("theme = 'pink'", "no theme 'pink'"),
        ("lens = 'pink'", "lens must be one of kl"),
        ("colour = 1", "unknown key 'colour'"),
        ("[keys]\n'chat.dance' = 'f5'", "no key binding 'chat.dance'"),
        ("[keys]\n'chat.rerun' = 5", "must hold lines"),
        ("theme = ", "tui.toml"),
    ],
)
def test_a_mistake_in_the_configuration_names_file_and_key(text, words, tmp_path):
    path = tmp_path / "tui.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as raised:
        read_config(path, themes={"nord": 1}, bindings={"chat.rerun": 1})
    assert str(path) in str(raised.value)


def test_the_configuration_is_read(tmp_path):
    path = tmp_path / "tui.toml"
    assert read_config(path, themes={}, bindings={}) == Config()
    path.write_text("theme = 'nord'\nlens = 'kl'\n[keys]\n'chat.rerun' = 'ctrl+r'\n")
    read = read_config(path, themes={"nord": 1}, bindings={"chat.rerun": 1})
    assert read == Config("nord", "kl", {"chat.rerun": "ctrl+r"})


def test_a_full_screen_needs_two_terminals_that_are_not_dumb(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    assert full_screen(Terminal(), Terminal())
    assert not full_screen(io.StringIO(), Terminal())
    assert not full_screen(Terminal(), io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not full_screen(Terminal(), Terminal())
    monkeypatch.delenv("TERM")
    assert not full_screen(Terminal(), Terminal())


def test_a_terminal_is_gone_once_its_other_end_is_closed():
    ours, theirs = pty.openpty()
    assert not hung_up(theirs)
    os.close(ours)
    assert hung_up(theirs)
    os.close(theirs)
    assert hung_up(theirs)


def test_native_writes_do_not_reach_the_terminal_while_the_screen_is_up():
    """A child on a pseudo-terminal: what is written to file descriptors 1 and 2 is kept away, and comes back after."""
    code = """
        import os, sys
        from llmdoctor.tui.guard import quiet_terminal, written
        with quiet_terminal() as log:
            os.write(1, b"native-one "); os.write(2, b"native-two "); print("python-print"); sys.stdout.flush()
            sys.__stderr__.write("drawn-by-the-screen "); sys.__stderr__.flush()
            assert os.get_terminal_size(sys.__stdout__.fileno())
            noise = written(log)
        assert "native-one" in noise and "native-two" in noise
        os.write(1, b"after ")
    """
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        timeout=60,
        check=False,
    )
    seen = os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0, seen
    assert "drawn-by-the-screen" in seen
    assert "after" in seen
    assert "native" not in seen


# Colours


def _luminance(colour):
    channels = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("name", sorted(name for name, theme in BUILTIN_THEMES.items() if not theme.ansi))
def test_every_colour_of_the_scale_reads_on_every_theme(name):
    """WCAG's contrast for text, 4.5, on plain dark and light backgrounds; 3 (large text) on coloured ones."""
    theme = BUILTIN_THEMES[name]
    background = theme.to_color_system().generate()["background"]
    behind = _luminance([int(background[i : i + 2], 16) for i in (1, 3, 5)])
    for step in range(-10, 11):
        ink = _luminance(token_style.style(step, 10, dark=theme.dark).color.triplet)
        contrast = (max(ink, behind) + 0.05) / (min(ink, behind) + 0.05)
        assert contrast >= (4.5 if name.startswith("textual") else 3.0), (step, contrast)


def test_the_scale_is_diverging_and_marked():
    styles = [token_style.style(step, 10, dark=True) for step in range(-10, 11)]
    assert styles[10].color.triplet == (0xBE, 0xBE, 0xBE)
    assert styles[0].color.triplet.red > styles[0].color.triplet.blue
    assert styles[-1].color.triplet.blue > styles[-1].color.triplet.red
    assert styles[0].underline
    assert not styles[0].bold
    assert styles[-1].bold
    assert not styles[-1].underline
    assert not styles[10].bold
    assert not styles[10].underline
    assert token_style.style(math.nan, 1, dark=True) == token_style.style(0, 1, dark=True)
    for style, step in zip(styles, range(-10, 11), strict=True):
        assert token_style.is_high(step, 10) == bool(style.bold)
    assert token_style.style(5, 0, dark=True) == token_style.style(0, 1, dark=True)


# The worker


def _parts(**how):
    message = [{"role": "user", "content": "Go"}]
    return [Part("patient", message, **how), Part("guided", message, **how)]


def _finished(worker, job, seconds=20):
    events = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        events += worker.drain()
        if any(isinstance(event, Ended) and event.job == job for event in events):
            return events
        time.sleep(0.005)
    raise AssertionError(events)


def test_both_sides_take_turns_and_the_queue_holds_every_token():
    worker = Worker(lambda _progress: FakeAssistant(shortest=10**6), Sampling())
    worker.start()
    job = worker.speak(_parts(), 3, Sampling(max_new_tokens=500))
    events = _finished(worker, job)
    spoken = [event for event in events if isinstance(event, Spoken)]
    assert [event.which for event in spoken] == ["patient", "guided"] * 500
    assert [event.token.position for event in spoken if event.which == "guided"] == list(range(500))
    worker.close()
    assert not worker.alive


def test_a_cancelled_job_says_so_once_and_the_next_one_runs():
    gate = threading.Semaphore(0)
    fake = FakeAssistant(shortest=10**6, gate=gate)
    worker = Worker(lambda _progress: fake, Sampling())
    worker.start()
    first = worker.speak(_parts(), 3, Sampling())
    second = worker.speak(_parts(), 3, Sampling())
    gate.release(3)
    worker.cancel()
    third = worker.speak(_parts(), 3, Sampling(max_new_tokens=2))
    gate.release(20)
    events = _finished(worker, third)
    ends = {event.job: event.reason for event in events if isinstance(event, Ended)}
    assert ends == {first: "interrupted", second: "interrupted", third: "done"}
    assert fake.open_streams == 0
    worker.close()
    assert not worker.alive


def test_another_temperature_goes_on_behind_what_was_said():
    gate = threading.Semaphore(0)
    fake = FakeAssistant(shortest=10**6, gate=gate)
    worker = Worker(lambda _progress: fake, Sampling())
    worker.start()
    job = worker.speak(_parts()[1:], 3, Sampling(max_new_tokens=8))
    gate.release(3)
    while len(worker.events) < 4:  # loaded, and three tokens
        time.sleep(0.005)
    worker.sampling = Sampling(max_new_tokens=8, temperature=0.0)
    gate.release(9)
    spoken = [event for event in _finished(worker, job) if isinstance(event, Spoken)]
    assert [event.token.position for event in spoken] == list(range(8))
    first_cold = next(i for i, event in enumerate(spoken) if event.temperature == 0.0)
    assert first_cold in (3, 4)
    said = tuple(event.token.id for event in spoken)
    assert fake.asked[1][1]["prefix_ids"] == said[:first_cold]
    worker.close()
