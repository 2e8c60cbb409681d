"""Profiles of one's own, what a bug report needs, the shell's completion, and the examples of the help."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.core import TyperOption

from llmdoctor.cli import main, profiles, terminal
from llmdoctor.profile import load_profile


@pytest.fixture(autouse=True)
def own(monkeypatch, tmp_path):
    """A configuration folder of its own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "llmdoctor" / "profiles"


def test_a_new_profile_is_found_by_its_name_and_takes_over_what_it_does_not_state(run, fails, own):
    assert run("profiles", "new", "mine").stdout.strip() == str(own / "mine.yaml")
    assert run("profiles", "check", "mine").exit_code == 0
    (own / "mine.yaml").write_text("extends: clinic\ndecode: {alpha: 2.0}\ndoctors: {safe: {beta: 0.1}}\n")
    mine, clinic = load_profile("mine"), load_profile("clinic")
    assert mine.decode == clinic.decode.replace(alpha=2.0)
    assert mine.patient == clinic.patient  # its own folder, although the path is relative to the clinic's file
    assert mine.doctors["safe"] == clinic.doctors["safe"].replace(beta=0.1)
    assert mine.doctors["helpful"] == clinic.doctors["helpful"]
    shown = json.loads(run("profiles", "show", "mine", "--origin", "--json").stdout)
    assert shown["decode.alpha"] == {"value": 2.0, "from": str(own / "mine.yaml")}
    assert shown["decode.mode"]["from"].endswith("clinic.yaml")
    assert shown["decode.top_k"]["from"] is None
    assert "mine" in run("profiles", "list").stdout
    fails(2, ["'mine'", "another name"], "profiles", "new", "mine")
    fails(2, ["'clinic'", "another name"], "profiles", "new", "clinic")


def test_check_names_every_place_where_there_is_nothing(run):
    stated = (
        "extends: clinic",
        "patient: {model: ~/no-patient}",
        "train: {doctor: ./no-base}",
        "decode: {draft_model: ./no-draft}",
        "data: {source: ./no-pairs.jsonl}",
        "doctors: {safe: {base: ./no-base}, new: {checkpoint: ./no-doctor}}",
    )
    Path("mine.yaml").write_text("\n".join(stated))
    said = run("profiles", "check", "mine.yaml").stderr.splitlines()
    named = ("patient.model", "data.source", "train.doctor", "doctors.safe.base", "doctors.new.checkpoint")
    assert [line.split(": ")[1] for line in said] == [*named, "decode.draft_model"]


def test_what_extends_cannot_be(fails, own):
    own.mkdir(parents=True)
    (own / "loop.yaml").write_text("extends: loop\n")
    (own / "gone.yaml").write_text("extends: nowhere\n")
    (own / "odd.yaml").write_text("extends: [clinic]\n")
    (own / "typo.yaml").write_text("extends: clinic\ndecode: {alfa: 1}\n")
    fails(2, ["loop.yaml", "extends itself"], "profiles", "check", "loop")
    fails(2, ["'nowhere'"], "profiles", "check", "gone")
    fails(2, ["odd.yaml", "'extends'"], "profiles", "check", "odd")
    fails(2, ["typo.yaml", "decode.alfa", "decode.alpha"], "profiles", "check", "typo")


def test_a_profile_that_is_wrong_does_not_hide_the_others(run, own):
    own.mkdir(parents=True)
    (own / "bad.yaml").write_text("patient: 3\n")
    listed = run("profiles", "list")
    assert listed.exit_code == 0
    assert "clinic" in listed.stdout
    assert "bad.yaml" in listed.stderr


def test_the_schema_knows_every_section_and_setting(run):
    schema = json.loads(run("profiles", "schema").stdout)
    stated = yaml.safe_load(run("profiles", "show", "clinic").stdout)
    assert set(stated) | {"extends"} == set(schema["properties"])
    assert set(stated["decode"]) == set(schema["$defs"]["DecodeSettings"]["properties"])


def test_env_names_versions_device_and_folders(run, own):
    found = json.loads(run("env", "--json", env={"LLMDOCTOR_BETA": "secret"}).stdout)
    assert found["packages"]["torch"]
    assert found["device"]["dtype"]
    assert found["folders"]["profiles"] == str(own)
    assert found["variables"] == ["LLMDOCTOR_BETA"]
    assert "secret" not in json.dumps(found)
    assert "packages.torch: " in run("env").stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("chat --profile c", "clinic"),
        ("chat --beta h", "helpful="),
        ("chat --profile zz", ""),
        ("train --method h", "head"),
        ("chat --mode r", "ratio"),
    ],
)
def test_the_shell_completes_names(typed, offered, run):
    words = f"llmdoctor {typed}"
    asked = {"_LLMDOCTOR_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3"}
    assert run(env=asked, prog_name="llmdoctor").stdout.strip() == offered


def test_quiet_keeps_warnings_and_results(run, monkeypatch):
    asked = ("inspect", "--text", "Just sleep.", "--show", "gap")
    assert "note:" in run(*asked).stderr
    for quiet in (("-q", *asked), (*asked, "-q")):
        done = run(*quiet)
        assert done.stderr == ""
        assert "raw gap" in done.stdout
    assert "note:" in run(*asked).stderr  # of that run only
    monkeypatch.setattr(terminal, "_level", -1)
    terminal.say("warning: still said")


