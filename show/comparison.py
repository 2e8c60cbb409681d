"""A comparison prepared for any form of showing it: plain text, terminal, page, app."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

from llmdoctor.show.colours import scale_colour
from llmdoctor.show.formats import counted, settings_text, speaking_text, token_text
from llmdoctor.show.lens import DEFAULT_LENS, Lens, lens_limit, lens_scores
from llmdoctor.show.text import clean, trimmed, visible
from llmdoctor.show.word_diff import Span, WordDiff, cut_at_spans, word_diff

if TYPE_CHECKING:
    from llmdoctor.records import Comparison, GuidedToken

Mark = Literal["", "del", "ins"]
MarkedText = list[tuple[str, Mark]]  # a text in parts: what only the left side has, what only the right side has


class MarkedToken(NamedTuple):
    """A guided token: its text, its colour as #rrggbb or None, its numbers in a line."""

    text: MarkedText
    colour: str | None
    numbers: str


@dataclass(frozen=True, slots=True)
class View:
    """Cleaned texts, their word diff, and one score per guided token; ``others`` are the same for further columns."""

    comparison: "Comparison"
    patient: str
    guided: tuple[str, ...]
    diff: WordDiff
    lens: Lens
    doctor: str | None
    scores: tuple[float | None, ...]
    marked: bool = False  # whether differing words are marked
    followed: bool = False  # whether what the patient alone would have said is shown where it is something else
    name: str = ""  # of a further column: what differs from the first guided one
    others: "tuple[View, ...]" = ()

    @classmethod
    def of(
        cls,
        comparison: "Comparison",
        lens: Lens = DEFAULT_LENS,
        doctor: str | None = None,
        *,
        diff: bool = False,
        follow: bool = False,
    ) -> "View":
        """``doctor`` is the one whose opinion colours the tokens; by default the first with a beta above 0."""
        first, *others = (cls._of(one, lens, doctor, diff, follow) for one in comparison.columns())
        named = (replace(view, name=one.name) for view, one in zip(others, comparison.vs, strict=True))
        return replace(first, others=tuple(named))

    @classmethod
    def _of(cls, comparison: "Comparison", lens: Lens, doctor: str | None, diff: bool, follow: bool) -> "View":
        betas: Mapping[str, float] = comparison.settings["betas"]
        if doctor not in betas:
            doctor = next((name for name, beta in betas.items() if beta > 0), next(iter(betas), None))
        tokens = comparison.guided.tokens
        pieces = trimmed([clean(token.text) for token in tokens] or [clean(comparison.guided.text)])
        patient = clean(comparison.patient.text).strip()
        scores = lens_scores(tokens, lens, doctor)
        # two separately drawn answers share few words: marks would be nearly everywhere, so they are asked for
        words = word_diff(patient, "".join(pieces)) if diff else WordDiff((), (), 0, 0, 0)
        return cls(comparison, patient, tuple(pieces), words, lens, doctor, tuple(scores), diff, follow)

    @property
    def columns(self) -> "tuple[View, ...]":
        """A view for every guided answer."""
        return (self, *self.others)

    @property
    def prompt(self) -> str:
        """The question, or the turns of the conversation."""
        prompt = self.comparison.prompt
        text = clean(prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt))
        return f"turn {self.comparison.turn}: {text}" if self.comparison.turn > 1 else text

    @property
    def heading(self) -> str:
        """What made the guided answer."""
        guided = f"guided by {speaking_text(self.comparison.settings['betas'])}"
        return f"{clean(self.name)}: {guided}" if self.name else guided

    @property
    def limit(self) -> float:
        """The end of the colour scale, the same for every answer."""
        return lens_limit(self.lens)

    def summary(self) -> tuple[str, str]:
        """What changed, and the settings."""
        m, diff = self.comparison.metrics, self.diff
        words = f"{counted(diff.removed, 'word')} removed, {diff.added} added, {diff.kept} kept; "
        away = f"it led away from the patient's own token at {sum(map(_led_away, self.comparison.guided.tokens))}; "
        changed = (
            f"guidance changed the likeliest token at {m['flips']} of {counted(m['guided_tokens'], 'place')}; "
            f"{away if self.followed else ''}{words if self.marked else ''}"
            f"KL {m['kl']:.1f} nats ({m['kl_per_token']:.2f} per token)"
        )
        return changed, settings_text(self.comparison.settings)

    def legend(self) -> str:
        """What the marks mean, in words; nothing where there are none."""
        left = "only on the left" if not self.others else "not in the first guided answer"
        meanings = [f"struck: {left}; underlined: not in the patient's answer"] if self.marked else []
        if self.followed:
            meanings.append(
                "struck, then underlined: what the patient would have said after the same text, and what was said"
            )
        return "; ".join(meanings)

    def marked_patient(self) -> MarkedText:
        """The patient's text, cut wherever a difference begins or ends."""
        return _marked(self.patient, 0, self.diff.removed_spans, "del")

    def marked_guided(self) -> Iterator[MarkedToken]:
        """The guided tokens, each cut wherever a difference begins or ends, or behind what the patient would say."""
        tokens = self.comparison.guided.tokens
        start = 0
        for i, piece in enumerate(self.guided):
            # An answer that came without tokens is one piece without a score.
            score = self.scores[i] if i < len(self.scores) else None
            colour = None if score is None else scale_colour(score, self.limit)
            numbers = token_text(tokens[i]) if i < len(tokens) else ""
            if self.followed and i < len(tokens) and _led_away(tokens[i]):
                text = _followed(piece, tokens[i].patient_text)
            else:
                text = _marked(piece, start, self.diff.added_spans, "ins")
            yield MarkedToken(text, colour, numbers)
            start += len(piece)

    def guided_text(self) -> MarkedText:
        """The guided answer, cut wherever a mark begins or ends."""
        parts: MarkedText = []
        for text, mark in (part for token in self.marked_guided() for part in token.text):
            if parts and parts[-1][1] == mark:
                parts[-1] = (parts[-1][0] + text, mark)
            else:
                parts.append((text, mark))
        return parts


def _led_away(token: "GuidedToken") -> bool:
    """Whether the patient alone would have said something else."""
    return token.patient_id not in (-1, token.id)


def _marked(text: str, start: int, spans: Sequence[Span], mark: Mark) -> MarkedText:
    return [(part, mark if inside else "") for part, inside in cut_at_spans(text, start, spans)]


def _followed(said: str, instead: str) -> MarkedText:
    """``instead`` struck, then what was said, behind the space that both begin with."""
    said, instead = visible(said).replace("⏎", "⏎\n"), visible(instead)
    space = " " if said[0] == instead[0] == " " and len(said) > 1 < len(instead) else ""
    return [(space, ""), (instead[len(space) :], "del"), (said[len(space) :], "ins")]
