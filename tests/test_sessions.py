"""Saved conversations: two programs at one, a clock that jumps, and files with anything in them."""

import gc
import itertools
import json
import random
import sqlite3
import subprocess
import sys
import weakref
import zlib
from dataclasses import replace

import pytest

from llmdoctor import sessions
from llmdoctor.errors import StorageError, UsageError
from llmdoctor.records import GuidedToken
from llmdoctor.sessions import Compared, Reply, SavedComparison, Session, SessionStore, Turn
from llmdoctor.settings import Guidance, Sampling


def turn(prompt: str) -> Turn:
    token = GuidedToken(0, 5, f"to {prompt}", -1.0, {"h": -float("inf")}, -2.0, {}, True, 0.5, 1.0, {"h": 0.8})
    return Turn(
        prompt, 7, patient=Reply((token,), "done", 0.5), guided=Reply((token,), "length", 0.5, (0,), ((0, 1.0),))
    )


def asked(session: Session) -> list[str]:
    return [one.prompt for one in session.turns]


def go_on(session: Session, *prompts: str) -> Session:
    return replace(session, turns=(*session.turns, *map(turn, prompts)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sessions.sqlite3"


def test_two_programs_at_one_conversation_lose_nothing(path):
    """A saves two turns, B one; then both go on, each in its own."""
    a, b = SessionStore(path), SessionStore(path)
    first = a.save(go_on(Session.new({"name": "p"}), "1"))
    theirs = b.load(first.id)
    mine = a.save(go_on(first, "2a"))
    mine = a.save(go_on(mine, "3a"))
    forked = b.save(go_on(theirs, "2b"))
    assert forked.id != first.id
    assert (asked(a.load(first.id)), asked(a.load(forked.id))) == (["1", "2a", "3a"], ["1", "2b"])
    # before it has heard of the fork, B saves under the old id again
    again = b.save(go_on(theirs, "2b", "3b"))
    assert again.id == forked.id
    a.save(go_on(mine, "4a"))
    assert asked(b.load(forked.id)) == ["1", "2b", "3b"]
    assert asked(b.load(first.id)) == ["1", "2a", "3a", "4a"]
    # loaded, the other's conversation is B's too: now A is the second
    assert b.save(go_on(b.load(first.id), "5b")).id == first.id
    assert a.save(go_on(mine, "4a", "5a")).id not in (first.id, forked.id)
    assert len(a.list()) == 3


def test_reading_a_conversation_gives_no_right_to_write_over_it(path):
    """A has it open, B goes on with it, A only looks at it and saves."""
    a, b = SessionStore(path), SessionStore(path)
    mine = a.save(go_on(Session.new({}), "1"))
    b.save(go_on(b.load(mine.id), "2b", "3b"))
    assert asked(a.read(mine.id)) == ["1", "2b", "3b"]
    forked = a.save(go_on(mine, "2a"))
    assert forked.id != mine.id
    a.read(mine.id)  # nor does it end the fork
    assert a.save(go_on(mine, "2a", "3a")).id == forked.id
    assert everything(path) == {mine.id: ["1", "2b", "3b"], forked.id: ["1", "2a", "3a"]}


def test_reading_the_open_conversation_packs_none_of_its_turns_again(path, monkeypatch):
    store = SessionStore(path)
    mine = store.save(go_on(Session.new({}), "1", "2"))
    store.read(mine.id)
    packed = watch_packing(monkeypatch, path)
    store.save(go_on(mine, "3"))
    assert packed == ["3"]


def test_turns_are_packed_while_others_can_write(path, monkeypatch):
    """Also where all of them are written anew, because another program has written or deleted the conversation."""
    a, b = SessionStore(path), SessionStore(path)
    mine = a.save(go_on(Session.new({}), "1"))
    packed = watch_packing(monkeypatch, path)
    mine = a.save(go_on(mine, "2"))
    b.save(go_on(b.load(mine.id), "3b"))
    mine = a.save(go_on(mine, "3"))
    b.delete(mine.id)
    a.save(go_on(mine, "4"))
    assert packed == ["2", "3b", "3", "1", "2", "3", "4", "1", "2", "3", "4"]
    assert sorted(everything(path).values()) == [["1", "2", "3", "4"], ["1", "2", "3b"]]


def watch_packing(monkeypatch, path) -> list[str]:
    """The questions of the turns that are packed from now on; it fails if the file is locked meanwhile."""
    packed = []

    def pack(one):
        db = sqlite3.connect(path, timeout=0)
        db.execute("BEGIN IMMEDIATE")
        db.close()
        packed.append(one.prompt)
        return real(one)

    real = sessions._row
    monkeypatch.setattr(sessions, "_row", pack)
    return packed


@pytest.mark.parametrize("look", ["read", "load", "save"])
def test_a_store_keeps_no_turn_in_memory(path, look):
    store = SessionStore(path)
    held = SessionStore(path).save(go_on(Session.new({}), "1"))
    held = store.save(replace(held, id="other")) if look == "save" else getattr(store, look)(held.id)
    alive = weakref.ref(held.turns[0])
    del held
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("seed", range(8))
def test_no_program_writes_over_turns_that_it_has_not_seen(path, seed):
    """Three programs load, go on, go back, rename and delete at random; a save changes one conversation at most."""
    rng = random.Random(seed)
    stores = [SessionStore(path) for _ in range(3)]
    open_now = [store.save(go_on(Session.new({}), str(i))) for i, store in enumerate(stores)]
    seen = [{one.id: asked(one)} for one in open_now]  # by each program, of each conversation
    forks = 0
    for number in range(40):
        who = rng.randrange(3)
        store = stores[who]
        before = everything(path)
        if before and rng.randrange(2):
            store.read(rng.choice(list(before)))  # changes nothing
        match rng.randrange(6):
            case 0 if before:
                open_now[who] = store.load(rng.choice(list(before)))
                seen[who][open_now[who].id] = asked(open_now[who])
            case 1 if len(before) > 2:
                store.delete(rng.choice(list(before)))
            case 2 if before:
                store.rename(rng.choice(list(before)), f"title {number}")
                assert everything(path) == before
            case _:
                kept = rng.randrange(len(open_now[who].turns) + 1)
                wanted = go_on(replace(open_now[who], turns=open_now[who].turns[:kept]), f"{who}.{number}")
                open_now[who] = store.save(wanted)
                own = open_now[who].id
                assert everything(path) == before | {own: asked(wanted)}
                assert own not in before or before[own] == seen[who].get(own)
                forks += own != wanted.id
                seen[who][own] = asked(wanted)
    assert forks or seed


def everything(path) -> dict[str, list[str]]:
    """The questions of every saved conversation."""
    reader = SessionStore(path)
    return {one.id: asked(reader.load(one.id)) for one in reader.list()}


def test_a_conversation_that_another_program_deleted_is_written_again_as_a_whole(path):
    a, b = SessionStore(path), SessionStore(path)
    mine = a.save(go_on(Session.new({}), "1", "2"))
    b.delete(mine.id)
    assert a.save(go_on(mine, "3")).id == mine.id
    assert asked(b.load(mine.id)) == ["1", "2", "3"]


def test_a_title_given_by_another_program_is_kept_and_makes_no_fork(path):
    a, b = SessionStore(path), SessionStore(path)
    mine = a.save(go_on(Session.new({}), "1"))
    b.rename(mine.id, "Better")
    mine = a.save(go_on(mine, "2"))
    assert mine.title == b.load(mine.id).title == "Better"
    assert a.save(replace(mine, title="Mine")).title == b.load(mine.id).title == "Mine"


WRITER = """
import sys
from dataclasses import replace
from llmdoctor.sessions import Session, SessionStore, Turn
store = SessionStore(sys.argv[1])
session = store.load(sys.argv[2])
print("loaded", flush=True)
sys.stdin.readline()
for number in range(30):
    session = store.save(replace(session, turns=(*session.turns, Turn(f"{sys.argv[3]}{number}", 1))))
print(session.id)
"""


def test_two_processes_that_write_at_the_same_time_keep_all_their_turns(path):
    store = SessionStore(path)
    start = store.save(go_on(Session.new({}), "start"))
    command = [sys.executable, "-c", WRITER, str(path), start.id]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([*command, name], **pipes) for name in "ab"]
    assert [process.stdout.readline() for process in running] == ["loaded\n"] * 2
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    ids = [process.communicate(timeout=60)[0].strip() for process in running]
    assert len(set(ids)) == 2
    assert start.id in ids
    for name, own in zip("ab", ids, strict=True):
        assert asked(store.load(own)) == ["start", *(f"{name}{number}" for number in range(30))]


def test_the_last_saved_is_first_whatever_the_clock_says(path, monkeypatch):
    store = SessionStore(path)
    clock = itertools.cycle([4e9, 1.0, 2e9, 0.0])
    monkeypatch.setattr("time.time", lambda: now)
    monkeypatch.setattr("time.time_ns", lambda: int(now * 1e9))
    held: list[Session] = []
    for number in range(8):
        now = next(clock)
        held.append(store.save(go_on(Session.new({}), str(number))))
        assert store.list()[0].id == held[-1].id
    now = 5.0
    store.save(go_on(held[2], "more"))
    assert [one.title for one in store.list()] == ["2", "7", "6", "5", "4", "3", "1", "0"]


OLD = """
CREATE TABLE session (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL, profile TEXT NOT NULL
);
CREATE TABLE turn (
    session TEXT NOT NULL REFERENCES session(id) ON DELETE CASCADE, number INTEGER NOT NULL, prompt TEXT NOT NULL,
    seed INTEGER NOT NULL, settings TEXT NOT NULL, patient BLOB NOT NULL, guided BLOB NOT NULL,
    PRIMARY KEY (session, number)
);
INSERT INTO session VALUES ('old1', 'Older', 1e9, 1.5e9, '{}'), ('old2', 'Newer', 1e9, 1.6e9, '{}');
PRAGMA user_version = 1;
"""


def test_the_file_of_version_1_goes_on(path):
    db = sqlite3.connect(path)
    db.executescript(OLD)
    db.close()
    store = SessionStore(path)
    assert [one.title for one in store.list()] == ["Newer", "Older"]
    store.save(go_on(store.load("old1"), "1"))
    assert [one.title for one in store.list()] == ["Older", "Newer"]


VALUES = (
    None,
    5,
    -(2**63),
    1e300,
    float("inf"),
    "",
    "x",
    "null",
    "[]",
    "{}",
    "[1]",
    "\x1b]0;x\x07",
    b"\xff\xfe",
    b"",
    "[" * 9000,
)
REPLIES = (
    b"no zlib", zlib.compress(b"no json"), zlib.compress(b"null"), zlib.compress(b"[]"), zlib.compress(b"{}"),
    zlib.compress(b'{"tokens": [{}]}'), zlib.compress(b'{"tokens": 5, "end": "done"}'), zlib.compress(b"[" * 9000),
    zlib.compress(b'{"tokens": [], "end": "gone"}'), zlib.compress(b'{"seconds": "x"}'), zlib.compress(b"{}")[:-1],
    zlib.compress(b'{"tokens": [{"position": null, "text": 5}]}'),
)  # fmt: skip


def loose(path, column: str, table: str, value) -> None:
    """Put a value into a column, whatever its type."""
    db = sqlite3.connect(path)
    with db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '')")
        db.execute("PRAGMA writable_schema = OFF")
    db.close()
    db = sqlite3.connect(path)
    with db:
        db.execute(f"UPDATE {table} SET {column} = ?", (value,))
    db.close()


