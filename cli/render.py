"""Frozen records to what a screen shows: token colours, side by side, word diff, heatmap, legend. No tensors, no loops.

The colour scale runs from orange (low) over grey to blue (high), so that it can be told apart with any colour vision,
and every colour on it is equally light, so that text in it reads on a dark and on a bright terminal.
"""

import difflib
import html
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from llmdoctor.cli.terminal import clean

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

    from llmdoctor.records import Comparison, GuidedToken

Lens = Literal["value", "ratio", "kl", "flips", "off"]
LENSES: tuple[str, ...] = get_args(Lens)
Span = tuple[int, int]
Colour = tuple[int, int, int]

_LOW, _MIDDLE, _HIGH = (0xCC, 0x5F, 0x00), (0x7D, 0x7D, 0x7D), (0x20, 0x7F, 0xEA)
_REMOVED, _ADDED, _DIM = "strike", "underline", "dim"
_NARROW = 80


# Token colours


def lens_scores(tokens: Sequence["GuidedToken"], lens: Lens, doctor: str | None) -> list[float | None]:
    """What the lens shows of every token: log V, log(doctor / patient), KL, 1 for a flip; None is uncoloured."""
    match lens:
        case "value":
            return [token.values.get(doctor or "") for token in tokens]
        case "ratio":
            return [_ratio(token, doctor or "") for token in tokens]
        case "kl":
            return [token.kl for token in tokens]
        case "flips":
            return [1.0 if token.flip else None for token in tokens]
        case "off":
            return [None] * len(tokens)


def _ratio(token: "GuidedToken", doctor: str) -> float | None:
    own = token.doctor_logprobs.get(doctor)
    return None if own is None else own - token.patient_logprob


def scale_limit(scores: Iterable[float | None]) -> float:
    """The end of the colour scale: the greatest absolute score, 1 where there is none."""
    return max((abs(score) for score in scores if score), default=1.0)


def scale_colour(score: float, limit: float, colours: Sequence[Colour] = (_LOW, _MIDDLE, _HIGH)) -> str:
    """The colour of a score in [-limit, limit] as #rrggbb: orange at the low end, grey at 0, blue at the high end.

    ``colours`` are other ones for low end, 0 and high end.
    """
    low, middle, high = colours
    share = min(1.0, abs(score) / limit) if limit > 0 and math.isfinite(score) else 0.0
    end = high if score > 0 else low
    # mixed as light, not as numbers of a screen: colours of equal luminance then mix to that luminance
    mixed = [(a**2.2 * (1 - share) + b**2.2 * share) ** (1 / 2.2) for a, b in zip(middle, end, strict=True)]
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


# Word diff


@dataclass(frozen=True, slots=True)
class WordDiff:
    """Which words of two texts differ: spans of characters, consecutive words joined, and counts of words."""

    removed_spans: tuple[Span, ...]
    added_spans: tuple[Span, ...]
    removed: int
    added: int
    kept: int


def word_diff(before: str, after: str) -> WordDiff:
    """The words of ``before`` that ``after`` lacks, and the other way round, in order."""
    old, new = ([match.span() for match in re.finditer(r"\S+", text)] for text in (before, after))
    old_words, new_words = [before[a:b] for a, b in old], [after[a:b] for a, b in new]
    changes = difflib.SequenceMatcher(None, old_words, new_words, autojunk=False).get_opcodes()
    differing = [change for change in changes if change[0] != "equal"]
    return WordDiff(
        removed_spans=tuple((old[i][0], old[j - 1][1]) for _, i, j, _, _ in differing if j > i),
        added_spans=tuple((new[i][0], new[j - 1][1]) for _, _, _, i, j in differing if j > i),
        removed=sum(j - i for _, i, j, _, _ in differing),
        added=sum(j - i for _, _, _, i, j in differing),
        kept=sum(j - i for kind, i, j, _, _ in changes if kind == "equal"),
    )


def mark_words(text: str, spans: Iterable[Span], opening: str, closing: str) -> str:
    """The text with ``opening`` and ``closing`` around every span, as wdiff prints it."""
    for start, stop in reversed(list(spans)):
        text = f"{text[:start]}{opening}{text[start:stop]}{closing}{text[stop:]}"
    return text


# Comparison


