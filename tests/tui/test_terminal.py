"""The real program in a real (pseudo-)terminal, with the embedded models; and where there is none."""

import asyncio
import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest

from llmdoctor.sessions import SessionStore
from llmdoctor.tui import app
from llmdoctor.tui.guard import take_any_bytes

SIZE = struct.pack("HHHH", 40, 120, 0, 0)


class Terminal:
    """A child on a pseudo-terminal of 120x40."""

    def __init__(self, *arguments, **environment):
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, SIZE)
        self.child = subprocess.Popen(
            [sys.executable, "-m", "llmdoctor", *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **environment},
        )  # fmt: skip
        os.close(theirs)
        self.output = ""

    def read(self, seconds=0.1):
        if select.select([self.ours], [], [], seconds)[0]:
            try:
                self.output += os.read(self.ours, 1 << 16).decode(errors="replace")
            except OSError:
                return False
        return True

    def until(self, pattern, seconds=120):
        """Wait until the output since the last call holds the pattern."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if re.search(pattern, self.output):
                seen, self.output = self.output, ""
                return seen
            if not self.read():
                break
        raise AssertionError(f"never saw {pattern}: {self.output[-2000:]!r}")

    def press(self, keys):
        os.write(self.ours, keys.encode())

    def end(self, seconds=30):
        """The exit code and what was still written."""
        end = time.monotonic() + seconds
        while self.child.poll() is None and time.monotonic() < end:
            self.read()
        while self.read(0.2) and select.select([self.ours], [], [], 0)[0]:
            pass
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGKILL)
            raise AssertionError(f"it does not end: {self.output[-2000:]!r}")
        os.close(self.ours)
        return self.child.returncode, self.output


@pytest.mark.slow
def test_the_program_in_a_terminal_talks_stops_quits_and_goes_on():
    """Alternate screen on and off again, an answer of the embedded models, Esc, Ctrl+C twice, --continue."""
    program = Terminal("chat", "--seed", "1")
    opening = program.until("α patient")
    assert "\x1b[?1049h" in opening
    program.press("How can I sleep better?\r")
    program.until(r"\d+ flips, KL")  # something has been said by both
    program.press("\x1b")
    program.until("interrupted")
    program.press("\x03")
    program.until("once more")
    program.press("\x03")
    code, rest = program.end()
    assert code == 130
    assert "\x1b[?1049l" in rest
    assert "Traceback" not in rest
    again = Terminal("chat", "--continue")
    again.until("How can I sleep better")
    again.press("\x11")  # Ctrl+Q, while the models may still be loading
    code, rest = again.end()
    assert code == 0, rest


@pytest.mark.slow
def test_chat_killed_in_the_middle_of_an_answer_keeps_every_turn_that_was_finished(tmp_path):
    """SIGKILL, after which nothing can be saved; the next start goes on with what was."""
    store = SessionStore(tmp_path / "sessions.sqlite3")

    def finished():
        return [turn for kept in store.list() for turn in store.load(kept.id).turns]

    program = Terminal("chat", "--seed", "1")
    program.until("α patient")
    program.press("How can I sleep better?\r")
    end = time.monotonic() + 120
    while not finished() and time.monotonic() < end:
        program.read()
    (kept,) = finished()
    program.output = ""
    program.press("How do I boil an egg?\r")
    program.until(r"\d+ flips, KL")
    program.child.send_signal(signal.SIGKILL)
    assert program.end()[0] == -signal.SIGKILL
    assert finished()[0] == kept
    assert [turn.prompt for turn in finished()] in (["How can I sleep better?"], [kept.prompt, "How do I boil an egg?"])
    again = Terminal("chat", "--continue")
    again.until("How can I sleep better")
    again.press("\x11")
    code, rest = again.end()
    assert code == 0, rest
    assert finished()[0] == kept


@pytest.mark.slow
def test_compare_browses_the_columns_of_vs_with_the_beta_of_a_kl_budget():
    """The budget is found first, in plain sight; its answers are not asked for again."""
    how = ("--seed", "1", "--max-new-tokens", "6", "--kl-budget", "0.2", "--vs", "beta=0")
    program = Terminal("compare", "How can I sleep better?", "--tui", *how)
    assert "KL 0" in program.until(r"\x1b\[\?1049h")
    program.until("beta=0: How can I sleep")
    program.press("n")
    program.until("beta=0: guided by no doctor")
    program.press("q")
    code, rest = program.end()
    assert code == 0, rest
    assert "Traceback" not in rest


@pytest.mark.slow
def test_it_leaves_when_its_terminal_is_gone_without_a_signal():
    """The child leads no foreground process group here, so it hears no SIGHUP; it used to read the end for ever."""
    program = Terminal("chat")
    program.until("α patient")
    os.close(program.ours)
    assert program.child.wait(60) == 128 + signal.SIGHUP


def test_it_leaves_even_where_it_waits_for_a_terminal_that_is_gone(monkeypatch):
    """While an answer is drawn, the loop waits for ever for Textual's writer, which ended with the terminal."""
    ended = []
    monkeypatch.setattr(app, "hung_up", lambda _fd: True)
    monkeypatch.setattr(app, "_GOODBYE", 0.0)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(sys, "__stdin__", sys.__stdout__)
    with contextlib.closing(asyncio.new_event_loop()) as loop:  # which never runs
        app.DoctorApp._leave_when_hung_up(SimpleNamespace(exit=pytest.fail), loop)
    assert ended == [128 + signal.SIGHUP]
    app.DoctorApp._leave_when_hung_up(
        SimpleNamespace(exit=pytest.fail), loop
    )  # closed: what comes then is not the app's
    assert ended == [128 + signal.SIGHUP]


def test_a_failed_load_is_the_command_lines_line_and_exit_code(tmp_path):
    program = Terminal("chat", "--patient", str(tmp_path / "nowhere"))
    seen = program.until("leave")
    assert "error:" in seen
    assert "nowhere" in seen
    program.press("q")
    code, rest = program.end()
    assert code == 3, rest


@pytest.mark.parametrize("arguments", [["chat", "--continue"], ["chat", "--resume", "x"], ["compare", "Hi", "--tui"]])
def test_the_full_screen_is_refused_where_there_is_no_terminal(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "llmdoctor", *arguments],
        input="",
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
    assert "\x1b" not in done.stderr


def test_a_dumb_terminal_is_no_full_screen():
    """``--continue``, which needs one, says so before anything is loaded."""
    program = Terminal("chat", "--continue", TERM="dumb")
    code, rest = program.end(120)
    assert code == 2
    assert "need the full screen" in rest
    assert "\x1b[?1049h" not in rest


def test_bytes_that_are_no_text_are_taken_where_textual_decodes_as_known(monkeypatch):
    from textual.drivers import linux_driver

    monkeypatch.setattr(linux_driver, "getincrementaldecoder", codecs.getincrementaldecoder)
    assert take_any_bytes()
    assert linux_driver.getincrementaldecoder("utf-8")().decode(b"a\xff") == "a\ufffd"
    assert take_any_bytes()  # once more
    for other in (None, print):
        monkeypatch.setattr(linux_driver, "getincrementaldecoder", other)
        assert not take_any_bytes()
        assert linux_driver.getincrementaldecoder is other
    monkeypatch.delattr(linux_driver, "getincrementaldecoder")
    assert not take_any_bytes()
    assert not hasattr(linux_driver, "getincrementaldecoder")
