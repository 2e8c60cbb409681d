"""Two apps at one conversation, saving that fails at the end, and configuration files with anything in them."""

import itertools
import os
from dataclasses import replace

import pytest
from textual.app import App

from llmdoctor.errors import UsageError
from llmdoctor.sessions import Session, SessionStore, Turn
from llmdoctor.tui import app as app_module
from llmdoctor.tui.app import binding_ids
from llmdoctor.tui.clipboard import osc52
from llmdoctor.tui.config import read_config

from .conftest import FakeAssistant


def prompts(store, name):
    return [turn.prompt for turn in SessionStore(store.path).load(name).turns]


def test_the_second_app_at_a_conversation_says_so_and_goes_on_in_one_of_its_own(make_app, drive, store):
    first = store.save(replace(Session.new({}), turns=(Turn("1", 1),)))
    theirs = SessionStore(store.path)
    other = theirs.load(first.id)
    app = make_app(session=first)

    async def steps(d):
        await d.ask("2")
        await d.until(lambda: len(prompts(store, first.id)) == 2)
        theirs.save(replace(theirs.load(first.id), turns=(*other.turns, Turn("2 of the other", 1))))
        await d.ask("3")
        await d.until(lambda: "Somebody else has gone on with this conversation" in d.notices)
        own = app.chat.session.id
        assert own != first.id
        assert own in d.notices
        await d.ask("4")
        await d.until(lambda: len(prompts(store, own)) == 4)
        assert prompts(store, own) == ["1", "2", "3", "4"]
        assert prompts(store, first.id) == ["1", "2 of the other"]
        assert d.notices.count("Somebody else") == 1

    drive(app, steps)
    assert len(SessionStore(store.path).list()) == 2
    assert not app.last_words


def test_a_preview_of_the_open_conversation_does_not_let_it_write_over_the_other_apps_turns(make_app, drive, store):
    first = store.save(replace(Session.new({}), turns=(Turn("1", 1),)))
    theirs = SessionStore(store.path)
    app = make_app(session=first)

    async def steps(d):
        theirs.save(replace(theirs.load(first.id), turns=(*first.turns, Turn("2b", 1), Turn("3b", 1))))
        await d.press("f9")
        preview = app.screen.query_one("#preview-view")
        await d.until(lambda: "❯ 3b" in " ".join(preview.lines))
        await d.press("e", "enter")
        await d.until(lambda: "wrote" in d.notices)
        await d.press("escape")
        await d.ask("2")
        await d.until(lambda: "Somebody else has gone on with this conversation" in d.notices)
        assert prompts(store, app.chat.session.id) == ["1", "2"]

    drive(app, steps)
    assert prompts(store, first.id) == ["1", "2b", "3b"]


def test_resuming_the_open_conversation_while_it_answers_loses_neither_the_others_turns_nor_the_answer(
    make_app, drive, store
):
    first = store.save(replace(Session.new({}), turns=(Turn("1", 1),)))
    theirs = SessionStore(store.path)
    app = make_app(FakeAssistant(shortest=24, pause=0.05), session=first)

    async def steps(d):
        theirs.save(replace(theirs.load(first.id), turns=(*first.turns, Turn("2b", 1))))
        await d.type("2")
        await d.until(lambda: app.chat.live is not None and "❯ 2" in d.words("guided"))
        await d.type(f"/resume {first.id}")
        assert "Somebody else has gone on with this conversation" in d.notices
        assert app.chat.session.id == first.id
        await d.type("3")
        await d.until(lambda: app.chat.live is not None)
        await d.press("escape")

    drive(app, steps)
    held = SessionStore(store.path).list()
    assert sorted(prompts(store, one.id) for one in held) == [["1", "2"], ["1", "2b", "3"]]