@dataclass(frozen=True, slots=True)
class View:
    """A comparison prepared for showing: cleaned texts, their word diff, and the score of every guided token."""

    comparison: "Comparison"
    patient: str
    guided: tuple[str, ...]
    diff: WordDiff
    lens: Lens
    doctor: str | None
    scores: tuple[float | None, ...]

    @classmethod
    def of(cls, comparison: "Comparison", lens: Lens = "value", doctor: str | None = None) -> "View":
        """``doctor`` is the one whose opinion colours the tokens; None takes the first that speaks."""
        betas: Mapping[str, float] = comparison.settings["betas"]
        doctor = doctor or next((name for name, beta in betas.items() if beta > 0), next(iter(betas), None))
        tokens = comparison.guided.tokens
        pieces = _trimmed([clean(token.text) for token in tokens] or [clean(comparison.guided.text)])
        patient = clean(comparison.patient.text).strip()
        scores = lens_scores(tokens, lens, doctor)
        return cls(comparison, patient, tuple(pieces), word_diff(patient, "".join(pieces)), lens, doctor, tuple(scores))

    @property
    def prompt(self) -> str:
        """The question, or the turns of the conversation."""
        prompt = self.comparison.prompt
        return clean(prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt))

    @property
    def heading(self) -> str:
        """What made the right-hand answer."""
        named = betas_text(self.comparison.settings["betas"], " ")
        return f"guided by {named}" if named else "guided by no doctor"

    @property
    def limit(self) -> float:
        """The end of the colour scale of this answer."""
        return scale_limit(self.scores)

    def summary(self) -> tuple[str, str]:
        """What changed, and at which settings."""
        m, diff = self.comparison.metrics, self.diff
        changed = (
            f"{m['flips']} of {m['guided_tokens']} tokens are not the patient's first choice; "
            f"{diff.removed} word{'' if diff.removed == 1 else 's'} removed, {diff.added} added, {diff.kept} kept; "
            f"KL {m['kl']:.1f} nats ({m['kl_per_token']:.2f} a token)"
        )
        return changed, settings_text(self.comparison.settings)


def _trimmed(pieces: Sequence[str]) -> list[str]:
    """The pieces without the white space around the whole text."""
    text = "".join(pieces)
    start, stop = len(text) - len(text.lstrip()), len(text.rstrip())
    trimmed, at = [], 0
    for piece in pieces:
        trimmed.append(piece[max(0, start - at) : max(0, stop - at)])
        at += len(piece)
    return trimmed


def betas_text(betas: Mapping[str, float], equals: str = "=") -> str:
    """``helpful=0.8 safe=0.4``; doctors that are silent are left out of the spelling with a space."""
    shown = betas.items() if equals == "=" else ((name, beta) for name, beta in betas.items() if beta > 0)
    return (" " if equals == "=" else ", ").join(f"{name}{equals}{beta:g}" for name, beta in shown)


def settings_text(settings: Mapping[str, Any]) -> str:
    """``alpha 1, beta helpful=0.8 safe=0.4, temperature 1, seed 1`` and what else is not at its neutral value."""
    parts = [f"alpha {settings['alpha']:g}"]
    if settings["betas"]:
        parts.append(f"beta {betas_text(settings['betas'])}")
    if settings.get("mode", "product") != "product":
        parts.append(f"mode {settings['mode']}")
        if settings.get("plausibility"):
            parts.append(f"plausibility {settings['plausibility']:g}")
        if zones := {name: width for name, width in settings.get("dead_zones", {}).items() if width}:
            parts.append(f"dead zone {betas_text(zones)}")
    parts.append("greedy" if settings["temperature"] == 0 else f"temperature {settings['temperature']:g}")
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    parts += [
        f"{key.replace('_', '-')} {settings[key]:g}"
        for key, value in neutral.items()
        if settings.get(key, value) != value
    ]
    if settings.get("seed") is not None:
        parts.append(f"seed {settings['seed']}")
    return ", ".join(parts)


def plain_comparison(view: View) -> str:
    """The two answers one below the other, differing words in wdiff's marks."""
    return "\n".join(
        [
            f"prompt: {view.prompt}",
            "",
            "patient alone:",
            mark_words(view.patient, view.diff.removed_spans, "[-", "-]"),
            "",
            f"{view.heading}:",
            mark_words("".join(view.guided), view.diff.added_spans, "{+", "+}"),
            "",
            *view.summary(),
        ]
    )


