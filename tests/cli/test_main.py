"""Errors become exit codes and one line; help and version come without torch; pipes may close early."""

import errno
import os
import subprocess
import sys
from types import ModuleType

import pytest

import llmdoctor
from llmdoctor.__main__ import run as entry
from llmdoctor.cli import options
from llmdoctor.errors import DataError, LLMDoctorError, LoadError, ProfileError, StorageError, TrainingError, UsageError

COMMANDS = [
    "",
    "extract",
    "train",
    "chat",
    "compare",
    "serve",
    "eval",
    "inspect",
    "profiles",
    "profiles list",
    "profiles show",
]


def raising(error):
    def load(_name):
        raise error

    return load


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (LLMDoctorError("broken"), 1),
        (UsageError("broken"), 2),
        (DataError("broken\nin two lines"), 2),
        (ProfileError("broken"), 2),
        (LoadError("broken"), 3),
        (StorageError("broken"), 1),
        (TrainingError("broken"), 1),
        (OSError(errno.ENOSPC, "No space left on device", "/here"), 1),
    ],
    ids=repr,
)
def test_an_error_is_one_line_and_its_exit_code(error, code, fails, monkeypatch):
    monkeypatch.setattr(options, "load", raising(error))
    words = ["No space left", "/here", "Free some space"] if isinstance(error, OSError) else ["error: broken"]
    fails(code, words, "compare", "Hi")


class OutOfMemoryError(RuntimeError):
    """As torch's is called."""


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("CUDA out of memory. Tried to allocate ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: ..."),
        MemoryError(),
    ],
    ids=repr,
)
def test_memory_that_ends_is_one_line(error, fails, monkeypatch):
    monkeypatch.setattr(options, "load", raising(error))
    fails(1, ["out of memory", "--batch-size"], "compare", "Hi")


def test_a_defect_of_the_program_is_not_hidden(run, monkeypatch):
    monkeypatch.setattr(options, "load", raising(RuntimeError("a bug")))
    assert repr(run("compare", "Hi").exception) == "RuntimeError('a bug')"


def test_interruption_is_130_without_traceback(run, monkeypatch):
    monkeypatch.setattr(options, "load", raising(KeyboardInterrupt()))
    result = run("compare", "Hi")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


def test_version(run):
    assert run("--version").stdout == f"llmdoctor {llmdoctor.__version__}\n"


def test_the_bare_command_shows_help(run):
    result = run()
    assert result.exit_code == 0
    assert "compare" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_describes_the_command(command, run):
    result = run(*command.split(), "--help", env={"TERM": "dumb", "COLUMNS": "100"})
    assert result.exit_code == 0
    assert "Usage: " in result.stdout


def test_help_never_imports_torch():
    script = f"""
import sys
from typer.testing import CliRunner
from llmdoctor.cli.main import app
for command in {COMMANDS!r}:
    assert CliRunner().invoke(app, [*command.split(), "--help"]).exit_code == 0, command
heavy = sorted({{"torch", "transformers", "numpy", "pyarrow"}} & set(sys.modules))
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_python_m_llmdoctor_and_a_reader_that_leaves_early():
    program = subprocess.Popen(
        [sys.executable, "-m", "llmdoctor", "profiles"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    program.stdout.close()
    assert program.stderr.read() == ""
    program.wait(timeout=60)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nonsense"], ["nonsense"]),
        (["compare", "Hi", "--colour"], ["--colour", "llmdoctor compare --help"]),
        (["compare", "Hi", "--max-new-tokens", "many"], ["--max-new-tokens", "integer"]),
        (["compare"], ["prompt", "--prompts"]),
        (["compare", "Hi", "--prompts", "x.txt"], ["prompt", "--prompts"]),
        (["compare", " "], ["prompt is empty"]),
        (["compare", "Hi", "--lens", "xray"], ["--lens", "xray", "value"]),
        (["compare", "Hi", "--lens-doctor", "quack"], ["--lens-doctor", "quack", "helpful"]),
        (["compare", "Hi", "--beta", "nan"], ["beta", "finite", "nan"]),
        (["compare", "Hi", "--beta", "helpful=inf"], ["beta", "finite", "inf"]),
        (["compare", "Hi", "--beta", "-1"], ["beta", "-1"]),
        (["compare", "Hi", "--beta", "much"], ["--beta", "much"]),
        (["compare", "Hi", "--beta", "quack=1"], ["--beta", "quack", "helpful"]),
        (["compare", "Hi", "--alpha", "nan"], ["alpha", "finite", "nan"]),
        (["compare", "Hi", "--temperature", "-0.5"], ["temperature", "-0.5"]),
        (["compare", "Hi", "--top-p", "0"], ["top_p", "0"]),
        (["compare", "Hi", "--seed", "-1"], ["--seed", "0"]),
        (["compare", "Hi", "--doctor", "a=x", "--doctor", "a=y"], ["--doctor", "'a'"]),
        (["chat", "--temperature", "-1"], ["temperature", "-1"]),
        (["train", "--theta", "1"], ["theta", "1"]),
        (["train", "--tau", "nan"], ["tau", "finite"]),
        (["train", "--direction", "up"], ["direction", "up", "gap"]),
        (["train", "--rho", "0"], ["rho", "0"]),
        (["extract", "--face", "poker"], ["--face", "poker", "helpful"]),
        (["extract", "--limit", "0"], ["--limit", "1"]),
        (["profiles", "show", "clinik"], ["clinik", "clinic"]),
        (["compare", "Hi", "--profile", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
    ids=" ".join,
)
def test_a_usage_mistake_is_said_before_anything_is_loaded(args, words, fails, monkeypatch):
    monkeypatch.setattr(options, "load_assistant", lambda *_args, **_how: pytest.fail("loaded a model"))
    fails(2, words, *args)


def test_a_profile_with_an_unknown_key(fails, tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text("patient: {model: ./patient}\ntrain: {rhoo: 3}\n")
    fails(2, ["mine.yaml", "train.rhoo", "train.rho"], "compare", "Hi", "--profile", profile)


def test_models_still_at_work_do_not_abort_the_exit():
    """A thread inside a call of torch when the interpreter ends aborts the process; it used to be exit code -6."""
    code = """
import sys, threading, time, torch
from llmdoctor.cli import main

def speak():
    a = torch.randn(400, 400)
    while True:
        a @ a

def leave(**_):
    threading.Thread(target=speak, name="llmdoctor-generation", daemon=True).start()
    time.sleep(0.3)
    print("said", end="")
    sys.exit(130)

main.app = leave
main.run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "said", "")


class _Interrupted(ModuleType):
    def __getattr__(self, name):
        raise KeyboardInterrupt


def test_ctrl_c_while_modules_are_imported_is_one_line(monkeypatch, capsys):
    """On a busy machine that takes seconds; it was a traceback."""
    monkeypatch.setitem(sys.modules, "llmdoctor.cli.main", _Interrupted("llmdoctor.cli.main"))
    with pytest.raises(SystemExit) as ended:
        entry()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("given", "count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_do_not_spin_long_unless_the_user_says_so(monkeypatch, given, count):
    """It is in the environment before anything imports torch."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # whatever `entry` sets is taken back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen = []
    module = ModuleType("llmdoctor.cli.main")
    module.run = lambda: seen.append(os.environ.get("GOMP_SPINCOUNT"))
    monkeypatch.setitem(sys.modules, "llmdoctor.cli.main", module)
    entry()
    assert seen == [count]
