"""README and docs are true: their snippets run, and every link, file, command, option and setting in them exists.

Blocks of ``sh`` and ``python`` run on the embedded models, in order and in one folder per page; a named block, as
``jsonl pairs.jsonl``, is a file there. A block whose first line begins with ``# Needs`` is only checked. ``text`` is a
transcript. ``python tests/test_documents.py`` prints the tables of settings for docs/profiles.md.
"""

import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import typer
import yaml
from typer.core import TyperGroup
from typer.testing import CliRunner

import llmdoctor
from llmdoctor.cli.main import app
from llmdoctor.profile import Profile, load_profile
from llmdoctor.schema import Settings
from llmdoctor.set_command import setting_names
from llmdoctor.token_rewards.pairs import read_pairs
from llmdoctor.tui.commands import COMMANDS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*PAGES, ROOT / "CONTRIBUTING.md"]
FOLDERS = ("benchmarks", "cli", "docs", "llmdoctor", "profiles", "show", "tests", "tui")
PROGRAM: Any = typer.main.get_command(app)
# what the pages ask of the shell besides llmdoctor, for a person to do
OTHER_PROGRAMS = {"curl", "pip", "make", "torchrun", "vllm", "accelerate", "python"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


class Block(NamedTuple):
    """A fenced block: its language, the name of the file that it is, its text and the line it begins at."""

    kind: str
    name: str
    text: str
    line: int

    @property
    def runs(self) -> bool:
        return not self.text.startswith("# Needs ")


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    made = [Block(m[1], m[2] or "", m[3], text[: m.start()].count("\n") + 2) for m in found]
    assert 2 * len(made) == len(re.findall("^ *```", text, re.MULTILINE)), f"{page.name}: a block without a language"
    return made


def commands(text: str) -> Iterator[list[str]]:
    """The lines of a shell block, as words."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def of_llmdoctor(words: list[str]) -> tuple[list[str], str | None]:
    """The arguments of llmdoctor in a command, and what is piped into it; none for another program."""
    given = None
    if words[0] == "echo":
        given, words = f"{words[1]}\n", words[words.index("|") + 1 :]
    for flag, name in pairwise(words):
        if (flag, name) == ("-m", "llmdoctor"):  # torchrun, accelerate launch
            words = words[words.index(name) :]
    return (words[1:] if words[0] == "llmdoctor" else []), given


def prose(page: Path) -> str:
    """The page without its blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def spans(page: Path) -> list[str]:
    """The inline code of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


# --- what is run -----------------------------------------------------------------------------------------------------


@each_page
def test_snippets_run_as_they_stand(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"XDG_CONFIG_HOME": tmp_path / "config", "LLMDOCTOR_SESSIONS": tmp_path / "sessions"}.items():
        monkeypatch.setenv(name, str(value))
    for name, value in {"MAX_NEW_TOKENS": 8, "MAX_STEPS": 2, "SPECULATION": False}.items():
        monkeypatch.setenv(f"LLMDOCTOR_{name}", str(value))
    known: dict[str, Any] = {}
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}, line {block.line}"
        if block.name:
            Path(block.name).write_text(block.text, encoding="utf-8")
        elif block.kind == "python" and block.runs:
            exec(compile(block.text, where, "exec"), known)
        elif block.kind == "sh" and block.runs:
            for words in commands(block.text):
                arguments, given = of_llmdoctor(words)
                if arguments and arguments != ["chat"]:  # the bare app needs a terminal
                    done = CliRunner().invoke(app, arguments, prog_name="llmdoctor", input=given)
                    assert done.exit_code == 0, f"{where}: {shlex.join(words)}\n{done.output}"


@each_page
def test_blocks_that_need_more_are_well_formed(page: Path) -> None:
    for block in blocks(page):
        where = f"{page.relative_to(ROOT)}, line {block.line}"
        match block.kind:
            case "python":
                compile(block.text, where, "exec")
            case "sh":
                for words in commands(block.text):
                    arguments, _ = of_llmdoctor(words)
                    assert arguments or words[0] in OTHER_PROGRAMS | {"llmdoctor"}, where
                    if arguments:
                        parsed(arguments, where)
            case "toml" | "text" | "yaml" | "jsonl":
                pass
            case kind:
                pytest.fail(f"{where}: blocks of {kind} are not checked by anything")


def parsed(arguments: list[str], where: str) -> None:
    """The command line is understood: command, options and the kinds of their values."""
    command = PROGRAM
    while isinstance(command, TyperGroup) and arguments and not arguments[0].startswith("-"):
        assert arguments[0] in command.commands, f"{where}: there is no command {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    try:
        command.make_context("llmdoctor", list(arguments), parent=typer.Context(PROGRAM))
    except typer.TyperException as error:
        pytest.fail(f"{where}: {shlex.join(arguments)}: {error}")


@each_page
def test_profiles_and_pairs_in_the_text_can_be_read(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(blocks(page)):
        if block.kind == "yaml":
            path = tmp_path / f"{number}.yaml"
            path.write_text(block.text, encoding="utf-8")
            assert yaml.safe_load(block.text).keys() <= {"extends", *Profile.model_fields}
            load_profile(path)
        if block.kind == "jsonl":
            path = tmp_path / f"{number}.jsonl"
            path.write_text(block.text, encoding="utf-8")
            columns = {"prompt": "q", "chosen": "good", "rejected": "bad"} if '"good"' in block.text else None
            assert len(list(read_pairs(path, strict=True, columns=columns))) == len(block.text.splitlines())


# --- what is named ---------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


@each_page
def test_every_figure_names_the_command_that_makes_it(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if line.startswith("!["):
            below = "\n".join(lines[number + 1 : number + 8])
            assert re.search(r"(python|llmdoctor) [^\n]*(makes|: ) ?the picture", below), f"{page.name}: {line}"


def test_the_index_and_the_readme_lead_to_every_page() -> None:
    for page in (ROOT / "docs" / "index.md", README):
        linked = {(page.parent / target).resolve() for target in re.findall(r"\]\(([^)#]+\.md)", prose(page))}
        assert set(PAGES) - {page, README} <= linked | {page}, page.name


def options(command: Any) -> set[str]:
    """All options of a command and of those below it."""
    found = {name for p in command.params for name in (*p.opts, *p.secondary_opts) if name.startswith("-")}
    for inner in getattr(command, "commands", {}).values():
        found |= options(inner)
    return found | {"--help", "-h"}


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.stem)
def test_every_file_command_and_option_exists(page: Path) -> None:
    every = options(PROGRAM)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    slash = {command.name for command in COMMANDS} | {"show", "reset", "help", "quit", "set"}
    for span in spans(page):
        words = span.split()
        if span.startswith("/") and re.fullmatch(r"/[a-z]+", words[0]):
            assert words[0][1:] in slash, span
            for name in re.findall(r"([\w.]+)=", span):
                assert name in setting_names(("helpful", "safe")) or name == "helpful", span
        if words[0] == "make" and len(words) > 1:
            assert words[1] in targets, span
        program = next((w for w in words if re.fullmatch(r"benchmarks/\w+\.py", w)), None)
        if program:
            source = (ROOT / program).read_text(encoding="utf-8")
            assert all(f'"{w}"' in source for w in words if w.startswith("--")), span
        elif words[0] == "llmdoctor" and len(words) > 1 and not words[1].isupper():
            command = PROGRAM if words[1].startswith("-") else PROGRAM.commands.get(words[1])
            assert command is not None, span
            assert {w for w in words if w.startswith("--")} <= options(command), span
        elif words[0] not in OTHER_PROGRAMS:
            assert {w.split("=")[0] for w in words if w.startswith("--")} <= every, span
        path = span.split(":")[0]
        if "/" in path and path.split("/")[0] in FOLDERS and re.fullmatch(r"[\w./-]+", path):
            assert (ROOT / path).exists(), span


def test_every_command_and_every_public_name_is_explained() -> None:
    terminal, python = (ROOT / "docs" / f"{name}.md" for name in ("terminal", "python"))
    for name in PROGRAM.commands:
        assert f"\n| `{name}` |" in terminal.read_text(), f"docs/terminal.md has no row for the command {name}"
    for name in llmdoctor.__all__:
        assert f"\n| `{name}` |" in python.read_text(), f"docs/python.md has no row for {name}"
    for command in COMMANDS:
        assert f"/{command.name}" in terminal.read_text(), f"docs/terminal.md does not know /{command.name}"


def test_every_module_of_the_engine_has_its_place_in_the_tree() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("```text\n")[2].partition("```")[0]
    named = set(re.findall(r"\w+\.py", tree))
    engine = {path.name for path in (ROOT / "llmdoctor").rglob("*.py") if not path.name.startswith("__")}
    assert engine - named == set()
    assert named - {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")} == set()


def setting_rows() -> Iterator[tuple[str, str]]:
    """Every section of a profile, and a row of Markdown for each of its settings."""
    for section, field in Profile.model_fields.items():
        kinds = [*get_args(field.annotation), field.annotation]
        for schema in (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Settings)):
            for name, setting in schema.model_fields.items():
                default = setting.get_default(call_default_factory=True)
                written = "needed" if setting.is_required() else f"`{as_yaml(default)}`"
                yield section, f"| `{name}` | {written} | {setting.description} |"


def as_yaml(value: object) -> str:
    """A default as one writes it in a profile."""
    match value:
        case None | bool():
            return json.dumps(value)
        case float():
            return f"{value:g}"
        case tuple():
            return f"[{', '.join(map(str, value))}]"
    return str(value)


def test_every_setting_is_in_its_section_of_the_page_of_profiles() -> None:
    page = (ROOT / "docs" / "profiles.md").read_text(encoding="utf-8")
    parts = {part.split("\n")[0]: part for part in page.split("\n### ")}
    wanted: dict[str, list[str]] = {}
    for section, row in setting_rows():
        wanted.setdefault(section, []).append(row)
    for section, rows in wanted.items():
        found = [line for line in parts[section].splitlines() if line.startswith("| `")]
        assert found == rows, f"docs/profiles.md, section {section}: python tests/test_documents.py prints the tables"


# --- what the README promises ----------------------------------------------------------------------------------------


def test_the_readme_has_at_most_900_words() -> None:
    """By the strictest count, that of ``wc -w``: code, marks of tables and addresses too."""
    assert len(README.read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "benchmarks.md"], ids=lambda page: page.stem)
def test_the_figures_of_the_real_model_are_those_measured(page: Path) -> None:
    """The table of the wishes, against benchmarks/results/real.md, at the digits that it shows."""
    measured: dict[tuple[str, str, str], list[str]] = {}
    parts = (ROOT / "benchmarks" / "results" / "real.md").read_text(encoding="utf-8").split("\n### ")
    for part in parts[1:]:
        for cells in rows(part):
            measured[part.split("\n")[0], cells[0], cells[2]] = cells[4:6]
    table = page.read_text(encoding="utf-8").partition("| letters per word |")[2].split("\n\n")[0]
    methods = {"patient alone": "patient", "contrast of two system prompts": "contrast", "the same": "contrast"}
    methods |= {"doctor": "advantage", "steering vector": "steering"}
    methods |= {"best of eight": "best of 8", "best of four guided": "advantage, best of 4"}
    count = 0
    for name, *cells in rows(table):
        method, _, strength = name.replace("*", "").partition(",")
        key = (methods.get(method, method), strength.replace("beta", "").replace(" .", " 0.").strip())
        wishes = ("sentiment", "plain words", "impersonal")[: len(cells) // 2]
        for wish, gold, kl in zip(wishes, cells[0::2], cells[1::2], strict=True):
            if not gold:
                continue
            found_gold, found_kl = measured[wish, *key]
            for shown, found in zip(numbers(gold), numbers(found_gold), strict=True):
                assert abs(shown - abs(found)) <= 0.0051, (name, gold, found_gold)
            assert abs(numbers(kl)[0] - numbers(found_kl)[0]) <= 0.00051, (name, kl, found_kl)
            count += 1
    assert count >= 8


def rows(text: str) -> Iterator[list[str]]:
    """The cells of a table's rows, without its head."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("| ") and len(cells) > 4 and cells[0] not in ("", "method"):
            yield cells


def numbers(cell: str) -> list[float]:
    return [abs(float(number)) for number in re.findall(r"\d*\.?\d+", cell)]


if __name__ == "__main__":
    shown = ""
    for section, row in setting_rows():
        if section != shown:
            print(f"\n### {section}\n\n| key | default | what it is |\n|---|---|---|")
        shown = section
        print(row)