def rich_comparison(view: View, width: int) -> "RenderableType":
    """The two answers in panels, side by side where there is room, with legend and summary below."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    patient = Text(view.patient)
    for span in view.diff.removed_spans:
        patient.stylize(_REMOVED, *span)
    guided = coloured_text(view.guided, view.scores, view.limit)
    for span in view.diff.added_spans:
        guided.stylize(_ADDED, *span)
    table = Table(box=box.ROUNDED, expand=True, title=Text(view.prompt, style="bold"), title_justify="left")
    if width >= _NARROW:
        table.add_column("patient alone", ratio=1)
        table.add_column(Text(view.heading), ratio=1)
        table.add_row(patient, guided)
    else:
        table.show_header = False
        table.add_column(ratio=1)
        table.add_row(Group(Text("patient alone", style="bold"), patient), end_section=True)
        table.add_row(Group(Text(view.heading, style="bold"), guided))
    return Group(table, legend(view), *(Text(line) for line in view.summary()))


def coloured_text(pieces: Sequence[str], scores: Sequence[float | None], limit: float) -> "Text":
    """The pieces joined, each in the colour of its score."""
    from rich.text import Text

    text = Text()
    for piece, score in zip(pieces, scores, strict=False):
        text.append(piece, style=None if score is None else scale_colour(score, limit))
    return text


def legend(view: View) -> "Text":
    """What colours and marks mean, in one line."""
    from rich.text import Text

    text = Text(style=_DIM)
    text.append("struck: only on the left", style=_REMOVED)
    text.append("   ")
    text.append("underlined: only on the right", style=_ADDED)
    if view.lens == "off" or not view.scores:
        return text
    if view.lens == "flips":
        return text.append("   ").append("not the patient's first choice", style=f"not dim {scale_colour(1, 1)}")
    names = {
        "value": f"log V of {view.doctor}",
        "ratio": f"log {view.doctor}/patient",
        "kl": "KL to the patient, nats",
    }
    lows = (0.0, 0.5, 1.0) if view.lens == "kl" else (-1.0, -0.5, 0.0, 0.5, 1.0)
    text.append(f"   {names[view.lens]}: {view.limit * lows[0]:.2g} ")
    for share in lows:
        text.append("━━", style=f"not dim {scale_colour(share, 1)}")
    return text.append(f" {view.limit:+.2g}")


# Heatmap of token rewards


@dataclass(frozen=True, slots=True)
class RewardedText:
    """A response as inspect shows it: printable pieces, their rewards, and where known gaps (nats) and importances."""

    title: str
    pieces: tuple[str, ...]
    rewards: tuple[float, ...]
    gaps: tuple[float, ...] = ()
    importance: tuple[float, ...] = ()

    def shown(self) -> list[str]:
        """The pieces without control characters; one without text, like the end of the answer, shows where it earns."""
        marked = zip(self.pieces, self.rewards, strict=True)
        return [clean(piece) or ("" if reward == 0 else END) for piece, reward in marked]


END = "∎"
_PROMPT_SHOWN = 400  # characters of a conversation above a heatmap: its end, which is what the answers answer


def prompt_end(prompt: str) -> str:
    """The prompt, or the end of a long one, for a terminal."""
    prompt = clean(prompt).strip()
    return prompt if len(prompt) <= _PROMPT_SHOWN else f"… {prompt[-_PROMPT_SHOWN:].lstrip()}"


def plain_heatmap(prompt: str, responses: Iterable[RewardedText]) -> str:
    """The responses with a + or - after every token that has a reward."""
    lines = [f"prompt: {clean(prompt)}"]
    for response in responses:
        marked = "".join(
            _with_sign(piece, reward) for piece, reward in zip(response.shown(), response.rewards, strict=True)
        )
        lines += ["", f"{response.title}:", marked.strip()]
    return "\n".join(lines)


def _with_sign(piece: str, reward: float) -> str:
    if reward == 0:
        return piece
    body = piece.rstrip()
    return f"{body}{'+' if reward > 0 else '-'}{piece[len(body) :]}"


def rich_heatmap(
    prompt: str, responses: Sequence[RewardedText], width: int, limit: float | None = None
) -> "RenderableType":
    """The responses beside each other, every rewarded token on the colour of its reward.

    Black on a colour of medium light: foreground and background are both given, so that the terminal's own do not
    matter. ``limit`` is the end of the colour scale, by default the greatest reward shown.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    limit = limit or scale_limit(reward for response in responses for reward in response.rewards)
    texts = []
    for response in responses:
        text = Text()
        for piece, reward in zip(response.shown(), response.rewards, strict=True):
            text.append(piece, style=heat_style(reward, limit))
        texts.append(text)
    table = Table(box=box.ROUNDED, expand=True, title=Text(prompt_end(prompt), style="bold"), title_justify="left")
    if width >= _NARROW:
        for response in responses:
            table.add_column(Text(response.title), ratio=1)
        table.add_row(*texts)
    else:
        table.show_header = False
        table.add_column(ratio=1)
        for response, text in zip(responses, texts, strict=True):
            table.add_row(Text.assemble((response.title, "bold"), "\n", text), end_section=True)
    return table