COLUMNS = [
    *itertools.product(["session"], ["title", "created", "updated", "profile", "revision"], VALUES),
    *itertools.product(["turn"], ["prompt", "seed", "settings", "patient", "guided"], VALUES),
    *itertools.product(["turn"], ["patient", "guided"], REPLIES),
]


def refusal(store: SessionStore, name: str) -> str:
    """The one line that a damaged session gets; empty for one that can be used, which is then used."""
    try:
        held = store.load(name)
    except StorageError as error:
        return str(error)
    json.dumps(held.to_dict())
    assert all(isinstance(token.text, str) for turn in held.turns for token in turn.guided.tokens)
    store.save(go_on(held, "2"))
    return ""


def test_a_database_with_anything_in_it_is_one_line_and_the_session_can_be_deleted(path, tmp_path):
    original = SessionStore(tmp_path / "good.sqlite3")
    name = original.save(go_on(Session.new({"name": "p"}), "1")).id
    good = original.path.read_bytes()
    refused = 0
    for table, column, value in COLUMNS:
        path.write_bytes(good)
        loose(path, column, table, value)
        store = SessionStore(path)
        (listed,) = store.list()
        assert isinstance(listed.title, str)
        assert 0 <= listed.updated < 1e11
        if said := refusal(store, name):
            refused += 1
            assert "\n" not in said
            assert "delete it on the session screen (F9)" in said
        store.delete(name)
        assert store.list() == []
    assert refused > 80


