"""Token rewards on stdout: heatmaps on a terminal, else plain text with signs. Blue is rewarded, orange punished."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from llmdoctor.show.colours import heat_style
from llmdoctor.show.rewards import RewardedText, ShownPair, limits_of
from llmdoctor.show.text import clean, prompt_end

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_ROOM_FOR_TWO = 80  # columns needed to show responses side by side


def plain_heatmap(prompt: str, responses: Iterable[RewardedText]) -> str:
    """The responses with a + or - after every token that is marked: by its reward, or by its raw gap or probe."""
    lines = [f"prompt: {clean(prompt)}"]
    for response in responses:
        marked = "".join(
            _with_sign(piece, reward) for piece, reward in zip(response.shown(), response.marks, strict=True)
        )
        lines += ["", f"{response.title}:", marked.strip()]
    return "\n".join(lines)


def _with_sign(piece: str, reward: float) -> str:
    if reward == 0:
        return piece
    body = piece.rstrip()  # the sign follows the word, not its space or newline
    return f"{body}{'+' if reward > 0 else '-'}{piece[len(body) :]}"


def rich_heatmap(
    prompt: str, responses: Sequence[RewardedText], width: int, limits: Mapping[str, float] | None = None
) -> "RenderableType":
    """The responses, every marked token on its colour, side by side if ``width`` columns suffice.

    ``limits`` are the ends of the colour scales (`limits_of`), by default the greatest numbers shown.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    limits = limits or limits_of([ShownPair("", prompt, tuple(responses))])
    texts = []
    for response in responses:
        text = Text()
        for piece, reward in zip(response.shown(), response.marks, strict=True):
            text.append(piece, style=heat_style(reward, limits[response.shows]))
        texts.append(text)
    table = Table(box=box.ROUNDED, expand=True, title=Text(prompt_end(prompt), style="bold"), title_justify="left")
    if width >= _ROOM_FOR_TWO:
        for response in responses:
            table.add_column(Text(response.title), ratio=1)
        table.add_row(*texts)
    else:
        table.show_header = False
        table.add_column(ratio=1)
        for response, text in zip(responses, texts, strict=True):
            table.add_row(Text.assemble((response.title, "bold"), "\n", text), end_section=True)
    return table


_LEGEND = {
    "reward": ("punished", "rewarded; unmarked: no reward"),
    "gap": ("raw gap, nats:", "likelier under the positive face; unmarked: below a tenth of it"),
    "probe": ("probe, log-odds:", "speaks for the answer; unmarked: below a tenth of it"),
}


def heat_legend(limits: Mapping[str, float]) -> "Text":
    """What the colours of heatmaps mean, in one line for each number shown."""
    from rich.text import Text

    text = Text(style="dim")
    for shows, limit in limits.items():
        low, high = _LEGEND[shows]
        text.append(f"{chr(10) if text else ''}{low} {-limit:.2g} ")
        for share in (-1.0, -0.6, -0.3, 0.3, 0.6, 1.0):
            text.append("   ", style=f"not dim {heat_style(share, 1)}")
        text.append(f" {limit:+.2g} {high}")
    return text