ALL_COMMANDS = [*main.EXAMPLES, "eval", "profiles", *(f"profiles {name}" for name in ("list", "show", "new", "check"))]


def command_of(words):
    """The command that ``words`` begin with, and the words after it."""
    command = typer.main.get_command(main.app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("name", main.COMMANDS)
def test_the_list_of_commands_says_what_each_says_of_itself(name):
    command, _ = command_of([name])
    panel, summary = main.COMMANDS[name]
    assert " ".join(command.help.split("\n\n")[0].split()) == summary
    assert (command.name, command.rich_help_panel) == (name, panel)


def test_the_list_of_commands_loads_none_of_them():
    code = (
        "import sys; sys.argv = ['llmdoctor', '--help']\n"
        "from llmdoctor.cli.main import run\n"
        "try: run()\nexcept SystemExit: pass\n"
        "held = ('pydantic', 'llmdoctor.settings', 'llmdoctor.cli.chat', 'llmdoctor.cli.compare', 'torch', 'numpy')\n"
        "print('LOADED', [name for name in held if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "compare" in done.stdout
    assert done.stdout.endswith("LOADED []\n")


@pytest.mark.parametrize("name", ALL_COMMANDS)
def test_the_help_shows_every_option_whole_at_80_columns_and_examples(name, run):
    command, _ = command_of(name.split())
    shown = run(*name.split(), "--help", env={"COLUMNS": "80", "TERM": "dumb"}).stdout.split()
    too_long = {"gradient_checkpointing"}  # with its --no- form
    for option in (one for one in command.params if isinstance(one, TyperOption) and one.name not in too_long):
        assert set(shown) >= {*option.opts, *option.secondary_opts}, option.name
    assert "Examples:" in shown


def test_the_examples_of_the_help_run(run, monkeypatch, tmp_path):
    """Those that need other models or a terminal are only parsed."""
    monkeypatch.setenv("LLMDOCTOR_MAX_NEW_TOKENS", "8")
    monkeypatch.setenv("LLMDOCTOR_MAX_STEPS", "1")
    Path("prompts.txt").write_text("How can I sleep better?\n")
    Path("other.jsonl").write_text('{"q": "How?", "good": "So.", "bad": "No."}\n')
    elsewhere = ("serve", "--profile smollm2", "./model", "org/", "--private", "--method head", "extends", "check mine")
    order = ("", "chat", "compare", "extract", "inspect", "train", "shrink", "push", "serve", "env")
    assert set(order) == set(main.EXAMPLES)
    for line in [line for name in order for line in main.EXAMPLES[name]] + list(profiles.EXAMPLES):
        command, arguments = command_of(shlex.split(line))
        if any(part in line for part in elsewhere):
            command.make_context("llmdoctor", arguments)
            continue
        done = run(*shlex.split(line), input="")
        assert done.exit_code == 0, (line, done.output, done.exception)
        assert done.stdout or "--html" in line or line.startswith("chat")


def test_a_reader_that_leaves_early_is_no_error():
    """As `llmdoctor profiles show | head -1`."""
    program = subprocess.Popen(
        [sys.executable, "-m", "llmdoctor", "profiles", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    program.stdout.close()
    assert program.stderr.read() == b""
    assert program.wait(timeout=60) == 0


def test_a_doctor_that_is_missing_is_said_before_a_hub_is_asked(fails, monkeypatch):
    from llmdoctor.cli import options

    monkeypatch.setattr(options, "assistant", lambda *_args, **_how: pytest.fail("loaded a model"))
    fails(3, ["no doctor at nowhere", "doctor.json"], "compare", "Hi", "--patient", "org/name", "--doctor", "nowhere")


def test_a_finished_run_is_not_repeated(run, tmp_path):
    """extract and train say so, and no byte changes."""

    def held():
        return {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in sorted(tmp_path.glob("*/*.json*"))}

    rewards, doctor = tmp_path / "rewards", tmp_path / "doctor"
    commands = (
        ("extract", "--limit", 4, "-o", rewards),
        ("train", "--rewards", rewards, "-o", doctor, "--max-steps", 1),
    )
    assert "pairs of the profile clinic" in run(*commands[0]).stderr  # which it takes without --data
    assert run(*commands[1]).exit_code == 0
    before = held()
    for command in commands:
        again = run(*command)
        assert again.exit_code == 0
        assert "nothing was changed" in again.stderr
        assert "wrote" not in again.stdout
    assert held() == before
    assert "nothing was changed" not in run(*commands[1], "--fresh").stderr


def test_push_shows_what_it_would_send(run, fails):
    from llmdoctor.profile import profile_path

    folder = profile_path("clinic").parent / "clinic" / "helpful"
    shown = json.loads(run("push", folder, "me/helpful", "--dry-run", "--json").stdout)
    assert set(shown["files"]) == {file.name for file in folder.iterdir()}
    assert shown["card"] == (folder / "README.md").read_text()
    assert "model.safetensors" in run("push", folder, "me/helpful", "--dry-run").stdout
    fails(2, ["org/name", "'helpful'"], "push", folder, "helpful", "--dry-run")
    fails(3, ["no doctor at", "doctor.json"], "push", folder.parent, "me/helpful")
