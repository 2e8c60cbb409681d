"""Saved conversations: the records of turns and answers, and the SQLite file that they are stored in."""

import json
import secrets
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from llmdoctor.errors import StorageError, UsageError
from llmdoctor.records import Alternative, GuidedToken, Message, Speaker
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


@dataclass(frozen=True, slots=True)
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
        # asdict only copies the pydantic settings inside the turns, so they are converted here.
        return asdict(
            self, dict_factory=lambda items: {k: v.model_dump() if isinstance(v, Settings) else v for k, v in items}
        )


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


_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS session (
    id TEXT PRIMARY KEY, title TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL, profile TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS turn (
    session TEXT NOT NULL REFERENCES session(id) ON DELETE CASCADE, number INTEGER NOT NULL, prompt TEXT NOT NULL,
    seed INTEGER NOT NULL, settings TEXT NOT NULL, patient BLOB NOT NULL, guided BLOB NOT NULL,
    PRIMARY KEY (session, number)
);
"""


class SessionStore:
    """The SQLite file of sessions at ``path``. Every call opens a connection of its own, so any thread may call.

    ``save`` writes only the turns that changed since the session was last saved or loaded. Raises StorageError if the
    file cannot be read or written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self._seen: dict[str, tuple[Turn, ...]] = {}

    def save(self, session: Session) -> Session:
        """Write the session, and return it with its new time, and the first question as the title if it had none."""
        if not session.title and session.turns:
            session = replace(session, title=" ".join(session.turns[0].prompt.split())[:60])
        session = replace(session, updated=time.time())
        # Turns are immutable, and a changed turn is a new object. So the first turn that is not the very object saved
        # before is where writing starts: a long conversation does not compress all its answers again for each new one.
        seen = self._seen.get(session.id, ())
        first = next(
            (i for i, (a, b) in enumerate(zip(seen, session.turns, strict=False)) if a is not b),
            min(len(seen), len(session.turns)),
        )
        with self._open() as db:
            row = (session.id, session.title, session.created, session.updated, json.dumps(session.profile))
            db.execute(
                "INSERT INTO session VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "title = excluded.title, updated = excluded.updated, profile = excluded.profile",
                row,
            )
            if db.execute("SELECT count(*) FROM turn WHERE session = ?", (session.id,)).fetchone()[0] < first:
                # Another program has deleted turns in the meantime: write all of them.
                first = 0
            db.execute("DELETE FROM turn WHERE session = ? AND number >= ?", (session.id, first))
            db.executemany(
                "INSERT INTO turn VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(session.id, number, *_row(turn)) for number, turn in enumerate(session.turns) if number >= first],
            )
        self._seen[session.id] = session.turns
        return session

    def load(self, session_id: str) -> Session:
        """The session whose id begins with ``session_id``. Raises UsageError if there is none, or more than one."""
        with self._open() as db:
            # substr, not LIKE: "%" and "_" in what the user typed are not wildcards.
            rows = db.execute(
                "SELECT * FROM session WHERE substr(id, 1, ?) = ?", (len(session_id), session_id)
            ).fetchall()
            if len(rows) != 1 or not session_id:
                several = f"{len(rows)} sessions begin with" if rows else "there is no session"
                raise UsageError(f"{several} {session_id!r}; llmdoctor chat lists them on its session screen (F9)")
            name, title, created, updated, profile = rows[0]
            turns = db.execute(
                "SELECT prompt, seed, settings, patient, guided FROM turn WHERE session = ? ORDER BY number", (name,)
            ).fetchall()
        try:
            loaded = Session(name, title, created, updated, json.loads(profile), tuple(map(_turn, turns)))
        except (ValueError, KeyError, TypeError, UsageError, zlib.error) as error:
            raise StorageError(f"{self.path}: session {name} is damaged ({error}): delete it") from error
        self._seen[name] = loaded.turns
        return loaded

    def list(self) -> list[Summary]:
        """All sessions, the most recent first."""
        with self._open() as db:
            rows = db.execute(
                "SELECT id, title, created, updated, count(number), coalesce(group_concat(prompt, char(10)), '') "
                "FROM session LEFT JOIN turn ON session = id GROUP BY id ORDER BY updated DESC"
            ).fetchall()
        return [Summary(*row) for row in rows]

    def rename(self, session_id: str, title: str) -> None:
        """Change the title of a session."""
        with self._open() as db:
            db.execute("UPDATE session SET title = ? WHERE id = ?", (title, session_id))

    def delete(self, session_id: str) -> None:
        """Delete a session and its turns."""
        self._seen.pop(session_id, None)
        with self._open() as db:
            # SQLite ignores ON DELETE CASCADE unless each connection asks for it.
            db.execute("DELETE FROM turn WHERE session = ?", (session_id,))
            db.execute("DELETE FROM session WHERE id = ?", (session_id,))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            db = sqlite3.connect(self.path, timeout=10)
        except (OSError, sqlite3.Error) as error:
            raise self._failed(error) from error
        try:
            with db:  # one transaction
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version > _SCHEMA_VERSION:
                    raise StorageError(f"{self.path} was written by a newer llmdoctor: update this one")
                db.executescript(_SCHEMA)
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
                # Conversations are private.
                self.path.chmod(0o600)
                yield db
        except (OSError, sqlite3.Error) as error:
            raise self._failed(error) from error
        finally:
            db.close()

    def _failed(self, error: Exception) -> StorageError:
        return StorageError(f"the sessions in {self.path} cannot be read or written: {error}")


def _row(turn: Turn) -> tuple[str, int, str, bytes, bytes]:
    settings = {"sampling": turn.sampling.model_dump(), "guidance": turn.guidance.model_dump()}
    return turn.prompt, turn.seed, json.dumps(settings), _packed(turn.patient), _packed(turn.guided)


def _packed(reply: Reply) -> bytes:
    return zlib.compress(json.dumps(asdict(reply), ensure_ascii=False).encode(), level=3)


def _turn(row: tuple[str, int, str, bytes, bytes]) -> Turn:
    prompt, seed, settings, patient, guided = row
    how = json.loads(settings)
    # Fields that an older version did not store get their defaults.
    sampling, guidance = Sampling(**how["sampling"]), Guidance(**how["guidance"])
    return Turn(prompt, seed, sampling, guidance, _unpacked(patient), _unpacked(guided))


def _unpacked(packed: bytes) -> Reply:
    stored = json.loads(zlib.decompress(packed))
    return Reply(
        tokens=tuple(
            GuidedToken(**{**token, "top": tuple(Alternative(**other) for other in token["top"])})
            for token in stored["tokens"]
        ),
        end=stored["end"],
        seconds=stored["seconds"],
        forced=tuple(stored["forced"]),
        temperatures=tuple((at, value) for at, value in stored["temperatures"]),
    )