def heat_style(reward: float, limit: float) -> str:
    """The style of a token with this reward; none where it has no reward."""
    return f"#000000 on {scale_colour(reward, limit)}" if reward else ""


def heat_legend(limit: float) -> "Text":
    """What the colours of heatmaps mean, in one line."""
    from rich.text import Text

    text = Text(f"punished {-limit:.2g} ", style=_DIM)
    for share in (-1.0, -0.6, -0.3, 0.3, 0.6, 1.0):
        text.append("   ", style=f"not dim {heat_style(share, 1)}")
    return text.append(f" {limit:+.2g} rewarded; unmarked: no reward")


# Files


def svg(renderables: Iterable["RenderableType"], title: str, width: int = 110) -> str:
    """The renderables as they look on a terminal, as a picture that fetches no font from the network."""
    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console

    console = Console(
        record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor", highlight=False
    )
    for renderable in renderables:
        console.print(renderable, markup=False, emoji=False)
    fontless = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    drawn = console.export_svg(title=title, code_format=fontless, unique_id="llmdoctor")
    return drawn.replace("<text ", '<text xml:space="preserve" ')  # a token may begin with a space


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>llmdoctor compare</title>
<style>
body {{ font: 16px/1.6 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }}
body {{ color: #1b1b1b; background: #fdfdfd }}
.sides {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem }}
.sides section {{ border: 1px solid #8886; border-radius: .5rem; padding: 0 1rem 1rem }}
.answer {{ white-space: pre-wrap; overflow-wrap: anywhere }}
del {{ opacity: .7 }}
ins {{ text-decoration-thickness: 1px; text-underline-offset: 3px }}
h2 {{ font-size: 1.2rem }} h3 {{ font-size: 1rem }} p.note {{ opacity: .75; font-size: .9rem }}
@media (prefers-color-scheme: dark) {{ body {{ color: #e6e6e6; background: #141414 }} }}
</style>
{body}
</html>
"""


def html_page(views: Iterable[View]) -> str:
    """A self-contained page without scripts; hovering over a token shows its numbers."""
    return _PAGE.format(body="\n".join(map(_html_comparison, views)))


def _html_comparison(view: View) -> str:
    patient = "".join(
        f"<del>{html.escape(text)}</del>" if marked else html.escape(text)
        for text, marked in _cut(view.patient, 0, view.diff.removed_spans)
    )
    changed, settings = (html.escape(line) for line in view.summary())
    lens = "" if view.lens == "off" else f" Colour: {view.lens}{f' ({view.doctor})' if view.doctor else ''}."
    guided = "".join(_html_tokens(view))
    return (
        f"<h2>{html.escape(view.prompt)}</h2>\n<div class=sides>\n"
        f"<section><h3>patient alone</h3><div class=answer>{patient}</div></section>\n"
        f"<section><h3>{html.escape(view.heading)}</h3><div class=answer>{guided}</div></section>\n"
        f"</div>\n<p>{changed}<br>{settings}</p>\n"
        "<p class=note>Struck: only on the left. Underlined: only on the right."
        f"{html.escape(lens)}</p>"
    )


def _html_tokens(view: View) -> Iterator[str]:
    tokens = view.comparison.guided.tokens
    start = 0
    for i, piece in enumerate(view.guided):
        score = view.scores[i] if i < len(view.scores) else None
        colour = "" if score is None else f' style="color:{scale_colour(score, view.limit)}"'
        title = html.escape(_numbers(tokens[i]), quote=True) if i < len(tokens) else ""
        inner = "".join(
            f"<ins>{html.escape(text)}</ins>" if marked else html.escape(text)
            for text, marked in _cut(piece, start, view.diff.added_spans)
        )
        start += len(piece)
        yield f'<span{colour} title="{title}">{inner}</span>'


def _numbers(token: "GuidedToken") -> str:
    parts = [f"patient {token.patient_logprob:.2f}"]
    parts += [f"{name} {logprob:.2f}" for name, logprob in token.doctor_logprobs.items()]
    parts += [f"guided {token.logprob:.2f}", f"KL {token.kl:.2f}"]
    parts += [f"log V of {name} {value:.2f}" for name, value in token.values.items()]
    return ", ".join(parts) + (", not the patient's first choice" if token.flip else "")


def _cut(text: str, start: int, spans: Sequence[Span]) -> Iterator[tuple[str, bool]]:
    """The text, which begins at character ``start`` of the whole, in pieces that lie inside or outside the spans."""
    inside = [any(a <= start + i < b for a, b in spans) for i in range(len(text))]
    begin = 0
    for i in range(1, len(text) + 1):
        if i == len(text) or inside[i] != inside[begin]:
            yield text[begin:i], inside[begin]
            begin = i
