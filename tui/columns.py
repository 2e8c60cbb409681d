"""Several settings beside each other: what ``/compare`` names, and the answers of each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmdoctor.errors import UsageError
from llmdoctor.records import Speaker
from llmdoctor.sessions import MOST_COLUMNS, Compared, End, Reply, SavedComparison, Turn, messages
from llmdoctor.set_command import parse_settings
from llmdoctor.settings import Guidance, Sampling
from llmdoctor.show.formats import speaking_text
from llmdoctor.tui.conversation import LiveReply
from llmdoctor.tui.current_settings import check_speaking
from llmdoctor.tui.generation import Part

MOST = MOST_COLUMNS - 1  # settings in one comparison: the patient alone stands beside them
EXAMPLES = "/compare beta=0.5 beta=2, or /compare helpful safe"


@dataclass
class Column:
    """One way to answer, with a conversation of its own: ``live`` is the answer that is being made to ``turns[-1]``.

    ``which`` is "patient" for the patient alone. ``turns`` hold the answers on that side only.
    """

    title: str
    which: Speaker
    guidance: Guidance
    sampling: Sampling
    turns: tuple[Turn, ...] = ()
    live: LiveReply | None = None

    def ask(self, number: int, prompt: str, seed: int) -> Part:
        """Begin a turn; what the worker needs to answer it as column ``number``."""
        past = messages(self.turns, self.which, prompt)
        self.turns = (*self.turns, Turn(prompt, seed, self.sampling, self.guidance))
        self.live = LiveReply(self.which, [], 0.0, [], [])
        fixed = None if self.which == "patient" else self.guidance
        own_seed = self.sampling if self.sampling.seed is not None else self.sampling.replace(seed=seed)
        return Part(self.which, past, column=number, guidance=fixed, sampling=own_seed)

    def settle(self, end: End) -> Reply | None:
        """The answer is over, for that reason unless it had come to its own end; None if there was none."""
        if self.live is None:
            return None
        cut = len(self.live.tokens) >= self.sampling.max_new_tokens
        own: End = "length" if cut else "done"
        reply = self.live.frozen(end if self.live.running and end != "done" else own)
        answered = replace(self.turns[-1], **{self.which: reply})  # type: ignore[arg-type]
        self.turns = (*self.turns[:-1], answered)
        self.live = None
        return reply

    def side(self, turn: int) -> LiveReply | Reply:
        """The answer to a turn, as far as it is."""
        if self.live is not None and turn == len(self.turns) - 1:
            return self.live
        return self.turns[turn].reply(self.which)


def columns_of(text: str, guidance: Guidance, sampling: Sampling, turns: Sequence[Turn] = ()) -> list[Column]:
    """The patient alone, and a column for every item of ``text``, all after ``turns``.

    An item changes the settings in use (``beta=0.5``, ``helpful=2,safe=0``); a doctor's name is that doctor alone. A
    single item stands beside the settings in use. Raises UsageError.
    """
    items = text.split()
    if not items:
        raise UsageError(f"/compare: expected settings or doctors, for example {EXAMPLES}")
    if len(items) > MOST:
        raise UsageError(f"/compare: expected at most {MOST} settings, got {len(items)}")
    past = tuple(turns)
    columns = [Column("patient alone", "patient", guidance, sampling, past)]
    if len(items) == 1:
        columns.append(Column(f"in use · {speaking_text(guidance.betas)}", "guided", guidance, sampling, past))
    return columns + [_column(item, guidance, sampling, past) for item in items]


def saved(columns: Sequence[Column], past: int, seed: int) -> SavedComparison:
    """The columns as they are kept with a conversation; ``past`` turns are from before the comparison."""
    own = [Compared(one.title, one.which, one.guidance, one.sampling, one.turns[past:]) for one in columns]
    return SavedComparison(columns[0].turns[:past], seed, tuple(own))


def restored(kept: SavedComparison) -> list[Column]:
    """The columns that were kept."""
    return [Column(one.title, one.which, one.guidance, one.sampling, kept.past + one.turns) for one in kept.columns]


def _column(item: str, guidance: Guidance, sampling: Sampling, turns: tuple[Turn, ...]) -> Column:
    doctors = tuple(guidance.betas)
    if item in doctors:
        guidance = _alone(item, guidance)
        return Column(f"{item} alone · beta {guidance.betas[item]:g}", "guided", guidance, sampling, turns)
    changes = []
    for change in item.split(","):
        if change in doctors:
            guidance = _alone(change, guidance)
        elif "=" not in change:
            known = f" or one of {', '.join(doctors)}" if doctors else ""
            raise UsageError(f"/compare: expected name=value{known}, got {change!r}")
        else:
            changes.append(change)
    if changes:
        guidance, sampling = parse_settings(" ".join(changes), doctors, guidance, sampling, command="/compare")
    check_speaking(guidance)
    return Column(f"{item} · {speaking_text(guidance.betas)}", "guided", guidance, sampling, turns)


def _alone(doctor: str, guidance: Guidance) -> Guidance:
    """Of the doctors only this one; with beta 1 if it has no say now."""
    return guidance.replace(betas={**dict.fromkeys(guidance.betas, 0.0), doctor: guidance.betas[doctor] or 1.0})
