"""The pictures of README and docs show what the program says today."""

import asyncio
import html
import re
from pathlib import Path

from typer.testing import CliRunner

from llmdoctor import LLMdoctor
from llmdoctor.answers import repeated_sentences
from llmdoctor.cli.main import app
from llmdoctor.tui.picture import picture

ROOT = Path(__file__).parents[2]
QUESTION = "How can I sleep better?"


def words(svg: Path) -> list[str]:
    """What a picture says, without what depends on the speed."""
    text = html.unescape(" ".join(re.findall(r">([^<>]+)</text>", svg.read_text(encoding="utf-8"))))
    return re.findall(r"[^\W\d_]+|\d+(?:\.\d+)?", re.sub(r"\d+/s|acceptance\s\d+%", "", text))


def test_the_picture_of_the_readme(tmp_path):
    asked = ["compare", QUESTION, "--seed", "5", "--svg", str(tmp_path / "now.svg")]
    assert " ".join(["llmdoctor", "compare", f'"{QUESTION}"', "--seed", "5"]) in (ROOT / "README.md").read_text()
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert words(ROOT / "docs" / "compare.svg") == words(tmp_path / "now.svg")


def test_the_picture_of_the_app(tmp_path):
    asyncio.run(picture(tmp_path / "now.svg", (150, 32), "textual-dark", None))
    assert words(ROOT / "docs" / "app.svg") == words(tmp_path / "now.svg")


def test_no_answer_in_a_picture_repeats_a_sentence():
    doctor = LLMdoctor.from_profile("clinic")
    for seed in (5, 2):  # of the README, of the app
        shown = doctor.compare(QUESTION, seed=seed)
        for answer in (shown.patient, shown.guided):
            assert repeated_sentences(answer.text)[0] == 0, answer.text