def test_a_conversation_that_is_deleted_while_it_answers_is_gone(make_app, drive, store):
    app = make_app(FakeAssistant(shortest=24, pause=0.05))

    async def steps(d):
        await d.ask("1")
        await d.type("2")
        await d.until(lambda: app.chat.live is not None)
        await d.press("f9", "d", "down", "enter")
        await d.until(lambda: "No saved conversation yet." in d.text())

    drive(app, steps)
    assert store.list() == []


def test_what_saving_has_to_tell_at_the_very_end_is_told_after_it(make_app, drive, store, monkeypatch, capsys):
    """The last answer is saved while the app closes: then there is no screen to say it on, and none is waited for."""
    first = store.save(replace(Session.new({}), turns=(Turn("1", 1),)))
    theirs = SessionStore(store.path)
    app = make_app(session=first)
    monkeypatch.setattr(app_module, "_TOLD", 1000.0)

    async def steps(d):
        theirs.save(replace(theirs.load(first.id), turns=(Turn("of the other", 1),)))
        await d.ask("2")

    drive(app, steps)
    (words,) = app.last_words
    assert "Somebody else has gone on with this conversation" in words
    assert prompts(store, first.id) == ["of the other"]
    monkeypatch.setattr(App, "run", lambda *_: 0)
    app_module.run(app)
    assert words in capsys.readouterr().err


VALUES = (
    "1",
    "true",
    "[]",
    '["x"]',
    "{}",
    "{a = 1}",
    '""',
    "1e400",
    "nan",
    "1979-05-27",
    '"\\u001b]0;x\\u0007"',
    '"💥"',
)
LINES = [
    *(f"{key} = {value}" for key, value in itertools.product(("theme", "lens", "keys", "other"), VALUES)),
    *(f'[keys]\n"chat.rerun" = {value}' for value in VALUES),
    *(f"[theme]\nx = {value}" for value in VALUES),
    "theme = " + "[" * 5000,
    "x" * 100_000,
    "[keys]\n" + "\n".join(f'"k{i}" = "f5"' for i in range(2000)),
]


def outcome(path, themes):
    try:
        read_config(path, themes=themes, bindings=binding_ids())
    except UsageError as error:
        return str(error)
    return ""


def test_a_configuration_with_anything_in_it_is_one_line_that_names_the_file(tmp_path):
    path = tmp_path / "tui.toml"
    themes = {"nord": None}
    accepted = set()
    for line in [*LINES, b"\xff\xfe", b"theme = '\xed\xa0\x80'"]:
        path.write_bytes(line if isinstance(line, bytes) else line.encode())
        said = outcome(path, themes)
        if not said:
            accepted.add(line)
            continue
        assert str(path) in said
        assert "\n" not in said
    assert accepted <= {"keys = {}", '[keys]\n"chat.rerun" = "💥"', '[keys]\n"chat.rerun" = "\\u001b]0;x\\u0007"'}
    path.unlink()
    path.mkdir()
    assert str(path) in outcome(path, themes)
    path.rmdir()
    os.mkfifo(path)  # it would be waited for
    assert str(path) in outcome(path, themes)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert str(path) in outcome(path, themes)


@pytest.mark.parametrize("key", ["💥", "\\u001b]0;x\\u0007", "ctrl+", ",", " ", "no such key"])
def test_a_key_that_no_keyboard_has_does_no_harm(make_app, drive, key, tmp_path, monkeypatch):
    from llmdoctor.tui.app import ChatApp

    path = tmp_path / "tui.toml"
    path.write_text(f'[keys]\n"chat.rerun" = "{key}"\n', encoding="utf-8")
    monkeypatch.setattr("llmdoctor.tui.app.config_file", lambda: path)
    app = ChatApp(make_app().start, None)

    async def steps(d):
        await d.ask("Go")
        await d.press("f1")
        assert "\x1b" not in d.text()

    drive(app, steps)


def test_copying_text_that_is_no_unicode(capsys):
    assert osc52("a\ud800b", {}) == "\x1b]52;c;YT9i\x07"
