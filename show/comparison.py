"""A comparison prepared for any form of showing it: plain text, terminal, page, app."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from llmdoctor.show.colours import scale_colour
from llmdoctor.show.formats import settings_text, speaking_text, token_text
from llmdoctor.show.lens import DEFAULT_LENS, Lens, lens_limit, lens_scores
from llmdoctor.show.text import clean, trimmed
from llmdoctor.show.word_diff import WordDiff, cut_at_spans, word_diff

if TYPE_CHECKING:
    from llmdoctor.records import Comparison

MarkedText = list[tuple[str, bool]]  # a text in parts, each with whether the other side lacks it


class MarkedToken(NamedTuple):
    """A guided token: its text, its colour as #rrggbb or None, its numbers in a line."""

    text: MarkedText
    colour: str | None
    numbers: str


@dataclass(frozen=True, slots=True)
class View:
    """Cleaned texts, their word diff, and one score per guided token."""

    comparison: "Comparison"
    patient: str
    guided: tuple[str, ...]
    diff: WordDiff
    lens: Lens
    doctor: str | None
    scores: tuple[float | None, ...]
    marked: bool = False  # whether differing words are marked

    @classmethod
    def of(
        cls, comparison: "Comparison", lens: Lens = DEFAULT_LENS, doctor: str | None = None, *, diff: bool = False
    ) -> "View":
        """``doctor`` is the one whose opinion colours the tokens; by default the first with a beta above 0."""
        betas: Mapping[str, float] = comparison.settings["betas"]
        doctor = doctor or next((name for name, beta in betas.items() if beta > 0), next(iter(betas), None))
        tokens = comparison.guided.tokens
        pieces = trimmed([clean(token.text) for token in tokens] or [clean(comparison.guided.text)])
        patient = clean(comparison.patient.text).strip()
        scores = lens_scores(tokens, lens, doctor)
        # two separately drawn answers share few words: marks would be nearly everywhere, so they are asked for
        words = word_diff(patient, "".join(pieces)) if diff else WordDiff((), (), 0, 0, 0)
        return cls(comparison, patient, tuple(pieces), words, lens, doctor, tuple(scores), diff)

    @property
    def prompt(self) -> str:
        """The question, or the turns of the conversation."""
        prompt = self.comparison.prompt
        text = clean(prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt))
        return f"turn {self.comparison.turn}: {text}" if self.comparison.turn > 1 else text

    @property
    def heading(self) -> str:
        """What made the guided answer."""
        return f"guided by {speaking_text(self.comparison.settings['betas'])}"

    @property
    def limit(self) -> float:
        """The end of the colour scale, the same for every answer."""
        return lens_limit(self.lens)

    def summary(self) -> tuple[str, str]:
        """What changed, and the settings."""
        m, diff = self.comparison.metrics, self.diff
        words = f"{diff.removed} word{'' if diff.removed == 1 else 's'} removed, {diff.added} added, {diff.kept} kept; "
        changed = (
            f"guidance changed the likeliest token at {m['flips']} of {m['guided_tokens']} places; "
            f"{words if self.marked else ''}"
            f"KL {m['kl']:.1f} nats ({m['kl_per_token']:.2f} per token)"
        )
        return changed, settings_text(self.comparison.settings)

    def marked_patient(self) -> MarkedText:
        """The patient's text, cut wherever a difference begins or ends."""
        return list(cut_at_spans(self.patient, 0, self.diff.removed_spans))

    def marked_guided(self) -> Iterator[MarkedToken]:
        """The guided tokens, each cut wherever a difference begins or ends."""
        tokens = self.comparison.guided.tokens
        start = 0
        for i, piece in enumerate(self.guided):
            # An answer that came without tokens is one piece without a score.
            score = self.scores[i] if i < len(self.scores) else None
            colour = None if score is None else scale_colour(score, self.limit)
            numbers = token_text(tokens[i]) if i < len(tokens) else ""
            yield MarkedToken(list(cut_at_spans(piece, start, self.diff.added_spans)), colour, numbers)
            start += len(piece)
