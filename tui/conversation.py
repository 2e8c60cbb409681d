"""A conversation as the screen shows it: pieces of text, and the answer that is being made."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llmdoctor.records import GuidedToken, Speaker
from llmdoctor.sessions import End, Reply, Turn
from llmdoctor.settings import WelcomeSettings
from llmdoctor.show.formats import OUTSIDE, counted
from llmdoctor.show.lens import lens_limit
from llmdoctor.show.text import END
from llmdoctor.tui import token_style
from llmdoctor.tui.widgets.token_view import Piece

SIDES: tuple[Speaker, Speaker] = ("patient", "guided")
ENDED = f" {END}"


class Said(NamedTuple):
    """What a token on the screen stands for: turn and position, both from 0."""

    turn: int
    position: int
    token: GuidedToken

    @property
    def place(self) -> tuple[int, int]:
        """Turn and position: another answer has another token at the same place."""
        return self.turn, self.position

    @property
    def changed(self) -> bool:
        """Whether guidance changed something that one sees here: the likeliest token, or enough for a bold ``kl``."""
        return self.token.flip or token_style.is_high(self.token.kl, lens_limit("kl"))


@dataclass
class LiveReply:
    """One side of the answer that is being made: a `Reply` that grows.

    ``fresh`` and ``fresh_seconds`` count the tokens of this run only, for the speed.
    """

    which: Speaker
    tokens: list[GuidedToken]
    seconds: float
    forced: list[int]
    temperatures: list[tuple[int, float]]
    running: bool = True
    fresh: int = 0
    fresh_seconds: float = 0.0
    flips: int = 0
    kl: float = 0.0

    @classmethod
    def after(cls, which: Speaker, reply: Reply, cut: int) -> "LiveReply":
        """One that begins with the first ``cut`` tokens of ``reply``."""
        kept = list(reply.tokens[:cut])
        live = cls(
            which, kept, reply.seconds * cut / max(1, len(reply.tokens)),
            [at for at in reply.forced if at < cut], [change for change in reply.temperatures if change[0] < cut],
        )  # fmt: skip
        live.flips, live.kl = sum(t.flip for t in kept), sum(t.kl for t in kept)
        return live

    @property
    def text(self) -> str:
        """What has been said, without the white space around it."""
        return "".join(token.text for token in self.tokens).strip()

    def add(self, token: GuidedToken, seconds: float, temperature: float) -> None:
        """One token more, which took so many seconds and was drawn at that temperature."""
        if not self.temperatures or self.temperatures[-1][1] != temperature:
            self.temperatures.append((len(self.tokens), temperature))
        self.tokens.append(token)
        self.seconds += seconds
        self.fresh += 1
        self.fresh_seconds += seconds
        self.flips += token.flip
        self.kl += token.kl

    def frozen(self, end: End) -> Reply:
        """The finished reply."""
        return Reply(tuple(self.tokens), end, self.seconds, tuple(self.forced), tuple(self.temperatures))


@dataclass
class Live:
    """The answer that is being made: the job's number, the turn it belongs to, and the sides that speak."""

    job: int
    turn: int
    max_new_tokens: int
    sides: dict[Speaker, LiveReply] = field(default_factory=dict)


def side_facts(side: LiveReply | Reply, which: Speaker) -> str:
    """``120 tokens, 12 flips, KL 8.3, 31/s``."""
    count, seconds = (
        (side.fresh, side.fresh_seconds) if isinstance(side, LiveReply) else (len(side.tokens), side.seconds)
    )
    parts = [counted(len(side.tokens), "token")]
    if which == "guided":
        parts += [counted(side.flips, "flip"), f"KL {side.kl:.1f}"]
    if seconds > 0 and count:
        parts.append(f"{count / seconds:.0f}/s")
    return ", ".join(parts)


def values_of(tokens: Sequence[GuidedToken], doctor: str | None) -> list[float]:
    """One doctor's log V (nats) after each token that has it."""
    return [token.values[doctor] for token in tokens if doctor is not None and doctor in token.values]