def comparison(columns: int = 2, turns: int = 2) -> SavedComparison:
    answers = tuple(map(turn, "abc"[:turns]))
    own = [Compared(f"beta={n}", "guided", Guidance(betas={"h": n}), Sampling(), answers) for n in range(columns)]
    return SavedComparison((turn("before"),), 3, tuple(own))


def test_a_comparison_is_kept_with_its_conversation_until_that_is_deleted(path):
    store = SessionStore(path)
    session = store.save(go_on(Session.new({}), "1"))
    other = store.save(go_on(Session.new({}), "1"))
    assert store.comparison(session.id) is None
    for kept in (comparison(), comparison(columns=3, turns=1)):  # the later one replaces the first
        store.save_comparison(session.id, kept)
        assert SessionStore(path).comparison(session.id) == kept
    store.save(go_on(session, "2"))
    assert store.comparison(session.id) == kept
    assert store.comparison(other.id) is None
    store.delete(session.id)
    assert store.comparison(session.id) is None


def test_the_file_of_version_2_goes_on_and_takes_comparisons(path):
    store = SessionStore(path)
    name = store.save(go_on(Session.new({}), "1")).id
    with sqlite3.connect(path) as db:  # as version 2 wrote it
        db.execute("DROP TABLE comparison")
        db.execute("PRAGMA user_version = 2")
    db.close()
    store = SessionStore(path)
    assert asked(store.load(name)) == ["1"]
    assert store.comparison(name) is None
    store.save_comparison(name, comparison())
    assert store.comparison(name) == comparison()


