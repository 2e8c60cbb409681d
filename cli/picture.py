"""What a terminal shows, as an SVG picture."""

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


def svg(renderables: Iterable["RenderableType"], title: str, width: int = 110) -> str:
    """The renderables as a terminal of ``width`` columns shows them. The picture fetches no font from the network."""
    from rich._export_format import CONSOLE_SVG_FORMAT

    from llmdoctor.cli.clean_console import CleanConsole

    console = CleanConsole(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for renderable in renderables:
        console.print(renderable)
    fontless = re.sub(r"@font-face \{\{.*?\}\}|<!--.*?-->", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    # Without an id of its own, rich derives one from the content: every change would then rename every style.
    drawn = console.export_svg(title=title, code_format=fontless, unique_id="llmdoctor")
    return drawn.replace("<text ", '<text xml:space="preserve" ')  # a token may begin with a space