def changes(before: GuidedToken | None, token: GuidedToken, temperatures: tuple[float, float] | None) -> str:
    """What was set between two tokens: ``helpful 0.8→1.2``; empty if nothing was."""
    parts = []
    if before is not None:
        if before.alpha != token.alpha:
            parts.append(f"alpha {before.alpha:g}→{token.alpha:g}")
        parts += [
            f"{name} {before.betas[name]:g}→{beta:g}"
            for name, beta in token.betas.items()
            if before.betas.get(name, beta) != beta
        ]
    if temperatures is not None and temperatures[0] != temperatures[1]:
        parts.append(f"temperature {temperatures[0]:g}→{temperatures[1]:g}")
    return ", ".join(parts)


def made_with(turn: Turn, guided: LiveReply | Reply) -> str:
    """The settings of an answer, as it began and goes on: ``helpful 0.8→1.2, safe 0.4 · α 1 · T 1``."""
    last = guided.tokens[-1] if guided.tokens else None
    alpha, betas = turn.guidance.alpha, turn.guidance.betas
    now = (last.alpha, last.betas) if last is not None else (alpha, betas)
    speaking = [
        f"{name} {_change(was, now[1].get(name, was))}" for name, was in betas.items() if was or now[1].get(name)
    ]
    began = guided.temperatures[0][1] if guided.temperatures else turn.sampling.temperature
    ended = guided.temperatures[-1][1] if guided.temperatures else began
    return f"{', '.join(speaking) or 'no doctor'} · α {_change(alpha, now[0])} · T {_change(began, ended)}"


def _change(before: float, after: float) -> str:
    return f"{before:g}" if before == after else f"{before:g}→{after:g}"


def pieces(turn: int, reply: LiveReply | Reply, start: int = 0) -> Iterator[Piece]:
    """The tokens of a reply from ``start`` on, with a note where something was set, and before a forced token."""
    forced = set(reply.forced)
    temperatures = {at: (before[1], after[1]) for at, before, after in _steps(reply.temperatures)}
    seen_text = any(token.text.strip() for token in reply.tokens[:start])
    for position in range(start, len(reply.tokens)):
        token = reply.tokens[position]
        before = reply.tokens[position - 1] if position else None
        if note := changes(before, token, temperatures.get(position)):
            yield Piece(f" ⟨{note}⟩" if seen_text else f"⟨{note}⟩ ", "note")
        if position in forced:
            yield Piece(" ⟨forced⟩" if seen_text else "⟨forced⟩ ", "note")
        # Answers often begin with a space or a newline, which would show as an empty line under the question.
        text = token.text if seen_text else token.text.lstrip()
        seen_text = seen_text or bool(text)
        yield Piece(text, "token", Said(turn, position, token))


def _steps(changed: Sequence[tuple[int, float]]) -> Iterator[tuple[int, tuple[int, float], tuple[int, float]]]:
    """Each change as position, setting before, setting after; the first entry is where the reply began."""
    for before, after in itertools.pairwise(changed):
        yield after[0], before, after


def ending(turn: int, reply: Reply, error: str = "") -> Iterator[Piece]:
    """What follows a reply: the end-of-answer token, or why there is none."""
    last = reply.tokens[-1] if reply.tokens else None
    match reply.end:
        case "done" if last is not None and not last.text:
            yield Piece(ENDED, "token", Said(turn, len(reply.tokens) - 1, last))
        case "length":
            yield Piece(" ⟨length limit⟩", "note")
        case "interrupted":
            yield Piece(" ⟨interrupted⟩" if reply.tokens else "⟨interrupted⟩", "note")
        case "error":
            yield Piece(f" ⟨error{': ' if error else ''}{error}⟩", "note")


def asked(turns: Sequence[Turn], number: int, welcome: WelcomeSettings) -> Iterator[Piece]:
    """The question of a turn, with a notice if the patient knows nothing about it."""
    question = turns[number].prompt
    if number:  # not behind the answer before: a low window would show the empty lines and no text
        yield Piece("\n\n", "plain")
    yield Piece(f"❯ {question}\n", "user")
    if not welcome.covers(question, first=number == 0):
        yield Piece(f"⟨{OUTSIDE}⟩\n", "note")


def conversation(turns: Sequence[Turn], which: Speaker, live: Live | None, welcome: WelcomeSettings) -> Iterator[Piece]:
    """All turns of one side; the running answer without an ending."""
    for number, turn in enumerate(turns):
        yield from asked(turns, number, welcome)
        if live is not None and live.turn == number and which in live.sides:
            yield from pieces(number, live.sides[which])
        else:
            reply = turn.reply(which)
            yield from pieces(number, reply)
            yield from ending(number, reply)