def test_a_damaged_comparison_is_one_line_and_the_conversation_opens(path):
    store = SessionStore(path)
    name = store.save(go_on(Session.new({}), "1")).id
    uneven = replace(comparison(), columns=(*comparison(1, 1).columns, *comparison(1, 2).columns))
    refused = [sessions._packed(one) for one in (comparison(0), comparison(8), comparison(2, 0), uneven)]
    settings = json.dumps(sessions._plain(comparison())).replace('"alpha": 1.0', '"alpha": -1.0')
    for held in (*VALUES[1:], *REPLIES, zlib.compress(settings.encode()), *refused):
        with sqlite3.connect(path) as db:
            db.execute("INSERT OR REPLACE INTO comparison VALUES (?, ?)", (name, held))
        db.close()
        with pytest.raises(StorageError, match="is damaged and left out: ") as raised:
            store.comparison(name)
        assert "\n" not in str(raised.value)
        assert asked(store.load(name)) == ["1"]


def test_files_that_are_no_databases_are_one_line_with_a_way_out(path, tmp_path):
    import os

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    path.write_bytes(b"no database")
    other = tmp_path / "other"
    db = sqlite3.connect(other)
    db.execute("CREATE TABLE session (x, y)")
    db.close()
    (tmp_path / "cut").write_bytes(other.read_bytes()[:1500])
    for name in ("fifo", "folder", "sessions.sqlite3", "other", "cut"):
        store = SessionStore(tmp_path / name)
        for act in (store.list, lambda store=store: store.save(go_on(Session.new({}), "1"))):
            with pytest.raises(StorageError, match="LLMDOCTOR_SESSIONS") as caught:
                act()
            assert "\n" not in str(caught.value)


def test_text_that_is_no_unicode_is_kept_as_marks(path):
    store = SessionStore(path)
    saved = store.save(go_on(Session.new({"name": "\udcff"}), "a\ud800b"))
    assert asked(store.load(saved.id)) == ["a?b"]
    store.rename(saved.id, "t\udcff")
    assert store.list()[0].title == "t?"
    with pytest.raises(UsageError, match="no session"):
        store.load("\udcff")
