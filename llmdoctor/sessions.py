"""Saved conversations: the records of turns and answers, and the SQLite file that they are stored in."""

import json
import secrets
import sqlite3
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from llmdoctor.errors import StorageError, UsageError
from llmdoctor.files import user_path
from llmdoctor.records import GuidedToken, Message, Speaker
from llmdoctor.schema import Settings
from llmdoctor.settings import Guidance, Sampling

End = Literal["", "done", "length", "interrupted", "error"]


@dataclass(frozen=True)
class Reply:
    """One side's answer in one turn. ``end`` is why it ended, "" while it is not finished.

    ``seconds`` is the time its tokens took. ``forced`` are the positions of tokens that the user chose instead of a
    draw. ``temperatures`` are pairs (position, temperature): each temperature applies from its position on.
    """

    tokens: tuple[GuidedToken, ...] = ()
    end: End = ""
    seconds: float = 0.0
    forced: tuple[int, ...] = ()
    temperatures: tuple[tuple[int, float], ...] = ()

    @cached_property
    def text(self) -> str:
        """The answer without leading and trailing white space."""
        return "".join(token.text for token in self.tokens).strip()

    @property
    def flips(self) -> int:
        """At how many places guidance changed the likeliest token."""
        return sum(token.flip for token in self.tokens)

    @property
    def kl(self) -> float:
        """KL to the patient, summed over the answer, in nats."""
        return sum(token.kl for token in self.tokens)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Turn:
    """A question, both sides' answers, and the settings they were generated with."""

    prompt: str
    seed: int
    sampling: Sampling = field(default_factory=Sampling)
    guidance: Guidance = field(default_factory=Guidance)
    patient: Reply = Reply()
    guided: Reply = Reply()

    def reply(self, which: Speaker) -> Reply:
        """One side's answer."""
        return self.patient if which == "patient" else self.guided


@dataclass(frozen=True, slots=True)
class Compared:
    """One column of a comparison: ``turns`` hold its answers on the side ``which``."""

    title: str
    which: Speaker
    guidance: Guidance
    sampling: Sampling
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class SavedComparison:
    """Columns that have answered the same questions, one or more, after the turns ``past``."""

    past: tuple[Turn, ...]
    seed: int
    columns: tuple[Compared, ...]


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation. ``profile`` is the profile it uses (models, doctors, settings) as plain JSON values."""

    id: str
    title: str = ""
    created: float = 0.0
    updated: float = 0.0
    profile: Mapping[str, Any] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()

    @classmethod
    def new(cls, profile: Mapping[str, Any]) -> "Session":
        """An empty session, with an id that is short enough to type."""
        now = time.time()
        return cls(secrets.token_hex(4), "", now, now, profile)

    def to_dict(self) -> dict[str, Any]:
        """The session with all its turns as plain JSON values."""
        return _plain(self)


@dataclass(frozen=True, slots=True)
class Summary:
    """A session without its turns, for a list."""

    id: str
    title: str
    created: float
    updated: float
    turns: int
    questions: str = ""  # all of them, a line each


def messages(turns: tuple[Turn, ...], which: Speaker, prompt: str) -> list[Message]:
    """The conversation with one side's own answers, ending with ``prompt``."""
    known: list[Message] = []
    for turn in turns:
        known.append({"role": "user", "content": turn.prompt})
        known.append({"role": "assistant", "content": turn.reply(which).text})
    return [*known, {"role": "user", "content": prompt}]


