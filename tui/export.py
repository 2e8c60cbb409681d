"""A session as a file: Markdown, JSON, or a web page with coloured tokens."""

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmdoctor.errors import UsageError
from llmdoctor.harmless import json_text
from llmdoctor.records import Answer, Comparison
from llmdoctor.sessions import Session, Turn, messages
from llmdoctor.show.comparison import View
from llmdoctor.show.formats import settings_text, speaking_text
from llmdoctor.show.lens import Lens
from llmdoctor.show.page import comparisons_page
from llmdoctor.show.text import clean, one_line

KINDS = {"md": "Markdown", "json": "JSON", "html": "web page", "svg": "picture of the screen"}


def comparison(turns: tuple[Turn, ...], number: int) -> Comparison:
    """One turn in the shape that ``compare`` has."""
    turn = turns[number]
    length = len(turn.guided.tokens)
    settings = _settings(turn)
    metrics = {
        "flips": turn.guided.flips,
        "kl": turn.guided.kl,
        "kl_per_token": turn.guided.kl / max(1, length),
        "patient_tokens": len(turn.patient.tokens),
        "guided_tokens": length,
        "patient_seconds": turn.patient.seconds,
        "guided_seconds": turn.guided.seconds,
    }
    sides = [Answer(reply.text, reply.tokens, reply.end == "done") for reply in (turn.patient, turn.guided)]
    prompt = turn.prompt if number == 0 else messages(turns[:number], "guided", turn.prompt)
    return Comparison(prompt, settings, sides[0], sides[1], metrics)


def render(session: Session, kind: str, lens: Lens, doctor: str | None) -> str:
    """The session as text of a file of that kind (not svg, which is the screen's own)."""
    match kind:
        case "md":
            return "\n".join(_markdown(session))
        case "json":
            return json_text(session.to_dict(), indent=1) + "\n"
        case "html":
            compared = [comparison(session.turns, number) for number in range(len(session.turns))]
            return comparisons_page(View.of(one, lens, doctor) for one in compared)
    raise UsageError(f"a session can be exported as {', '.join(KINDS)}, not as {kind!r}")


def _markdown(session: Session) -> Iterator[str]:
    yield f"# {one_line(session.title) or 'Conversation'}\n"
    for turn in session.turns:
        yield "\n".join(f"> {line}" for line in clean(turn.prompt).splitlines()) + "\n"
        yield f"**Patient alone**{_end(turn.patient.end)}\n\n{clean(turn.patient.text)}\n"
        by = speaking_text(turn.guidance.betas)
        yield f"**Guided by {by}**{_end(turn.guided.end)}\n\n{clean(turn.guided.text)}\n"
        yield (
            f"*{settings_text(_settings(turn))}; guidance changed the likeliest token at {turn.guided.flips} of "
            f"{len(turn.guided.tokens)} places, KL {turn.guided.kl:.1f} nats*\n"
        )


def _settings(turn: Turn) -> dict[str, Any]:
    return turn.guidance.to_dict() | turn.sampling.model_dump() | {"seed": turn.seed}


def _end(end: str) -> str:
    return "" if end == "done" else f" ({ {'length': 'length limit', '': 'unfinished'}.get(end, end) })"


def file_name(session: Session, kind: str) -> str:
    """``llmdoctor-how-can-i-sleep-better-1a2b3c4d.md``."""
    words = re.sub(r"[^a-z0-9]+", "-", session.title.lower()).strip("-")[:40].strip("-")
    stamp = session.id if kind != "svg" else time.strftime("%Y%m%d-%H%M%S")
    return "-".join(part for part in ("llmdoctor", words, stamp) if part) + f".{kind}"


def write(path: Path, text: str) -> Path:
    """Write the file atomically; StorageError where that fails. Returns the path."""
    from llmdoctor.files import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def without_fonts(svg: str) -> str:
    """Textual's picture without the fonts that it would fetch from the network, every space kept."""
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("<text ", '<text xml:space="preserve" ')
