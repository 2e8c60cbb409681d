"""``llmdoctor compare --sweep``: measures of the guided answers, which need no judge, over settings."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from llmdoctor.cli.compare_columns import Models, Plan
from llmdoctor.cli.compare_files import Forms
from llmdoctor.cli.measures_table import by_setting, counts_text, markdown_table, text_table
from llmdoctor.cli.sweep_chart import Point, settings_of, svg_sweep
from llmdoctor.cli.terminal import put, put_json, write_file
from llmdoctor.show.page import sweep_page

if TYPE_CHECKING:
    from llmdoctor.cli.kept_run import KeptRun
    from llmdoctor.comparing import Column, Run


def sweep(
    points: Sequence[Mapping[str, str]], plans: Sequence[Plan], models: Models, kept: "KeptRun", forms: Forms
) -> None:
    """Measure the answers at every point, print the table, and write the pages."""
    found = []
    for values, column in zip(points, models.columns(plans, kept), strict=True):
        with kept.asking():
            found.append(measured(kept.run, values, column))
        if forms.jsonl:
            put_json(found[-1])
    settings = list(points[0])
    prompts, answers = len(kept.run.questions), sum(1 for _ in kept.run.keys(""))
    heading = f"{counts_text(prompts, answers, 'per point')}, seed {kept.run.seed} (95% intervals)"
    title = settings[0] if len(settings) == 1 else ""
    header, rows = by_setting(title, [(settings_of(point), point["measures"]) for point in found])
    if forms.as_json:
        put_json({"sweep": settings, "prompts": prompts, "answers": answers, "seed": kept.run.seed, "points": found})
    elif not forms.jsonl:
        put(f"{heading}\n{text_table(header, rows)}")
    if forms.html:
        write_file(forms.html, sweep_page(heading, header, rows, svg_sweep(found, heading, alone=False)))
    if forms.svg:
        write_file(forms.svg, svg_sweep(found, heading))
    if forms.markdown:
        write_file(forms.markdown, f"{heading}\n\n{markdown_table(header, rows)}")


def measured(run: "Run", values: Mapping[str, str], column: "Column") -> Point:
    """Answer all questions at one point; what is measured there.

    The point is {"point": {setting: value}, "settings", "measures": {name: {"value", "low", "high"}}}.
    """
    from llmdoctor.answers import estimates_to_dict

    return {
        "point": {name: _number(value) for name, value in values.items()},
        "settings": column.settings(column.seed(run.seed, 1)),
        "measures": estimates_to_dict(run.measures(column)),
    }


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
