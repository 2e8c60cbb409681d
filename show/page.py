"""Results as web pages: self-contained, without scripts. The templates are the ``.html`` files beside this one."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmdoctor.show import statistics as prepared
from llmdoctor.show.colours import scale_colour
from llmdoctor.show.lens import lens_name
from llmdoctor.show.rewards import ShownPair, limits_of
from llmdoctor.show.text import clean

if TYPE_CHECKING:
    from jinja2 import Environment

    from llmdoctor.show.comparison import View
    from llmdoctor.token_rewards.summary import Statistics

_LEGEND = (-1.0, -0.6, -0.3, 0.3, 0.6, 1.0)


def comparisons_page(views: Iterable["View"], summary: str = "") -> str:
    """Comparisons below each other, then a summary in plain text; hovering over a token shows its numbers."""
    return _templates().get_template("comparisons.html").render(views=views, summary=summary)


def sweep_page(heading: str, header: Sequence[str], rows: Sequence[Sequence[str]], picture: str) -> str:
    """A sweep as a table and a picture. ``picture`` is an SVG element and goes into the page as it is."""
    from markupsafe import Markup

    shown = {"heading": heading, "header": header, "rows": rows, "picture": Markup(picture)}
    return _templates().get_template("sweep.html").render(**shown)


def rewards_page(
    pairs: Sequence[ShownPair],
    *,
    heading: Sequence[str] = (),
    statistics: "Statistics | None" = None,
    diagnosis: str = "",
) -> str:
    """Heatmaps on one colour scale, hovering over a token shows its numbers; above them what is given.

    ``heading`` is lines of text, ``diagnosis`` is HTML and goes into the page as it is.
    """
    return (
        _templates()
        .get_template("rewards.html")
        .render(
            pairs=pairs,
            limits={"reward": 1.0, **limits_of(pairs)},
            legend=_LEGEND,
            heading=heading,
            statistics=statistics,
            facts=statistics and prepared.overall_facts(statistics),
            bars=statistics and prepared.gap_bars(statistics),
            diagnosis=diagnosis,
        )
    )


def evaluation_page(subject: str, tables: Sequence[Any], picture: str) -> str:
    """What ``eval`` found: who was evaluated, the parts of the report, and an SVG that goes into the page as it is.

    Each of ``tables`` has a ``heading``, ``titles``, ``rows`` of cells, and ``notes``.
    """
    page = _templates().get_template("evaluation.html")
    return page.render(subject=subject, tables=tables, picture=picture)


@lru_cache(maxsize=1)
def _templates() -> "Environment":
    """The templates. Every text they print is cleaned of control characters, then escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def finalize(value: Any) -> Any:
        return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["colour"] = scale_colour
    made.globals["lens_name"] = lens_name
    return made