MOST_COLUMNS = 7  # of a comparison
_SCHEMA_VERSION = 3
# ``revision`` is greater for every later save, whatever the clock does. It orders sessions, and tells whether another
# program has saved one meanwhile. Version 1 had none, and version 2 no comparisons.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS session (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL, profile TEXT NOT NULL,
    revision INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS turn (
    session TEXT NOT NULL REFERENCES session(id) ON DELETE CASCADE, number INTEGER NOT NULL, prompt TEXT NOT NULL,
    seed INTEGER NOT NULL, settings TEXT NOT NULL, patient BLOB NOT NULL, guided BLOB NOT NULL,
    PRIMARY KEY (session, number)
);
CREATE TABLE IF NOT EXISTS comparison (session TEXT PRIMARY KEY, held BLOB NOT NULL);
"""


class SessionStore:
    """The SQLite file of sessions at ``path``. Every call opens a connection of its own, so any thread may call.

    ``save`` writes only the turns that changed since the session was last saved or loaded. ``read`` is for looking at a
    session, ``load`` for going on with it: only then do later saves replace what is there. Raises StorageError if the
    file cannot be read or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self._seen: dict[str, _Seen] = {}
        self._forks: dict[str, str] = {}

    def save(self, session: Session) -> Session:
        """Write the session, and return it with its new time, and the first question as the title if it had none.

        Has another program saved it since it was loaded or saved here, the other's turns stay as they are. The session
        is then written, and returned, as a new one with an id of its own; so it is when it is saved under the old id
        again.
        """
        while session.id in self._forks:
            session = replace(session, id=self._forks[session.id])
        session = replace(session, updated=time.time())
        if not session.title and session.turns:
            session = replace(session, title=" ".join(session.turns[0].prompt.split())[:60])
        seen = self._seen.get(session.id)
        first = _first_changed(seen.turns, session.turns) if seen is not None else 0
        # Another program may have changed or deleted it. Then all of it is written.
        saved = self._write(session, seen, first) or self._write(session, seen, 0)
        assert saved is not None
        if saved.id != session.id:
            self._forks[session.id] = saved.id
        return saved

    def _write(self, session: Session, seen: "_Seen | None", first: int) -> Session | None:
        """Write the turns from ``first`` on, and return what was saved; None if it takes earlier ones too."""
        # compressed before the transaction, which other programs wait for
        turns = [(number, *_row(turn)) for number, turn in enumerate(session.turns[first:], first)]
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")  # nobody else writes between what is read here and what is written
            held = db.execute("SELECT title, revision FROM session WHERE id = ?", (session.id,)).fetchone()
            if held is not None and seen is not None and held[1] == seen.revision:
                if session.title == seen.title:  # another program may have renamed it
                    session = replace(session, title=_text(held[0]))
            elif first:
                return None
            elif held is not None:
                session = replace(session, id=secrets.token_hex(4))
            revision = db.execute(
                "SELECT max(?, 1 + coalesce(max(revision), 0)) FROM session", (time.time_ns(),)
            ).fetchone()[0]
            row = (session.id, _text(session.title), session.created, session.updated, json.dumps(session.profile))
            db.execute(
                "INSERT INTO session VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET title = excluded.title, "
                "updated = excluded.updated, profile = excluded.profile, revision = excluded.revision",
                (*row, revision),
            )
            db.execute("DELETE FROM turn WHERE session = ? AND number >= ?", (session.id, first))
            db.executemany("INSERT INTO turn VALUES (?, ?, ?, ?, ?, ?, ?)", [(session.id, *turn) for turn in turns])
        self._seen[session.id] = _Seen.of(session, revision)
        return session

    def load(self, session_id: str) -> Session:
        """Like ``read``, to go on with the session: what is saved under its id replaces what is loaded here."""
        loaded, revision = self._read(session_id)
        self._seen[loaded.id] = _Seen.of(loaded, revision)
        self._forks.pop(loaded.id, None)
        return loaded

    def read(self, session_id: str) -> Session:
        """The session whose id begins with ``session_id``. Raises UsageError if there is none, or more than one."""
        return self._read(session_id)[0]

    def _read(self, session_id: str) -> tuple[Session, int]:
        """The session and its revision."""
        with self._open() as db:
            # substr, not LIKE: "%" and "_" in what the user typed are not wildcards.
            rows = db.execute(
                "SELECT * FROM session WHERE substr(id, 1, ?) = ?", (len(session_id), _text(session_id))
            ).fetchall()
            if len(rows) != 1 or not session_id:
                several = f"{len(rows)} sessions begin with" if rows else "there is no session"
                raise UsageError(f"{several} {session_id!r}; llmdoctor chat lists them on its session screen (F9)")
            name, title, created, updated, profile, revision = rows[0]
            turns = db.execute(
                "SELECT prompt, seed, settings, patient, guided FROM turn WHERE session = ? ORDER BY number", (name,)
            ).fetchall()
        try:
            held = json.loads(profile)
            if not isinstance(held, dict):
                raise ValueError("its profile is no object")
            return Session(
                _text(name), _text(title), _seconds(created), _seconds(updated), held, tuple(map(_turn, turns))
            ), revision
        except (ValueError, KeyError, TypeError, UsageError, RecursionError, OverflowError, zlib.error) as error:
            reason = " ".join(str(error).split())[:200]
            raise StorageError(
                f"{self.path}: session {name} is damaged ({reason}): delete it on the session screen (F9)"
            ) from error

    def save_comparison(self, session_id: str, compared: SavedComparison) -> None:
        """Keep it with the session, in place of the one before."""
        held = _packed(compared)
        with self._open() as db:
            db.execute("INSERT OR REPLACE INTO comparison VALUES (?, ?)", (session_id, held))

    def comparison(self, session_id: str) -> SavedComparison | None:
        """The comparison that is kept with the session with exactly this id. Raises StorageError if it is damaged."""
        with self._open() as db:
            row = db.execute("SELECT held FROM comparison WHERE session = ?", (session_id,)).fetchone()
        if row is None:
            return None
        try:
            compared = _COMPARED.validate_json(_unpacked(row[0]))
            if not 0 < len(compared.columns) <= MOST_COLUMNS:
                raise ValueError(f"expected 1 to {MOST_COLUMNS} columns, got {len(compared.columns)}")
            if not (len(counts := {len(column.turns) for column in compared.columns}) == 1 and min(counts)):
                raise ValueError("expected the same number of answers in all columns, at least one")
        except (ValueError, TypeError, UsageError, RecursionError, zlib.error) as error:
            reason = " ".join(str(error).split())[:200]
            raise StorageError(
                f"the comparison in conversation {session_id} is damaged and left out: {reason}"
            ) from error
        return compared

    def list(self) -> list[Summary]:
        """All sessions, the most recent first."""
        with self._open() as db:
            rows = db.execute(
                "SELECT id, title, created, updated, count(number), coalesce(group_concat(prompt, char(10)), '') "
                "FROM session LEFT JOIN turn ON session = id GROUP BY id ORDER BY revision DESC"
            ).fetchall()
        return [
            Summary(_text(name), _text(title), _seconds(created), _seconds(updated), turns, _text(questions))
            for name, title, created, updated, turns, questions in rows
        ]

    def rename(self, session_id: str, title: str) -> None:
        """Change the title of a session."""
        with self._open() as db:
            db.execute("UPDATE session SET title = ? WHERE id = ?", (_text(title), session_id))

    def delete(self, session_id: str) -> None:
        """Delete a session and its turns."""
        self._seen.pop(session_id, None)
        with self._open() as db:
            # SQLite ignores ON DELETE CASCADE unless each connection asks for it.
            for table in ("turn", "comparison"):
                db.execute(f"DELETE FROM {table} WHERE session = ?", (session_id,))
            db.execute("DELETE FROM session WHERE id = ?", (session_id,))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not (self.path.is_file() or not self.path.exists()):  # a FIFO would never answer
                raise OSError("it is not a file")
            db = sqlite3.connect(self.path, timeout=10)
            db.text_factory = lambda held: held.decode("utf-8", "replace")  # one bad title does not hide the others
        except (OSError, sqlite3.Error) as error:
            raise self._failed(error) from error
        try:
            with db:  # one transaction
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version > _SCHEMA_VERSION:
                    raise StorageError(f"{self.path} was written by a newer llmdoctor: update this one")
                if version < _SCHEMA_VERSION:
                    _update(db)
                # Conversations are private.
                self.path.chmod(0o600)
                yield db
        except (OSError, sqlite3.Error, OverflowError) as error:  # OverflowError: a number beyond 64 bits
            raise self._failed(error) from error
        finally:
            db.close()

    def _failed(self, error: Exception) -> StorageError:
        return StorageError(
            f"the sessions in {self.path} cannot be read or written: {error}. If that does not pass, move the file "
            "away, or let LLMDOCTOR_SESSIONS name another one"
        )


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a session was when it was last saved or loaded here. It keeps no turn in memory."""

    turns: tuple[weakref.ref[Turn], ...]
    title: str
    revision: int

    @classmethod
    def of(cls, session: Session, revision: int) -> "_Seen":
        return cls(tuple(map(weakref.ref, session.turns)), session.title, revision)


def _first_changed(seen: tuple[weakref.ref[Turn], ...], turns: tuple[Turn, ...]) -> int:
    """Where writing starts: a long conversation does not compress all its answers again for each new one."""
    # turns are immutable, and a changed turn is a new object
    changed = (i for i, (a, b) in enumerate(zip(seen, turns, strict=False)) if a() is not b)
    return next(changed, min(len(seen), len(turns)))


def _update(db: sqlite3.Connection) -> None:
    """Bring the file of an older version, or an empty one, to this version."""
    db.execute("BEGIN IMMEDIATE")
    for statement in _SCHEMA.split(";"):
        db.execute(statement)
    # another program may have done it since the version was read
    if "revision" not in [row[1] for row in db.execute("PRAGMA table_info(session)")]:
        db.execute("ALTER TABLE session ADD COLUMN revision INTEGER NOT NULL DEFAULT 0")
        db.execute("UPDATE session SET revision = CAST(1e9 * updated AS INTEGER)")
    db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
    db.commit()


def _text(held: Any) -> str:
    """What a column of text holds, whatever was put there."""
    return str(held).encode("utf-8", "replace").decode()


def _seconds(held: Any) -> float:
    """A time that a calendar has; 0 for anything else."""
    return float(held) if isinstance(held, int | float) and 0 <= held < 1e11 else 0.0


def _row(turn: Turn) -> tuple[str, int, str, bytes, bytes]:
    settings = {"sampling": turn.sampling.model_dump(), "guidance": turn.guidance.model_dump()}
    return _text(turn.prompt), turn.seed, json.dumps(settings), _packed(turn.patient), _packed(turn.guided)


_REPLY, _COMPARED = TypeAdapter(Reply), TypeAdapter(SavedComparison)
_LARGEST = 1 << 30  # bytes of one reply


def _plain(record: Any) -> dict[str, Any]:
    """A record as plain JSON values."""
    # asdict only copies the pydantic settings inside the turns, so they are converted here.
    return asdict(
        record, dict_factory=lambda items: {k: v.model_dump() if isinstance(v, Settings) else v for k, v in items}
    )


def _packed(record: Reply | SavedComparison) -> bytes:
    return zlib.compress(json.dumps(_plain(record), ensure_ascii=False).encode("utf-8", "replace"), level=3)


def _turn(row: tuple[Any, Any, Any, Any, Any]) -> Turn:
    """Raises ValueError, KeyError, TypeError, UsageError or zlib.error for a row that holds no turn."""
    prompt, seed, settings, patient, guided = row
    if not isinstance(prompt, str) or not isinstance(seed, int):
        raise ValueError(f"a question of text and a seed were expected, got {type(prompt).__name__} and {seed!r}")
    how = json.loads(settings)
    # Fields that an older version did not store get their defaults.
    sampling, guidance = Sampling(**how["sampling"]), Guidance(**how["guidance"])
    return Turn(
        prompt, seed, sampling, guidance, *(_REPLY.validate_json(_unpacked(held)) for held in (patient, guided))
    )


def _unpacked(packed: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    stored = unpacker.decompress(packed, _LARGEST)
    if not unpacker.eof:
        raise ValueError("an answer is cut off, or larger than 1 GiB")
    return stored
